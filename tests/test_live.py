"""What people watch: `/ws/terminal` and `/ws/dashboard`, with an agent written here by hand."""

import base64
import json
import time
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import models
import sessions
import terminals
from auth import HUB
from conftest import Client, wait_until
from test_wire import SocketAgent, named


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Screen:
    """A client of a socket; `seen` is what it was told, `bytes` what its terminal would show."""

    def __init__(self, url: str, token: str | None, *first: dict):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.socket = connect(url, additional_headers=headers, compression=None, legacy=True)
        self.seen: list[dict] = []
        self.offset = None
        self.data = b""
        with suppress(ConnectionClosed):  # it may have been turned away by now
            self.say(*first)

    def say(self, *frames: dict) -> None:
        for frame in frames:
            self.socket.send(json.dumps(frame))

    def next(self, timeout: float = 10) -> dict:
        frame = json.loads(self.socket.recv(timeout))
        self.seen.append(frame)
        if frame["type"] == "output":
            self._show(frame)
        return frame

    def _show(self, frame: dict) -> None:
        data = base64.b64decode(frame["data"])
        if frame.get("repaint"):
            self.data, self.offset = b"", frame["offset"]
        assert frame["offset"] == self.offset, "a byte is missing or comes twice"
        self.data += data
        self.offset += len(data)

    def until(self, kind: str, **fields) -> dict:
        """The next frame of that kind with those fields."""
        while True:
            frame = self.next()
            if frame["type"] == kind and fields.items() <= frame.items():
                return frame

    def until_shows(self, data: bytes) -> None:
        while not self.data.endswith(data):
            self.until("output")

    def end(self) -> tuple[int, str]:
        """Code and reason with which the hub closes."""
        try:
            while True:
                self.next()
        except ConnectionClosed as closed:
            return closed.rcvd.code, closed.rcvd.reason

    def close(self) -> None:
        self.socket.close()


class Hand(SocketAgent):
    """An agent that keeps what it was told."""

    def __init__(self, *args):
        super().__init__(*args)
        self.heard: list[dict] = []

    def call(self, *frames, **how) -> list[dict]:
        answer = super().call(*frames, **how)
        self.heard += answer
        return answer


@pytest.fixture
def agent(served, world):
    world.server("dev", online=False)
    made = Hand(served, world.keys["dev"])
    made.connect()
    yield made
    made.close()


@pytest.fixture
def session_id(world, agent) -> str:
    """A plain session that runs on the agent's server."""
    made, _ = sessions.open_session(HUB, {"server_id": world.servers["dev"], "name": "one"})
    start = heard(agent, "session_start")
    agent.call(agent.ack(start["id"]), agent.started(made["id"]))
    return made["id"]


@pytest.fixture
def watch(served, admin, session_id):
    """`watch()`: a client at the session's terminal, the admin unless another token is given."""
    opened = []

    def open_one(token=None, offset=None, ref="one", first=None) -> Screen:
        token = token or admin.headers["Authorization"].partition(" ")[2]
        first = first or {"type": "resume", "offset": offset}
        opened.append(Screen(f"{served}/ws/terminal/{ref}", token, first))
        return opened[-1]

    yield open_one
    for screen in opened:
        screen.close()
    wait_until(lambda: not any(s.watchers for s in terminals.streams._streams.values()))


def output(session_id: str, data: bytes, **more) -> dict:
    return {"type": "session_output", "session_id": session_id, "data": b64(data)} | more


def paint(agent, session_id: str, data: bytes = b"<screen>") -> None:
    """What the agent does when it is asked for a repaint."""
    heard(agent, "session_watch")
    agent.call(output(session_id, data, repaint=True))


def heard(agent, kind: str) -> dict:
    """The next frame of that kind that reaches the agent."""

    def found():
        agent.call()
        return next((f for f in agent.heard if f["type"] == kind), None)

    frame = wait_until(found)
    agent.heard.remove(frame)
    return frame


