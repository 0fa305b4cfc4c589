"""Clients that send garbage or send slowly are refused or let go, and nobody else feels it."""

import contextlib
import json
import random
import socket
import time

import pytest

from conftest import ROOT, wait_until
from faulting import LONG, N, check_resources, healthy, resources

pytestmark = pytest.mark.timeout(240 if not LONG else 3600)
QUICK = {"request_s": 1.0}


class Plain:
    """A connection that sends bytes and reads an answer."""

    def __init__(self, port: int):
        self.sock = socket.create_connection(("127.0.0.1", port), 10)

    def send(self, data: bytes) -> bool:
        """Whether the other side is still there."""
        try:
            self.sock.sendall(data)
        except OSError:
            return False
        return True

    def ended(self) -> bool:
        """Whether the hub has let go; reads what it has said."""
        self.sock.settimeout(0.01)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def answered(self, data: bytes) -> None:
        """Send a request, and read some of its answer."""
        self.send(data)
        assert b" 200 " in self.sock.recv(65536).partition(b"\r\n")[0]

    def answer(self) -> bytes:
        """All that comes until the end, or a pause."""
        self.sock.settimeout(10)
        said = b""
        with contextlib.suppress(OSError):
            while more := self.sock.recv(65536):
                said += more
        return said


@pytest.fixture
def dial():
    """Open a connection to a hub; all are closed."""
    made = []

    def open_one(hub) -> Plain:
        made.append(Plain(hub.settings["port"]))
        return made[-1]

    yield open_one
    for each in made:
        each.sock.close()


# ── slow ones ─────────────────────────────────────────────────────────────────────────────────

HEAD = b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX-Slow: ", HEAD + b"Content-Length: 9\r\n\r\n{"],
    ids=["nothing", "line", "header", "body"],
)
@pytest.mark.hub(**QUICK)
def test_who_sends_a_byte_now_and_then_is_let_go(shop, dial, sent):
    slow = [dial(shop) for _ in range(50)]
    for one in slow:
        one.send(sent)
    began = time.monotonic()

    def dripping() -> bool:
        return any(not one.ended() and one.send(b" ") for one in slow)

    wait_until(lambda: not dripping(), 20, 0.1)
    assert time.monotonic() - began > 0.5  # it was given its time
    healthy(shop)


@pytest.mark.hub(**QUICK)
def test_who_waits_between_requests_is_let_go_and_who_waits_for_an_answer_is_not(shop, dial):
    one = dial(shop)
    one.send(b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(one.ended, 10)
    key = shop.register("dev")["api_key"]
    began = time.monotonic()
    body = {"instance": "i", "seq": 1, "wait": 2.5, "frames": []}
    assert shop.ask("POST", "server/poll", body, key=key).status_code in (200, 409)
    with shop.http.get(
        f"{shop.url}/api/v1/events/stream",
        headers={"Authorization": f"Bearer {shop.login()}"},
        stream=True,
        timeout=10,
    ) as stream:
        wait_until(lambda: time.monotonic() - began > 2.5)
        shop.api("POST", "tasks", {"title": "seen"})
        assert any(b"task_created" in line for line in stream.iter_lines())


@pytest.mark.hub(**QUICK)
def test_a_large_body_that_comes_steadily_has_the_time_it_takes(shop, dial):
    """Two seconds and a half for a body to which a second and its size give three."""
    text = json.dumps({"title": "long", "spec": "x" * 32_000}).encode()
    one = dial(shop)
    bearer = b"Authorization: Bearer " + shop.login().encode() + b"\r\n"
    one.send(HEAD + bearer + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text))
    pieces = [text[n : n + 800] for n in range(0, len(text), 800)]
    for piece in pieces:
        assert one.send(piece)
        time.sleep(2.5 / len(pieces))
    assert b" 201 " in one.answer().partition(b"\r\n")[0]


