"""Progress: few lines in a pipe, bars on a terminal, and a way to stop."""

from __future__ import annotations

import io
import signal
import threading

import pytest

from lance_dfaiss.cli.progress import BarProgress, LineProgress, StoppableProgress, reporting
from lance_dfaiss.progress import Progress, ProgressEvent, SilentProgress


def event(done: int, seconds: float, phase: str = "encode") -> ProgressEvent:
    return ProgressEvent(phase=phase, done_rows=done, total_rows=1000, done_bytes=done * 1024, elapsed_seconds=seconds)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_once_a_second_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    for tick in range(1, 26):
        clock.now = tick / 10
        progress.update(event(tick * 20, clock.now))
    clock.now = 4.0
    progress.finish("encode")
    assert stream.getvalue().splitlines() == [
        "encode: 200 of 1,000 rows, 200.0 KiB, 200 rows/s, 4.0 s left",
        "encode: 400 of 1,000 rows, 400.0 KiB, 200 rows/s, 3.0 s left",
        "encode done in 4.0 s: 1,000 of 1,000 rows, 500.0 KiB, 250 rows/s",
    ]


def test_a_phase_that_counts_nothing_has_lines_too() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    clock.now = 1.5
    progress.update(ProgressEvent(phase="check"))
    progress.finish("check")
    assert stream.getvalue() == "check ...\ncheck done in 0 ms\n"


def test_a_closed_pipe_does_not_stop_the_work() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, _text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Closed()
    progress = LineProgress(stream)
    for phase in ("train", "encode"):
        progress.update(event(1, 1, phase))
        progress.finish(phase)
    assert stream.writes == 1


def test_bars_show_every_phase() -> None:
    stream = io.StringIO()
    with BarProgress(stream) as bars:
        bars.update(event(500, 1.0))
        bars.finish("encode")
        bars.update(ProgressEvent(phase="check"))
        bars.finish("check")
    assert "500 of 1,000 rows, 500.0 KiB, 500 rows/s, 1.0 s left" in stream.getvalue()
    assert "check" in stream.getvalue()


@pytest.mark.parametrize("listener", [LineProgress(io.StringIO()), BarProgress(io.StringIO())])
def test_both_are_listeners(listener: object) -> None:
    assert isinstance(listener, Progress)


def test_an_interrupt_reaches_other_threads() -> None:
    progress = StoppableProgress(SilentProgress())
    progress.update(event(1, 1))
    progress.stop()
    seen: list[BaseException] = []

    def work() -> None:
        try:
            progress.update(event(2, 2))
        except KeyboardInterrupt as exc:
            seen.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1


def test_a_signal_stops_the_listener_and_is_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with reporting() as progress:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                progress.update(event(1, 1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with reporting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
