"""The catalogue: one tiny model for every denoising transformer class of diffusers, and for our own."""

from __future__ import annotations

import diffusers

from . import audio, image, joint, uvit, video
from .base import TinyModel

TINY_MODELS: dict[str, TinyModel] = {
    entry.name: entry for entry in (*image.ENTRIES, *joint.ENTRIES, *video.ENTRIES, *audio.ENTRIES) if entry.available
}
"""Class name to tiny model, for the classes that the installed diffusers has, and fastdiff's own."""
TINY_MODELS[uvit.MODEL.name] = uvit.MODEL

_REASONS = {
    "AnyFlowFARTransformer3DModel": "autoregressive over chunks: its pipeline's forwards need earlier KV caches",
    "DreamLiteTransformer2DModel": "a stage of DreamLite's UNet, not a denoiser by itself",
    "MiniMaxMusic3RVQDepthDecoder": "autoregressive decoder of audio codes; it takes no timestep",
    "RFD4ProteinaTransformer": "denoises protein structures under two timesteps, not images, video or audio",
    "T5FilmDecoder": "decoder of the deprecated spectrogram pipeline; needs the states of two T5 encoders",
    "TransformerTemporalModel": "a stage of the video UNets, not a denoiser by itself",
    "WanAnimate2Transformer3DModel": "a denoising forward needs a KV cache that a forward of another mode filled",
}
NOT_COVERED: dict[str, str] = {name: why for name, why in _REASONS.items() if hasattr(diffusers, name)}
"""Class name to the reason why the catalogue has no model for it."""
