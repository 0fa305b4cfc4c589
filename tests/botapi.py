"""A Bot API server of ours: real HTTP, with Telegram's shapes, limits and errors, for the bots of
the hub; and the people who write to them.

What it enforces is listed in RULES, which docs/telegram.md repeats. Sources: the Bot API's own
documentation (https://core.telegram.org/bots/api, https://core.telegram.org/bots/faq) and the
sentences its servers answer with.
"""

import itertools
import json
import re
import socket
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from email import policy
from email.parser import BytesParser
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TEXT_MOST, CAPTION_MOST, DATA_MOST, BUTTONS_MOST = 4096, 1024, 64, 100
ALERT_MOST, TOPIC_MOST, FILE_MOST, ENTITIES_MOST = 200, 128, 50_000_000, 100
PER_SECOND, PER_CHAT, CHAT_BURST, PER_MINUTE_IN_GROUP = 30, 1.0, 5, 20
TAGS = {
    **dict.fromkeys(("b", "strong"), "bold"),
    **dict.fromkeys(("i", "em"), "italic"),
    **dict.fromkeys(("u", "ins"), "underline"),
    **dict.fromkeys(("s", "strike", "del"), "strikethrough"),
    "tg-spoiler": "spoiler",
    "span": "spoiler",
    "a": "text_link",
    "code": "code",
    "pre": "pre",
    "blockquote": "blockquote",
}
RULES = (
    ("a text has 1 to 4,096 UTF-16 units after its markup is read", "message is too long"),
    ("a text is not empty", "message text is empty"),
    ("markup is HTML of Telegram's elements, closed in order, escaped", "can't parse entities"),
    ("a caption has at most 1,024 units", "message caption is too long"),
    ("what a button says is 1 to 64 bytes", "BUTTON_DATA_INVALID"),
    ("a button has a label, and is data or an address", "can't parse inline keyboard button"),
    ("an address on a button has a host with a dot", "is invalid: Wrong HTTP URL"),
    ("a message has at most 100 buttons", "reply markup is too long"),
    ("a placeholder has at most 64 characters", "PLACEHOLDER_TOO_LONG"),
    ("an edit changes something", "message is not modified"),
    ("only a message that is there is edited", "message to edit not found"),
    ("only a message of the bot is edited", "message can't be edited"),
    ("only a message that is there is deleted", "message to delete not found"),
    ("a reply is to a message that is there", "message to be replied not found"),
    ("a topic is of that forum, and there", "message thread not found"),
    ("topics are made in forums", "the chat is not a forum"),
    ("topics are made by who may", "not enough rights to create a topic"),
    ("who has not written to the bot is not written to", "bot can't initiate conversation"),
    ("who has blocked the bot is not written to", "bot was blocked by the user"),
    ("a chat is known", "chat not found"),
    ("a tap is answered once", "query is too old"),
    ("the answer to a tap has at most 200 characters", "MESSAGE_TOO_LONG"),
    ("commands are named a-z, 0-9 and _, and described", "BOT_COMMAND_INVALID"),
    ("one program polls at a time", "terminated by other getUpdates request"),
    ("at most 30 messages a second in all", "retry after"),
    ("at most one a second in a chat, beyond bursts", "retry after"),
    ("at most 20 a minute in a group", "retry after"),
    ("the token is known", "Unauthorized"),
    ("the method is known", "Not Found"),
)


class Refusal(Exception):
    def __init__(self, code: int, description: str, **parameters):
        super().__init__(description)
        self.body = {"ok": False, "error_code": code, "description": description}
        if parameters:
            self.body["parameters"] = parameters


def bad(description: str) -> Refusal:
    return Refusal(400, f"Bad Request: {description}")


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


# ── markup ────────────────────────────────────────────────────────────────────────────────────


