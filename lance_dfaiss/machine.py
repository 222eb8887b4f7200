"""What this process may use of the machine: a container often may use less than there is."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = [
    "forget_peak",
    "give_back_freed",
    "keep_freed",
    "peak_bytes",
    "resident_bytes",
    "usable_cores",
    "usable_memory_bytes",
]

# cgroup v2, then v1; the second says a number near 2**63 for "no limit".
_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Pieces from so many bytes on are large; and up to the most that glibc keeps, those that are kept.
_LARGE_BYTES = 1024 * 1024
_KEPT_BYTES = 32 * 1024 * 1024


def resident_bytes() -> int:
    """Return the bytes of RAM that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def give_back_freed() -> None:
    """Have what was freed and lies idle go back to the system now, and large pieces at once from now on (glibc).

    By itself it keeps pieces of up to 32 MB, in an arena for each thread: reading a column of large pages then holds
    several times what is in use. It is a setting of the process, so only for one that does this work alone.
    """
    _tell_malloc(_LARGE_BYTES, _LARGE_BYTES)


def keep_freed() -> None:
    """Have what is freed from now on stay at hand, up to pieces of 32 MB (glibc), after what lies idle has gone back.

    For one that makes and drops the same blocks over and over: fetching each anew from the system takes k-means half
    as long again.
    """
    _tell_malloc(_KEPT_BYTES, 4 * _KEPT_BYTES)


def _tell_malloc(system_bytes: int, idle_bytes: int) -> None:
    """Set from which size on pieces are the system's own, and how much of the rest may lie idle in each arena."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is not None and trim is not None:  # neither in other C libraries
        mallopt(_M_MMAP_THRESHOLD, system_bytes)
        mallopt(_M_TRIM_THRESHOLD, idle_bytes)
        trim(0)


def forget_peak() -> None:
    """Have `peak_bytes` count from now on, where the kernel can (Linux): nothing else changes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the most RAM that this process has held since it began, or since `forget_peak`."""
    try:
        # Not getrusage: there a process begins with the peak of the one that it was forked from.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
