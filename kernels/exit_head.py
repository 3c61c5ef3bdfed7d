"""The output layers of a diffusion transformer: norm, modulation, matrix, and patches put together to an image.

Every exit ends in them. Tokens are read from memory once; nothing of their width is written.
"""

from __future__ import annotations

from functools import partial

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
from fastdiff.kernels.residual_norm_modulate import Norm, residual_norm_modulate_reference

Maybe = torch.Tensor | None

MAX_OUTPUTS = 64
"""Values for each token that a program holds; with more it runs out of registers."""


def exit_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe = None,
    *,
    columns: int,
    patch: int,
    norm: Norm | None = "layer",
    norm_weight: Maybe = None,
    norm_bias: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``unpatchify(((norm(x) * norm_weight + norm_bias) * (1 + scale) + shift) @ weight.T + bias)``.

    Args:
        x: tokens of shape ``(batch, tokens, width)``, one for each patch, row by row.
        weight: the matrix, shape ``(patch * patch * channels, width)``; channels are its rows' fastest index.
        bias: shape ``(patch * patch * channels,)``.
        columns: patches in a row of the image; a divisor of the number of tokens.
        patch: height and width of a patch in pixels.
        norm: LayerNorm, RMSNorm, or none, over the width.
        norm_weight: the norm's weight, shape ``(width,)``.
        norm_bias: the norm's bias, shape ``(width,)``.
        scale: modulation after the norm, shape ``(batch, width)`` or ``(1, width)``.
        shift: modulation after the norm, shaped as the scale.
        eps: added to the norm's variance.

    Returns:
        Images of shape ``(batch, channels, rows * patch, columns * patch)`` in x's dtype. Kernel and reference multiply
        in float32 precision and round once.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    tensors = check(x, weight, bias, norm_weight, norm_bias, scale, shift, columns, patch, norm)
    kernel = use_kernel("exit_head", supported, *tensors)
    return (run if kernel else exit_head_reference)(*tensors, columns, patch, norm, eps)


