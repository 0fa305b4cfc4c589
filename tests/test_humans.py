"""Humans in the loop with real parts: hub, agent, tmux, a stand-in coding agent with its hooks."""

import base64
import json
import uuid

import pytest

import agent
from conftest import wait_until
from standin import happened, install

GIT = {"tool": "Bash", "input": {"command": "git push origin main"}}


class Stand:
    """A server with stand-in coding agents, and what one asks through the API."""

    def __init__(self, hub, agent, folder):
        self.hub, self.agent, self.folder = hub, agent, folder

    def begin(self, *steps, profile="claude", **fields) -> dict:
        """Run a worker of the profile through these steps; its task."""
        self.record = install(self.folder, list(steps), ("claude", "codex", "gemini", "aider"))
        wait_until(lambda: profile in self.hub.api("GET", "servers/dev")["profiles"])
        made = {"title": "Do it", "profile": profile, "auto_assign": True} | fields
        self.task = self.hub.api("POST", "tasks", made)
        self.session_id = wait_until(lambda: self.look()["session_id"])
        return self.task

    def look(self) -> dict:
        return self.hub.api("GET", f"tasks/{self.task['id']}")

    def session(self) -> dict:
        return self.hub.api("GET", f"sessions/{self.session_id}")

    def activity(self, wanted: str) -> dict:
        return wait_until(lambda: (s := self.session())["activity"] == wanted and s)

    def asked(self, status="pending") -> dict:
        """The one permission request of that status."""

        def found():
            listed = self.hub.api(
                "GET", f"permissions?session_id={self.session_id}&status={status}"
            )
            return listed["permissions"]

        [one] = wait_until(found)
        return one

    def decide(self, request: dict, decision="allow", **more) -> dict:
        said = {"decision": decision} | more
        return self.hub.api("POST", f"permissions/{request['id']}/decide", said)

    def answered(self) -> dict:
        [one] = wait_until(lambda: happened(self.record, "answered"))
        return one

    def submitted(self) -> list[str]:
        return [entry["text"] for entry in happened(self.record, "submitted")]

    def alerts(self) -> list[dict]:
        return self.hub.api("GET", "alerts?status=open")["alerts"]


