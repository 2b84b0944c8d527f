# SPDX-License-Identifier: Apache-2.0
"""Pictures of a pattern: which keys a row sees, how the order lays segments out, and who needs whose rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import ring_hilbert as rh
from ring_hilbert.parallel.layout import Layout

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw_mask(axes: Any, pattern: rh.DilatedPattern, length: int, world: int, causal: bool) -> None:
    """How often each key row (across) counts for each query row (down) of kv head 0, with the borders of the shards."""
    count = rh.reference.multiplicity(pattern, length, 1)[0]
    if causal:
        count = count.tril()
    axes.imshow(count.numpy(), cmap="viridis", interpolation="nearest")
    for rank in range(1, world):
        border = Layout.even(length, world).starts[rank] - 0.5
        axes.axhline(border, color="white", linewidth=0.8)
        axes.axvline(border, color="white", linewidth=0.8)
    axes.set(title="pattern: keys of a row, by how many branches", xlabel="key row", ylabel="query row")


def draw_order(axes: Any, pattern: rh.DilatedPattern, order: rh.TokenOrder, length: int) -> None:
    """The curve over one block, coloured by the segments of the first branch; dots are the rows that the last branch keeps."""
    block = length if order.block is None else min(order.block, length)
    height = int(np.sqrt(block))
    width = -(-block // height)
    tokens = order.permutation(length, 0, block).numpy()
    x, y = tokens % width, tokens // width
    segment = pattern.segment_lengths[0] or block
    for start in range(0, block, segment):
        axes.plot(x[start : start + segment], y[start : start + segment], linewidth=2)
    kept = np.arange(0, block, pattern.dilation_rates[-1])
    axes.scatter(x[kept], y[kept], color="black", s=12, zorder=3)
    axes.set(title=f"order: {order.curve} over {block} tokens", aspect="equal")
    axes.set(xlabel=f"colour: segment of {segment}; dots: dilation {pattern.dilation_rates[-1]}", xticks=[], yticks=[])
    axes.invert_yaxis()


def draw_exchange(axes: Any, pattern: rh.DilatedPattern, length: int, world: int, causal: bool) -> None:
    """The share of its rows that each rank (down) reads from each other rank (across), over all kv heads."""
    heads = max(pattern.dilation_rates)
    plan = rh.plan(pattern, length, world, num_heads=heads, head_dim=1, dtype=torch.float32, causal=causal)
    share = np.array(
        [
            [
                sum(block.size for block in plan.crossings.shipment(reader, owner))
                / (heads * plan.layout.lengths[owner])
                for owner in range(world)
            ]
            for reader in range(world)
        ]
    )
    axes.imshow(share, cmap="Blues", vmin=0, vmax=max(share.max(), 1e-9))
    for reader, owner in np.ndindex(share.shape):
        if reader != owner:
            axes.text(owner, reader, f"{share[reader, owner]:.0%}", ha="center", va="center", fontsize=8)
    axes.set(title="exchange: rows read from other ranks", xlabel="owner", ylabel="reader")
    axes.set(xticks=range(world), yticks=range(world))


def draw(path: Path, pattern: rh.DilatedPattern, order: rh.TokenOrder, length: int, world: int, causal: bool) -> None:
    """The three pictures side by side, as PNG or SVG by the ending of `path`.

    Args:
        path: where to write.
        pattern: the branches, in rows.
        order: the token order; with `block`, its first block is drawn.
        length: rows of the sequence, a few hundred at most.
        world: ranks.
        causal: hide later keys.
    """
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), constrained_layout=True)
    draw_mask(panels[0], pattern, length, world, causal)
    draw_order(panels[1], pattern, order, length)
    draw_exchange(panels[2], pattern, length, world, causal)
    branches = ", ".join(f"({'all' if w is None else w}, {r})" for w, r in pattern.branches)
    figure.suptitle(f"branches (segment length, dilation rate): {branches};  {length} rows on {world} ranks")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
