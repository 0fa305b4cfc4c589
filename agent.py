"""The agent: the daemon on a development server.

It keeps sessions (terminals in tmux) alive, runs workers in them and talks to the hub by
protocol 2, over a WebSocket or, where a proxy breaks that, the long poll. One file that imports
nothing of ours.

    python agent.py --register TOKEN      once
    python agent.py                       from then on

Threads, each with one `step()`: heartbeat, the line to the hub, commands, terminals, monitor,
log, screens. What must not be lost goes through `Store` (on disk before it is sent or
acknowledged); `Outgoing` is all that waits to be sent. A carrier needs only `Agent.auth()`,
`Agent.sync()`, `Agent.received(frames)` and `Outgoing.take()`; `Choice` says which one it is.

Errors:  AgentError (exit 1)
         +- TmuxError
         +- DialogOpen
         +- HubError            the hub answered with an error
            +- HubUnreachable   it did not answer, or not sensibly (exit 3)

`requests`, `yaml` and `websockets` are imported where they are used: this file is also the first
program of every session (`--exec-session`), which should start fast and without site-packages.
"""

import argparse
import base64
import binascii
import bisect
import collections
import contextlib
import dataclasses
import email.utils
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import logging.handlers
import math
import os
import platform
import pwd
import queue
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

VERSION = "0.1.0"
PROTOCOL = 2

SETTINGS = (  # name, default, help; a key of the same name in the config file overrides
    ("carrier", "auto", "what carries the frames: socket, poll, or auto: the socket if it can"),
    ("terminal", "auto", "what keeps sessions: tmux, pty (they end with the agent), or auto"),
    ("socket_open_s", 10, "longest wait for the socket to open, and then for the hub's greeting"),
    ("socket_ping_s", 15, "how often the socket is tested, and the longest wait for the answer"),
    ("socket_retry_s", 300, "how often a polling agent tries the socket again"),
    ("poll_wait_s", 25, "how long the hub may hold an empty poll before it answers"),
    ("backoff_max_s", 30, "longest pause before a failed call is repeated"),
    ("refused_max_s", 60, "longest pause after the hub refused the server's key"),
    ("superseded_s", 30, "pause after a newer agent of the same server has connected"),
    ("resend_s", 10, "unacknowledged reports and output are sent again after this"),
    ("monitor_s", 0.2, "how often sessions are looked at"),
    ("log_look_s", 0.05, "how often session logs are looked at for new bytes"),
    ("log_pause_s", 0.1, "least time between two blocks of a log that is being flooded"),
    ("log_keep_mb", 64, "most output of one session kept for a hub that is away, in megabytes"),
    ("screen_s", 5, "how often a changed screen is sent"),
    ("close_grace_s", 3, "time a program has to end by itself when its session is closed"),
    ("activity_s", 1, "how often it is looked at what a coding agent does"),
    ("progress_s", 60, "how often it is said that a worker makes progress"),
    ("hook_patience_s", 2, "longest wait for the hub before a prompt is left to the terminal"),
    ("detect_s", 20, "longest wait for a coding agent to say its version"),
    ("typing_limit_s", 2, "longest wait for typed text to appear before it is submitted"),
)

CHOICES = {"carrier": ("auto", "socket", "poll"), "terminal": ("auto", "tmux", "pty")}

KB = 1024
BLOCK_BYTES = 64 * KB  # protocol/v2: a block of a log is at most 64 KB
WINDOW_BYTES = 1024 * KB  # of one log, sent and not yet acknowledged
CALL_BYTES = 2048 * KB  # of log in one call, so that a call stays far below the hub's limit
SPOOL_BATCH = 200  # spooled frames in one call
JOURNAL_KEPT = 10_000  # protocol/v2: handled commands remembered per hub epoch
RESULT_BYTES = 4 * KB * KB  # as JSON, so that one report stays far below what a hub takes
SPOOL_BYTES = 8 * KB * KB  # spooled frames in one call, at least one
HISTORY_LINES = 50_000
INPUT_CHUNK = 1 * KB  # bytes of raw input per tmux call; each takes three of its argument space
TIMES_BYTES = 128 * KB  # of one session's notes of when it printed what
TIMES_S = 0.1  # between two looks at how much a session has printed; longer while it is silent
TIMES_IDLE_S = 1
KEPT_BYTES = KB * KB  # of output that the hub has, for the end of a log to be read here
RELEASE_BYTES = KB * KB  # at least, given back to the disk at a time
RELEASE_S = 1  # between two looks at what may be given back
KEEP_LEAST_BYTES = 256 * KB  # whatever `log_keep_mb` says
HANG_UP_AGAIN_S = 1
MEND_PAUSE_S = 5  # a pipe that dies at once (disk full) is not mended at every look
ERROR_LINES = 20
LIVE_BYTES = 256 * KB  # of one live view, waiting to be sent; then its terminal is not read
LIVE_PAUSE_S = 0.015  # between two sendings of a live view that is being flooded
BURST_BYTES = 1 * KB  # of it, after a pause, that are sent at once
UNTYPED_BYTES = 8 * KB * KB  # typed and not yet read by the program
SETTLE_S = 5  # longest wait for what was typed to be taken by the terminal
SCROLLBACK_BYTES = 8 * KB * KB
LANE_IDLE_S = 30
STOP_S = 30  # that an agent told to stop may take
NO_SCREEN = (0, None, -math.inf)  # size of the log, lines, time

log = logging.getLogger("agent")


# ---------------------------------------------------------------------------- errors


class AgentError(Exception):
    """Something a person can act on; the message is one sentence: state, cause, remedy."""

    exit_code = 1


class TmuxError(AgentError):
    """tmux refused or failed."""


class DialogOpen(AgentError):
    """A dialog is on the screen, which would take what is typed for keys: nothing was typed."""


class HubError(AgentError):
    """The hub answered with an error."""

    def __init__(self, sentence, status=0, code="", fields=None):
        super().__init__(printable(sentence))
        self.status = status
        self.code = code
        self.fields = fields or {}


class HubUnreachable(HubError):
    """The hub did not answer, or with something no hub says."""

    exit_code = 3


def retryable(error):
    """Whether the same call may succeed later: the one place that decides."""
    return isinstance(error, HubUnreachable) or error.status in (408, 429) or error.status >= 500


# ---------------------------------------------------------------------------- text


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
KEYS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])", re.S)


def printable(text, limit=1000):
    """`text` on one line, without control characters, at most `limit` characters."""
    text = CONTROL.sub(" ", str(text)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def last_lines(data, count=ERROR_LINES):
    """The last lines of terminal output as plain text."""
    text = ESCAPES.sub("", data.decode("utf-8", "replace")).replace("\r\n", "\n")
    lines = [printable(line.rstrip("\r").rsplit("\r")[-1]) for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def typeable(text):
    """`text` with newlines as LF. Raises AgentError if it holds other control characters:
    an escape sequence could end the paste and act as keys."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if KEYS.search(text):
        raise AgentError(
            "The text holds control characters, which could act as keys: nothing was typed. "
            "Remove them, or send them as raw input."
        )
    return text


def iso_of(at):
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def wall_time(moment):
    """What the clock showed, as it is set now, at a moment of `time.monotonic()`. Inside the agent
    moments are compared; the clock, which may be set back, is for what is said and stored."""
    return time.time() - (time.monotonic() - moment)


def now_iso():
    return iso_of(time.time())


# ---------------------------------------------------------------------------- files and config


def default_config_path():
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "orchestratia" / "config.yaml"


def default_state_dir():
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "orchestratia"


def make_private_dir(path):
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(f"The directory {path} cannot be made: {error.strerror}.") from error
    return path


def open_private(path, flags):
    return os.open(path, flags, 0o600)


def write_private(path, text):
    """Write a 0600 file so that a reader sees the old text or the new, never a half."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_changed(path, text):
    """The same, unless that is what the file holds: a start needs no room on the disk."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_private(path, text)


def sync_directory(path):
    """Have the names in a directory survive a loss of power."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_config(path):
    """The config file as a dict; {} if there is none."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AgentError(f"The config file {path} cannot be read: {printable(error)}.") from error
    if not isinstance(config, dict | None):
        raise AgentError(f"The config file {path} is not a mapping of names to values.")
    return config or {}


def save_config(path, config):
    import yaml

    make_private_dir(path.parent)
    write_private(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    for directory in (path.parent, path.parent.parent):  # it may have been made just now
        with contextlib.suppress(OSError):  # one we may not read, or that takes no such order
            sync_directory(directory)


def settings_of(config):
    """The settings, with what the config file says instead of the defaults."""
    settings = {name: config.get(name, default) for name, default, _ in SETTINGS}
    for name, words in CHOICES.items():
        if settings[name] not in words:
            raise AgentError(f"The setting {name} in the config file is none of {words}.")
    for name, value in settings.items():
        if name in CHOICES:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise AgentError(f"The setting {name} in the config file is not a number from 0 on.")
    return types.SimpleNamespace(**settings)


def hub_url_of(token):
    """The hub's URL inside a registration token `orcreg_<base64url(url)>.<secret>`."""
    match = re.fullmatch(r"orcreg_([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+", token)
    try:
        encoded = match[1] + "=" * (-len(match[1]) % 4)
        url = base64.urlsafe_b64decode(encoded).decode("utf-8")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(url)
    except (TypeError, ValueError, binascii.Error) as error:
        raise AgentError(
            "This is not a registration token: it should look like orcreg_….…, "
            "copied whole from the hub. Make a new one there and use it as it is."
        ) from error
    return url.rstrip("/")


def parse_repos(pairs):
    """{"name": {"path", "branch"}} of `name=path` arguments."""
    repos = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            raise AgentError(f"'{pair}' does not say which repo is where: write --repo name=path.")
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(path):
            raise AgentError(f"The repo {name} is not there: {path} is no directory.")
        repos[name] = {"path": path, "branch": branch_of(path)}
    return repos


def branch_of(path):
    """The branch checked out in `path`, or None if that is no git repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", path, "rev-parse", "--abbrev-ref", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def repos_of(config):
    """The configured repos that exist, with their present branch."""
    repos = {}
    for name, repo in (config.get("repos") or {}).items():
        path = repo["path"] if isinstance(repo, dict) else repo
        if os.path.isdir(path):
            repos[name] = {"path": path, "branch": branch_of(path)}
        else:
            log.warning("repo %s is left out: %s is no directory", printable(name), path)
    return repos


# ---------------------------------------------------------------------------- this machine


def machine_id():
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def mac_address():
    digits = f"{uuid.getnode():012x}"
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def memory_info():
    """Total and used memory in GB, from /proc; {} where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kilobytes["MemTotal"], kilobytes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return {}
    used = total - free
    return {
        "memory_total_gb": round(total / KB / KB, 1),
        "memory_used_gb": round(used / KB / KB, 1),
        "memory_percent": round(100 * used / total, 1),
    }


def free_mb(path):
    """What a user may still write on the disk of a path, in megabytes."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize // 10**6


def system_info():
    disk = shutil.disk_usage("/")
    return {
        "cpu_count": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        **memory_info(),
        "disk_total_gb": round(disk.total / KB**3, 1),
        "disk_used_gb": round(disk.used / KB**3, 1),
        "disk_percent": round(100 * disk.used / disk.total, 1),
        "platform": platform.system(),
        "platform_release": platform.release(),
        "python_version": platform.python_version(),
        "os_username": pwd.getpwuid(os.getuid()).pw_name,
        "agent_version": VERSION,
    }


def declared(config):
    """What this server says of itself for routing; a list never declared is null: unknown."""
    lists = {name: config.get(name) for name in ("languages", "frameworks", "capabilities")}
    for name, values in lists.items():
        if values is not None and not (
            isinstance(values, list) and all(isinstance(value, str) for value in values)
        ):
            raise AgentError(f"`{name}` in the config file must be a list of words: [a, b].")
    return {**lists, "slots": config.get("slots") or (os.cpu_count() or 1) + 2}


def clean_environment():
    """Our environment without what is ours: sessions inherit from the tmux server we start."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ORCHESTRATIA_") and name not in ("TMUX", "TMUX_PANE")
    }


# ---------------------------------------------------------------------------- hub


class Hub:
    """HTTP to the hub; one connection per thread."""

    def __init__(self, url, api_key=None):
        self.url = url.rstrip("/")
        self.api_key = api_key
        self._threads = threading.local()

    def post(self, path, body, timeout=15):
        """The hub's answer (a dict). Raises HubUnreachable or HubError."""
        import requests

        try:
            response = self._connection().post(
                f"{self.url}/api/v1/{path}", json=body, timeout=(5, timeout), allow_redirects=False
            )
        except requests.exceptions.InvalidJSONError as error:
            raise HubError(f"What was to be sent is not JSON: {error}") from error
        except requests.RequestException as error:
            raise HubUnreachable(
                f"The hub at {self.url} cannot be reached ({self._reason(error)}). "
                "Check that it runs and that this machine may connect to it."
            ) from error
        return self._decode(response)

    def _connection(self):
        import requests

        if not hasattr(self._threads, "connection"):
            self._threads.connection = requests.Session()
            if self.api_key:
                self._threads.connection.headers["X-API-Key"] = self.api_key
        return self._threads.connection

    @staticmethod
    def _reason(error):
        """The last, plainest link of the chain of causes that `requests` wraps."""
        seen = re.findall(r"\] ([A-Z][\w ]+)|(timed out)|([Cc]onnection aborted)", str(error))
        return next((text for text in seen[-1] if text), "") if seen else type(error).__name__

    def _decode(self, response):
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise HubUnreachable(
                f"{self.url} answered {response.status_code}, but not as a hub does. "
                "Check the address and any proxy in between.",
                response.status_code,
            )
        if response.status_code >= 300:
            detail = answer.get("detail") or f"The hub answered {response.status_code}."
            fields = answer.get("fields") or {}
            raise HubError(detail, response.status_code, answer.get("code", ""), fields)
        return answer


class Backoff:
    """Pauses 1, 2, 4 … (or another `growth`) up to `most` seconds, each shortened by chance, to
    `least` of it, so that agents that lost the hub together do not come back together."""

    def __init__(self, most, least=0.5, growth=2):
        self.most = most
        self.least = least
        self.growth = growth
        self.reset()

    def reset(self):
        self.failures = 0

    def pause(self):
        longest = min(self.growth**self.failures, self.most)
        self.failures = min(self.failures + 1, 20)
        return longest * random.uniform(self.least, 1)


# ---------------------------------------------------------------------------- store


@dataclasses.dataclass
class Session:
    """A session this agent keeps. `state`: starting, live or ended; the row stays until the
    hub has acknowledged its end and all of its output."""

    session_id: str
    tmux_name: str
    state: str = "starting"
    profile: str | None = None
    ends_task: bool = False  # its exit completes or fails the task
    task_id: str | None = None
    attempt: int | None = None
    title: str = ""
    working_directory: str = ""
    pane_id: str = ""
    pid: int | None = None
    terminal: str = "tmux"
    launch: str = ""  # names this start, so that hooks of an earlier one are known
    conversation: str | None = None  # the coding agent's own id of its conversation
    mode: str | None = None
    begun: bool = False  # it was said that the work on its task has begun
    closing: bool = False
    cancelled: bool = False
    exit_code: int | None = None
    log_start: int = 0  # what is before it was given back to the disk
    log_end: int | None = None
    closed_spool: int | None = None

    def __str__(self):
        if self.task_id:
            return f"task {self.task_id[:8]} '{printable(self.title, 60)}' in {self.tmux_name}"
        return f"session {self.tmux_name}"


def known_fields(kind, row):
    """What a dataclass knows of a stored row: a later version may have written more."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in row.items() if name in names}


def is_refusal(error):
    """Whether the disk takes nothing now and may later: it is full, or read only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return isinstance(error, sqlite3.OperationalError)


class Owed:
    """Writes that a full disk has refused, made in their order when it takes them. For what must
    not be done again (a text was typed, a dialog is gone) when only its record was refused."""

    def __init__(self):
        self._deeds = collections.deque()
        self._lock = threading.Lock()
        self._again_at = -math.inf
        self._under_way = 0  # of the first ones

    def do(self, deed, *arguments):
        """Do it now, or as soon as it can be done and all that waits before it."""
        if not self._deeds:
            try:
                return deed(*arguments)
            except (sqlite3.OperationalError, OSError) as error:
                if not is_refusal(error):
                    raise
                log.error("%s is put off: %s", deed.__name__, error)
        with self._lock:
            # One that is under way has read already what it is to write.
            if (deed, arguments) not in itertools.islice(self._deeds, self._under_way, None):
                self._deeds.append((deed, arguments))

    def settle(self, now):
        """Do what waits, as far as it can be done, and after a refusal not again for a second.
        Only one thread may call this."""
        while self._deeds and now >= self._again_at:
            with self._lock:
                deed, arguments = self._deeds[0]
                self._under_way = 1
            try:
                deed(*arguments)
            except Exception as error:
                if is_refusal(error):
                    self._again_at, self._under_way = now + 1, 0
                    return
                log.exception("%s failed", deed.__name__)
            with self._lock:
                self._deeds.popleft()
                self._under_way = 0


class Store:
    """What survives kill -9: spool, journal of commands, sessions. Every write is one
    transaction that is on the disk when the call returns (synchronous=FULL). What is in memory
    is changed after it: a write that is refused has changed nothing."""

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE IF NOT EXISTS spool (n INTEGER PRIMARY KEY AUTOINCREMENT, frame TEXT NOT NULL);
        CREATE TABLE IF NOT EXISTS journal (
            n INTEGER PRIMARY KEY AUTOINCREMENT, epoch TEXT NOT NULL, id INTEGER NOT NULL,
            state TEXT NOT NULL, frame TEXT, UNIQUE (epoch, id));
        CREATE TABLE IF NOT EXISTS session (id TEXT PRIMARY KEY, row TEXT NOT NULL);
    """

    def __init__(self, path):
        os.close(open_private(path, os.O_CREAT | os.O_RDWR))
        self.path = Path(path)
        self.trouble = None  # why the last change is not on the disk
        self.owed = Owed()
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(self.SCHEMA)
            if self.get("spool_id") is None:
                self.put("spool_id", str(uuid.uuid4()))
        except sqlite3.DatabaseError as error:
            raise AgentError(
                f"{path} cannot be used ({error}): free some space on that disk, or, if the file "
                "is damaged, move it away; sessions in tmux go on."
            ) from error

    def close(self):
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self):
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if isinstance(error, sqlite3.OperationalError):
                    self.trouble = f"its agent cannot write to {self.path.parent}: {error}"
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self.trouble = None

    def _rows(self, sql, *values):
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # -- single values

    def get(self, key, default=None):
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else default

    def put(self, key, value, *frames):
        """Write a value and spool what is to be said of it; the number of the last frame."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
            return [0, *(self._append(db, frame) for frame in frames)][-1]

    # -- spool

    def spool(self, *frames):
        """The number of the last frame."""
        with self._transaction() as db:
            return [self._append(db, frame) for frame in frames][-1]

    @staticmethod
    def _append(db, frame):
        text = json.dumps(frame, allow_nan=False)
        return db.execute("INSERT INTO spool (frame) VALUES (?)", (text,)).lastrowid

    def spooled_after(self, n, limit=SPOOL_BATCH):
        rows = self._rows("SELECT n, frame FROM spool WHERE n > ? ORDER BY n LIMIT ?", n, limit)
        sizes = itertools.accumulate(len(frame) for _, frame in rows)
        fitting = sum(size <= SPOOL_BYTES for size in sizes)
        return [{**json.loads(frame), "spool": n} for n, frame in rows[: max(1, fitting)]]

    def declares_gap(self, session_id, offset):
        """Whether a frame that waits says that the log's output at `offset` is missing."""
        rows = self._rows("SELECT frame FROM spool WHERE frame LIKE '%\"session_gap\"%'")
        gaps = [frame for frame in (json.loads(text) for (text,) in rows) if frame.get("to")]
        return any(g["session_id"] == session_id and g["from"] <= offset < g["to"] for g in gaps)

    def spool_first(self):
        """The lowest number still held, or the next one if all are acknowledged."""
        held = self._rows("SELECT min(n) FROM spool")[0][0]
        return held or self.spool_last() + 1

    def spool_last(self):
        """The highest number ever given out."""
        last = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'spool'")
        return last[0][0] if last else 0

    def trim_spool(self, upto):
        with self._transaction() as db:
            db.execute("DELETE FROM spool WHERE n <= ?", (upto,))

    # -- journal of commands

    def receive(self, epoch, frames):
        """Write commands down; returns those not seen before."""
        with self._transaction() as db:
            new = [frame for frame in frames if self._note(db, epoch, frame)]
            self._trim_journal(db, epoch)
        return new

    @staticmethod
    def _note(db, epoch, frame):
        return db.execute(
            "INSERT OR IGNORE INTO journal (epoch, id, state, frame) VALUES (?, ?, 'received', ?)",
            (epoch, frame["id"], json.dumps(frame)),
        ).rowcount

    @staticmethod
    def _trim_journal(db, epoch):
        db.execute(
            "DELETE FROM journal WHERE epoch = ?1 AND state = 'done' AND n <= (SELECT n FROM"
            " journal WHERE epoch = ?1 ORDER BY n DESC LIMIT 1 OFFSET ?2)",
            (epoch, JOURNAL_KEPT),
        )

    def begin(self, epoch, command_id):
        """Note that typing for this command begins: from here on it is not repeated."""
        self._mark(epoch, command_id, "UPDATE journal SET state = 'begun'")

    def put_back(self, epoch, command_id):
        """Nothing was typed after all: it is tried again."""
        self._mark(epoch, command_id, "UPDATE journal SET state = 'received'")

    def done(self, epoch, command_id, *frames):
        """Note that it is carried out, and spool what is to be said of that."""
        # The frame goes: it may hold a session's key.
        self._mark(epoch, command_id, "UPDATE journal SET state = 'done', frame = NULL", *frames)

    def _mark(self, epoch, command_id, update, *frames):
        with self._transaction() as db:
            db.execute(f"{update} WHERE epoch = ? AND id = ?", (epoch, command_id))
            for frame in frames:
                self._append(db, frame)

    def unfinished(self):
        """(epoch, frame, begun) of commands received and not done, oldest first."""
        rows = self._rows(
            "SELECT epoch, frame, state FROM journal WHERE state != 'done' ORDER BY n"
        )
        return [(epoch, json.loads(frame), state == "begun") for epoch, frame, state in rows]

    # -- sessions

    def sessions(self):
        rows = [json.loads(row) for (row,) in self._rows("SELECT row FROM session")]
        return [Session(**known_fields(Session, row)) for row in rows]

    def save(self, session, *frames, **changes):
        """Write the session as it is with these changes and spool what is to be said of it, both
        or neither; the session itself is changed once that is on the disk."""
        with self._lock:  # whoever saves it meanwhile must see the changes
            with self._transaction() as db:
                for frame in frames:
                    n = self._append(db, frame)
                    if frame["type"] == "session_closed":
                        changes["closed_spool"] = n
                row = json.dumps(dataclasses.asdict(session) | changes)
                named = session.session_id, row
                db.execute("INSERT OR REPLACE INTO session VALUES (?, ?)", named)
            for name, value in changes.items():
                setattr(session, name, value)

    def forget(self, session_id):
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE id = ?", (session_id,))


# ---------------------------------------------------------------------------- live output


# Sequences by which a program asks its terminal something. Nobody may answer them: several
# terminals may look on, and what they say late would be typed into the program.
_CSI = rb"(?:\x1b\[|\xc2\x9b)"
_TEXT = rb"[^\x07\x18\x1a\x1b]*"
_END = rb"(?:\x07|\x1b\\|(?=[\x18\x1a]|\x1b[^\\]))"
_SETTINGS = rb"\x1b\](?:4|5|1[0-9]|50|60|61|105)"  # whose value may be asked for
_UNWANTED = rb"\x1b(?:\]52;|P[0-9;]*(?:\$q|\+[qQ]))"  # the clipboard; questions for settings
QUESTIONS = re.compile(
    rb"\x05|\x1bZ|\xc2\x9a"
    rb"|" + _CSI + rb"(?:[>=]?[0-9;]*c|>[0-9;]*q|\??[0-9;]*n|\??[0-9;]*\$p|[01]?x"
    rb"|(?:11|13|14|15|16|18|19|20|21)(?:;[0-9]*)*t"
    rb"|\?[0-9;]*[muS]|[0-9;]*(?:\*y|\$[uw]|&u|\"v))"
    rb"|" + _SETTINGS + rb"[^\x07\x18\x1a\x1b?]*;\?" + _TEXT + _END + rb"|"
    rb"" + _UNWANTED + _TEXT + _END
)
# What may become one of them with the next bytes. No terminal acts on half a sequence, so
# holding it back delays nothing; the content of an unwanted one need not be held.
UNFINISHED = re.compile(
    rb"(?:[\x1b\xc2]"
    rb"|" + _CSI + rb"[0-?]{0,64}[ -/]{0,4}"
    rb"|\x1b\][0-9]{0,3}"
    rb"|" + _SETTINGS + rb";[^\x07\x18\x1a\x1b]{0,1024}\x1b?"
    rb"|\x1bP[0-9;]{0,16}[$+]?"
    rb"|(?P<unwanted>" + _UNWANTED + rb")" + _TEXT + rb"(?P<end>\x1b?)"
    rb")\Z"
)
# What terminals answer, in case one was asked by somebody else. F3 with Shift, Alt or Ctrl
# looks like a cursor in the first line.
ANSWERS = re.compile(
    rb"\x1b\[(?:[?>=][0-9;]*c|\??[0-9;]*n|\?[0-9;]*R|(?!1;[2-8]R)[0-9]+;[0-9]+R|\??[0-9;]+\$y"
    rb"|[0-9;]+t|\?[0-9;]*[uS])"
    rb"|\x1b\](?:4;[0-9]+|5;[0-9]+|1[0-9]|52;\w*);[^\x07\x1b]*(?:\x07|\x1b\\)"
    rb"|\x1bP(?:[01]?[$+]r|[>!]\|)[^\x07\x1b]*(?:\x07|\x1b\\)"
)


