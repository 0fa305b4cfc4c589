"""Protocol 2 over both carriers, spoken by an agent written here by hand."""

import base64
import contextlib
import json
import sqlite3
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import alerts
import auth
import leases
import models
import servers
import sessions
import sockets
import tasks
from auth import HUB
from conftest import Client, wait_until
from wire import greet, sync, take_spooled


class Agent:
    """Numbers its calls and its spool; keeps what the hub has said."""

    def __init__(self, post, spool_id: str | None = None):
        self.post = post  # (body) -> (status, json)
        self.instance = str(uuid.uuid4())
        self.spool_id = spool_id or str(uuid.uuid4())
        self.seq = 0
        self.spooled = 0
        self.commands: list[dict] = []

    def ask(self, frames=(), wait=0.0, seq=None):
        """One call: (status, body)."""
        if seq is None:
            self.seq += 1
            seq = self.seq
        return self.post(
            {"instance": self.instance, "seq": seq, "wait": wait, "frames": list(frames)}
        )

    def call(self, *frames, wait=0.0, seq=None) -> list[dict]:
        status, answer = self.ask(frames, wait, seq)
        assert status == 200, answer
        self.commands += [f for f in answer["frames"] if "id" in f]
        return answer["frames"]

    def connect(self, *named, **more) -> dict:
        """auth and sync; {type: frame} of the answer."""
        answer = self.call(*self.greeting(*named, **more))
        return {frame["type"]: frame for frame in answer}

    def greeting(self, *named, capabilities=None, etag=None, number=None, last=None) -> list[dict]:
        """The frames of auth and sync."""
        return [
            {
                "type": "auth",
                "protocol": 2,
                "agent_version": "test",
                "instance": self.instance,
                "spool_id": self.spool_id,
                "spool_first": 1,
                "spool_last": last,
                "features": [],
            },
            {
                "type": "sync",
                "instance": self.instance,
                "number": number,
                "sessions": list(named),
                "capabilities": capabilities or {},
                "profiles_etag": etag,
            },
        ]

    def spool(self, kind: str, number: int | None = None, **fields) -> dict:
        if number is None:
            self.spooled += 1
            number = self.spooled
        return {"type": kind, "spool": number} | fields

    def ack(self, *ids: int) -> dict:
        return {"type": "ack", "ids": list(ids or [c["id"] for c in self.commands])}

    def started(self, session_id: str, **more) -> dict:
        fields = {"tmux_name": f"orc-{session_id[:12]}", "pid": 4711, "working_directory": "/srv"}
        return self.spool("session_started", session_id=session_id, **fields, **more)

    def begin(self, command: dict) -> str:
        """Start the worker of a task_assigned; its session's id."""
        session_id = command["start"]["session_id"]
        self.call(
            self.ack(command["id"]),
            self.started(session_id),
            self.report(command, "started"),
        )
        return session_id

    def report(self, command: dict, outcome: str, **more) -> dict:
        return self.spool(
            "task_report",
            task_id=command["task"]["id"],
            attempt=command["attempt"],
            outcome=outcome,
            **more,
        )


class SocketAgent(Agent):
    """The same over `/ws/server`: a call is over when the hub has answered a ping behind it."""

    def __init__(self, url: str, key: str, spool_id: str | None = None):
        super().__init__(self._exchange, spool_id)
        self.url, self.key = url, key
        self.socket = None
        self.synced = False
        self.pings = 0

    def _exchange(self, body):
        try:
            return 200, {"frames": self._sent(body["frames"], body["wait"])}
        except ConnectionClosed as closed:
            return SOCKET_ENDS[closed.rcvd.code]

    def _sent(self, frames, wait) -> list[dict]:
        answers = []
        for frame in frames:
            if not self.socket and frame.get("type") != "auth":
                self._sent([{"type": "auth"}], 0)
            if frame.get("type") == "auth":
                self._open()
                frame = frame | {"api_key": self.key, "protocol": 2, "instance": self.instance}
            self.socket.send(json.dumps(frame))
            if frame.get("type") in ("auth", "sync"):
                answers.append(json.loads(self.socket.recv(10)))
            self.synced = self.synced or frame.get("type") == "sync"
        with contextlib.suppress(TimeoutError):
            if wait and not answers:
                answers.append(json.loads(self.socket.recv(wait)))
        return answers + (self._until_pong() if self.synced else [])

    def _until_pong(self) -> list[dict]:
        self.pings += 1
        self.socket.send(json.dumps({"type": "ping", "n": self.pings}))
        frames = []
        while True:
            frame = json.loads(self.socket.recv(10))
            if frame == {"type": "pong", "n": self.pings}:
                return frames
            frames.append(frame)

    def _open(self):
        self.close()
        self.synced = False
        self.socket = connect(f"{self.url}/ws/server", compression=None, legacy=True)

    def close(self):
        if self.socket:
            self.socket.close()


# What a poll would have been answered where a socket is closed.
SOCKET_ENDS = {
    1013: (409, {"code": "sync_required"}),
    4001: (409, {"code": "superseded"}),
    4400: (422, {"code": "invalid"}),
    4401: (401, {"code": "unauthorised"}),
}


def named(session_id: str, **more) -> dict:
    return {"session_id": session_id, "tmux_name": f"orc-{session_id[:12]}", "alive": True} | more


@pytest.fixture(params=["poll", "socket"])
def carrier(request):
    """What carries the frames: every test of this file holds for both, unless it says `on_poll`."""
    return request.param


on_poll = pytest.mark.parametrize("carrier", ["poll"], indirect=True)


@pytest.fixture
def wire(request, app, world, carrier):
    """`wire("dev")`: an agent of that server of `world`."""
    made = []

    def connect(name: str = "dev", **more) -> Agent:
        if name not in world.keys:
            world.server(name, online=False)
        if carrier == "socket":
            url = request.getfixturevalue("served")
            made.append(SocketAgent(url, world.keys[name], **more))
            return made[-1]
        client = Client(app).as_server(world.keys[name])

        def post(body):
            answer = client.post("server/poll", body)
            return answer.status_code, answer.json

        return Agent(post, **more)

    yield connect
    for agent in made:
        agent.close()


@pytest.fixture
def agent(wire):
    made = wire("dev")
    made.connect()
    return made


@pytest.fixture
def worker(world, agent):
    """A task that runs on the agent's server: (its task_assigned, its session's id)."""
    world.task("A", command=["make"], auto_assign=True)
    agent.call()
    [command] = agent.commands
    return command, agent.begin(command)


