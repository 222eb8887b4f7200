"""Frames: what travels between a client and a server, as bytes. No sockets here.

A frame is a prefix of 20 bytes (little-endian: length of the rest, kind, three zero bytes, length of the header,
request id), a header in msgpack, and a payload of raw little-endian arrays, followed by an Arrow IPC stream where the
message says so. ``docs/reference/frames.md`` is the full description, for clients in other languages.
"""

from __future__ import annotations

import functools
import math
import numbers
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..errors import DfaissError, InvalidArgument, ProtocolError, ServerFailed
from ..types import Float32Array, UInt64Array

__all__ = [
    "ANSWERS",
    "HELLO_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "PREFIX_BYTES",
    "PROTOCOL",
    "REQUESTS",
    "Buffer",
    "Cancel",
    "Done",
    "Drain",
    "Failure",
    "Fetch",
    "Frame",
    "FrameReader",
    "Hello",
    "Knn",
    "KnnReply",
    "Limits",
    "Message",
    "Offer",
    "Offers",
    "Range",
    "RangeReply",
    "Reconstruct",
    "ReconstructReply",
    "Reload",
    "Status",
    "StatusReply",
    "TableReply",
    "Welcome",
    "decode",
    "encode",
    "error_of",
    "failure_of",
    "joined_results",
    "queries_of",
    "results_of",
    "row_ids_of",
    "vectors_of",
]

PROTOCOL = 1
"""Version of the protocol; two sides speak together when theirs are equal."""

HELLO_BYTES = 4 * 1024
"""The longest frame that is read from somebody who has not said who they are."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""The longest frame that is read, unless set otherwise: 16,000 queries of 1,024 float32."""

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""The longest header. Arrays are payload; but one byte of msgpack can become a hundred bytes of objects."""

_PREFIX = struct.Struct("<IB3xIQ")
PREFIX_BYTES = _PREFIX.size

Buffer: TypeAlias = bytes | bytearray | memoryview

_QUERY_TYPES: dict[str, np.dtype[Any]] = {"f4": np.dtype("<f4"), "f2": np.dtype("<f2")}
_DISTANCE = np.dtype("<f4")
_ROW_ID = np.dtype("<u8")
_MOST = 2**32 - 1  # what a length in the prefix can be; no message has more of anything

# Types of fields. A number out of range makes the header one that does not parse, NaN and infinity too.
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Timestamp: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
_Names: TypeAlias = Annotated[tuple[str, ...], msgspec.Meta(max_length=16_384)]
_Expressions: TypeAlias = Annotated[dict[str, str], msgspec.Meta(max_length=16_384)]

_LONGEST_TEXT = 8 * 1024  # characters of a text in a `Failure`
_LONGEST_LIST = 1_000  # items of a list in a `Failure`


class Message(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of the headers: a map by field name, fields of default value left out, unknown ones ignored."""

    KIND: ClassVar[int]