class Unasking:
    """Takes the questions out of a stream of terminal output, wherever it was cut."""

    ROUNDS = 8  # one that is taken out may leave another; who nests more does it on purpose

    def __init__(self):
        self._held = b""

    def __call__(self, data):
        data = self._held + data
        for _ in range(self.ROUNDS):
            data, found = QUESTIONS.subn(b"", data)
            if not found:
                break
        rest = UNFINISHED.search(data)
        if rest is None:
            self._held = b""
            return data
        self._held = (rest["unwanted"] or b"") + rest["end"] if rest["unwanted"] else rest[0]
        return data[: rest.start()]


class Stream:
    """One live view: what its terminal has drawn and no carrier has taken yet."""

    def __init__(self, session_id):
        self.session_id = session_id
        self.data = bytearray()
        self.repaint = True  # until its first bytes are taken
        self.closed = False
        self.burst = 0  # bytes since
        self.since = -math.inf


class Live:
    """The live views that wait to be sent. A carrier takes; whoever draws asks `full` first,
    so that nothing has to be dropped from the middle of a view and memory stays bounded."""

    def __init__(self, wake):
        self.wake = wake
        self.freed = lambda: None  # called when a full view has been taken
        self._lock = threading.Lock()
        self._streams = {}  # session id: its Stream

    def open(self, session_id):
        """Begin a view with a repaint; what is left of an older one is of no use any more."""
        stream = Stream(session_id)
        with self._lock:
            self._streams[session_id] = stream
        return stream

    def close(self, stream):
        """Nothing is added any more; what is there is still sent."""
        with self._lock:
            stream.closed = True
            if not stream.data and self._streams.get(stream.session_id) is stream:
                del self._streams[stream.session_id]

    def clear(self):
        """The connection is new: nobody looks, until the hub says so. The ids of the sessions
        whose views are now drawn for nobody."""
        with self._lock:
            drawn = list(self._streams)
            self._streams.clear()
        self.freed()
        return drawn

    def full(self, stream):
        with self._lock:
            return len(stream.data) >= LIVE_BYTES and self._is_shown(stream)

    def _is_shown(self, stream):
        return self._streams.get(stream.session_id) is stream

    def put(self, stream, data, now):
        """Add to a view. The first bytes after a pause wake the carrier at once; of a flood it
        is told together: returns when, or None."""
        with self._lock:
            if not data or stream.closed or not self._is_shown(stream):
                return None
            stream.data += data
            if now - stream.since > LIVE_PAUSE_S:
                stream.since, stream.burst = now, 0
            stream.burst += len(data)
            if stream.burst > BURST_BYTES and len(stream.data) < BLOCK_BYTES:
                return stream.since + LIVE_PAUSE_S
        self.wake.set()

    def take(self):
        """The frames to send now."""
        frames, freed = [], False
        with self._lock:
            for stream in list(self._streams.values()):
                freed = freed or len(stream.data) >= LIVE_BYTES
                frames += self._frames(stream)
                if stream.closed:
                    del self._streams[stream.session_id]
        if freed:
            self.freed()
        return frames

    @staticmethod
    def _frames(stream):
        data, stream.data = stream.data, bytearray()
        frames = [
            {
                "type": "session_output",
                "session_id": stream.session_id,
                "data": base64.b64encode(data[start : start + BLOCK_BYTES]).decode(),
            }
            for start in range(0, len(data), BLOCK_BYTES)
        ]
        if frames and stream.repaint:
            frames[0]["repaint"] = True
            stream.repaint = False
        return frames


# ---------------------------------------------------------------------------- pseudo-terminals


class Pty:
    """Our side of a pseudo-terminal. Written by any thread, read and closed by that of `Ptys`,
    which asks `wanted` whether to read, and tells what was `received`, that it `ended`, and
    that a carrier has `freed` room."""

    def __init__(self, ptys, fd, cols, rows):
        self.ptys = ptys
        self.fd = fd  # None: closed
        self.size = None
        self._unwritten = bytearray()
        self._changed = threading.Condition()
        os.set_blocking(fd, False)
        self.resize(cols, rows)

    def wanted(self):
        return True

    def received(self, data):
        raise NotImplementedError

    def ended(self):
        raise NotImplementedError

    def freed(self):
        pass

    def resize(self, cols, rows):
        with self._changed:
            if self.fd is not None and self.size != (cols, rows):
                size = struct.pack("HHHH", rows, cols, 0, 0)
                fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)
                self.size = cols, rows

    def write(self, data):
        """Write all of it, in order, as the program takes it; never waits."""
        with self._changed:
            if self.fd is None:
                raise AgentError("The session's terminal is gone.")
            if len(self._unwritten) + len(data) > UNTYPED_BYTES:
                raise AgentError("The program does not read what is typed: this was left out.")
            self._unwritten += data
            self.write_on()
            rest = bool(self._unwritten)
        if rest:
            self.ptys.call(self.ptys.watch, self)

    def write_on(self):
        """Write what fits now."""
        with self._changed:
            try:
                while self._unwritten and self.fd is not None:
                    del self._unwritten[: os.write(self.fd, self._unwritten[: 16 * KB])]
            except BlockingIOError:
                return
            except OSError:  # nobody has the other side open
                self._unwritten.clear()
            self._changed.notify_all()

    def wait_written(self, limit_s):
        """Return when everything has been written, or after the limit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten, limit_s)

    def events(self):
        """What to wait for: a mask of selectors, 0 for nothing."""
        if self.fd is None:
            return 0
        write = selectors.EVENT_WRITE if self._unwritten else 0
        return write | (selectors.EVENT_READ if self.wanted() else 0)

    def close(self):
        """In the thread of `Ptys` only: elsewhere the number could by now mean another file."""
        with self._changed:
            if self.fd is not None:
                os.close(self.fd)
                self.fd = None
            self._unwritten.clear()
            self._changed.notify_all()


class Ptys:
    """Reads all pseudo-terminals and writes what did not fit at once, in one thread: a terminal
    that floods takes its turn with the others, and what comes late (the rest of a paste, the end
    of a pause, room for more) is waited for in one place."""

    def __init__(self, live):
        self.live = live
        self.live.freed = lambda: self.call(self._freed)
        self._selector = selectors.DefaultSelector()
        self._all = set()
        self._calls = collections.deque()
        self._wake_at = math.inf
        self._out, self._in = os.pipe()
        for fd in (self._out, self._in):
            os.set_blocking(fd, False)
        self._selector.register(self._out, selectors.EVENT_READ)

    def call(self, deed, *arguments):
        """Have the thread do this soon, in the order it was asked for."""
        self._calls.append((deed, arguments))
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            os.write(self._in, b"\0")

    def step(self):
        """One turn: what can be read or written now, at most a second's wait for it."""
        wait = min(1, max(0, self._wake_at - time.monotonic()))
        for key, events in self._selector.select(wait):
            if key.data is None:
                os.read(self._out, 64 * KB)
            else:
                self._turn(key.data, events)
        while self._calls:
            deed, arguments = self._calls.popleft()
            deed(*arguments)
        if time.monotonic() >= self._wake_at:
            self._wake_at = math.inf
            self.live.wake.set()

    def _turn(self, pty, events):
        if pty.fd is None:
            return
        if events & selectors.EVENT_WRITE:
            pty.write_on()
        if events & selectors.EVENT_READ:
            self._read(pty)
        self.watch(pty)

    def _read(self, pty):
        try:
            data = os.read(pty.fd, 64 * KB)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody has the other side open
            data = b""
        if data:
            pty.received(data)
        else:
            self.drop(pty)
            pty.ended()

    def show(self, stream, data):
        """Add to a live view."""
        due = self.live.put(stream, data, time.monotonic())
        if due is not None:
            self._wake_at = min(self._wake_at, due)

    # -- in its thread only; others say `call`

    def add(self, pty):
        self._all.add(pty)
        self.watch(pty)

    def watch(self, pty):
        """Wait for what the terminal wants now. What is not wanted is not even registered: a
        terminal that has hung up would be told of again and again."""
        events = pty.events()
        key = self._selector.get_map().get(pty.fd) if pty.fd is not None else None
        if key is None:
            if events and pty in self._all:
                self._selector.register(pty.fd, events, pty)
        elif not events:
            self._selector.unregister(pty.fd)
        elif events != key.events:
            self._selector.modify(pty.fd, events, pty)

    def drop(self, pty):
        """Stop waiting for a terminal and close our side."""
        self._all.discard(pty)
        if pty.fd is not None and pty.fd in self._selector.get_map():
            self._selector.unregister(pty.fd)
        pty.close()

    def _freed(self):
        for pty in list(self._all):
            pty.freed()
            self.watch(pty)


class View(Pty):
    """A tmux client of ours, attached in a pseudo-terminal: what it draws is the live view. It
    is not read while the view is full; tmux then leaves out what nobody would see."""

    def __init__(self, ptys, session_id, command, cols, rows):
        fd, terminal = os.openpty()
        super().__init__(ptys, fd, cols, rows)
        try:
            self._client = subprocess.Popen(
                command,
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                start_new_session=True,
                env={**clean_environment(), "TERM": "xterm-256color"},
            )
        except OSError:
            self.close()
            raise
        finally:
            os.close(terminal)
        self.stream = ptys.live.open(session_id)
        self.session_id = session_id
        self.cut = b""  # the beginning of a character whose end has not been typed yet
        self.drawing = threading.Event()  # from then on the client takes what is typed
        self._unasking = Unasking()
        ptys.call(ptys.add, self)

    def wanted(self):
        return not self.ptys.live.full(self.stream)

    def received(self, data):
        self.drawing.set()
        self.ptys.show(self.stream, self._unasking(data))

    def ended(self):
        self.drawing.set()
        self._end_client()
        self.ptys.live.close(self.stream)

    def resize(self, cols, rows):
        before = self.size
        super().resize(cols, rows)
        if before and before != self.size:
            # Not its controlling terminal: the kernel does not tell the client by itself.
            self._client.send_signal(signal.SIGWINCH)

    def end(self):
        self.ptys.live.close(self.stream)  # first: tmux clears the screen of a client that goes
        self._end_client()
        self.ptys.call(self.ptys.drop, self)

    def _end_client(self):
        self._client.kill()
        self._client.wait()


# ---------------------------------------------------------------------------- tmux


@dataclasses.dataclass
class Pane:
    pane_id: str
    dead: bool
    exit_code: int | None
    pid: int
    piped: bool
    server_pid: int
    title: str = ""


class Tmux:
    """tmux on a socket of the agent's own; every call is an argument list."""

    kind = "tmux"
    PANE = (
        "#{session_name} #{pane_id} #{pane_dead} #{pane_pid} #{pane_pipe} #{pid}"
        " [#{pane_dead_status}] [#{pane_dead_signal}]\t#{pane_title}"
    )
    NO_SERVER = ("no server running on", "error connecting to")
    SOCKET_S = 2  # longest wait for a server to make its socket anew
    # For a live view: every key is the program's, and what is drawn is the program's screen. Set
    # when a view begins, so that older and adopted sessions have them too.
    VIEWED = (
        *("set-option", "-g", "prefix", "None", ";", "set-option", "-g", "prefix2", "None", ";"),
        *("set-option", "-g", "key-table", "none", ";"),  # one without a key in it
        # A character that tmux has read half of is lost after this time (see HALF_KEY).
        *("set-option", "-s", "escape-time", "500", ";", "set-option", "-g", "status", "off", ";"),
        *("set-option", "-s", "set-clipboard", "off", ";"),
        *("set-option", "-g", "set-titles", "off", ";", "set-option", "-g", "mouse", "off", ";"),
        *("set-option", "-g", "visual-bell", "off", ";"),
        *("set-option", "-s", "terminal-overrides", "xterm-256color:Tc", ";"),  # all colours
    )

    HALF_KEY = re.compile(rb"\x1b[][OP]?\Z")  # tmux would wait for the rest of it

    def __init__(self, socket_name, ptys):
        self.command = ["tmux", "-u", "-L", socket_name, "-f", "/dev/null"]
        self.socket_name = socket_name
        self.server_pid = None  # of the server, as far as it is known
        self.ptys = ptys
        self._views = {}  # session name: View
        self._lock = threading.Lock()

    def run(self, *arguments, data=None):
        """tmux's output. Raises TmuxError."""
        try:
            answer = subprocess.run(
                [*self.command, *arguments],
                input=data,
                capture_output=True,
                timeout=10,
                env=clean_environment(),
            )
        except FileNotFoundError as error:
            raise TmuxError("tmux is not installed: install it with your packages.") from error
        except subprocess.TimeoutExpired as error:
            raise TmuxError(f"tmux did not answer within 10 s ({arguments[0]}).") from error
        except OSError as error:
            raise TmuxError(f"tmux could not be started: {error.strerror}.") from error
        if answer.returncode:
            raise TmuxError(printable(answer.stderr.decode("utf-8", "replace")) or "tmux failed")
        return answer.stdout.decode("utf-8", "replace")

    def version(self):
        return self.run("-V").strip().removeprefix("tmux ")

    def new_session(self, name, argv, log_path, cols, rows):
        """Start argv in a new session; returns (pane id, pid). One call: with the pipe or
        remain-on-exit set in a second one, a fast program's first lines or exit are lost."""
        if not self._socket().exists():
            self.panes()  # or a second server would begin beside one that has lost it
        return tuple(
            self.run(
                *("start-server", ";", "set-option", "-g", "status", "off", ";"),
                *("set-option", "-g", "history-limit", str(HISTORY_LINES), ";"),
                *("set-option", "-wg", "remain-on-exit", "on", ";"),
                *("new-session", "-d", "-P", "-F", "#{pane_id} #{pane_pid}", "-s", name),
                *("-x", str(cols), "-y", str(rows), "--", *argv, ";"),
                # Set on the window: as a global option it crashes tmux 3.3a at new-session.
                *("set-option", "-w", "-t", f"={name}:", "window-size", "manual", ";"),
                *("pipe-pane", "-t", f"={name}:", pipe_command(log_path)),
            ).split()
        )

    def mend_pipe(self, name, log_path):
        self.run("pipe-pane", "-t", f"={name}:", pipe_command(log_path))

    def panes(self):
        """{session name: Pane} of the first pane of every orc- session."""
        lines = self._lines()
        if lines is None:
            lines = self._lines_again()
        panes = {}
        for line in lines:
            name, pane = self._pane(line)
            self.server_pid = pane.server_pid
            if name.startswith("orc-"):
                panes.setdefault(name, pane)
        return panes

    def _lines(self):
        """A line for each pane; None when no server is reached."""
        try:
            return self.run("list-panes", "-a", "-F", self.PANE).splitlines()
        except TmuxError as error:
            if str(error).startswith(self.NO_SERVER):
                return None
            if str(error).startswith("no current target"):
                return []
            raise

    def _lines_again(self):
        """The same when there is no socket: a server that lives, whose socket somebody has
        removed, makes it anew when it is told to. [] when there is none. Raises TmuxError when
        it lives and is not reached all the same: nothing is known of its sessions then."""
        lines, deadline = None, time.monotonic() + self.SOCKET_S
        while lines is None and self._lives() and time.monotonic() < deadline:
            signal_process(self.server_pid, signal.SIGUSR1)
            time.sleep(0.05)
            lines = self._lines()
        if lines is None and self._lives():
            raise TmuxError("tmux runs and cannot be reached")
        if lines is None:
            self.server_pid = None
        return lines or []

    def _lives(self):
        """Whether our server is a process still: nobody else has our socket's name among its
        arguments."""
        return bool(self.server_pid) and self.socket_name in command_line(self.server_pid)

    def _socket(self):
        """Where tmux has its socket."""
        base = os.path.realpath(os.environ.get("TMUX_TMPDIR") or "/tmp")
        return Path(base) / f"tmux-{os.getuid()}" / self.socket_name

    @staticmethod
    def _pane(line):
        line, _, title = line.partition("\t")
        name, pane_id, dead, pid, piped, server_pid, status, death = line.rsplit(" ", 7)
        code = exit_code_of(status.strip("[]"), death.strip("[]"))
        ends = dead == "1", code, int(pid), piped == "1", int(server_pid)
        return name, Pane(pane_id, *ends, title)

    def pane_state(self, name):
        """{pane_id, pane_in_mode, cursor} of the session's active pane, dead or alive."""
        form = "#{pane_id} #{pane_dead} #{pane_in_mode} #{cursor_x},#{cursor_y},#{history_size}"
        pane_id, dead, mode, cursor = self.run(
            "display-message", "-p", "-t", f"={name}:", form
        ).split()
        return types.SimpleNamespace(
            pane_id=pane_id, dead=dead == "1", in_mode=mode != "0", cursor=cursor
        )

    def leave_mode(self, name):
        self.run("send-keys", "-t", f"={name}:", "-X", "cancel")

    def paste(self, name, text):
        """Paste as one piece, newlines as data; bracketed if the program asked for that."""
        buffer = f"paste-{name}"
        self.run("load-buffer", "-b", buffer, "-", data=text.encode())
        self.run("paste-buffer", "-p", "-d", "-r", "-b", buffer, "-t", f"={name}:")

    def send(self, name, data):
        """Raw bytes, as hexadecimal numbers so that none is taken for the name of a key."""
        view = self._views.get(name)
        if view:
            data, view.cut = view.cut + data, b""
        for start in range(0, len(data), INPUT_CHUNK):
            numbers = [f"{byte:02x}" for byte in data[start : start + INPUT_CHUNK]]
            self.run("send-keys", "-t", f"={name}:", "-H", *numbers)

    def resize(self, name, cols, rows):
        """The window and its view; in between the view is the smaller one, since tmux fills up
        a larger one with a border and dots."""
        view = self._views.get(name)
        if view:
            view.resize(*map(min, view.size, (cols, rows)))
        self.run("resize-window", "-t", f"={name}:", "-x", str(cols), "-y", str(rows))
        if view:
            view.resize(cols, rows)

    def screen(self, name, *options):
        return self.run("capture-pane", "-p", *options, "-t", f"={name}:").rstrip("\n").split("\n")

    def scrollback(self, name):
        return self.screen(name, "-S", "-")

    def kill_session(self, name):
        self._replace(name, None)  # first, so that the last picture stays
        with contextlib.suppress(TmuxError):  # it is gone, which is what we want
            self.run("kill-session", "-t", f"={name}")

    # -- live views

    def watch(self, name, session_id):
        """Begin a live view, or begin it anew."""
        view = self._views.get(name)
        if view:
            view.wait_written(SETTLE_S)  # and tmux will have read it when it has answered
        cols, rows = self.run(
            *self.VIEWED,
            *("set-option", "-w", "-t", f"={name}:", "window-size", "manual", ";"),
            *("display-message", "-p", "-t", f"={name}:", "#{window_width} #{window_height}"),
        ).split()
        attach = [*self.command, "attach-session", "-E", "-t", f"={name}"]
        view = View(self.ptys, session_id, attach, int(cols), int(rows))
        view.drawing.wait(SETTLE_S)
        self._replace(name, view)

    def unwatch(self, name):
        """End the live view, if there is one."""
        if name in self._views:
            self.settle(name)
            self._replace(name, None)

    def watch_lost(self, name):
        """Whether there should be a view, but its client has ended."""
        view = self._views.get(name)
        return view is not None and view.fd is None

    def _replace(self, name, view):
        with self._lock:
            old = self._views.pop(name, None)
            if view:
                self._views[name] = view
        if old:
            old.end()

    def write(self, name, data):
        """Type into the view, without waiting; False if that cannot be done."""
        view = self._views.get(name)
        if view is None or view.fd is None:
            return False
        whole, cut = whole_characters(view.cut + data)
        if not is_utf8(whole) or self.HALF_KEY.search(whole):
            return False  # tmux would drop or delay it
        view.write(whole)
        view.cut = cut
        return True

    def settle(self, name):
        """Wait until tmux has what was typed into the view: to answer, it has read on."""
        view = self._views.get(name)
        if view and view.fd is not None:
            view.wait_written(SETTLE_S)
            with contextlib.suppress(TmuxError):
                self.run("display-message", "-p", "")


