"""What is shown of tasks, pipelines and events: queries, no changes."""

from collections import defaultdict

import cascade
import routing
from auth import Caller, can, find
from models import (
    Invalid,
    containing,
    event_json,
    execute,
    in_chunks,
    iso,
    labels,
    loads,
    newest,
    one,
    rows,
)
from moves import HELD

PRIORITIES = ("low", "normal", "high", "critical")
CLOCKS = ("queue_timeout", "start_timeout", "progress_timeout", "timeout")
LIST_LIMIT, LIST_MOST = 200, 1000
NOTES_MOST = 1000
RECENT_NOTES = 20  # with the view of one task


def list_tasks(
    project_ids: list[str],
    *,
    status: str | None = None,
    q: str | None = None,
    server_id: str | None = None,
    pipeline_id: str | None = None,
    priority: str | None = None,
    limit: int = LIST_LIMIT,
    cursor: int | None = None,
) -> tuple[list[dict], int | None]:
    """(rows newest first, cursor of the next page or None).

    status: a state, or several with commas between. Raises Invalid for an unknown one, and for an
    unknown priority.
    """
    branches = [{"project_id": project} for project in project_ids]
    if status:
        states = _states(status)
        branches = [b | {"status": state} for b in branches for state in states]
    for column, value in (("server_id", server_id), ("pipeline_id", pipeline_id)):
        if value:
            branches = [b | {column: value} for b in branches]
    where, values = [], []
    if priority:
        if priority not in PRIORITIES:
            raise Invalid(f"Unknown priority {priority!r}: use one of {', '.join(PRIORITIES)}.")
        where.append("priority = ?")
        values.append(PRIORITIES.index(priority))
    if q:
        where.append("(title LIKE ? ESCAPE '\\' OR spec LIKE ? ESCAPE '\\')")
        values += [containing(q)] * 2
    if cursor is not None:
        where.append("seq < ?")
        values.append(cursor)
    size = max(1, min(limit, LIST_MOST))
    found = newest("task", branches, " AND ".join(where), values, size + 1)
    more = len(found) > size
    return found[:size], found[size - 1]["seq"] if more else None


def _states(status: str) -> list[str]:
    states = [s.strip() for s in status.split(",")]
    unknown = [s for s in states if s not in cascade.STATES]
    if unknown:
        raise Invalid(f"Unknown status {unknown[0]!r}: use one of {', '.join(cascade.STATES)}.")
    return sorted(set(states))


def reason(task: dict) -> str | None:
    """Why a pending task is not being worked on, as one sentence without the full stop."""
    if task["status"] != "pending":
        return None
    if task["open_deps"]:
        return _why_blocked(task["id"])
    if task["not_before"] is not None:
        return f"will be tried again at {iso(task['not_before'])}"
    if task["waiting_since"] is not None:
        return cascade.why_waiting(
            routing.wanted(task),
            cascade.rank(routing.wanted(task), routing.servers_of(task["project_id"])),
        )
    return "nobody has asked to place it yet; assign it"


def _why_blocked(task_id: str) -> str:
    waits = blocked_by(task_id)
    parts = []
    for up in waits[:5]:
        if up["status"] == "done":
            parts.append(f"{up['title']} (done, but without contract {up['contract_key']!r})")
        else:
            parts.append(f"{up['title']} ({up['status']})")
    more = f" and {len(waits) - 5} more" if len(waits) > 5 else ""
    return f"waits for {', '.join(parts)}{more}"


def blocked_by(task_id: str) -> list[dict]:
    """What the task still waits for."""
    return [
        {
            "task_id": row["id"],
            "title": row["title"],
            "status": row["status"],
            "dependency_type": row["kind"],
            "contract_key": row["key"] or None,
        }
        for row in rows(
            "SELECT d.kind, d.key, u.id, u.title, u.status FROM dependency d"
            " JOIN task u ON u.id = d.upstream_id"
            " WHERE d.task_id = ? AND d.resolved = 0 AND d.kind <> 'related' ORDER BY d.id",
            (task_id,),
        )
    ]


def server_name(task: dict) -> str | None:
    found = task["server_id"] and one("SELECT name FROM server WHERE id = ?", (task["server_id"],))
    return found["name"] if found else None


