"""The catalogue covers every class, and its models are fit to test with."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

import fastdiff.models

from .models import NOT_COVERED, TINY_MODELS
from .unets import TINY_UNETS, UNETS_NOT_COVERED

BATCH = 2
CATALOGUE = TINY_MODELS | TINY_UNETS
EVERY_MODEL = pytest.mark.parametrize("name", CATALOGUE)
EVERY_TRANSFORMER = pytest.mark.parametrize("name", TINY_MODELS)
PACKED = {"Cosmos3OmniTransformer", "MiniMaxH3Transformer3DModel"}
"""Classes that take one timestep for the whole packed batch, or one per token."""

PASSES_TEXT_THROUGH = {"MochiTransformer3DModel": ["transformer_blocks.2"]}
"""Last blocks that return the text stream they were given."""


def classes_of(package: ModuleType) -> set[str]:
    """Returns the names of the model classes defined in the modules of a package."""
    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
    }


def items(output: Any) -> list[torch.Tensor]:
    """Returns the prediction of each batch item, the first output where a model has several."""
    sample = output[0]
    return list(sample) if torch.is_tensor(sample) else [item.squeeze(0) for item in sample]


@torch.no_grad()
def run(name: str, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    return items(model(**CATALOGUE[name].inputs(BATCH, seed), return_dict=False))


def differ(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return any(not torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(left, right, strict=True))


def test_every_class_is_in_exactly_one_table() -> None:
    assert set(TINY_MODELS).isdisjoint(NOT_COVERED)
    ours = classes_of(fastdiff.models) & set(TINY_MODELS)
    assert set(TINY_MODELS) - ours | set(NOT_COVERED) == classes_of(diffusers.models.transformers)
    assert ours == {"UViT"}


def test_every_unet_class_is_in_exactly_one_table() -> None:
    covered = {name.partition(" (")[0] for name in TINY_UNETS}
    elsewhere = {"AudioLDM2UNet2DConditionModel"}
    assert covered.isdisjoint(UNETS_NOT_COVERED)
    assert covered | set(UNETS_NOT_COVERED) == classes_of(diffusers.models.unets) | elsewhere


@EVERY_MODEL
def test_model_predicts_for_each_item_and_repeats(name: str) -> None:
    tiny = CATALOGUE[name]
    model = tiny.build()
    prediction = run(name, model)

    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(prediction) == BATCH
    assert all(item.isfinite().all() and item.std() > 0 for item in prediction)
    assert all(map(torch.equal, prediction, run(name, model)))
    torch.rand(1)
    assert all(map(torch.equal, prediction, run(name, tiny.build()))), "the weights depend on torch's global generator"
    assert differ(prediction, run(name, model, seed=1)), "the inputs ignore their seed"


@EVERY_MODEL
def test_timestep_changes_the_prediction(name: str) -> None:
    tiny = CATALOGUE[name]
    model = tiny.build()
    inputs = tiny.inputs(BATCH, 0)
    timestep = inputs[tiny.timestep]

    assert name in PACKED or timestep.ndim == 0 or len(timestep) == BATCH
    inputs[tiny.timestep] = timestep // 2 if timestep.dtype == torch.long else timestep / 2
    with torch.no_grad():
        moved = items(model(**inputs, return_dict=False))
    assert differ(run(name, model), moved)


@EVERY_MODEL
def test_every_block_matters(name: str) -> None:
    tiny = CATALOGUE[name]
    model = tiny.build()
    reference = run(name, model)

    for path in tiny.block_lists:
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        assert len(blocks) >= 3, path
        for index, block in enumerate(blocks):
            saved = {key: value.clone() for key, value in block.state_dict().items()}
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter.mul_(1.5)
            changed = run(name, model)
            block.load_state_dict(saved)
            assert differ(reference, changed), f"{path}.{index} does not reach the output"


@EVERY_TRANSFORMER
def test_no_block_is_an_identity(name: str) -> None:
    tiny = CATALOGUE[name]
    model = tiny.build()
    unchanged: list[str] = []

    def compare(path: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            returned = [value for value in ((output,) if torch.is_tensor(output) else output) if value is not None]
            if any(after is before or torch.equal(after, before) for after in returned for before in given):
                unchanged.append(path)

        return hook

    for path in tiny.block_lists:
        for index, block in enumerate(model.get_submodule(path)):
            block.register_forward_hook(compare(f"{path}.{index}"), with_kwargs=True)
    run(name, model)
    assert unchanged == PASSES_TEXT_THROUGH.get(name, [])
