"""Pictures of the pages, for the README: `make screenshots` puts them into docs/screenshots/.

A hub with two agents that have run the pipeline of the examples, and with things to decide on. The
coding agent in them is the stand-in of the tests.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import phone
import showcase
from chromium import CHROMIUM, FLAGS
from demo import Demo
from processes import ROOT, until

sys.path.insert(0, str(ROOT / "tests"))

import standin  # noqa: E402
from botapi import BotServer  # noqa: E402

FOLDER = ROOT / "docs" / "screenshots"
DESKTOP = {"width": 1280, "height": 800}
LOOKS = {
    "light": {"viewport": DESKTOP, "color_scheme": "light"},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "light",
        "is_mobile": True,
        "has_touch": True,
    },
}
TYPED = r"""clear; printf '\033[1;36m$\033[0m pytest -q\n'; printf '\033[32m%s\033[0m\n' \
"....................................... [ 72%]" "...............                         [100%]"; \
printf '\033[1;32m54 passed\033[0m in 1.82s\n'
"""


CHOICES = [
    {"label": "Session cookies", "description": "As the shop has them today"},
    {"label": "JWT", "description": "Stateless, for the app as well"},
]
ASKS = {  # title of a task: what its coding agent asks
    "Sign in from the app": {
        "tool": "AskUserQuestion",
        "input": {
            "questions": [
                {
                    "question": "Which way of signing in should the API use?",
                    "header": "Auth",
                    "options": CHOICES,
                }
            ]
        },
    },
    "Release 2.4": {
        "tool": "Bash",
        "input": {
            "command": "git push origin main --follow-tags",
            "description": "Push the release and its tag",
        },
    },
}


# The scratch directory has another name each time: a picture does not show it.
HOME = """(scratch) => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode;
    if (text.data.includes(scratch)) text.data = text.data.replaceAll(scratch, "~");
  }
}"""


def pages(made: dict[str, str]) -> dict[str, str]:
    """{name of the picture: address}."""
    return {
        "overview": "/",
        "inbox": "/inbox",
        "tasks": "/tasks",
        "board": "/tasks?view=board",
        "task": f"/tasks/{made['plans']}",
        "new-task": "/tasks/new",
        "pipelines": "/pipelines",
        "pipeline": f"/pipelines/{made['pipeline']}",
        "new-pipeline": "/pipelines/new",
        "graph": "/graph",
        "time": f"/pipelines/{made['pipeline']}?view=time",
        "servers": "/servers",
        "server": f"/servers/{made['server']}",
        "sessions": "/sessions?all=1",
        "terminal": "/sessions/shell",
        "replay": "/sessions/shell/replay",
        "projects": "/projects",
        "settings": "/settings",
        "events": "/events",
        "rules": "/rules",
        "decisions": "/permissions",
    }


def fill(demo: Demo) -> dict[str, str]:
    call = demo.call
    pipeline = call("POST", "pipelines", showcase.pipeline())
    call("POST", f"tasks/{pipeline['id_map']['T1']}/assign", {"server": "dev-backend"})

    def done() -> bool:
        return call("GET", f"pipelines/{pipeline['id']}")["counts"].get("done") == 7

    until(done, "the pipeline is done")
    ask(demo)
    made = showcase.fill(call, "dev-desktop") | {"pipeline": pipeline["id"]}
    made["server"] = demo.server_ids[0]
    body = {"server_id": "dev-backend", "name": "shell", "command": ["sh"]}
    call("POST", "sessions", body | {"cols": 100, "rows": 24})
    until(lambda: call("GET", "sessions/shell")["status"] == "active", "the session runs")
    call("POST", "sessions/shell/input", {"text": TYPED})
    until(lambda: "54 passed" in _screen(call), "the session has printed")
    return made


def install_agent(scratch: Path) -> None:
    """Put a coding agent on the PATH of whoever has this home."""
    standin.install(scratch / "bin", [])
    for name in (".profile", ".bash_profile", ".zprofile"):
        (scratch / name).write_text(f'export PATH="{scratch / "bin"}:$PATH"\n')


def ask(demo: Demo) -> None:
    """Have coding agents ask, one after the other."""
    for count, (title, step) in enumerate(ASKS.items(), 1):
        (demo.scratch / "bin" / "scenario.json").write_text(json.dumps([step]))
        body = {
            "title": title,
            "profile": "claude",
            "target_repo": "core-service",
            "auto_assign": True,
        }
        demo.call("POST", "tasks", body)
        until(lambda: len(_waiting(demo.call)) == count, f"{title} asks")  # noqa: B023


def _waiting(call) -> list[dict]:
    return call("GET", "permissions?status=pending")["permissions"]


def _screen(call) -> str:
    return "\n".join(call("GET", "sessions/shell/screen")["lines"])


def take(demo: Demo, made: dict[str, str]) -> None:
    """One picture of each page in each look."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for look, options in LOOKS.items():
            context = browser.new_context(base_url=demo.url, **options)
            context.add_cookies(
                [{"name": "orchestratia", "value": demo.client.token, "url": demo.url}]
            )
            page = context.new_page()
            for name, path in pages(made).items():
                page.goto(path)
                page.wait_for_load_state("load")
                if page.locator("#link").count():
                    page.locator("#link[data-state=live]").wait_for()
                if name in ("terminal", "replay"):
                    page.wait_for_timeout(1500)  # until it is drawn
                page.evaluate(HOME, str(demo.scratch))
                page.screenshot(path=FOLDER / f"{name}-{look}.png")
                print(f"{name}-{look}")
            context.clear_cookies()
            page.goto("/login")
            page.screenshot(path=FOLDER / f"login-{look}.png")
            context.close()
        browser.close()


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="orc-") as scratch:
        install_agent(Path(scratch))
        with BotServer() as botapi:
            demo = Demo(Path(scratch), **phone.settings(botapi))
            try:
                demo.start()
                talk = phone.Talk(demo, botapi)
                made = fill(demo)
                talk.hold()
                take(demo, made)
                phone.draw(talk.phone.chat, FOLDER / "telegram.png", demo.scratch)
            finally:
                demo.stop()


if __name__ == "__main__":
    main()
