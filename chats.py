"""Bots, the chats they speak in, and what people wish to be told there.

A bot is known by the number its token begins with. The hub has one (a setting), a project may have
one of its own, which then alone speaks of that project. Somebody is paired with a bot by a code
made on the dashboard: their chat holds a token of kind `telegram`, so whatever signs them out
everywhere ends the pairing too. A group hears of one project.
"""

import hmac
import re
import secrets
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

import auth
from auth import Caller, pick_project, require
from models import (
    Forbidden,
    Invalid,
    NotFound,
    Unauthorised,
    dumps,
    execute,
    iso,
    loads,
    new_id,
    one,
    rows,
    transaction,
)

TOKEN = re.compile(r"(\d{3,20}):[A-Za-z0-9_-]{20,80}")
TITLE_MOST = 200
UPDATE_DAYS = 8  # Telegram counts updates anew after a week without any

# ── bots ──────────────────────────────────────────────────────────────────────────────────────

_hub_token = ""


def use_hub_bot(token: str) -> None:
    """The token of the hub's own bot; empty when it has none."""
    global _hub_token
    _hub_token = token


def check_token(token: str) -> str:
    """A bot's token as it may be stored. Raises Invalid, never repeating it."""
    if not TOKEN.fullmatch(token):
        raise Invalid(
            "This is no bot's token: @BotFather gives one of the form 123456789:AbC….",
            field="token",
        )
    return token


def bot_id(token: str) -> str:
    return token.partition(":")[0]


def hub_bot() -> str | None:
    """The id of the hub's bot."""
    return bot_id(_hub_token) if _hub_token else None


def bots() -> dict[str, str]:
    """{id: token} of every bot there is."""
    stored = rows("SELECT token FROM project_bot ORDER BY set_at")
    tokens = [row["token"] for row in stored] + ([_hub_token] if _hub_token else [])
    return {bot_id(token): token for token in tokens}


def bot_of(project_id: str) -> str | None:
    """The id of the bot that speaks of a project."""
    own = one("SELECT token FROM project_bot WHERE project_id = ?", (project_id,))
    return bot_id(own["token"]) if own else hub_bot()


def has_own_bot(project_id: str) -> bool:
    return bool(one("SELECT 1 FROM project_bot WHERE project_id = ?", (project_id,)))


def served(bot: str) -> list[str]:
    """The ids of the projects a bot speaks of."""
    own = {r["project_id"]: bot_id(r["token"]) for r in rows("SELECT * FROM project_bot")}
    found = [project for project, its in own.items() if its == bot]
    if bot == hub_bot():
        found += [r["id"] for r in rows("SELECT id FROM project") if r["id"] not in own]
    return found


def set_project_bot(caller: Caller, project_id: str, token: str | None) -> None:
    """Give a project a bot of its own, or none. Raises Forbidden, Invalid."""
    require(caller, "project.admin", project_id, "project")
    with transaction() as tx:
        execute("DELETE FROM project_bot WHERE project_id = ?", (project_id,))
        if token:
            execute(
                "INSERT INTO project_bot (project_id, token, set_by, set_at) VALUES (?, ?, ?, ?)",
                (project_id, check_token(token), caller.actor, tx.now),
            )
        tx.emit("project_changed", project_id, caller.actor, {"changed": ["telegram"]})
        tx.tell("telegram", "chats")


def bot_row(bot: str) -> dict:
    """What is known of a bot: {id, username, position, trouble, trouble_at}."""
    nothing = dict.fromkeys(("username", "position", "trouble", "trouble_at"))
    return one("SELECT * FROM bot WHERE id = ?", (bot,)) or {"id": bot} | nothing


def note_bot(bot: str, **changes) -> None:
    """Keep what has become known of a bot: username, position, trouble."""
    if "trouble" in changes:
        changes["trouble_at"] = time.time() if changes["trouble"] else None
    columns = ", ".join(f"{name} = ?" for name in changes)
    with transaction():
        execute("INSERT OR IGNORE INTO bot (id) VALUES (?)", (bot,))
        execute(f"UPDATE bot SET {columns} WHERE id = ?", (*changes.values(), bot))


