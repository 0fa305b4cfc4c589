"""The pages of permission requests, rules, plans and alerts in a real Chromium."""

import uuid

import pytest
from playwright.sync_api import expect

import pages_permissions
import words
from browsing import live, press
from test_pages_access import LOOKS, barriers
from test_pages_browser import forgive
from test_pages_settings import person
from test_wire import Agent

PLAN = "# Plan\n\n1. [read](https://e.org/)\n\n|a|b|\n|-|-:|\n|1|2|\n\n> so `be` it\n\n    code\n"
PUSH = {"command": "git push origin main", "description": "Push the branch"}


class Worker:
    """A server spoken for by hand, with a worker's session and what it asks."""

    def __init__(self, hub, **task):
        self.hub = hub
        self.key = hub.register("dev")["api_key"]
        self.agent = Agent(self._post)
        self.agent.connect()
        fields = {"title": "Release the shop", "profile": "claude"} | task
        self.task = hub.api("POST", "tasks", fields)["id"]
        hub.api("POST", f"tasks/{self.task}/assign", {"server": "dev"})
        self.session = self._begin()

    def _post(self, body):
        answer = self.hub.ask("POST", "server/poll", body, key=self.key)
        return answer.status_code, answer.json()

    def _begin(self) -> str:
        while not self.agent.commands:
            self.agent.call(wait=1)
        session = self.agent.begin(self.agent.commands[0])
        self.agent.commands.clear()
        return session

    def say(self, frame_type: str, **fields) -> None:
        frame = self.agent.spool(frame_type, session_id=self.session)
        self.agent.call(frame | fields)

    def ask(self, tool: str = "Bash", given: dict = PUSH, **more) -> str:
        """Ask for a permission; the request's id."""
        request_id = str(uuid.uuid4())
        fields = {"agent": "claude", "via": "hook", "directory": "/srv/core"} | more
        self.say("permission_requested", request_id=request_id, tool=tool, input=given, **fields)
        return request_id

    def heard(self, kind: str) -> list[dict]:
        """The commands of this kind that the hub has sent."""
        self.agent.call()
        return [c for c in self.agent.commands if c["type"] == kind]

    def asked(self, request_id: str) -> dict:
        return self.hub.api("GET", f"permissions/{request_id}")


@pytest.fixture
def worker(shop):
    return Worker(shop)


@pytest.fixture
def page(open_browser):
    return open_browser()


def card(page, request_id: str):
    return page.locator(f"#wait-{request_id}")


def inbox(page):
    page.goto("/inbox")
    return live(page)


# ── deciding ──────────────────────────────────────────────────────────────────────────────────


def test_a_request_arrives_and_is_allowed_with_one_key(worker, page):
    inbox(page)
    request_id = worker.ask()
    asks = card(page, request_id)
    expect(asks.locator("pre.call")).to_have_text("git push origin main")
    for said in ("Bash", "/srv/core", "Release the shop", "dev", "claude", "Push the branch"):
        expect(asks).to_contain_text(said)
    expect(asks).to_contain_text("given the answer directly")
    expect(page).to_have_title("(1) Inbox · Orchestratia")
    press(page, "a")  # nothing has the focus yet
    press(page, "j Enter")  # opens its task, decides nothing
    expect(page).to_have_url(f"{worker.hub.url}/tasks/{worker.task}")
    assert worker.asked(request_id)["status"] == "pending"
    inbox(page)
    press(page, "j a")
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    expect(page).to_have_title("Inbox · Orchestratia")
    lately = page.get_by_role("region", name="Answered lately")
    expect(lately).to_contain_text("allowed Bash: git push origin main")
    stands = worker.asked(request_id)
    assert (stands["status"], stands["scope"], stands["decided_by"]) == ("allowed", "once", "admin")
    [answer] = worker.heard("permission_answer")
    assert (answer["request_id"], answer["decision"]) == (request_id, "allow")


CHOICES = {
    "questions": [
        {
            "question": "Which way of <b>signing in</b>?",
            "header": "Auth",
            "options": [
                {"label": "JWT", "description": "Stateless tokens"},
                {"label": "Cookies", "description": "Sessions in the database"},
            ],
        },
        {
            "question": "Which clients?",
            "multiSelect": True,
            "options": [{"label": "web"}, {"label": "phone"}, {"label": "desk"}],
        },
    ]
}


