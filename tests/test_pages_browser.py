"""The dashboard in a real Chromium, against a real hub process."""

import base64
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

import pages
import picture
import words
from browsing import live
from conftest import PASSWORD, ROOT

HOSTILE = (
    "<script>window.owned = 1</script><img src=x onerror=window.owned=1> \u202egnp.exe \x1b[2J"
)


def forgive(problems: list[str], status: int) -> None:
    """Take out the browser's own line on a refusal that the test asked for."""
    line = re.compile(rf"Failed to load resource.* status of {status} ")
    assert any(line.match(p) for p in problems)
    problems[:] = [p for p in problems if not line.match(p)]


@pytest.fixture
def page(open_browser):
    return open_browser()


def task(hub, title: str = "Write the parser", **fields) -> dict:
    return hub.api("POST", "tasks", {"title": title} | fields)


def serve(hub, name: str = "dev", **body) -> str:
    """Register a server that is online, without an agent; its key."""
    key = hub.register(name, **body)["api_key"]
    hub.api("POST", "servers/heartbeat", {}, key=key)
    return key


# ── signing in ────────────────────────────────────────────────────────────────────────────────


def test_signs_in_with_the_right_password_only(hub, open_browser, problems):
    page = open_browser(token=None)
    page.goto("/tasks?q=x")
    expect(page).to_have_url(re.compile(r"/login\?next="))
    sign_in(page, "wrong password")
    expect(page.get_by_role("alert")).to_have_text("User name or password is wrong.")
    expect(page.get_by_label("User name")).to_have_value("admin")
    forgive(problems, 401)
    sign_in(page, PASSWORD)
    expect(page).to_have_url(f"{hub.url}/tasks?q=x")
    [kept] = page.context.cookies()
    assert (kept["httpOnly"], kept["sameSite"], kept["secure"]) == (True, "Lax", False)
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{hub.url}/login")
    assert page.context.cookies() == []


def sign_in(page, password: str) -> None:
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def test_a_login_link_works_once_and_only_when_the_button_is_pressed(hub, open_browser, problems):
    link = login_link(hub)
    for _ in range(2):
        open_browser(token=None).goto(link)
    first = open_browser(token=None)
    first.goto(link)
    first.get_by_role("button", name="Sign in").click()
    expect(first.get_by_role("heading", level=1)).to_have_text("Overview")
    second = open_browser(token=None)
    second.goto(link)
    second.get_by_role("button", name="Sign in").click()
    expect(second.get_by_role("alert")).to_contain_text("was used or has expired")
    forgive(problems, 401)


def login_link(hub) -> str:
    flags = ["--data", str(hub.data), "--port", str(hub.settings["port"]), "--login-link"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "hub.py"), *flags], capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip().splitlines()[-1]


def test_a_dead_cookie_is_no_hindrance(hub, open_browser):
    page = open_browser(token="orct_dead")
    page.goto("/")
    sign_in(page, PASSWORD)
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


def test_who_signs_out_is_out_on_every_tab(shop, open_browser):
    page = open_browser(token=None)
    page.goto("/tasks")
    sign_in(page, PASSWORD)
    other = page.context.new_page()
    other.goto("/tasks")
    live(page)
    other.get_by_role("button", name="Sign out").click()
    expect(other).to_have_url(f"{shop.url}/login")
    task(shop)
    expect(page).to_have_url(f"{shop.url}/login")


@pytest.mark.parametrize(
    ("target", "leads_to"),
    [
        ("/tasks/abc?x=1", "/tasks/abc?x=1"),
        ("//evil.example/", "/"),
        ("/\\evil.example/", "/"),
        ("https://evil.example/", "/"),
        ("/a\\b", "/"),
        ("/a\nb", "/"),
        ("", "/"),
        (None, "/"),
    ],
)
def test_signing_in_leads_to_pages_of_this_hub_only(app, target, leads_to):
    with app.test_request_context():
        assert pages._safe(target) == leads_to


