"""The one door through which a task changes state, and what every move writes beside it: the
attempt that ended, the session that is to start, the command to the agent."""

import cascade
from models import Conflict, Transaction, dumps, execute, insert_many, new_id, one

QUEUE_TIMEOUT_S = 3600.0  # a task no server has taken by then is shown to a person
START_TIMEOUT_S = 900.0  # a worker that has not started by then is given up
LIVE_SESSION = ("starting", "active", "recovering", "disconnected")
# The states that hold a slot, spelt as the index of tasks by server has them.
HELD = "status IN ('assigned', 'planning', 'plan_review', 'running', 'needs_human')"

EVENT_OF = {
    "assign": "task_assigned",
    "start": "task_started",
    "submit_plan": "task_plan_submitted",
    "approve_plan": "task_plan_approved",
    "revise_plan": "task_plan_revision",
    "ask": "task_needs_human",
    "answer": "intervention_responded",
    "complete": "task_completed",
    "fail": "task_failed",
    "release": "task_released",
    "cancel": "task_cancelled",
    "retry": "task_retried",
}


def do(
    tx: Transaction,
    task: dict,
    verb: str,
    actor: str,
    details: dict | None = None,
    *,
    event: str | None = None,
    cause: str | None = None,
    **changes,
) -> dict:
    """Move `task` (a row) by `verb`: check, compare-and-set, free its slot, emit; the new row.

    `changes`: further columns to set with the move. Raises IllegalMove when TRANSITIONS forbids
    it and Conflict when the task was changed meanwhile.
    """
    goal = cascade.move(
        task["status"], verb, plan=bool(task["require_plan"]), asked_in=task["asked_in"]
    )
    after = task | changes | {"status": goal, "updated_at": tx.now}
    after["deadline_at"] = _deadline(after)
    _set(task, after)
    if task["status"] in cascade.HOLDS_SLOT and goal not in cascade.HOLDS_SLOT:
        execute("UPDATE server SET busy = busy - 1 WHERE id = ? AND busy > 0", (task["server_id"],))
    closed = _close_what_waits(tx, task, verb, actor)
    tx.emit(
        event or EVENT_OF[verb],
        task["project_id"],
        actor,
        {"attempt": task["attempt"]} | (details or {}) | closed,
        task=task["id"],
        cause=cause,
        session=after["session_id"] or task["session_id"],
        server=after["server_id"] or task["server_id"],
    )
    return after


def _set(task: dict, after: dict) -> None:
    changed = {k: v for k, v in after.items() if v != task[k]}
    if not changed:
        return
    columns = ", ".join(f"{column} = ?" for column in changed)
    done = execute(
        f"UPDATE task SET {columns} WHERE id = ? AND status = ? AND attempt = ?",
        (*changed.values(), task["id"], task["status"], task["attempt"]),
    )
    if done.rowcount != 1:
        raise Conflict("The task was changed by somebody else meanwhile: look again.")


# Verbs by which what waits for a person gets its answer, or is still waited for.
ANSWERS = ("answer", "submit_plan", "approve_plan", "revise_plan")


def _close_what_waits(tx: Transaction, task: dict, verb: str, actor: str) -> dict:
    """A task that ends or is taken back takes what waits for a person with it; for the event."""
    if verb in ANSWERS or task["status"] not in ("needs_human", "plan_review"):
        return {}
    execute(
        "UPDATE plan SET status = 'closed', decided_by = ?, decided_at = ?"
        " WHERE task_id = ? AND status = 'pending'",
        (actor, tx.now, task["id"]),
    )
    closed = execute(
        "UPDATE intervention SET status = 'closed', closed_why = ?, ended_by = ?, ended_at = ?"
        " WHERE task_id = ? AND status = 'pending' RETURNING id",
        (verb, actor, tx.now, task["id"]),
    ).fetchall()
    return {"closed_interventions": [found for (found,) in closed]} if closed else {}


def _deadline(task: dict) -> float | None:
    """When a clock of the task runs out in its present state, as seconds since the epoch."""
    if task["status"] == "pending" and task["waiting_since"] is not None:
        return queue_deadline(task)
    if task["status"] not in cascade.HOLDS_SLOT or task["assigned_at"] is None:
        return None
    ends = []
    if task["timeout"] is not None:
        ends.append(task["assigned_at"] + task["timeout"])
    if task["status"] == "assigned" and task["session_id"]:
        patience = START_TIMEOUT_S if task["start_timeout"] is None else task["start_timeout"]
        ends.append(task["assigned_at"] + patience)
    return min(ends, default=None)


def queue_deadline(task: dict) -> float:
    """When a person is told that no server takes a task, which waits in the queue."""
    patience = QUEUE_TIMEOUT_S if task["queue_timeout"] is None else task["queue_timeout"]
    return task["waiting_since"] + patience


def row(task_id: str) -> dict:
    return one("SELECT * FROM task WHERE id = ?", (task_id,))


def change(tx: Transaction, task: dict, **changes) -> dict:
    after = task | changes | {"updated_at": tx.now}
    after["deadline_at"] = _deadline(after)
    _set(task, after)
    return after


def close_attempt(tx: Transaction, task: dict, outcome: str, report: str | None) -> None:
    execute(
        "INSERT INTO attempt (task_id, number, server_id, session_id, outcome, report,"
        " assigned_at, started_at, ended_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            task["id"],
            task["attempt"],
            task["server_id"],
            task["session_id"],
            outcome,
            report,
            task["assigned_at"],
            task["started_at"],
            tx.now,
        ),
    )


def new_session(tx: Transaction, **columns) -> str:
    """Insert a session that is about to start; its id. tmux names it by 12 characters of that."""
    session_id = columns.get("id") or new_id()
    columns = {
        "id": session_id,
        "tmux_name": f"orc-{session_id[:12]}",
        "created_at": tx.now,
        "state_at": tx.now,
    } | columns
    insert_many("session", tuple(columns), [tuple(columns.values())])
    return session_id


def command(tx, server_id: str, kind: str, session_id, task: dict | None = None, body=None) -> None:
    """Write what an agent is to do into its outbox; it is sent after the commit, until it is
    acknowledged. What it says of a task is read when it is sent."""
    execute(
        "INSERT INTO command (server_id, type, session_id, task_id, attempt, body, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            server_id,
            kind,
            session_id,
            task["id"] if task else None,
            task["attempt"] if task else None,
            dumps(body or {}),
            tx.now,
        ),
    )
    tx.tell(f"server:{server_id}")


def starts(command: dict, session: dict) -> bool:
    """Whether a command (a row) is the one that starts the session, not one that tells it
    something."""
    own_worker = command["type"] == "task_assigned" and session["task_id"] == command["task_id"]
    return own_worker or command["type"] == "session_start"