def whole_characters(data):
    """(data up to a character that is cut at its end, the beginning of that)."""
    cut = re.search(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z", data)
    return (data[: cut.start()], cut[0]) if cut else (data, b"")


def is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def pipe_command(log_path):
    """tmux expands # formats and % times in it, then gives it to a shell."""
    command = f"exec cat >> {shlex.quote(str(log_path))}"
    return command.replace("#", "##").replace("%", "%%")


def exit_code_of(status, death):
    """As a shell says it: 128 + n for signal n; None while tmux does not know."""
    if status:
        return int(status)
    if death:
        return 128 + (int(death) if death.isdigit() else signal.Signals[f"SIG{death}"])
    return None


# ---------------------------------------------------------------------------- without tmux


class Plain(Pty):
    """A session that is nothing but a pseudo-terminal. All it prints is appended to its log,
    and to the live view as long as that has room; then the view begins anew with a repaint."""

    BRACKETED = re.compile(rb"\x1b\[\?(?:[0-9]+;)*2004(?:;[0-9]+)*([hl])")

    def __init__(self, ptys, fd, pid, log_path, cols, rows):
        super().__init__(ptys, fd, cols, rows)
        self.pid = pid
        self.log_path = log_path
        self.exit_code = None
        self.over = False  # nothing is printed any more
        self.recorded = True  # False: the log could not be written
        self.bracketed = False  # the program wants to know what is pasted
        self.stream = None  # the live view, if somebody looks
        self._end = b""  # the last bytes, in which a mode may have been cut
        self._skipped = False
        self._unasking = None
        self._log = open_private(log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        ptys.call(ptys.add, self)

    def received(self, data):
        self._record(data)
        modes = self.BRACKETED.findall(self._end + data)
        if modes:
            self.bracketed = modes[-1] == b"h"
        self._end = (self._end + data)[-32:]
        if self.stream is None:
            return
        if self.ptys.live.full(self.stream):
            self._skipped = True
        elif not self._skipped:
            self.ptys.show(self.stream, self._unasking(data))

    def _record(self, data):
        """Append to the log; what cannot be written is lost, until the recording is mended."""
        try:
            while data and self.recorded:
                data = data[os.write(self._log, data) :]
        except OSError as error:
            log.error("%s cannot be written: %s", self.log_path, error.strerror)
            self.recorded = False

    def freed(self):
        if self._skipped and self.stream and not self.ptys.live.full(self.stream):
            self.repaint(self.stream.session_id)

    def repaint(self, session_id):
        """Begin a live view: a reset, and what the log says from the beginning of a line."""
        self.stream = self.ptys.live.open(session_id)
        self._skipped = False
        self._unasking = Unasking()
        self.ptys.show(self.stream, self._unasking(b"\x1bc" + last_part(self.log_path)))

    def unwatch(self):
        if self.stream:
            self.ptys.live.close(self.stream)
        self.stream = None

    def ended(self):
        self.over = True
        os.close(self._log)

    def reap(self, flags=os.WNOHANG):
        """Note the exit code once there is one."""
        with self._changed:
            if self.exit_code is None:
                pid, status = os.waitpid(self.pid, flags)
                if pid:
                    code = os.waitstatus_to_exitcode(status)
                    self.exit_code = code if code >= 0 else 128 - code


class Plains:
    """Sessions in plain pseudo-terminals, for servers without tmux: they end with the agent."""

    kind = "pty"

    def __init__(self, ptys):
        self.ptys = ptys
        self._all = {}  # name: Plain

    def version(self):
        return None

    def new_session(self, name, argv, log_path, cols, rows):
        fd, pid = self._spawn(argv, cols, rows)
        self._all[name] = Plain(self.ptys, fd, pid, log_path, cols, rows)
        return f"pty{pid}", pid

    @staticmethod
    def _spawn(argv, cols, rows):
        """(our side, process id) of a program in a new pseudo-terminal."""
        try:
            import pexpect

            env = {**clean_environment(), "TERM": "xterm-256color"}
            started = pexpect.spawn(argv[0], argv[1:], env=env, dimensions=(rows, cols), echo=True)
        except ImportError as error:
            raise AgentError("Neither tmux nor pexpect is installed: install tmux.") from error
        except (OSError, pexpect.ExceptionPexpect) as error:
            raise AgentError(f"No terminal could be started: {printable(error)}.") from error
        # From here on it is ours: pexpect would close it, and wait, when it lets go.
        fd = os.dup(started.child_fd)
        started.ptyproc.fileobj.close()
        started.closed = started.ptyproc.closed = True
        return fd, started.pid

    def _get(self, name):
        plain = self._all.get(name)
        if plain is None:
            raise AgentError("The session's terminal is gone.")
        return plain

    def panes(self):
        """{session name: Pane} of every session."""
        return {name: self._pane(plain) for name, plain in list(self._all.items())}

    @staticmethod
    def _pane(plain):
        plain.reap()
        dead = plain.over and plain.exit_code is not None
        return Pane(f"pty{plain.pid}", dead, plain.exit_code, plain.pid, plain.recorded, 0)

    def pane_state(self, name):
        plain = self._get(name)
        printed = os.path.getsize(plain.log_path)  # moves with what is typed, as a cursor does
        return types.SimpleNamespace(
            pane_id=f"pty{plain.pid}", dead=plain.over, in_mode=False, cursor=printed
        )

    def mend_pipe(self, name, log_path):
        self._get(name).recorded = True

    def paste(self, name, text):
        plain = self._get(name)
        data = text.encode()
        plain.write(b"\x1b[200~" + data + b"\x1b[201~" if plain.bracketed else data)

    def send(self, name, data):
        self._get(name).write(data)

    def write(self, name, data):
        self.send(name, data)
        return True

    def settle(self, name):
        self._get(name).wait_written(SETTLE_S)

    def resize(self, name, cols, rows):
        self._get(name).resize(cols, rows)

    def screen(self, name):
        plain = self._get(name)
        return plain_lines(last_part(plain.log_path))[-plain.size[1] :]

    def scrollback(self, name):
        return plain_lines(last_part(self._get(name).log_path, SCROLLBACK_BYTES))[-HISTORY_LINES:]

    def watch(self, name, session_id):
        self.ptys.call(self._get(name).repaint, session_id)

    def unwatch(self, name):
        plain = self._all.get(name)
        if plain:
            self.ptys.call(plain.unwatch)

    def watch_lost(self, name):
        return False

    def kill_session(self, name):
        plain = self._all.pop(name, None)
        if plain is None:
            return
        if plain.exit_code is None:
            signal_programs(plain.pid, signal.SIGKILL)
            signal_process(plain.pid, signal.SIGKILL)
            plain.reap(0)
        self.ptys.call(plain.unwatch)
        self.ptys.call(self.ptys.drop, plain)


def last_part(path, size=64 * KB):
    """The end of a log from the beginning of a line, or of it all if it is that short."""
    data = read_end(path, size)
    return data if len(data) < size else data[data.find(b"\n") + 1 :]


def plain_lines(data):
    """Terminal output as lines of text, as far as that can be said without a screen."""
    text = ESCAPES.sub("", data.decode("utf-8", "replace"))
    lines = [line.rstrip("\r").rsplit("\r")[-1] for line in text.split("\n")]
    return [CONTROL.sub(" ", line) for line in lines]


# ---------------------------------------------------------------------------- inside a session


def exec_session(path):
    """The first program of a session's terminal: runs what the 0600 file says, so that
    neither environment nor arguments stand on a command line.

    It stays as the parent, because tmux 3.3 can drop the last bytes of a program whose end it
    sees before its output: the terminal is kept open until the log has stopped growing. Meanwhile
    it notes when the log grew: it is there when the agent is not.
    """
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    os.environ.update(order["env"])
    signal.pthread_sigmask(signal.SIG_BLOCK, LEADER_SIGNALS | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LEADER_SIGNALS | {signal.SIGCHLD})
        run_program(order["argv"], order["cwd"])
    clock = Clock(Path(order["log"]))
    status = lead(child, clock.look)
    wait_until_still(order["log"])
    clock.look()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


LEADER_SIGNALS = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM}


def lead(child, look):
    """Wait for the child as the leader of its terminal, looking now and then; its status.

    The kernel tells only the leader that a terminal has gone, so that is passed on; keys like
    Ctrl-C reach the child by themselves."""
    for number in LEADER_SIGNALS:
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _: signal_process(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEADER_SIGNALS)
    ended, pause = 0, TIMES_S
    while not ended:
        signal.sigtimedwait({signal.SIGCHLD}, pause)
        pause = TIMES_S if look() else min(pause * 1.1, TIMES_IDLE_S)
        ended, status = os.waitpid(child, os.WNOHANG)
    for number in LEADER_SIGNALS:  # the child's number may soon be another process's
        signal.signal(number, signal.SIG_IGN)
    return status


class Clock:
    """Notes when a log grew, as lines `<unix time in ms> <size>` in `output.times` beside it.
    When there are too many, every second one goes: older ones come to lie farther apart."""

    def __init__(self, log_path):
        self.log_path = log_path
        self.path = times_path(log_path)
        self.size = 0

    def look(self):
        """Whether the log has grown since the last look."""
        with contextlib.suppress(OSError):  # the disk is full, or the session forgotten
            before, self.size = self.size, os.path.getsize(self.log_path)
            if self.size != before:
                self._note(f"{time.time() * 1000:.0f} {self.size}\n")
            return self.size != before

    def _note(self, line):
        with open(self.path, "a", encoding="ascii", opener=open_private) as file:
            file.write(line)
            full = file.tell() > TIMES_BYTES
        if full:
            lines = self.path.read_text(encoding="ascii").splitlines(keepends=True)
            write_private(self.path, "".join(lines[len(lines) % 2 :][1::2]))


def times_path(log_path):
    return log_path.with_name("output.times")


def run_program(argv, cwd):
    """Become the program; its end is the exit code a shell would give."""
    # Python changes the effect of some, and an agent that was started with `nohup` or in the
    # background of a script ignores others; programs expect the usual one.
    for number in {*LEADER_SIGNALS, signal.SIGPIPE, signal.SIGXFSZ}:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.chdir(cwd)
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {printable(argv[0])} in {cwd}: {error.strerror}", file=sys.stderr)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def wait_until_still(path, pause_s=0.05, limit_s=5):
    """Return when the file has kept its size over one pause, or after the limit."""
    end = time.monotonic() + limit_s
    size = None
    while size != (size := os.path.getsize(path)) and time.monotonic() < end:
        time.sleep(pause_s)


# ---------------------------------------------------------------------------- logs


class Times:
    """When the bytes of one log were printed, as its `Clock` has noted."""

    def __init__(self, path):
        self.path = path
        self._file = None  # its number, which is new when notes were left out
        self._read_to = 0
        self._sizes, self._at = [], []  # at so many seconds the log had so many bytes

    def look(self, offset):
        """Read what was noted since, and let go of what was before `offset`."""
        try:
            with self.path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                if number != self._file:
                    self._file, self._read_to = number, 0
                    self._sizes, self._at = [], []
                file.seek(self._read_to)
                data = file.read()
        except OSError:
            return
        data = data[: data.rfind(b"\n") + 1]
        self._read_to += len(data)
        for at, size in re.findall(rb"(\d+) (\d+)\n", data):
            self._sizes.append(int(size))
            self._at.append(int(at) / 1000)
        passed = bisect.bisect_right(self._sizes, offset)
        del self._sizes[:passed], self._at[:passed]

    def of(self, start, stop, now):
        """When the byte at `start` was printed, and [[n, s], …]: byte n from there on (before
        `stop`) so many seconds later. What has not been noted yet is printed `now`."""
        first = bisect.bisect_right(self._sizes, start)
        last = bisect.bisect_left(self._sizes, stop)
        at = [*self._at[first : last + 1], now][: last - first + 1]
        later = itertools.accumulate((t - at[0] for t in at[1:]), max, initial=0.0)
        steps = zip(self._sizes[first:last], itertools.islice(later, 1, None), strict=True)
        return at[0], [[size - start, round(seconds, 3)] for size, seconds in steps]


@dataclasses.dataclass
class Tail:
    """How far one session's log has been sent; `acked` is None until the hub has told. What was
    before `start` is not on the disk any more."""

    path: Path
    acked: int | None
    start: int = 0
    sent: int = 0
    sent_at: float = 0.0

    def __post_init__(self):
        self.sent = max(self.acked or 0, self.start)
        self.times = Times(times_path(self.path))

    @property
    def base(self):
        """Where sending goes on when nothing is under way."""
        return max(self.acked, self.start)

    def size(self):
        """Bytes on the disk; what was sent if somebody has deleted the file."""
        try:
            return os.path.getsize(self.path)
        except OSError:
            return self.sent


class Logs:
    """The complete output of every session, sent from the hub's acknowledged offset on."""

    def __init__(self, settings):
        self.settings = settings
        self._lock = threading.Lock()
        self._tails = {}

    def follow(self, session_id, path, acked=None, start=0):
        with self._lock:
            self._tails[session_id] = Tail(path, acked, start)

    def cut(self, session_id, start):
        """What is before `start` is not read any more: it goes from the disk."""
        with self._lock:
            tail = self._tails.get(session_id)
            if tail is not None:
                tail.start = start
                tail.sent = max(tail.sent, start)

    def drop(self, session_id):
        with self._lock:
            self._tails.pop(session_id, None)

    def acknowledge(self, session_id, offset):
        with self._lock:
            tail = self._tails.get(session_id)
            if tail is None:
                return
            if tail.acked is None or offset < tail.acked:
                tail.sent = offset
            tail.acked = offset
            tail.sent = max(tail.sent, tail.base)

    def acked(self, session_id):
        with self._lock:
            tail = self._tails.get(session_id)
            return tail.acked if tail else None

    def rewind(self):
        """A new connection: nothing is sent until the hub has said how far it is."""
        with self._lock:
            for tail in self._tails.values():
                tail.acked = None

    def due(self, now):
        """Whether a call would carry something."""
        with self._lock:
            return any(self._due(tail, now) for tail in self._tails.values())

    def _due(self, tail, now):
        if tail.acked is None or now - tail.sent_at < self.settings.log_pause_s:
            return False
        if tail.sent > tail.base and now - tail.sent_at > self.settings.resend_s:
            tail.sent = tail.base
        return tail.sent < min(tail.size(), tail.base + WINDOW_BYTES)

    def take(self, now):
        """The blocks to send now."""
        blocks, left = [], CALL_BYTES
        with self._lock:
            for session_id, tail in self._tails.items():
                if left > 0 and self._due(tail, now):
                    new = self._read(session_id, tail, left)
                    left -= sum(len(block["data"]) for block in new)
                    blocks += new
                    tail.sent_at = now
        return blocks

    @staticmethod
    def _read(session_id, tail, most):
        most = min(most, tail.base + WINDOW_BYTES - tail.sent)
        try:
            with tail.path.open("rb") as file:
                file.seek(tail.sent)
                data = file.read(most)
        except OSError:
            return []  # somebody has deleted it; the other sessions go on
        tail.times.look(tail.base)
        now = time.time()
        blocks = [
            Logs._block(session_id, tail, data[start : start + BLOCK_BYTES], tail.sent + start, now)
            for start in range(0, len(data), BLOCK_BYTES)
        ]
        tail.sent += len(data)
        return blocks

    @staticmethod
    def _block(session_id, tail, data, offset, now):
        at, times = tail.times.of(offset, offset + len(data), now)
        block = {
            "type": "session_log",
            "session_id": session_id,
            "offset": offset,
            "data": base64.b64encode(data).decode(),
            "at": iso_of(at),
        }
        return block | ({"times": times} if times else {})


def released(path, start, stop):
    """Give the disk back what the file holds between; its size and the rest stay as they are.
    Whether that could be done here."""
    import ctypes

    keep_size, punch_hole = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    try:
        with path.open("r+b") as file:
            return fallocate(file.fileno(), keep_size | punch_hole, start, stop - start) == 0
    except OSError:
        return False


def can_release(directory):
    """Whether the file system lets go of parts of a file."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            return released(Path(file.name), 0, KB)
    except OSError:
        return False


class Outgoing:
    """All that waits to be sent, in the order: acknowledgements, spool, words of the moment,
    logs. `wake` is set when there is something."""

    def __init__(self, store, logs, settings):
        self.store = store
        self.logs = logs
        self.settings = settings
        self.wake = threading.Event()
        self.live = Live(self.wake)
        self._lock = threading.Lock()
        self._acks = []
        self._moments = collections.deque(maxlen=1000)
        self._spool_sent = 0
        self._spool_sent_at = 0.0

    def acknowledge(self, ids):
        with self._lock:
            self._acks += ids
        self.wake.set()

    def say(self, frame):
        """For the moment only: lost if the connection is."""
        with self._lock:
            self._moments.append(frame)
        self.wake.set()

    def spool(self, *frames):
        self.store.spool(*frames)
        self.wake.set()

    def rewind(self):
        """The connection is new: send again what was not acknowledged."""
        with self._lock:
            self._acks.clear()  # the hub sends those commands again
            self._moments.clear()
            self._spool_sent = 0
        self.live.clear()
        self.logs.rewind()

    def due(self, now):
        return self._spool_overdue(now) or self.logs.due(now)

    def _spool_overdue(self, now):
        late = now - self._spool_sent_at > self.settings.resend_s
        return late and self._spool_sent >= self.store.spool_first()

    def take(self, now):
        with self._lock:
            return [
                *self._take_acks(),
                *self._take_spool(now),
                *self._take_moments(),
                *self.logs.take(now),
            ]

    def take_urgent(self):
        """What should not wait behind reports and logs, nor for the disk they come from."""
        with self._lock:
            return self._take_acks() + self._take_moments()

    def _take_acks(self):
        acks, self._acks = self._acks, []
        return [{"type": "ack", "ids": acks}] if acks else []

    def _take_moments(self):
        moments = list(self._moments)
        self._moments.clear()
        return moments + self.live.take()

    def _take_spool(self, now):
        if self._spool_overdue(now):
            self._spool_sent = 0
        frames = self.store.spooled_after(self._spool_sent)
        if frames:
            self._spool_sent, self._spool_sent_at = frames[-1]["spool"], now
            self.wake.set()  # there may be more
        return frames


# ---------------------------------------------------------------------------- sessions


class Sessions:
    """Everything done to sessions: starting, typing, watching, closing."""

    def __init__(self, config, state_dir, settings, store, outgoing, terminals):
        self.config = config
        self.settings = settings
        self.store = store
        self.outgoing = outgoing
        self.logs = outgoing.logs
        self.terminals = {terminal.kind: terminal for terminal in terminals}
        self.kind = terminals[0].kind  # of new sessions
        self.root = make_private_dir(state_dir / "sessions")
        self.bin = make_private_dir(state_dir / "bin")
        self.compiled = make_private_dir(state_dir / "compiled")
        store.owed.do(install_starter, self.compiled)
        store.owed.do(install_cli, self.bin, self.compiled)
        self.profiles = parse_profiles(store.get("profiles", {}))
        self.lock = threading.RLock()
        self.on_typed = lambda session, data: None  # told of what people type
        self.all = {session.session_id: session for session in store.sessions()}
        self._releases = can_release(self.root)
        self._release_at = 0.0
        self._typing = collections.defaultdict(threading.Lock)
        self._sizes = {}  # session id: log size at the last look at a dead pane
        self._deadlines = {}  # session id: when a closing one is killed
        self._hang_up_at = {}  # session id: when its programs are told again to end
        self._mend_at = {}  # session id: earliest next mending of its pipe
        self._view_at = {}  # session id: earliest next mending of its live view
        self._screens = {}  # session id: (size of log, lines, time) of the last screen
        self._screen_due = {}  # session id: when to look although the interval is not over
        self._memories = (
            *(self._sizes, self._deadlines, self._hang_up_at, self._mend_at),
            *(self._screens, self._screen_due, self._view_at),
        )

    # -- finding

    def live(self):
        with self.lock:
            return [session for session in self.all.values() if session.state == "live"]

    def get_live(self, session_id):
        session = self.all.get(session_id)
        if session is None or session.state != "live":
            raise AgentError(f"The session {session_id} does not run on this server.")
        return session

    def live_of_attempt(self, task_id, attempt):
        return next(
            (s for s in self.live() if task_id and (s.task_id, s.attempt) == (task_id, attempt)),
            None,
        )

    def terminal(self, session):
        """What keeps the session."""
        terminal = self.terminals.get(session.terminal)
        if terminal is None:
            raise TmuxError("tmux is not installed any more: install it and restart the agent.")
        return terminal

    def panes(self):
        """{session name: Pane} of all that is kept."""
        panes = [terminal.panes() for terminal in self.terminals.values()]
        return {name: pane for found in panes for name, pane in found.items()}

    def directory(self, session):
        return self.directory_of(session.session_id)

    def directory_of(self, session_id):
        return self.root / session_id

    def log_path(self, session):
        return self.directory(session) / "output.log"

    def log_size(self, session):
        try:
            return self.log_path(session).stat().st_size
        except FileNotFoundError:
            return 0

    # -- starting

    def start(self, order, task=None):
        """Carry out a session_start; said twice, or twice for one attempt, it starts once."""
        with self.lock:
            try:
                if self._goes_on_starting(self.all.get(order["session_id"])):
                    return
                existing = self.all.get(order["session_id"]) or self.live_of_attempt(
                    order.get("task_id"), order.get("attempt")
                )
                if existing:
                    return self._say_started_again(existing)
                self._start(order, task)
            except (AgentError, OSError, ValueError, TypeError, KeyError) as error:
                self._say_not_started(order, error)

    def _goes_on_starting(self, session):
        """Whether it was a start that the store had refused in the middle, and is done now."""
        if session is None or session.state != "starting":
            return False
        self._recover_starting(session, self.panes().get(session.tmux_name))
        return session.state == "live"

    def _say_started_again(self, session):
        if session.state == "live":
            self.outgoing.spool(self._started(session))

    def _say_not_started(self, order, error):
        sentence = printable(error)
        log.error("session %s was not started: %s", printable(order["session_id"], 36), sentence)
        self.outgoing.spool(
            {
                "type": "session_error",
                "session_id": order["session_id"],
                "error": sentence,
                "task_id": order.get("task_id"),
                "attempt": order.get("attempt"),
            }
        )

    def _start(self, order, task):
        session_id = valid_session_id(order["session_id"])
        profile = self.profile(order.get("profile"))
        launch = Launch(self.directory_of(session_id), order, profile, self.compiled)
        argv = program_of(order, task, profile, launch)
        session = Session(
            session_id,
            f"orc-{session_id[:12]}",
            profile=order.get("profile"),
            ends_task=bool(order.get("task_id") and profile.get("completes_on_exit")),
            task_id=order.get("task_id"),
            attempt=order.get("attempt"),
            title=(task or {}).get("title") or order.get("name") or "",
            working_directory=self._directory_of(order),
            terminal=self.kind,
            launch=launch.id,
            conversation=launch.conversation,
            mode=order.get("mode"),
        )
        self._write_files(session, order, task, argv, launch)
        self.store.save(session)
        self._add(session)
        try:
            pane_id, pid = self._launch(session, order)
        except (AgentError, OSError):
            self._forget(session)
            raise
        self._say_live(session, pane_id, int(pid))

    def _add(self, session, acked=0):
        self.all[session.session_id] = session
        path = self.log_path(session)
        self.logs.follow(session.session_id, path, acked=acked, start=session.log_start)

    def _directory_of(self, order):
        path = order.get("working_directory")
        if not path and order.get("repo"):
            path = self._repo_path(order["repo"])
        path = os.path.expanduser(path or "~")
        if not os.path.isdir(path):
            raise AgentError(
                f"The directory {path} does not exist on this server: make it there, "
                "or give the session another working directory."
            )
        return os.path.abspath(path)

    def _repo_path(self, name):
        repo = (self.config.get("repos") or {}).get(name)
        if repo is None:
            raise AgentError(
                f"This server has no repo {name}: add it to `repos` in the agent's config "
                "and restart the agent."
            )
        return repo["path"] if isinstance(repo, dict) else repo

    def profile(self, name):
        if name is None:
            return {"start": "shell"}
        if name not in self.profiles:
            raise AgentError(
                f"The profile {name} is not known to this server: the hub has not sent it. "
                "Check the name, or add the profile on the hub."
            )
        return self.profiles[name]

    def _write_files(self, session, order, task, argv, launch):
        directory = make_private_dir(self.directory(session))
        launch.write()
        os.close(open_private(self.log_path(session), os.O_CREAT | os.O_APPEND | os.O_WRONLY))
        if task is not None:
            write_private(directory / "task.json", json.dumps(task, indent=2))
        run = {
            "argv": argv,
            "env": {**launch.env, **self._environment(session, order, task)},
            "cwd": session.working_directory,
            "log": str(self.log_path(session)),
        }
        write_private(directory / "run.json", json.dumps(run))

    def _environment(self, session, order, task):
        directory = self.directory(session)
        ours = {
            "ORCHESTRATIA_HUB_URL": self.config["hub_url"],
            "ORCHESTRATIA_API_KEY": order.get("session_key"),
            "ORCHESTRATIA_SESSION_ID": session.session_id,
            "ORCHESTRATIA_PROJECT_ID": order.get("project_id"),
            "ORCHESTRATIA_TASK_ID": session.task_id,
            "ORCHESTRATIA_RESULT_FILE": str(directory / "result.json") if session.task_id else None,
            "ORCHESTRATIA_TASK_FILE": str(directory / "task.json") if task else None,
            "ORCHESTRATIA_BIN": str(self.bin),
        }
        env = {**(order.get("env") or {}), **{k: v for k, v in ours.items() if v is not None}}
        path = env.get("PATH") or os.environ.get("PATH") or os.defpath
        return {name: str(value) for name, value in env.items()} | {"PATH": f"{self.bin}:{path}"}

    def _launch(self, session, order):
        run = self.directory(session) / "run.json"
        # Isolated and without site-packages: nothing of the user's shadows a module of ours.
        argv = [*run_compiled(__file__, self.compiled, "-I", "-S"), "--exec-session", str(run)]
        size = int(order.get("cols") or 120), int(order.get("rows") or 40)
        return self.terminal(session).new_session(
            session.tmux_name, argv, self.log_path(session), *size
        )

    def _say_live(self, session, pane_id, pid):
        frames = [{**self._started(session), "pid": pid}]
        if session.ends_task:
            frames.append(self.report(session, outcome="started"))
        self.store.save(session, *frames, state="live", pane_id=pane_id, pid=pid)
        self.outgoing.wake.set()
        log.info("%s started", session)

    def _started(self, session):
        return {
            "type": "session_started",
            "session_id": session.session_id,
            "tmux_name": session.tmux_name,
            "terminal": session.terminal,
            "pid": session.pid,
            "working_directory": session.working_directory,
            "task_id": session.task_id,
            "attempt": session.attempt,
            "conversation": session.conversation,
        }

    @staticmethod
    def report(session, **said):
        return {
            "type": "task_report",
            "task_id": session.task_id,
            "attempt": session.attempt,
            "session_id": session.session_id,
            **said,
        }

    # -- taking up again after a restart

    def recover(self):
        """Compare what we wrote down with what there is, once, before connecting. What cannot be
        written now is done by its command, or at a look of the monitor."""
        self._remember_tmux()
        panes = self.panes()
        for session in list(self.all.values()):
            path = self.log_path(session)
            if session.log_start:
                released(path, 0, session.log_start)  # the last run may have ended before that
            self.logs.follow(session.session_id, path, start=session.log_start)
            if session.terminal not in self.terminals:
                log.error("%s is left alone: install tmux and restart the agent", session)
                continue
            with contextlib.suppress(sqlite3.OperationalError):
                self.RECOVERIES[session.state](self, session, panes.get(session.tmux_name))

    def _remember_tmux(self):
        """Tell tmux which process its server is, as a program that it has started knows."""
        for session in self.live():
            terminal = self.terminals.get(session.terminal)
            if isinstance(terminal, Tmux) and self._runs(session):
                terminal.server_pid = parent_of(session.pid)

    def _recover_starting(self, session, pane):
        if pane is None:
            self._forget(session)  # its command is not done and runs again
        else:
            self._say_live(session, pane.pane_id, pane.pid)

    def _recover_live(self, session, pane):
        if pane is None:
            self._end_left_over(session)
            return self._finish(session, None)
        log.info("%s found again", session)
        self.store.owed.do(
            self.outgoing.spool,
            {
                "type": "session_recovered",
                "session_id": session.session_id,
                "tmux_name": session.tmux_name,
            },
        )

    def _end_left_over(self, session):
        """Programs that did not mind the hang-up when their terminal went: before it is said that
        it is gone, since their task may then be given out again."""
        if self._runs(session):
            log.warning("%s: its programs had outlived their terminal and are ended", session)
            signal_programs(session.pid, signal.SIGKILL)
            signal_process(session.pid, signal.SIGKILL)

    def _runs(self, session):
        """Whether the first program of the session is there, with or without its terminal."""
        return str(self.directory(session) / "run.json") in command_line(session.pid)

    def _recover_ended(self, session, pane):
        if pane is not None:
            self.terminal(session).kill_session(session.tmux_name)

    RECOVERIES = {
        "starting": _recover_starting,
        "live": _recover_live,
        "ended": _recover_ended,
    }

    # -- agreeing with the hub

    def listed(self):
        """The sessions for the sync frame: ours, then tmux sessions we know nothing of."""
        panes = self.panes()
        with self.lock:
            ours = [self._listed(session) for session in self.all.values()]
            known = {session.tmux_name for session in self.all.values()}
        strangers = [
            {
                "session_id": None,
                "tmux_name": name,
                "terminal": "tmux",
                "pid": pane.pid,
                "alive": not pane.dead,
            }
            for name, pane in panes.items()
            if name not in known
        ]
        return ours + strangers

    def _listed(self, session):
        return {
            "session_id": session.session_id,
            "tmux_name": session.tmux_name,
            "terminal": session.terminal,
            "pid": session.pid,
            "alive": session.state != "ended",
            "exit_code": session.exit_code,
            "working_directory": session.working_directory,
            "profile": session.profile,
            "task_id": session.task_id,
            "attempt": session.attempt,
            "conversation": session.conversation,
            "activity": "no_signal",
            "log_start": session.log_start,
            "log_end": self.log_size(session),
        }

    def agree(self, answer, listed):
        """Do what sync_ok says of the sessions that were listed."""
        for entry in answer.get("sessions", []):
            session = self.all.get(entry.get("session_id"))
            if session is not None:
                self.AGREEMENTS[entry["action"]](self, session, entry)
        adopted = {entry["tmux_name"]: entry for entry in answer.get("adopt", [])}
        for entry in listed:
            if entry["session_id"] is None:
                told = adopted.get(entry["tmux_name"])
                self.store.owed.do(self._adopt_or_close, entry, told)

    def _keep(self, session, entry):
        acked = entry.get("log_acked") or 0
        if acked < session.log_start and not self.store.declares_gap(session.session_id, acked):
            gap = self._gap(session, acked, session.log_start, "the hub had stored it once")
            self.store.owed.do(self.outgoing.spool, gap)
        self.logs.acknowledge(session.session_id, acked)
        self.sweep(session)

    def _drop(self, session, _entry):
        self.store.owed.do(self._end_or_forget, session)

    def _end_or_forget(self, session):
        if session.state == "live":
            self.close(session, force=True, cancelled=True)
        else:
            self._forget(session)

    AGREEMENTS = {"keep": _keep, "close": _drop}

    def _adopt_or_close(self, entry, told):
        """told: what the hub knows of a terminal that we have no notes of; None to close it."""
        try:
            if told is not None:
                return self._adopt(entry, told)
            log.warning("%s is closed: the hub does not know it", entry["tmux_name"])
            self.terminals["tmux"].kill_session(entry["tmux_name"])
        except AgentError as error:  # it has ended meanwhile, for one: the others go on
            log.warning("%s: %s", entry["tmux_name"], error)

    def _adopt(self, entry, told):
        acked = told.get("log_acked") or 0
        with self.lock:
            session = self._adopted(entry, told, acked)
            self.store.save(session)
            self._add(session, acked)
        log.info("%s adopted", session)
        if entry["alive"]:
            self._mend(session, "the session was adopted; what it printed before is not known")

    def _adopted(self, entry, told, acked):
        """Its output goes on where the hub's record ends, behind what is left of its file."""
        session = Session(
            valid_session_id(told["session_id"]),
            entry["tmux_name"],
            state="live",
            profile=told.get("profile"),
            task_id=told.get("task_id"),
            attempt=told.get("attempt"),
            working_directory=told.get("working_directory") or "",
            conversation=told.get("conversation"),
            pid=entry["pid"],
            log_start=acked,
        )
        profile = self.profiles.get(session.profile, {})
        session.ends_task = bool(session.task_id and profile.get("completes_on_exit"))
        session.pane_id = self.terminal(session).pane_state(session.tmux_name).pane_id
        make_private_dir(self.directory(session))
        path = self.log_path(session)
        os.close(open_private(path, os.O_CREAT | os.O_WRONLY))
        if path.stat().st_size < acked:
            os.truncate(path, acked)
        return session

    # -- typing

    def type(self, session_id, text):
        """Type text and submit it. Raises AgentError, and then nothing was submitted."""
        session = self.get_live(session_id)
        terminal = self.terminal(session)
        profile = self.profiles.get(session.profile) or {}
        text = typeable(text)
        if profile.get("text") and text.endswith("\\"):
            text += "\n"  # or it would take the Enter behind it
        with self._typing[session_id]:
            terminal.settle(session.tmux_name)
            before = self._ready_for_typing(session)
            self._refuse_dialog(session, profile)
            pasted = self._paste(session, profile, text, before) if text else None
            # A byte, not the key's name: "Enter" is not submitted by every tmux.
            terminal.send(session.tmux_name, b"\r")
            if pasted:
                self._see_submitted(session, profile, pasted)
        self._look_soon(session)

    def _refuse_dialog(self, session, profile):
        """Raises AgentError when a dialog is on the screen, which would take the text for keys."""
        if not profile.get("screens"):
            return
        lines = self.terminal(session).screen(session.tmux_name)
        state = (read_screen(profile, lines) or {}).get("state") or ""
        if state.startswith("blocked"):
            raise DialogOpen(
                f"The session waits at a prompt ({state}): answer that first; nothing was typed."
            )

    def draft(self, session):
        """What stands in the session's prompt box, "" where that cannot be seen."""
        return self._draft(session, self.profiles.get(session.profile) or {})

    def _draft(self, session, profile):
        """What stands in the prompt box; it may be a hint that nobody has typed."""
        if not profile.get("draft"):
            return ""
        return draft_of(profile["draft"], self.terminal(session).screen(session.tmux_name))

    def _paste(self, session, profile, text, before):
        """Paste the text and wait until it is there; what stands in the prompt box then, "" where
        that cannot be seen."""
        was = self._draft(session, profile)
        self.terminal(session).paste(session.tmux_name, text)
        deadline = time.monotonic() + self.settings.typing_limit_s / 4
        while profile.get("draft") and time.monotonic() < deadline:
            now = self._draft(session, profile)
            if now not in ("", was):
                return now
            time.sleep(0.01)
        self._wait_for_text(session, before)
        return ""

    def _see_submitted(self, session, profile, pasted):
        """Wait until the prompt box is empty; Enter again while the text visibly stays there.
        Raises AgentError when it stays."""
        start = time.monotonic()
        again = start + 0.5
        while time.monotonic() - start < self.settings.typing_limit_s:
            if self._draft(session, profile) != pasted:
                return
            if time.monotonic() > again:
                self.terminal(session).send(session.tmux_name, b"\r")
                again += 0.5
            time.sleep(0.03)
        raise AgentError("What was typed stays in the prompt: it was not submitted.")

    def _ready_for_typing(self, session):
        state = self._own_pane(session)
        if state.in_mode:
            self.terminal(session).leave_mode(session.tmux_name)
            state = self._own_pane(session)
        if state.in_mode:
            raise AgentError("The session is in copy mode and does not leave it.")
        return state.cursor

    def _own_pane(self, session):
        state = self.terminal(session).pane_state(session.tmux_name)
        if state.pane_id != session.pane_id:
            raise AgentError("The session's terminal was replaced by another pane.")
        if state.dead:
            raise AgentError("The session's program has ended.")
        return state

    def _wait_for_text(self, session, before):
        """Until the cursor has moved and then rests; a program that does not echo gets a
        quarter of the limit."""
        start = time.monotonic()
        limit = self.settings.typing_limit_s
        last, moved = before, False
        while (spent := time.monotonic() - start) < limit:
            time.sleep(0.03)
            cursor = self._own_pane(session).cursor
            if cursor == last and (moved or spent > limit / 4):
                return
            moved = moved or cursor != before
            last = cursor

    def input(self, session_id, data):
        """Type bytes as they are: into the live view if there is one."""
        session = self.get_live(session_id)
        terminal = self.terminal(session)
        data = ANSWERS.sub(b"", data)
        with self._typing[session_id]:
            if not terminal.write(session.tmux_name, data):
                terminal.settle(session.tmux_name)
                self._own_pane(session)
                terminal.send(session.tmux_name, data)
        self._look_soon(session)
        self.on_typed(session, data)

    def send_keys(self, session, keys):
        """Press keys that answer a dialog."""
        terminal = self.terminal(session)
        with self._typing[session.session_id]:
            terminal.settle(session.tmux_name)
            self._ready_for_typing(session)
            terminal.send(session.tmux_name, keys)
        self._look_soon(session)

    def input_at_once(self, session_id, data):
        """The same if nothing has to be waited for; whether it was done."""
        session = self.get_live(session_id)
        typing = self._typing[session_id]
        if not typing.acquire(blocking=False):
            return False
        try:
            done = self.terminal(session).write(session.tmux_name, ANSWERS.sub(b"", data))
        finally:
            typing.release()
        if done:
            self._look_soon(session)
            self.on_typed(session, data)
        return done

    def resize(self, session_id, cols, rows):
        session = self.get_live(session_id)
        size = max(1, min(cols, 1000)), max(1, min(rows, 1000))
        self.terminal(session).resize(session.tmux_name, *size)
        self._look_soon(session)

    def scrollback(self, session_id):
        session = self.get_live(session_id)
        return self.terminal(session).scrollback(session.tmux_name)

    # -- live views

    def view(self, session_id):
        """Begin a live view, or begin it anew."""
        session = self.get_live(session_id)
        terminal = self.terminal(session)
        terminal.watch(session.tmux_name, session_id)
        if session.state != "live":  # it has ended meanwhile
            terminal.unwatch(session.tmux_name)

    def leave(self, session_id):
        """End the live view, if there is one."""
        session = self.all.get(session_id)
        if session is not None:
            self.terminal(session).unwatch(session.tmux_name)

    # -- watching

    def look(self, now):
        """One look of the monitor at every live session."""
        live = [session for session in self.live() if session.terminal in self.terminals]
        if not live:
            return
        panes, refused = self.panes(), None
        for session in live:
            try:
                self._look_at(session, panes.get(session.tmux_name), now)
            except sqlite3.OperationalError as error:
                refused = error  # it is tried again at the next look; others have their turn
        if refused:
            raise refused

    def _look_at(self, session, pane, now):
        if pane is None or pane.pane_id != session.pane_id:
            self._end_left_over(session)
            self._finish(session, None)
        elif pane.dead:
            self._settle(session, pane)
        elif session.closing:
            self._press(session, pane, now)
        elif not pane.piped and now >= self._mend_at.get(session.session_id, 0):
            self._mend(session, "the recording of the output had stopped")
        elif self.terminal(session).watch_lost(session.tmux_name):
            self._view_again(session, now)

    def _view_again(self, session, now):
        """Somebody has detached our client, or killed it."""
        if now >= self._view_at.get(session.session_id, 0):
            self._view_at[session.session_id] = now + MEND_PAUSE_S
            log.warning("%s: the live view had ended", session)
            with contextlib.suppress(AgentError):  # it has ended too; the monitor says so
                self.view(session.session_id)

    def _settle(self, session, pane):
        """The program has ended: wait until its log rests, then say so."""
        if pane.exit_code is None:
            # tmux 3.3a can miss the signal that its child has ended, and then never reaps it.
            os.kill(pane.server_pid, signal.SIGCHLD)
            return
        size = self.log_size(session)
        if self._sizes.get(session.session_id) != size:
            self._sizes[session.session_id] = size
            return
        self._finish(session, pane.exit_code)

    def _finish(self, session, exit_code):
        """Write down the end and what is to be said of it, then let the terminal go."""
        with self.lock:
            if session.state == "ended":
                return
            end = {"state": "ended", "exit_code": exit_code, "log_end": self.log_size(session)}
            ended = dataclasses.replace(session, **end)
            frames = [self._outcome(ended)] if self._owes_outcome(ended) else []
            self.store.save(session, *frames, self._closed(ended), **end)
        self._let_go(session)
        for memory in self._memories:
            memory.pop(session.session_id, None)
        self.outgoing.wake.set()
        end = "is gone" if exit_code is None else f"ended with exit code {exit_code}"
        log.info("%s %s", session, end)

    def _let_go(self, session):
        terminal = self.terminals.get(session.terminal)
        if terminal:
            terminal.kill_session(session.tmux_name)

    @staticmethod
    def _owes_outcome(session):
        return session.ends_task and session.exit_code is not None and not session.cancelled

    @staticmethod
    def _closed(session):
        return {
            "type": "session_closed",
            "session_id": session.session_id,
            "exit_code": session.exit_code,
            "log_end": session.log_end,
            "task_id": session.task_id,
            "attempt": session.attempt,
        }

    def _outcome(self, session):
        """What the worker's end says of its task; implicit where only the exit code says it, so
        that what the worker reported itself stands."""
        if session.exit_code == 0:
            path = self.directory(session) / "result.json"
            try:
                result, implicit = read_result(path), not path.exists()
                return self.report(session, outcome="complete", result=result, implicit=implicit)
            except AgentError as error:
                return self.report(session, outcome="fail", error=str(error))
        tail = last_lines(read_end(self.log_path(session)))
        error = f"{exit_sentence(session.exit_code)}\n{tail}".strip()
        return self.report(session, outcome="fail", error=error, implicit=True)

    @staticmethod
    def _gap(session, start, stop, why):
        ours = {"type": "session_gap", "session_id": session.session_id}
        return {**ours, "from": start, "to": stop, "why": why}

    def _mend(self, session, why):
        """Say first, then do: said twice it counts once, not said it would be an unmarked hole."""
        self.outgoing.spool(self._gap(session, self.log_size(session), None, why))
        self._mend_at[session.session_id] = time.monotonic() + MEND_PAUSE_S
        self.terminal(session).mend_pipe(session.tmux_name, self.log_path(session))
        log.warning("%s: %s", session, why)

    # -- giving output back to the disk

    def release_logs(self, now):
        """Let go of output that the hub has, and, where it has been away for too much of it, of
        the oldest that it has not."""
        if not self._releases or now < self._release_at:
            return
        self._release_at = now + RELEASE_S
        for session in list(self.all.values()):
            self._release_acked(session)
            self._release_oldest(session)

    def _release_acked(self, session):
        acked = self.logs.acked(session.session_id) or 0
        start = acked - (SCROLLBACK_BYTES if session.terminal == "pty" else KEPT_BYTES)
        if start - session.log_start >= RELEASE_BYTES:
            self._release(session, start)

    def _release_oldest(self, session):
        keep = max(int(self.settings.log_keep_mb * KB * KB), KEEP_LEAST_BYTES)
        first = max(self.logs.acked(session.session_id) or 0, session.log_start)
        size = self.log_size(session)
        if size - first <= keep:
            return
        start = size - keep * 3 // 4  # some way below, so that it is not said at every look
        why = f"the hub was away: limit of {self.settings.log_keep_mb:g} MB on the server"
        self._release(session, start, self._gap(session, first, start, why))
        self.outgoing.wake.set()
        log.warning("%s: %d bytes of output are given up: %s", session, start - first, why)

    def _release(self, session, start, *frames):
        """Note first, then say, then do: whenever we are killed, what was given up is declared,
        and nothing that is gone is sent."""
        with self.lock:
            if self.all.get(session.session_id) is not session:
                return  # forgotten meanwhile
            before = session.log_start
            self.store.save(session, *frames, log_start=start)
        self.logs.cut(session.session_id, start)
        released(self.log_path(session), before, start)

    # -- closing

    def close(self, session, force=False, cancelled=False):
        """Ask the program to end (or make it); the monitor sees the end and reports it."""
        with self.lock:
            cancelled = session.cancelled or cancelled
            self.store.save(session, closing=True, cancelled=cancelled)
            grace = 0 if force else self.settings.close_grace_s
            self._deadlines[session.session_id] = time.monotonic() + grace

    def _press(self, session, pane, now):
        """Hang up a closing session, and again: a shell that is about to wait for a key misses
        it. Past its grace kill it, programs before the terminal."""
        late = now - self._deadlines.setdefault(session.session_id, now)
        if late >= 0:
            signal_programs(pane.pid, signal.SIGKILL)
        elif now >= self._hang_up_at.get(session.session_id, 0):
            # None are there yet if the session was closed while it was being started.
            told = signal_programs(pane.pid, signal.SIGHUP)
            self._hang_up_at[session.session_id] = now + (HANG_UP_AGAIN_S if told else 0)
        if late >= self.settings.close_grace_s:
            signal_process(pane.pid, signal.SIGKILL)

    def sweep(self, session):
        """Forget a session whose end and output the hub has."""
        acked = self.logs.acked(session.session_id)
        if session.state != "ended" or session.closed_spool is None:
            return
        if acked is None or acked < min(session.log_end, self.log_size(session)):
            return
        if session.closed_spool < self.store.spool_first():
            self.store.owed.do(self._forget, session)

    def sweep_all(self):
        for session in list(self.all.values()):
            self.sweep(session)

    def _forget(self, session):
        with self.lock:
            self.store.forget(session.session_id)
            self.all.pop(session.session_id, None)
        self.logs.drop(session.session_id)
        shutil.rmtree(self.directory(session), ignore_errors=True)

    # -- screens

    def _look_soon(self, session):
        self._screen_due[session.session_id] = time.monotonic() + self.settings.monitor_s

    def send_screens(self, now):
        for session in self.live():
            if self._screen_wanted(session, now):
                self._send_screen(session, now)

    def _screen_wanted(self, session, now):
        if now >= self._screen_due.get(session.session_id, now + 1):
            self._screen_due.pop(session.session_id, None)
            return True
        size, _, at = self._screens.get(session.session_id, NO_SCREEN)
        return now - at >= self.settings.screen_s and self.log_size(session) != size

    def _send_screen(self, session, now):
        size = self.log_size(session)
        try:
            lines = self.terminal(session).screen(session.tmux_name)
        except AgentError:
            return  # it has just ended; the monitor says so
        _, before, _ = self._screens.get(session.session_id, NO_SCREEN)
        self._screens[session.session_id] = size, lines, now
        if lines != before:
            self.outgoing.say(
                {
                    "type": "session_screen",
                    "session_id": session.session_id,
                    "lines": lines,
                    "at": now_iso(),
                }
            )


def draft_of(pattern, lines):
    """What stands in the prompt box, "" for nothing: the group of the last line that fits."""
    found = [match for match in (re.search(pattern, line) for line in lines) if match]
    return found[-1][1].strip(" \u00a0") if found else ""


def valid_session_id(session_id):
    """The id, if it is a UUID: it names a directory and a tmux session."""
    return valid_id(session_id, "a session")


def valid_id(given, what):
    try:
        if str(uuid.UUID(given)) == given:
            return given
    except (ValueError, AttributeError, TypeError):
        pass
    raise AgentError(f"'{printable(given, 60)}' is not the id of {what}.")


def parse_profiles(texts):
    """{name: profile} of the YAML texts the hub sent; one that cannot be read is left out."""
    import yaml

    profiles = {}
    for name, text in texts.items():
        try:
            profile = yaml.safe_load(text)
        except yaml.YAMLError as error:
            log.error("profile %s is left out: %s", printable(name), printable(error))
            continue
        try:
            profiles[name] = check_profile(profile)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            log.error("profile %s is left out: %s", printable(name), printable(error))
    return profiles


class Launch:
    """How a profile starts its coding agent in one session: its words, files and environment.

    What a profile writes in braces stands for: {files} the directory of the files written for it,
    {prompt_file}, {conversation} (an id chosen here), {model}, {mode}, {session_id}, {directory}
    and {hook} (the command of our hook client, for a shell)."""

    def __init__(self, directory, order, profile, compiled):
        self.id = str(uuid.uuid4())
        self.profile = profile
        self.files = directory / "files"
        self.prompt = order.get("prompt")
        self.resumes = order.get("resume")
        self.conversation = self.resumes
        if profile.get("start") == "agent" and not self.resumes:
            self.conversation = str(uuid.uuid4())
        hook = [*run_compiled(__file__, compiled, "-I", "-S"), "--hook", str(directory)]
        self.values = {
            "files": str(self.files),
            "prompt_file": str(self.files / "prompt.md") if self.prompt else "",
            "conversation": self.conversation or "",
            "model": order.get("model") or "",
            "mode": self._mode(order.get("mode")),
            "session_id": order["session_id"],
            "directory": str(directory),
            "hook": shlex.join([*hook, self.id]),
        }
        self.env = {name: self.fill(text) for name, text in (profile.get("env") or {}).items()}

    def _mode(self, mode):
        modes = self.profile.get("modes") or ()
        if mode and mode not in modes:
            raise AgentError(
                f"The profile {self.profile.get('name')} has no mode {printable(mode, 60)}: use "
                f"{', '.join(modes) or 'none'}."
            )
        return mode or ""

    def fill(self, text):
        """`text` with what stands in braces replaced; other braces stay."""
        return re.sub(r"\{(\w+)\}", lambda m: self.values.get(m[1], m[0]), str(text))

    def argv(self):
        """The words that start the agent, or take up its conversation again."""
        groups = self.profile.get("resume" if self.resumes else "argv")
        if not groups:
            raise AgentError(
                f"The profile {self.profile.get('name')} cannot take up a conversation again: "
                "start a new session."
            )
        words = []
        for group in groups:
            if isinstance(group, dict):
                group = group["add"] if self.values.get(group["when"]) else ()
            words += [self.fill(word) for word in group]
        return words

    def write(self):
        """Write the files of the profile, the prompt, and what the hook client must know."""
        if self.profile.get("start") != "agent":
            return
        make_private_dir(self.files)
        for name, content in (self.profile.get("files") or {}).items():
            path = self.files / name
            make_private_dir(path.parent)
            text = content if isinstance(content, str) else json.dumps(self._filled(content))
            write_private(path, self.fill(text) if isinstance(content, str) else text)
        if self.prompt:
            write_private(self.files / "prompt.md", self.prompt)
        ours = {"answers": self.profile.get("answers") or {}, "launch": self.id}
        ours["agent"] = self.profile.get("name")
        write_private(self.files.parent / "hooks.json", json.dumps(ours))

    def _filled(self, value):
        if isinstance(value, dict):
            return {self.fill(key): self._filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item) for item in value]
        return self.fill(value) if isinstance(value, str) else value


