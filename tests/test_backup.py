"""Backups of a hub that runs, and what it does when it begins anew from one of yesterday."""

import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import alerts
import auth
import backup
import inbox
import leases
import models
import moves
import sessions
import tasks
import wire
from auth import HUB
from conftest import hub_py, wait_until
from faulting import FAST, Graph, check, reading, through
from models import Conflict, Invalid, NoRoom, Unauthorised


@pytest.fixture
def saved(world, tmp_path):
    """Make a backup of the world, and begin anew from it."""

    def save() -> bytes:
        folder = tmp_path / f"b{time.monotonic_ns()}"
        backup.make(tmp_path, "0.1.0", folder)
        pieces = backup.Packed(folder)
        whole = b"".join(pieces)
        pieces.close()
        assert not folder.exists()
        return whole

    return save


YESTERDAY = "2026-11-21T06:00:00.000Z"


def begin_anew(world) -> None:
    with models.transaction() as tx:
        backup.begin_anew(tx, YESTERDAY)


# ── the archive ───────────────────────────────────────────────────────────────────────────────


def test_a_backup_holds_all_there_is_for_its_owner_alone(world, saved):
    world.task("A")
    with tarfile.open(fileobj=io.BytesIO(saved())) as tar:
        assert tar.getnames() == ["backup.json", "hub.db", "logs.db", "secret"]
        assert {member.mode for member in tar} == {0o600}
        described = json.load(tar.extractfile("backup.json"))
    assert described["version"] == "0.1.0"
    assert described["schema"] == models.newest_schema()
    assert set(described["sha256"]) == {"hub.db", "logs.db", "secret"}


def test_what_is_committed_is_in_it_and_what_is_not_is_not(world, saved, tmp_path):
    world.task("A")
    with models.transaction() as tx:
        tx.emit("note_to_self", None, "hub")
        backup.unpack(io.BytesIO(saved()), tmp_path / "u", 99)
    db = models.SqliteDatabase(str(tmp_path / "u/hub.db"))
    titles = [title for (title,) in db.execute_sql("SELECT title FROM task")]
    types = {kind for (kind,) in db.execute_sql("SELECT type FROM event")}
    db.close()
    assert titles == ["A"] and "note_to_self" not in types


def damaged(whole: bytes, how: str) -> bytes:
    if how == "cut off":
        return whole[: len(whole) // 2]
    if how == "one byte":
        at = whole.index(b"SQLite format 3") + 5000
        return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    if how == "no archive":
        return b"hello " * 1000
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        names = {"strange": "../../etc/cron.d/x", "link": "secret", "empty": "hub.yaml"}
        info = tarfile.TarInfo(names[how])
        if how == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return made.getvalue()


@pytest.mark.parametrize("how", ["cut off", "one byte", "no archive", "strange", "link", "empty"])
def test_what_is_no_whole_backup_is_refused_and_leaves_nothing(world, saved, tmp_path, how):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Invalid) as refused:
        backup.unpack(io.BytesIO(damaged(saved(), how)), tmp_path / "u", 99)
    assert "backup" in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("wrong", [{"at": "yesterday"}, {"sha256": ["x"]}, {"schema": None}, None])
def test_a_backup_whose_description_is_not_one_is_refused(world, saved, tmp_path, wrong):
    with tarfile.open(fileobj=io.BytesIO(saved())) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    described = json.loads(files["backup.json"])
    files["backup.json"] = json.dumps(described | wrong if wrong else wrong).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    made.seek(0)
    with pytest.raises(Invalid, match="description cannot be read: take another one"):
        backup.unpack(made, tmp_path / "u", 99)
    assert not (tmp_path / "u").exists()


def test_a_backup_of_a_newer_hub_is_refused(world, saved, tmp_path):
    with pytest.raises(Invalid, match="is of a newer hub"):
        backup.unpack(io.BytesIO(saved()), tmp_path / "u", models.newest_schema() - 1)


