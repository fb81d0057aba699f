"""The picture of a run: how the loss fell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def loss_curve(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """Training loss over optimizer steps as a PNG."""
    figure, axes = _figure()
    axes.plot(steps, losses, color="#3b6ea5", linewidth=1, marker="." if len(steps) < 40 else None)
    axes.set(xlabel="optimizer step", ylabel="loss per learned token", title="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _figure():  # noqa: ANN202 - matplotlib classes, imported only when a picture is drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