def state(session_id: str) -> str:
    return models.one("SELECT state FROM session WHERE id = ?", (session_id,))["state"]


def session_events(world, session_id: str) -> list[str]:
    return [e["type"] for e in world.events() if e["session_id"] == session_id]


# ── connecting ────────────────────────────────────────────────────────────────────────────────


@on_poll
def test_an_unknown_instance_is_asked_to_sync_and_nothing_of_its_call_is_handled(world, wire):
    agent = wire("dev")
    before = world.now()
    status, answer = agent.ask([agent.spool("session_gap", session_id="x")])
    assert (status, answer["code"]) == (409, "sync_required")
    assert world.server_row("dev")["spool_upto"] == 0
    assert [kind for kind, _ in world.said(before)] == ["server_online"]


def test_connecting_answers_who_the_hub_takes_the_agent_for(world, wire):
    agent = wire("dev")
    answer = agent.connect()
    welcome = answer["auth_ok"]
    assert welcome["protocol"] == 2
    assert (welcome["server_id"], welcome["server_name"]) == (world.servers["dev"], "dev")
    assert welcome["hub_epoch"] == models.epoch()
    assert (welcome["heartbeat_s"], welcome["lost_after_s"]) == (30.0, 900.0)
    assert welcome["time"].endswith("Z")
    assert answer["sync_ok"]["sessions"] == answer["sync_ok"]["adopt"] == []
    assert "command" in answer["sync_ok"]["profiles"]
    assert world.server_row("dev")["agent_version"] == "test"


def test_profiles_come_only_when_they_have_changed(wire):
    etag = wire("dev").connect()["sync_ok"]["profiles_etag"]
    assert "profiles" not in wire("dev").connect(etag=etag)["sync_ok"]


def test_the_capabilities_of_the_sync_count_at_once(world, wire):
    world.server("dev", online=False)
    world.task("A", target_repo="core", auto_assign=True)
    agent = wire("dev")
    agent.connect(
        capabilities={
            "repos": {"core": {"path": "/srv/core", "branch": "main"}},
            "languages": ["rust"],
            "slots": 7,
        }
    )
    shown = servers.server_json(world.server_row("dev"))
    assert shown["repos"] == {"core": {"path": "/srv/core", "branch": "main"}}
    assert (shown["languages"], shown["slots"]) == (["rust"], 7)
    assert world.on("A") == "dev"
    assert [c["type"] for c in agent.commands] == ["task_assigned"]


def test_the_newest_agent_wins_and_the_older_one_is_turned_away(agent, wire):
    newer = wire("dev")
    newer.connect()
    status, answer = agent.ask()
    assert (status, answer["code"]) == (409, "superseded")
    newer.call()


@on_poll
def test_an_older_agent_may_come_back_once_the_newer_one_is_silent(agent, wire):
    newer = wire("dev")
    newer.connect()
    sockets.notice_silence(0)
    status, answer = agent.ask()
    assert (status, answer["code"]) == (409, "sync_required")
    agent.connect()
    agent.call()


def test_a_poll_with_a_persons_token_is_refused(app, admin):
    answer = admin.post("server/poll", {"instance": "x", "seq": 1, "wait": 0, "frames": []})
    assert (answer.status_code, answer.json["code"]) == (403, "forbidden")


@on_poll
def test_a_waiting_call_that_is_repeated_gets_what_there_is_to_say(world, agent):
    """The connection of the first may have been cut: what it took would be lost to it."""
    link = sockets.links._links[world.servers["dev"]]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agent.call, wait=20.0, seq=50)
        wait_until(lambda: link._waiter)
        before = link._waiter
        second = pool.submit(agent.call, wait=20.0, seq=50)
        wait_until(lambda: link._waiter is not before)
        assert first.result(5) == []
        world.task("A", command=["true"], auto_assign=True)
        [sent] = second.result(5)
    assert sent["type"] == "task_assigned"
    assert agent.call(seq=50) == [sent]  # and so does a third


@on_poll
def test_a_waiting_call_that_is_repeated_while_the_first_is_answered_gets_the_same(world, agent):
    link = sockets.links._links[world.servers["dev"]]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(link.wait, 60, 20.0)
        wait_until(lambda: link._waiter)
        link.remember(60, [{"type": "pong"}])
        assert waiting.result(5) == [{"type": "pong"}]


# ── commands ──────────────────────────────────────────────────────────────────────────────────


def test_a_command_is_sent_until_it_is_acknowledged(world, agent, monkeypatch):
    world.task("A", command=["true"], auto_assign=True)
    [sent] = agent.call()
    assert sent["type"] == "task_assigned"
    assert agent.call() == []
    monkeypatch.setattr("wire.RESEND_S", 0.05)
    [again] = wait_until(lambda: sockets.links.remind() or agent.call())
    assert again == sent
    agent.call(agent.ack(sent["id"]))
    time_over = time.monotonic() + 0.2
    while time.monotonic() < time_over:
        assert agent.call() == []
    assert world.commands("dev") == []


def test_what_was_not_acknowledged_is_sent_again_to_a_new_connection(world, agent, wire):
    for name in "ABC":
        world.task(name, command=["true"], auto_assign=True)
    first = agent.call()
    agent.call(agent.ack(first[1]["id"]))
    fresh = wire("dev")
    fresh.connect()
    assert [c["id"] for c in fresh.commands] == [first[0]["id"], first[2]["id"]]


def test_a_server_cannot_acknowledge_anothers_commands(world, agent, wire):
    world.task("A", command=["true"], auto_assign=True)
    [sent] = agent.call()
    other = wire("other")
    other.connect()
    other.call(other.ack(sent["id"]))
    assert len(world.commands("dev")) == 1


def test_a_waiting_poll_is_woken_by_a_command(world, agent):
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(agent.call(wait=20)))
    began = time.monotonic()
    waiting.start()
    wait_until(lambda: sockets.links._links[world.servers["dev"]]._changed._waiters)
    world.task("A", command=["true"], auto_assign=True)
    waiting.join(15)
    assert [f["type"] for f in answers[0]] == ["task_assigned"]
    assert time.monotonic() - began < 5


@on_poll
def test_a_poll_waits_no_longer_than_it_is_told(agent):
    began = time.monotonic()
    assert agent.call(wait=0.2) == []
    assert 0.15 < time.monotonic() - began < 5


