"""Every command of the command line typed once against a real hub; what needs an agent or a
terminal is typed in the tests named below."""

import json

import click
import pytest
from click.testing import CliRunner

import cli
from conftest import PASSWORD

ELSEWHERE = {
    "session attach": "test_cli_attach.py",
    "session start": "test_cli_attach.py",
    "session send": "test_cli_attach.py",
    "session input": "test_cli_attach.py",
    "session screen": "test_cli_attach.py",
    "session scrollback": "test_cli_attach.py",
    "session recording": "test_cli_unit.py",
    "session logs": "test_workflow9.py",
    "session close": "test_cli_attach.py",
    "session explain": "test_cli_human.py",
    "session grants": "test_cli_human.py",
    "session revoke-grant": "test_cli_human.py",
    "permission list": "test_cli_human.py",
    "permission show": "test_cli_human.py",
    "permission allow": "test_cli_human.py",
    "permission answer": "test_cli_human.py",
    "permission deny": "test_cli_human.py",
    "rule list": "test_cli_human.py",
    "rule add": "test_cli_human.py",
    "rule change": "test_cli_human.py",
    "rule remove": "test_cli_human.py",
    "rule test": "test_cli_human.py",
    "alert list": "test_cli_human.py",
    "alert dismiss": "test_cli_human.py",
    "hub backup": "test_backup.py",
    "hub restore": "test_backup.py",
    "doctor": "test_doctor.py",
    "init": "test_cli_human.py",
    "mcp": "test_mcp.py",
}
PIPELINE = {
    "name": "demo",
    "tasks": [
        {"id": "A", "title": "Schema", "structured_spec": {"expected_contracts": {"k": {}}}},
        {"id": "B", "title": "Gateway", "depends_on": [{"task": "A", "key": "k"}]},
    ],
}


def leaves(group, words=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*words, name))
        else:
            yield " ".join((*words, name))


class Typist:
    """Types command lines, each of which must succeed; remembers which commands it has typed."""

    def __init__(self):
        self.typed = set()

    def __call__(self, line, *more, code=0, stdin=None):
        words = [*line.split(), *more]
        result = CliRunner().invoke(cli.cli, words, input=stdin)
        assert result.exit_code == code, (line, result.output)
        self.typed |= {" ".join(words[:n]) for n in (1, 2, 3)}
        return result

    def json(self, line, *more, **options):
        return json.loads(self(f"--json {line}", *more, **options).stdout)

    def made(self, line, *more):
        """The id of what a command has made."""
        self(line, "--help")  # so that it counts as typed: with --json the words stand elsewhere
        return self.json(line, *more)["id"]


@pytest.fixture
def typed(shop, monkeypatch, tmp_path):
    for name in ("HUB_URL", "TOKEN", "API_KEY", "SESSION_ID", "TASK_ID", "PROJECT_ID"):
        monkeypatch.delenv(f"ORCHESTRATIA_{name}", raising=False)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return Typist()


def test_every_command_is_typed_once(shop, typed, tmp_path):
    people_and_projects(shop, typed)
    servers_and_sessions(shop, typed)
    work(typed)
    plans_and_questions(typed)
    pipelines(typed, tmp_path)
    typed("events --limit 3")
    typed("status")
    assert typed("open pipelines").stdout == f"{shop.url}/pipelines\n"
    typed("completion bash")
    typed("logout")
    assert "orchestratia login" in typed("whoami", code=2).stderr
    assert set(leaves(cli.cli)) - typed.typed == set(ELSEWHERE)


def people_and_projects(hub, typed):
    login = f"login --hub {hub.url} --username admin --password-stdin"
    typed(login, stdin=f"{PASSWORD}\n")
    assert "administrator" in typed("whoami").stdout
    typed("project create lab --profile command")
    typed("project update lab --name annex")
    assert "annex" in typed("project list").stdout
    typed("project show annex")
    typed("project use shop")
    typed("user create ada --role shop=operator --password-stdin", stdin="a good password\n")
    typed("user update ada --role annex=viewer --disable")
    shown = typed("user show ada").stdout
    assert "operator of shop" in shown and "viewer of annex" in shown and "disabled" in shown
    assert "ada" in typed("user list").stdout
    typed("user delete ada")
    assert "no user 'ada'" in typed("user show ada", code=1).stderr


