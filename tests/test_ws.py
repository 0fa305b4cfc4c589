"""RFC 6455 as `Wire` keeps it: hostile handshakes and frames, peers that vanish, many senders.

The handlers at the end run in processes of their own, under gevent and under plain threads; what
depends on who is connected is asked of a real hub. Run as a program this file is such a process.
"""

if __name__ == "__main__":
    import sys

    if sys.argv[1] == "gevent":
        from gevent import monkey

        monkey.patch_all()

import base64
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from zlib import crc32

import flask
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import ws
from conftest import ROOT, wait_until

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # this one and its answer stand in RFC 6455, 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
MOST = 100_000  # bytes the echo takes in one message
BIG = 16_000_000  # more than kernels keep for a peer that does not read

# ── a client that sends whatever it likes ─────────────────────────────────────────────────────


def frame(opcode: int, data=b"", *, fin=True, rsv=0, mask=b"\x9a\x01\xff\x37", length=None):
    """The bytes of a client's frame; `length` claims another size, without a mask it is wrong."""
    data = data.encode() if isinstance(data, str) else data
    size = len(data) if length is None else length
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = 0x80 if mask else 0
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += struct.pack("!BH", bit | 126, size)
    else:
        head += struct.pack("!BQ", bit | 127, size)
    return head + mask + masked(data, mask) if mask else head + data


def masked(data: bytes, mask: bytes) -> bytes:
    whole = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(len(data), "big")


def text(data="", **kwargs) -> bytes:
    return frame(TEXT, data, **kwargs)


def farewell(code: int | None = 1000, reason="") -> bytes:
    return frame(CLOSE, said(code, reason))


def said(code: int | None, reason="") -> bytes:
    """The payload of a close frame."""
    reason = reason.encode() if isinstance(reason, str) else reason
    return b"" if code is None else struct.pack("!H", code) + reason


class Raw:
    """A TCP connection that asks for an upgrade and then speaks frames."""

    def __init__(self, port: int, path: str = "/echo", *, request=None, keep: int = 0, **headers):
        self.sock = socket.socket()
        if keep:  # bytes the kernel keeps for us while we do not read
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, keep)
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""
        self.sock.sendall(request or upgrade(path, **headers))
        self.status, self.headers = self._answer()

    def _answer(self) -> tuple[int, dict]:
        while b"\r\n\r\n" not in self.data and self._more():
            pass
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return int(first.split()[1]), {k.lower(): v.strip() for k, _, v in fields}

    def _more(self) -> bool:
        data = self.sock.recv(1 << 20)
        self.data += data
        return bool(data)

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def read(self) -> tuple[int, bytes] | None:
        """The next frame of the server; None at the end of the stream."""
        while (found := self._frame()) is None:
            if not self._more():
                assert not self.data, "the stream ends within a frame"
                return None
        return found

    def _frame(self):
        if len(self.data) < 2:
            return None
        first, second = self.data[:2]
        assert first & 0x70 == 0 and first & 0x80 and second < 0x80, "not a frame of a server"
        start, size = 2, second
        if size > 125:
            start = 4 if size == 126 else 10
            if len(self.data) < start:
                return None
            size = int.from_bytes(self.data[2:start], "big")
        if len(self.data) < start + size:
            return None
        payload, self.data = self.data[start : start + size], self.data[start + size :]
        return first & 0x0F, payload

    def rest(self) -> list[tuple[int, bytes]]:
        """Every frame until the server ends the connection, which it must do without a reset."""
        return list(iter(self.read, None))

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """End it with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def upgrade(path="/echo", *, method="GET", version="HTTP/1.1", **headers) -> bytes:
    """The bytes of a request for an upgrade; a header given as None is left out."""
    usual = {
        "host": "127.0.0.1",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec_websocket_key": KEY,
        "sec_websocket_version": "13",
    }
    fields = {k.replace("_", "-"): v for k, v in (usual | headers).items() if v is not None}
    lines = [f"{method} {path} {version}", *(f"{k}: {v}" for k, v in fields.items()), "\r\n"]
    return "\r\n".join(lines).encode("latin-1")


# ── the processes ─────────────────────────────────────────────────────────────────────────────


class Peer:
    """This file as a process that serves the handlers below; `impatient` waits for nobody."""

    def __init__(self, mode: str, *timing: float):
        argv = [sys.executable, __file__, mode, *map(str, timing)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.port = int(self.process.stdout.readline())
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    def open(self, path="/echo", **kwargs) -> Raw:
        raw = Raw(self.port, path, **kwargs)
        assert raw.status == 101, raw.headers
        return raw

    def connect(self, path="/echo", **kwargs):
        return connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, **kwargs)

    def handlers(self) -> int:
        """How many of its WebSocket handlers are at work."""
        with Raw(self.port, request=upgrade("/handlers", upgrade=None)) as raw:
            return int(raw.headers["handlers"])

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def rss(self) -> int:
        """Bytes of memory in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()
        assert "Traceback" not in "".join(self.lines), "".join(self.lines)


