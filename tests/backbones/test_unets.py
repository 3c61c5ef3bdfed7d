"""Every UNet of the catalogue: its columns, its long skips, and that its decoder reads nothing else of the sample."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from torch import nn

from fastdiff import Action, EncoderPropagation, FeatureInheritance, UnsupportedBackboneError
from fastdiff.backbones import is_control, view
from fastdiff.engine.branches import Branch, BranchFinder
from tiny.base import build
from tiny.per_sample import one_sample_at_a_time
from tiny.sampling import accelerate, counting, evaluate, traces
from tiny.sd_pipelines import CONTROL
from tiny.unets import TINY_UNETS

EVERY_UNET = pytest.mark.parametrize("name", TINY_UNETS)
ULPS = 32
"""Bound on what the batch's shape changes in one prediction, in float32 ulps of its largest value; 15 were measured."""
NOT_READ_BY_THE_DECODER = {
    "StableCascadeUNet (decoder)": ["effnet"],  # joined to the sample, as the next
    "UNet2DConditionModel (Kandinsky 2.2 with a hint)": ["added_cond_kwargs.hint"],
    "UNet2DConditionModel (self-attention)": ["encoder_hidden_states"],  # by none of its blocks
}
OF_COLUMNS = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
UNCONDITIONAL = [name for name in TINY_UNETS if name.startswith("UNet1DModel")]
UNCONDITIONAL += [f"UNet2DModel ({kind})" for kind in ("DDPM", "super-resolution", "FIR skip", "no mid block")]
SKIPS_OF_WHOLE_STAGES = (
    "DreamLiteUNetModel",
    "Kandinsky3UNet",
    "UNet1DModel (audio)",
    "UNet2DConditionModel (latent upscaler)",
    "UNet2DModel (FIR skip)",
)
"""UNets in which a column makes several skips, or the denoiser itself joins them."""
WITHOUT_TIME_IN_THE_DECODER = ("UNet1DModel (audio)",)
RUNS_A_LEVEL_TWICE = ("StableCascadeUNet (decoder)",)
WITHOUT_BRANCHES = (
    "DreamLiteUNetModel",
    "Kandinsky3UNet",
    "StableCascadeUNet (decoder)",
    "StableCascadeUNet (prior)",
    "UNet1DModel (audio)",
    "UNet2DConditionModel (latent upscaler)",
)
"""UNets whose residual additions are all inside of columns."""
AS_LONG_AS_THE_SAMPLE = ("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet")
"""Video UNets, in which a batch of one sample at a time takes seconds."""


def evaluations_of(name: str, number: int, batch: int = 2) -> tuple[list[dict[str, Any]], list[float]]:
    """Returns inputs for some evaluations that share all but sample and timestep, and the timesteps."""
    tiny = TINY_UNETS[name]
    inputs = tiny.inputs(batch, 0)
    start = inputs[tiny.timestep]
    times = [float(start.max()) * (1 - row / 8) for row in range(number)]  # exact in float32
    samples = [tiny.inputs(batch, row)["sample"] for row in range(number)]
    return [
        inputs | {tiny.timestep: torch.full_like(start, time), "sample": sample}
        for time, sample in zip(times, samples, strict=True)
    ], times


def named_tensors(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, item in items for found in named_tensors(item, f"{path}.{key}".strip("."))]


def replaced(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, old, new) for item in value)
    return new if value is old else value


# -- columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["layer", "branch"])
@EVERY_UNET
def test_columns_run_once_each_in_their_order(name: str, level: str) -> None:
    model = TINY_UNETS[name].build()
    backbone = view(model, level)
    ran: list[str] = []
    for unit in backbone.units:
        assert unit.module is model.get_submodule(unit.name)
        unit.module.register_forward_pre_hook(lambda *_, unit=unit: ran.append(unit.name))
    evaluate(model, evaluations_of(name, 1)[0])
    if name in RUNS_A_LEVEL_TWICE:
        assert {unit: ran.count(unit) for unit in backbone.names if ran.count(unit) != 1} == dict.fromkeys(
            [f"up_blocks.1.{place}" for place in range(len(model.up_blocks[1]))], 2
        )
        return
    assert tuple(ran) == backbone.names


@EVERY_UNET
def test_every_weight_of_the_stages_is_in_one_column(name: str) -> None:
    model = TINY_UNETS[name].build()
    owners = Counter(
        id(weight) for unit in view(model).units for weight in {id(w): w for w in unit.module.parameters()}.values()
    )
    of_stages = {
        weight_name: id(weight)
        for weight_name, weight in model.named_parameters()
        if weight_name.split(".")[0]
        in ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
    }
    assert of_stages
    assert {weight_name: owners[key] for weight_name, key in of_stages.items() if owners[key] != 1} == {}


