"""The terminal in a real Chromium: a real hub, a real agent, a real tmux."""

import json
import re
from base64 import b64decode

import pytest
from playwright.sync_api import expect

from conftest import PASSWORD, wait_until

FAST = {"tick_s": 0.2, "due_s": 0.2, "heartbeat_s": 0.5, "offline_after_s": 4, "grace_s": 0.5}
pytestmark = pytest.mark.hub(**FAST)


@pytest.fixture
def agent(shop, start_agent):
    return start_agent(shop, "dev")


@pytest.fixture
def run(shop, agent):
    """Start a session that runs this; `sh` without arguments."""

    def start(*command: str, name: str = "shell") -> None:
        body = {"server_id": "dev", "name": name, "command": list(command) or ["sh"]}
        shop.api("POST", "sessions", body)
        status = lambda: shop.api("GET", f"sessions/{name}")["status"]  # noqa: E731
        wait_until(lambda: status() in ("active", "closed"), 20)

    return start


class Terminal:
    """The session page as a person uses it."""

    def __init__(self, page, name: str = "shell"):
        self.page = page
        page.goto(f"/sessions/{name}")

    def text(self) -> str:
        return self.page.locator(".xterm-rows").inner_text().replace("\u00a0", " ")

    def until_shows(self, pattern: str, timeout: float = 15) -> str:
        shown = ""

        def seen():
            nonlocal shown
            shown = self.text()
            return re.search(pattern, shown)

        try:
            wait_until(seen, timeout)
        except pytest.fail.Exception:
            said = self.page.locator("#terminal-words").inner_text(), self.said().inner_text()
            pytest.fail(f"no {pattern!r} in {shown.rstrip()!r}, {said}")
        return shown

    def until_stands(self, words) -> None:
        expect(self.page.locator("#terminal-words")).to_have_text(words, timeout=20_000)

    def type(self, text: str) -> None:
        self.page.locator(".xterm-helper-textarea").focus()
        self.page.keyboard.type(text)

    def enter(self, line: str) -> None:
        self.type(line)
        self.page.keyboard.press("Enter")

    def size(self) -> str:
        return self.page.locator("#terminal-size").inner_text()

    def said(self):
        return self.page.locator("#terminal-said")


def test_what_is_typed_is_echoed_and_runs(run, open_browser):
    run()
    one = Terminal(open_browser())
    one.until_stands("live")
    one.until_shows(r"[$#] ")
    one.enter("echo $((6 * 7)) äöü ✓")
    one.until_shows(r"\n42 äöü ✓")


def until_it_fits(one: Terminal) -> str:
    """Until the program has the size that the page shows, as `rows cols`; tmux waits a moment for
    sizes that follow each other."""

    def fits():
        one.enter("clear; stty size")
        cols, rows = one.size().partition(",")[0].split("×")
        return f"{rows} {cols}" if f"{rows} {cols}\n" in one.text() else None

    return wait_until(fits, every=0.3)


def test_the_owner_of_the_size_fits_it_to_the_window_and_others_do_not(run, open_browser):
    run()
    one = Terminal(open_browser(viewport={"width": 1280, "height": 800}))
    wait_until(lambda: "your size" in one.size())
    rows, cols = until_it_fits(one).split()
    two = Terminal(open_browser(viewport={"width": 700, "height": 500}))
    wait_until(lambda: "size by admin" in two.size())
    assert two.size().startswith(f"{cols}×{rows}")  # a watcher never resizes
    one.page.set_viewport_size({"width": 900, "height": 800})
    wait_until(lambda: not one.size().startswith(f"{cols}×"))
    assert "your size" in one.size()
    two.page.get_by_role("button", name="Take size").click()
    wait_until(lambda: "your size" in two.size() and "size by admin" in one.size())
    one.until_shows(until_it_fits(two))
    expect(two.page.get_by_role("button", name="Take size")).to_be_hidden()


def test_two_watchers_see_the_same_at_once(run, open_browser):
    run()
    one, two = Terminal(open_browser()), Terminal(open_browser())
    for here, there, word in ((one, two, "first"), (two, one, "second")):
        here.until_stands("live")
        here.enter(f"echo {word}-$((1 + 1))")
        here.until_shows(f"{word}-2")
        there.until_shows(f"{word}-2")


