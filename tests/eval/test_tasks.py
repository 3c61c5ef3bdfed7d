"""What is asked of the images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import ConfigError
from fastdiff.eval.tasks import Task, make_task, read_prompts
from tiny.pipelines import TINY_PIPELINES
from tiny.unet_pipelines import UNET_PIPELINES


@pytest.fixture(scope="module")
def dit() -> object:
    return TINY_PIPELINES["DiTPipeline"].build()


def test_requests_repeat_and_seeds_follow_the_image(dit: object) -> None:
    task = make_task(dit, class_labels=[3, 1, 2], guidance_scale=2.0, seed=10)  # type: ignore[arg-type]
    arguments = task.arguments([2, 3, 4])
    assert arguments["class_labels"] == [2, 3, 1]
    assert arguments["guidance_scale"] == 2.0
    noise = [torch.randn(2, generator=generator) for generator in arguments["generator"]]
    expected = [torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in (12, 13, 14)]
    assert all(map(torch.equal, noise, expected))


def test_embeddings_are_chosen_along_their_first_dimension() -> None:
    embeddings = torch.arange(6).reshape(3, 2)
    chosen = Task({"prompt_embeds": embeddings}).arguments([1, 3])["prompt_embeds"]
    assert chosen.tolist() == [[2, 3], [0, 1]]


def test_where_nothing_can_be_asked_images_are_counted() -> None:
    pipe = UNET_PIPELINES["DDPMPipeline"].build()
    assert make_task(pipe).arguments([0, 1, 2])["batch_size"] == 3


def test_a_shared_prompt_is_counted_by_images() -> None:
    pipe = UNET_PIPELINES["StableDiffusionPipeline"].build()
    arguments = make_task(pipe, arguments={"prompt": "a cat"}).arguments([0, 1])
    assert (arguments["prompt"], arguments["num_images_per_prompt"]) == ("a cat", 2)


def test_a_description_tells_tasks_apart_and_fits_json() -> None:
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    other = Image.fromarray(np.ones((4, 4, 3), np.uint8))
    tasks = [
        Task({"prompt": ["a", "b"]}),
        Task({"prompt": ["a", "c"]}),
        Task({"prompt": ["a", "b"]}, seed=1),
        Task({"prompt": ["a", "b"]}, {"guidance_scale": 2.0}),
        Task({"prompt": ["a", "b"]}, {"image": image}),
        Task({"prompt": ["a", "b"]}, {"image": other}),
        Task({"prompt": ["a", "b"]}, {"image": [image]}),
        Task({"prompt_embeds": torch.zeros(2, 3)}),
        Task({"prompt_embeds": torch.ones(2, 3)}),
    ]
    described = [json.dumps(task.describe()) for task in tasks]
    assert len(set(described)) == len(tasks)
    assert described[0] == json.dumps(Task({"prompt": ["a", "b"]}).describe())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": ["a"]}, "takes no prompt; it takes class_labels"),
        ({"class_labels": [1], "arguments": {"heigth": 3}}, "takes no heigth"),
        ({"class_labels": []}, "no class_labels to sample from"),
        ({"class_labels": [1], "seed": -1}, "Seeds count from 0"),
        ({}, "has to be asked"),
    ],
)
def test_what_a_pipeline_cannot_be_asked_is_a_typed_error(dit: object, arguments: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_task(dit, **arguments)  # type: ignore[arg-type]


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_a_typed_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts\.txt"):
        read_prompts(path)
