#!/usr/bin/env python3
"""`orchestratia`: the command line of an Orchestratia hub.

One file that imports nothing of the project and talks HTTP only, so that it can be copied to any
machine. With `--json` every command prints the hub's answer, or `{"error", "code", "fields"}`, on
standard output. Exit codes: 0 done, 1 refused by the hub (or the work awaited has failed),
2 wrong usage, 3 hub unreachable, 4 timed out waiting, 130 interrupted.
"""

import base64
import codecs
import functools
import importlib
import importlib.metadata
import io
import ipaddress
import json
import os
import queue
import random
import re
import select
import shlex
import signal
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import webbrowser
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import click
import click.shell_completion as shell_completion
import requests
import yaml
from rich.cells import set_cell_size
from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from urllib3.exceptions import HTTPError as TransportError  # what reading a requests stream raises

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None

VERSION = "1.0.0"
PROGRAM = "orchestratia"
CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 30
FILE_TIMEOUT_S = 600  # until a file is made ready, or taken
BEAT_TIMEOUT_S = 45  # three of the hub's beats of 15 s
GIVE_UP_S = 120  # how long a watcher looks for a hub that has gone
GET_ATTEMPTS = 3
COLLECT_S = 10  # an answer is asked for so often at least: the hub keeps it for 20 s
COMPLETION_PATIENCE_S = (1, 2)  # to connect and to answer, while somebody waits for the Tab key
COMPLETION_TASKS = 200
PAGE = 1000  # the longest list the hub gives at once
FOLLOW_INTERVAL_S = 1
RETRY_PAUSE_S = 0.2
RECONNECT_S = 0.5
SOCKET_PING_S = 10  # a connection that says nothing for twice as long is dead
SOCKET_MESSAGE_MOST = 2**25  # 32 MB: a long scrollback comes in one message
LOST_THE_HUB = "Lost the hub; trying to reach it again…"
WIDE = 100_000  # columns of a "terminal" that never wraps
SKEW_S = 30  # a clock that is further off confuses people
FILE_PATIENCE = (CONNECT_TIMEOUT_S, FILE_TIMEOUT_S)
EXIT_REFUSED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_TIMEOUT, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

ENDED = {"done", "failed", "cancelled"}
ACTIVE = ("running", "needs_human", "plan_review", "planning", "assigned")
SESSION_OVER = {"closed", "failed", "lost"}
PRIORITIES = click.Choice(["low", "normal", "high", "critical"])
TYPES = click.Choice(["feature", "bugfix", "refactor", "chore", "docs"])
ROLES = ("viewer", "operator", "admin")
PIPELINE = "orchestratia/pipeline/v1"
DEPENDENCY_TYPES = ("blocks", "input", "related")

# What `wait --for` takes beside a status, and the statuses that fulfil it.
GOALS = {"started": {"running", "needs_human", "done"}}
# Statuses an event proves, so that a state too short to be read is not missed.
EVENT_STATUS = {
    "task_assigned": "assigned",
    "task_auto_assigned": "assigned",
    "task_planning": "planning",
    "task_plan_submitted": "plan_review",
    "task_plan_approved": "running",
    "task_started": "running",
    "task_needs_human": "needs_human",
    "task_completed": "done",
    "task_failed": "failed",
    "task_cancelled": "cancelled",
}
MARKS = {
    "running": ("●", "cyan"),
    "needs_human": ("◐", "bold red"),
    "plan_review": ("◐", "yellow"),
    "planning": ("◐", "cyan"),
    "assigned": ("◐", "cyan"),
    "ready": ("◐", "yellow"),
    "pending": ("○", "yellow"),
    "not assigned": ("○", "yellow"),
    "blocked": ("○", "dim"),
    "done": ("✓", "green"),
    "failed": ("✕", "red"),
    "cancelled": ("✕", "dim"),
    "online": ("●", "green"),
    "offline": ("○", "dim"),
    "draining": ("◐", "yellow"),
    "revoked": ("✕", "red"),
    "active": ("●", "green"),
    "starting": ("◐", "cyan"),
    "recovering": ("◐", "cyan"),
    "disconnected": ("◐", "yellow"),
    "lost": ("✕", "red"),
    "closed": ("○", "dim"),
    "expected": ("○", "yellow"),
    "fulfilled": ("✓", "green"),
    "responded": ("✓", "green"),
    "approved": ("✓", "green"),
    "revised": ("◐", "yellow"),
    "replaced": ("○", "dim"),
    "allowed": ("✓", "green"),
    "denied": ("✕", "red"),
    "withdrawn": ("○", "dim"),
    "allow": ("✓", "green"),
    "deny": ("✕", "red"),
    "ask": ("◐", "yellow"),
    "open": ("◐", "yellow"),
    "dismissed": ("○", "dim"),
    "over": ("○", "dim"),
}


# --- problems: each is a sentence and an exit code --------------------------------------------


class Problem(Exception):
    """Problem (1, refused) > Unreachable (3), TimedOut (4). Usage errors are click's (2)."""

    exit_code = EXIT_REFUSED

    def __init__(self, sentence, code="refused", fields=None):
        super().__init__(sentence)
        self.code, self.fields = code, fields or {}


class Unreachable(Problem):
    exit_code = EXIT_UNREACHABLE


class TimedOut(Problem):
    exit_code = EXIT_TIMEOUT


def usage(sentence):
    return click.UsageError(sentence, ctx=click.get_current_context(silent=True))


# --- text: what strangers wrote, times, sizes -------------------------------------------------

ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# Control characters, and the marks that reorder or hide what stands beside them.
UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def clean(text):
    """`text` (any value) without what could steer a terminal; lines stay."""
    text = str(text).replace("\r\n", "\n").replace("\t", "    ")
    return UNPRINTABLE.sub("", ESCAPES.sub("", text))


def one_line(text):
    return " ".join(clean(text).split())


def exact(text):
    """`text` with what cannot be seen spelt out (`\\x1b`, `\\u202e`): nothing of it is hidden."""
    return UNPRINTABLE.sub(lambda found: spelt(found[0]), str(text))


def spelt(character):
    code = ord(character)
    named = {"\t": "\\t", "\r": "\\r"}
    return named.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def exact_line(text):
    return exact(text).replace("\n", "\\n")


def compact(value, limit=None):
    """A JSON value in one line for people: words as they are, the rest as JSON."""
    if isinstance(value, dict) and limit:
        text = ", ".join(f"{key}: {compact(part)}" for key, part in value.items())
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = one_line(text)
    return text if not limit or len(text) <= limit else text[: limit - 1] + "…"


def moment(iso):
    """The datetime of an ISO 8601 string, or None."""
    try:
        at = datetime.fromisoformat(iso)
    except (TypeError, ValueError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def seconds_between(start, end=None):
    """Seconds from ISO `start` to ISO `end` (default: now), or None."""
    start, end = moment(start), moment(end) if end else datetime.now(UTC)
    return max(0.0, (end - start).total_seconds()) if start and end else None


def lasting(seconds, units=2):
    """A length of time in its largest `units` units: `2 h 5 min`."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    amounts = ((days, "d"), (hours, "h"), (minutes, "min"), (s, "s"))
    return " ".join([f"{amount} {unit}" for amount, unit in amounts if amount][:units])


def ago(iso):
    passed = seconds_between(iso)
    if passed is None:
        return ""
    return "just now" if passed < 2 else f"{lasting(int(passed) or 1, 1).replace('.0', '')} ago"


def clock(iso, form="%Y-%m-%d %H:%M:%S"):
    at = moment(iso)
    return at.astimezone().strftime(form) if at else ""


def at_iso(at):
    """ISO 8601 of an ISO string or of seconds since the epoch; None stays None."""
    if isinstance(at, (int, float)):
        return datetime.fromtimestamp(at, UTC).isoformat()
    return at


def plural(count, word):
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


# --- what the user typed ----------------------------------------------------------------------

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|m|s|h|d|)", re.I)
UNIT_S = {"ms": 0.001, "s": 1, "": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Duration(click.ParamType):
    """`90`, `30s`, `10m`, `1h30m`, `2d`, in seconds."""

    name = "duration"

    def convert(self, value, param, ctx):
        if isinstance(value, (int, float)):
            return value
        text = value.strip()
        parts = DURATION.findall(text)
        if not parts or DURATION.sub("", text).strip():
            self.fail(f"{value!r} is not a length of time; write 90, 30s, 10m, 1h30m or 2d.")
        total = sum(float(amount) * UNIT_S[unit.lower()] for amount, unit in parts)
        return int(total) if total == int(total) else total


DURATION_TYPE = Duration()


def task_ref(text, what="task"):
    """An id or unique prefix as the hub takes it: no `#`, lower case, dashes where they belong."""
    ref = text.strip().lstrip("#").strip()
    if re.fullmatch(r"[0-9a-fA-F-]+", ref):
        ref = ref.lower()
    if re.fullmatch(r"[0-9a-f]{32}", ref):
        ref = "-".join((ref[:8], ref[8:12], ref[12:16], ref[16:20], ref[20:]))
    if not re.fullmatch(r"[0-9A-Za-z_-]+", ref):
        raise usage(f"{text!r} is not a {what} id; give the id or its first 4 characters or more.")
    if len(ref) < 4:
        raise usage(f"The {what} id {text!r} is too short; give at least its first 4 characters.")
    return ref


def parse_dependency(text):
    """`ID`, `ID:related` or `ID:input:KEY` as (id, type, key or None)."""
    ref, _, rest = text.partition(":")
    kind, _, key = rest.partition(":")
    kind = kind or "blocks"
    check_dependency(kind, key)
    return task_ref(ref), kind, key or None


def check_dependency(kind, key):
    if kind not in DEPENDENCY_TYPES:
        raise usage(f"{kind!r} is no dependency type; use ID, ID:input:KEY or ID:related.")
    if kind == "input" and not key:
        raise usage("An input dependency needs the key of the contract it takes: ID:input:KEY.")
    if kind != "input" and key:
        raise usage(f"A {kind} dependency takes no contract key; only input does.")


def pairs_of(texts, option):
    """{name: value} of `NAME=VALUE` words."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals):
            raise usage(f"{text!r} is not NAME=VALUE as {option} wants it.")
        pairs[name.strip()] = value.strip()
    return pairs


def no_constant(name):
    raise usage(f"{name} is not valid JSON; send null, a number or a string instead.")


def parse_json(text):
    """The JSON value of `text`. Raises ValueError; NaN and infinities are refused as usage."""
    try:
        return json.loads(text, parse_constant=no_constant)
    except RecursionError:
        raise usage("The JSON value is nested too deeply.") from None


def json_value(text, what):
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise usage(
            f"{what} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None


def json_or_text(text):
    try:
        return parse_json(text)
    except ValueError:
        return text


def read_text(path):
    """The text of a file, or of standard input for `-`."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise usage(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise usage(f"{path} is not UTF-8 text (byte {error.start}).") from None


class Loader(yaml.SafeLoader):
    """Safe YAML that keeps dates as text and refuses a key given twice."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """YAML for people: texts of several lines as such, short lists in one line, no anchors."""

    def ignore_aliases(self, data):
        return True

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, indentless=False)


def text_node(dumper, text):
    style = "|" if "\n" in text and not re.search(r"[ \t]\n|^[ \n]|\x1b", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def list_node(dumper, items):
    plain = all(isinstance(item, (str, int, float)) for item in items)
    short = plain and sum(len(str(item)) for item in items) <= 60
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=short or None)


Dumper.add_representer(str, text_node)
Dumper.add_representer(list, list_node)


def yaml_text(value):
    return yaml.dump(
        value,
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=90,
    )


def parse_document(text, name):
    """The value of a YAML or JSON text; its errors name line and column."""
    if text.lstrip()[:1] in ("{", "["):
        with suppress(ValueError):  # else read as YAML, whose flow style looks alike
            return parse_json(text)
        if name.endswith(".json"):
            return json_value(text, name)
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise usage(f"{name} is not valid YAML{where}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise usage(f"{name} is not valid YAML: {one_line(error)}.") from None


def object_of(value, what):
    if not isinstance(value, dict):
        raise usage(f"{what} must be an object (key: value), not {type(value).__name__}.")
    return value


def file_or_json(text, what):
    """An object given as JSON on the command line, or as the name of a YAML or JSON file."""
    if text.lstrip().startswith("{"):
        return object_of(json_value(text, what), what)
    return object_of(parse_document(read_text(text), text), text)


def not_empty(text, option):
    if text is not None and not text.strip():
        raise usage(f"{option} must not be empty.")
    return text


def given(**values):
    """Those of `values` that were given."""
    return {key: value for key, value in values.items() if value not in (None, (), [], {})}


# --- credentials ------------------------------------------------------------------------------


def config_path():
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "orchestratia" / "cli.yaml"


def load_config():
    path = config_path()
    try:
        config = yaml.safe_load(path.read_text("utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise usage(f"Cannot read {path}: {one_line(error)}. Mend it or delete it.") from None
    return object_of(config, str(path))


def save_config(config):
    """Replaces cli.yaml at once or not at all, readable by its owner only."""
    path = config_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".cli-")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yaml.safe_dump(config, file, sort_keys=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise Problem(f"Cannot write {path}: {error.strerror}.", "local") from None
    return path


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def hub_url(text):
    """A hub's URL in one form: scheme, host and path, no slash at the end."""
    text = text.strip()
    if "://" not in text:
        local = is_loopback(text.partition("/")[0].rpartition(":")[0] or text)
        text = f"{'http' if local else 'https'}://{text}"
    with suppress(ValueError):
        parts = urlsplit(text)
        _ = parts.port
        if parts.scheme in ("http", "https") and parts.hostname:
            return text.rstrip("/")
    raise usage(f"{text!r} is not the URL of a hub; write it like http://127.0.0.1:8080.")


class Credentials:
    """Hub, key and project: flags before environment before cli.yaml, each on its own."""

    def __init__(self, flags, environment, config):
        env = environment.get
        saved = config.get("hub_url")
        self.config = config
        url = flags.get("hub") or env("ORCHESTRATIA_HUB_URL") or saved
        self.url = hub_url(str(url)) if url else None
        self.key = flags.get("token") or env("ORCHESTRATIA_TOKEN") or env("ORCHESTRATIA_API_KEY")
        # The saved token is for the saved hub: another one must not get to see it.
        if not self.key and saved and self.url == hub_url(str(saved)):
            self.key = config.get("token")
        project = flags.get("project") or env("ORCHESTRATIA_PROJECT_ID") or config.get("project")
        self.project = str(project) if project else None


class KeyAuth(requests.auth.AuthBase):
    """Sets the credential itself: requests would otherwise prefer what a .netrc says."""

    def __init__(self, key):
        self.key = key

    def __call__(self, request):
        if self.key and self.key.startswith(("orc_", "orcs_")):
            request.headers["X-API-Key"] = self.key
        elif self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


# --- the hub ----------------------------------------------------------------------------------


def reason_of(error):
    """Why a connection failed, in a few words."""
    text = str(error)
    if isinstance(error, (requests.exceptions.SSLError, ssl.SSLError)):
        return f"its certificate was not accepted ({one_line(text)[-120:]})"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S} s"
    if isinstance(error, requests.exceptions.Timeout):
        return f"no answer within {ANSWER_TIMEOUT_S} s"
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S} s"
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    if found:
        return found[1].strip().lower()
    return "the connection was closed without an answer"


@functools.cache
def websockets():
    """The library of that name, imported only by the commands that need it."""
    try:
        importlib.import_module("websockets.sync.client")
        return importlib.import_module("websockets")
    except ImportError:
        missing = "This needs the Python package websockets: pip install websockets"
        raise Problem(missing, "local") from None


def plain_answer(response):
    """A refused WebSocket handshake as an answer of `requests`."""
    answer = requests.Response()
    answer.status_code, answer.reason = response.status_code, response.reason_phrase
    answer.raw = io.BytesIO(response.body or b"")
    return answer


def never_sent(error):
    return isinstance(error, requests.exceptions.ConnectTimeout) or (
        "NewConnectionError" in str(error) or "NameResolutionError" in str(error)
    )


class Hub:
    """HTTP to one hub: the answers as JSON, every failure a Problem with a sentence."""

    def __init__(self, url, key=None):
        self.url = url
        self.http = requests.Session()
        self.http.auth = KeyAuth(key)
        self.http.headers["User-Agent"] = f"orchestratia/{VERSION}"
        self.http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # A proxy set for the outside world would cut off a hub on this machine.
        self.http.trust_env = not is_loopback(urlsplit(url).hostname)
        insecure = os.environ.get("ORCHESTRATIA_INSECURE_TLS", "").lower()
        self.http.verify = insecure not in ("1", "true", "yes", "on")
        self.patience, self.attempts = (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), GET_ATTEMPTS
        if not self.http.verify:
            requests.packages.urllib3.disable_warnings()

    def get(self, path, **query):
        return self._json(self._send("GET", path, query=query))

    def post(self, path, body=None):
        return self._json(self._send("POST", path, body))

    def put(self, path, body):
        return self._json(self._send("PUT", path, body))

    def patch(self, path, body):
        return self._json(self._send("PATCH", path, body))

    def delete(self, path, **query):
        return self._json(self._send("DELETE", path, query=query))

    def output(self, path, offset):
        """The bytes of a log from `offset` or from what is there behind it, where they begin, and
        the offset after them."""
        answer = self._send("GET", path, query={"offset": offset})
        begins, following = (answer.headers.get(h, "") for h in ("X-Offset", "X-Next-Offset"))
        begins = int(begins) if begins.isdigit() else offset
        following = int(following) if following.isdigit() else begins + len(answer.content)
        return answer.content, begins, following

    def stream(self, path, last_id=None):
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if last_id is not None:
            headers["Last-Event-ID"] = str(last_id)
        timeout = (CONNECT_TIMEOUT_S, BEAT_TIMEOUT_S)
        return self._send("GET", path, headers=headers, stream=True, timeout=timeout)

    def download(self, path, file, method="GET"):
        """Writes the body of an answer to a binary file, as it comes."""
        try:
            with self._send(method, path, stream=True, timeout=FILE_PATIENCE) as answer:
                for block in answer.iter_content(65536):
                    file.write(block)
        except requests.exceptions.RequestException as error:
            raise self._unreachable(error, method) from None

    def upload(self, path, file):
        """Sends a binary file as it is."""
        headers = {"Content-Type": "application/octet-stream"}
        answer = self._try(
            "POST",
            f"{self.url}/api/v1/{path}",
            data=file,
            headers=headers,
            allow_redirects=False,
            timeout=FILE_PATIENCE,
        )
        return self._json(self._checked(answer))

    def socket(self, path):
        """A WebSocket to the hub."""
        library = websockets()
        try:
            connection = library.sync.client.connect(
                f"ws{self.url.removeprefix('http')}/{path}",
                additional_headers={"Authorization": f"Bearer {self.http.auth.key}"},
                user_agent_header=self.http.headers["User-Agent"],
                compression=None,
                ssl=self._tls(),
                proxy=True if self.http.trust_env else None,
                open_timeout=CONNECT_TIMEOUT_S,
                ping_interval=SOCKET_PING_S,
                ping_timeout=SOCKET_PING_S,
                close_timeout=1,
                max_size=SOCKET_MESSAGE_MOST,
            )
        except library.exceptions.InvalidStatus as refused:
            problem = self._refusal(plain_answer(refused.response))
            away = refused.response.status_code >= 500
            raise (Unreachable(str(problem), problem.code) if away else problem) from None
        except (OSError, EOFError, library.exceptions.WebSocketException) as error:
            raise self._unreachable(error, "GET") from None
        return connection.__enter__()  # its newer releases give a connection out in a `with` only

    def _tls(self):
        """What certificates are checked against, as for HTTP; None where nothing is encrypted."""
        if not self.url.startswith("https"):
            return None
        proof = self.http.merge_environment_settings(self.url, {}, None, self.http.verify, None)
        verify = proof["verify"]
        if not verify:
            return ssl._create_unverified_context()  # noqa: S323 (asked for)
        where = {} if verify is True else {"capath" if os.path.isdir(verify) else "cafile": verify}
        return ssl.create_default_context(**where)

    def _send(self, method, path, body=None, query=None, headers=None, **options):
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except ValueError:
            raise usage("Numbers beyond JSON (NaN, Infinity) cannot be sent.") from None
        if data is not None:
            headers = {**(headers or {}), "Content-Type": "application/json"}
        options.setdefault("timeout", self.patience)
        answer = self._try(
            method,
            f"{self.url}/api/v1/{path}",
            data=data,
            params={key: value for key, value in (query or {}).items() if value is not None},
            headers=headers,
            allow_redirects=False,
            **options,
        )
        return self._checked(answer)

    def _try(self, method, url, **options):
        """One request; a GET is tried again when the connection fails, nothing else ever is."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self.http.request(method, url, **options)
            except (
                requests.exceptions.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
            ) as error:
                if method == "GET" and attempt < self.attempts:
                    time.sleep(RETRY_PAUSE_S * attempt)
                    continue
                raise self._unreachable(error, method) from None
            except (requests.exceptions.RequestException, ValueError) as error:
                raise self._unreachable(error, method) from None

    def _unreachable(self, error, method):
        unsure = (
            ""
            if method == "GET" or never_sent(error)
            else (
                " Whether the hub still received the request is unknown; look before repeating it."
            )
        )
        return Unreachable(
            f"cannot reach the hub at {self.url}: {reason_of(error)}. Is it running?{unsure}",
            "unreachable",
            {"hub_url": self.url},
        )

    def _checked(self, answer):
        if 200 <= answer.status_code < 300:
            return answer
        if 300 <= answer.status_code < 400:
            target = one_line(answer.headers.get("Location", "an unknown place"))
            raise Problem(
                f"The hub at {self.url} answered with a redirect to {target}, which is not "
                "followed so that your key goes nowhere else. Check --hub.",
                "redirect",
                {"location": target},
            )
        raise self._refusal(answer)

    def _refusal(self, answer):
        try:
            error = answer.json()
        except (ValueError, requests.exceptions.RequestException):
            error = None
        if isinstance(error, dict) and error.get("detail"):
            detail, fields = error["detail"], error.get("fields")
            sentence = detail if isinstance(detail, str) else compact(detail)
            code = error.get("code") or f"http_{answer.status_code}"
            return Problem(sentence, code, fields if isinstance(fields, dict) else {})
        kind = Unreachable if answer.status_code in (502, 503, 504) else Problem
        said = one_line(answer.text)[:200]
        return kind(
            f"{self.url} answered HTTP {answer.status_code} {answer.reason or ''} in a form that "
            f"is not a hub's. Check --hub.{' It said: ' + said if said else ''}",
            f"http_{answer.status_code}",
        )

    def _json(self, answer):
        if not answer.content.strip():
            return {}
        try:
            return answer.json()
        except (ValueError, RecursionError):
            kind = one_line(answer.headers.get("Content-Type", "unknown"))
            raise Problem(
                f"{self.url} did not answer like a hub ({kind} instead of JSON). Check --hub.",
                "not_a_hub",
            ) from None


class Stream:
    """The hub's events as they happen, read in a thread that reconnects after the last id seen.

    `get` returns an event, or SYNC when the state should be read anew: after each (re)connection,
    and at each beat of the hub.
    """

    SYNC = object()
    LOST = object()

    def __init__(self, hub, after=None):
        self.hub, self.last_id = hub, after
        self.items, self.over = queue.Queue(), threading.Event()
        self.answer = hub.stream("events/stream", after)  # refusals are raised here, at once
        self.items.put(self.SYNC)
        threading.Thread(target=self._run, daemon=True).start()

    def get(self, timeout=None):
        """The next item, or None after `timeout` seconds."""
        try:
            item = self.items.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def pending(self):
        return not self.items.empty()

    def close(self):
        """Ends the reading, at the latest with the hub's next beat."""
        self.over.set()

    def _run(self):
        try:
            while not self.over.is_set():
                self._read()
                self.items.put(self.LOST)
                self._reconnect()
                self.items.put(self.SYNC)
        except Exception as error:  # handed to the reader of the queue
            self.items.put(error)

    def _read(self):
        rest = b""
        with suppress(TransportError, OSError), self.answer:
            while not self.over.is_set():
                block = self.answer.raw.read1(65536, decode_content=True)
                if not block:
                    return
                *frames, rest = (rest + block).replace(b"\r\n", b"\n").split(b"\n\n")
                for frame in frames:
                    self._take(frame.decode("utf-8", "replace"))

    def _take(self, frame):
        fields = {"id": [], "data": []}
        for line in frame.split("\n"):
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        self.last_id = fields["id"][-1] if fields["id"] else self.last_id
        try:
            event = json.loads("\n".join(fields["data"]))
        except ValueError:
            event = None
        self.items.put(event if isinstance(event, dict) else self.SYNC)

    def _reconnect(self):
        until, pause = time.monotonic() + GIVE_UP_S, RECONNECT_S
        while not self.over.wait(pause):
            try:
                self.answer = self.hub.stream("events/stream", self.last_id)
                return
            except Unreachable:
                if time.monotonic() > until:
                    raise
                pause = min(pause * 1.5, 5)


# --- the screen -------------------------------------------------------------------------------


class Id(str):
    """An id in a cell: in full in a pipe, its first 8 characters on a terminal."""


class Mark(str):
    """A status in a cell: with its shape and colour on a terminal."""


