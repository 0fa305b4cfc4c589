"""Work whose server, session or time is gone: tried again or left to a person, never both; and
what clocks that are set have to do with it."""

import contextlib
import errno
import time

import pytest

import alerts
import auth
import inbox
import leases
import models
import servers
import tasks
import wire
from auth import HUB
from cascade import IllegalMove
from conftest import due
from models import Unauthorised


def waiting(world) -> list[tuple[str, str]]:
    """(kind, sentence) of the open alerts."""
    return [(a["kind"], a["sentence"]) for a in alerts.waiting([world.project("shop")["id"]])]


def lose_session(world, name: str) -> None:
    """The agent comes back and has no sessions any more, as after a reboot."""
    caller = world.key(world.on(name))
    wire.sync(caller, {"instance": "after the reboot", "sessions": []})


@pytest.fixture
def running(world):
    """A task in a session that has begun."""
    world.server("dev")
    world.working("A", command=["make"], on_lost="ask")
    started(world, "A")
    return world


def started(world, name: str, **more) -> None:
    frame = {"type": "session_started", "session_id": world.row(name)["session_id"], "pid": 7}
    wire.take_report(world.key(world.on(name)), frame | more)


# ── lost: tried again or asked ────────────────────────────────────────────────────────────────


def test_a_lost_session_of_a_task_that_asks_is_left_to_a_person(running):
    world = running
    world.server("other")
    lose_session(world, "A")
    assert (world.status("A"), world.row("A")["attempt"]) == ("running", 1)
    [(kind, sentence)] = waiting(world)
    assert kind == "lost"
    assert sentence == (
        "A: its session is gone: the agent does not have it any more. Retry the task, cancel it, or"
        " wait for it to come back."
    )
    world.check()


def test_retry_gives_what_was_lost_to_another_and_the_alert_ends(running):
    world = running
    world.server("other")
    lose_session(world, "A")
    world.retry("A")
    assert world.row("A")["attempt"] == 2
    leases.end_alerts()
    assert waiting(world) == []
    [released] = world.events("A", "task_released")
    assert released["details"]["why"] == "its session is lost"
    world.check()


def test_the_inbox_offers_to_try_what_was_lost_again(running, client):
    """And shows an alert on a server, which is about no task."""
    world = running
    lose_session(world, "A")
    servers.heartbeat(world.key("dev"), {"trouble": "it cannot write"})
    user = models.one("SELECT id FROM user WHERE username = 'admin'")
    with models.transaction():
        client.flask.set_cookie("orchestratia", auth.issue(user["id"], "web"))
    page = client.flask.get("/inbox").text
    assert f'action="/tasks/{world.ids["A"]}/retry"' in page and "Try again" in page
    assert "Server or session gone" in page
    assert "Server in trouble" in page and "Server dev: it cannot write." in page


def test_cancelling_what_was_lost_ends_the_alert(running):
    lose_session(running, "A")
    running.cancel("A")
    leases.end_alerts()
    assert waiting(running) == []
    running.check()


def test_what_is_not_lost_cannot_be_retried(running):
    with pytest.raises(IllegalMove):
        running.retry("A")
    assert running.row("A")["attempt"] == 1


def test_a_server_that_is_away_is_reason_enough_to_retry(running):
    running.server("other")
    running.offline("dev")
    running.retry("A")
    assert (running.on("A"), running.row("A")["attempt"]) == ("other", 2)


def test_a_lost_session_that_turns_up_ends_the_alert(running):
    lose_session(running, "A")
    session_id = running.row("A")["session_id"]
    frame = {"instance": "again", "sessions": [{"session_id": session_id, "alive": True}]}
    wire.sync(running.key("dev"), frame)
    leases.end_alerts()
    assert waiting(running) == []
    assert running.status("A") == "running"


def test_an_alert_on_a_loss_that_was_dismissed_does_not_come_again(running):
    running.offline("dev")
    far = time.time() + 1000
    assert leases.release_lost(far, 900) == 0
    [alert] = alerts.waiting([running.project("shop")["id"]])
    alerts.dismiss(HUB, alert["id"])
    assert leases.release_lost(far, 900) == 0
    assert waiting(running) == []


