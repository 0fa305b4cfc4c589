"""The command line for people in the loop: teaching coding agents, permissions, rules, alerts."""

import json
import os
import re
import shlex
import uuid

import click
import pytest
from click.testing import CliRunner

import cli
from test_public_cli import agent_of

SECTIONS = ("CLAUDE.md", "AGENTS.md", "GEMINI.md")
SKILLS = (".claude/skills/orchestratia/SKILL.md", ".agents/skills/orchestratia/SKILL.md")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No credentials and no task of the person who runs the tests; in an empty directory."""
    for name in list(os.environ):
        if name.startswith("ORCHESTRATIA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "repo").mkdir()
    monkeypatch.chdir(tmp_path / "repo")
    return tmp_path / "repo"


def run(*args, code=0):
    result = CliRunner().invoke(cli.cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def done(*args):
    """{file: what init has done to it}."""
    return {
        one["path"]: one["done"] for one in json.loads(run("init", "--json", *args).stdout)["files"]
    }


# ── init ──────────────────────────────────────────────────────────────────────────────────────


def test_init_writes_what_each_coding_agent_reads_and_nothing_twice(alone):
    first = done()
    assert set(first) == {*SECTIONS, *SKILLS, ".aider.conf.yml"}
    assert set(first.values()) == {"created"}
    texts = {name: (alone / name).read_text() for name in first}
    assert set(done().values()) == {"kept"}
    assert texts == {name: (alone / name).read_text() for name in first}
    assert texts[".aider.conf.yml"] == "read: [AGENTS.md]\n"
    for name in SECTIONS:
        assert "task complete --result-file" in texts[name] and "task create" in texts[name]
    for name in SKILLS:
        assert texts[name].startswith("---\nname: orchestratia\ndescription: >-\n")


@pytest.mark.parametrize(
    ("agent", "files"),
    [
        ("claude", {"CLAUDE.md", SKILLS[0]}),
        ("codex", {"AGENTS.md", SKILLS[1]}),
        ("gemini", {"GEMINI.md", SKILLS[1]}),
        ("aider", {"AGENTS.md", ".aider.conf.yml"}),
    ],
)
def test_init_for_one_coding_agent_alone(alone, agent, files):
    assert set(done("--agent", agent, "--dir", alone)) == files
    assert {str(p.relative_to(alone)) for p in alone.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    ("role", "there", "missing"),
    [("worker", "task complete", "task create"), ("orchestrator", "task create", "task complete")],
)
def test_init_for_a_role_says_only_what_it_needs(alone, role, there, missing):
    run("init", "--role", role)
    text = (alone / "AGENTS.md").read_text()
    assert there in text and missing not in text


def test_the_users_own_text_stays_as_it_is(alone):
    own = alone / "AGENTS.md"
    own.write_bytes(b"# Ours\r\n\r\nUse tabs.")
    own.chmod(0o640)
    run("init", "--role", "worker")
    before = own.read_bytes()
    assert before.startswith(b"# Ours\r\n\r\nUse tabs.\r\n\r\n<!-- orchestratia:begin")
    assert before.count(b"\n") == before.count(b"\r\n")
    own.write_bytes(before + b"\r\nLast words.\r\n")
    assert done("--role", "orchestrator")["AGENTS.md"] == "updated"
    after = own.read_bytes()
    assert after.startswith(b"# Ours\r\n\r\nUse tabs.\r\n\r\n<!-- orchestratia:begin")
    assert after.endswith(b"<!-- orchestratia:end -->\r\n\r\nLast words.\r\n")
    assert b"task create" in after and b"task complete" not in after
    assert own.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (f"{cli.BEGIN}\nold\n", "line 1"),
        (f"a\n{cli.END}\n", "line 2"),
        (f"{cli.END}\nx\n{cli.BEGIN}\n", "line 1, 3"),
        (f"{cli.BEGIN}\n{cli.END}\n{cli.BEGIN}\n{cli.END}\n", "line 1, 2, 3, 4"),
    ],
)
def test_broken_markers_are_refused_and_nothing_is_written(alone, text, lines):
    (alone / "GEMINI.md").write_text(text)
    said = run("init", code=1).stderr
    assert "GEMINI.md is left as it is" in said and lines in said and "run it again" in said
    assert [path.name for path in alone.iterdir()] == ["GEMINI.md"]
    assert (alone / "GEMINI.md").read_text() == text


def test_what_cannot_be_written_is_refused_before_anything_is(alone, tmp_path):
    (alone / "GEMINI.md").mkdir()
    assert "Cannot read GEMINI.md: Is a directory" in run("init", code=1).stderr
    (alone / "GEMINI.md").rmdir()
    (alone / "GEMINI.md").write_bytes(b"caf\xe9")
    assert "GEMINI.md is not UTF-8 text (byte 3)" in run("init", code=1).stderr
    (alone / "GEMINI.md").unlink()
    (tmp_path / "elsewhere").write_text("mine")
    (alone / "GEMINI.md").symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in run("init", code=1).stderr
    assert (tmp_path / "elsewhere").read_text() == "mine"
    (alone / "GEMINI.md").unlink()
    skill = alone / SKILLS[0]
    skill.parent.mkdir(parents=True)
    skill.write_text("my own skill")
    assert "was not written by `orchestratia init`" in run("init", code=1).stderr
    assert skill.read_text() == "my own skill"
    assert not any((alone / name).exists() for name in SECTIONS)
    assert "is not a directory" in run("init", "--dir", alone / "no", code=2).stderr


def test_a_directory_that_takes_no_files_is_refused_by_name(alone):
    (alone / ".claude").write_text("a file where a directory should be")
    said = run("init", "--agent", "claude", code=1).stderr
    assert f"{SKILLS[0]}: Not a directory" in said
    assert not (alone / "CLAUDE.md").exists()


def test_one_file_under_two_names_is_written_once_and_stays_a_link(alone):
    (alone / "AGENTS.md").write_text("# Ours\n")
    (alone / "CLAUDE.md").symlink_to("AGENTS.md")
    run("init")
    assert (alone / "CLAUDE.md").is_symlink()
    assert (alone / "AGENTS.md").read_text().count(cli.BEGIN) == 1
    assert set(done().values()) == {"kept"}


def test_aiders_own_settings_are_left_alone_and_the_remedy_is_said(alone):
    (alone / ".aider.conf.yml").write_text("model: x\n")
    said = run("init", "--agent", "aider").stderr
    assert "add AGENTS.md to `read`" in said
    assert (alone / ".aider.conf.yml").read_text() == "model: x\n"
    (alone / ".aider.conf.yml").write_text("read: [AGENTS.md, STYLE.md]\n")
    assert run("init", "--agent", "aider").stderr == ""


def commands_taught():
    text = cli.guide(list(cli.GUIDES)).replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S))
    return [line for line in blocks.splitlines() if line.startswith("orchestratia ")]


@pytest.mark.parametrize("line", commands_taught())
def test_every_command_that_is_taught_can_be_typed(line, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_TASK_ID", "4f2a")
    words = shlex.split(line, comments=True)[1:]
    command, context = cli.cli, click.Context(cli.cli)
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, context, info_name=name)
    command.make_context(context.info_name, list(words), context.parent)


# ── permissions, rules, grants, alerts: against a real hub ────────────────────────────────────


class Floor:
    """A hub with a session `w1` whose agent is played by hand, and an admin who types commands."""

    def __init__(self, hub):
        self.hub = hub
        self.agent = agent_of(hub, hub.register("dev")["api_key"])
        self.agent.connect(capabilities={"slots": 4})
        made = hub.api("POST", "sessions", {"server_id": "dev", "name": "w1"})
        self.session = made["id"]
        self.command("session_start")
        self.agent.call(self.agent.started(self.session))

    def command(self, kind):
        """The next command of a kind that the agent gets."""
        while not (found := [c for c in self.agent.commands if c["type"] == kind]):
            assert self.agent.call(wait=10), f"no {kind}"
        self.agent.commands.remove(found[0])
        self.agent.call(self.agent.ack(found[0]["id"]))
        return found[0]

    def ask(self, command="git push --force", tool="Bash", **more):
        """A coding agent asks to run a command; the request's id."""
        fields = {"tool": tool, "input": {"command": command}, "directory": "/srv/core"}
        fields |= {"session_id": self.session, "agent": "claude", "via": "hook"}
        request_id = str(uuid.uuid4())
        said = self.agent.spool("permission_requested", request_id=request_id, **fields | more)
        self.agent.call(said)
        return request_id

    def tell(self, kind, **fields):
        self.agent.call(self.agent.spool(kind, session_id=self.session, **fields))