# ── watching ──────────────────────────────────────────────────────────────────────────────────


def test_a_watcher_is_told_how_things_stand_and_then_sees_the_screen(agent, session_id, watch):
    screen = watch()
    state = screen.next()
    assert (state["type"], state["name"], state["status"]) == ("state", "one", "active")
    assert (state["server_name"], state["server_online"], state["may_type"]) == ("dev", True, True)
    assert state["terminal"] == "tmux"
    size = screen.next()
    assert size == {"type": "size", "cols": 120, "rows": 40, "owner": None, "yours": False}
    asked = heard(agent, "session_watch")
    assert asked == {"type": "session_watch", "session_id": session_id, "on": True}
    agent.call(output(session_id, b"before anything was painted"))
    agent.call(output(session_id, b"<screen>", repaint=True), output(session_id, b"more"))
    assert screen.until("output")["repaint"] is True
    screen.until_shows(b"<screen>more")


def test_a_client_that_says_nothing_gets_a_repaint_all_the_same(agent, session_id, watch):
    screen = watch(first={"type": "something new"})
    paint(agent, session_id)
    screen.until_shows(b"<screen>")


def test_a_later_watcher_begins_at_the_last_repaint_and_nobody_is_repainted(
    agent, session_id, watch
):
    first = watch()
    paint(agent, session_id)
    agent.call(output(session_id, b" and on"))
    first.until_shows(b" and on")
    second = watch()
    second.until_shows(b"<screen> and on")
    agent.call(output(session_id, b"!"))
    assert not [f for f in agent.heard if f["type"] == "session_watch"]
    first.until_shows(b"!")
    second.until_shows(b"!")
    assert first.data == second.data == b"<screen> and on!"


def test_whoever_comes_back_goes_on_where_they_were(agent, session_id, watch):
    screen = watch()
    paint(agent, session_id)
    agent.call(output(session_id, b"1"))
    screen.until_shows(b"1")
    screen.close()
    agent.call(output(session_id, b"2"), output(session_id, b"3"))
    again = watch(offset=screen.offset)
    again.offset, again.data = screen.offset, screen.data
    again.until_shows(b"<screen>123")
    assert not [f for f in again.seen if f.get("repaint")]


@pytest.mark.parametrize("offset", [0, 12345, 2**60, -1])
def test_an_offset_the_hub_does_not_know_is_a_repaint(agent, session_id, watch, offset):
    first = watch()
    paint(agent, session_id)
    first.until_shows(b"<screen>")
    screen = watch(offset=offset)
    assert screen.until("output")["repaint"] is True


def test_after_a_new_connection_of_the_agent_everybody_is_repainted(
    agent, session_id, watch, served, world
):
    screen = watch()
    paint(agent, session_id)
    screen.until_shows(b"<screen>")
    again = Hand(served, world.keys["dev"], agent.spool_id)
    again.instance = agent.instance
    again.connect(named(session_id))
    again.call(output(session_id, b"the rest of something"))
    paint(again, session_id, b"<anew>")
    frame = screen.until("output")
    assert frame["repaint"] is True and screen.data == b"<anew>"
    again.close()


def test_a_session_nobody_watches_any_more_is_let_go(agent, session_id, watch):
    screen = watch()
    paint(agent, session_id)
    screen.until_shows(b"<screen>")
    screen.close()
    wait_until(lambda: not terminals.streams._streams[session_id].watchers)
    terminals.streams.sweep(time.monotonic())
    assert session_id in terminals.streams._streams  # somebody may only have reloaded the page
    terminals.streams.sweep(time.monotonic() + terminals.LINGER_S + 1)
    assert heard(agent, "session_watch")["on"] is False
    assert not terminals.streams._streams


