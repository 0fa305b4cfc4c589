"""Telegram: pairing, what is told and when, and what people do from their phones."""

import json
import re
import time

import pytest

import auth
import chats
import inbox
import models
import notices
import permissions
import tasks
import telegram
import telegram_acts
import telegram_text
import telegram_words
from auth import HUB
from conftest import wait_until
from models import Forbidden, Invalid, NotFound, TooMany

PLAN = "# Plan\n\n1. Read `x < y`\n2. **Write** it & go"


# ── pairing ───────────────────────────────────────────────────────────────────────────────────


def test_a_code_pairs_once_with_its_maker(told):
    olga = told.pair("olga")
    [chat] = chats.own_chats(told.callers["olga"])
    assert (chat["title"], chat["bot"]) == ("Olga", told.server.username)
    code = chats.new_code(told.callers["olga"])
    stranger = told.server.person("Sven")
    stranger.says(f"/start {code}")
    told.shown(stranger, "paired as olga")
    other = told.server.person("Other")
    other.says(f"/start {code}")
    told.shown(other, "does not pair us")
    assert olga.chat.last.text.startswith("🤝")


def test_a_code_ends_after_ten_minutes(told, monkeypatch):
    monkeypatch.setattr(chats, "CODE_S", -1.0)
    person = told.server.person("Late")
    person.says(f"/start {chats.new_code(told.callers['olga'])}")
    told.shown(person, "does not pair us")


def test_five_wrong_tries_end_a_code(told):
    code = chats.new_code(told.callers["olga"])
    wrong = code[: chats.NAMED] + "A" * chats.SECRET
    for number in range(chats.CODE_TRIES):
        assert chats.pair("1", 1000 + number, "guesser", wrong) is None
    assert chats.pair("1", 2000, "olga", code) is None


def test_an_account_has_five_tries_a_minute(told):
    for _ in range(chats.CODE_TRIES):
        assert chats.pair("1", 77, "guesser", "ABCDEFGHJKLMNP") is None
    with pytest.raises(TooMany, match="wrong codes"):
        chats.pair("1", 77, "guesser", chats.new_code(told.callers["olga"]))


def test_a_code_shown_in_a_group_is_dead(told):
    person = told.server.person("Anna")
    group = told.server.group("Team", members=[person])
    code = chats.new_code(told.callers["olga"])
    person.says(f"/start {code}", chat=group)
    told.shown(person, "Others have seen this code", chat=group)
    person.says(f"/start {code}")
    told.shown(person, "does not pair us")


def test_a_stranger_gets_one_sentence_and_nothing_else(told):
    stranger = told.server.person("Sven")
    for text in ("hello", "/sessions", "/tasks", "/start", "/help"):
        stranger.says(text)
    told.server.wait(lambda: stranger.chat.shown())
    friend = told.pair("olga")  # the last update is handled when this one was
    assert friend.chat.shown()
    assert stranger.chat.shown() == [telegram_acts.STRANGER]


def test_a_pairing_ends_from_either_side(told):
    olga = told.pair("olga")
    olga.says("/stop")
    told.shown(olga, "not paired any more")
    assert chats.own_chats(told.callers["olga"]) == []
    olga = told.pair("olga")
    [chat] = chats.own_chats(told.callers["olga"])
    chats.unpair(told.callers["olga"], chat["id"])
    olga.says("/sessions")
    told.shown(olga, "only with people who are paired")


@pytest.mark.parametrize("how", ["password", "locked out", "elsewhere", "deleted"])
def test_whatever_signs_somebody_out_unpairs_them(told, how):
    olga = told.pair("olga")
    caller = told.callers["olga"]
    if how == "password":
        auth.change_user(HUB, caller.id, {"password": "another long one"})
    elif how == "locked out":
        auth.change_user(HUB, caller.id, {"disabled": True})
    elif how == "deleted":
        auth.delete_user(HUB, caller.id)
    else:
        auth.end_other_tokens(caller)
    olga.says("/status")
    told.shown(olga, "only with people who are paired")
    assert models.rows("SELECT * FROM chat") == []


def test_only_ones_own_chat_is_unpaired(told):
    told.pair("olga")
    [chat] = chats.own_chats(told.callers["olga"])
    with pytest.raises(NotFound, match="no such chat"):
        chats.unpair(told.callers["ada"], chat["id"])


def test_a_key_makes_no_code(told):
    with pytest.raises(Forbidden, match="Only people"):
        chats.new_code(told.world.key("dev"))


# ── permission requests ───────────────────────────────────────────────────────────────────────


def test_a_permission_is_asked_for_and_allowed_by_a_tap(told):
    olga = told.pair("olga")
    asked = told.ask()
    message = told.shown(olga, "Claude wants to run:", "rm -rf /tmp/build")
    assert [label for row in message.buttons for label, _ in row] == [
        "Allow",
        "Session",
        "Always…",
        "Deny",
        "Open",
    ]
    answer = olga.taps("Allow", message).answer()
    assert answer["text"] == "Allowed."
    told.shown(olga, "rm -rf /tmp/build", "Allowed by olga in Telegram.")
    assert told.permission(asked)["status"] == "allowed"
    assert message.buttons == []


@pytest.mark.parametrize(
    ("label", "status", "scope", "said"),
    [
        ("Session", "allowed", "session", "Allowed for the session by olga"),
        ("Deny", "denied", "once", "Denied by olga"),
    ],
)
def test_each_button_does_what_it_says(told, label, status, scope, said):
    olga = told.pair("olga")
    asked = told.ask()
    olga.taps(label, told.shown(olga, "wants to run"))
    told.shown(olga, said)
    row = told.permission(asked)
    assert (row["status"], row["scope"]) == (status, scope)


def test_always_is_shown_before_it_is_said(told):
    ada = told.pair("ada")
    asked = told.ask("npm test")
    message = told.shown(ada, "npm test")
    ada.taps("Always…", message)
    told.server.wait(lambda: message.buttons and message.buttons[0][0][0].startswith("Yes"))
    ada.taps("Back", message)
    told.server.wait(lambda: message.buttons and message.buttons[0][0][0] == "Allow")
    ada.taps("Always…", message)
    told.server.wait(lambda: message.buttons and message.buttons[0][0][0].startswith("Yes"))
    ada.taps("Yes", message)
    told.shown(ada, "Allowed always by ada")
    row = told.permission(asked)
    assert models.one("SELECT pattern FROM rule WHERE id = ?", (row["rule_id"],))["pattern"]


