"""Every function of `fastdiff.ops`: inputs of any size, what models do in its place, and how it is held to float64.

Tests and benchmark share this, so that what is timed is what is tested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from kernel_checks.formula import assert_close

from fastdiff import ops

Given = dict[str, Any]
Maybe = torch.Tensor | None


class Random:
    """Normally distributed tensors of one dtype on one device; on the device ``meta`` only their shapes."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.generator is None:
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)


def doubled(value: Any) -> Any:
    """In float64, and contiguous: on the CPU torch loses digits of a norm where channels are last."""
    if isinstance(value, torch.Tensor):
        return value.double().contiguous() if value.is_floating_point() else value
    return tuple(map(doubled, value)) if isinstance(value, tuple) else value


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors, those in tuples too."""
    found: list[torch.Tensor] = []
    for value in values:
        found += tensors_in(value) if isinstance(value, tuple) else [value] if isinstance(value, torch.Tensor) else []
    return found


@dataclass(frozen=True)
class Operation:
    """One function, as a model calls it.

    Attributes:
        name: in `fastdiff.ops`.
        limits: the largest sizes that Triton's interpreter runs in a moment.
    """

    name: ClassVar[str]
    limits: ClassVar[dict[str, int]]

    def inputs(self, random: Random, **sizes: Any) -> Given:
        """Arguments of `fused` and `eager`."""
        raise NotImplementedError

    def fused(self, **given: Any) -> Any:
        """The function."""
        return getattr(ops, self.name)(**given)

    def eager(self, **given: Any) -> Any:
        """The same by torch's own operations, as models call them."""
        raise NotImplementedError

    def terms(self, **given: Any) -> torch.Tensor:
        """The largest magnitude among the terms of each element of the result, from arguments in float64."""
        raise NotImplementedError

    def hold(self, given: Given) -> None:
        """Hold the function against float64, and two runs against each other."""
        result, exactly = self.fused(**given), {name: doubled(value) for name, value in given.items()}
        assert_close(result, self.eager(**exactly), self.terms(**exactly), self.eager(**given))
        assert torch.equal(self.fused(**given), result)

    def moved(self, given: Given) -> int:
        """Bytes that cannot but be read and written, each once."""
        results = self.eager(**given)
        everything = tensors_in((*given.values(), *(results if isinstance(results, tuple) else (results,))))
        return sum(tensor.numel() * tensor.element_size() for tensor in everything)


