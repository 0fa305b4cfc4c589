"""`/api/v1`: names, shapes, prefixes, pages, streams."""

import json
import threading

import pytest
from openapi_spec_validator import validate

import auth
import models
import sessions
from auth import HUB
from conftest import Client

# fmt: off
TASK_FIELDS = {
    "id", "title", "status", "priority", "type", "spec", "structured_spec", "acceptance_criteria",
    "target_repo", "target_branch", "assigned_server_id", "assigned_server_name", "session_id",
    "source_session_name", "target_session_name", "dependencies", "resolved_inputs", "contracts",
    "attempt", "blocked", "reason", "requirements", "pipeline_id", "project_id", "profile",
    "command", "auto_assign", "on_lost", "max_attempts", "retry_delay_s", "queue_timeout",
    "start_timeout", "progress_timeout", "timeout", "require_plan", "plan", "plan_feedback",
    "result", "git_diff_stats", "created_by", "created_at", "assigned_at", "started_at",
    "completed_at", "updated_at", "recent_notes",
}
SERVER_FIELDS = {
    "id", "name", "project_id", "hostname", "os", "status", "last_heartbeat", "repos",
    "languages", "frameworks", "capabilities", "profiles", "slots", "busy", "manual",
    "agent_version", "system_info", "created_at", "sessions",
}
SESSION_FIELDS = {
    "id", "name", "server_id", "server_name", "project_id", "task_id", "task_title", "attempt",
    "role", "profile", "status", "activity", "reason", "working_directory", "tmux_name", "pid",
    "exit_code", "cols", "rows", "created_at", "started_at", "closed_at", "log_start", "log_end",
    "error",
}
EVENT_FIELDS = {
    "id", "prev", "type", "project_id", "task_id", "session_id", "server_id", "actor", "details",
    "at",
}
# fmt: on


@pytest.fixture
def shop(app, world):
    world.server("dev", repos=["core"])
    return world


# ── the first hour of a user, through the API alone ───────────────────────────────────────────


def test_workflow_1_and_2_through_the_api(client, admin):
    project = admin.post("projects", {"name": "Shop"}).json
    token = admin.post("servers/tokens", {"note": "for dev-01"}).json
    assert token["token"].startswith("orcreg_")
    assert token["token"] in token["commands"]["register"]
    assert (token["project_id"], token["project_name"]) == (project["id"], "Shop")
    made = client.post(
        "servers/register",
        {
            "registration_token": token["token"],
            "name": "dev-01",
            "hostname": "dev-01.example",
            "ip": "10.0.0.9",
            "os": "Linux",
            "repos": {"core": "/srv/core", "web": {"path": "/srv/web", "branch": "main"}},
            "system_info": {"cpu_count": 6, "memory_mb": 100},
            "machine_id": "m",
            "mac_address": "aa:bb",
        },
    ).json
    assert made["api_key"].startswith("orc_")
    assert (made["project_name"], made["heartbeat_s"], made["renewed"]) == ("Shop", 30.0, False)
    server = client.as_server(made["api_key"])
    beat = server.post("servers/heartbeat", {"system_info": {"load": 0.1}}).json
    assert (beat["ok"], beat["heartbeat_s"]) == (True, 30.0)
    [shown] = admin.get("servers").json["servers"]
    assert shown.keys() >= SERVER_FIELDS
    assert (shown["status"], shown["slots"], shown["busy"]) == ("online", 8, 0)
    assert shown["repos"] == {
        "core": {"path": "/srv/core", "branch": None},
        "web": {"path": "/srv/web", "branch": "main"},
    }
    assert shown["languages"] is None

    task = admin.post("tasks", {"title": "Fix it", "spec": "…", "priority": "high"}).json
    assert task.keys() >= TASK_FIELDS
    assert (task["status"], task["priority"], task["type"]) == ("pending", "high", "feature")
    assert (task["profile"], task["attempt"], task["blocked"]) == ("command", 1, False)
    given = admin.post(f"tasks/{task['id']}/assign", {"session_name": "dev-01"}).json
    assert (given["status"], given["assigned_server_name"]) == ("assigned", "dev-01")
    [polled] = server.get("servers/tasks/poll").json["tasks"]
    assert polled["id"] == task["id"]
    session = admin.post(
        "sessions", {"server_id": "dev-01", "task_id": task["id"], "working_dir": "/srv/core"}
    )
    assert session.status_code == 201
    assert session.json.keys() >= SESSION_FIELDS
    assert session.json["working_directory"] == "/srv/core"
    again = admin.post("sessions", {"server_id": "dev-01", "task_id": task["id"]})
    assert (again.status_code, again.json["id"]) == (200, session.json["id"])
    result = {"summary": "done", "tests": {"passed": 3}}
    done = server.post(f"server/tasks/{task['id']}/complete", {"result": result}).json
    assert (done["status"], done["result"]) == ("done", result)
    same = server.post(f"tasks/{task['id']}/complete", {"result": result})
    assert (same.status_code, same.json) == (200, done)


