"""Watchers that read slowly, vanish or come and go by the thousand, beside ones that do not, while
an agent floods: nobody else is held up, and nothing is left behind."""

import base64
import contextlib
import json
import os
import statistics
import threading
import time

import pytest

from conftest import wait_until
from faulting import LONG
from test_live_security import RESUME, Agent, Person, output
from test_ws import CLOSE, PING, TEXT, Raw, farewell, frame, text

FLOOD = 100_000_000
CHUNK = 64 * 1024
AHEAD = 256 * 1024  # what the agent has sent and the good reader has not seen, at most

HURRIED = {"ping_s": 0.5, "gone_s": 1.0, "linger_s": 0.5}


class Stage:
    """A hub, an agent on it and one session that it runs."""

    def __init__(self, hub):
        self.hub = hub
        hub.api("POST", "projects", {"name": "shop"})
        self.agent = Agent(hub, hub.register("dev")["api_key"])
        self.session = self.open("one")
        self.path = f"/ws/terminal/{self.session}"
        self.bearer = {"authorization": f"Bearer {hub.login()}"}

    def open(self, name: str, server="dev") -> str:
        made = self.hub.api("POST", "sessions", {"server_id": server, "name": name})["id"]
        wait_until(lambda: self.hub.api("GET", f"sessions/{made}")["status"] == "active")
        return made

    def watch(self, path=None, **kwargs) -> Raw:
        raw = Raw(self.hub.settings["port"], path or self.path, **self.bearer, **kwargs)
        assert raw.status == 101
        raw.send(text(json.dumps(RESUME)))
        return raw

    def person(self, session=None) -> Person:
        path = f"/ws/terminal/{session}" if session else self.path
        return Person(self.hub, path, RESUME, token=self.hub.login())

    def unwatched(self) -> bool:
        told = self.agent.told("session_watch")
        return bool(told) and not told[-1]["on"]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.hub.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.hub.process.pid}/task"))

    def rss(self) -> int:
        with open(f"/proc/{self.hub.process.pid}/status") as lines:
            return next(int(n.split()[1]) for n in lines if n.startswith("VmRSS")) * 1024


@pytest.fixture
def stage(hub):
    made = Stage(hub)
    yield made
    made.agent.close()


@pytest.fixture
def hurried(start_hub):
    """On a hub that loses patience sooner."""
    made = Stage(start_hub(**HURRIED))
    yield made
    made.agent.close()


class Reader(threading.Thread):
    """Reads a terminal as fast as it can; every byte must come once and in order."""

    def __init__(self, raw: Raw):
        super().__init__(daemon=True)
        self.raw = raw
        self.count = 0  # bytes of the flood
        self.offset = None
        self.wrong: list[str] = []
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            for opcode, data in iter(self.raw.read, None):
                if opcode == TEXT and data.startswith(b'{"type":"output"'):
                    self.take(json.loads(data))

    def take(self, given: dict) -> None:
        data = base64.b64decode(given["data"])
        if given.get("repaint") and self.offset is None:
            self.offset = given["offset"] + len(data)
            return
        if given.get("repaint") and data == b"<screen>":  # asked for by somebody else
            self.count -= len(data)
        elif data != block(self.count):
            self.wrong.append(f"another block than expected at {self.count}")
        if given["offset"] != self.offset or "skipped" in given:
            self.wrong.append(f"offset {given['offset']} in place of {self.offset}")
        self.offset = given["offset"] + len(data)
        self.count += len(data)


