"""Sockets and streams against who should not be there: other sites, dead credentials, other
projects, rights that end while a socket is open, and messages that are none."""

import base64
import contextlib
import hashlib
import itertools
import json
import sqlite3
import threading
import time
import uuid

import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from conftest import PASSWORD, HubProcess, wait_until
from test_ws import Raw, frame, text

BINARY = 2


class Agent(threading.Thread):
    """An agent that starts what it is told to, and paints when somebody looks."""

    def __init__(self, hub, key: str):
        super().__init__(daemon=True)
        self.hub, self.key = hub, key
        self.spooled = 0
        self.heard: list[dict] = []
        self.keys: dict[str, str] = {}  # of the sessions it has started
        self.code = None  # with which the hub has closed
        self.socket = dial(hub, "/ws/server", max_size=None)
        self.instance = str(uuid.uuid4())
        self.say({"type": "auth", "api_key": key, "protocol": 2, "instance": self.instance})
        assert self.next()["type"] == "auth_ok"
        self.say({"type": "sync", "instance": self.instance, "sessions": []})
        assert self.next()["type"] == "sync_ok"
        self.start()

    def say(self, *frames: dict) -> None:
        for one in frames:
            self.socket.send(json.dumps(one))

    def next(self) -> dict:
        return json.loads(self.socket.recv(10))

    def spool(self, kind: str, **fields) -> dict:
        self.spooled += 1
        return {"type": kind, "spool": self.spooled} | fields

    def run(self):
        try:
            for message in self.socket:
                self.take(json.loads(message))
        except ConnectionClosed:
            pass
        self.code = self.socket.close_code

    def take(self, given: dict) -> None:
        self.heard.append(given)
        if "id" in given:
            self.say({"type": "ack", "ids": [given["id"]]})
        if given["type"] == "session_start":
            self.keys[given["session_id"]] = given["session_key"]
            self.say(self.spool("session_started", session_id=given["session_id"], pid=1))
        if given["type"] == "session_watch" and given["on"]:
            self.say(output(given["session_id"], b"<screen>", repaint=True))

    def told(self, kind: str) -> list[dict]:
        return [one for one in self.heard if one["type"] == kind]

    def settle(self) -> None:
        """Wait until the hub has taken everything said so far."""
        number = len(self.heard)
        self.say({"type": "ping", "n": number})
        wait_until(lambda: {"type": "pong", "n": number} in self.heard)

    def close(self) -> None:
        self.socket.close()
        self.join(10)


def output(session_id: str, data: bytes, **more) -> dict:
    coded = base64.b64encode(data).decode()
    return {"type": "session_output", "session_id": session_id, "data": coded} | more


def dial(hub, path: str, **kwargs):
    return connect(
        f"ws{hub.url[4:]}{path}",
        proxy=None,
        compression=None,
        legacy=True,
        max_queue=None,
        **kwargs,
    )


