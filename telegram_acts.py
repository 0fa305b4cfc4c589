"""What people do on Telegram: their messages and taps as calls of the use cases.

An update is handled once: that it was, what it did and what is answered are one transaction.
What cannot be undone by one, typing into a session, is done after it, and once at most.
"""

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import alerts
import api
import auth
import chats
import inbox
import notices
import permissions
import reading
import servers
import sessions
import tasks
import telegram_words as say
from auth import Caller
from cascade import RuleBroken
from models import (
    Busy,
    Conflict,
    Invalid,
    NotFound,
    Refused,
    Transaction,
    dumps,
    execute,
    loads,
    one,
    transaction,
)
from telegram_text import Text, b, code, cut, i, joined

log = logging.getLogger("orchestratia.telegram")

LATE_S = 120.0  # what was written longer ago is not typed: its writer looked at another screen
LISTED_MOST = 10  # tasks of one list
ALERT_MOST = 200  # characters of the answer to a tap (https://core.telegram.org/bots/api)
STRANGERS_S = 600.0  # a stranger is answered once in so long
STRANGERS_KEPT = 1000
WAITING_SHOWN = 10
STRANGER = (
    "Hello! I speak only with people who are paired with this hub: make a code on its settings "
    "page and send it to me as /start CODE."
)
WRONG_CODE = (
    "This code does not pair us: it was used, is wrong or too old. Make a new one on the settings "
    "page of the dashboard."
)
BROKEN = "Something went wrong here, and was logged on the hub. Nothing was done."
KEYS = {  # what a button types, by the letter it says
    "e": b"\r",
    "x": b"\x1b",
    "u": b"\x1b[A",
    "d": b"\x1b[B",
    "t": b"\t",
    "c": b"\x03",
}


@dataclass
class Told:
    """A message or a tap: who says what, where."""

    bot: str
    place: int  # the chat, as Telegram numbers it
    private: bool
    account: int
    name: str
    text: str = ""
    message_id: int | None = None  # of what they wrote, or of ours that they tapped
    reply_to: int | None = None
    thread: int = 0
    forum: bool = False
    title: str = ""
    date: float = 0.0
    tap: str | None = None  # the id by which a tap is answered
    chat: dict | None = None
    caller: Caller | None = None


@dataclass
class After:
    """What is to be done once the update is kept: the answer to a tap, and what a transaction
    cannot do: (name, what it takes …) of telegram.JOBS."""

    tap: str | None = None
    answer: str = ""
    alarm: bool = False
    jobs: list[tuple] = field(default_factory=list)


def take(bot: str, update: dict) -> After:
    """Handle an update that was not handled yet. Raises Busy, when nothing was kept."""
    try:
        told = _read(bot, update)
        with transaction() as tx:
            if not chats.first_time(bot, update["update_id"]):
                return After()
            return _act(tx, bot, update, told)
    except Busy:
        raise
    except (Refused, RuleBroken) as refused:
        return _refuse(bot, update, told, str(refused))
    except Exception:
        log.exception("an update of bot %s could not be handled", bot)
        return _refuse(bot, update, None, BROKEN)


def _act(tx: Transaction, bot: str, update: dict, told: Told | None) -> After:
    if told is None:
        return _about_chats(tx, bot, update)
    if told.tap:
        return _tapped(tx, told)
    return _written(tx, told)


def _refuse(bot: str, update: dict, told: Told | None, sentence: str) -> After:
    with transaction() as tx:
        if not chats.first_time(bot, update["update_id"]) or told is None:
            return After()
        if told.tap:
            return After(told.tap, cut(sentence, ALERT_MOST), True)
        answer(tx, told, say.said(f"⚠️ {sentence}"))
        return After()


def answer(tx: Transaction, told: Told, body: dict) -> int:
    """Keep what is answered where they wrote it; the number of the post."""
    chat = told.chat or {"bot_id": told.bot, "chat_id": told.place}
    reply_to = None if told.private or told.tap else told.message_id
    return notices.say(tx, chat, "reply", body, thread=told.thread or None, reply_to=reply_to)