@pytest.fixture(scope="module", params=["gevent", "threads"])
def peer(request):
    process = Peer(request.param)
    yield process
    process.stop()


@pytest.fixture(scope="module", params=["gevent", "threads"])
def impatient(request):
    """Silence is pinged after 0.2 s and ends after 1.5 s; a send is stuck after 0.2 s."""
    process = Peer(request.param, 0.2, 1.5, 0.3)
    yield process
    process.stop()


# ── the handshake ─────────────────────────────────────────────────────────────────────────────

HANDSHAKES = {
    "as it should be": ({}, 101),
    "any case": ({"upgrade": "WebSocket", "connection": "uPGRADE"}, 101),
    "one of several tokens": ({"connection": "keep-alive, Upgrade"}, 101),
    "unknown subprotocols and extensions": (
        {"sec_websocket_protocol": "chat, soap", "sec_websocket_extensions": "permessage-deflate"},
        101,
    ),
    "an older version": ({"sec_websocket_version": "8"}, 426),
    "a newer version": ({"sec_websocket_version": "14"}, 426),
    "several versions": ({"sec_websocket_version": "13, 8"}, 426),
    "no version": ({"sec_websocket_version": None}, 426),
    "no key": ({"sec_websocket_key": None}, 400),
    "an empty key": ({"sec_websocket_key": ""}, 400),
    "a short key": ({"sec_websocket_key": base64.b64encode(b"x" * 15).decode()}, 400),
    "a long key": ({"sec_websocket_key": base64.b64encode(b"x" * 17).decode()}, 400),
    "two keys": ({"sec_websocket_key": f"{KEY}, {KEY}"}, 400),
    "a key without padding": ({"sec_websocket_key": KEY.rstrip("=")}, 400),
    "a key of other characters": ({"sec_websocket_key": "dGhlIHNh*XBsZSBub25jZQ=="}, 400),
    "a key that is no ASCII": ({"sec_websocket_key": "\xe9" * 24}, 400),
    "no upgrade header": ({"upgrade": None}, 400),
    "another upgrade": ({"upgrade": "h2c"}, 400),
    "no connection header": ({"connection": None}, 400),
    "a connection that stays": ({"connection": "keep-alive"}, 400),
    "a plain request": ({"upgrade": None, "connection": None}, 400),
    "POST": ({"method": "POST", "content_length": "0"}, 405),
    "HEAD": ({"method": "HEAD"}, 400),
    "HTTP/1.0": ({"version": "HTTP/1.0"}, 400),
    "a body": ({"content_length": "99999999"}, 400),
    "a body in chunks": ({"transfer_encoding": "chunked"}, 400),
    "an upgrade of what is none": ({"path": "/handlers"}, 400),
}


def check_handshake(port: int, given: dict, status: int, path="/echo", **headers) -> None:
    with Raw(port, request=upgrade(**{"path": path} | given | headers)) as raw:
        assert raw.status == status
        if status == 101:
            assert raw.headers["sec-websocket-accept"] == ACCEPT
            assert (raw.headers["upgrade"], raw.headers["connection"]) == ("websocket", "Upgrade")
            assert not raw.headers.keys() & {"sec-websocket-extensions", "sec-websocket-protocol"}
        if status == 426:
            assert raw.headers["sec-websocket-version"] == "13"
            assert raw.headers["upgrade"].lower() == "websocket"


@pytest.mark.parametrize("name", HANDSHAKES)
def test_handshake(peer, name):
    check_handshake(peer.port, *HANDSHAKES[name])


