"""What agents and hub say to each other, whichever carrier brings it: commands out, reports and
output in. Frames are handled by the tables SPOOLED and PASSING.
"""

import logging
import sqlite3
import time
import uuid
from base64 import b64decode
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import alerts
import auth
import backup
import cascade
import inbox
import leases
import logs
import moves
import permissions
import prompts
import reading
import routing
import rules
import servers
import sessions
import tasks
import terminals
from auth import HUB, Caller
from models import (
    Conflict,
    Glimpse,
    NotFound,
    Refused,
    Server,
    Transaction,
    bus,
    dumps,
    execute,
    in_chunks,
    is_unheard,
    iso,
    loads,
    one,
    rows,
    since_epoch,
    transaction,
)

log = logging.getLogger("orchestratia.wire")


ENGINE = Path(rules.__file__).read_text()
POLL_SILENCE_S = 40.0
RESEND_S = 10.0
COMMANDS_AT_ONCE = 200
BLOCK_MOST = 64 * 1024
BIGGEST_S = 10**9  # a block's bytes were printed within so many seconds
WHY_MOST = 500
SIGNALS_MOST = 20_000  # characters of what the sources of signals said
SESSIONS_MOST = 1000  # one server may name at once
NUMBER_MOST = 2**53  # JSON has no larger whole numbers everywhere


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
        if session and session["state"] == "starting" and moves.starts(row, session):
            why = "its task was taken back before it started"
            sessions.move(tx, session, "close", HUB.actor, reason=why, closed_at=tx.now)


def acknowledge(server_id: str, ids: list[int]) -> None:
    with transaction() as tx:
        for part, marks in in_chunks(ids):
            execute(
                f"UPDATE command SET acked_at = ? WHERE server_id = ? AND id IN {marks}",
                [tx.now, server_id, *part],
            )


def claim(server_id: str, ids: list[int]) -> set[int]:
    """Acknowledge commands before they are sent, for an agent that cannot: each is sent at most
    once, whatever happens. The ids that are the caller's to send."""
    with transaction() as tx:
        return {
            claimed
            for part, marks in in_chunks(ids)
            for (claimed,) in execute(
                f"UPDATE command SET acked_at = ? WHERE server_id = ? AND id IN {marks}"
                " AND acked_at IS NULL RETURNING id",
                [tx.now, server_id, *part],
            ).fetchall()
        }


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
        "prompt": prompts.of_session(session),
        "resume": session["resumes"],
        **_options(session),
        "env": {},
        "task_id": session["task_id"],
        "attempt": session["attempt"],
    }


def _options(session: dict) -> dict:
    """{model, mode} a coding agent is started with: its own, else those of its project."""
    project = one("SELECT settings FROM project WHERE id = ?", (session["project_id"],))
    usual = loads(project["settings"])
    return {name: session[name] or usual.get(name) for name in ("model", "mode")}


def _compose_plain(row: dict) -> dict:
    matter = loads(row["body"])
    return {
        "session_id": row["session_id"],
        "task_id": row["task_id"],
        "attempt": row["attempt"],
    } | matter


def _compose_for_worker(row: dict) -> dict | None:
    """Words for whoever works on a task: pointless when the attempt is over."""
    task = moves.row(row["task_id"])
    if task["attempt"] != row["attempt"] or task["status"] not in cascade.HOLDS_SLOT:
        return None
    return _compose_plain(row)


def _compose_question(row: dict) -> dict | None:
    frame = _compose_plain(row)
    asked = one("SELECT status FROM intervention WHERE id = ?", (frame["intervention_id"],))
    return frame if asked and asked["status"] == "pending" else None


def _compose_decision(row: dict) -> dict | None:
    frame = _compose_plain(row)
    asked = one("SELECT delivery FROM permission WHERE id = ?", (frame["request_id"],))
    return frame if asked and asked["delivery"] == "sent" else None


def _compose_rules(row: dict) -> dict:
    return {"rules": rules_of(row["server_id"])}


def rules_of(server_id: str) -> dict:
    """The rules an agent keeps for when the hub is away, with the engine that reads them: {etag,
    engine, rules}. The engine comes along so that a rule means the same everywhere."""
    server = one("SELECT * FROM server WHERE id = ?", (server_id,))
    copy = {"engine": ENGINE, "rules": permissions.rules_of_server(server)}
    copy["origin"] = {"project_id": server["project_id"], "server_id": server_id}
    return copy | {"etag": auth.digest(dumps(copy))[:16]}