def test_a_terminal_that_is_gone_asks_too(running):
    frame = {"type": "session_closed", "session_id": running.row("A")["session_id"], "log_end": 0}
    wire.take_report(running.key("dev"), frame | {"exit_code": None})
    assert running.status("A") == "running"
    [(kind, sentence)] = waiting(running)
    assert kind == "lost" and "its terminal on dev is gone" in sentence


# ── resumed ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def talking(world):
    """A coding agent works on a task, and said which conversation it has."""
    world.server("dev")
    world.server("alone")
    with models.transaction():
        models.Server.update(profiles={"claude": "2"}).execute()
    world.offline("alone")
    world.working("A", profile="claude")
    started(world, "A", conversation="c-1", working_directory="/srv/shop")
    world.online("alone")
    return world


def started_again(world) -> dict:
    """The command that starts the present attempt."""
    session_id = world.row("A")["session_id"]
    [command] = [c for c in world.commands(world.on("A")) if c["session_id"] == session_id]
    return wire.COMPOSE[command["type"]](command)["start"]


def test_a_conversation_is_taken_up_where_it_lies(talking):
    world = talking
    lose_session(world, "A")
    assert (world.on("A"), world.row("A")["attempt"]) == ("dev", 2)
    start = started_again(world)
    assert (start["resume"], start["working_directory"]) == ("c-1", "/srv/shop")
    assert "this is attempt\n2, and the conversation is the one you had" in start["prompt"]
    assert "orchestratia task complete" in start["prompt"]
    [given] = [e for e in world.events("A") if e["type"].endswith("assigned")][1:]
    assert given["details"]["resumes"].startswith("claude-")
    world.check()


def test_a_conversation_whose_server_stays_away_begins_anew_elsewhere(talking):
    world = talking
    world.offline("dev")
    assert leases.release_lost(time.time() + 1000, 900) == 1
    assert world.on("A") == "alone"
    start = started_again(world)
    assert start["resume"] is None
    assert "was lost" not in start["prompt"]


def test_a_worker_that_failed_does_not_go_on_with_its_conversation(talking):
    world = talking
    world.fail("A")
    world.retry("A")
    assert started_again(world)["resume"] is None


# ── nobody takes it ───────────────────────────────────────────────────────────────────────────


def test_what_no_server_takes_is_one_alert_for_all_that_ask_for_the_same(world):
    world.server("dev")
    for name in ("A", "B", "C"):
        world.task(name, requirements={"languages": ["rust"], "repo": "core"}, auto_assign=True)
    now = time.time()
    assert due(now + 3599) == 0
    assert due(now + 3601) == 3
    [(kind, sentence)] = waiting(world)
    assert kind == "queue"
    assert sentence == (
        "No server has taken this for 60 min: A and 2 more. It asks for languages rust; repo core;"
        " `task explain` says why nobody fits."
    )
    assert due(now + 9000) == 0
    world.check()


def test_a_task_has_a_queue_timeout_of_its_own(world):
    world.task("A", auto_assign=True, queue_timeout=10)
    now = time.time()
    assert due(now + 9) == 0
    assert due(now + 11) == 1
    [(_, sentence)] = waiting(world)
    assert "It asks for any server with a free slot" in sentence


def test_the_alert_ends_when_somebody_takes_it(world):
    world.task("A", auto_assign=True, queue_timeout=10)
    due(time.time() + 11)
    leases.end_alerts()
    assert len(waiting(world)) == 1
    world.server("dev")
    assert world.status("A") == "assigned"
    leases.end_alerts()
    assert waiting(world) == []


def test_a_server_by_name_is_named(world):
    world.server("dev")
    world.offline("dev")
    world.task("A", queue_timeout=10)
    world.assign("A", server="dev")
    due(time.time() + 11)
    [(_, sentence)] = waiting(world)
    assert "It asks for server dev;" in sentence


def test_a_dismissed_alert_comes_again_for_another_wait_only(world):
    world.task("A", auto_assign=True, queue_timeout=10)
    due(time.time() + 11)
    [alert] = alerts.waiting([world.project("shop")["id"]])
    alerts.dismiss(HUB, alert["id"])
    world.update("A", spec="more words")  # looks for a server anew, and waits on
    due(time.time() + 20)
    assert waiting(world) == []


def test_what_waits_has_no_start_to_miss(world):
    world.task("A", auto_assign=True, queue_timeout=10, start_timeout=1, timeout=1)
    assert tasks.time_out(time.time() + 1000) == 0
    assert world.status("A") == "pending"


