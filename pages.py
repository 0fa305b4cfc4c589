"""The dashboard: pages and their live parts as HTML. A view asks one use case and shows the answer.

A page `area/name.html` has a live part in `area/_name.html`, a `<section id="live">` that htmx
fetches again from the page's own address when an event touches it (static/live.js). GET never
changes anything; every POST is one use case of layer 2.
"""

import json
import math
import re
import time
from collections import defaultdict
from functools import lru_cache, partial

import yaml
from apiflask import APIBlueprint
from flask import (
    current_app,
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
import prose
import reading
import servers
import sessions
import sockets
import web
import words
from models import Invalid, NotFound, Refused, event_json, in_chunks, iso, rows

bp = APIBlueprint("pages", __name__, enable_openapi=False)

OPEN_TO_ALL = frozenset({"pages.login", "pages.sign_in"})
RECENT_EVENTS = 5000  # how far back the overview looks for what finished
RECENT_SHOWN = 8
# What the pages are: name, endpoint, first part of the path, the key after `g`.
NAV = (
    ("Overview", "pages.overview", "", "o"),
    ("Inbox", "pages.waiting", "inbox", "i"),
    ("Tasks", "pages.task_list", "tasks", "t"),
    ("Pipelines", "pages.pipeline_list", "pipelines", "p"),
    ("Graph", "pages.graph", "graph", "g"),
    ("Servers", "pages.servers", "servers", "v"),
    ("Sessions", "pages.session_list", "sessions", "s"),
    ("Events", "pages.event_list", "events", "e"),
    ("Projects", "pages.project_list", "projects", ""),
    ("Settings", "pages.settings", "settings", ""),
    ("API", "pages.docs", "docs", ""),
)

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
    env.filters |= {"pretty": _pretty, "said": words.said, "marked": prose.marked, "moment": iso}
    env.filters |= {"short": lambda value: (value or "")[:8]}
    env.globals |= {
        "STATES": words.STATES,
        "shape_of": words.shape_of,
        "is_unsafe": is_unsafe,
        "coding_agents": coding_agents,
    }


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
    return project_ids()


def project_ids() -> list[str]:
    return [chosen()["id"]] if chosen() else [p["id"] for p in visible()]


def coding_agents() -> list[dict]:
    """The coding agents the hub has profiles of, by title: {name, title, modes, unsafe_modes}."""
    return _read_profiles(sockets.profiles.etag)


@lru_cache(maxsize=1)
def _read_profiles(_etag: str) -> list[dict]:
    found = [yaml.safe_load(text) for text in sockets.profiles.texts.values()]
    agents = [
        {"name": p["name"], "title": p.get("title") or p["name"]}
        | {kind: p.get(kind) or [] for kind in ("modes", "unsafe_modes")}
        for p in found
        if p.get("start") == "agent"
    ]
    return sorted(agents, key=lambda agent: agent["title"].lower())


def is_unsafe(profile: str | None, mode: str | None) -> bool:
    """Whether a coding agent asks nothing in this mode."""
    return any(a["name"] == profile and mode in a["unsafe_modes"] for a in coding_agents())


def may_create() -> list[dict]:
    """The projects the person may make tasks in."""
    return [p for p in visible() if auth.can(person(), "task.create", p["id"])]


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
        "event_types": " ".join(words.WORDS),
        "inbox_types": " ".join(INBOX_TYPES),
        "may_add_server": any(auth.can(me, "server.token", p["id"]) for p in visible()),
        "nav": [entry for entry in NAV if entry[1] in current_app.view_functions],
        "waiting_count": inbox.count(project_ids()) if me else 0,
    }


class _Pace:
    """How long browsers are to wait before they fetch a part of a page again: a short while, and
    longer the more of the hub's time such parts take. So what happens is seen at once, and many
    who look at much that happens do not slow down what happens."""

    LEAST_MS, MOST_MS = 25, 2000
    SHARE = 0.2  # of the time, that may go into parts before browsers are slowed down

    def __init__(self):
        self._busy = 0.0  # seconds of the last one, the older the less
        self._at = time.perf_counter()

    def after(self, took: float) -> int:
        """Milliseconds to wait, when a part has just taken so many seconds."""
        now = time.perf_counter()
        self._busy = self._busy * math.exp(self._at - now) + took
        self._at = now
        return int(min(self.MOST_MS, self.LEAST_MS * max(1.0, self._busy / self.SHARE) ** 2))


_pace = _Pace()


def _is_part() -> bool:
    return request.headers.get("HX-Target") == "live"


