"""What the fault tests share: a proxy that breaks connections, graphs of tasks whose workers write
down that they ran, and the checker, which reads what is left and knows what must hold.

FAULTS_N says how often each kill case kills (10 unless given; `make faults N=200` is the long run),
and FAULTS_SEED makes a run the same again. Each case reports one line for the table.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import requests

from conftest import wait_until

N = int(os.environ.get("FAULTS_N") or 10)
LONG = N > 10
# Intervals at about a thirtieth of what they usually are.
FAST = {
    "tick_s": 0.2,
    "due_s": 0.1,
    "heartbeat_s": 0.5,
    "offline_after_s": 3,
    "poll_silence_s": 1.5,
    "grace_s": 0.5,
    "lost_after_s": 30,
}
AGENT_FAST = "backoff_max_s: 0.5\n"  # how long an agent waits at most before it connects again


class Case:
    """One case of the catalogue while it runs: its dice, and what it has to report."""

    def __init__(self, record, name: str):
        self._record = record
        self.name = name
        self.seed = int(os.environ.get("FAULTS_SEED") or random.randrange(2**32))
        self.random = random.Random(self.seed)
        self.kills, self.seen = 0, ""
        self.accepted, self.lost = Counter(), 0
        self.began = time.monotonic()
        print(f"{name}: FAULTS_SEED={self.seed}")

    def count(self, what: str, accepted: int, lost: int) -> None:
        """So many tasks, bytes or the like were accepted, and so many of them are gone."""
        self.accepted[what] += accepted
        self.lost += lost
        assert not lost, f"{lost} of {accepted} {what} are lost"

    def check(self, hub, announced=()) -> None:
        """What must hold of the hub's data, and that every task it has accepted is there."""
        self.count("tasks", len(hub.accepted), len(hub.accepted - stored_tasks(hub)))
        check(hub, announced)

    def report(self) -> None:
        took = round(time.monotonic() - self.began, 1)
        of = " and ".join(f"{count:,} {what}" for what, count in self.accepted.items())
        lost = f"{self.lost} of {of}" if of else "–"
        row = [self.name, self.seed, self.kills, lost, took, self.seen or "FAILED"]
        self._record("fault", json.dumps(row))


# ── between agent and hub ─────────────────────────────────────────────────────────────────────


class Proxy:
    """Passes bytes to the hub and back, and breaks what it is told to.

    `hold_up` and `hold_down` keep what is sent towards the hub, or from it, as a partition does;
    `delay_s` keeps each piece so long; `lose_answer` passes the next request whose path contains
    the text and cuts the connection instead of answering; `twice` sends each such request a second
    time, as a broken proxy does.
    """

    def __init__(self, port: int):
        self.port = port
        self.hold_up = self.hold_down = False
        self.delay_s = 0.0
        self.lose_answer = self.twice = b""
        self.left: int | None = None  # bytes that may still pass up before a cut
        self.cuts = self.repeated = 0
        self._lock = threading.Lock()
        self._pairs: set[Pair] = set()
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, run, *args) -> None:
        thread = threading.Thread(target=self._quietly, args=(run, *args), daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _quietly(run, *args) -> None:
        with contextlib.suppress(OSError):
            run(*args)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                pair = Pair(near, socket.create_connection(("127.0.0.1", self.port), 5))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.add(pair)
            self._spawn(self._pump, pair, self._up)
            self._spawn(self._pump, pair, self._down)

    def _pump(self, pair: "Pair", run) -> None:
        try:
            run(pair)
        finally:
            if pair.ended():
                with self._lock:
                    self._pairs.discard(pair)

    def _up(self, pair: "Pair") -> None:
        while data := pair.near.recv(65536):
            self._wait(lambda: self.hold_up)
            line = data.partition(b"\r\n")[0]
            if self.twice and self.twice in line:
                self.repeated += 1
                self._spawn(self._repeat, data)
            if self.lose_answer and self.lose_answer in line:
                self.lose_answer, pair.answer_lost = b"", True
            allowed = self._allowed(len(data))
            pair.far.sendall(data[:allowed])
            if allowed < len(data):
                return pair.cut()

    def _down(self, pair: "Pair") -> None:
        while data := pair.far.recv(65536):
            self._wait(lambda: self.hold_down)
            if pair.answer_lost:
                self.cuts += 1
                return pair.cut()
            pair.near.sendall(data)

    def _repeat(self, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 5) as again:
            again.settimeout(5)
            again.sendall(data)
            again.recv(1)

    def _wait(self, held) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        while held() and not self._closing:
            time.sleep(0.01)

    def cut_after(self, size: int) -> None:
        with self._lock:
            self.left = size

    def _allowed(self, size: int) -> int:
        with self._lock:
            if self.left is None or size <= self.left:
                self.left = None if self.left is None else self.left - size
                return size
            allowed, self.left = self.left, None
            self.cuts += 1
            return allowed

    def partition(self) -> None:
        self.hold_up = self.hold_down = True

    def heal(self) -> None:
        """What was held is lost with its connections, and new ones pass."""
        self.cut()
        self.hold_up = self.hold_down = False

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            found = list(self._pairs)
        for pair in found:
            pair.cut()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)


