"""A real dataset with its branches and clones, everything that happens to it, and what must hold afterwards.

Every operation is a method that returns what became of it in a word or two, for the statistics. Those of
Lance may be refused by Lance; those of the package only for a reason that is known beforehand.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import Index
from lance_dfaiss.errors import (
    DatasetChanged,
    DfaissError,
    IndexNotFound,
    InsufficientData,
    InvalidVectors,
    MissingFile,
    NoPreviousGeneration,
    UnknownColumn,
)
from lance_dfaiss.lance_io import move_to_latest
from lance_dfaiss.types import IndexType, Metric
from tests.living.truth import DIM, FILTERS, NO_FILTER, Filter, Truth, first_schema, make_rows, vector_name

__all__ = ["INDEX_NAMES", "LANCE_REFUSES", "Line", "World"]

INDEX_NAMES = ("first", "second")

LANCE_REFUSES = (OSError, ValueError, RuntimeError, NotImplementedError, KeyError)
"""What Lance raises when it does not want to; its Rust side knows few classes."""

_MOST_ROWS = 400
_MOST_LINES = 5
_KEY = "lance_dfaiss."
_NO_AGE = timedelta(0)


@dataclass
class Line:
    """A succession of versions: the main branch, another branch, or either of a clone.

    Attributes
    ----------
    root : Path
        Of the dataset's main branch.
    branch : str or None
        None for main.
    handle : lance.LanceDataset
        At the newest version.
    leans_on : Path or None
        Root of the dataset that a shallow clone reads.
    cloned : bool
        Whether the dataset is a clone, so that it may lack an index's files.
    living : dict
        Indexes opened long ago and refreshed since, with what was true when they were.
    """

    root: Path
    branch: str | None
    handle: lance.LanceDataset
    leans_on: Path | None = None
    cloned: bool = False
    living: dict[str, tuple[Index, Truth]] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        return self.handle.schema

    @property
    def vector(self) -> str:
        """Name of the vector column; ``vec`` when there is none."""
        return vector_name(self.schema) or "vec"

    @property
    def versions(self) -> list[int]:
        return [int(version["version"]) for version in self.handle.versions()]

    def at(self, version: int) -> lance.LanceDataset:
        return self.handle.checkout_version((self.branch, version))

    def ids(self) -> list[int]:
        return list(self.handle.to_table(columns=["id"])["id"].to_pylist())


class World:
    """Everything there is.

    Parameters
    ----------
    folder : Path
        Empty, of its own.
    stable : bool
        Whether the dataset has stable row ids.
    counts : Counter, optional
        Takes the statistics.
    """

    def __init__(self, folder: Path, *, stable: bool, counts: Counter[str] | None = None) -> None:
        self.folder = folder
        self.stable = stable
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.lines: dict[str, Line] = {}
        self.here = "main"
        self.view: lance.LanceDataset | None = None
        self._next_id = 0
        self._made = 0
        self._checks = 0
        self._tags: dict[str, str] = {}
        # Roots where gc was told to keep no previous generation.
        self._thinned: set[Path] = set()
        self._truths: dict[tuple[str, int], Truth] = {}

    @property
    def line(self) -> Line:
        return self.lines[self.here]

    def start(self, seed: int, rows: int, per_fragment: int) -> str:
        """Write the first version."""
        root = self.folder / "main"
        table = make_rows(first_schema(), seed, self._new_ids(rows))
        handle = lance.write_dataset(
            table, str(root), max_rows_per_file=per_fragment, enable_stable_row_ids=self.stable
        )
        self.lines["main"] = Line(root, None, handle)
        return "done"

    @property
    def healthy(self) -> bool:
        """Whether the dataset has a vector column that an index can answer for."""
        found = vector_name(self.line.schema)
        return found is not None and self.line.schema.field(found).type.list_size == DIM

    def heal(self, seed: int) -> None:
        """Give the dataset vectors again."""
        if vector_name(self.line.schema) is None and self.line.handle.count_rows():
            self.columns("new vector", seed=seed)
        else:
            self.overwrite(seed, 30, 10, "same")

    # -- What Lance does ------------------------------------------------------------------------------------------

    def append(self, seed: int, rows: int, per_fragment: int, columns: str) -> str:
        """Append rows, perhaps without their vectors or without everything else."""
        rows = min(rows, _MOST_ROWS - self.line.handle.count_rows())
        if rows <= 0:
            return "full"
        table = make_rows(self.line.schema, seed, self._new_ids(rows))
        names = {
            "all": table.column_names,
            "no vector": [name for name in table.column_names if name != self.line.vector],
            "bare": [name for name in table.column_names if name in ("id", self.line.vector)],
        }[columns]

        def run(handle: lance.LanceDataset) -> None:
            lance.write_dataset(table.select(names), handle, mode="append", max_rows_per_file=per_fragment)

        return self._lance(run)

    def delete(self, seed: int, what: str) -> str:
        """Delete some rows, all rows of a fragment, or everything."""
        return self._lance(lambda handle: handle.delete(self._condition(what, seed)))

    def update(self, seed: int, what: str, column: str) -> str:
        """Update vectors or another column of some rows."""
        name = {"vector": self.line.vector, "number": "n", "word": "word"}[column]
        width = self.line.schema.field(self.line.vector).type.list_size if vector_name(self.line.schema) else DIM
        numbers = np.random.default_rng(seed).integers(-3, 4, width)
        value = {
            "vector": "[" + ", ".join(f"{float(number)}" for number in numbers) + "]",
            "number": "n + 1",
            "word": f"'w{seed % 4}'" if seed % 3 else "NULL",
        }[column]
        return self._lance(lambda handle: handle.update({name: value}, where=self._condition(what, seed)))

    def merge(self, seed: int, rows: int, how: str, columns: str) -> str:
        """Merge rows, about half of whose ids exist."""
        rng = np.random.default_rng([seed, 3])
        present = self.line.ids()
        new = 0 if how in ("update", "delete") or "rewrite" in how else rows // 2
        if len(present) + new > _MOST_ROWS:
            new = 0
        known = rng.choice(present, size=min(rows - new, len(present)), replace=False).tolist() if present else []
        ids = known + self._new_ids(new)
        if not ids:
            return "nothing to merge"
        table = make_rows(self.line.schema, seed, ids)
        vector = self.line.vector
        names = {
            "all": table.column_names,
            "vector": ["id", vector],
            "number": ["id", "n"],
            "both": ["id", "n", vector],
        }
        source = table.select([name for name in names[columns] if name in table.column_names])

        def run(handle: lance.LanceDataset) -> None:
            builder = handle.merge_insert("id")
            if how == "delete":
                builder.when_matched_delete()
            elif how != "insert":
                builder.when_matched_update_all()
            if how in ("upsert", "insert", "replace"):
                builder.when_not_matched_insert_all()
            if how == "replace":
                builder.when_not_matched_by_source_delete(f"id % 5 = {seed % 5}")
            if "rewrite" in how:
                builder.write_mode("rewrite_columns" if how == "rewrite_columns" else "rewrite_rows")
            builder.execute(source)

        return self._lance(run)

    def scalar_index(self, what: str) -> str:
        """Create or drop a scalar index of Lance's: it changes how rows are merged, filtered and compacted."""

        def run(handle: lance.LanceDataset) -> None:
            if what == "drop":
                for index in handle.describe_indices():
                    handle.drop_index(index.name)
            elif what == "optimize":
                handle.optimize.optimize_indices()
            else:
                column = {"key": "id", "number": "n", "word": "word"}[what]
                handle.create_scalar_index(column, "BITMAP" if what == "word" else "BTREE", replace=True)

        return self._lance(run)

    def compact(self, fragment_rows: int, materialize: bool, threshold: float, defer: bool, mode: Any) -> str:
        """Compact, in Lance's two ways, with or without making deletions real."""

        def run(handle: lance.LanceDataset) -> None:
            handle.optimize.compact_files(
                target_rows_per_fragment=fragment_rows,
                materialize_deletions=materialize,
                materialize_deletions_threshold=threshold,
                defer_index_remap=defer,
                compaction_mode=mode,
            )

        before = {fragment.fragment_id for fragment in self.line.handle.get_fragments()}
        outcome = self._lance(run)
        after = {fragment.fragment_id for fragment in self.line.handle.get_fragments()}
        return "nothing to do" if outcome == "done" and before == after else outcome

    def columns(self, what: str, *, seed: int) -> str:
        """Add, drop or rename columns, the vector column too."""
        schema, vector = self.line.schema, self.line.vector

        def run(handle: lance.LanceDataset) -> None:
            if what == "add":
                handle.add_columns({f"x{seed}": "id * 2"})
            elif what == "drop":
                handle.drop_columns([next((name for name in schema.names if name.startswith("x")), "word")])
            elif what == "word":
                if "word" in schema.names:
                    handle.drop_columns(["word"])
                else:
                    handle.add_columns({"word": "concat('w', cast(id % 4 as string))"})
            elif what == "rename":
                _alter(handle, {"path": next(n for n in ("n", "m") if n in schema.names),
                                "name": "m" if "n" in schema.names else "n"})  # fmt: skip
            elif what == "rename vector":
                _alter(handle, {"path": vector, "name": "emb" if vector == "vec" else "vec"})
            elif what == "drop vector":
                handle.drop_columns([vector])
            elif what == "new vector":
                table = make_rows(pa.schema([first_schema().field("vec")]), seed, range(handle.count_rows()))
                handle.add_columns(table.to_reader())

        return self._lance(run)

    def cast(self) -> str:
        """Cast the vector column to half floats or back."""
        if self.line.vector not in self.line.schema.names:
            return "no vector column"
        field = self.line.schema.field(self.line.vector)
        other = pa.float32() if pa.types.is_float16(field.type.value_type) else pa.float16()
        kind = pa.list_(other, field.type.list_size)
        return self._lance(lambda handle: _alter(handle, {"path": field.name, "data_type": kind}))

    def overwrite(self, seed: int, rows: int, per_fragment: int, what: str) -> str:
        """Write other data in place of the dataset's."""
        schema = first_schema()
        if what == "dimension":
            schema = schema.set(1, pa.field("vec", pa.list_(pa.float32(), DIM + 4)))
        elif what == "no vector":
            schema = schema.remove(1)
        elif what == "half":
            schema = schema.set(1, pa.field("vec", pa.list_(pa.float16(), DIM)))
        table = make_rows(schema, seed, self._new_ids(rows))

        def run(handle: lance.LanceDataset) -> None:
            lance.write_dataset(table, handle, mode="overwrite", max_rows_per_file=per_fragment)

        return self._lance(run)

    def restore(self, pick: int) -> str:
        """Make an older version the newest."""
        versions = self.line.versions
        return self._lance(lambda _: _restore(self.line.at(versions[pick % len(versions)])))

    def tag(self, drop: bool) -> str:
        """Tag the newest version, or delete a tag."""
        if drop:
            mine = [tag for tag, root in self._tags.items() if root == str(self.line.root)]
            if not mine:
                return "no tag"
            del self._tags[mine[0]]
            return self._lance(lambda handle: handle.tags.delete(mine[0]))
        name = self._new_name("t")
        line = self.line
        outcome = self._lance(lambda handle: handle.tags.create(name, (line.branch, handle.version)))
        if outcome == "done":
            self._tags[name] = str(line.root)
        return outcome

    def look_at_tag(self, pick: int) -> str:
        """Look at a tagged version in the next check."""
        mine = [tag for tag, root in self._tags.items() if root == str(self.line.root)]
        if not mine:
            return "no tag"
        self.view = self.line.handle.checkout_version(mine[pick % len(mine)])
        return "done"

    def look_back(self, pick: int) -> str:
        """Look at an old version in the next check."""
        versions = self.line.versions
        self.view = self.line.at(versions[pick % len(versions)])
        return "done"

    def branch(self, pick: int | None) -> str:
        """Branch off the newest version, or an older one, and go there."""
        if len(self.lines) >= _MOST_LINES:
            return "enough lines"
        name = self._new_name("side/b")
        line = self.line
        versions = line.versions
        version = line.handle.version if pick is None else versions[pick % len(versions)]
        outcome = self._lance(lambda handle: handle.create_branch(name, (line.branch, version)))
        if outcome == "done":
            handle = line.handle.checkout_version((name, None))
            key = f"{line.root.name}:{name}"
            self.lines[key] = Line(line.root, name, handle, line.leans_on, line.cloned)
            self.here = key
        return outcome

    def go(self, pick: int) -> str:
        """Go on with another line."""
        names = list(self.lines)
        self.here = names[pick % len(names)]
        return "done"

    def leave(self, pick: int) -> str:
        """Delete a branch or a clone; clones of what is deleted go with it."""
        names = [name for name in self.lines if name != "main"]
        if not names:
            return "nothing to leave"
        name = names[pick % len(names)]
        line = self.lines[name]
        if line.branch is None:
            gone = {key for key, other in self.lines.items() if other.root == line.root}
            gone |= {key for key, other in self.lines.items() if other.leans_on in {self.lines[k].root for k in gone}}
            for key in gone:
                shutil.rmtree(self.lines[key].root, ignore_errors=True)
        else:
            try:
                self.lines[next(k for k, o in self.lines.items() if o.root == line.root and o.branch is None)
                           ].handle.branches.delete(line.branch)  # fmt: skip
            except LANCE_REFUSES as exc:
                return _said(exc)
            gone = {name} | {key for key, other in self.lines.items() if other.leans_on == line.root}
        for key in gone:
            del self.lines[key]
        if self.here not in self.lines:
            self.here = "main"
        self._truths.clear()
        return "done"

    def clone(self, deep: bool) -> str:
        """Clone the newest version and go there."""
        if len(self.lines) >= _MOST_LINES:
            return "enough lines"
        line, name = self.line, self._new_name("deep" if deep else "shallow")
        target = self.folder / name

        def run(handle: lance.LanceDataset) -> None:
            make = handle.deep_clone if deep else handle.shallow_clone
            make(str(target), (line.branch, handle.version))

        outcome = self._lance(run)
        if outcome == "done":
            self.lines[name] = Line(target, None, lance.dataset(str(target)), None if deep else line.root, True)
            self.here = name
        return outcome

    def cleanup(self, keep: int | None) -> str:
        """Remove old versions; shallow clones of them would break, so they end here."""
        for key in [key for key, other in self.lines.items() if other.leans_on == self.line.root]:
            del self.lines[key]
        return self._lance(
            lambda handle: handle.cleanup_old_versions(
                _NO_AGE if keep is None else None, keep, error_if_tagged_old_versions=False
            )
        )

    # -- What the package does ------------------------------------------------------------------------------------

    def create(self, name: str, metric: Metric, kind: IndexType, shards: int) -> str:
        """Build an index, in place of one of that name."""
        handle = self.line.handle
        options: dict[str, Any] = {"num_partitions": 2} if kind == "IVF_FLAT" else {}
        gone = vector_name(self.line.schema) is None
        expected = (UnknownColumn,) if gone else self._too_few(metric, 2 if kind == "IVF_FLAT" else 1)
        return self._ours(
            lambda: lance_dfaiss.create_index(
                handle, self.line.vector, kind, name, metric=metric, replace=True, num_shards=shards, **options
            ),
            expected,
        )

    def _too_few(self, metric: str, needed: int) -> tuple[type[DfaissError], ...]:
        """Return the errors that training must end in; none if there are enough usable rows."""
        usable = int(self.truth(self.line, self.line.handle).usable(self.line.vector, metric).sum())
        return (InsufficientData, InvalidVectors) if usable < needed else ()

    def drop(self, name: str) -> str:
        """Drop an index."""
        missing = _KEY + name not in self.line.handle.metadata
        return self._ours(lambda: lance_dfaiss.drop_index(self.line.handle, name), (IndexNotFound,) if missing else ())

    def upkeep(self, what: str, name: str, **options: Any) -> str:
        """Update, sync or optimize an index."""
        handle = self.line.handle
        refused = self._refusal(self.line, handle, name)
        expected: tuple[type[DfaissError], ...] = () if refused is None else (refused,)
        stats = None if expected else lance_dfaiss.open_index(handle, name).stats()
        if stats is not None and options.get("retrain"):
            expected = self._too_few(stats.metric, 2 if stats.index_type == "IVF_FLAT" else 1)
        call = getattr(lance_dfaiss, f"{what}_index")
        reports: list[Any] = []
        before = handle.version
        outcome = self._ours(lambda: reports.append(call(handle, name, **options)), expected)
        if not reports or stats is None:
            return outcome
        report = reports[0]
        pointer = json.loads(handle.metadata[_KEY + name])
        assert report.generation == pointer["generation"], "a report names the current generation"
        assert report.changed == (handle.version != before), "a new version for a change, none without"
        now = lance_dfaiss.open_index(handle, name).stats()
        if what != "optimize" or report.changed:
            assert now.unsaved_rows == 0
        if what == "update":
            self._check_updated(name)
        elif options.get("retrain"):
            assert now.tail_rows == now.masked_rows == 0
        else:
            assert now.tail_rows == stats.tail_rows, "what was not covered is not covered afterwards"
            assert now.live_rows == stats.live_rows
        return "changed" if report.changed else "nothing to do"

    def _check_updated(self, name: str) -> None:
        """After an update nothing is tail, and a second one finds nothing to do."""
        index = lance_dfaiss.open_index(self.line.handle, name)
        assert index.stats().tail_rows == 0
        version = self.line.handle.version
        assert not lance_dfaiss.update_index(self.line.handle, name).changed
        assert self.line.handle.version == version

    def rollback(self, name: str) -> str:
        """Make the generation current that was before; it must be there unless gc was told not to keep it."""
        text = self.line.handle.metadata.get(_KEY + name)
        previous = None if text is None else json.loads(text)["previous"]
        expected: tuple[type[DfaissError], ...] = ()
        if text is None:
            expected = (IndexNotFound,)
        elif previous is None:
            expected = (NoPreviousGeneration,)
        elif not _stored(self.line.root / "_dfaiss", previous):
            assert self.line.cloned or self.line.root in self._thinned, "gc was to keep the previous generation"
            expected = (MissingFile,)
        outcome = self._ours(lambda: lance_dfaiss.rollback(self.line.handle, name), expected)
        if outcome == "done":
            pointer = json.loads(self.line.handle.metadata[_KEY + name])
            manifest = json.loads((self.line.root / "_dfaiss" / pointer["manifest"]["name"]).read_text())
            # What is known of compactions by now goes into a generation of its own, made of the former one.
            assert previous in (pointer["generation"], manifest["parent"])
        return outcome

    def adopt(self, name: str) -> str:
        """Copy an index's files from where a clone came from."""
        pointer_text = self.line.handle.metadata.get(_KEY + name)
        source = ""
        expected: tuple[type[DfaissError], ...] = ()
        if pointer_text is None:
            expected = (IndexNotFound,)
        else:
            source = json.loads(pointer_text)["root"]
            if not _complete(Path(source) / "_dfaiss", json.loads(pointer_text)):
                expected = (MissingFile,)
        outcome = self._ours(
            lambda: lance_dfaiss.adopt_index(self.line.handle, name, allowed_index_uris=[source]), expected
        )
        if outcome == "done":
            assert self._refusal(self.line, self.line.handle, name) is not MissingFile
        return outcome

    def gc(self, keep: int, dry: bool) -> str:
        """Remove generations that nothing points to; afterwards everything pointed to is still whole."""
        line = self.line
        before = self._pointed(line.root)
        reports: list[Any] = []
        outcome = self._ours(
            lambda: reports.append(lance_dfaiss.gc(line.handle, dry_run=dry, keep_previous=keep, min_age=_NO_AGE)),
            (),
        )
        if not keep:
            self._thinned.add(line.root)
        for text in before:
            assert _complete(line.root / "_dfaiss", json.loads(text)), "gc removed what a pointer leads to"
        report = reports[0]
        assert report.dry_run == dry
        for name in report.files:
            assert (line.root / "_dfaiss" / name).exists() == dry
        return "removed" if report.files and not dry else outcome

    # -- What must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare every index of the version looked at with brute force, opened fresh and living on."""
        line = self.line
        dataset = line.handle if self.view is None else self.view
        self._checks += 1
        rng = np.random.default_rng([self._checks, 4])
        there = [key.removeprefix(_KEY) for key in dataset.metadata if key.startswith(_KEY)]
        for name in sorted({*there, *line.living, INDEX_NAMES[0]}):
            refused = self._refusal(line, dataset, name)
            if self.view is None and name in line.living:
                self._check_past(line, name, rng)
                self._check_refresh(line, name, refused, rng)
            if refused is not None:
                self._expect(refused, partial(lance_dfaiss.open_index, dataset, name))
                continue
            index = lance_dfaiss.open_index(dataset, name)
            assert index.version == dataset.version
            truth = self.truth(line, dataset)
            self._check_index(index, truth, rng)
            self._count(index)
            if self.view is None and name not in line.living:
                held = self._held_columns(line)
                line.living[name] = (lance_dfaiss.open_index(dataset, name, filter_columns=held), truth)
        self.view = None

    def truth(self, line: Line, dataset: lance.LanceDataset) -> Truth:
        """Return what is true of a version, read once."""
        key = (f"{line.root}:{line.branch}", dataset.version)
        if dataset is self.view or key not in self._truths:
            if len(self._truths) > 20:
                self._truths.clear()
            truth = Truth(dataset)
            if dataset is self.view:
                return truth
            self._truths[key] = truth
        return self._truths[key]

    def _check_past(self, line: Line, name: str, rng: np.random.Generator) -> None:
        """An index that was not refreshed answers as before, whatever happened to the dataset."""
        index, truth = line.living[name]
        assert index.version == truth.version
        self._ask(index, truth, _queries(rng, index), 7, NO_FILTER)

    def _check_refresh(
        self, line: Line, name: str, refused: type[DfaissError] | None, rng: np.random.Generator
    ) -> None:
        index, _ = line.living[name]
        if refused is DatasetChanged and index.manifest.dataset.column not in line.handle.schema.names:
            # A living index may know of compactions that nothing else tells of any more.
            with contextlib.suppress(DatasetChanged):
                index.refresh()
            line.living.pop(name)
            return
        if refused is not None:
            self._expect(refused, index.refresh)
            return
        before = index.version
        assert index.refresh() == (line.handle.version != before)
        assert index.version == line.handle.version
        truth = self.truth(line, line.handle)
        line.living[name] = (index, truth)
        self._check_index(index, truth, rng)
        assert not index.refresh(), "nothing happened since"

    def _check_index(self, index: Index, truth: Truth, rng: np.random.Generator) -> None:
        queries = _queries(rng, index)
        picked = [NO_FILTER, *(FILTERS[at] for at in rng.choice(len(FILTERS), 3, replace=False))]
        for number, condition in enumerate(picked):
            k = int(rng.choice([1, 5, len(truth) + 3]))
            if not truth.columns.issuperset(condition.columns):
                self._expect(UnknownColumn, partial(index.knn, queries, 3, filter=condition.sql))
                continue
            self._ask(index, truth, queries, k, condition)
            if number == self._checks % 4 and not self._lance_is_wrong(index, truth, condition):
                self._ask_tables(index, truth, queries[0], condition)

    def _ask(self, index: Index, truth: Truth, queries: Any, k: int, condition: Filter) -> None:
        spec = index.manifest.spec
        widths: dict[str, Any] = {"nprobe": spec.num_partitions} if spec.index_type == "IVF_FLAT" else {}
        column, mask = self._column(index, truth), truth.mask(condition)
        try:
            distances, row_ids = index.knn(queries, k, filter=condition.sql, **widths)
            for at, query in enumerate(queries):
                truth.check(column, spec.metric, query, k, mask, distances[at], row_ids[at])
        except (AssertionError, DfaissError) as exc:
            if self._lance_is_wrong(index, truth, condition):
                self.counts["seen: Lance's own filter is wrong"] += 1
                return
            raise AssertionError(f"{index!r}, k={k}, filter={condition.sql!r}: {exc}") from exc

    def _ask_tables(self, index: Index, truth: Truth, query: Any, condition: Filter) -> None:
        """Search with columns, and within a radius."""
        spec, column, mask = index.manifest.spec, self._column(index, truth), truth.mask(condition)
        widths: dict[str, Any] = {"nprobe": spec.num_partitions} if spec.index_type == "IVF_FLAT" else {}
        table = index.search(query, 6, filter=condition.sql, columns=["id"], **widths)
        distances, row_ids = index.knn(query, 6, filter=condition.sql, **widths)
        assert table["_rowid"].to_pylist() == row_ids[0][: len(table)].tolist()
        assert table["_distance"].to_pylist() == distances[0][: len(table)].tolist()
        ids = dict(zip(truth.row_ids.tolist(), (row["id"] for row in truth.rows), strict=True))
        assert table["id"].to_pylist() == [ids[row] for row in table["_rowid"].to_pylist()]
        radius = truth.gap(column, spec.metric, query, 0.3)
        found = index.range_search(query, radius, filter=condition.sql, columns=[])
        truth.check_range(column, spec.metric, query, radius, mask, found)

    def _lance_is_wrong(self, index: Index, truth: Truth, condition: Filter) -> bool:
        """Tell whether Lance itself errs at a filter, as it does over scalar indexes that a branch inherits."""
        if condition.sql is None:
            return False
        dataset = index.view.pinned.lance
        try:
            table = dataset.to_table(columns=[], filter=condition.sql, with_row_id=True)
        except LANCE_REFUSES:
            return True
        return set(table["_rowid"].to_pylist()) != set(truth.row_ids[truth.mask(condition)].tolist())

    def _column(self, index: Index, truth: Truth) -> str:
        name = index.manifest.dataset.column
        return name if name in truth.vectors else next(iter(truth.vectors))

    def _refusal(self, line: Line, dataset: lance.LanceDataset, name: str) -> type[DfaissError] | None:
        """Return the error that an index of a version must end in; None when it must answer."""
        text = dataset.metadata.get(_KEY + name)
        if text is None:
            return IndexNotFound
        pointer = json.loads(text)
        store = line.root / "_dfaiss"
        path = store / pointer["manifest"]["name"]
        if not path.exists():
            assert line.cloned, f"{path} is gone"
            return MissingFile
        manifest = json.loads(path.read_text())
        column = manifest["dataset"]["column"]
        if column not in dataset.schema.names:
            # Renamed, or renamed back: the field keeps its id.
            wanted = manifest["dataset"]["field_id"]
            column = next((field.name() for field in dataset.lance_schema.fields() if field.id() == wanted), None)
            if column is None or self._lost_sight(dataset, name, store, manifest):
                return DatasetChanged
        found = dataset.schema.field(column).type
        return (
            None
            if pa.types.is_fixed_size_list(found) and found.list_size == manifest["spec"]["dim"]
            else DatasetChanged
        )

    def _lost_sight(self, dataset: lance.LanceDataset, name: str, store: Path, manifest: Any) -> bool:
        """Tell whether an index refuses a column of another name, which it may when not one file of its is left.

        A compaction may still lead it to its rows; whether that one is known any more is for the index to say.
        """
        try:
            lance_dfaiss.describe_index(dataset, name)
            lance_dfaiss.open_index(dataset, name)
        except DatasetChanged:
            known = set()
            for shard in manifest["shards"]:
                cover = json.loads((store / shard["record"]["name"]).read_text())["cover"]
                places = [*cover["fragments"], *((cover["remap"] or {}).get("fragments", []))]
                known |= {path for place in places for path, _ in place["signature"]["files"]}
            field = manifest["dataset"]["field_id"]
            # A column that was rewritten in place leaves its old file where it was, without the field.
            files = {
                file.path
                for fragment in dataset.get_fragments()
                for file in fragment.metadata.files
                if field in file.fields
            }
            assert not known & files, "the column holds rows of the index"
            self.counts["seen: renamed and nothing left"] += 1
            return True
        return False

    def _held_columns(self, line: Line) -> Sequence[str]:
        return [name for name in ("n", "word") if name in line.schema.names]

    def _pointed(self, root: Path) -> set[str]:
        """Return all pointers that any version, tag or branch of a dataset holds."""
        texts: set[str] = set()
        for line in self.lines.values():
            if line.root != root:
                continue
            views = [line.at(version) for version in line.versions]
            views += [line.handle.checkout_version(tag) for tag, of in self._tags.items() if of == str(root)]
            for view in views:
                texts |= {text for key, text in view.metadata.items() if key.startswith(_KEY)}
        return {text for text in texts if json.loads(text)["root"] == str(root)}

    def _count(self, index: Index) -> None:
        """Note which kinds of rows there were to see."""
        stats = index.stats()
        kind = "stable" if self.stable else "address"
        self.counts[f"seen {kind}: answers"] += 1
        for what in ("tail_rows", "mapped_rows", "masked_rows"):
            if getattr(stats, what):
                self.counts[f"seen {kind}: {what}"] += 1
        if stats.shards > 1:
            self.counts[f"seen {kind}: several shards"] += 1

    # -- Running --------------------------------------------------------------------------------------------------

    def _lance(self, run: Callable[[lance.LanceDataset], object]) -> str:
        """Let Lance do something to the newest version; what it refuses is its business."""
        line = self.line
        try:
            run(line.handle)
            outcome = "done"
        except DfaissError:
            raise
        except LANCE_REFUSES as exc:
            outcome = _said(exc)
        move_to_latest(line.handle)
        return outcome

    def _ours(self, run: Callable[[], object], expected: tuple[type[DfaissError], ...]) -> str:
        """Let the package do something; it may fail only as expected, and then it must."""
        if expected:
            with pytest.raises(expected) as caught:
                run()
            assert caught.value.remedy, f"{caught.value!r} says not what to do"
            move_to_latest(self.line.handle)
            return f"refused: {caught.type.__name__}"
        run()
        move_to_latest(self.line.handle)
        return "done"

    def _expect(self, error: type[DfaissError], run: Callable[[], object]) -> None:
        with pytest.raises(error) as caught:
            run()
        assert caught.type is error
        self.counts[f"seen error: {error.__name__}"] += 1

    def _condition(self, what: str, seed: int) -> str:
        if what == "everything":
            return "true"
        if what == "fragment":
            fragments = self.line.handle.get_fragments()
            if not fragments:
                return "false"
            scanner = self.line.handle.scanner(columns=["id"], fragments=[fragments[seed % len(fragments)]])
            ids = scanner.to_table()["id"].to_pylist()
            return f"id IN ({', '.join(map(str, ids))})" if ids else "false"
        return {"few": f"id % 13 = {seed % 13}", "some": f"id % 4 = {seed % 4}", "most": f"id % 5 <> {seed % 5}"}[what]

    def _new_ids(self, count: int) -> list[int]:
        self._next_id += count
        return list(range(self._next_id - count, self._next_id))

    def _new_name(self, prefix: str) -> str:
        self._made += 1
        return f"{prefix}{self._made}"


