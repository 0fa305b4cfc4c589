"""How agents reach the hub: the WebSocket `/ws/server`, and `POST /api/v1/server/poll`.

Both carriers hand the same frames to the same functions; a `Link` is what the hub remembers of a
connection, whichever carrier it is."""

import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from functools import partial

from apiflask import APIBlueprint
from pydantic import BaseModel, Field
from simple_websocket import ConnectionClosed

import auth
import document
import models
import older
import servers
import terminals
import wire
import ws
from api import server_caller
from auth import Caller
from document import answers
from models import Conflict, Forbidden, Invalid, Refused, Unauthorised, bus
from web import loads
from ws import Wire, text_frame

log = logging.getLogger("orchestratia.sockets")

bp = APIBlueprint("wire", __name__, tag="Agents")
sockets = APIBlueprint("agent_socket", __name__, enable_openapi=False)

WAIT_MOST_S = 25.0
ANSWERS_KEPT = 16  # a repeated call is among the last few
FRAMES_MOST = 2000
WAITING_BYTES = 4 * 1024 * 1024  # of frames for the moment that an agent has not taken yet
AGENT_MOST = 32 * 1024 * 1024  # bytes in one message of an agent
HELLO_S = 10.0  # until somebody who connects has said who they are
UNANSWERED = {"log_ack", "spool_ack"}  # nobody waits for what an agent says to these
LINGER_S = 1.0  # a sending thread waits so long for more before it ends


class Poll(BaseModel):
    instance: str = Field(min_length=1, max_length=100)
    seq: int = Field(ge=0)
    wait: float = Field(0, ge=0)
    frames: list[dict] = Field([], max_length=FRAMES_MOST)


# Close codes: what a client should do next is in protocol terms, the sentence goes with it.
REVOKED, SUPERSEDED, MALFORMED, TRY_AGAIN = 4401, 4001, 4400, 1013
CLOSE_CODES = {401: 4401, 403: 4403, 404: 4404, 503: TRY_AGAIN}
ENDS = {Unauthorised: REVOKED, Invalid: MALFORMED}
REVOKED_TEXT = "the key of this server was revoked"


class Link:
    """One agent process as the hub sees it: what waits to be sent to it.

    A reader of the bus: commands in the table announce themselves by a word, frames for the moment
    wait in a bounded queue; one that does not fit is refused, so that nobody's keystrokes are
    dropped from the middle.
    """

    def __init__(self, server_id: str, instance: str):
        self.server_id = server_id
        self.instance = instance
        self.topics = (f"server:{server_id}",)
        self.sent: dict[int, float] = {}
        self.spool_id: str | None = None  # of the numbers its frames carry, once it has said so
        self.heard = time.monotonic()
        self.silent = False
        self.revoked = False
        self.closed = False
        self._waiting: list[dict] = []
        self._bytes = 0
        self._due = True  # commands may wait in the table
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        bus.add(self)

    def put(self, message) -> bool:
        """Take a frame, or a word about what is in the table; whether it was taken."""
        with self._changed:
            if self.closed:
                return False
            if isinstance(message, dict):
                size = len(message.get("data") or message.get("text") or ())
                if len(self._waiting) >= FRAMES_MOST or self._bytes + size > WAITING_BYTES:
                    return False
                self._waiting.append(message)
                self._bytes += size
            else:
                self.revoked = self.revoked or message == "revoked"
                self._due = True
            self._changed.notify_all()
        self.woken()
        return True

    def woken(self) -> None:
        """Called after something was put; the carrier's own business."""

    def acknowledged(self, frames: list[dict]) -> None:
        """Commands were acknowledged among these frames: there may be more than fitted at once."""
        if len(self.sent) >= wire.COMMANDS_AT_ONCE and any(f.get("type") == "ack" for f in frames):
            self.put("look")

    def remind(self, now: float) -> None:
        """Have commands sent again that were not acknowledged in time."""
        if self._due or (self.sent and now - min(self.sent.values()) >= wire.RESEND_S):
            self.put("look")

    def _anything(self) -> bool:
        return bool(self._waiting) or self._due or self.revoked or self.closed

    def take(self) -> list[dict]:
        """Frames to send now: commands that are due, then those of the moment."""
        with self._sending:
            with self._changed:
                due, self._due = self._due, False
            commands = self._commands() if due and not self.revoked else []
            with self._changed:
                moments = list(self._waiting)
                self._waiting.clear()
                self._bytes = 0
            return [*commands, *self._moments(moments)]

    def _commands(self) -> list[dict]:
        try:
            return wire.pending_commands(self.server_id, self.sent, time.monotonic())
        except BaseException:
            self._due = True
            raise

    def _moments(self, frames: list[dict]) -> list[dict]:
        """Frames for the moment as this agent understands them."""
        return frames

    def speaks(self) -> None:
        """Its agent is heard. After a silence its sessions are there again."""
        self.heard = time.monotonic()
        if self.silent:
            self.silent = False
            try:
                wire.reconnected(self.server_id)
            except BaseException:
                self.silent = True
                raise

    def supersede(self) -> None:
        """A newer connection of this server has taken over."""
        self.close()

    def close(self) -> None:
        bus.drop(self)
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class PollLink(Link):
    """An agent that polls: calls come and take what waits.

    seq: of the call that opened it. An agent has one call under way that carries frames and one
    that waits, and numbers them in the order of its making them.
    """

    def __init__(self, server_id: str, instance: str, seq: int):
        super().__init__(server_id, instance)
        self._answers: OrderedDict[int, list] = OrderedDict()
        self._newest = {True: seq, False: seq}  # {whether it carries: number}
        self._waiter = None  # the call that waits; a newer one means that it was cut off

    def is_late(self, seq: int, carries: bool) -> bool:
        """Whether a call was overtaken by one made after it, as a copy is that a proxy or a
        network had kept; nobody waits for its answer."""
        with self._changed:
            if seq in self._answers:
                return False
            late = seq < self._newest[carries]
            self._newest[carries] = max(seq, self._newest[carries])
            return late

    def answered(self, seq: int) -> list | None:
        return self._answers.get(seq)

    def remember(self, seq: int, frames: list) -> None:
        with self._changed:
            self._answers[seq] = frames
            while len(self._answers) > ANSWERS_KEPT:
                self._answers.popitem(last=False)
            self._changed.notify_all()

    def wait(self, seq: int, seconds: float) -> list[dict] | None:
        """Wait until there is something to say, at most so long; the frames. None for a call that
        another has replaced: what there is to say is for that one, whose connection is alive."""
        deadline, waiter = time.monotonic() + seconds, object()
        with self._changed:
            self._waiter = waiter
            self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._anything() or self._waiter is not waiter or seq in self._answers,
                    max(0.0, deadline - time.monotonic()),
                )
                if self._waiter is not waiter:
                    return None
                if seq in self._answers:  # the call it repeats was answered, to nobody
                    return self._answers[seq]
            frames = self.take()
            if frames or self.closed or self.revoked or time.monotonic() >= deadline:
                return frames