def test_who_am_i_says_it_for_each_credential(shop, client, admin):
    me = admin.get("auth/me").json
    assert (me["kind"], me["name"], me["is_admin"]) == ("user", "admin", True)
    assert [p["name"] for p in me["projects"]] == ["shop"]
    server = client.as_server(shop.keys["dev"]).get("auth/me").json
    assert (server["kind"], server["name"], server["role"]) == ("server", "dev", "server")
    assert server["project_id"] == shop.project("shop")["id"]
    session, _ = sessions.open_session(HUB, {"server_id": "dev", "role": "orchestrator"})
    key = auth.session_key(session["id"])
    found = client.as_key(key).get("auth/me").json
    assert (found["kind"], found["role"]) == ("session", "orchestrator")
    assert found["session_id"] == session["id"]
    bearer = Client(client.app, {"Authorization": f"Bearer {key}"}).get("auth/me").json
    assert bearer == found


# ── what may be left out and how things are named ─────────────────────────────────────────────


def test_the_project_may_be_left_out_while_one_is_visible(shop, admin, client):
    assert admin.post("tasks", {"title": "a"}).status_code == 201
    shop.project("other")
    refused = admin.post("tasks", {"title": "b"})
    assert refused.status_code == 422
    assert [c["name"] for c in refused.json["fields"]["candidates"]] == ["other", "shop"]
    for name in ("shop", "SHOP", shop.project("shop")["id"], shop.project("shop")["id"][:8]):
        assert admin.post("tasks", {"title": "c", "project_id": name}).status_code == 201
    server = client.as_server(shop.keys["dev"])
    assert server.post("tasks", {"title": "d"}).status_code == 201


def test_ids_may_be_prefixes_in_any_case_and_with_a_hash(shop, admin):
    task = shop.task("A")["id"]
    for ref in (
        task,
        task.upper(),
        task[:4],
        task[:13],
        f"%23{task[:6]}",
        task.replace("-", ""),
    ):
        assert admin.get(f"tasks/{ref}").json["id"] == task, ref


def test_servers_and_sessions_are_found_by_name(shop, admin):
    session, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})
    assert admin.get("servers/dev").json["id"] == shop.servers["dev"]
    assert admin.get("sessions/desk").json["id"] == session["id"]
    assert admin.get("projects/shop").json["name"] == "shop"


def test_of_several_sessions_of_one_name_the_living_one_is_meant(shop, admin):
    first, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})
    with models.transaction() as tx:
        sessions.move(tx, first, "close", "hub", closed_at=tx.now)
    second, _ = sessions.open_session(HUB, {"server_id": "dev", "name": "desk"})
    assert admin.get("sessions/desk").json["id"] == second["id"]


def test_both_spellings_of_the_prefix_answer_alike(shop, admin):
    task = shop.task("A")["id"]
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    for path in (
        "tasks",
        f"tasks/{task}",
        f"tasks/{task}/events",
        f"tasks/{task}/explain",
        f"tasks/{task}/contracts",
        "sessions",
        f"sessions/{session['id']}",
        f"sessions/{session['id']}/screen",
        "servers",
        "servers/dev",
    ):
        one, other = admin.get(path), admin.get(f"server/{path}")
        assert (one.status_code, one.json) == (other.status_code, other.json) == (200, one.json)


def test_an_address_with_a_slash_behind_is_no_redirect(shop, admin):
    assert admin.get("tasks/").status_code == 200


def test_a_post_without_a_body_is_an_empty_object(shop, admin):
    task = shop.task("A")["id"]
    answer = admin.post(f"tasks/{task}/assign", data=b"", content_type="application/json")
    assert (answer.status_code, answer.json["status"]) == (200, "assigned")
    answer = admin.open("POST", f"tasks/{task}/start")
    assert (answer.status_code, answer.json["status"]) == (200, "running")


def test_unknown_fields_of_old_clients_are_ignored(shop, admin):
    answer = admin.post("tasks", {"title": "A", "colour": "red"})
    assert answer.status_code == 201
    assert "colour" not in answer.json


