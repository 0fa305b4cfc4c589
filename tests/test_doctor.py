"""The doctors of hub and agent: what is wrong is found, and said with what to do about it."""

import json
import os
import time

import pytest

import chats
import doctor
import models
import servers
import sessions
import wire
from auth import HUB
from conftest import wait_until
from faulting import FAST
from models import Forbidden


@pytest.fixture
def examine(world, tmp_path):
    settings = {"data": tmp_path, "url": "http://127.0.0.1:8080", "host": "127.0.0.1"}
    for path in (tmp_path, *tmp_path.glob("*.db*"), tmp_path / "secret"):
        path.chmod(0o700)

    def look(polling=(), now=None, **changed) -> dict[str, list]:
        """{check: [(state, says, do)]}"""
        found = {}
        asked = settings | changed, "0.1.0", now or time.time(), set(polling)
        for one in doctor.examine(HUB, *asked):
            found.setdefault(one["check"], []).append((one["state"], one["says"], one["do"]))
        return found

    return look


def states(found: dict, check: str) -> list[str]:
    return [state for state, _, _ in found.get(check, [])]


def test_a_hub_that_is_well_is_told_so(world, examine):
    world.server("dev")
    found = examine()
    assert states(found, "database") == ["ok", "ok"]
    for check in ("disk", "permissions", "TLS", "server", "signals"):
        assert states(found, check) == ["ok"], found[check]
    assert "commands" not in found and "telegram" not in found


def test_it_is_for_admins_of_the_hub(world, examine):
    person = world.user("olga", shop="admin")
    with pytest.raises(Forbidden):
        doctor.examine(person, {}, "0.1.0", 0.0, set())


def test_a_damaged_database_is_found(world, examine, tmp_path):
    sessions.logs().close()
    log = tmp_path / "logs.db"
    log.write_bytes(b"SQLite format 3\0" + os.urandom(8000))
    for part in ("logs.db-wal", "logs.db-shm"):
        (tmp_path / part).unlink(missing_ok=True)
    sound, broken = examine()["database"]
    assert sound[0] == "ok"
    assert broken[0] == "bad" and broken[1].startswith("logs.db: ") and "restore" in broken[2]
    log.unlink()
    sessions.use_logs(type(sessions.logs())(log))


def test_files_that_others_may_read_are_found(examine, tmp_path):
    (tmp_path / "secret").chmod(0o640)
    [(state, says, do)] = examine()["permissions"]
    assert (state, says, do) == (
        "bad",
        f"Others may read {tmp_path / 'secret'}.",
        f"chmod -R go= {tmp_path}",
    )


@pytest.mark.parametrize(
    "url, host, state",
    [
        ("https://hub.example.org", "127.0.0.1", "ok"),
        ("http://hub.example.org", "127.0.0.1", "bad"),
        ("http://127.0.0.1:8080", "0.0.0.0", "bad"),
        ("http://localhost:8080", "::1", "ok"),
    ],
)
def test_an_address_without_tls_is_found(examine, url, host, state):
    assert states(examine(url=url, host=host), "TLS") == [state]