def test_a_reload_in_the_middle_of_output_misses_and_repeats_nothing(run, open_browser, shop):
    run()
    one = Terminal(open_browser())
    one.until_shows(r"[$#] ")
    one.enter("i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo line $i; sleep 0.01; done; echo end")
    one.until_shows(r"line \d{2}\n")
    one.page.reload()
    numbers = [int(n) for n in re.findall(r"line (\d+)\n", one.until_shows(r"line \d{3}\n"))]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    shown = one.until_shows(r"line 400\nend\n", 30)
    numbers = [int(n) for n in re.findall(r"line (\d+)\n", shown)]
    assert numbers == list(range(numbers[0], 401))
    log = lambda: shop.ask("GET", "sessions/shell/output").text  # noqa: E731
    wait_until(lambda: "\nend\r\n" in log())
    assert re.findall(r"line (\d+)\r\n", log()) == [str(n) for n in range(1, 401)]


def test_the_page_comes_back_by_itself_when_the_hub_restarts(run, open_browser, hub, problems):
    run()
    one = Terminal(open_browser())
    one.until_stands("live")
    one.enter("echo before")
    one.until_shows("before\n")
    hub.kill()
    one.until_stands("reconnecting")
    one.type("x")
    expect(one.said()).to_contain_text("the hub cannot be reached now")
    hub.start()
    one.until_stands("live")
    one.until_shows("before\n")
    one.enter("echo after")
    shown = one.until_shows(r"\nafter\n")
    assert shown.count("\nbefore\n") == 1 and "xecho" not in shown
    problems.clear()  # that the hub was away the browser said in its own way


def test_typing_is_refused_aloud_while_the_server_is_away_and_goes_on_after(
    run, open_browser, agent
):
    run()
    one = Terminal(open_browser())
    one.until_stands("live")
    agent.kill()
    one.until_stands("disconnected: dev is offline")
    one.type("lost")
    expect(one.said()).to_contain_text("cannot be reached now")
    expect(one.said()).to_contain_text("nothing was typed")
    agent.start()
    one.until_stands("live")
    one.enter("echo back")
    assert "lost" not in one.until_shows(r"\nback\n")


def test_scrollback_comes_on_demand_from_the_first_line(run, open_browser):
    run("sh", "-c", "seq -f 'number %g' 2000; exec sh")
    one = Terminal(open_browser())
    one.until_shows("number 2000")
    one.page.get_by_role("button", name="Scrollback").click()
    history = one.page.locator("#scrollback-text")
    expect(history).to_contain_text("number 1\nnumber 2\n")
    expect(history).to_contain_text("number 2000")
    one.page.keyboard.press("Escape")
    expect(history).to_be_hidden()


def test_a_session_that_ends_says_how_and_keeps_its_last_screen(run, open_browser):
    run()
    one = Terminal(open_browser())
    one.until_shows(r"[$#] ")
    one.enter("echo goodbye; exit 3")
    one.until_stands("ended with exit code 3")
    one.until_shows("goodbye\n")
    one.type("x")
    expect(one.said()).to_contain_text("the session is over")
    late = Terminal(open_browser())
    late.until_stands("ended with exit code 3")
    late.until_shows("goodbye")


def test_a_viewer_watches_and_cannot_type(run, open_browser, shop):
    run()
    body = {"username": "vera", "password": PASSWORD, "roles": {"shop": "viewer"}}
    shop.api("POST", "users", body)
    login = {"username": "vera", "password": PASSWORD}
    token = shop.api("POST", "auth/login", login)["token"]
    one, two = Terminal(open_browser()), Terminal(open_browser(token))
    two.until_stands("live, read only")
    one.enter("echo seen")
    two.until_shows(r"\nseen\n")
    two.type("x")
    expect(two.said()).to_contain_text("you may watch this session")
    expect(two.page.get_by_role("button", name="Take size")).to_be_hidden()
    expect(two.page.get_by_role("button", name="Close session")).to_have_count(0)


