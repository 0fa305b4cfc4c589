"""The bots: each polls for what people say, and carries what is to be told them.

Telegram may be slow, away, or tell us to wait: nothing of the hub waits for it. What people said
is handled once (telegram_acts), what they are told is kept (notices) and carried from there, at the
pace that Telegram allows.
"""

import json
import logging
import re
import threading
import time
from base64 import b64encode
from collections import deque
from html import unescape

import requests
import telebot
from telebot import apihelper, types

import auth
import chats
import notices
import sessions
import telegram_acts as acts
import telegram_words as words
from models import Busy, Refused, bus, one, transaction

log = logging.getLogger("orchestratia.telegram")

LONG_POLL_S = 25  # how long Telegram holds a question for updates
CONNECT_S, READ_S = 5, 15  # how long an answer may take
CALLS_AT_ONCE = 8
BACKOFF_S = (0.5, 60.0)  # how long to leave Telegram alone: at first, and at most
HEARD = ("message", "callback_query", "my_chat_member")
SCREEN_AT_BOTTOM = 8  # messages after which a screen that is out of sight moves down
STOP_S = 2.0  # how long a hub that stops waits for what makes notices
SETTLE_S = 3.0  # how long an answer waits for the message it answers to be known
LOOK_S = 5.0  # how often tokens and clocks are looked at, when nothing calls
NAME_MOST = (
    128  # characters of a topic's name (https://core.telegram.org/bots/api#createforumtopic)
)
TROUBLE_AFTER = 3  # failures in a row after which the settings page speaks of them

# The token is part of every address: a library that logs one must not.
telebot.logger.handlers.clear()
for name in ("TeleBot", "urllib3"):
    logging.getLogger(name).setLevel(logging.WARNING)


# ── calls ─────────────────────────────────────────────────────────────────────────────────────


class Away(Exception):
    """Telegram did not answer, or not sensibly; whether the call was carried out is not known."""


class Answered(Exception):
    """Telegram answered that it does not do it."""

    def __init__(self, code: int, why: str, parameters: dict):
        super().__init__(f"{code} {why}")
        self.code, self.why = code, why
        self.retry_after = float(parameters.get("retry_after") or 0)
        self.moved_to = parameters.get("migrate_to_chat_id")

    def says(self, *parts: str) -> bool:
        return any(part in self.why.lower() for part in parts)


def use_api(url: str) -> None:
    """Where the Bot API is. The library keeps that, and the rest of this, for the whole process."""
    apihelper.API_URL = url.rstrip("/") + "/bot{0}/{1}"
    apihelper.CONNECT_TIMEOUT, apihelper.READ_TIMEOUT = CONNECT_S, READ_S
    apihelper.CUSTOM_REQUEST_SENDER = _Sender()


class _Sender:
    """Sends a call with its parameters in the body: an address has a limit, and is logged."""

    def __init__(self):
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=4 * CALLS_AT_ONCE)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def __call__(self, _method, url, params=None, files=None, timeout=None, proxies=None):
        return self._session.post(url, data=params, files=files, timeout=timeout, proxies=proxies)


def call(function, token: str, *args, **kwargs):
    """The result of one of apihelper's functions. Raises Away, Answered."""
    try:
        return function(token, *args, **kwargs)
    except apihelper.ApiTelegramException as refused:
        parameters = refused.result_json.get("parameters")
        if not 400 <= refused.error_code < 500:
            raise Away(f"it answered {refused.error_code}") from None
        raise Answered(
            refused.error_code,
            str(refused.description),
            parameters if isinstance(parameters, dict) else {},
        ) from None
    except Exception as broken:  # whatever a proxy or a half answer leads to
        raise Away(type(broken).__name__) from None


# ── the pace ──────────────────────────────────────────────────────────────────────────────────


class Bucket:
    """So many at once, and then so many a second."""

    def __init__(self, size: float, per_second: float, now: float):
        self.size, self.rate = size, per_second
        self._left, self._at = size, now

    def _fill(self, now: float) -> float:
        self._left = min(self.size, self._left + (now - self._at) * self.rate)
        self._at = now
        return self._left

    def wait(self, now: float, keep: float = 0.0) -> float:
        """Seconds until one may be taken and `keep` are left; 0 when it may be now."""
        return max(0.0, (1 + keep - self._fill(now)) / self.rate)

    def take(self, now: float) -> None:
        self._left = self._fill(now) - 1

    @property
    def is_full(self) -> bool:
        return self._left >= self.size