class Screen:
    """Prints rich renderables: in colour to a terminal, as plain aligned text to anything else."""

    def __init__(self):
        dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.fancy = sys.stdout.isatty() and not dumb
        self.console = self._console(sys.stdout) if self.fancy else None

    def _console(self, file):
        plain = {} if self.fancy else {"width": WIDE, "color_system": None, "no_color": True}
        return Console(
            file=file,
            force_terminal=self.fancy,
            markup=False,
            emoji=False,
            highlight=False,
            **plain,
        )

    def print(self, *renderables):
        if self.fancy:
            return self.console.print(*renderables, sep="\n")
        page = io.StringIO()
        self._console(page).print(*renderables, sep="\n")
        lines = "\n".join(line.rstrip() for line in page.getvalue().split("\n"))
        click.echo(lines.rstrip("\n") + "\n" if lines.strip() else "", nl=False)

    def line(self, text):
        """A line that is never wrapped, so that it can be copied."""
        click.echo(one_line(text))

    def short(self, ident):
        text = one_line(ident or "")
        return text[:8] if self.fancy else text

    def cell(self, value):
        if isinstance(value, Text):
            return value
        if isinstance(value, Mark):
            shape, style = MARKS.get(value, ("·", ""))
            return Text(f"{shape} {clean(value)}" if self.fancy else clean(value), style)
        if isinstance(value, Id):
            return Text(self.short(value), "dim")
        return Text("" if value is None else clean(value))

    def table(self, rows, columns, empty):
        """A table of `rows`; `columns` as `Column()` makes them."""
        if not rows:
            return Text(empty, "dim")
        cells = {one: [self.cell(one.show(row)) for row in rows] for one in columns}
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
        kept = self._fitting(cells) if self.fancy else cells
        for one in kept:
            for cell in cells[one] if one.cut else ():
                cell.no_wrap, cell.overflow = True, "ellipsis"
            heading = Text(one.heading.upper(), no_wrap=one.cut, overflow="ellipsis")
            fixed = not (one.cut or one.flex)
            table.add_column(heading, no_wrap=fixed, overflow="fold", justify=one.justify)
        for row in zip(*(cells[one] for one in kept), strict=True):
            table.add_row(*row)
        return table

    def _fitting(self, cells):
        """The columns with something in them, less the spare ones there is no room for."""
        kept = [one for one in cells if any(cell.plain for cell in cells[one])]
        for spare in sorted((one for one in kept if one.spare), key=lambda one: one.spare):
            if sum(self._least(one, cells[one]) for one in kept) <= self.console.width:
                break
            kept.remove(spare)
        return kept

    @staticmethod
    def _least(one, cells):
        """The width a column needs to be of use, with the space beside it."""
        natural = max(cell.cell_len for cell in [Text(one.heading), *cells])
        return 2 + (min(natural, 24) if one.cut or one.flex else natural)

    def facts(self, pairs):
        """Labels and values; a value that is None or empty is left out."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for label, value in pairs:
            if value not in (None, "", [], {}):
                grid.add_row(Text(label), self.cell(value))
        return grid

    def section(self, heading, body):
        return Stack(Text(""), Text(heading, "bold"), body)


class Column(NamedTuple):
    """`cut` ends with … where room is short, `flex` wraps; the lowest `spare` goes first."""

    heading: str
    show: Callable
    cut: bool = False
    flex: bool = False
    spare: int = 0
    justify: str = "left"


def field(key, kind=None):
    """A cell function: the row's `key`, as a `kind` of cell."""

    def show(row):
        value = row.get(key)
        return value if value is None or kind is None else kind(value)

    return show


def words(key):
    """A cell function: the list (or the keys of the object) at `key`, with commas."""
    return lambda row: ", ".join(one_line(item) for item in row.get(key) or ())


def line_of(key):
    return lambda row: one_line(row.get(key) or "")


def age_of(key):
    return lambda row: ago(row.get(key))


# --- what things look like --------------------------------------------------------------------


def shown_status(task):
    """The state for people: a pending task is blocked, ready or not assigned."""
    status = task.get("status") or "?"
    blocked = status == "pending" and task.get("blocked")
    return task.get("shown_status") or ("blocked" if blocked else status)


def why(task):
    """Why a task is where it is, without the state that is shown beside it."""
    return one_line(task.get("reason") or "").removeprefix(f"{shown_status(task)}: ")


def blocking(task):
    return [
        dependency
        for dependency in task.get("dependencies") or ()
        if dependency.get("dependency_type", "blocks") != "related"
    ]


def placed(task):
    """Where a task is: its server, else its session."""
    return one_line(task.get("assigned_server_name") or task.get("target_session_name") or "")


def spent(task):
    """How long a task has been running, or ran."""
    if not task.get("started_at"):
        return ""
    ended = task.get("completed_at")
    if not ended and task.get("status") in ENDED:
        ended = task.get("updated_at")
    took = seconds_between(task["started_at"], ended)
    return lasting(took) if ended or (took or 0) >= 1 else ""


def summary_of(result):
    """A result in a few words: its summary or error, else its JSON."""
    if isinstance(result, dict):
        said = result.get("summary") or result.get("error")
        if isinstance(said, str):
            return clean(said)
    return compact(result)


TASK_COLUMNS = (
    Column("status", lambda task: Mark(shown_status(task))),
    Column("id", field("id", Id)),
    Column("title", line_of("title"), cut=True),
    Column("priority", line_of("priority"), spare=3),
    Column("repo", line_of("target_repo"), cut=True, spare=2),
    Column("where", placed, cut=True),
    Column("time", spent, spare=5),
    Column("created", age_of("created_at"), spare=1),
    Column("why", why, cut=True, spare=4),
)
SERVER_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("name", line_of("name"), cut=True),
    Column("id", field("id", Id)),
    Column("slots", lambda row: f"{row.get('busy') or 0}/{row.get('slots') or '?'}"),
    Column("repos", words("repos"), flex=True),
    Column("languages", words("languages"), flex=True, spare=2),
    Column("os", line_of("os"), cut=True, spare=1),
    Column("heard", age_of("last_heartbeat"), spare=3),
)
SESSION_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("name", line_of("name"), cut=True),
    Column("id", field("id", Id)),
    Column("server", line_of("server_name"), cut=True),
    Column("role", line_of("role"), spare=2),
    Column("activity", line_of("activity"), cut=True, spare=4),
    Column("task", line_of("task_title"), cut=True, spare=3),
    Column("created", age_of("created_at"), spare=1),
)
PROJECT_COLUMNS = (
    Column("name", line_of("name"), cut=True),
    Column("id", field("id", Id)),
    Column("role", line_of("role")),
    Column("profile", line_of("profile"), cut=True),
    Column("created", age_of("created_at"), spare=1),
)
PIPELINE_COLUMNS = (
    Column("name", line_of("name"), cut=True),
    Column("id", field("id", Id)),
    Column("tasks", field("total"), justify="right"),
    Column("states", lambda row: counted(row.get("counts") or {}), flex=True),
    Column("created", age_of("created_at"), spare=2),
    Column("by", line_of("created_by"), cut=True, spare=1),
)
EVENT_COLUMNS = (
    Column("time", lambda row: clock(row.get("at"))),
    Column("event", line_of("type")),
    Column("actor", line_of("actor"), cut=True, spare=2),
    Column("task", field("task_id", Id), spare=1),
    Column("details", lambda row: details_of(row, 300), flex=True),
)
CANDIDATE_COLUMNS = (
    Column("", lambda row: Text("✓", "green") if row.get("fits") else Text("✕", "red")),
    Column("server", line_of("server"), cut=True),
    Column("score", field("score"), justify="right"),
    Column("why", lambda row: "; ".join(map(one_line, row.get("reasons") or ())), flex=True),
)
CONTRACT_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("key", line_of("key"), cut=True),
    Column("description", line_of("description"), flex=True, spare=3),
    Column("data", lambda row: known(row.get("data")), flex=True),
    Column("by", line_of("by"), cut=True, spare=2),
    Column("updated", age_of("updated_at"), spare=1),
)
BLOCKER_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("id", field("task_id", Id)),
    Column("title", line_of("title"), cut=True),
    Column("type", lambda row: edge_name(row), cut=True),
)
INTERVENTION_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("id", field("id", Id)),
    Column("type", line_of("intervention_type"), spare=2),
    Column("question", line_of("question"), cut=True),
    Column("answer", line_of("response"), cut=True),
    Column("task", line_of("task_title"), cut=True, spare=4),
    Column("asked by", line_of("asked_by"), cut=True, spare=1),
    Column("asked", age_of("created_at"), spare=3),
)
PERMISSION_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("id", field("id", Id)),
    Column("tool", lambda row: exact_line(row.get("tool") or "")),
    Column("asks for", lambda row: exact_line(row.get("subject") or ""), cut=True),
    Column("session", line_of("session_name"), cut=True, spare=4),
    Column("task", line_of("task_title"), cut=True, spare=2),
    Column("by", line_of("decided_by"), cut=True, spare=1),
    Column("asked", age_of("asked_at"), spare=3),
)
RULE_COLUMNS = (
    Column("no.", field("position"), justify="right"),
    Column("says", field("action", Mark)),
    Column("tool", lambda row: exact_line(row.get("tool") or "*")),
    Column("pattern", lambda row: exact_line(row.get("pattern") or "(any)"), flex=True),
    Column("project", line_of("project"), cut=True),
    Column("server", line_of("server"), cut=True),
    Column("agent", line_of("agent")),
    Column("", lambda row: "off" if row.get("enabled") is False else ""),
    Column("id", field("id", Id), spare=2),
    Column("note", line_of("note"), cut=True, spare=1),
)
PART_COLUMNS = (
    Column("says", field("decision", Mark)),
    Column("part", lambda row: exact_line(row.get("text") or ""), flex=True),
    Column("rule", field("rule_id", Id)),
    Column("because", line_of("because"), flex=True),
)
GRANT_COLUMNS = (
    Column("id", field("id", Id)),
    Column("tool", lambda row: exact_line(row.get("tool") or "")),
    Column("granted", lambda row: exact_line(row.get("subject") or ""), flex=True),
    Column("by", line_of("granted_by"), cut=True),
    Column("at", age_of("at")),
)
ALERT_COLUMNS = (
    Column("status", field("status", Mark)),
    Column("id", field("id", Id)),
    Column("kind", line_of("kind")),
    Column("what", line_of("sentence"), flex=True),
    Column("session", line_of("session_name"), cut=True, spare=2),
    Column("task", line_of("task_title"), cut=True, spare=1),
    Column("since", age_of("at"), spare=3),
)
SIGNAL_COLUMNS = (
    Column("", lambda row: Text("▸", "green") if row.get("decided") else ""),
    Column("signal", line_of("name")),
    Column(
        "says", lambda row: "(silent)" if row.get("silent") else one_line(row.get("says") or "")
    ),
    Column("heard", lambda row: ago(at_iso(row.get("at")))),
)
PLAN_COLUMNS = (
    Column("version", field("version"), justify="right"),
    Column("status", field("status", Mark)),
    Column("plan", lambda row: summary_of(row.get("plan")), flex=True),
    Column("feedback", line_of("feedback"), flex=True),
    Column("decided by", line_of("decided_by"), cut=True, spare=1),
    Column("submitted", age_of("submitted_at"), spare=2),
)
NOTE_COLUMNS = (
    Column("time", lambda row: clock(row.get("created_at"))),
    Column("by", line_of("author"), cut=True),
    Column("note", lambda row: note_text(row), flex=True),
)
USER_COLUMNS = (
    Column("name", line_of("username"), cut=True),
    Column("id", field("id", Id)),
    Column("rights", lambda row: rights_of(row), flex=True),
    Column("sign-in", lambda row: "disabled" if row.get("disabled") else ""),
    Column("created", age_of("created_at"), spare=1),
)
REPO_COLUMNS = tuple(
    Column(key, line_of(key), flex=key == "path") for key in ("name", "path", "branch")
)


def note_text(note):
    return ("urgent: " if note.get("urgent") else "") + clean(note.get("content") or "")


def rights_of(user):
    """A user's roles in words: `admin of the hub`, or each project's role."""
    if user.get("is_admin"):
        return "admin of the hub"
    roles = user.get("projects") or ()
    return ", ".join(f"{one_line(p.get('role'))} of {one_line(p.get('name'))}" for p in roles)


def known(value):
    return "" if value is None else compact(value, 200)


def counted(counts):
    return ", ".join(f"{number} {status}" for status, number in counts.items() if number)


def details_of(event, limit):
    """An event's details in a line; `task explain` shows the candidates better."""
    details = event.get("details") or {}
    told = {key: value for key, value in details.items() if key != "candidates"}
    return compact(told, limit) if told else ""


def edge_name(dependency):
    kind = dependency.get("dependency_type") or "blocks"
    key = dependency.get("contract_key")
    return one_line(f"{kind} {key}" if key else kind)


def listing(key, columns, empty):
    """A renderer of a wrapped list: a table of `data[key]`."""

    def render(screen, data):
        table = screen.table(data.get(key) or [], columns, empty)
        found = [
            f"{word}: {option} {one_line(data[name])}"
            for word, option, name in (
                ("older", "--before", "prev_cursor"),
                ("more", "--after" if key == "events" else "--cursor", "next_cursor"),
            )
            if data.get(name)
        ]
        return Stack(table, Text(found[0], "dim")) if found else table

    return render


show_tasks = listing("tasks", TASK_COLUMNS, "No tasks.")
show_servers = listing("servers", SERVER_COLUMNS, "No servers. Add one: orchestratia server token")
show_sessions = listing("sessions", SESSION_COLUMNS, "No live sessions (--all shows the old ones).")
show_projects = listing("projects", PROJECT_COLUMNS, "No projects.")
show_pipelines = listing("pipelines", PIPELINE_COLUMNS, "No pipelines.")
show_events = listing("events", EVENT_COLUMNS, "No events.")
show_contracts = listing("contracts", CONTRACT_COLUMNS, "This task has no contracts.")
show_users = listing("users", USER_COLUMNS, "No users.")
show_plans = listing("plans", PLAN_COLUMNS, "No plan has been submitted for this task.")
show_permissions = listing("permissions", PERMISSION_COLUMNS, "No permission requests.")
show_grants = listing("grants", GRANT_COLUMNS, "Nothing is granted for the rest of this session.")
show_alerts = listing("alerts", ALERT_COLUMNS, "No alerts.")


def show_interventions(screen, found):
    return screen.table(found or [], INTERVENTION_COLUMNS, "No questions.")


def show_notes(screen, found):
    return screen.table(found or [], NOTE_COLUMNS, "No notes.")


def task_line(screen, task, label=None):
    """A task in one line: shape, label, id, title, state, place, time."""
    status = shown_status(task)
    shape, style = MARKS.get(status, ("·", ""))
    name = Text(f"{one_line(label)} " if label else "", "bold")
    line = Text.assemble((f"{shape} ", style), name, (screen.short(task.get("id")), "dim"), "  ")
    line.append(one_line(task.get("title") or ""), "bold" if status in ACTIVE else "")
    details = (status, placed(task), spent(task))
    line.append("  " + ", ".join(filter(None, details)), style)
    return line


def task_brief(screen, task, more=()):
    repo = " @ ".join(filter(None, (task.get("target_repo"), task.get("target_branch"))))
    facts = (
        ("id", one_line(task.get("id"))),
        ("status", Mark(shown_status(task))),
        ("why", why(task)),
        ("priority", f"{task.get('priority') or 'normal'}, {task.get('type') or 'feature'}"),
        ("repo", one_line(repo)),
        ("server", one_line(task.get("assigned_server_name") or "")),
        ("session", one_line(task.get("target_session_name") or "")),
    )
    return Stack(Text(one_line(task.get("title") or ""), "bold"), screen.facts((*facts, *more)))


def task_times(task):
    def at(key):
        return f"{clock(task[key])} ({ago(task[key])})" if task.get(key) else ""

    attempt, most = task.get("attempt") or 1, task.get("max_attempts") or 1
    return (
        (
            "created",
            " by ".join(filter(None, (at("created_at"), one_line(task.get("created_by") or "")))),
        ),
        ("ordered by", one_line(task.get("source_session_name") or "")),
        ("started", at("started_at")),
        ("ended", at("completed_at")),
        ("took", spent(task)),
        ("attempt", f"{attempt} of {most}" if most > 1 or attempt > 1 else ""),
        ("profile", one_line(task.get("profile") or "")),
        ("model", one_line(task.get("model") or "")),
        ("mode", one_line(task.get("mode") or "")),
        ("command", compact(task.get("command") or "")),
        ("pipeline", one_line(task.get("pipeline_id") or "")),
    )


def numbered(items):
    return Text("\n".join(f"{number}. {clean(item)}" for number, item in enumerate(items, 1)))


def requirement_lines(structured):
    wanted = structured.get("requirements") if isinstance(structured, dict) else None
    return [
        f"[{one_line(item.get('priority') or '-')}] {clean(item.get('description') or '')}"
        for item in wanted or ()
        if isinstance(item, dict)
    ]


def named_values(screen, values):
    pairs = values.items() if isinstance(values, dict) else ()
    return screen.facts((one_line(key), compact(value, 400)) for key, value in pairs)


def dependency_table(screen, task):
    rows = [
        {
            "task_id": one["depends_on_task_id"],
            "title": one.get("depends_on_title"),
            "status": one.get("depends_on_status")
            or ("done" if one.get("resolved") else "pending"),
            **{key: one.get(key) for key in ("dependency_type", "contract_key")},
        }
        for one in task.get("dependencies") or ()
    ]
    return screen.table(rows, BLOCKER_COLUMNS, "none")


def task_detail(screen, task, asked=()):
    structured, result = task.get("structured_spec"), task.get("result")
    spec, inputs = task.get("spec") or "", task.get("resolved_inputs")
    contracts = [
        {"key": key, **(one if isinstance(one, dict) else {"data": one})}
        for key, one in (task.get("contracts") or {}).items()
    ]
    notes = [
        f"{clock(one.get('created_at'))} {one_line(one.get('author'))}: {note_text(one)}"
        for one in task.get("recent_notes") or ()
    ]
    sections = (
        ("Waits for an answer", asked and show_interventions(screen, asked)),
        ("Spec", spec and spec != task.get("title") and Text(clean(spec))),
        ("Acceptance criteria", numbered(task.get("acceptance_criteria") or ())),
        ("Requirements", numbered(requirement_lines(structured))),
        ("Needs", task.get("dependencies") and dependency_table(screen, task)),
        ("Resolved inputs", inputs and named_values(screen, inputs)),
        ("Contracts", contracts and screen.table(contracts, CONTRACT_COLUMNS, "")),
        ("Plan", task.get("plan") is not None and Text(summary_of(task["plan"]))),
        ("Plan feedback", task.get("plan_feedback") and Text(clean(task["plan_feedback"]))),
        ("Notes", notes and Text("\n".join(notes))),
        ("Result", result is not None and result_text(task, result)),
    )
    return Stack(
        task_brief(screen, task, task_times(task)),
        *(screen.section(heading, body) for heading, body in sections if body),
    )


def result_text(task, result):
    return Text(summary_of(result), "red" if task.get("status") == "failed" else "")


def check_view(screen, data):
    if not data.get("tasks"):
        return Text("Nothing is assigned to you.", "dim")
    return Stack(*(task_detail(screen, task) for task in data["tasks"]))


def explain_view(screen, data):
    blockers, candidates = data.get("blocked_by") or [], data.get("candidates") or []
    parts = [Text(clean(data.get("summary") or ""), "bold")]
    if blockers:
        body = screen.table(blockers, BLOCKER_COLUMNS, "")
        parts.append(screen.section("Waits for", body))
    if candidates:
        heading = f"Servers, judged {ago(data.get('at'))}" if data.get("at") else "Servers"
        parts.append(screen.section(heading, screen.table(candidates, CANDIDATE_COLUMNS, "")))
    return Stack(*parts)


def server_detail(screen, server):
    repos = server.get("repos")
    repos = repos if isinstance(repos, dict) else dict.fromkeys(repos or (), "")
    facts = (
        ("id", one_line(server.get("id"))),
        ("status", Mark(server.get("status") or "?")),
        ("heard", age_of("last_heartbeat")(server)),
        ("host", one_line(f"{server.get('hostname') or '?'}, {server.get('os') or '?'}")),
        ("slots", f"{server.get('busy') or 0} of {server.get('slots') or '?'} taken"),
        ("sessions", server.get("sessions")),
        ("languages", words("languages")(server)),
        ("frameworks", words("frameworks")(server)),
        ("capabilities", words("capabilities")(server)),
        ("profiles", words("profiles")(server)),
        ("work", "started by hand" if server.get("manual") else ""),
        ("agent", one_line(server.get("agent_version") or "")),
    )
    rows = [
        {"name": name, **(one if isinstance(one, dict) else {"path": one})}
        for name, one in repos.items()
    ]
    return Stack(
        Text(one_line(server.get("name") or ""), "bold"),
        screen.facts(facts),
        screen.section("Repos", screen.table(rows, REPO_COLUMNS, "none")),
    )


def session_detail(screen, session):
    activity = filter(None, (session.get("activity"), session.get("reason")))
    log = session.get("log_end")
    facts = (
        ("id", one_line(session.get("id"))),
        ("status", Mark(session.get("status") or "?")),
        ("activity", one_line(": ".join(activity))),
        ("error", one_line(session.get("error") or "")),
        ("server", one_line(session.get("server_name") or "")),
        ("role", one_line(session.get("role") or "")),
        ("profile", one_line(session.get("profile") or "")),
        ("model", one_line(session.get("model") or "")),
        ("mode", one_line(session.get("mode") or "")),
        ("task", one_line(session.get("task_title") or "")),
        ("task id", one_line(session.get("task_id") or "")),
        ("attempt", session.get("attempt")),
        ("terminal", "plain: it ends with its agent" if session.get("terminal") == "pty" else ""),
        ("directory", one_line(session.get("working_directory") or "")),
        ("process", session.get("pid")),
        ("exit code", session.get("exit_code")),
        ("created", age_of("created_at")(session)),
        ("closed", age_of("closed_at")(session)),
        ("log", f"{log:,} bytes" if isinstance(log, int) else ""),
    )
    return Stack(Text(one_line(session.get("name") or "unnamed"), "bold"), screen.facts(facts))


def intervention_detail(screen, asked):
    task = " ".join(filter(None, (asked.get("task_title"), asked.get("task_id"))))
    ended = " by ".join(
        filter(None, (ago(asked.get("responded_at")), one_line(asked.get("responded_by") or "")))
    )
    facts = (
        ("id", one_line(asked.get("id"))),
        ("status", Mark(asked.get("status") or "?")),
        ("type", one_line(asked.get("intervention_type") or "")),
        ("task", one_line(task)),
        ("asked by", one_line(asked.get("asked_by") or "")),
        ("asked", age_of("created_at")(asked)),
        ("answered", ended),
        ("closed", one_line(asked.get("closed_why") or "")),
    )
    parts = [
        screen.section(heading, Text(clean(asked[name])))
        for heading, name in (("Context", "context"), ("Answer", "response"))
        if asked.get(name)
    ]
    return Stack(Text(clean(asked.get("question") or ""), "bold"), screen.facts(facts), *parts)


def choices(screen, asked):
    """A question of a coding agent with what it offers to choose from."""
    lines = [
        ": ".join(filter(None, (option["label"], option["description"])))
        for option in asked["options"]
    ]
    several = " (several are possible)" if asked["several"] else ""
    shown = "\n".join(f"- {exact_line(line)}" for line in lines)
    return screen.section(exact_line(asked["question"]) + several, Text(shown))


PERMISSION_HEADS = {"question": "It asks you to choose", "plan": "It asks you to approve its plan"}


def permission_detail(screen, asked):
    task = " ".join(filter(None, (asked.get("task_title"), asked.get("task_id"))))
    decided = (ago(asked.get("decided_at")), one_line(asked.get("decided_by") or ""))
    delivery = ": ".join(filter(None, (asked.get("delivery"), asked.get("delivery_why"))))
    facts = (
        ("id", one_line(asked.get("id"))),
        ("status", Mark(asked.get("status") or "?")),
        ("session", one_line(asked.get("session_name") or "")),
        ("server", one_line(asked.get("server_name") or "")),
        ("agent", one_line(asked.get("agent") or "")),
        ("task", one_line(task)),
        ("directory", exact_line(asked.get("directory") or "")),
        ("asked", age_of("asked_at")(asked)),
        ("decided", " by ".join(filter(None, decided))),
        ("scope", one_line(asked.get("scope") or "")),
        ("reason", one_line(asked.get("reason") or "")),
        ("rule", one_line(asked.get("rule_id") or "")),
        ("settled", one_line(asked.get("answered_where") or "")),
        ("answer", one_line(delivery)),
    )
    heading = PERMISSION_HEADS.get(asked.get("asks"), "{} asks for a permission")
    head = Text(heading.format(exact_line(asked.get("tool") or "?")), "bold")
    subject, whole = asked.get("subject") or "", asked.get("input") or {}
    parts = [screen.section("What", Text(exact(subject)))]
    if asked.get("questions"):
        parts, whole = [choices(screen, each) for each in asked["questions"]], {}
    if answers := asked.get("answers"):
        parts.append(screen.section("Answers", Text(exact(yaml_text(answers)).rstrip())))
    if rest := {name: value for name, value in whole.items() if value != subject}:
        parts.append(screen.section("With", Text(exact(yaml_text(rest)).rstrip())))
    return Stack(head, screen.facts(facts), *parts)


def rule_detail(screen, rule):
    facts = (
        ("id", one_line(rule.get("id"))),
        ("no.", rule.get("position")),
        ("says", Mark(rule.get("action") or "?")),
        ("tool", exact_line(rule.get("tool") or "*")),
        ("pattern", exact_line(rule.get("pattern") or "(any)")),
        ("project", one_line(rule.get("project") or rule.get("project_id") or "all")),
        ("server", one_line(rule.get("server") or rule.get("server_id") or "")),
        ("agent", one_line(rule.get("agent") or "")),
        ("note", one_line(rule.get("note") or "")),
        ("by", one_line(rule.get("created_by") or "")),
        ("enabled", "no" if rule.get("enabled") is False else ""),
    )
    return screen.facts(facts)


def verdict_view(screen, data):
    """What would become of a tool call: the decision, its rule, and each part."""
    rule, parts = data.get("rule"), data.get("parts") or []
    shown = [Text.assemble(screen.cell(Mark(data.get("decision") or "?")), "  ")]
    shown[0].append(exact_line(data.get("because") or ""))
    if rule:
        shown.append(screen.section("Rule", rule_detail(screen, rule)))
    if len(parts) > 1:
        shown.append(screen.section("Parts", screen.table(parts, PART_COLUMNS, "")))
    return Stack(*shown)


def signals_view(screen, data):
    """What a session does, and what each signal says of it."""
    does = ": ".join(filter(None, (data.get("activity"), data.get("reason"))))
    facts = (
        ("activity", one_line(does or "unknown")),
        ("since", ago(at_iso(data.get("since")))),
        ("by", one_line(data.get("signal") or "")),
    )
    table = screen.table(data.get("signals") or [], SIGNAL_COLUMNS, "No signal was heard yet.")
    head = Text(one_line(data.get("name") or ""), "bold")
    return Stack(head, screen.facts(facts), screen.section("Signals", table))


def plan_view(screen, data):
    """The newest version whole, the earlier ones in a table."""
    plans = data.get("plans") or []
    if not plans:
        return show_plans(screen, data)
    last = plans[-1]
    head = Text(f"Version {last.get('version')}: {one_line(last.get('status'))}", "bold")
    facts = (
        ("by", one_line(last.get("author") or "")),
        ("submitted", age_of("submitted_at")(last)),
        ("decided by", one_line(last.get("decided_by") or "")),
        ("feedback", clean(last.get("feedback") or "")),
    )
    parts = [head, screen.facts(facts), screen.section("Plan", Text(plan_text(last.get("plan"))))]
    if plans[:-1]:
        earlier = screen.table(plans[:-1], PLAN_COLUMNS, "")
        parts.append(screen.section("Earlier versions", earlier))
    return Stack(*parts)


def plan_text(plan):
    """A plan for reading: its text or summary, and what else it has as YAML."""
    if isinstance(plan, str):
        return clean(plan)
    if isinstance(plan, dict) and set(plan) == {"summary"} and isinstance(plan["summary"], str):
        return clean(plan["summary"])
    return clean(yaml_text(plan)).rstrip()


