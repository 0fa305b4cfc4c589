"""`/api/v1`: JSON in, JSON out. Every view translates a request into one use case of layer 2."""

import itertools
import json
import re
from contextlib import suppress
from typing import Annotated, Any, Literal
from uuid import UUID

from apiflask import APIBlueprint
from flask import Response, request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

import auth
import cascade
import document
import feed
import inbox
import permissions
import reading
import servers
import sessions
import tasks
import web
from document import answers, listing
from models import (
    Event,
    Forbidden,
    Glimpse,
    Invalid,
    NotFound,
    Unauthorised,
    bus,
    iso,
    loads,
    one,
)
from web import caller

VERSION = "0.1.0"
ASCIICAST = "application/x-asciicast"

bp = APIBlueprint("api", __name__, tag="Hub")
# What a session on a server uses answers under /api/v1/server too, as older clients spell it.
work = APIBlueprint("work", __name__, tag="Work")

# ── shapes ────────────────────────────────────────────────────────────────────────────────────

Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=100)]
# What is said to somebody must fit, however it is escaped, into the 1 MiB that older agents take.
Said = Annotated[str, StringConstraints(max_length=50_000)]
Words = Annotated[list[Word], Field(max_length=100)]
Seconds = Annotated[float, Field(ge=0, le=10 * 365 * 86400)]
Clock = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]
Argument = Annotated[
    str, StringConstraints(max_length=100_000, pattern=r"^[^\x00]*$")
]  # what exec() takes


BIGGEST = 2**63 - 1  # what the database can store


def valid(shape: type[BaseModel], fields: dict) -> BaseModel:
    """Fields as the API checks them. Raises Invalid that names the first wrong one."""
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"{where or 'The form'}: {first['msg']}.", field=where) from None


def checked(shape: type[BaseModel], fields: dict) -> dict:
    """Just the fields that say something, as the API checks them. Raises Invalid."""
    return valid(shape, fields).model_dump(exclude_unset=True)


class Shape(BaseModel):
    """Unknown fields are ignored, as old clients send some."""

    model_config = ConfigDict(extra="ignore")


class Exact(BaseModel):
    """Unknown fields are refused: a misspelt one must not get lost."""

    model_config = ConfigDict(extra="forbid")


class Login(Shape):
    username: Annotated[str, StringConstraints(max_length=auth.NAME_MOST)] = ""
    password: Annotated[str, StringConstraints(max_length=auth.PASSWORD_MOST)] = ""
    login_token: Annotated[str, StringConstraints(max_length=1000)] | None = None


class ProjectIn(Shape):
    name: Name
    profile: Word = "command"


class ProjectChange(Shape):
    name: Name | None = None
    profile: Word | None = None
    settings: dict | None = None


class UserIn(Shape):
    username: Name
    password: str | None = None
    is_admin: bool = False
    roles: dict[str, str] = {}


class UserChange(Shape):
    password: str | None = None
    is_admin: bool | None = None
    disabled: bool | None = None
    roles: dict[str, str] | None = None


class TokenIn(Shape):
    project_id: str | None = None
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    note: Name | None = None


class Declared(Shape):
    languages: Words | None = None
    frameworks: Words | None = None
    capabilities: Words | None = None
    slots: Annotated[int, Field(ge=1, le=10_000)] | None = None


class DeclaredByAdmin(Exact):
    repos: dict[str, dict] | None = None
    languages: Words | None = None
    frameworks: Words | None = None
    capabilities: Words | None = None


class Registering(Shape):
    registration_token: str
    name: Name
    hostname: str | None = None
    ip: str | None = None
    os: str | None = None
    repos: dict[str, str | dict | None] | None = None
    system_info: dict | None = None
    machine_id: str | None = None
    mac_address: str | None = None
    capabilities: Declared | None = None


class Heartbeat(Shape):
    system_info: dict | None = None


class PermissionLog(Shape):
    entries: Annotated[list, Field(max_length=10_000)] = []


class McpStatus(Shape):
    mcp_status: str | None = None


class ServerChange(Shape):
    name: Name | None = None
    declared: DeclaredByAdmin | None = None
    slots: Annotated[int, Field(ge=1, le=10_000)] | None = None
    manual: bool | None = None


class Wishes(Exact):
    repo: Word | None = None
    languages: Words | None = None
    frameworks: Words | None = None
    capabilities: Words | None = None
    agents: Words | None = None


class Requirements(Wishes):
    prefer: Wishes | None = None


class Link(Shape):
    depends_on_task_id: str
    dependency_type: str | None = None
    contract_key: str | None = None


