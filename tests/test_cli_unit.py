"""The command line alone, against a small real HTTP server that records what it is sent."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import click
import pytest
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402

T1 = "4f2a0000-0000-4000-8000-000000000001"
T2 = "91bc0000-0000-4000-8000-000000000002"
P1 = "b0b00000-0000-4000-8000-000000000003"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self):
        split = urlsplit(self.path)
        path = split.path.removeprefix("/api/v1/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = {
            "method": self.command,
            "path": path,
            "query": dict(parse_qsl(split.query)),
            "headers": dict(self.headers),
            "body": json.loads(body) if body else None,
        }
        self.server.requests.append(request)
        found = self.server.routes.get((self.command, path))
        if found is None:
            found = (404, {"detail": f"No {path} here.", "code": "not_found", "fields": {}})
        if callable(found):
            found = found(request, self)
        if found is not None:
            self.reply(*found)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def reply(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.routes = [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.over = threading.Event()

    def on(self, method, path, body, status=200, headers=()):
        self.routes[method, path] = body if callable(body) else (status, body, headers)

    def sent(self, method=None):
        return [r for r in self.requests if method in (None, r["method"])]

    def streams(self, *connections):
        """Answers each connection to the event stream with the next list of frames; the last
        one stays open."""
        left = list(connections)

        def stream(request, handler):
            frames = left.pop(0)
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.send_header("Connection", "close")
            handler.end_headers()
            for frame in frames:
                handler.wfile.write(frame() if callable(frame) else frame)
                handler.wfile.flush()
            if not left:
                self.over.wait(30)
            handler.close_connection = True

        self.on("GET", "events/stream", stream)


@pytest.fixture
def hub():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No credentials, no task, no git of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("ORCHESTRATIA_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(cli, "RECONNECT_S", 0.001)
    monkeypatch.setattr(cli, "FOLLOW_INTERVAL_S", 0.001)


@pytest.fixture
def run(hub, monkeypatch):
    """Runs a command line signed in to `hub`."""
    monkeypatch.setenv("ORCHESTRATIA_HUB_URL", hub.url)
    monkeypatch.setenv("ORCHESTRATIA_TOKEN", "secret")

    def invoke(*args, stdin=None):
        return CliRunner().invoke(cli.cli, [str(arg) for arg in args], input=stdin)

    return invoke


def a_task(ident=T1, **fields):
    return {"id": ident, "title": "A title", "status": "pending", "dependencies": []} | fields


def frame(number, kind, task_id=T1):
    event = json.dumps({"id": number, "type": kind, "task_id": task_id})
    return f"id: {number}\nevent: {kind}\ndata: {event}\n\n".encode()


# --- credentials ------------------------------------------------------------------------------

FLAGS = {"hub": "http://flag", "token": "flag", "project": "flag"}
ENV = {
    "ORCHESTRATIA_HUB_URL": "http://env/",
    "ORCHESTRATIA_TOKEN": "env",
    "ORCHESTRATIA_API_KEY": "orc_env",
    "ORCHESTRATIA_PROJECT_ID": "env",
}
FILE = {"hub_url": "http://file", "token": "file", "project": "file"}


@pytest.mark.parametrize(
    ("flags", "env", "file", "expected"),
    [
        (FLAGS, ENV, FILE, ("http://flag", "flag", "flag")),
        ({}, ENV, FILE, ("http://env", "env", "env")),
        ({}, {}, FILE, ("http://file", "file", "file")),
        ({}, {"ORCHESTRATIA_API_KEY": "orcs_1"}, FILE, ("http://file", "orcs_1", "file")),
        ({"hub": "http://file/"}, {}, FILE, ("http://file", "file", "file")),
        ({"hub": "http://other"}, {}, FILE, ("http://other", None, "file")),
        ({}, {"ORCHESTRATIA_HUB_URL": "http://other"}, FILE, ("http://other", None, "file")),
        ({}, {}, {}, (None, None, None)),
    ],
)
def test_flags_before_environment_before_file_and_the_saved_token_only_for_its_hub(
    flags, env, file, expected
):
    who = cli.Credentials(flags, env, file)
    assert (who.url, who.key, who.project) == expected


@pytest.mark.parametrize(
    ("key", "header", "value"),
    [
        ("orc_x", "X-API-Key", "orc_x"),
        ("orcs_x", "X-API-Key", "orcs_x"),
        ("abc", "Authorization", "Bearer abc"),
    ],
)
def test_keys_and_tokens_travel_in_their_own_header(hub, run, key, header, value):
    hub.on("GET", "projects", {"projects": []})
    assert run("project", "list", "--token", key).exit_code == 0
    headers = hub.requests[0]["headers"]
    assert headers[header] == value
    assert len({"X-API-Key", "Authorization"} & set(headers)) == 1


def test_a_netrc_does_not_replace_the_token(hub, run, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login x password y\n")
    monkeypatch.setenv("NETRC", str(netrc))
    hub.on("GET", "projects", {"projects": []})
    run("project", "list")
    assert hub.requests[0]["headers"]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:1/", "http://h:1"),
        ("https://h/pre/", "https://h/pre"),
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("hub.example.org", "https://hub.example.org"),
    ],
)
def test_hub_urls_are_brought_into_one_form(text, url):
    assert cli.hub_url(text) == url


@pytest.mark.parametrize("text", ["ftp://h", "http://", "http://h:port", ""])
def test_what_is_no_hub_url_is_refused(text):
    with pytest.raises(click.UsageError):
        cli.hub_url(text)


def test_without_a_hub_or_a_login_it_says_what_to_do():
    result = CliRunner().invoke(cli.cli, ["whoami"])
    assert (result.exit_code, "orchestratia login" in result.stderr) == (2, True)
    result = CliRunner().invoke(cli.cli, ["whoami", "--hub", "http://127.0.0.1:1"])
    assert (result.exit_code, "not signed in" in result.stderr) == (2, True)


# --- login ------------------------------------------------------------------------------------


def saved():
    return yaml.safe_load(cli.config_path().read_text())


def test_login_saves_hub_and_token_for_the_owner_only(hub):
    hub.on("POST", "auth/login", {"token": "T", "user": {"username": "ada"}})
    args = ["login", "--hub", hub.url, "--username", "ada", "--password-stdin"]
    result = CliRunner().invoke(cli.cli, args, input="pass word \n")
    assert result.exit_code == 0, result.output
    assert hub.requests[0]["body"] == {"username": "ada", "password": "pass word "}
    assert saved() == {"hub_url": hub.url, "token": "T"}
    assert cli.config_path().stat().st_mode & 0o777 == 0o600
    assert [p.name for p in cli.config_path().parent.iterdir()] == ["cli.yaml"]
    assert "T" not in result.output.replace("To", "").split()


@pytest.mark.parametrize("prefix", ["", "/pre"])
def test_login_takes_the_one_time_link_of_the_hub(hub, prefix):
    path = f"{prefix}/api/v1/auth/login" if prefix else "auth/login"
    hub.on("POST", path, {"token": "T", "user": {}})
    result = CliRunner().invoke(cli.cli, ["login", f"{hub.url}{prefix}/login?token=once%2B"])
    assert result.exit_code == 0, result.output
    assert hub.requests[0]["body"] == {"login_token": "once+"}
    assert saved()["hub_url"] == hub.url + prefix


def test_login_without_a_terminal_names_the_option(hub):
    result = CliRunner().invoke(cli.cli, ["login", "--hub", hub.url])
    assert (result.exit_code, "--password-stdin" in result.stderr) == (2, True)
    assert not hub.requests


def test_logout_forgets_the_token_even_when_the_hub_is_away(hub):
    cli.save_config({"hub_url": "http://127.0.0.1:1", "token": "T", "project": "p"})
    assert CliRunner().invoke(cli.cli, ["logout"]).exit_code == 3
    assert saved() == {"hub_url": "http://127.0.0.1:1", "project": "p"}


def test_a_broken_config_file_is_named(run):
    cli.config_path().parent.mkdir(parents=True)
    cli.config_path().write_text("a: [")
    result = run("whoami")
    assert (result.exit_code, str(cli.config_path()) in result.stderr) == (2, True)


# --- ids, dependencies, lengths of time, JSON -------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "ref"),
    [
        (T1, T1),
        (T1.upper(), T1),
        (T1.replace("-", ""), T1),
        (f"#{T1}", T1),
        (" #4F2A ", "4f2a"),
        ("4f2a0000-0", "4f2a0000-0"),
    ],
)
def test_ids_are_taken_in_every_form_people_copy(typed, ref):
    assert cli.task_ref(typed) == ref


@pytest.mark.parametrize("typed", ["4f2", "", "#", "a/../b", "4f2a?x=1", "..", "4f 2a"])
def test_what_cannot_be_an_id_is_refused_before_any_request(hub, run, typed):
    assert run("task", "view", "--id", typed).exit_code == 2
    assert not hub.requests


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("4f2a", ("4f2a", "blocks", None)),
        ("#4F2A:blocks", ("4f2a", "blocks", None)),
        ("4f2a:related", ("4f2a", "related", None)),
        ("4f2a:input:api_schema", ("4f2a", "input", "api_schema")),
        ("4f2a:input:a:b", ("4f2a", "input", "a:b")),
    ],
)
def test_dependencies_carry_type_and_key(typed, parsed):
    assert cli.parse_dependency(typed) == parsed


@pytest.mark.parametrize(
    "typed", ["4f2a:input", "4f2a:input:", "4f2a:after", "4f2a:related:k", ":x"]
)
def test_half_a_dependency_is_refused(typed):
    with pytest.raises(click.UsageError):
        cli.parse_dependency(typed)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("10m", 600), ("1h30m", 5400), ("1h 30min", 5400), ("2d", 172800), ("0.5s", 0.5)],
)
def test_lengths_of_time(text, seconds):
    assert cli.Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10x", "-5", "1h-", "m"])
def test_what_is_no_length_of_time_is_refused(text):
    with pytest.raises(click.UsageError):
        cli.Duration().convert(text, None, None)


@pytest.mark.parametrize("text", ["NaN", "Infinity", '{"a": [-Infinity]}', '{"a": 1e999}'])
def test_numbers_beyond_json_are_refused_with_a_sentence(hub, run, text):
    result = run("task", "complete", "4f2a", "--result", text)
    assert result.exit_code == 2
    assert "JSON" in result.stderr
    assert not hub.requests


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("null", None),
        ("[1]", [1]),
        ('"x"', "x"),
        ("plain", "plain"),
        ("{oops", "{oops"),
    ],
)
def test_results_are_json_where_they_parse_and_text_elsewhere(hub, run, text, value):
    hub.on("POST", "tasks/4f2a/complete", a_task(status="done"))
    assert run("task", "complete", "4f2a", "--result", text).exit_code == 0
    assert hub.requests[0]["body"] == {"result": value}


# --- what is sent -----------------------------------------------------------------------------


def test_create_sends_every_field(hub, run, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_SESSION_ID", "s1")
    monkeypatch.setenv("ORCHESTRATIA_PROJECT_ID", P1)
    hub.on("POST", "tasks", a_task(), 201)
    hub.on("GET", "tasks/91bc", a_task(T2))
    Path("spec.md").write_text("Do it\n")
    result = run(
        *("task", "create", "--title", "A", "--spec-file", "spec.md", "--priority", "high"),
        *("--structured-spec", '{"requirements": []}', "--type", "bugfix", "--repo", "web"),
        *("--branch", "dev", "--acceptance-criteria", "c1", "c two", "--language", "rust"),
        *("--language", "ts", "--framework", "flask", "--capability", "gpu", "--auto-assign"),
        *("--depends-on", T1.upper(), "91bc:input:api", "--max-attempts", 3, "--timeout", "1h"),
        *("--start-timeout", "30s", "--retry-delay", "1.5", "--", "make", "--json", "a b"),
    )
    assert result.exit_code == 0, result.output
    assert hub.sent("POST")[0]["body"] == {
        "title": "A",
        "spec": "Do it\n",
        "priority": "high",
        "structured_spec": {"requirements": []},
        "type": "bugfix",
        "target_repo": "web",
        "target_branch": "dev",
        "acceptance_criteria": ["c1", "c two"],
        "requirements": {
            "languages": ["rust", "ts"],
            "frameworks": ["flask"],
            "capabilities": ["gpu"],
        },
        "auto_assign": True,
        "dependencies": [
            {"depends_on_task_id": T1, "dependency_type": "blocks"},
            {"depends_on_task_id": T2, "dependency_type": "input", "contract_key": "api"},
        ],
        "max_attempts": 3,
        "timeout": 3600,
        "start_timeout": 30,
        "retry_delay_s": 1.5,
        "profile": "command",
        "command": ["make", "--json", "a b"],
        "session_id": "s1",
        "project_id": P1,
    }


def test_a_title_alone_is_a_task(hub, run):
    hub.on("POST", "tasks", a_task(), 201)
    run("task", "create", "--title", "A")
    assert hub.requests[0]["body"] == {"title": "A"}


@pytest.mark.parametrize(
    "args",
    [
        ("create",),
        ("create", "--title", " "),
        ("create", "--title", "A", "--spec", ""),
        ("create", "--title", "A", "--priority", "urgent"),
        ("create", "--title", "A", "stray"),
        ("create", "--title", "A", "--command", "x", "--", "y"),
        ("update", "4f2a"),
        ("assign", "4f2a", "--session", "a", "--server", "b"),
        ("complete", "4f2a"),
        ("complete", "4f2a", "--result", "x", "--result-file", "y"),
        ("view", "4f2a", "--id", "91bc"),
        ("wait",),
        ("wait", "4f2a", "--for", "finished"),
        ("view",),
        ("deps", "add", "4f2a", "--depends-on", "91bc", "--type", "input"),
        ("update", "4f2a", "--clear", "title"),
        ("help", "4f2a"),
        ("help", "4f2a", "--question", " "),
        ("help", "4f2a", "--question", "x", "--timeout", "1s"),
        ("plan", "4f2a"),
        ("plan", "4f2a", "--plan", ""),
        ("note", "4f2a", "--content", ""),
    ],
)
def test_wrong_usage_is_exit_2_in_both_modes_and_nothing_is_sent(hub, run, args):
    check_usage(hub, run, "task", *args)


@pytest.mark.parametrize(
    "args",
    [
        ("server", "declare", "dev"),
        ("server", "declare", "dev", "--repo", "core"),
        ("server", "rename", "dev", " "),
        ("project", "update", "shop"),
        ("project", "use"),
        ("project", "use", "shop", "--none"),
        ("user", "create", "ada"),
        ("user", "create", "ada", "--role", "shop=king", "--password-stdin"),
        ("user", "update", "ada"),
        ("plan", "revise", "4f2a", "--feedback", ""),
        ("plan", "approve"),
        ("note", "4f2a", ""),
        ("note",),
        ("intervention", "respond", "77aa"),
        ("intervention", "respond", "77aa", "yes", "--response", "no"),
        ("intervention", "respond", "77", "yes"),
        ("intervention", "respond", "77aa", ""),
        ("pipeline", "create"),
        ("pipeline", "create", "--inline", '{"tasks": [{"title": "a", "depends_on": [0]}]}'),
        ("pipeline", "create", "--inline", "[]"),
        ("events", "--before", "3", "--follow"),
        ("open", "task"),
        ("open", "tasks", "x"),
        ("completion", "tcsh"),
    ],
)
def test_wrong_usage_of_the_other_commands_too(hub, run, args):
    check_usage(hub, run, *args)


def check_usage(hub, run, group, *args):
    plain, as_json = run(group, *args), run(group, "--json", *args)
    assert (plain.exit_code, as_json.exit_code) == (2, 2)
    assert plain.stderr.startswith("Error: ") and not plain.stdout
    error = json.loads(as_json.stdout)
    assert (set(error), error["code"]) == ({"error", "code", "fields"}, "usage")
    assert not hub.requests


def test_a_failed_assignment_after_create_tells_the_id(hub, run):
    hub.on("POST", "tasks", a_task(), 201)
    detail = {"detail": "No session is called 'nope'.", "code": "not_found", "fields": {"a": 1}}
    hub.on("POST", f"tasks/{T1}/assign", detail, 404)
    args = ("task", "create", "--title", "A", "--assign", "nope", "--require-plan")
    result = run(*args)
    assert result.exit_code == 1
    assert T1 in result.stderr and "nope" in result.stderr
    assert hub.requests[0]["body"] == {"title": "A", "require_plan": True}
    assert hub.requests[1]["body"] == {"session_name": "nope", "require_plan": True}
    error = json.loads(run(*args, "--json").stdout)
    assert error["fields"] == {"a": 1, "task_id": T1}
    assert error["code"] == "not_found"


REQUESTS = [
    ("task start 4f2a", "POST", "tasks/4f2a/start", None),
    ("task start --id 4f2a", "POST", "tasks/4f2a/start", None),
    ("task fail 4f2a --error boom", "POST", "tasks/4f2a/fail", {"error": "boom"}),
    ("task retry 4f2a", "POST", "tasks/4f2a/retry", None),
    ("task cancel 4f2a --cascade", "DELETE", "tasks/4f2a", None),
    ("task assign 4f2a", "POST", "tasks/4f2a/assign", {}),
    ("task assign 4f2a --session w", "POST", "tasks/4f2a/assign", {"session_name": "w"}),
    (
        "task assign --id 4f2a --server w --require-plan",
        "POST",
        "tasks/4f2a/assign",
        {"server": "w", "require_plan": True},
    ),
    (
        "task update 4f2a --branch= --acceptance-criteria= --no-auto-assign",
        "PATCH",
        "tasks/4f2a",
        {"target_branch": None, "acceptance_criteria": [], "auto_assign": False},
    ),
    (
        "task update 4f2a --repo r -- a b",
        "PATCH",
        "tasks/4f2a",
        {"target_repo": "r", "command": ["a", "b"], "profile": "command"},
    ),
    (
        f"task deps add 4f2a --depends-on {T2} --type input --contract-key k",
        "POST",
        "tasks/4f2a/dependencies",
        {"depends_on_task_id": T2, "dependency_type": "input", "contract_key": "k"},
    ),
    (
        f"task deps add --id 4f2a --depends-on {T2}",
        "POST",
        "tasks/4f2a/dependencies",
        {"depends_on_task_id": T2, "dependency_type": "blocks"},
    ),
    ("task deps remove 4f2a --depends-on #91BC", "DELETE", "tasks/4f2a/dependencies/91bc", None),
    ("contract set 4f2a k [1]", "PUT", "tasks/4f2a/contracts/k", {"data": [1]}),
    ("contract set --id 4f2a a/b null", "PUT", "tasks/4f2a/contracts/a%2Fb", {"data": None}),
    ("contract show 4f2a k", "GET", "tasks/4f2a/contracts/k", None),
    ("contract list --id 4f2a", "GET", "tasks/4f2a/contracts", None),
    ("session send w hello", "POST", "sessions/w/input", {"text": "hello"}),
    ("session send w -- -x", "POST", "sessions/w/input", {"text": "-x"}),
    ("session input w a;", "POST", "sessions/w/input", {"data": "YTs="}),
    (
        "session start dev --name w --dir /srv -- sh -c x",
        "POST",
        "sessions",
        {"server_id": "dev", "name": "w", "working_dir": "/srv", "command": ["sh", "-c", "x"]},
    ),
    (
        "session start dev --profile claude --task 4f2a",
        "POST",
        "sessions",
        {"server_id": "dev", "profile": "claude", "task_id": "4f2a"},
    ),
    ("session close w --force", "POST", "sessions/w/close", {"force": True}),
    ("session show %C3%BC?&", "GET", "sessions/%25C3%25BC%3F%26", None),
    ("server show dev", "GET", "servers/dev", None),
    ("server token --ttl 2h", "POST", "servers/tokens", {"ttl_s": 7200}),
    ("server drain a/b", "POST", "servers/s1/drain", None),
    ("server resume dev", "POST", "servers/dev/resume", None),
    ("server revoke dev", "POST", "servers/dev/revoke", None),
    ("server rename dev dev-2", "PATCH", "servers/dev", {"name": "dev-2"}),
    (
        "server declare dev --language rust ts --framework= --repo a=/srv/a b=~/b --slots 3",
        "PATCH",
        "servers/dev",
        {
            "declared": {
                "languages": ["rust", "ts"],
                "frameworks": [],
                "repos": {"a": {"path": "/srv/a"}, "b": {"path": "~/b"}},
            },
            "slots": 3,
        },
    ),
    ("server declare dev --no-manual", "PATCH", "servers/dev", {"manual": False}),
    ("project create P --profile command", "POST", "projects", {"name": "P", "profile": "command"}),
    ("project show P", "GET", "projects/P", None),
    ("project update P --name Q", "PATCH", "projects/P", {"name": "Q"}),
    ("user list", "GET", "users", None),
    ("user show ada/x", "GET", "users/ada%2Fx", None),
    (
        "user update ada --admin --disable",
        "PATCH",
        "users/ada",
        {"is_admin": True, "disabled": True},
    ),
    ("user update ada --no-admin", "PATCH", "users/ada", {"is_admin": False}),
    ("user delete ada", "DELETE", "users/ada", None),
    (
        "task help --id 4f2a --question Q? --context c --type question --to boss",
        "POST",
        "tasks/4f2a/help",
        {
            "question": "Q?",
            "intervention_type": "question",
            "context": "c",
            "target_session_id": "boss",
        },
    ),
    (
        "task help 4f2a --question Q?",
        "POST",
        "tasks/4f2a/help",
        {"question": "Q?", "intervention_type": "help"},
    ),
    ("task plan 4f2a --plan words", "POST", "tasks/4f2a/plan", {"plan": {"summary": "words"}}),
    ("plan submit 4f2a --plan [1]", "POST", "tasks/4f2a/plan", {"plan": [1]}),
    (
        'plan submit 4f2a --plan "quoted"',
        "POST",
        "tasks/4f2a/plan",
        {"plan": {"summary": "quoted"}},
    ),
    ("plan show 4f2a", "GET", "tasks/4f2a/plan", None),
    ("plan approve 4f2a", "POST", "tasks/4f2a/plan/approve", {}),
    (
        "plan approve --id 4f2a --comment c --version 2",
        "POST",
        "tasks/4f2a/plan/approve",
        {"comment": "c", "version": 2},
    ),
    ("plan revise 4f2a --feedback f", "POST", "tasks/4f2a/plan/revise", {"feedback": "f"}),
    (
        "task note 4f2a --content c --urgent",
        "POST",
        "tasks/4f2a/notes",
        {"content": "c", "urgent": True},
    ),
    ("note 4f2a c", "POST", "tasks/4f2a/notes", {"content": "c", "urgent": False}),
    ("task notes 4f2a", "GET", "tasks/4f2a/notes", None),
    ("intervention show #77AA", "GET", "interventions/77aa", None),
    (
        "intervention respond 77aa yes",
        "POST",
        "interventions/77aa/respond",
        {"response": "yes"},
    ),
    (
        "intervention respond 77aa --response -y",
        "POST",
        "interventions/77aa/respond",
        {"response": "-y"},
    ),
    (
        "task update 4f2a --clear repo timeout language --capability gpu",
        "PATCH",
        "tasks/4f2a",
        {
            "target_repo": None,
            "timeout": None,
            "requirements": {"capabilities": ["gpu"], "languages": []},
        },
    ),
    ("pipeline show p", "GET", "pipelines/p", None),
]


@pytest.mark.parametrize(("line", "method", "path", "body"), REQUESTS, ids=lambda v: str(v)[:40])
def test_each_command_sends_its_request_and_prints_the_answer_as_json(
    hub, run, line, method, path, body
):
    answer = {"id": T1, "ü": [None, 1.5], "tasks": []}
    hub.on(method, path, answer)
    hub.on("GET", "servers", {"servers": [{"id": "s1", "name": "a/b"}]})
    result = run("--json", *line.split(" "))
    assert result.exit_code == 0, result.output
    assert result.stdout == json.dumps(answer, indent=2) + "\n"
    sent = [(r["method"], r["path"], r["body"]) for r in hub.requests if r["path"] != "servers"]
    assert sent == [(method, path, body)]


@pytest.mark.parametrize(
    "args",
    [
        ("--json", "task", "list"),
        ("task", "--json", "list"),
        ("task", "list", "--json"),
        ("task", "list", "--json", "--status", "done"),
    ],
)
def test_json_is_taken_at_every_place(hub, run, args):
    hub.on("GET", "tasks", {"tasks": [], "next_cursor": None})
    assert json.loads(run(*args).stdout) == {"tasks": [], "next_cursor": None}


def test_raw_keystrokes_come_from_standard_input_too(hub, run):
    hub.on("POST", "sessions/w/input", {"ok": True})
    assert run("session", "input", "w", "-", stdin=b"\x03\xff").exit_code == 0
    assert hub.requests[0]["body"] == {"data": "A/8="}


def test_a_recording_is_saved_whole_or_not_at_all(hub, run, tmp_path):
    cast = b'{"version": 2}\n[0.1, "o", "\xc3\xbc"]\n' * 10_000
    hub.on("GET", "sessions/w/recording", cast)
    assert run("session", "recording", "w").stdout_bytes == cast
    saved = run("session", "recording", "w", "-o", "w.cast")
    assert saved.stdout == f"Saved w.cast, {len(cast):,} bytes.\n"
    assert (tmp_path / "w.cast").read_bytes() == cast

    def torn(request, handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"half")
        handler.close_connection = True

    hub.on("GET", "sessions/w/recording", torn)
    result = run("session", "recording", "w", "-o", "w.cast", "--json")
    assert result.exit_code == 3 and json.loads(result.stdout)["code"] == "unreachable"
    assert (tmp_path / "w.cast").read_bytes() == cast
    assert [path.name for path in tmp_path.glob("*.part")] == []
    result = run("session", "recording", "w", "-o", "no/where.cast")
    assert result.exit_code == 1 and "Cannot write no/where.cast" in result.stderr


def test_what_live_sessions_need_is_said_when_it_is_missing(hub, run, monkeypatch):
    hub.on("GET", "sessions/w", {"id": "s1"})
    monkeypatch.setattr(cli, "termios", None)
    result = run("session", "attach", "w")
    assert result.exit_code == 1 and "Linux, macOS or WSL" in result.stderr
    cli.websockets.cache_clear()
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    result = run("session", "scrollback", "w")
    assert result.exit_code == 1 and "pip install websockets" in result.stderr


def test_queries_are_escaped(hub, run):
    hub.on("GET", "tasks", {"tasks": []})
    run("task", "list", "--status", "a b&x=1", "-q", "ü", "--limit", 3)
    assert hub.requests[0]["query"] == {"status": "a b&x=1", "q": "ü", "limit": "3"}


def test_a_session_knows_its_own_task(hub, run, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_TASK_ID", T1)
    for method, path in (("POST", "start"), ("POST", "complete"), ("POST", "fail")):
        hub.on(method, f"tasks/{T1}/{path}", a_task())
    hub.on("GET", f"tasks/{T1}", a_task())
    hub.on("GET", f"tasks/{T1}/contracts/k", {"key": "k", "status": "expected"})
    lines = ["start", "complete --result x", "fail --error x", "view", "status"]
    assert [run("task", *line.split()).exit_code for line in lines] == [0] * 5
    assert run("contract", "show", "k").exit_code == 0
    hub.on("GET", "tasks/91bc", a_task(T2))
    assert T2 in run("task", "view", "91bc").stdout
    # What destroys or moves work never guesses.
    assert [run("task", verb).exit_code for verb in ("cancel", "retry", "assign")] == [2] * 3


def test_a_project_name_is_resolved_once(hub, run):
    hub.on("GET", "projects/My%20Shop", {"id": P1, "name": "My Shop"})
    hub.on("GET", "tasks", {"tasks": []})
    run("task", "list", "--project", "My Shop")
    assert hub.requests[-1]["query"] == {"project_id": P1}
    assert len(hub.requests) == 2


def test_names_that_would_change_the_path_are_looked_up(hub, run):
    rows = [{"id": "s1", "name": ".."}, {"id": "s2", "name": "a/b"}, {"id": "s3", "name": "a/b"}]
    hub.on("GET", "sessions", {"sessions": rows})
    hub.on("POST", "sessions/s1/close", {"ok": True})
    assert run("session", "close", "..").exit_code == 0
    result = run("session", "close", "a/b", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fields"] == {"candidates": ["s2", "s3"]}


def test_git_statistics_go_with_a_result(hub, run, tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "a b.txt").write_text("1\n2\n")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *args], check=True, cwd=tmp_path)
    hub.on("POST", "tasks/4f2a/complete", a_task(status="done"))
    run("task", "complete", "4f2a", "--result", "ok")
    stats = hub.requests[0]["body"]["git_diff_stats"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert stats == {
        "files_changed": 2,
        "insertions": 2,
        "deletions": 0,
        "files": [{"path": "a b.txt", "insertions": 2, "deletions": 0}],
        "head_commit": head.stdout.strip(),
        "base_commit": None,
        "binary_files": ["b.bin"],
    }


# --- refusals ---------------------------------------------------------------------------------


def test_a_refusal_is_its_sentence_and_exit_1(hub, run):
    body = {
        "detail": "The task is done; retry it.",
        "code": "conflict",
        "fields": {"status": "done"},
    }
    hub.on("POST", "tasks/4f2a/start", body, 409)
    plain, as_json = run("task", "start", "4f2a"), run("task", "start", "4f2a", "--json")
    assert (plain.exit_code, as_json.exit_code) == (1, 1)
    assert plain.stderr == "Error: The task is done; retry it.\n"
    assert json.loads(as_json.stdout) == {
        "error": "The task is done; retry it.",
        "code": "conflict",
        "fields": {"status": "done"},
    }


def test_an_ambiguous_prefix_lists_the_candidates(hub, run):
    candidates = [{"id": T1, "title": "One"}, {"id": T2, "title": "Two\x1b[2J"}, "plain"]
    body = {"detail": "2 tasks begin with 4f2a.", "code": "ambiguous"}
    hub.on("GET", "tasks/4f2a", body | {"fields": {"candidates": candidates}}, 409)
    result = run("task", "view", "4f2a")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == [f"  {T1}  One", f"  {T2}  Two", "  plain"]


def test_an_unauthorized_person_is_told_to_sign_in(hub, run):
    hub.on("GET", "auth/me", {"detail": "The token has expired.", "code": "unauthorized"}, 401)
    result = run("status")
    assert (result.exit_code, "orchestratia login" in result.stderr) == (1, True)


def test_a_redirect_is_refused_and_the_key_stays_here(hub, run):
    other = Server()
    thread = threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.on("GET", "tasks", {}, 307, {"Location": f"{other.url}/api/v1/tasks"})
    hub.on("POST", "tasks", {}, 302, {"Location": f"{hub.url}/api/v1/elsewhere"})
    results = [run("task", "list"), run("task", "create", "--title", "A", "--json")]
    other.shutdown()
    other.server_close()
    thread.join()
    assert [r.exit_code for r in results] == [1, 1]
    assert "redirect" in results[0].stderr and other.url in results[0].stderr
    assert json.loads(results[1].stdout)["code"] == "redirect"
    assert not other.requests and len(hub.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "exit_code"),
    [
        (200, b"<html>hello</html>", 1),
        (404, b"<html>nothing</html>", 1),
        (500, b"[1]", 1),
        (400, {"detail": [{"loc": ["a"]}]}, 1),
        (502, b"bad gateway", 3),
        (503, {"detail": "The database is busy; try again.", "code": "busy"}, 1),
        (200, b"", 0),
        (200, {"tasks": None}, 0),
        (200, {}, 0),
        (200, [], 1),
    ],
)
def test_odd_answers_never_become_tracebacks(hub, run, status, body, exit_code):
    hub.on("GET", "tasks", body, status)
    for args in (("task", "list"), ("task", "list", "--json")):
        result = run(*args)
        assert result.exit_code in (exit_code, 0 if body == [] else exit_code)
        assert "Traceback" not in result.output


@pytest.mark.parametrize("key", sorted(a_task()) + ["status"])
def test_missing_and_null_fields_do_not_break_the_printers(hub, run, key):
    hub.on("GET", "tasks/4f2a", a_task() | ({key: None} if key != "id" else {}))
    assert run("task", "view", "4f2a").exit_code == 0
    hub.on("GET", "tasks", {"tasks": [{k: v for k, v in a_task().items() if k != key}]})
    assert run("task", "list").exit_code == 0


def test_an_unreachable_hub_is_one_sentence_and_exit_3(run):
    for args in (("task", "list"), ("task", "start", "4f2a")):
        result = run(*args, "--hub", "http://127.0.0.1:1")
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        assert "cannot reach the hub at http://127.0.0.1:1" in result.stderr
        assert "refused" in result.stderr and "Is it running?" in result.stderr
    error = json.loads(run("status", "--hub", "http://127.0.0.1:1", "--json").stdout)
    assert error["code"] == "unreachable"


@pytest.mark.parametrize(("method", "tries"), [("GET", 3), ("POST", 1)])
def test_only_reading_is_tried_again(hub, run, method, tries):
    def hang_up(request, handler):
        handler.close_connection = True

    hub.on("GET", "tasks/4f2a", hang_up)
    hub.on("POST", "tasks/4f2a/start", hang_up)
    result = run("task", "view" if method == "GET" else "start", "4f2a")
    assert (result.exit_code, len(hub.requests)) == (3, tries)
    assert ("unknown" in result.stderr) == (method == "POST")


def test_cookies_of_the_hub_are_not_sent_back(hub, run):
    hub.on("POST", "tasks", a_task(), 201, {"Set-Cookie": "session=x; Path=/"})
    hub.on("POST", f"tasks/{T1}/assign", a_task())
    run("task", "create", "--title", "A", "--assign", "w")
    assert "Cookie" not in hub.requests[1]["headers"]


# --- what is printed --------------------------------------------------------------------------

NASTY = "\x1b]0;title\x07\x1b[31mred\x1b[0m\x9b2J [bold]x[/bold] :smile: \u202eabc\t\r\nsecond\x00"


def test_titles_of_strangers_cannot_steer_the_terminal(hub, run):
    hub.on("GET", "tasks", {"tasks": [a_task(title=NASTY)]})
    hub.on("GET", "tasks/4f2a", a_task(title=NASTY, spec=NASTY, result={"summary": NASTY}))
    for args in (("task", "list"), ("task", "view", "4f2a")):
        out = run(*args).stdout
        assert "red [bold]x[/bold] :smile: abc" in out
        assert not set("\x1b\x9b\u202e\x07\x00\t\r") & set(out)
    assert json.loads(run("task", "list", "--json").stdout)["tasks"][0]["title"] == NASTY


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[1;31mb\x1b[mc", "abc"),
        ("a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "alink"),
        ("a\x1bPq..\x1b\\b", "ab"),
        ("a\x1b(Bb\x1b=c", "abc"),
        ("a\x1b", "a"),
        ("a\x1b]0;never ended", "a0;never ended"),
        ("桌\r\n面", "桌\n面"),
        ("a\ud800b", "ab"),
        (None, "None"),
    ],
)
def test_escape_sequences_are_stripped(text, shown):
    assert cli.clean(text) == shown


def test_a_pipe_gets_whole_ids_and_aligned_columns(hub, run):
    tasks = [a_task(title="x" * 300), a_task(T2, title="桌面", status="done")]
    hub.on("GET", "tasks", {"tasks": tasks})
    lines = run("task", "list").stdout.splitlines()
    assert T1 in lines[1] and T2 in lines[2] and "x" * 300 in lines[1]
    assert lines[0].index("ID") == lines[1].index(T1) == lines[2].index(T2)
    assert all(line == line.rstrip() for line in lines)


def test_every_command_has_help_and_an_example():
    def leaves(group, words=()):
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                yield from leaves(command, (*words, name))
            else:
                yield (*words, name), command

    for words, command in leaves(cli.cli):
        result = CliRunner().invoke(cli.cli, [*words, "--help"])
        assert result.exit_code == 0 and command.help, words
        assert f"orchestratia {' '.join(words)}" in result.stdout.split("Example:")[1], words


def test_output_that_is_cut_off_is_no_error_and_no_traceback(hub, run):
    hub.on("GET", "tasks", {"tasks": [a_task(title="x" * 1000) for _ in range(500)]})
    command = [sys.executable, str(ROOT / "cli.py"), "task", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_session_logs_are_read_to_the_end_and_cleaned(hub, run):
    log = b"\x1b[32mbuilding\x1b[0m\r\n10%\r100%\r\ndone \xe2\x9c\x93\nlast"

    def output(request, handler):
        offset = int(request["query"]["offset"])
        block = log[offset : offset + 10]
        return 200, block, {"X-Next-Offset": str(offset + len(block))}

    hub.on("GET", "sessions/w", {"id": "s1", "status": "closed", "log_start": 0})
    hub.on("GET", "sessions/s1/output", output)
    hub.on("GET", "sessions/s1/marks", {"marks": []})
    assert run("session", "logs", "w").stdout == "building\n100%\ndone ✓\nlast\n"
    assert run("session", "logs", "w", "--raw").stdout_bytes == log
    assert run("session", "logs", "w", "--follow").stdout.endswith("last\n")
    found = json.loads(run("session", "logs", "w", "--json").stdout)
    assert (found["output"], found["next_offset"]) == (log.decode(), len(log))


def test_what_is_missing_from_a_log_is_said_where_it_is(hub, run):
    stored = {1000: b"one\ntw", 3_000_000: b"three\nfour\n"}
    marks = [
        {"kind": "removed", "from": 0, "to": 1000, "why": "limit of 64 MB per session"},
        {"kind": "gap", "from": 1006, "to": 3_000_000, "why": "hub away\x1b[2J"},
        {"kind": "gap", "from": 3_000_006, "to": None, "why": "pipe down"},
        {"kind": "gap", "from": 3_000_011, "to": 3_000_021, "why": "at the end"},
    ]

    def output(request, handler):
        asked = int(request["query"]["offset"])
        for offset, data in stored.items():
            if asked < offset + len(data):
                begins = max(asked, offset)
                data = data[begins - offset :]
                return (
                    200,
                    data,
                    {"X-Offset": str(begins), "X-Next-Offset": str(begins + len(data))},
                )
        return 200, b"", {"X-Offset": "3000021", "X-Next-Offset": "3000021"}

    hub.on("GET", "sessions/w", {"id": "s1", "status": "closed", "log_start": 1000})
    hub.on("GET", "sessions/s1/output", output)
    hub.on("GET", "sessions/s1/marks", {"marks": marks})
    assert run("session", "logs", "w").stdout.splitlines() == [
        "… 1.0 kB removed: limit of 64 MB per session …",
        "one",
        "tw",
        "… 3.0 MB missing: hub away …",
        "three",
        "… output missing: pipe down …",
        "four",
        "… 10 bytes missing: at the end …",
    ]
    raw = run("session", "logs", "w", "--raw")
    assert raw.stdout_bytes == b"".join(stored.values())
    assert raw.stderr.count("missing") == 3
    found = json.loads(run("session", "logs", "w", "--json").stdout)
    assert (found["output"], found["marks"]) == ("one\ntwthree\nfour\n", marks)


# --- trees ------------------------------------------------------------------------------------


def needs(*ids, kind="blocks"):
    return [
        {
            "depends_on_task_id": one,
            "dependency_type": kind,
            "contract_key": None,
            "resolved": False,
        }
        for one in ids
    ]


def test_a_task_reached_twice_is_drawn_once_and_referred_to(hub, run):
    a, b, c, d = (a_task(f"{n}000-aaaa", title=n * 3) for n in "abcd")
    b["dependencies"] = c["dependencies"] = needs(a["id"])
    d["dependencies"] = needs(b["id"], c["id"])
    hub.on("GET", "tasks", {"tasks": [d, c, b, a], "next_cursor": None})
    lines = run("task", "tree").stdout.splitlines()
    assert [line.lstrip("│├└─ ")[:1] for line in lines] == ["○", "○", "○", "○", "↳"]
    assert "ddd" in lines[2] and "ddd (shown above)" in lines[4]


def test_a_very_deep_graph_is_drawn(hub, run):
    tasks = [a_task(f"{n:08}", dependencies=needs(f"{n - 1:08}") if n else []) for n in range(700)]
    hub.on("GET", "tasks", {"tasks": tasks[::-1]})
    result = run("task", "tree")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 700)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ("done done done", 0),
        ("done running pending", None),
        ("done pending pending", None),
        ("failed running pending", None),
        ("failed done pending", 1),
        ("done failed pending", 1),
        ("cancelled done done", 1),
        ("pending cancelled done", None),
    ],
)
def test_a_pipeline_has_ended_when_nothing_more_can_happen(states, code):
    one, two, three = states.split()
    tasks = [
        a_task("a", status=one),
        a_task("b", status=two),
        a_task("c", status=three, dependencies=needs("a", "b")),
    ]
    assert cli.outcome(tasks) == code


# --- pipelines --------------------------------------------------------------------------------

PIPELINE = """
name: shop
project: My Shop
tasks:
  - id: T1
    title: Schema
  - id: T2
    title: 2026-11-22
    depends_on: [{task: T1, type: input, key: api}]
