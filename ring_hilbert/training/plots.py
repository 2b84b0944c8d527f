# SPDX-License-Identifier: Apache-2.0
"""The plots of a run: loss over steps, and loss over the position in the sequence."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ring_hilbert.training.evaluate import Evaluation

LOSS_LABEL = "loss (nats per token)"


def plot_loss(metrics: list[dict[str, Any]], unigram_loss: float | None, path: Path) -> None:
    """Training and held-out loss over steps, from the lines of a metrics file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=LOSS_LABEL)
    for kind, label, style in (("train", "training", "-"), ("eval", "held out", "o-")):
        lines = [line for line in metrics if line["kind"] == kind]
        if lines:
            losses = np.array([line["loss"] for line in lines], dtype=float)  # null is NaN: a gap
            axes.plot([line["step"] for line in lines], losses, style, label=label)
    if unigram_loss is not None:
        axes.axhline(unigram_loss, color="gray", linestyle="--", label="unigram model, held out")
    axes.legend()
    FigureCanvasAgg(figure).print_figure(path, dpi=120)


def plot_loss_by_position(evaluation: Evaluation, path: Path, bins: int = 48) -> None:
    """Held-out loss over the number of tokens before the predicted one (log axis): it falls where more context helps."""
    losses = evaluation.position_loss.numpy()
    edges = np.unique(np.geomspace(1, len(losses) + 1, bins + 1).astype(int))
    position = np.arange(1, len(losses) + 1)  # tokens up to and including row i, the context of its target
    centers, means = [], []
    for low, high in itertools.pairwise(edges):
        inside = losses[(position >= low) & (position < high)]
        if not np.isnan(inside).all():
            centers.append(np.sqrt(low * (high - 1)))
            means.append(np.nanmean(inside))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="position in the sequence (tokens)", ylabel=LOSS_LABEL, xscale="log")
    axes.plot(centers, means, "o-")
    axes.set_title("held-out loss by position")
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
