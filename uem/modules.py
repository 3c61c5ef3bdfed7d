"""Uncertainty modules: small linear probes that tell, before each exit, how wrong the prediction would be there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from fastdiff.engine.heads import ExitHead, StageHead
from fastdiff.errors import ConfigError, ProfileMismatchError
from fastdiff.kernels.steps import Steps
from fastdiff.kernels.uncertainty_score import uncertainty_score

if TYPE_CHECKING:
    from fastdiff.backbones import Backbone

TIMESTEP_CHANNELS = 256
"""Channels of the sinusoids that stand for a timestep."""

HEADS = ("shared", "per_exit_norm", "per_exit")
"""Who reads the hidden state at an exit: the model's own output layers; these after a norm of the exit's own; or these
after a low-rank correction of the exit's own. In a UNet, where hidden states differ in shape, only the last can be."""


def sinusoids(timesteps: torch.Tensor) -> torch.Tensor:
    """What stands for timesteps of shape ``(batch,)``: float32 of shape ``(batch, TIMESTEP_CHANNELS)``."""
    return get_timestep_embedding(timesteps, TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)


class UncertaintyModule(nn.Module):
    """One exit's estimate of how far its prediction is from the truth (DeeDiff, arXiv 2309.17074, section 3.2).

    A linear layer on each token, ``sigmoid(W h + b + V time)``, gives one uncertainty for each number that the token's
    part of the prediction consists of. No gradient reaches the hidden state. ``V`` starts at zero, where the module is
    the one of the released code, which knows no timestep.

    Args:
        width: channels of the hidden state.
        outputs: numbers that a token stands for in the prediction, such as ``patch_size ** 2 * channels``.
        timestep_aware: whether there is a ``V``.
    """

    def __init__(self, width: int, outputs: int, timestep_aware: bool = True) -> None:
        super().__init__()
        self.probe = nn.Linear(width, outputs)
        self.time = nn.Linear(TIMESTEP_CHANNELS, outputs, bias=False) if timestep_aware else None
        nn.init.trunc_normal_(self.probe.weight, std=0.02)
        nn.init.zeros_(self.probe.bias)
        if self.time is not None:
            nn.init.zeros_(self.time.weight)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Uncertainty of every number of the prediction, in (0, 1), float32 of shape ``(batch, tokens, outputs)``.

        Args:
            tokens: those of the hidden state that the prediction is made of, shape ``(batch, tokens, width)``.
            time: `sinusoids` of the timesteps, shape ``(batch, TIMESTEP_CHANNELS)``.
        """
        weight = self.probe.weight
        logits = self.probe(tokens.detach().to(weight.dtype)).float()
        if (offset := self._offset(time)) is not None:
            logits = logits + offset.float()[:, None]
        return logits.sigmoid()

    def score(self, tokens: torch.Tensor, time: torch.Tensor, steps: Steps) -> torch.Tensor:
        """Mean uncertainty of each sample, float32 of shape ``(batch,)``; arguments as of `forward`."""
        tokens, weight, bias = tokens.detach(), self.probe.weight, self.probe.bias
        if steps.score_at_once(tokens, weight, bias):
            return uncertainty_score(tokens, weight, bias, self._offset(time))
        uncertainty: torch.Tensor = self(tokens, time)
        return uncertainty.mean((1, 2))

    def _offset(self, time: torch.Tensor) -> torch.Tensor | None:
        """What the timesteps add to every token's numbers, shape ``(batch, outputs)``."""
        return None if self.time is None else self.time(time.to(self.time.weight.dtype))


class ExitNorm(nn.Module):
    """A norm of an exit's own in front of the model's: ``h + scale * norm(h) + shift``; the identity until trained.

    The output layers begin with a norm of their own, so that this comes to giving them another scale and shift.

    Args:
        width: channels of the hidden state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Correct a hidden state of shape ``(..., width)``; keeps its dtype."""
        return hidden_states + self.norm(hidden_states.to(self.norm.weight.dtype)).to(hidden_states.dtype)


def _head(kind: str, width: int, rank: int, read_width: int | None) -> nn.Module:
    """An exit's head."""
    if read_width is not None:
        return StageHead(width, read_width, rank)
    if kind == "shared":
        return nn.Identity()
    return ExitNorm(width) if kind == "per_exit_norm" else ExitHead(width, rank)


def check_unet_heads(heads: str) -> None:
    """Refuse heads that a UNet cannot have.

    Raises:
        ConfigError: for any but ``"per_exit"``.
    """
    if heads != "per_exit":
        raise ConfigError(
            "A UNet's output layers cannot read the hidden state at an exit, which has another shape: heads='per_exit' "
            f"is all that there is; got {heads!r}."
        )


