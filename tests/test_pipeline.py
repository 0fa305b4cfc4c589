"""The main job with real parts: a hub process, agent processes, tmux, the command line."""

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, AgentProcess, wait_until

FAST = {"tick_s": 0.2, "due_s": 0.2, "grace_s": 0.5}


def task(hub, title: str, *command: str, **fields) -> dict:
    return hub.api("POST", "tasks", {"title": title, "command": list(command)} | fields)


def at_end(hub, task_id: str) -> dict:
    """The task once it has ended."""

    def ended():
        found = hub.api("GET", f"tasks/{task_id}")
        return found if found["status"] in ("done", "failed", "cancelled") else None

    return wait_until(ended, 40)


def types(hub, task_id: str) -> list[str]:
    return [e["type"] for e in hub.api("GET", f"tasks/{task_id}/events")["events"]]


def output(hub, session_id: str) -> str:
    return hub.ask("GET", f"sessions/{session_id}/output").content.decode()


# ── registration and signs of life ────────────────────────────────────────────────────────────


@pytest.mark.hub(**FAST, offline_after_s=1.5)
def test_an_agent_registers_comes_online_and_goes_offline_each_once_in_the_log(
    shop, start_agent, cli
):
    agent = start_agent(shop, "dev-backend", repos=["core-service"])
    assert stat.S_IMODE(agent.config.stat().st_mode) == 0o600
    assert "orc_" in agent.config.read_text()
    agent.kill()
    wait_until(lambda: not agent.is_online(), 10)
    seen = [e["type"] for e in shop.api("GET", "events?limit=1000")["events"]]
    assert seen.count("server_online") == 1
    assert seen.count("server_offline") == 1
    agent.start()
    agent.stop()
    shown = cli("server", "show", "dev-backend", "--json")
    assert list(shown["repos"]) == ["core-service"]


def test_a_token_that_cannot_be_used_is_one_sentence_here_and_in_the_agents_log(shop, tmp_path):
    agent = AgentProcess(shop, tmp_path / "a", "a")
    used = shop.api("POST", "servers/tokens", {})["token"]
    assert agent.run("--register", used, "--name", "first").returncode == 0
    expired = shop.api("POST", "servers/tokens", {"ttl_s": 0.001})["token"]
    for token, sentence in (
        (used, "was already used"),
        (expired, "expired at"),
        (expired[:-3] + "xyz", "is unknown to this hub"),
        ("orcreg_nonsense", "not a registration token"),
    ):
        done = agent.run("--register", token, "--name", "second")
        assert done.returncode == 1
        assert sentence in done.stdout, done.stdout
        assert sentence in (tmp_path / "a/state/agent.log").read_text()
        assert token not in done.stdout


# ── workers ───────────────────────────────────────────────────────────────────────────────────


def test_a_worker_runs_in_its_repo_with_its_inputs_and_its_result_completes_the_task(
    shop, start_agent
):
    agent = start_agent(shop, "dev", repos=["core"])
    script = (
        "import json, os, pathlib; task = json.load(open(os.environ['ORCHESTRATIA_TASK_FILE']));"
        "print('cwd', pathlib.Path.cwd().name, 'spec', task['spec']);"
        "print('key', os.environ['ORCHESTRATIA_API_KEY'][:5], os.environ['ORCHESTRATIA_TASK_ID']);"
        "open(os.environ['ORCHESTRATIA_RESULT_FILE'], 'w').write('{\"summary\": \"built\"}')"
    )
    made = task(
        shop, "Build", sys.executable, "-c", script, spec="as said", target_repo="core",
        auto_assign=True,
    )  # fmt: skip
    done = at_end(shop, made["id"])
    assert (done["status"], done["result"]) == ("done", {"summary": "built"})
    assert done["assigned_server_name"] == "dev"
    wait_until(lambda: "session_closed" in types(shop, made["id"]))
    text = output(shop, done["session_id"])
    assert "cwd core spec as said" in text
    assert f"key orcs_ {made['id']}" in text
    assert types(shop, made["id"]) == [
        "task_created",
        "task_auto_assigned",
        "session_started",
        "session_active",
        "task_started",
        "task_completed",
        "session_closed",
    ]
    assert agent.tmux("list-sessions") == ""


