"""The public command line, byte by byte: what it sends and what it must be able to read.

`Cli` is written by hand after it: the same requests in the same order, each on a connection of its
own, and the same reading, which breaks (KeyError, TypeError) where the original prints a traceback.
"""

import http.client
import json
import re
import socket
import time
from urllib.parse import urlsplit

import pytest

import auth
import inbox
import models
import sessions
import tasks
from auth import HUB
from models import transaction
from test_wire import Agent

T = "/api/v1/server/tasks"
S = "/api/v1/server"
SLOW_S = 5.0  # the original gives up on `status` after this long


class Failed(Exception):
    """The command ends with exit code 1 and this sentence."""


class Cli:
    """`orchestratia` with this key, session and project in its environment."""

    def __init__(self, address: str, key: str, session: str | None = None, project=None):
        self.host = urlsplit(address).netloc
        self.key, self.session, self.project = key, session, project
        self.seen: list[str] = []  # "METHOD path" of every request

    # the wire

    def raw(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict, bytes]:
        """Send one request as urllib writes it; (status, headers, body)."""
        self.seen.append(f"{method} {path}")
        lines = [f"{method} {path} HTTP/1.1", "Accept-Encoding: identity"]
        if body is not None or method == "POST":
            lines.append(f"Content-Length: {len(body or b'')}")
        lines += [
            f"Host: {self.host}",
            "User-Agent: Python-urllib/3.12",
            f"X-Api-Key: {self.key}",
            "Content-Type: application/json",
            "Connection: close",
        ]
        name, _, port = self.host.partition(":")
        with socket.create_connection((name, int(port)), timeout=20) as connection:
            connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
            return answer.status, dict(answer.getheaders()), answer.read()

    def call(self, method: str, path: str, body=None):
        """What the original gets of a request: the parsed answer, or Failed."""
        sent = None if body is None else json.dumps(body).encode()
        status, headers, answer = self.raw(method, path, sent)
        assert not 300 <= status < 400, f"{method} {path} redirects to {headers.get('Location')}"
        if 200 <= status < 300:
            assert answer, f"{method} {path}: {status} without a body"
            return json.loads(answer)
        assert headers["Content-Type"].startswith("application/json")
        raise Failed(f"HTTP {status}: {json.loads(answer)['detail']}")

    def full(self, ref: str) -> str:
        """A typed id as the original completes it."""
        if len(ref) == 36 and ref.count("-") == 4:
            return ref
        assert len(ref) >= 4, "refused before any request"
        found = [t["id"] for t in self.call("GET", T).get("tasks", []) if t["id"].startswith(ref)]
        if len(found) != 1:
            raise Failed(f"{len(found)} tasks match")
        return found[0]

    # commands

    def create(self, title, spec, assign=None, require_plan=False, depends_on=(), **more):
        ups = [self.full(up) for up in depends_on]
        body = {"title": title, "spec": spec, "priority": "normal", "type": "feature"}
        if self.session:
            body["session_id"] = self.session
        if self.project:
            body["project_id"] = self.project
        body |= more | ({"dependency_ids": ups} if ups else {})
        made = self.call("POST", T, body)
        if not assign:
            return short(made)
        return self.assign(made["id"], assign, require_plan)

    def assign(self, ref, session, require_plan=False):
        body = {"session_name": session} | ({"require_plan": True} if require_plan else {})
        return short(self.call("POST", f"{T}/{self.full(ref)}/assign", body))

    def check(self):
        query = f"?session_id={self.session}" if self.session else ""
        found = self.call("GET", f"{T}/check{query}")
        if found["count"] == 0:
            return []
        return [long(task) for task in found["tasks"]]

    def view(self, ref):
        return long(self.call("GET", f"{T}/{self.full(ref)}"))

    def list(self, status=None):
        query = "&".join(
            [f"status={status}"] * bool(status)
            + [f"project_id={self.project}"] * bool(self.project)
        )
        found = self.call("GET", T + (f"?{query}" if query else ""))
        return [short(task) for task in found["tasks"]]

    def start(self, ref):
        return short(self.call("POST", f"{T}/{self.full(ref)}/start"))

    def complete(self, ref, text, **more):
        try:
            result = json.loads(text)
        except ValueError:
            result = text
        return short(self.call("POST", f"{T}/{self.full(ref)}/complete", {"result": result} | more))

    def fail(self, ref, error):
        return short(self.call("POST", f"{T}/{self.full(ref)}/fail", {"error": error}))

    def help(self, ref, question, context=None, kind="help"):
        body = {"question": question} | ({"context": context} if context else {})
        body["intervention_type"] = kind
        said = self.call("POST", f"{T}/{self.full(ref)}/help", body)
        return said["intervention_id"], said["status"]

    def plan(self, ref, text):
        try:
            plan = json.loads(text)
        except ValueError:
            plan = {"summary": text}
        return short(self.call("POST", f"{T}/{self.full(ref)}/plan", {"plan": plan}))

    def note(self, ref, content, urgent=False):
        body = {"content": content, "urgent": urgent}
        return self.call("POST", f"{T}/{self.full(ref)}/notes", body)

    def notes(self, ref):
        found = self.call("GET", f"{T}/{self.full(ref)}/notes")
        assert isinstance(found, list)
        return [
            ("!" if n["urgent"] else "", n["created_at"][:19], n.get("author", "?"), n["content"])
            for n in found
        ]

    def update(self, ref, **changes):
        return long(self.call("PUT", f"{T}/{self.full(ref)}", changes))

    def cancel(self, ref):
        return self.call("DELETE", f"{T}/{self.full(ref)}")

    def deps_add(self, ref, upstream, kind="blocks", key=None):
        body = {"depends_on_task_id": self.full(upstream), "dependency_type": kind}
        body |= {"contract_key": key} if key else {}
        added = self.call("POST", f"{T}/{self.full(ref)}/dependencies", body)
        return added["resolved"], added["dependency_type"], added.get("contract_key")

    def deps_remove(self, ref, upstream):
        return self.call("DELETE", f"{T}/{self.full(ref)}/dependencies/{self.full(upstream)}")

    def servers(self):
        lines = []
        for server in self.call("GET", f"{S}/servers")["servers"]:
            repos = server.get("repos")
            names = list(repos) if isinstance(repos, dict | list) else []
            shown = [server[k] for k in ("name", "hostname", "os", "status")]
            assert None not in shown
            lines.append((*shown, (server.get("last_heartbeat") or "")[:19], names))
        return lines

    def sessions(self):
        assert self.project, "refused before any request"
        found = self.call("GET", f"{S}/sessions?project_id={self.project}")["sessions"]
        return [(s["id"], s["name"] or "unnamed", s["server_name"], s["status"]) for s in found]

    def interventions(self, task=None, status=None):
        query = [f"task_id={self.full(task)}"] if task else []
        query += [f"status={status}"] if status else []
        found = self.call("GET", f"{S}/interventions" + ("?" + "&".join(query) if query else ""))
        assert isinstance(found, list)
        return [
            (i["id"][:8], i["status"], i.get("intervention_type", "help"), i["question"][:60])
            for i in found
        ]

    def respond(self, ref, response):
        said = self.call("POST", f"{S}/interventions/{ref}/respond", {"response": response})
        return said["id"][:8], said["status"]

    def pipeline(self, document):
        real, made = {}, []
        for n, item in enumerate(document["tasks"]):
            ups = []
            for up in map(str, item.get("depends_on", [])):
                if up in real:
                    ups.append(real[up])
                elif up.isdigit():
                    ups.append(made[int(up)]["id"])
                else:
                    ups.append(self.full(up))
            body = {"title": item["title"], "spec": item["spec"]}
            body |= {"priority": item.get("priority", "normal")}
            body |= {"type": item.get("type", "feature")}
            body |= {"session_id": self.session} if self.session else {}
            body |= {"project_id": self.project} if self.project else {}
            body |= {"dependency_ids": ups} if ups else {}
            task = self.call("POST", T, body)
            real[item.get("id", f"task-{n}")] = task["id"]
            if item.get("assign"):
                body = {"session_name": item["assign"]}
                task = self.call("POST", f"{T}/{task['id']}/assign", body)
            made.append(task)
        return real, [short(task) for task in made]

    def status(self):
        shown = {
            "connected": False,
            "server_name": None,
            "session_name": None,
            "project_name": None,
            "role": None,
            "tasks": [],
            "task_summary": {"pending": 0, "running": 0, "total": 0},
        }
        query = f"?session_id={self.session}" if self.session else ""
        shown |= self.call("GET", f"{S}/status{query}")
        if shown["session_name"]:
            words = ("orchestrat", "platform", "coordinator")
            boss = any(word in shown["session_name"].lower() for word in words)
            shown["role"] = "orchestrator" if boss else "worker"
        if shown["task_summary"]["total"] > 0:
            shown["lines"] = [(t["id"][:8], t["title"], t["status"]) for t in shown["tasks"]]
        return shown