@pytest.fixture
def floor(shop, alone, monkeypatch):
    monkeypatch.setenv("ORCHESTRATIA_HUB_URL", shop.url)
    monkeypatch.setenv("ORCHESTRATIA_TOKEN", shop.login())
    for one in shop.api("GET", "rules")["rules"]:
        shop.api("DELETE", f"rules/{one['id']}")
    return Floor(shop)


def test_init_in_a_session_writes_for_its_role(floor, alone, monkeypatch):
    for role, there, missing in (
        ("orchestrator", "task create", "task complete"),
        ("worker", "task complete", "task create"),
    ):
        made = {"server_id": "dev", "name": role, "role": role}
        floor.hub.api("POST", "sessions", made)
        key = floor.command("session_start")["session_key"]
        monkeypatch.delenv("ORCHESTRATIA_TOKEN", raising=False)
        monkeypatch.setenv("ORCHESTRATIA_API_KEY", key)
        run("init", "--agent", "codex")
        text = (alone / "AGENTS.md").read_text()
        assert there in text and missing not in text


def as_json(*args):
    return json.loads(run("--json", *args).stdout)


def test_a_permission_request_is_listed_shown_and_allowed_once(floor):
    asked = floor.ask("make && \x1b[2Jgit push\nrm -rf build \u202e")
    listed = run("permission", "list", "--status", "pending").stdout
    assert "make && \\x1b[2Jgit push\\nrm -rf build \\u202e" in listed and "w1" in listed
    shown = run("permission", "show", asked[:8]).stdout
    assert "Bash asks for a permission" in shown and "/srv/core" in shown
    assert "make && \\x1b[2Jgit push\nrm -rf build \\u202e" in shown
    assert not {"\x1b", "\u202e"} & set(listed + shown)
    allowed = run("permission", "allow", asked[:8]).stdout
    assert "Allowed" in allowed and "allowed" in allowed and "once" in allowed
    answer = floor.command("permission_answer")
    assert (answer["request_id"], answer["decision"]) == (asked, "allow")
    assert "No permission requests." in run("permission", "list", "--status", "pending").stdout
    too_late = run("permission", "deny", asked, code=1).stderr
    assert "admin allowed this already" in too_late
    assert as_json("permission", "show", asked)["scope"] == "once"


