"""Writes docs/cli.md: every command of the command line with its options, as its help says it."""

import os
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402

WIDTH = 96
HEAD = """# The command line

Written by `scripts/reference.py` from the commands themselves. Every command takes `--json`,
`--hub`, `--token` and `--project` at any place; a group's aliases are `ls` for `list` and `show`
for `view`. Exit codes: 0 done, 1 refused by the hub (or the work awaited has failed), 2 wrong
usage, 3 hub unreachable, 4 timed out waiting.

Hub, key and project come from these options, then from `ORCHESTRATIA_HUB_URL`,
`ORCHESTRATIA_TOKEN` or `ORCHESTRATIA_API_KEY`, and `ORCHESTRATIA_PROJECT_ID`, then from
`~/.config/orchestratia/cli.yaml`, which `login` and `project use` write. In a session the
environment has them, with `ORCHESTRATIA_SESSION_ID` and `ORCHESTRATIA_TASK_ID`.
"""


def leaves(group, words):
    """(words, command) of every command, groups in the order of their help."""
    for name in sorted(group.commands):
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield (*words, name), command
            yield from leaves(command, (*words, name))
        else:
            yield (*words, name), command


def help_of(words, command):
    """What `--help` prints, without the options that every command has."""
    context = click.Context(
        command,
        info_name=" ".join(words),
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=[],
    )
    before, _, after = command.get_help(context).partition("\n\nOptions of all commands:")
    return before + ("\n\nExample:" + after.partition("Example:")[2] if "Example:" in after else "")


def reference() -> str:
    parts = [HEAD]
    for words, command in leaves(cli.cli, (cli.PROGRAM,)):
        if isinstance(command, click.Group):
            parts.append(f"## {' '.join(words[1:])}\n\n{command.help.strip()}\n")
        else:
            level = "##" if len(words) == 2 else "###"
            body = help_of(words, command).rstrip()
            parts.append(f"{level} {' '.join(words[1:])}\n\n```\n{body}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    os.chdir(ROOT)
    Path("docs/cli.md").write_text(reference())
