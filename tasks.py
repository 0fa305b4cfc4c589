"""Every use case on tasks: one function, one transaction, events after the commit.

What follows from a move (contracts, unblocking, routing) happens in the same transaction, at a cost
that depends on what the move touches and never on how many tasks there are.
"""

from collections import defaultdict
from contextlib import suppress

import cascade
import moves
import reading
import routing
from auth import ALIVE, HUB, Caller, find, report_allowed, require
from models import (
    UNHEARD,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Transaction,
    dumps,
    execute,
    in_chunks,
    insert_many,
    labels,
    loads,
    new_id,
    one,
    rows,
    transaction,
)
from moves import LIVE_SESSION, do
from reading import CLOCKS, PRIORITIES

TYPES = ("feature", "bugfix", "refactor", "chore", "docs")
ON_LOST = ("retry", "ask")
AT_ONCE = 500  # tasks a job looks at in one run
FREE_ATTEMPTS = 5  # as often a task is tried again for faults that are not its worker's


def create(caller: Caller, project: dict, data: dict) -> dict:
    """Make one task of `project` (a row); returns its row.

    data: the create fields of the API. Raises Forbidden, Invalid, NotFound, RuleBroken; then
    nothing was made.
    """
    require(caller, "task.create", project["id"], "project")
    with transaction() as tx:
        task = _insert(tx, caller, project, data)
        links = [{"depends_on_task_id": up} for up in data.get("dependency_ids") or ()]
        for link in links + (data.get("dependencies") or []):
            _link(tx, caller, task, link)
        return _settle_new(tx, task)


def create_pipeline(caller: Caller, project: dict, name: str, items: list[dict]) -> dict:
    """Make the tasks of a pipeline, all or none; returns the pipeline's row with `id_map`.

    items: create fields with `id` (unique in the pipeline) and `depends_on`: ids, or
    {task, type, key}. Raises Invalid naming the task that is wrong.
    """
    require(caller, "task.create", project["id"], "project")
    links = _check_pipeline(items)
    with transaction() as tx:
        pipeline_id = new_id()
        made = {}
        for item in items:
            with _naming(item["id"]):
                made[item["id"]] = _insert(tx, caller, project, item | {"pipeline_id": pipeline_id})
        for item in items:
            with _naming(item["id"]):
                task = made[item["id"]]
                for link in links[item["id"]]:
                    upstream, kind, key = made[link["task"]], link["type"], link["key"]
                    _join(tx, task, upstream, kind, key, caller.actor, acyclic=True)
        id_map = {key: task["id"] for key, task in made.items()}
        execute(
            "INSERT INTO pipeline (id, project_id, name, id_map, created_by, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (pipeline_id, project["id"], name, dumps(id_map), caller.actor, tx.now),
        )
        for item in items:
            task = _settle_new(tx, moves.row(id_map[item["id"]]))
            if item.get("assign"):
                with _naming(item["id"]):
                    _assign_by_name(tx, caller, task, item["assign"], item)
        return one("SELECT * FROM pipeline WHERE id = ?", (pipeline_id,))


class _Undone(Exception):
    pass


def try_pipeline(caller: Caller, project: dict, name: str, items: list[dict]) -> dict:
    """What `create_pipeline` would make, as the API shows it; nothing is made.

    Raises what `create_pipeline` raises.
    """
    shown = {}
    with suppress(_Undone), transaction():
        shown = reading.pipeline_json(
            create_pipeline(caller, project, name, items), with_tasks=True
        )
        raise _Undone
    return shown


