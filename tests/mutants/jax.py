"""JAX, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, bound, second

MUTANTS = (
    Mutant("JAX: nothing is held constant", "return jax.lax.stop_gradient(x)", "return x", second("DiVeQ", "jax")),
    Mutant(
        "JAX: gradients of a custom radius swapped",
        "return to_q, to_z",
        "return to_z, to_q",
        bound("callable", "jax"),
        within="JaxBackend.log_radius_gradients",
    ),
    Mutant(
        "JAX: repeated indices lost",
        'total.at[segments].add(values, mode="drop"',
        'total.at[segments].set(values, mode="drop"',
        bound("DiVeQ", "jax"),
    ),
    Mutant(
        "JAX: sign of the pullback",
        "(*kept, ad.instantiate_zeros(g))",
        "(*kept, -ad.instantiate_zeros(g))",
        bound("DiVeQ", "jax"),
    ),
    Mutant(
        "JAX: the pushforward's residuals held constant",
        "return out, moved + linear",
        "return out, linear",
        "test_second_order.py jax_hessian",
    ),
    Mutant(
        "JAX: the pushforward's tangents held constant",
        "return out, moved + linear",
        "return out, moved",
        "test_second_order.py jax_hessian",
    ),
    Mutant(
        "JAX: pushforward of the codebook by that of z",
        "pushforward_p.bind(*kept, dz, dcodebook, rule=own)",
        "pushforward_p.bind(*kept, dz, 0 * dcodebook, rule=own)",
        "test_estimators.py pushes_forward and jax and DiVeQ",
    ),
    Mutant(
        "JAX: an unsigned index wraps to the mark",
        "x = jnp.minimum(x, jnp.asarray(jnp.iinfo(jnp.int32).max, x.dtype))",
        "x = jnp.maximum(x, jnp.asarray(0, x.dtype))",
        "test_compose_dtypes.py out_of_range and jax and uint32",
    ),
)
