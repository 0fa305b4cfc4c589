"""Every use case on servers and sessions: registration, signs of life, commands out, reports and
output in, silence noticed.

`move` is the only door through which a session changes state. Frames from an agent are handled by
the tables SPOOLED and PASSING, whichever carrier brought them.
"""

import logging
import sqlite3
import threading
import time
from base64 import b64decode
from collections import OrderedDict
from datetime import datetime

import auth
import cascade
import moves
import reading
import routing
import tasks
from auth import HUB, Caller, find, require
from models import (
    Conflict,
    Invalid,
    LogStore,
    NotFound,
    Refused,
    Server,
    Transaction,
    bus,
    dumps,
    execute,
    in_chunks,
    iso,
    labels,
    loads,
    new_id,
    newest,
    one,
    rows,
    transaction,
)

log = logging.getLogger("orchestratia.sessions")

HEARTBEAT_S = 30.0
OFFLINE_AFTER_S = 90.0
POLL_SILENCE_S = 40.0
GRACE_S = 15.0
LOST_AFTER_S = 900.0
RESEND_S = 10.0
TYPING_S = 15.0  # how long a typed text may take to be confirmed
COMMANDS_AT_ONCE = 200
BLOCK_MOST = 64 * 1024
LIST_MOST = 500
SESSIONS_MOST = 1000  # one server may name at once
SLOTS_MOST = 10_000

# ── servers ───────────────────────────────────────────────────────────────────────────────────


def register(data: dict, address: str) -> dict:
    """Take a registration token and make or renew the server it is for.

    data: the body of servers/register. Returns {id, api_key, name, project_id, project_name,
    heartbeat_s, renewed}; the key is shown this once. Raises Unauthorised for the token and
    Conflict for a name that another machine has.
    """
    key = auth.new_server_key()
    with transaction() as tx:
        token = auth.redeem(data["registration_token"])
        project = one("SELECT * FROM project WHERE id = ?", (token["project_id"],))
        name = data["name"].strip()
        server = auth.renewable(project["id"], data.get("machine_id") or "", name)
        columns = _registered_columns(data, address) | {"key_hash": auth.digest(key)}
        renewed = bool(server)
        if server:
            Server.update(**columns).where(Server.id == server.id).execute()
        else:
            _refuse_taken_name(project["id"], name)
            server = Server.create(project_id=project["id"], name=name, **columns)
        execute("UPDATE registration SET server_id = ? WHERE id = ?", (server.id, token["id"]))
        tx.emit(
            "server_registered",
            project["id"],
            f"server:{name}",
            {"name": name, "hostname": columns["hostname"], "token": token["id"]},
            server=server.id,
        )
        tx.tell(f"server:{server.id}", "revoked")  # whoever still uses the old key
    return {
        "id": server.id,
        "api_key": key,
        "name": name,
        "project_id": project["id"],
        "project_name": project["name"],
        "heartbeat_s": HEARTBEAT_S,
        "renewed": renewed,
    }


def _registered_columns(data: dict, address: str) -> dict:
    system = data.get("system_info") or {}
    declared = data.get("capabilities") or {}
    return {
        "hostname": data.get("hostname") or "",
        "os": data.get("os") or "",
        "machine_id": data.get("machine_id") or "",
        "repos": _repos(data.get("repos")),
        "info": system | {"address": address},
        "slots": declared.get("slots") or (system.get("cpu_count") or 1) + 2,
        **{kind: declared.get(kind) for kind in cascade.LISTS},
    }


def _repos(given: dict | None) -> dict:
    """{name: {path, branch}} from either form an agent may send."""
    return {
        name: value if isinstance(value, dict) else {"path": value, "branch": None}
        for name, value in (given or {}).items()
    }


def _refuse_taken_name(project_id: str, name: str, but: str = "") -> None:
    if not name:
        raise Invalid("A server needs a name that is not empty.", field="name")
    if one(
        "SELECT 1 FROM server WHERE project_id = ? AND name = ? AND revoked = 0 AND id <> ?",
        (project_id, name, but),
    ):
        raise Conflict(
            f"There is a server {name!r} in this project already: choose another name (--name), "
            "or revoke the old one first.",
            code="name_taken",
        )


def list_servers(project_ids: list[str], *, revoked: bool = False) -> list[dict]:
    marks = ", ".join("?" * len(project_ids))
    hidden = "" if revoked else " AND revoked = 0"
    found = rows(
        f"SELECT * FROM server WHERE project_id IN ({marks}){hidden} ORDER BY name", project_ids
    )
    return [server_json(row) for row in found]


def server_json(row: dict) -> dict:
    value = routing.server_value(row)
    live = one(
        "SELECT COUNT(*) AS n FROM session WHERE server_id = ?"
        " AND state IN ('starting', 'active', 'disconnected', 'recovering')",
        (row["id"],),
    )
    seen = _life.seen_at(row["id"]) or row["last_seen"]
    return {
        "id": row["id"],
        "name": row["name"],
        "project_id": row["project_id"],
        "hostname": row["hostname"],
        "os": row["os"],
        "status": value["status"],
        "last_heartbeat": iso(seen),
        "repos": value["repos"],
        **{kind: value[kind] for kind in cascade.LISTS},
        "profiles": loads(row["profiles"]),
        "declared": loads(row["declared"]),
        "slots": value["slots"],
        "busy": row["busy"],
        "manual": bool(row["manual"]),
        "agent_version": row["agent_version"],
        "system_info": _life.info(row["id"]) or loads(row["info"]),
        "sessions": live["n"],
        "created_at": iso(row["created_at"]),
    }


