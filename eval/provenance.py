"""Where a number comes from: machine, versions and settings, recorded beside every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdiff

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine and versions, JSON-compatible; nothing that identifies the user or the place.

    Args:
        device: where the work ran.
    """
    device = torch.device(device)
    return {
        "processor": _processor(),
        "cpu_cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "device": _device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastdiff": fastdiff.__version__,
        **{package: package_version(package) for package in PACKAGES},
    }


def describe_machine(environment: dict[str, Any]) -> str:
    """What `describe_environment` found, in one line."""
    cores, threads = environment["cpu_cores"], environment["torch_threads"]
    machine = f"{environment['processor']}, {_counted(cores, 'core')}, {_counted(threads, 'thread')}"
    if environment["device"] != "cpu":
        machine = f"{environment['device']}, {machine}"
    return f"{machine}; torch {environment['torch']}, diffusers {environment['diffusers']}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def package_version(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    names = getattr(torch, device.type, None)
    get_name = getattr(names, "get_device_name", None)
    return str(get_name(device)) if get_name else device.type


def _processor() -> str:
    """The model name, which `platform` does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