class Pace:
    """When a message may go out. By https://core.telegram.org/bots/faq#broadcasting-to-users: not
    more than one a second in a chat, beyond short bursts; 20 a minute in a group; about 30 a second
    in all. Screens leave some of it for what people wait for."""

    ALL = (8.0, 20.0)  # in any second at most 28
    CHAT = (3.0, 0.95)
    GROUP = (3.0, 0.28)  # in any minute at most 19.8
    SCREENS_LEAVE, SCREENS_LEAVE_ALL = 1.0, 4.0

    def __init__(self):
        self._lock = threading.Lock()
        self._all = Bucket(*self.ALL, time.monotonic())
        self._chats: dict[int, Bucket] = {}
        self._held: dict[int | None, float] = {}

    def wait(self, place: int, now: float, screen: bool = False) -> float:
        with self._lock:
            held = max(self._held.get(place, 0.0), self._held.get(None, 0.0)) - now
            chat = self._bucket(place, now).wait(now, self.SCREENS_LEAVE if screen else 0.0)
            whole = self._all.wait(now, self.SCREENS_LEAVE_ALL if screen else 0.0)
            return max(held, chat, whole, 0.0)

    def take(self, place: int, now: float) -> None:
        with self._lock:
            self._bucket(place, now).take(now)
            self._all.take(now)

    def hold(self, place: int | None, seconds: float) -> None:
        """Leave a chat (None: all of them) alone for a while. When Telegram holds a second chat
        too, it means the bot."""
        now = time.monotonic()
        with self._lock:
            others = [
                p for p, until in self._held.items() if p not in (None, place) and until > now
            ]
            for whose in (place, None) if others else (place,):
                self._held[whose] = max(self._held.get(whose, 0.0), now + seconds)

    def _bucket(self, place: int, now: float) -> Bucket:
        if place not in self._chats:
            if len(self._chats) > 1000:
                self._chats = {p: kept for p, kept in self._chats.items() if not kept.is_full}
                self._held = {p: until for p, until in self._held.items() if until > now}
            self._chats[place] = Bucket(*(self.GROUP if place < 0 else self.CHAT), now)
        return self._chats[place]


class Backoff:
    """How long to wait after failures in a row."""

    def __init__(self):
        self.failures = 0

    def failed(self) -> float:
        self.failures += 1
        first, most = BACKOFF_S
        return min(most, first * 2 ** min(self.failures - 1, 20))

    def worked(self) -> None:
        self.failures = 0


# ── screens ───────────────────────────────────────────────────────────────────────────────────


class Look:
    """A session that is looked at in a chat: a reader of the bus, marked when it has changed."""

    def __init__(self, focus: dict, wake):
        self.focus = focus
        self.session_id = focus["session_id"]
        self.topics = (f"session:{self.session_id}", "events")
        self.changed = True
        self.shown = None  # what stands in its message
        self._wake = wake
        bus.add(self)

    def put(self, message) -> bool:
        named = message.get("session_id") if isinstance(message, dict) else None
        named = getattr(message, "session_id", named)
        if named in (None, self.session_id) and not self._foreign(message):
            self.changed = True
            self._wake()
        return True

    @staticmethod
    def _foreign(message) -> bool:
        """An event that is about no session, such as those of tasks."""
        return isinstance(message, dict) and "type" in message and not message.get("session_id")

    def close(self) -> None:
        bus.drop(self)


# ── a bot ─────────────────────────────────────────────────────────────────────────────────────


