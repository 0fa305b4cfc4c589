"""How the agent reaches its hub: the socket, the poll, and what decides between them.

First the decision with plain values; then one socket against scripted hubs and broken proxies; at
the end an agent process and a hub process with a proxy of ours between them.
"""

import contextlib
import http.server
import json
import logging
import random
import re
import socket
import sys
import threading
import time
import uuid

import pytest
import yaml
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

import agent
from agent import Choice, Ended, Hub, Line, SocketCarrier
from conftest import AgentProcess, wait_until

KEY = "orc_canary_server_key"
FAST = {
    "socket_open_s": 0.4,
    "socket_ping_s": 0.3,
    "socket_retry_s": 0.2,
    "backoff_max_s": 0.1,
    "refused_max_s": 0.2,
    "superseded_s": 0.2,
}


# ── the decision ──────────────────────────────────────────────────────────────────────────────


def choice(**settings):
    return Choice(agent.settings_of(settings))


def after(which, *kinds):
    """The carrier in use after sockets have ended so."""
    for kind in kinds:
        if kind == "carries":
            which.carries()
        else:
            which.after(kind)
    return which.using


@pytest.mark.parametrize(
    "kinds, using",
    [
        ([], "socket"),
        ([agent.REFUSED] * 2, "socket"),
        ([agent.REFUSED] * 3, "poll"),
        ([agent.SILENT] * 3, "poll"),
        ([agent.REFUSED, agent.SILENT, agent.REFUSED], "poll"),
        ([agent.MUTE], "poll"),
        ([agent.ABSENT] * 9, "socket"),
        ([agent.LOST, agent.DENIED, agent.SUPERSEDED] * 3, "socket"),
        ([agent.REFUSED, agent.REFUSED, agent.ABSENT, agent.REFUSED], "socket"),
        ([agent.REFUSED, agent.REFUSED, "carries", agent.LOST, agent.REFUSED], "socket"),
        ([agent.MUTE, agent.ABSENT, agent.REFUSED], "poll"),
        ([agent.MUTE, "carries"], "socket"),
        ([agent.MUTE, "carries", agent.REFUSED, agent.REFUSED], "socket"),
    ],
)
def test_what_is_used_after_sockets_have_ended(kinds, using):
    assert after(choice(), *kinds) == using


def test_a_carrier_that_is_set_is_never_changed():
    assert after(choice(carrier="socket"), *[agent.MUTE] * 9) == "socket"
    assert choice(carrier="poll").using == "poll"
    for wrong in ("ws", True, None, 1):
        with pytest.raises(agent.AgentError, match="carrier"):
            agent.settings_of({"carrier": wrong})


def test_how_long_the_socket_is_let_alone():
    which = choice()
    assert 0.2 <= which.after(agent.LOST, 1000) <= 1
    assert 0.3 <= which.after(agent.LOST, 0.1) <= 1.5
    assert 0.45 <= which.after(agent.ABSENT) <= 2.25
    assert 0.2 <= which.after(agent.LOST, 5) <= 1
    assert max(which.after(agent.ABSENT) for _ in range(100)) <= 30
    assert max(which.after(agent.ABSENT) for _ in range(100)) > 20
    assert which.after(agent.SUPERSEDED) == 30
    assert [which.after(agent.DENIED) <= most for most in (1, 2, 4)] == [True] * 3
    assert 4 <= which.after(agent.DENIED) <= 8
    which.carries()
    assert which.after(agent.DENIED) <= 1
    assert which.after(agent.MUTE) == 300
    assert which.after(agent.ABSENT) == which.after(agent.DENIED) == 300


# ── one socket ────────────────────────────────────────────────────────────────────────────────


