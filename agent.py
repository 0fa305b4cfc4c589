"""The agent: the daemon on a development server.

It keeps sessions (terminals in tmux) alive, runs workers in them and talks to the hub by
protocol 2, here over the long poll. One file that imports nothing of ours.

    python agent.py --register TOKEN      once
    python agent.py                       from then on

Threads, each with one `step()`: heartbeat, the two lanes of the poll, commands, keystrokes,
monitor, log, screens. What must not be lost goes through `Store` (on disk before it is sent or
acknowledged); `Outgoing` is all that waits to be sent. A carrier needs only `Agent.opening()`,
`Agent.received(frames)` and `Outgoing.take()`, so another one can stand beside the poll.

Errors:  AgentError (exit 1)
         +- TmuxError
         +- HubError            the hub answered with an error
            +- HubUnreachable   it did not answer, or not sensibly (exit 3)

`requests` and `yaml` are imported where they are used: this file is also the first program of
every session (`--exec-session`), which should start fast and without site-packages.
"""

import argparse
import base64
import binascii
import collections
import contextlib
import dataclasses
import fcntl
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
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
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
    ("poll_wait_s", 25, "how long the hub may hold an empty poll before it answers"),
    ("backoff_max_s", 30, "longest pause before a failed call is repeated"),
    ("refused_max_s", 60, "longest pause after the hub refused the server's key"),
    ("superseded_s", 30, "pause after a newer agent of the same server has connected"),
    ("resend_s", 10, "unacknowledged reports and output are sent again after this"),
    ("monitor_s", 0.2, "how often sessions are looked at"),
    ("log_look_s", 0.05, "how often session logs are looked at for new bytes"),
    ("log_pause_s", 0.1, "least time between two blocks of a log that is being flooded"),
    ("screen_s", 5, "how often a changed screen is sent"),
    ("close_grace_s", 3, "time a program has to end by itself when its session is closed"),
    ("typing_limit_s", 2, "longest wait for typed text to appear before it is submitted"),
)

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
MEND_PAUSE_S = 5  # a pipe that dies at once (disk full) is not mended at every look
ERROR_LINES = 20
NO_SCREEN = (0, None, -math.inf)  # size of the log, lines, time

log = logging.getLogger("agent")


# ---------------------------------------------------------------------------- errors


class AgentError(Exception):
    """Something a person can act on; the message is one sentence: state, cause, remedy."""

    exit_code = 1


class TmuxError(AgentError):
    """tmux refused or failed."""


class HubError(AgentError):
    """The hub answered with an error."""

    def __init__(self, sentence, status=0, code=""):
        super().__init__(printable(sentence))
        self.status = status
        self.code = code


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


def now_iso():
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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


def settings_of(config):
    """The settings, in seconds, with what the config file says instead of the defaults."""
    settings = {name: config.get(name, default) for name, default, _ in SETTINGS}
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise AgentError(f"The setting {name} in the config file is not a number of seconds.")
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
            raise HubError(detail, response.status_code, answer.get("code", ""))
        return answer


class Backoff:
    """Pauses 1, 2, 4 … up to `most` seconds, each shortened by chance so that agents that
    lost the hub together do not come back together."""

    def __init__(self, most):
        self.most = most
        self.reset()

    def reset(self):
        self.failures = 0

    def pause(self):
        longest = min(2**self.failures, self.most)
        self.failures = min(self.failures + 1, 10)
        return longest * random.uniform(0.5, 1)


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
    closing: bool = False
    cancelled: bool = False
    exit_code: int | None = None
    log_end: int | None = None
    closed_spool: int | None = None

    def __str__(self):
        if self.task_id:
            return f"task {self.task_id[:8]} '{printable(self.title, 60)}' in {self.tmux_name}"
        return f"session {self.tmux_name}"