def first_time(bot: str, update_id: int) -> bool:
    """Whether an update was not handled yet; it is now. Inside the caller's transaction."""
    made = execute(
        "INSERT OR IGNORE INTO bot_update (bot_id, update_id, at) VALUES (?, ?, ?)",
        (bot, update_id, time.time()),
    )
    return made.rowcount == 1


def forget_old(now: float, posts_s: float) -> None:
    """Forget updates that cannot come again, and messages nobody can answer any more."""
    with transaction():
        execute("DELETE FROM bot_update WHERE at < ?", (now - UPDATE_DAYS * 86400,))
        execute(
            "DELETE FROM post WHERE due_at < ? AND state IN ('sent', 'dropped')",
            (now - posts_s,),
        )
        execute("DELETE FROM pairing_code WHERE expires_at < ?", (now,))


# ── pairing ───────────────────────────────────────────────────────────────────────────────────

CODE_S = 600.0  # how long a pairing code lives, in seconds
CODE_TRIES = 5  # wrong tries that end a code, and that an account has within a minute
SIGNS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # none that are taken for another
NAMED, SECRET = 4, 10  # signs that say which code it is, and signs nobody can guess: 50 bits


def new_code(caller: Caller) -> str:
    """A code that pairs whoever sends it to a bot with the caller: once, for ten minutes. An
    earlier one of theirs ends. Raises Forbidden for who is no person."""
    if caller.kind != "user":
        raise Forbidden("Only people pair a chat: sign in.")
    signs = "".join(secrets.choice(SIGNS) for _ in range(NAMED + SECRET))
    with transaction() as tx:
        execute("DELETE FROM pairing_code WHERE user_id = ?", (caller.id,))
        execute(
            "INSERT OR REPLACE INTO pairing_code (id, hash, user_id, expires_at)"
            " VALUES (?, ?, ?, ?)",
            (signs[:NAMED], auth.digest(signs), caller.id, tx.now + CODE_S),
        )
    return signs


def end_code(text: str) -> None:
    """A code that others have seen is good for nothing."""
    with transaction():
        execute("DELETE FROM pairing_code WHERE id = ?", (_signs(text)[:NAMED],))


def _signs(text: str) -> str:
    return re.sub(r"[\s-]", "", text).upper()


def pair(bot: str, account: int, name: str, text: str) -> dict | None:
    """Pair a Telegram account with whoever made the code; their chat's row, None when the code is
    wrong, spent or too old (which of them is not said). Raises TooMany.

    A wrong try counts for the account, and for the code it names, also when nothing else is kept.
    """
    auth.count_try(("telegram", bot, account), CODE_TRIES, time.monotonic(), "codes")
    signs = _signs(text)
    with transaction() as tx:
        code = one("SELECT * FROM pairing_code WHERE id = ?", (signs[:NAMED],))
        if not code or code["expires_at"] < tx.now or code["tries"] >= CODE_TRIES:
            return None
        if not hmac.compare_digest(code["hash"], auth.digest(signs)):
            execute("UPDATE pairing_code SET tries = tries + 1 WHERE id = ?", (code["id"],))
            return None
        execute("DELETE FROM pairing_code WHERE id = ?", (code["id"],))
        return _paired(tx, bot, account, name, code["user_id"])


def _paired(tx, bot: str, account: int, name: str, user_id: str) -> dict | None:
    user = one("SELECT * FROM user WHERE id = ? AND disabled = 0", (user_id,))
    if not user:
        return None
    _drop_chat("bot_id = ? AND chat_id = ?", bot, account)
    columns = {
        "id": new_id(),
        "bot_id": bot,
        "chat_id": account,
        "title": name[:TITLE_MOST],
        "token_id": auth.pair(user_id, f"{name[:TITLE_MOST]} (@{bot_row(bot)['username'] or bot})"),
        "user_id": user_id,
        "created_by": user["username"],
        "created_at": tx.now,
    }
    _insert("chat", columns)
    tx.emit("user_changed", None, user["username"], _changed(user["username"]))
    tx.tell("telegram", "chats")
    return chat(columns["id"])


