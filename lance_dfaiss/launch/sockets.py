"""Listening sockets: made here, or handed over by systemd or a launcher."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import MutableMapping

from ..errors import CannotServe

__all__ = ["adopted", "listen", "sockets_from_systemd"]

_BACKLOG = 1024
_FIRST_PASSED = 3  # systemd's file descriptors begin after stdin, stdout and stderr
_NAMES = ("requests", "http")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Parameters
    ----------
    host : str
        Name or address, IPv4 or IPv6, of this machine.
    port : int
        0 for any that is free.

    Raises
    ------
    CannotServe
        If the port is taken, may not be used, or the address is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        raise CannotServe(
            f"cannot listen on {host}: it cannot be resolved ({exc})",
            remedy="Pass an address of this machine as --host, such as 127.0.0.1",
        ) from exc
    sock = socket.socket(family, kind, protocol)
    try:
        # Else a port stays unusable for a minute after a server that had connections.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise _cannot_listen(host, port, exc) from exc
    return sock


def adopted(descriptor: int) -> socket.socket:
    """Return the socket that a parent has handed over.

    Raises
    ------
    CannotServe
        If there is none, or it does not listen.
    """
    try:
        sock = socket.socket(fileno=descriptor)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise CannotServe(
            f"file descriptor {descriptor} is no socket: {exc.strerror}",
            remedy="Hand over a TCP socket that listens",
        ) from exc
    if not listens or sock.family not in (socket.AF_INET, socket.AF_INET6):
        sock.detach()  # not ours to close
        raise CannotServe(
            f"file descriptor {descriptor} is no TCP socket that listens", remedy="In systemd, use ListenStream="
        )
    sock.set_inheritable(False)
    # The flag belongs to the socket, not to the process: a server that was here before may have set it.
    sock.setblocking(True)
    return sock


def sockets_from_systemd(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """Return the sockets that systemd has handed over, by name: ``requests`` and ``http``.

    Unnamed ones (``FileDescriptorName=``) are taken in this order. The variables are removed, so that no child takes
    them for its own.

    Parameters
    ----------
    environ : mutable mapping
        Of this process.

    Raises
    ------
    CannotServe
        If it is anything else than TCP sockets that listen, or more than two.
    """
    values = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if values[0] != str(os.getpid()) or not values[1].isdigit():
        return {}
    count, given = int(values[1]), values[2].split(":")
    if count > len(_NAMES):
        raise CannotServe(
            f"{count} sockets were handed over, expected one for requests and one for HTTP",
            remedy="Give each server a .socket unit of its own",
        )
    named = given if set(given) <= set(_NAMES) and len(set(given)) == count else _NAMES[:count]
    return {name: adopted(_FIRST_PASSED + position) for position, name in enumerate(named)}


def _cannot_listen(host: str, port: int, exc: OSError) -> CannotServe:
    where = f"port {port} of {host}"
    if exc.errno == errno.EADDRINUSE:
        return CannotServe(
            f"{where} is taken",
            remedy=f"Choose another port, or stop what listens there: ss -ltnp 'sport = :{port}' names it",
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return CannotServe(f"no permission to listen on {where}", remedy="Choose a port from 1024 on")
    if exc.errno == errno.EADDRNOTAVAIL:
        return CannotServe(
            f"cannot listen on {where}: this machine has no such address",
            remedy="Pass an address of this machine as --host; 0.0.0.0 stands for all",
        )
    return CannotServe(f"cannot listen on {where}: {exc.strerror or exc}")
