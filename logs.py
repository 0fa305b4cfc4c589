"""Session logs: the complete output of every session, in blocks as they came, in a SQLite file of
their own, so that blocks never wait for a cascade nor a cascade for blocks.

One writer stores whatever has come in meanwhile with one commit and then says so (`then`); the
commit waits for the disk beside the loop. Reads have a connection of their own, see what is
committed and never wait for the writer.

A log is a row of `log` (where it starts and stops), its `block`s and its `mark`s: bytes that were
lost before they came here (gap), bytes removed here to keep the limits (removed), and the sizes
the terminal had (resize).
"""

import codecs
import json
import logging
import os
import sqlite3
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models import in_chunks, iso, offloop

log = logging.getLogger("orchestratia.logs")

MB = 1_000_000
QUEUE_BYTES = 32 * MB  # waiting to be stored; who brings more waits
BATCH_BYTES = 4 * MB  # of one commit
YIELD_BYTES = 256 * 1024  # stored without giving others a turn
REMOVE_BYTES = 64 * MB  # removed with one commit
PAGE_BYTES = 512 * 1024  # of one log, read at a time for a recording
JOB_BYTES = 200  # what an entry of the queue takes beside its data
END_MOST = 2**53  # beyond it a number is not exact in a browser
SAY_AGAIN_S = 60.0  # between complaints that nothing can be stored
PATIENCE_S = 5.0  # waiting for another process to be done with the file

PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA cache_size=-16000",
    "PRAGMA wal_autocheckpoint=4000",
)
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS block (session_id TEXT NOT NULL, offset INTEGER NOT NULL,"
    " size INTEGER NOT NULL, data BLOB NOT NULL, at REAL NOT NULL,"
    " PRIMARY KEY (session_id, offset))",
    # times: when which byte was printed, as [[number of the byte in the block, s after at], …]
    "ALTER TABLE block ADD COLUMN times TEXT",
    "CREATE TABLE log (session_id TEXT PRIMARY KEY, start INTEGER NOT NULL, stop INTEGER NOT NULL,"
    " bytes INTEGER NOT NULL, at REAL NOT NULL, ended INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX log_oldest ON log (ended DESC, at) WHERE bytes > 0",
    "CREATE TABLE mark (session_id TEXT NOT NULL, kind TEXT NOT NULL, start INTEGER NOT NULL,"
    " stop INTEGER, why TEXT, at REAL NOT NULL, PRIMARY KEY (session_id, kind, start))"
    " WITHOUT ROWID",
    "INSERT INTO log SELECT session_id, MIN(offset), MAX(offset + size), SUM(size), MAX(at), 0"
    " FROM block GROUP BY session_id",
    "PRAGMA user_version = 1",
)


class Piece(NamedTuple):
    """Bytes of a log that follow each other."""

    data: bytes
    offset: int  # of the first of them
    next: int  # where to read on
    start: int  # of the log
    end: int


class Block(NamedTuple):
    offset: int
    data: bytes
    at: float
    times: list


@dataclass
class _Log:
    """A row of `log` while it is being written to."""

    session_id: str
    start: int = 0
    stop: int = 0
    bytes: int = 0
    at: float = 0.0
    ended: int = 0

    def row(self) -> tuple:
        return self.session_id, self.start, self.stop, self.bytes, self.at, self.ended


@dataclass(slots=True)
class _Job:
    """One thing to be stored: `deed(row)` does it within the commit of its batch."""

    session_id: str
    deed: Callable[[_Log], None]
    size: int = 0
    then: Callable[[int], None] | None = None
    done: threading.Event | None = None  # set when it is stored, or will not be
    stored: bool = False


