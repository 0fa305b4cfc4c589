"""Permission requests: rules and grants that answer them, people who decide, the log of it all."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import alerts
import auth
import inbox
import models
import permissions
import sessions
import wire
from auth import HUB
from models import Conflict, Forbidden, Invalid, NotFound, transaction


@pytest.fixture
def shop(world):
    """A worker's session W on `dev`; olga operates, ada administers, vera looks on. No rules."""
    world.server("dev")
    world.server("other")
    world.working("W", server="dev", command=["make"])
    with transaction() as tx:
        for session in models.rows("SELECT * FROM session"):
            sessions.move(tx, session, "started", "hub")
    world.olga = world.user("olga", shop="operator")
    world.ada = world.user("ada", shop="admin")
    world.vera = world.user("vera", shop="viewer")
    world.root = world.user("root", admin=True)
    world.project("other")
    world.stranger = world.user("sven", other="admin")
    world.session = models.one("SELECT * FROM session WHERE task_id = ?", (world.ids["W"],))
    for name, server in world.servers.items():
        wire.acknowledge(server, [c["id"] for c in world.commands(name)])
    world.spooled = 0
    return world


def say(world, frame_type: str, /, **fields) -> None:
    """A spooled frame of the agent on `dev`."""
    world.spooled += 1
    frame = {"type": frame_type, "spool": world.spooled, "session_id": world.session["id"]}
    assert wire.take_spooled(world.key("dev"), [frame | fields]) == world.spooled


def ask(world, command="git push", request_id=None, **more) -> str:
    """A held request for a shell command; its id."""
    request_id = request_id or str(uuid.uuid4())
    fields = {"tool": "Bash", "input": {"command": command}, "directory": "/srv/core"}
    fields |= {"agent": "claude", "via": "hook"}
    say(world, "permission_requested", request_id=request_id, **(fields | more))
    return request_id


def asked(world, request_id: str) -> dict:
    return permissions.permissions_json([permissions.get(world.vera, request_id)])[0]


def answers(world) -> list[dict]:
    """The answers on their way to `dev`."""
    frames = wire.pending_commands(world.servers["dev"], {}, 0.0)
    return [f for f in frames if f["type"] == "permission_answer"]


def rule(world, action: str, pattern: str | None = None, by=None, **more) -> dict:
    project = {"project_id": world.project("shop")["id"]}
    data = project | {"tool": "Bash", "pattern": pattern, "action": action} | more
    return permissions.add_rule(by or world.ada, data)


# ── questions and plans ───────────────────────────────────────────────────────────────────────


def question(*texts, **more) -> dict:
    """The input of a question that offers two choices for each text."""
    choices = [{"label": "JWT", "description": "Stateless"}, {"label": "Cookies"}]
    return {"questions": [{"question": text, "options": choices} | more for text in texts]}


def choose(world, *texts, given=None, **more) -> str:
    given = given or question(*texts or ("Which?",))
    return ask(world, tool="AskUserQuestion", asks="question", input=given, **more)


def test_a_question_is_answered_in_its_order(shop):
    asks = choose(shop, "Which way?", "For how long?")
    decided = permissions.decide(shop.olga, asks, "allow", answers=[" JWT ", "an hour"])
    assert decided["status"] == "allowed"
    answered = {"Which way?": "JWT", "For how long?": "an hour"}
    shown = asked(shop, asks)
    assert (shown["asks"], shown["subject"]) == ("question", "Which way?\nFor how long?")
    assert shown["answers"] == answered
    [frame] = answers(shop)
    assert (frame["decision"], frame["answers"]) == ("allow", answered)
    [event] = [e for e in shop.events() if e["type"] == "permission_answered"]
    assert event["details"]["answers"] == ["JWT", "an hour"]


@pytest.mark.parametrize("given", [None, [], [""], ["  "], ["JWT", "more"], ["x" * 4001]])
def test_a_question_without_its_answers_waits_on(shop, given):
    asks = choose(shop)
    with pytest.raises(Invalid, match="answer"):
        permissions.decide(shop.olga, asks, "allow", answers=given)
    assert asked(shop, asks)["status"] == "pending"


