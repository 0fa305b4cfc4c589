"""Load for a hub or for the bare server: agents, watchers, typists, readers of events.

Each kind is a generator function, run by `Alone` in a process of its own, one step (`yield`) at a
time. What is sent is prepared and the frames are the cheapest RFC 6455 allows (a mask of zeros
changes nothing), so that the process that makes the load is not what is measured.
"""

import http.client
import json
import multiprocessing
import os
import random
import re
import select
import socket
import struct
import subprocess
import time
import traceback
from array import array
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

PATIENCE_S = 60.0  # longest wait for anything
READ_BYTES = 256 * 1024
MESSAGE = random.Random(42).randbytes(1024)  # of output
LOG_PAUSE_S = 0.1  # between two blocks of one log, as our agent does
BLOCK_BYTES = 64 * 1024
ASKS_EVERY = 10  # agents one asks whether its heartbeat was handled
CLEAR = b"\x1b[2J"
OUTPUT = b'{"type":"output"'
SYSTEM = {  # as an agent tells it of its machine
    "cpu_count": 8,
    "load_1m": 0.42,
    "memory_total_gb": 31.2,
    "memory_used_gb": 9.7,
    "memory_percent": 31.1,
    "disk_total_gb": 467.4,
    "disk_used_gb": 141.9,
    "disk_percent": 30.4,
    "platform": "Linux",
    "platform_release": "6.1.0-18-amd64",
    "python_version": "3.11.2",
    "os_username": "dev",
    "agent_version": "0.1.0",
}

now = time.perf_counter  # one clock for all processes of a machine


# ── a process of its own ──────────────────────────────────────────────────────────────────────


class Step(NamedTuple):
    """What a step gave, and what it took of a processor while it ran."""

    value: object
    cpu_share: float


class Alone:
    """A generator function in a process of its own. A step is `ask`ed for and `answer`ed."""

    def __init__(self, function: Callable[..., Iterator], *arguments):
        fresh = multiprocessing.get_context("spawn")
        self._pipe, theirs = fresh.Pipe()
        self._process = fresh.Process(target=_serve, args=(theirs, function, arguments))
        self._process.start()
        theirs.close()

    def step(self, value=None) -> Step:
        self.ask(value)
        return self.answer()

    def ask(self, value=None) -> None:
        """Have the next step done; `value` is what its `yield` gives."""
        self._pipe.send(value)

    def answer(self) -> Step:
        if not self._pipe.poll(PATIENCE_S + 30):
            raise RuntimeError("the load has not ended in time")
        try:
            result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("the process that makes the load has died") from None
        if isinstance(result, str):
            raise RuntimeError(f"the load failed:\n{result}")
        return result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(pipe, function, arguments) -> None:
    steps = function(*arguments)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            value = pipe.recv()
            cpu, began = time.process_time(), now()
            try:
                result = steps.send(value)
            except Exception:
                pipe.send(traceback.format_exc())
                return
            pipe.send(Step(result, (time.process_time() - cpu) / (now() - began)))