class Store:
    """What survives kill -9: spool, journal of commands, sessions. Every write is one
    transaction that is on the disk when the call returns (synchronous=FULL)."""

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
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(self.SCHEMA)
        if self.get("spool_id") is None:
            self.put("spool_id", str(uuid.uuid4()))

    def close(self):
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self):
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, sql, *values):
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # -- single values

    def get(self, key, default=None):
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else default

    def put(self, key, value):
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # -- spool

    def spool(self, *frames):
        with self._transaction() as db:
            for frame in frames:
                self._append(db, frame)

    @staticmethod
    def _append(db, frame):
        text = json.dumps(frame, allow_nan=False)
        return db.execute("INSERT INTO spool (frame) VALUES (?)", (text,)).lastrowid

    def spooled_after(self, n, limit=SPOOL_BATCH):
        rows = self._rows("SELECT n, frame FROM spool WHERE n > ? ORDER BY n LIMIT ?", n, limit)
        sizes = itertools.accumulate(len(frame) for _, frame in rows)
        fitting = sum(size <= SPOOL_BYTES for size in sizes)
        return [{**json.loads(frame), "spool": n} for n, frame in rows[: max(1, fitting)]]

    def spool_first(self):
        """The lowest number still held, or the next one if all are acknowledged."""
        held = self._rows("SELECT min(n) FROM spool")[0][0]
        last = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'spool'")
        return held or (last[0][0] + 1 if last else 1)

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

    def done(self, epoch, command_id):
        # The frame goes: it may hold a session's key.
        self._mark(epoch, command_id, "UPDATE journal SET state = 'done', frame = NULL")

    def _mark(self, epoch, command_id, update):
        with self._transaction() as db:
            db.execute(f"{update} WHERE epoch = ? AND id = ?", (epoch, command_id))

    def unfinished(self):
        """(epoch, frame, begun) of commands received and not done, oldest first."""
        rows = self._rows(
            "SELECT epoch, frame, state FROM journal WHERE state != 'done' ORDER BY n"
        )
        return [(epoch, json.loads(frame), state == "begun") for epoch, frame, state in rows]

    # -- sessions

    def sessions(self):
        return [Session(**json.loads(row)) for (row,) in self._rows("SELECT row FROM session")]

    def save(self, session, *frames):
        """Write the session and spool what is to be said of it, both or neither."""
        with self._transaction() as db:
            for frame in frames:
                n = self._append(db, frame)
                if frame["type"] == "session_closed":
                    session.closed_spool = n
            row = json.dumps(dataclasses.asdict(session))
            db.execute("INSERT OR REPLACE INTO session VALUES (?, ?)", (session.session_id, row))

    def forget(self, session_id):
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE id = ?", (session_id,))


# ---------------------------------------------------------------------------- tmux


@dataclasses.dataclass
class Pane:
    pane_id: str
    dead: bool
    exit_code: int | None
    pid: int
    piped: bool
    server_pid: int


class Tmux:
    """tmux on a socket of the agent's own; every call is an argument list."""

    PANE = (
        "#{session_name} #{pane_id} #{pane_dead} #{pane_pid} #{pane_pipe} #{pid}"
        " [#{pane_dead_status}] [#{pane_dead_signal}]"
    )
    NO_SERVER = ("no server running on", "error connecting to")

    def __init__(self, socket_name):
        self.command = ["tmux", "-u", "-L", socket_name, "-f", "/dev/null"]

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
        if answer.returncode:
            raise TmuxError(printable(answer.stderr.decode("utf-8", "replace")) or "tmux failed")
        return answer.stdout.decode("utf-8", "replace")

    def version(self):
        return self.run("-V").strip().removeprefix("tmux ")

    def new_session(self, name, argv, log_path, cols, rows):
        """Start argv in a new session; returns (pane id, pid). One call: with the pipe or
        remain-on-exit set in a second one, a fast program's first lines or exit are lost."""
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
        try:
            lines = self.run("list-panes", "-a", "-F", self.PANE).splitlines()
        except TmuxError as error:
            if str(error).startswith(self.NO_SERVER):
                return {}
            raise
        panes = {}
        for line in lines:
            name, pane = self._pane(line)
            if name.startswith("orc-"):
                panes.setdefault(name, pane)
        return panes

    @staticmethod
    def _pane(line):
        name, pane_id, dead, pid, piped, server_pid, status, death = line.rsplit(" ", 7)
        code = exit_code_of(status.strip("[]"), death.strip("[]"))
        return name, Pane(pane_id, dead == "1", code, int(pid), piped == "1", int(server_pid))

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
        for start in range(0, len(data), INPUT_CHUNK):
            numbers = [f"{byte:02x}" for byte in data[start : start + INPUT_CHUNK]]
            self.run("send-keys", "-t", f"={name}:", "-H", *numbers)

    def resize(self, name, cols, rows):
        self.run("resize-window", "-t", f"={name}:", "-x", str(cols), "-y", str(rows))

    def screen(self, name, *options):
        return self.run("capture-pane", "-p", *options, "-t", f"={name}:").rstrip("\n").split("\n")

    def kill_session(self, name):
        with contextlib.suppress(TmuxError):  # it is gone, which is what we want
            self.run("kill-session", "-t", f"={name}")


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


# ---------------------------------------------------------------------------- inside a session


def exec_session(path):
    """The first program of a session's terminal: runs what the 0600 file says, so that
    neither environment nor arguments stand on a command line.

    It stays as the parent, because tmux 3.3 can drop the last bytes of a program whose end it
    sees before its output: the terminal is kept open until the log has stopped growing.
    """
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    os.environ.update(order["env"])
    signal.pthread_sigmask(signal.SIG_BLOCK, LEADER_SIGNALS)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LEADER_SIGNALS)
        run_program(order["argv"], order["cwd"])
    status = lead(child)
    wait_until_still(order["log"])
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


