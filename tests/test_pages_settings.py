"""The pages of servers, projects, settings and events in a real Chromium."""

import re
import sqlite3

import pytest
from playwright.sync_api import expect

import auth
import models
import picture
import reading
import servers
from browsing import live
from conftest import PASSWORD
from test_pages_browser import forgive, serve, task

SYSTEM = {"cpu_count": 4, "load_1m": 2.0, "memory_percent": 31.4, "disk_percent": 80}


@pytest.fixture
def page(open_browser):
    return open_browser()


def person(hub, name: str = "olga", role: str = "operator", **more) -> str:
    """A user with a role in the project; a token of theirs."""
    hub.api(
        "POST", "users", {"username": name, "password": PASSWORD, "roles": {"shop": role}} | more
    )
    return hub.api("POST", "auth/login", {"username": name, "password": PASSWORD})["token"]


@pytest.fixture
def post(open_browser):
    """Send a form of a signed-in browser; (status, text)."""

    def send(path: str, fields: dict, token: str):
        page = open_browser(token)
        page.goto("/tasks")
        csrf = page.locator("meta[name=csrf-token]").get_attribute("content")
        return page.evaluate(
            """async ([path, fields]) => {
                const answer = await fetch(path, {method: "POST", body: new URLSearchParams(fields),
                    headers: {"HX-Request": "true"}});
                return [answer.status, await answer.text()]; }""",
            [path, {"csrf_token": csrf} | fields],
        )

    return send


