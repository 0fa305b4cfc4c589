"""The agent as a real process with a real tmux on a private socket. The hub's side of the wire
is a small HTTP server here, which stands in for the network only; the tests with the real hub
are elsewhere."""

import base64
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from agent import Store

ROOT = Path(__file__).resolve().parent.parent
AGENT = str(ROOT / "agent.py")
SERVER_ID = "5e1f0000-0000-4000-8000-000000000001"
API_KEY = "orc_canary_server_key"


def until(condition, limit=15):
    """The condition's first true value; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {limit} s: {condition}"
        time.sleep(0.02)
    return value


def running():
    lines = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True)
    return lines.stdout


class Wire:
    """The hub's end of the poll: keeps what it was told, sends what it is given."""

    def __init__(self):
        self.epoch = str(uuid.uuid4())
        self.lock = threading.Condition()
        self.instance = None
        self.told = {}  # spool number: frame
        self.repeats = 0  # of spooled frames
        self.moments = []
        self.syncs = []
        self.acked = []
        self.logs = {}
        self.log_repeats = 0
        self.adopt = {}  # tmux name: what is known of it, with its session_id
        self.answers = {}  # (instance, seq): the answer a repeated call gets
        self.commands = {}  # not acknowledged
        self.next_id = 0
        self.outbox = []
        self.lose_answers = 0
        self.ack_spool = True
        self.heartbeats = 0
        self.registered = None
        self.register_answer = (200, {"id": SERVER_ID, "name": "dev", "api_key": API_KEY})
        self.server = None
        self.port = 0
        self.open()

    # -- the network

    def open(self):
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = wire.post(self.path.rsplit("/api/v1/")[1], body, self.headers)
                if status is None:
                    self.close_connection = True
                    return
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True

            def handle_error(self, *_):
                pass  # a killed agent leaves its connections

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def forget(self):
        """As if the hub had restarted: its database is there, its memory is not."""
        with self.lock:
            self.instance = None
            self.answers.clear()
            self.lock.notify_all()

    # -- the routes

    def post(self, path, body, headers):
        if path == "servers/register":
            self.registered = body
            return self.register_answer
        if headers["X-API-Key"] != API_KEY:
            return 401, {"detail": "This key is not known.", "code": "unauthorized"}
        if path == "servers/heartbeat":
            self.heartbeats += 1
            return 200, {"ok": True, "heartbeat_s": 30, "status": "online"}
        with self.lock:
            answer = self.poll(body)
            if answer[0] == 200 and self.lose_answers and body["frames"]:
                self.lose_answers -= 1
                return None, None
            return answer

    def poll(self, body):
        call = body["instance"], body["seq"]
        if call in self.answers:
            return 200, self.answers[call]
        frames = body["frames"]
        opening = bool(frames) and frames[0]["type"] == "auth"
        if not opening and body["instance"] != self.instance:
            return 409, {"detail": "Sync first.", "code": "sync_required"}
        out = [reply for frame in frames for reply in self.take(frame)]
        if opening:
            self.instance = body["instance"]
            self.lock.notify_all()  # a waiting call of an agent that was killed ends here
            out += self.commands.values()
        elif not frames:
            mine = body["instance"]
            self.lock.wait_for(lambda: self.outbox or self.instance != mine, body["wait"])
            if self.instance != mine:
                return 409, {"detail": "Sync first.", "code": "sync_required"}
            out, self.outbox = self.outbox, []
        answer = {"seq": body["seq"], "frames": out}
        self.answers[call] = answer
        return 200, answer

    def take(self, frame):
        if "spool" in frame:
            self.repeats += frame["spool"] in self.told
            self.told.setdefault(frame["spool"], frame)
            return [{"type": "spool_ack", "upto": frame["spool"]}] if self.ack_spool else []
        handler = getattr(self, f"take_{frame['type']}", None)
        if handler is None:
            self.moments.append(frame)
            return []
        return handler(frame)

    def take_auth(self, frame):
        assert "api_key" not in frame
        return [{"type": "auth_ok", "protocol": 2, "server_name": "dev", "hub_epoch": self.epoch}]

    def take_sync(self, frame):
        self.syncs.append(frame)
        known = [entry for entry in frame["sessions"] if entry["session_id"]]
        return [
            {
                "type": "sync_ok",
                "sessions": [
                    {
                        "session_id": entry["session_id"],
                        "action": "keep",
                        "log_acked": len(self.logs.get(entry["session_id"], b"")),
                    }
                    for entry in known
                ],
                "adopt": [{"tmux_name": name, **told} for name, told in self.adopt.items()],
                "profiles": {"command": (ROOT / "profiles" / "command.yaml").read_text()},
                "profiles_etag": "1",
            }
        ]

    def take_ack(self, frame):
        self.acked += frame["ids"]
        for command_id in frame["ids"]:
            self.commands.pop(command_id, None)
        return []

    def take_session_log(self, frame):
        stored = self.logs.setdefault(frame["session_id"], bytearray())
        data = base64.b64decode(frame["data"])
        assert len(data) <= 64 * 1024
        if frame["offset"] < len(stored):
            self.log_repeats += 1
        if frame["offset"] <= len(stored):
            stored += data[len(stored) - frame["offset"] :]
        return [{"type": "log_ack", "session_id": frame["session_id"], "offset": len(stored)}]

    # -- for the tests

    def command(self, kind, **fields):
        with self.lock:
            self.next_id += 1
            frame = {"type": kind, "id": self.next_id, **fields}
            self.commands[self.next_id] = frame
            self.outbox.append(frame)
            self.lock.notify_all()
        return frame

    def say(self, kind, **fields):
        with self.lock:
            self.outbox.append({"type": kind, **fields})
            self.lock.notify_all()

    def reports(self, kind, **match):
        """The spooled frames of a type, in order of their numbers."""
        frames = [frame for _, frame in sorted(self.told.items()) if frame["type"] == kind]
        return [f for f in frames if all(f.get(k) == v for k, v in match.items())]

    def report(self, kind, **match):
        return until(lambda: self.reports(kind, **match))[0]

    def output(self, session_id):
        return bytes(self.logs.get(session_id, b""))