class TaskFields(Shape):
    spec: Text | None = None
    structured_spec: dict | None = None
    type: Literal[tasks.TYPES] | None = None
    priority: Literal[reading.PRIORITIES] | None = None
    target_repo: Word | None = None
    target_branch: str | None = None
    acceptance_criteria: list[str] | None = None
    requirements: Requirements | None = None
    profile: Word | None = None
    model: Word | None = None
    mode: Word | None = None
    command: Annotated[list[Argument], Field(max_length=1000)] | None = None
    auto_assign: bool | None = None
    require_plan: bool | None = None
    on_lost: Literal[tasks.ON_LOST] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = None
    retry_delay_s: Seconds | None = None
    queue_timeout: Clock | None = None
    start_timeout: Clock | None = None
    progress_timeout: Clock | None = None
    timeout: Clock | None = None


class TaskIn(TaskFields):
    title: Annotated[str, StringConstraints(max_length=1000)]
    project_id: str | None = None
    session_id: str | None = None
    dependency_ids: list[str] | None = None
    dependencies: list[Link] | None = None


class TaskChange(TaskFields):
    title: Annotated[str, StringConstraints(max_length=1000)] | None = None
    target_repo: Annotated[str, StringConstraints(max_length=100)] | None = None


class PipelineLink(Exact):
    task: str
    type: str | None = None
    key: str | None = None


# A name alone means `blocks`; checked as one shape, so that a mistake is named by its field.
Upstream = Annotated[
    PipelineLink,
    BeforeValidator(
        lambda given: {"task": given} if isinstance(given, str) else given,
        json_schema_input_type=str | PipelineLink,
    ),
]


class PipelineTask(TaskFields):
    model_config = ConfigDict(extra="forbid")
    id: Name
    title: Annotated[str, StringConstraints(max_length=1000)]
    repo: Word | None = None
    branch: str | None = None
    depends_on: list[Upstream] = []
    assign: Name | None = None


class PipelineIn(Exact):
    schema_: Literal[cascade.PIPELINE] | None = Field(None, alias="$schema")
    name: Name
    description: str | None = None
    project_id: str | None = None
    project: str | None = None
    tasks: Annotated[list[PipelineTask], Field(max_length=5_000)]


class Assignment(Shape):
    session: str | None = None
    session_name: str | None = None
    server: str | None = None
    require_plan: bool | None = None


class Report(Shape):
    attempt: Annotated[int, Field(ge=1, le=BIGGEST)] | None = None


class Completion(Report):
    result: Any = None
    git_diff_stats: dict | None = None


class Failure(Report):
    error: Text | None = None


class Help(Report):
    question: Said
    context: Said | None = None
    intervention_type: Literal[inbox.KINDS] | None = None
    urgency: Word | None = None
    target_session_id: str | None = None
    claim: UUID | None = None


class Plan(Report):
    plan: Any


class Approval(Shape):
    comment: Said | None = None
    version: Annotated[int, Field(ge=1, le=BIGGEST)] | None = None


class Revision(Shape):
    feedback: Said
    version: Annotated[int, Field(ge=1, le=BIGGEST)] | None = None


class NoteIn(Report):
    content: Said
    urgent: bool | None = None


class Answer(Shape):
    response: Said


class Amendment(Shape):
    data: Any


class SessionIn(Shape):
    server_id: str
    task_id: str | None = None
    project_id: str | None = None
    working_dir: str | None = None
    working_directory: str | None = None
    name: Name | None = None
    role: Literal["worker", "orchestrator", "plain"] | None = None
    profile: Word | None = None
    model: Word | None = None
    mode: Word | None = None
    resume: str | None = None
    command: Annotated[list[Argument], Field(min_length=1, max_length=1000)] | None = None
    cols: Annotated[int, Field(ge=2, le=500)] | None = None
    rows: Annotated[int, Field(ge=2, le=500)] | None = None


class Typing(Shape):
    text: Annotated[str, StringConstraints(max_length=1_000_000)] | None = None
    data: Annotated[str, StringConstraints(max_length=800_000)] | None = None


class Size(Shape):
    cols: Annotated[int, Field(ge=2, le=500)]
    rows: Annotated[int, Field(ge=2, le=500)]


class Closing(Shape):
    force: bool = False


class Page(Shape):
    project_id: str | None = None
    status: str | None = None
    q: str | None = None
    server: str | None = None
    pipeline_id: str | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = reading.LIST_LIMIT
    cursor: Annotated[int, Field(ge=0, le=BIGGEST)] | None = None


class SessionPage(Shape):
    project_id: str | None = None
    status: str | None = None
    all: bool = False


class InterventionPage(Shape):
    task_id: str | None = None
    project_id: str | None = None
    status: str | None = None


