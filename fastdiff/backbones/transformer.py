"""Transformers as unit sequences: where their block lists are and how streams pass through each kind of block.

Most blocks take the hidden state first and return it bare, and most denoisers keep their blocks in lists of a few usual
names. diffusers' block registry and the tables below say where that is not so; `register_block` adds to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn

from fastdiff.backbones.base import Backbone, BlockIO, SkipSite, Unit
from fastdiff.errors import ConfigError, UnsupportedBackboneError
from fastdiff.plan import UnitTraits

BLOCK_LISTS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "visual_transformer_blocks",
    "blocks",
    "layers",
    "single_transformer_blocks",
    "single_stream_blocks",
)
"""Attributes that hold a denoiser's blocks, in execution order."""

INTERLEAVED_LISTS = {"LatteTransformer3DModel": ("transformer_blocks", "temporal_transformer_blocks")}
"""Denoisers that take one block of each list in turn, reshaping in between."""

U_SHAPED_LISTS = ("transformer_in_blocks", "transformer_mid_block", "transformer_out_blocks")
"""Attributes of a U-ViT, in which the blocks of the second half come in pairs with the modules that read long skips."""

SKIP_ARGUMENT = "skip"

WRITES_BLOCK_OUTPUTS = ("BriaTransformer2DModel", "ChromaTransformer2DModel")
"""Denoisers whose loop adds ControlNet residuals to a block's output in place, which may be a passed-through input."""

_TEXT, _IMAGE = "encoder_hidden_states", "hidden_states"
_IMAGE_TEXT = BlockIO((_IMAGE, _TEXT), (0, 1))
_TEXT_IMAGE = BlockIO((_IMAGE, _TEXT), (1, 0))

_BLOCKS: dict[str, BlockIO] = {
    **dict.fromkeys(
        (
            "CogVideoXBlock",
            "ConsisIDBlock",
            "CogView3PlusTransformerBlock",
            "CogView4TransformerBlock",
            "EasyAnimateTransformerBlock",
            "GlmImageTransformerBlock",
            "HunyuanImageSingleTransformerBlock",
            "HunyuanImageTransformerBlock",
            "HiDreamImageTransformerBlock",
            "HunyuanVideo15TransformerBlock",
            "JoyImageEditPlusTransformerBlock",
            "JoyImageTransformerBlock",
        ),
        _IMAGE_TEXT,
    ),
    **dict.fromkeys(
        (
            "AuraFlowJointTransformerBlock",
            "BriaFiboTransformerBlock",
            "BriaSingleTransformerBlock",
            "BriaTransformerBlock",
            "ChromaTransformerBlock",
            "Flux2TransformerBlock",
            "Flux3SingleTransformerBlock",
            "FluxSingleTransformerBlock",
            "FluxTransformerBlock",
            "JointTransformerBlock",
            "LongCatImageSingleTransformerBlock",
            "LongCatImageTransformerBlock",
            "OvisImageSingleTransformerBlock",
            "OvisImageTransformerBlock",
            "QwenImageTransformerBlock",
        ),
        _TEXT_IMAGE,
    ),
    "Kandinsky6FusedTransformerDecoderBlock": BlockIO(("vis", "aud"), (0, 1)),
    "LTX2VideoTransformerBlock": BlockIO((_IMAGE, "audio_hidden_states"), (0, 1)),
}
"""Blocks, by class name, that do not simply take the hidden state first and return it bare."""


def register_block(block: type[nn.Module], streams: Sequence[str], returns: Sequence[int] | None = None) -> None:
    """Say how the streams pass through a kind of block, for denoisers that fastdiff does not know.

    Args:
        block: the block's class.
        streams: names of the forward parameters that carry the streams, the image stream first.
        returns: place of each stream in the returned tuple; None if the block returns the one stream bare.

    Raises:
        UnsupportedBackboneError: if the block's forward lacks one of the streams.
        ConfigError: if ``returns`` does not say where each stream is returned.
    """
    places = range(1) if returns is None else returns
    if len(set(places)) != len(streams) or len(places) != len(streams) or min(places, default=0) < 0:
        raise ConfigError(
            f"register_block needs in returns one place from 0 for each of the {len(streams)} streams, or None for a "
            f"single stream that is returned bare; got {returns!r}."
        )
    names = list(inspect.signature(block.forward).parameters)
    if missing := [stream for stream in streams if stream not in names]:
        raise UnsupportedBackboneError(f"{block.__name__}.forward has no parameter {missing[0]!r}, only {names[1:]}.")
    _BLOCKS[block.__name__] = BlockIO(tuple(streams), None if returns is None else tuple(returns))


