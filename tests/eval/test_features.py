"""Feature networks: their names, their weights, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastdiff import zoo
from fastdiff.errors import ConfigError
from fastdiff.eval.features import (
    CLEAN_INCEPTION_FILE,
    INCEPTION_FILE,
    FeatureNet,
    FeatureWeightsError,
    ImageDataError,
    MissingLibraryError,
    extract,
    load_feature_net,
)
from fastdiff.zoo.data import render_many, to_tensor
from fastdiff.zoo.reader import GlyphReader


def images(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module of feature networks."""
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Parameter(torch.ones(3))\n"
        "    def forward(self, images):\n"
        "        return images.float().mean((2, 3)) * self.scale\n"
        "ready = Net()\n"
        "def spread(images):\n"
        "    return images.float().std((2, 3))\n"
        "def flat(images):\n"
        "    return images.float().mean()\n"
        "def picky(images):\n"
        "    return images.reshape(1, 3, 8, 8).float().mean((2, 3))\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return "my_nets"


def test_zoo_features_and_logits_are_the_readers() -> None:
    reader = GlyphReader.from_pretrained(zoo.path("glyphs-cnn")).eval()
    pictures = render_many(2, 0, 10)[0]
    net = load_feature_net("zoo")
    with torch.no_grad():
        expected = reader.features(to_tensor(pictures))
        logits = reader.answer(expected).character
    features = extract(net, pictures, batch=3)
    assert features.dtype == np.float32
    assert features.shape == (10, net.dim)
    torch.testing.assert_close(torch.from_numpy(features), expected)
    assert net.logits is not None
    torch.testing.assert_close(net.logits(torch.from_numpy(features)).detach(), logits)


def test_a_name_stands_for_the_weights(nets: str, tmp_path: Path) -> None:
    same = {load_feature_net(f"{nets}:{attribute}").name.partition("@")[2] for attribute in ("Net", "ready")}
    assert len(same) == 1
    save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "w.safetensors")
    scaled = load_feature_net(f"{nets}:Net", tmp_path / "w.safetensors")
    assert scaled.name.partition("@")[2] not in same
    ratio = extract(scaled, images(2)) / extract(load_feature_net(f"{nets}:Net"), images(2))
    np.testing.assert_allclose(ratio, [[1, 2, 3], [1, 2, 3]], rtol=1e-6)


def test_a_function_serves_as_a_network(nets: str) -> None:
    net = load_feature_net(f"{nets}:spread")
    assert net.dim == 3
    expected = images(5).reshape(5, -1, 3).astype(np.float64).std(axis=1, ddof=1)
    np.testing.assert_allclose(extract(net, images(5), batch=2), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "spec", ["inception:100", "vgg", "my_nets:absent", "absent_module:net", "my_nets:number", "my_nets:flat", ":x", ""]
)
def test_a_spec_that_names_no_network_is_a_typed_error(spec: str, nets: str) -> None:
    with pytest.raises(ConfigError):
        load_feature_net(spec)


def test_a_network_of_another_size_is_told_what_to_declare(nets: str) -> None:
    with pytest.raises(ConfigError, match="num_features"):
        load_feature_net(f"{nets}:picky")


def test_code_of_the_callers_choice_can_be_ruled_out(nets: str) -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        load_feature_net(f"{nets}:Net", custom=False)
    assert nets not in sys.modules


def test_custom_weights_that_do_not_fit_are_a_typed_error(nets: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(FeatureWeightsError, match=r"w\.safetensors"):
        load_feature_net(f"{nets}:Net", tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="takes no weights"):
        load_feature_net(f"{nets}:spread", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (images(0), "no images"),
        (images(2, side=16), "16x16"),
        (images(2)[..., 0], "shape"),
        (images(2) / 255.0, "uint8"),
        (np.where(np.arange(3)[:, None, None, None] == 1, np.nan, images(3) / 255.0), "image 1 holds NaN"),
    ],
    ids=["none", "size", "channels", "floats", "NaN"],
)
def test_images_that_cannot_be_measured_are_typed_errors(pictures: np.ndarray, said: str) -> None:
    with pytest.raises(ImageDataError, match=said):
        extract(load_feature_net("zoo"), pictures)


def test_features_that_are_not_finite_name_the_image() -> None:
    def divide(pixels: torch.Tensor) -> torch.Tensor:
        return 1 / pixels.float().mean((2, 3))

    pictures = images(5)
    pictures[3] = 0
    with pytest.raises(ImageDataError, match=r"1 of 5 images, first of image 3"):
        extract(FeatureNet("divide", 3, divide), pictures, batch=2)


