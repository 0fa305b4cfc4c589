"""The tables, the connection, the one transaction.

Reads go anywhere; writes only inside `transaction()`, which holds a process-wide lock, collects
the events of the use case, stores them with its changes and publishes them after the commit.

Times are seconds since the epoch (float, UTC) in the tables; `iso()` writes them for people.
"""

import errno
import json
import logging
import os
import re
import sqlite3
import sys
import threading
import time
import uuid
import weakref
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from peewee import (
    AutoField,
    BooleanField,
    CompositeKey,
    DatabaseProxy,
    FloatField,
    IntegerField,
    JSONField,
    Model,
    SqliteDatabase,
    TextField,
)
from playhouse import migrations

import bus as bus_module

log = logging.getLogger("orchestratia.models")

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK_PATIENCE_S = 5.0  # how long a write waits for its turn before it is refused with 503

WRITER_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=1",
    "PRAGMA cache_size=-16000",  # KiB: a completion that frees a thousand tasks stays in memory
    "PRAGMA wal_autocheckpoint=8000",  # pages: rarely is it a hand-off that copies them home
    "PRAGMA busy_timeout=0",  # from now on waiting is done by us: see `_begin`
)

BOOTED_S = 3600.0  # so long after it has started, a machine has been told the time
CLOCK_SET_S = 2.0  # a clock that is off by more at once was set; less is a clock that is steered

db = DatabaseProxy()
bus = bus_module.Bus()
_write_lock = threading.Lock()
_local = threading.local()


# ── refusals ──────────────────────────────────────────────────────────────────────────────────


class Refused(Exception):
    """A request that is not carried out; `str(error)` is one sentence: state, cause, remedy.

    Refused
    ├── Unauthorised  401  no or no valid credential
    ├── Forbidden     403  known, but not allowed
    ├── NotFound      404  not there, or not visible to the caller
    ├── Conflict      409  the present state does not allow it
    ├── Invalid       422  the request itself is wrong
    ├── TooMany       429  slow down
    ├── Busy          503  the database could not be written in time; nothing was changed
    └── NoRoom        507  the disk is full or fails; nothing was changed
    """

    status, code = 400, "refused"

    def __init__(self, sentence: str, code: str | None = None, **fields):
        super().__init__(sentence)
        self.code = code or self.code
        self.fields = fields


class Unauthorised(Refused):
    status, code = 401, "unauthorised"


class Forbidden(Refused):
    status, code = 403, "forbidden"


class NotFound(Refused):
    status, code = 404, "not_found"


class Conflict(Refused):
    status, code = 409, "conflict"


class Invalid(Refused):
    status, code = 422, "invalid"


class TooMany(Refused):
    status, code = 429, "too_many"


class Busy(Refused):
    status, code = 503, "busy"


class NoRoom(Refused):
    status, code = 507, "disk"


# ── the clock ─────────────────────────────────────────────────────────────────────────────────


class Clock:
    """The wall clock, and whether somebody has set it.

    `translate(tx, by)`, if given, is called in the first transaction after the clock was set by
    `by` seconds, before anything is stamped with the new time.
    """

    def __init__(self):
        self.translate = None
        self.begin(0.0)

    def begin(self, newest: float, stored: dict | None = None) -> None:
        """Start to watch it.

        newest: a time that is known to have been, in seconds since 1970. stored: `state()` as the
        last process left it; if the machine runs since then without a break, it is known whether
        the clock was set meanwhile.
        """
        same_boot = bool(stored) and stored["boot"] == _boot()
        self._offset = stored["offset"] if same_boot else time.time() - time.monotonic()
        self._newest = newest
        self._began = 0.0 if same_boot else time.time()

    def heed(self) -> None:
        """All that is stored is by the clock as it stands now."""
        self._offset = time.time() - time.monotonic()

    def state(self, by: float = 0.0) -> dict:
        """What the next process is to know: {boot, offset}; by: seconds it is being moved by."""
        return {"boot": _boot(), "offset": self._offset + by}

    def stamped(self, by: float) -> tuple[float, float]:
        """(from, until): between which times what is stored was stamped by the clock before it was
        set by so many seconds; all of it, as a rule.

        A clock that is set soon after the machine has started was wrong from the start, and what
        was stored before the start was not stamped by it.
        """
        if self._began and time.monotonic() < BOOTED_S:
            return self._began, time.time() - by
        return 0.0, float("inf")

    def latest(self) -> float:
        """The time, never earlier than it has been: what has expired stays expired."""
        self._newest = max(self._newest, time.time())
        return self._newest

    def set_by(self) -> float:
        """By how many seconds the clock was set since `settle`; 0 when nobody has."""
        by = time.time() - time.monotonic() - self._offset
        if abs(by) > CLOCK_SET_S:
            return by
        self._offset += by
        return 0.0

    def settle(self, by: float) -> None:
        """What runs has been moved by so much."""
        self._offset += by
        self._began += by if self._began else 0.0


