"""The pages of sessions in a real Chromium: a real hub, a real agent, a real tmux."""

import base64
import hashlib
import itertools
import json
import re
import sys
import time

import pytest
from playwright.sync_api import expect

import models
import vendor
import wire
import words
from browsing import live
from conftest import PASSWORD, wait_until
from test_pages_browser import forgive, serve
from test_terminal_browser import Terminal

FAST = {"tick_s": 0.2, "due_s": 0.2, "heartbeat_s": 0.5, "offline_after_s": 60, "grace_s": 0.5}
pytestmark = pytest.mark.hub(**FAST)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def agent(shop, start_agent):
    return start_agent(shop, "dev")


@pytest.fixture
def run(shop, agent):
    """Start a session that runs this; `sh` without arguments. Back once it is `until`."""

    def start(*command: str, name: str = "shell", until=("active", "closed")) -> dict:
        body = {"server_id": "dev", "name": name, "command": list(command) or ["sh"]}
        shop.api("POST", "sessions", body)
        status = lambda: shop.api("GET", f"sessions/{name}")["status"]  # noqa: E731
        wait_until(lambda: status() in until, 20)
        return shop.api("GET", f"sessions/{name}")

    return start


@pytest.fixture
def by_hand(shop):
    """A server whose frames the test says itself, and a session on it: (session, say)."""
    key = serve(shop, "hand")
    session = shop.api("POST", "sessions", {"server_id": "hand", "name": "shell"})
    calls, spooled = itertools.count(1), itertools.count(1)

    def send(*frames):
        body = {"instance": "i", "seq": next(calls), "wait": 0, "frames": frames}
        shop.api("POST", "server/poll", body, key=key)

    def say(*frames):
        ours = [frame | {"session_id": session["id"]} for frame in frames]
        loose = ("session_log", "session_output")
        send(*(f if f["type"] in loose else f | {"spool": next(spooled)} for f in ours))

    send({"type": "auth", "spool_id": "s"}, {"type": "sync", "instance": "i"})
    say({"type": "session_started", "tmux_name": "orc-x", "pid": 1})
    wait_until(lambda: shop.api("GET", f"sessions/{session['id']}")["status"] == "active")
    return session, say


def rows_of(page):
    return page.locator("tbody tr")


# ── the list ──────────────────────────────────────────────────────────────────────────────────


def test_every_activity_an_agent_may_tell_has_a_shape_and_words():
    assert set(words.ACTIVITIES) == set(wire.ACTIVITIES + wire.BLOCKED)


def test_the_list_shows_what_a_session_does_as_it_changes(by_hand, open_browser):
    _, say = by_hand
    page = open_browser()
    page.goto("/sessions")
    [row] = live(page).locator("tbody tr").all()
    expect(row).to_contain_text("working")
    place = rows_of(page).get_by_role("link", name="shell").bounding_box()
    asked = {"type": "session_activity", "state": "blocked:permission", "reason": "rm -rf <b>"}
    say(asked)
    expect(row).to_contain_text("asks for a permission rm -rf <b>", timeout=1000)
    expect(row.locator(".activity use")).to_have_attribute("href", "#s-triangle")
    assert rows_of(page).get_by_role("link", name="shell").bounding_box() == place


def test_who_may_not_see_a_session_hears_nothing_of_it(by_hand, shop):
    session, say = by_hand
    shop.api("POST", "projects", {"name": "other"})
    roles = {"vic": "shop", "eve": "other"}
    heard = {name: [] for name in roles}
    streams = []
    for name, project in roles.items():
        body = {"username": name, "password": PASSWORD}
        shop.api("POST", "users", body | {"roles": {project: "viewer"}})
        token = shop.api("POST", "auth/login", body)["token"]
        stream = shop.ask("GET", "events/stream", token=token, stream=True)
        lines = stream.iter_lines(decode_unicode=True)
        assert next(lines) == ": hello"
        streams.append((name, stream, lines))
    say({"type": "session_activity", "state": "idle"})
    made = {
        project["name"]: shop.api("POST", "tasks", {"title": "T", "project_id": project["id"]})[
            "id"
        ]
        for project in shop.api("GET", "projects")["projects"]
    }
    for name, stream, lines in streams:
        for line in lines:
            heard[name].append(line)
            if line.startswith("data:") and made[roles[name]] in line:
                break
        stream.close()
    told = f'data: {{"project_id": "{session["project_id"]}", "session_id": "{session["id"]}"}}'
    assert told in heard["vic"] and "event: glimpse" in heard["vic"]
    assert "event: glimpse" not in heard["eve"]