# ── the clock ─────────────────────────────────────────────────────────────────────────────────


class Wall:
    """The wall clock of this process, set at will; the steady clock goes on as it does."""

    def __init__(self, monkeypatch):
        self.by = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.by)


@pytest.fixture
def wall(monkeypatch, db):
    models.clock.translate = leases.translate
    models.clock.begin(time.time())
    yield Wall(monkeypatch)
    models.clock.translate = None
    models.clock.begin(0.0)


HOUR = 3600.0


@pytest.mark.parametrize("by", [HOUR, -HOUR, 30 * HOUR])
def test_a_clock_that_is_set_lets_nothing_run_out_early_or_late(world, wall, by):
    world.server("dev")
    world.task("A", command=["true"], start_timeout=30)
    world.assign("A", server="dev")
    world.server("away", slots=2)
    world.working("B", server="away", command=["true"], timeout=500)
    world.offline("away")
    world.task("C", auto_assign=True, queue_timeout=60, requirements={"repo": "none"})
    world.working("D", server="dev", max_attempts=2, retry_delay_s=40)
    world.fail("D")
    wall.by = by
    with models.transaction():
        pass  # whatever is done first
    assert due(time.time() + 20) == 0
    assert leases.release_lost(time.time() + 20, 90) == 0
    assert tasks.time_out(time.time() + 45) == 1  # A did not start
    assert tasks.due_again(time.time() + 41) == 2  # nor did D's delay run out before
    assert world.row("A")["attempt"] == 2 and world.status("D") == "assigned"
    assert leases.release_lost(time.time() + 100, 90) == 1
    assert world.row("B")["attempt"] == 2
    assert due(time.time() + 70) > 0
    assert "queue" in {kind for kind, _ in waiting(world)}
    [said] = world.events(None, "clock_set")
    assert said["details"]["by_s"] == pytest.approx(by, abs=1)
    world.check()


def test_nobody_is_offline_because_the_clock_was_set(world, wall):
    world.server("dev")
    wall.by = HOUR
    assert servers.notice_silence(90) == []
    wall.by = -HOUR
    assert servers.notice_silence(90) == []


def test_a_clock_that_is_steered_is_not_set(world, wall):
    for by in (0.5, 1.5, 2.5, 3.0):
        wall.by = by
        with models.transaction():
            pass
    assert world.events(None, "clock_set") == []


def test_what_moves_along_moves_with_what_was_done_or_not_at_all(world, wall):
    world.task("A", auto_assign=True, queue_timeout=60)
    before = world.row("A")["deadline_at"]
    wall.by = HOUR
    with pytest.raises(RuntimeError), models.transaction():
        raise RuntimeError
    assert world.row("A")["deadline_at"] == before
    with models.transaction():
        pass
    assert world.row("A")["deadline_at"] == pytest.approx(before + HOUR, abs=1)
    assert len(world.events(None, "clock_set")) == 1


def test_a_token_that_has_expired_stays_so_when_the_clock_goes_back(world, wall):
    person = world.user("olga", shop="viewer")
    token = world.token(person.id)
    assert auth.by_token(token).name == "olga"
    wall.by = 400 * 24 * HOUR
    with pytest.raises(Unauthorised):
        auth.by_token(token)
    wall.by = 0.0
    with pytest.raises(Unauthorised):
        auth.by_token(token)


def test_it_stays_expired_after_a_restart_too(world, wall, tmp_path):
    token = world.token(world.user("olga", shop="viewer").id)
    wall.by = 400 * 24 * HOUR
    world.task("A")  # an event that is stored
    wall.by = 0.0
    models.close_db()
    models.open_db(tmp_path / "hub.db")
    with pytest.raises(Unauthorised):
        auth.by_token(token)


# ── the hub was away itself ───────────────────────────────────────────────────────────────────