# ── calls that are repeated ───────────────────────────────────────────────────────────────────


@on_poll
def test_a_repeated_call_gets_the_same_answer_and_has_no_second_effect(world, agent, worker):
    _, session_id = worker
    frames = [
        agent.spool("session_gap", session_id=session_id, **{"from": 0}),
        log(session_id, 0, b"hello"),
    ]
    first = agent.call(*frames, seq=100)
    before = world.now()
    assert agent.call(*frames, seq=100) == first
    assert world.now() == before
    assert sessions.logs().flush()
    assert sessions.logs().end(session_id) == 5


@on_poll
def test_a_repeated_call_brings_the_commands_of_the_first_again(world, agent):
    world.task("A", command=["true"], auto_assign=True)
    first = agent.call(seq=50)
    assert first[0]["type"] == "task_assigned"
    assert agent.call(seq=50) == first
    assert agent.call(seq=51) == []


@on_poll
def test_a_repeated_sync_does_not_begin_again(agent, wire):
    fresh = wire("dev")
    frames = [{"type": "auth", "spool_id": "s"}, {"type": "sync", "instance": fresh.instance}]
    first = fresh.call(*frames, seq=1)
    link = sockets.links.polling(next(iter(sockets.links._links)), fresh.instance)
    assert fresh.call(*frames, seq=1) == first
    assert sockets.links.polling(link.server_id, fresh.instance) is link


@on_poll
def test_a_late_copy_of_a_sync_loses_nothing_that_was_begun_since(world, wire):
    """A proxy repeats it, or a network delivers it after a partition, when its answer is no longer
    remembered."""
    agent = wire("dev")
    first = agent.greeting()
    agent.call(*first)
    world.task("A", command=["make"], auto_assign=True)
    agent.call()
    session_id = agent.begin(agent.commands[0])
    for _ in range(sockets.ANSWERS_KEPT + 2):
        agent.call({"type": "heartbeat"})
    status, answer = agent.ask(first, seq=1)
    assert (status, answer["code"]) == (409, "sync_required")
    assert (state(session_id), world.row("A")["attempt"]) == ("active", 1)
    agent.call()


@on_poll
def test_a_late_copy_of_a_call_has_no_effect_however_long_ago_it_was(world, wire):
    agent = wire("dev")
    agent.connect()
    old = {"type": "capabilities", "capabilities": {"slots": 2}}
    agent.call(old)
    agent.call({"type": "capabilities", "capabilities": {"slots": 5}})
    waiting = agent.seq
    for _ in range(sockets.ANSWERS_KEPT + 2):
        agent.call({"type": "heartbeat"})
    assert agent.ask([old], seq=2)[0] == 409
    assert world.server_row("dev")["slots"] == 5
    agent.call(seq=waiting)  # one that waits is overtaken by those that carry: it is none the worse
    agent.call(seq=agent.seq + 1)
    assert agent.ask(seq=waiting - 1)[0] == 409  # by one that waits: nobody listens to this one


def test_a_late_sync_of_an_earlier_agent_supersedes_nobody_after_a_restart_of_the_hub(world, wire):
    earlier = wire("dev")
    earlier.connect(number=1)
    agent = wire("dev", spool_id=earlier.spool_id)
    agent.connect(number=2)
    world.task("A", command=["make"], auto_assign=True)
    agent.call()
    session_id = agent.begin(agent.commands[0])
    sockets.links.reset()
    late = wire("dev", spool_id=earlier.spool_id)
    late.instance = earlier.instance
    assert late.ask(late.greeting(number=1))[0] == 409
    assert late.ask(late.greeting(number=2))[0] == 409  # nor one of its own that took effect
    assert (state(session_id), world.row("A")["attempt"]) == ("active", 1)
    assert sockets.links.count() == 0
    agent.connect(named(session_id), number=3)
    assert world.server_row("dev")["synced"] == 3


@on_poll
def test_an_agent_that_counts_from_too_low_is_told_from_where_on(wire):
    """As with a state directory that was lost, or set back."""
    wire("dev").connect(number=7)
    agent = wire("dev")
    status, answer = agent.ask(agent.greeting(number=1))
    assert (status, answer["code"], answer["fields"]) == (409, "late_sync", {"synced": 7})
    assert agent.connect(number=8)["auth_ok"]["synced"] == 7
    assert agent.ask(wire("dev").greeting(number=2**60))[0] == 422


@pytest.mark.parametrize("by", [7200, -7200])
def test_what_an_agent_says_of_time_is_by_its_own_clock(world, agent, worker, by):
    _, session_id = worker
    now = time.time()
    agent.call({"type": "heartbeat", "system_info": {"time": now + by}})
    times = {"since": now + by - 60, "progress": now + by - 30}
    agent.call(
        agent.spool("session_activity", session_id=session_id, state="working", **times),
        log(session_id, 0, b"x") | {"at": models.iso(now + by - 60)},
    )
    row = models.one("SELECT * FROM session WHERE id = ?", (session_id,))
    assert row["activity_at"] == pytest.approx(now - 60, abs=4)
    assert row["progress_at"] == pytest.approx(now - 30, abs=4)
    assert sessions.logs().flush()
    [block] = sessions.logs().blocks(session_id, 0, 100)[0]
    assert block.at == pytest.approx(now - 60, abs=4)


# ── the spool ─────────────────────────────────────────────────────────────────────────────────


def gaps(world) -> list[int]:
    return [e["details"]["from"] for e in world.events(None, "session_log_gap")]


def gap(agent, session_id, number):
    return agent.spool("session_gap", number, session_id=session_id, **{"from": number})


def test_the_spool_is_taken_in_order_without_gaps_and_each_frame_once(world, wire):
    agent = wire("dev")
    agent.connect()
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    steps = [
        ([1, 2], 2, [1, 2]),
        ([4], 2, [1, 2]),  # 3 is missing: not taken
        ([2, 3], 3, [1, 2, 3]),  # 2 is there already
        ([3, 2, 1], 3, [1, 2, 3]),
        ([4, 6], 4, [1, 2, 3, 4]),
        ([5, 6, 7], 7, [1, 2, 3, 4, 5, 6, 7]),
    ]
    for numbers, upto, taken in steps:
        answer = agent.call(*[gap(agent, session["id"], n) for n in numbers])
        assert {"type": "spool_ack", "upto": upto} in answer, numbers
        assert gaps(world) == taken


