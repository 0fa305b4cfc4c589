"""Telegram with real parts: a real hub and agent, tmux, a stand-in coding agent with its hooks."""

import re
import sqlite3

import pytest

from botapi import BotServer
from conftest import PASSWORD, wait_until
from standin import happened, install

RM = {"tool": "Bash", "input": {"command": "rm -rf /tmp/build"}}


@pytest.fixture
def botapi():
    with BotServer() as server:
        yield server


@pytest.fixture
def shop(start_hub, botapi, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = start_hub(
        telegram_token=botapi.token,
        telegram_api=botapi.url,
        telegram_merge_s=0.01,
        tick_s=0.1,
        due_s=0.05,
    )
    hub.api("POST", "projects", {"name": "shop"})
    return hub


@pytest.fixture
def dev(shop, start_agent, tmp_path):
    folder = tmp_path / "bin"
    install(folder, [], ("claude",))
    (tmp_path / "dev").mkdir()
    for name in (".profile", ".bash_profile", ".zprofile"):
        (tmp_path / "dev" / name).write_text(f'export PATH="{folder}:$PATH"\n')
    (tmp_path / "dev" / "config.yaml").write_text("")
    return start_agent(shop, "dev")


def page(hub, path: str, **fields):
    """Send a form of the pages as the admin."""
    headers = {"Authorization": f"Bearer {hub.login()}"}
    answer = hub.http.post(f"{hub.url}{path}", data=fields, headers=headers, timeout=10)
    assert answer.ok, answer.text
    return answer.text


def pair(hub, botapi, name: str = "Admin"):
    """A phone paired with the admin, by the code of the settings page."""
    code = re.search(r"/start ([A-Z0-9-]+)", page(hub, "/settings/telegram/code"))[1]
    person = botapi.person(name)
    person.says(f"/start {code}")
    shown(botapi, person, "paired as admin")
    return person


def shown(botapi, person, *parts: str, timeout: float = 30):
    def found():
        for message in reversed(person.chat.messages):
            said = message.sender == "bot" and not message.deleted
            if said and all(part in message.text for part in parts):
                return message
        return None

    botapi.wait(found, timeout)
    return found()


def asks(hub, question: str, server: str = "dev") -> dict:
    """A worker on a server of ours asks; the intervention."""
    key = hub.register(server)["api_key"]
    hub.api("POST", "servers/heartbeat", {}, key=key)
    task = hub.api("POST", "tasks", {"title": "Ask", "command": ["true"]})
    hub.api("POST", f"tasks/{task['id']}/assign", {"server": server})
    return hub.api("POST", f"tasks/{task['id']}/help", {"question": question}, key=key)


def test_workflow_8_watch_and_steer_from_a_phone(shop, dev, botapi, tmp_path):
    """/sessions, /focus with output that is edited in place, a permission allowed by a tap."""
    phone = pair(shop, botapi)
    record = install(tmp_path / "bin", [RM], ("claude",))
    wait_until(lambda: "claude" in shop.api("GET", "servers/dev")["profiles"])
    made = {"title": "Clean up", "profile": "claude", "auto_assign": True}
    task = shop.api("POST", "tasks", made)
    message = shown(botapi, phone, "Claude wants to run:", "rm -rf /tmp/build", "Clean up")
    phone.says("/sessions")
    listed = shown(botapi, phone, "Active sessions", "(dev)", "Clean up")
    name = re.search(r"orc-[0-9a-f-]+", listed.text)[0]
    phone.says(f"/focus {name}")
    shown(botapi, phone, f"Focused on {name}")
    screen = shown(botapi, phone, "📺", name)
    assert phone.taps("Allow", message).answer()["text"] == "Allowed."
    shown(botapi, phone, "rm -rf /tmp/build", "Allowed by admin in Telegram.")
    [answer] = wait_until(lambda: happened(record, "answered"))
    assert (answer["by"], answer["decision"]) == ("hook", "allow")
    wait_until(lambda: shop.api("GET", f"sessions/{session_of(shop, task)}")["activity"] == "idle")
    phone.says("are you done?")
    wait_until(lambda: "are you done?" in [e["text"] for e in happened(record, "submitted")])
    botapi.wait(lambda: "are you done?" in screen.text, 30)
    assert len([m for m in phone.chat.messages if m.text.startswith("📺")]) == 1


def session_of(hub, task: dict) -> str:
    return hub.api("GET", f"tasks/{task['id']}")["session_id"]


def test_a_shell_is_typed_into_and_its_keys_pressed(shop, dev, botapi):
    phone = pair(shop, botapi)
    made = shop.api("POST", "sessions", {"server_id": "dev", "name": "shell"})
    wait_until(lambda: shop.api("GET", f"sessions/{made['id']}")["status"] == "active")
    phone.says("/focus shell")
    screen = shown(botapi, phone, "📺", "shell (dev)")
    said = phone.says("cat > typed.txt; echo it has $((40 + 2)) ended")
    botapi.wait(lambda: said.reactions, 30)
    phone.says("<b>& 'quoted'</b>")
    botapi.wait(lambda: "<b>& 'quoted'</b>" in screen.text, 30)
    phone.taps("Ctrl-C", screen).answer()
    phone.says("echo again $((1 + 1))")
    botapi.wait(lambda: "again 2" in screen.text, 30)
    assert (dev.folder / "typed.txt").read_text() == "<b>& 'quoted'</b>\n"
    phone.taps("↑", screen).answer()
    phone.taps("⏎ Enter", screen).answer()
    botapi.wait(lambda: screen.text.count("again 2") == 2, 30)
    shop.api("POST", f"sessions/{made['id']}/close", {"force": True})
    botapi.wait(lambda: "closed" in screen.text.split("\n")[0], 30)
    assert screen.buttons == []


def test_a_focus_and_what_was_not_told_yet_outlive_the_hub(shop, dev, botapi):
    phone = pair(shop, botapi)
    made = shop.api("POST", "sessions", {"server_id": "dev", "name": "shell"})
    wait_until(lambda: shop.api("GET", f"sessions/{made['id']}")["status"] == "active")
    phone.says("/focus shell")
    screen = shown(botapi, phone, "📺", "shell (dev)")
    botapi.down = True
    asks(shop, "JWT or cookies?", "other")
    count = "SELECT COUNT(*) FROM post WHERE state = 'due'"
    wait_until(lambda: sqlite3.connect(shop.data / "hub.db").execute(count).fetchone()[0])
    shop.kill()
    botapi.down = False
    shop.start()
    message = shown(botapi, phone, "JWT or cookies?")
    phone.says("JWT", reply_to=message)
    shown(botapi, phone, "Answered by admin in Telegram: JWT")
    nothing = {"data": ""}  # taken as soon as the agent is back
    wait_until(lambda: shop.ask("POST", f"sessions/{made['id']}/input", nothing).ok)
    phone.says("echo still $((40 + 2))")
    botapi.wait(lambda: "still 42" in screen.text, 30)


def test_the_answer_may_come_from_the_command_line(shop, botapi):
    """Decided elsewhere: the phone says by whom and where."""
    phone = pair(shop, botapi)
    asked = asks(shop, "Which?", "dev")
    shown(botapi, phone, "Which?")
    shop.ask(
        "POST",
        f"interventions/{asked['id']}/respond",
        {"response": "the first"},
        headers={"User-Agent": "orchestratia/1"},
    )
    shown(botapi, phone, "Which?", "Answered by admin on the command line: the first")


def test_a_dashboard_that_is_looked_at_keeps_the_phone_quiet(shop, botapi):
    phone = pair(shop, botapi)
    page(shop, "/seen", tab="1")
    asks(shop, "Which?", "dev")
    due = "SELECT due_at FROM notice WHERE state = 'due'"
    wait_until(lambda: sqlite3.connect(shop.data / "hub.db").execute(due).fetchone())
    phone.says("/status")
    shown(botapi, phone, "1 waiting for a person")
    assert not any("Which?" in text for text in phone.chat.shown())


def test_a_hub_with_a_dead_telegram_is_as_quick_as_ever(shop, botapi):
    phone = pair(shop, botapi)
    botapi.fail("*", *["hold"] * 20)
    asks(shop, "Which?", "dev")
    shop.api("GET", "tasks")
    assert shop.stop() == 0
    assert phone.chat.shown()


def test_the_token_is_in_no_log_no_page_and_no_answer(start_hub, botapi, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = start_hub(telegram_token=botapi.token, telegram_api=botapi.url, log_level="DEBUG")
    hub.api("POST", "projects", {"name": "shop"})
    botapi.fail("sendMessage", 500, "cut", b"nonsense")
    phone = pair(hub, botapi)
    own = "987654:BBshopBotTokenMadeUpForTests0000000"
    botapi.add_bot(own, "shop_bot")
    project = hub.api("GET", "projects")["projects"][0]["id"]
    page(hub, f"/projects/{project}/telegram", token=own)
    botapi.wait(lambda: any(c.method == "getMe" for c in botapi.calls[5:]), 20)
    headers = {"Authorization": f"Bearer {hub.login()}"}
    seen = [
        hub.http.get(f"{hub.url}{path}", headers=headers, timeout=10).text
        for path in ("/settings", "/projects", "/events", "/api/v1/projects", "/api/v1/events")
    ]
    wait_until(lambda: "shop_bot" in hub.http.get(
        f"{hub.url}/projects", headers=headers, timeout=10).text)  # fmt: skip
    hub.stop()
    for token in (botapi.token, own):
        secret = token.partition(":")[2]
        assert not [line for line in hub.lines if secret in line]
        assert not [text for text in seen if secret in text]
    assert phone


def test_a_hub_with_a_bad_token_says_so_and_does_not_start(tmp_path):
    import hub as hub_module

    with pytest.raises(hub_module.BadSetting) as refused:
        hub_module.read_settings({"data": str(tmp_path), "telegram_token": "123:nonsense"}, {})
    assert "BotFather" in str(refused.value)
    assert "nonsense" not in str(refused.value)


def test_a_token_telegram_does_not_know_is_said_on_the_pages(start_hub, botapi, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    unknown = "555555:CCunknownTokenMadeUpForTests00000000"
    hub = start_hub(telegram_token=unknown, telegram_api=botapi.url)
    headers = {"Authorization": f"Bearer {hub.login()}"}
    settings = lambda: hub.http.get(f"{hub.url}/settings", headers=headers, timeout=10).text  # noqa: E731
    wait_until(lambda: "does not know this token" in settings())
    assert PASSWORD
