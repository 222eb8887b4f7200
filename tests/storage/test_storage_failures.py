"""What breaks from outside: full disks, killed writers, races, read-only places, foreign URLs."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from lance.file import LanceFileSession

from lance_dfaiss.errors import (
    InvalidArgument,
    MissingFile,
    ReadOnlyStorage,
    StorageError,
    StorageFull,
    UntrustedLocation,
)
from lance_dfaiss.storage import FsspecStore, LocalStore, SessionStore, Store, open_store, storage_errors

OPENERS = {
    "local": "from lance_dfaiss.storage import LocalStore\nstore = LocalStore(root)",
    "fsspec": "from lance_dfaiss.storage import FsspecStore\nstore = FsspecStore('file://' + root)",
    "session": (
        "from lance.file import LanceFileSession\nfrom lance_dfaiss.storage import SessionStore\n"
        "store = SessionStore(LanceFileSession(root), root)"
    ),
}


def command(kind: str, body: str, root: Path) -> list[str]:
    return [sys.executable, "-c", f"import sys\nroot = sys.argv[1]\n{OPENERS[kind]}\n{body}", str(root)]


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


FULL = """
import resource, signal
from lance_dfaiss.errors import StorageFull
from lance_dfaiss.storage import HashingWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
def streamed():
    with store.create("g/big") as path, HashingWriter(path) as writer:
        for _ in range(20):
            writer.write(bytes(10_000))
for attempt in (streamed, lambda: store.write("g/big", bytes(200_000))):
    try:
        attempt()
    except StorageFull as exc:
        print("full:", exc)
