"""One fixture, `library`, over every array library at hand; and the assertion all tests use."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is slow runs where it is asked for, by ``-m slow`` say."""
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@dataclass(frozen=True)
class Library:
    """An array library under test."""

    name: str
    to: Callable[[np.ndarray], Any] = field(repr=False)
    """Array of the library from a NumPy array, dtype kept."""

    back: Callable[[Any], np.ndarray] = field(repr=False)
    """NumPy array from an array of the library, dtype kept (bfloat16 widened to float32)."""

    float64: bool = True
    float16: bool = True
    differentiates: bool = False
    bfloat16: Any = None
    cast: Callable[[Any, Any], Any] = field(default=lambda x, dtype: x.astype(dtype), repr=False)
    """Array in another dtype of the library."""


def _read_only(x: np.ndarray) -> np.ndarray:
    x = np.array(x)
    x.flags.writeable = False
    return x


def _numpy() -> Library:
    return Library("numpy", _read_only, np.asarray)


def _strict() -> Library:
    xp = pytest.importorskip("array_api_strict")
    return Library("array_api_strict", xp.asarray, np.asarray, float16=False, cast=xp.astype)


def _mlx() -> Library:
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)

    def back(x: Any) -> np.ndarray:
        return np.asarray(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    to = lambda x: mx.array(np.asarray(x))  # noqa: E731
    return Library("mlx", to, back, float64=False, differentiates=True, bfloat16=mx.bfloat16)


def _torch() -> Library:
    torch = pytest.importorskip("torch")
    # The tests' tensors are too small for more, and workers of pytest-xdist share the cores.
    torch.set_num_threads(1)

    def back(x: Any) -> np.ndarray:
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()

    return Library(
        "torch",
        lambda x: torch.tensor(np.array(x)),
        back,
        differentiates=True,
        bfloat16=torch.bfloat16,
        cast=lambda x, dtype: x.to(dtype),
    )


def _jax() -> Library:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_numpy_dtype_promotion", "strict")

    def back(x: Any) -> np.ndarray:
        return np.asarray(x.astype("float32") if x.dtype == jax.numpy.bfloat16 else x)

    # float64 exists inside jax.enable_x64(True) only; tests that need it say so.
    return Library("jax", jax.numpy.asarray, back, float64=False, differentiates=True, bfloat16=jax.numpy.bfloat16)


def _cupy() -> Library:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.zeros(1)
    except Exception as error:  # CuPy has no common base class for a missing driver or device
        pytest.skip(f"CuPy has no GPU: {str(error).splitlines()[0]}")
    return Library("cupy", cupy.asarray, cupy.asnumpy)


LIBRARIES = {
    "numpy": _numpy,
    "array_api_strict": _strict,
    "mlx": _mlx,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()


def library_named(name: str) -> Library:
    """A library by name, skipping the test where it is missing."""
    return LIBRARIES[name]()


def assert_close(actual: Any, expected: np.ndarray, library: Library, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Check library, dtype, shape and values at once; the tolerance needs a reason where it is given."""
    # NumPy gives a scalar of its own where the others give an array of shape ().
    namespace = (np.ndarray, np.generic) if library.name == "numpy" else type(library.to(np.zeros(1, np.float32)))
    assert isinstance(actual, namespace), f"expected an array of {library.name}, got {type(actual)}"
    back = library.back(actual)
    assert back.dtype == expected.dtype, f"expected dtype {expected.dtype}, got {back.dtype}"
    assert back.shape == expected.shape, f"expected shape {expected.shape}, got {back.shape}"
    np.testing.assert_allclose(back, expected, rtol=rtol, atol=atol)


@contextlib.contextmanager
def float64_in(library: Library) -> Iterator[None]:
    """float64 in the library, or a skip where it has none."""
    if library.name == "jax":
        import jax

        with jax.enable_x64(True):
            yield
    elif library.float64:
        yield
    else:
        pytest.skip(f"{library.name} has no float64")


def standard_promotion() -> contextlib.AbstractContextManager[Any]:
    """JAX's ordinary dtype promotion, for the tests that mix dtypes; all others make it strict."""
    jax = sys.modules.get("jax")
    return contextlib.nullcontext() if jax is None else jax.numpy_dtype_promotion("standard")


def run_python(code: str, *arguments: str) -> str:
    """Output of Python code in a fresh process, whose warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
