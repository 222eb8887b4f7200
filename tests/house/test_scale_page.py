"""The page on distributed builds shows what the simulator says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import main

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "distributed-builds.md"


def test_the_table_is_what_the_simulator_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    _, between, _ = (
        PAGE.read_text(encoding="utf-8")
        .replace("<!-- scale:end -->", "<!-- scale:begin -->")
        .split("<!-- scale:begin -->")
    )
    assert between.strip() == capsys.readouterr().out.strip(), "paste what `python -m benchmarks.scale` prints"
