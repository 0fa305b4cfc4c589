"""Profiles: each can be used, is documented, and starts its agent as it was told."""

import json
import shlex
import string
import sys

import pytest
import yaml

import agent
from conftest import ROOT

PROFILES = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "profiles").glob("*.yaml")}
CLAUDE = PROFILES["claude"]
PAGE = (ROOT / "docs" / "profiles.md").read_text()
AGENTS = sorted(name for name, profile in PROFILES.items() if profile["start"] == "agent")

PLACES = {
    "files",
    "prompt_file",
    "conversation",
    "model",
    "mode",
    "session_id",
    "directory",
    "hook",
}


FIELDS = {  # that a rule of each kind may have: a misspelt one would be passed over in silence
    "hooks": "event state by_tool by_type by_error settles backup request guards field ignore "
    "expected",
    "titles": "id state regex",
    "screens": "id state last below all any none says dialog",
}


def words_in(value):
    """All strings in a structure of a profile."""
    if isinstance(value, dict):
        return [w for pair in value.items() for part in pair for w in words_in(part)]
    if isinstance(value, list):
        return [w for item in value for w in words_in(item)]
    return [value] if isinstance(value, str) else []


def places_in(text):
    """The names in braces in it, without those that are other things in braces."""
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(text) if name}
    except ValueError:
        return set()
    return {name for name in found if name.isidentifier()}


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_can_be_used(name):
    profile = PROFILES[name]
    assert agent.check_profile(profile) is profile
    assert profile["name"] == name and profile["version"] >= 1
    events = {hook["event"] for hook in profile.get("hooks") or ()}
    assert set(profile.get("answers") or ()) <= events
    assert set(profile.get("unsafe_modes") or ()) <= set(profile.get("modes") or ())
    assert set(profile.get("keys") or ()) <= {"allow", "session", "always", "deny"}
    for kind, fields in FIELDS.items():
        for rule in profile.get(kind) or ():
            assert set(rule) <= set(fields.split()), rule


@pytest.mark.parametrize("name", AGENTS)
def test_a_profile_names_only_what_is_filled_in(name):
    profile = PROFILES[name]
    parts = [profile.get(key) for key in ("argv", "resume", "files", "env")]
    assert {place for word in words_in(parts) for place in places_in(word)} <= PLACES
    answers = words_in(profile.get("answers"))
    assert {place for word in answers for place in places_in(word)} <= {"reason", "answered"}


@pytest.mark.parametrize("name", AGENTS)
def test_each_hook_of_a_profile_is_asked_for_and_each_asked_for_is_known(name):
    profile = PROFILES[name]
    words = words_in([profile["argv"], profile.get("files")])
    events = {hook["event"] for hook in profile.get("hooks") or ()}
    told = {word.rpartition(" ")[2] for word in words if word.startswith("{hook} ")}
    told |= {w.split(".")[1].split("=")[0] for w in words if w.startswith("hooks.")}
    assert told == events


@pytest.mark.parametrize("name", AGENTS)
def test_a_profile_can_answer_each_permission_it_reads(name):
    profile = PROFILES[name]
    assert {rule["id"] for rule in profile["screens"]} >= {"spinner", "prompt"}
    for rule in profile["screens"]:
        assert rule["state"].startswith("blocked") == ("dialog" in rule)
    assert {"allow", "deny"} <= set(profile["keys"])


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_each_rule_of_a_screen_has_a_name_of_its_own(name):
    ids = [rule["id"] for rule in PROFILES[name].get("screens") or ()]
    assert len(ids) == len(set(ids))


