"""The manifest: what a generation consists of. Small, however many rows and fragments it covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lance_dfaiss.spec import ResolvedSpec, SearchOptions
from lance_dfaiss.types import FORMAT_VERSION

from .build_plan import DatasetEntry, DatasetEntryJSON
from .files import FileEntry, FileEntryJSON, Reference, ReferenceJSON
from .options import (
    ResolvedSpecJSON,
    SearchOptionsJSON,
    index_name,
    resolved_spec,
    resolved_spec_json,
    search_options,
    search_options_json,
)
from .records import Fingerprint, FingerprintJSON, SkipCounts, SkipCountsJSON
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
    pair,
    positive,
    share,
    text,
    unique_id,
)

__all__ = [
    "BuildStatistics",
    "BuildStatisticsJSON",
    "Manifest",
    "ManifestJSON",
    "ModelEntry",
    "ModelEntryJSON",
    "RecallPoint",
    "RecallPointJSON",
    "RecallReport",
    "RecallReportJSON",
    "ShardEntry",
    "ShardEntryJSON",
]


class RecallPointJSON(TypedDict):
    """Stored form of a `RecallPoint`."""

    options: SearchOptionsJSON
    recall: float


class RecallReportJSON(TypedDict):
    """Stored form of a `RecallReport`."""

    k: int
    queries: int
    points: list[RecallPointJSON]
    defaults: SearchOptionsJSON
    method: str


class BuildStatisticsJSON(TypedDict):
    """Stored form of `BuildStatistics`; seconds are pairs of phase and time."""

    sampled_rows: int
    training_error: float | None
    list_imbalance: float | None
    seconds: list[list[str | float]]


class ShardEntryJSON(TypedDict):
    """Stored form of a `ShardEntry`."""

    record: ReferenceJSON
    indexed_rows: int
    physical_rows: int
    length_bytes: int


class ModelEntryJSON(TypedDict):
    """Stored form of a `ModelEntry`."""

    record: ReferenceJSON
    file: FileEntryJSON
    fingerprint: FingerprintJSON


class ManifestJSON(TypedDict):
    """Stored form of a `Manifest`."""

    format: int
    kind: str
    minimum_reader: int
    generation: str
    name: str
    parent: str | None
    created_at: str
    created_by: str
    spec: ResolvedSpecJSON
    model: ModelEntryJSON
    dataset: DatasetEntryJSON
    shards: list[ShardEntryJSON]
    skipped: SkipCountsJSON
    statistics: BuildStatisticsJSON
    recall: RecallReportJSON | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallPoint:
    """Recall measured under one choice of options.

    Parameters
    ----------
    options : SearchOptions
        Searched with these.
    recall : float
        Share of the exact best rows that were found, 0 to 1.
    """

    options: SearchOptions
    recall: float

    def to_json(self) -> RecallPointJSON:
        """Return the stored form."""
        return {"options": search_options_json(self.options), "recall": self.recall}

    @classmethod
    def from_json(cls, value: object, place: Place) -> RecallPoint:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=RecallPointJSON)
        return cls(options=fields.get("options", search_options), recall=fields.get("recall", share))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallReport:
    """How well the index finds what an exact search finds.

    Parameters
    ----------
    k : int
        Best rows compared per query.
    queries : int
        Queries measured.
    points : tuple of RecallPoint
        In the order measured.
    defaults : SearchOptions
        What a search uses that does not say otherwise.
    method : str
        How it was measured, for a reader.
    """

    k: int
    queries: int
    points: tuple[RecallPoint, ...]
    defaults: SearchOptions
    method: str

    def to_json(self) -> RecallReportJSON:
        """Return the stored form."""
        return {
            "k": self.k,
            "queries": self.queries,
            "points": [point.to_json() for point in self.points],
            "defaults": search_options_json(self.defaults),
            "method": self.method,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> RecallReport:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=RecallReportJSON)
        return cls(
            k=fields.get("k", positive),
            queries=fields.get("queries", positive),
            points=fields.get("points", each(RecallPoint.from_json)),
            defaults=fields.get("defaults", search_options),
            method=fields.get("method", text),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildStatistics:
    """How the build went.

    Parameters
    ----------
    sampled_rows : int
        Rows trained on.
    training_error : float or None
        Mean squared error of the sample under the model.
    list_imbalance : float or None
        FAISS's imbalance factor of the IVF lists, 1 being even; None without lists.
    seconds : tuple of (str, float)
        Time per phase, in the order of the phases.
    """

    sampled_rows: int
    training_error: float | None
    list_imbalance: float | None
    seconds: tuple[tuple[str, float], ...]

    def to_json(self) -> BuildStatisticsJSON:
        """Return the stored form."""
        return {
            "sampled_rows": self.sampled_rows,
            "training_error": self.training_error,
            "list_imbalance": self.list_imbalance,
            "seconds": [[phase, seconds] for phase, seconds in self.seconds],
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> BuildStatistics:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=BuildStatisticsJSON)
        statistics = cls(
            sampled_rows=fields.get("sampled_rows", integer),
            training_error=fields.get("training_error", optional(number)),
            list_imbalance=fields.get("list_imbalance", optional(number)),
            seconds=fields.get("seconds", each(pair(text, number))),
        )
        distinct([phase for phase, _ in statistics.seconds], place.at("seconds"), what="phase")
        return statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard of a generation; its record says the rest.

    Parameters
    ----------
    record : Reference
        The shard's record, possibly in an older generation's folder.
    indexed_rows : int
        Rows that have an entry.
    physical_rows : int
        Positions, rows without an entry included.
    length_bytes : int
        Of the shard's files together.
    """

    record: Reference
    indexed_rows: int
    physical_rows: int
    length_bytes: int

    def to_json(self) -> ShardEntryJSON:
        """Return the stored form."""
        return {
            "record": self.record.to_json(),
            "indexed_rows": self.indexed_rows,
            "physical_rows": self.physical_rows,
            "length_bytes": self.length_bytes,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> ShardEntry:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ShardEntryJSON)
        entry = cls(
            record=fields.get("record", Reference.from_json),
            indexed_rows=fields.get("indexed_rows", integer),
            physical_rows=fields.get("physical_rows", integer),
            length_bytes=fields.get("length_bytes", positive),
        )
        if fields.clean and entry.indexed_rows > entry.physical_rows:
            place.at("indexed_rows").expected(f"at most {entry.physical_rows} physical rows", entry.indexed_rows)
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """The model of a generation.

    Parameters
    ----------
    record : Reference
        The model's record, possibly in an older generation's folder.
    file : FileEntry
        The trained, empty FAISS index.
    fingerprint : Fingerprint
        What every shard must have been encoded by.
    """

    record: Reference
    file: FileEntry
    fingerprint: Fingerprint

    def to_json(self) -> ModelEntryJSON:
        """Return the stored form."""
        return {
            "record": self.record.to_json(),
            "file": self.file.to_json(),
            "fingerprint": self.fingerprint.to_json(),
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> ModelEntry:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ModelEntryJSON)
        return cls(
            record=fields.get("record", Reference.from_json),
            file=fields.get("file", FileEntry.from_json),
            fingerprint=fields.get("fingerprint", Fingerprint.from_json),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One generation of an index.

    Parameters
    ----------
    generation : str
        Its id.
    name : str
        Index name.
    parent : str or None
        Generation that this one was derived from; None when built anew.
    created_at : str
        ISO 8601 with its offset from UTC.
    created_by : str
        Program and version, for a reader.
    spec : ResolvedSpec
        What was built.
    model : ModelEntry
        The one model of all shards.
    dataset : DatasetEntry
        The dataset at the version that was covered.
    shards : tuple of ShardEntry
        In order of search.
    skipped : SkipCounts
        Rows without an entry, over all shards.
    statistics : BuildStatistics
        How the build went.
    recall : RecallReport or None
        None when it was not measured.
    minimum_reader : int
        The oldest format version whose readers may use this generation.
    """

    kind: ClassVar[str] = "manifest"

    generation: str
    name: str
    parent: str | None
    created_at: str
    created_by: str
    spec: ResolvedSpec
    model: ModelEntry
    dataset: DatasetEntry
    shards: tuple[ShardEntry, ...]
    skipped: SkipCounts
    statistics: BuildStatistics
    recall: RecallReport | None
    minimum_reader: int = 1

    def to_json(self) -> ManifestJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "minimum_reader": self.minimum_reader,
            "generation": self.generation,
            "name": self.name,
            "parent": self.parent,
            "created_at": self.created_at,
            "created_by": self.created_by,
            "spec": resolved_spec_json(self.spec),
            "model": self.model.to_json(),
            "dataset": self.dataset.to_json(),
            "shards": [shard.to_json() for shard in self.shards],
            "skipped": self.skipped.to_json(),
            "statistics": self.statistics.to_json(),
            "recall": None if self.recall is None else self.recall.to_json(),
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> Manifest:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ManifestJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        manifest = cls(
            generation=fields.get("generation", unique_id),
            name=fields.get("name", index_name),
            parent=fields.get("parent", optional(unique_id)),
            created_at=fields.get("created_at", instant),
            created_by=fields.get("created_by", text),
            spec=fields.get("spec", resolved_spec),
            model=fields.get("model", ModelEntry.from_json),
            dataset=fields.get("dataset", DatasetEntry.from_json),
            shards=fields.get("shards", each(ShardEntry.from_json)),
            skipped=fields.get("skipped", SkipCounts.from_json),
            statistics=fields.get("statistics", BuildStatistics.from_json),
            recall=fields.get("recall", optional(RecallReport.from_json)),
            minimum_reader=fields.get("minimum_reader", positive),
        )
        if fields.clean:
            manifest._check(place)
        return manifest

    def _check(self, place: Place) -> None:
        if self.parent == self.generation:
            place.at("parent").expected("another generation than this one", self.parent)
        fingerprint = place.at("model").at("fingerprint")
        if self.model.fingerprint.metric != self.spec.metric:
            fingerprint.at("metric").expected(f"{self.spec.metric}, as in spec", self.model.fingerprint.metric)
        if self.model.fingerprint.dim != self.spec.dim:
            fingerprint.at("dim").expected(f"{self.spec.dim}, as in spec", self.model.fingerprint.dim)
        distinct([shard.record.name for shard in self.shards], place.at("shards"), what="record")
        without_entry = sum(shard.physical_rows - shard.indexed_rows for shard in self.shards)
        if self.skipped.total != without_entry:
            place.at("skipped").report(
                f"{self.skipped.total} rows are counted, but the shards have {without_entry} rows without an entry"
            )
