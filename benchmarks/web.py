"""How fast the pages are, in a real browser with a real hub, agent and tmux.

    python benchmarks/web.py [--quick] [--json] [--only events typing flood board graph]

Prints what was aimed at and whether it was met; always ends with 0.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from figures import (  # noqa: E402
    aim,
    disk_directory,
    machine,
    machine_text,
    quantile,
    resident_mb,
)

from chromium import CHROMIUM, FLAGS  # noqa: E402
from demo import Demo  # noqa: E402
from processes import Client, until  # noqa: E402

MEASUREMENTS = ("events", "typing", "flood", "board", "graph")
RATE = 50  # events a second
SHOWN = 20  # tasks on the page that is watched
KEYS = 150
KEY_PAUSE_S = 0.06
FLOOD_BYTES = 1_000_000  # a second
BOARD_TASKS = 2000
GRAPH_TASKS = 500
AIMS = {
    "events_p50": 50,
    "events_p99": 200,
    "typing_p50": 25,
    "flood_growth": 10,
    "board": 500,
    "graph": 20,
}

# Notes when a marker is first seen; a marker is what the load wrote last into a title.
WATCH = """() => {
  window.seen = {};
  const look = () => {
    for (const link of document.querySelectorAll("a.title")) {
      const found = link.textContent.match(/#(\\d+)#/);
      if (found && !(found[1] in seen)) seen[found[1]] = performance.timeOrigin + performance.now();
    }
  };
  const everything = {childList: true, subtree: true, characterData: true};
  new MutationObserver(look).observe(document.body, everything);
  look();
}"""

# What it takes to fetch the live part once.
FETCH = """async () => {
  const headers = {"HX-Request": "true", "HX-Target": "live"};
  const took = [];
  for (let n = 0; n < 20; n += 1) {
    const began = performance.now();
    const part = document.createElement("template");
    part.innerHTML = await (await fetch(location.href, {headers})).text();
    took.push(performance.now() - began);
  }
  return took;
}"""

# Notes for each key the time until what stands in the terminal has changed.
TYPE = """async ([count, pause]) => {
  const rows = document.querySelector(".xterm-rows");
  const field = document.querySelector(".xterm-helper-textarea");
  const took = [];
  for (let n = 0; n < count; n += 1) {
    const letter = "abcdefghijklmnop"[n % 16];
    const before = rows.textContent;
    await new Promise((done) => {
      const watch = new MutationObserver(() => {
        if (rows.textContent === before) return;
        watch.disconnect();
        took.push(performance.now() - began);
        done();
      });
      watch.observe(rows, {childList: true, subtree: true, characterData: true});
      const began = performance.now();
      field.value = letter;
      field.dispatchEvent(new InputEvent("input", {data: letter, inputType: "insertText"}));
      field.value = "";
    });
    await new Promise((done) => setTimeout(done, pause * 1000));
  }
  return took;
}"""

FRAMES = """(seconds) => new Promise((done) => {
  let frames = 0;
  const began = performance.now();
  const count = () => {
    frames += 1;
    const past = performance.now() - began;
    if (past < seconds * 1000) requestAnimationFrame(count);
    else done(frames / (past / 1000));
  };
  requestAnimationFrame(count);
})"""

PAINTED = """() => new Promise((done) => new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (entry.name === "first-contentful-paint") done(entry.startTime);
  }
}).observe({type: "paint", buffered: true}))"""


# Frames while the picture is zoomed in and out and moved with every one of them.
ZOOMED = """(seconds) => new Promise((done) => {
  const frame = document.querySelector(".graph");
  const buttons = ["in", "out"].map((word) => document.querySelector(`[data-zoom=${word}]`));
  let frames = 0;
  const began = performance.now();
  const step = () => {
    frames += 1;
    buttons[Math.floor(frames / 8) % 2].click();
    frame.scrollLeft += frames % 40 < 20 ? 30 : -30;
    const past = performance.now() - began;
    if (past < seconds * 1000) requestAnimationFrame(step);
    else done(frames / (past / 1000));
  };
  requestAnimationFrame(step);
})"""


class Pages:
    """A hub with two agents, and a browser that is signed in."""

    def __init__(self, demo: Demo, playwright):
        self.demo = demo
        self.browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = self.browser.new_context(
            base_url=demo.url, viewport={"width": 1280, "height": 900}
        )
        context.add_cookies([{"name": "orchestratia", "value": demo.client.token, "url": demo.url}])
        self.context = context

    @contextmanager
    def page(self, path: str):
        page = self.context.new_page()
        page.goto(path)
        page.locator("#link[data-state=live]").wait_for()
        yield page
        page.close()

    def session(self, name: str, *command: str) -> None:
        body = {"server_id": "dev-backend", "name": name, "command": list(command)}
        self.demo.call("POST", "sessions", body)
        until(
            lambda: self.demo.call("GET", f"sessions/{name}")["status"] == "active",
            f"the session {name} runs",
        )


def spread(values: list[float]) -> dict:
    """Of milliseconds."""
    return {
        "count": len(values),
        "p50_ms": round(quantile(values, 0.5), 1),
        "p99_ms": round(quantile(values, 0.99), 1),
        "max_ms": round(max(values), 1),
    }


def events(pages: Pages, seconds: float) -> dict:
    """From an event's commit until its fragment is on the screen, while events keep coming; beside
    it what the same page takes to fetch that fragment once and put it there."""
    call = pages.demo.call
    ids = [call("POST", "tasks", {"title": f"Task {n}"})["id"] for n in range(SHOWN)]
    committed: dict[str, float] = {}

    def load() -> None:
        client = Client(pages.demo.url, {"username": "admin", "password": pages.demo.password})
        begin = time.perf_counter()
        for n in range(int(seconds * RATE)):
            time.sleep(max(0.0, begin + n / RATE - time.perf_counter()))
            client.call("PUT", f"tasks/{ids[n % SHOWN]}", {"title": f"Task #{n}#"})
            committed[str(n)] = time.time() * 1000

    with pages.page("/tasks") as page:
        page.evaluate(WATCH)
        thread = threading.Thread(target=load)
        thread.start()
        while thread.is_alive():
            page.wait_for_timeout(200)
        page.wait_for_timeout(1000)
        seen = page.evaluate("window.seen")
        alone = page.evaluate(FETCH)
    # One that was overwritten by the next before the page looked is on screen with that one.
    latencies, newest = [], None
    for number in sorted(committed, key=int, reverse=True):
        newest = seen.get(number, newest)
        if newest is not None:
            latencies.append(max(newest - committed[number], 0.0))
    return {
        "ours": spread(latencies),
        "fetch": spread(alone),
        "missing": len(committed) - len(latencies),
    }


def typing(pages: Pages, keys: int) -> dict:
    """From a key until its echo is on the screen, through hub, agent and tmux; beside it the API's
    cheapest answer to the same browser."""
    pages.session("typing", "cat")
    with pages.page("/sessions/typing") as page:
        page.locator(".terminal-part[data-state=live]").wait_for()
        page.wait_for_timeout(500)
        took = page.evaluate(TYPE, [keys, KEY_PAUSE_S])
        round_trip = page.evaluate(
            """async () => { const took = [];
            for (let n = 0; n < 50; n += 1) { const began = performance.now();
              await (await fetch("/api/v1/auth/me")).text();
              took.push(performance.now() - began); }
            return took; }"""
        )
    return {"ours": spread(took), "request": spread(round_trip)}


PRINT = """
import sys, time
line = b"".join(b"%07d and what else there is to say about it\\n" % n for n in range(500))
begin, sent = time.monotonic(), 0
while time.monotonic() - begin < {seconds}:
    sys.stdout.buffer.write(line); sys.stdout.buffer.flush(); sent += len(line)
    time.sleep(max(0.0, begin + sent / {rate} - time.monotonic()))
