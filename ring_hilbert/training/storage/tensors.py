# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors without pickles: safetensors files, and a JSON index of where each part of each tensor is.

`torch.distributed.checkpoint` plans which rank writes and reads what; this is the storage below it. So any number of ranks can load
what any other number has written. Tensors are named `<kind>.<parameter>`, see `KINDS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from torch.nn.utils import get_total_norm

from ring_hilbert.training.storage.manifest import FileSum, Manifest, SummedFile, write_json

INDEX = "index.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS, "step")  # a parameter or buffer, and AdamW's state of the parameter

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Written:
    """Where a part of a tensor was written, as reported to the coordinator."""

    file: str
    sum: FileSum


class Writer(StorageWriter):
    """Writes one safetensors file per rank below `folder` and, on the coordinator, the index; then calls `publish` there.

    `publish` is given the checksums of all these files by name; what it raises is raised on every rank.
    """

    def __init__(self, folder: Path, publish: Callable[[Manifest], None]) -> None:
        self.folder = folder
        self.publish = publish

    def reset(self, checkpoint_id: Any = None) -> None:
        """See `StorageWriter`: used only once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter`: there is nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See `StorageWriter`: names each rank's file."""
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `StorageWriter`: streams this rank's parts to its file, so that none is held in memory twice."""
        done: Future[list[WriteResult]] = Future()
        items = sorted(plan.items, key=lambda item: -_data_of(item).properties.dtype.itemsize)  # keeps them aligned
        if items:
            parts = [(_name_of(item), _data_of(item)) for item in items]
            heads = [(name, data.properties.dtype, data.chunk.sizes) for name, data in parts]
            tensors = (cast(Tensor, planner.resolve_data(item)) for item in items)
            written = _Written(plan.storage_data, write_safetensors(self.folder / plan.storage_data, heads, tensors))
            done.set_result([WriteResult(item.index, _size_of(item), written) for item in items])
        else:
            done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `StorageWriter`: called on the coordinator once every rank has written."""
        written = {result.index: result.storage_data for rank in results for result in rank}
        index = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            index[key] = {
                "dtype": NAMES[tensor.properties.dtype],
                "size": list(tensor.size),
                "parts": [
                    {
                        "offsets": list(part.offsets),
                        "sizes": list(part.sizes),
                        "file": written[MetadataIndex(key, part.offsets)].file,
                    }
                    for part in tensor.chunks
                ],
            }
        files = {place.file: place.sum for place in written.values()}
        self.publish(files | {INDEX: write_json(self.folder / INDEX, index)})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """See `StorageWriter`."""
        return isinstance(checkpoint_id, (str, Path))

    def storage_meta(self) -> None:
        """See `StorageWriter`."""


class Rehearsal(Writer):
    """Writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path(), lambda _: None)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `StorageWriter`."""
        del plan, planner
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `StorageWriter`."""


