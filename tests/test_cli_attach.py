"""`session attach` in a real terminal: against a scripted hub for all that a hub and a network may
do, and against real hubs and agents."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from http import HTTPStatus
from pathlib import Path

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

import cli as command_line
from conftest import clean_env, wait_until

ROOT = Path(__file__).resolve().parents[1]
SESSION = {"id": "5e550000-0000-4000-8000-000000000001", "name": "dev-01", "status": "active"}
PREFIX = "\x1d"

# A test process with threads forks here, which newer Pythons frown upon; the child execs at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")


def output(text, offset, **more):
    data = text if isinstance(text, bytes) else text.encode()
    frame = {"type": "output", "data": base64.b64encode(data).decode(), "offset": offset}
    return frame | more


def state(**changes):
    facts = {"type": "state", "session_id": SESSION["id"], "name": "dev-01", "status": "active"}
    facts |= {"server_name": "dev-backend", "server_online": True, "terminal": "tmux"}
    return facts | {"may_type": True, "role": "plain"} | changes


def size(cols=80, rows=24, owner=None, yours=False):
    return {"type": "size", "cols": cols, "rows": rows, "owner": owner, "yours": yours}


class Peer:
    """The hub's end of one connection."""

    def __init__(self, connection):
        self.connection = connection
        self.headers = connection.request.headers

    def send(self, *frames):
        for frame in frames:
            raw = isinstance(frame, (str, bytes))
            self.connection.send(frame if raw else json.dumps(frame))

    def frame(self, timeout=15):
        """The next frame the command line sends."""
        return json.loads(self.connection.recv(timeout))

    def typed(self, wanted, timeout=15):
        """Reads frames until so much was typed; the kinds of the others."""
        found, others = b"", []
        while len(found) < len(wanted):
            frame = self.frame(timeout)
            if frame["type"] == "input":
                found += base64.b64decode(frame["data"])
            else:
                others.append(frame["type"])
        assert found == wanted
        return others

    def greet(self, picture="", offset=100, **changes):
        """What a hub says at first; the picture follows the size."""
        assert self.frame() == {"type": "resume", "offset": None}
        self.send(state(**changes), size())
        self.send(output(picture, offset, repaint=True))

    def until_gone(self):
        """What is still sent until the command line leaves."""
        found = []
        try:
            while True:
                found.append(self.frame())
        except ConnectionClosed:
            return found


class ScriptedHub:
    """Sockets of a hub that does what the test says: `meet()` is the next who connects."""

    def __init__(self):
        self.session, self.status, self.port = SESSION, None, 0
        self.start()

    def start(self):
        self.arrived, self.gone = [], threading.Event()
        self.taken = 0
        self.server = serve(
            self._serve, "127.0.0.1", self.port, process_request=self._answer, compression=None
        )
        self.port = self.server.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def _answer(self, connection, request):
        if request.path.startswith("/api/"):
            return connection.respond(HTTPStatus.OK, json.dumps(self.session))
        assert request.path == f"/ws/terminal/{SESSION['id']}"
        if self.status:
            body = json.dumps({"detail": "Not from there.", "code": "origin", "fields": {}})
            return connection.respond(self.status, body)

    def _serve(self, connection):
        self.arrived.append(Peer(connection))
        self.gone.wait(60)

    def meet(self):
        wait_until(lambda: len(self.arrived) > self.taken)
        self.taken += 1
        return self.arrived[self.taken - 1]

    def stop(self, code=1012):
        for peer in self.arrived:
            peer.connection.close(code, "the hub stops")
        self.gone.set()
        self.server.shutdown()
        self.thread.join()


@pytest.fixture
def scripted():
    hub = ScriptedHub()
    yield hub
    hub.stop()


