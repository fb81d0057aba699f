"""The two pictures of a run: how long the samples are, and how the loss fell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def length_histogram(lengths: Sequence[int], path: Path) -> None:
    """Tokens per document as a PNG."""
    figure, axes = _figure()
    axes.hist(lengths, bins=min(60, max(5, len(set(lengths)))), color="#3b6ea5")
    axes.set(xlabel="tokens in a document", ylabel="documents", title=f"{len(lengths)} documents, {sum(lengths)} tokens")
    figure.savefig(path, dpi=120)


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