@pytest.mark.parametrize("result", [None, True, 0, 1.5, "text", [1, [2]], {}, {"ä": "ö\u2028"}])
def test_a_result_may_be_any_json(shop, admin, result):
    shop.working("A")
    path = f"tasks/{shop.ids['A']}"
    assert admin.post(f"{path}/complete", {"result": result}).status_code == 200
    assert admin.get(path).json["result"] == result
    assert admin.post(f"{path}/complete", {"result": result}).status_code == 200


def test_a_contract_may_be_any_json(shop, admin):
    shop.working("A")
    values = {"none": None, "n": 0, "t": "x", "l": [], "o": {"status": "open"}, "d": {"data": 1}}
    given = {k: {"status": "fulfilled", "data": v} for k, v in values.items()}
    path = f"tasks/{shop.ids['A']}"
    assert admin.post(f"{path}/complete", {"result": {"contracts": given}}).status_code == 200
    listed = admin.get(f"{path}/contracts").json["contracts"]
    assert {c["key"]: c["data"] for c in listed} == values
    assert all(c["status"] == "fulfilled" for c in listed)
    assert admin.get(f"{path}/contracts/l").json["data"] == []


# ── lists ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["projects", "servers", "tasks", "sessions", "pipelines", "users"])
def test_lists_are_wrapped_under_their_plural(shop, admin, name):
    answer = admin.get(name).json
    assert isinstance(answer[name], list)


def test_pages_of_tasks_follow_each_other_without_gap_or_repetition(shop, admin):
    names = [shop.task(f"t{n}")["title"] for n in range(25)]
    seen, cursor = [], None
    while True:
        query = "tasks?limit=10" + (f"&cursor={cursor}" if cursor else "")
        page = admin.get(query).json
        seen += [t["title"] for t in page["tasks"]]
        shop.task(f"new {len(seen)}")  # what comes meanwhile disturbs nothing
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == names[::-1]


def test_tasks_are_filtered(shop, admin):
    shop.working("running one")
    shop.task("100% done_or not")
    shop.task("other", spec="mentions 100% too")
    shop.cancel("other")

    def titles(query):
        return [t["title"] for t in admin.get(f"tasks?{query}").json["tasks"]]

    assert titles("status=running") == ["running one"]
    assert titles("status=running,cancelled") == ["other", "running one"]
    assert titles("q=100%25") == ["other", "100% done_or not"]
    assert titles("q=e_o") == ["100% done_or not"] or titles("q=e_o") == []
    assert titles("q=e%5Fo") == titles("q=e_o")
    assert titles("server=dev") == ["running one"]
    assert titles("q=nothing") == []


def test_a_page_of_tasks_costs_the_same_number_of_queries_however_long(shop, admin):
    counted = []
    models.db.obj.connection().set_trace_callback(counted.append)

    def cost():
        counted.clear()
        assert admin.get("tasks").status_code == 200
        return len(counted)

    for n in range(3):
        shop.task(f"a{n}", auto_assign=True)
        shop.task(f"related {n}", related=[f"a{n}"])
    few = cost()
    for n in range(3, 30):
        shop.task(f"a{n}")
        shop.task(f"related {n}", related=[f"a{n}"])
    assert cost() == few > 0


def test_events_are_listed_from_an_id_on(shop, admin):
    task = shop.task("A")["id"]
    shop.working("B")
    everything = admin.get("events?limit=1000").json["events"]
    assert everything[0].keys() >= EVENT_FIELDS
    assert [e["id"] for e in everything] == sorted(e["id"] for e in everything)
    page = admin.get("events?limit=3").json
    assert page["events"] == everything[:3]
    rest = admin.get(f"events?after={page['next_cursor']}").json
    assert rest["events"] == everything[3:]
    assert rest["next_cursor"] is None
    own = admin.get(f"events?task_id={task}").json["events"]
    assert [e["type"] for e in own] == ["task_created"]


def test_the_newest_events_are_a_page_of_their_own(shop, admin):
    task = shop.task("A")["id"]
    shop.working("B")
    everything = admin.get("events?limit=1000").json["events"]
    last = admin.get("events?tail=1&limit=2").json
    assert last["events"] == everything[-2:]
    assert (last["next_cursor"], last["prev_cursor"]) == (None, everything[-2]["id"])
    older = admin.get(f"events?limit=1000&before={last['prev_cursor']}").json
    assert older["events"] == everything[:-2]
    assert older["prev_cursor"] is None
    own = admin.get(f"events?tail=1&task_id={task}").json["events"]
    assert [e["type"] for e in own] == ["task_created"]
    assert admin.get("events?before=0").json["events"] == []


