"""UNets as unit sequences: the modules that their stages call, which of them make long skips and which read them.

A column is a module that a stage calls in its own loop: a resnet, an attention, a sampler. diffusers' usual stages
differ only in which lists of modules they hold, so their order is read off the lists. A stage of any other kind is one
column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastdiff.backbones.base import Backbone, BlockIO, SkipSite, Stage, Step, Unit
from fastdiff.errors import UnsupportedBackboneError
from fastdiff.plan import UnitTraits

LAYER_PARTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
"""Lists of modules in a stage, in the order in which one layer calls an entry of each."""

LAYERED_STAGES = frozenset(
    f"{kind}{suffix}"
    for suffixes, kinds in (
        (("DownBlock2D", "UpBlock2D"), ("", "Attn", "CrossAttn", "SimpleCrossAttn")),
        (("DownsampleBlock2D", "UpsampleBlock2D"), ("Resnet",)),
        (("DownBlock3D", "UpBlock3D"), ("", "CrossAttn")),
        (("DownBlockMotion", "UpBlockMotion"), ("", "CrossAttn")),
        (("DownBlockSpatioTemporal", "UpBlockSpatioTemporal"), ("", "CrossAttn")),
    )
    for suffix in suffixes
    for kind in kinds
)
"""Stages, by class name, whose loop runs the layers in order and hands on the output of each as a long skip."""

LAYERED_MIDDLES = frozenset(
    (
        "UNetMidBlock2D",
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2DSimpleCrossAttn",
        "UNetMidBlock3DCrossAttn",
        "UNetMidBlockCrossAttnMotion",
        "UNetMidBlockSpatioTemporal",
    )
)
"""Bottlenecks, by class name: one resnet, then attention and a resnet in turn."""

SAMPLES_STOP = frozenset(("UNet2DConditionModel", "UNet2DModel"))
"""UNets, by class name, in which samples may stop on their own between up stages."""

SKIPS_ARGUMENT = "res_hidden_states_tuple"
BRANCHES = ("attn1", "attn2", "ff")
"""Modules of a transformer block whose output is added to its hidden state."""

_HIDDEN = BlockIO(("hidden_states",))


def is_unet(denoiser: nn.Module) -> bool:
    """Whether a denoiser has an encoder and a decoder with long skips, built of diffusers' stages."""
    stages = [getattr(denoiser, name, None) for name in ("down_blocks", "up_blocks")]
    return all(isinstance(stage, nn.ModuleList) and len(stage) for stage in stages)


def is_control(module: nn.Module) -> bool:
    """Whether a module makes the residuals that a ControlNet adds to a UNet's encoder."""
    return hasattr(module, "controlnet_down_blocks") or isinstance(getattr(module, "nets", None), nn.ModuleList)


@dataclass
class _Columns:
    """The units of a denoiser as they are found, in execution order."""

    level: str
    prefix: str = ""
    units: list[Unit] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)  # the column that made each long skip, in order
    open_skips: list[int] = field(default_factory=list)  # numbers of those that no stage has read yet
    beside: list[str] = field(default_factory=list)  # further columns of the encoder that the decoder reads
    sites: list[SkipSite] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def add(self, name: str, module: nn.Module, reads: tuple[str, ...] = (), fragile: bool = False) -> None:
        """One more column for a module, or several for its branches."""
        parts = _branches(name, module) if self.level == "branch" else [_by_output(name, module)]
        for part in parts:
            full = replace(part.traits, name=self.prefix + part.name, reads=reads)
            self.units.append(replace(part, traits=full, segment=len(self.units), fragile=fragile))
            reads = ()

    @property
    def last(self) -> str:
        return self.units[-1].name

    def make_skip(self) -> None:
        """The column before hands its output to the decoder."""
        self.open_skips.append(len(self.skips))
        self.skips.append(self.last)

    def close_stage(self, module: nn.Module, first: int, skips: tuple[int, ...] | None = None) -> None:
        """The columns from ``first`` on were those of one stage."""
        if self.level == "layer":  # a branch's output is not what its stage hands on
            self.stages.append(Stage(module, range(first, len(self.units)), skips))

    def take_skips(self, number: int) -> tuple[int, ...]:
        """The numbers of the latest skips that nobody has read, oldest first."""
        taken = self.open_skips[-number:] if number else []
        del self.open_skips[len(self.open_skips) - len(taken) :]
        return tuple(taken)