def short(task: dict) -> dict:
    """The short task block; the task."""
    assert None not in [task[k] for k in ("id", "title", "status", "priority")]
    for name in ("type", "assigned_server_name", "target_repo", "target_branch"):
        assert isinstance(task.get(name) or "", str)
    return task


def long(task: dict) -> dict:
    """The long task block; the task."""
    short(task)
    assert isinstance(task["spec"], str)
    for criterion in task.get("acceptance_criteria") or []:
        assert isinstance(criterion, str) and len(criterion) > 1
    for requirement in (task.get("structured_spec") or {}).get("requirements", []):
        assert requirement.get("description") is not None
    for dep in task.get("dependencies") or []:
        assert isinstance(dep["resolved"], bool)
        assert dep["depends_on_task_id"] + dep.get("dependency_type", "blocks")
    for key, value in (task.get("resolved_inputs") or {}).items():
        assert key + json.dumps(value)[:200]
    for name in ("source_session_name", "target_session_name", "created_by", "plan_feedback"):
        assert isinstance(task.get(name) or "", str)
    for name in ("plan", "result"):
        value = task.get(name)
        if isinstance(value, dict) and not ("summary" in value or "error" in value):
            json.dumps(value)[:200]
    return task


# ── where it runs ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shop(app, world):
    """Two servers with a session each: w1 on `dev`, the orchestrator's on `boss`."""
    world.server("dev", repos=["web"], languages=["python"])
    world.server("boss")
    for name, server in (("w1", "dev"), ("orchestrator-1", "boss")):
        made, _ = sessions.open_session(HUB, {"server_id": server, "name": name})
        with transaction() as tx:
            sessions.move(tx, made, "started", "hub", working_directory="/srv/web")
        world.ids[name] = made["id"]
    return world


@pytest.fixture
def w1(shop, served):
    """The command line inside the worker's session, with the key of its server."""
    return Cli(served, shop.keys["dev"], shop.ids["w1"], shop.project("shop")["id"])