def test_what_a_person_may_not_is_refused_in_a_sentence(told):
    olga, vera = told.pair("olga"), told.pair("vera")
    asked = told.ask("npm test")
    answer = vera.taps("Allow", told.shown(vera, "npm test")).answer()
    assert answer["show_alert"] and "ask an admin" in answer["text"]
    message = told.shown(olga, "npm test")
    olga.taps("Always…", message)
    told.server.wait(lambda: message.buttons and message.buttons[0][0][0].startswith("Yes"))
    answer = olga.taps("Yes", message).answer()
    assert answer["show_alert"] and "admin of the project" in answer["text"]
    assert told.permission(asked)["status"] == "pending"


def test_a_stale_tap_says_so_and_changes_nothing(told):
    olga, ada = told.pair("olga"), told.pair("ada")
    asked = told.ask()
    hers = told.shown(olga, "wants to run")
    tap = [button for row in hers.buttons for button in row if button[0] == "Deny"]
    ada.taps("Allow", told.shown(ada, "wants to run"))
    told.shown(olga, "Allowed by ada in Telegram.")
    answer = olga.taps(tap[0][1], hers).answer()
    assert answer["show_alert"] and "changes nothing" in answer["text"]
    assert told.permission(asked)["decided_by"] == "ada"


@pytest.mark.parametrize(
    ("where", "said"),
    [("on the dashboard", "Denied by ada on the dashboard"), (None, "Denied by ada")],
)
def test_what_was_decided_elsewhere_is_said(told, where, said):
    olga = told.pair("olga")
    asked = told.ask()
    told.shown(olga, "wants to run")
    ada = auth.replace(told.callers["ada"], where=where)
    permissions.decide(ada, asked, "deny", reason="not on a Friday")
    told.shown(olga, "rm -rf", said, "not on a Friday")


def test_what_was_settled_in_the_terminal_is_said(told):
    olga = told.pair("olga")
    asked = told.ask()
    told.shown(olga, "wants to run")
    told.say("permission_ended", request_id=asked, where="in the terminal")
    told.shown(olga, "rm -rf", "Settled in the terminal.")


def test_a_reply_denies_with_its_reason(told):
    olga = told.pair("olga")
    asked = told.ask()
    olga.says("use make clean", reply_to=told.shown(olga, "wants to run"))
    told.shown(olga, "Denied by olga in Telegram", "use make clean")
    assert told.permission(asked)["reason"] == "use make clean"


def test_a_question_of_a_coding_agent_is_answered_by_a_button_or_in_words(told):
    olga = told.pair("olga")
    options = [{"label": "JWT", "description": "stateless"}, {"label": "Cookies"}]
    given = {"questions": [{"question": "Which way?", "options": options}]}
    one = told.ask(tool="AskUserQuestion", asks="question", input=given)
    message = told.shown(olga, "Claude asks:", "Which way?", "stateless")
    olga.taps("Cookies", message)
    told.shown(olga, "Answered by olga in Telegram: Cookies")
    assert json.loads(told.permission(one)["answers"]) == {"Which way?": "Cookies"}
    given["questions"][0]["question"] = "And now?"
    told.ask(tool="AskUserQuestion", asks="question", input=given)
    olga.taps("In own words…", told.shown(olga, "And now?"))
    olga.says("none of them", reply_to=told.shown(olga, "Reply to this"))
    told.shown(olga, "Answered by olga in Telegram: none of them")


# ── interventions and plans ───────────────────────────────────────────────────────────────────


def ask_help(told, question="JWT or cookies?", **more) -> str:
    asked, _ = inbox.ask(told.world.key("dev"), told.world.ids["W"], question, **more)
    return asked["id"]


def intervention(ref: str) -> dict:
    return models.one("SELECT * FROM intervention WHERE id = ?", (ref,))


def test_a_question_is_answered_by_a_reply(told):
    olga = told.pair("olga")
    ref = ask_help(told)
    message = told.shown(olga, "JWT or cookies?", "W")
    said = olga.says("use JWT", reply_to=message)
    told.shown(olga, "Answered by olga in Telegram: use JWT")
    assert intervention(ref)["response"] == "use JWT"
    assert told.world.status("W") == "running"
    told.server.wait(lambda: said.reactions)


def test_choices_of_a_question_are_buttons(told):
    olga = told.pair("olga")
    ref = ask_help(told, "Which one?\n1. JWT\n2. Cookies", kind="question")
    olga.taps("JWT", told.shown(olga, "Which one?"))
    told.shown(olga, "Answered by olga in Telegram: JWT")
    assert intervention(ref)["response"] == "JWT"


def test_an_approval_has_its_two_answers(told):
    olga = told.pair("olga")
    ref = ask_help(told, "Deploy now?", kind="approval")
    message = told.shown(olga, "Deploy now?")
    assert [label for label, _ in message.buttons[0]] == ["Approved", "Rejected"]
    olga.taps("Rejected", message)
    told.shown(olga, "Answered by olga")
    assert intervention(ref)["response"] == "Rejected"


def test_the_words_asked_for_are_the_answer(told):
    olga = told.pair("olga")
    ref = ask_help(told)
    olga.taps("Reply…", told.shown(olga, "JWT or cookies?"))
    olga.says("both", reply_to=told.shown(olga, "Reply to this with your answer"))
    told.shown(olga, "Answered by olga in Telegram: both")
    assert intervention(ref)["response"] == "both"


def test_a_late_answer_is_refused_with_what_was_said(told):
    olga = told.pair("olga")
    ref = ask_help(told)
    message = told.shown(olga, "JWT or cookies?")
    inbox.answer(told.callers["ada"], ref, "cookies")
    told.shown(olga, "Answered by ada: cookies")
    olga.says("use JWT", reply_to=message)
    told.shown(olga, "ada answered this already")
    assert intervention(ref)["response"] == "cookies"


def test_a_question_that_ends_with_its_task_says_so(told):
    olga = told.pair("olga")
    ask_help(told)
    told.shown(olga, "JWT or cookies?")
    told.world.cancel("W")
    message = told.shown(olga, "JWT or cookies?", "Closed: the task was cancelled.")
    assert message.buttons == []


