"""The pictures of tasks in a real Chromium: the graph, what ran when, a file drawn and applied."""

import random
import re
import time

import pytest
from playwright.sync_api import expect

import picture
from browsing import live
from conftest import PASSWORD, ROOT, wait_until
from test_pages_browser import drawn, serve, task

SHOP = (ROOT / "examples" / "ecommerce.yaml").read_text()


@pytest.fixture
def page(open_browser):
    return open_browser()


def applied(hub, name: str, tasks: list[dict]) -> dict:
    return hub.api("POST", "pipelines", {"name": name, "tasks": tasks})


def node(page, task_id: str):
    return page.locator(f"#node-{task_id}")


# ── the graph ─────────────────────────────────────────────────────────────────────────────────


def test_boxes_change_as_it_happens_and_the_picture_stays_as_it_was_zoomed(shop, page):
    serve(shop)
    made = applied(
        shop, "two", [{"id": "a", "title": "A"}, {"id": "b", "title": "B", "depends_on": ["a"]}]
    )
    first, second = made["id_map"]["a"], made["id_map"]["b"]
    page.goto(f"/pipelines/{made['id']}")
    live(page).get_by_role("button", name="Zoom in").click()
    wide = page.locator(".graph > svg").get_attribute("width")
    expect(node(page, second)).to_have_attribute("data-state", "blocked")
    shop.api("POST", f"tasks/{first}/assign", {"server": "dev"})
    expect(node(page, first)).to_have_attribute("data-state", "assigned")
    expect(node(page, first)).to_contain_text("dev")
    shop.api("POST", f"tasks/{first}/start", {})
    shop.api("POST", f"tasks/{first}/complete", {})
    expect(node(page, first)).to_have_attribute("data-state", "done")
    expect(node(page, first).locator("title")).to_have_text("A: done")
    expect(page.locator(".edge-resolved")).to_have_count(1)
    expect(node(page, second)).not_to_have_attribute("data-state", "blocked")
    assert page.locator(".graph > svg").get_attribute("width") == wide
    node(page, first).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("A")


def test_the_graph_of_a_project_takes_new_tasks_in(shop, page):
    page.goto("/graph")
    expect(page.get_by_text("There is nothing to draw yet")).to_be_visible()
    live(page)
    first = task(shop, "Design")
    task(shop, "Build", dependency_ids=[first["id"]])
    expect(page.locator(".graph [data-task]")).to_have_count(2)
    expect(page.locator(".edge")).to_have_count(1)
    page.get_by_role("button", name="Zoom out").click()
    small = page.locator(".graph > svg").get_attribute("width")
    task(shop, "Alone")
    expect(page.locator(".graph [data-task]")).to_have_count(3)
    shop.api("DELETE", f"tasks/{first['id']}")
    expect(node(page, first["id"])).to_have_attribute("data-state", "cancelled")
    page.get_by_role("link", name="Only unfinished").click()
    expect(page.locator(".graph [data-task]")).to_have_count(2)
    assert float(small) > 0


def test_the_picture_is_zoomed_and_moved_by_key_wheel_and_mouse(shop, page):
    chain = [
        {"id": f"t{n}", "title": f"Task {n}", "depends_on": [f"t{n - 1}"] if n else []}
        for n in range(12)
    ]
    made = applied(shop, "chain", chain)
    page.goto(f"/pipelines/{made['id']}")
    graph = live(page).locator(".graph")
    width = lambda: float(graph.locator("> svg").get_attribute("width"))  # noqa: E731
    whole = width()
    assert whole > 3000
    page.get_by_role("button", name="Fit").click()
    assert width() < 1300
    graph.focus()
    for key, larger in (("+", True), ("-", False), ("+", True)):
        before = width()
        page.keyboard.press(key)
        assert (width() > before) is larger
    page.keyboard.press("0")
    box = graph.bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 40)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")
    wait_until(lambda: width() > 2000)
    before = graph.evaluate("e => e.scrollLeft")
    page.mouse.move(box["x"] + 600, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 40, steps=4)
    page.mouse.up()
    assert graph.evaluate("e => e.scrollLeft") > before + 200
    expect(page).to_have_url(re.compile("/pipelines/"))  # the drag has opened nothing