class UncertaintyModules(ModelMixin, ConfigMixin):
    """The uncertainty modules of a denoiser, one for each exit, and the exits' heads.

    ``save_pretrained`` and ``from_pretrained`` keep them as safetensors beside a config that names the denoiser.

    Args:
        backbone: class name of the denoiser that they were made for.
        units: number of its units.
        exits: names of the units before which a sample may stop, in execution order.
        width: channels of the hidden state; in a UNet one number for each exit.
        outputs: numbers that a token stands for in the prediction; in a UNet, where pixels of the hidden state are the
            tokens, one number for each exit.
        extra_tokens: tokens at the front of the hidden state that the prediction is not made of.
        timestep_aware: whether the modules know the timestep.
        heads: ``"shared"``, ``"per_exit_norm"`` or ``"per_exit"``.
        rank: channels of the corrections of ``"per_exit"``.
        read_width: of a UNet, channels of what its output layers read; None for any other denoiser.

    Raises:
        ConfigError: for other heads, no exit at all, or not one number for each.
    """

    @register_to_config
    def __init__(
        self,
        backbone: str,
        units: int,
        exits: list[str],
        width: int | list[int],
        outputs: int | list[int],
        extra_tokens: int = 0,
        timestep_aware: bool = True,
        heads: str = "shared",
        rank: int = 32,
        read_width: int | None = None,
    ) -> None:
        super().__init__()
        if heads not in HEADS:
            raise ConfigError(f"heads is one of {', '.join(map(repr, HEADS))}; got {heads!r}.")
        if not exits or len(set(exits)) != len(exits):
            raise ConfigError(f"exits are the names of units, each once and at least one; got {exits!r}.")
        if read_width is not None:
            check_unet_heads(heads)
        widths, numbers = ([size] * len(exits) if isinstance(size, int) else size for size in (width, outputs))
        if not len(widths) == len(numbers) == len(exits):
            raise ConfigError(
                f"width and outputs have one number for each of {len(exits)} exits; got {width}, {outputs}."
            )
        self.uncertainty = nn.ModuleList(
            UncertaintyModule(*sizes, timestep_aware) for sizes in zip(widths, numbers, strict=True)
        )

        self.exit_heads = nn.ModuleList(_head(heads, size, rank, read_width) for size in widths)
        self._timesteps: torch.Tensor | None = None

    @property
    def exits(self) -> list[str]:
        """Names of the units before which a sample may stop."""
        return list(self.config["exits"])

    def tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The tokens of a hidden state that the prediction is made of, shape ``(batch, tokens, width)``."""
        if self.config["read_width"] is not None:
            return hidden_states.flatten(2).transpose(1, 2)
        return hidden_states[:, self.config["extra_tokens"] :]

    def maps(self, exit: int, hidden_states: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """One exit's uncertainty, float32 of shape ``(batch, tokens, outputs)``.

        Args:
            exit: number of the exit.
            hidden_states: what its unit is about to read, shape ``(batch, all tokens, width)``; in a UNet
                ``(batch, width, height, width)``.
            timesteps: shape ``(batch,)``.
        """
        module, arguments = self._asked(exit, hidden_states, timesteps)
        uncertainty: torch.Tensor = module(*arguments)
        return uncertainty

    def score(
        self, exit: int, hidden_states: torch.Tensor, timesteps: torch.Tensor, steps: Steps | None = None
    ) -> torch.Tensor:
        """One exit's mean uncertainty for each sample, in (0, 1), float32 of shape ``(batch,)``.

        Args:
            exit: number of the exit.
            hidden_states: as of `maps`.
            timesteps: shape ``(batch,)``.
            steps: the operations that may be used; None for torch's.
        """
        module, arguments = self._asked(exit, hidden_states, timesteps)
        return module.score(*arguments, steps or Steps())

    def _asked(
        self, exit: int, hidden_states: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[UncertaintyModule, tuple[torch.Tensor, torch.Tensor]]:
        """One exit's module, on the hidden state's device, and what it reads."""
        if self.device != hidden_states.device:
            self.to(hidden_states.device)
        module = self.uncertainty[exit]
        assert isinstance(module, UncertaintyModule)
        return module, (self.tokens(hidden_states), self._time(timesteps))

    def _time(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps' sinusoids, made once for all exits of a call, which hand over the same tensor."""
        if self._timesteps is not timesteps:
            self._timesteps, self._sinusoids = timesteps, sinusoids(timesteps)
        return self._sinusoids

    def heads_by_unit(self) -> Mapping[str, nn.Module]:
        """The exits' own heads by the name of the unit they stand before; none where the model's are shared."""
        return {} if self.config["heads"] == "shared" else dict(zip(self.exits, self.exit_heads, strict=True))

    def check(self, backbone: Backbone) -> None:
        """Refuse a denoiser that they were not made for.

        Raises:
            ProfileMismatchError: naming what differs.
        """
        made_for = self.config["backbone"], self.config["units"]
        found = backbone.class_name, len(backbone.units)
        missing = set(self.exits) - set(backbone.names)
        if made_for != found or missing:
            here = f"; it has no {', '.join(sorted(missing))}" if missing else ""
            raise ProfileMismatchError(
                f"These uncertainty modules are for {made_for[0]} of {made_for[1]} units, this denoiser is "
                f"{found[0]} of {found[1]}{here}. Train modules for it: fastdiff train-uem --help."
            )


def load_modules(folder: str | os.PathLike[str]) -> UncertaintyModules:
    """Read what ``UncertaintyModules.save_pretrained`` wrote.

    Raises:
        ConfigError: if the folder holds none, or they are damaged or incomplete.
    """
    try:
        # A damaged file is whatever safetensors and diffusers say about it.
        loaded, report = UncertaintyModules.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ConfigError(
            f"{os.fspath(folder)!r} holds no uncertainty modules (UncertaintyModules.save_pretrained): {error}"
        ) from error
    if missing := report["missing_keys"]:
        raise ConfigError(
            f"The uncertainty modules in {os.fspath(folder)!r} lack {', '.join(sorted(missing))}: an exit's module or "
            "head is missing. Train or copy them anew."
        )
    modules: UncertaintyModules = loaded
    return modules.eval()
