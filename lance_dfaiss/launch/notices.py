"""How a server tells who started it how it is: the notifications of systemd, which a launcher understands too."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

__all__ = ["Notice", "NoticeSocket", "Notifier"]

_CREDENTIALS = struct.Struct("iII")  # process, user, group
_LONGEST = 64 * 1024


class Notifier:
    """Sends notifications; without anybody who listens, it does nothing.

    Parameters
    ----------
    environ : mutable mapping
        Of this process. ``NOTIFY_SOCKET`` is taken out, so that no child speaks for this process.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None

    def tell(self, **fields: str | int) -> None:
        """Send fields; see ``sd_notify(3)`` for their names, those with ``X_`` are ours."""
        if self._socket is None:
            return
        lines = [f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items()]
        try:
            self._socket.sendto("\n".join(lines).encode("utf-8", "backslashreplace")[:_LONGEST], self._address)
        except OSError:
            # Who started us has gone, or does not listen any more. That ends us by other ways, where it should.
            self._socket.close()
            self._socket = None


class Notice(NamedTuple):
    """What a process said.

    Parameters
    ----------
    pid : int
        Of the process, as the kernel says.
    fields : dict of str to str
        What.
    """

    pid: int
    fields: dict[str, str]


class NoticeSocket:
    """Where notifications arrive. Its address is not in any folder, so nothing is left behind."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        # Everybody on the machine may send here; the kernel says who it was.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")

    @property
    def address(self) -> str:
        """For ``NOTIFY_SOCKET``."""
        return "@" + os.fsdecode(self._socket.getsockname()[1:])

    def fileno(self) -> int:
        """Return the file descriptor, to wait for."""
        return self._socket.fileno()

    def read(self) -> Iterator[Notice]:
        """Yield what has arrived."""
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_LONGEST, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    yield Notice(_CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0], _fields(data))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _fields(data: bytes) -> dict[str, str]:
    lines = data.decode("utf-8", "replace").split("\n")
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
