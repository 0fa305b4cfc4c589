"""Use cases on tasks, on SQLite: what each writes, in which order, and what it leaves alone."""

import time

import pytest

import auth
import cascade
import inbox
import leases
import models
import moves
import reading
import servers
import sessions
import tasks
import wire
from auth import HUB
from conftest import due
from models import Conflict, Forbidden, Invalid, NotFound

API = {"endpoints": [{"path": "/users", "method": "GET"}], "types": {"User": {"id": "uuid"}}}


# ── the cascade ───────────────────────────────────────────────────────────────────────────────


def test_workflow_3_happens_event_by_event(world):
    """A hands api_schema to B and C; C also waits for B."""
    world.server("dev-backend", repos=["core", "api"], languages=["python"])
    world.server("dev-frontend", repos=["web"])
    world.task("A", target_repo="core")
    world.task("B", inputs={"api_schema": "A"}, target_repo="api")
    world.task("C", inputs={"api_schema": "A"}, after=["B"], target_repo="web")
    assert [world.shown(t) for t in "ABC"] == ["not assigned", "blocked", "blocked"]
    assert world.reason("C") == "waits for B (pending), A (pending)"

    world.assign("A", server="dev-backend")
    world.start("A")
    before = world.now()
    world.complete("A", contracts={"api_schema": {"status": "fulfilled", "data": API}})
    assert world.said(before) == [
        ("task_completed", "A"),
        ("contract_fulfilled", "A"),
        ("dependency_resolved", "B"),
        ("dependency_resolved", "C"),
        ("task_unblocked", "B"),
        ("task_auto_assigned", "B"),
    ]
    assert (world.status("B"), world.on("B")) == ("assigned", "dev-backend")
    assert world.json("B")["resolved_inputs"] == {"api_schema": API}
    assert world.reason("C") == "waits for B (assigned)"

    world.start("B")
    before = world.now()
    world.complete("B")
    assert world.said(before) == [
        ("task_completed", "B"),
        ("dependency_resolved", "C"),
        ("task_unblocked", "C"),
        ("task_auto_assigned", "C"),
    ]
    assert (world.status("C"), world.on("C")) == ("assigned", "dev-frontend")
    assert world.json("C")["resolved_inputs"] == {"api_schema": API}
    world.start("C")
    world.complete("C")
    assert [world.status(t) for t in "ABC"] == ["done"] * 3
    world.check()


def ordering_session(world) -> auth.Caller:
    """A live orchestrator's session on `dev`, as a caller."""
    operator = world.user("olga", shop="operator")
    data = {"server_id": world.servers["dev"], "role": "orchestrator", "name": "orchestra"}
    session, _ = sessions.open_session(operator, data)
    return auth.by_key(auth.session_key(session["id"]))


def test_the_upstreams_timeline_is_the_one_of_workflow_10(world):
    world.server("dev")
    orchestrator = ordering_session(world)
    world.task("A", by=orchestrator)
    world.task("B", inputs={"k": "A"})
    world.assign("A", server="dev")
    world.start("A")
    world.update("A", spec="more", by=orchestrator)
    world.complete("A", contracts={"k": 1})
    told = reading.timeline(HUB, world.ids["A"])
    assert [e["type"] for e in told] == [
        "task_created",
        "task_assigned",
        "task_started",
        "task_updated",
        "task_completed",
        "task_status_update",
        "contract_fulfilled",
        "dependency_resolved",
        "task_unblocked",
        "task_auto_assigned",
    ]
    details = {e["type"]: e["details"] for e in told}
    assert details["task_created"] == {"title": "A", "type": "feature", "priority": "normal"}
    assert details["task_assigned"]["agent"] == "dev"
    assert details["task_started"]["agent"] == "dev"
    assert details["task_completed"]["result"] == {"summary": "A done", "contracts": ["k"]}
    assert details["contract_fulfilled"] == {"key": "k"}
    assert details["dependency_resolved"]["downstream"] == world.ids["B"]
    assert details["task_unblocked"]["task"] == world.ids["B"]
    assert details["task_auto_assigned"]["agent"] == "dev"
    assert details["task_auto_assigned"]["score"] == 105  # A's slot is free again
    actors = {e["type"]: e["actor"] for e in told}
    assert actors["task_created"] == "session:orchestra"
    assert actors["contract_fulfilled"] == actors["task_auto_assigned"] == "hub"


def test_the_session_that_ordered_a_task_is_told_its_end(world):
    world.server("dev")
    orchestrator = ordering_session(world)
    world.task("A", by=orchestrator)
    world.assign("A", server="dev")
    world.complete("A", {"summary": "all green"})
    [command] = [c for c in world.commands("dev") if c["type"] == "task_status_update"]
    assert command["session_id"] == orchestrator.session_id
    assert models.loads(command["body"]) == {
        "status": "done",
        "summary": "all green",
        "title": "A",
    }


