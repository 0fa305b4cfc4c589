"""The store of session logs: what is acknowledged is on the disk, what is missing is said."""

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import logs
import models
import sessions
from auth import HUB
from conftest import ROOT, wait_until
from logs import MB, LogStore, asciicast

AT = 1_700_000_000.0


@pytest.fixture
def open_store(tmp_path):
    """`open_store()`: a store of `logs.db`; `again` closes what is open first."""
    opened = []

    def start(**limits) -> LogStore:
        while opened:
            opened.pop().close()
        opened.append(LogStore(tmp_path / "logs.db", **limits))
        return opened[0]

    yield start
    while opened:
        opened.pop().close()


@pytest.fixture
def store(open_store):
    return open_store()


def put(store, session_id, offset, data, at=AT, times=None) -> int | None:
    """Append and wait; the end that was acknowledged."""
    ends = []
    store.append(session_id, offset, data, at, times, ends.append)
    store.flush()
    return ends[0] if ends else None


def whole(store, session_id) -> bytes:
    """All that is there, read piece by piece."""
    pieces, offset = [], 0
    while (piece := store.read(session_id, offset, 1000)).data:
        pieces.append(piece.data)
        offset = piece.next
    return b"".join(pieces)


# ── against a plain model ─────────────────────────────────────────────────────────────────────

SESSION_MOST = 3000


class Model:
    """A log as a list of bytes (None: lost) and the blocks it came in."""

    def __init__(self):
        self.cells: list[int | None] = []
        self.blocks: list[tuple[int, int]] = []
        self.unknown: set[int] = set()  # where output of unknown length is missing
        self.start = 0

    def append(self, offset: int, data: bytes) -> None:
        end = len(self.cells)
        if offset <= end < offset + len(data):
            fresh = data[end - offset :]
            self.blocks.append((end, len(fresh)))
            self.cells += fresh
            if len(self.blocks) == 1:
                self.start = end
        while sum(size for _, size in self.blocks) > SESSION_MOST:
            del self.blocks[0]
            self.start = self.blocks[0][0] if self.blocks else len(self.cells)

    def gap(self, start: int, stop: int | None) -> None:
        if stop is None:
            self.unknown.add(start)
        elif start <= len(self.cells) < stop:
            self.cells += [None] * (stop - len(self.cells))
            if not self.blocks:
                self.start = stop

    def missing(self) -> set[int]:
        return {n for n in range(self.start, len(self.cells)) if self.cells[n] is None}


near = st.integers(-40, 40)
sessions_of = st.sampled_from(["a", "b", "c"])


class Store(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.models = {name: Model() for name in "abc"}
        self.acked: dict[str, int] = {}
        self.value = 0
        self.open()

    def open(self) -> None:
        self.store = LogStore(self.folder / "logs.db", session_mb=SESSION_MOST / MB)

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(name=sessions_of, shift=near, size=st.integers(0, 400))
    def append(self, name, shift, size):
        model = self.models[name]
        offset = max(0, len(model.cells) + shift)
        self.value += 1
        data = bytes((self.value + n) % 256 for n in range(size))
        model.append(offset, data)
        self.store.append(
            name, offset, data, AT, None, lambda end: self.acked.__setitem__(name, end)
        )

    @rule(name=sessions_of, shift=near, size=st.one_of(st.none(), st.integers(0, 100)))
    def gap(self, name, shift, size):
        model = self.models[name]
        start = max(0, len(model.cells) + shift)
        stop = None if size is None else start + size
        model.gap(start, stop)
        assert self.store.gap(name, start, stop, "the pipe was down")

    @rule(name=sessions_of)
    def end_it(self, name):
        self.store.ended(name)

    @rule()
    def restart(self):
        self.store.close()
        self.open()

    @rule(name=sessions_of, offset=st.integers(0, 5000), limit=st.integers(1, 2000))
    def read(self, name, offset, limit):
        assert self.store.flush()
        model, piece = self.models[name], self.store.read(name, offset, limit)
        assert (piece.start, piece.end) == (model.start, len(model.cells))
        there = [n for n in range(offset, len(model.cells)) if self._there(model, n)]
        assert piece.offset == (there[0] if there else piece.end)
        assert piece.next == piece.offset + len(piece.data)
        assert bytes(model.cells[piece.offset : piece.next]) == piece.data
        assert bool(piece.data) == bool(there)
        assert len(piece.data) <= limit + 400

    @staticmethod
    def _there(model, n) -> bool:
        return n >= model.start and model.cells[n] is not None

    @invariant()
    def it_is_what_the_model_says(self):
        assert self.store.flush()
        total = 0
        for name, model in self.models.items():
            expected = bytes(c for c in model.cells[model.start :] if c is not None)
            assert whole(self.store, name) == expected
            assert self.store.end(name) == len(model.cells)
            assert len(expected) <= SESSION_MOST
            total += len(expected)
            self._marks_are_true(name, model)
        assert self.store._total == total
        assert all(self.acked[name] <= len(self.models[name].cells) for name in self.acked)

    def _marks_are_true(self, name, model):
        lost: set[int] = set()
        unknown = set()
        for mark in self.store.marks(name):
            if mark["kind"] == "removed":
                assert (mark["from"], mark["to"]) == (0, model.start)
                assert "per session" in mark["why"]
            elif mark["to"] is None:
                unknown.add(mark["from"])
            else:
                cells = set(range(mark["from"], mark["to"]))
                assert not cells & lost, "counted twice"
                lost |= cells
        assert {n for n in lost if n >= model.start} == model.missing()
        # one that stood where a gap begins is that gap
        assert unknown <= model.unknown


Store.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=HealthCheck
)
TestStore = Store.TestCase