def unet_backbone(denoiser: nn.Module, level: str = "layer") -> Backbone:
    """See a UNet as one sequence of columns from its first to its last convolution.

    Args:
        denoiser: a diffusers UNet.
        level: ``"layer"``: a column for each module that a stage calls, reused by its whole output. ``"branch"``: a
            column for each residual branch, reused before it is added to the fresh hidden state.

    Raises:
        UnsupportedBackboneError: if the denoiser's layout is not known.
    """
    columns = _Columns(level)
    try:
        layout = _LAYOUTS.get(type(denoiser).__name__, _usual_layout)
        layout(denoiser, columns)
    except (AttributeError, IndexError) as error:
        raise UnsupportedBackboneError(
            f"{type(denoiser).__name__} has stages, but not in a layout that fastdiff knows: {error}."
        ) from error
    encoded = () if level == "branch" else tuple(dict.fromkeys([*columns.skips, *columns.beside, _bottleneck(columns)]))
    up_steps = _up_steps(denoiser, columns)
    return Backbone(
        denoiser, tuple(columns.units), level, encoded, tuple(columns.sites), tuple(columns.stages), up_steps
    )


def control_backbone(module: nn.Module) -> Backbone:
    """See a ControlNet, or several as one, as a sequence of columns; its outputs are those of its last convolutions."""
    nets = [(f"nets.{index}.", net) for index, net in enumerate(getattr(module, "nets", ()))] or [("", module)]
    units: list[Unit] = []
    for prefix, net in nets:
        columns = _Columns("layer", prefix)
        columns.add("conv_in", net.conv_in)
        if hasattr(net, "controlnet_cond_embedding"):
            columns.add("controlnet_cond_embedding", net.controlnet_cond_embedding, reads=(columns.last,))
        columns.make_skip()
        _encoder(net, columns)
        bottleneck = columns.last
        makers = [*columns.skips, bottleneck]
        outputs = [(f"controlnet_down_blocks.{index}", part) for index, part in enumerate(net.controlnet_down_blocks)]
        outputs.append(("controlnet_mid_block", net.controlnet_mid_block))
        for maker, (name, part) in zip(makers, outputs, strict=True):
            columns.add(name, part, reads=(maker,))
            unit = columns.units[-1]
            columns.units[-1] = replace(unit, traits=replace(unit.traits, is_output=True))
        units += columns.units
    return Backbone(module, tuple(units), is_control=True)


def _bottleneck(columns: _Columns) -> str:
    """The last column before the first up stage."""
    names = [unit.name for unit in columns.units]
    first_up = next(index for index, unit in enumerate(columns.units) if unit.stage.startswith("up_"))
    return names[first_up - 1]


def _up_steps(denoiser: Any, columns: _Columns) -> tuple[Step, ...]:
    """The up stages, if samples can stop between them."""
    if type(denoiser).__name__ not in SAMPLES_STOP or denoiser.config.get("time_embedding_type") == "fourier":
        return ()  # with such an embedding the output is divided by the timesteps
    sites = {site.module: site for site in columns.sites}
    stages = [stage for stage in columns.stages if stage.module in sites]
    if len(stages) < len(denoiser.up_blocks) or 0 not in sites[stages[-1].module].skips:
        return ()
    last = sites[stages[-1].module]
    steps = [Step(stage.module, _HIDDEN.of(stage.module), stage.columns) for stage in stages]
    return (*steps[:-1], replace(steps[-1], carries=(last, last.skips.index(0))))


# -- layouts -----------------------------------------------------------------------------------------------------------


def _usual_layout(unet: Any, columns: _Columns) -> None:
    """First convolution, down stages, bottleneck, up stages that take the latest skips, last convolution."""
    columns.add("conv_in", unet.conv_in)
    if hasattr(unet, "transformer_in"):
        columns.add("transformer_in", unet.transformer_in)
    columns.make_skip()
    _encoder(unet, columns)
    for index, stage in enumerate(unet.up_blocks):
        _up_stage(f"up_blocks.{index}", stage, columns, fragile=index < 2)  # FreeU writes into these
    if getattr(unet, "conv_norm_out", None) is not None:
        columns.add("conv_norm_out", unet.conv_norm_out)
    columns.add("conv_out", unet.conv_out, fragile=True)


def _encoder(unet: Any, columns: _Columns) -> None:
    for index, stage in enumerate(unet.down_blocks):
        # T2I-Adapters are added in place to what stages without cross-attention and the bottleneck return.
        fragile = not getattr(stage, "has_cross_attention", False)
        _down_stage(f"down_blocks.{index}", stage, columns, fragile)
    if getattr(unet, "mid_block", None) is not None:
        first = len(columns.units)
        for name, module in _middle(unet.mid_block):
            columns.add(name, module, fragile=True)
        if len(columns.units) > first + 1:
            columns.close_stage(unet.mid_block, first)


