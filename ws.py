"""One WebSocket on the server's side, under flask-sock in place of its own.

The framing is the `websockets` library's (RFC 6455, without input and output); this file adds the
socket: one reader, whole frames sent under one lock, no compression, a limit on what is received,
pings, and closing from any thread. Works with cooperative threads and with real ones.
"""

import logging
import select
import sys
import threading
import time
import weakref
from base64 import b64decode
from contextlib import suppress
from functools import partial, wraps
from socket import SHUT_RDWR, SHUT_WR

import flask_sock
from simple_websocket import ConnectionClosed
from websockets.exceptions import ConnectionClosed as ProtocolClosed
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, SERVER, Protocol
from websockets.utils import accept_key
from werkzeug.exceptions import BadRequest, HTTPException

log = logging.getLogger("orchestratia.ws")
_quiet = logging.getLogger("orchestratia.ws.protocol")  # the library tells of every end
_quiet.setLevel(logging.WARNING)

RECV_BYTES = 16 * 1024  # of the smallest frames as many as fit are parsed in some 10 ms
STRANGER_MOST = 64 * 1024  # bytes in a message of somebody who has not said who they are
QUIET_S = 25.0  # silence after which a ping is sent, and the longest a send may be stuck
GONE_S = 60.0  # silence after which the other side is taken for dead
CLOSING_S = 2.0  # how long a closed connection may wait for the other side's farewell
REASON_MOST = 120  # bytes of a reason in a close frame (RFC 6455: 123)
YIELD_EVERY = 8  # messages of one peer after which others get their turn
TURN_S = 1e-9  # to sleep 0 s lets only those run who are ready; with this, input is looked for too
AT_ONCE = 32  # readers in the background whose turn it is at the same moment
ANSWERING_S = 1.0  # so long after it was asked, what a peer says may be the answer
PONGS_MOST = 100  # that wait to be sent; a peer must not expect one for each ping (RFC 6455, 5.5.3)


class UpgradeRequired(HTTPException):
    code = 426
    description = "This hub speaks WebSocket version 13 only."

    def get_headers(self, *args, **kwargs):
        wanted = [("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket")]
        return [*super().get_headers(*args, **kwargs), *wanted]


def text_frame(payload: bytes) -> bytes:
    """A whole text message as it goes over the wire; may be sent to any number of peers."""
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


class _Background:
    """Readers at whose connections nobody waits. They do not wait at their sockets but here, for a
    turn: a few at once, and then other input is looked for. However many peers say something at
    the same moment, a keystroke waits for few of them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._turns: dict[int, threading.Lock] = {}  # by file descriptor
        self._epoll = None

    def wait(self, wire: "Wire", seconds: float) -> None:
        """Until the wire has something to read and its turn has come, or somebody waits for it.
        Raises TimeoutError."""
        fd, turn = wire.fileno(), threading.Lock()
        turn.acquire()
        with self._lock:
            if wire.awaited():
                return
            self._turns[fd] = turn
            self._arm(fd)
        if not turn.acquire(timeout=seconds):
            with self._lock:
                self._turns.pop(fd, None)
            raise TimeoutError

    def _arm(self, fd: int) -> None:
        if self._epoll is None:
            self._epoll = _EPOLL()
            threading.Thread(target=self._usher, name="turns", daemon=True).start()
        try:
            self._epoll.modify(fd, _READABLE_ONCE)
        except FileNotFoundError:  # a new connection, whatever number it has
            self._epoll.register(fd, _READABLE_ONCE)

    def hurry(self, fd: int) -> None:
        """Somebody waits for what comes there: it is read at once."""
        with self._lock:
            turn = self._turns.pop(fd, None)
        if turn:
            turn.release()

    def _usher(self) -> None:
        readable = select.poll()
        readable.register(self._epoll.fileno(), select.POLLIN)
        while True:
            readable.poll()
            for fd, _ in self._epoll.poll(0, AT_ONCE):
                self.hurry(fd)
            time.sleep(TURN_S)


def _original_epoll():
    """The system's epoll, which cooperative threads hide; None where there is none."""
    monkey = sys.modules.get("gevent.monkey")
    try:
        return monkey.get_original("select", "epoll") if monkey else select.epoll
    except AttributeError:
        return None


