"""What is computed: sizes, dtype and device, and the same random arrays for every library."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

    from diveq_core.arrays.rows import Array

BACKENDS = ("numpy", "torch", "jax", "cupy")
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEVICES = ("cpu", "cuda")


class UnavailableError(Exception):
    """Why a contender cannot take part, in a few words."""


@dataclass(frozen=True)
class Problem:
    """N vectors and K codewords of D entries, in a dtype, on a device."""

    n: int
    k: int
    d: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def size(self) -> str:
        """``N x K x D``."""
        return f"{self.n}x{self.k}x{self.d}"

    @property
    def where(self) -> str:
        """Dtype and device."""
        return f"{self.dtype}, {self.device}"

    @property
    def matrix_bytes(self) -> int:
        """Bytes of an N x K matrix of scores."""
        return self.n * self.k * {"float64": 8}.get(self.dtype, 4)

    def sized(self, n: int, k: int, d: int) -> Problem:
        """The same in another size."""
        return replace(self, n=n, k=k, d=d)


@functools.lru_cache(maxsize=1)
def _normal(n: int, k: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z, codebook, g = (rng.standard_normal((rows, d), dtype=np.float32) for rows in (n, k, n))
    return z, codebook, g


def arrays(problem: Problem, library: str) -> tuple[Array, Array, Array]:
    """``z`` (N, D), ``codebook`` (K, D) and a cotangent ``g`` (N, D), standard normal.

    Raises
    ------
    UnavailableError
        If the library is not installed, or lacks the dtype or the device.
    """
    module = load(library)
    given = _normal(problem.n, problem.k, problem.d)
    z, codebook, g = (_convert(library, module, x, problem) for x in given)
    return z, codebook, g


def load(package: str) -> Any:
    """The package, imported.

    Raises
    ------
    UnavailableError
        If it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UnavailableError(f"{package} cannot be imported: {str(error).splitlines()[0]}") from None


def has_gpu() -> bool:
    """Whether torch is installed and finds a CUDA device."""
    return importlib.util.find_spec("torch") is not None and bool(load("torch").cuda.is_available())


def synchronize(problem: Problem, library: str = "torch") -> None:
    """Wait until the library's work on the device is done; NumPy and JAX need no such wait."""
    if problem.device == "cuda" and library == "torch":
        load("torch").cuda.synchronize()
    elif library == "cupy":
        load("cupy").cuda.get_current_stream().synchronize()


def _convert(library: str, module: ModuleType, x: np.ndarray, problem: Problem) -> Array:
    convert = {"numpy": _to_numpy, "torch": _to_torch, "jax": _to_jax, "cupy": _to_cupy}[library]
    return convert(module, x, problem)


def _to_numpy(_module: Any, x: np.ndarray, problem: Problem) -> Array:
    if problem.device != "cpu":
        raise UnavailableError("NumPy computes on the CPU only")
    if problem.dtype == "bfloat16":
        raise UnavailableError("NumPy has no bfloat16")
    return x.astype(problem.dtype, copy=False)


def _to_torch(torch: Any, x: np.ndarray, problem: Problem) -> Array:
    if problem.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("no GPU here")
    return torch.from_numpy(x).to(device=problem.device, dtype=getattr(torch, problem.dtype))


def _to_jax(jax: Any, x: np.ndarray, problem: Problem) -> Array:
    try:
        device = jax.devices(problem.device)[0]
    except RuntimeError:
        raise UnavailableError("JAX has no GPU here") from None
    return jax.device_put(jax.numpy.asarray(x, dtype=problem.dtype), device)


def _to_cupy(cupy: Any, x: np.ndarray, problem: Problem) -> Array:
    if problem.device != "cuda":
        raise UnavailableError("CuPy computes on a GPU only")
    if problem.dtype == "bfloat16":
        raise UnavailableError("CuPy has no bfloat16")
    try:
        return cupy.asarray(x, dtype=problem.dtype)
    except Exception as error:  # CuPy has no common base class for a missing driver or device
        raise UnavailableError(
            f"CuPy has no GPU here: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