class Script:
    """A hub that does with each connection what it was told to; the last of it again and again."""

    def __init__(self, *acts, answer=None):
        self.acts = list(acts)
        self.answer = answer  # to the upgrade: a Response, or None to accept it
        self.upgrades = []  # headers
        self.told = []  # frames of all connections after the opening
        self.closed = []  # close codes of the agent
        self.epoch = str(uuid.uuid4())
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # it buffers little
        self._server = serve(
            self._play,
            sock=listener,
            process_request=self._look,
            compression=None,
            max_size=None,
            max_queue=1,
        )
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()

    def _look(self, _connection, request):
        self.upgrades.append((request.path, request.headers))
        return self.answer

    def _play(self, connection):
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        with contextlib.suppress(ConnectionClosed):
            act(self, connection)
        connection.close()
        self.closed.append(connection.protocol.close_rcvd and connection.protocol.close_rcvd.code)

    # what acts are made of

    def greet(self, connection, **more):
        first = json.loads(connection.recv(5))
        assert (first["type"], first["api_key"], first["protocol"]) == ("auth", KEY, 2)
        say(connection, "auth_ok", hub_epoch=self.epoch, server_name="dev", **more)

    def agree(self, connection):
        second = json.loads(connection.recv(5))
        assert (second["type"], second["sessions"]) == ("sync", [])
        say(connection, "sync_ok", sessions=[])

    def open(self, connection, **more):
        self.greet(connection, **more)
        self.agree(connection)

    def listen(self, connection, acknowledge=True):
        while True:
            frame = json.loads(connection.recv())
            self.told.append(frame)
            if acknowledge and "spool" in frame:
                say(connection, "spool_ack", upto=frame["spool"])

    def numbers(self):
        return [frame["spool"] for frame in self.told if "spool" in frame]

    def kinds(self):
        return [frame["type"] for frame in self.told]


def say(connection, kind, **fields):
    connection.send(json.dumps({"type": kind, **fields}))


def carries(script, connection):
    script.open(connection)
    script.listen(connection)


