"""Hypothesis strategies of valid documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from lance_dfaiss.manifest import (
    BuildPlan,
    BuildReport,
    BuildStatistics,
    Cover,
    DatasetEntry,
    Document,
    FileEntry,
    Fingerprint,
    FragmentCover,
    FragmentSignature,
    LeaseDocument,
    Manifest,
    ModelEntry,
    ModelRecord,
    PhaseReport,
    Pointer,
    RecallPoint,
    RecallReport,
    Reference,
    Remap,
    RemapTarget,
    RunTable,
    ShardEntry,
    ShardRecord,
    ShardTask,
    SkipCounts,
    TaskReport,
    root_digest,
)
from lance_dfaiss.spec import ResolvedSpec, SearchOptions
from lance_dfaiss.types import CHUNK_BYTES, METRICS, REFINES

unique_ids = st.uuids().map(str)
attempts = st.text("0123456789abcdef-", min_size=1, max_size=64)
digests = st.binary(max_size=8).map(lambda seed: hashlib.sha256(seed).hexdigest())
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
uris = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
index_names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=200)
counts = st.integers(0, 2**40)
positives = st.integers(1, 2**64 - 1)
amounts = st.floats(0, allow_nan=False, allow_infinity=False)
parts = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)
file_names = st.lists(parts, min_size=1, max_size=3).map("/".join)
references = st.builds(Reference, name=file_names, length_bytes=positives, digest=digests)
metrics = st.sampled_from(METRICS)

signatures = st.builds(
    FragmentSignature,
    files=st.sets(st.tuples(texts, counts), max_size=3).map(lambda files: tuple(sorted(files))),
    overlays=st.lists(texts, max_size=2).map(tuple),
)
datasets = st.builds(
    DatasetEntry,
    uri=uris,
    version=positives,
    column=texts,
    field_id=counts,
    value_type=st.sampled_from(["float", "halffloat"]),
)
specs = st.builds(
    ResolvedSpec,
    index_type=st.sampled_from(["FLAT", "IVF_PQ", "FACTORY"]),
    metric=metrics,
    dim=st.integers(1, 4096),
    factory=texts,
    refine=st.sampled_from([*REFINES, None]),
    num_partitions=counts,
    sample_rate=positives,
    seed=counts,
)
skip_counts = st.builds(SkipCounts, deleted=counts, null=counts, non_finite=counts, zero=counts)
maybe_positive = st.none() | positives
search_options = st.builds(SearchOptions, nprobe=maybe_positive, ef=maybe_positive, k_factor=maybe_positive)
recall_points = st.builds(RecallPoint, options=search_options, recall=st.floats(0, 1))
recall_reports = st.builds(
    RecallReport,
    k=positives,
    queries=positives,
    points=st.lists(recall_points, max_size=3).map(tuple),
    defaults=search_options,
    method=texts,
)
statistics = st.builds(
    BuildStatistics,
    sampled_rows=counts,
    training_error=st.none() | amounts,
    list_imbalance=st.none() | amounts,
    seconds=st.dictionaries(texts, amounts, max_size=4).map(lambda seconds: tuple(seconds.items())),
)


@st.composite
def run_tables(draw: st.DrawFn, width: int) -> RunTable:
    """Any table at all: no invariant of a cover holds."""
    rows = draw(st.lists(st.lists(st.integers(0, 2**64 - 1), min_size=width, max_size=width), max_size=20))
    return RunTable.of(np.array(rows, dtype=np.uint64).reshape(-1, width))


@st.composite
def file_entries(draw: st.DrawFn, prefix: str = "") -> FileEntry:
    length_bytes = draw(st.integers(1, 3 * CHUNK_BYTES))
    needed = -(-length_bytes // CHUNK_BYTES)
    chunks = tuple(draw(st.lists(digests, min_size=needed, max_size=needed)))
    name = prefix + draw(file_names)
    return FileEntry(name=name, length_bytes=length_bytes, digest=root_digest(chunks), chunks=chunks)


@st.composite
def fingerprints(draw: st.DrawFn, spec: ResolvedSpec | None = None) -> Fingerprint:
    part = st.none() | digests
    return Fingerprint.of(
        metric=spec.metric if spec else draw(metrics),
        dim=spec.dim if spec else draw(st.integers(1, 4096)),
        normalized=draw(st.booleans()),
        layout=draw(texts),
        centroids=draw(part),
        codebook=draw(part),
        transforms=draw(part),
        refine=draw(st.none() | texts),
    )


@st.composite
def fragment_lists(draw: st.DrawFn, ids: list[int] | None = None) -> tuple[FragmentCover, ...]:
    chosen = draw(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=5)) if ids is None else ids
    fragments = []
    position = 0
    for fragment_id in chosen:
        rows = draw(st.integers(0, 1000))
        first = draw(st.integers(0, rows))
        part = (first, draw(st.integers(1, rows - first))) if first < rows and draw(st.booleans()) else None
        fragments.append(
            FragmentCover(
                fragment_id=fragment_id,
                physical_rows=rows,
                first_position=position,
                signature=draw(signatures),
                part=part,
            )
        )
        position += fragments[-1].positions
    return tuple(fragments)


@st.composite
def stretches(draw: st.DrawFn, limit: int) -> list[tuple[int, int]]:
    """Ranges (first, length) in ``[0, limit)``, in order and disjoint."""
    edges = sorted(draw(st.sets(st.integers(0, limit), max_size=12)))
    return [(first, end - first) for first, end in zip(edges[::2], edges[1::2], strict=False)]


@st.composite
def covers(draw: st.DrawFn) -> Cover:
    fragments = draw(fragment_lists())
    physical_rows = sum(fragment.positions for fragment in fragments)
    positions = draw(stretches(physical_rows))
    start = draw(st.integers(0, 2**64 - 1 - physical_rows))
    row_ids = [(first, start + first, length) for first, length in positions]
    moved = draw(stretches(physical_rows))
    remap = [(first, first % 3, first, length) for first, length in moved]
    skipped = draw(stretches(physical_rows))
    deleted = [run for run in skipped if draw(st.booleans())]
    return Cover(
        physical_rows=physical_rows,
        fragments=fragments,
        row_ids=draw(st.none() | st.just(_table(row_ids, 3))),
        skipped=_table(skipped, 2),
        deleted=_table(deleted, 2),
        remap=draw(
            st.none() | st.builds(Remap, version=positives, runs=st.just(_table(remap, 4)), fragments=_targets(moved))
        ),
        updated=draw(st.none() | st.just(_table([(first, first + 7, length) for first, length in positions], 3))),
    )


@st.composite
def _targets(draw: st.DrawFn, moved: Sequence[tuple[int, int]]) -> tuple[RemapTarget, ...]:
    """Some of the fragments that rows were moved to, and one that none were."""
    ends = {first % 3: first + length for first, length in moved}
    chosen = draw(st.lists(st.sampled_from([*ends, 99]), unique=True))
    return tuple(
        RemapTarget(
            fragment_id=fragment_id,
            physical_rows=ends.get(fragment_id, 0) + draw(st.integers(0, 9)),
            signature=draw(signatures),
        )
        for fragment_id in chosen
    )


def _table(rows: Sequence[tuple[int, ...]], width: int) -> RunTable:
    return RunTable.of(np.array(rows, dtype=np.uint64).reshape(-1, width))


@st.composite
def split_counts(draw: st.DrawFn, total: int, deleted: int | None = None) -> SkipCounts:
    first = draw(st.integers(0, total)) if deleted is None else deleted
    cuts = sorted(draw(st.lists(st.integers(first, total), min_size=2, max_size=2)))
    return SkipCounts(deleted=first, null=cuts[0] - first, non_finite=cuts[1] - cuts[0], zero=total - cuts[1])


@st.composite
def shard_records(draw: st.DrawFn) -> ShardRecord:
    cover = draw(covers())
    indexed_rows = cover.physical_rows - cover.skipped_rows
    return ShardRecord(
        generation=draw(unique_ids),
        ordinal=draw(counts),
        attempt=draw(attempts),
        fingerprint=draw(digests),
        index=draw(file_entries("index/")),
        refine=draw(st.none() | file_entries("refine/")),
        check=draw(st.none() | file_entries("check/")),
        cover=cover,
        indexed_rows=indexed_rows,
        skipped=draw(split_counts(cover.skipped_rows, deleted=sum(cover.deleted.rows[:, 1].tolist()))),
        training_error=draw(st.none() | amounts),
        largest_list_rows=draw(st.none() | st.integers(0, indexed_rows)),
    )


model_records = st.builds(
    ModelRecord,
    generation=unique_ids,
    attempt=attempts,
    file=file_entries("model/"),
    queries=st.none() | file_entries("queries/"),
    fingerprint=fingerprints(),
    sampled_rows=counts,
    training_error=st.none() | amounts,
    seconds=amounts,
)


@st.composite
def plans(draw: st.DrawFn) -> BuildPlan:
    ids = draw(st.lists(st.integers(0, 100), unique=True, max_size=8))
    cut = draw(st.integers(0, len(ids)))
    groups = [ids[:cut], ids[cut:]]
    return BuildPlan(
        generation=draw(unique_ids),
        name=draw(index_names),
        request=draw(texts),
        spec=draw(specs),
        dataset=draw(datasets),
        previous=draw(st.none() | attempts.map(lambda attempt: attempt[:30])),
        tasks=tuple(
            ShardTask(ordinal=ordinal, fragments=draw(fragment_lists(group))) for ordinal, group in enumerate(groups)
        ),
    )


@st.composite
def shard_entries(draw: st.DrawFn) -> ShardEntry:
    physical_rows = draw(counts)
    return ShardEntry(
        record=draw(references),
        indexed_rows=draw(st.integers(0, physical_rows)),
        physical_rows=physical_rows,
        length_bytes=draw(positives),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    spec = draw(specs)
    shards = draw(st.lists(shard_entries(), max_size=3, unique_by=lambda shard: shard.record.name))
    without_entry = sum(shard.physical_rows - shard.indexed_rows for shard in shards)
    model = ModelEntry(record=draw(references), file=draw(file_entries()), fingerprint=draw(fingerprints(spec)))
    return Manifest(
        generation=draw(unique_ids),
        name=draw(index_names),
        parent=draw(st.none() | attempts.map(lambda attempt: attempt[:30])),
        created_at=draw(st.datetimes().map(lambda time: f"{time.isoformat()}+00:00")),
        created_by=draw(texts),
        spec=spec,
        model=model,
        dataset=draw(datasets),
        shards=tuple(shards),
        skipped=draw(split_counts(without_entry)),
        statistics=draw(statistics),
        recall=draw(st.none() | recall_reports),
    )


pointers = st.builds(
    Pointer,
    generation=unique_ids,
    where=st.just("dataset") | uris,
    root=uris,
    manifest=references,
    previous=st.none() | attempts.map(lambda attempt: attempt[:30]),
)


@st.composite
def leases(draw: st.DrawFn) -> LeaseDocument:
    begins, ends = sorted(draw(st.lists(st.datetimes(), min_size=2, max_size=2)))
    return LeaseDocument(
        generation=draw(unique_ids),
        holder=draw(attempts),
        number=draw(positives),
        root=draw(uris),
        created_at=f"{begins.isoformat()}+00:00",
        expires_at=f"{ends.isoformat()}Z",
    )


reports = st.builds(
    BuildReport,
    generation=unique_ids,
    attempt=attempts,
    created_at=st.datetimes().map(lambda time: f"{time.isoformat()}Z"),
    created_by=texts,
    executor=texts,
    workers=positives,
    seconds=st.floats(0, 1e9),
    phases=st.lists(
        st.builds(PhaseReport, name=texts, seconds=st.floats(0, 1e9), rows=counts, length_bytes=counts),
        max_size=4,
        unique_by=lambda phase: phase.name,
    ).map(tuple),
    tasks=st.lists(
        st.builds(
            TaskReport,
            ordinal=counts,
            rows=counts,
            length_bytes=counts,
            seconds=st.none() | st.floats(0, 1e9),
            attempts=counts,
            worker=st.none() | texts,
            peak_bytes=st.none() | counts,
            losses=st.lists(texts, max_size=2).map(tuple),
        ),
        max_size=4,
        unique_by=lambda task: task.ordinal,
    ).map(tuple),
)


DOCUMENTS: dict[str, Callable[[], st.SearchStrategy[Document]]] = {
    "lease": leases,
    "manifest": manifests,
    "model": lambda: model_records,
    "plan": plans,
    "pointer": lambda: pointers,
    "report": lambda: reports,
    "shard": shard_records,
}
