"""Who may do what, by every route there is; secrets; other sites."""

import re
import threading
import time
import uuid

import pytest

import alerts
import auth
import inbox
import models
import permissions
import servers
import sessions
import tasks
import wire
from auth import HUB
from conftest import Client
from test_refusals import dump

# ── the matrix ────────────────────────────────────────────────────────────────────────────────
# One character a caller: + may, 1 is 401, 3 is 403. In a project that is not theirs, everybody
# but the hub's admin gets 404, whatever the route.

PEOPLE = ("viewer", "operator", "admin", "hub")
KEYS = ("server", "worker", "orchestrator", "plain")
CALLERS = ("nobody", *PEOPLE, *KEYS)
SIGNED_IN = "1++++++++"
TASK_WORK = "13++++3+3"
REPORTING = "13+++++33"  # the task is on the server and is the worker's own
NOTING = "13++++++3"  # on the worker's own task
DECIDING = "13+++33+3"  # on a plan, or a question, of the server's and the worker's own task
OPERATORS = "13+++3333"
WATCHING = "1++++33+3"
ADMINS = "133++3333"
HUB_ADMINS = "1333+3333"
SERVERS = "13333+333"
HUB_WIDE = {SERVERS, HUB_ADMINS}  # about no project: the same answer everywhere