def test_a_paste_of_several_lines_arrives_as_one(run, open_browser):
    run("cat")
    one = Terminal(open_browser())
    one.until_stands("live")
    text = "first line\nsecond <b>line</b>\nthird\n"
    one.page.locator(".xterm-helper-textarea").focus()
    one.page.evaluate(
        """text => {
          const data = new DataTransfer();
          data.setData("text/plain", text);
          const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
          document.querySelector(".xterm-helper-textarea").dispatchEvent(event);
        }""",
        text,
    )
    one.until_shows(r"second <b>line</b>\n")
    wait_until(lambda: one.text().count("third") == 2)  # the echo, and what cat says


def test_nothing_a_program_prints_acts_on_the_page_or_is_answered(
    run, open_browser, shop, tmp_path
):
    nasty = tmp_path / "nasty"
    nasty.write_bytes(
        b"\x1b[c\x1b[>c\x1b[6n\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1bP$qm\x1b\\\x1b]11;?\x07"
        b"<script>window.owned = 1</script><img src=x onerror=window.owned=1>\n"
    )
    run("sh", "-c", f"cat {nasty}; exec cat")
    one = Terminal(open_browser())
    one.until_shows("<script>window.owned = 1</script>")
    one.enter("quiet")
    shown = one.until_shows(r"quiet\nquiet\n")
    answers = re.findall(r"\[\?1;2c|\d+;\d+R", shown)
    assert len(answers) == 2  # tmux's own, once each; no browser has added to them
    assert "rgb:" not in shown
    assert one.page.evaluate("window.owned") is None
    assert "owned" not in one.page.title()


def test_the_keys_of_programs_reach_them(run, open_browser):
    run("cat", "-v")
    one = Terminal(open_browser())
    one.until_stands("live")
    one.page.locator(".xterm-helper-textarea").focus()
    for key in ("ArrowUp", "Control+a", "Control+b", "Escape", "Tab", "Enter"):
        one.page.keyboard.press(key)
    one.until_shows(r"\^\[\[A\^A\^B\^\[")
    one.page.keyboard.press("Shift+Escape")
    expect(one.page.locator("#terminal-help")).to_be_focused()


def test_without_tmux_the_page_says_what_that_means(shop, start_agent, open_browser):
    agent = start_agent(shop, "plain")
    agent.stop()
    agent.config.write_text(agent.config.read_text() + "terminal: pty\n")
    agent.start()
    shop.api("POST", "sessions", {"server_id": "plain", "name": "shell", "command": ["sh"]})
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active", 20)
    one = Terminal(open_browser())
    one.until_stands("live")
    expect(one.page.get_by_text("this session ends when its agent does")).to_be_visible()
    one.until_shows(r"[$#] ")
    one.enter("echo plain-$((40 + 2))")
    one.until_shows(r"\nplain-42\n")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(run, open_browser, scheme):
    run()
    size = {"width": 390, "height": 844}
    one = Terminal(open_browser(viewport=size, color_scheme=scheme, has_touch=True))
    one.until_stands("live")
    wait_until(lambda: "your size" in one.size())
    wide = one.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, json.dumps(wide)
    cols = int(one.size().partition("×")[0])
    assert cols >= 40


# ── the network between ───────────────────────────────────────────────────────────────────────


class Line:
    """What goes between a page and the hub: seen, and spoilt as a test likes."""

    def __init__(self, page):
        self.sent, self.heard, self.routes = [], [], []
        self.spoil = lambda frame: [frame]
        page.route_web_socket(re.compile("/ws/terminal/"), self._open)

    def _open(self, route):
        self.routes.append(route)
        server = route.connect_to_server()
        route.on_message(lambda text: self._up(server, text))
        server.on_message(lambda text: self._down(route, text))

    def _up(self, server, text):
        self.sent.append(json.loads(text))
        server.send(text)

    def _down(self, route, text):
        frame = json.loads(text)
        self.heard.append(frame)
        for kept in self.spoil(frame):
            route.send(json.dumps(kept))

    def repaints(self) -> int:
        return sum(bool(frame.get("repaint")) for frame in self.heard)

    def said_since(self, index: int) -> str:
        heard = self.heard[index:]
        pieces = [b64decode(frame["data"]) for frame in heard if frame["type"] == "output"]
        return b"".join(pieces).decode()

    def resumed(self) -> list:
        return [frame["offset"] for frame in self.sent if frame["type"] == "resume"]


