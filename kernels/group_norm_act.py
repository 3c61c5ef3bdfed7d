"""GroupNorm and activation of a UNet's residual block, without the concatenation and additions that stand before it.

Three kernels: moments of every channel, then per group the line ``a * x + b`` that normalises each of its channels,
then the lines and the activation. The timestep's addition, the skip's factor and the modulation only change the lines,
so they cost no pass over memory. Nothing is summed by atomics: two runs agree bitwise.

Tiles hold channels, not groups: groups are narrow, there are few of them, and they may lie across the border between
the two inputs, which a tile never does.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from fastdiff.kernels.dispatch import (
    KernelInputError,
    Verdict,
    cast,
    check_devices,
    compute_dtype,
    image_layout,
    obstacle,
    register,
    use_kernel,
)
from fastdiff.kernels.launch import jit, launch, power_of_two, tl

Act = Literal["silu"]
Maybe = torch.Tensor | None

TILE = 2048
"""Elements that a program holds at a time."""


def group_norm_act(
    x: torch.Tensor,
    groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    *,
    skip: Maybe = None,
    skip_scale: float | torch.Tensor = 1.0,
    add: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    act: Act | None = "silu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """``act(group_norm(cat([x, skip_scale * skip], 1) + add) * (1 + scale) + shift)``.

    Args:
        x: features of shape ``(batch, channels, *spatial)``, contiguous or channels-last.
        groups: number of groups; a divisor of all channels, those of the skip included.
        weight: the norm's weight, one for each of all channels.
        bias: the norm's bias, one for each of all channels.
        skip: features of a long skip connection, which follow x's along the channels; x's dtype and layout.
        skip_scale: what the skip is multiplied with: a number, or a tensor of shape ``(batch,)`` or ``()``.
        add: what is added before the norm, the timestep's embedding; shape ``(batch, all channels)``.
        scale: modulation after the norm, shape ``(batch, all channels)``.
        shift: modulation after the norm, shape ``(batch, all channels)``.
        act: ``"silu"``, or None for the norm alone.
        eps: added to the norm's variance.

    Returns:
        A tensor of shape ``(batch, all channels, *spatial)`` in x's dtype and layout.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    check(x, groups, weight, bias, skip, skip_scale, add, scale, shift, act)
    kernel = use_kernel("group_norm_act", supported, x, skip, weight, bias, skip_scale, add, scale, shift)
    function = run if kernel else group_norm_act_reference
    return function(x, groups, weight, bias, skip, skip_scale, add, scale, shift, act, eps)