@pytest.mark.parametrize("form", [{}, {"csrf_token": "wrong"}])
def test_a_form_without_its_token_is_refused(shop, form):
    made = task(shop)
    answer = shop.http.post(
        f"{shop.url}/tasks/{made['id']}/cancel",
        data=form,
        cookies={"orchestratia": shop.login()},
        timeout=10,
    )
    assert answer.status_code == 403
    assert shop.api("GET", f"tasks/{made['id']}")["status"] == "pending"


# ── the first run ─────────────────────────────────────────────────────────────────────────────


def test_an_empty_hub_says_what_to_do_and_it_works(hub, page):
    page.goto("/")
    page.get_by_label("Name").fill("shop")
    page.get_by_role("button", name="Create project").click()
    page.get_by_role("link", name="Add a server").click()
    page.get_by_role("button", name="Make a token").click()
    arrival = page.locator("#arrival")
    expect(arrival).to_contain_text("waiting for the server to register")
    token = page.get_by_label("Registration token").input_value()
    command = page.get_by_label("Installs everything").input_value()
    assert token.startswith("orcreg_") and token in command
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-copy=command-script]").click()
    assert page.evaluate("navigator.clipboard.readText()") == command
    live(page)
    key = hub.api("POST", "servers/register", {"name": "dev", "registration_token": token})
    expect(arrival).to_contain_text("registered as dev")
    hub.api("POST", "servers/heartbeat", {}, key=key["api_key"])
    expect(arrival).to_contain_text("dev is connected")
    page.get_by_role("button", name="Close").click()
    expect(page.locator(".server")).to_contain_text("online")
    expect(page.get_by_label("Registration token")).to_have_count(0)
    assert token not in page.content()
    page.get_by_role("button", name="Add a server").click()
    expect(page.get_by_role("button", name="Make a token")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("link", name="Overview").click()
    page.locator("#live").get_by_role("link", name="New task").click()
    page.get_by_label("Title").fill("Write the parser")
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Write the parser")
    page.goto("/")
    expect(page.get_by_text("Three steps")).to_have_count(0)


def test_what_finished_since_one_last_looked_is_marked(shop, page):
    for title in ("Before", "Meanwhile"):
        made = task(shop, title)
        page.goto("/")  # the first look, then the next
        live(page)
        if title == "Before":
            shop.api("DELETE", f"tasks/{made['id']}")
            expect(page.locator("[data-ended]")).to_have_count(1)
            page.goto("/tasks")
    assert page.locator(".is-new").count() == 0
    page.goto("/tasks")
    shop.api("DELETE", f"tasks/{made['id']}")
    page.goto("/")
    expect(page.locator(".is-new")).to_contain_text("Meanwhile")
    expect(page.locator("#finished-new")).to_have_text("1 since you last looked")


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────


def test_a_task_has_what_the_form_says(shop, page):
    before = task(shop, "Design the grammar")
    page.goto("/tasks/new")
    fill = {
        "Title": "Write the parser",
        "What is to be done": "Two lines\nof spec",
        "Acceptance criteria": "it parses\nit is fast",
        "Repo": "core",
        "Languages": "python, rust",
        "Command": "make\ntest & more\n$(id)",
    }
    for label, text in fill.items():
        page.get_by_label(label).fill(text)
    page.get_by_label("Priority").select_option("high")
    page.get_by_label("Type").select_option("bugfix")
    page.get_by_label("Depends on", exact=True).select_option("Design the grammar (not assigned)")
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Write the parser")
    made = shop.api("GET", f"tasks/{page.url.rpartition('/')[2]}")
    assert made["spec"] == "Two lines\nof spec"
    assert made["acceptance_criteria"] == ["it parses", "it is fast"]
    assert made["requirements"] == {"repo": "core", "languages": ["python", "rust"]}
    assert made["command"] == ["make", "test & more", "$(id)"]
    assert (made["priority"], made["type"], made["auto_assign"]) == ("high", "bugfix", True)
    assert [d["depends_on_task_id"] for d in made["dependencies"]] == [before["id"]]
    expect(page.locator(".standing")).to_contain_text("waits for Design the grammar")


def test_a_refused_form_says_why_and_keeps_what_was_typed(shop, page, problems):
    page.goto("/tasks/new")
    page.get_by_label("Title").fill("   ")
    page.get_by_label("What is to be done").fill("much work to type")
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("alert").filter(has_text="title")).to_be_visible()
    expect(page.get_by_label("What is to be done")).to_have_value("much work to type")
    forgive(problems, 422)