class Limits(msgspec.Struct, frozen=True):
    """What a server takes from one client.

    Parameters
    ----------
    frame_bytes : int
        Longest frame.
    k : int
        Most results per query.
    queries : int
        Most queries in one request.
    pending : int
        Most requests of one connection that wait for an answer.
    """

    frame_bytes: _Count = MAX_FRAME_BYTES
    k: _Count = 10_000
    queries: _Count = 16_384
    pending: _Count = 4_096


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot of one index that a server answers for.

    Parameters
    ----------
    index : str
        Name under which the index is served.
    at : str
        The snapshot; requests name it. Equal on all servers that hold the same one.
    epoch : int
        Layout of the cluster (`cluster.ClusterFile.epoch`) that shards were placed by.
    version : int
        Dataset version.
    committed_at : float
        When that was committed, in seconds since 1970.
    generation : str
        Of the index.
    created_at : str
        When the generation was made (ISO 8601); tells the newer of two at one version.
    group : int
        Shard group that this server belongs to.
    rows : tuple of int
        Rows that can be found, by group: those of all servers together.
    shards : tuple of str
        Names of the shards that this group holds; at most a thousand.
    metric : str
    dim : int
    lists : int
        IVF lists; 0 without.
    column : str
        The vector column.
    columns : tuple of str
        Columns that may be asked for.
    payload : tuple of str
        Those of them that are in RAM.
    stale : bool
        The server has stepped back from it, to an older version: others go before.
    """

    index: str
    at: str
    epoch: int
    version: int
    committed_at: _Timestamp
    generation: str
    created_at: str
    group: _Count
    rows: tuple[int, ...]
    shards: tuple[str, ...]
    metric: Literal["l2", "cosine", "dot"]
    dim: _Count
    lists: _Count
    column: str
    columns: tuple[str, ...]
    payload: tuple[str, ...]
    stale: bool = False

    @property
    def order(self) -> tuple[int, bool, int, float, str]:
        """Sorts snapshots of an index from old to new."""
        return self.epoch, not self.stale, self.version, self.committed_at, self.created_at


class Hello(Message):
    """First frame of a client."""

    KIND = 1

    protocol: int
    token: str = ""
    client: str = ""


class Welcome(Message):
    """Answer to `Hello`: the client may ask."""

    KIND = 2

    protocol: int
    server: int
    epoch: int
    limits: Limits
    offers: tuple[Offer, ...]
    admin: bool = False
    draining: bool = False


class Offers(Message):
    """Sent by a server, unasked (request id 0), whenever what it offers changes."""

    KIND = 3

    epoch: int
    offers: tuple[Offer, ...]
    draining: bool = False


class Knn(Message):
    """Nearest rows. Payload: queries ``(n, dim)`` of ``dtype``. Answer: `KnnReply`."""

    KIND = 10

    index: str
    at: str
    k: int
    n: _Count
    dtype: str = "f4"
    nprobe: int | None = None
    ef: int | None = None
    k_factor: int | None = None
    filter: str | None = None
    tail: bool = True
    timeout: _Seconds | None = None
    columns: _Names = ()
    explain: bool = False


class KnnReply(Message):
    """Payload: distances float32 ``(n, width)``, row ids uint64 ``(n, width)``, then the columns asked for.

    The columns are of all results that are rows, query by query, as an Arrow IPC stream.
    """

    KIND = 11

    n: _Count
    width: _Count
    queued: float = 0.0
    searched: float = 0.0
    stages: tuple[dict[str, Any], ...] = ()


class Range(Message):
    """Rows nearer than a radius. Payload: one query ``(dim,)``. Answer: `RangeReply`."""

    KIND = 12

    index: str
    at: str
    radius: float
    dtype: str = "f4"
    nprobe: int | None = None
    filter: str | None = None
    tail: bool = True
    timeout: _Seconds | None = None
    columns: _Names = ()


class RangeReply(Message):
    """Payload: distances float32 ``(n,)``, row ids uint64 ``(n,)``, then the columns asked for."""

    KIND = 13

    n: _Count


class Fetch(Message):
    """Columns of rows. Payload: row ids uint64 ``(n,)``. Answer: `TableReply`, one row each, in that order.

    ``columns`` is None for all that are allowed, a list of names, or a map of names to SQL expressions.
    """

    KIND = 14

    index: str
    at: str
    n: _Count
    columns: _Names | _Expressions | None = None
    timeout: _Seconds | None = None


class TableReply(Message):
    """Payload: an Arrow IPC stream."""

    KIND = 15

    rows: _Count


class Reconstruct(Message):
    """Vectors of rows. Payload: row ids uint64 ``(n,)``. Answer: `ReconstructReply`."""

    KIND = 16

    index: str
    at: str
    n: _Count
    timeout: _Seconds | None = None


class ReconstructReply(Message):
    """Payload: which rows this server holds, uint8 ``(n,)``, then the vectors of those, float32 ``(held, dim)``."""

    KIND = 17

    n: _Count
    held: _Count
    dim: _Count


class Status(Message):
    """Ask how the server is. Answer: `StatusReply`."""

    KIND = 20


class StatusReply(Message):
    """``status`` is a map; see the reference of ``lance-dfaiss status``."""

    KIND = 21

    status: dict[str, Any]


class Reload(Message):
    """Admin: read the cluster file again, and move to a dataset version. Answer: `Done`, once that is offered.

    Without a version, the newest one. With ``hold`` the index stays there until the next `Reload`, also where servers
    follow the dataset, and in servers that are started later.
    """

    KIND = 22

    index: str | None = None
    version: int | None = None
    hold: bool = False


class Drain(Message):
    """Admin: answer what was asked, take nothing new, and stop. Answer: `Done`, when it has begun."""

    KIND = 23


class Done(Message):
    """Admin work was done; ``facts`` tells what it came to."""

    KIND = 24

    facts: dict[str, Any] = {}


class Failure(Message):
    """Answer to any request: an error of this package by class name, with its facts."""

    KIND = 30

    error: str
    message: str
    remedy: str = ""
    facts: dict[str, Any] = {}


class Cancel(Message):
    """The client does not want the answer to the request of this id any more. No answer."""

    KIND = 31


_MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Offers, Knn, KnnReply, Range, RangeReply, Fetch, TableReply, Reconstruct, ReconstructReply,
    Status, StatusReply, Reload, Drain, Done, Failure, Cancel,
)  # fmt: skip
_DECODERS = {message.KIND: msgspec.msgpack.Decoder(message) for message in _MESSAGES}
_KINDS = {message.KIND: message for message in _MESSAGES}
_ENCODER = msgspec.msgpack.Encoder()

REQUESTS = frozenset(message.KIND for message in (Hello, Knn, Range, Fetch, Reconstruct, Status, Reload, Drain, Cancel))
"""Kinds that clients send."""

ANSWERS = frozenset(_KINDS) - REQUESTS
"""Kinds that servers send."""

_Expected = TypeVar("_Expected", bound=Message)


class Frame(NamedTuple):
    """One frame, taken apart but not understood.

    Parameters
    ----------
    kind : int
        What its header is.
    request_id : int
        Chosen by the client; an answer bears that of its request.
    header, payload : memoryview
        Valid for as long as the frame is.
    """

    kind: int
    request_id: int
    header: memoryview
    payload: memoryview


class FrameReader:
    """Cuts a stream of bytes into frames.

    Parameters
    ----------
    max_bytes : int
        Longest frame without its prefix; can be raised later.
    kinds : set of int
        The kinds that may come: `REQUESTS` at a server, `ANSWERS` at a client. Others are refused before they are
        parsed.
    """

    def __init__(self, max_bytes: int, kinds: frozenset[int] = REQUESTS | ANSWERS) -> None:
        self.max_bytes = max_bytes
        self._kinds = kinds
        self._waiting = bytearray()
        self._needed = PREFIX_BYTES
        self._broken: ProtocolError | None = None

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Take bytes and yield the frames that they complete; to be read to the end before more is fed.

        Raises
        ------
        ProtocolError
            If a prefix announces a longer frame, a header longer than its frame or than `MAX_HEADER_BYTES`, or a
            kind that does not belong here. Nothing was allocated for it. Nothing that follows can be read: from then
            on, every call raises it.
        """
        if self._broken is not None:
            raise self._broken
        if self._waiting:
            self._waiting += data
            if len(self._waiting) < self._needed:
                return
            data, self._waiting = self._waiting, bytearray()
        view = memoryview(data)
        at, end = 0, len(view)
        self._needed = PREFIX_BYTES
        while end - at >= PREFIX_BYTES:
            length, kind, header, request_id = _PREFIX.unpack_from(view, at)
            if length > self.max_bytes or header > length or header > MAX_HEADER_BYTES or kind not in self._kinds:
                self._broken = self._refused(length, kind, header)
                raise self._broken
            start = at + PREFIX_BYTES
            if end - start < length:
                self._needed = PREFIX_BYTES + length
                break
            yield Frame(kind, request_id, view[start : start + header], view[start + header : start + length])
            at = start + length
        if at < end:
            self._waiting = bytearray(view[at:])

    @property
    def waiting_bytes(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._waiting)

    def _refused(self, length: int, kind: int, header: int) -> ProtocolError:
        if kind not in _KINDS:
            return ProtocolError(f"a frame of unknown kind {kind}", remedy=f"Speak protocol version {PROTOCOL}")
        if kind not in self._kinds:
            return ProtocolError(f"a {_KINDS[kind].__name__} from the wrong side")
        if length > self.max_bytes:
            return ProtocolError(
                f"a frame of {length:,} bytes, at most {self.max_bytes:,} are read",
                remedy="Send fewer queries at once" if self.max_bytes > HELLO_BYTES else "Say Hello first",
            )
        if header > length:
            return ProtocolError(f"a frame of {length:,} bytes with a header of {header:,}")
        return ProtocolError(f"a header of {header:,} bytes, at most {MAX_HEADER_BYTES:,} are read")