# ── reading updates ───────────────────────────────────────────────────────────────────────────


def _read(bot: str, update: dict) -> Told | None:
    """What somebody says by an update; None when nobody says anything we listen to."""
    tap = update.get("callback_query")
    message = tap.get("message") if tap else update.get("message")
    who = (tap or message or {}).get("from") or {}
    if not message or not who.get("id") or who.get("is_bot"):
        return None
    place = message["chat"]
    told = Told(
        bot=bot,
        place=place["id"],
        private=place["type"] == "private",
        account=who["id"],
        name=" ".join(filter(None, (who.get("first_name"), who.get("last_name")))) or "somebody",
        text=str((tap or {}).get("data") or message.get("text") or ""),
        message_id=message.get("message_id"),
        reply_to=(message.get("reply_to_message") or {}).get("message_id"),
        thread=message.get("message_thread_id") or 0 if message.get("is_topic_message") else 0,
        forum=bool(place.get("is_forum")),
        title=place.get("title") or "",
        date=float(message.get("date") or 0),
        tap=str(tap["id"]) if tap else None,
    )
    if told.reply_to and told.reply_to == told.thread:
        told.reply_to = None  # what is written in a topic replies to its first message
    _recognise(told)
    return told


def _recognise(told: Told) -> None:
    found = chats.who(told.bot, told.account)
    if told.private:
        told.chat, told.caller = found or (None, None)
        return
    told.chat = chats.chat_at(told.bot, told.place)
    if found:
        only = [told.chat["project_id"]] if told.chat else chats.served(told.bot)
        told.caller = chats.narrowed(found[1], only)


def _about_chats(tx: Transaction, bot: str, update: dict) -> After:
    """The bot was added somewhere, thrown out or blocked; or a group was moved."""
    message, change = update.get("message") or {}, update.get("my_chat_member") or {}
    place = (change or message).get("chat") or {}
    if message.get("migrate_to_chat_id"):
        chats.moved(bot, place["id"], message["migrate_to_chat_id"])
    if change:
        chat = chats.chat_at(bot, place["id"])
        status = (change.get("new_chat_member") or {}).get("status")
        away = status in ("left", "kicked")
        if chat:
            why = "it blocked the bot" if chat["user_id"] else "it threw the bot out"
            chats.change_chat(chat["id"], refused=why if away else None)
        elif not away and place.get("type") != "private":
            hello = say.said(
                "Hello! Whoever is paired with me and an admin of a project makes this group hear "
                "of it: /here PROJECT"
            )
            notices.say(tx, {"bot_id": bot, "chat_id": place["id"]}, "reply", hello)
    return After()


# ── strangers ─────────────────────────────────────────────────────────────────────────────────


class _Strangers:
    """Whom we have told lately that we do not know them: once is enough."""

    def __init__(self):
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple, float] = OrderedDict()

    def greet(self, who: tuple, now: float) -> bool:
        with self._lock:
            before = self._told.pop(who, None)
            if before is not None and now - before < STRANGERS_S:
                self._told[who] = before
                return False
            self._told[who] = now
            while len(self._told) > STRANGERS_KEPT:
                self._told.popitem(last=False)
            return True


strangers = _Strangers()


def _stranger(tx: Transaction, told: Told) -> After:
    if told.tap:
        return After(told.tap, "Only people who are paired with this hub can do that.", True)
    named = told.text.startswith("/")
    if (told.private or named) and strangers.greet((told.bot, told.account), time.monotonic()):
        answer(tx, told, say.said(STRANGER))
    return After()


# ── messages ──────────────────────────────────────────────────────────────────────────────────

COMMAND = re.compile(r"/([A-Za-z0-9_]{1,32})(?:@(\w+))?(?:\s+(.*))?", re.DOTALL)