ROUTES = {
    "POST auth/logout": SIGNED_IN,
    "GET auth/me": SIGNED_IN,
    "GET projects": SIGNED_IN,
    "POST projects": HUB_ADMINS,
    "GET projects/<ref>": SIGNED_IN,
    "PATCH projects/<ref>": ADMINS,
    "GET users": HUB_ADMINS,
    "POST users": HUB_ADMINS,
    "GET users/<ref>": HUB_ADMINS,
    "PATCH users/<ref>": HUB_ADMINS,
    "DELETE users/<ref>": HUB_ADMINS,
    "POST servers/tokens": ADMINS,
    "POST servers/heartbeat": SERVERS,
    "GET servers/tasks/poll": SERVERS,
    "POST server/poll": SERVERS,
    "GET files/pending": SERVERS,
    "GET files/pulls/pending": SERVERS,
    "GET access-grants": SERVERS,
    "GET approval-rules": SERVERS,
    "POST permissions/log": SERVERS,
    "PATCH sessions/<ref>/mcp-status": SERVERS,
    "GET servers": SIGNED_IN,
    "GET servers/<ref>": SIGNED_IN,
    "PATCH servers/<ref>": ADMINS,
    "DELETE servers/<ref>": ADMINS,
    "POST servers/<ref>/drain": ADMINS,
    "POST servers/<ref>/resume": ADMINS,
    "POST servers/<ref>/revoke": ADMINS,
    "GET tasks": SIGNED_IN,
    "POST tasks": TASK_WORK,
    "GET tasks/<ref>": SIGNED_IN,
    "PUT tasks/<ref>": TASK_WORK,
    "PATCH tasks/<ref>": TASK_WORK,
    "DELETE tasks/<ref>": TASK_WORK,
    "POST tasks/<ref>/assign": TASK_WORK,
    "POST tasks/<ref>/retry": TASK_WORK,
    "POST tasks/<ref>/start": REPORTING,
    "POST tasks/<ref>/complete": REPORTING,
    "POST tasks/<ref>/fail": REPORTING,
    "GET tasks/check": SIGNED_IN,
    "POST tasks/<ref>/help": REPORTING,
    "POST tasks/<ref>/plan": REPORTING,
    "GET tasks/<ref>/plan": SIGNED_IN,
    "POST tasks/<ref>/plan/approve": DECIDING,
    "POST tasks/<ref>/plan/revise": DECIDING,
    "GET tasks/<ref>/notes": SIGNED_IN,
    "POST tasks/<ref>/notes": NOTING,
    "POST tasks/<ref>/dependencies": TASK_WORK,
    "DELETE tasks/<ref>/dependencies/<other>": TASK_WORK,
    "GET tasks/<ref>/events": SIGNED_IN,
    "GET tasks/<ref>/explain": SIGNED_IN,
    "GET tasks/<ref>/contracts": SIGNED_IN,
    "GET tasks/<ref>/contracts/<key>": SIGNED_IN,
    "PUT tasks/<ref>/contracts/<key>": OPERATORS,
    "GET interventions": SIGNED_IN,
    "GET interventions/<ref>": SIGNED_IN,
    "POST interventions/<ref>/respond": DECIDING,
    "POST interventions/<ref>/collect": SIGNED_IN,
    "GET permissions": SIGNED_IN,
    "GET permissions/<ref>": SIGNED_IN,
    "POST permissions/<ref>/decide": OPERATORS,
    "GET sessions/<ref>/grants": SIGNED_IN,
    "GET sessions/<ref>/explain": SIGNED_IN,
    "DELETE grants/<ref>": OPERATORS,
    "GET rules": SIGNED_IN,
    "POST rules": ADMINS,
    "PATCH rules/<ref>": ADMINS,
    "DELETE rules/<ref>": ADMINS,
    "POST rules/test": SIGNED_IN,
    "GET alerts": SIGNED_IN,
    "POST alerts/<ref>/dismiss": OPERATORS,
    "GET status": SIGNED_IN,
    "POST pipelines": TASK_WORK,
    "GET pipelines": SIGNED_IN,
    "GET pipelines/<ref>": SIGNED_IN,
    "GET sessions": SIGNED_IN,
    "POST sessions": OPERATORS,
    "GET sessions/<ref>": SIGNED_IN,
    "POST sessions/<ref>/input": OPERATORS,
    "POST sessions/<ref>/resize": OPERATORS,
    "POST sessions/<ref>/close": OPERATORS,
    "GET sessions/<ref>/screen": WATCHING,
    "GET sessions/<ref>/output": WATCHING,
    "GET sessions/<ref>/marks": WATCHING,
    "GET sessions/<ref>/recording": WATCHING,
    "GET hub/doctor": HUB_ADMINS,
    "POST hub/backup": HUB_ADMINS,
    "POST hub/restore": HUB_ADMINS,
    "GET events": SIGNED_IN,
    "GET events/stream": SIGNED_IN,
}
PUBLIC = {"GET health", "POST auth/login", "POST servers/register"}
INSTALLING = {"/install.sh", "/install/<any('agent.py', 'cli.py'):name>"}  # open to all too
BODIES = {
    "POST projects": {"name": "new"},
    "PATCH projects/<ref>": {"settings": {}},
    "POST users": {"username": "new"},
    "PATCH users/<ref>": {"roles": {}},
    "POST servers/tokens": {"project_id": "{project}"},
    "POST server/poll": {"instance": "x", "seq": 1, "wait": 0, "frames": []},
    "PATCH servers/<ref>": {"manual": False},
    "POST tasks": {"title": "new", "project_id": "{project}"},
    "PUT tasks/<ref>": {"spec": "new"},
    "PATCH tasks/<ref>": {"spec": "new"},
    "POST tasks/<ref>/complete": {"result": {"contracts": {"k": 1}}},
    "POST tasks/<ref>/fail": {"error": "no"},
    "POST tasks/<ref>/help": {"question": "why?"},
    "POST tasks/<ref>/plan": {"plan": "do it"},
    "POST tasks/<ref>/plan/revise": {"feedback": "no"},
    "POST tasks/<ref>/notes": {"content": "new"},
    "POST interventions/<ref>/respond": {"response": "yes"},
    "POST tasks/<ref>/dependencies": {
        "depends_on_task_id": "{other}",
        "dependency_type": "related",
    },
    "PUT tasks/<ref>/contracts/<key>": {"data": 1},
    "POST pipelines": {
        "name": "p",
        "project_id": "{project}",
        "tasks": [{"id": "a", "title": "a"}],
    },
    "POST sessions": {"server_id": "{servers}"},
    "POST sessions/<ref>/input": {"data": "YQ=="},
    "POST sessions/<ref>/resize": {"cols": 80, "rows": 25},
    "POST interventions/<ref>/collect": {"claim": "11111111-1111-4111-8111-111111111111"},
    "POST permissions/<ref>/decide": {"decision": "allow"},
    "POST rules": {"action": "deny", "project_id": "{project}"},
    "PATCH rules/<ref>": {"note": "new"},
    "POST rules/test": {"command": "ls", "project_id": "{project}"},
}
QUERIES = {
    f"GET {what}"
    for what in ("servers", "tasks", "pipelines", "sessions", "events", "interventions")
    + ("permissions", "rules", "alerts")
}


