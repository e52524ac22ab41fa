"""Draws Pareto points as PNG and SVG; needs matplotlib, the optional extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe.errors import ConfigError
from fomoe.evaluation.pareto import ParetoPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours of middle lightness: told apart by colour-blind eyes, and at least 2.8 : 1
# against a white page as against a dark one. The ground is transparent for the same reason.
_COLOURS = ("#0a7cc4", "#d55e00", "#00956c", "#c0609a", "#8a7a2d")
_MARKERS = ("o", "s", "^", "D", "v")
_INK = "#7a7f87"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "fomoe",  # the same points give the same file
}


def save_pareto(points: Sequence[ParetoPoint], stem: Path, *, title: str = "") -> list[Path]:
    """Draw excess NLL against bytes read per token into `stem`.png and `stem`.svg.

    Args:
        points: At least one; those of one series are joined in the order of their bytes.
        stem: Path without ending, in a directory that exists.
        title: Stands above; empty for none.

    Returns:
        The two files.

    Raises:
        ConfigError: matplotlib is missing, there is no point, or a file cannot be written.
    """
    if not points:
        raise ConfigError("there is no point to draw")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib: pip install 'fomoe[eval]'; results as JSON need nothing more"
        ) from None
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        _draw(figure, points, title)
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            try:
                figure.savefig(file, dpi=160, transparent=True, metadata=metadata)
            except OSError as error:
                raise ConfigError(f"the plot cannot be written: {error}") from None
    return files


def _draw(figure: Figure, points: Sequence[ParetoPoint], title: str) -> None:
    axes = figure.add_subplot()
    most = max(point.read.total for point in points)
    scale, unit = next(((s, u) for s, u in _UNITS if most >= s), _UNITS[-1])
    axes.set_xlim(left=0.0, right=1.12 * most / scale if most > 0 else 1.0)
    axes.axhline(0.0, color=_INK, linewidth=0.8, zorder=0)
    series = list(dict.fromkeys(point.series for point in points))
    for i, name in enumerate(series):
        own = sorted((p for p in points if p.series == name), key=lambda p: p.read.total)
        _series(axes, own, name, scale, i)
    axes.set_xlabel(f"bytes read per decoded token, all causes ({unit})")
    axes.set_ylabel("ΔNLL against exact (nats per token, 95 % interval)")
    axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=10.0)


def _series(
    axes: Axes, points: Sequence[ParetoPoint], name: str, scale: float, number: int
) -> None:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    rise = 5 if number % 2 == 0 else -11  # names of crossing series keep apart
    border = 0.75 * axes.get_xlim()[1]  # names of points beyond it stand to their left
    x = [point.read.total / scale for point in points]
    y = [point.excess.mean for point in points]
    below = [point.excess.mean - point.excess.low for point in points]
    above = [point.excess.high - point.excess.mean for point in points]
    axes.errorbar(
        x, y, yerr=[below, above], label=name, color=colour, marker=marker, markersize=4.5,
        linewidth=1.2, elinewidth=1.0, capsize=2.5,
    )  # fmt: skip
    for point, at_x, at_y in zip(points, x, y, strict=True):
        is_far = at_x > border
        axes.annotate(
            point.name, (at_x, at_y), xytext=(-6 if is_far else 6, rise), fontsize=7.5,
            textcoords="offset points", color=colour, ha="right" if is_far else "left",
        )  # fmt: skip