def transformer_backbone(denoiser: nn.Module) -> Backbone:
    """See a transformer as one sequence of units over all its block lists.

    Raises:
        UnsupportedBackboneError: if no block list is found, or a block cannot be driven.
    """
    segments = list(_segments(denoiser))
    fragile = type(denoiser).__name__ in WRITES_BLOCK_OUTPUTS
    long_skips = _long_skips(denoiser)
    units = []
    for segment, blocks in enumerate(segments):
        for index, (name, block) in enumerate(blocks):
            can_exit = not _starts_over(denoiser) or (segment == len(segments) - 1 and index > 0)
            traits = UnitTraits(name, can_exit=can_exit, reads=tuple(long_skips.get(name, ())))
            merges = name in long_skips
            units.append(Unit(block, _block_io(block), traits, segment, fragile, merges_skip=merges))
    if not units:
        found = [name for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
        raise UnsupportedBackboneError(
            f"{type(denoiser).__name__} has no block list that fastdiff knows: looked for {', '.join(BLOCK_LISTS)}, "
            f"found {', '.join(found) or 'no module list at all'}. A denoiser of your own needs its blocks in an "
            "nn.ModuleList of one of these names."
        )
    return Backbone(denoiser, tuple(units), skip_sites=_skip_sites(units))


def _skip_sites(units: Sequence[Unit]) -> tuple[SkipSite, ...]:
    """The blocks that read long skips, as HunyuanDiT and U-ViTs have them: what was made last is read first."""
    readers = [unit.module for unit in units if getattr(unit.module, "skip_linear", None) is not None]
    numbers = reversed(range(len(readers)))
    return tuple(SkipSite.of(module, SKIP_ARGUMENT, (skip,)) for module, skip in zip(readers, numbers, strict=True))


NamedBlocks = list[tuple[str, nn.Module]]


def _segments(denoiser: nn.Module) -> Iterator[NamedBlocks]:
    kind = type(denoiser).__name__
    if kind in INTERLEAVED_LISTS:
        lists = [_named(denoiser, name) for name in INTERLEAVED_LISTS[kind]]
        yield from ([block] for block in chain.from_iterable(zip(*lists, strict=True)))
        return
    if _u_shaped_part(denoiser) is not None:
        yield _u_shaped(denoiser)
        return
    for name in BLOCK_LISTS:
        blocks = _named(denoiser, name)
        if name == "single_transformer_blocks" and (decoder := _starts_over(denoiser)):
            yield blocks[:-decoder]
            blocks = blocks[-decoder:]
        if blocks:
            yield blocks


def _u_shaped_part(denoiser: nn.Module) -> str | None:
    """Prefix of the names of a U-ViT's blocks, or None for any other denoiser."""
    for prefix, module in (("", denoiser), ("transformer.", getattr(denoiser, "transformer", None))):
        if all(hasattr(module, name) for name in U_SHAPED_LISTS):
            return prefix
    return None


def _u_shaped(denoiser: nn.Module) -> NamedBlocks:
    """The blocks of a U-ViT in execution order."""
    before, middle, after = (f"{_u_shaped_part(denoiser)}{name}" for name in U_SHAPED_LISTS)
    names = [f"{before}.{index}" for index in range(len(denoiser.get_submodule(before)))]  # type: ignore[arg-type]
    names.append(middle)
    for index in range(len(denoiser.get_submodule(after))):  # type: ignore[arg-type]
        names += [f"{after}.{index}.{part}" for part in ("skip", "block")]
    return [(name, denoiser.get_submodule(name)) for name in names]


def _long_skips(denoiser: nn.Module) -> dict[str, list[str]]:
    """The units of a U-ViT that only merge a long skip, and whose outputs each of them reads."""
    if _u_shaped_part(denoiser) is None:
        return {}
    names = [name for name, _ in _u_shaped(denoiser)]
    readers = [name for name in names if name.endswith(".skip")]
    return {reader: [name] for reader, name in zip(readers, reversed(names[: len(readers)]), strict=True)}


def _starts_over(denoiser: nn.Module) -> int:
    """Number of last blocks that begin again from the embedded sample, as MotifVideo's decoder does.

    An exit up to and including the first of them would leave the output layers with the embedded sample alone.
    """
    return (
        getattr(denoiser, "num_decoder_layers", 0) if type(denoiser).__name__ == "MotifVideoTransformer3DModel" else 0
    )


def _named(denoiser: nn.Module, name: str) -> NamedBlocks:
    blocks = getattr(denoiser, name, None)
    if not isinstance(blocks, nn.ModuleList):
        return []
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def _block_io(block: nn.Module) -> BlockIO:
    name = type(getattr(block, "block", block)).__name__  # HiDream wraps blocks of two kinds in one class
    return (_BLOCKS.get(name) or _registered_io(block) or _bare_io(block)).of(block)


def _registered_io(block: nn.Module) -> BlockIO | None:
    """What diffusers itself declares for the block."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        declared = TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None
    image, text = declared.return_hidden_states_index, declared.return_encoder_hidden_states_index
    if text is None:
        return None
    text_name = getattr(declared, "encoder_hidden_states_argument_name", _TEXT)  # diffusers 0.41 and later name it
    names = (declared.hidden_states_argument_name, text_name)
    return BlockIO(names, (image, text))


def _bare_io(block: nn.Module) -> BlockIO:
    parameters = list(inspect.signature(type(block).forward).parameters)[1:]
    if not parameters:
        raise UnsupportedBackboneError(f"{type(block).__name__}.forward takes no hidden state.")
    return BlockIO((parameters[0],))
