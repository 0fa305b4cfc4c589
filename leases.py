"""What becomes of work whose server, session or time is gone, and what clocks have to do with it.

A task on a server that stays away, or whose session is gone, is tried again or left to a person, as
its `on_lost` says: never both. Times are compared by the hub's wall clock; when that is set, what
is stored is moved along (`translate`), so that nothing runs out early or late. After the hub itself
was away, everybody gets time to speak before anything is given up (`Listening`).
"""

import math
import threading
import time

import alerts
import cascade
import moves
import tasks
from auth import HUB
from models import (
    Transaction,
    clock,
    execute,
    in_chunks,
    is_unheard,
    keep_clock,
    labels,
    loads,
    one,
    rows,
    transaction,
)

AT_ONCE = 500  # tasks looked at in one run of a job
QUIET_S = 90.0  # how long the hub only listens after it was away itself
RESTORED = "; the hub was restored from a backup, so it may have been finished since"


# ── a session or server is gone ───────────────────────────────────────────────────────────────


def lose(tx: Transaction, task: dict, why: str, ask: bool = False) -> bool:
    """What worked on `task` (a row) is gone: try it again, or leave it to a person; whether it was
    released. why: the rest of a sentence, such as "its session is gone: …". ask: leave it to a
    person whatever the task says."""
    if task["on_lost"] == "retry" and not ask:
        tasks.release(tx, task, why)
        return True
    if not _known(task, _lost_at(task)):
        sentence = (
            f"{task['title'][:300]}: {why}. Retry the task, cancel it, or wait for it to come back."
        )
        alerts.begin(
            tx,
            "lost",
            task["project_id"],
            sentence,
            task_id=task["id"],
            about=_attempt(task),
        )
    return False


def _attempt(task: dict) -> str:
    return f"{task['id']} {task['attempt']}"


def _lost_at(task: dict) -> float:
    """Since when what works on it is gone."""
    server = one("SELECT online, offline_at FROM server WHERE id = ?", (task["server_id"],))
    if not server["online"]:
        return server["offline_at"]
    session = one("SELECT state_at FROM session WHERE id = ?", (task["session_id"],))
    return session["state_at"] if session else task["assigned_at"]


def _known(task: dict, since: float) -> bool:
    """Whether somebody was told of this loss of this attempt: it is open, or was dismissed."""
    return bool(
        one(
            "SELECT 1 FROM alert WHERE kind = 'lost' AND about = ? AND (status = 'open'"
            " OR (status = 'dismissed' AND at >= ?))",
            (_attempt(task), since),
        )
    )


def release_lost(now: float, lost_after: float) -> int:
    """Do with the tasks of servers that have been away for `lost_after` seconds as each says; how
    many were released."""
    released = 0
    for server in rows(
        "SELECT * FROM server WHERE online = 0 AND offline_at <= ? AND busy > 0",
        (now - lost_after,),
    ):
        why = f"server {server['name']} has been away for {lost_after:g} s"
        unheard = is_unheard(server["id"])
        why += RESTORED if unheard else ""
        for task in tasks.held_by(server["id"]):
            asks = unheard or task["on_lost"] == "ask"
            if asks and _known(task, server["offline_at"]):
                continue
            with transaction() as tx:
                if _still_away(server["id"], now - lost_after):
                    task = moves.row(task["id"])
                    if task["server_id"] == server["id"] and task["status"] in cascade.HOLDS_SLOT:
                        released += lose(tx, task, why, unheard)
    return released


def _still_away(server_id: str, since: float) -> bool:
    """Whether it is, now that we have the turn: it may be back, or the clock may have been set."""
    server = one("SELECT online, offline_at FROM server WHERE id = ?", (server_id,))
    return not server["online"] and server["offline_at"] <= since


# ── nobody takes a task ───────────────────────────────────────────────────────────────────────


def notice_unplaced(now: float) -> int:
    """Open an alert for what has waited for a server for its `queue_timeout`: one for all tasks of
    a project that ask for the same; how many tasks were looked at."""
    if not _late(now, 1):
        return 0
    with transaction() as tx:
        late = _late(now, AT_ONCE)  # again: the clock may have been set
        for part, marks in in_chunks([task["id"] for task in late]):
            execute(f"UPDATE task SET deadline_at = NULL WHERE id IN {marks}", part)
        for task in {(t["project_id"], t["signature"]): t for t in reversed(late)}.values():
            _begin_unplaced(tx, task, now)
    return len(late)


def _late(now: float, most: int) -> list[dict]:
    return rows(
        "SELECT * FROM task WHERE deadline_at <= ? AND waiting_since IS NOT NULL"
        " ORDER BY deadline_at LIMIT ?",
        (now, most),
    )