def test_a_new_spool_begins_where_the_agent_says(world, wire):
    agent = wire("dev")
    agent.connect()
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    agent.call(gap(agent, session["id"], 1))
    other = wire("dev", spool_id="another state directory")
    other.call(
        {"type": "auth", "spool_id": other.spool_id, "spool_first": 10},
        {"type": "sync", "instance": other.instance},
    )
    answer = other.call(gap(other, session["id"], 10))
    assert {"type": "spool_ack", "upto": 10} in answer
    same = wire("dev", spool_id="another state directory")
    same.connect()
    assert {"type": "spool_ack", "upto": 10} in same.call(gap(same, session["id"], 10))
    assert gaps(world) == [1, 10]


def test_the_numbers_of_one_spool_never_count_for_another(world, agent):
    """A new agent has just said who it is, while the older one is still at work."""
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    greet(world.key("dev"), {"spool_id": "of another state directory"})
    status, answer = agent.ask([gap(agent, session["id"], 1)])
    assert (status, answer["code"]) == (409, "sync_required")
    assert gaps(world) == [] and world.server_row("dev")["spool_upto"] == 0
    agent.connect()
    assert {"type": "spool_ack", "upto": 1} in agent.call(gap(agent, session["id"], 1))
    assert gaps(world) == [1]


def test_on_a_socket_the_older_agent_goes_on_until_the_newer_has_synced(world, served):
    world.server("dev")
    older, newer = (SocketAgent(served, world.keys["dev"]) for _ in range(2))
    with contextlib.closing(older), contextlib.closing(newer):
        older.connect()
        session, _ = sessions.open_session(HUB, {"server_id": "dev"})
        newer.call(newer.greeting()[0])
        assert {"type": "spool_ack", "upto": 1} in older.call(gap(older, session["id"], 1))
        newer.call(newer.greeting()[1])
        report = newer.spool("session_gap", 1, session_id=session["id"], **{"from": 30})
        assert {"type": "spool_ack", "upto": 1} in newer.call(report)
        assert gaps(world) == [1, 30]


def test_what_an_agent_reports_while_its_socket_opens_counts(world):
    """By the poll, which goes on until the socket has greeted: what the socket's first frame says
    of the spool is older then."""
    world.server("dev")
    caller, session = world.key("dev"), sessions.open_session(HUB, {"server_id": "dev"})[0]
    hello = {"instance": "i", "spool_id": "s", "spool_first": 1, "spool_last": 0}
    greet(caller, hello)
    sync(caller, {"instance": "i", "sessions": []})
    reports = [
        {"type": "session_gap", "spool": n, "session_id": session["id"], "from": n}
        for n in range(1, 5)
    ]
    opening = hello | {"spool_last": 1}
    assert take_spooled(caller, reports[:3], "s") == 3
    greet(caller, opening)
    sync(caller, {"instance": "i", "sessions": []})
    assert take_spooled(caller, reports[3:], "s") == 4
    assert gaps(world) == [1, 2, 3, 4]


def test_a_state_directory_that_was_set_back_is_heard_all_the_same(world, agent, wire):
    """As with a machine's snapshot: it numbers other reports like those the hub has had."""
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    agent.call(*(gap(agent, session["id"], n) for n in (1, 2, 3)))
    again = wire("dev", spool_id=agent.spool_id)
    again.connect(last=1)
    report = again.spool("session_gap", 2, session_id=session["id"], **{"from": 20})
    assert {"type": "spool_ack", "upto": 2} in again.call(report)
    assert gaps(world) == [1, 2, 3, 20]


BAD = [
    {"type": "session_started"},
    {"type": "session_started", "session_id": "nowhere"},
    {"type": "session_started", "session_id": ["x"]},
    {"type": "session_started", "session_id": {"a": 1}},
    {"type": "task_report", "task_id": "nowhere", "attempt": 1, "outcome": "complete"},
    {"type": "task_report", "task_id": "nowhere", "attempt": 10**30, "outcome": "fail"},
    {"type": "task_report", "task_id": None, "attempt": "x", "outcome": "dance"},
    {"type": "session_activity", "session_id": 3, "state": {}},
    {"type": "no such thing"},
    {"type": None},
    {},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b)[:60])
def test_a_spooled_frame_that_cannot_be_used_never_stops_those_behind_it(world, agent, bad):
    session, _ = sessions.open_session(HUB, {"server_id": "dev"})
    answer = agent.call(bad | {"spool": 1}, gap(agent, session["id"], 2))
    assert {"type": "spool_ack", "upto": 2} in answer
    assert gaps(world) == [2]


@pytest.mark.parametrize(
    "bad",
    [
        *BAD,
        {"type": "ack", "ids": ["x"]},
        {"type": "ack", "ids": [10**30]},
        {"type": "ack", "ids": 3},
        {"type": "session_log", "session_id": "x", "offset": 0, "data": ""},
        {"type": "session_log", "offset": -1, "data": 3},
        {"type": "session_screen", "session_id": "x", "lines": 3},
        {"type": "session_typed"},
    ],
    ids=lambda b: str(b)[:60],
)
def test_a_passing_frame_that_cannot_be_used_is_passed_over(agent, bad):
    assert agent.call(bad) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "auth", "spool_first": "x"},
        {"type": "sync", "sessions": 3},
        {"type": "sync", "sessions": ["x"]},
        {"type": "sync", "capabilities": {"repos": 3}},
    ],
    ids=str,
)
def test_a_malformed_opening_is_the_agents_fault(wire, bad):
    status, answer = wire("dev").ask([bad, {"type": "sync"}])
    assert 400 <= status < 500, answer


@pytest.mark.parametrize("slots", [0, -1, "many", 10**9, [4], True])
def test_slots_that_are_none_are_not_believed(world, wire, slots):
    agent = wire("dev")
    agent.ask([{"type": "auth"}, {"type": "sync", "capabilities": {"slots": slots}}])
    stored = world.server_row("dev")["slots"]
    assert isinstance(stored, int) and 1 <= stored <= 10_000


# ── output ────────────────────────────────────────────────────────────────────────────────────


def log(session_id: str, offset: int, data: bytes) -> dict:
    coded = base64.b64encode(data).decode()
    at = "2026-11-22T17:30:00.123Z"
    return {
        "type": "session_log",
        "session_id": session_id,
        "offset": offset,
        "data": coded,
        "at": at,
    }