def plan_of(told, plan=PLAN, name="P") -> None:
    if name not in told.world.ids:
        told.world.task(name, command=["make"])
        told.world.assign(name, server="dev", require_plan=True)
    inbox.submit_plan(told.world.key("dev"), told.world.ids[name], plan)


def test_a_plan_is_rendered_and_approved(told):
    olga = told.pair("olga")
    plan_of(told)
    message = told.shown(olga, "Plan for P", "1. Read x < y")
    assert {"bold", "code"} <= {entity["type"] for entity in message.entities}
    olga.taps("Approve", message)
    told.shown(olga, "Approved by olga in Telegram.")
    assert told.world.status("P") == "running"


def test_a_plan_is_sent_back_with_words(told):
    olga = told.pair("olga")
    plan_of(told)
    olga.taps("Send back…", told.shown(olga, "Plan for P"))
    olga.says("smaller steps", reply_to=told.shown(olga, "what should be different"))
    told.shown(olga, "Sent back by olga in Telegram: smaller steps")
    assert told.world.status("P") == "planning"
    plan_of(told, "a new one")
    told.shown(olga, "Plan (version 2) for P")


def test_a_plan_replaced_is_not_approved_by_its_old_button(told):
    olga = told.pair("olga")
    plan_of(told)
    old = told.shown(olga, "Plan for P")
    data = next(data for label, data in old.buttons[0] if label == "Approve")
    plan_of(told, "a new one")
    told.shown(olga, "Plan (version 2) for P")
    told.shown(olga, "1. Read", "Replaced by a newer one")
    assert "version 2" in olga.taps(data, old).answer()["text"]
    assert told.world.status("P") == "plan_review"


def test_a_long_plan_is_cut_and_comes_whole_as_a_file(told):
    olga = told.pair("olga")
    plan = "\n\n".join(f"Step {n}: <b>{'😀' * 20}</b>" for n in range(300))
    plan_of(told, plan)
    message = told.shown(olga, "Plan for P")
    assert telegram_text.units(message.text) <= 4096
    olga.taps("Whole plan", message)
    told.server.wait(lambda: any(m.document for m in olga.chat.messages))
    [document] = [m.document for m in olga.chat.messages if m.document]
    assert document == ("plan.md", plan.encode())


# ── notifications ─────────────────────────────────────────────────────────────────────────────


def test_what_happens_is_told_to_those_who_may_see_it(told):
    olga = told.pair("olga")
    told.world.project("secret")
    told.world.task("hidden", project="secret")
    told.world.complete("W", {"summary": "all <b>good</b> & well"})
    told.shown(olga, "W — all <b>good</b> & well")
    told.world.working("F", server="dev", command=["make"])
    told.world.fail("F", "it <i>broke")
    told.shown(olga, "F", "it <i>broke")
    assert not any("hidden" in text for text in olga.chat.shown())


@pytest.mark.parametrize("kind", ["done", "needs_me", "notes"])
def test_only_wished_for_kinds_are_told(told, kind):
    olga = told.pair("olga")
    chats.set_kinds(told.callers["olga"], told.world.project("shop")["id"], [kind])
    told.world.working("B", server="dev", command=["make"])
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "look here")
    ask_help(told)
    told.world.complete("B", {"summary": "finished"})
    heard = {"done": "finished", "needs_me": "JWT or cookies?", "notes": "look here"}
    told.shown(olga, heard.pop(kind))
    told.quiet()
    assert not any(other in text for text in olga.chat.shown() for other in heard.values())


def test_ones_own_deeds_are_no_news(told):
    olga = told.pair("olga")
    inbox.add_note(told.callers["olga"], told.world.ids["W"], "mine")
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "hers")
    told.shown(olga, "ada: hers")
    assert not any("mine" in text for text in olga.chat.shown())


def test_rights_that_were_taken_away_tell_nothing(told, monkeypatch):
    olga = told.pair("olga")
    auth.change_user(HUB, told.callers["olga"].id, {"roles": {}})
    ask_help(told)
    wait_until(lambda: notices.position() == told.world.now())
    olga.says("/inbox")
    told.shown(olga, "Nothing waits")
    assert not any("JWT" in text for text in olga.chat.shown())


def test_a_server_out_of_sight_is_told_and_its_return(told):
    olga = told.pair("olga")
    told.world.server("spare")
    told.world.offline("spare")
    told.shown(olga, "Server spare is out of sight.")
    told.world.online("spare")
    told.shown(olga, "Server spare", "Online again.")


def test_several_of_one_kind_are_told_together(told, monkeypatch):
    olga = told.pair("olga")
    monkeypatch.setattr(notices, "MERGE_S", 0.3)
    for number in range(12):
        inbox.add_note(told.callers["ada"], told.world.ids["W"], f"note <{number}>")
    told.shown(olga, "note <11>")
    told.quiet()
    notes = [text for text in olga.chat.shown() if "note <" in text]
    assert len(notes) <= 3
    for number in range(12):
        assert sum(f"note <{number}>" in text for text in notes) == 1


def test_requests_told_together_are_answered_one_by_one(told, monkeypatch):
    olga = told.pair("olga")
    monkeypatch.setattr(notices, "MERGE_S", 0.3)
    asked = [told.ask(f"make part-{number}") for number in range(4)]
    message = told.shown(olga, "permission requests")
    told.quiet()
    singles = [m for m in olga.chat.messages if m.sender == "bot" and "make part-0" in m.text]
    assert singles
    number = next(n for n in range(1, 9) if f"{n}. 🔐" in message.text and n > 1)
    olga.taps(f"{number} Deny", message)
    told.shown(olga, "permission requests", "Denied by olga")
    states = [told.permission(ref)["status"] for ref in asked]
    assert states.count("denied") == 1
    assert states.count("pending") == 3