def test_after_a_start_the_hub_listens_before_it_gives_anything_up(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listening = leases.Listening()
    listening.begin(90)
    for now[0] in (1000.0, 1044.0, 1089.0):
        assert listening
    now[0] = 1091.0
    assert not listening


def test_after_a_sleep_of_its_own_too(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listening = leases.Listening()
    listening.begin(10)
    for now[0] in range(1000, 1020):
        bool(listening)
    assert not listening
    now[0] += 100  # stopped, and continued
    assert listening
    for _ in range(11):
        now[0] += 1
        bool(listening)
    assert not listening


SMALL = ("server", "project", "(subquery-1)")


def test_what_the_jobs_ask_is_answered_by_an_index(running, monkeypatch):
    """None of it looks through tasks, alerts or sessions: their history grows."""
    world, asked = running, []

    def noting(function):
        return lambda sql, values=(): (asked.append((sql, values)), function(sql, values))[1]

    for name in ("execute", "one", "rows"):
        monkeypatch.setattr(leases, name, noting(getattr(leases, name)))
    world.task("B", auto_assign=True, requirements={"repo": "none"}, queue_timeout=1)
    world.offline("dev")
    far = time.time() + 10_000
    leases.release_lost(far, 900)
    assert leases.notice_unplaced(far) == 1
    leases.end_alerts()
    with models.transaction() as tx:
        leases.translate(tx, 5.0)
    assert len(asked) > 10
    for sql, values in asked:
        plan = [row[3] for row in models.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        scans = [step for step in plan if step.startswith("SCAN") and "INDEX" not in step]
        assert not [step for step in scans if step.split()[1] not in SMALL], sql


def test_who_signs_in_while_the_clock_is_ahead_locks_nobody_out(world, wall):
    """What has expired stays expired; what is made afterwards has its time all the same."""
    person = world.user("olga", shop="viewer")
    wall.by = 400 * 24 * HOUR
    assert auth.by_token(world.token(person.id)).name == "olga"
    wall.by = 0.0
    assert auth.by_token(world.token(person.id)).name == "olga"
    made = auth.registration_token(HUB, world.project("shop")["id"], "http://hub")
    body = {"registration_token": made["token"], "name": "late"}
    assert servers.register(body, "127.0.0.1")["name"] == "late"


def again(stored: dict | None) -> None:
    """The hub starts anew."""
    models.clock.begin(time.time(), stored)
    with models.transaction():
        pass


def test_a_clock_that_is_set_while_the_hub_is_down_is_noticed_when_it_starts(world, wall):
    world.server("dev")
    world.working("A", server="dev", command=["true"], timeout=500)
    stored = models.loads(models.one("SELECT value FROM meta WHERE key = 'clock'")["value"])
    wall.by = 2 * HOUR
    again(stored)
    assert tasks.time_out(time.time() + 450) == 0
    assert tasks.time_out(time.time() + 550) == 1
    [said] = world.events(None, "clock_set")
    assert said["details"]["by_s"] == pytest.approx(2 * HOUR, abs=1)
    again(models.loads(models.one("SELECT value FROM meta WHERE key = 'clock'")["value"]))
    assert len(world.events(None, "clock_set")) == 1


@pytest.mark.parametrize("by", [2 * HOUR, -2 * HOUR])
def test_a_clock_that_was_wrong_when_the_machine_started_moves_what_it_has_stamped(
    world, wall, monkeypatch, by
):
    world.server("dev")
    world.working("before", server="dev", command=["true"], timeout=500)
    wall.by = by  # another start of the machine, whose clock is off until it is told the time
    monkeypatch.setattr(models, "BOOTED_S", time.monotonic() + HOUR)
    again({"boot": "another", "offset": 0.0})
    world.working("since", server="dev", command=["true"], timeout=500)
    wall.by = 0.0
    with models.transaction():
        pass
    assert world.row("since")["deadline_at"] == pytest.approx(time.time() + 500, abs=5)
    assert world.row("before")["deadline_at"] == pytest.approx(time.time() + 500, abs=5)


def test_a_clock_that_is_set_long_after_the_machine_started_moves_all(world, wall, monkeypatch):
    world.server("dev")
    world.working("before", server="dev", command=["true"], timeout=500)
    monkeypatch.setattr(models, "BOOTED_S", 0.0)
    again({"boot": "another", "offset": 0.0})
    wall.by = HOUR
    with models.transaction():
        pass
    assert world.row("before")["deadline_at"] == pytest.approx(time.time() + 500, abs=5)


def test_an_answer_that_is_kept_for_a_call_is_typed_when_its_time_is_up_by_any_clock(world, wall):
    world.server("dev")
    world.working("A", server="dev", command=["true"])
    started(world, "A")
    worker = auth.by_key(auth.session_key(world.row("A")["session_id"]))
    asked, _ = inbox.ask(worker, world.ids["A"], "Which?", claim="c")
    inbox.answer(HUB, asked["id"], "this")
    assert models.one("SELECT delivery FROM intervention")["delivery"] == "held"
    wall.by = -HOUR
    with models.transaction():
        pass
    assert inbox.send_unclaimed(time.time() + inbox.CLAIM_S + 5) == 1


# ── what was dismissed, and what cannot be stored just then ───────────────────────────────────


def test_a_loss_that_was_dismissed_is_not_said_again_but_the_next_one_is(running):
    world = running
    world.offline("dev")
    leases.release_lost(time.time() + 100, 90)
    [alert] = alerts.waiting([world.project("shop")["id"]])
    alerts.dismiss(HUB, alert["id"])
    leases.release_lost(time.time() + 100, 90)
    assert waiting(world) == []
    world.online("dev")
    lose_session(world, "A")
    assert [kind for kind, _ in waiting(world)] == ["lost"]
    assert world.row("A")["attempt"] == 1


def test_an_alert_that_was_dismissed_meanwhile_is_not_said_to_have_ended(running):
    lose_session(running, "A")
    [stale] = models.rows("SELECT * FROM alert WHERE status = 'open'")
    alerts.dismiss(HUB, stale["id"])
    with models.transaction() as tx:
        alerts.end(tx, stale)
    assert models.one("SELECT status FROM alert")["status"] == "dismissed"
    [said] = running.events("A", "alert_ended")
    assert said["details"]["status"] == "dismissed"


def test_of_very_many_alerts_each_is_looked_at(world, monkeypatch):
    monkeypatch.setattr(leases, "AT_ONCE", 2)
    world.server("dev", slots=10)
    for n in range(7):
        world.working(f"t{n}", server="dev", command=["true"], on_lost="ask")
        started(world, f"t{n}")
    lose_session(world, "t0")
    assert len(waiting(world)) == 7
    world.cancel("t6")
    for _ in range(4):
        leases.end_alerts()
    assert len(waiting(world)) == 6


def test_a_plan_that_is_never_made_is_an_alert(world):
    world.server("dev")
    world.task("A", command=["make"])
    world.assign("A", server="dev", require_plan=True)
    assert world.status("A") == "planning"
    inbox.notice_stuck(time.time() + 3600, 1800)
    assert [kind for kind, _ in waiting(world)] == ["stuck"]


class Full:
    """The write connection of a hub whose disk is full."""

    def __init__(self, connection):
        self._connection = connection

    def execute(self, sql, *args):
        if sql == "COMMIT":
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._connection.execute(sql, *args)

    def __getattr__(self, name):
        return getattr(self._connection, name)


@contextlib.contextmanager
def full_disk():
    models.db.obj.writer = full = Full(models.db.obj.writer)
    try:
        yield
    finally:
        models.db.obj.writer = full._connection


def test_a_server_that_falls_silent_while_the_disk_is_full_is_offline_when_it_is_not(world):
    world.server("dev")
    world.server("other")
    with servers._life._lock:
        servers._life._heard = {k: (h - 1000, w) for k, (h, w) in servers._life._heard.items()}
    servers._life._ticked = time.monotonic()
    with full_disk():
        assert servers.notice_silence(500) == []
    assert world.server_row("dev")["online"] == 1
    told = []
    assert sorted(servers.notice_silence(500, told.append)) == sorted(told)
    assert len(told) == 2 and world.server_row("dev")["online"] == 0
    world.online("dev")
    assert world.server_row("dev")["online"] == 1


def test_trouble_that_could_not_be_noted_is_noted_with_the_next_sign_of_life(running):
    caller, trouble = running.key("dev"), {"trouble": "it cannot write"}
    with full_disk(), pytest.raises(models.NoRoom):
        servers.heartbeat(caller, trouble)
    assert waiting(running) == []
    servers.heartbeat(caller, trouble)
    assert waiting(running) == [("server", "Server dev: it cannot write.")]
    with full_disk(), pytest.raises(models.NoRoom):
        servers.heartbeat(caller, {"trouble": ""})
    servers.heartbeat(caller, {"trouble": ""})
    assert waiting(running) == []
