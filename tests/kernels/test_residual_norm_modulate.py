from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks.formula import assert_close

from fastdiff.kernels.residual_norm_modulate import MAX_WIDTH, residual_norm_modulate
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = ["layer", "rms", None]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


class Inputs:
    """Arguments of one call, random and rounded to a dtype."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, mean: float = 0.0
    ) -> None:
        batch, _, width = shape
        generator = torch.Generator().manual_seed(width)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        self.x, self.branch = random(*shape) + mean, random(*shape)
        self.gate, self.scale, self.shift = random(batch, 3 * width).chunk(3, dim=1)
        self.weight, self.bias = random(width), random(width)
        self.uem = (random(width), random(batch))

    def arguments(self, norm: str | None, branch: bool, gate: bool, affine: bool, modulate: bool) -> dict[str, Any]:
        wanted = {
            "branch": branch,
            "gate": gate,
            "weight": affine,
            "bias": affine,
            "scale": modulate,
            "shift": modulate,
        }
        return {"norm": norm} | {name: getattr(self, name) for name, used in wanted.items() if used}


def doubled(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    return value.double().contiguous() if isinstance(value, torch.Tensor) else value


def reference(*args: Any, **kwargs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_KERNELS", "torch")
        return residual_norm_modulate(*args, **kwargs)


def expanded(tensor: torch.Tensor | None, neutral: float) -> torch.Tensor | float:
    if tensor is None:
        return neutral
    return doubled(tensor).abs().unsqueeze(1) if tensor.ndim == 2 else doubled(tensor).abs()


def hold(x: torch.Tensor, results: tuple, given: dict[str, Any], check_eager: bool = True) -> None:
    """Hold every result of a call against float64."""
    residual, normed, uncertainty = results
    first = {name: doubled(given.get(name)) for name in ("branch", "gate")}
    eager = reference(x, rounding="match_eager", **{k: v for k, v in given.items() if k != "uem"})
    if first["branch"] is not None:
        expected, _, _ = reference(x.double(), **first, norm=None)
        terms = torch.maximum(x.double().abs(), first["branch"].abs() * expanded(given.get("gate"), 1.0))
        assert_close(residual, expected, terms, eager[0] if check_eager and given.get("gate") is not None else None)
    # What follows is exact for the residual as it was rounded.
    second = {name: doubled(value) for name, value in given.items() if name not in ("branch", "gate")}
    _, expected, certainty = reference(residual.double(), **second)
    hidden = residual.double()
    factor = 1 + doubled(given["scale"]).unsqueeze(1) if "scale" in given else torch.ones((), device=x.device)
    spread = hidden - hidden.mean(-1, keepdim=True) if given["norm"] == "layer" else hidden
    deviation = 1.0 if given["norm"] is None else (spread.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    terms = hidden.abs().amax(-1, keepdim=True) / deviation * expanded(given.get("weight"), 1.0)
    terms = (terms + expanded(given.get("bias"), 0.0)) * factor.abs() + expanded(given.get("shift"), 0.0)
    fair = check_eager and torch.equal(residual, eager[0]) and given["norm"] is not None
    assert_close(normed, expected, terms, eager[1] if fair else None)
    if "uem" in given:
        terms = (hidden * second["uem"][0]).abs().amax(-1) + second["uem"][1].abs().view(-1, 1)
        assert uncertainty.dtype == torch.float32
        assert_close(uncertainty, certainty, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modulate", [True, False])
@pytest.mark.parametrize(("branch", "gate"), [(False, False), (True, False), (True, True)])
def test_results_are_the_exact_ones(
    norm: str | None, branch: bool, gate: bool, modulate: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = Inputs((2, 3, 100), dtype, device)
    for affine in (False, True) if norm is not None else (False,):
        given = inputs.arguments(norm, branch, gate, affine, modulate) | {"uem": inputs.uem}
        hold(inputs.x, residual_norm_modulate(inputs.x, **given), given)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 7), (1, 2, 1000), (3, 1, 64), (1, 1, 1152)])
@pytest.mark.parametrize("norm", NORMS)
def test_odd_shapes(shape: tuple[int, int, int], norm: str | None, device: torch.device) -> None:
    inputs = Inputs(shape, torch.float16, device)
    given = inputs.arguments(norm, True, True, norm is not None, True) | {"uem": inputs.uem}
    hold(inputs.x, residual_norm_modulate(inputs.x, **given), given, check_eager=False)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_in_nothing_out(shape: tuple[int, int, int], device: torch.device) -> None:
    inputs = Inputs(shape, torch.float32, device)
    given = inputs.arguments("layer", True, True, True, True)
    residual, normed, uncertainty = residual_norm_modulate(inputs.x, **given, uem=inputs.uem)
    assert residual.shape == normed.shape == shape
    assert uncertainty.shape == shape[:2]


def test_a_large_mean_does_not_spoil_the_variance(device: torch.device) -> None:
    inputs = Inputs((1, 2, 256), torch.float32, device, mean=1000.0)
    given = inputs.arguments("layer", False, False, False, False)
    hold(inputs.x, residual_norm_modulate(inputs.x, **given), given)


def test_tensors_are_read_where_they_lie(device: torch.device) -> None:
    """Tokens of a joint sequence, modulations of shape (batch, 1, width) and per token."""
    joint = torch.randn(2, 9, 24, device=device)
    x, branch = joint[:, 4:], torch.randn(5, 2, 24, device=device).transpose(0, 1)
    for modulation in (torch.randn(2, 6, 24, device=device).unsqueeze(2), torch.randn(2, 3, 5, 24, device=device)):
        gate, scale, shift = modulation[:, :3].unbind(1)
        given = {"gate": gate, "scale": scale, "shift": shift}
        residual, normed, _ = residual_norm_modulate(x, branch, **given)
        exact, exact_normed, _ = reference(
            x.double(), branch.double(), **{name: t.double() for name, t in given.items()}
        )
        assert_close(residual, exact, exact.abs().amax())
        assert_close(normed, exact_normed, 8 * exact_normed.abs().amax())
        assert normed.is_contiguous()


def test_what_is_not_computed_is_not_copied(device: torch.device) -> None:
    x, branch = torch.randn(2, 2, 3, 8, device=device)
    residual, normed, uncertainty = residual_norm_modulate(x)
    assert residual is x
    assert uncertainty is None
    residual, normed, _ = residual_norm_modulate(x, branch, norm=None)
    assert normed is residual


def test_a_closed_gate_is_neutral(device: torch.device) -> None:
    inputs = Inputs((2, 3, 40), torch.float16, device)
    residual, normed, _ = residual_norm_modulate(inputs.x, inputs.branch, torch.zeros_like(inputs.gate))
    assert torch.equal(residual, inputs.x)
    assert torch.equal(normed, residual_norm_modulate(inputs.x)[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_match_eager(norm: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """bfloat16 is cut off in the interpreter, and cannot be compared there."""
    inputs = Inputs((2, 3, 100), dtype, device)
    given = inputs.arguments(norm, True, True, norm is not None, True) | {"rounding": "match_eager"}
    residual, normed, _ = residual_norm_modulate(inputs.x, **given)
    expected, expected_normed, _ = reference(inputs.x, **given)
    assert torch.equal(residual, inputs.x + inputs.gate.unsqueeze(1) * inputs.branch)
    assert torch.equal(residual, expected)
    if norm is None:
        assert torch.equal(normed, expected_normed)
    elif dtype == torch.float16:  # float32 shows the order of every sum
        fused = residual_norm_modulate(inputs.x, **given | {"rounding": "fused"})[1]
        same, same_fused = ((result == expected_normed).double().mean().item() for result in (normed, fused))
        assert same > 0.98
        assert same > same_fused


def test_nan_stays_in_its_token(device: torch.device) -> None:
    x = torch.randn(1, 3, 8, device=device)
    x[0, 0, 3], x[0, 1, 2] = float("nan"), float("inf")
    _, normed, _ = residual_norm_modulate(x)
    assert normed[0, :2].isnan().all()
    assert normed[0, 2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 8)}, r"give floats \(batch, tokens, width\)"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, "int64"),
        ({"branch": torch.ones(2, 3, 7)}, "branch"),
        ({"branch": torch.ones(2, 3, 8).half()}, "float16"),
        ({"branch": None}, "a gate without a branch"),
        ({"gate": torch.ones(3, 8)}, "gate has shape"),
        ({"scale": torch.ones(2, 7)}, "scale has shape"),
        ({"weight": torch.ones(7)}, "weight has shape"),
        ({"norm": None, "weight": torch.ones(8)}, "without a norm"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"uem": (torch.ones(8), torch.ones(3))}, "offset has shape"),
        ({"shift": torch.ones(2, 8, device="meta")}, "one device"),
        ({"rounding": "match_eager", "shift": torch.ones(2, 8).half()}, "x's dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 3, 8), "branch": torch.ones(2, 3, 8), "gate": torch.ones(2, 8)} | change
    with pytest.raises(KernelInputError, match=message):
        residual_norm_modulate(**given)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(1, 1, MAX_WIDTH + 1), "width 8193"),
        (torch.ones(1, 8, 4).transpose(1, 2), "not contiguous"),
        (torch.ones(1, 2, 4).requires_grad_(), "gradients"),
    ],
)
def test_reference_runs_where_the_kernel_cannot(
    x: torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    with pytest.raises(KernelUnavailableError, match=reason):
        residual_norm_modulate(x.to(device))
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    assert residual_norm_modulate(x.to(device))[1].abs().max() == 0


def test_gradients_pass() -> None:
    x, gate = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    uem = torch.randn(8, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    for tensor in (x, gate, uem[0]):
        tensor.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_KERNELS", "auto")
        branch = torch.randn(2, 3, 8, dtype=torch.float64)
        torch.autograd.gradcheck(
            lambda x, gate, weight: residual_norm_modulate(x, branch, gate, uem=(weight, uem[1])), (x, gate, uem[0])
        )


@pytest.mark.parametrize("full", [True, False])
def test_operator_is_declared_correctly(full: bool, device: torch.device) -> None:
    inputs = Inputs((2, 3, 8), torch.float32, device)
    modulation = (inputs.scale, inputs.shift) if full else (None, None)
    first = (inputs.branch, inputs.gate) if full else (None, None)
    head = inputs.uem if full else (None, None)
    operator = torch.ops.fastdiff.residual_norm_modulate.default
    torch.library.opcheck(operator, (inputs.x, *first, None, None, *modulation, *head, "layer", 1e-6, "fused"))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    inputs = Inputs((2, 3, 8), torch.float32, device)
    given = inputs.arguments("layer", True, True, True, True)
    compiled = torch.compile(residual_norm_modulate, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(inputs.x, **given), reference(inputs.x, **given), strict=True):
        assert result is expected is None or torch.equal(result, expected)
