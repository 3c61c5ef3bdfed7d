from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.formula import assert_close

from fastdiff.kernels import group_norm_act as module
from fastdiff.kernels.group_norm_act import group_norm_act
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def doubled(value: Any) -> Any:
    return value.double().contiguous() if isinstance(value, torch.Tensor) else value


def of_samples(value: Any, x: torch.Tensor) -> Any:
    return value.view(*value.shape, *[1] * (x.ndim - value.ndim)) if isinstance(value, torch.Tensor) else value


def plain(
    x: torch.Tensor, groups: int, weight: Any = None, bias: Any = None, *, skip: Any = None, skip_scale: Any = 1.0,
    add: Any = None, scale: Any = None, shift: Any = None, act: str | None = "silu", eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """What a UNet's block does, operation by operation."""
    hidden = x if skip is None else torch.cat([x, skip * of_samples(skip_scale, x)], dim=1)
    hidden = hidden if add is None else hidden + of_samples(add, x)
    hidden = torch.group_norm(hidden, groups, weight, bias, eps)
    hidden = hidden if scale is None else hidden * (1 + of_samples(scale, x))
    hidden = hidden if shift is None else hidden + of_samples(shift, x)
    return F.silu(hidden) if act == "silu" else hidden


def hold(x: torch.Tensor, groups: int, *affine: Any, fair: bool = True, **given: Any) -> torch.Tensor:
    """Hold a call against float64, and against torch's own operations where that is fair."""
    result = group_norm_act(x, groups, *affine, **given)
    exact_given = {name: doubled(value) for name, value in given.items()}
    exact_affine = [doubled(tensor) for tensor in affine]
    exact = plain(x.double().contiguous(), groups, *exact_affine, **exact_given)
    before = {name: exact_given[name] for name in ("skip", "skip_scale", "add") if name in given}
    hidden = plain(x.double().contiguous(), groups, act=None, eps=1e-5, **before)  # for its shape
    raw = x.double() if "skip" not in given else torch.cat([x, given["skip"]], 1).double()
    largest = raw.abs().amax() * max(1.0, torch.as_tensor(given.get("skip_scale", 1.0)).abs().max().item())
    largest = largest + (given["add"].abs().amax().double() if "add" in given else 0)
    deviation = raw.reshape(len(x), groups, -1).std(-1, unbiased=False).clamp(min=1e-2).amin()
    factor = (1 + of_samples(exact_given["scale"], x)).abs() if "scale" in given else 1.0
    weight = exact_affine[0].abs().view(1, -1, *[1] * (x.ndim - 2)) if affine and affine[0] is not None else 1.0
    terms = (largest / deviation * weight + 3) * factor + torch.zeros_like(hidden)
    eager = plain(x, groups, *affine, **given) if fair and x.dtype != torch.float32 else None
    assert_close(result, exact, terms, eager)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["silu", None])
