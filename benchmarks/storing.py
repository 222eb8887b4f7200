"""Datasets and indexes in an object store: how fast they are read, what a build costs more than on a local disk.

The store is Ceph's object gateway with everything in memory, on this machine. It shares the cores with whoever asks it,
so that all sides of a comparison are slowed down, and alike.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lance
import numpy as np
from lance.file import LanceFileSession

import lance_dfaiss
from lance_dfaiss.storage import FsspecStore, SessionStore, Store
from tests.storage import radosrig
from tests.storage.storeproxy import Asked, Passed, Proxy

from .data import COLUMN, Corpus, synthetic
from .report import Outcome, Row, compared
from .settings import Settings
from .timing import Turn, interleaved, interleaved_prepared, median, paired_ratio

__all__ = ["run"]

NAME = "ours"
_REGION = "us-east-1"
_MB, _MIB = 1_000_000, 1024 * 1024
_FRAGMENTS = 8

# As many requests at a time, of as many bytes, as this package reads ahead with.
_THREADS, _CHUNK_BYTES = 16, 16 * _MIB

# A build takes long, and is the same work on both sides but for its reading and writing.
_BUILDS = 3

_RANGE_BYTES = (4 * 1024, 64 * 1024, 1024 * 1024)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A bucket of a running server."""

    server: str
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def options(self) -> dict[str, str]:
        """As Lance takes them."""
        return _options(self.server)


def run(settings: Settings) -> Outcome:
    """Measure on Ceph's object gateway; without it there is a note and no row."""
    missing = radosrig.missing_programs()
    if missing:
        return Outcome(notes=[f"Left out: {', '.join(missing)} not installed ({radosrig.INSTALL})."])
    missing = [name for name in ("obstore", "s3fs") if find_spec(name) is None]
    if missing:
        return Outcome(notes=[f"Left out: {', '.join(missing)} not installed (pip install 'lance-dfaiss[s3]')."])
    corpus = synthetic(settings, rows=6_000 if settings.quick else 400_000, fragments=_FRAGMENTS)
    outcome = Outcome()
    with radosrig.rados_gateway() as server:
        bucket = _Bucket(server, f"bench-{uuid.uuid4().hex[:8]}")
        _s3fs(bucket).call_s3("create_bucket", Bucket=bucket.name)  # mkdir names a region, which is refused
        for part in (_reading, _building, _opening, _ranges):
            outcome.take(part(settings, corpus, bucket))
    outcome.notes.append(
        f"The store is Ceph's object gateway {radosrig.version()}, everything in memory, on the same cores as those who"
        " read from it: none of these numbers is that of a network, and MB/s are a bound by CPU on all sides."
    )
    return outcome


def _reading(settings: Settings, corpus: Corpus, bucket: _Bucket) -> Outcome:
    """Open and verify an index, against only fetching its bytes."""
    uri = _upload(corpus, bucket, "reading")
    shards = 2 if settings.quick else 8
    _build(settings, corpus, uri, "IVF_FLAT", bucket.options, shards=shards)
    handle = lance.dataset(uri, storage_options=bucket.options)
    files = _index_files(bucket, "reading")
    size = sum(length for _, length in files)
    with tempfile.TemporaryDirectory(prefix="lance-dfaiss-bench-", dir=settings.into) as copy:
        _s3fs(bucket).get(f"{bucket.name}/reading/", f"{copy}/", recursive=True)
        on_disk = lance.dataset(copy)
        works: dict[str, Callable[[], object]] = {
            "open": partial(lance_dfaiss.open_index, handle, NAME),
            "verify": partial(_verify, handle),
            "open on disk": partial(lance_dfaiss.open_index, on_disk, NAME),
            "verify on disk": partial(_verify, on_disk),
            "s3fs": partial(_read_in_series, _s3fs(bucket), files),
            "obstore": partial(_read_in_parallel, _obstore_reader(bucket), files),
            "pyarrow": partial(_read_in_parallel, _pyarrow_reader(bucket), files),
        }
        interleaved(works, 1)
        turns = interleaved(works, settings.repeats)
    speed = {name: [size / _MB / turn.wall_seconds for turn in found] for name, found in turns.items()}
    said = {"open": "open_index", "verify": "verify_index"}
    peers = {
        "on disk": "the same from a local disk",
        "s3fs": "s3fs cat_file, one file after the other",
        "obstore": f"obstore, {_THREADS} ranges at a time",
        "pyarrow": f"pyarrow, {_THREADS} ranges at a time",
    }
    rows = []
    for ours in said:
        for peer, text in peers.items():
            theirs = f"{ours} {peer}" if peer == "on disk" else peer
            rows.append(
                compared(
                    f"{corpus}: {said[ours]} of {size / _MB:,.0f} MB in {shards} shards, every digest checked",
                    median(speed[ours]),
                    median(speed[theirs]),
                    unit="MB/s",
                    peer_name=text,
                    ratio=paired_ratio(speed[ours], speed[theirs]),
                    data={
                        "our_turns": speed[ours],
                        "peer_turns": speed[theirs],
                        "our_cpu_seconds": [turn.cpu_seconds for turn in turns[ours]],
                        "peer_cpu_seconds": [turn.cpu_seconds for turn in turns[theirs]],
                        "bytes": size,
                    },
                )
            )
    _remove(bucket, "reading")
    return Outcome(rows=rows)


