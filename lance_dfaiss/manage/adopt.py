"""`adopt_index`: give a copy of a dataset its own files of the index whose pointer it has inherited."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from ..build.commit import publish_checked
from ..build.lease import Lease
from ..errors import InvalidArgument, MissingFile, StorageError
from ..lance_io import LanceDataset, PinnedDataset, move_to_latest, open_dataset
from ..manifest import FileEntry, Pointer, Reference, decode_manifest
from ..pointers import IN_DATASET, FoundPointer, check_allowed, find_pointer
from ..storage import HashingWriter, Store, VerifiedReader, open_store, read_document, read_reach
from ..types import CHUNK_BYTES
from .change import hold_folders, is_manifest

__all__ = ["adopt_index"]


def adopt_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    source: str | os.PathLike[str] | LanceDataset | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
) -> LanceDataset:
    """Copy the files of an inherited index into this dataset, and make them its own.

    A shallow or deep clone, or a copy without its ``_dfaiss`` folder, has the pointer of the index but not its
    files. They are copied under the same names, every byte checked against its digest. Files that are there
    already are checked, not copied; so it can be run again after an interruption. An index that is this
    dataset's own is left as it is. An index under ``index_uri`` is copied into the dataset's folder.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The copy.
    name : str, optional
        Index name; may be left out when there is one.
    source : str, path or lance.LanceDataset, optional
        The dataset that has the files; for an index under ``index_uri``, the place where they lie. By default what
        the pointer says, if that is under one of ``allowed_index_uris``.
    allowed_index_uris : sequence of str
        Places that pointers may lead to.
    storage_options : mapping, optional
        For datasets given by URI, the source among them.

    Returns
    -------
    lance.LanceDataset
        The dataset, moved to the version that owns the index.

    Raises
    ------
    IndexNotFound
        Naming the indexes that exist.
    UntrustedLocation
        If the pointer leads to a place that was not allowed.
    MissingFile, CorruptIndex
        If the source does not have the files, or others.
    LeaseExpired, CommitConflict
        If it took too long, or another writer changed the index at the same time.
    """
    handle = open_dataset(dataset, storage_options=storage_options)
    newest = PinnedDataset(handle, storage_options).latest()
    found = find_pointer(newest, name)
    if found.pointer.where == IN_DATASET and found.pointer.root == newest.root:
        move_to_latest(handle)
        return handle
    newest.check_commits()
    origin = _origin(found, source, allowed_index_uris, newest)
    target = newest.session_store()
    with ExitStack() as stack:
        leases, lengths = _copy(origin, target, found, newest.root, stack)
        pointer = Pointer(
            generation=found.pointer.generation,
            where=IN_DATASET,
            root=newest.root,
            manifest=found.pointer.manifest,
            previous=_known(target, found.pointer.previous),
        )
        publish_checked(
            newest,
            found.name,
            pointer,
            store=target,
            lengths=lengths,
            previous=found,
            index_uri=None,
            leases=leases,
        )
    move_to_latest(handle)
    return handle


def _origin(
    found: FoundPointer,
    source: str | os.PathLike[str] | LanceDataset | None,
    allowed: Sequence[str],
    target: PinnedDataset,
) -> Store:
    """Return the store to copy from, reached with the settings that go with the dataset to copy to."""
    pointer = found.pointer
    inside = pointer.where == IN_DATASET
    if source is None:
        source = pointer.root if inside else pointer.where
        check_allowed(
            source, allowed, remedy=f"If you trust it, pass source={source!r}, or the place where the files are now"
        )
    options = None if isinstance(source, LanceDataset) else target.options_for(os.fspath(source))
    if not inside and not isinstance(source, LanceDataset):
        return open_store(os.fspath(source), options)
    try:
        opened = open_dataset(source, storage_options=options)
    except InvalidArgument as exc:
        raise MissingFile(
            f"the files of index {found.name!r} cannot be reached: there is no dataset at {source}",
            remedy="Pass source=... naming the dataset that has them, or build the index here with"
            " create_index(..., replace=True)",
            location=str(source),
        ) from exc
    return PinnedDataset(opened).session_store()


def _copy(
    origin: Store, target: Store, found: FoundPointer, root: str, stack: ExitStack
) -> tuple[list[Lease], dict[str, int]]:
    """Copy all files of a generation, its manifest last; return the leases on their folders, and their lengths."""
    reference = found.pointer.manifest
    data = read_document(origin, reference)
    manifest = decode_manifest(data, location=f"{origin.location}/{reference.name}")
    reach = read_reach(origin, manifest)
    lengths = {**reach.lengths, reference.name: reference.length_bytes}
    leases = hold_folders(target, lengths, root, stack)
    for entry in reach.files:
        _copy_file(origin, target, entry)
        for lease in leases:
            lease.check()
    for document in (*reach.documents, reference):
        _copy_document(origin, target, document)
    return leases, lengths


def _copy_file(origin: Store, target: Store, entry: FileEntry) -> None:
    def copy() -> None:
        with (
            VerifiedReader(origin, entry) as reader,
            target.create(entry.name) as path,
            HashingWriter(path) as writer,
        ):
            while chunk := reader.read1(CHUNK_BYTES):
                writer.write(chunk)

    def verify() -> None:
        with VerifiedReader(target, entry) as reader:
            while reader.read1(CHUNK_BYTES):
                pass

    _unless_there(target, entry.name, copy, verify)


def _copy_document(origin: Store, target: Store, reference: Reference) -> None:
    _unless_there(
        target,
        reference.name,
        lambda: target.write(reference.name, read_document(origin, reference)),
        lambda: read_document(target, reference),
    )


def _unless_there(target: Store, name: str, copy: Callable[[], object], verify: Callable[[], object]) -> None:
    """Copy a file, or check the one that is there; another adoption may be writing it at this moment."""
    if target.exists(name):
        verify()
        return
    try:
        copy()
    except StorageError:
        if not target.exists(name):
            raise
        verify()


def _known(store: Store, generation: str | None) -> str | None:
    """Return the previous generation if it is stored here too, as after a dataset was moved; a clone has none."""
    if generation is None or not any(is_manifest(file.name) for file in store.list(generation)):
        return None
    return generation
