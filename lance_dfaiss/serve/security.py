"""Who may listen where, and who may ask for what: tokens, rights and TLS.

The address decides how much is needed. On loopback nothing is. Elsewhere clients have to show a token, inside TLS, or a
certificate (mutual TLS), so that neither a token nor an answer crosses a network in the clear.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import socket
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CannotServe, DfaissError, InvalidArgument

__all__ = [
    "MAX_TOKEN_BYTES",
    "MIN_TOKEN_BYTES",
    "Access",
    "Rights",
    "check_listen",
    "client_tls",
    "load_token",
    "server_tls",
]

_log = logging.getLogger(__name__)

MIN_TOKEN_BYTES = 16
"""A shorter token could be guessed."""

MAX_TOKEN_BYTES = 1024
"""A longer one would not fit the first frame of a client together with its name."""

_MAKE_A_TOKEN = "Make one with: openssl rand -hex 32"


@dataclass(frozen=True, slots=True)
class Rights:
    """What a client may do.

    Parameters
    ----------
    read : bool
        Search, fetch columns, and ask how the server is.
    admin : bool
        Reload and drain.
    """

    read: bool
    admin: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What clients have to show.

    Parameters
    ----------
    read_token, admin_token : bytes or None
        See `load_token`. Never part of a repr.
    mutual_tls : bool
        Clients show a certificate (`server_tls` with ``client_ca``).

    Raises
    ------
    CannotServe
        If both tokens are the same: whoever reads would be an admin.
    """

    read_token: bytes | None = field(default=None, repr=False)
    admin_token: bytes | None = field(default=None, repr=False)
    mutual_tls: bool = False

    def __post_init__(self) -> None:
        if self.read_token is not None and self.read_token == self.admin_token:
            raise CannotServe(
                "the token for reading and the one for admins are the same",
                remedy=f"Whoever may read would be an admin. {_MAKE_A_TOKEN}",
            )

    def rights_of(self, token: str, *, certificate: bool) -> Rights:
        """Return what a client may do, in a time that does not depend on which token is how wrong.

        What is set is needed: the token for reading, a certificate under mutual TLS, or both. The admin token stands
        for the one for reading. Where neither tokens nor mutual TLS are set, everybody may do everything;
        `check_listen` lets that happen on loopback only.

        Parameters
        ----------
        token : str
            What the client has shown; empty for nothing.
        certificate : bool
            The client has shown a certificate, and it was found good.
        """
        shown = token.encode("utf-8", "surrogatepass")
        is_read = _same(shown, self.read_token)
        is_admin = _same(shown, self.admin_token)
        trusted = certificate or not self.mutual_tls
        unguarded = self.read_token is None and self.admin_token is None and not self.mutual_tls
        return Rights(
            read=trusted and (self.read_token is None or is_read or is_admin),
            admin=trusted and (is_admin or unguarded),
        )


def _same(shown: bytes, token: bytes | None) -> bool:
    # Digests, because comparing texts of different lengths tells their lengths; and also where there is no token.
    expected = hashlib.sha256(token or b"").digest()
    return hmac.compare_digest(hashlib.sha256(shown).digest(), expected) and token is not None


def load_token(path: str | os.PathLike[str]) -> bytes:
    """Read a token from a file; a newline at its end does not count.

    Parameters
    ----------
    path : path-like
        Of the file. If everybody on the machine can read it, the log has a warning.

    Raises
    ------
    CannotServe
        If it cannot be read, or its content is no token: shorter than `MIN_TOKEN_BYTES`, longer than
        `MAX_TOKEN_BYTES`, more than one line, spaces around it, or no UTF-8.
    """
    name = os.fspath(path)
    with _opened(name, CannotServe, "the token file") as file:
        mode = os.fstat(file.fileno()).st_mode
        # Never all of it: it may be the wrong file, or one without an end.
        content = file.read(MAX_TOKEN_BYTES + 3)
    token = content.removesuffix(b"\n").removesuffix(b"\r")
    problem = _problem_of_token(token)
    if problem:
        raise CannotServe(f"the token in {name} {problem}", remedy=_MAKE_A_TOKEN)
    if mode & stat.S_IROTH:
        _log.warning("token file %s can be read by every user of this machine; chmod 600 it", name)
    return token


def _problem_of_token(token: bytes) -> str:
    if not token.strip():
        return "is empty"
    if len(token) < MIN_TOKEN_BYTES:
        return f"is shorter than {MIN_TOKEN_BYTES} characters"
    if len(token) > MAX_TOKEN_BYTES:
        return f"is longer than {MAX_TOKEN_BYTES:,} bytes"
    if any(byte < 0x20 or byte == 0x7F for byte in token):
        return "has more than one line, or control characters"
    if token != token.strip():
        return "begins or ends with a space"
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8"
    return ""


