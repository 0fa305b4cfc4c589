"""The catalogue of faults with real parts: hubs, agents, tmux and the network between them die, and
what must hold is read from what is left. The table of a run stands in docs/reliability.md."""

import contextlib
import os
import resource
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from conftest import wait_until
from faulting import (
    FAST,
    LONG,
    Graph,
    N,
    Told,
    check_resources,
    healthy,
    kill_agent,
    kill_hub,
    reading,
    resources,
    stop_for,
    through,
    whole_log,
)
from test_typing import READER, read_by

DYING = Path(__file__).with_name("dying_hub.py")
pytestmark = pytest.mark.timeout(240 if not LONG else 7200)


BY_HAND = FAST | {"offline_after_s": 3600}  # for a server that has no agent to say it lives


def fault(name: str):
    return pytest.mark.fault(name)


@pytest.fixture
def graph(shop, tmp_path):
    return Graph(shop, tmp_path)


@pytest.fixture
def two(shop, start_agent):
    """Two agents that come back soon."""

    def soon(agent):
        through(agent, shop)

    return [start_agent(shop, name, ready=soon, slots=4) for name in ("one", "two")]


def row(hub, task_id: str) -> dict:
    return hub.api("GET", f"tasks/{task_id}")


def types(hub, task_id: str) -> list[str]:
    return [e["type"] for e in hub.api("GET", f"tasks/{task_id}/events")["events"]]


def worker(hub, *command: str, **fields) -> str:
    """Make a task that is given away at once; its id."""
    made = {"title": "work", "command": list(command), "auto_assign": True} | fields
    return hub.api("POST", "tasks", made)["id"]


def by_hand(hub, **fields) -> str:
    """Make a task and give it to the server "by hand", which has no agent; its id."""
    task_id = hub.api("POST", "tasks", {"title": "t"} | fields)["id"]
    hub.api("POST", f"tasks/{task_id}/assign", {"server": "by hand"})
    return task_id


@pytest.fixture
def key(shop):
    """The key of a server without an agent, whose reports are made here."""
    found = shop.register("by hand", capabilities={"slots": 10_000})["api_key"]
    assert shop.ask("POST", "servers/heartbeat", {}, key=found).ok
    return found


def running(hub, task_id: str) -> dict:
    """The task once its worker runs."""
    return wait_until(lambda: (t := row(hub, task_id))["status"] == "running" and t, 20)


def until_status(hub, task_id: str, *statuses: str, timeout: float = 40) -> dict:
    return wait_until(lambda: (t := row(hub, task_id))["status"] in statuses and t, timeout, 0.05)


# ── killing ───────────────────────────────────────────────────────────────────────────────────


@fault("F1 hub killed in mid-cascade")
@pytest.mark.hub(**FAST)
def test_f1_a_hub_killed_at_random_moments_loses_no_task(shop, two, graph, case):
    before = resources(shop.process.pid)
    told = Told(shop)
    graph.make(layers=2 + N, width=4, dice=case.random)
    for _ in range(N):
        time.sleep(case.random.uniform(0, 0.6))
        kill_hub(shop)
        case.kills += 1
    graph.wait()
    healthy(shop)
    case.check(shop, told.finish())
    case.seen = f"{len(graph.ids)} tasks, {graph.check()} bodies twice"
    check_resources(before, shop)


@fault("F1 agents killed in mid-cascade")
@pytest.mark.hub(**FAST)
def test_f1_agents_killed_at_random_moments_lose_no_task(shop, two, graph, case):
    graph.make(layers=2 + N, width=4, dice=case.random)
    for _ in range(N):
        time.sleep(case.random.uniform(0, 0.6))
        kill_agent(case.random.choice(two))
        case.kills += 1
    graph.wait()
    case.check(shop)
    case.seen = f"{len(graph.ids)} tasks, {graph.check()} bodies twice"


