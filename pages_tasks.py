"""The pages of tasks."""

import re

from flask import render_template, request, url_for

import api
import auth
import cascade
import inbox
import permissions
import reading
import servers
import sessions
import tasks
from models import Invalid, Refused, iso, one, rows
from pages import (
    ANSWER_MOST,
    AT_WORK,
    NAME_MOST,
    NOT_FINISHED,
    SPEC_MOST,
    TITLE_MOST,
    as_json,
    as_object,
    bp,
    choice_of,
    chosen,
    done,
    go,
    lines_of,
    may_create,
    named,
    object_of,
    person,
    scope,
    show,
    text_of,
    words_of,
)
from pages_permissions import CHANGES_SHOWN

TASKS_PER_PAGE = 100
COLUMN_MOST = 50  # cards in a column of the board
SEVERAL_MOST = 200  # tasks one deed may be done to
FILTERS = {
    "": "any state",
    "open": "not finished",
    "at-work": "at work",
    **{state: state.replace("_", " ") for state in cascade.STATES},
}
GROUPS = {"open": NOT_FINISHED, "at-work": AT_WORK}
BOARD = {
    "Waiting": "pending",
    "Assigned": "assigned,planning",
    "Running": "running",
    "Needs a person": "plan_review,needs_human",
    "Done": "done",
    "Failed or cancelled": "failed,cancelled",
}
FIELDS = ("status", "server", "priority", "pipeline", "q")  # of the filter, as the address has them


# ── all of them ───────────────────────────────────────────────────────────────────────────────


@bp.get("/tasks")
def task_list():
    """The tasks that fit the filter in the address: a table, newest first, or a board."""
    wanted = {name: request.args.get(name, "").strip() for name in FIELDS}
    view = "board" if request.args.get("view") == "board" else "list"
    found = _board(wanted) if view == "board" else _table(wanted)
    return show(
        f"tasks/{view}.html",
        **found,
        view=view,
        wanted=wanted,
        filtered=any(wanted.values()),
        given={k: v for k, v in wanted.items() if v},
        filters=FILTERS,
        priorities=reading.PRIORITIES,
        among=servers.list_servers(scope()),
        pipeline=_pipeline(wanted["pipeline"]),
        may_create=bool(may_create()),
        may_change=any(auth.can(person(), "task.change", p) for p in scope()),
    )


def _table(wanted: dict) -> dict:
    found, cursor = _filtered(
        wanted, wanted["status"], TASKS_PER_PAGE, request.args.get("cursor", type=int)
    )
    return {"tasks": reading.tasks_json(found), "cursor": cursor}


def _board(wanted: dict) -> dict:
    """The newest of each column; how many there are beyond is not counted."""
    columns = []
    for title, states in BOARD.items():
        found, more = _filtered(wanted, states, COLUMN_MOST)
        columns.append({"title": title, "cards": reading.cards(found), "more": more is not None})
    return {"columns": columns}


def _filtered(wanted: dict, status: str, limit: int, cursor: int | None = None):
    server = wanted["server"] and servers.get_server(person(), wanted["server"])["id"]
    return reading.list_tasks(
        scope(),
        status=GROUPS.get(status, status) or None,
        q=wanted["q"] or None,
        server_id=server or None,
        pipeline_id=wanted["pipeline"] or None,
        priority=wanted["priority"] or None,
        limit=limit,
        cursor=cursor,
    )


def _pipeline(pipeline_id: str | None) -> dict | None:
    """{id, name} of a pipeline the person can see."""
    if not pipeline_id:
        return None
    return reading.get_pipeline(person(), pipeline_id)


def _assign_to(ref: str) -> None:
    kind, _, target = request.form.get("to", "").partition(":")
    tasks.assign(person(), ref, **({kind: target} if kind in ("server", "session") else {}))


def _prioritise(ref: str) -> None:
    priority = choice_of("priority", reading.PRIORITIES)
    if priority is None:
        raise Invalid("Choose a priority first.", field="priority")
    tasks.update(person(), ref, {"priority": priority})