class OfSession(Shape):
    session_id: str | None = None


class EventPage(Shape):
    after: Annotated[int, Field(ge=0, le=BIGGEST)] = 0
    before: Annotated[int, Field(ge=0, le=BIGGEST)] | None = None
    tail: bool = False
    task_id: str | None = None
    project_id: str | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 200


class ProjectPage(Shape):
    project_id: str | None = None


class Cascading(Shape):
    cascade: bool = False


class OutputPage(Shape):
    offset: Annotated[int, Field(ge=0, le=BIGGEST)] = 0


def given(shape: BaseModel) -> dict:
    """Just the fields the request has."""
    return shape.model_dump(exclude_unset=True)


def changes(shape: BaseModel) -> dict:
    """Just the fields the request has a value for."""
    return {name: value for name, value in given(shape).items() if value is not None}


def project_ids(project_id: str | None) -> list[str]:
    """The project named, or all the caller can see."""
    if project_id:
        return [auth.pick_project(caller(), project_id)["id"]]
    return [p["id"] for p in auth.visible_projects(caller())]


# ── who am I ──────────────────────────────────────────────────────────────────────────────────


@bp.get("/health")
@answers(document.Health)
def health():
    """Whether the hub answers; needs no credential."""
    one("SELECT 1 AS ok")
    return {"status": "ok", "version": VERSION}


@bp.post("/auth/login")
@bp.input(Login)
@answers(document.SignedIn)
def login(json_data: Login):
    """Exchange a user name and password, or a one-time login token, for a token."""
    if json_data.login_token:
        token, user = auth.login_with_link(json_data.login_token, "api")
    else:
        token, user = auth.login(
            json_data.username, json_data.password, request.remote_addr or "", "api"
        )
    return {"token": token, "user": user}


@bp.post("/auth/logout")
@answers(document.Done)
def logout():
    """End the token this request carries."""
    auth.logout(caller())
    return {"ok": True}


@bp.get("/auth/me")
@answers(document.Me)
def me():
    """Who the credential of this request is and what it can see."""
    who = caller()
    projects = auth.visible_projects(who)
    return {
        "kind": who.kind,
        "id": who.id,
        "name": who.name,
        "is_admin": who.is_admin,
        "role": who.roles.get(who.project_id) if who.project_id else None,
        "project_id": who.project_id,
        "projects": [{k: p[k] for k in ("id", "name", "role")} for p in projects],
        "server_id": who.server_id,
        "session_id": who.session_id,
        "task_id": who.task_id,
        "hub": {"version": VERSION, "url": web.hub_url()},
    }


# ── projects and users ────────────────────────────────────────────────────────────────────────


def project_json(project: dict) -> dict:
    shown = {k: project[k] for k in ("id", "name", "profile", "role")}
    return shown | {
        "settings": loads(project["settings"]),
        "created_at": iso(project["created_at"]),
    }


@bp.get("/projects")
@answers(listing("projects", document.Project))
def list_projects():
    """The projects the caller can see."""
    return {"projects": [project_json(p) for p in auth.visible_projects(caller())]}


@bp.post("/projects")
@bp.input(ProjectIn)
@answers(document.Project, 201)
def create_project(json_data: ProjectIn):
    """Make a project (hub admins)."""
    return project_json(auth.create_project(caller(), json_data.name, json_data.profile)), 201


@bp.get("/projects/<ref>")
@answers(document.Project)
def get_project(ref):
    """One project by id or name."""
    return project_json(auth.pick_project(caller(), ref))


@bp.patch("/projects/<ref>")
@bp.input(ProjectChange)
@answers(document.Project)
def change_project(ref, json_data: ProjectChange):
    """Change a project's name, default profile or settings (its admins)."""
    project = auth.pick_project(caller(), ref)
    return project_json(auth.change_project(caller(), project["id"], changes(json_data)))


@bp.get("/users")
@answers(listing("users", document.User))
def list_users():
    """All users with their roles (hub admins)."""
    return {"users": auth.list_users(caller())}


@bp.post("/users")
@bp.input(UserIn)
@answers(document.User, 201)
def create_user(json_data: UserIn):
    """Make a user with roles per project: viewer, operator or admin (hub admins)."""
    made = auth.create_user(
        caller(), json_data.username, json_data.password, json_data.is_admin, json_data.roles
    )
    return made, 201


@bp.get("/users/<ref>")
@answers(document.User)
def get_user(ref):
    """One user by id or name (hub admins)."""
    return auth.user_json(auth.get_user(caller(), ref))


