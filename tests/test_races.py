"""Two at once: real threads, and another process at the database."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import auth
import models
import moves
import servers
import sessions
import tasks
import wire
from auth import HUB
from faulting import LONG, N
from models import Busy, Conflict, Refused, Unauthorised, transaction

DIAMONDS = 1000
pytestmark = pytest.mark.timeout(180 if not LONG else 3600)


class Pair:
    """Two threads that do their deeds at the same moment, again and again."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(2)
        self.barrier = threading.Barrier(2)

    def both(self, *deeds):
        done = [self.pool.submit(self._at_once, deed) for deed in deeds]
        return [d.result(30) for d in done]

    def _at_once(self, deed):
        self.barrier.wait(10)
        try:
            return deed()
        except Refused as refused:
            return refused


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.pool.shutdown()


@pytest.mark.fault("F27 the last two upstreams end at once")
def test_two_workers_end_the_last_two_upstreams_at_once_a_thousand_times(world, pair, case):
    world.server("dev", slots=10_000)
    shop = world.project("shop")
    ends = []
    for part in range(0, DIAMONDS, 100):
        items = []
        for n in range(part, part + 100):
            items += [
                {"id": f"l{n}", "title": f"l{n}", "auto_assign": True},
                {"id": f"r{n}", "title": f"r{n}", "auto_assign": True},
                {
                    "id": f"e{n}",
                    "title": f"e{n}",
                    "depends_on": [f"l{n}", {"task": f"r{n}", "key": "k"}],
                },
            ]
        ids = models.loads(tasks.create_pipeline(HUB, shop, f"p{part}", items)["id_map"])
        for n in range(part, part + 100):
            pair.both(
                lambda left=ids[f"l{n}"]: tasks.complete(HUB, left, None),
                lambda right=ids[f"r{n}"]: tasks.complete(HUB, right, {"contracts": {"k": 1}}),
            )
            ends.append(ids[f"e{n}"])
    found = [moves.row(end) for end in ends]
    assert {(t["status"], t["attempt"], t["open_deps"]) for t in found} == {("assigned", 1, 0)}
    assert {t["resolved_inputs"] for t in found} == {'{"k":1}'}
    given = models.execute(
        "SELECT COUNT(*), COUNT(DISTINCT task_id) FROM event WHERE type = 'task_auto_assigned'"
    ).fetchone()
    assert given == (3 * DIAMONDS, 3 * DIAMONDS)
    unblocked = models.one("SELECT COUNT(*) AS n FROM event WHERE type = 'task_unblocked'")
    assert unblocked["n"] == DIAMONDS
    world.check()
    case.count("tasks", 3 * DIAMONDS, 3 * DIAMONDS - given[1])
    case.kills, case.seen = DIAMONDS, "each downstream started once"


def at_once(count: int, deed) -> list:
    """What `deed(n)` gave or raised in `count` threads that start together."""
    barrier = threading.Barrier(count)

    def run(n):
        barrier.wait(10)
        try:
            return deed(n)
        except Refused as refused:
            return refused

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_fifty_equal_completions_at_once_are_one_transition(world):
    world.server("dev")
    world.working("A")
    world.task("B", after=["A"])
    before = world.now()
    answers = at_once(50, lambda _: world.complete("A", {"summary": "x"}, attempt=1))
    assert all(a == answers[0] for a in answers)
    assert world.said(before) == [
        ("task_completed", "A"),
        ("dependency_resolved", "B"),
        ("task_unblocked", "B"),
        ("task_auto_assigned", "B"),
    ]
    world.check()


def test_of_contradicting_ends_the_first_one_stands(world):
    world.server("dev")
    world.working("A")
    answers = at_once(
        20, lambda n: world.complete("A", n) if n % 2 else world.fail("A", f"error {n}")
    )
    won = [a for a in answers if not isinstance(a, Refused)]
    assert len(won) == 1
    assert {a.code for a in answers if isinstance(a, Conflict)} == {"late"}
    ends = [k for k in world.types("A") if k in ("task_completed", "task_failed")]
    assert len(ends) == 1
    assert world.types("A").count("late_report") == 19
    world.check()