def user_detail(screen, user):
    facts = (
        ("id", one_line(user.get("id"))),
        ("rights", rights_of(user) or "none"),
        ("sign-in", "disabled" if user.get("disabled") else ""),
        ("created", age_of("created_at")(user)),
    )
    return Stack(Text(one_line(user.get("username") or ""), "bold"), screen.facts(facts))


def project_detail(screen, project):
    facts = (
        ("id", one_line(project.get("id"))),
        ("your role", one_line(project.get("role") or "")),
        ("profile", one_line(project.get("profile") or "")),
        ("settings", compact(project.get("settings") or "")),
        ("created", age_of("created_at")(project)),
    )
    return Stack(Text(one_line(project.get("name") or ""), "bold"), screen.facts(facts))


def identity_view(screen, me):
    hub, projects = me.get("hub") or {}, me.get("projects") or []
    facts = (
        ("name", one_line(me.get("name") or "")),
        ("kind", "administrator" if me.get("is_admin") else one_line(me.get("kind") or "")),
        ("role", one_line(me.get("role") or "")),
        ("hub", one_line(f"{me.get('hub_url') or ''} {hub.get('version') or ''}")),
        (
            "projects",
            ", ".join(f"{one_line(p.get('name'))} ({p.get('role') or '-'})" for p in projects),
        ),
        ("server", one_line(me.get("server_name") or "")),
        ("session id", one_line(me.get("session_id") or "")),
        ("task id", one_line(me.get("task_id") or "")),
    )
    return screen.facts(facts)


def status_view(screen, data):
    tasks, waiting = data.get("tasks") or [], data.get("waiting") or []
    head = Text("● connected", "green") if screen.fancy else Text("connected")
    table = screen.table(tasks, TASK_COLUMNS, "No work in progress.")
    parts = [head, identity_view(screen, data)]
    for heading, rows, columns in (
        ("Waiting for an answer", waiting, INTERVENTION_COLUMNS),
        ("Waiting for a permission", data.get("permissions"), PERMISSION_COLUMNS),
        ("Alerts", data.get("alerts"), ALERT_COLUMNS),
    ):
        if rows:
            parts.append(screen.section(heading, screen.table(rows, columns, "")))
    return Stack(*parts, screen.section("In progress", table))


def task_tree(screen, tasks, labels, chosen=None):
    """The graph drawn downstream; a task reached twice is drawn once and referred to."""
    nodes, below = graph(tasks)
    above = {child for children in below.values() for child in children}
    roots = [ident for ident in nodes if ident not in above] or list(nodes)
    top, drawn = Tree("", hide_root=True, guide_style="dim"), set()
    todo = [(top, ident, "") for ident in reversed(roots)]
    while todo:
        branch, ident, edge = todo.pop()
        line = task_line(screen, nodes[ident], labels.get(ident))
        if ident in drawn:
            line = Text(f"↳ {reference(screen, nodes[ident], labels.get(ident))}", "dim")
        line.append(f"  {edge}" if edge else "", "dim italic")
        line.append("  ◀" if ident == chosen else "", "bold")
        node = branch.add(line)
        if ident not in drawn:
            drawn.add(ident)
            todo += [(node, *child) for child in reversed(below.get(ident, {}).items())]
    return top


def reference(screen, task, label):
    parts = (label, screen.short(task.get("id")), task.get("title"), "(shown above)")
    return " ".join(one_line(part) for part in parts if part)


def graph(tasks):
    """(id → task, id → {downstream id: edge}), with stubs for upstreams not among `tasks`."""
    nodes, below = {task["id"]: task for task in reversed(tasks)}, {}
    for task in list(nodes.values()):
        for one in blocking(task):
            up, kind = one["depends_on_task_id"], one.get("dependency_type")
            nodes.setdefault(up, upstream_stub(one))
            edges = below.setdefault(up, {})
            name = edge_name(one) if kind == "input" else ""
            edges[task["id"]] = ", ".join(filter(None, (edges.get(task["id"]), name)))
    return nodes, below


def upstream_stub(dependency):
    return {
        "id": dependency["depends_on_task_id"],
        "title": dependency.get("depends_on_title"),
        "status": dependency.get("depends_on_status"),
    }


def connected(tasks, ident):
    """Those of `tasks` that hang together with `ident`, and itself."""
    links = {}
    for task in tasks:
        for one in blocking(task):
            links.setdefault(task["id"], []).append(one["depends_on_task_id"])
            links.setdefault(one["depends_on_task_id"], []).append(task["id"])
    wanted = reach(ident, links)
    return [task for task in tasks if task["id"] in wanted]


def reach(start, edges):
    found, todo = {start}, [start]
    while todo:
        fresh = set(edges.get(todo.pop(), ())) - found
        found |= fresh
        todo += fresh
    return found


def labels_of(pipeline):
    return {ident: label for label, ident in (pipeline.get("id_map") or {}).items()}


def pipeline_view(screen, pipeline):
    tasks = pipeline.get("tasks") or []
    head = Text(one_line(pipeline.get("name") or ""), "bold")
    head.append(f"  {one_line(pipeline.get('id') or '')}", "dim")
    # graph() turns the newest-first order of lists round; a pipeline's tasks are in file order.
    tree = task_tree(screen, tasks[::-1], labels_of(pipeline))
    return Stack(head, tree, Text(final_summary(tasks), "dim"))


def final_summary(tasks):
    counts = {}
    for task in tasks:
        status = shown_status(task)
        counts[status] = counts.get(status, 0) + 1
    starts = [task["started_at"] for task in tasks if task.get("started_at")]
    ends = [task["completed_at"] for task in tasks if task.get("completed_at")]
    took = seconds_between(min(starts), max(ends)) if starts and ends else None
    took = f" in {lasting(took)}" if took is not None and len(ends) == len(tasks) else ""
    return f"{plural(len(tasks), 'task')}: {counted(counts)}{took}"


# --- the frame of every command ---------------------------------------------------------------


class App:
    """What a command works with: flags, credentials, the hub, the screen."""

    def __init__(self):
        self.flags = {}
        self.screen = Screen()

    @property
    def as_json(self):
        return bool(self.flags.get("as_json"))

    @functools.cached_property
    def credentials(self):
        return Credentials(self.flags, os.environ, load_config())

    @functools.cached_property
    def hub(self):
        who = self.credentials
        if not who.url:
            raise usage("No hub is known. Sign in: orchestratia login --hub URL")
        if not who.key:
            raise usage(
                f"You are not signed in to {who.url}. Run: orchestratia login --hub {who.url}"
            )
        return Hub(who.url, who.key)

    @functools.cached_property
    def project_id(self):
        """The id of the chosen project, or None when the hub is to decide."""
        name = self.credentials.project
        if not name or UUID.fullmatch(name.lower()):
            return name and name.lower()
        return self.hub.get(f"projects/{self.segment('projects', name)}")["id"]

    @property
    def session_id(self):
        """The session on whose behalf tasks are ordered, if any."""
        saved = self.credentials.config.get("session")
        return os.environ.get("ORCHESTRATIA_SESSION_ID") or (saved and str(saved)) or None

    def confirm(self, question, yes):
        """Asks a person before something is destroyed; programs are taken at their word."""
        if not (yes or self.as_json) and sys.stdin.isatty():
            click.confirm(question, abort=True, err=True)

    def segment(self, kind, name):
        """A name or id as one segment of a path."""
        if not name.strip():
            raise usage("The name must not be empty.")
        if "/" not in name and name not in (".", ".."):
            return quote(name, safe="")
        # Such a name would change the path, whatever its escaping.
        rows = self.hub.get(kind, **({"all": 1} if kind == "sessions" else {})).get(kind) or ()
        found = [row["id"] for row in rows if row.get("name") == name]
        if len(found) != 1:
            what = f"several {kind} are" if found else f"no {kind[:-1]} is"
            code = "ambiguous" if found else "not_found"
            raise Problem(f"{what.capitalize()} called {name!r}.", code, {"candidates": found})
        return quote(found[0], safe="")

    def full_id(self, ref):
        """The full id of a task given by prefix, for places where the hub wants it whole."""
        return ref if UUID.fullmatch(ref) else self.hub.get(f"tasks/{ref}")["id"]

    def show(self, data, render=None):
        """Prints an answer: as JSON, or as `render(screen, data)` draws it."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))
        elif render:
            self.screen.print(render(self.screen, data))

    def did(self, sentence, data, render=None):
        """Prints what was done, then the thing it was done to."""
        if not self.as_json:
            self.screen.print(Text(one_line(sentence), "green"))
        self.show(data, render)

    def alive(self):
        """Raises Interrupted when nobody waits for this command any more."""

    def say(self, sentence):
        """A remark beside the output."""
        if not self.as_json:
            click.echo(one_line(sentence), err=True)


pass_app = click.make_pass_decorator(App, ensure=True)


def remember(ctx, param, value):
    if value:
        ctx.ensure_object(App).flags[param.name] = value


COMMON = [
    click.Option(
        [flag, name] if name != flag[2:] else [flag],
        is_flag=name == "as_json",
        expose_value=False,
        callback=remember,
        hidden=True,
        help=text,
    )
    for flag, name, text in (
        ("--json", "as_json", "Print the hub's JSON, and errors as JSON, on standard output."),
        ("--hub", "hub", "URL of the hub (else ORCHESTRATIA_HUB_URL, else the saved one)."),
        ("--token", "token", "Token or key (else ORCHESTRATIA_TOKEN, ORCHESTRATIA_API_KEY)."),
        ("--project", "project", "Project by name or id (else ORCHESTRATIA_PROJECT_ID)."),
    )
]


class Common:
    """Help with an example, and the common options at every place of a command line."""

    def __init__(self, *args, example="", **attributes):
        super().__init__(*args, **attributes)
        self.example = example

    def get_params(self, ctx):
        return super().get_params(ctx) + COMMON

    def format_epilog(self, ctx, formatter):
        with formatter.section("Options of all commands"):
            formatter.write_dl([(option.opts[0], option.help) for option in COMMON])
        if self.example:
            with formatter.section("Example"):
                for line in self.example.split("\n"):
                    formatter.write(f"  {line}\n")


class Command(Common, click.Command):
    """`several`: options that take all words to the next option. `trailing`: words after `--`."""

    def __init__(self, *args, several=(), trailing=False, **attributes):
        super().__init__(*args, **attributes)
        self.several, self.trailing = several, trailing

    def parse_args(self, ctx, args):
        if self.trailing and "--" in args:
            cut = args.index("--")
            ctx.meta["trailing"], args = args[cut + 1 :], args[:cut]
        return super().parse_args(ctx, spread(args, self.several))


def spread(args, several):
    """`--opt A B` written as `--opt A --opt B` for the options in `several`."""
    out, current, fresh = [], None, False
    for number, arg in enumerate(args):
        if arg == "--":
            return out + args[number:]
        if current and fresh:
            out.append(arg)
            fresh = False
        elif arg.startswith("--") and arg.partition("=")[0] in several:
            current, fresh = arg.partition("=")[0], "=" not in arg
            out.append(arg)
        elif current and not arg.startswith("-"):
            out += [current, arg]
        else:
            current = None
            out.append(arg)
    return out


class Commands(Common, click.Group):
    command_class = Command
    group_class = type
    aliases = {"ls": "list", "status": "view", "show": "view", "view": "show"}

    def get_command(self, ctx, name):
        return super().get_command(ctx, name) or super().get_command(ctx, self.aliases.get(name))


class Root(Commands):
    """The boundary: whatever happens becomes a sentence and an exit code."""

    def main(self, args=None, **extra):
        args = list(sys.argv[1:] if args is None else args)
        before = args[: args.index("--")] if "--" in args else args
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):
                stream.reconfigure(errors="replace")
        extra.update(standalone_mode=False)
        sys.exit(self._run(args, "--json" in before, extra))

    def _run(self, args, as_json, extra):
        try:
            if any(re.search("[\ud800-\udfff]", arg) for arg in args):
                raise usage("The command line is not valid UTF-8.")
            return super().main(args, **extra) or 0
        except click.UsageError as error:
            return self._usage(error, as_json)
        except click.ClickException as error:
            return report(Problem(error.format_message(), "local"), as_json)
        except Problem as problem:
            return report(problem, as_json)
        except (click.Abort, KeyboardInterrupt):
            return report(Interrupted("Interrupted.", "interrupted"), as_json)
        except Exception as error:  # the last resort: a person must never meet a traceback
            if os.environ.get("ORCHESTRATIA_DEBUG"):
                raise
            fault = f"{type(error).__name__}: {error}"
            return report(
                Problem(
                    f"The hub's answer or this program is at fault ({one_line(fault)}). "
                    "ORCHESTRATIA_DEBUG=1 shows where.",
                    "internal",
                ),
                as_json,
            )

    def _usage(self, error, as_json):
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message())
        elif as_json:
            body = {"error": error.format_message(), "code": "usage", "fields": {}}
            click.echo(json.dumps(body, indent=2))
        else:
            hint = f"  ({error.ctx.command_path} --help)" if error.ctx else ""
            click.echo(f"Error: {clean(error.format_message())}{hint}", err=True)
        return EXIT_USAGE


class Interrupted(Problem):
    exit_code = EXIT_INTERRUPTED


def report(problem, as_json):
    """Prints a problem and returns its exit code."""
    if as_json:
        error = {"error": str(problem), "code": problem.code, "fields": problem.fields}
        click.echo(json.dumps(error, indent=2))
        return problem.exit_code
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    if problem.exit_code == EXIT_INTERRUPTED:
        click.echo(str(problem), err=True)
        return problem.exit_code
    click.echo(click.style("Error:", fg="red" if colour else None) + f" {clean(problem)}", err=True)
    for candidate in problem.fields.get("candidates") or ():
        click.echo(f"  {candidate_line(candidate)}", err=True)
    if problem.code in ("unauthorised", "unauthorized", "unauthenticated", "http_401"):
        click.echo("Sign in with: orchestratia login", err=True)
    return problem.exit_code


def candidate_line(candidate):
    if not isinstance(candidate, dict):
        return one_line(candidate)
    return "  ".join(one_line(value) for value in candidate.values() if value is not None)


def completing(kind, shown="name"):
    """What completes a name, or with `shown` an id, of the hub's `kind` of things."""

    def complete(ctx, param, incomplete):
        try:
            found = listed(ctx.find_object(App) or App(), kind)
        except Exception:  # nothing may be printed into the line somebody is typing
            return []
        key = "id" if shown == "id" else "name"
        return [
            shell_completion.CompletionItem(one[key], help=told(one))
            for one in found
            if str(one.get(key) or "").startswith(incomplete)
        ]

    return complete


def told(one):
    """What a completed name or id is about."""
    about = (one.get(name) for name in ("title", "subject", "sentence", "question", "pattern"))
    return exact_line(next(filter(None, about), ""))


def listed(app, kind):
    app.hub.patience, app.hub.attempts = COMPLETION_PATIENCE_S, 1
    query = COMPLETED.get(kind, {})
    found = app.hub.get(kind, project_id=app.project_id, **query)
    return (found if isinstance(found, list) else found.get(kind)) or []


# Which of the hub's things of a kind are offered for completion.
COMPLETED = {
    "tasks": {"limit": COMPLETION_TASKS},
    "permissions": {"status": "pending"},
    "interventions": {"status": "pending"},
    "alerts": {"status": "open"},
}


def named(kind, argument="name", **more):
    """The argument that names one of the hub's `kind` of things."""
    return click.argument(argument, shell_complete=completing(kind), **more)


def chosen_id(positional, option, default, needed=True):
    """The task a command is about: `ID`, `--id ID`, else in a session its own task."""
    if positional and option and task_ref(positional) != task_ref(option):
        raise usage("Two task ids are given; give ID or --id ID.")
    text = positional or option or (default and os.environ.get("ORCHESTRATIA_TASK_ID"))
    if not text and needed:
        raise usage("Missing argument 'ID': which task?")
    return task_ref(text) if text else None


task_ids = completing("tasks", "id")
id_option = click.option(
    "--id", "id_option", metavar="ID", help="The task, instead of ID.", shell_complete=task_ids
)


def task_argument(default=False, needed=True):
    """`ID` or `--id ID` as `task_id`; with `default`, a session's own task if neither is given."""

    def decorate(function):
        @click.argument("positional", metavar="[ID]", required=False, shell_complete=task_ids)
        @id_option
        @functools.wraps(function)
        def command(*args, positional, id_option, **options):
            task_id = chosen_id(positional, id_option, default, needed)
            return function(*args, task_id=task_id, **options)

        return command

    return decorate


def task_and(*names):
    """`TASK` (or `--id`, or the session's own) and then the arguments `names`."""

    def decorate(function):
        @click.argument("given_words", nargs=-1, metavar=" ".join(("[ID]", *map(str.upper, names))))
        @id_option
        @functools.wraps(function)
        def command(*args, given_words, id_option, **options):
            first = given_words[: len(given_words) - len(names)]
            if len(first) > 1 or len(given_words) < len(names):
                raise usage(f"Give a task ID{''.join(f' and {name.upper()}' for name in names)}.")
            task_id = chosen_id(first[0] if first else None, id_option, default=True)
            values = dict(zip(names, given_words[len(first) :], strict=True))
            return function(*args, task_id=task_id, **values, **options)

        return command

    return decorate


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    example="orchestratia login --hub http://127.0.0.1:8080\n"
    "orchestratia pipeline apply examples/ecommerce.yaml --watch",
)
@click.version_option(VERSION, "-V", "--version", message="orchestratia %(version)s")
def cli():
    """Drive an Orchestratia hub: projects, servers, sessions, tasks and pipelines.

    Exit codes: 0 done, 1 refused by the hub (or the work awaited has failed), 2 wrong usage,
    3 hub unreachable, 4 timed out waiting.
    """


# --- who am I ---------------------------------------------------------------------------------


def login_link(text):
    """(hub URL or None, login token) of a one-time link or a bare token."""
    if "://" not in text:
        return None, text
    parts = urlsplit(text)
    token = parse_qs(parts.query).get("token", [""])[0]
    if not token:
        raise usage("The link has no login token in it; copy it whole, with ?token=….")
    return f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/login')}", token


def ask_login(username, password_stdin):
    if not (sys.stdin.isatty() or password_stdin):
        raise usage("There is no terminal to ask for the password; use --password-stdin.")
    if password_stdin and not username:
        raise usage("--password-stdin needs --username.")
    username = username or click.prompt("Username")
    if password_stdin:
        return {"username": username, "password": sys.stdin.readline().rstrip("\r\n")}
    return {"username": username, "password": click.prompt("Password", hide_input=True)}