def test_a_task_changes_before_ones_eyes(shop, page):
    serve(shop)
    made = task(shop, structured_spec={"requirements": [{"description": "a", "priority": "must"}]})
    after = task(shop, "Release it", dependency_ids=[made["id"]])
    page.goto(f"/tasks/{made['id']}")
    standing = live(page).locator(".standing")
    page.evaluate("window.sameDocument = true")
    page.locator("#fold-spec summary").click()
    expect(standing).to_contain_text("not assigned")
    page.get_by_label("Assign to").select_option(label="dev (online)")
    page.get_by_role("button", name="Assign").click()
    expect(standing).to_contain_text("assigned")
    expect(page.get_by_role("button", name="Assign")).to_have_count(0)
    shop.api("POST", f"tasks/{made['id']}/start", {})
    expect(standing).to_contain_text("running")
    shop.api("POST", f"tasks/{made['id']}/complete", {"result": {"summary": "all green"}})
    expect(standing).to_contain_text("done")
    expect(page.get_by_role("region", name="Result")).to_contain_text("all green")
    timeline = page.locator(".timeline > li")
    expect(timeline.first).to_contain_text("created")
    expect(timeline.filter(has_text="Release it: no longer blocked")).to_have_count(1)
    expect(page.locator("#fold-spec")).to_have_attribute("open", "")
    assert page.evaluate("window.sameDocument")
    assert shop.api("GET", f"tasks/{after['id']}")["status"] != "done"


def test_cancel_and_retry(shop, page):
    made = task(shop)
    task(shop, "Release it", dependency_ids=[made["id"]])
    page.goto(f"/tasks/{made['id']}")
    standing = page.locator(".standing")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Cancel task").click()
    expect(standing).to_contain_text("not assigned")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("with all that waits for it").check()
    page.get_by_role("button", name="Cancel task").click()
    expect(standing).to_contain_text("cancelled")
    assert {t["status"] for t in shop.api("GET", "tasks")["tasks"]} == {"cancelled"}
    page.get_by_role("button", name="Retry").click()
    expect(standing).to_contain_text("no server is registered")


def test_a_deed_that_comes_too_late_is_refused_in_place(shop, open_browser, problems):
    serve(shop)
    made = task(shop)
    page = open_browser()
    page.add_init_script("delete window.SharedWorker")  # its own stream, which can be held up
    page.route("**/events/stream*", lambda route: route.abort())  # it sees nothing happen
    page.goto(f"/tasks/{made['id']}")
    shop.api("DELETE", f"tasks/{made['id']}")
    page.get_by_role("button", name="Assign").click()
    notice = page.get_by_role("alert").filter(has_text="Cannot assign a task that is cancelled")
    expect(notice).to_be_visible()
    forgive(problems, 409)
    problems[:] = [p for p in problems if "ERR_FAILED" not in p]


def test_the_filter_stands_in_the_address(shop, page):
    for title in ("Fix the gateway", "Fix the shop", "Close the gateway"):
        made = task(shop, title)
    shop.api("DELETE", f"tasks/{made['id']}")
    page.goto("/tasks")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_label("Text").fill("gateway")
    page.get_by_role("button", name="Filter").click()
    expect(page).to_have_url(f"{shop.url}/tasks?q=gateway")
    expect(page.locator("tbody tr")).to_have_count(2)
    live(page)
    page.get_by_label("State").select_option("cancelled")
    expect(page).to_have_url(f"{shop.url}/tasks?status=cancelled&q=gateway")
    expect(page.locator("tbody tr")).to_have_text([re.compile("Close the gateway")])


