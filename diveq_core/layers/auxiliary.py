r"""What a step gives beside its output: the auxiliary losses, and the sums that the upkeep of a codebook needs.

.. math:: L = \frac1P \sum_p L_p(r_p, q_p), \qquad c_k = |\{n : i_n = k\}|, \qquad s_k = \sum_{n : i_n = k} (r_n - E_k)

over the P heads and stages, with r what each of them quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import flat, flat_rows
from diveq_core.diagnostics import usage
from diveq_core.layers.results import Losses, Statistics
from diveq_core.layers.words import at, joined
from diveq_core.losses import codebook_loss, codebook_loss_vjp, commitment_loss, commitment_loss_vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Shape
    from diveq_core.layers.settings import Settings
    from diveq_core.layers.words import State

_LOSSES = ((codebook_loss, codebook_loss_vjp), (commitment_loss, commitment_loss_vjp))


def auxiliary(
    lib: Backend,
    settings: Settings,
    x: Array,
    book: Any,
    seen: list[Array],
    indices: Array,
    marks: bool,
    explicit: bool,
) -> tuple[Losses, Callable[[Any], Any]]:
    """The losses of vectors (..., width), and the pullback of a cotangent to vectors and codebook."""
    weights, zero = settings.weights, lib.xp.zeros((), dtype=x.dtype, **lib.place(x))
    if not any(weights):
        return Losses(zero, None, None), lambda g: None
    values: list[Any] = [None, None]
    pullbacks = []
    for part, rows in zip(settings.parts, seen, strict=True):
        own = flat_rows(lib, x if settings.heads == 1 else of_head(settings, x, part[0]))
        if settings.stages > 1 and part[-1] > 0:
            # What the stages before it left, with their outputs held constant.
            own = own + lib.stop_gradient(rows - own)
        q, tokens = at(book, settings.own(part)), _of_part(lib, indices, part)
        counted = tokens >= 0 if marks else None
        for number, (loss, loss_vjp) in enumerate(_LOSSES):
            if weights[number] == 0:
                continue
            if explicit:
                value, pull = loss_vjp(own, q, tokens, mask=counted)
                pullbacks.append((part, number, pull))
            else:
                value = loss(own, q, tokens, mask=counted)
            values[number] = value if values[number] is None else values[number] + value
    count = len(settings.parts)
    codebook, commitment = (value if value is None or count == 1 else value / count for value in values)
    terms = [w * value for w, value in zip(weights, (codebook, commitment), strict=True) if value is not None]
    # Never one of them itself: a caller may add to it in place.
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def pullback(g: Any) -> tuple[Array, Array]:
        g_x = [lib.xp.zeros_like(seen[0]) for _ in range(settings.heads)]
        g_book = {own: lib.xp.zeros_like(at(book, own)) for own in settings.codebooks}
        for part, number, pull in pullbacks:
            g_part = pull(zero + g * (weights[number] / count))
            if number == 0:
                g_book[settings.own(part)] = g_book[settings.own(part)] + g_part
            else:
                head = part[0] if settings.heads > 1 else 0
                g_x[head] = g_x[head] + g_part
        by_head = lib.xp.concat(g_x, axis=-1) if settings.heads > 1 else g_x[0]
        return lib.xp.reshape(by_head, tuple(x.shape)), joined(lib, settings, g_book)

    return Losses(total, codebook, commitment), pullback


def statistics(
    lib: Backend, settings: Settings, state: State, seen: list[Array], indices: Array, zero: Array
) -> Statistics:
    """The sums of one step."""
    if not settings.has_codebook:
        return Statistics(zero + 1, None, None, None)
    counts = tokens_used(lib, settings, indices)
    if settings.on_curve:
        # A corner is used by the segments on both sides.
        none = lib.xp.zeros_like(counts[()][:1])
        counts[()] = lib.xp.concat([counts[()], none]) + lib.xp.concat([none, counts[()]])
    sums: dict[Shape, Any] = {}
    samples: dict[Shape, Any] = {}
    for part, rows in zip(settings.parts, seen, strict=True):
        own, tokens = settings.own(part), lib.stop_gradient(_of_part(lib, indices, part))
        if settings.codebook_update == "ema":
            total = _differences(lib, lib.stop_gradient(rows), at(state["averages"], own), tokens)
            sums[own] = total + sums[own] if own in sums else total
        if settings.samples and own not in samples:
            samples[own] = _sample(lib, lib.stop_gradient(rows), tokens, settings.codebook_shape[-2])
    pieces = (joined(lib, settings, x) if x else None for x in (counts, sums, samples))
    return Statistics(zero + 1, *pieces)


def tokens_used(lib: Backend, settings: Settings, indices: Array) -> dict[Shape, Any]:
    """How often each token of each codebook stands in an array of tokens."""
    counts: dict[Shape, Any] = {}
    for part in settings.parts:
        own = settings.own(part)
        counted = usage(lib.stop_gradient(_of_part(lib, indices, part)), settings.token_count)
        counts[own] = counted + counts[own] if own in counts else counted
    return counts


def of_head(settings: Settings, x: Array, head: int) -> Array:
    """The entries of one head."""
    width = x.shape[-1] // settings.heads
    return x[..., head * width : (head + 1) * width]


def _of_part(lib: Backend, indices: Array, part: Shape) -> Array:
    """The tokens of one head and stage, as rows (N,)."""
    own = indices[(..., *part)] if part else indices
    return flat(lib, own)


def _differences(lib: Backend, rows: Array, averages: Array, tokens: Array) -> Array:
    """Sum of the differences of vectors to the average of their codeword, (K, D)."""
    means = lib.astype(averages, rows.dtype)
    # Where no codeword was chosen, any will do: no sum has a part of it.
    d = rows - lib.take_rows(means, lib.xp.where(tokens < 0, lib.xp.zeros_like(tokens), tokens))
    return lib.segment_sum(d, tokens, means.shape[0])


def _sample(lib: Backend, rows: Array, tokens: Array, count: int) -> Array:
    """One of each of ``count`` equal parts of the vectors, (count, D); NaN where it does not take part."""
    if rows.shape[0] == 0:
        nothing = lib.xp.ones((count, rows.shape[1]), dtype=rows.dtype, **lib.place(rows))
        return lib.nan_where(nothing > 0, nothing)
    chosen = _evenly(lib, rows, count)
    # As rows too, which a library takes from wherever they lie.
    lost = lib.take_rows(lib.xp.astype(tokens, rows.dtype)[:, None], chosen)[:, 0] < 0
    return lib.take_rows(rows, lib.xp.where(lost, -lib.xp.ones_like(chosen), chosen))


def _evenly(lib: Backend, rows: Array, count: int) -> Array:
    """The first of each of ``count`` equal parts of the rows, (count,)."""
    xp, number = lib.xp, lib.as_indices(lib.xp.arange(count, **lib.place(rows)))
    total, largest = rows.shape[0], int(xp.iinfo(number.dtype).max)
    # A number that is left open while a function is exported is not compared, and needs not be in 64 bits.
    if largest < 1 << 62 and isinstance(total, int) and (count - 1) * total > largest:
        # The products would leave 32 bits and wrap.
        return xp.asarray([k * total // count for k in range(count)], dtype=number.dtype, **lib.place(rows))
    return number * total // count
