"""Every use case on sessions: opening, typing, watching, closing, and the one door for their state.

`move` is the only door through which a session changes state.
"""

import re
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Iterator

import alerts
import cascade
import moves
import permissions
import reading
import routing
from auth import HUB, Caller, find, require
from logs import LogStore, Piece, asciicast
from models import (
    Conflict,
    Invalid,
    Transaction,
    bus,
    containing,
    dumps,
    execute,
    iso,
    labels,
    loads,
    new_id,
    newest,
    one,
    rows,
    transaction,
)

GRACE_S = 15.0
TYPING_S = 15.0  # how long a typed text may take to be confirmed
LIST_MOST = 500


def disconnect(tx: Transaction, server_id: str) -> None:
    """The server's connection is gone: its sessions go on there, unseen."""
    for session in believed_alive(server_id):
        if session["state"] in ("active", "recovering"):
            move(tx, session, "disconnect", HUB.actor)


def settle_recovering(now: float, grace: float = GRACE_S) -> int:
    """Recovered sessions that outlived their grace are active again; how many."""
    due = "state = 'recovering' AND state_at <= ?"
    found = rows(f"SELECT id FROM session WHERE {due}", (now - grace,))
    for each in found:
        with transaction() as tx:
            if session := one(
                f"SELECT * FROM session WHERE id = ? AND {due}", (each["id"], now - grace)
            ):
                move(tx, session, "settle", HUB.actor)
    return len(found)


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
    does not apply (a report that comes late or twice changes nothing), or when somebody else has
    moved it since the row was read."""
    starts, goal = cascade.SESSION_TRANSITIONS[verb]
    if session["state"] not in starts:
        return session
    after = session | changes | {"state": goal, "state_at": tx.now}
    changed = {k: v for k, v in after.items() if v != session[k]}
    done = execute(
        f"UPDATE session SET {', '.join(f'{c} = ?' for c in changed)} WHERE id = ? AND state = ?",
        (*changed.values(), session["id"], session["state"]),
    )
    if done.rowcount != 1:
        return one("SELECT * FROM session WHERE id = ?", (session["id"],))
    if goal in ("closed", "failed", "lost"):
        tx.tell("access")  # its key has died with it
    if goal in ("closed", "failed"):
        logs().ended(session["id"])
        permissions.end_of_session(tx, after)
        alerts.over(tx, session["id"], "stuck", "quota", "prompt")
    details = {"name": session["name"], "tmux": session["tmux_name"], "pid": after["pid"]}
    details |= {k: changes[k] for k in ("exit_code", "error", "reason") if k in changes}
    session_event(tx, after, EVENT_OF[verb], actor, details)
    return after


def session_event(tx: Transaction, session: dict, kind: str, actor: str, details: dict) -> None:
    tx.emit(
        kind,
        session["project_id"],
        actor,
        details,
        task=session["task_id"],
        session=session["id"],
        server=session["server_id"],
    )


def believed_alive(server_id: str) -> list[dict]:
    live = sorted(cascade.SESSION_LIVE)
    return rows(
        f"SELECT * FROM session WHERE server_id = ? AND state IN ({', '.join('?' * len(live))})",
        [server_id, *live],
    )


def list_sessions(
    project_ids: list[str],
    *,
    every: bool = False,
    status: str | None = None,
    q: str | None = None,
    server_id: str | None = None,
):
    """Session rows as JSON, newest first: the live ones, or every one, the last 500 of them.

    q: a part of the name, or of the title of the task.
    """
    if status and status not in cascade.SESSION_STATES:
        raise Invalid(f"Unknown status {status!r}: use one of {', '.join(cascade.SESSION_STATES)}.")
    states = [status] if status else sorted(cascade.SESSION_LIVE | {"lost"})
    branches = [{"project_id": project} for project in project_ids]
    if status or not every:
        branches = [b | {"state": state} for b in branches for state in states]
    where, values = [], []
    if server_id:
        where.append("server_id = ?")
        values.append(server_id)
    if q:
        where.append(
            "(name LIKE ? ESCAPE '\\' OR EXISTS (SELECT 1 FROM task WHERE task.id = session.task_id"
            " AND title LIKE ? ESCAPE '\\'))"
        )
        values += [containing(q)] * 2
    return session_views(newest("session", branches, " AND ".join(where), values, LIST_MOST))


def session_views(found: list[dict]) -> list[dict]:
    names = labels("server", "name", {s["server_id"] for s in found})
    titles = labels("task", "title", {s["task_id"] for s in found if s["task_id"]})
    stored = logs().extents([s["id"] for s in found])
    return [
        _session_json(s, names.get(s["server_id"]), titles, *stored.get(s["id"], (0, 0)))
        for s in found
    ]


def _session_json(row: dict, server_name: str, titles: dict, start: int, end: int) -> dict:
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
        "model": row["model"],
        "mode": row["mode"],
        "resumable": bool(row["conversation"]) and row["state"] not in cascade.SESSION_LIVE,
        "status": row["state"],
        "activity": row["activity"],
        "reason": row["reason"],
        "working_directory": row["working_directory"],
        "tmux_name": row["tmux_name"],
        "pid": row["pid"],
        "exit_code": row["exit_code"],
        "error": row["error"],
        "terminal": row["terminal"],
        "cols": row["cols"],
        "rows": row["rows"],
        "created_by": row["created_by"],
        "created_at": iso(row["created_at"]),
        "started_at": iso(row["started_at"]),
        "closed_at": iso(row["closed_at"]),
        "log_start": start,
        "log_end": max(row["log_end"], end) if ended else end,  # the last of it may still come
    }


def get_session(caller: Caller, ref: str) -> dict:
    return find("session", caller, ref, name="name")


def session_view(row: dict) -> dict:
    return session_views([row])[0]


def open_session(caller: Caller, data: dict) -> tuple[dict, bool]:
    """Start a session on a server; (row, made). For a task whose attempt has a live session, that
    one. Raises Conflict, NotFound, Forbidden."""
    server = find("server", caller, data["server_id"], name="name")
    require(caller, "session.open", server["project_id"], "server")
    if server["revoked"]:
        raise Conflict(f"Server {server['name']!r} is revoked: choose another one.")
    if data.get("resume"):
        data = data | _conversation(caller, server, data["resume"])
    with transaction() as tx:
        task = _task_for(caller, server, data.get("task_id"))
        if task and (live := _live_session_of(task)):
            return live, False
        _refuse_crowd(server)
        session_id = _new_session(tx, caller, server, task, data)
        session = one("SELECT * FROM session WHERE id = ?", (session_id,))
        if task:
            execute("UPDATE task SET session_id = ? WHERE id = ?", (session_id, task["id"]))
            moves.command(tx, server["id"], "task_assigned", session_id, task)
        else:
            moves.command(tx, server["id"], "session_start", session_id)
        session_event(tx, session, "session_requested", caller.actor, {"name": session["name"]})
    return session, True


def _conversation(caller: Caller, server: dict, ref: str) -> dict:
    """What a session takes over that goes on with the conversation of another. Raises Conflict."""
    earlier = get_session(caller, ref)
    if earlier["state"] in cascade.SESSION_LIVE:
        raise Conflict(
            f"Session {earlier['name']!r} is {earlier['state']}: its conversation goes on there."
        )
    if not earlier["conversation"]:
        raise Conflict(
            f"Session {earlier['name']!r} has no conversation that could be taken up again: start "
            "a new one."
        )
    if earlier["server_id"] != server["id"]:
        raise Conflict(
            f"The conversation of {earlier['name']!r} lies on another server: resume it there."
        )
    kept = ("profile", "model", "mode", "repo", "conversation")
    return {name: earlier[name] for name in kept} | {"working_dir": earlier["working_directory"]}


def _refuse_crowd(server: dict) -> None:
    """The public daemon reads its terminals with a few threads: with more sessions than its
    slots output would stall. Raises Conflict."""
    slots, live = routing.server_value(server)["slots"], len(believed_alive(server["id"]))
    if server["protocol"] == 1 and live >= slots:
        raise Conflict(
            f"Server {server['name']!r} has {live} sessions, the most its daemon can serve: "
            "close one, or raise the server's slots.",
            code="crowded",
        )


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
    session = one("SELECT * FROM session WHERE id = ?", (task["session_id"],))
    return session if session and session["state"] in cascade.SESSION_LIVE else None


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
        model=data.get("model") or (task or {}).get("model"),
        mode=data.get("mode") or (task or {}).get("mode"),
        resumes=data.get("conversation"),
        command=dumps(data["command"]) if data.get("command") else (task or {}).get("command"),
        working_directory=data.get("working_dir"),
        repo=loads(task["requirements"]).get("repo") if task else data.get("repo"),
        cols=data.get("cols") or 120,
        rows=data.get("rows") or 40,
        created_by=caller.actor,
    )


def _reach(session: dict, frame: dict) -> None:
    """Send the session's server a frame for the moment. Raises Conflict when nobody takes it."""
    server = _reachable(session)
    if not bus.publish(f"server:{server['id']}", frame | {"session_id": session["id"]}):
        raise Conflict(
            f"Session {session['name']!r} cannot be reached now ({server['name']} is not connected "
            "or takes nothing): nothing was typed, try again in a moment.",
            code="offline",
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
        _reach(session, {"type": "session_type", "request_id": request_id, "text": text})
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
    try:
        b64decode(data, validate=True)
    except ValueError:
        raise Invalid("`data` is not valid base64.", field="data") from None
    _reach(session, {"type": "session_input", "data": data})


def resize(caller: Caller, ref: str, cols: int, lines: int) -> dict:
    session = get_session(caller, ref)
    require(caller, "session.type", session["project_id"], "session")
    _reach(session, {"type": "session_resize", "cols": cols, "rows": lines})
    with transaction() as tx:
        execute("UPDATE session SET cols = ?, rows = ? WHERE id = ?", (cols, lines, session["id"]))
        tx.tell(f"session:{session['id']}")
    logs().resized(session["id"], cols, lines, (session["cols"], session["rows"]))
    return one("SELECT * FROM session WHERE id = ?", (session["id"],))


def explain(caller: Caller, ref: str) -> dict:
    """What a session is doing, which signal says so, and what each source of signals said last."""
    session = get_session(caller, ref)
    require(caller, "read", session["project_id"], "session")
    return {
        "session_id": session["id"],
        "name": session["name"],
        "activity": session["activity"],
        "reason": session["reason"],
        "signal": session["signal"],
        "since": iso(session["activity_at"]),
        "progress": iso(session["progress_at"]),
        "signals": loads(session["signals"]),
    }


def ask_scrollback(caller: Caller, ref: str) -> None:
    """Have the session's server send the whole history of its terminal. Raises Conflict."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    _reach(session, {"type": "capture_scrollback"})


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


SCREENS_KEPT = 2000
screens: OrderedDict[str, dict] = OrderedDict()
_logs: LogStore | None = None


def use_logs(store: LogStore) -> None:
    global _logs
    _logs = store
    store.removed = _log_removed


def logs() -> LogStore:
    return _logs


def screen(caller: Caller, ref: str) -> dict:
    """The last screen the agent sent: {lines, at}."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    return screens.get(session["id"], {"lines": [], "at": None})


def _log_removed(session_id: str, why: str) -> None:
    with transaction() as tx:
        session = one("SELECT * FROM session WHERE id = ?", (session_id,))
        if session:
            details = {"name": session["name"], "why": why}
            session_event(tx, session, "session_log_removed", HUB.actor, details)


def output(caller: Caller, ref: str, offset: int, limit: int) -> Piece:
    """Bytes of the complete log from `offset` on, or from what is there behind it."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    return logs().read(session["id"], offset, limit)


def marks(caller: Caller, ref: str) -> list[dict]:
    """What is missing from the log, and why."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    return logs().marks(session["id"])


def recording(caller: Caller, ref: str) -> tuple[str, Iterator[str]]:
    """The log as an asciicast: a name for its file, and its lines, read as they are taken."""
    session = get_session(caller, ref)
    require(caller, "session.watch", session["project_id"], "session")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", session["name"]).strip("-.")[:80] or "session"
    lines = asciicast(
        logs(),
        session["id"],
        title=session["name"],
        size=(session["cols"], session["rows"]),
        began=session["started_at"] or session["created_at"],
    )
    return f"{name}-{session['id'][:8]}.cast", lines
