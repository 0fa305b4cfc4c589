"""The older form of `/ws/server` (protocol 1), which the public daemon speaks: its frames, from and
into those of `wire`.

It has no acknowledgements and no replay, and it does not say what it cannot do. So a command counts
as taken before it is written and is never written twice; what must be answered is waited for a
while; and what the daemon does not announce after it has connected is gone. A frame with a wrong
field costs it the connection, so every field is made sure of here.
"""

import logging
import re
import shlex
import threading
import time
from base64 import b64decode, b64encode

import cascade
import moves
import nudges
import routing
import sessions
import terminals
import wire
from auth import Caller
from models import Busy, Refused, bus, execute, loads, one, rows, transaction

log = logging.getLogger("orchestratia.older")

START_S = 15.0  # a session that was not started by then is given up
CLOSE_S = 15.0  # one that was not closed by then is taken for closed
# The daemon announces its sessions, then asks for its grants by HTTP (10 s at most), then listens.
ANNOUNCED_S = 2.0  # after it has asked, for announcements still on their way
ANNOUNCED_MOST_S = 15.0  # in case it does not ask
INPUT_BYTES = 384 * 1024  # in one frame; the daemon takes less than 1 MiB, base64-coded
PIECE_BYTES = 32 * 1024  # of output, stored and shown at once
NAME_MOST = 200
PATH_MOST = 4096
SIZE_LEAST = 2
KNOWN_MOST = 10_000  # ids remembered of one connection
DROPPED = "the connection was down"

# What the client of tmux has set when it was attached; the rest it says with every redraw.
ATTACHED = b"\x1b[?1049h\x1b[?1h\x1b="
# A terminal's answer to "which one are you"; the daemon keeps only the primary ones to itself.
DEVICE_ANSWER = re.compile(rb"\x1b\[>[0-9;]*c")

ROLES = {"orchestrator": "orchestrator"}
AGENT_TYPES = {
    "claude": "claude_code",
    "gemini": "gemini_cli",
    "codex": "codex_cli",
    "aider": "aider",
    "cursor": "cursor",
}

# ── one connection ────────────────────────────────────────────────────────────────────────────


