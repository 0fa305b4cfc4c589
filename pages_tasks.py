"""The pages of tasks."""

from flask import render_template, request, url_for

import auth
import cascade
import reading
import servers
import sessions
import tasks
from models import Invalid, iso, one, rows
from pages import (
    AT_WORK,
    NAME_MOST,
    SPEC_MOST,
    TITLE_MOST,
    bp,
    choice_of,
    chosen,
    done,
    go,
    lines_of,
    named,
    person,
    scope,
    show,
    text_of,
    visible,
    words_of,
)

TASKS_PER_PAGE = 100
FILTERS = {
    "": "any state",
    "open": "not finished",
    "at-work": "at work",
    **{state: state.replace("_", " ") for state in cascade.STATES},
}
GROUPS = {"open": ",".join(s for s in cascade.STATES if s in cascade.OPEN), "at-work": AT_WORK}


@bp.get("/tasks")
def task_list():
    """The tasks that fit the filter in the address, newest first."""
    status, q = request.args.get("status", ""), request.args.get("q", "").strip()
    found, cursor = reading.list_tasks(
        scope(),
        status=GROUPS.get(status, status) or None,
        q=q or None,
        limit=TASKS_PER_PAGE,
        cursor=request.args.get("cursor", type=int),
    )
    return show(
        "tasks/list.html",
        tasks=reading.tasks_json(found),
        status=status,
        q=q,
        filters=FILTERS,
        cursor=cursor,
        may_create=bool(_may_create()),
    )


def _may_create() -> list[dict]:
    return [p for p in visible() if auth.can(person(), "task.create", p["id"])]


@bp.get("/tasks/new")
def new_task():
    """The form for a task of one project."""
    allowed = _may_create()
    if not allowed:
        raise Invalid("There is no project you may create tasks in: make one, or ask an admin.")
    project = chosen() or allowed[0]
    latest, _ = reading.list_tasks([project["id"]], limit=TASKS_PER_PAGE)
    return render_template(
        "tasks/new.html",
        target=project,
        allowed=allowed,
        candidates=reading.tasks_json(latest),
        repos=sorted({r for s in servers.list_servers([project["id"]]) for r in s["repos"]}),
        priorities=reading.PRIORITIES,
        types=tasks.TYPES,
    )


@bp.post("/tasks")
def create_task():
    """Make a task from the form and show it."""
    project = auth.pick_project(person(), request.form.get("project_id"))
    task = tasks.create(person(), project, _task_fields())
    return go(url_for("pages.task", ref=task["id"]))


def _task_fields() -> dict:
    command = lines_of("command")
    return {
        "title": text_of("title", TITLE_MOST),
        "spec": text_of("spec", SPEC_MOST),
        "priority": choice_of("priority", reading.PRIORITIES),
        "type": choice_of("type", tasks.TYPES),
        "target_repo": text_of("repo", NAME_MOST),
        "requirements": {"languages": words_of("languages") or None},
        "acceptance_criteria": lines_of("acceptance"),
        "dependency_ids": request.form.getlist("after"),
        "auto_assign": "auto_assign" in request.form,
        "command": command or None,
        "profile": "command" if command else None,
    }


@bp.get("/tasks/<ref>")
def task(ref):
    """Everything about one task."""
    row = auth.find("task", person(), ref)
    shown = reading.task_json(row)
    verbs = {v for v, (starts, _) in cascade.TRANSITIONS.items() if row["status"] in starts}
    return show(
        "tasks/task.html",
        task=shown,
        downstream=_downstream(row["id"]),
        contracts=reading.contracts(person(), row["id"]),
        why=reading.explain(person(), row["id"]),
        timeline=named(reading.timeline(person(), row["id"])),
        attempts=_attempts(row["id"]),
        verbs=verbs if auth.can(person(), "task.change", row["project_id"]) else set(),
        targets=_targets(row["project_id"]) if "assign" in verbs else {},
        pipeline=one("SELECT id, name FROM pipeline WHERE id = ?", (row["pipeline_id"],)),
    )


def _downstream(task_id: str) -> list[dict]:
    """Tasks that wait for this one, take from it or are linked to it."""
    return rows(
        "SELECT d.kind, d.key, d.resolved, t.* FROM dependency d JOIN task t ON t.id = d.task_id"
        " WHERE d.upstream_id = ? ORDER BY t.seq",
        (task_id,),
    )


def _attempts(task_id: str) -> list[dict]:
    """Attempts that have ended, oldest first."""
    return [
        row
        | {at: iso(row[at]) for at in ("assigned_at", "started_at", "ended_at")}
        | {"outcome": tasks.PAST[row["outcome"]]}
        for row in rows(
            "SELECT a.*, v.name AS server, s.name AS session FROM attempt a"
            " LEFT JOIN server v ON v.id = a.server_id LEFT JOIN session s ON s.id = a.session_id"
            " WHERE a.task_id = ? ORDER BY a.number",
            (task_id,),
        )
    ]


def _targets(project_id: str) -> dict[str, list[dict]]:
    """Whom a task of the project can be given to by hand."""
    return {
        "server": servers.list_servers([project_id]),
        "session": [
            s
            for s in sessions.list_sessions([project_id])
            if s["status"] in cascade.SESSION_LIVE and s["role"] != "worker"
        ],
    }


@bp.post("/tasks/<ref>/assign")
def assign_task(ref):
    """Give a task to a server or session, or to whoever fits best."""
    kind, _, target = request.form.get("to", "").partition(":")
    tasks.assign(person(), ref, **({kind: target} if kind in ("server", "session") else {}))
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/cancel")
def cancel_task(ref):
    """Cancel a task, with `downstream` all that waits for it too."""
    tasks.cancel(person(), ref, downstream="downstream" in request.form)
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/retry")
def retry_task(ref):
    """Open a failed or cancelled task again."""
    tasks.retry(person(), ref)
    return done(url_for("pages.task", ref=ref))