def through_login_shell(argv):
    """The program with the PATH its user has in a terminal, ours before it."""
    shell = os.environ.get("SHELL") or pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    if os.path.basename(shell) not in ("sh", "bash", "dash", "ksh", "zsh"):
        shell = "/bin/sh"  # others spell "$@" differently
    return [shell, "-l", "-c", 'export PATH="$ORCHESTRATIA_BIN:$PATH"; exec "$@"', shell, *argv]


def program_of(order, task, profile, launch=None):
    """The argument list a session runs. Raises AgentError if there is none."""
    command = order.get("command") or (task or {}).get("command")
    if profile.get("start") == "agent" and not command:
        return through_login_shell(launch.argv())
    if profile.get("start") not in ("shell", "task_command", "agent"):
        raise AgentError(
            f"The profile {order['profile']} starts in a way this agent ({VERSION}) does not "
            "know: update the agent."
        )
    if command:
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise AgentError("The command is not a list of words: give it as an argument list.")
        return command
    if profile["start"] == "task_command":
        raise AgentError(
            f"The profile {order['profile']} runs the task's command, but the task has none: "
            "set its `command` to an argument list and retry it."
        )
    return login_shell()


def login_shell():
    """The user's shell after its login files; those may set PATH anew, so ours comes after."""
    shell = os.environ.get("SHELL") or pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    again = f'exec env PATH="$ORCHESTRATIA_BIN:$PATH" {shlex.quote(shell)} -i'
    return [shell, "-l", "-c", again]


# Python keeps what it compiles of a module, not of a script: each start of ours would compile some
# 6,000 lines, which takes longer than all the rest of it.
STARTER = """import importlib.machinery, os, sys
where, __file__ = os.path.dirname(os.path.abspath(__file__)), sys.argv[1]
del sys.argv[0]
if not sys.flags.isolated:
    sys.path[0] = os.path.dirname(__file__)
kept = sys.pycache_prefix, sys.dont_write_bytecode, os.umask(0o077)
sys.pycache_prefix, sys.dont_write_bytecode = where, False
code = importlib.machinery.SourceFileLoader(__name__, __file__).get_code(__name__)
sys.pycache_prefix, sys.dont_write_bytecode = kept[:2]
os.umask(kept[2])
exec(code)
"""


def install_starter(directory):
    """Put into the directory what runs a script of ours, and keeps there what it compiled it to."""
    write_changed(directory / "start.py", STARTER)


def run_compiled(script, directory, *options):
    """The beginning of a command that runs a script of ours, as Python does with these options, by
    the starter in the directory; without one it runs all the same, and compiles each time."""
    starter = directory / "start.py"
    first = [str(starter)] if starter.exists() else []
    return [sys.executable, *options, *first, os.path.abspath(script)]


def install_cli(directory, compiled):
    """Put `orchestratia` in the directory if the command line lies beside this file."""
    cli = Path(__file__).resolve().with_name("cli.py")
    if cli.exists():
        wrapper = directory / "orchestratia"
        words = shlex.join(run_compiled(cli, compiled))
        write_changed(wrapper, f'#!/bin/sh\nexec {words} "$@"\n')
        wrapper.chmod(0o700)


def read_result(path):
    """The result a worker left: JSON as it is, other text as its summary."""
    try:
        with path.open("rb") as file:
            data = file.read(RESULT_BYTES + 1)
    except FileNotFoundError:
        return {"summary": "exit 0"}
    except OSError as error:
        raise AgentError(f"The result file cannot be read: {error.strerror}.") from error
    result = parse_result(data.decode("utf-8", "replace"))
    if len(data) > RESULT_BYTES or len(json.dumps(result)) > RESULT_BYTES:
        raise AgentError(f"The result is larger than {RESULT_BYTES} bytes: keep it smaller.")
    return result


def parse_result(text):
    """JSON that the hub will take, else the text itself as the summary."""
    try:
        result = json.loads(text)
        json.dumps(result, allow_nan=False)
    except (ValueError, RecursionError):
        return {"summary": text.strip()}
    return result


