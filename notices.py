"""Who is told what, when, and whether it still stands: from the event log to messages.

Each event is read once, in order, from a stored position: what it is to be told to whom becomes a
`notice` in the transaction that moves the position on. A notice that is due becomes part of a
`post`, a message as it should stand; whoever carries posts sends them, and mends those that have
changed. So nothing is lost when a carrier is away, and what was answered anywhere is withdrawn.
"""

import logging
import time

import chats
from auth import can
from models import (
    Transaction,
    bus,
    dumps,
    event_json,
    execute,
    in_chunks,
    insert_many,
    loads,
    one,
    rows,
    transaction,
)

log = logging.getLogger("orchestratia.notices")

WAIT_S = 120.0  # how long the phone waits while its person looks at the dashboard
AGAIN_S = 600.0  # when what still waits is said again
MERGE_S = 10.0  # what follows one of its kind so soon is told together
EVENTS_AT_ONCE = 200
POSITION_EVERY = 500  # events after which the position is kept although nothing was told
TOGETHER_MOST = 8  # notices in one message
POSTS_KEPT_S = 30 * 86400.0
ASKED_FOR = "asked for"  # what a post is opened by that is sent although it has ended meanwhile
LATER = 1 << 52  # what makes a silent post come after every other one

# type of an event: (kind of chats.KINDS, what its message is, the name of the id in its details
# by which it is known later)
TOLD = {
    "permission_requested": ("needs_me", "permission", "permission_id"),
    "task_needs_human": ("needs_me", "intervention", "intervention_id"),
    "task_plan_submitted": ("needs_me", "plan", "version"),
    "alert_raised": ("needs_me", "alert", "alert_id"),
    "task_failed": ("failed", "failed", None),
    "session_failed": ("failed", "failed", None),
    "task_completed": ("done", "done", None),
    "server_offline": ("offline", "server", None),
    "session_lost": ("offline", "lost", None),
    "task_auto_assigned": ("progress", "progress", None),
    "task_unblocked": ("progress", "progress", None),
    "task_released": ("progress", "progress", None),
    "task_retried": ("progress", "progress", None),
    "task_note_added": ("notes", "note", None),
}
# What may end what was told: types of events, with the name of an id in their details, if any.
ENDS = {
    "permission_answered": ("permission", "permission_id"),
    "intervention_responded": ("intervention", "intervention_id"),
    "alert_ended": ("alert", "alert_id"),
}
TASK_ENDS = frozenset(
    f"task_{what}"
    for what in ("completed", "failed", "cancelled", "released", "retried", "plan_approved")
) | {"task_plan_revision", "task_plan_submitted"}
LISTENED = (*TOLD, *ENDS, *sorted(TASK_ENDS - set(TOLD)), "server_online")
LOUD = frozenset({"needs_me", "failed", "offline"})  # kinds that make a sound


# ── from events to notices ────────────────────────────────────────────────────────────────────


def position() -> int:
    """The id of the last event that was looked at; begins where the log ends."""
    stored = one("SELECT value FROM meta WHERE key = 'told_upto'")
    if stored:
        return int(stored["value"])
    last = (one("SELECT MAX(id) AS id FROM event") or {})["id"] or 0
    _keep_position(last)
    return last


def _keep_position(event_id: int) -> None:
    with transaction():
        execute("INSERT OR REPLACE INTO meta VALUES ('told_upto', ?)", (str(event_id),))


def take_events() -> int:
    """Look at what has happened since, and keep what is to be told of it; how many events."""
    after = position()
    marks = ", ".join("?" * len(LISTENED))
    found = [
        event_json(row) | {"seconds": row["at"]}
        for row in rows(
            f"SELECT * FROM event WHERE id > ? AND type IN ({marks}) ORDER BY id LIMIT ?",
            [after, *LISTENED, EVENTS_AT_ONCE],
        )
    ]
    if found and one("SELECT 1 FROM chat LIMIT 1"):
        with transaction() as tx:
            for event in found:
                _take(tx, event)
            _keep_position(found[-1]["id"])
        return len(found)
    if found and (len(found) == EVENTS_AT_ONCE or found[-1]["id"] - after > POSITION_EVERY):
        _keep_position(found[-1]["id"])
        return len(found)
    return 0