COMPOSE = {
    "permission_answer": _compose_decision,
    "rules_changed": _compose_rules,
    "task_assigned": _compose_assigned,
    "session_start": _compose_start,
    "session_close": _compose_plain,
    "task_cancelled": _compose_plain,
    "task_updated": _compose_plain,
    "task_status_update": _compose_plain,
    "intervention_response": _compose_for_worker,
    "intervention_for_session": _compose_question,
    "plan_approved": _compose_for_worker,
    "plan_revision": _compose_for_worker,
    "task_note": _compose_for_worker,
}
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


def spool_of(frame: dict) -> tuple[str, int, int | None]:
    """(id, lowest number held, highest number ever given out if it is said) of an agent's spool, as
    its auth frame has them. Raises ValueError or TypeError."""
    last = frame.get("spool_last")
    first = int(frame.get("spool_first") or 1)
    return spool_id_of(frame), first, None if last is None else int(last)


def spool_id_of(frame: dict) -> str:
    return str(frame.get("spool_id") or "")


def greet(caller: Caller, frame: dict) -> None:
    """Take note of who connects: version, and where its spool stands. A state directory that was
    set back to an earlier state numbers its reports anew from there: they are new ones. (Not so of
    a process that was here before: it may have reported by another way since it said so.)"""
    spool_id, first, last = spool_of(frame)
    with transaction():
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        known = server["spool_upto"] if server["spool_id"] == spool_id else 0
        if last is not None and frame.get("instance") != server["instance"]:
            known = min(known, last)
        execute(
            "UPDATE server SET protocol = 2, agent_version = ?, spool_id = ?, spool_upto = ?"
            " WHERE id = ?",
            (str(frame.get("agent_version") or ""), spool_id, max(known, first - 1), server["id"]),
        )


def synced(server_id: str) -> int:
    """The number of the last sync of a server's agents that took effect."""
    return one("SELECT synced FROM server WHERE id = ?", (server_id,))["synced"]


def refuse_late(caller: Caller, frame: dict) -> int | None:
    """The number of a sync, which rises with each of a server, whichever of its agents makes it;
    None from an agent that does not number them. Raises Conflict `late_sync` for one that was made
    before another that took effect, as a copy is that a network had kept: what it says of the
    sessions is not so any more. An agent that starts anew is told from where on to count.
    """
    number = frame.get("number")
    if number is None:
        return None
    if not 0 < int(number) < NUMBER_MOST:
        raise ValueError(f"no number of a sync: {number!r}")
    known = synced(caller.server_id)
    if int(number) <= known:
        raise Conflict(
            f"This sync (number {number}) was made before the last one the hub knows ({known}): "
            "make a new one with a higher number.",
            code="late_sync",
            synced=known,
        )
    return int(number)


def sync(caller: Caller, frame: dict) -> dict:
    """Compare what the agent has with what should be, repair the difference; the sync_ok frame."""
    instance = str(frame.get("instance") or "")
    if len(frame.get("sessions") or ()) > SESSIONS_MOST:
        raise ValueError(f"more than {SESSIONS_MOST} sessions")
    servers.note_clock(caller.server_id, frame.get("time"))
    with transaction() as tx:
        number = refuse_late(caller, frame)
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        restarted = server["instance"] != instance
        _update_capabilities(server, frame.get("capabilities") or {}, instance)
        if number:
            execute("UPDATE server SET synced = ? WHERE id = ?", (number, server["id"]))
        answer, named, adopt = [], set(), []
        ahead = is_unheard(server["id"])
        for item in frame.get("sessions") or ():
            session, is_stranger = _named_session(tx, server, item)
            if ahead and not session["task_id"] and item.get("task_id"):
                backup.take_over(tx, session, str(item["task_id"]), int(item["attempt"]))
                session = one("SELECT * FROM session WHERE id = ?", (session["id"],))
            if ahead and item.get("alive", True):
                session = _believed_begun(tx, caller, session, item)
            named.add(session["id"])
            agreed = _reconcile(tx, session, item, restarted)
            answer.append(agreed)
            if is_stranger and agreed["action"] == "keep":
                adopt.append(_adoption(session, item, agreed["log_acked"]))
        _named_all(tx, server["id"], named)
        routing.place_waiting(tx, one("SELECT * FROM server WHERE id = ?", (server["id"],)))
    return {"type": "sync_ok", "sessions": answer, "adopt": adopt}


