"""What waits for a person: questions and first answers, plans and decisions, notes; who may, what
the worker's session is told, and how it ends."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import auth
import cascade
import inbox
import models
import reading
import servers
import sessions
import tasks
import wire
import words
from auth import HUB
from conftest import ROOT, due
from models import Conflict, Forbidden, Invalid, NotFound, transaction

FAR = 2.0**40  # seconds: later than any clock of a test


@pytest.fixture
def shop(world):
    """Two servers; W runs in a worker's session on `dev`, P is being planned there; an orchestrator
    works on `dev` too."""
    world.server("dev")
    world.server("other")
    world.working("W", server="dev", command=["make"])
    world.task("P", command=["make"])
    world.assign("P", server="dev", require_plan=True)
    for name, role in (("boss", "orchestrator"), ("shell", "plain")):
        made, _ = sessions.open_session(HUB, {"server_id": "dev", "name": name, "role": role})
        world.ids[name] = made["id"]
    with transaction() as tx:
        for session in models.rows("SELECT * FROM session"):
            sessions.move(tx, session, "started", "hub")
    world.olga = world.user("olga", shop="operator")
    world.vera = world.user("vera", shop="viewer")
    world.stranger = world.user("sven", other="admin") if world.project("other") else None
    settle(world)
    return world


def settle(world) -> None:
    """What was sent so far has arrived."""
    for name, server in world.servers.items():
        wire.acknowledge(server, [c["id"] for c in world.commands(name)])


def session_of(world, name: str) -> auth.Caller:
    """The session that works on a task, or the one of that name, as a caller."""
    found = world.ids[name]
    task = models.one("SELECT session_id FROM task WHERE id = ?", (found,))
    return auth.by_key(auth.session_key(task["session_id"] if task else found))


def ask(world, name="W", question="JWT or cookies?", by=None, **more) -> dict:
    return inbox.ask(by or session_of(world, name), world.ids[name], question, **more)[0]


def told(world, server="dev") -> list[dict]:
    """The frames of what was not sent yet, without those about starting."""
    frames = wire.pending_commands(world.servers[server], {}, 0.0)
    return [f for f in frames if f["type"] not in ("task_assigned", "session_start")]


def test_a_question_for_a_session_is_told_there_until_somebody_has_answered(shop):
    asked = ask(shop, target="boss")
    [heard] = [f for f in told(shop) if f["type"] == "intervention_for_session"]
    assert (heard["session_id"], heard["intervention_id"]) == (shop.ids["boss"], asked["id"])
    assert heard["question"] == "JWT or cookies?"
    inbox.answer(shop.olga, asked["id"], "JWT")
    assert "intervention_for_session" not in {f["type"] for f in told(shop)}


# ── asking ────────────────────────────────────────────────────────────────────────────────────


def test_workflow_4_a_question_is_asked_answered_and_the_work_goes_on(shop):
    worker = session_of(shop, "W")
    asked, made = inbox.ask(worker, shop.ids["W"], "JWT or cookies?", context="auth.py")
    assert made
    assert shop.status("W") == "needs_human"
    [event] = shop.events("W", "task_needs_human")
    assert event["actor"] == worker.actor
    assert event["details"] == {
        "attempt": 1,
        "intervention_id": asked["id"],
        "intervention_type": "help",
        "question": "JWT or cookies?",
    }
    assert (event["session_id"], event["server_id"]) == (worker.session_id, shop.servers["dev"])
    [shown] = inbox.list_interventions([shop.project("shop")["id"]])
    assert (shown["status"], shown["question"], shown["context"]) == (
        "pending",
        "JWT or cookies?",
        "auth.py",
    )
    assert (shown["task_title"], shown["asked_by"]) == ("W", worker.actor)
    assert (shown["response"], shown["responded_by"], shown["closed_by"]) == (None, None, None)

    done = inbox.answer(shop.olga, asked["id"], "JWT with refresh tokens")
    assert (done["status"], done["ended_by"]) == ("responded", "olga")
    assert shop.status("W") == "running"
    [event] = shop.events("W", "intervention_responded")
    assert (event["actor"], event["details"]["response"]) == ("olga", "JWT with refresh tokens")
    [frame] = told(shop)
    assert frame.pop("id")
    assert frame == {
        "type": "intervention_response",
        "session_id": worker.session_id,
        "task_id": shop.ids["W"],
        "attempt": 1,
        "intervention_id": asked["id"],
        "question": "JWT or cookies?",
        "response": "JWT with refresh tokens",
        "author": "olga",
    }
    shop.check()


@pytest.mark.parametrize(
    ("state", "back"), [("assigned", "running"), ("running", "running"), ("planning", "planning")]
)
def test_the_task_goes_back_to_where_it_was_asked(shop, state, back):
    shop.task("A")
    shop.assign("A", server="dev", require_plan=state == "planning")
    if state == "running":
        shop.start("A")
    assert shop.status("A") == state
    asked = ask(shop, "A", by=HUB)
    assert (shop.status("A"), shop.row("A")["asked_in"]) == ("needs_human", state)
    inbox.answer(HUB, asked["id"], "yes")
    assert (shop.status("A"), shop.row("A")["asked_in"]) == (back, None)
    assert (shop.row("A")["started_at"] is None) == (state == "planning")
    shop.check()


def test_a_clock_of_the_whole_attempt_goes_on_while_a_question_is_open(shop):
    shop.working("A", server="dev", timeout=1000)
    asked = ask(shop, "A", by=HUB)
    assert shop.row("A")["deadline_at"] is not None
    due(FAR)
    assert shop.status("A") == "failed"
    assert inbox.get_intervention(HUB, asked["id"])["status"] == "closed"
    shop.check()


@pytest.mark.parametrize("state", ["pending", "plan_review", "done", "failed", "cancelled"])
def test_a_question_is_refused_where_nobody_could_wait_for_its_answer(shop, state):
    if state == "pending":
        shop.task("A")
    elif state == "plan_review":
        shop.ids["A"] = shop.ids["P"]
        inbox.submit_plan(HUB, shop.ids["P"], "x")
    else:
        shop.working("A", server="dev")
        verb = {"done": "complete", "failed": "fail", "cancelled": "cancel"}[state]
        getattr(shop, verb)("A")
    before = shop.row("A")
    with pytest.raises((cascade.IllegalMove, Conflict)) as refused:
        ask(shop, "A", by=HUB)
    assert state in str(refused.value)
    assert shop.row("A") == before
    assert models.rows("SELECT * FROM intervention") == []


def test_an_empty_question_or_answer_is_refused(shop):
    with pytest.raises(Invalid, match="question cannot be empty"):
        ask(shop, question=" \n")
    asked = ask(shop)
    with pytest.raises(Invalid, match="answer cannot be empty"):
        inbox.answer(shop.olga, asked["id"], "  ")
    assert shop.status("W") == "needs_human"


def test_the_same_question_asked_again_while_it_is_open_is_that_one(shop):
    worker, before = session_of(shop, "W"), shop.now()
    first, made = inbox.ask(worker, shop.ids["W"], "Which?", context="c", kind="question")
    again, made_again = inbox.ask(worker, shop.ids["W"], "Which?", context="c", kind="question")
    assert (made, made_again, again) == (True, False, first)
    assert [t for t, _ in shop.said(before)] == ["task_needs_human"]
    inbox.answer(shop.olga, first["id"], "this")
    third, made = inbox.ask(worker, shop.ids["W"], "Which?", context="c", kind="question")
    assert made and third["id"] != first["id"]


def test_several_questions_may_be_open_and_the_last_answer_lets_the_task_go_on(shop):
    one, two = ask(shop, question="one?"), ask(shop, question="two?", kind="approval")
    assert one["id"] != two["id"]
    assert [e["details"]["question"] for e in shop.events("W", "task_needs_human")] == [
        "one?",
        "two?",
    ]
    inbox.answer(shop.olga, two["id"], "2")
    assert shop.status("W") == "needs_human"
    inbox.answer(shop.olga, one["id"], "1")
    assert shop.status("W") == "running"
    assert [frame["response"] for frame in told(shop)] == ["2", "1"]
    assert len(shop.events("W", "intervention_responded")) == 2
    shop.check()


def test_a_worker_in_a_loop_does_not_fill_the_inbox(shop):
    for n in range(inbox.OPEN_MOST):
        ask(shop, question=f"{n}?")
    with pytest.raises(Conflict, match="open questions already") as refused:
        ask(shop, question="and this?")
    assert refused.value.code == "too_many_open"
    ask(shop, question="3?")  # it is open already


def test_a_question_may_name_the_session_it_is_meant_for(shop):
    asked = ask(shop, kind="question", target="boss")
    assert asked["target_session_id"] == shop.ids["boss"]
    with pytest.raises(NotFound):
        ask(shop, question="x?", target="nobody")
    far = shop.server("far", project="other")
    sessions.open_session(HUB, {"server_id": far, "name": "theirs"})
    with pytest.raises(NotFound):
        ask(shop, question="x?", target="theirs")
    with pytest.raises(Forbidden, match="another project"):
        ask(shop, question="x?", target="theirs", by=HUB)
    assert len(models.rows("SELECT * FROM intervention")) == 1


def test_keys_ask_on_their_own_tasks_only(shop):
    shop.working("O", server="other")
    for caller in (session_of(shop, "W"), shop.key("dev"), session_of(shop, "boss")):
        with pytest.raises(Forbidden):
            ask(shop, "O", by=caller)
    with pytest.raises(Forbidden):
        ask(shop, "O", by=shop.vera)
    with pytest.raises(NotFound):
        ask(shop, "O", by=shop.stranger)
    assert ask(shop, "O", by=shop.key("other"))["server_id"] == shop.servers["other"]


def test_who_asked_through_the_servers_key_is_answered_in_the_workers_session(shop):
    asked = ask(shop, by=shop.key("dev"))
    inbox.answer(shop.olga, asked["id"], "yes")
    [frame] = told(shop)
    assert frame["session_id"] == shop.row("W")["session_id"]


def test_without_a_session_the_answer_is_there_to_be_looked_up(shop):
    shop.working("A", server="other")
    assert shop.row("A")["session_id"] is None
    asked = ask(shop, "A", by=shop.key("other"))
    inbox.answer(shop.olga, asked["id"], "yes")
    assert told(shop, "other") == []
    shown = inbox.interventions_json([inbox.get_intervention(shop.key("other"), asked["id"])])[0]
    assert (shown["response"], shown["responded_by"]) == ("yes", "olga")


# ── answering ─────────────────────────────────────────────────────────────────────────────────

# kind: who may answer, of those below
ANSWERERS = {
    "question": {"olga", "hub", "boss", "other"},
    "help": {"olga", "hub"},
    "approval": {"olga", "hub"},
}


@pytest.mark.parametrize("kind", inbox.KINDS)
@pytest.mark.parametrize(
    "who", ["olga", "hub", "boss", "other", "dev", "worker", "shell", "vera", "stranger"]
)
def test_who_may_answer(shop, kind, who):
    asked = ask(shop, kind=kind)
    caller = {
        "olga": shop.olga,
        "vera": shop.vera,
        "stranger": shop.stranger,
        "hub": HUB,
        "boss": session_of(shop, "boss"),
        "worker": session_of(shop, "W"),
        "shell": session_of(shop, "shell"),
        "dev": shop.key("dev"),
        "other": shop.key("other"),
    }[who]
    if who in ANSWERERS[kind]:
        assert inbox.answer(caller, asked["id"], "yes")["ended_by"] == caller.actor
        assert shop.status("W") == "running"
        return
    with pytest.raises(NotFound if who == "stranger" else Forbidden):
        inbox.answer(caller, asked["id"], "yes")
    assert shop.status("W") == "needs_human"
    assert inbox.get_intervention(HUB, asked["id"])["status"] == "pending"


def test_an_orchestrator_cannot_answer_itself(shop):
    shop.task("O")
    shop.assign("O", session="boss")
    shop.start("O")
    asked = ask(shop, "O", by=session_of(shop, "boss"), kind="question")
    assert asked["session_id"] == shop.ids["boss"]
    with pytest.raises(Forbidden, match="whoever asked"):
        inbox.answer(session_of(shop, "boss"), asked["id"], "yes")


def test_the_second_answer_hears_who_gave_the_first(shop):
    asked = ask(shop)
    inbox.answer(shop.olga, asked["id"], "JWT")
    with pytest.raises(Conflict, match="olga answered this already at .*'JWT'") as refused:
        inbox.answer(HUB, asked["id"], "cookies")
    assert refused.value.code == "answered"
    assert refused.value.fields["response"] == "JWT"
    assert refused.value.fields["responded_by"] == "olga"
    with pytest.raises(Conflict):
        inbox.answer(HUB, asked["id"], "JWT")
    assert len(told(shop)) == 1


def test_the_same_answer_by_the_same_person_again_changes_nothing(shop):
    asked = ask(shop)
    first = inbox.answer(shop.olga, asked["id"], "JWT")
    before = shop.now()
    assert inbox.answer(shop.olga, asked["id"], "JWT") == first
    assert shop.now() == before
    assert len(told(shop)) == 1


def test_of_many_answers_at_the_same_moment_exactly_one_counts(shop):
    def answer(n: int):
        try:
            return inbox.answer(HUB, asked["id"], f"answer {n}")["response"]
        except Conflict as refused:
            return refused

    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            asked = ask(shop, question=f"{turn}?")
            said = list(pool.map(answer, range(8)))
            [won] = [s for s in said if isinstance(s, str)]
            lost = [s for s in said if isinstance(s, Conflict)]
            assert {refused.fields["response"] for refused in lost} == {won}
            assert [f["response"] for f in told(shop)] == [won]
            assert shop.status("W") == "running"
            settle(shop)
    assert len(shop.events("W", "intervention_responded")) == 20
    shop.check()


def test_an_answer_and_the_end_of_the_task_at_the_same_moment_leave_one_outcome(shop):
    def tried(deed):
        try:
            return deed()
        except (Conflict, cascade.IllegalMove) as refused:
            return refused

    with ThreadPoolExecutor(2) as pool:
        for turn in range(30):
            name = f"T{turn}"
            shop.working(name, server="dev", max_attempts=1)
            asked = ask(shop, name, by=HUB)
            first = pool.submit(tried, lambda i=asked["id"]: inbox.answer(HUB, i, "yes"))
            other = pool.submit(tried, lambda n=name: shop.cancel(n))
            answered, _ = first.result(), other.result()
            stands = inbox.get_intervention(HUB, asked["id"])
            assert shop.status(name) == "cancelled"
            if isinstance(answered, Conflict):
                assert (answered.code, stands["status"]) == ("closed", "closed")
            else:
                assert stands["status"] == "responded"
    shop.check()


# ── how a question ends without an answer ─────────────────────────────────────────────────────


def release(world):
    with transaction() as tx:
        tasks.release(tx, world.row("W"), "its server is gone")


@pytest.mark.parametrize(
    ("end", "why", "status"),
    [
        (lambda w: w.complete("W"), "complete", "done"),
        (lambda w: w.fail("W"), "fail", "failed"),
        (lambda w: w.cancel("W"), "cancel", "cancelled"),
        (release, "release", "assigned"),
        (lambda w: servers.revoke(HUB, "dev"), "release", "assigned"),
    ],
    ids=["complete", "fail", "cancel", "release", "revoke"],
)
def test_a_task_that_ends_takes_its_open_questions_with_it(shop, end, why, status):
    one, two = ask(shop, question="one?"), ask(shop, question="two?")
    answered = ask(shop, question="three?")
    inbox.answer(shop.olga, answered["id"], "3")
    end(shop)
    assert shop.status("W") == status
    found = {i["id"]: i for i in inbox.list_interventions([shop.project("shop")["id"]])}
    for asked in (one, two):
        assert (found[asked["id"]]["status"], found[asked["id"]]["closed_why"]) == ("closed", why)
        assert found[asked["id"]]["closed_at"] and found[asked["id"]]["closed_by"]
        with pytest.raises(Conflict, match="closed at .* nothing to answer") as refused:
            inbox.answer(shop.olga, asked["id"], "late")
        assert refused.value.code == "closed"
    assert found[answered["id"]]["status"] == "responded"
    closing = [e for e in shop.events("W") if "closed_interventions" in e["details"]]
    assert [set(e["details"]["closed_interventions"]) for e in closing] == [{one["id"], two["id"]}]
    shop.check()


def test_a_retried_task_asks_anew_and_its_former_worker_is_late(shop):
    former = session_of(shop, "W")
    asked = ask(shop)
    shop.fail("W")
    shop.retry("W")
    assert shop.row("W")["attempt"] == 2
    before = shop.now()
    with pytest.raises(Conflict, match="Your report is kept") as refused:
        inbox.ask(former, shop.ids["W"], "JWT or cookies?")
    assert refused.value.code == "late"
    [late] = shop.events("W", "late_report", after=before)
    assert late["details"]["said"] == "ask"
    assert late["details"]["report"]["question"] == "JWT or cookies?"
    shop.start("W")
    again = ask(shop)
    assert (again["attempt"], again["id"] != asked["id"]) == (2, True)
    inbox.answer(shop.olga, again["id"], "yes")
    shop.check()


def test_an_answer_not_sent_before_the_attempt_ended_is_not_sent_any_more(shop):
    asked = ask(shop)
    inbox.answer(shop.olga, asked["id"], "yes")
    assert "intervention_response" in {c["type"] for c in shop.commands("dev")}
    shop.fail("W")
    shop.retry("W")
    assert "intervention_response" not in {f["type"] for f in told(shop)}
    assert "intervention_response" not in {c["type"] for c in shop.commands("dev")}


def test_words_that_come_too_late_leave_a_session_that_is_starting_alone(shop):
    session, _ = sessions.open_session(HUB, {"server_id": "other", "name": "desk"})
    shop.task("D")
    shop.assign("D", session="desk")
    inbox.add_note(shop.olga, shop.ids["D"], "mind the gap")
    shop.cancel("D")
    frames = wire.pending_commands(shop.servers["other"], {}, 0.0)
    assert "task_note" not in {f["type"] for f in frames}
    assert sessions.get_session(HUB, session["id"])["state"] == "starting"


def test_a_question_survives_a_restart_of_the_hub(shop, tmp_path):
    worker, asked = session_of(shop, "W"), ask(shop)
    models.close_db()
    models.open_db(tmp_path / "hub.db")
    again, made = inbox.ask(worker, shop.ids["W"], "JWT or cookies?")
    assert (again["id"], made) == (asked["id"], False)
    inbox.answer(shop.olga, asked["id"], "JWT")
    models.close_db()
    models.open_db(tmp_path / "hub.db")
    assert [f["response"] for f in told(shop)] == ["JWT"]
    assert shop.status("W") == "running"
    with pytest.raises(Conflict, match="olga answered"):
        inbox.answer(HUB, asked["id"], "cookies")
    shop.check()


def test_the_session_that_ordered_a_task_hears_that_it_waits(shop):
    boss = session_of(shop, "boss")
    shop.task("O", by=boss)
    shop.assign("O", server="other", require_plan=True)
    asked = ask(shop, "O", by=shop.key("other"), kind="question", question="Which?")
    inbox.answer(boss, asked["id"], "This.")
    inbox.submit_plan(shop.key("other"), shop.ids["O"], {"summary": "Do it."})
    inbox.approve(boss, shop.ids["O"])
    shop.complete("O", by=shop.key("other"))
    heard = [f for f in told(shop) if f["type"] == "task_status_update"]
    assert {f["session_id"] for f in heard} == {shop.ids["boss"]}
    assert [(f["status"], f["summary"]) for f in heard] == [
        ("needs_human", "Which?"),
        ("plan_review", "Do it."),
        ("done", "null"),
    ]


# ── listing ───────────────────────────────────────────────────────────────────────────────────


def test_interventions_are_listed_newest_first_by_task_and_status(shop):
    shop.working("V", server="dev")
    one, two = ask(shop, question="one?"), ask(shop, "V", "two?", by=HUB)
    three = ask(shop, question="three?")
    inbox.answer(shop.olga, one["id"], "yes")
    here = [shop.project("shop")["id"]]

    def listed(**more):
        return [i["question"] for i in inbox.list_interventions(here, **more)]

    assert listed() == ["three?", "two?", "one?"]
    assert listed(status="pending") == ["three?", "two?"]
    assert listed(status="responded") == ["one?"]
    assert listed(status="closed") == []
    assert listed(task=shop.row("W")) == ["three?", "one?"]
    assert listed(task=shop.row("W"), status="pending") == ["three?"]
    assert inbox.list_interventions([shop.project("other")["id"]]) == []
    with pytest.raises(Invalid, match="Unknown status 'open': use one of pending"):
        listed(status="open")
    for ref in (two["id"], two["id"][:8], f"#{two['id'][:8]}", two["id"].upper()):
        assert inbox.get_intervention(shop.olga, ref)["id"] == two["id"]
    assert three["id"] != two["id"]
    with pytest.raises(NotFound):
        inbox.get_intervention(shop.stranger, two["id"])


PLANS = [
    ("SELECT * FROM intervention WHERE task_id = 'x' AND status = 'pending' ORDER BY seq"),
    ("SELECT seq FROM intervention WHERE task_id = 'x' ORDER BY seq DESC LIMIT 9"),
    ("SELECT seq FROM intervention WHERE project_id = 'x' ORDER BY seq DESC LIMIT 9"),
    (
        "SELECT seq FROM intervention WHERE project_id = 'x' AND status = 'pending'"
        " ORDER BY seq DESC LIMIT 9"
    ),
    ("SELECT * FROM plan WHERE task_id = 'x' ORDER BY version DESC LIMIT 1"),
    ("SELECT seq FROM note WHERE task_id = 'x' ORDER BY seq DESC LIMIT 20"),
    ("UPDATE intervention SET status = 'closed' WHERE task_id = 'x' AND status = 'pending'"),
]


@pytest.mark.parametrize("sql", PLANS)
def test_nothing_is_found_by_looking_through_a_table(world, sql):
    steps = [row["detail"] for row in models.rows(f"EXPLAIN QUERY PLAN {sql}")]
    assert steps and all(step.startswith("SEARCH") or "LAST TERM" in step for step in steps), steps


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_is_sent_back_handed_in_again_and_approved(shop):
    worker, ref = session_of(shop, "P"), shop.ids["P"]
    first = inbox.submit_plan(worker, ref, {"summary": "Rewrite it all", "steps": [1]})
    assert first["status"] == "plan_review"
    assert reading.task_json(first)["plan"] == {"summary": "Rewrite it all", "steps": [1]}
    back = inbox.revise(shop.olga, ref, "smaller, please")
    assert (back["status"], back["plan_feedback"]) == ("planning", "smaller, please")
    inbox.submit_plan(worker, ref, "Fix the one line")
    gone = inbox.approve(shop.olga, ref, "go")
    assert (gone["status"], gone["plan_feedback"]) == ("running", "go")
    assert gone["started_at"] is not None
    revision, approved = told(shop)
    assert revision["type"] == "plan_revision"
    assert (revision["feedback"], revision["version"]) == ("smaller, please", 1)
    assert (revision["session_id"], revision["task_id"]) == (worker.session_id, ref)
    assert (approved["type"], approved["comment"], approved["version"]) == (
        "plan_approved",
        "go",
        2,
    )
    kept = inbox.plans(shop.vera, ref)
    assert [(p["version"], p["status"], p["feedback"], p["decided_by"]) for p in kept] == [
        (1, "revised", "smaller, please", "olga"),
        (2, "approved", "go", "olga"),
    ]
    assert [p["plan"] for p in kept] == [
        {"summary": "Rewrite it all", "steps": [1]},
        "Fix the one line",
    ]
    types = shop.types("P")
    assert [t for t in types if t.startswith("task_plan_")] == [
        "task_plan_submitted",
        "task_plan_revision",
        "task_plan_submitted",
        "task_plan_approved",
    ]
    [submitted, _] = shop.events("P", "task_plan_submitted")
    assert submitted["details"] == {"attempt": 1, "version": 1, "summary": "Rewrite it all"}
    shop.complete("P")
    shop.check()


@pytest.mark.parametrize("plan", [None, 42, "x", True, [1, {"a": None}], {"summary": 7}, {}])
def test_a_plan_may_be_any_json(shop, plan):
    inbox.submit_plan(session_of(shop, "P"), shop.ids["P"], plan)
    assert inbox.plans(HUB, shop.ids["P"])[0]["plan"] == plan
    assert shop.json("P")["plan"] == plan


def test_the_same_plan_again_is_the_same_and_another_one_replaces_it(shop):
    worker, ref = session_of(shop, "P"), shop.ids["P"]
    inbox.submit_plan(worker, ref, {"a": 1, "b": 2})
    before = shop.now()
    assert inbox.submit_plan(worker, ref, {"b": 2, "a": 1})["status"] == "plan_review"
    assert shop.now() == before
    inbox.submit_plan(worker, ref, {"a": 2})
    assert [p["status"] for p in inbox.plans(HUB, ref)] == ["replaced", "pending"]
    inbox.approve(HUB, ref)
    before = shop.now()
    assert inbox.submit_plan(worker, ref, {"a": 2})["status"] == "running"  # the answer was lost
    assert shop.now() == before
    with pytest.raises(cascade.IllegalMove):
        inbox.submit_plan(worker, ref, {"a": 3})


def test_the_same_plan_after_it_was_sent_back_is_a_new_version(shop):
    worker, ref = session_of(shop, "P"), shop.ids["P"]
    inbox.submit_plan(worker, ref, "x")
    inbox.revise(HUB, ref, "no")
    assert inbox.submit_plan(worker, ref, "x")["status"] == "plan_review"
    assert [p["status"] for p in inbox.plans(HUB, ref)] == ["revised", "pending"]


def test_a_plan_nobody_asked_for_is_refused(shop):
    with pytest.raises(cascade.IllegalMove, match="submit a plan for a task that is running"):
        inbox.submit_plan(session_of(shop, "W"), shop.ids["W"], "x")
    assert inbox.plans(HUB, shop.ids["W"]) == []
    with pytest.raises(cascade.IllegalMove, match="approve the plan of a task that is running"):
        inbox.approve(HUB, shop.ids["W"])
    with pytest.raises(cascade.IllegalMove, match="planning: submit a plan first"):
        inbox.revise(HUB, shop.ids["P"], "x")


def test_work_does_not_begin_before_the_plan_is_approved(shop):
    for deed in (shop.start, shop.complete):
        with pytest.raises(cascade.IllegalMove):
            deed("P")
    inbox.submit_plan(HUB, shop.ids["P"], "x")
    for deed in (shop.start, shop.complete):
        with pytest.raises(cascade.IllegalMove, match="approve the plan or send it back first"):
            deed("P")


@pytest.mark.parametrize(
    ("who", "may"),
    [
        ("olga", True),
        ("boss", True),
        ("dev", False),
        ("other", False),
        ("worker", False),
        ("shell", False),
        ("vera", False),
    ],
)
@pytest.mark.parametrize("verb", ["approve", "revise"])
def test_who_may_decide_on_a_plan(shop, who, may, verb):
    ref = shop.ids["P"]
    inbox.submit_plan(session_of(shop, "P"), ref, "x")
    caller = {
        "olga": shop.olga,
        "vera": shop.vera,
        "boss": session_of(shop, "boss"),
        "worker": session_of(shop, "P"),
        "shell": session_of(shop, "shell"),
        "dev": shop.key("dev"),
        "other": shop.key("other"),
    }[who]

    def decide():
        return inbox.approve(caller, ref) if verb == "approve" else inbox.revise(caller, ref, "no")

    if may:
        assert decide()["status"] == ("running" if verb == "approve" else "planning")
        return
    with pytest.raises(Forbidden):
        decide()
    assert shop.status("P") == "plan_review"


def test_an_orchestrator_cannot_approve_what_it_planned_itself(shop):
    shop.task("O")
    shop.assign("O", session="boss", require_plan=True)
    boss = session_of(shop, "boss")
    inbox.submit_plan(boss, shop.ids["O"], "x")
    with pytest.raises(Forbidden, match="its own plan"):
        inbox.approve(boss, shop.ids["O"])


def test_a_stranger_sees_no_plan(shop):
    for look in (inbox.plans, inbox.approve, lambda c, r: inbox.revise(c, r, "x")):
        with pytest.raises(NotFound):
            look(shop.stranger, shop.ids["P"])


def test_feedback_cannot_be_empty(shop):
    inbox.submit_plan(HUB, shop.ids["P"], "x")
    with pytest.raises(Invalid, match="Say what should be different"):
        inbox.revise(HUB, shop.ids["P"], " ")


def test_a_decision_counts_for_the_version_that_was_read(shop):
    worker, ref = session_of(shop, "P"), shop.ids["P"]
    inbox.submit_plan(worker, ref, "one")
    inbox.submit_plan(worker, ref, "two")
    with pytest.raises(Conflict, match="at version 2, not 1") as refused:
        inbox.approve(shop.olga, ref, version=1)
    assert refused.value.code == "other_version"
    assert inbox.approve(shop.olga, ref, version=2)["status"] == "running"


def test_the_first_decision_counts_and_the_second_hears_of_it(shop):
    ref = shop.ids["P"]
    inbox.submit_plan(HUB, ref, "x")
    inbox.revise(shop.olga, ref, "no")
    before = shop.now()
    assert inbox.revise(shop.olga, ref, "no")["status"] == "planning"  # said twice
    with pytest.raises(Conflict, match="Version 1 of the plan was sent back by olga") as refused:
        inbox.approve(HUB, ref)
    assert refused.value.code == "decided"
    assert shop.now() == before
    assert len(told(shop)) == 1


def test_of_two_decisions_at_the_same_moment_exactly_one_counts(shop):
    def tried(deed):
        try:
            return deed()["status"]
        except (Conflict, cascade.IllegalMove) as refused:
            return refused

    ref = shop.ids["P"]
    with ThreadPoolExecutor(2) as pool:
        for turn in range(20):
            if shop.status("P") == "running":
                shop.fail("P")
                shop.retry("P")
            inbox.submit_plan(HUB, ref, turn)
            settle(shop)
            yes = pool.submit(tried, lambda: inbox.approve(shop.olga, ref))
            no = pool.submit(tried, lambda: inbox.revise(HUB, ref, "no"))
            said = [yes.result(), no.result()]
            [won] = [s for s in said if isinstance(s, str)]
            assert shop.status("P") == won
            assert len(told(shop)) == 1
    shop.check()


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_a_task_that_ends_takes_its_plan_with_it(shop, end):
    ref = shop.ids["P"]
    inbox.submit_plan(HUB, ref, "x")
    getattr(shop, end)("P")
    assert [p["status"] for p in inbox.plans(HUB, ref)] == ["closed"]
    with pytest.raises(Conflict, match="was closed with its attempt by"):
        inbox.approve(shop.olga, ref)
    shop.retry("P")
    assert shop.status("P") == "planning"
    with pytest.raises(cascade.IllegalMove):
        inbox.approve(shop.olga, ref)
    inbox.submit_plan(HUB, ref, "x")
    assert [(p["version"], p["attempt"]) for p in inbox.plans(HUB, ref)] == [(1, 1), (2, 2)]
    shop.check()


def test_the_plan_of_an_older_attempt_is_late(shop):
    worker, ref = session_of(shop, "P"), shop.ids["P"]
    shop.fail("P")
    shop.retry("P")
    with pytest.raises(Conflict) as refused:
        inbox.submit_plan(worker, ref, {"summary": "late"})
    assert refused.value.code == "late"
    [late] = shop.events("P", "late_report")
    assert late["details"]["said"] == "submit_plan"
    assert late["details"]["report"] == {"summary": "late"}
    assert inbox.plans(HUB, ref) == []


def test_a_plan_survives_a_restart_of_the_hub(shop, tmp_path):
    ref = shop.ids["P"]
    inbox.submit_plan(HUB, ref, "x")
    models.close_db()
    models.open_db(tmp_path / "hub.db")
    assert inbox.approve(shop.olga, ref)["status"] == "running"
    assert [f["type"] for f in told(shop)] == ["plan_approved"]


# ── notes ─────────────────────────────────────────────────────────────────────────────────────


def test_a_note_is_kept_announced_and_told_to_the_worker(shop):
    note = inbox.add_note(shop.olga, shop.ids["W"], "mind the cache", urgent=True)
    [shown] = reading.notes(shop.vera, shop.ids["W"])
    assert shown["id"] == note["id"]
    assert (shown["content"], shown["author"], shown["urgent"]) == ("mind the cache", "olga", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["created_at"])
    [event] = shop.events("W", "task_note_added")
    assert event["details"]["content"] == "mind the cache"
    [frame] = told(shop)
    assert frame["type"] == "task_note"
    assert (frame["content"], frame["author"], frame["urgent"]) == ("mind the cache", "olga", True)
    assert frame["session_id"] == shop.row("W")["session_id"]
    assert "mentioned_via" not in frame
    assert shop.status("W") == "running"


def test_nobody_is_told_what_they_have_said_themselves(shop):
    inbox.add_note(session_of(shop, "W"), shop.ids["W"], "half way")
    inbox.add_note(shop.key("dev"), shop.ids["W"], "by the server's own key")
    assert told(shop) == []
    inbox.add_note(shop.key("other"), shop.ids["W"], "from elsewhere")
    inbox.add_note(session_of(shop, "boss"), shop.ids["W"], "from the orchestrator")
    assert [f["author"] for f in told(shop)] == ["server:other", "session:boss"]
    assert [n["content"] for n in reading.notes(HUB, shop.ids["W"])] == [
        "half way",
        "by the server's own key",
        "from elsewhere",
        "from the orchestrator",
    ]


def test_a_note_reaches_the_workers_of_dependent_tasks_marked_as_such(shop):
    shop.working("U", server="dev")
    shop.complete("U")
    for name, links in (("D", {"after": ["U"]}), ("R", {"related": ["U"]})):
        shop.task(name, command=["x"], auto_assign=True, **links)
    shop.task("later", after=["D"], command=["x"])
    settle(shop)
    inbox.add_note(shop.olga, shop.ids["U"], "the API has changed")
    frames = told(shop) + told(shop, "other")
    assert {f["task_id"] for f in frames} == {shop.ids["D"], shop.ids["R"]}
    for frame in frames:
        assert (frame["mentioned_via"], frame["about_task_id"]) == ("dependency", shop.ids["U"])
        assert (frame["about"], frame["content"]) == ("U", "the API has changed")
        assert (frame["attempt"], frame["urgent"]) == (1, False)


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_a_task_that_has_ended_can_still_be_noted_on(shop, end):
    worker = session_of(shop, "W")
    getattr(shop, end)("W")
    settle(shop)
    inbox.add_note(worker, shop.ids["W"], "by the way")
    inbox.add_note(shop.olga, shop.ids["W"], "thanks")
    assert len(reading.notes(HUB, shop.ids["W"])) == 2
    assert told(shop) == []


def test_a_note_of_an_older_attempt_is_late(shop):
    former = session_of(shop, "W")
    shop.fail("W")
    shop.retry("W")
    with pytest.raises(Conflict, match="Your report is kept") as refused:
        inbox.add_note(former, shop.ids["W"], "half way", urgent=True)
    assert refused.value.code == "late"
    [late] = shop.events("W", "late_report")
    assert late["details"]["report"] == {"content": "half way", "urgent": True}
    assert reading.notes(HUB, shop.ids["W"]) == []
    with pytest.raises(Conflict, match="there was no 3 yet"):
        inbox.add_note(shop.key("dev"), shop.ids["W"], "x", attempt=3)


def test_who_may_note(shop):
    for caller in (shop.vera, session_of(shop, "P"), session_of(shop, "shell")):
        with pytest.raises(Forbidden):
            inbox.add_note(caller, shop.ids["W"], "x")
    with pytest.raises(NotFound):
        inbox.add_note(shop.stranger, shop.ids["W"], "x")
    with pytest.raises(NotFound):
        reading.notes(shop.stranger, shop.ids["W"])
    with pytest.raises(Invalid, match="note cannot be empty"):
        inbox.add_note(HUB, shop.ids["W"], "\n")
    assert reading.notes(HUB, shop.ids["W"]) == []


def test_the_view_of_a_task_has_its_last_twenty_notes(shop):
    for n in range(25):
        inbox.add_note(HUB, shop.ids["W"], f"note {n}")
    recent = [n["content"] for n in shop.json("W")["recent_notes"]]
    assert recent == [f"note {n}" for n in range(5, 25)]
    [listed] = reading.tasks_json([shop.row("W")])
    assert listed["recent_notes"] == []


# ── what others know of it ────────────────────────────────────────────────────────────────────


def test_every_event_of_the_inbox_has_its_words():
    source = (ROOT / "inbox.py").read_text()
    said = set(re.findall(r'_say\(tx, \w+, "(\w+)"', source))
    assert {"task_needs_human", "intervention_responded", "task_note_added"} == said
    assert said <= set(words.WORDS)


def test_every_command_of_the_inbox_can_be_sent():
    source = (ROOT / "inbox.py").read_text()
    kinds = set(re.findall(r'_command\(\s*tx,\s*"(\w+)"', source))
    kinds |= {command for _, command, _ in inbox.DECISIONS.values()}
    assert kinds == {"intervention_response", "task_note", "plan_approved", "plan_revision"}
    assert kinds <= set(wire.COMPOSE)


def test_events_stay_small_whatever_is_said(shop):
    asked = ask(shop, question="?" * 40_000)
    inbox.answer(shop.olga, asked["id"], "!" * 40_000)
    inbox.add_note(shop.olga, shop.ids["W"], "." * 40_000)
    assert max(len(json.dumps(e)) for e in shop.events("W")) < 5000
    response, note = told(shop)
    assert (len(response["response"]), len(note["content"])) == (40_000, 40_000)