class ResidualNormModulate(Operation):
    """Adaptive: gate, LayerNorm, modulation. Otherwise the residual and an affine LayerNorm."""

    name: ClassVar = "residual_norm_modulate"
    limits: ClassVar = {"batch": 2, "tokens": 3, "width": 100}

    def inputs(
        self, random: Random, batch: int, tokens: int, width: int, adaptive: bool, uncertainty: bool = False
    ) -> Given:
        given: Given = {"x": random(batch, tokens, width), "branch": random(batch, tokens, width)}
        if adaptive:
            given |= zip(("gate", "scale", "shift"), random(batch, 3, width).unbind(1), strict=True)
        else:
            given |= {"weight": random(width), "bias": random(width), "eps": 1e-5}
        return given | ({"uem": (random(width) / width**0.5, random(batch))} if uncertainty else {})

    def eager(
        self,
        x: torch.Tensor,
        branch: torch.Tensor,
        gate: Maybe = None,
        weight: Maybe = None,
        bias: Maybe = None,
        scale: Maybe = None,
        shift: Maybe = None,
        eps: float = 1e-6,
        uem: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        residual = x + (branch if gate is None else gate[:, None] * branch)
        normed = F.layer_norm(residual, residual.shape[-1:], weight, bias, eps)
        if scale is not None and shift is not None:
            normed = normed * (1 + scale[:, None]) + shift[:, None]
        if uem is None:
            return residual, normed
        return residual, normed, torch.sigmoid(residual @ uem[0] + uem[1][:, None])

    def hold(self, given: Given) -> None:
        results, exactly = self.fused(**given), {name: doubled(value) for name, value in given.items()}
        gate, scale, shift = (
            exactly[name][:, None] if name in exactly else None for name in ("gate", "scale", "shift")
        )
        added = exactly["branch"] if gate is None else gate * exactly["branch"]
        eager = self.eager(**given)
        # Without a gate there is one rounding in both.
        fair = eager[0] if gate is not None else None
        assert_close(results[0], exactly["x"] + added, torch.maximum(exactly["x"].abs(), added.abs()), fair)
        # What follows is exact for the residual as it was rounded.
        hidden = results[0].double()
        rest = {name: value for name, value in exactly.items() if name not in ("x", "branch", "gate")}
        _, normed, *uncertainty = self.eager(hidden, torch.zeros_like(hidden), **rest)
        deviation = hidden.std(-1, unbiased=False, keepdim=True)
        terms = hidden.abs().amax(-1, keepdim=True) / deviation * exactly.get("weight", hidden.new_ones(1)).abs()
        terms = terms + exactly.get("bias", hidden.new_zeros(1)).abs()
        if scale is not None and shift is not None:
            terms = terms * (1 + scale).abs() + shift.abs()
        assert_close(results[1], normed, terms, eager[1] if torch.equal(results[0], eager[0]) else None)
        if uncertainty:
            weight, offset = exactly["uem"]
            assert_close(results[2], uncertainty[0], (hidden * weight).abs().amax(-1) + offset.abs()[:, None])
        for first, second in zip(results, self.fused(**given), strict=True):
            assert first is second is None or torch.equal(first, second)


class GroupNormAct(Operation):
    """In a residual block: with a skip connection its first norm, otherwise its second, which has the timestep."""

    name: ClassVar = "group_norm_act"
    limits: ClassVar = {"batch": 2, "channels": 64, "skip_channels": 32, "size": 5}

    def inputs(
        self, random: Random, batch: int, channels: int, size: int, skip_channels: int = 0, last: bool = False
    ) -> Given:
        layout = torch.channels_last if last else torch.contiguous_format
        x, *skip = (
            random(batch, width, size, size).contiguous(memory_format=layout)
            for width in (channels, skip_channels)
            if width
        )
        width = channels + skip_channels
        given = {"x": x, "groups": 32, "weight": random(width), "bias": random(width)}
        return given | ({"skip": skip[0]} if skip else {"add": random(batch, width)})

    def eager(
        self, x: torch.Tensor, groups: int, weight: Maybe, bias: Maybe, skip: Maybe = None, add: Maybe = None
    ) -> torch.Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        x = x if add is None else x + add[:, :, None, None]
        return F.silu(F.group_norm(x, groups, weight, bias, 1e-5))

    def terms(self, x: Any, groups: int, weight: Any, bias: Any, skip: Any = None, add: Any = None) -> torch.Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        largest = x.abs().amax() + (0 if add is None else add.abs().amax())
        x = x if add is None else x + add[:, :, None, None]
        deviation = x.reshape(len(x), groups, -1).std(-1, unbiased=False).amin()
        weight, bias = (part.abs()[:, None, None] for part in (weight, bias))
        return largest / deviation * weight + bias + torch.zeros_like(x)


class SkipShortcut(Operation):
    """In a residual block of a decoder: from the channels of features and skip connection to those of the level."""

    name: ClassVar = "skip_shortcut"
    limits: ClassVar = {"batch": 2, "channels": 40, "skip_channels": 24, "size": 5, "outputs": 36}

    def inputs(
        self, random: Random, batch: int, channels: int, skip_channels: int, size: int, outputs: int, last: bool = False
    ) -> Given:
        layout = torch.channels_last if last else torch.contiguous_format
        x, skip = (
            random(batch, width, size, size).contiguous(memory_format=layout) for width in (channels, skip_channels)
        )
        width = channels + skip_channels
        weight = random(outputs, width, 1, 1) / width**0.5
        return {"x": x, "skip": skip, "weight": weight, "bias": random(outputs)}

    def eager(self, x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(torch.cat([x, skip], dim=1), weight, bias)

    def terms(self, x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # Every product is rounded on the way to a sum that may be small.
        return F.conv2d(torch.cat([x, skip], dim=1).abs(), weight.abs(), bias.abs())


class SkipTokens(SkipShortcut):
    """In front of a block of a U-ViT: tokens, as pixels of an image one pixel wide."""

    limits: ClassVar = {"batch": 2, "tokens": 5, "width": 40}

    def inputs(self, random: Random, batch: int, tokens: int, width: int) -> Given:
        x, skip = (random(batch, tokens, width).mT.unsqueeze(-1) for _ in range(2))
        return {"x": x, "skip": skip, "weight": random(width, 2 * width) / width**0.5, "bias": random(width)}

    def eager(self, x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([x.squeeze(-1).mT, skip.squeeze(-1).mT], dim=-1)
        return F.linear(tokens, weight, bias).mT.unsqueeze(-1)

    def terms(self, x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.eager(x.abs(), skip.abs(), weight.abs(), bias.abs())


class Geglu(Operation):
    """As UNets have it: with the error function."""

    name: ClassVar = "geglu"
    limits: ClassVar = {"batch": 2, "tokens": 3, "hidden": 100}

    def inputs(self, random: Random, batch: int, tokens: int, hidden: int) -> Given:
        return {"x": random(batch, tokens, 2 * hidden)}

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    def terms(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return (hidden * gate).abs()


class GeluTanh(Operation):
    """As transformers have it."""

    name: ClassVar = "gelu_tanh"
    limits: ClassVar = Geglu.limits

    def inputs(self, random: Random, batch: int, tokens: int, hidden: int) -> Given:
        return {"x": random(batch, tokens, hidden)}

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    def terms(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


class ExitHead(Operation):
    """The output layers of a transformer over a square of patches."""

    name: ClassVar = "exit_head"
    limits: ClassVar = {"batch": 2, "columns": 3, "width": 100}

    def inputs(self, random: Random, batch: int, columns: int, width: int, patch: int, channels: int) -> Given:
        outputs = patch**2 * channels
        scale, shift = random(batch, 2, width).unbind(1)
        return {
            "x": random(batch, columns**2, width),
            "weight": random(outputs, width) / width**0.5,
            "bias": random(outputs),
            "columns": columns,
            "patch": patch,
            "scale": scale,
            "shift": shift,
        }

    def eager(self, x: Any, weight: Any, bias: Any, columns: int, patch: int, scale: Any, shift: Any) -> torch.Tensor:
        return self._image(F.linear(self._hidden(x, scale, shift), weight, bias), columns, patch)

    def terms(self, x: Any, weight: Any, bias: Any, columns: int, patch: int, scale: Any, shift: Any) -> torch.Tensor:
        # Every product is rounded on the way to a sum that may be small.
        terms = F.linear(self._hidden(x, scale, shift).abs() + 1, weight.abs(), bias.abs())
        return self._image(terms, columns, patch)

    @staticmethod
    def _hidden(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    @staticmethod
    def _image(flat: torch.Tensor, columns: int, patch: int) -> torch.Tensor:
        flat = flat.reshape(len(flat), -1, columns, patch, patch, flat.shape[-1] // patch**2)
        image = torch.einsum("nhwpqc->nchpwq", flat)
        return image.reshape(*image.shape[:2], image.shape[2] * patch, columns * patch)


class UncertaintyScore(Operation):
    """Before an exit: the module, which stays in float32, on tokens behind others, or on a UNet's pixels."""

    name: ClassVar = "uncertainty_score"
    limits: ClassVar = {"batch": 2, "tokens": 19, "width": 100, "extra": 2}

    def inputs(
        self, random: Random, batch: int, tokens: int, width: int, outputs: int, extra: int = 0, pixels: bool = False
    ) -> Given:
        weight, bias, offset = (
            random(*shape, dtype=torch.float32) for shape in ((outputs, width), (outputs,), (batch, outputs))
        )
        given = random(batch, width, tokens).mT if pixels else random(batch, extra + tokens, width)[:, extra:]
        return {"tokens": given, "weight": weight / width**0.5, "bias": bias, "offset": offset}

    def eager(self, tokens: Any, weight: Any, bias: Any, offset: Any) -> torch.Tensor:
        return self._uncertainty(tokens, weight, bias, offset).mean((1, 2))

    def terms(self, tokens: Any, weight: Any, bias: Any, offset: Any) -> torch.Tensor:
        # A sigmoid passes on a rounding of its argument times its derivative.
        uncertainty = self._uncertainty(tokens, weight, bias, offset)
        terms = F.linear(tokens.abs(), weight.abs(), bias.abs()) + offset.abs()[:, None]
        return (uncertainty + uncertainty * (1 - uncertainty) * terms).mean((1, 2))

    @staticmethod
    def _uncertainty(tokens: Any, weight: Any, bias: Any, offset: Any) -> torch.Tensor:
        return torch.sigmoid(F.linear(tokens.to(weight.dtype), weight, bias) + offset[:, None])


class QkNormRope(Operation):
    """Queries or keys of Flux."""

    name: ClassVar = "qk_norm_rope"
    limits: ClassVar = {"batch": 2, "tokens": 3, "heads": 3}

    def inputs(self, random: Random, batch: int, tokens: int, heads: int, width: int) -> Given:
        angle = 3 * random(tokens, width, dtype=torch.float32)
        return {
            "x": random(batch, tokens, heads, width),
            "weight": random(width),
            "cos": angle.cos(),
            "sin": angle.sin(),
        }

    def eager(self, x: Any, weight: Any, cos: Any, sin: Any) -> torch.Tensor:
        return apply_rotary_emb(F.rms_norm(x, x.shape[-1:], weight, 1e-6), (cos, sin), sequence_dim=1)

    def hold(self, given: Given) -> None:
        result, exactly = self.fused(**given), {name: doubled(value) for name, value in given.items()}
        x, weight, cos, sin = exactly.values()
        # Written down by indices of the partners, because diffusers turns in float32 whatever it is given.
        hidden = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
        partner = torch.arange(x.shape[-1], device=x.device) ^ 1
        sign = torch.where(partner % 2 == 0, 1.0, -1.0).to(hidden)
        parts = hidden * cos[:, None], sign * hidden[..., partner] * sin[:, None]
        terms = torch.maximum(*(part.abs() for part in parts)) + hidden.abs().amax(-1, keepdim=True)
        assert_close(result, sum(parts), terms, self.eager(**given))
        assert torch.equal(self.fused(**given), result)


class Lincomb(Operation):
    """A weighted sum: a guided step of a scheduler, or a forecast from several stored values."""

    name: ClassVar = "lincomb"
    limits: ClassVar = {"batch": 2}

    def inputs(self, random: Random, batch: int, count: int, sample: tuple[int, ...]) -> Given:
        coefficients = random(count, dtype=torch.float32)
        return {"coefficients": coefficients, "tensors": tuple(random(batch, *sample) for _ in range(count))}

    def fused(self, coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return ops.lincomb(coefficients, *tensors)

    def eager(self, coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return reduce(torch.add, (weight * x for weight, x in zip(coefficients.unbind(), tensors, strict=True)))

    def terms(self, coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        products = (weight * x for weight, x in zip(coefficients.unbind(), tensors, strict=True))
        return reduce(torch.maximum, (product.abs() for product in products))


class Reuse(Lincomb):
    """The fresh input of blocks and the residual that they left at an earlier evaluation."""

    def inputs(self, random: Random, batch: int, count: int, sample: tuple[int, ...]) -> Given:
        given = super().inputs(random, batch, count, sample)
        return given | {"coefficients": torch.ones_like(given["coefficients"])}

    def eager(self, coefficients: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return reduce(torch.add, tensors)


class GatherRows(Operation):
    """Every second sample of a batch."""

    name: ClassVar = "gather_rows"
    limits: ClassVar = {"batch": 3, "tokens": 3, "width": 100}

    def inputs(self, random: Random, batch: int, tokens: int, width: int) -> Given:
        index = torch.arange(0, batch, 2, device=random.device)
        return {"x": random(batch, tokens, width), "index": index}

    def eager(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, index)

    def hold(self, given: Given) -> None:
        assert torch.equal(self.fused(**given), self.eager(**given))

    def moved(self, given: Given) -> int:
        x, index = given["x"], given["index"]
        return 2 * len(index) * x[0].numel() * x.element_size()


class ScatterRows(GatherRows):
    """Every second sample of a batch, written back in place."""

    name: ClassVar = "scatter_rows"

    def inputs(self, random: Random, batch: int, tokens: int, width: int) -> Given:
        given = super().inputs(random, batch, tokens, width)
        return {"out": given["x"], "index": given["index"], "rows": random(len(given["index"]), tokens, width)}

    def eager(self, out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return out.index_copy_(0, index, rows)

    def hold(self, given: Given) -> None:
        expected = self.eager(**given | {"out": given["out"].clone()})
        assert not torch.equal(given["out"], expected)
        assert torch.equal(self.fused(**given), expected)

    def moved(self, given: Given) -> int:
        rows = given["rows"]
        return 2 * rows.numel() * rows.element_size()