@pytest.mark.hub(**QUICK)
def test_a_body_in_chunks_has_the_time_its_size_takes(shop, dial):
    text = json.dumps({"title": "chunks", "spec": "x" * 32_000}).encode()
    one = dial(shop)
    bearer = b"Authorization: Bearer " + shop.login().encode() + b"\r\n"
    one.send(HEAD + bearer + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
    pieces = [text[n : n + 800] for n in range(0, len(text), 800)]
    for piece in pieces:
        assert one.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        time.sleep(1.5 / len(pieces))
    one.send(b"0\r\n\r\n")
    assert b" 201 " in one.answer().partition(b"\r\n")[0]


def test_who_asks_and_does_not_read_is_let_go(start_hub, dial):
    hub = start_hub(unread_s=1.0)
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    dial(hub).answered(ask)
    before = resources(hub.process.pid)["files"]
    stuck = [dial(hub) for _ in range(20)]
    for one in stuck:
        one.send(ask * 200)  # more than the kernels keep for who does not read
    wait_until(lambda: resources(hub.process.pid)["files"] >= before + 20)
    wait_until(lambda: resources(hub.process.pid)["files"] <= before, 30)
    healthy(hub)


FEW_FILES = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.path[0] = {str(ROOT)!r}
runpy.run_path({str(ROOT / "hub.py")!r}, run_name="__main__")
"""


def test_a_shell_that_allows_few_files_limits_no_connections(start_hub, dial, tmp_path):
    script = tmp_path / "hub.py"
    script.write_text(FEW_FILES)
    hub = start_hub(script=script)
    ask = b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
    many = [dial(hub) for _ in range(100)]
    for one in many:
        one.answered(ask)
    assert resources(hub.process.pid)["files"] > 100  # all are still open


# ── garbage ───────────────────────────────────────────────────────────────────────────────────

PATHS = ("tasks", "pipelines", "auth/login", "server/poll", "servers/register", "projects", "x")
JSON = (
    b'{"title": "cut off',
    b"[" * 5000 + b"]" * 5000,
    b'{"title": "a\\u0000b"}',
    b'{"title": {"a": [1, 2, {}]}, "priority": "high", "dependencies": 5}',
    b'{"title": 1e400, "seq": -1e309, "attempt": 99999999999999999999999}',
    b'{"frames": [[[]]], "instance": [], "wait": {"a": 1}}',
    b"null",
    b"\x00\x01\x02\xff\xfe",
    b'"\\ud800"',
    b"",
)


def garbage(dice: random.Random, token: bytes) -> bytes:
    """A request of which something is wrong."""

    def mostly(usual: str, *others: str) -> str:
        return usual if dice.random() < 0.85 else dice.choice(others)

    body = dice.choice(JSON) if dice.random() < 0.8 else dice.randbytes(dice.randrange(200))
    kind = mostly("POST", "GET", "PUT", "PATCH", "DELETE", "BREW", "\0", "G" * 9000)
    path = dice.choice(PATHS) + mostly("", "/%00", "/%ff%fe", "?x=%00", "//")
    version = mostly("HTTP/1.1", "HTTP/9", "nonsense", "")
    length = mostly(str(len(body)), str(len(body) + 50), "-5", str(10**30), "x")
    sort = mostly("application/json", "text/plain", "???", "multipart/form-data; boundary=x")
    bearer = mostly(token.decode(), "nonsense", "\xff")
    more = mostly("X: y", "Transfer-Encoding: chunked", "X: " + "y" * 9000, "no colon", "\0: \1")
    head = (
        f"{kind} /api/v1/{path} {version}\r\nContent-Length: {length}\r\nContent-Type: {sort}\r\n"
        f"Authorization: Bearer {bearer}\r\n{more}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body


@pytest.mark.fault("F33 garbage over HTTP, beside clients that send slowly")
@pytest.mark.hub(request_s=5.0)
def test_f33_whatever_is_sent_is_refused_and_the_hub_stays_as_it_was(shop, dial, case):
    token = shop.login().encode()
    before = resources(shop.process.pid)
    slow = [dial(shop) for _ in range(20 * N)]
    codes: dict[str, int] = {}
    for n in range(150 * N if not LONG else 100_000):
        one = dial(shop)
        one.send(garbage(case.random, token))
        with contextlib.suppress(OSError):  # it was refused before it was read whole
            one.sock.shutdown(socket.SHUT_WR)
        said = one.answer()
        one.sock.close()
        code = said[9:12].decode()
        codes[code] = codes.get(code, 0) + 1
        assert b"Traceback" not in said and code[:1] != "5", said
        if n % 50 == 0:
            shop.api("POST", "tasks", {"title": f"beside request {n}"})
        if n % 500 == 0:
            healthy(shop, 1)
            slow = [each for each in slow if not each.ended()]
    for each in slow:
        each.sock.close()
    check_resources(before, shop)
    healthy(shop)
    case.kills = sum(codes.values())
    case.check(shop)
    case.seen = ", ".join(f"{n} of {code or 'no answer'}" for code, n in sorted(codes.items()))


@pytest.mark.hub(max_body_mb=1.0)
def test_a_body_of_a_hundred_megabytes_is_refused_before_it_is_read(shop, dial):
    before = resources(shop.process.pid)
    bearer = b"Authorization: Bearer " + shop.login().encode() + b"\r\n"
    one = dial(shop)
    one.send(HEAD + bearer + b"Content-Length: 100000000\r\n\r\n")
    one.sock.settimeout(10)
    assert b" 413 " in one.sock.recv(65536).partition(b"\r\n")[0]
    for _ in range(100):
        if not one.send(b"x" * 1_000_000):
            break
    check_resources(before, shop, 30_000)
    healthy(shop)