def test_log_blocks_are_cut_refused_and_acknowledged_by_offset(agent, worker, admin):
    _, session_id = worker
    text = bytes(range(256)) * 4
    for offset, upto, end in [
        (0, 100, 100),
        (50, 150, 150),  # begins before the end: cut
        (0, 120, 150),  # nothing new
        (200, 300, 150),  # begins after the end: refused
        (150, 1024, 1024),
        (1024, 1024, 1024),
    ]:
        assert acked(agent, log(session_id, offset, text[offset:upto])) == end
    whole = admin.get(f"sessions/{session_id}/output")
    assert whole.data == text
    assert whole.headers["X-Next-Offset"] == "1024"
    assert whole.mimetype == "application/octet-stream"
    for offset in (0, 1, 99, 100, 149, 1000, 1023):
        part = admin.get(f"sessions/{session_id}/output?offset={offset}")
        assert part.data == text[offset:]
    end = admin.get(f"sessions/{session_id}/output?offset=1024")
    assert (end.data, end.headers["X-Next-Offset"]) == (b"", "1024")


def test_a_long_log_is_read_piece_by_piece(agent, worker, admin):
    _, session_id = worker
    text = b"".join(b"%08d\n" % n for n in range(250_000))
    for offset in range(0, len(text), 64_000):
        agent.call(log(session_id, offset, text[offset : offset + 64_000]))
    assert sessions.logs().flush()
    read, offset = b"", 0
    while True:
        answer = admin.get(f"sessions/{session_id}/output?offset={offset}")
        assert len(answer.data) <= 1_100_000
        if not answer.data:
            break
        read += answer.data
        offset = int(answer.headers["X-Next-Offset"])
    assert read == text


def missing(agent, session_id, start, stop, **more) -> dict:
    return agent.spool("session_gap", session_id=session_id, **{"from": start, "to": stop}, **more)


def acked(agent, *frames) -> int:
    """The offset up to which the log is acknowledged after `frames`."""
    answers = agent.call(*frames)
    while not (offsets := [f["offset"] for f in answers if f["type"] == "log_ack"]):
        answers = agent.call(wait=10)
    return offsets[-1]


def test_a_log_goes_on_behind_a_gap_whatever_comes_first(world, agent, worker, admin):
    _, session_id = worker
    assert acked(agent, log(session_id, 0, b"0123")) == 4
    assert acked(agent, log(session_id, 8, b"89")) == 4  # the gap before it is not known yet
    assert acked(agent, missing(agent, session_id, 2, 8, why="limit")) == 8
    assert acked(agent, log(session_id, 8, b"89")) == 10
    before = world.now()
    agent.call(missing(agent, session_id, 2, 8, why="limit"))  # said again after a crash
    [mark] = admin.get(f"sessions/{session_id}/marks").json["marks"]
    assert (mark["kind"], mark["from"], mark["to"], mark["why"]) == ("gap", 4, 8, "limit")
    assert [e["type"] for e in world.events(after=before)] == ["session_log_gap"]


@pytest.mark.parametrize(
    "bad",
    [{"from": "x"}, {"to": 3}, {"from": 0, "to": []}, {"from": 9, "to": 3}, {"from": 10**30}],
    ids=str,
)
def test_a_gap_that_makes_no_sense_is_passed_over(world, agent, worker, bad):
    _, session_id = worker
    frame = agent.spool("session_gap", session_id=session_id, **bad)
    assert {"type": "spool_ack", "upto": agent.spooled} in agent.call(frame)
    assert sessions.logs().marks(session_id) == [] and gaps(world) == []


def test_a_gap_that_cannot_be_stored_is_not_taken(world, agent, worker, tmp_path):
    _, session_id = worker
    path = next(tmp_path.rglob("logs.db"))
    frame = missing(agent, session_id, 0, 8)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert {"type": "spool_ack", "upto": agent.spooled - 1} in agent.call(frame)
    other.execute("ROLLBACK")
    other.close()
    assert gaps(world) == []
    assert {"type": "spool_ack", "upto": agent.spooled} in agent.call(frame)
    assert gaps(world) == [0] and sessions.logs().end(session_id) == 8


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([[1, 0.5], [3, 0.50049]], [[1, 0.5], [3, 0.5]]),
        (None, []),
        ("soon", []),
        ([[0, 1]], []),
        ([[4, 1]], []),
        ([[1, 2], [2, 1]], []),
        ([[1, -1]], []),
        ([[1, 10**12]], []),
        ([["x"]], []),
    ],
    ids=str,
)
def test_the_times_of_a_block_are_kept_when_they_make_sense(agent, worker, times, kept):
    _, session_id = worker
    acked(agent, log(session_id, 0, b"0123") | {"times": times})
    [block], *_ = sessions.logs().blocks(session_id, 0, 10)
    assert block.times == kept


def test_a_block_that_is_too_large_is_not_taken(agent, worker):
    _, session_id = worker
    assert agent.call(log(session_id, 0, b"x" * (64 * 1024 + 1))) == []
    assert sessions.logs().end(session_id) == 0


def test_the_screen_shown_is_the_last_one_sent(agent, worker, admin):
    _, session_id = worker
    assert admin.get(f"sessions/{session_id}/screen").json == {"lines": [], "at": None}
    for lines in (["$ make"], ["$ make", "ok"]):
        agent.call(
            {
                "type": "session_screen",
                "session_id": session_id,
                "lines": lines,
                "at": "2026-11-22T17:30:00Z",
            }
        )
    shown = admin.get(f"sessions/{session_id}/screen").json
    assert shown == {"lines": ["$ make", "ok"], "at": "2026-11-22T17:30:00.000Z"}


# ── a worker's life ───────────────────────────────────────────────────────────────────────────


def test_a_command_worker_runs_from_assignment_to_its_end(world, agent, worker):
    command, session_id = worker
    assert (state(session_id), world.status("A")) == ("active", "running")
    before = world.now()
    agent.call(
        agent.report(command, "complete", result={"summary": "exit 0"}, session_id=session_id),
        agent.spool("session_closed", session_id=session_id, exit_code=0, log_end=0),
    )
    assert world.said(before) == [("task_completed", "A"), ("session_closed", "A")]
    assert state(session_id) == "closed"
    assert session_events(world, session_id)[-4:] == [
        "session_active",
        "task_started",
        "task_completed",
        "session_closed",
    ]
    world.check()


