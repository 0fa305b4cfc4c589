"""Random graphs on random servers, in random order, against a model in plain Python.

The model knows tasks, their upstreams and what each server holds; who of several equal servers gets
a task it reads from the hub, and checks that this one could have taken it.
"""

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import auth
import cascade
import logs
import models
import moves
import reading
import servers
import sessions
import tasks
from auth import HUB
from conftest import World, _close, _forget_all, due
from models import Conflict

OPEN = {"pending", "assigned", "running"}
REPOS = ("a", "b")
KEYS = ("k", "l")


class Task:
    def __init__(self, name, repo=None, auto=False, max_attempts=1):
        self.name, self.repo, self.auto, self.max_attempts = name, repo, auto, max_attempts
        self.status, self.attempt, self.failures = "pending", 1, 0
        self.blocks: set[str] = set()
        self.related: set[str] = set()
        self.inputs: dict[str, str] = {}  # key: upstream
        self.resolved: set[tuple] = set()  # (upstream, key or None)
        self.server: str | None = None
        self.asked = auto  # somebody or something has asked to place it
        self.handed: dict | None = None
        self.contracts: dict[str, object] = {}

    def ordering(self) -> set[tuple]:
        return {(up, None) for up in self.blocks} | {(up, k) for k, up in self.inputs.items()}

    def open(self) -> set[tuple]:
        return self.ordering() - self.resolved

    def ready(self) -> bool:
        return self.status == "pending" and not self.open() and self.asked


def some(*statuses):
    """A rule for when there is a task in one of the states."""
    return precondition(lambda self: any(t.status in statuses for t in self.tasks.values()))