def get_server(caller: Caller, ref: str) -> dict:
    return find("server", caller, ref, name="name")


def change_server(caller: Caller, ref: str, changes: dict) -> dict:
    """Rename, declare, set slots or manual; waiting tasks are looked at again. Raises Conflict."""
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if "name" in changes:
        changes["name"] = changes["name"].strip()
        _refuse_taken_name(server["project_id"], changes["name"], server["id"])
    if changes.get("slots"):
        changes["declared"] = (changes.get("declared") or {}) | {"slots": changes.pop("slots")}
    if "declared" in changes:  # what is not mentioned stays as it was declared
        changes["declared"] = loads(server["declared"]) | changes["declared"]
    return _server_event(caller, server, "server_changed", changes, {"changed": sorted(changes)})


def drain(caller: Caller, ref: str) -> dict:
    """No new work for the server; what runs there goes on."""
    return _admin_move(caller, ref, "server_draining", {"draining": True})


def resume(caller: Caller, ref: str) -> dict:
    """The server takes new work again."""
    return _admin_move(caller, ref, "server_resumed", {"draining": False})


def _admin_move(caller: Caller, ref: str, event: str, changes: dict) -> dict:
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if server["revoked"]:
        raise Conflict(f"Server {server['name']!r} is revoked: register it again.")
    return _server_event(caller, server, event, changes, {})


def _server_event(caller, server: dict, event: str, changes: dict, details: dict) -> dict:
    with transaction() as tx:
        if changes:
            Server.update(**changes).where(Server.id == server["id"]).execute()
        details = details | {"server": changes.get("name", server["name"])}
        tx.emit(event, server["project_id"], caller.actor, details, server=server["id"])
        after = one("SELECT * FROM server WHERE id = ?", (server["id"],))
        routing.place_waiting(tx, after)
    return one("SELECT * FROM server WHERE id = ?", (server["id"],))


def revoke(caller: Caller, ref: str) -> dict:
    """Take the server's key away for good; its work is routed anew."""
    server = get_server(caller, ref)
    require(caller, "server.admin", server["project_id"], "server")
    if server["revoked"]:
        return server
    with transaction() as tx:
        Server.update(revoked=True, online=False, key_hash=None).where(
            Server.id == server["id"]
        ).execute()
        tx.emit(
            "server_revoked",
            server["project_id"],
            caller.actor,
            {"server": server["name"]},
            server=server["id"],
        )
        for session in _believed_alive(server["id"]):
            move(tx, session, "lose", HUB.actor, reason="its server was revoked")
        execute(
            "UPDATE task SET pinned_server = NULL, pinned_session = NULL, auto_assign = 1"
            " WHERE pinned_server = ?",
            (server["id"],),
        )
        for task in _tasks_on(server["id"]):
            tasks.release(tx, task, f"server {server['name']} was revoked", caller.actor)
        execute(
            "UPDATE command SET acked_at = ? WHERE server_id = ? AND acked_at IS NULL",
            (tx.now, server["id"]),
        )
        tx.tell(f"server:{server['id']}", "revoked")
        tx.tell("access")
    _life.forget(server["id"])
    return one("SELECT * FROM server WHERE id = ?", (server["id"],))


def _tasks_on(server_id: str) -> list[dict]:
    held = sorted(cascade.HOLDS_SLOT)
    return rows(
        f"SELECT * FROM task WHERE server_id = ? AND status IN ({', '.join('?' * len(held))})",
        [server_id, *held],
    )


def assigned_tasks(caller: Caller) -> list[dict]:
    """The tasks on the caller's server, whole, oldest first."""
    return reading.tasks_json(sorted(_tasks_on(caller.server_id), key=lambda t: t["seq"]))


# ── signs of life ─────────────────────────────────────────────────────────────────────────────


class _Life:
    """When each server was last heard of. In memory: a hub that was away knows of no silence."""

    def __init__(self):
        self._lock = threading.Lock()
        self._heard: dict[str, tuple[float, float]] = {}  # monotonic, wall clock
        self._info: dict[str, dict] = {}
        self._unsaved: set[str] = set()
        self._ticked = time.monotonic()

    def hear(self, server_id: str, info: dict | None = None) -> bool:
        """Note a sign of life; True when the server was not known to live."""
        with self._lock:
            if info:
                self._info[server_id] = info
            fresh = server_id not in self._heard
            self._heard[server_id] = (time.monotonic(), time.time())
            self._unsaved.add(server_id)
            return fresh

    def forget(self, server_id: str) -> None:
        with self._lock:
            self._heard.pop(server_id, None)
            self._info.pop(server_id, None)
            self._unsaved.discard(server_id)

    def seen_at(self, server_id: str) -> float | None:
        heard = self._heard.get(server_id)
        return heard[1] if heard else None

    def silent(self, seconds: float) -> list[str]:
        """Servers not heard of for so long; none after this process itself was asleep."""
        with self._lock:
            now = time.monotonic()
            if now - self._ticked > seconds / 2:
                self._heard = {k: (now, wall) for k, (_, wall) in self._heard.items()}
            self._ticked = now
            return [k for k, (heard, _) in self._heard.items() if now - heard > seconds]

    def info(self, server_id: str) -> dict | None:
        """The system_info of its last heartbeat, if this process has had one."""
        return self._info.get(server_id)

    def take_unsaved(self) -> list[tuple[float, dict | None, str]]:
        """(seen at, system_info, server id) of those heard since the last call."""
        with self._lock:
            unsaved = [
                (self._heard[s][1], self._info.get(s), s) for s in self._unsaved if s in self._heard
            ]
            self._unsaved.clear()
            return unsaved

    def reset(self, server_ids: list[str]) -> None:
        with self._lock:
            now = time.monotonic()
            self._heard = dict.fromkeys(server_ids, (now, time.time()))
            self._info.clear()
            self._unsaved.clear()
            self._ticked = now


