"""How uncertain an exit is about each sample: a linear layer on every token, sigmoid, and the mean.

Tokens are read from memory once, in their own dtype; of what the layer gives only sums are written.
"""

from __future__ import annotations

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

Maybe = torch.Tensor | None

WIDEST = 64
"""Outputs of a token that one program computes; with more it runs out of registers."""


def uncertainty_score(
    tokens: torch.Tensor, weight: torch.Tensor, bias: Maybe = None, offset: Maybe = None
) -> torch.Tensor:
    """``sigmoid(tokens @ weight.T + bias + offset).mean((1, 2))``.

    Args:
        tokens: shape ``(batch, tokens, width)``, at least one; a slice or a transposed tensor is read where it lies.
        weight: the matrix, shape ``(outputs, width)``, of any floating-point dtype.
        bias: shape ``(outputs,)``.
        offset: what is added for each sample, such as what the matrix of its timestep gives, shape
            ``(batch, outputs)``.

    Returns:
        One number in (0, 1) for each sample, float32 of shape ``(batch,)``. Kernel and reference compute in float32
        precision, whatever the dtypes; the reference in float64 where there is such a tensor.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    check(tokens, weight, bias, offset)
    kernel = use_kernel("uncertainty_score", supported, tokens, weight, bias, offset)
    return (run if kernel else uncertainty_score_reference)(tokens, weight, bias, offset)


def uncertainty_score_reference(tokens: torch.Tensor, weight: torch.Tensor, bias: Maybe, offset: Maybe) -> torch.Tensor:
    """`uncertainty_score` as a plain expression of checked arguments."""
    exact = compute_dtype(tokens, weight, bias, offset)
    logits = F.linear(tokens.to(exact), weight.to(exact), cast(bias, exact))
    if offset is not None:
        logits = logits + offset.to(exact)[:, None]
    return logits.sigmoid().mean((1, 2)).float()


def check(tokens: torch.Tensor, weight: torch.Tensor, bias: Maybe, offset: Maybe) -> None:
    """Raise `KernelInputError` for arguments that `uncertainty_score` has no result for."""
    name = "uncertainty_score"
    if tokens.ndim != 3 or not tokens.is_floating_point() or not tokens.shape[1]:
        raise KernelInputError(
            f"{name}: tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; give floats (batch, tokens, width) "
            "with at least one token."
        )
    batch, _, width = tokens.shape
    if weight.ndim != 2 or weight.shape[1] != width or not len(weight):
        raise KernelInputError(f"{name}: weight has shape {tuple(weight.shape)}; give (outputs, {width}).")
    outputs = len(weight)
    for what, part, shape in (("bias", bias, (outputs,)), ("offset", offset, (batch, outputs))):
        if part is not None and tuple(part.shape) != shape:
            raise KernelInputError(f"{name}: {what} has shape {tuple(part.shape)}; give {shape}.")
    for what, part in (("weight", weight), ("bias", bias), ("offset", offset)):
        if part is not None and not part.is_floating_point():
            raise KernelInputError(f"{name}: {what} is {part.dtype}; give floats.")
    check_devices(name, tokens, weight, bias, offset)


def supported(tokens: torch.Tensor, weight: torch.Tensor, bias: Maybe, offset: Maybe) -> Verdict:
    """Whether the kernel can run on checked tensors."""
    reason = obstacle(tokens, weight, bias, offset)
    if not reason and all(
        size > 1 and stride != 1 for size, stride in zip(tokens.shape[1:], tokens.stride()[1:], strict=True)
    ):
        reason = "neither a token's channels nor a channel's tokens are contiguous"
    others = [part for part in (weight, bias, offset) if part is not None]
    if not reason and any(part.shape[-1] > 1 and part.stride(-1) != 1 for part in others):
        reason = "the last dimension of weight, bias or offset is not contiguous"
    return not reason, reason


def run(tokens: torch.Tensor, weight: torch.Tensor, bias: Maybe, offset: Maybe) -> torch.Tensor:
    """Launch the kernels on arguments that `supported` accepts."""
    batch, count, width = tokens.shape
    outputs = min(max(power_of_two(len(weight)), 16), WIDEST)
    rows, chunk, warps = _configuration(outputs, tokens.dtype)
    tiles = -(-len(weight) // outputs)
    parts = -(-count // rows) * tiles
    sums = torch.empty(batch, parts, dtype=torch.float32, device=tokens.device)
    result = torch.empty(batch, dtype=torch.float32, device=tokens.device)
    launch(
        _sum_sigmoids,
        (batch * parts,),
        sums,
        tokens,
        weight,
        bias,
        offset,
        count,
        width,
        len(weight),
        tiles,
        parts,
        *tokens.stride(),
        weight.stride(0),
        0 if offset is None else offset.stride(0),
        ROWS=rows,
        OUTPUTS=outputs,
        CHUNK=chunk,
        num_warps=warps,
    )
    launch(_mean, (batch,), result, sums, parts, float(count * len(weight)), BLOCK=1024, num_warps=4)
    return result


def _configuration(outputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens, channels at a time, and warps of a program: at most 128 registers, no spills, and loads of 128 bits."""
    if outputs == WIDEST:
        return 32, 32, 8 if dtype == torch.float32 else 4
    return (16, 64, 4) if outputs == 32 else (16, 32, 2)


@jit
def _sum_sigmoids(  # type: ignore[no-untyped-def]
    sums, tokens, weight, bias, offset, count, width, outputs, tiles, parts,
    batch_stride, token_stride, channel_stride, weight_row, offset_batch,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # tensors may hold more than 2**31 elements
    sample = program // parts
    part = program % parts
    token = part // tiles * ROWS + tl.arange(0, ROWS)
    output = (part % tiles).to(tl.int32) * OUTPUTS + tl.arange(0, OUTPUTS)
    known = token < count
    wanted = output < outputs
    index = tl.arange(0, CHUNK)
    rows = tokens + sample * batch_stride + token[:, None] * token_stride
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, width, CHUNK):
        channel = start + index
        narrow = channel < width
        inside = known[:, None] & narrow[None, :]
        hidden = tl.load(rows + channel[None, :].to(tl.int64) * channel_stride, inside, 0.0).to(tl.float32)
        matrix = tl.load(
            weight + output[:, None] * weight_row + channel[None, :], wanted[:, None] & narrow[None, :], 0.0
        ).to(tl.float32)
        # Three products of 19-bit numbers: float32's precision on matrix units.
        total = tl.dot(hidden, tl.trans(matrix), total, input_precision="tf32x3")
    if bias is not None:
        total += tl.load(bias + output, wanted, 0.0).to(tl.float32)[None, :]
    if offset is not None:
        total += tl.load(offset + sample * offset_batch + output, wanted, 0.0).to(tl.float32)[None, :]
    uncertainty = tl.where(known[:, None] & wanted[None, :], tl.sigmoid(total), 0.0)
    tl.store(sums + program, tl.sum(tl.sum(uncertainty, 1), 0))


@jit
def _mean(result, sums, parts, divisor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    sample = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        total += tl.load(sums + sample * parts + start + index, index < parts - start, 0.0)
    tl.store(result + sample, tl.sum(total, 0) / divisor)


register(
    "uncertainty_score(Tensor tokens, Tensor weight, Tensor? bias, Tensor? offset) -> Tensor",
    uncertainty_score,
    uncertainty_score_reference,
)
