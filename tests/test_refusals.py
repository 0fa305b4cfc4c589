"""Everything the hub refuses: status, code, a sentence that says why, and nothing half done."""

import time

import pytest

import auth
import models
import sessions
from auth import HUB

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def shop(app, world):
    """A project with a server, and a task of each sort."""
    world.server("dev", repos=["core"])
    for name in ("A", "B"):
        world.task(name)
    world.task("C", after=["B"])
    world.working("running", server="dev")
    schema = {"type": "object", "required": ["endpoints"]}
    world.working(
        "owing", server="dev", structured_spec={"expected_contracts": {"api": {"schema": schema}}}
    )
    world.working("done")
    world.complete("done")
    world.task("taker", inputs={"api": "A"})
    world.task("foreign", project="other")
    world.server("far", project="other")
    session, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})
    for name in ("twin", "twin"):
        sessions.open_session(HUB, {"server_id": "dev", "name": name})
    world.ids["desk"] = session["id"]
    world.user("olga", shop="operator")
    world.user("vera", shop="viewer")
    return world


def dump() -> dict:
    """Every table, without what a refusal may leave: the mark that somebody was late."""
    tables = [
        r["name"]
        for r in models.rows("SELECT name FROM sqlite_master WHERE type = 'table'")
        if r["name"] not in ("sqlite_sequence", "token")
    ]
    found = {table: models.rows(f"SELECT * FROM {table}") for table in tables}
    found["event"] = [e for e in found["event"] if e["type"] != "late_report"]
    return found


def tid(name: str):
    """Stands for a task's or session's id until it is known."""
    return "{" + name + "}"


def filled(value, ids: dict):
    if isinstance(value, str):
        for name, found in ids.items():
            value = value.replace("{" + name + "}", found)
        return value
    if isinstance(value, list):
        return [filled(v, ids) for v in value]
    if isinstance(value, dict):
        return {k: filled(v, ids) for k, v in value.items()}
    return value


def dependency(upstream: str, kind="blocks", key=None) -> dict:
    return {"depends_on_task_id": upstream, "dependency_type": kind, "contract_key": key}


def pipeline(*tasks, **more) -> dict:
    return {"name": "p", "project_id": "shop", "tasks": list(tasks)} | more


def item(name: str, **more) -> dict:
    return {"id": name, "title": name} | more


DEPS = "tasks/{A}/dependencies"
NEW = {"project_id": "shop", "title": "new"}

