"""Terminals as people watch them: the live picture of each session that somebody looks at.

An agent sends the redraw stream of a session only while it is watched. It is kept here as a short
ring of encoded frames with offsets of their own, from which every watcher reads at their own pace:
one who was away for a moment goes on where they were, one who is new or too slow begins at a
repaint. Nothing here is the record of a session; that is its log.
"""

import logging
import secrets
import threading
import time
from base64 import b64encode
from binascii import a2b_base64
from collections import deque

import auth
import cascade
import sessions
from auth import Caller, require
from models import Conflict, Refused, Unauthorised, bus, dumps, one

log = logging.getLogger("orchestratia.terminals")

RING_BYTES = 512 * 1024  # of a session's redraws: several screens, or seconds of a flood
REPAINT_AGAIN_S = 3.0  # a repaint that does not come is asked for again after this
SKIP_S = 2.0  # a watcher that is too slow begins anew at most this often
LINGER_S = 15.0  # a session nobody watches any more stays watched: a reload is no repaint
LAST_BYTES = 128 * 1024  # of the log of a session that has ended, shown in place of a picture
BATCH_BYTES = 64 * 1024  # of frames a watcher is given at once
CHUNK_MOST = 64 * 1024  # bytes in one frame of an agent
SIZE_MOST = 500  # columns or rows
NOTES_MOST = 100  # that wait for a watcher; the oldest go first


class Chunk:
    """A piece of the stream, encoded once for all who read it."""

    __slots__ = ("fresh", "offset", "repaint", "size", "text")

    def __init__(self, offset: int, size: int, data: str, repaint: bool, again: bool):
        self.offset = offset
        self.size = size
        self.repaint = repaint
        self.text = _output(data, offset, again)  # for who has seen all before it
        self.fresh = _output(data, offset, True) if repaint else None  # for who begins here

    @property
    def end(self) -> int:
        return self.offset + self.size


def _output(data: str, offset: int, repaint: bool) -> bytes:
    flag = ',"repaint":true' if repaint else ""
    return f'{{"type":"output","data":"{data}","offset":{offset}{flag}}}'.encode()