_EPOLL = _original_epoll()
_READABLE_ONCE = 0x001 | 0x2000 | 1 << 30  # EPOLLIN, EPOLLRDHUP, EPOLLONESHOT (sys/epoll.h)
_background = _Background()


class Wire:
    """An accepted WebSocket.

    Raises BadRequest or UpgradeRequired for a handshake that is none. One thread calls
    `receive()`; any thread may `send()` and `close()`.
    """

    def __init__(self, environ: dict):
        answer = _handshake(environ)
        self._sock, self._stream = _socket_of(environ)
        # Tells flask-sock what its server does with the answer that has been written already.
        self.mode = "werkzeug" if "werkzeug.socket" in environ else "gevent"
        self._sock.settimeout(QUIET_S)
        self._protocol = Protocol(SERVER, state=OPEN, max_size=STRANGER_MOST, logger=_quiet)
        self._rules = threading.Lock()  # around the protocol's state
        self._sending = threading.Lock()  # around the socket: whole frames only
        # Lists: an empty deque takes ten times as much, and most connections are idle.
        self._answers: list[bytes] = []  # of the protocol itself: pongs, at the end a farewell
        self._messages: list[str | bytes] = []
        self._parts: tuple[Opcode, bytearray] | None = None
        self._taken = 0
        self._background = False
        self._asked = 0.0  # when somebody began to wait for an answer
        self._closed = False  # we have said farewell, or it has ended
        self._ended = False
        self.heard = time.monotonic()
        _open.add(self)
        with suppress(ConnectionClosed):  # its reader will see
            self._write(answer)

    def allow(self, size: int) -> None:
        """Receive messages of up to `size` bytes from now on."""
        self._protocol.max_message_size = size

    def stay_in_background(self) -> None:
        """Nobody waits for what this peer says, unless `expect_answer` was called just before."""
        self._background = _EPOLL is not None

    def expect_answer(self) -> None:
        """Somebody waits for what the peer says to that which is sent next."""
        self._asked = time.monotonic()
        if self._background:
            _background.hurry(self.fileno())

    def awaited(self) -> bool:
        """Whether somebody waits for what the peer says."""
        return time.monotonic() - self._asked < ANSWERING_S

    def fileno(self) -> int:
        return self._sock.fileno()

    def limit_silence(self, seconds: float) -> None:
        """How long `receive` waits before it pings; also the longest a send may be stuck."""
        self._sock.settimeout(seconds)

    # ── receiving ─────────────────────────────────────────────────────────────────────────────

    def receive(self, timeout: float | None = None) -> str | bytes | None:
        """The next message; None when none came within `timeout` seconds.

        Raises ConnectionClosed when the connection has ended, whoever ended it.
        """
        if self._closed:
            raise ConnectionClosed(self._protocol.close_code)
        if timeout is not None and not self._messages:
            return self._receive_within(timeout)
        while not self._messages:
            self._read()
        return self._messages.pop(0)

    def receive_all(self) -> list[str | bytes]:
        """The messages that have come, waiting for one; a few at most, and others get their turn
        in between, however fast one peer sends."""
        taken = [self.receive()]
        while self._messages and len(taken) < YIELD_EVERY:
            taken.append(self._messages.pop(0))
        self._taken += len(taken)
        if self._taken >= YIELD_EVERY:
            self._taken = 0
            time.sleep(TURN_S)
        return taken

    def _receive_within(self, timeout: float) -> str | bytes | None:
        """Only before anybody else uses the socket: its time-out is changed meanwhile."""
        usual, deadline = self._sock.gettimeout(), time.monotonic() + timeout
        try:
            while not self._messages:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._sock.settimeout(left)
                self._read(ping=False)
        finally:
            self._sock.settimeout(usual)
        return self._messages.pop(0)

    def _read(self, ping: bool = True) -> None:
        self._check_open()
        try:
            if self._background and not self.awaited():
                _background.wait(self, self._sock.gettimeout())
            data = self._sock.recv(RECV_BYTES)
        except TimeoutError:
            if ping:
                self._look_alive()
            return
        except OSError:
            data = b""
        self.heard = time.monotonic()
        self._parse(data)
        if not self._messages:
            time.sleep(TURN_S)  # however much it was, it was nothing one waits for

    def _check_open(self) -> None:
        if self._closed or self._protocol.state is not OPEN:
            raise ConnectionClosed(self._protocol.close_code)

    def _parse(self, data: bytes) -> None:
        with self._rules:
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            frames = self._protocol.events_received()
            self._answers += [part for part in self._protocol.data_to_send() if part]
            del self._answers[:-PONGS_MOST]
        for frame in frames:
            if not self._closed:
                self._assemble(frame)
        self._answer()
        if not self._messages:
            self._check_open()

    def _assemble(self, frame: Frame) -> None:
        """Messages from frames: fragments are joined, text must be UTF-8."""
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._parts = frame.opcode, bytearray()
        elif frame.opcode is not Opcode.CONT:
            return
        kind, parts = self._parts
        parts += frame.data
        if not frame.fin:
            return
        self._parts = None
        try:
            self._messages.append(parts.decode() if kind is Opcode.TEXT else bytes(parts))
        except UnicodeDecodeError as error:
            self._messages.clear()
            self.close(1007, f"{error.reason} at position {error.start}")

    def _look_alive(self) -> None:
        if time.monotonic() - self.heard > GONE_S:
            self._end()
        else:
            self._write(Frame(Opcode.PING, b"").serialize(mask=False))

    # ── sending ───────────────────────────────────────────────────────────────────────────────

    def send(self, text: str | bytes) -> None:
        """Send a text message. Raises ConnectionClosed."""
        self.send_encoded(text_frame(text.encode() if isinstance(text, str) else text))

    def send_encoded(self, frames: bytes) -> None:
        """Send what `text_frame` made, or several joined. Raises ConnectionClosed."""
        self._write(frames)

    def _write(self, data: bytes) -> None:
        try:
            with self._sending:
                self._check_open()  # nothing follows a farewell
                self._sock.sendall(data)
        except OSError as error:  # gone, or stuck for too long in the middle of a frame
            self._end()
            raise ConnectionClosed(1006) from error
        self._answer()

    def _answer(self) -> None:
        """Send pongs and the like; the reader never waits for a peer that takes nothing, whoever
        is sending just now does it afterwards."""
        while self._answers and not self._closed and self._sending.acquire(blocking=False):
            try:
                self._sock.sendall(self._waiting())
            except OSError as error:
                self._end()
                raise ConnectionClosed(1006) from error
            finally:
                self._sending.release()

    def _waiting(self) -> bytes:
        with self._rules:
            answers = b"".join(self._answers)
            self._answers.clear()
        return answers

    # ── closing ───────────────────────────────────────────────────────────────────────────────

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say farewell and take nothing more, from any thread. Does not wait for the answer."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        with self._rules, suppress(InvalidState, ProtocolClosed):  # they said it first: the answer
            self._protocol.send_close(code, _short(reason))
            self._answers += self._protocol.data_to_send()
        if not self._sending.acquire(timeout=CLOSING_S):
            return self._end()  # a send is stuck: no farewell would get through
        try:
            self._sock.settimeout(CLOSING_S)
            self._sock.sendall(self._waiting())
            self._sock.shutdown(SHUT_WR)
        except OSError:
            pass  # it has ended already
        finally:
            self._sending.release()

    def finish(self) -> None:
        """The last thing its reader does: take what still comes for a moment, so that our farewell
        is not lost to a reset, then let the connection go."""
        self.close()
        deadline = time.monotonic() + CLOSING_S
        try:
            self._sock.settimeout(CLOSING_S)
            while not self._ended and time.monotonic() < deadline:
                if not self._sock.recv(RECV_BYTES):
                    break
                time.sleep(TURN_S)
        except OSError:
            pass  # it has ended already
        self._end()
        if self._stream is None:
            self._sock.close()  # nobody else does: its request is over
        elif self.mode == "gevent":
            self._stream.close()  # its server would take what was not read for a request

    def leave_request(self) -> None:
        """Go on when the request is over: its server closes what it has of the connection then."""
        self._stream.close()
        self._stream = None
        usual, self._sock = self._sock.gettimeout(), type(self._sock)(fileno=self._sock.detach())
        self._sock.settimeout(usual)

    def _end(self) -> None:
        self._ended = True
        self._closed = True
        _open.discard(self)
        with suppress(OSError):  # it has ended already
            self._sock.shutdown(SHUT_RDWR)