def test_without_room_a_backup_is_refused_in_words_and_leaves_nothing(world, saved, tmp_path):
    whole, before = saved(), sorted(tmp_path.iterdir())
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        with pytest.raises(NoRoom, match="Free some space"):
            backup.of_running(HUB, tmp_path, "0.1.0")
        with pytest.raises(NoRoom, match="Free some space"):
            backup.receive(HUB, io.BytesIO(whole), tmp_path, 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_restore_is_refused_while_one_waits(world, saved, tmp_path):
    """It was answered that the first one comes: nothing takes its place without a word."""
    world.task("A")
    first = saved()
    world.task("B")
    data = tmp_path / "data"
    data.mkdir()
    (data / "restore").mkdir()  # what is left of one that is in place
    backup.receive(HUB, io.BytesIO(first), data, 99)
    with pytest.raises(Conflict, match="A backup waits already .* restart it, or remove .*restore"):
        backup.receive(HUB, io.BytesIO(saved()), data, 99)
    assert [path.name for path in data.iterdir()] == ["restore"]
    db = sqlite3.connect(data / "restore/hub.db")
    assert db.execute("SELECT title FROM task").fetchall() == [("A",)]
    db.close()


def test_of_two_restores_at_once_one_is_refused(world, saved, tmp_path):
    whole = saved()
    both = threading.Barrier(2)

    class Slow(io.BytesIO):
        def read(self, size=-1):
            if not self.tell():
                both.wait(10)  # neither waits in its place yet
            return super().read(size)

    def receive(_n):
        try:
            return backup.receive(HUB, Slow(whole), tmp_path, 99)
        except Conflict:
            return None

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(receive, range(2))).count(None) == 1
    assert [path.name for path in tmp_path.glob("restore*")] == ["restore"]


def test_what_was_left_half_done_is_tidied_away(tmp_path):
    for name in ("backup-1", "restore-2", "before-restore-3", "restore"):
        (tmp_path / name).mkdir()
    (tmp_path / "backup-of-mine.tar").touch()
    backup.tidy(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"before-restore-3", "restore", "backup-of-mine.tar"}


def test_a_restore_that_is_killed_anywhere_goes_on(world, saved, tmp_path, monkeypatch):
    """Each move of a file is the last thing a process does, once in turn."""
    world.task("A")
    whole = saved()
    for at in range(1, 30):
        data = tmp_path / f"d{at}"
        data.mkdir()
        for name in ("hub.db", "hub.db-wal", "logs.db", "secret", "hub.yaml"):
            (data / name).write_text(f"old {name}")
        backup.receive(HUB, io.BytesIO(whole), data, 99)
        if (child := os.fork()) == 0:
            _die_at(monkeypatch, at)
            backup.put_in_place(data)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        backup.put_in_place(data)
        [kept] = data.glob("before-restore-*")
        for name in ("hub.db", "hub.db-wal", "logs.db", "secret"):
            assert (kept / name).read_text() == f"old {name}"
        assert (data / "hub.yaml").read_text() == "old hub.yaml"  # none was in the backup
        assert (data / "hub.db").read_bytes().startswith(b"SQLite format 3")
        assert not (data / "hub.db-wal").exists() and not (data / "restore").exists()
        assert (data / "restored.json").exists()
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert at > 6


def _die_at(monkeypatch, at: int) -> None:
    count, rename = [0], backup.Path.rename

    def dying(self, target):
        count[0] += 1
        moved = rename(self, target)
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    monkeypatch.setattr(backup.Path, "rename", dying)


# ── beginning anew ────────────────────────────────────────────────────────────────────────────


def test_nobody_is_signed_in_and_no_server_takes_new_work(world):
    world.server("dev")
    token = world.token(world.user("olga", shop="viewer").id)
    epoch = models.epoch()
    begin_anew(world)
    assert models.epoch() != epoch
    [made] = models.rows("SELECT value FROM meta WHERE key = 'backup_at'")
    assert models.iso(float(made["value"])) == YESTERDAY  # not "none was ever made"
    with pytest.raises(Unauthorised):
        auth.by_token(token)
    world.task("A", auto_assign=True)
    assert world.status("A") == "pending"
    assert world.key("dev").name == "dev"  # its agent comes back