@bp.before_request
def _begin():
    g.began = time.perf_counter()


@bp.after_request
def _set_pace(response):
    if _is_part():
        began = g.get("began", time.perf_counter())
        response.headers["X-Live-Pause"] = _pace.after(time.perf_counter() - began)
    return response


def show(page: str, **values):
    """The page, or just its live part when htmx asks for that."""
    if _is_part():
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


# ── what the pages show ───────────────────────────────────────────────────────────────────────


def among(ids: list[str]) -> str:
    return f"({', '.join('?' * len(ids))})"


def by_id(table: str, ids) -> list[dict]:
    found = []
    for part, marks in in_chunks(sorted(set(ids))):
        found += rows(f"SELECT * FROM {table} WHERE id IN {marks}", part)
    return found


def named(events: list[dict]) -> list[dict]:
    """Events with the titles and names of what they are about."""
    about = defaultdict(set)
    for event in events:
        for kind in ("task", "session", "server"):
            about[kind].add(event[f"{kind}_id"] or "")
        about["task"].add(event["cause_task_id"] or "")
    names = {
        row["id"]: row.get("title") or row["name"]
        for kind, ids in about.items()
        for row in by_id(kind, ids)
    }
    return [
        event
        | {kind: names.get(event[f"{kind}_id"]) for kind in ("task", "session", "server")}
        | {"cause": names.get(event["cause_task_id"])}
        for event in events
    ]


# ── what forms hold ───────────────────────────────────────────────────────────────────────────

NAME_MOST, TITLE_MOST, SPEC_MOST = 100, 1000, 1_000_000  # the same as in the API
ANSWER_MOST = 50_000


def text_of(field: str, most: int) -> str | None:
    """A text of the form without the space around it; None when it is empty."""
    text = request.form.get(field, "").replace("\r\n", "\n").strip()
    if len(text) > most:
        raise Invalid(f"The {field} is too long: at most {most:,} characters.", field=field)
    return text or None


def words_of(field: str) -> list[str]:
    """Words of the form, between commas or spaces."""
    return re.split(r"[,\s]+", text) if (text := text_of(field, 10 * NAME_MOST)) else []


def lines_of(field: str) -> list[str]:
    """Lines of the form as they are; empty ones are left out."""
    text = text_of(field, SPEC_MOST) or ""
    if "\0" in text:
        raise Invalid(f"The {field} holds a NUL character: no program takes that.", field=field)
    return [line for line in text.split("\n") if line]


def as_json(text: str, what: str):
    """The value of a JSON text. Raises Invalid that says where it is wrong."""
    try:
        return web.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"The {what} is not JSON: {error}.", field=what) from None


def as_object(text: str | None, what: str) -> dict:
    """The object of a JSON text, empty for none. Raises Invalid."""
    found = as_json(text, what) if text else {}
    if not isinstance(found, dict):
        raise Invalid(f"The {what} is not a JSON object: begin it with {{.", field=what)
    return found


def object_of(field: str) -> dict:
    """The JSON object in a field of the form, empty for none."""
    return as_object(text_of(field, SPEC_MOST), field.replace("_", " "))


def choice_of(field: str, allowed: tuple[str, ...]) -> str | None:
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
        # the proxy that speaks TLS talks plainly to us; the browser says what it speaks
        secure=request.is_secure or request.headers.get("Origin", "").startswith("https://"),
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


# ── overview ──────────────────────────────────────────────────────────────────────────────────

AT_WORK = ",".join(s for s in cascade.STATES if s in cascade.HOLDS_SLOT)
NOT_FINISHED = ",".join(s for s in cascade.STATES if s in cascade.OPEN)
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


def _waiting(ids: list[str]) -> list[dict]:
    """Ready tasks that nobody could take yet."""
    return rows(
        f"SELECT * FROM task WHERE project_id IN {among(ids)} AND waiting_since IS NOT NULL"
        " ORDER BY priority DESC, waiting_since LIMIT ?",
        [*ids, WAITING_SHOWN],
    )


def _finished(ids: list[str]) -> list[dict]:
    """What ended last, by the newest part of the event log: no look at every task there is."""
    ended = rows(
        "SELECT task_id, MAX(id) AS at FROM event WHERE id > ? AND type IN"
        f" ('task_completed', 'task_failed', 'task_cancelled') AND project_id IN {among(ids)}"
        " GROUP BY task_id ORDER BY at DESC LIMIT ?",
        [reading.last_event_id() - RECENT_EVENTS, *ids, RECENT_SHOWN],
    )
    order = [row["task_id"] for row in ended]
    found = {t["id"]: t for t in by_id("task", order)}
    return [found[i] for i in order if found[i]["status"] in cascade.FINAL]