class Pair:
    """A connection to the proxy and the one it has to the hub."""

    def __init__(self, near: socket.socket, far: socket.socket):
        self.near, self.far = near, far
        self.answer_lost = False
        self._pumps = 2
        self._lock = threading.Lock()
        far.settimeout(None)

    def cut(self) -> None:
        """Both end at once, with a reset."""
        with self._lock:
            for sock in (self.near, self.far):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RDWR)

    def ended(self) -> bool:
        """One direction has ended: so does the other; whether this was the second."""
        self.cut()
        with self._lock:
            self._pumps -= 1
            if not self._pumps:
                self.near.close()
                self.far.close()
            return not self._pumps


def through(agent, hub, proxy=None, carrier: str = "") -> None:
    """Have an agent that is stopped reach the hub by the proxy, and come back soon."""
    text = agent.config.read_text()
    if proxy:
        text = text.replace(hub.url, proxy.url)
    agent.config.write_text(text + AGENT_FAST + (f"carrier: {carrier}\n" if carrier else ""))


def back(agent):
    """Start an agent that was stopped, and wait until it has a connection."""
    log = agent.folder / "out.log"
    before = log.read_text().count("connected to")
    agent.start()
    wait_until(lambda: log.read_text().count("connected to") > before, 20)
    return agent


def whole_log(hub, session_id: str) -> bytes:
    """The record of a session from its first byte to its last."""
    pieces, offset = [], 0
    while True:
        answer = hub.ask("GET", f"sessions/{session_id}/output?offset={offset}")
        assert answer.ok and int(answer.headers["X-Offset"]) == offset, answer.headers
        if not answer.content:
            return b"".join(pieces)
        pieces.append(answer.content)
        offset = int(answer.headers["X-Next-Offset"])


# ── graphs ────────────────────────────────────────────────────────────────────────────────────

# Says in a file that it runs, works a little, hands on a number that depends on what it was given.
BODY = """
echo "$ORCHESTRATIA_TASK_ID $$" >> "$1"
sleep "$2"
printf '{"summary": "ran", "contracts": {"n": {"status": "fulfilled", "data": %s}}}' "$3" \
  > "$ORCHESTRATIA_RESULT_FILE"
"""


