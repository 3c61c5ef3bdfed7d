"""Reference sets from every source, kept by content, and refused where they do not fit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import ConfigError
from fastdiff.eval.features import FeatureNet, ImageDataError, extract, load_feature_net
from fastdiff.eval.quality import FeatureStatistics, fid
from fastdiff.eval.reference import FolderImages, Reference, ReferenceSetError, load_reference
from fastdiff.zoo.check import HELD_OUT_SEED
from fastdiff.zoo.data import BOLD_DIGITS, render_many


def picture(seed: int, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def mean_color(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().mean((2, 3))


class Counting:
    """A network that counts the images it sees."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return mean_color(pixels)


NET = FeatureNet("mean-color@1", 3, mean_color)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images at two depths, in lossless formats."""
    root = tmp_path / "images"
    (root / "deeper").mkdir(parents=True)
    for number, suffix in enumerate(["png", "PNG", "bmp", "webp", "tiff", "ppm"]):
        place = root / "deeper" if number % 2 else root
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(picture(number)).save(place / f"{number}.{suffix}", **options)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sorted_rows(features: np.ndarray | None) -> np.ndarray:
    assert features is not None
    return features[np.lexsort(features.T)]


def test_a_folder_is_read_at_any_depth(folder: Path, cache: Path) -> None:
    reference = load_reference(folder, NET, batch=4, cache=cache)
    expected = extract(NET, np.stack([picture(number) for number in range(6)]))
    np.testing.assert_allclose(sorted_rows(reference.features), sorted_rows(expected))
    assert (reference.network, reference.image_size, reference.statistics.count) == (NET.name, (12, 12), 6)
    assert fid(expected, reference.statistics) == pytest.approx(0, abs=1e-6)


def test_jpegs_and_palettes_become_rgb(tmp_path: Path, cache: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.jpg")
    Image.fromarray(picture(1)).quantize(8).save(tmp_path / "b.png")
    Image.fromarray(picture(2)[..., 0]).save(tmp_path / "c.jpeg")
    assert FolderImages(tmp_path)[0:3].shape == (3, 12, 12, 3)


def test_features_are_taken_once_and_kept_by_content(folder: Path, cache: Path) -> None:
    module = Counting()
    net = FeatureNet("counting@1", 3, module)
    first = load_reference(folder, net, cache=cache)
    again = load_reference(folder, net, cache=cache)
    assert module.seen == 6
    np.testing.assert_array_equal(first.features, again.features)
    np.testing.assert_array_equal(first.statistics.root, again.statistics.root)
    moved = folder.rename(folder.with_name("moved"))
    assert load_reference(moved, net, cache=cache).name == "moved"
    assert module.seen == 6

    load_reference(moved, FeatureNet("counting@2", 3, module), cache=cache)
    assert module.seen == 12
    Image.fromarray(picture(99)).save(moved / "0.png")
    changed = load_reference(moved, net, cache=cache)
    assert module.seen == 18
    assert not np.array_equal(changed.features, first.features)


def test_the_cache_is_where_the_user_keeps_caches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_reference(folder, NET)
    assert len(list((tmp_path / "xdg/fastdiff/references").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["half", "empty", "foreign"])
def test_a_damaged_cache_file_is_made_anew(folder: Path, cache: Path, damage: str) -> None:
    module = Counting()
    net = FeatureNet("counting@1", 3, module)
    first = load_reference(folder, net, cache=cache)
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.write_bytes({"half": content[: len(content) // 2], "empty": b"", "foreign": b"{}" * 100}[damage])
    again = load_reference(folder, net, cache=cache)
    assert module.seen == 12
    np.testing.assert_array_equal(first.features, again.features)
    assert kept.read_bytes() == content


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)


def test_a_write_that_fails_leaves_no_file_and_the_measurement_goes_on(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch)
    with pytest.warns(UserWarning, match="No space left"):
        reference = load_reference(folder, NET, cache=cache)
    assert reference.statistics.count == 6
    assert not list(cache.iterdir())


def test_a_write_that_fails_leaves_the_former_file_as_it_was(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = load_reference(folder, NET, cache=cache)
    reference.save(tmp_path / "kept.safetensors")
    before = (tmp_path / "kept.safetensors").read_bytes()
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        reference.save(tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").read_bytes() == before


def test_an_unreadable_image_is_named(folder: Path, cache: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no image at all"):
        (folder / "0.png").write_bytes(content)
        with pytest.raises(ImageDataError, match=r"0\.png"):
            load_reference(folder, NET, cache=cache)
    assert not cache.exists()


def test_images_of_different_sizes_are_named(folder: Path, cache: Path) -> None:
    Image.fromarray(picture(7, side=14)).save(folder / "odd.png")
    for batch in (1, 64):
        with pytest.raises(ImageDataError, match=r"odd\.png is 14x14.*12x12"):
            load_reference(folder, NET, batch=batch, cache=cache)


def test_images_with_more_than_8_bits_are_refused(tmp_path: Path, cache: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageDataError, match=r"float\.tiff has mode F"):
        load_reference(tmp_path, NET, cache=cache)


def test_a_folder_without_images_is_a_typed_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ImageDataError, match="holds no images"):
        load_reference(tmp_path, NET, cache=cache)


@pytest.mark.parametrize(
    "source", ["absent", "absent.npz", "zoo:faces", "zoo:glyphs:red", "datasets:", "datasets:a:b:c:d", ""]
)
def test_a_source_that_is_none_is_a_typed_error(source: str, cache: Path) -> None:
    with pytest.raises(ConfigError):
        load_reference(source, NET, cache=cache)


def test_statistics_in_the_format_of_pytorch_fid(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((50, 3))
    np.savez(tmp_path / "ref.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    reference = load_reference(tmp_path / "ref.npz", NET)
    assert reference.features is None
    assert reference.network is None
    samples = np.random.default_rng(1).standard_normal((40, 3))
    assert fid(samples, reference.statistics) == pytest.approx(fid(samples, FeatureStatistics.of(features)), rel=1e-9)


def test_features_in_the_format_of_clean_fid(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    np.savez_compressed(tmp_path / "ref_kid.npz", feats=features)
    reference = load_reference(tmp_path / "ref_kid.npz", NET)
    np.testing.assert_array_equal(reference.features, features)
    assert reference.statistics.count == 50


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mean": np.zeros(3), "cov": np.eye(3)}, "holds mean, cov; expected mu and sigma"),
        ({"mu": np.zeros(3)}, "expected mu and sigma"),
        (GOOD | {"mu": np.zeros(4)}, r"shapes \(4,\) and \(3, 3\)"),
        (GOOD | {"mu": np.array([0, np.nan, 0])}, "mu in .* finite"),
        (GOOD | {"sigma": np.full((3, 3), np.inf)}, "sigma in .* finite"),
        (GOOD | {"mu": np.array([1, None, "x"], dtype=object)}, "plain arrays"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "5 features"),
        ({"feats": np.zeros((3, 2, 2))}, r"expected \(n, dim\)"),
    ],
    ids=["keys", "half", "shapes", "NaN", "infinite", "objects", "dimension", "feats"],
)
def test_statistics_that_do_not_fit_are_typed_errors(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(ReferenceSetError, match=said):
        load_reference(tmp_path / "ref.npz", NET)


def test_a_broken_npz_is_a_typed_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", **GOOD)
    whole = (tmp_path / "ref.npz").read_bytes()
    for content in (whole[:100], b"", b"text"):
        (tmp_path / "ref.npz").write_bytes(content)
        with pytest.raises(ReferenceSetError, match=r"ref\.npz"):
            load_reference(tmp_path / "ref.npz", NET)


@pytest.mark.parametrize("with_features", [True, False])
def test_saved_statistics_come_back_and_carry_the_networks_name(tmp_path: Path, with_features: bool) -> None:
    features = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    made = Reference("faces", NET.name, FeatureStatistics.of(features), features if with_features else None, (8, 9))
    made.save(tmp_path / "new/ref.safetensors")
    back = load_reference(tmp_path / "new/ref.safetensors", NET)
    assert (back.name, back.network, back.image_size, back.statistics.count) == ("faces", NET.name, (8, 9), 50)
    assert fid(features, back.statistics) == fid(features, made.statistics)
    assert (back.features is not None) == with_features
    with pytest.raises(ReferenceSetError, match=r"mean-color@1.*mean-color@2"):
        load_reference(tmp_path / "new/ref.safetensors", FeatureNet("mean-color@2", 3, mean_color))


def test_a_file_that_is_no_saved_reference_is_a_typed_error(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"mean": np.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(os.urandom(50))
    for name in ("other", "broken"):
        with pytest.raises(ReferenceSetError, match=name):
            load_reference(tmp_path / f"{name}.safetensors", NET)


def test_samples_of_another_size_are_refused(folder: Path, cache: Path) -> None:
    reference = load_reference(folder, NET, cache=cache)
    reference.check_size(np.zeros((2, 12, 12, 3), np.uint8))
    with pytest.raises(ReferenceSetError, match=r"12x12.*24x12"):
        reference.check_size(np.zeros((2, 24, 12, 3), np.uint8))


@pytest.mark.parametrize(("source", "subset"), [("zoo:glyphs", None), ("zoo:glyphs:bold-digits", BOLD_DIGITS)])
def test_zoo_renders_are_those_no_model_was_trained_on(source: str, subset: object, cache: Path) -> None:
    net = load_feature_net("zoo")
    reference = load_reference(source, net, renders=12, cache=cache)
    expected = extract(net, render_many(HELD_OUT_SEED, 0, 12, subset)[0])
    np.testing.assert_allclose(reference.features, expected, rtol=1e-5, atol=1e-6)
    assert reference.image_size == (32, 32)


def test_a_dataset_on_disk(tmp_path: Path, cache: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"label": datasets.Value("int64"), "pixels": datasets.Image()})

    def table(count: int) -> object:
        pixels = [Image.fromarray(picture(number)) for number in range(count)]
        return datasets.Dataset.from_dict({"label": list(range(count)), "pixels": pixels}, features)

    table(3).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table(1), "test": table(3)}).save_to_disk(tmp_path / "splits")
    expected = extract(NET, np.stack([picture(number) for number in range(3)]))
    for source in ("one", "splits:test", "splits:test:pixels"):
        reference = load_reference(f"datasets:{tmp_path}/{source}", NET, cache=cache)
        np.testing.assert_allclose(reference.features, expected)
    for source, said in (("splits:dev", "no split 'dev'"), ("one:train:label", "no column 'label'.*pixels")):
        with pytest.raises(ReferenceSetError, match=said):
            load_reference(f"datasets:{tmp_path}/{source}", NET, cache=cache)


def test_a_dataset_that_is_not_to_be_had_is_a_typed_error(cache: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ReferenceSetError, match="nobody/has-this"):
        load_reference("datasets:nobody/has-this", NET, cache=cache)


def test_without_the_datasets_library_the_error_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ReferenceSetError, match="pip install datasets"):
        load_reference("datasets:cifar10", NET, cache=cache)
