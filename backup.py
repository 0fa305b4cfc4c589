"""Backups of a hub that runs, and what it takes to begin again from one.

A backup is a tar archive of consistent copies of the databases, the secret, the settings and a
description. A restore puts it in the place of what is there, which is kept beside it. What a
restored hub does then is stated in docs/operations.md: it is another epoch, people sign in anew,
servers take no new work until somebody has looked, and agents that are ahead of it are believed
(`take_over`).
"""

import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import alerts
import cascade
import leases
import moves
import tasks
from auth import HUB, SECRET_BYTES, Caller, require
from models import (
    Conflict,
    Invalid,
    Transaction,
    clock,
    execute,
    iso,
    keep_clock,
    labels,
    offloop,
    one,
    private,
    rows,
    since_epoch,
    sync_folder,
    transaction,
    writing_files,
)

DATABASES = ("hub.db", "logs.db")
FILES = (*DATABASES, "secret", "hub.yaml")
NEEDED = ("hub.db", "secret")
DESCRIPTION = "backup.json"
WAITING = "restore"  # the directory of what is to be restored at the next start
MARK = "restored.json"  # the restored databases have not been told yet
CHUNK = 256 * 1024  # bytes


# ── making one ────────────────────────────────────────────────────────────────────────────────


def make(data: Path, version: str, folder: Path) -> dict:
    """Copy what is in the data directory into `folder`, consistently and beside whoever writes;
    the description. The hub's database first: logs may be newer than it, never older."""
    folder.mkdir(mode=0o700)
    for name in FILES:
        if not (data / name).exists():
            continue
        if name in DATABASES:
            offloop(_copy_database, str(data / name), str(folder / name))
        else:
            shutil.copyfile(data / name, folder / name)
        (folder / name).chmod(0o600)
    description = {"version": version, "schema": _schema(folder / "hub.db"), "at": iso(time.time())}
    description["sha256"] = {p.name: offloop(_digest, str(p)) for p in sorted(folder.iterdir())}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return description


def _copy_database(path: str, copy: str) -> None:
    """One read transaction: nobody waits for it, and what is committed meanwhile is not in it."""
    db = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        db.execute("VACUUM INTO ?", (copy,))
    finally:
        db.close()


def _schema(path: Path) -> int:
    """How many migrations a database has had."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return db.execute("SELECT COUNT(*) FROM schema_migration").fetchone()[0]
    finally:
        db.close()


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Packed:
    """The archive of a folder, piece by piece; the folder is removed when it is closed."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __iter__(self) -> Iterator[bytes]:
        for path in sorted(self._folder.iterdir(), key=lambda p: (p.name != DESCRIPTION, p.name)):
            info = tarfile.TarInfo(path.name)
            info.size, info.mode = path.stat().st_size, 0o600
            info.mtime = int(path.stat().st_mtime)
            yield info.tobuf(tarfile.PAX_FORMAT)
            with path.open("rb") as file:
                while piece := file.read(CHUNK):
                    yield piece
            yield bytes(-info.size % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def of_running(caller: Caller, data: Path, version: str) -> Packed:
    """A backup of this hub as an archive. For admins; it holds every secret the hub has."""
    require(caller, "user.admin")
    folder = Path(data) / f"backup-{uuid.uuid4().hex}"
    try:
        with writing_files():
            make(Path(data), version, folder)
        with transaction() as tx:
            tx.emit("backup_made", None, caller.actor, {})
            execute("INSERT OR REPLACE INTO meta VALUES ('backup_at', ?)", (str(tx.now),))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Packed(folder)


def tidy(data: Path) -> None:
    """Remove what a backup or restore has left that was killed."""
    for pattern in ("backup-*", f"{WAITING}-*"):
        for left in data.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)


# ── taking one ────────────────────────────────────────────────────────────────────────────────


def unpack(archive, folder: Path, schema: int) -> dict:
    """Unpack a backup into a new `folder` and check all of it; its description. Raises Invalid,
    and leaves nothing, for one that is damaged or of a newer hub.

    archive: a binary stream. schema: how many migrations this hub knows.
    """
    try:
        with writing_files():
            folder.mkdir(mode=0o700)
            _extract(archive, folder)  # not off the loop: it reads from the request's connection
        return _checked(folder, schema)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _extract(archive, folder: Path) -> None:
    try:
        with tarfile.open(fileobj=archive, mode="r|") as tar:
            for member in tar:
                if member.name not in (*FILES, DESCRIPTION) or not member.isfile():
                    raise Invalid(f"This is no backup of a hub: it holds {member.name[:100]!r}.")
                with open(folder / member.name, "xb", opener=private) as file:
                    shutil.copyfileobj(tar.extractfile(member), file, CHUNK)
                    file.flush()
                    os.fsync(file.fileno())
    except (tarfile.TarError, EOFError, FileExistsError) as error:
        raise Invalid(f"This is no backup of a hub, or it is cut off ({error}).") from None
    sync_folder(folder)


