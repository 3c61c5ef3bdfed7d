"""Loading and saving: any pipeline folder loads accelerated, and plain diffusers loads what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from engine.cases import METHODS, NEUTRAL, STEPS, accelerated, build, methods_for, sample
from torch import nn

import fastdiff
from fastdiff import (
    ConfigError,
    ExitSchedule,
    FastDiffError,
    FastDiffNoEffectWarning,
    FastDiffPipeline,
    FeatureInheritance,
    ProfileMismatchError,
    UnsupportedBackboneError,
    UnsupportedPipelineError,
)
from fastdiff.methods import as_methods
from fastdiff.pipelines.acceleration import CONFIG_NAME, PRESETS

NAME = "DiTPipeline"


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Weights read from a file may lie in memory in another way, which changes the order of sums."""
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def load(folder: Path, **arguments: Any) -> Any:
    return quiet(FastDiffPipeline.from_pretrained(folder, **arguments))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build(NAME).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    accelerated(NAME, "inherit-1").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved_folder: Path, tmp_path: Path) -> Path:
    """A saved accelerated pipeline that a test may damage."""
    return Path(shutil.copytree(saved_folder, tmp_path / "copy"))


def damage(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))


# -- loading -----------------------------------------------------------------------------------------------------------


def test_folder_loads_accelerated_without_further_arguments(plain_folder: Path) -> None:
    pipe = load(plain_folder)
    assert isinstance(pipe, diffusers.DiTPipeline)
    assert isinstance(pipe, FastDiffPipeline)
    assert pipe.fastdiff.methods == PRESETS["balanced"]
    plain = sample(build(NAME), NAME, steps=20)
    assert not close(sample(pipe, NAME, steps=20), plain)
    assert pipe.fastdiff.last_run.denoisers["transformer"].computed_share < 0.5
    fastdiff.disable(pipe)
    assert type(pipe) is diffusers.DiTPipeline
    assert close(sample(pipe, NAME, steps=20), plain)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_by_name(plain_folder: Path, preset: str) -> None:
    assert load(plain_folder, preset=preset).fastdiff.methods == PRESETS[preset]


def test_methods_and_arguments_of_diffusers(plain_folder: Path) -> None:
    methods = [ExitSchedule("ase-demo"), FeatureInheritance(order=1)]
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = load(plain_folder, methods=methods, scheduler=scheduler, torch_dtype=torch.bfloat16)
    assert pipe.fastdiff.methods == tuple(methods)
    assert pipe.scheduler is scheduler
    assert pipe.transformer.dtype == torch.bfloat16
    sample(pipe, NAME)
    assert pipe.fastdiff.last_run.skipped > 0


def test_text_path_and_class_of_an_accelerated_pipeline(plain_folder: Path) -> None:
    pipe = load(plain_folder, preset="fast")
    assert FastDiffPipeline.from_pretrained(str(plain_folder), preset="fast").fastdiff.methods == pipe.fastdiff.methods
    assert type(pipe).from_pretrained(str(plain_folder), preset="fast").fastdiff.methods == pipe.fastdiff.methods


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "turbo"}, "no preset 'turbo'"),
        ({"preset": "fast", "methods": []}, "either methods or a preset"),
        ({"methods": "fast"}, "Expected methods"),
    ],
    ids=str,
)
def test_bad_choice_is_refused_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastDiffPipeline.from_pretrained("there/is-no-such-folder", **arguments)


def test_bad_value_of_on_unsupported_is_refused(plain_folder: Path) -> None:
    with pytest.raises(ConfigError, match="on_unsupported"):
        load(plain_folder, on_unsupported="ignore")


@pytest.mark.parametrize("kind", ["missing", "empty", "no json", "model", "unknown class", "file", "name on the Hub"])
def test_folder_that_is_no_pipeline(kind: str, plain_folder: Path, tmp_path: Path) -> None:
    folder: Path | str = tmp_path / "folder"
    if kind == "name on the Hub":  # the tests are offline
        folder = "someone/some-pipeline"
    elif kind == "model":
        folder = plain_folder / "transformer"
    elif kind == "file":
        folder = plain_folder / "model_index.json"
    elif kind != "missing":
        Path(folder).mkdir()
        index = {"no json": "{", "unknown class": '{"_class_name": "NoSuchPipeline"}'}
        if kind in index:
            (Path(folder) / "model_index.json").write_text(index[kind])
    with pytest.raises(UnsupportedPipelineError, match="cannot be loaded as a diffusers pipeline") as caught:
        FastDiffPipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_denoiser_that_cannot_be_accelerated(plain_folder: Path) -> None:
    odd = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(UnsupportedBackboneError, match="AutoencoderKL has no block list"):
        load(plain_folder, transformer=odd)
    with pytest.warns(FastDiffNoEffectWarning, match="AutoencoderKL.*runs unaccelerated"):
        pipe = load(plain_folder, transformer=odd, on_unsupported="warn")
    assert pipe.transformer is odd
    assert load(plain_folder, transformer=odd, on_unsupported="off").transformer is odd


