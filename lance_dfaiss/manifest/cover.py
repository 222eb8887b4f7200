"""What a shard covers: its fragments as they were, its row ids, its gaps, and where its rows went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from .runs import RunTable, RunTableJSON, check_ranges, run_table
from .validation import (
    MAX_INTEGER,
    Fields,
    Place,
    distinct,
    each,
    fragment_number,
    fragment_rows,
    integer,
    optional,
    pair,
    positive,
    text,
)

__all__ = [
    "Cover",
    "CoverJSON",
    "FragmentCover",
    "FragmentCoverJSON",
    "FragmentSignature",
    "FragmentSignatureJSON",
    "Remap",
    "RemapJSON",
    "RemapTarget",
    "RemapTargetJSON",
    "check_fragments",
]

_ROW_ID_COLUMNS = 3
_SKIPPED_COLUMNS = 2
_REMAP_COLUMNS = 4
_UPDATED_COLUMNS = 3


class FragmentSignatureJSON(TypedDict):
    """Stored form of a `FragmentSignature`; files are pairs of path and column index."""

    files: list[list[str | int]]
    overlays: list[str]


class _WholeFragmentCoverJSON(TypedDict):
    fragment_id: int
    physical_rows: int
    first_position: int
    signature: FragmentSignatureJSON


class FragmentCoverJSON(_WholeFragmentCoverJSON, total=False):
    """Stored form of a `FragmentCover`; a part is a pair of first offset and rows."""

    part: list[int]


class RemapTargetJSON(TypedDict):
    """Stored form of a `RemapTarget`."""

    fragment_id: int
    physical_rows: int
    signature: FragmentSignatureJSON


class _FirstRemapJSON(TypedDict):
    version: int
    runs: RunTableJSON


class RemapJSON(_FirstRemapJSON, total=False):
    """Stored form of a `Remap`."""

    fragments: list[RemapTargetJSON]


class _FirstCoverJSON(TypedDict):
    physical_rows: int
    fragments: list[FragmentCoverJSON]
    row_ids: RunTableJSON | None
    skipped: RunTableJSON
    deleted: RunTableJSON
    remap: RemapJSON | None


class CoverJSON(_FirstCoverJSON, total=False):
    """Stored form of a `Cover`."""

    updated: RunTableJSON | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentSignature:
    """Where a fragment keeps the values of the indexed field: equal signatures, equal values.

    Parameters
    ----------
    files : tuple of (str, int)
        Path of each data file that holds the leaf field, and the field's column in it; sorted.
    overlays : tuple of str
        Descriptions of what is laid over those files, in order.
    """

    files: tuple[tuple[str, int], ...]
    overlays: tuple[str, ...]

    def to_json(self) -> FragmentSignatureJSON:
        """Return the stored form."""
        return {"files": [[path, column] for path, column in self.files], "overlays": list(self.overlays)}

    @classmethod
    def from_json(cls, value: object, place: Place) -> FragmentSignature:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=FragmentSignatureJSON)
        signature = cls(
            files=fields.get("files", each(pair(text, integer))),
            overlays=fields.get("overlays", each(text)),
        )
        if fields.clean and list(signature.files) != sorted(set(signature.files)):
            place.at("files").report("expected sorted files without repetition")
        return signature


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentCover:
    """One fragment within a shard, or the part of it that the shard has positions for.

    Parameters
    ----------
    fragment_id : int
        Lance's.
    physical_rows : int
        Rows in the fragment's files, deleted ones included.
    first_position : int
        Position of its first row in the shard, or of the first one of the part.
    signature : FragmentSignature
        The fragment when it was read.
    part : tuple of (int, int) or None
        First physical offset and number of rows, deleted ones included, where the shard has only some of a fragment
        that is too large for one; None for all of it.
    """

    fragment_id: int
    physical_rows: int
    first_position: int
    signature: FragmentSignature
    part: tuple[int, int] | None = None

    @property
    def first_offset(self) -> int:
        """Physical offset of the row at the first position."""
        return 0 if self.part is None else self.part[0]

    @property
    def positions(self) -> int:
        """Rows that the shard has a position for."""
        return self.physical_rows if self.part is None else self.part[1]

    def to_json(self) -> FragmentCoverJSON:
        """Return the stored form."""
        stored: FragmentCoverJSON = {
            "fragment_id": self.fragment_id,
            "physical_rows": self.physical_rows,
            "first_position": self.first_position,
            "signature": self.signature.to_json(),
        }
        if self.part is not None:
            stored["part"] = list(self.part)
        return stored

    @classmethod
    def from_json(cls, value: object, place: Place) -> FragmentCover:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=FragmentCoverJSON)
        cover = cls(
            fragment_id=fields.get("fragment_id", fragment_number),
            physical_rows=fields.get("physical_rows", fragment_rows),
            first_position=fields.get("first_position", integer),
            signature=fields.get("signature", FragmentSignature.from_json),
            part=fields.get("part", optional(pair(integer, positive))),
        )
        if fields.clean and cover.part is not None and sum(cover.part) > cover.physical_rows:
            place.at("part").report(f"reaches beyond the {cover.physical_rows} rows of the fragment")
        return cover


@dataclass(frozen=True, slots=True, kw_only=True)
class RemapTarget:
    """A fragment that rows were moved to.

    Parameters
    ----------
    fragment_id : int
        Lance's.
    physical_rows : int
        Rows in the fragment's files.
    signature : FragmentSignature
        The fragment right after the compaction.
    """

    fragment_id: int
    physical_rows: int
    signature: FragmentSignature

    def to_json(self) -> RemapTargetJSON:
        """Return the stored form."""
        return {
            "fragment_id": self.fragment_id,
            "physical_rows": self.physical_rows,
            "signature": self.signature.to_json(),
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> RemapTarget:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=RemapTargetJSON)
        return cls(
            fragment_id=fields.get("fragment_id", fragment_number),
            physical_rows=fields.get("physical_rows", fragment_rows),
            signature=fields.get("signature", FragmentSignature.from_json),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Remap:
    """Where compactions have moved the rows of a shard.

    Parameters
    ----------
    version : int
        Dataset version at which this was proven.
    runs : RunTable
        Width 4: first position, fragment id, first offset in the fragment, length in rows.
    fragments : tuple of RemapTarget
        The fragments that the runs name. Runs into any other fragment prove nothing.
    """

    version: int
    runs: RunTable
    fragments: tuple[RemapTarget, ...] = ()

    def to_json(self) -> RemapJSON:
        """Return the stored form."""
        stored: RemapJSON = {"version": self.version, "runs": self.runs.to_json()}
        if self.fragments:
            stored["fragments"] = [fragment.to_json() for fragment in self.fragments]
        return stored

    @classmethod
    def from_json(cls, value: object, place: Place) -> Remap:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=RemapJSON)
        remap = cls(
            version=fields.get("version", positive),
            runs=fields.get("runs", run_table(_REMAP_COLUMNS)),
            fragments=fields.get("fragments", each(RemapTarget.from_json)),
        )
        if fields.clean:
            distinct([fragment.fragment_id for fragment in remap.fragments], place.at("fragments"), what="fragment")
        return remap


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """The rows of a shard.

    Parameters
    ----------
    physical_rows : int
        Positions of the shard: the sum over its fragments, or their parts.
    fragments : tuple of FragmentCover
        In order of position.
    row_ids : RunTable or None
        Width 3: first position, first row id, length in rows. None without stable row ids.
    skipped : RunTable
        Width 2: first position, length in rows; the rows that have no entry in the index.
    deleted : RunTable
        Width 2, as ``skipped`` and part of it: the rows that the shard does not cover. They were deleted when it was
        encoded, and may live again in a version that was restored; or another shard holds them.
    remap : Remap or None
        None until a compaction has moved rows.
    updated : RunTable or None
        Width 3: first position, version that last wrote the row, length in rows. None without stable row ids.
    """

    physical_rows: int
    fragments: tuple[FragmentCover, ...]
    row_ids: RunTable | None
    skipped: RunTable
    deleted: RunTable
    remap: Remap | None
    updated: RunTable | None = None

    @property
    def fragment_ids(self) -> tuple[int, ...]:
        """Ids of the fragments, in order of position."""
        return tuple(fragment.fragment_id for fragment in self.fragments)

    @property
    def skipped_rows(self) -> int:
        """Rows that have no entry in the index."""
        return sum(self.skipped.rows[:, 1].tolist())

    def to_json(self) -> CoverJSON:
        """Return the stored form."""
        stored: CoverJSON = {
            "physical_rows": self.physical_rows,
            "fragments": [fragment.to_json() for fragment in self.fragments],
            "row_ids": None if self.row_ids is None else self.row_ids.to_json(),
            "skipped": self.skipped.to_json(),
            "deleted": self.deleted.to_json(),
            "remap": None if self.remap is None else self.remap.to_json(),
        }
        if self.updated is not None:
            stored["updated"] = self.updated.to_json()
        return stored

    @classmethod
    def from_json(cls, value: object, place: Place) -> Cover:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=CoverJSON)
        cover = cls(
            physical_rows=fields.get("physical_rows", integer),
            fragments=fields.get("fragments", each(FragmentCover.from_json)),
            row_ids=fields.get("row_ids", optional(run_table(_ROW_ID_COLUMNS))),
            skipped=fields.get("skipped", run_table(_SKIPPED_COLUMNS)),
            deleted=fields.get("deleted", run_table(_SKIPPED_COLUMNS)),
            remap=fields.get("remap", optional(Remap.from_json)),
            updated=fields.get("updated", optional(run_table(_UPDATED_COLUMNS))),
        )
        if fields.clean:
            cover._check(place)
        return cover

    def _check(self, place: Place) -> None:
        rows = check_fragments(self.fragments, place.at("fragments"))
        if rows != self.physical_rows:
            place.at("physical_rows").expected(f"{rows}, the sum over the fragments", self.physical_rows)
        _check_positions(self.skipped, place.at("skipped"), self.physical_rows)
        _check_positions(self.deleted, place.at("deleted"), self.physical_rows)
        _check_inside(self.deleted, self.skipped, place.at("deleted"))
        if self.row_ids is not None:
            _check_row_ids(self.row_ids, place.at("row_ids"), self.physical_rows)
        if self.updated is not None:
            _check_positions(self.updated, place.at("updated"), self.physical_rows)
        if self.remap is not None:
            _check_remap(self.remap, place.at("remap").at("runs"), self.physical_rows)


def check_fragments(fragments: Sequence[FragmentCover], place: Place) -> int:
    """Report fragments that come twice or do not follow one another; return the rows they hold.

    Parameters
    ----------
    fragments : sequence of FragmentCover
        All fragments of a shard.
    place : Place
        Of the list.
    """
    distinct([fragment.fragment_id for fragment in fragments], place, what="fragment")
    end = 0
    for at, fragment in enumerate(fragments):
        if fragment.first_position != end:
            expected = f"{end}, the end of the fragment before it" if at else "0 for the first fragment"
            place.at(at).at("first_position").expected(expected, fragment.first_position)
        # Going on from what is stated reports a wrong number once, not for all that follow.
        end = fragment.first_position + fragment.positions
    return sum(fragment.positions for fragment in fragments)


def _check_positions(table: RunTable, place: Place, physical_rows: int) -> None:
    check_ranges(table.rows[:, 0], table.rows[:, -1], place, limit=physical_rows, what="positions")


def _check_inside(part: RunTable, whole: RunTable, place: Place) -> None:
    """Report positions of one table that another does not have."""
    if not len(part):
        return
    starts, ends = whole.rows[:, 0], whole.rows.sum(axis=1)
    at = np.searchsorted(starts, part.rows[:, 0], side="right").astype(np.int64) - 1
    if (at < 0).any() or (part.rows.sum(axis=1) > ends[at]).any():
        place.report("holds positions that skipped does not")


def _check_row_ids(table: RunTable, place: Place, physical_rows: int) -> None:
    _check_positions(table, place, physical_rows)
    by_id = table.rows[np.argsort(table.rows[:, 1], kind="stable")]
    # The last of all ids means "no row" in results, so no row can have it.
    check_ranges(by_id[:, 1], by_id[:, 2], place, limit=MAX_INTEGER, what="row ids, in order of id")


def _check_remap(remap: Remap, place: Place, physical_rows: int) -> None:
    _check_positions(remap.runs, place, physical_rows)
    held = {fragment.fragment_id: fragment.physical_rows for fragment in remap.fragments}
    rows = remap.runs.rows
    by_target = rows[np.lexsort((rows[:, 2], rows[:, 1]))]
    starts = np.flatnonzero(by_target[1:, 1] != by_target[:-1, 1]) + 1
    for target in np.split(by_target, starts):
        if len(target):
            what = f"offsets in fragment {target[0, 1]}, in order of offset"
            limit = held.get(int(target[0, 1]), MAX_INTEGER)
            check_ranges(target[:, 2], target[:, 3], place, limit=limit, what=what)
