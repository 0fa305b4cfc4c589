"""A completion that hands work on is done wholly or not at all: every statement of its transaction
fails once in turn, and the process is killed after every statement once in turn.

The graph: `up` hands a contract to `left` and `right`, which both wait for it; `join` waits for
both. Whatever happened, the worker says again that it is done, as agents do, and the graph runs to
its end with each task started once.
"""

import os
import shutil
import signal
import sqlite3
import sys

import pytest

import auth
import inbox
import logs
import models
import sessions
import tasks
from conftest import World, _close, _forget_all, check_invariants
from models import Refused

RESULT = {"summary": "up done", "contracts": {"api": {"paths": ["/x"]}}}
DEEDS = ("complete", "fail", "assign", "retry", "cancel", "note")


class Failing:
    """The write connection, whose `at`-th statement from now on goes wrong."""

    def __init__(self, connection, at: int, go_wrong):
        self._connection, self._at, self._go_wrong = connection, at, go_wrong
        self.count = 0

    def _next(self, run, *args):
        self.count += 1
        if self.count == self._at:
            return self._go_wrong(run, *args)
        return run(*args)

    def execute(self, *args):
        return self._next(self._connection.execute, *args)

    def executemany(self, *args):
        return self._next(self._connection.executemany, *args)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def fails(_run, *_args):
    raise sqlite3.OperationalError("disk I/O error")


def dies(run, *args):
    run(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def open_at(folder) -> None:
    models.open_db(folder / "hub.db")
    auth.use_secret(folder / "secret")
    sessions.use_logs(logs.LogStore(folder / "logs.db"))
    _forget_all()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A database in which `up` runs and the others wait; {name: id} of tasks and servers."""
    folder = tmp_path_factory.mktemp("prepared")
    open_at(folder)
    world = World()
    for name in ("one", "two"):
        world.server(name)
    world.working("up", server="one", command=["make"])
    world.task("left", inputs={"api": "up"}, command=["make"])
    world.task("right", inputs={"api": "up"}, command=["make"], after=())
    world.task("join", after=("left", "right"), command=["make"])
    world.task("free", command=["make"])
    world.working("other", server="two", command=["make"])
    world.fail("other")
    _close()
    return folder, world


@pytest.fixture
def again(prepared, tmp_path):
    """A copy of it, open; gives the world and a function that closes and opens it anew."""
    folder, world = prepared

    def reopen(fresh: bool = True):
        if fresh:
            for name in ("hub.db", "hub.db-wal", "hub.db-shm", "secret", "logs.db"):
                (tmp_path / name).unlink(missing_ok=True)
                if (folder / name).exists():
                    shutil.copy(folder / name, tmp_path / name)
        open_at(tmp_path)
        for name in ("one", "two"):
            world.online(name)
        return world

    yield reopen
    if not models.db.obj.is_closed():
        _close()


def do(world, deed: str) -> None:
    """The deed whose statements go wrong."""
    by = world.key("one")
    if deed == "complete":
        tasks.complete(by, world.ids["up"], RESULT, 1)
    elif deed == "fail":
        tasks.fail(by, world.ids["up"], "it broke", 1)
    elif deed == "assign":
        world.assign("free")
    elif deed == "retry":
        world.retry("other")
    elif deed == "cancel":
        world.cancel("up", downstream=True)
    else:
        inbox.add_note(auth.HUB, world.ids["up"], "mind the gap")


def statements(again, deed: str) -> int:
    """How many statements the deed takes."""
    world = again()
    counting = models.db.obj.writer = Failing(models.db.obj.writer, 0, fails)
    do(world, deed)
    models.db.obj.writer = counting._connection
    _close()
    return counting.count


def state_of(world) -> list[tuple]:
    """What is in every table that the deed may touch."""
    found = []
    for table in ("task", "event", "command", "session", "contract", "dependency", "attempt"):
        found += [(table, *row.values()) for row in models.rows(f"SELECT * FROM {table}")]
    return [row for row in found if row[0] != "event" or "server_online" not in row]


def finish(world) -> None:
    """The worker says again that it is done, and all that follows is worked off."""
    if world.status("up") in ("running", "done"):
        tasks.complete(world.key("one"), world.ids["up"], RESULT, 1)
    for name in ("left", "right", "join"):
        row = world.row(name)
        assert row["status"] == "assigned", name
        assert models.loads(row["resolved_inputs"], {}) == (
            {} if name == "join" else {"api": {"paths": ["/x"]}}
        )
        world.start(name)
        world.complete(name, {"summary": name})
    check_invariants()
    for name in ("up", "left", "right", "join"):
        types = world.types(name)
        assert types.count("task_completed") == types.count("task_started") == 1
        assert types.count("task_unblocked") <= 1
    joined = models.one("SELECT COUNT(*) AS n FROM session WHERE task_id = ?", (world.ids["join"],))
    assert joined["n"] == 1


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.fault("F24 each statement fails once in turn")
def test_a_statement_that_fails_undoes_the_deed(again, deed, case):
    count = statements(again, deed)
    assert count > 3
    for number in range(1, count + 1):
        world = again()
        before = state_of(world)
        heard = models.bus.subscribe("events")
        failing = models.db.obj.writer = Failing(models.db.obj.writer, number, fails)
        with pytest.raises((sqlite3.OperationalError, Refused)):
            do(world, deed)
        models.db.obj.writer = failing._connection
        assert state_of(world) == before, number
        assert heard.get(0) is None, "something was announced that is not stored"
        heard.close()
        check_invariants()
        if deed == "complete":
            finish(world)
        else:
            do(world, deed)  # said again it is done
            check_invariants()
        _close()
    case.kills, case.seen = count, "undone each time, done when it was said again"


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.fault("F1 hub killed after each statement in turn")
def test_a_hub_killed_after_a_statement_has_done_all_or_nothing(again, deed, tmp_path, case):
    count = statements(again, deed)
    done = 0
    for number in range(1, count + 1):
        world = again()
        before = len(world.events())
        _close()
        if (child := os.fork()) == 0:
            die_in(tmp_path, world, deed, number)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        world = again(fresh=False)
        check_invariants()
        new = [e["type"] for e in world.events()[before:] if not e["type"].startswith("server_")]
        done += bool(new)
        if deed == "complete":
            assert not new or {"task_completed", "contract_fulfilled", "task_unblocked"} < {*new}
            finish(world)
        elif not new:
            do(world, deed)
            check_invariants()
        _close()
    assert done == 1, "only the last statement, the commit, makes it so"
    case.kills, case.seen = count, f"nothing of it {count - 1} times, all of it after the commit"


def die_in(folder, world, deed: str, number: int) -> None:
    """In a process of its own: do the deed and be killed after that statement."""
    try:
        open_at(folder)
        models.db.obj.writer = Failing(models.db.obj.writer, number, dies)
        do(world, deed)
    except BaseException as error:
        print(f"not killed: {error!r}", file=sys.stderr)
    os._exit(1)