def test_the_newest_events_cost_the_same_however_long_the_log_is(shop, client):
    """Of a quiet project beside a busy one, too: nothing is walked through to find them."""
    shop.task("quiet", project="other")
    shop.user("vera", other="viewer")
    vera = client.as_user("vera")

    def steps():
        count = [0]
        connection = models.db.obj.connection()
        connection.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1) or 0, 1)
        found = vera.get("events?tail=1&limit=2").json["events"]
        connection.set_progress_handler(None, 0)
        assert {e["project_id"] for e in found} == {shop.project("other")["id"]}
        return count[0]

    few = steps()
    for n in range(200):
        shop.task(f"busy {n}")
    assert steps() < few * 1.2


def test_a_viewer_sees_the_newest_events_of_their_project_alone(shop, client):
    shop.task("A")
    shop.task("far", project="other")
    shop.user("vera", shop="viewer")
    found = client.as_user("vera").get("events?tail=1").json["events"]
    assert {e["project_id"] for e in found} == {shop.project("shop")["id"]}


def test_a_viewer_sees_the_events_of_their_project_alone(shop, client):
    shop.task("A")
    shop.task("far", project="other")
    shop.user("vera", shop="viewer")
    found = client.as_user("vera").get("events?limit=1000").json["events"]
    assert {e["project_id"] for e in found} == {shop.project("shop")["id"]}


def test_pipelines_have_their_tasks_counts_and_names(shop, admin):
    made = admin.post(
        "pipelines",
        {
            "$schema": "orchestratia/pipeline/v1",
            "name": "release",
            "description": "…",
            "project": "shop",
            "tasks": [
                {"id": "T1", "title": "one", "repo": "core", "branch": "main", "assign": "dev"},
                {
                    "id": "T2",
                    "title": "two",
                    "depends_on": [{"task": "T1", "type": "input", "key": "api"}],
                },
                {"id": "T3", "title": "three", "depends_on": ["T1", {"task": "T2"}]},
            ],
        },
    )
    assert made.status_code == 201, made.json
    shown = made.json
    assert shown["total"] == 3
    assert shown["counts"] == {"assigned": 1, "pending": 2}
    assert [t["title"] for t in shown["tasks"]] == ["one", "two", "three"]
    assert shown["tasks"][0]["target_repo"] == "core"
    assert shown["tasks"][0]["target_branch"] == "main"
    assert shown["tasks"][1]["dependencies"][0]["contract_key"] == "api"
    assert admin.get("pipelines/release").json == admin.get(f"pipelines/{shown['id'][:8]}").json
    [listed] = admin.get("pipelines").json["pipelines"]
    assert listed == {k: v for k, v in shown.items() if k not in ("tasks", "id_map")}


def test_explain_says_what_stands_in_the_way(shop, admin):
    up = shop.task("A")["id"]
    shop.task("B", after=["A"], target_repo="nowhere")
    told = admin.get(f"tasks/{shop.ids['B']}/explain").json
    assert told["summary"] == "B is blocked: waits for A (pending)."
    assert [b["task_id"] for b in told["blocked_by"]] == [up]
    assert told["candidates"] == [
        {
            "server_id": shop.servers["dev"],
            "server": "dev",
            "fits": False,
            "score": None,
            "reasons": ["no repo nowhere"],
        }
    ]


def test_users_are_made_changed_and_deleted(shop, admin, client):
    made = admin.post(
        "users", {"username": "olga", "password": "a good password", "roles": {"shop": "operator"}}
    )
    assert made.status_code == 201
    assert made.json["roles"] == {shop.project("shop")["id"]: "operator"}
    assert "password" not in json.dumps(made.json)
    olga = client.login("olga", "a good password")
    assert olga.get("auth/me").json["projects"][0]["role"] == "operator"
    assert admin.patch("users/olga", {"roles": {"shop": "viewer"}}).status_code == 200
    assert olga.post("tasks", {"title": "x"}).status_code == 403
    assert admin.delete("users/olga").status_code == 200
    assert olga.get("auth/me").status_code == 401


