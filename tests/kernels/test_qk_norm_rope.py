from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from kernel_checks.formula import assert_close

from fastdiff.kernels.qk_norm_rope import MAX_WIDTH, qk_norm_rope
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = ["neighbours", "halves"]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1] + seed)).to(dtype)


def angles(tokens: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Differ within pairs, which a kernel that reads one of the two would not notice otherwise."""
    angle = 3 * random(tokens, width, seed=1).to(device)
    return angle.cos(), angle.sin()


def normed(x: torch.Tensor, weight: torch.Tensor | None, norm: bool) -> torch.Tensor:
    if not norm:
        return x
    return torch.nn.functional.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), 1e-6)


def turned(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
    """Written down a second time: by indices of the partners."""
    width = hidden.shape[-1]
    index = torch.arange(width)
    partner, second = (
        (index ^ 1, index % 2 == 1) if pairs == "neighbours" else (index.roll(width // 2), index >= width // 2)
    )
    sign = torch.where(second, 1.0, -1.0).to(hidden)
    return hidden * cos[:, None] + sign * hidden[..., partner] * sin[:, None]


def hold(result: torch.Tensor, x: torch.Tensor, weight: Any, cos: Any, sin: Any, norm: bool, pairs: str) -> None:
    """Hold a result against float64."""
    exact = hidden = normed(x.double(), None if weight is None else weight.double(), norm)
    eager = normed(x, weight, norm)
    terms = hidden.abs()
    if cos is not None:
        exact = turned(hidden, cos.double(), sin.double(), pairs)
        terms = turned(hidden.abs(), cos.double().abs(), sin.double().abs(), pairs).abs() + terms.amax(-1, keepdim=True)
        dimension = -1 if pairs == "neighbours" else -2
        eager = apply_rotary_emb(eager, (cos, sin), use_real_unbind_dim=dimension, sequence_dim=1)
    assert_close(result, exact, terms, eager if x.numel() >= 500 and norm else None)
    assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("norm", "affine"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(2, 3, 3, 40), (1, 2, 5, 128), (1, 1, 1, 2), (2, 1, 1, 1024)])
def test_results_are_the_exact_ones(
    shape: tuple[int, ...], norm: bool, affine: bool, pairs: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = 3 * random(*shape, dtype=dtype).to(device)
    weight = random(shape[-1], dtype=dtype, seed=2).to(device) if affine else None
    cos, sin = angles(shape[1], shape[3], device)
    hold(qk_norm_rope(x, weight, cos, sin, norm=norm, pairs=pairs), x, weight, cos, sin, norm, pairs)


@pytest.mark.parametrize("shape", [(2, 2, 3, 7), (1, 1, 1, 1), (1, 2, 70, 100)])
@pytest.mark.parametrize("pairs", PAIRS)
def test_norm_alone(shape: tuple[int, ...], pairs: str, device: torch.device) -> None:
    x, weight = random(*shape, dtype=torch.float16).to(device), random(shape[-1], dtype=torch.float16).to(device)
    hold(qk_norm_rope(x, weight, pairs=pairs), x, weight, None, None, True, pairs)


@pytest.mark.parametrize("shape", [(0, 2, 2, 8), (2, 0, 2, 8), (2, 2, 0, 8)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: torch.device) -> None:
    assert qk_norm_rope(torch.empty(shape, device=device), None, *angles(shape[1], 8, device)).shape == shape


@pytest.mark.parametrize("pairs", PAIRS)
def test_tensors_are_read_and_written_where_they_lie(pairs: str, device: torch.device) -> None:
    """The part of a joint sequence that follows the text, heads before tokens."""
    x = random(2, 3, 4, 16).to(device).transpose(1, 2)
    cos, sin = (part[2:] for part in angles(6, 16, device))
    joint = torch.zeros(2, 3, 7, 16, device=device).transpose(1, 2)
    part = joint[:, 2:6]
    assert qk_norm_rope(x, None, cos, sin, pairs=pairs, out=part) is part
    hold(part.contiguous(), x, None, cos, sin, True, pairs)
    assert not joint[:, :2].any()
    assert not joint[:, 6:].any()


@pytest.mark.parametrize("pairs", PAIRS)
def test_match_eager(pairs: str, device: torch.device) -> None:
    x, weight = random(2, 4, 3, 64, dtype=torch.float16).to(device), random(64, dtype=torch.float16).to(device)
    cos, sin = angles(4, 64, device)
    dimension = -1 if pairs == "neighbours" else -2
    eager = apply_rotary_emb(normed(x, weight, True), (cos, sin), use_real_unbind_dim=dimension, sequence_dim=1)
    rounded = qk_norm_rope(x, weight, cos, sin, pairs=pairs, rounding="match_eager")
    same = (rounded == eager).double().mean().item()
    assert same > 0.99 > (qk_norm_rope(x, weight, cos, sin, pairs=pairs) == eager).double().mean().item()


def test_extremes(device: torch.device) -> None:
    x = torch.ones(1, 4, 1, 4, device=device)
    x[0, 1, 0, 2], x[0, 2, 0, 1], x[0, 3] = float("nan"), float("inf"), 0.0
    cos, sin = torch.ones(4, 4, device=device), torch.zeros(4, 4, device=device)
    result = qk_norm_rope(x, None, cos, sin)[0, :, 0]
    torch.testing.assert_close(result[0], torch.ones(4, device=device))
    assert result[1].isnan().all()
    assert result[2, 1].isnan()
    assert (result[3] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 3, 4),), {}, "give floats"),
        ((torch.ones(2, 3, 4, 2, dtype=torch.int32),), {}, "int32"),
        ((torch.ones(1, 2, 1, 4), torch.ones(3)), {}, r"weight has shape \(3,\)"),
        ((torch.ones(1, 2, 1, 4), torch.ones(4)), {"norm": False}, "norm is False"),
        ((torch.ones(1, 2, 1, 4), None, torch.ones(2, 4)), {}, "cos without sin"),
        ((torch.ones(1, 2, 1, 4), None, torch.ones(3, 4), torch.ones(2, 4)), {}, r"cos has shape \(3, 4\)"),
        ((torch.ones(1, 2, 1, 3), None, torch.ones(2, 3), torch.ones(2, 3)), {}, "even width"),
        ((torch.ones(1, 2, 1, 4),), {"pairs": "odd"}, "'odd'"),
        ((torch.ones(1, 2, 1, 4),), {"rounding": "up"}, "'up'"),
        ((torch.ones(1, 2, 1, 4),), {"out": torch.ones(1, 2, 1, 4).half()}, "must be equal"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        qk_norm_rope(*arguments, **options)


def test_reference_runs_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = random(1, 2, 8, 4).to(device).transpose(2, 3)
    out = torch.empty_like(x)
    with pytest.raises(KernelUnavailableError, match="last dimension"):
        qk_norm_rope(x)
    with pytest.raises(KernelUnavailableError, match=f"above {MAX_WIDTH}"):
        qk_norm_rope(torch.ones(1, 1, 1, MAX_WIDTH + 2, device=device))
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    assert qk_norm_rope(x, out=out) is out
    hold(out.contiguous(), x, None, None, None, True, "neighbours")


@pytest.mark.parametrize("pairs", PAIRS)
def test_gradients_pass(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x, weight = torch.randn(1, 2, 2, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    cos, sin = (part.double() for part in angles(2, 4, torch.device("cpu")))
    torch.autograd.gradcheck(
        lambda x, weight: qk_norm_rope(x, weight, cos, sin, pairs=pairs), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("pairs", PAIRS)
def test_operator_is_declared_correctly(pairs: str, device: torch.device) -> None:
    x = random(2, 3, 2, 8).to(device).transpose(1, 2)
    cos, sin = angles(2, 8, device)
    torch.library.opcheck(
        torch.ops.fastdiff.qk_norm_rope.default, (x, torch.ones(8, device=device), cos, sin, True, pairs, 1e-6, "fused")
    )


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    x = random(1, 2, 2, 8).to(device)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    hold(compiled(x, None, *angles(2, 8, device)), x, None, *angles(2, 8, device), True, "neighbours")