def test_a_session_that_has_ended_is_not_told(world):
    world.server("dev")
    orchestrator = ordering_session(world)
    world.task("A", by=orchestrator)
    with models.transaction() as tx:
        row = sessions.get_session(HUB, orchestrator.session_id)
        sessions.move(tx, row, "close", "hub", closed_at=tx.now)
    world.assign("A", server="dev")
    world.complete("A")
    assert "task_status_update" not in world.types("A")


def test_a_foreign_session_cannot_be_named_as_the_one_that_ordered(world):
    world.server("dev", project="other")
    world.server("own")
    other = world.user("ann", other="operator")
    session, _ = sessions.open_session(other, {"server_id": world.servers["dev"]})
    olga = world.user("olga", shop="operator")
    world.task("A", by=olga, session_id=session["id"])
    assert world.row("A")["source_session_id"] is None


def test_related_tasks_wait_for_nothing_and_hand_down_nothing(world):
    world.server("dev")
    world.task("A")
    world.task("B", related=["A"], auto_assign=True)
    assert world.status("B") == "assigned"
    before = world.now()
    world.assign("A", server="dev")
    world.complete("A", contracts={"k": 1})
    assert "dependency_resolved" not in [kind for kind, _ in world.said(before)]
    assert world.json("B")["resolved_inputs"] == {}


def test_a_task_with_many_upstreams_is_freed_by_the_last_one(world):
    world.server("dev", slots=20)
    ups = [f"u{n}" for n in range(6)]
    for up in ups:
        world.task(up, auto_assign=True)
    world.task("end", after=ups[:3], inputs={up: up for up in ups[3:]})
    for up in ups[:-1]:
        world.complete(up, contracts={up: up.upper()})
        assert world.shown("end") == "blocked"
    world.complete(ups[-1], contracts={ups[-1]: {"x": None}})
    assert world.status("end") == "assigned"
    assert world.json("end")["resolved_inputs"] == {"u3": "U3", "u4": "U4", "u5": {"x": None}}
    world.check()


def test_one_completion_frees_a_thousand(world):
    world.server("dev", slots=10)
    world.task("root", auto_assign=True)
    items = [{"id": f"t{n}", "title": f"t{n}"} for n in range(1000)]
    tasks.create_pipeline(HUB, world.project("shop"), "wide", items)
    with models.transaction():
        models.execute(
            "INSERT INTO dependency (task_id, upstream_id, kind)"
            " SELECT id, ?, 'blocks' FROM task WHERE pipeline_id IS NOT NULL",
            (world.ids["root"],),
        )
        models.execute("UPDATE task SET open_deps = 1 WHERE pipeline_id IS NOT NULL")
    world.complete("root")
    states = dict(models.execute("SELECT status, COUNT(*) FROM task GROUP BY status").fetchall())
    assert states == {"done": 1, "assigned": 10, "pending": 990}
    assert world.types().count("task_unblocked") == 1000
    world.check()


# ── who gets it ───────────────────────────────────────────────────────────────────────────────


def test_every_candidates_score_or_reasons_are_stored_with_the_choice(world):
    world.server("dev-backend", repos=["api-gateway"], languages=["rust"])
    world.server("dev-desktop", repos=["desktop-app"], online=False)
    world.server("hub-server", repos=["hub"], languages=["python"])
    world.task("T", target_repo="api-gateway", requirements={"languages": ["rust"]})
    world.assign("T")
    [event] = world.events("T", "task_auto_assigned")
    assert event["details"]["agent"] == "dev-backend"
    assert event["details"]["score"] == 255
    shown = {
        c["server"]: (c["fits"], c["score"], c["reasons"]) for c in event["details"]["candidates"]
    }
    assert shown == {
        "dev-backend": (True, 255, []),
        "dev-desktop": (False, None, ["offline", "no repo api-gateway"]),
        "hub-server": (False, None, ["no repo api-gateway", "no language rust"]),
    }
    told = reading.explain(HUB, world.ids["T"])
    assert told["chosen"] == "dev-backend"
    assert told["candidates"] == event["details"]["candidates"]
    assert "255 points" in told["summary"]


def test_a_server_of_another_project_is_no_candidate(world):
    world.server("foreign", project="other")
    world.task("A", auto_assign=True)
    assert world.reason("A") == "no server is registered in this project"


def test_tasks_go_where_there_is_most_room(world):
    world.server("a", slots=2)
    world.server("b", slots=2)
    for name in "1234":
        world.task(name, auto_assign=True)
    assert [world.on(name) for name in "1234"] == ["a", "b", "a", "b"]
    world.task("5", auto_assign=True)
    assert world.reason("5") == "2 servers fit but are full"
    world.check()


