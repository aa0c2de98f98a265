"""One fixture, `library`, over every array library at hand; what is slow and what is missing is skipped."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from libraries import LIBRARIES, Library
from processes import importable

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile(
    "default",
    max_examples=10,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# The commands' own libraries are an extra, so the tests of the commands skip where they are missing.
_COMMANDS = ("typer", "rich", "matplotlib", "sklearn", "PIL", "threadpoolctl")
_NEEDED = {
    "test_compare.py": _COMMANDS,
    "test_compare_data.py": _COMMANDS,
    "test_bench.py": _COMMANDS,
    "test_tokens_sources.py": (*_COMMANDS, "safetensors"),
    "test_tokens_commands.py": (*_COMMANDS, "safetensors"),
    "test_tokens_fit.py": (*_COMMANDS, "safetensors"),
    "test_tokens_kept.py": (*_COMMANDS, "safetensors"),
    "test_tokens_page.py": (*_COMMANDS, "safetensors", "zarr", "dask", "onnxruntime", "ndonnx"),
    "test_export.py": (*_COMMANDS, "safetensors", "onnxruntime", "ndonnx"),
    "test_bars.py": _COMMANDS,
    "test_mutants.py": ("torch",),
}


class _Skipped(pytest.Module):
    def collect(self) -> Any:
        missing = [name for name in _NEEDED[self.path.name] if not importable(name)]
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if all(importable(name) for name in _NEEDED.get(module_path.name, ())):
        return None
    return _Skipped.from_parent(parent, path=module_path)


def pytest_configure(config: pytest.Config) -> None:
    """What JAX compiles is compiled once, for all workers and the processes that they start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        # Small programs are kept too, of which there are thousands.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # By XLA's older code generator, which takes less time for small programs. A flag that a version does not know ends
    # the process.
    if importable("jax") and metadata.version("jax").startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is slow runs where it is asked for, by ``-m slow`` say."""
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


# Bytes of a worker, from which on it forgets what JAX and torch compiled for it: several would fill a machine.
_AT_MOST = 3 << 30


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    with contextlib.suppress(FileNotFoundError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    global _AT_MOST
    yield
    if _resident() < _AT_MOST:
        return
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    # What is free goes back to the system.
    ctypes.CDLL(None).malloc_trim(0)
    _AT_MOST = max(_AT_MOST, _resident() + (1 << 30))


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()
