"""What runs in another process when Ray carries out a build; imports no Ray itself.

A task arrives as bytes and is opened here; while it runs, a thread tells the driver's board of its progress twice a
second, which also shows that it is alive. An error goes back as a value, with its traceback, so that nothing of it is
lost on the way.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engine import limit_threads
from ..errors import DfaissError
from ..machine import forget_peak, give_back_freed, keep_freed, peak_bytes
from .runner import Recipe, TaskStopped

__all__ = ["LOAD", "Answer", "Beat", "Board", "Kept", "PackedCall", "PartHost", "carry_out"]

_BEAT_SECONDS = 0.5

# Longest wait for the board's answer to a report; the next report goes out all the same.
_ANSWER_SECONDS = 5.0

LOAD = "<load>"
"""Method of a `PartHost` that makes its part."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker tells of an attempt.

    Parameters
    ----------
    node : str
        Id of its node.
    worker : str
        Host and process.
    rows, num_bytes : int
        What it has finished so far.
    """

    node: str
    worker: str
    rows: int
    num_bytes: int


class Board:
    """Where workers leave reports and see whether they should stop: an actor on the driver's node.

    It may be started anew at any time: reports are whole sums, and what it forgot comes again half a second later.
    """

    def __init__(self) -> None:
        self._beats: dict[str, Beat] = {}
        self._stopped: set[str] = set()

    def report(self, attempt: str, beat: Beat) -> bool:
        """Take a report; return whether the attempt should stop."""
        self._beats[attempt] = beat
        return attempt in self._stopped

    def read(self) -> dict[str, Beat]:
        """Return the newest report of each attempt that has reported since the last call."""
        beats, self._beats = self._beats, {}
        return beats

    def stop(self, attempts: Sequence[str]) -> None:
        """Let attempts know, with their next report, that they should stop."""
        self._stopped.update(attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an attempt ended.

    Parameters
    ----------
    kind : str
        ``"done"``; ``"refused"``: an error of this package; ``"failed"``: any other; ``"stopped"``: as it was told to.
    payload : bytes
        The pickled result or error of this package; empty otherwise.
    cause, trace : str
        Of an error, in words.
    beat : Beat
        The last report.
    seconds : float
        From the task's arrival.
    peak_bytes : int
        Most memory that the process has held since the task arrived.
    """

    kind: Literal["done", "refused", "failed", "stopped"]
    payload: bytes
    cause: str
    trace: str
    beat: Beat
    seconds: float
    peak_bytes: int


class _Stoppable(Protocol):
    def stop(self) -> None: ...


class _Reporter:
    """Counts what an attempt has done and tells the board, from a thread of its own."""

    def __init__(self, board: Any, attempt: str, node: str, orphan_seconds: float) -> None:
        self._board = board
        self._attempt = attempt
        self._node = node
        self._worker = f"{socket.gethostname()} pid {os.getpid()}"
        self._orphan_seconds = orphan_seconds
        self._rows = self._bytes = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._stop: Callable[[], None] | None = None
        self._told_to_stop = False
        self._thread = threading.Thread(target=self._loop, name="dfaiss-report", daemon=True)

    def __enter__(self) -> _Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def progressed(self, rows: int, num_bytes: int) -> None:
        """Count rows and bytes."""
        with self._lock:
            self._rows += rows
            self._bytes += num_bytes

    def beat(self) -> Beat:
        """Return the state of now."""
        with self._lock:
            return Beat(self._node, self._worker, self._rows, self._bytes)

    def attach(self, work: _Stoppable) -> None:
        """Say what is to be stopped when the board asks for it."""
        with self._lock:
            self._stop = work.stop
            stopped = self._told_to_stop
        if stopped:
            work.stop()

    def _loop(self) -> None:
        answered = time.monotonic()
        while True:
            # Not ray.get: it would tell Ray that the task waits, and Ray would lend its core to another one.
            reply = self._board.report.remote(self._attempt, self.beat()).future()
            try:
                stop = bool(reply.result(timeout=_ANSWER_SECONDS))
                answered = time.monotonic()
            except Exception:  # the board is being restarted, or the link is cut: there is nobody to tell
                stop = False
            # Whoever reaches nobody for so long was taken for lost, and somebody else does its task.
            if stop or time.monotonic() - answered > self._orphan_seconds:
                self._halt()
            if self._ended.wait(_BEAT_SECONDS):
                return

    def _halt(self) -> None:
        with self._lock:
            self._told_to_stop = True
            stop = self._stop
        if stop is not None:
            stop()