# (method, path, body, status, code, fragment of the sentence)
REFUSED = [
    # dependencies
    ("POST", DEPS, dependency("{A}"), 409, "cycle", "cannot depend on itself"),
    ("POST", "tasks/{B}/dependencies", dependency("{C}"), 409, "cycle", "B → C → B"),
    ("POST", DEPS, dependency(UNKNOWN), 404, "not_found", "no task"),
    ("POST", DEPS, dependency("{foreign}"), 404, "not_found", "in this project"),
    ("POST", DEPS, dependency("{B}", "input"), 422, "refused", "contract_key"),
    ("POST", DEPS, dependency("{B}", "input", "not a key"), 422, "refused", "no contract key"),
    ("POST", DEPS, dependency("{B}", "blocks", "api"), 422, "refused", "belongs to an input"),
    ("POST", DEPS, dependency("{B}", "after"), 422, "refused", "Unknown dependency type"),
    ("POST", "tasks/{C}/dependencies", dependency("{B}"), 409, "duplicate", "there already"),
    (
        "POST",
        "tasks/{taker}/dependencies",
        dependency("{B}", "input", "api"),
        409,
        "duplicate",
        "already takes an input 'api'",
    ),
    ("POST", DEPS, {}, 422, "invalid", "depends_on_task_id"),
    ("POST", "tasks/{running}/dependencies", dependency("{A}"), 409, "conflict", "running"),
    ("DELETE", "tasks/{A}/dependencies/{B}", None, 404, "not_found", "does not depend on 'B'"),
    ("DELETE", f"tasks/{{A}}/dependencies/{UNKNOWN}", None, 404, "not_found", "no task"),
    # moves
    ("POST", "tasks/{A}/start", {}, 409, "illegal_move", "pending: assign it first"),
    ("POST", "tasks/{C}/start", {}, 409, "blocked", "waits for B (pending)"),
    ("POST", "tasks/{A}/complete", {}, 409, "illegal_move", "complete a task that is pending"),
    ("POST", "tasks/{A}/fail", {}, 409, "illegal_move", "fail a task that is pending"),
    ("POST", "tasks/{A}/retry", {}, 409, "illegal_move", "retry a task that is pending"),
    ("POST", "tasks/{running}/assign", {}, 409, "illegal_move", "assign a task that is running"),
    ("POST", "tasks/{done}/fail", {"error": "x"}, 409, "late", "ended already (done)"),
    ("POST", "tasks/{done}/complete", {"result": 1}, 409, "late", "nothing was changed"),
    ("DELETE", "tasks/{done}", None, 409, "illegal_move", "cancel a task that is done"),
    ("POST", "tasks/{done}/retry", {}, 409, "illegal_move", "create a new task"),
    ("PATCH", "tasks/{done}", {"title": "x"}, 409, "illegal_move", "The task is done"),
    ("POST", "tasks/{running}/complete", {"attempt": 2}, 409, "conflict", "there was no 2 yet"),
    # contracts
    ("POST", "tasks/{owing}/complete", {}, 422, "bad_contract", "api: missing"),
    (
        "POST",
        "tasks/{owing}/complete",
        {"result": {"contracts": {"api": {"paths": []}}}},
        422,
        "bad_contract",
        "'endpoints' is a required property",
    ),
    ("PUT", "tasks/{owing}/contracts/api", {"data": 3}, 422, "bad_contract", "breaks its schema"),
    ("PUT", "tasks/{owing}/contracts/a b", {"data": 3}, 422, "invalid", "no contract key"),
    ("PUT", "tasks/{owing}/contracts/api", {}, 422, "invalid", "data"),
    ("GET", "tasks/{A}/contracts/nothing", None, 404, "not_found", "no contract 'nothing'"),
    # tasks
    ("POST", "tasks", NEW | {"title": "  "}, 422, "invalid", "title that is not empty"),
    ("POST", "tasks", NEW | {"spec": " "}, 422, "invalid", "spec is empty"),
    ("POST", "tasks", {"project_id": "shop"}, 422, "invalid", "title"),
    ("POST", "tasks", NEW | {"priority": "urgent"}, 422, "invalid", "priority"),
    ("POST", "tasks", NEW | {"type": "thing"}, 422, "invalid", "type"),
    ("POST", "tasks", NEW | {"max_attempts": 0}, 422, "invalid", "max_attempts"),
    ("POST", "tasks", NEW | {"timeout": -1}, 422, "invalid", "timeout"),
    ("POST", "tasks", NEW | {"command": "rm -rf /"}, 422, "invalid", "command"),
    ("POST", "tasks", NEW | {"command": ["a\0b"]}, 422, "invalid", "command"),
    (
        "POST",
        "tasks",
        NEW | {"command": ["ls"], "profile": "claude"},
        422,
        "invalid",
        "A command is for the profile `command`",
    ),
    ("POST", "tasks", NEW | {"requirements": {"repos": "x"}}, 422, "invalid", "repos"),
    (
        "POST",
        "tasks",
        NEW | {"target_repo": "a", "requirements": {"repo": "b"}},
        422,
        "invalid",
        "give it once",
    ),
    (
        "POST",
        "tasks",
        NEW | {"structured_spec": {"expected_contracts": {"k": {"schema": {"type": "x"}}}}},
        422,
        "refused",
        "not a valid JSON Schema",
    ),
    ("POST", "tasks", NEW | {"dependency_ids": [UNKNOWN]}, 404, "not_found", "no task"),
    ("POST", "tasks", NEW | {"dependency_ids": ["{foreign}"]}, 404, "not_found", "this project"),
    ("POST", "tasks", NEW | {"dependency_ids": ["{A}", "{A}"]}, 409, "duplicate", "there already"),
    ("POST", "tasks", {"title": "new"}, 422, "invalid", "say which one with project_id"),
    ("POST", "tasks", NEW | {"project_id": "nowhere"}, 404, "not_found", "No project 'nowhere'"),
    ("PATCH", "tasks/{A}", {}, 422, "invalid", "name at least one field"),
    ("PATCH", "tasks/{A}", {"title": ""}, 422, "invalid", "title cannot be empty"),
    ("GET", f"tasks/{UNKNOWN}", None, 404, "not_found", "no task"),
    ("GET", "tasks/abc", None, 404, "not_found", "no task 'abc'"),
    ("GET", "tasks?status=open", None, 422, "invalid", "Unknown status 'open'"),
    ("GET", "tasks?limit=0", None, 422, "invalid", "limit"),
    ("GET", "tasks?cursor=x", None, 422, "invalid", "cursor"),
    ("GET", "sessions?status=open", None, 422, "invalid", "Unknown status 'open'"),
    # assignment
    ("POST", "tasks/{A}/assign", {"server": "far"}, 404, "not_found", "in this task's project"),
    ("POST", "tasks/{A}/assign", {"server": "nobody"}, 404, "not_found", "called 'nobody'"),
    ("POST", "tasks/{A}/assign", {"session_name": "twin"}, 409, "ambiguous", "called 'twin'"),
    ("POST", "tasks/{A}/assign", {"session": "twin"}, 409, "ambiguous", "fits 2 sessions"),
    # sessions
    ("POST", "sessions", {"server_id": "nobody"}, 404, "not_found", "no server 'nobody'"),
    ("POST", "sessions", {"server_id": "dev", "task_id": "{A}"}, 409, "conflict", "assign it to"),
    ("POST", "sessions", {"server_id": "dev", "cols": 1}, 422, "invalid", "cols"),
    ("POST", "sessions/{desk}/input", {"text": "ls"}, 409, "offline", "nothing was typed"),
    ("POST", "sessions/{desk}/input", {}, 422, "invalid", "either `text` or `data`"),
    ("POST", "sessions/{desk}/input", {"text": "a", "data": "YQ=="}, 422, "invalid", "either"),
    ("POST", "sessions/nobody/close", {}, 404, "not_found", "no session 'nobody'"),
    # pipelines
    ("POST", "pipelines", pipeline(), 422, "invalid", "no tasks"),
    ("POST", "pipelines", pipeline(item("a"), item("a")), 422, "invalid", "called 'a': rename"),
    (
        "POST",
        "pipelines",
        pipeline(item("a"), item("b", depends_on=["z"])),
        422,
        "invalid",
        "depends on 'z', which is not in this pipeline",
    ),
    (
        "POST",
        "pipelines",
        pipeline(item("a", depends_on=["b"]), item("b", depends_on=["a"])),
        409,
        "cycle",
        "waits for itself: a → b → a",
    ),
    ("POST", "pipelines", pipeline(item("a", depends_on=["a"])), 409, "cycle", "a → a"),
    (
        "POST",
        "pipelines",
        pipeline(item("a"), item("b", depends_on=[{"task": "a", "type": "input"}])),
        422,
        "invalid",
        "Task 'b': An input dependency needs the key",
    ),
    (
        "POST",
        "pipelines",
        pipeline(
            item("a"),
            item("b"),
            item("c", depends_on=[{"task": "a", "key": "k"}, {"task": "b", "key": "k"}]),
        ),
        422,
        "invalid",
        "Task 'c': The task already takes an input 'k'",
    ),
    (
        "POST",
        "pipelines",
        pipeline(item("a"), item("b", depends_on=["a", "a"])),
        422,
        "invalid",
        "Task 'b': This dependency is there already",
    ),
    ("POST", "pipelines", pipeline(item("a"), item("b", title=" ")), 422, "invalid", "Task 'b'"),
    ("POST", "pipelines", pipeline(item("a", prioritty="low")), 422, "invalid", "prioritty"),
    ("POST", "pipelines", pipeline(item("a"), owner="me"), 422, "invalid", "owner"),
    (
        "POST",
        "pipelines",
        pipeline(item("a", depends_on=[{"task": "b", "kind": "input"}])),
        422,
        "invalid",
        "kind",
    ),
    (
        "POST",
        "pipelines",
        pipeline(item("a", repo="x", target_repo="y")),
        422,
        "invalid",
        "repo and target_repo differ",
    ),
    (
        "POST",
        "pipelines",
        pipeline(item("a"), item("b", assign="nobody")),
        422,
        "invalid",
        "Task 'b': There is no live session or server called 'nobody'",
    ),
    ("GET", "pipelines/nothing", None, 404, "not_found", "no pipeline 'nothing'"),
    # questions, plans, notes
    ("POST", "tasks/{A}/help", {"question": "?"}, 409, "illegal_move", "ask a question on"),
    ("POST", "tasks/{done}/help", {"question": "?"}, 409, "late", "ended already (done)"),
    ("POST", "tasks/{running}/help", {"question": " "}, 422, "invalid", "question cannot be empty"),
    ("POST", "tasks/{running}/help", {}, 422, "invalid", "question"),
    (
        "POST",
        "tasks/{running}/help",
        {"question": "?", "target_session_id": UNKNOWN},
        404,
        "not_found",
        "no session",
    ),
    ("POST", "tasks/{running}/help", {"question": "?", "attempt": 2}, 409, "conflict", "no 2 yet"),
    ("POST", "tasks/{running}/plan", {"plan": 1}, 409, "illegal_move", "submit a plan for"),
    ("POST", "tasks/{running}/plan", {}, 422, "invalid", "plan"),
    ("POST", "tasks/{running}/plan/approve", {}, 409, "illegal_move", "approve the plan of"),
    ("POST", "tasks/{running}/plan/approve", {"version": 0}, 422, "invalid", "version"),
    ("POST", "tasks/{running}/plan/revise", {"feedback": ""}, 422, "invalid", "feedback"),
    ("POST", "tasks/{running}/notes", {"content": ""}, 422, "invalid", "note cannot be empty"),
    ("POST", "tasks/{running}/notes", {"content": "x" * 50_001}, 422, "invalid", "content"),
    ("POST", f"interventions/{UNKNOWN}/respond", {"response": "x"}, 404, "not_found", "no inter"),
    ("GET", "interventions?status=open", None, 422, "invalid", "Unknown status 'open'"),
    ("GET", f"interventions?task_id={UNKNOWN}", None, 404, "not_found", "no task"),
    ("GET", "tasks/check?session_id=nobody", None, 404, "not_found", "no session"),
    # servers, users, projects
    ("PATCH", "servers/dev", {"slots": 0}, 422, "invalid", "slots"),
    ("PATCH", "servers/dev", {"declared": {"langs": []}}, 422, "invalid", "langs"),
    ("GET", "servers/nobody", None, 404, "not_found", "no server 'nobody'"),
    ("POST", "projects", {"name": "SHOP"}, 409, "conflict", "'SHOP' already"),
    ("POST", "projects", {"name": ""}, 422, "invalid", "name"),
    ("PATCH", "projects/shop", {"name": "other"}, 409, "conflict", "'other' already"),
    ("POST", "users", {"username": "OLGA"}, 409, "conflict", "'OLGA' already"),
    ("POST", "users", {"username": "x", "password": "short"}, 422, "invalid", "too short"),
    ("POST", "users", {"username": "x", "roles": {"shop": "boss"}}, 422, "invalid", "'boss'"),
    ("POST", "users", {"username": "x", "roles": {"no": "admin"}}, 404, "not_found", "'no'"),
    ("PATCH", "users/admin", {"disabled": True}, 409, "conflict", "your own access"),
    ("PATCH", "users/admin", {"is_admin": False}, 409, "conflict", "your own access"),
    ("DELETE", "users/admin", None, 409, "conflict", "delete yourself"),
    ("GET", "users/nobody", None, 404, "not_found", "no user 'nobody'"),
    ("POST", "servers/tokens", {"project_id": "shop", "ttl_s": 0}, 422, "invalid", "ttl_s"),
    # the rest of the address space
    ("GET", "nothing/here", None, 404, "not_found", "nothing at /api/v1/nothing/here"),
    ("PUT", "health", {}, 405, "method_not_allowed", "PUT is not possible"),
    ("POST", "servers/heartbeat", {}, 403, "forbidden", "for servers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "fragment"),
    REFUSED,
    ids=[f"{m} {p} {c} {f}"[:90] for m, p, _, _, c, f in REFUSED],
)
def test_it_is_refused_with_the_reason_and_nothing_half_done(
    shop, admin, method, path, body, status, code, fragment
):
    before = dump()
    body = {} if body is None else {"json": filled(body, shop.ids)}
    answer = admin.open(method, filled(path, shop.ids), **body)
    assert answer.status_code == status, answer.json
    assert set(answer.json) == {"detail", "code", "fields"}
    assert answer.json["code"] == code
    assert fragment in answer.json["detail"]
    assert answer.json["detail"].rstrip(")").endswith((".", "?"))
    assert isinstance(answer.json["fields"], dict)
    assert dump() == before


# ── bodies that are no JSON, or not this JSON ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"not json",
        b"[]",
        b'"text"',
        b"3",
        b"null",
        b'{"title": NaN}',
        b'{"title": "x", "retry_delay_s": Infinity}',
        b'{"title": "x", "timeout": -Infinity}',
        b'{"title": "x", "structured_spec": {"a": NaN}}',
        b'{"title": "x", "timeout": 1e999}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"title": "x", "structured_spec": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"title": {"a": 1}}',
        b'{"title": 3}',
        b'{"title": "x", "retry_delay_s": 1e300}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_a_body_that_cannot_be_used_is_the_clients_fault(shop, admin, body):
    before = dump()
    answer = admin.post("tasks?x=1", data=body, content_type="application/json")
    assert 400 <= answer.status_code < 500, answer.data
    assert set(answer.json) == {"detail", "code", "fields"}
    assert dump() == before


@pytest.mark.parametrize("body", [b'"\\ud800"', b"[" * 600 + b"]" * 600, b'{"a": "\\u0000"}'])
def test_a_strange_result_never_breaks_what_is_shown_afterwards(shop, admin, body):
    """Refused or taken, but the task and the list of tasks stay readable."""
    path = f"tasks/{shop.ids['running']}"
    answer = admin.post(
        f"{path}/complete", data=b'{"result": ' + body + b"}", content_type="application/json"
    )
    assert answer.status_code < 500, answer.data
    for shown in (path, "tasks", f"{path}/events", "events"):
        assert admin.get(shown).status_code == 200, shown


@pytest.mark.parametrize(
    "path",
    [
        "tasks?cursor={n}",
        "tasks?limit={n}",
        "events?after={n}",
        "sessions/desk/output?offset={n}",
    ],
)
def test_numbers_beyond_what_is_stored_are_refused(shop, admin, path):
    answer = admin.get(path.format(n=10**30))
    assert answer.status_code == 422, answer.data


def test_an_attempt_beyond_what_is_stored_is_refused(shop, admin):
    answer = admin.post(f"tasks/{shop.ids['running']}/complete", {"attempt": 10**30})
    assert 400 <= answer.status_code < 500, answer.data


def test_a_body_that_is_too_large_is_refused(app, shop, admin, monkeypatch):
    monkeypatch.setitem(app.config, "MAX_CONTENT_LENGTH", 1000)
    answer = admin.post("tasks", NEW | {"spec": "x" * 2000})
    assert (answer.status_code, answer.json["code"]) == (413, "too_large")


# ── registration ──────────────────────────────────────────────────────────────────────────────


def register(client, token, name="new"):
    return client.post("servers/register", {"registration_token": token, "name": name})


@pytest.mark.parametrize(
    ("spoil", "code", "fragment"),
    [
        (lambda t: "", "token_malformed", "must begin with orcreg_"),
        (lambda t: "hello", "token_malformed", "must begin with orcreg_"),
        (lambda t: t.replace("orcreg_", "orc_"), "token_malformed", "must begin with orcreg_"),
        (lambda t: t.partition(".")[0], "token_malformed", "not a registration token"),
        (lambda t: t[:-1] + ("A" if t[-1] != "A" else "B"), "token_unknown", "make a new one"),
        (lambda t: t + "x", "token_unknown", "unknown to this hub"),
    ],
)
def test_a_wrong_registration_token_is_refused_in_one_sentence(
    shop, client, admin, spoil, code, fragment
):
    token = admin.post("servers/tokens", {"project_id": "shop"}).json["token"]
    before = dump()
    answer = register(client, spoil(token))
    assert (answer.status_code, answer.json["code"]) == (401, code)
    assert fragment in answer.json["detail"]
    assert dump() == before


def test_a_used_registration_token_is_refused(shop, client, admin):
    token = admin.post("servers/tokens", {"project_id": "shop"}).json["token"]
    assert register(client, token).status_code == 200
    answer = register(client, token, "another")
    assert (answer.status_code, answer.json["code"]) == (401, "token_used")
    assert "it works once" in answer.json["detail"]


def test_an_expired_registration_token_is_refused(shop, client, admin):
    token = admin.post("servers/tokens", {"project_id": "shop", "ttl_s": 60}).json["token"]
    with models.transaction():
        models.execute("UPDATE registration SET expires_at = ?", (time.time() - 1,))
    answer = register(client, token)
    assert (answer.status_code, answer.json["code"]) == (401, "token_expired")
    assert "expired at 20" in answer.json["detail"]


def test_a_token_whose_registration_is_refused_can_be_used_again(shop, client, admin):
    token = admin.post("servers/tokens", {"project_id": "shop"}).json["token"]
    answer = register(client, token, "dev")
    assert (answer.status_code, answer.json["code"]) == (409, "name_taken")
    assert register(client, token, "dev-2").status_code == 200


def test_a_registration_renews_only_where_project_machine_and_name_match(shop, client, admin):
    def again(project, name, machine):
        token = admin.post("servers/tokens", {"project_id": project}).json["token"]
        body = {"registration_token": token, "name": name, "machine_id": machine}
        return client.post("servers/register", body)

    first = again("shop", "box", "m1").json
    renewed = again("shop", "box", "m1").json
    assert (renewed["id"], renewed["renewed"]) == (first["id"], True)
    assert renewed["api_key"] != first["api_key"]
    assert client.as_key(first["api_key"]).get("auth/me").status_code == 401
    assert client.as_key(renewed["api_key"]).get("auth/me").status_code == 200
    assert again("shop", "box-2", "m1").json["renewed"] is False
    assert again("other", "box", "m1").json["id"] != first["id"]
    assert again("shop", "box", "m2").status_code == 409
    assert again("shop", "box", "").status_code == 409


# ── ambiguous ─────────────────────────────────────────────────────────────────────────────────


def test_an_ambiguous_prefix_is_refused_with_the_candidates(shop, admin):
    with models.transaction():
        models.execute("PRAGMA defer_foreign_keys = 1")
        for n, name in enumerate(("A", "B")):
            new = f"abcd1234-0000-4000-8000-00000000000{n}"
            models.execute("UPDATE task SET id = ? WHERE id = ?", (new, shop.ids[name]))
            models.execute(
                "UPDATE dependency SET upstream_id = ? WHERE upstream_id = ?",
                (new, shop.ids[name]),
            )
    answer = admin.get("tasks/abcd")
    assert (answer.status_code, answer.json["code"]) == (409, "ambiguous")
    named = {c["name"] for c in answer.json["fields"]["candidates"]}
    assert named == {"A", "B"}
    assert admin.get("tasks/abc").status_code == 404  # shorter than a prefix may be


# ── who are you ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic YWRtaW46YWRtaW4="},
        {"X-API-Key": "orc_nonsense"},
        {"X-API-Key": "orcs_nonsense"},
        {"X-API-Key": f"orcs_{UNKNOWN}.AAAA"},
        {"X-API-Key": "é"},
    ],
)
def test_a_credential_that_is_none_is_401_in_one_shape(shop, client, headers):
    answer = client.get("tasks", headers=headers)
    assert (answer.status_code, answer.json["code"]) == (401, "unauthorised")
    assert set(answer.json) == {"detail", "code", "fields"}


def test_wrong_passwords_answer_alike_and_then_make_one_wait(shop, client, monkeypatch):
    auth.change_user(HUB, "olga", {"password": "a good password"})

    def sign_in(name, password):
        return client.post("auth/login", {"username": name, "password": password})

    wrong, nobody = sign_in("olga", "guess"), sign_in("nobody", "guess")
    assert (wrong.status_code, wrong.json) == (nobody.status_code, nobody.json)
    assert (wrong.status_code, wrong.json["code"]) == (401, "wrong_password")
    for _ in range(4):
        assert sign_in("OLGA", "guess").status_code == 401
    waiting = sign_in("olga", "a good password")
    assert (waiting.status_code, waiting.json["code"]) == (429, "too_many")
    assert 0 < int(waiting.headers["Retry-After"]) <= 60
    assert client.login.__self__ is client
    monkeypatch.setattr(auth, "TRIES_WINDOW_S", 0.0)
    assert sign_in("olga", "a good password").status_code == 200
