"""The pointer: the small text in a dataset's metadata that says which generation is current."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from lance_dfaiss.types import FORMAT_VERSION

from .codec import read_document, write_document
from .files import Reference, ReferenceJSON
from .validation import Fields, Place, constant, optional, unique_id, uri

__all__ = ["Pointer", "PointerJSON"]


class PointerJSON(TypedDict):
    """Stored form of a `Pointer`."""

    format: int
    kind: str
    generation: str
    where: str
    root: str
    manifest: ReferenceJSON
    previous: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """Which generation of an index is current, and where it lies.

    Parameters
    ----------
    generation : str
        The current one.
    where : str
        ``"dataset"`` for the dataset's own folder, else the URI under which generations lie. It is
        well-formed text and no more: whether it may be followed is for the reader to decide.
    root : str
        URI of the dataset root that the pointer was committed to; another root means a copy.
    manifest : Reference
        The generation's manifest.
    previous : str or None
        Generation that was current before.
    """

    kind: ClassVar[str] = "pointer"

    generation: str
    where: str
    root: str
    manifest: Reference
    previous: str | None

    def to_text(self) -> str:
        """Return the text to be stored, one line.

        Raises
        ------
        ManifestInvalid
            If the pointer breaks its schema.
        """
        return write_document(self.to_json(), parse=Pointer.from_json).decode().rstrip("\n")

    @classmethod
    def from_text(cls, text: str, *, location: str) -> Pointer:
        """Return the pointer that a text holds.

        Parameters
        ----------
        text : str
            As stored.
        location : str
            Names the text in messages.

        Raises
        ------
        UnsupportedFormat
            If it is of a later format.
        ManifestInvalid
            If it is not JSON or breaks its schema.
        """
        # A lone surrogate cannot be UTF-8: let it through here, for the reader to refuse.
        return read_document(text.encode("utf-8", "surrogatepass"), parse=cls.from_json, location=location)

    def to_json(self) -> PointerJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "where": self.where,
            "root": self.root,
            "manifest": self.manifest.to_json(),
            "previous": self.previous,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> Pointer:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=PointerJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        pointer = cls(
            generation=fields.get("generation", unique_id),
            where=fields.get("where", uri),
            root=fields.get("root", uri),
            manifest=fields.get("manifest", Reference.from_json),
            previous=fields.get("previous", optional(unique_id)),
        )
        if fields.clean and pointer.previous == pointer.generation:
            place.at("previous").expected("another generation than this one", pointer.previous)
        return pointer