def test_a_phone_waits_while_its_dashboard_is_looked_at(told, monkeypatch):
    olga = told.pair("olga")
    chats.presence.seen(told.callers["olga"].id, "tab")
    asked = ask_help(told)
    wait_until(lambda: models.one("SELECT 1 FROM notice"))
    [notice] = models.rows("SELECT * FROM notice WHERE state = 'due'")
    assert notice["due_at"] == pytest.approx(time.time() + notices.WAIT_S, abs=20)
    inbox.answer(told.callers["olga"], asked, "JWT")
    wait_until(lambda: models.one("SELECT 1 FROM notice WHERE state = 'dropped'"))
    monkeypatch.setattr(notices, "WAIT_S", 0.2)
    ask_help(told, "And now?")
    told.shown(olga, "And now?")
    assert not any("JWT or cookies?" in text for text in olga.chat.shown())


def test_who_does_not_want_to_wait_does_not(told):
    olga = told.pair("olga")
    chats.set_wish(told.callers["olga"], None, None, None, False)
    chats.presence.seen(told.callers["olga"].id, "tab")
    ask_help(told)
    told.shown(olga, "JWT or cookies?")


def test_what_still_waits_is_said_again_and_withdrawn_when_answered(told, monkeypatch):
    monkeypatch.setattr(notices, "AGAIN_S", 0.3)
    olga = told.pair("olga")
    asked = ask_help(told)
    first = told.shown(olga, "JWT or cookies?")
    again = told.shown(olga, "still waits")
    assert again.reply_to == first.id
    inbox.answer(told.callers["ada"], asked, "cookies")
    told.shown(olga, "JWT or cookies?", "Answered by ada")
    told.server.wait(lambda: again.deleted)
    assert sum("still waits" in m.text for m in olga.chat.messages) == 1


def test_quiet_hours_and_mutes_hold_back_what_does_not_pass(told):
    olga = told.pair("olga")
    olga.says("/mute 2h")
    told.shown(olga, "Muted for 2 h")
    asked = ask_help(told)
    note = inbox.add_note(told.callers["ada"], told.world.ids["W"], "later")
    wait_until(lambda: models.one("SELECT COUNT(*) AS n FROM notice")["n"] == 2)
    inbox.answer(told.callers["ada"], asked, "cookies")
    wait_until(lambda: models.one("SELECT 1 FROM notice WHERE state = 'dropped'"))
    olga.says("/mute off")
    told.shown(olga, "I tell you what happens again")
    told.shown(olga, "ada: later")
    assert not any("JWT" in text for text in olga.chat.shown())
    assert note


@pytest.mark.parametrize(
    ("begins", "ends", "clock", "until"),
    [
        ("22:00", "07:00", "23:30", "07:00"),
        ("22:00", "07:00", "03:00", "07:00"),
        ("22:00", "07:00", "07:00", None),
        ("22:00", "07:00", "12:00", None),
        ("12:00", "13:00", "12:00", "13:00"),
        ("12:00", "13:00", "13:00", None),
    ],
)
def test_quiet_hours_end_when_they_say(begins, ends, clock, until):
    from datetime import datetime
    from zoneinfo import ZoneInfo

    zone = ZoneInfo("Europe/Berlin")
    hour, minute = map(int, clock.split(":"))
    now = datetime(2026, 11, 20, hour, minute, tzinfo=zone).timestamp()
    wish = {"quiet_from": begins, "quiet_to": ends, "zone": "Europe/Berlin"}
    found = chats._quiet_until(wish, now)
    assert (found and datetime.fromtimestamp(found, zone).strftime("%H:%M")) == until
    assert found is None or 0 < found - now < 86400


@pytest.mark.parametrize(
    ("begins", "ends", "zone", "why"),
    [
        ("22:00", None, "UTC", "a beginning and an end"),
        ("22:00", "7", "UTC", "no time of a day"),
        ("25:00", "07:00", "UTC", "no time of a day"),
        ("22:00", "07:00", "Mars/Olympus", "no time zone"),
    ],
)
def test_wishes_that_cannot_be_are_refused(told, begins, ends, zone, why):
    with pytest.raises(Invalid, match=why):
        chats.set_wish(told.callers["olga"], begins, ends, zone, True)


# ── commands ──────────────────────────────────────────────────────────────────────────────────


def test_commands_complete(told):
    told.server.wait(lambda: told.server.calls_of("setMyCommands"))
    [call] = told.server.calls_of("setMyCommands")
    names = {command["command"] for command in json.loads(call.params["commands"])}
    wanted = "sessions focus unfocus tasks task new assign cancel note servers inbox status mute"
    assert {*wanted.split(), "help"} <= names


def test_a_task_is_made_assigned_noted_and_cancelled(told):
    olga = told.pair("olga")
    olga.says("/new Write <docs> & more\nAll of it.\nBy Friday.")
    message = told.shown(olga, "Write <docs> & more", "not assigned")
    [row] = models.rows("SELECT * FROM task WHERE title LIKE 'Write%'")
    assert (row["spec"], row["created_by"]) == ("All of it.\nBy Friday.", "olga")
    olga.taps("Assign", message)
    told.shown(olga, "Write <docs> & more", "assigned", "dev")
    olga.says(f"/note {row['id'][:8]} mind the gap")
    told.shown(olga, "Noted on Write <docs> & more")
    olga.says("/tasks")
    told.shown(olga, "Tasks", "1. ")
    olga.says("/task 1")
    told.shown(olga, "mind the gap")
    olga.says("/cancel 1")
    told.shown(olga, "Cancelled: Write <docs> & more")
    assert models.one("SELECT status FROM task WHERE id = ?", (row["id"],))["status"] == "cancelled"
    olga.says("/tasks cancelled")
    told.shown(olga, "Tasks", "— cancelled")


def test_a_task_goes_to_the_project_it_names(told):
    other = told.world.project("other")
    auth.change_user(
        HUB, told.callers["olga"].id, {"roles": {"shop": "operator", "other": "operator"}}
    )
    olga = told.pair("olga")
    olga.says("/new Which: one")
    told.shown(olga, "Several projects are visible to you")
    olga.says("/new other: Do it: now")
    told.shown(olga, "Do it: now")
    [row] = models.rows("SELECT * FROM task WHERE title = 'Do it: now'")
    assert row["project_id"] == other["id"]


