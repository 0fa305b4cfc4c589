"""The pages of tasks in a real Chromium: the list, the board, the form, one task."""

import re

import pytest
from playwright.sync_api import expect

from browsing import live
from conftest import PASSWORD
from test_pages_browser import forgive, serve, task


@pytest.fixture
def page(open_browser):
    return open_browser()


def rows_of(page):
    return page.locator("tbody tr")


def titles(page) -> list[str]:
    return rows_of(page).locator("a.title").all_inner_texts()


# ── all of them ───────────────────────────────────────────────────────────────────────────────


def test_filters_stand_in_the_address_and_go_together(shop, page):
    serve(shop)
    serve(shop, "other")
    for title, server, priority in (
        ("Fix the gateway", "dev", "high"),
        ("Fix the shop", "dev", "low"),
        ("Move the gateway", "other", "high"),
    ):
        made = task(shop, title, priority=priority)
        shop.api("POST", f"tasks/{made['id']}/assign", {"server": server})
    page.goto("/tasks")
    page.get_by_label("Server").select_option("dev")
    expect(page).to_have_url(re.compile(r"server="))
    expect(rows_of(page)).to_have_count(2)
    live(page).get_by_label("Priority", exact=True).select_option("high")
    expect(page).to_have_url(re.compile(r"priority="))
    expect(rows_of(page)).to_have_count(1)
    page.get_by_label("Text").fill("gateway")
    page.get_by_role("button", name="Filter").click()
    expect(page).to_have_url(re.compile(r"/tasks\?server=[-0-9a-f]{36}&priority=high&q=gateway$"))
    page.reload()
    assert titles(page) == ["Fix the gateway"]
    page.get_by_role("link", name="Board").click()
    expect(page.locator(".task-card")).to_have_count(1)
    expect(page.get_by_label("Text")).to_have_value("gateway")
    page.get_by_role("link", name="Clear").click()
    expect(page.locator(".task-card")).to_have_count(3)


def test_an_unknown_priority_or_server_in_the_address_is_refused(shop, page, problems):
    for address, said in (("priority=huge", "Unknown priority"), ("server=nowhere", "no server")):
        page.goto(f"/tasks?{address}")
        expect(page.locator("main")).to_contain_text(said)
    problems.clear()


def test_a_card_moves_over_the_board(shop, page):
    serve(shop)
    made = task(shop)
    page.goto("/tasks?view=board")
    column = lambda name: live(page).get_by_role("region", name=re.compile(f"^{name}"))  # noqa: E731
    expect(column("Waiting").locator(".task-card")).to_have_count(1)
    page.evaluate("window.sameDocument = true")
    shop.api("POST", f"tasks/{made['id']}/assign", {"server": "dev"})
    expect(column("Assigned").locator(".task-card")).to_have_count(1)
    shop.api("POST", f"tasks/{made['id']}/start", {})
    expect(column("Running").locator(".task-card")).to_have_count(1)
    shop.api("POST", f"tasks/{made['id']}/fail", {"error": "no disk"})
    expect(column("Failed").locator(".task-card")).to_contain_text("failed")
    assert page.evaluate("window.sameDocument")


def test_a_column_shows_its_newest_and_leads_to_the_others(shop, page):
    tasks = [{"id": f"t{n}", "title": f"Task {n}"} for n in range(60)]
    shop.api("POST", "pipelines", {"name": "many", "tasks": tasks})
    page.goto("/tasks?view=board")
    waiting = page.get_by_role("region", name="Waiting")
    expect(waiting.locator(".task-card")).to_have_count(50)
    expect(waiting.locator(".task-card").first).to_contain_text("Task 59")
    expect(waiting.get_by_role("heading")).to_have_text("Waiting 50+")
    waiting.get_by_role("link", name="All in the table").click()
    expect(rows_of(page)).to_have_count(60)