def _take(tx: Transaction, event: dict) -> None:
    for subject in _touched(event):
        _end(tx, subject)
    if event["type"] not in TOLD or event["project_id"] is None:
        return
    kind, what, named = TOLD[event["type"]]
    subject = _subject(event, what, named)
    if subject and not is_open(subject):
        return
    for chat in _hearing(event, kind):
        _note(tx, chat, event, kind, what, subject)


def _subject(event: dict, what: str, named: str | None) -> str | None:
    if what == "plan":
        return f"plan:{event['task_id']}-{event['details'].get('version')}"
    if what == "server":
        return f"server:{event['server_id']}"
    return f"{what}:{event['details'].get(named)}" if named else None


def _touched(event: dict) -> list[str]:
    """What was told and may not stand any more after the event."""
    if event["type"] in ENDS:
        what, named = ENDS[event["type"]]
        return [f"{what}:{event['details'].get(named)}"]
    if event["type"] == "server_online":
        return [f"server:{event['server_id']}"]
    if event["type"] not in TASK_ENDS:
        return []
    found = rows(
        "SELECT DISTINCT subject FROM notice WHERE about = ? AND subject IS NOT NULL"
        " AND state IN ('due', 'sent')",
        (event["task_id"],),
    )
    return [row["subject"] for row in found]


def _end(tx: Transaction, subject: str) -> None:
    """What was told of a subject that stands no more is withdrawn, or says how it ended."""
    if is_open(subject):
        return
    for notice in rows(
        "SELECT * FROM notice WHERE subject = ? AND state IN ('due', 'sent')", (subject,)
    ):
        state = "dropped" if notice["state"] == "due" else "ended"
        execute(
            "UPDATE notice SET state = ?, due_at = NULL, again_at = NULL WHERE seq = ?",
            (state, notice["seq"]),
        )
        if notice["post"]:
            _mend(tx, notice["post"])
        if notice["reminder"]:
            take_back(tx, notice["reminder"])


def _mend(tx: Transaction, seq: int) -> None:
    """Something a post tells of has ended: it says so, or is not sent at all."""
    told = one("SELECT 1 FROM notice WHERE post = ? AND state = 'sent'", (seq,))
    post = post_row(seq)
    if told or post["sent_at"] or post["opened"] == ASKED_FOR:
        redo(tx, seq)
    else:  # one on its way just now says how it ended instead
        take_back(tx, seq, "void")


def is_open(subject: str) -> bool:
    """Whether what was told still waits, as the tables stand."""
    what, _, ref = subject.partition(":")
    if what == "plan":
        task, _, version = ref.rpartition("-")
        return bool(
            one(
                "SELECT 1 FROM plan WHERE task_id = ? AND version = ? AND status = 'pending'",
                (task, version),
            )
        )
    if what == "server":
        return bool(one("SELECT 1 FROM server WHERE id = ? AND online = 0", (ref,)))
    waits = "open" if what == "alert" else "pending"
    return bool(one(f"SELECT 1 FROM {what} WHERE id = ? AND status = ?", (ref, waits)))


def _hearing(event: dict, kind: str) -> list[dict]:
    """The chats that are to hear of an event: its project's groups, and its people."""
    bot = chats.bot_of(event["project_id"])
    if bot is None:
        return []
    found = rows(
        "SELECT * FROM chat WHERE bot_id = ? AND (project_id = ? OR user_id IS NOT NULL)",
        (bot, event["project_id"]),
    )
    return [chat for chat in found if _wants(chat, event, kind)]


def _wants(chat: dict, event: dict, kind: str) -> bool:
    if event["seconds"] < chat["created_at"]:
        return False
    if chat["project_id"]:
        return kind in chats.kinds_of_chat(chat)
    if kind not in chats.kinds_of(chat["user_id"], event["project_id"]):
        return False
    found = chats.who(chat["bot_id"], chat["chat_id"])
    if not found or not can(found[1], "read", event["project_id"]):
        return False
    return kind == "needs_me" or event["actor"] != found[1].actor  # their own doing is no news