def encode(message: Message, request_id: int = 0, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the parts of a frame, to be written one after the other.

    Parameters
    ----------
    message : Message
        Its header.
    request_id : int
        0 to 2**64 - 1.
    payload : sequence of bytes-like
        What follows the header; of memoryviews, those of bytes.

    Raises
    ------
    InvalidArgument
        If nobody would read it: a header over `MAX_HEADER_BYTES`, or 4 GiB and more in all.
    """
    header = _ENCODER.encode(message)
    length = len(header) + sum(map(len, payload))
    if len(header) > MAX_HEADER_BYTES or length > _MOST:
        raise InvalidArgument(
            f"a {type(message).__name__} of {length:,} bytes with a header of {len(header):,}; a frame is at most "
            f"{_MOST:,} bytes and its header {MAX_HEADER_BYTES:,}",
            remedy="Ask for less at once, or with a shorter filter",
        )
    prefix = _PREFIX.pack(length, message.KIND, len(header), request_id)
    return [prefix + header, *payload]


def decode(frame: Frame, expected: type[_Expected] | None = None) -> Any:
    """Return the header of a frame as a message.

    Parameters
    ----------
    frame : Frame
        From a `FrameReader`.
    expected : type, optional
        The only message that is good here.

    Raises
    ------
    ProtocolError
        If the header does not parse, or is another message.
    """
    if expected is not None and frame.kind != expected.KIND:
        raise ProtocolError(f"expected {expected.__name__}, found {_KINDS[frame.kind].__name__}")
    try:
        return _DECODERS[frame.kind].decode(frame.header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError, TypeError) as exc:
        # TypeError: older msgspec on a map as the key of a map.
        raise ProtocolError(f"the header of a {_KINDS[frame.kind].__name__} does not parse: {exc}") from exc


def queries_of(payload: Buffer, n: int, dim: int, dtype: str) -> Float32Array:
    """Return the queries in a payload as float32 ``(n, dim)``, aligned; read-only where they are a view of it.

    Raises
    ------
    ProtocolError
        If the payload has another length, or the type is unknown.
    """
    kind = _QUERY_TYPES.get(dtype)
    if kind is None:
        raise ProtocolError(f"queries of type {dtype!r}; known are {', '.join(_QUERY_TYPES)}")
    if not (0 <= n <= _MOST and 0 <= dim <= _MOST) or len(payload) != n * dim * kind.itemsize:
        raise ProtocolError(f"{len(payload)} bytes are not {n} queries of dimension {dim} as {dtype}")
    queries: Float32Array = np.ndarray((n, dim), kind, payload)
    # Frames begin anywhere in what was received. FAISS reads through a float pointer, which has to be aligned.
    return queries if queries.flags.aligned and kind == np.float32 else queries.astype(np.float32)


def results_of(payload: Buffer, n: int, width: int) -> tuple[Float32Array, UInt64Array, memoryview]:
    """Return the distances and row ids in a payload, ``(n, width)``, and what follows them.

    The arrays are views of the payload where they can be: read-only, and not always aligned.

    Raises
    ------
    ProtocolError
        If the payload is too short.
    """
    count = n * width
    rows_at, end = count * _DISTANCE.itemsize, count * (_DISTANCE.itemsize + _ROW_ID.itemsize)
    if not (0 <= n <= _MOST and 0 <= width <= _MOST) or len(payload) < end:
        raise ProtocolError(f"{len(payload)} bytes do not hold {n} times {width} results")
    distances: Float32Array = np.ndarray((n, width), _DISTANCE, payload)
    row_ids: UInt64Array = np.ndarray((n, width), _ROW_ID, payload, rows_at)
    return distances, row_ids, memoryview(payload)[end:]


def row_ids_of(payload: Buffer, n: int) -> UInt64Array:
    """Return the row ids ``(n,)`` in the payload of a `Fetch` or `Reconstruct`, aligned.

    Raises
    ------
    ProtocolError
        If the payload has another length.
    """
    if n < 0 or len(payload) != n * _ROW_ID.itemsize:
        raise ProtocolError(f"{len(payload)} bytes are not {n} row ids")
    row_ids = np.frombuffer(payload, _ROW_ID)
    return row_ids.astype(np.uint64, copy=not row_ids.flags.aligned)


def vectors_of(payload: Buffer, n: int, held: int, dim: int) -> tuple[NDArray[np.bool_], Float32Array]:
    """Return what a `ReconstructReply` bears: which rows are held ``(n,)``, and their vectors ``(held, dim)``.

    Raises
    ------
    ProtocolError
        If the payload has another length, or marks another number of rows as held.
    """
    if not (0 <= held <= n <= _MOST and 0 <= dim <= _MOST) or len(payload) != n + held * dim * _DISTANCE.itemsize:
        raise ProtocolError(f"{len(payload)} bytes are not {held} vectors of dimension {dim} for {n} rows")
    mask = np.frombuffer(payload, np.uint8, n) != 0
    if np.count_nonzero(mask) != held:
        raise ProtocolError(f"{np.count_nonzero(mask)} rows are marked as held, {held} were announced")
    return mask, np.frombuffer(payload, _DISTANCE, held * dim, n).reshape(held, dim)


def joined_results(distances: Float32Array, row_ids: UInt64Array) -> list[Buffer]:
    """Return distances and row ids as payload."""
    return [
        np.ascontiguousarray(distances, _DISTANCE).tobytes(),
        np.ascontiguousarray(row_ids, _ROW_ID).tobytes(),
    ]


def failure_of(error: DfaissError) -> Failure:
    """Return an error as it travels: facts that are no plain values as text, long texts and lists cut."""
    facts = {name: _plain(value) for name, value in error._facts.items()}
    return Failure(error=type(error).__name__, message=_text(error.message), remedy=_text(error.remedy), facts=facts)


def error_of(failure: Failure) -> DfaissError:
    """Return the error that a failure tells of.

    Facts that its class does not have are left out: the server may be newer. A class that is not known here, or a
    fact of another type than the class says, make it a `ServerFailed`.
    """
    cls = getattr(errors, failure.error, None) if failure.error in errors.__all__ else None
    if cls is None:
        return _unknown(failure)
    types = _types_of_facts(cls)
    try:
        facts = {name: _fact(value, types[name]) for name, value in failure.facts.items() if name in types}
    except msgspec.ValidationError:
        return _unknown(failure)
    return cls(failure.message, remedy=failure.remedy, **facts)  # type: ignore[no-any-return]


def _unknown(failure: Failure) -> ServerFailed:
    return ServerFailed(f"{failure.error}: {failure.message}", remedy=failure.remedy, server=-1)


@functools.cache
def _types_of_facts(cls: type[DfaissError]) -> Mapping[str, Any]:
    return {name: kind for name, kind in get_type_hints(cls).items() if name not in ("message", "remedy")}


def _fact(value: Any, kind: Any) -> Any:
    # A caller counts with what it finds in an error: a delay that is a text or NaN would fail far from here.
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError("not a finite number")
    if kind is Any:
        return tuple(value) if isinstance(value, list) else value
    return msgspec.convert(value, kind)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, numbers.Integral):  # NumPy's too
        number = int(value)
        return number if -(2**63) <= number < 2**64 else str(number)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value[:_LONGEST_LIST]]
    return _text(str(value))


def _text(text: str) -> str:
    """Return a text that can be sent: valid UTF-8 (a path may hold any byte) and not endless."""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}... ({len(text):,} characters)"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
