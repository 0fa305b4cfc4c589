"""What waits for a person, and what is said about a task: questions and their answers, plans and
what is decided of them, notes.

A task is `needs_human` exactly while it has pending interventions, and `plan_review` exactly while
the newest version of its plan is pending. What a task that ends leaves open, `moves` closes.
"""

import cascade
import moves
import tasks
from auth import Caller, can, find, report_allowed, require
from models import (
    Conflict,
    Forbidden,
    Invalid,
    Transaction,
    dumps,
    execute,
    insert_many,
    iso,
    labels,
    loads,
    new_id,
    newest,
    one,
    rows,
    transaction,
)

KINDS = ("help", "question", "approval")
STATUSES = ("pending", "responded", "closed")
LIST_MOST = 500
OPEN_MOST = 20  # questions one task may have open: a worker in a loop must not fill the inbox
EVENT_TEXT = 2000  # characters of a question, an answer or a note that its event repeats


# ── interventions ─────────────────────────────────────────────────────────────────────────────


def ask(
    caller: Caller,
    ref: str,
    question: str,
    *,
    context: str | None = None,
    kind: str = "help",
    urgency: str = "normal",
    target: str | None = None,
    attempt: int | None = None,
) -> tuple[dict, bool]:
    """Ask a person, or an orchestrator, about a task: (intervention row, made).

    The task waits as `needs_human` until all its questions are answered; the same question asked
    again while it is open is that one. target: a session of the project the question is meant for.
    Raises Invalid, Forbidden, IllegalMove, NotFound (target), Conflict (late, or too many open).
    """
    if not question.strip():
        raise Invalid("A question cannot be empty.", field="question")
    fields = {"kind": kind, "question": question, "context": context or None, "urgency": urgency}

    def then(tx, caller, task, _said):
        return _ask(tx, caller, task, fields | {"target_session_id": _target(caller, task, target)})

    said = {"intervention_type": kind, "question": question, "context": context}
    return tasks.report(caller, ref, "ask", dumps(said), attempt, then)


def _target(caller: Caller, task: dict, ref: str | None) -> str | None:
    if not ref:
        return None
    session = find("session", caller, ref, name="name")
    if session["project_id"] != task["project_id"]:
        raise Forbidden(f"Session {session['name']!r} belongs to another project than the task.")
    return session["id"]


def _ask(tx: Transaction, caller: Caller, task: dict, fields: dict) -> tuple[dict, bool]:
    pending = _pending(task["id"])
    for same in pending:
        if same["asked_by"] == caller.actor and fields.items() <= same.items():
            return same, False
    if len(pending) >= OPEN_MOST:
        raise Conflict(
            f"The task has {len(pending)} open questions already: wait for their answers.",
            code="too_many_open",
        )
    made = fields | {
        "id": new_id(),
        "project_id": task["project_id"],
        "task_id": task["id"],
        "attempt": task["attempt"],
        "server_id": task["server_id"],
        "session_id": task["session_id"],
        "asked_by": caller.actor,
        "asked_at": tx.now,
    }
    details = {
        "intervention_id": made["id"],
        "intervention_type": made["kind"],
        "question": made["question"][:EVENT_TEXT],
    }
    if pending:
        _say(tx, task, "task_needs_human", caller, details)
    else:
        task = moves.do(tx, task, "ask", caller.actor, details, asked_in=task["status"])
    insert_many("intervention", tuple(made), [tuple(made.values())])
    tasks.tell_orderer(tx, task, made["question"][:EVENT_TEXT])
    _tell_target(tx, caller, task, made)
    return _intervention(made["id"]), True


def _tell_target(tx: Transaction, caller: Caller, task: dict, asked: dict) -> None:
    """The session a question is meant for hears of it, if it lives."""
    target = asked["target_session_id"]
    session = target and one("SELECT * FROM session WHERE id = ?", (target,))
    if session and session["state"] in cascade.SESSION_LIVE:
        said = {
            "intervention_id": asked["id"],
            "question": asked["question"],
            "source": caller.name,
        }
        moves.command(tx, session["server_id"], "intervention_for_session", target, task, said)


def _pending(task_id: str) -> list[dict]:
    return rows(
        "SELECT * FROM intervention WHERE task_id = ? AND status = 'pending' ORDER BY seq",
        (task_id,),
    )


def _intervention(intervention_id: str) -> dict:
    return one("SELECT * FROM intervention WHERE id = ?", (intervention_id,))