@pytest.mark.parametrize("place", ["announce", "ack", "report", "taken"])
@fault("F2, F3 hub killed between commit, announcement and acknowledgement")
def test_f2_f3_a_hub_that_dies_before_it_tells_tells_afterwards(
    start_hub, start_agent, tmp_path, case, place
):
    hub = start_hub(script=DYING, **FAST)
    hub.api("POST", "projects", {"name": "shop"})
    start_agent(hub, "one", slots=4, ready=lambda agent: through(agent, hub))
    told, graph = Told(hub), Graph(hub, tmp_path)
    for _ in range(max(1, N // 4)):
        (hub.data / "DIE").write_text(place)
        with contextlib.suppress(requests.ConnectionError):
            graph.make(layers=1, width=1)
        wait_until(lambda: hub.process.poll() is not None, 20)
        hub.kill()
        hub.start()
        case.kills += 1
    with reading(hub) as db:
        graph.ids = [task_id for (task_id,) in db.execute("SELECT id FROM task")]
        sessions = db.execute("SELECT COUNT(DISTINCT task_id), COUNT(*) FROM session").fetchone()
    graph.wait()
    case.check(hub, told.finish())
    assert sessions[0] == sessions[1], "a second session was started"
    assert graph.check() == 0, "a body ran twice"
    case.seen = f"{place}: {len(graph.ids)} tasks, 0 bodies twice"


@fault("F30 hub told to stop in the middle of work")
@pytest.mark.hub(**FAST)
def test_f30_a_hub_that_is_told_to_stop_says_farewell_and_finishes_what_it_has_begun(
    shop, start_agent, case
):
    start_agent(shop, "one", ready=lambda agent: through(agent, shop))
    bearer = {"Authorization": f"Bearer {shop.login()}"}
    unsure = set()
    for n in range(max(2, N // 5)):
        over = threading.Event()
        with ThreadPoolExecutor(6) as pool:
            watcher = connect(
                f"ws{shop.url.removeprefix('http')}/ws/dashboard",
                additional_headers=bearer,
                compression=None,
            )
            told = pool.submit(_farewell, watcher)
            makers = [pool.submit(_make_until, shop, over, f"{n}-{k}-") for k in range(4)]
            big = pool.submit(_make_pipeline, shop, f"big{n}")
            time.sleep(case.random.uniform(0.1, 0.5))
            assert shop.stop() == 0
            over.set()
            assert told.result() == (1012, "the hub restarts")
            unsure |= {title for maker in makers if (title := maker.result())}
            big.result()
        shop.start()
        case.kills += 1
    titles = Counter(task["title"] for task in _all_tasks(shop))
    assert all(count == 1 for title, count in titles.items() if not title.startswith("part"))
    assert titles["part"] % 500 == 0, "half of a pipeline"
    case.check(shop)
    made = sum(titles.values())
    case.seen = f"{made} tasks, each once; {len(unsure)} calls without an answer; code 1012"


def _farewell(watcher) -> tuple[int, str]:
    with watcher, contextlib.suppress(ConnectionClosed):
        while True:
            watcher.recv(20)
    return watcher.close_code, watcher.close_reason


def _make_until(hub, over: threading.Event, name: str) -> str | None:
    """Make tasks until the hub is away; the title of the one that was not answered, if any."""
    for n in range(10_000):
        title = f"{name}{n}"
        if over.is_set():
            break
        try:
            hub.ask("POST", "tasks", {"title": title}, headers={"Connection": "close"})
        except requests.RequestException:
            return title
    return None


def _make_pipeline(hub, name: str) -> None:
    """In one transaction; whether it is answered or not."""
    items = [{"id": str(n), "title": "part"} for n in range(500)]
    with contextlib.suppress(requests.RequestException):
        hub.ask("POST", "pipelines", {"name": name, "tasks": items})


def _all_tasks(hub) -> list[dict]:
    with reading(hub) as db:
        return [dict(row) for row in db.execute("SELECT title FROM task")]


@fault("F6 agent and tmux killed")
@pytest.mark.hub(**FAST)
def test_f6_after_a_reboot_each_task_is_tried_again_or_asks_never_both(shop, two, case, tmp_path):
    for _ in range(max(2, N // 5)):
        ids = {
            policy: worker(shop, "sleep", "1000", on_lost=policy, title=policy)
            for policy in ("retry", "ask")
        }
        on = {
            policy: running(shop, task_id)["assigned_server_name"]
            for policy, task_id in ids.items()
        }
        for agent in two:
            agent.kill()
            agent.tmux("kill-server")
        case.kills += 2
        for agent in two:
            agent.start()
        retried = ids["retry"]
        again = wait_until(lambda r=retried: (t := row(shop, r))["attempt"] == 2 and t, 20)
        asked = row(shop, ids["ask"])
        assert (asked["status"], asked["attempt"], asked["assigned_server_name"]) == (
            "running",
            1,
            on["ask"],
        )
        alerts = wait_until(lambda: shop.api("GET", "alerts?status=open")["alerts"], 20)
        assert [a["task_id"] for a in alerts if a["kind"] == "lost"] == [ids["ask"]]
        assert again["id"] not in {a["task_id"] for a in alerts}
        shop.api("POST", f"tasks/{ids['ask']}/retry")
        assert row(shop, ids["ask"])["attempt"] == 2
        for task_id in ids.values():
            shop.api("DELETE", f"tasks/{task_id}")
        wait_until(lambda: not shop.api("GET", "alerts?status=open")["alerts"], 10)
    case.check(shop)
    case.seen = "retried at once, or asked"


# ── the network ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def behind(shop, start_agent, start_proxy):
    """An agent behind a proxy: (agent, proxy)."""

    def start(name: str, carrier: str = ""):
        proxy = start_proxy(shop)

        def behind_it(agent):
            through(agent, shop, proxy, carrier)

        return start_agent(shop, name, ready=behind_it, slots=4), proxy

    return start


def session_status(hub, task: dict) -> str:
    return hub.api("GET", f"sessions/{task['session_id']}")["status"]


@pytest.mark.parametrize("carrier", ["socket", "poll"])
@fault("F7 short partition")
@pytest.mark.hub(**FAST)
def test_f7_a_short_partition_changes_nothing_of_a_task(shop, behind, case, carrier):
    _, proxy = behind("one", carrier)
    task = running(shop, worker(shop, "sleep", "1000"))
    before = types(shop, task["id"])
    for _ in range(max(2, N // 5)):
        proxy.partition()
        time.sleep(case.random.uniform(0.1, 1.0))
        proxy.heal()
        wait_until(lambda: session_status(shop, task) == "active", 20)
        case.kills += 1
    said = [t for t in types(shop, task["id"]) if t.startswith("task_")]
    assert said == [t for t in before if t.startswith("task_")]
    assert row(shop, task["id"])["attempt"] == 1
    case.check(shop)
    case.seen = f"{carrier}: attempt 1 all the time"


class Apart:
    """A network of its own, joined to this one by a wire. Cut, it swallows what either side sends:
    nothing is refused or reset, and the kernels on both sides send it again and again."""

    def __init__(self):
        self.name = f"orc-{os.getpid()}"
        self.near, self.far = (f"10.213.{os.getpid() % 250}.{n}" for n in (1, 2))
        self._wires = (f"a{os.getpid()}", f"b{os.getpid()}")
        a, b = self._wires
        self._ip("netns", "add", self.name)
        self._ip("link", "add", a, "type", "veth", "peer", "name", b, "netns", self.name)
        for wire, address, there in ((a, self.near, ()), (b, self.far, ("-n", self.name))):
            self._ip(*there, "address", "add", f"{address}/30", "dev", wire)
            self._ip(*there, "link", "set", wire, "up")

    @staticmethod
    def _ip(*argv: str) -> None:
        subprocess.run(["ip", *argv], check=True, capture_output=True)

    def _neighbours(self, what: str, *more: str) -> None:
        a, b = self._wires
        self._ip("neighbour", what, self.far, "dev", a, *more)
        self._ip("-n", self.name, "neighbour", what, self.near, "dev", b, *more)

    def cut(self) -> None:
        self._neighbours("replace", "lladdr", "02:00:00:00:00:01", "nud", "permanent")

    def heal(self) -> None:
        self._neighbours("delete")

    def close(self) -> None:
        self._ip("netns", "delete", self.name)  # and the wire with it


@pytest.fixture
def apart():
    if not LONG:
        pytest.skip("a network is made by `make faults` alone, as root")
    try:
        made = Apart()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network may be made here: {error}")
    yield made
    made.close()


@fault("F7 partition of a real network")
def test_f7_a_network_that_swallows_everything_changes_nothing_of_a_task(
    apart, start_hub, start_agent, tmp_path, case
):
    hub = start_hub(host=apart.near, **FAST)
    hub.api("POST", "projects", {"name": "shop"})

    def apart_from_it(agent):
        through(agent, hub)
        agent.argv = ["ip", "netns", "exec", apart.name, *agent.argv]

    agent = start_agent(hub, "one", ready=apart_from_it, slots=4)
    go = tmp_path / "go"
    counting = f"n=0; while [ ! -e {go} ]; do echo line $n; n=$((n+1)); sleep 0.01; done"
    task = running(hub, worker(hub, "sh", "-c", counting))
    for _ in range(max(1, N // 10)):
        apart.cut()
        if case.kills % 4 == 0:
            wait_until(lambda: not agent.is_online(), 20)
        else:
            time.sleep(case.random.uniform(0.1, 2.0))
        apart.heal()
        case.kills += 1
        wait_until(lambda: session_status(hub, task) == "active" and agent.is_online(), 60)
    go.touch()
    assert until_status(hub, task["id"], "done")["attempt"] == 1
    wait_until(lambda: session_status(hub, task) == "closed")
    lines = whole_log(hub, task["session_id"]).decode().split()[1::2]
    assert lines == [str(n) for n in range(len(lines))] and lines
    case.check(hub)
    case.seen = f"attempt 1 all the time, {len(lines)} lines each once"


@fault("F7, F11 long partition and a zombie's reports")
@pytest.mark.hub(**FAST | {"lost_after_s": 1})
def test_f7_f11_after_a_long_partition_the_work_is_elsewhere_and_the_zombie_changes_nothing(
    shop, behind, start_agent, case, tmp_path
):
    agent, proxy = behind("one")
    go, ran = tmp_path / "go", tmp_path / "ran"
    script = f"echo x >> {ran}; while [ ! -e {go} ]; do sleep 0.05; done"
    for _ in range(max(1, N // 10)):
        ran.write_text("")
        task = running(shop, worker(shop, "sh", "-c", script))
        proxy.partition()
        case.kills += 1
        other = start_agent(shop, f"two-{case.kills}")
        wait_until(lambda t=task: row(shop, t["id"])["attempt"] == 2, 30)
        assert "session_disconnected" in types(shop, task["id"])
        go.touch()  # both go on now; the first is cut off
        done = until_status(shop, task["id"], "done")
        assert (done["attempt"], done["assigned_server_name"]) == (2, other.name)
        proxy.heal()
        wait_until(lambda t=task: "late_report" in types(shop, t["id"]), 30)
        wait_until(lambda t=task: session_status(shop, t) == "closed", 20)
        final = row(shop, task["id"])
        assert (final["status"], final["attempt"]) == ("done", 2)
        assert types(shop, task["id"]).count("task_completed") == 1
        assert ran.read_text().split() == ["x", "x"]
        go.unlink()
        other.stop()
    case.check(shop)
    case.seen = "late report kept, attempt 2 stands"


@fault("F8 the answer to a completion is lost")
@pytest.mark.hub(**BY_HAND)
def test_f8_a_completion_whose_answer_is_lost_is_told_again_and_counts_once(
    shop, key, start_proxy, case
):
    proxy = start_proxy(shop)
    for n in range(N):
        task_id = by_hand(shop)
        after = shop.api("POST", "tasks", {"title": "a", "dependency_ids": [task_id]})["id"]
        shop.api("POST", f"tasks/{task_id}/start", {}, key=key)
        proxy.lose_answer = b"/complete"
        url, body = f"{proxy.url}/api/v1/tasks/{task_id}/complete", {"result": {"n": n}}
        headers = {"X-API-Key": key}
        with pytest.raises(requests.ConnectionError):
            requests.post(url, json=body, headers=headers, timeout=10)
        again = requests.post(url, json=body, headers=headers, timeout=10)
        assert (again.status_code, again.json()["status"]) == (200, "done")
        said = types(shop, task_id)
        assert said.count("task_completed") == 1 and "late_report" not in said
        assert types(shop, after).count("task_unblocked") == 1
        case.kills += 1
    assert proxy.cuts == N
    case.check(shop)
    case.seen = "each told twice, counted once"


@fault("F8 requests that arrive twice")
@pytest.mark.hub(**FAST)
def test_f8_calls_of_an_agent_that_arrive_twice_have_one_effect(shop, behind, tmp_path, case):
    _, proxy = behind("one", "poll")
    proxy.twice = b"/server/poll"
    graph = Graph(shop, tmp_path)
    graph.make(layers=3 + N // 10, width=3, dice=case.random)
    graph.wait()
    case.check(shop)
    assert graph.check() == 0
    assert proxy.repeated > 10
    case.kills, case.seen = proxy.repeated, "0 bodies twice"


@pytest.mark.parametrize("carrier", ["socket", "poll"])
@fault("F9 one-way partition")
@pytest.mark.hub(**FAST)
def test_f9_an_agent_that_is_not_heard_is_offline_and_its_commands_wait(
    shop, behind, case, carrier
):
    agent, proxy = behind("one", carrier)
    proxy.hold_up = True  # what the hub says still arrives
    wait_until(lambda: not agent.is_online(), 20)
    task_id = worker(shop, "true")
    assert row(shop, task_id)["status"] == "pending"
    refused = shop.ask("POST", "sessions", {"server_id": "one", "name": "s"})
    assert refused.status_code in (201, 409)
    if refused.ok:
        assert refused.json()["status"] == "starting"
        typed = shop.ask("POST", f"sessions/{refused.json()['id']}/input", {"text": "x"})
        assert typed.status_code == 409 and "nothing was typed" in typed.json()["detail"]
    proxy.heal()
    case.kills += 1
    assert until_status(shop, task_id, "done")["attempt"] == 1
    case.check(shop)
    case.seen = f"{carrier}: offline, nothing delivered, then done"


@fault("delays of up to 0.3 s on each piece")
@pytest.mark.hub(**FAST)
def test_a_slow_network_only_takes_longer(shop, behind, tmp_path, case):
    _, proxy = behind("one")
    proxy.delay_s = 0.15
    graph = Graph(shop, tmp_path)
    graph.make(layers=3, width=2, dice=case.random)
    graph.wait()
    case.check(shop)
    assert graph.check() == 0
    case.seen = "6 tasks, 0 bodies twice"


# ── reports ───────────────────────────────────────────────────────────────────────────────────


@fault("F10 fifty equal completions at once")
@pytest.mark.hub(**BY_HAND)
def test_f10_fifty_equal_completions_at_once_are_one(shop, key, case):
    for _ in range(max(1, N // 10)):
        task_id = by_hand(shop)
        after = shop.api(
            "POST", "tasks", {"title": "a", "dependency_ids": [task_id], "auto_assign": True}
        )["id"]

        def post(_, task_id=task_id):
            url = f"{shop.url}/api/v1/tasks/{task_id}/complete"
            headers = {"X-API-Key": key}
            body = {"result": {"same": True}, "attempt": 1}
            return requests.post(url, json=body, headers=headers, timeout=30).status_code

        with ThreadPoolExecutor(50) as pool:
            codes = list(pool.map(post, range(50)))
        assert set(codes) == {200}
        assert types(shop, task_id).count("task_completed") == 1
        assert types(shop, after).count("task_auto_assigned") == 1
        case.kills += 50
    case.check(shop)
    case.seen = "one transition each"


@fault("F12 done and failed at once")
@pytest.mark.hub(**BY_HAND)
def test_f12_of_two_ends_at_once_the_first_stands_and_the_other_is_kept(shop, key, case):
    ends = {"complete": {"result": 1}, "fail": {"error": "no"}}
    won = []
    for _ in range(N):
        task_id = by_hand(shop)
        gate = threading.Barrier(2)

        def post(end, task_id=task_id, gate=gate):
            gate.wait()
            url = f"{shop.url}/api/v1/tasks/{task_id}/{end}"
            headers = {"X-API-Key": key}
            return requests.post(url, json=ends[end] | {"attempt": 1}, headers=headers, timeout=30)

        with ThreadPoolExecutor(2) as pool:
            answers = dict(zip(ends, pool.map(post, ends), strict=True))
        assert sorted(a.status_code for a in answers.values()) == [200, 409]
        said = types(shop, task_id)
        assert said.count("task_completed") + said.count("task_failed") == 1
        assert said.count("late_report") == 1
        won += [end for end, answer in answers.items() if answer.ok]
        case.kills += 1
    case.check(shop)
    case.seen = f"complete won {won.count('complete')}, fail {won.count('fail')}"


# ── typing ────────────────────────────────────────────────────────────────────────────────────


@fault("F14 agent killed while a text is typed")
@pytest.mark.hub(**FAST)
def test_f14_a_text_is_submitted_whole_and_once_or_not_at_all(shop, two, tmp_path, case):
    agent, tries = two[0], []
    with ThreadPoolExecutor(N) as pool:
        for n in range(N):
            file = tmp_path / f"typed{n}"
            session = plain_session(shop, agent, "python3", "-c", READER, str(file))
            wait_until(file.exists)
            size = case.random.choice((1, 200, 20_000, 900_000))
            text = "".join(f"{line:06d}\n" for line in range(size // 7 + 1))[:size].strip()
            said = pool.submit(typed, shop, session, text)
            time.sleep(case.random.uniform(0, 0.3))
            kill_agent(agent)
            tries.append((file, text.encode(), said))
            case.kills += 1
            wait_until(lambda s=session: session_status(shop, {"session_id": s["id"]}) == "active")
    seen = Counter()
    for file, text, said in tries:
        found = read_by(file)
        submitted = found.endswith(b"\r")
        assert text.startswith(found.removesuffix(b"\r")), "something else, or twice"
        assert not submitted or found == text + b"\r", "half of it was submitted"
        assert submitted or said.result().status_code == 409, "said to be typed, and is not"
        seen["submitted" if submitted else "not submitted"] += 1
    case.seen = ", ".join(f"{n} {what}" for what, n in sorted(seen.items()))


# ── clocks and pauses ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", [7200, -7200])
@fault("F15 an agent's clock is off")
@pytest.mark.hub(**FAST)
def test_f15_a_server_whose_clock_is_off_works_like_any_other(
    shop, start_agent, cli, tmp_path, case, by
):

    def off(agent):
        through(agent, shop)
        agent.argv[1:1] = ["-c", OTHER_TIME, str(by)]

    agent = start_agent(shop, "dev", ready=off)
    hour = time.time()
    graph = Graph(shop, tmp_path)
    graph.make(layers=3, width=2, timeout=60, start_timeout=30)
    task = running(shop, worker(shop, "sleep", "1000", timeout=600))
    kill_agent(agent)
    graph.wait()
    assert agent.is_online() and row(shop, task["id"])["attempt"] == 1
    said = {e["type"] for e in shop.api("GET", "events?limit=1000")["events"]}
    assert not said & {"clock_set", "session_lost", "task_failed", "task_released"}
    assert shop.api("GET", "alerts?status=open")["alerts"] == []
    with reading(shop) as db:  # what is shown of sessions is by the hub's clock
        for began, activity, progress in db.execute(
            "SELECT state_at, activity_at, progress_at FROM session"
        ):
            for at in (began, activity, progress):
                assert at is None or hour - 60 < at < time.time() + 60
    case.check(shop)
    case.kills, case.seen = 1, f"{by:+} s: {graph.check()} bodies twice, nothing timed out"


# `python -c OTHER_TIME SECONDS agent.py …`: the agent, with a wall clock that is as far off.
OTHER_TIME = """
import runpy, sys, time
real, by = time.time, float(sys.argv[1])
time.time = lambda: real() + by
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("by", [3600, -3600])
@fault("F15 the hub's wall clock jumps")
def test_f15_a_clock_that_jumps_loses_nobody(start_hub, start_agent, tmp_path, case, by):
    hub = start_hub(script=DYING, **FAST)
    hub.api("POST", "projects", {"name": "shop"})
    agent = start_agent(hub, "one")
    task = running(hub, worker(hub, "sleep", "1000", timeout=600))
    waiting = worker(hub, "true", requirements={"repo": "nowhere"}, queue_timeout=600)
    (hub.data / "CLOCK").write_text(str(by))
    graph = Graph(hub, tmp_path)
    graph.make(layers=2, width=2)
    graph.wait()
    time.sleep(FAST["tick_s"] * 5)
    events = hub.api("GET", "events?limit=1000")["events"]
    said = {e["type"] for e in events}
    assert "clock_set" in said
    assert not said & {"server_offline", "session_lost", "task_failed", "task_released"}
    assert agent.is_online() and row(hub, task["id"])["attempt"] == 1
    assert hub.api("GET", "alerts?status=open")["alerts"] == []
    assert row(hub, waiting)["status"] == "pending"
    case.check(hub)
    case.kills, case.seen = 1, f"{by:+} s: nobody lost, nothing timed out"


@fault("F16 hub stopped and continued")
@pytest.mark.hub(**FAST | {"lost_after_s": 1})
def test_f16_a_hub_that_was_stopped_blames_nobody(shop, two, graph, case):
    task = running(shop, worker(shop, "sleep", "1000", start_timeout=2))
    for _ in range(max(1, N // 100)):
        graph.make(layers=2, width=2, start_timeout=2)
        stop_for(shop.process.pid, 120 if LONG else 4.5)
        case.kills += 1
        healthy(shop)
        graph.wait()
    said = {e["type"] for e in shop.api("GET", "events?limit=1000")["events"]}
    assert not said & {"server_offline", "session_lost", "task_failed", "task_released"}
    assert row(shop, task["id"])["attempt"] == 1
    case.check(shop)
    assert graph.check() == 0
    case.seen = "no mass loss"


@fault("F16 agents stopped and continued")
@pytest.mark.hub(**FAST)
def test_f16_agents_that_were_stopped_go_on(shop, two, graph, case):
    graph.make(layers=3, width=4, dice=case.random)
    for agent in two * max(1, N // 10):
        stop_for(agent.process.pid, 1.5)
        case.kills += 1
    graph.wait()
    case.check(shop)
    case.seen = f"{graph.check()} bodies twice"


# ── disks and locks ───────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def full_disk(pid: int, folder: Path):
    """Nothing that the process writes may make a file longer than its longest is."""
    longest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (min(longest, 4096), -1))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_mount(_pid: int, folder: Path):
    """Nothing is left on the disk of the folder."""
    filler = folder / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))
            file.flush()
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB of its own, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "faults", str(folder)]
    if not LONG or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk is mounted by `make faults` alone, as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("F17 the hub's disk is full (a mounted one)")
def test_f17_a_disk_that_is_full_to_the_last_byte(
    small_disk, start_hub, start_agent, tmp_path, case
):
    hub = start_hub(data=small_disk / "hub", **FAST)
    hub.api("POST", "projects", {"name": "shop"})
    agents = [start_agent(hub, name, slots=4) for name in ("one", "two")]
    _without_room(hub, agents, Graph(hub, tmp_path), case, full_mount)


@fault("F17 the hub cannot write")
@pytest.mark.hub(**FAST)
def test_f17_a_hub_whose_disk_is_full_refuses_and_goes_on_when_there_is_room(
    shop, two, graph, case
):
    _without_room(shop, two, graph, case, full_disk)


def _without_room(shop, _agents, graph, case, disk) -> None:
    graph.make(layers=3, width=4, work_s=0.2)
    taken = list(graph.ids)
    printing = "n=0; while [ $n -lt 100 ]; do echo line $n; n=$((n+1)); sleep 0.03; done"
    printer = running(shop, worker(shop, "sh", "-c", printing))
    for _ in range(max(1, N // 10)):
        with disk(shop.process.pid, shop.data):
            refused = 0
            until = time.monotonic() + 2
            while time.monotonic() < until:
                answer = shop.ask("POST", "tasks", {"title": "t"})
                if answer.ok:
                    taken.append(answer.json()["id"])
                else:
                    assert answer.status_code in (503, 507), answer.text
                    assert "disk" in answer.json()["detail"]
                    refused += 1
                assert shop.ask("GET", "tasks").ok
            assert refused
            healthy(shop)
        case.kills += 1
    graph.wait()
    healthy(shop)
    assert shop.api("POST", "tasks", {"title": "again"})
    for task_id in taken:
        assert row(shop, task_id)["id"] == task_id
    until_status(shop, printer["id"], "done")
    expected = "".join(f"line {n}\r\n" for n in range(100)).encode()
    path = f"sessions/{printer['session_id']}/output"
    wait_until(lambda: shop.ask("GET", path).content == expected, 20)
    case.check(shop)
    case.seen = f"refused {refused} times in the last 2 s, all accepted kept"


@fault("F18 an agent cannot write")
@pytest.mark.hub(**FAST)
def test_f18_an_agent_whose_disk_is_full_finishes_nothing_it_cannot_say(shop, two, tmp_path, case):
    agent = two[0]
    two[1].stop()
    wait_until(lambda: not two[1].is_online(), 20)
    graph = Graph(shop, tmp_path)
    with full_disk(agent.process.pid, agent.folder):
        graph.make(layers=2, width=2)
        [alert] = wait_until(lambda: shop.api("GET", "alerts?status=open")["alerts"], 20)
        assert alert["kind"] == "server"
        assert alert["sentence"].startswith("Server one: its agent cannot write to ")
        healthy(shop)
        with reading(shop) as db:
            done = db.execute("SELECT COUNT(*) FROM task WHERE status = 'done'").fetchone()[0]
        ran = len(graph.bodies())
        assert done <= ran
    case.kills += 1
    graph.wait()
    wait_until(lambda: not shop.api("GET", "alerts?status=open")["alerts"], 20)
    case.check(shop)
    case.seen = f"{graph.check()} bodies twice"


@fault("F18 sessions go on while their agent cannot write")
@pytest.mark.hub(**FAST)
@pytest.mark.parametrize("restarted", [False, True], ids=["goes on", "killed"])
def test_f18_what_sessions_did_while_the_disk_was_full_is_told_afterwards(
    shop, two, tmp_path, case, restarted
):
    agent, go = two[0], tmp_path / "go"
    two[1].stop()
    wait_until(lambda: not two[1].is_online(), 20)
    lines = "".join(f"{n}\r\n" for n in range(1, 2001))
    script = f"while [ ! -e {go} ]; do sleep 0.02; done; seq 1 2000; exit "
    good = running(shop, worker(shop, "sh", "-c", script + "0"))
    bad = running(shop, worker(shop, "sh", "-c", script + "4", max_retries=0))
    typist = plain_session(shop, agent, "sh", "-c", "read line; echo got $line; exit 3")
    with full_disk(agent.process.pid, agent.folder):
        go.touch()
        assert typed(shop, typist, "these words").ok
        wait_until(lambda: agent.tmux("list-panes", "-aF", "#{pane_dead}").split() == ["1"] * 3)
        looks = refused_looks(agent)
        wait_until(lambda: refused_looks(agent) >= looks + 3)  # the first may be for other things
        assert row(shop, good["id"])["status"] == row(shop, bad["id"])["status"] == "running"
        if restarted:
            agent.kill()
    case.kills += 1
    if restarted:
        agent.start()
    assert until_status(shop, good["id"], "done")["attempt"] == 1
    assert until_status(shop, bad["id"], "failed")["result"]["error"].startswith("exit code 4")
    path = f"sessions/{typist['id']}"
    closed = wait_until(lambda: (s := shop.api("GET", path))["status"] == "closed" and s, 20)
    assert closed["exit_code"] == 3
    for task in (good, bad):
        output = whole_log(shop, task["session_id"])
        case.count("bytes", len(lines), abs(len(lines) - len(output)))
        assert output.decode() == lines
    assert whole_log(shop, typist["id"]) == b"these words\r\ngot these words\r\n"
    case.check(shop)
    case.seen = "ends, reports and output told when there was room"


def refused_looks(agent) -> int:
    """How many looks at its sessions the agent could not finish."""
    return (agent.folder / "out.log").read_text().count("watch: the state cannot be written")


@fault("F19 the database is held by another writer")
@pytest.mark.hub(**FAST | {"lock_patience_s": 0.3})
def test_f19_a_database_held_by_another_is_refused_in_words_and_reads_go_on(shop, two, graph, case):
    graph.make(layers=3, width=4)
    other = sqlite3.connect(shop.data / "hub.db", timeout=10, isolation_level=None)
    for _ in range(max(1, N // 100)):
        other.execute("BEGIN IMMEDIATE")
        held = time.monotonic()
        before = resources(shop.process.pid)
        codes = set()
        with ThreadPoolExecutor(8) as pool:
            while time.monotonic() - held < (30 if LONG else 2):
                tried = pool.map(lambda _: shop.ask("POST", "tasks", {"title": "t"}), range(8))
                codes |= {answer.status_code for answer in tried}
                began = time.monotonic()
                assert shop.ask("GET", "tasks?limit=5").ok
                assert time.monotonic() - began < 2
        assert codes == {503}
        assert resources(shop.process.pid)["threads"] <= before["threads"] + 5
        other.execute("COMMIT")
        case.kills += 1
        healthy(shop)
    other.close()
    graph.wait()
    case.check(shop)
    case.seen = "503 meanwhile, reads went on"


# ── load ──────────────────────────────────────────────────────────────────────────────────────


STORM_S = 3 * N if LONG else 2  # ten minutes in the long run
STORM_PACE = 100  # completions a second, of all workers together
WORKERS = 20


@fault("F29 a storm of completions, each of which frees the next task")
@pytest.mark.hub(**BY_HAND)
def test_f29_in_a_storm_each_task_is_handed_on_and_the_log_stays_small(shop, key, case):
    chains = [_chain(shop, f"c{n}", STORM_S * STORM_PACE // WORKERS) for n in range(WORKERS)]
    began, over = time.monotonic(), threading.Event()
    watching = WriteAheadLog(shop, over)
    with ThreadPoolExecutor(len(chains)) as pool:
        took = sorted(
            t for part in pool.map(lambda ids: _storm(shop, key, ids), chains) for t in part
        )
    seconds = time.monotonic() - began
    over.set()
    watching.join(10)
    assert watching.most < 8000 * 4096 * 2, "the write-ahead log is not copied home"
    healthy(shop, 1)
    with reading(shop) as db:
        sql = "SELECT COUNT(*) FROM task WHERE status = 'done'"
        done = db.execute(sql).fetchone()[0]
    assert done == len(took) == len(shop.accepted)
    case.check(shop)
    p50, p99 = (1000 * took[int(len(took) * part)] for part in (0.5, 0.99))
    pace = f"{len(took) / seconds:.0f} a second for {seconds:.0f} s"
    log = f"log at most {watching.most / 1e6:.0f} MB"
    case.seen = f"{pace}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, {log}"


def _chain(hub, name: str, length: int) -> list[str]:
    items = [
        {"id": str(n), "title": f"{name}-{n}", "auto_assign": True}
        | ({"depends_on": [str(n - 1)]} if n else {})
        for n in range(length)
    ]
    made = hub.api("POST", "pipelines", {"name": name, "tasks": items})["id_map"]
    return [made[str(n)] for n in range(length)]


def _storm(hub, key: str, ids: list[str]) -> list[float]:
    """Complete one task after the other, as one of the workers; how long each call took, in s."""
    took, began = [], time.monotonic()
    with requests.Session() as http:
        for n, task_id in enumerate(ids):
            time.sleep(max(0.0, began + n * WORKERS / STORM_PACE - time.monotonic()))
            at = time.monotonic()
            url = f"{hub.url}/api/v1/tasks/{task_id}/complete"
            answer = http.post(url, json={"result": n}, headers={"X-API-Key": key}, timeout=30)
            assert answer.ok, answer.text
            took.append(time.monotonic() - at)
    return took


class WriteAheadLog(threading.Thread):
    """How large the database's log was at most, in bytes."""

    def __init__(self, hub, over: threading.Event):
        super().__init__(daemon=True)
        self.path, self.over, self.most = hub.data / "hub.db-wal", over, 0
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.05):
            self.most = max(self.most, self.path.stat().st_size)


@fault("F32 agents reconnect all at once")
@pytest.mark.hub(**FAST)
def test_f32_after_a_restart_everybody_is_back_soon(shop, two, case):
    """Real agents beside those of the benchmark: see benchmarks/sockets.py for a thousand."""
    for _ in range(max(1, N // 5)):
        kill_hub(shop)
        began = time.monotonic()
        wait_until(lambda: all(_connected(shop, agent) for agent in two), 30)
        case.kills += 1
        case.seen = f"back after {time.monotonic() - began:.1f} s"
    said = {e["type"] for e in shop.api("GET", "events?limit=1000")["events"]}
    assert "server_offline" not in said
    case.check(shop)


def _connected(hub, agent) -> bool:
    """A session can be opened and typed into."""
    made = hub.api("POST", "sessions", {"server_id": agent.name, "name": f"s{os.urandom(3).hex()}"})
    with contextlib.suppress(BaseException):
        wait_until(lambda: hub.api("GET", f"sessions/{made['id']}")["status"] == "active", 2)
        return True
    return False


# ── tmux, changed by hand ─────────────────────────────────────────────────────────────────────


def plain_session(hub, agent, *command: str) -> dict:
    """A session that is active."""
    body = {"server_id": agent.name, "name": f"s{os.urandom(3).hex()}", "command": list(command)}
    made = hub.api("POST", "sessions", body)
    path = f"sessions/{made['id']}"
    return wait_until(lambda: (s := hub.api("GET", path))["status"] == "active" and s, 20)


def typed(hub, session: dict, text: str) -> requests.Response:
    return hub.ask("POST", f"sessions/{session['id']}/input", {"text": text})


@fault("F35 panes split, killed and renamed, windows of 1x1, bytes of any sort")
@pytest.mark.hub(**FAST)
def test_f35_what_people_do_in_tmux_never_sends_words_to_another_pane(shop, two, tmp_path, case):
    agent = two[0]
    for n in range(max(2, N // 5)):
        own, other = tmp_path / f"own{n}", tmp_path / f"other{n}"
        session = plain_session(shop, agent, "sh", "-c", f"exec cat > {own}")
        name = session["tmux_name"]
        agent.tmux("split-window", "-t", name, f"exec cat > {other}")  # and it is the active one
        wait_until(lambda path=other: path.exists(), 10)
        answer = typed(shop, session, "for the first pane")
        if answer.ok:
            wait_until(lambda path=own: path.read_text() == "for the first pane\n", 10)
        else:
            assert answer.status_code == 409, answer.text
        assert other.read_text() == ""
        change = case.random.choice(("kill", "rename"))
        if change == "kill":
            agent.tmux("kill-pane", "-t", f"{name}.0")
        else:
            agent.tmux("rename-session", "-t", name, "mine")
        path = f"sessions/{session['id']}"
        wait_until(lambda p=path: shop.api("GET", p)["status"] in ("closed", "lost"), 10)
        assert typed(shop, session, "to nobody").status_code == 409
        assert other.read_text() == ""
        agent.tmux("kill-session", "-t", "mine" if change == "rename" else name)
        case.kills += 1
    case.seen = "gone within one look, no word in another pane"


@fault("F35 output of any bytes in a window of 1x1")
@pytest.mark.hub(**FAST)
def test_f35_bytes_of_any_sort_are_recorded_as_they_are_in_the_smallest_window(
    shop, two, tmp_path, case
):
    data, go = tmp_path / "data", tmp_path / "go"
    data.write_bytes(case.random.randbytes(200_000))
    script = f"stty raw -echo; while [ ! -e {go} ]; do sleep 0.05; done; cat {data}; exec sleep 99"
    session = plain_session(shop, two[0], "sh", "-c", script)
    two[0].tmux("resize-window", "-t", session["tmux_name"], "-x", "1", "-y", "1")
    go.touch()
    path = f"sessions/{session['id']}/output"
    wait_until(lambda: shop.api("GET", path.removesuffix("/output"))["log_end"] >= 200_000, 20)
    assert shop.ask("GET", path).content == data.read_bytes()
    case.kills, case.seen = 1, "200,000 random bytes: the same"
