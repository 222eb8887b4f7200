"""Whether a store refuses to create an object that is there, as every commit relies on it to do.

Lance makes a version by writing its manifest on the condition that there is none of that number (``If-None-Match: *``).
Some servers take no notice of conditions: of two writers at the same time both are told that they have won, and the
rows of one are gone without an error. Nothing that is built on such a store can be relied on, so it is refused.

The question is asked with the package obstore, which is the Rust crate that Lance itself reaches stores with.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from .base import public_url, temporary_name, unsafe, without_credentials
from .dialects import FAMILIES, Family, for_object_store, known_settings
from .retries import brief

__all__ = ["check_conditional_writes"]

_log = logging.getLogger(__name__)

# Short: a store that cannot be asked is not refused for that, and whoever waits wants to commit.
_RETRIES: Final[Mapping[str, Any]] = {"max_retries": 10, "retry_timeout": timedelta(seconds=30)}
_TIMEOUTS: Final[Mapping[str, Any]] = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=20)}

_ALLOW_HTTP: Final[Mapping[Family, str]] = {
    "s3": "AWS_ALLOW_HTTP",
    "azure": "AZURE_ALLOW_HTTP",
    "gcs": "GOOGLE_ALLOW_HTTP",
}

_lock = threading.Lock()
_answered: set[tuple[str, str, str]] = set()


def check_conditional_writes(url: str, options: Mapping[str, str] | None = None) -> None:
    """Refuse a store that lets two writers create the same object.

    Asked once per store and process, with two empty objects of one new name, which is deleted again. Where obstore is
    not installed or cannot write there (it knows fewer sources of credentials than Lance), a warning is logged instead.

    Parameters
    ----------
    url : str
        Folder of the dataset in which the object is made; any but those of S3, Azure and Google Cloud are taken for
        safe: a local file system is, and ``s3+ddb`` keeps its versions elsewhere.
    options : mapping, optional
        As Lance takes them.

    Raises
    ------
    UnsafeStorage
        Both writers were told that they have created it.
    """
    parts = urlsplit(url)
    family = FAMILIES.get(parts.scheme)
    if family is None:
        return
    options = {} if options is None else options
    store = (parts.scheme, parts.netloc, known_settings(family, options).get("endpoint", ""))
    with _lock:  # the first one asks for all
        if store in _answered:
            return
        created = _created_twice(url, family, options)
        if created:
            raise unsafe(public_url(url))
        if created is not None:
            _answered.add(store)


def _created_twice(url: str, family: Family, options: Mapping[str, str]) -> bool | None:
    """Try to create one object twice, and tell whether that went well; None where the store gave no answer."""
    where = public_url(url)
    try:
        import obstore
        from obstore import exceptions
        from obstore.store import from_url
    except ImportError:
        _log.warning(
            "whether %s honours conditional writes was not checked, as the package obstore is missing: Lance loses"
            " rows on a store that does not. Install lance-dfaiss with the extra s3 or azure, or obstore itself",
            where,
        )
        return False  # as far as can be told here, also the next time
    # Settings of the HTTP client that are given hide those of the environment, which Lance reads.
    allowed = os.environ.get(_ALLOW_HTTP[family], "false")
    config, client = for_object_store(family, {"allow_http": allowed, **options})
    name = f"{temporary_name()}-probe"
    created = 0
    try:
        store: Any = from_url(url, config=config, client_options={**client, **_TIMEOUTS}, retry_config=_RETRIES)  # type: ignore[call-overload]
        for _ in range(2):
            try:
                obstore.put(store, name, b"", mode="create")
                created += 1
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                pass  # the first one meets itself when it was repeated because its answer was lost
        obstore.delete(store, name)
    except (exceptions.BaseError, OSError) as exc:
        if created == 2:
            _log.warning("an empty object %s is left in %s: %s", name, where, _first_line(exc))
            return True
        # One who may not write learns that from the commit itself.
        level = logging.DEBUG if isinstance(exc, exceptions.PermissionDeniedError) else logging.WARNING
        _log.log(level, "whether %s honours conditional writes could not be checked: %s", where, _first_line(exc))
        return None
    return created == 2


def _first_line(exc: BaseException) -> str:
    return without_credentials(brief(exc)).partition("\n")[0]