def api_routes(app) -> set[tuple[str, str]]:
    """(method and path as in ROUTES, rule) of everything under /api."""
    found = set()
    for rule in app.url_map.iter_rules():
        if not rule.rule.startswith("/api/v1/"):
            assert not rule.rule.startswith("/api"), rule
            continue
        path = rule.rule.removeprefix("/api/v1/")
        if path.startswith("server/") and path != "server/poll":
            path = path.removeprefix("server/")
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            found.add((f"{method} {path}", rule.rule))
    return found


def test_every_route_of_the_api_has_its_line_in_the_matrix(app):
    assert {name for name, _ in api_routes(app)} == set(ROUTES) | PUBLIC


class Scene:
    """The same things in two projects, and a client for each sort of caller of the first."""

    def __init__(self, app, world):
        self.objects = {name: self._build(world, name) for name in ("shop", "other")}
        users = {
            "viewer": {"shop": "viewer"},
            "operator": {"shop": "operator"},
            "admin": {"shop": "admin"},
        }
        nobody = Client(app)
        self.callers = {"nobody": nobody, "hub": nobody.as_user("admin")}
        for name, roles in users.items():
            auth.create_user(HUB, f"the-{name}", None, False, roles)
            self.callers[name] = nobody.as_user(f"the-{name}")
        own = self.objects["shop"]
        self.callers["server"] = nobody.as_key(world.keys["dev-shop"])
        for role in ("worker", "orchestrator", "plain"):
            self.callers[role] = nobody.as_key(auth.session_key(own[role]))
        auth.create_user(HUB, "victim", None)

    def _build(self, world, project: str) -> dict:
        server = world.server(f"dev-{project}", project=project)
        up, run = f"up-{project}", f"run-{project}"
        world.task(up, project=project)
        spec = {"expected_contracts": {"k": {}}}
        world.task(run, related=[up], project=project, command=["x"], structured_spec=spec)
        world.assign(run, server=f"dev-{project}")
        world.start(run)
        worker = world.row(run)["session_id"]
        asks = f"asks-{project}"
        world.working(asks, server=f"dev-{project}", project=project)
        asked, _ = inbox.ask(HUB, world.ids[asks], "why?", kind="question")
        made = {}
        for role in ("orchestrator", "plain"):
            data = {"server_id": server, "role": role, "name": f"{role}-{project}"}
            made[role] = sessions.open_session(HUB, data)[0]["id"]
        for session in (worker, *made.values()):
            with models.transaction() as tx:
                sessions.move(tx, sessions.get_session(HUB, session), "started", "hub")
        row = world.project(project)
        items = [{"id": "a", "title": "a"}]
        pipeline = tasks.create_pipeline(HUB, row, f"p-{project}", items)
        made |= self._asked(world.key(f"dev-{project}"), worker)
        rule = {"project_id": row["id"], "action": "ask", "tool": "X"}
        made["rules"] = permissions.add_rule(HUB, rule)["id"]
        return made | {
            "project": row["id"],
            "projects": row["id"],
            "servers": server,
            "tasks": world.ids[run],
            "other": world.ids[up],
            "sessions": worker,
            "worker": worker,
            "interventions": asked["id"],
            "pipelines": pipeline["id"],
            "users": "victim",
            "key": "k",
        }

    def _asked(self, key: auth.Caller, session_id: str) -> dict:
        """A permission that is asked for, one that was granted, and an alert."""
        session = sessions.get_session(HUB, session_id)
        asked = [str(uuid.uuid4()) for _ in range(2)]
        with models.transaction() as tx:
            for n, request_id in enumerate(asked):
                frame = {"request_id": request_id, "tool": "Bash", "input": {"command": f"x{n}"}}
                permissions.requested(tx, key, session, frame)
            alerts.begin(tx, "stuck", session["project_id"], "stuck", session=session)
        permissions.decide(HUB, asked[0], "allow", scope="session")
        return {
            "permissions": asked[1],
            "grants": permissions.grants_of(session_id)[0]["id"],
            "alerts": alerts.waiting([session["project_id"]])[0]["id"],
        }

    def ask(self, caller: str, name: str, rule: str, project: str) -> int:
        """The status of a request; what it changed is undone."""
        things = self.objects[project]
        kind = name.split()[1].split("/")[0]
        path = rule.replace("<ref>", things.get(kind, ""))
        path = path.replace("<other>", things["other"]).replace("<key>", "k")
        if name in QUERIES:
            path += f"?project_id={things['project']}"
        body = {
            k: v.format(**things) if isinstance(v, str) else v
            for k, v in BODIES.get(name, {}).items()
        }
        method = name.split()[0]
        sent = {} if method == "GET" else {"json": body}
        status = 0
        try:
            with models.transaction():
                answer = self.callers[caller].open(method, path, buffered=False, **sent)
                status = answer.status_code
                answer.close()
                raise _Undo
        except _Undo:
            return status


