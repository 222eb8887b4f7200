"""What this process may use of the machine: a container often may use less than there is."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["resident_bytes", "usable_cores", "usable_memory_bytes"]

# cgroup v2, then v1; the second says a number near 2**63 for "no limit".
_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")


def resident_bytes() -> int:
    """Return the bytes of RAM that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def usable_cores() -> int:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the machine's memory, or the container's limit where that is less.

    Parameters
    ----------
    cgroup : Path
        Where the kernel shows the limits of this process's group.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _LIMIT_FILES:
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue  # no such version of cgroups here
        if text.isdigit():
            found.append(int(text))
    return min(found)