def named(world, name: str, session_id: str, attempt: int, **more) -> dict:
    item = {"session_id": session_id, "tmux_name": f"orc-{session_id[:12]}", "alive": True}
    return item | {"task_id": world.ids[name], "attempt": attempt, "pid": 7} | more


SESSION = "11111111-2222-4333-8444-555555555555"


def sync(world, server: str, *items: dict) -> dict:
    return wire.sync(world.key(server), {"instance": "i", "sessions": list(items)})


@pytest.mark.parametrize("then", ["pending", "held", "failed"])
def test_a_worker_begun_after_the_backup_goes_on_with_its_task(world, then):
    world.server("dev")
    world.server("old")
    world.task("A", command=["make"], max_attempts=1)
    world.task("B", after=["A"])
    if then != "pending":
        world.assign("A", server="old")
        world.start("A")
    if then == "failed":
        world.fail("A")
    begin_anew(world)
    attempt = 1 if then == "pending" else 2
    sync(world, "dev", named(world, "A", SESSION, attempt))
    assert (world.status("A"), world.row("A")["attempt"]) == ("running", attempt)
    assert world.on("A") == "dev" and world.row("A")["session_id"] == SESSION
    report = {"type": "task_report", "task_id": world.ids["A"], "attempt": attempt}
    wire.take_report(world.key("dev"), report | {"outcome": "complete", "result": "x"})
    assert world.status("A") == "done" and world.row("B")["open_deps"] == 0
    world.check()


def test_an_older_attempt_is_not_taken_over(world):
    world.server("dev")
    world.server("old")
    world.task("A", command=["make"])
    world.assign("A", server="old")
    world.start("A")
    begin_anew(world)
    sync(world, "dev", named(world, "A", SESSION, 1))
    assert (world.on("A"), world.row("A")["attempt"]) == ("old", 1)
    world.check()


def test_without_a_restore_no_server_helps_itself_to_a_task(world):
    world.server("dev")
    world.task("A", command=["make"])
    sync(world, "dev", named(world, "A", SESSION, 1))
    assert world.status("A") == "pending"
    begin_anew(world)
    sync(world, "dev")
    sync(world, "dev", named(world, "A", SESSION.replace("1", "6"), 1))  # not a second time
    assert world.status("A") == "pending"
    world.check()


def test_nor_to_one_of_another_project(world):
    world.project("other")
    world.server("dev")
    world.task("A", project="other", command=["make"])
    begin_anew(world)
    sync(world, "dev", named(world, "A", SESSION, 1))
    assert world.status("A") == "pending"


def test_what_the_agent_has_no_more_may_be_done_so_a_person_is_asked(world):
    world.server("dev")
    world.working("A", command=["make"])
    begin_anew(world)
    sync(world, "dev")
    assert (world.status("A"), world.row("A")["attempt"]) == ("running", 1)
    [alert] = alerts.waiting([world.project("shop")["id"]])
    assert "restored from a backup, so it may have been finished since" in alert["sentence"]
    world.check()


# ── what may have been done since the backup is not done again ────────────────────────────────


def asked_for(world) -> list[str]:
    return [alert["sentence"] for alert in alerts.waiting([world.project("shop")["id"]])]


def sent(world, server: str) -> list[str]:
    """The types of the commands an agent gets that connects now."""
    found = wire.pending_commands(world.servers[server], {}, time.monotonic())
    return [frame["type"] for frame in found]


def test_what_was_to_start_is_not_started_again(world):
    """Its agent was away when the backup was made, and has done it since."""
    world.server("dev")
    world.task("A", command=["make"])
    world.assign("A")
    assert sent(world, "dev") == ["task_assigned"]
    begin_anew(world)
    sync(world, "dev")
    assert sent(world, "dev") == []
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 1)
    [sentence] = asked_for(world)
    assert "restored from a backup, so it may have been finished since" in sentence
    world.check()