def _note(tx: Transaction, chat: dict, event: dict, kind: str, what: str, subject) -> None:
    about = event["task_id"] or event["session_id"]
    execute(
        "INSERT OR IGNORE INTO notice (chat, event_id, kind, subject, about, due_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (chat["id"], event["id"], what, subject, about, _due_at(chat, kind, what, about, tx.now)),
    )


def _due_at(chat: dict, kind: str, what: str, about: str | None, now: float) -> float:
    """When something is to be told: at once, with others of its kind, when its person has not
    seen it on the dashboard, or when they want to be written to again."""
    due = now
    if last := _last_of(chat, what, about):
        due = max(due, last["due_at"] + MERGE_S if now - last["due_at"] < MERGE_S else now)
    if kind == "needs_me" and chat["user_id"] and chats.presence.here(chat["user_id"]):
        due = max(due, now + (WAIT_S if chats.wish_of(chat["user_id"])["patient"] else 0))
    return max(due, chats.peace_until(chat, now) or 0)


def _last_of(chat: dict, what: str, about: str | None) -> dict | None:
    where, values = ("AND about IS ?", [about]) if chat["forum"] else ("", [])
    return one(
        f"SELECT due_at FROM post WHERE chat = ? AND kind = ? {where} ORDER BY seq DESC LIMIT 1",
        [chat["id"], what, *values],
    )


# ── from notices to posts ─────────────────────────────────────────────────────────────────────


def next_due() -> float | None:
    """When something is to be told next, in seconds since the epoch."""
    found = one(
        "SELECT MIN(at) AS at FROM (SELECT MIN(due_at) AS at FROM notice WHERE state = 'due'"
        " UNION ALL SELECT MIN(again_at) FROM notice WHERE again_at IS NOT NULL)"
    )
    return found["at"]


def send_due(now: float) -> int:
    """Make posts of what is due; how many."""
    due = rows(
        "SELECT * FROM notice WHERE state = 'due' AND due_at <= ? ORDER BY due_at, seq LIMIT 1000",
        (now,),
    )
    made = 0
    for chat_id, of_chat in _grouped(due, lambda notice: notice["chat"]).items():
        chat = chats.chat(chat_id)
        with transaction() as tx:
            for group in _together(chat, _standing(chat, of_chat, now)):
                _post(tx, chat, group)
                made += 1
    return made


def _grouped(items: list[dict], key) -> dict:
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _standing(chat: dict, notices: list[dict], now: float) -> list[dict]:
    """Those that are still to be told, and may be now; the others are dropped or put off."""
    peace = chats.peace_until(chat, now)
    if peace:
        _set_each(notices, "due_at = ?", peace)
        return []
    person = chats.who(chat["bot_id"], chat["chat_id"])[1] if chat["user_id"] else None
    projects = _projects_of(notices)
    told, gone = [], []
    for notice in notices:
        open_still = not notice["subject"] or is_open(notice["subject"])
        project = projects[notice["event_id"]]
        seen = can(person, "read", project) if person else chat["project_id"] == project
        (told if open_still and seen else gone).append(notice)
    _set_each(gone, "state = 'dropped', due_at = ?", None)
    return told


def _set_each(notices: list[dict], columns: str, value) -> None:
    for part, marks in in_chunks([notice["seq"] for notice in notices]):
        with transaction():
            execute(f"UPDATE notice SET {columns} WHERE seq IN {marks}", [value, *part])


def _projects_of(notices: list[dict]) -> dict[int, str]:
    found = {}
    for part, marks in in_chunks([notice["event_id"] for notice in notices]):
        sql = f"SELECT id, project_id FROM event WHERE id IN {marks}"
        found |= dict(execute(sql, part).fetchall())
    return found