class Rig:
    """An agent, its directories and its tmux."""

    def __init__(self, wire, home):
        self.wire = wire
        self.home = home
        self.state = home / "state #{pane_id} %H 'q'"  # tmux and shells must not read it
        self.config = home / "config.yaml"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("TMUX", "ORCHESTRATIA"))},
            "HOME": str(home),
            "TMUX_TMPDIR": str(home),
            "SHELL": "/bin/bash",
        }
        self.process = None
        self.work = home / "work"
        self.work.mkdir()
        self.config.write_text(
            yaml.safe_dump(
                {
                    "hub_url": wire.url,
                    "api_key": API_KEY,
                    "server_id": SERVER_ID,
                    "name": "dev",
                    "repos": {"shop": {"path": str(self.work), "branch": None}},
                    "monitor_s": 0.05,
                    "backoff_max_s": 0.2,
                    "refused_max_s": 0.2,
                    "superseded_s": 0.2,
                    "resend_s": 2,
                    "screen_s": 0.2,
                    "close_grace_s": 0.5,
                }
            )
        )

    def arguments(self, *more):
        return [sys.executable, AGENT, "--config", self.config, "--state", self.state, *more]

    def start(self):
        seen = len(self.wire.syncs)
        with (self.home / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(self.arguments("-v"), env=self.env, stderr=errors)
        until(lambda: len(self.wire.syncs) > seen or not self.wire.server)
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(5)

    def tmux(self, *arguments):
        command = ["tmux", "-u", "-L", f"orc-{SERVER_ID[:8]}", "-f", "/dev/null", *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True).stdout

    def end(self):
        if self.process and self.process.poll() is None:
            self.kill()
        self.tmux("kill-server")

    # -- orders

    def session(self, **fields):
        order = self.order(**fields)
        self.wire.command("session_start", **order)
        return order["session_id"]

    def order(self, **fields):
        return {
            "session_id": str(uuid.uuid4()),
            "session_key": "orcs_canary_session_key",
            "name": "s",
            "project_id": "p1",
            "role": "plain",
            "working_directory": str(self.work),
            "cols": 100,
            "rows": 30,
            "profile": None,
            "command": None,
            "prompt": None,
            "env": {},
            **fields,
        }

    def python(self, code, **fields):
        return self.session(command=[sys.executable, "-S", "-c", code], **fields)

    def task(self, command, attempt=1, task_id=None, **fields):
        task_id = task_id or str(uuid.uuid4())
        task = {"id": task_id, "title": "Gateway", "resolved_inputs": {"a": 1}, "command": command}
        order = self.order(role="worker", profile="command", repo="shop", **fields)
        order["working_directory"] = None
        self.wire.command(
            "task_assigned", task=task, attempt=attempt, require_plan=False, start=order
        )
        return task_id, order["session_id"]

    def screen(self, session_id):
        return self.tmux("capture-pane", "-p", "-t", f"=orc-{session_id[:12]}:")

    def type(self, session_id, text):
        request = str(uuid.uuid4())
        self.wire.say("session_type", request_id=request, session_id=session_id, text=text)
        return until(lambda: [f for f in self.wire.moments if f.get("request_id") == request])[0]


@pytest.fixture
def wire():
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture
def rig(wire):
    home = Path(tempfile.mkdtemp(prefix="orc-"))  # a socket's path must stay short
    rig = Rig(wire, home)
    yield rig
    rig.end()
    assert not rig.tmux("list-sessions")
    until(lambda: str(home) not in running())  # every program ends with its terminal
    shutil.rmtree(home)


@pytest.fixture
def agent(rig):
    return rig.start()


# ---------------------------------------------------------------------------- registration


def token_for(url):
    return f"orcreg_{base64.urlsafe_b64encode(url.encode()).decode().rstrip('=')}.secret"


def registering(rig, token, *more):
    return subprocess.run(
        [sys.executable, AGENT, "--config", rig.config, "--register", token, *more],
        env=rig.env,
        capture_output=True,
        text=True,
    )


def test_registration_saves_the_key_and_says_what_to_do_next(wire, rig):
    rig.config.write_text("kept: 1\n")
    more = ["--state", rig.state, "--name", "dev", "--repo", f"shop={rig.work}"]
    done = registering(rig, token_for(wire.url), *more, "--language", "rust", "--slots", "3")
    assert done.returncode == 0, done.stderr
    assert "dev" in done.stdout and "--config" in done.stdout
    config = yaml.safe_load(rig.config.read_text())
    assert config["api_key"] == API_KEY and config["kept"] == 1
    assert config["state_dir"] == str(rig.state)
    assert rig.config.stat().st_mode & 0o777 == 0o600
    assert wire.registered["repos"]["shop"] == {"path": str(rig.work), "branch": None}
    assert wire.registered["capabilities"] == {
        "languages": ["rust"],
        "frameworks": None,
        "capabilities": None,
        "slots": 3,
    }
    assert API_KEY not in (rig.state / "agent.log").read_text()


def test_a_refused_token_is_said_and_logged(wire, rig):
    wire.register_answer = (401, {"detail": "The token has expired: make a new one."})
    done = registering(rig, token_for(wire.url), "--state", rig.state)
    assert done.returncode == 1
    assert "The token has expired" in done.stderr
    assert "The token has expired" in (rig.state / "agent.log").read_text()


def test_a_malformed_token_and_an_unreachable_hub_are_sentences(wire, rig):
    done = registering(rig, "orcreg_nonsense", "--state", rig.state)
    assert done.returncode == 1 and "not a registration token" in done.stderr
    wire.close()
    done = registering(rig, token_for(wire.url), "--state", rig.state)
    assert done.returncode == 3 and "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_agent_on_the_same_state_is_refused(agent):
    second = subprocess.run(agent.arguments(), env=agent.env, capture_output=True, text=True)
    assert second.returncode == 1 and "already runs" in second.stderr


# ---------------------------------------------------------------------------- workers


WORKER = """
import json, os
task = json.load(open(os.environ["ORCHESTRATIA_TASK_FILE"]))
json.dump({"got": task["resolved_inputs"], "cwd": os.getcwd()},
          open(os.environ["ORCHESTRATIA_RESULT_FILE"], "w"))
"""


def test_a_command_worker_runs_and_completes_its_task(agent, wire):
    task_id, session_id = agent.task([sys.executable, "-c", WORKER])
    closed = wire.report("session_closed", session_id=session_id)
    assert closed["exit_code"] == 0 and closed["task_id"] == task_id
    kinds = [frame["type"] for _, frame in sorted(wire.told.items())]
    kinds = [kind for kind in kinds if kind != "session_activity"]  # if it is seen at work
    assert kinds == ["session_started", "task_report", "task_report", "session_closed"]
    started, complete = wire.reports("task_report", task_id=task_id, attempt=1)
    assert (started["outcome"], complete["outcome"]) == ("started", "complete")
    assert complete["result"] == {"got": {"a": 1}, "cwd": str(agent.work)}
    until(lambda: not list((agent.state / "sessions").iterdir()))


def test_a_failing_worker_fails_its_task_with_its_last_lines(agent, wire):
    code = "import sys; print('\\x1b[31mbroken\\x1b[0m'); sys.exit(3)"
    task_id, session_id = agent.task([sys.executable, "-c", code])
    report = wire.report("task_report", task_id=task_id, outcome="fail")
    assert report["error"] == "exit code 3\nbroken"
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 3


def test_a_killed_worker_is_reported_as_killed(agent, wire):
    task_id, session_id = agent.task(["/bin/sh", "-c", "kill -9 $$"])
    report = wire.report("task_report", task_id=task_id, outcome="fail")
    assert report["error"].startswith("exit code 137 (killed by SIGKILL)")
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 137


def test_a_program_that_does_not_exist_fails_with_127(agent, wire):
    task_id, _ = agent.task(["no-such-program"])
    error = wire.report("task_report", task_id=task_id, outcome="fail")["error"]
    assert error.startswith("exit code 127") and "cannot run no-such-program" in error


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"profile": "nonesuch"}, "profile nonesuch is not known"),
        ({"repo": "elsewhere"}, "no repo elsewhere"),
        ({"session_id": "../../etc/passwd"}, "not the id of a session"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_sentence(agent, wire, change, sentence):
    order = agent.order(**{"role": "worker", "profile": "command", "repo": "shop", **change})
    order["working_directory"] = None
    task = {"id": "t1", "title": "x", "command": ["true"]}
    wire.command("task_assigned", task=task, attempt=1, require_plan=False, start=order)
    error = wire.report("session_error")
    assert sentence in error["error"] and error["task_id"] == "t1" and error["attempt"] == 1
    assert not agent.tmux("list-sessions")


def test_a_task_without_command_and_a_missing_directory_are_errors(agent, wire):
    agent.task(None)
    assert "the task has none" in wire.report("session_error")["error"]
    missing = agent.session(working_directory="/nonexistent/dir")
    assert "does not exist" in wire.report("session_error", session_id=missing)["error"]


def test_one_attempt_has_at_most_one_live_session(agent, wire):
    task_id, first = agent.task(["sleep", "1000"])
    wire.report("session_started", session_id=first)
    _, second = agent.task(["sleep", "1000"], task_id=task_id)
    until(lambda: len(wire.reports("session_started", session_id=first)) == 2)
    assert not wire.reports("session_started", session_id=second)
    assert len(agent.tmux("list-sessions").splitlines()) == 1


def test_a_cancelled_worker_is_ended_without_a_report(agent, wire):
    task_id, session_id = agent.task(
        ["/bin/sh", "-c", "trap '' HUP; echo on; sleep 1000; sleep 1000"]
    )
    until(lambda: b"on" in wire.output(session_id))
    wire.command(
        "task_cancelled", session_id=session_id, task_id=task_id, attempt=1, reason="no longer"
    )
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 137
    assert len(wire.reports("task_report", task_id=task_id)) == 1


def be_patient(agent):
    """It leaves programs a minute to end."""
    agent.kill()
    agent.config.write_text(agent.config.read_text().replace("grace_s: 0.5", "grace_s: 60"))
    agent.start()


def test_a_closed_session_gets_a_hang_up_first(agent, wire):
    be_patient(agent)
    session_id = agent.session()
    wire.report("session_started", session_id=session_id)
    wire.command("session_close", session_id=session_id, force=False)
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 129


def test_who_misses_the_first_hang_up_gets_another(agent, wire):
    be_patient(agent)
    deaf_once = "trap 'trap - HUP; echo missed' HUP; echo on; while :; do sleep 0.1; done"
    session_id = agent.session(command=["sh", "-c", deaf_once])
    until(lambda: b"on" in wire.output(session_id))
    wire.command("session_close", session_id=session_id, force=False)
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 129
    assert b"missed" in wire.output(session_id)


# ---------------------------------------------------------------------------- output


def test_the_log_of_fast_programs_is_complete_from_the_first_byte(agent, wire):
    code = "print('first é'); print('\\n'.join(f'line {i}' for i in range(3000)))"
    sessions = [agent.python(code) for _ in range(10)]
    want = "first é\r\n" + "".join(f"line {i}\r\n" for i in range(3000))
    for session_id in sessions:
        closed = wire.report("session_closed", session_id=session_id)
        assert closed["exit_code"] == 0 and closed["log_end"] == len(want.encode())
        until(lambda s=session_id: len(wire.output(s)) >= len(want.encode()))
        assert wire.output(session_id).decode() == want
    assert wire.log_repeats == 0


def test_output_survives_the_agent_being_killed_in_the_middle(agent, wire):
    code = (
        "import time\nfor i in range(60000):\n"
        "    print(f'{i:08d}' + 'x' * 40)\n    i % 2000 or time.sleep(0.05)\ninput()"
    )
    session_id = agent.python(code)
    for size in (100_000, 900_000, 1_700_000):
        until(lambda size=size: len(wire.output(session_id)) > size)
        agent.kill()
        agent.start()
    want = "".join(f"{i:08d}{'x' * 40}\r\n" for i in range(60000)).encode()
    until(lambda: wire.output(session_id) == want)
    assert agent.type(session_id, "")["ok"]
    closed = wire.report("session_closed", session_id=session_id)
    until(lambda: len(wire.output(session_id)) == closed["log_end"])
    assert wire.output(session_id) == want + b"\r\n"
    assert len(wire.reports("session_recovered", session_id=session_id)) == 3


def test_a_dead_pipe_is_mended_and_declared(agent, wire):
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    agent.tmux("pipe-pane", "-t", f"=orc-{session_id[:12]}:")
    gap = wire.report("session_gap", session_id=session_id)
    assert gap["to"] is None and "recording" in gap["why"]
    assert agent.type(session_id, "after the gap")["ok"]
    until(lambda: b"after the gap" in wire.output(session_id))


def test_screens_and_scrollback_are_sent(agent, wire):
    session_id = agent.python(
        "print('\\n'.join(map(str, range(100)))); import time; time.sleep(99)"
    )
    screens = lambda: [f for f in wire.moments if f["type"] == "session_screen"]  # noqa: E731
    until(lambda: screens() and "99" in screens()[-1]["lines"])
    wire.say("capture_scrollback", session_id=session_id)
    back = until(lambda: [f for f in wire.moments if f["type"] == "scrollback_captured"])[0]
    assert back["lines"][:100] == [str(i) for i in range(100)]


# ---------------------------------------------------------------------------- typing


READER = """
import sys
while True:
    line = sys.stdin.readline()
    print("got", repr(line), flush=True)
"""


@pytest.mark.parametrize(
    "text",
    [
        "-l dashes first",
        "ends with;",
        ";",
        "C-c",
        "Enter",
        "$(touch canary) `touch canary` 'q' \"qq\" #{pane_id} \\",
        "grüße 日本語 🙂",
    ],
)
def test_typed_text_arrives_as_it_is(agent, wire, text):
    session_id = agent.python(READER)
    wire.report("session_started", session_id=session_id)
    answer = agent.type(session_id, text)
    assert answer["ok"] and answer["why"] is None
    want = ("got " + repr(text + "\n")).encode()
    until(lambda: want in wire.output(session_id))
    assert not (agent.work / "canary").exists()


def test_several_lines_arrive_in_order(agent, wire):
    session_id = agent.python(READER)
    wire.report("session_started", session_id=session_id)
    assert agent.type(session_id, "one\ntwo\r\nthree")["ok"]
    got = re.compile(rb"got 'one\\n'.*got 'two\\n'.*got 'three\\n'", re.S)
    until(lambda: got.search(wire.output(session_id)))


def test_typing_leaves_copy_mode_and_refuses_escapes_and_the_dead(agent, wire):
    session_id = agent.python(READER)
    wire.report("session_started", session_id=session_id)
    agent.tmux("copy-mode", "-t", f"=orc-{session_id[:12]}:")
    assert agent.type(session_id, "hello")["ok"]
    until(lambda: b"got 'hello" in wire.output(session_id))
    refused = agent.type(session_id, "a\x1b[201~rm -rf\n")
    assert not refused["ok"] and "control characters" in refused["why"]
    assert not agent.type(str(uuid.uuid4()), "x")["ok"]


def test_a_long_text_arrives_whole(agent, wire):
    code = (
        "import sys, tty; tty.setraw(0); data = b''\n"
        "print('ready', end='', flush=True)\n"
        "while not data.endswith(b'\\r'): data += sys.stdin.buffer.raw.read(65536)\n"
        "import hashlib; print(hashlib.sha256(data[:-1]).hexdigest())"
    )
    session_id = agent.python(code)
    until(lambda: b"ready" in wire.output(session_id))
    text = "".join(f"line {i} äöü\n" for i in range(8000))
    assert agent.type(session_id, text)["ok"]
    until(lambda: hashlib.sha256(text.encode()).hexdigest().encode() in wire.output(session_id))


def test_raw_input_is_passed_byte_by_byte(agent, wire):
    code = (
        "import sys, tty; tty.setraw(0); print('ready', end='', flush=True); data = b''\n"
        "while len(data) < 3256: data += sys.stdin.buffer.raw.read(4096)\n"
        "print(data[:256].hex() == bytes(range(256)).hex() and data[256:] == b'z' * 3000)"
    )
    session_id = agent.python(code)
    until(lambda: b"ready" in wire.output(session_id))
    data = bytes(range(256)) + b"z" * 3000
    wire.say("session_input", session_id=session_id, data=base64.b64encode(data).decode())
    until(lambda: b"True" in wire.output(session_id))


def test_resize_reaches_the_program(agent, wire):
    session_id = agent.session(command=["/bin/sh", "-c", "while read x; do stty size; done"])
    wire.report("session_started", session_id=session_id)
    assert agent.type(session_id, "")["ok"]
    until(lambda: b"30 100" in wire.output(session_id))
    wire.say("session_resize", session_id=session_id, cols=132, rows=50)
    assert agent.type(session_id, "")["ok"]
    until(lambda: b"50 132" in wire.output(session_id))


def test_a_task_for_an_existing_session_is_typed_as_one_line(agent, wire):
    session_id = agent.python(READER)
    wire.report("session_started", session_id=session_id)
    task_id = "0b7e4a52-4c1d-4f0e-9d3a-6a1f0e9c7b21"
    task = {"id": task_id, "title": "Do\x1b[31m; touch canary\nnow"}
    wire.command("task_assigned", task=task, attempt=1, require_plan=False, session_id=session_id)
    line = f"New task for you. Run: orchestratia task view {task_id}"
    until(lambda: line.encode() in wire.output(session_id))
    assert not (agent.work / "canary").exists()


# ---------------------------------------------------------------------------- secrets


def test_no_secret_stands_on_a_command_line_or_leaks_into_a_session(rig, wire):
    rig.env["ORCHESTRATIA_API_KEY"] = "orc_canary_of_the_agent"
    agent = rig.start()
    session_id = agent.python("import os, time; print(dict(os.environ)); time.sleep(1000)")
    until(lambda: b"orcs_canary_session_key" in wire.output(session_id))
    assert "canary" not in running()
    assert b"orc_canary" not in wire.output(session_id)
    loose = [
        path
        for path in [agent.state, *agent.state.rglob("*")]
        if path.stat().st_mode & 0o077 and not path.is_symlink()
    ]
    assert loose == []


def test_a_plain_session_is_a_login_shell_that_finds_orchestratia(agent, wire):
    session_id = agent.session()
    wire.report("session_started", session_id=session_id)
    assert agent.type(session_id, "echo path=${PATH%%:*} task=$ORCHESTRATIA_TASK_ID. tty=$-")["ok"]
    want = f"path={agent.state / 'bin'} task=. tty="
    until(lambda: want in wire.output(session_id).decode().replace("\r\n", ""))
    assert (agent.state / "bin" / "orchestratia").exists()


# ---------------------------------------------------------------------------- faults


def test_lost_answers_have_no_second_effect(agent, wire):
    wire.lose_answers = 5
    task_id, session_id = agent.task(["true"])
    wire.report("session_closed", session_id=session_id)
    until(lambda: not wire.lose_answers)
    assert [f["type"] for _, f in sorted(wire.told.items())].count("session_closed") == 1
    assert wire.repeats == 0


def test_the_hub_restarts_and_nothing_is_lost(agent, wire):
    session_id = agent.session(command=["/bin/sh", "-c", "while read x; do echo got $x; done"])
    wire.report("session_started", session_id=session_id)
    wire.close()
    wire.forget()
    agent.tmux("send-keys", "-t", f"=orc-{session_id[:12]}:", "away", "C-m", "C-d")
    wire.open()
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 0
    until(lambda: b"got away" in wire.output(session_id))
    assert len(wire.syncs) == 2


def test_unacknowledged_reports_are_sent_again(agent, wire):
    wire.ack_spool = False
    session_id = agent.session(command=["true"])
    wire.report("session_closed", session_id=session_id)
    until(lambda: wire.repeats)
    wire.ack_spool = True
    until(lambda: not list((agent.state / "sessions").iterdir()))


def test_an_agent_killed_and_restarted_takes_up_its_sessions(agent, wire):
    task_id, session_id = agent.task(["/bin/sh", "-c", "read x; echo $x; exit 7"])
    wire.report("task_report", task_id=task_id, outcome="started")
    agent.kill()
    agent.start()
    assert wire.syncs[-1]["sessions"][0]["alive"]
    assert wire.report("session_recovered")["tmux_name"] == f"orc-{session_id[:12]}"
    assert agent.type(session_id, "on")["ok"]
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 7
    assert wire.reports("task_report", outcome="fail")[0]["error"].startswith("exit code 7")


def test_a_session_that_ended_while_the_agent_was_away_is_reported(agent, wire):
    task_id, session_id = agent.task(["/bin/sh", "-c", "read x; exit 5"])
    wire.report("task_report", task_id=task_id, outcome="started")
    agent.kill()
    agent.tmux("send-keys", "-t", f"=orc-{session_id[:12]}:", "C-m")
    agent.start()
    assert wire.report("session_closed", session_id=session_id)["exit_code"] == 5
    assert wire.report("task_report", task_id=task_id, outcome="fail")


def test_sessions_of_a_dead_tmux_are_closed_without_a_report(agent, wire):
    task_id, session_id = agent.task(["sleep", "1000"])
    wire.report("task_report", task_id=task_id, outcome="started")
    agent.kill()
    agent.tmux("kill-server")
    agent.start()
    assert wire.syncs[-1]["sessions"][0]["alive"] is False
    assert wire.report("session_closed", session_id=session_id)["exit_code"] is None
    assert len(wire.reports("task_report", task_id=task_id)) == 1


def test_commands_written_down_before_a_crash_run_after_it_once(agent, wire):
    agent.kill()
    store = Store(agent.state / "state.db")
    order = agent.order(command=["sleep", "1000"])
    store.receive(wire.epoch, [{"type": "session_start", "id": 900, **order}])
    store.close()
    agent.start()
    wire.report("session_started", session_id=order["session_id"])
    wire.say("session_start", id=900, **order)
    until(lambda: 900 in wire.acked)
    assert len(agent.tmux("list-sessions").splitlines()) == 1
    assert len(wire.reports("session_started", session_id=order["session_id"])) == 1


def test_strange_tmux_sessions_are_adopted_or_closed(rig, wire):
    adopted = str(uuid.uuid4())
    for name in ("orc-aaaaaaaa-bbb", "orc-cccccccc-ddd", "mine"):
        rig.tmux("new-session", "-d", "-s", name, "--", "cat")
    wire.adopt = {"orc-aaaaaaaa-bbb": {"session_id": adopted}}
    agent = rig.start()
    names = lambda: set(agent.tmux("list-sessions", "-F", "#{session_name}").split())  # noqa: E731
    until(lambda: names() == {"orc-aaaaaaaa-bbb", "mine"})
    assert {s["tmux_name"] for s in wire.syncs[0]["sessions"]} == {
        "orc-aaaaaaaa-bbb",
        "orc-cccccccc-ddd",
    }
    wire.report("session_gap", session_id=adopted)
    assert agent.type(adopted, "hello there")["ok"]
    until(lambda: b"hello there" in wire.output(adopted))


def test_a_worker_whose_notes_are_lost_goes_on_where_the_hubs_record_ends(rig, wire):
    """And one that has ended meanwhile, which comes before it, holds nobody up."""
    dead, alive = str(uuid.uuid4()), str(uuid.uuid4())
    rig.tmux("new-session", "-d", "-s", "mine", "--", "cat")
    rig.tmux("set-option", "-wg", "remain-on-exit", "on")
    rig.tmux("new-session", "-d", "-s", "orc-a", "--", "sh", "-c", "exit 3")
    rig.tmux("new-session", "-d", "-s", "orc-b", "--", "sh", "-c", "read word; echo got $word")
    until(lambda: "1" in rig.tmux("list-panes", "-a", "-F", "#{pane_dead}"))
    wire.logs[alive] = bytearray(100)
    known = {"task_id": "t", "attempt": 2, "profile": "command", "log_acked": 100}
    wire.adopt = {"orc-a": {"session_id": dead}, "orc-b": {"session_id": alive, **known}}
    rig.start()
    assert wire.report("session_gap", session_id=alive)["from"] == 100
    rig.tmux("send-keys", "-t", "=orc-b:", "hello", "Enter")
    done = wire.report("task_report", session_id=alive)
    assert (done["outcome"], done["task_id"], done["attempt"]) == ("complete", "t", 2)
    until(lambda: wire.output(alive)[100:].endswith(b"got hello\r\n"))
    assert wire.report("session_closed", session_id=dead)["exit_code"] == 3


def test_it_stops_within_a_second_and_leaves_tmux_alone(agent, wire):
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    start = time.monotonic()
    assert agent.stop() == 0
    assert time.monotonic() - start < 1.5
    assert len(agent.tmux("list-sessions").splitlines()) == 1
    text = (agent.state / "agent.log").read_text()
    assert f"connected to {wire.url} as dev" in text and "canary" not in text


def test_a_revoked_key_is_said_and_sessions_go_on(agent, wire):
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    agent.kill()
    text = agent.config.read_text()
    agent.config.write_text(text.replace(API_KEY, "orc_revoked"))
    with (agent.home / "stderr").open("ab") as errors:
        agent.process = subprocess.Popen(agent.arguments(), env=agent.env, stderr=errors)
    until(lambda: "This key is not known" in (agent.state / "agent.log").read_text())
    assert agent.process.poll() is None
    assert len(agent.tmux("list-sessions").splitlines()) == 1


def test_a_program_heeds_signals_that_its_agent_was_told_to_ignore(tmp_path):
    """An agent started with nohup, or in the background of a script, ignores some."""
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    (tmp_path / "output.log").touch()
    order = {
        "argv": ["grep", "SigIgn", "/proc/self/status"],
        "env": {},
        "cwd": str(tmp_path),
        "log": str(tmp_path / "output.log"),
    }
    (tmp_path / "run.json").write_text(json.dumps(order))
    said = subprocess.run(
        [sys.executable, str(ROOT / "agent.py"), "--exec-session", str(tmp_path / "run.json")],
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
        capture_output=True,
        text=True,
        timeout=60,
    )
    mask = int(said.stdout.split()[1], 16)
    assert [number for number in ignored if mask >> (number - 1) & 1] == []


# ---------------------------------------------------------------------------- tmux that goes


STUBBORN = "trap '' HUP; echo on; while :; do sleep 0.1; done"


def server_pid(agent):
    return int(agent.tmux("display-message", "-p", "#{pid}"))


@pytest.mark.parametrize("away", [False, True], ids=["at work", "away"])
def test_no_program_outlives_a_session_that_is_said_to_be_gone(agent, wire, away):
    """Its task is given out again: two must not work on it."""
    task_id, session_id = agent.task(["/bin/sh", "-c", STUBBORN])
    until(lambda: b"on" in wire.output(session_id))
    if away:
        agent.kill()
    os.kill(server_pid(agent), signal.SIGKILL)
    if away:
        agent.start()
    assert wire.report("session_closed", session_id=session_id)["exit_code"] is None
    until(lambda: session_id not in running(), 2)


@pytest.mark.parametrize("away", [False, True], ids=["at work", "away"])
def test_a_tmux_whose_socket_was_removed_is_no_tmux_that_has_ended(agent, wire, away):
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    if away:
        agent.kill()
    path = agent.home / f"tmux-{os.getuid()}" / f"orc-{SERVER_ID[:8]}"
    before = server_pid(agent)
    path.unlink()
    if away:
        agent.start()
    other = agent.session(command=["cat"])
    wire.report("session_started", session_id=other)
    assert server_pid(agent) == before
    for number in (session_id, other):
        assert agent.type(number, "still here")["ok"]
        until(lambda number=number: b"still here" in wire.output(number))
    assert not wire.reports("session_closed")


def test_a_tmux_that_lives_and_cannot_be_reached_has_lost_nothing(agent, wire):
    """Its socket is gone and cannot be made anew, as where there is no room for it."""
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    path = agent.home / f"tmux-{os.getuid()}" / f"orc-{SERVER_ID[:8]}"
    path.unlink()
    path.mkdir()
    until(lambda: "tmux runs and cannot be reached" in (agent.state / "agent.log").read_text(), 40)
    path.rmdir()
    until(lambda: path.is_socket(), 40)
    assert agent.type(session_id, "still here")["ok"]
    until(lambda: b"still here" in wire.output(session_id))
    assert not wire.reports("session_closed")


# ---------------------------------------------------------------------------- a full disk


def test_an_agent_starts_although_nothing_can_be_written(agent, wire):
    session_id = agent.session(command=["cat"])
    wire.report("session_started", session_id=session_id)
    agent.kill()
    cli = agent.state / "bin" / "orchestratia"
    was = cli.read_text()
    cli.write_text("of an older version")
    with contextlib.closing(sqlite3.connect(agent.state / "state.db")) as db:
        db.execute("SELECT * FROM meta").fetchall()  # it is open: nothing of it goes or is made
        full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))  # noqa: E731
        seen = len(wire.syncs)
        agent.process = subprocess.Popen(
            agent.arguments(), env=agent.env, stderr=subprocess.PIPE, text=True, preexec_fn=full
        )
        until(lambda: len(wire.syncs) > seen)
        assert agent.type(session_id, "hello")["ok"]
        until(lambda: b"hello" in wire.output(session_id))
        assert not wire.reports("session_recovered")
        resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        wire.report("session_recovered", session_id=session_id)
        until(lambda: cli.read_text() == was)
    agent.kill()
    errors = agent.process.stderr.read()
    agent.process.stderr.close()
    assert "is put off" in errors and "Traceback" not in errors


# ---------------------------------------------------------------------------- the doctor


def test_a_proxy_that_answers_in_the_hubs_place_is_found(rig):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<h1>Please sign in</h1>")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    rig.config.write_text(rig.config.read_text().replace(rig.wire.url, url))
    said = subprocess.run(
        rig.arguments("--doctor", "--json"), env=rig.env, capture_output=True, text=True
    )
    server.shutdown()
    server.server_close()
    [hub] = [one for one in json.loads(said.stdout) if one["check"] == "hub"]
    assert (hub["state"], hub["says"]) == ("bad", f"What answers at {url} is not a hub.")
    assert "hub_url" in hub["do"] and said.returncode == 1