class _Undo(Exception):
    pass


def shown(status: int) -> str:
    return {401: "1", 403: "3", 404: "4", 500: "!"}.get(status, "+")


@pytest.fixture
def scene(app, world):
    return Scene(app, world)


def test_each_caller_may_do_what_the_matrix_says_in_their_own_project(app, scene):
    before = dump()
    wrong = []
    for name, rule in sorted(api_routes(app)):
        if name in PUBLIC:
            continue
        found = "".join(shown(scene.ask(caller, name, rule, "shop")) for caller in CALLERS)
        if found != ROUTES[name]:
            wrong.append(f"{rule}  {name}: {found}, not {ROUTES[name]}")
    assert not wrong, "\n".join(wrong)
    assert dump() == before


def test_nobody_reaches_into_a_project_that_is_not_theirs(app, scene):
    wrong = []
    for name, rule in sorted(api_routes(app)):
        about_a_project = "<ref>" in name or name in QUERIES or "{project}" in str(BODIES.get(name))
        if ROUTES.get(name) in (None, *HUB_WIDE) or not about_a_project and name != "POST sessions":
            continue
        found = "".join(shown(scene.ask(caller, name, rule, "other")) for caller in CALLERS)
        if found != "1444+4444":
            wrong.append(f"{rule}  {name}: {found}")
    assert not wrong, "\n".join(wrong)


def test_only_the_public_routes_answer_without_a_credential(app, scene, client):
    assert client.get("health").status_code == 200
    assert client.post("auth/login", {"username": "x"}).json["code"] == "wrong_password"
    assert (
        client.post("servers/register", {"name": "x", "registration_token": "x"}).json["code"]
        == "token_malformed"
    )


def test_what_is_installed_from_here_is_open_to_all_holds_no_secret_and_changes_nothing(
    app, scene, client
):
    assert {r.rule for r in app.url_map.iter_rules() if r.rule.startswith("/install")} == INSTALLING
    before = dump()
    secrets = [auth._secret.hex(), scene.callers["server"].headers["X-API-Key"]]
    for path in ("/install.sh", "/install/agent.py", "/install/cli.py"):
        answer = client.flask.get(path)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store"), path
        assert not [secret for secret in secrets if secret in answer.text]
        assert "orcreg_" not in answer.text.replace("orcreg_*", "").replace("orcreg_.", "") or (
            path != "/install.sh"
        )
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert client.flask.open(path, method=method).status_code == 405
    for path in ("/install/hub.py", "/install/../hub.py", "/install/%2e%2e/secret", "/install/"):
        assert client.flask.get(path).status_code == 404, path
    assert dump() == before