_life = _Life()


def begin() -> None:
    """Forget what an earlier hub in this process knew and give every server a fresh start."""
    _life.reset([r["id"] for r in rows("SELECT id FROM server WHERE online = 1")])
    _screens.clear()


def alive(server_id: str, system_info: dict | None = None) -> None:
    """A sign of life: the server is online from now on."""
    if not _life.hear(server_id, system_info):
        return
    try:
        _came_online(server_id)
    except BaseException:
        _life.forget(server_id)  # not written down: the next sign of life tries again
        raise


def _came_online(server_id: str) -> None:
    with transaction() as tx:
        server = one(
            "UPDATE server SET online = 1, offline_at = NULL WHERE id = ? AND online = 0"
            " AND revoked = 0 RETURNING *",
            (server_id,),
        )
        if server:
            tx.emit(
                "server_online",
                server["project_id"],
                f"server:{server['name']}",
                {"server": server["name"]},
                server=server_id,
            )
            routing.place_waiting(tx, server)


def heartbeat(caller: Caller, system_info: dict | None) -> None:
    alive(caller.server_id, system_info)


def save_heartbeats() -> None:
    """Write the latest signs of life into the table, in one batch."""
    unsaved = _life.take_unsaved()
    if unsaved:
        with transaction():
            for at, info, server_id in unsaved:
                execute(
                    "UPDATE server SET last_seen = ?, info = COALESCE(?, info) WHERE id = ?",
                    (at, dumps(info) if info else None, server_id),
                )


def notice_silence(offline_after: float = OFFLINE_AFTER_S) -> list[str]:
    """Call servers offline that gave no sign of life for so many seconds; their ids."""
    gone = _life.silent(offline_after)
    for server_id in gone:
        with transaction() as tx:
            if server_id not in _life.silent(offline_after):
                continue  # it spoke while we waited for our turn
            _life.forget(server_id)
            server = one(
                "UPDATE server SET online = 0, offline_at = ? WHERE id = ? AND online = 1"
                " RETURNING *",
                (tx.now, server_id),
            )
            if server:
                tx.emit(
                    "server_offline",
                    server["project_id"],
                    HUB.actor,
                    {"server": server["name"], "silent_s": round(offline_after)},
                    server=server_id,
                )
                disconnect(tx, server_id)
    return gone


def disconnect(tx: Transaction, server_id: str) -> None:
    """The server's connection is gone: its sessions go on there, unseen."""
    for session in _believed_alive(server_id):
        if session["state"] in ("active", "recovering"):
            move(tx, session, "disconnect", HUB.actor)


def release_lost(now: float, lost_after: float = LOST_AFTER_S) -> int:
    """Take their work from servers that have been away for `lost_after` seconds; how many tasks."""
    released = 0
    for server in rows(
        "SELECT * FROM server WHERE online = 0 AND offline_at <= ? AND busy > 0",
        (now - lost_after,),
    ):
        for task in _tasks_on(server["id"]):
            if task["on_lost"] == "retry":
                with transaction() as tx:
                    why = f"server {server['name']} has been away for {lost_after:g} s"
                    tasks.release(tx, task, why)
                released += 1
    return released


def settle_recovering(now: float, grace: float = GRACE_S) -> int:
    """Recovered sessions that outlived their grace are active again; how many."""
    found = rows(
        "SELECT * FROM session WHERE state = 'recovering' AND state_at <= ?", (now - grace,)
    )
    for session in found:
        with transaction() as tx:
            move(tx, session, "settle", HUB.actor)
    return len(found)


# ── the state of a session ────────────────────────────────────────────────────────────────────

EVENT_OF = {
    "started": "session_active",
    "disconnect": "session_disconnected",
    "reconnect": "session_active",
    "recover": "session_recovered",
    "settle": "session_active",
    "lose": "session_lost",
    "close": "session_closed",
    "fail": "session_failed",
}