class _Reader(HTMLParser):
    """Telegram's HTML as (text, entities). Raises Refusal as its servers do."""

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.text, self.entities, self._open = "", [], []

    def _fail(self, why: str):
        offset = len(self.text.encode())
        raise bad(f"can't parse entities: {why} at byte offset {offset}")

    def handle_starttag(self, tag, attrs):
        if tag not in TAGS:
            self._fail(f'Unsupported start tag "{tag}"')
        given = dict(attrs)
        allowed = {"a": {"href"}, "span": {"class"}, "code": {"class"}}
        allowed["blockquote"] = {"expandable"}
        if set(given) - allowed.get(tag, set()) or (tag == "a" and not given.get("href")):
            self._fail(f'Tag "{tag}" has wrong attributes')
        self._open.append((tag, units(self.text), given))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self._fail(f'Unexpected end tag "{tag}"')
        tag, offset, given = self._open.pop()
        entity = {"type": TAGS[tag], "offset": offset, "length": units(self.text) - offset}
        if tag == "a":
            entity["url"] = given["href"]
        if entity["length"]:
            self.entities.append(entity)

    def handle_data(self, data):
        if "<" in data:
            self._fail("Unclosed start tag")
        if "&" in data:
            self._fail("Unescaped &")
        self.text += data

    def handle_entityref(self, name):
        known = {"lt": "<", "gt": ">", "amp": "&", "quot": '"'}
        if name not in known:
            self._fail(f"Unknown entity &{name};")
        self.text += known[name]

    def handle_charref(self, name):
        number = int(name[1:], 16) if name[:1] in "xX" else int(name)
        self.text += chr(number)

    def handle_comment(self, _data):
        self._fail("Unsupported start tag")

    handle_decl = handle_pi = unknown_decl = handle_comment


def read_html(html: str) -> tuple[str, list[dict]]:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    if reader._open:
        reader._fail(f'Can\'t find end tag corresponding to start tag "{reader._open[-1][0]}"')
    return reader.text, sorted(reader.entities, key=lambda e: e["offset"])[:ENTITIES_MOST]


def read_markup(given) -> dict:
    """A keyboard as it is kept. Raises Refusal."""
    if not given:
        return {}
    try:
        markup = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        raise bad("can't parse reply keyboard markup JSON object") from None
    if "force_reply" in markup and len(markup.get("input_field_placeholder") or "") > 64:
        raise bad("PLACEHOLDER_TOO_LONG")
    buttons = [button for row in markup.get("inline_keyboard", []) for button in row]
    if len(buttons) > BUTTONS_MOST:
        raise bad("reply markup is too long")
    for button in buttons:
        _check_button(button)
    return markup


def _check_button(button: dict) -> None:
    if not button.get("text") or len({"callback_data", "url"} & set(button)) != 1:
        raise bad("can't parse inline keyboard button: Text buttons are unallowed in it")
    if "callback_data" in button and not 1 <= len(button["callback_data"].encode()) <= DATA_MOST:
        raise bad("BUTTON_DATA_INVALID")
    host = urlsplit(button.get("url") or "http://a.b").hostname or ""
    if "." not in host:
        raise bad(f"inline keyboard button URL '{button['url']}' is invalid: Wrong HTTP URL")


# ── what stands in a chat ─────────────────────────────────────────────────────────────────────


class Message:
    """A message as it stands: the bot's, or a person's."""

    def __init__(self, id, sender, text, *, html="", entities=(), markup=None, topic=None, **more):
        self.id, self.sender, self.at = id, sender, time.time()
        self.topic, self.reply_to = topic, more.get("reply_to")
        self.silent, self.document = more.get("silent", False), more.get("document")
        self.deleted, self.edits, self.reactions = False, 0, []
        self.set(text, html, list(entities), markup or {})

    def set(self, text, html, entities, markup) -> None:
        self.text, self.html, self.entities, self.markup = text, html, entities, markup

    @property
    def buttons(self) -> list[list[tuple[str, str]]]:
        rows = self.markup.get("inline_keyboard", [])
        return [[(b["text"], b.get("callback_data") or b["url"]) for b in row] for row in rows]

    def __repr__(self):
        gone = " (deleted)" if self.deleted else ""
        return f"{self.sender} {self.id}{gone}: {self.text!r} {self.buttons or ''}"


