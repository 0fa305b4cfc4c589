"""What the benchmarks share: where they run, how numbers are summed up, whether an aim is met."""

import os
import platform
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


def quantile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def timed(call: Callable, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def peak_mb(process: int | str = "self") -> float:
    """The most memory a process ever had resident."""
    if process == "self" and not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return _status(process, "VmHWM")


def resident_mb(process: int | str = "self") -> float:
    """The memory a process has resident now."""
    return _status(process, "VmRSS")


def _status(process: int | str, name: str) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def machine(directory: str) -> dict:
    """What the numbers depend on beside the code."""
    syncs = [milliseconds(s) for s in sync_times(directory)]
    return {
        "directory": directory,
        "filesystem": filesystem(directory),
        "fdatasync_p50_ms": round(quantile(syncs, 0.5), 3),
        "fdatasync_p99_ms": round(quantile(syncs, 0.99), 3),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.platform(),
    }


def machine_text(where: dict) -> str:
    """The machine in a line or two."""
    text = (
        f"on {where['filesystem']}, one fdatasync "
        f"{where['fdatasync_p50_ms']} ms (p99 {where['fdatasync_p99_ms']} ms); "
        f"Python {where['python']}, SQLite {where['sqlite']}, {where['cpus']} processors, "
        f"load before it began {where['load']:.2f}"
    )
    if where["filesystem"] in MEMORY_FILESYSTEMS:
        text += (
            "\nThis is memory, not a disk: give --dir, or the numbers say nothing about commits."
        )
    return text


def sync_times(directory: str, n: int = 200) -> list[float]:
    """How long this disk takes to keep one page: the floor under every transaction."""
    with tempfile.TemporaryFile(dir=directory) as file:
        times = []
        for _ in range(n):
            file.write(bytes(4096))
            file.flush()
            times.append(timed(os.fdatasync, file.fileno()))
    return times


def filesystem(directory: str) -> str:
    """The type of the file system that holds the directory, as /proc/mounts has it."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    mounts = {mount: kind for _, mount, kind, *_ in map(str.split, lines)}
    path = Path(directory).resolve()
    return next((mounts[str(p)] for p in (path, *path.parents) if str(p) in mounts), "unknown")


def disk_directory() -> str:
    """Where temporary files go, unless that is memory."""
    for directory in (tempfile.gettempdir(), "/var/tmp", "."):
        if os.access(directory, os.W_OK) and filesystem(directory) not in MEMORY_FILESYSTEMS:
            return directory
    return tempfile.gettempdir()


def aim(text: str, value: float, met: bool) -> dict:
    return {"aim": text, "value": value, "met": met}


def cell(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def say(text: str) -> None:
    """Tell who waits what is being measured."""
    print(f"… {text}", file=sys.stderr)
