"""`optimize` and `restore`: which modules get another forward, and their own back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.unet_2d_blocks import (
    AttnUpBlock2D,
    CrossAttnUpBlock2D,
    ResnetUpsampleBlock2D,
    SimpleCrossAttnUpBlock2D,
    UpBlock2D,
)
from torch import nn

from fastdiff.errors import ConfigError
from fastdiff.kernels import steps
from fastdiff.kernels.patching import conditions, joint, transformers, unets
from fastdiff.kernels.patching.replacement import Forward, put, take
from fastdiff.kernels.patching.report import OptimizeReport
from fastdiff.kernels.residual_norm_modulate import Rounding
from fastdiff.models.uvit import UViT


def _nothing(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """One class of modules that another forward is known for.

    Attributes:
        forward: what stands for its forward, as `replacement.Replacement` calls it.
        gain: what that does.
        obstacle: why it cannot stand for one module's; empty if it can.
    """

    forward: Forward
    gain: str
    obstacle: Callable[[Any], str] = _nothing


_BLOCK = "residual, gate, norm and modulation in one pass"
_NORM = "norm and modulation in one pass"
_UP_STAGE = Kind(unets.up_stage, "skips read where they lie, with their factor")
_HEADS = "norm and rotary embedding of queries or keys in one pass"
KINDS: dict[type[nn.Module], Kind] = {
    BasicTransformerBlock: Kind(transformers.basic_transformer_block, _BLOCK, transformers.basic_obstacle),
    JointTransformerBlock: Kind(transformers.joint_transformer_block, _BLOCK),
    DiTTransformer2DModel: Kind(transformers.dit, "output layers in one pass"),
    UViT: Kind(transformers.uvit, "output layers in one pass"),
    FluxAttention: Kind(joint.flux_attention, _HEADS, joint.flux_obstacle),
    FluxTransformerBlock: Kind(transformers.flux_block, _BLOCK),
    FluxSingleTransformerBlock: Kind(transformers.flux_single_block, "gate and residual in one pass"),
    AdaLayerNormZero: Kind(transformers.ada_layer_norm_zero, _NORM),
    AdaLayerNormZeroSingle: Kind(transformers.ada_layer_norm_zero_single, _NORM),
    AdaLayerNormContinuous: Kind(transformers.ada_layer_norm_continuous, _NORM),
    CombinedTimestepLabelEmbeddings: Kind(
        conditions.timestep_label_embeddings, "once for all blocks where weights are the same", conditions.obstacle
    ),
    SD35AdaLayerNormZeroX: Kind(transformers.sd35_ada_layer_norm_zero, _NORM),
    GEGLU: Kind(transformers.geglu_layer, "GELU and product in one pass"),
    Attention: Kind(unets.attention, "no division by one", unets.attention_obstacle),
    ResnetBlock2D: Kind(
        unets.resnet_block, "timestep, group norm, modulation and SiLU in two passes", unets.resnet_obstacle
    ),
    UpBlock2D: _UP_STAGE,
    AttnUpBlock2D: _UP_STAGE,
    CrossAttnUpBlock2D: _UP_STAGE,
    ResnetUpsampleBlock2D: _UP_STAGE,
    SimpleCrossAttnUpBlock2D: _UP_STAGE,
}
BY_PROCESSOR: dict[type, Kind] = {JointAttnProcessor2_0: Kind(joint.joint_attention, _HEADS, joint.joint_obstacle)}
"""What stands for `Attention` with a processor other than the default."""


def optimize(pipe_or_module: Any, *, rounding: Rounding = "fused") -> OptimizeReport:
    """Make a model's blocks run the operations of `fastdiff.ops`; `restore` takes that back.

    Modules, parameters and state dict stay what they are: single modules get another forward, inside of all hooks that
    are on them or come later. Adapters, offloading and fastdiff's methods may be put on before or after. Whether an
    operation runs as a kernel is decided at every call (`fastdiff.kernels.dispatch`). Compiled code and training use
    the model's own forwards. On a model that is given here, what fastdiff's methods compute between its blocks goes
    through these operations as well. Calling it again replaces what was chosen before.

    Args:
        pipe_or_module: a pipeline, whose diffusers models are treated one by one, or a module.
        rounding: ``"fused"`` rounds once per operation, so images differ slightly from the model's own;
            ``"match_eager"`` rounds wherever torch's operations do, and leaves group norms to torch.

    Returns:
        What was replaced, and what was left and why, by the modules' names.

    Raises:
        ConfigError: if it is neither a pipeline nor a module, or the rounding is unknown.
    """
    if rounding not in ("fused", "match_eager"):
        raise ConfigError(f"rounding is 'fused' or 'match_eager'; got {rounding!r}.")
    report = OptimizeReport()
    for prefix, model in _models(pipe_or_module):
        steps.allow(model, rounding)
        conditions.relate(model)
        replaced = [
            name
            for name, module in model.named_modules()
            if _optimize((prefix + name).rstrip("."), module, rounding, report)
        ]
        _name_unknown_blocks(prefix, model, replaced, report)
    return report


def restore(pipe_or_module: Any) -> int:
    """Give back their own forward to all modules that `optimize` gave another one.

    Args:
        pipe_or_module: a pipeline or module; one that was not optimised is left as it is.

    Returns:
        The number of modules restored.

    Raises:
        ConfigError: if it is neither a pipeline nor a module.
    """
    restored = 0
    for _, model in _models(pipe_or_module):
        steps.forbid(model)
        restored += sum(map(take, model.modules()))
    return restored


def _models(pipe_or_module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The diffusers models of a pipeline with what their modules' names begin with; a module alone."""
    if isinstance(pipe_or_module, nn.Module):
        yield "", _unwrapped(pipe_or_module)
        return
    components = getattr(pipe_or_module, "components", None)
    if not isinstance(components, dict):
        raise ConfigError(f"Give a diffusers pipeline or a torch module; got {type(pipe_or_module).__name__}.")
    for name, component in components.items():
        if isinstance(component, nn.Module) and isinstance(_unwrapped(component), ModelMixin):
            yield f"{name}.", _unwrapped(component)


