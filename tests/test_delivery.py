"""How what was decided reaches the worker: returned to the call that waits or typed, never both;
what became of it; and workers that get stuck."""

import threading
import time
import uuid

import pytest

import alerts
import auth
import inbox
import models
import prompts
import sessions
import wire
from auth import HUB
from models import Conflict, Invalid, transaction
from test_permissions import say, shop  # noqa: F401

CLAIM = str(uuid.uuid4())


def worker(world) -> auth.Caller:
    return auth.by_key(auth.session_key(world.session["id"]))


def ask(world, **more) -> dict:
    return inbox.ask(worker(world), world.ids["W"], "JWT or cookies?", **more)[0]


def typed(world) -> list[str]:
    """The answers that are to be typed."""
    frames = wire.pending_commands(world.servers["dev"], {}, 0.0)
    return [f["response"] for f in frames if f["type"] == "intervention_response"]


def row(asked: dict) -> dict:
    return models.one("SELECT * FROM intervention WHERE id = ?", (asked["id"],))


# ── an answer goes one way ────────────────────────────────────────────────────────────────────


def test_without_a_waiting_call_the_answer_is_typed(shop):  # noqa: F811
    asked = ask(shop)
    inbox.answer(shop.olga, asked["id"], "JWT")
    assert typed(shop) == ["JWT"]
    assert row(asked)["delivery"] == "sent"
    with pytest.raises(Conflict, match="sent into the session's terminal") as late:
        inbox.collect(worker(shop), asked["id"], CLAIM)
    assert late.value.code == "delivered"
    say(shop, "agent_event", kind="typed", intervention_id=asked["id"])
    assert row(asked)["delivery"] == "typed"


def test_a_waiting_call_gets_the_answer_and_nothing_is_typed(shop):  # noqa: F811
    asked = ask(shop, claim=CLAIM)
    got = []
    waiting = threading.Thread(
        target=lambda: got.append(inbox.collect(worker(shop), asked["id"], CLAIM, 20))
    )
    waiting.start()
    inbox.answer(shop.olga, asked["id"], "JWT")
    waiting.join(20)
    assert got[0]["response"] == "JWT"
    assert row(asked)["delivery"] == "returned"
    inbox.send_unclaimed(time.time() + 3600)
    assert typed(shop) == []
    again = inbox.collect(worker(shop), asked["id"], CLAIM)  # its answer was lost on the way
    assert again["response"] == "JWT"
    with pytest.raises(Conflict, match="given to another call"):
        inbox.collect(worker(shop), asked["id"], str(uuid.uuid4()))


def test_a_call_that_does_not_come_back_loses_the_answer_to_the_terminal(shop):  # noqa: F811
    asked = ask(shop, claim=CLAIM)
    inbox.answer(shop.olga, asked["id"], "JWT")
    assert (row(asked)["delivery"], typed(shop)) == ("held", [])
    inbox.send_unclaimed(time.time())
    assert typed(shop) == []
    inbox.send_unclaimed(time.time() + inbox.CLAIM_S + 1)
    assert (row(asked)["delivery"], typed(shop)) == ("sent", ["JWT"])
    inbox.send_unclaimed(time.time() + 3600)
    assert len(typed(shop)) == 1
    with pytest.raises(Conflict, match="never|not given twice"):
        inbox.collect(worker(shop), asked["id"], CLAIM)


def test_a_claim_that_ran_out_before_the_answer_came_is_none(shop):  # noqa: F811
    asked = ask(shop, claim=CLAIM)
    with transaction():
        models.execute("UPDATE intervention SET claim_until = ?", (time.time() - 1,))
    inbox.answer(shop.olga, asked["id"], "JWT")
    assert typed(shop) == ["JWT"]


def test_somebody_else_who_waits_takes_nothing_away(shop):  # noqa: F811
    asked = ask(shop, claim=CLAIM)
    assert inbox.collect(shop.vera, asked["id"], str(uuid.uuid4()))["status"] == "pending"
    inbox.answer(shop.olga, asked["id"], "JWT")
    assert inbox.collect(shop.vera, asked["id"], str(uuid.uuid4()))["response"] == "JWT"
    assert inbox.collect(worker(shop), asked["id"], CLAIM)["response"] == "JWT"
    assert row(asked)["delivery"] == "returned"


