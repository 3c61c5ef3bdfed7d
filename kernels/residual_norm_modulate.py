"""What stands between two halves of a transformer block: gated residual, norm, modulation, and an uncertainty head.

The same pass joins the last block that ran with the next one that runs, whatever was skipped between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from fastdiff.kernels.dispatch import (
    KernelInputError,
    Verdict,
    cast,
    check_devices,
    compute_dtype,
    obstacle,
    register,
    use_kernel,
)
from fastdiff.kernels.launch import jit, launch, power_of_two, tl

Norm = Literal["layer", "rms"]
Rounding = Literal["fused", "match_eager"]
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Maybe = torch.Tensor | None
Tensors = tuple[torch.Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]

MAX_WIDTH = 8192
"""A row is held in registers."""


def residual_norm_modulate(
    x: torch.Tensor,
    branch: Maybe = None,
    gate: Maybe = None,
    *,
    norm: Norm | None = "layer",
    weight: Maybe = None,
    bias: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    eps: float = 1e-6,
    uem: tuple[torch.Tensor, torch.Tensor] | None = None,
    rounding: Rounding = "fused",
) -> Results:
    """``r = x + gate * branch``, ``(norm(r) * weight + bias) * (1 + scale) + shift``, and ``sigmoid(r @ w + offset)``.

    Args:
        x: tokens of shape ``(batch, tokens, width)``.
        branch: what attention or feed-forward gave, of x's shape and dtype.
        gate: what the branch is multiplied with; of shape ``(batch, width)``, or anything that broadcasts to x.
        norm: LayerNorm, RMSNorm, or none, over the width.
        weight: the norm's weight, shape ``(width,)``.
        bias: the norm's bias, shape ``(width,)``.
        scale: modulation after the norm, shaped as a gate.
        shift: modulation after the norm, shaped as a gate.
        eps: added to the norm's variance.
        uem: the uncertainty head's weight for the features, shape ``(width,)``, and what it makes of timestep and bias,
            shape ``(batch,)`` or ``(1,)``.
        rounding: ``"fused"`` computes in float32, and rounds the residual and the result. ``"match_eager"`` rounds
            wherever torch's operations do: the residual is bitwise theirs, and only the norm's sums differ in order.

    Returns:
        The residual (x itself without a branch), the normalised one (the residual itself without norm and modulation),
        both in x's dtype, and for an uncertainty head its float32 outputs of shape ``(batch, tokens)``.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    uem_weight, uem_offset = uem if uem is not None else (None, None)
    tensors = check(x, branch, gate, weight, bias, scale, shift, uem_weight, uem_offset, norm, rounding)
    kernel = use_kernel("residual_norm_modulate", supported, *tensors)
    return (run if kernel else residual_norm_modulate_reference)(*tensors, norm, eps, rounding)


def residual_norm_modulate_reference(
    x: torch.Tensor,
    branch: Maybe,
    gate: Maybe,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    uem_weight: Maybe,
    uem_offset: Maybe,
    norm: Norm | None,
    eps: float,
    rounding: Rounding,
) -> Results:
    """`residual_norm_modulate` as a plain expression of checked arguments."""
    exact = compute_dtype(x)
    precision = x.dtype if rounding == "match_eager" else exact
    residual = x
    if branch is not None:
        added = branch.to(precision) if gate is None else gate.to(precision) * branch.to(precision)
        residual = (x.to(precision) + added).to(x.dtype).contiguous()
    normed = hidden = residual.to(precision)
    if norm == "layer":
        normed = F.layer_norm(hidden, hidden.shape[-1:], cast(weight, precision), cast(bias, precision), eps)
    elif norm == "rms":
        variance = hidden.to(exact).square().mean(-1, keepdim=True)
        normed = (hidden.to(exact) * torch.rsqrt(variance + eps)).to(precision)
        normed = normed if weight is None else normed * weight.to(precision)
        normed = normed if bias is None else normed + bias.to(precision)
    normed = normed if scale is None else normed * (1 + scale.to(precision))
    normed = normed if shift is None else normed + shift.to(precision)
    unchanged = norm is None and scale is None and shift is None
    uncertainty = None
    if uem_weight is not None and uem_offset is not None:
        uncertainty = torch.sigmoid(residual.to(exact) @ uem_weight.to(exact) + uem_offset.to(exact)[:, None])
    return residual, residual if unchanged else normed.to(x.dtype).contiguous(), uncertainty


