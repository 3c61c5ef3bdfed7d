"""What fastdiff computes between blocks: as kernels on an optimised model, never on another, with the same images."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from engine.cases import build, denoiser_calls, denoiser_of, record_of, sample

import fastdiff
from fastdiff import FeatureInheritance, UncertaintyExit
from fastdiff.backbones import view
from fastdiff.engine.kept import Kept, Reuse
from fastdiff.kernels import lincomb, rows
from fastdiff.kernels import steps as kernel_steps
from fastdiff.kernels.steps import Steps, steps_of
from fastdiff.uem import modules
from tiny import unet_exits
from tiny.uncertainty import random_modules

STEPS = 7
KEYS = {"pattern": "list", "keys": (0, 1, 3, 5, 6), "order": 2}
"""Nothing reads what the last two evaluations compute, so that samples may stop in them."""
SUM, EXITS = {"lincomb"}, {"uncertainty_score", "gather_rows", "scatter_rows"}
CASES: dict[str, tuple[str, dict[str, Any] | None, float, set[str]]] = {
    "DiT, forecast": ("DiTPipeline", {"order": 2}, 0, SUM),
    "DiT, forecast of the middle": ("DiTPipeline", {"order": 2, "span": (1, -1)}, 0, SUM),
    "DiT, exits": ("DiTPipeline", None, 0.45, EXITS),
    "DiT, both": ("DiTPipeline", KEYS, 0.4, SUM | EXITS),
    "SD3, exits": ("StableDiffusion3Pipeline", None, 0.45, EXITS),
    "SD3, both": ("StableDiffusion3Pipeline", KEYS, 0.45, SUM | EXITS),
    "U-ViT, exits": ("UViTPipeline", None, 0.45, EXITS),
    "SD UNet, exits": ("StableDiffusionPipeline", None, 0.5, EXITS - {"scatter_rows"}),
    "SD UNet, forecast": ("StableDiffusionPipeline", {"order": 1, "keep_up": 1}, 0, SUM),
}
"""A pipeline, how it forecasts, below which uncertainty its samples stop, and the operations for that."""
EVERY_CASE = pytest.mark.parametrize("case", CASES)
OPERATIONS = {"lincomb": lincomb, "uncertainty_score": modules, "gather_rows": rows, "scatter_rows": rows}
"""Where each is called from."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operation ran, as a kernel or as its reference."""
    calls: Counter[str] = Counter()
    for name, module in OPERATIONS.items():
        run = getattr(module, name)

        def counting(*args: Any, name: str = name, run: Any = run, **kwargs: Any) -> Any:
            calls[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
    return calls


def accelerated(case: str) -> DiffusionPipeline:
    name, forecast, threshold, _ = CASES[case]
    pipe = build(name)
    methods: list[Any] = [] if forecast is None else [FeatureInheritance(**forecast)]
    if threshold:
        denoiser = denoiser_of(pipe)
        if view(denoiser).up_steps:
            made = unet_exits.random_modules(denoiser, denoiser_calls(pipe, name, steps=2)[0])
        else:
            made = random_modules(denoiser)
        methods.append(UncertaintyExit.of(made, threshold=threshold))
    return fastdiff.enable(pipe, methods)


def images(pipe: DiffusionPipeline, case: str) -> torch.Tensor:
    name, *_, operations = CASES[case]
    result = sample(pipe, name, steps=STEPS, batch=3)
    calls = record_of(pipe).calls
    # Samples that stop together would not be taken out of the batch.
    assert ("gather_rows" in operations) == any(call.depths is not None and len({*call.depths}) > 1 for call in calls)
    return result


def depths(pipe: DiffusionPipeline) -> list[list[int] | None]:
    """Returns how far each sample went in every call."""
    return [None if call.depths is None else [*call.depths] for call in record_of(pipe).calls]


# -- sampling ----------------------------------------------------------------------------------------------------------


@EVERY_CASE
@pytest.mark.usefixtures("forced")
def test_nothing_runs_that_nobody_asked_for(case: str, called: Counter[str]) -> None:
    pipe = accelerated(case)
    expected = images(pipe, case)
    assert not called
    kernel_steps.allow(denoiser_of(pipe), "fused")
    images(pipe, case)
    assert called
    assert fastdiff.restore(pipe) == 0
    called.clear()
    assert torch.equal(images(pipe, case), expected)
    assert not called


@EVERY_CASE
@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.usefixtures("forced")
def test_kernels_and_references_give_the_same_images(
    case: str, mode: str, called: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", mode)
    pipe = accelerated(case)
    expected, stopped = images(pipe, case), depths(pipe)
    kernel_steps.allow(denoiser_of(pipe), "fused")
    result = images(pipe, case)
    assert called.keys() == CASES[case][-1]
    assert depths(pipe) == stopped
    assert record_of(pipe).skipped > 0
    if mode == "torch":
        assert torch.equal(result, expected)
    else:  # a GPU makes one rounding of a product and a sum
        torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=1e-4)


@EVERY_CASE
@pytest.mark.usefixtures("forced")
def test_rounding_as_eager_copies_rows_and_leaves_the_rest(case: str, called: Counter[str]) -> None:
    pipe = accelerated(case)
    expected = images(pipe, case)
    kernel_steps.allow(denoiser_of(pipe), "match_eager")
    assert torch.equal(images(pipe, case), expected)
    assert called.keys() == CASES[case][-1] - SUM - {"uncertainty_score"}


def test_optimize_asks_and_restore_takes_back(called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = "DiT, both"
    pipe = accelerated(case)
    fastdiff.optimize(pipe)
    images(pipe, case)
    assert not called  # no kernel can run here, and nobody wants references
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    images(pipe, case)
    assert called.keys() == OPERATIONS.keys()
    copied = copy.deepcopy(pipe.transformer)
    assert steps_of(copied) == steps_of(pipe.transformer) == Steps("fused")
    fastdiff.optimize(pipe, rounding="match_eager")
    assert steps_of(pipe.transformer) == Steps("match_eager")
    fastdiff.restore(pipe)
    assert steps_of(pipe.transformer) == Steps()
    assert steps_of(copied) == Steps("fused")
    called.clear()
    images(pipe, case)
    assert not called


def test_compiled_code_has_torchs_operations(called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    case = "DiT, forecast"
    expected = images(accelerated(case), case)
    pipe = accelerated(case)
    fastdiff.optimize(pipe.transformer)
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    assert torch.equal(images(pipe, case), expected)
    assert not called


# -- single steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("forced")
def test_forecasts_of_several_evaluations_at_once(
    mode: str, transposed: bool, device: torch.device, called: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", mode)
    torch.manual_seed(0)
    weights = torch.randn(2, 3)
    start = torch.randn(4, 7, 5, device=device)
    start = start.mT.contiguous().mT if transposed else start
    sources = []
    for _ in range(3):
        source = Kept()
        source.value = (torch.randn(2, 7, 5, device=device), None)
        sources.append(source)

    def finished(steps: Steps) -> tuple[torch.Tensor | None, ...]:
        reuse = Reuse(tuple(sources), weights, 2, steps)
        reuse.start = (start, None)
        return reuse.finish()

    expected, nothing = finished(Steps())
    assert nothing is None
    assert not called
    result, _ = finished(Steps("fused"))
    assert called["lincomb"] == 2
    torch.testing.assert_close(result, expected)
    exact = start.double() + torch.cat(
        [sum(w.double() * source.value[0].double() for w, source in zip(row, sources, strict=True)) for row in weights]
    )
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def test_half_precision_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "torch")
    torch.manual_seed(0)
    weights, tensors = torch.tensor([3.0, -3.0, 1.0]), [torch.randn(2, 999).half() for _ in range(3)]
    start = torch.randn(2, 999).half()
    exact = start.double() + sum(w.double() * tensor.double() for w, tensor in zip(weights, tensors, strict=True))
    fused, eager = (Steps(rounding).weighted_sum(weights, tensors, start) for rounding in ("fused", None))
    assert fused.dtype == eager.dtype == torch.float16
    assert torch.equal(fused, exact.half())
    assert not torch.equal(eager, fused)


@pytest.mark.parametrize("rounding", [None, "match_eager", "fused"])
@pytest.mark.usefixtures("forced")
def test_rows_are_copied_whatever_they_are(rounding: Any, device: torch.device, called: Counter[str]) -> None:
    steps, index = Steps(rounding), torch.tensor([2, 0], device=device)
    x = torch.arange(24.0, device=device).view(4, 3, 2)
    for batch in (x, x.half(), x.mT, x.long(), x > 5, x[:, :1, :1].expand(4, 3, 2)):
        called.clear()
        before = batch.clone()
        part = steps.gather(batch, index)
        assert torch.equal(part, batch[index])
        whole = steps.scatter(batch, index, batch[:2].contiguous())
        assert torch.equal(whole[index], batch[:2])
        assert torch.equal(whole[1::2], batch[1::2])
        assert torch.equal(batch, before)
        as_kernel = rounding is not None and batch.is_floating_point() and batch[:1].is_contiguous()
        assert bool(called) == as_kernel
