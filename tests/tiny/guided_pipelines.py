"""Tiny pipelines that guide Stable Diffusion in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import sd_pipelines as sd
from . import sdxl_pipelines as sdxl
from .pipeline_base import Call
from .sd_pipelines import Components, entry

Arguments = Callable[[Call], dict[str, Any]]


def _perturbed(components: Callable[[], Components]) -> Callable[[], Components]:
    return lambda: components() | {"pag_applied_layers": "mid"}


def _with_scale(arguments: Arguments) -> Arguments:
    return lambda call: arguments(call) | {"pag_scale": 3.0}


def _pag(name: str, components: Callable[[], Components], arguments: Arguments) -> Any:
    """Returns the entry of a pipeline with perturbed-attention guidance, a branch more in each batch."""
    return entry(name, _perturbed(components), _with_scale(arguments))


def _panorama_call(call: Call) -> dict[str, Any]:
    return sd.size(call) | {"width": 96, "view_batch_size": 2}


ENTRIES = [
    _pag("StableDiffusionPAGPipeline", sd.small(), sd.size),
    _pag("StableDiffusionPAGImg2ImgPipeline", sd.small(), sd.from_image),
    _pag("StableDiffusionPAGInpaintPipeline", sd.small(), sd.inpaint),
    _pag("StableDiffusionControlNetPAGPipeline", sd.small(controlnet=sd.controlnet), sd.controlled),
    _pag("StableDiffusionControlNetPAGInpaintPipeline", sd.small(controlnet=sd.controlnet), sd.controlled_inpaint),
    _pag("StableDiffusionXLPAGPipeline", sdxl.sdxl, sd.size),
    _pag("StableDiffusionXLPAGImg2ImgPipeline", sdxl.sdxl, sd.from_image),
    _pag("StableDiffusionXLPAGInpaintPipeline", sdxl.sdxl, sd.inpaint),
    _pag("StableDiffusionXLControlNetPAGPipeline", sdxl.parts(controlnet=sdxl.controlnet), sd.controlled),
    _pag(
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        sdxl.parts(controlnet=sdxl.controlnet),
        sd.controlled_from_image,
    ),
]
