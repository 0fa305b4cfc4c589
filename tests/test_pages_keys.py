"""The keyboard, the palette and the pages of errors, by keyboard only."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

import models
import pages
from browsing import live, press
from conftest import PASSWORD, Client, wait_until

HOSTILE = "<img src=x onerror=window.owned=1> parser"


@pytest.fixture
def page(open_browser):
    return open_browser()


def task(hub, title: str, **fields) -> dict:
    return hub.api("POST", "tasks", {"title": title} | fields)


def three_tasks(hub) -> list[dict]:
    """Three tasks, as the page lists them: newest first."""
    return [task(hub, title) for title in ("Third", "Second", "First")][::-1]


def link(page, title: str):
    return page.get_by_role("link", name=title, exact=True)


# ── keys ──────────────────────────────────────────────────────────────────────────────────────


def test_the_keys_are_shown_and_the_focus_returns(shop, page):
    page.goto("/tasks")
    link(page, "Servers").focus()
    press(page, "?")
    keys = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(keys).to_be_visible()
    expect(keys).to_contain_text("next and previous row")
    press(page, "Escape")
    expect(keys).to_be_hidden()
    expect(link(page, "Servers")).to_be_focused()
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    press(page, "Enter")
    expect(keys).to_be_visible()
    press(page, "Enter")  # on its button
    expect(keys).to_be_hidden()


def test_every_page_named_in_the_dialog_is_a_key_away(shop, page):
    page.goto("/")
    ways = {"o": "/", "i": "/inbox", "t": "/tasks", "p": "/pipelines", "s": "/sessions"}
    for key, path in (ways | {"v": "/servers", "e": "/events"}).items():
        press(page, f"g {key}")
        expect(page).to_have_url(f"{shop.url}{path}")
        expect(page.locator("nav [aria-current=page]")).to_have_attribute("data-go", key)
        expect(page.locator("nav [aria-current=page]")).to_be_in_viewport()
    press(page, "g x t")  # x is no page, and ends what g began
    press(page, "c")
    expect(page).to_have_url(f"{shop.url}/tasks/new")


def test_the_rows_are_walked_and_opened(shop, page):
    first, _, _ = three_tasks(shop)
    page.goto("/tasks")
    press(page, "j")
    expect(link(page, "First")).to_be_focused()
    press(page, "j j j")
    expect(link(page, "Third")).to_be_focused()
    press(page, "k k k k")
    expect(link(page, "First")).to_be_focused()
    press(page, "Enter")
    expect(page).to_have_url(f"{shop.url}/tasks/{first['id']}")


def test_the_cursor_stays_on_its_row_while_the_list_changes(shop, page):
    first, second, third = three_tasks(shop)
    page.goto("/tasks")
    live(page)
    press(page, "j j")
    page.keyboard.press("j")
    expect(link(page, "Third")).to_be_focused()
    task(shop, "Newest")
    shop.api("DELETE", f"tasks/{first['id']}")
    expect(page.locator("tbody tr")).to_have_count(4)
    expect(page.locator("tbody tr").nth(1)).to_contain_text("cancelled")
    expect(link(page, "Third")).to_be_focused()
    press(page, "k")
    expect(link(page, "Second")).to_be_focused()


def test_when_its_row_goes_the_cursor_goes_on_from_there(shop, page):
    _, second, _ = three_tasks(shop)
    page.goto("/tasks?status=open")
    live(page)
    press(page, "j j")
    expect(link(page, "Second")).to_be_focused()
    shop.api("DELETE", f"tasks/{second['id']}")
    expect(page.locator("tbody tr")).to_have_count(2)
    press(page, "j")
    expect(link(page, "Third")).to_be_focused()


def test_a_row_without_a_link_keeps_the_cursor_too(shop, page):
    for name in ("one", "two"):
        shop.register(name)
    page.goto("/events?kind=server")  # nothing in these rows leads anywhere
    live(page)
    press(page, "j j")
    row = page.locator("tbody tr").filter(has_text="one")
    expect(row).to_be_focused()
    shop.register("three")
    expect(page.locator("tbody tr")).to_have_count(3)
    expect(row).to_be_focused()


def test_the_search_field_takes_what_is_typed_and_no_key_acts_there(shop, page):
    three_tasks(shop)
    page.goto("/tasks")
    press(page, "/")
    field = page.get_by_role("searchbox")
    expect(field).to_be_focused()
    page.keyboard.type("c?gtj/")
    expect(field).to_have_value("c?gtj/")
    press(page, "Control+k")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(field).to_be_focused()
    expect(page).to_have_url(f"{shop.url}/tasks")


def test_without_a_search_field_the_palette_is_opened(shop, page):
    page.goto("/servers")
    press(page, "/")
    expect(page.get_by_role("combobox", name="Find")).to_be_focused()
    expect(page.get_by_role("combobox", name="Find")).to_have_value("")


@pytest.mark.parametrize("place", ["select", "dialog", "modifier"])
def test_no_key_acts(shop, page, place):
    page.goto("/tasks")
    if place == "select":
        page.locator("#server").focus()
    elif place == "dialog":
        press(page, "?")
    keys = ["c", "g", "o"] if place != "modifier" else ["Alt+c", "Control+c", "Meta+c"]
    for key in keys:
        page.keyboard.press(key)
    if place == "dialog":
        press(page, "Escape")
    else:
        page.locator("h1").click()
    press(page, "g e")  # had one of them acted, the page would be another by now
    expect(page).to_have_url(f"{shop.url}/events")
    page.go_back()
    expect(page).to_have_url(f"{shop.url}/tasks")


def test_no_key_acts_in_a_terminal(shop, page, start_agent):
    start_agent(shop, "dev")
    body = {"server_id": "dev", "name": "shell", "command": ["cat", "-v"]}
    made = shop.api("POST", "sessions", body)
    page.goto(f"/sessions/{made['id']}")
    expect(page.locator("#terminal-part")).to_have_attribute("data-state", "live")
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.type("g o?c/j")
    press(page, "Control+k Enter")
    page.get_by_text("Screen as it was last seen").click()
    expect(page.locator("#screen")).to_contain_text("g o?c/j^K")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page).to_have_url(f"{shop.url}/sessions/{made['id']}")


# ── the inbox ─────────────────────────────────────────────────────────────────────────────────


def inbox(hub, steps: int = 2) -> tuple[str, str]:
    """A task with a plan to approve and one with a question: their ids, as they wait."""
    key = hub.register("dev", capabilities={"slots": 8})["api_key"]
    hub.api("POST", "servers/heartbeat", {}, key=key)
    planned = task(hub, "Importer", command=["make"])["id"]
    hub.api("POST", f"tasks/{planned}/assign", {"server": "dev", "require_plan": True})
    plan = {"summary": "In steps", "steps": [f"step {n}" for n in range(steps)]}
    hub.api("POST", f"tasks/{planned}/plan", {"plan": plan}, key=key)
    asking = task(hub, "Cart", command=["make"], auto_assign=True)["id"]
    hub.api("POST", f"tasks/{asking}/start", {}, key=key)
    hub.api("POST", f"tasks/{asking}/help", {"question": "Redis?"}, key=key)
    return planned, asking


def test_a_plan_is_approved_by_a_key_when_it_is_the_focused_item(shop, page):
    planned, _ = inbox(shop)
    page.goto("/inbox")
    live(page)
    press(page, "a")  # nothing has the focus
    press(page, "j j a")  # on a question there is nothing to approve
    expect(page.locator("article").nth(1)).to_be_focused()
    press(page, "r")
    answer = page.get_by_label("Your answer")
    expect(answer).to_be_focused()
    page.keyboard.type("a great idea")
    expect(answer).to_have_value("a great idea")
    assert shop.api("GET", f"tasks/{planned}")["status"] == "plan_review"
    page.locator("h1").click()
    press(page, "k")
    expect(page.locator("article").first).to_be_focused()
    press(page, "a")
    expect(page.get_by_text("plan approved by admin: Importer")).to_be_visible()
    assert shop.api("GET", f"tasks/{planned}")["status"] == "running"
    expect(answer).to_have_value("a great idea")


def test_what_is_not_on_the_screen_is_not_decided_but_shown(shop, page):
    planned, _ = inbox(shop, steps=80)
    page.goto("/inbox")
    live(page)
    press(page, "j a")
    button = page.get_by_role("button", name="Approve the plan")
    expect(button).to_be_focused()
    expect(button).to_be_in_viewport()
    assert shop.api("GET", f"tasks/{planned}")["status"] == "plan_review"
    press(page, "a")  # now that it is there
    expect(page.get_by_text("plan approved by admin: Importer")).to_be_visible()


# ── the palette ───────────────────────────────────────────────────────────────────────────────


def palette(page, typed: str = ""):
    # A dialog that was closed has let go of the focus by the next picture.
    wait_until(lambda: page.evaluate("!document.activeElement?.closest('dialog')"))
    press(page, "Control+k")
    expect(page.get_by_role("combobox", name="Find")).to_be_focused()
    page.keyboard.type(typed)
    return page.get_by_role("listbox", name="Found").get_by_role("option")


def test_the_palette_leads_to_a_task_by_the_keyboard_alone(shop, page):
    made = task(shop, "Write the parser")
    task(shop, "Write the printer")
    page.goto("/tasks")
    link(page, "Sessions").focus()
    options = palette(page, "write")
    expect(options).to_have_count(3)
    field = page.get_by_role("combobox", name="Find")
    for chosen in (0, 1):
        expect(options.nth(chosen)).to_have_attribute("aria-selected", "true")
        expect(page.locator("[role=option][aria-selected=true]")).to_have_count(1)
        expect(field).to_have_attribute(
            "aria-activedescendant", options.nth(chosen).get_attribute("id")
        )
        press(page, "ArrowDown")
    press(page, "ArrowUp")
    expect(options.nth(1)).to_contain_text("Write the parser")
    press(page, "Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(link(page, "Sessions")).to_be_focused()
    expect(palette(page, "wrpars").first).to_contain_text("Write the parser")  # fuzzy enough
    press(page, "Enter")
    expect(page).to_have_url(f"{shop.url}/tasks/{made['id']}")


def test_the_palette_knows_pages_and_does_what_pages_do(shop, page):
    page.goto("/tasks")
    expect(palette(page, "pipel").first).to_contain_text("Pipelines")
    press(page, "Enter")
    expect(page).to_have_url(f"{shop.url}/pipelines")
    for typed, shown in (("add a", "Add a server"), ("new proj", "New project")):
        expect(palette(page, typed).first).to_contain_text(shown)
        press(page, "Enter")
        expect(page.get_by_role("dialog", name=shown)).to_be_visible()
        press(page, "Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(palette(page, typed).first).to_contain_text(shown)  # on its own page, too
        press(page, "Enter")
        expect(page.get_by_role("dialog", name=shown)).to_be_visible()
        press(page, "Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
    palette(page, "keyb")
    press(page, "Enter")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    press(page, "Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    palette(page, "sign")
    press(page, "Enter")
    expect(page).to_have_url(f"{shop.url}/login")


def test_the_palette_finds_servers_sessions_and_pipelines(shop, page, start_agent):
    start_agent(shop, "grumpy-dev")
    body = {"server_id": "grumpy-dev", "name": "grumpy-shell", "command": ["cat"]}
    made = shop.api("POST", "sessions", body)
    applied = shop.api(
        "POST", "pipelines", {"name": "grumpy v2", "tasks": [{"id": "T1", "title": "a"}]}
    )
    page.goto("/tasks")
    options = palette(page, "grumpy")
    for kind, path in (
        ("pipeline", f"/pipelines/{applied['id']}"),
        ("session", f"/sessions/{made['id']}"),
        ("server", f"/servers#server-{shop.api('GET', 'servers/grumpy-dev')['id']}"),
    ):
        found = options.filter(has_text=re.compile(rf"{kind}\s*$"))
        expect(found).to_have_count(1)
        expect(found).to_have_attribute("data-href", path)


def test_what_the_palette_shows_is_only_text(shop, page):
    task(shop, HOSTILE)
    page.goto("/")
    expect(palette(page, "parser").first).to_contain_text(HOSTILE)
    assert page.locator("#palette img").count() == 0
    assert page.evaluate("window.owned") is None


def test_a_person_finds_only_what_they_may_see(shop, open_browser):
    task(shop, "Parser of the shop")
    other = shop.api("POST", "projects", {"name": "library"})
    task(shop, "Parser of the library", project_id=other["id"])
    user = {"username": "vera", "password": PASSWORD, "roles": {"library": "viewer"}}
    shop.api("POST", "users", user)
    login = {"username": "vera", "password": PASSWORD}
    page = open_browser(shop.api("POST", "auth/login", login)["token"])
    page.goto("/")
    options = palette(page, "parser")
    expect(options.first).to_contain_text("Parser of the library")
    expect(options).to_have_count(2)  # and the search for all of them
    for _ in "parser":
        press(page, "Backspace")
    expect(options.filter(has_text="Overview")).to_have_count(1)
    for never in ("Add a server", "New project"):
        expect(options.filter(has_text=never)).to_have_count(0)


def test_a_palette_without_its_hub_still_has_the_pages(shop, page):
    page.goto("/tasks")
    page.route("**/palette*", lambda route: route.fulfill(status=204))  # as from a proxy
    options = palette(page, "eve")
    expect(page.locator("#palette-said")).to_contain_text("The hub did not answer")
    expect(options.first).to_contain_text("Events")
    press(page, "Enter")
    expect(page).to_have_url(f"{shop.url}/events")


@pytest.mark.parametrize(
    ("typed", "rank"),
    [("write", 3), ("4f2a", 3), ("#4f2a", 3), ("4f2", 0), ("parser write", 2), ("wtp", 1)]
    + [("WRITE", 3), ("parserr", 0), ("pw", 0)],
)
def test_how_well_a_thing_fits(typed, rank):
    row = {"id": "4f2ab0c1-0000", "name": "Write the parser"}
    assert pages._rank(typed.lower(), row) == rank


def find(admin, app, typed: str):
    answer = Client(app, admin.headers).get("/palette", query_string={"q": typed})
    assert answer.status_code == 200
    return re.findall(r'id="found-([\w-]+)"', answer.text)


def test_few_are_shown_the_best_then_the_newest_first(app, admin, world):
    made = [world.task(f"parser {n}")["id"] for n in range(pages.FOUND_MOST + 3)]
    best = world.task("a parser to be had")["id"]
    newest = [*reversed(made)][: pages.FOUND_MOST]
    assert find(admin, app, "parser") == [*newest, "in-tasks"]
    assert find(admin, app, "had") == [best, "in-tasks"]
    assert find(admin, app, best[:8]) == [best, "in-tasks"]
    assert find(admin, app, "") == []
    assert find(admin, app, "%") == ["in-tasks"]


def test_the_palette_reads_no_more_than_the_newest(app, admin, world, monkeypatch):
    monkeypatch.setattr(pages, "LOOKED_THROUGH", 20)
    first = world.task("the first")["id"]
    assert find(admin, app, "first") == [first, "in-tasks"]
    for n in range(20):
        world.task(f"task {n}")
    assert find(admin, app, "first") == ["in-tasks"]


@pytest.mark.parametrize("table", ["task", "session", "pipeline"])
def test_the_palette_walks_an_index(world, table):
    plan = models.rows(
        f"EXPLAIN QUERY PLAN SELECT rowid, id FROM {table} WHERE project_id = ?"
        " ORDER BY rowid DESC LIMIT 9",
        ("x",),
    )
    told = " ".join(step["detail"] for step in plan)
    assert f"USING INDEX {table}_project" in told
    assert "TEMP B-TREE" not in told


# ── errors ────────────────────────────────────────────────────────────────────────────────────


def test_a_page_that_is_not_there_has_ways_on(shop, page, problems):
    page.goto("/nowhere?project=nope")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not here")
    problems.clear()
    page.get_by_role("button", name="Find something else").focus()
    press(page, "Enter")
    expect(page.get_by_role("combobox", name="Find")).to_be_focused()
    press(page, "Escape")
    page.get_by_role("link", name="To the overview").click()
    expect(page).to_have_url(f"{shop.url}/")


def test_a_broken_page_says_so_and_offers_to_try_again(app, admin, world):
    made = world.task("Write the parser")["id"]
    with models.transaction():
        models.execute("UPDATE task SET acceptance_criteria = '{' WHERE id = ?", (made,))
    answer = Client(app, admin.headers).get(f"/tasks/{made}?x=1")
    assert answer.status_code == 500
    assert "Something broke" in answer.text
    assert f'href="/tasks/{made}?x=1">Try again</a>' in answer.text
    assert "Traceback" not in answer.text and "Error" not in answer.text


def test_who_may_not_is_told_who_can_help(shop, open_browser, problems):
    made = task(shop, "Write the parser")
    user = {"username": "vera", "password": PASSWORD, "roles": {"shop": "viewer"}}
    shop.api("POST", "users", user)
    login = {"username": "vera", "password": PASSWORD}
    page = open_browser(shop.api("POST", "auth/login", login)["token"])
    page.goto(f"/tasks/{made['id']}")
    page.evaluate(
        """path => {
          const form = document.querySelector(".who").cloneNode(true);
          form.action = path;
          document.body.append(form);
          form.submit();
        }""",
        f"/tasks/{made['id']}/cancel",
    )
    expect(page.get_by_role("heading", level=1)).to_have_text("Not allowed")
    expect(page.locator("main")).to_contain_text("An admin of the project")
    expect(page.get_by_role("link", name="Try again")).to_have_count(0)
    problems.clear()
    page.get_by_role("link", name="To the overview").click()
    expect(page).to_have_url(f"{shop.url}/")


# ── the frame ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [320, 390, 800, 1000, 1280, 1600])
def test_the_bar_fits_and_every_entry_can_be_reached(shop, open_browser, width):
    shop.api("POST", "projects", {"name": "a library with a rather long name"})
    page = open_browser(viewport={"width": width, "height": 800})
    page.goto("/docs" if width == 390 else "/events")
    bar = "document.querySelector('header.bar')"
    assert page.evaluate(f"{bar}.scrollWidth <= {bar}.clientWidth")
    expect(page.locator("nav [aria-current=page]")).to_be_in_viewport(ratio=0.95)
    entries = page.locator("nav a")
    for number in range(entries.count()):
        entries.nth(number).focus()
        expect(entries.nth(number)).to_be_in_viewport(ratio=0.95)
    height = page.locator("header.bar").bounding_box()["height"]
    assert height < (64 if width >= 1000 else 130)


def test_the_content_is_a_tab_away_and_nothing_reaches_into_the_bar(shop, page):
    three_tasks(shop)
    page.goto("/tasks")
    press(page, "Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press(page, "Enter Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_an_area_is_named_when_it_is_there(app, admin):
    shown = Client(app, admin.headers).get("/").text
    for name, endpoint, *_ in pages.NAV:
        assert (endpoint in app.view_functions) == bool(
            re.search(rf">{name}\s*(<span|</a>)", shown)
        ), name


def test_no_script_writes_a_path_of_the_hub():
    """Where things are stands in the page, which knows the prefix."""
    paths = r"""["'`]/(?:api|static|login|tasks|ws|events)\b"""
    for script in Path(pages.__file__).parent.joinpath("static").glob("*.js"):
        assert not re.findall(paths, script.read_text()), script.name
