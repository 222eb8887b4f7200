"""The commands of the how-to pages make what servers and clients take."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from lance_dfaiss.serve.security import Access, Rights, check_listen, client_tls, load_token, server_tls
from tests.serve.certificates import Identity
from tests.serve.test_security import handshake

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


def commands(page: str) -> str:
    """All commands of a page but those of this package."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    joined = "".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return "".join(line + "\n" for line in joined.splitlines() if not line.startswith("lance-dfaiss"))


def run(page: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(page)], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_certificates_and_tokens_of_the_pages_are_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("serve-with-tls.md", tmp_path)
    run("tokens-and-rights.md", tmp_path)
    ca, server, client = (Identity(tmp_path / f"{n}.pem", tmp_path / f"{n}.key") for n in ("ca", "server", "client"))
    for name in ("localhost", "search-1.example", "10.0.0.11"):
        assert handshake(server, ca, client, client_ca=ca, name=name) == "reports"
    access = Access(read_token=load_token(tmp_path / "read.token"), admin_token=load_token(tmp_path / "admin.token"))
    assert access.rights_of((tmp_path / "read.token").read_text().strip(), certificate=False) == Rights(True, False)
    check_listen("0.0.0.0", access, server_tls(server.cert, server.key))
    client_tls(ca.cert, client.cert, client.key)
    assert caplog.records == []


OPTIONS = {"--token-file": "read", "--admin-token-file": "admin", "--tls-client-ca": "certificate"}


def rows_of_rights() -> dict[frozenset[str], tuple[str, str]]:
    """The table of rights: options -> what reading needs, what an admin needs."""
    text = (HOW_TO / "tokens-and-rights.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    return {
        frozenset(OPTIONS if started.strip() == "all three" else re.findall(r"--[a-z-]+", started)): (read, admin)
        for started, read, admin in ([cell.strip() for cell in line] for line in lines)
    }


@pytest.mark.parametrize(
    "options", [set(some) for n in range(4) for some in itertools.combinations(OPTIONS, n)], ids=str
)
def test_the_table_of_rights_is_what_happens(options: set[str]) -> None:
    access = Access(
        read_token=b"r" * 16 if "--token-file" in options else None,
        admin_token=b"a" * 16 if "--admin-token-file" in options else None,
        mutual_tls="--tls-client-ca" in options,
    )

    def allows(needs: str, token: str, certificate: bool) -> bool:
        """What a cell of the table says of a client that shows this."""
        if needs == "cannot be":
            return False
        enough = certificate or "certificate" not in needs
        if "one of" in needs:
            return enough and token in ("r" * 16, "a" * 16)
        if "admin token" in needs:
            return enough and token == "a" * 16
        return enough and ("token" not in needs or token == "r" * 16)

    reading, admin = rows_of_rights()[frozenset(options)]
    for token, certificate in itertools.product(["", "r" * 16, "a" * 16, "x" * 16], [False, True]):
        rights = access.rights_of(token, certificate=certificate)
        assert (rights.read, rights.admin) == (allows(reading, token, certificate), allows(admin, token, certificate))
