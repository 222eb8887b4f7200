"""One set of storage options, in Lance's words, for every library that reaches a store."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.storage import open_store
from lance_dfaiss.storage.dialects import for_fsspec, for_object_store, known_settings

S3 = {
    "AWS_ACCESS_KEY_ID": "id",
    "secret_access_key": "secret",
    "aws_session_token": "token",
    "region": "eu-west-1",
    "aws_endpoint_url": "http://h:1",
    "allow_http": "true",
    "aws_virtual_hosted_style_request": "false",
    "client_max_retries": "5",
    "user_agent": "x",
}


POOL = {"max_pool_connections": 64}


def test_s3() -> None:
    assert for_fsspec("s3", S3) == {
        "key": "id",
        "secret": "secret",
        "token": "token",
        "endpoint_url": "http://h:1",
        "client_kwargs": {"region_name": "eu-west-1"},
        "config_kwargs": {**POOL, "s3": {"addressing_style": "path"}},
    }
    config, client = for_object_store("s3", S3)
    assert config["access_key_id"] == "id"
    assert config["endpoint"] == "http://h:1"
    assert client == {"allow_http": True}


def test_what_the_backend_understands_stays() -> None:
    own = {"key": "id", "secret": "secret", "endpoint_url": "http://h:1", "profile": "p", "client_kwargs": "x"}
    assert for_fsspec("s3", own) == {**own, "config_kwargs": POOL}
    assert for_fsspec("s3", {**own, "config_kwargs": "mine"})["config_kwargs"] == "mine"
    assert for_fsspec("s3", {**own, "aws_access_key_id": "other"})["key"] == "id"
    assert for_fsspec("memory", {"aws_region": "x"}) == {"aws_region": "x"}


def test_options_of_another_store_are_left_out() -> None:
    mixed = {**S3, "azure_storage_account_name": "a", "google_service_account": "/f"}
    assert for_fsspec("s3", mixed) == for_fsspec("s3", S3)
    assert for_fsspec("az", {"azure_storage_account_name": "a", "aws_region": "r"}) == {"account_name": "a"}


def test_azure() -> None:
    assert for_fsspec("az", {"account_name": "a", "azure_storage_account_key": "k", "allow_http": "true"}) == {
        "account_name": "a",
        "account_key": "k",
    }
    emulator = {"account_name": "a", "account_key": "k==", "azure_storage_endpoint": "http://h:1/a"}
    assert for_fsspec("abfss", emulator)["connection_string"] == (
        "BlobEndpoint=http://h:1/a;AccountName=a;AccountKey=k=="
    )
    sas = for_fsspec("az", {"account_name": "a", "sas_token": "?sv=1&sig=2", "azure_endpoint": "http://h:1/a"})
    assert sas["connection_string"].endswith("SharedAccessSignature=sv=1&sig=2")
    app = {"account_name": "a", "azure_client_id": "i", "azure_client_secret": "s", "azure_authority_id": "t"}
    assert for_fsspec("az", app) == {"account_name": "a", "client_id": "i", "client_secret": "s", "tenant_id": "t"}


def test_google() -> None:
    assert for_fsspec("gs", {"google_service_account": "/key.json"}) == {"token": "/key.json"}
    key = {"type": "service_account"}
    assert for_fsspec("gs", {"google_service_account_key": json.dumps(key)}) == {"token": key}
    assert for_fsspec("gs", {"google_skip_signature": "true"}) == {"token": "anon"}
    assert for_object_store("gcs", {"google_service_account": "/f"})[0] == {"service_account": "/f"}


@pytest.mark.parametrize(("text", "style"), [("true", "virtual"), ("1", "virtual"), ("False", "path")])
def test_truth_values(text: str, style: str) -> None:
    found = for_fsspec("s3", {"aws_virtual_hosted_style_request": text})
    assert found == {"config_kwargs": {**POOL, "s3": {"addressing_style": style}}}


def test_obstore_takes_every_setting() -> None:
    stores = pytest.importorskip("obstore.store")
    s3 = {**S3, "aws_request_payer": "true", "skip_signature": "false"}
    config, client = for_object_store("s3", s3)
    assert set(config) == set(known_settings("s3", s3))
    stores.from_url("s3://bucket/x", config=config, client_options=client)
    azure = {
        "account_name": "a",
        "account_key": "aw==",
        "sas_token": "sv=1",
        "client_id": "i",
        "client_secret": "s",
        "tenant_id": "t",
        "azure_endpoint": "http://h:1/a",
        "azure_skip_signature": "false",
    }
    config, client = for_object_store("azure", azure)
    assert len(config) == len(azure)
    stores.from_url("az://container/x", config=config, client_options=client)


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "host:9000"},
        {"regoin": "x"},
        {"client_kwargs": "x"},
        {"config_kwargs": {"x": 1}},
        {"max_concurrency": "x"},
    ],
)
def test_settings_that_the_backend_refuses(wrong: dict[str, Any]) -> None:
    # It looks at them when it is first used: by then an index may have been trained.
    options = {"access_key_id": "id", "secret_access_key": "secret", "region": "eu-west-1"}
    with pytest.raises(InvalidArgument, match=r"^s3://bucket/indexes cannot be opened"):
        open_store("s3://bucket/indexes", {**options, **wrong})


def test_a_backend_that_is_missing_is_named_with_its_extra() -> None:
    code = """
import sys
sys.modules["s3fs"] = None
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.storage import open_store
try:
    open_store("s3://bucket/indexes")
except InvalidArgument as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'lance-dfaiss[s3]'" in done.stdout
