"""The Bot API server of the tests is as strict as Telegram's: each of its rules, by real calls."""

import json
import re
import threading

import pytest
from telebot import apihelper, types

import botapi
import telegram
from conftest import ROOT


@pytest.fixture
def server():
    with botapi.BotServer() as running:
        telegram.use_api(running.url)
        yield running


@pytest.fixture
def anna(server):
    person = server.person("Anna")
    person.says("/start")
    return person


def call(server, function, *args, token=None, **kwargs):
    return telegram.call(function, token or server.token, *args, **kwargs)


def send(server, place, text="hello", **kwargs):
    return call(server, apihelper.send_message, place, text, **kwargs)


def keyboard(*buttons: dict) -> str:
    return json.dumps({"inline_keyboard": [list(buttons)]})


def edit(server, anna, message_id, text="hello", **kwargs):
    where = {"chat_id": anna.id, "message_id": message_id}
    return call(server, apihelper.edit_message_text, text, **where, **kwargs)


def poll_twice(server):
    first = threading.Thread(target=lambda: refused.append(tried()), daemon=True)
    refused = []

    def tried():
        try:
            call(server, apihelper.get_updates, offset=10**9, long_polling_timeout=20)
        except telegram.Answered as answered:
            return answered

    first.start()
    server.wait(lambda: server.calls_of("getUpdates"))
    server.wait(lambda: server.main.poller)
    server.push_raw({"update_id": 10**9 + 5})
    call(server, apihelper.get_updates, offset=10**9 + 5, long_polling_timeout=1)
    first.join(5)
    for answered in refused:
        if answered:
            raise answered
    raise telegram.Answered(409, "Conflict: terminated by other getUpdates request", {})


def flood(server, places, count):
    for number in range(count):
        send(server, places[number % len(places)], f"number {number}")


def people(server, count):
    found = [server.person(f"P{n}") for n in range(count)]
    for person in found:
        person.says("/start")
    return [person.id for person in found]


def tap_twice(server, anna, text=None):
    send(server, anna.id, reply_markup=keyboard({"text": "A", "callback_data": "a:1"}))
    tap = anna.taps("A")
    call(server, apihelper.answer_callback_query, tap.id, text=text)
    call(server, apihelper.answer_callback_query, tap.id)


def reply(number):
    return types.ReplyParameters(number)


LONG = "x" * 4097
# The words of each refusal in RULES, and what earns it.
BROKEN = {
    "message is too long": lambda s, a: send(s, a.id, "😀" * 2049),
    "message text is empty": lambda s, a: send(s, a.id, "<b> </b>", parse_mode="HTML"),
    "can't parse entities": lambda s, a: send(s, a.id, "<b>a<i>b</b></i>", parse_mode="HTML"),
    "message caption is too long": lambda s, a: call(
        s, apihelper.send_data, a.id, ("a.txt", b"x"), "document", caption="x" * 1025
    ),
    "BUTTON_DATA_INVALID": lambda s, a: send(
        s, a.id, reply_markup=keyboard({"text": "A", "callback_data": "ä" * 33})
    ),
    "can't parse inline keyboard button": lambda s, a: send(
        s, a.id, reply_markup=keyboard({"text": "A"})
    ),
    "is invalid: Wrong HTTP URL": lambda s, a: send(
        s, a.id, reply_markup=keyboard({"text": "A", "url": "http://localhost:8080/"})
    ),
    "reply markup is too long": lambda s, a: send(
        s, a.id, reply_markup=keyboard(*[{"text": "A", "callback_data": "a"}] * 101)
    ),
    "PLACEHOLDER_TOO_LONG": lambda s, a: send(
        s,
        a.id,
        reply_markup=json.dumps({"force_reply": True, "input_field_placeholder": "x" * 65}),
    ),
    "message is not modified": lambda s, a: edit(s, a, send(s, a.id)["message_id"]),
    "message to edit not found": lambda s, a: edit(s, a, 999),
    "message can't be edited": lambda s, a: edit(s, a, 1, "other"),
    "message to delete not found": lambda s, a: call(s, apihelper.delete_message, a.id, 999),
    "message to be replied not found": lambda s, a: send(s, a.id, reply_parameters=reply(999)),
    "message thread not found": lambda s, a: send(s, a.id, message_thread_id=5),
    "the chat is not a forum": lambda s, a: call(
        s, apihelper.create_forum_topic, s.group("G").id, "A"
    ),
    "not enough rights to create a topic": lambda s, a: call(
        s, apihelper.create_forum_topic, s.group("G", forum=True, bot_admin=False).id, "A"
    ),
    "bot can't initiate conversation": lambda s, a: send(s, s.person("New").id),
    "bot was blocked by the user": lambda s, a: (a.blocks(), send(s, a.id)),
    "chat not found": lambda s, a: send(s, 42),
    "query is too old": tap_twice,
    "MESSAGE_TOO_LONG": lambda s, a: tap_twice(s, a, "x" * 201),
    "BOT_COMMAND_INVALID": lambda s, a: call(
        s, apihelper.set_my_commands, [types.BotCommand("Bad-Name", "x")]
    ),
    "terminated by other getUpdates request": lambda s, a: poll_twice(s),
    "Unauthorized": lambda s, a: call(s, apihelper.get_me, token="1:wrong"),
    "Not Found": lambda s, a: call(s, lambda t: apihelper._make_request(t, "getNothing")),
}
FLOODS = {
    "at most 30 messages a second in all": lambda s, a: flood(s, people(s, 40), 40),
    "at most one a second in a chat, beyond bursts": lambda s, a: flood(s, [a.id], 12),
    "at most 20 a minute in a group": lambda s, a: [
        flood(s, [s.group("G").id], 21) for _ in range(1)
    ],
}