# ── the stream ────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Reads the event stream in a thread of its own; `frames` are what came."""

    def __init__(self, client, path="events/stream", **kwargs):
        self.answer = client.get(path, buffered=False, **kwargs)
        assert self.answer.status_code == 200
        assert self.answer.mimetype == "text/event-stream"
        self.frames: list[dict] = []
        self.hello = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self.hello.wait(5)

    def _read(self):
        for piece in self.answer.response:
            text = piece.decode()
            if text.startswith(":"):
                self.hello.set()
                continue
            frame = dict(line.split(": ", 1) for line in text.strip().split("\n"))
            assert set(frame) == {"id", "event", "data"}
            event = json.loads(frame["data"])
            assert (int(frame["id"]), frame["event"]) == (event["id"], event["type"])
            self.frames.append(event)

    def types(self):
        return [e["type"] for e in self.frames]


@pytest.fixture
def stream(app):
    opened = []

    def start(*args, **kwargs) -> Stream:
        opened.append(Stream(*args, **kwargs))
        return opened[-1]

    yield start
    models.bus.close()
    for one in opened:
        one.thread.join(5)
        one.answer.close()


def test_events_arrive_as_they_are_committed(shop, admin, stream, until):
    live = stream(admin)
    shop.working("A")
    shop.complete("A")
    until(lambda: len(live.frames) == 4)
    assert live.types() == ["task_created", "task_auto_assigned", "task_started", "task_completed"]
    assert live.frames == shop.events("A")


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice(
    shop, admin, stream, until, how
):
    shop.task("before")
    last = shop.now()
    for n in range(30):
        shop.task(f"missed {n}")
    if how == "header":
        live = stream(admin, headers={"Last-Event-ID": str(last)})
    else:
        live = stream(admin, f"events/stream?after={last}")
    for n in range(30):
        shop.task(f"live {n}")
    until(lambda: len(live.frames) >= 60)
    assert [e["id"] for e in live.frames] == list(range(last + 1, last + 61))


def test_a_reader_that_is_too_slow_reads_the_rest_from_the_table(
    shop, admin, stream, until, monkeypatch
):
    import bus

    monkeypatch.setattr(bus.Bus.subscribe, "__kwdefaults__", {"limit": 5, "limit_bytes": 10**6})
    live = stream(admin)
    last = shop.now()
    with models.transaction() as tx:
        for _ in range(3000):
            tx.emit("task_updated", shop.project("shop")["id"], "x")
    until(lambda: len(live.frames) >= 3000)
    assert [e["id"] for e in live.frames] == list(range(last + 1, last + 3001))


def test_the_stream_of_a_viewer_has_their_project_alone(shop, client, stream, until):
    shop.project("other")
    shop.user("vera", shop="viewer")
    live = stream(client.as_user("vera"))
    shop.task("far", project="other")
    shop.task("near")
    until(lambda: live.frames)
    assert [e["task_id"] for e in live.frames] == [shop.ids["near"]]


@pytest.mark.parametrize("given", ["x", "-1", "²", "9" * 30, "1e3"])
def test_a_strange_last_event_id_is_no_error(shop, admin, stream, given):
    headers = {"Last-Event-ID": given.encode().decode("latin-1")}
    stream(admin, headers=headers)


def test_the_stream_beats_while_nothing_happens(app, shop, admin, monkeypatch):
    import feed

    monkeypatch.setattr(feed, "BEAT_S", 0.05)
    answer = admin.get("events/stream", buffered=False)
    pieces = iter(answer.response)
    assert [next(pieces) for _ in range(3)] == [b": hello\n\n", b": beat\n\n", b": beat\n\n"]
    answer.close()


def test_the_stream_of_a_real_hub_resumes_after_a_restart(hub, until):
    hub.api("POST", "projects", {"name": "shop"})
    hub.api("POST", "tasks", {"title": "one"})
    last = hub.api("GET", "events?limit=1000")["events"][-1]["id"]
    hub.restart()
    hub.api("POST", "tasks", {"title": "two"})
    with hub.ask(
        "GET", "events/stream", stream=True, headers={"Last-Event-ID": str(last)}
    ) as answer:
        for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
            if line.startswith("data:"):
                event = json.loads(line[5:])
                assert (event["id"], event["details"]["title"]) == (last + 1, "two")
                break


# ── the document ──────────────────────────────────────────────────────────────────────────────


def test_the_openapi_document_is_valid_and_has_every_route(app, client):
    document = client.flask.get("/openapi.json").json
    validate(document)
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    expected = set()
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/api/"):
            path = rule.rule.replace("<", "{").replace(">", "}")
            expected |= {(method, path) for method in rule.methods - {"HEAD", "OPTIONS"}}
    assert expected <= listed


def test_every_operation_says_in_a_sentence_what_it_does(client):
    document = client.flask.get("/openapi.json").json
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation.get("description") or operation.get("summary"), f"{method} {path}"
