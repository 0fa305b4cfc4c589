"""Requests made up from the OpenAPI document: whatever is sent, and whoever sends it, the hub
answers as the document says and never breaks."""

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import auth
import inbox
import models
import sessions
from auth import HUB

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES, FEW = 3, 1  # of each operation and credential
ENDLESS = "/api/v1/events/stream"  # has tests of its own
WAITING = "/api/v1/server/poll"  # may answer after many seconds: `wait` is taken out
OLDER = "/api/v1/server/"  # mostly the same views, as older clients spell them


@pytest.fixture
def shop(app, world):
    """Something of everything, so that requests find what they name."""
    world.server("dev", repos=["core"])
    world.task("up", server="dev", structured_spec={"expected_contracts": {"api": {}}})
    world.task("down", inputs={"api": "up"}, command=["make"])
    world.task("planned", command=["make"])
    world.assign("planned", server="dev", require_plan=True)
    world.working("asking", server="dev", command=["make"])
    world.working("working", server="dev", command=["make"])
    for name, role in (("boss", "orchestrator"), ("shell", "plain")):
        made, _ = sessions.open_session(HUB, {"server_id": "dev", "name": name, "role": role})
        world.ids[name] = made["id"]
    with models.transaction() as tx:
        for session in models.rows("SELECT * FROM session"):
            sessions.move(tx, session, "started", "hub")
    asked, _ = inbox.ask(worker(world, "asking"), world.ids["asking"], "Which?")
    world.ids["question"] = asked["id"]
    inbox.submit_plan(worker(world, "planned"), world.ids["planned"], {"steps": [1]})
    return world


def worker(world, task: str) -> auth.Caller:
    return auth.by_key(auth.session_key(session_of(world, task)))


def session_of(world, task: str) -> str:
    row = models.one("SELECT session_id FROM task WHERE id = ?", (world.ids[task],))
    return row["session_id"]


def person(world, name: str, **rights) -> str:
    made = auth.create_user(HUB, name, None, rights.pop("admin", False), rights)
    return world.token(made["id"])


def nobody(world) -> dict:
    return {}


def made_up(world) -> dict:
    return {"Authorization": "Bearer nonsense"}


def admin(world) -> dict:
    return {"Authorization": f"Bearer {person(world, 'ada', admin=True)}"}


def operator(world) -> dict:
    return {"Authorization": f"Bearer {person(world, 'olga', shop='operator')}"}


def viewer(world) -> dict:
    return {"Authorization": f"Bearer {person(world, 'vera', shop='viewer')}"}


def stranger(world) -> dict:
    """With rights, but not here."""
    world.project("elsewhere")
    return {"Authorization": f"Bearer {person(world, 'sven', elsewhere='admin')}"}


def server(world) -> dict:
    return {"X-API-Key": world.keys["dev"]}


def orchestrator(world) -> dict:
    return {"X-API-Key": auth.session_key(world.ids["boss"])}


def session(world) -> dict:
    return {"X-API-Key": auth.session_key(session_of(world, "working"))}


CALLERS = (nobody, made_up, admin, operator, viewer, stranger, server, orchestrator, session)


def known(world, path: str) -> list[str]:
    """What may stand for the first placeholder of a path, and for ids in bodies."""
    kinds = {
        "tasks": [world.ids[t] for t in ("up", "down", "planned", "asking", "working")],
        "sessions": ["boss", "shell", session_of(world, "working")],
        "servers": ["dev"],
        "projects": ["shop"],
        "users": ["admin", "vera"],
        "interventions": [world.ids["question"]],
    }
    kind = path.removeprefix("/api/v1/").removeprefix("server/").partition("/")[0]
    return kinds.get(kind, [])


@schemathesis.hook
def before_load_schema(_context, raw: dict) -> None:
    """A pattern and a length make one pattern with a repetition, of 100 MB if it is a long one."""
    if isinstance(raw, dict):
        if "pattern" in raw:
            raw.pop("maxLength", None)
        for each in raw.values():
            before_load_schema(_context, each)
    elif isinstance(raw, list):
        for each in raw:
            before_load_schema(_context, each)


@pytest.mark.parametrize("caller", CALLERS)
def test_whatever_is_sent_the_answer_is_one_of_those_described(app, shop, caller):
    headers = caller(shop)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    asked, wrong = 0, []
    turned_away = caller in (nobody, made_up)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path != ENDLESS:
            asked += 1
            count = FEW if turned_away or operation.path.startswith(OLDER) else EXAMPLES
            try:
                ask(operation, headers, known(shop, operation.path), count)
            except Exception as error:
                wrong.append(f"{operation.label}: {_sentences(error)}")
    assert asked > 120
    assert not wrong, "\n".join(wrong)


def _sentences(error: BaseException) -> str:
    """What failed, of one or several faults found together, and the request that shows it."""
    found = getattr(error, "exceptions", [error])
    notes = [note for note in getattr(error, "__notes__", ()) if "case" in note]
    return "; ".join([*(f"{type(one).__name__}: {one}"[:600] for one in found), *notes])


def ask(operation, headers: dict, refs: list[str], count: int) -> None:
    """Send requests, and hold the answers against the document."""

    @hypothesis.settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(), data=st.data())
    def run(case, data):
        if refs and "ref" in case.path_parameters and data.draw(st.integers(0, 3)):
            case.path_parameters["ref"] = data.draw(st.sampled_from(refs))
        if operation.path == WAITING and isinstance(case.body, dict):
            case.body.pop("wait", None)
        answer = case.call(headers=headers)
        case.validate_response(answer, checks=CHECKS)

    run()