def test_the_last_slot_is_given_once(world):
    world.server("dev", slots=1)
    for n in range(20):
        world.task(f"t{n}")
    at_once(20, lambda n: world.assign(f"t{n}"))
    states = [world.status(f"t{n}") for n in range(20)]
    assert sorted(states) == ["assigned"] + ["pending"] * 19
    assert world.busy("dev") == 1
    world.check()


def test_a_task_assigned_by_many_at_once_is_given_once(world):
    world.server("dev")
    world.task("A")
    answers = at_once(20, lambda _: _assigned(world))
    assert sum(answers) == 1
    assert world.types("A").count("task_auto_assigned") == 1
    world.check()


def _assigned(world) -> bool:
    from cascade import IllegalMove

    try:
        world.assign("A")
    except IllegalMove:
        return False
    return True


def test_a_registration_token_is_won_by_one(world):
    token = auth.registration_token(HUB, world.project("shop")["id"], "http://hub")["token"]
    answers = at_once(
        50,
        lambda n: servers.register({"registration_token": token, "name": f"s{n}"}, "127.0.0.1"),
    )
    won = [a for a in answers if isinstance(a, dict)]
    lost = [a for a in answers if isinstance(a, Unauthorised)]
    assert (len(won), len(lost)) == (1, 49)
    assert {refused.code for refused in lost} == {"token_used"}
    assert models.one("SELECT COUNT(*) AS n FROM server")["n"] == 1


@pytest.mark.fault("F26 two halves of a cycle at once")
def test_a_cycle_cannot_be_made_by_two_halves_at_once(world, pair, case):
    for n in range(5 * N):
        a, b = world.task(f"a{n}")["id"], world.task(f"b{n}")["id"]

        def half(one, other):
            from cascade import Cycle

            try:
                tasks.add_dependency(HUB, one, other, "blocks", None)
            except Cycle:
                return "cycle"
            return "made"

        done = pair.both(lambda a=a, b=b: half(a, b), lambda a=a, b=b: half(b, a))
        assert sorted(done) == ["cycle", "made"]
        case.kills += 1
    case.seen = "one is made, the other refused"


@pytest.mark.fault("F26 a dependency is added while its upstream ends")
def test_a_dependency_added_while_its_upstream_ends_is_counted_once(world, pair, case):
    world.server("dev", slots=5000)
    for n in range(10 * N):
        world.working(f"a{n}")
        world.task(f"b{n}")
        pair.both(lambda n=n: world.complete(f"a{n}"), lambda n=n: world.depend(f"b{n}", f"a{n}"))
        row = world.row(f"b{n}")
        [link] = world.json(f"b{n}")["dependencies"]
        assert (row["open_deps"], link["resolved"]) == (0, True)
        case.kills += 1
    world.check()
    case.seen = "counted once each time"


def test_a_spooled_frame_that_arrives_twice_at_once_is_handled_once(world):
    world.server("dev")
    caller = world.key("dev")
    wire.greet(caller, {"spool_id": "s", "spool_first": 1})
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    frames = [
        {"type": "session_gap", "spool": n, "session_id": session["id"], "from": n}
        for n in range(1, 21)
    ]
    before = world.now()
    answers = at_once(8, lambda n: wire.take_spooled(caller, frames[: 20 - 2 * n]))
    assert answers[0] == 20
    assert [e["details"]["from"] for e in world.events(after=before)] == list(range(1, 21))
    assert world.server_row("dev")["spool_upto"] == 20


def test_a_session_that_is_closed_while_it_is_taken_for_recovered_stays_closed(world):
    """Whoever acts on a row that was read before somebody else moved it changes nothing."""
    world.server("dev")
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    caller = world.key("dev")
    frame = {"session_id": session["id"]}
    wire.take_report(caller, frame | {"type": "session_started", "pid": 7})
    with transaction() as tx:
        sessions.disconnect(tx, caller.server_id)
    wire.sync(caller, {"instance": "anew", "sessions": [frame | {"alive": True}]})
    stale = models.one("SELECT * FROM session")
    assert stale["state"] == "recovering"
    wire.take_report(caller, frame | {"type": "session_closed", "exit_code": 0})
    with transaction() as tx:
        after = sessions.move(tx, stale, "settle", HUB.actor)
    assert after["state"] == models.one("SELECT state FROM session")["state"] == "closed"
    assert sessions.settle_recovering(stale["state_at"] + 1000) == 0
    assert world.types(None)[-1] == "session_closed"