def test_a_permission_request_is_denied_with_a_reason(floor):
    asked = floor.ask()
    run("permission", "deny", asked, "--reason", "Use the mirror")
    answer = floor.command("permission_answer")
    assert (answer["decision"], answer["message"]) == ("deny", "Use the mirror")
    [found] = as_json("permission", "list", "--session", "w1", "--status", "denied")["permissions"]
    assert (found["id"], found["reason"]) == (asked, "Use the mirror")


def test_what_a_coding_agent_asks_to_choose_is_shown_and_answered(floor):
    options = [{"label": "JWT", "description": "Stateless\x1b[2J"}, {"label": "Cookies"}, 3]
    asks = [
        {"question": "Which way?", "options": options},
        {"question": "Which clients?", "multiSelect": True, "options": None},
    ]
    asked = floor.ask(tool="AskUserQuestion", asks="question", input={"questions": asks})
    shown = run("permission", "show", asked[:8]).stdout
    assert "It asks you to choose" in shown and "multiSelect" not in shown
    assert "Which way?\n- JWT: Stateless\\x1b[2J\n- Cookies\n" in shown
    assert "Which clients? (several are possible)" in shown
    refused = run("permission", "answer", asked, "JWT", code=1).stderr
    assert "It asks 2 questions" in refused and "Which clients?" in refused
    assert "It asks 2 questions" in run("permission", "allow", asked, code=1).stderr
    said = run("permission", "answer", asked, "JWT", "web, phone").stdout
    assert "Answered" in said and "web, phone" in said
    answers = floor.command("permission_answer")["answers"]
    assert answers == {"Which way?": "JWT", "Which clients?": "web, phone"}


def test_all_that_a_tool_is_given_is_shown(floor):
    given = {"file_path": "/srv/a.py", "content": "import os\nprint('\u202e')\n"}
    shown = run("permission", "show", floor.ask(tool="Write", input=given)).stdout
    assert "What\n/srv/a.py\n" in shown and "import os\n" in shown and "'\\u202e'" in shown