class Reader(StorageReader, Mapping[str, Tensor]):
    """Reads what `Writer` or `ring-hilbert convert` wrote below `folder`; a mapping of whole tensors on the CPU.

    Raises:
        ValueError: if the index is invalid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata, self.files = _read_index(folder)

    def head(self, key: str) -> tuple[torch.dtype, torch.Size]:
        """Dtype and shape of a whole tensor, without reading it."""
        tensor = self._tensor(key)
        return tensor.properties.dtype, tensor.size

    def __iter__(self) -> Iterator[str]:
        return iter(self.metadata.state_dict_metadata)

    def __len__(self) -> int:
        return len(self.metadata.state_dict_metadata)

    def __getitem__(self, key: str) -> Tensor:
        """A tensor assembled from its parts."""
        tensor = self._tensor(key)
        parts = tensor.chunks
        if len(parts) == 1:
            return self._part(MetadataIndex(key, parts[0].offsets), ...)
        whole = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for part in parts:
            place = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
            whole[place] = self._part(MetadataIndex(key, part.offsets), ...)
        return whole

    def require(self, sizes: Mapping[str, torch.Size]) -> None:
        """Check that the checkpoint has exactly the tensors that a model needs.

        Raises:
            ValueError: if a tensor is missing, of another shape, or unknown to the model.
        """
        for key in sorted(sizes.keys() | self.keys()):
            kind, _, name = key.partition(".")
            if key not in self:
                raise ValueError(f"{self.folder} is of another model: it has no {kind} of {name}")
            found = self.head(key)[1]
            if key not in sizes:
                raise ValueError(f"{self.folder} is of another model: its {kind} of {name} is not in this one")
            if found != sizes[key]:
                raise ValueError(
                    f"{self.folder} is of another model: the {kind} of {name} is {list(found)}, but {list(sizes[key])} here"
                )

    def reset(self, checkpoint_id: Any = None) -> None:
        """See `StorageReader`: used only once."""

    def read_metadata(self) -> Metadata:
        """See `StorageReader`."""
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """See `StorageReader`: there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See `StorageReader`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See `StorageReader`: reads of every part only what this rank needs. The planner's byte entries never occur."""
        for item in plan.items:
            place = tuple(slice(at, at + size) for at, size in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._part(item.storage_index, place))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """See `StorageReader`."""
        return isinstance(checkpoint_id, (str, Path))

    def __contains__(self, key: object) -> bool:
        return key in self.metadata.state_dict_metadata

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _part(self, index: MetadataIndex, place: Any) -> Tensor:
        """A slice of one part: `place` is a tuple of slices, or ... for all."""
        path = self.folder / self.files[index]
        assert index.offset is not None
        name = _part_name(index.fqn, index.offset)
        try:
            with ExitStack() as stack:
                file = stack.enter_context(safe_open(path, "pt"))
                return file.get_tensor(name) if place in (..., ()) else file.get_slice(name)[place]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from error


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or NaN; synchronises with the device once if none does."""
    looked_at = {key: x.detach() for key, x in tensors.items() if x.is_floating_point() and x.numel()}
    if not looked_at or get_total_norm(looked_at.values(), math.inf).isfinite():
        return []
    return [key for key, x in looked_at.items() if not x.isfinite().all()]


def write_safetensors(
    path: Path, heads: Iterable[tuple[str, torch.dtype, Iterable[int]]], tensors: Iterable[Tensor]
) -> FileSum:
    """Write tensors of known name, dtype and shape one by one; only one needs to be in memory at a time."""
    header, at = {}, 0
    for name, dtype, shape in heads:
        sizes = list(shape)
        end = at + math.prod(sizes) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": sizes, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with SummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        assert file.size == 8 + len(text) + at, f"{path}: tensors are not of the announced sizes"
        return file.finish()


def _read_index(folder: Path) -> tuple[Metadata, dict[MetadataIndex, str]]:
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    try:
        for key, known in json.loads((folder / INDEX).read_text()).items():
            parts = []
            for part in known["parts"]:
                offsets = torch.Size(part["offsets"])
                parts.append(ChunkStorageMetadata(offsets, torch.Size(part["sizes"])))
                files[MetadataIndex(key, offsets)] = Path(part["file"]).name  # never from another folder
            size = torch.Size(known["size"])
            if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
                raise ValueError(f"the parts of {key} do not make up the whole")
            tensors[key] = TensorStorageMetadata(TensorProperties(DTYPES[known["dtype"]]), size, parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read: {error}") from error
    return Metadata(tensors, storage_data=files), files


def _data_of(item: WriteItem) -> Any:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor: only tensors can be saved")
    return item.tensor_data


def _size_of(item: WriteItem) -> int:
    data = _data_of(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _name_of(item: WriteItem) -> str:
    return _part_name(item.index.fqn, _data_of(item).chunk.offsets)


def _part_name(key: str, offsets: Iterable[int]) -> str:
    """A part's name in its file: the key, with its offsets unless they are all 0."""
    place = ",".join(map(str, offsets)) if any(offsets) else ""
    return f"{key}@{place}" if place else key
