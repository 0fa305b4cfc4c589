"""The log of a session from the terminal to the hub: every byte once with the time it was printed,
and where that cannot be, a gap that says so. Real tmux, a real hub."""

import json
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import agent
from agent import Clock, Logs, Store, Times, released, times_path
from conftest import wait_until
from test_pipeline import at_end, task

LINE = 11  # bytes of a numbered line on a terminal


def numbered(start: int, stop: int) -> bytes:
    """The bytes of the stream of numbered lines between two offsets."""
    first, last = start // LINE, -(-stop // LINE)
    text = b"".join(b"%09d\r\n" % n for n in range(first, last))
    return text[start - first * LINE : stop - first * LINE]


PRINT = "for i in range({}): print(f'{{i:09d}}', flush=i % 500 == 0)"


def pieces(hub, session: str) -> list[tuple[int, bytes]]:
    """(offset, bytes) of all the hub has, joined where they touch."""
    found, offset = [], 0
    while True:
        answer = hub.ask("GET", f"sessions/{session}/output?offset={offset}")
        if not answer.content:
            return found
        begins = int(answer.headers["X-Offset"])
        if found and found[-1][0] + len(found[-1][1]) == begins:
            begins, before = found.pop()
            found.append((begins, before + answer.content))
        else:
            found.append((begins, answer.content))
        offset = int(answer.headers["X-Next-Offset"])


def end_of(hub, session: str) -> int:
    return int(hub.ask("GET", f"sessions/{session}/output").headers["X-Log-End"])


def marks(hub, session: str) -> list[dict]:
    return hub.api("GET", f"sessions/{session}/marks")["marks"]


def check_exact(hub, session: str, end: int) -> int:
    """Stored and missing bytes together are the stream from 0 to `end`, each once; the number of
    those that are missing."""
    spans = [(offset, offset + len(data)) for offset, data in pieces(hub, session)]
    for offset, data in pieces(hub, session):
        assert data == numbered(offset, offset + len(data))
    gaps = [(mark["from"], mark["to"]) for mark in marks(hub, session)]
    at = 0
    for start, stop in sorted(spans + gaps):
        assert start == at, (spans, gaps)
        at = stop
    assert at == end
    return sum(stop - start for start, stop in gaps)


def log_of(agent_process, session: str) -> Path:
    return agent_process.folder / "state" / "sessions" / session / "output.log"


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


def open_session(hub, *command: str, name: str = "s") -> str:
    made = hub.api("POST", "sessions", {"server_id": "dev", "name": name, "command": command})
    return made["id"]


def configure(agent_process, **settings) -> None:
    """Restart the agent with other settings."""
    agent_process.stop()
    config = yaml.safe_load(agent_process.config.read_text())
    agent_process.config.write_text(yaml.safe_dump(config | settings))
    agent_process.start()


# ── with everything real ──────────────────────────────────────────────────────────────────────


def test_output_printed_while_the_agent_is_dead_keeps_its_time(shop, start_agent):
    dev = start_agent(shop, "dev")
    script = "for i in 1 2 3 4; do echo line $i; sleep 0.7; done"
    made = task(shop, "Slow", "sh", "-c", script, auto_assign=True)
    session = wait_until(lambda: shop.api("GET", f"tasks/{made['id']}")["session_id"])
    wait_until(lambda: b"line 1" in b"".join(data for _, data in pieces(shop, session)))
    dev.kill()
    path = log_of(dev, session)
    wait_until(lambda: b"line 4" in path.read_bytes())
    dev.start()
    at_end(shop, made["id"])
    wait_until(lambda: shop.api("GET", f"sessions/{session}")["status"] == "closed", 20)
    text = shop.ask("GET", f"sessions/{session}/recording").text
    header, *events = [json.loads(line) for line in text.splitlines()]
    assert (header["version"], header["width"], header["height"]) == (2, 120, 40)
    assert "".join(text for _, _, text in events) == "".join(f"line {i}\r\n" for i in range(1, 5))
    printed = [next(t for t, _, text in events if f"line {i}" in text) for i in range(1, 5)]
    steps = [b - a for a, b in zip(printed, printed[1:], strict=False)]
    assert all(0.4 < step < 1.5 for step in steps), steps


def test_what_the_hub_has_is_given_back_to_the_disk(shop, start_agent):
    dev = start_agent(shop, "dev")
    lines = 700_000
    session = open_session(shop, sys.executable, "-c", PRINT.format(lines) + "\ninput()")
    wait_until(lambda: end_of(shop, session) == lines * LINE, 60)
    path = log_of(dev, session)
    if not released(path, 0, 4096):
        pytest.skip("this file system keeps whole files")
    wait_until(lambda: used(path) <= 2 * agent.KEPT_BYTES + agent.RELEASE_BYTES, 10)
    assert path.stat().st_size == lines * LINE
    dev.kill()
    dev.start()
    wait_until(lambda: shop.api("GET", f"sessions/{session}")["status"] == "recovering")
    shop.api("POST", f"sessions/{session}/input", {"text": "over"})
    wait_until(lambda: shop.api("GET", f"sessions/{session}")["status"] == "closed", 20)
    wait_until(lambda: end_of(shop, session) > lines * LINE)
    assert marks(shop, session) == []
    [(offset, data)] = pieces(shop, session)
    assert offset == 0 and data[: lines * LINE] == numbered(0, lines * LINE)
    wait_until(lambda: not path.exists())


