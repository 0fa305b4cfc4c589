"""The OpenAPI document: what each route answers with, and with what it may refuse.

A view says its answer with `@answers`; refusals follow from what it takes (`_refusals`). Every
field of an answer is named here, none is left out: tests compare real answers with this.
"""

from typing import Any, Literal

from flask import Flask
from pydantic import BaseModel, ConfigDict, Field, create_model

import cascade
import web

JSON = "application/json"
METHODS = ("get", "post", "put", "patch", "delete")


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(Answer):
    """Every refusal has this form."""

    detail: str = Field(description="one sentence: what is wrong, why, and what to do")
    code: str = Field(description="a word for programs")
    fields: dict[str, Any] = Field(description="what is wrong with which field, or more facts")


class Done(Answer):
    ok: bool


class Health(Answer):
    status: str
    version: str


class Finding(Answer):
    check: str
    state: Literal["ok", "warn", "bad"]
    says: str
    do: str


class Restoring(Answer):
    made_at: str
    version: str


class Membership(Answer):
    id: str
    name: str
    role: str


class User(Answer):
    id: str
    username: str
    is_admin: bool
    disabled: bool
    created_at: str
    roles: dict[str, str] = Field(description="{project: role}")
    projects: list[Membership]


class SignedIn(Answer):
    token: str
    user: User


class Hub(Answer):
    version: str
    url: str


class Me(Answer):
    kind: str = Field(description="user, server or session")
    id: str
    name: str
    is_admin: bool
    role: str | None
    project_id: str | None
    projects: list[Membership]
    server_id: str | None
    session_id: str | None
    task_id: str | None
    hub: Hub


class Project(Answer):
    id: str
    name: str
    profile: str
    role: str | None
    settings: dict[str, Any]
    created_at: str


class Deleted(Answer):
    deleted: bool


class RegistrationToken(Answer):
    id: str
    token: str = Field(description="shown this once")
    expires_at: str
    project_id: str
    project_name: str
    commands: dict[str, str] = Field(description="what to type on the new server")


class Registered(Answer):
    id: str
    api_key: str = Field(description="shown this once")
    name: str
    project_id: str
    project_name: str
    heartbeat_s: float
    renewed: bool


class Heard(Answer):
    ok: bool
    heartbeat_s: float


class Accepted(Answer):
    accepted: int


class Server(Answer):
    id: str
    name: str
    project_id: str
    hostname: str
    os: str
    status: Literal["online", "offline", "draining", "revoked"]
    last_heartbeat: str | None
    repos: dict[str, Any]
    languages: list[str] | None = Field(description="null: not declared, so not known")
    frameworks: list[str] | None
    capabilities: list[str] | None
    profiles: dict[str, Any] = Field(description="{coding agent: its version}")
    declared: dict[str, Any]
    slots: int
    busy: int
    manual: bool
    agent_version: str | None
    system_info: dict[str, Any] | None
    sessions: int
    created_at: str


class Dependency(Answer):
    depends_on_task_id: str
    depends_on_title: str
    depends_on_status: Literal[cascade.STATES]
    dependency_type: Literal["blocks", "input", "related"]
    contract_key: str | None
    resolved: bool


class NewDependency(Answer):
    id: int
    task_id: str
    depends_on_task_id: str
    dependency_type: Literal["blocks", "input", "related"]
    contract_key: str | None
    resolved: bool


class Removed(Answer):
    removed: int


class Note(Answer):
    id: str
    task_id: str
    attempt: int | None
    content: str
    author: str
    urgent: bool
    created_at: str


class Produced(Answer):
    status: Literal["expected", "fulfilled"]
    data: Any