def test_servers_status_and_inbox(told):
    olga = told.pair("olga")
    olga.says("/servers")
    told.shown(olga, "dev — online, 1 of 4 slots taken")
    asked = told.ask()
    told.shown(olga, "wants to run")
    olga.says("/status")
    told.shown(olga, "1 of 1 servers online", "1 active sessions", "1 waiting for a person")
    before = told.shown(olga, "wants to run")
    olga.says("/inbox")
    told.server.wait(lambda: before.deleted)
    message = told.shown(olga, "wants to run")
    assert message.id != before.id
    olga.taps("Allow", message)
    told.shown(olga, "Allowed by olga")
    assert told.permission(asked)["status"] == "allowed"
    olga.says("/inbox")
    told.shown(olga, "Nothing waits for you")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/task", "Say which task"),
        ("/task 99", "no task"),
        ("/task zzzz", "no task"),
        ("/focus", "Say which session"),
        ("/focus nowhere", "no session"),
        ("/new", "Say what is to be done"),
        ("/mute forever", "Say for how long"),
        ("/tasks sleeping", "Unknown status"),
        ("/nothing", "There is no command /nothing"),
        ("/here", "This is for groups"),
        ("words to nobody", "No session is focused"),
        ("/assign zzzz", "no task"),
        ("/cancel", "Say which task"),
        ("/note", "Say which task"),
    ],
)
def test_what_cannot_be_done_is_said(told, text, why):
    olga = told.pair("olga")
    olga.says(text)
    told.shown(olga, why)


def test_a_looker_on_does_nothing(told):
    vera = told.pair("vera")
    for text in ("/new A task", "/cancel W"):
        vera.says(text)
    told.shown(vera, "may not do this (task.create)")
    assert told.world.status("W") == "running"


def test_a_reply_to_news_of_a_task_is_a_note_on_it(told):
    olga = told.pair("olga")
    told.world.complete("W", {"summary": "finished"})
    olga.says("well done", reply_to=told.shown(olga, "W — finished"))
    wait_until(lambda: models.one("SELECT 1 FROM note WHERE content = 'well done'"))


def test_a_failed_task_is_tried_again_by_its_button(told):
    olga = told.pair("olga")
    told.world.fail("W", "it broke")
    olga.taps("Try again", told.shown(olga, "it broke"))
    wait_until(lambda: told.world.row("W")["attempt"] == 2)


# ── one bot a project ─────────────────────────────────────────────────────────────────────────


def test_a_project_with_its_own_bot_is_spoken_of_by_that_alone(told):
    token = "987654:BBshopBotTokenMadeUpForTests0000000"
    own = told.server.add_bot(token, "shop_bot")
    olga = told.pair("olga")
    chats.set_project_bot(told.callers["ada"], told.world.project("shop")["id"], token)
    wait_until(lambda: chats.bot_row("987654")["username"] == "shop_bot")
    olga.says("/sessions")
    told.shown(olga, "No session is active")
    there = olga.with_bot("shop_bot")
    there.says(f"/start {chats.new_code(told.callers['olga'])}")
    told.shown(there, "paired as olga")
    there.says("/sessions")
    told.shown(there, "Active sessions")
    told.ask()
    told.shown(there, "wants to run")
    assert not any("wants to run" in text for text in olga.chat.shown())
    assert own
    chats.set_project_bot(told.callers["ada"], told.world.project("shop")["id"], None)
    told.ask("make again")
    told.shown(olga, "make again")


def test_a_hubs_admin_has_no_more_there_than_the_bot_speaks_of(told):
    told.world.project("secret")
    told.callers["root"] = told.world.user("root", admin=True)
    token = "987654:BBshopBotTokenMadeUpForTests0000000"
    told.server.add_bot(token, "shop_bot")
    chats.set_project_bot(told.callers["ada"], told.world.project("shop")["id"], token)
    wait_until(lambda: chats.bot_row("987654")["username"] == "shop_bot")
    root = told.server.person("Root").with_bot("shop_bot")
    root.says(f"/start {chats.new_code(told.callers['root'])}")
    told.shown(root, "paired as root")
    _, caller = chats.who("987654", root.id)
    assert caller.roles == {told.world.project("shop")["id"]: "admin"}
    assert not caller.is_admin


@pytest.mark.parametrize("token", ["nothing", "123:short", "1234:" + "x" * 200, "a b:c"])
def test_what_is_no_token_is_refused_and_not_repeated(told, token):
    with pytest.raises(Invalid) as refused:
        chats.set_project_bot(told.callers["ada"], told.world.project("shop")["id"], token)
    assert token not in str(refused.value)


def test_only_admins_of_a_project_give_it_a_bot(told):
    with pytest.raises(Forbidden):
        chats.set_project_bot(told.callers["olga"], told.world.project("shop")["id"], None)


# ── groups ────────────────────────────────────────────────────────────────────────────────────


def grouped(told, **more):
    """A group that hears of the shop; ada, who made it so, a stranger in it, and the chat."""
    ada, sven = told.pair("ada"), told.server.person("Sven")
    group = told.server.group("Team", members=[ada, sven], **more)
    ada.says("/here shop", chat=group)
    told.shown(ada, "hears of shop", chat=group)
    return ada, sven, group


def test_in_a_group_only_taps_of_paired_members_count(told):
    ada, sven, group = grouped(told)
    asked = told.ask()
    message = told.shown(ada, "wants to run", chat=group)
    answer = sven.taps("Allow", message, chat=group).answer()
    assert answer["show_alert"] and "Only people who are paired" in answer["text"]
    assert told.permission(asked)["status"] == "pending"
    ada.taps("Allow", message, chat=group)
    told.shown(ada, "Allowed by ada in Telegram", chat=group)


def test_a_group_hears_of_nothing_else(told):
    told.world.project("secret")
    told.callers["root"] = told.world.user("root", admin=True)
    ada, _, group = grouped(told)
    root = told.pair("root")
    told.server.join(group, root)
    told.world.task("hidden", project="secret")
    root.says("/tasks", chat=group)
    told.shown(root, "Tasks", chat=group)
    assert not any("hidden" in text for text in group.shown())
    assert ada


def test_a_group_is_bound_by_an_admin_alone_and_taken_off(told):
    olga = told.pair("olga")
    group = told.server.group("Team", members=[olga])
    olga.says("/sessions", chat=group)
    told.shown(olga, "hears of no project yet", chat=group)
    olga.says("/here shop", chat=group)
    told.shown(olga, "may not do this", chat=group)
    ada = told.pair("ada")
    told.server.join(group, ada)
    ada.says("/here shop", chat=group)
    told.shown(ada, "hears of shop", chat=group)
    ada.says("/here off", chat=group)
    told.shown(ada, "hears of nothing any more", chat=group)
    assert models.rows("SELECT * FROM chat WHERE project_id IS NOT NULL") == []


