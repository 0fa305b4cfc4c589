"""What the tests share.

db            the hub's database in a directory of its own (the app's, when `app` is asked for too)
world         projects, servers and tasks by name, through the use cases of layer 2
case          what a case of the catalogue of faults reports; `start_proxy` breaks connections
told          the hub's bot, against a Bot API server of its own, and people who write to it
app, client   the Flask application, and a client for its API
served        the address of the application behind a listener, for sockets
hub           a real hub process; `@pytest.mark.hub(tick_s=0.1)` changes its settings
start_hub     starts such processes: `start_hub(port=…, tick_s=…)`
shop          the hub with a project
start_agent   registers and starts agent processes with tmux servers of their own
cli           runs the command line against `shop` as its admin
open_browser  a signed-in page in a real Chromium; `problems` is what it complained of
until         waits for a condition
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from urllib.parse import quote, urlsplit

import hypothesis
import jsonschema_rs
import pytest
import requests
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect
from werkzeug.serving import make_server

import auth
import hub as hub_module
import leases
import logs
import models
import moves
import nursery
import reading
import servers
import sessions
import sockets
import tasks
from auth import HUB

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct horse battery"


# How long an example takes says nothing where other tests run beside it.
hypothesis.settings.register_profile("orchestratia", deadline=None)
hypothesis.settings.load_profile("orchestratia")


def pytest_configure(config):
    config.addinivalue_line("markers", "hub(**settings): settings of the `hub` fixture's process")
    config.addinivalue_line("markers", "fault(name): a case of the catalogue of faults")


LONGEST = ("access", "machine", "benchmarks", "install", "openapi", "chaos", "backup")


def pytest_collection_modifyitems(items):
    """What takes longest comes first, on each of the processes that share the tests: in the end
    one of them would be left alone with it."""
    shares = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
    first = [item for item in items if item.path.stem.endswith(LONGEST)]
    others = [item for item in items if not item.path.stem.endswith(LONGEST)]
    size = -(-len(others) // shares)
    items[:] = []
    for n in range(shares):
        items += first[n::shares] + others[n * size : (n + 1) * size]


def pytest_terminal_summary(terminalreporter):
    """The table of the fault cases that were run; into a file too when FAULTS_TABLE names one."""
    lines = ["| case | seed | kills | lost | seconds | seen |", "|---|---|---|---|---|---|"]
    for report in terminalreporter.stats.get("", ()):
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == "fault":
                lines.append(f"| {' | '.join(map(str, json.loads(value)))} |")
    if len(lines) > 2:
        table = "\n".join([*lines[:2], *sorted(lines[2:])])
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write_line(table)
        if os.environ.get("FAULTS_TABLE"):
            Path(os.environ["FAULTS_TABLE"]).write_text(f"{_how_it_was_run()}\n\n{table}\n")


def _how_it_was_run() -> str:
    from faulting import N

    where = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    return f"{time.strftime('%Y-%m-%d')}, `make faults N={N}`; {where}, {os.cpu_count()} processors"


@pytest.fixture(scope="session", autouse=True)
def tmux_sockets():
    """tmux leaves its sockets behind: those of the tests lie in a directory that goes with them.
    (A short one: a socket's path may have 107 characters.)"""
    with tempfile.TemporaryDirectory(prefix="orc-") as folder:
        os.environ["TMUX_TMPDIR"] = folder
        yield
        del os.environ["TMUX_TMPDIR"]


# A run in the background of a script ignores these, and would hand that on to all it starts.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        _usual = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, _usual)


def wait_until(condition, timeout: float = 20.0, every: float = 0.02):
    """The first true value `condition()` gives; fails when there is none within `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"still {value!r} after {timeout:g} s")
        time.sleep(every)


def due(now: float) -> int:
    """What the hub's job of that name does at `now`; how many tasks it touched."""
    return tasks.time_out(now) + leases.notice_unplaced(now) + tasks.due_again(now)


@pytest.fixture
def case(request, record_property):
    """A case of the catalogue of faults, named by `@pytest.mark.fault`; reported at its end."""
    from faulting import Case  # which needs this module

    [name] = request.node.get_closest_marker("fault").args
    if hasattr(request.node, "callspec"):
        name += f" [{request.node.callspec.id}]"
    made = Case(record_property, name)
    yield made
    made.report()


@pytest.fixture
def start_proxy():
    """Start proxies between agents and hubs, which break connections; all are closed."""
    from faulting import Proxy

    made = []

    def start(hub) -> Proxy:
        made.append(Proxy(hub.settings["port"]))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


@pytest.fixture
def until():
    return wait_until


# ── the database and what is in it ────────────────────────────────────────────────────────────


@pytest.fixture
def db(request, tmp_path):
    if "app" in request.fixturenames:
        request.getfixturevalue("app")
        yield models.db.obj
        return
    lay_out(tmp_path / "hub.db")
    models.open_db(tmp_path / "hub.db")
    auth.use_secret(tmp_path / "secret")
    sessions.use_logs(logs.LogStore(tmp_path / "logs.db"))
    _forget_all()
    yield models.db.obj
    _close()


@functools.cache
def _empty() -> Path:
    """A database of the newest schema, in which nothing is yet."""
    folder = tempfile.TemporaryDirectory(prefix="orc-empty-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, "hub.db")
    models.open_db(path)
    with models.transaction():
        models.execute("DELETE FROM meta WHERE key = 'clock'")
    models.close_db()
    return path


def lay_out(path: Path) -> None:
    """Make a database as its migrations do, which take longer than most tests."""
    shutil.copy(_empty(), path)
    _begin_anew(path)


def _begin_anew(path: Path) -> None:
    """This copy is the database of another hub."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        epoch = str(uuid.uuid4())
        connection.execute("UPDATE meta SET value = ? WHERE key = 'hub_epoch'", (epoch,))


def _forget_all():
    """What earlier tests left in this process."""
    servers.begin()
    sockets.links.reset()
    auth._wrong.clear()


def _close():
    sockets.links.reset()
    sessions.logs().close()
    models.close_db()


class World:
    """Projects, servers and tasks by name; verbs are the use cases, done by `HUB` unless `by`."""

    def __init__(self):
        self.projects: dict[str, dict] = {}
        self.servers: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.project("shop")

    def project(self, name: str) -> dict:
        if name not in self.projects:
            self.projects[name] = auth.create_project(HUB, name)
        return self.projects[name]

    # people and servers

    def user(self, name: str, *, admin: bool = False, **roles: str) -> auth.Caller:
        """A person with roles by project name, signed in."""
        made = auth.create_user(HUB, name, None, admin, roles)
        return auth.by_token(self.token(made["id"]))

    def token(self, user_id: str) -> str:
        with models.transaction():
            return auth.issue(user_id, "api")

    def server(
        self,
        name: str,
        repos=(),
        languages=None,
        frameworks=None,
        capabilities=None,
        slots: int = 4,
        online: bool = True,
        project: str = "shop",
        machine_id: str = "",
    ) -> str:
        """Register a server (`repos`: names); its id."""
        token = auth.registration_token(HUB, self.project(project)["id"], "http://hub")
        made = servers.register(
            {
                "registration_token": token["token"],
                "name": name,
                "hostname": name,
                "os": "Linux",
                "machine_id": machine_id,
                "repos": {repo: f"/srv/{repo}" for repo in repos},
                "capabilities": {
                    "languages": languages,
                    "frameworks": frameworks,
                    "capabilities": capabilities,
                    "slots": slots,
                },
            },
            "127.0.0.1",
        )
        self.servers[name], self.keys[name] = made["id"], made["api_key"]
        if online:
            servers.alive(made["id"])
        return made["id"]

    def online(self, name: str) -> None:
        servers.alive(self.servers[name])

    def offline(self, name: str) -> None:
        """The server falls silent and the hub notices."""
        quiet = self.servers[name]
        with servers._life._lock:
            heard, wall = servers._life._heard[quiet]
            servers._life._heard[quiet] = (heard - 1000, wall)
            servers._life._ticked = time.monotonic()
        assert servers.notice_silence(500, sockets.links.hush) == [quiet]

    def key(self, name: str) -> auth.Caller:
        """The server as a caller."""
        return auth.by_key(self.keys[name])

    def server_row(self, name: str) -> dict:
        return models.one("SELECT * FROM server WHERE id = ?", (self.servers[name],))

    def busy(self, name: str) -> int:
        return self.server_row(name)["busy"]

    # tasks

    def task(
        self, name: str, after=(), inputs=None, related=(), project="shop", by=HUB, **fields
    ) -> dict:
        """Create a task; after: upstream names; inputs: {key: upstream name}."""
        links = [self._link(up, "blocks") for up in after]
        links += [self._link(up, "input", key) for key, up in (inputs or {}).items()]
        links += [self._link(up, "related") for up in related]
        data = {"title": name, "dependencies": links} | fields
        row = tasks.create(by, self.project(project), data)
        self.ids[name] = row["id"]
        return row

    def _link(self, upstream: str, kind: str, key: str | None = None) -> dict:
        return {
            "depends_on_task_id": self.ids[upstream],
            "dependency_type": kind,
            "contract_key": key,
        }

    def working(self, name: str, server: str | None = None, **fields) -> dict:
        """A task that is running, on `server` or on whoever fits."""
        self.task(name, **fields)
        self.assign(name, server=server)
        return self.start(name)

    def assign(self, name: str, by=HUB, **to) -> dict:
        return tasks.assign(by, self.ids[name], **to)

    def start(self, name: str, by=HUB, attempt=None) -> dict:
        return tasks.start(by, self.ids[name], attempt)

    def complete(self, name: str, result=None, contracts=None, by=HUB, attempt=None) -> dict:
        if contracts is not None:
            result = {"summary": f"{name} done", "contracts": contracts}
        return tasks.complete(by, self.ids[name], result, attempt)

    def fail(self, name: str, error: str = "it broke", by=HUB, attempt=None) -> dict:
        return tasks.fail(by, self.ids[name], error, attempt)

    def retry(self, name: str, by=HUB) -> dict:
        return tasks.retry(by, self.ids[name])

    def cancel(self, name: str, by=HUB, downstream: bool = False):
        return tasks.cancel(by, self.ids[name], downstream=downstream)

    def update(self, name: str, by=HUB, **data) -> dict:
        return tasks.update(by, self.ids[name], data)

    def depend(self, name: str, upstream: str, kind: str = "blocks", key=None, by=HUB) -> dict:
        return tasks.add_dependency(by, self.ids[name], self.ids[upstream], kind, key)

    def undepend(self, name: str, upstream: str, by=HUB) -> int:
        return tasks.remove_dependency(by, self.ids[name], self.ids[upstream])

    def row(self, name: str) -> dict:
        return moves.row(self.ids[name])

    def json(self, name: str) -> dict:
        return reading.task_json(self.row(name))

    def status(self, name: str) -> str:
        return self.row(name)["status"]

    def shown(self, name: str) -> str:
        return reading.shown_status(self.row(name))

    def reason(self, name: str) -> str | None:
        return reading.reason(self.row(name))

    def on(self, name: str) -> str | None:
        """The name of the server the task is on."""
        return reading.server_name(self.row(name))

    # what was written

    def events(self, name: str | None = None, *types: str, after: int = 0) -> list[dict]:
        """The events of a task (of everything without a name), oldest first."""
        found = models.rows("SELECT * FROM event WHERE id > ? ORDER BY id", (after,))
        return [
            models.event_json(row)
            for row in found
            if (name is None or row["task_id"] == self.ids[name])
            and (not types or row["type"] in types)
        ]

    def types(self, name: str | None = None, after: int = 0) -> list[str]:
        return [event["type"] for event in self.events(name, after=after)]

    def said(self, after: int) -> list[tuple[str, str]]:
        """(type, task name) of every event since, in order."""
        names = {task_id: name for name, task_id in self.ids.items()}
        return [(e["type"], names.get(e["task_id"])) for e in self.events(after=after)]

    def now(self) -> int:
        """Where the event log stands."""
        return reading.last_event_id()

    def commands(self, server: str) -> list[dict]:
        """Unacknowledged commands to a server, oldest first."""
        return models.rows(
            "SELECT * FROM command WHERE server_id = ? AND acked_at IS NULL ORDER BY id",
            (self.servers[server],),
        )

    def check(self) -> None:
        check_invariants()


def check_invariants() -> None:
    """What must hold of every database at every moment."""
    held = Counter(
        row["server_id"]
        for row in models.rows(
            "SELECT server_id FROM task WHERE status IN"
            " ('assigned', 'planning', 'plan_review', 'running', 'needs_human')"
        )
    )
    for server in models.rows("SELECT id, name, busy FROM server"):
        assert server["busy"] == held[server["id"]], f"slots of {server['name']}"
    wrong = models.rows(
        "SELECT title, open_deps, (SELECT COUNT(*) FROM dependency d WHERE d.task_id = t.id"
        " AND d.resolved = 0 AND d.kind <> 'related') AS counted FROM task t"
        " WHERE open_deps <> counted"
    )
    assert not wrong
    ids = [row["id"] for row in models.rows("SELECT id FROM event ORDER BY id")]
    assert ids == list(range(1, len(ids) + 1)), "the event log has gaps"
    assert not models.rows(
        "SELECT task_id, attempt, COUNT(*) AS n FROM session WHERE task_id IS NOT NULL"
        " AND state IN ('starting', 'active', 'disconnected', 'recovering')"
        " GROUP BY task_id, attempt HAVING n > 1"
    ), "two live sessions for one attempt"
    assert not models.rows(
        "SELECT i.id FROM intervention i JOIN task t ON t.id = i.task_id WHERE i.status = 'pending'"
        " AND (t.status <> 'needs_human' OR t.attempt <> i.attempt)"
    ), "a question nobody waits for the answer of"
    assert not models.rows(
        "SELECT p.version FROM plan p JOIN task t ON t.id = p.task_id WHERE p.status = 'pending'"
        " AND (t.status <> 'plan_review' OR t.attempt <> p.attempt)"
    ), "a plan nobody can decide on"
    assert models.rows("PRAGMA foreign_key_check") == []
    assert models.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.fixture
def world(db):
    return World()


@pytest.fixture
def told(world, monkeypatch):
    from telling import running  # which needs this module

    yield from running(world, monkeypatch)


# ── the application ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def app(tmp_path):
    given = {"data": str(tmp_path / "hub"), "url": "http://localhost"}
    settings = hub_module.read_settings(given, {})
    application = hub_module.create_app(settings)
    settings["data"].mkdir(mode=0o700)
    lay_out(settings["data"] / "hub.db")
    hub_module.open_data(settings)
    _forget_all()
    auth.first_admin(None)
    yield application
    _close()


DOCUMENT = "urn:orchestratia:openapi"


class Documented:
    """What the OpenAPI document says of answers; every answer a test gets is held against it."""

    def __init__(self):
        self._paths = None
        self._document = None  # one for all validators: a copy for each would take megabytes
        self._validators = {}

    def check(self, app, method: str, path: str, answer) -> None:
        try:
            rule = app.url_map.bind("localhost").match(path, method, return_rule=True)[0].rule
        except (HTTPException, RequestRedirect):
            return  # nothing is there
        if not rule.startswith("/api/"):
            return
        if not self._paths:
            whole = app.test_client().get("/openapi.json").json
            self._paths, self._document = (
                whole["paths"],
                jsonschema_rs.Registry([(DOCUMENT, whole)]),
            )
        named = rule.replace("<", "{").replace(">", "}")
        responses = self._paths[named][method.lower()]["responses"]
        assert str(answer.status_code) in responses, (method, named, answer.status_code)
        if answer.is_json:
            errors = self._validator(named, method, answer.status_code).iter_errors(answer.json)
            assert not (found := [(list(e.instance_path), e.message[:300]) for e in errors]), found

    def _validator(self, path: str, method: str, status: int):
        key = path, method, status
        if key not in self._validators:
            where = ("paths", path, method.lower(), "responses", str(status))
            where += ("content", "application/json", "schema")
            pointer = "/".join(quote(each.replace("/", "~1")) for each in where)
            self._validators[key] = jsonschema_rs.Draft202012Validator(
                {"$ref": f"{DOCUMENT}#/{pointer}"}, registry=self._document
            )
        return self._validators[key]


documented = Documented()


class Client:
    """Requests to the API: a path without a leading slash stands under /api/v1."""

    def __init__(self, app, headers: dict | None = None):
        self.app = app
        self.headers = headers or {}
        self.flask = app.test_client()

    def login(self, username: str = "admin", password: str = PASSWORD) -> "Client":
        """The same client signed in by password, as a new one."""
        answer = self.post("auth/login", json={"username": username, "password": password})
        assert answer.status_code == 200, answer.json
        return self.as_token(answer.json["token"])

    def as_token(self, token: str) -> "Client":
        return Client(self.app, {"Authorization": f"Bearer {token}"})

    def as_user(self, username: str = "admin") -> "Client":
        """Signed in without the cost of a password."""
        user = models.one("SELECT id FROM user WHERE username = ?", (username,))
        with models.transaction():
            return self.as_token(auth.issue(user["id"], "api"))

    def as_server(self, key: str) -> "Client":
        return Client(self.app, {"X-API-Key": key})

    as_key = as_server

    def open(self, method: str, path: str, **kwargs):
        path = path if path.startswith("/") else f"/api/v1/{path}"
        headers = self.headers | kwargs.pop("headers", {})
        answer = self.flask.open(path, method=method, headers=headers, **kwargs)
        documented.check(self.app, method, urlsplit(path).path, answer)
        return answer

    def get(self, path: str, **kwargs):
        return self.open("GET", path, **kwargs)

    def post(self, path: str, json=None, **kwargs):
        return self.open("POST", path, **_body(json, kwargs))

    def put(self, path: str, json=None, **kwargs):
        return self.open("PUT", path, **_body(json, kwargs))

    def patch(self, path: str, json=None, **kwargs):
        return self.open("PATCH", path, **_body(json, kwargs))

    def delete(self, path: str, **kwargs):
        return self.open("DELETE", path, **kwargs)


def _body(json, kwargs: dict) -> dict:
    """Without a body of its own a request carries the empty object."""
    return kwargs if "data" in kwargs else kwargs | {"json": {} if json is None else json}


@pytest.fixture
def client(app):
    """Nobody: `.as_user()`, `.login()` and `.as_server(key)` give clients who are somebody."""
    return Client(app)


@pytest.fixture
def admin(client):
    """The hub's admin at the API."""
    return client.as_user("admin")


@pytest.fixture
def served(app):
    """The application behind a real listener, for clients that need one; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"ws://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


# ── a real hub ────────────────────────────────────────────────────────────────────────────────


@functools.cache
def begun() -> tuple[Path, str]:
    """A data directory after a hub's first start, and the token of its admin who signed in."""
    folder = tempfile.TemporaryDirectory(prefix="orc-begun-")
    atexit.register(folder.cleanup)
    data = Path(folder.name, "hub")
    data.mkdir(mode=0o700)  # where something is, nothing is taken from here
    hub = HubProcess(data)
    token = hub.login()
    hub.stop()
    return hub.data, token


def begin_at(data: Path) -> str:
    """Make a hub's data directory, as a first start and a sign-in leave it; the admin's token.

    Passwords are slow to check by design, and hundreds of tests have a hub of their own.
    """
    source, token = begun()
    shutil.copytree(source, data)
    _begin_anew(data / "hub.db")
    return token


class HubProcess:
    """`python hub.py` on a free port, with the admin's password set; or another script."""

    def __init__(self, data: Path, script: Path | None = None, **settings):
        self.data = data
        self.script = script
        self.settings = {"port": 0, "data": data} | settings
        self.http = requests.Session()
        self.http.trust_env = False
        self.accepted: set[str] = set()  # ids of tasks it said it has
        self.lines: list[str] = []
        self.process = None
        self.token = None if script or data.exists() else begin_at(data)
        self.url = ""
        self.start()

    def start(self) -> None:
        flags = []
        for name, value in self.settings.items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATIA_")}
        env |= {"ORCHESTRATIA_ADMIN_PASSWORD": PASSWORD}
        if self.script:
            self.process = subprocess.Popen(
                [sys.executable, str(self.script), *flags],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        else:
            pipe = self.data.with_name(f"{self.data.name}.printed")
            self.process = nursery.Hub(flags, env, pipe)
        self._told = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        if not self._told.wait(30):
            self.kill()
            pytest.fail("the hub did not start:\n" + "".join(self.lines))
        if not self.settings["port"]:
            self.settings["port"] = int(self.url.rpartition(":")[2])
        wait_until(self._answers, 10)

    def _read(self, process) -> None:
        with process.stdout:
            for line in process.stdout:
                self.lines.append(line)
                if line.startswith("Orchestratia hub on "):
                    self.url = line.split()[-1]
                    self._told.set()
        self._told.set()

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail("the hub ended:\n" + "".join(self.lines))
        try:
            return self.http.get(f"{self.url}/api/v1/health", timeout=2).ok
        except requests.ConnectionError:
            return False

    def login(self) -> str:
        """The admin's token, fetched once."""
        if not self.token:
            answer = self.http.post(
                f"{self.url}/api/v1/auth/login",
                json={"username": "admin", "password": PASSWORD},
                timeout=10,
            )
            assert answer.ok, answer.text
            self.token = answer.json()["token"]
        return self.token

    def ask(self, method: str, path: str, json=None, *, key=None, token=None, **kwargs):
        """The raw answer to a request, by the admin unless a key or token is given."""
        if key:
            headers = {"X-API-Key": key}
        else:
            headers = {"Authorization": f"Bearer {token or self.login()}"}
        kwargs = {"timeout": 40} | kwargs
        headers |= kwargs.pop("headers", {})
        path = path.lstrip("/").removeprefix("api/v1/")
        url = f"{self.url}/api/v1/{path}"
        answer = self.http.request(method, url, json=json, headers=headers, **kwargs)
        if answer.status_code == 201 and path == "tasks":
            self.accepted.add(answer.json()["id"])
        elif answer.status_code == 201 and path == "pipelines":
            self.accepted.update(answer.json()["id_map"].values())
        return answer

    def api(self, method: str, path: str, json=None, **kwargs):
        """The JSON of a request that must succeed."""
        answer = self.ask(method, path, json, **kwargs)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def register(self, name: str = "dev", project: str | None = None, **body) -> dict:
        """Register a server in the (only) project; {id, api_key, …}."""
        token = self.api("POST", "servers/tokens", {"project_id": project} if project else {})
        body = {"name": name, "registration_token": token["token"]} | body
        return self.api("POST", "servers/register", body)

    def stop(self) -> int:
        """End it as an operator would; its exit code."""
        self.http.close()  # it waits a while for connections that are open
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._end()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._end()

    def _end(self) -> int:
        try:
            code = self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(5)
        return code

    def restart(self) -> None:
        """Stop it and start it again on the same port and data."""
        self.stop()
        self.start()


def hub_py(*argv) -> subprocess.CompletedProcess:
    """Run hub.py to its end with these arguments."""
    command = [sys.executable, str(ROOT / "hub.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def start_hub(tmp_path):
    """Start hub processes; all are killed, which is quicker than to stop them, and what they
    printed shown if the test failed."""
    started: list[HubProcess] = []

    def start(**settings) -> HubProcess:
        data = Path(settings.pop("data", tmp_path / f"hub-{len(started)}"))
        started.append(HubProcess(data, **settings))
        return started[-1]

    yield start
    for process in started:
        process.http.close()
        process.kill()
        print(f"── {process.url} ──\n{''.join(process.lines)}")
    assert not any("Traceback" in line for process in started for line in process.lines)


@pytest.fixture
def hub(request, start_hub):
    marker = request.node.get_closest_marker("hub")
    return start_hub(**(marker.kwargs if marker else {}))


# ── real agents, and the command line ─────────────────────────────────────────────────────────


AGENT = [sys.executable, str(ROOT / "agent.py")]


class AgentProcess:
    """`python agent.py` with a config, a state directory and repos of its own."""

    def __init__(self, hub, folder: Path, name: str, repos=(), languages=(), slots: int = 8):
        self.hub, self.folder, self.name = hub, folder, name
        self.config = folder / "config.yaml"
        self.argv = [*AGENT, "--config", str(self.config)]
        self.argv += ["--state", str(folder / "state")]
        self.process = None
        register = ["--name", name, "--slots", str(slots)]
        for repo in repos:
            (folder / repo).mkdir(parents=True)
            register += ["--repo", f"{repo}={folder / repo}"]
        for language in languages:
            register += ["--language", language]
        token = hub.api("POST", "servers/tokens", {})["token"]
        done = self.run("--register", token, *register)
        assert done.returncode == 0, done.stdout
        self.server_id = hub.api("GET", f"servers/{name}")["id"]

    def run(self, *argv: str) -> subprocess.CompletedProcess:
        """Run agent.py to its end with these arguments."""
        self.folder.mkdir(parents=True, exist_ok=True)
        printed = self.folder / "printed"
        done = nursery.Agent([*self.argv[2:], *argv], clean_env(self.folder), printed)
        code = done.wait()
        said = printed.read_text()
        printed.unlink()
        return subprocess.CompletedProcess([*self.argv, *argv], code, said)

    def start(self) -> "AgentProcess":
        self.spawn()
        wait_until(self.is_online, 20)
        return self

    def spawn(self) -> None:
        log = self.folder / "out.log"
        self.log = log.open("ab")
        if self.argv[:2] == AGENT:
            self.process = nursery.Agent(self.argv[2:], clean_env(self.folder), log)
            return
        self.process = subprocess.Popen(
            self.argv,
            env=clean_env(self.folder),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_online(self) -> bool:
        return self.hub.api("GET", f"servers/{self.name}")["status"] == "online"

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._close()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(10)
        self._close()

    def _close(self) -> None:
        if self.process:
            self.log.close()

    def tmux(self, *argv: str) -> str:
        command = ["tmux", "-L", f"orc-{self.server_id[:8]}", *argv]
        return subprocess.run(command, capture_output=True, text=True).stdout


def clean_env(home: Path, **more: str) -> dict:
    ours = ("ORCHESTRATIA_", "PS1")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | {"HOME": str(home), "NO_PROXY": "127.0.0.1"} | more


@pytest.fixture
def start_agent(tmp_path):
    """Register and start agents; all are stopped, their tmux servers too."""
    started = []

    def start(hub, name, ready=lambda agent: None, **kwargs) -> AgentProcess:
        """ready: called with the agent once it is registered, before it is started."""
        agent = AgentProcess(hub, tmp_path / name, name, **kwargs)
        started.append(agent)
        ready(agent)
        return agent.start()

    yield start
    for agent in started:
        agent.stop()
        agent.tmux("kill-server")
        print(f"── {agent.name} ──\n{(agent.folder / 'out.log').read_text()}")


@pytest.fixture
def shop(hub):
    """The hub with its project."""
    hub.api("POST", "projects", {"name": "shop"})
    return hub


@pytest.fixture
def cli(shop, tmp_path):
    """Run the command line against the hub as its admin; `--json` answers are parsed."""

    def run(*argv: str, ok: bool = True):
        env = clean_env(tmp_path, ORCHESTRATIA_HUB_URL=shop.url, ORCHESTRATIA_TOKEN=shop.login())
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *argv],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout) if "--json" in argv else done

    return run


# ── a real browser ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import expect, sync_playwright

    from chromium import CHROMIUM, FLAGS

    expect.set_options(timeout=20_000)  # ms: on a busy machine too, only a condition counts
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def problems():
    """What the browser complained of; a test takes out what it meant to cause."""
    found: list[str] = []
    yield found
    assert not found


@pytest.fixture
def open_browser(browser, hub, problems):
    """Open a browser of its own, signed in unless `token` is None; gives its first page."""
    contexts = []

    def open_one(token="", **options):
        context = browser.new_context(base_url=hub.url, locale="en-GB", **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        if token is not None:
            context.add_cookies([cookie(hub.url, token or hub.login())])
        context.on("console", lambda m: m.type == "error" and problems.append(m.text))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        return context.new_page()

    yield open_one
    for context in contexts:
        context.close()


def cookie(url: str, token: str) -> dict:
    return {"name": "orchestratia", "value": token, "url": url}