def test_a_question_is_answered_by_choices_or_own_words(worker, page, problems):
    inbox(page)
    request_id = worker.ask("AskUserQuestion", CHOICES, asks="question")
    asks = card(page, request_id)
    first = asks.get_by_role("group", name="Which way of <b>signing in</b>?")
    expect(first).to_contain_text("Sessions in the database")
    asks.get_by_role("button", name="Answer", exact=True).click()
    expect(asks.get_by_role("alert").first).to_contain_text("give an answer to each")
    forgive(problems, 422)
    first.get_by_label("JWT").check()
    second = asks.get_by_role("group", name="Which clients?")
    second.get_by_label("web").check()
    second.get_by_label("desk").check()
    asks.get_by_role("button", name="Answer", exact=True).click()
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    lately = page.get_by_role("region", name="Answered lately")
    expect(lately).to_contain_text("answered: JWT; web, desk by admin")
    [answer] = worker.heard("permission_answer")
    assert sorted(answer["answers"].values()) == ["JWT", "web, desk"]
    other = worker.ask("AskUserQuestion", {"questions": CHOICES["questions"][:1]}, asks="question")
    card(page, other).get_by_label("In your own words").fill("Passkeys")
    card(page, other).get_by_label("In your own words").press("Enter")
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    assert list(worker.asked(other)["answers"].values()) == ["Passkeys"]


def test_an_agents_own_plan_is_approved_or_sent_back(worker, page):
    inbox(page)
    request_id = worker.ask("ExitPlanMode", {"plan": PLAN}, asks="plan", via="screen")
    asks = card(page, request_id)
    expect(asks).to_contain_text("Plan to approve")
    expect(asks.get_by_role("link", name="read")).to_be_visible()
    expect(asks.get_by_role("button", name="For this session")).to_have_count(0)
    asks.get_by_label("Reason of a denial").fill("smaller steps")
    asks.get_by_role("button", name="Send it back").click()
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    stands = worker.asked(request_id)
    assert (stands["status"], stands["reason"]) == ("denied", "smaller steps")


def test_a_denial_carries_its_reason_and_enter_in_it_denies(worker, page):
    request_id = worker.ask()
    inbox(page)
    press(page, "j r")
    page.keyboard.type("not on a Friday")
    page.keyboard.press("Enter")
    expect(card(page, request_id)).to_have_count(0)
    stands = worker.asked(request_id)
    assert (stands["status"], stands["reason"]) == ("denied", "not on a Friday")
    expect(page.get_by_role("region", name="Answered lately")).to_contain_text("not on a Friday")


def test_what_is_answered_elsewhere_goes_at_once_and_is_not_lost(worker, page):
    first, second = worker.ask(), worker.ask(given={"command": "make deploy"})
    inbox(page)
    worker.hub.api("POST", f"permissions/{first}/decide", {"decision": "deny"})
    expect(card(page, first)).to_have_count(0)
    worker.say("permission_ended", request_id=second, where="in the terminal")
    expect(card(page, second)).to_have_count(0)
    lately = page.get_by_role("region", name="Answered lately")
    expect(lately).to_contain_text("denied Bash: git push origin main by admin")
    expect(lately).to_contain_text("Bash settled in the terminal: make deploy")


def test_a_grant_for_the_session_is_shown_there_and_taken_back(worker, page):
    worker.ask()
    inbox(page)
    page.get_by_role("button", name="For this session").click()
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    again = worker.ask()
    page.goto(f"/sessions/{worker.session}")
    live(page)
    page.get_by_text("1 granted, 2 asked").click()
    expect(page.locator(f"#request-{again}")).to_contain_text("granted by admin")
    page.get_by_role("button", name="Take back").click()
    expect(page.get_by_role("button", name="Take back")).to_have_count(0)
    assert worker.hub.api("GET", f"sessions/{worker.session}/grants") == {"grants": []}


def test_always_makes_a_rule_of_the_pattern_that_is_shown(worker, page):
    worker.ask()
    inbox(page)
    page.get_by_text("Always…").click()
    pattern = page.get_by_label("Pattern")
    expect(pattern).to_have_value("git push origin main")
    pattern.fill("git push *")
    page.get_by_role("button", name="Allow always").click()
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    request_id = worker.ask(given={"command": "git push --tags"})
    stands = worker.asked(request_id)
    assert (stands["status"], stands["decided_by"][:5]) == ("allowed", "rule:")
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    page.goto("/permissions")
    page.locator(f"#request-{request_id}").get_by_role("link", name="a rule").click()
    rule = page.locator(f"#rule-{stands['rule_id']}")
    expect(rule).to_contain_text("git push *")
    expect(rule).to_be_in_viewport()


