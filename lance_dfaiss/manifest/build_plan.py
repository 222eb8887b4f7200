"""The plan of a build: what a resumed build reads first, and must find unchanged to go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.types import FORMAT_VERSION

from .cover import FragmentCover, FragmentCoverJSON, check_fragments
from .options import ResolvedSpecJSON, index_name, resolved_spec, resolved_spec_json
from .validation import Fields, Place, constant, distinct, each, integer, optional, positive, text, unique_id, uri

__all__ = [
    "BuildPlan",
    "BuildPlanJSON",
    "DatasetEntry",
    "DatasetEntryJSON",
    "ShardTask",
    "ShardTaskJSON",
]


class DatasetEntryJSON(TypedDict):
    """Stored form of a `DatasetEntry`."""

    uri: str
    version: int
    column: str
    field_id: int
    value_type: str


class ShardTaskJSON(TypedDict):
    """Stored form of a `ShardTask`."""

    ordinal: int
    fragments: list[FragmentCoverJSON]


class BuildPlanJSON(TypedDict):
    """Stored form of a `BuildPlan`."""

    format: int
    kind: str
    generation: str
    name: str
    request: str
    spec: ResolvedSpecJSON
    dataset: DatasetEntryJSON
    previous: str | None
    tasks: list[ShardTaskJSON]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetEntry:
    """The dataset and column that an index is over.

    Parameters
    ----------
    uri : str
        Of the dataset, as it was built from.
    version : int
        Dataset version that was read.
    column : str
        Vector column, dotted for a nested field.
    field_id : int
        Lance's id of the leaf field that holds the values.
    value_type : str
        Type of the vectors' elements.
    """

    uri: str
    version: int
    column: str
    field_id: int
    value_type: str

    def to_json(self) -> DatasetEntryJSON:
        """Return the stored form."""
        return {
            "uri": self.uri,
            "version": self.version,
            "column": self.column,
            "field_id": self.field_id,
            "value_type": self.value_type,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> DatasetEntry:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=DatasetEntryJSON)
        return cls(
            uri=fields.get("uri", uri),
            version=fields.get("version", positive),
            column=fields.get("column", text),
            field_id=fields.get("field_id", integer),
            value_type=fields.get("value_type", text),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """The fragments, or parts of fragments, that become one shard.

    Parameters
    ----------
    ordinal : int
        Number of the task within its build.
    fragments : tuple of FragmentCover
        In order of position.
    """

    ordinal: int
    fragments: tuple[FragmentCover, ...]

    @property
    def physical_rows(self) -> int:
        """Rows of all fragments and parts, deleted ones included."""
        return sum(fragment.positions for fragment in self.fragments)

    @property
    def fragment_ids(self) -> tuple[int, ...]:
        """Ids of the fragments, in order of position."""
        return tuple(fragment.fragment_id for fragment in self.fragments)

    def to_json(self) -> ShardTaskJSON:
        """Return the stored form."""
        return {"ordinal": self.ordinal, "fragments": [fragment.to_json() for fragment in self.fragments]}

    @classmethod
    def from_json(cls, value: object, place: Place) -> ShardTask:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ShardTaskJSON)
        task = cls(
            ordinal=fields.get("ordinal", integer),
            fragments=fields.get("fragments", each(FragmentCover.from_json)),
        )
        if fields.clean:
            check_fragments(task.fragments, place.at("fragments"))
        return task


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """One build: of what, how, in which tasks.

    Parameters
    ----------
    generation : str
        Id of the generation to be built.
    name : str
        Index name.
    request : str
        Identifies what was asked for; a build resumes only under an equal request.
    spec : ResolvedSpec
        What is built.
    dataset : DatasetEntry
        From what.
    previous : str or None
        Generation that is current when the build begins.
    tasks : tuple of ShardTask
        No row is in two of them.
    """

    kind: ClassVar[str] = "plan"

    generation: str
    name: str
    request: str
    spec: ResolvedSpec
    dataset: DatasetEntry
    previous: str | None
    tasks: tuple[ShardTask, ...]

    def to_json(self) -> BuildPlanJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "name": self.name,
            "request": self.request,
            "spec": resolved_spec_json(self.spec),
            "dataset": self.dataset.to_json(),
            "previous": self.previous,
            "tasks": [task.to_json() for task in self.tasks],
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> BuildPlan:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=BuildPlanJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        plan = cls(
            generation=fields.get("generation", unique_id),
            name=fields.get("name", index_name),
            request=fields.get("request", text),
            spec=fields.get("spec", resolved_spec),
            dataset=fields.get("dataset", DatasetEntry.from_json),
            previous=fields.get("previous", optional(unique_id)),
            tasks=fields.get("tasks", each(ShardTask.from_json)),
        )
        if fields.clean:
            plan._check(place)
        return plan

    def _check(self, place: Place) -> None:
        if self.previous == self.generation:
            place.at("previous").expected("another generation than this one", self.previous)
        tasks = place.at("tasks")
        distinct([task.ordinal for task in self.tasks], tasks, what="ordinal")
        owners: dict[int, list[tuple[int, FragmentCover]]] = {}
        for at, task in enumerate(self.tasks):
            for fragment in task.fragments:
                others = owners.setdefault(fragment.fragment_id, [])
                for owner, other in others:
                    if owner != at and _overlap(fragment, other):
                        where = tasks.at(at).at("fragments")
                        where.report(f"fragment {fragment.fragment_id} is in task {owner} of this list too")
                        break
                others.append((at, fragment))


def _overlap(one: FragmentCover, other: FragmentCover) -> bool:
    """Tell whether two covers of a fragment have a row in common; empty fragments count as one row."""
    (first, rows), (second, more) = ((each.first_offset, max(each.positions, 1)) for each in (one, other))
    return first < second + more and second < first + rows