def _building(settings: Settings, corpus: Corpus, bucket: _Bucket) -> Outcome:
    """Build with dataset and index in the store, against both on a local disk."""
    uri = _upload(corpus, bucket, "building")
    corpus.reset()
    places: dict[str, tuple[str, dict[str, str]]] = {
        "store": (uri, bucket.options),
        "disk": (str(corpus.path), {}),
    }
    works: dict[str, Callable[[], object]] = {
        name: partial(_build, settings, corpus, place, "IVF_SQ", options) for name, (place, options) in places.items()
    }
    interleaved(works, 1)
    turns = interleaved(works, min(settings.repeats, _BUILDS))
    with Proxy(bucket.server) as proxy:
        # Counted apart: whatever counts, slows down.
        _build(settings, corpus, uri, "IVF_SQ", _options(proxy.url))
        passed = proxy.passed()
    handle = lance.dataset(uri, storage_options=bucket.options)
    index_bytes = sum(length for _, length in _index_files(bucket, "building", _generation(handle)))
    corpus.reset()
    _remove(bucket, "building")
    return _cost_of_building(settings, corpus, turns, passed, index_bytes)


def _cost_of_building(
    settings: Settings, corpus: Corpus, turns: dict[str, list[Turn]], passed: Sequence[Passed], index_bytes: int
) -> Outcome:
    ours, peer = ([turn.wall_seconds for turn in turns[side]] for side in ("store", "disk"))
    rows_read = [one for one in passed if _is_of_rows(one.asked)]
    received, sent = sum(one.received_bytes for one in rows_read), sum(one.sent_bytes for one in passed)
    sample = min(len(corpus.vectors), 256 * settings.partitions(len(corpus.vectors))) * corpus.vectors.shape[1] * 4
    kinds = {method: sum(one.asked.method == method for one in passed) for method in ("GET", "HEAD", "PUT", "POST")}
    data = {"requests": len(passed), **{f"requests_{kind.lower()}": count for kind, count in kinds.items()}}
    return Outcome(
        rows=[
            compared(
                f"{corpus}: build IVF_SQ, dataset and index in the store",
                median(ours),
                median(peer),
                unit="s",
                peer_name="both on a local disk",
                ratio=paired_ratio(ours, peer),
                data={"our_turns": ours, "peer_turns": peer, **data},
            ),
            compared(
                f"{corpus}: rows that a build of IVF_SQ reads, {len(rows_read):,} requests",
                received / _MB,
                (corpus.vectors.nbytes + sample) / _MB,
                unit="MB",
                peer_name="the column, and the training sample",
                at_most=None if settings.quick else 1.1,  # beside so few rows the ends of files are many bytes
                data={"requests_of_rows": len(rows_read), **data},
            ),
            compared(
                f"{corpus}: what a build of IVF_SQ writes",
                sent / _MB,
                index_bytes / _MB,
                unit="MB",
                peer_name="the files of the index",
                at_most=1.1,
                data=data,
            ),
        ],
        notes=[
            f"A build of IVF_SQ makes {len(passed):,} requests ("
            + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
            + f"), {len(rows_read):,} of them for rows."
        ],
    )