def test_several_tasks_are_changed_at_once_and_each_refusal_is_said(shop, page):
    serve(shop)
    for title in ("One", "Two", "Three"):
        task(shop, title)
    ended = task(shop, "Ended")
    shop.api("DELETE", f"tasks/{ended['id']}")
    page.goto("/tasks")
    expect(page.get_by_role("button", name="Set priority")).to_be_hidden()
    for title in ("One", "Two", "Ended"):
        live(page).get_by_label(f"Pick {title}").check()
    expect(page.locator("#several-count")).to_have_text("3 picked")
    task(shop, "Comes in between")
    expect(rows_of(page)).to_have_count(5)
    expect(page.locator("#several-count")).to_have_text("3 picked")
    page.get_by_label("New priority").select_option("critical")
    page.get_by_role("button", name="Set priority").click()
    expect(page.get_by_role("alert")).to_contain_text("2 tasks changed. 1 could not be:")
    expect(page.get_by_role("alert")).to_contain_text("Ended: The task is cancelled")
    expect(page.locator(".priority-critical")).to_have_count(2)
    expect(page.locator("#several-count")).to_have_text("")
    expect(page.get_by_role("button", name="Set priority")).to_be_hidden()

    page.get_by_label("Pick all").check()
    page.get_by_label("Pick Three").uncheck()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel tasks").click()
    expect(page.get_by_role("alert")).to_contain_text("3 tasks cancelled. 1 could not be:")
    open_ones = [t["title"] for t in shop.api("GET", "tasks?status=pending")["tasks"]]
    assert open_ones == ["Three"]

    page.get_by_label("Pick One").check()
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_have_text("1 task opened again.")
    page.get_by_label("Pick Three").check()
    page.get_by_label("Assign to").select_option("dev")
    page.get_by_role("button", name="Assign", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("1 task assigned.")
    [three] = [t for t in shop.api("GET", "tasks")["tasks"] if t["title"] == "Three"]
    assert three["assigned_server_name"] == "dev"


@pytest.fixture
def post(shop, open_browser):
    """Send a form as a signed-in browser does, without the page's script; the answer's text."""

    def send(path: str, fields, token: str | None = None):
        page = open_browser(token) if token else open_browser()
        page.goto("/tasks")
        csrf = page.locator("meta[name=csrf-token]").get_attribute("content")
        found = page.evaluate(
            """async ([path, fields]) => {
                const answer = await fetch(path, {method: "POST", redirect: "manual", body: new
                    URLSearchParams(fields), headers: {"HX-Request": "true"}});
                return [answer.status, await answer.text()]; }""",
            [path, [["csrf_token", csrf], *fields]],
        )
        return found

    return send


def test_what_is_not_said_whole_is_refused(shop, post, problems):
    made = task(shop)
    here = f"/tasks/{made['id']}"
    many = [["verb", "cancel"]] + [["ids", str(n)] for n in range(201)]
    for path, fields, why in (
        ("/tasks/several", [["verb", "cancel"]], "Pick the tasks first"),
        ("/tasks/several", [["ids", made["id"]]], "say what is to be done"),
        ("/tasks/several", [["ids", made["id"]], ["verb", "eat"]], "Unknown verb"),
        ("/tasks/several", many, "201 tasks at once are too many"),
        ("/tasks", [["title", "x"], ["max_attempts", "many"]], "not a whole number"),
        ("/tasks", [["title", "x"], ["max_attempts", "101"]], "max_attempts"),
        ("/tasks", [["title", "x"], ["structured_spec", "[1]"]], "not a JSON object"),
        ("/tasks", [["title", "x"], ["structured_spec", "{"]], "is not JSON"),
        ("/tasks", [["title", "x"], ["structured_spec", '{"requirements": []}']], "of their own"),
        (f"{here}/dependencies", [["kind", "blocks"]], "Choose the task"),
        (f"{here}/dependencies", [["after", made["id"]]], "depend on itself"),
        (f"{here}/notes", [["content", "  "]], "cannot be empty"),
        (f"{here}/contracts/schema", [], "missing"),
        (f"{here}/contracts/schema", [["data", "{"]], "is not JSON"),
    ):
        status, said = post(path, fields)
        assert status in (409, 422), (path, fields)
        assert why in said
    assert [t["id"] for t in shop.api("GET", "tasks")["tasks"]] == [made["id"]]
    assert shop.api("GET", f"tasks/{made['id']}")["status"] == "pending"
    problems.clear()


def test_who_only_looks_is_shown_no_deeds_and_can_do_none(shop, open_browser, post, problems):
    made = task(shop)
    shop.api(
        "POST", "users", {"username": "vic", "password": PASSWORD, "roles": {"shop": "viewer"}}
    )
    token = shop.api("POST", "auth/login", {"username": "vic", "password": PASSWORD})["token"]
    page = open_browser(token)
    for path in ("/tasks", f"/tasks/{made['id']}"):
        page.goto(path)
        expect(page.locator("main").get_by_text("Write the parser").first).to_be_visible()
        expect(page.locator("main form[method=post] button:visible")).to_have_count(0)
    page.goto(f"/tasks/{made['id']}/edit")
    expect(page.locator("main")).to_contain_text("403")
    status, said = post("/tasks/several", [["ids", made["id"]], ["verb", "cancel"]], token)
    assert (status, "0 tasks cancelled. 1 could not be:" in said) == (200, True)
    for path, fields in (
        (f"/tasks/{made['id']}/edit", [["title", "Mine"]]),
        (f"/tasks/{made['id']}/notes", [["content", "hello"]]),
        (f"/tasks/{made['id']}/dependencies", [["after", made["id"]]]),
        (f"/tasks/{made['id']}/contracts/x", [["data", "1"]]),
    ):
        assert post(path, fields, token)[0] == 403, path
    stands = shop.api("GET", f"tasks/{made['id']}")
    assert (stands["status"], stands["title"]) == ("pending", "Write the parser")
    problems.clear()


# ── making and changing one ───────────────────────────────────────────────────────────────────


def test_the_form_makes_requirements_contracts_and_dependencies(shop, page):
    before, other = task(shop, "Design the API"), task(shop, "Draw the logo")
    page.goto("/tasks/new")
    page.get_by_label("Title").fill("Build the gateway")
    page.get_by_label("Requirement", exact=True).fill("It answers in 50 ms")
    page.get_by_role("button", name="Add a requirement").click()
    second = page.locator("#requirements li").nth(1)
    expect(second.get_by_label("Requirement", exact=True)).to_be_focused()
    second.get_by_label("Requirement", exact=True).fill("It is pretty")
    second.get_by_label("Importance").select_option("could")
    page.get_by_role("button", name="Add a requirement").click()
    page.locator("#requirements li").nth(2).get_by_role("button").click()
    page.get_by_label("Contract key").fill("gateway")
    page.get_by_label("What the contract is").fill("where it listens")
    page.get_by_label("JSON Schema of the contract").fill('{"type": "object"}')
    page.get_by_label("Depends on", exact=True).select_option("Design the API (not assigned)")
    page.get_by_label("How it depends").select_option("input")
    page.get_by_label("Contract it takes").fill("api")
    page.get_by_role("button", name="Add a dependency").click()
    link = page.locator("#upstreams li").nth(1)
    link.get_by_label("Depends on", exact=True).select_option("Draw the logo (not assigned)")
    link.get_by_label("How it depends").select_option("related")
    page.get_by_text("More of the structured spec").click()
    page.get_by_label("Constraints").fill('{"constraints": {"no_breaking_changes": true}}')
    page.get_by_label("Attempts at most").fill("3")
    page.get_by_label("plans first").check()
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Build the gateway")
    made = shop.api("GET", f"tasks/{page.url.rpartition('/')[2]}")
    assert made["structured_spec"] == {
        "requirements": [
            {"description": "It answers in 50 ms", "priority": "must"},
            {"description": "It is pretty", "priority": "could"},
        ],
        "expected_contracts": {
            "gateway": {"description": "where it listens", "schema": {"type": "object"}}
        },
        "constraints": {"no_breaking_changes": True},
    }
    found = {
        (d["depends_on_task_id"], d["dependency_type"], d["contract_key"])
        for d in made["dependencies"]
    }
    assert found == {(before["id"], "input", "api"), (other["id"], "related", None)}
    assert (made["max_attempts"], made["require_plan"], made["auto_assign"]) == (3, True, True)


def test_a_task_is_changed_and_only_what_was_changed(shop, page):
    spec = {
        "requirements": [{"description": "fast", "priority": "must", "category": "speed"}],
        "expected_contracts": {"api": {"type": "api_schema", "schema": {"type": "object"}}},
        "constraints": {"languages": ["python"], "no_breaking_changes": True},
        "input_context": {"references": [{"file": "a.py"}]},
    }
    wishes = {"capabilities": ["gpu"], "prefer": {"languages": ["rust"]}}
    made = task(shop, structured_spec=spec, requirements=wishes, timeout=60, priority="low")
    page.goto(f"/tasks/{made['id']}")
    page.get_by_role("link", name="Change").click()
    page.get_by_role("button", name="Save").click()  # nothing was changed, so nothing changes
    expect(page).to_have_url(re.compile(f"/tasks/{made['id']}$"))
    assert shop.api("GET", f"tasks/{made['id']}") == made
    page.get_by_role("link", name="Change").click()
    page.get_by_label("Title").fill("Write the lexer")
    page.get_by_label("Capabilities").fill("")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Write the lexer")
    stands = shop.api("GET", f"tasks/{made['id']}")
    assert stands["title"] == "Write the lexer"
    assert stands["requirements"] == {"languages": ["python"], "prefer": {"languages": ["rust"]}}
    assert stands["structured_spec"] == made["structured_spec"]
    events = shop.api("GET", "events?limit=1000")["events"]
    [change] = [e for e in events if e["type"] == "task_updated"]
    assert change["details"]["changed"] == ["requirements", "title"]


# ── one of them ───────────────────────────────────────────────────────────────────────────────


def test_dependencies_are_added_and_removed_on_the_page(shop, page, problems):
    _, made = task(shop, "Design the API"), task(shop)
    page.goto(f"/tasks/{made['id']}")
    live(page).get_by_text("Add a dependency").click()
    page.get_by_label("Depends on", exact=True).select_option("Design the API (not assigned)")
    page.get_by_label("How it depends").select_option("input")
    page.get_by_role("button", name="Add", exact=True).click()
    alert = page.get_by_role("alert").filter(has_text="contract_key")
    expect(alert).to_be_visible()
    forgive(problems, 422)
    page.get_by_label("Contract it takes").fill("api")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator(".standing")).to_contain_text("waits for Design the API")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator(".standing")).not_to_contain_text("waits for")
    assert shop.api("GET", f"tasks/{made['id']}")["dependencies"] == []