def _written(tx: Transaction, told: Told) -> After:
    command = COMMAND.fullmatch(told.text.strip())
    if command and command[2] and command[2].lower() != _username(told.bot):
        return After()  # another bot's
    if command and command[1].lower() == "start":
        return _start(tx, told, (command[3] or "").strip())
    if told.caller is None:
        return _stranger(tx, told)
    if told.private and told.chat["refused"]:
        chats.change_chat(told.chat["id"], refused=None)
    if command:
        return _command(tx, told, command[1].lower(), (command[3] or "").strip())
    if not told.text:
        if told.private:
            answer(tx, told, say.said("I read text only: nothing was done."))
        return After()
    replied = told.reply_to and notices.post_at(told.bot, told.place, told.reply_to)
    if replied:
        return _replied(tx, told, replied)
    return _typed(tx, told)


def _username(bot: str) -> str:
    return (chats.bot_row(bot)["username"] or "").lower()


def _start(tx: Transaction, told: Told, given: str) -> After:
    if not told.private:
        if given:
            chats.end_code(given)
            answer(tx, told, say.said("Others have seen this code: it is ended. Send a new one to "
                                      "me alone."))  # fmt: skip
        return After()
    if not given:
        return _command(tx, told, "help", "") if told.caller else _stranger(tx, told)
    chat = chats.pair(told.bot, told.account, told.name, given)
    if chat is None:
        answer(tx, told, say.said(WRONG_CODE))
        return After()
    told.chat = chat
    hello = Text("🤝 You are paired as ", b(chat["created_by"]), ". /help shows what I do.")
    answer(tx, told, say.said(hello))
    return After()


def _command(tx: Transaction, told: Told, name: str, rest: str) -> After:
    if name not in COMMANDS:
        raise NotFound(f"There is no command /{name}: /help lists them.")
    if not told.private and told.chat is None and name != "here":
        raise Conflict("This group hears of no project yet: an admin of one writes /here PROJECT.")
    result = COMMANDS[name][0](tx, told, rest)
    if isinstance(result, After):
        return result
    if result:
        answer(tx, told, result)
    return After()


def _projects(told: Told) -> list[str]:
    return list(told.caller.roles)


def _listed(told: Told, kind: str, found: list[dict]) -> None:
    """Remember what the numbers of a list mean in this chat."""
    kept = loads(told.chat["listed"])
    kept = (kept if isinstance(kept, dict) else {}) | {kind: [row["id"] for row in found]}
    chats.change_chat(told.chat["id"], listed=dumps(kept))


NUMBER = re.compile(r"\d{1,3}")


def _meant(told: Told, kind: str, ref: str) -> str:
    """The id behind a number of the last list, or the word itself."""
    kept = loads(told.chat["listed"])
    listed = kept.get(kind, []) if isinstance(kept, dict) else []
    if NUMBER.fullmatch(ref) and 1 <= int(ref) <= len(listed):
        return listed[int(ref) - 1]
    return ref


def _live_sessions(told: Told) -> list[dict]:
    found = sessions.list_sessions(_projects(told))
    return [s for s in found if s["status"] != "lost"]


def _sessions(_tx, told: Told, _rest: str) -> dict:
    found = _live_sessions(told)
    _listed(told, "sessions", found)
    return say.session_list(found)


def _session_of(told: Told, ref: str) -> dict:
    """The session meant: a number of the last list, a name, the beginning of an id or of the name
    tmux knows it by. Raises NotFound, Conflict."""
    ref = _meant(told, "sessions", ref)
    if NUMBER.fullmatch(ref):
        raise NotFound(f"There is no session {ref} in the last list: /sessions shows them anew.")
    wanted = ref.lower()
    live = _live_sessions(told)
    fits = [s for s in live if s["id"] == ref or s["name"].lower() == wanted]
    fits = fits or [
        s for s in live if s["tmux_name"].startswith(wanted) or s["id"].startswith(wanted)
    ]
    if len(fits) > 1:
        names = ", ".join(f"{s['name']} ({s['tmux_name']})" for s in fits[:5])
        raise Conflict(f"{ref!r} fits {len(fits)} sessions: {names}. Say more of it.")
    return sessions.get_session(told.caller, fits[0]["id"] if fits else ref)