def explain(caller: Caller, ref: str) -> dict:
    """Why the task is where it is: blockers, each server's score or reasons, who was chosen."""
    task = find("task", caller, ref)
    chosen = one(
        "SELECT * FROM event WHERE task_seq = ? AND type IN ('task_assigned', 'task_auto_assigned')"
        " ORDER BY id DESC LIMIT 1",
        (task["seq"],),
    )
    if task["status"] == "pending":
        candidates = routing.explained(
            cascade.rank(routing.wanted(task), routing.servers_of(task["project_id"]))
        )
        summary = f"{task['title']} is {shown_status(task)}: {reason(task)}."
        return _explanation(task, summary, candidates, None, None)
    details = loads(chosen["details"]) if chosen else {}
    at = iso(chosen["at"]) if chosen else None
    summary = f"{task['title']} {SAID[task['status']]}"
    if details.get("agent"):
        scored = "score" in details
        how = f"as the best ({details['score']} points)" if scored else "by hand"
        summary += f"; {details['agent']} was chosen {how}"
    return _explanation(
        task, summary + ".", details.get("candidates", []), details.get("agent"), at
    )


SAID = {
    "assigned": "is assigned",
    "planning": "is being planned",
    "plan_review": "waits for its plan to be approved",
    "running": "is running",
    "needs_human": "waits for a person",
    "done": "is done",
    "failed": "has failed",
    "cancelled": "was cancelled",
}


def _explanation(task, summary, candidates, chosen, at) -> dict:
    return {
        "task_id": task["id"],
        "status": task["status"],
        "summary": summary,
        "blocked_by": blocked_by(task["id"]),
        "candidates": candidates,
        "chosen": chosen,
        "at": at,
    }


def shown_status(task: dict) -> str:
    """The state for people: a pending task is blocked, ready or not assigned."""
    if task["status"] != "pending":
        return task["status"]
    if task["open_deps"]:
        return "blocked"
    waits = task["waiting_since"] is not None or task["not_before"] is not None
    return "ready" if waits else "not assigned"


def timeline(caller: Caller, ref: str) -> list[dict]:
    """Every event of the task and those its completion caused, oldest first."""
    task = find("task", caller, ref)
    return [
        event_json(row)
        for row in rows(
            "SELECT * FROM event WHERE task_seq = ? UNION SELECT * FROM event WHERE cause_seq = ?"
            " ORDER BY id",
            (task["seq"], task["seq"]),
        )
    ]


def contracts(caller: Caller, ref: str) -> list[dict]:
    """What the task owes and has delivered: [{key, status, schema, description, data, …}]."""
    task = find("task", caller, ref)
    return contracts_of(task)


def contracts_of(task: dict) -> list[dict]:
    """The same of a task's row."""
    return _contracts([task])[task["id"]]


def _contracts(tasks: list[dict]) -> dict[str, list[dict]]:
    stored, awaited = defaultdict(dict), defaultdict(set)
    for part, marks in in_chunks([t["id"] for t in tasks]):
        for row in rows(f"SELECT * FROM contract WHERE task_id IN {marks}", part):
            stored[row["task_id"]][row["key"]] = row
        for upstream, key in execute(
            "SELECT DISTINCT upstream_id, key FROM dependency"
            f" WHERE kind = 'input' AND upstream_id IN {marks}",
            part,
        ):
            awaited[upstream].add(key)
    listed = {}
    for task in tasks:
        declared = (loads(task["structured_spec"]) or {}).get("expected_contracts") or {}
        keys = sorted({*declared, *awaited[task["id"]], *stored[task["id"]]})
        listed[task["id"]] = [
            _contract_json(key, declared.get(key, {}), stored[task["id"]].get(key)) for key in keys
        ]
    return listed


def _contract_json(key: str, declared: dict, row: dict | None) -> dict:
    return {
        "key": key,
        "status": "fulfilled" if row else "expected",
        "type": declared.get("type"),
        "description": declared.get("description"),
        "schema": declared.get("schema"),
        "data": loads(row["data"]) if row else None,
        "updated_at": iso(row["at"]) if row else None,
        "by": row["author"] if row else None,
    }


def notes(caller: Caller, ref: str) -> list[dict]:
    """The notes on a task, oldest first, the last 1000: [{id, content, author, urgent, …}]."""
    return _notes(find("task", caller, ref)["id"], NOTES_MOST)


def _notes(task_id: str, limit: int) -> list[dict]:
    found = newest("note", [{"task_id": task_id}], "", [], limit)
    return [note_json(row) for row in reversed(found)]