def _unwrapped(module: nn.Module) -> nn.Module:
    """A model without the wrapper that torch.compile puts around it."""
    return getattr(module, "_orig_mod", module)


def _optimize(name: str, module: nn.Module, rounding: Rounding, report: OptimizeReport) -> bool:
    """Replace one module's forward if that is known, and report it."""
    cls = type(module)
    kind = KINDS.get(cls)
    if cls is Attention:
        kind = BY_PROCESSOR.get(type(module.processor), kind)
    if kind is None:
        base = next((base.__name__ for base in cls.__mro__ if base in KINDS), None)
        if base is not None:
            report.left[name] = f"{cls.__name__}: a subclass of {base} may do something else"
        return False
    reason = kind.obstacle(module) or _signature_obstacle(cls, kind.forward)
    if not reason and not put(module, kind.forward, rounding):
        reason = "its forward was replaced by something that fastdiff does not know"
    if reason:
        report.left[name] = f"{cls.__name__}: {reason}"
    else:
        report.replaced[name] = f"{cls.__name__}: {kind.gain}"
    return not reason


def _signature_obstacle(cls: type[nn.Module], forward: Forward) -> str:
    """Why a forward may take another argument for one that it knows; one that takes any others looks at them itself."""
    known = inspect.signature(forward).parameters.values()
    expected = [one.name for one in known if one.kind is one.POSITIONAL_OR_KEYWORD][2:]  # after module and rounding
    found = list(inspect.signature(cls.forward).parameters)[1:]
    open_ended = any(one.kind is one.VAR_KEYWORD for one in known)
    fits = expected == (found[: len(expected)] if open_ended else found)
    return "" if fits else f"its forward takes {', '.join(found)} in this version of diffusers"


def _name_unknown_blocks(prefix: str, model: nn.Module, replaced: list[str], report: OptimizeReport) -> None:
    """Report the repeated blocks that have norms and in which nothing is known."""
    for name, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for index, block in blocks.named_children():  # passes over places that a model leaves empty
            path = f"{name}.{index}"
            known = any(f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.") for other in replaced)
            has_norm = any("Norm" in type(module).__name__ for module in block.modules())
            if has_norm and not known and prefix + path not in report.left:
                report.left[prefix + path] = f"{type(block).__name__}: no kernel for what it does"
