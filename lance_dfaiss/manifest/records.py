"""What tasks leave behind when they end well: the record of the model and of each shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Final, TypedDict

import numpy as np

from lance_dfaiss.errors import CoverOverlap
from lance_dfaiss.types import FORMAT_VERSION, METRICS, Metric

from .codec import canonical_json
from .cover import Cover, CoverJSON, FragmentCover, FragmentSignature
from .files import FileEntry, FileEntryJSON
from .validation import (
    Fields,
    Place,
    boolean,
    constant,
    integer,
    number,
    one_of,
    optional,
    positive,
    sha256_hex,
    text,
    unique_id,
)

__all__ = [
    "Fingerprint",
    "FingerprintJSON",
    "ModelRecord",
    "ModelRecordJSON",
    "ShardRecord",
    "ShardRecordJSON",
    "SkipCounts",
    "SkipCountsJSON",
    "check_cover_disjoint",
]

_NAMED_FRAGMENTS: Final = 10


class SkipCountsJSON(TypedDict):
    """Stored form of `SkipCounts`."""

    deleted: int
    null: int
    non_finite: int
    zero: int


class FingerprintJSON(TypedDict):
    """Stored form of a `Fingerprint`."""

    digest: str
    metric: str
    dim: int
    normalized: bool
    layout: str
    centroids: str | None
    codebook: str | None
    transforms: str | None
    refine: str | None


class ShardRecordJSON(TypedDict):
    """Stored form of a `ShardRecord`."""

    format: int
    kind: str
    generation: str
    ordinal: int
    attempt: str
    fingerprint: str
    index: FileEntryJSON
    refine: FileEntryJSON | None
    check: FileEntryJSON | None
    cover: CoverJSON
    indexed_rows: int
    skipped: SkipCountsJSON
    training_error: float | None
    largest_list_rows: int | None


class ModelRecordJSON(TypedDict):
    """Stored form of a `ModelRecord`."""

    format: int
    kind: str
    generation: str
    attempt: str
    file: FileEntryJSON
    queries: FileEntryJSON | None
    fingerprint: FingerprintJSON
    sampled_rows: int
    training_error: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCounts:
    """Rows that have no entry in an index, by reason.

    Parameters
    ----------
    deleted : int
        Deleted from the dataset before they were read.
    null : int
        The row is null, or an element of its vector is.
    non_finite : int
        NaN or Inf in the vector.
    zero : int
        A zero vector under cosine.
    """

    deleted: int
    null: int
    non_finite: int
    zero: int

    @property
    def total(self) -> int:
        """Rows skipped for any reason."""
        return self.deleted + self.null + self.non_finite + self.zero

    def to_json(self) -> SkipCountsJSON:
        """Return the stored form."""
        return {"deleted": self.deleted, "null": self.null, "non_finite": self.non_finite, "zero": self.zero}

    @classmethod
    def from_json(cls, value: object, place: Place) -> SkipCounts:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=SkipCountsJSON)
        return cls(
            deleted=fields.get("deleted", integer),
            null=fields.get("null", integer),
            non_finite=fields.get("non_finite", integer),
            zero=fields.get("zero", integer),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What makes shards fit together: only shards encoded by models of equal fingerprint merge.

    Parameters
    ----------
    digest : str
        sha256 of the canonical JSON of the other fields; `Fingerprint.of` computes it.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    dim : int
        Dimension of the vectors that go in.
    normalized : bool
        Whether vectors are scaled to length 1 before they are encoded.
    layout : str
        Structure of the FAISS index.
    centroids, codebook, transforms : str or None
        Digests of the trained parts; None where there is no such part.
    refine : str or None
        The refine store, None for none.
    """

    digest: str
    metric: Metric
    dim: int
    normalized: bool
    layout: str
    centroids: str | None
    codebook: str | None
    transforms: str | None
    refine: str | None

    @classmethod
    def of(
        cls,
        *,
        metric: Metric,
        dim: int,
        normalized: bool,
        layout: str,
        centroids: str | None,
        codebook: str | None,
        transforms: str | None,
        refine: str | None,
    ) -> Fingerprint:
        """Return the fingerprint of these fields, with its digest computed."""
        unsigned = cls(
            digest="",
            metric=metric,
            dim=dim,
            normalized=normalized,
            layout=layout,
            centroids=centroids,
            codebook=codebook,
            transforms=transforms,
            refine=refine,
        )
        return replace(unsigned, digest=unsigned._computed_digest())

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Return the names of the fields, other than the digest, in which the two differ."""
        theirs = other._facts()
        return tuple(name for name, ours in self._facts().items() if ours != theirs[name])

    def to_json(self) -> FingerprintJSON:
        """Return the stored form."""
        return {
            "digest": self.digest,
            "metric": self.metric,
            "dim": self.dim,
            "normalized": self.normalized,
            "layout": self.layout,
            "centroids": self.centroids,
            "codebook": self.codebook,
            "transforms": self.transforms,
            "refine": self.refine,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> Fingerprint:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=FingerprintJSON)
        fingerprint = cls(
            digest=fields.get("digest", sha256_hex),
            metric=fields.get("metric", one_of(METRICS)),
            dim=fields.get("dim", positive),
            normalized=fields.get("normalized", boolean),
            layout=fields.get("layout", text),
            centroids=fields.get("centroids", optional(text)),
            codebook=fields.get("codebook", optional(text)),
            transforms=fields.get("transforms", optional(text)),
            refine=fields.get("refine", optional(text)),
        )
        if fields.clean and fingerprint.digest != fingerprint._computed_digest():
            place.at("digest").expected(f"{fingerprint._computed_digest()} for these fields", fingerprint.digest)
        return fingerprint

    def _facts(self) -> dict[str, object]:
        return {name: value for name, value in self.to_json().items() if name != "digest"}

    def _computed_digest(self) -> str:
        return hashlib.sha256(canonical_json(self._facts()).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What one shard task has written: the proof that the task is done.

    Parameters
    ----------
    generation : str
        The generation that the shard was written for.
    ordinal : int
        Number of the shard's task in that generation.
    attempt : str
        The attempt that wrote the files.
    fingerprint : str
        Digest of the fingerprint of the model that encoded the shard.
    index : FileEntry
        The searchable part.
    refine : FileEntry or None
        The refine store.
    check : FileEntry or None
        Exact best rows for the held-out queries, from which recall is measured.
    cover : Cover
        The rows.
    indexed_rows : int
        Rows that have an entry.
    skipped : SkipCounts
        Rows that have none: together with ``indexed_rows`` all physical rows, and as many as ``cover.skipped`` says.
    training_error : float or None
        Mean squared error of encoding this shard's rows.
    largest_list_rows : int or None
        Rows in the fullest IVF list; None without lists.
    """

    kind: ClassVar[str] = "shard"

    generation: str
    ordinal: int
    attempt: str
    fingerprint: str
    index: FileEntry
    refine: FileEntry | None
    check: FileEntry | None
    cover: Cover
    indexed_rows: int
    skipped: SkipCounts
    training_error: float | None
    largest_list_rows: int | None

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files there are, the index first."""
        return tuple(entry for entry in (self.index, self.refine, self.check) if entry is not None)

    def to_json(self) -> ShardRecordJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "ordinal": self.ordinal,
            "attempt": self.attempt,
            "fingerprint": self.fingerprint,
            "index": self.index.to_json(),
            "refine": None if self.refine is None else self.refine.to_json(),
            "check": None if self.check is None else self.check.to_json(),
            "cover": self.cover.to_json(),
            "indexed_rows": self.indexed_rows,
            "skipped": self.skipped.to_json(),
            "training_error": self.training_error,
            "largest_list_rows": self.largest_list_rows,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> ShardRecord:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ShardRecordJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        record = cls(
            generation=fields.get("generation", unique_id),
            ordinal=fields.get("ordinal", integer),
            attempt=fields.get("attempt", unique_id),
            fingerprint=fields.get("fingerprint", sha256_hex),
            index=fields.get("index", FileEntry.from_json),
            refine=fields.get("refine", optional(FileEntry.from_json)),
            check=fields.get("check", optional(FileEntry.from_json)),
            cover=fields.get("cover", Cover.from_json),
            indexed_rows=fields.get("indexed_rows", integer),
            skipped=fields.get("skipped", SkipCounts.from_json),
            training_error=fields.get("training_error", optional(number)),
            largest_list_rows=fields.get("largest_list_rows", optional(integer)),
        )
        if fields.clean:
            record._check(place)
        return record

    def _check(self, place: Place) -> None:
        names = [entry.name for entry in self.files]
        if len(set(names)) != len(names):
            place.report("index, refine and check name the same file")
        physical_rows = self.cover.physical_rows
        if self.indexed_rows + self.skipped.total != physical_rows:
            place.at("indexed_rows").expected(
                f"{physical_rows} physical rows less {self.skipped.total} skipped ones", self.indexed_rows
            )
        if self.cover.skipped_rows != self.skipped.total:
            place.at("skipped").report(
                f"{self.skipped.total} rows are counted, but cover.skipped holds {self.cover.skipped_rows}"
            )
        deleted = sum(self.cover.deleted.rows[:, 1].tolist())
        if deleted != self.skipped.deleted:
            place.at("skipped").at("deleted").expected(f"{deleted}, as cover.deleted holds", self.skipped.deleted)
        if self.largest_list_rows is not None and self.largest_list_rows > self.indexed_rows:
            place.at("largest_list_rows").expected(f"at most {self.indexed_rows} indexed rows", self.largest_list_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What training has written.

    Parameters
    ----------
    generation, attempt : str
        The generation trained for, and the attempt that wrote the files.
    file : FileEntry
        The trained, empty FAISS index.
    queries : FileEntry or None
        The held-out queries that recall is measured with.
    fingerprint : Fingerprint
        Of the model.
    sampled_rows : int
        Rows trained on.
    training_error : float or None
        Mean squared error of the sample under the model.
    seconds : float
        Time spent on sampling and training.
    """

    kind: ClassVar[str] = "model"

    generation: str
    attempt: str
    file: FileEntry
    queries: FileEntry | None
    fingerprint: Fingerprint
    sampled_rows: int
    training_error: float | None
    seconds: float

    def to_json(self) -> ModelRecordJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "attempt": self.attempt,
            "file": self.file.to_json(),
            "queries": None if self.queries is None else self.queries.to_json(),
            "fingerprint": self.fingerprint.to_json(),
            "sampled_rows": self.sampled_rows,
            "training_error": self.training_error,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> ModelRecord:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ModelRecordJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        record = cls(
            generation=fields.get("generation", unique_id),
            attempt=fields.get("attempt", unique_id),
            file=fields.get("file", FileEntry.from_json),
            queries=fields.get("queries", optional(FileEntry.from_json)),
            fingerprint=fields.get("fingerprint", Fingerprint.from_json),
            sampled_rows=fields.get("sampled_rows", integer),
            training_error=fields.get("training_error", optional(number)),
            seconds=fields.get("seconds", number),
        )
        if fields.clean and record.queries is not None and record.queries.name == record.file.name:
            place.at("queries").at("name").report("file and queries name the same file")
        return record


