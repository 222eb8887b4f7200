"""Streams of frames with damage, for whoever reads frames. All chance comes from the generator that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lance_dfaiss.serve import wire

__all__ = ["frame_of", "frames_of_every_kind", "mutated"]

_OFFER = wire.Offer(
    index="words",
    at="1-7-0123456789abcdef",
    epoch=1,
    version=7,
    committed_at=1.7e9,
    generation="0123456789abcdef",
    created_at="2026-01-01T00:00:00Z",
    group=0,
    rows=(100, 50),
    shards=("shard-00000.faiss", "shard-00001.faiss"),
    metric="l2",
    dim=4,
    lists=16,
    column="vector",
    columns=("id", "text"),
    payload=("text",),
)


def frame_of(message: wire.Message, request_id: int = 0, payload: bytes = b"") -> bytes:
    return b"".join(wire.encode(message, request_id, [payload]))


def frames_of_every_kind() -> list[bytes]:
    """One good frame of every kind, with vectors of dimension 4, in the order of their numbers."""
    vectors = np.arange(8, dtype="<f4").tobytes()
    ids = np.arange(2, dtype="<u8").tobytes()
    on: dict[str, Any] = {"index": "words", "at": _OFFER.at}
    return [
        frame_of(wire.Hello(protocol=wire.PROTOCOL, token="0123456789abcdef", client="test")),
        frame_of(wire.Welcome(protocol=1, server=3, epoch=1, limits=wire.Limits(), offers=(_OFFER,), admin=True)),
        frame_of(wire.Offers(epoch=2, offers=(_OFFER, _OFFER), draining=True)),
        frame_of(wire.Knn(**on, k=10, n=2, nprobe=8, filter="a > 1", timeout=1.5, columns=("id",)), 1, vectors),
        frame_of(wire.KnnReply(n=1, width=2, queued=1e-4, stages=({"search": 0.1, "lists": [1, 2]},)), 1, bytes(24)),
        frame_of(wire.Range(**on, radius=0.5, dtype="f2", tail=False), 2, vectors[:8]),
        frame_of(wire.RangeReply(n=2), 2, bytes(24)),
        frame_of(wire.Fetch(**on, n=2, columns={"twice": "a * 2"}), 3, ids),
        frame_of(wire.TableReply(rows=2), 3, b"ARROW"),
        frame_of(wire.Reconstruct(**on, n=2), 4, ids),
        frame_of(wire.ReconstructReply(n=2, held=1, dim=4), 4, b"\0\1" + vectors[:16]),
        frame_of(wire.Status(), 5),
        frame_of(wire.StatusReply(status={"ready": True, "indexes": [{"rows": 5}]}), 5),
        frame_of(wire.Reload(index="words", version=7), 6),
        frame_of(wire.Drain(), 7),
        frame_of(wire.Done(facts={"connections": 2}), 7),
        frame_of(wire.Failure(error="Overloaded", message="full", facts={"waiting": 9, "retry_after_seconds": 0.5}), 8),
        frame_of(wire.Cancel(), 8),
    ]


# What is wrong in interesting ways: the first bytes of msgpack's types, lengths at their edges, NaN, broken UTF-8.
_NASTY = [
    *(bytes([first]) for first in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC4, 0xE0, 0x7F)),
    *(bytes([first]) + b"\xff" * size for first, size in ((0xDC, 2), (0xDD, 4), (0xDE, 2), (0xDF, 4), (0xDB, 4))),
    *(b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(6)),
    *(b"\xa2\xc3\x28", b"\xa3\xed\xa0\x80", b"\x91" * 64, b"\x81\xa0" * 64, b"\xc7\x08\xff" + b"\xff" * 8),
    *(b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x81\x80\x01"),
]


def _flip(rng: np.random.Generator, data: bytearray) -> None:
    for at in rng.integers(0, len(data), rng.integers(1, 5)):
        data[at] = rng.integers(0, 256)


def _insert(rng: np.random.Generator, data: bytearray) -> None:
    at = int(rng.integers(0, len(data) + 1))
    data[at:at] = _NASTY[rng.integers(0, len(_NASTY))]


def _replace(rng: np.random.Generator, data: bytearray) -> None:
    nasty = _NASTY[rng.integers(0, len(_NASTY))]
    # Behind the prefix, and of the same length, so that the frame is still cut as it was.
    at = int(rng.integers(wire.PREFIX_BYTES, len(data) + 1))
    data[at : at + len(nasty)] = nasty[: max(0, len(data) - at)]


def _truncate(rng: np.random.Generator, data: bytearray) -> None:
    del data[int(rng.integers(0, len(data))) :]


def _repeat(rng: np.random.Generator, data: bytearray) -> None:
    start, end = sorted(int(at) for at in rng.integers(0, len(data) + 1, 2))
    data[end:end] = data[start:end]


def _length(rng: np.random.Generator, data: bytearray) -> None:
    at = int(rng.choice([0, 8]))
    wrong = int.from_bytes(data[at : at + 4], "little") + int(rng.integers(-9, 10))
    data[at : at + 4] = (wrong % 2**32).to_bytes(4, "little")


def _kind(rng: np.random.Generator, data: bytearray) -> None:
    data[4] = rng.integers(0, 34)


_DAMAGES: list[Callable[[np.random.Generator, bytearray], None]] = [
    *(_flip, _insert, _replace, _replace, _truncate, _repeat, _length, _kind)
]


def mutated(rng: np.random.Generator, frame: bytes) -> bytes:
    """Return a frame with one or two damages."""
    data = bytearray(frame)
    for damage in rng.integers(0, len(_DAMAGES), rng.integers(1, 3)):
        if len(data) > wire.PREFIX_BYTES:
            _DAMAGES[damage](rng, data)
    return bytes(data)