# ── servers ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hub(tick_s=0.1)
def test_the_last_hour_of_a_server_is_drawn_and_said(shop, page):
    key = serve(shop)
    shop.api("POST", "servers/heartbeat", {"system_info": SYSTEM}, key=key)
    chart = lambda name: page.get_by_role("img", name=re.compile(f"^{name} in the last hour"))  # noqa: E731
    page.goto("/servers")
    for name, percent in (("Load", 50), ("Memory", 31), ("Disk", 80)):
        for _ in range(100):
            if chart(name).count():
                break
            page.reload()
        said = f"{name} in the last hour: {percent} % now, from {percent} % to {percent} %"
        expect(chart(name)).to_have_attribute("aria-label", said)
    page.get_by_role("link", name="dev", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("dev")
    expect(chart("Load")).to_be_visible()
    expect(page.locator("main")).to_contain_text("server online")


def test_a_line_has_gaps_where_the_server_was_silent():
    samples = [{"minute": m, "cpu": 10.0} for m in (59, 58, 57, 20, 19, 3)]
    line = picture.spark(samples, "cpu")
    assert [len(points.split()) for points in line["lines"]] == [3, 2, 2]
    assert picture.spark([], "cpu") is None
    assert picture.spark([{"minute": 1, "cpu": None}], "cpu") is None
    over = picture.spark([{"minute": 1, "cpu": 250.0}, {"minute": 0, "cpu": 0.0}], "cpu")
    assert (over["last"], over["least"], over["most"]) == (0, 0, 250)
    assert all(0 <= float(p.split(",")[1]) <= picture.SPARK_H for p in over["lines"][0].split())


@pytest.mark.parametrize("value", ["much", None, True, float("nan"), -1, [], {}])
def test_what_an_agent_says_of_its_load_is_a_number_or_nothing(value):
    assert servers._shares({"cpu_count": 2, "load_1m": value})[0] is None
    assert servers._shares({"memory_percent": value})[1] is None
    assert servers._shares({"cpu_count": value or 0, "load_1m": 1})[0] is None


def test_a_server_is_described_by_hand(shop, page, problems):
    serve(shop)
    serve(shop, "other")
    page.goto("/servers")
    page.get_by_role("link", name="dev", exact=True).click()
    page.get_by_label("Name").fill("other")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert").filter(has_text="There is a server 'other'")).to_be_visible()
    forgive(problems, 409)
    page.get_by_label("Name").fill("gpu box")
    page.get_by_label("Slots").fill("7")
    page.get_by_label("Capabilities").fill("gpu, big memory")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("gpu box")
    stands = shop.api("GET", "servers/gpu box")
    assert (stands["slots"], stands["capabilities"]) == (7, ["gpu", "big", "memory"])


def test_a_server_is_not_described_without_the_right_or_with_nonsense(shop, post, problems):
    serve(shop)
    token, server_id = person(shop), shop.api("GET", "servers/dev")["id"]
    path = f"/servers/{server_id}/change"
    assert post(path, {"name": "mine"}, token)[0] == 403
    for fields, why in (
        ({"name": ""}, "needs a name"),
        ({"name": "x", "slots": "many"}, "whole number"),
        ({"name": "x", "slots": "0"}, "whole number"),
    ):
        status, said = post(path, fields, shop.login())
        assert (status, why in said) == (422, True)
    assert shop.api("GET", "servers/dev")["name"] == "dev"
    problems.clear()


# ── projects ──────────────────────────────────────────────────────────────────────────────────


def test_projects_are_made_renamed_and_given_people(shop, page):
    token = person(shop)
    task(shop)
    page.goto("/projects")
    card = page.locator(".cards > li")
    expect(card).to_contain_text("1 not finished")
    expect(card).to_contain_text("olga operator")
    live(page).get_by_text("Change", exact=True).click()
    page.get_by_label("Name", exact=True).locator("visible=true").fill("web shop")
    page.get_by_role("button", name="Save").click()
    expect(card.get_by_role("heading")).to_have_text("web shop")
    page.get_by_label("Role").select_option("viewer")
    page.get_by_role("button", name="Set the role").click()
    expect(card).to_contain_text("olga viewer")
    page.get_by_label("Role").select_option("none")
    page.get_by_role("button", name="Set the role").click()
    expect(card).not_to_contain_text("olga viewer")
    assert shop.ask("GET", "tasks", token=token).json()["tasks"] == []
    page.get_by_role("button", name="New project").click()
    page.get_by_role("dialog").get_by_label("Name").fill("desk")
    page.get_by_role("button", name="Create project").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("desk")


def test_who_is_no_admin_changes_no_project_and_no_person(shop, open_browser, post, problems):
    token = person(shop)
    [project] = shop.api("GET", "projects")["projects"]
    olga = shop.api("GET", "users")["users"][-1]
    page = open_browser(token)
    page.goto("/projects")
    expect(page.get_by_role("heading", level=2)).to_have_text("shop")
    expect(page.get_by_text("olga operator")).to_have_count(0)
    expect(page.get_by_text("Change", exact=True)).to_have_count(0)
    page.goto("/settings")
    expect(page.get_by_role("heading", name="Users")).to_have_count(0)
    expect(page.get_by_role("heading", name="The hub")).to_have_count(0)
    for path, fields in (
        (f"/projects/{project['id']}", {"name": "mine"}),
        (f"/projects/{project['id']}/members", {"user": "olga", "role": "admin"}),
        ("/projects", {"name": "new"}),
        ("/settings/users", {"username": "eve", "is_admin": "1"}),
        (f"/settings/users/{olga['id']}", {"is_admin": "1"}),
        (f"/settings/users/{olga['id']}/delete", {}),
    ):
        assert post(path, fields, token)[0] == 403, path
    assert [u["username"] for u in shop.api("GET", "users")["users"]] == ["admin", "olga"]
    assert not shop.api("GET", "users")["users"][1]["is_admin"]
    problems.clear()


# ── one's own account ─────────────────────────────────────────────────────────────────────────


def test_the_own_password_is_changed_and_others_are_signed_out(shop, open_browser, problems):
    first, other = person(shop), None
    other = shop.api("POST", "auth/login", {"username": "olga", "password": PASSWORD})["token"]
    page = open_browser(first)
    page.goto("/settings")
    page.get_by_label("Present password").fill("wrong one")
    page.get_by_label("New password").fill("a longer secret")
    page.get_by_role("button", name="Change the password").click()
    expect(page.get_by_role("alert").filter(has_text="is wrong")).to_be_visible()
    forgive(problems, 422)
    page.get_by_label("Present password").fill(PASSWORD)
    page.get_by_role("button", name="Change the password").click()
    expect(page.get_by_text("The password is changed.")).to_be_visible()
    expect(page.get_by_label("New password")).to_have_value("")
    assert shop.ask("GET", "auth/me", token=other).status_code == 401
    assert shop.ask("GET", "auth/me", token=first).status_code == 200
    for password, status in ((PASSWORD, 401), ("a longer secret", 200)):
        said = {"username": "olga", "password": password}
        assert shop.ask("POST", "auth/login", said).status_code == status


def test_a_short_password_and_guesses_without_end_are_refused(shop, post, problems):
    token = person(shop)
    change = lambda old, new: post("/settings/password", {"old": old, "new": new}, token)  # noqa: E731
    assert change(PASSWORD, "short")[0] == 422
    assert change(PASSWORD, "x" * 1001)[0] == 422
    tries = [change(f"guess {n}", "a longer secret")[0] for n in range(auth.TRIES + 1)]
    assert tries[-1] == 429 and set(tries[:-1]) <= {422, 429}
    problems.clear()


def test_tokens_are_made_shown_once_and_ended(shop, page, open_browser):
    page.goto("/settings")
    live(page).get_by_label("What it is for").fill("nightly build")
    page.get_by_role("button", name="Make a token").click()
    secret = page.get_by_label("The token nightly build").input_value()
    assert shop.ask("GET", "auth/me", token=secret).status_code == 200
    row = page.get_by_role("row", name=re.compile("Program nightly build"))
    expect(row).to_be_visible()
    page.reload()
    assert secret not in page.content()
    page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="End").click()
    expect(row).to_have_count(0)
    assert shop.ask("GET", "auth/me", token=secret).status_code == 401