def _checked(folder: Path, schema: int) -> dict:
    missing = [name for name in (DESCRIPTION, *NEEDED) if not (folder / name).exists()]
    if missing:
        raise Invalid(f"This is no backup of a hub, or it is cut off: {missing[0]} is missing.")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        sums, needs = dict(description["sha256"]), int(description["schema"])
        since_epoch(description["at"])
    except (ValueError, KeyError, TypeError):
        raise Invalid("The backup's description cannot be read: take another one.") from None
    if needs > schema:
        raise Invalid(
            f"The backup is of a newer hub ({description.get('version')}): update this one first."
        )
    for path in folder.iterdir():
        if path.name != DESCRIPTION and sums.get(path.name) != offloop(_digest, str(path)):
            raise Invalid(f"{path.name} in the backup is damaged: take another one.")
    if (folder / "secret").stat().st_size != SECRET_BYTES:
        raise Invalid("The secret in the backup is not whole: take another one.")
    for name in DATABASES:
        if (folder / name).exists() and offloop(_integrity, str(folder / name)) != "ok":
            raise Invalid(f"{name} in the backup is damaged: take another one.")
    return description


def _integrity(path: str) -> str:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return db.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return str(error)
    finally:
        db.close()


def receive(caller: Caller, archive, data: Path, schema: int) -> dict:
    """Take a backup that the hub is to begin anew from; its description. It is put in place at the
    next start. For admins. Raises Invalid, and Conflict while another one waits."""
    require(caller, "user.admin")
    _refuse_second(data)
    folder = Path(data) / f"{WAITING}-{uuid.uuid4().hex}"
    description = unpack(archive, folder, schema)
    try:
        with _receiving:  # nothing in here lets others go first, but threads may
            _refuse_second(data)
            shutil.rmtree(Path(data) / WAITING, ignore_errors=True)  # left over
            folder.rename(Path(data) / WAITING)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(data)
    return description


_receiving = threading.Lock()


def _refuse_second(data: Path) -> None:
    waiting = Path(data) / WAITING
    if (waiting / DESCRIPTION).exists():
        raise Conflict(
            "A backup waits already to be put in place when the hub starts, which it does by "
            f"itself after a restore: restart it, or remove {waiting} if it is not wanted."
        )


def put_in_place(data: Path) -> Path | None:
    """Before the databases are opened: if a backup waits, put it in the place of what is there;
    where that is kept from now on, or None. Killed in between, it goes on at the next start."""
    folder = data / WAITING
    if not (folder / DESCRIPTION).exists():
        shutil.rmtree(folder, ignore_errors=True)  # all of it is in place
        return None
    kept = next((p.parent for p in data.glob("before-restore-*/UNFINISHED")), None)
    if not kept:
        kept = data / time.strftime("before-restore-%Y%m%d-%H%M%S")
        kept.mkdir(mode=0o700)
        (kept / "UNFINISHED").touch()
    of_backup = json.loads((folder / DESCRIPTION).read_text())["sha256"]
    for name in FILES:
        if (folder / name).exists() or (name in DATABASES and name not in of_backup):
            for part in (f"{name}-shm", f"{name}-wal", name):
                if (data / part).exists():
                    (data / part).rename(kept / part)
    return _put(folder, data, kept)