def test_two_projects_are_kept_apart(shop, page):
    other = shop.api("POST", "projects", {"name": "library"})
    shop_id = next(p["id"] for p in shop.api("GET", "projects")["projects"] if p["name"] == "shop")
    task(shop, "Sell", project_id=shop_id)
    task(shop, "Lend", project_id=other["id"])
    page.goto("/tasks")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_label("Project").select_option("library")
    expect(page.locator("tbody tr")).to_have_text([re.compile("Lend")])
    page.get_by_role("link", name="New task").click()
    page.locator("#title").fill("Lend again")
    page.get_by_role("button", name="Create task").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Lend again")
    found = shop.api("GET", f"tasks?project_id={other['id']}")["tasks"]
    assert {t["title"] for t in found} == {"Lend", "Lend again"}


def test_hostile_titles_are_only_text(shop, page):
    serve(shop, "dev")
    applied = shop.api(
        "POST",
        "pipelines",
        {"name": HOSTILE, "tasks": [{"id": "T1", "title": HOSTILE, "spec": HOSTILE}]},
    )
    task_id = applied["id_map"]["T1"]
    shop.api("POST", f"tasks/{task_id}/assign", {"server": "dev"})
    shop.api("POST", f"tasks/{task_id}/start", {})
    shop.api("POST", f"tasks/{task_id}/fail", {"error": HOSTILE})
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")
    for path in ("/", "/tasks", f"/tasks/{task_id}", "/tasks/new", "/events", "/pipelines"):
        page.goto(path)
        found = page.get_by_text(shown).first
        expect(found).to_be_attached() if path == "/tasks/new" else expect(found).to_be_visible()
        assert page.locator("main script, main img").count() == 0
        assert not re.search("[\u202a-\u202e\x00-\x08\x0b-\x1f]", page.content())
    page.goto(f"/pipelines/{applied['id']}")
    expect(page.locator(".graph a")).to_have_attribute("data-state", "failed")
    assert page.title().startswith("<script>")
    assert page.evaluate("window.owned") is None


# ── servers, sessions, pipelines ──────────────────────────────────────────────────────────────


def test_a_server_is_drained_resumed_and_revoked(shop, page):
    serve(shop)
    page.goto("/servers")
    card = page.locator(".server")
    page.on("dialog", lambda dialog: dialog.accept())
    for button, state in (("Drain", "draining"), ("Resume", "online")):
        card.get_by_role("button", name=button).click()
        expect(card.locator(".state")).to_have_text(state)
    card.get_by_role("button", name="Revoke").click()
    expect(card).to_have_count(0)
    page.get_by_role("link", name="Show revoked").click()
    expect(card.locator(".state")).to_have_text("revoked")
    expect(card.get_by_role("button")).to_have_count(0)


@pytest.fixture
def agent(shop, start_agent):
    """A real agent of the shop, with one repo."""
    return start_agent(shop, "dev", repos=["core"])


WORKER = r"""
import pathlib, time
print("\033[32mgreen\033[0m and plain \033]0;a title\007and \u2713", flush=True)
print("10 %\r50 %\r100 %", flush=True)
while not pathlib.Path("go").exists():
    time.sleep(0.02)
print("went on", flush=True)
"""


def log_of(page):
    """The log on a session's page, opened."""
    page.locator("#log-part > summary").click()
    return page.locator("#log")


def test_a_session_is_followed_to_its_end(shop, agent, page):
    made = task(shop, target_repo="core", auto_assign=True, command=[sys.executable, "-c", WORKER])
    page.goto(f"/tasks/{made['id']}")
    page.locator("dl").get_by_role("link", name="core-").click()
    log = log_of(live(page))
    expect(log).to_contain_text("green and plain and ✓\n100 %")
    assert "\x1b" not in log.text_content()
    expect(log).not_to_contain_text("went on")
    page.get_by_text("Screen as it was last seen").click()
    (agent.folder / "core" / "go").touch()
    expect(log).to_contain_text("went on")
    expect(page.locator(".standing")).to_contain_text("closed")
    expect(page.locator("#live")).to_contain_text("exit code 0")
    expect(page.locator("#screen")).to_contain_text("100 %")
    expect(page.get_by_role("button", name="Close session")).to_have_count(0)


