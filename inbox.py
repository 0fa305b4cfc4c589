"""What waits for a person, and what is said about a task: questions and their answers, plans and
what is decided of them, notes.

A task is `needs_human` exactly while it has pending interventions, and `plan_review` exactly while
the newest version of its plan is pending. What a task that ends leaves open, `moves` closes.
"""

import time

import alerts
import cascade
import moves
import permissions
import tasks
from auth import Caller, can, find, report_allowed, require
from models import (
    Conflict,
    Forbidden,
    Invalid,
    Transaction,
    bus,
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
    claim: str | None = None,
) -> tuple[dict, bool]:
    """Ask a person, or an orchestrator, about a task: (intervention row, made).

    The task waits as `needs_human` until all its questions are answered; the same question asked
    again while it is open is that one. target: a session of the project the question is meant for.
    claim: made by a call that waits for the answer itself (see `collect`).
    Raises Invalid, Forbidden, IllegalMove, NotFound (target), Conflict (late, or too many open).
    """
    if not question.strip():
        raise Invalid("A question cannot be empty.", field="question")
    fields = {"kind": kind, "question": question, "context": context or None, "urgency": urgency}

    def then(tx, caller, task, _said):
        meant_for = {"target_session_id": _target(caller, task, target)}
        asked, made = _ask(tx, caller, task, fields | meant_for)
        return (_claimed(caller, asked, claim, tx.now), made) if claim else (asked, made)

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
            " ended_where = ?, ended_at = ? WHERE id = ? AND status = 'pending' RETURNING *",
            (response, caller.actor, caller.where, tx.now, asked["id"]),
        )
        if answered:
            _pass_on(tx, caller, answered)
            return _intervention(asked["id"])
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
    held = answered["claim"] and (answered["claim_until"] or 0) > tx.now
    if held:
        execute("UPDATE intervention SET delivery = 'held' WHERE id = ?", (answered["id"],))
        tx.tell(f"answer:{answered['id']}")
    else:
        _send_answer(tx, task, answered)


def _send_answer(tx: Transaction, task: dict, answered: dict) -> None:
    """Have the answer typed into the worker's session."""
    if not task["session_id"]:
        return
    execute("UPDATE intervention SET delivery = 'sent' WHERE id = ?", (answered["id"],))
    said = {"intervention_id": answered["id"], "author": answered["ended_by"]}
    said |= {name: answered[name] for name in ("question", "response")}
    _command(tx, "intervention_response", task, said)


CLAIM_S = 20.0  # a call that collects is given this long to call again


def collect(caller: Caller, ref: str, claim: str, wait_s: float = 0) -> dict:
    """Wait up to `wait_s` seconds for the answer; the intervention's row, perhaps still pending.

    While the asking session calls this with its claim, an answer is kept for it and is not typed
    into its terminal; anybody else just waits. Raises NotFound, and Conflict `delivered` when the
    answer was typed already.
    """
    deadline = time.monotonic() + wait_s
    asked = find("intervention", caller, ref)
    with bus.subscribe(f"answer:{asked['id']}") as news:
        while True:
            row = _collect(caller, asked["id"], claim)
            left = deadline - time.monotonic()
            if row["status"] != "pending" or left <= 0:
                return row
            news.get(min(left, CLAIM_S / 2))


def _collect(caller: Caller, intervention_id: str, claim: str) -> dict:
    with transaction() as tx:
        row = _intervention(intervention_id)
        if caller.kind != "session" or row["session_id"] != caller.session_id:
            return row
        if row["status"] == "pending":
            return _claimed(caller, row, claim, tx.now)
        if row["status"] == "responded":
            _take_answer(tx, row, claim)
        return _intervention(intervention_id)


def _claimed(caller: Caller, asked: dict, claim: str, now: float) -> dict:
    """Only the asking session claims an answer: what is typed would reach it too."""
    if caller.kind != "session" or asked["session_id"] != caller.session_id:
        return asked
    execute(
        "UPDATE intervention SET claim = ?, claim_until = ? WHERE id = ? AND status = 'pending'",
        (claim, now + CLAIM_S, asked["id"]),
    )
    return _intervention(asked["id"])


def _take_answer(tx: Transaction, answered: dict, claim: str) -> None:
    if answered["delivery"] == "returned" and answered["claim"] == claim:
        return  # its answer was lost on the way
    taken = execute(
        "UPDATE intervention SET delivery = 'returned', claim = ?"
        " WHERE id = ? AND delivery = 'held'",
        (claim, answered["id"]),
    )
    if taken.rowcount != 1:
        how = DELIVERED.get(answered["delivery"], "given to another call that waited for it")
        raise Conflict(
            f"The answer was {how}: it is not given twice. `intervention show` prints it.",
            code="delivered",
            delivery=answered["delivery"],
        )


