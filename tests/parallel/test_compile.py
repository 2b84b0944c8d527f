# SPDX-License-Identifier: Apache-2.0
"""The operator in compiled graphs: one graph for all batches, the gradients of eager, and what lives how long."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ring_hilbert as rh
from ring_hilbert.ops.pattern import LayerPattern, LayerRule, OwnPattern
from ring_hilbert.parallel.call import Call
from ring_hilbert.parallel.execution import Execution
from ring_hilbert.parallel.handles import held_by
from tests.harness.cases import Case
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.integrations.test_transformers import SETTINGS, tiny_model
from tests.parallel.test_modules import HILBERT, ROWS, assert_same, module, results, tokens

PATTERN = rh.DilatedPattern((16, 32, None), (1, 2, 5), segment_shift=3)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable, backend: str = "aot_eager") -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def documents(number: int, rows: int = ROWS) -> Tensor:
    """Documents of batch `number`: of all entries together, of each, padded."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 3, (2, rows), generator=generator).sort(1).values
    if number % 3 == 2:
        ids[:, rows - 7 :] = -1
    return ids[0] if number % 3 == 0 else ids


# ---- recompilation and gradients


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("order", [None, HILBERT])
def test_five_batches_are_one_graph(backend: str, order: rh.TokenOrder | None):
    layer = module(order=order)
    fast, counter = compiled(layer, backend)
    for number in range(5):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            x = tokens() + number
            prepared = rh.prepare(ROWS, document_ids=documents(number), order=order)
            assert_same(results_of(fast, layer, x, prepared), results(layer, x, x, prepared=prepared))
    assert counter.frame_count == 1


def results_of(fast: Callable, layer: torch.nn.Module, x: Tensor, prepared: rh.Prepared | None) -> dict[str, Tensor]:
    """`tests.parallel.test_modules.results` of the compiled module, whose parameters are those of `layer`."""
    x = x.clone().requires_grad_()
    out = fast(x, prepared=prepared)
    layer.zero_grad()
    (out * x.detach()).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[dict-item]


def test_lengths_that_change_are_one_more_graph():
    layer = module(order=HILBERT)
    fast, counter = compiled(layer)
    for number, rows in enumerate((40, 48, 61, 32)):
        prepared = rh.prepare(rows, document_ids=documents(number, rows), order=HILBERT) if number % 2 else None
        x = tokens()[:, :rows]
        assert_same(results_of(fast, layer, x, prepared), results(layer, x, x, prepared=prepared))
    assert counter.frame_count <= 4  # with and without prepared, static and dynamic


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, "plain", "policy"])
def test_a_whole_model_is_one_graph(checkpointing: str | None):
    model = tiny_model().train()
    if checkpointing:
        options = {"context_fn": rh.checkpoint_contexts} if checkpointing == "policy" else {}
        model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    fast, counter = compiled(model)

    def train(call: Callable, number: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 50, (2, ROWS), generator=torch.Generator().manual_seed(number))
        batch = {"input_ids": ids, "document_ids": documents(number).expand(2, -1)}
        batch = rh.shard_batch(batch, order=rh.TokenOrder("hilbert", block=16))
        logits = call(**batch, use_cache=False).logits
        model.zero_grad()
        labels = batch["shift_labels"].flatten()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
        return {"out": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}  # type: ignore[dict-item]

    for number in range(5):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert_same(train(fast, number), train(model, number))
    assert counter.frame_count <= 2


def nested(model: torch.nn.Module, nesting: str, counter: CompileCounterWithBackend) -> None:
    """Compile the layers of `model`, each checkpointed: by Transformers, around the compiled code, or within it."""
    policy = {"use_reentrant": False, "context_fn": rh.checkpoint_contexts}
    if nesting == "transformers":
        model.gradient_checkpointing_enable(policy)
    for layer in model.model.layers:
        function = layer.forward
        if nesting == "within":
            function = partial(checkpoint, function, **policy)
        function = torch.compile(function, backend=counter)
        layer.forward = partial(checkpoint, function, **policy) if nesting == "around" else function