def test_the_task_ends_while_its_call_waits(shop):  # noqa: F811
    asked = ask(shop, claim=CLAIM)
    shop.cancel("W")
    assert inbox.collect(worker(shop), asked["id"], CLAIM, 5)["status"] == "closed"
    assert typed(shop) == []


@pytest.mark.parametrize(
    ("kind", "how", "words"),
    [
        ("delivery_unknown", "unknown", "may or may not have reached"),
        ("not_delivered", "failed", "did not reach"),
    ],
)
def test_a_doubtful_delivery_is_an_alert_once(shop, kind, how, words):  # noqa: F811
    asked = ask(shop)
    inbox.answer(shop.olga, asked["id"], "JWT")
    said = {"kind": kind, "command": "intervention_response", "command_id": 3, "why": "it died"}
    for _ in range(2):
        say(shop, "agent_event", intervention_id=asked["id"], **said)
    assert (row(asked)["delivery"], row(asked)["delivery_why"]) == (how, "it died")
    [alert] = alerts.waiting([shop.project("shop")["id"]])
    assert words in alert["sentence"]
    assert alert["sentence"].startswith("The answer to a question")


# ── what a session does ───────────────────────────────────────────────────────────────────────


def activity(world, state: str, **more) -> None:
    say(world, "session_activity", state=state, **({"reason": None, "signal": "title"} | more))


def test_a_usage_limit_is_an_alert_until_it_is_over(shop):  # noqa: F811
    activity(shop, "quota", reason="usage limit reached, resets 3pm")
    [alert] = alerts.waiting([shop.project("shop")["id"]])
    assert (alert["kind"], "resets 3pm" in alert["sentence"]) == ("quota", True)
    activity(shop, "working")
    assert alerts.waiting([shop.project("shop")["id"]]) == []


def test_the_session_says_which_signal_decided(shop):  # noqa: F811
    signals = [{"name": "title", "says": "working", "at": 1.0, "silent": False, "decided": True}]
    activity(shop, "working", signals=signals, since=time.time() - 5)
    said = sessions.explain(shop.vera, shop.session["id"])
    assert (said["activity"], said["signal"], said["signals"]) == ("working", "title", signals)
    activity(shop, "idle", signals="nonsense", since="never")
    assert sessions.explain(shop.vera, shop.session["id"])["signals"] == []
    activity(shop, "dancing")
    assert sessions.explain(shop.vera, shop.session["id"])["activity"] == "idle"


def test_a_worker_without_progress_is_an_alert_once_until_it_goes_on(shop):  # noqa: F811
    now = time.time()
    activity(shop, "working", progress=now)
    inbox.notice_stuck(now + 100, 1800)
    assert alerts.waiting([shop.project("shop")["id"]]) == []
    inbox.notice_stuck(now + 1900, 1800)
    inbox.notice_stuck(now + 2000, 1800)
    [alert] = alerts.waiting([shop.project("shop")["id"]])
    assert alert["kind"] == "stuck"
    assert "No progress for 32 min" in alert["sentence"]
    with transaction():
        models.execute("UPDATE session SET progress_at = ?", (now + 2100,))
    inbox.notice_stuck(now + 2200, 1800)
    assert alerts.waiting([shop.project("shop")["id"]]) == []


def test_a_task_may_have_a_patience_of_its_own(shop):  # noqa: F811
    shop.update("W", progress_timeout=60)
    inbox.notice_stuck(time.time() + 70, 1800)
    assert len(alerts.waiting([shop.project("shop")["id"]])) == 1
    shop.fail("W")
    inbox.notice_stuck(time.time() + 70, 1800)
    assert alerts.waiting([shop.project("shop")["id"]]) == []


@pytest.mark.parametrize("state", ["blocked:permission", "blocked:question", "quota"])
def test_who_waits_for_an_answer_is_not_stuck(shop, state):  # noqa: F811
    activity(shop, state)
    inbox.notice_stuck(time.time() + 4000, 1800)
    assert {a["kind"] for a in alerts.waiting([shop.project("shop")["id"]])} <= {"quota"}


# ── prompts ───────────────────────────────────────────────────────────────────────────────────


SPEC = {
    "requirements": [{"description": "Mind the limits", "priority": "must"}],
    "expected_contracts": {"routes": {"schema": {"type": "array"}}},
}


def prompt_of(world, name: str, project=None) -> str:
    values = prompts.values_of(world.row(name), "shop", "dev")
    return prompts.fill(project or prompts.DEFAULT, values)


