"""Turn finished shards into the current generation: check the dataset, write the manifest, move the pointer."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from .._version import __version__
from ..errors import CommitConflict, DfaissError, ModelMismatch
from ..lance_io import PinnedDataset
from ..manifest import (
    BuildPlan,
    BuildStatistics,
    Cover,
    DatasetEntry,
    Manifest,
    ModelEntry,
    Pointer,
    RecallReport,
    ShardEntry,
    ShardRecord,
    SkipCounts,
    check_cover_disjoint,
    encode,
)
from ..pointers import IN_DATASET, FoundPointer, StoredPointer, absolute_location, never_current, publish
from ..storage import Store, check_present, digest_bytes, read_reach, write_document
from .lease import Lease
from .train import TrainedModel

__all__ = [
    "mapped_records",
    "publish_checked",
    "publish_manifest",
    "shard_entry",
    "write_manifest",
    "write_records",
]

_log = logging.getLogger(__name__)


def write_manifest(
    plan: BuildPlan,
    trained: TrainedModel,
    records: Sequence[ShardRecord],
    *,
    dataset: DatasetEntry,
    recall: RecallReport | None,
    seconds: Sequence[tuple[str, float]],
    parent: str | None = None,
) -> Manifest:
    """Describe the generation, after checking that its shards belong together.

    Parameters
    ----------
    plan : BuildPlan
        What was built.
    trained : TrainedModel
        Its model.
    records : sequence of ShardRecord
        One per task, in order.
    dataset : DatasetEntry
        Version and column that their covers are true of.
    recall : RecallReport or None
        What was measured.
    seconds : sequence of (str, float)
        Time of each phase.
    parent : str, optional
        Generation whose settings it took over.

    Raises
    ------
    ModelMismatch
        If a shard was encoded by another model.
    CoverOverlap
        If two shards cover one fragment.
    """
    check_cover_disjoint(records)
    for record in records:
        if record.fingerprint != trained.model.fingerprint.digest:
            raise ModelMismatch(
                f"shard {record.ordinal} was encoded by model {record.fingerprint[:12]}, this generation's is"
                f" {trained.model.fingerprint.digest[:12]}",
                remedy="Build without resume",
                location=record.index.name,
                expected=trained.model.fingerprint.digest,
                found=record.fingerprint,
            )
    entries = tuple(shard_entry(record) for record in records)
    return Manifest(
        generation=plan.generation,
        name=plan.name,
        parent=parent,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        created_by=f"lance-dfaiss {__version__}",
        spec=plan.spec,
        model=ModelEntry(
            record=digest_bytes(trained.record_name, encode(trained.record)),
            file=trained.record.file,
            fingerprint=trained.record.fingerprint,
        ),
        dataset=dataset,
        shards=entries,
        skipped=_total_skipped(records),
        statistics=BuildStatistics(
            sampled_rows=trained.record.sampled_rows,
            training_error=trained.record.training_error,
            list_imbalance=_imbalance(plan, records),
            seconds=tuple((name, round(value, 3)) for name, value in seconds),
        ),
        recall=recall,
    )


def publish_manifest(
    manifest: Manifest,
    *,
    pinned: PinnedDataset,
    store: Store,
    previous: FoundPointer | None,
    index_uri: str | None,
    lease: Lease,
    others: Sequence[Lease] = (),
    again: bool = False,
) -> None:
    """Write the manifest and make its generation current.

    The manifest marks a generation that may be current. After an error it stays, unless it is certain that it was
    never led to; as long as it is there, nobody but gc deletes files of the generation.

    Parameters
    ----------
    manifest : Manifest
        Complete.
    pinned : PinnedDataset
        Dataset to commit to.
    store : Store
        Where generations lie.
    previous : FoundPointer or None
        The pointer that the build started from.
    index_uri : str or None
        Where generations lie, if not in the dataset.
    lease : Lease
        On the generation.
    others : sequence of Lease
        On other generations whose files it needs and nothing else protects.
    again : bool
        A manifest of the usual name was written and deleted before: no name is used twice.

    Raises
    ------
    CommitConflict
        If another writer was faster.
    LeaseExpired, CorruptIndex
        If files may be gone, or are; the dataset has the index that it had.
    """
    lengths = read_reach(store, manifest).lengths
    check_present(store, lengths)
    lease.check()
    name = f"{manifest.generation}/manifest.json"
    if again or store.exists(name):
        # Of a build that stopped just before its pointer, or of a living twin's: never rewritten, so it keeps its name.
        name = f"{manifest.generation}/manifest-{uuid.uuid4().hex[:12]}.json"
    reference = write_document(store, name, encode(manifest))
    pointer = Pointer(
        generation=manifest.generation,
        where=IN_DATASET if index_uri is None else absolute_location(index_uri),
        root=pinned.root,
        manifest=reference,
        previous=None if previous is None else previous.pointer.generation,
    )
    lengths[reference.name] = reference.length_bytes
    try:
        publish_checked(
            pinned,
            manifest.name,
            pointer,
            store=store,
            lengths=lengths,
            previous=previous,
            index_uri=index_uri,
            leases=(lease, *others),
        )
    except CommitConflict:
        _withdraw(pinned, manifest.name, pointer, store, index_uri)
        raise


def _withdraw(pinned: PinnedDataset, name: str, pointer: Pointer, store: Store, index_uri: str | None) -> None:
    """Delete the manifest of a generation that lost, if it is certain that it was never current."""
    doubt = "another writer may have built on it"
    try:
        if never_current(pinned, name, pointer, index_uri=index_uri):
            store.delete(pointer.manifest.name)
            return
    except DfaissError as failure:
        doubt = str(failure)  # the conflict matters more
    _log.warning("index %r: generation %s is left to gc: %s", name, pointer.generation, doubt)


def publish_checked(
    pinned: PinnedDataset,
    name: str,
    pointer: Pointer,
    *,
    store: Store,
    lengths: Mapping[str, int],
    previous: StoredPointer | None,
    index_uri: str | None,
    leases: Sequence[Lease] = (),
) -> None:
    """Move a pointer to files that are there, and move it back if they were collected at the same moment.

    A collector lists files and leases before it looks at the pointers. So files that are there, under a
    lease that still holds, after the pointer was written, were spared or are pointed to when it looks.

    Parameters
    ----------
    pinned : PinnedDataset
        Dataset to commit to.
    name : str
        Index name.
    pointer : Pointer
        New one.
    store : Store
        Where it leads.
    lengths : mapping
        Length in bytes of every file that the pointer leads to, by name.
    previous : StoredPointer or None
        The pointer to be replaced.
    index_uri : str or None
        As for `publish`.
    leases : sequence of Lease
        On the generations whose files nothing else protects.

    Raises
    ------
    CommitConflict
        If another writer was faster.
    LeaseExpired, CorruptIndex
        If files may be gone, or are; the previous pointer is in place.
    """

    def check() -> None:
        check_present(store, lengths)
        for lease in leases:
            lease.check()

    check()
    written = publish(pinned, name, pointer, previous=previous, index_uri=index_uri)
    try:
        check()
    except BaseException as failure:  # whatever it was: what was not checked does not stay current
        _log.warning("index %r: generation %s is taken back: %r", name, pointer.generation, failure)
        _point_back(pinned, name, written, previous, index_uri)
        raise


def _point_back(
    pinned: PinnedDataset,
    name: str,
    written: StoredPointer | None,
    previous: StoredPointer | None,
    index_uri: str | None,
) -> None:
    try:
        text = None if previous is None else Pointer.from_text(previous.text, location=f"previous pointer of {name!r}")
        publish(pinned, name, text, previous=written, index_uri=index_uri)
    except CommitConflict as conflict:
        # Somebody has replaced ours already: what is current now is theirs to answer for.
        _log.warning("index %r: %s", name, conflict)
    except Exception as exc:  # what made this necessary is raised, and matters more
        _log.error("index %r: the new generation could not be taken back and stays current, unchecked: %r", name, exc)


def mapped_records(records: Sequence[ShardRecord], covers: Sequence[Cover], generation: str) -> list[ShardRecord]:
    """Return shards with what is known of compactions, those that were moved with a record of their own that says so.

    Parameters
    ----------
    records : sequence of ShardRecord
        As they are stored.
    covers : sequence of Cover
        What they cover by now, one each.
    generation : str
        Where new records will lie; they are not written yet.
    """
    return [
        record
        if cover.remap == record.cover.remap
        else replace(record, generation=generation, attempt=uuid.uuid4().hex[:12], cover=cover)
        for record, cover in zip(records, covers, strict=True)
    ]


def write_records(store: Store, records: Sequence[ShardRecord]) -> None:
    """Write records of shards whose files are there."""
    for record in records:
        store.write(shard_entry(record).record.name, encode(record))


def shard_entry(record: ShardRecord) -> ShardEntry:
    """Return how a manifest names a shard."""
    name = f"{record.generation}/shard-{record.ordinal:05d}-{record.attempt}.json"
    return ShardEntry(
        record=digest_bytes(name, encode(record)),
        indexed_rows=record.indexed_rows,
        physical_rows=record.cover.physical_rows,
        length_bytes=record.index.length_bytes + (record.refine.length_bytes if record.refine else 0),
    )


def _total_skipped(records: Sequence[ShardRecord]) -> SkipCounts:
    return SkipCounts(
        deleted=sum(record.skipped.deleted for record in records),
        null=sum(record.skipped.null for record in records),
        non_finite=sum(record.skipped.non_finite for record in records),
        zero=sum(record.skipped.zero for record in records),
    )


def _imbalance(plan: BuildPlan, records: Sequence[ShardRecord]) -> float | None:
    """Rows of the fullest list over the mean, worst shard; 1.0 is perfectly even."""
    if not plan.spec.num_partitions:
        return None
    ratios = [
        (record.largest_list_rows or 0) * plan.spec.num_partitions / record.indexed_rows
        for record in records
        if record.indexed_rows
    ]
    return max(ratios, default=None)