def test_handshake_with_the_hub(hub):
    port, token = hub.settings["port"], hub.login()
    for given, status in HANDSHAKES.values():
        given = {"path": "/api/v1/events"} if "path" in given else given
        check_handshake(port, given, status, "/ws/dashboard", authorization=f"Bearer {token}")


def test_frames_that_came_with_the_handshake_harm_nobody(peer):
    for early in (text("too early"), b"GET /handlers HTTP/1.1\r\n\r\n", b"\r\n\r\n" * 50):
        with Raw(peer.port, request=upgrade() + early) as raw:
            assert raw.status == 101
            raw.send(farewell())
            raw.rest()


# ── frames ────────────────────────────────────────────────────────────────────────────────────

GREEK = "κόσμε 😀"
PIECES = [GREEK.encode()[n : n + 1] for n in range(len(GREEK.encode()))]


def fragments(*pieces, kind=TEXT, between=b"") -> bytes:
    """A message in pieces, with other frames between them."""
    frames = [
        frame(CONT if n else kind, piece, fin=n == len(pieces) - 1)
        for n, piece in enumerate(pieces)
    ]
    return between.join(frames)


# name: what is sent, and the messages (pongs as bytes) that come back
GOOD = {
    "text": (text("hello"), ["hello"]),
    "no text": (text(), [""]),
    "more than ASCII": (text(GREEK), [GREEK]),
    "any character": (
        text("\0\x7f\x80\uffff\U0010ffff\ufeff"),
        ["\0\x7f\x80\uffff\U0010ffff\ufeff"],
    ),
    "binary": (frame(BINARY, b"\xff\x00\xfe"), ["binary ff00fe"]),
    "no bytes": (frame(BINARY), ["binary "]),
    "a mask of zeros": (text("hello", mask=b"\0\0\0\0"), ["hello"]),
    "125 bytes": (text("x" * 125), ["x" * 125]),
    "126 bytes": (text("x" * 126), ["x" * 126]),
    "65,535 bytes": (text("x" * 65535), ["x" * 65535]),
    "65,536 bytes": (text("x" * 65536), ["x" * 65536]),
    "as much as is allowed": (text("x" * MOST), ["x" * MOST]),
    "as much, in pieces": (fragments("x" * (MOST - 1), "y"), ["x" * (MOST - 1) + "y"]),
    "many frames at once": (b"".join(text(f"{n}") for n in range(200)), [*map(str, range(200))]),
    "two fragments": (fragments("hel", "lo"), ["hello"]),
    "many fragments": (fragments(*"0123456789" * 50), ["0123456789" * 50]),
    "empty fragments": (fragments("", "a", "", "", "b", ""), ["ab"]),
    "nothing but empty fragments": (fragments(*[b""] * 300), [""]),
    "binary fragments": (fragments(b"\xff", b"\xfe", kind=BINARY), ["binary fffe"]),
    "characters cut in pieces": (fragments(*PIECES), [GREEK]),
    "a message after fragments": (fragments("a", "b") + text("c"), ["ab", "c"]),
    "ping": (frame(PING, b"\x00\xff any bytes"), [b"\x00\xff any bytes"]),
    "an empty ping": (frame(PING), [b""]),
    "the longest ping": (frame(PING, b"x" * 125), [b"x" * 125]),
    "many pings": (
        b"".join(frame(PING, f"{n}") for n in range(50)),
        [b"%d" % n for n in range(50)],
    ),
    "pings between fragments": (
        fragments("a", "b", "c", between=frame(PING, "p")),
        [b"p", b"p", "abc"],
    ),
    "pongs nobody asked for": (frame(PONG, b"x") + frame(PONG) + text("a"), ["a"]),
    "pongs between fragments": (fragments("a", "b", between=frame(PONG, b"\xff")), ["ab"]),
}