@pytest.mark.parametrize("name", [name for name in TINY_UNETS if name not in SKIPS_OF_WHOLE_STAGES])
def test_skips_are_the_outputs_of_the_columns_that_made_them(name: str) -> None:
    """Followed by identity: a stage is handed the very tensors that the columns returned."""
    model = TINY_UNETS[name].build()
    backbone = view(model)
    made: dict[str, Any] = {}
    handed: list[Any] = []
    for unit in backbone.units:
        unit.module.register_forward_hook(lambda _, __, output, unit=unit: made.update({unit.name: output}))
    for site in backbone.skip_sites:

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: Any = site) -> None:
            given = kwargs[site.argument] if site.argument in kwargs else args[site.position]
            handed.append((site.skips, given if isinstance(given, tuple) else (given,)))

        site.module.register_forward_pre_hook(note, with_kwargs=True)
    evaluate(model, evaluations_of(name, 1)[0])

    assert {skips for skips, _ in handed} == {site.skips for site in backbone.skip_sites}
    assert all(len(skips) == len(given) for skips, given in handed)
    read = [skip for site in backbone.skip_sites for skip in reversed(site.skips)]
    assert read == sorted(set(read), reverse=True), "each once, the deepest first"
    for skips, given in handed:
        for skip, tensor in zip(skips, given, strict=True):
            output = made[backbone.encoded[skip]]
            assert tensor is output or any(part is tensor for part in output), f"skip {skip}"


def test_units_say_their_stage_and_layer() -> None:
    backbone = view(TINY_UNETS["UNet2DConditionModel (SD)"].build())
    layers = {unit.name: (unit.stage, unit.layer) for unit in backbone.units}
    assert layers["conv_in"] == ("conv_in", "conv_in")
    assert layers["down_blocks.1.attentions.0"] == ("down_blocks.1", "down_blocks.1.0")
    assert layers["down_blocks.1.downsamplers.0"] == ("down_blocks.1", "down_blocks.1.samplers")
    assert layers["mid_block.resnets.1"] == ("mid_block", "mid_block.1")
    assert layers["up_blocks.3.resnets.2"] == ("up_blocks.3", "up_blocks.3.2")


def test_stages_in_an_unknown_layout_are_refused() -> None:
    model = TINY_UNETS["UNet2DModel (DDPM)"].build()
    del model.conv_in
    with pytest.raises(UnsupportedBackboneError, match=r"UNet2DModel has stages, but not in a layout.*conv_in"):
        view(model)


# -- executed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["layer", "branch"])
@EVERY_UNET
def test_full_plan_is_the_plain_model_and_leaves_no_trace(name: str, level: str) -> None:
    model = TINY_UNETS[name].build()
    calls, times = evaluations_of(name, 2)
    plain = evaluate(model, calls)
    method = FeatureInheritance(interval=1, level=level, keep_up=1) if level == "branch" else EncoderPropagation(keys=1)
    outputs, record = accelerate(model, calls, method, times)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, outputs, strict=True))
    assert record.denoisers["denoiser"].units == view(model, level).names
    assert record.skipped == 0
    assert traces(model) == []
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, evaluate(model, calls), strict=True))


@EVERY_UNET
def test_decoder_reads_nothing_of_the_sample_but_what_is_kept(name: str) -> None:
    """With the key's timestep the key's prediction, whatever the sample; with another timestep another one."""
    model = TINY_UNETS[name].build()
    (key, later), times = evaluations_of(name, 2)
    garbage = key | {"sample": torch.full_like(key["sample"], torch.nan)}
    moved = later | {"sample": garbage["sample"]}
    names = view(model).names
    with counting(model, names, key) as counted:
        method = EncoderPropagation(keys=3, parallel=False)
        outputs, record = accelerate(model, [key, garbage, moved], method, [times[0], times[0], times[1]])
    assert torch.equal(outputs[1][0], outputs[0][0])
    assert torch.isfinite(outputs[2][0]).all()
    assert torch.allclose(outputs[2][0], outputs[0][0], rtol=0, atol=1e-4) == (name in WITHOUT_TIME_IN_THE_DECODER)
    decoder = names[names.index(view(model).encoded[-1]) + 1 :]
    assert (counted.table(names)[1:] > 0).tolist() == [[unit in decoder for unit in names]] * 2
    assert not record.denoisers["denoiser"].fallbacks