def group_norm_act_reference(
    x: torch.Tensor,
    groups: int,
    weight: Maybe,
    bias: Maybe,
    skip: Maybe,
    skip_scale: float | torch.Tensor,
    add: Maybe,
    scale: Maybe,
    shift: Maybe,
    act: Act | None,
    eps: float,
) -> torch.Tensor:
    """`group_norm_act` as a plain expression."""
    precision = compute_dtype(x)

    def over_pixels(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(precision).view(*tensor.shape, *[1] * (x.ndim - tensor.ndim))

    hidden = x.to(precision)
    if skip is not None:
        factor = over_pixels(skip_scale) if isinstance(skip_scale, torch.Tensor) else skip_scale
        hidden = torch.cat([hidden, factor * skip.to(precision)], dim=1)
    if add is not None:
        hidden = hidden + over_pixels(add)
    # Contiguous, because on the CPU torch loses digits of the variance where channels are last; torch's and not
    # functional's, which refuses groups of a single value.
    hidden = torch.group_norm(hidden.contiguous(), groups, cast(weight, precision), cast(bias, precision), eps)
    if scale is not None:
        hidden = hidden * (1 + over_pixels(scale))
    if shift is not None:
        hidden = hidden + over_pixels(shift)
    hidden = F.silu(hidden) if act == "silu" else hidden
    return hidden.to(x.dtype).contiguous(memory_format=image_layout(x) or torch.contiguous_format)


def check(
    x: torch.Tensor,
    groups: int,
    weight: Maybe,
    bias: Maybe,
    skip: Maybe,
    skip_scale: float | torch.Tensor,
    add: Maybe,
    scale: Maybe,
    shift: Maybe,
    act: Act | None,
) -> None:
    """Raise `KernelInputError` for arguments that `group_norm_act` has no result for."""
    name = "group_norm_act"
    if x.ndim < 3 or not x.is_floating_point():
        raise KernelInputError(f"{name}: x is {x.dtype} of shape {tuple(x.shape)}; give floats (batch, channels, ...).")
    if skip is not None and (
        skip.ndim != x.ndim or skip.dtype != x.dtype or len(skip) != len(x) or skip.shape[2:] != x.shape[2:]
    ):
        raise KernelInputError(
            f"{name}: skip is {skip.dtype} of shape {tuple(skip.shape)}, x {x.dtype} of {tuple(x.shape)}; they may "
            "only differ in their channels."
        )
    if act not in ("silu", None):
        raise KernelInputError(f"{name}: act={act!r}; it is 'silu' or None.")
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if groups < 1 or channels % groups:
        raise KernelInputError(f"{name}: {channels} channels do not divide into {groups} groups.")
    of_channels = {"weight": weight, "bias": bias}
    of_samples = {"add": add, "scale": scale, "shift": shift}
    for shape, tensors in (((channels,), of_channels), ((len(x), channels), of_samples)):
        for what, tensor in tensors.items():
            if tensor is not None and tensor.shape != shape:
                raise KernelInputError(f"{name}: {what} has shape {tuple(tensor.shape)}; give {shape}.")
    factor = skip_scale if isinstance(skip_scale, torch.Tensor) else None
    if factor is not None and tuple(factor.shape) not in ((), (len(x),)):
        raise KernelInputError(f"{name}: skip_scale has shape {tuple(factor.shape)}; give () or ({len(x)},).")
    check_devices(name, x, skip, weight, bias, factor, add, scale, shift)


def supported(
    x: torch.Tensor,
    skip: Maybe,
    weight: Maybe,
    bias: Maybe,
    skip_scale: float | torch.Tensor,
    *modulation: Maybe,
) -> Verdict:
    """Whether the kernels can run on checked arguments."""
    factor = skip_scale if isinstance(skip_scale, torch.Tensor) else None
    given = [tensor for tensor in (weight, bias, *modulation) if tensor is not None]
    reason = obstacle(x, skip, factor, *given)
    layout = image_layout(x)
    if not reason and (layout is None or (skip is not None and not skip[:1].is_contiguous(memory_format=layout))):
        reason = "the features are neither contiguous nor channels-last, or x and skip differ in that"
    if not reason and any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in given):
        reason = "the last dimension of weight, bias, add, scale or shift is not contiguous"
    if not reason and max(x[:1].numel(), 0 if skip is None else skip[:1].numel()) >= 2**30:
        reason = "a sample has more elements than a 32-bit offset reaches"
    return not reason, reason


