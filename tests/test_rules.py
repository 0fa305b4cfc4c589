"""The rules engine: hostile commands, harmless ones, and how a pattern is read."""

import shlex
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rules
from conftest import ROOT

COMMANDS = ROOT / "tests" / "fixtures" / "commands"
DENY = [rule | {"id": f"default-{n}"} for n, rule in enumerate(rules.DEFAULT_RULES)]
ALLOW_ALL = [
    {"id": "everything", "tool": "*", "pattern": None, "action": "allow"},
    {"id": "commands", "tool": "Bash", "pattern": "*", "action": "allow"},
]


def corpus(name: str) -> list[tuple[str, str]]:
    """(what the first line says of it, command) of each block."""
    blocks = (COMMANDS / f"{name}.txt").read_text().removesuffix("\n").split("\n---\n")
    if name == "harmless":
        return [(block, block) for block in blocks]
    return [tuple(block.removeprefix("# ").split("\n", 1)) for block in blocks]


HOSTILE, HARMLESS = corpus("hostile"), corpus("harmless")


def judge(command: str, given_rules=(), grants=(), **more) -> dict:
    request = {"tool": "Bash", "input": {"command": command}, "directory": "/srv/app"}
    request |= {"agent": "claude", "project_id": "p", "server_id": "s", "home": "/home/dev"}
    return rules.judge(list(given_rules), request | more, grants)


def decided(command: str, given_rules=(), **more) -> str:
    return judge(command, given_rules, **more)["decision"]


def rule(action: str, pattern: str | None = None, **more) -> dict:
    return {
        "id": f"{action} {pattern}",
        "tool": "Bash",
        "pattern": pattern,
        "action": action,
    } | more


def test_the_corpora_are_as_large_as_they_are_meant_to_be():
    assert len(HOSTILE) >= 200
    assert len({command for _, command in HOSTILE}) == len(HOSTILE)
    assert len({command for _, command in HARMLESS}) >= 100


@pytest.mark.parametrize(("trick", "command"), HOSTILE)
def test_no_hostile_command_passes_whatever_else_is_allowed(trick, command):
    for order in (DENY + ALLOW_ALL, ALLOW_ALL + DENY):
        wanted = {"deny", "ask"} if trick.startswith("ask") else {"deny"}
        assert decided(command, order) in wanted
    grant = {"tool": "Bash", "subject": command, "directory": "/srv/app", "granted_by": "x"}
    if not trick.startswith("ask"):
        assert judge(command, DENY + ALLOW_ALL, [grant])["decision"] == "deny"


@pytest.mark.parametrize("command", [command for _, command in HARMLESS])
def test_no_harmless_command_is_denied(command):
    assert decided(command, DENY) == "ask"


# ── the order ─────────────────────────────────────────────────────────────────────────────────


def test_a_denial_beats_what_stands_before_it():
    for first in ("allow", "ask"):
        assert decided("make x", [rule(first, "make *"), rule("deny", "make *")]) == "deny"


def test_of_the_others_the_first_that_fits_counts():
    assert decided("make x", [rule("ask", "make *"), rule("allow", "make *")]) == "ask"
    said = judge("make x", [rule("allow", "make *"), rule("ask", "make *")])
    assert (said["decision"], said["rule"]["id"]) == ("allow", "allow make *")


def test_what_no_rule_is_about_is_asked():
    said = judge("make x", [rule("allow", "npm *")])
    assert (said["decision"], said["rule"]) == ("ask", None)
    assert judge("make x")["decision"] == "ask"


@pytest.mark.parametrize(
    "more",
    [
        {"project_id": "other"},
        {"server_id": "other"},
        {"agent": "codex"},
        {"enabled": False},
        {"tool": "WebFetch"},
    ],
)
def test_a_rule_of_another_place_is_none(more):
    assert decided("make x", [rule("allow", "make *") | more]) == "ask"
    assert decided("make x", [rule("deny", "make *") | more, rule("allow", "make *")]) == "allow"