@pytest.mark.parametrize("name", [name for name in TINY_UNETS if name not in UNCONDITIONAL])
def test_decoder_reads_the_conditioning_of_its_own_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the key was conditioned on is in the features; what a later evaluation is, reaches its decoder."""
    monkeypatch.setattr(BranchFinder, "find", lambda self, context, arguments: Branch(None, 0, 0))
    tiny = TINY_UNETS[name]
    model = tiny.build()
    (key,), times = evaluations_of(name, 1)
    other = dict(named_tensors(tiny.inputs(2, 1)))
    conditioning = [
        (path, tensor)
        for path, tensor in named_tensors(key)
        if path not in ("sample", tiny.timestep) and not torch.equal(tensor, other[path])
    ]
    changed = [replaced(key, tensor, other[path]) for path, tensor in conditioning]
    method = EncoderPropagation(keys=99, parallel=False)
    outputs, _ = accelerate(model, [key, *changed], method, times * (1 + len(changed)))
    unread = [
        path
        for (path, _), output in zip(conditioning, outputs[1:], strict=True)
        if torch.allclose(output[0], outputs[0][0], rtol=0, atol=1e-6)
    ]
    assert conditioning
    assert unread == NOT_READ_BY_THE_DECODER.get(name, [])


@EVERY_UNET
def test_stacked_evaluations_are_the_evaluations_one_by_one(name: str) -> None:
    """Bit by bit where kernels see one sample at a time, up to a few ulps where they see the batch."""
    model = TINY_UNETS[name].build()
    calls, times = evaluations_of(name, 4)
    sequential, parallel = EncoderPropagation(keys=4, parallel=False), EncoderPropagation(keys=4)
    expected, _ = accelerate(model, calls, sequential, times)
    outputs, record = accelerate(model, calls, parallel, times)
    assert record.denoisers["denoiser"].batches == [3]
    for output, one in zip(outputs, expected, strict=True):
        assert torch.allclose(output[0], one[0], rtol=0, atol=ULPS * 2**-23 * float(one[0].abs().max()))
    if name not in AS_LONG_AS_THE_SAMPLE:
        with one_sample_at_a_time():
            expected, _ = accelerate(model, calls, sequential, times)
            outputs, _ = accelerate(model, calls, parallel, times)
        assert all(torch.equal(output[0], one[0]) for output, one in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "level"),
    [
        (name, level)
        for name in TINY_UNETS
        for level in ("stage", "layer", "branch")
        if level != "branch" or name not in WITHOUT_BRANCHES
    ],
)
def test_inherited_features_of_the_same_sample_change_nothing(name: str, level: str) -> None:
    """Only a right boundary makes the key's prediction again; what it leaves out does not run."""
    model = TINY_UNETS[name].build()
    (key,), times = evaluations_of(name, 1)
    method = FeatureInheritance(interval=2, level=level, keep_up=1, last_key=False)
    units = view(model, method.view_level).names
    outputs, record = accelerate(model, [key, key], method, times * 2)
    plan = record.denoisers["denoiser"].plans[0]
    assert 0 < (plan.table[1] != Action.COMPUTE).sum() < len(units)
    tolerance = 0.0 if level != "branch" else 1e-5 * float(outputs[0][0].abs().max())
    assert torch.allclose(outputs[1][0], outputs[0][0], rtol=0, atol=tolerance)


# -- ControlNets -------------------------------------------------------------------------------------------------------


def control_call(nets: int) -> tuple[nn.Module, dict[str, Any]]:
    parts = [build(ControlNetModel, CONTROL, seed=seed) for seed in range(nets)]
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=draw),
        "controlnet_cond": torch.randn(1, 3, 64, 64, generator=draw),
        "conditioning_scale": 1.0,
    }
    if nets == 1:
        return parts[0], inputs
    inputs |= {"controlnet_cond": [inputs["controlnet_cond"]] * nets, "conditioning_scale": [1.0] * nets}
    return MultiControlNetModel(parts), inputs


@pytest.mark.parametrize("nets", [1, 2])
def test_controlnets_are_columns_whose_last_convolutions_are_their_output(nets: int) -> None:
    model, inputs = control_call(nets)
    assert is_control(model)
    backbone = view(model)
    assert backbone.is_control
    ran: list[str] = []
    for unit in backbone.units:
        unit.module.register_forward_pre_hook(lambda *_, unit=unit: ran.append(unit.name))
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)
    assert sorted(ran) == sorted(backbone.names)
    outputs = [trait.name for trait in backbone.traits if trait.is_output]
    assert len(outputs) == nets * (len(plain[0]) + 1)

    other = inputs | {"sample": torch.full_like(inputs["sample"], torch.nan)}
    made, record = accelerate(model, [inputs, other], EncoderPropagation(keys=2), (500.0, 400.0))
    for output in made:
        assert all(torch.equal(a, b) for a, b in zip(output[0], plain[0], strict=True))
        assert torch.equal(output[1], plain[1])
    assert (record.denoisers["denoiser"].plans[0].table[1] != Action.COMPUTE).all()
