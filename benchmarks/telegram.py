#!/usr/bin/env python3
"""Telegram: how soon what is due is sent, and whether screens stay within Telegram's limits.

A real hub process and a Bot API server of ours that counts by Telegram's limits. `told`: notes on
tasks, each to one phone; from the event's commit (its `at`, when it is due) until sendMessage
arrived. Beside it `bare`: the same message sent to the same server by `requests` alone. `screens`:
many sessions whose screens change twice a second, people who look at some of them; every call is
counted, and must be within the limits.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from botapi import BotServer  # noqa: E402
from conftest import PASSWORD, HubProcess  # noqa: E402
from test_wire import Agent  # noqa: E402

P50_MS = 300  # what is aimed at, from due time to sendMessage
APART_S = 1.1  # between two messages to one phone: Telegram allows one a second


class Bench:
    """A hub with a project, a server spoken for by hand, and people with phones."""

    def __init__(self, folder: Path, botapi: BotServer, people: int):
        self.botapi = botapi
        self.hub = HubProcess(
            folder / "hub",
            telegram_token=botapi.token,
            telegram_api=botapi.url,
            telegram_merge_s=0.001,
        )
        self.hub.api("POST", "projects", {"name": "shop"})
        key = self.hub.register("dev")["api_key"]
        self.agent = Agent(lambda body: self._poll(key, body))
        self.agent.connect(capabilities={"slots": 500})
        self.phones = [self._person(number) for number in range(people)]

    def _poll(self, key: str, body: dict):
        answer = self.hub.ask("POST", "server/poll", body, key=key)
        return answer.status_code, answer.json()

    def _person(self, number: int):
        name = f"person{number}"
        fields = {"username": name, "password": PASSWORD, "roles": {"shop": "operator"}}
        self.hub.api("POST", "users", fields)
        token = self.hub.api("POST", "auth/login", {"username": name, "password": PASSWORD})
        headers = {"Authorization": f"Bearer {token['token']}"}
        page = requests.post(f"{self.hub.url}/settings/telegram/code", headers=headers, timeout=10)
        phone = self.botapi.person(name)
        phone.says(re.search(r"/start [A-Z0-9-]+", page.text)[0])
        self.botapi.wait(lambda: phone.chat.shown())
        return phone

    def session(self, number: int) -> str:
        made = self.hub.api("POST", "sessions", {"server_id": "dev", "name": f"s{number}"})
        return made["id"]


def told(bench: Bench, rounds: int) -> list[float]:
    """ms from the commit of a note until its message arrived, each."""
    task = bench.hub.api("POST", "tasks", {"title": "Talk", "command": ["true"]})["id"]
    times = []
    for number in range(rounds):
        words = f"note number {number} of many"
        bench.hub.api("POST", f"tasks/{task}/notes", {"content": words})
        sent = lambda: [  # noqa: E731
            call
            for call in bench.botapi.calls_of("sendMessage")
            if words in call.params["text"]  # noqa: B023
        ]
        bench.botapi.wait(sent)
        events = bench.hub.api("GET", f"tasks/{task}/events")["events"]
        at = next(e["at"] for e in events if e["details"].get("content") == words)
        due = time.mktime(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
        times.append(sent()[0].wall - (due + float(f"0{at[19:23]}")))
        time.sleep(APART_S)
    return [s * 1000 for s in times]


def bare(botapi: BotServer, rounds: int) -> list[float]:
    phones = [botapi.person(f"Bare {number}") for number in range(8)]
    for phone in phones:
        phone.says("/start")
    session, times = requests.Session(), []
    for number in range(rounds):
        data = {"chat_id": phones[number % 8].id, "text": f"note number {number}"}
        began = time.time()
        session.post(f"{botapi.url}/bot{botapi.token}/sendMessage", data=data, timeout=10)
        times.append(botapi.calls_of("sendMessage")[-1].wall - began)
        time.sleep(APART_S / 4)
    return [s * 1000 for s in times]


def screens(bench: Bench, sessions: int, seconds: float) -> dict:
    """What came of so many changing screens, some of them looked at."""
    ids = [bench.session(number) for number in range(sessions)]
    bench.agent.call(wait=1)
    bench.agent.call(bench.agent.ack(), *[bench.agent.started(each) for each in ids])
    for number, phone in enumerate(bench.phones):
        phone.says(f"/focus s{number}")
    began, count = time.monotonic(), len(bench.botapi.calls)
    stop = threading.Event()
    changes = threading.Thread(target=_change, args=(bench, ids, stop))
    changes.start()
    time.sleep(seconds)
    stop.set()
    changes.join()
    settled = lambda: all(  # noqa: E731
        any(LAST in m.text for m in phone.chat.messages) for phone in bench.phones
    )
    bench.botapi.wait(settled, 60)
    took = time.monotonic() - began
    calls = [
        c for c in bench.botapi.calls[count:] if c.method in ("sendMessage", "editMessageText")
    ]
    return {
        "sessions": sessions,
        "looked at": len(bench.phones),
        "calls a second": round(len(calls) / took, 1),
        "most in a second": _most(calls, 1.0),
        "most in a chat in 10 s": max(
            _most([c for c in calls if int(c.params["chat_id"]) == phone.id], 10.0)
            for phone in bench.phones
        ),
        "refused": sum(c.status != 200 for c in calls),
        "over the limits": len(bench.botapi.flooded),
    }


LAST = "this is the last of it"


def _change(bench: Bench, ids: list[str], stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        _show(bench, ids, f"$ step {number} of the work")
        stop.wait(0.5)
    _show(bench, ids, LAST)


def _show(bench: Bench, ids: list[str], line: str) -> None:
    frames = [{"type": "session_screen", "session_id": each, "lines": [line]} for each in ids]
    bench.agent.call(*frames)


def _most(calls: list, span: float) -> int:
    """The most calls within so many seconds."""
    times, most, first = [call.at for call in calls], 0, 0
    for number, at in enumerate(times):
        while at - times[first] > span:
            first += 1
        most = max(most, number - first + 1)
    return most


def figures(times: list[float]) -> dict:
    ordered = sorted(times)
    worst = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50_ms": round(statistics.median(ordered), 1), "p99_ms": round(worst, 1)}


def measure(rounds: int, sessions: int, people: int, seconds: float, folder: Path) -> dict:
    with BotServer() as botapi:
        bench = Bench(folder, botapi, people=1)
        try:
            report = {"told": figures(told(bench, rounds)), "bare": figures(bare(botapi, rounds))}
            bench.phones += [bench._person(number) for number in range(1, people)]
            report["screens"] = screens(bench, sessions, seconds)
        finally:
            bench.hub.stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, some seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", help="where the hub keeps its data")
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    size = (3, 20, 3, 3.0) if args.quick else (40, 200, 20, 60.0)
    with tempfile.TemporaryDirectory(prefix="orc-", dir=args.dir) as name:
        report = measure(*size, Path(name))
    if args.json:
        return print(json.dumps(report))
    print(f"{'':24}{'p50 ms':>10}{'p99 ms':>10}")
    for row, title in (("told", "due to sendMessage"), ("bare", "sendMessage alone")):
        print(f"{title:24}{report[row]['p50_ms']:>10}{report[row]['p99_ms']:>10}")
    print()
    for title, value in report["screens"].items():
        print(f"{title:24}{value:>10}")
    print()
    met = report["told"]["p50_ms"] <= P50_MS
    print(f"{'met    ' if met else 'NOT met'}  due to sendMessage p50 at most {P50_MS} ms")
    within = not report["screens"]["over the limits"] and not report["screens"]["refused"]
    print(f"{'met    ' if within else 'NOT met'}  every call within Telegram's limits")


if __name__ == "__main__":
    main()