def test_a_repaint_that_does_not_come_is_asked_for_again(agent, session_id, watch):
    screen = watch()
    heard(agent, "session_watch")
    screen.until("size")
    terminals.streams.sweep(time.monotonic() + 1)
    assert agent.call() == []
    terminals.streams.sweep(time.monotonic() + terminals.REPAINT_AGAIN_S + 1)
    paint(agent, session_id)
    screen.until_shows(b"<screen>")


def test_whoever_is_too_slow_is_shown_a_mark_and_a_fresh_screen(
    agent, session_id, watch, monkeypatch
):
    monkeypatch.setattr(terminals, "RING_BYTES", 1000)
    monkeypatch.setattr(terminals, "SKIP_S", 0.0)
    screen = watch()
    paint(agent, session_id)
    screen.until_shows(b"<screen>")
    stream = terminals.streams._streams[session_id]
    [watcher] = stream.watchers
    with monkeypatch.context() as stuck:
        stuck.setattr(watcher.stream, "read", lambda _watcher: [])
        agent.call(*(output(session_id, b"x" * 100) for _ in range(50)))
    terminals.streams.sweep(time.monotonic() + terminals.REPAINT_AGAIN_S + 1)
    watcher.wake()
    wait_until(lambda: watcher.next is None)
    assert sum(chunk.size for chunk in stream._chunks) <= 1000
    terminals.streams.sweep(time.monotonic() + terminals.REPAINT_AGAIN_S + 1)
    paint(agent, session_id, b"<later>")
    frame = screen.until("output")
    assert (frame["skipped"], frame["repaint"]) == (5000, True)
    assert screen.data == b"<later>"


def test_what_is_no_base64_is_shown_to_nobody(agent, session_id, watch):
    screen = watch()
    paint(agent, session_id)
    agent.call({"type": "session_output", "session_id": session_id, "data": 'x"}<script>'})
    agent.call(output(session_id, b"fine"))
    screen.until_shows(b"<screen>fine")


def test_a_session_that_has_ended_shows_its_last_words(agent, session_id, watch):
    live = watch()
    paint(agent, session_id)
    live.until_shows(b"<screen>")
    log = {"type": "session_log", "session_id": session_id, "offset": 0, "at": "x"}
    agent.call(log | {"data": b64(b"all that was printed")})
    agent.call(agent.spool("session_closed", session_id=session_id, exit_code=3, log_end=20))
    assert live.until("closed")["exit_code"] == 3
    assert live.end() == (1000, "the session has ended")
    wait_until(lambda: sessions.logs().end(session_id) == 20)
    late = watch()
    late.until("closed")
    assert late.data == b"all that was printed"
    assert [f["type"] for f in late.seen] == ["state", "size", "output", "closed"]


# ── typing ────────────────────────────────────────────────────────────────────────────────────


def test_keys_reach_the_session_as_they_are(agent, session_id, watch):
    watch().say({"type": "input", "data": b64(b"\x1b[A\x03")})
    assert base64.b64decode(heard(agent, "session_input")["data"]) == b"\x1b[A\x03"


def test_typing_where_nobody_can_be_reached_is_refused_with_a_sentence(
    agent, session_id, watch, world
):
    screen = watch()
    screen.until("size")
    agent.close()
    assert screen.until("state", status="disconnected")
    screen.say({"type": "input", "data": b64(b"ls\r")})
    refused = screen.until("error")
    assert refused["code"] == "offline"
    assert "cannot be reached now" in refused["detail"] and "nothing was typed" in refused["detail"]


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "input"},
        {"type": "input", "data": 3},
        {"type": "input", "data": "%%%"},
        {"type": "resize", "cols": 0, "rows": 10},
        {"type": "resize", "cols": "wide", "rows": 10},
        {"type": "resize", "cols": 10**6, "rows": 10},
        {"type": "take_size", "cols": -1, "rows": -1},
        {"type": "resume", "offset": "x"},
    ],
)
def test_a_message_that_cannot_be_used_is_an_error_and_no_end(agent, session_id, watch, frame):
    screen = watch()
    screen.say(frame)
    assert screen.until("error")["code"] in ("invalid",)
    screen.say({"type": "input", "data": b64(b"x")})
    assert heard(agent, "session_input")


