from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import CannotServe, InvalidArgument
from lance_dfaiss.serve import security, wire
from lance_dfaiss.serve.security import (
    MAX_TOKEN_BYTES,
    Access,
    Rights,
    check_listen,
    client_tls,
    load_token,
    server_tls,
)
from tests.serve.certificates import Certificates, Identity, make_certificates

READ, ADMIN = "r" * 16, "ä" + "a" * 16
NOTHING, READS, EVERYTHING = Rights(False, False), Rights(True, False), Rights(True, True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


# ---- rights


@pytest.mark.parametrize(
    ("read", "admin", "mutual", "token", "certificate", "rights"),
    [
        (False, False, False, "", False, EVERYTHING),
        (False, False, False, "whatever", False, EVERYTHING),
        (True, False, False, "", False, NOTHING),
        (True, False, False, READ, False, READS),
        (True, False, False, READ + " ", False, NOTHING),
        (True, False, False, READ[:-1], False, NOTHING),
        (True, False, False, ADMIN, False, NOTHING),
        (True, True, False, "", False, NOTHING),
        (True, True, False, READ, False, READS),
        (True, True, False, ADMIN, False, EVERYTHING),
        (False, True, False, "", False, READS),
        (False, True, False, ADMIN, False, EVERYTHING),
        (False, False, True, "", True, READS),
        (False, False, True, READ, True, READS),
        (False, False, True, "", False, NOTHING),
        (False, True, True, "", True, READS),
        (False, True, True, ADMIN, True, EVERYTHING),
        (False, True, True, ADMIN, False, NOTHING),
        (True, True, True, "", True, NOTHING),
        (True, True, True, READ, True, READS),
        (True, True, True, ADMIN, True, EVERYTHING),
        # A certificate that nobody asked for is worth nothing.
        (True, True, False, "", True, NOTHING),
    ],
)
def test_rights(read: bool, admin: bool, mutual: bool, token: str, certificate: bool, rights: Rights) -> None:
    access = Access(
        read_token=READ.encode() if read else None, admin_token=ADMIN.encode() if admin else None, mutual_tls=mutual
    )
    assert access.rights_of(token, certificate=certificate) == rights


@given(
    token=st.text(st.characters(), max_size=40),
    read=st.none() | st.binary(min_size=16, max_size=40),
    admin=st.none() | st.binary(min_size=41, max_size=50),
    certificate=st.booleans(),
    mutual=st.booleans(),
)
def test_no_text_gives_rights_that_it_is_not_the_token_for(
    token: str, read: bytes | None, admin: bytes | None, certificate: bool, mutual: bool
) -> None:
    rights = Access(read_token=read, admin_token=admin, mutual_tls=mutual).rights_of(token, certificate=certificate)
    assert not (rights.admin and not rights.read)
    if read is not None and token.encode("utf-8", "surrogatepass") != read:
        assert rights == NOTHING
    if mutual and not certificate:
        assert rights == NOTHING
    if admin is not None or read is not None or mutual:
        assert not rights.admin


@pytest.mark.parametrize("access", [Access(), Access(read_token=READ.encode()), Access(admin_token=ADMIN.encode())])
def test_both_tokens_are_always_compared(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    class Watched:
        compare_digest = staticmethod(watched)

    monkeypatch.setattr(security, "hmac", Watched)
    for token in ("", READ, ADMIN, "x" * 500):
        access.rights_of(token, certificate=False)
    # Twice each, and digests: neither who is right nor how long a token is shows in the time.
    assert compared == [(32, 32)] * 8


def test_tokens_are_not_shown() -> None:
    text = repr(Access(read_token=READ.encode(), admin_token=ADMIN.encode()))
    assert READ not in text
    assert "aaaa" not in text
    assert text == "Access(mutual_tls=False)"


def test_one_token_for_both_is_refused() -> None:
    with pytest.raises(CannotServe, match="are the same"):
        Access(read_token=READ.encode(), admin_token=READ.encode())


# ---- token files


def token_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("token", [READ.encode(), ADMIN.encode(), b"two words, forty!", b"x" * MAX_TOKEN_BYTES])
def test_a_token_is_read_without_the_end_of_its_line(
    tmp_path: Path, token: bytes, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_token(token_file(tmp_path, token + end)) == token
    assert caplog.records == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b" " * 20, "is empty"),
        (b"x" * 15 + b"\n", "is shorter than 16 characters"),
        (b"x" * (MAX_TOKEN_BYTES + 1), "is longer than 1,024 bytes"),
        (b"x" * 16 + b"\n" + b"y" * 16 + b"\n", "has more than one line"),
        (b"x" * 16 + b"\n\n", "has more than one line"),
        (b"x" * 16 + b"\0", "control characters"),
        (b" " + b"x" * 16, "begins or ends with a space"),
        (b"\xff" * 16, "is not UTF-8"),
    ],
)
def test_what_is_no_token(tmp_path: Path, content: bytes, problem: str) -> None:
    path = token_file(tmp_path, content)
    with pytest.raises(CannotServe, match=problem) as caught:
        load_token(path)
    assert str(path) in str(caught.value)
    assert "openssl rand -hex 32" in str(caught.value)
    assert "x" * 15 not in str(caught.value).replace(str(path), "")