class Chat:
    def __init__(self, server, id: int, title: str, kind: str, *, forum=False, bot_admin=True):
        self.server, self.id, self.title, self.kind = server, id, title, kind
        self.forum, self.bot_admin = forum, bot_admin
        self.messages: list[Message] = []
        self.topics: dict[int, str] = {}
        self.members: list = []
        self.started = self.kind != "private"
        self.blocked = False
        self._ids = itertools.count(1)

    def next_id(self) -> int:
        return next(self._ids)

    def find(self, message_id) -> Message | None:
        wanted = int(message_id or 0)
        return next((m for m in self.messages if m.id == wanted and not m.deleted), None)

    @property
    def last(self) -> Message:
        return [m for m in self.messages if m.sender == "bot" and not m.deleted][-1]

    def shown(self) -> list[str]:
        """The bot's messages as they stand."""
        return [m.text for m in self.messages if m.sender == "bot" and not m.deleted]

    def json(self) -> dict:
        if self.kind == "private":
            return {"id": self.id, "type": "private", "first_name": self.title}
        said = {"id": self.id, "type": self.kind, "title": self.title}
        return said | ({"is_forum": True} if self.forum else {})


class Tap:
    def __init__(self, server, id: str):
        self.server, self.id = server, id

    def answer(self, timeout: float = 20) -> dict:
        """What the bot answers to the tap: {text, show_alert}."""
        self.server.wait(lambda: self.id in self.server.answers, timeout)
        return self.server.answers[self.id]


class Person:
    """Somebody with a phone, and their private chat with a bot."""

    def __init__(self, server, id: int, name: str, username: str | None, bot: "_Bot"):
        self.server, self.id, self.name, self.username, self.bot = server, id, name, username, bot
        self.chat = Chat(server, id, name, "private")
        bot.chats[id] = self.chat

    def with_bot(self, username: str) -> "Person":
        """The same person, talking to another bot."""
        bot = next(b for b in self.server.bots.values() if b.username == username)
        return Person(self.server, self.id, self.name, self.username, bot)

    def json(self) -> dict:
        who = {"id": self.id, "is_bot": False, "first_name": self.name, "language_code": "en"}
        return who | ({"username": self.username} if self.username else {})

    def says(self, text: str, reply_to=None, chat: Chat | None = None, topic=None) -> Message:
        chat = chat or self.chat
        with self.server.lock:
            if chat is self.chat:
                chat.started, chat.blocked = True, False
            message = Message(chat.next_id(), self.name, text, topic=topic)
            chat.messages.append(message)
            said = self._message(message, chat) | {"text": text}
            command = re.match(r"/\w+(@\w+)?", text)
            if command:
                length = len(command[0])
                said["entities"] = [{"type": "bot_command", "offset": 0, "length": length}]
            if reply_to:
                said["reply_to_message"] = self._message(reply_to, chat)
            if topic:
                said |= {"message_thread_id": topic, "is_topic_message": True}
            self.bot.update({"message": said})
        return message

    def _message(self, message: Message, chat: Chat) -> dict:
        bot = {
            "id": self.bot.id,
            "is_bot": True,
            "first_name": "Bot",
            "username": self.bot.username,
        }
        return {
            "message_id": message.id,
            "date": int(message.at),
            "chat": chat.json(),
            "from": bot if message.sender == "bot" else self.json(),
        }

    def taps(self, label: str, message: Message | None = None, chat: Chat | None = None) -> Tap:
        """Tap a button by its label, the beginning of that, or what it says."""
        chat = chat or self.chat
        with self.server.lock:
            standing = [message] if message else reversed(chat.messages)
            found = [(m, b) for m in standing if not m.deleted for row in m.buttons for b in row]
            data = self._data(label, found)
            on = message or next(m for m, (_, said) in found if said == data)
            tap = Tap(self.server, str(next(self.server.ids)))
            said = self._message(on, chat) | ({"message_thread_id": on.topic} if on.topic else {})
            if on.topic:
                said["is_topic_message"] = True
            query = {"id": tap.id, "from": self.json(), "message": said, "data": data}
            self.bot.update({"callback_query": query | {"chat_instance": "1"}})
            self.server.open_taps.add(tap.id)
        return tap

    def _data(self, label: str, found: list) -> str:
        for fits in (str.__eq__, str.startswith):
            for _, (text, data) in found:
                if fits(text, label):
                    return data
        if re.match(r"\w{1,3}:", label):
            return label
        raise AssertionError(f"no button {label!r} among {[text for _, (text, _) in found]}")

    def blocks(self) -> None:
        with self.server.lock:
            self.chat.blocked = True