class SocketLink(Link):
    """An agent on a WebSocket: what waits is sent at once, by a thread that lives only as long as
    there is something to send, so that idle agents cost no thread of their own."""

    def __init__(self, server_id: str, instance: str, connection: Wire):
        self._connection = connection
        self._busy = True  # until `begin`
        super().__init__(server_id, instance)

    def begin(self) -> None:
        """The agent has been answered: what waits may be sent."""
        self._busy = False
        self.woken()

    def woken(self) -> None:
        with self._changed:
            if self._busy:
                return
            self._busy = True
        threading.Thread(target=self._send_all, name="to an agent", daemon=True).start()

    def _send_all(self) -> None:
        try:
            while frames := self._next():
                if any(frame["type"] not in UNANSWERED for frame in frames):
                    self._connection.expect_answer()
                send(self._connection, frames)
        except ConnectionClosed:
            self._connection.close()
        except Refused as refused:  # the database is busy: the reminder comes round again
            log.warning("commands of %s wait: %s", self.server_id, refused)
            with self._changed:
                self._busy = False

    def _next(self) -> list[dict]:
        """What to send, or nothing: then this thread ends, and the next message starts another."""
        while True:
            frames = self.take()
            if self.revoked:
                self._connection.close(REVOKED, REVOKED_TEXT)
                return []
            if frames:
                return frames
            with self._changed:
                if not self._changed.wait_for(self._anything, LINGER_S) or self.closed:
                    self._busy = False
                    return []

    def answer(self, caller: Caller, texts: list[str | bytes]) -> None:
        """Handle messages, and send what they are answered with. Raises Invalid for one that is no
        frame."""
        frames = [_frame(text) for text in texts]
        for part in _up_to_pings(frames):
            send(self._connection, receive(caller, part, self.spool_id))
        self.acknowledged(frames)

    def supersede(self) -> None:
        self.close()
        self._connection.close(SUPERSEDED, "a newer connection of this server has taken over")