def test_a_session_that_ends_without_a_report_fails_its_attempt(world, agent, worker):
    _, session_id = worker
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=3, log_end=9))
    assert world.status("A") == "failed"
    assert "without a report (exit code 3)" in world.json("A")["result"]["error"]
    world.check()


def test_a_terminal_that_is_gone_has_its_task_tried_again(world, agent, worker):
    _, session_id = worker
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=None, log_end=9))
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    world.check()


def test_a_session_that_could_not_start_fails_its_attempt_with_the_reason(world, agent):
    world.task("A", command=["make"], auto_assign=True)
    [command] = agent.call()
    session_id = command["start"]["session_id"]
    agent.call(agent.spool("session_error", session_id=session_id, error="no directory /srv"))
    assert (state(session_id), world.status("A")) == ("failed", "failed")
    assert world.json("A")["result"] == {"error": "no directory /srv"}
    world.check()


def test_a_completion_that_must_be_refused_is_recorded_as_a_failed_attempt(world, agent):
    spec = {"expected_contracts": {"api": {}}}
    world.task("A", command=["make"], structured_spec=spec, auto_assign=True)
    [command] = agent.call()
    session_id = agent.begin(command)
    answer = agent.call(
        agent.report(command, "complete", result={"summary": "exit 0"}, session_id=session_id)
    )
    assert {"type": "spool_ack", "upto": agent.spooled} in answer
    assert world.status("A") == "failed"
    assert "api: missing" in world.json("A")["result"]["error"]
    world.check()


def test_what_the_worker_reported_itself_stands(world, agent, worker, client):
    command, session_id = worker
    own = client.as_key(auth.session_key(session_id))
    task_id = world.ids["A"]
    assert own.post(f"tasks/{task_id}/complete", {"result": {"summary": "mine"}}).status_code == 200
    before = world.now()
    agent.call(
        agent.report(command, "fail", error="exit code 1", session_id=session_id, implicit=True),
        agent.spool("session_closed", session_id=session_id, exit_code=1, log_end=0),
    )
    assert world.said(before) == [("session_closed", "A")]
    assert world.json("A")["result"] == {"summary": "mine"}


def test_a_report_of_another_servers_task_changes_nothing(world, agent, worker, wire):
    command, session_id = worker
    thief = wire("thief")
    thief.connect()
    before = world.now()
    answer = thief.call(
        thief.report(command, "complete", result="stolen"),
        thief.spool("session_closed", session_id=session_id, exit_code=0),
        log(session_id, 0, b"forged"),
        {"type": "session_screen", "session_id": session_id, "lines": ["forged"]},
    )
    assert {f["type"] for f in answer} == {"spool_ack"}
    assert answer[-1]["upto"] == 2
    assert (world.status("A"), state(session_id)) == ("running", "active")
    assert world.now() == before
    assert sessions.logs().end(session_id) == 0


def test_a_cancelled_task_is_called_off_at_its_worker(world, agent, worker):
    command, session_id = worker
    world.cancel("A")
    [called_off] = agent.call()
    assert called_off["type"] == "task_cancelled"
    assert (called_off["session_id"], called_off["attempt"]) == (session_id, 1)
    assert called_off["task_id"] == command["task"]["id"]
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=143))
    assert (world.status("A"), state(session_id)) == ("cancelled", "closed")
    world.check()


def test_a_session_key_dies_with_its_session(world, agent, worker, client):
    _, session_id = worker
    own = client.as_key(auth.session_key(session_id))
    assert own.get("auth/me").json["session_id"] == session_id
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=0))
    assert own.get("auth/me").status_code == 401


# ── away and back ─────────────────────────────────────────────────────────────────────────────


@on_poll
def test_sessions_are_disconnected_by_silence_and_active_again_at_the_next_sign(
    world, agent, worker
):
    _, session_id = worker
    sockets.notice_silence(0)
    assert state(session_id) == "disconnected"
    sockets.notice_silence(0)  # said once
    agent.call()
    assert state(session_id) == "active"
    assert session_events(world, session_id)[-2:] == ["session_disconnected", "session_active"]
    assert world.status("A") == "running"


def test_a_server_called_offline_on_a_connection_that_stands_goes_on_when_it_speaks(
    world, agent, worker
):
    """The network swallowed what was sent, and gave it up again: nobody has to connect anew."""
    _, session_id = worker
    world.offline("dev")
    assert state(session_id) == "disconnected"
    agent.call()
    assert state(session_id) == "active" and world.status("A") == "running"


@on_poll
def test_an_agent_that_speaks_while_its_silence_is_noticed_is_not_silent(world, agent, worker):
    _, session_id = worker
    link = sockets.links._links[world.servers["dev"]]
    with models.transaction():  # the notice waits for its turn, the agent comes first
        noticing = threading.Thread(target=sockets.notice_silence, args=(0,))
        noticing.start()
        wait_until(lambda: link.silent)
        link.silent = False
    noticing.join()
    assert state(session_id) == "active"


def test_what_cannot_be_stored_of_an_agents_return_is_stored_when_it_speaks_again(
    world, agent, worker, monkeypatch
):
    _, session_id = worker
    world.offline("dev")
    link = sockets.links._links[world.servers["dev"]]
    with monkeypatch.context() as patched:
        patched.setattr(models, "LOCK_PATIENCE_S", 0.05)
        with models.transaction(), ThreadPoolExecutor(1) as pool, pytest.raises(models.Busy):
            pool.submit(link.speaks).result()
    link.speaks()
    assert state(session_id) == "active"


def test_a_new_agent_process_recovers_its_sessions_for_a_grace(world, agent, worker, wire):
    _, session_id = worker
    fresh = wire("dev", spool_id=agent.spool_id)
    answer = fresh.connect(named(session_id))
    assert answer["sync_ok"]["sessions"] == [
        {"session_id": session_id, "action": "keep", "log_acked": 0}
    ]
    assert state(session_id) == "recovering"
    now = time.time()
    assert sessions.settle_recovering(now + 14) == 0
    assert sessions.settle_recovering(now + 16) == 1
    assert state(session_id) == "active"
    assert session_events(world, session_id)[-2:] == ["session_recovered", "session_active"]
    assert world.status("A") == "running"


