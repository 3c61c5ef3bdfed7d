"""A static plan compiles to one graph for each distinct row, without a break, and never compiles again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from engine.cases import STEPS, accelerated, build, methods_for, record_of, sample
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import EncoderPropagation, FastDiffNoEffectWarning, FeatureInheritance, UncertaintyExit
from fastdiff.backbones import view
from fastdiff.engine.program import Program, lower
from fastdiff.plan import Action
from tiny.base import build as build_model
from tiny.models import TINY_MODELS
from tiny.stops import BATCH, depths_of, run
from tiny.uncertainty import random_modules

INDUCTOR_TOLERANCE = 1e-4
"""Share of the largest value: fused kernels round elsewhere."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def program(pipe: Any) -> Program:
    """Returns the program of the last call, lowered anew."""
    return lower(record_of(pipe).plans[0], view(pipe.transformer))


def compile_as(how: str, pipe: DiffusionPipeline, backend: str = "eager") -> CompileCounterWithBackend:
    """Compiles the pipeline's denoiser in one of the ways that diffusers documents; returns a count of its graphs."""
    counter = CompileCounterWithBackend(backend)
    if how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    elif how == "module":
        pipe.transformer.compile(backend=counter, fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    return counter


@pytest.mark.parametrize(
    ("name", "method", "how"),
    [
        ("DiTPipeline", "full", "module"),
        ("DiTPipeline", "ase-demo", "wrapper"),
        ("DiTPipeline", "layers-reuse", "module"),
        ("FluxPipeline", "inherit-0", "wrapper"),
        pytest.param("UViTPipeline", "ase-demo", "wrapper", marks=pytest.mark.slow),
        pytest.param("DiTPipeline", "saved-plan", "module", marks=pytest.mark.slow),
        pytest.param("FluxPipeline", "merged", "module", marks=pytest.mark.slow),
        pytest.param("StableDiffusion3Pipeline", "layers-skip", "wrapper", marks=pytest.mark.slow),
    ],
)
def test_graphs_are_the_distinct_rows(name: str, method: str, how: str) -> None:
    pipe = accelerated(name, method)
    expected = sample(pipe, name)
    counter = compile_as(how, pipe)

    assert torch.equal(sample(pipe, name), expected)
    assert counter.frame_count == program(pipe).patterns
    assert torch.equal(sample(pipe, name), expected)
    assert counter.frame_count == program(pipe).patterns
    assert record_of(pipe).skipped > 0 or method == "full"


@pytest.mark.parametrize("method", ["inherit-2", pytest.param("ase-demo", marks=pytest.mark.slow)])
def test_longer_calls_need_no_further_graphs(method: str) -> None:
    """No step counter has become a guard."""
    pipe = accelerated("DiTPipeline", method)
    counter = compile_as("module", pipe)
    sample(pipe, "DiTPipeline", steps=20)
    graphs = counter.frame_count
    assert graphs == program(pipe).patterns < 8
    for steps in (20, 33):
        sample(pipe, "DiTPipeline", steps=steps)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("method", ["ase-demo", "inherit-0", pytest.param("layers-reuse", marks=pytest.mark.slow)])
def test_repeated_blocks_share_graphs(method: str) -> None:
    """At most two for each kind of block and cell: the first block of a list may get its input in another layout."""
    pipe = accelerated("FluxPipeline", method)
    expected = sample(pipe, "FluxPipeline", guidance=False)
    counter = compile_as("blocks", pipe)

    assert torch.equal(sample(pipe, "FluxPipeline", guidance=False), expected)
    graphs = counter.frame_count
    assert 2 <= graphs <= 2 * len(kinds_of_cells(pipe))
    assert torch.equal(sample(pipe, "FluxPipeline", guidance=False), expected)
    sample(pipe, "FluxPipeline", guidance=False, steps=2 * STEPS - 1)
    assert counter.frame_count == graphs


def kinds_of_cells(pipe: Any) -> set[Any]:
    """Returns what a compiler must tell apart: the block's class, whether it runs, what starts and what ends there."""
    lowered = program(pipe)
    kinds = set()
    for row, actions in enumerate(lowered.plan.table):
        kept = [key.run for key in lowered.captures[row]]
        for column, unit in enumerate(view(pipe.transformer).units):
            reuses = [len(reading.sources) for reading in lowered.readings[row] if reading.run.last == column]
            starts = [run for run in (*kept, *(r.run for r in lowered.readings[row])) if run.first == column]
            ends = [run for run in kept if run.last == column]
            computes = actions[column] == Action.COMPUTE
            kinds.add((type(unit.module), computes, len(starts), len(ends), *reuses))
    return kinds


@pytest.mark.filterwarnings("ignore::fastdiff.FastDiffNoEffectWarning")
def test_samples_stop_between_compiled_blocks() -> None:
    tiny = TINY_MODELS["FluxTransformer2DModel"]
    denoiser, arguments = tiny.build(), tiny.inputs(BATCH, 0)
    modules = random_modules(denoiser)
    methods = [UncertaintyExit.of(modules, threshold=threshold) for threshold in np.linspace(0.3, 0.7, 21).tolist()]
    ran = [run(denoiser, method, arguments) for method in methods]
    method, ((expected,), calls) = max(zip(methods, ran, strict=True), key=lambda pair: len({*depths_of(pair[1][1])}))
    assert len({*depths_of(calls)}) > 1
    counter = CompileCounterWithBackend("eager")
    denoiser.compile_repeated_blocks(backend=counter, fullgraph=True)
    compiled = [block._compiled_call_impl for block in denoiser.transformer_blocks]
    graphs = []
    for _ in range(2):
        (result,), again = run(denoiser, method, arguments)
        assert torch.equal(result, expected)
        assert depths_of(again) == depths_of(calls)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0
    assert [block._compiled_call_impl for block in denoiser.transformer_blocks] == compiled


@pytest.mark.parametrize("how", ["module", "wrapper"])
def test_no_sample_stops_in_a_model_that_is_compiled_as_a_whole(how: str) -> None:
    pipe = build("DiTPipeline")
    fastdiff.enable(pipe, UncertaintyExit.of(random_modules(pipe.transformer), threshold=1))
    compile_as(how, pipe)
    with pytest.warns(FastDiffNoEffectWarning, match="compiled as a whole; compile its blocks"):
        assert torch.equal(sample(pipe, "DiTPipeline"), sample(build("DiTPipeline"), "DiTPipeline"))


@pytest.mark.parametrize("how", ["module", "wrapper"])
def test_compiling_before_enabling_and_after_disabling(how: str) -> None:
    pipe = build("DiTPipeline")
    plain = sample(pipe, "DiTPipeline")
    own_call = pipe.transformer._compiled_call_impl
    counter = compile_as(how, pipe)
    assert torch.equal(sample(pipe, "DiTPipeline"), plain)
    assert counter.frame_count == 1

    compiled = pipe.transformer._compiled_call_impl
    fastdiff.enable(pipe, methods_for(pipe, "exit-step"))
    sampled = sample(pipe, "DiTPipeline")
    assert torch.equal(sampled, sample(accelerated("DiTPipeline", "exit-step"), "DiTPipeline"))
    assert counter.frame_count == 1 + program(pipe).patterns
    fastdiff.disable(pipe)
    assert pipe.transformer._compiled_call_impl is compiled
    assert (compiled is own_call) == (how == "wrapper")
    assert torch.equal(sample(pipe, "DiTPipeline"), plain)


def test_limit_of_graphs_is_put_back() -> None:
    before = torch._dynamo.config.recompile_limit
    pipe = accelerated("DiTPipeline", "inherit-0")
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(torch._dynamo.config.recompile_limit))
    sample(pipe, "DiTPipeline")
    assert min(seen) >= 64
    assert torch._dynamo.config.recompile_limit == before


