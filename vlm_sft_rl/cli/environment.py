"""`vlm-sft-rl env`: what a bug report needs to say about the machine and its packages."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil

from .. import __version__
from ..errors import first_line
from ..recipes import PACKAGE
from .common import escape

DISTRIBUTION = "vlm-sft-rl"
# settings of the environment that change what runs; none of them holds a secret
VARIABLES = (
    "ACCELERATE_",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NCCL_",
    "OMP_NUM_THREADS",
    "PYTORCH_",
    "TRANSFORMERS_OFFLINE",
    "WORLD_SIZE",
)
_GIB = 2**30


def environment() -> dict[str, str]:
    """What stands in the report, by name, in its order."""
    return {
        DISTRIBUTION: f"{__version__} ({PACKAGE})",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "CPU": f"{_processor()}, {psutil.cpu_count()} threads, {psutil.virtual_memory().total / _GIB:.0f} GiB of memory",
        **_torch(),
        **{name: _version(name) for name in _requirements().get("", ()) if name != "torch"},
        **{
            f"{name} (extra {extra})": _version(name)
            for extra, names in _requirements().items()
            for name in names
            if extra not in ("", "dev")
        },
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def print_environment() -> None:
    """Print it so that it can be pasted into an issue."""
    from rich.console import Console

    lines = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    Console(soft_wrap=True).print(escape(lines), highlight=False)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _torch() -> dict[str, str]:
    """Version, build and devices of torch; a torch that cannot be imported is what the report is about."""
    try:
        import torch
    except Exception as error:  # a shared library that is missing, an operating system that is too old
        return {"torch": f"{_version('torch')}, cannot be imported ({first_line(error)})"}
    cuda, rocm = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"
    rows = {"torch": f"{_version('torch')}, built for {build}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            rows[f"GPU {number}"] = (
                f"{device.name}, {device.total_memory / _GIB:.0f} GiB, capability {device.major}.{device.minor}, "
                f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
            )
    elif torch.backends.mps.is_available():
        rows["GPU"] = "Apple (mps)"
    else:
        rows["GPU"] = "none that torch can use"
    return rows


def _requirements() -> dict[str, list[str]]:
    """The packages that the installed distribution needs, by extra; "" are those that are always installed."""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    extras: dict[str, list[str]] = {}
    for requirement in map(Requirement, texts):
        marker = str(requirement.marker or "")
        extra = marker.partition("extra == ")[2].strip("\"') ")
        if requirement.name != DISTRIBUTION:
            extras.setdefault(extra, []).append(requirement.name)
    return extras


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