# name: what is sent, and the code the connection is closed with
BAD = {
    "continuation without a start": (frame(CONT, "a"), 1002),
    "continuation of what has ended": (fragments("a", "b") + frame(CONT, "c"), 1002),
    "a new message within a fragmented one": (text("a", fin=False) + text("b"), 1002),
    "a binary one within a fragmented text": (text("a", fin=False) + frame(BINARY, b"b"), 1002),
    "no mask": (text("hello", mask=b""), 1002),
    "an unmasked ping": (frame(PING, b"x", mask=b""), 1002),
    "an unmasked close": (frame(CLOSE, said(1000), mask=b""), 1002),
    **{f"reserved bits {bits:03b}": (text("a", rsv=bits), 1002) for bits in range(1, 8)},
    "a reserved bit on a ping": (frame(PING, rsv=4), 1002),
    "a reserved bit on a continuation": (text("a", fin=False) + frame(CONT, "b", rsv=2), 1002),
    **{f"opcode {code}": (frame(code, b"x"), 1002) for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "a ping too long": (frame(PING, b"x" * 126), 1002),
    "a pong too long": (frame(PONG, b"x" * 200), 1002),
    "a close too long": (frame(CLOSE, said(1000, "x" * 124)), 1002),
    "a fragmented ping": (frame(PING, b"x", fin=False) + frame(CONT, b"y"), 1002),
    "a fragmented close": (frame(CLOSE, said(1000), fin=False), 1002),
    "no UTF-8": (text(b"\xff"), 1007),
    "half a character": (text(b"a\xe2\x82"), 1007),
    "a character begun twice": (text(b"\xce\xce\xba"), 1007),
    "overlong, two bytes": (text(b"\xc0\xaf"), 1007),
    "overlong, three bytes": (text(b"\xe0\x80\xaf"), 1007),
    "overlong, four bytes": (text(b"\xf0\x80\x80\xaf"), 1007),
    "a surrogate": (text(b"\xed\xa0\x80"), 1007),
    "a surrogate pair": (text(b"\xed\xa0\xbd\xed\xb8\x80"), 1007),
    "beyond the last character": (text(b"\xf4\x90\x80\x80"), 1007),
    "no UTF-8 in the second fragment": (fragments("a", b"\xff"), 1007),
    "a character that no fragment ends": (fragments(b"\xf0\x9f", b"\x98", b""), 1007),
    "bytes that would be characters apart": (fragments(b"\xce", b"a\xba"), 1007),
    "no UTF-8, and the message goes on": (text(b"\xff") + text("b") + text("c"), 1007),
    "too long": (text("x" * (MOST + 1)), 1009),
    "too long, in two pieces": (fragments("x" * MOST, "y"), 1009),
    "too long, in many pieces": (fragments(*["x" * 1000] * 101), 1009),
    "63 bits of length": (frame(BINARY, length=2**63 - 1), 1009),
    "64 bits of length": (frame(BINARY, length=2**64 - 1), 1009),
    "a close of one byte": (frame(CLOSE, b"\x03"), 1002),
    **{
        f"close {code}": (farewell(code), 1002)
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)
    },
    "a reason that is no UTF-8": (farewell(1000, b"\xff"), 1007),
    "a close within a fragmented message": (text("a", fin=False) + farewell(1000), 1002),
}  # fmt: skip

# name: what is sent, and the payload of the close frame that comes back
ENDS = {
    "no status": (farewell(None), b""),
    **{
        f"close {code}": (farewell(code), said(code))
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
    },
    "a reason": (farewell(1000, GREEK), said(1000, GREEK)),
    "the longest reason": (farewell(1000, "x" * 123), said(1000, "x" * 123)),
    "frames after it": (farewell(1001) + text("late") + frame(PING) + farewell(4000), said(1001)),
    "garbage after it": (farewell(1001) + b"\xff" * 50_000, said(1001)),
}


def check_goes_on(raw: Raw, expected: list) -> None:
    """What is expected comes back, and the connection still works and ends as it should."""
    raw.send(frame(PING, "the end"))
    found = [raw.read() for _ in range(len(expected) + 1)]
    messages = [data.decode() for opcode, data in found if opcode == TEXT]
    pongs = [data for opcode, data in found if opcode == PONG]
    assert messages == [m for m in expected if isinstance(m, str)]
    assert pongs == [*(m for m in expected if isinstance(m, bytes)), b"the end"]
    raw.send(farewell(1000, "bye"))
    assert raw.rest() == [(CLOSE, said(1000, "bye"))]


@pytest.mark.parametrize("name", GOOD)
def test_what_keeps_the_rules_is_understood(peer, name):
    sent, expected = GOOD[name]
    with peer.open() as raw:
        raw.send(sent)
        check_goes_on(raw, expected)


