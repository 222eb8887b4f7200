"""Object stores for tests: real servers on loopback, behind a proxy that counts requests and makes them fail.

The servers are moto (S3, in this process), azurite (Azure), s3rver (S3 without conditional writes, so unsafe) and
Ceph's gateway (S3 as well, see `tests.storage.radosrig`). Azurite and s3rver come from npm: they are found on the PATH,
in ``node_modules`` of the repository, or in the folder that the environment variable NODE_PROGRAMS names; tests that
need a server that is not installed skip.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lance.file import LanceFileSession as Session

from tests.storage import radosrig
from tests.storage.storeproxy import BUSY, REFUSED, SLOW_DOWN, Answer, Asked, Passed, Proxy, at_rate, when

__all__ = [
    "BUSY",
    "REFUSED",
    "SLOW_DOWN",
    "Answer",
    "Asked",
    "AzureRig",
    "Passed",
    "Proxy",
    "S3Rig",
    "Session",
    "at_rate",
    "azurite",
    "moto",
    "radosgw",
    "s3rver",
    "when",
]

ACCESS_KEY, SECRET_KEY, REGION = radosrig.ACCESS_KEY, radosrig.SECRET_KEY, "us-east-1"
AZURE_ACCOUNT = "devstoreaccount1"
# The one key that every emulator has; it is published and opens nothing else.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_START_SECONDS = 30


@dataclass(frozen=True)
class S3Rig:
    """An S3 server behind a proxy.

    Attributes
    ----------
    server : str
        URL of the server itself, past the proxy.
    """

    proxy: Proxy
    server: str

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def drop(self, name: str) -> None:
        """Delete a bucket with all that is in it, as somebody might in the middle of a build."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for item in page.get("Contents", ()):
                client.delete_object(Bucket=name, Key=item["Key"])
        client.delete_bucket(Bucket=name)

    def names(self, bucket: str) -> list[str]:
        """List what is in a bucket, past the proxy."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def client(self) -> Any:
        """Return a boto3 client of the server itself."""
        boto3 = pytest.importorskip("boto3")
        return boto3.client(
            "s3",
            endpoint_url=self.server,
            aws_access_key_id=self.options["aws_access_key_id"],
            aws_secret_access_key=self.options["aws_secret_access_key"],
            region_name=REGION,
        )

    @property
    def options(self) -> dict[str, str]:
        """Storage options as Lance takes them, for the proxy."""
        return {
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "aws_region": REGION,
            "aws_endpoint": self.proxy.url,
            "allow_http": "true",
            "aws_virtual_hosted_style_request": "false",
        }


@dataclass(frozen=True)
class AzureRig:
    """An Azure server behind a proxy."""

    proxy: Proxy
    server: str

    def container(self, name: str) -> str:
        """Make a container; its URL."""
        blob = pytest.importorskip("azure.storage.blob")
        with blob.BlobServiceClient(f"{self.server}/{AZURE_ACCOUNT}", credential=AZURE_KEY) as client:
            client.create_container(name).close()
        return f"az://{name}"

    @property
    def options(self) -> dict[str, str]:
        """Storage options as Lance takes them, for the proxy."""
        return {
            "account_name": AZURE_ACCOUNT,
            "account_key": AZURE_KEY,
            "azure_storage_endpoint": f"{self.proxy.url}/{AZURE_ACCOUNT}",
            "allow_http": "true",
        }


@contextmanager
def moto() -> Iterator[S3Rig]:
    """Run moto in this process."""
    module = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server,s3]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with Proxy(f"http://{host}:{port}") as proxy:
            yield S3Rig(proxy, f"http://{host}:{port}")
    finally:
        server.stop()


@contextmanager
def radosgw() -> Iterator[S3Rig]:
    """Run Ceph's gateway with all that it needs: a dozen seconds to start."""
    missing = radosrig.missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: {radosrig.INSTALL}")
    with radosrig.rados_gateway() as server, Proxy(server) as proxy:
        yield S3Rig(proxy, server)


@contextmanager
def azurite() -> Iterator[AzureRig]:
    """Run azurite, in a process of its own that keeps everything in memory."""
    flags = ["--blobHost", "127.0.0.1", "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    command = [_program("azurite-blob"), *flags, "--inMemoryPersistence", "--blobPort"]
    with _running(command) as server, Proxy(server) as proxy:
        yield AzureRig(proxy, server)


@contextmanager
def s3rver(folder: Path) -> Iterator[S3Rig]:
    """Run s3rver, which takes no notice of the conditions of a write."""
    command = [_program("s3rver"), "--address", "127.0.0.1", "--directory", str(folder), "--silent"]
    # Its own fixed keys: it checks signatures.
    with _running([*command, "--port"]) as server, Proxy(server) as proxy:
        yield _S3rverRig(proxy, server)


class _S3rverRig(S3Rig):
    @property
    def options(self) -> dict[str, str]:
        return {**super().options, "aws_access_key_id": "S3RVER", "aws_secret_access_key": "S3RVER"}


def _program(name: str) -> str:
    places = [Path(__file__).parents[2] / "node_modules" / ".bin"]
    if "NODE_PROGRAMS" in os.environ:
        places.insert(0, Path(os.environ["NODE_PROGRAMS"]))
    found = shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)
    if found is None:
        pytest.skip(f"{name} is not installed: npm install --no-save azurite s3rver")
    return found


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """Run a server on a free port, given as the last argument; its URL."""
    port = _free_port()
    with subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=_START_SECONDS)


def _free_port() -> int:
    """Choose a port: these servers do not say which one they were given when they are asked to take any."""
    while True:
        # Below those that clients' ends are given, which may be taken again before the server has started.
        port = random.randint(15_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    pause = threading.Event()
    for _ in range(_START_SECONDS * 20):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert server.poll() is None, f"it ended with {server.returncode}"
            pause.wait(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
