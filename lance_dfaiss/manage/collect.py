"""`gc`: delete what no version, tag or branch of a dataset leads to any more."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from ..build.lease import CLOCK_MARGIN, holds, newest_terms, read_terms, utc_now
from ..errors import CorruptIndex, InvalidArgument, MissingFile, UnsupportedFormat
from ..lance_io import LanceDataset, PinnedDataset, open_dataset
from ..manifest import Pointer, Reference, decode_manifest, decode_plan
from ..manifest.lease import as_time
from ..pointers import IN_DATASET, absolute_location, pointer_files, store_at, stored_pointers
from ..storage import MAX_DOCUMENT_BYTES, Store, StoredFile, read_document, read_reach
from ..types import POINTER_PREFIX
from .change import is_manifest, read_manifest
from .garbage import Collection, Folder, References, plan_gc

__all__ = ["GcReport", "collect", "gc"]

# Folders are judged only if they are named as builders name them: a place for indexes may hold other things.
_GENERATION: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """What was deleted, or would be.

    Parameters
    ----------
    generations : tuple of str
        Generations of which nothing is left.
    files : tuple of str
        Files, those of other generations and unfinished ones too.
    freed_bytes : int
        Their length together, as far as the store tells lengths.
    kept : mapping
        Every other generation, and why it stays.
    dry_run : bool
        Whether nothing was deleted.
    """

    generations: tuple[str, ...]
    files: tuple[str, ...]
    freed_bytes: int
    kept: Mapping[str, str]
    dry_run: bool


def gc(
    dataset: str | os.PathLike[str] | LanceDataset,
    *,
    dry_run: bool = False,
    keep_previous: int = 1,
    min_age: timedelta = timedelta(hours=1),
    index_uri: str | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> GcReport:
    """Delete the index files that nothing needs any more.

    A file stays when a version of the dataset that still exists leads to it, on any branch, tagged or not;
    run ``cleanup_old_versions`` first to let go of old ones. Also stay: the generations that were current
    before the current ones, whatever is young, whatever a running build holds, and everything of an index
    whose pointers or manifests cannot be read.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset; all of its versions are looked at, and the handle is not moved.
    dry_run : bool
        Only report.
    keep_previous : int
        Generations before the current one that stay for `rollback`.
    min_age : datetime.timedelta
        Generations stay in which anything was written more recently.
    index_uri : str, optional
        Collect there, instead of in the dataset's own folder. Generations of other datasets are not touched; a copy
        of this dataset that shares its generations there is not known: adopt them in the copy first.
    storage_options : mapping, optional
        For a dataset given by URI.

    Raises
    ------
    InvalidArgument
        If ``keep_previous`` is not a whole number, ``min_age`` no timedelta, or either is negative.
    UnsupportedFormat
        If a pointer, or what it leads to, was written by a newer release: what it needs is not known.
    StorageError
        If something could not be read or deleted; run it again.
    """
    _check_arguments(keep_previous, min_age)
    pinned = PinnedDataset(open_dataset(dataset, storage_options=storage_options), storage_options)
    return collect(pinned, dry_run=dry_run, keep_previous=keep_previous, min_age=min_age, index_uri=index_uri)


def collect(
    pinned: PinnedDataset,
    *,
    dry_run: bool,
    keep_previous: int,
    min_age: timedelta,
    index_uri: str | None,
    clock: Callable[[], datetime] = utc_now,
) -> GcReport:
    """Carry out `gc`, by a given clock."""
    store = pinned.session_store() if index_uri is None else store_at(pinned, index_uri)
    # In this order: a builder that is done before the leases are read has moved its pointer before they are.
    survey = _survey(store)
    references = _Seeker(pinned, store, survey, index_uri).references(keep_previous)
    root = None if index_uri is None else pinned.root
    plan = plan_gc(
        [each.folder for each in survey.values()],
        references,
        now=clock(),
        min_age=min_age,
        margin=CLOCK_MARGIN,
        root=root,
    )
    watch = _Watch(pinned, store, index_uri, known=set(references.files))
    return _carry_out(store, plan, survey, watch, dry_run=dry_run, clock=clock)


class _Surveyed(NamedTuple):
    """A folder, and what its documents say of the generation before it."""

    folder: Folder
    stored: list[StoredFile]
    earlier: list[str]


def _survey(store: Store) -> dict[str, _Surveyed]:
    """Look at every generation that is stored."""
    found: dict[str, list[StoredFile]] = {}
    unfinished = [file for file in store.sweep("", dry_run=True) if "/" in file.name]
    listed = store.list("")
    for file in (*listed, *unfinished):
        generation = file.name.partition("/")[0]
        if "/" in file.name and _GENERATION.fullmatch(generation):
            found.setdefault(generation, []).append(file)
    finished = {file.name for file in listed}
    terms = newest_terms(finished)
    return {
        generation: _look_into(store, generation, files, finished, terms.get(generation, []))
        for generation, files in found.items()
    }


def _look_into(
    store: Store, generation: str, stored: list[StoredFile], finished: set[str], terms: Sequence[str]
) -> _Surveyed:
    files = {file.name: file.length_bytes for file in stored if file.name in finished}
    notes = _Notes(times=[file.modified for file in stored if file.modified is not None])
    for name in sorted(files):
        if is_manifest(name):
            notes.try_to(notes.take_manifest, store, name)
        elif name == f"{generation}/plan.json":
            notes.try_to(notes.take_plan, store, name)
    notes.take_terms(store, terms)
    folder = Folder(
        generation=generation,
        files=files,
        names=frozenset(notes.names),
        roots=frozenset(notes.roots),
        newest=max(notes.times, default=None),
        held_until=max(notes.held, default=None),
        unreadable=notes.unreadable,
    )
    return _Surveyed(folder, stored, notes.earlier)


@dataclass(slots=True)
class _Notes:
    """What the documents of one generation say."""

    times: list[datetime]
    names: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    held: list[datetime] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    unreadable: str = ""

    def try_to(self, take: Callable[[Store, str], None], store: Store, name: str) -> None:
        """Take a document, if it can be read."""
        try:
            take(store, name)
        except UnsupportedFormat as exc:
            self.unreadable = exc.message
        except CorruptIndex:
            pass  # damaged or gone: the folder is judged by what else is in it, and nothing points to it

    def take_manifest(self, store: Store, name: str) -> None:
        manifest, _ = read_manifest(store, name)
        self.names.add(manifest.name)
        self.roots.add(manifest.dataset.uri)
        self.earlier += [] if manifest.parent is None else [manifest.parent]
        self._take_time(manifest.created_at)

    def take_plan(self, store: Store, name: str) -> None:
        plan = decode_plan(store.read(name, max_bytes=MAX_DOCUMENT_BYTES), location=f"{store.location}/{name}")
        self.names.add(plan.name)
        self.roots.add(plan.dataset.uri)
        # First: a plan says what was current, a manifest only what it was derived from.
        self.earlier[:0] = [] if plan.previous is None else [plan.previous]

    def take_terms(self, store: Store, names: Iterable[str]) -> None:
        try:
            terms = read_terms(store, names)
        except CorruptIndex as exc:
            self.unreadable = f"a lease on it cannot be read: {exc.message}"
            return
        for term in terms:
            self.roots.add(term.root)
            self.times.append(term.begins)
            if not term.given_back:
                self.held.append(term.ends)

    def _take_time(self, text: str) -> None:
        try:
            self.times.append(as_time(text))
        except ValueError:
            # Digits in the right places, but no such day: as good as none.
            return


class _Seen(NamedTuple):
    """A pointer, and where it was read."""

    name: str
    place: str
    current: bool
    pointer: Pointer


class _Seeker:
    """Finds everything that the pointers of a dataset lead to in one store."""

    def __init__(
        self, pinned: PinnedDataset, store: Store, survey: Mapping[str, _Surveyed], index_uri: str | None
    ) -> None:
        self._pinned = pinned
        self._store = store
        self._survey = survey
        self._index_uri = index_uri
        self._files: dict[str, str] = {}
        self._doubtful: dict[str, str] = {}
        self._earlier: dict[str, list[str]] = {}
        self._seen: list[_Seen] = []

    def references(self, keep_previous: int) -> References:
        """Read all pointers, follow them, and those before the current ones."""
        self._read_pointers()
        for generation, surveyed in self._survey.items():
            self._earlier.setdefault(generation, []).extend(surveyed.earlier)
        followed: set[Reference] = set()
        # The current ones first: theirs is the reason to tell.
        for seen in sorted(self._seen, key=lambda seen: not seen.current):
            if self._is_here(seen.pointer) and seen.pointer.manifest not in followed:
                followed.add(seen.pointer.manifest)
                which = "current" if seen.current else "needed"
                self._follow(seen, f"{which}: index {seen.name!r} in {seen.place}")
        for seen in self._seen:
            for generation in self._before(seen.pointer, keep_previous) if seen.current else ():
                self._keep(seen.name, generation)
        return References(files=self._files, doubtful=self._doubtful)

    def _read_pointers(self) -> None:
        for version in self._pinned.every_version():
            place = f"version {version.version}" + ("" if version.branch is None else f" of branch {version.branch}")
            for key, text in version.metadata.items():
                if key.startswith(POINTER_PREFIX):
                    self._take(key.removeprefix(POINTER_PREFIX), text, place, newest=version.newest)
        if self._index_uri is None:
            return
        for name, texts in pointer_files(self._pinned, self._index_uri).items():
            # Only the newest file counts; from the others we learn what was current before.
            *superseded, newest = texts
            for older in superseded:
                if older is not None:
                    self._take(name, older, "", newest=False)
            if newest is not None:
                self._take(name, newest, f"the pointer under {self._index_uri}", newest=True)

    def _take(self, name: str, text: str, place: str, *, newest: bool) -> None:
        try:
            pointer = Pointer.from_text(text, location=f"pointer of index {name!r}, {place or 'superseded'}")
        except UnsupportedFormat:
            raise
        except CorruptIndex as exc:
            if place:
                self._doubtful[name] = f"the pointer of index {name!r} in {place} is damaged: {exc.message}"
            return
        if pointer.previous is not None:
            self._earlier.setdefault(pointer.generation, []).append(pointer.previous)
        if place:
            self._seen.append(_Seen(name, place, newest, pointer))

    def _is_here(self, pointer: Pointer) -> bool:
        """Tell whether a pointer leads into this store.

        Ids are unique, so the files say it better than the place that was written down, of which there may be several
        spellings. A pointer that a copy of a dataset has inherited leads to nothing here, until files are adopted.
        """
        if pointer.generation in self._survey:
            return True
        here = IN_DATASET if self._index_uri is None else absolute_location(self._index_uri)
        where = pointer.where if pointer.where == IN_DATASET else absolute_location(pointer.where)
        return where == here and (where != IN_DATASET or pointer.root == self._pinned.root)

    def _follow(self, seen: _Seen, reason: str) -> None:
        reference = seen.pointer.manifest
        self._files.setdefault(reference.name, reason)
        try:
            data = read_document(self._store, reference)
            manifest = decode_manifest(data, location=f"{self._store.location}/{reference.name}")
            for name in read_reach(self._store, manifest).lengths:
                self._files.setdefault(name, reason)
        except UnsupportedFormat:
            raise
        except CorruptIndex as exc:
            self._doubtful.setdefault(
                seen.name, f"it is not known what index {seen.name!r} needs ({reason}): {exc.message}"
            )

    def _before(self, pointer: Pointer, count: int) -> list[str]:
        """Return the generations before a current one, nearest first, at most ``count``."""
        seen, waiting = [pointer.generation], [*([] if pointer.previous is None else [pointer.previous])]
        while waiting and len(seen) <= count:
            generation = waiting.pop(0)
            if generation not in seen:
                seen.append(generation)
                waiting += self._earlier.get(generation, [])
        return seen[1:]

    def _keep(self, index: str, generation: str) -> None:
        """Keep a generation that one could roll back to, by any of its manifests."""
        surveyed = self._survey.get(generation)
        for name in [] if surveyed is None else sorted(filter(is_manifest, surveyed.folder.files)):
            reason = f"previous generation of index {index!r}"
            try:
                manifest, _ = read_manifest(self._store, name)
                files = read_reach(self._store, manifest).lengths
            except UnsupportedFormat:
                raise
            except MissingFile:
                continue  # what is not complete cannot be gone back to
            except CorruptIndex as exc:
                self._doubtful.setdefault(index, f"the {reason} is damaged: {exc.message}")
                continue
            for each in (name, *files):
                self._files.setdefault(each, reason)


class _Watch:
    """Looks out for pointers that have moved since the references were read: a rollback may be done in no time."""

    def __init__(self, pinned: PinnedDataset, store: Store, index_uri: str | None, *, known: set[str]) -> None:
        self._pinned = pinned
        self._store = store
        self._index_uri = index_uri
        self._known = known
        self._folders: dict[Reference, set[str]] = {}

    def needs(self, generation: str) -> bool:
        """Tell whether a pointer that is current now leads to a generation, and did not before.

        Raises
        ------
        CorruptIndex, StorageError
            If a pointer that has moved cannot be followed: what it needs is not known.
        """
        newest = self._pinned.latest()
        for place in {None, self._index_uri}:
            for name, stored in stored_pointers(newest, place).items():
                try:
                    pointer = Pointer.from_text(stored.text, location=f"pointer of index {name!r}")
                except UnsupportedFormat:
                    raise
                except CorruptIndex:
                    continue  # if it was damaged before, the plan has spared all of this index
                if pointer.manifest.name not in self._known and generation in self._reach(pointer):
                    return True
        return False

    def _reach(self, pointer: Pointer) -> set[str]:
        reference = pointer.manifest
        if reference not in self._folders:
            names = {reference.name}
            if self._store.exists(reference.name):  # else it leads elsewhere
                data = read_document(self._store, reference)
                manifest = decode_manifest(data, location=f"{self._store.location}/{reference.name}")
                names.update(read_reach(self._store, manifest).lengths)
            self._folders[reference] = {name.partition("/")[0] for name in names}
        return self._folders[reference]


def _carry_out(
    store: Store,
    plan: Collection,
    survey: Mapping[str, _Surveyed],
    watch: _Watch,
    *,
    dry_run: bool,
    clock: Callable[[], datetime],
) -> GcReport:
    kept = dict(plan.kept)
    deleted: list[StoredFile] = []
    wanted = set(plan.files)
    order = {name: at for at, name in enumerate(plan.files)}
    for generation in plan.swept:
        doomed = sorted(
            (file for file in survey[generation].stored if file.name in wanted), key=lambda file: order[file.name]
        )
        if not dry_run and _was_taken_up(store, generation, survey[generation].folder, clock()):
            kept[generation] = "a builder took it up again meanwhile"
            continue
        # After the lease, which whoever moves a pointer to it gives back only then.
        if not dry_run and doomed and watch.needs(generation):
            kept[generation] = "it was made current again meanwhile"
            continue
        for file in doomed if not dry_run else ():
            store.delete(file.name)
        deleted += [*doomed, *store.sweep(generation, dry_run=dry_run)]
    return GcReport(
        generations=tuple(generation for generation in plan.generations if generation not in kept),
        files=tuple(file.name for file in deleted),
        freed_bytes=sum(file.length_bytes or 0 for file in deleted),
        kept=dict(sorted(kept.items())),
        dry_run=dry_run,
    )


def _was_taken_up(store: Store, generation: str, before: Folder, now: datetime) -> bool:
    """Tell whether a lease appeared since the survey: somebody resumes what had been given up."""
    names = newest_terms(file.name for file in store.list(generation) if file.name not in before.files)
    terms = read_terms(store, names.get(generation, []))
    return any(holds(term, now) for term in terms)


def _check_arguments(keep_previous: object, min_age: object) -> None:
    if isinstance(keep_previous, bool) or not isinstance(keep_previous, int):
        raise InvalidArgument(
            f"keep_previous must be a whole number, not {keep_previous!r}",
            parameter="keep_previous",
            value=keep_previous,
        )
    if not isinstance(min_age, timedelta):
        raise InvalidArgument(
            f"min_age must be a datetime.timedelta, not {min_age!r}",
            remedy="Pass timedelta(hours=1), for example",
            parameter="min_age",
            value=min_age,
        )
    for parameter, value, negative in (
        ("keep_previous", keep_previous, keep_previous < 0),
        ("min_age", min_age, min_age < timedelta(0)),
    ):
        if negative:
            raise InvalidArgument(f"{parameter} must not be negative, got {value}", parameter=parameter, value=value)