def test_rights_show_what_may_be_done(worker, shop, open_browser, problems):
    request_id = worker.ask()
    looker, operator = (
        inbox(open_browser(person(shop, name, role)))
        for name, role in (("vera", "viewer"), ("olga", "operator"))
    )
    expect(card(looker, request_id).get_by_role("button")).to_have_count(0)
    expect(operator.get_by_text("Always…")).to_have_count(0)
    operator.goto("/rules")
    expect(operator.get_by_text("Add a rule")).to_have_count(0)
    expect(operator.get_by_role("button", name="Remove")).to_have_count(0)
    inbox(operator)
    shop.api("POST", f"permissions/{request_id}/decide", {"decision": "allow"})
    expect(card(operator, request_id)).to_have_count(0)


def test_an_edit_is_shown_line_by_line_and_a_long_command_says_how_long_it_is(worker, page):
    edit = {
        "file_path": "/srv/core/app.py",
        "old_string": "import os\nDEBUG = True\n",
        "new_string": "import os\nDEBUG = False\n<b>x</b>\n",
    }
    first = worker.ask("Edit", edit)
    script = "\n".join(f"echo {n}" for n in range(200)) + "\nrm -rf build"
    second = worker.ask(given={"command": script})
    inbox(page)
    diff = card(page, first).locator(".diff")
    expect(diff.locator(".removed")).to_have_text(["- DEBUG = True\n"])
    expect(diff.locator(".added")).to_have_text(["+ DEBUG = False\n", "+ <b>x</b>\n"])
    asks = card(page, second)
    expect(asks.locator("pre.call").first).not_to_contain_text("rm -rf build")
    asks.get_by_text("All of it: 201 lines").click()
    expect(asks.locator("pre.call").last).to_contain_text("rm -rf build")
    expect(asks.locator("pre.call").last).to_be_visible()


def test_alerts_are_read_and_dismissed(worker, page):
    worker.say("session_activity", state="quota", reason="limit until 15:00", signal="screen quota")
    request_id = worker.ask()
    worker.hub.api("POST", f"permissions/{request_id}/decide", {"decision": "allow"})
    worker.say("agent_event", kind="delivery_unknown", command="permission_answer", why="it ended")
    inbox(page)
    expect(page.locator(".wait")).to_have_count(2)
    expect(page.get_by_text("stands at a usage limit: limit until 15:00")).to_be_visible()
    expect(page.get_by_text("may or may not have reached")).to_be_visible()
    page.get_by_role("button", name="Dismiss").first.click()
    expect(page.locator(".wait")).to_have_count(1)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_text("Nothing waits for you")).to_be_visible()
    assert worker.hub.api("GET", "alerts?status=open") == {"alerts": []}


# ── where sessions, tasks and projects speak of it ────────────────────────────────────────────


def test_a_session_says_why_it_is_said_to_do_what_it_does(shop, page):
    worker = Worker(shop, mode="bypassPermissions")
    signals = [
        {"name": "hook Stop", "says": "its turn is over", "at": 1.8e9, "decided": True},
        {"name": "title", "says": None, "at": None, "silent": True, "decided": False},
    ]
    page.goto("/sessions")
    row = page.locator(f"#session-{worker.session}")
    expect(row).to_contain_text("bypassPermissions")
    page.goto(f"/sessions/{worker.session}")
    live(page)
    worker.say("session_activity", state="idle", reason="its turn is over", signals=signals)
    expect(page.get_by_text("Nothing is asked in this mode")).to_be_visible()
    page.get_by_text("Why it says so").click()
    table = page.get_by_role("table", name="Signals")
    expect(table.locator("tbody tr").first).to_contain_text("hook Stop · decides")
    expect(table.locator("tbody tr").last).to_contain_text("silent")