def _say(tx: Transaction, task: dict, event: str, caller: Caller, details: dict) -> None:
    """An event on a task that does not move."""
    tx.emit(
        event,
        task["project_id"],
        caller.actor,
        {"attempt": task["attempt"]} | details,
        task=task["id"],
        session=task["session_id"],
        server=task["server_id"],
    )


def answer(caller: Caller, ref: str, response: str) -> dict:
    """Answer an intervention; the row. The first answer counts and goes to the worker's session;
    with the last open one the task goes on where it was.

    The same answer by the same caller again changes nothing. Raises Forbidden, Invalid, NotFound,
    Conflict `answered` with who said what, or `closed`.
    """
    asked = find("intervention", caller, ref)
    require(caller, "task.change", asked["project_id"], "intervention")
    _check_may_answer(caller, asked)
    if not response.strip():
        raise Invalid("An answer cannot be empty.", field="response")
    with transaction() as tx:
        answered = one(
            "UPDATE intervention SET status = 'responded', response = ?, ended_by = ?,"
            " ended_at = ? WHERE id = ? AND status = 'pending' RETURNING *",
            (response, caller.actor, tx.now, asked["id"]),
        )
        if answered:
            _pass_on(tx, caller, answered)
            return answered
    stands = _intervention(asked["id"])
    if (stands["response"], stands["ended_by"]) == (response, caller.actor):
        return stands
    raise _too_late(stands)


def _check_may_answer(caller: Caller, asked: dict) -> None:
    """A question may be answered by an orchestrator or another server's key, the rest by people
    alone. Raises Forbidden."""
    if caller.kind in ("user", "hub"):
        return
    if asked["kind"] != "question":
        raise Forbidden(
            f"This is for people: an intervention of type {asked['kind']!r} cannot be answered "
            "with a key."
        )
    own = asked["server_id"] if caller.kind == "server" else asked["session_id"]
    if own == caller.id:
        raise Forbidden("A question cannot be answered with the key of whoever asked it.")


def _pass_on(tx: Transaction, caller: Caller, answered: dict) -> None:
    task = moves.row(answered["task_id"])
    details = {
        "intervention_id": answered["id"],
        "intervention_type": answered["kind"],
        "response": answered["response"][:EVENT_TEXT],
    }
    if _pending(task["id"]):
        _say(tx, task, "intervention_responded", caller, details)
    else:
        began = task["started_at"]
        if began is None and task["asked_in"] == "assigned":
            began = tx.now  # who asked was at work, without having said so
        task = moves.do(tx, task, "answer", caller.actor, details, asked_in=None, started_at=began)
    _command(
        tx,
        "intervention_response",
        task,
        {
            "intervention_id": answered["id"],
            "question": answered["question"],
            "response": answered["response"],
            "author": answered["ended_by"],
        },
    )


def _too_late(stands: dict) -> Conflict:
    at = iso(stands["ended_at"])
    if stands["status"] == "closed":
        return Conflict(
            f"The question was closed at {at}: its task {CLOSED[stands['closed_why']]}. "
            "There is nothing to answer any more.",
            code="closed",
        )
    return Conflict(
        f"{stands['ended_by']} answered this already at {at}: {stands['response'][:300]!r}. "
        "Your answer was not sent; add a note to the task to say more.",
        code="answered",
        responded_by=stands["ended_by"],
        response=stands["response"],
        responded_at=at,
    )


CLOSED = {
    "complete": "was completed",
    "fail": "has failed",
    "cancel": "was cancelled",
    "release": "was taken back from its server",
}


def list_interventions(
    project_ids: list[str], *, task: dict | None = None, status: str | None = None
) -> list[dict]:
    """Interventions as JSON, newest first, the last 500. task: the row of the one they are about.

    Raises Invalid for an unknown status.
    """
    if status and status not in STATUSES:
        raise Invalid(f"Unknown status {status!r}: use one of {', '.join(STATUSES)}.")
    if task:
        where, values = ("status = ?", [status]) if status else ("", [])
        found = newest("intervention", [{"task_id": task["id"]}], where, values, LIST_MOST)
    else:
        branches = [{"project_id": project} for project in project_ids]
        if status:
            branches = [b | {"status": status} for b in branches]
        found = newest("intervention", branches, "", [], LIST_MOST)
    return interventions_json(found)


WAITING_MOST = 200


