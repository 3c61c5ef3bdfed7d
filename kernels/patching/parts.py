"""The expressions that replaced forwards are made of: one kernel where it can run, the model's own modules elsewhere.

Own modules rather than a kernel's reference, because they are as fast as torch has it and change no bit. The reference
runs where ``FASTDIFF_KERNELS=torch`` asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import nn

from fastdiff.kernels import exit_head, geglu, group_norm_act, residual_norm_modulate, skip_shortcut
from fastdiff.kernels.concatenation import Concatenated, Factor
from fastdiff.kernels.dispatch import fused
from fastdiff.kernels.residual_norm_modulate import Norm, Rounding

Maybe = torch.Tensor | None

NORMS: dict[type[nn.Module], Norm] = {nn.LayerNorm: "layer", FP32LayerNorm: "layer", RMSNorm: "rms"}


def plain(module: nn.Module) -> bool:
    """Whether calling a module does nothing beside its class's forward, so that its weights may be read instead.

    Offloading, for example, hooks modules to load their weights.
    """
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def join(
    x: torch.Tensor,
    branch: Maybe = None,
    gate: Maybe = None,
    norm: nn.Module | None = None,
    scale: Maybe = None,
    shift: Maybe = None,
    rounding: Rounding = "fused",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``r = x + gate * branch`` and ``norm(r) * (1 + scale) + shift``.

    Args:
        x: tokens of shape ``(batch, tokens, width)``.
        branch: what attention or feed-forward gave.
        gate: what the branch is multiplied with, of shape ``(batch, width)`` or ``(batch, 1, width)``.
        norm: the norm over the width.
        scale: modulation after the norm, shaped as a gate.
        shift: modulation after the norm, shaped as a gate.
        rounding: as in `residual_norm_modulate`.

    Returns:
        Both; the second is the first where there is neither norm nor modulation.
    """
    if gate is not None and gate.ndim == 2:
        gate = gate[:, None]
    if scale is not None and shift is not None and scale.ndim == 2:
        scale, shift = scale[:, None], shift[:, None]
    kind = None if norm is None else NORMS.get(type(norm))
    if (norm is None and gate is not None) or (norm is not None and kind is not None and plain(norm)):
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        parts = (branch, gate, weight, bias, scale, shift)
        if _rows(x, *parts) and fused(
            "residual_norm_modulate", residual_norm_modulate.supported, x, *parts, None, None
        ):
            residual, normed, _ = residual_norm_modulate.residual_norm_modulate(
                x,
                branch,
                gate,
                norm=kind,
                weight=weight,
                bias=bias,
                scale=scale,
                shift=shift,
                eps=getattr(norm, "eps", 1e-6),
                rounding=rounding,
            )
            return residual, normed
    if branch is not None:
        # The branch comes first: the sum takes its memory layout, and a model's first hidden state may be transposed.
        x = (branch if gate is None else gate * branch) + x
    normed = x if norm is None else norm(x)
    if scale is not None:
        normed = normed * (1 + scale)
    return x, normed if shift is None else normed + shift


def _rows(x: torch.Tensor, *others: Maybe) -> bool:
    """Whether tensors have one dtype, and rows that lie in one piece."""
    alike = (part is None or (part.dtype == x.dtype and part.stride(-1) == 1) for part in (x, *others))
    return x.ndim == 3 and all(alike)


def norm_silu(
    x: torch.Tensor,
    norm: nn.GroupNorm,
    add: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    rounding: Rounding = "fused",
) -> torch.Tensor:
    """``silu(norm(x + add) * (1 + scale) + shift)``.

    Args:
        x: features of shape ``(batch, channels, height, width)``; parts that are not put together stay so.
        norm: the norm.
        add: shape ``(batch, channels)`` or ``(1, channels)``, as scale and shift.
        scale: modulation after the norm.
        shift: modulation after the norm.
        rounding: the kernel only knows ``"fused"``; otherwise torch's own operations run.
    """
    weight, bias = norm.weight, norm.bias
    alike = all(part is None or part.dtype == x.dtype for part in (weight, bias, add, scale, shift))
    if rounding == "fused" and alike and plain(norm):
        vectors = [None if part is None else part.expand(len(x), -1) for part in (add, scale, shift)]
        first, skip, factor = _apart(x)
        if fused("group_norm_act", group_norm_act.supported, first, skip, weight, bias, factor, *vectors):
            add, scale, shift = vectors
            return group_norm_act.group_norm_act(
                first,
                norm.num_groups,
                weight,
                bias,
                skip=skip,
                skip_scale=factor,
                add=add,
                scale=scale,
                shift=shift,
                eps=norm.eps,
            )
    add, scale, shift = (None if part is None else part[:, :, None, None] for part in (add, scale, shift))
    x = norm(x if add is None else x + add)
    x = x if scale is None else x * (1 + scale)
    return F.silu(x if shift is None else x + shift)


