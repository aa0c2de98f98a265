"""JAX for diveq_core: eager and under every transformation, x64 on or off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diveq_core.arrays.backend import Backend
from diveq_core.arrays.rows import describe, safe_log
from diveq_jax import sharding
from diveq_jax.bind import quantize
from diveq_jax.search import nearest_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


# Without those of 8 bits and less, which promote with no other.
_FLOATING = frozenset(np.dtype(x) for x in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


class JaxBackend(Backend):
    """JAX."""

    def __init__(self) -> None:
        super().__init__(jnp, "jax")

    def owns(self, x: object) -> bool:
        return isinstance(x, jax.Array) or _stands_for_array(x)

    def quiet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # What stands for an array, a parameter of a layer say, is one from here on.
        def call(*args: Any, **options: Any) -> Any:
            args, options = jax.tree.map(_array, (args, options), is_leaf=_stands_for_array)
            return function(*args, **options)

        return call

    def is_floating(self, x: jax.Array) -> bool:
        return x.dtype in _FLOATING

    def result_dtype(self, a: jax.Array, b: jax.Array) -> Any:
        if a.dtype == b.dtype:
            return a.dtype
        # Every cast that follows is written out, which is what those ask for who set it to "strict".
        with jax.numpy_dtype_promotion("standard"):
            return super().result_dtype(a, b)

    def as_indices(self, x: jax.Array) -> jax.Array:
        if x.dtype in (jnp.int32, jnp.int64):
            return x
        if x.dtype in (jnp.uint32, jnp.uint64):
            # What would wrap is out of range, and must not become the mark -1.
            x = jnp.minimum(x, jnp.asarray(jnp.iinfo(jnp.int32).max, x.dtype))
        return x.astype(jnp.int32)

    def is_concrete(self, x: jax.Array) -> bool:
        return not isinstance(x, jax.core.Tracer)

    def to_numpy(self, x: jax.Array) -> Any:
        return np.asarray(x.astype("float32") if x.dtype == jnp.bfloat16 else x)

    def copy(self, x: jax.Array) -> jax.Array:
        # Also of what cannot change: a buffer can be donated.
        return jnp.array(x, copy=True)

    def place(self, x: jax.Array) -> dict[str, Any]:
        return {}

    def stop_gradient(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x)

    def standard_normal(self, function: str, z: jax.Array, rng: Any) -> jax.Array:
        if rng is None:
            raise TypeError(
                f"{function}: JAX has no default random stream; expected noise= of shape {tuple(z.shape)} or "
                f"rng=jax.random.key(seed), got neither"
            )
        _check_key(function, rng)
        return sharding.placed_like(jax.random.normal(rng, z.shape, z.dtype), z)

    def streams(self, function: str, rng: Any, count: int) -> list[Any]:
        if rng is None:
            return [None] * count
        _check_key(function, rng)
        return list(jax.random.split(rng, count))

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return sharding.matmul(a, b)

    def snapshot(self, x: jax.Array) -> jax.Array:
        return x

    def records(self, *arrays: jax.Array) -> bool:
        return True

    def sums_in_parts(self, x: jax.Array) -> bool:
        # On a mesh each device has its part.
        return not any(jax.typeof(x).sharding.spec)

    def segment_add(self, total: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
        return sharding.add_rows(total, values, segments)

    def row_keys(self, codebook: jax.Array) -> jax.Array:
        # Adding zero makes -0.0 and 0.0 one key, as they are one number. Integer sums are exact in any order.
        bits = jax.lax.bitcast_convert_type(codebook + 0.0, jnp.uint32).reshape(codebook.shape[0], -1)
        numbers = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32)[None, :]

        def key(odd: int) -> jax.Array:
            mixed = bits * (numbers + jnp.uint32(odd))
            # Bits of few patterns, of signs say, would meet in a sum that is linear in them.
            return jnp.sum((mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B), axis=1, dtype=jnp.uint32)

        # Of 32 bits one would meet another by chance among some ten thousand codewords.
        first, second = (self.first_equal(key(odd)).astype(jnp.uint32) for odd in (0x9E3779B9, 0x7FEB352D))
        if codebook.shape[0] <= 1 << 16:
            return first * jnp.uint32(codebook.shape[0]) + second
        mixed = first * jnp.uint32(0x9E3779B9)
        return (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B) + second * jnp.uint32(0x7FEB352D)

    def take_rows(self, codebook: jax.Array, indices: jax.Array) -> jax.Array:
        return sharding.take_rows(codebook, indices)

    def nan_where(self, condition: jax.Array, x: jax.Array) -> jax.Array:
        # No array of NaN by itself, at which `jax_debug_nans` would raise.
        return jnp.where(condition, jnp.nan, x)

    def search(self, z: jax.Array, codebook: jax.Array) -> jax.Array:
        return nearest_rows(self.stop_gradient(z), self.stop_gradient(codebook))

    def bind(
        self, rule: Bindable, z: jax.Array, codebook: jax.Array, indices: jax.Array, noise: jax.Array | None
    ) -> jax.Array:
        if not any(isinstance(x, jax.core.Tracer) for x in (z, codebook, indices, noise)):
            # Nothing is differentiated, and a primitive takes as long as a small rule.
            return rule.forward(z, codebook, indices, noise)
        return quantize(rule, *sharding.varying(z, codebook, indices, noise))

    def log_radius_gradients(
        self, r: Callable[[Any, Any], Any], q: jax.Array, z: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        log_r, pullback = jax.vjp(lambda q, z: safe_log(self, r(q, z)), q, z)
        to_q, to_z = pullback(jnp.ones_like(log_r))
        return to_q, to_z


def _array(x: Any) -> Any:
    return x.__jax_array__() if _stands_for_array(x) else x


def _stands_for_array(x: object) -> bool:
    return hasattr(type(x), "__jax_array__") and not isinstance(x, jax.Array)


def _check_key(function: str, rng: object) -> None:
    if not isinstance(rng, jax.Array):
        raise TypeError(f"{function}: rng must be a JAX key for JAX arrays, got {describe(rng)}")
    # One of jax.random.key(), or of the older jax.random.PRNGKey().
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim == 0
    if not typed and (rng.dtype != jnp.uint32 or rng.ndim != 1):
        raise TypeError(
            f"{function}: rng must be a JAX key for JAX arrays, got an array {rng.dtype} of shape {rng.shape}"
        )


backend = JaxBackend()
