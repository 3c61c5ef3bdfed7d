from __future__ import annotations

import pytest
import torch

from fastdiff.kernels.rows import gather_rows, scatter_rows
from fastdiff.ops import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(5, 3, 7), (5,), (5, 1), (5, 4, 5, 120), (5, 0)]
INDICES = [[3, 0, 4], [2], [], [4, 3, 2, 1, 0]]
pytestmark = pytest.mark.usefixtures("forced", "poisoned")


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Different values everywhere that every dtype can hold exactly."""
    count = torch.Size(shape).numel()
    return (torch.randperm(max(count, 1), generator=torch.Generator().manual_seed(0))[:count] % 251).reshape(shape).to(
        device, dtype
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", INDICES)
def test_samples_are_taken_out_and_put_back(
    shape: tuple[int, ...], index: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    x, chosen = filled(shape, dtype, device), torch.tensor(index, dtype=torch.int64, device=device)
    rows = gather_rows(x, chosen)
    assert torch.equal(rows, x[chosen])

    out, expected = torch.zeros_like(x), torch.zeros_like(x)
    expected[chosen] = rows
    assert scatter_rows(out, chosen, rows) is out
    assert torch.equal(out, expected)


def test_samples_are_read_and_written_where_they_lie(device: torch.device) -> None:
    pair = filled((6, 2, 9), torch.float32, device)
    x, index = pair[::2, 1:], torch.tensor([2, 7, 0], device=device)[::2]
    assert torch.equal(gather_rows(x, index), x[index])
    scatter_rows(x, index, x[:2] + 1000)
    assert (pair[[0, 4], 1] >= 1000).all()
    assert (pair[[1, 3, 5]] < 1000).all()
    assert (pair[:, 0] < 1000).all()


def test_samples_outside_the_batch_touch_no_other_memory(device: torch.device) -> None:
    memory = torch.zeros(4, 3, device=device)
    batch, index = memory[1:3], torch.tensor([-1, 2, 0], device=device)
    rows = gather_rows(batch, index)
    assert rows[:2].isnan().all()
    assert (rows[2] == 0).all()
    scatter_rows(batch, index, torch.ones(3, 3, device=device))
    assert memory.sum(1).tolist() == [0, 3, 0, 0]


def test_one_sample_may_be_taken_twice(device: torch.device) -> None:
    x = filled((3, 4), torch.float32, device)
    index = torch.tensor([1, 1], device=device)
    assert torch.equal(gather_rows(x, index), x[index])


@pytest.mark.parametrize(
    ("x", "index", "rows", "message"),
    [
        (torch.tensor(1.0), torch.tensor([0]), None, "batch"),
        (torch.ones(2), torch.tensor([0], dtype=torch.int32), None, "int32"),
        (torch.ones(2), torch.tensor([True, False]), None, "bool"),
        (torch.ones(2), torch.tensor([[0]]), None, "samples"),
        (torch.ones(2, device="meta"), torch.tensor([0]), None, "one device"),
        (torch.ones(2, 3), torch.tensor([0]), torch.ones(2, 3), r"\(1, 3\)"),
        (torch.ones(2, 3), torch.tensor([0]), torch.ones(1, 3).half(), "float16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(KernelInputError, match=message):
        gather_rows(x, index) if rows is None else scatter_rows(x, index, rows)


def test_reference_runs_where_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x, index = filled((3, 4, 5), torch.float32, device).transpose(1, 2), torch.tensor([2, 0], device=device)
    with pytest.raises(KernelUnavailableError, match="not contiguous"):
        gather_rows(x, index)
    with pytest.raises(KernelUnavailableError, match="not contiguous"):
        scatter_rows(x, index, x[:2])
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    rows = gather_rows(x, index)
    assert torch.equal(rows, x[index])
    scatter_rows(x, index, rows + 1)
    assert torch.equal(x[index], rows + 1)


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_KERNELS", "auto")
    x, index = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0])
    torch.autograd.gradcheck(lambda x: gather_rows(x, index), x)
    torch.autograd.gradcheck(lambda x: scatter_rows(torch.ones(4, 2, dtype=torch.float64), index, x[:2]), x)


def test_operators_are_declared_correctly(device: torch.device) -> None:
    x, index = filled((3, 4), torch.float32, device), torch.tensor([2, 0], device=device)
    torch.library.opcheck(torch.ops.fastdiff.gather_rows.default, (x, index))
    torch.library.opcheck(torch.ops.fastdiff.scatter_rows.default, (x, index, x[:2] + 1))


def test_compiled_code_sees_the_reference(device: torch.device) -> None:
    x, index = filled((3, 4), torch.float32, device), torch.tensor([2, 0], device=device)
    compiled = torch.compile(lambda x: scatter_rows(x * 0, index, gather_rows(x, index)), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    expected = torch.zeros_like(x)
    expected[index] = x[index]
    assert torch.equal(compiled(x), expected)
