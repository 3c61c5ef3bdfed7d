"""What blocks of DiT compute of timestep and label alike is computed once, and only while it is alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks.patched import build, call, inputs
from torch import nn

import fastdiff
from fastdiff.kernels import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def published(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a DiT whose blocks embed alike, as in checkpoints that were converted."""
    model = build("DiT", dtype)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    return model


def embeddings(model: Any) -> list[Any]:
    return [block.norm1.emb for block in model.transformer_blocks]


class Calls:
    """Counts what embeddings and activations compute. Not by hooks, which would keep the blocks apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.labels: list[nn.Embedding] = []
        self.activations = 0
        tables = [embedding.class_embedder.embedding_table for embedding in embeddings(model)]
        own, silu = nn.Embedding.forward, nn.SiLU.forward

        def table(module: nn.Embedding, *args: Any) -> torch.Tensor:
            self.labels += [module] if any(module is one for one in tables) else []
            return own(module, *args)

        def activation(module: nn.SiLU, *args: Any) -> torch.Tensor:
            self.activations += any(module is block.norm1.silu for block in model.transformer_blocks)
            return silu(module, *args)

        monkeypatch.setattr(nn.Embedding, "forward", table)
        monkeypatch.setattr(nn.SiLU, "forward", activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_embed_alike_embed_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = published(dtype), inputs("DiT", dtype)
    plain = call(model, arguments)
    fastdiff.optimize(model)
    calls = Calls(monkeypatch, model)
    assert torch.equal(call(model, arguments), plain)
    assert len(calls.labels) == calls.activations == 1
    other = arguments | {"timestep": arguments["timestep"] - 100}
    assert not torch.equal(call(model, other), plain)
    assert len(calls.labels) == calls.activations == 2


def test_blocks_that_embed_differently_embed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build("DiT"), inputs("DiT")
    plain = call(model, arguments)
    fastdiff.optimize(model)
    calls = Calls(monkeypatch, model)
    assert torch.equal(call(model, arguments), plain)
    assert len(set(map(id, calls.labels))) == calls.activations == len(model.transformer_blocks)


@pytest.mark.parametrize("name", ["SD3", "SD3.5", "Flux"])
def test_one_embedding_is_activated_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, blocks and output layers of these are given the same one."""
    model, arguments = build(name), inputs(name)
    plain = call(model, arguments)
    fastdiff.optimize(model)
    own, activated = nn.SiLU.forward, []
    norms = [module for module in model.modules() if isinstance(getattr(module, "silu", None), nn.SiLU)]

    def activation(module: nn.SiLU, *args: Any) -> torch.Tensor:
        activated.extend(norm for norm in norms if norm.silu is module)
        return own(module, *args)

    monkeypatch.setattr(nn.SiLU, "forward", activation)
    assert torch.equal(call(model, arguments), plain)
    assert len(norms) > 4
    assert len(activated) == 1


def in_place(model: Any, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        embeddings(model)[-1].timestep_embedder.linear_2.bias.add_(1)


def in_first(model: Any, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        embeddings(model)[0].class_embedder.embedding_table.weight.mul_(2)


def in_other_memory(model: Any, arguments: dict[str, Any]) -> None:
    weight = embeddings(model)[-1].timestep_embedder.linear_1.weight
    weight.data = weight.data + 1


def by_an_adapter(model: Any, arguments: dict[str, Any]) -> None:
    embedder = embeddings(model)[-1].timestep_embedder
    embedder.linear_1 = nn.Sequential(embedder.linear_1, nn.Tanh())


def by_a_hook(model: Any, arguments: dict[str, Any]) -> None:
    embeddings(model)[-1].class_embedder.register_forward_hook(lambda module, args, output: output + 1)


def labels(model: Any, arguments: dict[str, Any]) -> None:
    arguments["class_labels"] = (arguments["class_labels"] + 1) % 3


def labels_in_place(model: Any, arguments: dict[str, Any]) -> None:
    arguments["class_labels"].add_(1).remainder_(3)


def timestep_in_place(model: Any, arguments: dict[str, Any]) -> None:
    arguments["timestep"].sub_(50)


def projection(model: Any, arguments: dict[str, Any]) -> None:
    for embedding in embeddings(model):
        embedding.time_proj.flip_sin_to_cos = False


CHANGES = [
    in_place,
    in_first,
    in_other_memory,
    by_an_adapter,
    by_a_hook,
    labels,
    labels_in_place,
    timestep_in_place,
    projection,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: Any) -> None:
    """Between two calls with the very same tensors."""
    model, arguments = published(), inputs("DiT")
    before = call(model, arguments)
    fastdiff.optimize(model)
    assert torch.equal(call(model, arguments), before)
    change(model, arguments)
    result = call(model, arguments)
    assert not torch.equal(result, before)
    fastdiff.restore(model)
    assert torch.equal(result, call(model, arguments))


def test_gradients_reach_every_block() -> None:
    model, arguments = published(torch.float64), inputs("DiT", torch.float64)
    weights = [embedding.timestep_embedder.linear_1.weight for embedding in embeddings(model)]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(**arguments, return_dict=False)[0].square().sum(), weights)

    plain = gradients()
    fastdiff.optimize(model)
    call(model, arguments)
    for one, two in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, two)


def test_recordings_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph computes everything itself, and within itself once."""
    model, arguments = published(), inputs("DiT")
    plain = call(model, arguments)
    fastdiff.optimize(model)
    calls = Calls(monkeypatch, model)
    for number in (1, 2, 3):
        with launch.recording():
            assert torch.equal(call(model, arguments), plain)
        assert len(calls.labels) == calls.activations == number