class OlderLink(SocketLink):
    """A public daemon on its WebSocket: the same, in the older form."""

    def __init__(self, daemon: older.Daemon, connection: Wire):
        self._daemon = daemon
        super().__init__(daemon.server_id, str(uuid.uuid4()), connection)

    def put(self, message) -> bool:
        if message == "announced":
            self._daemon.announced()
        return super().put(message)

    def remind(self, now: float) -> None:
        if self._daemon.due(now):
            self.put("look")
        super().remind(now)

    def _commands(self) -> list[dict]:
        try:
            self._daemon.settle(time.monotonic())
            if self.closed or not self._daemon.listening:
                return []
            return self._daemon.commands(super()._commands())
        except BaseException:
            self._due = True
            raise

    def _moments(self, frames: list[dict]) -> list[dict]:
        return self._daemon.moments(frames)

    def answer(self, caller: Caller, texts: list[str | bytes]) -> None:
        """A message that is no frame is passed over: the daemon would only come again."""
        for text in texts:
            try:
                frame = _frame(text)
            except Invalid as invalid:
                log.warning("%s: %s", caller.name, invalid)
            else:
                send(self._connection, self._daemon.receive(frame))


class Links:
    """The newest connection of each server; an older instance that comes back is turned away."""

    def __init__(self):
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._past: dict[str, OrderedDict[str, None]] = {}

    def count(self) -> int:
        """How many agents have a connection."""
        with self._lock:
            return len(self._links)

    def by_poll(self) -> set[str]:
        """The servers whose agent polls just now."""
        with self._lock:
            links = list(self._links.values())
        return {x.server_id for x in links if isinstance(x, PollLink) and not x.silent}

    def polling(self, server_id: str, instance: str) -> PollLink | None:
        """The link of an agent that polls; None when it has to begin anew.

        Raises Conflict `superseded` when a newer instance has taken over.
        """
        with self._lock:
            link = self._links.get(server_id)
            if link and link.instance == instance:
                return link if isinstance(link, PollLink) else None
            if link and not link.silent and instance in self._past.get(server_id, ()):
                raise Conflict(
                    "A newer agent has connected with this server's key: this one steps back. "
                    "Run one agent per state directory.",
                    code="superseded",
                )
            return None

    def open(self, link: Link) -> None:
        """Make `link` its server's connection; an older one is closed."""
        with self._lock:
            old = self._links.get(link.server_id)
            if old and old.instance != link.instance:
                past = self._past.setdefault(link.server_id, OrderedDict())
                past[old.instance] = None
                while len(past) > ANSWERS_KEPT:
                    past.popitem(last=False)
            self._links[link.server_id] = link
        if old:
            old.supersede()

    def drop(self, link: Link) -> bool:
        """Forget a link that has ended; whether it still was its server's connection."""
        with self._lock:
            current = self._links.get(link.server_id) is link
            if current:
                del self._links[link.server_id]
        link.close()
        return current

    def silent(self, seconds: float) -> list[Link]:
        """Polling links that went silent since they were last asked for."""
        now = time.monotonic()
        with self._lock:
            polling = [x for x in self._links.values() if isinstance(x, PollLink)]
            gone = [x for x in polling if not x.silent and now - x.heard > seconds]
        for link in gone:
            link.silent = True
        return gone

    def hush(self, server_id: str) -> None:
        """A server was called offline while its connection stands, as when a network swallows what
        is sent: its sessions are there again once it speaks."""
        with self._lock:
            if link := self._links.get(server_id):
                link.silent = True

    def remind(self) -> None:
        now = time.monotonic()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.remind(now)

    def reset(self) -> None:
        with self._lock:
            links, self._links, self._past = list(self._links.values()), {}, {}
        for link in links:
            link.close()


links = Links()


def notice_silence(seconds: float = wire.POLL_SILENCE_S) -> None:
    """Sessions of an agent that has not polled for so long are disconnected."""
    for link in links.silent(seconds):
        wire.disconnected(link.server_id, partial(getattr, link, "silent"))


# ── the poll ──────────────────────────────────────────────────────────────────────────────────


class Polled(document.Answer):
    seq: int
    frames: list[dict]


@bp.post("/server/poll")
@bp.input(Poll)
@answers(Polled)
def poll(json_data: Poll):
    """The long poll of an agent (protocol 2): frames in, frames out."""
    caller = server_caller()
    servers.alive(caller.server_id)
    link = links.polling(caller.server_id, json_data.instance)
    if link and link.is_late(json_data.seq, bool(json_data.frames)):
        raise Conflict(
            "This call came after later ones of this agent, so nothing of it was done: send auth "
            "and sync first.",
            code="sync_required",
        )
    said = {f["type"]: f for f in json_data.frames if f.get("type") in ("auth", "sync")}
    syncing = "sync" in said
    if syncing and not (link and link.answered(json_data.seq) is not None):
        _opened(wire.refuse_late, caller, said["sync"])
        link = PollLink(caller.server_id, json_data.instance, json_data.seq)
        link.spool_id = wire.spool_id_of(said["auth"]) if "auth" in said else None
        links.open(link)
    if link is None:
        raise Conflict(
            "The hub does not know this agent yet (it was restarted): send auth and sync first.",
            code="sync_required",
        )
    frames = _exchange(caller, link, json_data)
    if syncing:
        terminals.streams.server_back(caller.server_id)
    return {"seq": json_data.seq, "frames": frames}