def test_what_is_missing_from_a_log_is_said_in_it(shop, page):
    key, calls, spooled = serve(shop), itertools.count(1), itertools.count(1)
    made = shop.api("POST", "sessions", {"server_id": "dev", "name": "shell"})

    def say(*frames):
        body = {"instance": "i", "seq": next(calls), "wait": 0, "frames": frames}
        shop.api("POST", "server/poll", body, key=key)

    def block(offset, data):
        coded = base64.b64encode(data).decode()
        ours = {"type": "session_log", "session_id": made["id"]}
        return ours | {"offset": offset, "data": coded}

    def gap(start, stop, why):
        ours = {"type": "session_gap", "session_id": made["id"], "spool": next(spooled)}
        return ours | {"from": start, "to": stop, "why": why}

    say({"type": "auth", "spool_id": "s"}, {"type": "sync", "instance": "i"})
    say(block(0, b"one\ntw"), gap(6, 5000, "hub <away>"), block(5000, b"three\nfour\n"))
    say(gap(5006, None, "pipe down"))
    page.goto(f"/sessions/{made['id']}")
    log = log_of(live(page))
    shown = "one\ntw\n… 5.0 kB missing: hub <away> …\nthree\n… output missing: pipe down …\nfour\n"
    expect(log).to_contain_text(shown)
    say(gap(5011, 5021, "again"), block(5021, b"five\n"))
    expect(log).to_contain_text("four\n… 10 bytes missing: again …\nfive\n")
    assert log.text_content() == f"{shown}… 10 bytes missing: again …\nfive\n"


def test_a_session_is_closed_by_hand(shop, agent, page):
    made = shop.api(
        "POST", "sessions", {"server_id": "dev", "name": "shell", "command": ["sleep", "600"]}
    )
    page.goto("/sessions")
    expect(page.locator("tbody tr")).to_contain_text("active")
    page.get_by_role("link", name="shell").click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Close session").click()
    expect(page.locator(".standing")).to_contain_text("closed")
    assert shop.api("GET", f"sessions/{made['id']}")["status"] == "closed"


def test_a_pipeline_runs_on_its_picture(shop, page):
    serve(shop)
    tasks = [
        {"id": "T1", "title": "T1: schema", "assign": "dev"},
        {"id": "T2", "title": "gateway", "depends_on": [{"task": "T1", "key": "api"}]},
        {"id": "T3", "title": "deploy", "depends_on": ["T1", "T2"]},
    ]
    applied = shop.api("POST", "pipelines", {"name": "shop v2", "tasks": tasks})
    page.goto("/pipelines")
    page.get_by_role("link", name="shop v2").click()
    live(page)
    node = {key: page.locator(f"#node-{i}") for key, i in applied["id_map"].items()}
    expect(page.locator(".graph .edge")).to_have_count(3)
    expect(node["T1"]).to_have_attribute("data-state", "assigned")
    expect(node["T3"]).to_have_attribute("data-state", "blocked")
    left = [node[key].bounding_box()["x"] for key in ("T1", "T2", "T3")]
    assert left == sorted(set(left))
    first = applied["id_map"]["T1"]
    result = {"contracts": {"api": {"version": 2}}}
    shop.api("POST", f"tasks/{first}/complete", {"result": result})
    expect(node["T1"]).to_have_attribute("data-state", "done")
    expect(node["T2"]).to_have_attribute("data-state", "assigned")
    expect(page.locator(".standing")).to_contain_text("1 of 3 done")
    node["T2"].click()
    expect(page.get_by_role("heading", level=1)).to_have_text("gateway")
    page.locator("summary", has_text="api").click()
    expect(page.locator("#fold-input-1 pre")).to_contain_text('"version": 2')


# ── the stream ────────────────────────────────────────────────────────────────────────────────