def _changed(username: str) -> dict:
    return {"username": username, "changed": ["telegram"]}


def _insert(table: str, columns: dict) -> None:
    marks = ", ".join("?" * len(columns))
    execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))


def _drop_chat(condition: str, *values) -> None:
    """Forget chats with all that was to be said there; a pairing's token goes too."""
    gone = rows(f"SELECT id, token_id FROM chat WHERE {condition}", values)
    for row in gone:
        execute("DELETE FROM chat WHERE id = ?", (row["id"],))
        execute("DELETE FROM token WHERE id = ?", (row["token_id"],))


def unpair(caller: Caller, chat_id: str) -> None:
    """End one of the caller's own pairings, from either side. Raises NotFound."""
    with transaction() as tx:
        if not one("SELECT 1 FROM chat WHERE id = ? AND user_id = ?", (chat_id, caller.id)):
            raise NotFound("There is no such chat of yours: it may have been unpaired already.")
        _drop_chat("id = ?", chat_id)
        tx.emit("user_changed", None, caller.actor, _changed(caller.name))
        tx.tell("telegram", "chats")
        tx.tell("access")


def who(bot: str, account: int) -> tuple[dict, Caller] | None:
    """The chat and the person behind a Telegram account, with the rights they have now in the
    projects that this bot speaks of; None when it is paired with nobody who may sign in."""
    found = one(
        "SELECT * FROM chat WHERE bot_id = ? AND chat_id = ? AND token_id IS NOT NULL",
        (bot, account),
    )
    if not found:
        return None
    try:
        return found, narrowed(auth.by_token_id(found["token_id"]), served(bot))
    except Unauthorised:
        return None


def narrowed(caller: Caller, project_ids: list[str]) -> Caller:
    """The person with their rights in these projects and no others, as they come by a bot: whoever
    holds its token reads along, so it is shown nothing of other projects."""
    whole = {p: "admin" for p in project_ids} if caller.is_admin else caller.roles
    roles = {p: role for p, role in whole.items() if p in project_ids}
    return replace(caller, is_admin=False, roles=roles, where="in Telegram")


# ── chats ─────────────────────────────────────────────────────────────────────────────────────


def chat(chat_id: str) -> dict | None:
    return one("SELECT * FROM chat WHERE id = ?", (chat_id,))


def chat_at(bot: str, place: int) -> dict | None:
    """The chat a bot has at this place of Telegram's."""
    return one("SELECT * FROM chat WHERE bot_id = ? AND chat_id = ?", (bot, place))


def change_chat(chat_id: str, **changes) -> None:
    columns = ", ".join(f"{name} = ?" for name in changes)
    with transaction() as tx:
        execute(f"UPDATE chat SET {columns} WHERE id = ?", (*changes.values(), chat_id))
        tx.tell("telegram", "chats")


def own_chats(caller: Caller) -> list[dict]:
    """The caller's pairings: [{id, title, bot, refused, muted_until, created_at}]."""
    found = rows(
        "SELECT c.*, b.username FROM chat c LEFT JOIN bot b ON b.id = c.bot_id"
        " WHERE c.user_id = ? ORDER BY c.created_at",
        (caller.id,),
    )
    return [_chat_json(row) for row in found]


def groups_of(caller: Caller, project_id: str) -> list[dict]:
    """The groups that hear of a project. Raises Forbidden, NotFound."""
    require(caller, "project.admin", project_id, "project")
    found = rows(
        "SELECT c.*, b.username FROM chat c LEFT JOIN bot b ON b.id = c.bot_id"
        " WHERE c.project_id = ? ORDER BY c.created_at",
        (project_id,),
    )
    return [_chat_json(row) for row in found]