def move(tx: Transaction, session: dict, verb: str, actor: str, **changes) -> dict:
    """Move `session` (a row) by `verb` and emit; the row as it is then, unchanged when the verb
    does not apply (a report that comes late or twice changes nothing)."""
    starts, goal = cascade.SESSION_TRANSITIONS[verb]
    if session["state"] not in starts:
        return session
    after = session | changes | {"state": goal, "state_at": tx.now}
    changed = {k: v for k, v in after.items() if v != session[k]}
    execute(
        f"UPDATE session SET {', '.join(f'{c} = ?' for c in changed)} WHERE id = ?",
        (*changed.values(), session["id"]),
    )
    if goal in ("closed", "failed"):
        tx.tell("access")  # its key has died with it
    details = {"name": session["name"], "tmux": session["tmux_name"], "pid": after["pid"]}
    details |= {k: changes[k] for k in ("exit_code", "error", "reason") if k in changes}
    _session_event(tx, after, EVENT_OF[verb], actor, details)
    return after


def _session_event(tx: Transaction, session: dict, kind: str, actor: str, details: dict) -> None:
    tx.emit(
        kind,
        session["project_id"],
        actor,
        details,
        task=session["task_id"],
        session=session["id"],
        server=session["server_id"],
    )


def _believed_alive(server_id: str) -> list[dict]:
    live = sorted(cascade.SESSION_LIVE)
    return rows(
        f"SELECT * FROM session WHERE server_id = ? AND state IN ({', '.join('?' * len(live))})",
        [server_id, *live],
    )


# ── using sessions ────────────────────────────────────────────────────────────────────────────


def list_sessions(project_ids: list[str], *, every: bool = False, status: str | None = None):
    """Session rows as JSON, newest first: the live ones, or every one of the last 500."""
    if status and status not in cascade.SESSION_STATES:
        raise Invalid(f"Unknown status {status!r}: use one of {', '.join(cascade.SESSION_STATES)}.")
    states = [status] if status else sorted(cascade.SESSION_LIVE | {"lost"})
    branches = [{"project_id": project} for project in project_ids]
    if status or not every:
        branches = [b | {"state": state} for b in branches for state in states]
    return session_views(newest("session", branches, "", [], LIST_MOST))


def session_views(found: list[dict]) -> list[dict]:
    servers = labels("server", "name", {s["server_id"] for s in found})
    titles = labels("task", "title", {s["task_id"] for s in found if s["task_id"]})
    return [_session_json(s, servers.get(s["server_id"]), titles) for s in found]


def _session_json(row: dict, server_name: str, titles: dict) -> dict:
    ended = row["state"] in ("closed", "failed")
    return {
        "id": row["id"],
        "name": row["name"],
        "server_id": row["server_id"],
        "server_name": server_name,
        "project_id": row["project_id"],
        "task_id": row["task_id"],
        "task_title": titles.get(row["task_id"]),
        "attempt": row["attempt"],
        "role": row["role"],
        "profile": row["profile"],
        "status": row["state"],
        "activity": row["activity"],
        "reason": row["reason"],
        "working_directory": row["working_directory"],
        "tmux_name": row["tmux_name"],
        "pid": row["pid"],
        "exit_code": row["exit_code"],
        "error": row["error"],
        "cols": row["cols"],
        "rows": row["rows"],
        "created_by": row["created_by"],
        "created_at": iso(row["created_at"]),
        "started_at": iso(row["started_at"]),
        "closed_at": iso(row["closed_at"]),
        "log_start": row["log_start"],
        "log_end": row["log_end"] if ended else logs().end(row["id"]),
    }


def get_session(caller: Caller, ref: str) -> dict:
    return find("session", caller, ref, name="name")


def session_view(row: dict) -> dict:
    return session_views([row])[0]


def open_session(caller: Caller, data: dict) -> tuple[dict, bool]:
    """Start a session on a server; (row, made). For a task whose attempt has a live session, that
    one. Raises Conflict, NotFound, Forbidden."""
    server = get_server(caller, data["server_id"])
    require(caller, "session.open", server["project_id"], "server")
    if server["revoked"]:
        raise Conflict(f"Server {server['name']!r} is revoked: choose another one.")
    with transaction() as tx:
        task = _task_for(caller, server, data.get("task_id"))
        if task and (live := _live_session_of(task)):
            return live, False
        session_id = _new_session(tx, caller, server, task, data)
        session = one("SELECT * FROM session WHERE id = ?", (session_id,))
        if task:
            execute("UPDATE task SET session_id = ? WHERE id = ?", (session_id, task["id"]))
            moves.command(tx, server["id"], "task_assigned", session_id, task)
        else:
            moves.command(tx, server["id"], "session_start", session_id)
        _session_event(tx, session, "session_requested", caller.actor, {"name": session["name"]})
    return session, True


def _task_for(caller: Caller, server: dict, ref: str | None) -> dict | None:
    if not ref:
        return None
    task = find("task", caller, ref)
    if task["server_id"] != server["id"] or task["status"] not in cascade.HOLDS_SLOT:
        raise Conflict(
            f"The task is {reading.shown_status(task)} and not on {server['name']!r}: "
            "assign it to that server first."
        )
    return task


def _live_session_of(task: dict) -> dict | None:
    found = rows(
        "SELECT * FROM session WHERE task_id = ? AND attempt = ?", (task["id"], task["attempt"])
    )
    return next((s for s in found if s["state"] in cascade.SESSION_LIVE), None)