def _believed_begun(tx: Transaction, caller: Caller, session: dict, item: dict) -> dict:
    """The session as it is when what its agent has running has begun: the hub was restored, and
    its agent, which has said so once, does not say it again."""
    if session["state"] == "starting":
        _session_started(tx, caller, item | {"session_id": session["id"]})
    for task in _open_tasks_of(session):
        if task["status"] == "assigned" and task["id"] == session["task_id"]:
            tasks.start(HUB, task["id"], task["attempt"])
    return one("SELECT * FROM session WHERE id = ?", (session["id"],))


def _update_capabilities(server: dict, has: dict, instance: str) -> None:
    columns = {"instance": instance}
    if "repos" in has:
        columns["repos"] = servers.repos_of(has["repos"])
    columns |= {kind: _words(has[kind]) for kind in cascade.LISTS if kind in has}
    columns |= {k: has[k] for k in ("profiles", "os") if has.get(k)}
    if has.get("slots") and isinstance(has["slots"], int):
        columns["slots"] = min(max(has["slots"], 1), servers.SLOTS_MOST)
    Server.update(**columns).where(Server.id == server["id"]).execute()


def _words(given) -> list[str] | None:
    """A declared list, or None for undeclared. Raises ValueError for anything else."""
    if given is None or (isinstance(given, list) and all(isinstance(w, str) for w in given)):
        return given
    raise ValueError(f"not a list of words: {given!r}")


def _named_session(tx: Transaction, server: dict, item: dict) -> tuple[dict, bool]:
    """The hub's row of a session the agent has, and whether the agent knows nothing of it but its
    name in tmux. One the hub does not know is adopted."""
    session = item.get("session_id") and one(
        "SELECT * FROM session WHERE id = ? AND server_id = ?", (item["session_id"], server["id"])
    )
    if session:
        return session, False
    tmux_name = str(item.get("tmux_name") or "")
    if item.get("session_id"):
        with suppress(ValueError):  # else it is a stranger, by its name in tmux
            return _adopted_as(tx, server, item), False
    return by_tmux_name(server["id"], tmux_name) or _adopted(tx, server, tmux_name), True


def _adoption(session: dict, item: dict, log_acked: int) -> dict:
    """What an agent is told of a terminal that it found and has lost its notes of."""
    known = ("task_id", "attempt", "profile", "conversation", "working_directory")
    told = {"tmux_name": str(item.get("tmux_name") or ""), "session_id": session["id"]}
    return told | {name: session[name] for name in known} | {"log_acked": log_acked}


def by_tmux_name(server_id: str, tmux_name: str) -> dict | None:
    """The newest session of the server that tmux knows by this name."""
    start = tmux_name.removeprefix("orc-")  # the start of its id, unless it was adopted
    return one(
        "SELECT * FROM session WHERE id >= ? AND id < ? AND server_id = ? AND tmux_name = ?",
        (start, start + "g", server_id, tmux_name),
    ) or one(
        "SELECT * FROM session WHERE server_id = ? AND tmux_name = ? AND tmux_name <> ''"
        " ORDER BY seq DESC LIMIT 1",
        (server_id, tmux_name),
    )


def _adopted(tx: Transaction, server: dict, tmux_name: str, **more) -> dict:
    session_id = moves.new_session(
        tx,
        project_id=server["project_id"],
        server_id=server["id"],
        name=tmux_name or "adopted",
        tmux_name=tmux_name,
        role="plain",
        state="lost",  # until it is taken up again
        created_by=f"server:{server['name']}",
        **more,
    )
    return one("SELECT * FROM session WHERE id = ?", (session_id,))