time.sleep(600)
"""


def flood(pages: Pages, seconds: float) -> dict:
    """Output of 1 MB/s: what the page's memory grows by, and frames per second; beside it the
    frames of a page where nothing happens."""
    program = PRINT.format(seconds=seconds + 10, rate=FLOOD_BYTES)
    with pages.page("/servers") as page:
        calm = page.evaluate(FRAMES, 2)
    hub = pages.demo.processes.hub.pid
    pages.session("flood", sys.executable, "-c", program)
    with pages.page("/sessions/flood") as page:
        cdp = page.context.new_cdp_session(page)
        page.locator(".terminal-part[data-state=live]").wait_for()
        page.wait_for_timeout(5000)  # the terminal's own scrollback is full then
        before, hub_before = heap_mb(cdp), resident_mb(hub)
        frames = page.evaluate(FRAMES, seconds)
        after, hub_after = heap_mb(cdp), resident_mb(hub)
    return {
        "frames_per_s": round(frames, 1),
        "calm_frames_per_s": round(calm, 1),
        "heap_mb": [round(before, 1), round(after, 1)],
        "growth_mb": round(after - before, 1),
        "hub_growth_mb": round(hub_after - hub_before, 1),
    }


def heap_mb(cdp) -> float:
    """What the page's script holds after everything that can be let go was."""
    cdp.send("HeapProfiler.enable")
    for _ in range(2):
        cdp.send("HeapProfiler.collectGarbage")
    return cdp.send("Runtime.getHeapUsage")["usedSize"] / 1e6


