"""Sums of tensors with a weight for each, in one pass.

A guided scheduler step, the reuse of a cached residual and a forecast from several are all such sums. Their weights
(`fastdiff.kernels.coefficients`) stay in device memory, so that a captured graph can be replayed with other weights.
"""

from __future__ import annotations

from functools import reduce

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
from fastdiff.kernels.launch import jit, launch, tl

MAX_TENSORS = 6


def lincomb(coefficients: torch.Tensor, *tensors: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weighted sum of up to six tensors, summed in float32 (float64 if any tensor is) and rounded once.

    Args:
        coefficients: weights of shape ``(tensors,)``, or ``(batch, tensors)`` for one set per sample.
        *tensors: tensors of equal shape ``(batch, ...)``.
        out: where to write; may be one of the tensors.

    Returns:
        The sum, in the dtype that the tensors promote to.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    check(coefficients, tensors, out)
    if use_kernel("lincomb", supported, coefficients, tensors, out):
        return run(coefficients, tensors, out)
    result = lincomb_reference(coefficients, *tensors)
    return result if out is None else out.copy_(result)


def lincomb_reference(coefficients: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """`lincomb` as a plain expression."""
    precision = compute_dtype(*tensors)
    weights = coefficients.to(precision).unbind(-1)
    if coefficients.ndim == 2:
        weights = tuple(weight.view(-1, *[1] * (tensors[0].ndim - 1)) for weight in weights)
    terms = (weight * tensor.to(precision) for weight, tensor in zip(weights, tensors, strict=True))
    return reduce(torch.add, terms).to(_promoted(tensors))


def check(coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...], out: torch.Tensor | None) -> None:
    """Raise `KernelInputError` for arguments that `lincomb` has no result for."""
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise KernelInputError(f"lincomb: {len(tensors)} tensors; it sums 1 to {MAX_TENSORS}.")
    shape = tensors[0].shape
    if len(shape) == 0 or any(tensor.shape != shape for tensor in tensors):
        raise KernelInputError(f"lincomb: shapes {[tuple(t.shape) for t in tensors]}; they must equal (batch, ...).")
    if tuple(coefficients.shape) not in {(len(tensors),), (shape[0], len(tensors))}:
        raise KernelInputError(
            f"lincomb: coefficients of shape {tuple(coefficients.shape)} for {len(tensors)} tensors, batch {shape[0]}; "
            f"give ({len(tensors)},) or ({shape[0]}, {len(tensors)})."
        )
    if not all(tensor.is_floating_point() for tensor in (coefficients, *tensors)):
        raise KernelInputError("lincomb: coefficients and tensors must be of floating-point dtypes.")
    check_devices("lincomb", coefficients, *tensors, out)
    if out is not None and (out.shape != shape or out.dtype != _promoted(tensors)):
        raise KernelInputError(
            f"lincomb: out is {out.dtype} of shape {tuple(out.shape)}; it must be {_promoted(tensors)}, {tuple(shape)}."
        )


def supported(coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...], out: torch.Tensor | None) -> Verdict:
    """Whether the kernel can run on checked arguments."""
    reason = obstacle(*tensors, out)
    if not reason and (coefficients.dtype != torch.float32 or coefficients.stride(-1) != 1):
        reason = "the coefficients are not float32 with the last dimension contiguous"
    layouts = {sample_layout(tensor) for tensor in (*tensors, *([] if out is None else [out]))}
    if not reason and (len(layouts) > 1 or None in layouts):
        reason = "the samples do not lie in memory alike and without gaps"
    return not reason, reason


def run(coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...], out: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel on arguments that `supported` accepts."""
    first = tensors[0]
    out = torch.empty_like(first, dtype=_promoted(tensors)) if out is None else out
    size = first.numel() // max(len(first), 1)
    block = 1024
    blocks = -(-size // block)
    padded = tensors + (first,) * (MAX_TENSORS - len(tensors))
    launch(
        _lincomb,
        (blocks * len(first),),
        out,
        coefficients,
        *padded,
        size,
        blocks,
        out.stride(0),
        coefficients.stride(0) if coefficients.ndim == 2 else 0,
        *(tensor.stride(0) for tensor in padded),
        COUNT=len(tensors),
        BLOCK=block,
        num_warps=4,
    )
    return out


@jit
def _lincomb(  # type: ignore[no-untyped-def]
    out, coefficients, x0, x1, x2, x3, x4, x5, size, blocks,
    out_stride, coefficients_stride, stride0, stride1, stride2, stride3, stride4, stride5,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)  # tensors may hold more than 2**31 elements
    start = (program % blocks).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < size - start
    coefficients += sample * coefficients_stride
    total = tl.load(x0 + sample * stride0 + start + index, inside).to(tl.float32) * tl.load(coefficients)
    if COUNT > 1:
        total += tl.load(x1 + sample * stride1 + start + index, inside).to(tl.float32) * tl.load(coefficients + 1)
    if COUNT > 2:
        total += tl.load(x2 + sample * stride2 + start + index, inside).to(tl.float32) * tl.load(coefficients + 2)
    if COUNT > 3:
        total += tl.load(x3 + sample * stride3 + start + index, inside).to(tl.float32) * tl.load(coefficients + 3)
    if COUNT > 4:
        total += tl.load(x4 + sample * stride4 + start + index, inside).to(tl.float32) * tl.load(coefficients + 4)
    if COUNT > 5:
        total += tl.load(x5 + sample * stride5 + start + index, inside).to(tl.float32) * tl.load(coefficients + 5)
    tl.store(out + sample * out_stride + start + index, total.to(out.dtype.element_ty), inside)


def _promoted(tensors: tuple[torch.Tensor, ...]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def sample_layout(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of one sample's dimensions; None if the sample has gaps or overlaps."""
    layout = [(stride, size) for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(layout):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in layout)


register(
    "lincomb(Tensor coefficients, Tensor[] tensors) -> Tensor",
    lambda coefficients, tensors: lincomb(coefficients, *tensors),
    lambda coefficients, tensors: lincomb_reference(coefficients, *tensors),
)