def block(number: int) -> bytes:
    """The block of the flood that begins at this byte."""
    return (b"%015d\n" % number) * (CHUNK // 16)


class Crawler(threading.Thread):
    """Reads 10 KB a second until it is told to hurry."""

    def __init__(self, raw: Raw):
        super().__init__(daemon=True)
        self.raw = raw
        self.hurry = threading.Event()
        self.start()

    def run(self):
        while not self.hurry.wait(0.1):
            self.raw.data += self.raw.sock.recv(1024)


class Asker(threading.Thread):
    """Asks the hub something unrelated again and again."""

    def __init__(self, hub):
        super().__init__(daemon=True)
        self.hub, self.took, self.stop = hub, [], threading.Event()
        self.start()

    def run(self):
        while not self.stop.wait(0.01):
            began = time.monotonic()
            assert self.hub.http.get(f"{self.hub.url}/api/v1/health", timeout=30).ok
            self.took.append(time.monotonic() - began)


@pytest.mark.fault("F20 a browser that reads 10 KB a second while 100 MB are printed")
def test_a_slow_watcher_beside_a_good_one_while_100_mb_are_printed(stage, case):
    good = Reader(stage.watch())
    wait_until(lambda: good.offset is not None)
    slow_raw = stage.watch(keep=4096)
    slow = Crawler(slow_raw)
    asker, before = Asker(stage.hub), stage.rss()
    sent, most = 0, 0
    while sent < FLOOD:
        if sent - good.count > AHEAD:
            wait_until(lambda: sent - good.count <= AHEAD, 60, every=0.001)  # noqa: B023
        stage.agent.say(output(stage.session, block(sent)))
        sent += CHUNK
        if sent % (100 * CHUNK) == 0:
            most = max(most, stage.rss())
    wait_until(lambda: good.count >= sent, 30)
    assert good.wrong == []
    case.count("bytes", sent, sent - good.count)
    assert most - before < 30_000_000
    slow.hurry.set()
    slow.join(10)
    skipped = marks_of(slow_raw, stage)
    assert skipped > FLOOD / 2
    asker.stop.set()
    asker.join(30)
    assert len(asker.took) > 20 and statistics.median(asker.took) < 0.5 and max(asker.took) < 5
    case.kills, grew = 1, (most - before) / 1e6
    case.seen = f"{skipped / 1e6:.0f} MB marked as skipped for the slow one; memory {grew:+.0f} MB"
    slow_raw.close()
    good.raw.reset()


def marks_of(raw: Raw, stage: Stage) -> int:
    """How many bytes the slow one was told it had missed; it must come to the end all the same."""
    offset, skipped = None, 0
    end = b"the very end"
    stage.agent.say(output(stage.session, end))
    for opcode, data in iter(raw.read, None):
        if opcode == PING:
            raw.send(frame(10, data))
        given = json.loads(data) if opcode == TEXT else {}
        if given.get("type") != "output":
            continue
        shown = base64.b64decode(given["data"])
        if offset is not None:
            assert given["offset"] == offset + given.get("skipped", 0)
            assert bool(given.get("repaint")) or "skipped" not in given
        skipped += given.get("skipped", 0)
        offset = given["offset"] + len(shown)
        if shown == end or (given.get("skipped") and shown == b"<screen>" and skipped > FLOOD / 2):
            return skipped
    pytest.fail("the slow one was cut off")


def round_trips(person: Person, agent: Agent, count: int) -> list[float]:
    """How long keystrokes take to the agent and back to the screen."""
    took = []
    for n in range(count):
        key = base64.b64encode(b"key %d %d" % (n, time.monotonic_ns())).decode()
        began = time.monotonic()
        person.say({"type": "input", "data": key})
        person.until("output", data=key)
        took.append(time.monotonic() - began)
    return took


class Echo(Agent):
    """An agent whose sessions print what is typed."""

    def take(self, given: dict) -> None:
        super().take(given)
        if given["type"] == "session_input":
            self.say(output(given["session_id"], base64.b64decode(given["data"])))


def test_a_flooding_agent_does_not_hold_up_the_keys_of_another(stage):
    echo = Echo(stage.hub, stage.hub.register("other")["api_key"])
    session = stage.open("two", "other")
    stop = threading.Event()

    def flood():
        """Ever more redraws, screens and log, as fast as they are taken."""
        offset = 0
        watched = json.dumps(output(stage.session, b"x" * CHUNK))
        while not stop.is_set():
            for _ in range(10):
                stage.agent.socket.send(watched)
            log = output(stage.session, b"y" * CHUNK) | {"type": "session_log", "offset": offset}
            stage.agent.say(
                log, {"type": "session_screen", "session_id": stage.session, "lines": []}
            )
            offset += CHUNK

    before = stage.rss()
    with stage.person() as watching, stage.person(session) as person:
        watching.until("output")
        person.until("output")
        flooding = threading.Thread(target=flood, daemon=True)
        flooding.start()
        round_trips(person, echo, 100)
        stop.set()
        flooding.join(30)
    assert stage.rss() - before < 60_000_000
    echo.close()


@pytest.mark.fault("F21 browsers vanish without a word")
def test_sockets_that_vanish_are_let_go(hurried, case):
    count = 500 if LONG else 200
    hurried.watch().close()
    wait_until(hurried.unwatched)
    fds, threads, before = hurried.fds(), hurried.threads(), hurried.rss()
    gone, most = [], 0
    for n in range(count):
        gone.append(hurried.watch(hurried.path if n % 2 else "/ws/dashboard", keep=4096))
        most = max(most, hurried.fds())
    assert most > fds + 50  # the first may have been let go before the last has come
    printing = threading.Event()

    def print_on():
        while not printing.is_set():
            hurried.agent.say(output(hurried.session, b"z" * CHUNK))

    thread = threading.Thread(target=print_on, daemon=True)
    thread.start()
    wait_until(lambda: hurried.fds() <= fds + 3, 30)
    wait_until(hurried.unwatched, 30)
    printing.set()
    thread.join(10)
    hurried.agent.settle()
    assert hurried.threads() <= threads + 1
    assert hurried.rss() - before < 60_000_000
    for raw in gone:
        raw.close()
    assert hurried.agent.code is None
    case.kills, case.seen = count, "files and threads are back where they were"


def test_a_thousand_who_come_and_go_leave_nothing(hurried):
    fds, sizes = hurried.fds(), []
    for n in range(1000):
        with hurried.watch("/ws/dashboard" if n % 4 == 3 else None) as raw:
            if n % 4 < 2:
                assert raw.read()[0] == TEXT
            if n % 4 == 1:
                raw.send(farewell())
                assert raw.rest()[-1][0] == CLOSE
            elif n % 4 == 2:
                raw.reset()
        if n % 250 == 249:
            wait_until(lambda: hurried.fds() <= fds + 3, 20)
            sizes.append(hurried.rss())
    wait_until(hurried.unwatched, 20)
    assert sizes[-1] - sizes[0] < 6_000_000, sizes


def test_a_hub_that_stops_waits_for_no_watcher_that_is_stuck(stage):
    good = Reader(stage.watch())
    wait_until(lambda: good.offset is not None)
    stuck = [stage.watch(keep=4096) for _ in range(12)]
    sent = 0
    while sent < 20_000_000:
        wait_until(lambda: sent - good.count <= AHEAD, 60, every=0.001)  # noqa: B023
        stage.agent.say(output(stage.session, block(sent)))
        sent += CHUNK
    began = time.monotonic()
    assert stage.hub.stop() == 0
    assert time.monotonic() - began < 9  # each of them may take 4
    for raw in (*stuck, good.raw):
        raw.close()


def test_a_watcher_that_asks_much_and_reads_nothing_does_not_fill_the_memory(stage):
    lines = ["w" * 1000] * 3000
    with stage.watch(keep=4096) as raw:
        wait_until(lambda: stage.agent.told("session_watch"))
        before = stage.rss()
        for n in range(1, 31):
            raw.send(text(json.dumps({"type": "scrollback"})))
            wait_until(lambda: len(stage.agent.told("capture_scrollback")) == n)  # noqa: B023
            answer = {"type": "scrollback_captured", "session_id": stage.session, "lines": lines}
            stage.agent.say(answer)
            stage.agent.settle()
        assert stage.rss() - before < 60_000_000
        raw.reset()


def test_a_reader_of_events_that_resumes_without_end_has_one_stream(stage):
    for n in range(120):
        stage.hub.api("POST", "tasks", {"title": f"task {n}", "spec": "s" * 2000})
    before = stage.rss()
    with stage.watch("/ws/dashboard", keep=4096) as raw:
        raw.send(*[text(json.dumps({"type": "resume", "after": 0}))] * 300)
        raw.sock.settimeout(20)
        raw.send(text(json.dumps({"type": "resume", "after": 10})))
        ids = []
        while not (ids and ids[0] == 11 and len(ids) > 110):
            found = json.loads(raw.read()[1])["id"]
            ids = [*ids, found] if ids and found > ids[-1] else [found]
        assert ids == list(range(11, 11 + len(ids)))
        assert stage.rss() - before < 60_000_000
    stage.hub.api("GET", "tasks")


def test_what_an_agent_sends_too_much_of_at_once_is_shown_to_nobody(stage):
    with stage.person() as person:
        person.until("output")
        before = stage.rss()
        for kind in ("x" * 20_000_000, {"x": 1}, 5):
            stage.agent.say(
                {"type": "scrollback_captured", "session_id": stage.session, "lines": kind}
            )
        stage.agent.say(output(stage.session, b"x" * (CHUNK + 1), repaint=True))
        stage.agent.say(output(stage.session, b"x" * 20_000_000))
        stage.agent.say(output(stage.session, b"y" * CHUNK))
        stage.agent.settle()
        person.until("output", data=base64.b64encode(b"y" * CHUNK).decode())
        assert [len(f["data"]) for f in person.seen if f["type"] == "output"] == [12, 87384]
        assert stage.rss() - before < 150_000_000  # of the message itself
