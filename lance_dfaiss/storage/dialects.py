"""The same settings of a store under the names that different libraries have for them.

Callers give ``storage_options`` as Lance takes them. A place outside of the dataset is reached through fsspec, whose
backends have names of their own; what they understand already is left as it is, so either set of names works.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from .retries import MAX_IN_FLIGHT

__all__ = ["FAMILIES", "Family", "for_fsspec", "for_object_store", "known_settings"]

Family = Literal["s3", "azure", "gcs"]

FAMILIES: Final[Mapping[str, Family]] = {
    "s3": "s3",
    "s3a": "s3",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "gs": "gcs",
    "gcs": "gcs",
}
"""Stores by the scheme of their URLs."""

# Aliases are those of the Rust crate object_store (version 0.12: aws/builder.rs, azure/builder.rs, gcp/builder.rs),
# which Lance hands its storage_options to. The first name is the one used here.
_ALIASES: Final[Mapping[Family, Mapping[str, tuple[str, ...]]]] = {
    "s3": {
        "access_key_id": ("aws_access_key_id", "access_key_id"),
        "secret_access_key": ("aws_secret_access_key", "secret_access_key"),
        "session_token": ("aws_session_token", "aws_token", "session_token", "token"),
        "region": ("aws_region", "aws_default_region", "region", "default_region"),
        "endpoint": ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
        "virtual_hosted_style_request": ("aws_virtual_hosted_style_request", "virtual_hosted_style_request"),
        "skip_signature": ("aws_skip_signature", "skip_signature"),
        "request_payer": ("aws_request_payer", "request_payer"),
    },
    "azure": {
        "account_name": ("azure_storage_account_name", "account_name"),
        "account_key": (
            "azure_storage_account_key",
            "azure_storage_access_key",
            "azure_storage_master_key",
            "account_key",
            "access_key",
            "master_key",
        ),
        "sas_token": ("azure_storage_sas_key", "azure_storage_sas_token", "sas_key", "sas_token"),
        "client_id": ("azure_storage_client_id", "azure_client_id", "client_id"),
        "client_secret": ("azure_storage_client_secret", "azure_client_secret", "client_secret"),
        "tenant_id": (
            "azure_storage_tenant_id",
            "azure_storage_authority_id",
            "azure_tenant_id",
            "azure_authority_id",
            "tenant_id",
            "authority_id",
        ),
        "endpoint": ("azure_storage_endpoint", "azure_endpoint", "endpoint"),
        "skip_signature": ("azure_skip_signature", "skip_signature"),
    },
    "gcs": {
        "service_account_path": ("google_service_account", "google_service_account_path", "service_account"),
        "service_account_key": ("google_service_account_key", "service_account_key"),
        "application_credentials": ("google_application_credentials", "application_credentials"),
        "skip_signature": ("google_skip_signature", "skip_signature"),
    },
}

# What begins like this, or is one of these, is meant for Lance alone: fsspec's backends would refuse it.
_LANCE_PREFIXES: Final = ("aws_", "azure_", "google_", "lance_", "client_", "download_", "object_store_")
_LANCE_ONLY: Final = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_url",
        "timeout",
        "user_agent",
    }
)


def known_settings(family: Family, options: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that say who asks whom, under one name each.

    Parameters
    ----------
    family : str
        Kind of store.
    options : mapping
        As Lance takes them, in upper or lower case.
    """
    lower = {key.lower(): value for key, value in options.items()}
    found = {}
    for name, aliases in _ALIASES[family].items():
        value = next((lower[alias] for alias in aliases if alias in lower), None)
        if value is not None:
            found[name] = value
    return found


def for_object_store(family: Family, options: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the settings of a store, and those of its HTTP client, as the package obstore takes them.

    Parameters
    ----------
    family : str
        Kind of store.
    options : mapping
        As Lance takes them.
    """
    allow_http = {key.lower(): value for key, value in options.items()}.get("allow_http", "false")
    names = {name: name for name in _ALIASES[family]} | {"service_account_path": "service_account"}
    config = {names[name]: value for name, value in known_settings(family, options).items()}
    return config, {"allow_http": _is_true(allow_http)}


def for_fsspec(scheme: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings as fsspec's backend for a scheme takes them.

    Parameters
    ----------
    scheme : str
        Of the URL; of one that is not known here, the options are returned as they are.
    options : mapping
        As Lance or the backend takes them; where both name one setting, the backend's name counts.
    """
    family = FAMILIES.get(scheme)
    if family is None:
        return dict(options)
    known = known_settings(family, options)
    aliases = {alias for names in _ALIASES[family].values() for alias in names}
    own = {key: value for key, value in options.items() if key.lower() not in aliases and not _is_for_lance(key)}
    return {**_TRANSLATIONS[family](known), **own}


def _is_for_lance(key: str) -> bool:
    lower = key.lower()
    # client_kwargs is s3fs's own.
    return lower in _LANCE_ONLY or (lower.startswith(_LANCE_PREFIXES) and lower != "client_kwargs")


def _s3fs(known: Mapping[str, str]) -> dict[str, Any]:
    names = {
        "access_key_id": "key",
        "secret_access_key": "secret",
        "session_token": "token",
        "endpoint": "endpoint_url",
    }
    found: dict[str, Any] = {names[name]: value for name, value in known.items() if name in names}
    if "region" in known:
        found["client_kwargs"] = {"region_name": known["region"]}
    if _is_true(known.get("skip_signature", "false")):
        found["anon"] = True
    if _is_true(known.get("request_payer", "false")):
        found["requester_pays"] = True
    # botocore keeps ten connections by default: of more calls at a time, the others would wait for these.
    found["config_kwargs"] = {"max_pool_connections": MAX_IN_FLIGHT}
    if "virtual_hosted_style_request" in known:
        style = "virtual" if _is_true(known["virtual_hosted_style_request"]) else "path"
        found["config_kwargs"]["s3"] = {"addressing_style": style}
    return found


def _adlfs(known: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name, value in known.items() if name not in ("endpoint", "skip_signature")}
    if _is_true(known.get("skip_signature", "false")):
        found["anon"] = True
    if "endpoint" in known and "account_name" in known and ("account_key" in known or "sas_token" in known):
        # The only way to name an endpoint that is not https, as emulators' are not.
        parts = {
            "BlobEndpoint": known["endpoint"],
            "AccountName": known["account_name"],
            "AccountKey": known.get("account_key"),
            "SharedAccessSignature": known.get("sas_token", "").removeprefix("?") or None,
        }
        found["connection_string"] = ";".join(f"{name}={value}" for name, value in parts.items() if value is not None)
    return found


def _gcsfs(known: Mapping[str, str]) -> dict[str, Any]:
    if "service_account_key" in known:
        return {"token": json.loads(known["service_account_key"])}
    path = known.get("service_account_path") or known.get("application_credentials")
    if path is not None:
        return {"token": path}
    return {"token": "anon"} if _is_true(known.get("skip_signature", "false")) else {}


_TRANSLATIONS: Final = {"s3": _s3fs, "azure": _adlfs, "gcs": _gcsfs}


def _is_true(text: str) -> bool:
    # As object_store reads a truth value.
    return text.strip().lower() in ("1", "true", "on", "yes", "y")
