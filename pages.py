"""The dashboard: pages and their live parts as HTML. A view asks one use case and shows the answer.

A page `area/name.html` has a live part in `area/_name.html`, a `<section id="live">` that htmx
fetches again from the page's own address when an event touches it (static/live.js). GET never
changes anything; every POST is one use case of layer 2.
"""

import json
import re
import unicodedata
from collections import defaultdict
from functools import partial
from graphlib import TopologicalSorter
from itertools import pairwise

from apiflask import APIBlueprint
from flask import (
    g,
    has_request_context,
    make_response,
    redirect,
    render_template,
    request,
    url_for,
)

import auth
import cascade
import inbox
import reading
import servers
import sessions
import tasks
import web
from models import Invalid, NotFound, Refused, event_json, in_chunks, iso, one, rows

bp = APIBlueprint("pages", __name__, enable_openapi=False)

OPEN_TO_ALL = frozenset({"pages.login", "pages.sign_in"})
TASKS_PER_PAGE = 100
EVENTS_SHOWN = 200
RECENT_EVENTS = 5000  # how far back the overview looks for what finished
RECENT_SHOWN = 8

# ── every page ────────────────────────────────────────────────────────────────────────────────

# Characters that steer a terminal or turn the direction of the text around them: a title that
# holds one shows � in its place, on every page (`finalize` sees all that templates print).
_HOSTILE = dict.fromkeys(
    [c for c in range(0x20) if chr(c) not in "\t\n\r"]
    + [*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)


def _printed(value):
    if value is None:
        return ""
    return value.translate(_HOSTILE) if isinstance(value, str) else value


@bp.record_once
def _set_up(state) -> None:
    env = state.app.jinja_env
    env.finalize = _printed
    env.trim_blocks = env.lstrip_blocks = True
    env.filters |= {"pretty": _pretty, "said": said, "short": lambda value: (value or "")[:8]}
    env.globals |= {"STATES": STATES, "shape_of": shape_of}


def _pretty(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


@bp.before_request
def _let_in():
    """Show nothing to who is not signed in, and note where the event log stood before we read."""
    if request.endpoint in OPEN_TO_ALL:
        return None
    if not person():
        return _to_login()
    g.last_event = reading.last_event_id()
    return None


def person() -> auth.Caller | None:
    """Who is signed in; a server's or session's key is no way into the pages."""
    who = web.person_or_none()
    return who if who and who.kind == "user" else None


def _to_login():
    if request.headers.get("HX-Request"):
        return "", 204, {"HX-Redirect": url_for("pages.login")}
    here = _here() if request.method == "GET" else None
    return redirect(url_for("pages.login", next=here), 303)


def _here() -> str:
    return (request.script_root + request.full_path).rstrip("?")


def visible() -> list[dict]:
    """The projects the person can see."""
    if "visible" not in g:
        g.visible = auth.visible_projects(person()) if person() else []
    return g.visible


def chosen() -> dict | None:
    """The project the address asks for; None for all of them."""
    given = request.args.get("project")
    return next((p for p in visible() if given in (p["id"], p["name"])), None)


def scope() -> list[str]:
    """Ids of the projects this page is about. Raises NotFound for one that cannot be seen."""
    if request.args.get("project") and not chosen():
        raise NotFound(f"No project {request.args['project']!r} is visible to you.")
    return _project_ids()


def _project_ids() -> list[str]:
    return [chosen()["id"]] if chosen() else [p["id"] for p in visible()]


@bp.url_defaults
def _keep_project(endpoint: str, values: dict) -> None:
    if has_request_context() and endpoint not in OPEN_TO_ALL and request.args.get("project"):
        values.setdefault("project", request.args["project"])


@bp.app_context_processor
def _shared() -> dict:
    me = person()
    return {
        "me": me,
        "csrf": auth.csrf_token(me.token_id) if me else "",
        "projects": visible(),
        "project": chosen(),
        "project_names": {p["id"]: p["name"] for p in visible()},
        "can": partial(auth.can, me) if me else lambda *_: False,
        "here": _here(),
        "last_event": g.get("last_event") or (reading.last_event_id() if me else 0),
        "event_types": " ".join(WORDS),
        "inbox_types": " ".join(INBOX_TYPES),
        "waiting_count": inbox.count(_project_ids()) if me else 0,
    }


def show(page: str, **values):
    """The page, or just its live part when htmx asks for that."""
    if request.headers.get("HX-Target") == "live":
        folder, _, name = page.rpartition("/")
        page = f"{folder}/_{name}" if folder else f"_{name}"
    return render_template(page, **values)


def styled(page: str):
    """A page of a library that styles its elements itself: its CSP allows that, scripts stay
    strict."""
    loose = web.CSP.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
    return page, {"Content-Security-Policy": loose}


def done(where: str):
    """After a deed shown by the page it was done on: htmx reads the live part again at once."""
    if request.headers.get("HX-Request"):
        return "", 204, {"HX-Trigger": "live-now"}
    return redirect(where, 303)


def go(where: str):
    """After a deed that leads to another page."""
    if request.headers.get("HX-Request"):
        return "", 204, {"HX-Redirect": where}
    return redirect(where, 303)


# ── what forms hold ───────────────────────────────────────────────────────────────────────────

NAME_MOST, TITLE_MOST, SPEC_MOST = 100, 1000, 1_000_000  # the same as in the API
ANSWER_MOST = 50_000


def _text(field: str, most: int) -> str | None:
    """A text of the form without the space around it; None when it is empty."""
    text = request.form.get(field, "").replace("\r\n", "\n").strip()
    if len(text) > most:
        raise Invalid(f"The {field} is too long: at most {most:,} characters.", field=field)
    return text or None


def _words(field: str) -> list[str]:
    """Words of the form, between commas or spaces."""
    return re.split(r"[,\s]+", text) if (text := _text(field, 10 * NAME_MOST)) else []


def _lines(field: str) -> list[str]:
    """Lines of the form as they are; empty ones are left out."""
    text = _text(field, SPEC_MOST) or ""
    if "\0" in text:
        raise Invalid(f"The {field} holds a NUL character: no program takes that.", field=field)
    return [line for line in text.split("\n") if line]


def _choice(field: str, allowed: tuple[str, ...]) -> str | None:
    value = request.form.get(field) or None
    if value is not None and value not in allowed:
        raise Invalid(f"Unknown {field} {value!r}: use one of {', '.join(allowed)}.", field=field)
    return value


# ── signing in ────────────────────────────────────────────────────────────────────────────────


@bp.get("/login")
def login():
    """The form, or the one button of a login link: looking at a link does not use it up."""
    token = request.args.get("token")
    if person() and not token:
        return redirect(_safe(request.args.get("next")), 303)
    page = _login_page(token=token)
    if web.COOKIE in request.cookies and not person():
        return _forget(page)  # a dead cookie would have the form refused as out of date
    return page


@bp.post("/login")
def sign_in():
    """Exchange a password or a login link for a cookie."""
    token = request.form.get("token")
    try:
        secret = _exchange(token)
    except Refused as refused:
        page = _login_page(token=None, error=str(refused))
        wait = refused.fields.get("retry_after")
        return page, refused.status, {"Retry-After": str(wait)} if wait else {}
    response = redirect(_safe(request.form.get("next")), 303)
    response.set_cookie(
        web.COOKIE,
        secret,
        max_age=auth.TOKEN_DAYS["web"] * 86400,
        path=request.script_root or "/",
        httponly=True,
        samesite="Lax",
        secure=request.is_secure,
    )
    return response


def _exchange(token: str | None) -> str:
    if token:
        return auth.login_with_link(token, "web")[0]
    name, password = request.form.get("username", ""), request.form.get("password", "")
    return auth.login(name.strip(), password, request.remote_addr or "", "web")[0]


def _login_page(token: str | None, error: str | None = None) -> str:
    given = request.values
    return render_template(
        "login.html",
        token=token,
        error=error,
        username=given.get("username", ""),
        next=_safe(given.get("next")),
    )


def _safe(target: str | None) -> str:
    """`target` if it is a page of this hub, else the overview."""
    if target and re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target):
        return target
    return url_for("pages.overview")


@bp.post("/logout")
def logout():
    """End this browser's token."""
    auth.logout(person())
    return _forget(redirect(url_for("pages.login"), 303))


def _forget(answer):
    response = make_response(answer)
    response.delete_cookie(web.COOKIE, path=request.script_root or "/")
    return response


# ── overview and projects ─────────────────────────────────────────────────────────────────────

AT_WORK = ",".join(s for s in cascade.STATES if s in cascade.HOLDS_SLOT)
WAITING_SHOWN = 10


@bp.get("/")
def overview():
    """What goes on, and on an empty hub what to do first."""
    ids = scope()
    at_work, _ = reading.list_tasks(ids, status=AT_WORK, limit=50)
    return show(
        "overview.html",
        servers=servers.list_servers(ids),
        at_work=reading.tasks_json(at_work),
        waiting=reading.tasks_json(_waiting(ids)),
        finished=reading.tasks_json(_finished(ids)),
        sessions=sessions.list_sessions(ids)[:20],
        any_task=bool(reading.list_tasks(ids, limit=1)[0]),
    )


def _among(ids: list[str]) -> str:
    return f"({', '.join('?' * len(ids))})"


def _waiting(ids: list[str]) -> list[dict]:
    """Ready tasks that nobody could take yet."""
    return rows(
        f"SELECT * FROM task WHERE project_id IN {_among(ids)} AND waiting_since IS NOT NULL"
        " ORDER BY priority DESC, waiting_since LIMIT ?",
        [*ids, WAITING_SHOWN],
    )


def _finished(ids: list[str]) -> list[dict]:
    """What ended last, by the newest part of the event log: no look at every task there is."""
    ended = rows(
        "SELECT task_id, MAX(id) AS at FROM event WHERE id > ? AND type IN"
        f" ('task_completed', 'task_failed', 'task_cancelled') AND project_id IN {_among(ids)}"
        " GROUP BY task_id ORDER BY at DESC LIMIT ?",
        [reading.last_event_id() - RECENT_EVENTS, *ids, RECENT_SHOWN],
    )
    order = [row["task_id"] for row in ended]
    found = {t["id"]: t for t in _by_id("task", order)}
    return [found[i] for i in order if found[i]["status"] in cascade.FINAL]


def _by_id(table: str, ids) -> list[dict]:
    found = []
    for part, marks in in_chunks(sorted(set(ids))):
        found += rows(f"SELECT * FROM {table} WHERE id IN {marks}", part)
    return found


@bp.post("/projects")
def create_project():
    """Make a project and show it."""
    name = _text("name", 2 * NAME_MOST)
    if not name:
        raise Invalid("A project needs a name that is not empty.", field="name")
    first = not visible()
    made = auth.create_project(person(), name)
    return go(url_for("pages.overview", project=None if first else made["id"]))


# ── what waits for a person ───────────────────────────────────────────────────────────────────

# The events that may change what waits.
INBOX_TYPES = (
    *("task_needs_human", "intervention_responded", "task_plan_submitted"),
    *("task_plan_approved", "task_plan_revision", "task_completed", "task_failed"),
    *("task_cancelled", "task_released"),
)
DECISIONS = ("intervention_responded", "task_plan_approved", "task_plan_revision")
DECIDED_SHOWN = 5


@bp.get("/inbox")
def waiting():
    """Everything that waits for a person, oldest first, to be answered in place."""
    return show("inbox.html", items=inbox.waiting(scope()), decided=_named(_decided(scope())))


def _decided(ids: list[str]) -> list[dict]:
    """The newest answers and decisions, by the newest part of the event log."""
    found = rows(
        f"SELECT * FROM event WHERE id > ? AND type IN {_among(DECISIONS)}"
        f" AND project_id IN {_among(ids)} ORDER BY id DESC LIMIT ?",
        [reading.last_event_id() - RECENT_EVENTS, *DECISIONS, *ids, DECIDED_SHOWN],
    )
    return [event_json(row) for row in found]


@bp.get("/inbox/count")
def waiting_count():
    """How much that is, for the mark that every page carries."""
    return render_template("_waiting.html")


@bp.post("/inbox/<ref>/answer")
def answer(ref):
    """Answer a question; the first answer counts."""
    inbox.answer(person(), ref, _text("response", ANSWER_MOST) or "")
    return done(url_for("pages.waiting"))


@bp.post("/inbox/plans/<ref>/approve")
def approve_plan(ref):
    """Let the worker do what it plans."""
    inbox.approve(person(), ref, _text("comment", ANSWER_MOST), _version())
    return done(url_for("pages.waiting"))


@bp.post("/inbox/plans/<ref>/revise")
def revise_plan(ref):
    """Send the plan back with what should be different."""
    inbox.revise(person(), ref, _text("feedback", ANSWER_MOST) or "", _version())
    return done(url_for("pages.waiting"))


def _version() -> int:
    """The version of the plan that the person has read: no other one is decided on."""
    given = request.form.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", given):
        raise Invalid("The form does not say which version of the plan was read.", field="version")
    return int(given)


# ── servers ───────────────────────────────────────────────────────────────────────────────────


@bp.get("/servers", endpoint="servers")
def server_list():
    """Every server with what it has and how busy it is."""
    return show(
        "servers/list.html",
        servers=servers.list_servers(scope(), revoked="revoked" in request.args),
        may_add=[p for p in visible() if auth.can(person(), "server.token", p["id"])],
    )


@bp.post("/servers/tokens")
def registration():
    """Make a registration token; it is shown this once, with the commands to type."""
    project = auth.pick_project(person(), request.form.get("project_id"))
    made = auth.registration_token(person(), project["id"], web.hub_url())
    page = "servers/_token.html" if request.headers.get("HX-Request") else "servers/token.html"
    return render_template(
        page,
        token=made["token"],
        expires_at=made["expires_at"],
        commands=auth.install_commands(made["token"], web.hub_url()),
        for_project=project,
        **_arrival(made["id"]),
    )


@bp.get("/servers/tokens/<token_id>")
def registration_state(token_id):
    """Whether the server a token was made for has arrived."""
    return render_template("servers/_arrival.html", **_arrival(token_id))


def _arrival(token_id: str) -> dict:
    """{registration, server}: the server a registration token has brought, if any."""
    found = one("SELECT * FROM registration WHERE id = ?", (token_id,))
    if not found or not auth.can(person(), "server.token", found["project_id"]):
        raise NotFound("There is no such registration token, or it is not visible to you.")
    server = one("SELECT * FROM server WHERE id = ?", (found["server_id"],))
    return {"registration": found, "server": server and servers.server_json(server)}


SERVER_VERBS = {"drain": servers.drain, "resume": servers.resume, "revoke": servers.revoke}


@bp.post("/servers/<ref>/<any(drain, resume, revoke):verb>")
def change_server(ref, verb):
    """Drain, resume or revoke a server."""
    SERVER_VERBS[verb](person(), ref)
    return done(url_for("pages.servers"))


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────

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
    command = _lines("command")
    return {
        "title": _text("title", TITLE_MOST),
        "spec": _text("spec", SPEC_MOST),
        "priority": _choice("priority", reading.PRIORITIES),
        "type": _choice("type", tasks.TYPES),
        "target_repo": _text("repo", NAME_MOST),
        "requirements": {"languages": _words("languages") or None},
        "acceptance_criteria": _lines("acceptance"),
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
        timeline=_named(reading.timeline(person(), row["id"])),
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


# ── sessions ──────────────────────────────────────────────────────────────────────────────────


@bp.get("/sessions")
def session_list():
    """The live sessions, with `all` those that ended too."""
    every = "all" in request.args
    return show(
        "sessions/list.html", sessions=sessions.list_sessions(scope(), every=every), every=every
    )


@bp.get("/sessions/<ref>")
def session(ref):
    """One session: its state, its terminal and its log."""
    shown = sessions.session_view(sessions.get_session(person(), ref))
    project_id = shown["project_id"]
    page = show(
        "sessions/session.html",
        session=shown,
        live_session=shown["status"] in cascade.SESSION_LIVE,
        may_watch=auth.can(person(), "session.watch", project_id),
        may_close=auth.can(person(), "session.close", project_id)
        and shown["status"] in cascade.SESSION_LIVE | {"lost"},
    )
    return styled(page)


@bp.post("/sessions/<ref>/close")
def close_session(ref):
    """Have a session ended."""
    sessions.close_session(person(), ref, force="force" in request.form)
    return done(url_for("pages.session", ref=ref))


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────


@bp.get("/pipelines")
def pipeline_list():
    """Pipelines with how far they are, newest first."""
    found = [reading.pipeline_json(row) for row in reading.list_pipelines(scope())]
    return show("pipelines/list.html", pipelines=found)


@bp.get("/pipelines/<ref>")
def pipeline(ref):
    """One pipeline: its picture and its tasks."""
    shown = reading.pipeline_json(reading.get_pipeline(person(), ref), with_tasks=True)
    keys = {task_id: key for key, task_id in shown["id_map"].items()}
    return show(
        "pipelines/pipeline.html", pipeline=shown, keys=keys, graph=draw(shown["tasks"], keys)
    )


# A layered picture: a task stands one column right of the last task it waits for.

NODE_W, NODE_H, GAP_X, GAP_Y, MARGIN = 224, 62, 64, 20, 8
NODE_TEXT = 25  # columns of text that fit into a box, in a wide font


def draw(shown: list[dict], keys: dict[str, str]) -> dict:
    """Boxes and arrows in pixels: {width, height, node: (w, h), nodes, edges}."""
    inside = {t["id"] for t in shown}
    ups = {
        t["id"]: [
            d
            for d in t["dependencies"]
            if d["depends_on_task_id"] in inside and d["dependency_type"] != "related"
        ]
        for t in shown
    }
    columns = _columns({i: [d["depends_on_task_id"] for d in deps] for i, deps in ups.items()})
    place = _places(columns)
    return {
        "width": 2 * MARGIN + len(columns) * (NODE_W + GAP_X) - GAP_X,
        "node": (NODE_W, NODE_H),
        "height": 2 * MARGIN + max(map(len, columns), default=0) * (NODE_H + GAP_Y) - GAP_Y,
        "nodes": [_node(t, keys.get(t["id"], ""), *place[t["id"]]) for t in shown],
        "edges": [
            _edge(place[d["depends_on_task_id"]], place[task_id], d)
            for task_id, deps in ups.items()
            for d in deps
        ],
    }


def _columns(ups: dict[str, list[str]]) -> list[list[str]]:
    """Ids by column, each column in the order that keeps arrows short."""
    depth: dict[str, int] = {}
    for task_id in TopologicalSorter(ups).static_order():
        depth[task_id] = 1 + max((depth[up] for up in ups[task_id]), default=-1)
    columns = [
        [i for i in ups if depth[i] == n] for n in range(max(depth.values(), default=-1) + 1)
    ]
    for before, column in pairwise(columns):
        rank = {task_id: n for n, task_id in enumerate(before)}
        column.sort(key=lambda i: _mean([rank[up] for up in ups[i] if up in rank]))  # noqa: B023
    return columns


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _places(columns: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each box; short columns stand in the middle."""
    tallest = max(map(len, columns), default=0)
    return {
        task_id: (
            MARGIN + n * (NODE_W + GAP_X),
            MARGIN + (row + (tallest - len(column)) / 2) * (NODE_H + GAP_Y),
        )
        for n, column in enumerate(columns)
        for row, task_id in enumerate(column)
    }


def _node(shown: dict, key: str, x: float, y: float) -> dict:
    title = shown["title"].removeprefix(key).lstrip(" :") or shown["title"]
    return {
        "task": shown,
        "key": cut(key, 8),
        "title": cut(title, NODE_TEXT - min(len(key), 8)),
        "where": cut(shown["assigned_server_name"] or shown["target_repo"] or "", 14),
        "x": x,
        "y": y,
    }


def _edge(start: tuple, end: tuple, dependency: dict) -> dict:
    x1, y1 = start[0] + NODE_W, start[1] + NODE_H / 2
    x2, y2 = end[0] - 8, end[1] + NODE_H / 2
    bend = (x2 - x1) / 2
    return {
        "path": f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}",
        "resolved": dependency["resolved"],
        "key": dependency["contract_key"],
    }


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns (wide characters take two), with … where it was cut."""
    taken, room = "", width
    for char in text:
        room -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if room < 0:
            return taken[:-1] + "…"
        taken += char
    return taken


# ── events and the API's own page ─────────────────────────────────────────────────────────────


@bp.get("/events")
def event_list():
    """The newest events, the last one first."""
    return show("events.html", events=_named(_newest(scope())))


def _newest(ids: list[str]) -> list[dict]:
    hub = " OR project_id IS NULL" if person().is_admin and not chosen() else ""
    found = rows(
        f"SELECT * FROM event WHERE project_id IN {_among(ids)}{hub} ORDER BY id DESC LIMIT ?",
        [*ids, EVENTS_SHOWN],
    )
    return [event_json(row) for row in found]


def _named(events: list[dict]) -> list[dict]:
    """Events with the titles and names of what they are about."""
    about = defaultdict(set)
    for event in events:
        for kind in ("task", "session", "server"):
            about[kind].add(event[f"{kind}_id"] or "")
        about["task"].add(event["cause_task_id"] or "")
    names = {
        row["id"]: row.get("title") or row["name"]
        for kind, ids in about.items()
        for row in _by_id(kind, ids)
    }
    return [
        event
        | {kind: names.get(event[f"{kind}_id"]) for kind in ("task", "session", "server")}
        | {"cause": names.get(event["cause_task_id"])}
        for event in events
    ]


@bp.get("/docs")
def docs():
    """The API, as Swagger UI shows it."""
    return styled(render_template("docs.html"))


# ── in words ──────────────────────────────────────────────────────────────────────────────────

# state of a task, server or session: (shape in _shapes.html, tone in app.css)
STATES = {
    "blocked": ("bars", "quiet"),
    "ready": ("ring", "live"),
    "not assigned": ("dashed", "quiet"),
    "pending": ("dashed", "quiet"),
    "assigned": ("half", "live"),
    "planning": ("diamond", "live"),
    "plan_review": ("diamond-full", "warn"),
    "running": ("play", "live"),
    "needs_human": ("triangle", "warn"),
    "done": ("check", "good"),
    "failed": ("cross", "bad"),
    "cancelled": ("slash", "quiet"),
    "online": ("disc", "good"),
    "offline": ("cross", "bad"),
    "draining": ("half", "warn"),
    "revoked": ("slash", "quiet"),
    "starting": ("dashed", "live"),
    "active": ("disc", "good"),
    "disconnected": ("triangle", "warn"),
    "recovering": ("half", "warn"),
    "lost": ("cross", "bad"),
    "closed": ("square", "quiet"),
}


def _assignee_or_fields(event: dict) -> str:
    if event["details"].get("assignee"):
        return f"meant for {event['details']['assignee']} once it is free"
    return f"changed: {', '.join(event['details'].get('changed', ()))}"


def _completed(event: dict) -> str:
    summary = (event["details"].get("result") or {}).get("summary")
    return f"done: {summary}" if summary else "done"


def _dependency(verb: str):
    def sentence(event: dict) -> str:
        details = event["details"]
        key = f" (input {details['key']})" if details.get("key") else ""
        return f"{verb} {details.get('title', 'a task')}{key}"

    return sentence


def _resolved(event: dict) -> str:
    cause = event.get("cause") or "a task it waited for"
    if key := event["details"].get("key"):
        return f"input {key} has arrived from {cause}"
    return f"no longer waits for {cause}"


def _ended(event: dict) -> str:
    code = event["details"].get("exit_code")
    return "session closed" if code is None else f"session closed, exit code {code}"


# type of an event: (shape, tone, what happened: a text with the fields of its details, or a
# function of the event). live.js listens for exactly these types.
WORDS = {
    "task_created": ("ring", "quiet", "created"),
    "task_assigned": ("half", "live", "given to {agent}"),
    "task_auto_assigned": ("half", "live", "given to {agent}, who fits best ({score} points)"),
    "task_planning": ("diamond", "live", "the worker is planning"),
    "task_plan_submitted": ("diamond-full", "warn", "plan handed in"),
    "task_plan_approved": ("check", "good", "plan approved"),
    "task_plan_revision": ("diamond", "live", "plan sent back"),
    "task_started": ("play", "live", "attempt {attempt} started"),
    "task_needs_human": ("triangle", "warn", "waits for a person"),
    "intervention_responded": ("check", "good", "question answered"),
    "permission_requested": ("triangle", "warn", "asks for a permission"),
    "permission_answered": ("check", "good", "permission answered"),
    "task_note_added": ("square", "quiet", "note added"),
    "task_updated": ("square", "quiet", _assignee_or_fields),
    "task_completed": ("check", "good", _completed),
    "task_failed": ("cross", "bad", "attempt {attempt} failed: {error}"),
    "task_cancelled": ("slash", "quiet", "cancelled"),
    "task_retried": ("ring", "live", "opened again as attempt {next_attempt}"),
    "task_released": ("ring", "warn", "taken back, {why}; attempt {next_attempt} is next"),
    "task_status_update": ("square", "quiet", "{status}: told to the session that ordered it"),
    "late_report": ("triangle", "warn", "late report on attempt {attempt} ({said}) kept"),
    "contract_fulfilled": ("check", "good", "contract {key} delivered"),
    "contract_amended": ("check", "good", "contract {key} supplied by hand"),
    "dependency_added": ("bars", "quiet", _dependency("depends on")),
    "dependency_removed": ("bars", "quiet", _dependency("no longer depends on")),
    "dependency_resolved": ("check", "quiet", _resolved),
    "task_unblocked": ("ring", "live", "no longer blocked"),
    "session_requested": ("dashed", "quiet", "session asked for"),
    "session_started": ("dashed", "live", "session started"),
    "session_active": ("disc", "good", "session active"),
    "session_recovered": ("half", "warn", "session recovered"),
    "session_closed": ("square", "quiet", _ended),
    "session_disconnected": ("triangle", "warn", "session out of sight: its server is away"),
    "session_lost": ("cross", "bad", "session lost: {reason}"),
    "session_failed": ("cross", "bad", "session did not start: {error}"),
    "session_log_gap": ("triangle", "warn", "output is missing from the log: {why}"),
    "session_log_removed": ("slash", "quiet", "the log has begun to lose its start: {why}"),
    "server_registered": ("ring", "live", "server registered"),
    "server_online": ("disc", "good", "server online"),
    "server_offline": ("cross", "bad", "server offline, silent for {silent_s} s"),
    "server_draining": ("half", "warn", "server takes no new work"),
    "server_resumed": ("disc", "good", "server takes work again"),
    "server_revoked": ("slash", "quiet", "server revoked"),
    "server_changed": ("square", "quiet", _assignee_or_fields),
    "registration_token_created": ("square", "quiet", "registration token made"),
    "project_created": ("square", "quiet", "project {name} created"),
    "project_changed": ("square", "quiet", _assignee_or_fields),
    "user_created": ("square", "quiet", "user {username} created"),
    "user_changed": ("square", "quiet", "user {username} changed"),
    "user_deleted": ("slash", "quiet", "user {username} deleted"),
}


class _Details(dict):
    def __missing__(self, key):
        return "?"


def said(event: dict) -> str:
    """What happened, in plain words; an event from `_named` can name the task that caused it."""
    _, _, words = WORDS.get(event["type"], ("", "", event["type"].replace("_", " ")))
    if callable(words):
        return words(event)
    return words.format_map(_Details(event["details"]))


def shape_of(event: dict) -> tuple[str, str]:
    return WORDS.get(event["type"], ("square", "quiet", ""))[:2]
