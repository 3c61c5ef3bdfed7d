from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.formula import assert_close

from fastdiff.kernels.geglu import _row_stride, geglu, gelu_tanh
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def exact(x: torch.Tensor, approximate: str) -> torch.Tensor:
    hidden, gate = x.double().contiguous().chunk(2, -1)
    return hidden * F.gelu(gate, approximate=approximate)


def terms(x: torch.Tensor) -> torch.Tensor:
    """GELU is half its argument times a difference of two numbers near one."""
    hidden, gate = x.double().chunk(2, -1)
    return (hidden * gate).abs()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, 3, 100), (1, 2), (5, 14), (1, 2, 2500), (0, 3, 8), (2, 0)])
def test_geglu_is_the_exact_one(
    shape: tuple[int, ...], approximate: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = random(*shape, dtype=dtype).to(device)
    hidden, gate = x.chunk(2, -1)
    eager = hidden * F.gelu(gate, approximate=approximate) if shape[-1] >= 100 else None
    assert_close(geglu(x, approximate=approximate), exact(x, approximate), terms(x), eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 100), (1,), (1, 1025), (0, 4)])
def test_gelu_is_the_exact_one(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = random(*shape, dtype=dtype).to(device)
    assert_close(gelu_tanh(x), F.gelu(x.double(), approximate="tanh"), x.double().abs())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_match_eager(approximate: str, device: torch.device) -> None:
    # Far in the negative tail GELU is a difference of nearly equal numbers, where no two implementations agree.
    x = (random(4, 512) / 3).half().to(device)
    hidden, gate = x.chunk(2, -1)
    eager = hidden * F.gelu(gate, approximate=approximate)
    same = (geglu(x, approximate=approximate, rounding="match_eager") == eager).double().mean().item()
    fused = (geglu(x, approximate=approximate) == eager).double().mean().item()
    assert same > 0.99 > fused


def test_rows_are_read_where_they_lie(device: torch.device) -> None:
    x = random(3, 4, 40).to(device)[..., 8:28]
    assert_close(geglu(x), exact(x, "none"), terms(x))
    x = random(3, 4, 40).to(device)[:1]
    assert_close(geglu(x), exact(x, "none"), terms(x))


def test_row_stride() -> None:
    x = torch.empty(3, 4, 40)
    assert _row_stride(x) == 40
    assert _row_stride(x[..., 8:28]) == 40
    assert _row_stride(x[:, :2]) is None
    assert _row_stride(x[:, :1]) == 160
    assert _row_stride(x[..., ::2]) is None
    assert _row_stride(x.transpose(0, 1)) is None
    assert _row_stride(x[0, 0]) == 40


def test_extremes(device: torch.device) -> None:
    # torch's own results at infinity differ between its vectorised and other code.
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0], device=device)
    expected = torch.tensor([7.0, torch.finfo(torch.float32).max, 7.0, 1e30, 0.0, 0.0], device=device)
    x = torch.cat([torch.ones_like(gate), gate])
    for result in (geglu(x), geglu(x, approximate="tanh"), gelu_tanh(gate)):
        assert torch.equal(result.nan_to_num(7.0), expected)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(2, 3), {}, "must be even"),
        (torch.tensor(1.0), {}, r"shape \(..., width\)"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "int32"),
        (torch.ones(2, 2), {"approximate": "sigmoid"}, "'sigmoid'"),
        (torch.ones(2, 2), {"rounding": "up"}, "'up'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x: torch.Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        geglu(x, **options)


def test_reference_runs_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = random(3, 4, 8).to(device)[:, :2]
    with pytest.raises(KernelUnavailableError, match="equal distances"):
        geglu(x)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    assert_close(geglu(x), exact(x, "none"), terms(x))


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(geglu, x)
    torch.autograd.gradcheck(gelu_tanh, x)


def test_operators_are_declared_correctly(device: torch.device) -> None:
    x = random(2, 3, 8).to(device)
    torch.library.opcheck(torch.ops.fastdiff.geglu.default, (x, "none", "fused"))
    torch.library.opcheck(torch.ops.fastdiff.gelu_tanh.default, (x,))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    x = random(2, 8).to(device)
    hidden, gate = x.chunk(2, -1)
    assert torch.equal(torch.compile(geglu, fullgraph=True, backend="aot_eager")(x), hidden * F.gelu(gate))