def _kandinsky3_layout(unet: Any, columns: _Columns) -> None:
    """Every down stage but the last makes one skip, every up stage but the first reads one."""
    columns.add("conv_in", unet.conv_in)
    for index, stage in enumerate(unet.down_blocks):
        columns.add(f"down_blocks.{index}", stage)
        if index < len(unet.down_blocks) - 1:
            columns.make_skip()
    for index, stage in enumerate(unet.up_blocks):
        taken = columns.take_skips(1) if index else ()
        columns.add(f"up_blocks.{index}", stage, reads=tuple(columns.skips[skip] for skip in taken))
    columns.add("conv_norm_out", unet.conv_norm_out)
    columns.add("conv_out", unet.conv_out)


def _cascade_layout(unet: Any, columns: _Columns) -> None:
    """Levels of blocks between scalers; the first block of a level of the decoder reads that level of the encoder.

    A level may run several times with a mapper between; what its last block leaves is the output of the last time.
    """
    columns.add("embedding", unet.embedding)
    for index, blocks in enumerate(unet.down_blocks):
        columns.add(f"down_downscalers.{index}", unet.down_downscalers[index])
        for place, mapper in enumerate(unet.down_repeat_mappers[index]):
            columns.add(f"down_repeat_mappers.{index}.{place}", mapper)
        for place, block in enumerate(blocks):
            columns.add(f"down_blocks.{index}.{place}", block)
        columns.make_skip()
    columns.take_skips(1)  # the deepest is the decoder's input
    columns.skips.pop()
    for index, blocks in enumerate(unet.up_blocks):
        for place, mapper in enumerate(unet.up_repeat_mappers[index]):
            columns.add(f"up_repeat_mappers.{index}.{place}", mapper)
        for place, block in enumerate(blocks):
            taken = columns.take_skips(1) if index and not place else ()
            columns.add(f"up_blocks.{index}.{place}", block, reads=tuple(columns.skips[skip] for skip in taken))
            if taken:
                columns.sites.append(SkipSite.of(block, "x_skip", taken))
        columns.add(f"up_upscalers.{index}", unet.up_upscalers[index])
    columns.add("clf", unet.clf)


def _audio_layout(unet: Any, columns: _Columns) -> None:
    """Every down stage makes one skip and every up stage reads one; there may be no convolution around them."""
    for index, stage in enumerate(unet.down_blocks):
        columns.add(f"down_blocks.{index}", stage)
        columns.make_skip()
    if unet.mid_block is not None:
        columns.add("mid_block", unet.mid_block)
    for index, stage in enumerate(unet.up_blocks):
        taken = columns.take_skips(1)
        columns.sites.append(SkipSite.of(stage, SKIPS_ARGUMENT, taken))
        columns.add(f"up_blocks.{index}", stage, tuple(columns.skips[skip] for skip in taken), fragile=True)
    if unet.out_block is not None:
        columns.add("out_block", unet.out_block, fragile=True)


def _control_xs_layout(unet: Any, columns: _Columns) -> None:
    """A UNet with a small one beside it that controls it: both in one stage, which hands on the skips of both."""
    for name in ("controlnet_cond_embedding", "base_conv_in", "ctrl_conv_in", "control_to_base_for_conv_in"):
        columns.add(name, getattr(unet, name), fragile=True)
    columns.beside += [unit.name for unit in columns.units[:-1]]  # added up outside of any stage
    columns.make_skip()
    for index, stage in enumerate(unet.down_blocks):
        columns.add(f"down_blocks.{index}", stage, reads=() if index else tuple(columns.beside))
        for _ in range(len(stage.base_resnets) + (stage.base_downsamplers is not None)):
            columns.make_skip()
    columns.add("mid_block", unet.mid_block, fragile=True)
    for index, stage in enumerate(unet.up_blocks):
        taken = columns.take_skips(len(stage.resnets))
        columns.sites.append(SkipSite.of(stage, f"{SKIPS_ARGUMENT}_base", taken))
        makers = [columns.skips[skip] for skip in taken]
        beside = columns.beside if 0 in taken else []
        columns.add(f"up_blocks.{index}", stage, tuple(dict.fromkeys([*makers, *beside])), fragile=True)
    columns.add("base_conv_norm_out", unet.base_conv_norm_out)
    columns.add("base_conv_out", unet.base_conv_out, fragile=True)


_LAYOUTS = {
    "Kandinsky3UNet": _kandinsky3_layout,
    "StableCascadeUNet": _cascade_layout,
    "UNet1DModel": _audio_layout,
    "UNetControlNetXSModel": _control_xs_layout,
}


# -- stages ------------------------------------------------------------------------------------------------------------


