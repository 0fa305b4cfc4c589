"""Who gets a task that is ready: ranks the servers of its project, takes a slot, gives the task.

A task nobody fits waits in an index by what it asks for, so that a server that comes online or
frees a slot looks only at tasks it could take.
"""

from functools import lru_cache

import cascade
import moves
from auth import HUB
from models import Transaction, execute, loads, one, rows
from moves import LIVE_SESSION


def wanted(task: dict) -> dict:
    """What routing asks of a server for this task; one given by hand asks for that server."""
    requirements = _parsed(task["requirements"])
    if task["pinned_server"]:
        return {"server": task["pinned_server"], "repo": requirements.get("repo")}
    if task["profile"] in (None, "command") or task["pinned_session"]:
        return requirements
    return requirements | {"agents": [*requirements.get("agents", ()), task["profile"]]}


@lru_cache(maxsize=4096)
def _parsed(text: str | None):
    """Parsed JSON of a column, to be read only: the same few texts come at every routing."""
    return loads(text)


def server_value(row: dict) -> dict:
    """A server row as `cascade.rank` wants it; what an admin declared on the hub counts first."""
    declared = _parsed(row["declared"])
    value = {
        "id": row["id"],
        "name": row["name"],
        "status": server_status(row),
        "repos": {**_parsed(row["repos"]), **(declared.get("repos") or {})},
        "slots": declared.get("slots") or row["slots"],
        "busy": row["busy"],
        "manual": bool(row["manual"]) or row["protocol"] == 1,  # which starts no workers by itself
    }
    value["agents"] = None if value["manual"] else list(_parsed(row["profiles"])) or None
    for kind in cascade.LISTS:
        value[kind] = declared[kind] if kind in declared else _parsed(row[kind])
    return value


def server_status(row: dict) -> str:
    """online, offline, draining or revoked."""
    if row["revoked"]:
        return "revoked"
    if not row["online"]:
        return "offline"
    return "draining" if row["draining"] else "online"


def servers_of(project_id: str) -> list[dict]:
    return [
        server_value(row)
        for row in rows("SELECT * FROM server WHERE project_id = ? AND revoked = 0", (project_id,))
    ]


def place(
    tx: Transaction,
    project_id: str,
    fresh: list[dict],
    freed: set,
    actor: str = HUB.actor,
    cause: str | None = None,
) -> None:
    """Give `fresh` tasks and those that wait for the `freed` servers to whoever fits best.

    Highest priority first, then who has waited longest. cause: the task whose end made the fresh
    ones free.
    """
    if not fresh and not _anybody_waits(project_id):
        return
    servers = servers_of(project_id)
    waiting = [
        task for server in servers if server["id"] in freed for task in _heads(project_id, server)
    ]
    turn = {task["id"]: task for task in waiting}
    turn |= {t["id"]: _queued(t, tx.now, cause) for t in fresh if _still_ready(t, tx.now)}
    hopeless, left_over = set(), []
    for task in sorted(turn.values(), key=lambda t: (-t["priority"], t["waiting_since"], t["seq"])):
        if task["signature"] in hopeless or not _route(tx, task, servers, actor):
            hopeless.add(task["signature"])
            left_over.append(task)
    _enqueue(left_over)


def _anybody_waits(project_id: str) -> bool:
    found = execute(
        "SELECT 1 FROM task WHERE project_id = ? AND waiting_since IS NOT NULL LIMIT 1",
        (project_id,),
    )
    return found.fetchone() is not None


def _still_ready(task: dict, now: float) -> bool:
    return (
        task["status"] == "pending"
        and not task["open_deps"]
        and (task["not_before"] is None or task["not_before"] <= now)
    )


def _queued(task: dict, now: float, cause: str | None) -> dict:
    return task | {
        "cause": cause,
        "signature": cascade.signature(wanted(task)),
        "waiting_since": task["waiting_since"] or now,
    }


def _enqueue(tasks: list[dict]) -> None:
    for task in tasks:
        execute(
            "UPDATE task SET signature = ?, waiting_since = ?, not_before = NULL, deadline_at = ?"
            " WHERE id = ?",
            (task["signature"], task["waiting_since"], moves.queue_deadline(task), task["id"]),
        )


def _heads(project_id: str, server: dict) -> list[dict]:
    """The first waiting tasks `server` could take, at most as many per signature as it has slots.

    Looks at one index entry for each signature that waits, never at the tasks behind it.
    """
    free = server["slots"] - server["busy"]
    if free <= 0:
        return []
    heads = []
    for (signature,) in execute(
        "WITH RECURSIVE waiting(signature) AS ("
        " SELECT MIN(signature) FROM task WHERE project_id = ? AND waiting_since IS NOT NULL"
        " UNION ALL SELECT (SELECT MIN(signature) FROM task WHERE project_id = ?"
        " AND waiting_since IS NOT NULL AND signature > waiting.signature)"
        " FROM waiting WHERE waiting.signature IS NOT NULL)"
        " SELECT signature FROM waiting WHERE signature IS NOT NULL",
        (project_id, project_id),
    ).fetchall():
        if not cascade.exclusions(loads(signature), server):
            heads += rows(
                "SELECT * FROM task WHERE project_id = ? AND signature = ?"
                " AND waiting_since IS NOT NULL ORDER BY priority DESC, waiting_since, seq LIMIT ?",
                (project_id, signature, free),
            )
    return heads