def _exchange(caller: Caller, link: PollLink, call: Poll) -> list[dict]:
    link.speaks()
    done = link.answered(call.seq)
    if done is not None:
        return done
    link.remind(link.heard)
    if call.frames:
        frames = receive(caller, call.frames, link.spool_id)
        link.acknowledged(call.frames)
        frames += link.take()
    else:
        frames = link.wait(call.seq, min(call.wait, WAIT_MOST_S))
        if frames is None:
            return []
    if link.revoked:
        links.drop(link)
        frames = []  # the key is not valid any more: the next call is told so
    link.remember(call.seq, frames)
    return frames


# ── the socket ────────────────────────────────────────────────────────────────────────────────


@ws.route(sockets, "/ws/server")
def agent_socket(connection: Wire):
    """An agent's WebSocket: the same frames as the poll's, as they come, or those of the older
    form."""
    caller, hello = _greeted(connection)
    if caller:
        connection.allow(AGENT_MOST)
        connection.stay_in_background()
        return partial(_serve, connection, caller, hello)


def _serve(connection: Wire, caller: Caller, hello: dict) -> None:
    """hello: the auth frame, of either form."""
    link = None
    try:
        if hello.get("protocol") != 2:
            link = _joined_older(connection, caller)
        else:
            link = _joined(connection, caller, hello, _frame(connection.receive()))
        while True:
            _exchange_next(connection, caller, link)
    except Refused as refused:
        log.warning("%s: %.300s", caller.name, refused)
        connection.close(ENDS.get(type(refused), TRY_AGAIN), str(refused))
    finally:
        if link and links.drop(link) and not ws.stopping():
            _disconnected(caller)


def _disconnected(caller: Caller) -> None:
    try:
        wire.disconnected(caller.server_id)
    except Refused as refused:  # its silence will be noticed
        log.warning("%s: %s", caller.name, refused)


def _exchange_next(connection: Wire, caller: Caller, link: SocketLink) -> None:
    """Handle what an agent sends next, and answer. (In a function of its own, or the last
    messages would be held until others come.)"""
    texts = connection.receive_all()
    if link.revoked:  # they may not have read that yet
        raise Unauthorised(REVOKED_TEXT)
    servers.alive(caller.server_id)
    link.speaks()
    link.answer(caller, texts)


def _greeted(connection: Wire) -> tuple[Caller | None, dict]:
    """Who connects, and with which words; nobody when they were turned away."""
    text = connection.receive(HELLO_S)
    try:
        frame = _frame(text or "{}")
        if frame.get("type") != "auth":
            raise Invalid(f"No auth frame came within {HELLO_S:g} s: send one first.")
        caller = auth.by_key(str(frame.get("api_key") or ""))
        if caller.kind != "server":
            raise Forbidden("This is for servers: send the server's key.")
        if frame.get("protocol") not in (None, 1, 2):
            raise Invalid("This hub speaks protocol 2 here: update the hub.", code="protocol")
        older_form = frame.get("protocol") != 2
        answers = [] if older_form else _opened(_welcome, caller, frame)
    except Refused as refused:
        send(connection, [{"type": "auth_error", "detail": str(refused), "code": refused.code}])
        connection.close(CLOSE_CODES.get(refused.status, MALFORMED), str(refused))
        return None, {}
    send(connection, answers)
    return caller, frame


def _joined(connection: Wire, caller: Caller, hello: dict, frame: dict) -> SocketLink:
    """Take the sync of a new connection; it is its server's connection from now on."""
    if frame.get("type") != "sync":
        raise Invalid("The second frame must be sync.")
    servers.alive(caller.server_id)
    _opened(wire.refuse_late, caller, frame)
    link = SocketLink(caller.server_id, str(hello.get("instance") or ""), connection)
    link.spool_id = wire.spool_id_of(hello)

    def agree():
        wire.greet(caller, hello)
        send(connection, _opened(_sync, caller, frame))

    _open(link, caller, agree)
    return link