def test_reading_never_changes_anything(app, scene):
    before, said = dump(), models.rows("SELECT * FROM token")
    for name, rule in sorted(api_routes(app)):
        if not name.startswith("GET"):
            continue
        things = scene.objects["shop"]
        kind = name.split()[1].split("/")[0]
        path = rule.replace("<ref>", things.get(kind, "")).replace("<key>", "k")
        for caller in ("hub", "server", "worker"):
            answer = scene.callers[caller].open("GET", path, buffered=False)
            assert answer.status_code < 500, path
            answer.close()
    assert dump() == before
    assert models.rows("SELECT * FROM token") == said


def test_no_page_is_shown_to_who_is_not_signed_in(app, scene, client):
    open_to_all = {"/login", "/static/<path:filename>", "/openapi.json", *INSTALLING}
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/api") or rule.rule in open_to_all or rule.websocket:
            continue
        path = re.sub(r"<any\((\w+),.*?>", r"\1", rule.rule)
        path = re.sub(r"<[^>]*>", scene.objects["shop"]["tasks"], path)
        for method in rule.methods - {"OPTIONS", "HEAD"}:
            before = dump()
            answer = client.flask.open(path, method=method)
            assert answer.status_code in (303, 401), (method, path, answer.status_code)
            assert dump() == before
            key = scene.callers["server"].flask.open(
                path, method=method, headers=scene.callers["server"].headers
            )
            assert key.status_code in (303, 401, 403), (method, path)


def test_a_role_taken_away_counts_at_once(scene, client):
    viewer = scene.callers["viewer"]
    assert viewer.get("tasks?project_id=shop").status_code == 200
    auth.change_user(HUB, "the-viewer", {"roles": {}})
    assert viewer.get("tasks?project_id=shop").status_code == 404
    auth.change_user(HUB, "the-viewer", {"disabled": True})
    assert viewer.get("auth/me").status_code == 401


@pytest.mark.parametrize("end", ["logout", "delete", "password", "expire"])
def test_a_token_ends(scene, client, end):
    operator = scene.callers["operator"]
    if end == "logout":
        assert operator.post("auth/logout").status_code == 200
    elif end == "delete":
        auth.delete_user(HUB, "the-operator")
    elif end == "password":
        auth.change_user(HUB, "the-operator", {"password": "a new password"})
    else:
        with models.transaction():
            models.execute("UPDATE token SET expires_at = ?", (time.time() - 1,))
    assert operator.get("auth/me").status_code == 401


def test_a_hub_admins_fields_cannot_be_set_by_the_way(scene, admin):
    """Fields that no request has are ignored or refused, never stored."""
    task = admin.post(
        "tasks",
        {
            "title": "x",
            "project_id": "shop",
            "status": "done",
            "attempt": 9,
            "created_by": "somebody",
            "open_deps": 5,
            "result": 1,
        },
    ).json
    assert (task["status"], task["attempt"], task["created_by"]) == ("pending", 1, "admin")
    assert task["result"] is None
    changed = admin.patch(
        f"tasks/{task['id']}", {"title": "y", "status": "done", "project_id": "other"}
    ).json
    assert (changed["status"], changed["project_id"]) == ("pending", task["project_id"])
    user = admin.patch("users/victim", {"roles": {}, "id": "x", "password_hash": "x"}).json
    assert user["id"] != "x"


# ── other sites ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def browser(app, scene):
    """A flask client with the cookie of the hub's admin, and the token its forms carry."""
    auth.change_user(HUB, "admin", {"password": "a good password"})
    flask = app.test_client()
    answer = flask.post("/login", data={"username": "admin", "password": "a good password"})
    assert answer.status_code == 303
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
    secret = re.match(r"orchestratia=([^;]+)", cookie)[1]
    flask.csrf = auth.csrf_token(auth.by_token(secret).token_id)
    return flask


FOREIGN = (
    "http://evil.example",
    "http://localhost:81",
    "http://sub.localhost",
    "https://localhost",
    "null",
    "file://",
    "",
)