def server_tls(
    cert: str | os.PathLike[str], key: str | os.PathLike[str], client_ca: str | os.PathLike[str] | None = None
) -> ssl.SSLContext:
    """Return the TLS settings of a server: version 1.2 or newer.

    Parameters
    ----------
    cert, key : path-like
        PEM files: the server's certificate, followed by those between it and the CA, and its key.
    client_ca : path-like, optional
        PEM file of CAs. Clients then have to show a certificate that one of them has signed (mutual TLS).

    Raises
    ------
    CannotServe
        If a file is missing, cannot be read or holds something else, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load_identity(context, os.fspath(cert), os.fspath(key), CannotServe)
    _try_identity(context, os.fspath(cert))
    if client_ca is not None:
        _trust(context, os.fspath(client_ca), CannotServe, "the CA file for clients")
        context.verify_mode = ssl.CERT_REQUIRED
    context.sslobject_class = _Telling
    return context


def _try_identity(context: ssl.SSLContext, cert: str) -> None:
    """Log why no client will trust the certificate, if that can be known here: it has expired, or is for other uses.

    Clients hang up on such a server without a word, so its log would not say it otherwise.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # Trusted whoever has signed it.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for turn in range(3):
        try:
            sides[turn % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as exc:
            _log.error("no client will trust the certificate %s: %s", cert, exc.verify_message)
            return


_NO_TLS = ("HTTP_REQUEST", "WRONG_VERSION_NUMBER")
"""OpenSSL's names for what is no TLS at all."""


class _Telling(ssl.SSLObject):
    """The server's side of a connection, which tells both sides why a handshake failed.

    When one fails, OpenSSL has written an alert with the reason. asyncio closes the connection without sending it, and
    the client would only see that it ended. It sends what there is when a handshake wants to read more.
    """

    _failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        """Do what can be done of the handshake; a failure is raised when the other side has had time to read of it."""
        if self._failure is not None:
            raise self._failure
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as exc:
            self._failure = exc
            _log.warning("a TLS handshake failed: %s", exc)
            if exc.reason in _NO_TLS:
                raise  # who does not speak TLS reads no alert, and would be kept waiting for nothing
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the alert has to be sent") from exc


def client_tls(
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> ssl.SSLContext:
    """Return the TLS settings of a client: version 1.2 or newer, and the server's certificate and name are checked.

    Parameters
    ----------
    ca : path-like, optional
        PEM file of the CAs that servers' certificates may be signed by. Default: those the system trusts.
    cert, key : path-like, optional
        PEM files of the client's own certificate and key, for mutual TLS. Default of ``key``: in the same file.

    Raises
    ------
    InvalidArgument
        If a file is missing, cannot be read or holds something else, or the key is not the certificate's.
    """
    if key is not None and cert is None:
        raise InvalidArgument(
            "a key without its certificate", remedy="Pass cert= too", parameter="key", value=os.fspath(key)
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, os.fspath(ca), InvalidArgument, "the CA file")
    if cert is not None:
        _load_identity(context, os.fspath(cert), os.fspath(cert if key is None else key), InvalidArgument)
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def _trust(context: ssl.SSLContext, path: str, error: type[DfaissError], what: str) -> None:
    _opened(path, error, what).close()
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as exc:
        raise _unusable(error, f"{what} {path} has no certificates in PEM form", path) from exc


def _load_identity(context: ssl.SSLContext, cert: str, key: str, error: type[DfaissError]) -> None:
    # Both are looked at first: OpenSSL tells that something is wrong, but not with which file.
    _trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), cert, error, "the certificate file")
    _opened(key, error, "the key file").close()
    try:
        # Without a password, OpenSSL would ask for that of an encrypted key on the terminal, and wait.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise _unusable(error, f"the key in {key} is not that of the certificate in {cert}", key) from exc
        reason = f"the key file {key} has no key in PEM form, or an encrypted one"
        if exc.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            reason = f"the certificate in {cert} is too weak for this system ({exc.reason})"
        raise _unusable(error, reason, key) from exc


def _opened(path: str, error: type[DfaissError], what: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise _unusable(error, f"cannot read {what} {path!r}: {reason}", path) from exc


def _unusable(error: type[DfaissError], message: str, path: str) -> DfaissError:
    facts: dict[str, Any] = {"parameter": "tls", "value": path} if issubclass(error, InvalidArgument) else {}
    return error(message, **facts)


def check_listen(host: str, access: Access, tls: ssl.SSLContext | None) -> None:
    """Check that a server may listen on an address.

    Parameters
    ----------
    host : str
        Name or address; empty for all.
    access : Access
        What clients have to show.
    tls : ssl.SSLContext or None
        From `server_tls`.

    Raises
    ------
    CannotServe
        If others than this machine could connect without TLS, or with nothing to show; or if the name cannot be
        resolved.
    """
    if _is_loopback(host):
        return
    certificates = access.mutual_tls and tls is not None and tls.verify_mode is ssl.CERT_REQUIRED
    if tls is not None and (access.read_token is not None or certificates):
        return
    if tls is None:
        remedy = "Pass --tls-cert and --tls-key, and --token-file or --tls-client-ca; or listen on 127.0.0.1"
    else:
        remedy = "Pass --token-file, or --tls-client-ca for mutual TLS; or listen on 127.0.0.1"
    lacking = "TLS" if tls is None else "a token for reading, or certificates of clients"
    raise CannotServe(f"{host or 'all addresses'} can be reached from other machines: needs {lacking}", remedy=remedy)


def _is_loopback(host: str) -> bool:
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise CannotServe(
            f"cannot resolve {host!r}: {exc}", remedy="Pass an address of this machine as --host"
        ) from exc
    return all(_stays_here(str(entry[4][0])) for entry in found)


def _stays_here(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped.is_loopback
    return ip.is_loopback