class Person:
    """A client of a socket: by header, cookie or first frame."""

    def __init__(self, hub, path: str, *first: dict, token=None, cookie=None, key=None):
        headers = {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if key:
            headers["X-API-Key"] = key
        if cookie:
            headers |= {"Cookie": f"orchestratia={cookie}", "Origin": hub.url}
        self.socket = dial(hub, path, additional_headers=headers)
        self.seen: list[dict] = []
        with contextlib.suppress(ConnectionClosed):
            self.say(*first)

    def say(self, *frames: dict) -> None:
        for one in frames:
            self.socket.send(json.dumps(one))

    def next(self, timeout=10) -> dict:
        self.seen.append(json.loads(self.socket.recv(timeout)))
        return self.seen[-1]

    def until(self, kind: str, **fields) -> dict:
        while True:
            found = self.next()
            if found["type"] == kind and fields.items() <= found.items():
                return found

    def end(self) -> int:
        """The code the hub closes with; what comes before it is in `seen`."""
        try:
            while True:
                self.next()
        except ConnectionClosed:
            return self.socket.close_code

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Scene:
    """A hub with two projects, people, an agent in each project and sessions on it."""

    def __init__(self, hub):
        self.hub = hub
        self.projects, self.agents, self.sessions = {}, {}, {}
        for name in ("shop", "other"):
            self.projects[name] = hub.api("POST", "projects", {"name": name})["id"]
            made = hub.register(f"dev-{name}", self.projects[name], machine_id=f"m-{name}")
            self.agents[name] = Agent(hub, made["api_key"])
            for role in ("plain", "orchestrator", "worker"):
                body = {"server_id": made["id"], "role": role, "name": f"{role}-{name}"}
                self.sessions[f"{role}-{name}"] = hub.api("POST", "sessions", body)["id"]
        for session in self.sessions.values():
            wait_until(lambda s=session: self.status(s) == "active")

    def status(self, session: str) -> str:
        return self.hub.api("GET", f"sessions/{session}")["status"]

    def path(self, name="plain-shop") -> str:
        return f"/ws/terminal/{self.sessions[name]}"

    def user(self, role="operator", project="shop") -> tuple[str, str]:
        """A new person of this role: (name, token)."""
        name = f"{role}-{uuid.uuid4().hex[:8]}"
        roles = {project: role} if role else {}
        self.hub.api("POST", "users", {"username": name, "password": PASSWORD, "roles": roles})
        return name, self.login(name)

    def login(self, name: str) -> str:
        body = {"username": name, "password": PASSWORD}
        return self.hub.api("POST", "auth/login", body)["token"]

    def key(self, role: str, project="shop") -> str:
        """The key of a server, or of the session of that role."""
        agent = self.agents[project]
        return agent.key if role == "server" else agent.keys[self.sessions[f"{role}-{project}"]]

    def spare(self, name: str) -> tuple[dict, Agent]:
        """Another server of the project, to be done away with."""
        made = self.hub.register(name, self.projects["shop"], machine_id=f"m-{name}")
        return made, Agent(self.hub, made["api_key"])

    def session(self, server: dict, name: str, role="plain") -> str:
        body = {"server_id": server["id"], "role": role, "name": name}
        made = self.hub.api("POST", "sessions", body)["id"]
        wait_until(lambda: self.status(made) == "active")
        return made

    def sql(self, statement: str, *values) -> None:
        with contextlib.closing(sqlite3.connect(self.hub.data / "hub.db", timeout=10)) as db, db:
            db.execute(statement, values)

    def rss(self) -> int:
        with open(f"/proc/{self.hub.process.pid}/status") as lines:
            return next(int(n.split()[1]) for n in lines if n.startswith("VmRSS")) * 1024

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    hub = HubProcess(tmp_path_factory.mktemp("hub"))
    try:
        made = Scene(hub)
        yield made
        made.close()
    finally:
        hub.stop()
        hub.http.close()
    assert not any("Traceback" in line for line in hub.lines), "".join(hub.lines)


RESUME = {"type": "resume", "offset": None}

# ── other sites ───────────────────────────────────────────────────────────────────────────────

# {port} is the hub's; what the browser says, and whether that is the hub
ORIGINS = {
    "http://127.0.0.1:{port}": True,
    "http://evil.example": False,
    "http://127.0.0.1:{port}1": False,
    "http://127.0.0.1:81": False,
    "http://127.0.0.1": False,
    "https://127.0.0.1:{port}": False,
    "http://127.0.0.1:{port}/": False,
    "HTTP://127.0.0.1:{port}": False,
    "http://sub.127.0.0.1:{port}": False,
    "http://127.0.0.1.evil.example:{port}": False,
    "http://evil.example#127.0.0.1:{port}": False,
    "http://evil@127.0.0.1:{port}": False,
    "http://localhost:{port}": False,
    "http://127.1:{port}": False,
    "http://0x7f000001:{port}": False,
    "http://[::ffff:127.0.0.1]:{port}": False,
    "http://127.0.0.1:{port}, http://evil.example": False,
    "null": False,
    "file://": False,
    "": False,
    "*": False,
}
STREAM = "/api/v1/events/stream"


def asked(scene, path: str, **headers) -> tuple[int, str]:
    """The status of the answer to a request, and its body if it is an error."""
    if path == STREAM:
        headers |= {"upgrade": None, "connection": None}
    headers = {"host": scene.hub.url.removeprefix("http://")} | headers
    with Raw(scene.hub.settings["port"], path, **headers) as raw:
        body = raw.data
        while raw.status >= 400 and len(body) < int(raw.headers["content-length"]):
            body += raw.sock.recv(65536)
        return raw.status, body.decode()


def all_paths(scene) -> tuple[str, ...]:
    return scene.path(), "/ws/dashboard", "/ws/server", STREAM


def test_no_other_site_gets_a_byte_whatever_it_carries(scene):
    port, token = scene.hub.settings["port"], scene.hub.login()
    carried = (
        {"cookie": f"orchestratia={token}"},
        {"authorization": f"Bearer {token}"},
        {"cookie": f"orchestratia={token}", "authorization": "Basic YTpi"},
        {},
    )
    wrong = []
    for path, credential, (origin, own) in itertools.product(
        all_paths(scene), carried, ORIGINS.items()
    ):
        status, body = asked(scene, path, origin=origin.format(port=port), **credential)
        opened = (status in (200, 101)) if credential or path != STREAM else status == 401
        refused = status == 403 and json.loads(body)["code"] == "origin"
        if not (opened if own else refused):
            wrong.append((path, credential, origin, status, body))
    assert not wrong


def test_a_cookie_alone_opens_no_socket_without_an_origin(scene):
    cookie = {"cookie": f"orchestratia={scene.hub.login()}"}
    for more in ({}, {"authorization": "Basic YTpi"}, {"authorization": "Bearer "}):
        for path in (scene.path(), "/ws/dashboard", "/ws/server"):
            status, body = asked(scene, path, **cookie, **more)
            assert (status, json.loads(body)["code"]) == (403, "origin"), (path, more)
    assert asked(scene, STREAM, **cookie)[0] == 200  # a page's own request names none


def test_the_address_the_hub_was_asked_at_is_its_own(scene):
    cookie = {"cookie": f"orchestratia={scene.hub.login()}"}
    host = f"localhost:{scene.hub.settings['port']}"
    for path in all_paths(scene):
        for origin, right in (
            (f"http://{host}", (200, 101)),
            (scene.hub.url, (200, 101)),  # the one it is known by
            ("http://localhost", (403,)),
            (f"http://localhost.evil.example:{scene.hub.settings['port']}", (403,)),
        ):
            assert asked(scene, path, host=host, origin=origin, **cookie)[0] in right, origin


# ── credentials ───────────────────────────────────────────────────────────────────────────────


def bad_tokens(scene) -> dict[str, str]:
    token = scene.hub.login()
    _, expired = scene.user()
    scene.sql(
        "UPDATE token SET expires_at = ? WHERE hash = ?",
        time.time() - 1,
        hashlib.sha256(expired.encode()).hexdigest(),
    )
    _, left = scene.user()
    scene.hub.api("POST", "auth/logout", {}, token=left)
    registration = scene.hub.api("POST", "servers/tokens", {"project_id": "shop"})["token"]
    key, worker = scene.key("server"), scene.key("worker")
    return {
        "tampered": token[:-1] + ("A" if token[-1] != "A" else "B"),
        "cut": token[:-1],
        "longer": token + "A",
        "expired": expired,
        "signed out": left,
        "registration": registration,
        "unknown key": "orc_" + "x" * 43,
        "tampered key": key[:-1] + ("A" if key[-1] != "A" else "B"),
        "tampered session key": worker[:-1] + ("A" if worker[-1] != "A" else "B"),
        "a session's key for another": f"orcs_{scene.sessions['plain-other']}"
        + worker[worker.index(".") :],
        "no secret": worker.partition(".")[0],
        "SQL": "' OR 1=1 --",
        "NUL": "orct_\0",
    }


def test_a_credential_that_is_none_opens_nothing_in_whichever_way_it_comes(scene):
    for what, secret in bad_tokens(scene).items():
        for path in (scene.path(), "/ws/dashboard"):
            ways = [{"first": {"type": "auth", "token": secret}}]
            if secret.isprintable():
                ways += [{"token": secret}, {"key": secret}]
                ways += [{"cookie": secret}] if " " not in secret else []
            for way in ways:
                first = [way.pop("first")] if "first" in way else []
                with Person(scene.hub, path, *first, RESUME, **way) as person:
                    assert person.end() == 4401, (what, path, way)
                    assert [f["type"] for f in person.seen] == ["error"], what
        with Person(scene.hub, "/ws/server", hello(secret)) as person:
            assert person.end() == 4401, what
            assert [f["type"] for f in person.seen] == ["auth_error"], what


def hello(key) -> dict:
    return {"type": "auth", "api_key": key, "protocol": 2, "instance": "i"}


@pytest.mark.parametrize(
    "first",
    [
        {},
        RESUME,
        {"type": "auth"},
        {"type": "auth", "token": None},
        {"type": "auth", "token": ["x"]},
        {"type": "auth", "token": ""},
        {"type": ["auth"], "token": "x"},
    ],
    ids=json.dumps,
)
def test_a_first_message_that_says_nobody_opens_nothing(scene, first):
    for path in (scene.path(), "/ws/dashboard"):
        with Person(scene.hub, path, first, {"type": "auth", "token": scene.hub.login()}) as person:
            assert person.end() == 4401
            assert [f["type"] for f in person.seen] == ["error"]


def test_the_agents_socket_is_for_servers_alone(scene):
    for key, code in (
        (scene.hub.login(), 4401),
        (scene.key("worker"), 4403),
        (scene.key("orchestrator"), 4403),
        (None, 4401),
        (["orc_"], 4401),
    ):
        with Person(scene.hub, "/ws/server", hello(key), token=scene.hub.login()) as person:
            assert person.end() == code
            assert [f["type"] for f in person.seen] == ["auth_error"]


# ── who may do what ───────────────────────────────────────────────────────────────────────────

DOING = (
    {"type": "input", "data": "YQ=="},
    {"type": "resize", "cols": 90, "rows": 30},
    {"type": "take_size"},
    {"type": "take_size", "cols": 90, "rows": 30},
)


@pytest.mark.parametrize("who", ["viewer", "orchestrator"])
def test_whoever_may_only_watch_types_nothing(scene, who):
    agent = scene.agents["shop"]
    given = {"key": scene.key(who)} if who == "orchestrator" else {"token": scene.user(who)[1]}
    with Person(scene.hub, scene.path(), RESUME, **given) as person:
        assert person.until("state")["may_type"] is False
        assert base64.b64decode(person.until("output")["data"]) == b"<screen>"
        agent.heard.clear()
        for act in DOING:
            person.say(act)
            assert person.until("error")["code"] == "forbidden"
        person.say({"type": "scrollback"})
        wait_until(lambda: agent.told("capture_scrollback"))
        assert not agent.told("session_input") and not agent.told("session_resize")


def test_an_operator_does(scene):
    agent = scene.agents["shop"]
    agent.heard.clear()
    with Person(scene.hub, scene.path(), RESUME, token=scene.user()[1]) as person:
        assert person.until("state")["may_type"] is True
        person.say(*DOING)
        wait_until(lambda: agent.told("session_input") and len(agent.told("session_resize")) == 3)
        assert person.until("size", yours=True)


def test_another_projects_session_is_one_that_does_not_exist(scene):
    foreign, none = scene.sessions["plain-other"], str(uuid.uuid4())
    callers = [{"token": scene.user(role)[1]} for role in ("viewer", "operator", "admin", "")]
    callers += [{"key": scene.key(role)} for role in ("server", "worker", "orchestrator")]
    for caller in callers:
        answers = []
        for ref in (foreign, none, foreign[:8], "plain-other", "x OR 1=1"):
            path = f"/ws/terminal/{requests.utils.quote(ref)}"
            with Person(scene.hub, path, RESUME, **caller) as person:
                assert person.end() == 4404
                answers.append(json.dumps(person.seen).replace(ref, "REF"))
        assert len(set(answers)) == 1


def test_keys_that_may_not_watch_are_told_so(scene):
    for role in ("server", "worker"):
        with Person(scene.hub, scene.path("worker-shop"), RESUME, key=scene.key(role)) as person:
            assert person.end() == 4403
            assert [f["type"] for f in person.seen] == ["error"]


def test_one_sees_the_events_of_ones_own_projects(scene):
    callers = [{"token": scene.user(role)[1]} for role in ("viewer", "operator", "admin")]
    callers += [{"key": scene.key(role)} for role in ("server", "worker", "orchestrator", "plain")]
    everything = {"type": "resume", "after": 0}
    people = [Person(scene.hub, "/ws/dashboard", everything, **caller) for caller in callers]
    made = [
        scene.hub.api("POST", "tasks", {"title": "x", "project_id": p}) for p in ("other", "shop")
    ]
    for person in people:
        person.until("task_event", task_id=made[1]["id"])
        assert scene.projects["other"] not in json.dumps(person.seen)
        assert made[0]["id"] not in json.dumps(person.seen)
        person.close()


# ── rights that end ───────────────────────────────────────────────────────────────────────────


def ends_of(scene) -> dict:
    api = scene.hub.api
    return {
        "signed out": lambda name, token: api("POST", "auth/logout", {}, token=token),
        "disabled": lambda name, token: api("PATCH", f"users/{name}", {"disabled": True}),
        "deleted": lambda name, token: api("DELETE", f"users/{name}"),
        "new password": lambda name, token: api(
            "PATCH", f"users/{name}", {"password": "another one"}
        ),
    }


def within_a_second(person: Person, since: float) -> int:
    code = person.end()
    assert time.monotonic() - since < 1
    return code


@pytest.mark.parametrize("end", ["signed out", "disabled", "deleted", "new password"])
@pytest.mark.parametrize("way", ["header", "cookie", "frame"])
def test_open_sockets_end_with_the_right_to_have_them(scene, end, way):
    name, token = scene.user()
    given, first = {"header": {"token": token}, "cookie": {"cookie": token}}.get(way, {}), []
    if way == "frame":
        first = [{"type": "auth", "token": token}]
    terminal = Person(scene.hub, scene.path(), *first, RESUME, **given)
    dashboard = Person(scene.hub, "/ws/dashboard", *first, {"type": "resume", "after": 0}, **given)
    terminal.until("output")
    dashboard.next()
    ends_of(scene)[end](name, token)
    since, late = time.monotonic(), uuid.uuid4().bytes
    scene.agents["shop"].say(output(scene.sessions["plain-shop"], late))
    assert within_a_second(terminal, since) == within_a_second(dashboard, since) == 4401
    assert base64.b64encode(late).decode() not in [f.get("data") for f in terminal.seen]


def test_a_membership_taken_away_ends_the_terminal_and_silences_the_dashboard(scene):
    name, token = scene.user()
    terminal = Person(scene.hub, scene.path(), RESUME, token=token)
    dashboard = Person(scene.hub, "/ws/dashboard", {"type": "resume", "after": 0}, token=token)
    terminal.until("output")
    dashboard.until("session_event")
    scene.hub.api("PATCH", f"users/{name}", {"roles": {"other": "viewer"}})
    assert within_a_second(terminal, time.monotonic()) == 4404
    made = [
        scene.hub.api("POST", "tasks", {"title": "x", "project_id": project})["id"]
        for project in ("shop", "other")
    ]
    dashboard.until("task_event", task_id=made[1])
    assert made[0] not in json.dumps(dashboard.seen)
    dashboard.close()


def test_whoever_becomes_a_viewer_types_nothing_more(scene):
    name, token = scene.user()
    agent = scene.agents["shop"]
    with Person(scene.hub, scene.path(), RESUME, token=token) as person:
        person.until("state", may_type=True)
        scene.hub.api("PATCH", f"users/{name}", {"roles": {"shop": "viewer"}})
        agent.heard.clear()
        person.say(*DOING)
        for _ in DOING:
            assert person.until("error")["code"] == "forbidden"
        assert any(f["type"] == "state" and not f["may_type"] for f in person.seen)
        agent.settle()
        assert not agent.told("session_input") and not agent.told("session_resize")


def test_a_sessions_key_ends_with_its_session(scene):
    server, agent = scene.spare("ending")
    session = scene.session(server, "ending", role="orchestrator")
    key = agent.keys[session]
    watching = Person(scene.hub, scene.path(), RESUME, key=key)
    following = Person(scene.hub, "/ws/dashboard", {"type": "resume", "after": 0}, key=key)
    watching.until("output")
    following.next()
    agent.say(agent.spool("session_closed", session_id=session, exit_code=0, log_end=0))
    wait_until(lambda: scene.status(session) == "closed")
    since = time.monotonic()
    assert within_a_second(watching, since) == within_a_second(following, since) == 4401
    agent.close()


def revoke(scene, server: dict) -> None:
    scene.hub.api("POST", f"servers/{server['id']}/revoke", {})


def renew(scene, server: dict) -> None:
    made = scene.hub.register(
        server["name"], scene.projects["shop"], machine_id=f"m-{server['name']}"
    )
    assert made["renewed"]


@pytest.mark.parametrize("end", [revoke, renew])
def test_a_servers_key_ends_at_once_everywhere(scene, end):
    server, agent = scene.spare(f"taken-{end.__name__}")
    session = scene.session(server, f"taken-{end.__name__}")
    following = Person(scene.hub, "/ws/dashboard", {"type": "resume", "after": 0}, key=agent.key)
    following.next()
    with scene.hub.ask("GET", "events/stream", key=agent.key, stream=True) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert next(lines) == ": hello"
        end(scene, server)
        since = time.monotonic()
        wait_until(lambda: agent.code == 4401, timeout=1)
        assert within_a_second(following, since) == 4401
        list(lines)
        assert time.monotonic() - since < 1
    with Person(scene.hub, "/ws/server", hello(agent.key)) as person:
        assert person.end() == 4401
    assert scene.hub.api("GET", f"sessions/{session}")["log_end"] == 0


@pytest.mark.parametrize("end", [revoke, renew])
def test_a_key_that_ends_between_auth_and_sync_joins_nothing(scene, end):
    server = scene.hub.register(
        f"between-{end.__name__}", scene.projects["shop"], machine_id=f"m-between-{end.__name__}"
    )
    with Person(scene.hub, "/ws/server", hello(server["api_key"])) as person:
        person.until("auth_ok")
        end(scene, server)
        person.say({"type": "sync", "instance": "i", "sessions": [{"tmux_name": "orc-evil"}]})
        assert person.end() == 4401
        assert "sync_ok" not in [f["type"] for f in person.seen]
    assert "orc-evil" not in json.dumps(scene.hub.api("GET", "sessions?all=true"))


def test_a_revoked_agent_that_reads_nothing_is_not_heard_either(scene):
    """What it sends must not count only because the hub's words to it are stuck."""
    server, agent = scene.spare("deaf")
    session = scene.session(server, "deaf")
    agent.close()
    with Raw(scene.hub.settings["port"], "/ws/server", keep=4096) as deaf:
        item = {"session_id": session, "alive": True}
        sync = {"type": "sync", "instance": "deaf", "sessions": [item]}
        deaf.send(text(json.dumps(hello(server["api_key"]))), text(json.dumps(sync)))
        pad = {"type": "input", "data": base64.b64encode(b"x" * 600_000).decode()}
        wait_until(lambda: scene.status(session) in ("active", "recovering"))
        with Person(
            scene.hub, f"/ws/terminal/{session}", RESUME, token=scene.hub.login()
        ) as person:
            for _ in range(12):  # what it does not read
                person.say(pad)
            person.say({"type": "resize", "cols": 77, "rows": 22})
            person.until("size", cols=77)
            revoke(scene, server)
            late = {"session_id": session, "offset": 0, "data": "TEFURQ==", "at": None}
            deaf.send(text(json.dumps({"type": "session_log"} | late)))
            deaf.send(text(json.dumps(output(session, b"LATE", repaint=True))))
            with contextlib.suppress(ConnectionError):
                deaf.rest()
            assert base64.b64encode(b"LATE").decode() not in json.dumps(person.seen)
    assert scene.hub.api("GET", f"sessions/{session}")["log_end"] == 0


# ── another server's sessions ─────────────────────────────────────────────────────────────────


def test_an_agent_says_nothing_about_sessions_of_another_server(scene):
    session = scene.sessions["plain-shop"]
    victim, thief = scene.agents["shop"], scene.agents["other"]
    with Person(scene.hub, scene.path(), RESUME, token=scene.hub.login()) as person:
        person.until("output")
        person.say({"type": "scrollback"})
        wait_until(lambda: victim.told("capture_scrollback"))
        before = scene.hub.api("GET", f"sessions/{session}")
        thief.say(
            output(session, b"STOLEN", repaint=True),
            output(session, b"STOLEN"),
            {"type": "session_log", "session_id": session, "offset": 0, "data": "U1RPTEVO"},
            {"type": "session_screen", "session_id": session, "lines": ["STOLEN"], "at": None},
            {"type": "scrollback_captured", "session_id": session, "lines": ["STOLEN"]},
            thief.spool("session_closed", session_id=session, exit_code=0, log_end=9),
            thief.spool("session_error", session_id=session, error="STOLEN"),
            thief.spool("session_recovered", session_id=session),
            thief.spool("session_activity", session_id=session, state="error", reason="STOLEN"),
            {"type": "session_gap", "spool": thief.spooled + 1, "session_id": session}
            | {"from": 0, "to": 99, "why": "STOLEN"},
        )
        thief.spooled += 1
        thief.settle()
        victim.say(output(session, b"mine"))
        person.until("output", data=base64.b64encode(b"mine").decode())
        assert "STOLEN" not in json.dumps(person.seen)
        assert base64.b64encode(b"STOLEN").decode() not in json.dumps(person.seen)
    assert scene.hub.api("GET", f"sessions/{session}") == before
    assert scene.hub.api("GET", f"sessions/{session}/screen")["lines"] != ["STOLEN"]
    assert scene.hub.api("GET", f"sessions/{session}/marks") == {"marks": []}
    thief.say({"type": "ping", "n": "alive"})
    wait_until(lambda: {"type": "pong", "n": "alive"} in thief.heard)


# ── messages that are none ────────────────────────────────────────────────────────────────────

VALUES = (
    None, True, False, 0, -1, 1.5, 1e308, 2**31, 2**63, 2**70, -(2**70), "", "x", "\0", "\ud800",
    "😀" * 500, "9" * 5000, [], [[]], {}, {"a": []}, [None] * 50,
)  # fmt: skip
FIELDS = {
    "resume": ("offset", "after"),
    "input": ("data",),
    "resize": ("cols", "rows"),
    "take_size": ("cols", "rows"),
    "scrollback": ("session_id",),
    "auth": ("token",),
    "unknown": ("x",),
}
BROKEN = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"NaN", b'{"type": NaN}', b'{"type": 1e999}',
    b'{"type": "input", "data": -Infinity}', b"[" * 60_000, b'{"a":' * 12_000, b"\0",
    b'{"type": "input"', b'{"type": "\\ud800"}, {}',
)  # fmt: skip