def check_cover_disjoint(records: Iterable[ShardRecord]) -> None:
    """Check that no row is covered by two shards.

    Two shards may share a fragment: each has a part of it (`FragmentCover.part`), or leaves the rows of the other out
    (`Cover.deleted`). A fragment
    whose vectors were rewritten in place has another signature, and is another one here.

    Parameters
    ----------
    records : iterable of ShardRecord
        All shards of one generation.

    Raises
    ------
    CoverOverlap
        Naming the fragments of which more than one shard claims a row.
    """
    claims: dict[tuple[int, FragmentSignature], list[tuple[ShardRecord, FragmentCover]]] = {}
    for record in records:
        for fragment in record.cover.fragments:
            claims.setdefault((fragment.fragment_id, fragment.signature), []).append((record, fragment))
    claimed: set[int] = set()
    location = ""
    for (fragment_id, _), sharers in claims.items():
        if len(sharers) > 1 and _overlap(sharers):
            claimed.add(fragment_id)
            location = location or " and ".join(record.index.name for record, _ in sharers[:2])
    if claimed:
        fragments = tuple(sorted(claimed))
        named = ", ".join(map(str, fragments[:_NAMED_FRAGMENTS]))
        more = f" and {len(fragments) - _NAMED_FRAGMENTS} more" if len(fragments) > _NAMED_FRAGMENTS else ""
        raise CoverOverlap(
            f"expected each row in one shard, found fragments {named}{more} in several, first in {location}",
            remedy="Rebuild the index: its shards do not belong together",
            location=location,
            fragments=fragments,
        )


def _overlap(sharers: list[tuple[ShardRecord, FragmentCover]]) -> bool:
    """Tell whether a row of one fragment is covered twice.

    By runs: a fragment of which there are parts is a large one, and a byte per row of it would be too much.
    """
    starts, ends = [], []
    for record, fragment in sharers:
        first, end = fragment.first_position, fragment.first_position + fragment.positions
        gaps = record.cover.deleted.rows.astype(np.int64)
        shift = fragment.first_offset - first
        starts.append(np.append(first, gaps.sum(axis=1).clip(first, end)) + shift)
        ends.append(np.append(gaps[:, 0].clip(first, end), end) + shift)
    start, stop = np.concatenate(starts), np.concatenate(ends)
    held = np.flatnonzero(start < stop)
    order = held[np.argsort(start[held], kind="stable")]
    return bool((start[order[1:]] < stop[order[:-1]]).any())
