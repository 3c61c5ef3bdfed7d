"""The options of ``fastdiff eval``: from the command line, from a file, and as the page on it shows them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdiff.cli.evaluate import build
from fastdiff.cli.main import build_parser
from fastdiff.errors import ConfigError
from fastdiff.eval.evaluation import Evaluation
from fastdiff.eval.ways import parse_ways


def parsed(*arguments: object) -> Evaluation:
    parser = build_parser()
    options = parser.parse_args(["eval", *map(str, arguments)])
    subparser = parser._subparsers._group_actions[0].choices["eval"]  # type: ignore[union-attr,index]
    return build(options, subparser)


def config(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


FILE = """
model: zoo:glyphs-dit
method:
  - exit-schedule:d-min=4..12
  - preset:fast
baseline: [deepcache, "steps:10"]
copy: {tuned: zoo:glyphs-dit-ase}
num-samples: 100
seeds: [0, 1000]
guidance_scale: 3
lpips: true
dtype: bfloat16
arg: {clip_skip: 1, name: "1"}
feature-weights: {lpips: alex.pth}
"""


def test_a_file_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    path = config(tmp_path, FILE)
    found = parsed("--config", path)
    assert found.model == "zoo:glyphs-dit"
    assert found.methods == ["exit-schedule:d-min=4..12", "preset:fast"]
    assert found.baselines == ["deepcache", "steps:10"]
    assert found.copies == {"tuned": "zoo:glyphs-dit-ase"}
    assert (found.num_samples, found.seeds, found.guidance_scale, found.lpips) == (100, [0, 1000], 3.0, True)
    assert found.arguments == {"clip_skip": 1, "name": "1"}
    assert found.feature_weights == {"lpips": "alex.pth"}
    assert found.dtype == "bfloat16"
    assert found.reader == "zoo:glyphs-cnn"
    assert (found.batch_size, found.out) == (Evaluation.batch_size, Evaluation.out)
    assert found.trusted is False

    line = parsed("zoo:glyphs-ddpm", "--config", path, "--num-samples", 7, "--method", "preset:quality")
    assert (line.model, line.num_samples, line.methods) == ("zoo:glyphs-ddpm", 7, ["preset:quality"])
    assert line.baselines == found.baselines
    assert parsed("zoo:glyphs-dit", "--features", "module:attr").trusted is True


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"no-such-option": 1}, "no option 'no-such-option'; there are arg, baseline"),
        ({"config": "other.yaml"}, "no option 'config'"),
        ({"num-samples": "many"}, "num-samples takes int, got 'many'"),
        ({"num-samples": True}, "num-samples takes int, got True"),
        ({"num-samples": 1.5}, "num-samples takes int, got 1.5"),
        ({"num-samples": [1, 2]}, "takes one value"),
        ({"lpips": "yes please"}, "lpips takes bool"),
        ({"dtype": "float8"}, "dtype is one of float32, float16, bfloat16; got 'float8'"),
        ({"method": {"preset": "fast"}}, "method takes str"),
        ({"seeds": [0, None]}, "seeds takes int, got None"),
        ({"features": "os:system"}, "would import code"),
        ("- a list", "holds a list"),
        ("a: [", "YAML file"),
        ("!!python/object/apply:os.system ['true']", "YAML file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_typed_error(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed("--config", config(tmp_path, content))
    assert said in str(raised.value)
    assert "sweep.yaml" in str(raised.value)


def test_a_file_may_name_features_that_import_nothing(tmp_path: Path) -> None:
    assert parsed("--config", config(tmp_path, {"model": "zoo:glyphs-dit", "features": "inception:64"})).features
    with pytest.raises(ConfigError, match="names a YAML file"):
        parsed("--config", tmp_path / "missing.yaml")


PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_commands_of_the_page_parse() -> None:
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks("bash")).splitlines()]
    commands = [words[words.index("eval") + 1 :] if "eval" in words else words[words.index("-m") + 2 :]
                for words in lines if words]  # fmt: skip
    assert len(commands) == 6
    for words in commands:
        if words[0] == "compare":
            assert build_parser().parse_args(["eval", *words]).tolerance == 0.02
        else:
            parse_ways([spec.rpartition("@")[2] for spec in parsed(*words).methods], 50, units=12)


def test_the_file_of_the_page_is_read(tmp_path: Path) -> None:
    (content,) = blocks("yaml")
    found = parsed("--config", config(tmp_path, content))
    assert (found.model, found.num_samples, found.out) == ("zoo:glyphs-dit", 5000, "glyphs-dit")
    assert found.baselines == ["peers", "steps:10"]
    assert len(parse_ways(found.methods, 50, units=12)) == 10