@pytest.fixture
def asking(world):
    """A coding agent works on a task, and has asked something."""
    world.server("dev")
    world.working("A", command=["make"])
    session_id = world.row("A")["session_id"]
    started = {"type": "session_started", "session_id": session_id, "pid": 7}
    wire.take_report(world.key("dev"), started)
    wire.acknowledge(world.servers["dev"], [c["id"] for c in world.commands("dev")])
    world.asker = auth.by_key(auth.session_key(session_id))
    return world


def test_what_people_said_is_not_typed_again(asking):
    world = asking
    inbox.add_note(HUB, world.ids["A"], "use the other one")
    question, _ = inbox.ask(world.asker, world.ids["A"], "which?")
    inbox.answer(HUB, question["id"], "this")
    assert sent(world, "dev") == ["task_note", "intervention_response"]
    begin_anew(world)
    assert sent(world, "dev") == []
    note, answer = asked_for(world)
    assert note.startswith("A note may or may not have reached session")
    assert answer.startswith("The answer to a question may or may not have reached session")
    assert "the hub was restored from a backup, and it may have been said since" in answer
    [row] = models.rows("SELECT delivery FROM intervention")
    assert row["delivery"] == "unknown"


def test_an_answer_kept_for_a_call_is_for_that_call_alone(asking):
    world = asking
    question, _ = inbox.ask(world.asker, world.ids["A"], "which?")
    inbox.collect(world.asker, question["id"], "c-1")  # a call waits
    inbox.answer(HUB, question["id"], "this")
    begin_anew(world)
    assert inbox.send_unclaimed(time.time() + 1000) == 0 and sent(world, "dev") == []
    assert len(asked_for(world)) == 1
    assert inbox.collect(world.asker, question["id"], "c-1")["response"] == "this"


def test_what_does_no_harm_twice_is_sent_again(asking):
    world = asking
    world.task("B", command=["make"])
    world.assign("B")
    wire.acknowledge(world.servers["dev"], [c["id"] for c in world.commands("dev")])
    world.cancel("B")
    sessions.close_session(HUB, world.row("A")["session_id"])
    with models.transaction() as tx:
        moves.command(tx, world.servers["dev"], "rules_changed", None)
    begin_anew(world)
    assert sent(world, "dev") == ["task_cancelled", "session_close", "rules_changed"]
    assert asked_for(world) == []


# ── no live worker is taken for lost ──────────────────────────────────────────────────────────


def test_a_worker_that_was_starting_at_the_backup_goes_on(world):
    world.server("dev")
    world.task("A", command=["make"], start_timeout=60)
    world.assign("A")
    session_id = world.row("A")["session_id"]
    begin_anew(world)
    item = named(world, "A", session_id, 1, conversation="c-1", working_directory="/srv")
    sync(world, "dev", item)
    session = models.one("SELECT * FROM session WHERE id = ?", (session_id,))
    assert (session["state"], session["pid"], session["conversation"]) == ("recovering", 7, "c-1")
    assert world.status("A") == "running"
    assert tasks.time_out(time.time() + 1e6) == 0
    assert sent(world, "dev") == []
    world.check()


def test_one_that_had_not_said_so_has_begun_all_the_same(world):
    """Its session was there at the backup, and it has said that it began since."""
    world.server("dev")
    world.task("A", command=["make"], start_timeout=60)
    world.assign("A")
    session_id = world.row("A")["session_id"]
    started = {"type": "session_started", "session_id": session_id, "pid": 7}
    wire.take_report(world.key("dev"), started)
    begin_anew(world)
    sync(world, "dev", named(world, "A", session_id, 1))
    assert world.status("A") == "running"
    assert tasks.time_out(time.time() + 1e6) == 0


def test_what_runs_by_the_clock_loses_no_time_by_a_restore(world):
    world.server("dev")
    world.task("A", command=["make"], timeout=60)
    world.assign("A")
    before, past = world.row("A"), time.time() - models.since_epoch(YESTERDAY)
    begin_anew(world)
    after = world.row("A")
    for column in ("assigned_at", "deadline_at"):
        assert after[column] - before[column] == pytest.approx(past, abs=5)
    sync(world, "dev", named(world, "A", after["session_id"], 1))
    assert tasks.time_out(after["deadline_at"] + 1) == 1  # from then on it is as ever


