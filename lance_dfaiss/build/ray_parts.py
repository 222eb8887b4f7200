"""The training sample in the processes of a Ray cluster: an actor holds a part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..errors import DfaissError, TaskFailed
from .attempts import Pulse
from .ray_cluster import (
    FETCH_SECONDS,
    INLINE_BYTES,
    LOOK_SECONDS,
    WAIT_SECONDS,
    Listener,
    RayCluster,
    bad_environment,
    first_line,
    mismatch,
    trace_of,
)
from .ray_worker import LOAD, Kept, PackedCall

__all__ = ["RayParts"]

_log = logging.getLogger(__name__)

# How long a process is waited for without which it goes on as well: with fewer parts, or with one that shares a core.
_ROOM_SECONDS = 20.0

# On the board, runs are numbered from 1 and their attempts after them; parts go by this.
_PARTS = 0


@dataclass(slots=True, eq=False)
class _Host:
    """A part's process, as Ray knows it."""

    actor: Any
    ident: int
    shares: bool = False
    node: str = ""
    worker: str = "a worker that was not heard of"


@dataclass(slots=True, eq=False)
class _Call:
    """A call of a method of one part, and what has come of it."""

    index: int
    method: str
    args: tuple[Any, ...]
    own: tuple[Any, ...] = ()
    kept: Sequence[Kept] = ()
    host: _Host | None = None
    since: float = 0.0
    value: Any = None
    status: Any = None
    losses: list[str] = field(default_factory=list)