def waiting(project_ids: list[str], task_id: str | None = None) -> list[dict]:
    """What waits for a person, oldest first, at most 200 of each kind: interventions as the API
    shows them and plans, each with its `kind` (question, help, approval, plan) and `since`."""
    asked = _pending_of(project_ids, task_id)
    items = [
        one | {"kind": one["intervention_type"], "since": one["created_at"]}
        for one in interventions_json(asked)
    ]
    return sorted(items + _plans_waiting(project_ids, task_id), key=lambda item: item["since"])


def _pending_of(project_ids: list[str], task_id: str | None) -> list[dict]:
    if task_id:
        return _pending(task_id)
    return rows(
        f"SELECT * FROM intervention WHERE project_id IN {_among(project_ids)}"
        " AND status = 'pending' ORDER BY seq LIMIT ?",
        [*project_ids, WAITING_MOST],
    )


def _plans_waiting(project_ids: list[str], task_id: str | None) -> list[dict]:
    which, values = ("AND t.id = ?", [task_id]) if task_id else ("", [])
    found = rows(
        "SELECT p.*, t.title, t.project_id, t.session_id FROM task t JOIN plan p ON"
        " p.task_id = t.id AND p.status = 'pending' AND p.attempt = t.attempt"
        f" WHERE t.project_id IN {_among(project_ids)} AND t.status = 'plan_review' {which}"
        " ORDER BY t.seq LIMIT ?",
        [*project_ids, *values, WAITING_MOST],
    )
    return [
        {
            "kind": "plan",
            "id": f"{row['task_id']}-{row['version']}",
            "since": iso(row["at"]),
            "project_id": row["project_id"],
            "task_id": row["task_id"],
            "task_title": row["title"],
            "session_id": row["session_id"],
            "asked_by": row["author"],
            "version": row["version"],
            "plan": loads(row["plan"]),
        }
        for row in found
    ]


def count(project_ids: list[str]) -> int:
    """How many things wait for a person."""
    among = _among(project_ids)
    found = one(
        f"SELECT (SELECT COUNT(*) FROM intervention WHERE project_id IN {among}"
        " AND status = 'pending') +"
        f" (SELECT COUNT(*) FROM task WHERE project_id IN {among} AND status = 'plan_review')"
        " AS n",
        [*project_ids, *project_ids],
    )
    return found["n"]


def _among(ids: list[str]) -> str:
    return f"({', '.join('?' * len(ids))})"


def get_intervention(caller: Caller, ref: str) -> dict:
    """An intervention's row by id or unique prefix."""
    return find("intervention", caller, ref)


def interventions_json(found: list[dict]) -> list[dict]:
    """Intervention rows as the API shows them."""
    titles = labels("task", "title", {row["task_id"] for row in found})
    names = labels("session", "name", {row["session_id"] for row in found if row["session_id"]})
    return [
        _intervention_json(row, titles[row["task_id"]], names.get(row["session_id"]))
        for row in found
    ]


def _intervention_json(row: dict, title: str, session: str | None) -> dict:
    responded, closed = row["status"] == "responded", row["status"] == "closed"
    return {
        "id": row["id"],
        "status": row["status"],
        "intervention_type": row["kind"],
        "question": row["question"],
        "context": row["context"],
        "urgency": row["urgency"],
        "project_id": row["project_id"],
        "task_id": row["task_id"],
        "task_title": title,
        "attempt": row["attempt"],
        "session_id": row["session_id"],
        "session_name": session,
        "target_session_id": row["target_session_id"],
        "asked_by": row["asked_by"],
        "created_at": iso(row["asked_at"]),
        "response": row["response"],
        "responded_by": row["ended_by"] if responded else None,
        "responded_at": iso(row["ended_at"]) if responded else None,
        "closed_by": row["ended_by"] if closed else None,
        "closed_at": iso(row["ended_at"]) if closed else None,
        "closed_why": row["closed_why"],
    }


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


def submit_plan(caller: Caller, ref: str, plan, attempt: int | None = None) -> dict:
    """Hand in a plan (any JSON) or a new version of it; the task's row, in `plan_review`.

    The same plan again, while it waits or once it is approved, changes nothing. Raises Forbidden,
    IllegalMove, Conflict (late).
    """
    return tasks.report(caller, ref, "submit_plan", dumps(plan), attempt, _submit)


