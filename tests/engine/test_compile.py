"""A static plan compiles to one graph for each distinct row, without a break, and never compiles again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from engine.cases import STEPS, accelerated, build, methods_for, record_of, sample
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import FeatureInheritance
from fastdiff.backbones import view
from fastdiff.engine.program import Program, lower
from fastdiff.plan import Action

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


def check_inductor(pipe: DiffusionPipeline, name: str, how: str) -> None:
    fastdiff.enable(pipe, FeatureInheritance(interval=3, last_key=False))
    expected = sample(pipe, name, guidance=False)
    counter = compile_as(how, pipe, "inductor")

    sampled = sample(pipe, name, guidance=False)
    assert torch.allclose(sampled, expected, rtol=0, atol=INDUCTOR_TOLERANCE * float(expected.abs().max()))
    graphs = counter.frame_count
    assert how == "blocks" or graphs == program(pipe).patterns
    assert torch.equal(sample(pipe, name, guidance=False), sampled)
    assert counter.frame_count == graphs


def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a single block, to compile little: one graph that keeps its residual, one that reuses it."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    pipe = build("DiTPipeline")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    check_inductor(pipe, "DiTPipeline", "module")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("DiTPipeline", "wrapper"), ("FluxPipeline", "blocks")])
def test_inductor_on_whole_models(name: str, how: str) -> None:
    check_inductor(build(name), name, how)