def exit_head_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    norm_weight: Maybe,
    norm_bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    columns: int,
    patch: int,
    norm: Norm | None,
    eps: float,
) -> torch.Tensor:
    """`exit_head` as a plain expression of checked arguments."""
    exact = compute_dtype(x)
    scale, shift = (None if part is None else cast(part[:, None], exact) for part in (scale, shift))
    _, normed, _ = residual_norm_modulate_reference(
        x.to(exact), None, None, norm_weight, norm_bias, scale, shift, None, None, norm, eps, "fused"
    )
    patches = F.linear(normed, weight.to(exact), cast(bias, exact)).to(x.dtype)
    patches = patches.unflatten(-1, (patch, patch, -1)).unflatten(1, (-1, columns))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    norm_weight: Maybe,
    norm_bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    columns: int,
    patch: int,
    norm: Norm | None,
) -> tuple[torch.Tensor, torch.Tensor, Maybe, Maybe, Maybe, Maybe, Maybe]:
    """The tensors, scale and shift with one row per sample; `KernelInputError` for what there is no result for."""
    name = "exit_head"
    if x.ndim != 3 or not x.is_floating_point():
        raise KernelInputError(f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats (batch, tokens, width).")
    batch, tokens, width = x.shape
    if columns < 1 or tokens % columns:
        raise KernelInputError(f"{name}: {tokens} tokens are no rows of {columns}; columns must divide their number.")
    if weight.ndim != 2 or weight.shape[1] != width or patch < 1 or weight.shape[0] % patch**2 or not len(weight):
        raise KernelInputError(
            f"{name}: weight has shape {tuple(weight.shape)}; give (channels * {patch**2}, {width}) for patch={patch} "
            f"and x of shape {tuple(x.shape)}."
        )
    if norm not in ("layer", "rms", None):
        raise KernelInputError(f"{name}: norm={norm!r}; it is 'layer', 'rms' or None.")
    if norm is None and not (norm_weight is None and norm_bias is None):
        raise KernelInputError(f"{name}: the norm's weight or bias without a norm. Leave them out.")
    vectors = {"bias": (bias, len(weight)), "norm_weight": (norm_weight, width), "norm_bias": (norm_bias, width)}
    for what, (vector, length) in vectors.items():
        if vector is not None and vector.shape != (length,):
            raise KernelInputError(f"{name}: {what} has shape {tuple(vector.shape)}; give ({length},).")
    for what, part in (("scale", scale), ("shift", shift)):
        if part is not None and tuple(part.shape) not in ((batch, width), (1, width)):
            raise KernelInputError(f"{name}: {what} has shape {tuple(part.shape)}; give ({batch}, {width}).")
    scale, shift = (None if part is None else part.expand(batch, width) for part in (scale, shift))
    check_devices(name, x, weight, bias, norm_weight, norm_bias, scale, shift)
    return x, weight, bias, norm_weight, norm_bias, scale, shift


def supported(x: torch.Tensor, weight: torch.Tensor, *others: Maybe) -> Verdict:
    """Whether the kernel can run on checked tensors."""
    given = [tensor for tensor in (x, weight, *others) if tensor is not None]
    reason = obstacle(*given)
    if not reason and len(weight) > MAX_OUTPUTS:
        reason = f"a token has {len(weight)} outputs, more than {MAX_OUTPUTS}"
    if not reason and any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in given):
        reason = "a tensor's last dimension is not contiguous"
    if not reason and max(x.shape[1], 1) * len(weight) >= 2**30:
        reason = "an image has more elements than a 32-bit offset reaches"
    return not reason, reason


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    norm_weight: Maybe,
    norm_bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    columns: int,
    patch: int,
    norm: Norm | None,
    eps: float,
) -> torch.Tensor:
    """Launch the kernel on arguments that `supported` accepts."""
    batch, tokens, width = x.shape
    channels = len(weight) // patch**2
    shape = (batch, channels, tokens // columns * patch, columns * patch)
    result = torch.empty(shape, dtype=x.dtype, device=x.device)
    outputs = max(power_of_two(len(weight)), 16)
    rows, chunk, warps = _configuration(outputs, x.dtype)
    blocks = -(-tokens // rows)
    launch(
        _exit_head,
        (batch * blocks,),
        result,
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        scale,
        shift,
        tokens,
        width,
        len(weight),
        columns,
        patch,
        channels,
        blocks,
        eps,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        NORM=norm or "none",
        ROWS=rows,
        OUTPUTS=outputs,
        CHUNK=chunk,
        num_warps=warps,
    )
    return result


def _configuration(outputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens, channels at a time, and warps of a program: at most 128 registers, no spills, and loads of 128 bits."""
    if outputs == MAX_OUTPUTS:
        return 32, 32, 8 if dtype == torch.float32 else 4
    return (16, 64, 4) if outputs == 32 else (16, 32, 2)


@jit
def _exit_head(  # type: ignore[no-untyped-def]
    result, x, weight, bias, norm_weight, norm_bias, scale, shift,
    tokens, width, outputs, columns, patch, channels, blocks, eps,
    x_batch, x_token, weight_row, scale_batch, shift_batch,
    NORM: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)  # tensors may hold more than 2**31 elements
    token = (program % blocks) * ROWS + tl.arange(0, ROWS)
    known = token < tokens
    index = tl.arange(0, CHUNK)
    rows = x + sample * x_batch + token[:, None].to(tl.int64) * x_token
    mean = tl.zeros((ROWS,), tl.float32)
    factor = tl.full((ROWS,), 1.0, tl.float32)
    # The rows are read from memory once; the passes that follow find them in the cache.
    if NORM == "layer":
        for start in range(0, width, CHUNK):
            inside = known[:, None] & (start + index < width)[None, :]
            mean += tl.sum(tl.load(rows + start + index[None, :], inside, 0.0).to(tl.float32), 1)
        mean = mean / width
    if NORM != "none":
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, CHUNK):
            inside = known[:, None] & (start + index < width)[None, :]
            hidden = tl.load(rows + start + index[None, :], inside, 0.0).to(tl.float32)
            centred = tl.where(inside, hidden - mean[:, None], 0.0)
            squares += tl.sum(centred * centred, 1)
        factor = tl.rsqrt(squares / width + eps)

    output = tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, width, CHUNK):
        channel = start + index
        narrow = channel < width
        inside = known[:, None] & narrow[None, :]
        hidden = tl.load(rows + channel[None, :], inside, 0.0).to(tl.float32)
        hidden = (hidden - mean[:, None]) * factor[:, None]
        if norm_weight is not None:
            hidden *= tl.load(norm_weight + channel, narrow, 0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            hidden += tl.load(norm_bias + channel, narrow, 0.0).to(tl.float32)[None, :]
        if scale is not None:
            hidden *= 1.0 + tl.load(scale + sample * scale_batch + channel, narrow, 0.0).to(tl.float32)[None, :]
        if shift is not None:
            hidden += tl.load(shift + sample * shift_batch + channel, narrow, 0.0).to(tl.float32)[None, :]
        # Beyond the width there are zeros in the matrix, which must not meet what is no number.
        hidden = tl.where(inside, hidden, 0.0)
        matrix = tl.load(
            weight + output[:, None] * weight_row + channel[None, :], (output < outputs)[:, None] & narrow[None, :], 0.0
        ).to(tl.float32)
        # Three products of 19-bit numbers: float32's precision on matrix units.
        total = tl.dot(hidden, tl.trans(matrix), total, input_precision="tf32x3")
    if bias is not None:
        total += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[None, :]

    # Outputs are ordered by row and column in the patch, then channel.
    line = (token // columns)[:, None] * patch + (output // (patch * channels))[None, :]
    pixel = (token % columns)[:, None] * patch + (output // channels % patch)[None, :]
    across = columns * patch
    place = ((output % channels)[None, :] * (tokens // columns * patch) + line) * across + pixel
    image = result + sample * tokens * outputs
    tl.store(image + place, total.to(result.dtype.element_ty), known[:, None] & (output < outputs)[None, :])


def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    norm_weight: Maybe,
    norm_bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    columns: int,
    patch: int,
    norm: Norm | None,
    eps: float,
    fake: bool = False,
) -> torch.Tensor:
    tensors = check(x, weight, bias, norm_weight, norm_bias, scale, shift, columns, patch, norm)
    kernel = not fake and use_kernel("exit_head", supported, *tensors)
    return (run if kernel else exit_head_reference)(*tensors, columns, patch, norm, eps)


register(
    "exit_head(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, "
    "Tensor? shift, SymInt columns, int patch, str? norm, float eps) -> Tensor",
    _operator,
    partial(_operator, fake=True),
)