class _naming:
    """Puts the pipeline's own name of a task before the sentence of a refusal."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, cascade.RuleBroken | Invalid | NotFound | Conflict):
            raise Invalid(
                f"Task {self.name!r}: {error} Nothing was created.", task=self.name
            ) from error


def _check_pipeline(items: list[dict]) -> dict[str, list[dict]]:
    """{id: [{task, type, key}]} of a pipeline whose names, links and order make sense."""
    if not items:
        raise Invalid("The pipeline has no tasks: give at least one.")
    seen = set()
    for item in items:
        if item["id"] in seen:
            raise Invalid(f"Two tasks of the pipeline are called {item['id']!r}: rename one.")
        seen.add(item["id"])
    links = {item["id"]: [_as_link(dep) for dep in item.get("depends_on") or ()] for item in items}
    for name, deps in links.items():
        for dep in deps:
            if dep["task"] not in seen:
                raise Invalid(
                    f"Task {name!r} depends on {dep['task']!r}, which is not in this pipeline. "
                    "Nothing was created.",
                    task=name,
                )
    order = {n: [d["task"] for d in deps if d["type"] != "related"] for n, deps in links.items()}
    cycle = cascade.find_cycle(order)
    if cycle:
        raise cascade.Cycle(
            f"The pipeline waits for itself: {' → '.join(cycle)}. Nothing was created.",
            cycle=cycle,
        )
    return links


def _as_link(dep) -> dict:
    if isinstance(dep, str):
        return {"task": dep, "type": "blocks", "key": None}
    kind = dep.get("type") or ("input" if dep.get("key") else "blocks")
    return {"task": dep["task"], "type": kind, "key": dep.get("key")}


def _insert(tx: Transaction, caller: Caller, project: dict, data: dict) -> dict:
    title = (data.get("title") or "").strip()
    if not title:
        raise Invalid("A task needs a title that is not empty.", field="title")
    spec = data.get("spec")
    if spec is not None and not spec.strip():
        raise Invalid("The spec is empty: leave it out to use the title.", field="spec")
    structured, requirements = _split_spec(data, {})
    task = {
        "id": new_id(),
        "project_id": project["id"],
        "pipeline_id": data.get("pipeline_id"),
        "title": title,
        "spec": spec or title,
        "structured_spec": structured,
        "acceptance_criteria": dumps(data.get("acceptance_criteria") or []),
        "type": data.get("type") or "feature",
        "priority": _priority(data.get("priority") or "normal"),
        "target_branch": data.get("target_branch"),
        "requirements": dumps(requirements),
        "require_plan": int(bool(data.get("require_plan"))),
        "profile": data.get("profile") or project["profile"],
        "model": data.get("model"),
        "mode": data.get("mode"),
        "command": dumps(data["command"]) if data.get("command") else None,
        "auto_assign": int(bool(data.get("auto_assign"))),
        "on_lost": data.get("on_lost") or "retry",
        "max_attempts": data.get("max_attempts") or 1,
        "retry_delay_s": data.get("retry_delay_s") or 0,
        **{clock: data.get(clock) for clock in CLOCKS},
        "source_session_id": _orderer(caller, project, data.get("session_id")),
        "created_by": caller.actor,
        "created_at": tx.now,
        "updated_at": tx.now,
    }
    if task["command"] and task["profile"] != "command":
        raise Invalid(
            f"A command is for the profile `command`, this task has {task['profile']!r}: "
            "leave one of the two out.",
            field="command",
        )
    insert_many("task", tuple(task), [tuple(task.values())])
    tx.emit(
        "task_created",
        project["id"],
        caller.actor,
        {"title": title, "type": task["type"], "priority": PRIORITIES[task["priority"]]},
        task=task["id"],
    )
    return moves.row(task["id"])


def _priority(name: str) -> int:
    if name not in PRIORITIES:
        raise Invalid(f"Unknown priority {name!r}: use one of {', '.join(PRIORITIES)}.")
    return PRIORITIES.index(name)


def _orderer(caller: Caller, project: dict, given: str | None) -> str | None:
    """The session a task is ordered from: the caller's own, or one of the project it names."""
    found = one("SELECT id, project_id FROM session WHERE id = ?", (caller.session_id or given,))
    return found["id"] if found and found["project_id"] == project["id"] else None


def _split_spec(data: dict, had: dict) -> tuple[str | None, dict]:
    """(structured_spec as stored, requirements): what both say is kept in the latter alone.

    `had`: the requirements so far, for what `data` does not mention. Raises Invalid when two
    places of the same request contradict each other.
    """
    structured = data.get("structured_spec")
    if structured is not None:
        cascade.check_spec(structured)
    constraints = (structured or {}).get("constraints") or {}
    given = data.get("requirements") or {}
    merged = {**had, **{k: v for k, v in given.items() if v is not None}}
    for name, elsewhere, where in (
        ("repo", data.get("target_repo"), "target_repo"),
        ("languages", constraints.get("languages"), "structured_spec.constraints.languages"),
        ("frameworks", constraints.get("frameworks"), "structured_spec.constraints.frameworks"),
    ):
        if elsewhere is None:
            continue
        if given.get(name) is not None and given[name] != elsewhere:
            raise Invalid(
                f"requirements.{name} is {given[name]!r} but {where} is {elsewhere!r}: "
                "they are the same thing, give it once.",
                field=f"requirements.{name}",
            )
        merged[name] = elsewhere
    if structured is None:
        return None, {k: v for k, v in merged.items() if v}
    rest = {k: v for k, v in constraints.items() if k not in ("languages", "frameworks")}
    stored = {k: v for k, v in structured.items() if k != "constraints"}
    if rest:
        stored["constraints"] = rest
    return dumps(stored), {k: v for k, v in merged.items() if v}


def _settle_new(tx: Transaction, task: dict) -> dict:
    """Route a new task if somebody asked for it, or if all it depends on is done already."""
    ordered = one(
        "SELECT 1 FROM dependency WHERE task_id = ? AND kind <> 'related' LIMIT 1", (task["id"],)
    )
    if task["open_deps"]:
        return task
    if ordered:
        _fill_inputs([task["id"]])
    if ordered or task["auto_assign"]:
        routing.place_one(tx, moves.row(task["id"]))
    return moves.row(task["id"])


def add_dependency(caller: Caller, ref: str, upstream: str, kind: str, key: str | None) -> dict:
    """Make a task wait for, take an input from, or relate to another; returns the dependency row.

    Raises RuleBroken (kind, key), Cycle, Conflict (there already, or the task has begun),
    NotFound (upstream unknown or of another project).
    """
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    with transaction() as tx:
        link = {"depends_on_task_id": upstream, "dependency_type": kind, "contract_key": key}
        return _link(tx, caller, moves.row(task["id"]), link)