def _boot() -> str:
    """Which run of the machine this is, where that can be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown {os.getpid()}"


clock = Clock()


# ── connection ────────────────────────────────────────────────────────────────────────────────


def _patched() -> bool:
    """Whether gevent has replaced the standard threads, so that all run in one OS thread."""
    monkey = sys.modules.get("gevent.monkey")
    return bool(monkey and monkey.is_module_patched("threading"))


def offloop(function, *args):
    """The result of a function that waits in C for long: run on a native thread under gevent, so
    that everybody else goes on; called as it is otherwise. It must not use locks or log."""
    if not _patched():
        return function(*args)
    import gevent

    error, value = gevent.get_hub().threadpool.apply(_tried, (function, args))
    if error:
        raise error
    return value


def _tried(function, args) -> tuple[BaseException | None, object]:
    """(error, value): what is raised on a native thread would be printed there as well."""
    try:
        return None, function(*args)
    except Exception as error:
        return error, None


class HubDatabase(SqliteDatabase):
    """One write connection, used only inside `transaction()`; readers beside it that see commits.

    Under gevent all greenlets share one reader; with real threads each has its own.
    """

    def __init__(self, path: str):
        super().__init__(path, autoconnect=False)
        self._readers = weakref.WeakSet()
        self._mine = _Shared() if _patched() else threading.local()
        self.writer = self._open(*WRITER_PRAGMAS)

    def _open(self, *pragmas: str) -> sqlite3.Connection:
        """The last of the pragmas says that SQLite does not wait for locks; while it opens the file
        it does, for somebody who looks into it may hold it just then."""
        connection = sqlite3.connect(
            self.database,
            timeout=LOCK_PATIENCE_S,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        for pragma in pragmas:
            connection.execute(pragma)
        return connection

    def connection(self):
        if getattr(_local, "transaction", None):
            return self.writer
        reader = getattr(self._mine, "reader", None)
        if reader is None:
            # The file is in WAL mode already: to set it again would want a lock.
            reader = self._mine.reader = self._open("PRAGMA query_only=1", "PRAGMA busy_timeout=0")
            self._readers.add(reader)
        return reader

    def cursor(self, named_cursor=None):
        return self.connection().cursor()

    def is_closed(self):
        return not hasattr(self, "writer")

    def close(self):
        for connection in (*self._readers, self.writer):
            connection.close()


class _Connection(sqlite3.Connection):
    """A connection that a WeakSet can hold and that closes itself with its thread."""

    def __del__(self):
        self.close()


class _Shared:
    reader = None


def open_db(path: str | os.PathLike, beside: bool = False) -> HubDatabase:
    """Bring the SQLite file at `path` to the newest schema and use it from now on.

    beside: a hub uses it now, so its schema is left as it is. Raises peewee's OperationalError when
    the file cannot be opened or a migration fails, and UnusableData when a newer hub has written it
    (or an older one runs); the file is then as it was.
    """
    plain = SqliteDatabase(str(path), pragmas={"journal_mode": "wal", "synchronous": "full"})
    plain.connect()
    try:
        had = _schema_of(plain)
        if had > newest_schema():
            raise UnusableData(
                f"{path} was written by a newer hub ({had} migrations, this one knows "
                f"{newest_schema()}): run that one, or restore a backup made before the upgrade."
            )
        if beside and had < newest_schema():
            raise UnusableData(f"The hub that uses {path} is older than this one: restart it.")
        for name in migrations.run(plain, str(MIGRATIONS)) or ():
            log.info("migrated: %s", name)
    finally:
        plain.close()
    database = HubDatabase(str(path))
    db.initialize(database)
    _begin_clock()
    return database


def _begin_clock() -> None:
    last = one("SELECT at FROM event ORDER BY id DESC LIMIT 1")
    stored = one("SELECT value FROM meta WHERE key = 'clock'")
    clock.begin(last["at"] if last else 0.0, loads(stored["value"]) if stored else None)
    with transaction():
        keep_clock()


def keep_clock(by: float = 0.0) -> None:
    """Inside a transaction: store how the clock stands, which is being moved by so many seconds."""
    execute("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", (dumps(clock.state(by)),))


class UnusableData(Exception):
    """What is in the data directory cannot be used, now or at all; the sentence says what to do."""


def _schema_of(plain: SqliteDatabase) -> int:
    if not plain.table_exists("schema_migration"):
        return 0
    [[had]] = plain.execute_sql("SELECT COUNT(*) FROM schema_migration")
    return had


def newest_schema() -> int:
    """How many migrations this code knows."""
    return len(list(MIGRATIONS.glob("[0-9]*.py")))


def close_db() -> None:
    db.obj.close()


# ── reading and writing ───────────────────────────────────────────────────────────────────────


def execute(sql: str, params=()) -> sqlite3.Cursor:
    """Run one statement on the connection that is right here; returns its cursor."""
    return db.obj.connection().execute(sql, params)


def rows(sql: str, params=()) -> list[dict]:
    """All rows of a query as dictionaries."""
    cursor = execute(sql, params)
    names = [d[0] for d in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def one(sql: str, params=()) -> dict | None:
    """The first row of a query as a dictionary, or None."""
    found = rows(sql, params)
    return found[0] if found else None


def in_chunks(values: list, size: int = 500):
    """`values` in slices of at most `size`, each with its `(?, ?, …)`."""
    for start in range(0, len(values), size):
        part = values[start : start + size]
        yield part, f"({', '.join('?' * len(part))})"


def labels(table: str, column: str, ids: set[str]) -> dict[str, str]:
    """{id: what the column says} of the rows named."""
    found = {}
    for part, marks in in_chunks(sorted(ids)):
        found |= dict(
            execute(f"SELECT id, {column} FROM {table} WHERE id IN {marks}", part).fetchall()
        )
    return found


def newest(table: str, branches: list[dict], where: str, values: list, limit: int) -> list[dict]:
    """At most `limit` rows, the highest `seq` first.

    branches: column values that an index ends in `seq` for, such as {project_id, status}; each is
    one short walk of that index, so the cost does not grow with the table. where: a further
    condition with its values, "" for none.
    """
    found = []
    for branch in branches:
        conditions = [f"{column} = ?" for column in branch] + ([where] if where else [])
        sql = f"SELECT seq FROM {table} WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?"
        found += [seq for (seq,) in execute(sql, [*branch.values(), *values, limit])]
    wanted = sorted(found, reverse=True)[:limit]
    got = {}
    for part, marks in in_chunks(wanted):
        got |= {r["seq"]: r for r in rows(f"SELECT * FROM {table} WHERE seq IN {marks}", part)}
    return [got[seq] for seq in wanted]


def containing(text: str) -> str:
    """The pattern of `LIKE ? ESCAPE '\\'` for what contains the text as it is."""
    return "%" + re.sub(r"([%_\\])", r"\\\1", text) + "%"


def insert_many(table: str, columns: tuple[str, ...], values: list[tuple]) -> None:
    """Insert rows of equal shape with one prepared statement."""
    marks = ", ".join("?" * len(columns))
    db.obj.connection().executemany(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values
    )


_stored = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def dumps(value) -> str:
    """JSON as it is stored: compact, sorted, no NaN; equal values give equal text."""
    return _stored.encode(value)


def loads(text: str | None, default=None):
    return default if text is None else json.loads(text)


def epoch() -> str:
    """The id of this database: new after a restore, so that agents know old command ids apart."""
    return one("SELECT value FROM meta WHERE key = 'hub_epoch'")["value"]


# The servers that have not said what they have since the hub was restored from a backup.
UNHEARD = "(SELECT j.value FROM meta, json_each(meta.value) AS j WHERE meta.key = 'restored')"


def is_unheard(server_id: str) -> bool:
    """Whether the hub was restored from a backup and has not heard since what the server has."""
    return bool(one(f"SELECT 1 WHERE ? IN {UNHEARD}", (server_id,)))


def new_id() -> str:
    return str(uuid.uuid4())


def iso(at: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 in UTC with milliseconds."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def since_epoch(at: str) -> float:
    """Seconds since the epoch of a time in ISO 8601. ValueError or TypeError: it is none."""
    return datetime.fromisoformat(at).timestamp()


# ── the transaction ───────────────────────────────────────────────────────────────────────────

EVENT_COLUMNS = (
    "project_id",
    "type",
    "task_id",
    "cause_id",
    "session_id",
    "server_id",
    "actor",
    "details",
    "at",
)


class Transaction:
    """What one use case has to say once it is committed."""

    def __init__(self):
        self.now = time.time()
        self.events: list[tuple] = []
        self.messages: list[tuple[str, object]] = []

    def emit(
        self, type: str, project_id, actor: str, details=None, *, task=None, cause=None,
        session=None, server=None,
    ) -> None:  # fmt: skip
        """Append an event; ids are given at commit, in the order of the calls."""
        self.events.append(
            (project_id, type, task, cause, session, server, actor, dumps(details or {}), self.now)
        )

    def tell(self, topic: str, message="look") -> None:
        """Publish `message` on `topic` of the bus after the commit."""
        self.messages.append((topic, message))


@contextmanager
def transaction():
    """Begin, or join as a savepoint, the transaction of this use case; yields a Transaction.

    On success the events are stored and committed with the changes and then published; on an
    exception everything of this block is undone and nothing published. Raises Busy when the write
    lock cannot be had within LOCK_PATIENCE_S, NoRoom when the disk does not take it.
    """
    outer = getattr(_local, "transaction", None)
    if outer is not None:
        with _savepoint(outer):
            yield outer
        return
    if not _write_lock.acquire(timeout=LOCK_PATIENCE_S):
        raise Busy("The database is busy; try again in a moment.")
    try:
        tx = _begin()
        try:
            if set_by := clock.set_by() if clock.translate else 0.0:
                clock.translate(tx, set_by)
            yield tx
            first = _store_events(tx)
            execute("COMMIT")
            clock.settle(set_by)
        except BaseException as error:
            db.obj.writer.rollback()
            _raise_disk(error)
            raise
        finally:
            _local.transaction = None
    finally:
        _write_lock.release()
    _publish(tx, first)


def _begin() -> Transaction:
    writer, deadline = db.obj.writer, time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            # another process holds the file; waiting inside SQLite would stop every greenlet
            _raise_disk(error)
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise Busy("The database is busy; try again in a moment.") from error
            time.sleep(0.01)
        else:
            _local.transaction = Transaction()
            return _local.transaction


DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def private(path, flags: int) -> int:
    """An opener for `open`: what it makes is for its owner alone."""
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Have the disk keep which files are in a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def writing_files():
    """Raises NoRoom for what the disk does not take in this block."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        _raise_disk(error)
        raise