class Task(Answer):
    id: str
    title: str
    status: Literal[cascade.STATES]
    shown_status: str = Field(description="the status for people: blocked, ready, …")
    priority: str
    type: str | None
    spec: str | None
    structured_spec: dict[str, Any] | None
    acceptance_criteria: list[str] | None
    target_repo: str | None
    target_branch: str | None
    requirements: dict[str, Any]
    assigned_server_id: str | None
    assigned_server_name: str | None
    session_id: str | None
    source_session_id: str | None
    source_session_name: str | None
    target_session_name: str | None
    dependencies: list[Dependency]
    resolved_inputs: dict[str, Any]
    contracts: dict[str, Produced]
    attempt: int
    blocked: bool
    reason: str | None = Field(description="why it is where it is, in a sentence")
    pipeline_id: str | None
    project_id: str
    profile: str | None
    model: str | None
    mode: str | None
    command: list[str] | None
    auto_assign: bool
    on_lost: str
    max_attempts: int
    retry_delay_s: float
    queue_timeout: float | None
    start_timeout: float | None
    progress_timeout: float | None
    timeout: float | None
    require_plan: bool
    plan: Any
    plan_feedback: str | None
    result: Any
    git_diff_stats: dict[str, Any] | None
    created_by: str
    created_at: str
    assigned_at: str | None
    started_at: str | None
    completed_at: str | None
    updated_at: str
    recent_notes: list[Note]


class Tasks(Answer):
    tasks: list[Task]
    next_cursor: int | None


class OwnTasks(Answer):
    count: int
    tasks: list[Task]


class Cancelled(Answer):
    cancelled: bool
    task_id: str
    also_cancelled: list[str]


class TaskLine(Answer):
    id: str
    title: str
    status: Literal[cascade.STATES]
    priority: str


class TaskSummary(Answer):
    pending: int
    running: int
    total: int


class Standing(Answer):
    connected: bool
    server_id: str | None
    server_name: str | None
    server_status: str | None
    session_id: str | None
    session_name: str | None
    role: str | None
    project_id: str | None
    project_name: str | None
    tasks: list[TaskLine]
    task_summary: TaskSummary


class SubmittedPlan(Answer):
    version: int
    attempt: int
    plan: Any
    status: str
    author: str
    submitted_at: str
    feedback: str | None
    decided_by: str | None
    decided_at: str | None


class Intervention(Answer):
    id: str
    status: Literal["pending", "responded", "closed"]
    intervention_type: Literal["help", "question", "approval"]
    question: str
    context: str | None
    urgency: str
    project_id: str
    task_id: str
    task_title: str
    attempt: int
    session_id: str | None
    session_name: str | None
    target_session_id: str | None
    asked_by: str
    created_at: str
    response: str | None
    responded_by: str | None
    responded_at: str | None
    closed_by: str | None
    closed_at: str | None
    closed_why: str | None
    delivery: str | None = Field(
        description="held or returned (to a call that waits), sent, typed, unknown or failed"
    )
    delivery_why: str | None


class Choice(Answer):
    label: str
    description: str


class Question(Answer):
    question: str
    several: bool = Field(description="more than one of the options may be chosen")
    options: list[Choice]


class Permission(Answer):
    id: str
    status: Literal["pending", "allowed", "denied", "withdrawn"]
    asks: Literal["permission", "question", "plan"]
    tool: str
    input: dict[str, Any]
    subject: str = Field(description="the exact command, path or address")
    directory: str
    agent: str | None
    via: Literal["hook", "screen", "log"]
    project_id: str
    server_id: str
    server_name: str | None
    session_id: str | None
    session_name: str | None
    task_id: str | None
    task_title: str | None
    attempt: int | None
    asked_at: str
    decided_by: str | None = Field(description="a person, rule:ID, grant:PERSON")
    decided_at: str | None
    scope: Literal["once", "session", "always"] | None
    reason: str | None
    questions: list[Question] = Field(description="what it asks to choose, in order")
    answers: dict[str, str] | None = Field(description="{question: answer}")
    rule_id: str | None
    delivery: Literal["sent", "delivered", "unknown", "failed"] | None
    delivery_why: str | None
    answered_where: str | None = Field(description="where it was decided or settled")


