# SPDX-License-Identifier: Apache-2.0
"""Prov-GigaPath's slide encoder: torchscale's LongNet over the tiles of whole slides, with the same weight names.

    encoder = SlideEncoder(zero_keys=True, dropout=0.0, drop_path_rate=0.0)  # 12 layers of 768; True: torchscale's numbers
    encoder.load_weights("slide_encoder.pth")
    (slides,) = encoder(tiles, pixels)  # lists of [tiles of a slide, 1536] and [tiles of a slide, 2] -> [slides, 768]

Slides of any lengths form one batch: everything but the attention runs on the rows of all slides at once, and every slide
attends only to itself, so that segments restart in each. docs/torchscale.md lists the other differences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ring_hilbert.checkpointing import checkpoint_contexts
from ring_hilbert.integrations.longnet_layers import EPS, Layer, Slides
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.agreement import Group, resolve_group
from ring_hilbert.parallel.gathering import sum_over_ranks
from ring_hilbert.parallel.prepare import prepare_call
from ring_hilbert.parallel.wire import from_all

NORM_EPS = 1e-6  # of the last layer norm, Prov-GigaPath's own; torchscale's have 1e-5
SHOWN = 6  # keys named in an error


def segment_lengths_for(max_wsi_size: int = 262144, tile_size: int = 256) -> tuple[int, ...]:
    """Prov-GigaPath's five segment lengths for slides of at most `max_wsi_size` pixels a side, in tiles of `tile_size`.

    Powers of two with evenly spaced exponents, from 1024 to the largest one that the slide's tiles reach.
    """
    most = int(np.log2((max_wsi_size // tile_size) ** 2))
    return tuple(int(2**exponent) for exponent in np.linspace(10, most, 5))


class _Layers(nn.Module):
    """The layers and the norm after them, by torchscale's names."""

    def __init__(self, layers: Iterable[Layer], embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(embed_dim, eps=EPS)


class SlideEncoder(nn.Module):
    """Prov-GigaPath's slide encoder (doi 10.1038/s41586-024-07441-w) over torchscale's LongNet, exactly differentiated.

    State dicts of `LongNetViT` load by name. Published sizes: 12 layers of 768, 384 or 1536, 24 layers of 1024.

    Args:
        in_chans: size of a tile's embedding.
        embed_dim: size of a row, a multiple of 4 and of `num_heads`.
        depth: number of layers.
        zero_keys: whether torchscale's padding counts as keys (`DilatedPattern.zero_keys`): True for weights that were trained
            with it, False for a plain softmax. There is no default, because the weights do not show it.
        misplaced: on slides that are long enough, also place outputs where torchscale's code places them, which is no
            softmax (`longnet_layers.misplaced_attention`); to use published weights as they were used. On one device.
        num_heads: of the attention.
        segment_lengths: of the attention, in tiles; default `segment_lengths_for(max_wsi_size, tile_size)`.
        dilation_rates: one per segment length.
        max_wsi_size: side of the largest slide in pixels, as the weights were trained: 262144 pretrained, 250000 fine-tuned.
        tile_size: side of a tile in pixels.
        slide_ngrids: side of the largest slide in tiles, for validation.
        mlp_ratio: hidden size of the feed-forward part relative to `embed_dim`.
        dropout: on rows after the embedding, the attention and the feed-forward part.
        drop_path_rate: probability that a slide skips the last layer's branches in training; decreasing to 0 in the first layer.
        global_pool: a slide's embedding is the mean of its tiles instead of its class token.
        order: curve along which a slide's tiles are ordered before they are cut into segments (`TokenOrder.from_coordinates`);
            None: as given, as with the published weights.
        checkpoint_activations: recompute layers in backward, except for their attention.

    Raises:
        ValueError: for sizes that do not divide evenly, or an invalid pattern.
    """

    places: Tensor

    def __init__(
        self,
        in_chans: int = 1536,
        embed_dim: int = 768,
        depth: int = 12,
        *,
        zero_keys: bool,
        misplaced: bool = False,
        num_heads: int = 16,
        segment_lengths: Sequence[int | None] | None = None,
        dilation_rates: Sequence[int] = (1, 2, 4, 8, 16),
        max_wsi_size: int = 262144,
        tile_size: int = 256,
        slide_ngrids: int = 1000,
        mlp_ratio: float = 4.0,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        global_pool: bool = False,
        order: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads} and of 4")
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate must be from 0 to 1, got {drop_path_rate!r}")
        lengths = segment_lengths_for(max_wsi_size, tile_size) if segment_lengths is None else segment_lengths
        pattern = DilatedPattern(tuple(lengths), tuple(dilation_rates), offset_rule="block", zero_keys=zero_keys)
        if misplaced and not zero_keys:
            raise ValueError("misplaced=True reproduces the padding of torchscale's code: it needs zero_keys=True")
        if order is not None:
            TokenOrder(order, block=1)  # raises for an unknown curve
        self.tile_size, self.slide_ngrids, self.global_pool, self.order = tile_size, slide_ngrids, global_pool, order
        self.checkpoint_activations, self.misplaced = checkpoint_activations, misplaced
        self.drop_path_rates = np.linspace(0, drop_path_rate, depth).tolist()

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(in_chans, embed_dim)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        layers = (Layer(embed_dim, hidden, num_heads, pattern, misplaced, dropout) for _ in range(depth))
        self.encoder = _Layers(layers, embed_dim)
        self.norm, self.dropout = nn.LayerNorm(embed_dim, eps=NORM_EPS), nn.Dropout(dropout)
        self.register_buffer("places", _sine_cosine(slide_ngrids, embed_dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Prov-GigaPath does: Xavier-uniform weights, zero biases, a small class token."""
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def load_weights(self, path: str | Path, *, ignore: Sequence[str] = ()) -> None:
        """Load a state dict with torchscale's names, strictly: no key may be missing or unused.

        Args:
            path: a `.safetensors` file, or one of `torch.save` with tensors only, at the top level or under "model".
            ignore: prefixes of the file's keys to leave out, such as "decoder.".

        Raises:
            ValueError: for missing or unused keys, and weights of another shape.
        """
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state) if isinstance(state, dict) else state
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict, alone or under 'model'")
        ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        state = {key: value for key, value in state.items() if not key.startswith(ignored)}
        own = self.state_dict()
        problems = {
            "are missing": sorted(own.keys() - state.keys()),
            "are not used (see ignore=)": sorted(state.keys() - own.keys()),
            "have another shape": [
                f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
                for key, value in own.items()
                if key in state and state[key].shape != value.shape
            ],
        }
        found = [
            f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
            for what, keys in problems.items()
            if keys
        ]
        if found:
            raise ValueError(f"the weights in {path} do not fit this encoder; {'; '.join(found)}")
        self.load_state_dict(state)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        coords: Tensor | Sequence[Tensor],
        all_layer_embed: bool = False,
        *,
        group: Group = None,
    ) -> list[Tensor]:
        """Embeddings of slides.

        With a group, every rank passes a contiguous piece of every slide's tiles, in rank order, and all get the results. A
        rank's gradients are then its part of those of the *sum* of all ranks' losses: sum them over the ranks, and divide a
        loss that all ranks compute identically by their number.

        Args:
            x: `[slides, tiles, in_chans]`, or for slides of different lengths a list of `[tiles, in_chans]`.
            coords: positions of the tiles in pixels: `[slides, tiles, 2]`, or a list of `[tiles, 2]`; integers, float32 or float64.
            all_layer_embed: also return the embeddings of the input rows of each layer.
            group: process group or 1-D DeviceMesh over which the slides are sharded.

        Returns:
            `[slides, embed_dim]`; with `all_layer_embed` one before each layer and one after the last, without the encoder's
            norm, as published.

        Raises:
            ValueError: for inconsistent shapes, or coordinates that are rounded or outside `slide_ngrids` tiles.
        """
        embeddings, lengths = list(x), [len(at) for at in coords]
        slides = _slides(lengths, self._mistake(embeddings, list(coords), group), group)
        tiles = [self._tiles(at).long() for at in coords]
        if self.order is not None:
            orders = [TokenOrder.from_coordinates(self.order, at).permutation(len(at)).to(at.device) for at in tiles]
            embeddings = [rows[order] for rows, order in zip(embeddings, orders, strict=True)]
            tiles = [at[order] for at, order in zip(tiles, orders, strict=True)]
        places = torch.cat(tiles).to(self.places.device)
        rows = self.patch_embed(torch.cat(embeddings))
        rows = rows + torch.cat((self.places[places[:, 1]], self.places[places[:, 0]]), dim=-1)
        if slides.leading:
            token = self.cls_token[0].to(rows.dtype)
            rows = torch.cat([part for slide in rows.split(lengths) for part in (token, slide)])
        rows = self.dropout(rows)

        paths = self._paths(len(lengths), rows, group)
        found = [self._readout(rows, slides, group)] if all_layer_embed else []
        for layer, path in zip(self.encoder.layers, paths, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                rows = checkpoint(layer, rows, slides, path, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                rows = layer(rows, slides, path)
            if all_layer_embed:
                found.append(self._readout(rows, slides, group))
        return found or [self._readout(self.encoder.layer_norm(rows), slides, group)]

    def _tiles(self, at: Tensor) -> Tensor:
        """The tile in which a pixel is, whole numbers; integers of few bits would not hold `tile_size`."""
        return torch.div(at if at.is_floating_point() else at.long(), self.tile_size, rounding_mode="floor")

    def _mistake(self, x: list[Tensor], coords: list[Tensor], group: Group) -> str | None:
        """What is wrong with this rank's arguments, if anything is."""
        shapes = [list(rows.shape) for rows in x], [list(at.shape) for at in coords]
        size = self.patch_embed.get_parameter("proj.weight").shape[1]
        fits = len(x) == len(coords) > 0 and all(
            rows.ndim == 2 and rows.shape[1] == size and at.shape == (len(rows), 2)
            for rows, at in zip(x, coords, strict=True)
        )
        if not fits:
            return (
                f"x and coords must be [slides, tiles, {size}] and [slides, tiles, 2], or lists of one [tiles, {size}] and "
                f"[tiles, 2] per slide, got {shapes[0][:SHOWN]} and {shapes[1][:SHOWN]}"
            )
        if group is not None and self.order is not None:
            return (
                f"order={self.order!r} would move tiles between ranks: order them before sharding, by "
                "TokenOrder.from_coordinates, and make the encoder with order=None"
            )
        if group is not None and self.misplaced:
            return "misplaced=True is for one device; over ranks use misplaced=False"
        dtypes = [at.dtype for at in coords if at.dtype.itemsize < 4 * at.is_floating_point() or at.dtype is torch.bool]
        if dtypes:
            return (
                f"coords must be integers, float32 or float64, got {dtypes[0]}, which does not hold a slide's "
                "pixels; leave them out when you cast the embeddings"
            )
        every = torch.cat([self._tiles(at).double() for at in coords])
        lowest, highest = (x.item() for x in every.aminmax()) if len(every) else (0, 0)
        if not 0 <= lowest <= highest < self.slide_ngrids:  # nor if one is not a number
            return (
                f"coords lie in tiles {lowest:.0f} to {highest:.0f} of {self.tile_size} pixels, expected 0 to "
                f"{self.slide_ngrids - 1}; give pixels relative to the slide's corner, or a larger slide_ngrids"
            )
        return None

    def _paths(self, number: int, rows: Tensor, group: Group) -> Sequence[Tensor | None]:
        """The weights of every layer's residual branches for every slide, `[2, slides]` each, the same on all ranks."""
        if not self.training or not any(self.drop_path_rates):
            return [None] * len(self.drop_path_rates)
        keep = 1 - torch.tensor(self.drop_path_rates, device=rows.device)[:, None, None]
        drawn = torch.rand((len(keep), 2, number), device=rows.device)
        process_group = resolve_group(group)[0]
        drawn = drawn if process_group is None else from_all(drawn, process_group)[0]
        return list(torch.where(drawn < keep, 1 / keep, 0.0))

    def _readout(self, rows: Tensor, slides: Slides, group: Group) -> Tensor:
        """The embedding of every slide, `[slides, embed_dim]`."""
        if self.global_pool:
            wide = torch.promote_types(rows.dtype, torch.float32)
            parts = [
                rows[slide][slides.leading :].sum(0, dtype=wide) / number
                for slide, number in zip(slides.rows, slides.tiles, strict=True)
            ]
        else:
            parts = [rows[slide.start] if slides.leading else rows[:0].sum(0) for slide in slides.rows]
        found = torch.stack(parts).to(rows.dtype)
        process_group = resolve_group(group)[0]
        return self.norm(found if process_group is None else sum_over_ranks(found, process_group))


def _slides(lengths: Sequence[int], error: str | None, group: Group) -> Slides:
    """The rows of slides of which this rank has `lengths` tiles: a collective per slide, the first of which carries `error`."""
    leading = int(resolve_group(group)[1] == 0)
    counts = [leading + n for n in lengths]
    fields = {"slides": len(lengths)}
    prepared = tuple(
        prepare_call(
            count, fields, error, group=group, layout="contiguous", order=None, positions=None, document_ids=None,
            causal=False, strategy="auto",
        )
        for count in counts or [0]
    )  # fmt: skip
    tiles = tuple(facts.layout.seq_len - 1 for facts in prepared)
    if not all(tiles):
        raise ValueError(f"a slide needs at least one tile, got {list(tiles)}")
    stops = np.cumsum(counts).tolist()
    rows = tuple(slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True))
    return Slides(rows, prepared, leading, tiles)


def _sine_cosine(number: int, size: int) -> Tensor:
    """The fixed embeddings of coordinates: `[number, size]`, float32, sines before cosines."""
    rates = 10000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    angles = torch.arange(number, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()
