"""Waiting for what nothing tells of: in another process, or on another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SECONDS", "gone", "until"]

SECONDS = 60.0
"""Longer than anything takes that is waited for, also on a busy machine."""


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait until a condition holds, and return what it said; fail after some seconds."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        pause.wait(0.002)
    return value


def gone(pid: int) -> bool:
    """Tell whether a process has ended; whether anybody has asked for its exit status does not matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