def test_features_of_the_wrong_shape_are_a_typed_error() -> None:
    with pytest.raises(ImageDataError, match="expected"):
        extract(FeatureNet("flat", 4, lambda pixels: pixels.float().mean((2, 3))), images(2))


def test_importing_the_evaluation_loads_no_metric_library() -> None:
    code = (
        "import sys, fastdiff.eval, fastdiff.eval.metrics, fastdiff.eval.paired\n"
        "loaded = {'torchmetrics', 'torchvision', 'torch_fidelity', 'cleanfid', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Weights of the published networks. They are not here, so what is tested is how they are missed, and that a local file
# of the library's format is used: filled at random, which the library cannot tell.


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file in torch.hub's folder, and a proxy that refuses connections in case the machine has a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("spec", "file", "package"),
    [("inception", INCEPTION_FILE, "torch_fidelity"), ("clean-inception", CLEAN_INCEPTION_FILE, "cleanfid")],
)
@pytest.mark.usefixtures("no_downloads")
def test_missing_weights_say_which_file_and_what_to_do(spec: str, file: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    for given in (None, tmp_path / "absent.pth"):
        with pytest.raises(FeatureWeightsError, match=file) as caught:
            load_feature_net(spec, given)
        for said in ("--feature-weights", "--features zoo|module:attr", "absent.pth" if given else "downloaded"):
            assert said in str(caught.value)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanfid.inception_torchscript", None)
    with pytest.raises(MissingLibraryError, match=r"clean-fid: pip install"):
        load_feature_net("clean-inception")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's format."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import FeatureExtractorInceptionV3

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # The library makes the network and then loads weights into it; this keeps what it made.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="made")
    torch.save(net.state_dict(), folder / INCEPTION_FILE)  # noqa: TID251 - the library's own format
    return folder / INCEPTION_FILE


@pytest.mark.slow
@pytest.mark.parametrize("layer", [64, 192, 768, 2048])
def test_inception_from_a_local_file_is_torchmetrics_own(inception_file: Path, layer: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    net = load_feature_net(f"inception:{layer}", inception_file)
    metric = FrechetInceptionDistance(feature=layer, feature_extractor_weights_path=str(inception_file))
    pictures = images(2)
    with torch.no_grad():
        expected = metric.inception(torch.from_numpy(pictures).movedim(3, 1)).numpy()
    np.testing.assert_allclose(extract(net, pictures), expected, rtol=1e-5, atol=1e-6)
    assert net.name.startswith(f"inception-{layer}@")
    assert (net.logits is not None) == (layer == 2048)


@pytest.mark.slow
def test_inception_logits_from_stored_features_are_torch_fidelitys(inception_file: Path) -> None:
    from torchmetrics.image.fid import NoTrainInceptionV3

    net = load_feature_net("inception", inception_file)
    direct = NoTrainInceptionV3("inception-v3-compat", ["logits_unbiased"], str(inception_file))
    pictures = images(2)
    assert net.logits is not None
    with torch.no_grad():
        ours = net.logits(torch.from_numpy(extract(net, pictures)))
        expected = direct(torch.from_numpy(pictures).movedim(3, 1))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_weights_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": print}, tmp_path / "w.pth")  # noqa: TID251 - made to be refused
    with pytest.raises(FeatureWeightsError, match="plain tensors"):
        load_feature_net("inception", tmp_path / "w.pth")


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 2048)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.mix(pixels.mean(dim=(2, 3)))


class _Scripted(nn.Module):
    """As much of clean-fid's TorchScript file as it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


def test_clean_inception_from_a_local_file_is_clean_fids_own(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid")
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    torch.jit.script(_Scripted()).save(str(tmp_path / CLEAN_INCEPTION_FILE))
    pictures = images(3, side=40)
    resized = np.stack([build_resizer("clean")(picture) for picture in pictures])
    with torch.no_grad():
        direct = InceptionV3W(str(tmp_path), download=False)(torch.from_numpy(resized).movedim(3, 1))
    by_file, by_folder = (load_feature_net("clean-inception", at) for at in (tmp_path / CLEAN_INCEPTION_FILE, tmp_path))
    np.testing.assert_allclose(extract(by_file, pictures), direct.numpy(), rtol=1e-5, atol=1e-6)
    assert by_file.name == by_folder.name
    assert by_file.library == "clean-fid"


def test_clean_inception_says_which_name_the_file_must_have(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid")
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(FeatureWeightsError, match="no other file name"):
        load_feature_net("clean-inception", tmp_path / "other.pt")
    (tmp_path / CLEAN_INCEPTION_FILE).write_bytes(b"half of it")
    with pytest.raises(FeatureWeightsError, match="could not be read"):
        load_feature_net("clean-inception", tmp_path)
