"""How much of the machine this process may use: a container often grants less than the machine has.

Linux keeps the limits of a control group in small text files, in one of two layouts (cgroup v1 and v2), and
a limit on any parent holds too. Elsewhere only the system's own numbers count.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups for "memory" or "cpu", from the innermost to the root."""
    if not MEMBERSHIP.exists():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder
            folder = folder.parent
        yield root


def numbers(file: Path) -> list[int]:
    """The numbers in a limit file, none where the file is missing or says "max"."""
    try:
        return [int(word) for word in file.read_text().split() if word != "max"]
    except OSError:
        return []


def reclaimable(folder: Path) -> int:
    """Bytes that count as used but only hold copies of files: the kernel drops them when memory is short."""
    statistics = folder / "memory.stat"
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def memory_available() -> int:
    """Bytes that this process can still take without swapping or being killed for its group's limit."""
    available = [psutil.virtual_memory().available]
    for folder in groups("memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            for most in numbers(folder / limit):
                used = sum(numbers(folder / usage)) - reclaimable(folder)
                available.append(max(0, most - used))
    return min(available)


def cpus() -> float:
    """Cores that this process may keep busy, a fraction where a container grants one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = [float(affinity)]
    for folder in groups("cpu"):
        quota_and_period = numbers(folder / "cpu.max") or [
            *numbers(folder / "cpu.cfs_quota_us"),
            *numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota_and_period) == 2 and quota_and_period[0] > 0:
            granted.append(quota_and_period[0] / quota_and_period[1])
    return min(granted)