@pytest.fixture
def stand(shop, start_agent, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    install(folder, [], ("claude", "codex", "gemini", "aider"))
    (tmp_path / "dev").mkdir()
    for name in (".profile", ".bash_profile", ".zprofile"):
        (tmp_path / "dev" / name).write_text(f'export PATH="{folder}:$PATH"\n')
    return Stand(shop, start_agent(shop, "dev"), folder)


# ── permission prompts ────────────────────────────────────────────────────────────────────────


def test_claude_asks_and_the_hook_brings_the_answer(stand):
    stand.begin(GIT)
    request = stand.asked()
    assert (request["tool"], request["subject"]) == ("Bash", "git push origin main")
    assert (request["via"], request["agent"]) == ("hook", "claude")
    assert stand.activity("blocked:permission")["reason"] == "Bash waits for an answer"
    stand.decide(request)
    answer = stand.answered()
    assert (answer["by"], answer["decision"]) == ("hook", "allow")
    wait_until(lambda: stand.asked("allowed")["delivery"] == "delivered")
    stand.activity("idle")
    said = {}

    def title_was_read():  # which is done now and then
        said.update(stand.hub.api("GET", f"sessions/{stand.session_id}/explain"))
        return not next(s["silent"] for s in said["signals"] if s["name"] == "title")

    wait_until(title_was_read)
    assert (said["signal"], said["reason"]) == ("hook Stop", "its turn is over")
    assert next(s["decided"] for s in said["signals"] if s["name"] == "hook Stop")
    assert len(happened(stand.record, "answered")) == 1
    assert happened(stand.record, "stray") == []


def test_a_denial_reaches_claude_with_its_reason(stand):
    stand.begin(GIT)
    stand.decide(stand.asked(), "deny", reason="not on a Friday")
    answer = stand.answered()
    assert (answer["by"], answer["decision"], answer["message"]) == (
        "hook",
        "deny",
        "not on a Friday",
    )


@pytest.mark.parametrize("decision", ["allow", "deny"])
@pytest.mark.parametrize("profile", ["codex", "gemini", "aider"])
def test_where_a_hook_cannot_answer_a_key_does(stand, profile, decision):
    tool = {"tool": "run_shell_command" if profile == "gemini" else "shell"}
    stand.begin(GIT | tool, profile=profile)
    request = stand.asked()
    assert request["subject"] == "git push origin main"
    stand.activity("blocked:permission")
    wait_until(lambda: "git push" in "\n".join(screen(stand)))
    stand.decide(request, decision)
    answer = stand.answered()
    assert (answer["by"], answer["decision"]) == ("key", decision)
    status = {"allow": "allowed", "deny": "denied"}[decision]
    wait_until(lambda: stand.asked(status)["delivery"] == "delivered")
    assert happened(stand.record, "stray") == []


@pytest.mark.parametrize("profile", ["codex", "gemini"])
def test_the_reason_of_a_denial_by_key_is_typed_after_it(stand, profile):
    tool = {"tool": "run_shell_command" if profile == "gemini" else "shell"}
    stand.begin(GIT | tool, {"wait": True}, profile=profile)
    request = stand.asked()
    wait_until(lambda: "git push" in "\n".join(screen(stand)))
    stand.decide(request, "deny", reason="not on a Friday")
    assert stand.answered()["decision"] == "deny"
    wait_until(lambda: "Denied by admin: not on a Friday" in stand.submitted())
    assert happened(stand.record, "stray") == []
    assert stand.alerts() == []


CHOICE = {
    "tool": "AskUserQuestion",
    "input": {
        "questions": [
            {
                "question": "Which way of signing in?",
                "header": "Auth",
                "multiSelect": False,
                "options": [
                    {"label": "JWT", "description": "Stateless"},
                    {"label": "Session cookies", "description": ""},
                ],
            }
        ]
    },
}
PLAN = {"tool": "ExitPlanMode", "input": {"plan": "1. Write the test\n2. Mend the parser"}}


def test_a_question_to_choose_from_is_answered_from_afar(stand):
    stand.begin(CHOICE)
    asked = stand.asked()
    assert (asked["asks"], asked["subject"]) == ("question", "Which way of signing in?")
    stand.activity("blocked:question")
    bare = stand.hub.ask("POST", f"permissions/{asked['id']}/decide", {"decision": "allow"})
    assert (bare.status_code, bare.json()["code"]) == (422, "invalid")
    decided = stand.decide(asked, answers=["JWT"])
    assert decided["answers"] == {"Which way of signing in?": "JWT"}
    answer = stand.answered()
    assert (answer["by"], answer["decision"]) == ("hook", "allow")
    given = CHOICE["input"] | {"answers": {"Which way of signing in?": "JWT"}}
    assert answer["message"] == given
    wait_until(lambda: stand.asked("allowed")["delivery"] == "delivered")
    stand.activity("idle")
    assert happened(stand.record, "stray") == []


def test_a_question_answered_in_the_terminal_waits_no_more(stand):
    stand.begin(CHOICE)
    asked = stand.asked()
    wait_until(lambda: "Which way" in "\n".join(screen(stand)))
    type_keys(stand, base64.b64encode(b"2").decode())
    assert stand.answered()["decision"] == "Session cookies"
    assert stand.asked("withdrawn")["id"] == asked["id"]
    stand.activity("idle")


def test_a_question_is_declined_with_a_reason(stand):
    stand.begin(CHOICE)
    stand.decide(stand.asked(), "deny", reason="decide yourself")
    answer = stand.answered()
    assert (answer["decision"], answer["message"]) == ("deny", "decide yourself")


def test_no_rule_answers_a_question_or_approves_a_plan(stand):
    for tool in ("AskUserQuestion", "ExitPlanMode"):
        stand.hub.api("POST", "rules", {"tool": tool, "action": "allow", "project": "shop"})
    stand.begin(CHOICE, PLAN)
    stand.decide(stand.asked(), answers=["JWT"])
    plan = wait_until(lambda: (p := stand.asked())["asks"] == "plan" and p)
    assert plan["subject"] == "1. Write the test\n2. Mend the parser"
    assert len(happened(stand.record, "answered")) == 1


@pytest.mark.parametrize("decision", ["allow", "deny"])
def test_claudes_own_plan_is_decided_by_key(stand, decision):
    stand.begin(PLAN, {"wait": True})
    plan = stand.asked()
    stand.activity("blocked:plan")
    wait_until(lambda: stand.asked()["via"] and "Would you like" in "\n".join(screen(stand)))
    stand.decide(plan, decision, **({"reason": "Smaller steps"} if decision == "deny" else {}))
    answer = stand.answered()
    assert (answer["by"], answer["decision"]) == ("key", decision)
    if decision == "deny":
        wait_until(lambda: "Denied by admin: Smaller steps" in stand.submitted())
    assert happened(stand.record, "stray") == []
    assert stand.alerts() == []


def screen(stand) -> list[str]:
    return stand.hub.api("GET", f"sessions/{stand.session_id}/screen")["lines"]


def type_keys(stand, text: str) -> None:
    stand.hub.api("POST", f"sessions/{stand.session_id}/input", {"data": text})


def test_an_answer_at_the_terminal_withdraws_the_request(stand):
    stand.begin(GIT)
    request = stand.asked()
    type_keys(stand, base64.b64encode(b"1").decode())
    assert stand.answered()["by"] == "key"
    withdrawn = stand.asked("withdrawn")
    assert (withdrawn["id"], withdrawn["answered_where"]) == (request["id"], "in the terminal")
    late = stand.hub.ask("POST", f"permissions/{request['id']}/decide", {"decision": "deny"})
    assert (late.status_code, late.json()["code"]) == (409, "withdrawn")
    stand.activity("idle")


def test_rules_allow_and_deny_without_anybody(stand):
    for action, pattern in (("allow", "git status"), ("deny", "git push *")):
        rule = {"tool": "Bash", "pattern": pattern, "action": action, "project": "shop"}
        stand.hub.api("POST", "rules", rule)
    status = {"tool": "Bash", "input": {"command": "git status"}}
    stand.begin(status, GIT)
    wait_until(lambda: len(happened(stand.record, "answered")) == 2)
    first, second = happened(stand.record, "answered")
    assert (first["by"], first["decision"]) == ("hook", "allow")
    assert (second["by"], second["decision"]) == ("guard", "deny")  # before it was even asked
    logged = stand.hub.api("GET", f"permissions?session_id={stand.session_id}")["permissions"]
    assert [p["status"] for p in logged] == ["denied", "allowed"]
    assert all(p["decided_by"].startswith("rule:") for p in logged)


def test_a_grant_for_the_session_answers_the_next_time(stand):
    stand.begin(GIT, GIT)
    stand.decide(stand.asked(), scope="session")
    wait_until(lambda: len(happened(stand.record, "answered")) == 2)
    assert [e["decision"] for e in happened(stand.record, "answered")] == ["allow", "allow"]
    listed = stand.hub.api("GET", f"permissions?session_id={stand.session_id}")["permissions"]
    assert [p["decided_by"] for p in listed] == ["grant:admin", "admin"]


def test_without_the_hub_the_terminal_asks_and_denials_still_hold(stand):
    rule = {"tool": "Bash", "pattern": "make *", "action": "deny", "project": "shop"}
    stand.hub.api("POST", "rules", rule)
    deny = {"tool": "Bash", "input": {"command": "make clean"}}
    stand.begin({"wait": True}, deny, GIT)
    stand.activity("idle")
    tmux = ["send-keys", "-t", f"={stand.session()['tmux_name']}:", "-l", "go\r"]
    stand.hub.stop()
    stand.agent.tmux(*tmux)
    [denied] = wait_until(lambda: happened(stand.record, "answered"))
    assert (denied["by"], denied["decision"]) == ("guard", "deny")
    [held] = wait_until(
        lambda: [h for h in happened(stand.record, "hook") if h["event"] == "PermissionRequest"]
    )
    assert held["printed"] == ""
    assert held["seconds"] < 4  # 2 s, and a loaded machine
    stand.hub.start()
    wait_until(stand.agent.is_online, 40)
    request = stand.asked()  # its dialog is still on the screen
    assert (request["via"], "git push" in request["subject"]) == ("screen", True)
    stand.decide(request)
    wait_until(lambda: len(happened(stand.record, "answered")) == 2)
    assert happened(stand.record, "answered")[1]["by"] == "key"


# ── answers, plans and notes reach the worker ─────────────────────────────────────────────────


def help_step(stand_task="$ORCHESTRATIA_TASK_ID", *more: str) -> dict:
    ask = f'orchestratia task help {stand_task} --type question --question "JWT or cookies?" '
    return {"shell": ["sh", "-c", ask + " ".join(more)]}


def pending(stand) -> dict:
    [one] = wait_until(lambda: stand.hub.api("GET", "interventions?status=pending"))
    return one


def respond(stand, asked: dict, text: str) -> None:
    stand.hub.api("POST", f"interventions/{asked['id']}/respond", {"response": text})


def delivery(stand, asked: dict) -> str:
    return stand.hub.api("GET", f"interventions/{asked['id']}")["delivery"]


def test_an_answer_is_typed_into_the_worker_once(stand):
    stand.begin(help_step(), {"wait": True})
    asked = pending(stand)
    stand.activity("idle")
    respond(stand, asked, "JWT, with “refresh” tokens\nand $(no) `cookies`; -x \\")
    wait_until(lambda: len(stand.submitted()) == 2)
    assert stand.submitted()[1] == (
        "Answer of admin to your question “JWT or cookies?”:\n"
        "JWT, with “refresh” tokens\nand $(no) `cookies`; -x \\"
    )
    wait_until(lambda: delivery(stand, asked) == "typed")
    assert stand.look()["status"] == "running"
    stand.activity("idle")
    assert len(stand.submitted()) == 2


def test_an_answer_to_a_waiting_call_is_returned_and_not_typed(stand):
    stand.begin(help_step("$ORCHESTRATIA_TASK_ID", "--wait"), {"wait": True})
    asked = pending(stand)
    respond(stand, asked, "cookies")
    [call] = wait_until(lambda: happened(stand.record, "shell"))
    assert (call["exit"], call["out"].strip()) == (0, "cookies")
    stand.activity("idle")
    assert delivery(stand, asked) == "returned"
    assert len(stand.submitted()) == 1


def test_an_answer_waits_while_a_dialog_would_take_it_for_keys(stand):
    stand.begin(help_step(), GIT)
    request, asked = stand.asked(), pending(stand)
    respond(stand, asked, "2")
    wait_until(lambda: delivery(stand, asked) == "sent")
    stand.activity("blocked:permission")
    assert stand.submitted()[1:] == []
    stand.decide(request)
    wait_until(lambda: len(stand.submitted()) == 2)
    assert stand.answered()["by"] == "hook"
    assert happened(stand.record, "stray") == []


def test_a_note_waits_until_the_worker_is_idle_and_an_urgent_one_interrupts(stand):
    stand.begin({"work": 3}, {"wait": True}, {"work": 2})
    stand.activity("working")
    stand.hub.api("POST", f"tasks/{stand.task['id']}/notes", {"content": "mind the gap"})
    assert happened(stand.record, "interrupted") == []
    wait_until(lambda: len(stand.submitted()) == 2)
    assert stand.submitted()[1] == "Note from admin on your task:\nmind the gap"
    assert happened(stand.record, "interrupted") == []
    stand.activity("working")
    urgent = {"content": "stop that", "urgent": True}
    stand.hub.api("POST", f"tasks/{stand.task['id']}/notes", urgent)
    wait_until(lambda: len(stand.submitted()) == 3)
    assert len(happened(stand.record, "interrupted")) == 1


def test_what_a_person_has_not_sent_yet_is_not_mixed_with_what_we_type(stand):
    stand.begin({"wait": True}, {"wait": True}, {"wait": True})
    stand.activity("idle")
    type_keys(stand, base64.b64encode(b"rewrite the").decode())
    stand.hub.api("POST", f"tasks/{stand.task['id']}/notes", {"content": "mind the gap"})
    with pytest.raises(pytest.fail.Exception):
        wait_until(lambda: len(stand.submitted()) > 1, agent.Mail.HANDS_S + 2)
    type_keys(stand, base64.b64encode(b" parser\r").decode())
    wait_until(lambda: len(stand.submitted()) == 3)
    assert stand.submitted()[1:] == [
        "rewrite the parser",
        "Note from admin on your task:\nmind the gap",
    ]


def test_a_plan_goes_round_until_it_is_approved(stand):
    submit = 'echo "# $0" > plan.md; orchestratia plan submit $ORCHESTRATIA_TASK_ID'
    submit += " --plan-file plan.md --wait"
    first, second = ({"shell": ["sh", "-c", submit, name]} for name in ("One", "Two"))
    stand.begin(first, second, require_plan=True)
    task = stand.task["id"]
    wait_until(lambda: stand.look()["status"] == "plan_review")
    prompt = stand.folder.parent / "dev" / "state" / "sessions" / stand.session_id / "files"
    assert "change nothing until the plan is approved" in (prompt / "prompt.md").read_text()
    stand.hub.api("POST", f"tasks/{task}/plan/revise", {"feedback": "say more"})
    wait_until(lambda: stand.look()["status"] == "plan_review" and len(plans(stand)) == 2)
    stand.hub.api("POST", f"tasks/{task}/plan/approve", {"comment": "go"})
    wait_until(lambda: len(happened(stand.record, "shell")) == 2)
    one, two = happened(stand.record, "shell")
    assert (one["exit"], "say more" in one["out"] + one["err"], two["exit"]) == (1, True, 0)
    assert [p["status"] for p in plans(stand)] == ["revised", "approved"]
    assert stand.look()["status"] == "running"


def plans(stand) -> list[dict]:
    return stand.hub.api("GET", f"tasks/{stand.task['id']}/plan")["plans"]


def test_a_usage_limit_is_an_alert_and_the_work_is_not_lost(stand):
    stand.begin({"quota": "Claude usage limit reached. Your limit resets at 3pm."})
    state = stand.activity("quota")
    assert "resets at 3pm" in state["reason"]
    [alert] = wait_until(stand.alerts)
    assert (alert["kind"], alert["session_id"]) == ("quota", stand.session_id)


def test_a_worker_gets_its_model_mode_and_prompt(stand):
    stand.begin(model="opus", mode="plan", spec="Write the parser")
    [started] = wait_until(lambda: happened(stand.record, "started"))
    argv = started["argv"]
    assert argv[argv.index("--model") + 1] == "opus"
    assert argv[argv.index("--permission-mode") + 1] == "plan"
    uuid.UUID(argv[argv.index("--session-id") + 1])
    [prompt] = wait_until(stand.submitted)
    path = prompt.removeprefix("Read the file ").removesuffix(
        " and carry out the task it describes."
    )
    with open(path) as file:
        assert "Write the parser" in file.read()


def test_a_mode_the_agent_does_not_have_is_refused(stand):
    stand.begin(mode="dance")
    failed = wait_until(lambda: (t := stand.look())["status"] == "failed" and t)
    events = stand.hub.api("GET", f"tasks/{failed['id']}/events")["events"]
    assert "has no mode dance" in json.dumps(events)


def test_a_conversation_is_taken_up_again(stand):
    stand.begin({"exit": 0})
    wait_until(lambda: stand.session()["status"] == "closed")
    [first] = happened(stand.record, "started")
    data = {"server_id": "dev", "resume": stand.session_id}
    assert stand.session()["resumable"]
    again = stand.hub.api("POST", "sessions", data)
    second = wait_until(lambda: happened(stand.record, "started")[1:])[0]
    assert second["argv"][second["argv"].index("--resume") + 1] == first["conversation"]
    stand.hub.api("POST", f"sessions/{again['id']}/close", {"force": True})


@pytest.mark.parametrize("policy", ["retry", "ask"])
def test_after_a_reboot_a_worker_goes_on_with_its_conversation_or_a_person_is_asked(stand, policy):
    stand.begin(on_lost=policy)
    [first] = wait_until(lambda: happened(stand.record, "started"))
    wait_until(lambda: stand.session()["status"] == "active")
    stand.agent.kill()
    stand.agent.tmux("kill-server")
    stand.agent.start()
    if policy == "ask":
        [alert] = wait_until(stand.alerts)
        assert (alert["kind"], alert["task_id"]) == ("lost", stand.task["id"])
        assert stand.look()["attempt"] == 1 and len(happened(stand.record, "started")) == 1
        stand.hub.api("POST", f"tasks/{stand.task['id']}/retry")
        wait_until(lambda: not stand.alerts())
    second = wait_until(lambda: happened(stand.record, "started")[1:])[0]
    assert second["argv"][second["argv"].index("--resume") + 1] == first["conversation"]
    said = "go on as it says"
    told = wait_until(lambda: [text for text in stand.submitted() if said in text])[-1]
    with open(told.split("the file ")[1].split(" and go")[0]) as file:
        assert "Your terminal on dev was lost while you worked" in file.read()
    assert stand.look()["attempt"] == 2 and len(happened(stand.record, "started")) == 2