def changing(app, scene):
    """(method, path) of everything that changes something."""
    for name, rule in sorted(api_routes(app)):
        if not name.startswith("GET"):
            things = scene.objects["shop"]
            path = rule.replace("<ref>", things.get(name.split()[1].split("/")[0], ""))
            path = path.replace("<other>", things["other"]).replace("<key>", "k")
            yield name.split()[0], path


def test_a_cookie_alone_changes_nothing(app, scene, browser):
    before = dump()
    for method, path in changing(app, scene):
        for headers in ({}, {"X-CSRF-Token": "wrong"}, {"Origin": "http://localhost"}):
            answer = browser.open(path, method=method, json={}, headers=headers)
            assert (answer.status_code, answer.json["code"]) == (403, "csrf"), path
        form = browser.open(path, method=method, data="{}", content_type="text/plain")
        assert form.status_code == 403
    assert dump() == before


@pytest.mark.parametrize("origin", FOREIGN)
def test_another_site_changes_nothing_whatever_it_knows(app, scene, browser, origin):
    before = dump()
    for method, path in changing(app, scene):
        answer = browser.open(
            path, method=method, json={}, headers={"Origin": origin, "X-CSRF-Token": browser.csrf}
        )
        assert (answer.status_code, answer.json["code"]) == (403, "origin"), path
    token = scene.callers["hub"].headers
    answer = browser.post("/api/v1/tasks", json={"title": "x"}, headers=token | {"Origin": origin})
    assert answer.status_code == 403
    stream = browser.get("/api/v1/events/stream", headers={"Origin": origin})
    assert stream.status_code == 403
    assert dump() == before


def test_the_hubs_own_pages_may(scene, browser):
    answer = browser.post(
        "/api/v1/tasks",
        json={"title": "x", "project_id": "shop"},
        headers={"Origin": "http://localhost", "X-CSRF-Token": browser.csrf},
    )
    assert answer.status_code == 201


def test_a_spoofed_header_makes_nobody_somebody(app, scene, client):
    for headers in (
        {"X-Forwarded-For": "127.0.0.1"},
        {"Remote-User": "admin"},
        {"X-Forwarded-User": "admin"},
        {"Tailscale-User-Login": "admin"},
    ):
        assert client.get("tasks", headers=headers).status_code == 401


def test_a_link_keeps_the_hubs_own_address_whatever_the_host_header_says(scene, admin):
    answer = admin.post(
        "servers/tokens",
        {"project_id": "shop"},
        headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"},
    )
    where = answer.json["token"].removeprefix("orcreg_").partition(".")[0]
    from base64 import urlsafe_b64decode

    assert urlsafe_b64decode(where + "=" * (-len(where) % 4)) == b"http://localhost"


# ── secrets ───────────────────────────────────────────────────────────────────────────────────


def test_tokens_keys_and_passwords_stand_nowhere_on_disk_but_hashed(app, scene, tmp_path, caplog):
    client = Client(app)
    auth.change_user(HUB, "admin", {"password": "a planted password"})
    token = client.post("auth/login", {"username": "admin", "password": "a planted password"}).json[
        "token"
    ]
    admin = client.as_token(token)
    registration = admin.post("servers/tokens", {"project_id": "shop"}).json["token"]
    key = client.post("servers/register", {"name": "new", "registration_token": registration}).json[
        "api_key"
    ]
    link = auth.login_link()
    session_key = auth.session_key(scene.objects["shop"]["worker"])
    client.as_key(session_key).get("auth/me")
    client.post("auth/login", {"login_token": link})
    secrets = [
        "a planted password",
        token,
        registration,
        registration.partition(".")[2],
        key,
        link,
        session_key.partition(".")[2],
    ]
    models.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    files = [p for p in (tmp_path / "hub").rglob("*") if p.is_file()]
    assert {"hub.db", "logs.db", "secret"} <= {p.name for p in files}
    for path in files:
        data = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in data, path.name
    for secret in secrets:
        assert secret not in caplog.text


def test_the_hubs_secret_is_its_users_alone(app, tmp_path):
    assert (tmp_path / "hub" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "hub").stat().st_mode & 0o077 == 0