@pytest.fixture
def boss(shop, served):
    return Cli(served, shop.keys["boss"], shop.ids["orchestrator-1"], shop.project("shop")["id"])


def given(shop, w1, name="A", **fields) -> str:
    """A task assigned to w1; its id."""
    shop.task(name, **fields)
    shop.assign(name, session_name="w1")
    return shop.ids[name]


# ── every command of class CORE ───────────────────────────────────────────────────────────────


def test_server_list(shop, w1):
    assert [(s[0], s[3], s[5]) for s in w1.servers()] == [
        ("boss", "online", []),
        ("dev", "online", ["web"]),
    ]
    assert w1.seen == [f"GET {S}/servers"]


def test_session_list(shop, w1):
    assert [(s[1], s[2], s[3]) for s in w1.sessions()] == [
        ("orchestrator-1", "boss", "active"),
        ("w1", "dev", "active"),
    ]


def test_status(shop, w1):
    given(shop, w1)
    shown = w1.status()
    assert shown["connected"] is True
    assert (shown["server_name"], shown["session_name"]) == ("dev", "w1")
    assert (shown["project_name"], shown["role"]) == ("shop", "worker")
    assert shown["lines"] == [(shop.ids["A"][:8], "A", "assigned")]
    assert shown["task_summary"] == {"pending": 1, "running": 0, "total": 1}
    w1.start(shop.ids["A"])
    assert w1.status()["task_summary"] == {"pending": 0, "running": 1, "total": 1}


def test_status_outside_of_any_session(shop, w1):
    given(shop, w1)
    w1.session = None
    shown = w1.status()
    assert (shown["session_name"], shown["role"], shown["server_name"]) == (None, None, "dev")
    assert len(shown["lines"]) == 1
    w1.session = "5e550000-0000-4000-8000-000000000000"  # of a hub that was there before
    assert w1.status()["session_name"] is None
    w1.key = "orc_nobody"
    with pytest.raises(Failed, match="HTTP 401: This server key is not valid"):
        w1.status()


def test_a_sessions_own_key_says_whose_it_is(shop, served, w1):
    given(shop, w1)
    shop.working("elsewhere", server="dev")
    inside = Cli(served, auth.session_key(shop.ids["w1"]))
    shown = inside.status()
    assert (shown["session_name"], shown["server_name"]) == ("w1", "dev")
    assert [line[1] for line in shown["lines"]] == ["A"]
    assert [t["title"] for t in inside.check()] == ["A"]
    inside.start(shop.ids["A"])
    assert inside.help(shop.ids["A"], "Q?")[1] == "pending"
    with pytest.raises(Failed, match="HTTP 403: "):
        inside.help(shop.ids["elsewhere"], "Q?")


def test_task_create(shop, w1):
    up = shop.task("up")["id"]
    other = shop.task("other")["id"]
    made = w1.create(
        "é",
        "S",
        depends_on=[up[:8], other],
        priority="high",
        type="bugfix",
        target_repo="web",
        target_branch="dev",
        acceptance_criteria=["c1", "c two"],
    )
    assert w1.seen == [f"GET {T}", f"POST {T}"]
    task = w1.view(made["id"])
    assert (task["title"], task["priority"], task["type"]) == ("é", "high", "bugfix")
    assert (task["target_repo"], task["target_branch"]) == ("web", "dev")
    assert task["acceptance_criteria"] == ["c1", "c two"]
    assert [d["depends_on_task_id"] for d in task["dependencies"]] == [up, other]
    assert (task["source_session_name"], task["created_by"]) == ("w1", "server:dev")


def test_task_create_without_session_and_project(shop, w1):
    w1.session = w1.project = None
    assert w1.create("A", "S")["project_id"] == shop.project("shop")["id"]


def test_task_create_and_assign(shop, boss):
    made = boss.create("A", "S", assign="w1", require_plan=True)
    assert (made["status"], made["target_session_name"]) == ("planning", "w1")
    assert boss.create("B", "S", assign="w1")["status"] == "assigned"


def test_task_check(shop, w1, boss):
    assert w1.check() == []
    given(shop, w1, spec="all of it")
    [task] = w1.check()
    assert (task["title"], task["spec"]) == ("A", "all of it")
    assert boss.check() == []
    w1.session = None
    assert [t["title"] for t in w1.check()] == ["A"]
    w1.complete(task["id"], "done")
    assert w1.check() == []


def test_task_view_and_status(shop, w1):
    task = shop.task("A", structured_spec={"requirements": [{"description": "d"}]})["id"]
    for ref in (task, task[:4], task[:13]):
        assert w1.view(ref)["id"] == task
    with pytest.raises(Failed, match="HTTP 404: There is no task"):
        w1.view("11111111-1111-4111-8111-111111111111")


def test_task_list(shop, w1):
    given(shop, w1)
    shop.task("B")
    assert [t["title"] for t in w1.list()] == ["B", "A"]
    assert [t["title"] for t in w1.list("assigned")] == ["A"]
    w1.project = None
    assert len(w1.list("pending")) == 1


def test_task_assign(shop, boss):
    task = shop.task("A")["id"]
    given = boss.assign(task[:8], "w1")
    assert (given["status"], given["target_session_name"]) == ("assigned", "w1")
    with pytest.raises(Failed, match="HTTP 409: Cannot assign a task that is assigned"):
        boss.assign(task, "w1")
    with pytest.raises(Failed, match="HTTP 404: There is no live session or server called 'w9'"):
        boss.assign(shop.task("B")["id"], "w9")