COUNT = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; sleep 0.01; done; echo end"


def numbers_in(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"line (\d+)\n", text)]


def test_a_cut_connection_goes_on_where_it_was(run, open_browser):
    run()
    page = open_browser()
    line, one = Line(page), Terminal(page)
    one.until_shows(r"[$#] ")
    one.enter(COUNT)
    for shown in (r"line \d{2}\n", r"line 1\d{2}\n"):
        one.until_shows(shown)
        line.routes[-1].close(code=1012)
        one.until_stands("live")
    numbers = numbers_in(one.until_shows(r"line 300\nend\n", 30))
    assert numbers == list(range(numbers[0], 301))
    assert line.resumed()[0] is None and None not in line.resumed()[1:]
    assert len(line.routes) == 3 and line.repaints() == 1
    wait_until(lambda: "your size" in one.size())


def test_pieces_that_come_twice_or_never_leave_no_trace(run, open_browser):
    run()
    page = open_browser()
    line, one = Line(page), Terminal(page)
    one.until_shows(r"[$#] ")
    line.spoil = lambda frame: [frame] * (2 if frame["type"] == "output" else 1)
    one.enter("echo twi''ce")
    one.until_shows(r"\ntwice\n.*[$#] ")
    assert one.text().count("twice") == 1
    line.spoil = lambda frame: [] if frame["type"] == "output" else [frame]
    heard = len(line.heard)
    one.enter("echo un''seen")
    # What is typed before the shell asks again is echoed among what the last command prints.
    asked_again = re.compile(r"\nunseen\r\n.*[$#] ")
    wait_until(lambda: page.title() and asked_again.search(line.said_since(heard)))
    line.spoil = lambda frame: [{**frame, "skipped": 1_230_000} if "repaint" in frame else frame]
    one.enter("echo se''en")
    shown = one.until_shows(r"\nunseen\n(.*\n)+seen\n")
    assert shown.count("twice") == 1
    expect(page.locator("#terminal-mark")).to_have_text("skipped 1.2 MB to keep up")
    assert line.resumed() == [None, None]  # a piece was missing, so it began anew


def test_a_flood_leaves_the_page_usable_and_the_last_of_it_on_screen(run, open_browser):
    run()
    one = Terminal(open_browser())
    one.until_shows(r"[$#] ")
    one.enter("seq -f 'number %010.0f of a flood' 500000; echo en''d")
    one.until_shows(r"number 0000500000 of a flood\nend\n", 60)
    one.enter("echo after-$((1 + 1))")
    one.until_shows(r"\nafter-2\n")


def test_who_is_signed_out_meanwhile_is_led_to_the_login(run, open_browser, shop, problems):
    run()
    body = {"username": "olga", "password": PASSWORD, "roles": {"shop": "operator"}}
    olga = shop.api("POST", "users", body)
    login = {"username": "olga", "password": PASSWORD}
    token = shop.api("POST", "auth/login", login)["token"]
    one = Terminal(open_browser(token))
    one.until_stands("live")
    shop.api("DELETE", f"users/{olga['id']}")
    expect(one.page).to_have_url(re.compile("/login"))
    problems.clear()  # that it was refused the browser said in its own way


def test_what_is_selected_is_copied_and_otherwise_the_key_is_the_programs(run, open_browser):
    run("sh", "-c", "echo wordtocopy; exec cat -v")
    page = open_browser()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    one = Terminal(page)
    one.until_shows("wordtocopy")
    page.locator(".xterm-screen").dblclick(position={"x": 20, "y": 8})
    page.keyboard.press("Control+c")
    copied = "navigator.clipboard.readText()"
    wait_until(lambda: page.evaluate(copied) == "wordtocopy")
    page.keyboard.press("Control+Shift+V")
    one.until_shows("wordtocopy\nwordtocopy")
    page.keyboard.press("Control+c")
    one.until_stands(re.compile("^ended"))