@cli.command(example="orchestratia login --hub http://127.0.0.1:8080 --username ada")
@click.argument("token_or_link", required=False)
@click.option("--username", help="Who you are; asked for if not given.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@pass_app
def login(app, token_or_link, username, password_stdin):
    """Sign in to a hub.

    The token is kept in cli.yaml, readable by you only.

    TOKEN_OR_LINK is the one-time login link the hub printed at its first start.
    """
    linked, token = login_link(token_or_link) if token_or_link else (None, None)
    url = hub_url(linked) if linked else app.credentials.url
    if not url and sys.stdin.isatty() and not password_stdin:
        url = hub_url(click.prompt("Hub URL"))
    if not url:
        raise usage("Which hub? Give --hub URL.")
    if url.startswith("http://") and not is_loopback(urlsplit(url).hostname):
        app.say(f"Note: {url} is not encrypted; others on the way can read your password.")
    body = {"login_token": token} if token else ask_login(username, password_stdin)
    answer = Hub(url).post("auth/login", body)
    if not isinstance(answer.get("token"), str):
        raise Problem(f"{url} gave no token; is it an Orchestratia hub?", "not_a_hub")
    path = save_config({**app.credentials.config, "hub_url": url, "token": answer["token"]})
    user = answer.get("user") or {}
    app.did(
        f"Signed in to {url} as {user.get('username', 'you')}. Saved in {path}.",
        {"hub_url": url, "user": user, "config": str(path)},
    )


@cli.command(example="orchestratia logout")
@pass_app
def logout(app):
    """Sign out: hub and cli.yaml forget the token."""
    who, hub = app.credentials, app.hub
    if who.config.get("token") == who.key:
        save_config({key: value for key, value in who.config.items() if key != "token"})
    app.did(f"Signed out of {who.url}.", hub.post("auth/logout"))


@cli.command(example="orchestratia whoami")
@pass_app
def whoami(app):
    """Show which hub you talk to, and as whom."""
    app.show(
        app.hub.get("auth/me"),
        lambda screen, me: identity_view(screen, {"hub_url": app.hub.url, **me}),
    )


def own_tasks(app, me):
    """The work in progress of whoever holds the key; for orchestrators and people, all of it."""
    if me.get("kind") in ("server", "session") and me.get("role") != "orchestrator":
        session = os.environ.get("ORCHESTRATIA_SESSION_ID") if me["kind"] == "server" else None
        return app.hub.get("tasks/check", session_id=session).get("tasks") or []
    found = app.hub.get("tasks", status=",".join(ACTIVE), project_id=app.project_id, limit=PAGE)
    return found.get("tasks") or []


ALSO_WAITING = {"permissions": "pending", "alerts": "open"}  # beside questions: list and status


def rows_of(app, kind, **query):
    """The rows of a list; none from a hub too old to have it."""
    try:
        return app.hub.get(kind, project_id=app.project_id, **query).get(kind) or []
    except Problem as problem:
        if problem.code in ("not_found", "http_404"):
            return []
        raise


@cli.command(example="orchestratia status --json")
@pass_app
def status(app):
    """Am I connected, who am I, what is going on.

    What is being worked on, and the questions, permission requests and alerts that wait.
    """
    me = app.hub.get("auth/me")
    if me.get("kind") in ("server", "session"):
        names = ("server_name", "server_status", "session_name", "project_name")
        standing = app.hub.get("status")
        me |= {name: standing.get(name) for name in names}
    tasks = own_tasks(app, me)
    counts = {name: sum(task.get("status") == name for task in tasks) for name in ACTIVE}
    waiting = app.hub.get("interventions", status="pending", project_id=app.project_id)
    found = {"connected": True, "hub_url": app.hub.url, **me, "tasks": tasks}
    found |= {"task_summary": {**counts, "total": len(tasks)}, "waiting": waiting}
    found |= {kind: rows_of(app, kind, status=status) for kind, status in ALSO_WAITING.items()}
    app.show(found, status_view)


# --- projects, servers ------------------------------------------------------------------------


@cli.group()
def project():
    """Projects: what servers, tasks and people belong to."""


@project.command("list", example="orchestratia project list")
@pass_app
def project_list(app):
    """List the projects you can see."""
    app.show(app.hub.get("projects"), show_projects)


@project.command("create", example='orchestratia project create "E-Commerce" --profile command')
@click.argument("name")
@click.option("--profile", help="The coding agent its tasks use by default.")
@pass_app
def project_create(app, name, profile):
    """Create a project."""
    made = app.hub.post("projects", {"name": not_empty(name, "NAME"), **given(profile=profile)})
    app.did(f"Created project {made.get('name')}  {made.get('id')}", made)


@project.command("show", example="orchestratia project show shop")
@named("projects")
@pass_app
def project_show(app, name):
    """Show one project by name or id."""
    app.show(app.hub.get(f"projects/{app.segment('projects', name)}"), project_detail)


@project.command("update", example='orchestratia project update shop --name "Web shop"')
@named("projects")
@click.option("--name", "new_name", help="What it is to be called.")
@click.option("--profile", help="The coding agent its tasks use by default.")
@pass_app
def project_update(app, name, new_name, profile):
    """Rename a project, or change its default profile."""
    body = given(name=not_empty(new_name, "--name"), profile=not_empty(profile, "--profile"))
    if not body:
        raise usage("Nothing to change: give at least one option.")
    made = app.hub.patch(f"projects/{app.segment('projects', name)}", body)
    app.did(f"Project {made.get('name')} changed", made, project_detail)


@project.command("use", example="orchestratia project use shop")
@named("projects", required=False)
@click.option("--none", "forget", is_flag=True, help="Forget it again.")
@pass_app
def project_use(app, name, forget):
    """Choose the project that commands are about when they do not say.

    It is kept in cli.yaml; --project and ORCHESTRATIA_PROJECT_ID come before it.
    """
    if bool(name) == forget:
        raise usage("Give a project's NAME, or --none.")
    found = app.hub.get(f"projects/{app.segment('projects', name)}") if name else {}
    rest = {key: value for key, value in app.credentials.config.items() if key != "project"}
    save_config(rest | given(project=found.get("id")))
    chosen = f"Using project {found.get('name')}" if name else "No project is chosen"
    app.did(chosen, {"project": found.get("id"), "project_name": found.get("name")})


@cli.group()
def hub():
    """The hub itself: backups of it while it runs, and beginning anew from one."""


@hub.command("backup", example="orchestratia hub backup hub-2026-11-23.tar")
@click.argument("file")
@pass_app
def hub_backup(app, file):
    """Save everything the hub has, as it is now. The file holds its secrets: keep it safe."""
    save(app, "hub/backup", file, "POST")


@hub.command("restore", example="orchestratia hub restore hub-2026-11-23.tar --yes")
@click.argument("file")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def hub_restore(app, file, yes):
    """Have the hub begin anew from a backup.

    What it has now is kept beside it. Everybody signs in anew, and no server takes new work until
    `server resume`: docs/operations.md says what else to expect.
    """
    app.confirm(f"Put {file} in the place of everything the hub at {app.hub.url} has?", yes)
    try:
        with open(file, "rb") as archive:
            made = app.hub.upload("hub/restore", archive)
    except OSError as error:
        raise Problem(f"Cannot read {file}: {error.strerror or error}.", "local") from None
    app.did(f"The hub begins anew from the backup of {made.get('made_at')}. Sign in again.", made)


STATE_MARKS = {"ok": ("●", "green"), "warn": ("▲", "yellow"), "bad": ("✗", "red")}


def findings_view(screen, found):
    """Each finding with what to do about it, what is wrong last, where one looks first."""
    parts = []
    for one in sorted(found, key=lambda one: list(STATE_MARKS).index(one["state"])):
        mark, colour = STATE_MARKS[one["state"]]
        line = Text(f"{mark if screen.fancy else one['state']:<5}", colour)
        line.append(f"{one_line(one['where'])} {one_line(one['check'])}: ", "bold")
        line.append(one_line(one["says"]))
        parts.append(line)
        if one["do"]:
            parts.append(Text(f"     → {one_line(one['do'])}", "dim"))
    return Stack(*parts)


def of_this_machine(app):
    """What the command line itself sees: the way to the hub, its clock, its version."""
    found, began = [], time.time()

    def say(check, state, says, do=""):
        found.append({"check": check, "state": state, "says": says, "do": do})

    answer = app.hub._send("GET", "health")
    theirs = answer.json().get("version")
    say("hub", "ok", f"{app.hub.url} answers; it has {theirs}, this command line {VERSION}.")
    with suppress(TypeError, ValueError):
        there = parsedate_to_datetime(answer.headers.get("Date")).timestamp()
        skew = round((began + time.time()) / 2 - there)
        fine = abs(skew) <= SKEW_S
        says, do = f"{skew:+d} s beside the hub's.", "" if fine else "Use NTP on both machines."
        say("clock", "ok" if fine else "warn", says, do)
    if not app.hub.url.startswith("https") and not is_loopback(urlsplit(app.hub.url).hostname):
        do = "Put a proxy with TLS in front of the hub and sign in by its https address."
        say("TLS", "bad", f"Your key travels to {app.hub.url} for anybody to read.", do)
    try:
        app.hub.socket("ws/dashboard").close()
        say("WebSocket", "ok", "Upgrades get through.")
    except Problem as problem:
        do = "Have the proxy pass on Upgrade and Connection; until then agents poll."
        say("WebSocket", "warn", str(problem), do)
    path = config_path()
    if path.exists() and path.stat().st_mode & 0o077:
        say("permissions", "bad", f"{path} may be read by others.", f"chmod go= {path}")
    return found


def of_the_agent_here():
    """What the agent beside this file finds, where one is registered."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.py")
    config = os.path.expanduser("~/.config/orchestratia/config.yaml")
    if not (os.path.exists(program) and os.path.exists(config)):
        return []
    done = subprocess.run(
        [sys.executable, program, "--doctor", "--json"], capture_output=True, text=True, timeout=90
    )
    with suppress(ValueError):
        return json.loads(done.stdout)
    says = one_line(done.stderr.strip()) or "it said nothing"
    return [{"check": "agent", "state": "bad", "says": says, "do": "Run agent.py --doctor."}]


@cli.command("doctor", example="orchestratia doctor")
@pass_app
def doctor(app):
    """Check the hub, the way to it and the agent here, and say what to do.

    What the hub finds is for its admins. Ends with 1 when something is broken.
    """
    found = [{"where": "here", **one} for one in of_this_machine(app)]
    found += [{"where": "agent", **one} for one in of_the_agent_here()]
    try:
        found += [{"where": "hub", **one} for one in app.hub.get("hub/doctor")["findings"]]
    except Problem as problem:
        if problem.code != "forbidden":
            raise
        app.say("What the hub finds is shown to its admins only.")
    app.show(found, findings_view)
    if any(one["state"] == "bad" for one in found):
        raise SystemExit(EXIT_REFUSED)


@cli.group()
def server():
    """Servers: machines that run sessions."""


@server.command("list", example="orchestratia server list")
@pass_app
def server_list(app):
    """List servers with state, free slots and repos."""
    app.show(app.hub.get("servers", project_id=app.project_id), show_servers)


@server.command("show", example="orchestratia server show dev-backend")
@named("servers")
@pass_app
def server_show(app, name):
    """Show one server by name or id."""
    app.show(app.hub.get(server_path(app, name)), server_detail)


@server.command("token", example="orchestratia server token --project shop --ttl 1h")
@click.option("--ttl", type=DURATION_TYPE, help="How long it may be used; 1 h by default.")
@click.option("--note", help="What it is for, shown in the list of tokens.")
@pass_app
def server_token(app, ttl, note):
    """Make a token that registers a new server.

    It can be used once; the commands to run on the server are printed with it.
    """
    answer = app.hub.post("servers/tokens", given(project_id=app.project_id, ttl_s=ttl, note=note))
    app.show(answer)
    if not app.as_json:
        print_token(app.screen, answer)


def server_path(app, name, *rest):
    return "/".join(("servers", app.segment("servers", name), *rest))


@server.command("drain", example="orchestratia server drain dev-backend")
@named("servers")
@pass_app
def server_drain(app, name):
    """Give a server no new work; what runs there goes on."""
    made = app.hub.post(server_path(app, name, "drain"))
    app.did(f"{made.get('name')} gets no new work", made)


@server.command("resume", example="orchestratia server resume dev-backend")
@named("servers")
@pass_app
def server_resume(app, name):
    """Give a drained server work again."""
    made = app.hub.post(server_path(app, name, "resume"))
    app.did(f"{made.get('name')} takes work again", made)


@server.command("revoke", example="orchestratia server revoke dev-backend --yes")
@named("servers")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def server_revoke(app, name, yes):
    """Take a server's key away for good; its work is routed anew.

    On a terminal it asks first.
    """
    app.confirm(f"Revoke {name}? It can only come back with a new token.", yes)
    made = app.hub.post(server_path(app, name, "revoke"))
    app.did(f"{made.get('name')} is revoked", made)


@server.command("rename", example="orchestratia server rename dev-backend dev-rust")
@named("servers")
@click.argument("new_name")
@pass_app
def server_rename(app, name, new_name):
    """Give a server another name."""
    made = app.hub.patch(server_path(app, name), {"name": not_empty(new_name, "NEW_NAME")})
    app.did(f"{name} is called {made.get('name')} now", made)


@server.command(
    "declare",
    several=("--language", "--framework", "--capability", "--repo"),
    example="orchestratia server declare dev-backend --language rust python --slots 8",
)
@named("servers")
@click.option("--repo", multiple=True, metavar="NAME=PATH…", help="A repo it has, and where.")
@click.option("--language", multiple=True, metavar="WORD…")
@click.option("--framework", multiple=True, metavar="WORD…")
@click.option("--capability", multiple=True, metavar="WORD…")
@click.option("--slots", type=click.IntRange(min=1), help="How many tasks it takes at once.")
@click.option(
    "--manual/--no-manual", default=None, help="Whether its workers are only started by hand."
)
@pass_app
def server_declare(app, name, repo, language, framework, capability, slots, manual):
    """Say what a server can do, instead of what it says itself.

    Each option replaces what was declared before; an empty one declares that there is none.
    """
    lists = {"languages": language, "frameworks": framework, "capabilities": capability}
    declared = {key: [word for word in words if word] for key, words in lists.items() if words}
    if repo:
        paths = pairs_of([text for text in repo if text], "--repo")
        declared["repos"] = {name: {"path": path} for name, path in paths.items()}
    body = given(declared=declared, slots=slots, manual=manual)
    if not body:
        raise usage("Nothing to declare: give at least one option.")
    made = app.hub.patch(server_path(app, name), body)
    app.did(f"Declared for {made.get('name')}", made, server_detail)


TO_TYPE = {
    "script": "Installs everything on the new server, registers and starts it",
    "register": "Or by hand, with agent.py: registers it",
    "run": "Runs its agent",
}


def print_token(screen, answer):
    project_name = one_line(answer.get("project_name") or "")
    left = seconds_between(datetime.now(UTC).isoformat(), answer.get("expires_at"))
    until = f", within {lasting(round(left), 1)}" if left else ""
    screen.print(Text(f"One new server may join {project_name or 'the project'}{until}.", "bold"))
    screen.print(Text("The token is shown this once:", "dim"))
    screen.line(answer.get("token") or "")
    for name, commands in (answer.get("commands") or {}).items():
        screen.print(Text(f"\n{TO_TYPE.get(name, one_line(name))}:", "dim"))
        for line in commands if isinstance(commands, list) else str(commands).split("\n"):
            screen.line(line)


# --- users ------------------------------------------------------------------------------------


@cli.group()
def user():
    """Users: who may sign in, and their rights."""


def user_path(name):
    return f"users/{quote(not_empty(name, 'NAME'), safe='')}"


def new_password(password_stdin):
    if password_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise usage("There is no terminal to ask for the password; use --password-stdin.")
    return click.prompt("Password", hide_input=True, confirmation_prompt=True)


def roles_of(texts):
    """{project: role or None} of `PROJECT=ROLE` words."""
    roles = pairs_of(texts, "--role")
    for role in roles.values():
        if role not in (*ROLES, "none"):
            raise usage(f"{role!r} is no role; use {', '.join(ROLES)} or none.")
    return {project: None if role == "none" else role for project, role in roles.items()}


role_option = click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="PROJECT=ROLE",
    help="viewer, operator or admin of a project, or none; repeatable.",
)
password_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from standard input."
)


@user.command("list", example="orchestratia user list")
@pass_app
def user_list(app):
    """List users with their rights."""
    app.show(app.hub.get("users"), show_users)


@user.command("show", example="orchestratia user show ada")
@click.argument("name")
@pass_app
def user_show(app, name):
    """Show one user by name or id."""
    app.show(app.hub.get(user_path(name)), user_detail)


@user.command("create", example="orchestratia user create ada --role shop=operator")
@click.argument("name")
@role_option
@click.option("--admin", is_flag=True, help="An admin of the hub, who may do everything.")
@password_option
@pass_app
def user_create(app, name, roles, admin, password_stdin):
    """Create a user; the password is asked for."""
    roles = {project: role for project, role in roles_of(roles).items() if role}
    body = {"username": not_empty(name, "NAME"), "is_admin": admin, "roles": roles}
    made = app.hub.post("users", body | {"password": new_password(password_stdin)})
    app.did(f"Created user {made.get('username')}", made, user_detail)


@user.command("update", example="orchestratia user update ada --role shop=admin --role lab=none")
@click.argument("name")
@role_option
@click.option("--admin/--no-admin", default=None, help="Whether an admin of the hub.")
@click.option("--disable/--enable", default=None, help="Whether kept from signing in.")
@click.option("--password", "ask_password", is_flag=True, help="Set a new password; asked for.")
@password_option
@pass_app
def user_update(app, name, roles, admin, disable, ask_password, password_stdin):
    """Change a user's rights or password; roles not named stay as they are."""
    body = given(is_admin=admin, disabled=disable)
    if ask_password or password_stdin:
        body["password"] = new_password(password_stdin)
    if roles:
        body["roles"] = merged_roles(app, name, roles_of(roles))
    if not body:
        raise usage("Nothing to change: give at least one option.")
    made = app.hub.patch(user_path(name), body)
    app.did(f"User {made.get('username')} changed", made, user_detail)


def merged_roles(app, name, changes):
    """All roles of a user by project id, with `changes` by project name or id."""
    had = app.hub.get(user_path(name)).get("roles") or {}
    ids = {
        project: app.hub.get(f"projects/{app.segment('projects', project)}")["id"]
        for project in changes
    }
    merged = had | {ids[project]: role for project, role in changes.items()}
    return {project: role for project, role in merged.items() if role}


@user.command("delete", example="orchestratia user delete ada --yes")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def user_delete(app, name, yes):
    """Delete a user and end their tokens.

    On a terminal it asks first.
    """
    app.confirm(f"Delete the user {name}?", yes)
    app.did(f"User {name} deleted", app.hub.delete(user_path(name)))


# --- sessions ---------------------------------------------------------------------------------


@cli.group()
def session():
    """Sessions: the terminals that workers run in."""


def session_path(app, name, *rest):
    return "/".join(("sessions", app.segment("sessions", name), *rest))


@session.command("list", example="orchestratia session list --all")
@click.option("--all", "everything", is_flag=True, help="Also those that are over.")
@click.option("--status", help="Only those in this state.")
@pass_app
def session_list(app, everything, status):
    """List live sessions."""
    query = given(project_id=app.project_id, all=1 if everything else None, status=status)
    app.show(app.hub.get("sessions", **query), show_sessions)


@session.command("show", example="orchestratia session show dev-01")
@named("sessions")
@pass_app
def session_show(app, name):
    """Show one session by name or id."""
    app.show(app.hub.get(session_path(app, name)), session_detail)


@session.command(
    "start",
    trailing=True,
    options_metavar="[OPTIONS] [-- PROGRAM ARGUMENT…]",
    example="orchestratia session start dev-backend --attach\n"
    "orchestratia session start dev-backend --name watcher -- tail -f build.log",
)
@named("servers", "server_name", metavar="SERVER")
@click.option("--name", help="What it is called; a name is made up if left out.")
@click.option("--dir", "working_dir", metavar="DIR", help="Where it starts, on that server.")
@click.option("--profile", help="The coding agent it runs; a shell if left out.")
@click.option("--model", help="The model it uses.")
@click.option("--mode", help="How much it asks: one of its profile's modes.")
@click.option("--role", type=click.Choice(["worker", "orchestrator", "plain"]))
@click.option("--task", "task_id", metavar="ID", help="The task there that it is to work on.")
@click.option("--attach", is_flag=True, help="Attach to it at once.")
@click.pass_context
@pass_app
def session_start(app, ctx, server_name, attach, **fields):
    """Start a session on a server: a shell, or the program after --."""
    body = {"server_id": server_name, **given(command=ctx.meta.get("trailing"), **fields)}
    if not attach:
        made = app.hub.post("sessions", body)
        return app.did(f"Session {made.get('name')} is starting", made, session_detail)
    need_terminal()
    cols, rows = own_size()
    Attachment(app, app.hub.post("sessions", body | {"cols": cols, "rows": rows})).run()


@session.command("attach", example="orchestratia session attach dev-01")
@named("sessions")
@click.option("--read-only", is_flag=True, help="Only watch: nothing is typed, the size is left.")
@click.option("--no-resize", is_flag=True, help="Leave the session's size as it is.")
@pass_app
def session_attach(app, name, read_only, no_resize):
    """See a session as it happens and type into it, in this terminal.

    Ctrl-] d detaches, Ctrl-] ? tells the other keys. The session goes on when you leave.

    Without a terminal it only watches: what is printed goes to standard output.
    """
    need_terminal()
    Attachment(app, app.hub.get(session_path(app, name)), read_only, no_resize).run()


@session.command("screen", example="orchestratia session screen dev-01")
@named("sessions")
@pass_app
def session_screen(app, name):
    """Print what the session's screen shows now."""
    app.show(
        app.hub.get(session_path(app, name, "screen")),
        lambda screen, data: Text("\n".join(clean(line) for line in data.get("lines") or ())),
    )


@session.command("send", example='orchestratia session send dev-01 "run the tests again"')
@named("sessions")
@click.argument("text")
@pass_app
def session_send(app, name, text):
    """Type TEXT into a session and submit it.

    Write it after -- if it begins with a dash.
    """
    app.did(f"Sent to {name}.", app.hub.post(session_path(app, name, "input"), {"text": text}))


@session.command("input", example="printf '\\003' | orchestratia session input dev-01 -   # Ctrl-C")
@named("sessions")
@click.argument("text")
@pass_app
def session_input(app, name, text):
    """Pass raw keystrokes to a session: TEXT as it is, not submitted.

    Write it after -- if it begins with a dash; - alone reads bytes from standard input.
    """
    data = sys.stdin.buffer.read() if text == "-" else text.encode()
    body = {"data": base64.b64encode(data).decode()}
    app.did(f"Passed to {name}.", app.hub.post(session_path(app, name, "input"), body))


@session.command("close", example="orchestratia session close dev-01 --force")
@named("sessions")
@click.option("--force", is_flag=True, help="Kill what runs in it.")
@pass_app
def session_close(app, name, force):
    """Close a session."""
    answer = app.hub.post(session_path(app, name, "close"), {"force": True} if force else {})
    app.did(f"Closing {name}.", answer)


class Log:
    """Writes a session's output as it comes in: as it is, cleaned for reading, or as JSON lines."""

    def __init__(self, app, raw):
        self.app, self.raw, self.rest = app, raw, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.decode = self.decoder.decode
        self.collected = []
        self.marks = []  # what was missing so far

    def write_marked(self, block, offset, asked, marks):
        """The block that begins at `offset`, with what is missing in it and, from where it was
        asked for, before it."""
        end = offset + len(block)
        for mark in marks:
            start, stop = mark["from"], mark["to"]
            known = any(mark["from"] == said["from"] for said in self.marks)
            if known or start >= end or (start + 1 if stop is None else stop) <= asked:
                continue
            cut = max(0, start - offset)
            self.write(block[:cut])
            block, offset = block[cut:], offset + cut
            self.missing(mark, max(start, asked))
        self.write(block)

    def missing(self, mark, start):
        self.marks.append(mark)
        size = "output" if mark["to"] is None else size_text(mark["to"] - start)
        what = "removed" if mark["kind"] == "removed" else "missing"
        self.write(self.decoder.decode(b"", final=True).encode())
        self.decoder.reset()
        if self.app.as_json:
            return
        if self.rest:
            click.echo(self._readable(self.rest))
            self.rest = ""
        # Raw output is the bytes as they were: what is said about them goes elsewhere.
        click.echo(f"… {size} {what}: {one_line(mark['why'])} …", err=self.raw)

    def write(self, block):
        if self.app.as_json:
            text = self.decode(block)
            self.collected.append(text)
            return
        if self.raw:
            sys.stdout.buffer.write(block)
            return sys.stdout.buffer.flush()
        *lines, self.rest = (self.rest + self.decode(block)).split("\n")
        click.echo("".join(f"{self._readable(line)}\n" for line in lines), nl=False)

    def close(self):
        if self.rest:
            click.echo(self._readable(self.rest))

    @staticmethod
    def _readable(line):
        # A carriage return overwrites: of a progress bar only the last picture is read.
        return clean(ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2])


@session.command("logs", example="orchestratia session logs dev-01 --follow")
@named("sessions")
@click.option("--follow", "-f", is_flag=True, help="Go on until the session is over.")
@click.option("--raw", is_flag=True, help="The bytes as they are, with their colours and controls.")
@pass_app
def session_logs(app, name, follow, raw):
    """Print the complete output of a session."""
    found = app.hub.get(session_path(app, name))
    path, offset = f"sessions/{found['id']}", 0
    log = Log(app, raw)
    while True:
        over = not follow or found.get("status") in SESSION_OVER
        offset = drain(app, path, offset, log)
        if app.as_json and follow:
            flush_json(log, offset)
        if over:
            break
        time.sleep(FOLLOW_INTERVAL_S)
        found = app.hub.get(path)
    log.close()
    if not follow:
        text = "".join(log.collected)
        shown = {"session_id": found["id"], "output": text, "next_offset": offset}
        app.show(shown | {"marks": log.marks})


def drain(app, path, offset, log):
    """Reads the log from `offset` to its present end, and returns that."""
    marks = None
    while True:
        block, begins, following = app.hub.output(f"{path}/output", offset)
        if not block and begins == offset:
            return following
        if marks is None or begins > offset:
            marks = app.hub.get(f"{path}/marks")["marks"]
        log.write_marked(block, begins, offset, marks)
        offset = following


def size_text(size):
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def flush_json(log, offset):
    if log.collected:
        click.echo(json.dumps({"output": "".join(log.collected), "next_offset": offset}))
        log.collected.clear()


@session.command("scrollback", example="orchestratia session scrollback dev-01 | tail -100")
@named("sessions")
@pass_app
def session_scrollback(app, name):
    """Print what has scrolled off the session's screen, and the screen."""
    wire = TerminalWire(app.hub, app.hub.get(session_path(app, name))["id"])
    try:
        wire.connect()
        wire.send("scrollback")
        found = wire.next("scrollback", "error")
    finally:
        wire.close()
    if found["type"] == "error":
        raise Problem(one_line(found.get("detail") or "The hub refused that."), found.get("code"))
    lines = found.get("lines") or []
    app.show(
        {"lines": lines},
        lambda screen, data: Text("\n".join(clean(line) for line in lines)),
    )


@session.command(
    "recording", example="orchestratia session recording dev-01 -o dev-01.cast   # asciinema play"
)
@named("sessions")
@click.option("--output", "-o", metavar="FILE", default="-", help="Instead of standard output.")
@pass_app
def session_recording(app, name, output):
    """Download a session as an asciicast: everything it printed, with its timing."""
    path = session_path(app, name, "recording")
    if output == "-":
        return app.hub.download(path, sys.stdout.buffer)
    save(app, path, output)


