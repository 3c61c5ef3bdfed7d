"""The acceleration of one pipeline: its methods, the hooks on its denoisers, and what its last call did."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from fastdiff.backbones import Backbone, is_control, unwrap, view
from fastdiff.engine.clock import Grid
from fastdiff.engine.graphs import Graphs
from fastdiff.engine.hooks import InstalledHooks
from fastdiff.engine.record import RunRecord
from fastdiff.engine.run import SamplingRun
from fastdiff.errors import (
    ConfigError,
    FastDiffNoEffectWarning,
    ProfileMismatchError,
    StateError,
    UnsupportedBackboneError,
    UnsupportedPipelineError,
)
from fastdiff.methods import FeatureInheritance, Method, PlanRequest, as_methods
from fastdiff.methods.base import level_of, make_planner
from fastdiff.plan import ComputePlan, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.cost import UnitCosts

CONFIG_NAME = "fastdiff_config.json"
SCHEMA_VERSION = 1

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""Pipeline components that predict noise; those of a supported class are accelerated."""

CONTROL = "controlnet"
"""The component that methods for encoders accelerate too, where it is of a supported class."""

FEW_EVALUATIONS = 9
"""Presets compute shorter calls in full, as distilled models make them: their evaluations have little in common."""

PRESETS: dict[str, tuple[Method, ...]] = {
    "off": (),
    "quality": (FeatureInheritance(interval=2, order=2, min_evaluations=FEW_EVALUATIONS),),
    "balanced": (FeatureInheritance(interval=3, order=2, min_evaluations=FEW_EVALUATIONS),),
    "fast": (FeatureInheritance(interval=5, order=2, min_evaluations=FEW_EVALUATIONS),),
}
"""Settings that need no choice; all are training-free."""


