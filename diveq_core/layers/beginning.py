r"""The state of a layer before its first step: its arrays, and its first codebook from data.

Pure functions; over several ranks every rank begins with the same codebook.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, flat_rows
from diveq_core.arrays.draws import normal, uniform
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.codebook.clustering import kmeans
from diveq_core.codebook.first_curve import tour
from diveq_core.codebook.ranks import Ranks
from diveq_core.layers.auxiliary import of_head
from diveq_core.layers.run import Step, check_settings
from diveq_core.layers.words import State, joined

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Shape
    from diveq_core.layers.settings import Settings

# Lloyd's iterations of a start by k-means.
_ITERATIONS = 10


@quiet
def init(settings: Settings, like: Array, /, *, noise: Array | None = None, rng: Any = None) -> State:
    r"""The first state of a layer.

    .. math:: E_{kj} \sim \mathcal N(0, 1/D), \qquad W \sim \mathcal N(0, 1/D_{\text{in}}), \qquad b = 0

    Parameters
    ----------
    settings : Settings
    like : array
        An array whose library, dtype (at least float32) and device the state gets.
    noise : array (M,), optional
        Standard normal numbers, ``noise_size(settings)`` of them; the same give the same state in every library.
    rng : optional
        The library's own generator or key, as in `quantize`.

    Returns
    -------
    dict of array
        Of the names and shapes of ``settings.shapes``. ``steps`` counts steps in int32, ``started`` is bool, all others
        are floating.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit.
    """
    check_settings("init", settings)
    lib = backend_of("init", like=like)
    check_floating(lib, "init", like=like)
    dtype, place = lib.compute_dtype(like.dtype), lib.place(like)
    drawn = normal(lib, "init", like, (noise_size(settings),), noise, rng)
    xp, state, used = lib.xp, {}, 0
    for name, shape in settings.shapes.items():
        if name == "steps":
            state[name] = xp.zeros((), dtype=xp.int32, **place)
        elif name == "started":
            state[name] = xp.zeros((), dtype=lib.bool_dtype, **place)
        elif name == "weight":
            identity = xp.eye(shape[-1], dtype=dtype, **place)
            state[name] = lib.copy(xp.broadcast_to(identity, shape))
        elif name in _DRAWN:
            count = math.prod(shape)
            scale = (shape[-1] if name in ("codewords", "embedding") else shape[0]) ** -0.5
            state[name] = lib.copy(xp.reshape(drawn[used : used + count], shape) * scale)
            used += count
        else:
            state[name] = xp.zeros(shape, dtype=dtype, **place)
    if "averages" in state:
        state["averages"] = lib.copy(state["codewords"])
    return state


_DRAWN = ("codewords", "embedding", "in_weight", "out_weight")


def noise_size(settings: Settings) -> int:
    """How many numbers `init` draws."""
    return sum(math.prod(shape) for name, shape in settings.shapes.items() if name in _DRAWN)


@quiet
def start(
    settings: Settings,
    state: State,
    z: Array,
    /,
    *,
    mask: Array | None = None,
    noise: Array | None = None,
    rng: Any = None,
    all_reduce: Callable[[Array], Array] | None = None,
) -> State:
    """The state with a codebook from data: vectors of a batch, or what k-means makes of those.

    Parameters
    ----------
    settings, state, z, mask
        As in `forward`. Vectors that are masked or not finite are left out. Stages begin with what those before
        them leave.
    noise : array (P, K, 2), optional
        Standard normal numbers for the draws of the P codebooks.
    rng, all_reduce
        As in `kmeans`. A rank may have no vector.

    Returns
    -------
    dict of array
        With ``started`` set; the state as it was where no rank has a finite vector.

    Raises
    ------
    TypeError, ValueError
        As `forward`.
    """
    step = Step("start", settings, state, z, mask)
    lib = step.lib
    if not settings.from_data:
        raise ValueError(f"start: settings must have init data or kmeans, got init={settings.init!r}")
    xp, ranks = lib.xp, Ranks(lib, "start", all_reduce)
    x = lib.stop_gradient(step.enter(False)[0])
    count, places = settings.codebook_size or 0, settings.codebooks
    draws = ranks.noise(x, (len(places), count, 2), noise, rng)
    rows = flat_rows(lib, x)
    valid = xp.all(xp.isfinite(rows), axis=1)
    if step.keep is not None:
        valid = xp.logical_and(valid, xp.reshape(step.keep, (rows.shape[0],)))
    there = ranks.sum(xp.sum(xp.astype(valid, x.dtype))) > 0
    if lib.is_concrete(there) and not bool(there):
        return state
    groups = [of_head(settings, rows, head) for head in range(settings.heads)]
    if settings.shared and settings.heads > 1:
        groups, valid = [xp.concat(groups)], xp.concat([valid] * settings.heads)
    found: dict[Shape, Array] = {}
    for number, own in enumerate(places):
        head = own[0] if settings.heads > 1 and not settings.shared else 0
        e = _begun(ranks, settings, groups[head], valid, draws[number, ...])
        found[own] = e
        if settings.stages > 1:
            chosen = lib.search(groups[head], e)
            groups[head] = groups[head] - lib.take_rows(e, xp.where(valid, chosen, xp.zeros_like(chosen)))
    words = joined(lib, settings, found)
    state = dict(state)
    for name in ("codewords", "embedding", "averages"):
        if name in state:
            state[name] = xp.where(there, lib.astype(words, state[name].dtype), state[name])
    state["started"] = xp.logical_or(state["started"], there)
    return state


def _begun(ranks: Ranks, settings: Settings, rows: Array, valid: Array, noise: Array) -> Array:
    """One codebook from rows (N, D)."""
    lib, xp = ranks.lib, ranks.lib.xp
    count = noise.shape[0]
    number = xp.astype(xp.arange(count, **lib.place(rows)), rows.dtype)
    # One vector from each of K equal parts of the batch.
    positions = (number + uniform(lib, noise)) / count
    e = ranks.draw(rows, xp.astype(valid, rows.dtype), positions)
    if settings.init == "kmeans":
        # What is not finite is left out there; a row of it stands for no vector at all.
        marked = lib.nan_where(xp.logical_not(valid)[:, None], rows)
        none = lib.nan_where(xp.ones_like(e[:1, :]) > 0, e[:1, :])
        e = kmeans(xp.concat([marked, none]), e, iterations=_ITERATIONS, all_reduce=ranks.all_reduce).codebook
    return lib.take_rows(e, tour(lib, e)) if settings.on_curve else e
