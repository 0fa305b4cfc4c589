"""What is promised on paper is so."""

import re
import shlex
from pathlib import Path

import click
import pytest

import cli
import hub
import reference

ROOT = Path(hub.__file__).parent
RELIABILITY = (ROOT / "docs/reliability.md").read_text()


def test_every_setting_stands_in_the_readme_with_its_default_and_help():
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", readme, re.M)
    assert table == [(name, str(default), text) for name, default, text in hub.SETTINGS]


def test_every_pinned_dependency_has_its_reason():
    reasons = (ROOT / "docs/dependencies.md").read_text()
    pinned = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned
    for name, version in pinned:
        assert re.search(rf"^\| {name} \| {re.escape(version)} \| \S.+ \|$", reasons, re.M), name


def test_the_reference_of_the_command_line_is_what_its_help_says():
    """`python scripts/reference.py` writes it anew."""
    assert (ROOT / "docs/cli.md").read_text() == reference.reference()


def typed_lines():
    """(where, line) of every command line in the README, the documents and the help."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.M | re.S):
            for line in block.splitlines():
                if found := re.match(r" *(?:.*\| )?(orchestratia .*)$", line):
                    yield path.name, found[1]


@pytest.mark.parametrize(("where", "line"), sorted(set(typed_lines())))
def test_every_command_line_shown_can_be_typed(where, line, monkeypatch):
    """Command, arguments and options exist; nothing is carried out."""
    monkeypatch.setenv("ORCHESTRATIA_TASK_ID", "4f2a")
    words = shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True)[1:]
    command, context = cli.cli, click.Context(cli.cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, context, info_name=name)
    assert not isinstance(command, click.Group), line
    command.make_context(context.info_name, list(words), context.parent)


def test_every_fault_of_the_catalogue_has_its_tests():
    """F13, F22 and F23 need several hubs, PostgreSQL or Redis."""
    lines = re.findall(r"^\| F(\d+) \| [^|]+ \| (.+) \|$", RELIABILITY, re.M)
    assert [int(number) for number, _ in lines] == [
        n for n in range(1, 36) if n not in (13, 22, 23)
    ]
    for _, tests in lines:
        for file, name in re.findall(r"`(\w+\.py)::(\w+)`", tests):
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^(?:def |class )?{name}\b", text, re.M), (file, name)
        assert "::" in tests
