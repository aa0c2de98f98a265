"""Operations on arrays that lie over explicit axes of a device mesh, as their type says.

There every device does its part by itself. Without such axes all of it is plain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = PartitionSpec()
"""On every device all of an array."""


def rows_of(x: jax.Array) -> PartitionSpec:
    """Over which explicit axes the rows of an array lie."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(spec[0] if len(spec) else None)


def by_device(function: Callable[..., Any], *arrays: jax.Array, specs: tuple[Any, ...], out: PartitionSpec) -> Any:
    """``function`` of each device's parts of the arrays, cut along explicit axes as the specs say."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays if any(jax.typeof(x).sharding.spec)]
    if not meshes:
        return function(*arrays)
    placed = [jax.sharding.reshard(x, NamedSharding(meshes[0], spec)) for x, spec in zip(arrays, specs, strict=True)]
    kinds = zip(meshes[0].axis_names, meshes[0].axis_types, strict=True)
    axes = {axis for axis, kind in kinds if kind == jax.sharding.AxisType.Explicit}
    return jax.shard_map(function, mesh=meshes[0], in_specs=specs, out_specs=out, axis_names=axes)(*placed)


def divided(function: Callable[..., Any], *arrays: Any) -> Any:
    """``function`` of arrays that may lie over explicit axes, divided over the devices as JAX likes; whole results."""
    lie = any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arrays))
    return (jax.sharding.auto_axes(function, out_sharding=WHOLE) if lie else function)(*arrays)


def placed_like(x: jax.Array, model: jax.Array) -> jax.Array:
    """The array, over the explicit axes over which the model lies."""
    kind = jax.typeof(model).sharding
    return jax.sharding.reshard(x, NamedSharding(kind.mesh, kind.spec)) if any(kind.spec) else x


def take_rows(codebook: jax.Array, indices: jax.Array) -> jax.Array:
    """``codebook[indices]``; a negative index gives a row of NaN."""

    def take(codebook: jax.Array, indices: jax.Array) -> jax.Array:
        return codebook.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    rows, lies = rows_of(indices), rows_of(codebook)
    if lies[0] is None:
        return by_device(take, codebook, indices, specs=(WHOLE, rows), out=rows)

    def gathered(codebook: jax.Array, indices: jax.Array) -> jax.Array:
        # Each device gives what it has of the rows, and no device gets them all.
        own = indices - jax.lax.axis_index(lies[0]) * codebook.shape[0]
        here = jnp.logical_and(own >= 0, own < codebook.shape[0])
        found = jax.lax.psum(jnp.where(here[:, None], take(codebook, jnp.where(here, own, 0)), 0), lies[0])
        return jnp.where((indices < 0)[:, None], jnp.nan, found)

    return by_device(gathered, codebook, indices, specs=(lies, WHOLE), out=WHOLE)


def add_rows(total: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
    """``total`` plus the values at their segments; repeats add up, a negative segment is dropped."""

    def add(total: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
        return total.at[segments].add(values, mode="drop", wrap_negative_indices=False)

    rows = next((spec for spec in map(rows_of, (values, segments)) if spec[0] is not None), None)
    if rows is None:
        return add(total, values, segments)

    def summed(values: jax.Array, segments: jax.Array) -> jax.Array:
        start = jax.lax.pcast(jnp.zeros(total.shape, total.dtype), rows[0], to="varying")
        return jax.lax.psum(add(start, values, segments), rows[0])

    return total + by_device(summed, values, segments, specs=(rows, rows), out=WHOLE)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in full precision; summed over the explicit axes over which what it sums lies."""
    sharding = jax.typeof(a).sharding
    out = None
    if a.ndim == b.ndim == 2 and any(sharding.spec) and sharding.spec[1] is not None:
        out = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], jax.typeof(b).sharding.spec[1]))
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=out)


def varying(*arrays: Any) -> list[Any]:
    """The arrays, each marked as varying over all axes of a `jax.shard_map` over which one of them does.

    JAX's own operations do so where they meet arrays of both kinds; its transpose sums cotangents over the axes.
    """
    axes = frozenset().union(*(_varies_over(x) for x in arrays if x is not None))
    return [x if x is None else _marked(x, tuple(axes - _varies_over(x))) for x in arrays]


def _varies_over(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    # JAX renamed it.
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _marked(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying") if axes else x
