"""Clients do what users do, a nemesis breaks what can break, and the history of it all is checked.

    python tests/chaos.py [--minutes 60] [--seed N] [--agents 3] [--clients 4]

A real hub, real agents with tmux behind proxies of their own, clients behind proxies too. Every
call is recorded as done, refused or unknown (no answer came). At the end the nemesis stops,
everything comes to rest, and the history is held against what is stored:

- what was acknowledged is there, once; what was refused is not; what is unknown, at most once
- no call sees an older state of a task than one that had ended before it began
- each task ends, or is open for a reason that is alive; each attempt goes its way once
- what a task was handed is what its upstreams delivered; what it printed is stored, byte by byte
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.append(str(ROOT / "tests"))

import requests  # noqa: E402

from conftest import AgentProcess, HubProcess, wait_until  # noqa: E402
from faulting import FAST, Proxy, Told, check, reading, through  # noqa: E402

PRINTED = 30  # lines a body prints
BODY = """
echo "$ORCHESTRATIA_TASK_ID $$" >> "$1"
n=0; while [ $n -lt 30 ]; do echo "line $n of $ORCHESTRATIA_TASK_ID"; n=$((n+1)); done
sleep "$2"
[ "$3" = fail ] && exit 3
printf '{"summary": "ran", "contracts": {"n": {"status": "fulfilled", "data": "%s"}}}' \\
  "$ORCHESTRATIA_TASK_ID" > "$ORCHESTRATIA_RESULT_FILE"
