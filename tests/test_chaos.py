"""A short run of clients and nemesis; and the checker sees what it is there to see."""

import sqlite3
from pathlib import Path

import pytest

from chaos import Run, Verdict
from faulting import N, check, healthy


@pytest.fixture
def run(tmp_path, case):
    made = Run(tmp_path, case.seed, agents=2, clients=3, pace=0.4)
    yield made
    made.close()


def tamper(path: Path, sql: str, *values) -> None:
    db = sqlite3.connect(path, timeout=10)
    with db:
        assert db.execute(sql, values).rowcount > 0
    db.close()


@pytest.mark.fault("clients and a nemesis")
@pytest.mark.timeout(400 if N <= 10 else 4000)
def test_what_clients_were_told_is_so_whatever_broke(run, case):
    run.go(2 * N)
    healthy(run.hub)
    verdict = Verdict(run)
    assert verdict.check() == []
    accepted = [c.about for c in verdict.calls if c.verb == "create" and c.code == 201]
    case.count("tasks", len(accepted), sum(verdict.titles[title] != 1 for title in accepted))
    case.kills = sum(run.nemesis.done.values())
    case.seen = f"{len(verdict.calls)} calls, {len(verdict.tasks)} tasks, 0 violations"
    _sees_what_is_wrong(run)


def _sees_what_is_wrong(run: Run) -> None:
    """Each lie in the stored state is found out."""
    database = run.hub.data / "hub.db"
    made = next(c for x in run.clients for c in x.history if c.verb == "create" and c.code == 201)
    task = made.seen["id"]
    assert lies(run, database, "UPDATE task SET title = 'gone' WHERE id = ?", task) == [
        f"{made.about} was accepted and is there 0 times"
    ]
    noted = [c for x in run.clients for c in x.history if c.verb == "note" and c.code == 201]
    if noted:
        found = lies(run, database, "DELETE FROM note WHERE content = ?", noted[0].said)
        assert found == [f"{noted[0].said}: code 201, there 0 times"]
    tamper(database, "UPDATE event SET type = 'task_started' WHERE type = 'task_completed'")
    with pytest.raises(AssertionError):
        check(run.hub)


def lies(run: Run, database: Path, sql: str, *values) -> list[str]:
    """What the verdict says after a change that nobody asked for; undone afterwards."""
    copy = database.read_bytes(), Path(f"{database}-wal").read_bytes()
    run.hub.stop()
    tamper(database, sql, *values)
    run.hub.start()
    try:
        return Verdict(run).judge()
    finally:
        run.hub.stop()
        for part in ("-wal", "-shm"):
            Path(f"{database}{part}").unlink(missing_ok=True)
        database.write_bytes(copy[0])
        Path(f"{database}-wal").write_bytes(copy[1])
        run.hub.start()
