"""How units are found, how their streams are read and written, and what is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdiff import Action, ComputePlan, ConfigError, UnsupportedBackboneError
from fastdiff.backbones import BlockIO, register_block, unwrap, view
from fastdiff.backbones import transformer as transformer_module
from tiny.models import TINY_MODELS
from tiny.sampling import accelerate, evaluate


class Swapped(nn.Module):
    """A block that returns its streams in another order than it takes them, with something in between."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.image = nn.Linear(width, width)
        self.text = nn.Linear(width, width)

    def forward(self, text: torch.Tensor, scale: float, image: torch.Tensor) -> tuple[Any, ...]:
        return text + scale * self.text(text), "statistics", image + scale * self.image(image) + text.mean(1, True)


class Custom(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Swapped() for _ in range(blocks))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, **_: Any) -> Any:
        for block in self.blocks:
            prompt, _, sample = block(prompt, float(timestep), image=sample)
        return sample, prompt


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_module, "_BLOCKS", dict(transformer_module._BLOCKS))
    register_block(Swapped, ("image", "text"), (2, 0))


@pytest.fixture
def call() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sample, prompt = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(0.5), "prompt": prompt}


# -- denoisers of one's own --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_registered_block_is_driven(call: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Custom().eval()
    names = view(model).names
    plain = evaluate(model, [call])[0]
    rows = [[Action.COMPUTE] * 3, [Action.REUSE] * 3, [Action.COMPUTE, Action.REUSE, Action.COMPUTE]]

    assert names == ("blocks.0", "blocks.1", "blocks.2")
    outputs, record = accelerate(model, [call] * 3, ComputePlan(np.array(rows), names), (3.0, 2.0, 1.0))
    for output in outputs:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, output, strict=True))
    assert record.skipped == 4

    skipped = ComputePlan(np.array([[Action.COMPUTE, Action.SKIP, Action.SKIP]]), names)
    one = Custom(1).eval()
    one.load_state_dict({key: value for key, value in model.state_dict().items() if key.startswith("blocks.0.")})
    output = accelerate(model, [call], skipped, (1.0,))[0][0]
    assert all(map(torch.equal, output, evaluate(one, [call])[0]))


def test_unregistered_block_counts_its_first_parameter_as_the_one_stream() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x + 1

    denoiser = nn.Module()
    denoiser.layers = nn.ModuleList([Bare()])
    assert view(denoiser).units[0].io == BlockIO(("x",), None, (0,))


def test_compiled_wrapper_is_seen_through() -> None:
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    assert unwrap(model) is model
    assert view(compiled).denoiser is model


@pytest.mark.parametrize("streams", [("image", "txt"), ("hidden_states",)])
def test_register_block_refuses_streams_the_block_does_not_take(streams: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedBackboneError, match=rf"Swapped.*{streams[-1]!r}.*text.*image"):
        register_block(Swapped, streams, (0, 1)[: len(streams)])
    assert "Swapped" not in transformer_module._BLOCKS


@pytest.mark.parametrize("returns", [None, (0,), (0, 1, 2), (0, 0), (-1, 0)])
def test_register_block_refuses_places_that_do_not_fit_the_streams(returns: tuple[int, ...] | None) -> None:
    with pytest.raises(ConfigError, match="returns"):
        register_block(Swapped, ("image", "text"), returns)
    assert "Swapped" not in transformer_module._BLOCKS


def test_known_table_that_does_not_fit_the_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformer_module._BLOCKS, "Swapped", BlockIO(("image", "audio"), (0, 1)))
    with pytest.raises(UnsupportedBackboneError, match=r"Swapped\.forward has no parameter 'audio'.*register_block"):
        view(Custom())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_modules_without_known_blocks_are_refused() -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    adapters = diffusers.MultiAdapter([diffusers.T2IAdapter(channels=[8], num_res_blocks=1) for _ in range(2)])
    linear, none = nn.Linear(2, 2), "no module list"
    for module, found in ((linear, none), (adapters, "adapters"), (vae, none)):
        with pytest.raises(UnsupportedBackboneError) as caught:
            view(module)
        message = str(caught.value)
        assert type(module).__name__ in message
        assert found in message
        assert all(name in message for name in transformer_module.BLOCK_LISTS)


def test_empty_block_list_is_refused() -> None:
    denoiser = nn.Module()
    denoiser.transformer_blocks = nn.ModuleList()
    with pytest.raises(UnsupportedBackboneError, match="transformer_blocks"):
        view(denoiser)


def test_block_without_parameters_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self) -> None:
            return None

    denoiser = nn.Module()
    denoiser.blocks = nn.ModuleList([Nothing()])
    with pytest.raises(UnsupportedBackboneError, match="Nothing"):
        view(denoiser)


# -- streams -----------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


class FourParameters(nn.Module):
    def forward(self, a: Any, b: Any, c: Any = None, d: Any = None) -> None: ...


@given(st.permutations(NAMES), st.integers(1, 4), st.integers(0, 4), st.data())
@settings(deadline=None)
def test_streams_are_read_wherever_the_call_puts_them(
    order: list[str], number: int, positional: int, data: st.DataObject
) -> None:
    streams = tuple(order[:number])
    io = BlockIO(streams, tuple(range(number))).of(FourParameters())
    values = {name: object() for name in NAMES}
    keywords = data.draw(st.permutations(NAMES[positional:]))
    args = [values[name] for name in NAMES[:positional]]
    assert io.read(args, {name: values[name] for name in keywords}) == tuple(values[name] for name in streams)


def test_stream_that_was_not_passed_is_none() -> None:
    io = BlockIO(("a", "d"), (0, 1)).of(FourParameters())
    assert io.read([1, 2], {}) == (1, None)


@given(st.permutations(range(5)), st.integers(1, 5))
def test_parse_undoes_build(places: list[int], number: int) -> None:
    streams = tuple(object() for _ in range(number))
    io = BlockIO(NAMES[:1] * number, tuple(places[:number]))
    output = io.build(streams)
    assert io.parse(output) == streams
    assert all(output[place] is stream for place, stream in zip(places, streams, strict=False))
    assert len(output) == max(places[:number]) + 1


def test_bare_output_is_one_stream() -> None:
    io = BlockIO(("a",))
    value = object()
    assert io.parse(value) == (value,)
    assert io.build((value,)) is value