def _reconcile(tx: Transaction, session: dict, item: dict, restarted: bool) -> dict:
    ended = session["state"] in ("closed", "failed")
    if not ended and item.get("alive", True):
        verb = "recover" if restarted or session["state"] == "lost" else "reconnect"
        sessions.move(tx, session, verb, HUB.actor)
    return {
        "session_id": session["id"],
        "action": "close" if ended and item.get("alive", True) else "keep",
        "log_acked": sessions.logs().end(session["id"]),
    }


def take_up(caller: Caller, item: dict, restarted: bool) -> dict:
    """A session that an agent without `sync` has: it is alive (again) unless it had ended here.
    Its row as it was before. An unknown one is adopted, under the id it comes with if it has one.

    item: as in `sync`. restarted: the agent has found it, and did not have it all the time.
    """
    with transaction() as tx:
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        if item.get("session_id"):
            session = _adopted_as(tx, server, item)
        else:
            session, _ = _named_session(tx, server, item)
        if session["state"] == "starting":
            _session_started(tx, caller, item | {"session_id": session["id"]})
        else:
            _reconcile(tx, session, item, restarted)
    return session


def _adopted_as(tx: Transaction, server: dict, item: dict) -> dict:
    """The session of that id; raises ValueError when it can be none of this server."""
    session_id = item["session_id"]
    if str(uuid.UUID(session_id)) != session_id:
        raise ValueError(f"not an id as this hub writes them: {session_id!r:.100}")
    session = one("SELECT * FROM session WHERE id = ?", (session_id,))
    if session and session["server_id"] != server["id"]:
        raise ValueError(f"{session_id} is a session of another server")
    return session or _adopted(
        tx,
        server,
        str(item.get("tmux_name") or ""),
        id=session_id,
        terminal=_terminal_of(item, {"terminal": "tmux"}),
        pid=item.get("pid") if isinstance(item.get("pid"), int) else None,
        profile=str(item["profile"])[:100] if item.get("profile") else None,
        working_directory=str(item.get("working_directory") or "")[:4000] or None,
        conversation=_conversation_of(item),
    )


def lose_others(server_id: str, named: set[str]) -> None:
    """The sessions named are all that the agent has."""
    with transaction() as tx:
        _named_all(tx, server_id, named)


def _named_all(tx: Transaction, server_id: str, named: set[str]) -> None:
    """The server has said what it has: what else was believed alive is lost."""
    unheard = is_unheard(server_id)
    _lose_others(tx, server_id, named, leases.RESTORED if unheard else "")
    if unheard:
        backup.caught_up(server_id)


def _lose_others(tx: Transaction, server_id: str, named: set[str], doubt: str = "") -> None:
    """doubt: why a task that is lost now is left to a person in any case."""
    for session in sessions.believed_alive(server_id):
        if session["id"] not in named and (doubt or session["state"] != "starting"):
            _lose(tx, session, f"the agent does not have it any more{doubt}", bool(doubt))


def _lose(tx: Transaction, session: dict, why: str, ask: bool) -> None:
    """A session is gone without an end of its own: its task is tried again, or a person asked."""
    sessions.move(tx, session, "lose", HUB.actor, reason=why)
    for task in _open_tasks_of(session):
        leases.lose(tx, task, f"its session is gone: {why}", ask)


def reconnected(server_id: str) -> None:
    """The same agent instance is heard again after a silence."""
    with transaction() as tx:
        for session in sessions.believed_alive(server_id):
            sessions.move(tx, session, "reconnect", HUB.actor)


def disconnected(server_id: str, still=lambda: True) -> None:
    """The agent's connection went silent. still: asked when we have the turn to change it."""
    with transaction() as tx:
        if still():
            sessions.disconnect(tx, server_id)


def _open_tasks_of(session: dict) -> list[dict]:
    """The tasks whose present attempt this session works on: a worker's one, or what a plain
    session was given."""
    return [
        task
        for task in rows(
            f"SELECT * FROM task WHERE server_id = ? AND {moves.HELD} AND session_id = ?",
            (session["server_id"], session["id"]),
        )
        if session["attempt"] in (None, task["attempt"])
    ]