def test_one_signs_out_everywhere_else(shop, open_browser):
    here = person(shop)
    others = [
        shop.api("POST", "auth/login", {"username": "olga", "password": PASSWORD})["token"]
        for _ in range(2)
    ]
    page = open_browser(here)
    page.goto("/settings")
    expect(live(page).get_by_role("row")).to_have_count(4)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Sign out everywhere else").click()
    expect(page.get_by_role("row")).to_have_count(2)
    expect(page.get_by_text("this one")).to_be_visible()
    assert {shop.ask("GET", "auth/me", token=t).status_code for t in others} == {401}


def test_a_token_of_another_person_is_not_ended(shop, post, problems):
    token = person(shop)
    shop.login()
    admins = auth_tokens(shop)
    status, said = post(f"/settings/tokens/{admins[0]}/end", {}, token)
    assert (status, "no such token of yours" in said) == (404, True)
    assert post("/settings/tokens", {"name": " "}, token)[0] == 422
    assert shop.ask("GET", "auth/me").status_code == 200
    problems.clear()


def auth_tokens(hub) -> list[str]:
    """Ids of the admin's tokens, read from the hub's file."""
    with sqlite3.connect(f"file:{hub.data / 'hub.db'}?mode=ro", uri=True) as db:
        return [
            i
            for (i,) in db.execute(
                "SELECT t.id FROM token t JOIN user u ON u.id = t.user_id"
                " WHERE u.username = 'admin'"
            )
        ]


# ── people ────────────────────────────────────────────────────────────────────────────────────