def test_chatter_in_a_group_is_not_typed(told):
    ada, _, group = grouped(told)
    told.screen("$ ready")
    ada.says("/focus 1", chat=group)
    told.shown(ada, "no session", chat=group)
    ada.says("/sessions", chat=group)
    told.shown(ada, "Active sessions", chat=group)
    ada.says("/focus 1", chat=group)
    told.shown(ada, "$ ready", chat=group)
    before = len(group.messages)
    ada.says("rm -rf / was a joke", chat=group)
    ada.says("/status", chat=group)
    told.shown(ada, "servers online", chat=group)
    assert len(group.messages) == before + 3


def test_in_a_forum_each_task_has_its_topic(told):
    ada, _, group = grouped(told, forum=True)
    told.world.working("B", server="dev", command=["make"])
    told.ask()
    first = told.shown(ada, "wants to run", chat=group)
    told.world.fail("B", "it broke")
    second = told.shown(ada, "it broke", chat=group)
    assert group.topics[first.topic] == "W"
    assert group.topics[second.topic] == "B"
    ada.says("mind the gap", chat=group, topic=first.topic, reply_to=first)
    told.shown(ada, "Denied by ada in Telegram", chat=group)
    ada.says("/task", chat=group, topic=second.topic)
    told.shown(ada, "B", "failed", chat=group)


def test_a_forum_without_the_right_to_topics_is_told_in_one(told):
    ada, _, group = grouped(told, forum=True, bot_admin=False)
    told.ask()
    assert not told.shown(ada, "wants to run", chat=group).topic


def test_another_bots_command_is_not_ours(told):
    olga = told.pair("olga")
    count = len(olga.chat.shown())
    olga.says("/status@some_other_bot")
    olga.says(f"/servers@{told.server.username}")
    told.shown(olga, "Servers")
    assert len(olga.chat.shown()) == count + 1


# ── a bot that cannot be trusted to work ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault", [500, 502, b"<html>", {"ok": True}, b"[]", "cut", ("after", "cut"), ("after", 500)]
)
def test_a_telegram_that_fails_loses_nothing(told, fault):
    olga = told.pair("olga")
    told.server.fail("sendMessage", fault, fault)
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "look here")
    told.server.wait(lambda: any("ada: look here" in text for text in olga.chat.shown()))
    told.quiet()
    unsure = isinstance(fault, tuple)  # it was sent, and we cannot know
    assert sum("look here" in text for text in olga.chat.shown()) == (3 if unsure else 1)


@pytest.mark.fault("F34 Telegram is away")
def test_what_is_said_while_telegram_is_away_is_said_when_it_is_back(told, case):
    olga = told.pair("olga")
    told.server.down = True
    for number in range(3):
        inbox.add_note(told.callers["ada"], told.world.ids["W"], f"note {number}")
        time.sleep(0.01)
    asked = ask_help(told)
    gone = ask_help(told, "Gone?")
    wait_until(lambda: models.one("SELECT COUNT(*) AS n FROM notice")["n"] == 5)
    inbox.answer(told.callers["ada"], gone, "yes")
    told.server.down = False
    told.shown(olga, "JWT or cookies?")
    for number in range(3):
        told.shown(olga, f"note {number}")
    told.quiet()
    assert not any("Gone?" in text for text in olga.chat.shown())
    assert intervention(asked)["status"] == "pending"
    said = [text for text in olga.chat.shown() if "note " in text or "JWT" in text]
    case.count("messages", 4, 4 - len(said))
    case.kills, case.seen = 1, "said when it was back, once; what had ended meanwhile is not said"


def test_telegram_is_left_alone_for_as_long_as_it_says(told):
    olga = told.pair("olga")
    told.server.retry("sendMessage", 1)
    began = time.monotonic()
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "look here")
    told.shown(olga, "ada: look here")
    calls = [c for c in told.server.calls_of("sendMessage") if c.at > began]
    assert calls[1].at - calls[0].at >= 0.99


@pytest.mark.parametrize("fault", [500, b"nonsense", "cut", {"ok": True, "result": 5}])
def test_a_poll_that_fails_is_asked_again(told, fault):
    told.server.fail("getUpdates", fault, fault, fault)
    olga = told.pair("olga")
    olga.says("/status")
    told.shown(olga, "servers online")


@pytest.mark.fault("F34 updates of Telegram arrive twice")
def test_an_update_that_comes_twice_acts_once(told, case):
    olga = told.pair("olga")
    olga.says("/new Only once")
    told.shown(olga, "Only once")
    told.server.repeat()
    olga.says("/status")
    told.shown(olga, "servers online")
    told.restart()
    told.server.repeat()
    olga.says("/servers")
    told.shown(olga, "Servers")
    assert len(models.rows("SELECT * FROM task WHERE title = 'Only once'")) == 1
    case.kills, case.seen = 2, "each acts once, over a restart too"


def test_updates_out_of_order_are_all_handled(told):
    olga = told.pair("olga")
    base = models.one("SELECT MAX(update_id) AS id FROM bot_update")["id"]
    chat = {"id": olga.id, "type": "private"}
    for number, update_id in ((1, base + 900), (2, base + 800), (3, base + 900)):
        told.server.push_raw(
            {
                "update_id": update_id,
                "message": {
                    "message_id": 5000 + number,
                    "date": int(time.time()),
                    "chat": chat,
                    "from": {"id": olga.id, "is_bot": False, "first_name": "Olga"},
                    "text": f"/new Task {number}",
                },
            }
        )
    told.shown(olga, "Task 2")
    told.shown(olga, "Task 1")
    titles = [r["title"] for r in models.rows("SELECT title FROM task WHERE title LIKE 'Task %'")]
    assert sorted(titles) == ["Task 1", "Task 2"]


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"message": None},
        {"message": {"chat": {}}},
        {"callback_query": {"id": 5}},
        {"message": {"chat": {"id": 1, "type": "private"}, "from": {"id": 1}, "text": {"a": 1}}},
        {"my_chat_member": {"chat": {"id": 5, "type": "private"}}},
        {"edited_message": {"text": "/new x"}},
    ],
)
def test_a_malformed_update_is_passed_over(told, update):
    told.server.push_raw(update)
    olga = told.pair("olga")
    olga.says("/status")
    told.shown(olga, "servers online")