def _layers(stage: Any) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules of each layer in the order of their calls, named within the stage."""
    layers = len(stage.resnets)
    for layer in range(layers):
        yield [part for name in LAYER_PARTS for part in _share(stage, name, layer, layers)]


def _share(stage: Any, name: str, layer: int, layers: int) -> list[tuple[str, nn.Module]]:
    """A layer's modules in one of a stage's lists: usually one, several in a row where AudioLDM2 has more texts."""
    modules = getattr(stage, name, None) or ()
    each = len(modules) // layers
    return [(f"{name}.{index}", modules[index]) for index in range(layer * each, (layer + 1) * each)]


def _samplers(stage: Any) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.{index}", module)
        for name in ("downsamplers", "upsamplers")
        for index, module in enumerate(getattr(stage, name, None) or ())
    ]


def _down_stage(name: str, stage: Any, columns: _Columns, fragile: bool) -> None:
    samplers = _samplers(stage)
    if type(stage).__name__ not in LAYERED_STAGES:
        columns.add(name, stage)
        for _ in range(len(stage.resnets) + bool(samplers and not _is_karras(stage))):
            columns.make_skip()
        return
    first, skips = len(columns.units), []
    for layer in [*_layers(stage), *([samplers] if samplers else [])]:
        for part, module in layer:
            columns.add(f"{name}.{part}", module, fragile=fragile)
        columns.make_skip()
        skips.append(len(columns.units) - 1)
    columns.close_stage(stage, first, tuple(skips))


def _up_stage(name: str, stage: Any, columns: _Columns, fragile: bool) -> None:
    taken = columns.take_skips(len(stage.resnets))
    columns.sites.append(SkipSite.of(stage, SKIPS_ARGUMENT, taken))
    makers = [columns.skips[skip] for skip in taken]
    if type(stage).__name__ not in LAYERED_STAGES:
        columns.add(name, stage, reads=tuple(dict.fromkeys(makers)))
        return
    first = len(columns.units)
    for layer in _layers(stage):
        reads: tuple[str, ...] = (makers.pop(),)
        for part, module in layer:
            columns.add(f"{name}.{part}", module, reads, fragile)
            reads = ()
    for part, module in _samplers(stage):
        columns.add(f"{name}.{part}", module, fragile=fragile)
    columns.close_stage(stage, first)


def _middle(stage: Any) -> Iterator[tuple[str, nn.Module]]:
    if type(stage).__name__ not in LAYERED_MIDDLES:
        yield "mid_block", stage
        return
    layers = len(stage.resnets)
    for layer in range(layers):
        parts = []
        if layer:
            between = ("attentions", "temp_attentions", "motion_modules")
            parts = [part for name in between for part in _share(stage, name, layer - 1, layers - 1)]
        parts += [part for name in ("resnets", "temp_convs") for part in _share(stage, name, layer, layers)]
        yield from ((f"mid_block.{part}", module) for part, module in parts if module is not None)


def _is_karras(stage: Any) -> bool:
    """Stages of the latent upscaler, whose samplers make no skip."""
    return type(stage).__name__ in ("KDownBlock2D", "KCrossAttnDownBlock2D")


# -- columns -----------------------------------------------------------------------------------------------------------


def _by_output(name: str, module: nn.Module, reuse: str = "output") -> Unit:
    return Unit(module, None, UnitTraits(name, same_shape=False, can_exit=False, reuse=reuse))


def _by_residual(name: str, module: nn.Module, io: BlockIO) -> Unit:
    return Unit(module, io.of(module), UnitTraits(name, same_shape=False, can_exit=False))


def _branches(name: str, module: Any) -> list[Unit]:
    """A module's residual branches; one unit that is reused by its output if it has none."""
    if isinstance(module, ResnetBlock2D) and module.upsample is None and module.downsample is None:
        unit = _by_residual(name, module, BlockIO(("input_tensor",)))
        return [replace(unit, shortcut=partial(_resnet_shortcut, module))]
    if hasattr(module, "transformer_blocks"):
        return [
            _by_output(f"{name}.transformer_blocks.{index}.{branch}", getattr(block, branch), "branch")
            for index, block in enumerate(module.transformer_blocks)
            for branch in BRANCHES
            if getattr(block, branch, None) is not None
        ]
    if ".temp_convs." in name or (".attentions." in name and getattr(module, "residual_connection", False)):
        return [_by_residual(name, module, _HIDDEN)]
    return [_by_output(name, module)]


def _resnet_shortcut(resnet: ResnetBlock2D, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a resnet adds its convolutions' output to, at the scale of its output."""
    carried = hidden_states if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden_states)
    return carried / resnet.output_scale_factor