def note_json(row: dict) -> dict:
    return {
        "id": row["id"],
        "task_id": row["task_id"],
        "attempt": row["attempt"],
        "content": row["content"],
        "author": row["author"],
        "urgent": bool(row["urgent"]),
        "created_at": iso(row["at"]),
    }


def mine(caller: Caller, session: dict | None) -> list[dict]:
    """The tasks a session works on, without one those on the caller's server, oldest first."""
    server_id = session["server_id"] if session else caller.server_id
    if server_id is None:
        return []
    where, values = ("AND session_id = ?", [session["id"]]) if session else ("", [])
    return rows(
        f"SELECT * FROM task WHERE server_id = ? AND {HELD} {where} ORDER BY seq",
        [server_id, *values],
    )


def standing(caller: Caller, session: dict | None) -> dict:
    """Where the caller stands: its server, session and project, and the tasks that are its own.

    Whoever reads this has reached the hub with a credential that counts, so they are connected;
    `server_status` says how their server's agent stands.
    """
    server_id = session["server_id"] if session else caller.server_id
    server = server_id and one("SELECT * FROM server WHERE id = ?", (server_id,))
    project_id = session["project_id"] if session else caller.project_id
    tasks = mine(caller, session)
    running = sum(task["status"] == "running" for task in tasks)
    return {
        "connected": True,
        "server_id": server_id,
        "server_name": server["name"] if server else None,
        "server_status": routing.server_status(server) if server else None,
        "session_id": session["id"] if session else None,
        "session_name": session["name"] if session else None,
        "role": session["role"] if session else None,
        "project_id": project_id,
        "project_name": project_id and labels("project", "name", {project_id})[project_id],
        "tasks": [
            {
                "id": task["id"],
                "title": task["title"],
                "status": task["status"],
                "priority": PRIORITIES[task["priority"]],
            }
            for task in tasks
        ],
        "task_summary": {
            "pending": len(tasks) - running,
            "running": running,
            "total": len(tasks),
        },
    }


def tasks_json(tasks: list[dict]) -> list[dict]:
    """Task rows as the API shows them, with a fixed number of queries for any number of tasks.

    `recent_notes` are left to the view of one task.
    """
    ids = [t["id"] for t in tasks]
    deps, names = _dependencies(ids), _names(tasks)
    produced = _contracts(tasks)
    reasons = {}
    shown = []
    for task in tasks:
        waits = task["waiting_since"] is not None
        key = (task["project_id"], task["signature"]) if waits else task["id"]
        if key not in reasons:
            reasons[key] = reason(task)
        shown.append(_one_json(task, deps[task["id"]], produced[task["id"]], names, reasons[key]))
    return shown


def task_json(task: dict) -> dict:
    return tasks_json([task])[0] | {"recent_notes": _notes(task["id"], RECENT_NOTES)}


def cards(tasks: list[dict]) -> list[dict]:
    """Task rows as a board shows them: three queries for any number."""
    names = _names(tasks)
    return [
        {
            "id": task["id"],
            "project_id": task["project_id"],
            "title": task["title"],
            "shown_status": shown_status(task),
            "priority": PRIORITIES[task["priority"]],
            "target_repo": loads(task["requirements"]).get("repo"),
            "assigned_server_name": names.get(task["server_id"] or task["pinned_server"]),
            "updated_at": iso(task["updated_at"]),
        }
        for task in tasks
    ]