@pytest.fixture
def script():
    made = []

    def start(*acts, **options):
        made.append(Script(*acts, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def make_agent(tmp_path):
    """An agent without threads of its own."""
    made = []

    def make(url="http://127.0.0.1:1", **settings):
        config = {"server_id": str(uuid.uuid4()), "hub_url": url, "api_key": KEY}
        state = agent.make_private_dir(tmp_path / f"state-{len(made)}")
        all_settings = agent.settings_of(FAST | settings)
        made.append(agent.Agent(config, state, all_settings, threading.Event()))
        return made[-1]

    yield make
    for one in made:
        one.stop.set()
        one.store.close()


@pytest.fixture
def start_line(make_agent):
    """Lines to a hub, each with an agent that only talks."""
    lines = []

    def start(url, **settings):
        one = make_agent(url, **settings)
        lines.append(Line(Hub(url, KEY), one))
        lines[-1].start()
        return lines[-1]

    yield start
    for line in lines:
        line.stop.set()
        line.end()
        line._loop.join(5)
        if line.poll:
            for lane in line.poll._lanes:
                lane.join(5)


def how_it_ends(one, url, phases=("open", "sync", "carry")):
    carrier = SocketCarrier(Hub(url, KEY), one)
    try:
        for phase in phases:
            getattr(carrier, phase)()
    except Ended as ended:
        return ended
    finally:
        carrier.close()


@contextlib.contextmanager
def answering(answer):
    """The URL of something that answers every request with these bytes; None: not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def run():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    held.append(sock)
                    if answer is not None:
                        sock.recv(65536)
                        sock.sendall(answer)
                        sock.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for sock in held:
                sock.close()


def http_answer(status, body="", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    "answer, kind",
    [
        (http_answer("400 Bad Request", "<h1>Bad</h1>"), agent.REFUSED),
        (http_answer("502 Bad Gateway", "<h1>Bad</h1>"), agent.REFUSED),
        (http_answer("503 Service Unavailable", "<h1>Bad</h1>"), agent.REFUSED),
        (http_answer("404 Not Found", '{"detail": "There is no such page."}'), agent.REFUSED),
        (http_answer("200 OK", "<h1>Hello</h1>"), agent.REFUSED),
        (http_answer("503 Service Unavailable", '{"detail": "Later."}'), agent.ABSENT),
        (b"", agent.REFUSED),
        (b"HTTP/1.1 101 Switch", agent.REFUSED),
        (b"SSH-2.0-OpenSSH_9.2\r\n", agent.REFUSED),
        (None, agent.REFUSED),
    ],
)
def test_an_upgrade_that_something_in_between_breaks(make_agent, answer, kind):
    with answering(answer) as url:
        assert how_it_ends(make_agent(), url).kind == kind


def test_a_hub_that_is_not_there_is_not_a_failed_upgrade(make_agent):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    one = make_agent()
    assert how_it_ends(one, f"http://127.0.0.1:{port}").kind == agent.ABSENT
    assert how_it_ends(one, "http://no-such-host.invalid").kind == agent.ABSENT


def test_the_key_follows_no_redirect(make_agent, script):
    elsewhere = script(carries)
    target = f"Location: {elsewhere.url.replace('http', 'ws')}/ws/server"
    with answering(http_answer("307 Temporary Redirect", "", target)) as url:
        assert how_it_ends(make_agent(), url).kind == agent.REFUSED
    assert elsewhere.upgrades == []


def mute(_script, connection):
    connection.recv()
    connection.recv()  # nothing comes: the agent waits for its greeting


def babbles(_script, connection):
    connection.send("<h1>Welcome</h1>")
    connection.recv()


def refuses(code, **fields):
    def act(_script, connection):
        connection.recv()
        say(connection, "auth_error", detail="This key was revoked.", code=code, **fields)
        connection.close(4401)

    return act


def closes(code, *steps):
    def act(script, connection):
        for step in steps:
            getattr(script, step)(connection)
        if not steps:
            connection.recv()
        connection.close(code, "so it is")

    return act


def drops(*steps):
    """End the connection without a farewell."""

    def act(script, connection):
        for step in steps:
            getattr(script, step)(connection)
        connection.recv()
        connection.socket.shutdown(socket.SHUT_RDWR)

    return act


def silent(script, connection):
    script.greet(connection)
    while True:
        connection.recv()


@pytest.mark.parametrize(
    "act, kind",
    [
        (mute, agent.MUTE),
        (babbles, agent.MUTE),
        (drops(), agent.REFUSED),
        (closes(1000), agent.REFUSED),
        (closes(1012), agent.ABSENT),
        (closes(4401), agent.DENIED),
        (closes(4001), agent.SUPERSEDED),
        (refuses("unauthorised"), agent.DENIED),
        (refuses("revoked"), agent.DENIED),
        (refuses("protocol"), agent.DENIED),
        (refuses("superseded"), agent.SUPERSEDED),
        (refuses("busy"), agent.ABSENT),
        (silent, agent.SILENT),
        (drops("greet"), agent.SILENT),
        (closes(1006 - 6, "greet"), agent.SILENT),
        (drops("open"), agent.LOST),
        (closes(1000, "open"), agent.LOST),
        (closes(4400, "open"), agent.LOST),
        (closes(4001, "open"), agent.SUPERSEDED),
        (closes(4401, "open"), agent.DENIED),
        (closes(1012, "open"), agent.ABSENT),
    ],
)
def test_what_the_end_of_a_socket_means(make_agent, script, act, kind):
    patience = 0.2 if kind in (agent.MUTE, agent.SILENT) else 10  # what has to come may take long
    one = make_agent(socket_open_s=patience)
    one.outgoing.spool({"type": "agent_event"})  # something to say, for whoever listens
    ended = how_it_ends(one, script(act).url)
    assert ended.kind == kind, ended


def test_the_key_is_in_the_first_frame_only_and_nothing_else_comes_before_the_greeting(
    make_agent, script
):
    hub = script(carries)
    one = make_agent(hub.url)
    one.outgoing.spool({"type": "agent_event"})
    thread = threading.Thread(target=how_it_ends, args=(one, hub.url))
    thread.start()
    try:
        wait_until(lambda: hub.numbers() == [1])  # `greet` and `agree` look at what comes before
    finally:
        hub.close()
        thread.join()
    ((path, headers),) = hub.upgrades
    assert path == "/ws/server"
    assert KEY not in str(headers)
    assert "Sec-WebSocket-Extensions" not in headers


def test_pings_are_answered_and_heartbeats_go_by_the_socket(script, start_line):
    def pings(hub, connection):
        hub.open(connection, heartbeat_s=0.05)
        say(connection, "ping")
        hub.listen(connection)

    hub = script(pings)
    line = start_line(hub.url)
    wait_until(lambda: line.socket)
    heartbeat = agent.Heartbeat(line.hub, line.agent, line)
    assert line.agent.heartbeat_s == 0.05
    heartbeat.step()
    wait_until(lambda: sorted(hub.kinds()) == ["heartbeat", "pong"])
    (beat,) = [frame for frame in hub.told if frame["type"] == "heartbeat"]
    assert beat["system_info"]["agent_version"] == agent.VERSION


def test_commands_that_come_together_are_on_the_disk_before_they_are_acknowledged(
    script, start_line
):
    lines = []

    def orders(hub, connection):
        hub.open(connection)
        for n in range(1, 151):
            say(connection, "session_close", id=n, session_id="none")
        while sum(len(frame["ids"]) for frame in hub.told) < 150:
            frame = json.loads(connection.recv())
            written = {order["id"] for _, order, _ in lines[0].agent.store.unfinished()}
            assert written >= set(frame["ids"])
            hub.told.append(frame)
        hub.listen(connection)

    hub = script(orders)
    lines.append(start_line(hub.url))
    wait_until(lambda: sum(len(frame["ids"]) for frame in hub.told) == 150)
    assert hub.kinds() == ["ack"] * len(hub.told)
    assert sorted(n for frame in hub.told for n in frame["ids"]) == list(range(1, 151))
    assert lines[0].agent.commands.qsize() == 150


def test_a_frame_that_breaks_off_in_the_middle_has_no_effect_and_comes_again(script, start_line):
    def breaks(hub, connection):
        hub.open(connection)
        say(connection, "session_close", id=1, session_id="none")
        whole = json.dumps({"type": "session_close", "id": 2, "session_id": "none"}).encode()
        connection.socket.sendall(bytes([0x81, len(whole)]) + whole[:-5])
        connection.socket.shutdown(socket.SHUT_RDWR)

    def again(hub, connection):
        hub.open(connection)
        for n in (1, 2):
            say(connection, "session_close", id=n, session_id="none")
        hub.listen(connection)

    hub = script(breaks, again)
    line = start_line(hub.url)
    wait_until(lambda: sum((frame["ids"] for frame in hub.told), []) == [1, 2])
    taken = [line.agent.commands.get_nowait()["id"] for _ in range(line.agent.commands.qsize())]
    assert taken == [1, 2]


def test_reports_are_sent_again_until_they_are_acknowledged_over_broken_connections(
    script, start_line
):
    """Each connection takes a few reports, acknowledges some of them, and breaks."""
    random.seed(7)

    def breaks(hub, connection):
        hub.open(connection)
        for _ in range(random.randrange(8)):
            frame = json.loads(connection.recv())
            hub.told.append(frame)
            if random.random() < 0.5:
                say(connection, "spool_ack", upto=frame["spool"])
        connection.socket.shutdown(socket.SHUT_RDWR)

    hub = script(*[breaks] * 12, carries)
    line = start_line(hub.url, backoff_max_s=0.02)
    for n in range(60):
        line.agent.outgoing.spool({"type": "agent_event", "n": n})
    wait_until(lambda: line.agent.store.spool_first() == 61, 20)
    first_seen = list(dict.fromkeys(hub.numbers()))
    assert first_seen == list(range(1, 61))
    assert {frame["spool"]: frame["n"] for frame in hub.told} == {n + 1: n for n in range(60)}
    assert line_states(line) == ("socket", True, False)


def test_what_is_said_overtakes_a_log_that_the_hub_takes_slowly(script, start_line, tmp_path):
    said = threading.Event()

    def slow(hub, connection):
        hub.open(connection)
        hub.told.append(json.loads(connection.recv()))
        said.wait(10)
        hub.listen(connection)

    hub = script(slow)
    line = start_line(hub.url, socket_ping_s=20)
    wait_until(lambda: line.socket)
    flood = tmp_path / "output.log"
    flood.write_bytes(random.randbytes(2 * agent.WINDOW_BYTES))
    logs = line.agent.outgoing.logs
    with line.agent.outgoing._lock:  # all or none are there when the writer looks
        for name in "abcd":
            logs.follow(name, flood, acked=0)
    line.agent.outgoing.wake.set()
    wait_until(lambda: hub.told)
    line.agent.outgoing.say({"type": "session_typed"})
    said.set()
    blocks = agent.CALL_BYTES * 3 // 4 // agent.BLOCK_BYTES  # made at once, in base64
    wait_until(lambda: len(hub.told) > blocks)
    assert hub.kinds().index("session_typed") < blocks - 4


def test_a_hub_that_is_asked_to_stop_hears_the_last_reports_and_a_farewell(script, start_line):
    hub = script(carries)
    line = start_line(hub.url)
    wait_until(lambda: line.socket)
    line.agent.store.spool({"type": "agent_event"})  # nobody has woken the writer
    begun = time.monotonic()
    line.stop.set()
    line.end()
    assert time.monotonic() - begun < 1
    wait_until(lambda: hub.closed == [1001])
    assert hub.numbers() == [1]


def test_without_the_library_the_hub_is_polled_and_that_is_said_once(
    script, start_line, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with answering(http_answer("500 Oh", "{}")) as url:
        line = start_line(url)
        wait_until(lambda: line.poll)
        warned = [record for record in caplog.records if "websockets" in record.message]
        assert [record.levelno for record in warned] == [logging.WARNING]
        line.stop.set()
        line.end()


# ── a proxy in between ────────────────────────────────────────────────────────────────────────


class Proxy:
    """Passes bytes between an agent and its hub, and breaks things when told to."""

    def __init__(self, port):
        self.port_behind = port
        self.refuse = False  # upgrades
        self.frozen = False  # nothing passes either way, and nothing is closed
        self.seen = []  # "upgrade" or the path of each request, in order
        self._sockets = set()
        self._upgraded = set()
        self._threads = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._spawn(self._accept)

    def _spawn(self, run, *arguments):
        thread = threading.Thread(target=self._quietly, args=(run, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _quietly(run, *arguments):
        with contextlib.suppress(OSError):
            run(*arguments)

    def _accept(self):
        while True:
            sock, _ = self._listener.accept()
            self._sockets.add(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock):
        head = sock.recv(65536)
        upgrade = b"upgrade: websocket" in head.lower()
        if upgrade:
            self.seen.append("upgrade")
        if upgrade and self.refuse:
            sock.sendall(http_answer("502 Bad Gateway", "<h1>Bad Gateway</h1>"))
            return self._end(sock)
        try:
            behind = socket.create_connection(("127.0.0.1", self.port_behind))
        except OSError:
            sock.sendall(http_answer("502 Bad Gateway", "<h1>Bad Gateway</h1>"))
            return self._end(sock)
        self._sockets.add(behind)
        if upgrade:
            self._upgraded.update((sock, behind))
        self._spawn(self._pump, behind, sock, False)
        self._pump(sock, behind, not upgrade, head)

    def _pump(self, source, target, look, data=b""):
        try:
            while True:
                if look:
                    self.seen += re.findall(r"POST (\S+) HTTP", data.decode("latin-1"))
                target.sendall(data)
                data = source.recv(16384)
                while self.frozen:
                    time.sleep(0.01)
                if not data:
                    break
        finally:
            self._end(source)
            self._end(target)

    def _end(self, sock):
        self._upgraded.discard(sock)
        self._sockets.discard(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def cut(self):
        """End what is upgraded, wherever it is."""
        for sock in list(self._upgraded):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.frozen = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            self._end(sock)
        for thread in self._threads:
            thread.join(5)

    def calls(self, path):
        return sum(path in seen for seen in self.seen)


@pytest.fixture
def start_proxy():
    made = []

    def start(port):
        made.append(Proxy(port))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


def test_a_peer_that_has_gone_without_a_word_is_noticed(script, start_proxy, make_agent):
    hub = script(carries)
    proxy = start_proxy(hub.port)
    one = make_agent(proxy.url)
    carrier = SocketCarrier(Hub(proxy.url, KEY), one)
    carrier.open()
    carrier.sync()
    proxy.frozen = True
    begun = time.monotonic()
    with pytest.raises(Ended) as ended:
        carrier.carry()
    carrier.close()
    assert ended.value.kind == agent.LOST and "ping" in str(ended.value)
    assert time.monotonic() - begun < 2 * 0.3 + 2 + 0.5  # two waits, the farewell, and some


def test_a_peer_that_takes_nothing_is_noticed_while_a_message_is_stuck(
    script, start_proxy, make_agent
):
    hub = script(carries)
    proxy = start_proxy(hub.port)
    one = make_agent(proxy.url)
    carrier = SocketCarrier(Hub(proxy.url, KEY), one)
    carrier.open()
    carrier.sync()
    proxy.frozen = True
    one.outgoing.say({"type": "scrollback_captured", "lines": ["x" * 1000] * 20_000})
    with pytest.raises(Ended) as ended:
        carrier.carry()
    carrier.close()
    assert ended.value.kind == agent.LOST


# ── the line ──────────────────────────────────────────────────────────────────────────────────


class Poll(http.server.BaseHTTPRequestHandler):
    """A hub that only polls: it agrees to everything and has nothing to say."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body["frames"]:
            self.server.stopping.wait(min(body["wait"], 0.2))
        data = json.dumps({"seq": body["seq"], "frames": self.server.answer(body)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class PollHub(http.server.ThreadingHTTPServer):
    def __init__(self, told):
        super().__init__(("127.0.0.1", 0), Poll)
        self.told = told
        self.answers = {}
        self.stopping = threading.Event()
        self.epoch = str(uuid.uuid4())
        self.port = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, call):
        """A repeated call gets the answer it had, and has no effect."""
        number = call["instance"], call["seq"]
        if number not in self.answers:
            self.answers[number] = sum(map(self.take, call["frames"]), [])
        return self.answers[number]

    def take(self, frame):
        if frame["type"] == "auth":
            assert "api_key" not in frame
            return [{"type": "auth_ok", "hub_epoch": self.epoch, "server_name": "dev"}]
        if frame["type"] == "sync":
            return [{"type": "sync_ok", "sessions": []}]
        self.told.append(frame)
        return [{"type": "spool_ack", "upto": frame["spool"]}] if "spool" in frame else []

    def stop(self):
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class Fork:
    """A proxy that hands upgrades to one server and calls to another."""

    def __init__(self, start_proxy, script, poll):
        self.script, self.poll = script, poll
        self.proxy = start_proxy(poll.port)
        self.url = self.proxy.url
        serve_plain = self.proxy._serve

        def serve_each(sock):
            upgrade = b"upgrade: websocket" in sock.recv(65536, socket.MSG_PEEK).lower()
            self.proxy.port_behind = script.port if upgrade else poll.port
            serve_plain(sock)

        self.proxy._serve = serve_each


@pytest.fixture
def fork(start_proxy, script):
    """(proxy, script, poll): one address whose upgrades and calls can be broken apart."""
    told = []
    poll = PollHub(told)

    def start(*acts):
        hub = script(*acts)
        hub.told = told
        return Fork(start_proxy, hub, poll)

    yield start
    poll.stop()


def line_states(line):
    """The choice, whether the socket carries, whether the poll does."""
    return line.choice.using, line.socket is not None, line.poll is not None


def test_the_poll_takes_over_after_three_refusals_and_the_socket_comes_back_by_itself(
    fork, start_line, caplog
):
    caplog.set_level(logging.INFO, "agent")
    both = fork(carries)
    both.proxy.refuse = True
    line = start_line(both.url)
    wait_until(lambda: line.poll)
    assert both.proxy.seen[:3] == ["upgrade"] * 3
    assert line_states(line) == ("poll", False, True)
    line.agent.outgoing.spool({"type": "agent_event"})
    wait_until(lambda: both.script.numbers() == [1])
    assert both.proxy.calls("server/poll")

    wait_until(lambda: both.proxy.calls("upgrade") > 4)  # it tries again all the time
    both.proxy.refuse = False
    wait_until(lambda: line.socket)
    assert line_states(line) == ("socket", True, False)
    line.agent.outgoing.spool({"type": "agent_event"})
    wait_until(lambda: both.script.numbers() == [1, 2])
    changes = [r.message for r in caplog.records if r.message.startswith("frames go by")]
    assert len(changes) == 2
    assert "poll" in changes[0] and "502" in changes[0]
    assert "socket" in changes[1]


@pytest.mark.parametrize("act, tries", [(mute, 1), (silent, 3), (drops("greet"), 3)])
def test_the_poll_takes_over_from_sockets_that_carry_nothing(fork, start_line, act, tries):
    both = fork(act)
    line = start_line(both.url, socket_open_s=0.1, socket_retry_s=300)
    wait_until(lambda: line.poll)
    assert both.proxy.seen[:tries] == ["upgrade"] * tries
    line.agent.outgoing.spool({"type": "agent_event"})
    wait_until(lambda: both.script.numbers() == [1])
    assert both.proxy.calls("upgrade") == tries


def test_the_poll_stays_in_use_while_sockets_fail_after_the_greeting(fork, start_line):
    """The poll gives way to each socket that is greeted, and takes over again from it."""
    both = fork(silent)
    line = start_line(both.url, socket_open_s=0.05, socket_retry_s=0.05)
    sent = 0
    while both.proxy.calls("upgrade") < 8:
        sent += 1
        line.agent.outgoing.spool({"type": "agent_event", "n": sent})
        wait_until(lambda: line.agent.store.spool_first() == sent + 1)  # noqa: B023
    assert list(dict.fromkeys(both.script.numbers())) == list(range(1, sent + 1))


def test_a_hub_that_was_away_from_the_poll_too_is_tried_by_socket_at_once(fork, start_line):
    both = fork(carries)
    both.proxy.refuse = True
    line = start_line(both.url, socket_retry_s=300)
    wait_until(lambda: line.poll and line.poll.synced.is_set())
    real, both.poll.port = both.poll.port, 1  # calls find nobody
    line.agent.outgoing.spool({"type": "agent_event"})
    both.proxy.cut()
    for sock in list(both.proxy._sockets):
        both.proxy._end(sock)
    wait_until(lambda: line.poll._down)
    both.proxy.refuse = False
    both.poll.port = real
    wait_until(lambda: line.socket)
    wait_until(lambda: 1 in both.script.numbers())


@pytest.mark.parametrize(
    "act, kind", [(refuses("revoked"), "refused"), (closes(4001, "open"), "superseded")]
)
def test_a_refused_or_superseded_agent_pauses_and_does_not_poll(script, start_line, act, kind):
    hub = script(act, act, carries)
    begun = time.monotonic()
    line = start_line(hub.url)
    wait_until(lambda: line.socket and len(hub.upgrades) == 3)
    assert time.monotonic() - begun >= (0.4 if kind == "superseded" else 0.2)
    assert line.poll is None


# ── real processes ────────────────────────────────────────────────────────────────────────────

QUICK = FAST | {"monitor_s": 0.05, "log_look_s": 0.02, "log_pause_s": 0.02, "resend_s": 2}


class Behind:
    """An agent process that reaches its hub through a proxy."""

    def __init__(self, hub, proxy, folder, **settings):
        self.hub, self.proxy = hub, proxy
        self.process = AgentProcess(hub, folder, "dev")
        config = yaml.safe_load(self.process.config.read_text())
        config |= QUICK | {"hub_url": proxy.url} | settings
        self.process.config.write_text(yaml.safe_dump(config))

    def start(self):
        self.process.start()
        return self

    def log(self):
        return (self.process.folder / "out.log").read_text()

    def changes(self):
        return re.findall(r"frames go by the (\w+)", self.log())

    def carrier(self):
        return self.changes()[-1] if self.changes() else None

    def print(self, lines, pause):
        """A session that prints numbered lines; its id."""
        code = (
            f"import time\nfor n in range({lines}):\n print(f'line {{n:06}}', flush=True)\n"
            f" if n % 50 == 0: time.sleep({pause})"
        )
        order = {"server_id": "dev", "command": [sys.executable, "-S", "-c", code]}
        return self.hub.api("POST", "sessions", order)["id"]

    def seen_at(self):
        return self.hub.api("GET", "servers/dev")["last_heartbeat"]

    def status(self, session_id):
        return self.hub.api("GET", f"sessions/{session_id}")["status"]

    def output(self, session_id):
        data, offset = b"", 0
        while True:
            answer = self.hub.ask("GET", f"sessions/{session_id}/output?offset={offset}")
            assert answer.ok and int(answer.headers["X-Offset"]) == offset, answer.headers
            data += answer.content
            if not answer.content:
                return data
            offset = int(answer.headers["X-Next-Offset"])


@pytest.fixture
def behind(shop, start_proxy, tmp_path):
    made = []

    def start(refuse=False, **settings):
        proxy = start_proxy(shop.settings["port"])
        proxy.refuse = refuse
        made.append(Behind(shop, proxy, tmp_path / f"agent-{len(made)}", **settings))
        return made[-1].start()

    yield start
    for one in made:
        one.process.stop()
        one.process.tmux("kill-server")
        print(one.log())


@pytest.mark.hub(heartbeat_s=0.1)
def test_the_socket_is_preferred_and_carries_the_heartbeats(behind, shop):
    one = behind()
    wait_until(lambda: one.carrier() == "socket")
    for _ in range(2):  # the first may have been on its way when the socket opened
        calls, before = len(one.proxy.seen), one.seen_at()
        wait_until(lambda before=before: one.seen_at() > before)
    session = one.print(10, 0)
    wait_until(lambda: one.status(session) == "closed")
    assert one.proxy.seen[calls:] == []  # not one call
    assert one.proxy.calls("poll") == 0


@pytest.mark.hub(heartbeat_s=0.1)
def test_a_proxy_that_refuses_upgrades_makes_it_poll_until_it_allows_them(behind, shop):
    one = behind(refuse=True)
    wait_until(lambda: one.carrier() == "poll")
    first = one.print(10, 0)
    wait_until(lambda: one.status(first) == "closed")
    beats = one.proxy.calls("heartbeat")
    wait_until(lambda: one.proxy.calls("heartbeat") > beats)
    one.proxy.refuse = False
    wait_until(lambda: one.carrier() == "socket")
    wait_until(lambda: shop.api("GET", "servers/dev")["status"] == "online")
    calls = len(one.proxy.seen)
    second = one.print(10, 0)
    wait_until(lambda: one.status(second) == "closed")
    assert not [path for path in one.proxy.seen[calls:] if "poll" in path]  # one at a time
    assert one.changes() == ["poll", "socket"]


def test_nothing_is_lost_or_doubled_while_carriers_change_and_break(behind, shop):
    one = behind()
    wait_until(lambda: one.carrier() == "socket")
    session = one.print(20_000, 0.02)
    for n in range(3):
        one.proxy.refuse = True
        one.proxy.cut()
        wait_until(lambda n=n: one.changes().count("poll") == n + 1)
        one.print(n, 0)
        one.proxy.refuse = False
        wait_until(lambda n=n: one.changes().count("socket") == n + 2)
        one.proxy.cut()
        wait_until(lambda n=n: one.log().count("connected to") >= 3 * n + 3)
        one.print(n, 0)
    wait_until(lambda: one.status(session) == "closed", 40)
    lines = one.output(session).decode().replace("\r\n", "\n").splitlines()
    assert lines == [f"line {n:06}" for n in range(20_000)]

    every = [s["id"] for s in shop.api("GET", "sessions?all=true")["sessions"]]
    assert len(every) == 7
    wait_until(lambda: all(one.status(each) == "closed" for each in every))
    events = shop.api("GET", "events?limit=500")["events"]
    for each in every:
        kinds = [e["type"] for e in events if e["session_id"] == each]
        assert kinds.count("session_started") == kinds.count("session_closed") == 1, kinds


def restarted(one, shop):
    """Restart the hub; wait until its agent is back, and works."""
    shop.restart()
    wait_until(lambda: one.log().count("connected to") >= 2 and one.carrier() == "socket")
    session = one.print(10, 0)
    wait_until(lambda: one.status(session) == "closed")


def test_a_hub_that_restarts_has_its_agent_back_on_the_socket(behind, shop):
    one = behind(hub_url=shop.url, backoff_max_s=1, socket_open_s=10)
    wait_until(lambda: one.carrier() == "socket")
    restarted(one, shop)
    assert "the hub is away (the hub restarts)" in one.log()
    assert one.changes() == ["socket"]


def test_a_proxy_that_answers_while_the_hub_restarts_does_not_make_it_poll_for_long(behind, shop):
    one = behind(backoff_max_s=0.1, socket_open_s=10, socket_retry_s=300)
    wait_until(lambda: one.carrier() == "socket")
    restarted(one, shop)
    assert one.changes()[-1] == "socket"


def test_a_key_that_was_revoked_is_said_and_not_pressed(behind, shop):
    one = behind(refused_max_s=60)
    wait_until(lambda: one.carrier() == "socket")
    shop.api("POST", "servers/dev/revoke")
    wait_until(lambda: re.search(r"ERROR +.*key", one.log()))
    assert one.proxy.calls("poll") == 0
    assert one.process.process.poll() is None


def test_an_agent_that_stops_says_goodbye_on_the_socket(behind, shop):
    one = behind()
    wait_until(lambda: one.carrier() == "socket")
    session = one.print(100_000, 0.1)
    wait_until(lambda: one.output(session))
    begun = time.monotonic()
    one.process.stop()
    assert time.monotonic() - begun < 2
    assert "INFO    stopped" in one.log()
    wait_until(lambda: one.status(session) == "disconnected")