def _raise_disk(error: BaseException) -> None:
    """Raise NoRoom when an error says that the disk does not take what is written."""
    name = getattr(getattr(error, "orig", error), "sqlite_errorname", "")
    if name.startswith(DISK_ERRORS) or getattr(error, "errno", None) in NO_ROOM:
        raise NoRoom(
            f"The hub's disk does not take any more ({error}): nothing was changed. Free some "
            "space, then try again."
        ) from error


@contextmanager
def _savepoint(tx: Transaction):
    marks = len(tx.events), len(tx.messages)
    execute("SAVEPOINT block")
    try:
        yield
    except BaseException:
        execute("ROLLBACK TO block")
        execute("RELEASE block")
        del tx.events[marks[0] :], tx.messages[marks[1] :]
        raise
    execute("RELEASE block")


def _store_events(tx: Transaction) -> int:
    """Insert the events of `tx`, in a row; return the id of the first."""
    if not tx.events:
        return 0
    last = execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'").fetchone()
    # Indexed by the task's number, not its id: what happens together then lies together.
    seqs = labels("task", "seq", {t for event in tx.events for t in event[2:4] if t})
    stored = [(*event, seqs.get(event[2]), seqs.get(event[3])) for event in tx.events]
    insert_many("event", (*EVENT_COLUMNS, "task_seq", "cause_seq"), stored)
    return (last[0] if last else 0) + 1