def save(app, path, output, method="GET"):
    """Writes what the hub answers to a file for the owner alone, whole or not at all."""
    scratch = f"{output}.part"
    try:
        with open(scratch, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            app.hub.download(path, file, method)
        os.replace(scratch, output)
    except OSError as error:
        raise Problem(f"Cannot write {output}: {error.strerror or error}.", "local") from None
    finally:
        with suppress(OSError):
            os.unlink(scratch)
    size = os.path.getsize(output)
    app.did(f"Saved {output}, {size:,} bytes.", {"file": output, "bytes": size})


# --- a session in this terminal ---------------------------------------------------------------

PREFIX = b"\x1d"  # Ctrl-]
KEYS = "Ctrl-] and then: d detach, t take the size, s scrollback, Ctrl-] types Ctrl-]"
NOTICE_S = 4
FRAME_TIMEOUT_S = 20
AWAY = "lost the connection to the hub; trying again…"
# Reports of the mouse and of the focus come without a key being pressed.
UNTYPED = re.compile(rb"(?:\x1b\[(?:[IO]|<[0-9;]*[Mm]|M.{3}))*", re.S)

# A session's output is a stranger's. What paints is passed on; what asks the terminal something
# (the answer would be typed), sets clipboard or title, or leaves something behind is not.
SEQUENCE = re.compile(
    rb"(?P<paints>\x1b\[[0-9;:]*[@-MPSTXZ`abdefgmrsu]|\x1b\[[0-9]* q|\x1b\[4[hl]"
    rb"|\x1b[78DEHM=>]|\x1b[()][0AB])"
    rb"|\x1b\[\?(?P<modes>[0-9;]*[hl])"
    rb"|(?P<reset>\x1bc)"
    rb"|(?P<cut>\x1b(?:\[[0-?]*[ -/]*|[ -/]+|[]PX^_][^\x07\x18\x1a\x1b]*\x1b?)?\Z|\xc2\Z)"
    rb"|\x1b[]PX^_][^\x07\x18\x1a\x1b]*(?:[\x07\x18\x1a]|\x1b\\|(?=\x1b[^\\]))"
    rb"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]|\x1b|\x05|\xc2(?![\xa0-\xbf])[\x80-\x9f]?"
)
AUTOWRAP, CURSOR = b"7", b"25"
UNDONE = b"1;6;12;1000;1002;1003;1004;1005;1006;1015;2004;2026"  # modes that are off by themselves
MODES = {AUTOWRAP, CURSOR, *UNDONE.split(b";")}
ALTERNATE = {b"47", b"1047", b"1049"}
CLEAR = b"\x1b[m\x1b[H\x1b[2J"
PLAIN = b"\x1b\\\x1b[!p\x1b[?" + UNDONE + b"l\x1b[?7;25h\x1b>\x1b(B\x0f\x1b[0 q\x1b[r\x1b[m"
OPEN, SHUT = b"\x1b[?1049h" + PLAIN + CLEAR, PLAIN + CLEAR + b"\x1b[?1049l"


class Painter:
    """Lets through of a session's output what paints, however it is cut into blocks."""

    def __init__(self):
        self.rest, self.wraps = b"", True

    def feed(self, data):
        data, self.rest = self.rest + data, b""
        return SEQUENCE.sub(self._passed, data)

    def _passed(self, match):
        kind, found = match.lastgroup, match[0]
        if kind == "cut":
            string = found[1:2] in (b"]", b"P", b"X", b"^", b"_") and found[1:2]
            # Of a string only its beginning is kept, so that an endless one takes no memory.
            last = b"\x1b" if string and found.endswith(b"\x1b") else b""
            self.rest = b"\x1b" + string + last if string else found[:64]
        elif kind == "modes":
            return self._modes(set(match["modes"][:-1].split(b";")), found[-1:])
        return {"paints": found, "reset": CLEAR}.get(kind, b"")

    def _modes(self, modes, end):
        # The picture has an alternate screen to itself; the session's own one is a clear page.
        page = CLEAR if modes & ALTERNATE else b""
        kept = sorted(modes & MODES if self.wraps else modes & MODES - {AUTOWRAP})
        return page + (b"\x1b[?%b%b" % (b";".join(kept), end) if kept else b"")


def need_terminal():
    if not termios:
        raise Problem(
            "Attaching needs a terminal of Linux, macOS or WSL. On Windows open the session's "
            "page in the browser.",
            "local",
        )


def own_size():
    """(columns, rows) of this terminal, within what a hub takes."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        found = (0, 0)
    return tuple(min(max(n or usual, 2), 500) for n, usual in zip(found, (80, 24), strict=True))


class Window:
    """This terminal while a session has it: raw, on its alternate screen, later as it was."""

    def __init__(self):
        self.output = sys.stdout.fileno()
        self.paints = sys.stdout.isatty()
        self.input = sys.stdin.fileno() if self.paints and sys.stdin.isatty() else None
        self.painter, self.lock = Painter(), threading.RLock()
        self.saved, self.notice, self.entered = None, "", False
        self.picture = own_size()

    def __enter__(self):
        self.enter()
        return self

    def __exit__(self, *error):
        self.leave()

    def enter(self):
        if self.input is not None:
            self.saved = termios.tcgetattr(self.input)
            tty.setraw(self.input, termios.TCSADRAIN)  # what was typed meanwhile counts
        self.entered = True
        if self.paints:
            self.write(OPEN)

    def leave(self):
        if not self.entered:
            return
        # A terminal that takes nothing any more must not keep anyone from leaving.
        held = self.lock.acquire(timeout=1)
        self.entered = False
        with suppress(OSError):
            if self.paints:
                self.write(SHUT)
        if self.saved:
            with suppress(termios.error):  # it may have gone
                termios.tcsetattr(self.input, termios.TCSAFLUSH, self.saved)
        if held:
            self.lock.release()

    def keys(self):
        """What was typed, at least a byte; nothing when the terminal has gone."""
        try:
            return os.read(self.input, 32768)
        except OSError:
            return b""

    def write(self, data):
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self.output, left[:8192]) :]
            except BlockingIOError:  # another program has set the terminal so
                select.select([], [self.output], [])

    def paint(self, data, fresh=False):
        """Writes what a session printed; `fresh` output is a whole new picture."""
        with self.lock:
            if fresh:
                self.painter.rest = b""
            start = PLAIN + self._wrapping() + CLEAR if fresh and self.paints else b""
            self.write(start + self.painter.feed(data) + self._margins() + self._banner())

    def fit(self, cols, rows):
        """How large the picture is. Where it is wider than the terminal its lines are cut."""
        with self.lock:
            self.picture, self.painter.wraps = (cols, rows), cols <= own_size()[0]
            if self.paints and self.entered:
                self.write(self._wrapping() + self._margins())

    def _wrapping(self):
        return b"\x1b[?7h" if self.painter.wraps else b"\x1b[?7l"

    def _margins(self):
        """Keeps what is beside a smaller picture empty: it was of a larger one."""
        (cols, rows), (wide, high) = own_size(), self.picture
        if not (self.paints and self.entered) or (wide >= cols and high >= rows):
            return b""
        beside = "".join(f"\x1b[{row};{wide + 1}H\x1b[K" for row in range(1, min(high, rows) + 1))
        below = f"\x1b[{high + 1};1H\x1b[J"
        parts = (beside if wide < cols else "") + (below if high < rows else "")
        return f"\x1b7\x1b[?6l\x1b[m{parts}\x1b8".encode()

    def tell(self, text, bell=False):
        """Shows a notice over the last lines, until a new picture without it is asked for."""
        self.notice = text
        if self.lock.acquire(timeout=0.2):  # else whoever is writing shows it
            try:
                self.write(self._banner() + (b"\a" if bell and self.paints else b""))
            finally:
                self.lock.release()

    def _banner(self):
        if not (self.notice and self.paints and self.entered):
            return b""
        cols, rows = own_size()
        lines = textwrap.wrap(one_line(self.notice), max(cols - 2, 1))[:rows]
        banner = "".join(
            f"\x1b[{row};1H{set_cell_size(f' {line}', cols)}"
            for row, line in enumerate(lines, rows - len(lines) + 1)
        )
        return f"\x1b7\x1b[?6l\x1b[0;7m{banner}\x1b8".encode()


class TerminalWire:
    """One session's socket at the hub, and where in its output the next connection goes on."""

    REFUSALS = {4401: "unauthorised", 4403: "forbidden", 4404: "not_found"}
    PASSING = (4408, 4429)  # too slow, too many: these pass

    def __init__(self, hub, session_id):
        self.hub, self.path = hub, f"ws/terminal/{session_id}"
        self.socket, self.offset, self.sentence = None, None, ""

    def connect(self):
        """Raises Unreachable, and Problem when the hub refuses."""
        self.socket = self.hub.socket(self.path)
        self.send("resume", offset=self.offset)

    def send(self, kind, **fields):
        """Sends a frame; False when there is no connection for it."""
        socket = self.socket
        if not socket:
            return False
        try:
            socket.send(json.dumps({"type": kind, **fields}))
        except (OSError, websockets().exceptions.ConnectionClosed):
            return False
        return True

    def receive(self, timeout=None):
        """The next frame, None when the connection has ended. Raises Problem if it was refused."""
        while True:
            try:
                frame = json.loads(self.socket.recv(timeout))
            except websockets().exceptions.ConnectionClosed as closed:
                return self._ended(closed.rcvd)
            except (ValueError, RecursionError):  # no JSON
                continue
            if isinstance(frame, dict):
                if frame.get("type") == "error":
                    self.sentence = one_line(frame.get("detail") or "")
                return frame

    def next(self, *kinds):
        """The next frame of one of these kinds. Raises Unreachable when there is none."""
        with suppress(TimeoutError):
            while (frame := self.receive(FRAME_TIMEOUT_S)) is not None:
                if frame.get("type") in kinds:
                    return frame
        raise Unreachable(
            f"The hub at {self.hub.url} does not say what is in the session; try again.",
            "unreachable",
        )

    def _ended(self, close):
        socket, self.socket = self.socket, None
        socket.close()
        if close and 4400 <= close.code < 4500 and close.code not in self.PASSING:
            sentence = self.sentence or one_line(close.reason) or f"Closed with {close.code}."
            raise Problem(sentence, self.REFUSALS.get(close.code, "refused"))

    def close(self):
        if socket := self.socket:
            socket.close()


class Size(NamedTuple):
    """Of a session's terminal, and who has set it."""

    cols: int
    rows: int
    owner: str
    yours: bool


class Attachment:
    """A session in this terminal: a thread paints what the hub sends, this one reads the keys."""

    def __init__(self, app, session, read_only=False, no_resize=False):
        self.app, self.session = app, session
        self.window, self.wire = Window(), TerminalWire(app.hub, session["id"])
        self.read_only = read_only or self.window.input is None
        self.resizes = not (self.read_only or no_resize)
        self.state, self.size, self.history = session, None, None  # as the hub says
        self.prefixed, self.typed, self.notice_ends = False, False, None
        self.outcome, self.exit_code, self.problem = None, None, None
        self.over, self.pause = threading.Event(), RECONNECT_S
        self.waker, self.alarm = os.pipe()
        os.set_blocking(self.alarm, False)
        self.takes = {
            "state": self._take_state,
            "size": self._take_size,
            "output": self._take_output,
            "scrollback": self._take_scrollback,
            "error": self._take_error,
            "closed": self._take_closed,
        }

    @property
    def name(self):
        return one_line(self.session.get("name") or self.session["id"])

    def run(self):
        """Until the session or the person ends it. Raises Problem."""
        try:
            self.wire.connect()
            while not (self.size or self.outcome):
                self._take(self.wire.next(*self.takes))
            self._last_words() if self._is_over() else self._share()
        except KeyboardInterrupt:
            if self.window.input is not None:  # where it is a key like any other
                raise
            self._end("detached")
        finally:
            self.over.set()
            self.wire.close()
        if self.problem:
            raise self.problem
        self._farewell()

    def _is_over(self):
        return self.state.get("status") in ("closed", "failed")

    def _last_words(self):
        """Of a session that is over there is only its last output to show."""
        while not self.outcome:
            self._take(self.wire.next("output", "closed"))

    def _share(self):
        greeting = " ".join(filter(None, (self._greeting(), self._too_small(), self._absent())))
        self.app.say(greeting)
        with self._signals(), self.window:
            self._fit()
            if self.window.paints:
                self._note(greeting)
            threading.Thread(target=self._listen, daemon=True).start()
            while not self.outcome:
                self._step()

    def _greeting(self):
        where = one_line(self.state.get("server_name") or "its server")
        if self.window.input is None:
            return f"Watching {self.name} on {where}. Ctrl-C leaves."
        role = "Watching" if self.read_only else "Attached to"
        return f"{role} {self.name} on {where}. Ctrl-] d detaches, Ctrl-] ? tells more."

    def _too_small(self):
        """A sentence when the picture does not fit and stays so."""
        cols, rows = own_size()
        size = self.size
        ours = size.yours or (self.resizes and not size.owner)
        if ours or not self.window.paints or (size.cols <= cols and size.rows <= rows):
            return ""
        remedy = "" if self.read_only else " Ctrl-] t takes the size."
        owner = f", set by {size.owner}" if size.owner else ""
        return (
            f"{self.name} is {size.cols}×{size.rows}{owner}; this terminal of {cols}×{rows} shows "
            f"a part of it.{remedy}"
        )

    def _taken(self):
        size = f"{self.size.cols}×{self.size.rows}"
        return f"{self.size.owner} has set {self.name} to {size}. Ctrl-] t takes the size back."

    def _absent(self):
        """A sentence when the session goes on where the hub cannot reach it."""
        is_there = self.state.get("status") not in ("disconnected", "lost")
        reached = ("server_online", "connected")
        if is_there and all(self.state.get(name, True) for name in reached):
            return ""
        server = one_line(self.state.get("server_name") or "Its server")
        return f"{server} is away: nothing can be typed until it is back."

    def _farewell(self):
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        if self.outcome == "closed":
            logs = f"orchestratia session logs {self.name}"
            self.app.say(f"Session {self.name} has ended{code}. All it printed: {logs}")
        else:
            self.app.say(f"Detached from {self.name}; it goes on.")
        self.app.show(
            {
                "session_id": self.session["id"],
                "outcome": self.outcome,
                "exit_code": self.exit_code,
            }
        )

    @contextmanager
    def _signals(self):
        """However the program is ended, the terminal is put back; a new size is passed on."""

        def leave(number, frame):
            raise SystemExit(128 + number)

        handlers = {signal.SIGTERM: leave, signal.SIGHUP: leave}
        handlers[signal.SIGWINCH] = lambda number, frame: None  # its byte is enough
        # A signal may come after Python last looked and before the wait begins: its byte ends that.
        alarm = signal.set_wakeup_fd(self.alarm, warn_on_full_buffer=False)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.set_wakeup_fd(alarm)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wake(self):
        with suppress(BlockingIOError):
            os.write(self.alarm, b"\0")

    def _end(self, outcome, problem=None):
        """The first reason to end is the one that counts."""
        if not self.outcome:
            self.outcome, self.problem = outcome, problem
            self._wake()

    def _note(self, text, bell=False):
        if not self.window.paints:
            return self.app.say(text)
        self.window.tell(text, bell)
        self.notice_ends = time.monotonic() + NOTICE_S
        self._wake()

    # What the person does.

    def _step(self):
        """Waits for a key, a frame that concerns us, a new size, or the end of a notice."""
        inputs = [self.waker] if self.window.input is None else [self.waker, self.window.input]
        ready, _, _ = select.select(inputs, [], [], time_left(self.notice_ends))
        if self.waker in ready and signal.SIGWINCH in os.read(self.waker, 4096):
            self._fit()
            if not self.size.yours:  # else the session redraws itself
                self._repaint()
        if self.window.input in ready:
            self._read_keys()
        if self.history is not None:
            self._show_history()
        if time_left(self.notice_ends) == 0:
            self.notice_ends = None
            if self.wire.socket:  # else the notice is that it is away, and stays
                self.window.notice = ""
                self._repaint()

    def _read_keys(self):
        data = self.window.keys()
        if not data:
            self._end("detached")
        while data and not self.outcome:
            if self.prefixed:
                self.prefixed, key, data = False, data[:1], data[1:]
                self._command(key)
            else:
                typed, prefix, data = data.partition(PREFIX)
                self.prefixed = bool(prefix)
                self._type(typed)

    def _type(self, data):
        if not data:
            return
        if self.read_only:
            if b"\x03" in data:
                return self._end("detached")
            refusal = "You only watch here. Ctrl-] d detaches."
        elif self.wire.send("input", data=base64.b64encode(data).decode()):
            self.typed = True
            return
        else:
            refusal = f"Not typed: {AWAY}"
        if not UNTYPED.fullmatch(data):
            self._note(refusal, bell=True)

    def _command(self, key):
        if key == b"d":
            self._end("detached")
        elif key == PREFIX:
            self._type(PREFIX)
        elif key == b"t" and not self.read_only:
            self.resizes = True
            cols, rows = own_size()
            self._ask("take_size", cols=cols, rows=rows)
        elif key == b"s":
            self._ask("scrollback")
        else:
            self._note(KEYS)

    def _ask(self, kind, **fields):
        if not self.wire.send(kind, **fields):
            self._note(f"Not done: {AWAY}", bell=True)

    def _fit(self):
        """Gives the session the size of this terminal, if it is for us to give."""
        cols, rows = own_size()
        self.window.fit(self.size.cols, self.size.rows)
        if self.resizes:
            self.wire.send("resize", cols=cols, rows=rows)

    def _repaint(self):
        if self.window.paints:
            self.wire.send("resume", offset=None)

    def _show_history(self):
        """Leaves the scrollback in the terminal's own, where it can be scrolled and copied."""
        lines, self.history = self.history, None
        lines.append(f"── scrollback of {self.name}; any key goes back ──")
        with self.window.lock:
            self.window.write(SHUT + "".join(f"{clean(line)}\r\n" for line in lines).encode())
            if not self.window.keys():
                self._end("detached")
            self.window.write(OPEN)
        self._repaint()

    # What the hub says.

    def _listen(self):
        """Paints until the end, over as many connections as it takes."""
        try:
            while not self.outcome:
                frame = self.wire.receive()
                if frame is not None:
                    self._take(frame)
                elif not self.outcome:
                    self._come_back()
        except BrokenPipeError:  # whoever read our output has seen enough
            self._end("detached")
        except Exception as error:  # handed to the thread that shows it
            self._end("failed", error)

    def _come_back(self):
        self._note(AWAY.capitalize())
        while not self.over.wait(self.pause * random.uniform(0.5, 1)):
            self.pause = min(self.pause * 1.5, 5)
            with suppress(Unreachable):
                self.wire.connect()
                self._fit()
                return self._note("Connected again.")

    def _take(self, frame):
        with suppress(KeyError, TypeError, ValueError):  # what is not as agreed changes nothing
            self.takes[frame["type"]](frame)
            self.pause = RECONNECT_S

    def _take_state(self, frame):
        was_absent, self.state = self._absent(), frame
        if frame.get("may_type") is False:
            self.read_only, self.resizes = True, False
        if self.window.entered and was_absent != self._absent():
            self._note(self._absent() or f"{one_line(frame.get('server_name') or '')} is back.")
            self._fit()

    def _take_size(self, frame):
        before, owner = self.size, one_line(frame.get("owner") or "")
        yours = frame.get("yours") is True
        self.size = Size(int(frame["cols"]), int(frame["rows"]), owner, yours)
        if not self.window.entered or self.size == before:
            return
        self.window.fit(self.size.cols, self.size.rows)
        if not (yours or owner):
            self._fit()  # whoever held it has left
        if lost := self._too_small() or (before.yours and owner and self._taken()):
            self._note(lost)

    def _take_output(self, frame):
        data, offset = base64.b64decode(frame["data"], validate=True), int(frame["offset"])
        fresh, known = frame.get("repaint") is True, self.wire.offset
        if not fresh and known is not None and offset < known:
            data, offset = data[known - offset :], known
        elif not fresh and known is not None and offset > known:
            self._repaint()
        self.wire.offset = offset + len(data)
        if self.window.entered:
            self.window.paint(data, fresh)
        elif self._is_over() and not self.app.as_json:
            lines = [Log._readable(line) for line in data.decode("utf-8", "replace").split("\n")]
            click.echo("\n".join(lines[-own_size()[1] :] if self.window.paints else lines))
        if frame.get("skipped"):
            self._note(f"{int(frame['skipped']):,} bytes went by unseen: too fast for this line.")

    def _take_scrollback(self, frame):
        self.history = list(frame["lines"])
        self._wake()

    def _take_error(self, frame):
        # A size that a session out of reach did not get is given to it when it is back.
        if self.window.entered and (self.typed or frame.get("code") != "offline"):
            self.typed = False
            self._note(one_line(frame.get("detail") or "The hub refused that."), bell=True)

    def _take_closed(self, frame):
        code = frame.get("exit_code")
        self.exit_code = code if isinstance(code, int) else None
        self._end("closed")


# --- waiting for people -----------------------------------------------------------------------


def options(*decorators):
    def decorate(function):
        for option in reversed(decorators):
            function = option(function)
        return function

    return decorate


waiting = options(
    click.option("--wait", is_flag=True, help="Wait for it, and print it."),
    click.option("--timeout", type=DURATION_TYPE, help="With --wait: give up (exit 4) after this."),
)
planning = options(
    click.option("--plan", metavar="TEXT|JSON", help="What you are going to do."),
    click.option("--plan-file", metavar="FILE", help="Read it from a file, or - ."),
    waiting,
)


def check_waiting(wait, timeout):
    if timeout is not None and not wait:
        raise usage("--timeout goes with --wait.")


def awaited(app, stream, task_id, look, end, every=None):
    """What `look()` gives once it gives something; it is asked after each event of the task, and
    `every` so many seconds.

    None when time is up.
    """
    while True:
        item = stream.get(min((s for s in (time_left(end), every) if s is not None), default=None))
        app.alive()
        if item is Stream.LOST:
            app.say(LOST_THE_HUB)
        elif item in (Stream.SYNC, None) or item.get("task_id") == task_id:
            try:
                if found := look():
                    return found
            except Unreachable:  # the stream will notice too, reconnect, and have it read again
                app.say(LOST_THE_HUB)
        if time_left(end) == 0:
            return None


CLOSED = {
    "complete": "was completed",
    "fail": "has failed",
    "cancel": "was cancelled",
    "release": "was taken back from its server",
}


def show_answer(app, stream, asked, claim, end):
    """Waits for the answer to an intervention and prints it. Raises Problem and TimedOut.

    claim: a UUID; while the hub is asked again and again with it, it keeps the answer for this call
    and types it nowhere. It is not made to wait: it would keep the answer for a call that somebody
    has ended meanwhile. Code `delivered` when the answer was typed already.
    """

    def look():
        body = {"claim": claim, "wait": 0}
        found = app.hub.post(f"interventions/{asked['id']}/collect", body)
        return found if found.get("status") != "pending" else None

    found = awaited(app, stream, asked.get("task_id"), look, end, COLLECT_S)
    if not found:
        again = f"orchestratia intervention show {asked['id']} --wait"
        sentence = f"Time is up; the question stays open. To go on waiting: {again}"
        raise TimedOut(sentence, "timeout", asked)
    if found["status"] != "responded":
        why = CLOSED.get(found.get("closed_why"), "has ended")
        raise Problem(
            f"The question was closed without an answer: its task {why}.", "closed", found
        )
    app.show(found, lambda screen, data: Text(clean(data.get("response") or "")))


def submit_plan(app, task_id, plan, plan_file, wait, timeout):
    check_waiting(wait, timeout)
    if (plan is None) == (plan_file is None):
        raise usage("Give the plan with --plan or with --plan-file.")
    value = json_or_text(not_empty(read_text(plan_file) if plan is None else plan, "The plan"))
    body = {"plan": {"summary": value} if isinstance(value, str) else value}
    if not wait:
        made = app.hub.post(f"tasks/{task_id}/plan", body)
        return app.did("Plan submitted", made, task_brief)
    with closing(Stream(app.hub)) as stream:  # before handing it in, so that nothing is missed
        made = app.hub.post(f"tasks/{task_id}/plan", body)
        app.say("Plan submitted; waiting for the decision.")
        show_decision(app, stream, made["id"], deadline(timeout))


def plans_of(app, task_id):
    return app.hub.get(f"tasks/{task_id}/plan").get("plans") or []


def show_decision(app, stream, task_id, end):
    """Waits for what is decided of the newest plan. Raises Problem and TimedOut."""
    plans = plans_of(app, task_id)
    if not plans:
        raise Problem("No plan has been submitted for this task.", "not_found")
    version = plans[-1]["version"]

    def look():
        ours = [one for one in plans_of(app, task_id) if one["version"] == version]
        return next((one for one in ours if one.get("status") != "pending"), None)

    found = awaited(app, stream, task_id, look, end)
    if not found:
        again = f"orchestratia plan show {task_id} --wait"
        sentence = f"Time is up; the plan still waits. To go on waiting: {again}"
        raise TimedOut(sentence, "timeout", {"task_id": task_id, "version": version})
    status, feedback = found["status"], clean(found.get("feedback") or "")
    if status != "approved":
        said = {"revised": f"sent back: {feedback}", "replaced": "replaced by a newer one."}
        sentence = f"The plan was {said.get(status, 'closed with its attempt.')}"
        raise Problem(sentence, status, found)
    app.show(found, lambda screen, data: Text(": ".join(filter(None, ("Approved", feedback)))))


# --- tasks ------------------------------------------------------------------------------------


@cli.group()
def task():
    """Tasks: units of work, in a graph of dependencies.

    ID is a task's id or its first 4 characters or more, with or without #. Inside a session,
    start, complete, fail, view, explain, events and tree mean its own task when no ID is given.
    """


# The fields of a task that both create and update take.
describing = options(
    click.option("--spec", help="What is to be done; the title says it all if left out."),
    click.option("--spec-file", metavar="FILE", help="Read the spec from a file, or - ."),
    click.option("--structured-spec", metavar="FILE|JSON", help="An orchestratia/task-spec/v1."),
    click.option("--priority", type=PRIORITIES),
    click.option("--type", "kind", type=TYPES),
    click.option("--repo", help="The repo the work is in."),
    click.option("--branch"),
    click.option("--acceptance-criteria", "criteria", multiple=True, metavar="TEXT…"),
    click.option("--language", multiple=True, help="A language the server must offer; repeatable."),
    click.option("--framework", multiple=True, help="A framework it must offer; repeatable."),
    click.option("--capability", multiple=True, help="A capability it must offer; repeatable."),
    click.option("--profile", help="The coding agent, or `command` for any program."),
    click.option("--model", help="The model its coding agent uses."),
    click.option("--mode", help="How much its coding agent asks: one of its profile's modes."),
    click.option(
        "--command",
        "command_text",
        metavar="WORDS|JSON",
        help="The program of profile `command`; better written after --.",
    ),
    click.option("--max-attempts", type=click.IntRange(min=1)),
    click.option("--retry-delay", type=DURATION_TYPE),
    click.option("--queue-timeout", type=DURATION_TYPE, help="Longest wait for a place."),
    click.option("--start-timeout", type=DURATION_TYPE, help="From assignment to start."),
    click.option("--progress-timeout", type=DURATION_TYPE, help="Without a sign of progress."),
    click.option("--timeout", type=DURATION_TYPE, help="In all."),
    click.option(
        "--on-lost", type=click.Choice(["retry", "ask"]), help="If its server stays away."
    ),
)


def command_of(text, trailing):
    """The argument list of a `command` worker: the words after `--`, else of `--command`."""
    if text and trailing:
        raise usage("Give the program with --command or after --, not both.")
    if not text:
        return trailing
    if text.lstrip().startswith("["):
        command = json_value(text, "--command")
        if not all(isinstance(part, str) for part in command):
            raise usage("--command as JSON must be a list of strings.")
        return command
    try:
        return shlex.split(text)
    except ValueError as error:
        raise usage(f"--command cannot be split into words: {error}.") from None


def described(ctx, spec, spec_file, structured_spec, command_text, **fields):
    """The request fields of `describing` that were given."""
    if spec is not None and spec_file:
        raise usage("Give --spec or --spec-file, not both.")
    spec = not_empty(read_text(spec_file) if spec_file else spec, "--spec")
    structured = structured_spec and file_or_json(structured_spec, "--structured-spec")
    command = command_of(command_text, ctx.meta.get("trailing"))
    needs = given(
        languages=list(fields.pop("language")),
        frameworks=list(fields.pop("framework")),
        capabilities=list(fields.pop("capability")),
    )
    profile = fields.pop("profile") or ("command" if command else None)
    return given(
        spec=spec,
        structured_spec=structured,
        priority=fields.pop("priority"),
        type=fields.pop("kind"),
        target_repo=fields.pop("repo"),
        target_branch=fields.pop("branch"),
        acceptance_criteria=list(fields.pop("criteria")),
        requirements=needs,
        profile=profile,
        command=command,
        retry_delay_s=fields.pop("retry_delay"),
        **fields,
    )


@task.command(
    "create",
    several=("--depends-on", "--acceptance-criteria"),
    trailing=True,
    options_metavar="--title TEXT [OPTIONS] [-- PROGRAM ARGUMENT…]",
    example='orchestratia task create --title "Gateway routes" --repo api-gateway \\\n'
    "    --depends-on 4f2a:input:api_schema --auto-assign\n"
    "orchestratia task create --title Tests --repo web --assign dev-01 -- make test",
)
@click.option("--title", required=True)
@describing
@click.option(
    "--depends-on",
    multiple=True,
    metavar="ID[:input:KEY|:related]…",
    help="What must be done first; input hands its contract KEY down. Several allowed.",
)
@click.option("--auto-assign", is_flag=True, help="Place it as soon as it is free.")
@click.option("--assign", metavar="NAME", help="Give it to this session or server.")
@click.option("--require-plan", is_flag=True, help="A plan must be approved before the work.")
@click.pass_context
@pass_app
def task_create(app, ctx, title, depends_on, auto_assign, assign, require_plan, **fields):
    """Create a task."""
    body = {"title": not_empty(title, "--title"), **described(ctx, **fields)}
    dependencies = [parse_dependency(text) for text in depends_on]
    body |= given(
        auto_assign=auto_assign or None,
        require_plan=require_plan or None,
        session_id=app.session_id,
        project_id=app.project_id,
        dependencies=[dependency_body(app, *one) for one in dependencies],
    )
    made = app.hub.post("tasks", body)
    if assign:
        made = assign_created(app, made, assign, require_plan)
    app.did("Task created and assigned" if assign else "Task created", made, task_brief)


def dependency_body(app, ref, kind, key):
    body = {"depends_on_task_id": app.full_id(ref), "dependency_type": kind}
    return body | given(contract_key=key)


def assign_created(app, made, name, require_plan):
    body = {"session_name": name, **given(require_plan=require_plan or None)}
    try:
        return app.hub.post(f"tasks/{made['id']}/assign", body)
    except Problem as problem:
        fields = {**problem.fields, "task_id": made["id"]}
        sentence = f"Task {made['id']} was created but not assigned: {problem}"
        raise type(problem)(sentence, problem.code, fields) from None


@task.command("list", example="orchestratia task list --status running")
@click.option("--status", help="Only tasks in this state.")
@click.option("--search", "-q", "q", help="Only tasks with these words.")
@click.option("--limit", type=click.IntRange(min=1))
@click.option("--cursor", help="Go on where the last list ended.")
@pass_app
def task_list(app, **query):
    """List tasks, newest first."""
    app.show(app.hub.get("tasks", project_id=app.project_id, **query), show_tasks)


@task.command("view", example="orchestratia task view 4f2a")
@task_argument(default=True)
@pass_app
def task_view(app, task_id):
    """Show everything about a task (also: task status)."""
    found, asked = app.hub.get(f"tasks/{task_id}"), ()
    if found.get("status") == "needs_human" and not app.as_json:
        asked = app.hub.get("interventions", task_id=found["id"], status="pending")
    app.show(found, lambda screen, task: task_detail(screen, task, asked))


@task.command("check", example="orchestratia task check --json")
@pass_app
def task_check(app):
    """Show what is assigned to you.

    In a session its task, with a server's key its tasks; for an orchestrator or a person all work
    in progress.
    """
    tasks = own_tasks(app, app.hub.get("auth/me"))
    app.show({"count": len(tasks), "tasks": tasks}, check_view)


@task.command("assign", example="orchestratia task assign 4f2a --session dev-01")
@task_argument()
@click.option(
    "--session", "session_name", metavar="NAME", help="Give it to this session or server."
)
@click.option("--server", "server_name", metavar="NAME", help="Give it to this server.")
@click.option("--require-plan", is_flag=True, help="A plan must be approved before the work.")
@pass_app
def task_assign(app, task_id, session_name, server_name, require_plan):
    """Assign a task; without a name, to the server that fits best."""
    if session_name and server_name:
        raise usage("Give --session or --server, not both.")
    body = given(session_name=session_name, server=server_name, require_plan=require_plan or None)
    made = app.hub.post(f"tasks/{task_id}/assign", body)
    app.did("Task assigned" if placed(made) else "Task queued", made, task_brief)


@task.command("start", example="orchestratia task start 4f2a")
@task_argument(default=True)
@pass_app
def task_start(app, task_id):
    """Report that work on a task has begun."""
    app.did("Task started", app.hub.post(f"tasks/{task_id}/start"), task_brief)


@task.command(
    "complete",
    example='orchestratia task complete 4f2a --result "All routes work"\n'
    "orchestratia task complete 4f2a --result-file result.json",
)
@task_argument(default=True)
@click.option("--result", metavar="TEXT|JSON", help="What came out: text, or any JSON.")
@click.option("--result-file", metavar="FILE", help="Read it from a file, or - .")
@pass_app
def task_complete(app, task_id, result, result_file):
    """Report that a task is done, with its result and contracts."""
    if (result is None) == (result_file is None):
        raise usage("Give the result with --result or with --result-file.")
    text = read_text(result_file) if result is None else result
    body = {"result": json_or_text(text), **given(git_diff_stats=git_diff_stats())}
    app.did("Task completed", app.hub.post(f"tasks/{task_id}/complete", body), task_brief)


def git(*arguments):
    """What git prints, or None."""
    try:
        run = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            timeout=5,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.decode("utf-8", "replace")


def git_diff_stats():
    """What the last commit here changed, or None outside a git work tree."""
    shown = git(
        "show",
        "--numstat",
        "--format=",
        "--no-renames",
        "--no-ext-diff",
        "--no-textconv",
        "-m",
        "--first-parent",
        "-z",
        "HEAD",
    )
    rows = [row.split("\t", 2) for row in (shown or "").lstrip("\n").split("\0") if "\t" in row]
    if not rows:
        return None
    texts = [
        {"path": path, "insertions": int(added), "deletions": int(removed)}
        for added, removed, path in rows
        if added != "-"
    ]
    return {
        "files_changed": len(rows),
        "insertions": sum(file["insertions"] for file in texts),
        "deletions": sum(file["deletions"] for file in texts),
        "files": texts[:50],
        "head_commit": (git("rev-parse", "--short", "HEAD") or "").strip(),
        "base_commit": None,
        "binary_files": [path for added, _, path in rows if added == "-"],
    }


@task.command("fail", example='orchestratia task fail 4f2a --error "The schema does not compile"')
@task_argument(default=True)
@click.option("--error", required=True, help="What went wrong.")
@pass_app
def task_fail(app, task_id, error):
    """Report that a task has failed."""
    app.did("Task failed", app.hub.post(f"tasks/{task_id}/fail", {"error": error}), task_brief)


@task.command(
    "help",
    example='orchestratia task help 4f2a --question "JWT or session cookies?" --wait\n'
    'orchestratia task help --id 4f2a --question "Which port?" --type question --to boss',
)
@task_argument(default=True)
@click.option("--question", required=True, help="What you need to know.")
@click.option("--context", help="What one should know to answer it.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["help", "question", "approval"]),
    default="help",
    help="Of a question an orchestrator may answer, the others are for people.",
)
@click.option("--to", "target", metavar="SESSION", help="The session a question is meant for.")
@waiting
@pass_app
def task_help(app, task_id, question, context, kind, target, wait, timeout):
    """Ask a person, or an orchestrator; the task waits for the answer.

    With --wait prints the answer alone, so that a script can use it. Ends with 1 when the question
    is closed without an answer, 4 when time is up.
    """
    check_waiting(wait, timeout)
    body = {"question": not_empty(question, "--question"), "intervention_type": kind}
    body |= given(context=context, target_session_id=target)
    if wait:
        return ask_and_wait(app, task_id, body, deadline(timeout))
    asked = app.hub.post(f"tasks/{task_id}/help", body)
    heading = "Question asked" if kind == "question" else "Help requested"
    app.did(heading, asked, intervention_detail)


def ask_and_wait(app, task_id, body, end):
    claim = str(uuid.uuid4())
    with closing(Stream(app.hub)) as stream:  # before asking, so that no answer is missed
        asked = app.hub.post(f"tasks/{task_id}/help", body | {"claim": claim})
        app.say(f"Asked; waiting for the answer to {asked['id']}.")
        show_answer(app, stream, asked, claim, end)


@task.command("plan", example='orchestratia task plan 4f2a --plan "1. schema 2. routes 3. tests"')
@task_argument(default=True)
@planning
@pass_app
def task_plan(app, task_id, **options):
    """Hand in a plan to be approved (the same as: plan submit)."""
    submit_plan(app, task_id, **options)


@task.command("note", example='orchestratia task note 4f2a --content "The schema has moved"')
@task_argument(default=True)
@click.option("--content", required=True)
@click.option("--urgent", is_flag=True, help="Interrupt the worker with it.")
@pass_app
def task_note(app, task_id, content, urgent):
    """Add a note to a task; its worker and those that build on it are told."""
    add_note(app, task_id, not_empty(content, "--content"), urgent)


def add_note(app, task_id, content, urgent):
    body = {"content": content, "urgent": urgent}
    app.did("Note added", app.hub.post(f"tasks/{task_id}/notes", body))


@task.command("notes", example="orchestratia task notes 4f2a")
@task_argument(default=True)
@pass_app
def task_notes(app, task_id):
    """Read the notes on a task, oldest first."""
    app.show(app.hub.get(f"tasks/{task_id}/notes"), show_notes)


@task.command("cancel", example="orchestratia task cancel 4f2a --cascade")
@task_argument()
@click.option("--cascade", is_flag=True, help="Also all tasks that wait for it.")
@pass_app
def task_cancel(app, task_id, cascade):
    """Cancel a task."""
    answer = app.hub.delete(f"tasks/{task_id}", cascade="true" if cascade else None)
    others = len(answer.get("also_cancelled") or ())
    also = f" and {plural(others, 'task')} downstream" if others else ""
    app.did(f"Task {answer.get('task_id') or task_id}{also} cancelled", answer)


@task.command("retry", example="orchestratia task retry 4f2a")
@task_argument()
@pass_app
def task_retry(app, task_id):
    """Try a failed or cancelled task again."""
    app.did("Task will be tried again", app.hub.post(f"tasks/{task_id}/retry"), task_brief)


# What `--clear` takes, and what empties that field at the hub.
CLEARED = {
    "repo": {"target_repo": None},
    "branch": {"target_branch": None},
    "acceptance-criteria": {"acceptance_criteria": []},
    "structured-spec": {"structured_spec": None},
    "command": {"command": None},
    "model": {"model": None},
    "mode": {"mode": None},
    "queue-timeout": {"queue_timeout": None},
    "start-timeout": {"start_timeout": None},
    "progress-timeout": {"progress_timeout": None},
    "timeout": {"timeout": None},
    "language": {"requirements": {"languages": []}},
    "framework": {"requirements": {"frameworks": []}},
    "capability": {"requirements": {"capabilities": []}},
}


@task.command(
    "update",
    several=("--acceptance-criteria", "--clear"),
    trailing=True,
    example="orchestratia task update 4f2a --priority critical --clear branch timeout",
)
@task_argument()
@click.option("--title")
@describing
@click.option("--auto-assign/--no-auto-assign", default=None, help="Place it when it is free.")
@click.option(
    "--clear",
    multiple=True,
    type=click.Choice(list(CLEARED)),
    metavar="FIELD…",
    help=f"Empty these fields: any of {', '.join(CLEARED)}.",
)
@click.pass_context
@pass_app
def task_update(app, ctx, task_id, title, auto_assign, clear, **fields):
    """Change fields of a task.

    An empty --repo, --branch or --acceptance-criteria clears it too.
    """
    empty = {"repo": fields["repo"], "branch": fields["branch"]}
    empty["acceptance-criteria"] = "" if fields["criteria"] == ("",) else None
    body = {
        **given(title=not_empty(title, "--title"), auto_assign=auto_assign),
        **described(ctx, **fields),
    }
    for name in (*clear, *(name for name, value in empty.items() if value == "")):
        for key, value in CLEARED[name].items():
            known = body.get(key) or {}
            body[key] = {**known, **value} if isinstance(value, dict) else value
    if not body:
        raise usage("Nothing to change: give at least one option.")
    app.did("Task updated", app.hub.patch(f"tasks/{task_id}", body), task_detail)


@task.command("explain", example="orchestratia task explain 4f2a")
@task_argument(default=True)
@pass_app
def task_explain(app, task_id):
    """Say why a task is where it is.

    What it waits for, which server fits it, and why the others do not.
    """
    app.show(app.hub.get(f"tasks/{task_id}/explain"), explain_view)


@task.command("events", example="orchestratia task events 4f2a")
@task_argument(default=True)
@pass_app
def task_events(app, task_id):
    """Show a task's timeline."""
    app.show(app.hub.get(f"tasks/{task_id}/events"), timeline)


def timeline(screen, data):
    events = data.get("events") or []
    first = events[0].get("at") if events else None
    since = Column("after", lambda row: lasting(seconds_between(first, row.get("at"))))
    return screen.table(events, [EVENT_COLUMNS[0], since, *EVENT_COLUMNS[1:]], "No events.")


@task.command(
    "tree",
    example="orchestratia task tree 4f2a\norchestratia task tree --pipeline ecommerce\n"
    "orchestratia task tree --project shop",
)
@task_argument(needed=False)
@click.option("--pipeline", "pipeline_name", metavar="NAME", help="The tasks of a pipeline.")
@pass_app
def task_tree_command(app, task_id, pipeline_name):
    """Draw the graph of tasks, each under what it waits for.

    With ID all that hangs together with that task, with --pipeline a pipeline, else the project.
    """
    if task_id and pipeline_name:
        raise usage("Give ID or --pipeline, not both.")
    if not (pipeline_name or app.flags.get("project")):
        task_id = chosen_id(task_id, None, default=True, needed=False)
    if pipeline_name:
        found = app.hub.get(f"pipelines/{app.segment('pipelines', pipeline_name)}")
        return app.show(found, pipeline_view)
    tasks, labels, chosen = tree_of(app, task_id)
    app.show(
        {"tasks": tasks},
        lambda screen, data: (
            task_tree(screen, tasks, labels, chosen) if tasks else Text("No tasks.", "dim")
        ),
    )


def tree_of(app, task_id):
    """(tasks, labels, id of the one asked for) of the tree around a task, or of the project."""
    if not task_id:
        return every_task(app, app.project_id), {}, None
    one = app.hub.get(f"tasks/{task_id}")
    project = one.get("project_id") or app.project_id
    if not one.get("pipeline_id"):
        return connected(every_task(app, project), one["id"]), {}, one["id"]
    found = app.hub.get(f"pipelines/{one['pipeline_id']}")
    # Others may hang on to a pipeline's tasks; of those the newest are looked at.
    newest = app.hub.get("tasks", project_id=project, limit=PAGE).get("tasks") or []
    own = [task for task in newest if task.get("pipeline_id") != found["id"]]
    tasks = own + (found.get("tasks") or [])[::-1]
    return connected(tasks, one["id"]), labels_of(found), one["id"]


def every_task(app, project_id):
    tasks, cursor = [], None
    while True:
        page = app.hub.get("tasks", project_id=project_id, limit=PAGE, cursor=cursor)
        tasks += page.get("tasks") or []
        cursor = page.get("next_cursor")
        if not cursor:
            return tasks


@task.command("wait", example="orchestratia task wait 4f2a 91bc --timeout 10m")
@click.argument("refs", nargs=-1, metavar="ID…")
@click.option("--id", "more_refs", multiple=True, metavar="ID", help="A task, instead of ID.")
@click.option("--for", "goal", default="done", metavar="done|started|STATUS", show_default=True)
@click.option("--timeout", type=DURATION_TYPE, help="Give up (exit 4) after this long.")
@pass_app
def task_wait(app, refs, more_refs, goal, timeout):
    """Wait until tasks are done.

    --for waits until they have started, or for a state. Ends with 0 when all are there, 1 as soon
    as one of them has ended otherwise, 4 when time is up.
    """
    refs = [task_ref(text) for text in (*refs, *more_refs)]
    if not refs:
        raise usage("Missing argument 'ID': which tasks?")
    if goal not in GOALS and goal not in MARKS:
        raise usage(f"{goal!r} is no state of a task; try done, started, running or needs_human.")
    wait = Wait(app, refs, goal)
    with closing(wait.stream):
        reached = wait.until(deadline(timeout))
    tasks = list(wait.tasks.values())
    app.show(tasks[0] if len(tasks) == 1 else {"tasks": tasks})
    if not reached:
        raise click.exceptions.Exit(EXIT_REFUSED)


def deadline(timeout):
    return time.monotonic() + timeout if timeout is not None else None


def time_left(until):
    return None if until is None else max(0.0, until - time.monotonic())


class Wait:
    """Follows tasks until each is where it is wanted, or one can no longer get there."""

    def __init__(self, app, refs, goal):
        self.app, self.goal = app, GOALS.get(goal, {goal})
        self.refs, self.tasks, self.seen = refs, {}, {}
        self.stream = Stream(app.hub)

    def until(self, end):
        """True when all are there, False when one has ended otherwise. Raises TimedOut."""
        while True:
            item = self.stream.get(time_left(end))
            if item is not None:
                self._take(item)
            verdicts = [self._verdict(ident) for ident in self.tasks]
            if False in verdicts or (verdicts and all(verdicts)):
                return False not in verdicts
            if time_left(end) == 0:
                raise self._too_late()

    def _take(self, item):
        try:
            self._look(item)
        except Unreachable:  # the stream will notice too, reconnect, and have all read again
            self.app.say(LOST_THE_HUB)

    def _look(self, item):
        if item is Stream.LOST:
            self.app.say(LOST_THE_HUB)
        elif item is Stream.SYNC:
            for ref in list(self.tasks) or self.refs:
                self._read(ref)
        elif item.get("task_id") in self.tasks:
            self.seen[item["task_id"]].add(EVENT_STATUS.get(item.get("type")))
            self._read(item["task_id"])

    def _read(self, ref):
        task = self.app.hub.get(f"tasks/{ref}")
        before = self.tasks.get(task["id"])
        self.tasks[task["id"]] = task
        self.seen.setdefault(task["id"], set()).add(task.get("status"))
        if not self.app.as_json and (not before or shown_status(before) != shown_status(task)):
            self.app.screen.print(task_line(self.app.screen, task))

    def _verdict(self, ident):
        if self.seen[ident] & self.goal:
            return True
        return False if self.tasks[ident].get("status") in ENDED else None

    def _too_late(self):
        states = [f"{task['id']} is {shown_status(task)}" for task in self.tasks.values()]
        sentence = f"Time is up: {'; '.join(states) or 'the hub has not answered yet'}."
        return TimedOut(sentence, "timeout", {"tasks": list(self.tasks.values())})


@task.group()
def deps():
    """Dependencies between tasks."""


@deps.command(
    "add",
    example="orchestratia task deps add 91bc --depends-on 4f2a \\\n"
    "    --type input --contract-key api_schema",
)
@task_argument()
@click.option("--depends-on", required=True, metavar="ID", help="What must be done first.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(DEPENDENCY_TYPES),
    default=None,
    help="Blocks (default), input with its contract, or related (a link only).",
)
@click.option("--contract-key", metavar="KEY", help="The contract an input hands down.")
@pass_app
def deps_add(app, task_id, depends_on, kind, contract_key):
    """Let a task depend on another (ID:input:KEY works here too)."""
    ref, typed, key = parse_dependency(depends_on)
    kind, key = kind or ("input" if contract_key else typed), contract_key or key
    check_dependency(kind, key)
    answer = app.hub.post(f"tasks/{task_id}/dependencies", dependency_body(app, ref, kind, key))
    state = "resolved" if answer.get("resolved") else "pending"
    app.did(f"Dependency added: {edge_name(answer)}, {state}", answer)


@deps.command("remove", example="orchestratia task deps remove 91bc --depends-on 4f2a")
@task_argument()
@click.option("--depends-on", required=True, metavar="ID")
@pass_app
def deps_remove(app, task_id, depends_on):
    """Remove every dependency of a task on another."""
    answer = app.hub.delete(f"tasks/{task_id}/dependencies/{task_ref(depends_on)}")
    app.did("Dependency removed", answer)


# --- plans, notes, interventions --------------------------------------------------------------


@cli.group()
def plan():
    """Plans: what a worker will do, decided on first."""


@plan.command("submit", example="orchestratia plan submit 4f2a --plan-file plan.md --wait")
@task_argument(default=True)
@planning
@pass_app
def plan_submit(app, task_id, **options):
    """Hand in a plan, or a new version of it, to be approved.

    With --wait ends with 0 when it is approved, 1 when it is sent back, 4 when time is up.
    """
    submit_plan(app, task_id, **options)


@plan.command("show", example="orchestratia plan show 4f2a --wait --timeout 1h")
@task_argument(default=True)
@waiting
@pass_app
def plan_show(app, task_id, wait, timeout):
    """Show a task's plan and what was decided of it.

    With --wait waits for the decision on its newest version, as plan submit does.
    """
    check_waiting(wait, timeout)
    if not wait:
        return app.show(app.hub.get(f"tasks/{task_id}/plan"), plan_view)
    with closing(Stream(app.hub)) as stream:
        show_decision(app, stream, app.full_id(task_id), deadline(timeout))


version_option = click.option(
    "--version", "version", type=click.IntRange(min=1), help="The version you have read."
)


@plan.command("approve", example="orchestratia plan approve 4f2a")
@task_argument()
@click.option("--comment", help="What the worker should know besides.")
@version_option
@pass_app
def plan_approve(app, task_id, comment, version):
    """Let the worker do what it plans."""
    body = given(comment=comment, version=version)
    app.did("Plan approved", app.hub.post(f"tasks/{task_id}/plan/approve", body), task_brief)


@plan.command("revise", example='orchestratia plan revise 4f2a --feedback "Keep the old routes"')
@task_argument()
@click.option("--feedback", required=True, help="What should be different.")
@version_option
@pass_app
def plan_revise(app, task_id, feedback, version):
    """Send a plan back with what should be different."""
    body = {"feedback": not_empty(feedback, "--feedback"), **given(version=version)}
    app.did("Plan sent back", app.hub.post(f"tasks/{task_id}/plan/revise", body), task_brief)


@cli.command(example='orchestratia note 4f2a "The schema has moved to core/" --urgent')
@task_and("text")
@click.option("--urgent", is_flag=True, help="Interrupt the worker with it.")
@pass_app
def note(app, task_id, text, urgent):
    """Add a note to a task (the same as: task note)."""
    add_note(app, task_id, not_empty(text, "TEXT"), urgent)


@cli.group()
def intervention():
    """Interventions: what workers have asked, and the answers."""


@intervention.command("list", example="orchestratia intervention list --status pending")
@click.option("--task-id", "--task", "task_text", metavar="ID", help="Only those about this task.")
@click.option("--status", help="Only pending, responded or closed ones.")
@pass_app
def intervention_list(app, task_text, status):
    """List questions with their answers, newest first."""
    task_id = task_ref(task_text) if task_text else None
    query = {"task_id": task_id, "status": status, "project_id": app.project_id}
    app.show(app.hub.get("interventions", **query), show_interventions)
    if not (app.as_json or task_id):
        tell_of_others(app)


def tell_of_others(app):
    """What waits for a person beside questions."""
    for kind, status in ALSO_WAITING.items():
        if found := rows_of(app, kind, status=status):
            noun = {"permissions": "permission request"}.get(kind, "alert")
            verb = "waits" if len(found) == 1 else "wait"
            listing = f"orchestratia {kind.removesuffix('s')} list --status {status}"
            app.say(f"{plural(len(found), noun)} {verb}: {listing}")


@intervention.command("show", example="orchestratia intervention show 77aa --wait --timeout 1h")
@click.argument("ref", metavar="ID", shell_complete=completing("interventions", "id"))
@waiting
@pass_app
def intervention_show(app, ref, wait, timeout):
    """Show a question with its answer.

    With --wait prints the answer alone, as soon as there is one. In the session that has asked the
    answer then comes here and is not typed.
    """
    check_waiting(wait, timeout)
    path = f"interventions/{task_ref(ref, 'intervention')}"
    if not wait:
        return app.show(app.hub.get(path), intervention_detail)
    with closing(Stream(app.hub)) as stream:
        asked = app.hub.get(path)
        show_answer(app, stream, asked, str(uuid.uuid4()), deadline(timeout))


@intervention.command("respond", example='orchestratia intervention respond 77aa "Use JWT"')
@click.argument("ref", metavar="ID", shell_complete=completing("interventions", "id"))
@click.argument("text", required=False)
@click.option("--response", help="The answer, instead of TEXT.")
@pass_app
def intervention_respond(app, ref, text, response):
    """Answer a question; the first answer counts and goes to whoever asked."""
    if (text is None) == (response is None):
        raise usage("Give the answer as TEXT or with --response.")
    answer = not_empty(text if response is None else response, "The answer")
    path = f"interventions/{task_ref(ref, 'intervention')}/respond"
    app.did("Answered", app.hub.post(path, {"response": answer}), intervention_detail)


# --- permissions, rules, alerts ---------------------------------------------------------------


@cli.group()
def permission():
    """Permissions: what coding agents ask to be allowed, and the answers."""


permission_id = click.argument("ref", metavar="ID", shell_complete=completing("permissions", "id"))


def permission_path(ref):
    return f"permissions/{task_ref(ref, 'permission request')}"


@permission.command("list", example="orchestratia permission list --status pending")
@click.option(
    "--status",
    type=click.Choice(["pending", "allowed", "denied", "withdrawn"]),
    help="Only those in this state.",
)
@click.option(
    "--session",
    "session_name",
    metavar="NAME",
    help="Only those of this session.",
    shell_complete=completing("sessions"),
)
@click.option("--task-id", "--task", "task_text", metavar="ID", help="Only those of this task.")
@pass_app
def permission_list(app, status, session_name, task_text):
    """List permission requests with their answers, newest first."""
    task_id = task_ref(task_text) if task_text else None
    query = given(status=status, session_id=session_name, task_id=task_id)
    app.show(app.hub.get("permissions", project_id=app.project_id, **query), show_permissions)


@permission.command("show", example="orchestratia permission show 5c0e")
@permission_id
@pass_app
def permission_show(app, ref):
    """Show a permission request: exactly what would be done, and where."""
    app.show(app.hub.get(permission_path(ref)), permission_detail)


@permission.command(
    "allow",
    example="orchestratia permission allow 5c0e\n"
    'orchestratia permission allow 5c0e --always --pattern "npm run test *"',
)
@permission_id
@click.option("--session", "for_session", is_flag=True, help="Also for the rest of the session.")
@click.option("--always", is_flag=True, help="Also from now on: makes a rule that allows it.")
@click.option("--pattern", help="With --always: what the rule allows; exactly this if left out.")
@pass_app
def permission_allow(app, ref, for_session, always, pattern):
    """Allow what a coding agent asks for: once, if nothing else is said.

    The first answer counts, also one given in the session's terminal.
    """
    if for_session and always:
        raise usage("Give --session or --always, not both.")
    if pattern is not None and not always:
        raise usage("--pattern goes with --always.")
    scope = "session" if for_session else "always" if always else "once"
    body = {"decision": "allow", "scope": scope, **given(pattern=not_empty(pattern, "--pattern"))}
    app.did("Allowed", app.hub.post(f"{permission_path(ref)}/decide", body), permission_detail)


@permission.command(
    "answer",
    example="orchestratia permission answer 5c0e JWT\n"
    'orchestratia permission answer 5c0e JWT "an hour, then again"',
)
@permission_id
@click.argument("answers", nargs=-1, required=True, metavar="ANSWER...")
@pass_app
def permission_answer(app, ref, answers):
    """Answer what a coding agent asks you to choose: one answer for each of its questions.

    An answer is one of the choices offered, or words of your own; several choices are separated by
    commas. `permission show` names the questions in their order.
    """
    body = {"decision": "allow", "scope": "once", "answers": list(answers)}
    app.did("Answered", app.hub.post(f"{permission_path(ref)}/decide", body), permission_detail)


@permission.command("deny", example='orchestratia permission deny 5c0e --reason "Use the mirror"')
@permission_id
@click.option("--reason", help="Why; the coding agent is told.")
@pass_app
def permission_deny(app, ref, reason):
    """Deny what a coding agent asks for, this time.

    To deny something always, add a rule.
    """
    body = {"decision": "deny", "scope": "once", **given(reason=not_empty(reason, "--reason"))}
    app.did("Denied", app.hub.post(f"{permission_path(ref)}/decide", body), permission_detail)


@cli.group()
def rule():
    """Rules: what coding agents may do without asking, and what never.

    A deny that applies beats everything else; then the first rule that applies decides, in their
    order; what no rule speaks of is asked.
    """


def saying(function):
    """`action` by --allow, --deny or --ask, of which one at most may be given."""

    @click.option("--allow", is_flag=True, help="It may be done without asking.")
    @click.option("--deny", is_flag=True, help="It may not be done, whatever other rules say.")
    @click.option("--ask", is_flag=True, help="A person is asked.")
    @functools.wraps(function)
    def command(*args, allow, deny, ask, **options):
        said = [n for n, on in {"allow": allow, "deny": deny, "ask": ask}.items() if on]
        if len(said) > 1:
            raise usage("Give one of --allow, --deny and --ask.")
        return function(*args, action=said[0] if said else None, **options)

    return command


ruling = options(
    click.option("--tool", help="The tool, with * and ? for any; every tool if left out."),
    click.option("--pattern", help="What of it: words of a command, a path, an address."),
    saying,
    click.option(
        "--server",
        metavar="NAME",
        help="On this server only.",
        shell_complete=completing("servers"),
    ),
    click.option("--agent", metavar="NAME", help="For this coding agent only: claude, codex …"),
    click.option("--note", help="Why it is there."),
    click.option("--position", type=click.IntRange(min=1), help="Its place among the rules."),
)
rule_id = click.argument("ref", metavar="ID", shell_complete=completing("rules", "id"))


def ruled(server, **fields):
    """The fields of a rule that were given, as the hub takes them."""
    return given(server_id=server, **fields)


@rule.command("list", example="orchestratia rule list")
@pass_app
def rule_list(app):
    """List the rules in their order."""
    found = app.hub.get("rules", project_id=app.project_id)
    app.show(found, lambda screen, data: rules_table(app, screen, data.get("rules") or []))


def rules_table(app, screen, rules):
    rows = with_names(app, rules)
    return screen.table(rows, RULE_COLUMNS, "No rules: every permission is asked for.")


def with_names(app, rules):
    """Rules with the names of their `project` and `server` too."""
    rows = [{**one, "project": "all"} for one in rules]
    for kind in ("project", "server"):
        if any(one.get(f"{kind}_id") for one in rules):
            found = app.hub.get(f"{kind}s").get(f"{kind}s") or []
            names = {one.get("id"): one.get("name") for one in found}
            for row in rows:
                if ident := row.get(f"{kind}_id"):
                    row[kind] = names.get(ident, ident)
    return rows


def did_to_rule(app, sentence, rule):
    def detail(screen, rule):
        return rule_detail(screen, with_names(app, [rule])[0])

    app.did(sentence, rule, detail)


@rule.command(
    "add",
    example='orchestratia rule add --tool Bash --pattern "git push *" --deny --project shop\n'
    'orchestratia rule add --tool Read --pattern "**/.env" --deny --all-projects',
)
@ruling
@click.option("--all-projects", is_flag=True, help="For every project of the hub.")
@pass_app
def rule_add(app, all_projects, action, tool, **fields):
    """Add a rule; it comes last if no position is given.

    Without --tool it is about every tool, without --pattern about everything a tool does.
    """
    if not action:
        raise usage("What does the rule say? Give --allow, --deny or --ask.")
    project = None if all_projects else app.project_id or only_project(app)
    if not (project or all_projects):
        raise usage("For which project? Give --project NAME, or --all-projects for all of them.")
    body = {"project": project, "action": action, "tool": tool or "*", **ruled(**fields)}
    did_to_rule(app, "Rule added", app.hub.post("rules", body))


def only_project(app):
    """The id of the only project there is, None where there are more."""
    found = app.hub.get("projects").get("projects") or []
    return found[0]["id"] if len(found) == 1 else None


RULE_FIELDS = ("pattern", "server", "agent", "note")


@rule.command(
    "change",
    several=("--clear",),
    example="orchestratia rule change 1f3d --ask --position 1\n"
    "orchestratia rule change 1f3d --disable",
)
@rule_id
@ruling
@click.option("--disable/--enable", default=None, help="Whether it is left out of account.")
@click.option(
    "--clear",
    multiple=True,
    type=click.Choice(RULE_FIELDS),
    metavar="FIELD…",
    help=f"Empty these fields: any of {', '.join(RULE_FIELDS)}.",
)
@pass_app
def rule_change(app, ref, disable, clear, **fields):
    """Change fields of a rule, or its place."""
    body = ruled(**fields)
    if disable is not None:
        body["enabled"] = not disable
    for name in clear:
        body["server_id" if name == "server" else name] = "" if name == "note" else None
    if not body:
        raise usage("Nothing to change: give at least one option.")
    did_to_rule(app, "Rule changed", app.hub.patch(f"rules/{task_ref(ref, 'rule')}", body))


@rule.command("remove", example="orchestratia rule remove 1f3d --yes")
@rule_id
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def rule_remove(app, ref, yes):
    """Remove a rule; on a terminal it asks first."""
    app.confirm(f"Remove the rule {ref}?", yes)
    app.did(f"Rule {ref} removed", app.hub.delete(f"rules/{task_ref(ref, 'rule')}"))


@rule.command(
    "test",
    example='orchestratia rule test "rm -rf build && make" --directory /srv/shop\n'
    "orchestratia rule test --tool Read ~/.ssh/id_ed25519 --check",
)
@click.argument("text", metavar="[TEXT]", required=False)
@click.option("--tool", default="Bash", show_default=True, help="The tool it is given to.")
@click.option("--input", "whole", metavar="JSON", help="The tool's whole input, instead of TEXT.")
@click.option("--directory", metavar="DIR", help="Where it would be done.")
@click.option("--server", metavar="NAME", shell_complete=completing("servers"))
@click.option("--agent", metavar="NAME", help="The coding agent that would do it.")
@click.option("--check", is_flag=True, help="End with 1 unless it is allowed.")
@pass_app
def rule_test(app, text, tool, whole, check, server, **fields):
    """Say what the rules make of a command, and why; nothing is done.

    TEXT is what the tool is given: a command, a path, an address. Write it after -- if it begins
    with a dash.
    """
    if (text is None) == (whole is None):
        raise usage("Give TEXT, or the tool's whole input with --input.")
    whole = whole and object_of(json_value(whole, "--input"), "--input")
    there = app.hub.get(server_path(app, server)) if server else {}
    project = there.get("project_id") or app.project_id or only_project(app)
    if not project:
        app.say("By the rules for all projects alone; --project NAME adds its own.")
    said = given(command=text, input=whole, server_id=there.get("id"), project_id=project)
    found = app.hub.post("rules/test", {"tool": tool, **said, **given(**fields)})
    app.show(found, verdict_view)
    if check and found.get("decision") != "allow":
        raise click.exceptions.Exit(EXIT_REFUSED)


@session.command("explain", example="orchestratia session explain dev-01")
@named("sessions")
@pass_app
def session_explain(app, name):
    """Say what a session's coding agent does, and what each signal says of it.

    ▸ marks the signal that decided.
    """
    app.show(app.hub.get(session_path(app, name, "explain")), signals_view)


@session.command("grants", example="orchestratia session grants dev-01")
@named("sessions")
@pass_app
def session_grants(app, name):
    """List what is allowed for the rest of a session."""
    app.show(app.hub.get(session_path(app, name, "grants")), show_grants)


@session.command("revoke-grant", example="orchestratia session revoke-grant dev-01 6b1d")
@named("sessions")
@click.argument("ref", metavar="ID")
@pass_app
def session_revoke_grant(app, name, ref):
    """Take back what is allowed for the rest of a session; ID is one of its grants."""
    prefix = task_ref(ref, "grant")
    grants = app.hub.get(session_path(app, name, "grants")).get("grants") or []
    found = [one["id"] for one in grants if one["id"].startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} grants of {name} begin" if found else f"No grant of {name} begins"
        code = "ambiguous" if found else "not_found"
        raise Problem(f"{what} with {prefix!r}; session grants lists them.", code)
    app.did("Taken back: it is asked for again.", app.hub.delete(f"grants/{found[0]}"))


@cli.group()
def alert():
    """Alerts: sessions that are stuck or out of quota, answers that did not arrive."""


@alert.command("list", example="orchestratia alert list")
@click.option(
    "--status",
    type=click.Choice(["open", "dismissed", "over", "all"]),
    default="open",
    show_default=True,
)
@pass_app
def alert_list(app, status):
    """List alerts, newest first."""
    query = given(status=None if status == "all" else status)
    app.show(app.hub.get("alerts", project_id=app.project_id, **query), show_alerts)


@alert.command("dismiss", example="orchestratia alert dismiss 3e9a")
@click.argument("ref", metavar="ID", shell_complete=completing("alerts", "id"))
@pass_app
def alert_dismiss(app, ref):
    """Put an alert away; it comes again only if its cause does."""
    app.did("Dismissed", app.hub.post(f"alerts/{task_ref(ref, 'alert')}/dismiss"))


# --- contracts --------------------------------------------------------------------------------


@cli.group()
def contract():
    """Contracts: the data a task hands to those downstream."""


@contract.command("list", example="orchestratia contract list 4f2a")
@task_and()
@pass_app
def contract_list(app, task_id):
    """List what a task must produce and what it has produced."""
    app.show(app.hub.get(f"tasks/{task_id}/contracts"), show_contracts)


@contract.command("show", example="orchestratia contract show 4f2a api_schema")
@task_and("key")
@pass_app
def contract_show(app, task_id, key):
    """Show one contract with its data."""
    app.show(app.hub.get(f"tasks/{task_id}/contracts/{quote(key, safe='')}"), contract_view)


def contract_view(screen, data):
    facts = (
        ("key", one_line(data.get("key") or "")),
        ("status", Mark(data.get("status") or "?")),
        ("about", one_line(data.get("description") or "")),
        ("by", one_line(data.get("by") or "")),
        ("updated", age_of("updated_at")(data)),
    )
    parts = [
        screen.section(
            name.capitalize(), Text(clean(json.dumps(data[name], indent=2, ensure_ascii=False)))
        )
        for name in ("data", "schema")
        if data.get(name) is not None
    ]
    return Stack(screen.facts(facts), *parts)


@contract.command("set", example="orchestratia contract set 4f2a api_schema @schema.json")
@task_and("key", "value")
@pass_app
def contract_set(app, task_id, key, value):
    """Supply or amend a contract by hand.

    VALUE is JSON, or @FILE (@- for standard input).
    """
    text = read_text(value[1:]) if value.startswith("@") else value
    data = json_value(text, value[1:] if value.startswith("@") else "VALUE")
    answer = app.hub.put(f"tasks/{task_id}/contracts/{quote(key, safe='')}", {"data": data})
    app.did(f"Contract {key} set", answer)


# --- pipelines --------------------------------------------------------------------------------


@cli.group()
def pipeline():
    """Pipelines: many tasks from one file."""


def read_pipeline(app, path, name, older=False):
    """The request that makes the pipeline of a file."""
    shown = "standard input" if path == "-" else path
    stem = "pipeline" if path == "-" else Path(path).stem
    return pipeline_body(app, read_text(path), shown, name, stem, older)


def pipeline_body(app, text, shown, name, stem="", older=False):
    body = object_of(parse_document(text, shown), shown)
    if not isinstance(body.get("tasks"), list) or not body["tasks"]:
        raise usage(f"{shown} must have a list of tasks under `tasks`.")
    for number, one in enumerate(body["tasks"], 1):
        object_of(one, f"Task {number} of {shown}")
    own = body.pop("project", None)
    if own and not app.credentials.project:
        app.credentials.project = str(own)
    body["name"] = name or body.get("name") or stem
    if older:
        body["tasks"] = in_newer_form(body["tasks"])
    return body | given(project_id=app.project_id)


def in_newer_form(tasks):
    """Tasks each with an id of its own, and dependencies on earlier ones named by it."""
    ids = [str(one.get("id") or f"task-{number}") for number, one in enumerate(tasks)]

    def upstream_of(upstream, earlier):
        text = str(upstream)
        if isinstance(upstream, dict) or text in ids or not text.isdigit():
            return upstream if isinstance(upstream, dict) else text
        if int(text) >= len(earlier):
            name = ids[len(earlier)]
            raise usage(f"Task {name!r} depends on number {text}, which is no earlier task.")
        return earlier[int(text)]

    made = []
    for number, one in enumerate(tasks):
        ups = one.get("depends_on") or []
        ups = [upstream_of(up, ids[:number]) for up in (ups if isinstance(ups, list) else [ups])]
        made.append({**one, "id": ids[number], **given(depends_on=ups)})
    return made


@pipeline.command(
    "apply",
    example="orchestratia pipeline apply examples/ecommerce.yaml --watch\n"
    "generate-tasks | orchestratia pipeline apply - --name nightly",
)
@click.argument("file")
@click.option("--name", help="Instead of the name in the file.")
@click.option("--watch", is_flag=True, help="Follow it until it has ended.")
@click.option(
    "--timeout", type=DURATION_TYPE, help="With --watch: give up (exit 4) after this long."
)
@pass_app
def pipeline_apply(app, file, name, watch, timeout):
    """Create all tasks of a YAML or JSON file.

    All are made at once, or none; - reads standard input.

    With --watch ends with 0 when all are done, 1 when one has failed or was cancelled and nothing
    else can run, 4 when time is up.
    """
    made = app.hub.post("pipelines", read_pipeline(app, file, name))
    if not watch:
        return app.did("Pipeline created", made, pipeline_view)
    app.say(f"Pipeline {made.get('name')} created: {made['id']}")
    follow_pipeline(app, made, timeout)


@pipeline.command(
    "create",
    example="orchestratia pipeline create --file tasks.json\n"
    """orchestratia pipeline create --inline '{"tasks": [{"title": "Build"}]}'""",
)
@click.option("--file", "path", metavar="FILE", help="YAML or JSON; - reads standard input.")
@click.option("--inline", metavar="JSON", help="The pipeline itself.")
@click.option("--name", help="Instead of the name in the file.")
@pass_app
def pipeline_create(app, path, inline, name):
    """Create all tasks of a pipeline in the older form.

    There a task may leave out its id, and depends_on may name earlier tasks by their number,
    counted from 0. All are made at once, or none.
    """
    if not (path or inline):
        raise usage("Give the pipeline with --file or with --inline.")
    if path:
        body = read_pipeline(app, path, name, older=True)
    else:
        body = pipeline_body(app, inline, "--inline", name or "pipeline", older=True)
    app.did("Pipeline created", app.hub.post("pipelines", body), pipeline_view)


@pipeline.command("list", example="orchestratia pipeline list")
@pass_app
def pipeline_list(app):
    """List pipelines with the states of their tasks."""
    app.show(app.hub.get("pipelines", project_id=app.project_id), show_pipelines)


@pipeline.command("show", example="orchestratia pipeline show ecommerce --watch")
@named("pipelines")
@click.option("--watch", is_flag=True, help="Follow it until it has ended.")
@click.option(
    "--timeout", type=DURATION_TYPE, help="With --watch: give up (exit 4) after this long."
)
@pass_app
def pipeline_show(app, name, watch, timeout):
    """Draw a pipeline, by name or id."""
    found = app.hub.get(f"pipelines/{app.segment('pipelines', name)}")
    if not watch:
        return app.show(found, pipeline_view)
    follow_pipeline(app, found, timeout)


# How a task is written in a file: the API's name, the file's, and what it is by itself.
WRITTEN = (
    ("spec", "spec", None),
    ("type", "type", "feature"),
    ("priority", "priority", "normal"),
    ("target_repo", "repo", None),
    ("target_branch", "branch", None),
    ("acceptance_criteria", "acceptance_criteria", []),
    ("requirements", "requirements", {}),
    ("structured_spec", "structured_spec", None),
    ("profile", "profile", None),
    ("model", "model", None),
    ("mode", "mode", None),
    ("command", "command", None),
    ("auto_assign", "auto_assign", False),
    ("require_plan", "require_plan", False),
    ("on_lost", "on_lost", "retry"),
    ("max_attempts", "max_attempts", 1),
    ("retry_delay_s", "retry_delay_s", 0),
    ("queue_timeout", "queue_timeout", None),
    ("start_timeout", "start_timeout", None),
    ("progress_timeout", "progress_timeout", None),
    ("timeout", "timeout", None),
)


def written(task, profile):
    """A task of the API or of a file as the shortest file has it, in one order.

    `profile`: the project's, which goes without saying.
    """
    needs = {key: value for key, value in (task.get("requirements") or {}).items() if value}
    own = {**task, "requirements": needs, "target_repo": needs.pop("repo", None)}
    own["structured_spec"] = without_needs(task.get("structured_spec"), needs)
    entry = {"title": one_line(task.get("title") or "")}
    for name, key, usual in WRITTEN:
        value = own.get(name) if own.get(name) is not None else task.get(key)
        own_words = {"spec": task.get("title"), "profile": profile}.get(key)
        if isinstance(value, float) and value == int(value):
            value = int(value)
        if value not in (None, usual, own_words) and (value or usual):
            entry[key] = value
    return entry


def without_needs(structured, needs):
    """A structured spec less the languages and frameworks it asks for, which go to `needs`."""
    if not isinstance(structured, dict):
        return structured
    asked = dict(structured.get("constraints") or {})
    for name in ("languages", "frameworks"):
        if wanted := asked.pop(name, None):
            needs[name] = wanted
    rest = {key: value for key, value in structured.items() if key != "constraints"}
    return rest | given(constraints=asked) or None


def written_link(link):
    if isinstance(link, str):
        return link
    kind = link.get("type") or ("input" if link.get("key") else "blocks")
    return (
        link["task"]
        if kind == "blocks"
        else given(task=link["task"], type=kind, key=link.get("key"))
    )


def as_file(app, found):
    """A pipeline of the hub as a file that makes the same again."""
    labels, profile = labels_of(found), profile_of(app, found)
    tasks = []
    for one in found.get("tasks") or ():
        ups = one.get("dependencies") or ()
        for up in ups:
            if up["depends_on_task_id"] not in labels:
                app.say(
                    f"Left out: {labels[one['id']]} depends on {up['depends_on_task_id']}, "
                    "which is not in the pipeline."
                )
        links = [
            written_link(
                {
                    "task": labels[up["depends_on_task_id"]],
                    "type": up.get("dependency_type"),
                    "key": up.get("contract_key"),
                }
            )
            for up in ups
            if up["depends_on_task_id"] in labels
        ]
        tasks.append({"id": labels[one["id"]], **written(one, profile), **given(depends_on=links)})
    return {"$schema": PIPELINE, "name": found.get("name"), "tasks": tasks}


def profile_of(app, found):
    return app.hub.get(f"projects/{found['project_id']}").get("profile")


@pipeline.command("export", example="orchestratia pipeline export ecommerce > ecommerce.yaml")
@named("pipelines")
@pass_app
def pipeline_export(app, name):
    """Print a pipeline as a file that makes the same again.

    YAML, or JSON with --json. Which server or session was chosen is not part of it.
    """
    found = as_file(app, app.hub.get(f"pipelines/{app.segment('pipelines', name)}"))
    if app.as_json:
        return app.show(found)
    click.echo(yaml_text(found), nl=False)


@pipeline.command("diff", example="orchestratia pipeline diff ecommerce.yaml")
@click.argument("file")
@named("pipelines", required=False)
@click.option("--exit-code", is_flag=True, help="End with 1 when they differ.")
@pass_app
def pipeline_diff(app, file, name, exit_code):
    """Show how a file differs from the pipeline of its name, or of NAME, in the hub.

    + is in the file alone, - in the hub alone, ~ differs.
    """
    body = read_pipeline(app, file, None)
    found = app.hub.get(f"pipelines/{app.segment('pipelines', name or str(body['name']))}")
    profile = profile_of(app, found)
    ours = {
        str(one.get("id") or ""): {
            **written(one, profile),
            **given(depends_on=[written_link(link) for link in one.get("depends_on") or ()]),
        }
        for one in body["tasks"]
    }
    theirs = {one.pop("id"): one for one in as_file(app, found)["tasks"]}
    differences = {
        "added": {key: one for key, one in ours.items() if key not in theirs},
        "removed": {key: one for key, one in theirs.items() if key not in ours},
        "changed": changed_fields(theirs, ours),
    }
    same = not any(differences.values())
    app.show({"pipeline_id": found["id"], "same": same, **differences}, diff_view)
    if exit_code and not same:
        raise click.exceptions.Exit(EXIT_REFUSED)


def changed_fields(theirs, ours):
    """{task: {field: [in the hub, in the file]}}"""
    changed = {}
    for key in ours.keys() & theirs.keys():
        before, after = theirs[key], ours[key]
        if before.get("depends_on") and after.get("depends_on"):  # their order says nothing
            before, after = ({**one, "depends_on": sorted_links(one)} for one in (before, after))
        fields = {
            name: [before.get(name), after.get(name)]
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        }
        if fields:
            changed[key] = fields
    return {key: changed[key] for key in ours if key in changed}


def sorted_links(entry):
    return sorted(entry["depends_on"], key=lambda link: json.dumps(link, sort_keys=True))


def diff_view(screen, data):
    if data["same"]:
        return Text("No difference.", "dim")
    lines = [
        Text(f"+ {one_line(key)}  {one['title']}", "green") for key, one in data["added"].items()
    ]
    lines += [
        Text(f"- {one_line(key)}  {one['title']}", "red") for key, one in data["removed"].items()
    ]
    for key, fields in data["changed"].items():
        lines.append(Text(f"~ {one_line(key)}", "yellow"))
        for name, (before, after) in fields.items():
            shown = [known(value) or "(nothing)" for value in (before, after)]
            lines.append(Text(f"    {name}: {shown[0]} → {shown[1]}"))
    return Stack(*lines)


def stuck(tasks):
    """The ids of tasks that have failed, were cancelled, or wait for such a one."""
    lost = {task["id"] for task in tasks if task.get("status") in ("failed", "cancelled")}
    below = {}
    for task in tasks:
        for one in blocking(task) if task.get("status") == "pending" else ():
            up = one["depends_on_task_id"]
            below.setdefault(up, []).append(task["id"])
            if one.get("depends_on_status") in ("failed", "cancelled") and not one.get("resolved"):
                lost.add(task["id"])
    for ident in list(lost):
        lost |= reach(ident, below)
    return lost


def outcome(tasks):
    """0 when all are done, 1 when nothing more can happen by itself, None while it goes on."""
    lost = stuck(tasks)
    if any(task.get("status") != "done" and task["id"] not in lost for task in tasks):
        return None
    return EXIT_REFUSED if lost else 0


def follow_pipeline(app, pipeline, timeout):
    """Shows a pipeline until it has ended, and ends the program with its outcome."""
    end, stream = deadline(timeout), Stream(app.hub)
    picture = Silent() if app.as_json else Picture(app) if app.screen.fancy else Changes(app)
    try:
        with picture:
            picture.update(pipeline)
            while outcome(pipeline["tasks"]) is None:
                pipeline = next_state(app, stream, pipeline, picture, end)
                picture.update(pipeline)
    except KeyboardInterrupt:
        again = f"orchestratia pipeline show {pipeline['id']} --watch"
        app.say(f"Stopped watching; the pipeline goes on. To look again: {again}")
        raise
    app.show(pipeline, lambda screen, data: Text(final_summary(data["tasks"]), "bold"))
    raise click.exceptions.Exit(outcome(pipeline["tasks"]))


def next_state(app, stream, pipeline, picture, end):
    """The pipeline after the next change. Raises TimedOut."""
    ids = {task["id"] for task in pipeline["tasks"]}
    while time_left(end) != 0:
        item = stream.get(min(picture.tick_s, time_left(end) or picture.tick_s))
        if item is Stream.LOST:
            picture.lost()
        elif item is Stream.SYNC or (item and item.get("task_id") in ids):
            while stream.pending():  # what is read now includes all these
                stream.get()
            try:
                return app.hub.get(f"pipelines/{pipeline['id']}")
            except Unreachable:  # the stream will notice too, reconnect, and have it read again
                picture.lost()
        picture.tick()
    summary = final_summary(pipeline["tasks"])
    raise TimedOut(f"Time is up; the pipeline goes on. {summary}.", "timeout", pipeline)


class Silent:
    """No picture: `--json` prints the final state only."""

    tick_s = 60

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, pipeline):
        pass

    def tick(self):
        pass

    def lost(self):
        pass


