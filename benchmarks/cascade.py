"""How fast the cascade hands work on, beside a raw-sqlite3 engine in the same run.

    python benchmarks/cascade.py [--quick] [--json] [--dir DIR]

See benchmarks/README.md for what is measured and how to read it. Ends with 0 always: it informs,
it is no test.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The directory of this script comes last, or its name would hide the hub's own `cascade`.
HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)
sys.path.append(str(HERE))

from figures import (  # noqa: E402
    aim,
    cell,
    disk_directory,
    machine,
    machine_text,
    milliseconds,
    peak_mb,
    quantile,
    say,
    timed,
)

import auth  # noqa: E402
import models  # noqa: E402
import tasks  # noqa: E402

SEED = 42
SERVERS = 3
RESULT = {"summary": "done"}

RATIO_AIM = 0.45  # of the raw engine's tasks/s
HAND_OFF_AIM_MS = 5.0
FREE_1000_AIM_MS = 250.0
GROWTH_AIM = 0.8  # tasks/s among many other tasks, of that among few


@dataclass(frozen=True)
class Size:
    """How much is run: the aims are about FULL."""

    tasks: int
    layers: int
    width: int
    edges: int
    others: tuple[int, int]
    rounds: int


FULL = Size(tasks=1000, layers=50, width=100, edges=15_000, others=(100, 100_000), rounds=3)
QUICK = Size(tasks=200, layers=10, width=50, edges=1_500, others=(100, 10_000), rounds=1)


# ── graphs ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """A graph as {task: [tasks it waits for]} and how it is run.

    by_hand: the roots are given out one by one, timed, instead of before the clock starts.
    slots: of all servers together; None for more than the graph can use.
    """

    name: str
    graph: dict[str, list[str]]
    by_hand: bool = False
    slots: int | None = None

    @property
    def roots(self) -> list[str]:
        return [task for task, ups in self.graph.items() if not ups]


def chain(n: int) -> dict[str, list[str]]:
    return {f"t{i}": [f"t{i - 1}"] if i else [] for i in range(n)}


def fan(n: int) -> dict[str, list[str]]:
    middle = [f"t{i}" for i in range(n)]
    return {"first": []} | {task: ["first"] for task in middle} | {"last": middle}


def layered(layers: int, width: int, edges: int) -> dict[str, list[str]]:
    """Each task waits for three of the layer above; the edges left over go to tasks at random."""
    chance = random.Random(SEED)
    layer = [[f"t{depth}.{i}" for i in range(width)] for depth in range(layers)]
    below = [task for row in layer[1:] for task in row]
    more = set(chance.sample(below, edges - 3 * len(below)))
    graph = {task: [] for task in layer[0]}
    for above, row in zip(layer, layer[1:], strict=False):
        graph |= {task: chance.sample(above, 3 + (task in more)) for task in row}
    return graph


def unrelated(n: int) -> dict[str, list[str]]:
    return {f"t{i}": [] for i in range(n)}


def in_order(shape: Shape) -> list[tuple[str, int]]:
    """(task, how many its end frees) in the order in which both engines run them: as freed."""
    waiting = {task: len(ups) for task, ups in shape.graph.items()}
    below = defaultdict(list)
    for task, ups in shape.graph.items():
        for up in ups:
            below[up].append(task)
    order, queue = [], deque(shape.roots)
    while queue:
        task = queue.popleft()
        for down in below[task]:
            waiting[down] -= 1
        freed = [down for down in below[task] if not waiting[down]]
        queue += freed
        order.append((task, len(freed)))
    return order


# ── the two engines ───────────────────────────────────────────────────────────────────────────


@dataclass
class Timing:
    """What one engine did with one shape. Seconds count its calls alone, not this script."""

    tasks: int
    create_s: float = 0.0
    run_s: float = 0.0
    hand_offs: list[float] = field(default_factory=list)  # completions that free something
    most_freed: int = 0
    most_freed_s: float = 0.0
    peak_mb: float = 0.0


class Product:
    """The hub's own tasks.py on its own database, called as its servers would."""

    def __init__(self, directory: Path, shape: Shape, others: int = 0):
        models.open_db(directory / "hub.db")
        self.project = auth.create_project(auth.HUB, "benchmark")
        self.callers = add_servers(self.project["id"], shape.slots or 10 * len(shape.graph))
        add_others(self.project["id"], others)
        self.items = [
            {
                "id": task,
                "title": task,
                "command": ["true"],
                "requirements": {"repo": "code"},
                "depends_on": ups,
            }
            for task, ups in shape.graph.items()
        ]

    def create(self) -> dict[str, str]:
        made = tasks.create_pipeline(auth.HUB, self.project, "benchmark", self.items)
        return models.loads(made["id_map"])

    def caller(self, task: str) -> auth.Caller:
        """The server that was given the task."""
        row = models.one("SELECT server_id FROM task WHERE id = ?", (task,))
        return self.callers.get(row["server_id"])

    def assign(self, _caller, task: str) -> None:
        tasks.assign(next(iter(self.callers.values())), task)

    def start(self, caller: auth.Caller, task: str) -> None:
        tasks.start(caller, task)

    def complete(self, caller: auth.Caller, task: str) -> None:
        tasks.complete(caller, task, RESULT)

    def done(self) -> int:
        pipeline = "SELECT COUNT(*) FROM task WHERE status = 'done' AND pipeline_id IS NOT NULL"
        return models.execute(pipeline).fetchone()[0]