LEADER_SIGNALS = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM}


def lead(child):
    """Wait for the child as the leader of its terminal; returns its status.

    The kernel tells only the leader that a terminal has gone, so that is passed on; keys like
    Ctrl-C reach the child by themselves."""
    for number in LEADER_SIGNALS:
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _: signal_process(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEADER_SIGNALS)
    _, status = os.waitpid(child, 0)
    for number in LEADER_SIGNALS:  # the child's number may soon be another process's
        signal.signal(number, signal.SIG_IGN)
    return status


def run_program(argv, cwd):
    """Become the program; its end is the exit code a shell would give."""
    # Python changes the effect of these, programs expect the usual one.
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
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


@dataclasses.dataclass
class Tail:
    """How far one session's log has been sent; `acked` is None until the hub has told."""

    path: Path
    acked: int | None
    sent: int = 0
    sent_at: float = 0.0

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

    def follow(self, session_id, path, acked=None):
        with self._lock:
            self._tails[session_id] = Tail(path, acked, acked or 0)

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
            tail.sent = max(tail.sent, offset)

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
        if tail.sent > tail.acked and now - tail.sent_at > self.settings.resend_s:
            tail.sent = tail.acked
        return tail.sent < min(tail.size(), tail.acked + WINDOW_BYTES)

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
        most = min(most, tail.acked + WINDOW_BYTES - tail.sent)
        try:
            with tail.path.open("rb") as file:
                file.seek(tail.sent)
                data = file.read(most)
        except OSError:
            return []  # somebody has deleted it; the other sessions go on
        at = now_iso()
        blocks = [
            {
                "type": "session_log",
                "session_id": session_id,
                "offset": tail.sent + start,
                "data": base64.b64encode(data[start : start + BLOCK_BYTES]).decode(),
                "at": at,
            }
            for start in range(0, len(data), BLOCK_BYTES)
        ]
        tail.sent += len(data)
        return blocks