@pytest.mark.parametrize("name", BAD)
def test_what_breaks_a_rule_ends_the_connection_with_the_right_code(peer, name):
    sent, code = BAD[name]
    with peer.open() as raw:
        raw.send(text("before"))
        assert raw.read() == (TEXT, b"before")
        raw.send(sent, text("after") * 3)
        found = raw.rest()
        opcode, data = found.pop()
        assert (opcode, data[:2]) == (CLOSE, said(code))
        assert [message for message in found if message != (TEXT, b"ab")] == []
        data[2:].decode()


@pytest.mark.parametrize("name", ENDS)
def test_a_farewell_is_answered_and_nothing_after_it(peer, name):
    sent, answer = ENDS[name]
    with peer.open() as raw:
        raw.send(sent)
        assert raw.rest() == [(CLOSE, answer)]


def test_frames_may_come_byte_by_byte(peer):
    sent = [(sent, expected) for sent, expected in GOOD.values() if len(sent) < 1000]
    with peer.open() as raw:
        for byte in b"".join(given for given, _ in sent):
            raw.send(bytes([byte]))
        check_goes_on(raw, [one for _, expected in sent for one in expected])
    for given, code in [found for found in BAD.values() if len(found[0]) < 50]:
        with peer.open() as raw:
            for byte in given:
                raw.send(bytes([byte]))
            assert raw.rest()[-1][1][:2] == said(code)


def test_frames_may_be_cut_anywhere(peer):
    dice = random.Random(6455)
    known = [found for found in GOOD.values() if len(found[0]) < 70_000]
    with peer.open() as raw:
        chosen = dice.choices(known, k=150)
        stream = b"".join(sent for sent, _ in chosen)
        writing = threading.Thread(target=send_in_pieces, args=(raw, stream, dice))
        writing.start()
        expected = [m.encode() for _, some in chosen for m in some if isinstance(m, str)]
        frames = iter(raw.read, None)
        assert [next(d for o, d in frames if o == TEXT) for _ in expected] == expected
        writing.join()


def send_in_pieces(raw: Raw, stream: bytes, dice: random.Random) -> None:
    while stream:
        size = dice.choice([1, 2, 7, 100, 1460, 65536])
        raw.send(stream[:size])
        stream = stream[size:]


def test_a_message_that_is_followed_by_a_farewell_at_once_is_still_taken(peer):
    with peer.open("/remember") as raw:
        raw.send(text("last words"), farewell())
        assert raw.rest() == [(CLOSE, said(1000))]  # and nothing behind it
    with peer.open("/remember") as raw:
        raw.send(text("?"))
        assert raw.read() == (TEXT, b"last words")


def test_who_sends_too_much_hears_why_before_the_connection_ends(peer):
    """Unread bytes must not turn the farewell into a reset."""
    for _ in range(5):
        with peer.open() as raw:
            raw.send(text("x" * 3_000_000))
            raw.send(text("and more"))
            (_, data), *_ = raw.rest()
            assert data[:2] == said(1009)


# ── peers that go ─────────────────────────────────────────────────────────────────────────────


def test_half_a_connection_is_none(peer):
    with peer.open() as raw:
        raw.send(text("a"))
        raw.sock.shutdown(socket.SHUT_WR)
        assert [data for opcode, data in raw.rest() if opcode == TEXT] == [b"a"]


def test_resets_at_any_moment_leave_nothing_behind(peer):
    raw = peer.open()
    raw.close()
    wait_until(lambda: peer.handlers() == 0)
    fds, threads = peer.fds(), peer.threads()
    for n in range(60):
        sock = socket.create_connection(("127.0.0.1", peer.port))
        sock.sendall(upgrade() + text("a" * 50_000)[: n * 1000])
        if n % 3:
            sock.recv(1 + n * 100)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    for cut in (1, 3, 30_000):
        raw = peer.open()
        raw.send(text("a" * 50_000)[:cut])
        raw.reset()
    wait_until(lambda: peer.handlers() == 0)
    wait_until(lambda: peer.fds() <= fds + 1 and peer.threads() <= threads + 1)


def test_silence_is_pinged_and_ends_unless_it_is_answered(impatient):
    with impatient.open() as silent, impatient.open() as alive:
        began = time.monotonic()
        for _ in range(10):  # longer than a silent one is borne
            assert alive.read() == (PING, b"")
            alive.send(frame(PONG))
        assert {opcode for opcode, _ in silent.rest()} == {PING}
        assert time.monotonic() - began < 5
        alive.send(text("still here"))
        assert (TEXT, b"still here") in iter(alive.read, None)


