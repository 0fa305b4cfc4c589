"""`make run`: the hub on 127.0.0.1 with this machine as its first server.

The first run makes the project `default` and registers this machine; later runs find both.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from processes import ROOT, Client, Processes, clean_env, until, wait_for_the_end

HOME = Path.home()
DATA = Path(os.environ.get("ORCHESTRATIA_DATA", HOME / ".local/share/orchestratia"))
CONFIG = Path(os.environ.get("XDG_CONFIG_HOME", HOME / ".config")) / "orchestratia/config.yaml"
PORT = os.environ.get("ORCHESTRATIA_PORT", "8080")


def login_link() -> str:
    done = subprocess.run(
        [sys.executable, "hub.py", "--data", str(DATA), "--port", PORT, "--login-link"],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()


def register_here(client: Client, processes: Processes) -> None:
    """Register this machine with the checkout as its first repo."""
    projects = client.call("GET", "projects")["projects"]
    project = projects[0] if projects else client.call("POST", "projects", {"name": "default"})
    token = client.call("POST", "servers/tokens", {"project_id": project["id"]})["token"]
    argv = ["agent.py", "--register", token, "--repo", f"{ROOT.name}={ROOT}"]
    if processes.start("register", *argv).wait(30):
        raise SystemExit(processes.log("register").read_text())


def main() -> int:
    os.umask(0o077)
    logs = DATA / "run"
    logs.mkdir(parents=True, exist_ok=True)
    processes = Processes(logs, clean_env())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        url = processes.start_hub("--data", str(DATA), "--port", PORT)
        client = Client(url, {"login_token": login_link().rpartition("=")[2]})
        if not CONFIG.exists():
            register_here(client, processes)
        processes.keep("agent", "agent.py")
        name = socket.gethostname()
        until(
            lambda: any(s["status"] == "online" for s in client.call("GET", "servers")["servers"]),
            f"the agent on {name} is online (see {processes.log('agent')})",
        )
        print(f"Hub:      {url}")
        print(f"Sign in:  {login_link()}   (once, within the hour)")
        print(f"Terminal: {sys.executable} cli.py login '{login_link()}'")
        print(f"Logs:     {logs}")
        print("Ctrl-C stops hub and agent; sessions go on in tmux and are found again.", flush=True)
        wait_for_the_end(processes.revive)
        return 0
    finally:
        processes.stop()


if __name__ == "__main__":
    sys.exit(main())