def event_json(row: dict) -> dict:
    """A stored event as clients see it. `prev` is the id before it: a gap means look it up."""
    return {
        "id": row["id"],
        "prev": row["id"] - 1,
        "type": row["type"],
        "project_id": row["project_id"],
        "task_id": row["task_id"],
        "cause_task_id": row["cause_id"],
        "session_id": row["session_id"],
        "server_id": row["server_id"],
        "actor": row["actor"],
        "details": json.loads(row["details"]),
        "at": iso(row["at"]),
    }


class Event(dict):
    """An event on the bus, written out once in each form however many read it."""

    def __init__(self, fields: dict):
        super().__init__(fields)
        self._forms: dict[str, bytes] = {}

    def written(self, form: str, write) -> bytes:
        """The event as `write(event)` makes it, made once for all who want that form."""
        if form not in self._forms:
            self._forms[form] = write(self)
        return self._forms[form]

    @property
    def size(self) -> int:
        return len(self.written("json", lambda event: json.dumps(event).encode()))


class Glimpse(NamedTuple):
    """Word that a session does something else now, as its row says. No event: of what a worker
    does each moment nobody keeps a history."""

    project_id: str
    session_id: str


def _publish(tx: Transaction, first: int) -> None:
    """Hand committed events to whoever listens; a listener's failure never undoes the deed."""
    try:
        for n, event in enumerate(tx.events if bus.heard("events") else ()):
            row = {"id": first + n, **dict(zip(EVENT_COLUMNS, event, strict=True))}
            bus.publish("events", Event(event_json(row)))
        for topic, message in tx.messages:
            bus.publish(topic, message)
    except Exception:
        log.exception("publishing failed; readers will find the events in the table")


