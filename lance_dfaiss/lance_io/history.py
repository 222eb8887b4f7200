"""What is still known of the versions before one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import lance

from ..plan import FragmentState, RewriteGroup
from ..types import Int64Array
from .fields import (
    VectorColumn,
    lineage_of,
    signature_of,
    state_of_fragment,
)
from .pinned import PinnedDataset

__all__ = ["DatasetHistory"]

# pylance 14 cannot read back the transaction of a compaction that also moved an index: its native side fills in two
# of this record's five fields, and Python refuses. With defaults for the rest, which are not needed here, it can.
_REWRITTEN_INDEX = cast("Any", lance.LanceOperation.RewrittenIndex)

if _REWRITTEN_INDEX.__init__.__defaults__ is None:
    _REWRITTEN_INDEX.__init__.__defaults__ = ("", b"", 0)


class DatasetHistory:
    """What is still known of the versions of a dataset; each version is opened once.

    Parameters
    ----------
    pinned : PinnedDataset
        The newest version to look at.
    column : VectorColumn
        Whose files tell whether a fragment is the same.
    """

    def __init__(self, pinned: PinnedDataset, column: VectorColumn) -> None:
        self._pinned = pinned
        self._column = column
        self._versions: dict[int, PinnedDataset | None] = {pinned.version: pinned}
        self._fragment_ids: dict[int, frozenset[int]] = {}
        self.reads = 0
        """Versions opened so far."""

    def fragment_ids(self, version: int) -> frozenset[int] | None:
        """Return the fragments of a version; None if it was removed."""
        pinned = self._at(version)
        if pinned is None:
            return None
        if version not in self._fragment_ids:
            self._fragment_ids[version] = frozenset(f.fragment_id for f in pinned.lance.get_fragments())
        return self._fragment_ids[version]

    def rewritten(self, version: int) -> list[RewriteGroup] | None:
        """Return what the compaction that made a version did.

        Nothing, where another operation made it; None where that is not known, or brought back another version.
        """
        try:
            transaction = self._pinned.lance.read_transaction(version)
        except (OSError, ValueError, TypeError):
            return None  # removed with its version, or Lance cannot read what it wrote
        operation = None if transaction is None else transaction.operation
        # What Lance's Python does not name comes as the base class.
        if type(operation) in (type(None), lance.LanceOperation.Restore, lance.LanceOperation.BaseOperation):
            return None
        if not isinstance(operation, lance.LanceOperation.Rewrite):
            return []
        lineage = lineage_of(self._pinned.lance, self._column.field_id)

        def states(metas: Iterable[Any]) -> tuple[FragmentState, ...]:
            return tuple(state_of_fragment(meta, signature_of(meta, lineage)) for meta in metas)

        return [
            RewriteGroup(old=states(group.old_fragments), new=states(group.new_fragments)) for group in operation.groups
        ]

    def live_offsets(self, version: int, fragment_id: int) -> Int64Array | None:
        """Return the offsets of the live rows of a fragment in a version, increasing; None if it was removed."""
        pinned = self._at(version)
        return None if pinned is None else pinned.live_offsets(fragment_id)

    def _at(self, version: int) -> PinnedDataset | None:
        if version not in self._versions:
            self.reads += 1
            try:
                self._versions[version] = PinnedDataset(self._pinned.lance.checkout_version(version))
            except (OSError, ValueError):
                self._versions[version] = None  # Lance raises either for a version that is not there
        return self._versions[version]