def _opening(settings: Settings, corpus: Corpus, bucket: _Bucket) -> Outcome:
    """Open the same rows in many shards: from the store, and from a local cache."""
    few, many = (2, 8) if settings.quick else (8, 64)
    handles = {}
    for shards in (few, many):
        uri = _upload(corpus, bucket, f"shards-{shards}")
        _build(settings, corpus, uri, "IVF_FLAT", bucket.options, shards=shards)
        handles[shards] = lance.dataset(uri, storage_options=bucket.options)
    with tempfile.TemporaryDirectory(prefix="lance-dfaiss-bench-", dir=settings.into) as name:
        folder, numbers = Path(name), itertools.count()
        filled = folder / "filled"
        lance_dfaiss.open_index(handles[many], NAME, cache_dir=filled)

        def open_into_new() -> Callable[[], object]:
            shutil.rmtree(folder / "new", ignore_errors=True)
            return partial(lance_dfaiss.open_index, handles[many], NAME, cache_dir=folder / "new" / str(next(numbers)))

        def ready(work: Callable[[], object]) -> Callable[[], Callable[[], object]]:
            return lambda: work

        prepares = {
            "few": ready(partial(lance_dfaiss.open_index, handles[few], NAME)),
            "many": ready(partial(lance_dfaiss.open_index, handles[many], NAME)),
            "filling": open_into_new,
            "filled": ready(partial(lance_dfaiss.open_index, handles[many], NAME, cache_dir=filled)),
        }
        interleaved_prepared(prepares, 1)
        turns = interleaved_prepared(prepares, settings.repeats)
        read = {
            cache: _bytes_read(bucket, f"shards-{many}", place) for cache, place in (("none", None), ("filled", filled))
        }
    for shards in (few, many):
        _remove(bucket, f"shards-{shards}")
    seconds = {name: [turn.wall_seconds for turn in found] for name, found in turns.items()}
    pairs = (
        (f"{many} shards from the store", "many", f"{few} shards", "few"),
        (f"{many} shards while a new cache_dir is filled", "filling", "without one", "many"),
        (f"{many} shards from a filled cache_dir", "filled", "without one", "many"),
    )
    return Outcome(
        rows=[
            compared(
                f"{corpus}: open {what}",
                median(seconds[ours]),
                median(seconds[peer]),
                unit="s",
                peer_name=peer_name,
                ratio=paired_ratio(seconds[ours], seconds[peer]),
                data={"our_turns": seconds[ours], "peer_turns": seconds[peer]},
            )
            for what, ours, peer_name, peer in pairs
        ]
        + [
            compared(
                f"{corpus}: bytes from the store to open {many} shards from a filled cache_dir",
                read["filled"] / _MB,
                read["none"] / _MB,
                unit="MB",
                peer_name="without one",
                # Of a quick run's index the manifest is a good part.
                at_most=None if settings.quick else 0.01,
            )
        ]
    )


def _bytes_read(bucket: _Bucket, folder: str, cache_dir: Path | None) -> int:
    with Proxy(bucket.server) as proxy:
        handle = lance.dataset(f"{bucket.url}/{folder}", storage_options=_options(proxy.url))
        proxy.reset()
        lance_dfaiss.open_index(handle, NAME, cache_dir=cache_dir)
        return sum(one.received_bytes for one in proxy.passed())


def _ranges(settings: Settings, _: Corpus, bucket: _Bucket) -> Outcome:
    """Read small ranges one after the other, through both stores of this package and through obstore."""
    length = (4 if settings.quick else 16) * _MIB
    root = f"{bucket.url}/ranges"
    _s3fs(bucket).pipe_file(f"{root}/object", np.random.default_rng(1).bytes(length))
    session: Store = SessionStore(LanceFileSession(root, storage_options=bucket.options), root)
    stores: dict[str, Callable[[int, int], object]] = {
        "session": lambda start, count: session.read_range("object", start, count),
        "obstore": partial(_obstore_reader(bucket), f"{bucket.name}/ranges/object"),
    }
    through_fsspec = FsspecStore(root, bucket.options)
    stores["fsspec"] = lambda start, count: through_fsspec.read_range("object", start, count)
    said = {"session": "beside the dataset", "fsspec": "under an index_uri"}
    calls, rows = 10 if settings.quick else 200, []
    for count in _RANGE_BYTES:
        starts = np.random.default_rng(2).integers(0, length - count, calls).tolist()
        works: dict[str, Callable[[], object]] = {
            name: partial(_each, read, starts, count) for name, read in stores.items()
        }
        interleaved(works, 1)
        turns = interleaved(works, settings.repeats)
        latency = {name: [1e3 * turn.wall_seconds / calls for turn in found] for name, found in turns.items()}
        rows += [_latency_row(count, said[ours], latency[ours], latency["obstore"]) for ours in said]
    _remove(bucket, "ranges")
    return Outcome(rows=rows)