# -- saving and loading again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_saved_acceleration_comes_back(method: str, tmp_path: Path) -> None:
    pipe = accelerated(NAME, method)
    expected = sample(pipe, NAME)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert [item.to_dict() for item in again.fastdiff.methods] == [item.to_dict() for item in pipe.fastdiff.methods]
    assert close(sample(again, NAME), expected)
    with fastdiff.disabled(pipe):
        plain = sample(pipe, NAME)
    assert close(sample(quiet(DiffusionPipeline.from_pretrained(tmp_path)), NAME), plain)
    assert close(expected, plain) == (method in NEUTRAL)


def test_saved_folder_is_a_plain_pipeline_to_diffusers(saved_folder: Path, plain_folder: Path) -> None:
    pipe = diffusers.DiTPipeline.from_pretrained(saved_folder)
    assert type(pipe) is diffusers.DiTPipeline
    assert type(DiffusionPipeline.from_pretrained(saved_folder)) is diffusers.DiTPipeline
    plain = {path.relative_to(plain_folder) for path in plain_folder.rglob("*")}
    assert {path.relative_to(saved_folder) for path in saved_folder.rglob("*")} == plain | {Path(CONFIG_NAME)}
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (plain_folder, saved_folder)]
    assert indices[0] == indices[1]
    for path in plain:
        if path.suffix == ".safetensors":
            assert (plain_folder / path).read_bytes() == (saved_folder / path).read_bytes()


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Img2ImgPipeline", "WanPipeline (two experts)"])
def test_pipelines_with_text_or_two_denoisers_come_back(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    fastdiff.enable(pipe, FeatureInheritance(interval=3))
    expected = sample(pipe, name, steps=8)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path, **{key: None for key, component in pipe.components.items() if component is None})
    assert again.fastdiff.to_dict() == pipe.fastdiff.to_dict()
    assert close(sample(again, name, steps=8), expected)


def test_saving_loaded_pipelines_again_changes_nothing(saved_folder: Path, tmp_path: Path) -> None:
    load(saved_folder).save_pretrained(tmp_path)
    assert config(tmp_path) == config(saved_folder)
    assert set(config(tmp_path)) == {"schema_version", "denoisers", "methods"}


def test_given_methods_replace_the_saved_ones(saved_folder: Path) -> None:
    assert load(saved_folder, preset="off").fastdiff.methods == ()
    assert load(saved_folder, methods=ExitSchedule("full")).fastdiff.methods == (ExitSchedule("full"),)
    assert load(saved_folder, preset="fast").fastdiff.methods == PRESETS["fast"]


def test_off_is_saved_too(tmp_path: Path) -> None:
    pipe = build(NAME)
    fastdiff.enable(pipe, preset="off").save_pretrained(tmp_path)
    assert load(tmp_path).fastdiff.methods == ()


def test_saved_acceleration_of_another_model_is_refused(copied: Path) -> None:
    other = build(NAME)
    other.transformer.transformer_blocks = other.transformer.transformer_blocks[:2]
    other.transformer.register_to_config(num_layers=2)
    other.transformer.save_pretrained(copied / "transformer")
    with pytest.raises(ProfileMismatchError, match=r"transformer.*4.*2.*methods=|transformer.*'units': 4.*'units': 2"):
        FastDiffPipeline.from_pretrained(copied)
    assert len(load(copied, preset="fast").transformer.transformer_blocks) == 2