def test_a_peer_that_vanishes_is_let_go(impatient):
    wait_until(lambda: impatient.handlers() == 0)
    fds, threads = impatient.fds(), impatient.threads()
    gone = [impatient.open(path, keep=4096) for path in ("/echo", "/stuck") * 20]
    for raw in gone:
        raw.send(text("x"))
    assert impatient.handlers() > 0
    wait_until(lambda: impatient.handlers() == 0)
    wait_until(lambda: impatient.fds() <= fds + 1 and impatient.threads() <= threads + 1)
    for raw in gone:
        raw.close()


def test_a_peer_that_ignores_the_farewell_is_let_go(impatient):
    with impatient.open("/farewell") as raw:
        raw.send(text(json.dumps([4001, "enough"])))
        wait_until(lambda: impatient.handlers() == 0)
        assert raw.rest() == [(CLOSE, said(4001, "enough"))]


# ── senders ───────────────────────────────────────────────────────────────────────────────────


def test_everybody_gets_a_turn_when_many_speak_at_once(peer):
    many = [peer.open("/background") for _ in range(5 * ws.AT_ONCE)]
    for round_ in "ab":
        for raw in many:
            raw.send(text(round_))
        for raw in many:
            assert raw.read() == (TEXT, round_.encode())
    for raw in many:
        raw.close()


def test_messages_of_many_threads_stay_whole(peer):
    with peer.connect("/senders", max_size=None, compression=None) as connection:
        connection.send("begin")
        sizes, last = [], {}
        while len(sizes) < SENDERS * MESSAGES:
            thread, number, check, body = connection.recv(10).split(":", 3)
            assert crc32(body.encode()) == int(check)
            assert int(number) == last.get(thread, -1) + 1
            last[thread] = int(number)
            sizes.append(len(body))
        assert max(sizes) == 1_000_000 and set(last) == {str(n) for n in range(SENDERS)}


def test_pings_are_answered_while_a_large_message_is_under_way(peer):
    with peer.open("/large") as raw:
        raw.send(text("begin"), frame(PING, b"are you there"))
        raw.send(b"".join(frame(PING, f"{n}") for n in range(20)))
        found = [raw.read() for _ in range(22)]
        assert [len(data) for opcode, data in found if opcode == TEXT] == [BIG]
        pongs = [data for opcode, data in found if opcode == PONG]
        assert pongs == [b"are you there", *(b"%d" % n for n in range(20))]


def test_pings_of_who_reads_nothing_do_not_fill_the_memory(peer):
    with peer.open("/large", keep=4096) as raw:
        raw.send(text("begin"))
        raw.sock.recv(1)  # of what never gets further
        raw.sock.settimeout(0.5)
        before = peer.rss()
        flood = frame(PING, b"x" * 125) * 2000
        with suppress(TimeoutError):
            for _ in range(120):  # 240,000 pings
                raw.send(flood)
        assert peer.rss() - before < 10_000_000
        raw.reset()


def test_a_stuck_send_ends_its_connection_and_hinders_no_other(impatient):
    with impatient.open("/stuck", keep=4096) as stuck, impatient.connect() as other:
        stuck.send(text("begin"))
        wait_until(lambda: impatient.handlers() == 2)
        slowest, rounds = 0.0, 0
        while impatient.handlers() == 2:
            began = time.monotonic()
            other.send("a")
            assert other.recv(5) == "a"
            slowest, rounds = max(slowest, time.monotonic() - began), rounds + 1
            assert rounds < 100_000
        assert rounds > 10 and slowest < 0.5


@pytest.mark.parametrize("peer", ["gevent"], indirect=True)  # threads take turns by themselves
@pytest.mark.parametrize("kind", ["pings", "empty fragments", "messages"])
def test_a_flood_of_one_peer_leaves_others_their_turn(peer, kind):
    many = {
        "pings": frame(PING) * 5000,
        "empty fragments": frame(CONT, fin=False) * 5000,
        "messages": text("") * 5000,
    }[kind]
    with peer.open("/sink") as flooding, peer.connect() as other:
        flooding.send(text("", fin=False) if kind == "empty fragments" else b"")
        stop, floods = threading.Event(), []

        def flood():
            with suppress(OSError):
                while not stop.is_set():
                    flooding.send(many)
                    floods.append(1)

        def drain():
            with suppress(OSError):
                while flooding.sock.recv(1 << 16):
                    pass

        threads = [threading.Thread(target=run, daemon=True) for run in (flood, drain)]
        for thread in threads:
            thread.start()
        took = []
        while len(floods) < 15 or len(took) < 30:
            began = time.monotonic()
            other.send("a")
            assert other.recv(10) == "a"
            took.append(time.monotonic() - began)
        stop.set()
        threads[0].join(10)
        flooding.reset()
        assert max(took) < 2  # seconds, before; hundredths now