def _dependencies(ids: list[str]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for part, marks in in_chunks(ids):
        for row in rows(
            "SELECT d.*, u.title, u.status FROM dependency d JOIN task u ON u.id = d.upstream_id"
            f" WHERE d.task_id IN {marks} ORDER BY d.id",
            part,
        ):
            found[row["task_id"]].append(
                {
                    "depends_on_task_id": row["upstream_id"],
                    "depends_on_title": row["title"],
                    "depends_on_status": row["status"],
                    "dependency_type": row["kind"],
                    "contract_key": row["key"] or None,
                    "resolved": bool(row["resolved"]),
                }
            )
    return found


def _names(tasks: list[dict]) -> dict[str, str]:
    """{id: name} of the servers and sessions the tasks mention."""
    servers = {t[c] for t in tasks for c in ("server_id", "pinned_server") if t[c]}
    sessions = {t[c] for t in tasks for c in ("session_id", "source_session_id") if t[c]}
    return labels("server", "name", servers) | labels("session", "name", sessions)


def _one_json(task: dict, deps, produced, names, why) -> dict:
    requirements = loads(task["requirements"])
    assignee = task["server_id"] or task["pinned_server"]
    return {
        "id": task["id"],
        "title": task["title"],
        "status": task["status"],
        "shown_status": shown_status(task),
        "priority": PRIORITIES[task["priority"]],
        "type": task["type"],
        "spec": task["spec"],
        "structured_spec": _whole_spec(task, requirements),
        "acceptance_criteria": loads(task["acceptance_criteria"]),
        "target_repo": requirements.get("repo"),
        "target_branch": task["target_branch"],
        "requirements": requirements,
        "assigned_server_id": assignee,
        "assigned_server_name": names.get(assignee),
        "session_id": task["session_id"],
        "source_session_id": task["source_session_id"],
        "source_session_name": names.get(task["source_session_id"]),
        "target_session_name": names.get(task["session_id"]),
        "dependencies": deps,
        "resolved_inputs": loads(task["resolved_inputs"], {}),
        "contracts": {c["key"]: {"status": c["status"], "data": c["data"]} for c in produced},
        "attempt": task["attempt"],
        "blocked": task["status"] == "pending" and task["open_deps"] > 0,
        "reason": why,
        "pipeline_id": task["pipeline_id"],
        "project_id": task["project_id"],
        "profile": task["profile"],
        "model": task["model"],
        "mode": task["mode"],
        "command": loads(task["command"]),
        "auto_assign": bool(task["auto_assign"]),
        "on_lost": task["on_lost"],
        "max_attempts": task["max_attempts"],
        "retry_delay_s": task["retry_delay_s"],
        **{clock: task[clock] for clock in CLOCKS},
        "require_plan": bool(task["require_plan"]),
        "plan": loads(task["plan"]),
        "plan_feedback": task["plan_feedback"],
        "result": loads(task["result"]),
        "git_diff_stats": loads(task["git_diff_stats"]),
        "created_by": task["created_by"],
        "created_at": iso(task["created_at"]),
        "assigned_at": iso(task["assigned_at"]),
        "started_at": iso(task["started_at"]),
        "completed_at": iso(task["completed_at"]),
        "updated_at": iso(task["updated_at"]),
        "recent_notes": [],
    }


def _whole_spec(task: dict, requirements: dict) -> dict | None:
    """The structured spec with the constraints that are stored as requirements."""
    spec = loads(task["structured_spec"])
    if spec is None:
        return None
    shared = {k: requirements[k] for k in ("languages", "frameworks") if requirements.get(k)}
    if shared or spec.get("constraints"):
        spec["constraints"] = (spec.get("constraints") or {}) | shared
    return spec


def attempts(tasks: list[dict]) -> list[dict]:
    """What ran of these tasks (rows), and what is at work: {task_id, title, server, state, number,
    assigned_at, started_at, ended_at}, times in seconds since 1970, None for what is not yet."""
    known = {t["id"]: t for t in tasks}
    found = [_at_work(t) for t in tasks if t["assigned_at"] and t["status"] not in cascade.FINAL]
    for part, marks in in_chunks(list(known)):
        found += rows(
            "SELECT task_id, number, server_id, outcome AS state, assigned_at, started_at, ended_at"
            f" FROM attempt WHERE task_id IN {marks} AND assigned_at IS NOT NULL",
            part,
        )
    names = labels("server", "name", {a["server_id"] for a in found if a["server_id"]})
    return [
        a
        | {
            "title": known[a["task_id"]]["title"],
            "server": names.get(a["server_id"]) or "by hand",
        }
        for a in found
    ]


def _at_work(task: dict) -> dict:
    fields = ("server_id", "assigned_at", "started_at")
    return {name: task[name] for name in fields} | {
        "task_id": task["id"],
        "number": task["attempt"],
        "state": task["status"],
        "ended_at": None,
    }


def pipeline_json(row: dict, *, with_tasks: bool = False) -> dict:
    counts = dict(
        execute(
            "SELECT status, COUNT(*) FROM task WHERE pipeline_id = ? GROUP BY status", (row["id"],)
        ).fetchall()
    )
    shown = {
        "id": row["id"],
        "name": row["name"],
        "project_id": row["project_id"],
        "created_by": row["created_by"],
        "created_at": iso(row["created_at"]),
        "counts": counts,
        "total": sum(counts.values()),
    }
    if with_tasks:
        found = rows("SELECT * FROM task WHERE pipeline_id = ? ORDER BY seq", (row["id"],))
        shown |= {"id_map": loads(row["id_map"]), "tasks": tasks_json(found)}
    return shown


def get_pipeline(caller: Caller, ref: str) -> dict:
    """A pipeline by id, unique prefix or name; of several with one name the newest."""
    named = [
        row
        for row in rows("SELECT * FROM pipeline WHERE name = ? ORDER BY seq DESC LIMIT 20", (ref,))
        if can(caller, "read", row["project_id"])
    ]
    return named[0] if named else find("pipeline", caller, ref)


def list_pipelines(project_ids: list[str], limit: int = 100) -> list[dict]:
    marks = ", ".join("?" * len(project_ids))
    return rows(
        f"SELECT * FROM pipeline WHERE project_id IN ({marks}) ORDER BY seq DESC LIMIT ?",
        [*project_ids, limit],
    )


EVENTS_MOST = 1000


def events(caller: Caller, after: int, *, project_ids: list[str], task=None, limit=200):
    """Visible events with ids above `after`, oldest first; the hub's own for its admins only.

    task: the row of the one task they are to be about.
    """
    where, values = ["id > ?"], [after]
    if not caller.is_admin or project_ids:
        marks = ", ".join("?" * len(project_ids))
        hub = " OR project_id IS NULL" if caller.is_admin else ""
        where.append(f"(project_id IN ({marks}){hub})")
        values += project_ids
    if task:
        where.append("(task_seq = ? OR cause_seq = ?)")
        values += [task["seq"], task["seq"]]
    size = max(1, min(limit, EVENTS_MOST))
    found = rows(
        f"SELECT * FROM event WHERE {' AND '.join(where)} ORDER BY id LIMIT ?", [*values, size]
    )
    return [event_json(row) for row in found]


def last_events(
    caller: Caller, *, project_ids: list[str], task=None, before: int | None = None, limit=200
) -> list[dict]:
    """The newest visible events, of those below the id `before` if given, oldest first.

    Each project is one short walk of its index, however long the log is.
    """
    if task:
        branches = [("task_seq = ?", task["seq"]), ("cause_seq = ?", task["seq"])]
    else:
        branches = [("project_id = ?", project) for project in project_ids]
        branches += [("project_id IS ?", None)] * caller.is_admin
    size = max(1, min(limit, EVENTS_MOST))
    below, top = (" AND id < ?", [before]) if before is not None else ("", [])
    found = {}
    for where, value in branches:
        sql = f"SELECT * FROM event WHERE {where}{below} ORDER BY id DESC LIMIT ?"
        found |= {row["id"]: row for row in rows(sql, [value, *top, size])}
    return [event_json(found[n]) for n in sorted(found)[-size:]]


LOOKED_BACK = 20_000  # events one page of a filtered list looks through


def events_page(
    project_ids: list[str], hubs: bool, wanted: dict, before: int | None, limit: int
) -> tuple[list[dict], int | None]:
    """(events that fit, newest first; where older ones go on, or None).

    hubs: the hub's own too. wanted: {type, kind (its first word), actor, session_id, server_id},
    each as it must be, None for any. A page looks through so many events and no further, so that
    it costs the same however long the log is; it may be empty and older ones be there.
    """
    top = last_event_id() + 1 if before is None else before
    floor = max(0, top - LOOKED_BACK)
    conditions, values = ["id < ?", "id > ?"], [top, floor]
    for column in ("type", "actor", "session_id", "server_id"):
        if wanted.get(column):
            conditions.append(f"{column} = ?")
            values.append(wanted[column])
    if wanted.get("kind"):
        conditions.append("substr(type, 1, ?) = ?")
        values += [len(wanted["kind"]) + 1, f"{wanted['kind']}_"]
    found = []
    for project in [*project_ids, *([None] if hubs else [])]:
        found += rows(
            f"SELECT * FROM event WHERE project_id IS ? AND {' AND '.join(conditions)}"
            " ORDER BY id DESC LIMIT ?",
            [project, *values, limit + 1],
        )
    found.sort(key=lambda row: -row["id"])
    if len(found) > limit:
        return [event_json(row) for row in found[:limit]], found[limit - 1]["id"]
    return [event_json(row) for row in found], floor + 1 if floor else None


def last_event_id() -> int:
    """The id of the newest event; 0 when there is none."""
    return (one("SELECT MAX(id) AS id FROM event") or {})["id"] or 0


def may_see(caller: Caller, event: dict) -> bool:
    """Whether an event may be shown to the caller."""
    if event["project_id"] is None:
        return caller.is_admin
    return can(caller, "read", event["project_id"])