def _chat_json(row: dict) -> dict:
    return {
        "id": row["id"],
        "title": row["title"],
        "bot": row["username"] or row["bot_id"],
        "kinds": kinds_of_chat(row),
        "refused": row["refused"],
        "muted_until": iso(row["muted_until"]),
        "created_by": row["created_by"],
        "created_at": iso(row["created_at"]),
    }


def bind_group(
    caller: Caller, bot: str, place: int, title: str, forum: bool, ref: str | None
) -> dict:
    """Have a group hear of a project: its chat's row. For admins of the project, since all in the
    group see what is said there. Raises Forbidden, Invalid, NotFound."""
    project = pick_project(caller, ref)
    require(caller, "project.admin", project["id"], "project")
    with transaction() as tx:
        _drop_chat("bot_id = ? AND chat_id = ?", bot, place)
        columns = {
            "id": new_id(),
            "bot_id": bot,
            "chat_id": place,
            "title": title[:TITLE_MOST],
            "project_id": project["id"],
            "forum": int(forum),
            "created_by": caller.actor,
            "created_at": tx.now,
        }
        _insert("chat", columns)
        tx.emit("project_changed", project["id"], caller.actor, {"changed": ["telegram group"]})
        tx.tell("telegram", "chats")
    return chat(columns["id"])


def unbind_group(caller: Caller, chat_id: str) -> None:
    """Say nothing more in a group. Raises NotFound, Forbidden."""
    group = one("SELECT * FROM chat WHERE id = ? AND project_id IS NOT NULL", (chat_id,))
    if not group:
        raise NotFound("There is no such group: it may have been taken off already.")
    require(caller, "project.admin", group["project_id"], "group")
    with transaction() as tx:
        _drop_chat("id = ?", chat_id)
        details = {"changed": ["telegram group"]}
        tx.emit("project_changed", group["project_id"], caller.actor, details)
        tx.tell("telegram", "chats")


def moved(bot: str, place: int, to: int) -> None:
    """A group became a supergroup: it has another place from now on."""
    with transaction():
        for table in ("chat", "post"):
            execute(
                f"UPDATE {table} SET chat_id = ? WHERE bot_id = ? AND chat_id = ?", (to, bot, place)
            )


def topic(chat_id: str, about: str) -> int | None:
    """The thread of a forum for a task or session."""
    found = one("SELECT thread_id FROM topic WHERE chat = ? AND about = ?", (chat_id, about))
    return found["thread_id"] if found else None


def about_of(chat_id: str, thread: int) -> str | None:
    """The id of the task or session a thread is about."""
    found = one("SELECT about FROM topic WHERE chat = ? AND thread_id = ?", (chat_id, thread))
    return found["about"] if found else None


def keep_topic(chat_id: str, about: str, thread: int | None) -> None:
    """Remember the thread for a task or session; None: it is there no more."""
    with transaction():
        execute("DELETE FROM topic WHERE chat = ? AND about = ?", (chat_id, about))
        if thread is not None:
            execute("INSERT INTO topic VALUES (?, ?, ?)", (chat_id, about, thread))


# ── what is looked at ─────────────────────────────────────────────────────────────────────────


def set_focus(chat_id: str, thread: int, session_id: str, user_id: str) -> dict | None:
    """Look at a session in a chat from now on; the row of what was looked at before."""
    with transaction() as tx:
        before = end_focus(chat_id, thread)
        execute(
            "INSERT INTO focus (chat, thread_id, session_id, user_id, began_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (chat_id, thread, session_id, user_id, tx.now),
        )
        tx.tell("telegram", "chats")
        return before


def focus_of(chat_id: str, thread: int) -> dict | None:
    return one("SELECT * FROM focus WHERE chat = ? AND thread_id = ?", (chat_id, thread))


def end_focus(chat_id: str, thread: int) -> dict | None:
    """Look at nothing there any more; the row of what it was."""
    with transaction() as tx:
        before = focus_of(chat_id, thread)
        execute("DELETE FROM focus WHERE chat = ? AND thread_id = ?", (chat_id, thread))
        tx.tell("telegram", "chats")
        return before


