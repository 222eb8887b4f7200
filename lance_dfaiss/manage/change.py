"""Change which generation of an index is current, or that it has one: drop, rollback."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from ..build.commit import publish_checked
from ..build.current import CurrentIndex
from ..build.lease import Lease
from ..build.update import new_generation
from ..errors import CorruptIndex, DatasetChanged, MissingFile, NoPreviousGeneration
from ..lance_io import LanceDataset, PinnedDataset, move_to_latest, open_dataset
from ..manifest import Manifest, Pointer, Reference, decode_manifest
from ..pointers import (
    IN_DATASET,
    FoundPointer,
    absolute_location,
    find_pointer,
    find_stored,
    generation_store,
    publish,
    store_at,
)
from ..search.load import read_generation
from ..search.resolve import Resolution, resolve_generation
from ..storage import MAX_DOCUMENT_BYTES, Store, check_present, digest_bytes, read_reach

__all__ = ["drop_index", "hold_folders", "is_manifest", "read_manifest", "rollback"]

_log = logging.getLogger(__name__)


def drop_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str,
    *,
    index_uri: str | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> LanceDataset:
    """Remove an index from the newest version of a dataset.

    Older versions keep it, so its files stay; readers that have it open are not disturbed.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset.
    name : str
        Index name.
    index_uri : str, optional
        Where the index of a dataset that cannot be written was built.
    storage_options : mapping, optional
        For a dataset given by URI.

    Returns
    -------
    lance.LanceDataset
        The dataset, moved to the version without the index.

    Raises
    ------
    IndexNotFound
        Naming the indexes that exist.
    CommitConflict
        If another writer changed the index at the same time.
    """
    handle = open_dataset(dataset, storage_options=storage_options)
    newest = PinnedDataset(handle, storage_options).latest()
    stored = find_stored(newest, name, index_uri)
    publish(newest, name, None, previous=stored, index_uri=index_uri)
    move_to_latest(handle)
    return handle


def rollback(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
) -> LanceDataset:
    """Make the generation current again that was current before; the data are not touched.

    Works after Lance has removed the version that had it: its manifest is found among the index's own files.
    What it does not cover is searched as tail, as always. Rolling back twice returns to where one was.

    Where compactions have moved its rows since, and the current generation knows where to, a new generation of its
    shards is written that says so: it is the former one in all else.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset.
    name : str, optional
        Index name; may be left out when there is one.
    index_uri, allowed_index_uris, storage_options
        As for `open_index`.

    Returns
    -------
    lance.LanceDataset
        The dataset, moved to the version with the changed index.

    Raises
    ------
    IndexNotFound
        Naming the indexes that exist.
    NoPreviousGeneration
        If none was current before.
    MissingFile, CorruptIndex
        If its files are gone, or not what was written.
    CommitConflict
        If another writer changed the index at the same time.
    """
    handle = open_dataset(dataset, storage_options=storage_options)
    newest = PinnedDataset(handle, storage_options).latest()
    found = find_pointer(newest, name, index_uri)
    wanted = found.pointer.previous
    if wanted is None:
        raise NoPreviousGeneration(
            f"index {found.name!r} has no generation before {found.pointer.generation}",
            remedy="Build or update it, or open the dataset at an older version",
            name=found.name,
            generation=found.pointer.generation,
        )
    where, store, reference, lengths = _find_generation(newest, found, wanted, index_uri, allowed_index_uris)
    with ExitStack() as stack:
        # A collector that keeps no previous generations may be about to delete it.
        leases = hold_folders(store, lengths, newest.root, stack)
        former = _moved_on(handle, newest, found, where, reference, index_uri, allowed_index_uris)
        if former is not None:
            generation, lease = stack.enter_context(new_generation(former))
            records = former.mapped_records(generation)
            former.commit(former.derive(generation, records, 0.0), records, lease, others=leases)
        else:
            pointer = Pointer(
                generation=wanted,
                where=where,
                root=newest.root,
                manifest=reference,
                previous=found.pointer.generation,
            )
            publish_checked(
                newest,
                found.name,
                pointer,
                store=store,
                lengths=lengths,
                previous=found,
                index_uri=index_uri,
                leases=leases,
            )
    move_to_latest(handle)
    return handle


def hold_folders(store: Store, names: Iterable[str], root: str, stack: ExitStack) -> list[Lease]:
    """Hold every generation that some files lie in, for a dataset root, until the stack is unwound."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    return [stack.enter_context(Lease.hold(store, folder, root=root)) for folder in folders]