@pytest.mark.parametrize("scope", ["session", "always"])
def test_an_answer_holds_once(shop, scope):
    for made in (choose(shop), ask(shop, tool="ExitPlanMode", asks="plan", input={"plan": "x"})):
        with pytest.raises(Invalid, match="holds once"):
            permissions.decide(shop.ada, made, "allow", scope=scope, answers=None)


def test_only_a_question_takes_answers(shop):
    with pytest.raises(Invalid, match="Only a question"):
        permissions.decide(shop.olga, ask(shop), "allow", answers=["yes"])
    with pytest.raises(Invalid, match="Only a question"):
        permissions.decide(shop.olga, choose(shop), "deny", answers=["yes"])


@pytest.mark.parametrize("given", [{}, {"questions": 3}, {"questions": [3]}, {"questions": [{}]}])
def test_a_question_that_cannot_be_read_is_answered_in_the_terminal(shop, given):
    asks = choose(shop, given=given or {"x": 1})
    with pytest.raises(Invalid, match="in the session's terminal"):
        permissions.decide(shop.olga, asks, "allow", answers=["JWT"])
    assert permissions.decide(shop.olga, asks, "deny")["status"] == "denied"


@pytest.mark.parametrize("options", [None, 3, [3], [{"label": 3}]])
def test_choices_that_make_no_sense_are_none(options):
    [found] = permissions.questions_of(question("Which?", options=options))
    assert found == {"question": "Which?", "several": False, "options": []}


def test_rules_deny_questions_and_plans_and_never_allow_them(shop):
    rule(shop, "allow", tool="AskUserQuestion")
    rule(shop, "allow", tool="ExitPlanMode")
    plan = {"tool": "ExitPlanMode", "asks": "plan", "input": {"plan": "# Do it"}}
    waiting = [choose(shop), ask(shop, **plan)]
    assert [asked(shop, one)["status"] for one in waiting] == ["pending", "pending"]
    assert asked(shop, waiting[1])["subject"] == "# Do it"
    rule(shop, "deny", tool="AskUserQuestion")
    assert asked(shop, choose(shop))["status"] == "denied"


def test_the_same_answer_again_is_taken_and_another_is_told_who_was_first(shop):
    asks = choose(shop)
    first = permissions.decide(shop.olga, asks, "allow", answers=["JWT"])
    assert permissions.decide(shop.olga, asks, "allow", answers=["JWT"])["id"] == first["id"]
    with pytest.raises(Conflict) as refused:
        permissions.decide(shop.olga, asks, "allow", answers=["Cookies"])
    assert refused.value.code == "decided"
    assert len(answers(shop)) == 1


def test_what_a_frame_asks_is_one_of_three(shop):
    assert asked(shop, ask(shop, asks="everything"))["asks"] == "permission"


# ── asking and deciding ───────────────────────────────────────────────────────────────────────


def test_a_request_waits_is_decided_and_the_answer_goes_to_the_session(shop):
    request_id = ask(shop)
    [shown] = permissions.waiting([shop.project("shop")["id"]])
    assert (shown["tool"], shown["subject"]) == ("Bash", "git push")
    assert (shown["directory"], shown["agent"], shown["via"]) == ("/srv/core", "claude", "hook")
    assert (shown["session_name"], shown["task_title"]) == (shop.session["name"], "W")
    [item] = inbox.waiting([shop.project("shop")["id"]])
    assert (item["kind"], item["id"]) == ("permission", request_id)
    assert inbox.count([shop.project("shop")["id"]]) == 1
    [event] = shop.events("W", "permission_requested")
    assert (event["details"]["subject"], event["details"]["tool"]) == ("git push", "Bash")

    permissions.decide(shop.olga, request_id, "allow")
    [frame] = answers(shop)
    assert (frame["request_id"], frame["decision"]) == (request_id, "allow")
    assert (frame["session_id"], frame["author"]) == (shop.session["id"], "olga")
    assert inbox.count([shop.project("shop")["id"]]) == 0
    [event] = shop.events("W", "permission_answered")
    assert (event["actor"], event["details"]["status"]) == ("olga", "allowed")
    assert asked(shop, request_id)["delivery"] == "sent"

    say(shop, "agent_event", kind="delivered", command="permission_answer", request_id=request_id)
    assert asked(shop, request_id)["delivery"] == "delivered"


