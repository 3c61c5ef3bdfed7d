"""What stands between a query's or key's projection and attention: RMSNorm over each head, and rotary embedding."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from fastdiff.kernels.dispatch import (
    KernelInputError,
    Verdict,
    check_devices,
    compute_dtype,
    obstacle,
    register,
    use_kernel,
)
from fastdiff.kernels.launch import jit, launch, power_of_two, tl

Pairs = Literal["neighbours", "halves"]
Rounding = Literal["fused", "match_eager"]
Maybe = torch.Tensor | None

TILE = 4096
"""Elements that a program holds."""
MAX_WIDTH = 1024
"""Width of the widest head whose pairs a program holds."""


def qk_norm_rope(
    x: torch.Tensor,
    weight: Maybe = None,
    cos: Maybe = None,
    sin: Maybe = None,
    *,
    norm: bool = True,
    pairs: Pairs = "neighbours",
    eps: float = 1e-6,
    rounding: Rounding = "fused",
    out: Maybe = None,
) -> torch.Tensor:
    """``n = rms_norm(x) * weight`` over each head, then ``n * cos + rotated(n) * sin``.

    Args:
        x: queries or keys of shape ``(batch, tokens, heads, width)``; a transposed view will do, as long as a head lies
            in one piece.
        weight: the norm's weight, shape ``(width,)``.
        cos: of shape ``(tokens, width)``; None for the norm alone.
        sin: of shape ``(tokens, width)``.
        norm: whether there is a norm.
        pairs: which channels turn into each other: ``"neighbours"``, as in Flux, or those half a head apart,
            ``"halves"``.
        eps: added to the mean of squares.
        rounding: ``"match_eager"`` rounds what the norm gives to x's dtype before it is turned.
        out: where to write, of x's shape and dtype: a part of the tensor of a joint sequence, for example, which then
            needs no concatenation.

    Returns:
        A tensor of x's shape and dtype; `out` if that was given.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    check(x, weight, cos, sin, norm, pairs, rounding, out)
    if use_kernel("qk_norm_rope", supported, x, out, weight, cos, sin):
        return run(x, weight, cos, sin, norm, pairs, eps, rounding, out)
    result = qk_norm_rope_reference(x, weight, cos, sin, norm, pairs, eps, rounding)
    return result if out is None else out.copy_(result)


def qk_norm_rope_reference(
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    norm: bool,
    pairs: Pairs,
    eps: float,
    rounding: Rounding,
) -> torch.Tensor:
    """`qk_norm_rope` as a plain expression of checked arguments."""
    precision = compute_dtype(x)
    hidden = x.to(precision)
    if norm:
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
        hidden = hidden if weight is None else hidden * weight.to(precision)
        hidden = hidden.to(x.dtype).to(precision) if rounding == "match_eager" else hidden
    if cos is not None and sin is not None:
        if pairs == "neighbours":
            first, second = hidden.unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([-second, first], dim=-1).flatten(-2)
        else:
            first, second = hidden.chunk(2, dim=-1)
            rotated = torch.cat([-second, first], dim=-1)
        hidden = hidden * cos[:, None].to(precision) + rotated * sin[:, None].to(precision)
    return hidden.to(x.dtype, copy=True).contiguous()


def check(
    x: torch.Tensor, weight: Maybe, cos: Maybe, sin: Maybe, norm: bool, pairs: str, rounding: str, out: Maybe
) -> None:
    """Raise `KernelInputError` for arguments that `qk_norm_rope` has no result for."""
    name = "qk_norm_rope"
    if pairs not in ("neighbours", "halves") or rounding not in ("fused", "match_eager"):
        raise KernelInputError(
            f"{name}: pairs={pairs!r}, rounding={rounding!r}; pairs is 'neighbours' or 'halves', rounding 'fused' or "
            "'match_eager'."
        )
    if x.ndim != 4 or not x.is_floating_point():
        raise KernelInputError(
            f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats of shape (batch, tokens, heads, width)."
        )
    if weight is not None and (not norm or weight.shape != x.shape[-1:]):
        raise KernelInputError(
            f"{name}: weight has shape {tuple(weight.shape)} and norm is {norm}; with a norm, give ({x.shape[-1]},)."
        )
    if (cos is None) != (sin is None):
        raise KernelInputError(f"{name}: cos without sin, or sin without cos. Give both or none.")
    for what, angle in (("cos", cos), ("sin", sin)):
        if angle is not None and (angle.shape != (x.shape[1], x.shape[3]) or x.shape[3] % 2):
            raise KernelInputError(
                f"{name}: {what} has shape {tuple(angle.shape)}, x {tuple(x.shape)}; give (tokens, width), an even "
                "width."
            )
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise KernelInputError(
            f"{name}: out is {out.dtype} of shape {tuple(out.shape)}, x {x.dtype} of {tuple(x.shape)}; they must be "
            "equal."
        )
    check_devices(name, x, weight, cos, sin, out)