class Graph:
    """A layered graph of tasks whose workers write a line each time their body runs."""

    def __init__(self, hub, folder: Path):
        self.hub, self.journal = hub, folder / "journal"
        self.ids: list[str] = []
        self.journal.touch()

    def make(self, layers: int, width: int, work_s: float = 0.0, dice=None, **fields) -> None:
        """One pipeline; each task waits for two of the layer before, one of them for its data."""
        dice = dice or random.Random(1)
        items, before = [], []
        for layer in range(layers):
            row = [f"{layer}-{n}" for n in range(width)]
            for name in row:
                command = [
                    "sh",
                    "-c",
                    BODY,
                    "body",
                    str(self.journal),
                    str(work_s),
                    str(len(items)),
                ]
                item = {"id": name, "title": name, "command": command, "auto_assign": True}
                if before:
                    first, *other = dice.sample(before, min(2, len(before)))
                    item["depends_on"] = [{"task": first, "type": "input", "key": "n"}]
                    item["depends_on"] += [{"task": up, "type": "blocks"} for up in other]
                items.append(item | fields)
            before = row
        made = self.hub.api("POST", "pipelines", {"name": f"g{len(self.ids)}", "tasks": items})
        self.ids += list(made["id_map"].values())

    def left(self) -> int:
        """How many are not done yet."""
        with reading(self.hub) as db:
            marks = ",".join("?" * len(self.ids))
            sql = f"SELECT COUNT(*) FROM task WHERE status <> 'done' AND id IN ({marks})"
            return db.execute(sql, self.ids).fetchone()[0]

    def wait(self, timeout: float = 1800.0 if LONG else 120.0) -> None:
        wait_until(lambda: self.left() == 0, timeout, 0.1)

    def bodies(self) -> Counter:
        """How often the body of each task ran."""
        return Counter(line.split()[0] for line in self.journal.read_text().splitlines())

    def check(self) -> int:
        """Nothing lost: every body ran; how many ran once more than it had to."""
        bodies = self.bodies()
        assert set(bodies) == set(self.ids)
        return sum(count - 1 for count in bodies.values())


# ── the checker ───────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(hub):
    """The hub's database, to be read beside it."""
    path = hub.data / "hub.db"
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    db.row_factory = sqlite3.Row
    try:
        yield db
    finally:
        db.close()


def stored_tasks(hub) -> set[str]:
    with reading(hub) as db:
        return {task_id for (task_id,) in db.execute("SELECT id FROM task")}


ENDS = {"task_completed", "task_failed", "task_released", "task_cancelled"}
GIVEN = {"task_assigned", "task_auto_assigned"}


def check(hub, announced=()) -> None:
    """I1–I5, I7 and I9 of what is stored; announced: events as watchers were told them."""
    with reading(hub) as db:
        events = [dict(row) for row in db.execute("SELECT * FROM event ORDER BY id")]
        tasks = {row["id"]: dict(row) for row in db.execute("SELECT * FROM task")}
        edges = db.execute(
            "SELECT task_id, upstream_id, resolved FROM dependency WHERE kind <> 'related'"
        ).fetchall()
        live = db.execute(
            "SELECT task_id, attempt, COUNT(*) AS n FROM session WHERE task_id IS NOT NULL AND"
            " state IN ('starting', 'active', 'disconnected', 'recovering') GROUP BY 1, 2"
        ).fetchall()
        busy = dict(db.execute("SELECT id, busy FROM server").fetchall())
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"  # I7
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    by_id = {event["id"]: event for event in events}
    assert list(by_id) == list(range(1, len(events) + 1))  # I5
    for told in announced:  # I4
        assert by_id[told["id"]]["type"] == told["type"], told
    assert all(row["n"] == 1 for row in live)  # I2
    held = Counter(
        task["server_id"]
        for task in tasks.values()
        if task["status"] in ("assigned", "planning", "plan_review", "running", "needs_human")
    )
    assert {server: held[server] for server in busy} == busy
    _check_histories(events, tasks, edges)