def test_a_full_disk_is_found(examine, monkeypatch):
    real = os.statvfs

    def little(blocks):
        def statvfs(path):
            found = real(path)
            return os.statvfs_result((*found[:4], blocks * 10**6 // found.f_frsize, *found[5:]))

        return statvfs

    for free, state in ((100, "bad"), (1000, "warn"), (5000, "ok")):
        monkeypatch.setattr(os, "statvfs", little(free))
        assert states(examine(), "disk") == [state]


def test_backups_that_are_missing_or_old_are_found(examine):
    assert states(examine(), "backup") == ["warn"]
    with models.transaction() as tx:
        models.execute("INSERT INTO meta VALUES ('backup_at', ?)", (str(tx.now),))
    assert states(examine(), "backup") == ["ok"]
    assert states(examine(now=time.time() + 8 * 24 * 3600), "backup") == ["warn"]


def test_commands_that_an_agent_does_not_take_are_found(world, examine):
    world.server("dev")
    world.task("A", command=["make"])
    world.assign("A")
    assert "commands" not in examine()
    [(state, says, _)] = examine(now=time.time() + 61)["commands"]
    assert (state, says) == ("bad", "dev is online and has not taken 1.")


def test_what_servers_suffer_from_is_found(world, examine):
    world.server("dev")
    caller = world.key("dev")
    wire.greet(caller, {"agent_version": "0.0.9"})
    info = {"time": time.time() + 300, "state_free_mb": 50, "tmux": "", "trouble": "it burns"}
    servers.heartbeat(caller, info)
    servers.save_heartbeats()
    found = examine(polling=[world.servers["dev"]])["server"]
    assert [(state, says.partition(": ")[2]) for state, says, _ in found] == [
        ("warn", "its agent has version 0.0.9, the hub 0.1.0"),
        ("warn", "its agent polls: a proxy breaks WebSockets, or it is set so"),
        ("warn", "its clock is +300 s beside the hub's"),
        ("warn", "only 50 MB are free for its agent"),
        ("bad", "it burns"),
        ("warn", "it has no tmux: sessions end with the agent"),
    ]
    assert all(do for _, _, do in found)
    world.offline("dev")
    assert "offline since 20" in examine()["server"][0][1]


def test_a_coding_agent_that_gives_no_signal_is_found(world, examine):
    world.server("dev")
    with models.transaction():
        models.Server.update(profiles={"claude": "2"}).execute()
    world.working("A", profile="claude")
    session = world.row("A")["session_id"]
    caller = world.key("dev")
    wire.take_report(caller, {"type": "session_started", "session_id": session, "pid": 1})
    said = {"type": "session_activity", "session_id": session, "state": "no_signal"}
    wire.take_report(caller, said | {"signals": [{"source": "title"}]})
    [(state, says, do)] = examine()["signals"]
    assert state == "warn" and "(claude on dev) gives no signal; heard: title." in says
    assert "session explain" in do


def test_a_bot_that_two_poll_is_found(world, examine):
    with models.transaction():
        models.execute("INSERT INTO bot (id, username) VALUES ('7', 'shop_bot')")
        chats.note_bot("7", trouble="409: another program polls")
    [(state, says, do)] = examine()["telegram"]
    assert (state, says) == ("bad", "shop_bot: 409: another program polls")
    assert "another program" in do


def test_trouble_that_an_agent_tells_is_an_alert_until_it_is_over(world):
    world.server("dev")
    caller = world.key("dev")

    def open_alerts() -> list[str]:
        return [row["sentence"] for row in models.rows("SELECT * FROM alert WHERE status = 'open'")]

    servers.heartbeat(caller, {"trouble": "it cannot write"})
    servers.heartbeat(caller, {"trouble": "it cannot write"})
    assert open_alerts() == ["Server dev: it cannot write."]
    servers.begin()  # the hub was restarted
    servers.heartbeat(caller, {"trouble": "it cannot write"})
    assert len(open_alerts()) == 1
    servers.heartbeat(caller, {"trouble": None})
    assert open_alerts() == []
    world.check()


# ── with real parts ───────────────────────────────────────────────────────────────────────────


def found_by(agent, *argv) -> dict[str, dict]:
    done = agent.run("--doctor", "--json", *argv)
    return {one["check"]: one for one in json.loads(done.stdout)} | {"code": done.returncode}


@pytest.mark.hub(**FAST)
def test_an_agents_doctor_looks_at_config_state_tmux_and_the_way_to_the_hub(shop, start_agent):
    agent = start_agent(shop, "dev")
    wait_until(lambda: (agent.folder / "state/state.db").exists())
    found = found_by(agent)
    assert found.pop("code") == 0
    assert {one["state"] for one in found.values()} == {"ok"}, found
    assert {"config", "state", "database", "disk", "tmux", "agent", "hub", "TLS", "clock"} < {
        *found
    }
    assert "WebSocket" in found
    agent.stop()
    agent.config.chmod(0o644)
    found = found_by(agent)
    assert found["code"] == 1
    assert found["config"]["state"] == "bad" and "chmod go=" in found["config"]["do"]
    assert found["agent"]["state"] == "warn"
    text = agent.run("--doctor").stdout
    assert "bad  config" in text and "→ chmod go= " in text


@pytest.mark.hub(**FAST)
def test_an_agents_doctor_finds_what_is_broken(shop, start_agent, tmp_path):
    agent = start_agent(shop, "dev")
    agent.stop()
    for part in agent.folder.glob("state/state.db*"):
        part.write_bytes(b"no database at all, but long" * 200)
    agent.config.write_text(agent.config.read_text().replace(shop.url, "http://127.0.0.1:9"))
    found = found_by(agent)
    assert found["database"]["state"] == found["hub"]["state"] == "bad"
    assert found["WebSocket"]["state"] == "warn"
    empty = found_by(agent, "--config", str(tmp_path / "none.yaml"))
    assert empty["config"]["state"] == "bad" and "--register" in empty["config"]["do"]


def test_a_state_that_is_damaged_stops_the_agent_with_a_sentence(shop, start_agent):
    agent = start_agent(shop, "dev")
    agent.stop()
    for part in agent.folder.glob("state/state.db*"):
        part.write_bytes(b"no database at all, but long" * 200)
    done = agent.run()
    assert done.returncode == 1
    assert "state.db cannot be used (file is not a database)" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.hub(**FAST)
def test_the_command_lines_doctor_shows_all_of_it(shop, start_agent, cli):
    start_agent(shop, "dev")
    shown = cli("doctor", ok=False)
    assert "WebSocket: Upgrades get through." in shown.stdout
    assert "hub database: hub.db is whole." in shown.stdout
    assert "hub server: dev is well." in shown.stdout
    assert shown.returncode == 0
    found = cli("doctor", "--json")
    assert {one["where"] for one in found} == {"here", "hub"}
    (shop.data / "secret").chmod(0o644)
    broken = cli("doctor", ok=False)
    assert broken.returncode == 1 and "→ chmod -R go=" in broken.stdout


def test_who_is_no_admin_sees_what_is_here(shop, cli):
    body = {"username": "olga", "password": "correct horse battery", "roles": {"shop": "viewer"}}
    shop.api("POST", "users", body)
    login = {"username": "olga", "password": body["password"]}
    shop.token = shop.http.post(f"{shop.url}/api/v1/auth/login", json=login, timeout=10).json()[
        "token"
    ]
    shown = cli("doctor")
    assert "shown to its admins only" in shown.stderr
    assert "here clock" in shown.stdout and "hub database" not in shown.stdout
