"""What failures mean, and which calls are made again: with the words that real servers and libraries use."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import DigestMismatch, MissingFile, ReadOnlyStorage, StorageError
from lance_dfaiss.storage import SessionStore, failure_kind
from lance_dfaiss.storage.retries import MAX_IN_FLIGHT, call, pauses

SERVER = "Server returned non-2xx status code: "
BUSY = (
    "LanceError(IO): Generic S3 error: Error performing GET http://127.0.0.1:42139/bucket/x/a in 419.431401ms, after 3"
    f" retries, max_retries: 3, retry_timeout: 180s  - {SERVER}503 Service Unavailable: <?xml version='1.0'?><Error>"
    "<Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>, /home/x/object_store.rs:1736:12"
)
SAID = {
    BUSY: "passing",
    f"Error performing HEAD http://h/b/a in 5ms - {SERVER}503 Service Unavailable: , /x/store.rs:1715:29": "passing",
    "Generic S3 error: Error performing GET http://h:9/b/a in 1s - HTTP error: error sending request": "passing",
    f"Generic S3 error: Error performing PUT http://h/b/a in 1s - {SERVER}409 Conflict: <Error><Code>"
    "ConditionalRequestConflict</Code></Error>": "passing",
    f"Generic S3 error: Error performing GET http://h/b/a in 20ms - {SERVER}416 Range Not Satisfiable: ": "beyond_end",
    "Failed to read range from remote file: Not found: x/nope, /x/object_store.rs:1736:12": "missing",
    "Failed to get remote file: Object at location x/nope not found: Error performing GET": "missing",
    f"The operation lacked the necessary privileges to complete for path x/a: {SERVER}403 Forbidden: ": "refused",
    "Failed to delete remote file: Object at location x/b not found: (code: 404)": "missing",
    "Lance gave up for a reason of its own": "other",
}


class Answering:
    """A file session whose every method raises what is in line (None for nothing), then does what a real one would."""

    def __init__(self, *failures: Exception | None, contents: bytes = b"0123456789", exists: bool = True) -> None:
        self.waiting = list(failures)
        self.contents = contents
        self.exists = exists
        self.calls = 0

    def _answer(self) -> None:
        self.calls += 1
        failure = self.waiting.pop(0) if self.waiting else None
        if failure is not None:
            raise failure

    def read_range(self, _: str, offset: int, length: int) -> bytes:
        self._answer()
        return self.contents[offset : offset + length]

    def contains(self, _: str) -> bool:
        self._answer()
        return self.exists

    def list(self, _: str | None) -> list[str]:
        self._answer()
        return ["g/a"]

    def upload_file(self, local_path: str, _: str) -> None:
        self._answer()
        self.contents = Path(local_path).read_bytes()

    def download_file(self, _: str, local_path: str) -> None:
        self._answer()
        Path(local_path).write_bytes(self.contents)

    def delete_file(self, _: str) -> None:
        self._answer()


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.storage.retries._FIRST_PAUSE_SECONDS", 1e-4)


@pytest.mark.parametrize(("text", "kind"), SAID.items())
@pytest.mark.parametrize("cls", [OSError, RuntimeError])
def test_words(cls: type[Exception], text: str, kind: str) -> None:
    assert failure_kind(cls(text)) == kind


def test_classes_and_numbers() -> None:
    assert failure_kind(OSError(errno.EBUSY, "Please reduce your request rate.")) == "passing"
    assert failure_kind(ConnectionResetError()) == "passing"
    assert failure_kind(TimeoutError()) == "passing"
    assert failure_kind(FileNotFoundError("x")) == "missing"
    assert failure_kind(OSError(errno.ENOSPC, "full")) == "other"


def test_what_s3fs_makes_of_statuses() -> None:
    errors = pytest.importorskip("s3fs.errors")
    botocore = pytest.importorskip("botocore.exceptions")
    for status, code, kind in [
        (503, "SlowDown", "passing"),
        (500, "InternalError", "passing"),
        (500, "Unheard", "passing"),
        (416, "InvalidRange", "beyond_end"),
        (404, "NoSuchKey", "missing"),
        (403, "AccessDenied", "refused"),
        (412, "PreconditionFailed", "taken"),
        (409, "OperationAborted", "passing"),
        (400, "InvalidRequest", "other"),
    ]:
        said = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        assert failure_kind(errors.translate_boto_error(botocore.ClientError(said, "GetObject"))) == kind, code


def test_what_azure_raises() -> None:
    azure = pytest.importorskip("azure.core.exceptions")
    busy = azure.HttpResponseError("busy")
    busy.status_code = 503
    assert failure_kind(busy) == "passing"
    assert failure_kind(azure.ServiceRequestError("no route")) == "passing"
    with pytest.raises(OSError, match="busy"):
        call(_raising(busy))


def _raising(*failures: BaseException) -> Callable[[], Any]:
    waiting = list(failures)

    def method() -> str:
        raise waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return method


OPERATIONS: dict[str, Callable[[SessionStore], object]] = {
    "read_range": lambda store: store.read_range("g/a", 0, 5),
    "list": lambda store: [file.name for file in store.list("g")],
    "exists": lambda store: store.exists("g/a"),
    "delete": lambda store: store.delete("g/a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_may_pass_is_tried_again(operation: str) -> None:
    session = Answering(*[RuntimeError(BUSY)] * 5)
    expected = OPERATIONS[operation](SessionStore(Answering(), "s3://b"))
    assert OPERATIONS[operation](SessionStore(session, "s3://b")) == expected
    assert session.calls == 6


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_does_not_pass_is_told_in_the_end(operation: str) -> None:
    with pytest.raises(StorageError, match=r"SlowDown: Please reduce your request rate\."):
        OPERATIONS[operation](SessionStore(Answering(*[RuntimeError(BUSY)] * 100), "s3://b"))


def test_what_will_not_pass_is_not_tried_again() -> None:
    session = Answering(*[OSError(f"{SERVER}400 Bad Request")] * 3)
    with pytest.raises(StorageError):
        SessionStore(session, "s3://b").list("g")
    assert session.calls == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.storage.retries._PATIENCE_SECONDS", 0.0)
    session = Answering(*[OSError(BUSY)] * 3)
    with pytest.raises(StorageError):
        SessionStore(session, "s3://b").exists("g/a")
    assert session.calls == 1


def test_faults_of_this_program_pass_unchanged() -> None:
    with pytest.raises(TypeError, match="mine"):
        call(_raising(TypeError("mine")))


def test_a_busy_store_says_nothing_about_the_length_of_a_file() -> None:
    # The range cannot be read, the file is there, and the question for its last byte fails as well.
    busy = [OSError(BUSY)] * 6
    with pytest.raises(StorageError) as caught:
        SessionStore(Answering(*busy, None, *busy), "s3://b").read_range("g/a", 0, 5)
    assert not isinstance(caught.value, DigestMismatch)


def test_a_busy_store_is_not_taken_for_a_long_or_short_document() -> None:
    with pytest.raises(StorageError, match="Reading"):
        SessionStore(Answering(*[OSError(BUSY)] * 100), "s3://b").read("g/a", max_bytes=5)


def test_refusals_and_absences_have_their_classes() -> None:
    refused, gone = OSError(f"{SERVER}403 Forbidden"), OSError("Not found: g/a")
    with pytest.raises(ReadOnlyStorage):
        SessionStore(Answering(RuntimeError(str(refused))), "s3://b").check_writable()
    with pytest.raises(MissingFile):
        SessionStore(Answering(gone, exists=False), "s3://b").read_range("g/a", 0, 1)
    with pytest.raises(ReadOnlyStorage):
        SessionStore(Answering(None, None, refused, exists=False), "s3://b").write("g/b", b"x")


@given(st.integers(0, 2**32))
def test_pauses_are_bounded(seed: int) -> None:
    waits = list(pauses(random.Random(seed)))
    assert len(waits) == 5
    assert all(0 <= wait <= 8 for wait in waits)


def test_pauses_differ() -> None:
    assert len({tuple(pauses(random.Random(seed))) for seed in range(20)}) == 20


def test_calls_at_once_are_bounded() -> None:
    inside, most = [0], [0]
    lock, full, opened = threading.Lock(), threading.Event(), threading.Event()

    def method() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if inside[0] == MAX_IN_FLIGHT:
                full.set()
        assert opened.wait(30)
        with lock:
            inside[0] -= 1

    with ThreadPoolExecutor(MAX_IN_FLIGHT + 8) as pool:
        done = [pool.submit(call, method) for _ in range(MAX_IN_FLIGHT + 8)]
        assert full.wait(30)
        opened.set()
        for each in done:
            each.result()
    assert most[0] == MAX_IN_FLIGHT
