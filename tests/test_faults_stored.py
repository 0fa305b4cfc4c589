"""Faults of what is stored: power that fails between writes, graphs worked off in any order with
failures among them, more work than servers can take, data of other versions."""

import _sqlite3
import contextlib
import ctypes
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from websockets.sync.client import connect

import auth
import logs
import models
import sessions
from conftest import World, _close, _forget_all, check_invariants, wait_until
from faulting import FAST, LONG, Graph, N, Told, healthy, reading, through

pytestmark = pytest.mark.timeout(7200 if LONG else 240)

# ── power loss ────────────────────────────────────────────────────────────────────────────────


class Vfs(ctypes.Structure):
    _fields_ = [
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("zName", ctypes.c_char_p),
        ("pAppData", ctypes.c_void_p),
        ("xOpen", ctypes.c_void_p),
        ("xDelete", ctypes.c_void_p),
        ("rest", ctypes.c_void_p * 19),
    ]


class Methods(ctypes.Structure):
    _fields_ = [
        ("iVersion", ctypes.c_int),
        ("xClose", ctypes.c_void_p),
        ("xRead", ctypes.c_void_p),
        ("xWrite", ctypes.c_void_p),
        ("xTruncate", ctypes.c_void_p),
        ("xSync", ctypes.c_void_p),
        ("rest", ctypes.c_void_p * 13),
    ]


