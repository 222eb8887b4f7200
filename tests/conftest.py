"""What every test shares: how hard hypothesis tries, and that nothing is left running; and what makes them fast."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

# FAISS's threads spin while they wait for each other: most of their time, where data are as few as in tests, and it
# takes the cores from whatever else runs. Read when FAISS is loaded, also by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The machines that run this are shared and slow at times: a slow example says nothing about the code.
_SHARED = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("ci", _SHARED, derandomize=True, max_examples=30)
settings.register_profile("nightly", _SHARED, max_examples=1_000)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)

# What is stored is made to outlast a crash, dozens of files for an index: on a disk that is half the time of a test.
# A run leaves some hundred megabytes; those of the night may be larger, and stay on the disk.
_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 4 << 30
if PROFILE == "ci" and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the nightly run take in every property test, with its many more examples."""
    if PROFILE == "nightly":
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker("nightly")


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Let this process and its children be interrupted: a shell starts its background jobs with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the module that leaves a worker process behind."""
    yield
    left = multiprocessing.active_children()
    assert not left, f"processes still running: {left}"