def _begin_unplaced(tx: Transaction, task: dict, now: float) -> None:
    if one(
        "SELECT 1 FROM alert WHERE +project_id = ? AND kind = 'queue' AND about = ?"
        " AND (status = 'open' OR (status = 'dismissed' AND at > ?))",
        (task["project_id"], task["signature"], task["waiting_since"]),
    ):
        return
    [[count]] = execute(
        "SELECT COUNT(*) FROM (SELECT 1 FROM task WHERE project_id = ? AND signature = ?"
        " AND waiting_since IS NOT NULL LIMIT 1000)",
        (task["project_id"], task["signature"]),
    ).fetchall()
    others = f" and {count - 1} more" if count > 1 else ""
    minutes = max(1, round((now - task["waiting_since"]) / 60))
    sentence = (
        f"No server has taken this for {minutes} min: {task['title'][:300]}{others}. "
        f"It asks for {_asked(loads(task['signature']))}; `task explain` says why nobody fits."
    )
    alerts.begin(
        tx, "queue", task["project_id"], sentence, task_id=task["id"], about=task["signature"]
    )


def _asked(wanted: dict) -> str:
    parts = []
    for name, value in sorted(wanted.items()):
        if value:
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            if name == "server":
                shown = labels("server", "name", {shown}).get(shown, shown)
            parts.append(f"{name} {shown}")
    return "; ".join(parts) or "any server with a free slot"


_looked_upto = 0  # seq of the alert that the next look goes on behind


def end_alerts() -> None:
    """End the alerts on losses and waits that are over; of very many some, the next ones next."""
    global _looked_upto
    looked = rows(
        "SELECT * FROM alert WHERE status = 'open' AND kind IN ('lost', 'queue') AND seq > ?"
        " ORDER BY seq LIMIT ?",
        (_looked_upto, AT_ONCE),
    )
    _looked_upto = looked[-1]["seq"] if len(looked) == AT_ONCE else 0
    for alert in looked:
        if not STILL[alert["kind"]](alert):
            with transaction() as tx:
                alerts.end(tx, alert)


def _still_lost(alert: dict) -> bool:
    task = moves.row(alert["task_id"])
    return _attempt(task) == alert["about"] and tasks.gone(task) is not None


def _still_unplaced(alert: dict) -> bool:
    return bool(
        one(
            "SELECT 1 FROM task WHERE project_id = ? AND signature = ?"
            " AND waiting_since IS NOT NULL LIMIT 1",
            (alert["project_id"], alert["about"]),
        )
    )


STILL = {"lost": _still_lost, "queue": _still_unplaced}


# ── clocks ────────────────────────────────────────────────────────────────────────────────────

LIVE = (
    "project_id IN (SELECT id FROM project)"  # so that an index is used
    " AND state IN ('starting', 'active', 'disconnected', 'recovering')"
)
# What runs by the wall clock and is still running: (table, columns, which rows). A column that lies
# ahead goes with the one it was counted from: "deadline_at:assigned_at".
RUNNING = (
    ("task", ("assigned_at", "started_at", "deadline_at:assigned_at", "updated_at"), moves.HELD),
    ("task", ("waiting_since", "deadline_at:waiting_since"), "waiting_since IS NOT NULL"),
    ("task", ("not_before:updated_at",), "not_before IS NOT NULL"),
    ("server", ("offline_at",), "offline_at IS NOT NULL"),
    ("session", ("state_at", "activity_at", "progress_at"), LIVE),
    ("intervention", ("claim_until:ended_at",), "delivery = 'held'"),
    ("notice", ("due_at:due_at - 600",), "state = 'due'"),  # they lie about so far ahead
    ("notice", ("again_at:again_at - 600",), "again_at IS NOT NULL"),
)


def translate(tx: Transaction, by: float) -> None:
    """The hub's clock was set by so many seconds: move what is running along with it."""
    move_along(by, *clock.stamped(by))
    keep_clock(by)
    tx.emit("clock_set", None, HUB.actor, {"by_s": round(by, 3)})


def move_along(by: float, since: float = 0.0, until: float = math.inf) -> None:
    """Move the times of what is running by so many seconds, which have not passed for the hub; of
    what was stamped between `since` and `until`, in seconds since 1970."""
    values = {"by": by, "since": since, "until": until}
    for table, columns, which in RUNNING:
        changes = ", ".join(_moved(*column.split(":")) for column in columns)
        execute(f"UPDATE {table} SET {changes} WHERE {which}", values)


def _moved(column: str, counted_from: str | None = None) -> str:
    stamp = counted_from or column
    return f"{column} = {column} + CASE WHEN {stamp} BETWEEN :since AND :until THEN :by ELSE 0 END"


class Listening:
    """Whether the hub was away itself, stopped or asleep, so short a time ago that reports may
    still be on their way; nothing is given up meanwhile."""

    def __init__(self, quiet_s: float = QUIET_S):
        self._lock = threading.Lock()
        self.quiet_s = quiet_s
        self._until = self._looked = time.monotonic()

    def begin(self, quiet_s: float) -> None:
        """The hub starts."""
        now = time.monotonic()
        self.quiet_s, self._looked, self._until = quiet_s, now, now + quiet_s

    def __bool__(self) -> bool:
        """Asked at short intervals: a long one means that this process did not run."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked > self.quiet_s / 2:
                self._until = now + self.quiet_s
            self._looked = now
            return now < self._until


listening = Listening()
