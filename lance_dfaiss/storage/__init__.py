"""Reading, writing, listing and deleting the files of an index, with digests.

A `Store` is a flat space of names below one root. There are three: `LocalStore` for the local file
system, `SessionStore` for whatever the dataset itself lies on (through the dataset's own
credentials), `FsspecStore` for any other URL. On top of any store, `HashingWriter` counts and
digests a file while it is written, and `VerifiedReader` hands out no byte that was not checked. For a
store far away `ReadAhead` asks for many chunks at once, and a `CachedStore` keeps what was read on this
machine.

Files are written once under a name that is never used again, become visible only when complete, and
are never overwritten. ``lance_dfaiss.testing.stores`` holds the contract as a test suite.
"""

from __future__ import annotations

from .ahead import AHEAD_BYTES, ReadAhead, is_remote, reading_ahead
from .base import Store, StoredFile, storage_errors
from .cache import DEFAULT_CACHE_BYTES, CachedStore, ChunkCache, open_cache
from .digests import (
    MAX_DOCUMENT_BYTES,
    HashingWriter,
    VerifiedReader,
    digest_bytes,
    read_document,
    write_document,
)
from .local import LocalStore
from .opening import StorePlace, open_store
from .probe import check_conditional_writes
from .reach import Reach, check_present, read_reach
from .remote import FsspecStore
from .replaced import LocalReplaced, RemoteReplaced, open_replaced
from .retries import failure_kind
from .session import FileSession, FolderSession, SessionStore

__all__ = [
    "AHEAD_BYTES",
    "DEFAULT_CACHE_BYTES",
    "MAX_DOCUMENT_BYTES",
    "CachedStore",
    "ChunkCache",
    "FileSession",
    "FolderSession",
    "FsspecStore",
    "HashingWriter",
    "LocalReplaced",
    "LocalStore",
    "Reach",
    "ReadAhead",
    "RemoteReplaced",
    "SessionStore",
    "Store",
    "StorePlace",
    "StoredFile",
    "VerifiedReader",
    "check_conditional_writes",
    "check_present",
    "digest_bytes",
    "failure_kind",
    "is_remote",
    "open_cache",
    "open_replaced",
    "open_store",
    "read_document",
    "read_reach",
    "reading_ahead",
    "storage_errors",
    "write_document",
]
