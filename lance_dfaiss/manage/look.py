"""Look at indexes: list, describe, verify. Nothing is changed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CorruptIndex, DatasetChanged
from ..lance_io import LanceDataset, PinnedDataset, open_dataset
from ..manifest import BuildReport, FileEntry, Manifest, Pointer, decode_model_record, decode_report
from ..manifest.lease import as_time
from ..pointers import find_pointer, stored_pointers
from ..progress import PhaseMeter, Progress, SilentProgress
from ..search.load import Generation, read_generation
from ..search.resolve import resolve_generation
from ..storage import MAX_DOCUMENT_BYTES, Store, VerifiedReader, read_document, reading_ahead
from ..types import CHUNK_BYTES

__all__ = ["IndexDescription", "describe_index", "list_indices", "verify_index"]

_log = logging.getLogger(__name__)

_REPORT = re.compile(r"report-[0-9a-f-]+\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDescription:
    """What is stored of an index, and how it stands to the dataset version; nothing of it is loaded.

    Parameters
    ----------
    name : str
        Index name.
    pointer : Pointer
        Where its current generation lies.
    manifest : Manifest
        What that consists of.
    version : int
        Dataset version it was compared with.
    indexed_rows, masked_rows : int
        Rows with an entry, and how many of them are deleted in that version, or not as they were indexed.
    mapped_rows, unsaved_rows : int
        Live indexed rows that compactions moved, and those of them that `sync_index` has yet to write down.
    tail_rows : int
        Live rows without an entry, which every search compares one by one: `update_index` indexes them.
    length_bytes : int
        Of model and shards, as stored and about as loaded.
    stale : str or None
        Why it cannot answer for that version; None when it can.
    build : BuildReport or None
        What building took, if that was asked for and a report is there: of its generation, or else of the one that
        its model was trained for, which updates have added to since.
    """

    name: str
    pointer: Pointer
    manifest: Manifest
    version: int
    indexed_rows: int
    masked_rows: int
    mapped_rows: int
    unsaved_rows: int
    tail_rows: int
    length_bytes: int
    stale: str | None
    build: BuildReport | None = None


def list_indices(
    dataset: str | os.PathLike[str] | LanceDataset,
    *,
    index_uri: str | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the names of the indexes of a dataset, sorted.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset, at the version to look at.
    index_uri : str, optional
        Where to look besides the dataset.
    storage_options : mapping, optional
        For a dataset given by URI.
    """
    pinned = PinnedDataset(open_dataset(dataset, storage_options=storage_options), storage_options)
    return list(stored_pointers(pinned, index_uri))


def describe_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
    build: bool = False,
) -> IndexDescription:
    """Describe an index from its stored documents.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset, at the version to compare with.
    name : str, optional
        Index name; may be left out when there is one.
    index_uri, allowed_index_uris, storage_options
        As for `open_index`.
    build : bool
        Look for the report of the build, too: its phases and tasks. A report that cannot be read is logged and
        left out.

    Raises
    ------
    IndexNotFound, CorruptIndex, UntrustedLocation
        As for `open_index`.
    """
    pinned, generation = _generation(dataset, name, index_uri, allowed_index_uris, storage_options)
    manifest = generation.manifest
    indexed = sum(shard.indexed_rows for shard in manifest.shards)
    resolution, stale = None, None
    try:
        resolution = resolve_generation(pinned, generation)
    except DatasetChanged as exc:
        stale = exc.message
    snapshot = None if resolution is None else resolution.snapshot
    return IndexDescription(
        name=manifest.name,
        pointer=generation.found.pointer,
        manifest=manifest,
        version=pinned.version,
        indexed_rows=indexed,
        masked_rows=0 if snapshot is None else snapshot.masked_rows,
        mapped_rows=0 if snapshot is None else snapshot.mapped_rows,
        unsaved_rows=0 if resolution is None else resolution.unsaved_rows,
        tail_rows=0 if snapshot is None else snapshot.tail_rows,
        length_bytes=manifest.model.file.length_bytes + sum(shard.length_bytes for shard in manifest.shards),
        stale=stale,
        build=_newest_report(generation) if build else None,
    )


def verify_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[CorruptIndex]:
    """Read every byte of an index again and compare digests.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset.
    name : str, optional
        Index name; may be left out when there is one.
    index_uri, allowed_index_uris, storage_options, progress
        As for `open_index`.

    Returns
    -------
    list of CorruptIndex
        One error per damaged or missing file; empty when all is well.

    Raises
    ------
    IndexNotFound, UntrustedLocation
        As for `open_index`.
    CorruptIndex
        If a document is damaged, so that the files behind it are not known.
    """
    _, generation = _generation(dataset, name, index_uri, allowed_index_uris, storage_options)
    meter = PhaseMeter(SilentProgress() if progress is None else progress, "verify")
    faults: list[CorruptIndex] = []
    entries = _files(generation, faults)
    with reading_ahead(generation.store, entries) as store:
        for entry in entries:
            try:
                with VerifiedReader(store, entry) as reader:
                    while chunk := reader.read(CHUNK_BYTES):
                        meter.add(0, len(chunk))
            except CorruptIndex as exc:
                faults.append(exc)
    meter.finish()
    return faults


def _generation(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None,
    index_uri: str | None,
    allowed: Sequence[str],
    storage_options: Mapping[str, str] | None,
) -> tuple[PinnedDataset, Generation]:
    pinned = PinnedDataset(open_dataset(dataset, storage_options=storage_options), storage_options)
    found = find_pointer(pinned, name, index_uri)
    trusted = (*allowed, *(() if index_uri is None else (index_uri,)))
    return pinned, read_generation(pinned, found, trusted)


def _newest_report(generation: Generation) -> BuildReport | None:
    """Return what the last run of a build took: of this generation, else of the one that its model was made for."""
    trained = generation.manifest.model.file.name.partition("/")[0]
    for folder in dict.fromkeys([generation.manifest.generation, trained]):
        found = _reports(generation.store, folder)
        if found:
            return max(found, key=lambda report: as_time(report.created_at))
    return None


def _reports(store: Store, folder: str) -> list[BuildReport]:
    found: list[BuildReport] = []
    for file in store.list(folder):
        if not _REPORT.fullmatch(file.name.removeprefix(f"{folder}/")):
            continue
        try:
            data = store.read(file.name, max_bytes=MAX_DOCUMENT_BYTES)
            found.append(decode_report(data, location=f"{store.location}/{file.name}"))
        except CorruptIndex as exc:
            _log.warning("a report of the build is left out: %s", exc)
    return found


def _files(generation: Generation, faults: list[CorruptIndex]) -> list[FileEntry]:
    """Return every file of a generation that is no document; a damaged record of the model goes to the faults."""
    model = generation.manifest.model
    entries = [model.file]
    try:
        data = read_document(generation.store, model.record)
        trained = decode_model_record(data, location=f"{generation.store.location}/{model.record.name}")
        entries += [] if trained.queries is None else [trained.queries]
    except CorruptIndex as exc:
        faults.append(exc)
    for record in generation.records:
        entries += record.files
    return entries
