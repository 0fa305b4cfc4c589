"""What a coding agent is doing: screens of each agent and version, and the rules of the reducer."""

import copy
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import agent
from conftest import ROOT

SCREENS = ROOT / "tests" / "fixtures" / "screens"
HOOKS = ROOT / "tests" / "fixtures" / "hooks"  # turns: each hook's payload, and what it is then
PROFILES = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / "profiles").glob("*.yaml")}
CLAUDE = PROFILES["claude"]
KEYS = {"<esc>": "\x1b", "<cr>": "\r"}


def screen(path) -> tuple[dict, list[str]]:
    """(what the first lines want of it, the lines of the screen)."""
    lines, wanted = path.read_text().split("\n"), {}
    while lines[0].startswith("# "):
        name, _, value = lines.pop(0)[2:].partition(": ")
        wanted[name] = value
    return wanted, lines


def shown(name: str) -> list[str]:
    return screen(SCREENS / f"{name}.txt")[1]


FILES = sorted(SCREENS.glob("*/*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_screen_is_read_as_what_it_shows(path):
    profile = PROFILES[path.parent.name]
    wanted, lines = screen(path)
    state = path.stem.split("-")[1].replace("blocked_", "blocked:")
    read = agent.read_screen(profile, lines)
    assert read and read["state"] == state, read
    dialog = read["dialog"] or {}
    for name in ("tool", "subject"):
        if name in wanted:
            assert dialog[name] == wanted[name]
    for answer in ("allow", "session", "always", "deny"):
        if keys := wanted.get(f"keys {answer}"):
            for sign, key in KEYS.items():
                keys = keys.replace(sign, key)
            assert agent.keys_for(profile, lines, answer) == keys.encode()


def test_there_is_a_screen_for_each_agent_with_a_dialog():
    assert len(FILES) >= 30
    for name in ("claude", "codex", "gemini", "aider"):
        states = {p.stem.split("-")[1] for p in FILES if p.parent.name == name}
        assert {"idle", "working", "blocked_permission"} <= states


def test_a_dialog_is_known_again_whatever_moves_on_it():
    lines = shown("claude/2.1.220-blocked_permission-bash")
    first = agent.read_screen(CLAUDE, lines)["dialog"]["fingerprint"]
    moved = [line.replace(" ❯ 1.", "   1.").replace("   2.", " ❯ 2.") for line in lines]
    assert agent.read_screen(CLAUDE, ["more above", *moved])["dialog"]["fingerprint"] == first
    other = [line.replace("origin main", "origin next") for line in lines]
    assert agent.read_screen(CLAUDE, other)["dialog"]["fingerprint"] != first


def test_no_key_is_pressed_where_no_dialog_is():
    for name in ("claude/2.1.220-idle", "claude/2.1.220-working"):
        assert agent.keys_for(CLAUDE, shown(name), "allow") is None
    edit = shown("claude/2.1.220-blocked_permission-edit")
    assert agent.keys_for(CLAUDE, edit, "always") is None  # it does not offer that
    codex = PROFILES["codex"]
    lasting = shown("codex/0.140.0-blocked_permission")
    assert agent.keys_for(codex, lasting, "session") is None  # its own rules would keep it
    for answer in ("session", "always"):
        assert agent.keys_for(codex, shown("codex/0.140.0-blocked_trust"), answer) is None


# ── the reducer ───────────────────────────────────────────────────────────────────────────────


class Mind:
    """A session's state, signal by signal."""

    def __init__(self, profile="claude"):
        self.profile = PROFILES.get(profile) or {}
        self.now = 1000.0
        self.state = agent.start_state(self.now)

    def take(self, kind: str, **said) -> str:
        self.now += 0.1
        before = copy.deepcopy(self.state)
        after = agent.reduce(self.profile, self.state, {"kind": kind, "at": self.now, **said})
        assert self.state == before, "a state was changed"
        self.state = json.loads(json.dumps(after))
        assert self.state == after
        return self.state["activity"]

    def hook(self, event: str, **payload) -> str:
        return self.take("hook", event=event, payload=payload)

    def screen(self, name: str, looks: int = 2) -> str:
        for _ in range(looks):
            self.take("screen", lines=shown(name))
        return self.state["activity"]

    def asks(self, tool="Bash", use="toolu_1") -> str:
        self.hook("UserPromptSubmit", prompt="x")
        return self.hook("PermissionRequest", tool_name=tool, tool_use_id=use)


@pytest.fixture
def mind():
    return Mind()


def test_a_turn_from_prompt_to_stop(mind):
    assert mind.state["activity"] == "no_signal"
    assert mind.hook("SessionStart", source="startup") == "no_signal"
    assert mind.hook("UserPromptSubmit", prompt="x") == "working"
    assert mind.hook("PreToolUse", tool_name="Bash") == "working"
    assert mind.state["reason"] == "uses Bash"
    assert mind.hook("PostToolUse", tool_name="Bash") == "working"
    assert mind.hook("Stop") == "idle"
    assert (mind.state["reason"], mind.state["signal"]) == ("its turn is over", "hook Stop")


TURNS = sorted(HOOKS.glob("*/*.json"))


@pytest.mark.parametrize("path", TURNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_turn_is_followed_hook_by_hook(path):
    mind = Mind(path.parent.name)
    for n, step in enumerate(json.loads(path.read_text())):
        event = step["payload"]["hook_event_name"]
        assert agent.hook_of(mind.profile, event), f"the profile does not know {event}"
        assert mind.hook(event, **step["payload"]) == step["then"], f"step {n}, {event}"


def test_there_are_turns_of_each_agent_with_hooks():
    with_hooks = {name for name, profile in PROFILES.items() if profile.get("hooks")}
    assert {path.parent.name for path in TURNS} == with_hooks
    for name in with_hooks:
        steps = [s for p in TURNS if p.parent.name == name for s in json.loads(p.read_text())]
        assert {h["event"] for h in PROFILES[name]["hooks"]} == {
            s["payload"]["hook_event_name"] for s in steps
        }


@pytest.mark.parametrize(
    ("tool", "state"),
    [
        ("Bash", "blocked:permission"),
        ("AskUserQuestion", "blocked:question"),
        ("ExitPlanMode", "blocked:plan"),
    ],
)
def test_what_it_is_blocked_by(mind, tool, state):
    assert mind.asks(tool) == state


@pytest.mark.parametrize(
    ("event", "payload", "state"),
    [
        ("PostToolUse", {"tool_name": "Bash", "tool_use_id": "toolu_1"}, "working"),
        ("PostToolUseFailure", {"tool_name": "Bash", "tool_use_id": "toolu_1"}, "working"),
        ("PostToolUse", {"tool_name": "Bash"}, "working"),
        ("UserPromptSubmit", {"prompt": "y"}, "working"),
        ("Stop", {}, "idle"),
        ("StopFailure", {"error": "server_error"}, "error"),
        ("StopFailure", {"error": "rate_limit"}, "quota"),
    ],
)
def test_what_ends_it(mind, event, payload, state):
    mind.asks()
    assert mind.hook(event, **payload) == state
    assert mind.state["blocked"] is None


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        ("PostToolUse", {"tool_name": "Bash", "tool_use_id": "toolu_2"}),
        ("PostToolUse", {"tool_name": "Read"}),
        ("PostToolUse", {"tool_name": "Bash", "agent_id": "sub"}),
        ("PreToolUse", {"tool_name": "Read"}),
        ("PreToolUse", {"tool_name": "Bash", "agent_id": "sub"}),
        ("SessionStart", {"source": "startup"}),
        ("Notification", {"notification_type": "idle_prompt"}),
        ("Notification", {"notification_type": "agent_needs_input"}),
        ("SessionEnd", {"reason": "clear"}),
    ],
)
def test_what_does_not(mind, event, payload):
    mind.asks()
    assert mind.hook(event, **payload) == "blocked:permission"


def test_our_own_answer_ends_it(mind):
    mind.asks()
    assert mind.take("decided", tool_use_id="toolu_1") == "working"


def test_a_key_at_the_terminal_may_have_been_the_answer(mind):
    mind.asks()
    assert mind.take("typed", by="hub") == "blocked:permission"
    assert mind.take("typed", by="terminal") == "working"
    name = "claude/2.1.220-blocked_permission-bash"
    assert mind.screen(name, looks=1) == "working"
    assert mind.screen(name, looks=1) == "blocked:permission"  # it was not


@pytest.mark.parametrize(
    "kind", ["permission_prompt", "agent_needs_input", "elicitation_dialog", "unheard_of"]
)
def test_a_notice_after_the_turn_raises_nothing(mind, kind):
    mind.hook("UserPromptSubmit", prompt="x")
    mind.hook("Stop")
    assert mind.hook("Notification", notification_type=kind) == "idle"


def test_a_notice_alone_is_better_than_nothing(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    said = mind.hook("Notification", notification_type="permission_prompt", message="Bash?")
    assert (said, mind.state["reason"]) == ("blocked:permission", "Bash?")


def test_a_late_start_or_tool_resets_nothing(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    assert mind.hook("SessionStart", source="startup") == "working"
    mind.hook("Stop")
    assert mind.hook("PostToolUse", tool_name="Bash") == "idle"
    for reason in ("clear", "resume"):
        mind.hook("UserPromptSubmit", prompt="x")
        assert mind.hook("SessionEnd", reason=reason) == "working"
    assert mind.hook("SessionEnd", reason="logout") == "idle"


def test_a_turn_that_leaves_work_behind_says_so(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    assert mind.hook("Stop", background_tasks=[{}], session_crons=[{}]) == "idle"
    assert mind.state["reason"] == "its turn is over, 2 in the background go on"


def test_a_stop_without_a_hook_is_seen_after_a_while(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    assert mind.screen("claude/2.1.220-idle") == "working"
    mind.now += agent.SILENT_STOP_S
    assert mind.screen("claude/2.1.220-working") == "working"
    assert mind.screen("claude/2.1.220-idle", looks=1) == "working"
    assert mind.screen("claude/2.1.220-idle", looks=1) == "idle"


def test_a_hook_just_heard_is_no_silent_stop(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    mind.now += agent.SILENT_STOP_S + 1
    mind.hook("PreToolUse", tool_name="Bash")
    assert mind.screen("claude/2.1.220-idle") == "working"


def test_a_look_from_before_the_dialog_does_not_end_it(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    mind.screen("claude/2.1.220-working", looks=5)
    mind.hook("PermissionRequest", tool_name="Bash", tool_use_id="toolu_1")
    assert mind.screen("claude/2.1.220-working", looks=1) == "blocked:permission"


def test_a_look_from_before_the_answer_does_not_ask_again(mind):
    mind.asks()
    name = "claude/2.1.220-blocked_permission-bash"
    mind.screen(name, looks=5)
    assert mind.take("decided", tool_use_id="toolu_1") == "working"
    assert mind.screen(name, looks=1) == "working"
    assert mind.screen(name, looks=1) == "blocked:permission"  # the answer did not arrive


def test_the_answer_to_another_dialog_ends_nothing(mind):
    mind.asks()
    assert mind.take("decided", tool_use_id="toolu_2") == "blocked:permission"
    assert mind.take("decided", tool_use_id=None) == "working"  # given by key


def test_a_dialog_of_a_sub_agent_ends_with_its_own_tool(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    used = {"tool_name": "Bash", "tool_use_id": "toolu_1"}
    mind.hook("PermissionRequest", agent_id="sub", **used)
    assert mind.hook("PostToolUse", tool_name="Bash") == "blocked:permission"
    assert mind.hook("PostToolUse", agent_id="sub", **used) == "working"


def test_what_goes_on_in_the_background_begins_no_turn(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    mind.hook("Stop", background_tasks=[{}])
    assert mind.hook("PreToolUse", tool_name="Bash", agent_id="sub") == "idle"
    assert mind.hook("PreToolUse", tool_name="Bash") == "working"  # woken by what has ended


@pytest.mark.parametrize("event", ["SessionStart", "Unknown"])
def test_a_hook_that_tells_no_activity_silences_nobody(mind, event):
    mind.hook(event, source="startup")
    assert mind.screen("claude/2.1.220-idle") == "idle"
    assert mind.take("title", title="⠂ x") == "working"


def test_a_dialog_no_hook_has_told_of(mind):
    mind.hook("UserPromptSubmit", prompt="x")
    name = "claude/2.1.220-blocked_trust"
    assert mind.screen(name, looks=1) == "working"
    assert mind.screen(name, looks=1) == "blocked:trust"
    assert mind.screen("claude/2.1.220-working") == "working"


def test_a_dialog_that_is_gone_was_answered(mind):
    mind.asks()
    assert mind.screen("claude/2.1.220-working", looks=1) == "blocked:permission"
    assert mind.screen("claude/2.1.220-working", looks=1) == "working"
    mind.asks(use="toolu_2")
    assert mind.screen("claude/2.1.220-idle") == "idle"


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("claude/2.1.220-quota", "quota", "reset at 3pm"),
        ("claude/2.1.220-error", "error", "API Error: 401"),
        ("codex/0.140.0-quota", "quota", "try again at 3:05 PM"),
        ("gemini/0.61.0-quota", "quota", "resets at 3:40 PM"),
        ("aider/0.86.1-quota", "quota", "try again in 20s"),
        ("aider/0.86.1-error", "error", "AuthenticationError"),
    ],
)
def test_limits_and_errors_are_read_with_their_words(name, state, reason):
    mind = Mind(name.partition("/")[0])
    assert mind.screen(name) == state
    assert reason in mind.state["reason"]


def test_a_failed_turn_says_why_in_the_agents_words(mind):
    mind.hook("StopFailure", error="rate_limit", last_assistant_message="resets at 3pm")
    assert mind.state["reason"] == "resets at 3pm"
    mind.hook("StopFailure", error="server_error", error_details="500 Internal")
    assert mind.state["reason"] == "500 Internal"
    mind.hook("StopFailure")
    assert mind.state["reason"] == "it has failed"


@pytest.mark.parametrize("banner", ["quota", "error"])
def test_a_limit_read_from_the_screen_is_over_when_the_screen_shows_work(mind, banner):
    mind.hook("UserPromptSubmit", prompt="x")
    assert mind.screen(f"claude/2.1.220-{banner}") == banner
    assert mind.screen("claude/2.1.220-working", looks=1) == banner
    assert mind.screen("claude/2.1.220-working", looks=1) == "working"


def test_a_limit_a_hook_has_told_of_stays_until_the_next_prompt(mind):
    mind.hook("StopFailure", error="rate_limit")
    assert mind.screen("claude/2.1.220-idle") == "quota"
    assert mind.hook("UserPromptSubmit", prompt="x") == "working"


def test_the_title_changes_nothing_while_the_screen_alone_asks():
    mind = Mind("gemini")
    assert mind.screen("gemini/0.20.0-blocked_trust") == "blocked:trust"
    assert mind.take("title", title="◇  Ready") == "blocked:trust"


def test_without_hooks_the_title_speaks_before_the_screen():
    mind = Mind("gemini")
    assert mind.take("title", title="✦  Working…") == "working"
    assert mind.screen("gemini/0.20.0-idle") == "working"
    assert mind.take("title", title="✋  Action Required") == "blocked:permission"
    assert mind.take("title", title="◇  Ready") == "idle"
    assert mind.take("title", title="project") == "idle"


def test_hooks_speak_before_the_title(mind):
    mind.take("title", title="✳ Ready")
    assert mind.state["activity"] == "idle"
    mind.hook("UserPromptSubmit", prompt="x")
    assert mind.take("title", title="✳ Ready") == "working"


def test_an_agent_of_screens_alone():
    mind = Mind("aider")
    for name, state in (
        ("aider/0.86.1-idle", "idle"),
        ("aider/0.86.1-working", "working"),
        ("aider/0.86.1-blocked_permission-shell", "blocked:permission"),
        ("aider/0.86.1-working", "working"),
    ):
        assert mind.screen(name) == state


def test_silence_is_said_as_that(mind):
    assert mind.take("tick") == "no_signal"
    mind.now += agent.HOOKS_EXPECTED_S
    assert mind.take("tick") == "no_signal"
    assert "should have spoken" in mind.state["reason"]
    unknown = Mind("nothing")
    assert unknown.take("tick") == "no_signal"
    assert unknown.state["reason"] == "nothing tells what this program does"
    assert Mind("command").take("tick") == "working"


@pytest.mark.parametrize(
    "line",
    [
        "Continue? [y/N] ",
        "Continue? ",
        "[sudo] password for me: ",
        "Overwrite (yes/no)?",
        "Are you sure you want to continue connecting (yes/no/[fingerprint])? ",
    ],
)
def test_a_program_without_a_profile_may_ask(line):
    mind = Mind("nothing")
    for _ in range(2):
        mind.take("screen", lines=["$ tool", line])
    assert mind.state["activity"] == "waiting_input"


def test_the_reason_can_be_explained(mind):
    mind.asks()
    mind.take("title", title="⠂ x")
    said = {s["name"]: s for s in agent.explain(CLAUDE, mind.state, mind.now)}
    assert [n for n, s in said.items() if s["decided"]] == ["hook PermissionRequest"]
    assert [n for n, s in said.items() if s["silent"]] == ["hook SessionStart", "screen"]
    assert said["hook PermissionRequest"]["says"] == "Bash"
    assert said["title"]["says"] == "working"


TEXT = st.sampled_from(["", "Bash", "toolu_1", "idle_prompt", "rate_limit", "clear", "x"])
ANY = st.one_of(TEXT, st.none(), st.integers(), st.lists(TEXT, max_size=2))
FIELDS = ("tool_name", "tool_use_id", "notification_type", "reason", "error", "message")
FIELDS += ("tool_input", "agent_id", "background_tasks", "session_crons")
SIGNALS = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("hook"),
            "event": st.sampled_from([h["event"] for h in CLAUDE["hooks"]] + ["Unknown"]),
            "payload": st.dictionaries(st.sampled_from(FIELDS), ANY),
        }
    ),
    st.fixed_dictionaries({"kind": st.just("title"), "title": st.sampled_from(["✳ x", "⠂ x", ""])}),
    st.fixed_dictionaries(
        {
            "kind": st.just("screen"),
            "lines": st.sampled_from([screen(p)[1] for p in FILES if p.parent.name == "claude"]),
        }
    ),
    st.fixed_dictionaries({"kind": st.just("typed"), "by": st.sampled_from(["terminal", "hub"])}),
    st.fixed_dictionaries({"kind": st.just("decided"), "tool_use_id": TEXT}),
    st.just({"kind": "tick"}),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(SIGNALS, max_size=30))
def test_whatever_comes_the_activity_is_a_known_one(signals):
    mind = Mind()
    for signal in signals:
        assert mind.take(**signal) in agent.STATES
        assert mind.state["reason"] is not None
    mind.hook("Stop")
    assert mind.state["activity"] == "idle"
    assert json.dumps(agent.explain(CLAUDE, mind.state, mind.now))
