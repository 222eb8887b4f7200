"""Certificates for tests, made by the openssl command: good ones, and each kind of bad one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Certificates", "Identity", "make_certificates"]


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """What `make_certificates` makes; servers are ``localhost``, 127.0.0.1 and ::1 unless it says otherwise.

    Parameters
    ----------
    ca, foreign_ca
        Two authorities that know nothing of each other.
    server, client
        Signed by ``ca``, good.
    expired_server, expired_client
        Signed by ``ca``, no longer valid.
    wrong_host
        Signed by ``ca``, for the name ``elsewhere.example``.
    foreign_server, foreign_client
        Signed by ``foreign_ca``.
    """

    ca: Identity
    foreign_ca: Identity
    server: Identity
    client: Identity
    expired_server: Identity
    expired_client: Identity
    wrong_host: Identity
    foreign_server: Identity
    foreign_client: Identity


def _openssl(*args: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, args)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _authority(folder: Path, name: str) -> Identity:
    made = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", made.key, "-out", made.cert, "-days", "2", "-subj", f"/CN={name}"),
        *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    return made


def _signed(folder: Path, name: str, ca: Identity, *, use: str, names: str = "", days: int = 2) -> Identity:
    made = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    _openssl(
        *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", made.key, "-out", request, "-subj", f"/CN={name}"),
    )
    lines = ["basicConstraints=CA:FALSE", f"extendedKeyUsage={use}", *([f"subjectAltName={names}"] if names else [])]
    extensions.write_text("\n".join(lines), encoding="ascii")
    _openssl(
        *("x509", "-req", "-in", request, "-CA", ca.cert, "-CAkey", ca.key, "-out", made.cert),
        *("-days", str(days), "-extfile", extensions),
    )
    return made


def make_certificates(folder: Path, *, addresses: Sequence[str] = ()) -> Certificates:
    """Make them all in a folder, for servers that have more addresses too; takes about half a second."""
    ca, foreign_ca = _authority(folder, "ca"), _authority(folder, "foreign-ca")
    here = ",".join(["DNS:localhost", "IP:127.0.0.1", "IP:::1", *(f"IP:{address}" for address in addresses)])
    return Certificates(
        ca=ca,
        foreign_ca=foreign_ca,
        server=_signed(folder, "server", ca, use="serverAuth", names=here),
        client=_signed(folder, "client", ca, use="clientAuth"),
        # Valid until yesterday.
        expired_server=_signed(folder, "expired-server", ca, use="serverAuth", names=here, days=-1),
        expired_client=_signed(folder, "expired-client", ca, use="clientAuth", days=-1),
        wrong_host=_signed(folder, "wrong-host", ca, use="serverAuth", names="DNS:elsewhere.example"),
        foreign_server=_signed(folder, "foreign-server", foreign_ca, use="serverAuth", names=here),
        foreign_client=_signed(folder, "foreign-client", foreign_ca, use="clientAuth"),
    )