# ── what waits for a person ───────────────────────────────────────────────────────────────────

# The events that may change what waits.
INBOX_TYPES = (
    *("task_needs_human", "intervention_responded", "task_plan_submitted"),
    *("task_plan_approved", "task_plan_revision", "task_completed", "task_failed"),
    *("task_cancelled", "task_released", "permission_requested", "permission_answered"),
    *("alert_raised", "alert_ended", "session_closed", "session_failed"),
)
DECISIONS = ("intervention_responded", "task_plan_approved", "task_plan_revision")
DECISIONS += ("permission_answered",)
DECIDED_SHOWN = 5


@bp.get("/inbox")
def waiting():
    """Everything that waits for a person, oldest first, to be answered in place."""
    return show("inbox.html", items=inbox.waiting(scope()), decided=named(_decided(scope())))


def _decided(ids: list[str]) -> list[dict]:
    """The newest answers and decisions of people, by the newest part of the event log."""
    found = rows(
        f"SELECT * FROM event WHERE id > ? AND type IN {among(DECISIONS)}"
        " AND actor NOT LIKE 'rule%' AND actor NOT LIKE 'grant:%'"
        f" AND project_id IN {among(ids)} ORDER BY id DESC LIMIT ?",
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
    inbox.answer(person(), ref, text_of("response", ANSWER_MOST) or "")
    return done(url_for("pages.waiting"))


@bp.post("/inbox/plans/<ref>/approve")
def approve_plan(ref):
    """Let the worker do what it plans."""
    inbox.approve(person(), ref, text_of("comment", ANSWER_MOST), _version())
    return done(url_for("pages.waiting"))


@bp.post("/inbox/plans/<ref>/revise")
def revise_plan(ref):
    """Send the plan back with what should be different."""
    inbox.revise(person(), ref, text_of("feedback", ANSWER_MOST) or "", _version())
    return done(url_for("pages.waiting"))


def _version() -> int:
    """The version of the plan that the person has read: no other one is decided on."""
    given = request.form.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", given):
        raise Invalid("The form does not say which version of the plan was read.", field="version")
    return int(given)


# ── the palette ───────────────────────────────────────────────────────────────────────────────

LOOKED_THROUGH = 2000  # the newest of each kind, of all projects together
FOUND_MOST = 6  # of each kind
FINDS = (  # table, condition, name column, state column
    ("task", "1", "title", "status"),
    ("pipeline", "1", "name", "''"),
    ("session", "1", "name", "state"),
    ("server", "revoked = 0", "name", "''"),
)


@bp.get("/palette")
def palette():
    """The newest things whose names fit what is typed, or whose ids begin with it."""
    typed = request.args.get("q", "").strip()[:NAME_MOST]
    found = {find[0]: _fitting(typed, *find) for find in FINDS} if typed else {}
    return render_template("_found.html", found=found, typed=typed)


def _fitting(typed: str, table: str, condition: str, name: str, state: str) -> list[dict]:
    ids = project_ids()
    each = max(20, LOOKED_THROUGH // (len(ids) or 1))
    seen = []
    for project in ids:
        seen += rows(
            f"SELECT rowid AS at, id, project_id, substr({name}, 1, 200) AS name, {state} AS state"
            f" FROM {table} WHERE project_id = ? AND {condition} ORDER BY rowid DESC LIMIT ?",
            (project, each),
        )
    ranked = [(_rank(typed.lower(), row), row) for row in seen]
    best = [(-rank, -row["at"], row) for rank, row in ranked if rank]
    return [row for *_, row in sorted(best, key=lambda one: one[:2])[:FOUND_MOST]]


def _rank(typed: str, row: dict) -> int:
    """How well a thing fits: 3 at the start of its name or id, 2 by all the words, 1 by letters in
    their order, 0 not."""
    name = row["name"].lower()
    if name.startswith(typed) or (len(typed) >= 4 and row["id"].startswith(typed.lstrip("#"))):
        return 3
    words_typed = typed.split()
    if all(word in name for word in words_typed):
        return 2
    rest = iter(name)
    return 1 if all(letter in rest for letter in "".join(words_typed)) else 0


# ── the API's own page ────────────────────────────────────────────────────────────────────────


@bp.get("/docs")
def docs():
    """The API, as Swagger UI shows it."""
    return styled(render_template("docs.html"))
