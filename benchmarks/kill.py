#!/usr/bin/env python3
"""A graph of tasks while hub and agents are killed again and again: what is lost, what runs twice.

    python benchmarks/kill.py [--tasks 2000] [--kills 100] [--seed N] [--quick] [--dir DIR]

A layered graph, each task waiting for two of the layer before, one of them for its data, on two
real agents with tmux. `undisturbed` is the same graph (a tenth of it) without kills, before it.
While `killed` runs, the hub and the agents are killed (SIGKILL) at random moments and started
again; nothing is submitted a second time. See benchmarks/README.md.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from figures import aim, machine, machine_text, say  # noqa: E402

from conftest import AgentProcess, HubProcess, wait_until  # noqa: E402
from faulting import FAST, Graph, check, kill_hub, reading, through  # noqa: E402

WIDTH = 20
AGENTS = 2
SLOTS = 6


class Place:
    """A hub and two agents of their own."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.hub = HubProcess(folder / "hub", **FAST)
        self.hub.api("POST", "projects", {"name": "shop"})
        self.agents = []
        for n in range(AGENTS):
            agent = AgentProcess(self.hub, folder / f"agent-{n}", f"agent-{n}", slots=SLOTS)
            through(agent, self.hub)
            self.agents.append(agent.start())
        self.graph = Graph(self.hub, folder)

    def run(self, tasks: int, dice: random.Random) -> float:
        """Run the graph to its end; seconds."""
        began = time.monotonic()
        self.graph.make(layers=tasks // WIDTH, width=WIDTH, dice=dice)
        wait_until(lambda: self.graph.left() == 0, 3600, 0.2)
        return time.monotonic() - began

    def close(self) -> None:
        for agent in self.agents:
            agent.stop()
            agent.tmux("kill-server")
        self.hub.stop()


class Killer(threading.Thread):
    """Kills the hub and agents so many times each while a graph runs, spread over its tasks."""

    def __init__(self, place: Place, tasks: int, kills: int, dice: random.Random):
        super().__init__(daemon=True)
        self.place, self.tasks, self.dice = place, tasks, dice
        self.left = ["hub"] * kills + ["agent"] * kills
        dice.shuffle(self.left)
        self.done = {"hub": 0, "agent": 0}

    def run(self) -> None:
        """Each kill has its turn when so many tasks are done, so that none comes too late; the
        first once the graph was accepted, since nothing is submitted again."""
        while not self.place.graph.ids:
            time.sleep(0.01)
        total = len(self.left)
        for n, what in enumerate(self.left):
            at = self.tasks * 0.95 * n / total
            while self.tasks - self.place.graph.left() < at:
                time.sleep(0.05)
            time.sleep(self.dice.uniform(0, 0.3))
            self._kill(what)
            self.done[what] += 1

    def _kill(self, what: str) -> None:
        if what == "hub":
            kill_hub(self.place.hub)
        else:
            agent = self.dice.choice(self.place.agents)
            agent.kill()
            agent.spawn()


def measure(folder: Path, tasks: int, kills: int, seed: int) -> dict:
    dice = random.Random(seed)
    place = Place(folder / "undisturbed")
    try:
        calm = max(tasks // 10, 2 * WIDTH)
        rate = calm / place.run(calm, dice)
    finally:
        place.close()
    place = Place(folder / "killed")
    try:
        killer = Killer(place, tasks, kills, dice)
        killer.start()
        seconds = place.run(tasks, dice)
        killer.join(120)
        check(place.hub)
        found = _found(place)
    finally:
        place.close()
    return {
        "tasks": tasks,
        "seed": seed,
        "undisturbed_per_s": round(rate, 1),
        "killed_per_s": round(tasks / seconds, 1),
        "seconds": round(seconds, 1),
        "hub_kills": killer.done["hub"],
        "agent_kills": killer.done["agent"],
        **found,
    }


def _found(place: Place) -> dict:
    bodies = place.graph.bodies()
    with reading(place.hub) as db:
        done = db.execute("SELECT COUNT(*) FROM task WHERE status = 'done'").fetchone()[0]
        doubled = db.execute(
            "SELECT COUNT(*) FROM (SELECT task_id FROM event WHERE type = 'task_completed'"
            " GROUP BY task_id HAVING COUNT(*) > 1)"
        ).fetchone()[0]
        attempts = db.execute("SELECT SUM(attempt) FROM task").fetchone()[0]
    return {
        "lost": len(place.graph.ids) - len(set(bodies) & set(place.graph.ids)),
        "stuck": len(place.graph.ids) - done,
        "double_transitions": doubled,
        "attempts": attempts,
        "bodies_again": sum(bodies.values()) - len(bodies),
    }


def table(found: dict) -> str:
    rows = [
        ("tasks", found["tasks"]),
        ("undisturbed, tasks/s", found["undisturbed_per_s"]),
        ("killed, tasks/s", found["killed_per_s"]),
        ("hub killed", found["hub_kills"]),
        ("agents killed", found["agent_kills"]),
        ("tasks lost", found["lost"]),
        ("tasks stuck", found["stuck"]),
        ("double transitions", found["double_transitions"]),
        ("attempts", found["attempts"]),
        ("bodies that ran again", found["bodies_again"]),
    ]
    return "\n".join(f"{name:<24}{value:>10}" for name, value in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=100, help="of the hub, and of agents")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--quick", action="store_true", help="40 tasks, one kill of each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", help="on the disk that holds it")
    args = parser.parse_args()
    tasks, kills = (40, 1) if args.quick else (args.tasks, args.kills)
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir=args.dir))
    os.environ["TMUX_TMPDIR"] = tempfile.mkdtemp(prefix="orc-")
    try:
        found = measure(folder, tasks, kills, args.seed)
        if args.json:
            print(json.dumps(found))
            return 0
        say(machine_text(machine(str(folder))))
        print(f"seed {args.seed}, {found['seconds']} s\n\n{table(found)}\n")
        for name in ("lost", "stuck", "double_transitions"):
            aimed = aim(f"{name.replace('_', ' ')}: 0", found[name], found[name] == 0)
            print(f"{'met    ' if aimed['met'] else 'NOT met'}  {aimed['aim']} ({aimed['value']})")
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(os.environ["TMUX_TMPDIR"], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