def test_output_given_up_while_the_hub_is_away_is_declared_exactly(shop, start_agent):
    """The agent killed at random moments meanwhile, in the middle of giving up too."""
    dev = start_agent(shop, "dev")
    configure(dev, log_keep_mb=0.4)
    lines = 1_200_000
    code = "import time\nfor i in range({}):\n print(f'{{i:09d}}')\n i % 20000 or time.sleep(0.1)"
    session = open_session(shop, sys.executable, "-c", code.format(lines) + "\ninput()")
    wait_until(lambda: end_of(shop, session) > 100_000, 20)
    shop.kill()
    path, rng = log_of(dev, session), random.Random(4)
    size = path.stat().st_size
    while size < lines * LINE:
        size = min(lines * LINE, size + rng.randrange(1_000_000, 3_000_000))
        wait_until(lambda size=size: path.stat().st_size >= size, 60)
        dev.kill()
        dev.spawn()
    if released(path, 0, 4096):
        wait_until(lambda: used(path) < 1_500_000, 10)
    shop.start()
    wait_until(lambda: end_of(shop, session) == lines * LINE, 60)
    lost = check_exact(shop, session, lines * LINE)
    assert lost > 5_000_000
    assert all("limit of 0.4 MB" in mark["why"] for mark in marks(shop, session))
    events = shop.api("GET", "events?limit=500")["events"]
    assert [e for e in events if e["type"] == "session_log_gap" and e["session_id"] == session]


def test_a_hub_that_has_lost_its_logs_is_told_what_is_gone(shop, start_agent):
    dev = start_agent(shop, "dev")
    lines = 400_000
    session = open_session(shop, sys.executable, "-c", PRINT.format(lines) + "\ninput()")
    wait_until(lambda: end_of(shop, session) == lines * LINE, 60)
    path = log_of(dev, session)
    if not released(path, 0, 4096):
        pytest.skip("this file system keeps whole files")
    wait_until(lambda: used(path) < 3_000_000)
    shop.stop()
    for file in shop.data.glob("logs.db*"):
        file.unlink()
    shop.start()
    wait_until(lambda: end_of(shop, session) == lines * LINE, 30)
    lost = check_exact(shop, session, lines * LINE)
    assert 0 < lost <= lines * LINE - agent.KEPT_BYTES
    [mark] = marks(shop, session)
    assert mark["why"] == "the hub had stored it once"


def test_a_pipe_that_was_down_is_a_mark_in_the_log(shop, start_agent):
    dev = start_agent(shop, "dev")
    session = open_session(shop, "cat")
    wait_until(lambda: shop.api("GET", f"sessions/{session}")["status"] == "active")
    dev.tmux("pipe-pane", "-t", f"=orc-{session[:12]}:")
    [mark] = wait_until(lambda: marks(shop, session))
    assert (mark["kind"], mark["from"], mark["to"]) == ("gap", 0, None)
    assert "had stopped" in mark["why"]
    shop.api("POST", f"sessions/{session}/input", {"text": "after"})
    wait_until(lambda: pieces(shop, session) and b"after" in pieces(shop, session)[0][1])
    text = shop.ask("GET", f"sessions/{session}/recording").text
    kinds = [json.loads(line)[1] for line in text.splitlines()[1:]]
    assert kinds[0] == "m" and set(kinds[1:]) == {"o"}


# ── when it was printed ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def log_path(tmp_path):
    path = tmp_path / "output.log"
    path.write_bytes(b"")
    return path


def test_a_clock_notes_when_a_log_grew(log_path):
    clock = Clock(log_path)
    assert not clock.look()
    assert not times_path(log_path).exists()
    before = time.time()
    for size, grew in ((3, True), (3, False), (10, True)):
        log_path.write_bytes(bytes(size))
        assert clock.look() == grew
    notes = [line.split() for line in times_path(log_path).read_text().splitlines()]
    assert [size for _, size in notes] == ["3", "10"]
    assert all(before - 1 < int(at) / 1000 < time.time() + 1 for at, _ in notes)
    assert times_path(log_path).stat().st_mode & 0o777 == 0o600
    log_path.unlink()
    clock.look()


