"""A lease: the word of a living builder that it still works on a generation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, TypedDict

from lance_dfaiss.types import FORMAT_VERSION

from .validation import Fields, Place, constant, instant, positive, unique_id, uri

__all__ = ["LeaseDocument", "LeaseDocumentJSON"]


class LeaseDocumentJSON(TypedDict):
    """Stored form of a `LeaseDocument`."""

    format: int
    kind: str
    generation: str
    holder: str
    number: int
    root: str
    created_at: str
    expires_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDocument:
    """One term of a lease; the next one is a new document with the next number.

    Parameters
    ----------
    generation : str
        The generation whose files must stay.
    holder : str
        The builder; several may work on one generation, each with terms of its own.
    number : int
        Of the term, from 1.
    root : str
        URI of the dataset root that is built for.
    created_at, expires_at : str
        The term, ISO 8601 with its offset from UTC, by the holder's clock. Of the same time: given back.
    """

    kind: ClassVar[str] = "lease"

    generation: str
    holder: str
    number: int
    root: str
    created_at: str
    expires_at: str

    @property
    def begins(self) -> datetime:
        """``created_at`` as a time."""
        return as_time(self.created_at)

    @property
    def ends(self) -> datetime:
        """``expires_at`` as a time."""
        return as_time(self.expires_at)

    @property
    def given_back(self) -> bool:
        """Whether the holder itself has ended it."""
        return self.begins == self.ends

    def to_json(self) -> LeaseDocumentJSON:
        """Return the stored form."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "generation": self.generation,
            "holder": self.holder,
            "number": self.number,
            "root": self.root,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
        }

    @classmethod
    def from_json(cls, value: object, place: Place) -> LeaseDocument:
        """Parse the stored form, reporting problems to the place."""
        fields = Fields(value, place, shape=LeaseDocumentJSON)
        fields.get("format", constant(FORMAT_VERSION))
        fields.get("kind", constant(cls.kind))
        lease = cls(
            generation=fields.get("generation", unique_id),
            holder=fields.get("holder", unique_id),
            number=fields.get("number", positive),
            root=fields.get("root", uri),
            created_at=fields.get("created_at", instant),
            expires_at=fields.get("expires_at", instant),
        )
        if fields.clean:
            lease._check(place)
        return lease

    def _check(self, place: Place) -> None:
        times = {}
        for key, value in (("created_at", self.created_at), ("expires_at", self.expires_at)):
            try:
                times[key] = as_time(value)
            except ValueError:  # digits in the right places, but no such day or hour
                place.at(key).expected("a day and time that exist", value)
        if len(times) == 2 and times["expires_at"] < times["created_at"]:
            place.at("expires_at").expected(f"no time before {self.created_at}", self.expires_at)


def as_time(text: str) -> datetime:
    """Return the time that a document writes as text.

    Raises
    ------
    ValueError
        If there is no such day or hour: the schema of documents checks the digits only.
    """
    # Python 3.10 reads neither "Z" nor a fraction of other than 3 or 6 digits.
    moment, fraction, offset = _split(text.replace("Z", "+00:00"))
    parsed = datetime.fromisoformat(moment + offset)
    return parsed.replace(microsecond=int(fraction.ljust(6, "0")[:6])) if fraction else parsed


def _split(text: str) -> tuple[str, str, str]:
    moment, offset = text[:-6], text[-6:]
    whole, _, fraction = moment.partition(".")
    return whole, fraction, offset