def preset_methods(preset: str) -> tuple[Method, ...]:
    """The methods of a preset.

    Raises:
        ConfigError: if there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"There is no preset {preset!r}; the presets are {', '.join(PRESETS)}.")
    return PRESETS[preset]


class Acceleration:
    """What `fastdiff.enable` puts on a pipeline, as ``pipe.fastdiff``.

    Args:
        pipe: the pipeline.
        methods: what to do in its calls.
        on_unsupported: ``"raise"``, ``"warn"`` or ``"off"``: what to do if no denoiser can be accelerated.
        cuda_graphs: record evaluations as CUDA graphs and replay what repeats.

    Raises:
        UnsupportedPipelineError: if the pipeline has no scheduler or no denoiser.
        UnsupportedBackboneError: if none of its denoisers can be accelerated.
        StateError: if a denoiser is accelerated already, through another pipeline.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        methods: tuple[Method, ...],
        on_unsupported: str = "raise",
        cuda_graphs: bool = False,
    ) -> None:
        if on_unsupported not in ("raise", "warn", "off"):
            raise ConfigError(f"on_unsupported is 'raise', 'warn' or 'off'; got {on_unsupported!r}.")
        name = getattr(pipe.config, "_name_or_path", None)
        self.methods = tuple(method.located(Path(name)) for method in methods) if name else methods
        self.active = True
        self.cuda_graphs = cuda_graphs
        self.last_run: RunRecord | None = None
        self._pipe = pipe
        self._run: SamplingRun | None = None
        self._hooks: dict[str, InstalledHooks] = {}
        self._supported = True
        try:
            self._install()
        except (UnsupportedBackboneError, UnsupportedPipelineError) as error:
            if on_unsupported == "raise":
                raise
            self._supported = False
            if on_unsupported == "warn":
                warnings.warn(f"{error} The pipeline runs unaccelerated.", FastDiffNoEffectWarning, stacklevel=4)

    # -- denoisers ---------------------------------------------------------------------------------------------------

    def _denoisers(self) -> dict[str, nn.Module]:
        """The pipeline's denoisers as it calls them, compiled or not."""
        components = {name: getattr(self._pipe, name, None) for name in DENOISERS}
        return {name: module for name, module in components.items() if isinstance(module, nn.Module)}

    def _modules(self) -> dict[str, nn.Module]:
        """The denoisers, and what prepares their encoders if a method accelerates that."""
        control = getattr(self._pipe, CONTROL, None)
        wanted = any(method.accelerates_control for method in self.methods)
        if wanted and isinstance(control, nn.Module) and is_control(unwrap(control)):
            return {**self._denoisers(), CONTROL: control}
        return self._denoisers()

    def _install(self) -> None:
        """Put hooks on the pipeline's present denoisers: on all that are supported, or on none."""
        self.remove()
        denoisers = self._denoisers()
        if not denoisers or getattr(self._pipe, "scheduler", None) is None:
            raise UnsupportedPipelineError(
                f"{type(self._pipe).__name__} needs a scheduler and a denoiser under one of the names "
                f"{', '.join(DENOISERS)}; it has the components {', '.join(self._pipe.components)}."
            )
        if missing := [name for name in ("set_timesteps", "step") if not hasattr(self._pipe.scheduler, name)]:
            raise UnsupportedPipelineError(
                f"fastdiff counts evaluations by the scheduler's set_timesteps and step, and "
                f"{type(self._pipe.scheduler).__name__} has no {missing[0]}. Set another scheduler first."
            )
        backbones: dict[str, Backbone] = {}
        unsupported: list[UnsupportedBackboneError] = []
        for name, module in self._modules().items():
            try:
                backbones[name] = view(module, level_of(self.methods))
            except UnsupportedBackboneError as error:  # noqa: PERF203 - a pipeline has two denoisers at most
                unsupported.append(error)
        if not any(name in backbones for name in denoisers):
            raise unsupported[0]
        try:
            for name, backbone in backbones.items():
                self._hooks[name] = InstalledHooks(backbone, Graphs() if self.cuda_graphs else None)
        except StateError:
            self.remove()
            raise

    def _follow_components(self) -> None:
        """Install the hooks anew if a denoiser was replaced or lost them."""
        present = {name: unwrap(module) for name, module in self._modules().items()}
        in_place = (
            present.get(name) is hooks.backbone.denoiser and hooks.in_place for name, hooks in self._hooks.items()
        )
        if not (self._hooks and all(in_place)):
            self._install()

    def remove(self) -> None:
        """Take all hooks off.

        Raises:
            StateError: while the pipeline samples.
        """
        if self._run is not None:
            raise StateError("This pipeline is sampling; change its acceleration before or after the call.")
        while self._hooks:
            self._hooks.popitem()[1].remove()

    # -- sampling calls ----------------------------------------------------------------------------------------------

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """One call of the pipeline."""
        if not (self.active and (self.methods or self.cuda_graphs) and self._supported):
            yield
            return
        if self._run is not None:
            raise StateError("This pipeline is sampling already; load a second pipeline to sample at the same time.")
        self._follow_components()
        modules = self._modules()
        denoisers = {name: (modules[name], hooks) for name, hooks in self._hooks.items()}
        run = SamplingRun(denoisers, [self._pipe.scheduler], self.methods)
        self._run, self.last_run = run, run.record
        try:
            with run:
                yield
        finally:
            self._run = None

    def plan(self, num_inference_steps: int, denoiser: str | None = None) -> ComputePlan:
        """The plan of a call with this many steps on the pipeline's present scheduler.

        Where timesteps depend on the image size, these are of the largest that the scheduler is made for.

        Args:
            num_inference_steps: as in the pipeline's call.
            denoiser: component name; by default the first that is accelerated.

        Raises:
            StateError: if nothing is accelerated.
            ConfigError: if a method cannot make a plan for this model and scheduler.
        """
        if not (self.methods and self._supported):
            raise StateError("Nothing is accelerated, so there is no plan; enable a method first.")
        self._follow_components()
        hooks = self._hooks[denoiser or next(iter(self._hooks))]
        scheduler = copy.deepcopy(self._pipe.scheduler)
        config = scheduler.config
        shift = {"mu": config.get("max_shift", 1.15)} if config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(num_inference_steps, **shift)
        request = PlanRequest(hooks.backbone, Grid.of(scheduler), self._costs_of_last_run)
        return make_planner(self.methods)(request).validate(hooks.backbone.traits).prune(hooks.backbone.traits)

    def _costs_of_last_run(self) -> UnitCosts:
        records = self.last_run.denoisers.values() if self.last_run else ()
        measure = next((record.measure for record in records if record.measure), None)
        if measure is None:
            raise StateError(
                "Latencies are measured in a call's shapes: call the pipeline once before asking for a plan."
            )
        return measure()

    def summary(self) -> str:
        """What is enabled and what the last call did, as text."""
        enabled = " + ".join(map(str, self.methods)) or "no method"
        backbones = [
            f"{name}: {hooks.backbone.class_name}, {len(hooks.hooks)} units" for name, hooks in self._hooks.items()
        ]
        last = self.last_run.summary() if self.last_run else "not called yet"
        return "\n".join([f"enabled: {enabled}{'' if self.active else ' (disabled now)'}", *backbones, last])

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What `fastdiff_config.json` holds."""
        denoisers = {
            name: {"class": hooks.backbone.class_name, "units": len(hooks.hooks)} for name, hooks in self._hooks.items()
        }
        methods = [method.to_dict() for method in self.methods]
        return {"schema_version": SCHEMA_VERSION, "denoisers": denoisers, "methods": methods}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `fastdiff_config.json` into a pipeline folder, and what the methods need besides."""
        methods = [method.stored(Path(folder)).to_dict() for method in self.methods]
        return write_json(Path(folder) / CONFIG_NAME, {**self.to_dict(), "methods": methods})

    def check_profile(self, data: Mapping[str, Any]) -> None:
        """Refuse a saved configuration that was made for other denoisers.

        Raises:
            ProfileMismatchError: naming the first difference.
        """
        here = self.to_dict()["denoisers"]
        for name, saved in data["denoisers"].items():
            if here.get(name) != saved:
                raise ProfileMismatchError(
                    f"The saved acceleration is for {name}={saved}, this pipeline has {here.get(name)}. "
                    "Give methods=... or preset=... to choose anew."
                )


def read_config(name: str, **kwargs: Any) -> Mapping[str, Any] | None:
    """The acceleration saved beside a pipeline, or None if there is none.

    Args:
        name: a folder, or a repository on the Hub.
        **kwargs: what `DiffusionPipeline.from_pretrained` was given; says where and how to look on the Hub.

    Raises:
        ConfigError: if the file is damaged or from a later version.
    """
    path = Path(name) / CONFIG_NAME
    if not Path(name).is_dir():
        options = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        try:
            found = hf_hub_download(name, CONFIG_NAME, **{key: kwargs[key] for key in options if key in kwargs})
        except (HfHubHTTPError, LocalEntryNotFoundError):
            return None
        path = Path(found)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Delete it or save the pipeline again.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema version {version!r}; this fastdiff reads version {SCHEMA_VERSION}.")
    if not (isinstance(data.get("methods"), list) and isinstance(data.get("denoisers"), dict)):
        raise ConfigError(f"{path} needs a list of methods and an object of denoisers. Save the pipeline again.")
    return data


def methods_of(data: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods in a saved configuration.

    Raises:
        ConfigError: if one is unknown or has values that are not allowed.
    """
    return as_methods([Method.from_dict(method) for method in data["methods"]])
