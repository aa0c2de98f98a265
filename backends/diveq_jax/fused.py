r"""The search on a GPU in one Pallas kernel, which keeps the running minimum in registers.

.. math:: i = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle

Scores exist a tile at a time and are never written. Float32 is multiplied in float32, not in TF32. Vectors
and codewords of one 16-bit dtype are multiplied by the tensor cores, with sums in float32, where the
codebook's centre is zero, as only then centring keeps them in 16 bits.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from diveq_core.arrays import search

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend

# Wider, the arithmetic of float32 hides the writing of scores, and the library's product does it faster.
_WIDEST = 256

_HALF = (jnp.float16, jnp.bfloat16)


def serves(z: jax.Array, codebook: jax.Array) -> bool:
    """Whether the kernel may take part in the search, on the devices at hand; by shape and dtype alone."""
    narrow = z.dtype == codebook.dtype and z.dtype in _HALF
    longest = max(z.shape[0], codebook.shape[0]) + 128
    return (
        all(_capability(device) >= (8, 0) for device in jax.devices())
        and jnp.float64 not in (z.dtype, codebook.dtype)
        and z.shape[0] > 0
        and (narrow or codebook.shape[1] <= _WIDEST)
        # Offsets in the kernel have 32 bits.
        and longest * (codebook.shape[1] + 64) < 1 << 31
    )


def _capability(device: Any) -> tuple[int, ...]:
    """Compute capability of a CUDA device, (0,) for any other."""
    if device.platform != "gpu" or "cuda" not in getattr(device.client, "platform_version", "").lower():
        return (0,)
    return tuple(int(part) for part in device.compute_capability.split("."))


def nearest_rows(lib: Backend, z: jax.Array, codebook: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int32; -1 for a row that is not finite."""
    words = codebook.astype(jnp.float32)
    centre, scale = search.frame(lib, words)
    canonical = search.first_copies(lib, words)
    e = search.framed(lib, words, centre, scale)
    half_squares = jnp.sum(e * e, axis=1) * 0.5

    def full(z: jax.Array) -> jax.Array:
        y, weights = search.framed_rows(lib, z.astype(jnp.float32), centre, scale)
        return _nearest(y, weights, e, half_squares, jnp.ones((1,), jnp.float32), interpret=interpret)

    def narrow(z: jax.Array) -> jax.Array:
        # Scaled codewords fit bfloat16 and not float16, whose products are scaled instead.
        inner = scale if z.dtype == jnp.bfloat16 else jnp.ones_like(scale)
        y, weights = search.framed_rows(lib, z.astype(jnp.float32), jnp.zeros_like(centre), inner)
        e = (words * inner).astype(z.dtype)
        outer = ((scale / inner) ** 2)[None]
        return _nearest(y.astype(z.dtype), weights, e, half_squares, outer, interpret=interpret)

    if z.dtype == codebook.dtype and z.dtype in _HALF:
        chosen = jax.lax.cond(jnp.any(centre != 0), full, narrow, z)
    else:
        chosen = full(z)
    return jnp.where(chosen < 0, -1, canonical[chosen])


def _nearest(
    y: jax.Array, weights: jax.Array, e: jax.Array, half_squares: jax.Array, scale: jax.Array, *, interpret: bool
) -> jax.Array:
    """Index of the least ``weight half_squares - scale <y, e>``, (N,) int32; -1 for a row that is not finite."""
    n, width = y.shape
    count = e.shape[0]
    rows, columns = (64, 64) if y.dtype == jnp.float32 else (128, 64)
    # The product takes powers of two, no side shorter than 16.
    depth = _power(width) if width <= 64 else 32 if y.dtype == jnp.float32 else 64
    n_more, count_more, width_more = -n % rows, -count % columns, -width % depth
    # A row with an entry that is not finite has no finite score, and any other has no other.
    lost = ~jnp.all(jnp.isfinite(y), axis=1)
    y = jnp.pad(y, ((0, n_more), (0, width_more)))
    e = jnp.pad(e, ((0, count_more), (0, width_more)))
    weights = jnp.pad(weights[:, 0], (0, n_more))
    # Of no codeword, at the end; infinite times a weight of 0 would be NaN.
    half_squares = jnp.pad(half_squares, (0, count_more))
    # As an expression of both, which tells over what axes of a device mesh it varies.
    out_shape = jax.eval_shape(lambda y, e: jnp.full(n + n_more, y[0, 0] * e[0, 0]).astype(jnp.int32), y, e)
    chosen = pl.pallas_call(
        functools.partial(_kernel, count=count, columns=columns, depth=depth),
        out_shape=out_shape,
        grid=((n + n_more) // rows,),
        in_specs=[
            pl.BlockSpec((rows, y.shape[1]), lambda i: (i, 0)),
            pl.BlockSpec((rows,), lambda i: (i,)),
            pl.BlockSpec(e.shape, lambda i: (0, 0)),
            pl.BlockSpec(half_squares.shape, lambda i: (0,)),
            pl.BlockSpec((1,), lambda i: (0,)),
        ],
        out_specs=pl.BlockSpec((rows,), lambda i: (i,)),
        compiler_params=pallas_triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="diveq_nearest",
    )(y, weights, e, half_squares, scale)
    return jnp.where(lost, -1, chosen[:n])


def _kernel(
    y_ref: Any,
    weights_ref: Any,
    e_ref: Any,
    half_squares_ref: Any,
    scale_ref: Any,
    chosen_ref: Any,
    *,
    count: int,
    columns: int,
    depth: int,
) -> None:
    rows, width = y_ref.shape
    scale, weights = scale_ref[...], weights_ref[...]
    whole = y_ref[...] if width == depth else None

    def tile(t: Any, running: Any) -> Any:
        best, chosen = running
        here = pl.ds(t * columns, columns)

        def add_products(s: Any, products: Any) -> Any:
            part = pl.ds(s * depth, depth)
            y = y_ref[:, part] if whole is None else whole
            e = e_ref[here, part].T
            return products + jnp.dot(y, e, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

        products = _for(width // depth, add_products, jnp.zeros((rows, columns), jnp.float32))
        scores = half_squares_ref[here][None, :] * weights[:, None] - products * scale[:, None]
        present = t * columns + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < count
        scores = jnp.where(present, scores, jnp.inf)
        nearest = jnp.min(scores, axis=1)
        position = jax.lax.argmin(scores, 1, jnp.int32)
        closer = nearest < best
        return jnp.where(closer, nearest, best), jnp.where(closer, t * columns + position, chosen)

    start = (jnp.full(rows, jnp.inf, jnp.float32), jnp.zeros(rows, jnp.int32))
    _, chosen_ref[...] = _for(e_ref.shape[0] // columns, tile, start)


def _for(count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
    """``fori_loop`` with counters of 32 bits, also where x64 is on."""
    return jax.lax.fori_loop(np.int32(0), np.int32(count), step, start)


def _power(width: int) -> int:
    """Power of two not below the width, and at least 16."""
    return max(1 << (width - 1).bit_length(), 16)