def test_the_notes_of_a_clock_stay_small(log_path, monkeypatch):
    monkeypatch.setattr(agent, "TIMES_BYTES", 2000)
    clock, times = Clock(log_path), Times(times_path(log_path))
    with log_path.open("ab") as file:
        for _ in range(1000):
            file.write(b"x")
            file.flush()
            clock.look()
            times.look(0)
            assert times_path(log_path).stat().st_size <= 2100
            assert times._sizes == sorted(set(times._sizes))
    sizes = [int(line.split()[1]) for line in times_path(log_path).read_text().splitlines()]
    assert sizes == sorted(sizes) and sizes[-1] == 1000 and len(sizes) > 40
    assert times._sizes == sizes


@given(
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5000)), max_size=12),
    start=st.integers(0, 200),
    size=st.integers(1, 200),
    cut=st.integers(0, 200),
)
def test_each_byte_has_the_time_of_the_look_that_saw_it(tmp_path_factory, steps, start, size, cut):
    path = tmp_path_factory.mktemp("t") / "output.times"
    end, at, when = 0, 1_700_000_000_000, {}
    with path.open("w") as file:
        for grown, waited in steps:
            at += waited
            when |= {n: at / 1000 for n in range(end, end + grown)}
            end += grown
            file.write(f"{at} {end}\n")
        file.write("17000")  # a line that is just being written
    times, now = Times(path), 1_800_000_000.0
    times.look(min(cut, start))
    first, later = times.of(start, start + size, now)
    steps = [(0, 0.0), *later]
    for n in range(size):
        t = first + max(s for m, s in steps if m <= n)
        assert t == pytest.approx(when.get(start + n, now), abs=0.01)
    assert [m for m, _ in later] == sorted({m for m, _ in later if 0 < m < size})


def test_without_notes_a_block_is_printed_now(log_path):
    times = Times(times_path(log_path))
    times.look(0)
    assert times.of(0, 10, 5.0) == (5.0, [])
    times_path(log_path).write_text("not a note\n\n1 x\n2000 4\n")
    times.look(0)
    assert times.of(0, 10, 5.0) == (2.0, [[4, 3.0]])


def test_a_clock_that_is_set_back_never_makes_time_run_backwards(log_path):
    times_path(log_path).write_text("9000 2\n5000 4\n12000 6\n")
    times = Times(times_path(log_path))
    times.look(0)
    assert times.of(0, 6, 1.0) == (9.0, [[2, 0.0], [4, 3.0]])


# ── what is not on the disk any more is not sent ──────────────────────────────────────────────


@pytest.fixture
def logs():
    return Logs(agent.settings_of({}))


def offsets(blocks) -> list[int]:
    return [block["offset"] for block in blocks]


def test_nothing_before_the_start_of_a_log_is_sent(logs, log_path):
    log_path.write_bytes(bytes(50) + b"x" * 50)
    logs.follow("s", log_path, start=50)
    logs.acknowledge("s", 10)  # the hub does not know yet that the rest is gone
    assert offsets(logs.take(100)) == [50]
    assert offsets(logs.take(111)) == [50]
    logs.acknowledge("s", 100)
    assert not logs.due(200)
    logs.rewind()
    logs.acknowledge("s", 0)
    assert offsets(logs.take(300)) == [50]


def test_a_log_that_is_cut_while_it_is_sent_goes_on_behind_the_cut(logs, log_path):
    log_path.write_bytes(bytes(3 * agent.WINDOW_BYTES))
    logs.follow("s", log_path, acked=0)
    assert offsets(logs.take(100))[0] == 0
    cut = 2 * agent.WINDOW_BYTES
    logs.cut("s", cut)
    logs.acknowledge("s", 1000)  # late
    assert offsets(logs.take(101))[0] == cut
    logs.acknowledge("s", cut)
    assert not logs.due(102)
    assert offsets(logs.take(120))[0] == cut
    logs.drop("s")
    logs.cut("s", cut + 1)


def test_part_of_a_file_is_given_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1_000_000)
    os.sync()
    before = used(path)
    if not released(path, 0, 500_001):
        pytest.skip("this file system keeps whole files")
    assert path.stat().st_size == 1_000_000 and used(path) < before - 400_000
    assert path.read_bytes() == bytes(500_001) + b"a" * 499_999
    assert agent.read_end(path, 600_000) == b"a" * 499_999
    assert not released(tmp_path / "none", 0, 1)


def test_a_gap_that_waits_to_be_sent_is_not_declared_again(tmp_path):
    store = Store(tmp_path / "state.db")
    store.spool(
        {"type": "session_gap", "session_id": "s", "from": 5, "to": 9, "why": "w"},
        {"type": "session_gap", "session_id": "s", "from": 20, "to": None, "why": "w"},
        {"type": "session_closed", "session_id": "s"},
    )
    assert [n for n in range(25) if store.declares_gap("s", n)] == [5, 6, 7, 8]
    assert not store.declares_gap("t", 6)
    store.trim_spool(1)
    assert not store.declares_gap("s", 6)
    with suppress(Exception):
        store.close()
