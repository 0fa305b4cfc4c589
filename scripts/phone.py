"""A conversation with the bot, as a phone shows it: held with a real hub through the Bot API server
of the tests, then drawn in a browser."""

import re
from html import escape
from pathlib import Path

import requests
from playwright.sync_api import sync_playwright

from chromium import CHROMIUM, FLAGS

STYLE = """
body { margin: 0; background: #8fb3a3; font: 15px/1.35 system-ui, "DejaVu Sans", sans-serif; }
header { background: #fff; padding: 12px 16px; font-weight: 600; }
header small { display: block; font-weight: 400; color: #697b75; }
main { padding: 12px; display: flex; flex-direction: column; gap: 8px; }
.says { max-width: 86%; padding: 8px 12px; border-radius: 14px; background: #fff;
  width: fit-content; overflow-wrap: anywhere; white-space: pre-wrap; }
.me { align-self: flex-end; background: #dcf8c9; }
.says a { color: #1c6fb5; text-decoration: none; }
pre { background: #f0f3f2; border-left: 3px solid #34a37c; margin: 4px 0; padding: 6px 8px;
  border-radius: 6px; font-size: 12px; white-space: pre-wrap; }
code { font-size: 13px; color: #96305a; }
blockquote { margin: 4px 0; padding: 2px 8px; border-left: 3px solid #1c6fb5; background: #eef5fb;
  border-radius: 6px; }
.keys { display: grid; gap: 4px; max-width: 86%; }
.keys div { display: flex; gap: 4px; }
.keys span { flex: 1; text-align: center; background: #ffffffb8; border-radius: 8px;
  padding: 6px 4px; font-size: 13px; white-space: nowrap; overflow: hidden; }
.nod { display: block; font-size: 13px; }
"""


def settings(botapi) -> dict[str, str]:
    """What a hub's environment says of this Bot API."""
    return {
        "ORCHESTRATIA_TELEGRAM_TOKEN": botapi.token,
        "ORCHESTRATIA_TELEGRAM_API": botapi.url,
        "ORCHESTRATIA_TELEGRAM_MERGE_S": "2",
    }


class Talk:
    """Somebody with a phone, paired with the demo's admin."""

    def __init__(self, demo, botapi):
        self.demo, self.botapi = demo, botapi
        headers = {"Authorization": f"Bearer {demo.client.token}"}
        page = requests.post(f"{demo.url}/settings/telegram/code", headers=headers, timeout=10)
        code = re.search(r"/start [A-Z0-9-]+", page.text)[0]
        self.phone = botapi.person("Anna")
        self.phone.says(code)
        self.shown("paired")

    def shown(self, *parts: str):
        """The bot's message that says all of this, once it is there."""

        self.botapi.wait(lambda: self.find(*parts), 30)
        return self.find(*parts)

    def find(self, *parts: str, after=None):
        first = after.id if after else 0
        standing = [m for m in self.phone.chat.messages if m.sender == "bot" and not m.deleted]
        fits = [m for m in standing if m.id > first and all(part in m.text for part in parts)]
        return fits[-1] if fits else None

    def hold(self) -> None:
        """Talk about what the demo is at; what else was said is not shown."""
        phone = self.phone
        self.shown("git push")
        told = list(phone.chat.messages)
        phone.says("/sessions")
        self.shown("Active sessions")
        phone.says("/focus shell")
        self.shown("📺", "54 passed")
        phone.says("echo all $((50 + 4)) are fine")
        self.shown("📺", "all 54 are fine")
        spoken = [m for m in phone.chat.messages if m not in told]
        asks = phone.says("/inbox")
        self.botapi.wait(lambda: self.find("importer", "Plan", after=asks))
        push = self.shown("git push")
        phone.taps("Allow", push)
        self.shown("git push", "Allowed by admin in Telegram")
        plan = self.shown("Plan", "importer")
        phone.taps("Send back…", plan)
        asked = self.shown("what should be different")
        said = phone.says("Keep the old importer until the new one ran a week.", reply_to=asked)
        self.shown("Plan", "Sent back by admin")
        self.botapi.wait(lambda: said.reactions)
        known = {message.id for message in (*spoken, push, plan, said)}
        for message in phone.chat.messages:
            news = message.sender == "bot" and "given to" in message.text
            message.deleted = message.id not in known or news


def draw(chat, path: Path, scratch: Path) -> None:
    """The messages of a chat as a picture; the scratch directory, which has another name each time,
    is not shown. Its signs want a font with emoji (Debian's fonts-noto-color-emoji)."""
    said = "".join(_message(m) for m in chat.messages if not m.deleted)
    said = said.replace(str(scratch), "~")
    page = (
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><header>Orchestratia"
        f"<small>bot</small></header><main>{said}</main>"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        shown = browser.new_page(viewport={"width": 430, "height": 800}, device_scale_factor=1.5)
        shown.set_content(page)
        shown.screenshot(path=path, full_page=True)
        browser.close()


def _message(message) -> str:
    if message.sender != "bot":
        nod = "".join(f'<span class="nod">{r["emoji"]}</span>' for r in message.reactions)
        return f'<div class="says me">{escape(message.text)}{nod}</div>'
    rows = "".join(
        "<div>" + "".join(f"<span>{escape(label)}</span>" for label, _ in row) + "</div>"
        for row in message.buttons
    )
    keys = f'<div class="keys">{rows}</div>' if rows else ""
    return f'<div class="says">{message.html}</div>{keys}'
