"""The agent's small parts: no process, no tmux, no network."""

import base64
import contextlib
import json
import os
import queue
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
import yaml

import agent
from agent import AgentError, HubError, HubUnreachable, Logs, Outgoing, Session, Store
from conftest import wait_until


def token_for(url):
    return f"orcreg_{base64.urlsafe_b64encode(url.encode()).decode().rstrip('=')}.s3cret-_"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


def reopened(store, tmp_path):
    """What another process finds after this one was killed: nothing is closed in order."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import agent; from pathlib import Path;"
        "s = agent.Store(Path(sys.argv[2]));"
        "print(json.dumps([s.get('spool_id'), s.spooled_after(0), s.unfinished(), s.spool_first(),"
        " [vars(x) for x in s.sessions()]]))"
    )
    arguments = [sys.executable, "-c", code, agent.__file__.rsplit("/", 1)[0]]
    answer = subprocess.run(
        [*arguments, str(tmp_path / "state.db")], capture_output=True, text=True, check=True
    )
    return json.loads(answer.stdout)


# ---------------------------------------------------------------------------- tokens and config


@pytest.mark.parametrize(
    "url, want",
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://hub.example.org/", "https://hub.example.org"),
        ("https://hub.example.org/prefix", "https://hub.example.org/prefix"),
    ],
)
def test_a_token_holds_the_address_of_its_hub(url, want):
    assert agent.hub_url_of(token_for(url)) == want


@pytest.mark.parametrize(
    "token",
    [
        "",
        "orcreg_",
        "orcreg_abc",
        "orcreg_!!!.secret",
        "orcreg_YQ.secret",
        "orcreg_a.secret",
        "orcreg_/w.secret",
        token_for("http://h").replace("orcreg_", "orc_"),
        token_for("file:///etc/passwd"),
        token_for("http://"),
        token_for("http://h") + " ",
        token_for("http://h").removesuffix(".s3cret-_"),
    ],
)
def test_a_malformed_token_is_one_sentence(token):
    with pytest.raises(AgentError, match="not a registration token"):
        agent.hub_url_of(token)


def test_the_config_is_private_and_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "config.yaml"
    agent.save_config(path, {"api_key": "orc_1"})
    agent.save_config(path, {"api_key": "orc_2", "name": "grün"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert agent.load_config(path) == {"api_key": "orc_2", "name": "grün"}
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    agent.save_config(path, {"a": 1})

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent.os, "fsync", no_space)
    with pytest.raises(OSError):
        agent.save_config(path, {"a": 2})
    assert agent.load_config(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_new_config_survives_a_loss_of_power(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    agent.save_config(tmp_path / "new" / "config.yaml", {"api_key": "orc_1"})
    file, *directories = synced
    assert os.path.dirname(file) == str(tmp_path / "new")
    assert directories == [str(tmp_path / "new"), str(tmp_path)]


@pytest.mark.parametrize("text", ["a: [", "- a list", "just text", "\x00"])
def test_a_broken_config_is_one_sentence(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(AgentError, match="config file"):
        agent.load_config(path)


def test_settings_come_from_the_config_and_are_checked():
    assert agent.settings_of({}).monitor_s == 0.2
    assert agent.settings_of({"close_grace_s": 0.5}).close_grace_s == 0.5
    for wrong in ("soon", True, -1, None):
        with pytest.raises(AgentError, match="screen_s"):
            agent.settings_of({"screen_s": wrong})


def test_repos_are_absolute_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert agent.parse_repos(["shop=a=b"]) == {
        "shop": {"path": str(tmp_path / "a=b"), "branch": None}
    }
    for wrong in ("shop", "=x", "shop="):
        with pytest.raises(AgentError, match="--repo name=path"):
            agent.parse_repos([wrong])
    with pytest.raises(AgentError, match="no directory"):
        agent.parse_repos(["shop=missing"])


def test_the_branch_of_a_git_repo_is_seen(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    assert agent.parse_repos([f"shop={tmp_path}"])["shop"]["branch"] == "trunk"


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error, again",
    [
        (HubUnreachable("no route"), True),
        (HubUnreachable("a proxy's page", 200), True),
        (HubUnreachable("a proxy's page", 404), True),
        *[(HubError("x", status), True) for status in (408, 429, 500, 502, 503, 504)],
        *[(HubError("x", status), False) for status in (300, 400, 401, 403, 404, 409, 413, 422)],
    ],
)
def test_what_is_worth_repeating(error, again):
    assert agent.retryable(error) is again


def test_pauses_grow_to_the_limit_and_start_again():
    backoff = agent.Backoff(30)
    for longest in (1, 2, 4, 8, 16, 30, 30):
        assert longest / 2 <= backoff.pause() <= longest
    backoff.reset()
    assert backoff.pause() <= 1


# ---------------------------------------------------------------------------- text


def test_what_is_shown_loses_what_could_act_as_keys_and_is_bounded():
    assert agent.printable("a\x1b[31m\nb\x07\x9bc\u202e") == "a [31m b c"
    assert agent.printable("x" * 50, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("kind", agent.NOTICES)
def test_a_typed_notice_is_fixed_words_and_an_id_that_no_shell_can_be_misled_by(kind):
    task_id = "0b7e4a52-4c1d-4f0e-9d3a-6a1f0e9c7b21"
    frame = {"type": kind, "task_id": task_id, "intervention_id": task_id}
    line = agent.notice(frame)
    assert task_id in line
    assert set(line) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .:,-")
    with pytest.raises(AgentError, match="not the id of a"):
        agent.notice(dict.fromkeys(frame, "x; touch canary") | {"type": kind})


def test_a_result_that_json_cannot_carry_is_its_own_summary(tmp_path):
    for text in ('{"v": NaN}', '{"v": 1e999}', "[" * 100_000, "plain words"):
        (tmp_path / "result.json").write_text(text)
        assert agent.read_result(tmp_path / "result.json") == {"summary": text}


def test_a_result_that_grows_beyond_the_limit_as_json_is_refused(tmp_path):
    (tmp_path / "result.json").write_bytes(b"\xff" * (agent.RESULT_BYTES // 3))
    with pytest.raises(AgentError, match="larger than"):
        agent.read_result(tmp_path / "result.json")


def test_declared_lists_must_be_words():
    for wrong in ("rust", [3.11], {"rust": 1}):
        with pytest.raises(AgentError, match="`languages` in the config file must be a list"):
            agent.declared({"languages": wrong})


def test_typed_text_keeps_its_lines_and_letters_and_nothing_that_acts_as_a_key():
    assert agent.typeable("a\r\nb\tc\rd ü 🙂 \u202b") == "a\nb\tc\nd ü 🙂 \u202b"
    for wrong in ("\x1b[201~", "\x03", "\x7f", "\x9b", "\x00"):
        with pytest.raises(AgentError, match="control characters"):
            agent.typeable(f"a{wrong}b")


def test_the_last_lines_are_plain_text():
    data = b"\x1b]0;title\x07old\r\n" + b"10%\r50%\r100%\r\n" + b"\x1b[1;31mbad \xff\x1b[0m\r\n\r\n"
    assert agent.last_lines(data) == "old\n100%\nbad �"
    assert agent.last_lines("\n".join(map(str, range(50))).encode(), 2) == "48\n49"


@pytest.mark.parametrize(
    "text, result",
    [
        ('{"contracts": {"a": {}}}', {"contracts": {"a": {}}}),
        ("[1]", [1]),
        ("all good\n", {"summary": "all good"}),
        ("", {"summary": ""}),
        (None, {"summary": "exit 0"}),
    ],
)
def test_what_a_result_file_says(tmp_path, text, result):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert agent.read_result(path) == result


def test_a_result_that_cannot_be_taken_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.mkdir()
    with pytest.raises(AgentError, match="cannot be read"):
        agent.read_result(path)
    monkeypatch.setattr(agent, "RESULT_BYTES", 3)
    (tmp_path / "large").write_text("1234")
    with pytest.raises(AgentError, match="larger than"):
        agent.read_result(tmp_path / "large")


@pytest.mark.parametrize(
    "status, death, code",
    [("0", "", 0), ("3", "", 3), ("", "9", 137), ("", "TERM", 143), ("", "", None)],
)
def test_exit_codes_are_those_of_a_shell(status, death, code):
    assert agent.exit_code_of(status, death) == code


def test_only_a_uuid_names_a_session():
    good = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
    assert agent.valid_session_id(good) == good
    for wrong in ("../x", "", None, good.upper(), f"{{{good}}}", good.replace("-", "")):
        with pytest.raises(AgentError, match="not the id"):
            agent.valid_session_id(wrong)


# ---------------------------------------------------------------------------- programs


def test_what_a_session_runs():
    command = yaml.safe_load(open_profile("command"))
    assert agent.program_of({"command": ["a", "b c"]}, None, command) == ["a", "b c"]
    assert agent.program_of({}, {"command": ["a"]}, command) == ["a"]
    assert agent.program_of({}, None, {"start": "shell"})[1] == "-l"
    for order, profile in [
        ({"profile": "command"}, command),
        ({"profile": "command", "command": "rm -rf"}, command),
        ({"profile": "claude", "command": ["a"]}, {"start": "something new"}),
    ]:
        with pytest.raises(AgentError):
            agent.program_of(order, None, profile)


def open_profile(name):
    with open(f"{agent.__file__.rsplit('/', 1)[0]}/profiles/{name}.yaml") as file:
        return file.read()


def test_a_profile_that_cannot_be_read_does_not_take_the_others_along():
    profiles = agent.parse_profiles(
        {"a": "start: shell", "b": "start: [", "c": "text", "d": "start: x"}
    )
    assert profiles == {"a": {"start": "shell"}}


# ---------------------------------------------------------------------------- the store


def test_the_spool_is_numbered_kept_and_never_numbered_again(store, tmp_path):
    store.spool({"type": "a"}, {"type": "b"})
    assert store.spooled_after(0) == [{"type": "a", "spool": 1}, {"type": "b", "spool": 2}]
    store.trim_spool(2)
    assert store.spool_first() == 3
    store.spool({"type": "c"})
    spool_id, frames, _, first, _ = reopened(store, tmp_path)
    assert (spool_id, frames, first) == (store.get("spool_id"), [{"type": "c", "spool": 3}], 3)
    assert stat.S_IMODE((tmp_path / "state.db").stat().st_mode) == 0o600


def test_a_command_is_new_once_an_epoch_and_unfinished_until_done(store, tmp_path):
    frames = [{"type": "session_start", "id": n, "session_key": "orcs_x"} for n in (5, 6)]
    assert store.receive("e1", frames) == frames
    assert store.receive("e1", frames) == []
    assert store.receive("e2", frames[:1]) == frames[:1]
    store.done("e1", 5)
    store.begin("e1", 6)
    assert reopened(store, tmp_path)[2] == [["e1", frames[1], True], ["e2", frames[0], False]]
    assert store.receive("e1", frames) == []
    store.done("e1", 6)
    store.done("e2", 5)
    assert store._rows("SELECT frame FROM journal WHERE frame IS NOT NULL") == []


def test_the_journal_keeps_the_last_commands_and_all_unfinished(store, monkeypatch):
    monkeypatch.setattr(agent, "JOURNAL_KEPT", 10)
    store.receive("e", [{"type": "x", "id": 0}])
    for n in range(1, 40):
        store.receive("e", [{"type": "x", "id": n}])
        store.done("e", n)
    store.receive("e", [{"type": "x", "id": 99}])
    kept = [row[0] for row in store._rows("SELECT id FROM journal ORDER BY n")]
    assert kept == [0, *range(31, 40), 99]


def test_a_session_and_what_is_said_of_it_are_written_together(store, tmp_path):
    session = Session("s1", "orc-s1", state="ended", exit_code=0, log_end=7)
    store.save(session, {"type": "task_report"}, {"type": "session_closed"})
    _, frames, _, _, sessions = reopened(store, tmp_path)
    assert [frame["type"] for frame in frames] == ["task_report", "session_closed"]
    assert sessions[0]["closed_spool"] == 2 and Session(**sessions[0]) == session
    with pytest.raises(TypeError):
        store.save(session, {"type": "a"}, {"type": "b", "bad": object()})
    assert len(store.spooled_after(0)) == 2
    store.forget("s1")
    assert store.sessions() == []


@contextlib.contextmanager
def refusing(store):
    """The store takes nothing, as when the disk is full."""
    store._rows("PRAGMA query_only = 1")
    yield
    store._rows("PRAGMA query_only = 0")


def test_what_the_store_refuses_changes_nothing_in_memory(store):
    session = Session("s1", "orc-s1", state="live")
    with refusing(store), pytest.raises(sqlite3.OperationalError):
        store.save(session, {"type": "session_closed"}, state="ended")
    assert session == Session("s1", "orc-s1", state="live")
    store.save(session, {"type": "session_closed"}, state="ended")
    assert session == Session("s1", "orc-s1", state="ended", closed_spool=1)
    assert store.sessions() == [session]


def test_what_was_refused_is_written_in_order_when_it_can_be(store):
    with refusing(store):
        for n in (1, 2, 1):  # said twice it is one
            store.owed.do(store.spool, {"type": str(n)})
        store.owed.settle(100)
    store.owed.do(store.spool, {"type": "3"})
    store.owed.settle(100.5)
    assert store.spooled_after(0) == []
    store.owed.settle(101)
    assert [frame["type"] for frame in store.spooled_after(0)] == ["1", "2", "3"]
    store.owed.do(store.spool, {"type": "4"})
    assert len(store.spooled_after(0)) == 4


def test_what_is_put_off_again_while_it_is_written_is_written_once_more(store):
    """What was to be written has changed since."""
    written, value = [], ["old"]

    def write():
        written.append(value[0])
        if value[0] == "old":
            value[0] = "new"
            store.owed.do(write)

    with refusing(store):
        store.owed.do(store.spool, {"type": "before"})
    store.owed.do(write)
    store.owed.settle(1000)
    assert written == ["old", "new"]


def test_rows_of_a_later_version_are_read(store):
    row = {**vars(Session("s1", "orc-s1")), "mood": "good"}
    with store._transaction() as db:
        db.execute("INSERT INTO session VALUES ('s1', ?)", (json.dumps(row),))
    assert store.sessions() == [Session("s1", "orc-s1")]


def test_a_lane_goes_on_after_a_frame_that_failed():
    done, full = queue.SimpleQueue(), threading.Event()

    def carry_out(frame):
        if frame["type"] == "refused":
            full.set()
            raise sqlite3.OperationalError("database or disk is full")
        done.put(frame["type"])

    lanes = agent.Lanes(carry_out)
    for kind in ("refused", "key"):
        lanes.put({"type": kind, "session_id": "s"})
    assert full.wait(10) and done.get(timeout=10) == "key"
    wait_until(lambda: lanes.idle({"session_id": "s"}))


# ---------------------------------------------------------------------------- rules


ENGINE = "def judge(rules, request): return {'decision': 'deny', 'because': rules}"


def test_rules_that_cannot_be_used_leave_the_last_ones(store, tmp_path):
    rules = agent.Rules(store, tmp_path)
    good = {"engine": ENGINE, "rules": "good", "origin": {}, "etag": "1"}
    rules.take(good)
    rules.take({**good, "engine": "def (", "etag": "2"})
    assert (rules.etag, rules.judge({})["because"]) == ("1", "good")
    assert agent.Rules(store, tmp_path).judge({})["because"] == "good"


def test_kept_rules_of_another_python_are_asked_for_again(store, tmp_path):
    store.put("rules", {"engine": "def (", "rules": [], "origin": {}, "etag": "1"})
    rules = agent.Rules(store, tmp_path)
    assert rules.etag is None and rules.judge({})["decision"] == "ask"


def test_rules_are_in_use_before_the_disk_takes_them(store, tmp_path):
    rules = agent.Rules(store, tmp_path)
    with refusing(store):
        rules.take({"engine": ENGINE, "rules": "new", "origin": {}, "etag": "1"})
        assert rules.judge({})["because"] == "new"
    store.owed.settle(100)
    assert store.get("rules")["etag"] == "1"


# ---------------------------------------------------------------------------- what is sent when


@pytest.fixture
def logs():
    return Logs(agent.settings_of({}))


def test_logs_wait_for_the_hub_and_go_on_from_what_it_has(logs, tmp_path):
    path = tmp_path / "output.log"
    path.write_bytes(b"0123456789")
    logs.follow("s", path)
    assert logs.take(100) == []
    logs.acknowledge("s", 4)
    (block,) = logs.take(100)
    assert (block["offset"], base64.b64decode(block["data"])) == (4, b"456789")
    assert not logs.due(101)


def test_a_flood_is_cut_into_blocks_paced_and_bounded(logs, tmp_path):
    path = tmp_path / "output.log"
    path.write_bytes(bytes(3 * agent.WINDOW_BYTES))
    logs.follow("s", path, acked=0)
    blocks = logs.take(100)
    sizes = [len(base64.b64decode(block["data"])) for block in blocks]
    assert max(sizes) == agent.BLOCK_BYTES and sum(sizes) == agent.WINDOW_BYTES
    logs.acknowledge("s", agent.BLOCK_BYTES)
    assert not logs.due(100.05)
    assert [block["offset"] for block in logs.take(100.2)] == [agent.WINDOW_BYTES]


def test_unacknowledged_output_is_sent_again(logs, tmp_path):
    path = tmp_path / "output.log"
    path.write_bytes(b"abc")
    logs.follow("s", path, acked=0)
    assert logs.take(100) and not logs.take(105)
    assert [block["offset"] for block in logs.take(110.5)] == [0]
    logs.acknowledge("s", 3)
    assert not logs.due(130)
    logs.rewind()
    logs.acknowledge("s", 1)
    assert [block["offset"] for block in logs.take(140)] == [1]


def test_what_waits_is_taken_in_order_and_again_after_a_new_start(store, logs):
    outgoing = Outgoing(store, logs, agent.settings_of({}))
    outgoing.say({"type": "session_typed"})
    outgoing.spool({"type": "session_started"})
    outgoing.acknowledge([7])
    assert outgoing.wake.is_set()
    kinds = [frame["type"] for frame in outgoing.take(100)]
    assert kinds == ["ack", "session_started", "session_typed"]
    assert outgoing.take(100) == [] and not outgoing.due(105)
    assert outgoing.due(111)
    assert [frame["spool"] for frame in outgoing.take(111)] == [1]
    outgoing.rewind()
    assert [frame["spool"] for frame in outgoing.take(112)] == [1]
    store.trim_spool(1)
    assert not outgoing.due(200) and outgoing.take(200) == []


# ── scripts of ours ───────────────────────────────────────────────────────────────────────────


def test_a_script_is_compiled_once_and_anew_when_it_changes(tmp_path):
    script, kept = tmp_path / "it's one.py", tmp_path / "compiled"
    kept.mkdir()
    agent.install_starter(kept)
    command = [*agent.run_compiled(script, kept, "-I", "-S"), "a", "--b"]

    def run(text: str) -> str:
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    says = "import sys; print(__name__, __file__ == {0!r} == sys.argv[0], *sys.argv[1:])"
    text = says.format(str(script))
    assert run(text) == "__main__ True a --b\n"
    [compiled] = kept.rglob("*.pyc")
    assert stat.S_IMODE(compiled.stat().st_mode) == 0o600
    made = compiled.stat().st_mtime_ns
    assert run(text) == "__main__ True a --b\n"
    assert compiled.stat().st_mtime_ns == made
    assert run(f"{text}; print('changed')").endswith("changed\n")
    compiled.write_bytes(b"nonsense")
    assert run(f"{text}; print('changed')").endswith("changed\n")


def test_a_script_runs_where_nothing_can_be_kept(tmp_path):
    script, kept = tmp_path / "one.py", tmp_path / "compiled"
    script.write_text("raise SystemExit(7)")
    bare = agent.run_compiled(script, kept)
    assert bare == [sys.executable, str(script)]  # there was no room for the starter
    kept.mkdir()
    agent.install_starter(kept)
    (kept / script.parent.relative_to("/").parts[0]).touch()  # in the way of what would be kept
    for command in (bare, agent.run_compiled(script, kept)):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (7, "")
