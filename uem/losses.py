"""What uncertainty modules, exit heads and denoisers learn from (DeeDiff, arXiv 2309.17074, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastdiff.errors import ConfigError

UAL = ("detached", "paper", "official", "stopping")
"""How the layer-wise loss weighs its exits, see `layerwise_loss`."""


def patches(values: torch.Tensor, tokens: int) -> torch.Tensor:
    """A map of the prediction's shape, sorted by the tokens that make it: square patches, row by row.

    Args:
        values: shape ``(..., channels, height, width)``.
        tokens: number of tokens.

    Returns:
        Shape ``(..., tokens, numbers of a token)``.

    Raises:
        ConfigError: if the map does not consist of so many square patches.
    """
    height, width = values.shape[-2:]
    patch = math.isqrt(height * width // tokens) if tokens else 0
    if not patch or (height // patch) * (width // patch) != tokens or height % patch or width % patch:
        raise ConfigError(f"A map of {height} x {width} does not consist of {tokens} square patches.")
    split = values.unflatten(-1, (width // patch, patch)).unflatten(-3, (height // patch, patch))
    # (..., channels, rows, patch, columns, patch) to (..., rows, columns, channels, patch, patch)
    *lead, channels, rows, down, columns, across = range(split.ndim)
    return split.permute(*lead, rows, columns, channels, down, across).flatten(-5, -4).flatten(-3)


def error_label(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What the uncertainty should be: ``tanh |prediction - target|``, in [0, 1), without gradient (equation 6).

    Args:
        predictions: of the exits, shape ``(exits, batch, ...)``.
        target: what is right, shape ``(batch, ...)``.
    """
    return (predictions.detach() - target.detach()).float().abs().tanh()


def token_labels(predictions: torch.Tensor, target: torch.Tensor, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each exit's map should be: `error_label`, sorted by the tokens of the exit.

    Args:
        predictions: of the exits, shape ``(exits, batch, ...)``.
        target: what is right, ``(batch, channels, height, width)``, or in tokens ``(batch, tokens, channels)``.
        maps: of each exit, shape ``(batch, tokens, numbers of a token)``.

    Raises:
        ConfigError: if an exit's tokens are no square patches of the target.
    """
    errors = error_label(predictions, target)
    if target.ndim == 3:
        return list(errors)
    return [patches(error, map_.shape[1]) for error, map_ in zip(errors, maps, strict=True)]


def row_errors(predictions: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each row, times its weight.

    Args:
        predictions: shape ``(batch, ...)``, or of several exits ``(exits, batch, ...)``.
        target: what is right, shape ``(batch, ...)``.
        weights: of the rows, shape ``(batch,)``; None for all alike.

    Returns:
        float32 of shape ``(batch,)`` or ``(exits, batch)``.
    """
    errors = (predictions.float() - target.float()).square().flatten(1 - target.ndim).mean(-1)
    return errors if weights is None else errors * weights


def uncertainty_loss(
    maps: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor | Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean squared error of uncertainties, over exits, samples and numbers; trains the uncertainty modules alone.

    Args:
        maps: the modules' uncertainties of each exit, shape ``(batch, tokens, numbers of a token)``.
        labels: of each exit, same shape, such as `token_labels`.
    """
    errors = [(map_ - label.detach()).square().mean() for map_, label in zip(maps, labels, strict=True)]
    return torch.stack(errors).mean()


def layerwise_loss(
    predictions: torch.Tensor,
    target: torch.Tensor,
    uncertainty: torch.Tensor,
    mode: str = "detached",
    largest_threshold: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Errors of all exits, those weighing more that are certain (the uncertainty-aware layer-wise loss).

    Args:
        predictions: of the exits, shape ``(exits, batch, ...)``.
        target: what is right, shape ``(batch, ...)``.
        uncertainty: of each exit and sample, shape ``(exits, batch)``.
        mode: ``"detached"``: weights ``1 - u`` of each sample, which add up to one and pass no gradient on, so that no
            module learns to be uncertain of what is hard. ``"paper"``: weights ``1 - u`` as they are, added up over the
            exits. ``"official"``: as the released code has it, weights of the batch's mean certainty, which add up to
            one; they let the gradient through to the modules, and couple the samples. ``"stopping"``: half of
            all weight evenly, half as often as a sample would stop there (`stopping_weights`), without gradient, so
            that what is used is what is learned.
        largest_threshold: of ``"stopping"``.
        weights: how much each row's errors count, shape ``(batch,)``; None for all alike.

    Raises:
        ConfigError: for another mode.
    """
    if mode not in UAL:
        raise ConfigError(f"ual is one of {', '.join(map(repr, UAL))}; got {mode!r}.")
    errors = row_errors(predictions, target, weights)
    certainty = 1 - uncertainty
    if mode == "paper":
        return (certainty * errors).sum(0).mean()
    if mode == "official":
        mean = certainty.mean(1)
        return ((mean / mean.sum())[:, None] * errors).sum(0).mean()
    if mode == "stopping":
        stopping = stopping_weights(uncertainty.detach(), largest_threshold)
        shares = (stopping + 1 / len(stopping)) / 2  # an exit that learned nothing would never be stopped at
    else:
        shares = certainty.detach() / certainty.detach().sum(0)
    return (shares * errors).sum(0).mean()


def stopping_weights(uncertainty: torch.Tensor, largest_threshold: float) -> torch.Tensor:
    """How often each sample stops at each exit, under a threshold drawn evenly from 0 to the largest.

    It stops at the first exit below the threshold: at exits below all earlier ones only, as often as they are so.

    Args:
        uncertainty: of each exit and sample, shape ``(exits, batch)``.
        largest_threshold: in (0, 1].

    Returns:
        Shares of the same shape; what a sample's lack to 1 goes through to the end.
    """
    least = uncertainty.clamp(max=largest_threshold).cummin(0).values
    before = torch.cat([torch.full_like(least[:1], largest_threshold), least[:-1]])
    return (before - least) / largest_threshold


def feature_loss(hidden: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """How far hidden states are from others, each on the other's own scale: ``|h - f|^2 / |f|^2`` (arXiv 2404.11098).

    Features of different depths differ in size by orders of magnitude, which would decide who is learned from.

    Args:
        hidden: those that learn, shape ``(..., batch, tokens, width)``.
        full: those that are learned from, without gradient; same shape, or without the leading dimensions.
    """
    teacher = full.detach().float()
    distance = (hidden.float() - teacher).square().flatten(-2).sum(-1)
    return (distance / teacher.square().flatten(-2).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()
