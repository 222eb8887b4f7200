"""An index as it stands at the newest version of its dataset: what every change of an index starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from .._version import __version__
from ..lance_io import LanceDataset, Namespace, PinnedDataset, open_dataset
from ..manifest import DatasetEntry, Manifest, ShardRecord, SkipCounts
from ..pointers import IN_DATASET, find_pointer
from ..search.load import Generation, read_generation
from ..search.resolve import Resolution, resolve_generation
from ..storage import Store
from .commit import mapped_records, publish_manifest, shard_entry, write_records
from .lease import Lease

__all__ = ["CurrentIndex", "open_current"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CurrentIndex:
    """The current generation of an index, resolved against the newest version.

    Parameters
    ----------
    handle : lance.LanceDataset
        As passed in.
    pinned : PinnedDataset
        The newest version.
    generation : Generation
        Documents.
    resolution : Resolution
        How it stands.
    """

    handle: LanceDataset
    pinned: PinnedDataset
    generation: Generation
    resolution: Resolution

    @property
    def store(self) -> Store:
        """Where generations lie."""
        return self.generation.store

    @property
    def manifest(self) -> Manifest:
        """Of the current generation."""
        return self.generation.manifest

    @property
    def index_uri(self) -> str | None:
        """Where generations lie, if not in the dataset."""
        where = self.generation.found.pointer.where
        return None if where == IN_DATASET else where

    @property
    def dataset_entry(self) -> DatasetEntry:
        """The dataset and column as they are now."""
        column = self.resolution.column
        return DatasetEntry(
            uri=self.pinned.root,
            version=self.pinned.version,
            column=column.name,
            field_id=column.field_id,
            value_type=column.type.value_type,
        )

    def with_shards(self, added: Sequence[ShardRecord], version: int) -> CurrentIndex:
        """Return the index with more shards, resolved again.

        Parameters
        ----------
        added : sequence of ShardRecord
            Encoded with the same model.
        version : int
            Dataset version that they were encoded over, this one or an earlier one.
        """
        # Compactions since then are looked for from there on.
        since = replace(self.manifest, dataset=replace(self.manifest.dataset, version=version))
        generation = replace(self.generation, manifest=since, records=(*self.resolution.records, *added))
        resolution = resolve_generation(self.pinned, generation, before=self.resolution)
        return replace(self, generation=generation, resolution=resolution)

    def at_newest(self) -> CurrentIndex:
        """Return this very generation as it stands at the newest version.

        Raises
        ------
        DatasetChanged
            If that version has no such column.
        """
        newest = self.pinned.latest()
        if newest.version == self.pinned.version:
            return self
        resolution = resolve_generation(newest, self.generation, before=self.resolution)
        return replace(self, pinned=newest, resolution=resolution)

    def reopened(self) -> CurrentIndex:
        """Return the index as it stands now.

        Raises
        ------
        IndexNotFound, CorruptIndex, UntrustedLocation, DatasetChanged
            As `open_current` does.
        """
        newest = self.pinned.latest()
        found = find_pointer(newest, self.manifest.name, self.index_uri)
        generation = read_generation(newest, found, () if self.index_uri is None else (self.index_uri,))
        return replace(self, pinned=newest, generation=generation, resolution=resolve_generation(newest, generation))

    def placed_records(self, generation: str) -> list[ShardRecord]:
        """Return `mapped_records` without the shards of which not one row is in this version."""
        positions, _, lengths = self.resolution.snapshot.places.runs
        placed, first = [], 0
        for record in self.mapped_records(generation):
            end = first + record.cover.physical_rows
            if ((positions < end) & (positions + lengths > first)).any():
                placed.append(record)
            first = end
        return placed

    def mapped_records(self, generation: str) -> list[ShardRecord]:
        """Return the shards, those that compactions moved with a record of their own that says so.

        Parameters
        ----------
        generation : str
            Where new records will lie; they are not written yet.
        """
        return mapped_records(self.resolution.records, self.resolution.covers, generation)

    def derive(self, generation: str, records: Sequence[ShardRecord], seconds: float) -> Manifest:
        """Return the manifest of a generation of the same model, over the newest version.

        Parameters
        ----------
        generation : str
            Its id.
        records : sequence of ShardRecord
            Its shards, in order.
        seconds : float
            Time it took.
        """
        old = self.manifest
        return replace(
            old,
            generation=generation,
            parent=old.generation,
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            created_by=f"lance-dfaiss {__version__}",
            dataset=self.dataset_entry,
            shards=tuple(shard_entry(record) for record in records),
            skipped=SkipCounts(
                deleted=sum(record.skipped.deleted for record in records),
                null=sum(record.skipped.null for record in records),
                non_finite=sum(record.skipped.non_finite for record in records),
                zero=sum(record.skipped.zero for record in records),
            ),
            statistics=replace(old.statistics, seconds=(("encode", round(seconds, 3)),)),
        )

    def commit(
        self,
        manifest: Manifest,
        records: Sequence[ShardRecord],
        lease: Lease,
        *,
        others: Sequence[Lease] = (),
        again: bool = False,
    ) -> None:
        """Write the records that are new, and make a generation current.

        Parameters
        ----------
        manifest : Manifest
            Of the new generation.
        records : sequence of ShardRecord
            Its shards.
        lease : Lease
            On it.
        others : sequence of Lease
            On other generations whose files it needs and nothing else protects.
        again : bool
            It was tried before: a manifest of the usual name has been there.

        Raises
        ------
        CommitConflict
            If another writer changed the index meanwhile.
        LeaseExpired, CorruptIndex
            If files may be gone, or are.
        """
        mine = [record for record in records if record.generation == manifest.generation]
        write_records(self.store, [r for r in mine if not self.store.exists(shard_entry(r).record.name)])
        publish_manifest(
            manifest,
            pinned=self.pinned,
            store=self.store,
            previous=self.generation.found,
            index_uri=self.index_uri,
            lease=lease,
            others=others,
            again=again,
        )


def open_current(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    name: str | None,
    *,
    index_uri: str | None,
    allowed_index_uris: Sequence[str],
    storage_options: Mapping[str, str] | None,
    namespace: Namespace | None = None,
) -> CurrentIndex:
    """Open the current generation of an index at the newest version; loads no shard.

    Raises
    ------
    IndexNotFound, CorruptIndex, UntrustedLocation, DatasetChanged
        As `open_index` does.
    """
    handle = open_dataset(dataset, storage_options=storage_options, namespace=namespace)
    pinned = PinnedDataset(handle, storage_options).latest()
    found = find_pointer(pinned, name, index_uri)
    trusted = (*allowed_index_uris, *(() if index_uri is None else (index_uri,)))
    generation = read_generation(pinned, found, trusted)
    return CurrentIndex(
        handle=handle, pinned=pinned, generation=generation, resolution=resolve_generation(pinned, generation)
    )