def _queries(rng: np.random.Generator, index: Index) -> np.ndarray[Any, np.dtype[np.float32]]:
    queries = rng.integers(-3, 4, (3, index.manifest.spec.dim)).astype(np.float32)
    queries[~queries.any(axis=1)] = 1
    return queries


def _complete(store: Path, pointer: Any) -> bool:
    """Tell whether every file that a pointer leads to is there."""
    manifest = store / pointer["manifest"]["name"]
    if not manifest.exists():
        return False
    return all((store / name).exists() for name in _file_names(json.loads(manifest.read_text())))


def _stored(store: Path, generation: str) -> bool:
    """Tell whether a generation is there with all its files."""
    return any(
        _complete(store, {"manifest": {"name": f"{generation}/{path.name}"}})
        for path in (store / generation).glob("manifest*.json")
    )


def _file_names(document: Any) -> list[str]:
    if isinstance(document, dict):
        named = document.get("name")
        mine = [named] if isinstance(named, str) and "/" in named and "length_bytes" in document else []
        return mine + [name for value in document.values() for name in _file_names(value)]
    return [name for value in document for name in _file_names(value)] if isinstance(document, list) else []


def _alter(handle: lance.LanceDataset, change: Any) -> None:
    handle.alter_columns(change)  # the stubs take the dictionary for its keys


def _restore(handle: Any) -> None:
    handle.restore()  # without types in the stubs


def _said(exc: BaseException) -> str:
    return "Lance refused: " + " ".join(str(exc).split()[:7])
