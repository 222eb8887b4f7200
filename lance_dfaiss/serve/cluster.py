"""The cluster file: what is served, by which servers, in which groups.

It is all that servers and clients have in common. It is small, meant to be read by people too, and replaced as a
whole: locally in one step, elsewhere as the store does it. Whoever reads a file that does not parse may have met its
writer half-way, keeps what it knew, and reads again later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypedDict, TypeVar

from ..errors import ClusterFileInvalid, CorruptIndex, InvalidArgument, ManifestInvalid, MissingFile, UnsupportedFormat
from ..manifest.codec import read_document
from ..manifest.validation import (
    Fields,
    Parser,
    Place,
    boolean,
    constant,
    integer,
    matching,
    optional,
    positive,
    shown,
    text,
    uri,
)
from ..storage import LocalReplaced, RemoteReplaced, open_replaced
from .placement import assign_groups, join_group, leave_group

T = TypeVar("T")

__all__ = [
    "ClusterFile",
    "ServedIndex",
    "ServerEntry",
    "existing_cluster",
    "note_versions",
    "plan_cluster",
    "read_cluster",
    "write_cluster",
]

_FORMAT: Final = 1
_MAX_BYTES: Final = 16 * 1024 * 1024
_LISTED_PROBLEMS: Final = 10
_MAX_PORT: Final = 65_535

_REMEDY: Final = "Correct the file, or have lance-dfaiss serve write it anew"
_HALF_WRITTEN: Final = "If it is being written, read it again; else have lance-dfaiss serve write it anew"
_NO_FILE: Final = "Name the file that lance-dfaiss serve --cluster-file wrote, or start the cluster"


class _IndexBase(TypedDict):
    name: str
    dataset: str
    index: str


class _IndexJSON(_IndexBase, total=False):
    index_uri: str | None
    version: int | None


class _ServerBase(TypedDict):
    id: int
    host: str
    port: int
    group: int


class _ServerJSON(_ServerBase, total=False):
    http_port: int | None
    weight: float


class _ClusterBase(TypedDict):
    format: int
    epoch: int
    replicas: int
    refresh_seconds: float
    tls: bool
    indexes: list[_IndexJSON]
    servers: list[_ServerJSON]


class _ClusterJSON(_ClusterBase, total=False):
    # Keys that are not total may be left out by whoever writes the file by hand.
    next_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedIndex:
    """An index that the cluster serves.

    Parameters
    ----------
    name : str
        Under which clients ask for it.
    dataset : str
        URI of the dataset.
    index : str
        Name of the index there.
    index_uri : str or None
        Where its files lie, if not in the dataset.
    version : int or None
        Dataset version to stay at; None to follow the dataset, or to start at the newest (``refresh_seconds`` 0).
    """

    name: str
    dataset: str
    index: str
    index_uri: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEntry:
    """One server.

    Parameters
    ----------
    id : int
        Never given to another server.
    host : str
        Name or address that clients reach it under.
    port : int
        For queries.
    http_port : int or None
        For health, metrics and the status page; None without.
    group : int
        Shard group, from 0.
    weight : float
        How much it holds, relative to the others: 0.001 to 1,000.
    """

    id: int
    host: str
    port: int
    http_port: int | None
    group: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """The layout of a cluster.

    Parameters
    ----------
    epoch : int
        Number of this layout, from 1; the next one bears the next number.
    replicas : int
        Servers that a group should have. A group has fewer only while the whole cluster has.
    refresh_seconds : float
        Distance of the grid of versions: servers move to the newest dataset version before each multiple. 0 if they
        move only when told to.
    indexes : tuple of ServedIndex
    servers : tuple of ServerEntry
        Their groups are numbered 0 to `groups` - 1, each with at least one server.
    tls : bool
        Whether servers speak TLS.
    next_id : int
        Id of the next server that joins; what is not above all present ids is raised to that.
    """

    epoch: int
    replicas: int
    refresh_seconds: float
    indexes: tuple[ServedIndex, ...]
    servers: tuple[ServerEntry, ...]
    tls: bool
    next_id: int = 0

    def __post_init__(self) -> None:
        first_free = max((server.id + 1 for server in self.servers), default=0)
        object.__setattr__(self, "next_id", max(self.next_id, first_free))

    @property
    def groups(self) -> int:
        """How many shard groups there are."""
        return len({server.group for server in self.servers})

    def weights_by_group(self) -> tuple[float, ...]:
        """Return the weight of each group: that of its weakest server, for all of its servers hold the same."""
        return tuple(
            min(server.weight for server in self.servers if server.group == group) for group in range(self.groups)
        )

    def server(self, server_id: int) -> ServerEntry:
        """Return a server by its id.

        Raises
        ------
        ClusterFileInvalid
            If there is none; the message names those there are.
        """
        for server in self.servers:
            if server.id == server_id:
                return server
        ids = ", ".join(str(server.id) for server in self.servers)
        problem = f"there is no server {server_id} in epoch {self.epoch}; there are {ids}"
        raise _invalid([problem], "", "Name one of these, or read the file again")

    @property
    def versions(self) -> dict[str, int | None]:
        """At which version each index is to stay, by its name; None for one that follows the dataset."""
        return {served.name: served.version for served in self.indexes}

    def with_server(
        self, host: str, port: int, *, http_port: int | None, weight: float = 1.0
    ) -> tuple[ClusterFile, ServerEntry]:
        """Return the next layout, with one more server, and that server.

        The new server joins the smallest group; once it and the left-over servers make a full group, they become
        a new one (see `placement.join_group`). Only in that case do shards move, all of them to the new group - unless
        the new server is the weakest of its group, which then gets less than before.

        Parameters
        ----------
        host : str
            Name or address that clients reach it under.
        port, http_port : int
            For queries; for health, metrics and the status page (or None).
        weight : float
            How much it holds, relative to the others: 0.001 to 1,000.
        """
        *groups, group = join_group(self._groups(), self._hosts(), self.replicas, host)
        joined = ServerEntry(
            id=self.next_id, host=host, port=port, http_port=http_port, group=group, weight=float(weight)
        )
        return self._next((*self._regrouped(self.servers, groups), joined)), joined

    def with_versions(self, versions: Mapping[str, int | None]) -> ClusterFile:
        """Return the same layout with other versions to stay at, by name of the index; None for none."""
        indexes = (replace(one, version=versions.get(one.name, one.version)) for one in self.indexes)
        return replace(self, indexes=tuple(indexes))

    def without_server(self, server_id: int) -> ClusterFile:
        """Return the next layout, without a server. Its id is not given out again.

        No group number changes. If the group is left with enough servers, nothing moves. Else a left-over server of
        another group takes the place and loads what the group holds. If there is none, the last group is given up:
        its shards are spread over the others, one of its servers takes the place, the others become further replicas
        (see `placement.leave_group`).

        Raises
        ------
        ClusterFileInvalid
            If there is no such server.
        InvalidArgument
            If it is the only one.
        """
        leaving = self.servers.index(self.server(server_id))
        if len(self.servers) == 1:
            raise InvalidArgument(
                f"server {server_id} is the only one of the cluster",
                remedy="Stop the cluster, or add another server first",
                parameter="server_id",
                value=server_id,
            )
        groups = leave_group(self._groups(), self._hosts(), self.replicas, leaving)
        stay = tuple(server for server in self.servers if server.id != server_id)
        return self._next(self._regrouped(stay, groups))

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        stored: _ClusterJSON = {
            "format": _FORMAT,
            "epoch": self.epoch,
            "replicas": self.replicas,
            "refresh_seconds": self.refresh_seconds,
            "tls": self.tls,
            "next_id": self.next_id,
            "indexes": [
                {
                    "name": one.name,
                    "dataset": one.dataset,
                    "index": one.index,
                    "index_uri": one.index_uri,
                    "version": one.version,
                }
                for one in self.indexes
            ],
            "servers": [
                {
                    "id": one.id,
                    "host": one.host,
                    "port": one.port,
                    "http_port": one.http_port,
                    "group": one.group,
                    "weight": one.weight,
                }
                for one in self.servers
            ],
        }
        return dict(stored)

    @classmethod
    def from_json(cls, value: object, *, location: str = "") -> ClusterFile:
        """Return the layout that a JSON value holds.

        Parameters
        ----------
        value : object
            The stored form.
        location : str
            Names it in messages.

        Raises
        ------
        ClusterFileInvalid
            Listing every problem with its JSON path.
        """
        place = Place()
        cluster = _parse_cluster(value, place)
        if place.problems:
            raise _invalid(place.problems, location, _REMEDY)
        return cluster

    def _groups(self) -> list[int]:
        return [server.group for server in self.servers]

    def _hosts(self) -> list[str]:
        return [server.host for server in self.servers]

    @staticmethod
    def _regrouped(servers: Sequence[ServerEntry], groups: Sequence[int]) -> tuple[ServerEntry, ...]:
        return tuple(replace(server, group=group) for server, group in zip(servers, groups, strict=True))

    def _next(self, servers: tuple[ServerEntry, ...]) -> ClusterFile:
        return replace(self, epoch=self.epoch + 1, servers=servers)


def plan_cluster(
    indexes: Sequence[ServedIndex],
    servers: Sequence[tuple[str, int, int | None]],
    *,
    replicas: int = 1,
    refresh_seconds: float = 10.0,
    tls: bool = False,
    weights: Sequence[float] | None = None,
) -> ClusterFile:
    """Return the first layout of a cluster. Pure: nothing is read or written.

    Parameters
    ----------
    indexes : sequence of ServedIndex
        What is served.
    servers : sequence of (str, int, int or None)
        Host, port and HTTP port of each server; ids are given in this order, from 0.
    replicas : int
        Servers that hold the same shards.
    refresh_seconds : float
        Distance of the grid of versions; 0 for servers that move only when told to.
    tls : bool
        Whether servers speak TLS.
    weights : sequence of float, optional
        How much each server holds, relative to the others; all the same without.

    Raises
    ------
    InvalidArgument
        If there are fewer servers than replicas, or not one weight for each server.
    """
    shares = [1.0] * len(servers) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(servers):
        raise InvalidArgument(
            f"expected one weight for each of {len(servers)} servers, found {len(shares)}",
            parameter="weights",
            value=weights,
        )
    groups = assign_groups([host for host, _, _ in servers], replicas)
    return ClusterFile(
        epoch=1,
        replicas=replicas,
        refresh_seconds=float(refresh_seconds),
        indexes=tuple(indexes),
        servers=tuple(
            ServerEntry(id=number, host=host, port=port, http_port=http_port, group=group, weight=weight)
            for number, ((host, port, http_port), group, weight) in enumerate(zip(servers, groups, shares, strict=True))
        ),
        tls=tls,
    )


def read_cluster(location: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None) -> ClusterFile:
    """Read a cluster file.

    Parameters
    ----------
    location : str or path
        A local path, or any URL that fsspec and an installed backend understand.
    storage_options : mapping, optional
        For the backend.

    Raises
    ------
    ClusterFileInvalid
        If there is no such file, or it is half-written or wrong; lists every problem.
    StorageError
        If it could not be read.
    UntrustedLocation
        If the URL is chained (``a::b``).
    InvalidArgument
        If no installed backend understands the URL.
    """
    file = open_replaced(location, storage_options)
    try:
        return _read(file)
    except MissingFile as exc:
        raise _invalid(["there is no such file"], file.location, _NO_FILE) from exc


def existing_cluster(
    location: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None
) -> ClusterFile | None:
    """Read a cluster file, where there is one.

    Parameters
    ----------
    location, storage_options
        As for `read_cluster`.

    Returns
    -------
    ClusterFile or None
        None if there is no such file.

    Raises
    ------
    DfaissError
        As `read_cluster` does for what is there and is no cluster file.
    """
    try:
        return read_cluster(location, storage_options)
    except ClusterFileInvalid as exc:
        if isinstance(exc.__cause__, MissingFile):
            return None
        raise


def write_cluster(
    location: str | os.PathLike[str],
    cluster: ClusterFile,
    *,
    expected_epoch: int | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> None:
    """Write a cluster file in place of the one that is there.

    On a local path that happens in one step: a reader finds the old file or the new one. So it does on object stores.
    On other remote file systems a reader may meet a half-written file, which it refuses and reads again.

    Parameters
    ----------
    location : str or path
        A local path, or any URL that fsspec and an installed backend understand.
    cluster : ClusterFile
        It is checked as on reading.
    expected_epoch : int, optional
        Only write if the file there has this epoch; 0 if there should be none. The file is read right before it is
        written. On a local path, writers of one machine take turns; elsewhere nothing ties the two together: of two
        writers at the same moment both may succeed, and the later one wins. It guards against a stale copy, not
        against a race: let one operator change a layout at a time.
    storage_options : mapping, optional
        For the backend.

    Raises
    ------
    ClusterFileInvalid
        If the layout has problems (nothing is written then), or the file there has another epoch.
    StorageError
        If the file could not be written.
    UntrustedLocation
        If the URL is chained.
    InvalidArgument
        If no installed backend understands the URL.
    """
    file = open_replaced(location, storage_options)
    value = cluster.to_json()
    ClusterFile.from_json(value, location=f"to be written to {file.location}")
    with file.alone():
        if expected_epoch is not None:
            _check_epoch(file, expected_epoch)
        file.write(_encoded(value))


def note_versions(
    location: str | os.PathLike[str],
    versions: Mapping[str, int | None],
    storage_options: Mapping[str, str] | None = None,
) -> None:
    """Note in a cluster file at which versions indexes are to stay, and leave the rest as it is by now.

    Parameters
    ----------
    location, storage_options
        As for `read_cluster`.
    versions : mapping of str to (int or None)
        By name of the index; None for one that follows the dataset. Names that the file does not have are left out.

    Raises
    ------
    DfaissError
        What `read_cluster` and `write_cluster` raise.
    """
    file = open_replaced(location, storage_options)
    with file.alone():
        cluster = read_cluster(location, storage_options)
        noted = cluster.with_versions(versions)
        if noted != cluster:
            file.write(_encoded(noted.to_json()))


def _encoded(value: dict[str, Any]) -> bytes:
    # Indented: people read it, and change a host by hand.
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read(file: LocalReplaced | RemoteReplaced) -> ClusterFile:
    try:
        data = file.read(_MAX_BYTES)
    except IsADirectoryError as exc:
        raise _invalid(["this is a folder"], file.location, _NO_FILE) from exc
    except MissingFile:
        raise
    except CorruptIndex as exc:
        problem = f"expected at most {_MAX_BYTES:,} bytes, found more: this is another file"
        raise _invalid([problem], file.location, _NO_FILE) from exc
    return _decode(data, file.location)


def _check_epoch(file: LocalReplaced | RemoteReplaced, expected_epoch: int) -> None:
    try:
        found = f"epoch {_read(file).epoch}"
    except MissingFile:
        found = "no file"
    expected = f"epoch {expected_epoch}" if expected_epoch else "no file"
    if found != expected:
        problem = f"expected {expected} there, found {found}: somebody changed the layout meanwhile"
        raise _invalid([problem], file.location, "Read it again, and repeat the change on what it says now")


def _invalid(problems: Sequence[str], location: str, remedy: str) -> ClusterFileInvalid:
    listed = "; ".join(problems[:_LISTED_PROBLEMS])
    more = len(problems) - _LISTED_PROBLEMS
    return ClusterFileInvalid(
        f"cluster file {location}".rstrip() + f": {listed}" + (f"; and {more} more problems" if more > 0 else ""),
        remedy=remedy,
        location=location,
        problems=tuple(problems),
    )


def _decode(data: bytes, location: str) -> ClusterFile:
    if not data.strip():
        raise _invalid(["$: the file is empty"], location, _HALF_WRITTEN)
    try:
        return read_document(data, parse=_parse_cluster, location=location)
    except UnsupportedFormat as exc:
        problem = f"$.format: expected {_FORMAT}, found {exc.found_version}, which a later release wrote"
        raise _invalid([problem], location, "Upgrade lance-dfaiss, or have this version write the file") from exc
    except ManifestInvalid as exc:
        # What is cut off somewhere is no JSON, and that is then its only problem.
        is_json = not isinstance(exc.__cause__, (ValueError, RecursionError))
        raise _invalid(exc.problems, location, _REMEDY if is_json else _HALF_WRITTEN) from exc


@dataclass(frozen=True, slots=True)
class _Sound(Generic[T]):
    """The items of a list that have no problem of their own, by position: only these are compared with each other."""

    items: Mapping[int, T]
    are_all: bool


def _sound(parse_item: Parser[T]) -> Parser[_Sound[T]]:
    def parse(value: object, place: Place) -> _Sound[T]:
        if not isinstance(value, list):
            place.expected("a list", value)
            return _Sound({}, are_all=False)
        if not value:
            place.report("expected at least one, found none")
        items = {}
        for position, item in enumerate(value):
            before = len(place.problems)
            parsed = parse_item(item, place.at(position))
            if len(place.problems) == before:
                items[position] = parsed
        return _Sound(items, are_all=len(items) == len(value))

    return parse


def _parse_cluster(value: object, place: Place) -> ClusterFile:
    fields = Fields(value, place, shape=_ClusterJSON)
    fields.get("format", constant(_FORMAT))
    indexes = fields.get("indexes", _sound(_parse_index))
    servers = fields.get("servers", _sound(_parse_server))
    names = {position: [f"name {shown(index.name)}"] for position, index in indexes.items.items()}
    _check_distinct(names, place.at("indexes"))
    _check_distinct({position: _own(server) for position, server in servers.items.items()}, place.at("servers"))
    if servers.are_all:  # one with a problem may be the one that a group seems to lack
        _check_groups({server.group for server in servers.items.values()}, place.at("servers"))
    return ClusterFile(
        epoch=fields.get("epoch", positive),
        replicas=fields.get("replicas", positive),
        refresh_seconds=fields.get("refresh_seconds", _seconds),
        indexes=tuple(indexes.items.values()),
        servers=tuple(servers.items.values()),
        tls=fields.get("tls", boolean),
        next_id=fields.get("next_id", integer),
    )


def _parse_index(value: object, place: Place) -> ServedIndex:
    fields = Fields(value, place, shape=_IndexJSON)
    return ServedIndex(
        name=fields.get("name", text),
        dataset=fields.get("dataset", uri),
        index=fields.get("index", text),
        index_uri=fields.get("index_uri", optional(uri)),
        version=fields.get("version", optional(positive)),
    )


def _parse_server(value: object, place: Place) -> ServerEntry:
    fields = Fields(value, place, shape=_ServerJSON)
    return ServerEntry(
        id=fields.get("id", integer),
        host=fields.get("host", _host),
        port=fields.get("port", _port),
        http_port=fields.get("http_port", optional(_port)),
        group=fields.get("group", integer),
        weight=fields.get("weight", _weight),
    )


_host: Final = matching(r"[^\s/@\[\]\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}", "a host name or address")


def _port(value: object, place: Place) -> int:
    if type(value) is int and 1 <= value <= _MAX_PORT:
        return value
    place.expected(f"a port from 1 to {_MAX_PORT}", value)
    return 1


def _between(lowest: float, highest: float, what: str) -> Parser[float]:
    def parse(value: object, place: Place) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and lowest <= value <= highest:
            return float(value)
        place.expected(f"{what} from {lowest:g} to {highest:g}", value)
        return 1.0

    return parse


_weight: Final = _between(0.001, 1_000, "a weight")
_grid: Final = _between(0.01, 1_000_000, "0 or a number of seconds")


def _seconds(value: object, place: Place) -> float:
    # 0 is "never", what is just above it would be "all the time".
    return 0.0 if value == 0 and not isinstance(value, bool) else _grid(value, place)


def _own(server: ServerEntry) -> list[str]:
    """Return what no other server may have too."""
    ports = [server.port] if server.http_port is None else [server.port, server.http_port]
    return [f"id {server.id}", *(f"port {port} of {shown(server.host)}" for port in ports)]


def _check_distinct(facts: Mapping[int, Sequence[str]], place: Place) -> None:
    owners: dict[str, int] = {}
    for position, own in facts.items():
        for fact in own:
            if fact in owners:
                place.at(position).report(f"{fact} is taken by {place.at(owners[fact]).path}")
            owners.setdefault(fact, position)


def _check_groups(groups: set[int], place: Place) -> None:
    # Their count bounds the work, whatever numbers the file names.
    without = sorted(set(range(len(groups))) - groups)
    if without:
        named = ", ".join(map(str, without[:_LISTED_PROBLEMS]))
        place.report(f"{len(groups)} groups must be numbered 0 to {len(groups) - 1}, but no server is in group {named}")
