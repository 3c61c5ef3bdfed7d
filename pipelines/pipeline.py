"""`FastDiffPipeline` and the functions that put acceleration on an existing pipeline and take it off."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline

import fastdiff
from fastdiff.errors import ConfigError, StateError, UnsupportedPipelineError
from fastdiff.methods import as_methods
from fastdiff.pipelines.acceleration import Acceleration, methods_of, preset_methods, read_config

DEFAULT_PRESET = "balanced"


class FastDiffPipeline:
    """Mixed into the class of an accelerated pipeline, which stays an instance of its own class too.

    Calls take and return what the pipeline's own calls do. ``pipe.fastdiff`` is the `Acceleration`.
    """

    fastdiff: Acceleration

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        methods: Any = None,
        preset: str | None = None,
        on_unsupported: str = "raise",
        kernels: str = "off",
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load any diffusers pipeline, accelerated.

        Args:
            pretrained_model_name_or_path: what `DiffusionPipeline.from_pretrained` takes, or ``"zoo:NAME"`` for a
                pipeline that ships with fastdiff.
            methods: one method or several. By default those saved in the folder, else those of the preset.
            preset: ``"quality"``, ``"balanced"`` (the default), ``"fast"`` or ``"off"``; not together with methods.
            on_unsupported: ``"raise"``, ``"warn"`` or ``"off"`` for a pipeline that cannot be accelerated.
            kernels: ``"auto"`` also calls `fastdiff.optimize`: fused kernels where the machine has them, in the models
                and between their blocks, with slightly different images; ``"off"`` launches none.
            cuda_graphs: as in `fastdiff.enable`.
            **kwargs: what `DiffusionPipeline.from_pretrained` takes.

        Returns:
            The pipeline: an instance of its own class and of `FastDiffPipeline`.

        Raises:
            ConfigError: for methods, a preset or kernels that do not exist, before anything is loaded.
            UnsupportedPipelineError: if the folder or repository is no diffusers pipeline.
            UnsupportedBackboneError: if its denoiser cannot be accelerated.
            ProfileMismatchError: if the saved acceleration belongs to another model.
        """
        from fastdiff.models import pipeline_class

        if kernels not in ("auto", "off"):
            raise ConfigError(f"kernels is 'auto' or 'off'; got {kernels!r}.")
        chosen = None if methods is None and preset is None else _choose(methods, preset)
        name = _resolve(pretrained_model_name_or_path)
        try:
            pipe = pipeline_class(name, **kwargs).from_pretrained(name, **kwargs)
        except (OSError, ValueError, AttributeError) as error:  # the last for a class that diffusers lacks
            raise UnsupportedPipelineError(f"{name!r} cannot be loaded as a diffusers pipeline: {error}") from error
        saved = read_config(name, **kwargs) if chosen is None else None
        if saved is None:
            chosen = _choose(None, None) if chosen is None else chosen
            pipe = enable(pipe, chosen, on_unsupported=on_unsupported, cuda_graphs=cuda_graphs)
        else:
            pipe = enable(pipe, methods_of(saved), on_unsupported=on_unsupported, cuda_graphs=cuda_graphs)
            pipe.fastdiff.check_profile(saved)
        if kernels == "auto":
            fastdiff.optimize(pipe)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save a folder that plain diffusers loads, with the acceleration beside it in ``fastdiff_config.json``.

        Args:
            save_directory: the folder.
            *args: as in `DiffusionPipeline.save_pretrained`.
            **kwargs: as in `DiffusionPipeline.save_pretrained`; ``push_to_hub`` uploads both.
        """
        self.fastdiff.save(save_directory)
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)  # type: ignore[misc]


def enable(
    pipe: DiffusionPipeline,
    methods: Any = None,
    *,
    preset: str | None = None,
    on_unsupported: str = "raise",
    cuda_graphs: bool = False,
) -> Any:
    """Accelerate an existing pipeline in place. Enabling again replaces what was enabled.

    Args:
        pipe: a diffusers pipeline.
        methods: one method or several (a saved `ComputePlan` counts as one); by default those of the preset.
        preset: ``"quality"``, ``"balanced"`` (the default), ``"fast"`` or ``"off"``; not together with methods.
        on_unsupported: ``"raise"``, ``"warn"`` or ``"off"`` for a pipeline that cannot be accelerated.
        cuda_graphs: record each distinct evaluation of the plan as a CUDA graph when it comes for the second time, and
            replay it from then on, in later calls too. Saves the time in which Python starts one kernel after the
            other, which at small batches is most of it. A call that cannot be recorded, such as one for samples that
            stop on their own or one on another device, is computed as ever; ``pipe.fastdiff.summary()`` says why.

    Returns:
        The same pipeline object.

    Raises:
        ConfigError: for methods or a preset that do not exist.
        UnsupportedPipelineError: if this is no pipeline with a denoiser and a scheduler.
        UnsupportedBackboneError: if its denoiser cannot be accelerated; nothing is changed then.
        StateError: if its denoiser is accelerated through another pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise UnsupportedPipelineError(f"fastdiff.enable takes a diffusers pipeline; got {type(pipe).__name__}.")
    chosen = _choose(methods, preset)
    before = pipe.fastdiff if is_enabled(pipe) else None
    if before is not None:
        before.remove()
    try:
        acceleration = Acceleration(pipe, chosen, on_unsupported, cuda_graphs)
    except Exception:
        if before is not None:
            before._install()
        raise
    if before is None:
        pipe.__class__ = _accelerated_class(type(pipe))
    pipe.fastdiff = acceleration
    return pipe


