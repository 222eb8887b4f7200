"""What a failure of a store means, which ones may pass, and how often a call is made again.

The libraries behind a store repeat requests themselves, for a few seconds. A build makes thousands, so that now and
then one of them has no luck with all its repetitions: a store that is asked for too much answers 503 for minutes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal, ParamSpec, TypeVar

__all__ = ["MAX_IN_FLIGHT", "Kind", "brief", "call", "failure_kind", "pauses"]

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

Kind = Literal["missing", "beyond_end", "refused", "taken", "passing", "other"]
"""What a failure means: nothing is there, not so much is there, one may not, the name is taken, it may pass."""

MAX_IN_FLIGHT: Final = 64
"""Most calls that this process makes to stores at one moment: beyond that they queue up here, not at the store."""

_ATTEMPTS: Final = 6
_FIRST_PAUSE_SECONDS: Final = 0.25
_LONGEST_PAUSE_SECONDS: Final = 8.0

_PATIENCE_SECONDS: Final = 60.0
"""No call is made again when so much time has passed since the first: each may take long by itself."""

# RFC 9110, and 429 of RFC 6585: those after which the same request can succeed.
_PASSING_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_KINDS: Final[dict[int, Kind]] = {
    401: "refused",
    403: "refused",
    404: "missing",
    409: "taken",
    412: "taken",
    416: "beyond_end",
}
_PASSING_NUMBERS: Final = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT}
    | ({errno.EREMOTEIO} if hasattr(errno, "EREMOTEIO") else set())  # what s3fs makes of a 500
)

# How the crate object_store, which Lance uses, words the answers of a server and the lack of one.
_STATUS: Final = re.compile(r"status code: (\d{3})\b|\(code: (\d{3})\)")
_NO_ANSWER: Final = re.compile(
    r"HTTP error: |error sending request|error decoding response body|request or response body error"
    r"|operation timed out"
)
# S3's own codes for "again, please": two of them come with a 409, which elsewhere says that a name is taken.
_AGAIN: Final = re.compile(r"\b(?:SlowDown|ConditionalRequestConflict|OperationAborted)\b")
_NOT_FOUND: Final = re.compile(r"Not found: |Object at location \S+ not found")

# Failures of the network, as the HTTP clients of fsspec's backends call them. By name: none of them is required.
_NO_ANSWER_CLASSES: Final = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "azure.core.exceptions.IncompleteReadError",
        "azure.core.exceptions.ServiceRequestError",
        "azure.core.exceptions.ServiceResponseError",
        "botocore.exceptions.HTTPClientError",
    }
)
_BACKENDS: Final = frozenset({"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"})

_XML_ERROR: Final = re.compile(r"<\?xml.*?<Code>(.*?)</Code>.*?<Message>(.*?)\s*</Message>.*?</Error>", re.DOTALL)

_in_flight = threading.BoundedSemaphore(MAX_IN_FLIGHT)


def call(method: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a method of a backend, and again after a failure that may pass.

    The method must be one that does no harm when it is carried out twice, the first answer having been lost.

    Parameters
    ----------
    method : callable
        What to call.
    *args, **kwargs
        Its parameters.

    Raises
    ------
    OSError
        What the last call raised, whichever class the backend gave it: `FileNotFoundError`, `FileExistsError` and
        `PermissionError` where it means that.
    """
    began, waits = time.monotonic(), pauses()
    while True:
        try:
            with _in_flight:
                return method(*args, **kwargs)
        except Exception as exc:
            if not _is_the_backends(exc):
                raise
            pause = next(waits, None) if failure_kind(exc) == "passing" else None
            if pause is None or time.monotonic() + pause - began > _PATIENCE_SECONDS:
                failure = _as_os_error(exc)
                if failure is exc:
                    raise
                raise failure from exc
            _log.info("a store was busy or could not be reached, once more in %.1f s: %s", pause, brief(exc))
        time.sleep(pause)


def pauses(chance: random.Random | None = None) -> Iterator[float]:
    """Return the seconds to wait before each further attempt.

    Exponential with full jitter, so that the many callers whom one overload hit do not all come back at once (Brooker,
    "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).

    Parameters
    ----------
    chance : random.Random, optional
        For tests; by default one of its own.
    """
    chance = random.Random() if chance is None else chance
    for number in range(_ATTEMPTS - 1):
        yield chance.uniform(0, min(_FIRST_PAUSE_SECONDS * 2**number, _LONGEST_PAUSE_SECONDS))


def failure_kind(exc: BaseException) -> Kind:
    """Return what a failure means, by its class, number, status or words."""
    by_class: tuple[tuple[type[BaseException], Kind], ...] = (
        (FileNotFoundError, "missing"),
        (FileExistsError, "taken"),
        (PermissionError, "refused"),
    )
    for each in _with_causes(exc):
        for cls, kind in by_class:
            if isinstance(each, cls):
                return kind
        if _is_no_answer(each) or _AGAIN.search(str(each)):
            return "passing"
        status = _status_of(each)
        if status is not None:
            return "passing" if status in _PASSING_STATUSES else _KINDS.get(status, "other")
        if _NOT_FOUND.search(str(each)):
            return "missing"
    return "other"


def _with_causes(exc: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = exc
    while found is not None:
        yield found
        found = found.__cause__


def _status_of(exc: BaseException) -> int | None:
    # azure-core has an attribute, botocore a dictionary, object_store a text.
    status = getattr(exc, "status_code", None)
    response = getattr(exc, "response", None)
    if status is None and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int):
        return status
    found = _STATUS.search(str(exc))
    return int(found[1] or found[2]) if found else None


def _is_no_answer(exc: BaseException) -> bool:
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError, ConnectionError)):
        return True
    if isinstance(exc, OSError) and exc.errno in _PASSING_NUMBERS:
        return True
    if any(f"{cls.__module__}.{cls.__name__}" in _NO_ANSWER_CLASSES for cls in type(exc).__mro__):
        return True
    return _NO_ANSWER.search(str(exc)) is not None


def _is_the_backends(exc: Exception) -> bool:
    # Lance raises OSError for some failures of storage and RuntimeError for others (a refused HEAD, say).
    if isinstance(exc, (OSError, asyncio.TimeoutError)) or type(exc) is RuntimeError:
        return True
    return type(exc).__module__.partition(".")[0] in _BACKENDS


def _as_os_error(exc: Exception) -> OSError:
    kinds: dict[Kind, type[OSError]] = {
        "missing": FileNotFoundError,
        "taken": FileExistsError,
        "refused": PermissionError,
    }
    wanted = kinds.get(failure_kind(exc), OSError)
    return exc if isinstance(exc, wanted) else wanted(brief(exc))


def brief(exc: BaseException) -> str:
    """Return what was said, with a server's XML document cut down to its code and message."""
    return _XML_ERROR.sub(r"\1: \2", str(exc)).strip()
