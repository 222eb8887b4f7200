"""A client that is closed at the very moment at which an attempt to connect ends: closing must end too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lance_dfaiss.serve.cluster import ServedIndex, plan_cluster
from lance_dfaiss.serve.fleet import Fleet, FleetOptions


@pytest.mark.parametrize("succeeds", [False, True])
def test_closing_while_a_connection_is_made_or_refused(succeeds: bool) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        served = ServedIndex(name="near", dataset="d", index="near")
        listener = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        fleet = Fleet(plan_cluster([served], [("127.0.0.1", port, None)], replicas=1), None, FleetOptions())
        closing: list[asyncio.Task[None]] = []
        connect = loop.create_connection

        async def create_connection(*args: Any, **options: Any) -> Any:
            made = await connect(*args, **options)
            # Runs after this coroutine has ended, and before whoever waits for it knows that.
            loop.call_soon(lambda: closing.append(loop.create_task(fleet.close())))
            loop.call_soon(next(iter(fleet.replicas.values())).links[0].close)
            if not succeeds:
                made[0].close()
                raise ConnectionRefusedError
            return made

        loop.create_connection = create_connection  # type: ignore[method-assign]
        fleet.start()
        link = next(iter(fleet.replicas.values())).links[0]
        await asyncio.wait_for(link.closed(), 10)
        await asyncio.wait_for(closing[0], 10)
        listener.close()
        await listener.wait_closed()

    asyncio.run(asyncio.wait_for(work(), 30))