class Hub(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        models.open_db(self.folder / "hub.db")
        auth.use_secret(self.folder / "secret")
        sessions.use_logs(logs.LogStore(self.folder / "logs.db"))
        _forget_all()
        self.world = World()
        self.tasks: dict[str, Task] = {}
        self.servers: dict[str, dict] = {}
        self.value = 0

    def teardown(self):
        try:
            self._history()
            self.world.check()
        finally:
            _close()
            shutil.rmtree(self.folder)

    # the model's own rules

    def could_take(self, task: Task, server: dict) -> bool:
        return (
            server["online"]
            and not server["draining"]
            and (task.repo is None or task.repo in server["repos"])
            and len(self.held(server["name"])) < server["slots"]
        )

    def held(self, server: str) -> list[Task]:
        return [
            t
            for t in self.tasks.values()
            if t.server == server and t.status in ("assigned", "running")
        ]

    def upstreams(self, name: str) -> set[str]:
        seen, todo = set(), [up for up, _ in self.tasks[name].ordering()]
        while todo:
            up = todo.pop()
            if up not in seen:
                seen.add(up)
                todo += [u for u, _ in self.tasks[up].ordering()]
        return seen

    def settle(self) -> None:
        """Let the model follow what the hub has placed, checking that it was allowed to."""
        for task in self.tasks.values():
            if task.status != "pending":
                continue
            row = self.world.row(task.name)
            if row["status"] == "assigned":
                assert task.ready(), f"{task.name} was placed and is not ready"
                name = self.world.on(task.name)
                task.status, task.server = "assigned", name
                task.handed = {
                    key: self.tasks[up].contracts[key] for key, up in task.inputs.items()
                }
                assert len(self.held(name)) <= self.servers[name]["slots"]
                assert task.repo is None or task.repo in self.servers[name]["repos"]

    def resolve(self, upstream: str) -> None:
        """The upstream is done: what waited for it, and for the keys it has, waits no more."""
        up = self.tasks[upstream]
        for task in self.tasks.values():
            for edge in task.open():
                if edge[0] == upstream and (edge[1] is None or edge[1] in up.contracts):
                    task.resolved.add(edge)
                    if not task.open():
                        task.asked = True

    def end_attempt(self, task: Task) -> None:
        task.server = None
        task.attempt += 1
        task.status, task.asked, task.handed = "pending", True, None

    def pick(self, data, *statuses) -> Task:
        names = [t.name for t in self.tasks.values() if t.status in statuses]
        return self.tasks[data.draw(st.sampled_from(names), label="task")]

    def linked(self) -> list[str]:
        return [t.name for t in self.tasks.values() if t.blocks or t.inputs or t.related]

    # what happens

    @initialize(slots=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data())
    def some_servers(self, slots, data):
        for n, count in enumerate(slots):
            repos = data.draw(st.sets(st.sampled_from(REPOS)), label="repos")
            name = f"s{n}"
            self.world.server(name, repos=sorted(repos), slots=count)
            self.servers[name] = {
                "name": name,
                "slots": count,
                "repos": repos,
                "online": True,
                "draining": False,
            }

    @precondition(lambda self: len(self.tasks) < 12)
    @rule(
        data=st.data(),
        repo=st.sampled_from([None, None, None, *REPOS]),
        auto=st.booleans(),
        attempts=st.integers(1, 2),
    )
    def create(self, data, repo, auto, attempts):
        task = Task(f"t{len(self.tasks)}", repo, auto, attempts)
        names = sorted(self.tasks)
        if names:
            task.blocks = data.draw(st.sets(st.sampled_from(names), max_size=3), label="after")
            task.inputs = data.draw(
                st.dictionaries(st.sampled_from(KEYS), st.sampled_from(names), max_size=2),
                label="inputs",
            )
            task.related = data.draw(st.sets(st.sampled_from(names), max_size=1), label="related")
        self.world.task(
            task.name,
            after=sorted(task.blocks),
            inputs=task.inputs,
            related=sorted(task.related),
            auto_assign=auto,
            max_attempts=attempts,
            **({"target_repo": repo} if repo else {}),
        )
        self._add(task)

    @precondition(lambda self: len(self.tasks) < 8)
    @rule(data=st.data(), size=st.integers(2, 5))
    def create_pipeline(self, data, size):
        first = len(self.tasks)
        made, items = [], []
        for n in range(size):
            task = Task(f"t{first + n}", auto=data.draw(st.booleans(), label="auto"))
            before = [t.name for t in made]
            if before:
                task.blocks = data.draw(st.sets(st.sampled_from(before), max_size=2))
                task.inputs = data.draw(
                    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(before), max_size=1)
                )
            links = [*sorted(task.blocks)]
            links += [{"task": up, "type": "input", "key": key} for key, up in task.inputs.items()]
            items.append(
                {
                    "id": task.name,
                    "title": task.name,
                    "auto_assign": task.auto,
                    "depends_on": links,
                }
            )
            made.append(task)
        row = tasks.create_pipeline(HUB, self.world.project("shop"), "p", items)
        self.world.ids |= models.loads(row["id_map"])
        for task in made:
            self._add(task, settle=False)
        self.settle()

    def _add(self, task: Task, settle=True):
        self.tasks[task.name] = task
        for up, key in task.ordering():
            upstream = self.tasks[up]
            if upstream.status == "done" and (key is None or key in upstream.contracts):
                task.resolved.add((up, key))
        if task.ordering() and not task.open():
            task.asked = True
        if settle:
            self.settle()

    @some("pending")
    @rule(data=st.data())
    def assign(self, data):
        task = self.pick(data, "pending")
        task.asked = True
        self.world.assign(task.name)
        self.settle()

    @some("assigned")
    @rule(data=st.data())
    def start(self, data):
        task = self.pick(data, "assigned")
        self.world.start(task.name)
        task.status = "running"

    @some("assigned", "running")
    @rule(data=st.data(), extra=st.booleans())
    def complete(self, data, extra):
        task = self.pick(data, "assigned", "running")
        owed = {k for t in self.tasks.values() for k, up in t.inputs.items() if up == task.name}
        if owed - set(task.contracts):
            before = self.world.row(task.name)
            try:
                self.world.complete(task.name, contracts={})
            except cascade.BadContract as refused:
                assert set(refused.fields["contracts"]) == owed - set(task.contracts)
            else:
                raise AssertionError("a contract was missing and nobody minded")
            assert self.world.row(task.name) == before
        self.value += 1
        contracts = {k: [task.name, self.value] for k in owed | ({"k"} if extra else set())}
        self.world.complete(task.name, contracts=contracts)
        task.contracts |= contracts
        task.status, task.server = "done", None
        self.resolve(task.name)
        self.settle()

    @some("assigned", "running")
    @rule(data=st.data())
    def fail(self, data):
        task = self.pick(data, "assigned", "running")
        self.world.fail(task.name)
        task.failures += 1
        if task.failures < task.max_attempts:
            self.end_attempt(task)
        else:
            task.status, task.server = "failed", None
        self.settle()

    @some("failed", "cancelled")
    @rule(data=st.data())
    def retry(self, data):
        task = self.pick(data, "failed", "cancelled")
        self.world.retry(task.name)
        self.end_attempt(task)
        self.settle()

    @some("pending", "assigned", "running")
    @rule(data=st.data(), downstream=st.booleans())
    def cancel(self, data, downstream):
        task = self.pick(data, "pending", "assigned", "running")
        _, also = self.world.cancel(task.name, downstream=downstream)
        below = set()
        if downstream:
            below = {
                t.name
                for t in self.tasks.values()
                if task.name in self.upstreams(t.name) and t.status in OPEN
            }
        assert {self.world.ids[n] for n in below} == set(also)
        for name in below | {task.name}:
            self.tasks[name].status, self.tasks[name].server = "cancelled", None
        self.settle()

    @some("assigned", "running")
    @rule(data=st.data())
    def release(self, data):
        task = self.pick(data, "assigned", "running")
        with models.transaction() as tx:
            tasks.release(tx, self.world.row(task.name), "its server is gone")
        self.end_attempt(task)
        self.settle()

    @precondition(lambda self: len(self.tasks) > 1)
    @rule(data=st.data(), kind=st.sampled_from(["blocks", "input", "related"]))
    def add_dependency(self, data, kind):
        names = sorted(self.tasks)
        pending = sorted(t.name for t in self.tasks.values() if t.status == "pending") or names
        task = self.tasks[
            data.draw(st.sampled_from(pending) | st.sampled_from(names), label="task")
        ]
        up = data.draw(st.sampled_from(names), label="upstream")
        key = data.draw(st.sampled_from(KEYS), label="key") if kind == "input" else None
        before = self.world.row(task.name), self.world.now()
        try:
            self.world.depend(task.name, up, kind, key)
        except (cascade.Cycle, Conflict):
            assert self._refusable(task, up, kind, key)
            assert (self.world.row(task.name), self.world.now()) == before
            return
        assert not self._refusable(task, up, kind, key)
        if kind == "related":
            task.related.add(up)
            return
        if kind == "blocks":
            task.blocks.add(up)
        else:
            task.inputs[key] = up
        upstream = self.tasks[up]
        if upstream.status == "done" and (key is None or key in upstream.contracts):
            task.resolved.add((up, key))

    def _refusable(self, task: Task, up: str, kind: str, key) -> bool:
        if up == task.name:
            return True
        if kind == "related":
            return up in task.related
        there = up in task.blocks if kind == "blocks" else key in task.inputs
        above = up == task.name or task.name in self.upstreams(up)
        return there or above or task.status != "pending"

    @precondition(lambda self: self.linked())
    @rule(data=st.data())
    def remove_dependency(self, data):
        task = self.tasks[data.draw(st.sampled_from(self.linked()), label="task")]
        ups = sorted(task.blocks | set(task.inputs.values()) | task.related)
        up = data.draw(st.sampled_from(ups), label="upstream")
        was_open = bool(task.open())
        self.world.undepend(task.name, up)
        task.blocks.discard(up)
        task.related.discard(up)
        task.inputs = {k: u for k, u in task.inputs.items() if u != up}
        task.resolved = {e for e in task.resolved if e[0] != up}
        if was_open and not task.open() and task.status == "pending":
            task.asked = True
        self.settle()

    @some("pending", "assigned", "running", "done", "failed")
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def amend(self, data, key):
        task = self.pick(data, "pending", "assigned", "running", "done", "failed")
        self.value += 1
        task.contracts[key] = self.value
        tasks.amend_contract(HUB, self.world.ids[task.name], key, self.value)
        if task.status == "done":
            self.resolve(task.name)
        self.settle()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def toggle_server(self, data):
        server = self.servers[data.draw(st.sampled_from(sorted(self.servers)), label="server")]
        if server["online"]:
            self.world.offline(server["name"])
        else:
            self.world.online(server["name"])
        server["online"] = not server["online"]
        self.settle()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def drain_or_resume(self, data):
        server = self.servers[data.draw(st.sampled_from(sorted(self.servers)), label="server")]
        (servers.resume if server["draining"] else servers.drain)(HUB, server["name"])
        server["draining"] = not server["draining"]
        self.settle()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), slots=st.integers(1, 4))
    def set_slots(self, data, slots):
        server = self.servers[data.draw(st.sampled_from(sorted(self.servers)), label="server")]
        server["slots"] = max(slots, len(self.held(server["name"])))
        servers.change_server(HUB, server["name"], {"slots": server["slots"]})
        self.settle()

    @some("done", "failed", "cancelled")
    @rule(data=st.data())
    def say_it_again(self, data):
        """A report that comes late changes nothing."""
        task = self.pick(data, "done", "failed", "cancelled")
        before = self.world.row(task.name)
        for late in (self.world.complete, self.world.fail):
            said = "late" if task.status == "done" else None
            with suppress(Conflict):
                late(task.name, said, attempt=task.attempt)
            assert self.world.row(task.name) == before

    # what holds after each

    @invariant()
    def the_hub_says_what_the_model_says(self):
        found = {r["title"]: r for r in models.rows("SELECT * FROM task")}
        assert set(found) == set(self.tasks)
        for name, task in self.tasks.items():
            row = found[name]
            assert (row["status"], row["attempt"]) == (task.status, task.attempt), name
            assert row["open_deps"] == len(task.open()), name
            if task.status in ("assigned", "running"):
                assert models.loads(row["resolved_inputs"], {}) == task.handed, name
            waits = row["waiting_since"] is not None
            assert waits == task.ready(), f"{name} in the queue"

    @invariant()
    def nobody_who_could_be_served_waits(self):
        for task in self.tasks.values():
            if task.ready():
                assert not any(self.could_take(task, s) for s in self.servers.values()), task.name

    @invariant()
    def the_database_is_whole(self):
        self.world.check()
        for name in self.servers:
            assert self.world.busy(name) == len(self.held(name))

    def _history(self):
        """Each attempt one assignment, at most one start, one end; nothing before its upstreams."""
        done: set[str] = set()
        running: dict[str, int] = {}
        ended = {"task_completed", "task_failed", "task_cancelled", "task_released"}
        for event in self.world.events():
            task, kind = event["task_id"], event["type"]
            if kind in ("task_assigned", "task_auto_assigned"):
                assert task not in running
                running[task] = event["details"]["attempt"]
            elif kind == "task_started":
                assert running[task] == event["details"]["attempt"]
            elif kind in ended:
                attempt = running.pop(task, None)
                assert attempt in (None, event["details"]["attempt"])
                assert attempt or kind == "task_cancelled"
                done |= {task} if kind == "task_completed" else set()
        for task in self.tasks.values():
            row = self.world.row(task.name)
            assert (row["id"] in running) == (task.status in ("assigned", "running"))
            assert (row["id"] in done) == (task.status == "done")
            numbers = [
                r["number"]
                for r in models.rows(
                    "SELECT number FROM attempt WHERE task_id = ? ORDER BY number", (row["id"],)
                )
            ]
            assert len(numbers) == len(set(numbers))
            assert all(n <= task.attempt for n in numbers)
        assert reading.last_event_id() == len(self.world.events())
        assert due(time.time()) == 0
        assert all(moves.row(i) for i in self.world.ids.values())


TestHub = Hub.TestCase
TestHub.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
