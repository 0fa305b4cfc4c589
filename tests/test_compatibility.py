"""The tables of docs/compatibility.md say of the public clients what the code does."""

import re
from pathlib import Path

import pytest
from werkzeug.exceptions import HTTPException

import hub
import nudges
import older

ROOT = Path(hub.__file__).parent
PAGE = (ROOT / "docs/compatibility.md").read_text()
FOR_US = {"session_screen", "session_typed"}  # made in the older form's place, for this hub


def table(heading: str) -> list[tuple[list[str], list[str]]]:
    """(names in the first cell, all cells) of each row in the tables under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert rows and len({len(row) for row in rows}) == 1
    return [(re.findall(r"`([^`]+)`", row[0]), row) for row in rows]


ENDPOINTS = [(names[0], row[1]) for names, row in table("Endpoints")]


def test_each_frame_of_the_daemon_is_handled_or_said_to_be_ignored():
    said = {name: row[1] for names, row in table("Frames from the daemon") for name in names}
    heard = {name for name, what in said.items() if not what.startswith("Ignored")}
    assert heard == {"auth", *older.SAID}


def test_each_frame_to_the_daemon_is_there_and_no_other_one_is_sent():
    said = {name: row[1] for names, row in table("Frames to the daemon") for name in names}
    source = (ROOT / "older.py").read_text() + (ROOT / "nudges.py").read_text()
    made = re.findall(r'"type": "(\w+)"|_nudge\(\s*"(\w+)"', source)
    sent = {one or other for one, other in made} - FOR_US
    assert {name for name, what in said.items() if not what.startswith("Never sent")} == {
        "auth_ok",
        "auth_error",
        *sent,
    }
    assert {*nudges.NUDGES} - {"task_cancelled"} <= sent  # which is said by a note


@pytest.mark.parametrize(("request_", "what"), ENDPOINTS)
def test_each_endpoint_is_there_unless_it_is_said_not_to_be(app, request_, what):
    method, _, path = request_.partition(" ")
    path = "/api/v1" + re.sub(r"\{\w+\}", "x", path)
    try:
        app.url_map.bind("localhost").match(path, method)
        there = True
    except HTTPException as refused:
        assert refused.code == 404
        there = False
    assert there is not what.startswith("Not there: 404")


def test_each_request_of_a_command_stands_among_the_endpoints():
    known = {request for request, _ in ENDPOINTS}
    for commands, row in table("Commands"):
        requests = re.findall(r"`([^`]+)`", row[1])
        assert row[1] == "none" or requests and known >= {*requests}, commands
