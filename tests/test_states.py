"""The one door: every verb on a stored task in every state, and nothing that goes around it."""

import re

import pytest

import cascade
import models
import moves
from conftest import ROOT
from models import Conflict, transaction
from test_cascade import MOVES, STATES, VERBS

SOURCES = sorted(ROOT.glob("*.py"))
HELD = ("assigned", "planning", "plan_review", "running", "needs_human")
EVENTS = {
    "assign": "task_assigned",
    "start": "task_started",
    "submit_plan": "task_plan_submitted",
    "approve_plan": "task_plan_approved",
    "revise_plan": "task_plan_revision",
    "ask": "task_needs_human",
    "answer": "intervention_responded",
    "complete": "task_completed",
    "fail": "task_failed",
    "release": "task_released",
    "cancel": "task_cancelled",
    "retry": "task_retried",
}


def put(world, name: str, state: str) -> dict:
    """Set the scene: the task stands in `state`, with its slot where one is held."""
    held = state in HELD
    with transaction():
        models.execute(
            "UPDATE task SET status = ?, server_id = ?, assigned_at = 1 WHERE id = ?",
            (state, world.servers["dev"] if held else None, world.ids[name]),
        )
        models.execute("UPDATE server SET busy = ?", (int(held),))
    return world.row(name)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_moves_a_stored_task_from_every_state_or_changes_nothing(world, verb):
    world.server("dev")
    for state in STATES:
        world.task(state)
        row, before = put(world, state, state), world.now()
        goal = MOVES.get((state, verb))
        if goal is None:
            with pytest.raises(cascade.IllegalMove), transaction() as tx:
                moves.do(tx, row, verb, "somebody")
            assert world.row(state) == row
            assert world.now() == before
            continue
        with transaction() as tx:
            server = world.servers["dev"] if goal in HELD else row["server_id"]
            moves.do(tx, row, verb, "somebody", server_id=server)
        assert world.status(state) == goal
        [event] = world.events(state, after=before)
        assert (event["type"], event["actor"]) == (EVENTS[verb], "somebody")
        assert event["details"]["attempt"] == 1
        if state in HELD:
            assert world.busy("dev") == int(goal in HELD)


def test_a_task_changed_meanwhile_is_not_changed_again(world):
    world.server("dev")
    world.task("A")
    stale = world.row("A")
    world.cancel("A")
    with pytest.raises(Conflict, match="changed by somebody else"), transaction() as tx:
        moves.do(tx, stale, "assign", "somebody", server_id=world.servers["dev"])
    assert world.status("A") == "cancelled"


def test_a_row_of_an_older_attempt_changes_nothing(world):
    world.server("dev")
    world.working("A")
    stale = world.row("A")
    world.fail("A")
    world.retry("A")
    world.start("A")
    with pytest.raises(Conflict), transaction() as tx:
        moves.do(tx, stale, "complete", "somebody")


def statements(path) -> list[str]:
    """SQL texts of a source, one line each."""
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())
    return re.findall(r'f?"((?:UPDATE|INSERT) [^"]*)"', text)


def test_the_state_of_a_task_is_written_in_moves_alone():
    writers = {
        path.name
        for path in SOURCES
        for sql in statements(path)
        if re.match(r"UPDATE task SET (\{|(?:(?!WHERE).)*\bstatus\b)", sql)
    }
    assert writers == {"moves.py"}


def test_the_state_of_a_session_is_written_by_its_own_door():
    found = [
        (path.name, sql)
        for path in SOURCES
        for sql in statements(path)
        if re.match(r"UPDATE session SET (\{|.*\bstate\s*=)", sql)
    ]
    assert [name for name, _ in found] == ["sessions.py"]
    assert found[0][1].startswith("UPDATE session SET {")


def test_no_model_writes_tasks_around_the_door():
    for path in SOURCES:
        assert not re.search(r"\bTask\.(update|create|insert)\b", path.read_text()), path.name


def test_the_states_that_hold_a_slot_are_spelt_alike_in_rules_queries_and_index():
    migration = (ROOT / "migrations/0001_first.py").read_text()
    index = re.search(
        r"INDEX task_server ON task \(server_id\)\s+WHERE (status IN \([^)]*\))", migration
    )
    assert index[1] == moves.HELD
    assert set(re.findall(r"'(\w+)'", moves.HELD)) == cascade.HOLDS_SLOT
