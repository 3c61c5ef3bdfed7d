from __future__ import annotations

import pytest
import torch
from kernel_checks.formula import assert_close

from fastdiff.engine.program import extrapolation_weights
from fastdiff.kernels.lincomb import lincomb, lincomb_reference, sample_layout
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def exact(coefficients: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    return lincomb_reference(coefficients.double(), *(tensor.double().contiguous() for tensor in tensors))


def largest_term(coefficients: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    weights = coefficients.expand(len(tensors[0]), -1)
    terms = [weights[:, k].view(-1, *[1] * (x.ndim - 1)) * x.double() for k, x in enumerate(tensors)]
    return torch.stack(terms).abs().amax(0)


def eager(coefficients: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    weights = coefficients.expand(len(tensors[0]), -1).to(tensors[0].dtype)
    return sum(weights[:, k].view(-1, *[1] * (x.ndim - 1)) * x for k, x in enumerate(tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("per_sample", [True, False])
def test_sum_is_the_exact_one(count: int, dtype: torch.dtype, per_sample: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(count)
    shape = (3, 5, 7, 31)  # more elements in a sample than one program sums
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]
    coefficients = torch.randn((3, count) if per_sample else (count,), generator=generator).to(device)
    y = lincomb(coefficients, *tensors)
    assert y.dtype == dtype
    terms = largest_term(coefficients, *tensors)
    assert_close(y, exact(coefficients, *tensors), terms, eager(coefficients, *tensors) if count > 1 else None)


@pytest.mark.parametrize("shape", [(1, 1), (2,), (0, 4), (2, 0), (1, 1025), (4, 1, 1, 3)])
def test_odd_shapes(shape: tuple[int, ...], device: torch.device) -> None:
    tensors = [torch.randn(shape, device=device) for _ in range(2)]
    weights = torch.tensor([0.5, -2.0], device=device)
    y = lincomb(weights, *tensors)
    assert_close(y, exact(weights, *tensors), largest_term(weights, *tensors))


def test_samples_are_read_where_they_lie(device: torch.device) -> None:
    """Halves of a guided batch, the first channels of a prediction, one sample for all, channels last."""
    weights = torch.randn(2, 3, device=device)
    pair = torch.randn(4, 6, 3, 5, device=device)
    uncond, cond = (half[:, :4] for half in pair.chunk(2))
    shared = torch.randn(1, 4, 3, 5, device=device).expand(2, -1, -1, -1)
    y = lincomb(weights, uncond, cond, shared)
    assert_close(y, exact(weights, uncond, cond, shared), largest_term(weights, uncond, cond, shared))

    sliced = [torch.randn(2, 4 + extra, 3, 5, device=device)[:, :4] for extra in range(6)]
    weights = torch.randn(2, 6, device=device)
    assert_close(lincomb(weights, *sliced), exact(weights, *sliced), largest_term(weights, *sliced))

    weights = torch.randn(2, 3, device=device)
    last = [torch.randn(2, 4, 3, 5, device=device).to(memory_format=torch.channels_last) for _ in range(3)]
    y = lincomb(weights, *last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, exact(weights, *last), largest_term(weights, *last))


def test_sample_layout() -> None:
    x = torch.empty(2, 4, 3, 5)
    assert sample_layout(x) == (15, 5, 1)
    assert sample_layout(x[:, 1:3]) == (15, 5, 1)
    assert sample_layout(x[:, :, 1:]) is None
    assert sample_layout(x[..., ::2]) is None
    assert sample_layout(x[:, :1].expand(2, 4, 3, 5)) is None
    assert sample_layout(x.to(memory_format=torch.channels_last)) == (1, 20, 4)


def test_dtypes_are_promoted(device: torch.device) -> None:
    sample, prediction = torch.randn(2, 9, device=device), torch.randn(2, 9, device=device).half()
    weights = torch.tensor([1.0, -0.3], device=device)
    y = lincomb(weights, sample, prediction)
    assert y.dtype == torch.float32
    assert_close(y, exact(weights, sample, prediction), largest_term(weights, sample, prediction))


def test_in_place(device: torch.device) -> None:
    x, update = torch.randn(2, 40, device=device), torch.randn(2, 40, device=device)
    weights = torch.tensor([0.9, 0.1], device=device)
    expected, terms = exact(weights, x, update), largest_term(weights, x, update)
    assert lincomb(weights, x, update, out=x) is x
    assert_close(x, expected, terms)


def test_nan_and_infinity_stay_where_they_are(device: torch.device) -> None:
    x, y = torch.zeros(1, 8, device=device), torch.ones(1, 8, device=device)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y[0, 3] = float("inf")
    result = lincomb(torch.tensor([1.0, 2.0], device=device), x, y)
    assert torch.equal(result.nan_to_num(7.0), (x + 2 * y).nan_to_num(7.0))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_forecast_continues_a_polynomial(order: int, device: torch.device) -> None:
    rows = list(range(2 * order, -1, -2))  # every second evaluation was computed
    weights = torch.tensor(extrapolation_weights(rows, 2 * order + 1), dtype=torch.float32, device=device)
    kept = [torch.full((1, 5), float(row) ** order, device=device) for row in rows]
    expected = torch.full((1, 5), float(2 * order + 1) ** order, device=device)
    terms = largest_term(weights, *kept)
    assert_close(lincomb(weights, *kept), expected.double(), terms)


def test_reused_residual_is_added_to_the_fresh_input(device: torch.device) -> None:
    fresh, residual = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    assert torch.equal(lincomb(torch.ones(2, device=device), fresh, residual), fresh + residual)


@pytest.mark.parametrize(
    ("coefficients", "tensors", "message"),
    [
        (torch.ones(0), [], "0 tensors"),
        (torch.ones(7), [torch.ones(1)] * 7, "7 tensors"),
        (torch.ones(2), [torch.ones(1, 2), torch.ones(1, 3)], "must equal"),
        (torch.ones(1), [torch.tensor(1.0)], "must equal"),
        (torch.ones(3, 1), [torch.ones(2, 2)], "coefficients of shape"),
        (torch.ones(1), [torch.ones(2, 2, dtype=torch.int32)], "floating-point"),
        (torch.ones(1, device="meta"), [torch.ones(2, 2)], "one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    coefficients: torch.Tensor, tensors: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(KernelInputError, match=message):
        lincomb(coefficients, *tensors)


def test_out_that_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelInputError, match=r"out is torch\.float16"):
        lincomb(torch.ones(1), torch.ones(2, 2), out=torch.ones(2, 2).half())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.ones(2, 3).double()], "float64"),
        ([torch.ones(2, 3, requires_grad=True)], "gradients"),
        ([torch.ones(2, 4)[:, ::2]], "without gaps"),
        ([torch.ones(2, 3, 4), torch.ones(2, 4, 3).transpose(1, 2)], "alike"),
    ],
)
def test_reference_runs_where_the_kernel_cannot(
    tensors: list[torch.Tensor], reason: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    tensors = [tensor.to(device) for tensor in tensors]
    weights = torch.full((len(tensors),), 0.5, device=device)
    with pytest.raises(KernelUnavailableError, match=reason):
        lincomb(weights, *tensors)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    assert torch.equal(lincomb(weights, *tensors), sum(0.5 * tensor for tensor in tensors))


def test_gradients_pass() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    weights = torch.tensor([3.0], requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_KERNELS", "auto")
        lincomb(weights, x).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))
    assert weights.grad.item() == 6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operator_is_declared_correctly(
    layout: torch.memory_format, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=layout) for _ in range(2)]
    torch.library.opcheck(torch.ops.fastdiff.lincomb.default, (torch.ones(2, device=device), tensors))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    weights, x, y = torch.tensor([2.0, 3.0], device=device), torch.randn(2, 5), torch.randn(2, 5)
    x, y = x.to(device), y.to(device)
    compiled = torch.compile(lincomb, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights, x, y), lincomb_reference(weights, x, y))