def supported(x: torch.Tensor, *others: Maybe) -> Verdict:
    """Whether the kernel can run on checked tensors."""
    given = [tensor for tensor in (x, *others) if tensor is not None]
    reason = obstacle(*given)
    if not reason and x.shape[-1] > MAX_WIDTH:
        reason = f"the width of a head, {x.shape[-1]}, is above {MAX_WIDTH}"
    if not reason and x.shape[-1] > 1 and any(tensor.stride(-1) != 1 for tensor in given):
        reason = "a tensor's last dimension is not contiguous"
    return not reason, reason


def run(
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    norm: bool,
    pairs: Pairs,
    eps: float,
    rounding: Rounding,
    out: Maybe,
) -> torch.Tensor:
    """Launch the kernel on arguments that `supported` accepts."""
    batch, tokens, heads, width = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    block = max(power_of_two(width), 2)
    block_heads = max(min(power_of_two(heads), TILE // block), 1)
    parts = -(-heads // block_heads)
    launch(
        _qk_norm_rope,
        (batch * tokens * parts if width else 0,),
        result,
        x,
        weight,
        cos,
        sin,
        tokens,
        heads,
        width,
        parts,
        eps,
        *x.stride()[:3],
        *result.stride()[:3],
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        NORM=norm,
        HALVES=pairs == "halves" and cos is not None,  # a norm alone has no pairs, and may have an odd width
        EAGER=rounding == "match_eager",
        HEADS=block_heads,
        HALF=block // 2,
        num_warps=4,
        fp_fusion=rounding == "fused",
    )
    return result


@jit
def _pair(  # type: ignore[no-untyped-def]
    start, halves, whole, row, width, HALVES: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first and the second channel of every pair, in float32, for rows that begin at `row`."""
    index = tl.arange(0, HALF)
    if HALVES:
        first = tl.load(start + row + index[None, :], halves, 0.0).to(tl.float32)
        second = tl.load(start + row + width // 2 + index[None, :], halves, 0.0).to(tl.float32)
        return first, second
    else:
        column = tl.arange(0, 2 * HALF)
        both = tl.load(start + row + column[None, :], whole, 0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (HEADS, HALF, 2)))


@jit
def _qk_norm_rope(  # type: ignore[no-untyped-def]
    result, x, weight, cos, sin, tokens, heads, width, parts, eps,
    x_batch, x_token, x_head, result_batch, result_token, result_head, cos_token, sin_token,
    NORM: tl.constexpr, HALVES: tl.constexpr, EAGER: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)  # tensors may hold more than 2**31 elements
    sample = row // tokens
    token = row % tokens
    head = ((program % parts) * HEADS + tl.arange(0, HEADS))[:, None]
    index = tl.arange(0, HALF)[None, :]
    column = tl.arange(0, 2 * HALF)[None, :]
    halves = (head < heads) & (index < width // 2)
    whole = (head < heads) & (column < width)
    one = tl.zeros((1, 1), tl.int32)
    dtype = x.dtype.element_ty

    first, second = _pair(
        x + sample * x_batch + token * x_token, halves, whole, head * x_head, width, HALVES, HEADS, HALF
    )
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        factor = tl.rsqrt(squares / width + eps)[:, None]
        first *= factor
        second *= factor
        if weight is not None:
            first_weight, second_weight = _pair(weight, index < width // 2, column < width, one, width, HALVES, 1, HALF)
            first *= first_weight
            second *= second_weight
        if EAGER:
            first = first.to(dtype).to(tl.float32)
            second = second.to(dtype).to(tl.float32)
    if cos is not None:
        first_cos, second_cos = _pair(
            cos + token * cos_token, index < width // 2, column < width, one, width, HALVES, 1, HALF
        )
        first_sin, second_sin = _pair(
            sin + token * sin_token, index < width // 2, column < width, one, width, HALVES, 1, HALF
        )
        turned = first * first_cos - second * first_sin
        second = second * second_cos + first * second_sin
        first = turned
    result += sample * result_batch + token * result_token
    if HALVES:
        tl.store(result + head * result_head + index, first.to(dtype), halves)
        tl.store(result + head * result_head + width // 2 + index, second.to(dtype), halves)
    else:
        both = tl.reshape(tl.join(first, second), (HEADS, 2 * HALF))
        tl.store(result + head * result_head + column, both.to(dtype), whole)


def _operator(
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    norm: bool,
    pairs: Pairs,
    eps: float,
    rounding: Rounding,
    fake: bool = False,
) -> torch.Tensor:
    if fake:
        return x.new_empty(x.shape)
    return qk_norm_rope(x, weight, cos, sin, norm=norm, pairs=pairs, eps=eps, rounding=rounding)


register(
    "qk_norm_rope(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, bool norm, str pairs, float eps, str rounding) "
    "-> Tensor",
    _operator,
    partial(_operator, fake=True),
)
