"""Kernels at the shapes of real models: on GPUs as they are, in the interpreter made small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import operations
from kernel_checks.listed import CASES, COLD, KERNELS, LAUNCH, WARM, WARM_BYTES, Case
from kernel_checks.operations import tensors_in

from fastdiff import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = [*dict.fromkeys(case.small() for case in CASES)]
"""Made small, most shapes of an operation are one."""
LARGE: dict[str, tuple[operations.Operation, dict[str, Any]]] = {
    "residual_norm_modulate": (operations.ResidualNormModulate(), {"tokens": 1024, "width": 1024, "adaptive": True}),
    "group_norm_act": (operations.GroupNormAct(), {"channels": 4096, "size": 16}),
    "skip_shortcut": (
        operations.SkipShortcut(),
        {"channels": 64, "skip_channels": 16, "size": 128, "outputs": 64},
    ),
    "geglu": (operations.Geglu(), {"tokens": 1024, "hidden": 512}),
    "gelu_tanh": (operations.GeluTanh(), {"tokens": 1024, "hidden": 1024}),
    "exit_head": (operations.ExitHead(), {"columns": 32, "width": 1024, "patch": 2, "channels": 4}),
    "uncertainty_score": (operations.UncertaintyScore(), {"tokens": 1024, "width": 1024, "outputs": 16}),
    "qk_norm_rope": (operations.QkNormRope(), {"tokens": 1024, "heads": 8, "width": 128}),
    "lincomb": (operations.Lincomb(), {"count": 2, "sample": (1024, 1024)}),
}
"""Samples of 2**20 elements."""


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("forced", "poisoned")
def test_results_at_the_shapes_of_models_are_the_exact_ones(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    case.operation.hold(case.inputs(dtype, device))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.usefixtures("forced", "poisoned")
def test_results_at_small_shapes_are_the_exact_ones(case: Case, device: torch.device) -> None:
    case.operation.hold(case.inputs(torch.float16, device))


def of_last_sample(value: Any, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(of_last_sample(part, batch) for part in value)
    return value[-1:] if isinstance(value, torch.Tensor) and len(value) == batch else value


def tensors_of(result: Any) -> list[torch.Tensor]:
    return tensors_in(result if isinstance(result, tuple) else (result,))


@pytest.mark.parametrize("batch", [5, pytest.param(2**11 + 1, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kernel", LARGE)
@pytest.mark.usefixtures("forced")
def test_last_of_many_samples_is_what_it_is_alone(kernel: str, batch: int, device: torch.device) -> None:
    """The many have more elements than a 32-bit offset reaches."""
    operation, sizes = LARGE[kernel]
    if batch == 5:
        limits = operation.limits | {"sample": (2, 3)}
        sizes = {name: limits.get(name, value) for name, value in sizes.items()}
    given = operation.inputs(operations.Random(torch.float16, device), batch=batch, **sizes)
    alone = operation.fused(**{name: of_last_sample(value, batch) for name, value in given.items()})
    many = operation.fused(**given)
    for result, expected in zip(tensors_of(many), tensors_of(alone), strict=True):
        assert torch.equal(result[-1:], expected)


# -- the list itself ---------------------------------------------------------------------------------------------------


def test_every_kernel_is_listed() -> None:
    assert set(KERNELS) == {name for name in ops.__all__ if name[0].islower()}
    assert all(any(case.kernel == kernel and case.tiny for case in CASES) for kernel in KERNELS)
    assert set(LARGE) == set(KERNELS) - {"gather_rows", "scatter_rows"}


def test_no_case_is_listed_twice() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


def test_listed_shapes_are_those_of_the_operations() -> None:
    """On a device without memory: torch's operations take these shapes, and what is moved decides what is timed."""
    for case in CASES:
        results = tensors_of(case.operation.eager(**case.inputs(torch.bfloat16, "meta")))
        moved = case.moved(torch.bfloat16)
        assert moved >= 2 * min(tensor.nbytes for tensor in results) or case.kernel == "scatter_rows"
        expected = (LAUNCH,) if case.tiny else (COLD, WARM) if moved <= WARM_BYTES else (COLD,)
        assert case.regimes(torch.bfloat16) == expected


def test_bytes_moved_are_those_of_the_block_boundary() -> None:
    case = next(case for case in CASES if case.model == "DiT-XL/2 256" and case.what == "block")
    activation = 2 * 256 * 1152 * 2
    assert case.moved(torch.float16) == 4 * activation + 3 * 2 * 1152 * 2


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_wrong_result_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    fused = case.operation.fused

    def wrong(self: operations.Operation, **given: Any) -> Any:
        result = fused(**given)
        last = tensors_of(result)[-1]
        last[(-1,) * last.ndim] += 1
        return result

    case.operation.hold(case.inputs(torch.float16, "cpu"))
    monkeypatch.setattr(type(case.operation), "fused", wrong)
    with pytest.raises(AssertionError):
        case.operation.hold(case.inputs(torch.float16, "cpu"))