def _latency_row(count: int, where: str, ours: list[float], peer: list[float]) -> Row:
    return compared(
        f"a range of {count // 1024:,} KiB, {where}, one at a time",
        median(ours),
        median(peer),
        unit="ms",
        peer_name="obstore",
        ratio=paired_ratio(ours, peer),
        data={"our_turns": ours, "peer_turns": peer},
    )


def _each(read: Callable[[int, int], object], starts: Sequence[int], count: int) -> None:
    for start in starts:
        read(start, count)


def _options(server: str) -> dict[str, str]:
    return {
        "aws_access_key_id": radosrig.ACCESS_KEY,
        "aws_secret_access_key": radosrig.SECRET_KEY,
        "aws_region": _REGION,
        "aws_endpoint": server,
        "allow_http": "true",
        "aws_virtual_hosted_style_request": "false",
    }


def _upload(corpus: Corpus, bucket: _Bucket, folder: str) -> str:
    uri = f"{bucket.url}/{folder}"
    local = corpus.open()
    per_file = -(-len(corpus.vectors) // _FRAGMENTS)
    reader = local.scanner(columns=[COLUMN]).to_reader()
    lance.write_dataset(reader, uri, max_rows_per_file=per_file, storage_options=bucket.options)
    return uri


def _build(
    settings: Settings, corpus: Corpus, uri: str, index_type: Any, options: dict[str, str], *, shards: int = 2
) -> None:
    lance_dfaiss.create_index(
        uri,
        COLUMN,
        index_type,
        NAME,
        num_partitions=settings.partitions(len(corpus.vectors)),
        num_shards=shards,
        replace=True,
        storage_options=options,
    )


def _generation(handle: Any) -> str:
    return lance_dfaiss.describe_index(handle, NAME).manifest.generation


def _index_files(bucket: _Bucket, folder: str, generation: str = "") -> list[tuple[str, int]]:
    found = _s3fs(bucket).find(f"{bucket.name}/{folder}/_dfaiss", detail=True)
    return [(path, info["size"]) for path, info in sorted(found.items()) if generation in path]


def _remove(bucket: _Bucket, folder: str) -> None:
    _s3fs(bucket).rm(f"{bucket.name}/{folder}", recursive=True)


def _verify(handle: Any) -> None:
    problems = lance_dfaiss.verify_index(handle, NAME)
    assert problems == [], problems


def _s3fs(bucket: _Bucket) -> Any:
    import s3fs

    # Without its listings: the store changes behind its back.
    return s3fs.S3FileSystem(
        key=radosrig.ACCESS_KEY,
        secret=radosrig.SECRET_KEY,
        endpoint_url=bucket.server,
        client_kwargs={"region_name": _REGION},
        use_listings_cache=False,
    )


def _read_in_series(fs: Any, files: Sequence[tuple[str, int]]) -> None:
    for path, length in files:
        assert len(fs.cat_file(path)) == length


def _read_in_parallel(read: Callable[[str, int, int], object], files: Sequence[tuple[str, int]]) -> None:
    pieces = [
        (path, start, min(_CHUNK_BYTES, length - start))
        for path, length in files
        for start in range(0, length, _CHUNK_BYTES)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(read, *piece) for piece in pieces]:
            done.result()


def _obstore_reader(bucket: _Bucket) -> Callable[[str, int, int], object]:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket.name,
        access_key_id=radosrig.ACCESS_KEY,
        secret_access_key=radosrig.SECRET_KEY,
        endpoint=bucket.server,
        region=_REGION,
        client_options={"allow_http": True},
    )

    def read(path: str, start: int, count: int) -> object:
        return obstore.get_range(store, path.partition("/")[2], start=start, length=count)

    return read


def _pyarrow_reader(bucket: _Bucket) -> Callable[[str, int, int], object]:
    from pyarrow.fs import S3FileSystem

    fs = S3FileSystem(
        access_key=radosrig.ACCESS_KEY,
        secret_key=radosrig.SECRET_KEY,
        endpoint_override=bucket.server,
        region=_REGION,
    )

    def read(path: str, start: int, count: int) -> object:
        with fs.open_input_file(path) as file:
            return file.read_at(count, start)

    return read


def _is_of_rows(asked: Asked) -> bool:
    return asked.method == "GET" and "/data/" in asked.path