# ── a WebSocket ───────────────────────────────────────────────────────────────────────────────


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """A message as a client sends it."""
    size, first = len(payload), bytes([0x80 | opcode])
    if size < 126:
        head = struct.pack("!B", 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BH", 0x80 | 126, size)
    else:
        head = struct.pack("!BQ", 0x80 | 127, size)
    return first + head + bytes(4) + payload


def text(message: dict) -> bytes:
    return frame(json.dumps(message, separators=(",", ":")).encode())


class Peer:
    """A client's end of a WebSocket. Raises ConnectionError when the other side hangs up."""

    def __init__(self, address: tuple[str, int], path: str, token: str | None = None):
        self._sock = socket.create_connection(address, PATIENCE_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._come: deque[bytes] = deque()
        rights = f"Authorization: Bearer {token}\r\n" if token else ""
        self._sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{rights}\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._recv()
        answer, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if b" 101 " not in answer:
            raise ConnectionError(answer.decode())

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, frames: bytes) -> None:
        self._sock.sendall(frames)

    def _recv(self) -> bytes:
        data = self._sock.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the connection was closed")
        return data

    def come(self) -> list[bytes]:
        """The messages that have come; to be called when something can be read."""
        data = self._buffer + self._recv() if self._buffer else self._recv()
        messages, at, end = [], 0, len(data)
        while end - at >= 2:
            opcode, size, start = data[at] & 15, data[at + 1], at + 2
            if size == 126 and end - at >= 4:
                size, start = int.from_bytes(data[start : start + 2]), start + 2
            elif size == 127 and end - at >= 10:
                size, start = int.from_bytes(data[start : start + 8]), start + 8
            elif size >= 126:
                break
            if start + size > end:
                break
            at = start + size
            if opcode == 1:
                messages.append(data[start:at])
            elif opcode == 9:
                self.send(frame(data[start:at], 10))
            elif opcode == 8:
                raise ConnectionError(data[start + 2 : at].decode() or "the connection was closed")
        self._buffer = data[at:]
        return messages

    def receive(self, *types: str) -> dict:
        """The next message of these types."""
        while True:
            while not self._come:
                self._come += self.come()
            message = json.loads(self._come.popleft())
            if message["type"] in types:
                return message
            if message["type"] in ("error", "auth_error"):
                raise ConnectionError(message["detail"])

    def close(self) -> None:
        self._sock.close()


@dataclass(frozen=True)
class Place:
    """Where a load goes: the hub, with whom it knows, or the bare server, which knows nobody."""

    address: tuple[str, int]
    token: str | None = None  # of a person; None for the bare server
    servers: tuple[tuple[str, str | None], ...] = ()  # (key, id of its session)

    def agent(self, n: int) -> Peer:
        """The n-th agent, as far as it has nothing left to say but output."""
        if self.token is None:
            return Peer(self.address, f"/agent/{n}")
        peer = Peer(self.address, "/ws/server")
        key, session_id = self.servers[n]
        _introduce(peer, key, f"load-{n}")
        if session_id:
            peer.send(text({"type": "ack", "ids": [peer.receive("session_start")["id"]]}))
            started = {"type": "session_started", "session_id": session_id, "pid": 1, "spool": 1}
            peer.send(text(started | {"working_directory": "/tmp", "terminal": "tmux"}))
            peer.receive("spool_ack")
        return peer

    def session(self, n: int) -> str:
        return self.servers[n][1] if self.token else str(n)

    def watcher(self, session: str) -> Peer:
        if self.token is None:
            return Peer(self.address, f"/watch/{session}")
        peer = Peer(self.address, f"/ws/terminal/{session}", self.token)
        peer.send(text({"type": "resume", "offset": None}))
        return peer


def _introduce(peer: Peer, key: str, instance: str) -> None:
    """Authenticate and agree on what there is (protocol 2)."""
    hello = {"type": "auth", "api_key": key, "protocol": 2, "agent_version": "0.1.0"}
    hello |= {"instance": instance, "spool_id": instance, "spool_first": 1, "features": []}
    peer.send(text(hello))
    peer.receive("auth_ok")
    has = {"repos": {}, "slots": 4, "profiles": {"command": "1"}, "os": "linux", "tmux": "3.3a"}
    sync = {"type": "sync", "instance": instance, "sessions": [], "capabilities": has}
    peer.send(text(sync | {"profiles_etag": None}))
    peer.receive("sync_ok")


# ── agents that print, and one watcher each ───────────────────────────────────────────────────


@dataclass
class Flow:
    """What came of printing."""

    seconds: float = 0.0
    latencies: array = field(default_factory=lambda: array("d"))
    stored: int = 0  # bytes of logs that were acknowledged


class Printer:
    """One agent whose session prints, its log, and its one watcher."""

    def __init__(self, place: Place, n: int):
        self.session = place.session(n)
        self.agent = place.agent(n)
        self.watcher = place.watcher(self.session)
        self.logs = place.token is not None
        output = {"type": "session_output", "session_id": self.session}
        self._frame = text(output | {"data": b64encode(MESSAGE).decode()})
        self._sent: deque[float] = deque()
        self._printed = self._logged = self.acknowledged = 0
        self._end: int | None = None  # offset behind the last byte that the watcher has had
        if self.logs:
            self.agent.receive("session_watch")
            self.agent.send(text(output | {"data": b64encode(CLEAR).decode(), "repaint": True}))
            self._end = self.watcher.receive("output")["offset"] + len(CLEAR)

    def print(self, count: int = 1) -> None:
        at = now()
        for _ in range(count):
            self._sent.append(at)
        self._printed += count * len(MESSAGE)
        self.agent.send(self._frame * count)

    def waits(self) -> bool:
        return bool(self._sent) or (self.logs and self.acknowledged < self._printed)

    def shown(self, flow: Flow) -> int:
        """Take what the watcher was sent: how many messages."""
        outputs = [m for m in self.watcher.come() if m.startswith(OUTPUT)]
        at = now()
        for _ in outputs:
            flow.latencies.append(at - self._sent.popleft())
        if outputs and self._end is not None:
            self._end += len(outputs) * len(MESSAGE)
            last = json.loads(outputs[-1])
            if last["offset"] + len(MESSAGE) != self._end:
                raise RuntimeError(f"output was lost before offset {last['offset']}")
        return len(outputs)

    def told(self) -> None:
        """Take what the agent was sent: acknowledgements of its log."""
        for message in self.agent.come():
            word = json.loads(message)
            if word["type"] == "log_ack":
                self.acknowledged = word["offset"]

    def send_log(self) -> None:
        """Send what was printed since the last time, as the log's next blocks."""
        while self._logged < self._printed:
            size = min(self._printed - self._logged, BLOCK_BYTES)
            block = {
                "type": "session_log",
                "session_id": self.session,
                "offset": self._logged,
                "data": b64encode(MESSAGE * (size // len(MESSAGE))).decode(),
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
            self.agent.send(text(block))
            self._logged += size


class Crowd:
    """Many printers, served by one loop."""

    def __init__(self, place: Place, count: int):
        self.printers = [Printer(place, n) for n in range(count)]
        self._poll = select.epoll()
        self._takers = {}
        for printer in self.printers:
            self._take(printer.agent, printer, False)
            self._take(printer.watcher, printer, True)
        self._log_turns = deque(
            (n * LOG_PAUSE_S / count, printer) for n, printer in enumerate(self.printers)
        )

    def _take(self, peer: Peer, printer: Printer, shows: bool) -> None:
        self._poll.register(peer.fileno(), select.EPOLLIN)
        self._takers[peer.fileno()] = printer, shows

    def closed(self, seconds: float, in_flight: int) -> Flow:
        """Each keeps so many messages under way."""
        flow, began = Flow(), now()
        for printer in self.printers:
            printer.print(in_flight)
        while now() - began < seconds:
            for printer, count in self._look(0.1, flow):
                printer.print(count)
        return self._finished(flow, began)

    def open(self, seconds: float, rate: float) -> Flow:
        """All together print so many messages a second, one after the other."""
        flow, began, printed = Flow(), now(), 0
        while (passed := now() - began) < seconds:
            while printed < passed * rate:
                self.printers[printed % len(self.printers)].print()
                printed += 1
            self._look(max(0.0, began + printed / rate - now()), flow)
        return self._finished(flow, began)

    def _look(self, wait: float, flow: Flow) -> list[tuple[Printer, int]]:
        """Take what has come: [(printer, how many of its messages were shown)]."""
        shown = []
        for fd, _ in self._poll.poll(wait):
            printer, shows = self._takers[fd]
            if not shows:
                printer.told()
            elif count := printer.shown(flow):
                shown.append((printer, count))
        if self.printers[0].logs:
            self._send_logs()
        return shown

    def _send_logs(self) -> None:
        while self._log_turns[0][0] <= now():
            _, printer = self._log_turns.popleft()
            printer.send_log()
            self._log_turns.append((now() + LOG_PAUSE_S, printer))

    def _finished(self, flow: Flow, began: float) -> Flow:
        """Wait for the rest. What came within the time counts, the rest must come all the same."""
        flow.seconds = now() - began
        rest = Flow()
        while any(printer.waits() for printer in self.printers):
            if now() - began > flow.seconds + PATIENCE_S:
                raise RuntimeError("messages were lost, or their logs not acknowledged")
            self._look(0.1, rest)
        flow.stored = sum(printer.acknowledged for printer in self.printers)
        return flow


def printing(place: Place, count: int) -> Iterator:
    """Printers with a watcher each; then closed loops and open ones, as they are asked for."""
    crowd = Crowd(place, count)
    asked = yield
    while True:
        how, *arguments = asked
        asked = yield getattr(crowd, how)(*arguments)


# ── somebody who types ────────────────────────────────────────────────────────────────────────

KEYS = b"!#%&*+~^"  # of which no escape sequence is made here
UNTYPED = 20  # keys typed before it counts


class Socket:
    """A terminal in the browser's way."""

    def __init__(self, place: Place, session: str):
        self._peer = place.watcher(session)
        self._peer.receive("output")
        self._frames = {
            key: text({"type": "input", "data": b64encode(bytes([key])).decode()}) for key in KEYS
        }

    def type(self, key: int) -> None:
        self._peer.send(self._frames[key])

    def read(self) -> bytes:
        return b64decode(self._peer.receive("output")["data"])


class Local:
    """The same terminal attached right here."""

    def __init__(self, command: list[str]):
        self._fd, terminal = os.openpty()
        self._client = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"},
        )
        os.close(terminal)
        self.read()

    def type(self, key: int) -> None:
        os.write(self._fd, bytes([key]))

    def read(self) -> bytes:
        if not select.select([self._fd], [], [], PATIENCE_S)[0]:
            raise RuntimeError("the local terminal says nothing")
        return os.read(self._fd, READ_BYTES)


def typing_there(place: Place, session: str) -> Iterator:
    """Type through the hub; asked for (seconds, pause) it gives [(when, latency)]."""
    yield from _typing(Socket(place, session))


def typing_here(command: list[str]) -> Iterator:
    """Type into a terminal that `command` attaches in a pseudo-terminal of this process."""
    yield from _typing(Local(command))


def _typing(terminal: Socket | Local) -> Iterator:
    chance = random.Random(42)
    for _ in range(UNTYPED):
        _echo(terminal, chance.choice(KEYS))
    asked = yield
    while True:
        seconds, pause = asked
        began, typed, last = now(), [], 0
        while now() - began < seconds:
            key = chance.choice([k for k in KEYS if k != last])
            typed.append((now(), _echo(terminal, key)))
            last = key
            time.sleep(pause * chance.uniform(0.5, 1.5))
        asked = yield typed


def _echo(terminal: Socket | Local, key: int) -> float:
    """Type a key; how long until it is on the screen."""
    began = now()
    terminal.type(key)
    while key not in terminal.read():
        if now() - began > PATIENCE_S:
            raise RuntimeError("what was typed does not appear")
    return now() - began


# ── agents that have nothing to do ────────────────────────────────────────────────────────────


def idle(place: Place, count: int) -> Iterator:
    """Connect so many agents; then have all tell that they live, at one moment: (when, how long
    until they were handled). Of those that ask for an answer behind it, the last is the last."""
    poll, by_fd = select.epoll(), {}
    for n in range(count):
        peer = place.agent(n)
        poll.register(peer.fileno(), select.EPOLLIN)
        by_fd[peer.fileno()] = peer
        for fd, _ in poll.poll(0):  # pings, while others are still connecting
            by_fd[fd].come()
    peers, turn = list(by_fd.values()), 0
    yield
    while True:
        turn += 1
        heartbeat = text({"type": "heartbeat", "system_info": SYSTEM})
        ping = text({"type": "ping", "n": turn})  # answered behind what came before it
        began, missing = now(), {peer.fileno() for peer in peers[::-ASKS_EVERY]}
        for peer in peers:
            peer.send(heartbeat + ping if peer.fileno() in missing else heartbeat)
        while missing:
            if now() - began > PATIENCE_S:
                raise RuntimeError(f"{len(missing)} heartbeats were not handled")
            for fd, _ in poll.poll(0.1):
                if any(json.loads(m).get("n") == turn for m in by_fd[fd].come()):
                    missing.discard(fd)
        yield began, now() - began


# ── readers of events ─────────────────────────────────────────────────────────────────────────

NAMED = re.compile(rb"event-(\d{6})")
END_OF_EVENT = b"\n\n"


class Reader:
    """One SSE stream."""

    def __init__(self, address: tuple[str, int], path: str, token: str | None):
        self._sock = socket.create_connection(address, PATIENCE_S)
        rights = f"Authorization: Bearer {token}\r\n" if token else ""
        host = f"Host: {address[0]}:{address[1]}\r\n"
        self._sock.sendall(f"GET {path} HTTP/1.1\r\n{host}{rights}\r\n".encode())
        self._rest = b""
        while b"hello" not in self._rest:
            self._rest += self._recv()
        self.fd = self._sock.fileno()

    def _recv(self) -> bytes:
        data = self._sock.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the stream has ended")
        return data

    def come(self) -> list[int]:
        """The numbers of the events that have come."""
        data = self._rest + self._recv()
        end = data.rfind(END_OF_EVENT) + 1
        self._rest = data[end:]
        return [int(number) for number in NAMED.findall(data, 0, end)]


def reading(address: tuple[str, int], path: str, token: str | None, count: int) -> Iterator:
    """So many streams; then read so many events of each: {number: when it came, to each}."""
    readers = [Reader(address, path, token) for _ in range(count)]
    poll = select.epoll()
    for reader in readers:
        poll.register(reader.fd, select.EPOLLIN)
    by_fd = {reader.fd: reader for reader in readers}
    events = yield
    came: dict[int, array] = {n: array("d") for n in range(events)}
    wanted, deadline = events * count, now() + PATIENCE_S
    while wanted > 0 and now() < deadline:
        for fd, _ in poll.poll(0.1):
            numbers = by_fd[fd].come()
            at = now()
            for number in numbers:
                came[number].append(at)
            wanted -= len(numbers)
    yield came


def publishing(address: tuple[str, int], path: str, token: str | None) -> Iterator:
    """Make events by POST, asked for (how many, so many a second): when each was sent."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    count, rate = yield
    began, sent = now(), []
    for n in range(count):
        time.sleep(max(0.0, began + n / rate - now()))
        sent.append(now())
        connection.request("POST", path, json.dumps({"title": f"event-{n:06}"}), headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"POST {path}: {answer.status}")
    yield sent
