"""Every page is one that everybody can use: checked by axe-core against WCAG 2.2, A and AA."""

from collections import defaultdict

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

import showcase
from conftest import wait_until

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
DARK = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}  # nothing else is different
LOOKS = {
    "wide": {},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
# Of these no page is made for a person to look at by itself.
NO_PAGE = {"states", "palette", "waiting_count", "registration_state"}
# Swagger UI is a library's page: its own faults are reported there.
FOREIGN = {"docs": "#swagger"}


def addresses(made: dict[str, str]) -> dict[str, list[str]]:
    """{endpoint: addresses to look at}."""
    return {
        "overview": ["/"],
        "waiting": ["/inbox"],
        "task_list": ["/tasks", "/tasks?view=board", "/tasks?q=nothing+like+it"],
        "new_task": ["/tasks/new"],
        "task": [f"/tasks/{made[name]}" for name in ("asks", "plans", "failed", "blocked")],
        "edit_task": [f"/tasks/{made['waits']}/edit"],
        "pipeline_list": ["/pipelines"],
        "pipeline": [f"/pipelines/{made['pipeline']}", f"/pipelines/{made['pipeline']}?view=time"],
        "new_pipeline": ["/pipelines/new"],
        "graph": ["/graph", "/graph?view=time"],
        "servers": ["/servers", "/servers?revoked=1"],
        "server": [f"/servers/{made['server']}"],
        "session_list": ["/sessions", "/sessions?all=1"],
        "session": ["/sessions/shell"],
        "replay": ["/sessions/shell/replay"],
        "rule_list": ["/rules"],
        "permission_log": ["/permissions", "/permissions?status=denied"],
        "project_list": ["/projects"],
        "settings": ["/settings"],
        "event_list": ["/events"],
        "docs": ["/docs"],
        "login": ["/login"],
        "error": ["/tasks/00000000-0000-0000-0000-000000000000"],
    }


@pytest.fixture
def full(shop, start_agent):
    """A hub with something on every page, and the ids of it."""
    agent = start_agent(shop, "dev-backend", repos=["core-service", "api-gateway"])
    made = showcase.fill(shop.api, "dev-backend")
    made["pipeline"] = shop.api("POST", "pipelines", showcase.pipeline())["id"]
    made["server"] = agent.server_id
    body = {"server_id": "dev-backend", "name": "shell", "command": ["sh", "-c", "echo hi; cat"]}
    shop.api("POST", "sessions", body)
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active")
    return shop, made


def test_no_page_is_forgotten(app):
    pages = {
        rule.endpoint.partition(".")[2]
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("pages.") and "GET" in rule.methods
    }
    assert pages - NO_PAGE == set(addresses(defaultdict(str))) - {"error"}


def barriers(page, look: str, but: str | None = None) -> list[tuple]:
    """What axe finds on the page, `but` for what this selector names; where it is wide in the dark
    too, since a phone's colours are the same."""
    context = {"exclude": [but]} if but else None
    found = []
    for colours, rules in (("light", RULES), ("dark", DARK))[: 2 if look == "wide" else 1]:
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")  # no fading
        found += [
            (page.url, colours, rule["id"], node["html"][:200], node["failureSummary"])
            for rule in Axe().run(page, context=context, options=rules).response["violations"]
            for node in rule["nodes"]
        ]
    return found


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_on_any_page(full, open_browser, problems, look):
    _, made = full
    signed_in, stranger = open_browser(**LOOKS[look]), open_browser(token=None, **LOOKS[look])
    found = []
    for endpoint, pages in addresses(made).items():
        page = stranger if endpoint == "login" else signed_in
        for address in pages:
            page.goto(address)
            expect(page.get_by_role("heading", level=1).first).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
            found += barriers(page, look, FOREIGN.get(endpoint))
    problems.clear()  # of the page that is not there
    assert not found, "\n".join(map(str, found))