def test_the_session_shows_what_it_does_at_once(by_hand, open_browser):
    session, say = by_hand
    page = open_browser()
    page.goto(f"/sessions/{session['id']}")
    expect(page.locator(".standing .activity")).to_have_text("working")
    expect(page.locator("#terminal-part")).to_have_attribute("data-state", re.compile("live|away"))
    say({"type": "session_activity", "state": "quota", "reason": "until noon"})
    expect(page.locator(".standing .activity")).to_contain_text("out of quota until noon")


def test_search_server_and_ended_ones_stand_in_the_address(run, shop, open_browser):
    serve(shop, "other")
    run(name="build 100%")
    run(name="shell")
    run("true", name="build done", until=("closed",))
    page = open_browser()
    page.goto("/sessions")
    expect(rows_of(page)).to_have_count(2)
    page.get_by_label("Name of the session").fill("build")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/sessions\?q=build$"))
    expect(rows_of(page)).to_have_count(1)
    page.get_by_role("link", name="All", exact=True).click()
    expect(page).to_have_url(re.compile(r"/sessions\?all=1&q=build$|q=build&all=1$"))
    expect(rows_of(page)).to_have_count(2)
    page.get_by_label("Name of the session").fill("0%")
    page.keyboard.press("Enter")
    expect(rows_of(page)).to_have_count(1)
    page.reload()
    expect(rows_of(page)).to_contain_text("build 100%")
    page.get_by_label("Server", exact=True).select_option("other")
    expect(page.locator(".empty")).to_have_text("No session fits.")
    page.get_by_role("link", name="Clear").click()
    expect(page).to_have_url(re.compile(r"/sessions\?all=1$"))
    expect(rows_of(page)).to_have_count(3)


def test_a_session_is_found_by_the_title_of_its_task(shop, agent, open_browser):
    fields = {"title": "Add sign-in", "command": ["sleep", "60"], "auto_assign": True}
    shop.api("POST", "tasks", fields)
    page = open_browser()
    page.goto("/sessions?q=sign-in")
    expect(rows_of(page)).to_contain_text("Add sign-in")
    page.goto("/sessions?q=sign-out")
    expect(page.locator(".empty")).to_contain_text("No live session fits.")


def test_a_server_that_is_not_there_is_refused(shop, open_browser, problems):
    page = open_browser()
    page.goto("/sessions?server=nowhere")
    expect(page.locator("main")).to_contain_text("no server")
    forgive(problems, 404)


# ── the search in the terminal ────────────────────────────────────────────────────────────────


