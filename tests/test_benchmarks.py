"""The benchmarks run to their end and print what they promise; how fast is no test's business."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT

ROWS = {
    "cascade.py": ("chain of 200", "layered 500", "chain, 10,000 other tasks"),
    "sockets.py": (
        "10 agents → 10 watchers",
        "keystroke",
        "keystroke beside 200/s",
        "100 idle agents",
        "SSE 20 × 50/s",
    ),
    "kill.py": ("undisturbed", "tasks lost", "bodies that ran again"),
    "telegram.py": ("due to sendMessage", "sendMessage alone", "over the limits"),
}
AIMS = {"cascade.py": 8, "sockets.py": 9, "telegram.py": 2, "kill.py": 3}


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_prints_its_table(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--quick", "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"\n{row}" in done.stdout for row in ROWS[name]), done.stdout
    assert len(re.findall("^(?:met    |NOT met)  ", done.stdout, re.M)) == AIMS[name]
    assert list(tmp_path.iterdir()) == []
