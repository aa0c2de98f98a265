r"""What is done to the state of a layer between steps: averages, counts, replacement.

.. math:: n_k \leftarrow m n_k + (1 - m) c_k, \qquad E_k \leftarrow E_k + \frac{1 - m}{n_k} s_k

Pure, state in and state out. Over several ranks everything that is added up goes through ``all_reduce``, and every
rank ends with the same state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.registry import quiet
from diveq_core.arrays.rows import describe
from diveq_core.codebook.averages import EMAState, rates
from diveq_core.codebook.ranks import Ranks
from diveq_core.codebook.replacement import replace_unused
from diveq_core.layers.results import Statistics
from diveq_core.layers.run import checked_state
from diveq_core.layers.words import State, at, joined

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Shape
    from diveq_core.layers.settings import Settings

# How often each codeword must have been chosen on average before one that was not counts as unused.
_USES = 10


@quiet
def update(
    settings: Settings,
    state: State,
    statistics: Statistics,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    all_reduce: Callable[[Array], Array] | None = None,
    replace: bool | None = None,
) -> State:
    r"""The state after a step: moving averages, counts, and on schedule the replacement of unused codewords.

    .. math:: n_k \leftarrow m n_k + (1 - m) c_k, \qquad E_k \leftarrow E_k + \frac{1 - m}{n_k} s_k

    with the counts :math:`c` and the sums :math:`s` of the statistics.

    Parameters
    ----------
    settings, state
        As in `forward`: the state that the step had, or what a gradient step made of it.
    statistics : Statistics
        Those of `forward`, or several added up. Of no step they change nothing.
    noise : array (P, K, D + 2), optional
        Standard normal numbers for `replace_unused` of the P codebooks.
    rng : optional
        The library's own generator or key, from which it is drawn when the schedule says so. Ranks agree on what they
        draw, whatever their seeds.
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape; it may sum in place.
    replace : bool, optional
        Whether the schedule asks for replacement now, from a caller that counts steps itself; by default ``steps`` says
        so, without a branch where its value cannot be read.

    Returns
    -------
    dict of array
        What is not finite is never written: sums that are not leave their codeword as it was.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit the settings.
    """
    lib, state = checked_state("update", settings, state)
    if not isinstance(statistics, Statistics):
        raise TypeError(f"update: statistics must be a Statistics, as forward gives it, got {describe(statistics)}")
    if replace is not None and not isinstance(replace, bool):
        raise TypeError(f"update: replace must be True, False or None, got {describe(replace)}")
    if not settings.has_codebook:
        return state
    xp, ranks = lib.xp, Ranks(lib, "update", all_reduce)
    statistics = _summed(ranks, statistics)
    happened = statistics.batches > 0
    before, state = state, dict(state)
    state["steps"] = state["steps"] + xp.astype(happened, state["steps"].dtype)
    wide = lib.compute_dtype(state["usage"].dtype)
    state["usage"] = lib.astype(state["usage"], wide) + lib.astype(statistics.counts, wide)
    if settings.codebook_update == "ema":
        state |= _averaged(lib, settings, state, statistics)
        # Of no step the counts alone would change.
        state["counts"] = xp.where(happened, state["counts"], lib.astype(before["counts"], state["counts"].dtype))
    if settings.replaces and replace is not False:
        due = xp.logical_and(happened, state["steps"] % settings.replace_every == 0)
        if replace or not lib.reads_free(due) or bool(due):
            state = _replaced(ranks, settings, state, statistics.sample, due, noise, rng)
    return state


def _summed(ranks: Ranks, statistics: Statistics) -> Statistics:
    """Statistics of all ranks, in one sum, but for the sample."""
    if ranks.all_reduce is None:
        return statistics
    lib, xp = ranks.lib, ranks.lib.xp
    arrays = [x for x in statistics[:-1] if x is not None]
    dtype = arrays[-1].dtype
    flat = xp.concat([lib.astype(xp.reshape(lib.stop_gradient(x), (-1,)), dtype) for x in arrays])
    flat = ranks.sum(flat)
    at_ = 0
    found: list[Any] = []
    for x in arrays:
        size = math.prod(x.shape)
        found.append(xp.reshape(flat[at_ : at_ + size], tuple(x.shape)))
        at_ += size
    batches, counts, sums = [*found, None, None][:3]
    return Statistics(batches, counts, sums, statistics.sample)


def _averaged(lib: Backend, settings: Settings, state: State, statistics: Statistics) -> State:
    """Moving averages of all codebooks: `ema_update` from sums."""
    xp, averages = lib.xp, state["averages"]
    wide = lib.compute_dtype(averages.dtype)
    old, c, s = (lib.astype(x, wide) for x in (state["counts"], statistics.counts, statistics.sums))
    # Sums that overflowed are of no vector.
    c = xp.where(xp.all(xp.isfinite(s), axis=-1), c, xp.zeros_like(c))
    used, _, n, rate = rates(lib, old, c, settings.ema_decay)
    moved = lib.astype(averages, wide) + rate[..., None] * s
    rounded = lib.astype(moved, state["codewords"].dtype)
    written = xp.logical_and(used, xp.all(xp.isfinite(rounded), axis=-1))[..., None]
    return {
        # At least float32, also where a framework made 16 bits of the state.
        "counts": n,
        "averages": xp.where(written, moved, lib.astype(averages, wide)),
        "codewords": xp.where(written, rounded, state["codewords"]),
    }


def _replaced(
    ranks: Ranks, settings: Settings, state: State, sample: Array | None, due: Array, noise: Array | None, rng: Any
) -> State:
    """The state with its unused codewords replaced, where that is due."""
    lib, xp = ranks.lib, ranks.lib.xp
    name = settings.table
    words = lib.stop_gradient(state[name])
    count, width = settings.codebook_shape[-2:]
    noise = ranks.noise(words, (len(settings.codebooks), count, width + 2), noise, rng)
    found: dict[str, dict[Shape, Array]] = {key: {} for key in (name, "usage", "averages", "counts") if key in state}
    for number, own in enumerate(settings.codebooks):
        old = {key: at(lib.stop_gradient(state[key]), own) for key in found}
        wide = lib.compute_dtype(old[name].dtype)
        averages = None
        if "averages" in old:
            averages = EMAState(lib.astype(old["counts"], wide), lib.astype(old["averages"], wide))
        new = replace_unused(
            old[name],
            # Known to all ranks, and only their proportions matter; the sample is each rank's own.
            old["usage"],
            z=None if sample is None else at(sample, own),
            threshold=settings.replace_threshold,
            noise=noise[number, ...],
            state=averages,
            all_reduce=None if sample is None else ranks.all_reduce,
        )
        now = xp.logical_and(due, xp.sum(old["usage"]) >= _USES * count)
        values = {name: new.codebook, "usage": xp.zeros_like(old["usage"])}
        if new.state is not None:
            values |= {"averages": new.state.means, "counts": new.state.counts}
        for key, x in values.items():
            found[key][own] = xp.where(now, lib.astype(x, old[key].dtype), old[key])
    return state | {key: joined(lib, settings, pieces) for key, pieces in found.items()}