def test_a_denial_carries_its_reason(shop):
    request_id = ask(shop)
    permissions.decide(shop.olga, request_id, "deny", reason="push from the pipeline")
    [frame] = answers(shop)
    assert (frame["decision"], frame["message"]) == ("deny", "push from the pipeline")
    assert asked(shop, request_id)["reason"] == "push from the pipeline"


def test_the_first_decision_counts_and_the_second_hears_of_it(shop):
    request_id = ask(shop)
    permissions.decide(shop.olga, request_id, "deny")
    with pytest.raises(Conflict, match="olga denied this already") as late:
        permissions.decide(shop.ada, request_id, "allow")
    assert late.value.code == "decided"
    assert late.value.fields["decided_by"] == "olga"
    assert (
        permissions.decide(shop.olga, request_id, "deny")["status"] == "denied"
    )  # again: the same
    assert len(answers(shop)) == 1


def test_of_many_at_once_one_decides(shop):
    request_id = ask(shop)
    people = [shop.user(f"p{n}", shop="operator") for n in range(8)]

    def decide(who):
        try:
            return permissions.decide(who, request_id, "allow")["decided_by"]
        except Conflict as late:
            return late.code

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(decide, people))
    assert sorted(said).count("decided") == 7
    assert len(answers(shop)) == 1


def test_a_request_said_twice_is_one(shop):
    request_id = ask(shop)
    ask(shop, request_id=request_id)
    assert len(permissions.waiting([shop.project("shop")["id"]])) == 1
    assert len(shop.events("W", "permission_requested")) == 1


def test_what_was_answered_at_the_terminal_needs_nobody(shop):
    request_id = ask(shop)
    say(shop, "permission_ended", request_id=request_id, where="in the terminal")
    assert permissions.waiting([shop.project("shop")["id"]]) == []
    [event] = shop.events("W", "permission_answered")
    assert event["details"]["answered_where"] == "in the terminal"
    with pytest.raises(Conflict, match="settled in the terminal") as late:
        permissions.decide(shop.olga, request_id, "allow")
    assert late.value.code == "withdrawn"
    assert answers(shop) == []


def test_an_answer_that_came_too_late_there_is_shown_as_that(shop):
    request_id = ask(shop)
    permissions.decide(shop.olga, request_id, "allow")
    say(shop, "permission_ended", request_id=request_id, where="in the terminal")
    shown = asked(shop, request_id)
    assert (shown["status"], shown["delivery"]) == ("allowed", "failed")
    assert "in the terminal before the answer came" in shown["delivery_why"]


def test_an_unknown_delivery_is_an_alert(shop):
    request_id = ask(shop)
    permissions.decide(shop.olga, request_id, "allow")
    say(
        shop,
        "agent_event",
        kind="delivery_unknown",
        command="permission_answer",
        command_id=7,
        request_id=request_id,
        why="the agent ended while typing",
    )
    assert asked(shop, request_id)["delivery"] == "unknown"
    [alert] = alerts.waiting([shop.project("shop")["id"]])
    assert alert["kind"] == "delivery"
    assert "may or may not have reached" in alert["sentence"]
    assert alerts.dismiss(shop.olga, alert["id"])["status"] == "dismissed"
    assert alerts.waiting([shop.project("shop")["id"]]) == []
    with pytest.raises(Conflict, match="ended at .* already"):
        alerts.dismiss(shop.ada, alert["id"])


def test_a_session_that_ends_takes_its_requests_and_grants_with_it(shop):
    first, second = ask(shop), ask(shop, "make deploy")
    permissions.decide(shop.olga, first, "allow", scope="session")
    say(shop, "session_closed", exit_code=0)
    assert asked(shop, second)["answered_where"] == "when its session ended"
    assert permissions.grants_of(shop.session["id"]) == []
    assert inbox.count([shop.project("shop")["id"]]) == 0


def test_a_program_in_a_loop_does_not_fill_the_inbox(shop):
    for n in range(permissions.PENDING_MOST + 5):
        ask(shop, f"try {n}")
    waiting = permissions.waiting([shop.project("shop")["id"]])
    assert len(waiting) == permissions.PENDING_MOST
    [last] = permissions.list_requests([shop.project("shop")["id"]], limit=1)
    assert "requests open already" in last["answered_where"]