_open: "weakref.WeakSet[Wire]" = weakref.WeakSet()
_stopping = threading.Event()


def stop(patience_s: float = 0.0) -> None:
    """Close every open WebSocket because the hub stops, and give those who serve them so long."""
    _stopping.set()
    closing = [
        threading.Thread(target=wire.close, args=(1012, "the hub restarts"), daemon=True)
        for wire in list(_open)
    ]
    for thread in closing:  # side by side: some may be stuck
        thread.start()
    for thread in closing:
        thread.join()
    deadline = time.monotonic() + patience_s
    for thread in list(_serving):
        thread.join(max(0.0, deadline - time.monotonic()))


def stopping() -> bool:
    """Whether connections end because the hub stops, and not because somebody went away."""
    return _stopping.is_set()


def _short(reason: str) -> str:
    return reason.encode()[:REASON_MOST].decode(errors="ignore")


def _handshake(environ: dict) -> bytes:
    """The answer that accepts the upgrade. Raises BadRequest or UpgradeRequired."""
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != "13":
        raise UpgradeRequired()
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    try:
        valid = len(b64decode(key, validate=True)) == 16
    except ValueError:
        valid = False
    if not valid:
        raise BadRequest("This is no WebSocket handshake: Sec-WebSocket-Key is missing or wrong.")
    if environ["REQUEST_METHOD"] != "GET" or environ["SERVER_PROTOCOL"] != "HTTP/1.1":
        raise BadRequest("A WebSocket handshake is a GET request of HTTP/1.1.")
    if environ.get("CONTENT_LENGTH") or environ.get("HTTP_TRANSFER_ENCODING"):
        raise BadRequest("A WebSocket handshake has no body.")
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_key(key)}",
        "\r\n",
    )
    return "\r\n".join(lines).encode()


