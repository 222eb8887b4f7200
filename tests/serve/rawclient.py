"""A client that says exactly what it is told, also what no client should: blocking, one connection, no retries."""

from __future__ import annotations

import itertools
import socket
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from lance_dfaiss.errors import DfaissError
from lance_dfaiss.serve import wire
from lance_dfaiss.types import Float32Array, UInt64Array

__all__ = ["RawClient"]

Said = TypeVar("Said", bound=wire.Message)
PATIENCE_SECONDS = 60.0


class RawClient:
    """One connection to one server.

    Parameters
    ----------
    address : (str, int)
        Host and port.
    hello : bool
        Say who we are at once.
    token : str
        What to show.
    """

    def __init__(self, address: tuple[str, int], *, hello: bool = True, token: str = "") -> None:
        self.sock = socket.create_connection(address, timeout=PATIENCE_SECONDS)
        self._reader = wire.FrameReader(2**30, wire.ANSWERS)
        self._answers: dict[int, tuple[wire.Message, bytes]] = {}
        self._ids = itertools.count(1)
        self.said: list[wire.Offers] = []
        """What the server announced, unasked."""
        self.farewell: DfaissError | None = None
        """Why the server hung up, if it said so."""
        if hello:
            self.welcome, _ = self.ask(wire.Hello(protocol=wire.PROTOCOL, token=token), expected=wire.Welcome)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.sock.close()

    @property
    def offers(self) -> tuple[wire.Offer, ...]:
        """What is offered, as far as we know."""
        return self.said[-1].offers if self.said else self.welcome.offers

    def offer(self, index: str) -> wire.Offer:
        """The newest snapshot of an index."""
        return max((offer for offer in self.offers if offer.index == index), key=lambda offer: offer.order)

    def send(self, message: wire.Message, payload: bytes = b"", request_id: int | None = None) -> int:
        """Send a request, and return its id."""
        request_id = next(self._ids) if request_id is None else request_id
        self.sock.sendall(b"".join(wire.encode(message, request_id, [payload])))
        return request_id

    def expect(self, request_id: int) -> tuple[Any, bytes]:
        """Wait for the answer to a request."""
        while request_id not in self._answers:
            assert self.listen(), f"the server hung up: {self.farewell}"
        return self._answers.pop(request_id)

    def ask(self, message: wire.Message, payload: bytes = b"", *, expected: type[Said] | None = None) -> Any:
        """Send a request and return its answer and payload; an error is raised."""
        answer, rest = self.expect(self.send(message, payload))
        if isinstance(answer, wire.Failure):
            raise wire.error_of(answer)
        assert expected is None or isinstance(answer, expected)
        return answer, rest

    def listen(self) -> bool:
        """Take in what the server sends next; False when it has hung up."""
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            return False
        for frame in self._reader.feed(data):
            message = wire.decode(frame)
            if isinstance(message, wire.Offers):
                self.said.append(message)
            elif isinstance(message, wire.Failure) and frame.request_id == 0:
                self.farewell = wire.error_of(message)
            else:
                assert frame.request_id not in self._answers, "a request was answered twice"
                self._answers[frame.request_id] = message, bytes(frame.payload)
        return bool(data)

    def wait_for_end(self) -> DfaissError | None:
        """Wait until the server hangs up, and return why."""
        while self.listen():
            pass
        return self.farewell

    def knn(self, queries: Any, k: int, offer: wire.Offer, **more: Any) -> tuple[Float32Array, UInt64Array]:
        """Search one server."""
        array = np.atleast_2d(queries).astype("<f4")
        message = wire.Knn(index=offer.index, at=more.pop("at", offer.at), k=k, n=len(array), **more)
        reply, payload = self.ask(message, array.tobytes(), expected=wire.KnnReply)
        distances, row_ids, _ = wire.results_of(payload, reply.n, reply.width)
        return distances, row_ids