@pytest.mark.slow
@pytest.mark.parametrize("nesting", ["transformers", "around", "within"])
@pytest.mark.parametrize(
    "layers", [4, pytest.param(16, marks=pytest.mark.full), pytest.param(40, marks=pytest.mark.full)]
)
def test_layers_are_one_graph(monkeypatch: pytest.MonkeyPatch, nesting: str, layers: int):
    """With shifts of their own or dense, at ids that are copies or not; the operator runs once per layer and step."""
    own = {"1": {"segment_shift": 5, "branches": 1}, "2": {"dense": True}, "3": {"head_shift": 1}}
    model = tiny_model(settings={**SETTINGS, "layers": own}, num_hidden_layers=layers).train()
    plain, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    nested(model, nesting, counter)
    runs, forward = [], Execution.forward
    monkeypatch.setattr(Execution, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))

    def train(model: torch.nn.Module, number: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 50, (2, ROWS), generator=torch.Generator().manual_seed(number))
        batch = {"input_ids": ids, "document_ids": documents(number).expand(2, -1)}
        batch = rh.shard_batch(batch, order=rh.TokenOrder("hilbert", block=16))
        if number > 1:
            batch["position_ids"] = batch["position_ids"].clone()  # what .to("cuda") makes of it
        labels = batch.pop("shift_labels").flatten()
        logits = model(**batch, use_cache=False).logits.flatten(0, 1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        return {"out": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}  # type: ignore[dict-item]

    for number in range(4):
        runs.clear()
        got = train(model, number)
        assert len(runs) == layers
        assert_same(got, train(plain, number))
    assert counter.frame_count == 2  # one of each kind of batch


def test_adapted_layers_are_one_graph():
    """LoRA: weights that are frozen, and adapters; the first layer's input needs no gradient, which is a graph of its own."""
    model = tiny_model(num_hidden_layers=5).train().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = _Adapted(layer.self_attn.q_proj)
    plain, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    nested(model, "transformers", counter)
    batch = rh.shard_batch({"input_ids": torch.randint(0, 50, (2, ROWS))}, order=rh.TokenOrder("hilbert", block=16))
    del batch["shift_labels"]
    gradients = []
    for each in (model, plain):
        each(**batch, use_cache=False).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert_same(*gradients)
    assert len(gradients[0]) == 10 and counter.frame_count <= 2


def test_renumbered_layers_are_not_taken_for_what_they_were():
    model = tiny_model(num_hidden_layers=3)
    ids = torch.randint(0, 50, (2, ROWS))
    model = copy.deepcopy(model)
    del model.model.layers[0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    fast, _ = compiled(model)
    with pytest.raises(ValueError, match="layer 1 of the model now has layer_idx 0"):
        fast(ids, use_cache=False)
    want = model(ids, use_cache=False).logits
    torch.testing.assert_close(fast(ids, use_cache=False).logits, want)


class _Adapted(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.slow
def test_a_model_without_prepared_takes_one_document_and_nothing_else():
    model = tiny_model()
    fast, _ = compiled(model)
    ids = torch.randint(0, 50, (2, ROWS))
    torch.testing.assert_close(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    for wrong in (
        {"position_ids": torch.arange(ROWS)[None] % 16},
        {"attention_mask": (torch.arange(ROWS) < 50).long().expand(2, -1)},
    ):
        with pytest.raises(ValueError, match="a compiled model takes padding and packed documents by"):
            fast(ids, use_cache=False, **wrong)


def test_a_compiled_model_checks_position_ids_of_its_own():
    model, batch = tiny_model(), rh.shard_batch({"input_ids": torch.randint(0, 50, (2, ROWS))})
    fast, _ = compiled(model)
    batch["position_ids"] = batch["position_ids"].clone()
    torch.testing.assert_close(fast(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)
    batch["position_ids"] += 1
    with pytest.raises(ValueError, match="position_ids are not those of the sharded rows"):
        fast(**batch, use_cache=False)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_ids": torch.zeros(24, dtype=torch.long)}, r"belong in prepared=rh.prepare\(...\)"),
        ({"prepared": rh.prepare(24, causal=False), "causal": True}, "causal=True disagrees with prepared"),
        ({"backend": "cuda"}, "backend='cuda' is not supported"),
        ({"prepared": rh.prepare(23), "name": "layer 3"}, "layer 3: q must have the 23 rows that prepared says"),
        ({"order": rh.TokenOrder("hilbert", grid=(5, 5))}, "length=24 but grid"),
    ],
)
def test_mistakes_are_named(options: dict, message: str):
    def call(q: Tensor) -> Tensor:
        return rh.dilated_attention(q, q, q, PATTERN, **options)

    with pytest.raises(Exception, match=message):  # a ValueError, or what dynamo makes of one
        compiled(call)[0](torch.randn(2, 24, 2, 8))


# ---- the operator as torch sees it


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [None, HILBERT])
def test_opcheck(dtype: torch.dtype, order: rh.TokenOrder | None):
    """Schema, fake results (shapes, dtypes, strides) and autograd registration, with and without facts."""
    x = Case(PATTERN, 40, 2, 4, 2, 8).tensors(dtype)
    q, k, v = (x[name].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for name in "qkv")
    call = Call.of(PATTERN, causal=True, order=order, scale=0.3, name="layer")
    many = LayerPattern(
        LayerRule(PATTERN, 2, (OwnPattern(1, True, 0, 0), OwnPattern(3, False, 5, 7, 2))), torch.tensor(3)
    )
    of_layer = Call.of(many, causal=True, order=order, scale=0.3, name=None)
    prepared = rh.prepare(40, document_ids=documents(1, 40), order=order)
    attention, backward = torch.ops.ring_hilbert.attention.default, torch.ops.ring_hilbert.attention_backward.default
    for data in ((None, None, call), (prepared.handle, None, call), (prepared.handle, many.layer, of_layer)):
        *data, constants = data
        torch.library.opcheck(attention, (q, k, v, *data, *constants), rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            saved = [q, k, v, *attention(q, k, v, *data, *constants)[:3]]
            torch.library.opcheck(backward, (x["dout"], saved, *data, 2, *constants), rtol=1e-2, atol=1e-2)


def test_what_is_kept_for_backward():
    x = Case(PATTERN, 40, 2, 4, 2, 8).tensors()
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    prepared = rh.prepare(40, document_ids=documents(1, 40), order=HILBERT)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out, lse = rh.dilated_attention(q, k, v, PATTERN, prepared=prepared, return_lse=True)
    memory = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert {tensor.untyped_storage().data_ptr() for tensor in (q, k, v, out, lse, prepared.handle)} < memory
    assert len(memory) == 7 and sorted(tuple(tensor.shape) for tensor in kept) == sorted(
        [(2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8), (2, 40, 4, 8), (2, 4, 40), (2, 4, 40), ()]
    )


def test_nothing_waits_for_the_device_after_prepare():
    """No value of a tensor is asked for: on a GPU each of these operations would be a synchronisation."""
    x = Case(PATTERN, 40, 2, 4, 2, 8).tensors()
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    for options in ({"document_ids": documents(1, 40)}, {"order": HILBERT}, {"causal": False}):
        prepared = rh.prepare(40, **options)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            rh.dilated_attention(q, k, v, PATTERN, prepared=prepared).sum().backward()
        seen = {event.key for event in profile.key_averages()}
        assert {"ring_hilbert::attention", "ring_hilbert::attention_backward"} <= seen
        asking = {
            "item",
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
            "masked_select",
            "unique_dim",
            "_unique2",
        }
        assert not seen & {f"aten::{name}" for name in asking}


# ---- lifetime


def facts_of(prepared: rh.Prepared) -> weakref.ref:
    """Of what the operator looks up by the handle, which is not the object that the caller has."""
    return weakref.ref(prepared.handle.held)


@pytest.mark.parametrize("backend", ["eager without compiling", "eager", "aot_eager"])
def test_facts_live_until_backward_and_no_longer(backend: str):
    layer, x = module(), tokens()
    call = layer if backend == "eager without compiling" else compiled(layer, backend)[0]
    call(x, prepared=rh.prepare(ROWS)).sum().backward()
    gc.disable()  # nothing may be left for it to do
    try:
        prepared = rh.prepare(ROWS, document_ids=documents(1))
        expected = results(layer, x, x, prepared=prepared)
        facts = facts_of(prepared)
        assert facts() is not None
        out = call(x, prepared=prepared)
        del prepared
        assert facts() is not None
        layer.zero_grad()
        (out * x).sum().backward()
        del out
        assert facts() is None
    finally:
        gc.enable()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_facts_live_where_saved_tensors_are_copied():
    layer, x = module(), tokens()
    want = results(layer, x, x, prepared=rh.prepare(ROWS, document_ids=documents(1)))
    with torch.autograd.graph.save_on_cpu():
        got = results(layer, x, x, prepared=rh.prepare(ROWS, document_ids=documents(1)))
    assert_same(got, want)


def test_facts_that_are_gone_are_named():
    """Hooks on saved tensors may leave compiled code a copy of the handle alone."""
    prepared = rh.prepare(ROWS)
    copy = prepared.handle.clone()
    assert held_by(copy).local_len == ROWS
    del prepared
    with pytest.raises(RuntimeError, match="keep the Prepared until backward"):
        held_by(copy)


def test_a_copy_from_another_process_stands_for_itself():
    prepared = rh.prepare(ROWS, document_ids=documents(1))
    x, layer, other = tokens(), module(), pickle.loads(pickle.dumps(prepared))
    expected = layer(x, prepared=prepared)
    assert int(other.handle) != int(prepared.handle)
    del prepared
    torch.testing.assert_close(layer(x, prepared=other), expected, rtol=0, atol=0)


# ---- ranks


def _compiled_on_ranks(rank: int, world: int, way: dict):
    torch._dynamo.reset()
    layer, x = module(order=HILBERT), tokens()
    fast, counter = compiled(layer)
    parts = []
    for number in range(4):
        batch = {"input_ids": torch.zeros(2, ROWS, dtype=torch.long), "document_ids": documents(number).expand(2, -1)}
        prepared = rh.shard_batch(batch, dist.group.WORLD, order=HILBERT, **way)["ring_hilbert"]
        rows = prepared.rows.expand(2, -1)
        local = torch.take_along_dim(x, rows[..., None], 1)
        parts.append((rows, results_of(fast, layer, local, prepared)))
    return counter.frame_count, parts


@pytest.mark.parametrize("way", [{}, {"strategy": "ulysses"}, {"strategy": "ring", "save_remote": True}], ids=str)
def test_ranks_equal_one_device(way: dict):
    ranks = run_ranks(_compiled_on_ranks, 2, way, timeout=240)
    assert [frames for frames, _ in ranks] == [1, 1]
    layer, x = module(order=HILBERT), tokens()
    for number in range(4):
        real = torch.broadcast_to(documents(number) >= 0, (2, ROWS))[..., None]
        batch = {"input_ids": torch.zeros(2, ROWS, dtype=torch.long), "document_ids": documents(number).expand(2, -1)}
        prepared = rh.shard_batch(batch, order=HILBERT)["ring_hilbert"]
        rows = prepared.rows.expand(2, -1)[..., None]
        want = results(layer, torch.take_along_dim(x, rows, 1), torch.take_along_dim(x, rows, 1), prepared=prepared)
        places = torch.cat([part[number][0] for _, part in ranks], dim=1)[..., None].expand_as(x)
        for name, value in want.items():
            if name in ("out", "x"):
                local = torch.cat([part[number][1][name] for _, part in ranks], dim=1)
                got = torch.zeros_like(x).scatter(1, places, local) * real
                value = torch.zeros_like(x).scatter(1, rows.expand_as(x), value) * real
            else:
                got = sum(part[number][1][name] for _, part in ranks)
            torch.testing.assert_close(got, value, rtol=0, atol=1e-10, msg=f"batch {number}: {name}")


def _differ_on_ranks(rank: int, world: int):
    torch._dynamo.reset()
    prepared = rh.prepare(30, group=dist.group.WORLD)

    def call(q: Tensor) -> Tensor:
        return rh.dilated_attention(q, q, q, PATTERN, scale=0.5 + rank, prepared=prepared, group=dist.group.WORLD)

    return compiled(call)[0](torch.randn(1, 30, 2, 8))


def test_a_difference_between_ranks_is_an_error_on_all():
    for outcome in run_ranks_collect(_differ_on_ranks, 2, timeout=240):
        assert isinstance(outcome, ValueError) and "scale must be the same on all ranks" in str(outcome), outcome