def test_task_update(shop, boss):
    task = shop.task("A")["id"]
    changed = boss.update(task[:6], title="N", acceptance_criteria=["zz"], target_repo="web")
    assert (changed["title"], changed["acceptance_criteria"]) == ("N", ["zz"])
    assert boss.view(task)["target_repo"] == "web"


def test_task_cancel(shop, boss):
    task = shop.task("A")["id"]
    boss.cancel(task[:6])
    assert boss.view(task)["status"] == "cancelled"
    with pytest.raises(Failed, match="HTTP 409: Cannot cancel a task that is cancelled"):
        boss.cancel(task)


def test_task_start_complete(shop, w1):
    task = given(shop, w1)
    assert w1.start(task[:8])["status"] == "running"
    assert w1.start(task)["status"] == "running"
    done = w1.complete(task, "plain text")
    assert (done["status"], done["result"]) == ("done", "plain text")
    assert w1.complete(task, "plain text") == done  # said again
    with pytest.raises(Failed, match="HTTP 409: Attempt 1 has ended already"):
        w1.complete(task, "something else")


def test_task_fail(shop, w1):
    task = given(shop, w1)
    failed = w1.fail(task, "boom")
    assert (failed["status"], failed["result"]) == ("failed", {"error": "boom"})
    assert w1.fail(task, "boom")["status"] == "failed"


def test_task_help(shop, w1):
    task = given(shop, w1)
    w1.start(task)
    asked, status = w1.help(task[:8], "Q?", context="ctx", kind="question")
    assert status == "pending"
    assert w1.view(task)["status"] == "needs_human"
    assert w1.help(task, "Q?", context="ctx", kind="question") == (asked, "pending")
    assert w1.help(task, "Q?")[0] != asked


def test_task_plan(shop, boss, w1):
    made = boss.create("A", "S", assign="w1", require_plan=True)["id"]
    with pytest.raises(Failed, match="HTTP 409: Cannot start a task that is planning"):
        w1.start(made)
    planned = w1.plan(made[:8], "just text")
    assert (planned["status"], planned["plan"]) == ("plan_review", {"summary": "just text"})
    inbox.revise(HUB, made, "smaller")
    assert w1.view(made)["plan_feedback"] == "smaller"
    assert w1.plan(made, '{"summary": "s", "steps": []}')["status"] == "plan_review"
    inbox.approve(HUB, made)
    assert w1.view(made)["status"] == "running"