def _route(tx: Transaction, task: dict, servers: list[dict], actor: str) -> bool:
    """Give a ready task to the best server; False when none fits."""
    candidates = cascade.rank(wanted(task), servers)
    if not candidates or not candidates[0]["fits"]:
        return False
    best, lost = candidates[0], _lost_conversation(task)
    if lost:  # where it lies is where it can go on
        there = (c for c in candidates if c["fits"] and c["server_id"] == lost["server_id"])
        best = next(there, best)
    server = next(s for s in servers if s["id"] == best["server_id"])
    if not _take_slot(server):
        return False
    server["busy"] += 1
    resumed = lost if lost and lost["server_id"] == server["id"] else None
    _give(tx, task, server, best, candidates, resumed, actor)
    return True


def _lost_conversation(task: dict) -> dict | None:
    """The session of the last attempt, if that one was lost and its coding agent's conversation
    can be taken up again."""
    if task["attempt"] == 1 or task["pinned_session"]:
        return None
    return one(
        "SELECT s.* FROM attempt a JOIN session s ON s.id = a.session_id WHERE a.task_id = ?"
        " AND a.number = ? AND a.outcome = 'release' AND s.task_id = a.task_id"
        " AND s.conversation IS NOT NULL AND s.profile = ?",
        (task["id"], task["attempt"] - 1, task["profile"]),
    )


def _take_slot(server: dict) -> bool:
    done = execute(
        "UPDATE server SET busy = busy + 1 WHERE id = ? AND busy < ? AND online = 1"
        " AND draining = 0 AND revoked = 0",
        (server["id"], server["slots"]),
    )
    return done.rowcount == 1


def _give(tx, task: dict, server: dict, best: dict, candidates, resumed, actor: str) -> None:
    session_id = _session_for(tx, task, server, resumed)
    by_hand = bool(task["pinned_server"])
    details = {"agent": server["name"]}
    if not by_hand:
        details |= {"score": best["score"], "candidates": explained(candidates)}
    if resumed:
        details |= {"resumes": resumed["name"]}
    given = moves.do(
        tx,
        task,
        "assign",
        actor,
        details,
        cause=task.get("cause"),
        event="task_assigned" if by_hand else "task_auto_assigned",
        server_id=server["id"],
        session_id=session_id,
        assigned_at=tx.now,
        started_at=None,
        waiting_since=None,
        signature=None,
        not_before=None,
    )
    if given["status"] == "planning":
        tx.emit("task_planning", task["project_id"], HUB.actor, {}, task=task["id"])
    moves.command(tx, server["id"], "task_assigned", session_id, given)


def explained(candidates: list[dict]) -> list[dict]:
    return [
        {k: c[k] for k in ("server_id", "server", "fits", "score", "reasons")} for c in candidates
    ]


def _session_for(tx: Transaction, task: dict, server: dict, resumed: dict | None) -> str | None:
    """The session that will do the work: the one named, or a new worker's; None without one.

    resumed: a session (a row) whose conversation the new one takes up.
    """
    if task["pinned_session"]:
        live = one("SELECT * FROM session WHERE id = ?", (task["pinned_session"],))
        if live and live["state"] in LIVE_SESSION:
            return live["id"]
    if server["manual"] or (task["profile"] == "command" and not task["command"]):
        return None
    return moves.new_session(
        tx,
        project_id=task["project_id"],
        server_id=server["id"],
        task_id=task["id"],
        attempt=task["attempt"],
        name=worker_name(task),
        role="worker",
        profile=task["profile"],
        model=task["model"],
        mode=task["mode"],
        command=task["command"],
        repo=_parsed(task["requirements"]).get("repo"),
        resumes=resumed["conversation"] if resumed else None,
        working_directory=resumed["working_directory"] if resumed else None,
        created_by=HUB.actor,
    )


def worker_name(task: dict) -> str:
    repo = _parsed(task["requirements"]).get("repo")
    again = f"-{task['attempt']}" if task["attempt"] > 1 else ""
    return f"{repo or task['profile'] or 'worker'}-{task['id'][:6]}{again}"


def place_one(tx: Transaction, task: dict, actor: str = HUB.actor) -> None:
    """Route one ready task."""
    place(tx, task["project_id"], [task], set(), actor)


def place_waiting(tx: Transaction, server: dict) -> None:
    """A server came online, gained slots or changed what it can: let it take what waits for it."""
    place(tx, server["project_id"], [], {server["id"]})
