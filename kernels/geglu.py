"""What a feed-forward layer does between its two matrices: GEGLU and GELU."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from fastdiff.kernels.dispatch import KernelInputError, Verdict, compute_dtype, obstacle, register, use_kernel
from fastdiff.kernels.launch import jit, launch, tl

Approximate = Literal["none", "tanh"]
Rounding = Literal["fused", "match_eager"]


def geglu(x: torch.Tensor, *, approximate: Approximate = "none", rounding: Rounding = "fused") -> torch.Tensor:
    """The first half of x's last dimension times GELU of the second.

    Args:
        x: what the first matrix gave, shape ``(..., 2 * hidden)``.
        approximate: ``"none"`` for the error function, ``"tanh"`` for its usual approximation.
        rounding: ``"match_eager"`` rounds GELU to x's dtype before the product, as torch's operations do.

    Returns:
        A tensor of shape ``(..., hidden)`` and x's dtype.

    Raises:
        KernelInputError: if x has an odd last dimension or no floating-point dtype, or an option is unknown.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    _check("geglu", x, approximate, rounding)
    if x.shape[-1] % 2:
        raise KernelInputError(f"geglu: x has shape {tuple(x.shape)}; its last dimension must be even.")
    return _dispatched("geglu", x, True, approximate, rounding)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh approximation.

    Args:
        x: a tensor of shape ``(..., width)``.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        KernelInputError: if x has no floating-point dtype.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    _check("gelu_tanh", x, "tanh", "fused")
    return _dispatched("gelu_tanh", x, False, "tanh", "fused")


def geglu_reference(x: torch.Tensor, gated: bool, approximate: Approximate, rounding: Rounding) -> torch.Tensor:
    """`geglu`, or GELU alone where it is not gated, as a plain expression."""
    precision = x.dtype if rounding == "match_eager" else compute_dtype(x)
    hidden, gate = x.to(precision).chunk(2, dim=-1) if gated else (None, x.to(precision))
    activated = F.gelu(gate, approximate=approximate)
    return (activated if hidden is None else hidden * activated).to(x.dtype).contiguous()


def _check(name: str, x: torch.Tensor, approximate: str, rounding: str) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise KernelInputError(f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats of shape (..., width).")
    if approximate not in ("none", "tanh") or rounding not in ("fused", "match_eager"):
        raise KernelInputError(
            f"{name}: approximate={approximate!r}, rounding={rounding!r}; approximate is 'none' or 'tanh', rounding "
            "'fused' or 'match_eager'."
        )


def _dispatched(name: str, x: torch.Tensor, gated: bool, approximate: Approximate, rounding: Rounding) -> torch.Tensor:
    return (run if use_kernel(name, supported, x) else geglu_reference)(x, gated, approximate, rounding)


def supported(x: torch.Tensor) -> Verdict:
    """Whether the kernel can run on a checked tensor."""
    reason = obstacle(x)
    if not reason and _row_stride(x) is None:
        reason = "the rows do not lie at equal distances with a contiguous last dimension"
    return not reason, reason


def run(x: torch.Tensor, gated: bool, approximate: Approximate, rounding: Rounding) -> torch.Tensor:
    """Launch the kernel on a tensor that `supported` accepts."""
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    result = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    rows = result.numel() // max(width, 1)
    block = 1024
    blocks = -(-width // block)
    launch(
        _geglu,
        (rows * blocks,),
        result,
        x,
        width,
        blocks,
        _row_stride(x),
        GATED=gated,
        TANH=approximate == "tanh",
        EAGER=rounding == "match_eager",
        BLOCK=block,
        num_warps=4,
        fp_fusion=rounding == "fused",
    )
    return result


def _row_stride(x: torch.Tensor) -> int | None:
    """The distance between rows along the last dimension; None if there is no such number."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    outer = [(stride, size) for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size != 1]
    for (stride, _), (inner_stride, inner_size) in pairwise(outer):
        if stride != inner_stride * inner_size:
            return None
    return outer[-1][0] if outer else x.shape[-1]


@jit
def _geglu(  # type: ignore[no-untyped-def]
    result, x, width, blocks, row_stride,
    GATED: tl.constexpr, TANH: tl.constexpr, EAGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)  # tensors may hold more than 2**31 elements
    start = (program % blocks) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < width
    x += row * row_stride
    dtype = x.dtype.element_ty
    gate = tl.load(x + width + column if GATED else x + column, inside, 0.0).to(tl.float32)
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which the interpreter has.
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = 0.5 * gate * (1.0 + tl.erf(0.7071067811865476 * gate))
    if GATED:
        if EAGER:
            activated = activated.to(dtype).to(tl.float32)
        activated *= tl.load(x + column, inside, 0.0).to(tl.float32)
    tl.store(result + row * width + column, activated.to(dtype), inside)


register(
    "geglu(Tensor x, str approximate, str rounding) -> Tensor",
    lambda x, approximate, rounding: geglu(x, approximate=approximate, rounding=rounding),
    lambda x, approximate, rounding: geglu_reference(x, True, approximate, rounding),
)
register(
    "gelu_tanh(Tensor x) -> Tensor",
    gelu_tanh,
    partial(geglu_reference, gated=False, approximate="tanh", rounding="fused"),
)