def test_a_close_by_another_thread_wakes_the_reader_and_reaches_the_peer(peer):
    for code, reason, told in (
        (1000, "", ""),
        (4401, "the key was revoked", "the key was revoked"),
        (1012, "ä" * 100, "ä" * 60),
    ):
        with peer.connect("/farewell") as connection:
            connection.send(json.dumps([code, reason]))
            with pytest.raises(ConnectionClosed):
                connection.recv(5)
            assert connection.close_code == code
            assert connection.close_reason == told


def test_a_close_reaches_a_peer_that_is_sending_all_the_time(peer):
    for _ in range(5):
        with peer.open("/farewell") as raw:
            raw.send(text(json.dumps([4401, "revoked"])))
            for _ in range(40):
                raw.send(text("x" * 60_000), frame(PING))
            frames = [(o, d) for o, d in raw.rest() if o != PONG]
            assert frames == [(CLOSE, said(4401, "revoked"))]


# ── clients others have written ───────────────────────────────────────────────────────────────


def test_the_websockets_library_with_compression_offered(peer):
    with peer.connect(compression="deflate") as connection:
        assert connection.protocol.extensions == []
        for message in (GREEK, "", "x" * MOST):
            connection.send(message)
            assert connection.recv(5) == message
        connection.send(b"\xff")
        assert connection.recv(5) == "binary ff"
        connection.send(["in ", "three ", "pieces"])
        assert connection.recv(5) == "in three pieces"
        assert connection.ping().wait(5)
    assert connection.close_code == 1000


@pytest.mark.parametrize("peer", ["gevent"], indirect=True)
def test_chromium(peer):
    from playwright.sync_api import sync_playwright

    from chromium import CHROMIUM, FLAGS

    script = """port => new Promise((resolve, reject) => {
        const socket = new WebSocket(`ws://127.0.0.1:${port}/echo`, ["chat"].slice(1));
        const got = [];
        const send = ["κόσμε 😀", "", "x".repeat(90000)];
        socket.onopen = () => send.forEach(s => socket.send(s));
        socket.onmessage = e => {
            got.push(e.data);
            if (got.length == send.length) socket.close(4321, "tschüß");
        };
        socket.onerror = reject;
        socket.onclose = e => resolve([
            got.every((s, n) => s === send[n]), got.length, socket.extensions, e.code, e.wasClean]);
    })"""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            assert chromium.new_page().evaluate(script, peer.port) == [True, 3, "", 4321, True]
        finally:
            chromium.close()


# ── who may send how much to the hub ──────────────────────────────────────────────────────────

MB = 1024 * 1024


def padded(size: int, **fields) -> str:
    """A JSON object of exactly so many bytes."""
    bare = len(json.dumps(fields | {"pad": ""}))
    return json.dumps(fields | {"pad": "x" * (size - bare)})