SEVERAL = {  # what can be done to several tasks at once: (what was done, how)
    "assign": ("assigned", _assign_to),
    "priority": ("changed", _prioritise),
    "cancel": ("cancelled", lambda ref: tasks.cancel(person(), ref)),
    "retry": ("opened again", lambda ref: tasks.retry(person(), ref)),
}


@bp.post("/tasks/several")
def change_several():
    """Do one thing to each task that was picked; one that refuses does not hinder the others."""
    picked = request.form.getlist("ids")
    verb = choice_of("verb", tuple(SEVERAL))
    if verb is None or not picked:
        raise Invalid("Pick the tasks first, then say what is to be done.", field="ids")
    if len(picked) > SEVERAL_MOST:
        raise Invalid(f"{len(picked)} tasks at once are too many: {SEVERAL_MOST} at most.")
    word, deed = SEVERAL[verb]
    refused = []
    for ref in picked:
        try:
            deed(ref)
        except (Refused, cascade.RuleBroken) as why:
            refused.append({"title": _title(ref), "why": str(why)})
    if not request.headers.get("HX-Request"):
        return go(url_for("pages.task_list"))
    page = render_template(
        "tasks/_several.html", word=word, count=len(picked) - len(refused), refused=refused
    )
    return page, 200, {"HX-Trigger": "live-now"}


def _title(ref: str) -> str:
    found = one("SELECT title FROM task WHERE id = ?", (ref,))
    return found["title"] if found else ref


# ── making and changing one ───────────────────────────────────────────────────────────────────


@bp.get("/tasks/new")
def new_task():
    """The form for a task of one project."""
    allowed = may_create()
    if not allowed:
        raise Invalid("There is no project you may create tasks in: make one, or ask an admin.")
    project = chosen() or allowed[0]
    return _form("tasks/new.html", project, {"profile": project["profile"]}, allowed=allowed)


@bp.get("/tasks/<ref>/edit")
def edit_task(ref):
    """The same form for a task that is there."""
    row = auth.find("task", person(), ref)
    auth.require(person(), "task.change", row["project_id"], "task")
    return _form("tasks/edit.html", {"id": row["project_id"]}, reading.task_json(row))


def _form(page: str, project: dict, task: dict, **more):
    latest, _ = reading.list_tasks([project["id"]], limit=TASKS_PER_PAGE)
    found = servers.list_servers([project["id"]])
    have = {
        kind: sorted({word for s in found for word in s[kind] or ()})
        for kind in ("repos", "languages", "frameworks", "capabilities")
    }
    return render_template(
        page,
        target=project,
        task=task,
        candidates=reading.cards(latest),
        have=have,
        priorities=reading.PRIORITIES,
        types=tasks.TYPES,
        kinds=("blocks", "input", "related"),
        importance=IMPORTANCE,
        rest=_rest_of(task.get("structured_spec") or {}),
        **more,
    )


@bp.post("/tasks")
def create_task():
    """Make a task from the form and show it."""
    project = auth.pick_project(person(), request.form.get("project_id"))
    said = {k: v for k, v in _task_fields().items() if v is not None}
    fields = api.checked(api.TaskIn, {"title": "", **said, "dependencies": _links()})
    made = tasks.create(person(), project, fields)
    return go(url_for("pages.task", ref=made["id"]))


@bp.post("/tasks/<ref>/edit")
def change_task(ref):
    """Change what the form says otherwise; a worker at it is told."""
    row = auth.find("task", person(), ref)
    stands, wanted = _as_form(reading.task_json(row)), _task_fields()
    differs = {k: v for k, v in wanted.items() if (v or None) != (stands.get(k) or None)}
    if differs:
        tasks.update(person(), ref, api.checked(api.TaskChange, differs))
    return go(url_for("pages.task", ref=row["id"]))