def test_a_task_keeps_its_questions_requests_and_rounds_of_plans(shop, page):
    worker = Worker(shop, require_plan=True)
    made = f"tasks/{worker.task}"
    shop.api("POST", f"{made}/plan", {"plan": "# First\n\n<img src=x onerror=alert(1)>"})
    shop.api("POST", f"{made}/plan/revise", {"feedback": "Say how it is tested."})
    shop.api("POST", f"{made}/plan", {"plan": "Second, with *tests*"})
    shop.api("POST", f"{made}/plan/approve", {})
    asked = shop.api("POST", f"{made}/help", {"question": "Which port?"})
    shop.api("POST", f"interventions/{asked['id']}/respond", {"response": "8080"})
    request_id = worker.ask()
    shop.api("POST", f"permissions/{request_id}/decide", {"decision": "deny", "reason": "later"})
    page.goto(f"/{made}")
    questions = page.get_by_role("region", name="Questions")
    expect(questions).to_contain_text("8080")
    expect(questions).to_contain_text("on its way to the session's terminal")
    told = {"kind": "typed", "command": "intervention_response", "intervention_id": asked["id"]}
    worker.say("agent_event", **told)
    page.reload()
    expect(questions).to_contain_text("typed into the session's terminal")
    expect(page.get_by_role("region", name="Permissions")).to_contain_text("by admin: later")
    plans = page.get_by_role("region", name="Plan", exact=True)
    expect(plans.locator("em")).to_have_text("tests")
    plans.get_by_text("Version 1").click()
    expect(plans).to_contain_text("Say how it is tested.")
    expect(plans.get_by_role("heading", name="First")).to_be_visible()
    expect(plans.locator("img")).to_have_count(0)


def test_a_task_is_made_for_a_coding_agent_its_model_and_mode(shop, page):
    page.goto("/tasks/new")
    page.get_by_label("Title").fill("Write the parser")
    page.get_by_label("Worker", exact=True).select_option("claude")
    page.get_by_label("Model").fill("opus")
    page.get_by_label("Permission mode").select_option("acceptEdits")
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Write the parser")
    [made] = shop.api("GET", "tasks")["tasks"]
    assert (made["profile"], made["model"], made["mode"]) == ("claude", "opus", "acceptEdits")
    page.get_by_role("link", name="Change", exact=True).click()
    page.get_by_label("Model").fill("")
    page.get_by_label("Permission mode").select_option("plan")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("main")).to_contain_text("claude · plan")
    changed = shop.api("GET", f"tasks/{made['id']}")
    assert (changed["profile"], changed["model"], changed["mode"]) == ("claude", None, "plan")


def test_a_project_has_its_own_prompt_and_a_wrong_one_is_refused_at_its_field(shop, page, problems):
    page.goto("/projects")
    live(page).get_by_text("Change", exact=True).click()
    page.get_by_label("Worker of tasks that name none").select_option("codex")
    page.get_by_label("Model of its coding agent").fill("o9")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".cards")).to_contain_text("codex · o9")
    prompt = page.get_by_label("Prompt of its workers")
    prompt.fill("Do {{ spec }} for {{ nobody }}. {{ report }}")
    page.get_by_role("button", name="Use this prompt").click()
    expect(page.get_by_role("alert").filter(has_text="unknown names (nobody)")).to_be_visible()
    forgive(problems, 422)
    prompt.fill("Do {{ spec }}. {{ report }}")
    page.get_by_role("button", name="Use this prompt").click()
    expect(page.get_by_role("alert").filter(has_text="nobody")).to_have_count(0)
    page.reload()
    expect(page.locator("textarea[name=prompt]")).to_have_value("Do {{ spec }}. {{ report }}")
    [stands] = shop.api("GET", "projects")["projects"]
    assert stands["settings"] == {"model": "o9", "prompt": "Do {{ spec }}. {{ report }}"}


# ── rules and the log ─────────────────────────────────────────────────────────────────────────


def test_rules_are_added_moved_switched_off_tried_and_removed(shop, page):
    page.goto("/rules")
    live(page)
    page.get_by_text("Add a rule").click()
    for action, pattern in (("allow", "git *"), ("ask", "git push *")):
        page.get_by_label("It says").select_option(action)
        page.get_by_label("Pattern").fill(pattern)
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.locator(".rules li").filter(has_text=pattern)).to_have_count(1)
    verdict = page.locator("#verdict")
    page.get_by_label("What it would run").fill("git status && git push origin")
    page.get_by_role("button", name="Try it").click()
    expect(verdict).to_contain_text("Allowed")
    expect(verdict.locator("li")).to_have_count(2)
    asks = page.locator(".rules li").filter(has_text="git push *")
    asks.get_by_role("button", name="Up").click()
    expect(page.locator(".rules li").filter(has_text="git").first).to_contain_text("git push *")
    page.get_by_role("button", name="Try it").click()
    expect(verdict).to_contain_text("A person is asked")
    asks.get_by_role("button", name="Turn off").click()
    expect(asks).to_contain_text("off")
    page.get_by_role("button", name="Try it").click()
    expect(verdict).to_contain_text("Allowed")
    page.on("dialog", lambda dialog: dialog.accept())
    asks.get_by_role("button", name="Remove").click()
    expect(asks).to_have_count(0)
    page.get_by_label("What it would run").fill("sudo rm -rf /")
    page.get_by_role("button", name="Try it").click()
    expect(verdict).to_contain_text("Denied")
    expect(verdict).to_contain_text("deletes the system")