def test_an_open_page_outlives_a_restart_of_the_hub(shop, page, problems):
    made = task(shop)
    page.goto("/tasks")
    live(page)
    shop.stop()
    expect(page.locator("#link")).to_have_attribute("data-state", "away")
    shop.start()
    shop.api("DELETE", f"tasks/{made['id']}")
    expect(page.locator("tbody tr")).to_contain_text("cancelled")
    live(page)
    away = re.compile("ERR_(CONNECTION|INCOMPLETE|EMPTY|NETWORK)")
    problems[:] = [p for p in problems if not away.search(p)]


def test_nothing_between_the_page_and_its_stream_is_missed(shop, page):
    made = task(shop)

    def late(route):
        shop.api("DELETE", f"tasks/{made['id']}")
        route.continue_()

    page.add_init_script("delete window.SharedWorker")  # its own stream, which can be held up
    page.route("**/events/stream*", late, times=1)
    page.goto("/tasks")
    expect(page.locator("tbody tr")).to_contain_text("cancelled")


def test_many_events_cost_few_requests(shop, page):
    page.goto("/tasks")
    live(page)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    tasks = [{"id": f"t{n}", "title": f"Task {n}"} for n in range(90)]
    shop.api("POST", "pipelines", {"name": "many", "tasks": tasks})
    expect(page.locator("tbody tr")).to_have_count(90)
    assert 1 <= len(asked) < 30


def test_events_appear_on_top(shop, page):
    page.goto("/events")
    live(page)
    task(shop, "Write the parser")
    expect(page.locator("tbody tr").first).to_contain_text("created")
    expect(page.locator("tbody tr").first).to_contain_text("Write the parser")


# ── every page ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
        {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    ],
    ids=["light", "dark", "phone"],
)
def test_every_page_opens_without_a_complaint(shop, open_browser, options):
    page = open_browser(**options)
    serve(shop, repos={"core": "/srv/core"})
    tasks = [{"id": "T1", "title": "A title of some length " * 6}, {"id": "T2", "title": "b"}]
    applied = shop.api("POST", "pipelines", {"name": "p", "tasks": tasks})
    paths = ["/", "/servers", "/tasks", "/tasks/new", "/sessions", "/sessions?all=1"]
    paths += ["/pipelines", f"/pipelines/{applied['id']}", "/events"]
    paths += [f"/tasks/{i}" for i in applied["id_map"].values()]
    for path in paths:
        page.goto(path)
        live(page)
        fits = "document.documentElement.scrollWidth <= window.innerWidth"
        assert page.evaluate(fits), f"{path} is wider than the window"


def test_the_api_is_described(shop, page):
    page.goto("/docs")
    expect(page.locator(".opblock-tag-section").first).to_be_visible()


def test_what_is_not_there_says_so(hub, page, problems):
    for path in ("/tasks/ffffffff", "/nowhere", "/tasks?project=nope", "/tasks?status=nope"):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_have_text(
            "Not accepted" if "status" in path else "Not here"
        )
        after = page.locator("meta[name=events]").get_attribute("data-after")
        assert int(after) > 0, "the page would hear the whole log again"
    forgive(problems, 404)
    forgive(problems, 422)


def test_a_viewer_sees_and_cannot_touch(shop, open_browser, problems):
    serve(shop)
    made = task(shop)
    user = {"username": "vera", "password": PASSWORD, "roles": {"shop": "viewer"}}
    shop.api("POST", "users", user)
    login = {"username": "vera", "password": PASSWORD}
    page = open_browser(token=shop.api("POST", "auth/login", login)["token"])
    page.goto(f"/tasks/{made['id']}")
    expect(page.locator("#live").get_by_role("button")).to_have_count(0)
    page.goto("/servers")
    expect(page.locator("main").get_by_role("button")).to_have_count(0)
    page.goto("/tasks/new")
    expect(page.locator("main")).to_contain_text("no project you may create tasks in")
    forgive(problems, 422)
    sent = page.evaluate(
        """path => fetch(path, {method: "POST", headers: {"X-CSRF-Token":
           document.querySelector('meta[name="csrf-token"]').content}}).then(r => r.status)""",
        f"/tasks/{made['id']}/cancel",
    )
    assert sent == 403
    forgive(problems, 403)
    assert shop.api("GET", f"tasks/{made['id']}")["status"] == "pending"