def read_end(path, size=16 * KB):
    """The last bytes of a log; nothing when it is gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.path.getsize(path) - size))
            return file.read(size).lstrip(b"\0")  # as what was given back to the disk reads
    except OSError:
        return b""


def exit_sentence(code):
    try:
        return f"exit code {code} (killed by {signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"


def signal_programs(leader, number):
    """Signal every process of the terminal but its first, which stays to see the log out;
    returns how many."""
    listed = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True, timeout=10)
    found = [pid for pid in map(int, listed.stdout.split()) if session_of(pid) == leader != pid]
    for pid in found:
        signal_process(pid, number)
    return len(found)


def command_line(pid):
    """The arguments a process was started with, [] if there is none or it cannot be known."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def parent_of(pid):
    """The process that has started another, None if that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def session_of(pid):
    """The id of the terminal session a process is in, None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def signal_process(pid, number):
    """Signal a process, unless it has ended or belongs to another user (sudo)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


# ---------------------------------------------------------------------------- the reducer


# What a program does is read from signals in this order of trust: what its hooks say, its title,
# its screen. Silence never means that it has finished. All of it is data of the profile:
#   hooks    [{event, state, by_tool, by_type, by_error, settles, backup, request, guards, ignore,
#             expected}]
#   titles   [{state, regex}]                              the first that fits
#   screens  [{id, state, last, below, all, any, none, dialog}]     the first that fits
#   keys     {allow | session | always | deny: [{label, press, when}]}

SILENT_STOP_S = 20  # a hook said it works, the screen shows an empty prompt: it has stopped
HOOKS_EXPECTED_S = 60  # after the start; then it is said that they are silent
EDGE = re.compile(r"^[\s│┃|╭╰╮╯─━┌└┐┘]+|[\s│┃|╮╯┐┘─━]+$")
OPTION = r"^\W{0,4}(\d+)[.)]\s+(.*?)\s*$"
SAID_BY = {"by_tool": "tool_name", "by_type": "notification_type", "by_error": "error"}

# For programs that no profile tells anything of: they ask something, which is safe to answer.
GENERIC_SCREENS = (
    {
        "id": "asks",
        "state": "waiting_input",
        "last": 3,
        "any": [
            r"(?i)[\[(]y(?:es)?/n(?:o)?(?:/[^\])\s]*)?[\])]\W*$",
            r"(?i)\bcontinue\?\W*$",
            r"(?i)\b(?:password|passphrase)[^\n]*:\s*$",
            r"(?i)press (?:any key|enter) to continue\W*$",
        ],
    },
)


def start_state(at):
    """The state before any signal. A state is a dict that JSON can hold, and is never changed:
    {activity, reason, signal, since, began, heard, blocked, stopped, looks}."""
    return {
        "activity": "no_signal",
        "reason": "nothing was seen yet",
        "signal": "start",
        "since": at,
        "began": at,
        "heard": {},  # {source: [what it said, when]}
        "blocked": None,  # `call_mark` of the dialog a hook has announced
        "stopped": False,  # its turn is over, and nothing new was asked of it
        "looks": ["", 0],  # what the screen showed, at how many looks running
    }


def reduce(profile, state, signal):
    """The state after a signal: {kind, at, …}. Pure: the same always gives the same.

    kinds: hook {event, payload}, title {title}, screen {lines}, typed {by: terminal | hub},
    decided {tool_use_id}, tick. at: seconds on a clock that is never set."""
    return REDUCERS[signal["kind"]](profile, state, signal)


def _now(state, activity, reason, signal, at, **more):
    """The state with another activity; `since` stays while only the reason is another. Looks at
    the screen from before the change do not count."""
    changed = {"activity": activity, "reason": reason, "signal": signal}
    if activity != state["activity"]:
        changed |= {"since": at, "looks": ["", 0]}
    return {**state, **changed, **more}


def _heard(state, source, says, at):
    return {**state, "heard": {**state["heard"], source: [says, at]}}


def is_blocked(state):
    return state["activity"].startswith("blocked")


def dialog_of(hook, payload):
    """The kind of dialog that a hook's payload is about."""
    kind = (_said_by(hook, payload) or "").removeprefix("blocked:")
    return kind if kind in ("question", "plan") else "permission"


def hook_of(profile, event):
    """What an event means, {} for one that the profile does not know."""
    return next((hook for hook in profile.get("hooks") or () if hook["event"] == event), {})


def _by_hook(profile, state, signal):
    event, payload, at = signal["event"], signal.get("payload") or {}, signal["at"]
    hook = hook_of(profile, event)
    tool = payload.get("tool_name")
    state = _heard(state, f"hook {event}", tool or payload.get("notification_type") or "", at)
    said = _said_by(hook, payload)
    name = f"hook {event}"
    if said is None or payload.get(hook.get("field", "reason")) in hook.get("ignore", ()):
        return state
    if hook.get("backup"):
        return _by_notification(state, said, payload, name, at)
    if said.startswith("blocked"):
        reason = f"{tool or 'it'} waits for an answer"
        return _now(state, said, reason, name, at, blocked=call_mark(payload), stopped=False)
    if is_blocked(state) and not _settles(hook, state, payload):
        return state  # another tool beside the one that waits
    if state["stopped"] and (hook.get("settles") == "tool" or payload.get("agent_id")):
        return state  # late, or of a sub-agent left behind: a turn begins with a prompt
    if hook.get("settles") == "all" and said != "working":
        return _now(state, said, _why_stopped(said, payload), name, at, blocked=None, stopped=True)
    reason = f"uses {tool}" if tool else "works on what it was told"
    return _now(state, said, reason, name, at, blocked=None, stopped=False)


def _said_by(hook, payload):
    """The activity a hook speaks of, None for none."""
    for by, field in SAID_BY.items():
        if hook.get(by):
            return hook[by].get(str(payload.get(field)), hook.get("state"))
    return hook.get("state")


def call_mark(payload):
    """A tool call as it is known again: {tool, tool_use_id, agent_id, input: {name: hash}}. What
    asks for permission carries no id (Claude Code 2.1.221, Codex 0.145), so its input must do."""
    given = payload.get("tool_input")
    given = given if isinstance(given, dict) else {}
    return {
        "tool": payload.get("tool_name"),
        "tool_use_id": payload.get("tool_use_id"),
        "agent_id": payload.get("agent_id"),
        "input": {name: _hash(value) for name, value in given.items()},
    }


def _hash(value):
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def is_same_call(asked, used):
    """Whether two marks are of one call. What only one of them has says nothing: Codex adds a
    description when it asks, an answered question has its answers when it was used."""
    if asked["tool_use_id"] and used["tool_use_id"]:
        return asked["tool_use_id"] == used["tool_use_id"]
    if asked["agent_id"] != used["agent_id"] or asked["tool"] not in (None, used["tool"]):
        return False
    both = asked["input"].keys() & used["input"].keys()
    return all(asked["input"][name] == used["input"][name] for name in both)


def _settles(hook, state, payload):
    """Whether a hook shows that the dialog was answered: its own tool has run, or the turn is
    over. What sub-agents do beside it shows nothing."""
    if hook.get("settles") != "tool":
        return hook.get("settles") == "all" and not payload.get("agent_id")
    return is_same_call(state["blocked"] or call_mark({}), call_mark(payload))


def _why_stopped(said, payload):
    given = [payload.get(name) for name in ("background_tasks", "session_crons")]
    left = sum(len(tasks) for tasks in given if isinstance(tasks, list))
    if left:
        return f"its turn is over, {left} in the background go on"
    if said in ("error", "quota"):
        words = [payload.get(name) for name in ("last_assistant_message", "error_details", "error")]
        return printable(next(filter(None, words), "it has failed"), 300)
    return "its turn is over"


def _by_notification(state, said, payload, name, at):
    """Notices come late, or twice: none may raise a dialog after the turn was over, and none
    knows more than a hook that was there before."""
    if said == "idle":
        reason = "it waits for the next prompt"
        return state if is_blocked(state) else _now(state, said, reason, name, at, stopped=True)
    if state["stopped"] or is_blocked(state):
        return state
    reason = printable(payload.get("message") or "it asks for attention", 300)
    return _now(state, said, reason, name, at)


def _has_hooks(profile, state):
    """Whether a hook was heard that tells the activity: the start of a session does not."""
    return any(
        f"hook {hook['event']}" in state["heard"]
        for hook in profile.get("hooks") or ()
        if not hook.get("backup") and any(hook.get(name) for name in ("state", *SAID_BY))
    )


def _last_hook(state):
    """When a hook was heard last, 0 for never."""
    heard = state["heard"].items()
    return max((at for source, (_, at) in heard if source.startswith("hook ")), default=0)


def read_title(profile, title):
    """{rule, state} of a terminal's title, None if it says nothing."""
    for rule in profile.get("titles") or ():
        if re.search(rule["regex"], title):
            return {"rule": rule.get("id") or rule["state"], "state": rule["state"]}


def _by_title(profile, state, signal):
    read, at = read_title(profile, signal["title"]), signal["at"]
    if read is None:
        return state
    state = _heard(state, "title", read["state"], at)
    name, said = f"title {read['rule']}", read["state"]
    if _has_hooks(profile, state) or said == state["activity"]:
        return state
    if said == "idle" and is_blocked(state) and not state["signal"].startswith("title"):
        return state
    return _now(state, said, f"its title says so: {printable(signal['title'], 80)}", name, at)


def _by_screen(profile, state, signal):
    read, at = read_screen(profile, signal["lines"]) or {}, signal["at"]
    said = read.get("state") or ""
    before, count = state["looks"]
    looks = [said, count + 1 if said == before else 1]
    state = _heard({**state, "looks": looks}, "screen", said or "nothing it knows", at)
    if looks[1] < 2:
        return state  # two looks must agree
    name = f"screen {read.get('rule')}"
    if said.startswith("blocked"):
        return _shows_dialog(state, said, read, name, at)
    if is_blocked(state):
        return _shows_none(state, said, name, at)
    if said in ("quota", "error"):
        return _now(state, said, _banner(read), name, at)
    return _shows_work(profile, state, said, name, at)


def _shows_dialog(state, said, read, name, at):
    if is_blocked(state):
        return state
    subject = printable((read.get("dialog") or {}).get("subject") or "", 200)
    return _now(state, said, subject or "a dialog is on its screen", name, at, stopped=False)


def _shows_none(state, said, name, at):
    """The dialog is gone: somebody has answered it at the terminal, of which no hook tells."""
    if said not in ("working", "idle") and not state["signal"].startswith("screen"):
        return state
    if state["signal"].startswith("title"):
        return state
    reason = "the dialog is not on its screen any more"
    return _now(
        state, said if said in ("idle", "working") else "working", reason, name, at, blocked=None
    )


def _banner(read):
    return printable((read.get("dialog") or {}).get("text") or read.get("text") or "", 300)


def _shows_work(profile, state, said, name, at):
    silent = at - max(state["since"], _last_hook(state)) > SILENT_STOP_S
    hooks = _has_hooks(profile, state)
    if hooks and silent and said == "idle" and state["activity"] == "working":
        return _now(state, "idle", "its prompt is empty; no hook has said so", name, at)
    if not said or said == state["activity"]:
        return state
    banner = state["signal"].startswith("screen") and state["activity"] in ("quota", "error")
    if not banner and (hooks or "title" in state["heard"]):
        return state
    return _now(state, said, "its screen shows it", name, at)


def _by_typing(_profile, state, signal):
    """A key pressed at the terminal may be the answer: no hook fires then. If it was not, the
    dialog is still on the screen at the next looks."""
    if signal["by"] != "terminal" or not is_blocked(state):
        return state
    reason = "keys were pressed in its terminal"
    return _now(state, "working", reason, "keys", signal["at"], blocked=None)


def _by_decision(_profile, state, signal):
    blocked, use = state["blocked"] or {}, signal.get("tool_use_id")
    if not is_blocked(state) or (use and blocked.get("tool_use_id") not in (None, use)):
        return state  # the answer to another of its dialogs
    return _now(state, "working", "it was answered", "answer", signal["at"], blocked=None)


def _by_time(profile, state, signal):
    if profile.get("completes_on_exit") and not profile.get("screens"):
        return _now(state, "working", "the program runs", "process", signal["at"])
    if state["activity"] != "no_signal":
        return state
    if not (profile.get("hooks") or profile.get("titles") or profile.get("screens")):
        return {**state, "reason": "nothing tells what this program does"}
    if signal["at"] - state["began"] > HOOKS_EXPECTED_S and profile.get("hooks"):
        return {**state, "reason": "its hooks should have spoken by now and have not"}
    return state


REDUCERS = {
    "hook": _by_hook,
    "title": _by_title,
    "screen": _by_screen,
    "typed": _by_typing,
    "decided": _by_decision,
    "tick": _by_time,
}


def explain(profile, state, now):
    """What each source of signals said last: [{name, says, at, silent, decided}]. silent: it is
    expected to speak and never has."""
    hooks = [f"hook {hook['event']}" for hook in profile.get("hooks") or ()]
    expected = {f"hook {h['event']}" for h in profile.get("hooks") or () if h.get("expected")}
    if profile.get("titles"):
        expected.add("title")
    if profile.get("screens"):
        expected.add("screen")
    told = []
    for name in dict.fromkeys([*hooks, *sorted(expected), *state["heard"]]):
        says, at = state["heard"].get(name, (None, None))
        decided = state["signal"].split(" ")[0] == name or state["signal"] == name
        told.append({"name": name, "says": says, "at": at, "decided": decided})
        told[-1]["silent"] = at is None and name in expected
    return told


def read_screen(profile, lines):
    """{rule, state, text, dialog} of the first screen rule that fits, None if none does. dialog:
    {kind, tool, subject, text, options: [{key, label}], fingerprint}."""
    screens = profile.get("screens")
    for rule in GENERIC_SCREENS if screens is None else screens:
        shown = _region(rule, lines)
        text = "\n".join(shown)
        if _fits_screen(rule, text):
            dialog = _dialog(rule, shown) if rule.get("dialog") is not None else None
            found = _first(rule.get("says"), text)
            state = {"rule": rule["id"], "state": rule["state"], "dialog": dialog}
            return {**state, "text": found or (shown[-1] if shown else "")}


def _region(rule, lines):
    """The lines a rule looks at: the last that are not empty, without frames; `below` only those
    under the last line that fits it."""
    shown = [EDGE.sub("", line) for line in lines]
    if rule.get("below"):
        marks = [n for n, line in enumerate(lines) if re.search(rule["below"], line)]
        shown = shown[marks[-1] + 1 :] if marks else shown
    return [line for line in shown if line.strip()][-rule.get("last", 12) :]


def _fits_screen(rule, text):
    def has(pattern):
        return re.search(pattern, text, re.M) is not None

    wanted = all(has(p) for p in rule.get("all") or ())
    either = not rule.get("any") or any(has(p) for p in rule["any"])
    return wanted and either and not any(has(p) for p in rule.get("none") or ())


def _first(patterns, text):
    """The group of the first pattern that fits."""
    for pattern in patterns or ():
        if found := re.search(pattern, text, re.M | re.S):
            return found[1].strip()
    return ""


def _dialog(rule, shown):
    text, said = "\n".join(shown), rule["dialog"]
    kind = rule["state"].partition(":")[2]
    found = [re.search(said.get("option", OPTION), line) for line in shown]
    options = [{"key": m[1], "label": m[2]} for m in found if m]
    subject = _first(said.get("subject"), text) or text
    tool = next(
        (t["tool"] for t in said.get("tools") or () if re.search(t["regex"], text, re.M)), None
    )
    mark = json.dumps([kind, subject, [option["label"] for option in options]])
    return {
        "kind": kind,
        "tool": tool,
        "subject": subject,
        "text": text,
        "options": options,
        "fingerprint": hashlib.sha256(mark.encode()).hexdigest()[:16],
    }


def keys_for(profile, lines, answer):
    """The bytes that give `answer` (allow, session, always or deny) to the dialog on the screen,
    by what its options are called; None when it is not there or does not offer that."""
    dialog = (read_screen(profile, lines) or {}).get("dialog")
    if not dialog:
        return None
    for way in (profile.get("keys") or {}).get(answer) or ():
        if way.get("when") and not re.search(way["when"], dialog["text"], re.M):
            continue
        if "label" not in way:
            return way["press"].encode()
        for option in dialog["options"]:
            if re.search(way["label"], option["label"]):
                return (option["key"] + way.get("press", "")).encode()
    return None


STATES = ("working", "idle", "waiting_input", "error", "quota", "no_signal", "blocked:permission")
STATES += ("blocked:question", "blocked:plan", "blocked:trust")
PROFILE_KEYS = {"name", "title", "version", "start", "detect", "argv", "resume", "modes", "text"}
PROFILE_KEYS |= {"unsafe_modes", "files", "env", "hooks", "titles", "screens", "keys", "draft"}
PROFILE_KEYS |= {"interrupt", "answers", "completes_on_exit"}


# What each kind of rule must have. Fields that are not known are no mistake: they may be of a
# later version, and a profile that is left out is worse than one rule that is read halfway.
NEEDED = {"hooks": {"event"}, "titles": {"state", "regex"}, "screens": {"id", "state"}}


def check_profile(profile):
    """The profile itself. Raises ValueError, saying what is wrong, if it cannot be used."""
    unknown = sorted(set(profile) - PROFILE_KEYS)
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    if profile.get("start") not in ("shell", "task_command", "agent"):
        raise ValueError("`start` must be shell, task_command or agent")
    if profile["start"] == "agent" and not profile.get("argv"):
        raise ValueError("`argv` is missing: how is the agent started?")
    for kind, place, rule in _rules_of(profile):
        if missing := sorted(NEEDED.get(kind, set()) - set(rule)):
            raise ValueError(f"{place}: {', '.join(missing)} is missing")
        if kind == "keys" and not rule.keys() & {"label", "press"}:
            raise ValueError(f"{place}: which key is it? Give `label` or `press`")
        for state in _states_of(rule):
            if state not in STATES:
                raise ValueError(f"{place}: unknown state {state!r}")
    for place, pattern, groups in _patterns_of(profile):
        _check_pattern(place, pattern, groups)
    return profile


def _rules_of(profile):
    for kind in ("hooks", "titles", "screens"):
        for rule in profile.get(kind) or ():
            named = rule.get("id") or rule.get("event") or rule.get("state")
            yield kind, f"{kind} {named}", rule
    for answer, ways in (profile.get("keys") or {}).items():
        for way in ways:
            yield "keys", f"keys {answer}", way


def _states_of(rule):
    if rule.get("state") is not None:
        yield rule["state"]
    for by in SAID_BY:
        yield from (rule.get(by) or {}).values()


def _patterns_of(profile):
    """(place, pattern, how many groups it must have) of every pattern in a profile."""
    yield "draft", profile.get("draft"), 1
    yield "detect", (profile.get("detect") or {}).get("version"), 1
    for _kind, place, rule in _rules_of(profile):
        dialog = rule.get("dialog") or {}
        for name in ("regex", "below", "label", "when"):
            yield place, rule.get(name), 0
        for pattern in (p for name in ("all", "any", "none") for p in rule.get(name) or ()):
            yield place, pattern, 0
        for pattern in [*(rule.get("says") or ()), *(dialog.get("subject") or ())]:
            yield place, pattern, 1
        yield place, dialog.get("option"), 2
        for tool in dialog.get("tools") or ():
            yield place, tool["regex"], 0


def _check_pattern(place, pattern, groups):
    if pattern is None:
        return
    try:
        found = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{place}: {pattern!r} is no regular expression: {error}") from None
    if found < groups:
        raise ValueError(f"{place}: {pattern!r} needs {groups} group(s) in parentheses")


# ---------------------------------------------------------------------------- what an agent does


LOOKS = 4  # at a screen that does not change: then it is known what it shows


class Activities:
    """What each session's program is doing, by `reduce`: fed by hooks, titles and screens, told to
    the hub when it changes."""

    def __init__(self, sessions, outgoing, settings):
        self.sessions = sessions
        self.outgoing = outgoing
        self.settings = settings
        self.lock = threading.RLock()
        self.states = {}  # session id: state of the reducer
        self.screens = {}  # session id: what its screen showed at the last look
        self._told = {}  # session id: (activity, reason, sources heard, time of progress), as told
        self._progress = {}  # session id: when there was a sign of it
        self._sizes = {}  # session id: log size at the last look
        self._looked = {}  # session id: (log size, looks since it changed)

    def of(self, session_id):
        """The activity as one word, None when nothing is known."""
        state = self.states.get(session_id)
        return state["activity"] if state else None

    def blocked(self, session_id):
        return (self.of(session_id) or "").startswith("blocked")

    def profile(self, session):
        """The session's profile as it is now; one that is gone knows nothing."""
        return self.sessions.profiles.get(session.profile) or {}

    def signal(self, session, kind, **said):
        """Take a signal into account, and tell the hub if that changes the activity."""
        now = time.monotonic()
        with self.lock:
            profile = self.profile(session)
            before = self.states.get(session.session_id) or start_state(now)
            after = reduce(profile, before, {"kind": kind, "at": now, **said})
            self.states[session.session_id] = after
            if kind == "hook":
                self._progress[session.session_id] = now
            try:
                self._tell(session, profile, after, now)
            except sqlite3.OperationalError as error:  # it is told at the next look
                log.debug("%s: its activity is not told yet: %s", session, error)
        return after

    def _tell(self, session, profile, state, now):
        *told, told_at = self._told.get(session.session_id, (None, None, 0, -math.inf))
        progress = self._progress.get(session.session_id, state["since"])
        # A source heard for the first time is news: it is not silent any more.
        news = [state["activity"], state["reason"], len(state["heard"])]
        if news == told and progress - told_at < self.settings.progress_s:
            return
        frame = {
            "type": "session_activity",
            "session_id": session.session_id,
            "state": state["activity"],
            "reason": state["reason"],
            "signal": state["signal"],
            "since": wall_time(state["since"]),
            "progress": wall_time(progress),
            "signals": [self._by_wall(source) for source in explain(profile, state, now)],
        }
        if state["activity"] == "working" and self._begins(session):
            begun = self.sessions.report(session, outcome="started")
            self.sessions.store.save(session, begun, frame, begun=True)
            self.outgoing.wake.set()
        else:
            self.outgoing.spool(frame)
        self._told[session.session_id] = *news, progress

    @staticmethod
    def _by_wall(source):
        return source if source["at"] is None else {**source, "at": wall_time(source["at"])}

    @staticmethod
    def _begins(session):
        """Whether this is the first that is seen of the work on its task."""
        return not (session.task_id is None or session.begun or session.ends_task)

    def look(self, panes, now):
        """Look at the titles and screens of all live sessions; returns {session id: dialog} of
        those that show one."""
        dialogs = {}
        for session in self.sessions.live():
            pane = panes.get(session.tmux_name)
            if pane is None or pane.dead:
                continue
            with contextlib.suppress(AgentError):  # it has just ended; the monitor says so
                dialog = self._look_at(session, pane, now)
                if dialog:
                    dialogs[session.session_id] = dialog
        for session_id in self.states.keys() - {s.session_id for s in self.sessions.live()}:
            memories = self.states, self.screens, self._told, self._progress
            for memory in (*memories, self._sizes, self._looked):
                memory.pop(session_id, None)
        return dialogs

    def _look_at(self, session, pane, now):
        profile = self.profile(session)
        if profile.get("titles") and pane.title:
            self.signal(session, "title", title=pane.title)
        self._note_output(session)
        if self._is_worth_a_look(session, profile):
            lines = self.sessions.terminal(session).screen(session.tmux_name)
            self.signal(session, "screen", lines=lines)
            self.screens[session.session_id] = read_screen(profile, lines) or {}
        else:
            self.signal(session, "tick")
        return self.screens.get(session.session_id, {}).get("dialog")

    def _is_worth_a_look(self, session, profile):
        """Whether the screen may show something else than at the last looks, of which two must
        agree, or what it shows may mean something else by now: a turn that has ended without a
        word, a dialog that was not answered by the key."""
        if profile.get("start") != "agent" and session.profile is not None:
            return False
        size, looks = self._looked.get(session.session_id, (None, 0))
        now = self.sessions.log_size(session)
        self._looked[session.session_id] = now, looks + 1 if size == now else 0
        return size != now or looks < LOOKS or self.of(session.session_id) == "working"

    def _note_output(self, session):
        """Where no hook is heard, output is a sign of progress."""
        size = self.sessions.log_size(session)
        if self._sizes.get(session.session_id) != size:
            self._sizes[session.session_id] = size
            if not self.profile(session).get("hooks"):
                self._progress[session.session_id] = time.monotonic()


# ---------------------------------------------------------------------------- permissions


@dataclasses.dataclass
class Request:
    """A permission request that waits for its answer. via: `hook`, held by a hook client, or
    `screen`, answered by the key that its dialog takes."""

    request_id: str
    session_id: str
    via: str
    tool: str
    asks: str = "permission"  # or question, plan
    mark: dict | None = None  # its tool call, as `call_mark` knows it again
    fingerprint: str | None = None
    spool: int = 0
    held: bool = False  # a hook client waits right now
    since: float = dataclasses.field(default_factory=time.monotonic)  # first known here
    left: float = dataclasses.field(default_factory=time.monotonic)  # by its last hook client
    answer: dict | None = None
    passing: bool = False  # the answer is on its way to the hook client
    changed: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    def row(self):
        shown = ("request_id", "session_id", "via", "tool", "asks", "mark", "fingerprint")
        return {name: getattr(self, name) for name in (*shown, "answer", "passing")}


class Rules:
    """The hub's rules, kept for when it is away, with the engine that reads them."""

    def __init__(self, store, state_dir):
        self.store = store
        self.path = state_dir / "rules.json"
        self.engine = None
        self.kept = {}
        self._use(store.get("rules") or {})

    def take(self, kept):
        """Use these from now on; the ones before stay in use if they cannot be."""
        if self._use(kept):
            self.store.owed.do(self._keep)

    def _use(self, kept):
        try:
            engine = engine_of(kept) if kept.get("engine") else self.engine
        except Exception as error:  # of the hub's text, made for another Python perhaps
            log.error("the rules cannot be used here: %s", printable(error))
            return False
        self.kept, self.engine = kept, engine
        self.store.owed.do(self._write)
        return True

    def _keep(self):
        self.store.put("rules", self.kept)

    def _write(self):
        """For hooks while we are away."""
        if self.kept.get("engine"):
            write_changed(self.path, json.dumps(self.kept))

    @property
    def etag(self):
        return self.kept.get("etag")

    def main_parameter(self, tool):
        """The field of a tool's input that patterns are about."""
        return self.engine.main_parameter(tool) if self.engine else "command"

    def judge(self, request):
        """The engine's verdict; it asks when there are no rules yet."""
        if self.engine is None:
            return {"decision": "ask", "rule": None, "because": "no rules are known here yet"}
        return self.engine.judge(self.kept["rules"], {**request, **self.kept["origin"]})


def engine_of(kept):
    """The rules engine as the hub has sent it: the same text there and here, so that a rule means
    the same. (The hub starts programs here anyway: this gives it no power it lacks.)"""
    module = types.ModuleType("orchestratia_rules")
    exec(compile(kept["engine"], "rules.py", "exec"), module.__dict__)  # noqa: S102
    return module


def call_of(session_id, profile, payload):
    """A tool call of a hook's payload as rules judge it."""
    given = payload.get("tool_input")
    return {
        "tool": str(payload.get("tool_name") or "unknown"),
        "input": given if isinstance(given, dict) else {"value": given},
        "directory": str(payload.get("cwd") or ""),
        "agent": profile.get("name"),
        "home": os.path.expanduser("~"),
        "session_id": session_id,
    }