def _link(tx: Transaction, caller: Caller, task: dict, link: dict) -> dict:
    upstream = find("task", caller, link["depends_on_task_id"])
    if upstream["project_id"] != task["project_id"]:
        raise NotFound(f"There is no task {link['depends_on_task_id']!r} in this project.")
    kind = link.get("dependency_type") or "blocks"
    return _join(tx, task, upstream, kind, link.get("contract_key"), actor=caller.actor)


def _join(
    tx, task: dict, upstream: dict, kind: str, key: str | None, actor="hub", *, acyclic=False
) -> dict:
    """Insert one dependency. acyclic: the caller has checked the whole graph already."""
    cascade.check_dependency(kind, key)
    ordering = kind in cascade.ORDERING
    if upstream["id"] == task["id"]:
        raise cascade.Cycle("A task cannot depend on itself.")
    if ordering and task["status"] != "pending":
        raise Conflict(
            f"The task is {task['status']}: an order can only be added while it is pending."
        )
    if (
        ordering
        and not acyclic
        and (path := cascade.path_to(upstream["id"], task["id"], _upstreams))
    ):
        raise cascade.Cycle(
            "This dependency would make a cycle: "
            f"{' → '.join(_titles([task['id'], *path]))}. Nothing was changed.",
            cycle=[task["id"], *path],
        )
    _refuse_double(task, upstream, kind, key)
    resolved = ordering and _already_resolved(upstream, kind, key)
    added = one(
        "INSERT INTO dependency (task_id, upstream_id, kind, key, resolved)"
        " VALUES (?, ?, ?, ?, ?) RETURNING *",
        (task["id"], upstream["id"], kind, key or "", int(resolved)),
    )
    if ordering and not resolved:
        execute(
            "UPDATE task SET open_deps = open_deps + 1, waiting_since = NULL, signature = NULL"
            " WHERE id = ?",
            (task["id"],),
        )
    if kind == "input" and resolved:
        _fill_again([task["id"]])
    details = {"depends_on": upstream["id"], "title": upstream["title"], "type": kind}
    tx.emit(
        "dependency_added",
        task["project_id"],
        actor,
        details | ({"key": key} if key else {}),
        task=task["id"],
    )
    return added


def _refuse_double(task: dict, upstream: dict, kind: str, key: str | None) -> None:
    if one(
        "SELECT 1 FROM dependency WHERE task_id = ? AND upstream_id = ? AND kind = ? AND key = ?",
        (task["id"], upstream["id"], kind, key or ""),
    ):
        raise Conflict("This dependency is there already.", code="duplicate")
    if kind == "input" and one(
        "SELECT 1 FROM dependency WHERE task_id = ? AND kind = 'input' AND key = ?",
        (task["id"], key),
    ):
        raise Conflict(
            f"The task already takes an input {key!r} from another task: a key has one source.",
            code="duplicate",
        )


def _already_resolved(upstream: dict, kind: str, key: str | None) -> bool:
    if upstream["status"] != "done":
        return False
    return kind != "input" or bool(
        one("SELECT 1 FROM contract WHERE task_id = ? AND key = ?", (upstream["id"], key))
    )