@bp.patch("/users/<ref>")
@bp.input(UserChange)
@answers(document.User)
def change_user(ref, json_data: UserChange):
    """Change password, roles, or whether the user may sign in (hub admins)."""
    return auth.change_user(caller(), ref, changes(json_data))


@bp.delete("/users/<ref>")
@answers(document.Deleted)
def delete_user(ref):
    """Delete a user and end their tokens (hub admins)."""
    auth.delete_user(caller(), ref)
    return {"deleted": True}


# ── servers ───────────────────────────────────────────────────────────────────────────────────


@bp.post("/servers/tokens")
@bp.input(TokenIn)
@answers(document.RegistrationToken, 201)
def create_token(json_data: TokenIn):
    """Make a one-time registration token; it is shown this once, with ready commands."""
    project = auth.pick_project(caller(), json_data.project_id)
    made = auth.registration_token(
        caller(), project["id"], web.hub_url(), json_data.ttl_s, json_data.note
    )
    shown = {"project_id": project["id"], "project_name": project["name"]}
    commands = auth.install_commands(made["token"], web.hub_url())
    return made | shown | {"commands": commands}, 201


@bp.post("/servers/register")
@bp.input(Registering)
@answers(document.Registered)
def register(json_data: Registering):
    """Register a server with a one-time token; its key is in the answer, this once."""
    return servers.register(json_data.model_dump(), request.remote_addr or "")


@bp.post("/servers/heartbeat")
@bp.input(Heartbeat)
@answers(document.Heard)
def heartbeat(json_data: Heartbeat):
    """A server's sign of life."""
    servers.heartbeat(server_caller(), json_data.system_info)
    return {"ok": True, "heartbeat_s": servers.HEARTBEAT_S}


def server_caller() -> auth.Caller:
    """The calling server. Raises Forbidden for any other credential."""
    who = caller()
    if who.kind != "server":
        raise Forbidden("This is for servers: send the server's key as X-API-Key.")
    return who


@bp.get("/servers/tasks/poll")
@answers(listing("tasks", document.Task))
def poll_tasks():
    """The tasks on the calling server, with everything their workers need."""
    return {"tasks": servers.assigned_tasks(server_caller())}


# ── what the public daemon asks for, again and again ──────────────────────────────────────────


@bp.get("/server/files/pending")
@answers([])
def list_uploads():
    """Files a public daemon is to fetch from the hub: none."""
    server_caller()
    return []


@bp.get("/server/files/pulls/pending")
@answers([])
def list_pulls():
    """Files a public daemon is to bring to the hub: none."""
    server_caller()
    return []


@bp.get("/server/access-grants")
@answers([])
def list_grants():
    """Grants between servers: none. A public daemon asks once it has announced its sessions."""
    bus.publish(f"server:{server_caller().server_id}", "announced")
    return []


@bp.get("/server/approval-rules")
@answers([document.OldRule])
def list_rules():
    """The rules a public daemon's hooks go by: those that deny, since what allows here is matched
    by its parts, which its hooks cannot."""
    return permissions.rules_for_daemon(server_caller())


@bp.post("/server/permissions/log")
@bp.input(PermissionLog)
@answers(document.Accepted, 201)
def log_permissions(json_data: PermissionLog):
    """What a public daemon's rules have decided, for the log; what they asked is an alert."""
    permissions.take_log(server_caller(), json_data.entries)
    return {"accepted": len(json_data.entries)}, 201


@bp.patch("/server/sessions/<ref>/mcp-status")
@bp.input(McpStatus)
@answers(document.Done)
def note_mcp_status(ref, json_data: McpStatus):
    """Whether a public daemon could offer its tools to the agent of a session; not kept."""
    server_caller()
    return {"ok": True}


@work.get("/servers")
@work.input(ProjectPage, location="query")
@answers(listing("servers", document.Server))
def list_servers(query_data: ProjectPage):
    """The servers of the project named, or of all the caller can see."""
    return {"servers": servers.list_servers(project_ids(query_data.project_id))}


@work.get("/servers/<ref>")
@answers(document.Server)
def get_server(ref):
    """One server by id, unique prefix or name."""
    return servers.server_json(servers.get_server(caller(), ref))


@work.patch("/servers/<ref>")
@work.input(ServerChange)
@answers(document.Server)
def change_server(ref, json_data: ServerChange):
    """Rename a server, declare what it can do, set its slots, or start workers by hand only."""
    return servers.server_json(servers.change_server(caller(), ref, changes(json_data)))


@work.delete("/servers/<ref>")
@answers(document.Deleted)
def delete_server(ref):
    """Revoke a server; its history stays."""
    servers.revoke(caller(), ref)
    return {"deleted": True}