def test_a_grant_is_for_exactly_that_call():
    grant = {"tool": "Bash", "subject": "make x", "directory": "/srv/app"}
    assert judge("make x", (), [grant])["grant"] == grant
    assert judge("make  x", (), [grant])["decision"] == "ask"
    assert judge("make x", (), [grant], directory="/srv/other")["decision"] == "ask"
    assert judge("make x", [rule("ask", "make *")], [grant])["decision"] == "allow"
    assert judge("make x", [rule("deny", "make *")], [grant])["decision"] == "deny"


# ── allowing ──────────────────────────────────────────────────────────────────────────────────

GIT = [rule("allow", "git status"), rule("allow", "git log *"), rule("allow", "ls *")]


@pytest.mark.parametrize(
    "command",
    [
        "git status",
        "  git   status  ",
        "git 'status'",
        "git log",
        "git log --oneline -5",
        "ls -la src && git status",
        "git status | ls",
        "ls $HOME",
        "ls *.py",
        "ls 2>&1 >/dev/null",
        "time git status",
        "bash -c 'git status && ls'",
        "(git status; ls)",
        "for x in a b; do ls $x; done",
    ],
)
def test_what_is_allowed(command):
    assert decided(command, GIT) == "allow"


@pytest.mark.parametrize(
    "command",
    [
        "git status --short",
        "git",
        "GIT status",
        "./git status",
        "git status && make",
        "git status; make",
        "ls $(make)",
        "ls `make`",
        "ls <(make)",
        "ls > out",
        "ls >> out",
        "ls &> out",
        "X=1 ls",
        "PATH=. ls",
        "sudo ls",
        "env ls",
        "$X status",
        "g* status",
        "git $(echo status)",
        "ls\x00",
        "alias ls=make; ls",
        "ls() { make; }; ls",
        'bash -c "$X"',
        "xargs ls",
    ],
)
def test_what_is_asked(command):
    assert decided(command, GIT) == "ask"


def test_each_part_is_shown_with_what_becomes_of_it():
    said = judge("ls && make && git status", [*GIT, rule("deny", "make *")])
    assert [(p["text"], p["decision"]) for p in said["parts"]] == [
        ("ls", "allow"),
        ("make", "deny"),
        ("git status", "allow"),
    ]
    assert said["rule"]["id"] == "deny make *"


@pytest.mark.parametrize("program", ["python", "python3.12", "node", "perl", "ruby"])
def test_code_on_the_command_line_needs_a_pattern_that_says_so(program):
    option = "-c" if program.startswith("python") else "-e"
    assert decided(f"{program} run.x", [rule("allow", f"{program} *")]) == "allow"
    assert decided(f"{program} {option} 'x'", [rule("allow", f"{program} *")]) == "ask"
    assert decided(f"{program} {option} 'x'", [rule("allow", f"{program} {option} *")]) == "allow"


# ── denying ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("git push --force *", "git -C x push origin main --force"),
        ("git push --force *", "git push -f"),
        ("git push *", "GIT push"),
        ("npm publish *", "cd x && npm --silent publish"),
        ("curl *", "ls | /usr/bin/curl http://x"),
        ("make deploy", "make -j4 deploy x"),
        ("docker rm -f *", "docker rm --volumes -f a"),
    ],
)
def test_a_denial_sees_through_order_and_company(pattern, command):
    assert decided(command, [rule("deny", pattern), *ALLOW_ALL]) == "deny"


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("git push --force *", "git push"),
        ("git push *", "git pull; echo push"),
        ("make deploy", "make test"),
        ("rm -rf *", "rm x"),
        ("npm publish *", "npm run publish-docs"),
    ],
)
def test_a_denial_is_about_what_it_says(pattern, command):
    assert decided(command, [rule("deny", pattern), *ALLOW_ALL]) == "allow"


WORDS = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
)