class Terminal(pexpect.spawn):
    """A shell in a terminal of 80×24 that runs the command line and says how it left things."""

    SCRIPT = 'stty -g; "$@"; echo "exit=$?"; stty -g'

    def __init__(self, env, *argv, script=SCRIPT):
        words = [sys.executable, str(ROOT / "cli.py"), *argv]
        env = env | {"TERM": "xterm-256color"}
        super().__init__("/bin/sh", ["-c", script, "sh", *words], env=env, dimensions=(24, 80))
        self.timeout = 20
        self.delaybeforesend = None
        self.logfile_read = io.BytesIO()
        if script is self.SCRIPT:
            self.expect(rb"([0-9a-f:]{40,})\r\n")
            self.modes = self.match[1]

    @property
    def seen(self):
        return self.logfile_read.getvalue()

    def key(self, text):
        self.send(PREFIX + text)

    def see(self, text):
        self.expect_exact(text.encode())

    def program(self):
        """The process id of the command line."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return int(wait_until(lambda: children.read_text().split())[0])

    def leaves(self, code):
        """It ends with `code` and the terminal is as it was."""
        self.expect(rb"exit=(\d+)\r\n")
        assert int(self.match[1]) == code, self.seen
        self.expect(rb"([0-9a-f:]{40,})\r\n")
        assert self.match[1] == self.modes
        self.expect(pexpect.EOF)
        entered, left = self.seen.count(b"\x1b[?1049h"), self.seen.count(b"\x1b[?1049l")
        assert entered == left
        if entered:
            assert self.seen.rfind(b"\x1b[?7;25h") > self.seen.rfind(b"\x1b[?25l")
        return command_line.clean(self.seen.rpartition(b"\x1b[?1049l")[2].decode())


@pytest.fixture
def terminal(tmp_path):
    """Run the command line in a terminal: `terminal(hub, "session", "attach", …)`."""
    started = []

    def start(hub, *argv, token="secret", **more):
        env = clean_env(tmp_path, ORCHESTRATIA_HUB_URL=hub.url, ORCHESTRATIA_TOKEN=token)
        started.append(Terminal(env, *(argv or ("session", "attach", "dev-01")), **more))
        return started[-1]

    yield start
    for one in started:
        one.close(force=True)


# ── what passes of a session's output ─────────────────────────────────────────────────────────


def painted(*blocks):
    painter = command_line.Painter()
    return b"".join(painter.feed(block) for block in blocks)


@pytest.mark.parametrize(
    "text",
    [
        "plain ünïcode ✓\r\n\ttab\a\b",
        "\x1b[1;38:2::10:20:30mcolour\x1b[m\x1b[0 q",
        "\x1b[2J\x1b[H\x1b[3;4H\x1b[K\x1b[2;20r\x1b[4h\x1b[4l\x1b[5b\x1b[s\x1b[u",
        "\x1b7\x1b8\x1bM\x1bD\x1bE\x1bH\x1b=\x1b>\x1b(B\x1b)0\x0e\x0f",
        "\x1b[?25l\x1b[?25h\x1b[?1000h\x1b[?2004h",
    ],
)
def test_what_paints_passes(text):
    assert painted(text.encode()) == text.encode()


@pytest.mark.parametrize(
    "text, left",
    [
        ("\x1b]52;c;aGk=\x07x\x1b]52;c;aGk=\x1b\\y", "xy"),  # the clipboard
        ("\x1b]0;title\x07x\x1b]11;?\x1b\\y", "xy"),
        ("\x1bP+q544e\x1b\\x\x1b_Gi=1\x1b\\y\x1b^p\x1b\\z\x1bXs\x1b\\", "xyz"),
        ("\x1bPtmux;\x1b\x1b]52;c;aGk=\x07\x1b\\x", "x"),
        ("\x1b[c\x1b[>c\x1b[=c\x1b[6n\x1b[?6n\x1b[5n\x1b[>q\x1b[18t\x1b[21t\x1b[xq", "q"),
        ("\x1b[?25$p\x1b[?u\x1b[>1u\x1b[?996n\x1b[5i\x1b[?4i\x1b[1;1;1;1*yq", "q"),
        ("\x1bZ\x05\x1bn\x1b#8q", "q"),
        ("\x1b[?3hq\x1b[2hr\x1b[20hs", "qrs"),
        ("\x1b[?3;25;9999hq", "\x1b[?25hq"),
        ("\u009b31mx\u009d52;c;aGk=\u009c", "31mx52;c;aGk="),
        ("\x1b\x05]52;c;x\x07y", "]52;c;x\x07y"),
        ("\x1b[\x1b[31mx", "\x1b[31mx"),
        ("\x1b[?1049hx\x1b[?47ly", "\x1b[m\x1b[H\x1b[2Jx\x1b[m\x1b[H\x1b[2Jy"),
        ("\x1bcx", "\x1b[m\x1b[H\x1b[2Jx"),
    ],
)
def test_what_asks_sets_or_stays_does_not(text, left):
    assert painted(text.encode()) == left.encode()


def test_a_byte_left_out_does_not_join_its_neighbours():
    assert painted(b"\xc2\x05\x9b31m") == b"\x9b31m"
    assert painted(b"\xc2", b"\x9b31m") == b"31m"
    assert painted("é\u00a0".encode()) == "é\u00a0".encode()


def test_an_endless_sequence_takes_no_memory():
    painter = command_line.Painter()
    for start in (b"\x1b]0;", b"\x1b[1;", b"\x1bP"):
        for block in (start, *(b"1" * 10_000 for _ in range(20))):
            assert painter.feed(block) == b""
            assert len(painter.rest) < 200
        assert painter.feed(b"m\x07\x1b[mx").endswith(b"\x1b[mx")


PIECES = st.sampled_from(
    [
        *(bytes([byte]) for byte in b"\x1b\x1b\x1b[]P\\?;05cntmhqu $\x07\x05\x18\xc2\x9b\x90x\r\n"),
        *(b"\x1b[6n", b"\x1b]52;c;", b"\x1b\\", b"\x1b[?1000h", "é".encode(), b"\x1b[31m"),
    ]
)


@given(st.lists(PIECES, max_size=60).map(b"".join), st.lists(st.integers(0, 200), max_size=6))
def test_where_output_is_cut_changes_nothing_and_nothing_gets_through(data, cuts):
    places = sorted({min(cut, len(data)) for cut in (0, *cuts, len(data))})
    blocks = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
    whole = painted(data)
    assert painted(*blocks) == whole
    assert painted(whole) == whole  # what was left out leaves nothing behind that is
    assert not re.search(rb"\x1b[]P_^XcZ]|\x1b\[[?>=0-9;]*[cnt]|\x05|\xc2[\x80-\x9f]", whole)


# ── a scripted hub ────────────────────────────────────────────────────────────────────────────


def test_keys_go_out_as_they_are_and_pictures_come_in(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    assert peer.headers["Authorization"] == "Bearer secret"
    assert "Sec-WebSocket-Extensions" not in peer.headers
    peer.greet("$ ready")
    term.see("Attached to dev-01 on dev-backend. Ctrl-] d detaches")
    term.see("ready")
    assert peer.frame() == {"type": "resize", "cols": 80, "rows": 24}
    keys = "ls\r\x03\x04\x1a\x11\x13\x1b[A\tü" + PREFIX * 2
    term.send(keys)
    peer.typed(keys[:-1].encode())
    peer.send(output("one\r\ntwo", 107))
    term.see("one\r\ntwo")
    term.key("d")
    assert "Detached from dev-01; it goes on." in term.leaves(0)
    assert not [frame for frame in peer.until_gone() if frame["type"] == "input"]


def test_a_prefix_and_its_key_may_come_apart(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    term.see("ready")
    term.send("a" + PREFIX)
    peer.typed(b"a")
    term.send(PREFIX + "b")
    peer.typed(b"\x1db")
    term.key("?")
    term.see("d detach")
    term.key("x")  # no such key: nothing is typed, the keys are told
    term.see("d detach")
    term.send("c")
    peer.typed(b"c")


def test_a_notice_goes_away_with_a_new_picture(scripted, terminal, monkeypatch):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("first picture")
    peer.frame()
    term.see("Ctrl-] d detaches")
    assert peer.frame() == {"type": "resume", "offset": None}
    peer.send(output("second picture", 900, repaint=True))
    term.expect(re.escape(b"\x1b[H\x1b[2Jsecond picture"))
    peer.send(output("!", 914))
    term.expect_exact("!")
    assert b"\x1b[0;7m" not in term.before  # no banner behind it


def test_a_window_passes_on_its_size_until_someone_else_takes_it(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    assert peer.frame()["type"] == "resize"
    peer.send(size(80, 24, "ada", True))
    term.see("ready")
    term.setwinsize(30, 100)
    assert peer.frame() == {"type": "resize", "cols": 100, "rows": 30}
    peer.send(size(100, 30, "ada", True), size(132, 50, "eve\x1b[2J"))
    term.see("dev-01 is 132×50, set by eve; this terminal of 100×30 shows a part")
    assert term.seen.count(b"\x1b[?7l") == 1  # too narrow: lines are cut, not broken
    term.key("t")
    assert peer.frame() == {"type": "take_size", "cols": 100, "rows": 30}
    peer.send(size(100, 30, "ada", True))
    term.expect_exact(b"\x1b[?7h")
    peer.send(size(40, 10, "eve"))
    term.see("eve has set dev-01 to 40×10. Ctrl-] t takes the size back.")
    peer.send(size(40, 10))  # eve has left
    assert peer.frame() == {"type": "resize", "cols": 100, "rows": 30}


def test_beside_a_smaller_picture_nothing_is_left(scripted, terminal):
    term = terminal(scripted, "session", "attach", "dev-01", "--no-resize")
    peer = scripted.meet()
    peer.frame()
    peer.send(state(), size(80, 24, "eve"), output("large", 1, repaint=True))
    term.see("large")
    peer.send(size(78, 22, "eve"), output("small", 6))
    beside = "".join(f"\x1b[{row};79H\x1b[K" for row in range(1, 23))
    for _ in ("as it shrinks", "with all that is printed"):
        term.see(f"{beside}\x1b[23;1H\x1b[J\x1b8")
    assert b"small" in term.before


def test_a_session_too_large_is_told_before_it_is_shown(scripted, terminal):
    term = terminal(scripted, "session", "attach", "dev-01", "--read-only")
    peer = scripted.meet()
    peer.frame()
    peer.send(state(), size(200, 24, "eve"), output("ready", 1, repaint=True))
    term.see("dev-01 is 200×24, set by eve; this terminal of 80×24 shows a part of it.")
    term.see("\x1b[?1049h")


@pytest.mark.parametrize("flag", ["--read-only", "--no-resize", "may not"])
def test_who_only_watches_types_and_changes_nothing(scripted, terminal, flag):
    flags = [flag] if flag.startswith("--") else []
    term = terminal(scripted, "session", "attach", "dev-01", *flags)
    peer = scripted.meet()
    peer.greet("ready", may_type=flag != "may not")
    term.see("Attached" if flag == "--no-resize" else "Watching")
    term.see("ready")
    term.setwinsize(30, 100)
    if flag == "--no-resize":
        term.send("x")
        assert set(peer.typed(b"x")) <= {"resume"}
        term.key("d")
    else:
        term.send("x")
        term.see("You only watch here.")
        term.see("\a")
        term.send("\x03")
    term.leaves(0)
    assert {frame["type"] for frame in peer.until_gone()} <= {"resume"}


def test_a_hub_that_restarts_loses_and_repeats_nothing(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("", offset=1000)
    stream = b"".join(b"<%05d>" % number for number in range(3000))
    place = 0
    for cut in (0, 1, 6999, 7000, 15_003):
        while place < cut:
            step = min(900, cut - place)
            peer.send(output(stream[place : place + step], 1000 + place))
            place += step
        wait_until(lambda: term.expect([rb"<\d{5}>", pexpect.TIMEOUT], 0.05) is not None)
        scripted.stop()
        scripted.start()
        peer = scripted.meet()
        assert peer.frame() == {"type": "resume", "offset": 1000 + place}
        back = min(place, 40)  # a hub may give again what was there
        peer.send(state(), size(80, 24, "ada", True))
        peer.send(output(stream[place - back : place + 7], 1000 + place - back))
        place += 7
        term.see("Connected again.")
    peer.send(output(stream[place:], 1000 + place), output("THE END", 1000 + len(stream)))
    term.see("THE END")
    banner = rb"\x1b7\x1b\[\?6l\x1b\[0;7m.*?\x1b8|\x1b\[\?7h"
    shown = re.sub(banner, b"", term.seen)
    assert re.findall(rb"<(\d{5})>", shown) == [b"%05d" % n for n in range(3000)]


def test_keys_typed_while_the_hub_is_away_are_refused_and_never_sent(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    term.see("ready")
    scripted.stop()
    term.see("Lost the connection to the hub")
    term.send("rm -rf x\r")
    term.see("Not typed")
    term.see("\a")
    term.send("\x1b[I\x1b[<0;5;5M")  # the mouse and the focus are not keys
    scripted.start()
    peer = scripted.meet()
    assert peer.frame() == {"type": "resume", "offset": 105}
    peer.send(state(), size(80, 24, "ada", True))
    term.see("Connected again.")
    term.send("y")
    peer.typed(b"y")
    scripted.stop()
    term.see("Lost the connection")
    term.key("d")  # leaving is always possible
    term.leaves(0)
    scripted.start()


def test_frames_that_are_not_as_agreed_change_nothing(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.frame()
    garbage = ["", "[]", "nonsense", "null", "[" * 100_000, b"\xff\xfe", b"{}", '"x"', "1e999"]
    peer.send(*garbage)
    peer.send(
        {},
        {"type": None},
        {"type": ["output"]} | {"data": 1},
        {"type": "_share"},
        {"type": "size", "cols": "wide", "rows": None},
        {"type": "size"},
        {"type": "output", "data": 7, "offset": 1},
        {"type": "output", "data": "!!!", "offset": 1},
        {"type": "output", "data": "aGk=", "offset": "x"},
        {"type": "output"},
        {"type": "scrollback", "lines": None},
        {"type": "state", "server_name": {"a": 1}, "status": ["closed"], "may_type": "no"},
    )
    peer.send(state(), size(), output("re\x1b[6", 50, repaint=True), output("nady", 55))
    term.see("re")
    term.see("ady")
    peer.send({"type": "error", "detail": {"a": "\x1b]52;c;x\x07"}, "code": 5})
    peer.send({"type": "closed", "exit_code": "none"})
    assert "Session dev-01 has ended. All it" in term.leaves(0)
    assert b"\x1b[6n" not in term.seen and b"\x1b]52" not in term.seen


def test_refusals_while_attached_are_told_and_the_connection_stays(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    term.see("ready")
    term.send("x")
    peer.typed(b"x")
    peer.send({"type": "error", "detail": "dev-backend is offline: try later.", "code": "offline"})
    term.see("dev-backend is offline: try later.")
    peer.send(state(server_online=False))
    term.see("dev-backend is away: nothing can be typed until it is back.")
    peer.send(state(server_online=True))
    term.see("dev-backend is back.")
    term.send("y")
    peer.typed(b"y")


def test_skipped_output_is_marked(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    peer.send(output("newer", 9999, repaint=True, skipped=12345))
    term.see("newer")
    term.see("12,345 bytes went by unseen")


def test_the_end_of_a_session_is_the_end(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    term.see("ready")
    peer.send({"type": "closed", "exit_code": 3})
    peer.connection.close(1000)
    said = term.leaves(0)
    assert "Session dev-01 has ended, exit code 3." in said
    assert "orchestratia session logs dev-01" in said


def test_of_a_session_that_is_over_the_last_output_is_printed(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.frame()
    lines = "".join(f"line {number}\r\n" for number in range(100))
    peer.send(state(status="closed"), size(), output(lines + "\x1b[31mlast\r\n", 5, repaint=True))
    peer.send({"type": "closed", "exit_code": 0})
    said = term.leaves(0)
    assert "line 99\nlast\n" in said and "line 10\n" not in said
    assert "Session dev-01 has ended, exit code 0." in said
    assert b"\x1b[?1049h" not in term.seen


@pytest.mark.parametrize(
    "code, sentence",
    [
        (4401, "Error: You are signed out.\nSign in with: orchestratia login"),
        (4403, "Error: You are signed out."),
        (4404, "Error: You are signed out."),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_a_hub_that_refuses_says_why(scripted, terminal, code, sentence, attached):
    term = terminal(scripted)
    peer = scripted.meet()
    if attached:
        peer.greet("ready")
        term.see("ready")
    peer.send({"type": "error", "detail": "You are signed out.", "code": "unauthorized"})
    peer.connection.close(code, "no")
    assert sentence in term.leaves(1)


def test_a_refused_handshake_is_told_in_the_hubs_words(scripted, terminal):
    scripted.status = HTTPStatus.FORBIDDEN
    assert "Error: Not from there.\n" in terminal(scripted).leaves(1)
    scripted.status = HTTPStatus.SERVICE_UNAVAILABLE
    assert "Error: Not from there.\n" in terminal(scripted).leaves(3)


def test_an_unreachable_hub_is_exit_3(scripted, terminal):
    scripted.stop()
    assert "cannot reach the hub" in terminal(scripted).leaves(3)
    scripted.start()


def test_a_hub_that_closes_at_once_is_exit_3(scripted, terminal):
    term = terminal(scripted)
    scripted.meet().connection.close(1011)
    assert "does not say what is in the session" in term.leaves(3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_however_it_is_ended_the_terminal_is_as_it_was(scripted, terminal, number):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready\x1b[?25l\x1b[?1003h\x1b[?2004h")
    term.see("\x1b[?2004h")
    os.kill(term.program(), number)
    term.leaves(130 if number == signal.SIGINT else 128 + number)


def test_scrollback_is_left_in_the_terminals_own(scripted, terminal):
    term = terminal(scripted)
    peer = scripted.meet()
    peer.greet("ready")
    term.see("ready")
    term.key("s")
    while peer.frame()["type"] != "scrollback":
        pass
    peer.send({"type": "scrollback", "lines": ["old \x1b]52;c;x\x07one", "old two"]})
    term.expect_exact(b"\x1b[?1049l")
    term.see("old one\r\nold two\r\n")
    term.see("any key goes back")
    peer.send(output("meanwhile", 105))
    term.send(" ")
    term.see("\x1b[?1049h")
    term.see("meanwhile")
    term.send("x")
    peer.typed(b"x")
    term.key("d")
    term.leaves(0)


def test_scrollback_as_a_command(scripted, terminal):
    term = terminal(scripted, "session", "scrollback", "dev-01")
    peer = scripted.meet()
    peer.frame()
    assert peer.frame() == {"type": "scrollback"}
    peer.send(state(), size(), {"type": "scrollback", "lines": ["one\x1b[2J", "two"]})
    assert "one\ntwo\n" in term.leaves(0)


def test_without_a_terminal_it_only_watches(scripted, tmp_path):
    env = clean_env(tmp_path, ORCHESTRATIA_HUB_URL=scripted.url, ORCHESTRATIA_TOKEN="secret")
    watching = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "session", "attach", "dev-01"],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    peer = scripted.meet()
    peer.greet("\x1b[31mred\x1b[6n")
    peer.send(output(" and more\r\n", 112), {"type": "closed", "exit_code": 0})
    out, said = watching.communicate(timeout=20)
    assert out == b"\x1b[31mred and more\r\n"
    assert b"Watching dev-01 on dev-backend." in said and b"has ended, exit code 0" in said
    assert watching.returncode == 0
    assert peer.until_gone() == []


def test_the_end_can_be_read_by_programs(scripted, tmp_path):
    env = clean_env(tmp_path, ORCHESTRATIA_HUB_URL=scripted.url, ORCHESTRATIA_TOKEN="secret")
    argv = [sys.executable, str(ROOT / "cli.py"), "session", "attach", "dev-01", "--json"]
    watching = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    peer = scripted.meet()
    peer.greet()
    peer.send({"type": "closed", "exit_code": 4})
    out, _ = watching.communicate(timeout=20)
    told = {"session_id": SESSION["id"], "outcome": "closed", "exit_code": 4}
    assert json.loads(out) == told


# ── real hubs, agents and sessions ────────────────────────────────────────────────────────────


@pytest.fixture
def dev(shop, start_agent):
    return start_agent(shop, "dev-backend")


@pytest.fixture
def attach(shop, terminal):
    def start(*argv):
        term = terminal(shop, "session", "attach", *argv, token=shop.login())
        term.expect_exact([b"\x1b[?1049h", b"exit="])
        return term

    return start


def session_of(hub, name="dev-01"):
    return hub.api("GET", f"sessions/{name}")


def shell(hub, *command, name="dev-01", **fields):
    """A session on dev-backend, running."""
    fields["command"] = list(command or ("env", "PS1=$ ", "/bin/sh"))
    hub.api("POST", "sessions", {"server_id": "dev-backend", "name": name, **fields})
    wait_until(lambda: session_of(hub, name)["status"] == "active")


def has_size(term, wanted):
    """Whether the shell in the session says so (tmux passes a new size on within a moment)."""
    term.send("stty size\r")
    return term.expect_exact([wanted, pexpect.TIMEOUT], 0.5) == 0


def test_typing_sizes_and_leaving(shop, dev, attach, terminal):
    shell(shop)
    term = attach("dev-01")
    term.send("echo so$((6*7))\r")
    term.see("so42")
    term.send("stty size\r")
    term.see("24 80")
    term.setwinsize(31, 97)
    wait_until(lambda: has_size(term, "31 97"))
    term.send("echo up$((1)); sleep 60\r")
    term.see("up1")
    term.send("\x03")  # is the session's
    term.see("^C")
    term.send("echo int$?\r")
    term.see("int130")
    term.key("d")
    term.leaves(0)
    assert session_of(shop)["status"] == "active"
    term = attach("dev-01")  # what was there is there
    term.see("int130")
    term.send("exit 7\r")
    assert "Session dev-01 has ended, exit code 7." in term.leaves(0)
    term = terminal(shop, "session", "attach", "dev-01", token=shop.login())
    assert "int130" in term.leaves(0)  # the last output of one that is over


def test_two_at_one_session(shop, dev, attach):
    shell(shop)
    first = attach("dev-01")
    first.send("stty size\r")
    first.see("24 80")
    second = attach("dev-01")
    second.setwinsize(40, 120)
    second.see("24 80")
    second.send("echo from$((2))nd\r")
    first.see("from2nd")
    assert session_of(shop)["cols"] == 80
    second.key("t")
    wait_until(lambda: has_size(second, "40 120"))
    first.see("this terminal of 80×24 shows a part of it")
    third = attach("dev-01", "--read-only")
    third.see("40 120")
    third.send("\x03")
    third.leaves(0)
    first.key("d")
    first.leaves(0)
    second.send("echo still\r")
    second.see("still\r\n")


def test_a_hub_that_restarts_in_the_middle(shop, dev, attach):
    shell(shop)
    term = attach("dev-01")
    term.send("i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo n$i; sleep 0.01; done\r")
    term.see("n50\r\n")
    shop.restart()
    term.see("Lost the connection to the hub")
    term.see("Connected again.")
    term.see("n400")
    wait_until(lambda: session_of(shop)["status"] == "active", 30)
    term.send("echo on$((1))\r")
    term.see("on1")
    term.key("d")
    term.leaves(0)


def test_started_and_attached_in_one(shop, dev, terminal):
    words = ("session", "start", "dev-backend", "--name", "once", "--attach", "--")
    term = terminal(shop, *words, "sh", "-c", "stty size; read x; exit 5", token=shop.login())
    term.see("24 80")
    term.send("\r")
    assert "Session once has ended, exit code 5." in term.leaves(0)


def test_who_may_not_is_told(shop, terminal):
    def run(*argv, **more):
        return terminal(shop, "session", "attach", *argv, **more).leaves(1)

    assert "There is no session 'nowhere'" in run("nowhere", token=shop.login())
    assert "Sign in with: orchestratia login" in run("nowhere", token="wrong")


def test_typing_into_a_session_of_an_offline_server_is_refused(shop, dev, attach):
    shell(shop)
    term = attach("dev-01")
    term.send("echo here$((1))\r")
    term.see("here1")
    dev.kill()
    wait_until(lambda: session_of(shop)["status"] == "disconnected", 60)
    term.send("x")
    term.see("dev-01")
    term.see("cannot be reached now (dev-backend: disconnected)")
    dev.start()
    wait_until(lambda: session_of(shop)["status"] in ("active", "recovering"), 30)
    term.send("echo there$((2))\r")
    term.see("there2")


def test_a_person_at_a_terminal_is_asked_before_something_is_destroyed(shop, terminal):
    shop.register("dev")
    for answer, code, status in (("n", 130, "offline"), ("y", 0, "revoked")):
        term = terminal(shop, "server", "revoke", "dev", token=shop.login())
        term.see("Revoke dev? It can only come back with a new token.")
        term.send(f"{answer}\r")
        term.leaves(code)
        assert shop.api("GET", "servers/dev")["status"] == status


def test_a_sessions_own_key_may_what_its_role_may(shop, dev, terminal):
    def key_of(role):
        told = "echo key=$ORCHESTRATIA_API_KEY=; read x"
        shell(shop, "sh", "-c", told, name=role, role=role)
        log = f"sessions/{role}/output?offset=0"
        return wait_until(lambda: re.search("key=(orcs_.+?)=", shop.ask("GET", log).text))[1]

    shell(shop)
    words = ("session", "attach", "dev-01")
    term = terminal(shop, *words, token=key_of("orchestrator"))
    term.see("Watching dev-01 on dev-backend.")
    term.see("\x1b[?1049h")
    term.key("d")
    term.leaves(0)
    assert "may not do this (session.watch)" in terminal(
        shop, *words, token=key_of("plain")
    ).leaves(1)
