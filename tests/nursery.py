"""Hubs that start at once: a process that has the hub's modules loaded splits off each of them.

Loading them takes most of a second, and hundreds of tests have a hub of their own. What is split
off runs `hub.main` as `python hub.py` does, in a session and with an environment of its own.

Spoken in lines of JSON: `{"start": {flags, env, into}}` is answered by the process's id, `into`
being a named pipe for what it prints, and `{"ended": pid}` by its exit code, or null.
"""

if __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()  # as in the hub itself, before all else

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Nursery:
    """The process that splits off hubs; ends with this one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
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
def _nursery() -> Nursery:
    return Nursery()


class Hub:
    """A hub split off; what of `subprocess.Popen` the tests need of it."""

    def __init__(self, flags: list[str], env: dict[str, str], pipe: Path):
        """pipe: where a named pipe is made; `stdout` reads it."""
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self.returncode = None
        self.pid = _nursery().ask(start={"flags": flags, "env": env, "into": str(pipe)})
        self.stdout = pipe.open()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _nursery().ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code; raises subprocess.TimeoutExpired after that many seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("hub", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _split_off(flags: list[str], env: dict[str, str], into: str) -> int:
    """The new process's id; in the new process 0."""
    pid = monkey.get_original("os", "fork")()
    if pid:
        return pid
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["hub.py", *flags]
    for name, number in ((os.devnull, 0), (into, 1), (into, 2)):
        opened = os.open(name, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    return 0


def _ended(pid: int) -> int | None:
    found, status = monkey.get_original("os", "waitpid")(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> int:
    sys.path.insert(0, str(ROOT))
    import gevent.pywsgi  # noqa: F401

    import hub

    hub.wired("")
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            answer = _ended(question["ended"])
        elif not (answer := _split_off(**question["start"])):
            return hub.main()
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
