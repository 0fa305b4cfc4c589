"""The hub as a process that dies at a chosen place: `python dying_hub.py …` with the flags of
hub.py. When the file DIE (in its data directory) appears, it is removed and the hub kills itself at
the place the file names:

    announce   a commit that gave a task away is on the disk, and nobody has been told
    ack        an agent's acknowledgement has arrived, and is not stored
    report     a report of an agent has arrived, and is not stored
    taken      a report is stored, and the agent has not been answered

and while the file CLOCK is there, its wall clock is as many seconds off as that says.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
DATA = Path(sys.argv[sys.argv.index("--data") + 1])

real_time = time.time


def wall() -> float:
    try:
        return real_time() + float((DATA / "CLOCK").read_text())
    except (OSError, ValueError):
        return real_time()


time.time = wall

import hub  # noqa: E402
import models  # noqa: E402
import wire  # noqa: E402


def dies(place: str) -> None:
    wish = DATA / "DIE"
    try:
        if wish.read_text() != place:
            return
    except OSError:
        return
    wish.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def before(module, name: str, place: str, when=lambda *args: True) -> None:
    function = getattr(module, name)

    def guarded(*args):
        if when(*args):
            dies(place)
        return function(*args)

    setattr(module, name, guarded)


def gives(tx, _first) -> bool:
    return any(event[1].endswith("_assigned") for event in tx.events)


def take_spooled(*args, function=wire.take_spooled) -> int:
    dies("report")
    upto = function(*args)
    dies("taken")
    return upto


before(models, "_publish", "announce", gives)
before(wire, "acknowledge", "ack")
wire.take_spooled = take_spooled

if __name__ == "__main__":
    sys.exit(hub.main())