# ── acknowledged is stored ────────────────────────────────────────────────────────────────────

WRITER = """
import sys
if sys.argv[2] == "patched":
    from gevent import monkey
    monkey.patch_all()
import itertools, os, threading, time
sys.path.insert(0, sys.argv[3])
from logs import LogStore

store = LogStore(sys.argv[1])

def write(name):
    free = threading.Semaphore(8)
    def then(end):
        os.write(1, f"{name} {end}\\n".encode())
        for _ in range(8):
            free.release()
    for number in itertools.count():
        for _ in range(8 if number % 8 == 0 else 0):
            free.acquire()
        data = (b"%s %09d\\n" % (name.encode(), number)) * 9
        store.append(name, number * len(data), data, time.time(), None, then)

for name in ("a", "b", "c", "d"):
    threading.Thread(target=write, args=(name,), daemon=True).start()
time.sleep(60)
"""


@pytest.mark.parametrize("threads", ["patched", "real"])
def test_what_is_acknowledged_survives_kill_9(tmp_path, threads):
    for lines in (1, 40, 300):
        folder = tmp_path / str(lines)
        folder.mkdir()
        command = [sys.executable, "-c", WRITER, str(folder / "logs.db"), threads, str(ROOT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            acks = [writer.stdout.readline() for _ in range(lines)]
            writer.send_signal(signal.SIGKILL)
            acks += writer.stdout.readlines()
        store = LogStore(folder / "logs.db")
        for name in "abcd":
            acked = [int(a.split()[1]) for a in acks if a.startswith(name) and a.endswith("\n")]
            assert acked == sorted(acked)
            assert store.end(name) >= max(acked, default=0)
            text = whole(store, name).decode()
            assert len(text) == store.end(name)
            assert re.findall(r"\d+", text) == [f"{n // 9:09d}" for n in range(len(text) // 12)]
        store.close()


def test_several_blocks_of_a_session_in_one_commit_are_one_acknowledgement(store):
    held, ends = threading.Event(), []
    store.append("other", 0, b"x", AT, None, lambda end: held.wait(10))  # the writer is busy
    wait_until(lambda: store.end("other"))
    for n in range(100):
        store.append("a", n, b"y", AT, None, ends.append)
    held.set()
    assert store.flush()
    assert ends == [100]


def test_who_brings_too_much_waits_for_the_disk(store, monkeypatch):
    monkeypatch.setattr(logs, "QUEUE_BYTES", 1000)
    held, brought = threading.Event(), []
    store.append("other", 0, b"x", AT, None, lambda end: held.wait(10))
    wait_until(lambda: store.end("other"))

    def bring():
        for n in range(20):
            store.append("a", n * 100, bytes(100), AT)
            brought.append(n)

    bringing = threading.Thread(target=bring)
    bringing.start()
    wait_until(lambda: len(brought) >= 3)
    bringing.join(0.2)
    assert bringing.is_alive() and len(brought) < 10
    held.set()
    bringing.join(10)
    assert store.flush() and store.end("a") == 2000


def test_a_store_that_is_closed_has_stored_what_it_was_brought(open_store):
    store, ends = open_store(), []
    for n in range(1000):
        store.append("a", n * 10, b"0123456789", AT, None, ends.append)
    store.close()
    assert ends[-1] == 10_000
    store.append("a", 10_000, b"too late", AT, None, ends.append)
    assert not store.gap("a", 10_000, 10_001, "too late")
    assert open_store().end("a") == ends[-1] == 10_000


def test_a_full_disk_stops_neither_the_writer_nor_makes_holes(store, caplog):
    assert put(store, "a", 0, b"before") == 6
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    assert put(store, "a", 6, bytes(60_000)) is None
    assert put(store, "a", 60_006, b"behind a hole") in (None, 6)
    assert not store.gap("b", 0, 10, "x" * 60_000)
    assert store.end("a") == 6 and whole(store, "a") == b"before"
    store._db.execute("PRAGMA max_page_count = 100000")
    assert put(store, "a", 60_006, b"behind a hole") == 6
    assert put(store, "a", 6, bytes(60_000)) == 60_006
    said = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert len(said) == 1 and "full" in said[0] and "agents keep" in said[0]


def test_a_file_somebody_else_writes_to_is_not_acknowledged_and_can_be_read(store, tmp_path):
    assert put(store, "a", 0, b"before") == 6
    other = sqlite3.connect(tmp_path / "logs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert put(store, "a", 6, b"meanwhile") is None
    assert store.read("a", 0, 100).data == b"before"
    other.execute("ROLLBACK")
    other.close()
    assert put(store, "a", 6, b"after") == 11


def test_a_reader_never_waits_for_the_writer(store):
    """Also not for one that is in the middle of a commit."""
    assert put(store, "a", 0, b"before") == 6
    inside, go = threading.Event(), threading.Event()

    def deed(row):
        inside.set()
        go.wait(10)

    store._put(logs._Job("a", deed))
    assert inside.wait(10)
    assert store.read("a", 0, 100).data == b"before"
    assert store.extents(["a", "b"]) == {"a": (0, 6)}
    go.set()


def test_a_callback_that_breaks_is_logged_and_the_others_go_on(store, caplog):
    store.append("a", 0, b"x", AT, None, lambda end: 1 / 0)
    assert store.flush() and "could not be told" in caplog.text
    assert put(store, "b", 0, b"x") == 1


@pytest.mark.parametrize(("offset", "size"), [(2**53, 1), (2**63, 1), (10**30, 5), (2**53 - 3, 10)])
def test_offsets_beyond_reason_are_not_stored(store, offset, size):
    assert put(store, "a", offset, bytes(size)) == 0
    assert store.read("a", offset, 10).data == b""
    with pytest.raises(ValueError):
        store.append("a", -1, b"xx", AT)
    with pytest.raises(ValueError):
        store.gap("a", 0, 10**30, "")
    with pytest.raises(ValueError):
        store.gap("a", 5, 4, "")
    assert put(store, "a", 0, b"x") == 1


# ── gaps ──────────────────────────────────────────────────────────────────────────────────────


def test_a_block_behind_a_gap_is_refused_until_the_gap_is_declared(store):
    assert put(store, "a", 0, b"0123") == 4
    assert put(store, "a", 8, b"89") == 4
    assert store.gap("a", 4, 8, "disk limit")
    assert store.end("a") == 8
    assert put(store, "a", 8, b"89") == 10
    first = store.read("a", 0, 100)
    assert (first.data, first.offset, first.next) == (b"0123", 0, 4)
    for inside in (4, 5, 8):
        second = store.read("a", inside, 100)
        assert (second.data, second.offset, second.next) == (b"89", 8, 10)
    assert store.read("a", 10, 100)[:3] == (b"", 10, 10)
    assert store.read("a", 99, 100)[:3] == (b"", 10, 10)


@pytest.mark.parametrize(
    ("start", "stop", "marked", "end"),
    [
        (10, 20, [(10, 20)], 20),
        (5, 20, [(10, 20)], 20),  # the rest had come after all
        (0, 10, [], 10),
        (3, 7, [], 10),
        (11, 20, [], 10),  # what is before it may still come
        (10, 10, [], 10),
        (4, None, [(4, None)], 10),
        (12, None, [(12, None)], 10),
    ],
)
def test_a_gap_counts_what_is_not_stored(store, start, stop, marked, end):
    assert put(store, "a", 0, b"0123456789") == 10
    for _ in range(2):
        assert store.gap("a", start, stop, "why")
    assert [(m["from"], m["to"]) for m in store.marks("a")] == marked
    assert store.end("a") == end


def test_gaps_that_touch_are_one_unless_their_causes_differ(store):
    put(store, "a", 0, b"01")
    for start, stop, why in [(2, 4, "x"), (4, 6, "x"), (6, 8, "y"), (8, 9, "y")]:
        assert store.gap("a", start, stop, why)
    found = [(m["kind"], m["from"], m["to"], m["why"]) for m in store.marks("a")]
    assert found == [("gap", 2, 6, "x"), ("gap", 6, 9, "y")]


def test_a_gap_that_is_measured_stays_so(store):
    assert store.gap("a", 0, 5, "x") and store.gap("a", 0, None, "y")
    assert [(m["from"], m["to"], m["why"]) for m in store.marks("a")] == [(0, 5, "x")]


def test_a_log_that_begins_with_a_gap_starts_behind_it(store):
    assert store.gap("a", 0, 100, "why")
    assert store.extents(["a"]) == {"a": (100, 100)}
    assert put(store, "a", 100, b"x") == 101
    assert store.read("a", 0, 10) == (b"x", 100, 101, 100, 101)


# ── limits ────────────────────────────────────────────────────────────────────────────────────


def test_the_start_of_a_long_log_goes_and_the_log_says_so(open_store):
    store, told = open_store(session_mb=0.001), []
    store.removed = lambda *said: told.append(said)
    for n in range(50):
        put(store, "a", n * 100, bytes([n]) * 100)
    assert store.extents(["a"]) == {"a": (4000, 5000)}
    [mark] = store.marks("a")
    assert (mark["kind"], mark["from"], mark["to"]) == ("removed", 0, 4000)
    assert mark["why"] == "limit of 0.001 MB per session"
    piece = store.read("a", 0, 10_000)
    assert (piece.offset, piece.next, piece.start) == (4000, 5000, 4000)
    assert told == [("a", mark["why"])]
    store = open_store(session_mb=0.001)
    put(store, "a", 5000, bytes(100))
    assert store.extents(["a"]) == {"a": (4100, 5100)}


def test_a_block_larger_than_the_limit_leaves_an_empty_log(open_store):
    store = open_store(session_mb=0.001)
    assert put(store, "a", 0, bytes(5000)) == 5000
    assert store.extents(["a"]) == {"a": (5000, 5000)}
    assert put(store, "a", 5000, b"x") == 5001
    assert whole(store, "a") == b"x"


def test_in_total_the_ended_and_the_longest_silent_go_first(open_store):
    store, told = open_store(total_mb=0.001), []
    store.removed = lambda *said: told.append(said)
    for name in ("live-old", "ended", "live-new"):
        for n in range(3):
            put(store, name, n * 100, bytes(100))
    store.ended("ended")
    put(store, "loud", 0, bytes(100))
    assert store._total == 1000
    for n in range(1, 9):
        put(store, "loud", n * 100, bytes(100))
        assert store._total == 1000
    order = ("ended", "live-new", "live-old", "loud")
    left = {name: store.extents([name])[name] for name in order}
    assert left == {
        "ended": (300, 300),
        "live-old": (300, 300),
        "live-new": (200, 300),
        "loud": (0, 900),
    }
    assert [name for name, _ in told] == ["ended", "live-old", "live-new"]
    assert store.marks("ended")[0]["why"] == "limit of 0.001 MB in all"
    assert put(store, "ended", 300, b"late") == 304


def test_a_lower_limit_is_reached_step_by_step_without_anybody_writing(open_store, monkeypatch):
    store = open_store()
    for name in "abcdef":
        for n in range(10):
            store.append(name, n * 10_000, bytes(10_000), AT)
    assert store.flush()
    monkeypatch.setattr(logs, "REMOVE_BYTES", 50_000)
    store = open_store(total_mb=0.1)
    assert store._total == 600_000
    put(store, "g", 0, b"x")
    wait_until(lambda: store._total <= 100_000)
    assert store.flush()
    assert sum(len(whole(store, name)) for name in "abcdefg") == store._total > 80_000


def test_pages_of_removed_blocks_are_used_again(open_store, tmp_path):
    store = open_store(session_mb=1)
    sizes = []
    for n in range(200):
        store.append("a", n * 60_000, bytes(60_000), AT)
        if n % 50 == 49:
            assert store.flush()
            sizes.append(store._db.execute("PRAGMA page_count").fetchone()[0])
    assert max(sizes) * 4096 < 6 * MB


def test_marks_within_what_was_removed_go_with_it(open_store):
    store = open_store(session_mb=0.0003)
    put(store, "a", 0, bytes(100))
    store.resized("a", 90, 30, was=(80, 24))
    store.gap("a", 100, 200, "pipe")
    store.gap("a", 50, None, "unknown")
    put(store, "a", 200, bytes(100))
    store.resized("a", 100, 40)
    put(store, "a", 300, bytes(100))
    assert [m["kind"] for m in store.marks("a")] == ["gap", "gap"]
    assert [text for _, _, text in store.sizes("a")] == ["80x24", "90x30", "100x40"]
    put(store, "a", 400, bytes(100))
    assert [(m["kind"], m["to"]) for m in store.marks("a")] == [("removed", 200)]
    assert [text for _, _, text in store.sizes("a")] == ["90x30", "100x40"]


# ── a file of an older hub ────────────────────────────────────────────────────────────────────

OLD = (
    "CREATE TABLE block (session_id TEXT NOT NULL, offset INTEGER NOT NULL,"
    " size INTEGER NOT NULL, data BLOB NOT NULL, at REAL NOT NULL,"
    " PRIMARY KEY (session_id, offset))"
)


def test_a_file_of_an_older_hub_goes_on(open_store, tmp_path):
    old = sqlite3.connect(tmp_path / "logs.db")
    old.execute("PRAGMA journal_mode=WAL")
    old.execute(OLD)
    rows = [("a", 0, 3, b"abc", AT), ("a", 3, 2, b"de", AT + 1), ("b", 0, 1, b"x", AT + 2)]
    old.executemany("INSERT INTO block VALUES (?, ?, ?, ?, ?)", rows)
    old.commit()
    old.close()
    for _ in range(2):
        store = open_store()
        assert store.extents(["a", "b", "c"]) == {"a": (0, 5), "b": (0, 1)}
        assert whole(store, "a") == b"abcde"
        assert store._total == 6
    assert put(store, "a", 3, b"defg", AT, [[2, 0.5]]) == 7
    events = [json.loads(line) for line in asciicast(store, "a", "t", (80, 24), AT)][1:]
    assert events == [[0.0, "o", "abc"], [1.0, "o", "de"], [1.0, "o", "fg"]]


# ── recordings ────────────────────────────────────────────────────────────────────────────────


def play(store, session_id="a", size=(80, 24)) -> tuple[dict, list]:
    header, *events = [
        json.loads(line) for line in asciicast(store, session_id, "dev", size, AT - 5)
    ]
    times = [t for t, _, _ in events]
    assert times == sorted(times) and all(t >= 0 for t in times)
    assert {kind for _, kind, _ in events} <= {"o", "r", "m"}
    return header, events


def printed(events) -> str:
    return "".join(text for _, kind, text in events if kind == "o")


def test_a_recording_of_nothing_is_a_header(store):
    header, events = play(store)
    assert header == {
        "version": 2,
        "width": 80,
        "height": 24,
        "timestamp": int(AT - 5),
        "title": "dev",
        "env": {"TERM": "xterm-256color"},
    }
    assert events == []


def test_a_recording_has_the_time_of_every_byte(store):
    put(store, "a", 0, b"$ make\r\n", AT, [[1, 0.5], [2, 0.75]])
    put(store, "a", 8, b"ok", AT + 3600)
    put(store, "a", 10, b"!", AT + 7)  # a clock that was set back
    header, events = play(store)
    assert header["timestamp"] == int(AT)
    assert events == [
        [0.0, "o", "$"],
        [0.5, "o", " "],
        [0.75, "o", "make\r\n"],
        [3600.0, "o", "ok"],
        [3600.0, "o", "!"],
    ]


def test_a_block_that_is_cut_keeps_the_times_of_the_rest(store):
    put(store, "a", 0, b"0123", AT)
    put(store, "a", 2, b"23456789", AT + 1, [[3, 1.0], [5, 2.0]])
    assert play(store)[1] == [
        [0.0, "o", "0123"],
        [1.0, "o", "4"],
        [2.0, "o", "56"],
        [3.0, "o", "789"],
    ]


def test_characters_cut_by_blocks_times_and_gaps(store):
    text = "héllo 日本 🙂\n".encode()
    offset = 0
    for n, byte in enumerate(text):
        put(store, "a", offset, bytes([byte]), AT + n)
        offset += 1
    put(store, "a", offset, "é".encode()[:1], AT + 100)
    store.gap("a", offset + 1, offset + 4, "pipe")
    put(store, "a", offset + 4, "é".encode()[1:] + b"x", AT + 101)
    events = play(store)[1]
    assert printed(events) == text.decode() + "\ufffd\ufffdx"
    assert [e[2] for e in events if e[1] == "m"] == ["3 bytes missing: pipe"]
    assert [e[1] for e in events[-3:]] == ["o", "m", "o"]


def test_sizes_and_marks_stand_where_they_happened(open_store):
    store = open_store(session_mb=0.0004)
    put(store, "a", 0, b"a" * 100, time.time())
    store.resized("a", 100, 30, was=(80, 24))
    put(store, "a", 100, b"b" * 100, time.time() + 1)
    store.gap("a", 200, 5_000_200, "disk limit")
    store.gap("a", 5_000_250, None, "the recording had stopped")
    put(store, "a", 5_000_200, b"c" * 100, time.time() + 2)
    store.resized("a", 120, 40)
    store.flush()
    header, events = play(store, size=(120, 40))
    assert (header["width"], header["height"]) == (80, 24)
    assert [e[1:] for e in events] == [
        ["o", "a" * 100],
        ["r", "100x30"],
        ["o", "b" * 100],
        ["m", "5.0 MB missing: disk limit"],
        ["o", "c" * 50],
        ["m", "output missing: the recording had stopped"],
        ["o", "c" * 50],
        ["r", "120x40"],
    ]
    put(store, "a", 5_000_300, b"d" * 200, time.time() + 3)
    header, events = play(store)
    assert (header["width"], header["height"]) == (100, 30)
    assert events[0][1:] == ["m", "100 bytes removed: limit of 0.0004 MB per session"]
    assert printed(events) == "b" * 100 + "c" * 100 + "d" * 200


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.binary(max_size=400), st.text(max_size=200).map(str.encode)),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    times=st.lists(st.tuples(st.integers(1, 399), st.floats(0, 9)), max_size=6),
)
def test_a_recording_replays_the_bytes_of_the_log(text, cuts, times):
    with tempfile.TemporaryDirectory() as folder:
        store = LogStore(Path(folder) / "logs.db")
        edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
        for low, high in zip(edges, edges[1:], strict=False):
            steps = sorted({n: t for n, t in times if 0 < n < high - low}.items())
            later = sorted(t for _, t in steps)
            stamped = [[n, t] for (n, _), t in zip(steps, later, strict=True)]
            put(store, "a", low, text[low:high], AT + low, stamped)
        assert printed(play(store)[1]) == text.decode("utf-8", "replace")
        store.close()


def test_a_recording_of_a_long_log_takes_little_memory(open_store):
    store = open_store()
    block = ("0123456789abcde\n" * 4000).encode()
    for n in range(400):
        store.append("a", n * len(block), block, AT + n)
    assert store.flush()
    tracemalloc.start()
    size = sum(len(line) for line in asciicast(store, "a", "t", (80, 24), AT))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 400 * len(block) and peak < 8 * MB


def test_what_is_removed_while_it_is_recorded_is_said(open_store, monkeypatch):
    monkeypatch.setattr(logs, "PAGE_BYTES", 100)
    store = open_store(session_mb=0.001)
    for n in range(10):
        put(store, "a", n * 100, bytes([65 + n]) * 100)
    lines = asciicast(store, "a", "t", (80, 24), AT)
    events = [json.loads(next(lines)) for _ in range(3)][1:]
    for n in range(10, 15):
        put(store, "a", n * 100, bytes([65 + n]) * 100)
    events += [json.loads(line) for line in lines]
    assert [text[:30] for _, _, text in events] == [
        "A" * 30,
        "B" * 30,
        "300 bytes missing",
        *(letter * 30 for letter in "FGHIJ"),
    ]


# ── through the API ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def session(app, world):
    world.server("dev")
    made, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "build/../«1»"})
    return made


def test_output_says_where_its_bytes_begin(session, admin):
    store, path = sessions.logs(), f"sessions/{session['id']}/output"
    empty = admin.get(path)
    names = ("X-Offset", "X-Next-Offset", "X-Log-Start", "X-Log-End")
    assert [empty.headers[name] for name in names] == ["0", "0", "0", "0"]
    put(store, session["id"], 0, b"0123")
    store.gap(session["id"], 4, 8, "disk limit")
    put(store, session["id"], 8, b"89")
    for asked, data, where in [
        (0, b"0123", "0 4 0 10"),
        (2, b"23", "2 4 0 10"),
        (4, b"89", "8 10 0 10"),
        (6, b"89", "8 10 0 10"),
        (9, b"9", "9 10 0 10"),
        (10, b"", "10 10 0 10"),
        (1000, b"", "10 10 0 10"),
    ]:
        answer = admin.get(f"{path}?offset={asked}")
        assert (answer.data, " ".join(answer.headers[name] for name in names)) == (data, where)
    [mark] = admin.get(f"sessions/{session['id']}/marks").json["marks"]
    assert {k: mark[k] for k in ("kind", "from", "to", "why")} == {
        "kind": "gap",
        "from": 4,
        "to": 8,
        "why": "disk limit",
    }
    assert mark["at"].endswith("Z")
    shown = admin.get(f"sessions/{session['id']}").json
    assert (shown["log_start"], shown["log_end"]) == (0, 10)


def test_a_recording_is_a_file_to_download(session, admin):
    put(sessions.logs(), session["id"], 0, "é✓\r\n".encode())
    answer = admin.get(f"sessions/{session['id']}/recording")
    assert answer.mimetype == "application/x-asciicast"
    name = f"build-..-1-{session['id'][:8]}.cast"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{name}"'
    header, event = [json.loads(line) for line in answer.data.decode().splitlines()]
    assert (header["title"], header["width"]) == (session["name"], session["cols"])
    assert event == [0.0, "o", "é✓\r\n"]


def test_the_removal_of_output_is_an_event_once(world, session):
    store = sessions.logs()
    store._limits = 1000, 10 * MB
    for n in range(30):
        put(store, session["id"], n * 100, bytes(100))
    found = [e for e in world.events() if e["type"] == "session_log_removed"]
    assert [e["session_id"] for e in found] == [session["id"]]
    assert found[0]["details"]["why"] == "limit of 64 MB per session"
    shown = sessions.session_view(sessions.get_session(HUB, session["id"]))
    assert (shown["log_start"], shown["log_end"]) == (2000, 3000)


def test_a_session_that_has_ended_is_known_as_such(world, session):
    with models.transaction() as tx:
        sessions.move(tx, session, "fail", HUB.actor)
    store = sessions.logs()
    assert store.flush()
    assert store._rows("SELECT ended FROM log WHERE session_id = ?", session["id"]) == [(1,)]


def test_a_resized_terminal_is_in_the_recording(world, session, admin):
    with models.transaction() as tx:
        sessions.move(tx, session, "started", HUB.actor)
    put(sessions.logs(), session["id"], 0, b"x")
    with models.bus.subscribe(f"server:{world.servers['dev']}"):
        sessions.resize(HUB, session["id"], 77, 33)
    assert sessions.logs().flush()
    lines = admin.get(f"sessions/{session['id']}/recording").data.decode().splitlines()
    assert (json.loads(lines[0])["width"], json.loads(lines[-1])[1:]) == (120, ["r", "77x33"])