def test_the_queue_is_served_by_priority_and_then_by_age(world):
    world.server("dev", slots=1)
    world.working("first")
    for name, priority in (
        ("low", "low"),
        ("normal 1", "normal"),
        ("critical", "critical"),
        ("normal 2", "normal"),
        ("high", "high"),
    ):
        world.task(name, priority=priority, auto_assign=True)
    order, running = [], "first"
    while running:
        world.complete(running)
        found = models.one("SELECT title FROM task WHERE status = 'assigned'")
        running = found and found["title"]
        order.append(running)
        world.check()
    assert order == ["critical", "high", "normal 1", "normal 2", "low", None]


def test_a_freed_slot_goes_to_the_first_that_fits_there(world):
    world.server("dev", repos=["a"], slots=1)
    world.working("first", target_repo="a")
    world.task("elsewhere", target_repo="b", priority="critical", auto_assign=True)
    world.task("here", target_repo="a", priority="low", auto_assign=True)
    world.complete("first")
    assert (world.status("here"), world.status("elsewhere")) == ("assigned", "pending")
    assert world.reason("elsewhere") == "no server has repo b"


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_a_slot_is_freed_however_the_task_ends(world, end):
    world.server("dev", slots=1)
    world.working("first")
    world.task("next", auto_assign=True)
    assert world.reason("next") == "1 server fits but is full"
    getattr(world, end)("first")
    assert world.status("next") == "assigned"
    world.check()


def test_a_server_that_comes_online_takes_what_waits_for_it(world):
    world.server("dev", repos=["a"], online=False)
    world.task("A", target_repo="a", auto_assign=True)
    assert world.reason("A") == "no server fits; nearest is dev: offline"
    world.online("dev")
    assert world.on("A") == "dev"


def test_a_capability_declared_later_lets_a_waiting_task_go(world):
    world.server("dev", capabilities=[], languages=["python"])
    world.task("A", requirements={"capabilities": ["gpu"]}, auto_assign=True)
    assert world.reason("A") == "no server fits; nearest is dev: no capability gpu"
    servers.change_server(HUB, "dev", {"declared": {"capabilities": ["gpu"]}})
    assert world.on("A") == "dev"


def test_a_repo_the_agent_brings_later_lets_a_waiting_task_go(world):
    world.server("dev", repos=["a"])
    world.task("A", target_repo="b", auto_assign=True)
    wire.sync(world.key("dev"), {"instance": "1", "capabilities": {"repos": {"b": "/b"}}})
    assert world.on("A") == "dev"


def test_more_slots_let_more_waiting_tasks_go(world):
    world.server("dev", slots=1)
    for name in "123":
        world.task(name, auto_assign=True)
    servers.change_server(HUB, "dev", {"slots": 2})
    assert [world.status(n) for n in "123"] == ["assigned", "assigned", "pending"]
    servers.change_server(HUB, "dev", {"slots": 1})
    world.complete("1")
    assert world.status("3") == "pending"
    world.check()


def test_what_an_admin_declares_in_two_steps_is_kept(world):
    world.server("dev", slots=4)
    servers.change_server(HUB, "dev", {"slots": 1})
    servers.change_server(HUB, "dev", {"declared": {"languages": ["rust"]}})
    servers.change_server(HUB, "dev", {"declared": {"capabilities": ["gpu"]}})
    shown = servers.server_json(world.server_row("dev"))
    assert (shown["slots"], shown["languages"], shown["capabilities"]) == (1, ["rust"], ["gpu"])


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: servers.drain(HUB, "dev"), "no server fits; nearest is dev: draining"),
        (lambda: servers.revoke(HUB, "dev"), "no server is registered in this project"),
    ],
)
def test_a_server_put_aside_takes_nothing_new(world, act, sentence):
    world.server("dev")
    act()
    world.task("A", auto_assign=True)
    assert world.reason("A") == sentence


def test_a_drained_server_ends_its_work_and_takes_new_after_resume(world):
    world.server("dev")
    world.working("A")
    servers.drain(HUB, "dev")
    world.task("B", auto_assign=True)
    world.complete("A")
    assert world.status("B") == "pending"
    servers.resume(HUB, "dev")
    assert world.on("B") == "dev"


def test_a_revoked_servers_work_goes_to_others_as_the_next_attempt(world):
    world.server("a")
    world.working("A")
    world.server("b")
    servers.revoke(HUB, "a")
    assert (world.on("A"), world.status("A"), world.row("A")["attempt"]) == ("b", "assigned", 2)
    world.check()


def test_work_given_by_hand_to_a_server_that_is_revoked_does_not_wait_for_it_forever(world):
    world.server("a")
    world.server("b")
    world.working("running", server="a")
    world.task("up", auto_assign=True)
    world.task("blocked", after=["up"])
    world.assign("blocked", server="a")
    servers.revoke(HUB, "a")
    assert world.on("running") == "b"
    world.complete("up")
    assert world.on("blocked") == "b"


# ── by hand ───────────────────────────────────────────────────────────────────────────────────