def shortcut(x: torch.Tensor, convolution: Any, rounding: Rounding = "fused") -> torch.Tensor:
    """A 1×1 convolution; of features and a skip that are not put together, with one matrix for each.

    Args:
        x: features of shape ``(batch, channels, height, width)``.
        convolution: the layer.
        rounding: the kernel only knows ``"fused"``; otherwise the layer runs.
    """
    first, skip, factor = _apart(x)
    # In float32 torch's convolutions use fewer digits, and are faster, than a product that keeps them.
    if skip is not None and rounding == "fused" and x.dtype != torch.float32 and _pointwise(convolution):
        weight, bias = convolution.weight, convolution.bias
        alike = all(part is None or part.dtype == x.dtype for part in (weight, bias))
        if alike and fused("skip_shortcut", skip_shortcut.supported, first, skip, weight.flatten(1), bias, factor):
            return skip_shortcut.skip_shortcut(first, skip, weight, bias, skip_scale=factor)
    return convolution(x)


def _apart(x: torch.Tensor) -> tuple[torch.Tensor, Maybe, Factor]:
    """Features, a skip beside them that is not put together with them, and its factor."""
    return x.parts if isinstance(x, Concatenated) else (x, None, 1.0)


def _pointwise(layer: Any) -> bool:
    """Whether a layer multiplies every pixel with a matrix, and does nothing else."""
    known = type(layer) is nn.Conv2d and plain(layer)
    ones = known and {*layer.kernel_size, *layer.stride, layer.groups} == {1}
    return ones and layer.padding in ("valid", (0, 0))


def patches_together(
    x: torch.Tensor,
    norm: Any,
    scale: torch.Tensor,
    shift: torch.Tensor,
    matrix: Any,
    patch: int,
    rounding: Rounding = "fused",
) -> torch.Tensor:
    """The output layers of a transformer for square images: ``unpatchify(matrix(norm(x) * (1 + scale) + shift))``.

    Args:
        x: tokens of shape ``(batch, tokens, width)``, row by row.
        norm: the norm over the width.
        scale: modulation after the norm, shape ``(batch, width)``.
        shift: modulation after the norm, shape ``(batch, width)``.
        matrix: a linear layer, with channels as its outputs' fastest index.
        patch: height and width of a patch in pixels.
        rounding: the kernel only knows ``"fused"``; otherwise a linear layer of torch's runs.

    Returns:
        Images of shape ``(batch, channels, height, width)``.
    """
    image = fused_patches(x, norm, scale, shift, matrix, patch, rounding)
    if image is not None:
        return image
    columns = int(x.shape[1] ** 0.5)
    patches = matrix(join(x, norm=norm, scale=scale, shift=shift, rounding=rounding)[1])
    patches = patches.reshape(-1, columns, columns, patch, patch, patches.shape[-1] // patch**2)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def fused_patches(
    x: torch.Tensor, norm: Any, scale: Maybe, shift: Maybe, matrix: Any, patch: int, rounding: Rounding
) -> Maybe:
    """`patches_together` as one operation, with or without a modulation; None where that does not run."""
    columns = int(x.shape[1] ** 0.5)
    known = type(norm) is nn.LayerNorm and type(matrix) is nn.Linear and plain(norm) and plain(matrix)
    if rounding == "fused" and known and columns**2 == x.shape[1]:
        tensors = (matrix.weight, matrix.bias, norm.weight, norm.bias, scale, shift)
        if _rows(x, *tensors) and fused("exit_head", exit_head.supported, x, *tensors):
            return exit_head.exit_head(
                x,
                matrix.weight,
                matrix.bias,
                columns=columns,
                patch=patch,
                norm_weight=norm.weight,
                norm_bias=norm.bias,
                scale=scale,
                shift=shift,
                eps=norm.eps,
            )
    return None


def gated(hidden: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """The first half of the last dimension times GELU of the second."""
    if fused("geglu", geglu.supported, hidden):
        return geglu.geglu(hidden, rounding=rounding)
    hidden, gate = hidden.chunk(2, dim=-1)
    return hidden * F.gelu(gate)
