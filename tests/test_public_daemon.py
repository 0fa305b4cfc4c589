"""The public daemon (protocol 1), which the hub serves unchanged: what it sends, byte by byte, by a
daemon written here by hand, and what it must never be sent."""

import base64
import json
import re
import subprocess
import threading
import time
import uuid

import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import auth
import inbox
import models
import moves
import nudges
import older
import permissions
import servers
import sessions
import sockets
import tasks
import terminals
from auth import HUB
from conftest import Client, wait_until
from test_live import Screen

MIB = 1024 * 1024
SYSTEM = {
    "cpu_count": 4,
    "cpu_percent": 3.1,
    "memory_total_gb": 15.6,
    "memory_used_gb": 4.2,
    "memory_percent": 27.0,
    "disk_total_gb": 99.9,
    "disk_used_gb": 12.5,
    "disk_percent": 13.0,
    "platform": "Linux",
    "platform_release": "6.8.0",
    "python_version": "3.12.3",
    "uptime_seconds": 1795000000,
    "os_username": "dev",
    "agent_version": "0.20.0",
}


def registering(token: str, **more) -> dict:
    """The body of a registration, with every key it has."""
    return {
        "name": "dev",
        "hostname": "dev.example",
        "ip": "0.0.0.0",
        "os": "linux",
        "repos": {"core": "/srv/core", "docs": ""},
        "system_info": SYSTEM,
        "registration_token": token,
        "machine_id": "0123456789abcdef0123456789abcdef",
        "mac_address": "aa:bb:cc:dd:ee:ff",
    } | more


class Daemon:
    """Speaks as the public daemon does: a socket with compression offered, HTTP beside it."""

    def __init__(self, url: str, key: str, inside: bool = True):
        """inside: the hub is of this process."""
        self.url, self.key, self.inside = url, key, inside
        self.http = requests.Session()
        self.http.trust_env = False
        self.socket = None
        self.heard: list[dict] = []
        self.sizes: list[int] = []
        self.old_sockets = []

    def ask(self, method: str, path: str, json=None):
        """Redirects are errors for it."""
        url = self.url.replace("ws://", "http://") + path
        headers = {"X-API-Key": self.key}
        return self.http.request(
            method, url, json=json, headers=headers, allow_redirects=False, timeout=10
        )

    def dial(self) -> dict:
        """Connect and say who it is; the first frame of the hub. An older socket stays open."""
        if self.socket:
            self.old_sockets.append(self.socket)
        self.heard = []
        # no header, no subprotocol, compression offered
        self.socket = connect(f"{self.url}/ws/server", proxy=None, legacy=True)
        self.say({"type": "auth", "api_key": self.key})
        return json.loads(self.socket.recv(5))

    def connect(self, *announced: dict) -> "Daemon":
        """The whole sequence: auth, announcements, the two calls, then it reads."""
        assert self.dial() == {"type": "auth_ok"}
        self.say(*announced)
        if announced and self.inside:
            self._wait_a_moment()
        assert self.ask("GET", "/api/v1/server/access-grants").json() == []
        assert isinstance(self.ask("GET", "/api/v1/server/approval-rules").json(), list)
        return self

    def _wait_a_moment(self) -> None:
        """So that a busy machine is not taken for a silent daemon: `quick` leaves it no time."""
        deadline = time.monotonic() + 1
        while not self.link()._daemon._named and time.monotonic() < deadline:
            time.sleep(0.01)

    def say(self, *frames: dict) -> None:
        for frame in frames:
            self.socket.send(json.dumps(frame))

    def _read(self, timeout: float) -> None:
        try:
            text = self.socket.recv(timeout)
        except TimeoutError:
            return
        self.sizes.append(len(text))
        frame = json.loads(text)
        check(frame)
        self.heard.append(frame)

    def told(self, kind: str, **fields) -> dict:
        """The next frame of that kind with those fields; what else comes is kept."""

        def found():
            sockets.links.remind()  # what the hub does every second
            match = (f for f in self.heard if f["type"] == kind and fields.items() <= f.items())
            frame = next(match, None)
            if frame is None:
                self._read(0.05)
            return frame

        frame = wait_until(found)
        self.heard.remove(frame)
        return frame

    def link(self):
        """The hub's end of the connection."""
        return sockets.links._links[auth.by_key(self.key).server_id]

    def types(self) -> list[str]:
        """Kinds of what has come and was not asked for, up to now."""
        mark = base64.b64encode(uuid.uuid4().bytes).decode()
        self.link().put({"type": "session_input", "session_id": "x", "data": mark})
        self.told("session_input", data=mark)
        return [frame["type"] for frame in self.heard]

    def started(self, session_id: str, **more) -> None:
        self.say(started(session_id, **more))
        wait_until(lambda: state(session_id) == "active")

    def close(self) -> None:
        for one in [*self.old_sockets, self.socket]:
            if one:
                one.close()
        self.http.close()


STRINGS = ("session_id", "project_id", "tmux_name", "task_id", "title", "content", "author", "data")


def check(frame: dict) -> None:
    """What would cost the daemon its connection."""
    assert isinstance(frame, dict) and isinstance(frame["type"], str) and "id" not in frame
    assert None not in frame.values(), frame
    for name in STRINGS:
        assert isinstance(frame.get(name, ""), str), frame
    for name in ("cols", "rows"):
        size = frame.get(name, 2)
        assert type(size) is int and 2 <= size <= 500, frame
    if "data" in frame:
        assert (
            base64.b64encode(base64.b64decode(frame["data"], validate=True)).decode()
            == (frame["data"])
        )
    assert frame["type"] not in ("task_rejected", "session_watch", "log_ack", "session_type")
    assert not frame.get("pending_approval")


def started(session_id: str, **more) -> dict:
    return {
        "type": "session_started",
        "session_id": session_id,
        "pid": 4711,
        "tmux_name": f"orc-{session_id[:12]}",
        "working_dir": "/srv/core",
    } | more


def recovered(tmux_name: str) -> dict:
    return {"type": "session_recovered", "tmux_name": tmux_name, "pid": 99, "working_dir": ""}


def output(session_id: str, data: bytes) -> dict:
    coded = base64.b64encode(data).decode()
    return {"type": "session_output", "session_id": session_id, "data": coded}


def row(session_id: str) -> dict:
    return models.one("SELECT * FROM session WHERE id = ?", (session_id,))


def state(session_id: str) -> str:
    return row(session_id)["state"]


