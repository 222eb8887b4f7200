"""The seven kinds of stored documents, to bytes and back."""

from __future__ import annotations

from typing import TypeAlias

from .build_plan import BuildPlan
from .codec import read_document, write_document
from .lease import LeaseDocument
from .manifest import Manifest
from .pointer import Pointer
from .records import ModelRecord, ShardRecord
from .report import BuildReport

__all__ = [
    "Document",
    "decode_lease",
    "decode_manifest",
    "decode_model_record",
    "decode_plan",
    "decode_pointer",
    "decode_report",
    "decode_shard_record",
    "encode",
]

Document: TypeAlias = Manifest | ShardRecord | ModelRecord | BuildPlan | Pointer | LeaseDocument | BuildReport


def encode(document: Document) -> bytes:
    """Return the bytes of a document: canonical JSON in UTF-8, ending in a newline.

    Parameters
    ----------
    document : Manifest, ShardRecord, ModelRecord, BuildPlan, Pointer, LeaseDocument or BuildReport
        It is validated as it would be on reading.

    Raises
    ------
    ManifestInvalid
        Listing what is wrong with it.
    UnsupportedFormat
        If it asks for a later reader than this version.
    """
    return write_document(document.to_json(), parse=type(document).from_json)


def decode_manifest(data: bytes, *, location: str) -> Manifest:
    """Return the manifest that the bytes hold; ``location`` names them in messages.

    Raises
    ------
    UnsupportedFormat
        If it was written by a later format, or for a later reader.
    ManifestInvalid
        Listing every problem with its JSON path.
    """
    return read_document(data, parse=Manifest.from_json, location=location)


def decode_shard_record(data: bytes, *, location: str) -> ShardRecord:
    """Return the shard record that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=ShardRecord.from_json, location=location)


def decode_model_record(data: bytes, *, location: str) -> ModelRecord:
    """Return the model record that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=ModelRecord.from_json, location=location)


def decode_plan(data: bytes, *, location: str) -> BuildPlan:
    """Return the build plan that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=BuildPlan.from_json, location=location)


def decode_pointer(data: bytes, *, location: str) -> Pointer:
    """Return the pointer that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=Pointer.from_json, location=location)


def decode_lease(data: bytes, *, location: str) -> LeaseDocument:
    """Return the lease that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=LeaseDocument.from_json, location=location)


def decode_report(data: bytes, *, location: str) -> BuildReport:
    """Return the build report that the bytes hold; raises as `decode_manifest`."""
    return read_document(data, parse=BuildReport.from_json, location=location)
