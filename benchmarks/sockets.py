"""How the hub serves live sessions, beside a bare asyncio server in the same run.

    python benchmarks/sockets.py [--quick] [--json] [--dir DIR]

See benchmarks/README.md for what is measured and how to read it. Ends with 0 always: it informs,
it is no test.
"""

import argparse
import json
import os
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# The directory of this script comes last, or its name would hide the hub's own `sockets`.
HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)
sys.path += [str(HERE), str(HERE.parent / "scripts")]

import load  # noqa: E402
from figures import (  # noqa: E402
    aim,
    cell,
    disk_directory,
    machine,
    machine_text,
    milliseconds,
    peak_mb,
    quantile,
    resident_mb,
    say,
)
from load import Alone, Place  # noqa: E402

from processes import Client, Processes, clean_env, until  # noqa: E402

HOST = "127.0.0.1"
IN_FLIGHT = 2  # messages of one agent
KEY_PAUSE_S = 0.02  # between two keystrokes, on average
FILES_ELSE = 300  # a process needs beside its connections
RAW_ECHO = ["sh", "-c", "stty raw -echo; exec cat"]

RATIO_AIM = 0.5  # of the bare server's messages/s
KEY_P50_AIM_MS, KEY_P99_AIM_MS, LOADED_P99_AIM_MS = 2.0, 10.0, 15.0
IDLE_AIM_KB, BURST_AIM_MS, BURST_KEY_AIM_MS = 30.0, 1000.0, 50.0
SSE_P99_AIM_MS = 100.0


@dataclass(frozen=True)
class Size:
    """How much is run: the aims are about FULL."""

    agents: int
    seconds: float  # of each measurement
    rate: float  # messages/s beside which somebody types
    idle: int
    streams: int
    event_rate: float
    rounds: int


FULL = Size(100, seconds=6, rate=2000, idle=3000, streams=300, event_rate=50, rounds=3)
QUICK = Size(10, seconds=0.5, rate=200, idle=100, streams=20, event_rate=50, rounds=1)
STREAMS_LONGER = 5 / 3  # than the other measurements: 10 s


# ── what is measured ──────────────────────────────────────────────────────────────────────────


def prepare(directory: str, servers: int, with_sessions: bool) -> Iterator:
    """Make a hub's database with so many servers (and a session on each), as the API would:
    [(key, id of its session)]. For a process of its own: the hub's modules stay there."""
    import auth
    import logs
    import models
    import servers as hub_servers
    import sessions

    data = Path(directory)
    data.mkdir(parents=True)
    models.open_db(data / "hub.db")
    auth.use_secret(data / "secret")
    sessions.use_logs(logs.LogStore(data / "logs.db"))
    hub_servers.begin()
    project = auth.create_project(auth.HUB, "benchmark")
    made = []
    with models.transaction():  # one for all
        for n in range(servers):
            token = auth.registration_token(auth.HUB, project["id"], "http://hub")["token"]
            known = {"registration_token": token, "name": f"load-{n}"}
            server = hub_servers.register(known, HOST)
            session = None
            if with_sessions:
                wanted = {"server_id": server["id"], "name": f"load-{n}"}
                session = sessions.open_session(auth.HUB, wanted)[0]["id"]
            made.append((server["api_key"], session))
    sessions.logs().close()
    models.close_db()
    yield tuple(made)


class Hub:
    """A hub process in a scratch directory, with servers and sessions in its database; and a real
    agent beside it, if it is asked for."""

    def __init__(self, scratch: Path, servers: int = 0, with_sessions: bool = False):
        self.scratch = scratch
        with Alone(prepare, str(scratch / "hub"), servers, with_sessions) as preparing:
            known = preparing.step().value
        # tmux leaves its socket behind; its path must be a short one
        self.tmux_sockets = tempfile.mkdtemp(prefix="orc-")
        env = clean_env(HOME=str(scratch), TMUX_TMPDIR=self.tmux_sockets)
        self.processes = Processes(scratch, env)
        self.tmux: list[str] = []
        password = secrets.token_urlsafe(12)
        try:
            url = self.processes.start_hub(
                *("--port", "0", "--data", str(scratch / "hub"), "--log-level", "WARNING"),
                ORCHESTRATIA_ADMIN_PASSWORD=password,
            )
            self.client = Client(url, {"username": "admin", "password": password})
        except BaseException:
            self.stop()
            raise
        self.pid = self.processes.hub.pid
        self.place = Place((HOST, int(url.rpartition(":")[2])), self.client.token, known)
        self.events = self.place.address, "/api/v1/events/stream", "/api/v1/tasks"

    def start_agent(self) -> None:
        """A real agent, for `open_session`."""
        files = ("--config", str(self.scratch / "agent.yaml"), "--state", str(self.scratch / "a"))
        token = self.client.call("POST", "servers/tokens", {})["token"]
        registering = self.processes.start(
            "register", "agent.py", *files, "--name", "here", "--register", token
        )
        if registering.wait(30):
            raise SystemExit(self.processes.log("register").read_text())
        self.processes.start("agent", "agent.py", *files)
        self.server = until(self._agent, "the agent is online")
        self.tmux = ["tmux", "-L", f"orc-{self.server['id'][:8]}"]

    def _agent(self) -> dict | None:
        server = self.client.call("GET", "servers/here")
        return server if server["status"] == "online" else None

    def open_session(self) -> dict:
        """A session that sends back each byte it is typed, once it runs."""
        wanted = {"server_id": self.server["id"], "command": RAW_ECHO}
        session = self.client.call("POST", "sessions", wanted)

        def running() -> dict | None:
            seen = self.client.call("GET", f"sessions/{session['id']}")
            return seen if seen["status"] == "active" else None

        return until(running, "the session runs")

    def stop(self) -> None:
        self.processes.stop()
        if self.tmux:
            subprocess.run([*self.tmux, "kill-server"], env=self.processes.env, capture_output=True)
        shutil.rmtree(self.tmux_sockets, ignore_errors=True)