def _joined_older(connection: Wire, caller: Caller) -> OlderLink:
    """A connection without sync is its server's at once: before it is welcomed, since what comes
    then, by HTTP too, is about it."""
    servers.alive(caller.server_id)
    daemon = older.Daemon(caller)
    link = OlderLink(daemon, connection)

    def welcome():
        send(connection, [{"type": "auth_ok"}])
        daemon.greet()

    _open(link, caller, welcome)
    return link


def _open(link: SocketLink, caller: Caller, greet) -> None:
    """Make the link its server's connection. It hears of a new key from its making on: one that
    came before is seen here."""
    if auth.again(caller) is None:
        link.close()
        raise Unauthorised(REVOKED_TEXT)
    links.open(link)
    try:
        greet()
    except BaseException:
        links.drop(link)
        raise
    link.begin()
    terminals.streams.server_back(caller.server_id)


def _frame(text: str | bytes) -> dict:
    """A frame from its text. Raises Invalid."""
    try:
        frame = loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict):
        raise Invalid("A message is not a JSON object.")
    return frame


def _up_to_pings(frames: list[dict]):
    """The frames in parts: before a ping is answered, what came before it has been."""
    part = []
    for frame in frames:
        if frame.get("type") == "ping":
            yield part
            part = []
        part.append(frame)
    yield part


def send(connection: Wire, frames: list[dict]) -> None:
    """Send frames, each a message of its own. Raises ConnectionClosed."""
    if frames:
        texts = (json.dumps(frame, separators=(",", ":")) for frame in frames)
        connection.send_encoded(b"".join(text_frame(text.encode()) for text in texts))


# ── frames ────────────────────────────────────────────────────────────────────────────────────


def receive(caller: Caller, frames: list[dict], spool_id: str | None = None) -> list[dict]:
    """Handle what an agent sent, in order; the frames to answer with.

    spool_id: of the connection they came by, if it has said so.
    """
    answers, spooled = [], []
    for frame in frames:
        if not isinstance(frame.get("type"), str):
            frame = frame | {"type": ""}  # as good as unknown; its number counts all the same
        if isinstance(frame.get("spool"), int):
            spooled.append(frame)
            continue
        if spooled:
            answers.append(_take(caller, spooled, spool_id))
            spooled = []
        opening = OPENING.get(frame.get("type"))
        answers += _opened(opening, caller, frame) if opening else wire.take_passing(caller, frame)
    if spooled:
        answers.append(_take(caller, spooled, spool_id))
    return answers


def _opened(handler, caller: Caller, frame: dict) -> list[dict]:
    try:
        return handler(caller, frame)
    except wire.MALFORMED as broken:
        log.warning("%s: malformed %s: %.300r", caller.name, frame["type"], broken)
        raise Invalid(f"The {frame['type']} frame is malformed: {broken!r:.200}.") from broken


def _take(caller: Caller, spooled: list[dict], spool_id: str | None) -> dict:
    return {"type": "spool_ack", "upto": wire.take_spooled(caller, spooled, spool_id)}


def _auth(caller: Caller, frame: dict) -> list[dict]:
    wire.greet(caller, frame)
    return _welcome(caller, frame)


def _welcome(caller: Caller, frame: dict) -> list[dict]:
    """What an auth frame is answered with; on a socket it is taken note of with the sync."""
    wire.spool_of(frame)  # before it is welcome
    return [
        {
            "type": "auth_ok",
            "protocol": 2,
            "server_id": caller.server_id,
            "server_name": caller.name,
            "hub_epoch": models.epoch(),
            "time": models.iso(time.time()),
            "heartbeat_s": servers.HEARTBEAT_S,
            "lost_after_s": servers.LOST_AFTER_S,
            "synced": wire.synced(caller.server_id),
        }
    ]


def _sync(caller: Caller, frame: dict) -> list[dict]:
    answer = wire.sync(caller, frame)
    if frame.get("profiles_etag") != profiles.etag:
        answer |= {"profiles": profiles.texts, "profiles_etag": profiles.etag}
    kept = wire.rules_of(caller.server_id)
    if frame.get("rules_etag") != kept["etag"]:
        answer["rules"] = kept
    return [answer]


OPENING = {"auth": _auth, "sync": _sync}


class _Profiles:
    """The coding agents' profiles as the hub hands them to every agent that connects."""

    def __init__(self):
        self.texts: dict[str, str] = {}
        self.etag = ""

    def load(self, folder) -> None:
        self.texts = {p.stem: p.read_text() for p in sorted(folder.glob("*.yaml"))}
        self.etag = auth.digest(models.dumps(self.texts))[:16]


profiles = _Profiles()