def test_a_token_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match="No such file"):
        load_token(tmp_path / "none")
    with pytest.raises(CannotServe, match="Is a directory"):
        load_token(tmp_path)
    with pytest.raises(CannotServe, match="null byte"):
        load_token("a\0b")
    with pytest.raises(CannotServe, match="is longer"):
        load_token("/dev/zero")


def test_a_token_that_all_can_read_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = token_file(tmp_path, READ.encode(), mode=0o644)
    with caplog.at_level(logging.WARNING, "lance_dfaiss.serve.security"):
        load_token(path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    assert READ not in caplog.text


def test_the_longest_token_fits_the_first_frame() -> None:
    hello = wire.Hello(protocol=1, token="x" * MAX_TOKEN_BYTES, client="y" * MAX_TOKEN_BYTES)
    assert sum(map(len, wire.encode(hello))) < wire.HELLO_BYTES


# ---- where to listen

TOKEN = Access(read_token=READ.encode())
ELSEWHERE = ["0.0.0.0", "::", "", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "::ffff:0.0.0.0"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost", "::ffff:127.0.0.1", "127.1"])
@pytest.mark.parametrize("access", [Access(), TOKEN, Access(mutual_tls=True)])
def test_on_loopback_anything_goes(host: str, access: Access) -> None:
    check_listen(host, access, None)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_elsewhere_needs_tls_and_something_to_show(host: str, certificates: Certificates) -> None:
    tls = server_tls(certificates.server.cert, certificates.server.key)
    mutual = server_tls(certificates.server.cert, certificates.server.key, certificates.ca.cert)
    for access in (Access(), TOKEN, Access(mutual_tls=True)):
        with pytest.raises(CannotServe, match="needs TLS") as caught:
            check_listen(host, access, None)
        assert "--tls-cert and --tls-key" in str(caught.value)
    for access, context in (
        (Access(), tls),
        (Access(admin_token=ADMIN.encode()), tls),
        # The context does not ask for certificates, or nobody looks at them.
        (Access(mutual_tls=True), tls),
        (Access(), mutual),
    ):
        with pytest.raises(CannotServe, match="needs a token for reading") as caught:
            check_listen(host, access, context)
        assert "--token-file" in str(caught.value)
    check_listen(host, TOKEN, tls)
    check_listen(host, Access(mutual_tls=True), mutual)


def test_names_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*addresses: str) -> Any:
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return lambda *_args, **_kwargs: [
            (family[":" in address], socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolved("127.0.0.1", "::1"))
    check_listen("me.example", Access(), None)
    monkeypatch.setattr(socket, "getaddrinfo", resolved("127.0.0.1", "fe80::1%eth0"))
    with pytest.raises(CannotServe, match=r"me\.example can be reached from other machines"):
        check_listen("me.example", Access(), None)


@pytest.mark.parametrize("host", ["no-such-name.invalid", "x" * 300, "a..b", "1.2.3.4.5", "*"])
def test_names_that_are_none(host: str) -> None:
    with pytest.raises(CannotServe, match="cannot resolve"):
        check_listen(host, TOKEN, None)


# ---- TLS files


def broken(folder: Path, content: bytes) -> Path:
    path = folder / "broken.pem"
    path.write_bytes(content)
    return path


@pytest.fixture
def encrypted_key(tmp_path: Path, certificates: Certificates) -> Path:
    path = tmp_path / "encrypted.key"
    source = str(certificates.server.key)
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", source, "-out", str(path), "-passout", "pass:secret"], check=True
    )
    return path


def test_files_that_are_not_there_are_named(tmp_path: Path, certificates: Certificates) -> None:
    good, none = certificates.server, tmp_path / "none.pem"
    for cert, key, ca, what in (
        (none, good.key, None, "the certificate file"),
        (good.cert, none, None, "the key file"),
        (good.cert, good.key, none, "the CA file for clients"),
        (tmp_path, good.key, None, "the certificate file"),
    ):
        with pytest.raises(CannotServe, match=f"cannot read {what} '/.*: (No such file|Is a directory)"):
            server_tls(cert, key, ca)
    with pytest.raises(InvalidArgument, match=r"cannot read the CA file '/.*: No such file") as caught:
        client_tls(none)
    assert (caught.value.parameter, caught.value.value) == ("tls", str(none))
    with pytest.raises(InvalidArgument, match="cannot read the certificate file"):
        client_tls(certificates.ca.cert, none)
    with pytest.raises(InvalidArgument, match="a key without its certificate"):
        client_tls(certificates.ca.cert, key=good.key)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_key_that_may_not_be_read(tmp_path: Path, certificates: Certificates) -> None:
    path = broken(tmp_path, certificates.server.key.read_bytes())
    path.chmod(0)
    with pytest.raises(CannotServe, match=r"cannot read the key file .*: Permission denied"):
        server_tls(certificates.server.cert, path)


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_files_that_hold_something_else_are_named(tmp_path: Path, certificates: Certificates, content: bytes) -> None:
    good, bad = certificates.server, broken(tmp_path, content)
    with pytest.raises(CannotServe, match=r"the certificate file .*broken\.pem has no certificates"):
        server_tls(bad, good.key)
    with pytest.raises(CannotServe, match=r"the key file .*broken\.pem has no key in PEM form"):
        server_tls(good.cert, bad)
    with pytest.raises(CannotServe, match=r"the CA file for clients .*broken\.pem has no certificates"):
        server_tls(good.cert, good.key, bad)
    with pytest.raises(InvalidArgument, match=r"the CA file .*broken\.pem has no certificates"):
        client_tls(bad)


def test_a_key_of_another_certificate(certificates: Certificates) -> None:
    with pytest.raises(CannotServe, match=r"the key in .*client\.key is not that of the certificate in .*server\.pem"):
        server_tls(certificates.server.cert, certificates.client.key)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(
    certificates: Certificates, encrypted_key: Path
) -> None:
    with pytest.raises(CannotServe, match="or an encrypted one"):
        server_tls(certificates.server.cert, encrypted_key)


def test_a_certificate_and_its_key_may_share_a_file(tmp_path: Path, certificates: Certificates) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(certificates.client.cert.read_bytes() + certificates.client.key.read_bytes())
    assert handshake(certificates.server, certificates.ca, Identity(both, both), client_ca=certificates.ca) == "client"


def test_a_client_checks_certificates_and_names_and_both_refuse_old_versions(certificates: Certificates) -> None:
    for client in (client_tls(), client_tls(certificates.ca.cert)):
        assert client.verify_mode is ssl.CERT_REQUIRED
        assert client.check_hostname
        assert client.minimum_version is ssl.TLSVersion.TLSv1_2
    assert server_tls(certificates.server.cert, certificates.server.key).minimum_version is ssl.TLSVersion.TLSv1_2


# ---- handshakes


def handshake(
    server: Identity,
    ca: Identity,
    client: Identity | None = None,
    *,
    client_ca: Identity | None = None,
    name: str = "localhost",
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> str:
    """Connect for real and exchange a byte each way; return the name in the client's certificate, or "".

    Raises what the client sees.
    """
    at_server = server_tls(server.cert, server.key, client_ca.cert if client_ca else None)
    at_client = client_tls(ca.cert, client.cert if client else None, client.key if client else None)
    at_client.maximum_version = version
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)
    shown: list[str] = []

    def serve() -> None:
        try:
            with at_server.wrap_socket(theirs, server_side=True) as secure:
                subject: Any = (secure.getpeercert() or {}).get("subject", ())
                shown.append("".join(value for rdn in subject for key, value in rdn if key == "commonName"))
                secure.send(b"!")
                assert secure.recv(1) == b"?"
        except OSError:
            theirs.close()  # the client is told by an alert, and asserts on that

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with at_client.wrap_socket(ours, server_hostname=name) as secure:
            # Reads first: under TLS 1.3 a client learns by reading that its certificate was refused.
            assert secure.recv(1) == b"!"
            secure.send(b"?")
    finally:
        ours.close()
        thread.join(20)
    assert not thread.is_alive()
    return shown[0]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_a_good_server(certificates: Certificates, name: str, version: ssl.TLSVersion) -> None:
    assert handshake(certificates.server, certificates.ca, name=name, version=version) == ""


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ("expired_server", "certificate has expired"),
        ("wrong_host", "Hostname mismatch"),
        ("foreign_server", "unable to get local issuer certificate"),
        ("client", "unsuitable certificate purpose"),
    ],
)
def test_a_bad_server_is_not_spoken_to(certificates: Certificates, server: str, reason: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=reason):
        handshake(getattr(certificates, server), certificates.ca)