def test_task_note_and_notes(shop, w1, boss):
    task = given(shop, w1)
    assert w1.notes(task) == []
    w1.note(task[:8], "half way")
    boss.note(task, "hurry", urgent=True)
    found = w1.notes(task)
    assert [(n[0], n[2], n[3]) for n in found] == [
        ("", "server:dev", "half way"),
        ("!", "server:boss", "hurry"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", n[1]) for n in found)
    assert [n["content"] for n in w1.view(task)["recent_notes"]] == ["half way", "hurry"]


def test_task_deps_add_and_remove(shop, boss):
    one, two = shop.task("one")["id"], shop.task("two")["id"]
    assert boss.deps_add(one[:8], two[:8]) == (False, "blocks", None)
    assert boss.seen == [f"GET {T}", f"GET {T}", f"POST {T}/{one}/dependencies"]
    assert boss.deps_add(one, two, "input", "api") == (False, "input", "api")
    assert boss.deps_add(one, shop.task("x")["id"], "related") == (False, "related", None)
    [a, b, c] = boss.view(one)["dependencies"]
    assert (a["dependency_type"], b["contract_key"], c["resolved"]) == ("blocks", "api", False)
    boss.deps_remove(one, two[:8])
    assert len(boss.view(one)["dependencies"]) == 1


def test_intervention_list_and_respond(shop, w1, boss):
    task = given(shop, w1)
    asked, _ = w1.help(task, "Which one, of all those there are, should it be in the end, then?",
                       kind="question")  # fmt: skip
    [line] = boss.interventions()
    assert line[1:3] == ("pending", "question") and len(line[3]) == 60
    assert boss.interventions(task=task[:8], status="pending") == [line]
    assert boss.respond(line[0], "This one") == (asked[:8], "responded")
    assert boss.interventions(status="pending") == []
    assert boss.interventions(status="responded")[0][0] == asked[:8]
    assert w1.view(task)["status"] == "running"
    with pytest.raises(Failed, match="HTTP 409: server:boss answered this already"):
        boss.respond(asked, "That one")


def test_pipeline_create(shop, boss):
    real, made = boss.pipeline(
        {
            "tasks": [
                {"id": "api", "title": "API", "spec": "s", "assign": "w1"},
                {"id": "ui", "title": "UI", "spec": "s", "depends_on": ["api"], "assign": "w1"},
                {"title": "Docs", "spec": "s", "type": "docs", "depends_on": ["ui", 0]},
            ]
        }
    )
    assert list(real) == ["api", "ui", "task-2"]
    assert [t["status"] for t in made] == ["assigned", "pending", "pending"]
    assert len(boss.view(real["task-2"])["dependencies"]) == 2
    with pytest.raises(Failed, match="HTTP 422: priority"):
        boss.pipeline({"tasks": [{"title": "x", "spec": "s", "priority": "urgent"}]})


# ── the checklist, line by line ───────────────────────────────────────────────────────────────


def walk(shop, w1, boss) -> list[tuple[str, int, dict, bytes]]:
    """Every request of every CORE command, raw: (request, status, headers, body)."""
    a, b = shop.task("a")["id"], shop.task("b")["id"]
    planned = boss.create("p", "s", assign="w1", require_plan=True)["id"]
    asked, _ = w1.help(given(shop, w1, "q"), "Q?", kind="question")
    requests = [
        ("GET", f"{S}/servers", None),
        ("GET", f"{S}/sessions?project_id={w1.project}", None),
        ("GET", f"{S}/status?session_id={w1.session}", None),
        ("GET", f"{T}/check?session_id={w1.session}", None),
        ("GET", T, None),
        ("POST", T, {"title": "t", "spec": "s", "priority": "low", "type": "docs"}),
        ("POST", f"{T}/{b}/dependencies", {"depends_on_task_id": a, "dependency_type": "related"}),
        ("DELETE", f"{T}/{b}/dependencies/{a}", None),
        ("PUT", f"{T}/{a}", {"title": "N"}),
        ("POST", f"{T}/{a}/assign", {"session_name": "w1"}),
        ("GET", f"{T}/{a}", None),
        ("POST", f"{T}/{a}/start", None),
        ("POST", f"{T}/{a}/notes", {"content": "c", "urgent": False}),
        ("GET", f"{T}/{a}/notes", None),
        ("POST", f"{T}/{a}/help", {"question": "Q?", "intervention_type": "help"}),
        ("POST", f"{T}/{planned}/plan", {"plan": {"summary": "x"}}),
        ("GET", f"{S}/interventions", None),
        ("POST", f"{S}/interventions/{asked}/respond", {"response": "yes"}),
        ("POST", f"{T}/{a}/complete", {"result": None}),
        ("POST", f"{T}/{planned}/fail", {"error": "no"}),
        ("DELETE", f"{T}/{b}", None),
    ]
    by = {"respond": boss}
    return [
        (
            f"{method} {path}",
            *by.get(path.rpartition("/")[2], w1).raw(
                method, path, None if body is None else json.dumps(body).encode()
            ),
        )
        for method, path, body in requests
    ]


def test_line_1_every_good_answer_carries_json(shop, w1, boss):
    for request, status, headers, body in walk(shop, w1, boss):
        assert status in (200, 201), (request, status, body)
        assert headers["Content-Type"].startswith("application/json"), request
        json.loads(body)


def test_line_2_exact_paths_answer_without_a_redirect(shop, w1, boss):
    for request, status, headers, _ in walk(shop, w1, boss):
        assert "Location" not in headers and not 300 <= status < 400, request
    for path in (f"{T}/", "/api/v1/server//tasks", f"{S}/servers/", "//api/v1/server/tasks"):
        status, headers, body = w1.raw("GET", path)
        assert status in (200, 404) and "Location" not in headers, path
        json.loads(body)


def test_line_3_lists_are_wrapped_or_bare_as_expected(shop, w1, boss):
    task = given(shop, w1)
    assert isinstance(w1.call("GET", T)["tasks"], list)
    assert isinstance(w1.call("GET", f"{S}/servers")["servers"], list)
    assert isinstance(w1.call("GET", f"{S}/sessions?project_id={w1.project}")["sessions"], list)
    assert w1.call("GET", f"{T}/check").keys() == {"count", "tasks"}
    assert w1.call("GET", f"{T}/{task}/notes") == []
    assert w1.call("GET", f"{S}/interventions") == []
    planned = boss.create("p", "s", assign="w1", require_plan=True)["id"]
    for body, path in (
        (None, f"POST {T}/{task}/start"),
        ({"result": 1}, f"POST {T}/{task}/complete"),
        ({"plan": 1}, f"POST {T}/{planned}/plan"),
        ({"title": "N"}, f"PUT {T}/{planned}"),
        ({"error": "no"}, f"POST {T}/{planned}/fail"),
    ):
        answer = w1.call(*path.split(), body)
        assert answer["id"] in (task, planned), path


def test_line_4_what_is_always_sent_is_always_there(shop, w1, boss):
    task, up = given(shop, w1), shop.task("up")["id"]
    boss.deps_add(task, up, "related")
    for found in (w1.call("GET", T)["tasks"], w1.call("GET", f"{T}/check")["tasks"]):
        for each in found:
            long(each)
            assert None not in [each[k] for k in ("id", "title", "status", "priority", "spec")]
    for server in w1.call("GET", f"{S}/servers")["servers"]:
        assert None not in [server[k] for k in ("name", "hostname", "os", "status")]
    for session in w1.call("GET", f"{S}/sessions?project_id={w1.project}")["sessions"]:
        assert None not in [session[k] for k in ("id", "name", "server_name", "status")]
    said = w1.call("POST", f"{T}/{task}/help", {"question": "Q?"})
    assert (said["status"], bool(said["intervention_id"])) == ("pending", True)
    [asked] = w1.call("GET", f"{S}/interventions")
    assert None not in [asked[k] for k in ("id", "status", "question")]
    w1.note(task, "c")
    assert w1.call("GET", f"{T}/{task}/notes")[0]["created_at"]
    standing = w1.call("GET", f"{S}/status")
    assert standing["connected"] is True
    assert standing["task_summary"].keys() == {"pending", "running", "total"}
    assert standing.keys() >= {
        "server_name", "server_id", "session_id", "session_name", "project_id", "project_name",
        "role", "tasks",
    }  # fmt: skip


@pytest.mark.parametrize("data", [1, "x", [1, 2], None, {"a": [None]}])
def test_line_5_inputs_and_spec_are_objects(shop, w1, data):
    spec = {"requirements": [{"description": "d", "priority": "must"}]}
    shop.task("up")
    shop.task("down", inputs={"k": "up"}, structured_spec=spec)
    plain = shop.task("plain")["id"]
    shop.assign("up", session_name="w1")
    w1.complete(
        shop.ids["up"], json.dumps({"contracts": {"k": {"status": "fulfilled", "data": data}}})
    )
    down = w1.view(shop.ids["down"])
    assert down["resolved_inputs"] == {"k": data}
    assert down["structured_spec"]["requirements"] == spec["requirements"]
    assert w1.view(plain)["resolved_inputs"] == {}
    assert w1.view(plain)["structured_spec"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/v1/server/nothing/here", None, 404),
        ("PUT", f"{S}/status", b"{}", 405),
        ("GET", f"{T}/11111111-1111-4111-8111-111111111111", None, 404),
        ("GET", f"{T}?status=open", None, 422),
        ("GET", f"{S}/interventions?status=open", None, 422),
        ("POST", T, b'{"spec": "s"}', 422),
        ("POST", T, b'{"title": ["a"], "spec": "s"}', 422),
        ("POST", T, b"[1]", 422),
        ("POST", T, b"{", 400),
        ("POST", T, b"\xff", 400),
        ("POST", T, b"null", 422),
        ("POST", f"{T}/{{A}}/help", b"{}", 422),
        ("POST", f"{T}/{{A}}/help", b'{"question": "x", "intervention_type": "yell"}', 422),
        ("POST", f"{T}/{{A}}/help", b'{"question": " "}', 422),
        ("POST", f"{T}/{{A}}/plan", b"{}", 422),
        ("POST", f"{T}/{{A}}/plan", b'{"plan": NaN}', 400),
        ("POST", f"{T}/{{A}}/notes", b'{"urgent": true}', 422),
        ("POST", f"{T}/{{A}}/notes", b'{"content": null}', 422),
        ("POST", f"{S}/interventions/abc/respond", b'{"response": "x"}', 404),
        ("POST", f"{S}/interventions/abcd/respond", b"{}", 422),
        ("POST", f"{S}/remote/exec?project_id=x", b'{"command": "ls"}', 404),
        ("GET", "/api/v1/server/tasks/%ff%00", None, 404),
    ],
)
def test_line_6_every_error_is_one_sentence(shop, w1, method, path, body, status):
    path = path.replace("{A}", given(shop, w1))
    got, headers, answer = w1.raw(method, path, body)
    assert got == status, answer
    assert headers["Content-Type"].startswith("application/json")
    detail = json.loads(answer)["detail"]
    assert isinstance(detail, str) and detail.endswith(".")
    assert "Traceback" not in detail


def test_line_6_refusals_of_the_credential_too(shop, w1):
    for key in ("", "orc_nobody", "orcs_x.y"):
        w1.key = key
        with pytest.raises(Failed, match="HTTP 401: "):
            w1.list()
    w1.key = shop.keys["dev"]
    with pytest.raises(Failed, match=r"HTTP 403: .*\."):
        w1.call("POST", f"{S}/servers/dev/drain", {})


def test_line_7_what_is_left_out_or_too_much_is_taken(shop, w1):
    task = given(shop, w1)
    status, _, body = w1.raw("POST", f"{T}/{task}/start")
    assert (status, json.loads(body)["status"]) == (200, "running")
    w1.call("POST", f"{T}/{task}/notes", {"content": "no urgent"})
    w1.call("POST", f"{T}/{task}/notes", {"content": "null", "urgent": None, "mood": "good"})
    said = w1.call("POST", f"{T}/{task}/help", {"question": "Q?", "context": "", "urgency": "high"})
    assert inbox.get_intervention(HUB, said["intervention_id"])["kind"] == "help"
    said = w1.call(
        "POST",
        f"{T}/{task}/help",
        {
            "question": "Q?",
            "context": None,
            "intervention_type": "question",
            "target_session_id": shop.ids["orchestrator-1"],
            "whatever": [1],
        },
    )
    assert inbox.get_intervention(HUB, said["intervention_id"])["kind"] == "question"
    status, _, _ = w1.raw("GET", f"{T}?limit=5&whatever=1&status=&q=")
    assert status == 200
    made = w1.call(
        "POST",
        T,
        {
            "title": "t",
            "spec": "s",
            "priority": None,
            "type": None,
            "session_id": None,
            "project_id": None,
            "target_repo": None,
            "target_branch": None,
            "acceptance_criteria": None,
            "dependency_ids": None,
        },
    )
    assert (made["priority"], made["acceptance_criteria"]) == ("normal", [])
    assert w1.call("POST", T, {"title": "t", "spec": "s", "dependency_ids": []})["id"]


STATS = {
    "files_changed": 2,
    "insertions": 2,
    "deletions": 0,
    "files": [{"path": "a", "insertions": 1, "deletions": 0}],
    "head_commit": "dfb0a55",
    "base_commit": None,
    "binary_files": [],
}


@pytest.mark.parametrize("text", ["plain", "42", "null", "[1]", '"x"', "true", "1.5", "{}", '""'])
def test_line_7_a_result_may_be_any_json(shop, w1, text):
    task = given(shop, w1)
    done = w1.complete(task, text, git_diff_stats=STATS)
    assert done["result"] == ("plain" if text == "plain" else json.loads(text))
    assert done["git_diff_stats"] == STATS
    assert long(w1.view(task))["status"] == "done"
    w1.list()


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", '{"a": [NaN]}', "1e999"])
def test_line_7_nan_is_refused_and_nothing_is_changed(shop, w1, token):
    task = given(shop, w1)
    with pytest.raises(Failed, match="HTTP 400: The request body is not valid JSON: .*[a-zI]"):
        w1.complete(task, token)
    body = b'{"result": ' + token.encode() + b"}"
    status, _, answer = w1.raw("POST", f"{T}/{task}/complete", body)
    assert status in (400, 422) and json.loads(answer)["detail"]
    assert w1.view(task)["status"] == "assigned"


def test_line_8_the_list_is_the_index_of_short_ids(shop, w1):
    shop.task("hidden", project="other")
    for n in range(120):
        shop.task(f"t{n}")
    found = w1.call("GET", T)["tasks"]
    assert [t["title"] for t in found] == [f"t{n}" for n in reversed(range(120))]


def same_start(table: str, ids: list[str]) -> list[str]:
    """Rename rows so that their ids begin alike; the new ids."""
    made = [f"abcd1234-0000-4000-8000-00000000000{n}" for n in range(len(ids))]
    with transaction():
        models.execute("PRAGMA defer_foreign_keys = 1")
        for old, new in zip(ids, made, strict=True):
            models.execute(f"UPDATE {table} SET id = ? WHERE id = ?", (new, old))
    return made


def test_line_8_prefixes_count_on_the_server_too(shop, w1, boss):
    task = given(shop, w1)
    one, two = (w1.help(task, q, kind="question")[0] for q in ("one?", "two?"))
    for ref in (one, one[:8], one[:4], f"%23{one[:8]}", one.upper(), one.replace("-", "")):
        assert w1.call("GET", f"{S}/interventions/{ref}")["question"] == "one?"
    ids = same_start("intervention", [one, two])
    status, _, answer = boss.raw("POST", f"{S}/interventions/abcd1234/respond", b'{"response":"x"}')
    assert status == 409
    refused = json.loads(answer)
    assert "fits 2 interventions: say more" in refused["detail"]
    assert refused["fields"]["candidates"] == [
        {"id": ids[0], "name": "one?"},
        {"id": ids[1], "name": "two?"},
    ]
    with pytest.raises(Failed, match="HTTP 404"):
        boss.respond("abc", "too short")
    assert boss.respond(ids[1], "yes")[1] == "responded"
    assert w1.call("GET", f"{T}/{task[:4]}")["id"] == task


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"title": "", "spec": "s"}, 422),
        ({"title": "t", "spec": ""}, 422),
        ({"title": "t", "spec": "s", "priority": "urgent"}, 422),
        ({"title": "t", "spec": "s", "type": "thing"}, 422),
        ({"title": "t", "spec": "s", "dependency_ids": ["{A}", "{A}"]}, 409),
        ({"title": "t", "spec": "s", "dependency_ids": ["nothing"]}, 404),
    ],
)
def test_line_9_what_the_client_does_not_check_is_checked(shop, w1, body, status):
    task = shop.task("A")["id"]
    sent = json.dumps(body).replace("{A}", task).encode()
    assert w1.raw("POST", T, sent)[0] == status
    assert len(w1.list()) == 1