class Stream:
    """The live picture of one session, and who watches it.

    A reader of the bus: any message on its topic means that something about the session changed.
    """

    def __init__(self, session: dict):
        self.session_id = session["id"]
        self.server_id = session["server_id"]
        self.topics = (f"session:{self.session_id}",)
        self.lock = threading.Lock()
        self.watchers: set[Watcher] = set()
        self.owner: Watcher | None = None
        self.left_at = 0.0
        # A random start: an offset of another life of this stream is not taken for one of ours.
        self.end = secrets.randbelow(2**50)
        self._chunks: deque[Chunk] = deque()
        self._bytes = 0
        self._first = 0  # number of the oldest chunk kept
        self._painted: int | None = None  # number of the newest chunk that is a repaint
        self._torn = True  # what comes next does not follow what was there
        self._asked_at = 0.0

    def put(self, _message) -> bool:
        with self.lock:
            watchers = list(self.watchers)
        for watcher in watchers:
            watcher.look()
        return True

    def close(self) -> None:
        """The hub stops; the watchers' connections are closed by themselves."""

    # ── what the agent sends ──────────────────────────────────────────────────────────────────

    def add(self, data: str, repaint: bool) -> None:
        """The next piece of the stream, base64-coded. Raises ValueError when it is not."""
        size = len(a2b_base64(data, strict_mode=True))
        if size > CHUNK_MOST:
            raise ValueError(f"{size} bytes of output at once, the most is {CHUNK_MOST}")
        with self.lock:
            if self._torn and not repaint:
                return  # the rest of a stream whose beginning nobody has
            chunk = Chunk(self.end, size, data, repaint, again=self._torn)
            self._torn = self._torn and not repaint
            self._chunks.append(chunk)
            self.end, self._bytes = chunk.end, self._bytes + size
            if repaint:
                self._painted = self._first + len(self._chunks) - 1
                self._asked_at = 0.0
            while self._bytes > RING_BYTES and len(self._chunks) > 1:
                self._bytes -= self._chunks.popleft().size
                self._first += 1
            if self._painted is not None and self._painted < self._first:
                self._painted = None
            watchers = list(self.watchers)
        for watcher in watchers:
            watcher.wake()

    def tear(self) -> None:
        """The agent's connection is new: what it sends from now on follows nothing."""
        with self.lock:
            self._torn, self._painted = True, None
            wanted = bool(self.watchers)
        if wanted:
            self.ask()

    def alive(self) -> None:
        """The session has begun, or is back: what could not be asked of it before is asked now."""
        with self.lock:
            waits = self._painted is None and any(w.next is None for w in self.watchers)
            owner = self.owner
        if waits:
            self.ask()
        if owner:
            owner.apply_size()

    def resized(self) -> None:
        """Pictures of the old size are no beginning for anybody."""
        with self.lock:
            self._painted = None

    def ask(self, on: bool = True) -> None:
        """Ask the agent for a repaint, or to stop sending."""
        self._asked_at = time.monotonic() if on else 0.0
        frame = {"type": "session_watch", "session_id": self.session_id, "on": on}
        bus.publish(f"server:{self.server_id}", frame)

    # ── what watchers read ────────────────────────────────────────────────────────────────────

    def place(self, watcher: "Watcher", offset: int | None) -> None:
        """Have the watcher go on at `offset` if that is known here, else begin at a repaint."""
        with self.lock:
            watcher.next, watcher.fresh, watcher.began_at = self._number_of(offset), False, 0.0
            if watcher.next is None:
                watcher.next, watcher.fresh = self._painted, True
            watcher.offset = None if watcher.fresh else offset

    def _number_of(self, offset: int | None) -> int | None:
        if offset is None or self._torn:
            return None
        if offset == self.end:
            return self._first + len(self._chunks)
        numbered = enumerate(self._chunks, self._first)
        return next((n for n, chunk in numbered if chunk.offset == offset), None)

    def read(self, watcher: "Watcher") -> list[bytes]:
        """The frames a watcher has not seen, about BATCH_BYTES at most."""
        with self.lock:
            if watcher.next is not None and watcher.next < self._first:
                watcher.next, watcher.fresh = None, True  # too slow: what comes next is gone
            if watcher.next is None:
                if self._painted is None or not watcher.may_begin():
                    return []
                watcher.next, watcher.fresh = self._painted, True
            frames, taken = [], 0
            while watcher.next < self._first + len(self._chunks) and taken < BATCH_BYTES:
                chunk = self._chunks[watcher.next - self._first]
                frames.append(watcher.frame_of(chunk))
                taken += chunk.size
                watcher.next += 1
            return frames

    def wake_waiting(self) -> None:
        """Those who wait for a repaint may begin at one that is there."""
        with self.lock:
            waiting = [w for w in self.watchers if w.next is None]
        for watcher in waiting:
            watcher.wake()

    def needs_repaint(self, now: float) -> bool:
        """Whether somebody waits for a repaint that has not been asked for lately."""
        with self.lock:
            waiting = any(w.next is None and w.may_begin() for w in self.watchers)
            return waiting and self._painted is None and now - self._asked_at > REPAINT_AGAIN_S


