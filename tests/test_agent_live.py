"""The live side of the agent, in this process: real tmux, real pseudo-terminals, and a carrier
of a few lines in place of the network."""

import base64
import contextlib
import itertools
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import agent as agent_module
import test_agent_tmux
from agent import ANSWERS, LIVE_BYTES, Agent, Live, Loop, Stream, Tmux, Unasking, settings_of
from conftest import wait_until as until

# Writes what is typed to a file, byte by byte as it comes.
READER = """
import os, sys, tty
tty.setraw(0)
os.write(1, sys.argv[2].encode().decode("unicode_escape").encode() + b"ready")
with open(sys.argv[1], "ab", buffering=0) as file:
    while data := os.read(0, 65536):
        file.write(data)
"""


class Rig:
    """An agent with its threads; what a hub would be told is kept by session."""

    def __init__(self, folder, **config):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.config = {
            "hub_url": "http://127.0.0.1:9",
            "api_key": "orc_canary_server_key",
            "server_id": str(uuid.uuid4()),
            "monitor_s": 0.05,
            "screen_s": 0.2,
            "close_grace_s": 0.5,
            **config,
        }
        self.ids = itertools.count(1)
        self.frames = []
        self.drawn = {}  # session id: the views, each the bytes since a repaint
        self.logs = {}
        self.taking = threading.Event()
        self.taking.set()
        self.begin()

    def begin(self):
        """Start an agent, and connect."""
        self.stop = threading.Event()
        self.agent = Agent(self.config, self.folder, settings_of(self.config), self.stop)
        self.agent.recover()
        a = self.agent
        steps = a.run_command, a.serve_terminals, a.watch, a.send_logs, a.send_screens, self.carry
        self.loops = [Loop(step, self.stop) for step in steps]
        for loop in self.loops:
            loop.start()
        self.connect()

    def connect(self):
        sync = self.agent.sync()
        kept = [
            {"session_id": s["session_id"], "action": "keep", "log_acked": 0}
            for s in sync["sessions"]
        ]
        self.agent.received([{"type": "auth_ok", "hub_epoch": "e", "server_name": "s"}])
        self.agent.received([{"type": "sync_ok", "sessions": kept}])
        return sync

    def end(self):
        self.stop.set()
        self.agent.commands.put({"type": "none", "id": 0, "epoch": "e"})
        self.agent.ptys.call(lambda: None)
        self.taking.set()
        self.agent.outgoing.wake.set()
        for loop in self.loops:
            loop.join(15)
            assert not loop.is_alive(), loop.name
        self.agent.store.close()

    # -- the carrier

    def carry(self):
        self.agent.outgoing.wake.wait(1)
        self.taking.wait(10)
        self.agent.outgoing.wake.clear()
        for frame in self.agent.outgoing.take(time.monotonic()):
            self.take(frame)

    def take(self, frame):
        self.frames.append(frame)
        if "spool" in frame:
            self.agent.received([{"type": "spool_ack", "upto": frame["spool"]}])
        session_id = frame.get("session_id")
        if frame["type"] == "session_output":
            data = base64.b64decode(frame["data"])
            assert 0 < len(data) <= 64 * 1024
            views = self.drawn.setdefault(session_id, [])
            if frame.get("repaint"):
                views.append(b"")
            views[-1] += data
        if frame["type"] == "session_log":
            stored = self.logs.setdefault(session_id, bytearray())
            assert frame["offset"] <= len(stored)
            stored[frame["offset"] :] = base64.b64decode(frame["data"])
            offset = len(stored)
            self.agent.received([{"type": "log_ack", "session_id": session_id, "offset": offset}])

    # -- the hub

    def start(self, *command, **fields):
        session_id = str(uuid.uuid4())
        order = {"session_id": session_id, "command": list(command) or None, "profile": None}
        order |= {"cols": 100, "rows": 30, "working_directory": str(self.folder), **fields}
        self.agent.received([{"type": "session_start", "id": next(self.ids), **order}])
        self.report("session_started", session_id)
        return session_id

    def reader(self, modes=""):
        """A session that keeps what is typed, and the file."""
        path = self.folder / f"typed-{uuid.uuid4()}"
        session_id = self.start(sys.executable, "-c", READER, str(path), modes)
        until(lambda: b"ready" in self.log(session_id))
        return session_id, path

    def say(self, kind, session_id, **fields):
        self.agent.received([{"type": kind, "session_id": session_id, **fields}])

    def watch(self, session_id, on=True):
        """Look on; returns once the repaint has come."""
        before = len(self.views(session_id))
        self.say("session_watch", session_id, on=on)
        if on:
            until(lambda: len(self.views(session_id)) > before)

    def key(self, session_id, data):
        self.say("session_input", session_id, data=base64.b64encode(data).decode())

    def reports(self, kind, session_id):
        found = list(self.frames)
        return [f for f in found if f["type"] == kind and f.get("session_id") == session_id]

    def report(self, kind, session_id):
        return until(lambda: self.reports(kind, session_id))[-1]

    def views(self, session_id):
        return self.drawn.get(session_id, [])

    def live(self, session_id):
        """All that was drawn since the last repaint."""
        return self.views(session_id)[-1]

    def log(self, session_id):
        return bytes(self.logs.get(session_id, b""))

    def tmux(self, *arguments):
        command = [*Tmux(f"orc-{self.config['server_id'][:8]}", None).command, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout

    def clients(self):
        return self.tmux("list-clients", "-F", "#{client_pid}").split()


def children():
    """The processes of this one, zombies too, but for tmux's server (not a child)."""
    text = subprocess.run(["ps", "-A", "-o", "ppid=,pid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in text.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(os.getpid()) and not row[2].startswith("ps -A")]


@pytest.fixture
def make(tmp_path):
    rigs = []

    def make(**config):
        rigs.append(Rig(tmp_path / str(len(rigs)), **config))
        return rigs[-1]

    before = children()
    yield make
    for rig in rigs:
        for session in list(rig.agent.sessions.all.values()):
            rig.agent.sessions.terminal(session).kill_session(session.tmux_name)
        rig.end()
        rig.tmux("kill-server")
    assert children() == before


@pytest.fixture
def rig(make):
    return make()


@pytest.fixture
def plain(make):
    return make(terminal="pty")


def picture(folder, data, cols=100, rows=30):
    """What a terminal of that size shows after these bytes; another tmux is the terminal."""
    path = folder / f"drawn-{uuid.uuid4()}"
    path.write_bytes(data)
    tmux = ["tmux", "-u", "-L", f"picture-{os.getpid()}", "-f", "/dev/null"]
    script = f"stty raw -echo; cat {path}; touch {path}.done; sleep 1000"
    size = "-x", str(cols), "-y", str(rows)
    subprocess.run([*tmux, "new-session", "-d", *size, "--", "sh", "-c", script], check=True)
    try:
        until(Path(f"{path}.done").exists)
        shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    return shown.stdout.rstrip("\n").split("\n")


def screen(rig, session_id):
    return rig.agent.sessions.terminals["tmux"].screen(f"orc-{session_id[:12]}")


# ---------------------------------------------------------------------------- the view


def test_a_view_begins_with_the_whole_picture_and_goes_on(rig):
    session_id = rig.start("sh", "-c", "printf 'one\\ntwo \\033[31mred\\033[0m\\n'; exec cat")
    until(lambda: b"red" in rig.log(session_id))
    rig.watch(session_id)
    until(lambda: b"red" in rig.live(session_id))
    rig.key(session_id, b"three\r")
    until(lambda: rig.live(session_id).count(b"three") >= 2)
    until(lambda: picture(rig.folder, rig.live(session_id)) == screen(rig, session_id))
    first = next(f for f in rig.frames if f["type"] == "session_output")
    assert first["repaint"] is True
    assert not any("repaint" in f for f in rig.reports("session_output", session_id)[1:])


def test_watching_again_repaints_modes_and_screen_and_leaves_no_process(rig):
    modes = r"\x1b[?1049h\x1b[?2004h\x1b[?1000h\x1b[?1006h\x1b[2J\x1b[3;4H"
    session_id, _ = rig.reader(modes)
    for _ in range(3):
        rig.watch(session_id)
        for part in (b"\x1b[?1049h", b"\x1b[?2004h", b"\x1b[?1000h", b"\x1b[?1006h", b"ready"):
            until(lambda part=part: part in rig.live(session_id))
        until(lambda: picture(rig.folder, rig.live(session_id))[2] == "   ready")
        until(lambda: len(rig.clients()) == 1)
    assert len([child for child in children() if "attach-session" in child]) == 1
    assert len(rig.views(session_id)) == 3
    rig.watch(session_id, on=False)
    until(lambda: not rig.clients())
    assert not any("attach" in child or "defunct" in child for child in children())


def test_nothing_is_sent_after_off_at_the_end_or_to_a_new_connection(rig):
    session_id = rig.start("sh", "-c", "i=0; while sleep 0.01; do echo $((i+=1)); done")
    rig.watch(session_id)
    rig.watch(session_id, on=False)
    until(lambda: not rig.clients())
    sent = len(rig.reports("session_output", session_id))
    size = len(rig.log(session_id))
    until(lambda: len(rig.log(session_id)) > size + 100)
    assert len(rig.reports("session_output", session_id)) == sent
    rig.watch(session_id)
    rig.connect()
    until(lambda: not rig.clients())
    sent = len(rig.reports("session_output", session_id))
    size = len(rig.log(session_id))
    until(lambda: len(rig.log(session_id)) > size + 100)
    assert len(rig.reports("session_output", session_id)) == sent
    rig.watch(session_id)
    rig.agent.received([{"type": "session_close", "id": 999, "session_id": session_id}])
    rig.report("session_closed", session_id)
    assert b"[exited]" not in rig.live(session_id)
    assert not rig.agent.outgoing.live._streams


def test_a_view_somebody_else_ended_comes_back(rig):
    session_id, path = rig.reader()
    rig.watch(session_id)
    rig.tmux("detach-client", "-a", "-s", f"=orc-{session_id[:12]}")
    rig.tmux("detach-client", "-s", f"=orc-{session_id[:12]}")
    until(lambda: len(rig.views(session_id)) == 2)
    rig.key(session_id, b"x")
    until(lambda: path.read_bytes() == b"x")


def test_a_session_that_is_not_there_is_no_trouble(rig):
    stranger = str(uuid.uuid4())
    for on in (True, False):
        rig.say("session_watch", stranger, on=on)
    rig.key(stranger, b"x")
    session_id, path = rig.reader()
    rig.key(session_id, b"y")
    until(lambda: path.read_bytes() == b"y")


def test_true_colours_come_through_and_titles_and_clipboards_do_not(rig):
    text = r"\033[38;2;1;2;3mrgb\033[0m\033]2;title\007\033]52;c;aGk=\007\033[6n\033[cend"
    session_id = rig.start("sh", "-c", f"read x; printf '{text}'; exec cat")
    rig.watch(session_id)
    rig.key(session_id, b"\r")
    until(lambda: b"end" in rig.live(session_id))
    assert re.search(rb"\x1b\[38;2;1;2;3m\x1b?.*rgb", rig.live(session_id), re.S)
    for part in (b"title", b"aGk", b"\x1b[c", b"\x1b[>c", b"\x1b[>q", b"\x1b[6n"):
        assert part not in rig.live(session_id)


@pytest.mark.parametrize("size", [(140, 50), (60, 12), (140, 12), (60, 50), (100, 30)])
def test_resizing_resizes_window_and_view(rig, size):
    draw = "import os, sys, signal, time\n"
    draw += (
        "def draw(*_):\n"
        "    cols, rows = os.get_terminal_size()\n"
        "    lines = [f'{row:3}' + 'x' * (cols - 4) for row in range(rows)]\n"
        "    sys.stdout.write('\\x1b[H\\x1b[2J' + '\\r\\n'.join(lines)); sys.stdout.flush()\n"
        "signal.signal(signal.SIGWINCH, draw); draw()\nwhile True: time.sleep(9)"
    )
    session_id = rig.start(sys.executable, "-c", draw)
    until(lambda: b" 29x" in rig.log(session_id))
    rig.watch(session_id)
    cols, rows = size
    rig.say("session_resize", session_id, cols=cols, rows=rows)
    last = f"{rows - 1:3}" + "x" * (cols - 4)
    until(lambda: screen(rig, session_id)[-1] == last)
    until(lambda: picture(rig.folder, rig.live(session_id), *size) == screen(rig, session_id))
    window = rig.tmux("list-clients", "-F", "#{client_width} #{client_height}").split()
    assert window == [str(cols), str(rows)]


def test_a_size_out_of_range_is_brought_into_it(rig):
    session_id, path = rig.reader()
    rig.watch(session_id)
    rig.say("session_resize", session_id, cols=0, rows=-5)
    rig.say("session_resize", session_id, cols=10**9, rows=10**9)
    until(lambda: "1000 1000" in rig.tmux("list-clients", "-F", "#{client_width} #{client_height}"))
    rig.key(session_id, b"x")
    until(lambda: path.read_bytes() == b"x")


# ---------------------------------------------------------------------------- keys


PLAIN_KEYS = [
    b"a",
    b"\x00",
    b"\x01",
    b"\x02",
    b"\x02d",
    b"\x03",
    b"\x05",
    b"\t",
    b"\r",
    b"\n",
    b"\x1a",
    b"\x1b",
    b"\x1b\x1b",
    b"\x1c",
    b"\x7f",
    bytes(range(32)),
    b"\x1ba",
    b"\x1b\r",
    b"\x1b\x7f",
    b"\x1b[",
    b"\x1bOP",
    b"\x1bOS",
    b"\x1b[15~",
    b"\x1b[24~",
    b"\x1b[2~",
    b"\x1b[3~",
    b"\x1b[5~",
    b"\x1b[6~",
    b"\x1b[1;5A",
    b"\x1b[1;2C",
    b"\x1b[1;3D",
    b"\x1b[1;2R",
    b"\x1b[15;5~",
    b"\x1b[Z",
    "äöü日本語🙂e\u0301".encode(),
    "\x1bä".encode(),
    b"\x1b[200~two\rlines\x1b[201~",
    b"abc\x1b[15~d\x1b[Ze\x02\x03",
    b"\xff\xfe\x80 not text",
]
CURSOR = {b"\x1b[A": b"\x1bOA", b"x\x1b[B\x1b[Cy": b"x\x1bOB\x1bOCy", b"\x1b[D": b"\x1bOD"}
MOUSE = [b"\x1b[<0;10;5M\x1b[<0;10;5m", b"\x1b[<64;10;5M"]


def typed(rig, session_id, path, key):
    """What the program gets of a key."""
    path.write_bytes(b"")
    rig.key(session_id, key)
    rig.key(session_id, b"|")
    return until(lambda: path.read_bytes().endswith(b"|") and path.read_bytes())[:-1]


@pytest.mark.parametrize("kind", ["tmux", "pty"])
def test_every_key_reaches_the_program_as_it_is(make, kind):
    rig = make(terminal=kind)
    session_id, path = rig.reader()
    rig.watch(session_id)
    for key in PLAIN_KEYS:
        assert typed(rig, session_id, path, key) == key
    for key, application in CURSOR.items():
        assert typed(rig, session_id, path, key) == key
        if kind == "tmux":  # which asks its own terminal for the other kind, whatever the program
            assert typed(rig, session_id, path, application) == key


def test_cursor_keys_paste_and_mouse_follow_the_modes_of_the_program(rig):
    session_id, path = rig.reader(r"\x1b[?1h\x1b=\x1b[?2004h\x1b[?1000h\x1b[?1006h")
    rig.watch(session_id)
    for key, application in CURSOR.items():
        assert typed(rig, session_id, path, key) == application
        assert typed(rig, session_id, path, application) == application
    for key in (*MOUSE, b"\x1b[200~two\rlines\x1b[201~", *PLAIN_KEYS):
        assert typed(rig, session_id, path, key) == key


def test_what_terminals_answer_is_not_typed(rig):
    session_id, path = rig.reader()
    answers = (
        b"\x1b[?62;22c\x1b[>41;0;0c\x1b[0n\x1b[12;40R\x1b[?1;2R\x1b[?2026;2$y\x1b[8;30;100t"
        b"\x1b]11;rgb:0000/1111/2222\x1b\\\x1b]4;1;rgb:00/11/22\x07\x1bP>|xterm\x1b\\\x1bP1$r0m\x1b\\"
    )
    assert typed(rig, session_id, path, answers) == b""
    rig.watch(session_id)
    assert typed(rig, session_id, path, b"a" + answers + b"b") == b"ab"


def test_a_character_cut_between_two_frames_arrives_whole(rig):
    session_id, path = rig.reader()
    rig.watch(session_id)
    text = "äß日🙂x".encode()
    for cut in range(1, len(text)):
        path.write_bytes(b"")
        rig.key(session_id, text[:cut])
        until(lambda cut=cut: len(path.read_bytes()) >= len(text[:cut].decode(errors="ignore")))
        rig.key(session_id, text[cut:])
        until(lambda: path.read_bytes() == text)


@pytest.mark.parametrize("kind", ["tmux", "pty"])
def test_a_paste_of_a_megabyte_arrives_whole_and_in_order(make, kind):
    rig = make(terminal=kind)
    session_id, path = rig.reader(r"\x1b[?2004h")
    rig.watch(session_id)
    text = "".join(f"{i:06} äöü日\r" for i in range(65_000)).encode()
    text = b"\x1b[200~" + text + b"\x1b[201~"
    for start in range(0, len(text), 10_001):
        rig.key(session_id, text[start : start + 10_001])
    rig.watch(session_id)  # somebody joins in the middle
    rig.key(session_id, b"end")
    until(lambda: path.read_bytes().endswith(b"end"), 30)
    assert path.read_bytes() == text + b"end"


def test_order_is_kept_when_watching_begins_and_ends(rig):
    session_id, path = rig.reader()
    want = b""
    for i in range(60):
        if i % 3 == 0:
            rig.say("session_watch", session_id, on=i % 2 == 0)
        rig.key(session_id, b"%03d" % i)
        want += b"%03d" % i
    rig.key(session_id, b"end")
    until(lambda: path.read_bytes().endswith(b"end"))
    assert path.read_bytes() == want + b"end"


def test_typing_that_waits_holds_up_no_other_session(rig):
    slow = rig.start("sh", "-c", "stty raw -echo; exec sleep 1000")
    session_id, path = rig.reader()
    for watched in (slow, session_id):
        rig.watch(watched)
    rig.say("session_type", slow, request_id="r", text="it is not echoed")
    rig.key(session_id, b"x")
    until(lambda: path.read_bytes() == b"x")
    assert not any(f["type"] == "session_typed" for f in rig.frames)
    until(lambda: any(f["type"] == "session_typed" and f["ok"] for f in rig.frames))


def test_safe_typing_comes_after_what_was_typed_by_hand(rig):
    session_id, path = rig.reader()
    rig.watch(session_id)
    for i in range(5):
        path.write_bytes(b"")
        rig.key(session_id, b"hand " * 5000)
        rig.say("session_type", session_id, request_id=str(i), text=f"text {i}")
        until(lambda: path.read_bytes().endswith(b"\r"))
        assert path.read_bytes() == b"hand " * 5000 + b"text %d\r" % i


# ---------------------------------------------------------------------------- floods


FLOOD = "import sys, time\nfor i in range(int(sys.argv[1])): print(f'{i:08} ' + 'x' * 60)\n"
FLOOD += "print('the end', flush=True)\ntime.sleep(1000)"


@pytest.mark.parametrize("kind", ["tmux", "pty"])
def test_a_carrier_that_takes_nothing_costs_bounded_memory_and_then_goes_on(make, kind):
    rig = make(terminal=kind)
    session_id = rig.start("sh", "-c", f'read x; exec {sys.executable} -c "$0" 200000', FLOOD)
    rig.watch(session_id)
    stream = rig.agent.outgoing.live._streams[session_id]
    want = b"".join(b"%08d %s\r\n" % (i, b"x" * 60) for i in range(200_000)) + b"the end\r\n"
    rig.taking.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rig.key(session_id, b"\r")
    path = rig.agent.sessions.root / session_id / "output.log"
    until(lambda: path.stat().st_size >= len(want), 60)  # nobody waits for the view
    size = len(stream.data)
    assert size <= LIVE_BYTES + 64 * 1024
    if kind == "pty":
        assert size >= LIVE_BYTES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB
    rig.taking.set()
    until(lambda: b"the end" in rig.live(session_id))
    until(lambda: rig.log(session_id).endswith(b"the end\r\n"), 60)
    assert rig.log(session_id)[-len(want) :] == want
    rig.key(session_id, b"more")
    until(lambda: b"more" in rig.live(session_id))
    if kind == "tmux":
        assert len(rig.views(session_id)) == 1
        until(lambda: picture(rig.folder, rig.live(session_id)) == screen(rig, session_id))


def test_a_full_view_is_not_read_and_a_keystroke_elsewhere_is_not_delayed(rig):
    flooding = rig.start("sh", "-c", "read x; yes flood")
    session_id, path = rig.reader()
    for watched in (flooding, session_id):
        rig.watch(watched)
    rig.taking.clear()
    stream = rig.agent.outgoing.live._streams[flooding]
    rig.key(flooding, b"\r")
    until(lambda: len(stream.data) >= LIVE_BYTES, 60)
    until(lambda: not rig.agent.sessions.terminals["tmux"]._views[f"orc-{flooding[:12]}"].events())
    size = len(stream.data)
    rig.key(session_id, b"x")
    until(lambda: path.read_bytes() == b"x")
    assert len(stream.data) == size <= LIVE_BYTES + 64 * 1024
    drawn = len(rig.live(flooding))
    rig.taking.set()
    until(lambda: len(rig.live(flooding)) > drawn + 2 * LIVE_BYTES, 30)
    rig.agent.received([{"type": "session_close", "id": 99, "session_id": flooding, "force": True}])
    rig.report("session_closed", flooding)


def test_first_bytes_go_at_once_and_a_flood_together():
    live = Live(threading.Event())
    stream = live.open("s")
    now = 100.0
    assert live.put(stream, b"key", now) is None and live.wake.is_set()
    live.wake.clear()
    assert live.put(stream, b"x" * 4000, now + 0.001) == pytest.approx(now + 0.015)
    assert not live.wake.is_set()
    assert live.put(stream, b"x" * 64 * 1024, now + 0.002) is None and live.wake.is_set()
    frames = live.take()
    assert [len(base64.b64decode(frame["data"])) for frame in frames] == [64 * 1024, 4003]
    assert [frame.get("repaint") for frame in frames] == [True, None]
    assert not live.take()


def test_an_older_view_says_nothing_once_a_new_one_has_begun():
    live = Live(threading.Event())
    old = live.open("s")
    live.put(old, b"old", 0)
    new = live.open("s")
    live.put(old, b"late", 0)
    live.put(new, b"new", 0)
    live.close(old)
    assert [base64.b64decode(frame["data"]) for frame in live.take()] == [b"new"]
    live.close(new)
    assert live.clear() == []
    assert live.full(Stream("t")) is False


# ---------------------------------------------------------------------------- questions


QUESTIONS = [
    *(b"\x05", b"\x1bZ", b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[>0c", b"\x1b[=c"),
    *(b"\x1b[>q", b"\x1b[>0q", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[?996n", b"\xc2\x9b6n"),
    *(b"\x1b[4$p", b"\x1b[?2026$p", b"\x1b[14t", b"\x1b[14;2t", b"\x1b[18t", b"\x1b[21t"),
    *(b"\x1b]4;1;?\x07", b"\x1b]10;?\x1b\\", b"\x1b]10;?;?\x07", b"\x1b]11;?\x07"),
    *(b"\x1b]12;?\x1b\\", b"\x1b]52;c;aGk=\x07", b"\x1b]52;c;?\x1b\\", b"\x1b]52;;\x1b\\"),
    *(b"\x1bP$qm\x1b\\", b"\x1bP+q544e\x1b\\", b"\x1b[?u", b"\x1b[?4m", b"\x1b[x"),
]
OUTPUT = [
    *(b"\x1b[m", b"\x1b[38;2;1;2;3m", b"\x1b[?1049h", b"\x1b[22;0;0t", b"\x1b[8;30;100t"),
    *(b"\x1b[2 q", b"\x1b[!p", b"\x1b[?2004h", b"\x1b]0;title?\x07", b"\x1b]2;a;?\x1b\\"),
    *(b"\x1b]8;;http://x/?a=1;?\x1b\\link\x1b]8;;\x1b\\", b"\x1b]4;1;rgb:00/11/22\x07"),
    *(b"\x1b]10;#fff\x1b\\", b"\x1bP1$r0m\x1b\\", "Â äöü日本🙂".encode(), b"\x1b(B", b"\x1b7"),
    *(b"\x1b[>4;1m", b"\x1b[u", b"\x1b[5S", b"\xff\xfe", b"c", b"6n", b"plain text\r\n"),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_taken_out_wherever_it_is_cut(question):
    whole = b"before\x1b[1m" + question + b"after"
    for cut in range(len(whole) + 1):
        unasking = Unasking()
        assert unasking(whole[:cut]) + unasking(whole[cut:]) == b"before\x1b[1mafter"
    unasking = Unasking()
    single = [unasking(whole[i : i + 1]) for i in range(len(whole))]
    assert b"".join(single) == b"before\x1b[1mafter"


@pytest.mark.parametrize("output", OUTPUT)
def test_other_output_is_left_as_it_is_and_what_is_whole_is_not_held_back(output):
    assert Unasking()(output) == output
    unasking = Unasking()
    assert b"".join(unasking(output[i : i + 1]) for i in range(len(output))) == output


@given(
    st.lists(st.sampled_from([*QUESTIONS, *OUTPUT]) | st.binary(max_size=5)),
    st.lists(st.integers(0, 300)),
)
def test_where_a_stream_is_cut_makes_no_difference(parts, cuts):
    whole = b"".join(parts) + b"\x1b\\end"
    cuts = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    unasking = Unasking()
    got = b"".join(unasking(whole[a:b]) for a, b in itertools.pairwise(cuts))
    assert got == Unasking()(whole)


def test_hostile_streams_cost_little():
    evil = [b"\x1b]52;" * 13_000, b"\x1b]4;" + b";?" * 30_000, b"\x1b[1;" * 16_000]
    evil += [
        b"\x1b[" * 30_000 + b"c" * 30_000,
        b"\x1b]52;c;" + b"a" * 10**6,
        b"\x1b[" + b"1" * 10**5,
    ]
    start = time.perf_counter()
    for data in evil:
        unasking = Unasking()
        unasking(data)
        assert len(unasking._held) < 2000
    assert time.perf_counter() - start < 2


def test_f3_with_shift_is_no_answer():
    for key in (b"\x1b[1;2R", b"\x1b[1;5R", b"\x1bOR", b"\x1b[13;2~"):
        assert ANSWERS.sub(b"", key) == key


# ---------------------------------------------------------------------------- without tmux


def test_a_plain_session_lives_and_ends(plain):
    session_id = plain.start("sh", "-c", "echo hello; read x; echo got $x; exit 7")
    started = plain.report("session_started", session_id)
    assert started["terminal"] == "pty" and started["pid"] > 0
    sync = plain.agent.sync()
    assert sync["capabilities"]["tmux"] is None
    assert [entry["terminal"] for entry in sync["sessions"]] == ["pty"]
    plain.connect()
    plain.watch(session_id)
    assert plain.live(session_id).startswith(b"\x1bc")
    until(lambda: b"hello" in plain.live(session_id))
    plain.key(session_id, b"you\r")
    closed = plain.report("session_closed", session_id)
    assert closed["exit_code"] == 7
    until(lambda: len(plain.log(session_id)) == closed["log_end"])
    assert plain.log(session_id) == b"hello\r\nyou\r\ngot you\r\n"
    until(lambda: b"got you" in plain.live(session_id))
    assert not plain.tmux("list-sessions")


def test_tmux_sessions_say_so_too(rig):
    session_id = rig.start("cat")
    assert rig.report("session_started", session_id)["terminal"] == "tmux"
    sync = rig.agent.sync()
    assert sync["sessions"][0]["terminal"] == "tmux" and sync["capabilities"]["tmux"]


def test_plain_sessions_have_screen_scrollback_size_and_safe_typing(plain):
    script = "seq 100; while read x; do echo got $x; stty size; done"
    session_id = plain.start("sh", "-c", script)
    screens = lambda: plain.reports("session_screen", session_id)  # noqa: E731
    until(lambda: screens() and "100" in screens()[-1]["lines"])
    assert len(screens()[-1]["lines"]) == 30
    plain.say("capture_scrollback", session_id)
    lines = plain.report("scrollback_captured", session_id)["lines"]
    assert lines[:100] == [str(i) for i in range(1, 101)]
    plain.say("session_resize", session_id, cols=132, rows=50)
    plain.say("session_type", session_id, request_id="r", text="typed")
    until(lambda: b"got typed\r\n50 132" in plain.log(session_id))
    assert plain.report("session_typed", None)["ok"]


def test_safe_typing_is_bracketed_when_a_plain_program_wants_it(plain):
    session_id, path = plain.reader(r"\x1b[?1;2004h")
    plain.say("session_type", session_id, request_id="r", text="two\nlines")
    until(lambda: path.read_bytes() == b"\x1b[200~two\nlines\x1b[201~\r")


def test_a_plain_session_is_hung_up_and_then_killed(plain):
    session_id = plain.start("sh", "-c", "trap '' HUP; echo on; sleep 1000; sleep 1000")
    until(lambda: b"on" in plain.log(session_id))
    plain.agent.received([{"type": "session_close", "id": 99, "session_id": session_id}])
    assert plain.report("session_closed", session_id)["exit_code"] == 137


def test_a_plain_session_that_heeds_the_hang_up_is_not_killed(make):
    plain = make(terminal="pty", close_grace_s=30)
    session_id = plain.start("sleep", "1000")
    plain.agent.received([{"type": "session_close", "id": 99, "session_id": session_id}])
    assert plain.report("session_closed", session_id)["exit_code"] == 129


def test_a_plain_log_is_complete_and_a_watcher_sees_the_same(plain):
    code = "import sys\nsys.stdin.readline()\nfor i in range(50000): print(f'{i:07}')\n"
    session_id = plain.start(sys.executable, "-c", code)
    plain.watch(session_id)
    plain.key(session_id, b"\r")
    closed = plain.report("session_closed", session_id)
    want = b"\r\n" + b"".join(b"%07d\r\n" % i for i in range(50000))
    assert closed["exit_code"] == 0 and closed["log_end"] == len(want)
    until(lambda: plain.log(session_id) == want)
    until(lambda: plain.live(session_id).endswith(b"0049999\r\n"))
    if len(plain.views(session_id)) == 1:
        assert plain.live(session_id) == b"\x1bc" + want


def test_a_plain_repaint_begins_at_a_line(plain):
    session_id = plain.start("sh", "-c", "seq 1 30000; exec cat")
    until(lambda: plain.log(session_id).endswith(b"\n30000\r\n"))
    for _ in range(2):
        plain.watch(session_id)
        until(lambda: plain.live(session_id).endswith(b"\n30000\r\n"))
        lines = plain.live(session_id).removeprefix(b"\x1bc").split(b"\r\n")
        first = int(lines[0])
        assert lines[:-1] == [b"%d" % i for i in range(first, 30001)] and first > 1
    plain.watch(session_id, on=False)
    until(lambda: not plain.agent.outgoing.live._streams)
    plain.key(session_id, b"unseen\r")
    until(lambda: plain.log(session_id).count(b"unseen") == 2)
    assert b"unseen" not in plain.live(session_id)


def test_a_recording_that_fails_is_declared_and_mended(plain, monkeypatch):
    session_id = plain.start("cat")
    session = plain.agent.sessions.all[session_id]
    terminal = plain.agent.sessions.terminal(session)._all[session.tmux_name]
    good = terminal._log
    terminal._log = os.open("/dev/full", os.O_WRONLY)
    plain.key(session_id, b"lost\r")
    gap = plain.report("session_gap", session_id)
    os.close(terminal._log)
    terminal._log = good
    assert (gap["from"], gap["to"]) == (0, None) and "recording" in gap["why"]
    plain.key(session_id, b"kept\r")
    until(lambda: b"kept" in plain.log(session_id))


def test_plain_sessions_of_the_last_run_are_over(make):
    first = make(terminal="pty")
    session_id = first.start("sleep", "1000")
    plain = first.agent.sessions.terminals["pty"]
    first.end()
    plain.kill_session(f"orc-{session_id[:12]}")  # as the kernel does when the agent ends
    first.begin()
    assert first.report("session_closed", session_id)["exit_code"] is None


def test_a_plain_session_gets_its_environment_from_a_private_file(plain):
    script = "echo k=$ORCHESTRATIA_API_KEY; exec cat"
    session_id = plain.start("sh", "-c", script, session_key="orcs_canary_42")
    until(lambda: plain.log(session_id) == b"k=orcs_canary_42\r\n")
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True)
    assert "canary" not in listed.stdout
    run = plain.agent.sessions.root / session_id / "run.json"
    assert run.stat().st_mode & 0o777 == 0o600


def hide_tmux(monkeypatch):
    """Others, who may take the function for themselves while it is changed, find what they want."""
    which = shutil.which

    def hidden(name, *more, **options):
        return None if name == "tmux" else which(name, *more, **options)

    monkeypatch.setattr(shutil, "which", hidden)


def test_without_tmux_it_is_said_once(make, monkeypatch, tmp_path, caplog):
    hide_tmux(monkeypatch)
    with caplog.at_level("WARNING"):
        rig = make()
    assert caplog.text.count("Install tmux") == 1
    assert rig.report("session_started", rig.start("cat"))["terminal"] == "pty"


def test_a_tmux_session_goes_on_when_new_ones_are_plain(make):
    rig = make()
    older = rig.start("cat")
    rig.end()
    rig.config["terminal"] = "pty"
    rig.begin()
    newer = rig.start("cat")
    for session_id, kind in ((older, "tmux"), (newer, "pty")):
        assert rig.agent.sessions.all[session_id].terminal == kind
        rig.watch(session_id)
        rig.key(session_id, b"hello\r")
        until(lambda s=session_id: rig.live(s).count(b"hello") >= 2)


# ---------------------------------------------------------------------------- a full disk


OWN = """
start: shell
hooks: [{event: Go, state: working}, {event: Stop, state: idle}]
"""


class Still(Rig):
    """An agent without threads of its own: the test takes each step."""

    def begin(self):
        self.stop = threading.Event()
        self.stop.set()  # no step waits
        self.agent = Agent(self.config, self.folder, settings_of(self.config), self.stop)
        self.agent.recover()
        self.loops = []
        self.connect()
        self.store, self.sessions = self.agent.store, self.agent.sessions
        command = Path(agent_module.__file__).with_name("profiles") / "command.yaml"
        profiles = {"command": command.read_text(), "own": OWN}
        self.command("profiles_changed", profiles=profiles)
        self.agent.run_command()

    def command(self, kind, **fields):
        frame = {"type": kind, "id": next(self.ids), **fields}
        self.agent.received([frame])
        return frame["id"]

    def order(self, *command, **fields):
        """A session_start that is written down; the id of the session."""
        session_id = str(uuid.uuid4())
        order = {"session_id": session_id, "command": list(command), "profile": None}
        order |= {"working_directory": str(self.folder), **fields}
        self.command("session_start", **order)
        return session_id

    def start(self, *command, **fields):
        session_id = self.order(*command, **fields)
        self.agent.run_command()
        assert self.told("session_started", session_id)
        return self.sessions.all[session_id]

    def told(self, kind, session_id=None):
        """What waits on the disk to be told."""
        frames = self.store.spooled_after(0)
        return [f for f in frames if f["type"] == kind and f.get("session_id") == session_id]

    def pane(self, session):
        return self.sessions.panes()[session.tmux_name]


@pytest.fixture
def still(tmp_path):
    rig = Still(tmp_path / "still")
    yield rig
    for session in list(rig.agent.sessions.all.values()):
        rig.agent.sessions.terminal(session).kill_session(session.tmux_name)
    rig.agent.store.close()
    rig.tmux("kill-server")


@contextlib.contextmanager
def refusing(store):
    """The store takes nothing, as when the disk is full."""
    store._rows("PRAGMA query_only = 1")
    try:
        yield
    finally:
        store._rows("PRAGMA query_only = 0")


@contextlib.contextmanager
def refusing_rows(store, text):
    """The store takes no session that is written with these words."""
    store._db.create_function("refuse", 0, lambda: 1 / 0)
    store._rows(
        "CREATE TEMP TRIGGER refusing BEFORE INSERT ON session"
        f" WHEN instr(new.row, '{text}') BEGIN SELECT refuse(); END"
    )
    try:
        yield
    finally:
        store._rows("DROP TRIGGER refusing")


def test_an_end_that_is_refused_is_told_when_there_is_room(still):
    session = still.start("sh", "-c", "exit 7", profile="command", task_id="t", attempt=1)
    until(lambda: still.pane(session).dead)
    with refusing(still.store):
        with pytest.raises(sqlite3.OperationalError):
            until(lambda: still.sessions.look(time.monotonic()))
        assert (session.state, session.exit_code, session.closed_spool) == ("live", None, None)
        assert still.sessions.log_path(session).exists()
    still.sessions.look(time.monotonic())
    assert session.state == "ended"
    [closed] = still.told("session_closed", session.session_id)
    assert (closed["exit_code"], closed["spool"]) == (7, session.closed_spool)
    outcomes = [r["outcome"] for r in still.told("task_report", session.session_id)]
    assert outcomes == ["started", "fail"]


def test_a_session_whose_end_is_refused_holds_up_no_other(still):
    """It is closed, and killed, all the same."""
    first, second = still.start("sh", "-c", "read x"), still.start("sleep", "1000")
    still.sessions.close(second, force=True)
    still.tmux("kill-session", "-t", first.tmux_name)
    with refusing(still.store):
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError):
                still.sessions.look(time.monotonic())
        until(lambda: still.pane(second).dead or not agent_module.signal_programs(second.pid, 0))


def test_a_start_that_is_refused_in_the_middle_goes_on(still):
    order = {"profile": "command", "task_id": "t", "attempt": 1}
    with refusing_rows(still.store, '"state": "live"'):
        session_id = still.order("sh", "-c", "echo hello; exec sleep 1000", **order)
        with pytest.raises(sqlite3.OperationalError):
            still.agent.run_command()
        assert not still.told("session_started", session_id)
    pid = still.pane(still.sessions.all[session_id]).pid
    still.agent.run_command()
    assert [f["pid"] for f in still.told("session_started", session_id)] == [pid]
    assert [r["outcome"] for r in still.told("task_report", session_id)] == ["started"]
    session = still.sessions.all[session_id]
    assert (session.state, session.pid) == ("live", pid)
    assert len(still.tmux("list-sessions").splitlines()) == 1
    until(lambda: still.sessions.log_size(session))
    [block] = still.agent.outgoing.logs.take(time.monotonic())
    assert base64.b64decode(block["data"]) == b"hello\r\n"
    assert not still.store.unfinished()


def test_a_refused_command_comes_before_those_behind_it(still):
    session_id = still.order("sleep", "1000")
    still.command("session_close", session_id=session_id, force=True)
    with refusing(still.store):
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError):
                still.agent.run_command()
    still.agent.run_command()
    still.agent.run_command()
    assert still.sessions.all[session_id].closing
    assert not still.store.unfinished()


def test_a_command_whose_mark_is_refused_is_not_carried_out_again(still):
    session_id = still.order("sleep", "1000")
    done = "CREATE TEMP TRIGGER refusing BEFORE UPDATE ON journal BEGIN SELECT refuse(); END"
    still.store._db.create_function("refuse", 0, lambda: 1 / 0)
    still.store._rows(done)
    still.agent.run_command()
    assert still.store.unfinished() and len(still.told("session_started", session_id)) == 1
    still.store._rows("DROP TRIGGER refusing")
    still.agent.watch()
    assert not still.store.unfinished() and len(still.told("session_started", session_id)) == 1


def test_a_tmux_that_cannot_be_started_leaves_no_session(still, tmp_path, monkeypatch):
    session_id = still.order("sleep", "1000")
    broken = tmp_path / "tmux"
    broken.write_bytes(b"\0")
    broken.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        still.agent.run_command()
    [error] = still.told("session_error", session_id)
    assert error["error"].startswith("tmux could not be started")
    assert not still.sessions.all and not still.store.sessions()


def test_work_that_began_while_nothing_could_be_written_is_told(still):
    session = still.start("cat", profile="own", task_id="t", attempt=1)
    activities = still.agent.activities
    with refusing(still.store):
        activities.signal(session, "hook", event="Go")
        assert not session.begun
    activities.signal(session, "tick")
    assert [r["outcome"] for r in still.told("task_report", session.session_id)] == ["started"]
    [told] = still.told("session_activity", session.session_id)
    assert (told["state"], session.begun) == ("working", True)
    activities.signal(session, "tick")
    assert len(still.told("session_activity", session.session_id)) == 1


def test_a_request_that_was_settled_is_told_so_when_there_is_room(still):
    session, requests = still.start("cat"), still.agent.requests
    still.agent.is_connected = lambda: True
    asked, refused = str(uuid.uuid4()), str(uuid.uuid4())
    assert requests._begin(session, asked, "screen", {"tool_name": "Bash"})
    with refusing(still.store):
        assert requests._begin(session, refused, "screen", {"tool_name": "Bash"}) is None
        requests.settled(session.session_id)
        assert set(requests.open) == {asked}
    still.agent.watch()
    [ended] = still.told("permission_ended", session.session_id)
    assert ended["request_id"] == asked
    assert not requests.open and still.store.get("requests") == []


def test_a_gap_is_written_down_before_the_recording_goes_on(still):
    session = still.start("cat")
    still.tmux("pipe-pane", "-t", f"={session.tmux_name}:")
    with refusing(still.store), pytest.raises(sqlite3.OperationalError):
        still.sessions.look(time.monotonic())
    assert not still.pane(session).piped
    still.sessions.look(time.monotonic())
    assert still.told("session_gap", session.session_id) and still.pane(session).piped


def test_output_is_not_given_up_before_that_is_written_down(still):
    session = still.start("cat")
    with refusing(still.store), pytest.raises(sqlite3.OperationalError):
        still.sessions._release(session, 4096)
    assert session.log_start == 0
    still.sessions._release(session, 4096)
    assert session.log_start == 4096 == still.store.sessions()[0].log_start


def test_what_cannot_be_written_down_is_not_acknowledged_and_the_rest_is_done(still):
    path = still.folder / "typed"
    session = still.start(sys.executable, "-c", READER, str(path), "")
    until(lambda: "ready" in "".join(screen(still, session.session_id)))
    one = {"type": "session_close", "id": next(still.ids), "session_id": "none"}
    entry = {"session_id": session.session_id, "action": "keep", "log_acked": 2}
    still.agent.outgoing.take(time.monotonic())
    with refusing(still.store):
        still.agent.received(
            [
                {"type": "spool_ack", "upto": 1},
                {"type": "sync_ok", "sessions": [entry], "profiles": {"own": OWN}},
                {**entry, "type": "session_input", "data": base64.b64encode(b"key").decode()},
                one,
            ]
        )
        until(lambda: path.read_bytes() == b"key")
        assert still.agent.outgoing.logs.acked(session.session_id) == 2
        assert set(still.sessions.profiles) == {"own"}
        assert still.store.spool_first() == 1
    kinds = [frame["type"] for frame in still.agent.outgoing.take_urgent()]
    assert "ack" not in kinds
    still.agent.watch()
    assert set(still.store.get("profiles")) == {"own"}
    still.agent.received([{"type": "spool_ack", "upto": 1}, one])
    assert {"type": "ack", "ids": [one["id"]]} in still.agent.outgoing.take_urgent()
    assert still.store.spool_first() == 2


def notes(path):
    return path.read_bytes().count(b"There is a note on your task.")


def note(rig, session_id):
    ids = {"session_id": session_id, "task_id": str(uuid.uuid4())}
    rig.agent.received([{"type": "task_note", "id": next(rig.ids), **ids}])


def test_words_that_cannot_be_begun_wait_and_keys_go_on(rig, monkeypatch, caplog):
    monkeypatch.setattr(agent_module.Mail, "HANDS_S", 0.5)
    session_id, path = rig.reader()
    rig.key(session_id, b"x")
    note(rig, session_id)
    until(lambda: rig.agent.mail.waiting.get(session_id))
    with refusing(rig.agent.store):
        until(lambda: "a frame of type mail" in caplog.text)
        assert rig.agent.mail.waiting.get(session_id)
        rig.key(session_id, b"y")
        rig.say("session_type", session_id, request_id="r", text="typed")
        until(lambda: path.read_bytes() == b"xytyped\r")
        assert rig.report("session_typed", None)["ok"]
    until(lambda: notes(path) == 1)
    until(lambda: not rig.agent.store.unfinished())
    assert not rig.agent.mail.waiting


def test_words_whose_record_is_refused_are_typed_once(make, caplog):
    rig = make(typing_limit_s=8)
    session_id, path = rig.reader()
    note(rig, session_id)
    until(lambda: [begun for _, _, begun in rig.agent.store.unfinished() if begun])
    with refusing(rig.agent.store):
        until(lambda: "done is put off" in caplog.text)
    until(lambda: not rig.agent.store.unfinished())
    assert notes(path) == 1


# ---------------------------------------------------------------------------- clocks


class SetBack:
    """The module `time` on a machine whose clock was set back by so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def time(self):
        return time.time() - self.seconds

    def __getattr__(self, name):
        return getattr(time, name)


def test_progress_is_told_after_the_clock_was_set_back(still, monkeypatch):
    still.agent.settings.progress_s = 0
    session = still.start("cat", profile="own")
    still.agent.activities.signal(session, "hook", event="Go")
    monkeypatch.setattr(agent_module, "time", SetBack(3600))
    still.agent.activities.signal(session, "hook", event="Go")
    before, after = still.told("session_activity", session.session_id)
    assert after["since"] == pytest.approx(before["since"] - 3600, abs=1)
    assert 0 <= time.time() - 3600 - after["progress"] < 10


def test_answers_find_their_dialogs_after_the_clock_was_set_back(still, monkeypatch):
    monkeypatch.setattr(agent_module, "HOOK_BACK_S", 0)
    request = agent_module.Request("r", "s", "hook", "Bash", answer={"decision": "deny"})
    still.store.put("requests", [request.row()])
    still.store.close()
    still.begin()  # the hook client had gone with the last run
    monkeypatch.setattr(agent_module, "time", SetBack(3600))
    until(lambda: [r.request_id for r in still.agent.requests.abandoned()] == ["r"])


# ---------------------------------------------------------------------------- terminals that go


def test_without_tmux_sessions_in_it_are_left_alone(make, monkeypatch):
    rig = make()
    older = rig.start("cat")
    rig.end()
    with monkeypatch.context() as patch:
        hide_tmux(patch)
        rig.begin()
        assert rig.report("session_closed", rig.start("true"))["exit_code"] == 0
        rig.say("session_type", older, request_id="r", text="x")
        assert "install it" in rig.report("session_typed", None)["why"]
        assert [s["alive"] for s in rig.agent.sync()["sessions"] if s["session_id"] == older]
        rig.end()
    rig.begin()
    assert not rig.reports("session_closed", older)
    rig.watch(older)
    rig.key(older, b"hello\r")
    until(lambda: rig.live(older).count(b"hello") >= 2)


# ---------------------------------------------------------------------------- the process


@pytest.fixture
def wire():
    wire = test_agent_tmux.Wire()
    yield wire
    wire.close()


@pytest.fixture
def process(wire):
    """A real agent process, not started."""
    home = Path(tempfile.mkdtemp(prefix="orc-"))  # a socket's path must stay short
    process = test_agent_tmux.Rig(wire, home)
    yield process
    process.end()
    until(lambda: str(home) not in test_agent_tmux.running())
    shutil.rmtree(home)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_views_end_with_the_agent_and_sessions_do_not(process, wire, end):
    process.start()
    session_id = process.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    wire.say("session_watch", session_id=session_id, on=True)
    client = int(until(lambda: process.tmux("list-clients", "-F", "#{client_pid}")))
    until(lambda: [f for f in wire.moments if f["type"] == "session_output"])
    getattr(process, end)()
    until(lambda: not process.tmux("list-clients"))
    until(lambda: agent_module.session_of(client) is None)
    assert len(process.tmux("list-sessions").splitlines()) == 1


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_plain_sessions_end_with_the_agent(process, wire, end):
    config = yaml.safe_load(process.config.read_text())
    process.config.write_text(yaml.safe_dump({**config, "terminal": "pty"}))
    process.start()
    commands = ["sleep 1000", "trap '' HUP; echo on; while :; do sleep 1000; done"]
    mild, stubborn = [process.session(command=["sh", "-c", c]) for c in commands]
    for session_id in (mild, stubborn):
        assert wire.report("session_started", session_id=session_id)["terminal"] == "pty"
    until(lambda: b"on" in wire.output(stubborn))
    start = time.monotonic()
    getattr(process, end)()
    assert time.monotonic() - start < 1.5
    until(lambda: mild not in test_agent_tmux.running())
    process.start()
    for session_id in (mild, stubborn):
        assert wire.report("session_closed", session_id=session_id)["exit_code"] is None
        until(lambda s=session_id: s not in test_agent_tmux.running())


# ---------------------------------------------------------------------------- speed


@pytest.mark.parametrize("kind", ["tmux", "pty"])
def test_a_keystroke_is_there_and_back_at_once(make, kind):
    rig = make(terminal=kind)
    session_id = rig.start("cat")
    rig.watch(session_id)
    until(lambda: rig.live(session_id))
    took = []
    for i in range(100):
        before, start = len(rig.live(session_id)), time.perf_counter()
        rig.key(session_id, b"%d" % (i % 10))
        while len(rig.live(session_id)) == before:
            time.sleep(0)
        took.append(time.perf_counter() - start)
    assert sorted(took)[50] < 0.01, sorted(took)  # an order of magnitude above what it takes