def take_spooled(caller: Caller, frames: list[dict], spool_id: str | None = None) -> int:
    """Handle spooled frames in order, each once; the number up to which all are taken.

    spool_id: whose numbers they carry, if it is known. Raises Conflict `sync_required` when those
    of another count by now: nothing may be acknowledged then.
    """
    upto = _spool_upto(caller, spool_id)
    for frame in frames:
        if frame["spool"] <= upto:
            continue
        if frame["spool"] == upto + 1 and not _log_taken(caller, frame):
            break  # the disk is full, for one: the agent sends it again
        with transaction() as tx:
            # Again: a repeated call may be at work beside this one.
            upto = _spool_upto(caller, spool_id)
            if frame["spool"] == upto + 1:
                _handle(tx, caller, frame)
                execute(
                    "UPDATE server SET spool_upto = ? WHERE id = ?", (upto + 1, caller.server_id)
                )
                upto += 1
        if frame["spool"] > upto:
            break  # one is missing before it: the agent sends on from `upto`
    return upto


def take_report(caller: Caller, frame: dict) -> None:
    """Handle what would be spooled, from an agent that does not number it."""
    with transaction() as tx:
        _handle(tx, caller, frame)


def _spool_upto(caller: Caller, spool_id: str | None) -> int:
    server = one("SELECT spool_id, spool_upto FROM server WHERE id = ?", (caller.server_id,))
    if spool_id not in (None, server["spool_id"]):
        raise Conflict(
            "Another agent with another state directory has connected with this server's key: send "
            "auth and sync first. Run one agent per state directory.",
            code="sync_required",
        )
    return server["spool_upto"]


def _handle(tx: Transaction, caller: Caller, frame: dict) -> None:
    """A frame that cannot be used must not stop those behind it: it is logged and passed."""
    handler = SPOOLED.get(frame.get("type"))
    if handler is None:
        return
    try:
        with transaction():
            handler(tx, caller, frame)
    except (Refused, cascade.RuleBroken) as refused:
        log.info("%s: %s not taken: %.300s", caller.name, frame.get("type"), refused)
    except MALFORMED as broken:
        log.warning("%s: malformed %s: %.300r", caller.name, frame.get("type"), broken)


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
        sessions.session_event(
            tx, session, "session_started", caller.actor, {"name": session["name"]}
        )
    sessions.move(
        tx,
        session,
        "started",
        HUB.actor,
        pid=frame.get("pid"),
        tmux_name=frame.get("tmux_name") or session["tmux_name"],
        working_directory=frame.get("working_directory") or session["working_directory"],
        started_at=session["started_at"] or tx.now,
        terminal=_terminal_of(frame, session),
        conversation=_conversation_of(frame),
    )


def _conversation_of(frame: dict) -> str | None:
    """The id by which a coding agent can take up its conversation again."""
    given = frame.get("conversation")
    return str(given)[:200] if given else None


TERMINALS = ("tmux", "pty")


def _terminal_of(frame: dict, session: dict) -> str:
    """What keeps the session: tmux, or the agent itself (`pty`), with which it then ends."""
    given = frame.get("terminal")
    return given if given in TERMINALS else session["terminal"]