def test_a_blocked_task_keeps_its_assignee_and_gets_it_when_free(world):
    world.server("a")
    world.server("b", slots=1)
    world.task("A")
    world.task("B", after=["A"])
    given = world.assign("B", server="b")
    assert given["status"] == "pending"
    assert world.json("B")["assigned_server_name"] == "b"
    assert world.events("B")[-1]["details"] == {"assignee": "b"}
    world.assign("A", server="a")
    world.complete("A")
    assert (world.status("B"), world.on("B")) == ("assigned", "b")
    assert world.types("B")[-1] == "task_assigned"


def test_a_task_given_to_a_full_server_waits_for_it_with_the_reason(world):
    world.server("a", slots=1)
    world.server("b")
    world.working("first", server="a")
    world.task("A")
    world.assign("A", server="a")
    assert world.status("A") == "pending"
    assert world.reason("A") == "1 server fits but is full"
    world.complete("first")
    assert world.on("A") == "a"
    world.check()


def test_a_task_given_to_a_server_that_is_away_waits_for_it_with_the_reason(world):
    world.server("a", online=False)
    world.server("b")
    world.task("A")
    world.assign("A", server="a")
    assert (world.status("A"), world.reason("A")) == ("pending", "waiting for a: offline")
    world.online("a")
    assert world.on("A") == "a"


def test_assigning_without_a_target_routes_and_lets_go_of_an_earlier_one(world):
    world.server("a", online=False)
    world.server("b")
    world.task("A")
    world.assign("A", server="a")
    world.assign("A")
    assert world.on("A") == "b"


def test_a_session_name_that_no_session_has_is_tried_as_a_servers(world):
    world.server("dev")
    world.task("A")
    world.assign("A", session_name="dev")
    assert world.on("A") == "dev"
    world.task("B")
    with pytest.raises(NotFound, match="no live session or server called 'nobody'"):
        world.assign("B", session_name="nobody")
    assert world.status("B") == "pending"


def test_a_task_given_to_a_live_session_is_told_there(world):
    world.server("dev")
    session, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})
    world.task("A", command=["true"])
    world.assign("A", session="desk")
    assert (world.on("A"), world.row("A")["session_id"]) == ("dev", session["id"])
    assert world.json("A")["target_session_name"] == "desk"


@pytest.mark.parametrize("how", ["session", "session_name"])
def test_two_sessions_of_one_name_are_refused_with_the_candidates(world, how):
    world.server("dev")
    made = [sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})[0] for _ in "12"]
    world.task("A")
    with pytest.raises(Conflict) as refused:
        world.assign("A", **{how: "desk"})
    assert refused.value.code == "ambiguous"
    assert {c["id"] for c in refused.value.fields["candidates"]} == {s["id"] for s in made}


def test_a_server_without_the_repo_is_refused_at_once(world):
    world.server("dev", repos=["a"])
    world.task("A", target_repo="b")
    with pytest.raises(Conflict, match="has no repo 'b'"):
        world.assign("A", server="dev")


def test_assigning_with_a_plan_required_leads_through_the_plan(world):
    world.server("dev")
    world.task("A")
    world.assign("A", server="dev", require_plan=True)
    assert world.status("A") == "planning"
    assert world.types("A")[-2:] == ["task_assigned", "task_planning"]
    ref = world.ids["A"]

    def asked():
        return inbox.ask(HUB, ref, "Which one?")[0]["id"]

    for step, state in (
        (lambda: inbox.submit_plan(HUB, ref, {"summary": "one"}), "plan_review"),
        (lambda: inbox.revise(HUB, ref, "smaller"), "planning"),
        (lambda: inbox.answer(HUB, asked(), "This."), "planning"),
        (lambda: inbox.submit_plan(HUB, ref, {"summary": "two"}), "plan_review"),
        (lambda: inbox.approve(HUB, ref), "running"),
        (lambda: inbox.answer(HUB, asked(), "That."), "running"),
    ):
        step()
        assert world.status("A") == state
        world.check()
    assert world.busy("dev") == 1
    world.complete("A")
    assert world.busy("dev") == 0


# ── how it ends ───────────────────────────────────────────────────────────────────────────────


def test_a_failed_task_leaves_what_follows_blocked_with_the_reason(world):
    world.server("dev")
    world.working("A")
    world.task("B", after=["A"])
    world.task("C", after=["B"])
    before = world.now()
    world.fail("A", "the compiler says no")
    assert world.said(before) == [("task_failed", "A")]
    assert world.events("A")[-1]["details"]["error"] == "the compiler says no"
    assert world.json("A")["result"] == {"error": "the compiler says no"}
    assert (world.shown("B"), world.reason("B")) == ("blocked", "waits for A (failed)")
    assert world.reason("C") == "waits for B (pending)"
    world.check()


def test_a_retry_by_hand_is_the_next_attempt_and_is_placed_by_itself(world):
    world.server("dev")
    world.working("A")
    world.task("B", after=["A"])
    world.fail("A")
    before = world.now()
    world.retry("A")
    assert world.said(before) == [("task_retried", "A"), ("task_auto_assigned", "A")]
    row = world.row("A")
    assert (row["attempt"], row["status"], row["result"]) == (2, "assigned", None)
    world.start("A")
    world.complete("A")
    assert world.status("B") == "assigned"
    attempts = models.rows("SELECT number, outcome FROM attempt ORDER BY number")
    assert [tuple(a.values()) for a in attempts if a][:2] == [(1, "fail"), (2, "complete")]