def test_a_viewer_sees_and_may_not_type(agent, session_id, watch, world):
    viewer = world.user("vera", shop="viewer")
    screen = watch(world.token(viewer.id))
    assert screen.until("state")["may_type"] is False
    for frame in (
        {"type": "input", "data": b64(b"x")},
        {"type": "resize", "cols": 80, "rows": 24},
        {"type": "take_size"},
    ):
        screen.say(frame)
        assert screen.until("error")["code"] == "forbidden"
    paint(agent, session_id)
    screen.until_shows(b"<screen>")
    assert sessions.get_session(HUB, "one")["cols"] == 120


# ── the size ──────────────────────────────────────────────────────────────────────────────────


def test_the_first_who_offers_a_size_owns_it_and_others_may_take_it(
    agent, session_id, watch, world
):
    first, second = watch(), watch(world.token(world.user("olga", shop="operator").id))
    first.say({"type": "resize", "cols": 100, "rows": 30})
    first.until("size", cols=100, rows=30, owner="admin", yours=True)
    second.until("size", cols=100, rows=30, owner="admin", yours=False)
    assert heard(agent, "session_resize")["cols"] == 100
    second.say({"type": "resize", "cols": 60, "rows": 20})  # only remembered
    second.say({"type": "take_size"})
    second.until("size", cols=60, rows=20, owner="olga", yours=True)
    first.until("size", cols=60, rows=20, owner="olga", yours=False)
    assert heard(agent, "session_resize")["cols"] == 60
    second.close()
    first.until("size", cols=60, rows=20, owner=None, yours=False)
    first.say({"type": "resize", "cols": 90, "rows": 30})
    first.until("size", cols=90, owner="admin", yours=True)


# ── scrollback ────────────────────────────────────────────────────────────────────────────────


def test_scrollback_comes_to_whoever_asked_and_to_nobody_else(agent, session_id, watch):
    asking, other = watch(), watch()
    asking.say({"type": "scrollback"})
    heard(agent, "capture_scrollback")
    lines = [f"line {n}" for n in range(2000)]
    agent.call({"type": "scrollback_captured", "session_id": session_id, "lines": lines})
    assert asking.until("scrollback")["lines"] == lines
    paint(agent, session_id)
    other.until_shows(b"<screen>")
    assert not [f for f in other.seen if f["type"] == "scrollback"]


# ── who may ───────────────────────────────────────────────────────────────────────────────────


def test_a_token_may_come_in_the_first_frame(served, admin, agent, session_id):
    token = admin.headers["Authorization"].partition(" ")[2]
    screen = Screen(f"{served}/ws/terminal/one", None, {"type": "auth", "token": token})
    screen.say({"type": "resume", "offset": None})
    assert screen.next()["type"] == "state"
    screen.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"type": "auth", "token": "wrong"}, 4401),
        ({"type": "auth"}, 4401),
        ({"type": "resume", "offset": None}, 4401),
    ],
)
@pytest.mark.parametrize("path", ["terminal/one", "dashboard"])
def test_whoever_cannot_say_who_they_are_is_turned_away(
    served, agent, session_id, path, first, code
):
    screen = Screen(f"{served}/ws/{path}", None, first)
    assert screen.end()[0] == code
    assert screen.seen[0]["type"] == "error" and screen.seen[0]["detail"]


def test_a_session_one_may_not_see_is_none(watch, world, agent):
    stranger = world.token(world.user("sam").id)
    assert watch(stranger).end()[0] == 4404
    assert watch(ref="nothing").end()[0] == 4404