def test_a_server_heard_while_it_is_called_silent_stays_online(world):
    """Whatever the order of the two, a server that gives signs of life ends up online."""
    world.server("dev")
    server_id = world.servers["dev"]
    for _ in range(200):
        with servers._life._lock:
            servers._life._heard[server_id] = (servers._life._ticked - 1000, 0.0)
        at_once(2, lambda n: servers.alive(server_id) if n else servers.notice_silence(500))
        servers.alive(server_id)
        assert world.server_row("dev")["online"] == 1


# ── transactions ──────────────────────────────────────────────────────────────────────────────


def test_a_listener_that_raises_never_undoes_the_deed(world, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("the listener is broken")

    monkeypatch.setattr(models.bus, "publish", broken)
    with models.bus.subscribe("events"):
        world.task("A")
    assert world.status("A") == "pending"
    assert "publishing failed" in caplog.text


def test_events_are_published_after_the_commit_with_their_ids(world):
    seen = []
    with models.bus.subscribe("events") as events:
        world.task("A")
        seen = events.drain()
    [event] = seen
    assert event["type"] == "task_created"
    assert (event["id"], event["prev"]) == (world.now(), world.now() - 1)
    assert event == world.events("A")[0]


def test_nothing_of_a_failed_transaction_is_published_or_stored(world):
    before = world.now()
    with models.bus.subscribe("events", "topic") as listening:
        with pytest.raises(RuntimeError), transaction() as tx:
            tx.emit("task_updated", None, "somebody")
            tx.tell("topic")
            models.execute("UPDATE project SET name = 'gone'")
            raise RuntimeError
        assert listening.drain() == []
    assert world.now() == before
    assert models.one("SELECT name FROM project")["name"] == "shop"


def test_an_inner_block_that_fails_takes_its_events_with_it(world):
    with models.bus.subscribe("events", "topic") as listening:
        with transaction() as tx:
            tx.emit("first", None, "x")
            with pytest.raises(RuntimeError), transaction() as inner:
                inner.emit("second", None, "x")
                inner.tell("topic")
                models.execute("UPDATE project SET name = 'gone'")
                raise RuntimeError
            with transaction() as inner:
                inner.emit("third", None, "x")
        assert [e["type"] for e in listening.drain()] == ["first", "third"]
    assert models.one("SELECT name FROM project")["name"] == "shop"
    world.check()


def test_a_database_held_by_another_process_is_refused_as_busy(world, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "LOCK_PATIENCE_S", 0.05)
    other = sqlite3.connect(tmp_path / "hub.db", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy) as refused:
            world.task("A")
        assert refused.value.status == 503
        assert models.rows("SELECT * FROM task") == []  # reading goes on meanwhile
        other.execute("COMMIT")
    finally:
        other.close()
    world.task("A")
    world.check()


def test_a_hub_opens_its_database_although_somebody_looks_into_it_just_then(tmp_path):
    """As whoever reads it first after the hub was killed, and makes it whole again by that."""
    path = tmp_path / "held.db"
    models.HubDatabase(str(path)).close()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    letting_go = threading.Timer(0.5, other.close)
    letting_go.start()
    opened = models.HubDatabase(str(path))
    letting_go.join()
    assert opened.writer.execute("PRAGMA busy_timeout").fetchone() == (0,)
    opened.close()


def test_a_server_heard_while_the_database_is_busy_comes_online_later(world, tmp_path, monkeypatch):
    world.server("dev", online=False)
    monkeypatch.setattr(models, "LOCK_PATIENCE_S", 0.05)
    other = sqlite3.connect(tmp_path / "hub.db", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy):
            world.online("dev")
        other.execute("COMMIT")
    finally:
        other.close()
    world.online("dev")
    assert world.server_row("dev")["online"] == 1


def test_writers_that_wait_too_long_are_refused_and_nothing_is_left_locked(world, monkeypatch):
    monkeypatch.setattr(models, "LOCK_PATIENCE_S", 0.05)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with transaction():
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    with pytest.raises(Busy):
        world.task("A")
    leave.set()
    holder.join()
    world.task("A")