def test_two_pollers_are_noticed_and_said(told):
    conflict = {"ok": False, "error_code": 409, "description": "Conflict: terminated by other"}
    told.server.fail("getUpdates", *[conflict] * 1000)
    bot = chats.hub_bot()
    wait_until(lambda: "Another program" in (chats.bot_row(bot)["trouble"] or ""))
    told.server.mend()
    wait_until(lambda: chats.bot_row(bot)["trouble"] is None)
    olga = told.pair("olga")
    olga.says("/status")
    told.shown(olga, "servers online")


def test_a_telegram_that_does_not_answer_is_asked_again(told, monkeypatch):
    olga = told.pair("olga")
    monkeypatch.setattr(telegram.apihelper, "READ_TIMEOUT", 0.3)
    told.server.fail("sendMessage", "hold", "hold")
    ask_help(told)
    told.shown(olga, "JWT or cookies?")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://hub.example.org", "https://hub.example.org/tasks/1"),
        ("http://10.0.0.5:8080", "http://10.0.0.5:8080/tasks/1"),
        ("http://127.0.0.1:8080", None),
        ("http://localhost:8080", None),
        ("http://hub:8080", None),
        ("http://[::1]:8080", None),
    ],
)
def test_links_lead_where_a_phone_can_follow(told, url, path):
    telegram_words.use_url(url)
    assert telegram_words.address("tasks/1") == path


def test_who_blocks_the_bot_is_told_nothing_and_all_when_they_are_back(told):
    olga = told.pair("olga")
    olga.blocks()
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "look here")
    wait_until(lambda: chats.own_chats(told.callers["olga"])[0]["refused"])
    olga.says("/status")
    told.shown(olga, "servers online")
    told.shown(olga, "ada: look here")


@pytest.mark.parametrize(
    "data", ["", "zz:1", "pa:", "pa:nothing", "p9:", "i7:x", "ke:x", "t:' OR 1", "f:" + "x" * 60]
)
def test_a_made_up_tap_does_nothing(told, data):
    olga = told.pair("olga")
    olga.says("/status")
    message = told.shown(olga, "servers online")
    before = told.world.now()
    told.server.push_raw(
        {
            "callback_query": {
                "id": "77",
                "from": {"id": olga.id, "is_bot": False, "first_name": "Olga"},
                "data": data,
                "message": {
                    "message_id": message.id,
                    "date": int(time.time()),
                    "chat": {"id": olga.id, "type": "private"},
                },
            },
        }
    )
    told.server.wait(lambda: told.server.calls_of("answerCallbackQuery"))
    assert told.world.now() == before