DAMAGED: dict[str, str] = {
    "no json": "{",
    "no text": "\x00",
    "a list": "[]",
    "a number": "3",
    "no version": '{"methods": []}',
    "later version": '{"schema_version": 99, "methods": [], "denoisers": {}}',
    "version as text": '{"schema_version": "1", "methods": [], "denoisers": {}}',
    "no methods": '{"schema_version": 1, "denoisers": {}}',
    "methods as an object": '{"schema_version": 1, "denoisers": {}, "methods": {}}',
    "method as a number": '{"schema_version": 1, "denoisers": {}, "methods": [3]}',
    "method without type": '{"schema_version": 1, "denoisers": {}, "methods": [{"interval": 3}]}',
    "unknown method": '{"schema_version": 1, "denoisers": {}, "methods": [{"type": "Magic"}]}',
    "unknown field": '{"schema_version": 1, "denoisers": {}, "methods": [{"type": "LayerSkipping", "x": 1}]}',
    "NaN": '{"schema_version": 1, "denoisers": {}, "methods": [{"type": "FeatureInheritance", "interval": NaN}]}',
    "plan without rows": '{"schema_version": 1, "denoisers": {}, "methods": [{"type": "SavedPlan", "saved": {}}]}',
    "denoisers as a list": '{"schema_version": 1, "denoisers": [], "methods": []}',
    "no denoisers": '{"schema_version": 1, "methods": []}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_acceleration_is_refused(copied: Path, kind: str) -> None:
    damage(copied, DAMAGED[kind])
    with pytest.raises(FastDiffError) as caught:
        FastDiffPipeline.from_pretrained(copied)
    assert isinstance(caught.value, ValueError)
    assert kind == "plan without rows" or isinstance(caught.value, ConfigError)
    assert type(DiffusionPipeline.from_pretrained(copied)) is diffusers.DiTPipeline
    assert load(copied, preset="off").fastdiff.methods == ()  # which does not need the file


@pytest.mark.parametrize("kind", ["no json", "later version", "no methods"])
def test_damaged_file_is_named(copied: Path, kind: str) -> None:
    damage(copied, DAMAGED[kind])
    with pytest.raises(ConfigError, match=CONFIG_NAME):
        FastDiffPipeline.from_pretrained(copied)


def test_saved_file_holds_nothing_but_settings(saved_folder: Path) -> None:
    saved = config(saved_folder)
    assert saved["denoisers"] == {"transformer": {"class": "DiTTransformer2DModel", "units": 4}}
    assert [item["type"] for item in saved["methods"]] == ["FeatureInheritance"]
    assert as_methods(methods_for(build(NAME), "inherit-1"))[0].to_dict() == saved["methods"][0]


# -- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_upload_holds_the_acceleration(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is cut where diffusers hands over to huggingface_hub."""

    class Repository:
        repo_id = "someone/some-pipeline"

    def upload_folder(repo_id: str, folder_path: str | Path, **_: Any) -> None:
        assert repo_id == Repository.repo_id
        shutil.copytree(folder_path, tmp_path / "uploaded")

    for module in (hub_utils, pipeline_utils):
        monkeypatch.setattr(module, "create_repo", lambda *args, **kwargs: Repository)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    pipe = accelerated(NAME, "inherit-1")
    if how == "push_to_hub":
        pipe.push_to_hub(Repository.repo_id)
    else:
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=Repository.repo_id)
    assert config(tmp_path / "uploaded") == pipe.fastdiff.to_dict()
    assert json.loads((tmp_path / "uploaded" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    assert list((tmp_path / "uploaded").rglob("*.safetensors"))


def test_acceleration_is_found_on_the_hub(
    saved_folder: Path, plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub would have cached them, two repositories: with an acceleration and without."""
    for name, folder in (("with", saved_folder), ("without", plain_folder)):
        repository = tmp_path / f"models--someone--{name}"
        revision = "0" * 40
        shutil.copytree(folder, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
    assert load_cached("someone/with", tmp_path).fastdiff.methods == (FeatureInheritance(order=1, span=(1, -1)),)
    assert load_cached("someone/without", tmp_path).fastdiff.methods == PRESETS["balanced"]
    assert load_cached("someone/with", tmp_path, preset="fast").fastdiff.methods == PRESETS["fast"]


def load_cached(name: str, cache: Path, **arguments: Any) -> Any:
    return quiet(FastDiffPipeline.from_pretrained(name, cache_dir=cache, local_files_only=True, **arguments))


def test_nothing_of_the_denoiser_is_saved_with_its_hooks(saved_folder: Path) -> None:
    """A skipped block's replaced forward must not reach a saved file, nor break saving."""
    pipe = load(saved_folder)
    sample(pipe, NAME)
    state = pipe.transformer.state_dict()
    assert state.keys() == build(NAME).transformer.state_dict().keys()
    assert isinstance(pipe.transformer, nn.Module)
    assert len(pipe.fastdiff.last_run.denoisers["transformer"].calls) == STEPS
