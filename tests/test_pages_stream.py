"""One stream of events for all tabs of a browser, and pages that outlive the hub's absence."""

import re
from contextlib import suppress

import pytest
from playwright.sync_api import expect

from browsing import live
from conftest import PASSWORD, cookie, wait_until
from test_pages_prefix import Proxy

STREAM = "/events/stream"


@pytest.fixture
def proxy():
    made = Proxy()
    yield made
    with suppress(OSError):  # a test has closed it
        made.close()


@pytest.fixture
def hub(proxy, start_hub):
    """A hub behind a proxy that counts."""
    return start_hub(port=proxy.target, url=proxy.url)


def tasks_of(context, hub):
    """A new tab with the tasks of all projects, live."""
    page = context.new_page()
    page.goto(f"{hub.url}/tasks")
    return live(page)


def task(hub, title: str, **fields) -> dict:
    return hub.api("POST", "tasks", {"title": title} | fields)


def shows(page, title: str) -> None:
    expect(page.locator("tbody tr").filter(has_text=title)).to_have_count(1)


def person(hub, name: str, **roles: str) -> str:
    """A person's token."""
    hub.api("POST", "users", {"username": name, "password": PASSWORD, "roles": roles})
    login = {"username": name, "password": PASSWORD}
    return hub.api("POST", "auth/login", login)["token"]


def forget_absence(problems: list[str]) -> None:
    """Take out what the browser says of a hub that the test took away."""
    away = re.compile(
        r"ERR_(CONNECTION|INCOMPLETE|EMPTY|NETWORK)|status of 502|^htmx:|^Response Stat"
    )
    problems[:] = [p for p in problems if not away.search(p)]


def test_two_tabs_share_one_stream_until_the_last_has_gone(shop, proxy, open_browser):
    keeper = open_browser()  # keeps the browser open: no page of the hub
    one, two = (tasks_of(keeper.context, shop) for _ in range(2))
    task(shop, "Write the parser")
    for page in (one, two):
        shows(page, "Write the parser")
    assert proxy.count(STREAM) == 1
    one.goto("about:blank")
    task(shop, "Test the parser")
    shows(two, "Test the parser")
    assert proxy.count(STREAM) == 1
    two.close()
    wait_until(lambda: proxy.count(STREAM) == 0)


def test_two_browsers_have_a_stream_each(shop, proxy, open_browser):
    for _ in range(2):
        tasks_of(open_browser().context, shop)
    assert proxy.count(STREAM) == 2


def test_without_shared_workers_each_tab_has_its_own(shop, proxy, open_browser):
    keeper = open_browser()
    keeper.context.add_init_script("delete window.SharedWorker")
    one, two = (tasks_of(keeper.context, shop) for _ in range(2))
    task(shop, "Write the parser")
    for page in (one, two):
        shows(page, "Write the parser")
    assert proxy.count(STREAM) == 2
    one.close()
    wait_until(lambda: proxy.count(STREAM) == 1)


def test_a_browser_that_allows_no_worker_hears_all_the_same(shop, open_browser):
    page = open_browser()
    page.add_init_script("window.SharedWorker = class { constructor() { throw new Error('no') } }")
    page.goto(f"{shop.url}/tasks")
    live(page)
    task(shop, "Write the parser")
    shows(page, "Write the parser")


def test_a_tab_hears_what_came_between_its_page_and_its_joining(shop, open_browser):
    first = tasks_of(open_browser().context, shop)
    late = first.context.new_page()

    def hold_up(route):
        task(shop, "Write the parser")
        shows(first, "Write the parser")  # the worker has heard of it, and will not again
        route.continue_()

    late.route("**/live.js*", hold_up, times=1)
    late.goto(f"{shop.url}/tasks?q=parser")
    shows(late, "Write the parser")


@pytest.mark.parametrize("worker", [True, False], ids=["shared", "alone"])
def test_every_tab_outlives_a_restart_and_shows_what_it_missed(
    shop, proxy, open_browser, problems, worker
):
    keeper = open_browser()
    if not worker:
        keeper.context.add_init_script("delete window.SharedWorker")
    made = task(shop, "Write the parser")
    tabs = [tasks_of(keeper.context, shop) for _ in range(2)]
    shop.stop()
    for page in tabs:
        expect(page.locator("#away")).to_be_visible()
        expect(page.locator("#link")).to_have_attribute("data-state", "away")
        shows(page, "Write the parser")
    shop.start()
    shop.api("DELETE", f"tasks/{made['id']}")
    for page in tabs:
        expect(page.locator("tbody tr")).to_contain_text("cancelled")
        expect(page.locator("#away")).to_be_hidden()
        live(page)
    assert proxy.count(STREAM) == (1 if worker else 2)
    forget_absence(problems)