class Bare:
    """The bare server."""

    def __init__(self, scratch: Path):
        scratch.mkdir()
        self.processes = Processes(scratch, clean_env())
        bare = self.processes.start("bare", "benchmarks/bare.py")
        said = until(
            lambda: self.processes.log("bare").read_text().split()[2:], "the bare server listens"
        )
        self.pid = bare.pid
        self.place = Place((HOST, int(said[0])))
        self.events = (HOST, int(said[1])), "/events", "/events"

    def stop(self) -> None:
        self.processes.stop()


@contextmanager
def running(kind: Callable, *arguments):
    """A server in a scratch directory that goes with it."""
    folder = Path(tempfile.mkdtemp(dir=arguments[0]))
    server = None
    try:
        server = kind(folder / "s", *arguments[1:])
        yield server
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Meter:
    """How much of a processor a server takes from now on."""

    def __init__(self, pid: int):
        self._pid = pid
        self._cpu, self._at = cpu_seconds(pid), time.perf_counter()

    def share(self) -> float:
        return (cpu_seconds(self._pid) - self._cpu) / (time.perf_counter() - self._at)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ── the measurements: one round of one server each ────────────────────────────────────────────


def forwarding(server, size: Size) -> dict:
    """Agents that print to a watcher each, in a closed loop."""
    with Alone(load.printing, server.place, size.agents) as crowd:
        crowd.step()
        crowd.step(("closed", size.seconds / 6, IN_FLIGHT))  # warm
        meter = Meter(server.pid)
        step = crowd.step(("closed", size.seconds, IN_FLIGHT))
        numbers = times(step.value.latencies)
        return numbers | {
            "per_s": len(step.value.latencies) / step.value.seconds,
            "server_cpu": meter.share(),
            "load_cpu": step.cpu_share,
            "peak_mb": peak_mb(server.pid),
        }


def typing(hub: Hub, size: Size) -> list[tuple[str, str, dict]]:
    """Somebody types through the hub and right here, in turns, while nothing else happens and
    while others print: [(when, where, numbers)]."""
    hub.start_agent()
    far, near = hub.open_session(), hub.open_session()
    attach = [
        "env",
        f"TMUX_TMPDIR={hub.tmux_sockets}",
        *hub.tmux,
        "attach",
        "-t",
        near["tmux_name"],
    ]
    found = []
    with (
        Alone(load.typing_there, hub.place, far["id"]) as there,
        Alone(load.typing_here, attach) as here,
        Alone(load.printing, hub.place, size.agents) as crowd,
    ):
        for alone in (there, here):
            alone.step()
        for where, typist in (("ours", there), ("local", here)):
            found.append(("typing", where, _typed(hub, typist, size)))
        crowd.step()
        for where, typist in (("ours", there), ("local", here)):
            crowd.ask(("open", size.seconds * 1.2, size.rate))
            time.sleep(size.seconds * 0.1)
            numbers = _typed(hub, typist, size)
            flow = crowd.answer()
            numbers["beside"] = len(flow.value.latencies) / flow.value.seconds
            found.append(("typing_beside", where, numbers | {"load_cpu": flow.cpu_share}))
    return found


def _typed(hub: Hub, typist: Alone, size: Size) -> dict:
    meter = Meter(hub.pid)
    step = typist.step((size.seconds, KEY_PAUSE_S))
    numbers = {"server_cpu": meter.share(), "peak_mb": peak_mb(hub.pid)}
    return times([latency for _, latency in step.value]) | numbers