def test_a_text_is_found_in_the_terminal_by_keyboard(run, open_browser):
    run("sh", "-c", "echo one apple; echo two apples; echo a pear; exec cat -v")
    one = Terminal(open_browser())
    one.until_shows("a pear")
    page = one.page
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.press("Control+Shift+F")
    bar = page.get_by_role("search", name="Find in the terminal")
    expect(bar.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("apple")
    count = bar.locator("output")
    said = count.inner_text
    expect(count).to_have_text("1 of 2")
    page.keyboard.press("Enter")
    expect(count).to_have_text("2 of 2")
    page.keyboard.press("Shift+Enter")
    expect(count).to_have_text("1 of 2")
    bar.get_by_role("button", name="Next").click()
    expect(count).to_have_text("2 of 2")
    was = one.size()
    page.set_viewport_size({"width": 1000, "height": 500})
    wait_until(lambda: one.size() != was and "your size" in one.size())
    wait_until(lambda: bar.get_by_role("searchbox").press("Shift+Enter") or said() == "1 of 2")
    wait_until(lambda: bar.get_by_role("searchbox").press("Shift+Enter") or said() == "2 of 2")
    bar.get_by_role("searchbox").fill("plum")
    expect(count).to_have_text("not found")
    page.keyboard.press("Escape")
    expect(bar).to_be_hidden()
    expect(page.locator(".xterm-helper-textarea")).to_be_focused()
    page.keyboard.press("Control+f")
    one.until_shows(r"\^F")  # without Shift it is the program's
    assert "apple" not in one.text().partition("a pear")[2]  # nothing of it was typed


def test_what_is_drawn_anew_in_place_is_found(run, open_browser, tmp_path):
    drawn = tmp_path / "drawn"
    script = r"""echo one apple; until [ -e "$1" ]; do sleep 0.05; done
        printf '\0337\033[9;1Htwo apples\0338'; exec cat"""  # the cursor is back where it was
    run("sh", "-c", script, "sh", str(drawn))
    one = Terminal(open_browser())
    one.until_shows("one apple")
    one.page.get_by_role("button", name="Search").click()
    one.page.keyboard.type("apple")
    expect(one.page.locator("#find output")).to_have_text("1 of 1")
    drawn.touch()
    expect(one.page.locator("#find output")).to_have_text("1 of 2")


def test_what_has_scrolled_away_is_found_in_the_scrollback(run, open_browser):
    run("sh", "-c", "seq -f 'number %g' 300; exec cat")
    one = Terminal(open_browser())
    one.until_shows("number 300")
    page = one.page
    page.get_by_role("button", name="Search").click()
    page.keyboard.type("NUMBER 17")
    expect(page.locator("#find output")).to_have_text("not found")
    page.get_by_role("button", name="Scrollback").click()
    bar = page.get_by_role("search", name="Find in the scrollback")
    expect(bar.locator("output")).to_have_text("11 of 11")  # 17 and 170 to 179, the last first
    seen = """() => {
      const pre = document.getElementById("scrollback-text"), box = pre.getBoundingClientRect();
      const [found] = [...CSS.highlights.get("found-now")];
      const range = document.createRange();
      range.setStart(found.startContainer, found.startOffset);
      range.setEnd(found.endContainer, found.endOffset);
      const at = range.getBoundingClientRect();
      return [at.top >= box.top && at.bottom <= box.bottom, range.toString()];
    }"""
    assert page.evaluate(seen) == [True, "number 17"]
    bar.get_by_role("button", name="Next").click()
    expect(bar.locator("output")).to_have_text("1 of 11")
    assert page.evaluate(seen) == [True, "number 17"]
    bar.get_by_role("searchbox").press("Escape")
    expect(bar).to_be_hidden()
    expect(page.locator("#scrollback-text")).to_be_focused()


def test_a_first_line_whose_beginning_is_gone_is_found_once(by_hand, open_browser):
    _, say = by_hand
    one = Terminal(open_browser())
    one.until_stands("live")

    def draws(text, **more):
        data = base64.b64encode(text.encode()).decode()
        say({"type": "session_output", "data": data, **more})

    draws("\x1b[?1049h\x1b[Ha plum", repaint=True)
    one.until_shows("a plum")
    was = one.size()
    one.page.set_viewport_size({"width": 1000, "height": 500})
    wait_until(lambda: one.size() != was)  # from now on the screen has no lines to spare
    cols, rows = map(int, re.match(r"(\d+)×(\d+)", one.size()).groups())
    draws(f"\x1b[{rows}H\n{'x' * (cols + 1)}" + "\n" * (rows - 1))
    draws("\x1b[Hone apple\x1b[K\r\na pear")
    one.until_shows("a pear")
    one.page.get_by_role("button", name="Search").click()
    one.page.keyboard.type("apple")
    expect(one.page.locator("#find output")).to_have_text("1 of 1")


def test_a_screen_drawn_anew_does_not_lose_the_place(run, open_browser, tmp_path):
    step = lambda name: f'until [ -e "$1/{name}" ]; do sleep 0.05; done'  # noqa: E731
    three = r"printf '\033[Hone apple\ntwo apples\nthree apples\n'"
    script = f"{three}; {step('clear')}; printf '\033[H\033[2J'; {step('draw')}; {three}; exec cat"
    run("sh", "-c", script, "sh", str(tmp_path))
    one = Terminal(open_browser())
    one.until_shows("three apples")
    one.page.get_by_role("button", name="Search").click()
    one.page.keyboard.type("apple")
    count = one.page.locator("#find output")
    expect(count).to_have_text("1 of 3")
    one.page.keyboard.press("Enter")
    expect(count).to_have_text("2 of 3")
    (tmp_path / "clear").touch()
    expect(count).to_have_text("not found")
    (tmp_path / "draw").touch()
    expect(count).to_have_text("2 of 3")


def test_another_text_is_found_where_the_first_has_gone(run, open_browser, tmp_path):
    drawn = tmp_path / "drawn"
    script = r"""echo one apple; until [ -e "$1" ]; do sleep 0.05; done
        printf '\033[H\033[2Ja pear\n'; exec cat"""
    run("sh", "-c", script, "sh", str(drawn))
    one = Terminal(open_browser())
    one.until_shows("one apple")
    one.page.get_by_role("button", name="Search").click()
    one.page.keyboard.type("apple")
    count = one.page.locator("#find output")
    expect(count).to_have_text("1 of 1")
    drawn.touch()
    expect(count).to_have_text("not found")
    one.page.locator("#find input").fill("pear")
    expect(count).to_have_text("1 of 1")


# ── the keys of a phone ───────────────────────────────────────────────────────────────────────


def test_the_key_bar_types_what_a_phone_cannot(run, open_browser):
    run("sh", "-c", "stty -isig -echo -icanon; exec cat -v")
    one = Terminal(open_browser(**PHONE))
    one.until_stands("live")
    one.page.locator(".xterm").tap()
    keys = one.page.get_by_role("toolbar", name="Keys")
    for name in ("Escape", "Tab", "Up", "Down", "Right", "Left", "Control C"):
        keys.get_by_role("button", name=name, exact=True).tap()
    one.until_shows(r"\^\[\s+\^\[\[A\^\[\[B\^\[\[C\^\[\[D\^C")
    ctrl = keys.get_by_role("button", name="Control, for the next key")
    ctrl.tap()
    expect(ctrl).to_have_attribute("aria-pressed", "true")
    expect(one.page.locator(".xterm-helper-textarea")).to_be_focused()
    one.page.keyboard.type("wx")
    one.until_shows(r"\^Wx")
    expect(ctrl).to_have_attribute("aria-pressed", "false")
    ctrl.tap()
    keys.get_by_role("button", name="Left").tap()
    one.until_shows(re.escape("^[[1;5D"))
    expect(one.page.locator(".xterm-helper-textarea")).to_be_focused()  # the keyboard stays open
    fits = "document.documentElement.scrollWidth <= window.innerWidth"
    assert one.page.evaluate(fits)


def test_the_arrows_follow_the_mode_that_the_program_set(shop, start_agent, open_browser):
    agent = start_agent(shop, "plain")
    agent.stop()
    agent.config.write_text(agent.config.read_text() + "terminal: pty\n")  # no tmux between
    agent.start()
    command = "stty -icanon -echo; printf '\\033[?1happlication\\n'; exec cat -v"
    body = {"server_id": "plain", "name": "shell", "command": ["sh", "-c", command]}
    shop.api("POST", "sessions", body)
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active", 20)
    one = Terminal(open_browser(**PHONE))
    one.until_shows("application")
    one.until_stands("live")
    one.page.get_by_role("button", name="Up", exact=True).tap()
    one.until_shows(re.escape("^[OA"))


def test_the_bar_is_for_touch_and_for_who_may_type(run, shop, open_browser):
    run()
    wide = Terminal(open_browser(viewport={"width": 1280, "height": 800}))
    wide.until_stands("live")
    expect(wide.page.get_by_role("toolbar", name="Keys")).to_be_hidden()
    phone = Terminal(open_browser(viewer(shop), **PHONE))
    phone.until_stands("live, read only")
    expect(phone.page.get_by_role("toolbar", name="Keys")).to_be_hidden()


def viewer(shop) -> str:
    """The token of somebody who may look on."""
    shop.api(
        "POST", "users", {"username": "vera", "password": PASSWORD, "roles": {"shop": "viewer"}}
    )
    login = {"username": "vera", "password": PASSWORD}
    return shop.api("POST", "auth/login", login)["token"]


def test_the_clipboard_is_pasted_in_brackets_where_the_program_asks(run, open_browser):
    run("sh", "-c", "stty -icanon -echo; printf '\\033[?2004hready'; exec cat -v")
    page = open_browser(**PHONE)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    one = Terminal(page)
    one.until_shows("ready")
    page.evaluate("navigator.clipboard.writeText('pas\\x1b[201~ted')")
    page.get_by_role("button", name="Paste", exact=True).tap()
    one.until_shows(re.escape("^[[200~pas[201~ted^[[201~"))  # it cannot end the brackets itself


def test_without_the_clipboard_a_field_takes_the_paste(run, open_browser):
    run("cat")
    page = open_browser(**PHONE)
    one = Terminal(page)
    one.until_stands("live")
    denied = "() => { navigator.clipboard.readText = () => Promise.reject(new Error('denied')); }"
    page.evaluate(denied)
    paste = page.get_by_role("button", name="Paste", exact=True)
    paste.tap()
    dialog = page.get_by_role("dialog", name="Paste into the terminal")
    dialog.get_by_role("textbox").fill("not this")
    dialog.get_by_role("button", name="Cancel").tap()
    expect(dialog).to_be_hidden()
    paste.tap()
    expect(dialog.get_by_role("textbox")).to_have_value("")
    dialog.get_by_role("textbox").fill("first\nsecond\n")
    dialog.get_by_role("button", name="Type it").tap()
    one.until_shows(r"second\n")
    wait_until(lambda: one.text().count("second") == 2)  # the echo, and what cat says
    assert "not this" not in one.text()


READER = """
import os, sys, tty
tty.setraw(0)
print("ready", flush=True)
left = int(sys.argv[2])
with open(sys.argv[1], "wb") as file:
    while left:
        left -= file.write(os.read(0, left))
print("taken", flush=True)
os.read(0, 1)
"""


def test_a_large_paste_arrives_whole(run, open_browser, tmp_path):
    text = "".join(f"line {n:06d} of a large paste\n" for n in range(20_000))
    into = tmp_path / "pasted"
    run(sys.executable, "-c", READER, str(into), str(len(text)))
    page = open_browser()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    one = Terminal(page)
    one.until_shows("ready")
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.press("Control+Shift+V")
    one.until_shows("taken", 60)
    assert into.read_bytes() == text.replace("\n", "\r").encode()


# ── the replay ────────────────────────────────────────────────────────────────────────────────


class Replay:
    """The page of a replay as a person uses it."""

    def __init__(self, page, ref: str = "shell"):
        self.page = page
        page.goto(f"/sessions/{ref}/replay")
        self.play = page.get_by_role("button", name="Play", exact=True)
        self.pause = page.get_by_role("button", name="Pause", exact=True)
        self.seek = page.get_by_role("slider", name="Position")

    def ready(self) -> "Replay":
        expect(self.play).to_be_enabled(timeout=20_000)
        return self

    def at(self) -> float:
        return float(self.seek.input_value())

    def whole(self) -> float:
        return float(self.seek.get_attribute("max"))

    def screen(self):
        return self.page.locator("#player")

    def jump(self, words: str):
        return self.page.locator("button.jump").filter(has_text=words)


STORY = (
    "printf 'first \\033[31mred\\033[0m\\n'; sleep 1; echo second; sleep 5; echo third; sleep 0.5"
)


@pytest.fixture
def told(by_hand, shop):
    """A session that has printed the same at the same times, and ended; as its agent tells it."""
    session, say = by_hand
    pieces = [b"first \x1b[31mred\x1b[0m\r\n", b"second\r\n", b"third\r\n"]
    starts = itertools.accumulate(map(len, pieces[:-1]))
    block = {
        "type": "session_log",
        "offset": 0,
        "data": base64.b64encode(b"".join(pieces)).decode(),
        "at": models.iso(time.time() - 6.5),
        "times": list(zip(starts, (1.0, 6.0), strict=True)),
    }
    say(block, {"type": "session_closed", "exit_code": 0})
    output = f"sessions/{session['id']}/output"
    wait_until(lambda: "third" in shop.ask("GET", output).text)
    return session


def test_an_ended_session_plays_and_shows_what_it_printed(run, open_browser):
    run("sh", "-c", STORY, until=("closed",))
    page = open_browser()
    page.goto("/sessions?all=1")
    page.get_by_role("link", name="Replay of shell").click()
    one = Replay(page).ready()
    assert 3 <= one.whole() <= 3.9  # one second, and two of the five
    one.play.click()
    expect(one.screen()).to_contain_text("first red")
    expect(one.screen()).not_to_contain_text("third")
    one.pause.click()
    expect(one.play).to_be_visible()
    one.seek.fill(str(one.whole()))
    expect(one.screen()).to_contain_text("third")
    one.seek.fill("0.1")
    expect(one.screen()).not_to_contain_text("second")


def test_an_event_is_jumped_to_however_silence_is_counted(run, open_browser):
    run("sh", "-c", STORY, until=("closed",))
    one = Replay(open_browser()).ready()
    closed = one.jump("session closed")
    offset = float(closed.get_attribute("data-offset"))
    assert offset > 6
    closed.click()
    expect(one.screen()).to_contain_text("third")
    assert one.at() == pytest.approx(one.whole(), abs=0.11)
    expect(closed).to_have_attribute("aria-current", "true")
    one.page.get_by_label("shorten silence").uncheck()
    wait_until(lambda: one.whole() > 5.9 and one.page.title())
    assert one.at() == pytest.approx(one.whole(), abs=0.11)  # the same moment
    one.jump("session asked for").click()
    wait_until(lambda: one.at() == 0)
    expect(one.screen()).not_to_contain_text("second")
    one.seek.fill("4")  # within the silence: three seconds after `second`
    expect(one.screen()).to_contain_text("second")
    one.page.get_by_label("shorten silence").check()
    wait_until(lambda: one.whole() < 4)
    assert one.at() == pytest.approx(1 + 3 * 2 / 5, abs=0.25)
    expect(one.screen()).to_contain_text("second")
    expect(one.screen()).not_to_contain_text("third")


def test_speed_is_chosen_and_keeps_the_place(told, open_browser):
    one = Replay(open_browser()).ready()
    one.seek.fill("1.5")
    one.page.get_by_label("Speed").select_option("16")
    assert one.at() == pytest.approx(1.5, abs=0.2)
    expect(one.screen()).to_contain_text("second")
    one.play.click()
    expect(one.screen()).to_contain_text("third")
    expect(one.play).to_be_visible()  # it has come to its end
    assert one.at() == pytest.approx(one.whole(), abs=0.11)
    one.play.click()  # and begins anew
    wait_until(lambda: one.page.title() and one.at() < one.whole())


def test_the_replay_is_used_by_keyboard(told, open_browser):
    one = Replay(open_browser()).ready()
    one.seek.focus()
    one.page.keyboard.press("End")
    expect(one.screen()).to_contain_text("third")
    one.page.keyboard.press("Home")
    expect(one.screen()).not_to_contain_text("second")
    one.page.keyboard.press("Tab")
    expect(one.play).to_be_focused()
    one.page.keyboard.press("Space")
    expect(one.pause).to_be_focused()
    one.page.keyboard.press("Space")
    expect(one.play).to_be_focused()
    one.jump("session closed").focus()
    one.page.keyboard.press("Enter")
    expect(one.screen()).to_contain_text("third")
    expect(one.seek).to_have_attribute("aria-valuetext", re.compile(r"^(0:0\d) of \1$"))


def test_the_recording_is_downloaded(told, open_browser):
    one = Replay(open_browser()).ready()
    with one.page.expect_download() as download:
        one.page.get_by_role("link", name="Download the recording").click()
    header, *events = map(json.loads, download.value.path().read_text().splitlines())
    assert (header["version"], header["title"]) == (2, "shell")
    assert "third" in "".join(text for _, kind, text in events if kind == "o")


def test_a_task_s_events_stand_beside_the_replay_of_its_attempt(shop, agent, open_browser):
    command = ["sh", "-c", "echo working; sleep 1; echo done; sleep 0.5"]
    fields = {"title": "Fix <b>it</b>", "command": command, "auto_assign": True}
    task = shop.api("POST", "tasks", fields)
    wait_until(lambda: shop.api("GET", f"tasks/{task['id']}")["status"] == "done", 30)
    page = open_browser()
    page.goto(f"/tasks/{task['id']}")
    page.get_by_role("link", name="replay").click()
    expect(page.get_by_role("link", name="Fix <b>it</b>")).to_be_visible()
    one = Replay(page, page.url.split("/")[-2]).ready()
    expect(one.jump("attempt 1 started")).to_have_count(1)
    expect(one.jump("done")).to_have_count(1)
    one.jump("done").click()
    expect(one.screen()).to_contain_text("done")


def test_a_live_session_is_played_so_far(run, open_browser):
    run("sh", "-c", "echo so far; exec cat")
    one = Replay(open_browser())
    wait_until(lambda: one.page.reload() and one.play.count())
    one.ready().play.click()
    expect(one.screen()).to_contain_text("so far")
    expect(one.page.locator("main")).to_contain_text("The session is live")
    one.page.get_by_role("link", name="watch it as it happens").click()
    expect(one.page).to_have_url(re.compile("/sessions/[-0-9a-f]{36}$"))
    one.page.get_by_role("link", name="Replay").click()
    expect(one.page).to_have_url(re.compile("/replay$"))


def test_a_session_that_printed_nothing_says_so(by_hand, open_browser):
    session, say = by_hand
    page = open_browser()
    page.goto(f"/sessions/{session['id']}/replay")
    expect(page.locator("main")).to_contain_text("has printed nothing yet")
    expect(page.get_by_role("link", name="Download")).to_have_count(0)
    expect(page.locator(".moments")).to_contain_text("session active")
    say({"type": "session_closed", "exit_code": 0})
    page.reload()
    expect(page.locator("main")).to_contain_text("This session has printed nothing, so")


def test_what_is_missing_is_said_above_the_replay(by_hand, open_browser):
    session, say = by_hand
    block = {"type": "session_log", "offset": 5000, "data": base64.b64encode(b"later").decode()}
    say({"type": "session_gap", "from": 0, "to": 5000, "why": "hub <away>"}, block)
    one = Replay(open_browser(), session["id"]).ready()
    expect(one.page.locator(".remark").first).to_contain_text("Output is missing, 5.0 kB: hub <aw")
    one.play.click()
    expect(one.screen()).to_contain_text("later")


@pytest.mark.hub(**FAST | {"log_session_mb": 1})
def test_a_log_that_has_lost_its_start_is_played_from_where_it_is(by_hand, shop, open_browser):
    session, say = by_hand
    piece = b"x" * 49_998 + b"\r\n"
    for n in range(26):
        data = base64.b64encode(piece).decode()
        say({"type": "session_log", "offset": n * len(piece), "data": data})
    path = f"sessions/{session['id']}/marks"
    wait_until(lambda: shop.api("GET", path)["marks"])
    one = Replay(open_browser(), session["id"]).ready()
    expect(one.page.locator(".remark").first).to_contain_text("The start of the log is gone")
    expect(one.page.locator(".remark").first).to_contain_text("limit of 1 MB per session")


def test_a_recording_that_does_not_come_says_so_and_is_asked_for_again(
    told, open_browser, problems
):
    page = open_browser()
    page.route("**/recording", lambda route: route.abort())
    one = Replay(page)
    expect(page.locator("#replay-words")).to_contain_text("The recording could not be loaded")
    expect(one.play).to_be_disabled()
    page.unroute("**/recording")
    page.get_by_role("button", name="Try again").click()
    one.ready().play.click()
    expect(one.screen()).to_contain_text("first red")
    problems.clear()  # that the recording was kept from it the browser said in its own way


def test_who_may_not_see_the_project_gets_no_replay(told, shop, open_browser, problems):
    shop.api("POST", "projects", {"name": "bank"})
    body = {"username": "otto", "password": PASSWORD, "roles": {"bank": "admin"}}
    shop.api("POST", "users", body)
    login = {"username": "otto", "password": PASSWORD}
    page = open_browser(shop.api("POST", "auth/login", login)["token"])
    page.goto(f"/sessions/{told['id']}/replay")
    expect(page.locator("main")).to_contain_text("There is no session")
    forgive(problems, 404)


def test_only_this_page_may_run_webassembly_and_none_takes_inline_style(told, shop, open_browser):
    page = open_browser()
    policy = {}
    for path in ("/sessions", "/sessions/shell/replay"):
        policy[path] = page.goto(path).headers["content-security-policy"]
    assert "wasm" not in policy["/sessions"]
    replay = policy["/sessions/shell/replay"]
    assert "script-src 'self' 'wasm-unsafe-eval';" in replay and "unsafe-inline" not in replay


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=str)
def test_the_pages_fit_and_complain_of_nothing(told, open_browser, options):
    page = open_browser(**options)
    for path in ("/sessions?all=1", "/sessions/shell"):
        page.goto(path)
        live(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    Replay(page).ready()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# ── third-party files ─────────────────────────────────────────────────────────────────────────


def test_every_third_party_file_is_listed_with_its_licence_and_unchanged():
    listed = {name: e for p in vendor.packages() for name, e in p["files"].items()}
    there = {path.name: path.read_bytes() for path in vendor.FOLDER.iterdir()}
    page = there.pop(vendor.TABLE)
    assert set(listed) == set(there)
    for name, data in there.items():
        assert hashlib.sha256(data).hexdigest() == listed[name]["sha256"], name
    for package in vendor.packages():
        assert package["licence_file"] in package["files"] and package["integrity"]
    assert page.decode() == vendor.table(vendor.packages())


def test_a_package_that_is_not_as_recorded_is_refused():
    [package] = [p for p in vendor.packages() if p["title"] == "htmx"]
    about = {"name": "htmx.org", "version": package["version"], "license": "0BSD"}
    members = {e["from"]: b"other" for e in package["files"].values()}
    members["package.json"] = json.dumps(about).encode()
    with pytest.raises(vendor.Wrong, match="not the one that was recorded"):
        vendor.check_package(package, b"archive", members)
    members["package.json"] = json.dumps(about | {"license": "GPL-3.0"}).encode()
    with pytest.raises(vendor.Wrong, match="its licence is GPL-3.0"):
        vendor.check_package(package, b"archive", members)