class Changes(Silent):
    """One line for each change, for pipes and logs."""

    def __init__(self, app):
        self.app, self.shown = app, {}

    def update(self, pipeline):
        labels = labels_of(pipeline)
        for task in pipeline["tasks"]:
            state = (shown_status(task), placed(task), task.get("attempt"))
            if self.shown.get(task["id"]) != state:
                self.shown[task["id"]] = state
                line = task_line(self.app.screen, task, labels.get(task["id"]))
                self.app.screen.print(Text.assemble(time.strftime("%H:%M:%S  "), line))

    def lost(self):
        self.app.say(LOST_THE_HUB)


class Picture(Silent):
    """A table that redraws itself, for people."""

    tick_s = 0.25

    def __init__(self, app):
        self.screen, self.pipeline, self.note = app.screen, None, ""
        self.live = Live(console=app.screen.console, auto_refresh=False, get_renderable=self._draw)

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *error):
        self.live.stop()

    def update(self, pipeline):
        self.pipeline, self.note = pipeline, ""
        self.tick()

    def tick(self):
        self.live.refresh()

    def lost(self):
        self.note = LOST_THE_HUB

    def _draw(self):
        if not self.pipeline:
            return Text("")
        tasks = self.pipeline["tasks"]
        done = sum(task.get("status") == "done" for task in tasks)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(one_line(self.pipeline.get("name") or ""), "bold"),
            ProgressBar(
                total=len(tasks), completed=done, width=24, complete_style="cyan", style="dim"
            ),
            Text(f"{done}/{len(tasks)}"),
            Text(self.note, "yellow"),
        )
        return Stack(head, self._table(tasks), Text(""))

    def _table(self, tasks):
        labels, room = labels_of(self.pipeline), max(3, self.screen.console.height - 6)
        columns = (
            Column("", lambda task: one_line(labels.get(task["id"]) or "")),
            Column("task", line_of("title"), cut=True),
            Column("state", lambda task: Mark(shown_status(task))),
            Column("where", placed, cut=True, spare=1),
            Column("time", lambda task: f"{spent(task):>8}"),
            Column("waits for", lambda task: waits_for(task, labels), cut=True, spare=2),
        )
        shown = tasks if len(tasks) <= room else most_telling(tasks, room)
        table = self.screen.table(shown, columns, "")
        if len(shown) < len(tasks):
            return Stack(table, Text(f"… and {len(tasks) - len(shown)} more", "dim"))
        return table


