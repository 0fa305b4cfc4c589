"""`orchestratia mcp` as coding agents use it: the SDK's own client over standard input and output,
against a real hub."""

import json
import sys
import time
from contextlib import asynccontextmanager

import anyio
import pytest
from click.testing import CliRunner
from mcp import Client, StdioServerParameters

import cli
from conftest import ROOT, clean_env, wait_until
from test_public_cli import agent_of

SPEC = {"expected_contracts": {"schema": {"description": "OpenAPI", "schema": {"type": "object"}}}}


class Team:
    """A hub with a server whose agent is played by hand."""

    def __init__(self, hub, home):
        self.hub, self.home = hub, home
        self.agent = agent_of(hub, hub.register("dev")["api_key"])
        self.agent.connect(capabilities={"slots": 4})

    def commands(self, kind):
        """The commands of a kind the agent has got, as soon as there is one; they are taken."""
        until = time.monotonic() + 60
        while not (found := [c for c in self.agent.commands if c["type"] == kind]):
            assert time.monotonic() < until, f"no {kind}"
            self.agent.call(wait=10)
        self.agent.commands = [c for c in self.agent.commands if c["type"] != kind]
        return found

    def worker(self, title="Schema", **fields):
        """(task id, key of the session that works on it)."""
        made = self.hub.api("POST", "tasks", {"title": title, "command": ["x"], **fields})
        self.hub.api("POST", f"tasks/{made['id']}/assign", {"server": "dev"})
        [command] = self.commands("task_assigned")
        self.agent.begin(command)
        return made["id"], command["start"]["session_key"]

    def session(self, name, role):
        """The key of a session without a task."""
        self.hub.api("POST", "sessions", {"server_id": "dev", "name": name, "role": role})
        [command] = self.commands("session_start")
        self.agent.call(self.agent.ack(command["id"]), self.agent.started(command["session_id"]))
        return command["session_key"]

    def tools(self, key, *options, **env):
        """A client of the server started with this key: `async with team.tools(key) as client`."""
        return connected(
            StdioServerParameters(
                command=sys.executable,
                args=[str(ROOT / "cli.py"), "mcp", *options],
                env=clean_env(
                    self.home,
                    XDG_CONFIG_HOME=str(self.home),
                    ORCHESTRATIA_HUB_URL=self.hub.url,
                    ORCHESTRATIA_API_KEY=key,
                    **env,
                ),
                cwd=self.home,
            )
        )


@asynccontextmanager
async def connected(server):
    async with Client(server, read_timeout_seconds=60) as client:
        yield client


@pytest.fixture
def team(shop, tmp_path):
    return Team(shop, tmp_path)


async def names(client):
    return {tool.name for tool in (await client.list_tools()).tools}


