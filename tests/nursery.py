"""Hubs and agents that start at once: a process that has their modules loaded splits them off.

Loading them takes up to a second, and hundreds of tests have a hub and agents of their own. What is
split off runs `hub.main` as `python hub.py` does, or `agent.main`, in a session and with an
environment of its own.

Run as `python nursery.py hub` or `… agent`. Spoken in lines of JSON: `{"start": {argv, env,
into}}` is answered by the process's id, `into` being where it writes what it prints, and
`{"ended": pid}` by its exit code, or null.
"""

import sys

if __name__ == "__main__" and sys.argv[1] == "hub":
    from gevent import monkey

    monkey.patch_all()  # as in the hub itself, before all else

import atexit
import functools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Nursery:
    """The process that splits off hubs, or agents; ends with this one."""

    def __init__(self, kind: str):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def ask(self, **question):
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@functools.cache
def _nursery(kind: str) -> Nursery:
    return Nursery(kind)


class Child:
    """A process split off; what of `subprocess.Popen` the tests need of it."""

    kind = ""

    def __init__(self, argv: list[str], env: dict[str, str], into: Path):
        self.returncode = None
        self.pid = _nursery(self.kind).ask(start={"argv": argv, "env": env, "into": str(into)})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _nursery(self.kind).ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code; raises subprocess.TimeoutExpired after that many seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.kind, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Hub(Child):
    kind = "hub"

    def __init__(self, flags: list[str], env: dict[str, str], pipe: Path):
        """pipe: where a named pipe is made; `stdout` reads it."""
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        super().__init__(flags, env, pipe)
        self.stdout = pipe.open()


class Agent(Child):
    """What it prints is added to the file `into`."""

    kind = "agent"


def _split_off(argv: list[str], env: dict[str, str], into: str) -> int:
    """The new process's id; in the new process 0."""
    pid = FORK()
    if pid:
        return pid
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = argv
    for name, number in ((os.devnull, 0), (into, 1), (into, 2)):
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT if number else os.O_RDONLY
        opened = os.open(name, how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    return 0


def _ended(pid: int) -> int | None:
    found, status = WAITPID(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _hub():
    import gevent.pywsgi  # noqa: F401

    import hub

    hub.wired("")
    return hub.main


def _agent():
    import requests  # noqa: F401
    import websockets.sync.client  # noqa: F401
    import yaml  # noqa: F401

    import agent

    return agent.main


FORK, WAITPID = os.fork, os.waitpid


def main() -> int:
    global FORK, WAITPID
    sys.path.insert(0, str(ROOT))
    kind = sys.argv[1]
    if kind == "hub":
        FORK, WAITPID = (monkey.get_original("os", name) for name in ("fork", "waitpid"))
    run = {"hub": _hub, "agent": _agent}[kind]()
    sys.argv[:] = [f"{kind}.py"]
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            answer = _ended(question["ended"])
        elif not (answer := _split_off(**question["start"])):
            return run()
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
