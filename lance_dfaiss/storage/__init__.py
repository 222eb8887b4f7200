"""Reading, writing, listing and deleting the files of an index, with digests.

A `Store` is a flat space of names below one root. There are three: `LocalStore` for the local file
system, `SessionStore` for whatever the dataset itself lies on (through the dataset's own
credentials), `FsspecStore` for any other URL. On top of any store, `HashingWriter` counts and
digests a file while it is written, and `VerifiedReader` hands out no byte that was not checked.

Files are written once under a name that is never used again, become visible only when complete, and
are never overwritten. ``lance_dfaiss.testing.stores`` holds the contract as a test suite.
"""

from __future__ import annotations

from .base import Store, StoredFile, storage_errors
from .digests import (
    MAX_DOCUMENT_BYTES,
    HashingWriter,
    VerifiedReader,
    digest_bytes,
    read_document,
    write_document,
)
from .local import LocalStore
from .opening import open_store
from .reach import Reach, check_present, read_reach
from .remote import FsspecStore
from .session import FileSession, FolderSession, SessionStore

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "FileSession",
    "FolderSession",
    "FsspecStore",
    "HashingWriter",
    "LocalStore",
    "Reach",
    "SessionStore",
    "Store",
    "StoredFile",
    "VerifiedReader",
    "check_present",
    "digest_bytes",
    "open_store",
    "read_document",
    "read_reach",
    "storage_errors",
    "write_document",
]