@pytest.mark.parametrize(
    "frame",
    [
        {"request_id": "x"},
        {"request_id": None},
        {"request_id": str(uuid.uuid4()), "tool": None, "input": None, "session_id": "other"},
    ],
)
def test_a_malformed_request_is_passed_over(shop, frame):
    say(shop, "permission_requested", **({"tool": "Bash", "input": {}} | frame))
    assert permissions.waiting([shop.project("shop")["id"]]) == []
    ask(shop)
    assert len(permissions.waiting([shop.project("shop")["id"]])) == 1


def test_a_huge_input_is_kept_by_its_beginning(shop):
    request_id = ask(shop, "echo " + "x" * 2_000_000)
    shown = asked(shop, request_id)
    assert shown["input"]["too_large"].startswith('{"command":')
    assert len(shown["subject"]) <= permissions.INPUT_MOST


# ── who may ───────────────────────────────────────────────────────────────────────────────────


def test_only_people_decide_and_only_with_the_right(shop):
    request_id = ask(shop)
    worker = auth.by_key(auth.session_key(shop.session["id"]))
    for who in (shop.key("dev"), shop.key("other"), worker):
        with pytest.raises(Forbidden, match="answered by people"):
            permissions.decide(who, request_id, "allow")
    with pytest.raises(Forbidden):
        permissions.decide(shop.vera, request_id, "allow")
    with pytest.raises(NotFound):
        permissions.decide(shop.stranger, request_id, "allow")
    with pytest.raises(Forbidden, match="takes an admin of the project"):
        permissions.decide(shop.olga, request_id, "allow", scope="always")
    assert asked(shop, request_id)["status"] == "pending"


@pytest.mark.parametrize(
    ("decision", "scope", "field"),
    [("maybe", "once", "decision"), ("allow", "forever", "scope"), ("deny", "session", "scope")],
)
def test_a_wrong_decision_is_refused(shop, decision, scope, field):
    request_id = ask(shop)
    with pytest.raises(Invalid) as refused:
        permissions.decide(shop.olga, request_id, decision, scope=scope)
    assert refused.value.fields == {"field": field} or field in str(refused.value.fields)


def test_who_may_change_rules(shop):
    worker = auth.by_key(auth.session_key(shop.session["id"]))
    for who in (shop.key("dev"), worker):
        with pytest.raises(Forbidden, match="changed by people"):
            rule(shop, "allow", "ls", by=who)
    with pytest.raises(Forbidden):
        rule(shop, "allow", "ls", by=shop.olga)
    with pytest.raises(NotFound):
        rule(shop, "allow", "ls", by=shop.stranger)
    with pytest.raises(Forbidden):
        rule(shop, "allow", "ls", by=shop.ada, project_id=None)
    assert rule(shop, "allow", "ls", by=shop.root, project_id=None)["project_id"] is None
    made = rule(shop, "allow", "ls")
    for who in (shop.olga, shop.vera):
        with pytest.raises(Forbidden):
            permissions.remove_rule(who, made["id"])
    with pytest.raises(NotFound):
        permissions.remove_rule(shop.stranger, made["id"])


# ── rules and grants ──────────────────────────────────────────────────────────────────────────


def test_rules_answer_at_once_and_are_named_in_the_log(shop):
    allowed, denied = rule(shop, "allow", "git push"), rule(shop, "deny", "rm -rf *")
    first, second, third = ask(shop), ask(shop, "git push && rm -rf x"), ask(shop, "make")
    assert [asked(shop, r)["status"] for r in (first, second, third)] == [
        "allowed",
        "denied",
        "pending",
    ]
    assert asked(shop, first)["decided_by"] == f"rule:{allowed['id']}"
    assert asked(shop, second)["rule_id"] == denied["id"]
    assert [(f["request_id"], f["decision"]) for f in answers(shop)] == [
        (first, "allow"),
        (second, "deny"),
    ]
    assert answers(shop)[1]["message"]


def test_what_the_server_has_denied_by_its_copy_is_logged(shop):
    made = rule(shop, "deny", "rm -rf *")
    request_id = ask(
        shop, "rm -rf /", decision="deny", rule_id=made["id"], because="a rule denies it"
    )
    shown = asked(shop, request_id)
    assert (shown["status"], shown["decided_by"]) == ("denied", f"rule:{made['id']}")
    assert answers(shop) == []


