"""Curves of a run as one picture of small panels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

Curve = tuple[str, Seq[float], Seq[float]]
"""(label, steps, values). A value that is NaN is a gap."""

_COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#64748b")
_INK, _FAINT, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_LEGEND = 66
"""A line of a legend has 66 letters, of which a curve's mark takes 6."""
_SMOOTH_FROM = 40
"""Curves of at least 40 points are drawn faintly, under their running mean."""


def plot_curves(path: Path, panels: Mapping[str, Seq[Curve]], title: str) -> None:
    """Writes a PNG with one panel an entry, titled by its key (name a unit there: ``"Length (tokens)"``).

    Long curves are shown with their running mean over a twentieth of their points. Raises ValueError where there is
    nothing to draw.
    """
    if not panels:
        raise ValueError("no panels to draw")
    # Imported here: it takes longer than the rest of the package together, and few commands draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    width, height = 4.4 * columns, 2.9 * rows + 0.5
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    # Margins in inches: to measure them (matplotlib's own layouts do) takes as long as to draw.
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - 0.85 / height, wspace=0.2, hspace=0.35
    )
    figure.suptitle(
        title, x=0.15 / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=13, fontweight="bold", color=_INK
    )
    for place, (name, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        _style(axes, name)
        for i, (label, steps, values) in enumerate(curves):
            _draw(axes, steps, values, label, _COLORS[i % len(_COLORS)])
        if place + columns >= len(panels):
            axes.set_xlabel("step", fontsize=9, color=_FAINT)
        if len(curves) > 1:
            _explain(axes, [label for label, *_ in curves])
    with warnings.catch_warnings():
        # A run may be named in a script that matplotlib's font has no letters of; the picture has boxes for them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, format="png")


def running_mean(values: Seq[float], window: int) -> list[float]:
    """Mean over the ``window`` values around each one, fewer at the ends; NaNs do not count."""
    means = []
    for i in range(len(values)):
        around = values[max(0, i - window // 2) : i + window // 2 + 1]
        finite = [value for value in around if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _draw(axes: Any, steps: Seq[float], values: Seq[float], label: str, color: str) -> None:
    if len(values) < _SMOOTH_FROM:
        markers = {"marker": "o", "markersize": 3.5} if len(values) <= 20 else {}
        axes.plot(steps, values, color=color, linewidth=1.8, label=label, **markers)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.28)
    axes.plot(steps, running_mean(values, len(values) // 20), color=color, linewidth=1.9, label=label)


def _explain(axes: Any, labels: Seq[str]) -> None:
    """A legend above the curves, for which the axis is made longer."""
    columns = max(1, min(len(labels), _LEGEND // (max(map(len, labels)) + 6)))
    bottom, top = axes.get_ylim()
    share = 0.03 + 0.075 * math.ceil(len(labels) / columns)
    axes.set_ylim(bottom, bottom + (top - bottom) / (1 - share))
    axes.legend(
        loc="upper left", ncols=columns, fontsize=8, frameon=False, labelcolor=_INK, handlelength=1.4,
        borderpad=0, borderaxespad=0, columnspacing=1.4,
    )  # fmt: skip


def _style(axes: Any, name: str) -> None:
    axes.set_title(name, loc="left", fontsize=10, color=_INK, pad=7)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT, length=0)
    axes.margins(x=0.02, y=0.12)
    axes.locator_params(axis="x", integer=True)
    axes.locator_params(axis="y", nbins=5)