def odd_messages():
    for value in VALUES:
        yield {"type": value}
        for kind, fields in FIELDS.items():
            for name in fields:
                yield {"type": kind, name: value}
    yield {"type": "resize", "cols": 10**9, "rows": 10**9}
    yield {"type": "resize", "cols": "80", "rows": [25]}
    yield {"x" * 50_000: 1}


def test_an_odd_message_at_a_terminal_is_an_error_at_most(scene):
    with Person(scene.hub, scene.path(), RESUME, token=scene.hub.login()) as person:
        person.say(*odd_messages())
        person.say({"type": "resize"}, RESUME)
        person.until(
            "error", code="invalid", detail="The resize message is malformed: KeyError('cols')."
        )
        person.until("output", repaint=True)


def test_an_odd_place_to_go_on_ends_the_dashboard_in_words(scene):
    for value in (-1, 1.5, 1e308, -(2**70), "", "x", [], {}):
        odd = {"type": "resume", "after": value}
        for first in ([odd], [RESUME, odd]):
            with Person(scene.hub, "/ws/dashboard", *first, token=scene.hub.login()) as person:
                assert person.end() == 4400
                assert person.seen[-1]["code"] == "invalid"
    with Person(scene.hub, "/ws/dashboard", token=scene.hub.login()) as person:
        person.say({"type": "resume", "after": 2**70})
        assert person.next()["type"] == "reset"