def test_browsers_are_slowed_down_when_parts_take_much_of_the_time():
    calm, busy = pages._Pace(), pages._Pace()
    assert calm.after(0.01) == calm.LEAST_MS
    waits = [busy.after(0.1) for _ in range(20)]
    assert waits == sorted(waits) and calm.LEAST_MS == waits[0] < 1000 < waits[-1] <= busy.MOST_MS
    busy._at -= 10
    assert busy.after(0.01) == busy.LEAST_MS


# ── in words and pictures, without a browser ──────────────────────────────────────────────────


def test_every_event_has_its_words():
    """An open page hears only the types it knows."""
    emitted = set()
    for name in ("auth", "inbox", "moves", "routing", "sessions", "tasks"):
        source = Path(ROOT / f"{name}.py").read_text()
        emitted |= set(re.findall(r'\.emit\(\s*"(\w+)"', source))
        emitted |= set(re.findall(r'_event\([\w\s,\[\]"]*?"(\w+_\w+)"', source))
        for table in re.findall(r"EVENT_OF = \{(.*?)\}", source, re.S):
            emitted |= set(re.findall(r': "(\w+)"', table))
    assert len(emitted) > 25
    assert emitted <= set(words.WORDS)


def test_an_event_with_missing_details_still_reads():
    for kind in words.WORDS:
        assert words.said({"type": kind, "details": {}})
    assert words.said({"type": "moon_landed", "details": {}}) == "moon landed"
    braces = {"type": "task_failed", "details": {"attempt": 1, "error": "{actor.__class__}"}}
    assert words.said(braces) == "attempt 1 failed: {actor.__class__}"


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("short", 5, "short"), ("longer", 5, "long…"), ("検索エンジン", 6, "検索…"), ("", 3, "")],
)
def test_titles_are_cut_to_the_columns_they_take(text, width, shown):
    assert picture.cut(text, width) == shown


def test_a_task_is_drawn_right_of_all_it_waits_for():
    shown = [drawn("a"), drawn("b", "a"), drawn("c", "b"), drawn("d", "a", "c"), drawn("e")]
    graph = picture.draw(shown, {"a": "T1"})
    at = {node["task"]["id"]: node["x"] for node in graph["nodes"]}
    assert at["a"] == at["e"] < at["b"] < at["c"] < at["d"]
    assert len(graph["edges"]) == 4
    assert len({(node["x"], node["y"]) for node in graph["nodes"]}) == 5
    assert picture.draw([], {})["nodes"] == []


def drawn(name: str, *ups: str) -> dict:
    link = {"dependency_type": "blocks", "resolved": False, "contract_key": None}
    return {
        "id": name,
        "title": name,
        "assigned_server_name": None,
        "target_repo": None,
        "dependencies": [link | {"depends_on_task_id": up} for up in ups],
    }


# ── the inbox ─────────────────────────────────────────────────────────────────────────────────


def at_work(hub, key: str, title: str) -> str:
    made = task(hub, title, command=["make"], auto_assign=True)["id"]
    hub.api("POST", f"tasks/{made}/start", {}, key=key)
    return made


def ask(hub, key: str, task_id: str, question: str, **more) -> str:
    return hub.api("POST", f"tasks/{task_id}/help", {"question": question} | more, key=key)["id"]


