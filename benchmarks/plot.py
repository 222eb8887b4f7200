"""Recall against queries per second, as a picture."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["can_plot", "draw"]

_STYLES = {"ours": ("#c2410c", "o", 2.2), "raw FAISS": ("#1d4ed8", "x", 1.4)}
_NATIVE_COLORS = ("#6b7280", "#9ca3af", "#4d7c0f", "#a16207", "#7e22ce", "#0f766e")


def can_plot() -> bool:
    """Return whether matplotlib is installed: it comes with the ``bench`` extra only."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(curves: Sequence[Mapping[str, Any]], path: Path, *, title: str | None) -> None:
    """Write an SVG with one panel per data set.

    Parameters
    ----------
    curves : sequence of mapping
        ``corpus``, ``system`` and ``points`` (nprobe, recall, queries per second) of each, as in the results file.
    path : Path
        File to write.
    title : str or None
        Above all panels.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    corpora = list(dict.fromkeys(curve["corpus"] for curve in curves))
    # The same numbers give the same file: no random ids, no date.
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}):
        figure = figures.Figure(figsize=(5.2 * len(corpora), 5.0), layout="constrained", facecolor="white")
        for axes, corpus in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora, strict=True):
            _panel(axes, corpus, [curve for curve in curves if curve["corpus"] == corpus])
        if title is not None:
            figure.suptitle(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, corpus: str, curves: Sequence[Mapping[str, Any]]) -> None:
    colors = iter(_NATIVE_COLORS * 4)
    for curve in curves:
        color, marker, width = _STYLES.get(curve["system"]) or (next(colors), ".", 1.2)
        recalls = [point[1] for point in curve["points"]]
        speeds = [point[2] for point in curve["points"]]
        axes.plot(recalls, speeds, marker=marker, color=color, linewidth=width, markersize=5, label=curve["system"])
    axes.set_title(corpus)
    axes.set_yscale("log")
    axes.set_xlabel("recall@10")
    axes.set_ylabel("queries per second")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