class Call:
    def __init__(self, method: str, params: dict):
        self.at, self.wall = time.monotonic(), time.time()
        self.method, self.params, self.status = method, params, None

    def __repr__(self):
        return f"{self.method} {self.status} {str(self.params)[:600]}"


class _Bot:
    def __init__(self, server, token: str, username: str):
        self.server, self.token, self.username = server, token, username
        self.id = int(token.partition(":")[0])
        self.chats: dict[int, Chat] = {}
        self.updates: deque[dict] = deque()
        self.handed: list[dict] = []
        self.again: list[dict] = []
        self.poller = None
        self.commands: dict[str, list] = {}

    def update(self, what: dict) -> None:
        self.push({"update_id": next(self.server.update_ids)} | what)

    def push(self, update: dict) -> None:
        self.updates.append(update)
        self.server.changed.notify_all()


# ── the server ────────────────────────────────────────────────────────────────────────────────

SENDS = ("sendMessage", "editMessageText", "editMessageReplyMarkup", "sendDocument")


class BotServer:
    """The API at `url`, for the bot of `token` and those that are added. A context manager."""

    def __init__(
        self,
        token: str = "123456:AAorchestratiaTestTokenMadeUp00000000",
        username: str = "orchestratia_test_bot",
    ):
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.ids, self.update_ids = itertools.count(1000), itertools.count(700_000_000)
        self.bots: dict[str, _Bot] = {}
        self.token, self.username = token, username
        self.main = self.add_bot(token, username)
        self.calls: list[Call] = []
        self.answers: dict[str, dict] = {}
        self.open_taps: set[str] = set()
        self.floods, self.flooded = True, []
        self.down = self.closed = False
        self._sent: dict[int | None, deque] = defaultdict(deque)
        self._faults: dict[str, deque] = defaultdict(deque)
        self._delays: dict[str, float] = {}
        self._people, self._groups = itertools.count(5001), itertools.count(1)
        self._http = _Listener(("127.0.0.1", 0), _Handler)
        self._http.api = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.changed.notify_all()
        self._http.shutdown()
        self._http.end_connections()
        self._thread.join()
        self._http.server_close()

    # who is there

    def add_bot(self, token: str, username: str) -> _Bot:
        self.bots[token] = _Bot(self, token, username)
        return self.bots[token]

    def person(self, name: str, username: str | None = None) -> Person:
        return Person(self, next(self._people), name, username, self.main)

    def group(self, title: str, members=(), forum=False, bot_admin=True) -> Chat:
        id = -1_000_000_000_000 - next(self._groups)
        chat = Chat(self, id, title, "supergroup", forum=forum, bot_admin=bot_admin)
        self.main.chats[id] = chat
        for person in members:
            self.join(chat, person)
        return chat

    def join(self, chat: Chat, person: Person) -> None:
        chat.members.append(person)

    # faults

    def fail(self, method: str, *answers) -> None:
        """What the next calls of a method get (`*`: of any): a status, a body (dict or bytes),
        `cut`, `hold`, or ("after", one of them) once it was carried out."""
        with self.lock:
            self._faults[method].extend(answers)

    def retry(self, method: str, seconds: float) -> None:
        body = Refusal(429, f"Too Many Requests: retry after {seconds}", retry_after=seconds).body
        self.fail(method, body)

    def mend(self) -> None:
        """No fault waits for anything any more."""
        with self.lock:
            self._faults.clear()

    def delay(self, method: str, seconds: float) -> None:
        self._delays[method] = seconds

    def repeat(self) -> None:
        """Hand the last updates out again, whatever was confirmed."""
        with self.lock:
            for bot in self.bots.values():
                bot.again = bot.handed[-20:]
            self.changed.notify_all()

    def push_raw(self, update: dict) -> None:
        with self.lock:
            self.main.push({"update_id": next(self.update_ids)} | update)

    def fault_for(self, method: str):
        with self.lock:
            for name in (method, "*"):
                if self._faults[name]:
                    return self._faults[name].popleft()
        return None

    # what happened

    def calls_of(self, *methods: str) -> list[Call]:
        with self.lock:
            return [call for call in self.calls if call.method in methods]

    def wait(self, condition, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        with self.lock:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError("it did not come to that:\n" + self._dump())
                self.changed.wait(min(left, 0.1))

    def _dump(self) -> str:
        chats = [chat for bot in self.bots.values() for chat in bot.chats.values()]
        lines = [f"{chat.title}: {m!r}" for chat in chats for m in chat.messages[-12:]]
        return "\n".join([*lines, *(repr(call) for call in self._told())])

    def _told(self) -> list[Call]:
        return [call for call in self.calls if call.method != "getUpdates"][-12:]

    # the methods

    def run(self, token: str, method: str, params: dict):
        """The result of a call. Raises Refusal."""
        bot = self.bots.get(token)
        if not bot:
            raise Refusal(401, "Unauthorized")
        function = METHODS.get(method)
        if not function:
            raise Refusal(404, "Not Found")
        if self._delays.get(method):
            time.sleep(self._delays[method])
        if method == "getUpdates":
            return _get_updates(self, bot, params)
        with self.lock:
            if method in SENDS:
                self._count(int(params.get("chat_id") or 0))
            try:
                return function(self, bot, params)
            finally:
                self.changed.notify_all()

    def _count(self, place: int) -> None:
        """Telegram's limits on messages. Raises Refusal, or notes it where `floods` is off."""
        now = time.monotonic()
        for key, span in ((None, 1.0), (place, 60.0)):
            times = self._sent[key]
            while times and now - times[0] > span:
                times.popleft()
        last = self._sent[place]
        recent = [at for at in last if now - at <= CHAT_BURST]
        too_much = len(self._sent[None]) >= PER_SECOND or (
            len(last) >= PER_MINUTE_IN_GROUP if place < 0 else False
        )
        if too_much or len(recent) >= CHAT_BURST / PER_CHAT + CHAT_BURST:
            self.flooded.append((place, now))
            if self.floods:
                raise Refusal(429, "Too Many Requests: retry after 1", retry_after=1)
        for key in (None, place):
            self._sent[key].append(now)

    def chat_of(self, bot: _Bot, params: dict) -> Chat:
        chat = bot.chats.get(int(params.get("chat_id") or 0))
        if not chat:
            raise bad("chat not found")
        if chat.blocked:
            raise Refusal(403, "Forbidden: bot was blocked by the user")
        if not chat.started:
            raise Refusal(403, "Forbidden: bot can't initiate conversation with a user")
        return chat


def _get_me(_server, bot, _params):
    name = {"id": bot.id, "is_bot": True, "first_name": "Orchestratia", "username": bot.username}
    return name | {"can_join_groups": True, "can_read_all_group_messages": False}


def _get_updates(server, bot, params):
    offset, mine = int(params.get("offset") or 0), object()
    deadline = time.monotonic() + float(params.get("timeout") or 0)
    with server.lock:
        bot.poller = mine
        server.changed.notify_all()
        while bot.updates and bot.updates[0].get("update_id", 0) < offset:
            bot.updates.popleft()
        while True:
            if bot.poller is not mine:
                raise Refusal(
                    409,
                    "Conflict: terminated by other getUpdates request; make sure that only one bot "
                    "instance is running",
                )
            found = bot.again + list(bot.updates)[: int(params.get("limit") or 100)]
            if found or server.closed or server.down or time.monotonic() >= deadline:
                bot.again = []
                bot.handed = [*bot.handed, *found][-100:]
                return found
            server.changed.wait(max(0.0, min(0.2, deadline - time.monotonic())))


def _text_of(params, field="text", most=TEXT_MOST):
    html = params.get(field) or ""
    if params.get("parse_mode") not in (None, "", "HTML"):
        raise bad("this server reads HTML only")
    text, entities = read_html(html) if params.get("parse_mode") else (html, [])
    stripped = text.strip()
    if field == "text" and not stripped:
        raise bad("message text is empty")
    if units(stripped) > most:
        raise bad("message is too long" if field == "text" else "message caption is too long")
    if "\x00" in text:
        raise bad("strings must be encoded in UTF-8")
    return text.rstrip(), html, entities


def _place(chat, params) -> dict:
    """Topic and reply of a new message. Raises Refusal."""
    topic = int(params.get("message_thread_id") or 0) or None
    if topic and topic not in chat.topics:
        raise bad("message thread not found")
    reply = json.loads(params.get("reply_parameters") or "{}")
    to = int(reply.get("message_id") or params.get("reply_to_message_id") or 0) or None
    if to and not chat.find(to):
        if not reply.get("allow_sending_without_reply"):
            raise bad("message to be replied not found")
        to = None
    silent = str(params.get("disable_notification", "")).lower() == "true"
    return {"topic": topic, "reply_to": to, "silent": silent}


def _said(chat, message) -> dict:
    said = {"message_id": message.id, "date": int(message.at), "chat": chat.json()}
    return said | {"text": message.text, "entities": message.entities}


def _send_message(server, bot, params):
    chat = server.chat_of(bot, params)
    text, html, entities = _text_of(params)
    markup = read_markup(params.get("reply_markup"))
    more = _place(chat, params)
    message = Message(
        chat.next_id(), "bot", text, html=html, entities=entities, markup=markup, **more
    )
    chat.messages.append(message)
    return _said(chat, message)


def _own(server, bot, params, what: str):
    chat = server.chat_of(bot, params)
    message = chat.find(params.get("message_id"))
    if not message:
        raise bad(f"message to {what} not found")
    if message.sender != "bot" and what == "edit":
        raise bad("message can't be edited")
    return chat, message


def _edit_text(server, bot, params):
    chat, message = _own(server, bot, params, "edit")
    text, html, entities = _text_of(params)
    return _edited(chat, message, (text, html, entities, read_markup(params.get("reply_markup"))))


def _edit_markup(server, bot, params):
    chat, message = _own(server, bot, params, "edit")
    markup = read_markup(params.get("reply_markup"))
    return _edited(chat, message, (message.text, message.html, message.entities, markup))


def _edited(chat, message, now: tuple):
    before = (message.text, message.entities, message.markup)
    if before == (now[0], now[2], now[3]):
        raise bad(
            "message is not modified: specified new message content and reply markup are exactly "
            "the same as a current content and reply markup of the message"
        )
    message.set(*now)
    message.edits += 1
    return _said(chat, message)


def _delete(server, bot, params):
    _, message = _own(server, bot, params, "delete")
    message.deleted = True
    return True


def _answer_tap(server, _bot, params):
    tap = params.get("callback_query_id")
    if len(params.get("text") or "") > ALERT_MOST:
        raise bad("MESSAGE_TOO_LONG")
    if tap in server.answers or tap not in server.open_taps:
        server.answers.setdefault(tap, {"text": params.get("text") or "", "show_alert": False})
        raise bad("query is too old and response timeout expired or query ID is invalid")
    alert = str(params.get("show_alert", "")).lower() == "true"
    server.answers[tap] = {"text": params.get("text") or "", "show_alert": alert}
    return True


def _send_document(server, bot, params):
    chat = server.chat_of(bot, params)
    file = params.get("document")
    if not isinstance(file, tuple):
        raise bad("there is no document in the request")
    if len(file[1]) > FILE_MOST:
        raise Refusal(413, "Request Entity Too Large")
    text, html, entities = _text_of(params, "caption", CAPTION_MOST)
    more = _place(chat, params)
    message = Message(
        chat.next_id(), "bot", text, html=html, entities=entities, document=file, **more
    )
    chat.messages.append(message)
    return _said(chat, message)


def _react(server, bot, params):
    _, message = _own(server, bot, params, "react")
    message.reactions = json.loads(params.get("reaction") or "[]")
    return True


def _topic(server, bot, params):
    chat = server.chat_of(bot, params)
    if not chat.forum:
        raise bad("the chat is not a forum")
    if not chat.bot_admin:
        raise bad("not enough rights to create a topic")
    if not 1 <= len((params.get("name") or "").strip()) <= TOPIC_MOST:
        raise bad("TOPIC_NAME_INVALID")
    thread = chat.next_id()
    chat.topics[thread] = params["name"]
    return {"message_thread_id": thread, "name": params["name"], "icon_color": 7322096}


def _set_commands(_server, bot, params):
    commands = json.loads(params.get("commands") or "[]")
    for command in commands:
        named = re.fullmatch(r"[a-z0-9_]{1,32}", command.get("command", ""))
        if not named or not 1 <= len(command.get("description", "")) <= 256 or len(commands) > 100:
            raise bad("BOT_COMMAND_INVALID")
    bot.commands[params.get("scope") or "default"] = commands
    return True


METHODS = {
    "getMe": _get_me,
    "getUpdates": _get_updates,
    "sendMessage": _send_message,
    "editMessageText": _edit_text,
    "editMessageReplyMarkup": _edit_markup,
    "deleteMessage": _delete,
    "answerCallbackQuery": _answer_tap,
    "sendDocument": _send_document,
    "setMessageReaction": _react,
    "createForumTopic": _topic,
    "setMyCommands": _set_commands,
    "deleteWebhook": lambda *_: True,
    "sendChatAction": lambda *_: True,
}


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args):
        self._connections: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self):
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_):
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        api = self.server.api
        address = urlsplit(self.path)
        _, bot, method = address.path.split("/", 2)
        params = {k: v[0] for k, v in parse_qs(address.query).items()} | self._body()
        if api.down:
            return self._cut()
        call = Call(method, params)
        with api.lock:
            api.calls.append(call)
        fault = api.fault_for(method)
        if fault is not None and not isinstance(fault, tuple):
            return self._fault(call, fault)
        try:
            body = {"ok": True, "result": api.run(bot.removeprefix("bot"), method, params)}
        except Refusal as refused:
            body = refused.body
        if isinstance(fault, tuple):
            return self._fault(call, fault[1])
        if api.down:
            return self._cut()
        self._answer(call, body.get("error_code", 200), json.dumps(body).encode())

    do_GET = do_POST

    def _body(self) -> dict:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("application/json"):
            return json.loads(raw or b"{}")
        if not kind.startswith("multipart/"):
            return {k: v[0] for k, v in parse_qs(raw.decode()).items()}
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        found = {}
        for part in BytesParser(policy=policy.HTTP).parsebytes(head + raw).iter_parts():
            name = part.get_param("name", header="content-disposition")
            file, data = part.get_filename(), part.get_payload(decode=True)
            found[name] = (file, data) if file else data.decode()
        return found

    def _fault(self, call: Call, fault) -> None:
        if fault == "cut":
            return self._cut()
        if fault == "hold":
            api = self.server.api
            with api.lock:
                api.changed.wait_for(lambda: api.closed)
            return self._cut()
        if isinstance(fault, int):
            text = {"ok": False, "error_code": fault, "description": "Internal Server Error"}
            return self._answer(call, fault, json.dumps(text).encode())
        if isinstance(fault, dict):
            return self._answer(call, fault.get("error_code", 200), json.dumps(fault).encode())
        self._answer(call, 200, fault)

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, call: Call, status: int, body: bytes) -> None:
        call.status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with self.server.api.lock:
            self.server.api.changed.notify_all()
