"""The pages' side of Telegram in a real Chromium: pairing, wishes, a project's bot, who looks."""

import re
import sqlite3

import pytest
from playwright.sync_api import expect

from botapi import BotServer
from conftest import wait_until
from test_pages_browser import forgive

OWN = "987654:BBshopBotTokenMadeUpForTests0000000"


@pytest.fixture
def botapi():
    with BotServer() as server:
        yield server


@pytest.fixture
def hub(start_hub, botapi, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = start_hub(telegram_token=botapi.token, telegram_api=botapi.url)
    botapi.wait(lambda: botapi.calls_of("getUpdates"))
    return running


@pytest.fixture
def page(open_browser):
    return open_browser()


def rows(hub, sql: str) -> list[tuple]:
    return sqlite3.connect(hub.data / "hub.db").execute(sql).fetchall()


def test_a_chat_is_paired_and_unpaired(shop, botapi, page):
    page.goto("/settings")
    expect(page.get_by_text(f"@{botapi.username} speaks of shop")).to_be_visible()
    page.get_by_role("button", name="Pair a chat").click()
    code = page.get_by_label("Send this to the bot within 10 minutes")
    expect(code).to_have_value(re.compile("^/start [A-Z0-9]{4}-[A-Z0-9]{10}$"))
    link = page.get_by_role("link", name=f"Open @{botapi.username} in Telegram")
    target = link.get_attribute("href")
    assert re.fullmatch(rf"https://t\.me/{botapi.username}\?start=[A-Z0-9]{{14}}", target)
    anna = botapi.person("Anna <b>")
    anna.says(f"/start {target.partition('start=')[2]}")
    expect(page.get_by_text("Anna <b>", exact=True)).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Unpair").click()
    expect(page.get_by_text("Chats paired with you")).to_have_count(0)
    assert rows(shop, "SELECT * FROM chat") == []


def test_wishes_are_kept_and_wrong_ones_refused(shop, page, problems):
    page.goto("/settings")
    page.get_by_label("Quiet from").fill("22:00")
    page.get_by_label("until", exact=True).fill("07:00")
    page.get_by_label("Time zone").fill("Europe/Berlin")
    page.get_by_label("my phone waits a while").uncheck()
    card = page.get_by_role("region", name="When you are told")
    card.get_by_role("button", name="Save", exact=True).click()
    wanted = [("22:00", "07:00", "Europe/Berlin", 0)]
    wait_until(lambda: rows(shop, "SELECT quiet_from, quiet_to, zone, patient FROM wish") == wanted)
    page.get_by_label("Time zone").fill("Mars/Olympus")
    card.get_by_role("button", name="Save", exact=True).click()
    expect(card.get_by_text("There is no time zone 'Mars/Olympus'")).to_be_visible()
    forgive(problems, 422)
    card.get_by_text("Of shop: everything").click()
    card.get_by_label("notes on tasks").uncheck()
    card.get_by_role("button", name="Save for shop").click()
    wait_until(lambda: rows(shop, "SELECT kinds FROM project_wish"))
    page.reload()
    expect(page.get_by_text("Of shop: 5 of 6 kinds")).to_be_visible()
    expect(page.get_by_label("Quiet from")).to_have_value("22:00")


def test_a_project_gets_a_bot_whose_token_is_never_shown(shop, botapi, page, problems):
    botapi.add_bot(OWN, "shop_bot")
    page.goto("/projects")
    page.get_by_text("Change", exact=True).click()
    page.get_by_label("A Telegram bot of its own").fill("nonsense")
    page.get_by_role("button", name="Use this bot").click()
    expect(page.get_by_text("This is no bot's token")).to_be_visible()
    forgive(problems, 422)
    page.get_by_label("A Telegram bot of its own").fill(OWN)
    page.get_by_role("button", name="Use this bot").click()
    wait_until(lambda: rows(shop, "SELECT username FROM bot WHERE username = 'shop_bot'"))
    page.reload()
    expect(page.get_by_text("@shop_bot")).to_be_visible()
    assert OWN.partition(":")[2] not in page.content()
    page.get_by_text("Change", exact=True).click()
    page.get_by_role("button", name="Use the hub's").click()
    expect(page.get_by_text(f"@{botapi.username}")).to_be_visible()


def test_a_dashboard_says_that_it_is_looked_at(shop, page):
    with page.expect_request("**/seen") as asked:
        page.goto("/tasks")
    assert asked.value.response().status == 204
    with page.expect_request("**/seen"):  # it is left
        page.goto("/servers")