"""
PENDING = {"blocked", "ready", "pending", "queued"}
STATE_OF = {
    "task_created": "pending",
    "task_assigned": "assigned",
    "task_auto_assigned": "assigned",
    "task_started": "running",
    "task_completed": "done",
    "task_failed": "failed",
    "task_cancelled": "cancelled",
    "task_retried": "pending",
    "task_released": "pending",
}


@dataclass
class Call:
    """One call of a client: when it began and ended (monotonic seconds), and what came of it."""

    client: int
    verb: str
    about: str  # a task's id, or a title for what makes one
    began: float
    ended: float = 0.0
    code: int | None = None  # None: no answer came
    seen: dict = field(default_factory=dict)
    said: str = ""


class Client(threading.Thread):
    """Does one thing after the other, never again what has failed."""

    VERBS = (
        ("create",) * 5 + ("read",) * 6 + ("note",) * 2 + ("cancel", "retry", "update", "depend")
    )

    def __init__(self, number: int, run: "Run"):
        super().__init__(daemon=True)
        self.number, self.run_, self.dice = number, run, random.Random(run.seed + number)
        self.proxy = Proxy(run.hub.settings["port"])
        self.history: list[Call] = []
        self.over = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self.over.is_set():
            verb = self.dice.choice(self.VERBS)
            if verb == "create" or self.run_.known:
                getattr(self, f"_{verb}")()
            self.over.wait(self.dice.uniform(0.1, 0.9) * self.run_.pace)
        self.proxy.close()

    def _call(self, verb: str, about: str, method: str, path: str, body=None, said="") -> Call:
        call = Call(self.number, verb, about, time.monotonic(), said=said)
        headers = {"Authorization": f"Bearer {self.run_.token}", "Connection": "close"}
        with contextlib.suppress(requests.RequestException):
            answer = requests.request(
                method,
                f"{self.proxy.url}/api/v1/{path}",
                json=body,
                headers=headers,
                timeout=(3, 8),
            )
            if answer.status_code < 500:
                call.code, call.seen = answer.status_code, answer.json()
            elif answer.status_code in (503, 507):  # says itself that nothing was changed
                call.code = answer.status_code
            else:
                self.run_.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        call.ended = time.monotonic()
        self.history.append(call)
        return call

    def _some(self) -> str:
        return self.dice.choice(self.run_.known[-60:])

    def _create(self) -> None:
        self.count += 1
        title = f"c{self.number}-{self.count}"
        ups = {self._some() for _ in range(self.dice.randrange(3))} if self.run_.known else set()
        end = "fail" if self.dice.random() < 0.08 else "well"
        work = f"{self.dice.uniform(0, 0.6):.2f}"
        body = {
            "title": title,
            "command": ["sh", "-c", BODY, "body", str(self.run_.journal), work, end],
            "auto_assign": True,
            "max_attempts": 2,
            "dependencies": [
                {"depends_on_task_id": up, "dependency_type": "input", "contract_key": "n"}
                if n == 0
                else {"depends_on_task_id": up, "dependency_type": "blocks"}
                for n, up in enumerate(sorted(ups))
            ],
        }
        call = self._call("create", title, "POST", "tasks", body)
        if call.code == 201:
            self.run_.known.append(call.seen["id"])

    def _read(self) -> None:
        task = self._some()
        self._call("read", task, "GET", f"tasks/{task}")

    def _note(self) -> None:
        self.count += 1
        task, text = self._some(), f"note c{self.number}-{self.count}"
        self._call("note", task, "POST", f"tasks/{task}/notes", {"content": text}, text)

    def _cancel(self) -> None:
        task = self._some()
        self._call("cancel", task, "DELETE", f"tasks/{task}")

    def _retry(self) -> None:
        task = self._some()
        self._call("retry", task, "POST", f"tasks/{task}/retry", {})

    def _update(self) -> None:
        self.count += 1
        task, text = self._some(), f"spec c{self.number}-{self.count}"
        self._call("update", task, "PATCH", f"tasks/{task}", {"spec": text}, text)

    def _depend(self) -> None:
        task, up = self._some(), self._some()
        body = {"depends_on_task_id": up, "dependency_type": "blocks"}
        self._call("depend", task, "POST", f"tasks/{task}/dependencies", body, up)


class Nemesis(threading.Thread):
    """Breaks one thing after the other, sometimes two at a time, and mends what it broke."""

    def __init__(self, run: "Run"):
        super().__init__(daemon=True)
        self.run_, self.dice = run, random.Random(run.seed)
        self.done = Counter()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.dice.uniform(0.3, 3.0)):
            name = self.dice.choice(
                ("kill_hub", "kill_agent", "kill_agent", "pause_hub", "pause_agent", "partition")
                + ("one_way", "delay", "twice", "cut", "cut_clients", "stop_hub", "reboot")
            )
            self.done[name] += 1
            getattr(self, f"_{name}")()

    def _agent(self):
        return self.dice.choice(self.run_.agents)

    def _kill_hub(self) -> None:
        self.run_.hub.kill()
        time.sleep(self.dice.uniform(0, 1.5))
        self.run_.hub.start()

    def _stop_hub(self) -> None:
        self.run_.hub.stop()
        self.run_.hub.start()

    def _kill_agent(self) -> None:
        agent = self._agent()
        agent.kill()
        time.sleep(self.dice.uniform(0, 2))
        self.run_.start(agent)

    def _reboot(self) -> None:
        """Its terminals are gone too."""
        agent = self._agent()
        agent.kill()
        agent.tmux("kill-server")
        time.sleep(self.dice.uniform(0, 2))
        self.run_.start(agent)

    def _pause(self, pid: int, most: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.1, most))
        os.kill(pid, signal.SIGCONT)

    def _pause_hub(self) -> None:
        self._pause(self.run_.hub.process.pid, 2.5)

    def _pause_agent(self) -> None:
        self._pause(self._agent().process.pid, 4.0)

    def _proxy(self) -> Proxy:
        return self.run_.proxies[self._agent().name]

    def _partition(self) -> None:
        proxy = self._proxy()
        proxy.partition()
        time.sleep(self.dice.choice((0.5, 2.0, 7.0)))  # the last is longer than a lease
        proxy.heal()

    def _one_way(self) -> None:
        proxy = self._proxy()
        setattr(proxy, self.dice.choice(("hold_up", "hold_down")), True)
        time.sleep(self.dice.uniform(0.5, 3))
        proxy.heal()

    def _delay(self) -> None:
        proxy = self._proxy()
        proxy.delay_s = self.dice.uniform(0.02, 0.3)
        time.sleep(self.dice.uniform(0.5, 3))
        proxy.delay_s = 0.0

    def _twice(self) -> None:
        """Calls of an agent arrive twice."""
        proxy = self._proxy()
        proxy.twice = b"POST "
        time.sleep(self.dice.uniform(1, 3))
        proxy.twice = b""

    def _cut(self) -> None:
        self._proxy().cut()

    def _cut_clients(self) -> None:
        for client in self.run_.clients:
            client.proxy.lose_answer = b"/api/v1/"


class Run:
    """Everything of one run, from nothing to the verdict."""

    def __init__(self, folder: Path, seed: int, agents: int = 3, clients: int = 4, pace: float = 1):
        self.folder, self.seed, self.pace = folder, seed, pace
        self.journal = folder / "journal"
        self.journal.touch()
        self.known: list[str] = []
        self.wrong: list[str] = []
        self.hub = HubProcess(folder / "hub", **FAST | {"lost_after_s": 2})
        self.hub.api("POST", "projects", {"name": "shop"})
        self.token = self.hub.login()
        self.proxies, self.agents = {}, []
        for n in range(agents):
            agent = AgentProcess(self.hub, folder / f"a{n}", f"a{n}", slots=3)
            self.proxies[agent.name] = Proxy(self.hub.settings["port"])
            through(agent, self.hub, self.proxies[agent.name], "poll" if n == 0 else "")
            self.agents.append(agent)
            self.start(agent)
        self.told = Told(self.hub)
        self.clients = [Client(n, self) for n in range(clients)]
        self.nemesis = Nemesis(self)

    def start(self, agent: AgentProcess) -> None:
        """As AgentProcess.start, without waiting for a hub that may be away."""
        agent.spawn()

    def go(self, seconds: float) -> None:
        for thread in (*self.clients, self.nemesis):
            thread.start()
        time.sleep(seconds)
        self.nemesis.over.set()
        self.nemesis.join(60)
        for client in self.clients:
            client.over.set()
        for client in self.clients:
            client.join(30)
        wait_until(self._at_rest, 180, 0.5)

    def _at_rest(self) -> bool:
        """Nothing is under way: what is open waits for something that has failed."""
        with contextlib.suppress(requests.RequestException), reading(self.hub) as db:
            moving = db.execute(
                "SELECT COUNT(*) FROM task WHERE status NOT IN ('done', 'failed', 'cancelled')"
                " AND (status <> 'pending' OR open_deps = 0)"
            ).fetchone()[0]
            live = db.execute(
                "SELECT COUNT(*) FROM session WHERE state NOT IN ('closed', 'failed', 'lost')"
            ).fetchone()[0]
            return not moving and not live and self.told.up_to_date()
        return False

    def close(self) -> None:
        self.told.over.set()
        for client in self.clients:
            client.over.set()
        for agent in self.agents:
            agent.stop()
            agent.tmux("kill-server")
        for proxy in self.proxies.values():
            proxy.close()
        self.hub.stop()


# ── the verdict ───────────────────────────────────────────────────────────────────────────────


class Verdict:
    """What the history and the database say of each other."""

    def __init__(self, run: Run):
        self.run = run
        self.calls = sorted((c for x in run.clients for c in x.history), key=lambda c: c.ended)
        with reading(run.hub) as db:
            self.tasks = {row["id"]: dict(row) for row in db.execute("SELECT * FROM task")}
            self.events = [dict(row) for row in db.execute("SELECT * FROM event ORDER BY id")]
            self.notes = Counter(row[0] for row in db.execute("SELECT content FROM note"))
            self.edges = {
                (row["task_id"], row["upstream_id"])
                for row in db.execute("SELECT * FROM dependency")
            }
            self.inputs = db.execute(
                "SELECT task_id, upstream_id FROM dependency WHERE kind = 'input'"
            ).fetchall()
            self.sessions = [dict(row) for row in db.execute("SELECT * FROM session")]
        self.wrong = list(run.wrong)
        self.titles = Counter(task["title"] for task in self.tasks.values())
        self._timelines()

    def _timelines(self) -> None:
        """(state, attempt) of each task, in the order of the log."""
        self.timeline = defaultdict(list)
        attempt = defaultdict(lambda: 1)
        for event in self.events:
            if event["type"] in STATE_OF and event["task_id"]:
                task = event["task_id"]
                if event["type"] in ("task_retried", "task_released"):
                    attempt[task] += 1
                self.timeline[task].append((STATE_OF[event["type"]], attempt[task]))

    def check(self) -> list[str]:
        """What is not as it was said, in sentences. Raises AssertionError for what may never be."""
        check(self.run.hub, self.run.told.finish())
        return self.judge()

    def judge(self) -> list[str]:
        """The same, of the calls alone."""
        for call in self.calls:
            getattr(self, f"_{call.verb}")(call)
        self._count("cancel", "task_cancelled")
        self._count("retry", "task_retried", also="task_released")  # what was lost
        self._order()
        self._ends()
        self._handed()
        self._printed()
        return self.wrong

    def _says(self, condition: bool, sentence: str) -> None:
        if not condition:
            self.wrong.append(sentence)

    def _create(self, call: Call) -> None:
        found = self.titles[call.about]
        if call.code == 201:
            self._says(found == 1, f"{call.about} was accepted and is there {found} times")
        elif call.code is None:
            self._says(found <= 1, f"{call.about} is there {found} times")
        else:
            self._says(found == 0, f"{call.about} was refused ({call.code}) and is there")

    def _note(self, call: Call) -> None:
        found = self.notes[call.said]
        fine = found == 1 if call.code in (200, 201) else found <= (call.code is None)
        self._says(fine, f"{call.said}: code {call.code}, there {found} times")

    def _update(self, call: Call) -> None:
        if call.code == 200:
            self._says(call.seen["spec"] == call.said, f"{call.said} was not taken over")

    def _depend(self, call: Call) -> None:
        if call.code in (200, 201):
            there = (call.about, call.said) in self.edges
            self._says(there, f"{call.about} does not depend on {call.said}")

    def _read(self, call: Call) -> None:
        self._says(call.code != 404, f"{call.about} was known and is gone")

    def _cancel(self, call: Call) -> None:
        pass  # counted

    _retry = _cancel

    def _count(self, verb: str, event: str, also: str = "") -> None:
        """As many of an event as calls were acknowledged, or up to as many more as are unknown.

        also: what the call does in another state, and the hub by itself, as it does the event; then
        there is no upper bound.
        """
        sure, perhaps = Counter(), Counter()
        for call in self.calls:
            if call.verb == verb:
                sure[call.about] += call.code == 200
                perhaps[call.about] += call.code is None
        happened = Counter(
            e["task_id"]
            for e in self.events
            if e["type"] == event or (e["type"] == also and e["actor"] != "hub")
        )
        for task in set(sure) | set(happened):
            self._says(
                happened[task] >= sure[task], f"{verb} of {task} was acknowledged and is not"
            )
            if not also:
                most = sure[task] + perhaps[task]
                self._says(happened[task] <= most, f"{task}: {event} that nobody asked for")

    def _order(self) -> None:
        """A call sees no older state than one that had ended before it began."""
        seen = defaultdict(list)
        for call in self.calls:
            if call.verb in ("read", "update", "create") and call.code in (200, 201):
                task = call.seen["id"]
                state = "pending" if call.seen["status"] in PENDING else call.seen["status"]
                at = [
                    n
                    for n, step in enumerate(self.timeline[task])
                    if step == (state, call.seen["attempt"])
                ]
                self._says(bool(at), f"{task} was never {state} in attempt {call.seen['attempt']}")
                if at:
                    seen[task].append((call.began, call.ended, at[0], at[-1]))
        for task, looks in seen.items():
            for began, _, _, last in looks:
                newest = max((first for _, ended, first, _ in looks if ended < began), default=0)
                self._says(last >= newest, f"{task}: an older state was shown after a newer one")

    def _ends(self) -> None:
        for task in self.tasks.values():
            if task["status"] == "pending":
                self._says(task["open_deps"] > 0, f"{task['title']} waits for nothing")
                ups = [self.tasks[u]["status"] for t, u in self.edges if t == task["id"]]
                stopped = {"failed", "cancelled", "pending"} & set(ups)
                self._says(bool(stopped), f"{task['title']} waits although all before it are done")

    def _handed(self) -> None:
        import json

        for task_id, up in self.inputs:
            task = self.tasks[task_id]
            if task["status"] == "done":
                given = json.loads(task["resolved_inputs"] or "{}")
                fine = given.get("n") == up
                self._says(fine, f"{task['title']} was handed {given} and not that of {up}")

    def _printed(self) -> None:
        """What a session that ended by itself has printed is stored as it was."""
        self.checked = 0
        for session in self.sessions:
            if session["state"] != "closed" or session["exit_code"] != 0:
                continue
            expected = "".join(f"line {n} of {session['task_id']}\r\n" for n in range(PRINTED))
            path = f"sessions/{session['id']}/output"
            found = self.run.hub.ask("GET", path).content.decode()
            self.checked += 1
            self._says(found == expected, f"the record of {session['name']} is not what it printed")

    def summary(self) -> str:
        bodies = Counter(line.split()[0] for line in self.run.journal.read_text().splitlines())
        attempts = sum(task["attempt"] for task in self.tasks.values())
        outcome = Counter(
            (c.verb, "unknown" if c.code is None else "done" if c.code < 300 else "refused")
            for c in self.calls
        )
        verbs = sorted({verb for verb, _ in outcome})
        lines = ["| calls | done | refused | unknown |", "|---|---|---|---|"]
        lines += [
            f"| {verb} | {outcome[verb, 'done']} | {outcome[verb, 'refused']} |"
            f" {outcome[verb, 'unknown']} |"
            for verb in verbs
        ]
        broke = ", ".join(f"{name} {n}" for name, n in sorted(self.run.nemesis.done.items()))
        ended = ", ".join(
            f"{n} {status}"
            for status, n in Counter(t["status"] for t in self.tasks.values()).items()
        )
        more = sum(n - 1 for n in bodies.values() if n > 1)
        lines += [
            "",
            f"Broken {sum(self.run.nemesis.done.values())} times: {broke}.",
            f"{len(self.tasks)} tasks ({ended}) in {attempts} attempts; {len(self.events)} events;"
            f" {self.checked} records of sessions compared; {sum(bodies.values())} bodies ran,"
            f" {more} of them again.",
            f"Violations: {len(self.wrong)}.",
        ]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    os.environ["TMUX_TMPDIR"] = str(folder)
    print(f"seed {args.seed}, in {folder}", flush=True)
    run = Run(folder, args.seed, args.agents, args.clients)
    wrong = ["it did not come to an end"]
    try:
        run.go(args.minutes * 60)
        verdict = Verdict(run)
        wrong = verdict.check()
        print(verdict.summary())
        for sentence in wrong[:50]:
            print("WRONG:", sentence)
    finally:
        run.close()
        if not wrong:
            shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