def _moved_on(
    handle: LanceDataset,
    newest: PinnedDataset,
    found: FoundPointer,
    where: str,
    reference: Reference,
    index_uri: str | None,
    allowed: Sequence[str],
) -> CurrentIndex | None:
    """Return the former generation with what the current one knows of compactions; None if that is nothing new."""
    if where != found.pointer.where:
        return None  # records of one place cannot name files of another
    trusted = (*allowed, *(() if index_uri is None else (index_uri,)))
    pointer = replace(found.pointer, generation=found.pointer.previous or "", manifest=reference, previous=None)
    former = read_generation(newest, replace(found, pointer=pointer), trusted)
    try:
        resolution = resolve_generation(newest, former, before=_known_now(newest, found, trusted))
    except DatasetChanged:
        return None  # without its column no row of either is anywhere
    if not resolution.unsaved_rows:
        return None
    # It takes the place of the current pointer, not of the one it had then.
    return CurrentIndex(handle=handle, pinned=newest, generation=replace(former, found=found), resolution=resolution)


def _known_now(newest: PinnedDataset, found: FoundPointer, trusted: Sequence[str]) -> Resolution | None:
    """Return what the current generation knows; None if it is damaged, which may be why one goes back."""
    try:
        return resolve_generation(newest, read_generation(newest, found, trusted))
    except CorruptIndex as exc:
        _log.warning("index %r: going back from a damaged generation: %s", found.name, exc)
        return None


def _find_generation(
    pinned: PinnedDataset, found: FoundPointer, generation: str, index_uri: str | None, allowed: Sequence[str]
) -> tuple[str, Store, Reference, dict[str, int]]:
    """Return where a complete generation lies, its store, its manifest, and the lengths of all its files."""
    failure: CorruptIndex | None = None
    for where, store in _places(pinned, found, index_uri, allowed):
        for file in store.list(generation):
            if not is_manifest(file.name):
                continue
            try:
                manifest, reference = read_manifest(store, file.name)
                if (manifest.name, manifest.generation) != (found.name, generation):
                    continue
                lengths = {**read_reach(store, manifest).lengths, reference.name: reference.length_bytes}
                check_present(store, lengths)
            except CorruptIndex as exc:
                failure = exc  # a twin of the build that was current may have left a manifest without its files
            else:
                return where, store, reference, lengths
    raise failure or MissingFile(
        f"generation {generation}, to which index {found.name!r} would go back, is no longer stored",
        remedy="It was collected: build the index again with create_index(..., replace=True), or open the dataset at"
        " an older version",
        location=generation,
    )


def _places(
    pinned: PinnedDataset, found: FoundPointer, index_uri: str | None, allowed: Sequence[str]
) -> Iterator[tuple[str, Store]]:
    """Yield the places where an earlier generation may lie, the current one's first.

    A pointer kept in a file is not led into the dataset's folder: whoever collects there does not see it.
    """
    trusted = (*allowed, *(() if index_uri is None else (index_uri,)))
    pointer = found.pointer
    yield pointer.where, generation_store(pinned, pointer, trusted)
    if found.origin == "metadata" and pointer.where != IN_DATASET:
        yield IN_DATASET, pinned.session_store()
    if index_uri is not None and pointer.where == IN_DATASET:
        yield absolute_location(index_uri), store_at(pinned, index_uri)


def is_manifest(name: str) -> bool:
    """Tell whether a stored file is a manifest by its name; twins of a build may have left several."""
    base = name.rpartition("/")[2]
    return base.startswith("manifest") and base.endswith(".json")


def read_manifest(store: Store, name: str) -> tuple[Manifest, Reference]:
    """Read a manifest that no pointer vouches for.

    Raises
    ------
    CorruptIndex
        If it is gone, damaged or of a newer format.
    """
    data = store.read(name, max_bytes=MAX_DOCUMENT_BYTES)
    return decode_manifest(data, location=f"{store.location}/{name}"), digest_bytes(name, data)
