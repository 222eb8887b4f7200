"""What a build took: a document of its own beside the manifest, which nothing depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lance_dfaiss.types import FORMAT_VERSION

from .lease import as_time
from .validation import (
    Fields,
    Place,
    constant,
    distinct,
    each,
    instant,
    integer,
    number,
    optional,
    positive,
    text,
    unique_id,
)

__all__ = ["BuildReport", "BuildReportJSON", "PhaseReport", "PhaseReportJSON", "TaskReport", "TaskReportJSON"]


class PhaseReportJSON(TypedDict):
    """Stored form of a `PhaseReport`."""

    name: str
    seconds: float
    rows: int
    bytes: int


class TaskReportJSON(TypedDict):
    """Stored form of a `TaskReport`."""

    ordinal: int
    rows: int
    bytes: int
    seconds: float | None
    attempts: int
    worker: str | None
    peak_bytes: int | None
    losses: list[str]


class BuildReportJSON(TypedDict):
    """Stored form of a `BuildReport`."""

    format: int
    kind: str
    generation: str
    attempt: str
    created_at: str
    created_by: str
    executor: str
    workers: int
    seconds: float
    phases: list[PhaseReportJSON]
    tasks: list[TaskReportJSON]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """One phase of a build.

    Parameters
    ----------
    name : str
        Such as ``"train"``.
    seconds : float
        Wall time.
    rows : int
        Rows it went through; 0 if it counts none.
    length_bytes : int
        Bytes it read of vectors and wrote of files, as far as it counts them.
    """

    name: str
    seconds: float
    rows: int
    length_bytes: int

    def to_json(self) -> PhaseReportJSON:
        """Return the stored form."""
        return {"name": self.name, "seconds": self.seconds, "rows": self.rows, "bytes": self.length_bytes}

    @classmethod
    def from_json(cls, value: object, place: Place) -> PhaseReport:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=PhaseReportJSON)
        return cls(
            name=fields.get("name", text),
            seconds=fields.get("seconds", number),
            rows=fields.get("rows", integer),
            length_bytes=fields.get("bytes", integer),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """One shard task of a build.

    Parameters
    ----------
    ordinal : int
        Of the shard.
    rows : int
        Positions of the shard.
    length_bytes : int
        Of the files it wrote.
    seconds : float or None
        Of the attempt whose files count, on its worker; None if that was in an earlier run that this one took up.
    attempts : int
        How often it was begun in this run: 1 unless something was lost, late or failed; 0 for one that was done.
    worker : str or None
        Who did it; None if an earlier run did.
    peak_bytes : int or None
        Most memory that the process of the worker held during the task; None if it was not looked at.
    losses : tuple of str
        Who else tried, and how that ended.
    """

    ordinal: int
    rows: int
    length_bytes: int
    seconds: float | None
    attempts: int
    worker: str | None
    peak_bytes: int | None = None
    losses: tuple[str, ...] = ()

    def to_json(self) -> TaskReportJSON:
        """Return the stored form."""
        return {
            "ordinal": self.ordinal,
            "rows": self.rows,
            "bytes": self.length_bytes,
            "seconds": self.seconds,
            "attempts": self.attempts,
            "worker": self.worker,
            "peak_bytes": self.peak_bytes,
            "losses": list(self.losses),
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> TaskReport:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=TaskReportJSON)
        return cls(
            ordinal=fields.get("ordinal", integer),
            rows=fields.get("rows", integer),
            length_bytes=fields.get("bytes", integer),
            seconds=fields.get("seconds", optional(number)),
            attempts=fields.get("attempts", integer),
            worker=fields.get("worker", optional(text)),
            peak_bytes=fields.get("peak_bytes", optional(integer)),
            losses=fields.get("losses", each(text)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What one run of a build took, from its plan to its commit.

    Parameters
    ----------
    generation : str
        What was built.
    attempt : str
        Of this run; a build that was interrupted has several.
    created_at : str
        When it ended, ISO 8601 with its offset from UTC.
    created_by : str
        Program and version.
    executor : str
        ``"local"`` or ``"ray"``.
    workers : int
        Shards encoded at the same time, at the most.
    seconds : float
        Wall time of all.
    phases : tuple of PhaseReport
        In their order.
    tasks : tuple of TaskReport
        One per shard, in order.
    """

    kind: ClassVar[str] = "report"

    generation: str
    attempt: str
    created_at: str
    created_by: str
    executor: str
    workers: int
    seconds: float
    phases: tuple[PhaseReport, ...]
    tasks: tuple[TaskReport, ...]

    @property
    def file_name(self) -> str:
        """Where it lies: beside the manifest, under a name of its own."""
        return f"{self.generation}/report-{self.attempt}.json"

    @property
    def retries(self) -> int:
        """Attempts beyond the first of each task: losses, failures and twins of stragglers."""
        return sum(max(task.attempts - 1, 0) for task in self.tasks)

    def to_json(self) -> BuildReportJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "attempt": self.attempt,
            "created_at": self.created_at,
            "created_by": self.created_by,
            "executor": self.executor,
            "workers": self.workers,
            "seconds": self.seconds,
            "phases": [phase.to_json() for phase in self.phases],
            "tasks": [task.to_json() for task in self.tasks],
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> BuildReport:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=BuildReportJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        report = cls(
            generation=fields.get("generation", unique_id),
            attempt=fields.get("attempt", unique_id),
            created_at=fields.get("created_at", instant),
            created_by=fields.get("created_by", text),
            executor=fields.get("executor", text),
            workers=fields.get("workers", positive),
            seconds=fields.get("seconds", number),
            phases=fields.get("phases", each(PhaseReport.from_json)),
            tasks=fields.get("tasks", each(TaskReport.from_json)),
        )
        if fields.clean:
            try:
                as_time(report.created_at)
            except ValueError:  # digits in the right places, but no such day or hour
                place.at("created_at").expected("a day and time that exist", report.created_at)
        distinct([phase.name for phase in report.phases], place.at("phases"), what="phase")
        distinct([task.ordinal for task in report.tasks], place.at("tasks"), what="ordinal")
        return report