def _accelerated_class(own: type) -> type:
    """A subclass of a pipeline's class whose calls are accelerated.

    It keeps the name, because diffusers writes that into model_index.json, and the call's signature.
    """

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.fastdiff.sampling():
            return own.__call__(self, *args, **kwargs)

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Make a plain pipeline, as ``type(pipe)(**pipe.components)`` asks for; copies come without arguments."""
        return own(*args, **kwargs) if args or kwargs else object.__new__(cls)

    namespace = {"__new__": new, "__call__": call, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (FastDiffPipeline, own), namespace)


def disable(pipe: DiffusionPipeline) -> Any:
    """Undo `enable`: no hook is left, and the pipeline is of its own class again.

    Args:
        pipe: a pipeline; one that is not accelerated is left as it is.

    Returns:
        The same pipeline object.
    """
    if is_enabled(pipe):
        pipe.fastdiff.remove()
        del pipe.fastdiff
        pipe.__class__ = type(pipe).__bases__[1]
    return pipe


def is_enabled(pipe: Any) -> bool:
    """Whether a pipeline is accelerated."""
    return isinstance(pipe, FastDiffPipeline)


@contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[Any]:
    """Within the block the pipeline samples in full; its methods stay.

    Args:
        pipe: an accelerated pipeline.

    Raises:
        StateError: if it is not accelerated.
    """
    if not is_enabled(pipe):
        raise StateError(f"This {type(pipe).__name__} is not accelerated; call fastdiff.enable first.")
    before, pipe.fastdiff.active = pipe.fastdiff.active, False
    try:
        yield pipe
    finally:
        pipe.fastdiff.active = before


def _choose(methods: Any, preset: str | None) -> tuple[Any, ...]:
    if methods is not None and preset is not None:
        raise ConfigError("Give either methods or a preset, not both.")
    return preset_methods(preset or DEFAULT_PRESET) if methods is None else as_methods(methods)


def _resolve(name: str | os.PathLike[str]) -> str:
    """The folder of a zoo name; anything else as it is."""
    name = os.fspath(name)
    if name.startswith("zoo:"):
        from fastdiff import zoo

        return str(zoo.path(name))
    return name
