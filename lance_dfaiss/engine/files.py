"""Write and read FAISS files through the storage seam: nothing unverified reaches FAISS.

A shard's file carries its codes and lists but not the centroids, which lie in the model once: a
placeholder quantizer is written, and the model's is put back on load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss

from ..errors import CorruptIndex, DfaissError, ModelMismatch, StorageError
from ..manifest import FileEntry, Fingerprint
from ..spec import ResolvedSpec
from ..storage import HashingWriter, Store, VerifiedReader
from ..types import CHUNK_BYTES
from .encoder import ShardEncoder
from .factory import ivf_of, kind_of, owned
from .model import Model, fingerprint_of

__all__ = ["load_model", "load_shard", "save_model", "save_shard"]

# FAISS hands a callback at most this many bytes; 1 MiB costs three times the time of a chunk.
_CALLBACK_BYTES = CHUNK_BYTES

# A placeholder quantizer has no centroids to precompute a table from.
_WITHOUT_TABLES = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def save_model(model: Model, store: Store, name: str) -> FileEntry:
    """Write a model (searchable part and refine store) as one file."""
    whole = model.base if model.refine is None else faiss.IndexRefine(model.base, model.refine)
    return _write(whole, store, name)


def load_model(
    store: Store, entry: FileEntry, spec: ResolvedSpec, fingerprint: Fingerprint, *, tables: bool = True
) -> Model:
    """Read a model and check that it is the one the manifest names.

    Parameters
    ----------
    store : Store
        Where it lies.
    entry : FileEntry
        Its record.
    spec : ResolvedSpec
        What it was trained for.
    fingerprint : Fingerprint
        Of the model that is meant.
    tables : bool
        Make FAISS's tables for searches too (`table_bytes`); those who encode do without.

    Raises
    ------
    CorruptIndex
        If the file is damaged, missing, or not a FAISS index.
    ModelMismatch
        If its fingerprint is another one.
    """
    base, refine = _read(store, entry, 0 if tables else _WITHOUT_TABLES), None
    if isinstance(base, faiss.IndexRefine):
        whole = base
        base, refine = faiss.downcast_index(whole.base_index), faiss.downcast_index(whole.refine_index)
        base.referenced_objects = refine.referenced_objects = [whole]  # the parts live as long as the whole
    found = fingerprint_of(spec, base, refine)
    if found != fingerprint:
        raise ModelMismatch(
            f"{store.location}/{entry.name} holds another model than the manifest names:"
            f" {', '.join(fingerprint.differences(found))} differ",
            remedy="Rebuild the index, or restore the generation's files",
            location=entry.name,
            expected=fingerprint.digest,
            found=found.digest,
        )
    return Model(spec, base, refine, found)


def save_shard(
    encoder: ShardEncoder, store: Store, names: tuple[str, str | None]
) -> tuple[FileEntry, FileEntry | None]:
    """Write a finished shard: its searchable part, and its refine store if it has one.

    Parameters
    ----------
    encoder : ShardEncoder
        Finished.
    store : Store
        Where to.
    names : tuple of (str, str or None)
        Names of the two files.
    """
    with _without_centroids(encoder.base):
        base = _write(encoder.base, store, names[0])
    refine = None if encoder.refine is None or names[1] is None else _write(encoder.refine, store, names[1])
    return base, refine


def load_shard(
    store: Store, model: Model, base: FileEntry, refine: FileEntry | None, *, physical_rows: int
) -> tuple[Any, Any | None]:
    """Read a shard's FAISS indexes, verified chunk by chunk, with the model's centroids put back.

    Raises
    ------
    CorruptIndex
        If a file is damaged, missing, or does not fit the model or the number of rows.
    """
    index = _read(store, base, _WITHOUT_TABLES)
    ivf = ivf_of(index)
    if ivf is not None:
        placeholder = ivf.quantizer
        ivf.own_fields = False
        ivf.quantizer = model.quantizer
        # Freed with this holder. `placeholder.this.own(True)` would free it too, but also give back a reference to
        # SWIG's runtime that was never taken: after enough shards FAISS would break in the whole process.
        holder = faiss.IndexPreTransform(placeholder)
        holder.own_fields = True
    elif index.ntotal != physical_rows:
        raise _wrong_size(store, base, index.ntotal, physical_rows)
    stored = None if refine is None else _read(store, refine, _WITHOUT_TABLES)
    if stored is not None and stored.ntotal != physical_rows:
        raise _wrong_size(store, refine or base, stored.ntotal, physical_rows)
    if kind_of(index) != kind_of(model.base) or index.d != model.base.d:
        raise CorruptIndex(
            f"{base.name} holds {kind_of(index)}({index.d}), the model is {kind_of(model.base)}({model.base.d})",
            remedy="Rebuild the index",
            location=base.name,
        )
    return index, stored


def _write(index: Any, store: Store, name: str) -> FileEntry:
    with store.create(name) as path:
        with HashingWriter(path) as writer, _faiss_errors(f"writing {name}", StorageError, name, writer):
            faiss.write_index(index, faiss.PyCallbackIOWriter(writer.write, _CALLBACK_BYTES))
        return writer.entry(name)


def _read(store: Store, entry: FileEntry, flags: int) -> Any:
    with VerifiedReader(store, entry) as reader:
        fault: list[BaseException] = []

        def read(size: int) -> Any:
            # FAISS turns an exception in here into its own: keep the real one.
            try:
                return reader.read1(size)
            except BaseException as exc:
                fault.append(exc)
                raise

        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(read, _CALLBACK_BYTES), flags)
        except (RuntimeError, DfaissError) as exc:
            if fault:
                raise fault[0] from None
            raise CorruptIndex(
                f"{store.location}/{entry.name} is not a FAISS index that this version reads: {_last_line(exc)}",
                remedy="Rebuild the index, or use the faiss version that wrote it",
                location=entry.name,
            ) from exc
    return owned(index)


@contextmanager
def _faiss_errors(doing: str, kind: Callable[..., DfaissError], location: str, writer: HashingWriter) -> Iterator[None]:
    try:
        yield
    except RuntimeError as exc:
        if writer.error is not None:
            raise writer.error from exc
        raise kind(f"FAISS failed while {doing}: {_last_line(exc)}", location=location) from exc


@contextmanager
def _without_centroids(index: Any) -> Iterator[None]:
    ivf = ivf_of(index)
    if ivf is None:
        yield
        return
    quantizer, placeholder = ivf.quantizer, faiss.IndexFlat(ivf.d, ivf.metric_type)
    ivf.quantizer = placeholder
    try:
        yield
    finally:
        ivf.quantizer = quantizer


def _wrong_size(store: Store, entry: FileEntry, found: int, expected: int) -> CorruptIndex:
    return CorruptIndex(
        f"{store.location}/{entry.name} holds {found} rows, its record says {expected}",
        remedy="Rebuild the index",
        location=entry.name,
    )


def _last_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[-1]