def _together(chat: dict, notices: list[dict]):
    """Those of one kind, in a forum of one topic: what one message tells of."""
    by_kind = _grouped(notices, lambda n: (n["kind"], n["about"] if chat["forum"] else None))
    for group in by_kind.values():
        asks = group[0]["subject"] is not None
        size = TOGETHER_MOST if asks else len(group)  # what asks for nothing is only counted
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _post(tx: Transaction, chat: dict, notices: list[dict]) -> None:
    first = notices[0]
    asks = first["subject"] is not None
    loud = any(TOLD[kind][0] in LOUD for kind in TOLD if TOLD[kind][1] == first["kind"])
    seq = say(
        tx,
        chat,
        first["kind"],
        about=first["about"] if len({n["about"] for n in notices}) == 1 else None,
        silent=not loud,
    )
    again = tx.now + AGAIN_S if asks and first["kind"] != "server" else None
    for part, marks in in_chunks([notice["seq"] for notice in notices]):
        execute(
            "UPDATE notice SET state = 'sent', due_at = NULL, post = ?, again_at = ?"
            f" WHERE seq IN {marks}",
            [seq, again, *part],
        )


def remind(now: float) -> int:
    """Say again what has waited for too long; how many reminders."""
    waiting = rows(
        "SELECT * FROM notice WHERE again_at <= ? ORDER BY again_at, seq LIMIT 1000", (now,)
    )
    made = 0
    for (chat_id, post_seq), group in _grouped(waiting, lambda n: (n["chat"], n["post"])).items():
        with transaction() as tx:
            chat, post = chats.chat(chat_id), post_row(post_seq)
            later = chats.peace_until(chat, now) or (now + AGAIN_S if not post["sent_at"] else None)
            _set_each(group, "again_at = ?", later)
            if later:
                continue
            seq = say(
                tx,
                chat,
                "reminder",
                about=post["about"],
                reply_to=post["message_id"],
            )
            for part, marks in in_chunks([notice["seq"] for notice in group]):
                execute(f"UPDATE notice SET reminder = ? WHERE seq IN {marks}", [seq, *part])
            made += 1
    return made


def show(tx: Transaction, chat: dict, subject: str, about: str | None) -> None:
    """Tell anew of what waits, since somebody asks: an older message of it says so no more."""
    known = one(
        "SELECT * FROM notice WHERE chat = ? AND subject = ? AND state IN ('due', 'sent')"
        " ORDER BY seq DESC LIMIT 1",
        (chat["id"], subject),
    )
    if known and known["post"]:
        _leave(tx, known)
    seq = say(tx, chat, subject.partition(":")[0], about=about)
    execute("UPDATE post SET opened = ? WHERE seq = ?", (ASKED_FOR, seq))
    if known:
        execute(
            "UPDATE notice SET state = 'sent', due_at = NULL, post = ? WHERE seq = ?",
            (seq, known["seq"]),
        )
        return
    execute(
        "INSERT INTO notice (chat, event_id, kind, subject, about, state, post)"
        " VALUES (?, ?, ?, ?, ?, 'sent', ?)",
        (chat["id"], -seq, subject.partition(":")[0], subject, about, seq),
    )


def _leave(tx: Transaction, notice: dict) -> None:
    """A notice goes to another post: its old one goes on without it, or disappears."""
    execute("UPDATE notice SET post = NULL WHERE seq = ?", (notice["seq"],))
    alone = not one("SELECT 1 FROM notice WHERE post = ?", (notice["post"],))
    (take_back if alone else redo)(tx, notice["post"])


# ── posts ─────────────────────────────────────────────────────────────────────────────────────