def test_a_task_is_tried_as_often_as_it_says_and_no_more(world):
    world.server("dev")
    world.working("A", max_attempts=3)
    for attempt in (1, 2):
        assert world.row("A")["attempt"] == attempt
        world.fail("A", f"no {attempt}")
        assert world.status("A") == "assigned"
    world.fail("A", "no 3")
    assert (world.status("A"), world.row("A")["attempt"]) == ("failed", 3)
    assert world.types("A").count("task_retried") == 2
    world.check()


def test_a_retry_waits_its_delay_and_says_until_when(world):
    world.server("dev")
    world.working("A", max_attempts=2, retry_delay_s=60)
    world.fail("A")
    now = time.time()
    assert world.status("A") == "pending"
    assert world.shown("A") == "ready"
    assert world.reason("A").startswith("will be tried again at 20")
    assert due(now + 50) == 0
    assert world.status("A") == "pending"
    assert due(now + 61) == 1
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    assert due(now + 62) == 0


def test_a_task_that_waits_for_its_delay_can_be_given_away_or_cancelled(world):
    world.server("dev")
    world.working("A", max_attempts=5, retry_delay_s=60)
    world.fail("A")
    world.cancel("A")
    assert due(time.time() + 100) == 0
    assert world.status("A") == "cancelled"


def test_a_worker_that_does_not_start_is_given_up_and_tried_again(world):
    world.server("dev")
    world.task("A", command=["true"], start_timeout=30)
    world.assign("A", server="dev")
    now = time.time()
    assert due(now + 29) == 0
    assert tasks.time_out(now + 31) == 1
    assert "will be tried again at" in world.reason("A")
    due(now + 60)
    due(now + 20)  # a moment later, so that a broken server is not asked in a loop
    row = world.row("A")
    assert (row["status"], row["attempt"]) == ("assigned", 2)
    [failed] = world.events("A", "task_failed")
    assert failed["details"]["error"] == "the worker did not start in time"
    assert "task_cancelled" in [c["type"] for c in world.commands("dev")]
    world.check()


def test_a_worker_that_has_started_has_no_start_to_miss(world):
    world.server("dev")
    world.working("A", command=["true"], start_timeout=30)
    assert due(time.time() + 1000) == 0
    assert world.status("A") == "running"


def test_a_task_that_takes_too_long_fails(world):
    world.server("dev")
    world.working("A", timeout=120)
    now = time.time()
    assert due(now + 119) == 0
    assert due(now + 121) == 1
    assert world.status("A") == "failed"
    assert world.json("A")["result"] == {"error": "timed out: not finished after 120 s"}
    assert due(now + 500) == 0
    world.check()


def test_a_timeout_set_while_a_task_runs_counts(world):
    world.server("dev")
    world.working("A")
    world.update("A", timeout=60)
    assert due(time.time() + 61) == 1
    assert world.status("A") == "failed"


def test_cancelling_tells_the_worker_and_leaves_what_follows_blocked(world):
    world.server("dev")
    world.working("A", command=["true"])
    world.task("B", after=["A"])
    world.cancel("A")
    assert (world.status("A"), world.reason("B")) == ("cancelled", "waits for A (cancelled)")
    assert [c["type"] for c in world.commands("dev")] == ["task_assigned", "task_cancelled"]
    world.check()


def test_cancelling_with_cascade_takes_all_that_waits_and_nothing_else(world):
    world.server("dev", slots=10)
    world.working("A")
    world.task("B", after=["A"])
    world.task("C", after=["B"])
    world.task("D", inputs={"k": "A"}, after=["C"])
    world.task("linked", related=["A"])
    world.task("apart")
    _, also = world.cancel("A", downstream=True)
    assert also == [world.ids[n] for n in "BDC"]  # nearest first, each once
    assert [world.status(n) for n in "ABCD"] == ["cancelled"] * 4
    assert [world.status(n) for n in ("linked", "apart")] == ["pending"] * 2
    assert reading.timeline(HUB, world.ids["A"])[-1]["task_id"] == world.ids["C"]
    world.check()


def test_cancelling_with_cascade_passes_over_what_has_ended(world):
    world.server("dev")
    world.working("A")
    world.task("B", after=["A"])
    world.task("C", after=["B"])
    world.cancel("B")
    _, also = world.cancel("A", downstream=True)
    assert also == [world.ids["C"]]


# ── dependencies ──────────────────────────────────────────────────────────────────────────────


