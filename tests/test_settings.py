"""Flags before environment before hub.yaml; what cannot be used is said in one sentence."""

import os

import pytest

import hub
from conftest import hub_py

DEFAULTS = {name: default for name, default, _ in hub.SETTINGS}


def read(tmp_path, flags=None, environ=None, file=None) -> dict:
    if file is not None:
        (tmp_path / "hub.yaml").write_text(file)
    return hub.read_settings({"data": str(tmp_path)} | (flags or {}), environ or {})


def test_without_anything_the_defaults_stand(tmp_path):
    assert read(tmp_path) == DEFAULTS | {"data": tmp_path}


@pytest.mark.parametrize(
    ("flags", "environ", "file", "port"),
    [
        ({}, {}, None, 8080),
        ({}, {}, "port: 1", 1),
        ({}, {"ORCHESTRATIA_PORT": "2"}, "port: 1", 2),
        ({"port": "3"}, {"ORCHESTRATIA_PORT": "2"}, "port: 1", 3),
        ({"port": None}, {}, "port: 1", 1),
        ({"port": 0}, {}, "port: 1", 0),
    ],
)
def test_a_flag_counts_before_the_environment_before_the_file(tmp_path, flags, environ, file, port):
    assert read(tmp_path, flags, environ, file)["port"] == port


def test_the_data_directory_may_come_from_the_environment(tmp_path):
    (tmp_path / "hub.yaml").write_text("tick_s: 2")
    settings = hub.read_settings({}, {"ORCHESTRATIA_DATA": str(tmp_path)})
    assert (settings["data"], settings["tick_s"]) == (tmp_path, 2.0)


@pytest.mark.parametrize(
    ("environ", "file", "fragment"),
    [
        ({"ORCHESTRATIA_PORT": "eighty"}, None, "port must be a whole number"),
        ({}, "tick_s: soon", "tick_s must be a number"),
        ({}, "tick_s: [1]", "tick_s must be a number"),
        ({}, "prot: 1", "unknown settings: prot"),
        ({}, "port: [", "is not valid YAML"),
        ({}, "just words", "hub.yaml"),
        ({}, "- a\n- b", "hub.yaml"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path, environ, file, fragment):
    with pytest.raises(hub.BadSetting, match=fragment):
        read(tmp_path, {}, environ, file)


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
@pytest.mark.parametrize("name", ["tick_s", "due_s", "offline_after_s", "heartbeat_s"])
def test_an_interval_must_be_a_time_that_can_pass(tmp_path, name, value):
    with pytest.raises(hub.BadSetting, match=name):
        read(tmp_path, {name: value})


@pytest.mark.parametrize("value", ["-1", "65536"])
def test_a_port_must_be_one(tmp_path, value):
    with pytest.raises(hub.BadSetting, match="port"):
        read(tmp_path, {"port": value})


def test_the_log_level_must_be_one(tmp_path):
    with pytest.raises(hub.BadSetting, match="log_level"):
        read(tmp_path, {"log_level": "LOUD"})


@pytest.mark.parametrize("given", [{"ping_s": 60}, {"gone_s": "25"}, {"ping_s": 2, "gone_s": 1}])
def test_a_socket_is_never_given_up_before_it_was_asked(given):
    with pytest.raises(hub.BadSetting, match="gone_s must be more than ping_s"):
        hub.read_settings(given, {})


def test_a_wrong_flag_ends_the_hub_with_one_sentence(tmp_path):
    ended = hub_py("--data", str(tmp_path), "--port", "eighty")
    assert ended.returncode == 2
    assert ended.stderr.startswith("hub.py: port must be")
    assert "Traceback" not in ended.stderr


def test_help_names_every_setting():
    helped = hub_py("--help").stdout
    for name in DEFAULTS:
        assert f"--{name.replace('_', '-')}" in helped


def test_a_port_that_is_taken_is_said(tmp_path, hub):
    port = hub.url.rpartition(":")[2]
    ended = hub_py("--data", str(tmp_path / "other"), "--port", port)
    assert ended.returncode == 1
    assert "Is another hub running?" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_first_start_without_a_password_prints_a_link_that_works_once(tmp_path, hub):
    import requests

    ended = hub_py("--data", str(hub.data), "--login-link")
    assert ended.returncode == 0, ended.stderr
    token = ended.stdout.strip().partition("token=")[2]
    url = f"{hub.url}/api/v1/auth/login"
    first = requests.post(url, json={"login_token": token}, timeout=10)
    assert first.json()["user"]["username"] == "admin"
    again = requests.post(url, json={"login_token": token}, timeout=10)
    assert (again.status_code, again.json()["code"]) == (401, "unauthorised")


def test_the_hub_ends_cleanly_when_told_to(hub):
    assert hub.stop() == 0
    assert "Traceback" not in "".join(hub.lines)


# ── the data directory ────────────────────────────────────────────────────────────────────────


def test_two_hubs_never_use_one_data_directory(start_hub, tmp_path):
    first = start_hub()
    saved = tmp_path / "hub.tar"
    assert hub_py("--data", first.data, "--backup", saved).returncode == 0
    for flags in ((), ("--restore", saved)):
        refused = hub_py("--data", first.data, "--port", "0", *flags)
        assert refused.returncode == 1
        assert f"The hub is running (process {first.process.pid}, data" in refused.stderr
        assert "stop it first." in refused.stderr
    kept = first.api("POST", "projects", {"name": "kept"})["id"]
    first.kill()
    first.start()  # what is killed holds nothing
    assert kept in {p["id"] for p in first.api("GET", "projects")["projects"]}


def test_a_login_link_is_made_beside_a_running_hub_and_changes_nothing_else(start_hub):
    hub = start_hub()
    made = hub_py("--data", hub.data, "--port", hub.settings["port"], "--login-link")
    assert made.returncode == 0, made.stderr
    answer = hub.http.get(made.stdout.strip(), timeout=10)
    assert answer.ok and hub.url in made.stdout
    hub.stop()
    assert hub_py("--data", hub.data, "--login-link").returncode == 0


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_that_is_not_whole_is_refused(start_hub, size):
    """With an empty one anybody could make keys of sessions."""
    hub = start_hub()
    hub.stop()
    (hub.data / "secret").write_bytes(os.urandom(size))
    refused = hub_py("--data", hub.data, "--port", "0")
    assert refused.returncode == 1
    assert f"secret has {size} bytes in place of 32: put the one of a backup" in refused.stderr
    (hub.data / "secret").unlink()
    hub.start()
    assert (hub.data / "secret").stat().st_size == 32
    assert (hub.data / "secret").stat().st_mode & 0o777 == 0o600


def test_a_hub_killed_while_it_makes_its_secret_has_none_or_all_of_it(tmp_path):
    """Whatever is left of the file it is made in."""
    from auth import use_secret

    (tmp_path / "secret.new").write_bytes(b"half")
    use_secret(tmp_path / "secret")
    assert (tmp_path / "secret").stat().st_size == 32
    assert not (tmp_path / "secret.new").exists()
