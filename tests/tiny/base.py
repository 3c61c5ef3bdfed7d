"""What an entry of the tiny-model catalogue is, and how its weights are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
HEIGHT = 8
"""Height and width of a latent: 4x4 patches of 2x2."""
TOKENS = 16
TEXT_TOKENS = 6
TEXT_DIM = 16
WEIGHT_SEED = 0
CONSTANT_NOISE = 0.1
"""Standard deviation added to zero- or one-initialised parameters."""


@dataclass(frozen=True)
class TinyModel:
    """One denoiser at a size that runs in milliseconds on a CPU.

    Attributes:
        name: Name of the diffusers class, with a word on the variant where there are several.
        build: Returns the model: seeded, float32, CPU, eval mode, every block a non-identity.
        inputs: `(batch, seed)` to the keyword arguments of `model(**inputs)`.
        block_lists: Attribute paths of the backbone's module lists, in the order in which they run.
        timestep: Name of the timestep keyword.
        note: What a reader of a failing test should know about this class.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    block_lists: tuple[str, ...]
    timestep: str = "timestep"
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this class."""
        return hasattr(diffusers, self.name.partition(" (")[0])


class Draw:
    """Seeded tensors for the inputs of one forward.

    Args:
        seed: Seed of the generator behind every tensor drawn.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Returns float32 standard normal values of the given shape."""
        return torch.randn(*shape, generator=self._generator)

    def ints(self, high: int, *shape: int) -> torch.Tensor:
        """Returns int64 values in `[0, high)` of the given shape."""
        return torch.randint(high, shape, generator=self._generator)


def steps(batch: int, value: float = 500.0) -> torch.Tensor:
    """Returns one timestep per item, of shape `(batch,)`."""
    return torch.full((batch,), value)


def grid_ids(height: int, width: int, columns: int = 3) -> torch.Tensor:
    """Returns position ids of shape `(height * width, columns)`; the last two columns count rows and columns."""
    ids = torch.zeros(height, width, columns)
    ids[..., -2] += torch.arange(height)[:, None]
    ids[..., -1] += torch.arange(width)[None, :]
    return ids.flatten(0, 1)


def entry(
    name: str,
    config: dict[str, Any],
    inputs: Callable[[Draw, int], dict[str, Any]],
    block_lists: tuple[str, ...] = ("transformer_blocks",),
    variant: str = "",
    **extra: str,
) -> TinyModel:
    """Returns the catalogue entry of a diffusers class.

    Args:
        name: Name of the diffusers class.
        config: Keyword arguments of its constructor.
        inputs: `(draw, batch)` to the keyword arguments of its forward.
        block_lists: Attribute paths of the backbone's module lists.
        variant: Distinguishes several entries of one class.
        **extra: `timestep` and `note` of the `TinyModel`.
    """
    return TinyModel(
        name=f"{name} ({variant})" if variant else name,
        build=lambda: build(getattr(diffusers, name), config),
        inputs=lambda batch, seed: inputs(Draw(seed), batch),
        block_lists=block_lists,
        **extra,
    )


def build(cls: type[nn.Module], config: dict[str, Any], seed: int = WEIGHT_SEED) -> nn.Module:
    """Returns `cls(**config)` with seeded weights, in float32 eval mode, with no block an identity."""
    with torch.random.fork_rng(devices=[]), _uninitialised_memory_is_nan():
        torch.manual_seed(seed)
        model = cls(**config)
        randomise_constants(model)
    return model.float().eval()


@torch.no_grad()
def randomise_constants(model: nn.Module) -> None:
    """Adds noise to every parameter that is a constant, and draws those left uninitialised.

    Diffusion transformers start their gates, modulations and output projections at zero, which makes a fresh block
    an identity: a test that skips it would see no difference.

    Args:
        model: Changed in place, with values from torch's default generator.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if not torch.isfinite(parameter).all():
            parameter.zero_()
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=CONSTANT_NOISE)


@contextmanager
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Makes `torch.empty` return NaN, so that parameters a class never initialises are found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
