# SPDX-License-Identifier: Apache-2.0
"""The records of `bench attention` as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

COLUMNS = {
    "rows": "length", "dtype": "dtype", "causal": "causal", "contender": "contender", "order": "order",
    "fwd ms": "forward_ms", "fwd+bwd ms": "forward_backward_ms", "min": "forward_backward_ms_min",
    "max": "forward_backward_ms_max", "MiB": "peak_mib", "MiB/least": "peak_vs_least", "eff fwd": "efficiency_forward",
    "eff fwd+bwd": "efficiency_forward_backward", "executed": "executed_share", "x longnet": "speed_vs_longnet",
    "t/raster": "time_vs_raster", "t/half rows": "time_vs_half_length",
}  # fmt: skip


def table(records: Sequence[Record]) -> str:
    """Aligned columns with a header; an empty figure is a dash."""
    lines = [list(COLUMNS), *([str(record[name]) or "-" for name in COLUMNS.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(path: Path, records: Sequence[Record]) -> None:
    """Time (forward + backward, least to most) and peak memory against length, both axes logarithmic.

    One colour per contender; causal lines are solid, others dashed.
    """
    from ring_hilbert.bench.picture import figure_of, save

    figure, panels = figure_of(2, height=4.8)
    lines: dict[tuple[str, str, bool], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["length"]):
        name = (
            f"{record['contender']} {record['order']}" if record["contender"] == "ring_hilbert" else record["contender"]
        )
        lines.setdefault((name, record["dtype"], record["causal"]), []).append(record)
    colours = {key: f"C{i}" for i, key in enumerate(dict.fromkeys(key[:2] for key in lines))}
    for (name, dtype, causal), points in lines.items():
        style = {
            "color": colours[name, dtype],
            "linestyle": "-" if causal else "--",
            "marker": "o",
            "markersize": 4,
            "label": f"{name}, {dtype}, {'causal' if causal else 'not causal'}",
        }
        length = [point["length"] for point in points]
        median, least, most = (
            [float(point[f"forward_backward_ms{suffix}"]) for point in points] for suffix in ("", "_min", "_max")
        )
        panels[0].plot(length, median, **style)
        panels[0].fill_between(length, least, most, color=style["color"], alpha=0.15, linewidth=0)
        panels[1].plot(length, [float(point["peak_mib"]) for point in points], **style)
    for axes, what in zip(panels, ("time, forward + backward (ms)", "peak memory (MiB)"), strict=True):
        axes.set(xlabel="rows", title=what)
        for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
            scale("log", base=2)
            axis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    save(figure, path)