def board(pages: Pages, count: int, rounds: int) -> dict:
    """The first paint of a board with many tasks; beside it that of the page of projects."""
    for begin in range(0, count, 500):
        tasks = [{"id": f"t{n}", "title": f"Task {n}"} for n in range(begin, begin + 500)]
        pages.demo.call("POST", "pipelines", {"name": f"from {begin}", "tasks": tasks})
    found = {"ours": [], "login": []}
    for _ in range(rounds):
        for name, path in (("ours", "/tasks?view=board"), ("login", "/login?token=x")):
            page = pages.context.new_page()
            page.goto(path)
            found[name].append(page.evaluate(PAINTED))
            page.close()
    return {name: spread(values) for name, values in found.items()}


def graph(pages: Pages, count: int) -> dict:
    """Frames per second while the picture of many tasks is zoomed and moved, and its first paint;
    beside it the frames of a page where nothing happens."""
    tasks = [
        {"id": f"g{n}", "title": f"Task {n}", "depends_on": sorted({f"g{n // 2}", f"g{n // 3}"})}
        for n in range(1, count)
    ]
    tasks.insert(0, {"id": "g0", "title": "Task 0"})
    made = pages.demo.call("POST", "pipelines", {"name": "large", "tasks": tasks})
    with pages.page("/servers") as page:
        calm = page.evaluate(FRAMES, 2)
    with pages.page(f"/pipelines/{made['id']}") as page:
        painted = page.evaluate(PAINTED)
        zoomed = page.evaluate(ZOOMED, 5)
    return {
        "tasks": count,
        "frames_per_s": round(zoomed, 1),
        "calm_frames_per_s": round(calm, 1),
        "first_paint_ms": round(painted, 1),
    }


def measure(options) -> dict:
    quick = options.quick
    seconds = 5.0 if quick else 30.0
    runs = {
        "events": lambda pages: events(pages, seconds / 2),
        "typing": lambda pages: typing(pages, KEYS // 3 if quick else KEYS),
        "flood": lambda pages: flood(pages, seconds),
        "board": lambda pages: board(pages, BOARD_TASKS, 3 if quick else 10),
        "graph": lambda pages: graph(pages, GRAPH_TASKS),
    }
    directory = tempfile.TemporaryDirectory(prefix="web-", dir=disk_directory())
    with directory as scratch, sync_playwright() as playwright:
        report = {"environment": machine(scratch)}
        demo = Demo(Path(scratch))
        try:
            demo.start()
            pages = Pages(demo, playwright)
            for name in options.only:
                print(f"… {name}", file=sys.stderr)
                report[name] = runs[name](pages)
            pages.browser.close()
        finally:
            demo.stop()
    report["aims"] = aims(report)
    return report


def aims(report: dict) -> list[dict]:
    """What was aimed at, of what was measured."""
    found = []

    def most(text: str, value: float, limit: float, unit: str = "ms") -> None:
        found.append(aim(f"{text}: at most {limit:g} {unit}", value, value <= limit))

    if seen := report.get("events"):
        beside = f"with {RATE} events/s (one fetch of the part alone: {seen['fetch']['p50_ms']:g})"
        most(f"commit to screen p50 {beside}", seen["ours"]["p50_ms"], AIMS["events_p50"])
        most("commit to screen p99", seen["ours"]["p99_ms"], AIMS["events_p99"])
        most("events not seen", seen["missing"], 0, "of them")
    if typed := report.get("typing"):
        beside = f"(a request of the page: {typed['request']['p50_ms']:g})"
        most(
            f"keystroke to echo on screen p50 {beside}", typed["ours"]["p50_ms"], AIMS["typing_p50"]
        )
    if flow := report.get("flood"):
        calm = f"(frames/s {flow['frames_per_s']:g}, of a calm page {flow['calm_frames_per_s']:g})"
        most(f"growth of the page at 1 MB/s {calm}", flow["growth_mb"], AIMS["flood_growth"], "MB")
    if drawn := report.get("board"):
        beside = f"(the login page: {drawn['login']['p50_ms']:g})"
        most(
            f"first paint of a board of {BOARD_TASKS:,} tasks {beside}",
            drawn["ours"]["p50_ms"],
            AIMS["board"],
        )
    if drawn := report.get("graph"):
        calm = f"(of a calm page {drawn['calm_frames_per_s']:g})"
        text = f"frames/s of a graph of {GRAPH_TASKS} tasks that is zoomed {calm}: at least"
        found.append(
            aim(
                f"{text} {AIMS['graph']}",
                drawn["frames_per_s"],
                drawn["frames_per_s"] >= AIMS["graph"],
            )
        )
    return found


def show(report: dict) -> None:
    print(f"\n{machine_text(report['environment'])}\n")
    for name in MEASUREMENTS:
        if name in report:
            print(f"{name:8}{json.dumps(report[name])}")
    print()
    for wanted in report["aims"]:
        print(f"{'met    ' if wanted['met'] else 'NOT met'}  {wanted['aim']}: {wanted['value']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of everything: a look")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    options = parser.parse_args()
    report = measure(options)
    print(json.dumps(report, indent=2)) if options.json else show(report)


if __name__ == "__main__":
    main()
