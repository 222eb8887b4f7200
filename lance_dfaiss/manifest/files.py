"""Files that a document names: where they lie, how long they are, and their digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypedDict

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.types import CHUNK_BYTES

from .validation import Fields, Place, each, matching, positive, sha256_hex

__all__ = ["FileEntry", "FileEntryJSON", "Reference", "ReferenceJSON", "root_digest"]

_SHA256: Final = re.compile(r"[0-9a-f]{64}")

# Names are made of ids and fixed words, so a short list of characters suffices, and whatever a file
# system, URL parser or object store might give a meaning to ("..", "~", "%2e", "::", "C:") is out.
_file_name: Final = matching(
    r"(?=.{1,512}\Z)[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*",
    "a relative file name of letters, digits, '.', '_', '-' and single '/', no part starting with '.'",
)


class FileEntryJSON(TypedDict):
    """Stored form of a `FileEntry`."""

    name: str
    length_bytes: int
    digest: str
    chunks: list[str]


class ReferenceJSON(TypedDict):
    """Stored form of a `Reference`."""

    name: str
    length_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of an index, with a digest for every chunk so that ranges can be verified.

    Parameters
    ----------
    name : str
        Relative to the folder that holds the generations, such as ``"<generation>/model.faiss"``.
    length_bytes : int
        At least 1.
    digest : str
        `root_digest` of the chunks.
    chunks : tuple of str
        sha256 of each `lance_dfaiss.types.CHUNK_BYTES` bytes, in hexadecimal; the last chunk may be shorter.
    """

    name: str
    length_bytes: int
    digest: str
    chunks: tuple[str, ...]

    def to_json(self) -> FileEntryJSON:
        """Return the stored form."""
        return {
            "name": self.name,
            "length_bytes": self.length_bytes,
            "digest": self.digest,
            "chunks": list(self.chunks),
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> FileEntry:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=FileEntryJSON)
        entry = cls(
            name=fields.get("name", _file_name),
            length_bytes=fields.get("length_bytes", positive),
            digest=fields.get("digest", sha256_hex),
            chunks=fields.get("chunks", each(sha256_hex)),
        )
        if fields.clean:
            entry._check(place)
        return entry

    def _check(self, place: Place) -> None:
        needed = -(-self.length_bytes // CHUNK_BYTES)
        if len(self.chunks) != needed:
            place.at("chunks").report(
                f"expected {needed} chunks for {self.length_bytes} bytes, found {len(self.chunks)}"
            )
        root = root_digest(self.chunks)
        if root != self.digest:
            place.at("digest").expected(f"{root}, the root of the chunks", self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A stored document that another one names.

    Parameters
    ----------
    name : str
        Relative to the folder that holds the generations.
    length_bytes : int
        At least 1.
    digest : str
        `root_digest` of its chunks, as for a `FileEntry`.
    """

    name: str
    length_bytes: int
    digest: str

    def to_json(self) -> ReferenceJSON:
        """Return the stored form."""
        return {"name": self.name, "length_bytes": self.length_bytes, "digest": self.digest}

    @classmethod
    def from_json(cls, value: object, place: Place) -> Reference:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=ReferenceJSON)
        return cls(
            name=fields.get("name", _file_name),
            length_bytes=fields.get("length_bytes", positive),
            digest=fields.get("digest", sha256_hex),
        )


def root_digest(chunks: Iterable[str]) -> str:
    """Return the digest of a file: sha256 over the raw digests of its chunks, in hexadecimal.

    Parameters
    ----------
    chunks : iterable of str
        sha256 of each chunk, 64 lower-case hexadecimal digits.

    Raises
    ------
    InvalidArgument
        If one of them is no such digest.
    """
    root = hashlib.sha256()
    for chunk in chunks:
        if not _SHA256.fullmatch(chunk):
            raise InvalidArgument(
                f"a chunk digest has 64 lower-case hexadecimal digits, not {chunk!r}", parameter="chunks", value=chunk
            )
        root.update(bytes.fromhex(chunk))
    return root.hexdigest()
