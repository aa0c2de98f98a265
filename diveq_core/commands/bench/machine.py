"""On what the figures were taken: processor, cores, load, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diveq_core.commands.bench.problem import has_gpu, load

PACKAGES = (
    "diveq-core",
    "numpy",
    "torch",
    "jax",
    "cupy",
    "faiss-cpu",
    "diveq",
    "vector-quantize-pytorch",
)


def machine() -> dict[str, Any]:
    """What the picture and the table name."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": load("torch").cuda.get_device_name() if has_gpu() else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in PACKAGES},
    }


def described(found: dict[str, Any]) -> str:
    """The same in three lines."""
    cores = f"{found['cores']} core{'s' * (found['cores'] != 1)}"
    load_average = "" if found["load"] is None else f", load average {found['load']:.1f} before the run"
    versions = ", ".join(f"{name} {number or '-'}" for name, number in found["versions"].items())
    return (
        f"Processor: {found['processor']}, {cores}{load_average}; GPU: {found['gpu'] or 'none'}\n"
        f"System: {found['system']}\n"
        f"Versions: {versions}"
    )


def busy(found: dict[str, Any]) -> bool:
    """Whether other work had a good part of the machine."""
    return found["load"] is not None and found["load"] > 0.3 * found["cores"]


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    wheels = ("cupy", "cupy-cuda12x", "cupy-cuda13x") if name == "cupy" else (name,)
    for wheel in wheels:
        try:
            return version(wheel)
        except PackageNotFoundError:
            continue
    return None