def _focus(tx: Transaction, told: Told, rest: str) -> After:
    about = chats.about_of(told.chat["id"], told.thread) if told.thread else None
    if not rest and about:
        task = one("SELECT session_id FROM task WHERE id = ?", (about,))
        rest = (task["session_id"] if task else about) or ""
    if not rest:
        raise Invalid("Say which session: /focus NUMBER, after /sessions.")
    return _look_at(tx, told, _session_of(told, rest))


def _look_at(tx: Transaction, told: Told, session: dict) -> After:
    auth.require(told.caller, "session.watch", session["project_id"], "session")
    before = chats.set_focus(told.chat["id"], told.thread, session["id"], told.caller.id)
    hint = "What you write now is typed there." if told.private else "Reply to its screen to type."
    name = Text(code(session["tmux_name"]), f" ({cut(session['name'], 60)})")
    answer(tx, told, say.said("👁 Focused on ", name, ". ", hint, " /unfocus ends it."))
    return After(told.tap, jobs=_last_screen(told, before))


def _last_screen(told: Told, focus: dict | None) -> list[tuple]:
    """The message that showed a session stays as it is, without its buttons."""
    return [("still", told, focus["message_id"])] if focus and focus["message_id"] else []


def _unfocus(tx: Transaction, told: Told, _rest: str) -> After:
    before = chats.end_focus(told.chat["id"], told.thread)
    done = "Not focused any more." if before else "No session was focused."
    if not told.tap:
        answer(tx, told, say.said(done))
    return After(told.tap, done, jobs=_last_screen(told, before))


def _tasks(_tx, told: Told, rest: str) -> dict:
    status = rest.replace(" ", ",") or None
    found, more = reading.list_tasks(_projects(told), status=status, limit=LISTED_MOST)
    _listed(told, "tasks", found)
    return say.task_list(found, more is not None)


def _task_of(told: Told, ref: str) -> dict:
    about = chats.about_of(told.chat["id"], told.thread) if told.thread else None
    if not (ref or about):
        raise Invalid("Say which task: the number in the last list, or the beginning of its id.")
    return auth.find("task", told.caller, _meant(told, "tasks", ref) if ref else about)


def _task(_tx, told: Told, rest: str) -> dict:
    return say.task_view(_task_of(told, rest), told.caller)


NEW = re.compile(r"(?:(?P<project>[^:\n]{1,100}):\s+)?(?P<title>[^\n]+)(?:\n(?P<spec>.*))?", re.S)


def _new(_tx, told: Told, rest: str) -> dict:
    """`/new [PROJECT:] TITLE`, and below it what is to be done."""
    said = NEW.fullmatch(rest)
    if not said:
        raise Invalid("Say what is to be done: /new TITLE, and more in the lines below it.")
    project, title = _project_named(told, said["project"]), said["title"]
    if project is None:
        title = f"{said['project']}: {title}" if said["project"] else title
        project = auth.pick_project(told.caller, None)
    spec = (said["spec"] or "").strip()
    given = {"title": title.strip()} | ({"spec": spec} if spec else {})
    row = tasks.create(told.caller, project, api.checked(api.TaskIn, given))
    return say.task_view(row, told.caller)


def _project_named(told: Told, name: str | None) -> dict | None:
    """The project a title begins with, if it is one's name."""
    found = auth.visible_projects(told.caller) if name else []
    return next((p for p in found if p["name"].lower() == name.strip().lower()), None)


def _assign(_tx, told: Told, rest: str) -> dict:
    ref, _, target = rest.partition(" ")
    row = _task_of(told, ref)
    done = tasks.assign(told.caller, row["id"], session_name=target.strip() or None)
    return say.task_view(done, told.caller)