def test_notes_are_left_and_what_one_writes_survives_what_happens_meanwhile(shop, page):
    made = task(shop)
    page.goto(f"/tasks/{made['id']}")
    note = live(page).get_by_label("New note")
    note.fill("Mind the two")
    page.get_by_label("urgent").check()
    shop.api("POST", f"tasks/{made['id']}/notes", {"content": "Somebody else's"})
    expect(page.locator(".notes li")).to_have_count(1)
    expect(note).to_have_value("Mind the two")
    expect(page.get_by_label("urgent")).to_be_checked()
    note.press("End")
    note.press_sequentially(" dialects")
    page.get_by_role("button", name="Add the note").click()
    expect(page.locator(".notes li").first).to_contain_text("Mind the two dialects")
    expect(page.locator(".notes li").first).to_contain_text("urgent")
    expect(note).to_have_value("")
    expect(page.get_by_label("urgent")).not_to_be_checked()


def test_a_plan_is_decided_on_the_tasks_page_and_its_rounds_stay(shop, page):
    key = serve(shop)
    made = task(shop)
    shop.api("POST", f"tasks/{made['id']}/assign", {"server": "dev", "require_plan": True})
    shop.api("POST", f"tasks/{made['id']}/plan", {"plan": "First draft"}, key=key)
    page.goto(f"/tasks/{made['id']}")
    waits = live(page).locator(".wait")
    expect(waits).to_contain_text("First draft")
    waits.get_by_label("What should be different").fill("Shorter")
    waits.get_by_role("button", name="Send it back").click()
    expect(waits).to_have_count(0)
    plans = page.get_by_role("region", name="Plan", exact=True)
    expect(plans).to_contain_text("Version 1: sent back by")
    shop.api("POST", f"tasks/{made['id']}/plan", {"plan": "Second"}, key=key)
    expect(waits).to_contain_text("Second")
    waits.get_by_role("button", name="Approve the plan").click()
    expect(plans).to_contain_text("Version 2: approved by")
    expect(plans).to_contain_text("Shorter")