async def said(client, tool, **arguments):
    """The JSON a tool answers with."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, answer.content[0].text
    return json.loads(answer.content[0].text)


async def refused(client, tool, **arguments):
    """The sentence a tool refuses with."""
    answer = await client.call_tool(tool, arguments)
    assert answer.is_error, answer.content[0].text
    return answer.content[0].text


def played(scene):
    """Runs an asynchronous scene, for at most a minute."""

    async def within_a_minute():
        with anyio.fail_after(60):
            await scene()

    anyio.run(within_a_minute)


def test_tools_follow_from_the_role_of_the_key_never_from_a_name(team):
    _, worker = team.worker()
    plain = team.session("orchestrator", "plain")
    boss = team.session("worker-1", "orchestrator")

    async def scene():
        async with team.tools(worker) as client:
            of_worker = await names(client)
        async with team.tools(plain) as client:
            assert await names(client) == of_worker
        async with team.tools(boss) as client:
            of_boss = await names(client)
        async with team.tools(team.hub.login()) as client:
            of_person = await names(client)
        assert {"task_view", "task_help", "plan_submit", "task_complete"} <= of_worker
        giving = {"task_create", "task_assign", "task_deps_add", "intervention_respond"}
        assert not giving & of_worker
        assert of_worker | giving <= of_boss
        assert giving <= of_person and "task_complete" not in of_person
        assert not any("permission" in name for name in of_boss | of_person)

    played(scene)


def test_a_workers_task_from_reading_it_to_its_contracts(team):
    task_id, key = team.worker(structured_spec=SPEC, spec="Write it down")

    async def scene():
        async with team.tools(key) as client:
            assert (await said(client, "task_view"))["spec"] == "Write it down"
            assert [t["id"] for t in (await said(client, "task_check"))["tasks"]] == [task_id]
            await said(client, "task_note", content="--json halfway", urgent=True)
            notes = await said(client, "task_notes", task_id=task_id[:8])
            assert [(n["content"], n["urgent"]) for n in notes] == [("--json halfway", True)]
            missing = await refused(client, "task_complete", result="done")
            assert "schema: missing" in missing
            wrong = {"summary": "done", "contracts": {"schema": [1]}}
            assert "schema" in await refused(client, "task_complete", result=wrong)
            right = {"summary": "done", "contracts": {"schema": {"empty": [], "none": None}}}
            assert (await said(client, "task_complete", result=right))["status"] == "done"
            found = await said(client, "contract_show", key="schema", task_id=task_id)
            assert found["data"] == {"empty": [], "none": None}
            assert "done" in await refused(client, "task_fail", error="too late")

    played(scene)


def test_a_question_waits_for_its_answer(team):
    task_id, key = team.worker()
    hub = team.hub

    def answer():
        [asked] = wait_until(lambda: hub.api("GET", "interventions?status=pending"))
        hub.api("POST", f"interventions/{asked['id']}/respond", {"response": "Use JWT"})

    async def scene():
        async with team.tools(key) as client, anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, answer)
            found = await said(client, "task_help", question="JWT or cookies?", context="Two")
        assert (found["response"], found["context"]) == ("Use JWT", "Two")

    played(scene)
    assert hub.api("GET", f"tasks/{task_id}")["status"] == "running"


def test_a_question_without_an_answer_says_how_to_go_on(team):
    _, key = team.worker()

    async def scene():
        async with team.tools(key, "--longest-wait", "0.2s") as client:
            late = await said(client, "task_help", question="Which port?", timeout=3600)
            assert late["still_waiting"] and "intervention_show" in late["next"]
            assert (await said(client, "intervention_show", id=late["id"]))["status"] == "pending"
            again = await said(client, "intervention_show", id=late["id"], wait=True)
            assert again["still_waiting"]
            body = {"response": "8080"}
            path = f"interventions/{late['id']}/respond"
            await anyio.to_thread.run_sync(team.hub.api, "POST", path, body)
            found = await said(client, "intervention_show", id=late["id"], wait=True)
            assert found["response"] == "8080"

    played(scene)


@pytest.mark.hub(claim_s=2.0)
def test_the_answer_to_a_call_that_was_given_up_is_typed(team):
    _, key = team.worker()
    pending = "interventions?status=pending"

    async def scene():
        async with team.tools(key) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.call_tool, "task_help", {"question": "Which port?"})
                look = lambda: team.hub.api("GET", pending)  # noqa: E731
                [asked] = await anyio.to_thread.run_sync(wait_until, look)
                group.cancel_scope.cancel()
            assert (await said(client, "task_view"))["status"] == "needs_human"
        return asked

    asked = anyio.run(scene)
    # Until the hub has noticed that nobody collects any more it keeps the answer.
    team.hub.api("POST", f"interventions/{asked['id']}/respond", {"response": "8080"})
    [typed] = team.commands("intervention_response")
    assert (typed["intervention_id"], typed["response"]) == (asked["id"], "8080")


def test_a_plan_waits_for_its_decision(team):
    task_id, key = team.worker(require_plan=True)
    decided = []

    def waits():
        return team.hub.api("GET", f"tasks/{task_id}")["status"] == "plan_review"

    def decide():
        for verb, body in (("revise", {"feedback": "smaller"}), ("approve", {"comment": "go"})):
            wait_until(waits)
            decided.append(team.hub.api("POST", f"tasks/{task_id}/plan/{verb}", body)["status"])

    async def scene():
        async with team.tools(key) as client, anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, decide)
            back = await refused(client, "plan_submit", plan="all at once")
            assert back == "The plan was sent back: smaller"
            found = await said(client, "plan_submit", plan={"steps": ["a", "b"]})
            assert (found["status"], found["feedback"]) == ("approved", "go")
            assert found["plan"] == {"steps": ["a", "b"]}

    played(scene)
    assert decided == ["planning", "running"]


def test_an_orchestrator_gives_work_out_and_looks_after_it(team):
    boss = team.session("boss", "orchestrator")
    worked, worker = team.worker()

    async def scene():
        async with team.tools(boss) as client:
            first = await said(
                client, "task_create", title="--token=x", spec="-", structured_spec=SPEC,
                acceptance_criteria=["one", "--two"], command=["sh", "-c", "exit"],
            )  # fmt: skip
            assert (first["title"], first["acceptance_criteria"]) == ("--token=x", ["one", "--two"])
            assert first["command"] == ["sh", "-c", "exit"]
            second = await said(client, "task_create", title="B", depends_on=[first["id"]])
            third = await said(client, "task_create", title="C")
            link = {"depends_on": first["id"], "type": "input", "contract_key": "schema"}
            await said(client, "task_deps_add", task_id=third["id"], **link)
            seen = await said(client, "task_list", status="pending")
            assert {t["id"] for t in seen["tasks"]} == {first["id"], second["id"], third["id"]}
            assert (
                "waits for --token=x"
                in (await said(client, "task_explain", task_id=third["id"]))["summary"]
            )
            await said(client, "task_assign", task_id=first["id"], server="dev")
            await said(client, "task_update", task_id=first["id"], priority="high")
            cancelled = await said(client, "task_cancel", task_id=first["id"], cascade=True)
            assert len(cancelled["also_cancelled"]) == 2
            over = await said(client, "task_wait", task_ids=[first["id"], second["id"]])
            assert {t["status"] for t in over["tasks"]} == {"cancelled"}
            await said(client, "task_retry", task_id=first["id"])
            late = await said(client, "task_wait", task_ids=[first["id"]], timeout=0.1)
            assert late["still_waiting"] and late["tasks"][0]["id"] == first["id"]
            pipe = {"tasks": [{"title": "One"}, {"title": "Two", "depends_on": [0]}]}
            made = await said(client, "pipeline_create", inline=pipe, name="pair")
            assert [t["title"] for t in made["tasks"]] == ["One", "Two"]
            assert [s["name"] for s in (await said(client, "server_list"))["servers"]] == ["dev"]
            await answers(client)
            assert (await said(client, "status"))["role"] == "orchestrator"

    async def answers(client):
        async with team.tools(worker) as other:
            question = {"question": "Which port?", "type": "question", "wait": False}
            asked = await said(other, "task_help", **question)
            help_ = await said(other, "task_help", question="May I?", type="approval", wait=False)
            own = await refused(other, "task_cancel", task_id=worked)
            assert "no tool 'task_cancel'" in own
        waiting = await said(client, "intervention_list", status="pending", task_id=worked)
        assert {one["id"] for one in waiting} == {asked["id"], help_["id"]}
        await said(client, "intervention_respond", id=asked["id"], response="--8080")
        sentence = await refused(client, "intervention_respond", id=help_["id"], response="yes")
        assert "for people" in sentence

    played(scene)


def test_a_value_is_a_value_never_a_file_nor_an_option(team, tmp_path):
    made = team.hub.api("POST", "tasks", {"title": "A", "structured_spec": SPEC})
    (tmp_path / "secret").write_text('{"secret": 1}')

    async def scene():
        async with team.tools(team.hub.login()) as client:
            supply = {"task_id": made["id"], "key": "schema"}
            sentence = await refused(client, "contract_set", **supply, value="@secret")
            assert "'@secret' is not of type 'object'" in sentence
            await said(client, "contract_set", **supply, value={"a": None})
            found = await said(client, "contract_show", task_id=made["id"], key="schema")
            assert found["data"] == {"a": None}
            sentence = await refused(client, "task_update", task_id="--hub=http://127.0.0.1:1")
            assert "not a task id" in sentence
            sentence = await refused(client, "pipeline_create", inline="secret")
            assert "--inline" in sentence and "secret" not in sentence.replace("--inline", "")

    played(scene)


def test_what_is_wrong_with_a_call_is_said_and_the_next_one_works(team):
    _, key = team.worker()

    async def scene():
        async with team.tools(key) as client:
            assert "no argument 'title'; it has task_id" in await refused(
                client, "task_view", title="x"
            )
            assert "needs the argument 'question'" in await refused(client, "task_help")
            assert "'--hub=http://127.0.0.1:1'" in await refused(
                client, "intervention_show", id="--hub=http://127.0.0.1:1"
            )
            assert "'maybe'" in await refused(client, "task_help", question="?", type="maybe")
            assert "length of time" in await refused(
                client, "task_help", question="?", timeout="soon"
            )
            assert "no task" in await refused(client, "task_view", task_id="ffffffff")
            assert "not a task id" in await refused(client, "task_view", task_id="../users")
            assert (await said(client, "task_view"))["title"] == "Schema"

    played(scene)


def test_a_hub_that_is_away_is_an_error_of_the_call_alone(team):
    _, key = team.worker()

    async def scene():
        async with team.tools(key) as client:
            await anyio.to_thread.run_sync(team.hub.stop)
            assert "cannot reach the hub" in await refused(client, "task_view")
            await anyio.to_thread.run_sync(team.hub.start)
            assert (await said(client, "task_view"))["title"] == "Schema"

    played(scene)


def test_every_tool_says_what_it_takes(team):
    async def scene():
        async with team.tools(team.hub.login()) as client:
            for tool in (await client.list_tools()).tools:
                schema = tool.input_schema
                assert tool.description and schema["additionalProperties"] is False
                assert set(schema["required"]) <= set(schema["properties"])
                reading = tool.name.endswith(("_list", "_view", "_show", "_wait", "_explain"))
                assert not reading or tool.annotations.read_only_hint

    played(scene)


def test_without_the_library_the_remedy_is_said(monkeypatch):
    cli.mcp_library.cache_clear()
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel", None)
    result = CliRunner().invoke(cli.cli, ["mcp"])
    cli.mcp_library.cache_clear()
    assert result.exit_code == 1 and "is not installed" in result.stderr
    assert f"{sys.executable} -m pip install 'mcp>=2.3,<3'" in result.stderr


def test_an_older_library_is_named(monkeypatch):
    cli.mcp_library.cache_clear()
    monkeypatch.setattr(cli.importlib.metadata, "version", lambda name: "1.28.0")
    result = CliRunner().invoke(cli.cli, ["mcp"])
    assert result.exit_code == 1 and "is installed in version 1.28.0" in result.stderr


def test_without_a_key_it_says_so_before_it_serves(team):
    env = clean_env(team.home, XDG_CONFIG_HOME=str(team.home))
    result = CliRunner().invoke(cli.cli, ["mcp", "--hub", team.hub.url], env=env)
    assert result.exit_code == 2 and "orchestratia login" in result.stderr