def _as_form(task: dict) -> dict:
    """A task as `_task_fields` would read it off its unchanged form."""
    wishes = {k: v for k, v in task["requirements"].items() if k != "repo"}
    spec = task["structured_spec"] and {
        **_rest_of(task["structured_spec"]),
        **{k: v for k, v in task["structured_spec"].items() if k in IN_FIELDS and v},
    }
    return task | {
        "requirements": dict.fromkeys(WISHES, []) | wishes,
        "structured_spec": spec,
        "timeout": task["timeout"] and int(task["timeout"]),
    }


def _rest_of(spec: dict) -> dict:
    """What a structured spec says beyond the form's own fields."""
    limits = spec.get("constraints") or {}
    rest = {k: v for k, v in spec.items() if k not in (*IN_FIELDS, "constraints")}
    kept = {k: v for k, v in limits.items() if k not in WISHES}
    return rest | ({"constraints": kept} if kept else {})


IMPORTANCE = ("must", "should", "could", "wont")
WISHES = ("languages", "frameworks", "capabilities")
IN_FIELDS = ("requirements", "expected_contracts")  # of a structured spec


def _task_fields() -> dict:
    command = lines_of("command")
    return {
        "title": text_of("title", TITLE_MOST),
        "spec": text_of("spec", SPEC_MOST),
        "structured_spec": _structured_spec(),
        "priority": choice_of("priority", reading.PRIORITIES),
        "type": choice_of("type", tasks.TYPES),
        "target_repo": text_of("repo", NAME_MOST),
        "target_branch": text_of("branch", NAME_MOST),
        "requirements": _requirements(),
        "acceptance_criteria": lines_of("acceptance"),
        "auto_assign": "auto_assign" in request.form,
        "require_plan": "require_plan" in request.form,
        "max_attempts": _number("max_attempts"),
        "timeout": _number("timeout"),
        "command": command or None,
        "model": text_of("model", NAME_MOST),
        "mode": text_of("mode", NAME_MOST),
        "profile": "command" if command else text_of("profile", NAME_MOST),
    }


def _requirements() -> dict:
    """What the form wants of a server, beside what it does not show (`prefer`)."""
    return (object_of("kept_requirements") or {}) | {kind: words_of(kind) for kind in WISHES}


def _structured_spec() -> dict | None:
    """The requirements and contracts of the form's rows, and what its JSON says beside them."""
    spec = object_of("structured_spec") or {}
    if double := set(spec) & set(IN_FIELDS):
        raise Invalid(
            f"{' and '.join(sorted(double))} have fields of their own: leave them out of the JSON.",
            field="structured_spec",
        )
    spec |= {"requirements": _asked_for(), "expected_contracts": _contracts_due()}
    return {k: v for k, v in spec.items() if v} or None


def _rows(*names: str) -> list[tuple[str, ...]]:
    """Rows of the form whose first field says something, each without the space around it."""
    columns = ([text.strip() for text in request.form.getlist(name)] for name in names)
    return [row for row in zip(*columns, strict=False) if row[0]]


def _asked_for() -> list[dict]:
    found = []
    for text, weight, kept in _rows("requirement", "importance", "requirement_kept"):
        said = {"description": text} | ({"priority": weight} if weight else {})
        found.append(as_object(kept, "requirement") | said)
    return found


def _contracts_due() -> dict:
    """{key: {description, schema, type}} of what the task is to hand down."""
    found = {}
    fields = ("contract", "contract_description", "contract_schema", "contract_type")
    for key, description, schema, kind in _rows(*fields):
        if key in found:
            raise Invalid(f"The contract {key!r} is there twice: name each once.", field="contract")
        rules = as_json(schema, f"schema of contract {key}") if schema else None
        parts = {"type": kind, "description": description, "schema": rules}
        found[key] = {name: part for name, part in parts.items() if part not in ("", None)}
    return found