def test_removing_the_last_open_dependency_unblocks(world):
    world.server("dev")
    world.task("A")
    world.task("B", after=["A"], inputs={"k": "A"})
    world.depend("B", "A", "related")
    before = world.now()
    assert world.undepend("B", "A") == 3
    assert world.said(before) == [
        ("dependency_removed", "B"),
        ("task_unblocked", "B"),
        ("task_auto_assigned", "B"),
    ]
    assert world.json("B")["dependencies"] == []
    world.check()


def test_removing_a_resolved_or_related_dependency_frees_nothing(world):
    world.server("dev")
    world.working("A")
    world.complete("A")
    world.task("U")
    world.task("B", after=["A", "U"], related=["A"])
    before = world.now()
    assert world.undepend("B", "A") == 2
    assert world.said(before) == [("dependency_removed", "B")]
    assert world.shown("B") == "blocked"
    world.check()


def test_a_dependency_on_a_finished_task_is_resolved_at_once(world):
    world.server("dev")
    world.working("A")
    world.complete("A", contracts={"k": [1]})
    world.task("B", after=["A"], inputs={"k": "A"})
    assert world.status("B") == "assigned"
    assert world.json("B")["resolved_inputs"] == {"k": [1]}
    world.check()


def test_an_input_that_a_finished_task_never_delivered_says_so_and_can_be_supplied(world):
    world.server("dev")
    world.working("A")
    world.complete("A")
    world.task("B", inputs={"k": "A"})
    assert world.shown("B") == "blocked"
    assert world.reason("B") == "waits for A (done, but without contract 'k')"
    before = world.now()
    tasks.amend_contract(world.user("olga", shop="operator"), world.ids["A"], "k", {"by": "hand"})
    assert world.said(before) == [
        ("user_created", None),
        ("contract_amended", "A"),
        ("dependency_resolved", "B"),
        ("task_unblocked", "B"),
        ("task_auto_assigned", "B"),
    ]
    assert world.json("B")["resolved_inputs"] == {"k": {"by": "hand"}}
    [contract] = reading.contracts(HUB, world.ids["A"])
    assert (contract["status"], contract["data"], contract["by"]) == (
        "fulfilled",
        {"by": "hand"},
        "olga",
    )
    world.check()


def test_a_contract_supplied_before_the_end_is_not_owed_any_more(world):
    world.server("dev")
    world.working("A")
    world.task("B", inputs={"k": "A"})
    tasks.amend_contract(HUB, world.ids["A"], "k", 7)
    assert world.shown("B") == "blocked"
    world.complete("A")
    assert world.json("B")["resolved_inputs"] == {"k": 7}


def test_an_amended_contract_must_keep_to_its_schema(world):
    spec = {"expected_contracts": {"k": {"schema": {"type": "integer"}}}}
    world.task("A", structured_spec=spec)
    with pytest.raises(cascade.BadContract, match="'k' breaks its schema, at"):
        tasks.amend_contract(HUB, world.ids["A"], "k", "seven")
    assert reading.contracts(HUB, world.ids["A"])[0]["status"] == "expected"


def test_an_amended_contract_reaches_a_task_that_has_not_been_given_away(world):
    """Freed but not placed: what it is handed is what stands when it is."""
    world.server("dev", slots=1)
    world.working("A")
    world.task("B", inputs={"k": "A"}, target_repo="nowhere")
    world.complete("A", contracts={"k": "old"})
    tasks.amend_contract(HUB, world.ids["A"], "k", "new")
    servers.change_server(HUB, "dev", {"declared": {"repos": {"nowhere": {"path": "/n"}}}})
    assert world.on("B") == "dev"
    assert world.json("B")["resolved_inputs"] == {"k": "new"}


def test_the_next_attempt_is_handed_what_stands_then(world):
    world.server("dev")
    world.working("A")
    world.task("B", inputs={"k": "A"})
    world.complete("A", contracts={"k": "old"})
    world.fail("B")
    tasks.amend_contract(HUB, world.ids["A"], "k", "new")
    world.retry("B")
    assert world.json("B")["resolved_inputs"] == {"k": "new"}


def test_an_input_removed_before_the_start_is_not_handed_down(world):
    world.server("dev")
    world.working("A")
    world.task("W")
    world.task("B", inputs={"k": "A"}, after=["W"])
    world.complete("A", contracts={"k": 1})
    world.undepend("B", "W")
    world.fail("B")
    world.undepend("B", "A")
    world.retry("B")
    assert world.json("B")["resolved_inputs"] == {}


def test_a_task_that_was_waiting_to_be_placed_is_blocked_by_a_new_dependency(world):
    world.server("dev", online=False)
    world.task("A")
    world.task("B", auto_assign=True)
    world.depend("B", "A")
    assert world.shown("B") == "blocked"
    world.online("dev")
    assert world.status("B") == "pending"
    world.assign("A")
    world.complete("A")
    assert world.on("B") == "dev"
    world.check()


def test_a_running_task_takes_links_but_no_more_order(world):
    world.server("dev")
    world.task("A")
    world.working("B")
    world.depend("B", "A", "related")
    with pytest.raises(Conflict, match="only be added while it is pending"):
        world.depend("B", "A", "blocks")


