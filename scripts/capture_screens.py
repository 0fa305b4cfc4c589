#!/usr/bin/env python3
"""Capture the first screen of a coding agent, as a fixture of its profile.

    scripts/capture_screens.py NAME-OF-FILE PROGRAM [ARGUMENT …]

The program runs in a tmux of its own, 120 by 40, with an empty home, in an empty git repository,
and without a network; its screen is printed once it has rested for three seconds. Nothing stays.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STILL_S = 3
MOST_S = 40


def capture(argv: list[str]) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="cap-"))
    project = folder / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    tmux = ["tmux", "-S", str(folder / "s"), "-f", "/dev/null"]
    env = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    env |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    alone = ["unshare", "--net", "--map-root-user"] if shutil.which("unshare") else []
    try:
        start = ["new-session", "-d", "-x", "120", "-y", "40", "-c", str(project), "--"]
        subprocess.run([*tmux, *start, *alone, *argv], env=env, check=True)
        lines = settled(tmux)
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    said = "\n".join(lines).replace(str(project), "/home/project")
    return said.replace(str(folder), "/home/dev").split("\n")


def settled(tmux: list[str]) -> list[str]:
    """The screen once it has not changed for a while."""
    before, since, began = None, time.monotonic(), time.monotonic()
    while time.monotonic() - began < MOST_S:
        shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout
        if shown != before:
            before, since = shown, time.monotonic()
        elif shown.strip() and time.monotonic() - since > STILL_S:
            break
        time.sleep(0.2)
    return (before or "").rstrip("\n").split("\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    found = capture(sys.argv[2:])
    Path(sys.argv[1]).write_text("\n".join(found) + "\n")
    print("\n".join(found))
