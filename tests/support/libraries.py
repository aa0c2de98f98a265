"""Every array library at hand, and the assertion that all tests use."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


@contextlib.contextmanager
def jax_checked() -> Iterator[None]:
    """Every setting of JAX that raises and changes no number."""
    import jax

    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True), jax.debug_infs(True):
        yield


def generators(name: str, seed: int) -> Any:
    """The library's own generator or key."""
    if name in ("numpy", "array_api_strict"):
        return np.random.default_rng(seed)
    if name == "mlx":
        import mlx.core as mx

        return mx.random.key(seed)
    if name == "torch":
        import torch

        return torch.Generator().manual_seed(seed)
    if name == "jax":
        import jax

        return jax.random.key(seed)
    import cupy

    return cupy.random.default_rng(seed)