def test_a_session_key_of_another_hub_is_worth_nothing(app, scene, tmp_path, client):
    session_id = scene.objects["shop"]["worker"]
    mine = auth._secret
    auth.use_secret(tmp_path / "another secret")
    forged = auth.session_key(session_id)
    auth._secret = mine
    assert client.as_key(forged).get("auth/me").status_code == 401
    assert client.as_key(auth.session_key(session_id)).get("auth/me").status_code == 200


def test_the_key_of_a_session_that_is_lost_is_worth_nothing_until_it_turns_up(world, client):
    """As after a reboot. One whose server is only away goes on."""
    world.server("dev")
    world.working("A", command=["make"])
    session_id, dev = world.row("A")["session_id"], world.key("dev")
    own = client.as_key(auth.session_key(session_id))
    wire.take_report(dev, {"type": "session_started", "session_id": session_id})
    world.offline("dev")
    assert own.get("auth/me").status_code == 200
    wire.sync(dev, {"instance": "i", "sessions": []})
    refused = own.get("auth/me")
    assert refused.status_code == 401 and "does not have the session" in refused.json["detail"]
    wire.sync(dev, {"instance": "i", "sessions": [{"session_id": session_id, "alive": True}]})
    assert own.get("auth/me").status_code == 200


def test_answers_carry_the_headers_that_keep_browsers_careful(client):
    headers = client.get("health").headers
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "same-origin"


# ── open streams ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("caller", "end"),
    [
        ("operator", lambda s: s.callers["operator"].post("auth/logout")),
        ("operator", lambda s: auth.change_user(HUB, "the-operator", {"disabled": True})),
        ("operator", lambda s: auth.delete_user(HUB, "the-operator")),
        ("server", lambda s: servers.revoke(HUB, s.objects["shop"]["servers"])),
        ("worker", lambda s: close(s.objects["shop"]["worker"])),
    ],
    ids=["logout", "disabled", "deleted", "revoked", "session closed"],
)
def test_an_open_stream_ends_within_a_second_when_its_reader_may_not_call_any_more(
    scene, caller, end
):
    answer = scene.callers[caller].get("events/stream", buffered=False)
    frames = iter(answer.response)
    assert next(frames).startswith(b": hello")
    ended = threading.Event()

    def read():
        for _ in frames:
            pass
        ended.set()

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    end(scene)
    assert ended.wait(1)
    reading.join(1)
    answer.close()


def close(session_id: str) -> None:
    with models.transaction() as tx:
        sessions.move(tx, sessions.get_session(HUB, session_id), "close", "hub")


# ── hostile words ─────────────────────────────────────────────────────────────────────────────

HOSTILE = [
    "; touch /tmp/canary",
    "$(reboot) `id`",
    "a\nb\r\nc",
    "-t --force",
    "C-c Enter",
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J",
    "<script>alert(1)</script>",
    "{{ 7*7 }} ${7*7} %s %n",
    "' OR 1=1; DROP TABLE task; --",
    "\u202etxet \u2066bidi\u2069",
    "NUL\x00here",
    "😀" * 100,
]


@pytest.mark.parametrize("words", HOSTILE, ids=lambda w: ascii(w)[:30])
def test_hostile_words_stay_data(scene, admin, words):
    made = admin.post(
        "tasks",
        {
            "title": f"x{words}x",
            "spec": f"x{words}x",
            "project_id": "shop",
            "target_branch": words,
            "acceptance_criteria": [words],
            "structured_spec": {"requirements": [{"description": f"x{words}x"}]},
        },
    )
    assert made.status_code == 201, made.json
    task = admin.get(f"tasks/{made.json['id']}").json
    assert task["title"] == task["spec"] == f"x{words}x"
    assert task["target_branch"] == words
    found = admin.get("tasks", query_string={"q": words, "project_id": "shop"}).json["tasks"]
    assert [t["id"] for t in found] == [task["id"]]
    assert admin.get(f"tasks/{words}").status_code in (404, 405)
