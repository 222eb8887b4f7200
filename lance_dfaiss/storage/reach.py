"""Which files a manifest leads to, and whether they are all there."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ..errors import DigestMismatch, MissingFile
from ..manifest import FileEntry, Manifest, Reference, decode_model_record, decode_shard_record
from .base import RESTORE_REMEDY, Store, join
from .digests import read_document

__all__ = ["Reach", "check_present", "read_reach"]

_READERS: Final = 8
"""Records read at the same time: each is a small file, far away on an object store."""

_NAMED_FILES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The files of a generation, its manifest aside; some may lie in older generations' folders.

    Parameters
    ----------
    documents : tuple of Reference
        Records of the model and the shards.
    files : tuple of FileEntry
        What these name.
    """

    documents: tuple[Reference, ...]
    files: tuple[FileEntry, ...]

    @property
    def lengths(self) -> dict[str, int]:
        """Length in bytes of every file, by name."""
        lengths = {document.name: document.length_bytes for document in self.documents}
        return lengths | {file.name: file.length_bytes for file in self.files}


def read_reach(store: Store, manifest: Manifest) -> Reach:
    """Follow a manifest to its files.

    Parameters
    ----------
    store : Store
        Where generations lie.
    manifest : Manifest
        Where to begin.

    Raises
    ------
    CorruptIndex
        If a record is missing, damaged or of a newer format: what it leads to is not known then.
    StorageError
        If one could not be read.
    """
    record = manifest.model.record
    trained = decode_model_record(read_document(store, record), location=join(store.location, record.name))
    # The manifest names the model's file too; they are the same unless somebody wrote the manifest by hand.
    files = [manifest.model.file, trained.file, *([] if trained.queries is None else [trained.queries])]
    shards = [shard.record for shard in manifest.shards]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="lance-dfaiss-records") as pool:
        for entries in pool.map(lambda reference: _named_by(store, reference), shards):
            files += entries
    unique = {entry.name: entry for entry in files}
    return Reach(documents=(record, *shards), files=tuple(unique.values()))


def _named_by(store: Store, reference: Reference) -> tuple[FileEntry, ...]:
    location = join(store.location, reference.name)
    return decode_shard_record(read_document(store, reference), location=location).files


def check_present(store: Store, lengths: Mapping[str, int]) -> None:
    """Check that files are there and, where the store tells lengths, as long as they should be.

    One listing per folder; nothing is read.

    Parameters
    ----------
    store : Store
        Where they lie.
    lengths : mapping
        Length in bytes by name.

    Raises
    ------
    MissingFile
        Naming the first few that are not there.
    DigestMismatch
        If one has another length.
    """
    folders = sorted({name.rpartition("/")[0] for name in lengths})
    found = {file.name: file.length_bytes for folder in folders for file in store.list(folder)}
    missing = sorted(set(lengths) - set(found))
    if missing:
        more = f" and {len(missing) - _NAMED_FILES} more" if len(missing) > _NAMED_FILES else ""
        raise MissingFile(
            f"expected {len(lengths)} files at {store.location}, but there is no"
            f" {', '.join(missing[:_NAMED_FILES])}{more}",
            remedy=RESTORE_REMEDY,
            location=join(store.location, missing[0]),
        )
    for name, expected in lengths.items():
        length = found[name]
        if length is not None and length != expected:
            raise DigestMismatch(
                f"expected {expected} bytes in {join(store.location, name)}, found {length}",
                remedy=RESTORE_REMEDY,
                location=join(store.location, name),
                expected=f"{expected} bytes",
                found=f"{length} bytes",
            )