# ── the dashboard ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def follow(served, admin):
    opened = []

    def open_one(after=None, token=None) -> Screen:
        token = token or admin.headers["Authorization"].partition(" ")[2]
        first = {"type": "resume", "after": after}
        opened.append(Screen(f"{served}/ws/dashboard", token, first))
        return opened[-1]

    yield open_one
    for screen in opened:
        screen.close()


def test_every_event_comes_with_its_kind_and_the_id_before_it(world, follow):
    start = world.now()
    dashboard = follow(after=start)
    world.server("dev")
    world.task("A")
    world.assign("A", server="dev")
    expected = models.rows("SELECT id, type, task_id FROM event WHERE id > ? ORDER BY id", (start,))
    seen = [dashboard.next() for _ in expected]
    assert [(f["id"], f["event"], f["task_id"]) for f in seen] == [
        (e["id"], e["type"], e["task_id"]) for e in expected
    ]
    assert all(f["prev"] == f["id"] - 1 and isinstance(f["details"], dict) for f in seen)
    kinds = {f["event"]: f["type"] for f in seen}
    assert kinds["task_created"] == kinds["task_assigned"] == "task_event"
    assert kinds["server_online"] == "server_event"
    assert kinds["registration_token_created"] == "hub_event"


def test_a_task_that_needs_somebody_is_told_under_both_names(world, follow):
    world.server("dev")
    world.working("A", server="dev")
    dashboard = follow(after=world.now())
    with models.transaction() as tx:
        tx.emit("task_needs_human", world.row("A")["project_id"], "x", {}, task=world.ids["A"])
    first, second = dashboard.next(), dashboard.next()
    assert (first["type"], first["event"]) == ("task_event", "task_needs_human")
    assert second["type"] == second["event"] == "intervention_requested"
    assert first["id"] == second["id"] and second["task_id"] == world.ids["A"]


def test_the_stream_tells_it_under_both_names_too(world, admin):
    world.task("A")
    with models.transaction() as tx:
        tx.emit("task_needs_human", world.row("A")["project_id"], "x", {}, task=world.ids["A"])
    answer = admin.get(f"events/stream?after={world.now() - 1}", buffered=False)
    text = ""
    for piece in answer.response:
        text += piece.decode() if isinstance(piece, bytes) else piece
        if "intervention_requested" in text:
            break
    answer.close()
    assert text.index("event: task_needs_human") < text.index("event: intervention_requested")


def test_the_dashboard_resumes_anywhere_and_says_when_ids_began_anew(world, follow):
    world.task("A")
    dashboard = follow(after=0)
    assert dashboard.next()["id"] == 1
    dashboard.until("task_event", event="task_created")
    dashboard.say({"type": "resume", "after": 2})
    while dashboard.next()["id"] != 3:
        pass
    dashboard.say({"type": "resume", "after": 10**9})
    assert dashboard.until("reset")["id"] == world.now()
    world.task("B")
    assert dashboard.until("task_event")["task_id"] == world.ids["B"]


def test_one_sees_only_what_one_may(world, follow):
    world.project("other")
    viewer = world.user("vera", other="viewer")
    dashboard = follow(after=world.now(), token=world.token(viewer.id))
    world.task("A")
    world.task("B", project="other")
    assert dashboard.next()["task_id"] == world.ids["B"]


def test_the_dashboard_ends_when_its_reader_is_signed_out(world, follow, client):
    person = client.as_user()
    token = person.headers["Authorization"].partition(" ")[2]
    dashboard = follow(after=world.now(), token=token)
    world.task("A")
    dashboard.until("task_event")
    assert person.post("auth/logout").status_code < 300
    assert dashboard.end()[0] == 4401


def test_the_terminal_ends_when_its_watcher_is_signed_out(agent, session_id, watch, client: Client):
    person = client.as_user()
    screen = watch(person.headers["Authorization"].partition(" ")[2])
    screen.until("size")
    assert person.post("auth/logout").status_code < 300
    assert screen.end()[0] == 4401