class Watcher:
    """One person (or script) at one session: what they were shown, what they may do.

    `frames()` is called by one thread; everything else by any.
    """

    def __init__(self, caller: Caller, ref: str):
        """Raises NotFound and Forbidden."""
        session = sessions.get_session(caller, ref)
        require(caller, "session.watch", session["project_id"], "session")
        self.caller = caller
        self.session_id = session["id"]
        self.project_id = session["project_id"]
        self.topics = ("access",)
        self.next: int | None = None  # number of the chunk to be shown next
        self.fresh = True  # it is to be shown as a repaint
        self.offset: int | None = None  # behind the last byte they have
        self.began_at = 0.0  # when they last began at a repaint
        self.size: tuple[int, int] | None = None  # what their window would hold
        self.ended = False  # the session is over, and they have been told
        self.left = False  # they are gone
        self._notes: deque[dict] = deque(maxlen=NOTES_MOST)
        self._history: bytes | None = None  # the scrollback they have asked for, the newest
        self._said: dict[str, dict] = {}
        self._looked = True
        self._access = False
        self._ready = threading.Event()
        self._ready.set()
        self.stream = streams.join(self, session)
        bus.add(self)

    # ── being woken ───────────────────────────────────────────────────────────────────────────

    def put(self, _message) -> bool:
        """Rights were changed somewhere: ours are looked up again."""
        self._access = True
        return self.look()

    def look(self) -> bool:
        """Something about the session has changed."""
        self._looked = True
        self._ready.set()
        return True

    def wake(self) -> None:
        self._ready.set()

    def close(self) -> None:
        self.left = True
        self._ready.set()
        bus.drop(self)
        streams.leave(self)

    # ── what is shown ─────────────────────────────────────────────────────────────────────────

    def frames(self, timeout: float) -> list[bytes]:
        """What to send next, waiting for it at most `timeout` seconds; `ended` when that was all.

        Raises Unauthorised or Forbidden when the right to watch is gone.
        """
        self._ready.wait(timeout)
        self._ready.clear()
        self._check_rights()
        frames = [dumps(note).encode() for note in self._news()]
        history, self._history = self._history, None
        frames += [history] if history else []
        frames += self.stream.read(self)
        if frames:
            self._ready.set()  # there may be more
        return frames

    def _check_rights(self) -> None:
        if not self._access:
            return
        caller = auth.again(self.caller)
        if caller is None:
            raise Unauthorised("You have been signed out: sign in again.")
        require(caller, "session.watch", self.project_id, "session")
        self.caller, self._access = caller, False
        self._looked = True

    def _news(self) -> list[dict]:
        """Notes for this watcher, and what has changed about the session."""
        notes = []
        if self._looked:
            self._looked = False
            notes = self._standing()
        while self._notes:
            notes.append(self._notes.popleft())
        return notes

    def _standing(self) -> list[dict]:
        session = one("SELECT * FROM session WHERE id = ?", (self.session_id,))
        server = one("SELECT name, online FROM server WHERE id = ?", (session["server_id"],))
        owner = self.stream.owner
        found = [
            {
                "type": "state",
                "session_id": session["id"],
                "name": session["name"],
                "status": session["state"],
                "activity": session["activity"],
                "reason": session["reason"],
                "role": session["role"],
                "server_name": server["name"],
                "server_online": bool(server["online"]),
                "connected": bus.heard(f"server:{session['server_id']}"),
                "terminal": session["terminal"],
                "may_type": auth.can(self.caller, "session.type", session["project_id"]),
            },
            {
                "type": "size",
                "cols": session["cols"],
                "rows": session["rows"],
                "owner": owner.caller.name if owner else None,
                "yours": owner is self,
            },
        ]
        news = [frame for frame in found if self._said.get(frame["type"]) != frame]
        self._said |= {frame["type"]: frame for frame in news}
        if session["state"] in ("closed", "failed"):
            news += self._last_words(session)
        return news

    def _last_words(self, session: dict) -> list[dict]:
        self.ended = True
        closed = {"type": "closed", "exit_code": session["exit_code"]}
        if self.offset is not None:
            return [closed]
        end = sessions.logs().end(session["id"])
        start = max(session["log_start"], end - LAST_BYTES)
        data, _ = sessions.logs().read(session["id"], start, LAST_BYTES)[:2]
        picture = {"type": "output", "data": b64encode(data).decode(), "offset": start}
        return [picture | {"repaint": True}, closed]

    def note(self, frame: dict) -> None:
        """Say something to this watcher alone."""
        self._notes.append(frame)
        self._ready.set()

    def show_history(self, frame: bytes) -> None:
        """Show the scrollback, in place of an older one that was not sent yet."""
        self._history = frame
        self._ready.set()

    # ── where they are (the stream holds its lock) ────────────────────────────────────────────

    def may_begin(self) -> bool:
        return time.monotonic() - self.began_at > SKIP_S

    def frame_of(self, chunk: Chunk) -> bytes:
        fresh, self.fresh = self.fresh, False
        before, self.offset = self.offset, chunk.end
        if not fresh:
            return chunk.text
        self.began_at = time.monotonic()
        skipped = chunk.offset - before if before is not None else 0
        return chunk.fresh[:-1] + f',"skipped":{skipped}}}'.encode() if skipped > 0 else chunk.fresh

    # ── what they do ──────────────────────────────────────────────────────────────────────────

    def act(self, frame: dict) -> None:
        """Carry out what the watcher sent; a refusal is said to them and changes nothing.

        Raises Unauthorised or Forbidden when the right to watch is gone.
        """
        self._check_rights()
        kind = frame.get("type")
        handler = ACTS.get(kind) if isinstance(kind, str) else None
        if handler is None:
            return
        try:
            handler(self, frame)
        except Refused as refused:
            self.note({"type": "error", "detail": str(refused), "code": refused.code})
        except (KeyError, TypeError, ValueError, OverflowError) as broken:
            detail = f"The {kind} message is malformed: {broken!r}."
            self.note({"type": "error", "detail": detail, "code": "invalid"})

    def _resume(self, frame: dict) -> None:
        offset = frame.get("offset")
        if offset is not None and not isinstance(offset, int):
            raise ValueError("`offset` is a whole number or null")
        self.stream.place(self, offset)
        self._ready.set()

    def _input(self, frame: dict) -> None:
        sessions.type_raw(self.caller, self.session_id, frame["data"])

    def _resize(self, frame: dict) -> None:
        self.size = _size_of(frame)
        require(self.caller, "session.type", self.project_id, "session")
        if streams.own(self, take=False):
            self.apply_size()

    def _take_size(self, frame: dict) -> None:
        require(self.caller, "session.type", self.project_id, "session")
        if "cols" in frame:
            self.size = _size_of(frame)
        streams.own(self, take=True)
        self.apply_size()

    def apply_size(self) -> None:
        """Give the session the size of this watcher's window; later, when it is away now."""
        if self.size:
            try:
                sessions.resize(self.caller, self.session_id, *self.size)
            except Conflict as away:
                log.debug("not resized yet: %s", away)
            else:
                self.stream.resized()

    def _scrollback(self, _frame: dict) -> None:
        streams.want_scrollback(self)