@pytest.mark.parametrize("path", ["terminal", "dashboard"])
def test_what_is_no_message_ends_the_connection_in_words(scene, path):
    where = scene.path() if path == "terminal" else "/ws/dashboard"
    token = scene.hub.login()
    for broken in BROKEN:
        with Raw(scene.hub.settings["port"], where, authorization=f"Bearer {token}") as raw:
            raw.send(text(json.dumps(RESUME)), text(broken))
            opcode, data = [(o, d) for o, d in raw.rest()][-1]
            assert (opcode, data[:2]) == (8, (4400).to_bytes(2, "big")), broken
    with Raw(scene.hub.settings["port"], where, authorization=f"Bearer {token}") as raw:
        raw.send(frame(BINARY, json.dumps(RESUME)), frame(BINARY, b"\xff\xfe"))
        assert raw.rest()[-1][1][:2] == (4400).to_bytes(2, "big")


def test_ten_thousand_messages_of_garbage_leave_the_hub_as_it_was(scene):
    before, agent = scene.rss(), scene.agents["shop"]
    garbage = [text(json.dumps({"type": "unknown", "pad": "x" * 1000}))] * 5000
    garbage += [text(json.dumps({"type": "resize", "cols": "x" * 1000}))] * 2500
    garbage += [text(json.dumps({"type": "input", "data": {"x": 1}}))] * 2500
    bearer = {"authorization": f"Bearer {scene.hub.login()}"}
    with Raw(scene.hub.settings["port"], scene.path(), **bearer) as raw:
        raw.send(text(json.dumps(RESUME)), *garbage)  # and reads nothing of the errors
        raw.send(text(json.dumps({"type": "input", "data": "ZG9uZQ=="})))
        wait_until(lambda: [f for f in agent.told("session_input") if f["data"] == "ZG9uZQ=="], 30)
        raw.reset()
    assert scene.rss() - before < 30_000_000
    assert scene.hub.ask("GET", "health").ok


