"""Workflow 7 with real parts: agents, hubs and connections die, sessions and their logs do not."""

import base64
import contextlib
import json
import os
import re
import shutil
import sys
import threading

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from conftest import wait_until
from faulting import LONG, N, kill_agent, kill_hub, through, whole_log

FAST = {"tick_s": 0.2, "due_s": 0.2, "heartbeat_s": 0.5, "offline_after_s": 4, "grace_s": 0.6}
PACE_S = 0.015  # after every 100 lines, so that there is time for many deaths

# Prints numbered lines, then waits until a file appears, then exits 0.
NUMBERED = """
import os, sys, time
lines, pace, until = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
for n in range(lines):
    print(f"{n:08d} {'x' * 89}")
    if n % 100 == 99:
        sys.stdout.flush()
        time.sleep(pace)
sys.stdout.flush()
while not os.path.exists(until):
    time.sleep(0.05)
"""


def numbered(lines: int) -> bytes:
    return b"".join(b"%08d %s\r\n" % (n, b"x" * 89) for n in range(lines))


@pytest.fixture
def end_file(tmp_path):
    return tmp_path / "enough"


@pytest.fixture
def run_numbered(shop, end_file, tmp_path):
    """Start the numbered program as a task; its id once it runs, and its session's."""
    program = tmp_path / "numbered.py"
    program.write_text(NUMBERED)

    def run(lines: int, pace: float = PACE_S) -> tuple[str, str]:
        command = [sys.executable, str(program), str(lines), str(pace), str(end_file)]
        made = {"title": "numbered", "command": command, "auto_assign": True}
        task_id = shop.api("POST", "tasks", made)["id"]
        wait_until(lambda: status_of(shop, task_id) == "running", 20)
        return task_id, shop.api("GET", f"tasks/{task_id}")["session_id"]

    return run


def status_of(hub, task_id: str) -> str:
    return hub.api("GET", f"tasks/{task_id}")["status"]


def session_of(hub, session_id: str) -> dict:
    return hub.api("GET", f"sessions/{session_id}")


def stored(hub, session_id: str) -> int:
    """Where the record ends; what the agent says of a session's end may still be on its way."""
    answer = hub.ask("GET", f"sessions/{session_id}/output?offset={2**53}")
    return int(answer.headers["X-Log-End"])


def compare(found: bytes, expected: bytes) -> None:
    """Fails with the numbers of lines that are missing or come twice."""
    if found == expected:
        return
    seen = [int(n) for n in re.findall(rb"(?m)^(\d{8}) x{89}\r$", found)]
    missing = sorted(set(range(expected.count(b"\n"))) - set(seen))
    doubled = sorted({n for n in seen if seen.count(n) > 1}) if len(seen) < 10**4 else "…"
    pytest.fail(f"{len(found)} of {len(expected)} bytes; missing {missing[:10]}, twice {doubled}")


def types(hub, **where) -> list[str]:
    """The types of the events about a session or a task, oldest first."""
    events = hub.api("GET", "events?limit=1000")["events"]
    return [e["type"] for e in events if where.items() <= e.items()]


# ── workflow 7 ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hub(**FAST)
@pytest.mark.parametrize("carrier", ["socket", "poll"])
def test_an_agent_dies_and_its_work_goes_on_as_if_nothing_had_been(
    shop, start_agent, run_numbered, end_file, carrier
):
    agent = start_agent(shop, "dev", slots=2)
    agent.stop()
    agent.config.write_text(agent.config.read_text() + f"carrier: {carrier}\n")
    agent.start()
    task_id, session_id = run_numbered(3000, 0.05)
    wait_until(lambda: session_of(shop, session_id)["log_end"] > 20_000, 20)
    pid = session_of(shop, session_id)["pid"]
    agent.kill()
    wait_until(lambda: session_of(shop, session_id)["status"] == "disconnected", 10)
    wait_until(lambda: not agent.is_online(), 10)
    os.kill(pid, 0)  # the terminal lives on
    assert status_of(shop, task_id) == "running"
    agent.start()
    wait_until(lambda: session_of(shop, session_id)["status"] == "recovering", 10)
    wait_until(lambda: session_of(shop, session_id)["status"] == "active", 10)
    assert session_of(shop, session_id)["pid"] == pid
    assert status_of(shop, task_id) == "running"
    end_file.touch()
    wait_until(lambda: status_of(shop, task_id) == "done", 30)
    wait_until(lambda: session_of(shop, session_id)["status"] == "closed", 10)
    wait_until(lambda: len(whole_log(shop, session_id)) >= 300_000, 20)
    compare(whole_log(shop, session_id), numbered(3000))
    assert types(shop, session_id=session_id, task_id=task_id)[-5:] == [
        "session_disconnected",
        "session_recovered",
        "session_active",
        "task_completed",
        "session_closed",
    ]
    about_server = types(shop, session_id=None, task_id=None)
    assert about_server.count("server_offline") == 1
    assert types(shop, task_id=task_id).count("task_started") == 1
    assert types(shop, task_id=task_id).count("task_assigned") <= 1