def test_an_admin_makes_changes_locks_out_and_deletes_a_user(shop, page, problems):
    page.goto("/settings")
    live(page).get_by_label("User name").fill("vera")
    page.get_by_label("First password").fill(PASSWORD)
    page.get_by_label("Project", exact=True).select_option("shop")
    page.get_by_label("Role there").select_option("viewer")
    page.get_by_role("button", name="Create the user").click()
    vera = page.locator(".users > li").filter(has_text="vera")
    expect(vera).to_contain_text("shop viewer")
    said = {"username": "vera", "password": PASSWORD}
    token = shop.api("POST", "auth/login", said)["token"]
    vera.get_by_text("Change vera").click()
    vera.get_by_label("Locked out").check()
    vera.get_by_role("button", name="Save vera").click()
    expect(vera.locator(".state")).to_have_text("locked out")
    assert shop.ask("GET", "auth/me", token=token).status_code == 401
    page.once("dialog", lambda dialog: dialog.accept())
    vera.get_by_role("button", name="Delete vera").click()
    expect(vera).to_have_count(0)
    me = page.locator(".users > li").filter(has_text="admin")
    expect(me.get_by_role("button")).to_have_count(0)  # nobody locks themselves out
    page.get_by_label("User name").fill("admin")
    page.get_by_role("button", name="Create the user").click()
    expect(page.get_by_role("alert").filter(has_text="already")).to_be_visible()
    forgive(problems, 409)


def test_the_settings_of_the_hub_are_shown_to_its_admin(shop, page):
    page.goto("/settings")
    row = page.get_by_role("row", name=re.compile("^heartbeat_s"))
    expect(row).to_contain_text("how often agents give a sign of life")


# ── events ────────────────────────────────────────────────────────────────────────────────────


def test_events_are_filtered_and_new_ones_come_on_top(shop, page):
    serve(shop)
    made = task(shop, "First")
    page.goto("/events")
    live(page).get_by_label("About").select_option("tasks")
    expect(page).to_have_url(re.compile("kind=task$"))
    kinds = page.locator("tbody code")
    assert all(kind.startswith("task_") for kind in kinds.all_inner_texts())
    live(page)
    shop.api("DELETE", f"tasks/{made['id']}")
    expect(kinds.first).to_have_text("task_cancelled")
    page.get_by_label("Type").fill("task_created")
    page.get_by_label("By").fill("admin")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="Clear").click()
    page.get_by_label("Server").select_option("dev")
    expect(page).to_have_url(re.compile("server="))
    expect(page.locator("tbody")).to_contain_text("server online")
    expect(page.locator("tbody")).not_to_contain_text("task_created")


def test_older_events_are_a_page_away_and_stay_as_they_are(shop, page):
    tasks = [{"id": f"t{n}", "title": f"Task {n}"} for n in range(300)]
    shop.api("POST", "pipelines", {"name": "many", "tasks": tasks})
    page.goto("/events?kind=task")
    expect(page.locator("tbody tr")).to_have_count(200)
    page.get_by_role("link", name="Older events").click()
    expect(page.locator("tbody tr")).to_have_count(100)
    page.get_by_role("link", name="The newest").click()
    expect(page).to_have_url(re.compile(r"/events\?kind=task$"))


def test_an_unknown_kind_is_refused(shop, page, problems):
    page.goto("/events?kind=moon")
    expect(page.locator("main")).to_contain_text("Unknown kind")
    problems.clear()


def test_a_page_of_events_looks_no_further_than_it_may(db, monkeypatch):
    monkeypatch.setattr(reading, "LOOKED_BACK", 10)
    with models.transaction() as tx:
        tx.emit("user_created", None, "x", {"username": "a"})
        for _ in range(25):
            tx.emit("project_created", None, "x", {"name": "p"})
    pages, before = [], None
    for _ in range(10):
        found, before = reading.events_page([], True, {"type": "user_created"}, before, 5)
        pages.append(len(found))
        if before is None:
            break
    assert (pages, before) == ([0, 0, 1], None)
    plan = models.rows(
        "EXPLAIN QUERY PLAN SELECT * FROM event WHERE project_id IS ? AND id < ? AND id > ?"
        " AND type = ? ORDER BY id DESC LIMIT ?",
        ["p", 9, 1, "t", 5],
    )
    assert "USING INDEX event_project" in plan[0]["detail"]