def test_another_address_than_that_of_the_certificate(certificates: Certificates) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(certificates.server, certificates.ca, name="127.0.0.2")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_mutual_tls(certificates: Certificates, version: ssl.TLSVersion) -> None:
    good = certificates
    assert handshake(good.server, good.ca, good.client, client_ca=good.ca, version=version) == "client"
    # Servers and clients may have authorities of their own.
    assert handshake(good.server, good.ca, good.foreign_client, client_ca=good.foreign_ca) == "foreign-client"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (None, "(?i)certificate.required|handshake.failure"),
        ("expired_client", "(?i)certificate.expired"),
        ("foreign_client", "(?i)unknown.ca"),
        ("server", "(?i)unsupported.certificate"),
    ],
)
def test_a_bad_client_is_not_served(
    certificates: Certificates, client: str | None, reason: str, version: ssl.TLSVersion
) -> None:
    identity = getattr(certificates, client) if client else None
    with pytest.raises(ssl.SSLError, match=reason):
        handshake(certificates.server, certificates.ca, identity, client_ca=certificates.ca, version=version)


async def speak(port: int, tls: ssl.SSLContext) -> None:
    """Connect and speak first, as a client of the package does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname="localhost")
    try:
        writer.write(b"Hello")
        await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.transport.abort()


async def refusal(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLError:
    """Return what a client sees of a server on an event loop that refuses it."""
    listener = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=server)
    try:
        with pytest.raises(ssl.SSLError) as caught:
            await speak(listener.sockets[0].getsockname()[1], client)
    finally:
        listener.close()
    return caught.value


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (None, "(?i)alert.certificate.required|alert.handshake.failure"),
        ("expired_client", "(?i)alert.certificate.expired"),
        ("foreign_client", "(?i)alert.unknown.ca"),
    ],
)
def test_a_server_on_an_event_loop_says_why_it_refuses_a_client_and_logs_it(
    certificates: Certificates,
    client: str | None,
    reason: str,
    version: ssl.TLSVersion,
    loop: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, identity = certificates, getattr(certificates, client) if client else None
    at_server = server_tls(good.server.cert, good.server.key, good.ca.cert)
    at_client = client_tls(good.ca.cert, *((identity.cert, identity.key) if identity else ()))
    at_client.maximum_version = version
    events = pytest.importorskip("uvloop").new_event_loop() if loop == "uvloop" else asyncio.new_event_loop()
    try:
        error = events.run_until_complete(refusal(at_server, at_client))
        # What was aborted is closed in a turn after.
        events.run_until_complete(events.shutdown_asyncgens())
    finally:
        events.close()
    assert re.search(reason, str(error))
    assert [record.getMessage()[:22] for record in caplog.records] == ["a TLS handshake failed"]


def test_old_versions_are_not_spoken(certificates: Certificates) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(certificates.ca.cert)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = old.wrap_bio(ours, theirs, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    server = server_tls(certificates.server.cert, certificates.server.key).wrap_bio(theirs, ours, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):  # so that the alert is sent
        server.do_handshake()
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        server.do_handshake()