def _put(folder: Path, data: Path, kept: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            (folder / name).rename(data / name)
    (kept / "UNFINISHED").unlink(missing_ok=True)
    (folder / DESCRIPTION).rename(data / MARK)
    sync_folder(data)
    shutil.rmtree(folder)
    return kept


def finish(data: Path) -> bool:
    """With the databases open: begin anew if they were restored; whether they were."""
    if not (data / MARK).exists():
        return False
    with transaction() as tx:
        begin_anew(tx, json.loads((data / MARK).read_text())["at"])
    (data / MARK).unlink()
    return True


def begin_anew(tx: Transaction, made_at: str) -> None:
    """In the restored database: another epoch, nobody signed in, no new work for any server until
    somebody has looked at it."""
    execute("UPDATE meta SET value = ? WHERE key = 'hub_epoch'", (str(uuid.uuid4()),))
    execute("DELETE FROM token")
    execute("DELETE FROM registration WHERE used_at IS NULL")
    execute("DELETE FROM pairing_code")
    execute("UPDATE server SET draining = 1, instance = '' WHERE revoked = 0")
    leases.move_along(tx.now - since_epoch(made_at))
    clock.heed()
    keep_clock()
    execute("UPDATE server SET offline_at = ? WHERE online = 0 AND revoked = 0", (tx.now,))
    _say_nothing_twice(tx)
    execute(
        "INSERT OR REPLACE INTO meta VALUES ('restored', ?)",
        (json.dumps([row["id"] for row in rows("SELECT id FROM server WHERE revoked = 0")]),),
    )
    execute("INSERT OR REPLACE INTO meta VALUES ('backup_at', ?)", (str(since_epoch(made_at)),))
    tx.emit("hub_restored", None, HUB.actor, {"made_at": made_at})


# Commands that do no harm when they are carried out a second time.
SENT_AGAIN = ("session_close", "task_cancelled", "rules_changed")
IN_DOUBT = "the hub was restored from a backup, and it may have been said since"


def _say_nothing_twice(tx: Transaction) -> None:
    """Whether a command that nobody had taken was carried out since the backup is not known here.
    What would run or be typed a second time is not sent: of a session that was to start, its agent
    says when it connects whether it has it; of words, a person is told."""
    kinds = ", ".join("?" * len(SENT_AGAIN))
    for command in rows(
        "UPDATE command SET acked_at = ? WHERE acked_at IS NULL"
        f" AND type NOT IN ({kinds}) RETURNING *",
        (tx.now, *SENT_AGAIN),
    ):
        session = one("SELECT * FROM session WHERE id = ?", (command["session_id"],))
        if session and not moves.starts(command, session):
            _doubt(tx, session, command["type"], str(command["id"]))
    execute(
        "UPDATE permission SET delivery = 'unknown', delivery_why = ? WHERE delivery = 'sent'",
        (IN_DOUBT,),
    )
    execute(
        "UPDATE intervention SET delivery = 'unknown', delivery_why = ? WHERE delivery = 'sent'",
        (IN_DOUBT,),
    )
    # An answer kept for a call that waits is for that call alone from now on.
    for held in rows(
        "UPDATE intervention SET claim_until = NULL WHERE delivery = 'held' RETURNING *"
    ):
        session = one("SELECT * FROM session WHERE id = ?", (held["session_id"],))
        if session:
            _doubt(tx, session, "intervention_response", held["id"])


def _doubt(tx: Transaction, session: dict, command: str, about: str) -> None:
    if session["state"] in cascade.SESSION_LIVE:
        alerts.undelivered(tx, session, "unknown", IN_DOUBT, command=command, about=about)


# ── agents that are ahead ─────────────────────────────────────────────────────────────────────


def caught_up(server_id: str) -> None:
    """The server has said what it has."""
    stored = one("SELECT value FROM meta WHERE key = 'restored'")
    left = [each for each in json.loads(stored["value"]) if each != server_id]
    execute("UPDATE meta SET value = ? WHERE key = 'restored'", (json.dumps(left),))


def take_over(tx: Transaction, session: dict, task_id: str, attempt: int) -> bool:
    """A session begun after the backup works on a task: from now on it does so here too, unless
    the hub knows of a later attempt; whether it does."""
    task = moves.row(task_id)
    if not task or task["project_id"] != session["project_id"] or task["status"] == "done":
        return False
    if attempt < task["attempt"] or (attempt == task["attempt"] and task["status"] != "pending"):
        return False
    if task["status"] in cascade.HOLDS_SLOT:
        moves.close_attempt(tx, task, "release", None)
        task = moves.do(tx, task, "release", HUB.actor, {"why": "a later attempt is under way"})
    elif task["status"] in cascade.FINAL:
        task = moves.do(tx, task, "retry", HUB.actor, {"next_attempt": attempt})
    task = moves.change(tx, task, attempt=attempt, require_plan=0)
    execute("UPDATE server SET busy = busy + 1 WHERE id = ?", (session["server_id"],))
    execute(
        "UPDATE session SET task_id = ?, attempt = ?, role = 'worker' WHERE id = ?",
        (task_id, attempt, session["id"]),
    )
    moves.do(
        tx,
        task,
        "assign",
        HUB.actor,
        {"agent": labels("server", "name", {session["server_id"]})[session["server_id"]]}
        | {"taken_over": True},
        server_id=session["server_id"],
        session_id=session["id"],
        assigned_at=tx.now,
        waiting_since=None,
        signature=None,
        not_before=None,
    )
    tasks.start(HUB, task_id)
    return True