@pytest.mark.parametrize(
    ("command", "fields", "error"),
    [
        (["sh", "-c", "echo one; echo two; exit 3"], {}, "exit code 3\none\ntwo"),
        (["no-such-program"], {}, "cannot run no-such-program"),
        (
            ["true"],
            {"structured_spec": {"expected_contracts": {"api": {}}}},
            "its contracts are not fulfilled (api: missing)",
        ),
    ],
)
def test_a_worker_that_does_not_deliver_fails_its_task_with_the_reason(
    shop, start_agent, command, fields, error
):
    start_agent(shop, "dev")
    ended = at_end(shop, task(shop, "Bad", *command, auto_assign=True, **fields)["id"])
    assert ended["status"] == "failed"
    assert error in ended["result"]["error"].replace("\r", "")


def test_a_worker_may_report_by_itself_and_its_exit_code_does_not_contradict_it(
    shop, start_agent, tmp_path
):
    start_agent(shop, "dev")
    script = 'orchestratia task complete --result "{\\"summary\\": \\"said so\\"}" && exit 7'
    made = task(shop, "Self", "sh", "-c", script, auto_assign=True)
    done = at_end(shop, made["id"])
    assert (done["status"], done["result"]) == ("done", {"summary": "said so"})
    wait_until(lambda: "session_closed" in types(shop, made["id"]))
    assert "late_report" not in types(shop, made["id"])


def test_a_cancelled_task_takes_its_program_along(shop, start_agent, tmp_path):
    agent = start_agent(shop, "dev")
    mark = tmp_path / "pid"
    made = task(shop, "Long", "sh", "-c", f"echo $$ > {mark}; exec sleep 600", auto_assign=True)
    wait_until(lambda: mark.exists() and mark.read_text().strip())
    shop.api("DELETE", f"tasks/{made['id']}")
    pid = int(mark.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 15)
    wait_until(lambda: agent.tmux("list-sessions") == "", 15)
    assert shop.api("GET", "servers/dev")["busy"] == 0


def test_a_failing_worker_is_tried_again_as_often_as_asked(shop, start_agent, tmp_path):
    start_agent(shop, "dev")
    script = f"echo x >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 3 ]"
    made = task(shop, "Flaky", "sh", "-c", script, auto_assign=True, max_attempts=3)
    done = at_end(shop, made["id"])
    wait_until(lambda: shop.api("GET", f"tasks/{made['id']}")["status"] == "done", 40)
    done = shop.api("GET", f"tasks/{made['id']}")
    assert (done["attempt"], types(shop, made["id"]).count("task_started")) == (3, 3)


# ── the pipelines of the workflows ────────────────────────────────────────────────────────────


def test_workflow_3_a_hands_its_schema_to_b_and_c_and_c_waits_for_b_too(shop, start_agent, cli):
    start_agent(shop, "dev-backend", repos=["api"], languages=["python"])
    start_agent(shop, "dev-frontend", repos=["web"], languages=["ts"])
    read = (
        "import json, os; t = json.load(open(os.environ['ORCHESTRATIA_TASK_FILE']));"
        "assert t['resolved_inputs']['api_schema']['endpoints'] == ['/users'], t;"
    )
    give = (
        "import json, os; json.dump({'contracts': {'api_schema': {'status': 'fulfilled', 'data':"
        " {'endpoints': ['/users']}}}}, open(os.environ['ORCHESTRATIA_RESULT_FILE'], 'w'))"
    )
    python = sys.executable
    a = task(shop, "Design API schema", python, "-c", give, target_repo="api")["id"]
    b = task(shop, "Implement API", python, "-c", read, target_repo="api")["id"]
    c = task(shop, "Build frontend", python, "-c", read, target_repo="web")["id"]
    for downstream in (b, c):
        cli("task", "deps", "add", downstream[:8], "--depends-on", a[:8], "--type", "input",
            "--contract-key", "api_schema")  # fmt: skip
    cli("task", "deps", "add", c, "--depends-on", b)
    cli("task", "assign", a, "--session", "dev-backend")
    waited = cli("task", "wait", a, b, c, "--timeout", "60s")
    assert waited.returncode == 0
    seen = shop.api("GET", "events?limit=1000")["events"]
    order = [(e["type"], e["task_id"]) for e in seen if e["task_id"] in (a, b, c)]
    b_done = order.index(("task_completed", b))
    assert order.index(("task_completed", a)) < order.index(("task_auto_assigned", b))
    assert b_done < order.index(("task_unblocked", c)) < order.index(("task_started", c))
    assert [t for t, task_id in order if task_id == a][-1] == "session_closed"
    shown = cli("task", "view", c, "--json")
    assert shown["resolved_inputs"] == {"api_schema": {"endpoints": ["/users"]}}
    assert shown["assigned_server_name"] == "dev-frontend"