# -- UNets -------------------------------------------------------------------------------------------------------------


def pixel_pipeline() -> DDIMPipeline:
    """Returns a pipeline whose UNet has two stages without attention, to compile little."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    }
    pipe = DDIMPipeline(build_model(UNet2DModel, config), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe: DDIMPipeline, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.as_tensor(images)


@pytest.mark.parametrize(
    ("method", "keeps"),
    [
        (FeatureInheritance.deepcache(3, 0), True),
        (EncoderPropagation(keys=4, parallel=False), True),
        pytest.param(FeatureInheritance(level="branch", keep_up=1), False, marks=pytest.mark.slow),
        pytest.param(FeatureInheritance(order=1, last_key=False), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_graphs_of_unets_are_the_distinct_rows(method: FeatureInheritance | EncoderPropagation, keeps: bool) -> None:
    """And the first evaluation, which notes the shapes of what later ones leave out."""
    pipe = fastdiff.enable(pixel_pipeline(), method)
    expected = pixels(pipe, 12)
    counter = CompileCounterWithBackend("eager")
    pipe.unet.compile(backend=counter, fullgraph=True)

    assert torch.equal(pixels(pipe, 12), expected)
    plan = pipe.fastdiff.last_run.denoisers["unet"].plans[0]
    graphs = lower(plan, view(pipe.unet, method.view_level)).patterns + keeps
    assert counter.frame_count == graphs
    for steps in (12, 24, 36):
        pixels(pipe, steps)
        assert counter.frame_count == graphs


def test_graphs_of_stacked_evaluations_are_their_numbers() -> None:
    """The first evaluation, an encoder, a call that is answered, and a decoder for each number of evaluations."""
    pipe = fastdiff.enable(pixel_pipeline(), EncoderPropagation(keys=4))
    expected = pixels(pipe, 12)
    counter = CompileCounterWithBackend("eager")
    pipe.unet.compile(backend=counter, fullgraph=True)

    assert torch.equal(pixels(pipe, 12), expected)
    batches = pipe.fastdiff.last_run.denoisers["unet"].batches
    assert batches == [3, 4, 4]
    assert counter.frame_count == 3 + len(set(batches))
    for steps in (12, 24):
        pixels(pipe, steps)
        assert counter.frame_count == 3 + len(set(batches))


def check_inductor(pipe: DiffusionPipeline, name: str, how: str) -> None:
    fastdiff.enable(pipe, FeatureInheritance(interval=3, last_key=False))
    expected = sample(pipe, name, guidance=False)
    counter = compile_as(how, pipe, "inductor")

    sampled = sample(pipe, name, guidance=False)
    assert torch.allclose(sampled, expected, rtol=0, atol=INDUCTOR_TOLERANCE * float(expected.abs().max()))
    graphs = counter.frame_count
    assert how == "blocks" or graphs == program(pipe).patterns
    assert torch.equal(sample(pipe, name, guidance=False), sampled)
    sample(pipe, name, guidance=False, steps=2 * STEPS - 1)
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_inductor() -> None:
    """On a single block, to compile little: one graph that keeps its residual, one that reuses it."""
    pipe = build("DiTPipeline")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    with torch._inductor.config.patch(compile_threads=1):
        check_inductor(pipe, "DiTPipeline", "module")


def test_inductor_on_repeated_blocks() -> None:
    """Calls that are longer compile nothing either."""
    with torch._inductor.config.patch(compile_threads=1):
        check_inductor(build("FluxPipeline"), "FluxPipeline", "blocks")


@pytest.mark.slow
def test_inductor_on_a_whole_model() -> None:
    check_inductor(build("DiTPipeline"), "DiTPipeline", "wrapper")