@pytest.mark.hub(**FAST)
def test_an_agent_that_lost_its_state_directory_finds_its_work_again(
    shop, start_agent, run_numbered, end_file
):
    agent = start_agent(shop, "dev", slots=2)
    task_id, session_id = run_numbered(300)
    wait_until(lambda: stored(shop, session_id) == len(numbered(300)), 20)
    agent.stop()
    (agent.folder / "state").rename(agent.folder / "lost")
    agent.start()
    wait_until(lambda: session_of(shop, session_id)["status"] == "active", 20)
    end_file.touch()
    wait_until(lambda: status_of(shop, task_id) == "done", 20)
    wait_until(lambda: session_of(shop, session_id)["status"] == "closed", 20)
    assert shop.api("GET", f"tasks/{task_id}")["attempt"] == 1
    compare(whole_log(shop, session_id), numbered(300))
    events = shop.api("GET", "events?limit=1000")["events"]
    [gap] = [e["details"] for e in events if e["type"] == "session_log_gap"]
    assert (gap["from"], "was adopted" in gap["why"]) == (len(numbered(300)), True)


@pytest.mark.hub(**FAST)
@pytest.mark.parametrize("carrier", ["socket", "poll"])
def test_an_agent_whose_state_directory_was_set_back_is_heard(
    shop, start_agent, run_numbered, end_file, carrier
):
    """As when its machine goes back to a snapshot: it counts its syncs and reports from lower."""
    agent = start_agent(shop, "dev", slots=2)
    agent.stop()
    agent.config.write_text(agent.config.read_text() + f"carrier: {carrier}\n")
    snapshot = agent.folder / "snapshot"
    shutil.copytree(agent.folder / "state", snapshot, ignore=shutil.ignore_patterns("*.sock"))
    for _ in range(2):
        agent.start()
        agent.stop()
    agent.start()
    end_file.touch()
    task_id, _ = run_numbered(1)
    wait_until(lambda: status_of(shop, task_id) == "done", 20)
    agent.stop()
    shutil.rmtree(agent.folder / "state")
    snapshot.rename(agent.folder / "state")
    agent.start()
    made = {"title": "again", "command": ["true"], "auto_assign": True}
    again = shop.api("POST", "tasks", made)["id"]
    wait_until(lambda: status_of(shop, again) == "done", 20)


@pytest.mark.hub(**FAST)
def test_a_session_that_ended_while_its_agent_was_dead_is_reported_with_code_and_output(
    shop, start_agent
):
    agent = start_agent(shop, "dev")
    go = agent.folder / "go"
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; echo last words; exit 7"
    made = {"title": "t", "command": ["sh", "-c", script], "auto_assign": True}
    task_id = shop.api("POST", "tasks", made)["id"]
    wait_until(lambda: status_of(shop, task_id) == "running", 20)
    session_id = shop.api("GET", f"tasks/{task_id}")["session_id"]
    agent.kill()
    go.touch()
    wait_until(lambda: "1" in agent.tmux("list-panes", "-a", "-F", "#{pane_dead}"), 10)
    agent.start()
    ended = wait_until(lambda: (s := session_of(shop, session_id))["status"] == "closed" and s, 10)
    assert ended["exit_code"] == 7
    assert shop.api("GET", f"tasks/{task_id}")["status"] == "failed"
    wait_until(lambda: whole_log(shop, session_id) == b"last words\r\n", 10)


@pytest.mark.hub(**FAST)
def test_a_hub_dies_and_agents_and_watchers_come_back_by_themselves(
    shop, start_agent, run_numbered, end_file
):
    start_agent(shop, "dev")
    task_id, session_id = run_numbered(6000, 0.15)
    watcher = Watcher(shop, session_id)
    watcher.until(lambda: len(watcher.shown) > 10_000)
    for end in (shop.kill, shop.stop):
        before = session_of(shop, session_id)["log_end"]
        watcher.repaints = 0
        end()
        shop.start()
        wait_until(lambda: session_of(shop, session_id)["status"] == "active", 20)
        wait_until(lambda before=before: session_of(shop, session_id)["log_end"] > before, 20)
        watcher.until(lambda: watcher.repaints > 0 and len(watcher.shown) > 1000)
    assert status_of(shop, task_id) == "running"
    end_file.touch()
    wait_until(lambda: status_of(shop, task_id) == "done", 40)
    wait_until(lambda: len(whole_log(shop, session_id)) >= 600_000, 20)
    compare(whole_log(shop, session_id), numbered(6000))
    watcher.close()
    assert types(shop, task_id=task_id).count("task_started") == 1