def most_telling(tasks, room):
    """`room` of the tasks in their order: what fails and runs before what waits or is done."""
    order = ("failed", "needs_human", "plan_review", "running", "planning", "assigned", "pending")
    rank = {status: number for number, status in enumerate(order)}
    ranked = sorted(tasks, key=lambda task: rank.get(task.get("status"), len(order)))
    kept = {task["id"] for task in ranked[:room]}
    return [task for task in tasks if task["id"] in kept]


def waits_for(task, labels):
    """What a pending task still waits for: open upstreams, else the hub's reason."""
    if task.get("status") not in ("pending", "failed"):
        return ""
    open_ones = [
        one_line(labels.get(one["depends_on_task_id"]) or one.get("depends_on_title") or "")
        for one in blocking(task)
        if not one.get("resolved")
    ]
    if task.get("status") == "failed":
        return why(task) or one_line(summary_of(task.get("result") or ""))
    return ", ".join(dict.fromkeys(open_ones)) or why(task)


# --- teaching coding agents -------------------------------------------------------------------

WORKER_GUIDE = """\
### Your task

You have one task. `$ORCHESTRATIA_TASK_ID` names it, so these commands need no id.

```sh
orchestratia task view      # spec, acceptance criteria, what other tasks hand you, what you owe
orchestratia task start     # you begin
orchestratia note "Schema done, routes next"    # at each step, and when plans change
```

Ask instead of guessing at what a person should decide. This prints the answer alone:

```sh
orchestratia task help --question "JWT or cookies?" --context "Two clients need it" --wait
```

With `--type approval` ask for leave to do what cannot be undone; with `--type question` an
orchestrator may answer too.

If the task's state is `planning`, hand in a plan and change nothing before it is approved:

```sh
orchestratia plan submit --plan-file plan.md --wait
```

Exit code 0: approved. 1: sent back; it says what should be different; hand in a new version.

End the task, always, with one of these. Nothing else tells anyone that you have finished.

```sh
orchestratia task complete --result-file result.json
orchestratia task fail --error "The schema does not compile: line 12"
```

The result is text or JSON. The contracts you owe go in it by their keys:

```json
{"summary": "Routes and tests done", "contracts": {"api_schema": {"version": 1}}}
```

If the hub refuses it, its sentence says which contract is missing or does not fit its schema: mend
that and complete again.

A command that waits may outlast your own limit for commands: give it `--timeout 9m`. Exit code 4
means not answered yet, and what is printed says how to go on waiting. An answer that nobody waits
for is typed into this session.
"""