class LogStore:
    """The logs of all sessions. `removed(session_id, why)` is called when the limits take the
    first bytes of a log.

    session_mb: most that is kept of one log; total_mb: of all together. The oldest goes first:
    within a log its start; in total the log that has been silent longest, an ended one first.
    """

    def __init__(self, path: str | os.PathLike, session_mb: float = 64, total_mb: float = 10_240):
        self.removed: Callable[[str, str], None] | None = None
        self._limits = int(session_mb * MB), int(total_mb * MB)
        self._whys = f"limit of {session_mb:g} MB per session", f"limit of {total_mb:g} MB in all"
        self._db = sqlite3.connect(
            str(path), isolation_level=None, check_same_thread=False, timeout=PATIENCE_S
        )
        for pragma in PRAGMAS:
            self._db.execute(pragma)
        self._upgrade()
        self._db.execute("PRAGMA busy_timeout=0")
        self._total = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM log").fetchone()[0]
        self._reader = sqlite3.connect(
            str(path), isolation_level=None, check_same_thread=False, timeout=PATIENCE_S
        )
        self._reader.execute("PRAGMA query_only=1")
        self._reading = threading.Lock()
        self._changed = threading.Condition()
        self._queue: list[_Job] = []
        self._waiting = 0  # bytes in the queue and in the batch that is being stored
        self._writer: threading.Thread | None = None
        self._closing = False
        self._failing = False
        self._say_at = 0.0
        self._over = False  # there is more to remove than one commit may

    def _upgrade(self) -> None:
        if self._one("PRAGMA user_version")[0]:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statement in SCHEMA:
                self._db.execute(statement)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.rollback()
            raise

    # ── what is to be stored ──────────────────────────────────────────────────────────────────

    def append(
        self, session_id: str, offset: int | None, data: bytes, at: float, times=None, then=None
    ) -> None:
        """Queue `data` to be stored if it touches the stored end; wait while too much waits.
        offset None: at the end, wherever that is by then.

        What begins before the end is cut, what begins after it is not stored. `then(end)` is
        called after the commit with the end as it is then, once for several blocks of one session
        in one commit (the last one's); never when the commit fails.

        at: when the first byte was printed; times: [[n, t], …], byte n of the block t seconds
        after that.
        """
        if offset is not None and offset < 0:
            raise ValueError(f"an offset of {offset}")

        def deed(row: _Log) -> None:
            self._append(row, row.stop if offset is None else offset, data, at, times or [])

        self._put(_Job(session_id, deed, len(data), then))

    def gap(self, session_id: str, start: int, stop: int | None, why: str, then=None) -> bool:
        """Mark that bytes from `start` to `stop` (None: nobody knows how many) are lost, and let
        the log go on behind them. Waits for the commit; whether it is stored.

        Said twice it counts once: what is stored already is not lost, and what begins beyond the
        end is not taken, since the bytes before it may still come.
        """
        check_gap(start, stop)

        def deed(row: _Log) -> None:
            self._gap(row, start, stop, why)

        return self._wait(_Job(session_id, deed, then=then))

    def interrupted(self, session_id: str, why: str) -> None:
        """Mark that nobody knows how much is missing at the end of what is stored."""

        def deed(row: _Log) -> None:
            self._gap(row, row.stop, None, why)

        self._put(_Job(session_id, deed))

    def resized(self, session_id: str, cols: int, rows: int, was: tuple | None = None) -> None:
        """The terminal has another size from here on; was: (cols, rows) before the first time."""

        def deed(row: _Log) -> None:
            known = "SELECT 1 FROM mark WHERE session_id = ? AND kind = 'resize'"
            if was and not self._one(known, session_id):
                self._mark(row, "resize", 0, None, "{}x{}".format(*was))
            self._mark(row, "resize", row.stop, None, f"{cols}x{rows}")

        self._put(_Job(session_id, deed))

    def ended(self, session_id: str) -> None:
        """Nothing runs there any more: this log is among the first to go."""

        def deed(row: _Log) -> None:
            row.ended = 1

        self._put(_Job(session_id, deed))

    def flush(self) -> bool:
        """Wait until all that was brought so far is stored; whether it is."""
        return self._wait(_Job("", _nothing))

    def _wait(self, job: _Job) -> bool:
        job.done = threading.Event()
        if self._put(job):
            job.done.wait()
        return job.stored

    def _put(self, job: _Job) -> bool:
        """Queue the job, unless the store is closed."""
        with self._changed:
            # Only data waits: what holds no bytes may come from within a transaction.
            while job.size and self._waiting > QUEUE_BYTES and not self._closing:
                self._changed.wait()
            if self._closing:
                return False
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="logs", daemon=True)
                self._writer.start()
            self._queue.append(job)
            self._waiting += job.size + JOB_BYTES
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """Store what waits, then close the file."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer:
            self._writer.join()
        self._reader.close()
        self._db.close()

    # ── the writer ────────────────────────────────────────────────────────────────────────────

    def _write(self) -> None:
        while batch := self._next():
            try:
                ends, begun = self._store(batch)
            except Exception as error:
                ends, begun, self._over = {}, {}, False
                self._failed(error)
            self._tell(batch, ends, begun)
            with self._changed:
                self._waiting -= sum(job.size + JOB_BYTES for job in batch)
                self._changed.notify_all()

    def _next(self) -> list[_Job]:
        """The jobs of the next commit; none when the store is closed and all is stored."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or self._over)
            size = count = 0
            while count < len(self._queue) and size < BATCH_BYTES:
                size += self._queue[count].size
                count += 1
            batch, self._queue = self._queue[:count], self._queue[count:]
            if not batch and not self._closing:  # only to go on removing
                batch = [_Job("", _nothing)]
                self._waiting += JOB_BYTES
            return batch

    def _store(self, batch: list[_Job]) -> tuple[dict[str, int], dict[str, str]]:
        """Carry out the jobs in one commit; {session: end}, and {session: why} of logs that lost
        their first bytes."""
        total = self._total
        try:
            self._db.execute("BEGIN IMMEDIATE")
            touched = self._carry_out(batch)
            removals, begun = self._keep_limits(touched)
            offloop(self._commit, removals)
        except BaseException:
            self._total = total
            self._db.rollback()
            raise
        if self._failing:
            log.info("session logs are stored again")
        self._failing = False
        return {row.session_id: row.stop for row in touched.values()}, begun

    def _carry_out(self, batch: list[_Job]) -> dict[str, _Log]:
        """Do what the jobs say; the rows of the logs they were about."""
        touched: dict[str, _Log] = {}
        since_yield = 0
        for job in batch:
            row = touched.get(job.session_id)
            if row is None:
                row = touched[job.session_id] = self._row(job.session_id)
            job.deed(row)
            since_yield += job.size
            if since_yield > YIELD_BYTES:
                since_yield = 0
                time.sleep(0)
        self._save([row for row in touched.values() if row.session_id])
        return touched

    def _commit(self, removals: list[tuple]) -> None:
        for removal in removals:
            self._db.execute("DELETE FROM block WHERE session_id = ? AND offset < ?", removal)
        self._db.execute("COMMIT")

    def _failed(self, error: Exception) -> None:
        """Nothing of the batch is acknowledged: the agents send it again."""
        self._failing = True
        now = time.monotonic()
        if now < self._say_at:
            return
        self._say_at = now + SAY_AGAIN_S
        ours = not isinstance(error, sqlite3.Error)
        said = f"session logs cannot be stored ({error}): agents keep their output"
        log.error(said, exc_info=error if ours else None)

    def _tell(self, batch: list[_Job], ends: dict[str, int], begun: dict[str, str]) -> None:
        last = {job.session_id: job.then for job in batch if job.then}
        calls = [(then, ends[name]) for name, then in last.items() if name in ends]
        if self.removed:
            calls += [(self.removed, *said) for said in begun.items()]
        for call, *values in calls:
            try:
                call(*values)
            except Exception:
                log.exception("what waited for a log could not be told")
        for job in batch:
            if job.done:
                job.stored = job.session_id in ends
                job.done.set()

    # ── within a commit ───────────────────────────────────────────────────────────────────────

    def _one(self, sql: str, *values):
        return self._db.execute(sql, values).fetchone()

    def _row(self, session_id: str) -> _Log:
        found = self._one("SELECT * FROM log WHERE session_id = ?", session_id)
        return _Log(*found) if found else _Log(session_id)

    def _save(self, rows) -> None:
        self._db.executemany(
            "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (session_id) DO UPDATE SET"
            " start = excluded.start, stop = excluded.stop, bytes = excluded.bytes,"
            " at = excluded.at, ended = excluded.ended",
            [row.row() for row in rows],
        )

    def _mark(self, row: _Log, kind: str, start: int, stop: int | None, why: str) -> None:
        self._db.execute(
            "INSERT INTO mark VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (session_id, kind, start)"
            " DO UPDATE SET stop = excluded.stop, why = excluded.why, at = excluded.at",
            (row.session_id, kind, start, stop, why, time.time()),
        )

    def _append(self, row: _Log, offset: int, data: bytes, at: float, times: list) -> None:
        cut = row.stop - offset
        if not 0 <= cut < len(data) or offset + len(data) > END_MOST:
            return
        if cut:
            data, at, times = _cut(data, at, times, cut)
        self._db.execute(
            "INSERT INTO block VALUES (?, ?, ?, ?, ?, ?)",
            (row.session_id, row.stop, len(data), data, at, json.dumps(times) if times else None),
        )
        if not row.bytes:
            row.start = row.stop
        row.stop += len(data)
        row.bytes += len(data)
        row.at = time.time()
        self._total += len(data)

    def _gap(self, row: _Log, start: int, stop: int | None, why: str) -> None:
        if stop is None:
            known = "SELECT 1 FROM mark WHERE session_id = ? AND kind = 'gap' AND start = ?"
            if not self._one(known, row.session_id, start):
                self._mark(row, "gap", start, None, why)
        elif start <= row.stop < stop:
            self._mark(row, "gap", self._gap_before(row, why), stop, why)
            row.stop = stop
            if not row.bytes:
                row.start = stop

    def _gap_before(self, row: _Log, why: str) -> int:
        """Where a gap at the end starts: with one of the same cause that it touches."""
        last = self._one(
            "SELECT start, stop, why FROM mark WHERE session_id = ? AND kind = 'gap'"
            " ORDER BY start DESC LIMIT 1",
            row.session_id,
        )
        return last[0] if last and last[1:] == (row.stop, why) else row.stop

    # ── limits ────────────────────────────────────────────────────────────────────────────────

    def _keep_limits(self, touched: dict[str, _Log]) -> tuple[list[tuple], dict[str, str]]:
        """Shorten what is too long: [(session, offset below which blocks are to be deleted)], and
        why, for logs that had lost nothing before."""
        starts: dict[str, int] = {}
        begun: dict[str, str] = {}
        left = REMOVE_BYTES
        for row, excess, why in self._too_long(touched):
            before = row.bytes
            if self._shorten(row, min(excess, left), why):
                begun[row.session_id] = why
            starts[row.session_id] = row.start
            left -= before - row.bytes
            if left <= 0:
                break
        self._over = left <= 0
        return list(starts.items()), begun

    def _too_long(self, touched: dict[str, _Log]) -> Iterator[tuple[_Log, int, str]]:
        """(log, bytes too many, why), one after the other as they are shortened."""
        most, most_in_all = self._limits
        for row in touched.values():
            if row.bytes > most:
                yield row, row.bytes - most, self._whys[0]
        while self._total > most_in_all:
            found = self._one("SELECT * FROM log WHERE bytes > 0 ORDER BY ended DESC, at LIMIT 1")
            row = touched.get(found[0]) or _Log(*found)
            yield row, self._total - most_in_all, self._whys[1]

    def _shorten(self, row: _Log, excess: int, why: str) -> bool:
        """Let whole blocks go from the start, `excess` bytes or a little more; whether they are
        the first to go. (The blocks themselves are deleted with the commit.)"""
        blocks = self._db.execute(
            "SELECT offset, size FROM block WHERE session_id = ? AND offset >= ? ORDER BY offset",
            (row.session_id, row.start),
        )
        gone, start = 0, row.stop
        for offset, size in blocks:
            if gone >= excess:
                start = offset
                break
            gone += size
        else:
            gone = row.bytes
        blocks.close()
        row.start, row.bytes = start, row.bytes - gone
        self._total -= gone
        self._save([row])
        first = not self._one(
            "SELECT 1 FROM mark WHERE session_id = ? AND kind = 'removed'", row.session_id
        )
        self._mark(row, "removed", 0, start, why)
        self._forget_marks(row)
        return first

    def _forget_marks(self, row: _Log) -> None:
        """Marks within what was removed say nothing any more, but for the size at its end."""
        self._db.execute(
            "DELETE FROM mark WHERE session_id = ?1 AND kind = 'gap'"
            " AND COALESCE(stop, start) <= ?2 AND start < ?2",
            (row.session_id, row.start),
        )
        self._db.execute(
            "DELETE FROM mark WHERE session_id = ?1 AND kind = 'resize' AND start < (SELECT"
            " MAX(start) FROM mark WHERE session_id = ?1 AND kind = 'resize' AND start <= ?2)",
            (row.session_id, row.start),
        )

    # ── reading ───────────────────────────────────────────────────────────────────────────────

    def _rows(self, sql: str, *values) -> list[tuple]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def end(self, session_id: str) -> int:
        """The offset behind the last stored byte; 0 when nothing is stored."""
        found = self._rows("SELECT stop FROM log WHERE session_id = ?", session_id)
        return found[0][0] if found else 0

    def extents(self, session_ids: list[str]) -> dict[str, tuple[int, int]]:
        """{session: (start, end)} of those that have a log."""
        found = {}
        for part, marks in in_chunks(session_ids):
            sql = f"SELECT session_id, start, stop FROM log WHERE session_id IN {marks}"
            found |= {row[0]: row[1:] for row in self._rows(sql, *part)}
        return found

    def blocks(self, session_id: str, offset: int, limit: int) -> tuple[list[Block], int, int]:
        """Blocks from the one that holds `offset` on, about `limit` bytes, and where the log
        starts and stops."""
        found, size = [], 0
        with self._reading:
            self._reader.execute("BEGIN")
            try:
                extent = self._reader.execute(
                    "SELECT start, stop FROM log WHERE session_id = ?", (session_id,)
                ).fetchone()
                cursor = self._reader.execute(
                    "SELECT offset, data, at, times FROM block WHERE session_id = ?1 AND offset >="
                    " COALESCE((SELECT MAX(offset) FROM block WHERE session_id = ?1"
                    " AND offset <= ?2), 0) ORDER BY offset",
                    (session_id, min(offset, END_MOST)),
                )
                for start, data, at, times in cursor:
                    if start + len(data) > offset:
                        found.append(Block(start, data, at, json.loads(times) if times else []))
                        size += start + len(data) - max(start, offset)
                    if size >= limit:
                        break
                cursor.close()
            finally:
                self._reader.execute("COMMIT")
        return found, *(extent or (0, 0))

    def read(self, session_id: str, offset: int, limit: int) -> Piece:
        """At most about `limit` bytes that follow each other, from `offset` on or from what comes
        behind it, when there is nothing at `offset`."""
        blocks, start, end = self.blocks(session_id, offset, limit)
        if not blocks:
            return Piece(b"", end, end, start, end)
        first = following = max(offset, blocks[0].offset)
        pieces = []
        for block in blocks:
            if block.offset > following:
                break
            pieces.append(block.data[following - block.offset :])
            following = block.offset + len(block.data)
        return Piece(b"".join(pieces), first, following, start, end)

    def marks(self, session_id: str) -> list[dict]:
        """What is missing, in the order of the bytes: {kind: gap or removed, from, to, why, at}."""
        return [
            {"kind": kind, "from": start, "to": stop, "why": why, "at": iso(at)}
            for kind, start, stop, why, at in self.missing(session_id)
        ]

    def missing(self, session_id: str) -> list[tuple]:
        """(kind, start, stop, why, at) of the gaps and of what was removed, in order."""
        return self._rows(
            "SELECT kind, start, stop, why, at FROM mark WHERE session_id = ?"
            " AND kind IN ('gap', 'removed') ORDER BY start, stop",
            session_id,
        )

    def sizes(self, session_id: str) -> list[tuple[int, float, str]]:
        """(offset, time, "80x24") of every size the terminal had."""
        return self._rows(
            "SELECT start, at, why FROM mark WHERE session_id = ? AND kind = 'resize'"
            " ORDER BY start",
            session_id,
        )