# ── reports ───────────────────────────────────────────────────────────────────────────────────


def test_the_same_report_again_answers_as_the_first_and_changes_nothing(world):
    world.server("dev")
    world.working("A")
    first = world.complete("A", {"summary": "x", "n": [1, 2]}, attempt=1)
    before = world.now()
    assert world.complete("A", {"n": [1, 2], "summary": "x"}, attempt=1) == first
    assert world.now() == before


def test_start_said_twice_is_one_start(world):
    world.server("dev")
    world.working("A")
    world.start("A")
    world.start("A", attempt=1)
    assert world.types("A").count("task_started") == 1


@pytest.mark.parametrize(
    ("first", "late"),
    [
        (lambda w: w.complete("A"), lambda w: w.fail("A", "but no")),
        (lambda w: w.fail("A"), lambda w: w.complete("A")),
        (lambda w: w.complete("A", 1), lambda w: w.complete("A", 2)),
        (lambda w: w.cancel("A"), lambda w: w.complete("A")),
        (lambda w: w.cancel("A"), lambda w: w.fail("A")),
    ],
)
def test_a_report_after_the_end_is_kept_and_changes_nothing(world, first, late):
    world.server("dev")
    world.working("A")
    first(world)
    row, before = world.row("A"), world.now()
    with pytest.raises(Conflict) as refused:
        late(world)
    assert refused.value.code == "late"
    assert refused.value.fields == {"status": row["status"], "attempt": 1}
    assert world.row("A") == row
    assert world.said(before) == [("late_report", "A")]


def test_a_report_of_an_older_attempt_is_fenced(world):
    world.server("a")
    world.working("A")
    world.server("b")
    old = world.key("a")
    world.offline("a")
    assert leases.release_lost(time.time() + 1000, 900) == 1
    assert (world.on("A"), world.row("A")["attempt"]) == ("b", 2)
    world.online("a")
    with pytest.raises(Conflict) as refused:
        world.complete("A", "from the past", by=old, attempt=1)
    assert refused.value.code == "late"
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    [late] = world.events("A", "late_report")
    assert late["details"] == {
        "attempt": 1,
        "said": "complete",
        "report": "from the past",
        "stands": "release",
    }
    with pytest.raises(Forbidden):
        world.complete("A", by=old, attempt=2)
    world.check()


def test_an_attempt_that_never_was_is_refused(world):
    world.server("dev")
    world.working("A")
    with pytest.raises(Conflict, match="there was no 2 yet"):
        world.complete("A", attempt=2)


def test_a_blocked_task_cannot_be_started_and_the_reason_is_said(world):
    world.task("A")
    world.task("B", after=["A"])
    with pytest.raises(Conflict, match=r"cannot start: waits for A \(pending\)"):
        world.start("B")


def test_a_completion_without_its_contract_leaves_the_task_running(world):
    world.server("dev")
    world.working("A", structured_spec={"expected_contracts": {"docs": {}}})
    world.task("B", inputs={"api": "A"})
    row, before = world.row("A"), world.now()
    with pytest.raises(cascade.BadContract, match="docs: missing; api: missing"):
        world.complete("A", {"summary": "done"})
    assert (world.row("A"), world.now()) == (row, before)
    world.complete("A", contracts={"docs": 1, "api": 2})
    assert world.status("B") == "assigned"


# ── what a task asks for ──────────────────────────────────────────────────────────────────────


def test_what_is_said_in_two_places_is_stored_once_and_shown_in_both(world):
    spec = {"constraints": {"languages": ["python"], "frameworks": ["flask"], "other": 1}}
    world.task("A", target_repo="core", structured_spec=spec, requirements={"capabilities": ["x"]})
    shown = world.json("A")
    assert shown["target_repo"] == shown["requirements"]["repo"] == "core"
    assert shown["requirements"] == {
        "repo": "core",
        "languages": ["python"],
        "frameworks": ["flask"],
        "capabilities": ["x"],
    }
    assert shown["structured_spec"] == spec
    assert "languages" not in models.loads(world.row("A")["structured_spec"])["constraints"]


def test_requirements_alone_show_as_constraints_of_the_spec(world):
    world.task("A", structured_spec={}, requirements={"languages": ["rust"], "repo": "core"})
    shown = world.json("A")
    assert shown["structured_spec"] == {"constraints": {"languages": ["rust"]}}
    assert shown["target_repo"] == "core"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_repo": "a", "requirements": {"repo": "b"}},
        {
            "structured_spec": {"constraints": {"languages": ["go"]}},
            "requirements": {"languages": ["rust"]},
        },
        {
            "structured_spec": {"constraints": {"frameworks": ["x"]}},
            "requirements": {"frameworks": []},
        },
    ],
)
def test_two_places_that_contradict_each_other_are_refused(world, fields):
    with pytest.raises(Invalid, match="give it once"):
        world.task("A", **fields)
    assert models.one("SELECT COUNT(*) AS n FROM task")["n"] == 0


