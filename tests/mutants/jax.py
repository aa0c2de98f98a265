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
    Mutant(
        "JAX's layers: a codebook that may change loses its gradient",
        "new[name] + (state[name] - held[name])",
        "new[name] + 0 * state[name]",
        "test_flax.py called_twice",
    ),
    Mutant(
        "JAX's layers: nothing is summed over the axis",
        "lambda x: jax.lax.psum(x, axis_name)",
        "lambda x: jax.lax.pmax(x, axis_name)",
        "test_flax.py under_vmap",
    ),
    Mutant(
        "JAX's layers: what a step changed of a parameter is forgotten",
        "stays, shift = new[name] == held[name],",
        "stays, shift = new[name] == new[name],",
        "test_equinox.py first_batch",
    ),
    Mutant(
        "JAX's layers: replaced between the schedule's steps",
        'due = (held["steps"] + 1) % settings.replace_every == 0',
        'due = held["steps"] % settings.replace_every == 0',
        "test_equinox.py replaced_by_the_step",
    ),
    Mutant(
        "JAX: each device takes its first rows from an explicit mesh",
        "own = indices - jax.lax.axis_index(lies[0]) * codebook.shape[0]",
        "own = indices",
        "test_jax_meshes.py a_layer",
    ),
)