def test_line_9_dependencies_too(shop, boss):
    a, b = shop.task("A")["id"], shop.task("B")["id"]
    boss.deps_add(a, b)
    for upstream, kind, key, status in (
        (a, "blocks", None, 409),
        (b, "blocks", None, 409),
        (b, "input", None, 422),
        (b, "after", None, 422),
    ):
        with pytest.raises(Failed, match=f"HTTP {status}: "):
            boss.deps_add(a, upstream, kind, key)
    with pytest.raises(Failed, match="HTTP 409: .*cycle"):
        boss.deps_add(b, a)
    assert boss.deps_add(b, a, "related")[1] == "related"
    with pytest.raises(Failed, match="HTTP 422: Unknown status"):
        boss.list("open")


def test_line_10_who_speaks_is_known_by_the_key_alone(shop, w1, boss):
    task = given(shop, w1)
    body = {"content": "c", "author": "admin", "session_id": shop.ids["orchestrator-1"]}
    assert w1.call("POST", f"{T}/{task}/notes", body)["author"] == "server:dev"
    asked, _ = w1.help(task, "Q?", kind="question")
    with pytest.raises(Failed, match="HTTP 403: A question cannot be answered with the key of who"):
        w1.respond(asked, "me")
    help_, _ = w1.help(task, "H?")
    approval, _ = w1.help(task, "A?", kind="approval")
    for ref in (help_, approval):
        with pytest.raises(Failed, match="HTTP 403: This is for people"):
            boss.respond(ref, "yes")
    assert boss.respond(asked, "yes")[1] == "responded"
    for refused in (
        lambda: boss.start(task),
        lambda: boss.complete(task, "mine"),
        lambda: boss.fail(task, "mine"),
        lambda: boss.help(task, "mine?"),
        lambda: boss.plan(task, "mine"),
        lambda: w1.call("POST", f"{T}/{task}/plan/approve", {}),
    ):
        with pytest.raises(Failed, match="HTTP 403: "):
            refused()