def test_the_documented_example_is_a_profile_and_every_key_is_documented():
    example = yaml.safe_load(PAGE.split("```yaml\n")[1].split("```")[0])
    agent.check_profile(example)
    read = agent.read_screen(example, ["May I run make test?", "y/n"])
    assert (read["state"], read["dialog"]["subject"]) == ("blocked:permission", "make test")
    assert agent.keys_for(example, ["May I run make test?", "y/n"], "allow") == b"y\r"
    assert not [key for key in agent.PROFILE_KEYS if f"`{key}`" not in PAGE]
    assert not [place for place in PLACES if f"`{{{place}}}`" not in PAGE]
    fields = {field for kind in FIELDS.values() for field in kind.split()}
    assert not [field for field in sorted(fields) if field not in PAGE]
    assert not [state for state in agent.STATES if f"`{state}`" not in PAGE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, "unknown keys: colour"),
        ({"start": "magic"}, "`start` must be"),
        ({"argv": None}, "`argv` is missing"),
        ({"titles": [{"state": "dancing", "regex": "x"}]}, "unknown state 'dancing'"),
        ({"titles": [{"state": "idle", "regex": "("}]}, "no regular expression"),
        ({"titles": [{"state": "idle"}]}, "titles idle: regex is missing"),
        ({"hooks": [{"state": "idle"}]}, "hooks idle: event is missing"),
        ({"hooks": [{"event": "Stop", "by_type": {"x": "odd"}}]}, "unknown state 'odd'"),
        ({"hooks": [{"event": "Stop", "by_error": {"x": "odd"}}]}, "unknown state 'odd'"),
        ({"screens": [{"state": "idle"}]}, "screens idle: id is missing"),
        ({"screens": [{"id": "x", "state": "idle", "any": ["["]}]}, "screens x: '\\[' is no reg"),
        ({"screens": [{"id": "x", "state": "idle", "says": ["a"]}]}, "needs 1 group"),
        ({"screens": [{"id": "x", "state": "idle", "dialog": {"subject": ["a"]}}]}, "1 group"),
        ({"screens": [{"id": "x", "state": "idle", "dialog": {"option": "(a)"}}]}, "2 group"),
        ({"keys": {"allow": [{"label": "["}]}}, "no regular expression"),
        ({"keys": {"allow": [{"when": "x"}]}}, "keys allow: which key is it"),
        ({"draft": "^> .*"}, "draft: .* needs 1 group"),
        ({"detect": {"argv": ["x"], "version": "1"}}, "detect: '1' needs 1 group"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        agent.check_profile(CLAUDE | change)


def test_a_profile_that_cannot_be_used_is_left_out_and_the_others_stay(caplog):
    texts = {"good": "start: shell", "odd": "start: magic", "list": "[1]", "none": "", "bad": "{"}
    assert agent.parse_profiles(texts) == {"good": {"start": "shell"}}
    for name in ("odd", "list", "none", "bad"):
        assert f"profile {name} is left out" in caplog.text


def launch(tmp_path, profile="claude", **order):
    return agent.Launch(tmp_path / "s", {"session_id": "s-1"} | order, PROFILES[profile], tmp_path)


def test_an_agent_is_started_with_what_was_given(tmp_path):
    argv = launch(tmp_path).argv()
    assert argv[:2] == ["claude", "--settings"] and "--model" not in argv
    assert argv[-2] == "--session-id"
    argv = launch(tmp_path, model="opus", mode="plan", prompt="Do it").argv()
    assert argv[argv.index("--model") + 1] == "opus"
    assert argv[argv.index("--permission-mode") + 1] == "plan"
    assert str(tmp_path / "s" / "files" / "prompt.md") in argv[-1]
    argv = launch(tmp_path, resume="c-1").argv()
    assert argv[argv.index("--resume") + 1] == "c-1"


def test_a_mode_or_resumption_it_does_not_know_is_refused(tmp_path):
    with pytest.raises(agent.AgentError, match="has no mode dance"):
        launch(tmp_path, mode="dance")
    with pytest.raises(agent.AgentError, match="cannot take up a conversation again"):
        launch(tmp_path, profile="gemini", resume="c-1").argv()


@pytest.mark.parametrize("name", AGENTS)
def test_its_files_are_private_and_filled_in(tmp_path, name):
    made = launch(tmp_path / "with space", profile=name, prompt="Do {spec} it", model="m")
    made.files.parent.mkdir(parents=True)
    made.write()
    for path in (p for p in made.files.parent.rglob("*") if p.is_file()):
        assert path.stat().st_mode & 0o077 == 0
        if path.suffix == ".json":
            json.loads(path.read_text())
        assert not [place for place in PLACES if f"{{{place}}}" in path.read_text()]
    assert (made.files / "prompt.md").read_text() == "Do {spec} it"
    words = " ".join([*made.argv(), *made.env.values()])
    assert not [place for place in PLACES if f"{{{place}}}" in words]


def test_its_hooks_run_our_client_for_this_start_of_this_session(tmp_path):
    made = launch(tmp_path / "with space")
    made.files.parent.mkdir(parents=True)
    made.write()
    told = json.loads((made.files / "settings.json").read_text())["hooks"]
    words = shlex.split(told["Stop"][0]["hooks"][0]["command"])
    assert words[0] == sys.executable and words[-1] == "Stop"
    assert words[-3:-1] == [str(made.files.parent), made.id]
    kept = json.loads((made.files.parent / "hooks.json").read_text())
    assert (kept["launch"], kept["agent"]) == (made.id, "claude")
    assert launch(tmp_path).id != made.id


def test_what_is_in_braces_and_has_no_meaning_stays(tmp_path):
    made = launch(tmp_path, model="{mode}")
    assert made.fill("{model} {spec} {} {{mode}}") == "{mode} {spec} {} {}"


def test_a_session_without_an_agent_gets_no_files(tmp_path):
    made = launch(tmp_path, profile="command")
    made.write()
    assert made.conversation is None and not made.files.exists()