def test_states_are_told_of_visible_tasks_only(shop, open_browser):
    mine = task(shop, "Mine")
    hidden = shop.api("POST", "projects", {"name": "hidden"})
    secret = task(shop, "Secret", project_id=hidden["id"])
    shop.api(
        "POST", "users", {"username": "vic", "password": PASSWORD, "roles": {"shop": "viewer"}}
    )
    token = shop.api("POST", "auth/login", {"username": "vic", "password": PASSWORD})["token"]
    page = open_browser(token)
    page.goto("/graph")
    ids = f"{mine['id']},{secret['id']},nonsense,"
    told = page.evaluate(f"fetch('/graph/states?ids={ids}').then((a) => a.json())")
    assert list(told["tasks"]) == [mine["id"]]


def test_a_graph_of_five_hundred_tasks_is_drawn_and_lives(shop, page):
    serve(shop, capabilities={"slots": 50})
    chance = random.Random(7)
    tasks = [
        {"id": f"t{n}", "title": f"Task {n}", "depends_on": _some_before(chance, n)}
        for n in range(500)
    ]
    made = applied(shop, "big", tasks)
    page.goto(f"/pipelines/{made['id']}")
    expect(live(page).locator(".graph [data-task]")).to_have_count(500)
    first = made["id_map"]["t0"]
    shop.api("POST", f"tasks/{first}/assign", {"server": "dev"})
    expect(node(page, first)).to_have_attribute("data-state", "assigned")
    expect(page.locator("tbody tr")).to_have_count(100)
    page.get_by_role("link", name="All 500 in the table of tasks").click()
    expect(page.locator("tbody tr")).to_have_count(100)
    expect(page.get_by_role("link", name="Older tasks")).to_be_visible()


def _some_before(chance: random.Random, n: int) -> list[str]:
    near = range(max(0, n - 12), n)
    return [f"t{m}" for m in chance.sample(near, min(len(near), chance.choice([0, 1, 1, 2])))]


# ── what ran when ─────────────────────────────────────────────────────────────────────────────


def test_what_ran_is_drawn_by_server_with_each_attempt(shop, page):
    serve(shop)
    made = task(shop, "Build it")
    page.goto("/graph?view=time")
    expect(page.get_by_text("Nothing of this has run yet.")).to_be_visible()
    live(page)
    for verb, said in (
        ("assign", {"server": "dev"}),
        ("start", {}),
        ("fail", {"error": "no disk"}),
        ("retry", {}),  # it is given to the same server at once
        ("start", {}),
    ):
        shop.api("POST", f"tasks/{made['id']}/{verb}", said)
    row = page.get_by_role("link", name="Build it: attempt 1 failed")
    expect(row).to_have_count(1)
    expect(row.locator(".run")).to_have_count(2)
    expect(page.locator(".lane")).to_have_text("dev")
    expect(row.locator(".run.tone-live .run-work")).to_have_count(1)
    row.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Build it")


# ── a new pipeline ────────────────────────────────────────────────────────────────────────────