def _submit(tx: Transaction, caller: Caller, task: dict, said: str) -> dict:
    last = _last_plan(task)
    if last and last["plan"] == said and last["status"] in ("pending", "approved"):
        return task
    version = _next_version(task["id"])
    summary = _summary(said)
    after = moves.do(
        tx,
        task,
        "submit_plan",
        caller.actor,
        {"version": version, "summary": summary},
        plan=said,
    )
    execute(
        "UPDATE plan SET status = 'replaced', decided_by = ?, decided_at = ?"
        " WHERE task_id = ? AND status = 'pending'",
        (caller.actor, tx.now, task["id"]),
    )
    execute(
        "INSERT INTO plan (task_id, version, attempt, plan, author, at) VALUES (?, ?, ?, ?, ?, ?)",
        (task["id"], version, task["attempt"], said, caller.actor, tx.now),
    )
    tasks.tell_orderer(tx, after, summary)
    return after


def _last_plan(task: dict) -> dict | None:
    """The newest version of the present attempt's plan."""
    last = one("SELECT * FROM plan WHERE task_id = ? ORDER BY version DESC LIMIT 1", (task["id"],))
    return last if last and last["attempt"] == task["attempt"] else None


def _next_version(task_id: str) -> int:
    found = one("SELECT MAX(version) AS last FROM plan WHERE task_id = ?", (task_id,))
    return (found["last"] or 0) + 1


def _summary(said: str) -> str:
    plan = loads(said)
    summary = plan.get("summary") if isinstance(plan, dict) else None
    return (summary if isinstance(summary, str) else said)[:500]


def approve(
    caller: Caller, ref: str, comment: str | None = None, version: int | None = None
) -> dict:
    """Let the worker do what it plans; the task's row, running.

    version: the one that was read; another one is refused. For people, and orchestrators of the
    project other than the worker. Raises Forbidden, IllegalMove, Conflict `decided` with who
    decided what, or `other_version`.
    """
    return _decide(caller, ref, "approve_plan", comment, version)


def revise(caller: Caller, ref: str, feedback: str, version: int | None = None) -> dict:
    """Send a plan back to the worker with what should be different; the task's row, planning.

    Who may and what is raised is as for `approve`; Invalid without feedback.
    """
    if not feedback.strip():
        raise Invalid("Say what should be different: feedback cannot be empty.", field="feedback")
    return _decide(caller, ref, "revise_plan", feedback, version)


# verb: (status of the plan, command to the worker, what its body calls the words)
DECISIONS = {
    "approve_plan": ("approved", "plan_approved", "comment"),
    "revise_plan": ("revised", "plan_revision", "feedback"),
}
DECIDED = {
    "approved": "approved",
    "revised": "sent back",
    "replaced": "replaced by a newer one",
    "closed": "closed with its attempt",
}


def _decide(caller: Caller, ref: str, verb: str, words: str | None, version: int | None) -> dict:
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    status, command, name = DECISIONS[verb]
    with transaction() as tx:
        task = moves.row(task["id"])
        _check_may_decide(caller, task)
        last = _last_plan(task)
        if _said_before(caller, task, last, status, words, version):
            return task
        last = _decidable(task, last, verb, version)
        execute(
            "UPDATE plan SET status = ?, feedback = ?, decided_by = ?, decided_at = ?"
            " WHERE task_id = ? AND version = ?",
            (status, words, caller.actor, tx.now, task["id"], last["version"]),
        )
        began = {"started_at": tx.now} if verb == "approve_plan" else {}
        details = {"version": last["version"], name: words and words[:EVENT_TEXT]}
        after = moves.do(tx, task, verb, caller.actor, details, plan_feedback=words, **began)
        body = {"version": last["version"], name: words, "author": caller.actor}
        _command(tx, command, after, body)
        return after


def _check_may_decide(caller: Caller, task: dict) -> None:
    if caller.kind == "server":
        raise Forbidden("A plan is decided on by people or an orchestrator, not with a server key.")
    if caller.kind == "session" and task["session_id"] == caller.session_id:
        raise Forbidden("A worker cannot decide on its own plan.")


def _said_before(caller, task: dict, last: dict | None, status: str, words, version) -> bool:
    return bool(
        last
        and task["status"] != "plan_review"
        and version in (None, last["version"])
        and (last["status"], last["feedback"], last["decided_by"]) == (status, words, caller.actor)
    )