def _new_session(tx, caller: Caller, server: dict, task: dict | None, data: dict) -> str:
    role = data.get("role") or ("worker" if task else "plain")
    profile = data.get("profile") or (task["profile"] if task else None)
    name = data.get("name") or (routing.worker_name(task) if task else f"{role}-{new_id()[:6]}")
    return moves.new_session(
        tx,
        project_id=server["project_id"],
        server_id=server["id"],
        task_id=task["id"] if task else None,
        attempt=task["attempt"] if task else None,
        name=name,
        role=role,
        profile=profile,
        command=dumps(data["command"]) if data.get("command") else (task or {}).get("command"),
        working_directory=data.get("working_dir"),
        repo=loads(task["requirements"]).get("repo") if task else data.get("repo"),
        cols=data.get("cols") or 120,
        rows=data.get("rows") or 40,
        created_by=caller.actor,
    )


def _reachable(session: dict) -> dict:
    """The session's server, if something can be typed there now. Raises Conflict."""
    if session["state"] not in cascade.SESSION_LIVE:
        raise Conflict(f"Session {session['name']!r} is {session['state']}: start a new one.")
    server = one("SELECT * FROM server WHERE id = ?", (session["server_id"],))
    if not server["online"] or session["state"] in ("starting", "disconnected"):
        away = "offline" if not server["online"] else session["state"]
        raise Conflict(
            f"Session {session['name']!r} cannot be reached now ({server['name']}: {away}): "
            "nothing was typed, try again when it is back.",
            code="offline",
        )
    return server


def type_text(caller: Caller, ref: str, text: str) -> None:
    """Type a text into a session and submit it, by the rules of safe typing.

    Raises Conflict when the session is away or blocked, or the typing was not confirmed.
    """
    session = get_session(caller, ref)
    require(caller, "session.type", session["project_id"], "session")
    server = _reachable(session)
    if session["activity"].startswith("blocked"):
        raise Conflict(
            f"Session {session['name']!r} waits at a prompt ({session['activity']}): answer that "
            "first.",
            code="blocked",
        )
    request_id = new_id()
    with bus.subscribe(f"typed:{request_id}") as answers:
        _send(
            server["id"],
            {
                "type": "session_type",
                "request_id": request_id,
                "session_id": session["id"],
                "text": text,
            },
        )
        answer = answers.get(TYPING_S)
    if answer is None:
        raise Conflict(
            f"{server['name']} did not confirm that the text was typed: look at the session "
            "before you send it again.",
            code="delivery_unknown",
        )
    if not answer.get("ok"):
        raise Conflict(f"The text was not typed: {answer.get('why')}", code="blocked")


def type_raw(caller: Caller, ref: str, data: str) -> None:
    """Pass base64-coded bytes to a session as they are, unconfirmed. Raises Conflict, Invalid."""
    session = get_session(caller, ref)
    require(caller, "session.type", session["project_id"], "session")
    server = _reachable(session)
    try:
        b64decode(data, validate=True)
    except ValueError:
        raise Invalid("`data` is not valid base64.", field="data") from None
    _send(server["id"], {"type": "session_input", "session_id": session["id"], "data": data})


def resize(caller: Caller, ref: str, cols: int, lines: int) -> dict:
    session = get_session(caller, ref)
    require(caller, "session.type", session["project_id"], "session")
    server = _reachable(session)
    with transaction():
        execute("UPDATE session SET cols = ?, rows = ? WHERE id = ?", (cols, lines, session["id"]))
    _send(
        server["id"],
        {"type": "session_resize", "session_id": session["id"], "cols": cols, "rows": lines},
    )
    return one("SELECT * FROM session WHERE id = ?", (session["id"],))


def close_session(caller: Caller, ref: str, *, force: bool = False) -> dict:
    """Have the session ended; it is closed once its server says so."""
    session = get_session(caller, ref)
    require(caller, "session.close", session["project_id"], "session")
    if session["state"] not in cascade.SESSION_LIVE | {"lost"}:
        raise Conflict(f"Session {session['name']!r} is {session['state']} already.")
    with transaction() as tx:
        if session["state"] == "lost":
            return move(tx, session, "close", caller.actor, closed_at=tx.now)
        moves.command(
            tx, session["server_id"], "session_close", session["id"], None, {"force": force}
        )
    return session


def _send(server_id: str, frame: dict) -> None:
    """A frame for the moment only: lost when nobody listens."""
    bus.publish(f"server:{server_id}", frame)


# ── output ────────────────────────────────────────────────────────────────────────────────────

SCREENS_KEPT = 2000
_screens: OrderedDict[str, dict] = OrderedDict()
_logs: LogStore | None = None


def use_logs(store: LogStore) -> None:
    global _logs
    _logs = store


def logs() -> LogStore:
    return _logs


def screen(caller: Caller, ref: str) -> dict:
    """The last screen the agent sent: {lines, at}."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    return _screens.get(session["id"], {"lines": [], "at": None})


def output(caller: Caller, ref: str, offset: int, limit: int) -> tuple[bytes, int]:
    """Bytes of the complete log from `offset` on, and the offset behind them."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    return logs().read(session["id"], offset, limit)


# ── frames out ────────────────────────────────────────────────────────────────────────────────