OPEN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int),
)
WRITE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
)
TRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
DELETE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Recorder:
    """Has SQLite write down what it writes and when it asks for the disk, in order.

    steps: ("write", file, offset, bytes), ("truncate", file, size), ("sync", file),
    ("delete", file), or ("told", event id), which the test adds.
    """

    def __init__(self):
        self.steps: list[tuple] = []
        self._library = ctypes.CDLL(_sqlite3.__file__)
        find = self._library.sqlite3_vfs_find
        find.restype, find.argtypes = ctypes.POINTER(Vfs), [ctypes.c_char_p]
        self._register = self._library.sqlite3_vfs_register
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._usual = find(None)
        self._vfs = Vfs.from_buffer_copy(self._usual.contents)
        self._vfs.zName, self._vfs.pNext = b"recording", None
        self._open = OPEN(self._opened)
        self._vfs.xOpen = ctypes.cast(self._open, ctypes.c_void_p).value
        self._delete = DELETE(self._deleted)
        self._vfs.xDelete = ctypes.cast(self._delete, ctypes.c_void_p).value
        self._kept: list = []  # callbacks and tables, as long as SQLite may use them

    def __enter__(self):
        self._register(ctypes.byref(self._vfs), 1)
        return self

    def __exit__(self, *_):
        self._register(self._usual, 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _opened(self, vfs, path, file, flags, out) -> int:
        done = OPEN(self._usual.contents.xOpen)(vfs, path, file, flags, out)
        if done == 0 and path:
            name = Path(ctypes.string_at(path).decode()).name
            slot = ctypes.cast(file, ctypes.POINTER(ctypes.c_void_p))
            usual = ctypes.cast(slot[0], ctypes.POINTER(Methods)).contents
            slot[0] = ctypes.addressof(self._recording(usual, name))
        return done

    def _deleted(self, vfs, path, sync_directory) -> int:
        done = DELETE(self._usual.contents.xDelete)(vfs, path, sync_directory)
        self.steps.append(("delete", Path(path.decode()).name))
        return done

    def _recording(self, usual: Methods, name: str) -> Methods:
        write, truncate, sync = WRITE(usual.xWrite), TRUNCATE(usual.xTruncate), SYNC(usual.xSync)

        def xwrite(file, data, size, offset):
            self.steps.append(("write", name, offset, ctypes.string_at(data, size)))
            return write(file, data, size, offset)

        def xtruncate(file, size):
            self.steps.append(("truncate", name, size))
            return truncate(file, size)

        def xsync(file, flags):
            done = sync(file, flags)
            self.steps.append(("sync", name))
            return done

        methods = Methods.from_buffer_copy(usual)
        callbacks = WRITE(xwrite), TRUNCATE(xtruncate), SYNC(xsync)
        for field, callback in zip(("xWrite", "xTruncate", "xSync"), callbacks, strict=True):
            setattr(methods, field, ctypes.cast(callback, ctypes.c_void_p).value)
        self._kept += [methods, *callbacks]
        return methods


def after_power_loss(steps: list[tuple], at: int, dice: random.Random) -> dict[str, bytearray]:
    """{file: what the disk has} when power fails after so many steps: all that was asked for, and
    of what was written since, any part, whole or cut at a sector."""
    synced = {}
    for n, step in enumerate(steps[:at]):
        if step[0] == "sync":
            synced[step[1]] = n
    files = defaultdict(bytearray)
    for n, step in enumerate(steps[:at]):
        if step[0] in ("sync", "told"):
            continue
        if step[0] == "delete":
            files.pop(step[1], None)
            continue
        sure = n < synced.get(step[1], -1)
        if sure or dice.random() < 0.5:
            _apply(files[step[1]], step, None if sure or dice.random() < 0.5 else dice)
    return files


def _apply(content: bytearray, step: tuple, dice: random.Random | None) -> None:
    if step[0] == "truncate":
        del content[step[2] :]
        return
    _, _, offset, data = step
    if dice and len(data) > 512:
        data = data[: 512 * dice.randrange(len(data) // 512)]
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


@pytest.mark.fault("F4 power fails between writes")
def test_f4_what_was_announced_is_on_the_disk_when_power_fails(tmp_path, case):
    steps = _recorded(tmp_path)
    assert {"hub.db", "hub.db-wal"} <= {step[1] for step in steps if step[0] != "told"}
    cuts = [_cut(steps, tmp_path, case.random) for _ in range(20 * N)]
    assert max(stored for _, stored in cuts) > 100
    case.kills = len(cuts)
    case.count("announced events", sum(a for a, _ in cuts), sum(max(0, a - s) for a, s in cuts))
    case.seen = f"cut somewhere in {len(steps)} writes and syncs"


def test_power_loss_shows_a_database_that_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The test above would see it."""
    eager = [p for p in models.WRITER_PRAGMAS if "synchronous" not in p]
    monkeypatch.setattr(models, "WRITER_PRAGMAS", (*eager, "PRAGMA synchronous=OFF"))
    steps, dice = _recorded(tmp_path), random.Random(4)
    with pytest.raises((AssertionError, sqlite3.DatabaseError)):
        for _ in range(100):
            announced, stored = _cut(steps, tmp_path, dice)
            assert stored >= announced


def _recorded(folder: Path) -> list[tuple]:
    recorder = Recorder()
    with recorder:
        _work(recorder, folder / "work")
    return recorder.steps


def _cut(steps: list[tuple], folder: Path, dice: random.Random) -> tuple[int, int]:
    """Power fails at some step: the last event that was announced, and the last that is stored."""
    at = dice.randrange(len(steps))
    with tempfile.TemporaryDirectory(dir=folder) as cut:
        for name, content in after_power_loss(steps, at, dice).items():
            if name.startswith("hub.db"):
                (Path(cut) / name).write_bytes(content)
        announced = [step[1] for step in steps[:at] if step[0] == "told"]
        return (announced[-1] if announced else 0), _stored(Path(cut) / "hub.db")


def _work(recorder: Recorder, folder: Path) -> None:
    """A graph is worked off; what is announced is noted among the steps."""
    folder.mkdir()
    models.open_db(folder / "hub.db")
    auth.use_secret(folder / "secret")
    sessions.use_logs(logs.LogStore(folder / "logs.db"))
    _forget_all()
    world = World()
    publish = models.bus.publish
    models.bus.publish = lambda topic, message: (
        topic == "events" and recorder.steps.append(("told", message["id"])),
        publish(topic, message),
    )[1]
    heard = models.bus.subscribe("events")
    try:
        for name in ("one", "two"):
            world.server(name)
        for n in range(30):
            world.task(f"t{n}", after=[f"t{n - 1}"] if n else [], auto_assign=True)
        for n in range(30):
            world.start(f"t{n}")
            world.complete(f"t{n}", {"n": n})
            if n == 20:
                models.db.obj.writer.execute("PRAGMA wal_checkpoint(RESTART)")
    finally:
        heard.close()
        models.bus.publish = publish
        _close()


def _stored(path: Path) -> int:
    """The last event that is stored in a file that must be sound."""
    if not (path.exists() and path.stat().st_size):
        return 0
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'event'").fetchone():
            return 0
        return db.execute("SELECT COALESCE(MAX(id), 0) FROM event").fetchone()[0]
    finally:
        db.close()


# ── graphs ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault("F25 a random graph with failing tasks, against a model")
def test_f25_what_fails_blocks_just_what_a_plain_model_says(world, case):
    count, edges = 25 * N, 75 * N  # 5,000 and 15,000 in the long run
    world.server("big", slots=10_000)
    ups = {n: set() for n in range(count)}
    while sum(map(len, ups.values())) < edges:
        low, high = sorted(case.random.sample(range(count), 2))
        ups[high].add(low)
    fails = {n for n in range(count) if case.random.random() < 0.1}
    for n in range(count):
        world.task(str(n), after=[str(up) for up in sorted(ups[n])], auto_assign=True)
    while ready := [n for n in range(count) if world.status(str(n)) == "assigned"]:
        for n in case.random.sample(ready, len(ready)):
            world.start(str(n))
            world.fail(str(n)) if n in fails else world.complete(str(n), n)
    expected = {}
    for n in range(count):
        free = all(expected[up] == "done" for up in ups[n])
        expected[n] = ("failed" if n in fails else "done") if free else "blocked"
    wrong = [n for n in range(count) if world.shown(str(n)) != expected[n]]
    case.count("tasks", count, len(wrong))
    check_invariants()
    spread = ", ".join(f"{v} {k}" for k, v in sorted(Counter(expected.values()).items()))
    case.seen = f"{count} tasks, {edges} edges: {spread}"


@pytest.mark.fault("F28 one task frees many, three servers of two slots")
def test_f28_a_wide_fan_fills_no_server_beyond_its_slots_and_is_fair(world, case):
    count = 10 * N
    names = ("one", "two", "three")
    for name in names:
        world.server(name, slots=2)
    world.working("up", server="one")
    for n in range(count):
        world.task(str(n), after=["up"])
    began = time.monotonic()
    world.complete("up", "x")
    fan_ms = 1000 * (time.monotonic() - began)
    order, taken = [], Counter()

    def given() -> list[int]:
        found = models.rows("SELECT title FROM task WHERE status = 'assigned'")
        return [int(row["title"]) for row in found]

    while held := given():
        assert all(world.busy(name) <= 2 for name in names)
        assert len(held) == min(6, count - len(order))
        first = min(held)
        taken[world.on(str(first))] += 1
        order.append(first)
        world.start(str(first))
        world.complete(str(first), "x")
    assert order == sorted(order), "who waited longer came later"
    assert min(taken.values()) >= count // 3 - 6, taken
    case.count("tasks", count, count - len(order))
    check_invariants()
    case.seen = f"1 → {count} in {fan_ms:.0f} ms; {dict(taken)}"


# ── versions ──────────────────────────────────────────────────────────────────────────────────

NEWER = """
import os, sys
sys.path.insert(0, {root!r})
from gevent import monkey
monkey.patch_all()
import hub, models
from pathlib import Path
models.MIGRATIONS = Path({folder!r})
sys.exit(hub.main())
"""


def newer_hub(root: Path, folder: Path) -> Path:
    """A script that is the hub of the next version: one migration more, which dies once midway."""
    shutil.copytree(root / "migrations", folder / "m", ignore=shutil.ignore_patterns("__pycache__"))
    number = models.newest_schema() + 1
    (folder / "m" / f"{number:04d}_next.py").write_text(
        "import os, pathlib, signal\n"
        f"MARK = pathlib.Path({str(folder / 'died')!r})\n"
        "def up(migrator, db):\n"
        "    db.execute_sql('CREATE TABLE next_thing (id TEXT PRIMARY KEY)')\n"
        "    db.execute_sql('ALTER TABLE task ADD COLUMN next_word TEXT')\n"
        "    if not MARK.exists():\n"
        "        MARK.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = folder / "newer_hub.py"
    script.write_text(NEWER.format(root=str(root), folder=str(folder / "m")))
    return script


@pytest.mark.fault("F30 upgrade with live agents, killed in the migration, and back")
@pytest.mark.hub(**FAST)
def test_f30_an_upgrade_in_mid_work_goes_on_and_an_older_hub_refuses_newer_data(
    shop, start_agent, tmp_path, case
):
    start_agent(shop, "dev", slots=4, ready=lambda agent: through(agent, shop))
    told, graph = Told(shop), Graph(shop, tmp_path)
    graph.make(layers=4, width=3)
    folder = tmp_path / "next"
    folder.mkdir()
    shop.stop()
    shop.script = newer_hub(Path(models.__file__).parent, folder)
    with pytest.raises(pytest.fail.Exception):
        shop.start()  # it dies midway
    assert (folder / "died").exists()
    case.kills += 1
    shop.start()
    graph.wait()
    case.check(shop, told.finish())
    with reading(shop) as db:
        assert "next_word" in {row[1] for row in db.execute("PRAGMA table_info(task)")}
    shop.stop()
    shop.script = None
    with pytest.raises(pytest.fail.Exception):
        shop.start()
    said = "".join(shop.lines)
    assert "was written by a newer hub" in said and "Traceback" not in said
    case.seen = f"{graph.check()} bodies twice; the older hub refuses the newer data in words"


# ── many at once ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault("F32 all agents reconnect at once")
@pytest.mark.hub(**FAST | {"offline_after_s": 60})
def test_f32_agents_that_reconnect_all_at_once_are_served_and_none_is_called_offline(shop, case):
    count = 5 * N
    keys = [shop.register(f"s{n}")["api_key"] for n in range(count)]
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(joined(shop, key))
        shop.kill()
    shop.start()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(joined(shop, key))
        took = time.monotonic() - began
        healthy(shop)
        wait_until(lambda: online(shop) == count, 20)
    said = Counter(e["type"] for e in shop.api("GET", "events?limit=1000")["events"])
    assert said["server_offline"] == 0
    case.check(shop)
    case.kills, case.seen = 1, f"{count} agents back in {took:.1f} s, none called offline"


def online(hub) -> int:
    with reading(hub) as db:
        return db.execute("SELECT COUNT(*) FROM server WHERE online = 1").fetchone()[0]


@contextlib.contextmanager
def joined(hub, key: str):
    """A connection of an agent that has said who it is and what it has."""
    url = f"ws{hub.url.removeprefix('http')}/ws/server"
    with connect(url, compression=None) as line:
        hello = {"type": "auth", "api_key": key, "protocol": 2, "instance": key[-8:]}
        line.send(models.dumps(hello | {"spool_id": key[-8:], "spool_first": 1}))
        assert "auth_ok" in line.recv(10)
        line.send(models.dumps({"type": "sync", "instance": key[-8:], "sessions": []}))
        assert "sync_ok" in line.recv(10)
        yield line