def add_servers(project_id: str, slots: int) -> dict[str, auth.Caller]:
    """{id: caller} of new servers that are online and share so many slots."""
    callers = {}
    with models.transaction():
        for n in range(SERVERS):
            server = models.Server.create(
                project_id=project_id,
                name=f"server-{n}",
                online=True,
                slots=slots // SERVERS + (n < slots % SERVERS),
                repos={"code": {"path": "/srv/code", "branch": None}},
            )
            roles = {project_id: "server"}
            callers[server.id] = auth.Caller(
                "server", server.id, server.name, roles=roles, server_id=server.id
            )
    return callers


OTHER_KINDS = (
    {"status": "done", "completed_at": 1.0},
    {"status": "pending"},
    {"status": "done", "completed_at": 1.0},
    {"status": "pending", "open_deps": 1},
    {"status": "done", "completed_at": 1.0},
    {"status": "pending", "waiting_since": 1.0, "signature": '{"repo":"elsewhere"}'},
)


def add_others(project_id: str, n: int) -> None:
    """Other tasks of the project: half done, the rest not assigned, blocked, waiting in turn."""
    common = {
        "project_id": project_id,
        "title": "another task",
        "spec": "something else",
        "requirements": '{"repo":"elsewhere"}',
        "profile": "command",
        "created_by": "hub",
        "created_at": 1.0,
        "updated_at": 1.0,
        "completed_at": None,
        "open_deps": 0,
        "waiting_since": None,
        "signature": None,
    }
    made = [common | OTHER_KINDS[i % len(OTHER_KINDS)] | {"id": models.new_id()} for i in range(n)]
    if not made:
        return
    links = [
        (task["id"], before["id"], "blocks")
        for before, task in zip(made, made[1:], strict=False)
        if task["open_deps"]
    ]
    with models.transaction() as tx:
        columns = tuple(made[0])
        models.insert_many("task", columns, [tuple(task[c] for c in columns) for task in made])
        models.insert_many("dependency", ("task_id", "upstream_id", "kind"), links)
        for task in made:
            tx.emit("task_created", project_id, "hub", {"title": "another task"}, task=task["id"])
    models.db.obj.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")


RAW_TABLES = """
CREATE TABLE task (id TEXT PRIMARY KEY, status TEXT NOT NULL, open INTEGER NOT NULL);
CREATE TABLE dep (task TEXT NOT NULL, upstream TEXT NOT NULL);
CREATE INDEX dep_upstream ON dep (upstream);
CREATE TABLE event (id INTEGER PRIMARY KEY, task TEXT NOT NULL, type TEXT NOT NULL, at REAL);
"""


