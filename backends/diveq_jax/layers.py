r"""What the layers of JAX's frameworks share: a step in training, with the upkeep of arrays that cannot be overwritten.

.. math:: E' = \bar E + (E - \operatorname{sg}(E))

is a codebook that becomes :math:`\bar E` exactly, while its gradient goes to the array E that it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from diveq_core.layers import beginning, step, upkeep
from diveq_jax import sharding

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.layers.results import Forward
    from diveq_core.layers.settings import Settings
    from diveq_core.layers.words import State


def by_gradient(settings: Settings) -> bool:
    """Whether that array is trained by gradients."""
    return settings.table in settings.parameters


def trained(
    settings: Settings, state: State, z: Any, mask: Any, noise: Any, key: Any, axis_name: Any
) -> tuple[Forward, State]:
    """One step in training, and the state after it.

    Parameters
    ----------
    settings, state, z, mask, noise
        As in `diveq_core.layers.forward`.
    key : JAX key or None
    axis_name : hashable, tuple of hashable or None
        Of `jax.vmap` or `jax.shard_map`, over which all is summed.

    Returns
    -------
    out : Forward
    state : dict of array
        Parameters of the gradient of those before, so that a model may call its layer again; the others of none.

    Raises
    ------
    TypeError
        If there is no key where something is drawn.
    """
    noisy = noise is None and getattr(settings.estimator, "noisy", False)
    if key is None and (noisy or settings.from_data or settings.quantizer_dropout or settings.replaces):
        raise TypeError("VectorQuantizer: key must be a JAX key in training, as jax.random.key(0) is one, got None")
    to_start, to_step, to_update = [None] * 3 if key is None else jax.random.split(key, 3)
    if axis_name is not None and to_step is not None:
        # Others' vectors, other noise.
        to_step = jax.random.fold_in(to_step, jax.lax.axis_index(axis_name))
    state = _begun(settings, state, z, mask, to_start, axis_name)
    out = step.forward(settings, state, z, train=True, mask=mask, noise=noise, rng=to_step)
    return out, _updated(settings, state, out.statistics, to_update, axis_name)


def _begun(settings: Settings, state: State, z: Any, mask: Any, key: Any, axis_name: Any) -> State:
    """The state with a first codebook from data, where it has not begun."""
    if not settings.from_data:
        return state
    held, z = _constant(state), jax.lax.stop_gradient(z)

    def start(held: State, z: Any, mask: Any, key: Any) -> State:
        return beginning.start(settings, held, z, mask=mask, rng=key, all_reduce=summed(axis_name))

    def begun(held: State, *given: Any) -> State:
        return jax.lax.cond(held["started"], lambda held, *_: held, start, held, *given)

    if isinstance(held["started"], jax.core.Tracer):
        return _changed(settings, state, held, sharding.divided(begun, held, z, mask, key))
    if bool(held["started"]):
        return state
    return _changed(settings, state, held, sharding.divided(start, held, z, mask, key))


def _updated(settings: Settings, state: State, statistics: Any, key: Any, axis_name: Any) -> State:
    """The state after `diveq_core.layers.update`, which draws on schedule alone."""
    held, statistics = _constant(state), jax.tree.map(jax.lax.stop_gradient, statistics)

    def update(replace: bool) -> State:
        options = {"rng": key, "all_reduce": summed(axis_name), "replace": replace}
        return upkeep.update(settings, held, statistics, **options)

    if not settings.replaces:
        return _changed(settings, state, held, update(False), codebook=False)
    due = (held["steps"] + 1) % settings.replace_every == 0
    if isinstance(due, jax.core.Tracer):
        return _changed(settings, state, held, jax.lax.cond(due, lambda: update(True), lambda: update(False)))
    return _changed(settings, state, held, update(bool(due)), codebook=bool(due))


def _constant(state: State) -> State:
    return {name: jax.lax.stop_gradient(x) for name, x in state.items()}


def _changed(settings: Settings, state: State, held: State, new: State, codebook: bool = True) -> State:
    """The state with new arrays; gradients of a codebook that is new go to the one that there was."""
    after = state | {name: new[name] for name in settings.buffers}
    if codebook and by_gradient(settings):
        name = settings.table
        after[name] = new[name] + (state[name] - held[name])
    return after


def summed(axis_name: Any) -> Callable[[jax.Array], jax.Array] | None:
    """Sum over axes of `jax.vmap` or `jax.shard_map`; None where there is none."""
    return None if axis_name is None else lambda x: jax.lax.psum(x, axis_name)


def of_extra(framework: str) -> ImportError:
    """The error of a layer whose framework is not installed."""
    return ImportError(f"diveq_jax.{framework} needs {framework}; pip install 'diveq-core[jax,{framework}]'")