def test_a_question_is_answered_on_the_tasks_page(shop, page):
    key = serve(shop)
    made = task(shop, auto_assign=True)
    shop.api("POST", f"tasks/{made['id']}/start", {}, key=key)
    shop.api("POST", f"tasks/{made['id']}/help", {"question": "Which colour?"}, key=key)
    page.goto(f"/tasks/{made['id']}")
    live(page).get_by_label("Your answer").fill("Teal")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator(".wait")).to_have_count(0)
    expect(page.locator(".standing")).to_contain_text("running")


def test_a_contract_is_supplied_and_corrected_by_hand(shop, page, problems):
    key = serve(shop)
    made = task(shop, auto_assign=True)
    link = {"depends_on_task_id": made["id"], "dependency_type": "input", "contract_key": "api"}
    task(shop, "Use it", dependencies=[link])
    page.goto(f"/tasks/{made['id']}")
    live(page).get_by_text("Supply api by hand").click()
    page.get_by_label("Its data, as JSON").fill("{oops")
    page.get_by_role("button", name="Hand it down").click()
    expect(page.get_by_role("alert").filter(has_text="is not JSON")).to_be_visible()
    forgive(problems, 422)
    page.get_by_label("Its data, as JSON").fill('{"version": 1}')
    page.get_by_role("button", name="Hand it down").click()
    expect(page.locator("#fold-contract-1")).to_contain_text('"version": 1')
    shop.api("POST", f"tasks/{made['id']}/start", {}, key=key)
    shop.api("POST", f"tasks/{made['id']}/complete", {"result": {"summary": "ok"}}, key=key)
    expect(page.locator(".standing")).to_contain_text("done")
    page.get_by_label("Its data, as JSON").fill('{"version": 2}')
    page.get_by_role("button", name="Hand it down").click()
    expect(page.locator("#fold-contract-1")).to_contain_text('"version": 2')
    assert shop.api("GET", f"tasks/{made['id']}")["contracts"]["api"]["data"] == {"version": 2}
