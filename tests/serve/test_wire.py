from __future__ import annotations

import itertools
import math
import os
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss import errors
from lance_dfaiss.errors import DfaissError, InvalidArgument, Overloaded, ProtocolError, ServerFailed
from lance_dfaiss.serve import wire
from tests.serve.mutated_frames import frame_of, frames_of_every_kind, mutated

MIB = 1024 * 1024
MESSAGES = wire.Message.__subclasses__()
EVERY_KIND = frames_of_every_kind()


def read(data: bytes, max_bytes: int = wire.MAX_FRAME_BYTES) -> list[wire.Frame]:
    return list(wire.FrameReader(max_bytes).feed(data))


def raw(kind: int, header: bytes, payload: bytes = b"", request_id: int = 0) -> bytes:
    """A frame by hand, whatever the header is."""
    prefix = struct.pack("<IBBBBIQ", len(header) + len(payload), kind, 0, 0, 0, len(header), request_id)
    return prefix + header + payload


def refused(frame: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        wire.decode(read(frame)[0])


# ---- good frames


def values(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Values that a field of this type may have."""
    kind = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
    match kind:
        case msgspec.inspect.IntType():
            low, high = kind.ge if kind.ge is not None else -(2**63), kind.le if kind.le is not None else 2**64 - 1
            return st.integers(low, high)
        case msgspec.inspect.FloatType():
            return st.floats(kind.ge, kind.le, allow_nan=False)
        case msgspec.inspect.StrType():
            return st.text()
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.LiteralType():
            return st.sampled_from(kind.values)
        case msgspec.inspect.AnyType():
            return plain | st.lists(plain) | st.dictionaries(st.text(), plain)
        case msgspec.inspect.UnionType():
            return st.one_of([values(option, name) for option in kind.types])
        case msgspec.inspect.VarTupleType():
            return st.lists(values(kind.item_type, name), max_size=3).map(tuple)
        case msgspec.inspect.DictType():
            return st.dictionaries(values(kind.key_type, name), values(kind.value_type, name), max_size=3)
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, **{field.name: values(field.type, field.name) for field in kind.fields})
    raise AssertionError(f"no values for {name}: {kind}")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
@given(data=st.data())
def test_every_message_comes_back(message: type[wire.Message], data: st.DataObject) -> None:
    sent = data.draw(values(message, message.__name__))
    request_id, payload = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.binary(max_size=64))
    [frame] = read(frame_of(sent, request_id, payload))
    assert (frame.kind, frame.request_id, bytes(frame.payload)) == (message.KIND, request_id, payload)
    assert wire.decode(frame) == wire.decode(frame, message) == sent


def test_every_kind_has_a_frame_and_a_side() -> None:
    assert [frame[4] for frame in EVERY_KIND] == sorted(message.KIND for message in MESSAGES)
    assert {message.KIND for message in MESSAGES} == wire.REQUESTS | wire.ANSWERS
    assert not wire.REQUESTS & wire.ANSWERS


@given(cuts=st.lists(st.integers(0, sum(map(len, EVERY_KIND))), max_size=12), every=st.sampled_from([None, 1, 7]))
def test_how_a_stream_is_cut_does_not_matter(cuts: list[int], every: int | None) -> None:
    stream = b"".join(EVERY_KIND)
    at = sorted({0, *cuts, len(stream), *(range(0, len(stream), every) if every else ())})
    reader = wire.FrameReader(wire.MAX_FRAME_BYTES)
    frames = []
    for start, end in itertools.pairwise(at):
        frames += list(reader.feed(stream[start:end]))
        assert reader.waiting_bytes < max(map(len, EVERY_KIND))
    assert reader.waiting_bytes == 0
    # Compared at the end: what came later must not change what was read before.
    assert frames == read(stream)
    assert len(frames) == len(EVERY_KIND)


def test_fields_of_a_newer_version_are_ignored_and_old_ones_may_lack() -> None:
    header = msgspec.msgpack.encode({"index": "i", "at": "x", "k": 3, "n": 0, "later": {"a": [1]}})
    [frame] = read(raw(wire.Knn.KIND, header))
    assert wire.decode(frame) == wire.Knn(index="i", at="x", k=3, n=0)


def test_of_two_fields_of_one_name_the_last_counts() -> None:
    header = b"\x82\xa8protocol\x01\xa8protocol\x02"
    assert wire.decode(read(raw(wire.Hello.KIND, header))[0]) == wire.Hello(protocol=2)


# ---- arrays


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@given(n=st.integers(0, 5), dim=st.integers(1, 9), offset=st.integers(0, 7))
def test_queries_come_back_aligned(dtype: str, n: int, dim: int, offset: int) -> None:
    sent = np.arange(n * dim).reshape(n, dim).astype(f"<{dtype}")
    queries = wire.queries_of(memoryview(bytes(offset) + sent.tobytes())[offset:], n, dim, dtype)
    assert queries.dtype == np.float32
    assert queries.flags.aligned
    assert queries.flags.c_contiguous
    np.testing.assert_array_equal(queries, sent.astype(np.float32))


@given(n=st.integers(0, 5), width=st.integers(0, 5), rest=st.binary(max_size=9))
def test_results_come_back(n: int, width: int, rest: bytes) -> None:
    distances = np.linspace(0, 1, n * width, dtype=np.float32).reshape(n, width)
    row_ids = (np.arange(n * width, dtype=np.uint64) + 2**63).reshape(n, width)
    payload = b"".join([*wire.joined_results(distances, row_ids), rest])
    found, ids, left = wire.results_of(payload, n, width)
    np.testing.assert_array_equal(found, distances)
    np.testing.assert_array_equal(ids, row_ids)
    assert bytes(left) == rest


def test_results_of_any_layout_are_sent_row_by_row() -> None:
    distances, row_ids = np.ones((4, 6), ">f8")[::2, ::3], np.arange(24).reshape(4, 6).T[:2, :2]
    found, ids, _ = wire.results_of(b"".join(wire.joined_results(distances, row_ids)), 2, 2)
    np.testing.assert_array_equal(found, distances)
    np.testing.assert_array_equal(ids, row_ids)


@given(held=st.lists(st.booleans(), max_size=6), dim=st.integers(1, 5), offset=st.integers(0, 7))
def test_row_ids_and_vectors_come_back(held: list[bool], dim: int, offset: int) -> None:
    row_ids = np.arange(len(held), dtype="<u8") + 2**60
    back = wire.row_ids_of(memoryview(bytes(offset) + row_ids.tobytes())[offset:], len(held))
    assert back.flags.aligned
    np.testing.assert_array_equal(back, row_ids)
    vectors = np.arange(sum(held) * dim, dtype="<f4").reshape(-1, dim)
    mask, found = wire.vectors_of(np.array(held, "u1").tobytes() + vectors.tobytes(), len(held), sum(held), dim)
    assert mask.tolist() == held
    np.testing.assert_array_equal(found, vectors)


numbers_of_any_size = st.integers(-3, 9) | st.sampled_from([-(2**63), 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64])


@given(
    payload=st.binary(max_size=80),
    n=numbers_of_any_size,
    width=numbers_of_any_size,
    held=numbers_of_any_size,
    dtype=st.sampled_from(["f4", "f2", "f8", "", "O"]),
)
def test_numbers_that_do_not_fit_the_payload_are_refused(
    payload: bytes, n: int, width: int, held: int, dtype: str
) -> None:
    for attempt in (
        lambda: wire.queries_of(payload, n, width, dtype),
        lambda: wire.results_of(payload, n, width),
        lambda: wire.row_ids_of(payload, n),
        lambda: wire.vectors_of(payload, n, held, width),
    ):
        with_room = tolerated(attempt)
        assert with_room is None or sum(a.nbytes for a in with_room) <= 4 * len(payload)


def tolerated(attempt: Any) -> tuple[Any, ...] | None:
    try:
        found = attempt()
    except ProtocolError:
        return None
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("n", "width"), [(0, 2**63), (2**62, 0), (-1, -1), (2**64, 2**64)])
def test_empty_results_of_impossible_shape_are_refused(n: int, width: int) -> None:
    with pytest.raises(ProtocolError):
        wire.results_of(b"x" * 12, n, width)
    with pytest.raises(ProtocolError):
        wire.queries_of(b"", n, width, "f4")


def test_held_rows_are_counted() -> None:
    with pytest.raises(ProtocolError, match="2 rows are marked as held, 1 were announced"):
        wire.vectors_of(b"\1\1" + bytes(4), 2, 1, 1)


# ---- frames that are none


def test_a_frame_of_just_the_limit_is_read_and_one_more_byte_is_not() -> None:
    header = b"\x81\xa8protocol\x01"
    [frame] = read(raw(wire.Hello.KIND, header, b"x" * (100 - len(header))), max_bytes=100)
    assert len(frame.payload) == 100 - len(header)
    with pytest.raises(ProtocolError, match="101 bytes, at most 100 are read"):
        read(raw(wire.Hello.KIND, header, b"x" * (101 - len(header)))[: wire.PREFIX_BYTES], max_bytes=100)


def test_a_prefix_alone_is_enough_to_refuse_and_nothing_is_kept() -> None:
    reader = wire.FrameReader(wire.HELLO_BYTES)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="Say Hello first"):
        list(reader.feed(struct.pack("<IBxxxIQ", 2**32 - 1, wire.Hello.KIND, 10, 0)))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert reader.waiting_bytes == 0


def test_what_follows_a_bad_frame_is_not_read() -> None:
    reader = wire.FrameReader(wire.MAX_FRAME_BYTES)
    frames = reader.feed(EVERY_KIND[0] + raw(99, b"\x80") + EVERY_KIND[0])
    assert next(frames).kind == wire.Hello.KIND
    with pytest.raises(ProtocolError, match="unknown kind 99"):
        next(frames)
    with pytest.raises(ProtocolError, match="unknown kind 99"):
        list(reader.feed(EVERY_KIND[0]))


def test_the_limit_can_be_raised_between_two_frames_of_one_read() -> None:
    reader = wire.FrameReader(wire.HELLO_BYTES)
    big = frame_of(wire.Knn(index="i", at="x", k=1, n=1), 1, bytes(2 * wire.HELLO_BYTES))
    kinds = []
    for frame in reader.feed(EVERY_KIND[0] + big):
        reader.max_bytes = wire.MAX_FRAME_BYTES
        kinds.append(frame.kind)
    assert kinds == [wire.Hello.KIND, wire.Knn.KIND]


def test_kinds_from_the_wrong_side_are_refused_before_they_are_parsed() -> None:
    for frame in EVERY_KIND:
        side, other = (wire.REQUESTS, wire.ANSWERS) if frame[4] in wire.REQUESTS else (wire.ANSWERS, wire.REQUESTS)
        assert len(list(wire.FrameReader(MIB, side).feed(frame))) == 1
        with pytest.raises(ProtocolError, match="from the wrong side"):
            list(wire.FrameReader(MIB, other).feed(frame))


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (raw(wire.Hello.KIND, b""), "does not parse"),
        (raw(wire.Hello.KIND, b"\x80"), "protocol"),
        (raw(wire.Status.KIND, b"\x80\x80"), "trailing"),
        (raw(wire.Hello.KIND, b"\xc0"), "does not parse"),
        (raw(wire.Hello.KIND, b"\x91\x01"), "Expected `object`, got `array`"),
        (raw(wire.Hello.KIND, b"\x81\xa8protocol\xa11"), "Expected `int`, got `str`"),
        (raw(wire.Hello.KIND, b"\x81\xa8protocol\xc3"), "Expected `int`, got `bool`"),
        (raw(wire.Hello.KIND, b"\x82\xa8protocol\x01\xa5token\xc4\x02ab"), "Expected `str`, got `bytes`"),
        (raw(wire.Hello.KIND, b"\x82\xa8protocol\x01\xa5token\xa2\xc3\x28"), "utf-8"),
        (raw(wire.Hello.KIND, b"\x82\xa8protocol\x01\xa5token\xa3\xed\xa0\x80"), "utf-8"),
        (raw(wire.Hello.KIND, b"\x82\xa8protocol\x01\xa5token\xdb\xff\xff\xff\xff"), "truncated"),
        (raw(wire.RangeReply.KIND, msgspec.msgpack.encode({"n": -1})), ">= 0"),
        (raw(wire.RangeReply.KIND, msgspec.msgpack.encode({"n": 2**32})), "<= 4294967295"),
        (raw(wire.RangeReply.KIND, msgspec.msgpack.encode({"n": 1.5})), "Expected `int`"),
        (raw(wire.RangeReply.KIND, msgspec.msgpack.encode({"n": math.nan})), "Expected `int`"),
    ],
)
def test_headers_that_are_none(frame: bytes, match: str) -> None:
    refused(frame, match)


@pytest.mark.parametrize("timeout", [math.nan, math.inf, -math.inf, 1e10])
@pytest.mark.parametrize("message", ["Knn", "Range", "Fetch", "Reconstruct"])
def test_a_timeout_has_to_be_a_time(message: str, timeout: float) -> None:
    fields = {"index": "i", "at": "x", "k": 1, "n": 1, "radius": 1.0, "timeout": timeout}
    refused(raw(getattr(wire, message).KIND, msgspec.msgpack.encode(fields)), "timeout")


def test_another_message_than_expected() -> None:
    with pytest.raises(ProtocolError, match="expected Welcome, found Hello"):
        wire.decode(read(EVERY_KIND[0])[0], wire.Welcome)


KNN = b"\x85\xa5index\xa1i\xa2at\xa1x\xa1k\x01\xa1n\x01\xa7columns"
FAILURE = b"\x83\xa5error\xa1E\xa7message\xa1m\xa5facts\x81\xa1a"
MANY = b"\xff\xff\xff\xff"
DEEP = 2_000_000


@pytest.mark.parametrize(
    "frame",
    [
        raw(wire.Knn.KIND, KNN + b"\xdd" + MANY),
        raw(wire.Fetch.KIND, KNN + b"\xdf" + MANY),
        raw(wire.Knn.KIND, KNN + b"\xdd" + struct.pack(">I", MIB) + b"\xa0" * MIB),
        raw(wire.Fetch.KIND, KNN + b"\xdf" + struct.pack(">I", MIB) + b"\xa0\xa0" * MIB),
        raw(wire.Failure.KIND, FAILURE + b"\xdd" + MANY),
        raw(wire.Failure.KIND, FAILURE + b"\xdf" + MANY),
        raw(wire.Failure.KIND, FAILURE + b"\xc6" + MANY),
        raw(wire.Failure.KIND, FAILURE + b"\xc9" + MANY + b"\x01"),
        raw(wire.Failure.KIND, FAILURE + b"\x91" * DEEP + b"\xc0"),
        raw(wire.Failure.KIND, FAILURE + b"\x81\xa0" * DEEP + b"\xc0"),
        raw(wire.Failure.KIND, FAILURE + b"\xdc\xff\xff" * 900 + b"\xc0" * 70_000),
        raw(wire.Failure.KIND, FAILURE + b"\x81\x80\x01"),
        raw(wire.Hello.KIND, b"\x81\xa1z" + b"\x91" * DEEP + b"\xc0"),
        raw(wire.Hello.KIND, b"\x81" * DEEP + b"\xc0"),
        raw(wire.Hello.KIND, b"\xdf" + MANY),
    ],
)
def test_bombs_cost_nothing(frame: bytes) -> None:
    cut = read(frame)[0]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="does not parse"):
            wire.decode(cut)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_a_header_is_bounded_apart_from_its_frame() -> None:
    long = b"\x81\xa6status\xdd" + b"\x80" * wire.MAX_HEADER_BYTES
    with pytest.raises(ProtocolError, match="a header of 8,388,617 bytes, at most 8,388,608 are read"):
        read(raw(wire.StatusReply.KIND, long))
    with pytest.raises(InvalidArgument, match="header of 8,"):
        wire.encode(wire.Range(index="i", at="x", radius=1.0, filter="a" * wire.MAX_HEADER_BYTES))


def test_a_frame_over_4_gib_is_not_made() -> None:
    part = bytes(MIB)
    with pytest.raises(InvalidArgument, match="at most 4,294,967,295 bytes"):
        wire.encode(wire.TableReply(rows=1), 1, [part] * 4096)


# ---- errors


def facts_of(cls: type[DfaissError]) -> dict[str, Any]:
    """A value for every fact of a class, of the type that it says."""
    sample = {"int": 3, "float": 0.5, "str": "text", "tuple[int, ...]": (1, 2), "tuple[str, ...]": ("a", "b"), "Any": 7}
    return {
        name: sample[kind]
        for base in cls.__mro__
        if issubclass(base, DfaissError) and base is not DfaissError
        for name, kind in vars(base).get("__annotations__", {}).items()
    }


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_comes_back_with_its_facts(name: str) -> None:
    cls = getattr(errors, name)
    sent = cls("what was found", remedy="Do that", **facts_of(cls))
    [frame] = read(frame_of(wire.failure_of(sent), 4))
    back = wire.error_of(wire.decode(frame, wire.Failure))
    assert type(back) is cls
    assert (str(back), back._facts) == (str(sent), sent._facts)


def test_facts_that_are_no_plain_values_arrive_as_such_or_as_text() -> None:
    sent = InvalidArgument("no", parameter="k", value=[np.int64(3), np.float32(0.5), np.bool_(True), {1}, 2**70])
    back = wire.error_of(wire.decode(read(frame_of(wire.failure_of(sent)))[0]))
    assert back._facts == {"parameter": "k", "value": (3, 0.5, True, "{1}", str(2**70))}


def test_texts_that_are_no_utf_8_or_endless_can_be_sent() -> None:
    sent = errors.StorageError("cannot read /data/\udcff", location="x" * 10**7)
    back = wire.error_of(wire.decode(read(frame_of(wire.failure_of(sent)))[0]))
    assert isinstance(back, errors.StorageError)
    assert back.message == "cannot read /data/\\udcff"
    assert back.location.endswith("x... (10,000,000 characters)")
    many = errors.InvalidVectors("no", column="v", row_ids=tuple(range(10**6)))
    assert len(frame_of(wire.failure_of(many))) < 10_000


@pytest.mark.parametrize(
    "facts",
    [
        {"waiting": "many"},
        {"waiting": 1.5},
        {"waiting": None},
        {"retry_after_seconds": "soon"},
        {"retry_after_seconds": math.nan},
        {"retry_after_seconds": math.inf},
        {"retry_after_seconds": [1.0]},
    ],
)
def test_facts_of_another_type_make_it_a_server_failed(facts: dict[str, Any]) -> None:
    back = wire.error_of(wire.Failure(error="Overloaded", message="m", facts=facts))
    assert type(back) is ServerFailed
    assert (back.message, back.server) == ("Overloaded: m", -1)


def test_facts_of_a_newer_server_are_left_out() -> None:
    facts = {"waiting": 4, "since": 1, "message": "x", "remedy": "y", "_facts": {}, "args": [], "__class__": "z"}
    back = wire.error_of(wire.Failure(error="Overloaded", message="m", remedy="r", facts=facts))
    assert type(back) is Overloaded
    assert (back.message, back.remedy, back._facts, back.waiting) == ("m", "r", {"waiting": 4}, 4)


@pytest.mark.parametrize("name", ["", "Exception", "SystemExit", "inspect", "_rebuild", "__all__", "annotations", "é"])
def test_only_errors_of_this_package_are_raised(name: str) -> None:
    back = wire.error_of(wire.Failure(error=name, message="m"))
    assert type(back) is ServerFailed
    assert back.server == -1


# ---- damage


def understand(frames: Iterator[wire.Frame]) -> int:
    """Do with frames what the two sides do; count those that were understood."""
    good = 0
    for frame in frames:
        message = wire.decode(frame)
        match message:
            case wire.Knn():
                wire.queries_of(frame.payload, message.n, 4, message.dtype)
            case wire.Range():
                wire.queries_of(frame.payload, 1, 4, message.dtype)
            case wire.KnnReply():
                wire.results_of(frame.payload, message.n, message.width)
            case wire.RangeReply():
                wire.results_of(frame.payload, message.n, 1)
            case wire.Fetch() | wire.Reconstruct():
                wire.row_ids_of(frame.payload, message.n)
            case wire.ReconstructReply():
                wire.vectors_of(frame.payload, message.n, message.held, message.dim)
            case wire.Failure():
                assert isinstance(wire.error_of(message), DfaissError)
        good += 1
    return good


def read_damaged(rng: np.random.Generator, count: int) -> tuple[int, int]:
    """Read so many damaged frames, each before a good one and cut in two; count the understood and the refused."""
    understood = refusals = 0
    for _ in range(count):
        first, second = EVERY_KIND[rng.integers(0, len(EVERY_KIND))], EVERY_KIND[rng.integers(0, len(EVERY_KIND))]
        stream = mutated(rng, first) + second
        cut = int(rng.integers(0, len(stream) + 1))
        reader = wire.FrameReader(64 * 1024)
        try:
            understood += understand(reader.feed(stream[:cut]))
            understood += understand(reader.feed(stream[cut:]))
        except ProtocolError:
            refusals += 1
        assert reader.waiting_bytes <= len(stream)
    return understood, refusals


def resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def damage_is_only_refused(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    read_damaged(rng, 2_000)  # what is allocated once
    before = resident_mib()
    understood = refusals = 0
    for _ in range(count // 2_000):
        good, bad = read_damaged(rng, 2_000)
        understood, refusals = understood + good, refusals + bad
        # What other tests left in this process may move by some MiB; a frame that stays takes 340 bytes to show.
        assert resident_mib() - before < 16
    # Neither all nor nothing: the damage reaches every depth.
    assert refusals > count / 8
    assert understood > count / 8


def test_damaged_frames_are_refused_and_nothing_else_happens() -> None:
    damage_is_only_refused(20, 50_000)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_million_damaged_frames() -> None:
    damage_is_only_refused(40, 1_000_000)


@given(st.binary(max_size=200), st.sampled_from(EVERY_KIND), st.integers(0, 60))
def test_any_bytes_after_a_good_start(data: bytes, good: bytes, kept: int) -> None:
    reader = wire.FrameReader(64 * 1024)
    try:
        understand(reader.feed(good[:kept] + data))
    except ProtocolError:
        return
    assert reader.waiting_bytes <= len(data) + kept


@given(kind=st.sampled_from(sorted(wire.REQUESTS | wire.ANSWERS)), value=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
))  # fmt: skip
def test_any_value_as_a_header(kind: int, value: Any) -> None:
    try:
        understand(wire.FrameReader(MIB).feed(raw(kind, msgspec.msgpack.encode(value))))
    except ProtocolError:
        return
    assert isinstance(value, dict)


@given(
    error=st.sampled_from(errors.__all__) | st.text(),
    message=st.text(),
    remedy=st.text(),
    facts=st.dictionaries(
        st.sampled_from(["waiting", "shards", "coverage", "server", "value", "location", "problems"]) | st.text(),
        st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers() | st.text()) | st.binary(),
    ),
)
def test_any_failure_is_an_error_of_this_package(error: str, message: str, remedy: str, facts: dict[str, Any]) -> None:
    back = wire.error_of(wire.Failure(error=error, message=message, remedy=remedy, facts=facts))
    assert isinstance(back, DfaissError)
    assert message in str(back)