ORCHESTRATOR_GUIDE = """\
### Giving work to others

You split work into tasks, give them out and watch them; you do not do them yourself.

```sh
orchestratia status                       # what is going on, what waits
orchestratia server list                  # who can do what
orchestratia task create --title "Gateway routes" --spec-file routes.md --repo api-gateway \\
    --acceptance-criteria "All tests pass" --depends-on 4f2a:input:api_schema --auto-assign
orchestratia pipeline apply tasks.yaml    # many tasks at once, all or none
```

Write into a spec all that its worker must know, and criteria by which one sees that it is done.
`--depends-on ID` waits for a task, `ID:input:KEY` also takes its contract KEY, `ID:related` is a
link only. `--require-plan` has the worker ask first. A task promises contracts like this:

```sh
orchestratia task create --title "Schema" --repo core --auto-assign \\
    --structured-spec '{"expected_contracts": {"api_schema": {"description": "OpenAPI"}}}'
```

Link, assign (without a name to the server that fits best), watch:

```sh
orchestratia task deps add 91bc --depends-on 4f2a
orchestratia task assign 4f2a --session dev-01
orchestratia task wait 4f2a 91bc --timeout 9m    # 0 all done, 1 one ended otherwise, 4 not yet
orchestratia task tree 4f2a
orchestratia task explain 4f2a                   # why it does not start
```

Answer what workers ask. Questions of type `question` are yours, the others are for people:

```sh
orchestratia intervention list --status pending
orchestratia intervention respond 77aa "Use JWT"
orchestratia plan show 4f2a
orchestratia plan approve 4f2a --comment "Mind the old clients"
orchestratia plan revise 4f2a --feedback "Keep the old routes"
```

Tell a worker something, try again, or stop:

```sh
orchestratia note 4f2a "The schema has moved to core/" --urgent
orchestratia task retry 4f2a
orchestratia task cancel 4f2a --cascade
```
"""

COMMON_GUIDE = """\
Exit codes: 0 done, 1 refused (the sentence says why), 2 wrong usage, 3 hub unreachable, 4 timed out
waiting. `--json` after any command prints JSON; `orchestratia COMMAND --help` shows its options.
What a coding agent is allowed to do is decided by people: do not answer permission requests, and do
not look for ways around a denial; ask.
"""

GUIDES = {"worker": WORKER_GUIDE, "orchestrator": ORCHESTRATOR_GUIDE}
GUIDE_HEAD = """\
## Orchestratia

For sessions that Orchestratia has started: `$ORCHESTRATIA_SESSION_ID` is set there. Elsewhere skip
this section. `orchestratia` is on the path and knows the hub and its key.
"""
SKILL_HEAD = """\
---
name: orchestratia
description: >-
  How to report on, ask about, plan, complete or hand out tasks with the `orchestratia` command in a
  session of Orchestratia. Use it when ORCHESTRATIA_SESSION_ID is set, or when somebody speaks of a
  task, a contract, a worker or a hub.
---
"""
# What each coding agent reads: the file with its instructions, and its skill.
TAUGHT = {
    "claude": ("CLAUDE.md", ".claude/skills/orchestratia/SKILL.md"),
    "codex": ("AGENTS.md", ".agents/skills/orchestratia/SKILL.md"),
    "gemini": ("GEMINI.md", ".agents/skills/orchestratia/SKILL.md"),
    "aider": ("AGENTS.md", None),
}
AIDER_SETTINGS = ".aider.conf.yml"  # aider reads no file with instructions unless it is told to
BEGIN = "<!-- orchestratia:begin (`orchestratia init` writes this section: changes are lost) -->"
END = "<!-- orchestratia:end -->"
MARKER = re.compile(r"^[ \t]*<!-- orchestratia:(begin|end)\b[^\n]*-->[ \t]*$", re.M)


def guide(roles):
    return "\n".join((GUIDE_HEAD, *(GUIDES[role] for role in roles), COMMON_GUIDE)).rstrip()


def with_section(text, section, name):
    """`text` with `section` between our markers, in the place it had or at the end.

    Raises Problem when the markers are not one pair: what is the user's cannot be told then.
    """
    section = f"{BEGIN}\n{section}\n{END}"
    found = list(MARKER.finditer(text))
    if not found:
        return (
            f"{text}{'' if text.endswith(chr(10)) else chr(10)}\n{section}\n"
            if text
            else f"{section}\n"
        )
    if [marker[1] for marker in found] != ["begin", "end"]:
        lines = ", ".join(str(text.count("\n", 0, marker.start()) + 1) for marker in found)
        raise Problem(
            f"{name} is left as it is: the markers of our section are not one begin and one end "
            f"(line {lines}). Delete these lines and what is ours between them, then run it again.",
            "local",
        )
    return text[: found[0].start()] + section + text[found[1].end() :]


def with_skill(text, section, name):
    """The whole text of a skill. Raises Problem for a file that is not ours."""
    if text and BEGIN not in text:
        raise Problem(
            f"{name} is left as it is: it was not written by `orchestratia init`. Move it away, "
            "then run it again.",
            "local",
        )
    return f"{SKILL_HEAD}\n{BEGIN}\n{section}\n{END}\n"


def with_aider(text, section, name):
    return text or f"read: [{TAUGHT['aider'][0]}]\n"


def file_text(path, name, root):
    """(text, line ending) of a file, empty if it is not there. Raises Problem."""
    try:
        # A link that leads elsewhere may have been put there to have something else written to.
        if not path.resolve().is_relative_to(root.resolve()):
            raise Problem(f"{name} is a link that leads out of {root}: not written.", "local")
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return "", "\n"
    except UnicodeDecodeError as error:
        raise Problem(
            f"{name} is not UTF-8 text (byte {error.start}): not written.", "local"
        ) from None
    except OSError as error:
        raise Problem(f"Cannot read {name}: {error.strerror}.", "local") from None
    if not os.access(path, os.W_OK):
        raise Problem(f"Cannot write {name}: it is read-only.", "local")
    return text.replace("\r\n", "\n"), "\r\n" if "\r\n" in text else "\n"


def write_file(path, text, name):
    """Replaces a file at once or not at all; its mode stays, a link is followed."""
    path = path.resolve()
    try:
        mode = path.stat().st_mode & 0o7777 if path.exists() else 0o644
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".orchestratia-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode())
            os.chmod(scratch, mode)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise Problem(f"Cannot write {name}: {error.strerror}.", "local") from None


def taught_files(agents):
    """{path: what makes its new text} for these coding agents."""
    files = {}
    for agent in agents:
        section, skill = TAUGHT[agent]
        files |= {section: with_section} | ({skill: with_skill} if skill else {})
        files |= {AIDER_SETTINGS: with_aider} if agent == "aider" else {}
    return files


def roles_here(app, role):
    """The parts of the guide to write: of the role given, else of the session's, else both."""
    if role:
        return [role]
    key = app.credentials.key or ""
    if app.credentials.url and key.startswith(("orc_", "orcs_")):
        known = app.hub.get("auth/me").get("role")
        return {"worker": ["worker"], "orchestrator": ["orchestrator"]}.get(known, list(GUIDES))
    return list(GUIDES)


@cli.command(
    example="orchestratia init\norchestratia init --dir ~/shop --role worker --agent claude"
)
@click.option("--dir", "directory", metavar="DIR", default=".", help="Where; here if left out.")
@click.option("--role", type=click.Choice(list(GUIDES)), help="Only what this role needs.")
@click.option(
    "--agent",
    "agents",
    multiple=True,
    type=click.Choice([*TAUGHT, "all"]),
    help="For this coding agent; repeatable. All if left out.",
)
@pass_app
def init(app, directory, role, agents):
    """Teach the coding agents of a directory these commands.

    Writes a section of AGENTS.md, CLAUDE.md and GEMINI.md, and skills. What else is in the files
    stays; run again, it brings the section up to date. The role is the session's if there is one.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise usage(f"{directory} is not a directory; give one with --dir.")
    chosen = list(TAUGHT) if not agents or "all" in agents else agents
    section, changes, seen = guide(roles_here(app, role)), [], set()
    for name, renew in taught_files(chosen).items():  # all are checked before any is written
        path = root / name
        before, ending = file_text(path, name, root)
        after = renew(before, section, name)
        if path.resolve() not in seen:
            changes.append((path, name, before, after, ending))
        seen.add(path.resolve())
    for path, name, before, after, ending in changes:
        if after != before:
            write_file(path, after.replace("\n", ending), name)
    files = [
        {"path": name, "done": "kept" if after == before else "updated" if before else "created"}
        for _, name, before, after, _ in changes
    ]
    app.show({"directory": str(root.resolve()), "files": files}, taught_view)
    settings = root / AIDER_SETTINGS
    if "aider" in chosen and TAUGHT["aider"][0] not in settings.read_text("utf-8", "replace"):
        app.say(f"aider does not read it yet: add {TAUGHT['aider'][0]} to `read` in {settings}.")


def taught_view(screen, data):
    columns = (Column("file", line_of("path")), Column("", line_of("done")))
    return screen.table(data["files"], columns, "")


# --- the same for programs: an MCP server -----------------------------------------------------

LONGEST_WAIT_S = 50  # some coding agents give a tool 60 s
PROGRESS_S = 10


@functools.cache
def mcp_library():
    """The parts of the MCP SDK that are used, imported only by the command that needs them."""
    modules = {
        "anyio": "anyio",
        "types": "mcp.types",
        "lowlevel": "mcp.server.lowlevel",
        "stdio": "mcp.server.stdio",
    }
    try:
        library = {name: importlib.import_module(module) for name, module in modules.items()}
        there = importlib.metadata.version("mcp")
    except ImportError:
        library, there = {}, None
    if not there or there.partition(".")[0] != "2":
        state = f"is installed in version {there}" if there else "is not installed"
        remedy = f"{shlex.quote(sys.executable)} -m pip install 'mcp>=2.3,<3'"
        raise Problem(f"This needs version 2 of mcp, which {state}. Run: {remedy}", "local")
    return library


class Tool(NamedTuple):
    """A command as a tool. own: about the session's own task if none is named. reads: changes
    nothing. waits: unless told not to. must: options it cannot do without. less: those it has not.
    """

    words: str
    own: bool = False
    reads: bool = False
    waits: bool = False
    about: str = ""
    must: tuple = ()
    less: tuple = ()

    @property
    def name(self):
        return self.words.replace(" ", "_").replace("-", "_")

    @property
    def command(self):
        found = cli
        for word in self.words.split():
            found = found.commands[word]
        return found


SEEING_TOOLS = (
    Tool("status", reads=True),
    Tool("task view", own=True, reads=True),
    Tool("task notes", own=True, reads=True),
    Tool("task note", own=True),
    Tool("contract list", own=True, reads=True),
    Tool("contract show", own=True, reads=True),
    Tool("plan show", own=True, reads=True),
    Tool("intervention show", reads=True),
)
WORKER_TOOLS = (
    Tool("task check", reads=True),
    Tool("task start", own=True),
    Tool("task help", own=True, waits=True),
    Tool("plan submit", own=True, waits=True, must=("plan",)),
    Tool(
        "task complete",
        own=True,
        about='Contracts go in the result by their keys: {"summary": …, "contracts": {KEY: …}}.',
        must=("result",),
    ),
    Tool("task fail", own=True),
)
ORCHESTRATOR_TOOLS = (
    Tool("server list", reads=True),
    Tool("session list", reads=True),
    Tool("session screen", reads=True),
    Tool("task list", reads=True),
    Tool("task create"),
    Tool("task update"),
    Tool("task assign"),
    Tool("task cancel"),
    Tool("task retry"),
    Tool("task explain", reads=True),
    Tool("task wait", reads=True, waits=True),
    Tool("task deps add"),
    Tool("task deps remove"),
    Tool("plan approve"),
    Tool("plan revise"),
    Tool("intervention list", reads=True),
    Tool("intervention respond", must=("response",)),
    Tool("pipeline create", must=("inline",)),
    Tool("pipeline show", reads=True, less=("timeout",)),
    Tool("events", reads=True),
)
PERSON_TOOLS = (Tool("contract set"),)
# By the role the hub gives the key; a person has none and gives work out.
ROLE_TOOLS = {
    "worker": SEEING_TOOLS + WORKER_TOOLS,
    "plain": SEEING_TOOLS + WORKER_TOOLS,
    "orchestrator": SEEING_TOOLS + WORKER_TOOLS + ORCHESTRATOR_TOOLS,
    "server": SEEING_TOOLS + WORKER_TOOLS + ORCHESTRATOR_TOOLS,
    None: SEEING_TOOLS + ORCHESTRATOR_TOOLS + PERSON_TOOLS,
}
# What a tool does not have: it reads files, follows for ever, or says the same twice.
NOT_FOR_TOOLS = {"spec_file", "plan_file", "result_file", "file", "id", "follow", "watch", "text"}
OBJECT = {"type": "object"}
ANYTHING = {"anyOf": [OBJECT, {"type": "string"}]}
TEXTS = {"type": "array", "items": {"type": "string"}}
# What is written as JSON on a command line, and lists of words.
SCHEMAS = {
    "structured_spec": OBJECT,
    "inline": OBJECT,
    "result": ANYTHING,
    "plan": ANYTHING,
    "value": {"description": "Any JSON value."},
    "command": TEXTS,
}
AS_JSON = {"structured_spec", "inline", "value", "command"}
WORDS_OF = {  # arguments by the names they have in the help
    "task_id": "A task: its id or the first 4 characters or more.",
    "task_ids": "Tasks: their ids or the first 4 characters or more.",
    "key": "The key of a contract.",
}


class Parameter(NamedTuple):
    """One property of a tool: what it is, and how it is written on a command line.

    option: `--title`, None for a word of its own. off: what says no to a switch.
    """

    schema: dict
    option: str | None
    off: str | None = None
    needed: bool = False


def parameters(tool):
    """{name: Parameter} of a tool, from the options and arguments of its command."""
    found = {}
    for one in tool.command.params:
        if isinstance(one, click.Option):
            long = max(one.opts, key=len)
            name = long.removeprefix("--").replace("-", "_")
            off = one.secondary_opts[0] if one.secondary_opts else None
            if name not in NOT_FOR_TOOLS and name not in tool.less:
                needed = one.required or name in tool.must
                found[name] = Parameter(schema_of(one, name), long, off, needed)
        elif one.name not in NOT_FOR_TOOLS:
            found |= words_of(tool, one)
    return found


def words_of(tool, argument):
    """The parameters that a command's arguments are."""
    if argument.name in ("positional", "given_words", "refs"):
        many = argument.name == "refs"
        name = "task_ids" if many else "task_id"
        texts = TEXTS if many else {"type": "string"}
        own = " Your own if left out." if tool.own else ""
        schema = {**texts, "description": WORDS_OF[name] + own}
        found = {name: Parameter(schema, "--id", needed=not tool.own)}
        for word in argument.make_metavar(click.Context(tool.command)).lower().split()[1:]:
            about = SCHEMAS.get(word) or {"type": "string", "description": WORDS_OF.get(word, "")}
            found[word] = Parameter(about, None, needed=True)
        return found
    name = "id" if argument.name == "ref" else argument.name
    return {name: Parameter({"type": "string"}, None, needed=argument.required)}


def schema_of(option, name):
    """The JSON schema of an option's value."""
    kinds = {
        click.Choice: lambda kind: {"type": "string", "enum": list(kind.choices)},
        Duration: lambda kind: {"type": "number"},
        click.IntRange: lambda kind: {"type": "integer"},
        click.types.IntParamType: lambda kind: {"type": "integer"},
    }
    made = next((make for kind, make in kinds.items() if isinstance(option.type, kind)), None)
    one = (
        {"type": "boolean"} if option.is_flag else made(option.type) if made else {"type": "string"}
    )
    if option.multiple:
        one = {"type": "array", "items": one}
    unit = "Seconds." if isinstance(option.type, Duration) else ""
    about = " ".join(filter(None, (option.help, unit)))
    return {**SCHEMAS.get(name, one), **({"description": about} if about else {})}


def command_line(tool, arguments, longest):
    """The words of a tool's command. Raises click.UsageError for arguments it does not have.

    Each value is bound to its option or stands behind `--`, so that none can be an option itself.
    longest: seconds that a tool which waits may wait.
    """
    known, words, rest = parameters(tool), [], []
    if unknown := arguments.keys() - known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise usage(f"{tool.name} has no argument {min(unknown)!r}; {has}.")
    for name, one in known.items():
        if name in arguments and (arguments[name] is not None or name == "value"):
            (words if one.option else rest).extend(written_out(one, name, arguments[name]))
        elif one.needed:
            raise usage(f"{tool.name} needs the argument {name!r}.")
    if tool.waits or "wait" in known:
        words = [word for word in words if not word.startswith(("--wait", "--timeout="))]
        if arguments.get("wait", tool.waits):
            timeout = DURATION_TYPE.convert(arguments.get("timeout") or longest, None, None)
            words += ["--wait"] * ("wait" in known) + [f"--timeout={min(timeout, longest)}s"]
    return [*tool.words.split(), *words, *(["--", *rest] if rest else [])]


def written_out(parameter, name, value):
    """A value as the words of a command line."""
    option = parameter.option
    if parameter.schema.get("type") == "boolean":
        return [option] if value else [parameter.off] if parameter.off else []
    if name in AS_JSON:
        texts = [json.dumps(value)]
    else:
        several = isinstance(value, list) and parameter.schema.get("type") == "array"
        texts = [
            one if isinstance(one, str) else json.dumps(one)
            for one in (value if several else [value])
        ]
    return [f"{option}={text}" for text in texts] if option else texts


class Call(App):
    """A command called by a program: what it would print is its answer."""

    def __init__(self, app):
        super().__init__()
        self.flags = {**app.flags, "as_json": True}
        self.answer, self.over = {}, threading.Event()

    def alive(self):
        if self.over.is_set():
            raise Interrupted("The call was cancelled.", "interrupted")

    def show(self, data, render=None):
        self.answer = data


# The lists of the hub's own objects.
ROWS = {"tasks", "servers", "sessions", "events", "contracts", "plans", "waiting", *ALSO_WAITING}


def lean(answer):
    """An answer of the hub without its null fields; what users put into it stays as it is."""
    if isinstance(answer, list):
        return [lean(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    return {
        key: lean(value) if key in ROWS and isinstance(value, list) else value
        for key, value in answer.items()
        if value is not None
    }


STILL_WAITING = {
    "task help": "intervention_show with this id and wait=true waits on. An answer that nobody "
    "waits for is typed into this session.",
    "intervention show": "Call it again to wait on.",
    "plan submit": "plan_show with wait=true waits on.",
    "plan show": "Call it again to wait on.",
    "task wait": "Call it again to wait on.",
}


def carry_out(tool, arguments, call, longest):
    """(text, whether it is an error) of a tool called with `arguments` (object by name)."""
    try:
        if tool.own and not (arguments.get("task_id") or os.environ.get("ORCHESTRATIA_TASK_ID")):
            arguments = arguments | {"task_id": call.hub.get("auth/me").get("task_id")}
        words = command_line(tool, arguments, longest)
        with suppress(click.exceptions.Exit), cli.make_context(PROGRAM, words, obj=call) as context:
            cli.invoke(context)
        return json.dumps(lean(call.answer), ensure_ascii=False), False
    except TimedOut as late:
        told = {"still_waiting": True, "next": STILL_WAITING[tool.words]}
        return json.dumps(told | lean(late.fields), ensure_ascii=False), False
    except Problem as problem:
        candidates = [candidate_line(one) for one in problem.fields.get("candidates") or ()]
        return "\n".join((clean(problem), *candidates)), True
    except click.ClickException as error:
        return clean(error.format_message()), True
    except Exception as error:  # the last resort: the connection must outlive it
        return f"The hub's answer or this program is at fault ({one_line(error)}).", True


def described_tool(types, tool):
    """A tool as the protocol lists it."""
    known = parameters(tool)
    schema = {
        "type": "object",
        "properties": {name: one.schema for name, one in known.items()},
        "required": [name for name, one in known.items() if one.needed],
        "additionalProperties": False,
    }
    about = " ".join(filter(None, (one_line(tool.command.help.partition("\n\n")[0]), tool.about)))
    if tool.waits:
        about += " Waits for it, unless `wait` is false; says when it has not come yet."
    hints = types.ToolAnnotations(
        read_only_hint=tool.reads, destructive_hint=tool.name == "task_cancel"
    )
    return types.Tool(name=tool.name, description=about, input_schema=schema, annotations=hints)


async def answer_tool(library, app, tools, longest, context, asked):
    """Carries out one call in a thread of its own, with signs of life to whoever waits."""
    anyio, types = library["anyio"], library["types"]
    tool, call = tools.get(asked.name), Call(app)
    if tool is None:
        text, failed = f"There is no tool {asked.name!r} for this key.", True
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(signs_of_life, anyio, context.session)
            try:
                text, failed = await anyio.to_thread.run_sync(
                    carry_out, tool, asked.arguments or {}, call, longest, abandon_on_cancel=True
                )
            finally:
                call.over.set()
            group.cancel_scope.cancel()
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=text)], is_error=failed
    )


async def signs_of_life(anyio, session):
    since = 0
    while True:
        await anyio.sleep(PROGRESS_S)
        since += PROGRESS_S
        await session.report_progress(since, message="Still waiting.")


async def serve_tools(library, app, tools, instructions, longest):
    """Speaks MCP on standard input and output until the input ends."""
    types = library["types"]
    listed_tools = [described_tool(types, tool) for tool in tools.values()]

    async def list_tools(context, asked):
        return types.ListToolsResult(tools=listed_tools)

    async def call_tool(context, asked):
        return await answer_tool(library, app, tools, longest, context, asked)

    server = library["lowlevel"].Server(
        PROGRAM,
        version=VERSION,
        instructions=instructions,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    async with library["stdio"].stdio_server() as (source, sink):
        await server.run(source, sink, server.create_initialization_options())


INSTRUCTIONS = {
    "worker": "Your task: read it with task_view, say how it goes with task_note, ask with "
    "task_help instead of guessing, and end it with task_complete or task_fail.",
    "orchestrator": "Split work into tasks with task_create, link and assign them, wait for them "
    "with task_wait, and answer what their workers ask (intervention_list).",
}


@cli.command("mcp", example="claude mcp add orchestratia -- orchestratia mcp --longest-wait 1h")
@click.option(
    "--longest-wait",
    type=DURATION_TYPE,
    default=LONGEST_WAIT_S,
    help="How long a tool waits for a person before it says so: less than your coding agent "
    f"gives a tool. {LONGEST_WAIT_S} s if left out.",
)
@pass_app
def serve_mcp(app, longest_wait):
    """Serve these commands as tools to a coding agent (MCP, on standard input and output).

    Which tools there are depends on the role of the key: a worker's are about its task, an
    orchestrator and a person also give work out.
    """
    library = mcp_library()
    me = app.hub.get("auth/me")
    role = me.get("role") if me.get("kind") in ("server", "session") else None
    tools = {tool.name: tool for tool in ROLE_TOOLS.get(role, SEEING_TOOLS)}
    told = INSTRUCTIONS["worker" if role in ("worker", "plain") else "orchestrator"]
    library["anyio"].run(serve_tools, library, app, tools, told, longest_wait)


# --- events -----------------------------------------------------------------------------------


@cli.command(example="orchestratia events --follow --task 4f2a")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now.")
@click.option("--after", type=int, metavar="EVENT", help="What came after this event.")
@click.option("--before", type=int, metavar="EVENT", help="What came before this event.")
@click.option("--task", "task_text", metavar="ID", help="Only what happened to this task.")
@click.option("--limit", type=click.IntRange(1, PAGE), default=50, show_default=True)
@pass_app
def events(app, follow, after, before, task_text, limit):
    """Show what happened last, oldest first.

    With --follow --json each event is a line of its own.
    """
    if before is not None and (follow or after is not None):
        raise usage("--before goes neither with --after nor with --follow.")
    task_id = app.full_id(task_ref(task_text)) if task_text else None
    query = {"task_id": task_id, "project_id": app.project_id, "limit": limit}
    where = {"after": after} if after is not None else {"tail": 1, "before": before}
    page = app.hub.get("events", **query, **where)
    if not follow:
        return app.show(page, show_events)
    found = page.get("events") or []
    stream = Stream(app.hub, found[-1]["id"] if found else after)
    for event in found:
        print_event(app, event)
    while True:
        item = stream.get()
        if item is Stream.LOST:
            app.say(LOST_THE_HUB)
        elif item is not Stream.SYNC and task_id in (None, item.get("task_id")):
            print_event(app, item)


def print_event(app, event):
    if app.as_json:
        return click.echo(json.dumps(event))
    about = event.get("task_id") or event.get("session_id") or event.get("server_id") or ""
    app.screen.print(
        Text.assemble(
            (f"{clock(event.get('at'))}  ", "dim"),
            (f"{one_line(event.get('type') or '?'):<20}  ", event_style(event)),
            (f"{app.screen.short(about)}  ", "dim"),
            f"{one_line(event.get('actor') or '')}  ",
            details_of(event, 200),
        )
    )


def event_style(event):
    return MARKS.get(EVENT_STATUS.get(event.get("type")), ("", ""))[1]


# --- the dashboard, the shell -----------------------------------------------------------------

# What `open` opens: the path of its page, and whether that needs a name or id.
PAGES = {
    "overview": "",
    "tasks": "tasks",
    "task": "tasks/",
    "sessions": "sessions",
    "session": "sessions/",
    "servers": "servers",
    "pipelines": "pipelines",
    "pipeline": "pipelines/",
    "events": "events",
    "docs": "docs",
}


@cli.command("open", example="orchestratia open task 4f2a")
@click.argument("page", type=click.Choice(list(PAGES)), default="overview")
@click.argument("name", required=False)
@pass_app
def open_page(app, page, name):
    """Open a page of the dashboard in the browser.

    Its address is printed too, for where there is no browser. In a session `open task` and
    `open session` mean its own.
    """
    url = f"{app.hub.url}/{PAGES[page]}{page_of(app, page, name)}".rstrip("/")
    opened = has_browser() and webbrowser.open(url)
    app.show({"url": url, "opened": opened})
    if not app.as_json:
        app.screen.line(url)


def page_of(app, page, name):
    """The last part of a page's address: the whole id of what it is about."""
    if not PAGES[page].endswith("/"):
        if name:
            raise usage(f"The page of {page} takes no name; try: open {page.removesuffix('s')}.")
        return ""
    name = name or os.environ.get(f"ORCHESTRATIA_{page.upper()}_ID")
    if not name:
        raise usage(f"Which {page}? Give its name or id.")
    ref = task_ref(name) if page == "task" else app.segment(f"{page}s", name)
    return app.hub.get(f"{page}s/{ref}")["id"]


def has_browser():
    """Whether a browser with a window can be opened; one in this terminal would take it over."""
    shown = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return shown or sys.platform in ("darwin", "win32")


@cli.command(
    example='eval "$(orchestratia completion bash)"      # in ~/.bashrc\n'
    'eval "$(orchestratia completion zsh)"       # in ~/.zshrc\n'
    "orchestratia completion fish > ~/.config/fish/completions/orchestratia.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell):
    """Print what makes a shell complete commands, names and ids."""
    variable = f"_{PROGRAM.upper()}_COMPLETE"
    made = shell_completion.get_completion_class(shell)(cli, {}, PROGRAM, variable)
    click.echo(made.source_template % made.source_vars())


if __name__ == "__main__":
    cli(prog_name=PROGRAM)