def pending_commands(server_id: str, sent: dict[int, float], now: float) -> list[dict]:
    """Frames of unacknowledged commands that were not sent within RESEND_S; marks them as sent.

    sent: {command id: when it was sent on this connection}. Commands that have become pointless
    are closed here.
    """
    waiting = rows(
        "SELECT * FROM command WHERE server_id = ? AND acked_at IS NULL ORDER BY id LIMIT ?",
        (server_id, COMMANDS_AT_ONCE),
    )
    for gone in sent.keys() - {row["id"] for row in waiting}:
        del sent[gone]
    frames = []
    for row in waiting:
        if row["id"] in sent and now - sent[row["id"]] < RESEND_S:
            continue
        frame = COMPOSE[row["type"]](row)
        if frame is None:
            _drop_command(row)
            continue
        sent[row["id"]] = now
        frames.append({"type": row["type"], "id": row["id"]} | frame)
    return frames


def _drop_command(row: dict) -> None:
    """A command that became pointless before it was sent, and the session it would have started."""
    with transaction() as tx:
        acknowledge(row["server_id"], [row["id"]])
        session = one("SELECT * FROM session WHERE id = ?", (row["session_id"],))
        if session and session["state"] == "starting":
            why = "its task was taken back before it started"
            move(tx, session, "close", HUB.actor, reason=why, closed_at=tx.now)


def acknowledge(server_id: str, ids: list[int]) -> None:
    with transaction() as tx:
        for part, marks in in_chunks(ids):
            execute(
                f"UPDATE command SET acked_at = ? WHERE server_id = ? AND id IN {marks}",
                [tx.now, server_id, *part],
            )


def _compose_assigned(row: dict) -> dict | None:
    task = one("SELECT * FROM task WHERE id = ?", (row["task_id"],))
    if task["attempt"] != row["attempt"] or task["status"] not in cascade.HOLDS_SLOT:
        return None
    frame = {
        "task": reading.task_json(task),
        "attempt": row["attempt"],
        "require_plan": bool(task["require_plan"]),
    }
    session = row["session_id"] and one("SELECT * FROM session WHERE id = ?", (row["session_id"],))
    if session and session["task_id"] == task["id"]:
        frame["start"] = _start_fields(session)
    elif session:
        frame["session_id"] = session["id"]
    return frame


def _compose_start(row: dict) -> dict | None:
    session = one("SELECT * FROM session WHERE id = ?", (row["session_id"],))
    return _start_fields(session) if session["state"] == "starting" else None


def _start_fields(session: dict) -> dict:
    return {
        "session_id": session["id"],
        "session_key": auth.session_key(session["id"]),
        "name": session["name"],
        "project_id": session["project_id"],
        "role": session["role"],
        "working_directory": session["working_directory"],
        "repo": session["repo"],
        "cols": session["cols"],
        "rows": session["rows"],
        "profile": session["profile"],
        "command": loads(session["command"]),
        "prompt": None,
        "env": {},
        "task_id": session["task_id"],
        "attempt": session["attempt"],
    }


def _compose_plain(row: dict) -> dict:
    matter = loads(row["body"])
    return {
        "session_id": row["session_id"],
        "task_id": row["task_id"],
        "attempt": row["attempt"],
    } | matter


COMPOSE = {
    "task_assigned": _compose_assigned,
    "session_start": _compose_start,
    "session_close": _compose_plain,
    "task_cancelled": _compose_plain,
    "task_updated": _compose_plain,
    "task_status_update": _compose_plain,
}

# What a frame can raise whose fields are missing or of the wrong kind.
MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)

# ── frames in ─────────────────────────────────────────────────────────────────────────────────


def greet(caller: Caller, frame: dict) -> None:
    """Take note of who connects: version, instance and where its spool stands."""
    spool_id, first = frame.get("spool_id") or "", int(frame.get("spool_first") or 1)
    with transaction():
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        known = server["spool_upto"] if server["spool_id"] == spool_id else 0
        execute(
            "UPDATE server SET agent_version = ?, spool_id = ?, spool_upto = ? WHERE id = ?",
            (str(frame.get("agent_version") or ""), spool_id, max(known, first - 1), server["id"]),
        )


def sync(caller: Caller, frame: dict) -> dict:
    """Compare what the agent has with what should be, repair the difference; the sync_ok frame."""
    instance = str(frame.get("instance") or "")
    if len(frame.get("sessions") or ()) > SESSIONS_MOST:
        raise ValueError(f"more than {SESSIONS_MOST} sessions")
    with transaction() as tx:
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        restarted = server["instance"] != instance
        _update_capabilities(server, frame.get("capabilities") or {}, instance)
        answer, named, adopt = [], set(), []
        for item in frame.get("sessions") or ():
            session = _named_session(tx, server, item, adopt)
            named.add(session["id"])
            answer.append(_reconcile(tx, session, item, restarted))
        for session in _believed_alive(server["id"]):
            if session["id"] not in named and session["started_at"]:
                _lose(tx, session, "the agent does not have it any more")
        routing.place_waiting(tx, one("SELECT * FROM server WHERE id = ?", (server["id"],)))
    return {"type": "sync_ok", "sessions": answer, "adopt": adopt}


def _update_capabilities(server: dict, has: dict, instance: str) -> None:
    columns = {"instance": instance}
    if "repos" in has:
        columns["repos"] = _repos(has["repos"])
    columns |= {kind: _words(has[kind]) for kind in cascade.LISTS if kind in has}
    columns |= {k: has[k] for k in ("profiles", "os") if has.get(k)}
    if has.get("slots") and isinstance(has["slots"], int):
        columns["slots"] = min(max(has["slots"], 1), SLOTS_MOST)
    Server.update(**columns).where(Server.id == server["id"]).execute()