@work.post("/servers/<ref>/drain")
@answers(document.Server)
def drain_server(ref):
    """Give the server no new work."""
    return servers.server_json(servers.drain(caller(), ref))


@work.post("/servers/<ref>/resume")
@answers(document.Server)
def resume_server(ref):
    """Give the server work again."""
    return servers.server_json(servers.resume(caller(), ref))


@work.post("/servers/<ref>/revoke")
@answers(document.Server)
def revoke_server(ref):
    """Take the server's key away for good; its work is routed anew."""
    return servers.server_json(servers.revoke(caller(), ref))


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────


@work.get("/tasks")
@work.input(Page, location="query")
@answers(document.Tasks)
def list_tasks(query_data: Page):
    """Tasks, newest first."""
    server = query_data.server and servers.get_server(caller(), query_data.server)["id"]
    found, cursor = reading.list_tasks(
        project_ids(query_data.project_id),
        status=query_data.status,
        q=query_data.q,
        server_id=server,
        pipeline_id=query_data.pipeline_id,
        limit=query_data.limit,
        cursor=query_data.cursor,
    )
    return {"tasks": reading.tasks_json(found), "next_cursor": cursor}


@work.post("/tasks")
@work.input(TaskIn)
@answers(document.Task, 201)
def create_task(json_data: TaskIn):
    """Make a task, with its dependencies."""
    project = auth.pick_project(caller(), json_data.project_id)
    return reading.task_json(tasks.create(caller(), project, given(json_data))), 201


@work.get("/tasks/<ref>")
@answers(document.Task)
def get_task(ref):
    """One task by id or unique prefix."""
    return reading.task_json(auth.find("task", caller(), ref))


@work.put("/tasks/<ref>")
@work.input(TaskChange)
@answers(document.Task)
def put_task(ref, json_data: TaskChange):
    """Change the fields given."""
    return reading.task_json(tasks.update(caller(), ref, given(json_data)))


@work.patch("/tasks/<ref>")
@work.input(TaskChange)
@answers(document.Task)
def patch_task(ref, json_data: TaskChange):
    """Change the fields given."""
    return reading.task_json(tasks.update(caller(), ref, given(json_data)))


@work.delete("/tasks/<ref>")
@work.input(Cascading, location="query")
@answers(document.Cancelled)
def cancel_task(ref, query_data: Cascading):
    """Cancel a task; with `cascade=true` everything that waits for it too."""
    task, also = tasks.cancel(caller(), ref, downstream=query_data.cascade)
    return {"cancelled": True, "task_id": task["id"], "also_cancelled": also}


@work.post("/tasks/<ref>/assign")
@work.input(Assignment)
@answers(document.Task)
def assign_task(ref, json_data: Assignment):
    """Give a task to a session or server, or with neither have it routed."""
    return reading.task_json(tasks.assign(caller(), ref, **json_data.model_dump()))


@work.post("/tasks/<ref>/start")
@work.input(Report)
@answers(document.Task)
def start_task(ref, json_data: Report):
    """The worker has begun."""
    return reading.task_json(tasks.start(caller(), ref, json_data.attempt))


@work.post("/tasks/<ref>/complete")
@work.input(Completion)
@answers(document.Task)
def complete_task(ref, json_data: Completion):
    """The worker is done; what waited for it goes on in the same step."""
    done = tasks.complete(
        caller(), ref, json_data.result, json_data.attempt, json_data.git_diff_stats
    )
    return reading.task_json(done)


@work.post("/tasks/<ref>/fail")
@work.input(Failure)
@answers(document.Task)
def fail_task(ref, json_data: Failure):
    """The worker gave up."""
    error = json_data.error or "no reason given"
    return reading.task_json(tasks.fail(caller(), ref, error, json_data.attempt))


@work.get("/tasks/check")
@work.input(OfSession, location="query")
@answers(document.OwnTasks)
def check_tasks(query_data: OfSession):
    """The caller's own tasks: those of the session named, or else of its session or server."""
    found = reading.mine(caller(), session_meant(query_data))
    return {"count": len(found), "tasks": reading.tasks_json(found)}


@work.get("/status")
@work.input(OfSession, location="query")
@answers(document.Standing)
def status(query_data: OfSession):
    """Where the caller stands: its server, session, project and tasks."""
    with suppress(NotFound):  # a session from before: the rest is still worth knowing
        return reading.standing(caller(), session_meant(query_data))
    return reading.standing(caller(), None)


def session_meant(query: OfSession) -> dict | None:
    """The session named, or the caller's own. Raises NotFound."""
    ref = query.session_id or caller().session_id
    return auth.find("session", caller(), ref) if ref else None


