"""Hypothesis strategies: one quantization with everything that can be asked of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

    from libraries import Library


# Few, because JAX compiles for each: (shape of z, K). With one row, one column and one codeword among them.
SHAPES = (((5, 3), 4), ((1, 1), 1), ((2, 3, 8), 2), ((7, 2), 3))


@dataclass(frozen=True)
class Problem:
    """Inputs (z, codebook, indices, noise), a cotangent g and tangents (dz, dcodebook); float64."""

    z: np.ndarray
    codebook: np.ndarray
    indices: np.ndarray
    noise: np.ndarray
    g: np.ndarray
    dz: np.ndarray
    dcodebook: np.ndarray

    @property
    def width(self) -> int:
        return self.z.shape[-1]

    @property
    def q(self) -> np.ndarray:
        return self.codebook[self.indices]

    def rounded(self, dtype: str) -> Problem:
        """The same in a dtype's numbers, float64 still: what a library is given is what the reference gets."""
        values = {f.name: round_to(getattr(self, f.name), dtype) for f in fields(self) if f.name != "indices"}
        return replace(self, **values)

    def scaled(self, scale: float) -> Problem:
        """Vectors and codewords times ``scale``; their tangents likewise."""
        scaled = {name: getattr(self, name) * scale for name in ("z", "codebook", "dz", "dcodebook")}
        return replace(self, **scaled)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        # To nearest, ties to even, as the hardware does.
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return kept.astype(np.uint32).view(np.float32).astype(np.float64)
    return x.astype(dtype).astype(np.float64)


def brute_force(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Nearest codewords by differences in float64."""
    d = z.astype(np.float64)[..., None, :] - codebook.astype(np.float64)
    return np.argmin(np.sum(d * d, axis=-1), axis=-1)


@st.composite
def problems(draw: st.DrawFn, *, away: bool = False, shapes: Sequence[tuple] = SHAPES, lost: bool = True) -> Problem:
    """A problem; with ``away``, no coordinate of q - z is near zero; without ``lost``, no vector is a codeword."""
    shape, count = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # On the grid coordinates coincide, vectors are parallel and ties are exact.
    grid = draw(st.booleans()) and not away and lost

    def values(shape: tuple[int, ...]) -> np.ndarray:
        if grid:
            return rng.choice([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], shape)
        return rng.standard_normal(shape)

    codebook = values((count, shape[-1]))
    if count > 1 and draw(st.booleans()):
        codebook[-1] = codebook[0]
    z = values(shape)
    choice = draw(st.sampled_from(["nearest", "all one", "any"]))
    if choice == "nearest":
        indices = brute_force(z, codebook)
    elif choice == "all one":
        indices = np.full(shape[:-1], count - 1)
    else:
        indices = rng.integers(0, count, shape[:-1])
    if away:
        z = codebook[indices] + rng.choice([-1.0, 1.0], shape) * rng.uniform(0.25, 2.0, shape)
    elif lost and draw(st.booleans()):
        rows = rng.random((*shape[:-1], 1)) < 0.5
        z = np.where(rows, codebook[indices], z)
    noise, g, dz = (rng.standard_normal(shape) for _ in range(3))
    return Problem(z, codebook, indices, noise, g, dz, rng.standard_normal(codebook.shape))


EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""Relative error of one rounding to nearest."""

ROUNDINGS = 48
"""Roundings between input and output, relative to the sum of magnitudes that is rounded: with rows of at most
8 numbers and batches of at most 7 rows, two sums of 8, a sum of 7, two roots or powers of 2 ulp each, and a
dozen products and quotients."""

SECOND_ROUNDINGS = 4 * ROUNDINGS
"""The same for a derivative of the pullback, whose every factor is itself such a sum."""


def dtypes_of(library: Library) -> list[str]:
    """Names of the dtypes that a library has."""
    has = {
        "float32": True,
        # JAX has it inside `precision` only, where the fixture has it nowhere.
        "float64": library.float64 or library.name == "jax",
        "float16": library.float16,
        "bfloat16": library.bfloat16 is not None,
    }
    return [name for name, present in has.items() if present]


def precision(library: Library, dtype: str) -> contextlib.AbstractContextManager:
    """Where a dtype exists: JAX has float64 inside a context only."""
    if library.name == "jax" and dtype == "float64":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def to_library(library: Library, x: np.ndarray, dtype: str) -> Any:
    """An array of the library in a dtype, bfloat16 included."""
    if dtype != "bfloat16":
        return library.to(x.astype(dtype))
    return library.cast(library.to(x.astype(np.float32)), library.bfloat16)


def assert_within(actual: Any, expected: np.ndarray, sizes: np.ndarray, dtype: str, library: Library, n: int) -> None:
    """Check library, dtype and shape, and values to ``n`` roundings of the sum of magnitudes ``sizes``.

    The 16-bit dtypes are computed in float32 and rounded once at the end.
    """
    assert isinstance(actual, type(library.to(np.zeros(1, np.float32)))), f"not of {library.name}: {type(actual)}"
    assert str(actual.dtype).endswith(dtype)
    assert tuple(actual.shape) == expected.shape
    computed = "float64" if dtype == "float64" else "float32"
    tolerance = n * EPS[computed] * np.broadcast_to(sizes, expected.shape)
    if computed != dtype:
        # One rounding of the result; below the normal numbers the spacing of float16 is 2^-24.
        tolerance = tolerance + EPS[dtype] * np.abs(expected) + (2.0**-25 if dtype == "float16" else 0)
    # What lies below the normal numbers may be flushed to zero, in each addend of a sum over vectors.
    tolerance = tolerance + 16 * (2.0**-1022 if computed == "float64" else 2.0**-126)
    error = np.abs(library.back(actual).astype(np.float64) - expected)
    assert np.all(error <= tolerance), f"off by {np.max(error)}, at most {np.max(tolerance)} allowed"


def example_count(share: float = 1.0) -> int:
    """Examples for a test that is slow for each: a share of the profile's."""
    return max(3, int(settings.default.max_examples * share))