HOSTILE = (
    "<b>bold</b> & <script>alert(1)</script>",
    "*bold* _it_ [x](tg://user?id=1) `c`",
    "\x1b]52;c;aGk=\x07\x1b[31mred\x1b[0m\x9b5n\x1bP$q\x1b\\",
    "right\u202eleft \u2066iso\u2069",
    "&lt;not&gt; &amp;amp; &#60;",
    "</pre><a href='javascript:1'>x</a>",
    "😀" * 3000,
    "\x00null\x08back",
    "[" * 3000,
    "<" * 5000,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_wrote_is_shown_as_it_stands(told, text):
    olga = told.pair("olga")
    title = telegram_text.clean(text)[:200].strip() or "x"
    tasks.update(HUB, told.world.ids["W"], {"title": title})
    ask_help(told, text)
    message = told.shown(olga, "Needs help:")
    styles = {"bold", "italic", "blockquote", "text_link", "code"}
    assert {entity["type"] for entity in message.entities} <= styles
    assert not any(
        entity["type"] == "text_link" and not entity["url"].startswith("https://hub.example.org/")
        for entity in message.entities
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", message.text)
    told.screen(text, text)
    olga.says(f"/focus {told.session['tmux_name']}")
    told.shown(olga, "📺")
    inbox.add_note(told.callers["ada"], told.world.ids["W"], text)
    told.shown(olga, "ada: ")
    told.quiet()
    refused = [c for c in told.server.calls if c.status == 400 and c.method != "deleteMessage"]
    assert not refused


def test_the_token_is_nowhere_to_be_seen(told, caplog):
    olga = told.pair("olga")
    told.server.down = True
    inbox.add_note(told.callers["ada"], told.world.ids["W"], "look here")
    wait_until(lambda: chats.bot_row(chats.hub_bot())["trouble"])
    told.server.down = False
    told.shown(olga, "look here")
    secret = told.server.token.partition(":")[2]
    assert secret not in caplog.text
    stored = [json.dumps(models.rows(f"SELECT * FROM {name}"), default=str) for name in
              ("bot", "chat", "post", "notice", "event")]  # fmt: skip
    assert not any(secret in text for text in stored)


# What https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this allows.
@pytest.mark.parametrize(("place", "span", "most"), [(5, 1.0, 5), (-5, 60.0, 20)])
def test_the_pace_of_a_chat_is_kept(place, span, most):
    pace, now, sent = telegram.Pace(), time.monotonic(), []
    while now < time.monotonic() + 200:
        wait = pace.wait(place, now)
        if wait <= 0:
            pace.take(place, now)
            sent.append(now)
        now += max(wait, 0.001)
    for at in sent:
        assert sum(at <= other < at + span for other in sent) <= most
    assert len(sent) > (150 if place > 0 else 50)


def test_the_pace_of_all_chats_is_kept_and_screens_leave_room():
    pace, now, sent = telegram.Pace(), time.monotonic(), []
    for turn in range(4000):
        for place in range(1, 60):
            if pace.wait(place, now, screen=turn % 2 == 0) <= 0:
                pace.take(place, now)
                sent.append(now)
        now += 0.01
    for at in sent[:: len(sent) // 50]:
        assert sum(at <= other < at + 1 for other in sent) <= 30
    fresh = telegram.Pace()
    now = time.monotonic()
    for place in range(1, 100):
        if fresh.wait(place, now, screen=True) <= 0:
            fresh.take(place, now)
    assert fresh.wait(200, now, screen=True) > 0
    assert fresh.wait(200, now) == 0


def test_a_second_chat_that_is_held_means_the_bot():
    pace = telegram.Pace()
    pace.hold(1, 30)
    now = time.monotonic()
    assert pace.wait(1, now) > 29
    assert pace.wait(2, now) == 0
    pace.hold(2, 20)
    assert pace.wait(3, time.monotonic()) > 19


def test_a_burst_stays_within_telegrams_limits(told, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(notices, "MERGE_S", 0.001)
    told.server.floods = True
    told.restart()
    olga = told.pair("olga")
    for number in range(8):
        ask_help(told, f"Question {number}?")
        told.server.wait(lambda number=number: any(f"Question {number}?" in t for t in
                                                   olga.chat.shown()))  # fmt: skip
    assert told.server.flooded == []


# ── screens ───────────────────────────────────────────────────────────────────────────────────


def test_a_focused_session_is_shown_in_one_message_that_is_edited(told):
    olga = told.pair("olga")
    told.screen("$ Running tests...")
    olga.says("/sessions")
    told.shown(olga, "Active sessions", told.session["tmux_name"], "(dev)")
    olga.says("/focus 1")
    told.shown(olga, "Focused on")
    message = told.shown(olga, "$ Running tests...")
    assert any(entity["type"] == "pre" for entity in message.entities)
    for done in (4, 8, 12):
        told.screen("$ Running tests...", f"{done}/12 \x1b[32mpass\x1b[0m")
        told.shown(olga, f"{done}/12 pass")
    assert message.text.endswith("12/12 pass")
    assert len([m for m in olga.chat.messages if "📺" in m.text]) == 1
    told.screen("$ Running tests...", "12/12 \x1b[32mpass\x1b[0m")
    olga.says("/unfocus")
    told.shown(olga, "Not focused any more")
    told.server.wait(lambda: message.buttons == [])
    told.screen("$ something else")
    told.quiet()
    assert message.text.endswith("12/12 pass")
    edits = [c for c in told.server.calls_of("editMessageText") if c.status != 200]
    assert not edits


@pytest.mark.parametrize("ref", ["orc-{}", "{}", "W"])
def test_a_session_is_focused_by_its_name_or_id(told, ref):
    olga = told.pair("olga")
    told.screen("$ here")
    name = told.session["name"] if ref == "W" else ref.format(told.session["id"][:6])
    olga.says(f"/focus {name}")
    told.shown(olga, "$ here")


def test_a_focus_outlives_a_restart(told):
    olga = told.pair("olga")
    told.screen("before")
    olga.says("/focus " + told.session["tmux_name"])
    message = told.shown(olga, "before")
    told.restart()
    told.screen("after")
    told.shown(olga, "after")
    assert message.text.endswith("after")


def test_a_focus_ends_with_the_right_to_watch(told):
    olga = told.pair("olga")
    told.screen("before")
    olga.says("/focus " + told.session["tmux_name"])
    told.shown(olga, "before")
    auth.change_user(HUB, told.callers["olga"].id, {"roles": {}})
    told.screen("secret")
    wait_until(lambda: not models.rows("SELECT * FROM focus"))
    assert not any("secret" in text for text in olga.chat.shown())


def test_a_screen_that_was_deleted_comes_again(told):
    olga = told.pair("olga")
    told.screen("before")
    olga.says("/focus " + told.session["tmux_name"])
    message = told.shown(olga, "before")
    message.deleted = True
    told.screen("after")
    told.shown(olga, "after")


def test_a_screen_far_up_moves_down(told):
    olga = told.pair("olga")
    told.screen("before")
    olga.says("/focus " + told.session["tmux_name"])
    message = told.shown(olga, "before")
    for _ in range(5):
        olga.says("/status")
    told.server.wait(lambda: sum("servers online" in text for text in olga.chat.shown()) == 5)
    told.screen("after")
    told.shown(olga, "after")
    told.server.wait(lambda: message.deleted)


def test_what_was_written_long_ago_is_not_typed(told):
    olga = told.pair("olga")
    told.screen("$")
    olga.says("/focus " + told.session["tmux_name"])
    told.shown(olga, "📺")
    told.server.push_raw(
        {
            "message": {
                "message_id": 900,
                "date": int(time.time()) - 3600,
                "chat": {"id": olga.id, "type": "private"},
                "from": {"id": olga.id, "is_bot": False, "first_name": "Olga"},
                "text": "yes",
            },
        }
    )
    told.shown(olga, "written 60 min ago", "not typed")


def test_a_reply_to_what_asks_nothing_is_not_typed(told):
    olga = told.pair("olga")
    told.screen("$")
    olga.says("/focus " + told.session["tmux_name"])
    told.shown(olga, "📺")
    olga.says("/status")
    olga.says("rm -rf x", reply_to=told.shown(olga, "servers online"))
    told.shown(olga, "asks for nothing now")


def test_a_server_that_is_away_types_nothing_and_says_so(told):
    olga = told.pair("olga")
    told.screen("$")
    olga.says("/focus " + told.session["tmux_name"])
    message = told.shown(olga, "📺")
    olga.says("ls")
    told.shown(olga, "cannot be reached now")
    answer = olga.taps("Esc", message).answer()
    assert answer["show_alert"] and "cannot be reached" in answer["text"]


# ── the pages' side ───────────────────────────────────────────────────────────────────────────


def test_groups_are_changed_by_admins_of_their_project(told):
    grouped(told)
    [group] = chats.groups_of(told.callers["ada"], told.world.project("shop")["id"])
    with pytest.raises(Forbidden):
        chats.set_group_kinds(told.callers["olga"], group["id"], ["done"])
    chats.set_group_kinds(told.callers["ada"], group["id"], ["done"])
    with pytest.raises(Invalid, match="Unknown kind"):
        chats.set_group_kinds(told.callers["ada"], group["id"], ["gossip"])
    [group] = chats.groups_of(told.callers["ada"], told.world.project("shop")["id"])
    assert group["kinds"] == ["done"]
    chats.unbind_group(told.callers["ada"], group["id"])
    with pytest.raises(NotFound):
        chats.unbind_group(told.callers["ada"], group["id"])
