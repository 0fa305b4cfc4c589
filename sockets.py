"""How agents reach the hub. Both carriers hand the same frames to the same functions; this file
holds what a connection remembers and the poll, `POST /api/v1/server/poll`."""

import logging
import threading
import time
from collections import OrderedDict

from apiflask import APIBlueprint
from pydantic import BaseModel, Field

import auth
import models
import servers
import wire
from api import server_caller
from auth import Caller
from models import Conflict, Invalid, bus

log = logging.getLogger("orchestratia.sockets")

bp = APIBlueprint("wire", __name__, tag="Agents")

WAIT_MOST_S = 25.0
ANSWERS_KEPT = 16  # a repeated call is among the last few
FRAMES_MOST = 2000


class Poll(BaseModel):
    instance: str = Field(min_length=1, max_length=100)
    seq: int = Field(ge=0)
    wait: float = Field(0, ge=0)
    frames: list[dict] = Field([], max_length=FRAMES_MOST)


class Link:
    """One agent process as the hub sees it: what was sent to it and what it may ask again."""

    def __init__(self, server_id: str, instance: str):
        self.server_id = server_id
        self.instance = instance
        self.inbox = bus.subscribe(f"server:{server_id}")
        self.lock = threading.Lock()
        self.sent: dict[int, float] = {}
        self.heard = time.monotonic()
        self.silent = False
        self.revoked = False
        self._answers: OrderedDict[int, list] = OrderedDict()

    def answered(self, seq: int) -> list | None:
        return self._answers.get(seq)

    def remember(self, seq: int, frames: list) -> None:
        self._answers[seq] = frames
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)

    def take(self, passing: list) -> list[dict]:
        """Frames to send now: `passing` ones, then commands that are due."""
        with self.lock:
            now = time.monotonic()
            return passing + wire.pending_commands(self.server_id, self.sent, now)

    def wait(self, seconds: float) -> list[dict]:
        """Wait until there is something to say, at most so long; the frames."""
        deadline = time.monotonic() + seconds
        while True:
            first = self.inbox.get(max(0.0, min(deadline - time.monotonic(), 5.0)))
            messages = [first, *self.inbox.drain()] if first is not None else []
            self.revoked = self.revoked or "revoked" in messages
            frames = self.take([m for m in messages if isinstance(m, dict)])
            over = time.monotonic() >= deadline or self.inbox.closed
            if frames or over or self.revoked:
                return frames

    def close(self) -> None:
        self.inbox.close()


class Links:
    """The newest connection of each server; an older instance that comes back is turned away."""

    def __init__(self):
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._past: dict[str, OrderedDict[str, None]] = {}

    def get(self, server_id: str, instance: str) -> Link | None:
        """Raises Conflict `superseded` when a newer instance has taken over."""
        with self._lock:
            link = self._links.get(server_id)
            if link and link.instance == instance:
                return link
            if link and not link.silent and instance in self._past.get(server_id, ()):
                raise Conflict(
                    "A newer agent has connected with this server's key: this one steps back. "
                    "Run one agent per state directory.",
                    code="superseded",
                )
            return None

    def open(self, server_id: str, instance: str) -> Link:
        with self._lock:
            old = self._links.get(server_id)
            if old and old.instance != instance:
                past = self._past.setdefault(server_id, OrderedDict())
                past[old.instance] = None
                while len(past) > ANSWERS_KEPT:
                    past.popitem(last=False)
            link = self._links[server_id] = Link(server_id, instance)
        if old:
            old.close()
        return link

    def drop(self, link: Link) -> None:
        with self._lock:
            if self._links.get(link.server_id) is link:
                del self._links[link.server_id]
        link.close()

    def silent(self, seconds: float) -> list[Link]:
        """Links that went silent since they were last asked for."""
        now = time.monotonic()
        with self._lock:
            gone = [x for x in self._links.values() if not x.silent and now - x.heard > seconds]
        for link in gone:
            link.silent = True
        return gone

    def reset(self) -> None:
        with self._lock:
            links, self._links, self._past = list(self._links.values()), {}, {}
        for link in links:
            link.close()


links = Links()


def notice_silence(seconds: float = wire.POLL_SILENCE_S) -> None:
    """Sessions of an agent that has not polled for so long are disconnected."""
    for link in links.silent(seconds):
        wire.disconnected(link.server_id)


@bp.post("/server/poll")
@bp.input(Poll)
def poll(json_data: Poll):
    """The long poll of an agent (protocol 2): frames in, frames out."""
    caller = server_caller()
    servers.alive(caller.server_id)
    link = links.get(caller.server_id, json_data.instance)
    if any(f.get("type") == "sync" for f in json_data.frames):
        repeated = link and link.answered(json_data.seq)
        if repeated is None:
            link = links.open(caller.server_id, json_data.instance)
    if link is None:
        raise Conflict(
            "The hub does not know this agent yet (it was restarted): send auth and sync first.",
            code="sync_required",
        )
    return {"seq": json_data.seq, "frames": _exchange(caller, link, json_data)}


def _exchange(caller: Caller, link: Link, call: Poll) -> list[dict]:
    link.heard = time.monotonic()
    if link.silent:
        link.silent = False
        wire.reconnected(caller.server_id)
    done = link.answered(call.seq)
    if done is not None:
        return done
    if call.frames:
        frames = link.take(receive(caller, call.frames))
    else:
        frames = link.wait(min(call.wait, WAIT_MOST_S))
    if link.revoked:
        links.drop(link)
        frames = []  # the key is not valid any more: the next call is told so
    link.remember(call.seq, frames)
    return frames


def receive(caller: Caller, frames: list[dict]) -> list[dict]:
    """Handle what an agent sent, in order; the frames to answer with."""
    answers, spooled = [], []
    for frame in frames:
        if not isinstance(frame.get("type"), str):
            frame = frame | {"type": ""}  # as good as unknown; its number counts all the same
        if isinstance(frame.get("spool"), int):
            spooled.append(frame)
            continue
        if spooled:
            answers.append(_take(caller, spooled))
            spooled = []
        opening = OPENING.get(frame.get("type"))
        answers += _opened(opening, caller, frame) if opening else wire.take_passing(caller, frame)
    if spooled:
        answers.append(_take(caller, spooled))
    return answers


def _opened(handler, caller: Caller, frame: dict) -> list[dict]:
    try:
        return handler(caller, frame)
    except wire.MALFORMED as broken:
        log.warning("%s: malformed %s", caller.name, frame["type"], exc_info=True)
        raise Invalid(f"The {frame['type']} frame is malformed: {broken!r}.") from broken


def _take(caller: Caller, spooled: list[dict]) -> dict:
    return {"type": "spool_ack", "upto": wire.take_spooled(caller, spooled)}


def _auth(caller: Caller, frame: dict) -> list[dict]:
    wire.greet(caller, frame)
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
        }
    ]


def _sync(caller: Caller, frame: dict) -> list[dict]:
    answer = wire.sync(caller, frame)
    if frame.get("profiles_etag") != profiles.etag:
        answer |= {"profiles": profiles.texts, "profiles_etag": profiles.etag}
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