def test_a_session_the_agent_does_not_have_any_more_is_lost_and_its_task_tried_again(
    world, agent, worker, wire
):
    _, session_id = worker
    fresh = wire("dev", spool_id=agent.spool_id)
    fresh.connect()
    assert state(session_id) == "lost"
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 2)
    assert "task_released" in world.types("A")
    [again] = [c for c in fresh.commands if c["type"] == "task_assigned"]
    assert again["attempt"] == 2
    assert again["start"]["session_id"] != session_id
    world.check()


def test_a_lost_session_that_turns_up_is_revived(world, agent, worker, wire):
    _, session_id = worker
    fresh = wire("dev", spool_id=agent.spool_id)
    fresh.connect()
    late = wire("dev", spool_id=agent.spool_id)
    late.connect(named(session_id))
    assert state(session_id) == "recovering"
    assert world.row("A")["attempt"] == 2
    world.check()


def test_a_session_that_has_ended_here_is_closed_there(agent, worker, wire):
    _, session_id = worker
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=0))
    answer = wire("dev", spool_id=agent.spool_id).connect(named(session_id))
    assert answer["sync_ok"]["sessions"][0]["action"] == "close"


def test_a_terminal_the_hub_does_not_know_is_adopted(agent, wire):
    answer = wire("dev").connect({"tmux_name": "orc-stranger", "alive": True})
    [adopted] = answer["sync_ok"]["adopt"]
    assert adopted["tmux_name"] == "orc-stranger"
    row = models.one("SELECT * FROM session WHERE id = ?", (adopted["session_id"],))
    assert (row["tmux_name"], row["role"], row["state"]) == ("orc-stranger", "plain", "recovering")


def test_a_session_whose_agent_lost_its_notes_is_adopted_with_all_that_is_known(
    world, agent, worker, wire
):
    _, session_id = worker
    agent.call(log(session_id, 0, b"0123456789"))
    assert sessions.logs().flush()
    stranger = {"tmux_name": f"orc-{session_id[:12]}", "alive": True}
    again = wire("dev")
    assert again.connect(stranger)["sync_ok"]["adopt"] == [
        {
            "tmux_name": stranger["tmux_name"],
            "session_id": session_id,
            "task_id": world.ids["A"],
            "attempt": 1,
            "profile": "command",
            "conversation": None,
            "working_directory": "/srv",
            "log_acked": 10,
        }
    ]
    assert state(session_id) == "recovering"
    again.call(again.spool("session_closed", session_id=session_id, exit_code=0))
    answer = wire("dev").connect(stranger)["sync_ok"]
    assert answer["adopt"] == [] and answer["sessions"][0]["action"] == "close"


def test_another_servers_session_is_not_adopted_by_its_id(world, agent, worker, wire):
    _, session_id = worker
    thief = wire("thief")
    answer = thief.connect(named(session_id))
    assert answer["sync_ok"]["sessions"][0]["session_id"] != session_id
    assert state(session_id) == "active"


def test_the_log_goes_on_where_the_hub_has_it(agent, worker, wire):
    _, session_id = worker
    agent.call(log(session_id, 0, b"0123456789"))
    assert sessions.logs().flush()
    answer = wire("dev", spool_id=agent.spool_id).connect(named(session_id))
    assert answer["sync_ok"]["sessions"][0]["log_acked"] == 10


def test_a_task_on_a_server_that_stays_away_is_released_and_given_to_another(world, agent, worker):
    world.server("other")
    world.offline("dev")
    now = time.time()
    assert leases.release_lost(now + 899, 900) == 0
    assert leases.release_lost(now + 901, 900) == 1
    assert (world.on("A"), world.row("A")["attempt"]) == ("other", 2)
    [released] = world.events("A", "task_released")
    assert released["details"]["why"] == "server dev has been away for 900 s"
    world.check()


def test_a_task_that_is_to_ask_stays_with_a_server_that_is_away(world, wire):
    agent = wire("dev")
    agent.connect()
    world.task("A", command=["x"], on_lost="ask", auto_assign=True)
    world.server("other")
    world.offline("dev")
    assert leases.release_lost(time.time() + 1000, 900) == 0
    assert world.on("A") == "dev"
    [alert] = alerts.waiting([world.project("shop")["id"]])
    assert (alert["kind"], alert["task_id"]) == ("lost", world.ids["A"])
    assert "server dev has been away for 900 s. Retry the task" in alert["sentence"]
    leases.release_lost(time.time() + 1010, 900)
    leases.end_alerts()
    assert len(alerts.waiting([world.project("shop")["id"]])) == 1


# ── revoked ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["revoke", "renew"])
def test_an_agent_is_let_go_within_a_second_when_its_key_is_taken_away(world, wire, how, carrier):
    world.server("dev", machine_id="m")
    agent = wire("dev")
    agent.connect()
    world.task("A", command=["x"], auto_assign=True)
    agent.call(agent.ack(*[c["id"] for c in agent.call()]))
    ended = []

    def wait():
        answer = agent.ask(wait=20)
        ended.append((time.monotonic(), answer))

    waiting = threading.Thread(target=wait)
    waiting.start()
    link = sockets.links._links[world.servers["dev"]]
    wait_until(lambda: link._changed._waiters)
    began = time.monotonic()
    if how == "revoke":
        servers.revoke(HUB, "dev")
    else:
        world.server("dev", machine_id="m")
    waiting.join(15)
    at, (status, answer) = ended[0]
    assert at - began < 1
    assert (status, answer.get("frames")) == ((200, []) if carrier == "poll" else (401, None))
    status, answer = agent.ask()
    assert (status, answer["code"]) == (401, "unauthorised")


def test_a_revoked_servers_commands_are_not_delivered(world, wire):
    agent = wire("dev")
    agent.connect()
    world.task("A", command=["x"], auto_assign=True)
    servers.revoke(HUB, "dev")
    assert agent.ask()[0] == 401
    assert world.commands("dev") == []


# ── typing ────────────────────────────────────────────────────────────────────────────────────


def typing(admin, agent, session_id, body, answer=None) -> tuple:
    """Type through the API while the agent polls and answers; (status, json, frames seen)."""
    result, seen = [], []

    def ask():
        result.append(admin.post(f"sessions/{session_id}/input", body))

    asking = threading.Thread(target=ask)
    asking.start()
    while not result:
        for frame in agent.call(wait=0.1):
            seen.append(frame)
            if answer is not None and frame["type"] == "session_type":
                agent.call({"type": "session_typed", "request_id": frame["request_id"]} | answer)
        asking.join(0.01)
    return result[0].status_code, result[0].json, seen