@work.post("/tasks/<ref>/help")
@work.input(Help)
@answers(document.Asked, 200, 201)
def ask_for_help(ref, json_data: Help):
    """Ask a person (or, with type `question`, an orchestrator); the task waits for the answer."""
    asked, made = inbox.ask(
        caller(),
        ref,
        json_data.question,
        context=json_data.context,
        kind=json_data.intervention_type or "help",
        urgency=json_data.urgency or "normal",
        target=json_data.target_session_id,
        attempt=json_data.attempt,
        claim=str(json_data.claim) if json_data.claim else None,
    )
    shown = inbox.interventions_json([asked])[0]
    return shown | {"intervention_id": asked["id"]}, 201 if made else 200


@work.post("/tasks/<ref>/plan")
@work.input(Plan)
@answers(document.Task)
def submit_plan(ref, json_data: Plan):
    """Hand in a plan, or a new version of it, to be approved."""
    task = inbox.submit_plan(caller(), ref, json_data.plan, json_data.attempt)
    return reading.task_json(task)


@work.get("/tasks/<ref>/plan")
@answers(listing("plans", document.SubmittedPlan))
def list_plans(ref):
    """Every version of the task's plan with what was decided of it, oldest first."""
    return {"plans": inbox.plans(caller(), ref)}


@work.post("/tasks/<ref>/plan/approve")
@work.input(Approval)
@answers(document.Task)
def approve_plan(ref, json_data: Approval):
    """Let the worker do what it plans (people, and orchestrators other than the worker)."""
    task = inbox.approve(caller(), ref, json_data.comment or None, json_data.version)
    return reading.task_json(task)


@work.post("/tasks/<ref>/plan/revise")
@work.input(Revision)
@answers(document.Task)
def revise_plan(ref, json_data: Revision):
    """Send the plan back with what should be different."""
    task = inbox.revise(caller(), ref, json_data.feedback, json_data.version)
    return reading.task_json(task)


@work.get("/tasks/<ref>/notes")
@answers([document.Note])
def list_notes(ref):
    """The notes on the task, oldest first."""
    return reading.notes(caller(), ref)


@work.post("/tasks/<ref>/notes")
@work.input(NoteIn)
@answers(document.Note, 201)
def add_note(ref, json_data: NoteIn):
    """Add a note; it is told to the task's worker and to those of tasks that depend on it."""
    note = inbox.add_note(
        caller(),
        ref,
        json_data.content,
        urgent=bool(json_data.urgent),
        attempt=json_data.attempt,
    )
    return reading.note_json(note), 201


@work.post("/tasks/<ref>/retry")
@answers(document.Task)
def retry_task(ref):
    """Open a failed or cancelled task again."""
    return reading.task_json(tasks.retry(caller(), ref))


@work.post("/tasks/<ref>/dependencies")
@work.input(Link)
@answers(document.NewDependency, 201)
def add_dependency(ref, json_data: Link):
    """Make the task wait for another, take an input from it, or relate to it."""
    row = tasks.add_dependency(
        caller(),
        ref,
        json_data.depends_on_task_id,
        json_data.dependency_type or "blocks",
        json_data.contract_key,
    )
    return {
        "id": row["id"],
        "task_id": row["task_id"],
        "depends_on_task_id": row["upstream_id"],
        "dependency_type": row["kind"],
        "contract_key": row["key"] or None,
        "resolved": bool(row["resolved"]),
    }, 201


@work.delete("/tasks/<ref>/dependencies/<other>")
@answers(document.Removed)
def remove_dependency(ref, other):
    """Remove every dependency of the task on the other."""
    return {"removed": tasks.remove_dependency(caller(), ref, other)}


@work.get("/tasks/<ref>/events")
@answers(listing("events", document.Event))
def task_events(ref):
    """The task's timeline, oldest first."""
    return {"events": reading.timeline(caller(), ref)}


@work.get("/tasks/<ref>/explain")
@answers(document.Explanation)
def explain_task(ref):
    """Why the task is where it is: blockers, each server's score or reasons, the choice."""
    return reading.explain(caller(), ref)


@work.get("/tasks/<ref>/contracts")
@answers(listing("contracts", document.Contract))
def list_contracts(ref):
    """What the task owes and has delivered."""
    return {"contracts": reading.contracts(caller(), ref)}


@work.get("/tasks/<ref>/contracts/<key>")
@answers(document.Contract)
def get_contract(ref, key):
    """One contract of the task."""
    found = [c for c in reading.contracts(caller(), ref) if c["key"] == key]
    if not found:
        raise NotFound(f"The task has no contract {key!r}, neither expected nor delivered.")
    return found[0]