def idling(server, size: Size) -> dict:
    """Many agents that have nothing to do; then all heartbeats at once."""
    with Alone(load.idle, server.place, size.idle) as agents:
        before = resident_mb(server.pid)
        agents.step()
        settle(server.pid)
        each = (resident_mb(server.pid) - before) * 1024 / size.idle
        with typist_of(server) as typist:
            if typist:
                typist.ask((2.0, KEY_PAUSE_S / 10))
                time.sleep(0.5)
            meter = Meter(server.pid)
            burst = agents.step()
            cpu = meter.share()
            began, took = burst.value
            worst = None
            if typist:
                worst = max(
                    latency
                    for at, latency in typist.answer().value
                    if at < began + took and at + latency > began
                )
    return {
        "each_kb": each,
        "took_ms": milliseconds(took),
        "key_ms": milliseconds(worst),
        "server_cpu": cpu,
        "load_cpu": burst.cpu_share,
        "peak_mb": peak_mb(server.pid),
    }


@contextmanager
def typist_of(server):
    """Somebody who types into a session of the hub's real agent; nobody at the bare server."""
    if isinstance(server, Bare):
        yield None
        return
    server.start_agent()
    with Alone(load.typing_there, server.place, server.open_session()["id"]) as typist:
        typist.step()
        yield typist