"""


@pytest.mark.parametrize("form", ["file.yaml", "file.json", "-"])
def test_a_pipeline_is_one_request_in_every_form(hub, run, form):
    text = json.dumps(yaml.load(PIPELINE, cli.Loader)) if form == "file.json" else PIPELINE
    if form != "-":
        Path(form).write_text("\ufeff" + text, "utf-8")
    hub.on("GET", "projects/My%20Shop", {"id": P1})
    hub.on("POST", "pipelines", {"id": "p", "name": "n", "tasks": [], "id_map": {}}, 201)
    result = run("pipeline", "apply", form, "--name", "n", "--json", stdin=text)
    assert result.exit_code == 0, result.output
    assert [r["body"] for r in hub.sent("POST")] == [
        {
            "name": "n",
            "project_id": P1,
            "tasks": [
                {"id": "T1", "title": "Schema"},
                {
                    "id": "T2",
                    "title": "2026-11-22",
                    "depends_on": [{"task": "T1", "type": "input", "key": "api"}],
                },
            ],
        }
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks:\n  - id: T1\n    title: [a\n", "line 4, column 1"),
        ("tasks:\n  - id: T1\n    id: T2\n", "line 3, column 5"),
        ("tasks: 1", "list of tasks"),
        ("tasks: []", "list of tasks"),
        ("tasks: [1]", "Task 1"),
        ("[1]", "must be an object"),
        ("", "must be an object"),
        ("tasks: !!python/object:os.system {}", "line 1"),
        ('{"tasks": [', "line 1"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place_before_anything_is_sent(hub, run, text, said):
    Path("p.yaml").write_text(text)
    result = run("pipeline", "apply", "p.yaml")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not hub.requests


def pipeline_in(*states):
    tasks = [a_task(i, status=s) for i, s in zip((T1, T2), states, strict=True)]
    return {"id": "p", "name": "n", "tasks": tasks, "id_map": {"T1": T1, "T2": T2}}


@pytest.mark.parametrize(("last", "code"), [("done", 0), ("failed", 1)])
@pytest.mark.parametrize("mode", ["plain", "json"])
def test_watching_a_pipeline_ends_with_its_outcome(hub, run, last, code, mode):
    Path("p.yaml").write_text(PIPELINE.replace("project: My Shop", ""))
    states = iter([("running", "pending"), ("done", "running"), ("done", last)])
    hub.on("POST", "pipelines", pipeline_in("pending", "pending"), 201)
    hub.on("GET", "pipelines/p", lambda *_: (200, pipeline_in(*next(states))))
    read = [lambda: b": first\n\n", lambda: frame(1, "task_started"), lambda: frame(2, "x", T2)]

    def after(number):
        """Waits until the state has been read `number` times, then sends the next frame."""

        def send():
            wait_for(
                lambda: len([r for r in hub.sent("GET") if r["path"] == "pipelines/p"]) >= number
            )
            return read[number]()

        return send

    hub.streams([after(1), after(2)])
    result = run("pipeline", "apply", "p.yaml", "--watch", *(["--json"] if mode == "json" else []))
    assert result.exit_code == code, result.output
    if mode == "json":
        assert json.loads(result.stdout) == pipeline_in("done", last)
    else:
        lines = [line.split()[1:3] for line in result.stdout.splitlines()]
        assert lines[:5] == [["○", "T1"], ["○", "T2"], ["●", "T1"], ["✓", "T1"], ["●", "T2"]]
        assert f"1 {last}" in lines[-1] or "2 tasks:" in result.stdout.splitlines()[-1]


def wait_for(condition):
    waited = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waited.wait(0.001)
    raise AssertionError("the condition never came true")


FILE_OF = {
    "name": "demo",
    "tasks": [
        {
            "id": "A",
            "title": "Schema",
            "spec": "Write it.\nIn two lines.\n",
            "priority": "high",
            "requirements": {"repo": "core"},
            "acceptance_criteria": ["one"],
            "structured_spec": {"constraints": {"languages": ["rust"], "x": 1}, "k": {}},
            "command": ["sh", "-c", "true"],
            "type": "feature",
            "auto_assign": True,
            "timeout": 60,
        },
        {"id": "B", "title": "Gateway", "depends_on": [{"task": "A", "key": "k"}, "A"]},
    ],
}
MADE_OF = {
    "id": P1,
    "name": "demo",
    "project_id": P1,
    "id_map": {"A": T1, "B": T2},
    "tasks": [
        a_task(
            title="Schema",
            spec="Write it.\nIn two lines.\n",
            priority="high",
            type="feature",
            requirements={"repo": "core", "languages": ["rust"]},
            target_repo="core",
            acceptance_criteria=["one"],
            structured_spec={"constraints": {"languages": ["rust"], "x": 1}, "k": {}},
            command=["sh", "-c", "true"],
            auto_assign=True,
            profile="command",
            max_attempts=1,
            retry_delay_s=0.0,
            timeout=60.0,
        ),
        a_task(
            T2,
            title="Gateway",
            spec="Gateway",
            profile="command",
            dependencies=[
                {"depends_on_task_id": T1, "dependency_type": "blocks", "contract_key": None},
                {"depends_on_task_id": T1, "dependency_type": "input", "contract_key": "k"},
            ],
        ),
    ],
}


@pytest.fixture
def made_of(hub):
    hub.on("GET", "pipelines/demo", MADE_OF)
    hub.on("GET", f"projects/{P1}", {"id": P1, "profile": "command"})


def test_a_pipeline_is_exported_as_a_file_that_makes_the_same(hub, run, made_of):
    text = run("pipeline", "export", "demo").stdout
    exported = cli.parse_document(text, "x.yaml")
    assert exported == json.loads(run("pipeline", "export", "demo", "--json").stdout)
    first, second = exported["tasks"]
    assert first == {
        "id": "A",
        "title": "Schema",
        "spec": "Write it.\nIn two lines.\n",
        "priority": "high",
        "repo": "core",
        "acceptance_criteria": ["one"],
        "requirements": {"languages": ["rust"]},
        "structured_spec": {"constraints": {"x": 1}, "k": {}},
        "command": ["sh", "-c", "true"],
        "auto_assign": True,
        "timeout": 60,
    }
    links = ["A", {"task": "A", "type": "input", "key": "k"}]
    assert second == {"id": "B", "title": "Gateway", "depends_on": links}
    assert "  spec: |\n      Write it.\n" in text and "command: [sh, -c, 'true']" in text


def test_a_file_is_compared_with_what_is_in_the_hub(hub, run, made_of):
    Path("p.yaml").write_text(yaml.safe_dump(FILE_OF))
    assert run("pipeline", "diff", "p.yaml", "--exit-code").exit_code == 0
    assert json.loads(run("pipeline", "diff", "p.yaml", "--json").stdout)["same"] is True
    first, second = FILE_OF["tasks"]
    other = {"tasks": [first | {"priority": "low", "repo": "core"}, second | {"id": "C"}]}
    Path("q.yaml").write_text(yaml.safe_dump(other))
    result = run("pipeline", "diff", "q.yaml", "demo")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "+ C  Gateway",
        "- B  Gateway",
        "~ A",
        "    priority: high → low",
    ]
    assert run("pipeline", "diff", "q.yaml", "demo", "--exit-code").exit_code == 1
    assert not hub.sent("POST")


def test_the_older_form_of_a_pipeline_is_brought_into_ours(hub, run):
    hub.on("POST", "pipelines", {"id": P1, "name": "p", "tasks": []}, 201)
    older = {
        "tasks": [
            {"title": "One", "spec": "s"},
            {"id": "two", "title": "Two", "depends_on": [0]},
            {"title": "Three", "depends_on": "two"},
            {"title": "Four", "depends_on": ["task-0", "1", {"task": "two", "type": "related"}]},
        ]
    }
    Path("older.json").write_text(json.dumps(older))
    assert run("pipeline", "create", "--file", "older.json").exit_code == 0
    assert run("pipeline", "create", "--inline", json.dumps(older)).exit_code == 0
    file, inline = (r["body"] for r in hub.requests)
    assert (file["name"], inline["name"]) == ("older", "pipeline")
    assert file["tasks"] == inline["tasks"]
    assert [(one["id"], one.get("depends_on")) for one in file["tasks"]] == [
        ("task-0", None),
        ("two", ["task-0"]),
        ("task-2", ["two"]),
        ("task-3", ["task-0", "two", {"task": "two", "type": "related"}]),
    ]


# --- waiting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "goal", "code"),
    [
        ("done", "done", 0),
        ("failed", "done", 1),
        ("cancelled", "done", 1),
        ("failed", "failed", 0),
        ("running", "started", 0),
        ("done", "started", 0),
        ("failed", "started", 1),
        ("needs_human", "needs_human", 0),
        ("running", "done", 4),
        ("pending", "started", 4),
    ],
)
def test_wait_ends_with_what_became_of_the_task(hub, run, status, goal, code):
    hub.on("GET", "tasks/4f2a", a_task(status=status))
    hub.on("GET", f"tasks/{T1}", a_task(status=status))
    hub.streams([b": hello\n\n"])
    result = run("task", "wait", "#4F2A", "--for", goal, "--timeout", "0.2s", "--json")
    assert result.exit_code == code, result.output
    if code == 4:
        assert json.loads(result.stdout)["code"] == "timeout"
    else:
        assert json.loads(result.stdout) == a_task(status=status)


def test_wait_subscribes_first_and_reads_after(hub, run):
    hub.on("GET", "tasks/4f2a", a_task(status="done"))
    hub.streams([])
    assert run("task", "wait", "4f2a").exit_code == 0
    assert [r["path"] for r in hub.requests] == ["events/stream", "tasks/4f2a"]


def test_wait_survives_the_loss_of_the_stream_and_resumes_after_the_last_event(hub, run):
    states = {"now": "assigned"}
    hub.on("GET", "tasks/4f2a", lambda *_: (200, a_task(status=states["now"])))
    hub.on("GET", f"tasks/{T1}", lambda *_: (200, a_task(status=states["now"])))

    def finish():
        states["now"] = "done"
        return frame(9, "task_completed")

    hub.streams([frame(7, "task_assigned")], [finish])
    result = run("task", "wait", "4f2a", "--timeout", "20s")
    assert result.exit_code == 0, result.output
    streams = [r for r in hub.requests if r["path"] == "events/stream"]
    assert [r["headers"].get("Last-Event-ID") for r in streams] == [None, "7"]


def test_wait_notices_a_state_that_was_over_before_it_could_be_read(hub, run):
    hub.on("GET", "tasks/4f2a", a_task(status="assigned"))
    hub.on("GET", f"tasks/{T1}", a_task(status="assigned"))
    hub.streams([frame(1, "task_needs_human")])
    assert run("task", "wait", "4f2a", "--for", "needs_human", "--timeout", "20").exit_code == 0


def test_wait_for_several_ends_at_the_first_that_cannot_be_done(hub, run):
    hub.on("GET", "tasks/4f2a", a_task(status="running"))
    hub.on("GET", "tasks/91bc", a_task(T2, status="failed"))
    hub.streams([])
    result = run("task", "wait", "4f2a", "91bc", "--json")
    assert result.exit_code == 1
    assert [task["status"] for task in json.loads(result.stdout)["tasks"]] == ["running", "failed"]


def test_a_refused_stream_is_a_refusal(hub, run):
    hub.on("GET", "events/stream", {"detail": "Not yours.", "code": "forbidden"}, 403)
    assert run("task", "wait", "4f2a").exit_code == 1


# --- events, identity -------------------------------------------------------------------------


def test_events_show_the_newest_page_in_one_request(hub, run):
    found = {"events": [{"id": 6, "type": "a"}, {"id": 7}], "next_cursor": None, "prev_cursor": 6}
    hub.on("GET", "events", found)
    assert json.loads(run("events", "--limit", 3, "--json").stdout) == found
    assert hub.requests[0]["query"] == {"limit": "3", "tail": "1"}
    assert "older: --before 6" in run("events", "--before", 8).stdout
    assert hub.requests[1]["query"] == {"limit": "50", "tail": "1", "before": "8"}
    run("events", "--after", 8)
    assert hub.requests[2]["query"] == {"limit": "50", "after": "8"}


def test_following_events_begins_with_the_newest_and_misses_none(hub, run):
    hub.on("GET", "events", {"events": [{"id": 6, "type": "a"}], "next_cursor": None})
    stop = frame(8, "task_done") + b"id: 9\ndata: {}\n\n"
    hub.streams([frame(7, "task_started")], [stop])
    command = [sys.executable, str(ROOT / "cli.py"), "events", "--follow", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [json.loads(process.stdout.readline())["id"] for _ in range(3)]
        process.kill()
    assert lines == [6, 7, 8]
    streams = [r for r in hub.requests if r["path"] == "events/stream"]
    assert [r["headers"].get("Last-Event-ID") for r in streams] == ["6", "7"]


def test_status_of_a_session_shows_its_task(hub, run):
    hub.on("GET", "auth/me", {"kind": "session", "name": "w", "role": "worker", "task_id": T1})
    hub.on("GET", "status", {"connected": True, "server_name": "dev", "role": "worker"})
    hub.on("GET", "tasks/check", {"count": 1, "tasks": [a_task(status="running")]})
    hub.on("GET", "interventions", [])
    found = json.loads(run("status", "--json").stdout)
    assert (found["connected"], found["server_name"]) == (True, "dev")
    assert found["tasks"] == [a_task(status="running")]
    assert found["task_summary"]["running"] == found["task_summary"]["total"] == 1
    assert json.loads(run("task", "check", "--json").stdout)["count"] == 1


def test_status_of_a_server_shows_what_is_assigned_to_it(hub, run, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_SESSION_ID", "s1")
    hub.on("GET", "auth/me", {"kind": "server", "name": "dev", "role": "server"})
    hub.on("GET", "status", {})
    hub.on("GET", "tasks/check", {"count": 1, "tasks": [a_task()]})
    hub.on("GET", "interventions", [an_intervention()])
    shown = run("status").stdout
    assert "A title" in shown and "JWT or cookies?" in shown
    [check] = [r for r in hub.requests if r["path"] == "tasks/check"]
    assert check["query"] == {"session_id": "s1"}


@pytest.mark.parametrize(
    "me", [{"kind": "user", "name": "ada"}, {"kind": "session", "role": "orchestrator"}]
)
def test_status_of_who_looks_after_all_shows_all_that_is_in_progress(hub, run, me):
    hub.on("GET", "auth/me", me)
    hub.on("GET", "status", {})
    hub.on("GET", "tasks", {"tasks": [a_task(status="running")]})
    hub.on("GET", "interventions", [])
    assert "A title" in run("status").stdout
    [asked] = [r for r in hub.requests if r["path"] == "tasks"]
    assert set(asked["query"]["status"].split(",")) == set(cli.ACTIVE)


# --- questions, plans -------------------------------------------------------------------------


def an_intervention(**fields):
    return {
        "id": "77aa0000-0000-4000-8000-000000000004",
        "intervention_id": "77aa0000-0000-4000-8000-000000000004",
        "status": "pending",
        "task_id": T1,
        "question": "JWT or cookies?",
    } | fields


@pytest.fixture
def asking(hub):
    """A hub where a question was asked, and is answered once its state is changed."""
    asked = an_intervention()
    hub.on("POST", f"interventions/{asked['id']}/collect", lambda *_: (200, asked))
    hub.on("POST", "tasks/4f2a/help", lambda *_: (201, asked))
    hub.on("GET", "interventions/77aa", lambda *_: (200, asked))
    hub.on("GET", f"interventions/{asked['id']}", lambda *_: (200, asked))
    return asked


HELP = ("task", "help", "4f2a", "--question", "JWT or cookies?", "--wait")


@pytest.mark.parametrize("args", [HELP, ("intervention", "show", "77aa", "--wait")])
def test_waiting_for_an_answer_prints_the_answer_alone(hub, run, asking, args):
    def answered():
        asking.update(status="responded", response="Use JWT\nwith refresh")
        return frame(2, "intervention_responded")

    hub.streams([frame(1, "task_started", T2), answered])
    result = run(*args)
    assert (result.exit_code, result.stdout) == (0, "Use JWT\nwith refresh\n")
    assert hub.requests[0]["path"] == "events/stream"  # before it asks
    claims = [r["body"]["claim"] for r in hub.requests if (r["body"] or {}).get("claim")]
    collecting = [r["body"] for r in hub.requests if r["path"].endswith("/collect")]
    assert collecting and all(body == {"claim": claims[0], "wait": 0} for body in collecting)
    assert len(claims) == len(collecting) + (args == HELP)  # it comes with the question
    hub.streams([])
    assert json.loads(run(*args, "--json").stdout) == asking
    assert hub.requests[-1]["body"]["claim"] != claims[0]


def test_the_claim_to_an_answer_is_kept_alive(hub, run, asking, monkeypatch):
    monkeypatch.setattr(cli, "COLLECT_S", 0.001)
    calls = []

    def collect(request, handler):
        calls.append(request)
        return 200, asking | ({"status": "responded", "response": "x"} if len(calls) > 5 else {})

    hub.on("POST", f"interventions/{asking['id']}/collect", collect)
    hub.streams([])
    assert run(*HELP).stdout == "x\n"


def test_waiting_for_an_answer_ends_when_time_is_up_and_says_how_to_go_on(hub, run, asking):
    hub.streams([])
    result = run(*HELP, "--timeout", "0.1s")
    assert result.exit_code == 4
    assert f"intervention show {asking['id']} --wait" in result.stderr
    hub.streams([])
    assert json.loads(run(*HELP, "--timeout", "0.1s", "--json").stdout)["code"] == "timeout"


def test_a_question_that_is_closed_is_not_waited_for(hub, run, asking):
    hub.streams([])
    asking.update(status="closed", closed_why="cancel")
    result = run(*HELP)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "its task was cancelled" in result.stderr


def test_waiting_survives_the_loss_of_the_hub(hub, run, asking):
    def answered():
        asking.update(status="responded", response="yes")
        return frame(9, "intervention_responded")

    hub.streams([frame(7, "task_note_added")], [answered])
    result = run(*HELP)
    assert (result.exit_code, result.stdout) == (0, "yes\n")


def test_an_answer_that_was_typed_already_is_not_given_twice(hub, run, asking):
    gone = {"detail": "The answer was typed.", "code": "delivered", "fields": {}}
    hub.on("POST", f"interventions/{asking['id']}/collect", gone, 409)
    hub.streams([])
    result = run("intervention", "show", "77aa", "--wait", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["code"] == "delivered"


@pytest.mark.parametrize(
    ("status", "feedback", "code", "said"),
    [
        ("approved", None, 0, "Approved\n"),
        ("approved", "mind the gap", 0, "Approved: mind the gap\n"),
        ("revised", "other way round", 1, "sent back: other way round"),
        ("replaced", None, 1, "replaced by a newer one"),
        ("closed", None, 1, "closed with its attempt"),
    ],
)
def test_waiting_for_a_decision_on_a_plan(hub, run, status, feedback, code, said):
    plans = [{"version": 1, "status": "revised"}, {"version": 2, "status": "pending"}]
    hub.on("POST", "tasks/4f2a/plan", a_task(status="plan_review"))
    hub.on("GET", f"tasks/{T1}/plan", lambda *_: (200, {"plans": plans}))

    def decided():
        plans[1] |= {"status": status, "feedback": feedback}
        return frame(1, "task_plan_approved")

    hub.streams([decided])
    result = run("plan", "submit", "4f2a", "--plan", "do it", "--wait")
    assert result.exit_code == code
    assert said in (result.stdout if code == 0 else result.stderr)


def test_a_plan_that_is_not_decided_on_in_time_is_exit_4(hub, run):
    hub.on("POST", "tasks/4f2a/plan", a_task(status="plan_review"))
    hub.on("GET", f"tasks/{T1}/plan", {"plans": [{"version": 1, "status": "pending"}]})
    hub.streams([])
    result = run("task", "plan", "4f2a", "--plan", "x", "--wait", "--timeout", "0.1s")
    assert (result.exit_code, f"plan show {T1}" in result.stderr) == (4, True)


def test_the_newest_plan_is_shown_whole(hub, run):
    plans = [
        {"version": 1, "status": "revised", "plan": {"summary": "one"}, "feedback": "no"},
        {"version": 2, "status": "pending", "plan": {"steps": ["a", "b"], "summary": "two\x1b[2J"}},
    ]
    hub.on("GET", "tasks/4f2a/plan", {"plans": plans})
    shown = run("plan", "show", "4f2a").stdout
    assert "Version 2: pending" in shown and "steps: [a, b]" in shown and "\x1b" not in shown
    assert shown.index("two") < shown.index("one") < shown.index("no")
    hub.on("GET", "tasks/4f2a/plan", {"plans": []})
    assert "No plan" in run("plan", "show", "4f2a").stdout


def test_open_questions_stand_in_the_view_of_their_task(hub, run):
    hub.on("GET", "tasks/4f2a", a_task(status="needs_human"))
    hub.on("GET", "interventions", [an_intervention()])
    assert "JWT or cookies?" in run("task", "view", "4f2a").stdout
    assert hub.requests[-1]["query"] == {"task_id": T1, "status": "pending"}
    assert json.loads(run("task", "view", "4f2a", "--json").stdout) == a_task(status="needs_human")


def test_interventions_are_listed_with_their_answers(hub, run):
    hub.on("GET", "interventions", [an_intervention(status="responded", response="JWT")])
    shown = run("intervention", "list", "--task-id", "#4F2A", "--status", "responded").stdout
    assert "JWT or cookies?  JWT" in shown
    assert hub.requests[0]["query"] == {"task_id": "4f2a", "status": "responded"}


def test_notes_are_read_oldest_first(hub, run):
    notes = [
        {"content": "one\x1b[2J", "author": "ada", "created_at": "2026-01-01T00:00:00Z"},
        {"content": "two", "author": None, "urgent": True, "created_at": None},
    ]
    hub.on("GET", "tasks/4f2a/notes", notes)
    shown = run("task", "notes", "4f2a").stdout
    assert "ada  one\n" in shown and "urgent: two" in shown and "\x1b" not in shown


# --- users, projects --------------------------------------------------------------------------


def test_a_user_is_made_with_roles_and_a_password_from_standard_input(hub, run):
    hub.on("POST", "users", {"username": "ada", "projects": [{"name": "shop", "role": "admin"}]})
    args = ("user", "create", "ada", "--role", "shop=admin", "--role", "lab=none")
    result = run(*args, "--password-stdin", stdin=b"pass word \n")
    assert result.exit_code == 0 and "admin of shop" in result.stdout
    assert hub.requests[0]["body"] == {
        "username": "ada",
        "is_admin": False,
        "roles": {"shop": "admin"},
        "password": "pass word ",
    }


def test_changing_a_role_leaves_the_others(hub, run):
    hub.on("GET", "users/ada", {"username": "ada", "roles": {"p1": "viewer", "p2": "viewer"}})
    for name, ident in (("shop", "p1"), ("lab", "p2"), ("new", "p3")):
        hub.on("GET", f"projects/{name}", {"id": ident})
    hub.on("PATCH", "users/ada", {"username": "ada"})
    run("user", "update", "ada", "--role", "lab=none", "--role", "new=operator")
    assert hub.sent("PATCH")[0]["body"] == {"roles": {"p1": "viewer", "p3": "operator"}}


def test_the_chosen_project_is_remembered(hub, run, monkeypatch):
    cli.save_config({"hub_url": hub.url, "token": "T"})
    hub.on("GET", "projects/shop", {"id": P1, "name": "shop"})
    hub.on("GET", "tasks", {"tasks": []})
    assert "Using project shop" in run("project", "use", "shop").stdout
    assert saved() == {"hub_url": hub.url, "token": "T", "project": P1}
    run("task", "list")
    assert hub.requests[-1]["query"] == {"project_id": P1}
    assert run("project", "use", "--none").exit_code == 0
    assert saved() == {"hub_url": hub.url, "token": "T"}


# --- pages, completion ------------------------------------------------------------------------


def test_open_prints_the_address_of_the_page(hub, run, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    hub.on("GET", "tasks/4f2a", a_task())
    hub.on("GET", "sessions/w", {"id": "s1"})
    assert run("open").stdout == f"{hub.url}\n"
    assert run("open", "task", "4f2a").stdout == f"{hub.url}/tasks/{T1}\n"
    assert run("open", "session", "w").stdout == f"{hub.url}/sessions/s1\n"
    found = json.loads(run("open", "pipelines", "--json").stdout)
    assert found == {"url": f"{hub.url}/pipelines", "opened": False}


def test_open_starts_the_browser_there_is(hub, run, monkeypatch, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{tmp_path}/seen"\n')
    browser.chmod(0o700)
    env = {**os.environ, "BROWSER": str(browser)}
    command = [sys.executable, str(ROOT / "cli.py"), "open", "events", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"url": f"{hub.url}/events", "opened": True}
    assert (tmp_path / "seen").read_text() == f"{hub.url}/events"


def complete(*words, shell="bash"):
    env = {
        **os.environ,
        "_ORCHESTRATIA_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(("orchestratia", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py")], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_the_shell_completes_commands_names_and_ids(hub, run):
    hub.on("GET", "servers", {"servers": [{"name": "dev-a"}, {"name": "dev-b"}, {"name": "x"}]})
    hub.on("GET", "tasks", {"tasks": [a_task(), a_task(T2)]})
    assert "pipeline" in complete("pip")
    assert complete("server", "show", "dev") == ["dev-a", "dev-b"]
    assert complete("session", "start", "x") == ["x"]
    assert complete("task", "view", "4f") == [T1]
    assert complete("task", "view", "--id", "") == [T1, T2]


def test_completion_never_speaks_into_the_line(run, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_HUB_URL", "http://127.0.0.1:1")
    assert complete("server", "show", "d") == []
    monkeypatch.delenv("ORCHESTRATIA_HUB_URL")
    assert complete("task", "view", "d") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_completion(run, shell):
    made = run("completion", shell).stdout
    assert f"_ORCHESTRATIA_COMPLETE={shell}_complete" in made
    check = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "-n"]}[shell]
    if shutil.which(check[0]):
        subprocess.run([*check, "/dev/stdin"], input=made, text=True, check=True)