def test_what_was_settled_in_the_terminal_is_said(floor):
    asked = floor.ask()
    floor.tell("permission_ended", request_id=asked, where="in the terminal")
    said = run("permission", "allow", asked, code=1).stderr
    assert "was settled in the terminal" in said
    assert "in the terminal" in run("permission", "show", asked).stdout


def test_a_grant_holds_for_the_session_until_it_is_taken_back(floor):
    run("permission", "allow", floor.ask("make test"), "--session")
    again = floor.ask("make test")
    assert as_json("permission", "show", again)["status"] == "allowed"
    assert "make test" in run("session", "grants", "w1").stdout
    [grant] = as_json("session", "grants", "w1")["grants"]
    assert "No grant of w1" in run("session", "revoke-grant", "w1", "ffff", code=1).stderr
    run("session", "revoke-grant", "w1", grant["id"][:8])
    assert "Nothing is granted" in run("session", "grants", "w1").stdout
    assert as_json("permission", "show", floor.ask("make test"))["status"] == "pending"


def test_always_makes_a_rule(floor):
    run("permission", "allow", floor.ask("npm run test a"), "--always", "--pattern", "npm run *")
    [made] = as_json("rule", "list")["rules"]
    assert (made["pattern"], made["action"], made["agent"]) == ("npm run *", "allow", "claude")
    assert as_json("permission", "show", floor.ask("npm run lint"))["status"] == "allowed"
    assert run("permission", "list").stdout.count("allowed") == 2


def test_rules_are_added_in_order_changed_and_removed(floor):
    push = as_json("rule", "add", "--tool", "Bash", "--pattern", "git push *", "--deny")
    assert push["project_id"] == floor.hub.api("GET", "projects/shop")["id"]
    more = ("--server", "dev", "--agent", "claude", "--note", "Nobody", "--position", "1")
    read = as_json("rule", "add", "--tool", "Read", "--all-projects", "--ask", *more)
    assert (read["project_id"], read["pattern"], read["note"]) == (None, None, "Nobody")
    lines = run("rule", "list").stdout.splitlines()
    assert re.search(r"ask +Read +\(any\) +all +dev +claude", lines[1])
    assert re.search(r"deny +Bash +git push \* +shop", lines[2])
    run("rule", "change", push["id"][:8], "--ask", "--clear", "pattern", "--disable")
    changed = next(r for r in as_json("rule", "list")["rules"] if r["id"] == push["id"])
    assert (changed["action"], changed["pattern"], changed["enabled"]) == ("ask", None, False)
    assert " off " in run("rule", "list").stdout
    run("rule", "change", push["id"], "--enable", "--pattern", "make *", "--position", "1")
    run("rule", "change", read["id"], "--clear", "server", "agent", "note")
    first, second = as_json("rule", "list")["rules"]
    assert (first["id"], first["enabled"], first["pattern"]) == (push["id"], True, "make *")
    assert (second["server_id"], second["agent"], second["note"]) == (None, None, "")
    for one in (push, read):
        run("rule", "remove", one["id"][:8])
    assert "No rules" in run("rule", "list").stdout


def test_a_command_is_tried_against_the_rules(floor):
    run("rule", "add", "--tool", "Bash", "--pattern", "ls *", "--allow")
    run("rule", "add", "--tool", "Bash", "--pattern", "git push *", "--deny")
    shop = ("--directory", "/srv/core", "--agent", "claude")
    allowed = run("rule", "test", "ls -l", "--check", *shop).stdout
    assert allowed.startswith("allow") and "ls *" in allowed
    both = run("rule", "test", "ls -l && git push --force", *shop).stdout
    assert both.startswith("deny") and re.search(r"^allow +ls -l ", both, re.M)
    assert re.search(r"^deny +git push --force ", both, re.M)
    run("rule", "test", "ls -l && git push --force", "--check", *shop, code=1)
    run("rule", "test", "make", "--check", *shop, code=1)
    asked = as_json("rule", "test", "--tool", "Read", "--server", "dev", "/etc/passwd", *shop)
    assert (asked["decision"], asked["rule"]) == ("ask", None)
    whole = as_json("rule", "test", "--input", '{"command": "git push --force"}', *shop)
    assert (whole["decision"], whole["rule"]["pattern"]) == ("deny", "git push *")
    floor.hub.api("POST", "projects", {"name": "lab"})
    everywhere = run("rule", "test", "git push --force")
    assert everywhere.stdout.startswith("ask") and "--project NAME" in everywhere.stderr
    assert run("rule", "test", "git push --force", "--project", "shop").stdout.startswith("deny")
    assert run("rule", "test", "git push --force", "--server", "dev").stdout.startswith("deny")