def test_nothing_is_given_up_of_a_server_that_was_away_and_is_not_heard_yet(world):
    world.server("dev")
    world.server("other")
    world.task("A", command=["make"], start_timeout=60)
    world.assign("A", server="dev")
    world.offline("dev")
    with models.transaction():
        models.execute("UPDATE server SET offline_at = offline_at - 86400 WHERE online = 0")
    begin_anew(world)
    assert leases.release_lost(time.time() + 60, 900) == 0 and asked_for(world) == []
    for _ in range(2):
        assert leases.release_lost(time.time() + 1000, 900) == 0
        assert tasks.time_out(time.time() + 1e6) == 0
    assert (world.status("A"), world.row("A")["attempt"]) == ("assigned", 1)
    [sentence] = asked_for(world)
    assert "server dev has been away for 900 s; the hub was restored from a backup" in sentence
    world.check()


def test_a_session_key_counts_only_once_its_server_has_said_what_it_has(asking, client):
    """The session may have ended since the backup, and its key with it."""
    world, session_id = asking, asking.row("A")["session_id"]
    own = client.as_key(auth.session_key(session_id))
    assert own.get("auth/me").status_code == 200
    begin_anew(world)
    refused = own.get("auth/me")
    assert (refused.status_code, refused.json["code"]) == (401, "restored")
    sync(world, "dev", named(world, "A", session_id, 1))
    assert own.get("auth/me").status_code == 200
    begin_anew(world)
    sync(world, "dev")
    assert own.get("auth/me").status_code == 401


# ── with a real hub and agent ─────────────────────────────────────────────────────────────────