def test_a_typed_text_reaches_the_agent_and_is_confirmed(agent, worker, admin):
    _, session_id = worker
    hostile = "; $(reboot) `id`\nC-c Enter \x1b[31m -t"
    status, _, [frame] = typing(admin, agent, session_id, {"text": hostile}, {"ok": True})
    assert status == 200
    assert (frame["session_id"], frame["text"]) == (session_id, hostile)


def test_a_text_the_agent_would_not_type_is_refused_with_its_reason(agent, worker, admin):
    _, session_id = worker
    status, body, _ = typing(
        admin, agent, session_id, {"text": "x"}, {"ok": False, "why": "a prompt is open"}
    )
    assert (status, body["code"]) == (409, "blocked")
    assert "a prompt is open" in body["detail"]


def test_a_text_nobody_confirms_is_of_unknown_delivery(agent, worker, admin, monkeypatch):
    monkeypatch.setattr(sessions, "TYPING_S", 0.3)
    _, session_id = worker
    status, body, _ = typing(admin, agent, session_id, {"text": "x"})
    assert (status, body["code"]) == (409, "delivery_unknown")


def test_a_blocked_session_is_not_typed_into(agent, worker, admin):
    _, session_id = worker
    agent.call(
        agent.spool(
            "session_activity", session_id=session_id, state="blocked:permission", reason="rm"
        )
    )
    answer = admin.post(f"sessions/{session_id}/input", {"text": "y"})
    assert (answer.status_code, answer.json["code"]) == (409, "blocked")
    assert admin.get(f"sessions/{session_id}").json["activity"] == "blocked:permission"


def test_keystrokes_pass_as_they_are(agent, worker, admin):
    _, session_id = worker
    data = base64.b64encode(b"\x03").decode()
    assert admin.post(f"sessions/{session_id}/input", {"data": data}).status_code == 200
    assert agent.call() == [{"type": "session_input", "session_id": session_id, "data": data}]
    assert agent.call() == []


def test_a_resize_is_passed_on_and_remembered(agent, worker, admin):
    _, session_id = worker
    answer = admin.post(f"sessions/{session_id}/resize", {"cols": 100, "rows": 30})
    assert (answer.json["cols"], answer.json["rows"]) == (100, 30)
    assert agent.call() == [
        {"type": "session_resize", "session_id": session_id, "cols": 100, "rows": 30}
    ]


def test_closing_a_session_is_a_command(agent, worker, admin):
    _, session_id = worker
    assert admin.post(f"sessions/{session_id}/close", {"force": True}).status_code == 200
    [command] = agent.call()
    assert (command["type"], command["session_id"], command["force"]) == (
        "session_close",
        session_id,
        True,
    )


# ── a real hub ────────────────────────────────────────────────────────────────────────────────


def real(hub, key: str) -> Agent:
    def post(body):
        answer = hub.ask("POST", "server/poll", body, key=key)
        return answer.status_code, answer.json()

    return Agent(post)


def server_events(hub, server_id: str) -> list[str]:
    found = hub.api("GET", "events?limit=1000")["events"]
    return [e["type"] for e in found if e["server_id"] == server_id]


@pytest.mark.hub(offline_after_s=0.6, tick_s=0.1, poll_silence_s=0.3)
def test_online_within_a_second_and_offline_after_silence_each_once(hub, until):
    hub.api("POST", "projects", {"name": "shop"})
    server = hub.register("dev")
    agent = real(hub, server["api_key"])
    began = time.monotonic()
    agent.connect()
    assert hub.api("GET", "servers/dev")["status"] == "online"
    assert time.monotonic() - began < 1
    session = hub.api("POST", "sessions", {"server_id": "dev"})
    agent.call()
    agent.call(agent.started(session["id"]))
    until(lambda: hub.api("GET", "servers/dev")["status"] == "offline")
    assert hub.api("GET", f"sessions/{session['id']}")["status"] == "disconnected"
    agent.call()
    assert hub.api("GET", "servers/dev")["status"] == "online"

    def active_again():
        agent.call()
        return hub.api("GET", f"sessions/{session['id']}")["status"] == "active"

    until(active_again)
    kinds = [
        k for k in server_events(hub, server["id"]) if k in ("server_online", "server_offline")
    ]
    assert kinds == ["server_online", "server_offline", "server_online"]


@pytest.mark.hub(offline_after_s=3, tick_s=0.1)
def test_a_restarted_hub_gives_everyone_a_fresh_start(hub):
    hub.api("POST", "projects", {"name": "shop"})
    server = hub.register("dev")
    agent = real(hub, server["api_key"])
    agent.connect()
    task = hub.api("POST", "tasks", {"title": "A", "command": ["x"], "auto_assign": True})
    [command] = agent.call()
    hub.kill()
    hub.start()
    assert hub.api("GET", "servers/dev")["status"] == "online"
    status, answer = agent.ask()
    assert (status, answer["code"]) == (409, "sync_required")
    agent.connect()
    assert agent.commands[-1] == command
    agent.begin(command)
    assert hub.api("GET", f"tasks/{task['id']}")["status"] == "running"
    assert server_events(hub, server["id"]).count("server_offline") == 0


@pytest.mark.hub(offline_after_s=1, tick_s=0.1, lost_after_s=0.5, poll_silence_s=0.5)
def test_a_real_hub_releases_the_work_of_a_server_that_stays_away(hub, until):
    hub.api("POST", "projects", {"name": "shop"})
    agents = {name: real(hub, hub.register(name)["api_key"]) for name in ("a", "b")}
    agents["a"].connect()
    task = hub.api("POST", "tasks", {"title": "A", "command": ["x"], "auto_assign": True})
    agents["a"].begin(agents["a"].call()[0])
    agents["b"].connect()

    def moved():
        agents["b"].call(wait=0.1)
        shown = hub.api("GET", f"tasks/{task['id']}")
        return shown["attempt"] == 2 and shown["assigned_server_name"] == "b"

    until(moved)


def test_tasks_by_http_are_the_same_as_by_frames(world, agent, worker, client):
    """`servers/tasks/poll` lists what is on the server, whole."""
    [listed] = client.as_server(world.keys["dev"]).get("servers/tasks/poll").json["tasks"]
    assert listed["id"] == world.ids["A"]
    assert listed["status"] == "running"
    assert tasks.complete(world.key("dev"), listed["id"], None)["status"] == "done"