def servers_and_sessions(hub, typed):
    made = typed("server token --ttl 5m --note new").stdout
    token = next(line for line in made.splitlines() if line.startswith("orcreg_"))
    assert f"curl -fsSL {hub.url}/install.sh | sh -s -- {token}" in made
    for name in ("dev", "old"):
        key = hub.register(name, project="shop")["api_key"]
        hub.api("POST", "servers/heartbeat", {}, key=key)
    typed("server declare dev --repo core=/srv/core --language rust go --slots 3")
    typed("server rename dev dev-2")
    assert "core" in typed("server list").stdout
    assert "rust, go" in typed("server show dev-2").stdout
    typed("server drain dev-2")
    typed("server resume dev-2")
    typed("server revoke old")
    hub.api("POST", "sessions", {"server_id": "dev-2", "name": "shell"})
    assert "shell" in typed("session list").stdout
    typed("session show shell")


def work(typed):
    first = typed.made("task create", "--title", "First", "--structured-spec",
                       '{"expected_contracts": {"k": {}}}')  # fmt: skip
    second = typed.made("task create", "--title", "Second", "--depends-on", first)
    third = typed.made("task create", "--title", "Third")
    typed(f"task deps add {second} --depends-on {first} --type input --contract-key k")
    typed(f"task deps add {third} --depends-on {second[:12]}:related")
    typed(f"task deps remove {third} --depends-on {second}")
    typed(f"task update {first} --repo core --timeout 1h")
    typed(f"task update {first} --clear timeout repo")
    typed(f"task assign {first} --session dev-2")
    typed(f"task start {first}")
    typed(f"task note --id {first} --content halfway --urgent")
    typed("note", first, "nearly there")
    assert "urgent: halfway" in typed(f"task notes {first}").stdout
    assert "First" in typed("task list --status running").stdout
    assert "First" in typed("task check").stdout
    assert "waits for First" in typed(f"task explain {second}").stdout
    typed(f"contract list {first}")
    missing = typed("task complete", first, "--result", "done", code=1)
    assert "(k: missing)" in missing.stderr
    typed("task complete", first, "--result", '{"contracts": {"k": {"v": 1}}}')
    typed(f"task wait {first} --timeout 5s")
    typed(f"contract set {first} k 2")
    assert "2" in typed(f"contract show {first} k").stdout
    typed(f"task start {second}")
    typed(f"task fail {second} --error broken")
    typed(f"task retry {second}")
    typed(f"task cancel {third} --cascade")
    typed(f"task tree {first}")
    typed(f"task events {first}")
    assert "Third" in typed(f"task view {third}").stdout


def plans_and_questions(typed):
    task = typed.made("task create", "--title", "Planned", "--require-plan", "--assign", "dev-2")
    typed("task plan", task, "--plan", "one, two")
    assert "one, two" in typed(f"plan show {task}").stdout
    typed("plan revise", task, "--feedback", "two, one")
    typed("plan submit", task, "--plan", '{"steps": [2, 1]}')
    typed(f"plan approve {task} --version 2")
    asked = typed.json("task help", "--id", task, "--question", "Which?")["intervention_id"]
    typed("task help", task, "--question", "Really?", "--type", "question")
    assert "Which?" in typed("intervention list --status pending").stdout
    typed("intervention respond", asked[:8], "that one")
    assert "that one" in typed(f"intervention show {asked} --wait").stdout


def pipelines(typed, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(PIPELINE))
    typed("pipeline apply demo.json")
    typed("pipeline create --inline", '{"tasks": [{"title": "One"}]}')
    assert "demo" in typed("pipeline list").stdout
    typed("pipeline show demo")
    assert typed("pipeline diff demo.json --exit-code").stdout == "No difference.\n"
    exported = typed("pipeline export demo").stdout
    (tmp_path / "again.yaml").write_text(exported.replace("name: demo", "name: again"))
    typed("pipeline apply again.yaml")
    assert typed("pipeline export again").stdout == exported.replace("name: demo", "name: again")