def _words(given) -> list[str] | None:
    """A declared list, or None for undeclared. Raises ValueError for anything else."""
    if given is None or (isinstance(given, list) and all(isinstance(w, str) for w in given)):
        return given
    raise ValueError(f"not a list of words: {given!r}")


def _named_session(tx: Transaction, server: dict, item: dict, adopt: list) -> dict:
    """The hub's row of a session the agent has; one it does not know is adopted."""
    session = item.get("session_id") and one(
        "SELECT * FROM session WHERE id = ? AND server_id = ?", (item["session_id"], server["id"])
    )
    if session:
        return session
    tmux_name = str(item.get("tmux_name") or "")
    session = one(
        "SELECT * FROM session WHERE server_id = ? AND tmux_name = ? ORDER BY seq DESC LIMIT 1",
        (server["id"], tmux_name),
    )
    if not session:
        session_id = moves.new_session(
            tx,
            project_id=server["project_id"],
            server_id=server["id"],
            name=tmux_name or "adopted",
            role="plain",
            created_by=f"server:{server['name']}",
        )
        execute(
            "UPDATE session SET tmux_name = ?, state = 'lost' WHERE id = ?", (tmux_name, session_id)
        )
        session = one("SELECT * FROM session WHERE id = ?", (session_id,))
    adopt.append({"tmux_name": tmux_name, "session_id": session["id"]})
    return session


def _reconcile(tx: Transaction, session: dict, item: dict, restarted: bool) -> dict:
    ended = session["state"] in ("closed", "failed")
    if not ended and item.get("alive", True):
        verb = "recover" if restarted or session["state"] == "lost" else "reconnect"
        move(tx, session, verb, HUB.actor)
    return {
        "session_id": session["id"],
        "action": "close" if ended and item.get("alive", True) else "keep",
        "log_acked": logs().end(session["id"]),
    }


def _lose(tx: Transaction, session: dict, why: str) -> None:
    """A session is gone without an end of its own: its task is tried again elsewhere."""
    move(tx, session, "lose", HUB.actor, reason=why)
    for task in _open_tasks_of(session):
        tasks.release(tx, task, f"its session is gone: {why}")


def reconnected(server_id: str) -> None:
    """The same agent instance is heard again after a silence."""
    with transaction() as tx:
        for session in _believed_alive(server_id):
            move(tx, session, "reconnect", HUB.actor)


def disconnected(server_id: str) -> None:
    """The agent's connection went silent."""
    with transaction() as tx:
        disconnect(tx, server_id)


def _open_tasks_of(session: dict) -> list[dict]:
    """The tasks whose present attempt this session works on: a worker's one, or what a plain
    session was given."""
    return [
        task
        for task in rows("SELECT * FROM task WHERE session_id = ?", (session["id"],))
        if task["status"] in cascade.HOLDS_SLOT and session["attempt"] in (None, task["attempt"])
    ]


def take_spooled(caller: Caller, frames: list[dict]) -> int:
    """Handle spooled frames in order, each once; the number up to which all are taken."""
    upto = _spool_upto(caller)
    for frame in frames:
        if frame["spool"] <= upto:
            continue
        with transaction() as tx:
            upto = _spool_upto(caller)  # again: a repeated call may be at work beside this one
            if frame["spool"] == upto + 1:
                _handle(tx, caller, frame)
                execute(
                    "UPDATE server SET spool_upto = ? WHERE id = ?", (upto + 1, caller.server_id)
                )
                upto += 1
        if frame["spool"] > upto:
            break  # one is missing before it: the agent sends on from `upto`
    return upto


def _spool_upto(caller: Caller) -> int:
    return one("SELECT spool_upto FROM server WHERE id = ?", (caller.server_id,))["spool_upto"]


def _handle(tx: Transaction, caller: Caller, frame: dict) -> None:
    """A frame that cannot be used must not stop those behind it: it is logged and passed."""
    handler = SPOOLED.get(frame.get("type"))
    if handler is None:
        return
    try:
        with transaction():
            handler(tx, caller, frame)
    except (Refused, cascade.RuleBroken) as refused:
        log.info("%s: %s not taken: %s", caller.name, frame.get("type"), refused)
    except MALFORMED as broken:
        log.warning("%s: malformed %s: %r", caller.name, frame.get("type"), broken)


def _own_session(caller: Caller, frame: dict) -> dict:
    session = one(
        "SELECT * FROM session WHERE id = ? AND server_id = ?",
        (frame["session_id"], caller.server_id),
    )
    if not session:
        raise NotFound(f"{caller.name} has no session {frame['session_id']!r}.")
    return session