def settle(pid: int, quiet: float = 0.02, patience_s: float = 15.0) -> None:
    """Wait until the server has nothing left to do."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        meter = Meter(pid)
        time.sleep(1)
        if meter.share() < quiet:
            return


def streaming(server, size: Size) -> dict:
    """Streams of events, all of which see each event."""
    address, read, post = server.events
    token = server.place.token
    events = int(size.seconds * STREAMS_LONGER * size.event_rate)
    with (
        Alone(load.reading, address, read, token, size.streams) as readers,
        Alone(load.publishing, address, post, token) as publisher,
    ):
        readers.step()
        publisher.step()
        meter = Meter(server.pid)
        readers.ask(events)
        began = time.perf_counter()
        sent = publisher.step((events, size.event_rate)).value
        step = readers.answer()
        took = time.perf_counter() - began
        latencies = [at - sent[n] for n, came in step.value.items() for at in came]
        return times(latencies) | {
            "per_s": len(latencies) / took,
            "offered": len(sent) / (sent[-1] - sent[0] + 1 / size.event_rate),
            "missing": events * size.streams - len(latencies),
            "server_cpu": meter.share(),
            "load_cpu": step.cpu_share,
            "peak_mb": peak_mb(server.pid),
        }


def times(latencies) -> dict:
    """Quantiles of seconds, in milliseconds."""
    return {
        "p50_ms": milliseconds(quantile(latencies, 0.5)),
        "p99_ms": milliseconds(quantile(latencies, 0.99)),
        "max_ms": milliseconds(max(latencies, default=None)),
    }


# ── all of them ───────────────────────────────────────────────────────────────────────────────


def measure(directory: str, size: Size, chosen: list[str]) -> dict:
    """Every number of the report: the median round of each."""
    environment = machine(directory) | {"size": asdict(size)}
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for n in range(size.rounds):
        for what, who, numbers in one_round(directory, size, chosen, f"round {n + 1}"):
            found[what, who].append(numbers)
    rows = [{"what": what, "who": who} | medians(each) for (what, who), each in found.items()]
    pairs = zip(found["forwarding", "ours"], found["forwarding", "bare"], strict=True)
    ratios = [ours["per_s"] / bare["per_s"] for ours, bare in pairs]
    return {"environment": environment, "rows": rows, "ratio": _median(ratios)}


MEASUREMENTS = ("forwarding", "typing", "idling", "streaming")


def one_round(
    directory: str, size: Size, chosen: list[str], title: str
) -> Iterator[tuple[str, str, dict]]:
    """Each measurement once, ours and the other in turns: (what, who, numbers)."""
    turns = {
        "forwarding": (forwarding, (size.agents, True)),
        "typing": (typing, (size.agents, True)),
        "idling": (idling, (size.idle, False)),
        "streaming": (streaming, ()),
    }
    for what in chosen:
        say(f"{title}: {what}")
        function, servers = turns[what]
        busy = {"loadavg": os.getloadavg()[0]}
        with running(Hub, directory, *servers) as hub:
            if function is typing:
                for when, who, numbers in typing(hub, size):
                    yield when, who, busy | numbers
                continue
            yield what, "ours", busy | function(hub, size)
        with running(Bare, directory) as bare:
            yield what, "bare", busy | function(bare, size)


def medians(rounds: list[dict]) -> dict:
    names = dict.fromkeys(name for numbers in rounds for name in numbers)
    return {name: _median([numbers.get(name) for numbers in rounds]) for name in names}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


def aims(report: dict) -> list[dict]:
    """What was aimed at, of what was measured."""
    size = Size(**report["environment"]["size"])
    rows = {(row["what"], row["who"]): row for row in report["rows"]}
    found = []

    def most(text: str, value: float, limit: float, unit: str = "ms") -> None:
        found.append(aim(f"{text}: at most {limit:g} {unit}", value, value <= limit))

    if ratio := report["ratio"]:
        text = f"forwarding: at least {RATIO_AIM} of the bare server"
        found.append(aim(text, ratio, ratio >= RATIO_AIM))
    if typed := rows.get(("typing", "ours")):
        here = rows["typing", "local"]
        text = "keystroke {} (right here: {:.2f})".format
        most(text("p50", here["p50_ms"]), typed["p50_ms"], KEY_P50_AIM_MS)
        most(text("p99", here["p99_ms"]), typed["p99_ms"], KEY_P99_AIM_MS)
    if typed := rows.get(("typing_beside", "ours")):
        here = rows["typing_beside", "local"]["p99_ms"]
        text = f"keystroke p99 beside {typed['beside']:,.0f} messages/s (right here: {here:.2f})"
        most(text, typed["p99_ms"], LOADED_P99_AIM_MS)
    if idle := rows.get(("idling", "ours")):
        most("memory of each idle agent", idle["each_kb"], IDLE_AIM_KB, "KB")
        most(f"{size.idle:,} heartbeats at once", idle["took_ms"], BURST_AIM_MS)
        most("a keystroke meanwhile", idle["key_ms"], BURST_KEY_AIM_MS)
    if streams := rows.get(("streaming", "ours")):
        most("events not delivered", streams["missing"], 0, "of them")
        most("events p99", streams["p99_ms"], SSE_P99_AIM_MS)
    return found


# ── the report ────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    ("per s", "per_s", ",.0f"),
    ("p50 ms", "p50_ms", ".2f"),
    ("p99 ms", "p99_ms", ".2f"),
    ("max ms", "max_ms", ".1f"),
    ("KB each", "each_kb", ".1f"),
    ("all ms", "took_ms", ".0f"),
    ("key ms", "key_ms", ".1f"),
    ("CPU", "server_cpu", ".0%"),
    ("by load", "load_cpu", ".0%"),
    ("peak MB", "peak_mb", ".0f"),
    ("loadavg", "loadavg", ".2f"),
)


def titles(size: Size) -> dict[str, str]:
    return {
        "forwarding": f"{size.agents} agents → {size.agents} watchers, 1 KB",
        "typing": "keystroke",
        "typing_beside": f"keystroke beside {size.rate:,}/s",
        "idling": f"{size.idle:,} idle agents",
        "streaming": f"SSE {size.streams} × {size.event_rate:g}/s",
    }


def table(report: dict) -> list[str]:
    names = titles(Size(**report["environment"]["size"]))
    lines = [f"{'':34}{'':6}" + "".join(f"{title:>9}" for title, _, _ in COLUMNS)]
    for row in report["rows"]:
        name = names[row["what"]] if row["who"] == "ours" else ""
        cells = "".join(f"{cell(row.get(key), form):>9}" for _, key, form in COLUMNS)
        lines.append(f"{name:34}{row['who']:6}{cells}")
    return lines


def show(report: dict) -> None:
    rounds = report["environment"]["size"]["rounds"]
    print(f"\n{machine_text(report['environment'])}")
    print(
        f"Every number: {f'median of {rounds}' if rounds > 1 else 'one round'}; ours, and bare or "
        "local, in turns.\nours: hub.py with rights, log blocks and their commits; bare: asyncio "
        "and websockets, forwarding alone; local: the same tmux without a hub.\n"
        "KB each: resident memory an idle agent adds; all ms: until every heartbeat sent at once "
        "was handled; key ms: the slowest keystroke meanwhile.\n"
        "CPU, by load: of one processor, taken by the server and by the process that makes the "
        "load; loadavg: of the machine, before the round.\n"
    )
    print("\n".join(table(report)), end="\n\n")
    for wanted in report["aims"]:
        print(f"{'met    ' if wanted['met'] else 'NOT met'}  {wanted['aim']}: {wanted['value']:g}")


def allow_files(wanted: int) -> None:
    """Let this process and those it starts hold so many files open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < wanted:
        raise SystemExit(f"{wanted} open files are needed, {most} allowed: raise `ulimit -Hn`.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of everything, one round: a look")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--rounds", type=int, help="of each measurement, instead of 3 (quick: 1)")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.add_argument("--dir", default=None, help="a directory on the disk to measure")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    size = replace(size, rounds=options.rounds or size.rounds)
    allow_files(size.idle + FILES_ELSE)
    directory = tempfile.mkdtemp(prefix="sockets-", dir=options.dir or disk_directory())
    try:
        report = measure(directory, size, options.only)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report["aims"] = aims(report)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main()