def _decidable(task: dict, last: dict | None, verb: str, version: int | None) -> dict:
    """The version to decide on. Raises Conflict or IllegalMove when there is none."""
    if last and version not in (None, last["version"]):
        raise Conflict(
            f"The plan is at version {last['version']}, not {version}: look at that one first.",
            code="other_version",
            version=last["version"],
        )
    if last and last["status"] != "pending":
        raise Conflict(
            f"Version {last['version']} of the plan was {DECIDED[last['status']]} by "
            f"{last['decided_by']} at {iso(last['decided_at'])}; the task is {task['status']}.",
            code="decided",
            decision=last["status"],
            decided_by=last["decided_by"],
            feedback=last["feedback"],
        )
    cascade.move(task["status"], verb)
    return last


def plans(caller: Caller, ref: str) -> list[dict]:
    """Every version of a task's plan with what was decided of it, oldest first."""
    task = find("task", caller, ref)
    return [
        {
            "version": row["version"],
            "attempt": row["attempt"],
            "plan": loads(row["plan"]),
            "status": row["status"],
            "author": row["author"],
            "submitted_at": iso(row["at"]),
            "feedback": row["feedback"],
            "decided_by": row["decided_by"],
            "decided_at": iso(row["decided_at"]),
        }
        for row in rows("SELECT * FROM plan WHERE task_id = ? ORDER BY version", (task["id"],))
    ]


# ── notes ─────────────────────────────────────────────────────────────────────────────────────


def add_note(
    caller: Caller, ref: str, content: str, *, urgent: bool = False, attempt: int | None = None
) -> dict:
    """Add a note to a task, in whatever state; its row. It goes to the task's worker, unless that
    wrote it, and to the workers of tasks that depend on it.

    Raises Forbidden, Invalid, Conflict (an attempt that has ended: kept as an event only).
    """
    if not content.strip():
        raise Invalid("A note cannot be empty.", field="content")
    with transaction() as tx:
        task = find("task", caller, ref)
        _check_may_note(caller, task)
        number = tasks.attempt_meant(caller, task, attempt)
        if number == task["attempt"]:
            return _add_note(tx, caller, task, content, urgent)
        said = dumps({"content": content, "urgent": urgent})
        too_late = tasks.late(tx, caller, task, number, "note", said)
    raise too_late


def _check_may_note(caller: Caller, task: dict) -> None:
    """Workers on their own task, everybody else who works on tasks of the project."""
    if can(caller, "task.change", task["project_id"]):
        return
    require(caller, "task.report", task["project_id"], "task")
    if not report_allowed(caller, task, task["server_id"]):
        raise Forbidden("This key adds notes to its own task only, and this is not it.")


def _add_note(tx: Transaction, caller: Caller, task: dict, content: str, urgent: bool) -> dict:
    note = {
        "id": new_id(),
        "project_id": task["project_id"],
        "task_id": task["id"],
        "attempt": task["attempt"],
        "content": content,
        "urgent": int(urgent),
        "author": caller.actor,
        "at": tx.now,
    }
    insert_many("note", tuple(note), [tuple(note.values())])
    details = {
        "note_id": note["id"],
        "content": content[:EVENT_TEXT],
        "urgent": urgent,
        "author": caller.actor,
    }
    _say(tx, task, "task_note_added", caller, details)
    body = {k: note[k] for k in ("content", "author")} | {"note_id": note["id"], "urgent": urgent}
    if task["status"] in cascade.HOLDS_SLOT and not _is_worker(caller, task):
        _command(tx, "task_note", task, body)
    about = {"mentioned_via": "dependency", "about_task_id": task["id"], "about": task["title"]}
    for row in _workers_below(task["id"]):
        if not _is_worker(caller, row):
            _command(tx, "task_note", row, body | about)
    return note


def _is_worker(caller: Caller, task: dict) -> bool:
    """Whether the caller is, or may well be, who works on the task: the programs of a server's
    sessions may all speak with its key, and nobody should be told what they have just said."""
    if caller.kind == "server":
        return caller.server_id == task["server_id"]
    return caller.kind == "session" and caller.session_id == task["session_id"]


def _workers_below(task_id: str) -> list[dict]:
    """Tasks that depend on this one in any way and are being worked on."""
    return rows(
        "SELECT DISTINCT t.* FROM dependency d JOIN task t ON t.id = d.task_id"
        f" WHERE d.upstream_id = ? AND t.{moves.HELD} ORDER BY t.seq",
        (task_id,),
    )


def _command(tx: Transaction, kind: str, task: dict, body: dict) -> None:
    """Have the worker's session told; a task without one has nobody to tell."""
    if task["session_id"]:
        moves.command(tx, task["server_id"], kind, task["session_id"], task, body)