class Grant(Answer):
    id: str
    tool: str
    subject: str
    directory: str
    granted_by: str
    at: str


class Rule(Answer):
    id: str
    position: int
    project_id: str | None
    server_id: str | None
    agent: str | None
    tool: str
    pattern: str | None
    action: Literal["allow", "deny", "ask"]
    note: str
    enabled: bool
    created_by: str
    created_at: str


class OldRule(Answer):
    id: str
    name: str
    is_active: bool
    tool_pattern: str
    param_pattern: str | None
    scope_type: Literal["tenant", "project", "server"]
    scope_id: str | None
    agent_filter: str
    action: Literal["deny"]


class Verdict(Answer):
    decision: Literal["allow", "deny", "ask"]
    because: str
    rule: Rule | None
    parts: list[dict[str, Any]] = Field(description="{text, decision, rule_id, because}")


class Alert(Answer):
    id: str
    kind: Literal["stuck", "quota", "delivery", "prompt", "lost", "queue", "server"]
    sentence: str
    project_id: str
    session_id: str | None
    session_name: str | None
    task_id: str | None
    task_title: str | None
    at: str
    status: Literal["open", "dismissed", "over"]
    ended_by: str | None
    ended_at: str | None


class Signals(Answer):
    session_id: str
    name: str
    activity: str
    reason: str | None
    signal: str | None
    since: str | None
    progress: str | None
    signals: list[dict[str, Any]] = Field(description="{name, says, at, silent, decided}")


class Asked(Intervention):
    intervention_id: str


class Candidate(Answer):
    server_id: str
    server: str
    fits: bool
    score: float | None
    reasons: list[str]


class Explanation(Answer):
    task_id: str
    status: Literal[cascade.STATES]
    summary: str
    blocked_by: list[dict[str, Any]]
    candidates: list[Candidate]
    chosen: str | None
    at: str | None


class Contract(Answer):
    key: str
    status: Literal["expected", "fulfilled"]
    type: str | None
    description: str | None
    schema_: dict[str, Any] | bool | None = Field(alias="schema")
    data: Any
    updated_at: str | None
    by: str | None


class Pipeline(Answer):
    id: str
    name: str
    project_id: str
    created_by: str
    created_at: str
    counts: dict[str, int]
    total: int


class WholePipeline(Pipeline):
    id_map: dict[str, str] = Field(description="{id in the file: task}")
    tasks: list[Task]


class Session(Answer):
    id: str
    name: str
    server_id: str
    server_name: str
    project_id: str
    task_id: str | None
    task_title: str | None
    attempt: int | None
    role: Literal["worker", "orchestrator", "plain"]
    profile: str | None
    model: str | None
    mode: str | None
    resumable: bool = Field(description="its agent's conversation can be taken up again")
    status: Literal[cascade.SESSION_STATES]
    activity: str | None
    reason: str | None
    working_directory: str | None
    tmux_name: str | None
    pid: int | None
    exit_code: int | None
    error: str | None
    terminal: str | None
    cols: int
    rows: int
    created_by: str
    created_at: str
    started_at: str | None
    closed_at: str | None
    log_start: int
    log_end: int


class Screen(Answer):
    lines: list[str]
    at: str | None


class Mark(Answer):
    kind: Literal["gap", "removed"]
    from_: int = Field(alias="from")
    to: int | None
    why: str
    at: str


class Event(Answer):
    id: int
    prev: int
    type: str
    project_id: str | None
    task_id: str | None
    cause_task_id: str | None
    session_id: str | None
    server_id: str | None
    actor: str
    details: dict[str, Any]
    at: str


class Events(Answer):
    events: list[Event]
    next_cursor: int | None
    prev_cursor: int | None


def listing(name: str, shape: type[Answer]) -> type[Answer]:
    """{name: [shape, …]}"""
    fields = {name: (list[shape], ...)}
    return create_model(f"{shape.__name__}List", __base__=Answer, **fields)