@st.composite
def disguised(draw) -> str:
    """`rm -rf /` in some spelling that a shell reads as that."""
    ways = [
        lambda c: c,
        lambda c: f"\\{c}",
        lambda c: f"'{c}'",
        lambda c: f'"{c}"',
        lambda c: f"''{c}",
    ]
    words = [
        "".join(draw(st.sampled_from(ways))(sign) for sign in word) for word in ("rm", "-rf", "/")
    ]
    spaces = [draw(st.sampled_from([" ", "  ", "\t", " \\\n "])) for _ in range(2)]
    before = draw(st.sampled_from(["", "ls; ", "true && ", "(", "echo x | ", "\n", "sudo "]))
    line = words[0] + spaces[0] + words[1] + spaces[1] + words[2]
    return before + line + (")" if before == "(" else "")


@settings(max_examples=300, deadline=None)
@given(disguised())
def test_however_it_is_spelt_it_is_denied(command):
    assert decided(command, DENY + ALLOW_ALL) == "deny"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gets_an_answer(text):
    assert decided(text, DENY + ALLOW_ALL) in ("allow", "deny", "ask")


@settings(max_examples=100, deadline=None)
@given(WORDS)
def test_words_are_split_as_bash_splits_them(words):
    line = shlex.join(words)
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True
    ).stdout.decode()
    [part] = rules.read_command(f"x {line}")[0]
    assert [word.text for word in part.words[1:]] == printed.split("\0")[:-1]


@settings(max_examples=150, deadline=None)
@given(WORDS, st.integers(0, 4))
def test_patterns_for_a_call_allow_it_and_nothing_else(words, place):
    command = shlex.join(["tool", *words])
    found = rules.patterns_for("Bash", {"command": command})
    if not found:
        return
    made = [rule("allow", pattern) for pattern in found]
    assert decided(command, made) == "allow"
    changed = [*words]
    changed[place % len(words)] += "x"
    assert decided(shlex.join(["tool", *changed]), made) == "ask"
    assert decided(f"{command} more", made) == "ask"


PATHOLOGICAL = [
    "(",
    "$(",
    "`",
    "{a,b}",
    "a;",
    "\\",
    "'",
    '"',
    "${",
    "<<a ",
    "x ",
    "a|",
    "$((",
    "f()",
]


@pytest.mark.parametrize("sign", PATHOLOGICAL)
def test_much_of_anything_is_read_in_time_that_grows_with_it(sign):
    def seconds(length: int) -> float:
        text = sign * (length // len(sign))
        began = time.perf_counter()
        assert decided(text, DENY) in ("ask", "deny")
        return time.perf_counter() - began

    small, large = (min(seconds(n) for _ in range(2)) for n in (2_000, 16_000))
    assert large < 40 * max(small, 0.01)  # 8 for linear, 64 for a square
    assert decided(sign * 70_000, DENY + ALLOW_ALL) != "allow"  # too long


# ── other tools ───────────────────────────────────────────────────────────────────────────────


def use(tool: str, given_rules, **given_input) -> str:
    request = {"tool": tool, "input": given_input, "directory": "/srv/app", "home": "/home/dev"}
    request |= {"agent": "claude", "project_id": "p", "server_id": "s"}
    return rules.judge(given_rules, request)["decision"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("src/app.py", "allow"),
        ("/srv/app/src/a/b.py", "allow"),
        ("./src/../src/x", "allow"),
        ("src/../secrets", "ask"),
        ("/srv/app/other/x", "ask"),
        ("/srv/apps/src/x", "ask"),
        (".env", "deny"),
        ("src/.env", "deny"),
        ("/srv/app/src/../.ENV", "deny"),
    ],
)
def test_paths_are_compared_without_their_detours(path, said):
    given_rules = [rule("allow", "src/**", tool="Edit"), rule("deny", "**/.env", tool="Edit")]
    assert use("Edit", given_rules, file_path=path, old_string="a", new_string="b") == said
    assert use("Write", given_rules, file_path=path, content="a") == said


