"""U-ViT: a transformer denoiser in which everything is a token and long skips join its two halves.

Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (arXiv 2209.12152).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from fastdiff.errors import ConfigError

INITIAL_STD = 0.02


class UViTSkip(nn.Module):
    """Merges a long skip into the stream: a linear layer on both, side by side.

    It stands in front of an out-block and not in it, so that the block can be left out while the skip is still merged.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Merge two streams of shape ``(batch, tokens, width)`` into one."""
        return self.skip_linear(torch.cat([hidden_states, skip], dim=-1))


class UViT(ModelMixin, AttentionMixin, ConfigMixin):
    """U-ViT for square images or latents: unconditional, class-conditional or text-conditional.

    The tokens are ``[class] [time] [patches]``, or ``[time] [text] [patches]``, with one learned position embedding.
    Half of the blocks come before a middle block and half after; what each of the first half leaves is merged into the
    stream in front of its counterpart in the second half.

    Args:
        sample_size: height and width of the samples.
        patch_size: height and width of a patch; divides ``sample_size``.
        in_channels: channels of the samples, and of the predictions.
        num_layers: blocks without the middle one, an even number; the paper's depth.
        num_attention_heads: heads of each attention.
        attention_head_dim: channels of each head; heads times this is the width of a token.
        mlp_ratio: hidden channels of the feed-forward layers, in widths.
        attention_bias: whether queries, keys and values have a bias.
        time_embed_mlp: whether the time token passes through a small network.
        num_classes: number of classes, not counting the null class; None for a model without.
        null_class: whether there is one more class, the last, that stands for no class (classifier-free guidance).
        context_dim: channels of the text embeddings; None for a model without.
        context_length: number of text embeddings.
        final_conv: whether a 3×3 convolution ends the model.

    Raises:
        ConfigError: if the numbers do not fit each other, or the model shall be conditioned on both classes and text.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["BasicTransformerBlock", "UViTSkip"]
    _repeated_blocks: ClassVar[list[str]] = ["BasicTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        attention_bias: bool = False,
        time_embed_mlp: bool = False,
        num_classes: int | None = None,
        null_class: bool = True,
        context_dim: int | None = None,
        context_length: int = 77,
        final_conv: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 2 or num_layers % 2:
            raise ConfigError(f"UViT.num_layers is an even number from 2, half before the middle; got {num_layers}.")
        if sample_size % patch_size:
            raise ConfigError(f"UViT cuts samples into whole patches; got {sample_size} pixels and {patch_size}.")
        if num_classes is not None and context_dim is not None:
            raise ConfigError("UViT is conditioned on classes or on text; got both num_classes and context_dim.")
        width = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False

        def block() -> BasicTransformerBlock:
            return BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                activation_fn="gelu",
                attention_bias=attention_bias,
                norm_type="layer_norm",
                ff_inner_dim=int(mlp_ratio * width),
            )

        self.patch_embed = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(width, 4 * width, out_dim=width) if time_embed_mlp else None
        self.class_embed = None if num_classes is None else nn.Embedding(num_classes + null_class, width)
        self.context_embed = None if context_dim is None else nn.Linear(context_dim, width)
        self.extra_tokens = 1 + (num_classes is not None) + (context_length if context_dim is not None else 0)
        patches = (sample_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra_tokens + patches, width))

        half = num_layers // 2
        self.transformer_in_blocks = nn.ModuleList(block() for _ in range(half))
        self.transformer_mid_block = block()
        self.transformer_out_blocks = nn.ModuleList(
            nn.ModuleDict({"skip": UViTSkip(width), "block": block()}) for _ in range(half)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.conv_out = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1) if final_conv else None
        nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD)
        self.apply(_initialise)

    @property
    def null_label(self) -> int | None:
        """The class that stands for no class, or None if there is none."""
        classes = self.config["num_classes"]
        return classes if classes is not None and self.config["null_class"] else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict from noisy samples.

        Args:
            hidden_states: the samples, shape ``(batch, in_channels, sample_size, sample_size)``.
            timestep: training timesteps, a number or of shape ``(batch,)``.
            class_labels: shape ``(batch,)``, int64; needed by a class-conditional model, and by no other.
            encoder_hidden_states: shape ``(batch, context_length, context_dim)``; the same for text.
            return_dict: whether to return an output object, or a tuple.

        Returns:
            The prediction, ``sample``, in the samples' shape.

        Raises:
            ConfigError: if an input is missing, is of another shape, or is one that the model does not take.
        """
        sample = self.image_of(self.run_blocks(hidden_states, timestep, class_labels, encoder_hidden_states))
        if self.conv_out is not None:
            sample = self.conv_out(sample)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def run_blocks(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the last block leaves, shape ``(batch, extra tokens + patches, width)``; arguments as of `forward`."""
        tokens = self._embed(hidden_states, timestep, class_labels, encoder_hidden_states)
        skips = []
        for block in self.transformer_in_blocks:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.transformer_mid_block, tokens)
        for pair in self.transformer_out_blocks:
            assert isinstance(pair, nn.ModuleDict)
            tokens = self._run(pair["skip"], tokens, skips.pop())
            tokens = self._run(pair["block"], tokens)
        return tokens

    def image_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the final convolution reads, in the samples' shape, from what the last block leaves."""
        return self._unpatchify(self.proj_out(self.norm_out(tokens))[:, self.extra_tokens :])

    def _run(self, module: nn.Module, *streams: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *streams)
        return module(*streams)

    def _embed(
        self, sample: torch.Tensor, timestep: Any, labels: torch.Tensor | None, context: torch.Tensor | None
    ) -> torch.Tensor:
        """All tokens, of shape ``(batch, extra tokens + patches, width)``."""
        expected = (self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])
        if tuple(sample.shape[1:]) != expected:
            raise ConfigError(
                f"This UViT takes samples of shape (batch, {', '.join(map(str, expected))}), as many as its position "
                f"embedding has places; got {tuple(sample.shape)}."
            )
        self._check_conditioning("class_labels", labels, self.class_embed is not None)
        self._check_conditioning("encoder_hidden_states", context, self.context_embed is not None)
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        patches = self.patch_embed(sample).flatten(2).transpose(1, 2)
        time = self.time_proj(times).to(patches.dtype)
        if self.time_embed is not None:
            time = self.time_embed(time)
        tokens = [time[:, None], patches]
        if self.class_embed is not None:
            tokens.insert(0, self.class_embed(labels)[:, None])
        if self.context_embed is not None:
            tokens.insert(1, self.context_embed(context))
        return torch.cat(tokens, dim=1) + self.pos_embed

    @staticmethod
    def _check_conditioning(name: str, value: torch.Tensor | None, wanted: bool) -> None:
        if (value is not None) != wanted:
            given, asked = ("takes no", "leave it out") if value is not None else ("needs", "pass it")
            raise ConfigError(f"This UViT {given} {name}; {asked}.")

    def _unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        size, side = self.config["patch_size"], self.config["sample_size"]
        grid = patches.unflatten(1, (side // size, side // size)).unflatten(3, (size, size, self.config["in_channels"]))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