class Raw:
    """The least an engine can do with the sqlite3 module: the tables, two transactions a task."""

    def __init__(self, directory: Path, shape: Shape, ids: dict[str, str]):
        self.shape, self.ids = shape, ids
        self.db = sqlite3.connect(directory / "raw.db", isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.executescript(RAW_TABLES)

    def create(self) -> dict[str, str]:
        graph, ids = self.shape.graph, self.ids
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany(
            "INSERT INTO task VALUES (?, 'pending', ?)",
            [(ids[task], len(ups)) for task, ups in graph.items()],
        )
        self.db.executemany(
            "INSERT INTO dep VALUES (?, ?)",
            [(ids[task], ids[up]) for task, ups in graph.items() for up in ups],
        )
        self._events("task_created", [ids[task] for task in graph])
        self.db.execute("COMMIT")
        return ids

    def caller(self, _task: str) -> None:
        return None

    def assign(self, _caller, task: str) -> None:
        self._move(task, "pending", "assigned")

    def start(self, _caller, task: str) -> None:
        self._move(task, "assigned", "running")

    def _move(self, task: str, before: str, after: str) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self._set(task, before, after)
        self.db.execute("COMMIT")

    def _set(self, task: str, before: str, after: str) -> None:
        set_ = "UPDATE task SET status = ? WHERE id = ? AND status = ?"
        if self.db.execute(set_, (after, task, before)).rowcount != 1:
            raise RuntimeError(f"task {task} is not {before}")
        self._events(f"task_{after}", [task])

    def complete(self, _caller, task: str) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self._set(task, "running", "done")
        counted = self.db.execute(
            "UPDATE task SET open = open - 1"
            " WHERE id IN (SELECT task FROM dep WHERE upstream = ?) RETURNING id, open",
            (task,),
        ).fetchall()
        free = [down for down, left in counted if not left]
        self.db.executemany(
            "UPDATE task SET status = 'assigned' WHERE id = ?", [(down,) for down in free]
        )
        self._events("task_assigned", free)
        self.db.execute("COMMIT")

    def _events(self, kind: str, ids: list[str]) -> None:
        now = time.time()
        self.db.executemany(
            "INSERT INTO event (task, type, at) VALUES (?, ?, ?)", [(i, kind, now) for i in ids]
        )

    def done(self) -> int:
        return self.db.execute("SELECT COUNT(*) FROM task WHERE status = 'done'").fetchone()[0]


def drive(engine, shape: Shape) -> tuple[Timing, dict[str, str]]:
    """Create the shape and run every task of it as it is assigned: start, then complete."""
    began = time.perf_counter()
    ids = engine.create()
    timing = Timing(len(ids), create_s=time.perf_counter() - began)
    for root in shape.roots:
        seconds = timed(engine.assign, None, ids[root])
        timing.run_s += seconds if shape.by_hand else 0.0
    for name, freed in in_order(shape):
        task = ids[name]
        caller = engine.caller(task)
        timing.run_s += timed(engine.start, caller, task)
        seconds = timed(engine.complete, caller, task)
        timing.run_s += seconds
        if freed:
            timing.hand_offs.append(seconds)
        if freed > timing.most_freed:
            timing.most_freed, timing.most_freed_s = freed, seconds
    if engine.done() != len(ids):
        raise RuntimeError(f"{engine.done()} of {len(ids)} tasks are done")
    timing.peak_mb = peak_mb()
    return timing, ids


# ── one measurement, in a process of its own ──────────────────────────────────────────────────


def run_product(parent: str, shape: Shape, others: int = 0) -> tuple[Timing, dict[str, str]]:
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        timing, ids = drive(Product(Path(directory), shape, others), shape)
        models.close_db()
    return timing, ids


def run_raw(parent: str, shape: Shape, ids: dict[str, str]) -> tuple[Timing, dict[str, str]]:
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        engine = Raw(Path(directory), shape, ids)
        timing, ids = drive(engine, shape)
        engine.db.close()
    return timing, ids


def alone(function: Callable, *arguments):
    """Call it in a fresh process, so that its peak of memory is its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()


def compare(directory: str, shape: Shape, rounds: int) -> tuple[list[Timing], list[Timing]]:
    """(ours, raw), taken in turns, so that what else the machine does meets both."""
    ours, raw = [], []
    for _ in range(rounds):
        timing, ids = alone(run_product, directory, shape)
        ours.append(timing)
        raw.append(alone(run_raw, directory, shape, ids)[0])
    return ours, raw


# ── numbers ───────────────────────────────────────────────────────────────────────────────────


def medians(timings: list[Timing]) -> dict:
    """The median round of each number; times in milliseconds."""

    def median(number: Callable[[Timing], float | None]) -> float | None:
        found = [value for timing in timings if (value := number(timing)) is not None]
        return round(statistics.median(found), 3) if found else None

    return {
        "tasks_per_s": median(lambda t: t.tasks / t.run_s),
        "hand_off_p50_ms": median(lambda t: milliseconds(quantile(t.hand_offs, 0.5))),
        "hand_off_p99_ms": median(lambda t: milliseconds(quantile(t.hand_offs, 0.99))),
        "most_freed": timings[0].most_freed,
        "most_freed_ms": median(lambda t: milliseconds(t.most_freed_s)),
        "create_tasks_per_s": median(lambda t: t.tasks / t.create_s),
        "create_s": median(lambda t: t.create_s),
        "peak_mb": median(lambda t: t.peak_mb),
    }


def ratio(those: list[Timing], others: list[Timing]) -> float:
    """tasks/s of those by that of the others, the median of the rounds: each met the same noise."""
    pairs = zip(those, others, strict=True)
    return round(statistics.median(other.run_s / this.run_s for this, other in pairs), 3)


def measure(directory: str, size: Size) -> dict:
    """Every number of the report."""
    plain = [
        Shape(f"chain of {size.tasks:,}", chain(size.tasks)),
        Shape(f"fan 1 → {size.tasks:,} → 1", fan(size.tasks)),
        Shape(
            f"layered {size.layers * size.width:,} / {size.edges:,}",
            layered(size.layers, size.width, size.edges),
        ),
        Shape(f"{size.tasks:,} unrelated, given out too", unrelated(size.tasks), by_hand=True),
    ]
    scarce = Shape(f"fan 1 → {size.tasks:,} → 1 on 8 slots", fan(size.tasks), slots=8)
    shapes = []
    for shape in (*plain, scarce):
        say(shape.name)
        ours, raw = compare(directory, shape, size.rounds)
        numbers = {"ours": medians(ours), "raw": medians(raw), "ratio": ratio(ours, raw)}
        shapes.append({"shape": shape.name} | numbers)
    return {
        "environment": environment(directory, size),
        "shapes": shapes,
        "growth": growth(directory, size),
    }


def growth(directory: str, size: Size) -> dict:
    """The same chain in a project with few and with many other tasks, in turns."""
    shape = Shape("chain", chain(size.tasks))
    few, many = [], []
    say(f"chain beside {size.others[0]:,} and {size.others[1]:,} other tasks")
    for _ in range(size.rounds):
        for others, timings in zip(size.others, (few, many), strict=True):
            timings.append(alone(run_product, directory, shape, others)[0])
    return {
        "others": list(size.others),
        "few": medians(few),
        "many": medians(many),
        "ratio": ratio(many, few),
    }


def environment(directory: str, size: Size) -> dict:
    return machine(directory) | {
        "size": asdict(size),
        "numbers": f"median of {size.rounds}" if size.rounds > 1 else "one round",
    }


def aims(report: dict) -> list[dict]:
    """[{aim, value, met}]: scarce slots and completions of another size are information only."""
    chain_, fan_, layers, lone, _scarce = report["shapes"]
    found = [
        aim(f"{s['shape']}: at least {RATIO_AIM} of raw", s["ratio"], s["ratio"] >= RATIO_AIM)
        for s in (chain_, fan_, layers, lone)
    ]
    for s in (chain_, layers):
        p99, raw = (s[engine]["hand_off_p99_ms"] for engine in ("ours", "raw"))
        text = f"{s['shape']}: hand-off p99 at most {HAND_OFF_AIM_MS:g} ms (raw: {raw:g})"
        found.append(aim(text, p99, p99 <= HAND_OFF_AIM_MS))
    burst = fan_["ours"]
    text = f"one completion that frees {burst['most_freed']:,}: at most {FREE_1000_AIM_MS:g} ms"
    found.append(aim(text, burst["most_freed_ms"], burst["most_freed_ms"] <= FREE_1000_AIM_MS))
    few, many = report["growth"]["others"]
    text = f"chain beside {many:,} others: at least {GROWTH_AIM} of beside {few:,}"
    found.append(aim(text, report["growth"]["ratio"], report["growth"]["ratio"] >= GROWTH_AIM))
    return found


# ── the report ────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    ("tasks/s", "tasks_per_s", ",.0f"),
    ("p50 ms", "hand_off_p50_ms", ".2f"),
    ("p99 ms", "hand_off_p99_ms", ".2f"),
    ("freed", "most_freed", ",d"),
    ("in ms", "most_freed_ms", ".1f"),
    ("made/s", "create_tasks_per_s", ",.0f"),
    ("peak MB", "peak_mb", ".0f"),
)


def table(report: dict) -> list[str]:
    named = []
    for s in report["shapes"]:
        named += [(s["shape"], "ours", s["ours"], f"{s['ratio']:.2f}"), ("", "raw", s["raw"], "")]
    growing = report["growth"]
    for others, side in zip(growing["others"], ("few", "many"), strict=True):
        ratio = f"{growing['ratio']:.2f}" if side == "many" else ""
        named.append((f"chain, {others:,} other tasks", "ours", growing[side], ratio))
    head = f"{'':32}{'':6}" + "".join(f"{title:>10}" for title, _, _ in COLUMNS) + f"{'ratio':>8}"
    lines = [head]
    for name, engine, numbers, ratio in named:
        cells = "".join(f"{cell(numbers[key], form):>10}" for _, key, form in COLUMNS)
        lines.append(f"{name:32}{engine:6}{cells}{ratio:>8}")
    return lines


def show(report: dict) -> None:
    where = report["environment"]
    print(f"\n{machine_text(where)}")
    print(
        f"WAL, synchronous=FULL; every number: {where['numbers']}; ours and raw in turns.\n"
        "p50, p99: completions that free something, from the call until what they freed is "
        "assigned and committed.\n"
    )
    print("\n".join(table(report)), end="\n\n")
    for wanted in report["aims"]:
        print(f"{'met    ' if wanted['met'] else 'NOT met'}  {wanted['aim']}: {wanted['value']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small graphs, one round: a look")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.add_argument("--dir", default=None, help="a directory on the disk to measure")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="cascade-", dir=options.dir or disk_directory())
    size = QUICK if options.quick else FULL
    try:
        report = measure(directory, size)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report["aims"] = aims(report)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main()
