from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.formula import assert_close

from fastdiff.kernels.skip_shortcut import skip_shortcut
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def plain(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Any = None, factor: Any = 1.0) -> Any:
    """What a UNet does: scale, concatenate, convolve."""
    if isinstance(factor, torch.Tensor):
        factor = factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    hidden = torch.cat([x, factor * skip], dim=1).flatten(2)
    return F.conv1d(hidden, weight.view(*weight.shape[:2], 1), bias).unflatten(2, x.shape[2:])


def hold(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: Any = None, factor: Any = None, fair: bool = True
) -> torch.Tensor:
    """Hold a call against float64, and against torch's own operations where that is fair."""
    given = {} if factor is None else {"skip_scale": factor}
    factor = 1.0 if factor is None else factor
    result = skip_shortcut(x, skip, weight, bias, **given)
    x64, skip64, weight64 = (part.double().contiguous() for part in (x, skip, weight))
    bias64 = None if bias is None else bias.double()
    exact = plain(x64, skip64, weight64, bias64, factor)
    largest = factor.abs() if isinstance(factor, torch.Tensor) else abs(factor)
    # Every product is rounded on the way to a sum that may be small.
    terms = plain(x64.abs(), skip64.abs(), weight64.abs(), None if bias is None else bias64.abs(), largest)
    assert_close(result, exact, terms, plain(x, skip, weight, bias, factor) if fair else None)
    return result


def inputs(
    dtype: torch.dtype, device: torch.device, layout: torch.memory_format = torch.contiguous_format
) -> tuple[torch.Tensor, ...]:
    x, skip = (
        random(2, width, 5, 7, dtype=dtype, device=device).contiguous(memory_format=layout) for width in (40, 24)
    )
    weight, bias = random(36, 64, 1, 1, dtype=dtype, device=device), random(36, dtype=dtype, device=device)
    return x, skip, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_is_the_exact_one(layout: torch.memory_format, dtype: torch.dtype, device: torch.device) -> None:
    x, skip, weight, bias = inputs(dtype, device, layout)
    result = hold(x, skip, weight, bias)
    assert result.is_contiguous(memory_format=layout)
    hold(x, skip, weight.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.7, 0.0, torch.tensor(0.7), torch.tensor([0.5, 1.5])])
def test_factor_of_the_skip(factor: Any, dtype: torch.dtype, device: torch.device) -> None:
    factor = factor.to(device) if isinstance(factor, torch.Tensor) else factor
    # Eager operations round what they scale.
    hold(*inputs(dtype, device), factor=factor, fair=False)


@pytest.mark.parametrize(
    ("width", "skip_width", "outputs", "spatial"),
    [
        (1, 1, 1, (1,)),
        (3, 70, 5, (11,)),
        (33, 1, 65, (2, 3)),
        (4, 4, 2, (2, 3, 5)),
        (0, 4, 3, (2, 2)),
        (5, 2, 3, (67,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_shapes(
    width: int, skip_width: int, outputs: int, spatial: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x, skip = (random(3, channels, *spatial, dtype=dtype, device=device) for channels in (width, skip_width))
    weight = random(outputs, width + skip_width, dtype=dtype, device=device)
    hold(x, skip, weight, random(outputs, dtype=dtype, device=device), 0.5, fair=False)
    if x.ndim == 5:
        x, skip = (part.contiguous(memory_format=torch.channels_last_3d) for part in (x, skip))
        assert hold(x, skip, weight, fair=False).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("batch", "size", "outputs"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_in_nothing_out(batch: int, size: int, outputs: int, device: torch.device) -> None:
    x = torch.ones(batch, 4, size, 3, device=device)
    result = skip_shortcut(x, x, torch.ones(outputs, 8, device=device))
    assert result.shape == (batch, outputs, size, 3)


def test_weight_may_have_more_digits(device: torch.device) -> None:
    x, skip, weight, bias = inputs(torch.float16, device)
    hold(x, skip, weight.float() / 3, bias.float() / 3, fair=False)


def test_samples_are_read_where_they_lie(device: torch.device) -> None:
    x, skip = random(2, 4, 6, 3, 3, device=device)[:, ::2]
    hold(x, skip, random(5, 20, device=device)[:, 4:16], factor=0.5)


def test_nan_stays_in_its_pixel(device: torch.device) -> None:
    x, skip, weight, _ = inputs(torch.float32, device)
    x[0, 3, 1, 2], skip[1, 5, 4, 6] = float("nan"), float("nan")
    result = skip_shortcut(x, skip, weight).isnan()
    assert result[0, :, 1, 2].all()
    assert result[1, :, 4, 6].all()
    assert result.sum() == 2 * result.shape[1]


def test_two_runs_agree(device: torch.device) -> None:
    given = inputs(torch.float32, device)
    assert torch.equal(skip_shortcut(*given), skip_shortcut(*given))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": ones(2, 4)}, "batch, channels"),
        ({"x": ones(2, 4, 3).int()}, "int32"),
        ({"skip": ones(2, 3, 3, 2)}, "only differ in their channels"),
        ({"skip": ones(1, 3, 3, 3)}, "only differ in their channels"),
        ({"skip": ones(2, 3, 3, 3).half()}, "float16"),
        ({"weight": ones(5, 6)}, r"weight has shape \(5, 6\); give \(outputs, 7\)"),
        ({"weight": ones(5, 7, 3, 3)}, "1×1 convolution"),
        ({"weight": ones(7)}, "weight has shape"),
        ({"bias": ones(4)}, r"bias has shape \(4,\); give \(5,\)"),
        ({"skip_scale": ones(3)}, "skip_scale"),
        ({"bias": torch.ones(5, device="meta")}, "one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    arguments = {"x": ones(2, 4, 3, 3), "skip": ones(2, 3, 3, 3), "weight": ones(5, 7)} | given
    with pytest.raises(KernelInputError, match=message):
        skip_shortcut(**arguments)


@pytest.mark.parametrize("kind", ["sliced", "mixed", "weight"])
def test_reference_runs_where_the_kernel_cannot(
    kind: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x, skip, weight, bias = inputs(torch.float32, device)
    reason = "neither contiguous nor channels-last"
    if kind == "sliced":
        x, skip = x[..., ::2], skip[..., ::2]
    elif kind == "mixed":
        skip = skip.contiguous(memory_format=torch.channels_last)
    else:
        weight, reason = weight.flatten(1).T.contiguous().T, "weight or bias"
    with pytest.raises(KernelUnavailableError, match=reason):
        skip_shortcut(x, skip, weight, bias)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    hold(x, skip, weight, bias)


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x, skip, weight = (random(*shape).double().requires_grad_() for shape in ((1, 2, 3), (1, 4, 3), (2, 6)))
    torch.autograd.gradcheck(lambda *given: skip_shortcut(*given, skip_scale=0.5), (x, skip, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_declared_correctly(layout: torch.memory_format, device: torch.device) -> None:
    given = inputs(torch.float32, device, layout)
    torch.library.opcheck(torch.ops.fastdiff.skip_shortcut.default, (*given, torch.tensor(0.5, device=device)))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    given = inputs(torch.float32, device)
    compiled = torch.compile(skip_shortcut, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, skip_scale=0.5), plain(*given, factor=0.5))