class Daemon:
    """What the hub knows of one connection of a public daemon.

    `receive` is called by the connection's reader, the rest by whoever sends.
    """

    def __init__(self, caller: Caller):
        self.caller = caller
        self.server_id = caller.server_id
        self.listening = False  # it has announced its sessions and reads what it is told
        self._announced_at = time.monotonic() + ANNOUNCED_MOST_S
        self._named: set[str] = set()  # sessions it has announced
        self._names: dict[str, str] = {}  # {tmux name: session id} of those it knows by that name
        self._known: dict[str, str | None] = {}  # {session id: terminal}, None: not one of its own
        self._watched: set[str] = set()
        self._sizes: dict[str, tuple[int, int]] = {}  # it was told, where that is known
        self._repaint: set[str] = set()  # the next output of these is a new picture
        self._showing = threading.Lock()  # what is stored is shown, once
        self._starting: dict[str, float] = {}  # {session id: when to give it up}
        self._closing: dict[str, float] = {}

    def greet(self) -> None:
        """Take note of who connects, and of sessions whose start was asked for before."""
        with transaction():
            server = one("SELECT info FROM server WHERE id = ?", (self.server_id,))
            version = loads(server["info"]).get("agent_version")
            execute(
                "UPDATE server SET protocol = 1, agent_version = ? WHERE id = ?",
                (str(version or "")[:100], self.server_id),
            )
        in_doubt = rows(
            "SELECT id FROM session WHERE server_id = ?1 AND state = 'starting' AND id NOT IN"
            " (SELECT session_id FROM command WHERE server_id = ?1 AND acked_at IS NULL"
            " AND session_id IS NOT NULL)",
            (self.server_id,),
        )
        self._starting = {row["id"]: self._announced_at + START_S for row in in_doubt}

    # ── what does not come ────────────────────────────────────────────────────────────────────

    def announced(self) -> None:
        """It has asked for its grants: it has announced all its sessions by now."""
        self._announced_at = min(self._announced_at, time.monotonic() + ANNOUNCED_S)

    def due(self, now: float) -> bool:
        """Whether `settle` has something to do."""
        ends = [*self._starting.values(), *self._closing.values()]
        return any(at <= now for at in ends) or not self.listening and now >= self._announced_at

    def settle(self, now: float) -> None:
        """Draw conclusions from what has not come until now (of the monotonic clock)."""
        if not self.listening and now >= self._announced_at:
            wire.lose_others(self.server_id, self._named)
            self.listening = True
        for session_id in _over(self._starting, now):
            error = f"the daemon did not say within {START_S:g} s that it has started"
            if self._row(session_id)["state"] == "starting":
                self._report("session_error", session_id, error=error)
            del self._starting[session_id]
        for session_id in _over(self._closing, now):
            log.warning("%s did not say that %s is closed", self.caller.name, session_id)
            self._has_closed(session_id, None)

    def _report(self, kind: str, session_id: str, **fields) -> None:
        frame = {"type": kind, "session_id": session_id} | fields
        wire.take_report(self.caller, frame)

    # ── what it says ──────────────────────────────────────────────────────────────────────────

    def receive(self, frame: dict) -> list[dict]:
        """Handle a frame; those to answer with. One that cannot be used is passed over."""
        kind = frame.get("type")
        handler = SAID.get(kind) if isinstance(kind, str) else None
        if handler is None:
            return []
        try:
            return handler(self, frame) or []
        except Busy:
            raise  # it does not say it again, but announces what it has when it connects again
        except (Refused, cascade.RuleBroken, *wire.MALFORMED) as broken:
            log.warning("%s: %s not taken: %.300r", self.caller.name, kind, broken)
            return []

    def _started(self, frame: dict) -> list[dict]:
        session_id = _text(frame["session_id"])
        tmux_name = _text(frame.get("tmux_name") or "")
        if session_id.startswith("orc-"):  # it was found, and has not been told its id yet
            return self._recovered(frame | {"tmux_name": session_id})
        item = self._item(frame, tmux_name) | {"session_id": session_id}
        before = wire.take_up(self.caller, item, restarted=False)
        return self._taken_up(before, item["terminal"])

    def _recovered(self, frame: dict) -> list[dict]:
        tmux_name = _text(frame["tmux_name"])
        if not tmux_name:
            raise ValueError("a session without a name")
        before = wire.take_up(self.caller, self._item(frame, tmux_name), restarted=True)
        session_id = before["id"]
        self._names[tmux_name] = session_id
        told = {
            "type": "session_recovered_ack",
            "tmux_name": tmux_name,
            "session_id": session_id,
        }
        self._sizes.pop(session_id, None)
        answers = self._taken_up(before, "tmux")
        if before["state"] not in ENDED:  # it has attached to it in a size of its own
            answers = [_size(session_id, before["cols"], before["rows"]), *answers]
        return [told, *answers]

    def _item(self, frame: dict, tmux_name: str) -> dict:
        pid = frame.get("pid")
        return {
            "tmux_name": tmux_name[:NAME_MOST],
            "pid": pid if isinstance(pid, int) and 0 < pid < 2**31 else None,
            "working_directory": str(frame.get("working_dir") or "")[:PATH_MOST] or None,
            "terminal": "tmux" if tmux_name else "pty",
        }

    def _taken_up(self, before: dict, terminal: str) -> list[dict]:
        session_id = before["id"]
        self._named.add(session_id)
        self._starting.pop(session_id, None)
        if before["state"] in ENDED:
            self._know(session_id, None)
            return self._close({"session_id": session_id})
        self._know(session_id, terminal)
        if before["state"] == "starting":
            return self._begin(before)
        sessions.logs().interrupted(session_id, DROPPED)
        return []

    def _begin(self, session: dict) -> list[dict]:
        """What a session that has just begun is to do: the daemon itself starts but a shell."""
        command = loads(session["command"])
        if command:
            return _input(session["id"], _line(command))
        tasks = rows(
            f"SELECT * FROM task WHERE server_id = ? AND {moves.HELD} AND session_id = ?",
            (self.server_id, session["id"]),
        )
        assigned = nudges.NUDGES["task_assigned"]
        return [
            said
            for task in tasks
            for said in self._tell(session["id"], assigned(session, {"task": task}))
        ]

    def _live(self, frame: dict) -> str | None:
        """The id of the daemon's own session a frame is about, unless that has ended here."""
        given = _text(frame["session_id"])
        given = self._names.get(given, given)
        if given not in self._known:
            session = self._row(given)
            if session and session["id"] != given:
                self._names[given] = given = session["id"]
            ended = session is None or session["state"] in ENDED
            self._know(given, None if ended else session["terminal"])
        return given if self._known[given] else None

    def _row(self, given: str) -> dict | None:
        if given.startswith("orc-"):
            return wire.by_tmux_name(self.server_id, given)
        return one("SELECT * FROM session WHERE id = ? AND server_id = ?", (given, self.server_id))

    def _know(self, session_id: str, terminal: str | None) -> None:
        if len(self._known) >= KNOWN_MOST:
            self._known.clear()
        self._known[session_id] = terminal

    def _output(self, frame: dict) -> None:
        session_id = self._live(frame)
        data = b64decode(frame["data"], validate=True)
        if not session_id:
            return
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            with self._showing:
                sessions.logs().append(session_id, None, piece, time.time())
                if session_id in self._watched:
                    self._show(session_id, piece)

    def _show(self, session_id: str, data: bytes) -> None:
        repaint = session_id in self._repaint
        self._repaint.discard(session_id)
        if repaint and self._known.get(session_id) == "tmux":
            data = ATTACHED + data
        shown = {"session_id": session_id, "data": _base64(data), "repaint": repaint}
        terminals.streams.output(self.server_id, shown)

    def _screen(self, frame: dict) -> None:
        if session_id := self._live(frame):
            lines = {"type": "session_screen", "lines": _lines(frame)}
            wire.take_passing(self.caller, lines | {"session_id": session_id})

    def _scrollback(self, frame: dict) -> None:
        lines = _lines(frame)
        if frame.get("error"):
            lines = [f"The history could not be read: {nudges.typed(frame['error'])}"]
        if session_id := self._live(frame):
            shown = {"session_id": session_id, "lines": lines}
            terminals.streams.scrollback(self.server_id, shown)

    def _working_dir(self, frame: dict) -> None:
        path = _text(frame["working_dir"])[:PATH_MOST]
        if path and (session_id := self._live(frame)):
            with transaction() as tx:
                execute("UPDATE session SET working_directory = ? WHERE id = ?", (path, session_id))
                tx.tell(f"session:{session_id}")

    def _error(self, frame: dict) -> None:
        session_id = self._live(frame)
        session = session_id and self._row(session_id)
        if session and session["state"] == "starting":
            self._report("session_error", session_id, error=frame.get("error"))
            self._starting.pop(session_id, None)
            self._know(session_id, None)

    def _closed(self, frame: dict) -> None:
        session_id = self._live(frame)
        if not session_id:
            return
        code = frame.get("exit_code")
        known = self._known[session_id] == "pty" and type(code) is int and abs(code) < 2**31
        self._has_closed(session_id, code if known else None)  # with tmux it is the client's own

    def _has_closed(self, session_id: str, code: int | None) -> None:
        self._report("session_closed", session_id, exit_code=code, gone=False)
        with transaction() as tx:
            execute(
                "UPDATE command SET acked_at = ? WHERE server_id = ? AND session_id = ?"
                " AND type = 'session_close' AND acked_at IS NULL",
                (tx.now, self.server_id, session_id),
            )
        self._closing.pop(session_id, None)
        self._starting.pop(session_id, None)
        self._know(session_id, None)

    # ── what it is told, once ─────────────────────────────────────────────────────────────────

    def commands(self, frames: list[dict]) -> list[dict]:
        """Commands as the daemon understands them. They count as acknowledged, but for those that
        close a session: they are sent again until it is closed."""
        lasting = [f["id"] for f in frames if f["type"] == "session_close" and self._lives(f)]
        once = [f["id"] for f in frames if f["id"] not in lasting]
        due = {*lasting, *(wire.claim(self.server_id, once) if once else ())}
        return [said for f in frames if f["id"] in due for said in self._said(TOLD, f)]

    def _lives(self, frame: dict) -> bool:
        session = self._row(frame["session_id"])
        return bool(session) and session["state"] in cascade.SESSION_LIVE

    def moments(self, frames: list[dict]) -> list[dict]:
        """Frames for the moment as the daemon understands them; others are left out."""
        return [said for frame in frames for said in self._said(MOMENTS, frame)]

    def _said(self, table: dict, frame: dict) -> list[dict]:
        handler = table.get(frame["type"])
        try:
            return handler(self, frame) if handler else []
        except wire.MALFORMED as broken:
            log.warning("%s: %s not sent: %.300r", self.caller.name, frame["type"], broken)
            return []

    def _start(self, frame: dict) -> list[dict]:
        session = self._row(frame["session_id"])
        if not session or session["state"] != "starting":
            return []
        self._starting[session["id"]] = time.monotonic() + START_S
        self._known.pop(session["id"], None)
        said = {
            "type": "session_start",
            "session_id": session["id"],
            "project_id": session["project_id"],
            "role": ROLES.get(session["role"], "worker"),
        }
        said |= _extent(session["cols"], session["rows"])
        folder = session["working_directory"] or self._folder_of(session["repo"])
        kind = AGENT_TYPES.get((session["profile"] or "").partition("-")[0])
        said |= {"working_directory": folder} if folder else {}
        return [said | ({"agent_type": kind} if kind else {})]

    def _folder_of(self, repo: str | None) -> str | None:
        server = one("SELECT * FROM server WHERE id = ?", (self.server_id,))
        return (routing.server_value(server)["repos"].get(repo) or {}).get("path")

    def _task_assigned(self, frame: dict) -> list[dict]:
        if frame.get("start"):
            return self._start(frame["start"])
        return self._notify(frame) if frame.get("session_id") else []

    def _notify(self, frame: dict) -> list[dict]:
        session = self._row(frame["session_id"])
        if not session or session["state"] not in READING:
            return []
        said = nudges.NUDGES[frame["type"]](session, frame)
        return self._tell(session["id"], said)

    def _plan_approved(self, frame: dict) -> list[dict]:
        comment = {"type": "task_note", "content": frame.get("comment")}
        return self._notify(frame) + (self._notify(frame | comment) if comment["content"] else [])

    def _tell(self, session_id: str, *frames: dict) -> list[dict]:
        """Have something typed, which a terminal that is scrolled back would not take."""
        return [{"type": "session_exit_copy_mode", "session_id": session_id}, *frames]

    def _close(self, frame: dict) -> list[dict]:
        session_id = frame["session_id"]
        said = [{"type": "session_close", "session_id": session_id}]
        if self._lives(frame):
            self._closing.setdefault(session_id, time.monotonic() + CLOSE_S)
        if frame.get("force"):  # by itself it would leave the program running
            said.append({"type": "session_kill", "session_id": session_id})
        return said

    # ── for the moment ────────────────────────────────────────────────────────────────────────

    def _session_input(self, frame: dict) -> list[dict]:
        return _input(frame["session_id"], b64decode(frame["data"], validate=True))

    def _session_type(self, frame: dict) -> list[dict]:
        text = frame["text"].replace("\r\n", "\n").replace("\r", "\n")
        answer = {"type": "session_typed", "request_id": frame["request_id"]}
        if nudges.KEYS.search(text):
            why = "it holds control characters, which could act as keys: send them as raw input"
            bus.publish(f"typed:{frame['request_id']}", answer | {"ok": False, "why": why})
            return []
        line = nudges.CONTROL.sub(" ", text.rstrip("\n")).encode()
        said = self._tell(frame["session_id"], *_input(frame["session_id"], line))
        bus.publish(f"typed:{frame['request_id']}", answer | {"ok": True, "why": None})
        return said + _input(frame["session_id"], b"\r")

    def _session_resize(self, frame: dict) -> list[dict]:
        self._sizes[frame["session_id"]] = int(frame["cols"]), int(frame["rows"])
        return [_size(frame["session_id"], frame["cols"], frame["rows"])]

    def _watch(self, frame: dict) -> list[dict]:
        """There is no frame to ask for a repaint: tmux draws anew in another size and back."""
        session_id = frame["session_id"]
        if not frame["on"]:
            self._watched.discard(session_id)
            return []
        session = self._row(session_id)
        if not session:
            return []
        if session["terminal"] == "pty":
            return self._replay(session_id)
        self._repaint.add(session_id)
        self._watched.add(session_id)
        cols, lines = self._sizes.get(session_id) or (session["cols"], session["rows"])
        other = lines - 1 if lines > SIZE_LEAST else lines + 1
        return [_size(session_id, cols, other), _size(session_id, cols, lines)]

    def _replay(self, session_id: str) -> list[dict]:
        """Without tmux nothing is drawn anew: what was printed last is the picture."""
        with self._showing:
            sessions.logs().flush()
            end = sessions.logs().end(session_id)
            last = sessions.logs().read(session_id, max(0, end - PIECE_BYTES), PIECE_BYTES)
            self._repaint.add(session_id)
            self._watched.add(session_id)
            self._show(session_id, last.data[-PIECE_BYTES:])
        return []

    def _capture_scrollback(self, frame: dict) -> list[dict]:
        return [{"type": "capture_scrollback", "session_id": frame["session_id"]}]


