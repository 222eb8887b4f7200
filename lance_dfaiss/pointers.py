"""Where an index's current generation is written down, read and replaced.

Normally that is the dataset's table metadata: Lance's commit makes it a compare-and-set that is
versioned with the data. For a dataset that cannot be written, the pointer lies beside the
generations under ``index_uri``, as numbered files that are created and never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import CommitConflict, IndexNotFound, ReadOnlyStorage, StorageError, UntrustedLocation
from .lance_io import PinnedDataset
from .manifest import Pointer
from .storage import Store, open_store
from .types import POINTER_PREFIX

__all__ = [
    "IN_DATASET",
    "FoundPointer",
    "find_pointer",
    "find_text",
    "generation_store",
    "pointer_texts",
    "publish",
]

IN_DATASET = "dataset"
"""Value of `Pointer.where` for generations in the dataset's own folder."""

_FOLDER = "pointers"
_FOLDER_CHARACTERS = 200
_MAX_POINTER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPointer:
    """A pointer and the exact text it was read from.

    Parameters
    ----------
    name : str
        Index name.
    pointer : Pointer
        Decoded.
    text : str
        As stored; what a replacement is compared with.
    """

    name: str
    pointer: Pointer
    text: str


def pointer_texts(pinned: PinnedDataset, index_uri: str | None = None) -> dict[str, str]:
    """Return the pointers of all indexes of a dataset version as stored, by name.

    They are not decoded: one that is damaged or of a newer format hides no other, and can be dropped.
    """
    found = {
        key.removeprefix(POINTER_PREFIX): text
        for key, text in pinned.metadata.items()
        if key.startswith(POINTER_PREFIX)
    }
    if index_uri is not None:
        store = open_store(index_uri)
        folders = {file.name.rpartition("/")[0].removeprefix(f"{_FOLDER}/") for file in store.list(_FOLDER)}
        for encoded in folders:
            text = _latest_file(store, encoded)[1]
            if text is not None:
                found[bytes.fromhex(encoded.replace("_/", "")).decode()] = text
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
    name, text = find_text(pinned, name, index_uri)
    return FoundPointer(name=name, pointer=Pointer.from_text(text, location=_location(pinned, name)), text=text)


def find_text(pinned: PinnedDataset, name: str | None, index_uri: str | None = None) -> tuple[str, str]:
    """Return the name and the stored pointer of one index, not decoded; see `find_pointer`."""
    found = pointer_texts(pinned, index_uri)
    names = tuple(found)
    if name is None and len(found) == 1:
        return names[0], found[names[0]]
    if name is not None and name in found:
        return name, found[name]
    wanted = "which index to use was not said" if name is None else f"there is no index {name!r}"
    remedy = f"It has {', '.join(map(repr, names))}" if names else "It has none: build one with create_index"
    raise IndexNotFound(
        f"{wanted} on {pinned.uri} at version {pinned.version}", remedy=remedy, name=name or "", available=names
    )


def generation_store(pinned: PinnedDataset, pointer: Pointer, allowed: Sequence[str] = ()) -> Store:
    """Return the store that a pointer leads to.

    Raises
    ------
    UntrustedLocation
        If it leads outside the dataset root to a place that is not under one of ``allowed``.
    """
    if pointer.where == IN_DATASET:
        return pinned.session_store()
    if not any(_is_under(pointer.where, prefix) for prefix in allowed):
        raise UntrustedLocation(
            f"the index lies outside the dataset, at {pointer.where}",
            remedy=f"If you trust it, pass allowed_index_uris=[{pointer.where!r}]",
            location=pointer.where,
        )
    return open_store(pointer.where)


def publish(
    pinned: PinnedDataset, name: str, pointer: Pointer | None, *, expected: str | None, index_uri: str | None
) -> None:
    """Make a generation current, if the pointer is still what the builder saw.

    Parameters
    ----------
    pinned : PinnedDataset
        Dataset.
    name : str
        Index name.
    pointer : Pointer or None
        New pointer; None drops the index.
    expected : str or None
        Text of the pointer when the builder began; None for none.
    index_uri : str or None
        Holds the pointer when the dataset cannot be written.

    Raises
    ------
    CommitConflict
        If somebody else's generation is current by now.
    ReadOnlyStorage
        If the dataset cannot be written and there is no ``index_uri``.
    """
    text = None if pointer is None else pointer.to_text()
    ours = "(drop)" if pointer is None else pointer.generation
    if index_uri is None or _writable(pinned):
        pinned.commit_pointer(name, expected, text, ours=ours)
        return
    store = open_store(index_uri)
    encoded = _encoded(name)
    number, found = _latest_file(store, encoded)
    if found != expected:
        raise _lost(name, ours, found)
    try:
        store.write(f"{_FOLDER}/{encoded}/{number + 1:08d}.json", (text or "").encode())
    except StorageError as exc:
        found = _latest_file(store, encoded)[1]
        if found != expected:
            raise _lost(name, ours, found) from exc
        raise


def _encoded(name: str) -> str:
    """Return the folder of a name's pointers: its UTF-8 in hex, cut where a file system would find it too long.

    A part that goes on ends in ``_``, so that no name's folder lies inside another's.
    """
    digits = name.encode().hex()
    return "_/".join(digits[start : start + _FOLDER_CHARACTERS] for start in range(0, len(digits), _FOLDER_CHARACTERS))


def _latest_file(store: Store, encoded: str) -> tuple[int, str | None]:
    files = store.list(f"{_FOLDER}/{encoded}")
    if not files:
        return 0, None
    newest = files[-1].name
    text = store.read(newest, max_bytes=_MAX_POINTER_BYTES).decode()
    return int(newest.rpartition("/")[2].removesuffix(".json")), text or None


def _writable(pinned: PinnedDataset) -> bool:
    try:
        pinned.check_writable()
    except ReadOnlyStorage:
        return False
    return True


def _is_under(uri: str, prefix: str) -> bool:
    base = prefix.rstrip("/")
    return ".." not in uri.split("/") and (uri.rstrip("/") == base or uri.startswith(base + "/"))


def _location(pinned: PinnedDataset, name: str) -> str:
    return f"{pinned.uri} (metadata key {POINTER_PREFIX}{name})"


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