@pytest.mark.fault("F31 yesterday's backup meets newer agents")
@pytest.mark.hub(**FAST)
def test_a_hub_begins_anew_while_its_agents_run_what_it_does_not_know(
    shop, start_agent, cli, tmp_path, case
):
    start_agent(shop, "dev", slots=4, ready=lambda agent: through(agent, shop))
    go = tmp_path / "go"
    wait = f"echo begun; while [ ! -e {go} ]; do sleep 0.05; done; echo ended"
    file = tmp_path / "hub.tar"
    known = shop.api("POST", "tasks", {"title": "known", "command": ["sh", "-c", wait]})["id"]
    cli("hub", "backup", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    shop.api("POST", f"tasks/{known}/assign", {})
    made = {"title": "unknown", "command": ["sh", "-c", wait], "auto_assign": True}
    unknown = shop.api("POST", "tasks", made)["id"]
    for task_id in (known, unknown):
        wait_until(lambda t=task_id: shop.api("GET", f"tasks/{t}")["status"] == "running", 20)
    session = shop.api("GET", f"tasks/{known}")["session_id"]
    pid = shop.process.pid
    said = cli("hub", "restore", str(file), "--yes")
    assert "begins anew from the backup of" in said.stdout
    wait_until(lambda: "restored from a backup" in "".join(shop.lines), 20)
    wait_until(shop._answers, 20)
    shop.token = None
    assert shop.process.pid == pid  # the same process, so whoever watches over it sees nothing
    wait_until(lambda: shop.api("GET", f"tasks/{known}")["status"] == "running", 20)
    assert shop.api("GET", f"tasks/{known}")["session_id"] == session
    assert shop.ask("GET", f"tasks/{unknown}").status_code == 404
    assert shop.api("GET", "servers/dev")["status"] == "draining"
    adopted = [s for s in shop.api("GET", "sessions")["sessions"] if s["id"] != session]
    assert [s["status"] in ("active", "recovering") for s in adopted] == [True]
    go.touch()
    wait_until(lambda: shop.api("GET", f"tasks/{known}")["status"] == "done", 20)
    wait_until(lambda: shop.api("GET", f"sessions/{session}")["status"] == "closed", 20)
    output = shop.ask("GET", f"sessions/{session}/output").content
    assert output.count(b"begun") == 1 and output.endswith(b"ended\r\n")
    check(shop)
    case.count("tasks of the backup", 1, shop.api("GET", f"tasks/{known}")["status"] != "done")
    case.kills, case.seen = 1, "goes on with the known task; the unknown one's session is shown"


def test_a_restored_hub_has_the_settings_of_its_backup_at_once(shop):
    (shop.data / "hub.yaml").write_text("heartbeat_s: 7\n")
    whole = shop.ask("POST", "hub/backup").content
    (shop.data / "hub.yaml").unlink()
    assert shop.ask("POST", "hub/restore", data=whole).status_code == 202
    wait_until(lambda: "restored from a backup" in "".join(shop.lines), 20)
    wait_until(shop._answers, 20)
    shop.token = None
    assert shop.register("dev")["heartbeat_s"] == 7


@pytest.mark.hub(tick_s=60)
def test_a_hub_ends_as_it_should_though_the_last_signs_of_life_cannot_be_saved(shop):
    """Or it would not begin anew after a restore."""
    key = shop.register("dev")["api_key"]
    shop.api("POST", "servers/heartbeat", {}, key=key)  # it is online from here on
    shop.api("POST", "servers/heartbeat", {}, key=key)
    resource.prlimit(shop.process.pid, resource.RLIMIT_FSIZE, (4096, -1))
    assert shop.stop() == 0
    assert "stopping: The hub's disk does not take any more" in "".join(shop.lines)


@pytest.mark.fault("backups while work goes on")
@pytest.mark.hub(**FAST)
def test_a_backup_made_in_the_middle_of_work_is_whole(shop, start_agent, tmp_path, case, start_hub):
    start_agent(shop, "dev", slots=4)
    graph = Graph(shop, tmp_path)
    graph.make(layers=4, width=4)
    files = []
    working = threading.Event()

    def save():
        while not working.is_set():
            files.append(tmp_path / f"b{len(files)}.tar")
            files[-1].write_bytes(shop.ask("POST", "hub/backup").content)

    thread = threading.Thread(target=save)
    thread.start()
    graph.wait()
    working.set()
    thread.join()
    for file in files[:: max(1, len(files) // 3)]:
        data = tmp_path / f"data-{file.stem}"
        done = hub_py("--data", data, "--port", "0", "--restore", file)
        assert done.returncode == 0, done.stderr
        hub = start_hub(data=data)
        with reading(hub) as db:
            found = db.execute("SELECT COUNT(*) FROM task").fetchone()[0]
        case.count("tasks", 16, 16 - found)
        check(hub)
        hub.stop()
    case.kills, case.seen = len(files), "each restored and checked"


def test_the_hub_itself_saves_and_restores_when_it_is_stopped(shop, tmp_path):
    shop.api("POST", "tasks", {"title": "kept"})
    file = tmp_path / "b.tar"
    done = hub_py("--data", shop.data, "--backup", file)
    assert done.returncode == 0 and "It holds secrets" in done.stdout
    port = shop.settings["port"]
    refused = hub_py("--data", shop.data, "--port", port, "--restore", file)
    assert refused.returncode == 1 and "The hub is running" in refused.stderr
    again = hub_py("--data", shop.data, "--backup", file)
    assert again.returncode == 1 and "File exists" in again.stderr
    shop.stop()
    shutil.rmtree(shop.data)
    nothing = hub_py("--data", shop.data, "--backup", tmp_path / "c.tar")
    assert nothing.returncode == 1 and "no hub's data" in nothing.stderr
    done = hub_py("--data", shop.data, "--port", port, "--restore", file)
    assert done.returncode == 0, done.stderr
    shop.start()
    shop.token = None
    assert [t["title"] for t in shop.api("GET", "tasks")["tasks"]] == ["kept"]
    missing = hub_py("--data", tmp_path / "x", "--port", 0, "--restore", tmp_path / "no.tar")
    assert missing.returncode == 1 and "Cannot read" in missing.stderr