def outcome(port: int, path: str, size: int, pieces: int = 1, first=(), **headers) -> int | None:
    """The code a message of this size is answered with; None when the connection goes on."""
    with Raw(port, path, **headers) as raw:
        assert raw.status == 101
        for opening in first:
            raw.send(text(json.dumps(opening)))
        whole = padded(size, type="unknown").encode()
        step = -(-size // pieces)
        raw.send(fragments(*(whole[n : n + step] for n in range(0, size, step))), frame(PING, b"?"))
        for opcode, data in iter(raw.read, None):
            if (opcode, data) == (PONG, b"?"):
                return None
            if opcode == CLOSE:
                return struct.unpack("!H", data[:2])[0]


def test_the_hub_takes_as_much_as_it_knows_the_sender(shop):
    port, bearer = shop.settings["port"], {"authorization": f"Bearer {shop.login()}"}
    key = shop.register("dev")["api_key"]
    session = shop.api("POST", "sessions", {"server_id": "dev", "name": "one"})["id"]
    hello = [
        {"type": "auth", "api_key": key, "protocol": 2, "instance": "i"},
        {"type": "sync", "instance": "i", "sessions": []},
    ]
    terminal = f"/ws/terminal/{session}"
    for path in ("/ws/server", "/ws/dashboard", terminal):
        assert outcome(port, path, 64 * 1024 + 1) == 1009
        assert outcome(port, path, 64 * 1024 + 1, pieces=9) == 1009
        assert outcome(port, path, 64 * 1024) != 1009
    resume = [{"type": "resume", "offset": None}]
    for most in (MB, MB + 64 * 1024):
        assert outcome(port, terminal, most, 3, resume, **bearer) is None
    assert outcome(port, terminal, MB + 64 * 1024 + 1, 1, resume, **bearer) == 1009
    assert outcome(port, terminal, 2 * MB, 50, resume, **bearer) == 1009
    assert outcome(port, "/ws/dashboard", 64 * 1024 + 1, 1, [], **bearer) == 1009
    assert outcome(port, "/ws/server", 32 * MB, 1, hello) is None
    assert outcome(port, "/ws/server", 32 * MB + 1, 1, hello) == 1009
    assert outcome(port, "/ws/server", 33 * MB, 40, hello) == 1009


# ── the handlers ──────────────────────────────────────────────────────────────────────────────

SENDERS, MESSAGES = 8, 12
handlers = flask.Blueprint("handlers", __name__)
remembered = []


@handlers.get("/handlers")
def count():
    return "", {"handlers": str(len(ws._open))}


@ws.route(handlers, "/echo")
def echo(wire):
    wire.allow(MOST)
    return partial(reply, wire)  # beyond the request


@ws.route(handlers, "/background")
def background(wire):
    wire.stay_in_background()
    reply(wire)


def reply(wire):
    while True:
        for message in wire.receive_all():
            wire.send(message if isinstance(message, str) else f"binary {message.hex()}")


@ws.route(handlers, "/remember")
def remember(wire):
    while True:
        message = wire.receive()
        if message == "?":
            wire.send(remembered[-1])
        remembered.append(message)


@ws.route(handlers, "/sink")
def sink(wire):
    while True:
        wire.receive_all()


def beside(wire, send):
    """Run `send(wire)` in a thread of its own at the first message."""

    def run():
        with suppress(ws.ConnectionClosed):
            send(wire)

    wire.receive()
    threading.Thread(target=run, daemon=True).start()
    sink(wire)


@ws.route(handlers, "/large")
def large(wire):
    beside(wire, lambda wire: wire.send("x" * BIG))


@ws.route(handlers, "/stuck")
def stuck(wire):
    def send(wire):
        while True:
            wire.send("x" * BIG)

    wire.limit_silence(0.5)
    beside(wire, send)


@ws.route(handlers, "/farewell")
def leave(wire):
    code, reason = json.loads(wire.receive())
    threading.Thread(target=wire.close, args=(code, reason), daemon=True).start()
    sink(wire)


@ws.route(handlers, "/senders")
def senders(wire):
    def send(thread):
        dice = random.Random(thread)
        for number in range(MESSAGES):
            size = 1_000_000 if number == thread else dice.randint(20_000, 200_000)
            body = f"{thread}" * size
            with suppress(ws.ConnectionClosed):
                wire.send(f"{thread}:{number}:{crc32(body.encode())}:{body}")

    wire.receive()
    for thread in range(SENDERS):
        threading.Thread(target=send, args=(thread,), daemon=True).start()
    sink(wire)


def serve(mode: str, quiet=25.0, gone=60.0, closing=2.0) -> None:
    ws.QUIET_S, ws.GONE_S, ws.CLOSING_S, ws.ANSWERING_S = quiet, gone, closing, 0.0
    app = flask.Flask("peer")
    app.register_blueprint(handlers)
    if mode == "gevent":
        from gevent.pywsgi import WSGIServer

        server = WSGIServer(("127.0.0.1", 0), app, log=None)
        server.start()
        print(server.server_port, flush=True)
    else:
        import logging

        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = make_server("127.0.0.1", 0, app, threaded=True)
        print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], *map(float, sys.argv[2:]))