def say(
    tx: Transaction,
    chat: dict,
    kind: str,
    body: dict | None = None,
    *,
    about: str | None = None,
    thread: int | None = None,
    reply_to: int | None = None,
    silent: bool = False,
) -> int:
    """Keep a message that is to be sent; its number.

    chat: a row, or {bot_id, chat_id} of somebody who has none. body: {html, buttons, …} as its
    carrier reads it; without one it is written of its notices when it is carried. about: in a
    forum, the task or session whose topic it belongs in; thread: that topic itself.
    """
    post = {
        "chat": chat.get("id"),
        "bot_id": chat["bot_id"],
        "chat_id": chat["chat_id"],
        "kind": kind,
        "about": about,
        "thread_id": thread,
        "body": dumps(body or {}),
        "reply_to": reply_to,
        "silent": int(silent),
        "state": "due",
        "due_at": tx.now,
    }
    insert_many("post", tuple(post), [tuple(post.values())])
    tx.tell(f"posts:{chat['bot_id']}")
    return one("SELECT last_insert_rowid() AS seq")["seq"]


def post_row(seq: int) -> dict | None:
    return one("SELECT * FROM post WHERE seq = ?", (seq,))


def redo(tx: Transaction, seq: int, **changes) -> None:
    """A post is to be written anew, since what it tells of has changed."""
    columns = "".join(f", {name} = ?" for name in changes)
    execute(
        f"UPDATE post SET state = CASE state WHEN 'sent' THEN 'stale' ELSE state END,"
        f" version = version + 1{columns} WHERE seq = ?",
        (*changes.values(), seq),
    )
    post = post_row(seq)
    tx.tell(f"posts:{post['bot_id']}")


def take_back(tx: Transaction, seq: int, how: str = "gone") -> None:
    """A post is to disappear (`gone`), or not to be sent at all (`void`)."""
    execute(
        "UPDATE post SET state = CASE state WHEN 'dropped' THEN 'dropped' ELSE ? END,"
        " version = version + 1 WHERE seq = ?",
        (how, seq),
    )
    tx.tell(f"posts:{post_row(seq)['bot_id']}")


def waiting_posts(bot: str) -> list[dict]:
    """What is to be sent, written anew or taken back next in each of a bot's chats: answers to
    people and what waits for them before what is only told."""
    return rows(
        # the index by message would walk through all that was ever sent
        "SELECT * FROM post WHERE seq IN (SELECT MIN(p.silent * ? + p.seq) % ?"
        " FROM post p INDEXED BY post_open LEFT JOIN chat c ON c.id = p.chat"
        " WHERE p.bot_id = ? AND c.refused IS NULL"
        " AND p.state IN ('due', 'stale', 'gone', 'void') GROUP BY p.chat_id)"
        " ORDER BY silent, seq",
        (LATER, LATER, bot),
    )


def notices_of(post: dict) -> list[dict]:
    """What a message tells of (a reminder: again), with each one's `event`, in order."""
    column = "reminder" if post["kind"] == "reminder" else "post"
    found = rows(f"SELECT * FROM notice WHERE {column} = ? ORDER BY seq", (post["seq"],))
    return _with_events(found)


def _with_events(notices: list[dict]) -> list[dict]:
    events = {}
    for part, marks in in_chunks([notice["event_id"] for notice in notices]):
        for row in rows(f"SELECT * FROM event WHERE id IN {marks}", part):
            events[row["id"]] = event_json(row)
    return [notice | {"event": events.get(notice["event_id"])} for notice in notices]


def sent(post: dict, message_id: int | None = None, state: str = "sent", why=None) -> None:
    """What became of a post that was carried (a row as it was read): `sent`, or `dropped` when it
    is gone or cannot be carried, with the reason. One that has changed meanwhile is carried again.
    """
    with transaction():
        execute(
            "UPDATE post SET state = CASE WHEN version = ? THEN ?"
            " WHEN state = 'gone' THEN 'gone' ELSE 'stale' END,"
            " message_id = COALESCE(?, message_id), sent_at = COALESCE(sent_at, ?), why = ?"
            " WHERE seq = ?",
            (post["version"], state, message_id, time.time(), why, post["seq"]),
        )


def post_at(bot: str, place: int, message_id: int) -> dict | None:
    """The post that stands as this message."""
    return one(
        "SELECT * FROM post WHERE bot_id = ? AND chat_id = ? AND message_id = ?",
        (bot, place, message_id),
    )


def body(post: dict) -> dict:
    return loads(post["body"])


def wake() -> None:
    bus.publish("telegram", "look")
