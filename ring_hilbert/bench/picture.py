# SPDX-License-Identifier: Apache-2.0
"""Plots of a pattern: which keys a row sees, how the order lays out segments, and which ranks need which rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import ring_hilbert as rh
from ring_hilbert.bench import coverage
from ring_hilbert.parallel.layout import Layout

mpl.use("Agg")
import matplotlib.pyplot as plt

SUFFIXES = (".png", ".svg")
DENSE_LIMIT = 2048  # rows: masks are [Hkv, S, S]
SHARDS_LIMIT = 1 << 16  # rows: [P, S] and a plan


@dataclass(frozen=True)
class Subject:
    """The subject of a plot.

    Args:
        layers: a pattern per layer; plots of one layer show the first.
        order: the token order.
        length: rows of the sequence.
        world: ranks.
        causal: mask later keys.
        kv_heads: Hkv; None: the largest dilation rate, so that every residue has a head.
        head: the kv head whose mask is drawn.
    """

    layers: tuple[rh.DilatedPattern, ...]
    order: rh.TokenOrder
    length: int
    world: int = 4
    causal: bool = True
    kv_heads: int | None = None
    head: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.world < 1 or self.heads < 1:
            raise ValueError(f"length={self.length}, ranks={self.world}, kv heads={self.heads} must be at least 1")
        if not 0 <= self.head < self.heads:
            raise ValueError(f"head={self.head} must be one of the kv heads 0 to {self.heads - 1}")

    @property
    def pattern(self) -> rh.DilatedPattern:
        """The first layer's pattern."""
        return self.layers[0]

    @property
    def heads(self) -> int:
        """Number of kv heads."""
        return max(r for p in self.layers for r in p.dilation_rates) if self.kv_heads is None else self.kv_heads

    def plan(self, order: rh.TokenOrder | None) -> rh.Plan:
        """The plan of the first layer, over even shards of rows in `order`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # blocks that do not fit the segments: the plot shows it
            return rh.plan(
                self.pattern, self.length, self.world, num_heads=self.heads, head_dim=1, dtype=torch.float32,
                causal=self.causal, order=order,
            )  # fmt: skip


# ---- panels


def draw_mask(axes: Any, subject: Subject, order: rh.TokenOrder | None = None, rows: bool = True) -> None:
    """How often each key (across) counts for each query (down) of one kv head.

    Args:
        axes: to draw on.
        subject: to draw.
        order: of the rows; decides which are later. None: rows are tokens.
        rows: in row coordinates, with the shard boundaries; otherwise in natural token coordinates.
    """
    length = subject.length
    count = coverage.multiplicity(subject.pattern, length, subject.heads, order=order, causal=subject.causal)
    count = count[subject.head]
    if rows and order is not None:
        token = order.permutation(length).numpy()
        count = count[token][:, token]
    axes.imshow(count, cmap="viridis", interpolation="nearest")
    for rank in range(1, subject.world if rows else 0):
        border = int(Layout.even(length, subject.world).cuts[rank]) - 0.5
        axes.axhline(border, color="white", linewidth=0.8)
        axes.axvline(border, color="white", linewidth=0.8)
    kind = "row" if rows else "token"
    axes.set(title="pattern: keys of a row, by how often they count", xlabel=f"key {kind}", ylabel=f"query {kind}")


def cells(order: rh.TokenOrder, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and line of `tokens` on the grid of a 2-D order, or on a square of the grids of its runs of `block` tokens.

    Raises:
        ValueError: for a grid of three sides.
    """
    if order.grid is not None:
        if len(order.grid) != 2:
            raise ValueError(f"grid={order.grid} cannot be drawn; give a grid of two sides, (H, W)")
        return tokens % order.grid[1], tokens // order.grid[1]
    assert order.block is not None, "an order has a block or a grid"
    height = math.isqrt(order.block)
    width = -(-order.block // height)
    run, within = tokens // order.block, tokens % order.block
    across = math.isqrt(int(run.max())) + 1
    return within % width + run % across * (width + 1), within // width + run // across * (height + 1)


def draw_order(axes: Any, subject: Subject) -> None:
    """The curve over one block, coloured by the segments of the first branch; dots are rows kept by the last branch."""
    pattern, order, length = subject.pattern, subject.order, subject.length
    block = length if order.block is None else min(order.block, length)
    x, y = cells(order, order.permutation(length, 0, block).numpy())
    segment = pattern.segment_lengths[0] or block
    for start in range(0, block, segment):
        axes.plot(x[start : start + segment], y[start : start + segment], linewidth=2)
    kept = np.arange(0, block, pattern.dilation_rates[-1])
    axes.scatter(x[kept], y[kept], color="black", s=12, zorder=3)
    axes.set(title=f"order: {order.curve} over {block} tokens", aspect="equal")
    axes.set(xlabel=f"colour: segment of {segment}; dots: dilation {pattern.dilation_rates[-1]}", xticks=[], yticks=[])
    axes.invert_yaxis()


def draw_exchange(axes: Any, subject: Subject, order: rh.TokenOrder | None = None) -> None:
    """The share of its rows that each rank (down) reads from each other rank (across), over all kv heads."""
    plan = subject.plan(order)
    owner, needed = coverage.owners(plan), coverage.needed(plan)
    world = range(subject.world)
    share = np.array([[needed[reader, owner == other].sum() for other in world] for reader in world])
    share = share / np.maximum([np.count_nonzero(owner == other) for other in world], 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=max(share.max(), 1e-9))
    for reader, other in np.ndindex(share.shape):
        if reader != other:
            colour = "white" if share[reader, other] > 0.6 * share.max() else "black"
            axes.text(other, reader, f"{share[reader, other]:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(title="exchange: rows read from other ranks", xlabel="owner", ylabel="reader")
    axes.set(xticks=world, yticks=world)


def draw_reach(axes: Any, reached: np.ndarray, title: str) -> None:
    """Which source tokens (across) each token (down) reaches."""
    axes.imshow(reached, cmap="Greys", interpolation="nearest", vmin=0, vmax=1.4)
    axes.set(title=title, xlabel="source token", ylabel="token")


def draw_owners(axes: Any, subject: Subject, owner: np.ndarray) -> None:
    """The tokens on the grid of the order, coloured by the rank that owns them."""
    x, y = cells(subject.order, subject.order.permutation(subject.length).numpy())
    picture = np.full((y.max() + 1, x.max() + 1), np.nan)
    picture[y, x] = owner
    axes.imshow(picture, cmap=_colours(subject.world), vmin=-0.5, vmax=subject.world - 0.5, interpolation="nearest")
    axes.set(title="tokens on the curve's grid, by owner", xticks=[], yticks=[])


def draw_needed(axes: Any, subject: Subject, owner: np.ndarray, needed: np.ndarray) -> None:
    """A line per rank: its own rows in its colour, the rows it reads in grey, darker for more kv heads."""
    world = subject.world
    extent = (-0.5, subject.length - 0.5, world - 0.5, -0.5)
    axes.imshow(needed, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    own = np.where(owner == np.arange(world)[:, None], owner, np.nan)
    axes.imshow(
        own, cmap=_colours(world), vmin=-0.5, vmax=world - 0.5, aspect="auto", interpolation="nearest", extent=extent
    )
    axes.set(title="rows a rank owns (colour) and reads (grey)", xlabel="row", ylabel="rank", yticks=range(world))


def _colours(world: int) -> Any:
    return mpl.colormaps["turbo"].resampled(max(world, 2))


# ---- pictures


def overview(subject: Subject) -> Any:
    """Mask, order and exchange side by side, with rows as given."""
    figure, panels = figure_of(3)
    draw_mask(panels[0], subject)
    draw_order(panels[1], subject)
    draw_exchange(panels[2], subject)
    return figure


def mask(subject: Subject) -> Any:
    """The mask in rows and in natural tokens; in raster order these coincide and one is drawn."""
    natural = subject.order.curve == "raster"
    figure, panels = figure_of(1 if natural else 2)
    draw_mask(panels[0], subject, None if natural else subject.order)
    panels[0].set(title=f"kv head {subject.head}, rows in {subject.order.curve} order")
    if not natural:
        draw_mask(panels[1], subject, subject.order, rows=False)
        panels[1].set(title=f"kv head {subject.head}, natural tokens")
    return figure


def order(subject: Subject) -> Any:
    """The curve alone."""
    figure, panels = figure_of(1)
    draw_order(panels[0], subject)
    return figure


def coverage_picture(subject: Subject) -> Any:
    """The reach of one layer and of two, and the share of the possible tokens that each token reaches."""
    first, second = subject.layers[0], subject.layers[-1]
    figure, panels = figure_of(3)
    facts: dict[str, Any] = {"order": subject.order, "causal": subject.causal}
    possible = coverage.possible(subject.length, subject.causal)
    for axes, layers in zip(panels, ([first], [first, second]), strict=False):
        reached = coverage.reach(layers, subject.length, subject.heads, **facts)
        name = "one layer" if len(layers) == 1 else "two layers"
        share = reached.sum(1) / possible
        draw_reach(axes, reached, f"{name}: {share.mean():.1%} of what is visible")
        panels[2].plot(share, label=name, linewidth=1)
    panels[2].set(title="share of the visible tokens reached", xlabel="token", ylim=(0, 1.02))
    panels[2].legend()
    return figure


def shards(subject: Subject) -> Any:
    """Which rank owns which tokens, and which and how many rows of others each rank reads."""
    plan = subject.plan(subject.order)
    owner, needed = coverage.owners(plan), coverage.needed(plan)
    figure, panels = figure_of(3)
    draw_owners(panels[0], subject, owner)
    draw_needed(panels[1], subject, owner, needed)
    draw_exchange(panels[2], subject, subject.order)
    return figure


PICTURES = {"overview": overview, "mask": mask, "order": order, "coverage": coverage_picture, "shards": shards}
LIMITS = {"overview": DENSE_LIMIT, "mask": DENSE_LIMIT, "coverage": DENSE_LIMIT, "shards": SHARDS_LIMIT}


def draw(path: Path, subject: Subject, what: str = "overview") -> None:
    """Draw one of `PICTURES`, as PNG or SVG by the suffix of `path`.

    Raises:
        ValueError: for another suffix, an unknown picture, or more rows than it can show.
    """
    check_path(path)
    if what not in PICTURES:
        raise ValueError(f"picture {what!r} is unknown; use one of {', '.join(PICTURES)}")
    if subject.length > LIMITS.get(what, subject.length):
        raise ValueError(f"{what} of {subject.length} rows is too large to draw; the limit is {LIMITS[what]}")
    figure = PICTURES[what](subject)
    branches = ", ".join(f"({'all' if w is None else w}, {r})" for w, r in subject.pattern.branches)
    figure.suptitle(
        f"branches (segment length, dilation rate): {branches};  {subject.length} rows on {subject.world} ranks"
    )
    save(figure, path)


def check_path(path: Path) -> None:
    """Raise ValueError unless the suffix of `path` is that of a supported image format."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")


def figure_of(panels: int, height: float = 4.6) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side."""
    figure, axes = plt.subplots(1, panels, figsize=(14 * panels / 3, height), constrained_layout=True, squeeze=False)
    return figure, axes[0]


def save(figure: Any, path: Path) -> None:
    """Write and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