def test_an_agents_odd_frames_are_passed_over(scene):
    import wire

    server, agent = scene.spare("odd")
    session = scene.session(server, "odd")
    names = (
        "session_id", "data", "offset", "lines", "at", "times", "ids", "system_info", "exit_code",
        "log_end", "state", "from", "to", "why", "pid", "task_id", "attempt", "outcome", "error",
        "request_id", "repaint", "tmux_name", "terminal", "working_directory", "n",
    )  # fmt: skip
    usual = {"session_id": session, "data": "YQ==", "offset": 0, "lines": ["x"], "ids": []}
    with Person(scene.hub, f"/ws/terminal/{session}", RESUME, token=scene.hub.login()) as person:
        person.until("output")
        for value in VALUES:
            agent.say({"type": value})
            for kind in wire.PASSING:
                agent.say(*({"type": kind} | usual | {name: value} for name in names))
            for kind in wire.SPOOLED:
                if kind != "session_closed":
                    agent.say(*(agent.spool(kind, **usual | {name: value}) for name in names[:24]))
        for spool in (0, -1, True, 2**70, agent.spooled + 5):
            agent.say({"type": "session_activity", "spool": spool} | usual)
        agent.settle()
        agent.say(output(session, b"good", repaint=True))
        person.until("output", data=base64.b64encode(b"good").decode())
    assert agent.code is None
    agent.close()
    lines = [line for line in scene.hub.lines if len(line) > 2000]
    assert not lines, lines[0][:300]


