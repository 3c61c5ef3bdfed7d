"""Launches at the shapes of real models, on tensors without memory: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastdiff.kernels import (
    exit_head,
    geglu,
    group_norm_act,
    lincomb,
    qk_norm_rope,
    residual_norm_modulate,
    rows,
    skip_shortcut,
    uncertainty_score,
)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def guided_step(dtype: torch.dtype) -> None:
    lincomb.run(empty(64, 4), tuple(empty(64, 4, 64, 64, dtype=dtype) for _ in range(4)), None)


def block_boundary(width: int, dtype: torch.dtype) -> None:
    x, branch = empty(2, 256, width, dtype=dtype), empty(2, 256, width, dtype=dtype)
    gate, scale, shift = (
        empty(2, 6, width, dtype=dtype).expand(2, 6, width)[:, :3, None].expand(2, 3, 256, width).unbind(1)
    )
    weight, offset = empty(width, dtype=dtype), empty(2)
    residual_norm_modulate.run(x, branch, gate, weight, weight, scale, shift, weight, offset, "layer", 1e-6, "fused")


def feed_forward(approximate: str, dtype: torch.dtype) -> None:
    geglu.run(empty(2, 4096, 5120, dtype=dtype), True, approximate, "fused")


def activation(dtype: torch.dtype) -> None:
    geglu.run(empty(2, 256, 4608, dtype=dtype), False, "tanh", "fused")


def some_samples(scatter: bool, dtype: torch.dtype) -> None:
    batch, part = empty(64, 256, 1152, dtype=dtype), empty(20, 256, 1152, dtype=dtype)
    rows.run(batch if scatter else part, part if scatter else batch, empty(20, dtype=torch.int64), scatter)


def residual_block(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = empty(2, 640, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    skip = empty(2, 320, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    weight, time = empty(960, dtype=dtype), empty(2, 960, dtype=dtype)
    group_norm_act.run(x, 32, weight, weight, skip, empty(2), time, time, time, "silu", 1e-5)


def shortcut(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = empty(2, 640, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    skip = empty(2, 320, 64, 64, dtype=dtype).contiguous(memory_format=layout)
    skip_shortcut.run(x, skip, empty(320, 960, dtype=dtype), empty(320, dtype=dtype), empty(2))


def output_layers(outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = empty(2, 256, 1152, dtype=dtype), empty(outputs, 1152, dtype=dtype), empty(outputs, dtype=dtype)
    scale, shift = empty(2, 2304, dtype=dtype).chunk(2, dim=1)
    vector = empty(1152, dtype=dtype)
    exit_head.run(x, weight, bias, vector, vector, scale, shift, 16, 2, "layer", 1e-6)


def uncertainty(outputs: int, image: bool, dtype: torch.dtype) -> None:
    """Modules stay in float32 whatever the model is in, and UNets have pixels for tokens."""
    tokens = empty(2, 640, 1024, dtype=dtype).mT if image else empty(2, 274, 1152, dtype=dtype)[:, 18:]
    weight, bias, offset = empty(outputs, tokens.shape[2]), empty(outputs), empty(2, outputs)
    uncertainty_score.run(tokens, weight, bias, offset)


def query(pairs: str, dtype: torch.dtype) -> None:
    joint = empty(2, 4608, 24, 128, dtype=dtype)
    angle = empty(4608, 128)
    x, weight = empty(2, 4096, 24, 128, dtype=dtype), empty(128, dtype=dtype)
    qk_norm_rope.run(x, weight, angle[512:], angle[512:], True, pairs, 1e-6, "fused", joint[:, 512:])


def ones(dtype: torch.dtype) -> None:
    """Triton makes constants of arguments that equal 1, to which not everything applies that does to numbers."""
    one, line, row, image = (empty(*[1] * ndim, dtype=dtype) for ndim in (1, 2, 3, 4))
    exit_head.run(row, line, one, one, one, line, line, 1, 1, "rms", 1e-6)
    geglu.run(line, False, "none", "fused")
    lincomb.run(empty(1, 1), (line,), None)
    rows.run(line, line, empty(1, dtype=torch.int64), True)
    qk_norm_rope.run(image, one, None, None, True, "neighbours", 1e-6, "match_eager", None)
    residual_norm_modulate.run(row, row, row, one, one, row, row, one, empty(1), "rms", 1e-6, "match_eager")
    group_norm_act.run(image, 1, one, one, image, one, line, line, line, "silu", 1e-5)
    skip_shortcut.run(image, image, line, one, one)
    uncertainty_score.run(row, line, one, line)


LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels last"}
MODULES = (
    exit_head,
    geglu,
    group_norm_act,
    lincomb,
    qk_norm_rope,
    residual_norm_modulate,
    rows,
    skip_shortcut,
    uncertainty_score,
)
CASES: dict[str, Callable[[torch.dtype], None]] = {
    **{f"exit_head {outputs}": partial(output_layers, outputs) for outputs in (16, 32, 64)},
    "geglu": partial(feed_forward, "none"),
    "geglu tanh": partial(feed_forward, "tanh"),
    "gelu_tanh": activation,
    "gather_rows": partial(some_samples, False),
    "scatter_rows": partial(some_samples, True),
    "lincomb": guided_step,
    **{f"qk_norm_rope {pairs}": partial(query, pairs) for pairs in ("neighbours", "halves")},
    **{f"residual_norm_modulate {width}": partial(block_boundary, width) for width in (1152, 3072)},
    **{f"group_norm_act {name}": partial(residual_block, layout) for layout, name in LAYOUTS.items()},
    **{f"skip_shortcut {name}": partial(shortcut, layout) for layout, name in LAYOUTS.items()},
    **{f"uncertainty_score {outputs}": partial(uncertainty, outputs, False) for outputs in (16, 32, 64)},
    "uncertainty_score 64 of pixels": partial(uncertainty, 64, True),
    "ones": ones,
}