def logged(session_id: str) -> bytes:
    assert sessions.logs().flush()
    return sessions.logs().read(session_id, 0, 100 * MIB).data


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What the daemon announces here is on its way for no time."""
    monkeypatch.setattr(older, "ANNOUNCED_S", 0.1)


@pytest.fixture
def register(served, world):
    """`register(name=…)`: register as the daemon does; the raw answer."""

    def ask(**more):
        if "registration_token" not in more:
            project = world.project("shop")["id"]
            more["registration_token"] = auth.registration_token(HUB, project, "http://h")["token"]
        body = registering(**({"token": ""} | more))
        url = served.replace("ws://", "http://")
        with requests.Session() as http:
            http.trust_env = False
            return http.post(f"{url}/api/v1/servers/register", json=body, timeout=10)

    return ask


@pytest.fixture
def daemon(served, world, register):
    """A daemon that has registered and connected."""
    answer = register().json()
    world.servers["dev"], world.keys["dev"] = answer["id"], answer["api_key"]
    made = Daemon(served, answer["api_key"])
    made.connect()
    yield made
    made.close()


@pytest.fixture
def session_id(world, daemon) -> str:
    """A plain session that runs there."""
    return begin(daemon)


def begin(daemon: Daemon, **more) -> str:
    data = {"server_id": "dev", "name": f"s-{uuid.uuid4().hex[:6]}"} | more
    made, _ = sessions.open_session(HUB, data)
    daemon.told("session_start", session_id=made["id"])
    daemon.started(made["id"])
    return made["id"]


@pytest.fixture
def agent_session(world, daemon) -> str:
    """A session in which an agent works on task A."""
    world.task("A")
    world.assign("A", server="dev")
    session_id = begin(daemon, task_id=world.ids["A"])
    world.start("A")
    daemon.told("task_assigned")
    daemon.heard.clear()
    return session_id


# ── registration, signs of life, polls ────────────────────────────────────────────────────────


def test_it_registers_with_all_it_says_of_itself(world, register):
    answer = register()
    assert answer.ok and answer.json()["api_key"].startswith("orc_") and answer.json()["id"]
    server = models.one("SELECT * FROM server")
    assert (server["name"], server["hostname"], server["os"]) == ("dev", "dev.example", "linux")
    assert (server["protocol"], server["slots"]) == (1, 6)
    shown = servers.server_json(server)
    assert shown["repos"]["core"] == {"path": "/srv/core", "branch": None}
    assert shown["system_info"]["address"] == "127.0.0.1"
    assert shown["manual"] is True


@pytest.mark.parametrize(
    "odd",
    [
        {"system_info": dict.fromkeys(SYSTEM)},
        {"system_info": {}},
        {"system_info": None, "repos": None, "mac_address": None, "machine_id": None},
        {"system_info": SYSTEM | {"cpu_count": "many", "new": [1]}, "something": "new"},
        {"system_info": SYSTEM | {"cpu_count": 10**30}},
        {"machine_id": "", "repos": {}},
    ],
    ids=str,
)
def test_nothing_it_says_of_its_machine_is_needed(register, odd):
    answer = register(**odd)
    assert answer.ok, answer.text
    assert models.one("SELECT slots FROM server")["slots"] >= 1


@pytest.mark.parametrize("token", ["", "orcreg_aHR0cDovL2g.wrong", "used"])
def test_a_token_that_is_not_valid_is_401_with_a_detail(world, register, token):
    if token == "used":
        token = auth.registration_token(HUB, world.project("shop")["id"], "http://h")["token"]
        assert register(registration_token=token).ok
    answer = register(registration_token=token, name="other")
    assert answer.status_code == 401
    assert isinstance(answer.json()["detail"], str)


def test_the_same_machine_registers_again_and_the_old_key_is_dead(world, daemon, register):
    again = register().json()
    assert again["id"] == world.servers["dev"] and again["api_key"] != daemon.key
    assert daemon.ask("POST", "/api/v1/servers/heartbeat", {}).status_code == 401
    with pytest.raises(ConnectionClosed):
        while True:
            daemon.socket.recv(10)


def test_a_heartbeat_is_answered_and_kept(world, daemon):
    body = {"system_info": SYSTEM | {"cpu_percent": 77.0}}
    assert daemon.ask("POST", "/api/v1/servers/heartbeat", body).ok
    assert servers.server_json(world.server_row("dev"))["system_info"]["cpu_percent"] == 77.0
    for odd in ({}, {"system_info": None}, {"system_info": dict.fromkeys(SYSTEM)}):
        assert daemon.ask("POST", "/api/v1/servers/heartbeat", odd).ok


@pytest.mark.parametrize("path", ["files/pending", "files/pulls/pending", "access-grants"])
def test_what_it_polls_is_a_bare_empty_array(daemon, path):
    answer = daemon.ask("GET", f"/api/v1/server/{path}")
    assert (answer.status_code, answer.json()) == (200, [])
    assert answer.headers["Content-Type"].startswith("application/json")


def test_rules_are_a_bare_array_as_its_hooks_read_them(world, daemon):
    answer = daemon.ask("GET", "/api/v1/server/approval-rules")
    assert (answer.status_code, type(answer.json())) == (200, list)
    project = world.project("shop")["id"]
    made = permissions.add_rule(
        HUB, {"project_id": project, "tool": "Bash", "pattern": "make clean", "action": "deny"}
    )
    daemon.told("approval_rules_updated")
    said = daemon.ask("GET", "/api/v1/server/approval-rules").json()
    [rule] = [r for r in said if r["id"] == made["id"]]
    assert rule == {
        "id": made["id"],
        "name": "Bash make clean",
        "is_active": True,
        "tool_pattern": "Bash",
        "param_pattern": "make clean",
        "scope_type": "project",
        "scope_id": project,
        "agent_filter": "all",
        "action": "deny",
    }


def test_its_permission_log_is_answered_with_exactly_201(daemon):
    entry = {
        "session_id": None,
        "project_id": None,
        "tool_name": "Bash",
        "tool_input": {"command": "ls"},
        "decision": "asked",
        "matched_rule_id": None,
        "reason": None,
        "agent_name": None,
        "created_at": "2026-11-22T17:30:00+00:00",
    }
    for entries in ([entry], [], [entry] * 500):
        answer = daemon.ask("POST", "/api/v1/server/permissions/log", {"entries": entries})
        assert answer.status_code == 201 and answer.json() == {"accepted": len(entries)}


def test_its_mcp_status_and_the_health_check_are_answered(daemon, session_id):
    for said in ("written", "merged", "workspace_readonly", "unsupported", "skipped"):
        path = f"/api/v1/server/sessions/{session_id}/mcp-status"
        assert daemon.ask("PATCH", path, {"mcp_status": said}).status_code == 200
    assert daemon.ask("GET", "/api/v1/health").status_code == 200


def test_no_path_it_asks_is_redirected_and_every_error_is_json(daemon):
    for path in ("files/pending/", "access-grants/"):
        assert daemon.ask("GET", f"/api/v1/server/{path}").status_code in (200, 404)
    daemon.key = "orc_nobody"
    for method, path in (
        ("POST", "servers/heartbeat"),
        ("GET", "server/files/pending"),
        ("POST", "server/permissions/log"),
    ):
        answer = daemon.ask(method, f"/api/v1/{path}", {} if method == "POST" else None)
        assert answer.status_code == 401 and isinstance(answer.json()["detail"], str)


# ── the socket ────────────────────────────────────────────────────────────────────────────────


def test_it_is_welcomed_at_once_and_first_of_all(world, daemon):
    sessions.open_session(HUB, {"server_id": "dev"})  # there is something to say
    began = time.monotonic()
    assert daemon.dial() == {"type": "auth_ok"}
    assert time.monotonic() - began < 5
    assert world.server_row("dev")["protocol"] == 1
    assert world.server_row("dev")["agent_version"] == "0.20.0"


@pytest.mark.parametrize("key", ["orc_wrong", "", None, 3])
def test_a_key_that_is_not_valid_gets_no_welcome_and_is_closed(daemon, key):
    daemon.key = key
    assert daemon.dial()["type"] == "auth_error"
    with pytest.raises(ConnectionClosed):
        daemon.socket.recv(5)


def test_nothing_is_said_until_it_listens(world, daemon):
    assert daemon.dial() == {"type": "auth_ok"}
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    for _ in range(3):
        sockets.links.remind()
        daemon._read(0.05)
    assert daemon.heard == []
    assert daemon.ask("GET", "/api/v1/server/access-grants").ok
    assert daemon.told("session_start")["session_id"] == made["id"]


def test_a_daemon_that_never_asks_for_its_grants_is_told_all_the_same(world, daemon, monkeypatch):
    monkeypatch.setattr(older, "ANNOUNCED_MOST_S", 0.1)
    assert daemon.dial() == {"type": "auth_ok"}
    sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")


def test_the_newest_socket_wins_and_the_older_is_closed(world, daemon, session_id):
    old = daemon.socket  # a zombie: still open, still answering pings
    daemon.connect(started(session_id, recovered=True))
    with pytest.raises(ConnectionClosed):
        while True:
            assert json.loads(old.recv(10))["type"] != "session_input"
    sessions.type_raw(HUB, session_id, "YQ==")
    assert daemon.told("session_input")["data"] == "YQ=="
    assert state(session_id) == "active"


def test_what_a_superseded_socket_still_says_ends_nothing(world, daemon, session_id):
    daemon.connect(started(session_id, recovered=True))
    wait_until(lambda: daemon.old_sockets[0].close_code or not daemon.old_sockets[0].recv(5))
    assert state(session_id) == "active"
    assert world.server_row("dev")["online"]


def test_it_may_offer_compression_and_send_pings(daemon):
    assert daemon.socket.ping().wait(5)
    assert daemon.socket.protocol.extensions == []


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "3",
        "null",
        '{"type": null}',
        '{"type": ["session_output"]}',
        "{}",
        '{"type": "something_new", "x": 1}',
        '{"type": "session_started"}',
        '{"type": "session_started", "session_id": "not-a-uuid"}',
        '{"type": "session_started", "session_id": 3, "tmux_name": []}',
        '{"type": "session_recovered", "tmux_name": ""}',
        '{"type": "session_recovered", "tmux_name": {"a": 1}}',
        '{"type": "session_output", "session_id": "nowhere", "data": "YQ=="}',
        '{"type": "session_output", "session_id": "nowhere", "data": "?"}',
        '{"type": "session_output", "data": 3}',
        '{"type": "session_screen", "session_id": "nowhere", "lines": 3}',
        '{"type": "session_closed", "session_id": null, "exit_code": "x"}',
        '{"type": "session_error", "session_id": "nowhere", "error": null}',
        '{"type": "scrollback_captured", "session_id": "nowhere"}',
        '{"type": "session_working_dir", "session_id": "nowhere", "working_dir": null}',
        '{"type": "fs_stat_result", "ok": false}',
        '{"type": "file", "request_id": "r", "ok": true}',
        '{"type": "governance_decision_request", "request_id": "r"}',
    ],
)
def test_what_cannot_be_used_is_passed_over_and_the_socket_stays(daemon, session_id, text):
    daemon.socket.send(text)
    daemon.say(output(session_id, b"still here"))
    wait_until(lambda: logged(session_id) == b"still here")


def test_odd_frames_about_a_session_of_its_own_do_no_harm(daemon, session_id):
    for odd in (
        {"type": "session_output", "data": "Y"},
        {"type": "session_output", "data": None},
        {"type": "session_screen", "lines": None},
        {"type": "session_error", "error": ["x"]},
        {"type": "scrollback_captured", "lines": {}},
        {"type": "session_working_dir", "working_dir": 3},
    ):
        daemon.say(odd | {"session_id": session_id})
    daemon.say(output(session_id, b"still here") | {"new_field": {"a": 1}})
    wait_until(lambda: logged(session_id) == b"still here")
    assert state(session_id) == "active"


def test_a_session_of_another_server_is_not_its_own(world, daemon):
    world.server("other")
    made, _ = sessions.open_session(HUB, {"server_id": "other"})
    daemon.say(
        started(made["id"]),
        output(made["id"], b"forged"),
        {"type": "session_closed", "session_id": made["id"], "exit_code": 0},
    )
    daemon.types()
    assert state(made["id"]) == "starting" and logged(made["id"]) == b""


# ── a session's life ──────────────────────────────────────────────────────────────────────────


def test_a_session_starts_with_every_field_sound(world, daemon):
    made, _ = sessions.open_session(
        HUB, {"server_id": "dev", "repo": "core", "cols": 500, "rows": 2, "role": "orchestrator"}
    )
    assert daemon.told("session_start") == {
        "type": "session_start",
        "session_id": made["id"],
        "project_id": world.project("shop")["id"],
        "role": "orchestrator",
        "cols": 500,
        "rows": 2,
        "working_directory": "/srv/core",
    }
    daemon.say(output(made["id"], b"$ "), started(made["id"]))  # in this order, too
    wait_until(lambda: state(made["id"]) == "active")
    session = row(made["id"])
    assert (session["pid"], session["working_directory"]) == (4711, "/srv/core")
    assert (session["terminal"], session["tmux_name"]) == ("tmux", f"orc-{made['id'][:12]}")
    assert logged(made["id"]) == b"$ "


def test_a_session_for_an_agent_says_which(world, daemon):
    sessions.open_session(HUB, {"server_id": "dev", "profile": "codex", "role": "worker"})
    start = daemon.told("session_start")
    assert (start["agent_type"], start["role"]) == ("codex_cli", "worker")
    assert "working_directory" not in start


def test_a_command_is_typed_into_the_shell_that_was_started(world, daemon):
    made, _ = sessions.open_session(
        HUB, {"server_id": "dev", "command": ["claude", "--model", "a b"]}
    )
    daemon.told("session_start")
    daemon.say(started(made["id"]))
    typed = base64.b64decode(daemon.told("session_input")["data"])
    assert typed == b"claude --model 'a b'\r"
    daemon.connect(started(made["id"], recovered=True))
    assert daemon.types() == []  # and once only


def test_a_start_that_fails_fails_the_session_and_its_task(world, daemon):
    world.task("A")
    world.assign("A", server="dev")
    made, _ = sessions.open_session(HUB, {"server_id": "dev", "task_id": world.ids["A"]})
    daemon.told("session_start")
    daemon.say({"type": "session_error", "session_id": made["id"], "error": "no pty"})
    wait_until(lambda: state(made["id"]) == "failed")
    assert row(made["id"])["error"] == "no pty"
    assert world.status("A") == "failed"
    world.check()


def test_a_start_without_an_answer_is_given_up_and_never_repeated(world, daemon, monkeypatch):
    monkeypatch.setattr(older, "START_S", 0.2)
    world.task("A", max_attempts=2)
    world.assign("A", server="dev")
    made, _ = sessions.open_session(HUB, {"server_id": "dev", "task_id": world.ids["A"]})
    daemon.told("session_start")
    wait_until(lambda: sockets.links.remind() or state(made["id"]) == "failed")
    assert "did not say" in row(made["id"])["error"]
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    assert world.row("A")["session_id"] is None
    daemon.connect()
    assert daemon.types() == []
    daemon.say(started(made["id"]))  # it has, but much too late
    assert daemon.told("session_close")["session_id"] == made["id"]
    assert state(made["id"]) == "failed"
    world.check()


def test_a_start_in_doubt_is_not_sent_again_on_a_new_socket(world, daemon):
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")
    daemon.connect()
    assert daemon.types() == []
    assert state(made["id"]) == "starting"
    daemon.connect(started(made["id"], recovered=True))
    wait_until(lambda: state(made["id"]) == "active")
    assert daemon.types() == []


def test_a_start_in_doubt_is_given_up_on_a_new_socket(world, daemon, monkeypatch):
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")
    monkeypatch.setattr(older, "START_S", 0.1)
    monkeypatch.setattr(older, "ANNOUNCED_MOST_S", 0.1)
    daemon.connect()
    wait_until(lambda: sockets.links.remind() or state(made["id"]) == "failed")
    assert daemon.types() == []


def test_a_start_is_sent_once_however_many_sockets_there_are(world, daemon):
    for _ in range(3):
        daemon.connect()
    made = [sessions.open_session(HUB, {"server_id": "dev"})[0]["id"] for _ in range(3)]
    starts = [daemon.told("session_start")["session_id"] for _ in made]
    assert sorted(starts) == sorted(made)
    for _ in range(3):
        daemon.connect()
    assert daemon.types() == []


def test_keys_pass_as_they_are_but_for_a_terminals_own_answers(daemon, session_id):
    keys = bytes(range(256))
    sessions.type_raw(HUB, session_id, base64.b64encode(keys).decode())
    assert base64.b64decode(daemon.told("session_input")["data"]) == keys
    answer = base64.b64encode(b"a\x1b[>0;276;0cb").decode()
    sessions.type_raw(HUB, session_id, answer)
    assert base64.b64decode(daemon.told("session_input")["data"]) == b"ab"


@pytest.mark.parametrize("size", [1, 599_998, 599_999, 600_000])
def test_a_paste_is_split_below_1_mib_and_arrives_whole(daemon, session_id, size):
    data = (bytes(range(256)) * 2400)[:size]
    sessions.type_raw(HUB, session_id, base64.b64encode(data).decode())
    got = b""
    while len(got) < size:
        got += base64.b64decode(daemon.told("session_input")["data"])
    assert got == data and max(daemon.sizes) < MIB


def test_threads_that_send_at_once_do_not_mix_their_frames(daemon, session_id):
    texts = [f"{n}:" + chr(97 + n) * 20_000 for n in range(8)]
    threads = [
        threading.Thread(
            target=sessions.type_raw,
            args=(HUB, session_id, base64.b64encode(t.encode()).decode()),
        )
        for t in texts
    ]
    for thread in threads:
        thread.start()
    got = [base64.b64decode(daemon.told("session_input")["data"]).decode() for _ in texts]
    for thread in threads:
        thread.join()
    assert sorted(got) == texts


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("make test", b"make test"),
        ("two\nlines\r\nand three\n", b"two lines and three"),
        ("-x;", b"-x;"),
        ("tab\there", b"tab here"),
        ("grüße", "grüße".encode()),
    ],
)
def test_a_text_is_typed_on_one_line_and_submitted(daemon, session_id, text, keys):
    sessions.type_text(HUB, session_id, text)
    assert daemon.told("session_exit_copy_mode")["session_id"] == session_id
    assert base64.b64decode(daemon.told("session_input")["data"]) == keys
    assert base64.b64decode(daemon.told("session_input")["data"]) == b"\r"


@pytest.mark.parametrize("text", ["stop\x03", "\x1b[A", "\x9b1~"])
def test_a_text_that_holds_keys_is_not_typed(daemon, session_id, text):
    with pytest.raises(models.Conflict, match="control characters"):
        sessions.type_text(HUB, session_id, text)
    assert daemon.types() == []


def test_a_resize_reaches_it_within_its_limits(daemon, session_id):
    sessions.resize(HUB, session_id, 100, 30)
    size = daemon.told("session_resize")
    assert (size["session_id"], size["cols"], size["rows"]) == (session_id, 100, 30)


def test_the_screen_it_sends_is_shown(daemon, session_id):
    screen = {"type": "session_screen", "session_id": session_id, "lines": ["$ ls", "a"]}
    daemon.say(screen)
    wait_until(lambda: sessions.screen(HUB, session_id)["lines"] == ["$ ls", "a"])


def test_where_it_works_is_kept(daemon, session_id):
    daemon.say(
        {"type": "session_working_dir", "session_id": session_id, "working_dir": "/srv/docs"}
    )
    wait_until(lambda: row(session_id)["working_directory"] == "/srv/docs")


# ── its end ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("force", [False, True])
def test_closing_really_closes(daemon, session_id, force):
    sessions.close_session(HUB, session_id, force=force)
    daemon.told("session_close", session_id=session_id)
    assert daemon.types() == (["session_kill"] if force else [])  # never alone
    daemon.say({"type": "session_closed", "session_id": session_id, "exit_code": 1})
    wait_until(lambda: state(session_id) == "closed")
    assert row(session_id)["exit_code"] is None  # it is that of the client of tmux
    wait_until(lambda: not models.rows("SELECT * FROM command WHERE acked_at IS NULL"))


def test_without_tmux_the_exit_code_is_the_programs_own(world, daemon):
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")
    daemon.started(made["id"], tmux_name="")
    assert row(made["id"])["terminal"] == "pty"
    daemon.say({"type": "session_closed", "session_id": made["id"], "exit_code": 3})
    wait_until(lambda: state(made["id"]) == "closed")
    assert row(made["id"])["exit_code"] == 3


@pytest.mark.parametrize("code", [0, None, -9, 1, "x", True])
def test_a_session_that_ends_without_a_report_fails_its_task(world, daemon, agent_session, code):
    daemon.say({"type": "session_closed", "session_id": agent_session, "exit_code": code})
    wait_until(lambda: state(agent_session) == "closed")
    assert world.status("A") == "failed"
    assert "exit code unknown" in world.json("A")["result"]["error"]
    world.check()


def test_a_close_that_is_not_confirmed_counts_and_is_said_again_if_it_was_wrong(
    world, daemon, session_id, monkeypatch
):
    monkeypatch.setattr(older, "CLOSE_S", 0.2)
    sessions.close_session(HUB, session_id)
    daemon.told("session_close")
    wait_until(lambda: sockets.links.remind() or state(session_id) == "closed")
    daemon.connect(recovered(f"orc-{session_id[:12]}"))
    told = daemon.told("session_recovered_ack")
    assert told["session_id"] == session_id
    assert daemon.told("session_close")["session_id"] == session_id
    assert state(session_id) == "closed"


def test_a_close_it_could_not_hear_is_said_when_it_is_back(world, daemon, session_id):
    daemon.socket.close()
    wait_until(lambda: state(session_id) == "disconnected")
    sessions.close_session(HUB, session_id)
    daemon.connect(started(session_id, recovered=True))
    daemon.told("session_close", session_id=session_id)
    daemon.connect(started(session_id, recovered=True))  # it had not acted on it
    daemon.told("session_close", session_id=session_id)
    daemon.say({"type": "session_closed", "session_id": session_id, "exit_code": 1})
    wait_until(lambda: state(session_id) == "closed")


# ── output ────────────────────────────────────────────────────────────────────────────────────


def test_its_output_is_stored_as_the_log_once_and_as_bytes(world, daemon, session_id):
    text = "grüße ✓ ".encode() * 3000
    for start in range(0, len(text), 4095):  # through the middle of characters
        daemon.say(output(session_id, text[start : start + 4095]))
    wait_until(lambda: len(logged(session_id)) == len(text))
    daemon.connect(started(session_id, recovered=True))
    daemon.say(output(session_id, b"after"))
    wait_until(lambda: logged(session_id) == text + b"after")
    [mark] = sessions.logs().marks(session_id)
    assert (mark["kind"], mark["from"], mark["to"]) == ("gap", len(text), None)
    assert "connection" in mark["why"]


def test_frames_far_above_1_mib_are_taken(daemon, session_id, admin):
    data = bytes(range(256)) * 8 * 1024
    daemon.say(output(session_id, data))
    wait_until(lambda: logged(session_id) == data)
    lines = [f"{n} " + "x" * 1000 for n in range(8000)]
    daemon.say({"type": "session_screen", "session_id": session_id, "lines": lines})
    wait_until(lambda: len(sessions.screen(HUB, session_id)["lines"]) == 500)


@pytest.fixture
def watch(served, admin):
    opened = []

    def open_one(session_id: str) -> Screen:
        token = admin.headers["Authorization"].partition(" ")[2]
        first = {"type": "resume", "offset": None}
        opened.append(Screen(f"{served}/ws/terminal/{session_id}", token, first))
        return opened[-1]

    yield open_one
    for screen in opened:
        screen.close()
    wait_until(lambda: not any(s.watchers for s in terminals.streams._streams.values()))


def repainted(daemon: Daemon, session_id: str, data: bytes) -> None:
    """What tmux does when its window changes its size and changes it back."""
    sizes = [daemon.told("session_resize", session_id=session_id) for _ in range(2)]
    assert sizes[0]["rows"] != sizes[1]["rows"] == row(session_id)["rows"]
    daemon.say(output(session_id, data))


def test_who_watches_gets_a_repaint_then_what_comes_live(daemon, session_id, watch):
    daemon.say(output(session_id, b"nobody looked"))
    wait_until(lambda: logged(session_id))
    screen = watch(session_id)
    repainted(daemon, session_id, b"<screen>")
    daemon.say(output(session_id, b" and on"))
    screen.until_shows(b"<screen> and on")
    assert screen.data == older.ATTACHED + b"<screen> and on"
    assert logged(session_id) == b"nobody looked<screen> and on"


def test_after_a_new_socket_everybody_is_repainted(daemon, session_id, watch):
    screen = watch(session_id)
    repainted(daemon, session_id, b"<screen>")
    screen.until_shows(b"<screen>")
    daemon.connect(started(session_id, recovered=True))
    repainted(daemon, session_id, b"<anew>")
    screen.until_shows(b"<anew>")
    assert screen.data == older.ATTACHED + b"<anew>"


def test_without_tmux_the_picture_is_what_was_printed_last(world, daemon, watch):
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")
    daemon.started(made["id"], tmux_name="")
    daemon.say(output(made["id"], b"x" * 100_000), output(made["id"], b"$ make"))
    wait_until(lambda: len(logged(made["id"])) == 100_006)
    screen = watch(made["id"])
    screen.until_shows(b"$ make")
    daemon.say(output(made["id"], b" test"))
    screen.until_shows(b"$ make test")
    assert screen.data == b"x" * (len(screen.data) - 11) + b"$ make test"
    assert "session_resize" not in daemon.types()


def test_the_whole_history_is_shown_to_who_asks_for_it(daemon, session_id, watch):
    screen = watch(session_id)
    screen.say({"type": "scrollback"})
    daemon.told("capture_scrollback", session_id=session_id)
    lines = [f"line {n}" for n in range(3000)]
    daemon.say({"type": "scrollback_captured", "session_id": session_id, "lines": lines})
    assert screen.until("scrollback")["lines"] == lines


def test_a_history_that_cannot_be_read_is_said_so(daemon, session_id, watch):
    screen = watch(session_id)
    screen.say({"type": "scrollback"})
    daemon.told("capture_scrollback", session_id=session_id)
    failed = {"type": "scrollback_captured", "lines": [], "error": "no tmux"}
    daemon.say(failed | {"session_id": session_id})
    assert "no tmux" in screen.until("scrollback")["lines"][0]


# ── it comes back ─────────────────────────────────────────────────────────────────────────────


def test_sessions_are_disconnected_with_its_socket_and_back_with_the_next(
    world, daemon, session_id
):
    daemon.socket.close()
    wait_until(lambda: state(session_id) == "disconnected")
    with pytest.raises(models.Conflict, match="cannot be reached"):
        sessions.type_raw(HUB, session_id, "YQ==")
    before = world.now()
    daemon.connect(started(session_id, recovered=True))
    wait_until(lambda: state(session_id) == "active")
    assert "session_lost" not in world.types(after=before)


def test_after_its_restart_a_session_is_recovered_by_its_tmux_name(world, daemon, session_id):
    sessions.resize(HUB, session_id, 90, 25)
    daemon.socket.close()
    wait_until(lambda: state(session_id) == "disconnected")
    name = f"orc-{session_id[:12]}"
    daemon.connect(recovered(name))
    ack = {"type": "session_recovered_ack", "tmux_name": name, "session_id": session_id}
    assert daemon.told("session_recovered_ack") == ack
    size = daemon.told("session_resize")  # it has attached in 120x40
    assert (size["session_id"], size["cols"], size["rows"]) == (session_id, 90, 25)
    assert state(session_id) == "recovering"
    sessions.settle_recovering(time.time() + sessions.GRACE_S + 1)
    assert state(session_id) == "active"
    daemon.say(output(session_id, b"on we go"))
    wait_until(lambda: logged(session_id) == b"on we go")


def test_the_acknowledgement_comes_before_anything_else(world, daemon, session_id, watch):
    watch(session_id)
    daemon.told("session_resize")
    daemon.socket.close()
    wait_until(lambda: state(session_id) == "disconnected")
    name = f"orc-{session_id[:12]}"
    daemon.dial()
    daemon.say(recovered(name))
    daemon.told("session_recovered_ack", tmux_name=name)  # at once, it need not have listened
    daemon.say(output(session_id, b"<screen>"))
    wait_until(lambda: logged(session_id) == b"<screen>")


def test_a_session_that_is_known_to_it_by_its_tmux_name_only_is_recovered_too(
    world, daemon, session_id
):
    name = f"orc-{session_id[:12]}"
    daemon.connect(started(name, tmux_name=name, recovered=True), output(name, b"hello"))
    told = daemon.told("session_recovered_ack")
    assert (told["tmux_name"], told["session_id"]) == (name, session_id)
    daemon.say({"type": "session_screen", "session_id": name, "lines": ["hello"]})
    wait_until(lambda: sessions.screen(HUB, session_id)["lines"] == ["hello"])
    assert logged(session_id) == b"hello"
    daemon.say({"type": "session_closed", "session_id": name, "exit_code": 0})
    wait_until(lambda: state(session_id) == "closed")
    assert len(models.rows("SELECT id FROM session")) == 1


def test_a_tmux_session_nobody_knows_is_adopted_once(world, daemon):
    daemon.connect(recovered("orc-9e8d7c6b-5a4"), recovered("orc-mine"))
    ids = {}
    for _ in range(2):
        told = daemon.told("session_recovered_ack")
        ids[told["tmux_name"]] = told["session_id"]
        assert str(uuid.UUID(told["session_id"])) == told["session_id"]
    assert {state(i) for i in ids.values()} == {"recovering"}
    daemon.connect(recovered("orc-9e8d7c6b-5a4"), recovered("orc-mine"))
    for name, session_id in ids.items():
        assert daemon.told("session_recovered_ack", tmux_name=name)["session_id"] == session_id
    assert len(models.rows("SELECT id FROM session")) == 2


def test_a_session_it_has_under_an_id_nobody_knows_is_adopted_under_that(world, daemon):
    unknown = str(uuid.uuid4())
    daemon.connect(started(unknown, recovered=True), output(unknown, b"$ "))
    wait_until(lambda: logged(unknown) == b"$ ")
    assert state(unknown) == "recovering"
    sessions.type_raw(HUB, unknown, "YQ==")
    assert daemon.told("session_input")["session_id"] == unknown


def test_what_it_does_not_announce_is_lost_and_may_be_revived(world, daemon, agent_session):
    other = begin(daemon)
    daemon.connect(started(other, recovered=True))
    wait_until(lambda: sockets.links.remind() or state(agent_session) == "lost")
    assert state(other) == "active"
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    name = f"orc-{agent_session[:12]}"
    daemon.say(recovered(name))  # late, on the same socket
    assert daemon.told("session_recovered_ack")["session_id"] == agent_session
    wait_until(lambda: state(agent_session) == "recovering")
    world.check()


def test_an_adopted_session_that_is_gone_is_lost_too(world, daemon):
    daemon.connect(recovered("orc-mine"))
    session_id = daemon.told("session_recovered_ack")["session_id"]
    daemon.connect()
    wait_until(lambda: sockets.links.remind() or state(session_id) == "lost")


def test_a_lost_session_that_it_still_had_is_revived(world, daemon, session_id):
    daemon.connect()
    wait_until(lambda: sockets.links.remind() or state(session_id) == "lost")
    daemon.connect(started(session_id, recovered=True))
    wait_until(lambda: state(session_id) == "recovering")


def test_nothing_is_lost_before_it_is_back(world, daemon, session_id):
    daemon.socket.close()
    wait_until(lambda: state(session_id) == "disconnected")
    sockets.links.remind()
    assert state(session_id) == "disconnected"
    daemon.dial()
    sockets.links.remind()
    assert state(session_id) == "disconnected"  # it may still say that it has it


# ── tasks and nudges ──────────────────────────────────────────────────────────────────────────


def test_a_task_that_lands_there_waits_for_a_session(world, daemon):
    world.task("A", auto_assign=True, command=["make"])
    assert (world.status("A"), world.on("A")) == ("assigned", "dev")
    assert world.row("A")["session_id"] is None and daemon.types() == []


def test_even_before_it_has_connected_no_worker_is_planned_for_it(world, register):
    world.servers["dev"] = register().json()["id"]
    servers.alive(world.servers["dev"])
    world.task("A", auto_assign=True, command=["make"])
    assert world.status("A") == "assigned" and world.row("A")["session_id"] is None


def test_a_session_for_a_task_is_started_then_told_of_it(world, daemon):
    world.task("A; $(rm -rf /) `x`", require_plan=True)
    world.assign("A; $(rm -rf /) `x`", server="dev")
    task_id = world.ids["A; $(rm -rf /) `x`"]
    made, _ = sessions.open_session(HUB, {"server_id": "dev", "task_id": task_id})
    start = daemon.told("session_start")
    assert (start["session_id"], start["role"]) == (made["id"], "worker")
    assert "task_assigned" not in daemon.types()  # there is nobody yet
    daemon.say(started(made["id"]))
    assert daemon.told("task_assigned") == {
        "type": "task_assigned",
        "session_id": made["id"],
        "task_id": task_id,
        "title": "A rm -rf x",
        "pending_approval": False,
        "require_plan": True,
    }
    again, made_now = sessions.open_session(HUB, {"server_id": "dev", "task_id": task_id})
    assert (again["id"], made_now) == (made["id"], False)


def test_a_task_for_a_session_that_is_there_is_told_at_once(world, daemon, session_id):
    world.task("A")
    world.assign("A", session=session_id)
    nudge = daemon.told("task_assigned")
    assert (nudge["session_id"], nudge["task_id"]) == (session_id, world.ids["A"])
    assert nudge["require_plan"] is nudge["pending_approval"] is False


def test_a_task_for_a_session_that_is_still_starting_is_told_when_it_has(world, daemon):
    made, _ = sessions.open_session(HUB, {"server_id": "dev"})
    daemon.told("session_start")
    world.task("A")
    world.assign("A", session=made["id"])
    assert "task_assigned" not in daemon.types()
    daemon.say(started(made["id"]))
    assert daemon.told("task_assigned")["task_id"] == world.ids["A"]


def test_what_is_said_while_it_is_away_is_said_once_when_it_is_back(world, daemon, agent_session):
    daemon.socket.close()
    wait_until(lambda: state(agent_session) == "disconnected")
    world.update("A", spec="something else")
    daemon.connect(recovered(f"orc-{agent_session[:12]}"))
    update = daemon.told("task_updated")
    assert update == {
        "type": "task_updated",
        "session_id": agent_session,
        "task_id": world.ids["A"],
    }
    daemon.connect(started(agent_session, recovered=True))
    assert daemon.types() == []


def test_a_cancelled_task_is_an_urgent_note_of_fixed_words(world, daemon, agent_session):
    world.cancel("A")
    note = daemon.told("task_note")
    assert (note["session_id"], note["urgent"], note["author"]) == (agent_session, True, "hub")
    assert world.ids["A"] in note["content"]


NASTY = [
    ("-rf", " -rf"),
    ("--help", " --help"),
    ("go on;", "go on; ."),
    (";", "; ."),
    ("-;", " -; ."),
    ("a\nb\r\nc\rd", "a b c d"),
    ("\x1b[31mred\x03\x04", "[31mred"),
    ("a\x00b\x7fc\x9bd", "a b c d"),
    ("line\u2028end\u2029", "line end"),
    ("\u202eevil", "evil"),
    ("  spaces  ", "spaces"),
    ("", nudges.EMPTY),
    (" \n ", nudges.EMPTY),
    ("use `foo()`; then $HOME & run", "use `foo()`; then $HOME & run"),
    ("x" * 5000, "x" * 2999 + "…"),
    ("grüße ✓ 中", "grüße ✓ 中"),
]


@pytest.mark.parametrize(("text", "shown"), NASTY, ids=lambda x: ascii(x)[:30])
def test_text_reaches_the_terminal_as_one_line_and_no_key(text, shown):
    assert nudges.typed(text) == shown


SHELL = set("`$;&|<>(){}[]*?!#~\\\"'\n\r\x1b=%^@:/+")


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ('fix "$(reboot)"', "fix reboot"),
        ("`id`; rm -rf ~ && x | y > z", "id rm -rf x y z"),
        ("-n", " -n"),
        ("!!", nudges.EMPTY),
        ("Über_größe 1.2, ok-ish", "Über_größe 1.2, ok-ish"),
        ("*(e:'id':)", "e id"),
        ("a\nb", "a b"),
        ("t" * 1000, "t" * 199 + "…"),
    ],
    ids=lambda x: ascii(x)[:30],
)
def test_a_title_holds_nothing_a_shell_acts_on(title, shown):
    assert nudges.harmless(title) == shown
    assert not SHELL & set(nudges.harmless(title).removesuffix(nudges.EMPTY))


def test_an_answer_reaches_whoever_asked(world, daemon, agent_session):
    asked, _ = inbox.ask(HUB, world.ids["A"], "which one?")
    inbox.answer(HUB, asked["id"], "-the `second`;\nreally;")
    assert daemon.told("intervention_response") == {
        "type": "intervention_response",
        "session_id": agent_session,
        "task_id": world.ids["A"],
        "response": "Answer: -the ｀second｀； really；",
    }


def test_a_plan_is_approved_or_sent_back(world, daemon):
    world.task("A", require_plan=True)
    world.assign("A", server="dev")
    session_id = begin(daemon, task_id=world.ids["A"])
    inbox.submit_plan(HUB, world.ids["A"], {"summary": "one"})
    inbox.revise(HUB, world.ids["A"], "smaller\nsteps;")
    revision = daemon.told("plan_revision")
    assert revision == {
        "type": "plan_revision",
        "session_id": session_id,
        "task_id": world.ids["A"],
        "feedback": "The plan is sent back: smaller steps；",
    }
    inbox.submit_plan(HUB, world.ids["A"], {"summary": "two"})
    inbox.approve(HUB, world.ids["A"], "but with tests")
    approved = daemon.told("plan_approved")
    assert approved == {
        "type": "plan_approved",
        "session_id": session_id,
        "task_id": world.ids["A"],
    }
    assert daemon.told("task_note")["content"] == "but with tests"


@pytest.mark.parametrize("urgent", [False, True])
def test_a_note_is_passed_on_to_whoever_works(world, daemon, agent_session, urgent):
    inbox.add_note(HUB, world.ids["A"], "use $HOME;\nplease", urgent=urgent)
    assert daemon.told("task_note") == {
        "type": "task_note",
        "session_id": agent_session,
        "task_id": world.ids["A"],
        "content": "use ＄HOME； please",
        "author": "hub",
        "urgent": urgent,
    }


def test_a_note_on_an_upstream_is_marked_as_such(world, daemon, agent_session):
    world.task("up")
    world.depend("A", "up", "related")
    inbox.add_note(HUB, world.ids["up"], "the API has changed")
    assert daemon.told("note_for_session") == {
        "type": "note_for_session",
        "target_session_id": agent_session,
        "content": "the API has changed",
        "author": "hub",
        "mentioned_via": "dependency",
    }


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    "text",
    [
        "x; touch owned",
        "$(touch owned) `touch owned` ${IFS}",
        "a && touch owned || touch owned & touch owned | touch owned",
        "> owned <in 2>&1",
        "'open \" quotes",
        "(touch owned) { touch owned; } !! !touch ^a^b",
        "back\\slash \\",
        "* ~ [a-z] {a,b} # all",
        "JWT (RS256), don't store; see src/auth.py:12 @ 50% + x=1?",
        "line\ntouch owned\rtouch owned",
    ],
)
def test_what_others_wrote_is_no_command_to_a_shell_that_reads_it(text, shell, tmp_path):
    """It stays readable, and a shell takes every word for a word."""
    line = nudges.spoken(text)
    command = [shell, "-c", f"printf '%s\\n' said {line}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["said", *line.split()], done.stderr
    assert list(tmp_path.iterdir()) == []
    assert re.findall(r"\w+", line) == re.findall(r"\w+", text)
    for kind, word in (("intervention_response", "response"), ("plan_revision", "feedback")):
        said = nudges.NUDGES[kind]({"id": "s"}, {word: f"touch owned {text}"})[word]
        subprocess.run([shell, "-c", said], cwd=tmp_path, capture_output=True)
        assert list(tmp_path.iterdir()) == []


def test_a_session_that_is_asked_hears_of_it(world, daemon, agent_session):
    world.working("B", server="other" if "other" in world.servers else None)
    inbox.ask(HUB, world.ids["B"], "Which port;\nreally?", target=agent_session)
    assert daemon.told("intervention_for_session") == {
        "type": "intervention_for_session",
        "target_session_id": agent_session,
        "question": "Which port； really?",
        "source": "hub",
    }


def test_an_orchestrator_is_told_how_its_task_ended(world, daemon):
    session_id = begin(daemon, role="orchestrator")
    world.task("A `id`", session_id=session_id)
    world.assign("A `id`", server="dev")
    world.start("A `id`")
    tasks.complete(HUB, world.ids["A `id`"], {"summary": "$(done) & dusted"})
    assert daemon.told("task_status_update") == {
        "type": "task_status_update",
        "session_id": session_id,
        "task_id": world.ids["A `id`"],
        "title": "A id",
        "status": "done",
        "status_label": "done",
        "summary": "done dusted",
    }


def test_nudges_end_a_look_back_first(world, daemon, agent_session):
    world.update("A", spec="else")
    daemon.told("task_updated")
    assert [f["type"] for f in daemon.heard] == ["session_exit_copy_mode"]


def test_nobody_is_nudged_in_a_session_that_has_ended(world, daemon, agent_session):
    daemon.say({"type": "session_closed", "session_id": agent_session, "exit_code": 0})
    wait_until(lambda: state(agent_session) == "closed")
    with models.transaction() as tx:
        moves.command(tx, world.servers["dev"], "task_updated", agent_session, world.row("A"))
    assert daemon.types() == []
    wait_until(lambda: not world.commands("dev"))


# ── limits, and the key in every session ──────────────────────────────────────────────────────


def test_a_server_has_no_more_sessions_than_its_daemon_can_read(world, daemon):
    for _ in range(6):  # cpu_count + 2
        sessions.open_session(HUB, {"server_id": "dev"})
    with pytest.raises(models.Conflict, match="the most its daemon can serve"):
        sessions.open_session(HUB, {"server_id": "dev"})


def test_every_program_of_its_sessions_has_its_key_which_may_administer_nothing(
    app, world, daemon, session_id
):
    program = Client(app).as_server(daemon.key)
    for method, path in (
        ("POST", "servers/tokens"),
        ("POST", "sessions"),
        ("POST", f"sessions/{session_id}/input"),
        ("GET", f"sessions/{session_id}/output"),
        ("GET", "users"),
        ("POST", f"servers/{world.servers['dev']}/revoke"),
    ):
        body = {"server_id": "dev", "data": "YQ=="} if method == "POST" else None
        assert program.open(method, path, json=body).status_code == 403, path


def test_a_revoked_daemon_is_closed_and_not_let_in_again(world, daemon):
    servers.revoke(HUB, "dev")
    with pytest.raises(ConnectionClosed):
        while True:
            daemon.socket.recv(10)
    assert daemon.dial()["type"] == "auth_error"


def test_an_agent_of_ours_may_take_its_place_and_then_starts_workers(world, daemon):
    daemon.close()
    daemon.socket = connect(f"{daemon.url}/ws/server", proxy=None, legacy=True)
    daemon.say({"type": "auth", "api_key": daemon.key, "protocol": 2, "instance": "i"})
    assert json.loads(daemon.socket.recv(5))["protocol"] == 2
    daemon.say({"type": "sync", "instance": "i", "sessions": []})
    assert json.loads(daemon.socket.recv(5))["type"] == "sync_ok"
    world.task("A", auto_assign=True, command=["make"])
    assert world.row("A")["session_id"]


# ── with a real hub ───────────────────────────────────────────────────────────────────────────


def test_a_daemon_of_a_real_hub_from_registration_to_the_end_of_a_session(shop):
    token = shop.api("POST", "servers/tokens", {})["token"]
    answer = shop.http.post(
        f"{shop.url}/api/v1/servers/register", json=registering(token), timeout=10
    )
    key = answer.json()["api_key"]
    daemon = Daemon(shop.url.replace("http://", "ws://"), key, inside=False).connect()
    try:
        made = shop.api("POST", "sessions", {"server_id": "dev", "name": "one"})
        daemon.told("session_start", session_id=made["id"])
        daemon.say(started(made["id"]))
        wait_until(lambda: shop.api("GET", "sessions/one")["status"] == "active")
        shop.api("POST", "sessions/one/input", {"text": "make"})
        assert base64.b64decode(daemon.told("session_input")["data"]) == b"make"
        daemon.say(output(made["id"], b"$ make\r\n"))
        wait_until(lambda: shop.ask("GET", "sessions/one/output").content == b"$ make\r\n")
        shop.restart()
        daemon.connect(started(made["id"], recovered=True))
        wait_until(lambda: shop.api("GET", "servers/dev")["status"] == "online")
        shop.api("POST", "sessions/one/close")
        daemon.told("session_close", session_id=made["id"])
        daemon.say({"type": "session_closed", "session_id": made["id"], "exit_code": 1})
        wait_until(lambda: shop.api("GET", f"sessions/{made['id']}")["status"] == "closed")
    finally:
        daemon.close()
