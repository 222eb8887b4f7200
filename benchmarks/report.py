"""Rows of the table, the JSON file of all numbers, and the page of the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Curve", "Outcome", "Row", "compared", "load_runs", "markdown_table", "save_run", "write_page"]

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
_PLOT = "![Recall against queries per second]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    what, ours, peer, aim : str
        As shown.
    ratio : float or None
        Ours over the peer's, or the difference where the aim is one.
    met : bool or None
        Whether the aim was met; None where there is none.
    data : mapping
        The numbers behind, for the JSON file.
    """

    what: str
    ours: str
    peer: str
    ratio: float | None
    aim: str
    met: bool | None
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Recall against queries per second of one system, one point a search width.

    Parameters
    ----------
    corpus, system : str
        Data, and who searched it.
    points : tuple of (int, float, float)
        nprobe, recall@10, queries per second.
    """

    corpus: str
    system: str
    points: tuple[tuple[int, float, float], ...]


@dataclass(slots=True)
class Outcome:
    """What one benchmark found."""

    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, other: Outcome) -> None:
        """Append what another found."""
        self.rows += other.rows
        self.curves += other.curves
        self.notes += other.notes


def compared(
    what: str,
    ours: float,
    peer: float,
    *,
    unit: str,
    peer_name: str,
    ratio: float | None = None,
    at_most: float | None = None,
    at_least: float | None = None,
    data: Mapping[str, object] | None = None,
) -> Row:
    """Make a row of two numbers of one unit, judged by ours over the peer's.

    Parameters
    ----------
    what : str
        What was measured.
    ours, peer : float
        The numbers.
    unit : str
        ``"s"``, ``"ms"``, ``"us"``, ``"QPS"``, ``"MB"`` or ``"MB/s"``.
    peer_name : str
        Whose the second is.
    ratio : float, optional
        Median of paired ratios; ours over the peer's by default.
    at_most, at_least : float, optional
        The aim; none for a number that is only reported.
    data : mapping, optional
        More numbers for the JSON file.
    """
    found = ours / peer if ratio is None else ratio
    aim, met = "-", None
    if at_most is not None:
        aim, met = f"≤ {at_most:g} x", found <= at_most
    elif at_least is not None:
        aim, met = f"≥ {at_least:g} x", found >= at_least
    return Row(
        what=what,
        ours=_shown(ours, unit),
        peer=f"{_shown(peer, unit)} ({peer_name})",
        ratio=found,
        aim=aim,
        met=met,
        data={"ours": ours, "peer": peer, "unit": unit, **(data or {})},
    )


def markdown_table(rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| what | ours | peer | ratio | aim | met |", "|---|---:|---:|---:|---:|---|"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}" if abs(row.ratio) >= 0.1 else f"{row.ratio:.4f}"
        met = "-" if row.met is None else "yes" if row.met else "**no**"
        lines.append(f"| {row.what} | {row.ours} | {row.peer} | {ratio} | {row.aim} | {met} |")
    return "\n".join(lines)


def save_run(path: Path, name: str, outcome: Outcome, about: Mapping[str, object]) -> None:
    """Enter one benchmark's outcome into the results file; what other benchmarks found stays."""
    runs = load_runs(path)
    runs[name] = {**about, **asdict(outcome)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def load_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the results file holds, by benchmark; nothing if there is none."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_page(page: Path, runs: Mapping[str, Mapping[str, Any]], *, picture: str | None) -> None:
    """Put tables of some runs between the markers of a page; those of other benchmarks stay.

    Parameters
    ----------
    page : Path
        A page with both markers, in order.
    runs : mapping
        As `load_runs` returns them.
    picture : str or None
        Address of the plot as seen from the page.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} needs the markers {BEGIN} and {END}, in this order")
    old, _, plot = old.partition(_PLOT)
    sections = {text.partition("\n")[0]: f"### {text.strip()}" for text in old.split("### ")[1:]}
    for name, run in runs.items():
        if run["rows"]:
            sections[name] = "\n\n".join(_section(name, run))
    parts = list(sections.values())
    if picture is not None or plot:
        parts.append(f"{_PLOT}{plot.strip()}" if picture is None else f"{_PLOT}({picture})")
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}", encoding="utf-8")


def _section(name: str, run: Mapping[str, Any]) -> Sequence[str]:
    on = run["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in on["versions"].items())
    size = "Quick run on tiny data: shows the form, says nothing about speed. " if run["quick"] else ""
    facts = (
        f"{size}{on['date'][:10]}, {on['cpu']}, {on['cores']} cores, {on['memory_bytes'] / 2**30:.0f} GiB,"
        f" {versions}; load average before: {on['load_average_before']}."
    )
    table = markdown_table(Row(**row) for row in run["rows"])
    notes = "\n".join(f"- {note}" for note in run["notes"])
    return [part for part in (f"### {name}", facts, table, notes) if part]


def _shown(value: float, unit: str) -> str:
    if unit in ("QPS", "MB", "MB/s") and value >= 10:
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}"