# Dialogs on the screen that are asked from afar, and the tool they are about if none is named.
ASKED = {"permission": "unknown", "trust": "trust", "plan": "plan"}


class Requests:
    """Permission requests of coding agents: from hooks and from dialogs on the screen, to the hub
    and back."""

    KEPT = 200  # answers remembered for a hook that asks again

    def __init__(self, sessions, activities, outgoing, store, settings, rules, is_connected):
        self.sessions = sessions
        self.activities = activities
        self.outgoing = outgoing
        self.store = store
        self.settings = settings
        self.rules = rules
        self.is_connected = is_connected
        self.lock = threading.RLock()
        self.open = {}  # request id: Request
        self.answered = collections.OrderedDict()  # request id: answer
        self._seen = {}  # session id: fingerprint of the dialog at the last look
        self.acked = threading.Condition()
        self.upto = 0
        for row in store.get("requests", []):
            row.pop("since", None)  # of an older version, by the clock on the wall
            self.open[row["request_id"]] = Request(**known_fields(Request, row))

    def recover(self):
        """Take up what the last run left: an answer that was being passed on may have arrived."""
        for request in [r for r in self.open.values() if r.passing]:
            why = "the agent ended while the answer was passed on"
            self.store.owed.do(self.close, request, "delivery_unknown", why)

    def _save(self):
        self.store.put("requests", [request.row() for request in self.open.values()])

    def _drop(self, request, *frames):
        """Nobody waits for it any more, of which the hub is told so."""
        with self.lock:
            if request.request_id not in self.open:
                return
            left = [other.row() for other in self.open.values() if other is not request]
            self.store.put("requests", left, *frames)
            del self.open[request.request_id]
            self._seen.pop(request.session_id, None)
        self.outgoing.wake.set()

    def spool_acked(self, upto):
        with self.acked:
            self.upto = max(self.upto, upto)
            self.acked.notify_all()

    # -- by hook

    def guard(self, session, payload):
        """The verdict on a tool call that the rules deny, else None: known without the hub."""
        verdict = self.rules.judge(self._call(session, payload))
        if verdict["decision"] != "deny":
            return None
        rule = verdict.get("rule") or {}
        said = {"decision": "deny", "rule_id": rule.get("id"), "because": verdict["because"]}
        frame = self._asked(session, str(uuid.uuid4()), "hook", payload, said)
        self.store.owed.do(self.outgoing.spool, frame)
        return said

    def _call(self, session, payload):
        return call_of(session.session_id, self.activities.profile(session), payload)

    @staticmethod
    def _asked(session, request_id, via, payload, said=()):
        frame = {
            "type": "permission_requested",
            "request_id": request_id,
            "session_id": session.session_id,
            "via": via,
            "asks": payload.get("asks", "permission"),
            "agent": session.profile,
            "tool": payload.get("tool_name"),
            "input": payload.get("tool_input"),
            "directory": payload.get("cwd") or session.working_directory,
            **dict(said),
        }
        if payload.get("subject"):
            frame["subject"] = payload["subject"]
        return frame

    def ask(self, session, request_id, payload, gone, holds):
        """Have a request answered: {decision, message}, or None to leave it to the terminal.

        gone: a function that says whether the hook client has ended. holds: whether the terminal
        shows its dialog meanwhile; if not, a person's answer is given by key."""
        with self.lock:
            if request_id in self.answered:
                return self.answered[request_id]
            request = self.open.get(request_id)
            if request is None:
                # What a hook says of a plan is ignored (Claude Code 2.1): its answer is a key.
                via = "screen" if payload.get("asks") == "plan" else "hook"
                request = self._begin(session, request_id, via, payload)
                if request is None:
                    return None
            if request.asks == "plan":
                return None
            request.held = True
        try:
            answer = self._hold(session, request, gone, holds)
            if answer:
                self._change(request, passing=True)
            return answer
        finally:
            request.held, request.left = False, time.monotonic()

    def _begin(self, session, request_id, via, payload, fingerprint=None):
        """A request that the hub has been told of; None while it is away, or the disk is full."""
        if not self.is_connected():
            return None
        request = Request(
            request_id,
            session.session_id,
            via,
            str(payload.get("tool_name") or ""),
            payload.get("asks", "permission"),
            call_mark(payload) if via == "hook" else None,
            fingerprint,
        )
        rows = [other.row() for other in self.open.values()] + [request.row()]
        try:
            asked = self._asked(session, request_id, via, payload)
            request.spool = self.store.put("requests", rows, asked)
        except sqlite3.OperationalError as error:
            log.error("a request is left to its terminal: %s", error)
            return None
        self.open[request_id] = request
        self.outgoing.wake.set()
        return request

    def _change(self, request, **changes):
        """The request is changed, and that is on the disk; or neither."""
        before = {name: getattr(request, name) for name in changes}
        vars(request).update(changes)
        try:
            self._save()
        except BaseException:
            vars(request).update(before)
            raise

    def _hold(self, session, request, gone, holds):
        if not self._taken(request):
            self.end(request, "left to the terminal, since the hub did not answer in time")
            return None
        patience = None if holds else time.monotonic() + self.settings.hook_patience_s / 2
        while request.answer is None and not request.changed.wait(0.1):
            if gone():
                self.end(request, "in the terminal")
                return None
            if request.request_id not in self.open:
                return None
            if patience and time.monotonic() > patience:
                with self.lock:  # from now on a person's answer is a key
                    if request.answer is None:
                        self._change(request, via="screen")
                        return None
        return request.answer

    def _taken(self, request):
        """Whether the hub has stored the request; it is given a moment for that."""
        if not request.spool:
            return True  # of an earlier run of this agent
        with self.acked:
            return self.acked.wait_for(
                lambda: self.upto >= request.spool, self.settings.hook_patience_s
            )

    def end(self, request, where):
        """Nobody here waits for the answer any more."""
        ended = {"type": "permission_ended", "request_id": request.request_id}
        self._drop(request, {**ended, "session_id": request.session_id, "where": where})
        request.changed.set()

    def settled(self, session_id, payload=None, where="in the terminal"):
        """A signal shows that requests were settled without us: that of the tool call which a
        payload is about, or all."""
        for request in list(self.open.values()):
            if request.session_id != session_id or request.answer is not None:
                continue
            if payload is None or (request.mark and is_same_call(request.mark, call_mark(payload))):
                self.store.owed.do(self.end, request, where)

    # -- by screen

    def abandoned(self):
        """Requests whose hook client has not come back, and that have an answer: it is given by
        key, if the dialog is there."""
        late = time.monotonic() - HOOK_BACK_S
        with self.lock:
            left = [r for r in self.open.values() if r.via == "hook" and not (r.held or r.passing)]
            left = [r for r in left if r.left < late]
            for request in left:
                self._change(request, via="screen")
        return [request for request in left if request.answer]

    def look(self, dialogs):
        """Compare the dialogs that are shown with the requests that are open."""
        for session in self.sessions.live():
            dialog = dialogs.get(session.session_id)
            mark, now = dialog and dialog["fingerprint"], time.monotonic()
            before, since = self._seen.get(session.session_id, (None, now))
            if mark != before:
                since = now
            self._seen[session.session_id] = mark, since
            if mark == before:  # two looks agree
                self._compare(session, dialog, now - since)

    def _compare(self, session, dialog, seen_s):
        ours = [r for r in list(self.open.values()) if r.session_id == session.session_id]
        by_screen = [r for r in ours if r.via == "screen" and r.answer is None]
        mark = dialog["fingerprint"] if dialog else None
        for request in by_screen:
            if request.fingerprint is None and dialog:
                self._change(request, fingerprint=mark)  # a hook announced what is now shown
            elif request.fingerprint != mark and time.monotonic() - request.since > 2:
                self.end(request, "in the terminal")
        if not dialog or dialog["kind"] not in ASKED or self._is_known(ours, mark):
            return
        if seen_s < HOOK_COMES_S and self._comes_by_hook(session, dialog):
            return
        tool = dialog.get("tool") or ASKED[dialog["kind"]]
        payload = {"tool_name": tool, "subject": dialog["subject"]}
        payload["asks"] = "plan" if dialog["kind"] == "plan" else "permission"
        name = self.rules.main_parameter(tool)
        payload["tool_input"] = {name: dialog["subject"], "screen": dialog["text"]}
        with self.lock:
            self._begin(session, str(uuid.uuid4()), "screen", payload, mark)

    def _comes_by_hook(self, session, dialog):
        """Whether a hook is about to tell of such a dialog."""
        hooks = self.activities.profile(session).get("hooks") or ()
        state = f"blocked:{dialog['kind']}"
        return any(state in _states_of(hook) for hook in hooks if hook.get("request"))

    @staticmethod
    def _is_known(ours, mark):
        return any(r.via == "hook" or r.fingerprint in (None, mark) for r in ours)

    # -- answers

    def take_answer(self, frame):
        """The hub's answer to a request: for the hook that holds it, or to be given by key.

        Returns the request if it is to be given by key. Raises AgentError when nobody waits."""
        answer = {name: frame.get(name) for name in ("decision", "message", "scope", "answers")}
        answer["author"] = frame.get("author")
        with self.lock:
            request = self.open.get(frame["request_id"])
            if request is None:
                raise AgentError("nobody waits for it any more")
            self._change(request, answer=answer)
            self.answered[request.request_id] = answer
            while len(self.answered) > self.KEPT:
                self.answered.popitem(last=False)
            if request.via == "screen":
                return request
            request.changed.set()

    def close(self, request, kind=None, why=None):
        """Its answer was given, or cannot be: the hub is told which."""
        said = {
            "type": "agent_event",
            "kind": kind,
            "command": "permission_answer",
            "request_id": request.request_id,
            "session_id": request.session_id,
            "why": why,
        }
        self._drop(request, *([said] if kind else []))

    def press(self, request):
        """Give the answer by the key that the dialog on the screen takes. Raises AgentError."""
        session = self.sessions.get_live(request.session_id)
        profile = self.activities.profile(session)
        terminal = self.sessions.terminal(session)
        decision = request.answer["decision"]
        if request.answer.get("answers"):
            raise AgentError("no program holds its question any more: answer in its terminal")
        shown = read_screen(profile, terminal.screen(session.tmux_name)) or {}
        dialog = shown.get("dialog")
        if not dialog or request.fingerprint not in (None, dialog["fingerprint"]):
            raise AgentError("its dialog is not on the screen any more")
        keys = keys_for(profile, terminal.screen(session.tmux_name), decision)
        if not keys:
            raise AgentError(f"its dialog takes no answer that means {decision}")
        self.sessions.send_keys(session, keys)
        self._wait_gone(session, profile, dialog["fingerprint"])
        self.activities.signal(session, "decided", request_id=request.request_id, tool_use_id=None)

    def _wait_gone(self, session, profile, fingerprint):
        """Raises AgentError when the dialog stays."""
        deadline = time.monotonic() + self.settings.typing_limit_s
        while time.monotonic() < deadline:
            time.sleep(0.03)
            lines = self.sessions.terminal(session).screen(session.tmux_name)
            shown = read_screen(profile, lines) or {}
            if (shown.get("dialog") or {}).get("fingerprint") != fingerprint:
                return
        raise AgentError("its dialog is still on the screen after the key was pressed")


# ---------------------------------------------------------------------------- hooks


class HookServer:
    """Where hook clients ask: a socket in the state directory that only this user reaches. One
    line of JSON each way, then a line that says that the answer was passed on."""

    LINE_MOST = 16 * KB * KB

    def __init__(self, state_dir, answer):
        self.answer = answer
        self.state_dir = state_dir
        self.listener = None

    def step(self):
        if self.listener is None:
            self.listener = listen_at(self.state_dir)
        connection, _ = self.listener.accept()
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        # Of a store that refuses the client knows nothing: it comes back.
        with connection, contextlib.suppress(OSError, ValueError, sqlite3.OperationalError):
            connection.settimeout(10)
            asked = json.loads(read_line(connection, self.LINE_MOST))
            said, was_passed_on = self.answer(asked, lambda: has_ended(connection))
            arrived = False
            try:
                connection.sendall(json.dumps(said).encode() + b"\n")
                arrived = bool(was_passed_on) and read_line(connection, 100) == b"ok"
            finally:
                if was_passed_on:
                    was_passed_on(arrived)


def in_directory(directory, deed):
    """deed(socket) with a short name for what lies in the directory: the path of a socket may
    have 107 characters."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        here = f"/proc/self/fd/{folder}"
        deed(made, f"{here if os.path.isdir(here) else directory}/hooks.sock")
    except BaseException:
        made.close()
        raise
    finally:
        os.close(folder)
    return made


def listen_at(state_dir):
    def bind(made, path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        made.bind(path)
        os.chmod(path, 0o600)
        made.listen(64)

    return in_directory(state_dir, bind)


def read_line(connection, most):
    """Bytes up to a newline or the end. Raises ValueError past `most`."""
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            break
        data += part
        if len(data) > most:
            raise ValueError("a line is too long")
    return bytes(data).rstrip(b"\n")


def has_ended(connection):
    """Whether the other side has closed its end."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(10)


HOOK_COMES_S = 4  # in which a dialog's hook tells of it; then it is read off the screen
HOOK_BACK_S = 30  # in which a hook client comes back after this agent was restarted
HOOK_TRIES = 8  # hard failures in a row, then the prompt is left to the terminal
HOOK_INPUT_BYTES = 8 * KB * KB


def run_hook(directory, launch, event):
    """The hook client: a coding agent runs it at an event, with JSON on standard input; it prints
    the answer in that agent's own words, or nothing. It never fails: what cannot be asked is left
    to the agent's own prompt."""
    directory = Path(directory)
    try:
        payload = json.loads(sys.stdin.buffer.read(HOOK_INPUT_BYTES))
        payload = payload if isinstance(payload, dict) else {}
        ours = json.loads((directory / "hooks.json").read_text(encoding="utf-8"))
        asked = {"session_id": directory.name, "launch": launch, "event": event}
        asked |= {"payload": payload, "request_id": str(uuid.uuid4())}
        said = ask_agent(directory.parent.parent, asked)
        if said is None:
            said = judge_alone(directory.parent.parent, asked, ours)
    except Exception:
        return 0
    print_answer(ours, event, said, payload)
    return 0


def ask_agent(state_dir, asked):
    """What the agent says; None when it cannot be asked. A call that breaks off is made again,
    with the same request, as when the agent is restarted."""
    for count in range(HOOK_TRIES):
        if count:
            time.sleep(min(8, 0.25 * 2**count) * random.uniform(0.5, 1))
        try:
            with in_directory(state_dir, lambda made, path: made.connect(path)) as connection:
                connection.sendall(json.dumps(asked).encode() + b"\n")
                line = read_line(connection, HOOK_INPUT_BYTES)
                if line:
                    said = json.loads(line)
                    if said.get("answer"):
                        confirm(connection, said)
                    return said
        except (OSError, ValueError):
            if count == 0:
                return None  # it does not run: no reason to wait for it
    return None


def confirm(connection, said):
    """Note how to say that the answer was passed on; called once it is printed."""
    copy = connection.dup()
    said["confirm"] = lambda: copy.sendall(b"ok\n")


def judge_alone(state_dir, asked, ours):
    """What the kept rules deny, without the agent."""
    kept = json.loads((state_dir / "rules.json").read_text(encoding="utf-8"))
    call = call_of(asked["session_id"], {"name": ours.get("agent")}, asked["payload"])
    verdict = engine_of(kept).judge(kept["rules"], {**call, **kept["origin"]})
    denied = verdict["decision"] == "deny"
    return {"answer": {"decision": "deny", "message": verdict["because"]} if denied else None}


def print_answer(ours, event, said, payload):
    """In the agent's words, as its profile has them for this event and decision."""
    answer = said.get("answer")
    which = answer and ("answer" if answer.get("answers") else answer["decision"])
    form = ours["answers"].get(event, {}).get(which)
    if form is None:
        return
    given = {"{reason}": answer.get("message") or "Denied in Orchestratia."}
    asked = payload.get("tool_input") if isinstance(payload.get("tool_input"), dict) else {}
    given["{answered}"] = {**asked, "answers": answer.get("answers")}
    print(json.dumps(filled_in(form, given)), flush=True)
    if said.get("confirm"):
        with contextlib.suppress(OSError):
            said["confirm"]()


def filled_in(form, given):
    """`form` with the values of {reason} and {answered} wherever they stand."""
    if isinstance(form, dict):
        return {name: filled_in(value, given) for name, value in form.items()}
    return given.get(form, form) if isinstance(form, str) else form


# ---------------------------------------------------------------------------- agent


# Typed into whatever runs there, perhaps a shell: fixed words and an id, nothing anybody wrote.
NOTICES = {
    "task_given": "New task for you. Run: orchestratia task view {}",
    "task_updated": "Your task was changed. Run: orchestratia task view {}",
    "task_cancelled": "Your task was cancelled, stop working on it: {}",
    "task_status_update": "There is news of a task you ordered. Run: orchestratia task view {}",
    "task_note": "There is a note on your task. Run: orchestratia task notes {}",
    "plan_approved": "Your plan is approved, go on. Run: orchestratia task view {}",
    "plan_revision": "Your plan is sent back to you. Run: orchestratia task view {}",
    "intervention_response": "You have an answer. Run: orchestratia intervention show {}",
    "intervention_for_session": "You are asked. Run: orchestratia intervention show {}",
}


def notice(frame):
    """The line that tells a session of a command. Raises AgentError unless its id is one."""
    about = "a question" if frame["type"].startswith("intervention_") else "a task"
    wanted = frame["intervention_id" if about == "a question" else "task_id"]
    return NOTICES[frame["type"]].format(valid_id(wanted, about))


def words_of(frame):
    """The same for a coding agent, which reads what is typed: with the words themselves."""
    said = {name: wordy(frame.get(name)) for name in WORDS_OF}
    kind = frame["type"]
    if kind == "task_note" and frame.get("mentioned_via"):
        kind = "note_upstream"
    template = WORDS.get(kind)
    if template is None:
        return notice(frame)
    text = template.format(**said)
    if said["comment"]:
        text += f" {said['author']} says: {said['comment']}"
    return text


def wordy(value):
    """What somebody wrote, without control characters but with its lines."""
    return KEYS.sub(" ", str(value)).strip() if value else ""


WORDS_OF = ("question", "response", "author", "comment", "feedback", "content", "about", "task_id")
WORDS_OF += ("message",)
WORDS = {
    "permission_denied": "Denied by {author}: {message}",
    "intervention_response": "Answer of {author} to your question “{question}”:\n{response}",
    "plan_approved": "Your plan is approved by {author}: go on with the task.",
    "plan_revision": "Your plan is sent back by {author}:\n{feedback}\n"
    "Mend the plan and submit it again.",
    "task_note": "Note from {author} on your task:\n{content}",
    "note_upstream": "Note from {author} on the task “{about}”, which yours depends on:\n{content}",
    "task_cancelled": "Your task was cancelled: stop working on it.",
    "task_updated": "Your task was changed: read it again with `orchestratia task view {task_id}`.",
}


LATER = object()  # a handler's answer: the command is not done yet, and will be marked when it is


class Mail:
    """What sessions are to be told, each at its moment: answers as soon as no dialog would take
    them for keys, urgent notes at once, other things when the agent has nothing to do."""

    AT_ONCE = {"intervention_response", "plan_approved", "plan_revision", "task_cancelled"}
    AT_ONCE |= {"permission_denied"}
    INTERRUPT_S = 5  # longest wait for an agent to heed an interruption
    HANDS_S = 3  # since a person typed: they may be in the middle of it
    DRAFT_S = 600  # for which what they have typed and not sent is left to them

    def __init__(self, agent):
        self.agent = agent
        self.lock = threading.Lock()
        self.waiting = collections.defaultdict(list)  # session id: frames
        self.hands = {}  # session id: when a person typed last what is not sent yet (monotonic)
        self._again_at = -math.inf  # after a write that was refused

    def put(self, frame):
        """Keep it until it can be said; LATER, unless it need not be."""
        session = self.agent.sessions.all.get(frame["session_id"])
        if session is not None and session.ends_task and frame["type"] != "task_status_update":
            return None  # such a program reads no terminal: it asks the hub
        with self.lock:
            self.waiting[frame["session_id"]].append(frame)
        self._try(frame["session_id"])
        return LATER

    def notice_hands(self, session_id, data):
        """A person has typed this: unless it sends or drops what they had typed, it is a draft."""
        if data.endswith((b"\r", b"\x1b", b"\x03")):
            self.hands.pop(session_id, None)
        else:
            self.hands[session_id] = time.monotonic()

    def look(self):
        """Try again what could not be said yet."""
        for session_id in [s for s in list(self.hands) if s not in self.agent.sessions.all]:
            self.hands.pop(session_id, None)
        for session_id in list(self.waiting):
            if time.monotonic() >= self._again_at and self._due(session_id):
                self._try(session_id)

    def _try(self, session_id):
        frame = {"type": "mail", "session_id": session_id}
        if self.agent.lanes.idle(frame):
            self.agent.lanes.put(frame)

    def deliver(self, session_id):
        """Say what can be said now, in order."""
        while frame := self._due(session_id):
            if not self._say(frame):
                return

    def _begin(self, frame):
        """From here on it counts as said; what the store refuses goes on waiting."""
        try:
            self.agent.store.begin(frame["epoch"], frame["id"])
        except sqlite3.OperationalError:
            self._again_at = time.monotonic() + 1
            raise
        with self.lock:
            self.waiting[frame["session_id"]].remove(frame)
            if not self.waiting[frame["session_id"]]:
                del self.waiting[frame["session_id"]]

    def _wait_again(self, frame):
        """Nothing was typed. If that cannot be written, a crash leaves it unknown: better not
        typed than typed twice."""
        with self.lock:
            self.waiting[frame["session_id"]].insert(0, frame)
        with contextlib.suppress(sqlite3.OperationalError):
            self.agent.store.put_back(frame["epoch"], frame["id"])

    def _due(self, session_id):
        """The first frame whose moment has come."""
        activity = self.agent.activities.of(session_id) or "no_signal"
        with self.lock:
            waiting = list(self.waiting.get(session_id, ()))
        return next((frame for frame in waiting if self._can_say(frame, activity)), None)

    def _can_say(self, frame, activity):
        session = self.agent.sessions.all.get(frame["session_id"])
        if session is None or session.state != "live":
            return True  # to say that it cannot be
        if activity.startswith("blocked") or activity == "quota":
            return False
        if activity == "no_signal" and self._is_starting(session):
            return False  # what is typed before it reads would be lost
        at_once = frame["type"] in self.AT_ONCE or frame.get("urgent")
        if activity == "working" and not at_once and self._knows_idle(session):
            return False
        return not self._is_in_use(session)

    def _is_in_use(self, session):
        """Whether a person is typing there, or has typed what they have not sent: what we type
        would be mixed with it, and sent with it."""
        since = time.monotonic() - self.hands.get(session.session_id, -math.inf)
        if since > self.DRAFT_S:
            return False
        with contextlib.suppress(AgentError):
            return since < self.HANDS_S or bool(self.agent.sessions.draft(session))
        return False

    def _is_starting(self, session):
        state = self.agent.activities.states.get(session.session_id)
        if not self._knows_idle(session):
            return False
        return state is None or time.monotonic() - state["began"] < HOOKS_EXPECTED_S

    def _knows_idle(self, session):
        """Whether it would be seen that the session's agent has nothing to do."""
        return self.agent.activities.profile(session).get("start") == "agent"

    def _say(self, frame):
        """Type it; False when it must wait. A crash from here on leaves it unknown, never
        repeated."""
        agent, said = self.agent, []
        self._begin(frame)
        session = agent.sessions.all.get(frame["session_id"])
        try:
            if session is None:
                raise AgentError(f"The session {frame['session_id']} does not run on this server.")
            profile = agent.activities.profile(session)
            if frame.get("urgent") and agent.activities.of(session.session_id) == "working":
                self._interrupt(session, profile)
            agent.sessions.type(
                frame["session_id"], words_of(frame) if profile.get("text") else notice(frame)
            )
            agent.activities.signal(session, "typed", by="hub")
            said = self._typed(frame)
        except DialogOpen:  # seen only now
            self._wait_again(frame)
            return False
        except AgentError as error:
            said = [agent.undelivered(frame, "not_delivered", str(error))]
        agent.store.owed.do(agent.done, frame, *said)
        return True

    @staticmethod
    def _typed(frame):
        """What is said of it."""
        if not frame.get("intervention_id"):
            return []
        said = {"type": "agent_event", "kind": "typed", "command": frame["type"]}
        return [said | {name: frame.get(name) for name in ("session_id", "intervention_id")}]

    def _interrupt(self, session, profile):
        """Have the agent stop what it does, so that it reads what comes."""
        keys = profile.get("interrupt")
        if not keys:
            return
        self.agent.sessions.send_keys(session, keys.encode())
        deadline = time.monotonic() + self.INTERRUPT_S
        time.sleep(0.5)  # an Escape that keys follow at once is Meta
        while time.monotonic() < deadline:
            if self.agent.activities.of(session.session_id) != "working":
                return
            time.sleep(0.05)


DETECT_AGAIN_S = 600  # somebody may have installed a coding agent meanwhile


def detect(profiles, limit_s):
    """{profile: version} of the coding agents that are installed; a program that runs anything is
    always there."""
    found = {}
    for name, profile in profiles.items():
        wanted = profile.get("detect")
        if not wanted:
            found[name] = str(profile.get("version") or "")
            continue
        version = version_of(wanted, limit_s)
        if version:
            found[name] = version
    return found