def _cancel(_tx, told: Told, rest: str) -> dict:
    row = _task_of(told, rest)
    tasks.cancel(told.caller, row["id"])
    return say.said("🚫 Cancelled: ", b(cut(row["title"], 200)))


def _note(_tx, told: Told, rest: str) -> dict:
    ref, _, words = rest.partition(" ")
    about = chats.about_of(told.chat["id"], told.thread) if told.thread else None
    row = auth.find("task", told.caller, about) if about else _task_of(told, ref)
    inbox.add_note(told.caller, row["id"], rest if about else words)
    return say.said("📝 Noted on ", b(cut(row["title"], 200)))


def _servers(_tx, told: Told, _rest: str) -> dict:
    return say.server_list(servers.list_servers(_projects(told)))


def _inbox(tx: Transaction, told: Told, _rest: str) -> dict | None:
    """Everything that waits, each anew with its buttons."""
    found = inbox.waiting(_projects(told))
    if not found:
        return say.said("✨ Nothing waits for you.")
    for item in found[:WAITING_SHOWN]:
        notices.show(tx, told.chat, _subject_of(item), item["task_id"] or item["session_id"])
    rest = len(found) - WAITING_SHOWN
    return say.said(f"… and {rest} more on the dashboard.") if rest > 0 else None


def _subject_of(item: dict) -> str:
    what = item["kind"] if item["kind"] in ("permission", "plan") else "intervention"
    return f"{'alert' if item['kind'] in alerts.KINDS else what}:{item['id']}"


def _status(_tx, told: Told, _rest: str) -> dict:
    ids = _projects(told)
    found = servers.list_servers(ids)
    live = _live_sessions(told)
    marks = ", ".join("?" * len(ids))
    counts = dict(
        execute(
            "SELECT status, COUNT(*) FROM task WHERE status NOT IN ('done', 'failed', 'cancelled')"
            f" AND project_id IN ({marks}) GROUP BY status",
            ids,
        ).fetchall()
    )
    online = sum(s["status"] == "online" for s in found)
    waiting = inbox.count(ids)
    tasks_said = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in counts.items())
    muted = (told.chat["muted_until"] or 0) > time.time()
    return say.said(
        joined(
            [
                Text(f"🖥 {online} of {len(found)} servers online"),
                Text(f"💻 {len(live)} active sessions"),
                Text(f"🗂 open tasks: {tasks_said or 'none'}"),
                Text(f"📥 {waiting} waiting for a person" + (" — /inbox" if waiting else "")),
                i("Muted: /mute off ends it.") if muted else None,
            ]
        )
    )


LENGTH = re.compile(r"(\d{1,4})\s*(m|min|h|d)", re.IGNORECASE)
SECONDS = {"m": 60, "min": 60, "h": 3600, "d": 86400}


def _mute(_tx, told: Told, rest: str) -> dict:
    if rest.lower() in ("off", "0"):
        chats.mute(told.chat["id"], None, time.time())
        return say.said("🔔 I tell you what happens again.")
    length = LENGTH.fullmatch(rest or "1h")
    if not length:
        raise Invalid("Say for how long: /mute 30m, /mute 2h, /mute 1d, or /mute off.")
    chats.mute(told.chat["id"], int(length[1]) * SECONDS[length[2].lower()], time.time())
    shown = f"{length[1]} {length[2]}"
    return say.said(f"🔕 Muted for {shown}: what waits is told then. /mute off ends it.")


def _here(tx: Transaction, told: Told, rest: str) -> dict:
    """Have a group hear of a project, or of none."""
    if told.private:
        raise Conflict("This is for groups: here you hear of all your projects.")
    if rest.lower() == "off":
        if not told.chat:
            raise Conflict("This group hears of no project.")
        chats.unbind_group(told.caller, told.chat["id"])
        told.chat = None
        return say.said("This group hears of nothing any more.")
    found = chats.who(told.bot, told.account)
    told.chat = chats.bind_group(
        found[1], told.bot, told.place, told.title, told.forum, rest or None
    )
    project = auth.pick_project(found[1], told.chat["project_id"])
    topics = " Each task has a topic of its own." if told.forum else ""
    return say.said("📣 This group hears of ", b(project["name"]), f" from now on.{topics}")


