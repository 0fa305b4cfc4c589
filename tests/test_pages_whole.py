"""What people do, from the first page to the last: a real Chromium, real agents, real tmux."""

import re
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from browsing import live
from conftest import ROOT, clean_env, wait_until

FAST = {"tick_s": 0.2, "due_s": 0.2, "heartbeat_s": 0.5, "grace_s": 0.5}
REPOS = {
    "dev-backend": (
        *("api-gateway", "core-service", "web-dashboard", "search-engine"),
        "deploy-infra",
    ),
    "dev-desktop": ("desktop-app",),
}


@pytest.fixture
def machines(shop, start_agent, tmp_path):
    """The two servers of the example with its worker in each repo."""
    languages = ("python", "rust", "typescript", "csharp")
    for name, repos in REPOS.items():
        start_agent(shop, name, repos=repos, languages=languages)
        for repo in repos:
            shutil.copy(ROOT / "examples/ecommerce_worker.py", tmp_path / name / repo / "work.py")


@pytest.mark.hub(**FAST)
def test_the_seven_tasks_are_drawn_applied_and_watched_to_the_end(shop, machines, open_browser):
    page = open_browser()
    page.goto("/pipelines/new")
    page.locator("#open-file").set_input_files(ROOT / "examples" / "ecommerce.yaml")
    page.get_by_role("button", name="Check and draw").click()
    expect(page.locator("#checked [data-task]")).to_have_count(7)
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("ecommerce")
    nodes = live(page).locator(".graph [data-task]")
    expect(nodes).to_have_count(7)
    page.evaluate("window.sameDocument = true")
    first = nodes.filter(has_text="Update API Schema")
    shop.api("POST", f"tasks/{first.get_attribute('data-task')}/assign", {"server": "dev-backend"})
    done = page.locator('.graph [data-state="done"]')
    expect(done).to_have_count(7, timeout=60_000)
    expect(page.locator(".standing")).to_contain_text("7 of 7 done")
    expect(page.locator(".edge-resolved")).to_have_count(8)
    assert page.evaluate("window.sameDocument")
    page.get_by_role("link", name="Time").click()
    expect(page.locator(".run-work")).to_have_count(7)
    expect(page.locator(".lane")).to_have_text(["dev-backend", "dev-desktop"])
    nodes = page.get_by_role("link", name=re.compile("^T6: Staging Deploy: attempt 1 done"))
    nodes.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("T6: Staging Deploy")
    page.locator("dl").get_by_role("link").last.click()
    page.get_by_role("link", name="Replay").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Replay")


@pytest.mark.hub(**FAST)
def test_a_first_run_ends_with_a_task_watched_in_its_terminal(hub, open_browser, tmp_path):
    """From an empty hub, with an agent that is registered by the token of the page."""
    page = open_browser()
    page.goto("/")
    page.get_by_label("Name").fill("shop")
    page.get_by_role("button", name="Create project").click()
    page.get_by_role("link", name="Add a server").click()
    page.get_by_role("button", name="Make a token").click()
    token = page.get_by_label("Registration token").input_value()
    env = clean_env(tmp_path)
    agent = [sys.executable, str(ROOT / "agent.py"), "--config", str(tmp_path / "agent.yaml")]
    agent += ["--state", str(tmp_path / "state")]
    joining = [*agent, "--register", token, "--name", "laptop"]
    subprocess.run(joining, env=env, check=True, timeout=60, stdin=subprocess.DEVNULL)
    process = subprocess.Popen(agent, env=env, stdin=subprocess.DEVNULL)
    try:
        expect(page.locator("#arrival")).to_contain_text("laptop is connected", timeout=20_000)
        page.get_by_role("button", name="Close").click()
        page.get_by_role("link", name="Overview").click()
        page.locator("#live").get_by_role("link", name="New task").click()
        page.get_by_label("Title").fill("Say hello")
        page.get_by_label("Command", exact=True).fill("sh\n-c\necho hello there; cat")
        page.get_by_role("button", name="Create task").click()
        expect(page.locator(".standing")).to_contain_text("running", timeout=20_000)
        page.locator("dl").get_by_role("link").last.click()
        rows = page.locator(".xterm-rows")
        expect(rows).to_contain_text("hello there", timeout=20_000)
        page.locator(".xterm-helper-textarea").press_sequentially("typed by hand")
        expect(rows).to_contain_text("typed by hand")
        page.keyboard.press("Enter")
        page.keyboard.press("Control+d")
        expect(page.locator(".standing")).to_contain_text("closed", timeout=20_000)
        wait_until(lambda: hub.api("GET", "tasks")["tasks"][0]["status"] == "done")
    finally:
        process.terminate()
        process.wait(10)
        [server] = hub.api("GET", "servers")["servers"]
        command = ["tmux", "-L", f"orc-{server['id'][:8]}", "kill-server"]
        subprocess.run(command, env=env, capture_output=True)