def check_gap(start: int, stop: int | None) -> None:
    """Raises ValueError when nothing can be missing there."""
    if not 0 <= start <= (start if stop is None else stop) <= END_MOST:
        raise ValueError(f"a gap from {start} to {stop}")


def _nothing(_row: _Log) -> None:
    pass


def _cut(data: bytes, at: float, times: list, n: int) -> tuple[bytes, float, list]:
    """The block without its first n bytes."""
    passed = bisect_right(times, n, key=lambda entry: entry[0])
    later = times[passed - 1][1] if passed else 0.0
    return data[n:], at + later, [[i - n, t - later] for i, t in times[passed:]]


# ── recordings ────────────────────────────────────────────────────────────────────────────────


def _missing_text(kind: str, start: int, stop: int | None, why: str) -> str:
    """A mark in words: `1.2 MB removed: limit of 64 MB per session`."""
    size = "output" if stop is None else _size_text(stop - start)
    return f"{size} {'removed' if kind == 'removed' else 'missing'}: {why}"


def _size_text(size: int) -> str:
    for unit, factor in (("MB", MB), ("kB", 1000)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


class _Note(NamedTuple):
    """What is said in a recording between two bytes: a resize or a marker."""

    offset: int
    at: float
    kind: str
    text: str


def asciicast(
    store: LogStore, session_id: str, title: str, size: tuple[int, int], began: float
) -> Iterator[str]:
    """The log as an asciicast v2, line by line, up to what is stored now.

    size: of the terminal, if it never had another; began: when, if nothing was printed.
    """
    first, start, end = store.blocks(session_id, 0, 1)
    sizes = store.sizes(session_id)
    earlier = [text for offset, _, text in sizes if offset <= start]
    cols, rows = map(int, earlier[-1].split("x")) if earlier else size
    began = first[0].at if first else began
    header = {
        "version": 2,
        "width": cols,
        "height": rows,
        "timestamp": int(began),
        "title": title,
        "env": {"TERM": "xterm-256color"},
    }
    yield _line(header)
    notes = [_Note(offset, at, "r", text) for offset, at, text in sizes if offset > start]
    notes += [
        _Note(start, at, "m", _missing_text(kind, start, stop, why))
        for kind, start, stop, why, at in store.missing(session_id)
    ]
    player = _Player(began, sorted(notes))
    while player.offset < end:
        blocks, _, _ = store.blocks(session_id, player.offset, PAGE_BYTES)
        if not blocks:
            break
        for block in blocks:
            yield from player.play(block)
    yield from player.end()


class _Player:
    """Turns blocks into events, each at the time it was printed and none before the last one."""

    def __init__(self, began: float, notes: list[_Note]):
        self.offset = 0
        self._began = began
        self._now = 0.0
        self._notes = deque(notes)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def play(self, block: Block) -> Iterator[str]:
        for low, high, at in _stretches(block, self.offset):
            if low > self.offset:
                yield from self._jump(low, at)
            while self._notes and self._notes[0].offset < high:
                note = self._notes.popleft()
                cut = max(self.offset, note.offset)
                yield from self._print(block.data[low - block.offset : cut - block.offset], at)
                low = self.offset = cut
                yield from self._say(note, at)
            yield from self._print(block.data[low - block.offset : high - block.offset], at)
            self.offset = high

    def _jump(self, offset: int, at: float) -> Iterator[str]:
        """Bytes are missing here: the marks say so, unless they were removed while it is read."""
        said = False
        while self._notes and self._notes[0].offset < offset:
            note = self._notes.popleft()
            said = said or note.kind == "m"
            yield from self._say(note, at)
        if not said:
            text = f"{_size_text(offset - self.offset)} missing"
            yield from self._say(_Note(offset, self._began, "m", text), at)
        self.offset = offset

    def end(self) -> Iterator[str]:
        for note in self._notes:
            yield from self._say(note, note.at)
        yield from self._flush()

    def _say(self, note: _Note, latest: float) -> Iterator[str]:
        if note.kind == "m":
            yield from self._flush()
        yield self._event(min(note.at, latest), note.kind, note.text)

    def _print(self, data: bytes, at: float) -> Iterator[str]:
        if text := self._decoder.decode(data):
            yield self._event(at, "o", text)

    def _flush(self) -> Iterator[str]:
        """Half a character is all there is of it: what comes next does not follow."""
        if text := self._decoder.decode(b"", final=True):
            yield self._event(self._began, "o", text)
        self._decoder.reset()

    def _event(self, at: float, kind: str, text: str) -> str:
        self._now = max(self._now, at - self._began)
        return _line([round(self._now, 3), kind, text])


def _stretches(block: Block, offset: int) -> Iterator[tuple[int, int, float]]:
    """(from, to, when printed) of what was printed together, from `offset` on."""
    stop = block.offset + len(block.data)
    steps = [(0, 0.0), *block.times]
    ends = [block.offset + n for n, _ in steps[1:]] + [stop]
    for (n, t), high in zip(steps, ends, strict=True):
        low = max(block.offset + n, offset)
        if low < high:
            yield low, high, block.at + t


def _line(value) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
