"""The array libraries the experiment runs in, each imported only when asked for.

Everything is computed in float64: rounding then stays far below what a table shows, so that all libraries, and
graphics processors with their shortened float32 products, print the same one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.compare.settings import CompareError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from diveq_core.arrays.rows import Array


@dataclass(frozen=True)
class Library:
    """What the experiment needs of a library beyond the array API standard."""

    name: str
    version: str
    device: str
    array: Callable[[np.ndarray], Array]
    """An array of the library from one of NumPy."""

    numpy: Callable[[Array], np.ndarray]
    """And back."""

    session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Context in which to compute."""

    compile: Callable[[Callable], Callable] = lambda function: function
    """A faster form of a pure function of arrays."""


@contextlib.contextmanager
def _numpy_session() -> Any:
    from threadpoolctl import threadpool_limits

    # The matrices are too small to share between cores: waiting for each other costs more than it saves.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        yield


def _numpy() -> Library:
    return Library("NumPy", np.__version__, "CPU", np.asarray, np.asarray, _numpy_session)


def _torch() -> Library:
    import torch

    @contextlib.contextmanager
    def session() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(threads)

    device = torch.get_default_device()
    return Library(
        "PyTorch",
        torch.__version__,
        str(device).upper(),
        lambda x: torch.tensor(x, device=device),
        lambda x: x.numpy(force=True),
        session,
    )


def _jax() -> Library:
    import jax

    return Library(
        "JAX",
        jax.__version__,
        jax.default_backend().upper(),
        jax.numpy.asarray,
        np.asarray,
        lambda: jax.enable_x64(True),
        jax.jit,
    )


def _cupy() -> Library:
    import cupy

    try:
        cupy.zeros(1)
        device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    except Exception as error:  # CuPy has no common base class for a missing driver or device
        raise CompareError(
            f"--backend cupy needs a CUDA device, got none: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    return Library("CuPy", cupy.__version__, device, cupy.asarray, cupy.asnumpy)


LIBRARIES: dict[str, Callable[[], Library]] = {"numpy": _numpy, "torch": _torch, "jax": _jax, "cupy": _cupy}


def load_library(name: str) -> Library:
    """The library of that name.

    Raises
    ------
    CompareError
        If the name is unknown, or the library is not installed or has no device.
    """
    if name not in LIBRARIES:
        raise CompareError(f"--backend must be one of {', '.join(LIBRARIES)}, got {name!r}")
    try:
        return LIBRARIES[name]()
    except ImportError as error:
        raise CompareError(
            f'--backend {name} needs {name} installed (pip install "diveq-core[{name}]"), got: '
            f"{str(error).splitlines()[0]}"
        ) from None