def foci(bot: str) -> list[dict]:
    """Every focus of a bot's chats with its chat's `place`, `token_id` and `project_id`."""
    return rows(
        "SELECT f.*, c.chat_id AS place, c.token_id, c.project_id FROM focus f JOIN chat c"
        " ON c.id = f.chat WHERE c.bot_id = ? AND c.refused IS NULL",
        (bot,),
    )


def shown_in(focus: dict, message_id: int | None) -> bool:
    """Remember the message that shows a focus, if that is still the focus."""
    with transaction():
        kept = execute(
            "UPDATE focus SET message_id = ? WHERE chat = ? AND thread_id = ? AND session_id = ?",
            (message_id, focus["chat"], focus["thread_id"], focus["session_id"]),
        )
        return kept.rowcount == 1


def viewer(focus: dict, bot: str) -> Caller | None:
    """Who looks, with the rights they have now; None when they may not call any more."""
    pairing = one(
        "SELECT chat_id FROM chat WHERE bot_id = ? AND user_id = ?", (bot, focus["user_id"])
    )
    found = pairing and who(bot, pairing["chat_id"])
    return found[1] if found else None


# ── wishes ────────────────────────────────────────────────────────────────────────────────────

KINDS = {
    "needs_me": "what waits for me: questions, plans, permissions, alerts",
    "failed": "failures",
    "done": "what is done",
    "offline": "servers out of sight",
    "progress": "how the cascade goes on",
    "notes": "notes on tasks",
}
CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
MUTE_MOST_S = 366 * 86400


def wish_of(user_id: str) -> dict:
    """{quiet_from, quiet_to: "HH:MM" or None, zone, patient}. patient: while their dashboard is
    looked at, the phone waits."""
    found = one("SELECT * FROM wish WHERE user_id = ?", (user_id,))
    usual = {"quiet_from": None, "quiet_to": None, "zone": "UTC", "patient": 1}
    return usual | {k: v for k, v in (found or {}).items() if v is not None}


def set_wish(
    caller: Caller, quiet_from: str | None, quiet_to: str | None, zone: str | None, patient: bool
) -> None:
    """Say when to be left in peace. Raises Invalid, Forbidden."""
    if caller.kind != "user":
        raise Forbidden("Only people have such wishes: sign in.")
    if bool(quiet_from) != bool(quiet_to):
        raise Invalid("Quiet hours have a beginning and an end: give both, or none.", field="quiet")
    for clock in (quiet_from, quiet_to):
        if clock and not CLOCK.fullmatch(clock):
            raise Invalid(f"{clock!r} is no time of a day: write it as 22:30.", field="quiet")
    zone = zone or "UTC"
    if zone not in available_timezones():
        raise Invalid(f"There is no time zone {zone!r}: one is Europe/Berlin.", field="zone")
    with transaction():
        execute(
            "INSERT OR REPLACE INTO wish (user_id, quiet_from, quiet_to, zone, patient)"
            " VALUES (?, ?, ?, ?, ?)",
            (caller.id, quiet_from or None, quiet_to or None, zone, int(patient)),
        )
        for chat_row in rows("SELECT id FROM chat WHERE user_id = ?", (caller.id,)):
            _look_again(chat_row["id"])


def _look_again(chat_id: str) -> None:
    """What was put off may be said now, or is put off anew."""
    with transaction() as tx:
        execute(
            "UPDATE notice SET due_at = ? WHERE chat = ? AND state = 'due' AND due_at > ?",
            (tx.now, chat_id, tx.now),
        )
        tx.tell("telegram", "chats")


def kinds_of(user_id: str, project_id: str) -> list[str]:
    """What somebody wishes to be told of a project: names of KINDS, all unless they said."""
    found = one(
        "SELECT kinds FROM project_wish WHERE user_id = ? AND project_id = ?",
        (user_id, project_id),
    )
    return loads(found["kinds"]) if found else list(KINDS)


