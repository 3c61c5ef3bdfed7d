"""What `end_to_end` runs: builds of a model, the sampling loop around it, and compilers that know nothing yet."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from architectures.denoisers import GUIDANCE, Denoiser
from diffusers import ModelMixin
from end_to_end_report import Build

import fastdiff
from fastdiff.backbones import view
from fastdiff.engine.graphs import Graphs
from fastdiff.engine.hooks import InstalledHooks
from fastdiff.engine.run import SamplingRun
from fastdiff.methods import Method


def make(module: ModelMixin, how: Build, backend: str) -> None:
    """Optimise and compile a model as a build says."""
    if how.kernels:
        fastdiff.optimize(module)
    if how.compiled:
        if not getattr(module, "_repeated_blocks", None):  # diffusers does not name them in every class
            module._repeated_blocks = sorted({type(unit.module).__name__ for unit in view(module).units})
        module.compile_repeated_blocks(fullgraph=True, backend=backend)


class Sampling:
    """A sampling loop.

    Args:
        denoiser: what its calls are given.
        module: the build of it that is called.
        images: at a time.
        steps: of the scheduler.
        method: what to do, if anything.
        graphs: whether evaluations are replayed as CUDA graphs.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        module: ModelMixin,
        images: int,
        steps: int,
        method: Method | None = None,
        graphs: bool = False,
    ) -> None:
        self._denoiser, self._module, self._steps = denoiser, module, steps
        self._copies = denoiser.rows(1)
        self._noise = denoiser.latents(images)
        self._conditions = denoiser.conditions(denoiser.rows(images))
        self._methods = () if method is None else (method,)
        self._graphs = graphs
        self._hooks: InstalledHooks | None = None

    def _run(self, scheduler: Any) -> AbstractContextManager[Any]:
        """The library's part, as in a pipeline: hooks and what is recorded stay from one call to the next."""
        if not (self._methods or self._graphs):
            return nullcontext()
        if self._hooks is None:
            self._hooks = InstalledHooks(view(self._module), Graphs() if self._graphs else None)
        return SamplingRun({"denoiser": (self._module, self._hooks)}, (scheduler,), self._methods)

    @torch.no_grad()
    def __call__(self, evaluations: int | None = None) -> Any:
        """Sample, or make the first evaluations only; returns what the library recorded, if it had a part in it."""
        scheduler, latents = self._denoiser.scheduler(), self._noise
        with self._run(scheduler) as sampled:
            scheduler.set_timesteps(self._steps, device=latents.device)
            for timestep in scheduler.timesteps[:evaluations]:
                rows = torch.cat([latents] * self._copies)
                arguments = self._denoiser.arguments(rows, timestep, self._conditions)
                predicted = self._module(**arguments, return_dict=False)[0]
                predicted = predicted[:, : latents.shape[1]]  # some predict a variance too
                if self._copies == 2:
                    plain, conditional = predicted.chunk(2)
                    predicted = plain + GUIDANCE * (conditional - plain)
                latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return sampled and sampled.record.denoisers["denoiser"]


def did(record: Any) -> dict[str, Any]:
    """What the library says of a run: how much was computed, and where it did otherwise than asked for."""
    if record is None:
        return {"computed_share": 1.0, "notes": []}
    said = [*record.fallbacks.items(), *record.one_by_one.items()]
    said += [(f"without a CUDA graph: {why}", times) for why, times in record.computed.items()]
    return {"computed_share": record.computed_share, "notes": [f"{times}× {why}" for why, times in said]}


# -- compilers ---------------------------------------------------------------------------------------------------------


def fresh_cache(backend: str) -> AbstractContextManager[Any]:
    """What compilers keep on disk is kept elsewhere within the block, where nothing is yet."""
    if backend != "inductor":
        return nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def forget_compiled() -> None:
    """Everything that torch and Triton have compiled in this process is compiled anew."""
    torch.compiler.reset()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastdiff.kernels"):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches"):
                    kernel.device_caches.clear()


def load_compiler(device: str, backend: str) -> None:
    """What compilers load once in a process is no model's cold start."""
    torch.compile(torch.square, backend=backend)(torch.ones(8, device=device))
    forget_compiled()
