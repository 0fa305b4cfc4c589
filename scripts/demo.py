"""The seven-task pipeline on two real agents, in scratch directories.

make demo            runs it with a picture of the progress and leaves the dashboard up
make demo CHECK=1    runs it, checks what happened, cleans up and says 0 or 1
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import PATIENCE_S, ROOT, Client, Processes, clean_env, until, wait_for_the_end

AGENTS = {
    "dev-backend": [
        "api-gateway",
        "core-service",
        "web-dashboard",
        "search-engine",
        "payment-service",
        "deploy-infra",
        "marketing-site",
    ],
    "dev-desktop": ["desktop-app"],
}
LANGUAGES = {"dev-backend": ["python", "rust", "typescript"], "dev-desktop": ["csharp"]}
UPSTREAMS = {
    "T2": ["T1"],
    "T3": ["T1"],
    "T4": ["T1"],
    "T5": ["T2"],
    "T6": ["T2", "T3", "T4"],
    "T7": ["T2"],
}
RUNS_ON = dict.fromkeys(("T1", "T2", "T3", "T4", "T5", "T6"), "dev-backend") | {"T7": "dev-desktop"}


class Demo:
    """A hub, two agents and their repos under one scratch directory."""

    def __init__(self, scratch: Path, **hub_env: str):
        """hub_env: settings of the hub, as its environment has them."""
        self.scratch = scratch
        self.hub_env = hub_env
        # tmux leaves its socket behind: here it goes with the directory
        env = clean_env(HOME=str(scratch), TMUX_TMPDIR=str(scratch))
        self.processes = Processes(scratch, env)
        self.password = secrets.token_urlsafe(12)
        self.server_ids: list[str] = []

    def start(self) -> None:
        self.url = self.processes.start_hub(
            *("--port", "0", "--data", str(self.scratch / "hub")),
            ORCHESTRATIA_ADMIN_PASSWORD=self.password,
            **self.hub_env,
        )
        self.client = Client(self.url, {"username": "admin", "password": self.password})
        self.call("POST", "projects", {"name": "E-Commerce Platform Rebuild"})
        for name, repos in AGENTS.items():
            self._start_agent(name, repos)
        servers = until(self._both_online, "both agents are online")
        self.server_ids = [server["id"] for server in servers]

    def call(self, method: str, path: str, body=None):
        return self.client.call(method, path, body)

    def _start_agent(self, name: str, repos: list[str]) -> None:
        folder = self.scratch / name
        argv = [
            "agent.py",
            "--config",
            str(folder / "config.yaml"),
            "--state",
            str(folder / "state"),
        ]
        register = [*argv, "--name", name, "--slots", "8"]
        register += ["--register", self.call("POST", "servers/tokens", {})["token"]]
        for repo in repos:
            (folder / repo).mkdir(parents=True)
            shutil.copy(ROOT / "examples/ecommerce_worker.py", folder / repo / "work.py")
            register += ["--repo", f"{repo}={folder / repo}"]
        for language in LANGUAGES[name]:
            register += ["--language", language]
        if self.processes.start(f"{name}-register", *register).wait(30):
            raise SystemExit(self.processes.log(f"{name}-register").read_text())
        self.processes.start(name, *argv)

    def _both_online(self) -> list[dict]:
        servers = self.call("GET", "servers")["servers"]
        online = [s for s in servers if s["status"] == "online"]
        return online if len(online) == len(AGENTS) else []

    def cli(self, *argv: str, capture: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *argv],
            env=self.processes.env
            | {"ORCHESTRATIA_HUB_URL": self.url, "ORCHESTRATIA_TOKEN": self.client.token},
            stdout=subprocess.PIPE if capture else None,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"orchestratia {' '.join(argv[:2])} ended with {done.returncode}")
        return done.stdout or ""

    def stop(self) -> None:
        """End everything that was started: sessions, agents, hub."""
        self.processes.stop()
        for server_id in self.server_ids:
            subprocess.run(
                ["tmux", "-L", f"orc-{server_id[:8]}", "kill-server"],
                env=self.processes.env,
                stderr=subprocess.DEVNULL,
            )


def check(demo: Demo, pipeline_id: str) -> list[str]:
    """What did not happen as it should have: nothing, when all is well."""
    pipeline = demo.call("GET", f"pipelines/{pipeline_id}")
    tasks = {t["id"]: t for t in pipeline["tasks"]}
    ids = pipeline["id_map"]
    problems, started, completed = [], {}, {}
    for name, task_id in ids.items():
        task = tasks[task_id]
        mine = [
            e
            for e in demo.call("GET", f"tasks/{task_id}/events")["events"]
            if e["task_id"] == task_id
        ]
        starts = [e["id"] for e in mine if e["type"] == "task_started"]
        ends = [e["id"] for e in mine if e["type"] == "task_completed"]
        if task["status"] != "done" or len(starts) != 1 or len(ends) != 1 or task["attempt"] != 1:
            problems.append(
                f"{name} is {task['status']}: started {len(starts)}×, completed {len(ends)}×, "
                f"attempt {task['attempt']}: {task['reason'] or task['result']}"
            )
            continue
        started[name], completed[name] = starts[0], ends[0]
        if task["assigned_server_name"] != RUNS_ON[name]:
            problems.append(f"{name} ran on {task['assigned_server_name']}, not {RUNS_ON[name]}")
        inputs = json.dumps(task["resolved_inputs"], sort_keys=True)
        if task["result"]["inputs_sha256"] != hashlib.sha256(inputs.encode()).hexdigest():
            problems.append(f"the worker of {name} read other inputs than the hub handed down")
    for name in ("T2", "T3", "T4"):
        handed = tasks[ids[name]]["resolved_inputs"]
        promised = tasks[ids["T1"]]["contracts"].get("api_schema", {}).get("data")
        if not promised or handed != {"api_schema": promised}:
            problems.append(f"{name} was not handed the api_schema of T1")
    for name, ups in UPSTREAMS.items():
        for up in ups:
            if name in started and up in completed and started[name] < completed[up]:
                problems.append(f"{name} started before {up} was done")
    return problems


def main() -> int:
    checking = os.environ.get("CHECK") == "1"
    scratch = Path(tempfile.mkdtemp(prefix="orchestratia-demo-"))
    demo = Demo(scratch)
    began = time.monotonic()
    try:
        demo.start()
        applied = json.loads(
            demo.cli(
                "pipeline", "apply", str(ROOT / "examples/ecommerce.yaml"), "--json", capture=True
            )
        )
        demo.cli(
            "task",
            "assign",
            applied["id_map"]["T1"],
            "--session",
            "dev-backend",
            "--json",
            capture=True,
        )
        demo.cli("pipeline", "show", applied["id"], "--watch", "--timeout", f"{PATIENCE_S}s")
        problems = check(demo, applied["id"])
        for problem in problems:
            print(f"WRONG: {problem}")
        if not problems:
            seconds = time.monotonic() - began
            print(f"Seven tasks ran once each, in order, with the right inputs: {seconds:.1f} s.")
        if checking:
            return 1 if problems else 0
        print(f"\nDashboard: {demo.url}   user: admin   password: {demo.password}")
        print("Ctrl-C ends the demo and removes everything it made.")
        wait_for_the_end()
        return 0
    finally:
        demo.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
