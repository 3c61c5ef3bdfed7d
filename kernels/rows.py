"""Some samples of a batch, taken out and put back: what per-sample exits do when part of a batch goes on."""

from __future__ import annotations

import torch

from fastdiff.kernels.dispatch import KernelInputError, Verdict, check_devices, obstacle, register, use_kernel
from fastdiff.kernels.launch import jit, launch, tl


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Samples of a batch, ``x[index]``.

    Args:
        x: a tensor of shape ``(batch, ...)``.
        index: which samples, int64 of shape ``(samples,)``. One outside the batch raises on the CPU; the kernel, which
            cannot raise, gives a sample of NaN.

    Returns:
        A contiguous tensor of shape ``(samples, ...)``.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    _check("gather_rows", x, index)
    if use_kernel("gather_rows", supported, x):
        rows = torch.empty(len(index), *x.shape[1:], dtype=x.dtype, device=x.device)
        return run(rows, x, index, scatter=False)
    return gather_rows_reference(x, index)


def scatter_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Write samples into a batch, ``out[index] = rows``, in place.

    Args:
        out: a tensor of shape ``(batch, ...)``.
        index: which samples to replace, int64 of shape ``(samples,)``, all different. One outside the batch raises on
            the CPU, and is passed over by the kernel.
        rows: what to write, shape ``(samples, ...)``, of the same dtype.

    Returns:
        ``out``.

    Raises:
        KernelInputError: if shapes, dtypes or devices do not fit.
        KernelUnavailableError: if ``FASTDIFF_KERNELS=triton`` and the kernel cannot run.
    """
    _check("scatter_rows", out, index)
    check_devices("scatter_rows", out, rows)
    if rows.shape != (len(index), *out.shape[1:]) or rows.dtype != out.dtype:
        raise KernelInputError(
            f"scatter_rows: rows are {rows.dtype} of shape {tuple(rows.shape)}; give {out.dtype} of shape "
            f"{(len(index), *out.shape[1:])}."
        )
    if use_kernel("scatter_rows", supported, out, rows):
        return run(out, rows, index, scatter=True)
    return out.index_copy_(0, index, rows)


def gather_rows_reference(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`gather_rows` as a plain expression."""
    return x.index_select(0, index).contiguous()


def _check(name: str, x: torch.Tensor, index: torch.Tensor) -> None:
    if x.ndim == 0 or index.ndim != 1 or index.dtype != torch.int64:
        raise KernelInputError(
            f"{name}: a tensor of shape {tuple(x.shape)} and an index that is {index.dtype} of shape "
            f"{tuple(index.shape)}; give (batch, ...) and int64 of shape (samples,)."
        )
    check_devices(name, x, index)


def supported(*tensors: torch.Tensor) -> Verdict:
    """Whether the kernel can run on checked tensors."""
    reason = obstacle(*tensors)
    if not reason and not all(tensor[:1].is_contiguous() for tensor in tensors):
        reason = "samples are not contiguous"
    return not reason, reason


def run(target: torch.Tensor, source: torch.Tensor, index: torch.Tensor, scatter: bool) -> torch.Tensor:
    """Launch the kernel on arguments that `supported` accepts, and return the target."""
    batch, other = (target, source) if scatter else (source, target)
    size = other[:1].numel()
    block = 2048
    blocks = -(-size // block)
    launch(
        _copy_rows,
        (len(index) * blocks,),
        target,
        source,
        index,
        index.stride(0),
        len(batch),
        size,
        blocks,
        target.stride(0),
        source.stride(0),
        SCATTER=scatter,
        BLOCK=block,
        num_warps=8,
    )
    return target


@jit
def _copy_rows(  # type: ignore[no-untyped-def]
    target, source, index, index_stride, batch, size, blocks, target_stride, source_stride,
    SCATTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = (program // blocks).to(tl.int64)  # tensors may hold more than 2**31 elements
    start = (program % blocks).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    inside = element < size - start
    sample = tl.load(index + number * index_stride)
    known = element < tl.where((sample >= 0) & (sample < batch), size - start, 0)
    if SCATTER:
        values = tl.load(source + number * source_stride + start + element, inside)
        tl.store(target + sample * target_stride + start + element, values, known)
    else:
        values = tl.load(source + sample * source_stride + start + element, known, float("nan"))
        tl.store(target + number * target_stride + start + element, values, inside)


def _scatter(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    scatter_rows(out, index, rows)


register("gather_rows(Tensor x, Tensor index) -> Tensor", gather_rows, gather_rows_reference)
register("scatter_rows(Tensor(a!) out, Tensor index, Tensor rows) -> ()", _scatter, lambda out, index, rows: None)