def test_a_file_is_opened_checked_drawn_and_applied(shop, page):
    for name in ("dev-backend", "dev-desktop"):
        serve(shop, name)
    page.goto("/pipelines")
    page.get_by_role("link", name="New pipeline").click()
    page.wait_for_load_state("load")  # a person takes longer to choose one
    page.locator("#open-file").set_input_files(ROOT / "examples" / "ecommerce.yaml")
    expect(page.get_by_label("The pipeline's file")).to_have_value(SHOP)
    page.get_by_role("button", name="Check and draw").click()
    checked = page.locator("#checked")
    expect(checked).to_contain_text("ecommerce: 7 tasks, 8 dependencies. Nothing was created yet.")
    expect(checked.locator("[data-task]")).to_have_count(7)
    assert shop.api("GET", "tasks")["tasks"] == []
    assert shop.api("GET", "pipelines")["pipelines"] == []
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("ecommerce")
    assert len(shop.api("GET", "tasks")["tasks"]) == 7
    kinds = [e["type"] for e in shop.api("GET", "events?limit=1000")["events"]]
    assert kinds.count("task_created") == 7  # what was only looked at has left nothing


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{last}'] * 10)}]\n"
    for last, this in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "name: x\ntasks:\n  - {id: a, title: A, depends_on: [b]}",
            "which is not in this pipeline",
        ),
        (
            "name: x\ntasks:\n  - {id: a, title: A, depends_on: [b]}\n"
            "  - {id: b, title: B, depends_on: [a]}",
            "waits for itself: a → b → a",
        ),
        ("name: x\ntasks: []", "has no tasks"),
        ("name: x\ntasks:\n  - {id: a, title: A, colour: red}", "tasks.0.colour"),
        ("name: [", "line 2, column 1"),
        ("name: x\nname: y\ntasks: []", "the key 'name' is given twice"),
        ("just words", "is no pipeline"),
        ("name: x\ntasks:\n  - {id: a, title: A, assign: nobody}", "Task 'a'"),
        ("&a [*a]", "contains itself"),
        (BOMB, "more than 200,000 values"),
        ("name: !!python/object/apply:os.system [id]", "YAML"),
        ("name: x\ntasks: [{id: a, title: '" + "é" * 1001 + "'}]", "tasks.0.title"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_and_nothing_is_made(shop, page, problems, text, why):
    page.goto("/pipelines/new")
    page.get_by_label("The pipeline's file").fill(text)
    page.get_by_role("button", name="Check and draw").click()
    expect(page.locator("#checked .refusal")).to_contain_text(why)
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#pipeline-form .notice")).to_contain_text(why)
    problems.clear()  # that it was refused the browser said in its own way
    assert shop.api("GET", "tasks")["tasks"] == []


def test_who_may_not_create_tasks_makes_no_pipeline(shop, open_browser, problems):
    shop.api(
        "POST", "users", {"username": "vic", "password": PASSWORD, "roles": {"shop": "viewer"}}
    )
    token = shop.api("POST", "auth/login", {"username": "vic", "password": PASSWORD})["token"]
    page = open_browser(token)
    page.goto("/pipelines")
    expect(page.get_by_role("link", name="New pipeline")).to_have_count(0)
    csrf = page.locator("meta[name=csrf-token]").get_attribute("content")
    send = """([path, csrf, file]) => fetch(path, {method: "POST", body: new URLSearchParams({
        csrf_token: csrf, file})}).then(async (a) => [a.status, await a.text()])"""
    assert page.evaluate(send, ["/pipelines", csrf, SHOP])[0] == 403
    status, said = page.evaluate(send, ["/pipelines/check", csrf, SHOP])
    assert (status, "would be refused" in said) == (200, True)
    page.goto("/pipelines/new")
    expect(page.locator("main")).to_contain_text("ask an admin")
    assert shop.api("GET", "pipelines")["pipelines"] == []
    problems.clear()


# ── without a browser ─────────────────────────────────────────────────────────────────────────


def test_no_box_lies_on_another_and_every_arrow_goes_right():
    chance = random.Random(3)
    shown = []
    for n in range(300):
        before = chance.sample(range(n), min(n, chance.choice([0, 0, 1, 2, 3])))
        shown.append(drawn(f"t{n}", *(f"t{m}" for m in before)))
    graph = picture.draw(shown, {})
    corners = {n["task"]["id"]: (n["x"], n["y"]) for n in graph["nodes"]}
    columns = {}
    for x, y in corners.values():
        columns.setdefault(x, []).append(y)
    for ys in columns.values():
        ys.sort()
        assert all(b - a >= picture.NODE_H for a, b in zip(ys, ys[1:], strict=False))
    for t in shown:
        for d in t["dependencies"]:
            assert corners[d["depends_on_task_id"]][0] < corners[t["id"]][0]
    assert all(0 <= x < graph["width"] and 0 <= y < graph["height"] for x, y in corners.values())


def test_arrows_of_two_chains_do_not_cross():
    shown = [drawn("a1"), drawn("b1"), drawn("b2", "b1"), drawn("a2", "a1"), drawn("b3", "b2")]
    graph = picture.draw([*shown, drawn("a3", "a2")], {})
    at = {n["task"]["id"]: n["y"] for n in graph["nodes"]}
    above = at["a1"] < at["b1"]
    assert (at["a2"] < at["b2"]) is above and (at["a3"] < at["b3"]) is above


def test_spans_of_time_in_words():
    said = {0.42: "0.4 s", 2: "2 s", 59.6: "1 min", 75: "1 min 15 s", 120: "2 min"}
    said |= {3600: "1 h", 7500: "2 h 5 min", 90000: "1 d 1 h"}
    assert {seconds: picture.lasting(seconds) for seconds in said} == said


def test_a_chart_of_nothing_and_of_one_moment():
    assert picture.chart([], time.time()) is None
    at = {"task_id": "t", "title": "T", "server": "dev", "state": "done", "number": 1}
    chart = picture.chart([at | {"assigned_at": 5.0, "started_at": 5.0, "ended_at": 5.0}], 9.0)
    assert chart["lanes"][0]["rows"][0]["bars"][0]["work"] >= picture.SHORTEST
    assert len(chart["ticks"]) >= 1