def carry_out(
    recipe: bytes, task: bytes, *, board: Any, attempt: str, node: str, threads: int, orphan_seconds: float
) -> Answer:
    """Do one task in this process.

    Parameters
    ----------
    recipe, task : bytes
        Pickled `Recipe` and `ShardTask`.
    board : actor handle
        Of a `Board`.
    attempt : str
        Name of this attempt on the board.
    node : str
        Id of the node.
    threads : int
        Cores that FAISS may use.
    orphan_seconds : float
        Stop when the board has not answered for so long.
    """
    started = time.perf_counter()
    # Ray gives the process of one task to another: what an earlier one held is not this one's.
    give_back_freed()
    forget_peak()
    limit_threads(threads)
    kind: Literal["done", "refused", "failed", "stopped"] = "done"
    payload, cause, trace = b"", "", ""
    with _Reporter(board, attempt, node, orphan_seconds) as reporter:
        try:
            opened: Recipe[Any] = pickle.loads(recipe)
            work = opened.open(reporter.progressed)
            reporter.attach(work)
            payload = pickle.dumps(work(pickle.loads(task)))
        except TaskStopped:
            kind = "stopped"
        except DfaissError as exc:
            kind, payload, cause, trace = "refused", pickle.dumps(exc), _in_words(exc), traceback.format_exc()
        except Exception as exc:  # any error of a task goes to the driver, in words: its class may not unpickle there
            kind, cause, trace = "failed", _in_words(exc), traceback.format_exc()
        return Answer(
            kind=kind,
            payload=payload,
            cause=cause,
            trace=trace,
            beat=reporter.beat(),
            seconds=time.perf_counter() - started,
            peak_bytes=peak_bytes(),
        )


def _in_words(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A result that stays on a worker: how it can be computed again, and where it is.

    Parameters
    ----------
    index : int
        Of the part that computed it.
    method, args
        The call.
    ref : list
        Ray's reference, and the id of the node that has the result; others once it had to be computed again.
    """

    index: int
    method: str
    args: tuple[Any, ...]
    ref: list[Any]


class _Packer(pickle.Pickler):
    """Pickles a call; of a `Kept`, wherever it is, only its number."""

    def __init__(self, file: io.BytesIO, buffers: list[NDArray[np.uint8]], kept: list[Kept]) -> None:
        super().__init__(
            file, protocol=5, buffer_callback=lambda buffer: buffers.append(np.frombuffer(buffer.raw(), np.uint8))
        )
        self._kept = kept

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Kept):
            return None
        self._kept.append(value)
        return len(self._kept) - 1


class _Unpacker(pickle.Unpickler):
    """Puts the results in their places."""

    def __init__(self, file: io.BytesIO, buffers: Sequence[NDArray[np.uint8]], kept: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._kept = kept

    def persistent_load(self, number: Any) -> Any:
        return self._kept[number]


@dataclass(frozen=True, slots=True, eq=False)
class PackedCall:
    """The arguments of a call, with their arrays apart, as Ray stores them without a copy.

    Parameters
    ----------
    head : bytes
        All but the arrays.
    buffers : list of numpy.ndarray
        uint8 each.
    """

    head: bytes
    buffers: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> tuple[PackedCall, list[Kept]]:
        """Pack arguments; return the kept results among them, which travel by themselves."""
        file, buffers, kept = io.BytesIO(), list[NDArray[np.uint8]](), list[Kept]()
        _Packer(file, buffers, kept).dump(args)
        return cls(file.getvalue(), buffers), kept

    @property
    def length_bytes(self) -> int:
        """Bytes of all."""
        return len(self.head) + sum(buffer.nbytes for buffer in self.buffers)

    def open(self, kept: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments; arrays may be read-only."""
        args: tuple[Any, ...] = _Unpacker(io.BytesIO(self.head), self.buffers, kept).load()
        return args


class PartHost:
    """Holds one part in a process of its own: an actor.

    Parameters
    ----------
    board : actor handle
        Of a `Board`, which is told that the process lives.
    name : str
        Its name there.
    threads : int
        Cores that FAISS may use.
    orphan_seconds : float
        The process ends itself when the board has not answered for so long: somebody else has taken its place.
    """

    def __init__(self, board: Any, name: str, threads: int, orphan_seconds: float) -> None:
        # An actor without concurrency makes all calls in the thread that made it.
        limit_threads(threads)
        self._reporter = _Reporter(board, name, "", orphan_seconds)
        self._reporter.attach(_Exit())
        self._reporter.__enter__()
        self._part: Any = None
        self.worker = self._reporter.beat().worker

    def call(self, method: str, common: PackedCall, own: PackedCall, common_kept: int, *kept: Any) -> tuple[Any, None]:
        """Call a method of the part, or make the part.

        Parameters
        ----------
        method : str
            Its name; `LOAD` makes the part by calling the first argument with the others.
        common, own : PackedCall
            Arguments for all parts, and further ones for this part.
        common_kept : int
            How many of the kept results belong to the first.
        *kept
            Kept results, brought here by Ray.

        Returns
        -------
        tuple of (object, None)
            The second one tells of success without moving the first.
        """
        args = common.open(kept[:common_kept]) + own.open(kept[common_kept:])
        if method == LOAD:
            give_back_freed()
            self._part = args[0](*args[1:])
            keep_freed()  # it was read in pieces of all sizes; from now on the same blocks are computed with
            return None, None
        return getattr(self._part, method)(*args), None


class _Exit:
    """Ends its process when it is stopped: there is nothing but memory to give back."""

    def stop(self) -> None:
        os._exit(1)