def version_of(wanted, limit_s):
    """The version a program says it has, "" when it is not there."""
    try:
        said = subprocess.run(
            through_login_shell(wanted["argv"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            env={**clean_environment(), "ORCHESTRATIA_BIN": ""},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if said.returncode:
        return ""
    match = re.search(
        wanted.get("version") or r"(\d+\.\d+[\w.-]*)", said.stdout.decode("utf-8", "replace")
    )
    return match[1] if match else ""


class Lanes:
    """Carries out frames in order within a session, and sessions beside one another: typing
    that takes seconds in one holds up no keystroke in another. A thread each, while in use."""

    def __init__(self, carry_out):
        self._carry_out = carry_out
        self._lock = threading.Lock()
        self._lanes = {}  # session id: frames
        self._undone = collections.Counter()

    def idle(self, frame):
        """Whether nothing is before this frame."""
        return not self._undone[self._lane_of(frame)]

    @staticmethod
    def _lane_of(frame):
        return str(frame.get("session_id"))

    def put(self, frame):
        name = self._lane_of(frame)
        with self._lock:
            lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = queue.SimpleQueue()
                threading.Thread(target=self._run, args=(name, lane), daemon=True).start()
            self._undone[name] += 1
            lane.put(frame)

    def _run(self, name, lane):
        while True:
            try:
                frame = lane.get(timeout=LANE_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if lane.empty():
                        del self._lanes[name], self._undone[name]
                        return
                continue
            try:
                self._carry_out(frame)
            except sqlite3.OperationalError as error:  # whoever has put it here does so again
                log.error("a frame of type %s: %s; trying again", frame["type"], error)
            finally:
                with self._lock:
                    self._undone[name] -= 1


def terminals_of(config, settings, ptys):
    """What sessions are kept by: first what new ones are, then what older ones may be."""
    tmux, plain = Tmux(f"orc-{config['server_id'][:8]}", ptys), Plains(ptys)
    if shutil.which("tmux") is None:
        log.warning(
            "tmux is not installed: sessions are plain terminals here, which end with the agent. "
            "Install tmux and restart the agent to keep them."
        )
        return [plain]
    return [plain, tmux] if settings.terminal == "pty" else [tmux, plain]


class Agent:
    """What a frame of the hub does here, and what the agent says of itself."""

    def __init__(self, config, state_dir, settings, stop):
        self.config = config
        self.settings = settings
        self.stop = stop
        self.instance = str(uuid.uuid4())
        self.store = Store(state_dir / "state.db")
        self.outgoing = Outgoing(self.store, Logs(settings), settings)
        self.ptys = Ptys(self.outgoing.live)
        terminals = terminals_of(config, settings, self.ptys)
        self.sessions = Sessions(config, state_dir, settings, self.store, self.outgoing, terminals)
        self.rules = Rules(self.store, state_dir)
        self.is_connected = lambda: False  # until there is a line
        self.activities = Activities(self.sessions, self.outgoing, settings)
        self.requests = Requests(
            *(self.sessions, self.activities, self.outgoing, self.store, settings, self.rules),
            lambda: self.is_connected(),
        )
        self.sessions.on_typed = self._was_typed
        self.mail = Mail(self)
        self.installed = self.store.get("installed", {})  # {profile: version}
        self.hooks = HookServer(state_dir, self.answer_hook)
        self.profiles_changed = threading.Event()
        self._look_at = 0.0
        self.commands = queue.SimpleQueue()  # frames with the epoch they came in
        self._refused = None  # the command that the store has refused: it is the next one
        self.lanes = Lanes(lambda frame: self._carry_out(self.MOMENTS, frame))
        self.connection = 0
        self.syncs = self.store.get("syncs", 0)  # made so far, with this state directory
        self.epoch = ""
        self.heartbeat_s = 30
        self._listed = []

    def recover(self):
        """Take up what the last run left: sessions first, then unfinished commands."""
        self.sessions.recover()
        self.requests.recover()
        for epoch, frame, begun in self.store.unfinished():
            if begun:
                self.store.owed.do(self._give_up, {**frame, "epoch": epoch})
            else:
                self.commands.put({**frame, "epoch": epoch})

    def _give_up(self, frame):
        """What was being typed when the last run ended is not typed again."""
        if request := self.requests.open.get(frame.get("request_id")):
            self.requests.close(request)
        why = "the agent ended while typing"
        self.done(frame, self.undelivered(frame, "delivery_unknown", why))

    # -- for the carrier

    def auth(self):
        """The first frame of a connection."""
        return {
            "type": "auth",
            "protocol": PROTOCOL,
            "agent_version": VERSION,
            "instance": self.instance,
            "spool_id": self.store.get("spool_id"),
            "spool_first": self.store.spool_first(),
            "spool_last": self.store.spool_last(),
            "features": [],
        }

    def sync(self):
        """The second frame; what the last connection left unsaid is said again after it."""
        self.connection += 1
        self._leave_views()
        self.outgoing.rewind()
        self._listed = self.sessions.listed()
        return {
            "type": "sync",
            "instance": self.instance,
            "number": self._next_sync(),
            "time": time.time(),
            "sessions": self._listed,
            "capabilities": self._capabilities(),
            "profiles_etag": self.store.get("profiles_etag"),
            "rules_etag": self.rules.etag,
        }

    def _next_sync(self):
        """The number of a sync: the hub takes none that was made before one it has had."""
        self.outrun(self.syncs + 1)
        return self.syncs

    def outrun(self, number):
        """The hub has had a sync of this number."""
        self.syncs = max(self.syncs, number)
        with contextlib.suppress(sqlite3.Error):  # the disk is full: the hub tells the number
            self.store.put("syncs", self.syncs)

    def _capabilities(self):
        return {
            "repos": repos_of(self.config),
            **declared(self.config),
            "profiles": self.installed,
            "os": platform.system().lower(),
            "tmux": self.sessions.terminals[self.sessions.kind].version(),
        }

    def received(self, frames):
        """Take the hub's frames: commands are on the disk before they are acknowledged. What the
        disk refuses is not acknowledged: the hub says it again, and the connection stays."""
        commands = []
        for frame in frames:
            if "id" in frame:
                commands.append(frame)
            elif frame.get("type") in self.AT_ONCE:
                self._take(self._carry_out, self.AT_ONCE, frame)
            elif not self._typed_at_once(frame):
                self.lanes.put({**frame, "connection": self.connection})
        if commands:
            self._take(self._receive, commands)

    @staticmethod
    def _take(deed, *arguments):
        try:
            deed(*arguments)
        except sqlite3.OperationalError as error:
            log.error("what the hub says cannot be written down yet: %s", error)

    def _receive(self, commands):
        new = self.store.receive(self.epoch, commands)
        self.outgoing.acknowledge([frame["id"] for frame in commands])
        for frame in new:
            self.commands.put({**frame, "epoch": self.epoch})

    def _typed_at_once(self, frame):
        """Whether it was a keystroke that could be passed on right here: on a busy machine every
        change of thread costs milliseconds. What is wrong with a frame is said in its lane."""
        if frame.get("type") != "session_input" or not self.lanes.idle(frame):
            return False
        try:
            data = base64.b64decode(frame["data"])
            return self.sessions.input_at_once(frame["session_id"], data)
        except (AgentError, KeyError, TypeError, ValueError):
            return False

    def _carry_out(self, table, frame):
        """The boundary of all handlers: one bad frame must not hold up the others."""
        handler = table.get(frame.get("type"))
        if handler is None:
            return log.debug("ignored: %s", printable(frame.get("type"), 60))
        try:
            return handler(self, frame)
        except sqlite3.OperationalError:  # nothing is wrong with the frame: the disk is full
            raise
        except Exception:
            log.exception("a frame of type %s failed", frame["type"])

    # -- steps of threads

    def run_command(self):
        """Carry out the next command; one that the store has refused again, as after a crash,
        before any that came after it."""
        frame, self._refused = self._refused or self.commands.get(), None
        try:
            if self._carry_out(self.COMMANDS, frame) is not LATER:
                self.store.owed.do(self.done, frame)
        except sqlite3.OperationalError:
            self._refused = frame
            raise

    def done(self, frame, *frames):
        """The command is carried out, of which this is to be said."""
        self.store.done(frame["epoch"], frame["id"], *frames)
        self.outgoing.wake.set()

    def serve_hooks(self):
        self.hooks.step()

    def detect(self):
        """Find out which coding agents are installed, and say so when that has changed."""
        found = detect(self.sessions.profiles, self.settings.detect_s)
        if found != self.installed:
            self.installed = found
            self.store.owed.do(self.store.put, "installed", found)
            self.outgoing.say({"type": "capabilities", "capabilities": self._capabilities()})
        self.profiles_changed.wait(DETECT_AGAIN_S)
        self.profiles_changed.clear()

    def serve_terminals(self):
        self.ptys.step()

    def watch(self):
        now = time.monotonic()
        self.store.owed.settle(now)
        self.sessions.look(now)
        self.sessions.release_logs(now)
        if now >= self._look_at:
            self._look_at = now + self.settings.activity_s
            self._look_at_programs(now)
        self.mail.look()
        self.stop.wait(self.settings.monitor_s)

    def _look_at_programs(self, now):
        if self.sessions.live():
            self.requests.look(self.activities.look(self.sessions.panes(), now))
            for request in self.requests.abandoned():
                frame = {"type": "press", "epoch": self.epoch, "id": 0}
                ids = {"request_id": request.request_id, "session_id": request.session_id}
                self.lanes.put({**frame, **ids})

    def _was_typed(self, session, data):
        """A person has typed: perhaps the answer to a dialog."""
        self.mail.notice_hands(session.session_id, data)
        if self.activities.of(session.session_id):
            self.activities.signal(session, "typed", by="terminal")

    def send_logs(self):
        if self.outgoing.due(time.monotonic()):
            self.outgoing.wake.set()
        self.stop.wait(self.settings.log_look_s)

    def send_screens(self):
        self.sessions.send_screens(time.monotonic())
        self.stop.wait(self.settings.monitor_s)

    # -- hooks

    def answer_hook(self, asked, gone):
        """What to say to a hook client: ({answer}, what to call with whether it was passed on)."""
        session = self.sessions.all.get(asked.get("session_id"))
        if session is None or session.state != "live" or asked.get("launch") != session.launch:
            return {"answer": None}, None
        payload, event = asked["payload"], asked["event"]
        profile = self.activities.profile(session)
        self.activities.signal(
            session, "hook", event=event, payload=payload, launch=asked["launch"]
        )
        meaning = hook_of(profile, event)
        self._settle_requests(session, meaning, payload)
        if meaning.get("guards"):
            denied = self.requests.guard(session, payload)
            answer = denied and {"decision": "deny", "message": denied["because"]}
            return {"answer": answer}, None
        if meaning.get("request"):
            asks = dialog_of(meaning, payload)
            if asks == "question" and "answer" not in (profile.get("answers") or {}).get(event, {}):
                return {"answer": None}, None  # left to its terminal
            asked = {**asked, "payload": {**payload, "asks": asks}}
            return self._answer_request(session, asked, meaning["request"] == "held", gone)
        return {"answer": None}, None

    def _settle_requests(self, session, meaning, payload):
        """Signs that a dialog was answered at the terminal."""
        if meaning.get("settles") == "tool":
            self.requests.settled(session.session_id, payload)
        elif meaning.get("settles") and not payload.get("agent_id"):
            self.requests.settled(session.session_id)

    def _answer_request(self, session, asked, holds, gone):
        denied = self.requests.guard(session, asked["payload"])
        if denied:
            return {"answer": {"decision": "deny", "message": denied["because"]}}, None
        request_id = valid_id(asked["request_id"], "a request")
        answer = self.requests.ask(session, request_id, asked["payload"], gone, holds)
        if answer is None:
            return {"answer": None}, None
        return {"answer": answer}, functools.partial(self._passed_on, session, asked)

    def _passed_on(self, session, asked, arrived):
        request = self.requests.open.get(asked["request_id"])
        if request is None:
            return
        how = ("delivered",)
        if not arrived:
            how = "delivery_unknown", "the hook ended while the answer was passed on"
        self.store.owed.do(self.requests.close, request, *how)
        use = asked["payload"].get("tool_use_id")
        self.activities.signal(session, "decided", request_id=request.request_id, tool_use_id=use)

    # -- at once

    def _auth_ok(self, frame):
        self.epoch = frame["hub_epoch"]
        self.outrun(frame.get("synced") or 0)
        self.heartbeat_s = float(frame.get("heartbeat_s") or self.heartbeat_s)
        name = printable(frame.get("server_name"))
        log.info("connected to %s as %s", self.config["hub_url"], name)

    def _sync_ok(self, frame):
        self._take_profiles(frame)
        if frame.get("rules"):
            self.rules.take(frame["rules"])
        self.sessions.agree(frame, self._listed)

    def _take_profiles(self, frame):
        if isinstance(frame.get("profiles"), dict):
            self.sessions.profiles = parse_profiles(frame["profiles"])
            self.profiles_changed.set()
            self.store.owed.do(self._keep_profiles, frame["profiles"], frame.get("profiles_etag"))

    def _keep_profiles(self, texts, etag):
        self.store.put("profiles", texts)
        self.store.put("profiles_etag", etag)

    def _spool_ack(self, frame):
        self.requests.spool_acked(frame["upto"])
        self.store.trim_spool(frame["upto"])
        self.sessions.sweep_all()

    def _log_ack(self, frame):
        self.outgoing.logs.acknowledge(frame["session_id"], frame["offset"])
        session = self.sessions.all.get(frame["session_id"])
        if session is not None:
            self.sessions.sweep(session)

    def _ping(self, _frame):
        self.outgoing.say({"type": "pong"})

    AT_ONCE = {
        "ping": _ping,
        "auth_ok": _auth_ok,
        "sync_ok": _sync_ok,
        "spool_ack": _spool_ack,
        "log_ack": _log_ack,
    }

    # -- commands

    def _session_start(self, frame):
        self.sessions.start(frame)

    def _task_assigned(self, frame):
        task = frame["task"]
        if frame.get("start"):
            attempt = {"task_id": task["id"], "attempt": frame.get("attempt")}
            self.sessions.start({**frame["start"], **attempt}, task)
        elif frame.get("session_id"):
            return self.mail.put({**frame, "type": "task_given", "task_id": task["id"]})

    def _task_cancelled(self, frame):
        session = self.sessions.all.get(frame["session_id"])
        if session is None or session.state != "live":
            return
        if session.ends_task and session.task_id == frame["task_id"]:
            self.sessions.close(session, cancelled=True)
        else:
            return self.mail.put(frame)

    def _tell(self, frame):
        return self.mail.put(frame)

    def _permission_answer(self, frame):
        """To the hook that holds the request, or by key."""
        try:
            request = self.requests.take_answer(frame)
            if request is None:
                return
            self.store.begin(frame["epoch"], frame["id"])
            self.lanes.put({**frame, "type": "press"})
            return LATER
        except AgentError as error:
            self.outgoing.spool(self.undelivered(frame, "not_delivered", str(error)))

    def _press(self, frame):
        request, why = self.requests.open.get(frame["request_id"]), "it could not be given"
        try:
            if request is None:
                raise AgentError("nobody waits for it any more")
            self.requests.press(request)
            why = None
        except AgentError as error:
            why = str(error)
        finally:
            self.store.owed.do(self._pressed, frame, request, why)

    def _pressed(self, frame, request, why):
        """What is said of a key that was pressed, or why it was not."""
        if why is not None:
            if request is not None:
                self.requests.close(request)
            answer = {**frame, "type": "permission_answer"}
            return self.done(frame, self.undelivered(answer, "not_delivered", why))
        self.requests.close(request, "delivered")
        if self._say_why(frame) is not LATER:
            self.done(frame)

    def _say_why(self, frame):
        """Have the reason of a denial typed, since its key says none; LATER if it will be."""
        session = self.sessions.all.get(frame["session_id"])
        if frame.get("decision") != "deny" or not frame.get("message") or session is None:
            return None
        if not self.activities.profile(session).get("text"):
            return None  # no coding agent reads it
        return self.mail.put({**frame, "type": "permission_denied"})

    def _rules_changed(self, frame):
        self.rules.take(frame["rules"])

    @staticmethod
    def undelivered(frame, kind, why):
        """What the hub is told of words that were not typed, or perhaps not."""
        log.warning("the notice of %s was not typed: %s", frame["type"], why)
        return {
            "type": "agent_event",
            "kind": kind,
            "command_id": frame["id"],
            "command": frame["type"],
            "session_id": frame.get("session_id"),
            "task_id": frame.get("task_id") or (frame.get("task") or {}).get("id"),
            "intervention_id": frame.get("intervention_id"),
            "request_id": frame.get("request_id"),
            "why": why,
        }

    def _session_close(self, frame):
        session = self.sessions.all.get(frame["session_id"])
        if session is not None and session.state == "live":
            self.sessions.close(session, force=bool(frame.get("force")))

    def _profiles_changed(self, frame):
        self._take_profiles(frame)

    COMMANDS = {
        "session_start": _session_start,
        "task_assigned": _task_assigned,
        "task_cancelled": _task_cancelled,
        "session_close": _session_close,
        "permission_answer": _permission_answer,
        "task_updated": _tell,
        "task_note": _tell,
        "task_status_update": _tell,
        "plan_approved": _tell,
        "plan_revision": _tell,
        "intervention_response": _tell,
        "intervention_for_session": _tell,
        "profiles_changed": _profiles_changed,
        "rules_changed": _rules_changed,
    }

    # -- for the moment

    def _session_input(self, frame):
        data = base64.b64decode(frame["data"])
        self._try(self.sessions.input, frame["session_id"], data)

    def _session_watch(self, frame):
        """Only for the connection that asked: a new one begins with nothing watched."""
        session_id = frame["session_id"]
        if frame["on"] and frame["connection"] == self.connection:
            self._try(self.sessions.view, session_id)
        if not frame["on"] or frame["connection"] != self.connection:
            self._try(self.sessions.leave, session_id)

    def _leave_views(self):
        """In the lanes, behind what is still being typed into them."""
        for session_id in self.outgoing.live.clear():
            frame = {"type": "session_watch", "session_id": session_id, "on": False}
            self.lanes.put({**frame, "connection": self.connection})

    def _session_resize(self, frame):
        size = int(frame["cols"]), int(frame["rows"])
        self._try(self.sessions.resize, frame["session_id"], *size)

    def _session_type(self, frame):
        why = self._try(self.sessions.type, frame["session_id"], frame["text"])
        answer = {"type": "session_typed", "request_id": frame["request_id"]}
        self.outgoing.say({**answer, "ok": why is None, "why": why})

    def _capture_scrollback(self, frame):
        try:
            lines = self.sessions.scrollback(frame["session_id"])
        except AgentError as error:
            return log.warning("no scrollback: %s", error)
        answer = {"type": "scrollback_captured", "session_id": frame["session_id"]}
        self.outgoing.say({**answer, "lines": lines})

    def _deliver_mail(self, frame):
        self.mail.deliver(frame["session_id"])

    @staticmethod
    def _try(deed, *arguments):
        """Why it was not done, or None."""
        try:
            deed(*arguments)
        except AgentError as error:
            log.warning("%s: %s", deed.__name__, error)
            return str(error)

    MOMENTS = {
        "session_input": _session_input,
        "session_resize": _session_resize,
        "session_watch": _session_watch,
        "session_type": _session_type,
        "capture_scrollback": _capture_scrollback,
        "mail": _deliver_mail,
        "press": _press,
    }


# ---------------------------------------------------------------------------- carriers


ABSENT = "absent"  # nobody is there, or the hub asks for patience
REFUSED = "refused"  # something answers, but the upgrade fails
MUTE = "mute"  # opened, and the hub's greeting does not come
SILENT = "silent"  # greeted, and then nothing comes
DENIED = "denied"  # the hub does not accept the key
SUPERSEDED = "superseded"  # a newer agent has connected
LOST = "lost"  # it carried, and has ended

AUTH_ERRORS = {"superseded": SUPERSEDED, "busy": ABSENT, "too_many": ABSENT}  # others: DENIED
CLOSE_CODES = {  # others: what the moment makes of it
    1001: ABSENT,
    1012: ABSENT,
    1013: ABSENT,
    4001: SUPERSEDED,
    4401: DENIED,
    4429: ABSENT,
}


class Ended(Exception):
    """A socket has ended or could not be opened; `kind`, one of the above, is what that means."""

    def __init__(self, kind, why):
        super().__init__(printable(why, 300))
        self.kind = kind


class Choice:
    """Which carrier is used, and when the socket is tried next. Decides, and does nothing.

    The socket is preferred. Failures enough without a success in between, and it is the poll until
    a later try succeeds. A hub that is away says nothing about its socket."""

    ENOUGH = 3
    FAILURES = {REFUSED: 1, SILENT: 1, MUTE: ENOUGH}
    SETTLED_S = 1  # a connection that carried for less says that the hub is in trouble

    def __init__(self, settings):
        self.settings = settings
        self.using = "poll" if settings.carrier == "poll" else "socket"
        self.failures = 0
        self._pauses = Backoff(settings.backoff_max_s, least=0.2, growth=1.5)
        self._refusals = Backoff(settings.refused_max_s)

    def carries(self):
        """The socket is open and something has come through it."""
        self.using = "socket"
        self.failures = 0
        self._refusals.reset()

    def after(self, kind, carried_s=0):
        """Note how a socket ended that carried for so long; the seconds until the next try."""
        failure = self.FAILURES.get(kind, 0)
        self.failures = self.failures + failure if failure else 0
        if self.failures >= self.ENOUGH and self.settings.carrier == "auto":
            self.using = "poll"
        if self.using == "poll":
            return self.settings.socket_retry_s
        if kind == SUPERSEDED:
            return self.settings.superseded_s
        if kind == DENIED:
            return self._refusals.pause()
        if carried_s > self.SETTLED_S:
            self._pauses.reset()
        return self._pauses.pause()


class Line:
    """The connection to the hub: runs the carrier that `Choice` says, one at a time."""

    def __init__(self, hub, agent):
        self.hub = hub
        self.agent = agent
        self.stop = agent.stop
        self.choice = Choice(agent.settings)
        self.socket = None  # the carrier, while it carries
        self.poll = None
        self._carries_since = math.inf  # for the socket
        self._spoken_of = None  # the carrier named in the log last
        self._down = False
        self._numbers = itertools.count(1)  # of the poll's calls: the hub knows them again by it
        self._again = threading.Event()  # set: the socket is tried now
        self._loop = Loop(self.step, self.stop)
        agent.is_connected = self.is_up

    def is_up(self):
        """Whether the hub answers, as far as one can tell."""
        poll = self.poll
        return self.socket is not None or (poll is not None and poll.is_up())

    def start(self):
        if self.choice.using == "socket" and not can_socket():
            log.warning(
                "The package websockets is missing or too old, so the hub is polled: "
                "install what requirements.txt names."
            )
            self.agent.settings.carrier = self.choice.using = "poll"
        self._loop.start()

    def end(self):
        """Send what can be sent within a second, and hang up."""
        self._again.set()
        self.agent.outgoing.wake.set()
        self._loop.join(1 if self.socket else 0.1)
        if self.poll and self.poll.end(0.4):
            self.poll.flush(0.5)

    def step(self):
        """Carry by the socket as long as it lasts, or begin to poll; then pause."""
        if self.agent.settings.carrier == "poll":
            self._begin_poll("there is no socket to try")
            self._again.wait()
            return
        self._carries_since = math.inf
        try:
            self._by_socket()
        except Ended as ended:
            pause = self.choice.after(ended.kind, time.monotonic() - self._carries_since)
            self._report(ended)
            if self.choice.using == "poll":
                self._begin_poll(f"the socket fails: {ended}")
        self._again.wait(pause)
        self._again.clear()

    def _by_socket(self):
        """Open a socket and carry by it until it has Ended."""
        carrier = SocketCarrier(self.hub, self.agent)
        try:
            carrier.open()
            self._end_poll()
            carrier.sync()
            self._up()
            self._say("socket", "it works again" if self._spoken_of else "it is preferred")
            self.socket = carrier
            carrier.carry()
        finally:
            self.socket = None
            carrier.close()

    def _begin_poll(self, why):
        if self.poll is None and not self.stop.is_set():
            self._say("poll", why)
            self.poll = PollCarrier(self.hub, self.agent, self._numbers, self._again.set)
            self.poll.start()

    def _end_poll(self):
        if self.poll:
            self.poll.end(1)
            self.poll = None

    def _up(self):
        self.choice.carries()
        self._carries_since = time.monotonic()
        if self._down:
            log.info("the hub answers again")
        self._down = False

    def _say(self, carrier, why):
        if carrier != self._spoken_of:
            log.info("frames go by the %s: %s", carrier, why)
            self._spoken_of = carrier

    def _report(self, ended):
        """Say once that the hub is away; a refusal is said each time."""
        if self.stop.is_set() or self.poll:
            log.debug("the socket: %s", ended)
        elif ended.kind in (DENIED, SUPERSEDED):
            log.error("%s", ended)
        elif ended.kind != ABSENT:
            log.warning("the socket: %s", ended)
        elif not self._down:
            log.warning("the hub is away (%s). Trying again; sessions go on.", ended)
            self._down = True


def can_socket():
    """Whether the library is there."""
    try:
        from websockets.sync.client import reconnect  # noqa: F401
    except ImportError:
        return False
    return True


class SocketCarrier:
    """Protocol 2 over one WebSocket: `open`, `sync`, `carry`. Each raises Ended."""

    RECEIVED_BYTES = 32 * KB * KB
    AT_ONCE = 64  # messages handled together: one write to the disk for all commands in them
    SYNC_WAITS = 3  # times the wait for the greeting: the hub has to look at every session

    def __init__(self, hub, agent):
        self.hub = hub
        self.agent = agent
        self.settings = agent.settings
        self.wake = agent.outgoing.wake
        self._held = contextlib.ExitStack()
        self._ws = None
        self._reached = False  # there was somebody to shake hands with
        self._over = False

    # -- from the upgrade to the end

    def open(self):
        """Connect and be greeted."""
        self._ws = self._upgrade()
        with self._ending(REFUSED, MUTE):
            self._send({**self.agent.auth(), "api_key": self.hub.api_key})
            frames = self._receive(self.settings.socket_open_s)
        answer = frames[0] if frames else {}
        if answer.get("type") == "auth_error":
            detail = answer.get("detail") or "The hub does not accept this agent."
            raise Ended(AUTH_ERRORS.get(answer.get("code"), DENIED), detail)
        if answer.get("type") != "auth_ok":
            raise Ended(MUTE, "what answers is not a hub")
        self.agent.received(frames)

    def sync(self):
        """Agree with the hub on what there is; nothing else is sent before."""
        deadline = time.monotonic() + self.SYNC_WAITS * self.settings.socket_open_s
        with self._ending(SILENT, SILENT):
            self._send(self.agent.sync())
            agreed = False
            while not agreed:
                frames = self._receive(max(0, deadline - time.monotonic()))
                self.agent.received(frames)
                agreed = any(frame.get("type") == "sync_ok" for frame in frames)

    def carry(self):
        """Send and receive until it ends."""
        writer = threading.Thread(target=self._write, name="SocketCarrier.write", daemon=True)
        self.wake.set()
        writer.start()
        try:
            with self._ending(LOST, LOST):
                while True:
                    self.agent.received(self._receive())
        finally:
            self._over = True
            self.wake.set()
            self._cut()
            writer.join()

    def close(self):
        self._held.close()

    def _cut(self):
        """Free whoever is stuck in sending."""
        with contextlib.suppress(OSError):
            self._ws.socket.shutdown(socket.SHUT_RDWR)

    # -- opening

    def _upgrade(self):
        from websockets.exceptions import WebSocketException

        try:
            return self._held.enter_context(self._connecter())
        except (OSError, ImportError, WebSocketException) as error:
            raise Ended(self._kind_of(error), error) from error

    def _connecter(self):
        from websockets.sync.client import reconnect

        connecter = reconnect(
            f"ws{self.hub.url.removeprefix('http')}/ws/server",
            compression=None,
            open_timeout=self.settings.socket_open_s,
            ping_interval=self.settings.socket_ping_s,
            ping_timeout=self.settings.socket_ping_s,
            close_timeout=2,
            max_size=self.RECEIVED_BYTES,
            max_queue=self.AT_ONCE,
            create_connection=self._connection,
        )
        connecter.process_redirect = lambda error: error  # the key is for this address only
        return connecter

    def _connection(self, sock, protocol, **options):
        from websockets.sync.client import ClientConnection

        self._reached = True
        tune(sock, 2 * self.settings.socket_ping_s)
        return ClientConnection(EndsAtOnce(sock), protocol, **options)

    def _kind_of(self, error):
        """A proxy that is in the way must be told from a hub that is not there."""
        import ssl

        if asks_patience(getattr(error, "response", None)):
            return ABSENT
        never = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
        return ABSENT if never and not self._reached else REFUSED

    @contextlib.contextmanager
    def _ending(self, closed, timed_out):
        """Turn the library's end of a connection into ours, of these kinds."""
        from websockets.exceptions import ConnectionClosed

        try:
            yield
        except ConnectionClosed as end:
            code = end.rcvd.code if end.rcvd else None
            raise Ended(CLOSE_CODES.get(code, closed), why_closed(end)) from end
        except TimeoutError as end:
            raise Ended(timed_out, "it is open, but nothing comes through") from end

    # -- both directions

    def _receive(self, timeout=None):
        """The frames of all messages that have come, waiting for the first."""
        from websockets.exceptions import ConnectionClosed

        messages = [self._ws.recv(timeout)]
        with contextlib.suppress(TimeoutError, ConnectionClosed):  # the next call says it again
            while len(messages) < self.AT_ONCE:
                messages.append(self._ws.recv(0))
        return [frame for frame in map(frame_of, messages) if frame]

    def _write(self):
        from websockets.exceptions import ConnectionClosed

        try:
            while not self._over:
                self.wake.wait()
                self.wake.clear()
                self._send_waiting()
                if self.agent.stop.is_set():
                    return self._ws.close(1001, "the agent stops")
        except ConnectionClosed:
            pass  # the reader says why
        except Exception:
            log.exception("sending failed")
            self._cut()

    def _send_waiting(self):
        """Send what waits; each frame is taken by the socket before the next one is made."""
        outgoing = self.agent.outgoing
        self._send(*outgoing.take_urgent())
        for frame in outgoing.take(time.monotonic()):
            self._send(frame, *outgoing.take_urgent())

    def _send(self, *frames):
        for frame in frames:
            self._ws.send(json.dumps(frame))


class EndsAtOnce:
    """A connected socket that lets go of a send that is stuck when the other side has closed:
    nothing will be taken any more, but the kernel would go on trying."""

    def __init__(self, sock):
        self._sock = sock

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def recv(self, size):
        data = self._sock.recv(size)
        if not data:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        return data


def tune(sock, patience_s):
    """Have the kernel give up on a peer that takes nothing, which no ping can find out while a
    message is stuck before it; and keep little unsent, so that keystrokes overtake logs."""
    options = {"TCP_USER_TIMEOUT": int(patience_s * 1000), "TCP_NOTSENT_LOWAT": 128 * KB}
    for name, value in options.items():
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def asks_patience(response):
    """Whether it is a hub that answers, to say that it has no time."""
    if response is None or response.status_code not in (429, 503):
        return False
    return b'"detail"' in (response.body or b"")


def why_closed(end):
    if end.rcvd:
        return end.rcvd.reason or f"closed by the hub with code {end.rcvd.code}"
    return end.sent.reason if end.sent and end.sent.reason else "the connection broke"


def frame_of(message):
    """The frame in a message, or None."""
    try:
        frame = json.loads(message)
    except (ValueError, RecursionError):
        frame = None
    if isinstance(frame, dict):
        return frame
    log.warning("what came from the hub is no frame: %s", printable(message[:100]))


class PollCarrier:
    """Protocol 2 over POST server/poll: one call waits for the hub, another carries frames.

    A call whose answer is lost is repeated with its number, so that it has one effect. When
    the hub does not know us, both lanes let go of their calls and the carrying one syncs."""

    def __init__(self, hub, agent, numbers, came_back):
        self.hub = hub
        self.agent = agent
        self.settings = agent.settings
        self.stop = threading.Event()
        self.wake = agent.outgoing.wake
        self.synced = threading.Event()
        self.connection = 0  # rises with each sync, so that a lane knows its call is stale
        self._came_back = came_back
        self._lock = threading.Lock()
        self._numbers = numbers
        self._down = False
        self._refusals = Backoff(self.settings.refused_max_s)
        self._lanes = [Loop(self.carry, self.stop), Loop(self.listen, self.stop)]

    def is_up(self):
        return self.synced.is_set() and not self._down

    def start(self):
        for lane in self._lanes:
            lane.start()

    def end(self, limit_s):
        """No new calls; whether none carries frames any more. The waiting call, which the hub
        answers as soon as another carrier syncs, still hands on what it brings."""
        self.stop.set()
        self.wake.set()
        carrying = self._lanes[0]
        carrying.join(limit_s)
        return not carrying.is_alive()

    # -- steps of threads

    def carry(self):
        if not self.synced.is_set():
            return self._sync()
        if self.wake.wait(0.5):
            self.wake.clear()
            frames = self.agent.outgoing.take(time.monotonic())
            if frames:
                self._call(frames, 0)

    def listen(self):
        if self.synced.wait(0.5):
            self._call([], self.settings.poll_wait_s)

    def flush(self, limit_s):
        """One last call before the end, if the hub answers in time."""
        frames = self.agent.outgoing.take(time.monotonic())
        if frames and self.synced.is_set():
            try:
                self.agent.received(self._post(next(self._numbers), frames, 0, limit_s))
            except HubError as error:
                log.info("the last reports stay on the disk: %s", error)

    # -- calls

    def _sync(self):
        with self._lock:
            self.connection += 1
        if self._call([self.agent.auth(), self.agent.sync()], 0, syncing=True):
            self.synced.set()
            self.wake.set()

    def _call(self, frames, wait, syncing=False):
        """Make a call until it is answered (True) or no longer wanted (False)."""
        connection, seq = self.connection, next(self._numbers)
        backoff = Backoff(self.settings.backoff_max_s)
        while not self.stop.is_set() and self.connection == connection:
            try:
                answer = self._post(seq, frames, wait, wait + 15)
            except HubError as error:
                if self.stop.is_set():
                    return False
                self._report(error)
                if not retryable(error):
                    self._start_afresh(error, connection, syncing)
                    return False
                self.stop.wait(backoff.pause())
                continue
            if self.connection == connection and not (syncing and self.stop.is_set()):
                self._up()
                self.agent.received(answer)
                return True
        return False

    def _start_afresh(self, error, connection, syncing):
        """The hub refused: this call is given up, and the next one syncs, after a pause."""
        with self._lock:
            if connection == self.connection:
                self.synced.clear()
        if error.code == "late_sync":
            self.agent.outrun(error.fields["synced"])
        elif error.code == "superseded":
            self.stop.wait(self.settings.superseded_s)
        elif error.code != "sync_required" or syncing:
            self.stop.wait(self._refusals.pause())

    def _post(self, seq, frames, wait, timeout):
        for frame in frames:
            if frame["type"] == "sync":
                frame["time"] = time.time()  # it may have been made long ago
        body = {"instance": self.agent.instance, "seq": seq, "wait": wait, "frames": frames}
        return self.hub.post("server/poll", body, timeout)["frames"]

    def _report(self, error):
        """Say once that the hub is away; a refusal is said each time."""
        if error.code in ("sync_required", "late_sync"):
            log.info("the hub asks for a new start of the connection")
        elif not retryable(error):
            log.error("%s", error)
        elif not self._down:
            log.warning("%s Trying again; sessions go on.", error)
            self._down = True

    def _up(self):
        if self._down:
            log.info("the hub answers again")
            self._came_back()  # the socket may have failed for the same reason
        self._down = False
        self._refusals.reset()


class Heartbeat:
    """A sign of life of its own, so that nothing else can make the server look dead."""

    def __init__(self, hub, agent, line):
        self.hub = hub
        self.agent = agent
        self.line = line

    def step(self):
        vital = {"system_info": {**system_info(), **self._own()}}
        if self.line.socket:
            self.agent.outgoing.say({"type": "heartbeat", **vital})
        else:
            self._post(vital)
        self.agent.stop.wait(self.agent.heartbeat_s)

    def _own(self):
        """What else the hub should know: the clock here, room on the disk, what goes wrong."""
        store = self.agent.store
        return {
            "time": time.time(),
            "state_free_mb": free_mb(store.path.parent),
            "tmux": self._tmux,
            "trouble": store.trouble,
        }

    @functools.cached_property
    def _tmux(self):
        return self.agent.sessions.terminals[self.agent.sessions.kind].version()

    def _post(self, vital):
        try:
            answer = self.hub.post("servers/heartbeat", vital)
            self.agent.heartbeat_s = float(answer.get("heartbeat_s") or self.agent.heartbeat_s)
        except HubError as error:
            log.debug("no heartbeat: %s", error)  # the carrier says the same, once


class Loop(threading.Thread):
    """Runs a step again and again; a fault of one step is logged and the next one tried."""

    def __init__(self, step, stop):
        super().__init__(name=step.__qualname__, daemon=True)
        self.step = step
        self.stop = stop

    def run(self):
        while not self.stop.is_set():
            try:
                self.step()
            except sqlite3.OperationalError as error:
                log.error("%s: the state cannot be written (%s); trying again", self.name, error)
                self.stop.wait(1)
            except Exception:
                log.exception("%s failed", self.name)
                self.stop.wait(1)


# ---------------------------------------------------------------------------- doctor


class Doctor:
    """Looks at what an agent needs, and says what to do where it is missing. Changes nothing."""

    SKEW_S, LITTLE_MB, NONE_MB, TMUX = 30, 1000, 100, (3, 0)

    def __init__(self, config_path, config, state_dir):
        self.config_path, self.config, self.state = config_path, config, state_dir
        self.found = []

    def say(self, check, state, says, do=""):
        self.found.append({"check": check, "state": state, "says": says, "do": do})

    def examine(self):
        for look in (self._config, self._state, self._disk, self._tmux, self._running):
            look()
        if self.config.get("hub_url"):
            for look in (self._hub, self._socket):
                look()
        return self.found

    def _config(self):
        if not self.config.get("api_key"):
            again = "Make a token on the hub and run: agent.py --register TOKEN"
            return self.say("config", "bad", f"{self.config_path} holds no key.", again)
        self._private("config", self.config_path)

    def _private(self, check, path):
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            do = f"chmod go= {path}"
            return self.say(check, "bad", f"{path} may be read by others ({mode:o}).", do)
        self.say(check, "ok", f"{path} is readable by its owner alone.")

    def _state(self):
        path = self.state / "state.db"
        if not path.exists():
            return self.say("state", "ok", f"{self.state} is empty: no agent has run here yet.")
        self._private("state", self.state)
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                said = db.execute("PRAGMA quick_check").fetchone()[0]
                waiting = db.execute("SELECT COUNT(*) FROM spool").fetchone()[0]
                meta = dict(db.execute("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            said, waiting, meta = str(error), 0, {}
        if said != "ok":
            do = "Move it away and start the agent again: sessions in tmux go on."
            return self.say("database", "bad", f"{path}: {said}", do)
        self.say("database", "ok", f"{path} is whole; {waiting} reports wait for the hub.")
        installed = json.loads(meta.get("installed") or "{}")
        named = ", ".join(f"{name} {version}" for name, version in sorted(installed.items()))
        self.say("coding agents", "ok", f"Found when last looked for: {named or 'none'}.")

    def _disk(self):
        place = self.state if self.state.exists() else self.state.parent
        while not place.exists():
            place = place.parent
        left = free_mb(place)
        state = "bad" if left < self.NONE_MB else "warn" if left < self.LITTLE_MB else "ok"
        do = "Free some space: without it nothing can be recorded." if state != "ok" else ""
        self.say("disk", state, f"{left:,} MB are free where {self.state} is.", do)

    def _tmux(self):
        try:
            version = Tmux("doctor", None).version()
        except (AgentError, OSError):
            do = "Install tmux: without it sessions end with the agent."
            return self.say("tmux", "warn", "tmux is not installed.", do)
        number = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if number < self.TMUX:
            return self.say("tmux", "warn", f"tmux {version} is old.", "Use tmux 3.0 or newer.")
        self.say("tmux", "ok", f"tmux {version}.")

    def _running(self):
        lock = self.state / "agent.lock"
        held = False
        if lock.exists():
            with open(lock) as file:
                held = is_held(file)
        if held:
            return self.say("agent", "ok", f"An agent runs with {self.state}.")
        self.say("agent", "warn", f"No agent runs with {self.state}.", "Start it: python agent.py")

    def _hub(self):
        import requests

        url = self.config["hub_url"].rstrip("/")
        began = time.time()
        try:
            answer = requests.get(f"{url}/api/v1/health", timeout=10, allow_redirects=False)
        except requests.exceptions.SSLError as error:
            do = "Check the hub's certificate and this machine's clock and certificates."
            return self.say("TLS", "bad", f"{url}: {printable(error, 200)}", do)
        except requests.RequestException as error:
            do = "Check that the hub runs and that this machine may connect to it."
            return self.say("hub", "bad", f"{url}: {printable(error, 200)}", do)
        if answer.status_code != 200:
            do = "Check hub_url: a redirect or a login page of a proxy is not followed."
            return self.say("hub", "bad", f"{url} answers {answer.status_code}.", do)
        try:
            version = answer.json()["version"]
        except (ValueError, TypeError, KeyError):
            do = "Check hub_url: a proxy or a login page answers there in the hub's place."
            return self.say("hub", "bad", f"What answers at {url} is not a hub.", do)
        do = "" if version == VERSION else "Upgrade with the hub's install.sh."
        says = f"{url} has {version}, this agent {VERSION}."
        self.say("hub", "warn" if do else "ok", says, do)
        self._plain(url)
        self._skew(answer.headers.get("Date"), began)

    def _plain(self, url):
        host = urlsplit(url).hostname
        if url.startswith("https:") or host in ("localhost", "127.0.0.1", "::1"):
            return self.say("TLS", "ok", f"The way to {url} is private.")
        do = "Put a proxy with TLS in front of the hub and register with its https address."
        self.say("TLS", "bad", f"Keys and terminals travel to {url} for anybody to read.", do)

    def _skew(self, date, began):
        with contextlib.suppress(TypeError, ValueError):
            there = email.utils.parsedate_to_datetime(date).timestamp()
            skew = round((began + time.time()) / 2 - there)
            fine = abs(skew) <= self.SKEW_S
            do = "" if fine else "Set this clock or the hub's: use NTP on both."
            self.say("clock", "ok" if fine else "warn", f"{skew:+d} s beside the hub's.", do)

    def _socket(self):
        """Whether an upgrade gets through: the hub turns the key's absence away in words."""
        try:
            from websockets.sync.client import connect
        except ImportError:
            do = "pip install websockets: until then the agent polls."
            return self.say("WebSocket", "warn", "The package websockets is missing.", do)
        url = f"ws{self.config['hub_url'].rstrip('/').removeprefix('http')}/ws/server"
        try:
            with connect(url, open_timeout=10, close_timeout=1) as line:
                line.send(json.dumps({"type": "auth", "api_key": "", "protocol": 2}))
                said = json.loads(line.recv(10))
            fine = said.get("type") == "auth_error"
        except Exception as error:
            do = "Have the proxy pass on Upgrade and Connection. Until then the agent polls."
            return self.say("WebSocket", "warn", f"{url}: {printable(error, 200)}", do)
        self.say("WebSocket", "ok" if fine else "warn", f"{url} is reached.")


def doctor(args):
    """Print what the doctor found; 1 if something keeps the agent from its work."""
    path = config_path_of(args)
    config = load_config(path)
    found = Doctor(path, config, state_dir_of(args, config)).examine()
    if args.json:
        print(json.dumps(found))
    else:
        for one in found:
            print(f"{one['state']:<5}{one['check']:<15}{one['says']}")
            if one["do"]:
                print(f"{'':20}→ {one['do']}")
    return 1 if any(one["state"] == "bad" for one in found) else 0


# ---------------------------------------------------------------------------- commands


class PrivateLog(logging.handlers.RotatingFileHandler):
    """agent.log and its older parts, readable by the owner only."""

    def _open(self):
        return open(self.baseFilename, "a", encoding="utf-8", opener=open_private)

    def handleError(self, record):
        """A full disk is no trouble of its own: the terminal and the hub are told of it."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(state_dir, verbose=False, terminal=True):
    form = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    path = state_dir / "agent.log"
    handlers = [PrivateLog(path, maxBytes=KB * KB, backupCount=3, delay=True)]
    if terminal:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


@contextlib.contextmanager
def hold(state_dir):
    """Lock the state directory for this process. Raises AgentError if another holds it."""
    with open(state_dir / "agent.lock", "a", opener=open_private) as lock:
        if is_held(lock):
            raise AgentError(
                f"An agent already runs with the state directory {state_dir}: stop that one "
                "first (--stop), or give this one its own --config and --state."
            )
        try:
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        except OSError as error:  # the lock holds all the same; --stop will not know whom
            print(f"agent.py: {lock.name} cannot be written: {error.strerror}", file=sys.stderr)
        yield


def stop_running(args):
    """End the agent that runs with the state directory, and wait for it."""
    state_dir = state_dir_of(args, load_config(config_path_of(args)))
    path, deadline = state_dir / "agent.lock", time.monotonic() + STOP_S
    asked = False
    while path.exists():
        with open(path) as lock:
            if not is_held(lock):
                break
            pid = lock.read().strip()
        if not asked:
            end_process(pid, state_dir)
            asked = True
        if time.monotonic() > deadline:
            raise AgentError(f"The agent (process {pid}) does not end: look into its log.")
        time.sleep(0.05)
    print("The agent has stopped; sessions in tmux go on." if asked else "No agent is running.")
    return 0


def is_held(lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def end_process(pid, state_dir):
    if not pid.isdecimal():
        raise AgentError(f"An agent runs with {state_dir}, but not which process it is: end it.")
    try:
        os.kill(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just ended by itself
    except OSError as error:
        raise AgentError(f"The agent (process {pid}) cannot be ended: {error.strerror}.") from error


def register(args):
    """Trade the token for a key and write the config file."""
    config_path = config_path_of(args)
    config = load_config(config_path)
    log_to(make_private_dir(state_dir_of(args, config)), terminal=False)
    try:
        hub_url = args.hub or hub_url_of(args.register)
        config.update(told(args, hub_url))
        answer = Hub(hub_url).post("servers/register", registration(config, args.register))
    except AgentError as error:
        log.error("not registered: %s", error)
        raise
    config.update(server_id=answer["id"], name=answer["name"], api_key=answer["api_key"])
    save_config(config_path, config)
    start = ["python", sys.argv[0]] + (["--config", str(config_path)] if args.config else [])
    log.info("registered with %s as %s", hub_url, printable(answer["name"]))
    print(
        f"This server is registered as {printable(answer['name'])} in the project "
        f"{printable(answer.get('project_name') or answer.get('project_id'))}. "
        f"Start its agent with: {shlex.join(start)}"
    )
    return 0


def told(args, hub_url):
    """The config keys the command line sets; what was not said is kept as it is."""
    said = {
        "hub_url": hub_url.rstrip("/"),
        "name": args.name,
        "state_dir": str(Path(args.state).expanduser().absolute()) if args.state else None,
        "repos": parse_repos(args.repo) or None,
        "languages": args.language,
        "frameworks": args.framework,
        "capabilities": args.capability,
        "slots": args.slots,
    }
    return {name: value for name, value in said.items() if value is not None}


def registration(config, token):
    return {
        "name": config.get("name") or socket.gethostname(),
        "hostname": socket.gethostname(),
        "ip": "0.0.0.0",  # the hub takes the address it sees
        "os": platform.system().lower(),
        "repos": repos_of(config),
        "system_info": system_info(),
        "registration_token": token,
        "machine_id": machine_id(),
        "mac_address": mac_address(),
        "capabilities": declared(config),
    }


def config_path_of(args):
    return Path(args.config or default_config_path()).expanduser().absolute()


def state_dir_of(args, config):
    chosen = args.state or config.get("state_dir")
    return Path(chosen).expanduser().absolute() if chosen else default_state_dir()


def run(args):
    """Be the agent until a signal ends it."""
    config_path = config_path_of(args)
    config = load_config(config_path)
    if not config.get("api_key"):
        raise AgentError(
            f"This server is not registered: {config_path} holds no key. Make a registration "
            "token on the hub and run: python agent.py --register TOKEN"
        )
    declared(config)  # said now, not at every connection
    state_dir = make_private_dir(state_dir_of(args, config))
    with hold(state_dir):
        log_to(state_dir, args.verbose, terminal=not args.quiet)
        serve(config, state_dir)
    return 0


def signal_pipe(*numbers):
    """A descriptor that can be read once one of these signals has come. Waiting on a lock instead
    misses one that comes just before the wait, until the next."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reader


def serve(config, state_dir):
    stop = threading.Event()
    asked_to_stop = signal_pipe(signal.SIGTERM, signal.SIGINT)
    hub = Hub(config["hub_url"], config["api_key"])
    agent = Agent(config, state_dir, settings_of(config), stop)
    agent.recover()
    line = Line(hub, agent)
    line.start()
    steps = (
        *(Heartbeat(hub, agent, line).step, agent.run_command, agent.serve_terminals),
        *(agent.watch, agent.send_logs, agent.send_screens, agent.serve_hooks, agent.detect),
    )
    for step in steps:
        Loop(step, stop).start()
    os.read(asked_to_stop, 1)
    stop.set()
    line.end()
    log.info("stopped; sessions in tmux go on")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="agent.py",
        description="The Orchestratia agent of a development server.",
        epilog="Settings of the config file: "
        + "; ".join(f"{name} ({default}): {text}" for name, default, text in SETTINGS),
    )
    add = parser.add_argument
    add("--register", metavar="TOKEN", help="register this server, then exit")
    add("--config", metavar="FILE", help="default: ~/.config/orchestratia/config.yaml")
    add("--state", metavar="DIR", help="default: ~/.local/state/orchestratia")
    add("--hub", metavar="URL", help="with --register: the hub, if not the token's")
    add("--name", help="with --register: the server's name (default: the host's)")
    add("--repo", metavar="NAME=PATH", action="append", default=[], help="with --register")
    add("--language", action="append", help="with --register; may be given again")
    add("--framework", action="append", help="with --register; may be given again")
    add("--capability", action="append", help="with --register; may be given again")
    add("--slots", type=int, help="with --register: tasks at once (default: processors + 2)")
    add("--stop", action="store_true", help="end the agent that is running; its sessions go on")
    add("--doctor", action="store_true", help="check what an agent needs, and say what to do")
    add("--json", action="store_true", help="with --doctor: for programs")
    add("--quiet", action="store_true", help="log to the state directory only")
    add("-v", "--verbose", action="store_true", help="log more")
    add("--exec-session", metavar="FILE", help=argparse.SUPPRESS)
    add("--hook", nargs=3, metavar=("DIR", "LAUNCH", "EVENT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.exec_session:
        return exec_session(args.exec_session)
    if args.hook:
        return run_hook(*args.hook)
    try:
        if args.stop:
            return stop_running(args)
        if args.doctor:
            return doctor(args)
        return register(args) if args.register is not None else run(args)
    except AgentError as error:
        print(f"agent.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
