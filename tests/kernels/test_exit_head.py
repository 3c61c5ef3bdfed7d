from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks.formula import assert_close
from kernel_checks.patched import build, inputs

from fastdiff.kernels.exit_head import MAX_OUTPUTS, exit_head
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = ["layer", "rms", None]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


class Inputs:
    """Arguments of one call, random and rounded to a dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        batch, rows, columns, width, patch, channels = shape
        generator = torch.Generator().manual_seed(width)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.x, self.weight, self.bias = random(batch, rows * columns, width), random(patch**2 * channels, width), None
        self.options: dict[str, Any] = {"columns": columns, "patch": patch}
        self.everything = {
            "norm_weight": random(width),
            "norm_bias": random(width),
            **dict(zip(("scale", "shift"), random(batch, 2 * width).chunk(2, dim=1), strict=True)),
        }
        self.biased = random(patch**2 * channels)

    def hold(
        self, norm: str | None = "layer", affine: bool = False, modulate: bool = False, bias: bool = False
    ) -> None:
        """Hold a call against float64."""
        bias = self.biased if bias else None
        names = (["norm_weight", "norm_bias"] if affine else []) + (["scale", "shift"] if modulate else [])
        given = {name: self.everything[name] for name in names}
        result = exit_head(self.x, self.weight, bias, norm=norm, **self.options, **given)
        flat, hidden = self.plain(torch.float64, norm, given, bias)
        eager, _ = self.plain(self.x.dtype, norm, given, bias)
        # Every product is rounded on the way to a sum that may be small.
        terms = F.linear(hidden.abs() + 1, self.weight.double().abs())
        check_eager = self.x.shape[-1] >= 100 and norm is not None
        assert_close(result, self.image(flat), self.image(terms), self.image(eager) if check_eager else None)
        assert result.is_contiguous()

    def plain(self, dtype: torch.dtype, norm: Any, given: dict[str, Any], bias: Any) -> tuple[torch.Tensor, ...]:
        """Patches before they are put together, and what the matrix was multiplied with, by torch's operations."""
        given = {name: part.to(dtype) for name, part in given.items()}
        hidden = self.x.to(dtype)
        if norm is not None:
            function = F.layer_norm if norm == "layer" else F.rms_norm
            hidden = function(hidden, hidden.shape[-1:], eps=1e-6)
        if "norm_weight" in given:
            hidden = hidden * given["norm_weight"] + given["norm_bias"]
        if "scale" in given:
            hidden = hidden * (1 + given["scale"][:, None]) + given["shift"][:, None]
        return F.linear(hidden, self.weight.to(dtype), None if bias is None else bias.to(dtype)), hidden

    def image(self, flat: torch.Tensor) -> torch.Tensor:
        """Patches put together as diffusers does it."""
        patch, columns = self.options["patch"], self.options["columns"]
        rows = flat.shape[1] // columns
        flat = flat.reshape(len(flat), rows, columns, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", flat).reshape(len(flat), -1, rows * patch, columns * patch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modulate", [True, False])
def test_results_are_the_exact_ones(norm: str | None, modulate: bool, dtype: torch.dtype, device: torch.device) -> None:
    some = Inputs((2, 3, 6, 100, 2, 3), dtype, device)
    for affine in (False, True) if norm is not None else (False,):
        some.hold(norm, affine, modulate)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 4, 4, 7, 1, 5),
        (1, 2, 3, 1152, 2, 8),
        (3, 5, 1, 64, 3, 2),
        (1, 1, 33, 65, 1, MAX_OUTPUTS),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_odd_shapes(shape: tuple[int, ...], norm: str | None, device: torch.device) -> None:
    Inputs(shape, torch.float16, device).hold(norm, norm is not None, True)