@work.put("/tasks/<ref>/contracts/<key>")
@work.input(Amendment)
@answers(document.Contract)
def amend_contract(ref, key, json_data: Amendment):
    """Supply or amend a contract by hand."""
    tasks.amend_contract(caller(), ref, key, json_data.data)
    return get_contract(ref, key)


# ── interventions ─────────────────────────────────────────────────────────────────────────────


@work.get("/interventions")
@work.input(InterventionPage, location="query")
@answers([document.Intervention])
def list_interventions(query_data: InterventionPage):
    """What was asked, newest first: pending, responded or closed."""
    task = query_data.task_id and auth.find("task", caller(), query_data.task_id)
    return inbox.list_interventions(
        project_ids(query_data.project_id), task=task or None, status=query_data.status
    )


@work.get("/interventions/<ref>")
@answers(document.Intervention)
def get_intervention(ref):
    """One intervention by id or unique prefix, with its answer."""
    return inbox.interventions_json([inbox.get_intervention(caller(), ref)])[0]


@work.post("/interventions/<ref>/respond")
@work.input(Answer)
@answers(document.Intervention)
def respond(ref, json_data: Answer):
    """Answer an intervention; the first answer counts and goes to whoever asked."""
    return inbox.interventions_json([inbox.answer(caller(), ref, json_data.response)])[0]


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────


@bp.post("/pipelines")
@bp.input(PipelineIn)
@answers(document.WholePipeline, 201)
def apply_pipeline(json_data: PipelineIn):
    """Make all tasks of a pipeline, or none."""
    project = auth.pick_project(caller(), json_data.project_id or json_data.project)
    items = [pipeline_item(task) for task in json_data.tasks]
    made = tasks.create_pipeline(caller(), project, json_data.name, items)
    return reading.pipeline_json(made, with_tasks=True), 201


def pipeline_item(task: PipelineTask) -> dict:
    """A task of a pipeline as `tasks.create_pipeline` takes it. Raises Invalid."""
    item = given(task)
    for short, full in (("repo", "target_repo"), ("branch", "target_branch")):
        value = item.pop(short, None)
        if value is not None and item.setdefault(full, value) != value:
            raise Invalid(f"Task {task.id!r}: {short} and {full} differ: give one of them.")
    return item


@bp.get("/pipelines")
@bp.input(ProjectPage, location="query")
@answers(listing("pipelines", document.Pipeline))
def list_pipelines(query_data: ProjectPage):
    """Pipelines with their counts, newest first."""
    found = reading.list_pipelines(project_ids(query_data.project_id))
    return {"pipelines": [reading.pipeline_json(row) for row in found]}


@bp.get("/pipelines/<ref>")
@answers(document.WholePipeline)
def get_pipeline(ref):
    """One pipeline with its tasks, by id, unique prefix or name (the newest of that name)."""
    return reading.pipeline_json(reading.get_pipeline(caller(), ref), with_tasks=True)


# ── sessions ──────────────────────────────────────────────────────────────────────────────────


@work.get("/sessions")
@work.input(SessionPage, location="query")
@answers(listing("sessions", document.Session))
def list_sessions(query_data: SessionPage):
    """Live sessions; with `all` those that ended too."""
    found = sessions.list_sessions(
        project_ids(query_data.project_id), every=query_data.all, status=query_data.status
    )
    return {"sessions": found}


@work.post("/sessions")
@work.input(SessionIn)
@answers(document.Session, 200, 201)
def open_session(json_data: SessionIn):
    """Start a session; for a task whose attempt has a live one, that one (200)."""
    data = given(json_data)
    data.setdefault("working_dir", data.pop("working_directory", None))
    session, made = sessions.open_session(caller(), data)
    return sessions.session_view(session), 201 if made else 200


@work.get("/sessions/<ref>")
@answers(document.Session)
def get_session(ref):
    """One session by id, unique prefix or name."""
    return sessions.session_view(sessions.get_session(caller(), ref))


@work.post("/sessions/<ref>/input")
@work.input(Typing)
@answers(document.Done)
def type_into(ref, json_data: Typing):
    """Type a text and submit it safely (`text`), or pass raw bytes (`data`, base64)."""
    if (json_data.text is None) == (json_data.data is None):
        raise Invalid("Give either `text` or `data`.")
    if json_data.text is not None:
        sessions.type_text(caller(), ref, json_data.text)
    else:
        sessions.type_raw(caller(), ref, json_data.data)
    return {"ok": True}


@work.post("/sessions/<ref>/resize")
@work.input(Size)
@answers(document.Session)
def resize_session(ref, json_data: Size):
    """Set the size of the session's terminal."""
    resized = sessions.resize(caller(), ref, json_data.cols, json_data.rows)
    return sessions.session_view(resized)


