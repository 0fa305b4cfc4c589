"""A module imports only what stands below it."""

import ast
import re
import sys

import pytest

from conftest import ROOT

# The order within a layer is the order of the line.
LAYERS = (
    ("cascade", "rules", "bus"),
    ("models", "logs"),
    ("auth", "moves", "routing", "reading", "prompts", "tasks", "alerts", "leases")
    + ("backup", "permissions")
    + ("sessions", "inbox", "chats", "notices")
    + ("terminals", "servers", "wire", "nudges", "older", "doctor"),
    (
        "web",
        "ws",
        "feed",
        "document",
        "api",
        "api_permissions",
        "sockets",
        "live",
        "words",
        "prose",
        "api_hub",
    )
    + ("picture", "pages", "pages_permissions", "pages_tasks", "pages_pipelines")
    + (
        "pages_servers",
        "pages_sessions",
        "pages_telegram",
        "pages_settings",
        "pages_events",
        "install",
        "metrics",
    )
    + ("telegram_text", "telegram_words", "telegram_acts", "telegram"),
    ("serving", "hub"),
)
ALONE = {"agent", "cli"}  # import nothing of ours, and nobody imports them
INDEPENDENT = {"cascade", "rules", "bus"}
ORDER = [name for layer in LAYERS for name in layer]
OURS = set(ORDER) | ALONE
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
# What layer 0 may use beside the standard library: what checking a user's schema safely takes.
THIRD_PARTY = {"cascade": {"jsonschema", "referencing", "regex"}, "bus": set()}


def imports(name: str) -> set[str]:
    """Every top-level module `name` imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: no relative imports in a flat house"
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_its_place():
    assert set(MODULES) == OURS


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_below_it(name):
    below = set(ORDER[: ORDER.index(name)]) - (INDEPENDENT if name in INDEPENDENT else set())
    assert imports(name) & OURS <= below


@pytest.mark.parametrize("name", sorted(ALONE))
def test_agent_and_command_line_stand_alone(name):
    assert imports(name) & OURS == set()


@pytest.mark.parametrize("name", sorted(THIRD_PARTY))
def test_the_rules_need_no_database_no_web_and_no_clock(name):
    foreign = imports(name) - set(sys.stdlib_module_names)
    assert foreign <= THIRD_PARTY[name]
    assert not imports(name) & {"datetime", "sqlite3", "socket", "random", "os"}
    # a stopwatch, to bound what a user's pattern may cost, is no clock
    assert not re.search(r"\btime\.(?!perf_counter\b)", (ROOT / f"{name}.py").read_text())


def test_only_the_last_layers_know_the_web():
    web = {"flask", "apiflask", "werkzeug"}
    knowing = {name for name in ORDER if imports(name) & web}
    # auth hashes passwords with werkzeug's functions
    below = ORDER[: ORDER.index("web")]
    assert knowing.isdisjoint(set(below) - {"auth"})