def test_a_question_is_answered_in_the_inbox(hub, page):
    hub.api("POST", "projects", {"name": "shop"})
    key = serve(hub, repos={})
    page.goto("/inbox")
    expect(page.get_by_text("Nothing waits for you.")).to_be_visible()
    expect(page).to_have_title("Inbox · Orchestratia")
    live(page)
    asked_in = at_work(hub, key, "Sign-in")
    question = ask(hub, key, asked_in, f"JWT or cookies? {HOSTILE}", context=HOSTILE)
    item = page.locator(f"#wait-{question}")
    expect(item).to_contain_text("JWT or cookies? <script>")
    expect(page).to_have_title("(1) Inbox · Orchestratia")
    expect(page.locator("#waiting-count")).to_be_visible()
    item.get_by_label("Your answer").fill("JWT")
    ask(hub, key, at_work(hub, key, "Cart"), "Redis?")  # what is being written stays
    expect(page).to_have_title("(2) Inbox · Orchestratia")
    expect(item.get_by_label("Your answer")).to_have_value("JWT")
    item.get_by_role("button", name="Answer").click()
    expect(item).to_have_count(0)
    expect(page.get_by_text("question answered by admin: Sign-in")).to_be_visible()
    expect(page).to_have_title("(1) Inbox · Orchestratia")
    assert hub.api("GET", f"interventions/{question}")["response"] == "JWT"
    assert hub.api("GET", f"tasks/{asked_in}")["status"] == "running"
    assert page.evaluate("window.owned") is None


def test_what_is_answered_elsewhere_disappears_saying_by_whom(hub, page):
    hub.api("POST", "projects", {"name": "shop"})
    key = serve(hub, repos={})
    question = ask(hub, key, at_work(hub, key, "Cart"), "Redis?")
    page.goto("/inbox")
    live(page)
    expect(page.locator(f"#wait-{question}")).to_be_visible()
    hub.api(
        "POST", "users", {"username": "olga", "password": PASSWORD, "roles": {"shop": "operator"}}
    )
    login = {"username": "olga", "password": PASSWORD}
    token = hub.api("POST", "auth/login", login)["token"]
    hub.api("POST", f"interventions/{question}/respond", {"response": "Yes"}, token=token)
    expect(page.locator(f"#wait-{question}")).to_have_count(0, timeout=1000)
    expect(page.get_by_text("question answered by olga: Cart")).to_be_visible()


def test_a_plan_is_sent_back_then_approved(hub, page):
    hub.api("POST", "projects", {"name": "shop"})
    key = serve(hub, repos={})
    planned = task(hub, "Importer", command=["make"])["id"]
    hub.api("POST", f"tasks/{planned}/assign", {"server": "dev", "require_plan": True})
    plan = {"summary": "Two steps", "steps": ["read", "write"]}
    hub.api("POST", f"tasks/{planned}/plan", {"plan": plan}, key=key)
    page.goto("/inbox")
    live(page)
    first = page.locator(f"#wait-{planned}-1")
    expect(first.get_by_role("listitem")).to_have_text(["read", "write"])
    first.get_by_role("button", name="Send it back").click()  # without a word it is not sent
    expect(first).to_be_visible()
    first.get_by_label("What should be different").fill("validate, too")
    first.get_by_role("button", name="Send it back").click()
    expect(first).to_have_count(0)
    assert hub.api("GET", f"tasks/{planned}")["plan_feedback"] == "validate, too"
    hub.api("POST", f"tasks/{planned}/plan", {"plan": "read\nvalidate\nwrite"}, key=key)
    second = page.locator(f"#wait-{planned}-2")
    expect(second).to_contain_text("version 2")
    second.get_by_role("button", name="Approve the plan").click()
    expect(second).to_have_count(0)
    expect(page.get_by_text("plan approved by admin: Importer")).to_be_visible()
    assert hub.api("GET", f"tasks/{planned}")["status"] == "running"


def test_a_viewer_sees_what_waits_and_cannot_answer(hub, open_browser):
    hub.api("POST", "projects", {"name": "shop"})
    key = serve(hub, repos={})
    question = ask(hub, key, at_work(hub, key, "Cart"), "Redis?")
    hub.api(
        "POST", "users", {"username": "vera", "password": PASSWORD, "roles": {"shop": "viewer"}}
    )
    token = hub.api("POST", "auth/login", {"username": "vera", "password": PASSWORD})["token"]
    page = open_browser(token)
    page.goto("/inbox")
    expect(page.locator(f"#wait-{question}")).to_contain_text("Redis?")
    expect(page.get_by_role("button", name="Answer")).to_have_count(0)