def _check_histories(events: list[dict], tasks: dict, edges) -> None:
    done_at, ups = {}, defaultdict(list)
    for edge in edges:
        ups[edge["task_id"]].append(edge["upstream_id"])
    history = defaultdict(list)
    for event in events:
        if event["task_id"]:
            history[event["task_id"]].append(event)
        if event["type"] == "task_completed":
            done_at[event["task_id"]] = event["id"]
    for task_id, task in tasks.items():
        _check_attempts(task, history[task_id])
        for event in history[task_id]:  # I3
            if event["type"] in GIVEN:
                assert all(done_at.get(up, 10**12) < event["id"] for up in ups[task_id])
        ended = {"done": "task_completed", "failed": "task_failed", "cancelled": "task_cancelled"}
        if task["status"] in ended:  # I9
            assert ended[task["status"]] in {e["type"] for e in history[task_id]}
        elif task["status"] == "pending" and task["open_deps"] == 0 and task["auto_assign"]:  # I1
            assert task["waiting_since"] or task["not_before"], f"{task['title']}: nobody will look"


def _check_attempts(task: dict, history: list[dict]) -> None:
    """Each attempt is given once, started at most once and ended at most once, in that order."""
    steps = defaultdict(list)
    for event in history:
        if event["type"] in GIVEN | ENDS | {"task_started"}:
            attempt = json.loads(event["details"]).get("attempt")
            steps[attempt].append(event["type"])
    for attempt, types in steps.items():
        order = [0 if t in GIVEN else 1 if t == "task_started" else 2 for t in types]
        assert order == sorted(set(order)), (task["title"], attempt, types)
    assert len(steps) <= task["attempt"]


class Told(threading.Thread):
    """Follows the hub's events as a browser does, over its restarts, and keeps what it was told."""

    def __init__(self, hub):
        super().__init__(daemon=True)
        self.hub, self.events, self.over = hub, [], threading.Event()
        self.headers = {"Authorization": f"Bearer {hub.login()}"}
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(requests.RequestException):
                self._follow()
            self.over.wait(0.1)

    def _follow(self) -> None:
        headers = dict(self.headers)
        if self.events:
            headers["Last-Event-ID"] = str(self.events[-1]["id"])
        url = f"{self.hub.url}/api/v1/events/stream?after=0"
        with requests.get(url, headers=headers, stream=True, timeout=(2, 5)) as answer:
            for line in answer.iter_lines():
                if self.over.is_set():
                    return
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "id" in event:
                        self.events.append(event)

    def up_to_date(self) -> bool:
        with reading(self.hub) as db:
            last = db.execute("SELECT MAX(id) FROM event").fetchone()[0]
        return bool(self.events) and self.events[-1]["id"] >= last

    def finish(self) -> list[dict]:
        """Everything that is stored was told, once and in order."""
        wait_until(self.up_to_date, 20)
        self.over.set()
        self.join(10)
        ids = [event["id"] for event in self.events]
        assert ids == sorted(set(ids)), "an event was told twice, or late"
        assert ids == list(range(1, ids[-1] + 1)), "an event was not told"
        return self.events


def healthy(hub, within: float = 10.0) -> None:
    """I10: it answers within a second, `within` seconds after the fault."""

    def answers() -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{hub.url}/api/v1/health", timeout=1).ok
        return False

    wait_until(answers, within)


def resources(pid: int) -> dict[str, int]:
    """Of a process: memory in kB, open files, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "memory": int(found["VmRSS"].split()[0]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(found["Threads"]),
    }


def check_resources(before: dict, hub, memory_kb: int = 60_000) -> None:
    """I8: back to where it was, give or take what caches hold."""

    def back() -> bool:
        now = resources(hub.process.pid)
        return (
            now["files"] <= before["files"] + 20
            and now["threads"] <= before["threads"] + 10
            and now["memory"] <= before["memory"] + memory_kb
        )

    wait_until(back, 15)


# ── killing ───────────────────────────────────────────────────────────────────────────────────


def kill_hub(hub) -> None:
    """SIGKILL, and a new one on the same port and data."""
    hub.kill()
    hub.start()


def kill_agent(agent) -> None:
    """SIGKILL, and a new one with the same state."""
    agent.kill()
    agent.start()


def stop_for(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def run_python(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)])