class RayParts:
    """Parts of the sample in actors; see `Parts`.

    A part whose process is lost is made again in another one, elsewhere where that can be: it reads its share again,
    repeats the setups, and the call that was lost is repeated. Arrays that come from other processes are read-only.

    Parameters
    ----------
    cluster : RayCluster
        Where they live, with options and deadlines; a single call that takes longer than `AttemptRules.stall_seconds`
        counts as lost.
    kind : callable
        Makes a part of a recipe and a share ``(number, of how many)``.
    recipe : object
        What it takes; picklable.
    count : int
        How many to make; there are fewer if the cluster has no room for all of them.
    enough : int
        As many as hold the whole recipe. They are waited for longer if the cluster may grow.
    """

    def __init__(
        self,
        cluster: RayCluster,
        kind: Callable[[Any, tuple[int, int]], Any],
        recipe: Any,
        count: int,
        *,
        enough: int = 1,
    ) -> None:
        cluster.connect()
        self._cluster = cluster
        self._ray = cluster.ray
        self._kind = kind
        self._recipe = recipe
        self._setups: dict[str, tuple[Any, ...]] = {}
        self._cut_off: set[str] = set()
        self._pulse = Pulse(cluster.rules.silence_seconds)
        self._listener = Listener(cluster)
        self._hosts: list[_Host] = []
        try:
            self._begin(count, enough)
            self._carry_out([self._loading(index) for index in range(self.count)])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._hosts)

    def close(self) -> None:
        """End their processes."""
        for host in self._hosts:
            self._kill(host)
        self._hosts = []

    def each(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Call a method of every part; see `Parts.each`."""
        calls = self._carry_out(self._calls(method, args, per_part))
        return [self._fetched(call) for call in calls]

    def keep(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Kept]:
        """Call it, and leave the results where they are; see `Parts.keep`.

        A result that is lost with its node is computed again when it is next used, by the same call.
        """
        calls = self._carry_out(self._calls(method, args, per_part))
        return [Kept(call.index, method, call.args + call.own, self._placed(call)) for call in calls]

    def one(self, index: int, method: str, *args: Any) -> Any:
        """Call a method of one part; see `Parts.one`."""
        return self._fetched(self._carry_out([_Call(index, method, args)])[0])

    def setup(self, method: str, *args: Any) -> None:
        """Call a method of every part, and again on a part that is made again; see `Parts.setup`."""
        self._setups[method] = args
        self.each(method, *args)

    def _begin(self, count: int, enough: int) -> None:
        """Start processes, as many as find room: what is computed does not depend on their number."""
        hosts = dict(self._new_host(frozenset()) for _ in range(count))
        waiting, since, last = list(hosts), time.monotonic(), float("inf")
        growing: bool | None = None
        while waiting:
            ready, waiting = self._ray.wait(waiting, timeout=LOOK_SECONDS)
            now = time.monotonic()
            for ref in ready:
                if self._greeted(hosts[ref], ref):
                    self._hosts.append(hosts[ref])
                    last = now
            if now - max(last, since) > _ROOM_SECONDS and self._hosts:
                if growing is None:
                    growing = len(self._hosts) < enough and self._cluster.may_grow()
                    if growing:
                        _log.info("room for %d workers, %d hold the sample: waiting for more", len(self._hosts), enough)
                if not growing or len(self._hosts) >= enough:
                    break
            if now - since > self._cluster.rules.start_seconds:
                break
        for ref in waiting:
            self._kill(hosts[ref])
        if not self._hosts:
            raise self._cluster.no_room()
        if len(self._hosts) < count:
            _log.warning("the cluster has room for %d of %d workers that hold the sample", len(self._hosts), count)

    def _new_host(self, avoid: frozenset[str], *, shared: bool = False) -> tuple[Any, _Host]:
        """Start a process; return the reference of its greeting, and the process."""
        ident = self._cluster.next_ident()
        busy: dict[str, int] = {}
        for host in self._hosts:
            busy[host.node] = busy.get(host.node, 0) + 1
        actor, hello = self._cluster.start_part(f"{_PARTS}.{ident}", avoid, busy, shared=shared)
        return hello, _Host(actor, ident, shared)

    def _greeted(self, host: _Host, ref: Any) -> bool:
        try:
            host.node, host.worker, found = self._ray.get(ref, timeout=FETCH_SECONDS)
        except self._ray.exceptions.RuntimeEnvSetupError as exc:
            raise bad_environment(exc) from exc
        except self._ray.exceptions.RayError as exc:
            _log.warning("a worker could not begin: %s", first_line(exc))
            return False
        if found != self._cluster.versions:
            raise mismatch(self._cluster.versions, {host.worker: found})
        self._pulse.heard(host.ident)
        return True

    def _calls(self, method: str, args: tuple[Any, ...], per_part: Sequence[tuple[Any, ...]] | None) -> list[_Call]:
        own = [()] * self.count if per_part is None else per_part
        return [_Call(index, method, args, tuple(each)) for index, each in zip(range(self.count), own, strict=True)]

    def _carry_out(self, calls: Sequence[_Call]) -> Sequence[_Call]:
        """Have calls made, each on its part, until every one has succeeded."""
        packed: dict[int, tuple[Any, list[Kept]]] = {}
        waiting: dict[Any, _Call] = {}
        for call in calls:
            self._send(call, packed, waiting)
        while waiting:
            done, _ = self._ray.wait(list(waiting), timeout=WAIT_SECONDS, fetch_local=False)
            for ref in done:
                call = waiting.pop(ref)
                trouble = self._trouble(call)
                if trouble is not None:
                    self._mend(call, *trouble)
                    self._send(call, packed, waiting)
            for call, why, part_lost in self._overdue(waiting):
                del waiting[call.status]
                self._ray.cancel(call.status)
                self._mend(call, why, part_lost)
                self._send(call, packed, waiting)
        return calls

    def _send(self, call: _Call, packed: dict[int, tuple[Any, list[Kept]]], waiting: dict[Any, _Call]) -> None:
        # Arguments for all parts are packed and stored once.
        if id(call.args) not in packed:
            packed[id(call.args)] = self._pack(call.args)
        common, kept = packed[id(call.args)]
        own, own_kept = self._pack(call.own)
        call.kept = [*kept, *own_kept]
        call.host, call.since = self._hosts[call.index], time.monotonic()
        call.value, call.status = call.host.actor.call.options(num_returns=2).remote(
            call.method, common, own, len(kept), *(each.ref[0] for each in call.kept)
        )
        waiting[call.status] = call

    def _pack(self, args: tuple[Any, ...]) -> tuple[Any, list[Kept]]:
        pack, kept = PackedCall.of(args)
        return (pack if pack.length_bytes <= INLINE_BYTES else self._ray.put(pack)), kept

    def _trouble(self, call: _Call) -> tuple[str, bool] | None:
        """Return why a call has to be repeated, and whether its part is gone; None if it has succeeded."""
        errors = self._ray.exceptions
        try:
            self._ray.get(call.status, timeout=FETCH_SECONDS)
        except errors.RayTaskError as exc:
            if isinstance(exc.cause, errors.ObjectLostError):
                return first_line(exc.cause), False
            failed = self._failed(call, f"failed: {first_line(exc.cause)}", trace_of(exc))
            if isinstance(exc.cause, DfaissError):
                raise exc.cause from failed
            raise failed from exc
        except errors.ObjectLostError as exc:
            return first_line(exc), False
        except errors.RayError as exc:
            return first_line(exc), True
        return None

    def _mend(self, call: _Call, why: str, part_lost: bool) -> None:
        """See to it that a call can be repeated."""
        worker = "" if call.host is None else call.host.worker
        _log.warning("part %d of the sample: %s was lost on %s: %s", call.index, call.method, worker, why)
        call.losses.append(f"{worker}: {why}")
        if len(call.losses) > self._cluster.rules.max_retries:
            raise self._failed(call, f"was lost {len(call.losses)} times: {'; '.join(call.losses)}", "")
        if not part_lost:
            for kept in call.kept:
                again = self._carry_out([_Call(kept.index, kept.method, kept.args)])[0]
                kept.ref[:] = self._placed(again)
        elif self._hosts[call.index] is call.host:
            self._make_again(call)

    def _make_again(self, call: _Call) -> None:
        """Make a part that is gone once more, elsewhere if there is another node."""
        index, old = call.index, self._hosts[call.index]
        self._kill(old)
        # Where a node has gone, there may be no core left: the part then shares one, slower but at all.
        shared = self._cluster.needs_to_share(frozenset(self._cut_off), None if old.shares else old.node)
        for _attempt in range(self._cluster.rules.max_retries + 1):
            hello, host = self._new_host(frozenset(self._cut_off | {old.node}), shared=shared)
            patience = self._cluster.rules.start_seconds if shared else _ROOM_SECONDS
            ready, _pending = self._ray.wait([hello], timeout=patience)
            if ready and self._greeted(host, hello):
                break
            self._kill(host)
            shared = True
        else:
            raise self._failed(call, "found no other worker", "") from self._cluster.no_room()
        self._hosts[index] = host
        self._carry_out([self._loading(index)])
        for method, args in self._setups.items():
            self._carry_out([_Call(index, method, args)])

    def _loading(self, index: int) -> _Call:
        return _Call(index, LOAD, (self._kind, self._recipe), ((index, self.count),))

    def _fetched(self, call: _Call) -> Any:
        """Bring a result here; one that is lost on the way is computed again."""
        while True:
            try:
                return self._ray.get(call.value, timeout=FETCH_SECONDS)
            except self._ray.exceptions.RayError as exc:
                # Whether its part is lost as well is seen when it is called again.
                self._mend(call, first_line(exc), False)
                self._carry_out([call])

    def _placed(self, call: _Call) -> list[Any]:
        return [call.value, "" if call.host is None else call.host.node]

    def _overdue(self, waiting: Mapping[Any, _Call]) -> list[tuple[_Call, str, bool]]:
        """Return the calls to repeat, and whether their part is gone: it is silent, or takes too long.

        Its part is there, but waits for ever, if a result that it needs was lost with a node.
        """
        beats = self._listener.hear()
        if beats is None:
            return []
        for name in beats:
            run, _, ident = name.partition(".")
            if int(run) == _PARTS and any(host.ident == int(ident) for host in self._hosts):
                self._pulse.heard(int(ident))
        now, rules = time.monotonic(), self._cluster.rules
        silent = self._pulse.overdue(now)
        living = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        found = []
        for call in waiting.values():
            if call.host is not None and call.host.node not in living:
                # Ray knows that a host is gone long before calls to it fail, if its link was cut.
                found.append((call, "its node has gone", True))
            elif any(kept.ref[1] not in living for kept in call.kept):
                found.append((call, "a result that it needs was lost with its node", False))
            elif call.host is not None and call.host.ident in silent:
                self._cut_off.add(call.host.node)
                found.append((call, f"nothing was heard of it for {rules.silence_seconds:g} s", True))
            elif now - call.since > rules.stall_seconds:
                found.append((call, f"it took longer than {rules.stall_seconds:g} s", True))
        return found

    def _kill(self, host: _Host) -> None:
        self._pulse.forget(host.ident)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(host.actor)

    def _failed(self, call: _Call, what: str, trace: str) -> TaskFailed:
        worker = "" if call.host is None else call.host.worker
        return TaskFailed(
            f"part {call.index} of the training sample, {call.method} on {worker}, {what}",
            remedy="Run it again once the cause is gone; workers that are killed are often out of memory",
            task=f"part {call.index} of the training sample",
            fragments=(),
            worker=worker,
            worker_traceback=trace,
        )