def test_a_rule_that_cannot_be_is_refused_at_its_form(shop, page, problems):
    page.goto("/rules")
    page.get_by_text("Add a rule").click()
    page.get_by_label("Pattern").fill("make && make install")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#add-rule [role=alert]")).to_contain_text("make a rule for each")
    forgive(problems, 422)


def test_the_log_is_filtered_and_paged(worker, page):
    for number in range(3):
        worker.ask(given={"command": f"make step{number}"})
    denied = worker.ask("WebFetch", {"url": "https://example.org/"})
    worker.hub.api("POST", f"permissions/{denied}/decide", {"decision": "deny", "reason": "no"})
    page.goto("/permissions")
    expect(page.locator(".requests li")).to_have_count(4)
    page.get_by_label("Decision").select_option("denied")
    expect(page.locator(".requests li")).to_have_count(1)
    expect(page.locator(".requests li")).to_contain_text("by admin: no")
    page.goto("/permissions?q=step1")
    expect(page.locator(".requests li")).to_have_count(1)
    page.goto("/permissions?session=" + worker.session + "&q=none+of+it")
    expect(page.get_by_text("Nothing fits")).to_be_visible()


# ── for everybody ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_where_requests_wait(shop, open_browser, look):
    worker = Worker(shop, mode="bypassPermissions", require_plan=True)
    shop.api("POST", f"tasks/{worker.task}/plan", {"plan": PLAN})
    worker.ask("Edit", {"file_path": "/a.py", "old_string": "a\nb", "new_string": "a\nc"})
    worker.ask("Write", {"file_path": "/b.py", "content": "line\n" * 50})
    worker.ask("AskUserQuestion", CHOICES, asks="question")
    worker.ask(given={"command": "echo 1\n" * 50}, via="screen")
    granted, refused = worker.ask(), worker.ask(given={"command": "x" * 400})
    shop.api("POST", f"permissions/{granted}/decide", {"decision": "allow", "scope": "session"})
    shop.api("POST", f"permissions/{refused}/decide", {"decision": "deny", "reason": "no"})
    worker.say("agent_event", kind="not_delivered", command="permission_answer", why="it ended")
    worker.say("session_activity", state="idle", signals=[{"name": "title", "silent": True}])
    page = open_browser(**LOOKS[look])
    found = []
    for address in ("inbox", "rules", "permissions", f"sessions/{worker.session}", "sessions"):
        page.goto(f"/{address}")
        live(page)
        page.evaluate("document.querySelectorAll('main details').forEach((d) => (d.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
        found += barriers(page, look)
    assert not found


# ── without a browser ─────────────────────────────────────────────────────────────────────────


def test_what_an_edit_changes():
    changes = words.changes_of
    assert changes({"command": "ls"}) == []
    assert changes({"content": "a\nb"}) == [("+", "a"), ("+", "b")]
    edits = [{"old_string": "a", "new_string": "b"}, {"old_string": "c", "new_string": ""}]
    assert changes({"edits": edits}) == [("-", "a"), ("+", "b"), ("@", ""), ("-", "c")]
    patch = "*** Begin Patch\n*** Update File: a.py\n@@\n-old\n+new\n same\n*** End Patch"
    marks = [mark for mark, _ in changes({"input": patch})]
    assert marks == ["@", "@", "@", "-", "+", " ", "@"]
    for odd in ({"edits": "x"}, {"edits": [1, {}]}, {"old_string": 1, "new_string": 2}):
        assert changes(odd) == []


def test_a_long_text_begins_and_a_short_one_is_whole():
    begin = pages_permissions.beginning_of
    assert begin("a\nb") == "a\nb"
    assert begin("x\n" * 100) == "x\n" * 9 + "x"
    assert begin("y" * 5000) == "y" * pages_permissions.BEGINNING_MOST
