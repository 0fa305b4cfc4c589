#!/usr/bin/env python3
"""How soon an answer is in the worker's terminal: from `respond` until the program has read it.

A real hub, a real agent and a real tmux; the worker is a program that writes down when a line came
(tests/standin.py reads the same way). Beside it, as a reference, the least there is: the same words
pasted by tmux itself, on the same machine in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import standin  # noqa: E402
from conftest import AgentProcess, HubProcess, wait_until  # noqa: E402

P50_MS, P99_MS = 100, 500  # what is aimed at


def measure(rounds: int) -> tuple[list[float], list[float]]:
    """(ms of each answer, ms of each bare paste)."""
    with tempfile.TemporaryDirectory(prefix="orc-") as name:
        folder = Path(name)
        os.environ["TMUX_TMPDIR"] = name
        record = standin.install(folder / "bin", [], ("claude",))
        (folder / "dev").mkdir()
        (folder / "dev" / ".profile").write_text(f'export PATH="{folder}/bin:$PATH"\n')
        (folder / "dev" / ".bash_profile").write_text(f'export PATH="{folder}/bin:$PATH"\n')
        hub = HubProcess(folder / "hub")
        hub.api("POST", "projects", {"name": "shop"})
        agent = AgentProcess(hub, folder / "dev", "dev").start()
        try:
            return _answers(hub, agent, record, rounds)
        finally:
            agent.stop()
            agent.tmux("kill-server")
            hub.stop()


def _answers(hub, agent, record, rounds):
    wait_until(lambda: "claude" in hub.api("GET", "servers/dev")["profiles"])
    fields = {"title": "Answer", "profile": "claude", "auto_assign": True}
    task = hub.api("POST", "tasks", fields)["id"]
    session = wait_until(lambda: hub.api("GET", f"tasks/{task}")["session_id"])
    idle = lambda: hub.api("GET", f"sessions/{session}")["activity"] == "idle"  # noqa: E731
    wait_until(idle)
    answers, pastes = [], []
    tmux = hub.api("GET", f"sessions/{session}")["tmux_name"]
    for n in range(rounds):
        asked = hub.api("POST", f"tasks/{task}/help", {"question": f"Question {n}?"})
        wait_until(idle)
        began = time.time()
        hub.api("POST", f"interventions/{asked['id']}/respond", {"response": f"Answer {n}"})
        answers.append(_read(record, f"Answer {n}") - began)
        wait_until(idle)
        began = time.time()
        agent.tmux("set-buffer", f"Paste {n}", ";", "paste-buffer", "-p", "-t", f"={tmux}:")
        agent.tmux("send-keys", "-t", f"={tmux}:", "-H", "0d")
        pastes.append(_read(record, f"Paste {n}") - began)
        wait_until(idle)
    return [s * 1000 for s in answers], [s * 1000 for s in pastes]


def _read(record: Path, words: str) -> float:
    """When the program had the words, in seconds since 1970."""
    found = wait_until(
        lambda: [e for e in standin.happened(record, "submitted") if e["text"].endswith(words)],
        every=0.005,
    )
    return found[0]["at"]


def figures(times: list[float]) -> dict:
    ordered = sorted(times)
    worst = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50_ms": round(statistics.median(ordered), 1), "p99_ms": round(worst, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    answers, pastes = (figures(times) for times in measure(args.rounds))
    if args.json:
        return print(json.dumps({"answers": answers, "bare": pastes}))
    print(f"{'':24}{'p50 ms':>10}{'p99 ms':>10}")
    print(f"{'answer to terminal':24}{answers['p50_ms']:>10}{answers['p99_ms']:>10}")
    print(f"{'tmux alone':24}{pastes['p50_ms']:>10}{pastes['p99_ms']:>10}")
    met = answers["p50_ms"] <= P50_MS and answers["p99_ms"] <= P99_MS
    print(f"aim: p50 {P50_MS} ms, p99 {P99_MS} ms: {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    subprocess.run(["tmux", "-V"], check=True, stdout=subprocess.DEVNULL)
    main()