def test_while_the_hub_is_away_the_page_says_so_and_nothing_moves(shop, open_browser, problems):
    task(shop, "Write the parser")
    page = tasks_of(open_browser(viewport={"width": 390, "height": 844}).context, shop)
    parts = page.locator("header.bar *:visible, main *:visible")
    boxes = "all => all.map(a => a.getBoundingClientRect()).map(b => [b.x, b.y, b.height])"
    before = parts.filter(visible=True).evaluate_all(boxes)
    shop.stop()
    away = page.locator("#away")
    expect(away).to_be_visible()
    expect(away).to_have_text(re.compile(r"cannot be reached since \d\d:\d\d; trying again…"))
    after = parts.filter(visible=True).evaluate_all(boxes)
    still = [box for box in before if box not in after]
    assert before and len(still) <= 3, still  # the shape and the word of the state itself
    shop.start()
    expect(away).to_be_hidden()
    forget_absence(problems)


def test_who_signs_out_is_out_on_every_tab_at_once(shop, proxy, open_browser):
    keeper = open_browser()
    one, two = (tasks_of(keeper.context, shop) for _ in range(2))
    two.get_by_role("button", name="Sign out").click()
    expect(one).to_have_url(f"{shop.url}/login")
    wait_until(lambda: proxy.count(STREAM) == 0)


def test_the_next_person_in_the_browser_gets_a_stream_of_their_own(shop, proxy, open_browser):
    shop.api("POST", "projects", {"name": "library"})
    vera = person(shop, "vera", library="operator")
    keeper = open_browser()
    old = tasks_of(keeper.context, shop)
    # by another tab, without signing out: the old page still stands, with the new cookie
    keeper.context.add_cookies([cookie(shop.url, vera)])
    new = tasks_of(keeper.context, shop)
    assert proxy.count(STREAM) == 2
    asked = []
    new.on("request", lambda request: asked.append(request.url))
    task(shop, "Secret of the shop", project_id="shop")
    task(shop, "Lend a book", project_id="library")
    shows(new, "Lend a book")
    heard = [url for url in asked if url.endswith("/tasks")]
    assert heard and "Secret" not in new.content() + old.content()


def test_a_stream_that_is_opened_again_is_still_of_the_same_person(
    shop, proxy, open_browser, problems
):
    shop.api("POST", "projects", {"name": "library"})
    vera = person(shop, "vera", library="operator")
    keeper = open_browser()
    old = tasks_of(keeper.context, shop)
    keeper.context.add_cookies([cookie(shop.url, vera)])
    shop.restart()
    expect(old.get_by_role("heading", level=1)).to_have_text("Overview")
    expect(old.locator(".who bdi")).to_have_text("vera")
    live(old)
    assert proxy.count(STREAM) == 1
    forget_absence(problems)


def test_a_stream_is_refused_to_somebody_else(admin):
    me = admin.get("auth/me").json
    answer = admin.get(f"events/stream?who={me['id']}")  # a person's id is no sign-in's
    assert answer.status_code == 401
    assert "reload the page" in answer.json["detail"]


def test_a_deed_that_takes_long_says_so(shop, open_browser):
    made = task(shop, "Write the parser")
    page = open_browser()
    page.goto(f"{shop.url}/tasks/{made['id']}")
    held = []
    page.route("**/cancel", lambda route: held.append(route))
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel task").click()
    expect(page.locator("#busy")).to_be_visible()
    expect(page.locator("#busy")).to_have_text("The hub is at it…")
    held[0].continue_()
    expect(page.locator("#busy")).to_be_hidden()
    expect(page.locator(".standing")).to_contain_text("cancelled")


@pytest.mark.parametrize("answers", [True, False], ids=["refused by the proxy", "not sent"])
def test_a_deed_while_the_hub_is_away_says_that_nothing_changed(
    shop, proxy, open_browser, problems, answers
):
    made = task(shop, "Write the parser")
    page = open_browser()
    page.goto(f"{shop.url}/tasks/{made['id']}")
    live(page)
    shop.stop()
    if not answers:
        proxy.close()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel task").click()
    notice = page.get_by_role("alert").filter(has_text="nothing is known to have changed")
    expect(notice).to_be_visible()
    expect(page.locator("#busy")).to_be_hidden()
    forget_absence(problems)