def _session_error(tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    error = str(frame.get("error") or "the session could not be started")[:2000]
    open_tasks = _open_tasks_of(session)
    sessions.move(tx, session, "fail", caller.actor, error=error, closed_at=tx.now)
    for task in open_tasks:
        tasks.fail(caller, task["id"], error, task["attempt"])


def _session_recovered(tx, caller: Caller, frame: dict) -> None:
    sessions.move(tx, _own_session(caller, frame), "recover", caller.actor)


def _session_closed(tx, caller: Caller, frame: dict) -> None:
    """gone: its terminal has ended, not its program, so its task is lost; told by the lack of an
    exit code, unless the agent says it."""
    session = _own_session(caller, frame)
    code = frame.get("exit_code")
    open_tasks = _open_tasks_of(session)
    sessions.move(
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
        if frame.get("gone", code is None):  # as after a reboot
            leases.lose(tx, task, f"its terminal on {caller.name} is gone")
        else:
            shown = "unknown" if code is None else code
            error = f"the worker's session ended without a report (exit code {shown})"
            tasks.fail(caller, task["id"], error, task["attempt"])


def _session_gap(tx, caller: Caller, frame: dict) -> None:
    """Output that the agent could not record is missing from the log, and the record says so."""
    start, stop, why = _gap_of(frame)
    missing = {"from": start, "to": stop, "why": why}
    sessions.session_event(
        tx, _own_session(caller, frame), "session_log_gap", caller.actor, missing
    )


def _gap_of(frame: dict) -> tuple[int, int | None, str]:
    start, stop = int(frame["from"]), frame.get("to")
    stop = None if stop is None else int(stop)
    logs.check_gap(start, stop)
    return start, stop, str(frame.get("why") or "it was not recorded")[:WHY_MOST]


def _log_taken(caller: Caller, frame: dict) -> bool:
    """Have what the frame says of a log stored in the logs' own file, before the frame counts as
    taken; whether it is there. One that cannot be used is passed on: its handler says so."""
    if frame.get("type") != "session_gap":
        return True
    try:
        session = _own_session(caller, frame)
        acknowledged = partial(_logged, caller.server_id, session["id"])
        return sessions.logs().gap(session["id"], *_gap_of(frame), acknowledged)
    except (NotFound, *MALFORMED):
        return True


def _permission_requested(tx, caller: Caller, frame: dict) -> None:
    permissions.requested(tx, caller, _own_session(caller, frame), frame)


def _permission_ended(tx, caller: Caller, frame: dict) -> None:
    permissions.answered_there(tx, frame, _own_session(caller, frame))


# What an agent says of something it was to type or press: (what that is called here, alert?).
DELIVERIES = {
    "delivered": ("delivered", False),
    "typed": ("typed", False),
    "delivery_unknown": ("unknown", True),
    "not_delivered": ("failed", True),
}


def _agent_event(tx, caller: Caller, frame: dict) -> None:
    """What became of a command that a session was to be told of."""
    if frame.get("kind") not in DELIVERIES or not frame.get("session_id"):
        return
    session = _own_session(caller, frame)
    how, is_alert = DELIVERIES[frame["kind"]]
    why = str(frame.get("why") or "")[:WHY_MOST] or None
    if frame.get("request_id"):
        permissions.delivered(tx, session, str(frame["request_id"]), how, why)
    if frame.get("intervention_id"):
        inbox.delivered(tx, session, str(frame["intervention_id"]), how, why)
    if is_alert:
        about = str(frame.get("command_id") or "")
        alerts.undelivered(tx, session, how, why, command=frame.get("command"), about=about)


ACTIVITIES = ("working", "idle", "waiting_input", "error", "quota", "no_signal")
BLOCKED = tuple(f"blocked:{what}" for what in ("permission", "question", "plan", "trust"))


def _session_activity(tx, caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    state, reason = frame.get("state"), frame.get("reason")
    if state not in ACTIVITIES + BLOCKED:
        return
    reason = reason and str(reason)[:WHY_MOST]
    execute(
        "UPDATE session SET activity = ?, reason = ?, signal = ?, signals = ?, activity_at = ?,"
        " progress_at = ? WHERE id = ?",
        (
            state,
            reason,
            str(frame.get("signal") or "")[:200] or None,
            _signals(frame.get("signals")),
            _moment(caller, frame.get("since"), tx.now),
            _moment(caller, frame.get("progress"), tx.now),
            session["id"],
        ),
    )
    if session["activity"] == "quota" != state:
        alerts.over(tx, session["id"], "quota", actor=caller.actor)
    if state == "quota" != session["activity"]:
        sentence = f"{session['name']} stands at a usage limit: {reason or 'no reason given'}."
        alerts.begin(tx, "quota", session["project_id"], sentence, session=session)
    tx.tell(f"session:{session['id']}")
    tx.tell("glimpses", Glimpse(session["project_id"], session["id"]))


def _signals(given) -> str:
    """What each source of signals said last, as it is stored; nothing when it makes no sense."""
    written = dumps(given) if isinstance(given, list) else "[]"
    return written if len(written) <= SIGNALS_MOST else "[]"


def _moment(caller: Caller, given, now: float) -> float:
    """A time an agent gives by its clock, in seconds since 1970, never in the future."""
    if not isinstance(given, (int, float)):
        return now
    return min(servers.by_our_clock(caller.server_id, float(given)), now)


def _task_report(_tx, caller: Caller, frame: dict) -> None:
    """An implicit report says only how the worker's program ended: what the worker has said
    itself before that stands. One whose work was given to another meanwhile is heard, too late."""
    if frame.get("implicit") and one(
        "SELECT 1 FROM attempt WHERE task_id = ? AND number = ? AND outcome <> 'release'",
        (frame["task_id"], int(frame["attempt"])),
    ):
        return
    try:
        REPORTS[frame["outcome"]](caller, frame["task_id"], frame, int(frame["attempt"]))
    except Conflict as refused:
        if refused.code != "late":
            raise
        log.info("%s: %s", caller.name, refused)  # it is kept as an event


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
    "permission_requested": _permission_requested,
    "permission_ended": _permission_ended,
    "agent_event": _agent_event,
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
        log.warning("%s: %s not taken: %.300s", caller.name, frame.get("type"), broken)
        return []


def _ack(caller: Caller, frame: dict) -> None:
    acknowledge(caller.server_id, [int(i) for i in frame["ids"]])


def _session_log(caller: Caller, frame: dict) -> None:
    """Have a block stored; it is acknowledged once it is on the disk. Waits while too much waits
    to be stored."""
    session = _own_session(caller, frame)
    data = b64decode(frame["data"])
    if len(data) > BLOCK_MOST:
        raise ValueError(f"a block of {len(data)} bytes, the most is {BLOCK_MOST}")
    at, times = _when(caller, frame.get("at")), _times(frame.get("times"), len(data))
    acknowledged = partial(_logged, caller.server_id, session["id"])
    sessions.logs().append(session["id"], int(frame["offset"]), data, at, times, acknowledged)


def _logged(server_id: str, session_id: str, end: int) -> None:
    """The log is on the disk up to `end`."""
    ack = {"type": "log_ack", "session_id": session_id, "offset": end}
    bus.publish(f"server:{server_id}", ack)


def _times(given, size: int) -> list:
    """When the bytes of a block were printed, as it is stored; nothing when it makes no sense."""
    try:
        times = [[int(n), round(float(t), 3)] for n, t in given or ()]
    except (TypeError, ValueError, OverflowError):
        return []
    steps = [[0, 0.0], *times, [size, BIGGEST_S]]
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(steps))
    return times if rising else []


def _when(caller: Caller, at) -> float:
    try:
        return min(servers.by_our_clock(caller.server_id, since_epoch(at)), time.time())
    except (TypeError, ValueError):
        return time.time()


def _session_screen(caller: Caller, frame: dict) -> None:
    session = _own_session(caller, frame)
    lines = [str(line)[:1000] for line in frame["lines"][:500]]
    sessions.screens[session["id"]] = {"lines": lines, "at": iso(_when(caller, frame.get("at")))}
    sessions.screens.move_to_end(session["id"])
    while len(sessions.screens) > sessions.SCREENS_KEPT:
        sessions.screens.popitem(last=False)
    bus.publish(f"session:{session['id']}", {"screen": lines})


def _session_typed(_caller: Caller, frame: dict) -> None:
    bus.publish(f"typed:{frame['request_id']}", frame)


def _session_output(caller: Caller, frame: dict) -> None:
    terminals.streams.output(caller.server_id, frame)


def _scrollback_captured(caller: Caller, frame: dict) -> None:
    terminals.streams.scrollback(caller.server_id, frame)


def _capabilities(caller: Caller, frame: dict) -> None:
    """The server can do something else than it said when it connected."""
    with transaction() as tx:
        server = one("SELECT * FROM server WHERE id = ?", (caller.server_id,))
        _update_capabilities(server, frame["capabilities"], server["instance"])
        routing.place_waiting(tx, one("SELECT * FROM server WHERE id = ?", (server["id"],)))


def _heartbeat(caller: Caller, frame: dict) -> None:
    info = frame.get("system_info")
    servers.heartbeat(caller, info if isinstance(info, dict) else None)


def _ping(caller: Caller, frame: dict) -> None:
    """Answered behind everything that was due to be sent when it came."""
    bus.publish(f"server:{caller.server_id}", {"type": "pong", "n": frame.get("n")})


PASSING = {
    "ack": _ack,
    "ping": _ping,
    "heartbeat": _heartbeat,
    "session_output": _session_output,
    "scrollback_captured": _scrollback_captured,
    "session_log": _session_log,
    "session_screen": _session_screen,
    "session_typed": _session_typed,
    "capabilities": _capabilities,
}