def _stop(_tx, told: Told, _rest: str) -> dict:
    if not told.private:
        raise Conflict("Write this to me alone; /here off ends what this group hears.")
    chats.unpair(told.caller, told.chat["id"])
    told.chat = None
    return say.said("👋 We are not paired any more.")


def _help(_tx, told: Told, _rest: str) -> dict:
    lines = [Text(f"/{name} — {text}") for name, (_, text) in COMMANDS.items()]
    more = i("Reply to a question to answer it, to anything else about a task to note it there.")
    return say.said(joined([b("What I do"), *lines, more]))


# name: (function, what it is, as Telegram completes it)
COMMANDS = {
    "sessions": (_sessions, "active sessions, numbered"),
    "focus": (_focus, "the live screen of a session: name, id or number"),
    "unfocus": (_unfocus, "end the live screen"),
    "inbox": (_inbox, "what waits for you"),
    "tasks": (_tasks, "the newest tasks; with a state, those in it"),
    "task": (_task, "a task: id or number"),
    "new": (_new, "make a task: title, and details in the lines below"),
    "assign": (_assign, "give a task to whoever fits, or to a server or session"),
    "cancel": (_cancel, "cancel a task"),
    "note": (_note, "add a note to a task"),
    "servers": (_servers, "servers and their slots"),
    "status": (_status, "how things stand"),
    "mute": (_mute, "say nothing by itself: 30m, 2h, 1d, off"),
    "here": (_here, "in a group: hear of a project, or off"),
    "stop": (_stop, "end our pairing"),
    "help": (_help, "what I do"),
}


# ── replies, and what is typed ────────────────────────────────────────────────────────────────


def _replied(tx: Transaction, told: Told, post: dict) -> After:
    """An answer to what a message of ours asks; about anything else of a task a note on it."""
    if post["kind"] == "ask":
        subject = post["opened"]
        notices.take_back(tx, post["seq"])
    else:
        subject, told.text = _subject_replied(told, notices.notices_of(post))
    if subject:
        _answer(told, subject, told.text)
    elif post["about"] and one("SELECT 1 FROM task WHERE id = ?", (post["about"],)):
        inbox.add_note(told.caller, post["about"], told.text)
    else:
        return _typed(tx, told)
    return After(jobs=[("nod", told)])


NUMBERED = re.compile(r"\s*(\d{1,2})\s*[:.)]\s*(.+)", re.DOTALL)


def _subject_replied(told: Told, told_of: list[dict]) -> tuple[str | None, str]:
    asked = [notice["subject"] for notice in told_of]
    open_ones = [subject for subject in asked if subject and notices.is_open(subject)]
    if not any(asked):
        return None, told.text
    if len(asked) == 1:
        return asked[0], told.text
    numbered = NUMBERED.fullmatch(told.text)
    if numbered and 1 <= int(numbered[1]) <= len(asked):
        return asked[int(numbered[1]) - 1], numbered[2]
    if len(open_ones) == 1:
        return open_ones[0], told.text
    raise Invalid("Which of them? Begin your reply with its number, as in “2: use JWT”.")


def _answer(told: Told, subject: str, words: str) -> None:
    """Words as the answer to what waits. Raises Refused."""
    what, _, ref = subject.partition(":")
    if what == "intervention":
        inbox.answer(told.caller, ref, words)
    elif what == "plan":
        task, _, version = ref.rpartition("-")
        inbox.revise(told.caller, task, words, int(version))
    elif what == "permission":
        _answer_permission(told, permissions.get(told.caller, ref), words)
    else:
        raise Conflict("There is nothing to answer in this message.")


