"""Triton kernels of the search: split rows into parts, search by the parts, search again in float32."""

from __future__ import annotations

import triton
import triton.language as tl

# Added to a position in a tile, to count and to find by one sum.
_ONE = tl.constexpr(1 << 16)


@triton.jit
def _power(size):
    """The power of two not above a positive number: its exponent alone."""
    return (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _differences(x, centre, part, rows, here, d, WIDTH: tl.constexpr):
    """Tile of part (x - c), zero where a row is not here and beyond the width."""
    inside = here[:, None] & (d < WIDTH)[None, :]
    tile = tl.load(x + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(centre + d, mask=d < WIDTH, other=0.0)
    return tl.where(inside, tile * part - middle[None, :] * part, 0.0)


@triton.jit
def split_rows(
    x,
    centre,
    scale,
    high,
    low,
    factors,
    squares,
    n,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LIMIT: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHORTEST: tl.constexpr,
    NORMAL: tl.constexpr,
):
    """Rows of f s (x - c) as high + low, f and their squared length; -1 for that of a row that is not finite."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n
    d = tl.arange(0, DEPTH)
    s = tl.load(scale)
    # Of large numbers the quarters, whose difference does not overflow.
    lost = tl.zeros([ROWS], tl.int32)
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        quarters = tl.abs(_differences(x, centre, 0.25, rows, here, start + d, WIDTH))
        finite = quarters < float("inf")
        lost += tl.sum(tl.where(finite, 0, 1), axis=1)
        size = tl.maximum(size, tl.max(tl.where(finite, quarters, 0.0), axis=1))
    part = tl.where(s < 1, 0.25, tl.where(size * s > LIMIT, 0.25, 1.0))
    # The same of the quarters as of the whole, but for what quartering loses.
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        tile = tl.abs(_differences(x, centre, part[:, None], rows, here, start + d, WIDTH))
        size = tl.maximum(size, tl.max(tl.where(tile < float("inf"), tile, 0.0), axis=1))
    unit = tl.maximum(tl.maximum(_power(size), SHORTEST * part / s), NORMAL)
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, PADDED, DEPTH):
        tile = _differences(x, centre, part[:, None], rows, here, start + d, WIDTH)
        tile = tl.where((lost == 0)[:, None], tile / unit[:, None] * HIGHEST, 0.0)
        square += tl.sum(tile * tile, axis=1)
        first = tile.to(tl.float16)
        inside = here[:, None] & (start + d < PADDED)[None, :]
        place = rows[:, None] * PADDED + (start + d)[None, :]
        tl.store(high + place, first, mask=inside)
        tl.store(low + place, (tile - first.to(tl.float32)).to(tl.float16), mask=inside)
    tl.store(factors + rows, part * HIGHEST / s / unit, mask=here)
    tl.store(squares + rows, tl.where(lost == 0, square, -1.0), mask=here)


@triton.jit
def _add_product(products, y, words, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        y = y.to(tl.float32)
        words = words.to(tl.float32)
    return tl.dot(y, words, products, input_precision="ieee")


@triton.jit
def nearest_by_parts(
    high,
    low,
    factors,
    squares,
    e_high,
    e_low,
    e_factors,
    half_squares,
    longest,
    centred,
    found,
    uncertain,
    count,
    n,
    total,
    PADDED: tl.constexpr,
    NARROW: tl.constexpr,
    EITHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ERROR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Index of the nearest codeword where that is certain, -1 where there is none, and the list of the other rows."""
    # Both kernels are launched and one of them returns here, so that the host need not wait for the centre.
    if EITHER:  # noqa: SIM102, since Triton knows one of the conditions when it compiles
        if (tl.load(centred) != 0) == NARROW:
            return
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    weight = tl.load(factors + rows, mask=rows < n, other=1.0)
    square = tl.load(squares + rows, mask=rows < n, other=-1.0)
    length = tl.sqrt(tl.maximum(square, 0.0))
    reach = tl.load(longest)
    place = rows[:, None] * PADDED + d[None, :]
    inside = (rows < n)[:, None]

    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    close = tl.zeros([ROWS], tl.int32)
    if PADDED == DEPTH:
        y = tl.load(high + place, mask=inside, other=0.0)
        if not NARROW:
            rest = tl.load(low + place, mask=inside, other=0.0)
    for first in range(0, total, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        words = columns.to(tl.int64)[None, :] * PADDED + d[:, None]
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        if PADDED == DEPTH:
            e = tl.load(e_high + words)
            if not NARROW:
                products = _add_product(products, y, tl.load(e_low + words), INTERPRETED)
                products = _add_product(products, rest, e, INTERPRETED)
            products = _add_product(products, y, e, INTERPRETED)
        else:
            for start in range(0, PADDED, DEPTH):
                e = tl.load(e_high + words + start)
                y = tl.load(high + place + start, mask=inside, other=0.0)
                if not NARROW:
                    products = _add_product(products, y, tl.load(e_low + words + start), INTERPRETED)
                    rest = tl.load(low + place + start, mask=inside, other=0.0)
                    products = _add_product(products, rest, e, INTERPRETED)
                products = _add_product(products, y, e, INTERPRETED)
        half = tl.load(half_squares + columns)
        factor = tl.load(e_factors + columns)
        scores = half[None, :] * weight[:, None] - products * factor[None, :]
        if INTERPRETED:
            scores = tl.where(scores == scores, scores, float("inf"))
        least = tl.min(scores, axis=1)
        lower = tl.minimum(best, least)
        # No codeword that might be nearest is longer than y and the distance from it.
        within = (length + tl.sqrt(tl.maximum(square + 2 * weight * lower, 0.0))) / weight
        within = tl.minimum(within, reach)
        error = ERROR * within * (length + weight * within)
        near = tl.where(scores <= (least + error)[:, None], (columns - first + _ONE)[None, :], 0)
        hits = tl.sum(near, axis=1)
        better = least < best - error
        close = tl.where(better, tl.where(hits >= 2 * _ONE, 1, 0), tl.where(least <= best + error, 1, close))
        chosen = tl.where(better, first + (hits & (_ONE - 1)), chosen)
        best = lower
    close = tl.where(rows < n, tl.where(square < 0, 0, tl.where(chosen >= total, 1, close)), 0)
    tl.store(found + rows, tl.where(square < 0, -1, chosen).to(tl.int64), mask=rows < n)
    ahead = tl.atomic_add(count, tl.sum(close, axis=0))
    tl.store(uncertain + ahead + tl.cumsum(close, axis=0) - 1, rows.to(tl.int32), mask=close != 0)


@triton.jit
def _vectors(z, centre, scale, own, rows, here, d, WIDTH: tl.constexpr):
    """Tile of y, in the row's own scale where that is not 0."""
    # Of large numbers the quarters, as the core does.
    part = tl.where(scale < 1, 0.25, 1.0)
    whole = _differences(z, centre, part, rows, here, d, WIDTH) * (scale / part)
    quarters = _differences(z, centre, 0.25, rows, here, d, WIDTH)
    return tl.where(own[:, None] == 0, whole, quarters / tl.where(own == 0, 1.0, own)[:, None])


@triton.jit
def nearest_again(
    z,
    e,
    half_squares,
    centre,
    scale,
    canonical,
    found,
    uncertain,
    count,
    total,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Index of the nearest codeword of the listed rows, in products of float32; the lowest of equal codewords."""
    listed = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.load(count)
    if tl.program_id(0) * ROWS >= n:
        return
    here = listed < n
    rows = tl.load(uncertain + listed, mask=here, other=0).to(tl.int64)
    d = tl.arange(0, DEPTH)
    s = tl.load(scale)
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        quarters = tl.abs(_differences(z, centre, 0.25, rows, here, start + d, WIDTH))
        size = tl.maximum(size, tl.max(quarters, axis=1))
    own = tl.where(size * s > LIMIT, _power(size), 0.0)
    weight = tl.where(own == 0, 1.0, (0.25 / s) / tl.where(own == 0, 1.0, own))

    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    if WIDTH <= DEPTH:
        kept = _vectors(z, centre, s, own, rows, here, d, WIDTH)
    for first in range(0, total, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        present = (columns < total)[None, :]
        words = e + columns.to(tl.int64)[None, :] * WIDTH
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        if WIDTH <= DEPTH:
            tile = tl.load(words + d[:, None], mask=present & (d < WIDTH)[:, None], other=0.0)
            products = tl.dot(kept, tile, products, input_precision="ieee")
        else:
            for start in range(0, WIDTH, DEPTH):
                y = _vectors(z, centre, s, own, rows, here, start + d, WIDTH)
                tile = tl.load(words + (start + d)[:, None], mask=present & (start + d < WIDTH)[:, None], other=0.0)
                products = tl.dot(y, tile, products, input_precision="ieee")
        squares = tl.load(half_squares + columns, mask=columns < total, other=0.0)
        scores = tl.where(present, squares[None, :] * weight[:, None] - products, float("inf"))
        nearest, position = tl.min(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = nearest < best
        best = tl.where(closer, nearest, best)
        chosen = tl.where(closer, first + position, chosen)
    tl.store(found + rows, tl.load(canonical + chosen), mask=here)