def test_a_link_is_no_way_round_a_rule(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "open").symlink_to(tmp_path / "secret")
    deny = [rule("deny", f"{tmp_path}/secret", tool="Read"), rule("allow", None, tool="*")]
    assert use("Read", deny, file_path=str(tmp_path / "open")) == "deny"
    allow = [rule("allow", f"{tmp_path}/open", tool="Read")]
    assert use("Read", allow, file_path=str(tmp_path / "open")) == "ask"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://docs.example.com/a", "allow"),
        ("https://DOCS.example.com./a", "allow"),
        ("https://docs.example.com:443/a", "allow"),
        ("https://docs.example.com@evil.org/", "ask"),
        ("https://evil.org/docs.example.com", "ask"),
        ("https://x.bad.org/", "deny"),
        ("https://bad.org/", "deny"),
        ("https://notbad.org/", "ask"),
    ],
)
def test_addresses_are_compared_by_their_host(url, said):
    given_rules = [
        rule("allow", "docs.example.com", tool="WebFetch"),
        rule("deny", "*.bad.org", tool="WebFetch"),
    ]
    assert use("WebFetch", given_rules, url=url) == said


def test_other_tools_are_matched_by_what_they_are_about():
    given_rules = [rule("deny", "*delete*", tool="mcp__db__*"), rule("allow", None, tool="mcp__*")]
    assert use("mcp__db__query", given_rules, query="select 1") == "allow"
    assert use("mcp__db__query", given_rules, query="DELETE from x") == "deny"
    assert use("mcp__web__get", given_rules, query="delete") == "allow"


@pytest.mark.parametrize(
    ("tool", "given_input", "subject"),
    [
        ("Bash", {"command": "ls -la", "description": "x"}, "ls -la"),
        ("shell", {"command": ["bash", "-lc", "ls | wc"]}, "ls | wc"),
        ("shell", {"command": ["git", "commit", "-m", "a b"]}, "git commit -m 'a b'"),
        ("run_shell_command", {"command": "ls"}, "ls"),
        ("Edit", {"file_path": "a.py", "old_string": "x"}, "a.py"),
        ("WebFetch", {"url": "http://x", "prompt": "y"}, "http://x"),
        ("mcp__x", {"b": 1, "a": [2]}, '{"a": [2], "b": 1}'),
    ],
)
def test_what_a_call_is_about(tool, given_input, subject):
    assert rules.subject_of(tool, given_input) == subject


@pytest.mark.parametrize("tool", ["shell", "local_shell", "run_shell_command", "Bash"])
def test_a_rule_for_one_shell_tool_is_one_for_all(tool):
    assert use(tool, [rule("deny", "rm -rf *")], command="rm -rf /") == "deny"


@pytest.mark.parametrize(
    ("tool", "pattern", "words"),
    [
        ("Bash", " ", "is empty"),
        ("Bash", "a; b", "has `;` in it"),
        ("Bash", "a && b", "has `&&` in it"),
        ("*", "a | b", "in it"),
        ("Bash", "git 'push", "cannot be read"),
        ("Bash", "x" * 501, "longer than 500"),
        ("Bash", "a\nb", "on one line"),
        ("Read", "a\u200bb", "cannot be seen"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(tool, pattern, words):
    with pytest.raises(ValueError, match=words):
        rules.check_pattern(tool, pattern)


@pytest.mark.parametrize(
    ("tool", "pattern"),
    [
        ("Bash", "git push *"),
        ("Bash", "npm run 'a b'"),
        ("Read", "~/x;y/**"),
        ("WebFetch", "*.x.org"),
    ],
)
def test_patterns_that_can(tool, pattern):
    rules.check_pattern(tool, pattern)


def test_every_rule_a_hub_begins_with_can_be_used():
    for each in rules.DEFAULT_RULES:
        rules.check_pattern(each["tool"], each["pattern"])
        assert each["note"]
