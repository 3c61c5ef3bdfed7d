"""Denoisers that diffusers lacks, as diffusers models and pipelines of the usual kind."""

from __future__ import annotations

import os
from typing import Any

from diffusers import DiffusionPipeline

from fastdiff.models.convert import convert_uvit_state_dict
from fastdiff.models.pipeline_uvit import HUB_OPTIONS, UViTPipeline
from fastdiff.models.uvit import UViT

__all__ = ["UViT", "UViTPipeline", "convert_uvit_state_dict", "pipeline_class"]

_PIPELINES = {cls.__name__: cls for cls in (UViTPipeline,)}


def pipeline_class(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The class that loads a saved pipeline: one of ours by its name, else `DiffusionPipeline`, which finds its own.

    Args:
        name: a folder, or a repository on the Hub.
        **kwargs: what `DiffusionPipeline.from_pretrained` takes; says where and how to look on the Hub.

    Raises:
        OSError: if there is no ``model_index.json``, or it cannot be read.
    """
    config = DiffusionPipeline.load_config(name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
    saved = config.get("_class_name")
    return _PIPELINES.get(saved, DiffusionPipeline) if isinstance(saved, str) else DiffusionPipeline