def test_line_11_status_is_quick_however_much_there_is(shop, w1):
    document = [{"id": f"t{n}", "title": f"t{n}", "auto_assign": True} for n in range(500)]
    with transaction():
        models.execute("UPDATE server SET slots = 1000")
    tasks.create_pipeline(HUB, shop.project("shop"), "many", document)
    w1.session = None
    began = time.monotonic()
    shown = w1.status()
    assert time.monotonic() - began < SLOW_S
    assert shown["task_summary"]["total"] > 100


def test_line_12_a_task_stays_when_its_assignment_fails(shop, boss):
    with pytest.raises(Failed, match="HTTP 404"):
        boss.create("A", "S", assign="nobody")
    [task] = boss.list("pending")
    assert (task["title"], task["status"]) == ("A", "pending")
    assert boss.assign(task["id"], "w1")["status"] == "assigned"


def test_a_revoked_key_is_told_so(shop, w1):
    with transaction():
        models.execute("UPDATE server SET revoked = 1 WHERE name = 'dev'")
    with pytest.raises(Failed, match="HTTP 401: .*revoked"):
        w1.check()


def test_nothing_of_another_project_is_seen_or_touched(shop, served, w1):
    theirs = shop.server("far", project="other")
    sessions.open_session(HUB, {"server_id": theirs, "name": "theirs"})
    task = given(shop, w1)
    asked, _ = w1.help(task, "Q?", kind="question")
    far = Cli(served, shop.keys["far"], project=w1.project)
    for deed in (
        lambda: far.view(task),
        lambda: far.notes(task),
        lambda: far.note(task, "x"),
        lambda: far.respond(asked, "x"),
        lambda: far.sessions(),
        lambda: far.list(),
        lambda: far.interventions(task=task),
        lambda: far.cancel(task),
        lambda: far.create("x", "s"),
    ):
        with pytest.raises(Failed, match="HTTP 404: "):
            deed()
    assert far.interventions() == []
    assert [s[0] for s in far.servers()] == ["far"]