def _socket_of(environ: dict) -> tuple:
    """The connection itself and the server's reader of it, from gevent's environment or
    werkzeug's."""
    stream = environ["wsgi.input"]
    stream = getattr(stream, "rfile", stream)
    return environ.get("werkzeug.socket") or stream.raw._sock, stream


class _Upgraded:
    """What flask-sock has of a connection while its request lasts."""

    def __init__(self, environ: dict):
        self.wire = Wire(environ)
        self.mode = self.wire.mode

    def close(self) -> None:
        """Whoever serves the connection closes it."""


flask_sock.Server = _Upgraded
_sock = flask_sock.Sock()
_serving: set[threading.Thread] = set()


def route(bp, path: str):
    """Register a handler `(wire, **parts of the path)` for a WebSocket on a blueprint.

    If it returns a function, that serves the connection from then on, beyond the request where
    that is possible: of an idle connection, what belongs to its request is the greater part.
    """

    def register(handler):
        @wraps(handler)
        def upgraded(connection: _Upgraded, **parts):
            wire = connection.wire
            serve = _guarded(path, wire, partial(handler, wire, **parts))
            if serve and wire.mode == "gevent":
                wire.leave_request()
                threading.Thread(
                    target=_serve, args=(path, wire, serve), name=path, daemon=True
                ).start()
            else:
                _finish(path, wire, serve)

        _sock.route(path, bp=bp)(upgraded)
        return handler

    return register


def _serve(path: str, wire: Wire, serve) -> None:
    thread = threading.current_thread()
    _serving.add(thread)
    try:
        _finish(path, wire, serve)
    finally:
        _serving.discard(thread)


def _finish(path: str, wire: Wire, serve) -> None:
    if serve:
        _guarded(path, wire, serve)
    wire.finish()


def _guarded(path: str, wire: Wire, handle):
    """What `handle` returns; nothing when the connection has ended or the handler is broken."""
    try:
        return handle()
    except ConnectionClosed:
        pass
    except Exception:  # an HTTP answer cannot be given any more
        log.exception("%s failed", path)
        wire.close(1011, "Something broke inside the hub; its log says what.")