class Outgoing:
    """All that waits to be sent, in the order: acknowledgements, spool, words of the moment,
    logs. `wake` is set when there is something."""

    def __init__(self, store, logs, settings):
        self.store = store
        self.logs = logs
        self.settings = settings
        self.wake = threading.Event()
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
        self.logs.rewind()

    def due(self, now):
        return self._spool_overdue(now) or self.logs.due(now)

    def _spool_overdue(self, now):
        late = now - self._spool_sent_at > self.settings.resend_s
        return late and self._spool_sent >= self.store.spool_first()

    def take(self, now):
        with self._lock:
            acks, self._acks = self._acks, []
            moments = list(self._moments)
            self._moments.clear()
            frames = [{"type": "ack", "ids": acks}] if acks else []
            return frames + self._take_spool(now) + moments + self.logs.take(now)

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

    def __init__(self, config, state_dir, settings, store, outgoing, tmux):
        self.config = config
        self.settings = settings
        self.store = store
        self.outgoing = outgoing
        self.logs = outgoing.logs
        self.tmux = tmux
        self.root = make_private_dir(state_dir / "sessions")
        self.bin = install_cli(make_private_dir(state_dir / "bin"))
        self.profiles = parse_profiles(store.get("profiles", {}))
        self.lock = threading.RLock()
        self.all = {session.session_id: session for session in store.sessions()}
        self._typing = collections.defaultdict(threading.Lock)
        self._sizes = {}  # session id: log size at the last look at a dead pane
        self._deadlines = {}  # session id: when a closing one is killed
        self._hung_up = {}  # session id: how many programs were told to end
        self._mend_at = {}  # session id: earliest next mending of its pipe
        self._screens = {}  # session id: (size of log, lines, time) of the last screen
        self._screen_due = {}  # session id: when to look although the interval is not over
        self._memories = (
            *(self._sizes, self._deadlines, self._hung_up, self._mend_at),
            *(self._screens, self._screen_due),
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

    def directory(self, session):
        return self.root / session.session_id

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
            existing = self.all.get(order["session_id"]) or self.live_of_attempt(
                order.get("task_id"), order.get("attempt")
            )
            if existing:
                return self._say_started_again(existing)
            try:
                self._start(order, task)
            except (AgentError, OSError, ValueError, TypeError, KeyError) as error:
                self._say_not_started(order, error)

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
        argv = program_of(order, task, profile)
        session = Session(
            session_id,
            f"orc-{session_id[:12]}",
            profile=order.get("profile"),
            ends_task=bool(order.get("task_id") and profile.get("completes_on_exit")),
            task_id=order.get("task_id"),
            attempt=order.get("attempt"),
            title=(task or {}).get("title") or order.get("name") or "",
            working_directory=self._directory_of(order),
        )
        self._write_files(session, order, task, argv)
        self.store.save(session)
        self.all[session_id] = session
        try:
            self._launch(session, order)
        except TmuxError:
            self._forget(session)
            raise
        self._say_live(session)

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

    def _write_files(self, session, order, task, argv):
        directory = make_private_dir(self.directory(session))
        os.close(open_private(self.log_path(session), os.O_CREAT | os.O_APPEND | os.O_WRONLY))
        if task is not None:
            write_private(directory / "task.json", json.dumps(task, indent=2))
        run = {
            "argv": argv,
            "env": self._environment(session, order, task),
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
        argv = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--exec-session", str(run)]
        size = int(order.get("cols") or 120), int(order.get("rows") or 40)
        session.pane_id, pid = self.tmux.new_session(
            session.tmux_name, argv, self.log_path(session), *size
        )
        session.pid = int(pid)

    def _say_live(self, session):
        session.state = "live"
        frames = [self._started(session)]
        if session.ends_task:
            frames.append(self._report(session, outcome="started"))
        self.store.save(session, *frames)
        self.logs.follow(session.session_id, self.log_path(session), acked=0)
        self.outgoing.wake.set()
        log.info("%s started", session)

    def _started(self, session):
        return {
            "type": "session_started",
            "session_id": session.session_id,
            "tmux_name": session.tmux_name,
            "pid": session.pid,
            "working_directory": session.working_directory,
            "task_id": session.task_id,
            "attempt": session.attempt,
        }

    @staticmethod
    def _report(session, **said):
        return {
            "type": "task_report",
            "task_id": session.task_id,
            "attempt": session.attempt,
            "session_id": session.session_id,
            **said,
        }

    # -- taking up again after a restart

    def recover(self):
        """Compare what we wrote down with what tmux has, once, before connecting."""
        panes = self.tmux.panes()
        for session in list(self.all.values()):
            self.logs.follow(session.session_id, self.log_path(session))
            self.RECOVERIES[session.state](self, session, panes.get(session.tmux_name))

    def _recover_starting(self, session, pane):
        if pane is None:
            self._forget(session)  # its command is not done and runs again
        else:
            session.pane_id, session.pid = pane.pane_id, pane.pid
            self._say_live(session)

    def _recover_live(self, session, pane):
        if pane is None:
            return self._finish(session, None)
        log.info("%s found again", session)
        self.outgoing.spool(
            {
                "type": "session_recovered",
                "session_id": session.session_id,
                "tmux_name": session.tmux_name,
            }
        )

    def _recover_ended(self, session, pane):
        if pane is not None:
            self.tmux.kill_session(session.tmux_name)

    RECOVERIES = {
        "starting": _recover_starting,
        "live": _recover_live,
        "ended": _recover_ended,
    }

    # -- agreeing with the hub

    def listed(self):
        """The sessions for the sync frame: ours, then tmux sessions we know nothing of."""
        panes = self.tmux.panes()
        with self.lock:
            ours = [self._listed(session) for session in self.all.values()]
            known = {session.tmux_name for session in self.all.values()}
        strangers = [
            {"session_id": None, "tmux_name": name, "pid": pane.pid, "alive": not pane.dead}
            for name, pane in panes.items()
            if name not in known
        ]
        return ours + strangers

    def _listed(self, session):
        return {
            "session_id": session.session_id,
            "tmux_name": session.tmux_name,
            "pid": session.pid,
            "alive": session.state != "ended",
            "exit_code": session.exit_code,
            "working_directory": session.working_directory,
            "profile": session.profile,
            "task_id": session.task_id,
            "attempt": session.attempt,
            "activity": "no_signal",
            "log_start": 0,
            "log_end": self.log_size(session),
        }

    def agree(self, answer, listed):
        """Do what sync_ok says of the sessions that were listed."""
        for entry in answer.get("sessions", []):
            session = self.all.get(entry.get("session_id"))
            if session is not None:
                self.AGREEMENTS[entry["action"]](self, session, entry)
        adopted = {entry["tmux_name"]: entry["session_id"] for entry in answer.get("adopt", [])}
        for entry in listed:
            if entry["session_id"] is None:
                self._adopt_or_close(entry, adopted.get(entry["tmux_name"]))

    def _keep(self, session, entry):
        self.logs.acknowledge(session.session_id, entry.get("log_acked") or 0)
        self.sweep(session)

    def _drop(self, session, _entry):
        if session.state == "live":
            self.close(session, force=True, cancelled=True)
        else:
            self._forget(session)

    AGREEMENTS = {"keep": _keep, "close": _drop}

    def _adopt_or_close(self, entry, session_id):
        if session_id is None:
            log.warning("%s is closed: the hub does not know it", entry["tmux_name"])
            return self.tmux.kill_session(entry["tmux_name"])
        with self.lock:
            session = Session(valid_session_id(session_id), entry["tmux_name"], pid=entry["pid"])
            session.pane_id = self.tmux.pane_state(session.tmux_name).pane_id
            make_private_dir(self.directory(session))
            os.close(open_private(self.log_path(session), os.O_CREAT | os.O_WRONLY))
            session.state = "live"
            self.store.save(session)
            self.all[session_id] = session
        self.logs.follow(session_id, self.log_path(session), acked=0)
        self._mend(session, "the session was adopted; what it printed before is not known")
        log.info("%s adopted", session)

    # -- typing

    def type(self, session_id, text):
        """Type text and submit it. Raises AgentError, and then nothing was submitted."""
        session = self.get_live(session_id)
        text = typeable(text)
        with self._typing[session_id]:
            before = self._ready_for_typing(session)
            if text:
                self.tmux.paste(session.tmux_name, text)
                self._wait_for_text(session, before)
            # A byte, not the key's name: "Enter" is not submitted by every tmux.
            self.tmux.send(session.tmux_name, b"\r")
        self._look_soon(session)

    def _ready_for_typing(self, session):
        state = self._own_pane(session)
        if state.in_mode:
            self.tmux.leave_mode(session.tmux_name)
            state = self._own_pane(session)
        if state.in_mode:
            raise AgentError("The session is in copy mode and does not leave it.")
        return state.cursor

    def _own_pane(self, session):
        state = self.tmux.pane_state(session.tmux_name)
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
        session = self.get_live(session_id)
        with self._typing[session_id]:
            self._own_pane(session)
            self.tmux.send(session.tmux_name, data)
        self._look_soon(session)

    def resize(self, session_id, cols, rows):
        session = self.get_live(session_id)
        self.tmux.resize(session.tmux_name, max(1, min(cols, 1000)), max(1, min(rows, 1000)))
        self._look_soon(session)

    def scrollback(self, session_id):
        return self.tmux.screen(self.get_live(session_id).tmux_name, "-S", "-")

    # -- watching

    def look(self, now):
        """One look of the monitor at every live session."""
        live = self.live()
        if not live:
            return
        panes = self.tmux.panes()
        for session in live:
            self._look_at(session, panes.get(session.tmux_name), now)

    def _look_at(self, session, pane, now):
        if pane is None or pane.pane_id != session.pane_id:
            self._finish(session, None)
        elif pane.dead:
            self._settle(session, pane)
        elif session.closing:
            self._press(session, pane, now)
        elif not pane.piped and now >= self._mend_at.get(session.session_id, 0):
            self._mend_at[session.session_id] = now + MEND_PAUSE_S
            self._mend(session, "the recording of the output had stopped")

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
            session.exit_code = exit_code
            session.log_end = self.log_size(session)
            frames = [self._outcome(session)] if self._owes_outcome(session) else []
            session.state = "ended"
            self.store.save(session, *frames, self._closed(session))
        self.tmux.kill_session(session.tmux_name)
        for memory in self._memories:
            memory.pop(session.session_id, None)
        self.outgoing.wake.set()
        end = "is gone" if exit_code is None else f"ended with exit code {exit_code}"
        log.info("%s %s", session, end)

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
                return self._report(session, outcome="complete", result=result, implicit=implicit)
            except AgentError as error:
                return self._report(session, outcome="fail", error=str(error))
        tail = last_lines(read_end(self.log_path(session)))
        error = f"{exit_sentence(session.exit_code)}\n{tail}".strip()
        return self._report(session, outcome="fail", error=error, implicit=True)

    def _mend(self, session, why):
        gap = {
            "type": "session_gap",
            "session_id": session.session_id,
            "from": self.log_size(session),
            "to": None,
            "why": why,
        }
        self.tmux.mend_pipe(session.tmux_name, self.log_path(session))
        self.outgoing.spool(gap)
        log.warning("%s: %s", session, why)

    # -- closing

    def close(self, session, force=False, cancelled=False):
        """Ask the program to end (or make it); the monitor sees the end and reports it."""
        with self.lock:
            session.closing = True
            session.cancelled = session.cancelled or cancelled
            self.store.save(session)
            grace = 0 if force else self.settings.close_grace_s
            self._deadlines[session.session_id] = time.monotonic() + grace

    def _press(self, session, pane, now):
        """Hang up a closing session once; past its grace kill it, programs before the terminal."""
        late = now - self._deadlines.setdefault(session.session_id, now)
        if late >= 0:
            signal_programs(pane.pid, signal.SIGKILL)
        elif not self._hung_up.get(session.session_id):
            # None are there yet if the session was closed while it was being started.
            self._hung_up[session.session_id] = signal_programs(pane.pid, signal.SIGHUP)
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
            self._forget(session)

    def sweep_all(self):
        for session in list(self.all.values()):
            self.sweep(session)

    def _forget(self, session):
        with self.lock:
            self.all.pop(session.session_id, None)
            self.store.forget(session.session_id)
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
            lines = self.tmux.screen(session.tmux_name)
        except TmuxError:
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
        if isinstance(profile, dict):
            profiles[name] = profile
    return profiles


def program_of(order, task, profile):
    """The argument list a session runs. Raises AgentError if there is none."""
    command = order.get("command") or (task or {}).get("command")
    if profile.get("start") not in ("shell", "task_command"):
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


def install_cli(directory):
    """Put `orchestratia` in the directory if the command line lies beside this file."""
    cli = Path(__file__).resolve().with_name("cli.py")
    if cli.exists():
        wrapper = directory / "orchestratia"
        words = shlex.join([sys.executable, str(cli)])
        write_private(wrapper, f'#!/bin/sh\nexec {words} "$@"\n')
        wrapper.chmod(0o700)
    return directory


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
            return file.read(size)
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


# ---------------------------------------------------------------------------- agent


# Typed into whatever runs there, perhaps a shell: fixed words and an id, nothing anybody wrote.
NOTICES = {
    "task_assigned": "New task for you. Run: orchestratia task view {}",
    "task_updated": "Your task was changed. Run: orchestratia task view {}",
    "task_cancelled": "Your task was cancelled, stop working on it: {}",
    "task_status_update": "A task you ordered has ended. Run: orchestratia task view {}",
}


def notice(kind, task_id):
    """The line that tells a session of a task. Raises AgentError unless the id is one."""
    return NOTICES[kind].format(valid_id(task_id, "a task"))


class Agent:
    """What a frame of the hub does here, and what the agent says of itself."""

    def __init__(self, config, state_dir, settings, stop):
        self.config = config
        self.settings = settings
        self.stop = stop
        self.instance = str(uuid.uuid4())
        self.store = Store(state_dir / "state.db")
        self.tmux = Tmux(f"orc-{config['server_id'][:8]}")
        self.outgoing = Outgoing(self.store, Logs(settings), settings)
        self.sessions = Sessions(config, state_dir, settings, self.store, self.outgoing, self.tmux)
        self.commands = queue.SimpleQueue()  # frames with the epoch they came in
        self.keys = queue.SimpleQueue()
        self.epoch = ""
        self._listed = []

    def recover(self):
        """Take up what the last run left: sessions first, then unfinished commands."""
        self.sessions.recover()
        for epoch, frame, begun in self.store.unfinished():
            if begun:
                self._not_delivered(frame, "delivery_unknown", "the agent ended while typing")
                self.store.done(epoch, frame["id"])
            else:
                self.commands.put({**frame, "epoch": epoch})

    # -- for the carrier

    def opening(self):
        """The first frames of a connection; what the last one left unsaid is said again."""
        self.outgoing.rewind()
        self._listed = self.sessions.listed()
        auth = {
            "type": "auth",
            "protocol": PROTOCOL,
            "agent_version": VERSION,
            "instance": self.instance,
            "spool_id": self.store.get("spool_id"),
            "spool_first": self.store.spool_first(),
            "features": [],
        }
        sync = {
            "type": "sync",
            "instance": self.instance,
            "sessions": self._listed,
            "capabilities": self._capabilities(),
            "profiles_etag": self.store.get("profiles_etag"),
        }
        return [auth, sync]

    def _capabilities(self):
        profiles = self.sessions.profiles
        return {
            "repos": repos_of(self.config),
            **declared(self.config),
            "profiles": {name: profile.get("version") for name, profile in profiles.items()},
            "os": platform.system().lower(),
            "tmux": self.tmux.version(),
        }

    def received(self, frames):
        """Take the hub's frames: commands are on the disk before they are acknowledged."""
        commands = []
        for frame in frames:
            if "id" in frame:
                commands.append(frame)
            elif frame.get("type") in self.AT_ONCE:
                self._carry_out(self.AT_ONCE, frame)
            else:
                self.keys.put(frame)
        if commands:
            new = self.store.receive(self.epoch, commands)
            self.outgoing.acknowledge([frame["id"] for frame in commands])
            for frame in new:
                self.commands.put({**frame, "epoch": self.epoch})

    def _carry_out(self, table, frame):
        """The boundary of all handlers: one bad frame must not hold up the others."""
        handler = table.get(frame.get("type"))
        if handler is None:
            return log.debug("ignored: %s", printable(frame.get("type"), 60))
        try:
            handler(self, frame)
        except Exception:
            log.exception("a frame of type %s failed", frame["type"])

    # -- steps of threads

    def run_command(self):
        frame = self.commands.get()
        self._carry_out(self.COMMANDS, frame)
        self.store.done(frame["epoch"], frame["id"])

    def press_keys(self):
        self._carry_out(self.MOMENTS, self.keys.get())

    def watch(self):
        self.sessions.look(time.monotonic())
        self.stop.wait(self.settings.monitor_s)

    def send_logs(self):
        if self.outgoing.due(time.monotonic()):
            self.outgoing.wake.set()
        self.stop.wait(self.settings.log_look_s)

    def send_screens(self):
        self.sessions.send_screens(time.monotonic())
        self.stop.wait(self.settings.monitor_s)

    # -- at once

    def _auth_ok(self, frame):
        self.epoch = frame["hub_epoch"]
        name = printable(frame.get("server_name"))
        log.info("connected to %s as %s", self.config["hub_url"], name)

    def _sync_ok(self, frame):
        self._take_profiles(frame)
        self.sessions.agree(frame, self._listed)

    def _take_profiles(self, frame):
        if isinstance(frame.get("profiles"), dict):
            self.store.put("profiles", frame["profiles"])
            self.sessions.profiles = parse_profiles(frame["profiles"])
            self.store.put("profiles_etag", frame.get("profiles_etag"))

    def _spool_ack(self, frame):
        self.store.trim_spool(frame["upto"])
        self.sessions.sweep_all()

    def _log_ack(self, frame):
        self.outgoing.logs.acknowledge(frame["session_id"], frame["offset"])
        session = self.sessions.all.get(frame["session_id"])
        if session is not None:
            self.sessions.sweep(session)

    AT_ONCE = {
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
            self._notify({**frame, "task_id": task["id"]})

    def _task_cancelled(self, frame):
        session = self.sessions.all.get(frame["session_id"])
        if session is None or session.state != "live":
            return
        if session.ends_task and session.task_id == frame["task_id"]:
            self.sessions.close(session, cancelled=True)
        else:
            self._notify(frame)

    def _task_updated(self, frame):
        session = self.sessions.all.get(frame["session_id"])
        if session is not None and not session.ends_task:
            self._notify(frame)

    def _notify(self, frame):
        """Type a line about a task; a crash from here on leaves it unknown, never repeated."""
        self.store.begin(frame["epoch"], frame["id"])
        try:
            self.sessions.type(frame["session_id"], notice(frame["type"], frame["task_id"]))
        except AgentError as error:
            self._not_delivered(frame, "not_delivered", str(error))

    def _not_delivered(self, frame, kind, why):
        log.warning("the notice of %s was not typed: %s", frame["type"], why)
        self.outgoing.spool(
            {
                "type": "agent_event",
                "kind": kind,
                "command_id": frame["id"],
                "command": frame["type"],
                "session_id": frame.get("session_id"),
                "task_id": frame.get("task_id") or (frame.get("task") or {}).get("id"),
                "why": why,
            }
        )

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
        "task_updated": _task_updated,
        "task_status_update": _notify,
        "session_close": _session_close,
        "profiles_changed": _profiles_changed,
    }

    # -- for the moment

    def _session_input(self, frame):
        data = base64.b64decode(frame["data"])
        self._try(self.sessions.input, frame["session_id"], data)

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
        "session_type": _session_type,
        "capture_scrollback": _capture_scrollback,
    }


# ---------------------------------------------------------------------------- carriers


class PollCarrier:
    """Protocol 2 over POST server/poll: one call waits for the hub, another carries frames.

    A call whose answer is lost is repeated with its number, so that it has one effect. When
    the hub does not know us, both lanes let go of their calls and the carrying one syncs."""

    def __init__(self, hub, agent):
        self.hub = hub
        self.agent = agent
        self.settings = agent.settings
        self.stop = agent.stop
        self.wake = agent.outgoing.wake
        self.synced = threading.Event()
        self.connection = 0  # rises with each sync, so that a lane knows its call is stale
        self._lock = threading.Lock()
        self._seq = 0
        self._down = False
        self._refusals = Backoff(self.settings.refused_max_s)

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
                self.agent.received(self._post(self._next_seq(), frames, 0, limit_s))
            except HubError as error:
                log.info("the last reports stay on the disk: %s", error)

    # -- calls

    def _sync(self):
        with self._lock:
            self.connection += 1
        if self._call(self.agent.opening(), 0, syncing=True):
            self.synced.set()
            self.wake.set()

    def _call(self, frames, wait, syncing=False):
        """Make a call until it is answered (True) or no longer wanted (False)."""
        connection, seq = self.connection, self._next_seq()
        backoff = Backoff(self.settings.backoff_max_s)
        while not self.stop.is_set() and self.connection == connection:
            try:
                answer = self._post(seq, frames, wait, wait + 15)
            except HubError as error:
                self._report(error)
                if not retryable(error):
                    self._start_afresh(error, connection, syncing)
                    return False
                self.stop.wait(backoff.pause())
                continue
            if self.connection == connection:
                self._up()
                self.agent.received(answer)
                return True
        return False

    def _start_afresh(self, error, connection, syncing):
        """The hub refused: this call is given up, and the next one syncs, after a pause."""
        with self._lock:
            if connection == self.connection:
                self.synced.clear()
        if error.code == "superseded":
            self.stop.wait(self.settings.superseded_s)
        elif error.code != "sync_required" or syncing:
            self.stop.wait(self._refusals.pause())

    def _post(self, seq, frames, wait, timeout):
        body = {"instance": self.agent.instance, "seq": seq, "wait": wait, "frames": frames}
        return self.hub.post("server/poll", body, timeout)["frames"]

    def _next_seq(self):
        with self._lock:
            self._seq += 1
            return self._seq

    def _report(self, error):
        """Say once that the hub is away; a refusal is said each time."""
        if error.code == "sync_required":
            log.info("the hub asks for a new start of the connection")
        elif not retryable(error):
            log.error("%s", error)
        elif not self._down:
            log.warning("%s Trying again; sessions go on.", error)
            self._down = True

    def _up(self):
        if self._down:
            log.info("the hub answers again")
        self._down = False
        self._refusals.reset()


class Heartbeat:
    """A sign of life of its own, so that nothing else can make the server look dead."""

    def __init__(self, hub, stop, interval_s):
        self.hub = hub
        self.stop = stop
        self.interval_s = interval_s

    def step(self):
        try:
            answer = self.hub.post("servers/heartbeat", {"system_info": system_info()})
            self.interval_s = float(answer.get("heartbeat_s") or self.interval_s)
        except HubError as error:
            log.debug("no heartbeat: %s", error)  # the carrier says the same, once
        self.stop.wait(self.interval_s)


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
            except Exception:
                log.exception("%s failed", self.name)
                self.stop.wait(1)


# ---------------------------------------------------------------------------- commands


class PrivateLog(logging.handlers.RotatingFileHandler):
    """agent.log and its older parts, readable by the owner only."""

    def _open(self):
        return open(self.baseFilename, "a", encoding="utf-8", opener=open_private)


def log_to(state_dir, verbose=False, terminal=True):
    form = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handlers = [PrivateLog(state_dir / "agent.log", maxBytes=KB * KB, backupCount=3)]
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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AgentError(
                f"An agent already runs with the state directory {state_dir}: stop that one "
                "first, or give this one its own --config and --state."
            ) from error
        yield


def register(args):
    """Trade the token for a key and write the config file."""
    config_path = Path(args.config or default_config_path()).expanduser().absolute()
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


def state_dir_of(args, config):
    chosen = args.state or config.get("state_dir")
    return Path(chosen).expanduser().absolute() if chosen else default_state_dir()


def run(args):
    """Be the agent until a signal ends it."""
    config_path = Path(args.config or default_config_path()).expanduser()
    config = load_config(config_path)
    if not config.get("api_key"):
        raise AgentError(
            f"This server is not registered: {config_path} holds no key. Make a registration "
            "token on the hub and run: python agent.py --register TOKEN"
        )
    declared(config)  # said now, not at every connection
    state_dir = make_private_dir(state_dir_of(args, config))
    with hold(state_dir):
        log_to(state_dir, args.verbose)
        serve(config, state_dir)
    return 0


def serve(config, state_dir):
    stop = threading.Event()
    asked_to_stop = queue.SimpleQueue()  # its put() is safe in a signal handler, unlike Event.set
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_stop.put(True))
    hub = Hub(config["hub_url"], config["api_key"])
    agent = Agent(config, state_dir, settings_of(config), stop)
    agent.recover()
    carrier = PollCarrier(hub, agent)
    carry = Loop(carrier.carry, stop)
    steps = (
        *(carrier.listen, Heartbeat(hub, stop, 30).step, agent.run_command, agent.press_keys),
        *(agent.watch, agent.send_logs, agent.send_screens),
    )
    for loop in (carry, *(Loop(step, stop) for step in steps)):
        loop.start()
    asked_to_stop.get()
    stop.set()
    carry.join(0.4)
    if not carry.is_alive():
        carrier.flush(0.5)
    log.info("stopped; sessions go on in tmux")


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
    add("-v", "--verbose", action="store_true", help="log more")
    add("--exec-session", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.exec_session:
        return exec_session(args.exec_session)
    try:
        return register(args) if args.register is not None else run(args)
    except AgentError as error:
        print(f"agent.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