# ── at a real hub ─────────────────────────────────────────────────────────────────────────────


def agent_of(hub, key: str) -> Agent:
    def post(body):
        answer = hub.ask("POST", "server/poll", body, key=key)
        return answer.status_code, answer.json()

    return Agent(post)


def test_a_workers_day_with_a_restart_of_the_hub_in_the_middle(hub, until):
    project = hub.api("POST", "projects", {"name": "shop"})["id"]
    dev = hub.register("dev")
    agent = agent_of(hub, dev["api_key"])
    agent.connect(capabilities={"slots": 4})
    made = hub.api("POST", "tasks", {"title": "A", "command": ["x"], "require_plan": True})
    hub.api("POST", f"tasks/{made['id']}/assign", {"server": "dev"})
    agent.call(wait=5)
    [command] = agent.commands
    session = command["start"]["session_id"]
    agent.call(agent.ack(command["id"]), agent.started(session))
    cli = Cli(hub.url, dev["api_key"], session, project)

    [task] = cli.check()
    assert task["status"] == "planning"
    assert cli.plan(task["id"][:8], "first this, then that")["status"] == "plan_review"
    hub.restart()
    hub.api("POST", f"tasks/{task['id']}/plan/approve", {"comment": "go"})
    asked, _ = cli.help(task["id"], "JWT or cookies?")
    assert [i[1] for i in cli.interventions(status="pending")] == ["pending"]
    hub.restart()
    assert cli.view(task["id"])["status"] == "needs_human"
    hub.api("POST", f"interventions/{asked[:8]}/respond", {"response": "JWT"})
    assert hub.ask("POST", f"interventions/{asked}/respond", {"response": "x"}).status_code == 409
    assert cli.view(task["id"])["status"] == "running"
    assert cli.status()["task_summary"]["running"] == 1

    agent.commands.clear()
    alive = {"session_id": session, "tmux_name": f"orc-{session[:12]}", "alive": True}
    agent.connect(alive)
    until(lambda: agent.call(wait=0.2) is not None and len(agent.commands) == 2)
    approved, answered = agent.commands
    assert (approved["type"], approved["comment"]) == ("plan_approved", "go")
    assert (answered["type"], answered["response"]) == ("intervention_response", "JWT")
    assert answered["session_id"] == session
    agent.call(agent.ack())

    assert cli.complete(task["id"], '{"summary": "done"}')["status"] == "done"
    assert cli.check() == []
    assert cli.status()["connected"] is True


def test_the_real_hub_takes_the_odd_ones_too(hub):
    hub.api("POST", "projects", {"name": "shop"})
    dev = hub.register("dev")
    agent = agent_of(hub, dev["api_key"])
    agent.connect(capabilities={"slots": 4})
    cli = Cli(hub.url, dev["api_key"])
    task = cli.create("é", "S")["id"]
    cli.assign(task, "dev")
    status, headers, body = cli.raw("POST", f"{T}/{task}/start")
    assert (status, json.loads(body)["status"]) == (200, "running")
    assert "Location" not in headers
    for path in (f"{T}/", "/api/v1/server//tasks", "/api/v1/server/nothing"):
        status, headers, body = cli.raw("GET", path)
        assert status in (200, 404) and isinstance(json.loads(body), dict)
    for token in (b"NaN", b"-Infinity"):
        status, _, body = cli.raw("POST", f"{T}/{task}/complete", b'{"result": ' + token + b"}")
        assert status in (400, 422) and json.loads(body)["detail"]
    assert cli.complete(task, "[null, {}]")["result"] == [None, {}]
    assert cli.cancel(cli.create("B", "S")["id"])["cancelled"] is True