"""


@pytest.mark.parametrize("kind", OPENERS)
def test_full_disk_leaves_nothing(tmp_path: Path, kind: str) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    done = subprocess.run(
        command(kind, FULL, root),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert done.stdout.count("full:") == 2, done.stdout + done.stderr
    assert files_below(tmp_path) == []


KILLED = """
with store.create("g/file") as path:
    with open(path, "wb") as file:
        file.write(bytes(100_000))
        file.flush()
        print("half way", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("kind", OPENERS)
def test_killed_writer_leaves_no_visible_file(tmp_path: Path, kind: str) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    with subprocess.Popen(
        command(kind, KILLED, root),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half way\n"
        writer.kill()
        assert writer.wait(timeout=60) == -9
    assert any(path.stat().st_size == 100_000 for path in files_below(tmp_path)), "the writer had not begun"
    stores: list[Store] = [
        LocalStore(root),
        FsspecStore(f"file://{root}"),
        SessionStore(LanceFileSession(str(root)), str(root)),
    ]
    for store in stores:
        assert store.list("") == []
        assert not store.exists("g/file")
    LocalStore(root).write("g/file", b"a second attempt")


def test_one_of_two_racing_writers_wins(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    both_ready = Barrier(2, timeout=60)

    def race(content: bytes) -> bytes | None:
        try:
            with store.create("g/file") as path:
                path.write_bytes(content)
                both_ready.wait()
        except StorageError:
            return None
        return content

    for _ in range(20):
        with ThreadPoolExecutor(2) as pool:
            winners = [content for content in pool.map(race, [b"one", b"two"]) if content]
        assert len(winners) == 1
        assert store.read("g/file", max_bytes=3) == winners[0]
        assert files_below(tmp_path) == [tmp_path / "root/g/file"]
        store.delete("g/file")


def test_deleting_neighbours_do_not_disturb_creation(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def write_and_delete(number: int) -> None:
        for turn in range(30):
            store.write(f"a/b/{number}-{turn}", b"x")
            store.delete(f"a/b/{number}-{turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))
    assert list(tmp_path.iterdir()) == []


def test_local_root_is_made_by_the_first_write_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "b")
    store.check_writable()
    assert store.list("") == []
    assert not store.exists("x")
    store.delete("x")
    assert list(tmp_path.iterdir()) == []
    store.write("x", b"")
    assert (tmp_path / "a/b/x").exists()


READ_ONLY = """
import os
from lance_dfaiss.errors import ReadOnlyStorage
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
for attempt in (store.check_writable, lambda: store.write("g/file", b"x")):
    try:
        attempt()
    except ReadOnlyStorage as exc:
        print("read only:", exc)
"""


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    # Not below tmp_path, whose parents pytest closes to the user that the child process becomes.
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        closed = Path(outer, "closed")
        closed.mkdir(mode=0o555)
        yield closed


@pytest.mark.parametrize("kind", OPENERS)
def test_read_only_place_is_told_with_the_way_out(kind: str, closed_folder: Path) -> None:
    done = subprocess.run(command(kind, READ_ONLY, closed_folder), capture_output=True, text=True, timeout=60)
    assert done.stdout.count("read only:") == 2, done.stdout + done.stderr
    assert done.stdout.count("index_uri=") == 2
    assert files_below(closed_folder) == []


UNREADABLE = """
import os
from lance_dfaiss.errors import MissingFile, StorageError
os.chmod(root, 0o600)
if os.getuid() == 0:
    os.setuid(65534)
for attempt in (lambda: store.exists("file"), lambda: store.read_range("file", 0, 1), lambda: store.list("")):
    try:
        print(attempt())
    except MissingFile as exc:
        print("taken for an absence:", exc)
    except StorageError as exc:
        print("storage error:", exc)
"""


@pytest.mark.parametrize("kind", ["session", "fsspec"])
def test_refusal_is_not_taken_for_an_absence(kind: str, closed_folder: Path) -> None:
    done = subprocess.run(command(kind, UNREADABLE, closed_folder), capture_output=True, text=True, timeout=60)
    assert done.stdout.count("storage error:") == 3, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "writing", "expected"),
    [
        (errno.ENOENT, False, MissingFile),
        (errno.ENOENT, True, StorageError),
        (errno.ENOSPC, True, StorageFull),
        (errno.EDQUOT, True, StorageFull),
        (errno.EFBIG, True, StorageFull),
        (errno.EROFS, True, ReadOnlyStorage),
        (errno.EACCES, True, ReadOnlyStorage),
        (errno.EPERM, True, ReadOnlyStorage),
        (errno.EACCES, False, StorageError),
        (errno.EEXIST, True, StorageError),
        (errno.EIO, False, StorageError),
    ],
)
def test_translation(code: int, writing: bool, expected: type[Exception]) -> None:
    cause = OSError(code, os.strerror(code))
    with pytest.raises(expected) as caught, storage_errors("s3://key:secret@host/a", writing=writing):
        raise cause
    assert type(caught.value) is expected
    assert caught.value.__cause__ is cause
    assert "s3://host/a" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_translation_passes_others() -> None:
    own = MissingFile("gone", location="here")
    with pytest.raises(MissingFile) as caught, storage_errors("there", writing=True):
        raise own
    assert caught.value is own
    with pytest.raises(KeyError), storage_errors("there", writing=True):
        raise KeyError("not ours to judge")


def test_translation_reads_the_number_in_lances_text() -> None:
    with pytest.raises(StorageFull), storage_errors("here", writing=True):
        raise OSError("Failed to upload: No space left on device (os error 28)")


def test_open_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "a/b": tmp_path / "a/b",
        str(tmp_path): tmp_path,
        f"file://{tmp_path}/a%20b": tmp_path / "a b",
        f"file://localhost{tmp_path}/c#d": tmp_path / "c#d",
    }
    for url, folder in places.items():
        store = open_store(url)
        assert isinstance(store, LocalStore)
        assert store.location == str(folder)
    assert isinstance(open_store("memory://x"), FsspecStore)


@pytest.mark.parametrize("url", ["simplecache::memory://x", "zip://a::file:///b.zip", "filecache::/a"])
def test_chained_urls_are_refused(url: str) -> None:
    with pytest.raises(UntrustedLocation, match="chained"):
        open_store(url)
    with pytest.raises(UntrustedLocation, match="chained"):
        FsspecStore(url)


@pytest.mark.parametrize("url", ["", "file://elsewhere/a", "nosuchprotocol://a"])
def test_unusable_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_store(url)
    assert caught.value.parameter == "url"


def test_location_holds_no_credentials() -> None:
    store = FsspecStore("memory://user:secret@host/a?token=secret")
    assert store.location == "memory://host/a"
    assert "secret" not in repr(store)
    session = LanceFileSession("memory://x")
    assert SessionStore(session, "s3://id:secret@bucket/a").location == "s3://bucket/a"


def test_foreign_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x").write_bytes(b"")
    (tmp_path / "ours").write_bytes(b"")
    stores: list[Store] = [
        LocalStore(tmp_path),
        FsspecStore(f"file://{tmp_path}"),
        SessionStore(LanceFileSession(str(tmp_path)), str(tmp_path)),
    ]
    for store in stores:
        assert [file.name for file in store.list("")] == ["ours"]


def test_stores_travel_to_workers(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path / "a"), FsspecStore(f"file://{tmp_path}/b")):
        store.write("x", b"y")
        assert pickle.loads(pickle.dumps(store)).read("x", max_bytes=1) == b"y"