def answers(shape, *statuses: int, media: str = JSON):
    """Say what a view answers with: a shape or a list of one, with these statuses (200)."""

    def remember(view):
        view.answers = shape, statuses or (200,), media
        return view

    return remember


# ── refusals ──────────────────────────────────────────────────────────────────────────────────

SAID = {
    400: "The request is not readable, its JSON for example.",
    401: "Nobody is signed in, or the credential does not count any more.",
    403: "This credential has not the right.",
    404: "It is not there, or not for this credential.",
    409: "It does not fit the present state; the sentence says what does.",
    413: "The request is too large.",
    415: "The body is not declared as JSON.",
    422: "A field is wrong; `fields` says which.",
    429: "Too many tries; `Retry-After` says how long to wait.",
    503: "The hub is busy; nothing was changed, try again.",
    507: "The hub's disk is full or fails; nothing was changed.",
}
OPEN = {"/api/v1/health"}  # for everybody
TRIES = {"/api/v1/auth/login"}  # counted
FILES = {"/api/v1/hub/restore"}  # take a file as the body


def _refusals(path: str, method: str, operation: dict) -> set[int]:
    takes = {p["in"] for p in operation.get("parameters", ())}
    found = set() if path in OPEN else {400, 401, 403}
    if path not in OPEN | TRIES:
        found |= {404}
    if "query" in takes:
        found |= {422}
    if "requestBody" in operation:
        found |= {413, 415, 422}
    if method != "get" or takes:  # a prefix may mean several
        found |= {409}
    if method != "get":
        found |= {503, 507}
    if path in FILES:
        found |= {422}
    return found | ({429} if path in TRIES else set())


# ── the whole ─────────────────────────────────────────────────────────────────────────────────

CREDENTIALS = {
    "token": {"type": "http", "scheme": "bearer", "description": "of a person, from auth/login"},
    "key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "of a server (orc_…) or of a session (orcs_…)",
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": web.COOKIE,
        "description": "of a person's browser; changes need X-CSRF-Token too",
    },
}


def init_app(app: Flask) -> None:
    @app.spec_processor
    def complete(document: dict) -> dict:
        parts = document.setdefault("components", {})
        parts["securitySchemes"] = CREDENTIALS
        document["security"] = [{name: []} for name in CREDENTIALS]
        shapes = parts.setdefault("schemas", {})
        views = _views(app)
        for path, item in document["paths"].items():
            for method in METHODS:
                if method in item:
                    _complete(item[method], path, method, views[method, path], shapes)
        return document


def _views(app: Flask) -> dict[tuple[str, str], Any]:
    found = {}
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<", "{").replace(">", "}")
        for method in rule.methods:
            found[method.lower(), path] = app.view_functions[rule.endpoint]
    return found


def _complete(operation: dict, path: str, method: str, view, shapes: dict) -> None:
    shape, statuses, media = view.answers
    content = {media: {"schema": _schema(shape, shapes)}} if media == JSON else {media: {}}
    responses = {
        str(status): {"description": "Made." if status == 201 else "Done.", "content": content}
        for status in statuses
    }
    fault = {JSON: {"schema": _schema(Fault, shapes)}}
    for status in sorted(_refusals(path, method, operation)):
        responses[str(status)] = {"description": SAID[status], "content": fault}
    operation["responses"] = responses
    if path in OPEN | TRIES:
        operation["security"] = []


def _schema(shape, shapes: dict) -> dict:
    """A reference to the shape, which is put among the others; of a list of one, the array."""
    if isinstance(shape, list):
        return {"type": "array", "items": _schema(shape[0], shapes) if shape else {}}
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    shapes |= schema.pop("$defs", {})
    shapes[shape.__name__] = schema
    return {"$ref": f"#/components/schemas/{shape.__name__}"}