DELIVERED = {
    "sent": "sent into the session's terminal",
    "typed": "typed into the session's terminal",
    "unknown": "sent into the session's terminal, perhaps without arriving",
    "failed": "sent into the session's terminal, but could not be typed",
}


def send_unclaimed(now: float) -> int:
    """Answers that were kept for a call that does not come back are typed; how many."""
    late = rows("SELECT * FROM intervention WHERE delivery = 'held' AND claim_until < ?", (now,))
    for answered in late:
        with transaction() as tx:
            task = moves.row(answered["task_id"])
            released = execute(
                "UPDATE intervention SET delivery = NULL WHERE id = ? AND delivery = 'held'",
                (answered["id"],),
            )
            if released.rowcount == 1 and task["session_id"] == answered["session_id"]:
                _send_answer(tx, task, answered)
    return len(late)


def notice_stuck(now: float, patience_s: float) -> None:
    """Open an alert for each running task, or one whose plan is being made, without progress for
    too long, and end those of tasks that go on. patience_s: for tasks without a `progress_timeout`
    of their own.

    Signs of progress: what the session's server says of it, and every move of the task. A worker
    that waits for an answer is not stuck, nor one at a usage limit: both are in the inbox already.
    """
    quiet = rows(
        "SELECT t.*, s.name AS session_name, s.activity, MAX(t.updated_at,"
        " COALESCE(s.progress_at, 0)) AS progressed FROM task t LEFT JOIN session s"
        f" ON s.id = t.session_id WHERE t.{moves.HELD} AND t.status IN ('planning', 'running')"
        " AND MAX(t.updated_at, COALESCE(s.progress_at, 0)) + COALESCE(t.progress_timeout, ?) < ?"
        " AND COALESCE(s.activity, '') NOT LIKE 'blocked%' AND COALESCE(s.activity, '') <> 'quota'",
        (patience_s, now),
    )
    known = {
        a["task_id"]: a
        for a in rows("SELECT * FROM alert WHERE kind = 'stuck' AND status = 'open'")
    }
    fresh = [task for task in quiet if task["id"] not in known]
    over = set(known) - {task["id"] for task in quiet}
    if not fresh and not over:
        return
    with transaction() as tx:
        for task in fresh:
            _begin_stuck(tx, task, now)
        for task_id in over:
            alerts.end(tx, known[task_id])


def _begin_stuck(tx: Transaction, task: dict, now: float) -> None:
    session = task["session_id"] and one(
        "SELECT * FROM session WHERE id = ?", (task["session_id"],)
    )
    where = f" in session {session['name']} ({session['activity']})" if session else ""
    minutes = max(1, round((now - task["progressed"]) / 60))
    sentence = f"No progress for {minutes} min{where}: {task['title'][:300]}"
    alerts.begin(
        tx, "stuck", task["project_id"], sentence, session=session or None, task_id=task["id"]
    )


def delivered(tx: Transaction, session: dict, intervention_id: str, how: str, why) -> None:
    """What became of an answer that was to be typed: typed, unknown or failed."""
    execute(
        "UPDATE intervention SET delivery = ?, delivery_why = ?"
        " WHERE id = ? AND session_id = ? AND delivery = 'sent'",
        (how, why, intervention_id, session["id"]),
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
    """What waits for a person, oldest first, at most 200 of each kind: interventions, permission
    requests and alerts as the API shows them, and plans, each with its `kind` (question, help,
    approval, plan, permission, or one of `alerts.KINDS`) and `since`."""
    asked = _pending_of(project_ids, task_id)
    items = [
        one | {"kind": one["intervention_type"], "since": one["created_at"]}
        for one in interventions_json(asked)
    ]
    items += [
        asked | {"kind": "permission", "since": asked["asked_at"]}
        for asked in permissions.waiting(project_ids, task_id)
    ]
    items += [alert | {"since": alert["at"]} for alert in alerts.waiting(project_ids, task_id)]
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
        f" (SELECT COUNT(*) FROM permission WHERE project_id IN {among} AND status = 'pending') +"
        f" (SELECT COUNT(*) FROM alert WHERE project_id IN {among} AND status = 'open') +"
        f" (SELECT COUNT(*) FROM task WHERE project_id IN {among} AND status = 'plan_review')"
        " AS n",
        project_ids * 4,
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
        "delivery": row["delivery"],
        "delivery_why": row["delivery_why"],
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
            "UPDATE plan SET status = ?, feedback = ?, decided_by = ?, decided_where = ?,"
            " decided_at = ? WHERE task_id = ? AND version = ?",
            (status, words, caller.actor, caller.where, tx.now, task["id"], last["version"]),
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
    if _is_worker(caller, task):
        execute("UPDATE session SET progress_at = ? WHERE id = ?", (tx.now, task["session_id"]))
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