def test_result_is_the_exact_one(
    layout: torch.memory_format, act: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    x = random(2, 24, 5, 7, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight, bias = random(24, dtype=dtype, device=device), random(1, 24, dtype=dtype, device=device)[0]
    result = hold(x, 4, weight, bias, act=act)
    assert result.is_contiguous(memory_format=layout)
    hold(x, 4, act=act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conditioning(layout: torch.memory_format, dtype: torch.dtype, device: torch.device) -> None:
    x = random(2, 24, 5, 7, dtype=dtype, device=device).contiguous(memory_format=layout)
    add, scale, shift = random(2, 72, dtype=dtype, device=device).chunk(3, dim=1)
    weight, bias = random(2, 24, dtype=dtype, device=device)
    hold(x, 4, weight, bias, add=add, scale=scale, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [0.7, torch.tensor(0.7), torch.tensor([0.5, 1.5])])
def test_skip_with_groups_across_the_border(
    factor: Any, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    x = random(2, 20, 5, 7, dtype=dtype, device=device).contiguous(memory_format=layout)
    skip = random(2, 12, 5, 7, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight, bias = random(2, 32, dtype=dtype, device=device)
    factor = factor.to(device) if isinstance(factor, torch.Tensor) else factor
    # Eager operations would take the factor rounded to their dtype.
    result = hold(x, 4, weight, bias, skip=skip, skip_scale=factor, fair=False)
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_the_pixels_are_merged(layout: torch.memory_format, device: torch.device) -> None:
    """More pixels than a tile, the last tile incomplete, every part with a mean of its own."""
    x = random(1, 8, 37, 31, device=device) + torch.arange(37, device=device).view(37, 1)
    x = x.contiguous(memory_format=layout)
    hold(x, 2, act=None, fair=False)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1), (2, 6, 11), (1, 4, 2, 3, 5), (3, 70, 1, 2)])
def test_odd_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    x = random(*shape, device=device)
    hold(x, 1, fair=False)
    if x.ndim == 5:
        result = hold(x.contiguous(memory_format=torch.channels_last_3d), 2, fair=False)
        assert result.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: torch.device) -> None:
    assert group_norm_act(torch.ones(shape, device=device), 2).shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_a_large_mean_does_not_spoil_the_variance(
    mean: float, layout: torch.memory_format, device: torch.device
) -> None:
    x = (random(1, 8, 9, 9, device=device) + mean).contiguous(memory_format=layout)
    hold(x, 2, act=None)


def test_samples_are_read_where_they_lie(device: torch.device) -> None:
    x, skip = random(2, 4, 6, 3, 3, device=device)[:, ::2]
    hold(x, 3, skip=skip, skip_scale=0.5, fair=False)


def test_nan_stays_in_its_group(device: torch.device) -> None:
    x = random(2, 8, 3, 3, device=device)
    x[0, 1, 2, 2] = float("nan")
    x[1, 7, 0, 0] = float("inf")
    result = group_norm_act(x, 2)
    assert result[0, :4].isnan().all()
    assert result[1, 4:].isnan().all()
    assert result[0, 4:].isfinite().all()
    assert result[1, :4].isfinite().all()


def test_two_runs_agree(device: torch.device) -> None:
    x = random(1, 8, 37, 31, device=device)
    assert torch.equal(group_norm_act(x, 2), group_norm_act(x, 2))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": ones(2, 4)}, "batch, channels"),
        ({"x": ones(2, 4, 3).int()}, "int32"),
        ({"groups": 3}, "3 groups"),
        ({"groups": 0}, "0 groups"),
        ({"skip": ones(2, 3, 3, 3)}, "7 channels"),
        ({"skip": ones(2, 4, 3, 2)}, "only differ in their channels"),
        ({"skip": ones(1, 4, 3, 3)}, "only differ in their channels"),
        ({"skip": ones(2, 4, 3, 3).half()}, "float16"),
        ({"skip": ones(2, 4, 3, 3), "skip_scale": ones(3)}, "skip_scale"),
        ({"weight": ones(3)}, "weight"),
        ({"add": ones(4)}, "add"),
        ({"scale": ones(1, 4)}, "scale"),
        ({"act": "relu"}, "'relu'"),
        ({"bias": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        group_norm_act(**{"x": ones(2, 4, 3, 3), "groups": 2} | given)


@pytest.mark.parametrize("kind", ["sliced", "mixed"])
def test_reference_runs_where_the_kernel_cannot(
    kind: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x, skip = random(2, 4, 3, 6, device=device), None
    if kind == "sliced":
        x = x[..., ::2]
    else:
        skip = random(2, 4, 3, 6, device=device).contiguous(memory_format=torch.channels_last)
    with pytest.raises(KernelUnavailableError, match="neither contiguous nor channels-last"):
        group_norm_act(x, 2, skip=skip)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    hold(x, 2, skip=skip) if skip is not None else hold(x, 2)


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x, skip = (random(1, 4, 2, 2).double().requires_grad_() for _ in range(2))
    torch.autograd.gradcheck(lambda x, skip: group_norm_act(x, 2, skip=skip, skip_scale=0.5), (x, skip))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_declared_correctly(layout: torch.memory_format, device: torch.device) -> None:
    x = random(2, 4, 3, 5, device=device).contiguous(memory_format=layout)
    rest = (None, None, x, torch.tensor(0.5, device=device), None, None, None, "silu", 1e-5)
    torch.library.opcheck(torch.ops.fastdiff.group_norm_act.default, (x, 2, *rest))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    x = random(2, 4, 3, 5, device=device)
    compiled = torch.compile(group_norm_act, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, 2, skip=x, skip_scale=0.5), plain(x, 2, skip=x, skip_scale=0.5), atol=1e-6)


def test_tiles_are_longer_where_neighbours_lie() -> None:
    assert module._tile(640, 4096, channels_last=True) == (64, 32)
    assert module._tile(640, 4096, channels_last=False) == (4, 512)
    assert module._tile(1280, 64, channels_last=False) == (32, 64)
    assert module._tile(3, 1, channels_last=True) == (4, 1)