def test_a_prompt_says_what_to_do_what_is_given_and_how_to_report(world):
    world.server("dev")
    world.working("A")
    criteria = ["All tests pass"]
    world.task(
        "B",
        inputs={"api": "A"},
        spec="Do it well",
        structured_spec=SPEC,
        acceptance_criteria=criteria,
    )
    world.complete("A", contracts={"api": {"status": "fulfilled", "data": {"v": 2}}})
    said = prompt_of(world, "B")
    for part in ("# B\n", "Do it well", "- Mind the limits (must)", "- All tests pass", '"v": 2'):
        assert part in said
    for part in ("### api", "- `routes`", '"type": "array"', "orchestratia task complete"):
        assert part in said
    assert "{{" not in said
    assert "plan submit" not in said


def test_a_task_with_a_plan_is_told_to_plan_first(world):
    world.task("A", require_plan=True)
    assert "change nothing until the plan is approved" in prompt_of(world, "A")


def test_a_project_may_have_a_template_of_its_own(world):
    world.task("A", spec="Do {{ title }} and {{ report }}")
    said = prompt_of(world, "A", "Now: {{title}}\n\n{{ requirements }}\n\n{{ spec }} {{ report }}")
    assert said.startswith("Now: A\n\nDo {{ title }} and {{ report }} ## How to report")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ spec }}", "lacks {{ report }}"),
        ("{{ report }} {{ config }}", r"unknown names \(config\)"),
        ("{{ report }}" + "x" * 50_000, "longer than 50,000 characters"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(world, template, words):
    project = world.project("shop")["id"]
    with pytest.raises(Invalid, match=words):
        auth.change_project(HUB, project, {"settings": {"prompt": template}})
    assert models.loads(world.project("shop")["settings"]) == {}


# ── coding agents as requirements ─────────────────────────────────────────────────────────────


def installed(world, name: str, *agents: str) -> None:
    said = {"capabilities": {"profiles": dict.fromkeys(("command", *agents), "1.0")}}
    wire.take_passing(world.key(name), {"type": "capabilities"} | said)


def test_a_task_goes_where_its_coding_agent_is_installed(world):
    world.server("one")
    world.server("two")
    installed(world, "one")
    world.task("A", profile="claude", auto_assign=True)
    assert world.on("A") == "two"  # which has not said what it has
    installed(world, "two", "codex")
    world.task("B", profile="claude", auto_assign=True)
    assert world.status("B") == "pending"
    assert "no agent claude" in world.reason("B")
    installed(world, "one", "claude")
    assert world.on("B") == "one"


def test_a_preferred_agent_counts(world):
    world.server("one")
    world.server("two")
    installed(world, "one", "codex")
    installed(world, "two", "codex", "aider")
    wish = {"prefer": {"agents": ["aider"]}}
    world.task("A", profile="codex", requirements=wish, auto_assign=True)
    assert world.on("A") == "two"


# ── taking up a conversation again ────────────────────────────────────────────────────────────


def test_a_conversation_is_taken_up_again_where_it_lies(shop):  # noqa: F811
    made, _ = sessions.open_session(HUB, {"server_id": "dev", "profile": "claude", "mode": "plan"})
    with transaction() as tx:
        earlier = sessions.move(tx, made, "started", "hub", conversation="c-1")
    with pytest.raises(Conflict, match="its conversation goes on there"):
        sessions.open_session(HUB, {"server_id": "dev", "resume": made["id"]})
    with transaction() as tx:
        sessions.move(tx, earlier, "close", "hub", exit_code=1)
    with pytest.raises(Conflict, match="lies on another server"):
        sessions.open_session(HUB, {"server_id": "other", "resume": made["id"]})
    again, _ = sessions.open_session(HUB, {"server_id": "dev", "resume": made["id"]})
    assert (again["profile"], again["mode"], again["resumes"]) == ("claude", "plan", "c-1")
    [frame] = [
        f
        for f in wire.pending_commands(shop.servers["dev"], {}, 0.0)
        if f["type"] == "session_start" and f["session_id"] == again["id"]
    ]
    assert frame["resume"] == "c-1"
    with transaction() as tx:
        sessions.move(tx, again, "fail", "hub")
    with pytest.raises(Conflict, match="has no conversation"):
        sessions.open_session(HUB, {"server_id": "dev", "resume": again["id"]})