def test_workflow_6_seven_tasks_on_two_agents_run_once_each_in_order_with_the_right_inputs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/demo.py")],
        env=os.environ | {"CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Seven tasks ran once each" in done.stdout


# ── crashes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hub(**FAST)
def test_an_agent_killed_while_its_worker_prints_is_taken_up_again_without_loss(
    shop, start_agent, tmp_path
):
    agent = start_agent(shop, "dev")
    go = tmp_path / "go"
    script = f"seq 1 2000; while [ ! -e {go} ]; do sleep 0.05; done; seq 2001 4000"
    made = task(shop, "Print", "sh", "-c", script, auto_assign=True)
    wait_until(lambda: shop.api("GET", f"tasks/{made['id']}")["status"] == "running")
    agent.kill()
    go.touch()
    agent.start()
    done = at_end(shop, made["id"])
    assert (done["status"], done["attempt"]) == ("done", 1)
    wait_until(lambda: "session_closed" in types(shop, made["id"]), 20)
    session = done["session_id"]
    end = shop.api("GET", f"sessions/{session}")["log_end"]
    wait_until(lambda: len(output(shop, session)) >= end, 20)
    numbers = output(shop, session).split()
    assert numbers == [str(n) for n in range(1, 4001)]
    assert types(shop, made["id"]).count("task_started") == 1


def test_a_hub_killed_in_the_middle_of_a_pipeline_goes_on_where_it_was(shop, start_agent):
    start_agent(shop, "dev")
    chain = [
        {"id": f"t{n}", "title": f"t{n}", "command": ["sleep", "0.3"], "auto_assign": True}
        | ({"depends_on": [f"t{n - 1}"]} if n else {})
        for n in range(6)
    ]
    made = shop.api("POST", "pipelines", {"name": "chain", "tasks": chain})
    last = made["id_map"]["t5"]
    for n in (1, 3):
        started = made["id_map"][f"t{n}"]
        wait_until(lambda s=started: "task_started" in types(shop, s), 30)
        shop.kill()
        shop.start()
    assert at_end(shop, last)["status"] == "done"
    for task_id in made["id_map"].values():
        seen = types(shop, task_id)
        assert (seen.count("task_started"), seen.count("task_completed")) == (1, 1)


# ── using a session ───────────────────────────────────────────────────────────────────────────


def test_typing_into_a_session_arrives_as_it_is_and_is_refused_when_its_server_is_away(
    shop, start_agent, cli
):
    agent = start_agent(shop, "dev")
    session = shop.api("POST", "sessions", {"server_id": "dev", "name": "shell"})
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active")
    hostile = "echo '-t Enter C-c $(touch /tmp/no) ünï;'"
    cli("session", "send", "shell", hostile)
    wait_until(lambda: output(shop, session["id"]).count("-t Enter C-c") >= 2, 15)
    raw = base64.b64encode(b"echo raw-$((6*7))\r").decode()
    shop.api("POST", "sessions/shell/input", {"data": raw})
    wait_until(lambda: "raw-42" in output(shop, session["id"]), 15)
    wait_until(
        lambda: any("raw-42" in x for x in shop.api("GET", "sessions/shell/screen")["lines"])
    )
    shop.api("POST", "sessions/shell/resize", {"cols": 90, "rows": 20})
    wait_until(lambda: agent.tmux("list-windows", "-a", "-F", "#{window_width}").strip() == "90")
    shop.api("POST", "sessions/shell/close")
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "closed", 20)
    refused = shop.ask("POST", "sessions/shell/input", {"text": "hello"})
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        "Session 'shell' is closed: start a new one.",
    )


@pytest.mark.hub(**FAST, offline_after_s=1.5)
def test_typing_into_a_session_of_an_offline_server_is_refused_with_a_clear_sentence(
    shop, start_agent
):
    agent = start_agent(shop, "dev")
    shop.api("POST", "sessions", {"server_id": "dev", "name": "shell"})
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active")
    agent.kill()
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "disconnected")
    for since in ("dev: disconnected", "dev: offline"):
        refused = shop.ask("POST", "sessions/shell/input", {"text": "hello"})
        assert refused.status_code == 409
        assert since in refused.json()["detail"]
        wait_until(lambda: not agent.is_online())
    agent.start()
    wait_until(lambda: shop.api("GET", "sessions/shell")["status"] == "active", 20)
    assert "session_recovered" in [
        e["type"] for e in shop.api("GET", "events?limit=1000")["events"]
    ]