def check(
    x: torch.Tensor,
    branch: Maybe,
    gate: Maybe,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    uem_weight: Maybe,
    uem_offset: Maybe,
    norm: Norm | None,
    rounding: Rounding,
) -> Tensors:
    """The tensors, those of the modulation with x's shape; `KernelInputError` for what there is no result for."""
    name = "residual_norm_modulate"
    if norm not in ("layer", "rms", None) or rounding not in ("fused", "match_eager"):
        raise KernelInputError(
            f"{name}: norm={norm!r}, rounding={rounding!r}; norm is 'layer', 'rms' or None, and rounding 'fused' or "
            "'match_eager'."
        )
    if x.ndim != 3 or not x.is_floating_point():
        raise KernelInputError(f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats (batch, tokens, width).")
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise KernelInputError(
            f"{name}: branch is {branch.dtype} of shape {tuple(branch.shape)}, x {x.dtype} of {tuple(x.shape)}; they "
            "must be equal."
        )
    if gate is not None and branch is None:
        raise KernelInputError(f"{name}: a gate without a branch. Give the branch that it scales.")
    if norm is None and not (weight is None and bias is None):
        raise KernelInputError(f"{name}: weight or bias without a norm. Leave them out, or use scale and shift.")
    vectors = {"weight": weight, "bias": bias, "the uncertainty head's weight": uem_weight}
    for what, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise KernelInputError(f"{name}: {what} has shape {tuple(vector.shape)}; give ({x.shape[-1]},).")
    if uem_offset is not None:
        if uem_offset.numel() not in (1, len(x)) or uem_offset.ndim > 1:
            raise KernelInputError(
                f"{name}: the uncertainty head's offset has shape {tuple(uem_offset.shape)}; give ({len(x)},) or (1,)."
            )
        uem_offset = uem_offset.expand(len(x))
    gate, scale, shift = (
        _as_tokens(what, tensor, x) for what, tensor in (("gate", gate), ("scale", scale), ("shift", shift))
    )
    tensors = (x, branch, gate, weight, bias, scale, shift, uem_weight, uem_offset)
    check_devices(name, *tensors)
    if rounding == "match_eager" and any(tensor.dtype != x.dtype for tensor in tensors[:7] if tensor is not None):
        raise KernelInputError(f"{name}: rounding='match_eager' needs every tensor in x's dtype, {x.dtype}.")
    return tensors


def _as_tokens(what: str, tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A view of a gate, scale or shift in x's shape."""
    if tensor is None:
        return None
    try:
        return (tensor[:, None] if tensor.ndim == 2 else tensor).expand(x.shape)
    except RuntimeError:
        raise KernelInputError(
            f"residual_norm_modulate: {what} has shape {tuple(tensor.shape)}, which does not broadcast to x's "
            f"{tuple(x.shape)}; give (batch, width)."
        ) from None


def supported(x: torch.Tensor, *others: torch.Tensor | None) -> Verdict:
    """Whether the kernel can run on checked tensors."""
    given = [tensor for tensor in (x, *others) if tensor is not None]
    reason = obstacle(*given)
    if not reason and x.shape[-1] > MAX_WIDTH:
        reason = f"the width {x.shape[-1]} is above {MAX_WIDTH}"
    along_width = [tensor for tensor in given if tensor.shape[-1:] == x.shape[-1:] and tensor is not others[-1]]
    if not reason and x.shape[-1] > 1 and any(tensor.stride(-1) != 1 for tensor in along_width):
        reason = "a tensor's last dimension is not contiguous"
    return not reason, reason


def run(
    x: torch.Tensor,
    branch: Maybe,
    gate: Maybe,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    uem_weight: Maybe,
    uem_offset: Maybe,
    norm: Norm | None,
    eps: float,
    rounding: Rounding,
) -> Results:
    """Launch the kernel on arguments that `supported` accepts."""
    batch, tokens, width = x.shape
    residual = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    changed = norm is not None or scale is not None or shift is not None
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if changed else None
    uncertainty = None if uem_weight is None else torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    block = power_of_two(width)
    launch(
        _residual_norm_modulate,
        (batch * tokens if width else 0,),
        x,
        branch,
        gate,
        weight,
        bias,
        scale,
        shift,
        uem_weight,
        uem_offset,
        residual,
        normed,
        uncertainty,
        tokens,
        width,
        eps,
        *_row_strides((x, branch, gate, scale, shift)),
        0 if uem_offset is None else uem_offset.stride(0),
        NORM=norm or "none",
        EAGER=rounding == "match_eager",
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        fp_fusion=rounding == "fused",
    )
    residual = x if residual is None else residual
    return residual, residual if normed is None else normed, uncertainty


def _row_strides(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    """Strides of batch and tokens, one tensor after the other."""
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


@jit
def _residual_norm_modulate(  # type: ignore[no-untyped-def]
    x, branch, gate, weight, bias, scale, shift, uem_weight, uem_offset, residual, normed, uncertainty,
    tokens, width, eps,
    x_batch, x_token, branch_batch, branch_token, gate_batch, gate_token,
    scale_batch, scale_token, shift_batch, shift_token, uem_offset_batch,
    NORM: tl.constexpr, EAGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # tensors may hold more than 2**31 elements
    sample = row // tokens
    token = row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    dtype = x.dtype.element_ty

    hidden = tl.load(x + sample * x_batch + token * x_token + column, inside, 0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + sample * branch_batch + token * branch_token + column, inside, 0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + sample * gate_batch + token * gate_token + column, inside, 0.0).to(tl.float32)
            if EAGER:
                added = added.to(dtype).to(tl.float32)
        kept = (hidden + added).to(dtype)
        tl.store(residual + row * width + column, kept, inside)
        # The norm sees what later blocks will read as the residual.
        hidden = kept.to(tl.float32)

    if uncertainty is not None:
        score = tl.sum(hidden * tl.load(uem_weight + column, inside, 0.0).to(tl.float32), 0)
        score += tl.load(uem_offset + sample * uem_offset_batch).to(tl.float32)
        tl.store(uncertainty + row, tl.sigmoid(score))

    if normed is not None:
        result = hidden
        if NORM == "layer":
            centred = tl.where(inside, hidden - tl.sum(hidden, 0) / width, 0.0)
            result = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        elif NORM == "rms":
            result = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
            if EAGER:
                result = result.to(dtype).to(tl.float32)
        if weight is not None:
            result *= tl.load(weight + column, inside, 0.0).to(tl.float32)
            if EAGER and NORM == "rms":
                result = result.to(dtype).to(tl.float32)
        if bias is not None:
            result += tl.load(bias + column, inside, 0.0).to(tl.float32)
        if EAGER:
            result = result.to(dtype).to(tl.float32)
        if scale is not None:
            factor = 1.0 + tl.load(scale + sample * scale_batch + token * scale_token + column, inside, 0.0).to(
                tl.float32
            )
            if EAGER:
                factor = factor.to(dtype).to(tl.float32)
            result *= factor
            if EAGER:
                result = result.to(dtype).to(tl.float32)
        if shift is not None:
            result += tl.load(shift + sample * shift_batch + token * shift_token + column, inside, 0.0).to(tl.float32)
        tl.store(normed + row * width + column, result.to(dtype), inside)


def _operator(
    x: torch.Tensor,
    branch: Maybe,
    gate: Maybe,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    uem_weight: Maybe,
    uem_offset: Maybe,
    norm: Norm | None,
    eps: float,
    rounding: Rounding,
    fake: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An operator's results may be neither missing nor its arguments: those are empty tensors instead."""
    tensors = check(x, branch, gate, weight, bias, scale, shift, uem_weight, uem_offset, norm, rounding)
    kernel = not fake and use_kernel("residual_norm_modulate", supported, *tensors)
    results = (run if kernel else residual_norm_modulate_reference)(*tensors, norm, eps, rounding)
    residual, normed, uncertainty = results
    return (
        x.new_empty(0) if residual is x else residual,
        x.new_empty(0) if normed is residual else normed,
        x.new_empty(0, dtype=torch.float32) if uncertainty is None else uncertainty,
    )


register(
    "residual_norm_modulate(Tensor x, Tensor? branch, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? uem_weight, Tensor? uem_offset, str? norm, float eps, str rounding) "
    "-> (Tensor, Tensor, Tensor)",
    _operator,
    partial(_operator, fake=True),
)
