"""What a second reader broke once: each stays mended."""

import threading
import time

import pytest

import auth
import cascade
import models
import moves
import sessions
import tasks
import wire
from auth import HUB
from conftest import due, wait_until

# ── tasks ─────────────────────────────────────────────────────────────────────────────────────


def test_an_input_added_to_a_task_that_is_done_is_handed_down(world):
    world.server("dev")
    world.working("A")
    world.complete("A", contracts={"k": {"v": 1}})
    world.task("B")
    assert world.depend("B", "A", "input", "k")["resolved"] == 1
    assert world.json("B")["resolved_inputs"] == {"k": {"v": 1}}


def session_of(world, name: str) -> auth.Caller:
    return auth.by_key(auth.session_key(world.row(name)["session_id"]))


def test_a_session_cannot_report_on_an_attempt_that_is_not_its_own(world):
    world.server("dev")
    world.working("A", command=["true"])
    first = session_of(world, "A")
    world.fail("A")
    world.retry("A")
    world.start("A")
    with pytest.raises(models.Conflict, match="works on attempt 1, not on attempt 2"):
        world.complete("A", "STOLEN", by=first, attempt=2)
    assert world.status("A") == "running"


@pytest.mark.parametrize("verb", ["fail", "complete"])
def test_a_task_ended_by_a_person_calls_its_worker_off(world, verb):
    world.server("dev")
    ada = world.user("ada", shop="operator")
    world.working("A", command=["sleep", "25"], max_attempts=2)
    getattr(world, verb)("A", by=ada)
    assert [c["type"] for c in world.commands("dev")].count("task_cancelled") == 1


def test_a_worker_that_reports_itself_is_not_called_off(world):
    world.server("dev")
    world.working("A", command=["true"])
    world.complete("A", by=session_of(world, "A"))
    assert "task_cancelled" not in [c["type"] for c in world.commands("dev")]


def test_assigning_with_a_plan_twice_is_no_error(world):
    world.task("A", auto_assign=True)
    world.assign("A", require_plan=True)
    world.assign("A", require_plan=True)
    assert world.status("A") == "pending"


def test_a_worker_that_never_starts_is_given_up_in_the_end(world):
    world.server("dev")
    world.task("A", command=["true"], start_timeout=1, auto_assign=True)
    now = time.time()
    for round_ in range(1, 40):
        due(now + round_ * 100)
    row = world.row("A")
    assert (row["status"], row["attempt"]) == ("failed", tasks.FREE_ATTEMPTS)
    world.check()


def test_who_waited_goes_before_who_is_tried_again(world):
    world.server("dev", slots=1)
    world.working("low", max_attempts=3, priority="low")
    world.task("critical", auto_assign=True, priority="critical")
    world.fail("low")
    assert (world.status("critical"), world.status("low")) == ("assigned", "pending")


def test_a_name_used_a_hundred_times_before_still_means_the_live_session(world):
    server = world.server("dev")
    with models.transaction() as tx:
        for _ in range(120):
            session = moves.new_session(
                tx, project_id=world.project("shop")["id"], server_id=server, name="backend",
                created_by="hub",
            )  # fmt: skip
    with models.transaction():
        models.execute("UPDATE session SET state = 'closed' WHERE id <> ?", (session,))
    assert sessions.get_session(HUB, "backend")["id"] == session


# ── schemas that are programs ─────────────────────────────────────────────────────────────────

DOUBLING = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}


@pytest.mark.parametrize(
    ("schema", "data", "why"),
    [
        ({"pattern": "^(a|aa)+$"}, "a" * 60 + "!", None),
        ({"patternProperties": {"^(a|aa)+$": False}}, {"a" * 60 + "!": 1}, None),
        ({"$defs": DOUBLING | {"a40": {}}, "$ref": "#/$defs/a0"}, 1, "too much work"),
        ({"$ref": "#"}, 1, "cannot be applied"),
        ({"a": 5, "$ref": "#/a"}, 1, "cannot be applied"),
    ],
)
def test_a_schema_cannot_take_the_hub_with_it(schema, data, why):
    began = time.monotonic()
    cascade.check_schema("k", schema)
    try:
        cascade.check_contract("k", data, schema)
    except cascade.BadContract as refused:
        assert why is None or why in str(refused)
    assert time.monotonic() - began < 30  # for ever, before


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"$schema": []}, "TypeError"),
        ({"allOf": [{"$schema": "http://json-schema.org/draft-07/schema#"}]}, "top only"),
        ({"patternProperties": {}, "unevaluatedProperties": False}, "cannot be combined"),
    ],
)
def test_a_schema_that_cannot_be_bounded_is_refused(schema, why):
    with pytest.raises(cascade.RuleBroken, match=why):
        cascade.check_schema("k", schema)


def test_bounded_keywords_mean_what_they_meant():
    schema = {
        "properties": {"v": {"const": 1}},
        "patternProperties": {"^x-": {"type": "string"}},
        "additionalProperties": {"type": "integer"},
    }
    cascade.check_contract("k", {"v": 1, "x-a": "s", "n": 3}, schema)
    for wrong, where in (
        ({"x-a": 1}, r"\$\['x-a'\]"),
        ({"n": "s"}, r"\$\.n"),
        ({"v": 2}, r"\$\.v"),
    ):
        with pytest.raises(cascade.BadContract, match=where):
            cascade.check_contract("k", wrong, schema)
    with pytest.raises(cascade.BadContract, match="'z' is not allowed here"):
        cascade.check_contract("k", {"z": 1}, {"additionalProperties": False})