def _answer_permission(told: Told, asked: dict, words: str) -> None:
    if asked["asks"] != "question":
        permissions.decide(told.caller, asked["id"], "deny", reason=words)
        return
    questions = permissions.questions_of(loads(asked["input"]))
    answers = [words] if len(questions) == 1 else [w for w in words.split("\n") if w.strip()]
    permissions.decide(told.caller, asked["id"], "allow", answers=answers)


def _typed(tx: Transaction, told: Told) -> After:
    """Text for the session that is looked at: in a group only as a reply to its screen."""
    if told.chat is None:
        return After()
    focus = chats.focus_of(told.chat["id"], told.thread)
    on_screen = bool(focus) and told.reply_to == focus["message_id"]
    if not told.private and not on_screen:
        return After()
    if told.reply_to and not on_screen:
        hint = "That message asks for nothing now, so this went nowhere. Write it without replying."
        answer(tx, told, say.said(hint))
        return After()
    if not focus:
        hint = "No session is focused, so this was typed nowhere: /sessions, then /focus NUMBER."
        answer(tx, told, say.said(hint))
        return After()
    age = time.time() - told.date
    if age > LATE_S:
        raise Conflict(
            f"This was written {round(age / 60)} min ago and arrives only now: it was not typed. "
            "Look at the screen and send it again."
        )
    auth.require(told.caller, "session.type", _project_of(focus["session_id"]), "session")
    return After(jobs=[("type", told, focus["session_id"], told.text)])


def _project_of(session_id: str) -> str | None:
    found = one("SELECT project_id FROM session WHERE id = ?", (session_id,))
    return found["project_id"] if found else None


# ── taps ──────────────────────────────────────────────────────────────────────────────────────


def _tapped(tx: Transaction, told: Told) -> After:
    if told.caller is None:
        return _stranger(tx, told)
    if told.chat is None:
        raise Conflict("This group hears of no project any more: its buttons do nothing.")
    verb, _, ref = told.text.partition(":")
    handler = TAPS.get(verb) or next(
        (act for form, act in CHOICES if re.fullmatch(form, verb)), None
    )
    if handler is None:
        raise NotFound("This button is of another time: it does nothing any more.")
    result = handler(tx, told, verb, ref)
    return result if isinstance(result, After) else After(told.tap, str(result or ""))


def _decide(decision: str, scope: str = "once", done: str = "Allowed."):
    def act(_tx, told: Told, _verb: str, ref: str) -> str:
        permissions.decide(told.caller, ref, decision, scope=scope)
        return done

    return act


def _open_always(tx: Transaction, told: Told, verb: str, ref: str) -> None:
    """Show what `always` would allow before it does."""
    post = notices.post_at(told.bot, told.place, told.message_id)
    asked = permissions.get(told.caller, ref)
    if asked["status"] != "pending":
        raise Conflict(
            f"This was {asked['status']} already, {asked['answered_where'] or 'elsewhere'}: your "
            "tap changes nothing."
        )
    if post:
        notices.redo(tx, post["seq"], opened=asked["id"] if verb == "pw" else None)


def _choose(_tx, told: Told, verb: str, ref: str) -> str:
    """One of the choices of a coding agent's question."""
    asked = permissions.get(told.caller, ref)
    questions = permissions.questions_of(loads(asked["input"]))
    options = questions[0]["options"] if questions else []
    label = options[int(verb[1:])]["label"] if int(verb[1:]) < len(options) else ""
    permissions.decide(told.caller, ref, "allow", answers=[label])
    return f"Answered: {cut(label, 100)}"


def _quick(_tx, told: Told, verb: str, ref: str) -> str:
    asked = inbox.get_intervention(told.caller, ref)
    choices = say.quick_answers(asked)
    if int(verb[1:]) >= len(choices):
        raise NotFound("This button is of another time: it does nothing any more.")
    inbox.answer(told.caller, ref, choices[int(verb[1:])])
    return f"Answered: {cut(choices[int(verb[1:])], 100)}"


