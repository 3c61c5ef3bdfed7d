"""Compiles every kernel for GPUs that are not there, as it would be compiled for tensors of a real model's shapes.

    cd tests && python -m kernel_checks.ahead_of_time float16,bfloat16 80 90

prints a JSON list: for each kernel, dtype and compute capability what the machine code holds. It needs a process of its
own, because Triton settles when a kernel is defined whether that is to be interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_checks.cases import CASES, MODULES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}


class Recorder:
    """Stands in for `launch`: notes what would be launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = []

    def __call__(
        self, kernel: Any, programs: tuple[int, ...], *args: Any, fp_fusion: bool = True, **options: Any
    ) -> None:
        assert 0 not in programs
        self.launches.append((kernel, args, options, fp_fusion))


def compile_launch(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any], fp_fusion: bool, capability: int
) -> Any:
    """Compile with the specialisation that a launch with these arguments leads to."""
    settings = {name: options[name] for name in options if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in options.items() if name in kernel.arg_names
    }
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if kernel.params[position].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[position,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[position,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**settings, "enable_fp_fusion": fp_fusion}
    )


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers and memory of each thread in bytes, and the number of load instructions by width in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {
        key: int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
        for key, name in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }
    # Loads into registers, and those into shared memory that a loop starts ahead of time.
    loads = re.findall(r"\bLDG(?:STS)?\.E\S*", code)
    return found | {
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads_128": sum(".128" in load for load in loads),
        "loads_16": sum(".U16" in load or ".S16" in load for load in loads),
    }


def main() -> None:
    rows = []
    for name, call in CASES.items():
        for dtype in (getattr(torch, dtype) for dtype in sys.argv[1].split(",")):
            recorder = Recorder()
            for module in MODULES:
                module.launch = recorder  # type: ignore[attr-defined]
            call(dtype)
            for kernel, args, options, fp_fusion in recorder.launches:
                for capability in map(int, sys.argv[2:]):
                    code = compile_launch(kernel, args, options, fp_fusion, capability)
                    row = {"case": name, "kernel": kernel.__name__, "dtype": str(dtype), "capability": capability}
                    rows.append(row | inspect(code.asm["cubin"]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
