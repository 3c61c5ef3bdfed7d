"""generate, plan and info on a tiny pipeline, and what every command does with a mistake."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline
from PIL import Image

import fastdiff
from fastdiff.backbones import view
from fastdiff.errors import FastDiffError
from fastdiff.models import UViTPipeline
from fastdiff.output import OutputError, staged_folder
from fastdiff.plan import Action, ComputePlan
from tiny.uvit import MODEL as UVIT

from .conftest import Command

SPEC = "feature-inheritance:interval=2"


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_makes_the_images_that_plain_diffusers_makes(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("--class-labels", "7", "A", "--samples", 3, "--seed", 5, "--num-inference-steps", 3)
    status, _, _ = command("generate", tiny_dit, "--preset", "off", *arguments, "--batch", 2, "--out", tmp_path / "o")
    assert status == 0
    pipe = DiTPipeline.from_pretrained(tiny_dit)
    expected = [
        pipe([label], generator=torch.Generator().manual_seed(seed), num_inference_steps=3).images[0]
        for seed, label in ((5, 7), (6, 10), (7, 7))
    ]
    # A batch adds up in another order than its items; that moves a pixel by one at most.
    difference = pictures(tmp_path / "o").astype(int) - np.stack([np.asarray(image) for image in expected]).astype(int)
    assert np.abs(difference).max() <= 1


def test_generate_with_kernels_and_graphs(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    """On a CPU neither runs, the images are the same, and the record says why."""
    arguments = ("--class-labels", 1, 2, "--num-inference-steps", 4, "--preset", "off", "--device", "cpu")
    for name, options in (("plain", ()), ("fused", ("--kernels", "auto", "--cuda-graphs"))):
        status, _, _ = command("generate", tiny_dit, *arguments, *options, "--out", tmp_path / name)
        assert status == 0
    assert np.array_equal(pictures(tmp_path / "plain"), pictures(tmp_path / "fused"))
    record = json.loads((tmp_path / "fused" / "record.json").read_text())
    assert (record["kernels"], record["cuda_graphs"]) == ("auto", True)
    graphs = record["calls"][0]["denoisers"]["transformer"]["graphs"]
    assert graphs["recorded"] == graphs["replayed"] == 0
    assert list(graphs["computed"].values()) == [4]
    assert "weights are on cpu" in next(iter(graphs["computed"]))


def test_generate_records_what_ran(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    arguments = ("--class-labels", 1, 2, 3, "--batch", 2, "--num-inference-steps", 10, "--guidance-scale", 1)
    status, printed, _ = command("generate", tiny_dit, "--method", SPEC, *arguments, "--out", out)
    assert status == 0
    assert "FeatureInheritance" in printed
    record = json.loads((out / "record.json").read_text())
    assert [call["seeds"] for call in record["calls"]] == [[0, 1], [2]]
    assert record["files"] == [f"{index:05d}.png" for index in range(3)]
    assert {path.name for path in out.iterdir()} == {*record["files"], "record.json", "plan-transformer.json"}
    assert record["methods"] == [fastdiff.FeatureInheritance(interval=2).to_dict()]
    assert record["environment"]["torch"] == version("torch")
    ran = record["calls"][0]["denoisers"]["transformer"]
    assert ran["cells"]["COMPUTE"] + ran["cells"]["REUSE"] == 10 * 4
    plan = ComputePlan.load(out / "plan-transformer.json")
    assert plan.counts() == ran["cells"]
    assert ran["computed_share"] == pytest.approx(plan.share)


@pytest.mark.parametrize("spec", [SPEC, "feature-inheritance:interval=3,order=2", "layer-skipping"])
def test_a_recorded_plan_makes_the_same_images_again(
    spec: str, tiny_dit: Path, tmp_path: Path, command: Command
) -> None:
    arguments = ("--class-labels", 1, 2, "--num-inference-steps", 12)
    first = command("generate", tiny_dit, "--method", spec, *arguments, "--out", tmp_path / "first")
    saved = f"plan:{tmp_path / 'first' / 'plan-transformer.json'}"
    second = command("generate", tiny_dit, "--method", saved, *arguments, "--out", tmp_path / "second")
    assert first[0] == second[0] == 0
    np.testing.assert_array_equal(pictures(tmp_path / "first"), pictures(tmp_path / "second"))


def test_methods_combine(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("--class-labels", 1, "--num-inference-steps", 10, "--out", tmp_path)
    exits = "exit-schedule:bin-edges=[0,500],depths=[4,2]"
    status, _, _ = command("generate", tiny_dit, "--method", SPEC, "--method", exits, *arguments)
    assert status == 0
    counts = ComputePlan.load(tmp_path / "plan-transformer.json").counts()
    assert counts["EXIT"] > 0
    assert counts["REUSE"] > 0


def test_arguments_reach_the_pipeline(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("--class-labels", 1, "--preset", "off", "--out", tmp_path)
    status, _, _ = command(
        "generate", tiny_dit, *arguments, "--arg", "num_inference_steps=2", "--arg", "guidance-scale=1"
    )
    assert status == 0
    assert json.loads((tmp_path / "record.json").read_text())["arguments"]["arg"] == [
        "num_inference_steps=2",
        "guidance-scale=1",
    ]


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_save_then_show(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "plan.json"
    status, _, _ = command("plan", "save", tiny_dit, "--method", SPEC, "--steps", 10, "--out", file)
    assert status == 0
    plan = ComputePlan.load(file)
    assert (plan.evaluations, len(plan.units)) == (10, 4)
    assert (plan.table == Action.REUSE).any()
    status, shown, _ = command("plan", "show", file, "--width", 80)
    assert (status, shown) == (0, plan.render(80) + "\n")
    status, again, _ = command("plan", "show", tiny_dit, "--method", SPEC, "--steps", 10, "--width", 80)
    assert (status, again) == (0, shown)


def test_plan_show_draws(tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    status, _, _ = command("plan", "show", tiny_dit, "--steps", 12, "--png", tmp_path / "plan.png")
    assert status == 0
    assert Image.open(tmp_path / "plan.png").width > 400


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_lists_models_methods_and_presets(command: Command) -> None:
    from fastdiff import zoo
    from fastdiff.pipelines.acceleration import PRESETS
    from fastdiff.spec import field_defaults, method_classes

    status, shown, _ = command("info")
    assert status == 0
    for word in (*zoo.names(), *method_classes(), *PRESETS):
        assert word in shown
    for cls in method_classes().values():
        for field in field_defaults(cls):
            assert f"{field.replace('_', '-')}=" in shown


def test_info_prices_units_and_methods(tiny_dit: Path, command: Command) -> None:
    status, shown, _ = command("info", tiny_dit, "--steps", 20)
    assert status == 0
    assert "DiTTransformer2DModel, 4 units" in shown
    assert "transformer_blocks.0 .. 3" in shown
    full = fastdiff.enable(DiTPipeline.from_pretrained(tiny_dit), fastdiff.LayerSkipping())
    full([0], num_inference_steps=2, output_type="np")
    costs = full.fastdiff.last_run.denoisers["transformer"].measure()
    share = full.fastdiff.plan(20).cost(costs).macs_share
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["layer-skipping"])
    assert f" {share:.1%}," in line


PART = re.compile(
    r"^    (?P<name>[a-z]\S*(?: \.\. \d+|(?: [a-z]+)*))  +"
    r"(?:(?P<units>\d+) units? *)?"
    r"(?:\S+(?: [kMG])? MACs \((?P<share>[\d.]+)%\), )?",
    re.MULTILINE,
)
"""A line of `fastdiff info`: a part of a denoiser, its units, and its share of the work where that is known."""


def listed(shown: str) -> dict[str, tuple[int, float]]:
    """Units and share of the MACs in per cent of each part of a denoiser, by name."""
    parts = re.search(r" units\n(.*?)^  With ", shown, re.MULTILINE | re.DOTALL)
    assert parts is not None
    found = PART.findall(parts[1])
    return {name: (int(units or 0), float(share or 0)) for name, units, share in found}


def test_info_lists_the_stages_of_a_unet(tiny_sd: Path, command: Command) -> None:
    status, shown, _ = command("info", tiny_sd)
    assert status == 0
    stages = listed(shown)
    unet = StableDiffusionPipeline.from_pretrained(tiny_sd).unet
    units = Counter(unit.stage for unit in view(unet).units)
    assert {name: number for name, (number, _) in stages.items() if number} == units
    assert "up_blocks.1" in stages
    assert sum(share for _, share in stages.values()) == pytest.approx(100, abs=0.05 * len(stages) + 1e-9)
    status, shown, _ = command("info", tiny_sd, "--units")
    assert status == 0
    every = listed(shown)
    assert list(every) == [*view(unet).names, "outside the units"]
    within = sum(share for name, (_, share) in every.items() if name.startswith("up_blocks.1."))
    assert stages["up_blocks.1"][1] == pytest.approx(within, abs=0.05 * (units["up_blocks.1"] + 1))


def test_info_puts_equal_stages_in_one_line(tmp_path: Path, command: Command) -> None:
    UViTPipeline(UVIT.build(), DDIMScheduler()).save_pretrained(tmp_path / "uvit")
    status, shown, _ = command("info", tmp_path / "uvit")
    assert status == 0
    assert {name: number for name, (number, _) in listed(shown).items()} == {
        "transformer_in_blocks.0 .. 2": 3,
        "transformer_mid_block": 1,
        "transformer_out_blocks.0 .. 2": 6,
        "outside the units": 0,
    }


def test_info_without_costs_calls_nothing(tiny_dit: Path, command: Command) -> None:
    status, shown, _ = command("info", tiny_dit, "--no-cost")
    assert status == 0
    assert listed(shown) == {"transformer_blocks.0 .. 3": (4, 0)}
    assert "MACs" not in shown.partition("transformer:")[2]


def test_info_says_why_a_model_is_not_supported(tmp_path: Path, command: Command) -> None:
    from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler

    no_denoiser = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    DDPMPipeline(no_denoiser, DDPMScheduler()).save_pretrained(tmp_path / "odd")
    status, shown, _ = command("info", tmp_path / "odd")
    assert status == 0
    assert "AutoencoderKL, not supported: " in shown


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no pipeline": ["generate", "{tmp}", "--class-labels", "1"],
    "no such method": ["generate", "{model}", "--class-labels", "1", "--method", "nonsense"],
    "no such field": ["generate", "{model}", "--class-labels", "1", "--method", "layer-skipping:x=1"],
    "no such preset": ["generate", "{model}", "--class-labels", "1", "--preset", "ludicrous"],
    "preset and method": ["generate", "{model}", "--class-labels", "1", "--preset", "fast", "--method", SPEC],
    "no labels": ["generate", "{model}"],
    "no such label": ["generate", "{model}", "--class-labels", "fox"],
    "prompt for a class model": ["generate", "{model}", "--prompt", "a fox"],
    "no such argument": ["generate", "{model}", "--class-labels", "1", "--arg", "height=3"],
    "argument without value": ["generate", "{model}", "--class-labels", "1", "--arg", "height"],
    "argument of the wrong kind": ["generate", "{model}", "--class-labels", "1", "--arg", "num_inference_steps=x"],
    "no samples": ["generate", "{model}", "--class-labels", "1", "--samples", "0"],
    "no such device": ["generate", "{model}", "--class-labels", "1", "--device", "abacus"],
    "no such zoo model": ["info", "zoo:nothing"],
    "no such plan": ["plan", "show", "{model}", "--method", "plan:{tmp}/none.json"],
    "no plan": ["plan", "show", "{model}/model_index.json"],
    "plan with a method": ["plan", "show", "{model}/model_index.json", "--method", SPEC],
    "no steps": ["plan", "show", "{model}", "--steps", "0"],
    "picture nowhere": ["plan", "show", "{model}", "--png", "{tmp}/none/plan.png"],
    "no such format": ["plan", "show", "{model}", "--png", "{tmp}/plan.nonsense"],
    "schedule too deep": ["plan", "show", "{model}", "--method", "exit-schedule:bin-edges=[0],depths=[99]"],
    "demo of nothing": ["demo", "--model", "{tmp}"],
    "demo without samples": ["demo", "--num-samples", "0"],
    "demo into a file": ["demo", "--out", "{model}/model_index.json"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, tiny_dit: Path, tmp_path: Path, command: Command) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.format(model=tiny_dit, tmp=empty) for word in MISTAKES[name]]
    out = ["--out", str(tmp_path / "out")] if words[0] in ("generate", "demo") and "--out" not in words else []
    status, _, complaint = command(*words, *out)
    assert status == 2
    lines = [line for line in complaint.splitlines() if line.startswith("fastdiff: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in complaint
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_debug_shows_the_traceback(tmp_path: Path, command: Command) -> None:
    with pytest.raises(FastDiffError):
        command("generate", tmp_path / "nothing", "--debug", "--out", tmp_path / "out")


def test_debug_is_known_before_and_after_an_action(tmp_path: Path, command: Command) -> None:
    for words in (["plan", "--debug", "show"], ["plan", "show", "--debug"]):
        with pytest.raises(FastDiffError):
            command(*words, tmp_path / "nothing")


# -- the folder of results ---------------------------------------------------------------------------------------------


def test_staged_files_replace_and_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    (out / "sub/new.txt").write_text("old")
    with staged_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/new.txt").write_text("new")
        assert (out / "sub/new.txt").read_text() == "old"
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "sub/new.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_command_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def work() -> None:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        work()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OutputError, match="--out"), staged_folder(place):
            pass


def test_interrupt_is_status_130(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(out: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.output.staged_folder", interrupted)
    status, _, complaint = command("generate", "zoo:glyphs-dit", "--out", tmp_path / "out")
    assert status == 130
    assert complaint.splitlines() == ["fastdiff: interrupted, nothing was written"]


# -- other kinds of pipelines ------------------------------------------------------------------------------------------


class PromptedDiT(DiTPipeline):
    """Takes what text pipelines take: prompts, and as many negative prompts."""

    def __call__(
        self,
        prompt: list[str],
        negative_prompt: list[str] | None = None,
        num_inference_steps: int = 2,
        generator: list[torch.Generator] | None = None,
    ) -> object:
        assert isinstance(negative_prompt, list)
        assert len(negative_prompt) == len(prompt) == len(generator or [])
        return super().__call__([len(text) for text in prompt], 1.0, generator, num_inference_steps)


def test_prompts_take_turns_with_their_seeds(tiny_dit: Path, tmp_path: Path) -> None:
    from fastdiff.cli import generate
    from fastdiff.cli.main import build_parser

    pipe = fastdiff.enable(PromptedDiT.from_pretrained(tiny_dit), preset="off")
    words = ["generate", "model", "--prompt", "a", "bcd", "--negative-prompt", "no", "--samples", "3"]
    options = build_parser().parse_args(words)
    conditions = generate._conditions(pipe, options)
    assert [condition["prompt"] for condition in conditions] == ["a", "bcd", "a"]
    batch = generate._sample(pipe, conditions, range(5, 8), {"num_inference_steps": 2})
    assert generate._write_output(batch.output, tmp_path, 0) == ["00000.png", "00001.png", "00002.png"]
    plain = DiTPipeline.from_pretrained(tiny_dit)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5, 8)]
    expected = plain([1, 3, 1], 1.0, generators, 2).images
    np.testing.assert_array_equal(pictures(tmp_path), np.stack([np.asarray(image) for image in expected]))


def test_videos_become_gifs_and_other_outputs_arrays(tmp_path: Path) -> None:
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
    from diffusers.utils import BaseOutput

    from fastdiff.cli.generate import _write_output

    videos = np.zeros((2, 5, 8, 8, 3))
    videos[..., 0] = np.arange(5)[:, None, None] / 4
    assert _write_output(WanPipelineOutput(frames=videos), tmp_path, 3) == ["00003.gif", "00004.gif"]
    with Image.open(tmp_path / "00003.gif") as video:
        assert video.n_frames == 5
        video.seek(4)
        assert video.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert _write_output(BaseOutput(audios=np.ones((1, 2, 9))), tmp_path, 0) == ["00000-audios.npy"]
    assert np.load(tmp_path / "00000-audios.npy").shape == (1, 2, 9)
