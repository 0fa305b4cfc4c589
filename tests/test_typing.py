"""Typing into sessions, from the API to the program: byte for byte and once, or refused aloud."""

import json
import sqlite3

import pytest

from conftest import wait_until
from standin import happened
from test_humans import GIT, help_step, pending, respond, stand  # noqa: F401

# Stores what it is given in a file, without its terminal's echo or line length in the way.
READER = (
    "import os, sys, tty\n"
    "tty.setraw(0)\n"
    "os.write(1, b'\\x1b[?2004hready')\n"
    "with open(sys.argv[1], 'wb', buffering=0) as file:\n"
    "    while data := os.read(0, 65536):\n"
    "        file.write(data)\n"
    "        os.write(1, b'.' if len(data) < 99 else b'#')\n"
)

TEXTS = {
    "one letter": "a",
    "a line": "Use JWT with refresh tokens",
    "several lines": "one\n\n  two\n\tthree\n",
    "letters of the world": "grüße, 世界, Ω, 🙂, e\u0301",
    "a dash": "-rf --help",
    "a semicolon": "done;",
    "a backslash": "path\\",
    "what shells act on": "$(x) `y` 'a' \"b\" * ? {a,b} ~ ! # & | > <",
    "names of keys": "Enter C-c Escape Up",
    "a thousand letters": "x" * 1000,
    "64 KB": "0123456789abcdef" * 4096,
    "a megabyte": "".join(f"{n:07d}\n" for n in range(125_000))[:999_000],
}


@pytest.fixture
def reader(shop, start_agent):
    agent = start_agent(shop, "dev")
    made = shop.api(
        "POST",
        "sessions",
        {"server_id": "dev", "name": "reader", "command": ["python3", "-c", READER, "typed"]},
    )
    wait_until(lambda: "ready" in "".join(shop.api("GET", "sessions/reader/screen")["lines"]))
    return shop, agent, made


def typed(agent) -> bytes:
    return read_by(agent.folder / "typed")


def read_by(path) -> bytes:
    """What the program with this file has read, without the marks of a paste."""
    data = path.read_bytes() if path.exists() else b""
    return data.replace(b"\x1b[200~", b"").replace(b"\x1b[201~", b"")


def test_every_text_arrives_as_it_is_and_once(reader):
    hub, agent, _ = reader
    read = 0
    for name, text in TEXTS.items():
        said = hub.ask("POST", "sessions/reader/input", {"text": text})
        assert said.ok, (name, said.text)
        wanted, start = text.encode() + b"\r", read
        read += len(wanted)
        wait_until(lambda: len(typed(agent)) >= read)  # noqa: B023
        assert typed(agent)[start:] == wanted, name


@pytest.mark.parametrize("text", ["\x1b[200~x", "a\x1b[A", "x\x03", "\x00", "a\x7f"])
def test_what_would_act_as_a_key_is_refused_and_nothing_is_typed(reader, text):
    hub, agent, _ = reader
    refused = hub.ask("POST", "sessions/reader/input", {"text": text})
    assert refused.status_code == 409
    assert "control characters" in refused.json()["detail"]
    hub.api("POST", "sessions/reader/input", {"text": "after"})
    wait_until(lambda: typed(agent) == b"after\r")


def test_more_than_a_megabyte_is_refused(reader):
    hub, agent, _ = reader
    refused = hub.ask("POST", "sessions/reader/input", {"text": "x" * 1_000_001})
    assert refused.status_code == 422
    assert typed(agent) == b""


def test_nothing_is_typed_into_a_dialog(stand):  # noqa: F811
    stand.begin(GIT)
    stand.activity("blocked:permission")
    path = f"sessions/{stand.session_id}/input"
    refused = stand.hub.ask("POST", path, {"text": "2"})
    assert (refused.status_code, refused.json()["code"]) == (409, "blocked")
    stand.decide(stand.asked())
    assert stand.answered()["by"] == "hook"
    assert happened(stand.record, "stray") == []


def test_a_busy_agent_takes_what_is_typed_once(stand):  # noqa: F811
    stand.begin({"work": 2})
    wait_until(stand.submitted)
    stand.activity("working")
    text = "first line\nsecond line; $(x) \\"
    stand.hub.api("POST", f"sessions/{stand.session_id}/input", {"text": text})
    wait_until(lambda: len(stand.submitted()) == 2)
    assert stand.submitted()[1] == text
    stand.activity("idle")
    assert len(stand.submitted()) == 2


def test_a_long_answer_arrives_whole(stand):  # noqa: F811
    stand.begin(help_step(), {"wait": True})
    asked = pending(stand)
    stand.activity("idle")
    text = "".join(f"{n} grüße\n" for n in range(4000)).strip()
    respond(stand, asked, text[:50_000])
    wait_until(lambda: len(stand.submitted()) == 2)
    assert stand.submitted()[1].endswith(text[:50_000])


def test_an_agent_that_dies_while_typing_never_types_again(stand):  # noqa: F811
    """The command is begun in the journal and not done: what became of it is not known."""
    stand.begin(help_step(), GIT)
    stand.activity("blocked:permission")
    asked = pending(stand)
    respond(stand, asked, "JWT")
    state = stand.agent.folder / "state" / "state.db"
    waiting = "SELECT n FROM journal WHERE state = 'received'"
    wait_until(lambda: sqlite3.connect(state).execute(waiting).fetchall())
    stand.agent.kill()
    with sqlite3.connect(state) as db:  # as it is in the moment between the two
        for n, frame in db.execute("SELECT n, frame FROM journal WHERE state = 'received'"):
            assert json.loads(frame)["type"] == "intervention_response"
            db.execute("UPDATE journal SET state = 'begun' WHERE n = ?", (n,))
    stand.agent.start()
    wait_until(
        lambda: stand.hub.api("GET", f"interventions/{asked['id']}")["delivery"] == "unknown"
    )
    [alert] = stand.alerts()
    assert (alert["kind"], "may or may not have reached" in alert["sentence"]) == ("delivery", True)
    stand.decide(stand.asked())
    stand.activity("idle")
    assert stand.submitted()[1:] == []