def kinds_of_chat(row: dict) -> list[str]:
    return loads(row["kinds"]) if row["kinds"] else list(KINDS)


def set_kinds(caller: Caller, project_id: str, kinds: list[str]) -> None:
    """Say what to be told of a project. Raises NotFound, Invalid."""
    require(caller, "read", project_id, "project")
    with transaction():
        execute(
            "INSERT OR REPLACE INTO project_wish (user_id, project_id, kinds) VALUES (?, ?, ?)",
            (caller.id, project_id, dumps(_known(kinds))),
        )


def set_group_kinds(caller: Caller, chat_id: str, kinds: list[str]) -> None:
    """Say what a group is told. Raises NotFound, Forbidden, Invalid."""
    group = one("SELECT * FROM chat WHERE id = ? AND project_id IS NOT NULL", (chat_id,))
    if not group:
        raise NotFound("There is no such group: it may have been taken off already.")
    require(caller, "project.admin", group["project_id"], "group")
    change_chat(chat_id, kinds=dumps(_known(kinds)))


def _known(kinds: list[str]) -> list[str]:
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise Invalid(f"Unknown kind {unknown[0]!r}: use {', '.join(KINDS)}.", field="kinds")
    return [kind for kind in KINDS if kind in kinds]


def mute(chat_id: str, seconds: float | None, now: float) -> float | None:
    """Say nothing by itself in a chat for so long (None: speak again); until when."""
    if seconds is not None and not 0 < seconds <= MUTE_MOST_S:
        raise Invalid("A chat can be muted for up to a year: write /mute 2h, or /mute off.")
    until = now + seconds if seconds else None
    change_chat(chat_id, muted_until=until)
    _look_again(chat_id)
    return until


def peace_until(row: dict, now: float) -> float | None:
    """When a chat may be written to by itself again; None when it may be now.

    row: of the chat. Its own mute, and the quiet hours of its person, in their time zone.
    """
    muted = row["muted_until"] if (row["muted_until"] or 0) > now else None
    wish = wish_of(row["user_id"]) if row["user_id"] else {"quiet_from": None}
    quiet = _quiet_until(wish, now) if wish["quiet_from"] else None
    return max(filter(None, (muted, quiet)), default=None)


def _quiet_until(wish: dict, now: float) -> float | None:
    zone = ZoneInfo(wish["zone"])
    here = datetime.fromtimestamp(now, zone)
    clock = here.strftime("%H:%M")
    begins, ends = wish["quiet_from"], wish["quiet_to"]
    over_midnight = begins > ends
    quiet = (clock >= begins or clock < ends) if over_midnight else begins <= clock < ends
    if not quiet:
        return None
    hour, minute = map(int, ends.split(":"))
    day = here + timedelta(days=1) if over_midnight and clock >= begins else here
    return day.replace(hour=hour, minute=minute, second=0, microsecond=0).timestamp()


# ── who looks at the dashboard ────────────────────────────────────────────────────────────────


class _Presence:
    """Who has a dashboard on their screen just now, as far as their browsers say."""

    def __init__(self):
        self._lock = threading.Lock()
        self._seen: dict[str, dict[str, float]] = {}

    def seen(self, user_id: str, tab: str, visible: bool = True) -> None:
        """A tab of somebody's browser is looked at, or not any more."""
        now = time.monotonic()
        with self._lock:
            known = self._seen.pop(user_id, {})
            tabs = {t: at for t, at in known.items() if t != tab and now - at < PRESENT_S}
            if visible and len(tabs) < TABS_MOST:
                tabs[tab] = now
            if tabs:
                self._seen[user_id] = tabs

    def here(self, user_id: str | None) -> bool:
        with self._lock:
            tabs = self._seen.get(user_id, {})
            return any(time.monotonic() - at < PRESENT_S for at in tabs.values())

    def reset(self) -> None:
        with self._lock:
            self._seen.clear()


TABS_MOST = 20  # of one person, that are remembered
PRESENT_S = 45.0  # a dashboard says every 20 s that it is looked at
presence = _Presence()
