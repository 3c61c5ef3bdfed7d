"""The shortcut of a UNet decoder's residual block: a 1×1 convolution of features and a skip connection.

Two products of matrices in one sum. The two inputs are not concatenated, and the skip's factor multiplies one of the
partial sums, so that it costs no pass over memory.
"""

from __future__ import annotations

from functools import partial

import torch

from fastdiff.kernels import launch as launching
from fastdiff.kernels.dispatch import (
    KernelInputError,
    Verdict,
    check_devices,
    compute_dtype,
    image_layout,
    obstacle,
    register,
    use_kernel,
)
from fastdiff.kernels.launch import jit, launch, power_of_two, tl

Maybe = torch.Tensor | None


def skip_shortcut(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe = None,
    *,
    skip_scale: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """``conv1x1(cat([x, skip_scale * skip], 1), weight) + bias``.

    Args:
        x: features of shape ``(batch, channels, *spatial)``, contiguous or channels-last.
        skip: features of a long skip connection, which follow x's along the channels; x's dtype and layout.
        weight: of shape ``(outputs, all channels)``, with or without a convolution's two ones at the end.
        bias: shape ``(outputs,)``.
        skip_scale: what the skip is multiplied with: a number, or a tensor of shape ``(batch,)`` or ``()``.

    Returns:
        A tensor of shape ``(batch, outputs, *spatial)`` in x's dtype and layout. Kernel and reference sum in float32
        and round once.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    weight = check(x, skip, weight, bias, skip_scale)
    kernel = use_kernel("skip_shortcut", supported, x, skip, weight, bias, skip_scale)
    return (run if kernel else skip_shortcut_reference)(x, skip, weight, bias, skip_scale)


def skip_shortcut_reference(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Maybe, skip_scale: float | torch.Tensor
) -> torch.Tensor:
    """`skip_shortcut` as a plain expression of checked arguments."""
    exact = compute_dtype(x)
    factor = skip_scale.to(exact).view(-1, 1, 1) if isinstance(skip_scale, torch.Tensor) else skip_scale
    weights = weight.to(exact).split([x.shape[1], skip.shape[1]], dim=1)
    first, second = (part @ each.to(exact).flatten(2) for part, each in zip(weights, (x, skip), strict=True))
    result = first + factor * second
    result = result if bias is None else result + bias.to(exact)[:, None]
    layout = image_layout(x) or torch.contiguous_format
    return result.to(x.dtype).unflatten(2, x.shape[2:]).contiguous(memory_format=layout)


def check(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Maybe, skip_scale: float | torch.Tensor
) -> torch.Tensor:
    """The weight as a matrix; `KernelInputError` for arguments that `skip_shortcut` has no result for."""
    name = "skip_shortcut"
    if x.ndim < 3 or not x.is_floating_point():
        raise KernelInputError(f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats (batch, channels, ...).")
    if skip.ndim != x.ndim or skip.dtype != x.dtype or len(skip) != len(x) or skip.shape[2:] != x.shape[2:]:
        raise KernelInputError(
            f"{name}: skip is {skip.dtype} of shape {tuple(skip.shape)}, x {x.dtype} of {tuple(x.shape)}; they may "
            "only differ in their channels."
        )
    channels = x.shape[1] + skip.shape[1]
    if weight.ndim < 2 or weight.shape[1] != channels or any(size != 1 for size in weight.shape[2:]):
        raise KernelInputError(
            f"{name}: weight has shape {tuple(weight.shape)}; give (outputs, {channels}), or that of a 1×1 convolution."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelInputError(f"{name}: bias has shape {tuple(bias.shape)}; give ({len(weight)},).")
    factor = skip_scale if isinstance(skip_scale, torch.Tensor) else None
    if factor is not None and tuple(factor.shape) not in ((), (len(x),)):
        raise KernelInputError(f"{name}: skip_scale has shape {tuple(factor.shape)}; give () or ({len(x)},).")
    check_devices(name, x, skip, weight, bias, factor)
    return weight.flatten(1)  # a view: what follows the channels are ones


def supported(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Maybe, skip_scale: float | torch.Tensor
) -> Verdict:
    """Whether the kernel can run on checked arguments."""
    reason = obstacle(x, skip, weight, bias, skip_scale if isinstance(skip_scale, torch.Tensor) else None)
    layout = image_layout(x)
    if not reason and (layout is None or not skip[:1].is_contiguous(memory_format=layout)):
        reason = "the features are neither contiguous nor channels-last, or x and skip differ in that"
    if not reason and any(part is not None and part.shape[-1] > 1 and part.stride(-1) != 1 for part in (weight, bias)):
        reason = "the last dimension of weight or bias is not contiguous"
    pixels = x.shape[2:].numel()
    if not reason and max(x.shape[1], skip.shape[1], len(weight)) * pixels >= 2**30:
        reason = "a sample has more elements than a 32-bit offset reaches"
    return not reason, reason


def run(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Maybe, skip_scale: float | torch.Tensor
) -> torch.Tensor:
    """Launch the kernel on arguments that `supported` accepts."""
    (batch, width, *spatial), outputs = x.shape, len(weight)
    layout = image_layout(x)
    assert layout is not None
    result = torch.empty((batch, outputs, *spatial), dtype=x.dtype, device=x.device, memory_format=layout)
    pixels = x.shape[2:].numel()
    # Matrix units multiply numbers of 16 bits of one kind; the interpreter cannot multiply bfloat16.
    wide = x.dtype != weight.dtype or x.dtype == torch.float32
    wide = wide or (launching.INTERPRETED and x.dtype == torch.bfloat16)
    # At most 128 registers, no spills, and loads of 128 bits.
    most_outputs, most_pixels, chunk, warps = (32, 32, 16, 4) if wide else (64, 128, 32, 8)
    tile_outputs = min(max(power_of_two(outputs), 16), most_outputs)
    tile_pixels = min(max(power_of_two(pixels), 16), most_pixels)
    tiles, blocks = -(-outputs // tile_outputs), -(-pixels // tile_pixels)
    factor = skip_scale if isinstance(skip_scale, torch.Tensor) else None
    launch(
        _skip_shortcut,
        (batch * blocks * tiles,),
        result,
        x,
        skip,
        weight,
        bias,
        factor,
        1.0 if isinstance(skip_scale, torch.Tensor) else float(skip_scale),
        x.stride(0),
        skip.stride(0),
        weight.stride(0),
        factor.stride(0) if factor is not None and factor.ndim else 0,
        width,
        skip.shape[1],
        outputs,
        pixels,
        blocks,
        tiles,
        LAST=layout != torch.contiguous_format,
        WIDE=wide,
        OUTPUTS=tile_outputs,
        PIXELS=tile_pixels,
        CHUNK=chunk,
        num_warps=warps,
    )
    return result


@jit
def _accumulate(  # type: ignore[no-untyped-def]
    total, start, weight, own, pixel, pixels, known,
    LAST: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add what one input's channels give."""
    for first in range(0, own, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        narrow = channel < own
        place = pixel[None, :] * own + channel[:, None] if LAST else channel[:, None] * pixels + pixel[None, :]
        values = tl.load(start + place, narrow[:, None] & (pixel < pixels)[None, :], 0.0)
        matrix = tl.load(weight + channel[None, :], known & narrow[None, :], 0.0)
        if WIDE:
            values = values.to(tl.float32)
            matrix = matrix.to(tl.float32)
        # Of float32, three products of 19-bit numbers: float32's precision on matrix units.
        total = tl.dot(matrix, values, total, input_precision="tf32x3")
    return total


@jit
def _skip_shortcut(  # type: ignore[no-untyped-def]
    result, x, skip, weight, bias, factors, factor,
    x_batch, skip_batch, weight_row, factor_batch, width, skip_width, outputs, pixels, blocks, tiles,
    LAST: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # Neighbouring programs read the same pixels.
    output = (program % tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    pixel = (program // tiles) % blocks * PIXELS + tl.arange(0, PIXELS)
    sample = (program // (tiles * blocks)).to(tl.int64)  # tensors may hold more than 2**31 elements
    known = (output < outputs)[:, None]
    rows = weight + output[:, None] * weight_row
    total = tl.zeros((OUTPUTS, PIXELS), tl.float32)
    total = _accumulate(
        total, skip + sample * skip_batch, rows + width, skip_width, pixel, pixels, known, LAST, WIDE, CHUNK
    )
    if factors is not None:
        factor = tl.load(factors + sample * factor_batch).to(tl.float32)
    total *= factor
    total = _accumulate(total, x + sample * x_batch, rows, width, pixel, pixels, known, LAST, WIDE, CHUNK)
    if bias is not None:
        total += tl.load(bias + output, output < outputs, 0.0).to(tl.float32)[:, None]
    place = pixel[None, :] * outputs + output[:, None] if LAST else output[:, None] * pixels + pixel[None, :]
    start = result + sample * outputs * pixels
    tl.store(start + place, total.to(result.dtype.element_ty), known & (pixel < pixels)[None, :])


def _operator(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    skip_scale: Maybe,
    fake: bool = False,
) -> torch.Tensor:
    factor: float | torch.Tensor = 1.0 if skip_scale is None else skip_scale
    if fake:
        return skip_shortcut_reference(x, skip, check(x, skip, weight, bias, factor), bias, factor)
    return skip_shortcut(x, skip, weight, bias, skip_scale=factor)


register(
    "skip_shortcut(Tensor x, Tensor skip, Tensor weight, Tensor? bias, Tensor? skip_scale) -> Tensor",
    _operator,
    partial(_operator, fake=True),
)