# ── requests ──────────────────────────────────────────────────────────────────────────────────


def test_many_wrong_passwords_at_once_do_not_slip_through(client, monkeypatch):
    auth.create_user(HUB, "ada", "right horse battery")
    looked_at = []
    real = auth.check_password_hash
    monkeypatch.setattr(auth, "check_password_hash", lambda *a: looked_at.append(1) or real(*a))
    barrier = threading.Barrier(20)

    def guess():
        barrier.wait()
        try:
            auth.login("ada", "wrong", "10.0.0.1")
        except (models.Unauthorised, models.TooMany):
            return

    threads = [threading.Thread(target=guess) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looked_at) == auth.TRIES
    auth.login("ada", "right horse battery", "10.0.0.2")  # the owner, from elsewhere


def test_what_login_remembers_is_bounded(db, monkeypatch):
    monkeypatch.setattr(auth, "TRIES_KEPT", 50)
    for n in range(100):
        auth.count_try((f"name{n}", "x"), auth.TRIES, time.monotonic())
    assert len(auth._wrong) == 50
    with pytest.raises(models.Unauthorised):
        auth.login("x" * 10_000, "y")


def test_an_authorization_header_of_the_proxy_does_not_replace_the_csrf_token(client):
    token = auth.first_admin(None) or client.as_user("admin").headers["Authorization"][7:]
    client.flask.set_cookie("orchestratia", token)
    basic = {"Authorization": "Basic Zm9vOmJhcg=="}
    refused = client.post("projects", json={"name": "x"}, headers=basic)
    assert (refused.status_code, refused.json["code"]) == (403, "csrf")


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "tasks", {"headers": {"X-API-Key": "orcs_\xe9.x"}}),
        ("POST", "projects", {"data": '{"name": "x", "settings": {"a": 1e999}}'}),
        ("POST", "tasks", {"data": '{"title": "x", "structured_spec": {"a": 1e999}}'}),
        ("POST", "auth/login", {"json": {"username": "x" * 1000, "password": "y"}}),
        ("POST", "tasks", {"json": {"title": "x", "priority": "huge"}}),
    ],
)
def test_odd_requests_are_refused_in_words(admin, method, path, options):
    if "data" in options:
        options = options | {"content_type": "application/json"}
    answer = admin.open(method, path, **options)
    assert 400 <= answer.status_code < 500
    assert answer.json["detail"]


def test_a_project_named_twice_in_roles_counts_once(admin):
    project = admin.post("projects", json={"name": "shop"}).json
    made = admin.post(
        "users",
        json={"username": "ada", "roles": {project["id"]: "viewer", "shop": "operator"}},
    )
    assert made.json["roles"] == {project["id"]: "operator"}


def test_a_stream_resumed_beyond_the_newest_event_is_told_that_ids_began_anew(hub):
    with hub.ask(
        "GET", "events/stream", headers={"Last-Event-ID": "999999"}, stream=True
    ) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert "event: reset" in (next(lines) for _ in range(6))
        hub.api("POST", "projects", {"name": "later"})
        assert wait_until(lambda: next(lines) == "event: project_created")


# ── agents ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("languages", [[3.11], "rust", {"a": 1}])
def test_capabilities_that_are_no_words_do_not_reach_routing(world, languages):
    world.server("dev", languages=["rust"])
    frame = {"instance": "i", "sessions": [], "capabilities": {"languages": languages}}
    with pytest.raises(ValueError, match="not a list of words"):
        wire.sync(world.key("dev"), frame)
    world.task("A", requirements={"languages": ["rust"]}, auto_assign=True)
    assert world.status("A") == "assigned"


def test_a_server_cannot_name_sessions_without_end(world):
    world.server("dev")
    many = [{"session_id": None, "tmux_name": f"orc-{n}"} for n in range(1001)]
    with pytest.raises(ValueError, match="more than 1000 sessions"):
        wire.sync(world.key("dev"), {"instance": "i", "sessions": many})


# ── stopping ──────────────────────────────────────────────────────────────────────────────────


def test_a_hub_that_is_stopped_lets_waiting_polls_and_streams_end_in_peace(hub):
    hub.api("POST", "projects", {"name": "shop"})
    key = hub.register("dev")["api_key"]
    frames = [{"type": "auth"}, {"type": "sync", "sessions": []}]
    hub.api("POST", "server/poll", {"instance": "i", "seq": 1, "frames": frames}, key=key)
    answers = []

    def wait():
        body = {"instance": "i", "seq": 2, "wait": 25, "frames": []}
        answers.append(hub.ask("POST", "server/poll", body, key=key).json())

    poll = threading.Thread(target=wait)
    poll.start()
    with hub.ask("GET", "events/stream", stream=True) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert next(lines) == ": hello"
        assert hub.stop() == 0
        assert list(lines) is not None
    poll.join(10)
    assert answers == [{"seq": 2, "frames": []}]
    assert "Traceback" not in "".join(hub.lines)