def _upstreams(ids: list[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for part, marks in in_chunks(ids):
        for task, upstream in execute(
            "SELECT task_id, upstream_id FROM dependency"
            f" WHERE kind <> 'related' AND task_id IN {marks}",
            part,
        ):
            found[task].append(upstream)
    return found


def _titles(ids: list[str]) -> list[str]:
    known = labels("task", "title", set(ids))
    return [known.get(task_id, task_id) for task_id in ids]


def remove_dependency(caller: Caller, ref: str, upstream_ref: str) -> int:
    """Remove all kinds of dependency on one upstream; returns how many. Raises NotFound."""
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    upstream = find("task", caller, upstream_ref)
    with transaction() as tx:
        gone = rows(
            "DELETE FROM dependency WHERE task_id = ? AND upstream_id = ? RETURNING *",
            (task["id"], upstream["id"]),
        )
        if not gone:
            raise NotFound(f"The task does not depend on {upstream['title']!r}.")
        open_ones = [d for d in gone if not d["resolved"] and d["kind"] in cascade.ORDERING]
        if moves.row(task["id"])["status"] == "pending":
            _fill_again([task["id"]])
        tx.emit(
            "dependency_removed",
            task["project_id"],
            caller.actor,
            {"depends_on": upstream["id"], "title": upstream["title"], "removed": len(gone)},
            task=task["id"],
        )
        if open_ones:
            freed = _count_down(tx, {task["id"]: len(open_ones)}, upstream["id"], caller.actor)
            routing.place(tx, task["project_id"], freed, set())
        return len(gone)


def assign(
    caller: Caller,
    ref: str,
    *,
    session: str | None = None,
    session_name: str | None = None,
    server: str | None = None,
    require_plan: bool | None = None,
) -> dict:
    """Give a task to a session or server, or have it routed when none is named.

    A session name that matches no live session is tried as a server's. A blocked task keeps the
    assignee until it is free; a server that is away or full gets the task when it can take it.
    Raises NotFound, Conflict, IllegalMove.
    """
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    with transaction() as tx:
        task = moves.row(task["id"])
        cascade.move(task["status"], "assign")
        if require_plan is not None:
            task = moves.change(tx, task, require_plan=int(require_plan))
        target = _target(caller, task, session, session_name, server)
        return _aim(tx, caller, task, target)


def _assign_by_name(tx, caller: Caller, task: dict, name: str, item: dict) -> None:
    if task["status"] == "pending":
        _aim(tx, caller, task, _target(caller, task, None, name, None))


def _target(caller, task, session, session_name, server) -> dict:
    """{session?, server?} rows meant by an assignment; empty when it is to be routed."""
    if session:
        return _session_target(find("session", caller, session, name="name"), task)
    if session_name:
        live = rows(
            f"SELECT * FROM session WHERE project_id = ? AND name = ? AND {ALIVE['session']}",
            (task["project_id"], session_name),
        )
        if len(live) > 1:
            raise Conflict(
                f"{len(live)} live sessions are called {session_name!r}: use an id.",
                code="ambiguous",
                candidates=[{"id": s["id"], "name": s["name"]} for s in live],
            )
        if live:
            return _session_target(live[0], task)
        server = session_name
    if not server:
        return {}
    return _server_target(caller, server, task)


def _session_target(session: dict, task: dict) -> dict:
    if session["project_id"] != task["project_id"]:
        raise NotFound(f"There is no session {session['name']!r} in this task's project.")
    if session["state"] not in LIVE_SESSION:
        raise Conflict(
            f"Session {session['name']!r} is {session['state']}: choose a live one "
            "(`session list`)."
        )
    return {
        "session": session,
        "server": one("SELECT * FROM server WHERE id = ?", (session["server_id"],)),
    }


def _server_target(caller: Caller, ref: str, task: dict) -> dict:
    try:
        server = find("server", caller, ref, name="name")
    except NotFound:
        raise NotFound(
            f"There is no live session or server called {ref!r} in this project."
        ) from None
    if server["project_id"] != task["project_id"]:
        raise NotFound(f"There is no server {ref!r} in this task's project.")
    if server["revoked"]:
        raise Conflict(f"Server {server['name']!r} is revoked: choose another one.")
    repo = loads(task["requirements"]).get("repo")
    value = routing.server_value(server)
    if repo and repo not in value["repos"]:
        raise Conflict(
            f"Server {server['name']!r} has no repo {repo!r}: choose another server or add the "
            "repo to its agent."
        )
    return {"server": server}


def _aim(tx: Transaction, caller: Caller, task: dict, target: dict) -> dict:
    """Remember whom the task is meant for and give it to them if it is free."""
    if not target:
        task = moves.change(tx, task, auto_assign=1, pinned_server=None, pinned_session=None)
    else:
        task = moves.change(
            tx,
            task,
            pinned_server=target["server"]["id"],
            pinned_session=(target.get("session") or {}).get("id"),
        )
    if task["open_deps"]:
        tx.emit(
            "task_updated",
            task["project_id"],
            caller.actor,
            {"assignee": target["server"]["name"] if target else "whoever fits"},
            task=task["id"],
        )
        return task
    routing.place_one(tx, task, actor=caller.actor)
    return moves.row(task["id"])


def start(caller: Caller, ref: str, attempt: int | None = None) -> dict:
    """The worker has begun; said again it changes nothing. Returns the task's row."""
    return report(caller, ref, "start", None, attempt, _start)


def complete(caller: Caller, ref: str, result, attempt=None, git_diff_stats=None) -> dict:
    """The worker is done: hand down its contracts, unblock, route. Returns the task's row.

    result: any JSON. Raises BadContract (the task stays as it is), Conflict, IllegalMove.
    """

    def finish(tx, caller, task, said):
        return _complete(tx, caller, task, result, said, git_diff_stats)

    return report(caller, ref, "complete", dumps(result), attempt, finish)


def fail(caller: Caller, ref: str, error: str, attempt: int | None = None) -> dict:
    """The worker gave up; retried only while attempts are left. Returns the task's row."""
    return report(caller, ref, "fail", dumps({"error": error}), attempt, _fail)


ENDS = ("complete", "fail")


def report(caller: Caller, ref: str, verb: str, said: str | None, attempt: int | None, then):
    """What a worker says of an attempt, once: the result of `then(tx, caller, task, said)`, or the
    task's row when the same was said before.

    said: the report as stored JSON. attempt: None for the present one, or a session's own. Raises
    Forbidden for a key that is not the attempt's, Conflict `late` (the report is then kept as an
    event) and what `then` raises.
    """
    with transaction() as tx:
        task = find("task", caller, ref)
        require(caller, "task.report", task["project_id"], "task")
        number = attempt_meant(caller, task, attempt)
        past = _past(task, number)
        if not report_allowed(caller, task, (past or task)["server_id"]):
            raise Forbidden("This key reports on its own tasks only, and this is not one of them.")
        stands = _fence(tx, caller, task, verb, said, number, past)
        if stands is None:
            if verb in ENDS and caller.kind in ("user", "hub"):
                _withdraw(tx, task, f"{caller.name} ended the task")
            return then(tx, caller, task, said)
    if isinstance(stands, Conflict):
        raise stands
    return stands


def attempt_meant(caller: Caller, task: dict, given: int | None) -> int:
    """The number of the attempt spoken of. A session speaks of its own only. Raises Conflict when
    it names another, and for one there has not been yet."""
    if caller.task_id == task["id"]:
        if given not in (None, caller.attempt):
            raise Conflict(
                f"This session works on attempt {caller.attempt}, not on attempt {given}: "
                "leave the attempt out.",
                code="other_attempt",
            )
        return caller.attempt
    number = task["attempt"] if given is None else given
    if number > task["attempt"]:
        raise Conflict(f"The task is at attempt {task['attempt']}, there was no {number} yet.")
    return number


def _past(task: dict, number: int) -> dict | None:
    """How an attempt that has ended, ended."""
    if number == task["attempt"] and task["status"] not in cascade.FINAL:
        return None
    return one("SELECT * FROM attempt WHERE task_id = ? AND number = ?", (task["id"], number))


def _fence(tx, caller, task: dict, verb: str, said, number: int, past: dict | None):
    """None to go ahead; the task when this was said before; a Conflict when it is too late."""
    if number == task["attempt"] and task["status"] not in cascade.FINAL:
        return task if verb == "start" and task["status"] == "running" else None
    past = past or {"outcome": "unknown", "report": None}
    if past["outcome"] == verb and past["report"] == said:
        return task
    if verb == "start" and past["outcome"] == "complete":
        return task
    return late(tx, caller, task, number, verb, said, past["outcome"])


def late(tx, caller, task: dict, number: int, verb: str, said, outcome="unknown") -> Conflict:
    """Keep a report on an attempt that has ended as an event; the refusal to raise once that is
    committed."""
    tx.emit(
        "late_report",
        task["project_id"],
        caller.actor,
        {"attempt": number, "said": verb, "report": loads(said), "stands": outcome},
        task=task["id"],
        session=caller.session_id,
    )
    return Conflict(
        f"Attempt {number} has ended already ({PAST[outcome]}); the task is "
        f"{task['status']} (attempt {task['attempt']}). Your report is kept, nothing was changed.",
        code="late",
        status=task["status"],
        attempt=task["attempt"],
    )


PAST = {
    "complete": "done",
    "fail": "failed",
    "cancel": "cancelled",
    "release": "released",
    "unknown": "something else",
}


def _start(tx: Transaction, caller: Caller, task: dict, _report) -> dict:
    if task["status"] == "pending" and task["open_deps"]:
        raise Conflict(f"The task cannot start: {reading.reason(task)}.", code="blocked")
    return do(
        tx, task, "start", caller.actor, {"agent": reading.server_name(task)}, started_at=tx.now
    )


def _complete(tx, caller: Caller, task: dict, result, report: str, git) -> dict:
    cascade.move(task["status"], "complete")
    delivered = cascade.check_result(result, _owed(task))
    after = do(
        tx,
        task,
        "complete",
        caller.actor,
        {"result": {"summary": _summary(result), "contracts": sorted(delivered)}},
        result=report,
        git_diff_stats=dumps(git) if git else None,
        completed_at=tx.now,
    )
    moves.close_attempt(tx, after, "complete", report)
    tell_orderer(tx, after, _summary(result))
    _hand_down(tx, after, delivered)
    freed = _resolve_downstream(tx, after)
    routing.place(tx, after["project_id"], freed, {after["server_id"]}, cause=after["id"])
    return after


def _fail(tx: Transaction, caller: Caller, task: dict, report: str, *, free_retry=False) -> dict:
    """End the attempt as failed. `free_retry`: the fault was not the worker's, so try again."""
    error = loads(report)["error"]
    free_retry = free_retry and task["attempt"] < FREE_ATTEMPTS
    failures = task["failures"] + (not free_retry)
    failed = do(
        tx,
        task,
        "fail",
        caller.actor,
        {"error": error},
        result=report,
        failures=failures,
        completed_at=tx.now,
    )
    moves.close_attempt(tx, failed, "fail", report)
    if free_retry or failures < failed["max_attempts"]:
        delay = max(failed["retry_delay_s"], min(60, 2 ** failed["attempt"]) * free_retry)
        return _reopen(tx, failed, "retry", HUB.actor, delay=delay, freed={task["server_id"]})
    tell_orderer(tx, failed, error)
    routing.place(tx, task["project_id"], [], {task["server_id"]})
    return moves.row(task["id"])


def _summary(result) -> str:
    """The line a completion is shown with: its summary, or the result itself, cut."""
    summary = result.get("summary") if isinstance(result, dict) else None
    return str(summary if summary is not None else dumps(result))[:500]


def tell_orderer(tx: Transaction, task: dict, summary: str) -> None:
    """Report how the task stands to the session that ordered it, while that one lives."""
    if not task["source_session_id"]:
        return
    session = one("SELECT * FROM session WHERE id = ?", (task["source_session_id"],))
    if not session or session["state"] not in LIVE_SESSION:
        return
    details = {"status": task["status"], "title": task["title"], "summary": summary}
    tx.emit(
        "task_status_update",
        task["project_id"],
        HUB.actor,
        details,
        task=task["id"],
        session=session["id"],
    )
    if session["role"] == "orchestrator":  # typed there; a plain shell would run it
        moves.command(tx, session["server_id"], "task_status_update", session["id"], task, details)


def _owed(task: dict) -> dict[str, dict]:
    """{key: {schema?}} a completion must deliver: declared, or awaited by an input dependency."""
    spec = loads(task["structured_spec"]) or {}
    owed = dict(spec.get("expected_contracts") or {})
    for (key,) in execute(
        "SELECT key FROM dependency WHERE upstream_id = ? AND kind = 'input'",
        (task["id"],),
    ):
        owed.setdefault(key, {})
    if owed:
        for (key,) in execute("SELECT key FROM contract WHERE task_id = ?", (task["id"],)):
            owed.pop(key, None)  # supplied by hand before
    return owed


def _hand_down(tx: Transaction, task: dict, delivered: dict) -> None:
    for key, data in sorted(delivered.items()):
        _store_contract(tx, task, key, data, HUB.actor)
        tx.emit("contract_fulfilled", task["project_id"], HUB.actor, {"key": key}, task=task["id"])


def _store_contract(tx: Transaction, task: dict, key: str, data, author: str) -> None:
    execute(
        "INSERT INTO contract (task_id, key, data, attempt, author, at) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (task_id, key) DO UPDATE SET data = excluded.data,"
        " attempt = excluded.attempt, author = excluded.author, at = excluded.at",
        (task["id"], key, dumps(data), task["attempt"], author, tx.now),
    )


def _resolve_downstream(tx: Transaction, task: dict, key: str | None = None) -> list[dict]:
    """Resolve what waited for `task` (for one contract only, with `key`); the tasks now free."""
    where, values = "", [task["id"]]
    if key is not None:
        where, values = " AND kind = 'input' AND key = ?", [task["id"], key]
    resolved = execute(
        "UPDATE dependency SET resolved = 1"
        f" WHERE upstream_id = ? AND resolved = 0 AND kind <> 'related'{where}"
        " RETURNING task_id, kind, key",
        values,
    ).fetchall()
    counts: dict[str, int] = defaultdict(int)
    for downstream, kind, given in resolved:
        counts[downstream] += 1
        tx.emit(
            "dependency_resolved",
            task["project_id"],
            HUB.actor,
            {"downstream": downstream, "type": kind} | ({"key": given} if given else {}),
            task=downstream,
            cause=task["id"],
        )
    return _count_down(tx, counts, task["id"], HUB.actor)


def _count_down(tx: Transaction, counts: dict[str, int], cause: str, actor: str) -> list[dict]:
    """Take resolved dependencies off the counters; unblock and return the tasks at zero."""
    same = defaultdict(list)
    for task_id, n in counts.items():
        same[n].append(task_id)
    zero = []
    for n, ids in same.items():
        for part, marks in in_chunks(ids):
            zero += execute(
                f"UPDATE task SET open_deps = open_deps - ? WHERE id IN {marks}"
                " RETURNING id, open_deps, status",
                [n, *part],
            ).fetchall()
    ready = [task_id for task_id, left, status in zero if left == 0 and status == "pending"]
    _fill_inputs(ready)
    freed = []
    for part, marks in in_chunks(ready):
        freed += rows(f"SELECT * FROM task WHERE id IN {marks} ORDER BY seq", part)
    for task in freed:
        tx.emit(
            "task_unblocked",
            task["project_id"],
            actor,
            {"task": task["id"], "title": task["title"]},
            task=task["id"],
            cause=cause,
        )
    return freed


def _fill_inputs(ids: list[str]) -> None:
    """Write down what each task is handed, as it is now: {key: data} of its resolved inputs."""
    inputs = defaultdict(list)
    for part, marks in in_chunks(ids):
        for task_id, key, data in execute(
            "SELECT d.task_id, d.key, c.data FROM dependency d"
            " JOIN contract c ON c.task_id = d.upstream_id AND c.key = d.key"
            f" WHERE d.kind = 'input' AND d.task_id IN {marks} ORDER BY d.key",
            part,
        ):
            inputs[task_id].append(f"{dumps(key)}:{data}")
    for task_id, pairs in inputs.items():
        execute(
            "UPDATE task SET resolved_inputs = ? WHERE id = ?",
            ("{" + ",".join(pairs) + "}", task_id),
        )


def _fill_again(task_ids: list[str]) -> None:
    """Write down anew what pending tasks are handed; those that are blocked get it when free."""
    for part, marks in in_chunks(task_ids):
        execute(f"UPDATE task SET resolved_inputs = NULL WHERE id IN {marks}", part)
        _fill_inputs(
            [
                i
                for (i,) in execute(
                    f"SELECT id FROM task WHERE id IN {marks} AND open_deps = 0", part
                )
            ]
        )


def amend_contract(caller: Caller, ref: str, key: str, data) -> dict:
    """Supply or amend a contract by hand; inputs that waited for it are resolved.

    Raises BadContract when it breaks the declared schema, Invalid for a bad key.
    """
    task = find("task", caller, ref)
    require(caller, "contract.amend", task["project_id"], "task")
    if not cascade.key_allowed(key):
        raise Invalid(f"{key!r} is no contract key: use letters, digits, _ . and -.")
    declared = ((loads(task["structured_spec"]) or {}).get("expected_contracts") or {}).get(key, {})
    cascade.check_contract(key, data, declared.get("schema", True))
    with transaction() as tx:
        task = moves.row(task["id"])
        _store_contract(tx, task, key, data, caller.actor)
        tx.emit("contract_amended", task["project_id"], caller.actor, {"key": key}, task=task["id"])
        if task["status"] == "done":
            _fill_again(_takers(task["id"], key))
            freed = _resolve_downstream(tx, task, key)
            routing.place(tx, task["project_id"], freed, set(), cause=task["id"])
    return task


def _takers(task_id: str, key: str) -> list[str]:
    """Pending tasks that take this contract as an input."""
    return [
        row["id"]
        for row in rows(
            "SELECT t.id FROM dependency d JOIN task t ON t.id = d.task_id"
            " WHERE d.upstream_id = ? AND d.kind = 'input' AND d.key = ? AND t.status = 'pending'",
            (task_id, key),
        )
    ]


def _reopen(
    tx: Transaction,
    task: dict,
    verb: str,
    actor: str,
    details: dict | None = None,
    *,
    delay: float = 0,
    freed: frozenset | set = frozenset(),
) -> dict:
    """Begin the next attempt: `retry` or `release`; the task is routed again by itself.

    delay: seconds to wait before. freed: servers that lost it, for whoever waits longer.
    """
    again = do(
        tx,
        task,
        verb,
        actor,
        {"next_attempt": task["attempt"] + 1} | (details or {}),
        attempt=task["attempt"] + 1,
        server_id=None,
        session_id=None,
        asked_in=None,
        plan=None,
        plan_feedback=None,
        result=None,
        assigned_at=None,
        started_at=None,
        completed_at=None,
        waiting_since=None,
        signature=None,
        auto_assign=1,
        not_before=tx.now + delay if delay else None,
    )
    _fill_again([task["id"]])
    routing.place(tx, again["project_id"], [again], freed)
    return moves.row(task["id"])


def release(tx: Transaction, task: dict, why: str, actor: str = HUB.actor) -> dict:
    """Take a task back from a server or session that is gone and have it routed again."""
    moves.close_attempt(tx, task, "release", dumps({"why": why}))
    _withdraw(tx, task, why)
    return _reopen(tx, task, "release", actor, {"why": why}, freed={task["server_id"]})


def held_by(server_id: str) -> list[dict]:
    """The tasks that hold a slot of a server."""
    return rows(f"SELECT * FROM task WHERE server_id = ? AND {moves.HELD}", (server_id,))


def gone(task: dict) -> str | None:
    """Why nobody works on a task that somebody was given: the rest of a sentence; None if all is
    well, or if nobody was given it."""
    if task["status"] not in cascade.HOLDS_SLOT:
        return None
    server = one("SELECT name, online FROM server WHERE id = ?", (task["server_id"],))
    if not server["online"]:
        return f"server {server['name']} is away"
    session = one("SELECT state FROM session WHERE id = ?", (task["session_id"],))
    if session and session["state"] not in LIVE_SESSION:
        return f"its session is {session['state']}"
    return None


def retry(caller: Caller, ref: str) -> dict:
    """Open a failed or cancelled task again as its next attempt, or one whose server or session
    is gone. Raises IllegalMove."""
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    with transaction() as tx:
        task = moves.row(task["id"])
        if why := gone(task):
            return release(tx, task, why, caller.actor)
        return _reopen(tx, task, "retry", caller.actor)


def cancel(caller: Caller, ref: str, *, downstream: bool = False) -> tuple[dict, list[str]]:
    """Cancel a task, with `downstream` all that wait for it too: (row, ids of the others).

    Raises IllegalMove for a task that has ended.
    """
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    with transaction() as tx:
        task = _cancel(tx, caller, moves.row(task["id"]))
        also = []
        if downstream:
            for row in _open_downstream(task["id"]):
                also.append(_cancel(tx, caller, row, cause=task["id"])["id"])
        return task, also


def _cancel(tx: Transaction, caller: Caller, task: dict, cause: str | None = None) -> dict:
    cascade.move(task["status"], "cancel")
    if task["status"] in cascade.HOLDS_SLOT:
        moves.close_attempt(tx, task, "cancel", None)
        _withdraw(tx, task, "the task was cancelled")
    cancelled = do(
        tx,
        task,
        "cancel",
        caller.actor,
        cause=cause,
        completed_at=tx.now,
        waiting_since=None,
        signature=None,
        not_before=None,
    )
    if task["server_id"]:
        routing.place(tx, task["project_id"], [], {task["server_id"]})
    return cancelled


def _withdraw(tx: Transaction, task: dict, why: str) -> None:
    """Tell the worker's session that its work is not wanted any more."""
    if task["session_id"]:
        moves.command(
            tx, task["server_id"], "task_cancelled", task["session_id"], task, {"reason": why}
        )


def _open_downstream(task_id: str) -> list[dict]:
    """Every open task that waits for this one, directly or not, nearest first."""
    seen, level, found = {task_id}, [task_id], []
    while level:
        below = []
        for part, marks in in_chunks(level):
            below += rows(
                "SELECT DISTINCT t.* FROM dependency d JOIN task t ON t.id = d.task_id"
                f" WHERE d.kind <> 'related' AND d.upstream_id IN {marks}",
                part,
            )
        level = []
        for task in below:
            if task["id"] not in seen:
                seen.add(task["id"])
                level.append(task["id"])
                if task["status"] not in cascade.FINAL:
                    found.append(task)
    return found


# What null empties; elsewhere it means "not given".
CLEARABLE = ("target_repo", "target_branch", "structured_spec", "command", "model", "mode", *CLOCKS)
PLAIN_FIELDS = (
    "title",
    "spec",
    "type",
    "target_branch",
    "profile",
    "model",
    "mode",
    "on_lost",
    "max_attempts",
    "retry_delay_s",
    *CLOCKS,
)


def update(caller: Caller, ref: str, data: dict) -> dict:
    """Change fields of an open task; a waiting one is routed by its new requirements at once.

    data: only the fields to change. Raises Invalid, Conflict (the task has ended), RuleBroken.
    """
    task = find("task", caller, ref)
    require(caller, "task.change", task["project_id"], "task")
    data = {k: v for k, v in data.items() if v is not None or k in CLEARABLE}
    if not data:
        raise Invalid("Nothing to change: name at least one field.")
    for name in ("title", "spec"):
        if name in data and not (data[name] or "").strip():
            raise Invalid(f"The {name} cannot be empty.", field=name)
    with transaction() as tx:
        task = moves.row(task["id"])
        if task["status"] in cascade.FINAL:
            raise Conflict(
                f"The task is {task['status']}: {cascade.REMEDY[task['status']]}.",
                code="illegal_move",
            )
        changed = moves.change(tx, task, **_columns(task, data))
        tx.emit(
            "task_updated",
            task["project_id"],
            caller.actor,
            {"changed": sorted(data)},
            task=task["id"],
        )
        if task["session_id"]:
            moves.command(tx, task["server_id"], "task_updated", task["session_id"], changed)
        if task["waiting_since"] or changed["auto_assign"]:
            routing.place(tx, task["project_id"], [changed], set())
        return moves.row(task["id"])


def _columns(task: dict, data: dict) -> dict:
    """The API's fields of a change as columns."""
    columns = {name: data[name] for name in PLAIN_FIELDS if name in data}
    if "priority" in data:
        columns["priority"] = _priority(data["priority"])
    for name in ("require_plan", "auto_assign"):
        if name in data:
            columns[name] = int(bool(data[name]))
    if "acceptance_criteria" in data:
        columns["acceptance_criteria"] = dumps(data["acceptance_criteria"] or [])
    if "command" in data:
        columns["command"] = dumps(data["command"]) if data["command"] else None
    if {"structured_spec", "requirements", "target_repo"} & set(data):
        had = loads(task["requirements"])
        if "target_repo" in data and not data["target_repo"]:
            had.pop("repo", None)
        structured, requirements = _split_spec(data, had)
        columns["requirements"] = dumps(requirements)
        if "structured_spec" in data:
            columns["structured_spec"] = structured
    return columns


def due_again(now: float) -> int:
    """Route the tasks that have waited long enough before their next attempt; how many."""
    ready = rows("SELECT id FROM task WHERE not_before <= ? LIMIT ?", (now, AT_ONCE))
    for found in ready:
        with transaction() as tx:
            task = moves.row(found["id"])
            if task["not_before"] is not None and task["not_before"] <= now:
                task = moves.change(tx, task, not_before=None)
                routing.place(tx, task["project_id"], [task], set())
    return len(ready)


def time_out(now: float) -> int:
    """End what took too long to start or to finish; how many. What a restored hub does not know
    of yet may have been started and finished."""
    late = rows(
        "SELECT id FROM task WHERE deadline_at <= ? AND waiting_since IS NULL"
        f" AND server_id NOT IN {UNHEARD} LIMIT ?",
        (now, AT_ONCE),
    )
    for found in late:
        _time_out(found["id"], now)
    return len(late)


def _time_out(task_id: str, now: float) -> None:
    with transaction() as tx:
        task = moves.row(task_id)
        if task["deadline_at"] is None or task["deadline_at"] > now or task["waiting_since"]:
            return
        overall = task["timeout"] is not None and now >= task["assigned_at"] + task["timeout"]
        why = (
            f"timed out: not finished after {task['timeout']:g} s"
            if overall
            else "the worker did not start in time"
        )
        _withdraw(tx, task, why)
        _fail(tx, HUB, task, dumps({"error": why}), free_retry=not overall)
