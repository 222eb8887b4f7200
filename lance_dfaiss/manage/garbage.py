"""Decide which files of a store may go. Pure: what is stored and what leads to it are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

__all__ = ["Collection", "Folder", "References", "is_document", "plan_gc"]

_OWN_KINDS: Final = ("lease-", "manifest", "model", "queries", "shard-")
"""How the names of files begin that a builder writes; anything else beside a living index is not ours to judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What is stored of one generation.

    Parameters
    ----------
    generation : str
        Its id, the name of the folder.
    files : mapping
        Length in bytes by name; None where the store does not tell.
    names : frozenset of str
        The index, as its documents say; empty if none could be read.
    roots : frozenset of str
        Roots of the datasets that its documents name.
    newest : datetime.datetime or None
        When anything in it was last written; None if nothing tells.
    held_until : datetime.datetime or None
        When the last lease on it ends; None without one.
    unreadable : str
        Why it must not be judged: a document of a newer format, or a lease that cannot be read. Empty if it may be.
    """

    generation: str
    files: Mapping[str, int | None]
    names: frozenset[str]
    roots: frozenset[str]
    newest: datetime | None
    held_until: datetime | None
    unreadable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What must stay.

    Parameters
    ----------
    files : mapping
        Reason by name of every file that a pointer leads to.
    doubtful : mapping
        Reason by name of every index of which it is not known what all of its pointers lead to.
    """

    files: Mapping[str, str]
    doubtful: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What goes and what stays.

    Parameters
    ----------
    generations : tuple of str
        Those of which nothing stays.
    files : tuple of str
        To be deleted in this order: what tells about a generation goes after what it tells about, so that a
        collector that is killed leaves what the next one understands.
    kept : mapping
        Reason by generation.
    swept : tuple of str
        Generations that nobody writes to any more: unfinished files in them may go too.
    """

    generations: tuple[str, ...]
    files: tuple[str, ...]
    kept: Mapping[str, str]
    swept: tuple[str, ...]


def plan_gc(
    folders: Sequence[Folder],
    references: References,
    *,
    now: datetime,
    min_age: timedelta,
    margin: timedelta,
    root: str | None,
) -> Collection:
    """Decide what goes.

    Parameters
    ----------
    folders : sequence of Folder
        Listed before the references were read: what was made current in between is among them.
    references : References
        What must stay.
    now : datetime.datetime
        By the clock of this machine.
    min_age : datetime.timedelta
        A generation stays in which anything is younger.
    margin : datetime.timedelta
        How much longer than it says a lease is respected: clocks differ.
    root : str or None
        Dataset root, in a place that several datasets may share: generations of others stay. None in a dataset's own
        folder, where all that lies there is its own.
    """
    removed: list[str] = []
    kept: dict[str, str] = {}
    files: list[str] = []
    swept: list[str] = []
    for folder in sorted(folders, key=lambda folder: folder.generation):
        reason = _protection(folder, references, now=now, min_age=min_age, margin=margin, root=root)
        if reason:
            kept[folder.generation] = reason
            continue
        swept.append(folder.generation)
        needed = [references.files[name] for name in sorted(folder.files) if name in references.files]
        if needed:
            kept[folder.generation] = needed[0]
            loose = [name for name in folder.files if name not in references.files and _is_own(name)]
        else:
            removed.append(folder.generation)
            loose = list(folder.files)
        files += sorted(loose, key=lambda name: (is_document(name), name))
    return Collection(generations=tuple(removed), files=tuple(files), kept=kept, swept=tuple(swept))


def _protection(
    folder: Folder,
    references: References,
    *,
    now: datetime,
    min_age: timedelta,
    margin: timedelta,
    root: str | None,
) -> str:
    """Return why nothing in a folder may go, whatever leads to it; empty if nothing speaks for it."""
    if root is not None and folder.roots != {root}:
        others = sorted(folder.roots - {root})
        return f"belongs to {others[0]}" if others else "no document in it says to which dataset it belongs"
    if folder.unreadable:
        return folder.unreadable
    if folder.held_until is not None and now < folder.held_until + margin:
        return f"a builder holds it until {folder.held_until.isoformat(timespec='seconds')}"
    if folder.newest is None:
        return "its age is not known"
    if now - folder.newest < min_age:
        return f"younger than {min_age}: last written {folder.newest.isoformat(timespec='seconds')}"
    for name, reason in sorted(references.doubtful.items()):
        if not folder.names or name in folder.names:
            return reason
    return ""


def is_document(name: str) -> bool:
    """Tell whether a file says to what the others in its folder belong."""
    base = name.rpartition("/")[2]
    return base == "plan.json" or (base.startswith(("manifest", "lease-")) and base.endswith(".json"))


def _is_own(name: str) -> bool:
    return name.rpartition("/")[2].startswith(_OWN_KINDS)