def test_a_session_explains_itself(floor):
    signals = [
        {"name": "hook", "says": "PermissionRequest", "at": 1.0, "silent": False, "decided": True},
        {"name": "title", "says": None, "at": None, "silent": True, "decided": False},
    ]
    activity = {"state": "blocked:permission", "reason": "git push", "signal": "hook"}
    floor.tell("session_activity", since=1.0, signals=signals, **activity)
    shown = run("session", "explain", "w1").stdout
    assert "blocked:permission: git push" in shown
    assert re.search(r"▸ +hook +PermissionRequest", shown) and re.search(
        r"title +\(silent\)", shown
    )
    assert as_json("session", "explain", "w1")["activity"] == "blocked:permission"


def test_alerts_are_listed_and_dismissed(floor):
    assert "No alerts." in run("alert", "list").stdout
    floor.tell("session_activity", state="quota", reason="resets at 18:00", since=1.0)
    assert "resets at 18:00" in run("alert", "list").stdout
    [found] = as_json("alert", "list")["alerts"]
    assert "resets at 18:00" in run("status").stdout
    run("alert", "dismiss", found["id"][:8])
    assert as_json("alert", "list")["alerts"] == []
    [gone] = as_json("alert", "list", "--status", "all")["alerts"]
    assert (gone["status"], gone["ended_by"]) == ("dismissed", "admin")


def test_status_and_the_questions_mention_what_else_waits(floor):
    assert run("intervention", "list").stderr == ""
    asked = floor.ask("git push --force")
    assert "git push --force" in run("status").stdout
    assert [one["id"] for one in as_json("status")["permissions"]] == [asked]
    floor.tell("session_activity", state="quota", reason="resets at 18:00", since=1.0)
    said = run("intervention", "list").stderr
    assert "1 permission request waits: orchestratia permission list --status pending" in said
    assert "1 alert waits: orchestratia alert list" in said
    assert as_json("intervention", "list") == []


def test_a_key_decides_nothing(floor, monkeypatch):
    asked = floor.ask()
    monkeypatch.delenv("ORCHESTRATIA_TOKEN")
    monkeypatch.setenv("ORCHESTRATIA_API_KEY", floor.hub.register("dev-2")["api_key"])
    assert "by people" in run("permission", "allow", asked, code=1).stderr
    assert "by people" in run("rule", "add", "--allow", "--project", "shop", code=1).stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("permission allow 5c0e --session --always", "--session or --always"),
        ("permission allow 5c0e --pattern x", "--pattern goes with --always"),
        ("permission show x", "too short"),
        ("rule add --tool Bash", "--allow, --deny or --ask"),
        ("rule add --allow --deny", "one of --allow, --deny and --ask"),
        ("rule change 1f3d", "at least one option"),
        ("rule test", "Give TEXT"),
        ("rule test ls --input {}", "Give TEXT"),
        ("rule test --input [1]", "must be an object"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(alone, line, said):
    run_line = run("--hub", "http://127.0.0.1:1", "--token", "t", *line.split(), code=2)
    assert said in run_line.stderr


def test_a_rule_for_one_of_several_projects_wants_its_name(floor):
    floor.hub.api("POST", "projects", {"name": "lab"})
    assert "--all-projects" in run("rule", "add", "--allow", code=2).stderr
    made = as_json("rule", "add", "--allow", "--project", "lab")
    assert made["project_id"] == floor.hub.api("GET", "projects/lab")["id"]


def test_ids_of_what_waits_are_completed(floor, monkeypatch):
    asked = floor.ask()
    monkeypatch.setenv("_ORCHESTRATIA_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", f"orchestratia permission allow {asked[:2]}")
    monkeypatch.setenv("COMP_CWORD", "3")
    result = CliRunner().invoke(cli.cli, [], prog_name="orchestratia")
    assert asked in result.stdout and "git push --force" in result.stdout