def _session_started(tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    if session["state"] == "starting":
        _session_event(tx, session, "session_started", caller.actor, {"name": session["name"]})
    move(
        tx,
        session,
        "started",
        HUB.actor,
        pid=frame.get("pid"),
        tmux_name=frame.get("tmux_name") or session["tmux_name"],
        working_directory=frame.get("working_directory") or session["working_directory"],
        started_at=session["started_at"] or tx.now,
    )


def _session_error(tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    error = str(frame.get("error") or "the session could not be started")[:2000]
    open_tasks = _open_tasks_of(session)
    move(tx, session, "fail", caller.actor, error=error, closed_at=tx.now)
    for task in open_tasks:
        tasks.fail(caller, task["id"], error, task["attempt"])


def _session_recovered(tx, caller: Caller, frame: dict) -> None:
    move(tx, _own_session(caller, frame), "recover", caller.actor)


def _session_closed(tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    code = frame.get("exit_code")
    open_tasks = _open_tasks_of(session)
    move(
        tx,
        session,
        "close",
        caller.actor,
        exit_code=code,
        closed_at=tx.now,
        activity="idle",
        log_end=int(frame.get("log_end") or 0),
    )
    for task in open_tasks:
        if code is None:  # no program's end: the terminal itself is gone, as after a reboot
            tasks.release(tx, task, f"its terminal on {caller.name} is gone")
        else:
            error = f"the worker's session ended without a report (exit code {code})"
            tasks.fail(caller, task["id"], error, task["attempt"])


def _session_gap(tx, caller: Caller, frame: dict) -> None:
    """Output that the agent could not record is missing from the log, and the record says so."""
    missing = {k: frame.get(k) for k in ("from", "to", "why")}
    _session_event(tx, _own_session(caller, frame), "session_log_gap", caller.actor, missing)


ACTIVITIES = ("working", "idle", "waiting_input", "error", "quota", "no_signal")
BLOCKED = tuple(f"blocked:{what}" for what in ("permission", "question", "plan", "trust"))


def _session_activity(_tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    if frame.get("state") in ACTIVITIES + BLOCKED:
        execute(
            "UPDATE session SET activity = ?, reason = ? WHERE id = ?",
            (frame["state"], frame.get("reason"), session["id"]),
        )


def _task_report(_tx, caller: Caller, frame: dict) -> None:
    """An implicit report says only how the worker's program ended: what the worker has said
    itself before that stands."""
    if frame.get("implicit") and one(
        "SELECT 1 FROM attempt WHERE task_id = ? AND number = ?",
        (frame["task_id"], int(frame["attempt"])),
    ):
        return
    REPORTS[frame["outcome"]](caller, frame["task_id"], frame, int(frame["attempt"]))


def _report_started(caller: Caller, task_id: str, _frame: dict, attempt: int) -> None:
    tasks.start(caller, task_id, attempt)


def _report_complete(caller: Caller, task_id: str, frame: dict, attempt: int) -> None:
    """A completion that must be refused is recorded as a failed attempt with that sentence."""
    try:
        tasks.complete(caller, task_id, frame.get("result"), attempt)
    except cascade.BadContract as refused:
        tasks.fail(caller, task_id, str(refused), attempt)


def _report_fail(caller: Caller, task_id: str, frame: dict, attempt: int) -> None:
    tasks.fail(caller, task_id, str(frame.get("error") or "no reason given"), attempt)


REPORTS = {
    "started": _report_started,
    "complete": _report_complete,
    "fail": _report_fail,
}

SPOOLED = {
    "session_started": _session_started,
    "session_error": _session_error,
    "session_recovered": _session_recovered,
    "session_closed": _session_closed,
    "session_activity": _session_activity,
    "session_gap": _session_gap,
    "task_report": _task_report,
}


def take_passing(caller: Caller, frame: dict) -> list[dict]:
    """Handle a frame without a number; the frames to answer with. Unknown types are ignored."""
    handler = PASSING.get(frame.get("type"))
    if handler is None:
        return []
    try:
        return handler(caller, frame) or []
    except (NotFound, *MALFORMED) as broken:
        log.warning("%s: %s not taken: %s", caller.name, frame.get("type"), broken)
        return []


def _ack(caller: Caller, frame: dict) -> None:
    acknowledge(caller.server_id, [int(i) for i in frame["ids"]])


def _session_log(caller: Caller, frame: dict) -> list[dict]:
    session = _own_session(caller, frame)
    data = b64decode(frame["data"])
    if len(data) > BLOCK_MOST:
        raise ValueError(f"a block of {len(data)} bytes, the most is {BLOCK_MOST}")
    end = logs().append(session["id"], int(frame["offset"]), data, _when(frame.get("at")))
    bus.publish(f"session:{session['id']}", {"log_end": end})
    return [{"type": "log_ack", "session_id": session["id"], "offset": end}]


def _when(at) -> float:
    try:
        return datetime.fromisoformat(at).timestamp()
    except (TypeError, ValueError):
        return time.time()


def _session_screen(caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    lines = [str(line)[:1000] for line in frame["lines"][:500]]
    _screens[session["id"]] = {"lines": lines, "at": iso(_when(frame.get("at")))}
    _screens.move_to_end(session["id"])
    while len(_screens) > SCREENS_KEPT:
        _screens.popitem(last=False)
    bus.publish(f"session:{session['id']}", {"screen": lines})


def _session_typed(_caller: Caller, frame: dict) -> None:
    bus.publish(f"typed:{frame['request_id']}", frame)


PASSING = {
    "ack": _ack,
    "session_log": _session_log,
    "session_screen": _session_screen,
    "session_typed": _session_typed,
}
