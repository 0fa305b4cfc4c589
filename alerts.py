"""Alerts: what a person should look at although nobody has asked: a worker that makes no progress
or stands at a usage limit, something that was perhaps not delivered, work whose server or session
is gone, tasks that no server takes, a server that cannot do its work.

An alert is open once for its kind and what it is about, until it is over or somebody dismisses it.
"""

from auth import HUB, Caller, find, require
from models import (
    Conflict,
    Invalid,
    Transaction,
    execute,
    insert_many,
    iso,
    labels,
    new_id,
    newest,
    one,
    rows,
    transaction,
)

KINDS = ("stuck", "quota", "delivery", "prompt", "lost", "queue", "server")
STATUSES = ("open", "dismissed", "over")
LIST_MOST = 500
WAITING_MOST = 200
SENTENCE_MOST = 2000


def begin(
    tx: Transaction,
    kind: str,
    project_id: str,
    sentence: str,
    *,
    session: dict | None = None,
    task_id: str | None = None,
    server_id: str | None = None,
    about: str = "",
) -> bool:
    """Open an alert unless the same one is open; whether it was opened.

    about: an id that tells it from others of its kind in the same session.
    """
    alert = {
        "id": new_id(),
        "project_id": project_id,
        "kind": kind,
        "session_id": session["id"] if session else None,
        "server_id": session["server_id"] if session else server_id,
        "task_id": task_id or (session["task_id"] if session else None),
        "about": about,
        "sentence": sentence[:SENTENCE_MOST],
        "at": tx.now,
    }
    if one(
        "SELECT 1 FROM alert WHERE status = 'open' AND kind = ? AND COALESCE(session_id, '') = ?"
        " AND COALESCE(task_id, '') = ? AND about = ?",
        (kind, alert["session_id"] or "", alert["task_id"] or "", about),
    ):
        return False
    insert_many("alert", tuple(alert), [tuple(alert.values())])
    _emit(tx, alert, "alert_raised", HUB.actor, {"sentence": alert["sentence"]})
    return True


COMMAND_WORDS = {
    "intervention_response": "The answer to a question",
    "intervention_for_session": "A question",
    "permission_answer": "The answer to a permission request",
    "permission_denied": "The reason of a denial",
    "plan_approved": "The approval of a plan",
    "plan_revision": "What should be different in a plan",
    "task_note": "A note",
    "task_updated": "Word of a changed task",
    "task_assigned": "Word of a new task",
    "task_status_update": "News of a task",
}
DELIVERY_WORDS = {
    "unknown": "may or may not have reached",
    "failed": "did not reach",
}


def undelivered(tx: Transaction, session: dict, how: str, why: str | None, **of) -> None:
    """Open an alert on something that was to be said to a session (a row).

    how: `unknown` or `failed`. of: {command: its type, about: its id}.
    """
    what = COMMAND_WORDS.get(of["command"], "A message")
    sentence = f"{what} {DELIVERY_WORDS[how]} session {session['name']}: {why}."
    begin(tx, "delivery", session["project_id"], sentence, session=session, about=of["about"])


def _emit(tx: Transaction, alert: dict, event: str, actor: str, details: dict) -> None:
    tx.emit(
        event,
        alert["project_id"],
        actor,
        {"alert_id": alert["id"], "kind": alert["kind"]} | details,
        task=alert["task_id"],
        session=alert["session_id"],
        server=alert["server_id"],
    )


def over(tx: Transaction, session_id: str, *kinds: str, actor: str = HUB.actor) -> None:
    """What the alerts of a session (of these kinds, or of all) were about has passed."""
    among = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
    for alert in rows(
        f"SELECT * FROM alert WHERE session_id = ? AND status = 'open'{among}",
        (session_id, *kinds),
    ):
        end(tx, alert, actor)


def end(tx: Transaction, alert: dict, actor: str = HUB.actor) -> None:
    """What this alert (a row) was about has passed; nothing happens if it has ended already."""
    ended = execute(
        "UPDATE alert SET status = 'over', ended_by = ?, ended_at = ?"
        " WHERE id = ? AND status = 'open'",
        (actor, tx.now, alert["id"]),
    )
    if ended.rowcount == 1:
        _emit(tx, alert, "alert_ended", actor, {"status": "over"})


def dismiss(caller: Caller, ref: str) -> dict:
    """Take an alert off the list; its row. Raises NotFound, Forbidden, Conflict (ended already)."""
    alert = find("alert", caller, ref)
    require(caller, "permission.decide", alert["project_id"], "alert")
    with transaction() as tx:
        ended = one(
            "UPDATE alert SET status = 'dismissed', ended_by = ?, ended_at = ?"
            " WHERE id = ? AND status = 'open' RETURNING *",
            (caller.actor, tx.now, alert["id"]),
        )
        if ended:
            _emit(tx, ended, "alert_ended", caller.actor, {"status": "dismissed"})
            return ended
    stands = one("SELECT * FROM alert WHERE id = ?", (alert["id"],))
    if stands["ended_by"] == caller.actor:
        return stands
    raise Conflict(
        f"This alert ended at {iso(stands['ended_at'])} already ({stands['status']}, by "
        f"{stands['ended_by']}): there is nothing to dismiss."
    )


def list_alerts(project_ids: list[str], status: str | None = None) -> list[dict]:
    """Alerts as JSON, newest first, the last 500. Raises Invalid for an unknown status."""
    if status and status not in STATUSES:
        raise Invalid(f"Unknown status {status!r}: use one of {', '.join(STATUSES)}.")
    branches = [
        {"project_id": project, "status": each}
        for project in project_ids
        for each in ([status] if status else STATUSES)
    ]
    return alerts_json(newest("alert", branches, "", [], LIST_MOST))


def waiting(project_ids: list[str], task_id: str | None = None) -> list[dict]:
    """The open alerts, oldest first, at most 200."""
    which, values = ("AND task_id = ?", [task_id]) if task_id else ("", [])
    found = rows(
        f"SELECT * FROM alert WHERE project_id IN ({', '.join('?' * len(project_ids))})"
        f" AND status = 'open' {which} ORDER BY seq LIMIT ?",
        [*project_ids, *values, WAITING_MOST],
    )
    return alerts_json(found)


def alerts_json(found: list[dict]) -> list[dict]:
    """Alert rows as the API shows them."""
    names = labels("session", "name", {row["session_id"] for row in found if row["session_id"]})
    titles = labels("task", "title", {row["task_id"] for row in found if row["task_id"]})
    shown = ("id", "kind", "sentence", "project_id", "session_id", "task_id", "status", "ended_by")
    return [
        {name: row[name] for name in shown}
        | {
            "session_name": names.get(row["session_id"]),
            "task_title": titles.get(row["task_id"]),
            "at": iso(row["at"]),
            "ended_at": iso(row["ended_at"]),
        }
        for row in found
    ]
