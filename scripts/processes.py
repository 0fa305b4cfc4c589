"""What `make run` and `make demo` share: starting the hub and agents as processes, waiting for
them, talking to the hub."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60
ENDS = {signal.SIGINT, signal.SIGTERM}


def until(condition, what: str, seconds: float = PATIENCE_S):
    """Wait until `condition()` is true; its value. Ends the program when it takes too long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up waiting until {what}")
        time.sleep(0.05)
    return value


def wait_for_the_end(meanwhile=lambda: None) -> None:
    """Return at Ctrl-C or SIGTERM, also where a shell has them ignored in the background.

    meanwhile: called every two seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    while not signal.sigtimedwait(ENDS, 2):
        meanwhile()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def clean_env(**more: str) -> dict:
    """This environment without settings of another hub or session, and no proxy for loopback."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATIA_")}
    return kept | {"NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"} | more


class Processes:
    """Programs of this checkout, each with a log file, ended together."""

    def __init__(self, logs: Path, env: dict):
        self.logs = logs
        self.env = env
        self.hub: subprocess.Popen | None = None
        self._running: list[subprocess.Popen] = []
        self._kept: dict[str, tuple] = {}  # by name: its process, and how it was started

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def start(self, name: str, *argv: str, **env: str) -> subprocess.Popen:
        with self.log(name).open("ab" if name in self._kept else "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def keep(self, name: str, *argv: str, **env: str) -> subprocess.Popen:
        """Start a program that `revive` starts again."""
        process = self.start(name, *argv, **env)
        self._kept[name] = process, argv, env
        return process

    def revive(self) -> None:
        """Start again what was to be kept and has ended."""
        for name, (process, argv, env) in list(self._kept.items()):
            if process.poll() is not None:
                code, log = process.returncode, self.log(name)
                print(f"The {name} has ended ({code}) and is started again: see {log}", flush=True)
                blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)  # else it inherits that
                self.keep(name, *argv, **env)
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def start_hub(self, *argv: str, **env: str) -> str:
        """Start the hub; its address once it answers there."""
        hub = self.hub = self.keep("hub", "hub.py", *argv, **env)

        def address():
            if hub.poll() is not None:
                raise SystemExit(self.log("hub").read_text().strip())
            lines = self.log("hub").read_text().splitlines()
            return next((x.rsplit(" ", 1)[1] for x in lines if x.startswith("Orch")), None)

        return until(address, f"the hub says where it is (see {self.log('hub')})")

    def stop(self) -> None:
        for process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Client:
    """The hub's API as a signed-in person."""

    def __init__(self, url: str, login: dict):
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False
        self.token = self.call("POST", "auth/login", login)["token"]
        self._session.headers["Authorization"] = f"Bearer {self.token}"

    def call(self, method: str, path: str, body=None):
        answer = self._session.request(method, f"{self.url}/api/v1/{path}", json=body, timeout=30)
        if not answer.ok:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()