ACTS = {
    "resume": Watcher._resume,
    "input": Watcher._input,
    "resize": Watcher._resize,
    "take_size": Watcher._take_size,
    "scrollback": Watcher._scrollback,
}


def _size_of(frame: dict) -> tuple[int, int]:
    cols, rows = int(frame["cols"]), int(frame["rows"])
    if not (1 < cols <= SIZE_MOST and 1 < rows <= SIZE_MOST):
        raise ValueError(f"a terminal has 2 to {SIZE_MOST} columns and rows")
    return cols, rows


class Streams:
    """The sessions that are watched just now."""

    def __init__(self):
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self._asking: dict[str, set[Watcher]] = {}
        self.topics = ("events",)

    def count(self) -> int:
        """How many sessions are watched."""
        with self._lock:
            return len(self._streams)

    def join(self, watcher: Watcher, session: dict) -> Stream:
        with self._lock:
            if not self._streams:
                bus.add(self)
            stream = self._streams.get(session["id"])
            if stream is None:
                stream = self._streams[session["id"]] = Stream(session)
                bus.add(stream)
            with stream.lock:
                stream.watchers.add(watcher)
        if session["state"] in cascade.SESSION_LIVE and stream.needs_repaint(time.monotonic()):
            stream.ask()
        return stream

    def leave(self, watcher: Watcher) -> None:
        stream = watcher.stream
        with self._lock:
            self._asking.get(watcher.session_id, set()).discard(watcher)
        with stream.lock:
            stream.watchers.discard(watcher)
            stream.left_at = time.monotonic()
            if stream.owner is not watcher:
                return
            stream.owner = None
        stream.put("look")

    def own(self, watcher: Watcher, *, take: bool) -> bool:
        """Make the watcher owner of the size if nobody is, or whoever is with `take`; whether
        they are it now."""
        stream = watcher.stream
        with stream.lock:
            before = stream.owner
            if before is None or take:
                stream.owner = watcher
            owns = stream.owner is watcher
        if stream.owner is not before:
            stream.put("look")
        return owns

    def put(self, event) -> bool:
        """An event was committed: whoever watches the session, or one of that server, looks."""
        if isinstance(event, dict):
            for stream in self._touched(event):
                stream.put("look")
                if event["type"] == "session_active":
                    stream.alive()
        return True

    def _touched(self, event: dict) -> list[Stream]:
        with self._lock:
            if event["session_id"]:
                stream = self._streams.get(event["session_id"])
                return [stream] if stream else []
            if event["type"].startswith("server_"):
                return [s for s in self._streams.values() if s.server_id == event["server_id"]]
            return []

    def close(self) -> None:
        """The hub stops; the watchers' connections are closed by themselves."""

    def output(self, server_id: str, frame: dict) -> None:
        """A piece of the live stream of a session on that server. Raises ValueError, KeyError."""
        stream = self._of(server_id, frame["session_id"])
        if stream:
            stream.add(frame["data"], bool(frame.get("repaint")))

    def _of(self, server_id: str, session_id: str) -> Stream | None:
        stream = self._streams.get(session_id)
        return stream if stream and stream.server_id == server_id else None

    def want_scrollback(self, watcher: Watcher) -> None:
        """Have the agent send the session's whole history to this watcher. Raises Conflict."""
        with self._lock:
            self._asking.setdefault(watcher.session_id, set()).add(watcher)
        sessions.ask_scrollback(watcher.caller, watcher.session_id)

    def scrollback(self, server_id: str, frame: dict) -> None:
        """Lines an agent sent, for those who asked for them."""
        if not self._of(server_id, frame["session_id"]):
            return
        lines = frame["lines"]
        if not isinstance(lines, list):
            raise ValueError("`lines` is a list")
        with self._lock:
            asking = self._asking.pop(frame["session_id"], None)
        if not asking:
            return
        shown = dumps({"type": "scrollback", "lines": [str(line) for line in lines]}).encode()
        for watcher in asking:
            watcher.show_history(shown)

    def server_back(self, server_id: str) -> None:
        """The agent has connected anew: it has to be told again what is watched."""
        with self._lock:
            streams = [s for s in self._streams.values() if s.server_id == server_id]
        for stream in streams:
            stream.tear()
            stream.put("look")

    def sweep(self, now: float) -> None:
        """Let go of what nobody watches any more, and ask again for repaints that did not come."""
        with self._lock:
            streams = list(self._streams.values())
            gone = [s for s in streams if not s.watchers and now - s.left_at > LINGER_S]
            for stream in gone:
                del self._streams[stream.session_id]
                self._asking.pop(stream.session_id, None)
                bus.drop(stream)
            if not self._streams:
                bus.drop(self)
        for stream in gone:
            stream.ask(on=False)
        for stream in streams:
            if stream.needs_repaint(now):
                stream.ask()
            stream.wake_waiting()

    def reset(self) -> None:
        with self._lock:
            streams, self._streams = list(self._streams.values()), {}
            self._asking.clear()
            for reader in (*streams, self):
                bus.drop(reader)


streams = Streams()