def test_what_is_read_off_a_screen_is_denied_by_a_rule_but_allowed_by_people_alone(shop):
    rule(shop, "allow", "git push")
    rule(shop, "deny", "rm -rf *")
    shown, hostile = ask(shop, via="screen"), ask(shop, "rm -rf /", via="screen")
    assert [asked(shop, r)["status"] for r in (shown, hostile)] == ["pending", "denied"]


def test_a_grant_holds_for_the_session_and_exactly_that_call(shop):
    permissions.decide(shop.olga, ask(shop), "allow", scope="session")
    again, other = ask(shop), ask(shop, "git push --force")
    elsewhere = ask(shop, directory="/srv/payments")
    assert asked(shop, again)["decided_by"] == "grant:olga"
    assert asked(shop, other)["status"] == "pending"
    assert asked(shop, elsewhere)["status"] == "pending"
    [grant] = permissions.grants_json(shop.vera, shop.session)
    assert (grant["subject"], grant["granted_by"]) == ("git push", "olga")
    with pytest.raises(Forbidden):
        permissions.revoke_grant(shop.vera, grant["id"])
    permissions.revoke_grant(shop.olga, grant["id"])
    assert asked(shop, ask(shop))["status"] == "pending"
    with pytest.raises(NotFound):
        permissions.revoke_grant(shop.olga, grant["id"])


def test_a_denial_beats_a_grant(shop):
    permissions.decide(shop.olga, ask(shop), "allow", scope="session")
    rule(shop, "deny", "git push *")
    assert asked(shop, ask(shop))["status"] == "denied"


def test_always_makes_a_rule_of_exactly_this_call(shop):
    permissions.decide(shop.ada, ask(shop, "make 'a b' && ls *.c"), "allow", scope="always")
    assert asked(shop, ask(shop, "make 'a b' && ls *.c"))["status"] == "allowed"
    assert asked(shop, ask(shop, "make 'a b'"))["status"] == "allowed"
    assert asked(shop, ask(shop, "make a b"))["status"] == "pending"
    assert asked(shop, ask(shop, "make 'a b' && rm x"))["status"] == "pending"


def test_always_with_a_pattern_of_ones_own(shop):
    permissions.decide(
        shop.ada, ask(shop, "npm run build"), "allow", scope="always", pattern="npm run *"
    )
    assert asked(shop, ask(shop, "npm run test"))["status"] == "allowed"
    [made] = permissions.list_rules(shop.vera, [shop.project("shop")["id"]])
    assert (made["pattern"], made["agent"], made["created_by"]) == ("npm run *", "claude", "ada")


def test_what_no_rule_can_stand_for_is_refused_and_stays_open(shop):
    request_id = ask(shop, "$(cat todo)")
    with pytest.raises(Invalid, match="No rule can stand for exactly this call"):
        permissions.decide(shop.ada, request_id, "allow", scope="always")
    with pytest.raises(Invalid):
        permissions.decide(shop.ada, request_id, "allow", scope="always", pattern="a && b")
    assert asked(shop, request_id)["status"] == "pending"
    assert permissions.list_rules(shop.vera, [shop.project("shop")["id"]]) == []


def test_a_rule_is_changed_moved_and_removed(shop):
    first, second = rule(shop, "ask", "make *"), rule(shop, "allow", "make *")
    assert asked(shop, ask(shop, "make all"))["status"] == "pending"
    permissions.change_rule(shop.ada, second["id"], {"position": first["position"]})
    listed = permissions.list_rules(shop.vera, [shop.project("shop")["id"]])
    assert [r["id"] for r in listed] == [second["id"], first["id"]]
    assert asked(shop, ask(shop, "make all"))["status"] == "allowed"
    permissions.change_rule(shop.ada, second["id"], {"enabled": False})
    assert asked(shop, ask(shop, "make all"))["status"] == "pending"
    permissions.remove_rule(shop.ada, second["id"])
    with pytest.raises(NotFound):
        permissions.change_rule(shop.ada, second["id"], {"enabled": True})


@pytest.mark.parametrize(
    "data", [{"action": "perhaps"}, {"pattern": "a; b"}, {"server_id": "nowhere"}]
)
def test_a_rule_that_cannot_be_is_refused(shop, data):
    with pytest.raises(Invalid):
        rule(shop, **({"action": "allow"} | data))
    assert permissions.list_rules(shop.vera, [shop.project("shop")["id"]]) == []