def test_every_rule_is_broken_once_here():
    said = {refusal for _, refusal in botapi.RULES}
    assert said == {*BROKEN, "retry after"}
    assert {rule for rule, refusal in botapi.RULES if refusal == "retry after"} == set(FLOODS)


@pytest.mark.parametrize("words", sorted(BROKEN))
def test_what_telegram_refuses_is_refused(server, anna, words):
    with pytest.raises(telegram.Answered) as refused:
        BROKEN[words](server, anna)
    assert words in refused.value.why


@pytest.mark.parametrize("rule", sorted(FLOODS))
def test_floods_are_held_back(server, anna, rule):
    with pytest.raises(telegram.Answered) as refused:
        FLOODS[rule](server, anna)
    assert (refused.value.code, refused.value.retry_after) == (429, 1)
    assert server.flooded


def test_what_is_within_the_rules_stands(server, anna):
    text = "<b>bold</b> &lt;x&gt; &amp; <pre>code</pre> <a href='https://a.b/?c=1&amp;d=2'>l</a>"
    buttons = keyboard(
        {"text": "A", "callback_data": "a" * 64}, {"text": "B", "url": "https://a.b"}
    )
    sent = send(server, anna.id, text, parse_mode="HTML", reply_markup=buttons)
    message = anna.chat.last
    assert message.text == "bold <x> & code l"
    assert [e["type"] for e in message.entities] == ["bold", "pre", "text_link"]
    edit(server, anna, sent["message_id"], "other")
    assert (message.text, message.buttons, message.edits) == ("other", [], 1)
    call(server, apihelper.delete_message, anna.id, sent["message_id"])
    assert anna.chat.shown() == []
    call(server, apihelper.send_data, anna.id, ("ä.txt", b"\x00\xff"), "document")
    assert anna.chat.last.document[1] == b"\x00\xff"


def test_updates_come_until_they_are_confirmed(server, anna):
    anna.says("one")
    texts = lambda found: [u["message"]["text"] for u in found]  # noqa: E731
    found = call(server, apihelper.get_updates, long_polling_timeout=1)
    assert texts(found) == texts(call(server, apihelper.get_updates)) == ["/start", "one"]
    after = found[-1]["update_id"] + 1
    anna.says("two")
    assert texts(call(server, apihelper.get_updates, offset=after)) == ["two"]


def test_the_document_lists_these_rules():
    told = (ROOT / "docs/telegram.md").read_text()
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", told, re.M)
    assert tuple(rows) == botapi.RULES
