"""The search, compiled, with a rule for ``jax.vmap`` that keeps its memory bounded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from diveq_core.arrays import search
from diveq_core.arrays.registry import backend_of
from diveq_core.options import optional_kernels
from diveq_jax import sharding

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend


@jax.custom_batching.custom_vmap
def nearest_rows(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int32; -1 for a row that is not finite."""
    return _nearest_rows(z, codebook, kernels=optional_kernels())


@nearest_rows.def_vmap
def _(axis_size: int, in_batched: list[bool], z: jax.Array, codebook: jax.Array) -> tuple[jax.Array, bool]:
    if not in_batched[1]:
        return nearest_rows(z.reshape(-1, z.shape[-1]), codebook).reshape(z.shape[:2]), True
    if not in_batched[0]:
        z = jnp.broadcast_to(z, (axis_size, *z.shape))
    return jax.lax.map(lambda pair: nearest_rows(*pair), (z, codebook)), True


@functools.partial(jax.jit, static_argnames="kernels")
def _nearest_rows(z: jax.Array, codebook: jax.Array, *, kernels: bool = True) -> jax.Array:
    lib = backend_of("nearest", z=z)
    find = functools.partial(_nearest_by_product, lib)
    if kernels and jax.default_backend() == "gpu":
        from diveq_jax import fused

        if fused.serves(z, codebook):
            kernel, default = functools.partial(fused.nearest_rows, lib), find

            def find(z: jax.Array, codebook: jax.Array) -> jax.Array:
                return jax.lax.platform_dependent(z, codebook, cuda=kernel, default=default)

    rows = sharding.rows_of(z)
    return sharding.by_device(find, z, codebook, specs=(rows, sharding.WHOLE), out=rows)


def _nearest_by_product(lib: Backend, z: jax.Array, codebook: jax.Array) -> jax.Array:
    dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
    codebook = codebook.astype(dtype)
    centre, scale = search.frame(lib, codebook)
    extended = search.extended_codebook(lib, codebook, centre, scale)
    canonical = search.first_copies(lib, codebook)

    count, width = codebook.shape
    # XLA vectorizes two minima where it does not vectorize argmin, and floats better than integers.
    positions = jnp.arange(count, dtype=jnp.float32 if count <= 1 << 24 else jnp.int32)

    def chunk(rows: Any) -> Any:
        framed = search.framed_rows(lib, rows.astype(dtype), centre, scale)
        scores = lib.matmul(jnp.concatenate(framed, axis=1), extended.T)
        best = jnp.min(scores, axis=1)
        first = jnp.min(jnp.where(scores == best[:, None], positions[None, :], positions[-1]), axis=1)
        return jnp.where(jnp.isfinite(best), canonical[first.astype(jnp.int32)], -1)

    if not isinstance(z.shape[0], int):
        return _any_number(chunk, z, lib.rows_at_least)
    rows = search.rows_per_chunk(lib, count, width)
    whole = z.shape[0] // rows * rows
    rest = chunk(z[whole:])
    # `jax.disable_jit` knows no loop of no steps.
    if whole == 0:
        return rest
    found = jax.lax.map(chunk, z[:whole].reshape(z.shape[0] // rows, rows, width)).reshape(whole)
    return jnp.concatenate([found, rest])


def _any_number(chunk: Callable[[jax.Array], jax.Array], z: jax.Array, rows: int) -> jax.Array:
    """``chunk`` of so many rows at a time, of a number of rows that an exported function leaves open."""
    count, width = z.shape
    # One more than are full, so that there is one for any number.
    chunks = count // rows + 1
    padded = jnp.pad(z, ((0, rows), (0, 0)))
    found = jax.lax.map(
        lambda start: chunk(jax.lax.dynamic_slice(padded, (start * rows, 0), (rows, width))), jnp.arange(chunks)
    )
    return found.reshape(chunks * rows)[:count]