ENDED = ("closed", "failed")
READING = ("active", "recovering")  # to another one a nudge would be dropped without a word
SAID = {
    "session_started": Daemon._started,
    "session_recovered": Daemon._recovered,
    "session_output": Daemon._output,
    "session_screen": Daemon._screen,
    "session_closed": Daemon._closed,
    "session_error": Daemon._error,
    "session_working_dir": Daemon._working_dir,
    "scrollback_captured": Daemon._scrollback,
}
MOMENTS = {
    "session_input": Daemon._session_input,
    "session_type": Daemon._session_type,
    "session_resize": Daemon._session_resize,
    "session_watch": Daemon._watch,
    "capture_scrollback": Daemon._capture_scrollback,
}


def _over(ends: dict[str, float], now: float) -> list[str]:
    return [name for name, at in list(ends.items()) if at <= now]


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a text: {value!r:.100}")
    return value


def _lines(frame: dict) -> list:
    if not isinstance(frame["lines"], list):
        raise ValueError("`lines` is not a list")
    return frame["lines"]


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _extent(cols, lines) -> dict:
    return {
        "cols": min(max(int(cols), SIZE_LEAST), terminals.SIZE_MOST),
        "rows": min(max(int(lines), SIZE_LEAST), terminals.SIZE_MOST),
    }


def _size(session_id: str, cols, lines) -> dict:
    return {"type": "session_resize", "session_id": session_id} | _extent(cols, lines)


def _input(session_id: str, data: bytes) -> list[dict]:
    """Frames that write bytes to a terminal, each small enough for the daemon."""
    data = DEVICE_ANSWER.sub(b"", data)
    return [
        {
            "type": "session_input",
            "session_id": session_id,
            "data": _base64(data[start : start + INPUT_BYTES]),
        }
        for start in range(0, len(data), INPUT_BYTES)
    ]


def _line(command: list[str]) -> bytes:
    """A command as one types it into a shell; nothing when it holds keys."""
    line = shlex.join(command)
    return b"" if nudges.CONTROL.search(line) else f"{line}\r".encode()


TOLD = dict.fromkeys(nudges.NUDGES, Daemon._notify) | {
    "rules_changed": lambda _daemon, _frame: [{"type": "approval_rules_updated"}],
    "plan_approved": Daemon._plan_approved,
    "session_start": Daemon._start,
    "session_close": Daemon._close,
    "task_assigned": Daemon._task_assigned,
}