WANTS = {
    "ir": ("intervention", "Your answer", "Reply to this with your answer."),
    "lr": ("plan", "What should be different?", "Reply to this with what should be different."),
    "pr": ("permission", "Your answer", "Reply to this in your own words; one line a question."),
}


def _ask_words(tx: Transaction, told: Told, verb: str, ref: str) -> str:
    """Ask for words: what is replied to that is the answer."""
    what, holder, sentence = WANTS[verb]
    subject = f"{what}:{ref}"
    if not notices.is_open(subject):
        raise Conflict("This was answered already: there is nothing to say any more.")
    chat = told.chat
    seq = notices.say(
        tx,
        chat,
        "ask",
        say.said(sentence, force=holder),
        thread=told.thread or None,
        reply_to=told.message_id,
    )
    execute("UPDATE post SET opened = ? WHERE seq = ?", (subject, seq))
    return ""


def _approve(_tx, told: Told, _verb: str, ref: str) -> str:
    task, _, version = ref.rpartition("-")
    inbox.approve(told.caller, task, None, int(version))
    return "Approved."


def _dismiss(_tx, told: Told, _verb: str, ref: str) -> str:
    alerts.dismiss(told.caller, ref)
    return "Dismissed."


def _tap_focus(tx: Transaction, told: Told, _verb: str, ref: str) -> After:
    return _look_at(tx, told, sessions.get_session(told.caller, ref))


def _tap_task(tx: Transaction, told: Told, verb: str, ref: str) -> str:
    if verb == "ta":
        tasks.assign(told.caller, ref)
    elif verb == "tr":
        tasks.retry(told.caller, ref)
    elif verb == "ty":
        tasks.cancel(told.caller, ref)
    row = auth.find("task", told.caller, ref)
    if verb == "tc":
        sure = [[say.button("Yes, cancel it", f"ty:{ref}")]]
        asked = say.said("Cancel ", b(cut(row["title"], 200)), "?", buttons=sure)
        answer(tx, told, asked)
        return ""
    answer(tx, told, say.task_view(row, told.caller))
    return {"ta": "Assigned.", "tr": "Tried again.", "ty": "Cancelled."}.get(verb, "")


def _whole(_tx, told: Told, verb: str, ref: str) -> After:
    """What was too long for a message, as a file."""
    if verb == "wp":
        name, text = "request.txt", permissions.get(told.caller, ref)["subject"]
    elif verb == "wi":
        name, text = "question.txt", inbox.get_intervention(told.caller, ref)["question"]
    else:
        task, _, version = ref.rpartition("-")
        plans = {str(p["version"]): p["plan"] for p in inbox.plans(told.caller, task)}
        value = plans.get(version)
        plain = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        name, text = "plan.md", plain
    return After(told.tap, "", jobs=[("file", told, name, text)])


def _key(_tx, told: Told, verb: str, ref: str) -> After:
    session = sessions.get_session(told.caller, ref)
    auth.require(told.caller, "session.type", session["project_id"], "session")
    return After(told.tap, "", jobs=[("key", told, session["id"], KEYS[verb[1:]])])


def _tap_unfocus(tx: Transaction, told: Told, _verb: str, _ref: str) -> After:
    return _unfocus(tx, told, "")


TAPS = {
    "pa": _decide("allow"),
    "ps": _decide("allow", "session", "Allowed for the session."),
    "py": _decide("allow", "always", "Allowed always."),
    "pd": _decide("deny", done="Denied."),
    "pw": _open_always,
    "pb": _open_always,
    "pr": _ask_words,
    "ir": _ask_words,
    "lr": _ask_words,
    "la": _approve,
    "ad": _dismiss,
    "f": _tap_focus,
    "fu": _tap_unfocus,
    **dict.fromkeys(("t", "ta", "tr", "tc", "ty"), _tap_task),
    **dict.fromkeys(("wp", "wi", "wl"), _whole),
    **dict.fromkeys((f"k{letter}" for letter in KEYS), _key),
}
CHOICES = ((r"p\d{1,2}", _choose), (r"i\d{1,2}", _quick))
