"""Where an index's current generation is written down, read and replaced.

Normally that is the dataset's table metadata: Lance's commit makes it a compare-and-set that is
versioned with the data. For a dataset that cannot be written, the pointer lies beside the
generations under ``index_uri``, as numbered files that are created and never changed. Once an index
has such files for a dataset, they are what counts for whoever names that ``index_uri``; an empty one
says that the index was dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from .errors import (
    CommitConflict,
    IndexNotFound,
    InvalidArgument,
    ReadOnlyStorage,
    StorageError,
    UntrustedLocation,
)
from .lance_io import PinnedDataset
from .manifest import Pointer
from .storage import FsspecStore, Store, open_store
from .types import POINTER_PREFIX

__all__ = [
    "IN_DATASET",
    "FoundPointer",
    "StoredPointer",
    "absolute_location",
    "check_allowed",
    "find_pointer",
    "find_stored",
    "generation_store",
    "never_current",
    "pointer_files",
    "publish",
    "store_at",
    "stored_pointers",
]

IN_DATASET = "dataset"
"""Value of `Pointer.where` for generations in the dataset's own folder."""

_FOLDER = "pointers"
_FOLDER_CHARACTERS = 200
_MAX_POINTER_BYTES = 64 * 1024


# Their URLs name the container where others have the user: abfss://container@account.
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPointer:
    """A pointer as stored, perhaps damaged or of a newer format.

    Parameters
    ----------
    name : str
        Index name.
    text : str
        As stored; what a replacement is compared with.
    origin : str
        Where it was read: ``"metadata"`` of the dataset or a ``"file"`` under ``index_uri``.
    """

    name: str
    text: str
    origin: Literal["metadata", "file"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPointer(StoredPointer):
    """A pointer, the exact text it was read from, and where.

    Parameters
    ----------
    pointer : Pointer
        Decoded.
    """

    pointer: Pointer


def absolute_location(uri: str) -> str:
    """Return a place for indexes as it is stored and compared: an absolute path, or a URL.

    Parameters
    ----------
    uri : str
        Path, relative ones from the working directory; ``file://`` URL; or any other URL.

    Raises
    ------
    InvalidArgument
        If it holds a user or password: it would be stored for every reader of the dataset to see.
    """
    if not uri or "::" in uri:
        return uri  # refused by whoever opens it
    if "://" not in uri:
        return os.path.abspath(uri)
    parts = urlsplit(uri)
    user, _, host = parts.netloc.rpartition("@")
    if user and (parts.scheme not in _CONTAINER_SCHEMES or ":" in user):
        raise InvalidArgument(
            f"the location {parts.scheme}://{host}{parts.path} was given with a user or password in it",
            remedy="Pass them in storage_options or the environment: a location is stored with the index",
            parameter="index_uri",
            value=f"{parts.scheme}://{host}{parts.path}",
        )
    if parts.scheme in ("file", "local"):
        return os.path.abspath(open_store(uri).location)
    return uri.rstrip("/")


def stored_pointers(pinned: PinnedDataset, index_uri: str | None = None) -> dict[str, StoredPointer]:
    """Return the pointers of all indexes of a dataset version as stored, by name.

    They are not decoded: one that is damaged or of a newer format hides no other, and can be dropped.
    Those under ``index_uri`` go before those in the dataset.
    """
    found: dict[str, StoredPointer] = {}
    for key, text in pinned.metadata.items():
        if key.startswith(POINTER_PREFIX):
            name = key.removeprefix(POINTER_PREFIX)
            found[name] = StoredPointer(name=name, text=text, origin="metadata")
    if index_uri is not None:
        store = store_at(pinned, index_uri)
        base = _base(pinned)
        for folder in {file.name.rpartition("/")[0] for file in store.list(base)}:
            name = _decoded(folder, base)
            file_text = _latest_file(store, folder)[1]
            if file_text is None:
                found.pop(name, None)
            else:
                found[name] = StoredPointer(name=name, text=file_text, origin="file")
    return dict(sorted(found.items()))


def find_pointer(pinned: PinnedDataset, name: str | None, index_uri: str | None = None) -> FoundPointer:
    """Return the pointer of one index.

    Parameters
    ----------
    pinned : PinnedDataset
        Dataset version.
    name : str or None
        Index name; None for the only one there is.
    index_uri : str, optional
        Where to look besides the dataset.

    Raises
    ------
    IndexNotFound
        Naming the indexes that exist.
    CorruptIndex
        If the pointer itself is damaged, or of a newer format.
    """
    stored = find_stored(pinned, name, index_uri)
    if stored.origin == "file":
        location = f"pointer of index {stored.name!r} under {index_uri}"
    else:
        location = f"{pinned.uri} (metadata key {POINTER_PREFIX}{stored.name})"
    return FoundPointer(
        name=stored.name,
        pointer=Pointer.from_text(stored.text, location=location),
        text=stored.text,
        origin=stored.origin,
    )


def find_stored(pinned: PinnedDataset, name: str | None, index_uri: str | None = None) -> StoredPointer:
    """Return the stored pointer of one index, not decoded; see `find_pointer`."""
    found = stored_pointers(pinned, index_uri)
    names = tuple(found)
    if name is None and len(found) == 1:
        return found[names[0]]
    if name is not None and name in found:
        return found[name]
    place = f"{pinned.uri} at version {pinned.version}"
    if not names:
        wanted = f"{place} has no index" if name is None else f"there is no index {name!r} on {place}"
        remedy = "It has none: build one with create_index; pass index_uri if it was built with one"
    elif name is None:
        wanted, remedy = f"{place} has {len(names)} indexes", f"Say which: {', '.join(map(repr, names))}"
    else:
        wanted, remedy = f"there is no index {name!r} on {place}", f"It has {', '.join(map(repr, names))}"
    raise IndexNotFound(wanted, remedy=remedy, name=name or "", available=names)


def generation_store(pinned: PinnedDataset, pointer: Pointer, allowed: Sequence[str] = ()) -> Store:
    """Return the store that a pointer leads to.

    Raises
    ------
    UntrustedLocation
        If it leads outside the dataset root to a place that is not under one of ``allowed``.
    """
    if pointer.where == IN_DATASET:
        return pinned.session_store()
    check_allowed(pointer.where, allowed, remedy=f"If you trust it, pass allowed_index_uris=[{pointer.where!r}]")
    return store_at(pinned, pointer.where)


def store_at(pinned: PinnedDataset, index_uri: str) -> Store:
    """Return the store of a place outside of a dataset, reached with the settings that go with the dataset."""
    return open_store(absolute_location(index_uri), pinned.options_for(index_uri))


def publish(
    pinned: PinnedDataset,
    name: str,
    pointer: Pointer | None,
    *,
    previous: StoredPointer | None,
    index_uri: str | None,
) -> StoredPointer | None:
    """Make a generation current, if the pointer is still what the builder saw.

    A pointer is replaced where it was found. A new one goes to the dataset, or under ``index_uri``
    when the dataset cannot be written.

    Parameters
    ----------
    pinned : PinnedDataset
        Dataset.
    name : str
        Index name.
    pointer : Pointer or None
        New pointer; None drops the index.
    previous : StoredPointer or None
        Pointer when the builder began; None for none.
    index_uri : str or None
        Holds the pointer when the dataset cannot be written.

    Returns
    -------
    StoredPointer or None
        The pointer as it is stored now; None if it was dropped.

    Raises
    ------
    CommitConflict
        If somebody else's generation is current by now.
    ReadOnlyStorage
        If the dataset cannot be written and there is no ``index_uri``.
    UnsafeStorage
        If the store of the pointer does not notice that two write it at once.
    """
    text = None if pointer is None else pointer.to_text()
    ours = "(drop)" if pointer is None else pointer.generation
    in_metadata = previous is None or previous.origin == "metadata"
    expected = None if previous is None else previous.text
    if index_uri is None:
        pinned.commit_pointer(name, expected, text, ours=ours)
        return _written(name, text, "metadata")
    store = store_at(pinned, index_uri)
    folder = f"{_base(pinned)}/{_encoded(name)}"
    number, found = _latest_file(store, folder)
    if in_metadata and number == 0:
        try:
            pinned.check_writable()
            pinned.commit_pointer(name, expected, text, ours=ours)
            return _written(name, text, "metadata")
        except ReadOnlyStorage:
            expected = None  # of the file: there is none
    if found != expected:
        raise _lost(name, ours, found)
    if isinstance(store, FsspecStore):
        store.check_conditional_writes()
    try:
        store.write(f"{folder}/{number + 1:08d}.json", (text or "").encode())
    except StorageError as exc:
        now, found = _latest_file(store, folder)
        if now > number and found == text:
            return _written(name, text, "file")  # written, and only the answer was lost
        if found != expected:
            raise _lost(name, ours, found) from exc
        raise
    return _written(name, text, "file")


def _written(name: str, text: str | None, origin: Literal["metadata", "file"]) -> StoredPointer | None:
    return None if text is None else StoredPointer(name=name, text=text, origin=origin)


def never_current(pinned: PinnedDataset, name: str, pointer: Pointer, *, index_uri: str | None) -> bool:
    """Tell whether it is certain that a pointer which lost against another one was never in place.

    That it is not there now does not say so: it may have been, without the answer having come through, and whoever
    replaced it needs its files. It is certain if what is there replaced the very pointer that this one was to replace,
    or is still, or again, that one.

    Parameters
    ----------
    pinned : PinnedDataset
        The dataset; its newest version is looked at.
    name : str
        Index name.
    pointer : Pointer
        The one that lost.
    index_uri : str or None
        As it was published.

    Raises
    ------
    CorruptIndex, StorageError
        If a pointer could not be read.
    """
    newest = pinned.latest()
    found = {stored_pointers(newest, place).get(name) for place in {None, index_uri}}
    texts = [stored.text for stored in found if stored is not None]
    others = [Pointer.from_text(text, location=f"pointer of index {name!r}") for text in texts]
    return bool(others) and all(
        other.manifest != pointer.manifest
        and other.previous != pointer.generation
        and pointer.previous in (other.previous, other.generation)
        for other in others
    )


def pointer_files(pinned: PinnedDataset, index_uri: str) -> dict[str, list[str | None]]:
    """Return the pointers that were ever written under ``index_uri`` for a dataset, by index name.

    Returns
    -------
    dict of list of str or None
        Texts, the newest last; None where the index was dropped.
    """
    store = store_at(pinned, index_uri)
    base = _base(pinned)
    found: dict[str, list[str | None]] = {}
    for file in store.list(base):
        text = store.read(file.name, max_bytes=_MAX_POINTER_BYTES).decode()
        found.setdefault(_decoded(file.name.rpartition("/")[0], base), []).append(text or None)
    return found


def check_allowed(location: str, allowed: Sequence[str], *, remedy: str) -> None:
    """Refuse a place outside the dataset that is not under one of those allowed.

    Raises
    ------
    UntrustedLocation
        With the remedy given.
    """
    where = absolute_location(location)
    if not any(_is_under(where, absolute_location(prefix)) for prefix in allowed):
        raise UntrustedLocation(f"the index lies outside the dataset, at {location}", remedy=remedy, location=location)


def _base(pinned: PinnedDataset) -> str:
    """Return the folder of a dataset's pointers: other datasets may have theirs in the same place."""
    root = pinned.root if "://" in pinned.root else os.path.abspath(pinned.root)
    return f"{_FOLDER}/{hashlib.sha256(root.encode()).hexdigest()[:16]}"


def _encoded(name: str) -> str:
    """Return the folder of a name's pointers: its UTF-8 in hex, cut where a file system would find it too long.

    A part that goes on ends in ``_``, so that no name's folder lies inside another's.
    """
    digits = name.encode().hex()
    return "_/".join(digits[start : start + _FOLDER_CHARACTERS] for start in range(0, len(digits), _FOLDER_CHARACTERS))


def _decoded(folder: str, base: str) -> str:
    return bytes.fromhex(folder.removeprefix(f"{base}/").replace("_/", "")).decode()


def _latest_file(store: Store, folder: str) -> tuple[int, str | None]:
    """Return the number and the text of the newest file; 0 for none, no text for a dropped index."""
    files = store.list(folder)
    if not files:
        return 0, None
    newest = files[-1].name
    text = store.read(newest, max_bytes=_MAX_POINTER_BYTES).decode()
    return int(newest.rpartition("/")[2].removesuffix(".json")), text or None


def _is_under(uri: str, prefix: str) -> bool:
    base = prefix.rstrip("/")
    return ".." not in uri.split("/") and (uri.rstrip("/") == base or uri.startswith(base + "/"))


def _lost(name: str, ours: str, found: str | None) -> CommitConflict:
    theirs = "" if found is None else Pointer.from_text(found, location=f"pointer of index {name!r}").generation
    return CommitConflict(
        f"index {name!r} was changed by another writer while generation {ours} was built; now there is"
        f" {f'generation {theirs}' if theirs else 'no such index: it was dropped'}",
        remedy="The other index is untouched. Open it, or build again with replace=True",
        name=name,
        ours=ours,
        theirs=theirs,
    )