@pytest.mark.parametrize("first", ["auth", "sync", "later"])
def test_what_is_no_frame_ends_the_agents_connection_in_words(scene, first):
    server = scene.hub.register(f"broken-{first}", scene.projects["shop"])
    opening = [hello(server["api_key"]), {"type": "sync", "instance": "i", "sessions": []}]
    openings = {"auth": [], "sync": opening[:1], "later": opening}[first]
    for broken in BROKEN:
        with Raw(scene.hub.settings["port"], "/ws/server") as raw:
            for one in openings:
                raw.send(text(json.dumps(one)))
            raw.send(text(broken))
            opcode, data = raw.rest()[-1]
            assert (opcode, data[:2]) == (8, (4400).to_bytes(2, "big")), broken
    for value in VALUES:
        for odd in (
            {"type": "auth", "api_key": server["api_key"], "protocol": value},
            {"type": "auth", "api_key": server["api_key"], "protocol": 2, "spool_first": value},
            {"type": "auth", "api_key": server["api_key"], "protocol": 2, "spool_id": value},
            {"type": "sync", "instance": value, "sessions": value},
            {"type": "sync", "instance": "i", "sessions": [value]},
            {"type": "sync", "instance": "i", "sessions": [{"session_id": value}]},
            {"type": "sync", "instance": "i", "sessions": [], "capabilities": value},
            {"type": "sync", "instance": "i", "sessions": [], "capabilities": {"repos": value}},
        ):
            with Raw(scene.hub.settings["port"], "/ws/server") as raw:
                if odd["type"] == "sync":
                    raw.send(text(json.dumps(opening[0])))
                raw.send(text(json.dumps(odd)), frame(8, (1000).to_bytes(2, "big")))
                code = int.from_bytes(raw.rest()[-1][1][:2], "big")
                assert code in (1000, 1008, 4400), (odd, code)
