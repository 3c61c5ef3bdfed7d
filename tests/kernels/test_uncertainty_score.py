from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.formula import assert_close

from fastdiff.kernels.launch import launch
from fastdiff.kernels.uncertainty_score import WIDEST, _mean, uncertainty_score
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


class Inputs:
    """Arguments of one call, random, with tokens rounded to one dtype and what belongs to a module to another."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, module: torch.dtype = torch.float32
    ) -> None:
        batch, tokens, width, outputs = shape
        generator = torch.Generator().manual_seed(width)

        def random(*shape: int, dtype: torch.dtype = module) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.tokens = random(batch, tokens, width, dtype=dtype)
        self.weight, self.bias, self.offset = random(outputs, width), random(outputs), random(batch, outputs)

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.weight, self.bias, self.offset

    def hold(self, bias: bool = True, offset: bool = True) -> torch.Tensor:
        """Hold a call against float64; returns its result."""
        given = self.tokens, self.weight, self.bias if bias else None, self.offset if offset else None
        result = uncertainty_score(*given)
        tokens, weight, *added = (None if part is None else part.double().contiguous() for part in given)
        bias, offset = (weight.new_zeros(1) if part is None else part for part in added)
        uncertainty = torch.sigmoid(tokens @ weight.T + bias + offset.unsqueeze(-2))
        # A sigmoid passes on a rounding of its argument times its derivative.
        terms = tokens.abs() @ weight.T.abs() + bias.abs() + offset.abs().unsqueeze(-2)
        terms = uncertainty + uncertainty * (1 - uncertainty) * terms
        assert result.dtype == torch.float32
        assert_close(result, uncertainty.mean((1, 2)), terms.mean((1, 2)))
        return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", DTYPES)
def test_results_are_the_exact_ones_whatever_the_dtypes(
    module: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    some = Inputs((2, 21, 100, 12), dtype, device, module)
    result = some.hold()
    assert torch.equal(uncertainty_score(*some.all), result)


@pytest.mark.parametrize(("bias", "offset"), [(False, False), (True, False), (False, True)])
def test_bias_and_offset_may_be_left_out(bias: bool, offset: bool, device: torch.device) -> None:
    Inputs((2, 5, 24, 4), torch.float16, device).hold(bias, offset)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 7, 7, 5), (1, 16, 64, 16), (1, 3, 1152, 32), (2, 33, 65, WIDEST), (1, 5, 40, 2 * WIDEST + 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    Inputs(shape, dtype, device).hold()


def test_more_parts_than_are_added_at_once(device: torch.device) -> None:
    """A sample of that many tokens would take the interpreter minutes."""
    sums = torch.randn(2, 2500, device=device).abs()
    result = torch.empty(2, device=device)
    launch(_mean, (2,), result, sums, 2500, 10.0, BLOCK=1024, num_warps=4)
    assert_close(result, sums.double().sum(1) / 10, sums.double().sum(1) / 10)


def test_an_empty_batch_has_no_scores(device: torch.device) -> None:
    result = uncertainty_score(*Inputs((0, 4, 8, 3), torch.float16, device).all)
    assert result.shape == (0,)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_where_they_lie(dtype: torch.dtype, device: torch.device) -> None:
    some = Inputs((2, 20, 24, 6), dtype, device)
    joint = torch.randn(3, 30, 48, device=device).to(dtype)
    for tokens in (joint[1:, 10:, 8:32], joint[:1, 10:, :24].expand(2, -1, -1), joint[:2, :24, 9:29].mT):
        some.tokens = tokens
        some.weight = torch.randn(6, 40, device=device)[:, 4:28]
        some.offset = torch.randn(2, 12, device=device)[:, 3:9]
        some.hold()


def test_one_number_that_is_none_stays_in_its_sample(device: torch.device) -> None:
    some = Inputs((4, 3, 20, 5), torch.float32, device)
    expected = uncertainty_score(*some.all)
    some.tokens[1, 2, 3] = float("nan")
    some.offset[2, 1] = float("nan")
    result = uncertainty_score(*some.all)
    assert result.isnan().tolist() == [False, True, True, False]
    assert torch.equal(result[::3], expected[::3])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of outputs that are only there to fill a tile
def test_infinite_numbers_are_as_sure_as_can_be(device: torch.device) -> None:
    some = Inputs((2, 1, 20, 1), torch.float32, device)
    some.tokens[0, 0, 7] = float("inf") * some.weight[0, 7].sign()
    some.tokens[1, 0, 7] = -float("inf") * some.weight[0, 7].sign()
    assert uncertainty_score(*some.all).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.ones(2, 4)}, r"tokens are torch.float32 of shape \(2, 4\); give floats"),
        ({"tokens": torch.ones(2, 6, 4, dtype=torch.int64)}, "tokens are torch.int64"),
        ({"tokens": torch.ones(2, 0, 4)}, "at least one token"),
        ({"weight": torch.ones(3, 5)}, r"weight has shape \(3, 5\); give \(outputs, 4\)"),
        ({"weight": torch.ones(0, 4)}, r"weight has shape \(0, 4\)"),
        ({"weight": torch.ones(3, 4, dtype=torch.int64)}, "weight is torch.int64; give floats"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\); give \(3,\)"),
        ({"offset": torch.ones(3)}, r"offset has shape \(3,\); give \(2, 3\)"),
        ({"offset": torch.ones(1, 3)}, r"offset has shape \(1, 3\); give \(2, 3\)"),
        ({"bias": torch.ones(3, device="meta")}, "tensors on cpu and meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"tokens": torch.ones(2, 6, 4), "weight": torch.ones(3, 4)} | changes
    with pytest.raises(KernelInputError, match=message):
        uncertainty_score(**arguments)


def test_reference_runs_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    some, other = (Inputs((2, 4, 8, 3), torch.float32, device) for _ in range(2))
    some.tokens = torch.randn(2, 4, 16, device=device)[:, :, ::2]
    other.weight = torch.randn(8, 3, device=device).T
    double = Inputs((2, 4, 8, 3), torch.float64, device)
    for each, message in ((some, "neither a token's channels"), (other, "last dimension"), (double, "float64 is none")):
        with pytest.raises(KernelUnavailableError, match=message):
            uncertainty_score(*each.all)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    for each in (some, other, double):
        each.hold()


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    some = Inputs((2, 4, 8, 3), torch.float32, torch.device("cpu"))
    given = [part.requires_grad_() for part in some.all]
    expected = torch.sigmoid(F.linear(some.tokens, some.weight, some.bias) + some.offset[:, None]).mean((1, 2))
    results = (torch.autograd.grad(score.square().sum(), given) for score in (uncertainty_score(*some.all), expected))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operator_is_declared_correctly(dtype: torch.dtype, device: torch.device) -> None:
    some = Inputs((2, 3, 8, 2), dtype, device)
    torch.library.opcheck(torch.ops.fastdiff.uncertainty_score.default, some.all)
    torch.library.opcheck(
        torch.ops.fastdiff.uncertainty_score.default, (some.tokens.mT.contiguous().mT, some.weight, None, None)
    )


def test_compiled_code_sees_the_reference(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    some = Inputs((2, 5, 8, 3), torch.float32, device)
    result = torch.compile(uncertainty_score, fullgraph=True, backend="aot_eager")(*some.all)
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    assert torch.equal(result, uncertainty_score(*some.all))