def _links() -> list[dict]:
    """The dependencies of the form's rows."""
    return [
        {"depends_on_task_id": after, "dependency_type": kind or None, "contract_key": key or None}
        for after, kind, key in _rows("after", "kind", "key")
    ]


def _number(field: str) -> int | None:
    given = request.form.get(field, "").strip()
    if not given:
        return None
    if not re.fullmatch("[0-9]{1,9}", given):
        raise Invalid(f"The {field.replace('_', ' ')} is not a whole number.", field=field)
    return int(given)


@bp.post("/tasks/<ref>/dependencies")
def add_dependency(ref):
    """Make the task wait for another, take from it, or relate to it."""
    after = text_of("after", NAME_MOST)
    if not after:
        raise Invalid("Choose the task it depends on.", field="after")
    kind = choice_of("kind", ("blocks", "input", "related")) or "blocks"
    tasks.add_dependency(person(), ref, after, kind, text_of("key", NAME_MOST))
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/dependencies/<upstream>/remove")
def remove_dependency(ref, upstream):
    """Let the task not depend on the other any more."""
    tasks.remove_dependency(person(), ref, upstream)
    return done(url_for("pages.task", ref=ref))


# ── one of them ───────────────────────────────────────────────────────────────────────────────


@bp.get("/tasks/<ref>")
def task(ref):
    """Everything about one task."""
    row = auth.find("task", person(), ref)
    shown = reading.task_json(row)
    verbs = {v for v, (starts, _) in cascade.TRANSITIONS.items() if row["status"] in starts}
    may_change = auth.can(person(), "task.change", row["project_id"])
    return show(
        "tasks/task.html",
        task=shown,
        downstream=_downstream(row["id"]),
        contracts=reading.contracts(person(), row["id"]),
        why=reading.explain(person(), row["id"]),
        timeline=named(reading.timeline(person(), row["id"])),
        attempts=_attempts(row["id"]),
        waits=inbox.waiting([row["project_id"]], row["id"]),
        asked=inbox.list_interventions([row["project_id"]], task=row)[:CHANGES_SHOWN],
        requests=permissions.list_requests([], task=row, limit=CHANGES_SHOWN),
        plans=inbox.plans(person(), row["id"]),
        notes=list(reversed(reading.notes(person(), row["id"]))),
        may_change=may_change,
        may_amend=auth.can(person(), "contract.amend", row["project_id"]),
        ended=row["status"] in cascade.FINAL,
        others=_others(row) if row["status"] == "pending" else [],
        verbs=verbs if may_change else set(),
        targets=_targets(row["project_id"]) if "assign" in verbs else {},
        pipeline=one("SELECT id, name FROM pipeline WHERE id = ?", (row["pipeline_id"],)),
    )


def _others(task: dict) -> list[dict]:
    """The newest tasks that this one could depend on."""
    found, _ = reading.list_tasks([task["project_id"]], limit=TASKS_PER_PAGE)
    return [card for card in reading.cards(found) if card["id"] != task["id"]]


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
    _assign_to(ref)
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/notes")
def add_note(ref):
    """Leave a note for the worker and for people; an urgent one interrupts."""
    inbox.add_note(
        person(), ref, text_of("content", ANSWER_MOST) or "", urgent="urgent" in request.form
    )
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/contracts/<key>")
def amend_contract(ref, key):
    """Supply what a finished task should have handed down."""
    given = text_of("data", SPEC_MOST)
    if given is None:
        raise Invalid("The contract's data is missing: give it as JSON.", field="data")
    tasks.amend_contract(person(), ref, key, as_json(given, "data"))
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/cancel")
def cancel_task(ref):
    """Cancel a task, with `downstream` all that waits for it too."""
    tasks.cancel(person(), ref, downstream="downstream" in request.form)
    return done(url_for("pages.task", ref=ref))


@bp.post("/tasks/<ref>/retry")
def retry_task(ref):
    """Open a failed, cancelled or lost task again."""
    tasks.retry(person(), ref)
    return done(url_for("pages.task", ref=ref))
