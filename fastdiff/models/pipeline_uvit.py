"""Sampling with a U-ViT, of pixels or of a VAE's latents."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers import pipelines as diffusers_pipelines
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

from fastdiff.errors import ConfigError
from fastdiff.models.uvit import UViT

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Arguments of `from_pretrained` that say where and how to look on the Hub."""

_LIBRARIES = ("diffusers", "transformers", "fastdiff")


class UViTPipeline(DiffusionPipeline):
    """Class-conditional or unconditional images from a `UViT`.

    Args:
        transformer: the denoiser.
        scheduler: any diffusers scheduler.
        vae: decodes latents; None for a denoiser of pixels in [-1, 1].
        id2label: names of the classes, by their numbers; several names of one class are separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: UViT,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = {int(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label={str(number): name for number, name in names.items()} or None)
        self.labels = {name.strip(): number for number in names for name in names[number].split(",")}
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of classes, by their names.

        Raises:
            ConfigError: naming the first that is no class.
        """
        asked = [label] if isinstance(label, str) else list(label)
        if unknown := [name for name in asked if name not in self.labels]:
            raise ConfigError(
                f"There is no class {unknown[0]!r}; the classes are {', '.join(self.labels) or 'unnamed'}."
            )
        return [self.labels[name] for name in asked]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        batch_size: int = 1,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            class_labels: one class for each image. None for an unconditional model, or for images of no class.
            guidance_scale: classifier-free guidance as in diffusers: 1 is none. U-ViT's papers count from 0.
            generator: one, or one for each image.
            num_inference_steps: solver steps.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"`` for what the last step leaves.
            return_dict: whether to return an `ImagePipelineOutput`, or a tuple.
            batch_size: number of images where no classes are given.
            latents: where to start, of shape ``(images, in_channels, sample_size, sample_size)``, standard normal.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; may return
                ``{"latents": ...}`` to go on with.
            callback_on_step_end_tensor_inputs: what the callback's ``tensors`` hold; ``latents`` is all there is.

        Raises:
            ConfigError: for classes that the model does not have, guidance that it cannot give, or no image at all.
        """
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ConfigError(f"A callback is given 'latents' alone; asked was {callback_on_step_end_tensor_inputs}.")
        labels = self._labels(class_labels, batch_size, guidance_scale)
        images = batch_size if labels is None else len(labels)
        device, dtype = self._execution_device, self.transformer.dtype
        guided = guidance_scale > 1
        if labels is not None:
            null = [self.transformer.null_label] * images if guided else []
            conditioning = {"class_labels": torch.tensor([*labels, *null], device=device)}
        else:
            conditioning = {}
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._start(latents, images, generator, device, dtype)
        wanted = inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if "generator" in wanted else {}
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            given = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            times = timestep.expand(len(given))
            predicted = self.transformer(given.to(dtype), times, return_dict=False, **conditioning)[0]
            if guided:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(predicted, timestep, latents, **noise, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
        sampled = latents if output_type == "latent" else self._decode(latents.to(dtype), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=sampled) if return_dict else (sampled,)

    def _labels(self, given: Any, batch_size: int, guidance_scale: float) -> list[int] | None:
        """One class for each image, or None for a model without classes."""
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size is a whole number from 1; got {batch_size!r}.")
        classes, null = self.transformer.config["num_classes"], self.transformer.null_label
        if self.transformer.config["context_dim"] is not None:
            raise ConfigError("UViTPipeline samples with classes or none; this UViT is conditioned on text.")
        if classes is None:
            if given is not None or guidance_scale > 1:
                raise ConfigError("This UViT is unconditional: it takes no class_labels and no guidance_scale above 1.")
            return None
        if guidance_scale > 1 and null is None:
            raise ConfigError("This UViT has no null class to guide away from; leave guidance_scale at 1.")
        if given is None:
            if null is None:
                raise ConfigError(f"This UViT has no null class; give class_labels from 0 to {classes - 1}.")
            return [null] * batch_size
        labels = torch.as_tensor(given).reshape(-1).tolist()
        highest = classes - 1 if null is None else null
        if not labels or not all(type(label) is int and 0 <= label <= highest for label in labels):
            raise ConfigError(f"class_labels are whole numbers from 0 to {highest}; got {given}.")
        return labels

    def _start(
        self,
        latents: torch.Tensor | None,
        images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        config = self.transformer.config
        shape = (images, config["in_channels"], config["sample_size"], config["sample_size"])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ConfigError(f"latents have the shape {shape} here; got {tuple(latents.shape)}.")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            shift = self.vae.config.shift_factor or 0.0
            latents = self.vae.decode(latents / self.vae.config.scaling_factor + shift, return_dict=False)[0]
        return self.image_processor.postprocess(latents, output_type=output_type)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """Fetch a repository's JSON and safetensors files from the Hub, and nothing else; returns their folder."""
        options = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None and key != "proxies"}
        return snapshot_download(str(pretrained_model_name), allow_patterns=["*.json", "*.safetensors"], **options)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As diffusers' own, which imports what ``model_index.json`` names; refused unless it is a known library.

        Raises:
            ConfigError: naming the component and the library.
        """
        for name, value in config_dict.items():
            library = value[0] if isinstance(value, (list, tuple)) and len(value) == 2 else None
            if not isinstance(library, str) or library.split(".")[0] in _LIBRARIES:
                continue
            if not hasattr(diffusers_pipelines, library):
                raise ConfigError(
                    f"model_index.json says that {name} comes from {library!r}; a UViTPipeline's parts are classes of "
                    f"{', '.join(_LIBRARIES)}."
                )
        return super().extract_init_dict(config_dict, **kwargs)