class Bot:
    """One bot: a thread that polls, one that carries, and a few that wait for Telegram."""

    def __init__(self, token: str):
        self.token = token
        self.id = chats.bot_id(token)
        self._stop = threading.Event()
        self._pace = Pace()
        self._backoff = Backoff()
        self._busy: set[int] = set()
        self._lock = threading.Lock()
        self._lanes: dict[int, deque] = {}
        self._looks: dict[tuple, Look] = {}
        self._newest: dict[int, int] = {}
        self._news = bus.subscribe(f"posts:{self.id}", "telegram", limit=100)
        self._threads = [self._begin(self._poll), self._begin(self._carry)]

    def _begin(self, work, *args) -> threading.Thread:
        """Have something done beside: a hub that stops does not wait for Telegram."""
        thread = threading.Thread(target=work, args=args, name=f"bot {self.id}", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._stop.set()
        self._news.close()
        for look in list(self._looks.values()):
            look.close()

    def join(self, patience_s: float) -> None:
        """Wait for a bot that was stopped to end; a long poll may take its time."""
        for thread in self._threads:
            thread.join(patience_s)

    def _call(self, function, *args, **kwargs):
        return call(function, self.token, *args, **kwargs)

    # ── what people say ───────────────────────────────────────────────────────────────────────

    def _poll(self) -> None:
        backoff, introduced = Backoff(), False
        while not self._stop.is_set():
            try:
                introduced = introduced or self._introduce()
                updates = self._updates()
            except Away as away:
                self._trouble(backoff, f"Telegram cannot be reached ({away}).")
                self._stop.wait(backoff.failed())
            except Answered as refused:
                self._trouble(backoff, _why_not_polled(refused), at_once=True)
                self._stop.wait(max(refused.retry_after, backoff.failed()))
            except Exception:
                if not self._stop.is_set():
                    log.exception("bot %s could not poll", self.id)
                    self._stop.wait(backoff.failed())
            else:
                self._fine(backoff)
                self._handle(updates)

    def _introduce(self) -> bool:
        """Learn the bot's name, and have its commands complete."""
        me = self._call(apihelper.get_me)
        if not isinstance(me, dict):
            raise Away("a malformed answer")
        chats.note_bot(self.id, username=str(me.get("username") or self.id), trouble=None)
        commands = [types.BotCommand(name, text) for name, (_, text) in acts.COMMANDS.items()]
        self._call(apihelper.set_my_commands, commands)
        return True

    def _updates(self) -> list[dict]:
        """What was said since, in the order of its ids."""
        found = self._call(
            apihelper.get_updates,
            offset=chats.bot_row(self.id)["position"],
            allowed_updates=HEARD,
            long_polling_timeout=LONG_POLL_S,
        )
        if not isinstance(found, list):
            raise Away("a malformed answer")
        sound = [u for u in found if isinstance(u, dict) and isinstance(u.get("update_id"), int)]
        return sorted(sound, key=lambda update: update["update_id"])

    def _handle(self, updates: list[dict]) -> None:
        for update in updates:
            self._note_newest(update)
            self._let_settle(update)
            while not self._stop.is_set():
                try:
                    self._follow_up(acts.take(self.id, update))
                    break
                except Busy:
                    self._stop.wait(1)
                except Exception:
                    log.exception("an update of bot %s is left", self.id)
                    break
        if updates and not self._stop.is_set():
            chats.note_bot(self.id, position=updates[-1]["update_id"] + 1)

    def _let_settle(self, update: dict) -> None:
        """What is said to a message just sent comes, now and then, before we know its number."""
        message = (update.get("callback_query") or update).get("message")
        if not isinstance(message, dict) or not isinstance(message.get("chat"), dict):
            return
        if "callback_query" not in update and "reply_to_message" not in message:
            return
        deadline = time.monotonic() + SETTLE_S
        while message["chat"].get("id") in self._busy and time.monotonic() < deadline:
            self._stop.wait(0.01)

    def _note_newest(self, update: dict) -> None:
        message = update.get("message")
        if isinstance(message, dict) and isinstance(message.get("chat"), dict):
            self._newest[message["chat"].get("id")] = message.get("message_id") or 0

    def _trouble(self, backoff: Backoff, sentence: str, at_once: bool = False) -> None:
        if backoff.failures + 1 == (1 if at_once else TROUBLE_AFTER):
            log.warning("bot %s: %s", self.id, sentence)
            chats.note_bot(self.id, trouble=sentence)

    def _fine(self, backoff: Backoff) -> None:
        if backoff.failures:
            log.info("bot %s: Telegram answers again", self.id)
            chats.note_bot(self.id, trouble=None)
        backoff.worked()

    # ── what follows from it ──────────────────────────────────────────────────────────────────

    def _follow_up(self, after: acts.After) -> None:
        if not after.jobs:
            if after.tap:
                self._begin(self._answer_tap, after)
            return
        place = next(job[1].place for job in after.jobs)
        with self._lock:
            lane = self._lanes.setdefault(place, deque())
            lane.append(after)
            if len(lane) > 1:
                return  # somebody is at it
        self._begin(self._run_lane, place)

    def _run_lane(self, place: int) -> None:
        """What was asked for in a chat, one after the other, as it was asked."""
        while True:
            with self._lock:
                after = self._lanes[place][0]
            self._do(after)
            with self._lock:
                self._lanes[place].popleft()
                if not self._lanes[place]:
                    del self._lanes[place]
                    return

    def _do(self, after: acts.After) -> None:
        for name, told, *rest in after.jobs:
            try:
                JOBS[name](self, told, *rest)
            except Refused as refused:
                self._say_no(after, told, str(refused))
                break
            except (Away, Answered) as failed:
                log.info("bot %s: %s was not done: %s", self.id, name, failed)
            except Exception:
                if not self._stop.is_set():
                    log.exception("bot %s: %s failed", self.id, name)
        if after.tap:
            self._answer_tap(after)

    def _say_no(self, after: acts.After, told: acts.Told, sentence: str) -> None:
        if after.tap:
            after.answer, after.alarm = sentence[: acts.ALERT_MOST], True
            return
        with transaction() as tx:
            acts.answer(tx, told, words.said(f"⚠️ {sentence}"))

    def _answer_tap(self, after: acts.After) -> None:
        try:
            self._call(
                apihelper.answer_callback_query,
                after.tap,
                text=after.answer[: acts.ALERT_MOST] or None,
                show_alert=after.alarm,
            )
        except (Away, Answered) as failed:
            log.info("bot %s: a tap was not answered: %s", self.id, failed)

    def _job_type(self, told: acts.Told, session_id: str, text: str) -> None:
        sessions.type_text(told.caller, session_id, text)
        self._job_nod(told)

    def _job_key(self, told: acts.Told, session_id: str, key: bytes) -> None:
        sessions.type_raw(told.caller, session_id, b64encode(key).decode())

    def _job_nod(self, told: acts.Told) -> None:
        """Show that what they wrote has arrived, without another message."""
        nod = [types.ReactionTypeEmoji("👌")]
        self._call(apihelper.set_message_reaction, told.place, told.message_id, reaction=nod)

    def _job_still(self, told: acts.Told, message_id: int) -> None:
        self._call(apihelper.edit_message_reply_markup, chat_id=told.place, message_id=message_id)

    def _job_file(self, told: acts.Told, name: str, text: str) -> None:
        self._pace.take(told.place, time.monotonic())
        self._call(
            apihelper.send_data,
            told.place,
            (name, text.encode()),
            "document",
            message_thread_id=told.thread or None,
        )

    # ── what is told ──────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        bus.publish(f"posts:{self.id}", "look")

    def _carry(self) -> None:
        again = True
        while not self._stop.is_set():
            try:
                if again:
                    self._see_foci()
                wait = self._hand_out()
            except Exception:
                if self._stop.is_set():
                    return
                log.exception("bot %s could not carry", self.id)
                wait = LOOK_S
            again = self._await(wait)

    def _await(self, wait: float) -> bool:
        """Wait for news; whether what is looked at may be another now."""
        message = self._news.get(min(wait, LOOK_S))
        again = message in (None, "chats")
        while message is not None and not self._news.closed:
            again = again or message == "chats"
            message = self._news.get(0)
        return again

    def _hand_out(self) -> float:
        """Have everything carried that may be now; seconds until there may be more."""
        wait = LOOK_S
        for post in notices.waiting_posts(self.id):
            wait = min(wait, self._try(post["chat_id"], self._send, post))
        for look in list(self._looks.values()):
            if look.changed:
                place = look.focus["place"]
                wait = min(wait, self._try(place, self._show, look, screen=True))
        return wait

    def _try(self, place: int, work, item, screen: bool = False) -> float:
        """Have a chat's next message carried, one at a time; seconds until that may be."""
        now = time.monotonic()
        if place in self._busy or len(self._busy) >= CALLS_AT_ONCE:
            return LOOK_S  # whoever is at it wakes us
        wait = self._pace.wait(place, now, screen)
        if wait > 0:
            return wait
        self._busy.add(place)
        self._begin(self._carried, place, work, item)
        return LOOK_S

    def _carried(self, place: int, work, item) -> None:
        try:
            work(item)
            self._backoff.worked()
        except Away as away:
            wait = self._backoff.failed()
            self._pace.hold(None, wait)
            log.info("bot %s: %s; trying again in %.1f s", self.id, away, wait)
        except Exception:
            if not self._stop.is_set():
                log.exception("bot %s: a message was not carried", self.id)
                self._pace.hold(place, LOOK_S)
        finally:
            self._busy.discard(place)
            self.wake()

    def _send(self, post: dict) -> None:
        """Make a post stand in its chat as it should. Raises Away."""
        try:
            if post["state"] == "gone":
                return self._delete(post)
            if post["state"] == "void":
                return notices.sent(post, state="dropped")
            body = words.of_post(post)
            if not body:
                return notices.sent(post, state="dropped")
            self._pace.take(post["chat_id"], time.monotonic())
            if post["message_id"]:
                self._edit(post["chat_id"], post["message_id"], body)
                return notices.sent(post)
            thread = post["thread_id"] or self._topic(post)
            message = self._write(
                post["chat_id"], body, thread, post["reply_to"], bool(post["silent"])
            )
            notices.sent(post, message)
        except Answered as refused:
            self._refused(post, refused)

    def _delete(self, post: dict) -> None:
        if post["message_id"]:
            self._pace.take(post["chat_id"], time.monotonic())
            self._call(apihelper.delete_message, post["chat_id"], post["message_id"])
        notices.sent(post, state="dropped")

    def _write(
        self, place: int, body: dict, thread: int | None, reply_to: int | None, silent: bool
    ) -> int:
        """Send a message; its number."""
        reply = reply_to and types.ReplyParameters(reply_to, allow_sending_without_reply=True)
        options = {
            "message_thread_id": thread,
            "reply_parameters": reply or None,
            "disable_notification": silent or None,
        }
        sent = self._written(body, apihelper.send_message, place, **options)
        if not isinstance(sent, dict) or not isinstance(sent.get("message_id"), int):
            raise Away("a malformed answer")
        self._newest[place] = sent["message_id"]
        return sent["message_id"]

    def _edit(self, place: int, message_id: int, body: dict) -> None:
        try:
            self._written(
                body,
                lambda token, text, **options: apihelper.edit_message_text(
                    token, text, chat_id=place, message_id=message_id, **options
                ),
            )
        except Answered as refused:
            if not refused.says("message is not modified"):
                raise

    def _written(self, body: dict, function, *where, **options):
        """Call with the text of a body; what Telegram cannot read is sent without its styles."""
        options |= {
            "parse_mode": "HTML",
            "reply_markup": markup(body),
            "link_preview_options": types.LinkPreviewOptions(is_disabled=True),
        }
        try:
            return self._call(function, *where, body["html"], **options)
        except Answered as refused:
            if not refused.says("can't parse entities", "button"):
                raise
            log.error("bot %s: Telegram cannot read a message: %s", self.id, refused)
            options |= {"parse_mode": None, "reply_markup": None}
            return self._call(function, *where, plain(body["html"]), **options)

    def _topic(self, post: dict) -> int | None:
        """The thread of a forum in which a post belongs, made when there is none."""
        chat = post["chat"] and post["about"] and chats.chat(post["chat"])
        if not chat or not chat["forum"]:
            return None
        known = chats.topic(chat["id"], post["about"])
        if known:
            return known
        try:
            made = self._call(
                apihelper.create_forum_topic, chat["chat_id"], _topic_name(post["about"])
            )
        except Answered as refused:
            if refused.code == 429:
                raise
            log.warning("bot %s: no topics in %r: %s", self.id, chat["title"], refused)
            chats.change_chat(chat["id"], forum=0)
            return None
        chats.keep_topic(chat["id"], post["about"], made["message_thread_id"])
        return made["message_thread_id"]

    def _refused(self, post: dict, refused: Answered) -> None:
        """Telegram does not do it: wait, give the chat up, or the message."""
        place = post["chat_id"]
        if refused.code == 429:
            self._pace.hold(place, refused.retry_after or BACKOFF_S[0])
        elif refused.code == 401:
            raise Away("Telegram does not know the token")
        elif refused.moved_to:
            chats.moved(self.id, place, int(refused.moved_to))
        elif refused.says("thread not found", "topic_") and post["about"]:
            chats.keep_topic(post["chat"], post["about"], None)
        elif refused.code == 403 or refused.says("chat not found"):
            self._give_up(post, refused.why)
        else:
            if not refused.says("message to", "message can't"):
                log.error("bot %s: a message was refused: %s", self.id, refused)
            notices.sent(post, state="dropped", why=refused.why)

    def _give_up(self, post: dict, why: str) -> None:
        """A chat that takes nothing keeps what is for it until it takes something again."""
        if post["chat"]:
            chats.change_chat(post["chat"], refused=why)
        else:
            notices.sent(post, state="dropped", why=why)

    # ── screens ───────────────────────────────────────────────────────────────────────────────

    def _see_foci(self) -> None:
        """Look at what is focused now, and at nothing else."""
        found = {(f["chat"], f["thread_id"]): f for f in chats.foci(self.id)}
        for key, look in list(self._looks.items()):
            if key not in found or found[key]["session_id"] != look.session_id:
                look.close()
                del self._looks[key]
        for key, focus in found.items():
            if key not in self._looks:
                self._looks[key] = Look(focus, self.wake)

    def _show(self, look: Look) -> None:
        """Have a focus show its session as it is. Raises Away."""
        look.changed = False
        focus, session, caller = look.focus, self._session(look), self._viewer(look)
        if not caller or not session:
            chats.end_focus(focus["chat"], focus["thread_id"])
            return
        may_type = auth.can(caller, "session.type", session["project_id"])
        screen = sessions.screens.get(session["id"])
        if screen is None and focus["message_id"] and session["state"] == "active":
            return  # after a restart: what stands there is newer than nothing
        body = words.screen(session, (screen or {}).get("lines") or [], may_type)
        if body == look.shown:
            return
        self._pace.take(focus["place"], time.monotonic())
        try:
            self._show_body(look, body)
        except Answered as refused:
            self._screen_refused(look, refused)
        except Away:
            look.changed = True
            raise
        else:
            look.shown = body
            if session["state"] in ("closed", "failed"):
                chats.end_focus(focus["chat"], focus["thread_id"])

    def _session(self, look: Look) -> dict | None:
        return one(
            "SELECT s.*, v.name AS server_name FROM session s JOIN server v ON v.id = s.server_id"
            " WHERE s.id = ?",
            (look.session_id,),
        )

    def _viewer(self, look: Look) -> auth.Caller | None:
        caller, session = chats.viewer(look.focus, self.id), self._session(look)
        allowed = caller and session and auth.can(caller, "session.watch", session["project_id"])
        return caller if allowed else None

    def _show_body(self, look: Look, body: dict) -> None:
        focus, place = look.focus, look.focus["place"]
        above = self._newest.get(place, 0) - (focus["message_id"] or 0)
        if focus["message_id"] and above < SCREEN_AT_BOTTOM:
            return self._edit(place, focus["message_id"], body)
        before = focus["message_id"]
        focus["message_id"] = self._write(place, body, focus["thread_id"] or None, None, True)
        if not chats.shown_in(focus, focus["message_id"]):
            look.changed = True
        if before:
            self._call(apihelper.delete_message, place, before)

    def _screen_refused(self, look: Look, refused: Answered) -> None:
        focus = look.focus
        if refused.code == 429:
            self._pace.hold(focus["place"], refused.retry_after or BACKOFF_S[0])
            look.changed = True
        elif refused.says("message to edit", "message can't be edited"):
            focus["message_id"], look.changed = None, True  # it was deleted: send it anew
        elif refused.code == 403 or refused.says("chat not found"):
            chats.change_chat(focus["chat"], refused=refused.why)
        else:
            log.error("bot %s: a screen was refused: %s", self.id, refused)


JOBS = {
    "type": Bot._job_type,
    "key": Bot._job_key,
    "nod": Bot._job_nod,
    "still": Bot._job_still,
    "file": Bot._job_file,
}


def _why_not_polled(refused: Answered) -> str:
    if refused.code == 409 and refused.says("webhook"):
        return "A webhook is set for this bot: remove it, or use another bot for this hub."
    if refused.code == 409:
        return "Another program polls this bot: one token serves one hub. Stop that program."
    if refused.code in (401, 404):
        return "Telegram does not know this token: it was revoked or mistyped. Set a new one."
    return f"Telegram refuses to be polled ({refused})."


def _topic_name(about: str) -> str:
    task = one("SELECT title AS name FROM task WHERE id = ?", (about,))
    named = task or one("SELECT name FROM session WHERE id = ?", (about,))
    return words.cut(words.clean(named["name"] if named else about).strip() or "?", NAME_MOST)


def markup(body: dict) -> str | None:
    """A body's buttons as Telegram takes them."""
    if body.get("force"):
        asked = {"force_reply": True, "input_field_placeholder": body["force"], "selective": True}
        return json.dumps(asked)
    if not body.get("buttons"):
        return None
    keyboard = [
        [
            {
                "text": b["text"],
                **({"url": b["url"]} if "url" in b else {"callback_data": b["data"]}),
            }
            for b in row
        ]
        for row in body["buttons"]
    ]
    return json.dumps({"inline_keyboard": keyboard}, ensure_ascii=False)


def plain(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


# ── all of them ───────────────────────────────────────────────────────────────────────────────


class Bots:
    """Every bot there is, and the thread that turns events into what they carry."""

    def __init__(self):
        self._bots: dict[str, Bot] = {}
        self._stop = threading.Event()
        self._news = self._thread = None

    def start(self) -> None:
        self._stop.clear()
        self._news = bus.subscribe("events", "telegram")
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 0.0) -> None:
        """Stop them all; wait for their polls for so long at most."""
        self._stop.set()
        if self._thread:
            self._news.close()
            self._thread.join(STOP_S)  # it may be making a bot just now
        stopped = list(self._bots.values())
        self._bots.clear()
        for bot in stopped:
            bot.stop()
        for bot in stopped if patience_s else ():
            bot.join(patience_s)

    def _run(self) -> None:
        wait, look = 0.0, True
        while not self._stop.is_set():
            try:
                if look:
                    self._see_tokens()
                wait = self._tell() if self._bots else LOOK_S
            except Busy:
                wait = 1.0
            except Exception:
                if self._stop.is_set():
                    return
                log.exception("notices were not made")
                wait = LOOK_S
            look = self._await(wait)

    def _await(self, wait: float) -> bool:
        """Wait for something to happen; whether bots may have come or gone."""
        message = self._news.get(min(max(wait, 0.0), LOOK_S))
        look = not isinstance(message, dict)
        while message is not None and not self._news.closed:
            look = look or not isinstance(message, dict)
            message = self._news.get(0)
        return look

    def _tell(self) -> float:
        """Everything that is to be told now; seconds until there is more."""
        while notices.take_events():
            pass
        now = time.time()
        notices.send_due(now)
        notices.remind(now)
        due = notices.next_due()
        return LOOK_S if due is None else due - time.time()

    def _see_tokens(self) -> None:
        wanted = chats.bots()
        for bot_id, bot in list(self._bots.items()):
            if wanted.get(bot_id) != bot.token:
                bot.stop()
                del self._bots[bot_id]
        for bot_id, token in wanted.items():
            if bot_id not in self._bots:
                self._bots[bot_id] = Bot(token)


bots = Bots()