def run(
    x: torch.Tensor,
    groups: int,
    weight: Maybe,
    bias: Maybe,
    skip: Maybe,
    skip_scale: float | torch.Tensor,
    add: Maybe,
    scale: Maybe,
    shift: Maybe,
    act: Act | None,
    eps: float,
) -> torch.Tensor:
    """Launch the kernels on arguments that `supported` accepts."""
    batch, width, *spatial = x.shape
    skip_width = 0 if skip is None else skip.shape[1]
    channels, pixels = width + skip_width, x[0, 0].numel() if batch and width else 0
    layout = image_layout(x)
    assert layout is not None
    result = torch.empty((batch, channels, *spatial), dtype=x.dtype, device=x.device, memory_format=layout)
    if not result.numel():
        return result
    last = layout != torch.contiguous_format
    tile_channels, tile_pixels = _tile(max(width, skip_width), pixels, last)
    x_tiles = -(-width // tile_channels)
    tiles = x_tiles - (-skip_width // tile_channels)
    blocks = -(-pixels // tile_pixels)
    # Enough programs for two on every processor.
    parts = min(blocks, -(-2 * _processors(x.device) // (batch * tiles)))
    part = -(-blocks // parts) * tile_pixels
    parts = -(-pixels // part)
    moments = torch.empty(2, batch, parts, channels, dtype=torch.float32, device=x.device)
    lines = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    factor = skip_scale if isinstance(skip_scale, torch.Tensor) else None
    inputs = (x, skip, x.stride(0), 0 if skip is None else skip.stride(0), width, skip_width, x_tiles, tiles, pixels)
    tiling: dict[str, Any] = {"LAST": last, "CHANNELS": tile_channels, "PIXELS": tile_pixels, "num_warps": 4}
    launch(_moments, (batch * parts * tiles,), *inputs, moments, moments.stride(0), part, parts, **tiling)
    launch(
        _lines,
        (batch * groups,),
        moments,
        lines,
        weight,
        bias,
        factor,
        1.0 if isinstance(skip_scale, torch.Tensor) else float(skip_scale),
        add,
        scale,
        shift,
        moments.stride(0),
        lines.stride(0),
        width,
        channels,
        groups,
        pixels,
        part,
        parts,
        eps,
        factor.stride(0) if factor is not None and factor.ndim else 0,
        *(0 if tensor is None else tensor.stride(0) for tensor in (add, scale, shift)),
        BLOCK=power_of_two(channels // groups),
        num_warps=1,
    )
    launch(
        _apply, (batch * blocks * tiles,), *inputs, lines, result, lines.stride(0), blocks, SILU=act == "silu", **tiling
    )
    return result


def _tile(width: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """Channels and pixels of a tile, longer in the direction in which neighbours lie in memory."""
    if channels_last:
        channels = min(power_of_two(width), 64)
        return channels, min(power_of_two(pixels), TILE // channels)
    block = min(power_of_two(pixels), 512)
    return min(power_of_two(width), TILE // block), block


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


@jit
def _source(  # type: ignore[no-untyped-def]
    x, skip, x_batch, skip_batch, width, skip_width, x_tiles, sample, tile,
):  # fmt: skip
    """Where a tile's input begins, how many channels that input has, and what stands before it in the result."""
    if skip is None:
        start = x + sample * x_batch
        return start, width, tile, 0
    else:
        second = tile >= x_tiles
        start = tl.where(second, skip + sample * skip_batch, x + sample * x_batch)
        return (
            start,
            tl.where(second, skip_width, width),
            tl.where(second, tile - x_tiles, tile),
            tl.where(second, width, 0),
        )


@jit
def _moments(  # type: ignore[no-untyped-def]
    x, skip, x_batch, skip_batch, width, skip_width, x_tiles, tiles, pixels, moments, plane, part, parts,
    LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel in one part of the pixels."""
    program = tl.program_id(0)
    number = (program // tiles) % parts
    sample = (program // (tiles * parts)).to(tl.int64)
    start, own, tile, before = _source(
        x, skip, x_batch, skip_batch, width, skip_width, x_tiles, sample, program % tiles
    )
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < own
    first = number * part
    end = tl.minimum(first + part, pixels)
    # Deviations from a value of the channel itself: squares of the values would lose what a large mean leaves.
    pivot = tl.load(start + (first * own + channel if LAST else channel * pixels + first), known, 0.0).to(tl.float32)
    sums = tl.zeros((CHANNELS, PIXELS), tl.float32)
    squares = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for block in range(first, end, PIXELS):
        pixel = block + tl.arange(0, PIXELS)
        inside = known[:, None] & (pixel < end)[None, :]
        place = pixel[None, :] * own + channel[:, None] if LAST else channel[:, None] * pixels + pixel[None, :]
        values = tl.load(start + place, inside, 0.0).to(tl.float32)
        deviations = tl.where(inside, values - pivot[:, None], 0.0)
        sums += deviations
        squares += deviations * deviations
    count = (end - first).to(tl.float32)
    total = tl.sum(sums, 1)
    channels = width + skip_width
    moments += (sample * parts + number) * channels + before + channel
    tl.store(moments, pivot + total / count, known)
    tl.store(moments + plane, tl.sum(squares, 1) - total * total / count, known)


@jit
def _lines(  # type: ignore[no-untyped-def]
    moments, lines, weight, bias, factors, factor, add, scale, shift,
    plane, lines_plane, width, channels, groups, pixels, part, parts, eps,
    factor_batch, add_batch, scale_batch, shift_batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The line of every channel of a group."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    size = channels // groups
    index = tl.arange(0, BLOCK)
    inside = index < size
    channel = (program % groups) * size + index
    mean = tl.zeros((BLOCK,), tl.float32)
    deviation = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, parts):
        place = moments + (sample * parts + number) * channels + channel
        seen = (number * part).to(tl.float32)
        count = (tl.minimum(pixels, (number + 1) * part) - number * part).to(tl.float32)
        step = tl.load(place, inside, 0.0) - mean
        mean += step * (count / (seen + count))
        deviation += tl.load(place + plane, inside, 0.0) + step * step * (seen * count / (seen + count))
    if factors is not None:
        factor = tl.load(factors + sample * factor_batch).to(tl.float32)
    multiplier = tl.where(channel >= width, factor, 1.0)
    added = tl.zeros((BLOCK,), tl.float32)
    if add is not None:
        added = tl.load(add + sample * add_batch + channel, inside, 0.0).to(tl.float32)
    mean = tl.where(inside, multiplier * mean + added, 0.0)
    centre = tl.sum(mean, 0) / size
    apart = tl.where(inside, mean - centre, 0.0)
    deviation = multiplier * multiplier * deviation + pixels * apart * apart
    slope = tl.zeros((BLOCK,), tl.float32) + tl.rsqrt(tl.sum(deviation, 0) / size / pixels + eps)
    if weight is not None:
        slope *= tl.load(weight + channel, inside, 0.0).to(tl.float32)
    offset = (added - centre) * slope
    if bias is not None:
        offset += tl.load(bias + channel, inside, 0.0).to(tl.float32)
    if scale is not None:
        stretch = 1.0 + tl.load(scale + sample * scale_batch + channel, inside, 0.0).to(tl.float32)
        slope *= stretch
        offset *= stretch
    if shift is not None:
        offset += tl.load(shift + sample * shift_batch + channel, inside, 0.0).to(tl.float32)
    lines += sample * channels + channel
    tl.store(lines, slope * multiplier, inside)
    tl.store(lines + lines_plane, offset, inside)


@jit
def _apply(  # type: ignore[no-untyped-def]
    x, skip, x_batch, skip_batch, width, skip_width, x_tiles, tiles, pixels, lines, result, plane, blocks,
    SILU: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The lines and the activation."""
    program = tl.program_id(0)
    pixel = (program // tiles) % blocks * PIXELS + tl.arange(0, PIXELS)
    sample = (program // (tiles * blocks)).to(tl.int64)
    start, own, tile, before = _source(
        x, skip, x_batch, skip_batch, width, skip_width, x_tiles, sample, program % tiles
    )
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < own
    channels = width + skip_width
    lines += sample * channels + before + channel
    slope = tl.load(lines, known, 0.0)
    offset = tl.load(lines + plane, known, 0.0)
    inside = known[:, None] & (pixel < pixels)[None, :]
    place = pixel[None, :] * own + channel[:, None] if LAST else channel[:, None] * pixels + pixel[None, :]
    values = tl.load(start + place, inside, 0.0).to(tl.float32) * slope[:, None] + offset[:, None]
    if SILU:
        values *= tl.sigmoid(values)
    channel += before
    place = pixel[None, :] * channels + channel[:, None] if LAST else channel[:, None] * pixels + pixel[None, :]
    tl.store(result + sample * channels * pixels + place, values.to(result.dtype.element_ty), inside)


def _operator(
    x: torch.Tensor,
    groups: int,
    weight: Maybe,
    bias: Maybe,
    skip: Maybe,
    skip_scale: Maybe,
    add: Maybe,
    scale: Maybe,
    shift: Maybe,
    act: Act | None,
    eps: float,
    fake: bool = False,
) -> torch.Tensor:
    factor: float | torch.Tensor = 1.0 if skip_scale is None else skip_scale
    if fake:
        return group_norm_act_reference(x, groups, weight, bias, skip, factor, add, scale, shift, act, eps)
    return group_norm_act(
        x, groups, weight, bias, skip=skip, skip_scale=factor, add=add, scale=scale, shift=shift, act=act, eps=eps
    )


register(
    "group_norm_act(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? skip, Tensor? skip_scale, Tensor? add, "
    "Tensor? scale, Tensor? shift, str? act, float eps) -> Tensor",
    _operator,
    partial(_operator, fake=True),
)