# ── tables ────────────────────────────────────────────────────────────────────────────────────
# Declared here for reading and for changes off the hot path; migrations/ makes them.


class Table(Model):
    class Meta:
        database = db
        legacy_table_names = False


class Meta_(Table):
    key = TextField(primary_key=True)
    value = TextField()

    class Meta:
        table_name = "meta"


class User(Table):
    id = TextField(primary_key=True, default=new_id)
    username = TextField()
    password_hash = TextField(null=True)
    is_admin = BooleanField(default=False)
    disabled = BooleanField(default=False)
    created_at = FloatField(default=time.time)


class Project(Table):
    id = TextField(primary_key=True, default=new_id)
    name = TextField()
    profile = TextField(default="command")
    settings = JSONField(default=dict)
    created_at = FloatField(default=time.time)


class Membership(Table):
    user_id = TextField()
    project_id = TextField()
    role = TextField()

    class Meta:
        primary_key = CompositeKey("user_id", "project_id")


class Token(Table):
    id = TextField(primary_key=True, default=new_id)
    user_id = TextField()
    kind = TextField()
    name = TextField(default="")
    hash = TextField()
    created_at = FloatField(default=time.time)
    expires_at = FloatField()
    used_at = FloatField(null=True)


class Registration(Table):
    id = TextField(primary_key=True, default=new_id)
    project_id = TextField()
    hash = TextField()
    note = TextField(null=True)
    created_by = TextField()
    created_at = FloatField(default=time.time)
    expires_at = FloatField()
    used_at = FloatField(null=True)
    server_id = TextField(null=True)


class Server(Table):
    id = TextField(primary_key=True, default=new_id)
    project_id = TextField()
    name = TextField()
    hostname = TextField(default="")
    os = TextField(default="")
    key_hash = TextField(null=True)
    machine_id = TextField(default="")
    online = BooleanField(default=False)
    draining = BooleanField(default=False)
    revoked = BooleanField(default=False)
    manual = BooleanField(default=False)
    repos = JSONField(default=dict)
    languages = JSONField(null=True)
    frameworks = JSONField(null=True)
    capabilities = JSONField(null=True)
    declared = JSONField(default=dict)
    profiles = JSONField(default=dict)
    slots = IntegerField(default=1)
    busy = IntegerField(default=0)
    info = JSONField(default=dict)
    agent_version = TextField(default="")
    protocol = IntegerField(default=2)
    instance = TextField(default="")
    spool_id = TextField(default="")
    spool_upto = IntegerField(default=0)
    synced = IntegerField(default=0)
    last_seen = FloatField(null=True)
    offline_at = FloatField(null=True)
    created_at = FloatField(default=time.time)


class Session(Table):
    seq = AutoField()
    id = TextField(default=new_id)
    project_id = TextField()
    server_id = TextField()
    task_id = TextField(null=True)
    attempt = IntegerField(null=True)
    name = TextField()
    role = TextField(default="plain")
    profile = TextField(null=True)
    model = TextField(null=True)
    mode = TextField(null=True)
    conversation = TextField(null=True)
    resumes = TextField(null=True)
    command = JSONField(null=True)
    state = TextField(default="starting")
    activity = TextField(default="working")
    reason = TextField(null=True)
    signal = TextField(null=True)
    signals = JSONField(default=list)
    activity_at = FloatField(null=True)
    progress_at = FloatField(null=True)
    tmux_name = TextField()
    terminal = TextField(default="tmux")
    pid = IntegerField(null=True)
    exit_code = IntegerField(null=True)
    error = TextField(null=True)
    working_directory = TextField(null=True)
    repo = TextField(null=True)
    cols = IntegerField(default=120)
    rows = IntegerField(default=40)
    log_start = IntegerField(default=0)
    log_end = IntegerField(default=0)
    created_by = TextField()
    created_at = FloatField(default=time.time)
    started_at = FloatField(null=True)
    closed_at = FloatField(null=True)
    state_at = FloatField(default=time.time)


class Pipeline(Table):
    seq = AutoField()
    id = TextField(default=new_id)
    project_id = TextField()
    name = TextField()
    id_map = JSONField()
    created_by = TextField()
    created_at = FloatField(default=time.time)