class Watcher(threading.Thread):
    """Watches a session as our clients do: goes on where it was, begins anew when it must."""

    def __init__(self, hub, session_id: str):
        super().__init__(daemon=True)
        self.url = hub.url.replace("http", "ws") + f"/ws/terminal/{session_id}"
        self.headers = {"Authorization": f"Bearer {hub.login()}"}
        self.shown, self.offset, self.repaints = b"", None, 0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError, ConnectionClosed, TimeoutError):
                self._watch()
            self.over.wait(0.2)

    def _watch(self) -> None:
        with connect(self.url, additional_headers=self.headers, compression=None) as ws:
            ws.send(json.dumps({"type": "resume", "offset": self.offset}))
            while not self.over.is_set():
                with contextlib.suppress(TimeoutError):
                    self._take(json.loads(ws.recv(0.5)))

    def _take(self, frame: dict) -> None:
        if frame["type"] != "output":
            return
        data = base64.b64decode(frame["data"])
        if frame.get("repaint"):
            self.shown, self.repaints = b"", self.repaints + 1
        else:
            assert frame["offset"] == self.offset
        self.offset = frame["offset"] + len(data)
        self.shown += data

    def until(self, condition) -> None:
        wait_until(condition, 20)

    def close(self) -> None:
        self.over.set()
        self.join(10)


# ── a numbered stream, many deaths ────────────────────────────────────────────────────────────


@pytest.fixture
def stream(shop, run_numbered, end_file, case):
    """Print the stream; `at_each(deed)` does that at random bytes of it; `whole()` compares."""
    return Stream(shop, run_numbered, end_file, case)


class Stream:
    LINES = 104_858 if LONG else 12_000  # of 100 bytes: 10 MB, or about 1

    def __init__(self, hub, run_numbered, end_file, case):
        self.hub, self.end_file, self.case = hub, end_file, case
        self.task_id, self.session_id = run_numbered(self.LINES)
        self.marks = sorted(case.random.randrange(self.LINES * 100) for _ in range(N))

    def at_each(self, deed) -> None:
        for mark in self.marks:
            wait_until(lambda at=mark: self._there() >= at, 60, 0.005)
            deed()
            self.case.kills += 1

    def _there(self) -> int:
        return session_of(self.hub, self.session_id)["log_end"]

    def whole(self) -> None:
        self.end_file.touch()
        wait_until(lambda: status_of(self.hub, self.task_id) == "done", 90)
        wait_until(lambda: stored(self.hub, self.session_id) >= self.LINES * 100, 60)
        found, printed = whole_log(self.hub, self.session_id), numbered(self.LINES)
        compare(found, printed)
        self.case.count("bytes", len(printed), len(printed) - len(found))
        self.case.seen = "the same, each byte once"


@pytest.fixture
def dev(shop, start_agent):
    return start_agent(shop, "dev", ready=lambda agent: through(agent, shop))


@pytest.mark.fault("F5 agent killed while a stream is printed")
@pytest.mark.hub(**FAST)
@pytest.mark.timeout(240 if not LONG else 3600)
def test_no_byte_is_missing_or_doubled_when_the_agent_is_killed(dev, stream):
    stream.at_each(lambda: kill_agent(dev))
    stream.whole()


@pytest.mark.fault("F5 hub killed while a stream is printed")
@pytest.mark.hub(**FAST)
@pytest.mark.timeout(240 if not LONG else 3600)
def test_no_byte_is_missing_or_doubled_when_the_hub_is_killed(shop, dev, stream):
    stream.at_each(lambda: kill_hub(shop))
    stream.whole()


@pytest.mark.fault("F5 connection cut at random bytes of a stream")
@pytest.mark.hub(**FAST)
@pytest.mark.timeout(240 if not LONG else 3600)
@pytest.mark.parametrize("carrier", ["socket", "poll"])
def test_no_byte_is_missing_or_doubled_when_the_connection_is_cut(
    shop, start_agent, start_proxy, request, carrier
):
    proxy = start_proxy(shop)
    start_agent(shop, "dev", ready=lambda agent: through(agent, shop, proxy, carrier))
    stream = request.getfixturevalue("stream")
    for before, at in zip([0, *stream.marks], stream.marks, strict=False):
        proxy.cut_after(at - before)
        wait_until(lambda: proxy.left is None, 90, 0.005)
        stream.case.kills += 1
    stream.whole()
    assert proxy.cuts == N
