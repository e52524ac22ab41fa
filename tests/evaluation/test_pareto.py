from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fomoe.errors import ConfigError
from fomoe.evaluation.pareto import (
    Measured,
    ParetoPoint,
    ReadBytes,
    from_json,
    front,
    read_points,
    to_json,
)
from fomoe.evaluation.plot import save_pareto


def point(name: str, read: float, excess: float, series: str = "car") -> ParetoPoint:
    return ParetoPoint(
        name=name,
        series=series,
        read=ReadBytes(demand=read * 0.75, background=read * 0.25),
        excess=Measured(mean=excess, low=excess - 0.01, high=excess + 0.02),
    )


POINTS = [
    point("exact", 2.0e9, 0.0, "exact"),
    point("0.60", 0.6e9, 0.02),
    point("0.35", 0.2e9, 0.2),
    point("0.05", 0.6e9, 0.01, "price"),
    point("Q3_K_M", 1.5e9, 0.05, "smaller quant, exact"),
]


def test_the_front_is_what_nothing_else_beats() -> None:
    assert front(POINTS) == [True, False, True, True, False]
    assert front([point("a", 1, 1), point("b", 1, 1), point("c", 1, 2)]) == [True, True, False]


def test_points_survive_their_file(tmp_path: Path) -> None:
    rich = ParetoPoint(
        name="price=0.05",
        series="price",
        read=ReadBytes(demand=1.0, background=2.0, prefetch=4.0),
        excess=Measured(mean=0.1, low=0.0, high=0.3),
        kl=Measured(mean=0.01, low=0.01, high=0.01),
        top1=0.97,
        documents=32,
        tokens=2048,
        notes={"text": "wiki"},
    )
    text = to_json([*POINTS, rich])
    assert from_json(text) == [*POINTS, rich]
    last = json.loads(text)["points"][-1]
    assert (last["bytes_per_token"], last["on_front"]) == (7.0, True)
    file = tmp_path / "points.json"
    file.write_text(text)
    assert read_points(file) == [*POINTS, rich]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", to_json(POINTS).replace('"version": 1', '"version": 2'),
     to_json(POINTS).replace('"series"', '"serie"')],
)  # fmt: skip
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"points\.json: "):
        read_points(file)


def test_an_interval_holds_its_mean() -> None:
    with pytest.raises(ConfigError, match="does not hold"):
        Measured(mean=1.0, low=2.0, high=3.0)


def test_the_plot_is_written_twice_and_names_every_point(tmp_path: Path) -> None:
    png, svg = save_pareto(POINTS, tmp_path / "a.b", title="title")
    assert png.name == "a.b.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    comments = {
        (each.text or "").strip()
        for each in ET.parse(svg, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))).iter()
    }
    for name in [*(p.name for p in POINTS), "title", "car", "smaller quant, exact"]:
        assert name in comments
    assert "bytes read per decoded token, all causes (GB)" in comments
    again = save_pareto(POINTS, tmp_path / "again", title="title")[1]
    assert again.read_bytes() == svg.read_bytes()


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"fomoe\[eval\]"):
        save_pareto(POINTS, tmp_path / "a")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no point"):
        save_pareto([], tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_pareto(POINTS, tmp_path / "missing" / "a")