@pytest.mark.parametrize("shape", [(0, 2, 2, 8, 2, 1), (2, 0, 2, 8, 2, 1)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: torch.device) -> None:
    some = Inputs(shape, torch.float32, device)
    result = exit_head(some.x, some.weight, **some.options)
    assert result.shape == (shape[0], 1, 2 * shape[1], 4)


def test_a_large_mean_does_not_spoil_the_variance(device: torch.device) -> None:
    some = Inputs((1, 1, 4, 256, 1, 4), torch.float32, device)
    some.x += 100
    # LayerNorm itself knows its input to 100 float32 roundings.
    some.weight /= 100
    hidden = F.layer_norm(some.x.double(), (256,), eps=1e-6)
    exact = some.image(F.linear(hidden, some.weight.double()))
    terms = some.image(F.linear(torch.full_like(hidden, 100.0), some.weight.double().abs()))
    assert_close(exit_head(some.x, some.weight, **some.options), exact, terms)


def test_output_layers_of_dit(device: torch.device) -> None:
    model, arguments = build("DiT").to(device), inputs("DiT")
    arguments = {name: value.to(device) for name, value in arguments.items()}
    kept: list[torch.Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
        block = model.transformer_blocks[0]
        condition = block.norm1.emb(arguments["timestep"], arguments["class_labels"], hidden_dtype=torch.float32)
        shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        linear = model.proj_out_2
        columns = int(kept[0].shape[1] ** 0.5)
        result = exit_head(
            kept[0], linear.weight, linear.bias, columns=columns, patch=model.patch_size, scale=scale, shift=shift
        )
    torch.testing.assert_close(result, expected)


def test_tensors_are_read_where_they_lie(device: torch.device) -> None:
    some = Inputs((2, 2, 3, 24, 2, 2), torch.float32, device)
    joint = torch.randn(2, 9, 48, device=device)
    some.x = joint[:, 3:, 8:32]
    some.weight = torch.randn(8, 40, device=device)[:, 4:28]
    some.everything["scale"] = torch.randn(1, 24, device=device)
    some.hold(modulate=True)


def test_no_number_stays_in_its_patch(device: torch.device) -> None:
    some = Inputs((1, 2, 2, 100, 2, 1), torch.float32, device)
    some.x[0, 1, 5], some.x[0, 2, 7] = float("nan"), float("inf")
    result = exit_head(some.x, some.weight, **some.options)[0, 0]
    assert result[:2, 2:].isnan().all()
    assert result[2:, :2].isnan().all()
    assert result[:2, :2].isfinite().all()
    assert result[2:, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3)}, "give floats"),
        ({"columns": 4}, "6 tokens are no rows of 4"),
        ({"columns": 0}, "no rows of 0"),
        ({"weight": torch.ones(8, 5)}, r"weight has shape \(8, 5\); give \(channels \* 4, 4\)"),
        ({"weight": torch.ones(6, 4)}, "for patch=2"),
        ({"bias": torch.ones(7)}, r"bias has shape \(7,\); give \(8,\)"),
        ({"norm_weight": torch.ones(3)}, r"norm_weight has shape \(3,\)"),
        ({"norm": None, "norm_bias": torch.ones(4)}, "without a norm"),
        ({"norm": "batch"}, "'batch'"),
        ({"scale": torch.ones(3, 4)}, r"scale has shape \(3, 4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 6, 4), "weight": torch.ones(8, 4), "columns": 3, "patch": 2} | changes
    with pytest.raises(KernelInputError, match=message):
        exit_head(**arguments)


def test_reference_runs_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    some = Inputs((1, 2, 2, 8, 1, 3), torch.float32, device)
    some.weight = torch.randn(8, 3, device=device).T
    with pytest.raises(KernelUnavailableError, match="last dimension"):
        exit_head(some.x, some.weight, **some.options)
    with pytest.raises(KernelUnavailableError, match=f"more than {MAX_OUTPUTS}"):
        exit_head(some.x, torch.ones(MAX_OUTPUTS + 1, 8, device=device), **some.options)
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    some.hold()


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x, weight = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x, weight: exit_head(x, weight, columns=1, patch=2), (x.requires_grad_(), weight.requires_grad_())
    )


def test_operator_is_declared_correctly(device: torch.device) -> None:
    some = Inputs((2, 2, 3, 8, 2, 2), torch.float32, device)
    parts = some.everything
    torch.library.opcheck(
        torch.ops.fastdiff.exit_head.default,
        (some.x, some.weight, some.biased, None, None, parts["scale"], parts["shift"], 3, 2, "layer", 1e-6),
    )


def test_compiled_code_sees_the_reference(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    some = Inputs((2, 2, 3, 8, 2, 2), torch.float32, device)
    result = torch.compile(exit_head, fullgraph=True, backend="aot_eager")(some.x, some.weight, **some.options)
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    assert torch.equal(result, exit_head(some.x, some.weight, **some.options))