def test_rules_of_one_project_server_or_agent_hold_there_only(shop):
    rule(shop, "allow", "git push", server_id=shop.servers["other"])
    rule(shop, "allow", "git push", agent="codex")
    permissions.add_rule(
        shop.stranger, {"project_id": shop.project("other")["id"], "action": "allow"}
    )
    assert asked(shop, ask(shop))["status"] == "pending"
    assert asked(shop, ask(shop, agent="codex"))["status"] == "allowed"


def test_agents_get_changed_rules_once_with_the_engine(shop):
    rule(shop, "deny", "rm -rf *")
    rule(shop, "deny", "mkfs *")
    frames = wire.pending_commands(shop.servers["dev"], {}, 0.0)
    [frame] = [f for f in frames if f["type"] == "rules_changed"]
    assert [r["pattern"] for r in frame["rules"]["rules"]] == ["rm -rf *", "mkfs *"]
    assert frame["rules"]["etag"] == wire.rules_of(shop.servers["dev"])["etag"]
    engine = {}
    exec(frame["rules"]["engine"], engine)
    request = {"tool": "Bash", "input": {"command": "rm -rf /"}, "directory": "/", "agent": "x"}
    request |= frame["rules"]["origin"] | {"home": None}
    assert engine["judge"](frame["rules"]["rules"], request)["decision"] == "deny"


def test_a_rule_is_tried_without_any_effect(shop):
    made = rule(shop, "deny", "rm -rf *")
    call = {"tool": "Bash", "input": permissions.input_of("Bash", "ls && rm -rf /")}
    call |= {"directory": "/", "agent": None, "server_id": None, "home": None}
    call["project_id"] = shop.project("shop")["id"]
    verdict = permissions.try_rules(shop.vera, call)
    assert (verdict["decision"], verdict["rule"]["id"]) == ("deny", made["id"])
    assert [p["decision"] for p in verdict["parts"]] == ["ask", "deny"]
    assert permissions.list_requests([shop.project("shop")["id"]]) == []
    with pytest.raises(NotFound):
        permissions.try_rules(shop.stranger, call)


def test_the_first_hub_has_rules_that_deny_what_nobody_wants(app):
    found = permissions.list_rules(HUB, [])
    assert {r["action"] for r in found} >= {"deny"}
    permissions.begin()
    assert len(permissions.list_rules(HUB, [])) == len(found)


# ── public daemons ────────────────────────────────────────────────────────────────────────────


def test_a_public_daemon_gets_what_denies_narrow_rules_first(shop):
    everywhere = rule(shop, "deny", "rm -rf *", by=shop.root, project_id=None)
    here = rule(shop, "deny", "mkfs *", server_id=shop.servers["dev"])
    rule(shop, "allow", "git *")
    rule(shop, "ask", "sudo *")
    told = permissions.rules_for_daemon(shop.key("dev"))
    assert [r["id"] for r in told] == [here["id"], everywhere["id"]]
    assert [r["scope_type"] for r in told] == ["server", "tenant"]
    assert {r["action"] for r in told} == {"deny"}
    assert [r["id"] for r in permissions.rules_for_daemon(shop.key("other"))] == [everywhere["id"]]


def test_a_public_daemons_log_is_kept_and_what_it_asks_is_an_alert(shop):
    entry = {"session_id": shop.session["id"], "tool_name": "Bash", "agent_name": "claude"}
    entry |= {"tool_input": {"command": "make"}, "matched_rule_id": None, "reason": None}
    kept = permissions.take_log(
        shop.key("dev"),
        [entry | {"decision": "denied"}, entry | {"decision": "asked"}, {"decision": "asked"}, 7],
    )
    assert kept == 2
    logged = permissions.list_requests([shop.project("shop")["id"]])
    assert [p["status"] for p in logged] == ["withdrawn", "denied"]
    [alert] = alerts.waiting([shop.project("shop")["id"]])
    assert (alert["kind"], "answer in its terminal" in alert["sentence"]) == ("prompt", True)
    permissions.take_log(shop.key("dev"), [entry | {"decision": "allowed"}])
    assert alerts.waiting([shop.project("shop")["id"]]) == []
    assert permissions.take_log(shop.key("other"), [entry | {"decision": "denied"}]) == 0