@work.post("/sessions/<ref>/close")
@work.input(Closing)
@answers(document.Session)
def close_session(ref, json_data: Closing):
    """Have the session ended."""
    closed = sessions.close_session(caller(), ref, force=json_data.force)
    return sessions.session_view(closed)


@work.get("/sessions/<ref>/screen")
@answers(document.Screen)
def session_screen(ref):
    """The last screen the session's server sent."""
    return sessions.screen(caller(), ref)


@work.get("/sessions/<ref>/output")
@work.input(OutputPage, location="query")
@answers(None, media="application/octet-stream")
def session_output(ref, query_data: OutputPage):
    """The bytes of the session's log from `offset` on (about 1 MB at a time).

    `X-Offset` says where they begin: behind `offset` when what was there is missing. They follow
    each other; read on at `X-Next-Offset`.
    """
    piece = sessions.output(caller(), ref, query_data.offset, 1_000_000)
    headers = {
        "X-Offset": str(piece.offset),
        "X-Next-Offset": str(piece.next),
        "X-Log-Start": str(piece.start),
        "X-Log-End": str(piece.end),
    }
    return Response(piece.data, mimetype="application/octet-stream", headers=headers)


@work.get("/sessions/<ref>/marks")
@answers(listing("marks", document.Mark))
def session_marks(ref):
    """What is missing from the session's log: lost before it came (gap) or removed here."""
    return {"marks": sessions.marks(caller(), ref)}


@work.get("/sessions/<ref>/recording")
@answers(None, media=ASCIICAST)
def session_recording(ref):
    """The session's log as a recording that terminal players show (asciicast v2)."""
    name, lines = sessions.recording(caller(), ref)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(lines, mimetype=ASCIICAST, headers=headers)


# ── events ────────────────────────────────────────────────────────────────────────────────────


@bp.get("/events")
@bp.input(EventPage, location="query")
@answers(document.Events)
def list_events(query_data: EventPage):
    """Events above the id `after`, or with `tail` or `before` the newest (below that id).

    Oldest first either way. `next_cursor` is the `after` of the page that follows, `prev_cursor`
    the `before` of the older one; null where there is none.
    """
    task = query_data.task_id and auth.find("task", caller(), query_data.task_id)
    shared = {
        "project_ids": project_ids(query_data.project_id),
        "task": task or None,
        "limit": query_data.limit,
    }
    if query_data.tail or query_data.before is not None:
        found = reading.last_events(caller(), before=query_data.before, **shared)
        more = len(found) == query_data.limit
        return {
            "events": found,
            "next_cursor": None,
            "prev_cursor": found[0]["id"] if more else None,
        }
    found = reading.events(caller(), query_data.after, **shared)
    more = len(found) == query_data.limit
    return {
        "events": found,
        "next_cursor": found[-1]["id"] if more else None,
        "prev_cursor": None,
    }


@bp.get("/events/stream")
@answers(None, media="text/event-stream")
def stream_events():
    """Events as they are committed (SSE); `Last-Event-ID` or `?after=` resumes without loss.

    Between them `glimpse` says that a session does something else now; it has no id, and one that
    was missed is not sent again.

    `?who=` names the sign-in that the reader has: with another one the stream is refused.
    """
    who = caller()
    if request.args.get("who", who.token_id) != who.token_id:
        raise Unauthorised("Somebody else is signed in in this browser now: reload the page.")
    after = request.headers.get("Last-Event-ID") or request.args.get("after")
    start = min(int(after), BIGGEST) if after and re.fullmatch("[0-9]{1,20}", after) else None
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return Response(_stream(who, start), mimetype="text/event-stream", headers=headers)


def _stream(who: auth.Caller, after: int | None):
    comments = itertools.chain([": hello\n\n"], itertools.repeat(": beat\n\n"))
    with suppress(Unauthorised):  # the stream just ends; asking again is refused
        live = bus.subscribe("events", "access", "glimpses")
        for item in feed.follow(who, after, live):
            if item is None:
                yield next(comments)
            elif isinstance(item, feed.Reset):
                yield f"id: {item.id}\nevent: reset\ndata: {{}}\n\n"
            elif isinstance(item, Glimpse):
                yield f"event: glimpse\ndata: {json.dumps(item._asdict())}\n\n"
            else:
                yield item.written("sse", _sse)


def _sse(event: Event) -> bytes:
    """The event under each of its names."""
    data = json.dumps(event)
    names = [event["type"], *filter(None, [feed.ALSO.get(event["type"])])]
    return "".join(f"id: {event['id']}\nevent: {name}\ndata: {data}\n\n" for name in names).encode()