def test_changing_what_a_waiting_task_asks_for_routes_it_at_once(world):
    world.server("dev", repos=["a"])
    world.task("A", target_repo="b", auto_assign=True)
    assert world.status("A") == "pending"
    before = world.now()
    world.update("A", target_repo="a")
    assert world.said(before) == [("task_updated", "A"), ("task_auto_assigned", "A")]
    assert world.json("A")["requirements"] == {"repo": "a"}


def test_a_waiting_task_that_still_fits_nobody_waits_by_its_new_wishes(world):
    world.server("dev", repos=["a"])
    world.task("A", target_repo="b", auto_assign=True)
    world.update("A", target_repo="c", priority="high")
    assert world.reason("A") == "no server has repo c"
    wire.sync(world.key("dev"), {"instance": "1", "capabilities": {"repos": {"c": "/c"}}})
    assert world.on("A") == "dev"


def test_null_empties_what_can_be_empty(world):
    world.task("A", target_repo="a", target_branch="main", timeout=5, structured_spec={})
    world.update("A", target_repo=None, target_branch=None, timeout=None, structured_spec=None)
    shown = world.json("A")
    assert [shown[k] for k in ("target_repo", "target_branch", "timeout", "structured_spec")] == (
        [None] * 4
    )


def test_an_ended_task_is_not_changed(world):
    world.task("A")
    world.cancel("A")
    with pytest.raises(Conflict, match="retry it to open it again"):
        world.update("A", title="B")


def test_a_running_worker_is_told_of_a_change(world):
    world.server("dev")
    world.working("A", command=["true"])
    world.update("A", spec="differently")
    assert [c["type"] for c in world.commands("dev")] == ["task_assigned", "task_updated"]


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────


def test_a_pipeline_is_made_whole_and_its_assigned_root_begins(world):
    world.server("dev", slots=10)
    items = [
        {"id": "T1", "title": "root", "assign": "dev"},
        {"id": "T2", "title": "two", "depends_on": [{"task": "T1", "key": "api"}]},
        {"id": "T3", "title": "three", "depends_on": ["T2", {"task": "T1", "type": "related"}]},
        {"id": "T4", "title": "free", "auto_assign": True},
    ]
    made = tasks.create_pipeline(HUB, world.project("shop"), "p", items)
    shown = reading.pipeline_json(made, with_tasks=True)
    assert list(shown["id_map"]) == ["T1", "T2", "T3", "T4"]
    assert shown["counts"] == {"assigned": 2, "pending": 2}
    assert [t["title"] for t in shown["tasks"]] == ["root", "two", "three", "free"]
    kinds = {t["title"]: [d["dependency_type"] for d in t["dependencies"]] for t in shown["tasks"]}
    assert kinds == {"root": [], "two": ["input"], "three": ["blocks", "related"], "free": []}
    tasks.complete(HUB, shown["id_map"]["T1"], {"contracts": {"api": 1}})
    assert moves.row(shown["id_map"]["T2"])["status"] == "assigned"
    world.check()


# ── what an attempt leaves behind ─────────────────────────────────────────────────────────────


def test_the_command_of_an_assigned_task_carries_everything_its_worker_needs(world):
    world.server("dev", repos=["core"])
    world.working("A")
    world.task("B", inputs={"k": "A"}, target_repo="core", command=["make", "test"])
    world.complete("A", contracts={"k": API})
    frames = wire.pending_commands(world.servers["dev"], {}, 0.0)
    [frame] = [f for f in frames if f["task"]["title"] == "B"]
    assert frame["type"] == "task_assigned"
    assert (frame["attempt"], frame["require_plan"]) == (1, False)
    assert frame["task"]["resolved_inputs"] == {"k": API}
    start = frame["start"]
    assert start["command"] == ["make", "test"]
    assert (start["repo"], start["role"], start["attempt"]) == ("core", "worker", 1)
    assert start["task_id"] == world.ids["B"]
    assert auth.by_key(start["session_key"]).task_id == world.ids["B"]


def test_a_server_set_to_manual_gets_the_task_but_no_worker(world):
    world.server("dev")
    servers.change_server(HUB, "dev", {"manual": True})
    world.task("A", command=["true"], auto_assign=True)
    assert world.status("A") == "assigned"
    assert models.rows("SELECT * FROM session") == []
    [frame] = wire.pending_commands(world.servers["dev"], {}, 0.0)
    assert "start" not in frame and "session_id" not in frame


def test_a_released_attempts_command_is_never_sent(world):
    world.server("a")
    world.working("A")
    world.server("b")
    servers.revoke(HUB, "a")
    assert wire.pending_commands(world.servers["a"], {}, 0.0) == []
    [frame] = wire.pending_commands(world.servers["b"], {}, 0.0)
    assert frame["attempt"] == 2
