r"""The search on a GPU in Triton kernels, which keep the running minimum in registers.

.. math:: i = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle

Scores exist a tile at a time and are never written. A float32 number is the sum of two of float16, each row in
a power of two of its own, and a product of two such sums takes three products of the tensor cores, added in
float32. What they leave out is bounded: a row whose two best scores lie closer together than that is searched
again in float32's own products, the lowest of equal codewords with it. Vectors and codewords of 16 bits whose
centre is zero take one product, as they are their own first part; that is found out on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from diveq_core.arrays import search

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend

_HALF = (torch.float16, torch.bfloat16)

# Triton's interpreter would multiply 16 bits in 16 bits, and finds no minimum of NaN alone.
_INTERPRETED = bool(triton.knobs.runtime.interpret)

# Entries of vectors that are split at a time, 128 MiB of parts.
_ENTRIES_SPLIT = 1 << 25

# The largest entry of a split row is brought to 2^13, far from both ends of float16.
_HIGHEST = 2.0**13

# Of what the longest codeword is brought to 2^30: rows shorter than this share one power of two, which still keeps the
# digits of the shortest that count, and no codeword's square times it overflows.
_SHORTEST = 2.0**-40

# Distance that no codeword has, beside the codewords that fill a tile up.
_NOWHERE = 3e38

# Added to a position in a tile, to count and to find by one sum.
_ONE = tl.constexpr(1 << 16)


@triton.jit
def _power(size):
    """The power of two not above a positive number: its exponent alone."""
    return (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _differences(x, centre, part, rows, d, n, WIDTH: tl.constexpr):
    """Tile of part (x - c), zero outside."""
    inside = (rows < n)[:, None] & (d < WIDTH)[None, :]
    tile = tl.load(x + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(centre + d, mask=d < WIDTH, other=0.0)
    return tl.where(inside, tile * part - middle[None, :] * part, 0.0)


@triton.jit
def _split_kernel(
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
    d = tl.arange(0, DEPTH)
    s = tl.load(scale)
    # Of large numbers the quarters, whose difference does not overflow.
    lost = tl.zeros([ROWS], tl.int32)
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        quarters = tl.abs(_differences(x, centre, 0.25, rows, start + d, n, WIDTH))
        finite = quarters < float("inf")
        lost += tl.sum(tl.where(finite, 0, 1), axis=1)
        size = tl.maximum(size, tl.max(tl.where(finite, quarters, 0.0), axis=1))
    part = tl.where(s < 1, 0.25, tl.where(size * s > LIMIT, 0.25, 1.0))
    # The same of the quarters as of the whole, but for what quartering loses.
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        tile = tl.abs(_differences(x, centre, part[:, None], rows, start + d, n, WIDTH))
        size = tl.maximum(size, tl.max(tl.where(tile < float("inf"), tile, 0.0), axis=1))
    unit = tl.maximum(tl.maximum(_power(size), SHORTEST * part / s), NORMAL)
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, PADDED, DEPTH):
        tile = _differences(x, centre, part[:, None], rows, start + d, n, WIDTH)
        tile = tl.where((lost == 0)[:, None], tile / unit[:, None] * HIGHEST, 0.0)
        square += tl.sum(tile * tile, axis=1)
        first = tile.to(tl.float16)
        inside = (rows < n)[:, None] & (start + d < PADDED)[None, :]
        place = rows[:, None] * PADDED + (start + d)[None, :]
        tl.store(high + place, first, mask=inside)
        tl.store(low + place, (tile - first.to(tl.float32)).to(tl.float16), mask=inside)
    tl.store(factors + rows, part * HIGHEST / s / unit, mask=rows < n)
    tl.store(squares + rows, tl.where(lost == 0, square, -1.0), mask=rows < n)


@triton.jit
def _add_product(products, y, words, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        y = y.to(tl.float32)
        words = words.to(tl.float32)
    return tl.dot(y, words, products, input_precision="ieee")


@triton.jit
def _kernel(
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
def _vectors(z, centre, scale, own, rows, d, inside, WIDTH: tl.constexpr):
    """Tile of y, in the row's own scale where that is not 0."""
    inside = inside[:, None] & (d < WIDTH)[None, :]
    tile = tl.load(z + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(centre + d, mask=d < WIDTH, other=0.0)
    # Of large numbers the quarters, as the core does.
    part = tl.where(scale < 1, 0.25, 1.0)
    whole = tl.where(inside, tile * part - middle[None, :] * part, 0.0) * (scale / part)
    quarters = tl.where(inside, tile * 0.25 - middle[None, :] * 0.25, 0.0)
    return tl.where(own[:, None] == 0, whole, quarters / tl.where(own == 0, 1.0, own)[:, None])


@triton.jit
def _exact_kernel(
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
        inside = here[:, None] & (start + d < WIDTH)[None, :]
        tile = tl.load(z + rows[:, None] * WIDTH + (start + d)[None, :], mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(centre + start + d, mask=start + d < WIDTH, other=0.0)
        size = tl.maximum(size, tl.max(tl.abs(tl.where(inside, tile * 0.25 - middle[None, :] * 0.25, 0.0)), axis=1))
    own = tl.where(size * s > LIMIT, _power(size), 0.0)
    weight = tl.where(own == 0, 1.0, (0.25 / s) / tl.where(own == 0, 1.0, own))

    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    if WIDTH <= DEPTH:
        kept = _vectors(z, centre, s, own, rows, d, here, WIDTH)
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
                y = _vectors(z, centre, s, own, rows, start + d, here, WIDTH)
                tile = tl.load(words + (start + d)[:, None], mask=present & (start + d < WIDTH)[:, None], other=0.0)
                products = tl.dot(y, tile, products, input_precision="ieee")
        squares = tl.load(half_squares + columns, mask=columns < total, other=0.0)
        scores = tl.where(present, squares[None, :] * weight[:, None] - products, float("inf"))
        nearest, position = tl.min(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = nearest < best
        best = tl.where(closer, nearest, best)
        chosen = tl.where(closer, first + position, chosen)
    tl.store(found + rows, tl.load(canonical + chosen), mask=here)


def nearest_rows(lib: Backend, z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite.

    Parameters
    ----------
    z : tensor (N, D)
        In float32, float16 or bfloat16.
    codebook : tensor (K, D)
        In float32, float16 or bfloat16, with K < 2^30.
    """
    found = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    if z.shape[0] == 0:
        return found
    z, (count, width) = z.contiguous(), codebook.shape
    words = codebook.float().contiguous()
    centre, scale = search.frame(lib, words)
    canonical = search.first_copies(lib, words)
    e = search.framed(lib, words, centre, scale).contiguous()
    half_squares = (e * e).sum(dim=1) * 0.5
    longest = (half_squares.max() * 2).sqrt()
    centred = (centre != 0).any().to(torch.int32)
    tile = settings(width)
    # The codewords that fill the last tile up are nowhere near, and no column needs a mask.
    padded = triton.cdiv(count, tile["COLUMNS"]) * tile["COLUMNS"]
    parts = _split(words, centre, scale, tile["PADDED"], padded)
    e_high, e_low, factors, _ = parts
    far = torch.full((padded,), _NOWHERE, dtype=torch.float32, device=z.device)
    far[:count] = half_squares
    either = z.dtype == codebook.dtype and z.dtype in _HALF
    rows = max(_ENTRIES_SPLIT // tile["PADDED"], 1)
    for start in range(0, z.shape[0], rows):
        chunk, indices = z[start : start + rows], found[start : start + rows]
        n = chunk.shape[0]
        uncertain = torch.empty(n, dtype=torch.int32, device=z.device)
        listed = torch.zeros(1, dtype=torch.int32, device=z.device)
        split = _split(chunk, centre, scale, tile["PADDED"], n)
        with torch.cuda.device_of(z):
            for narrow in (True, False) if either else (False,):
                _kernel[(triton.cdiv(n, tile["ROWS"]),)](
                    *split,
                    e_high,
                    e_low,
                    1 / factors,
                    far,
                    longest,
                    centred,
                    indices,
                    uncertain,
                    listed,
                    n,
                    count,
                    NARROW=narrow,
                    EITHER=either,
                    # Parts leave out 2^-22 of a product three times; a sum of 16 products is rounded down to 2^-22.
                    ERROR=2.0**-22 * (8 + width / 8),
                    INTERPRETED=_INTERPRETED,
                    **tile,
                )
            depth = max(triton.next_power_of_2(width), 16) if width <= 64 else 32
            _exact_kernel[(triton.cdiv(n, 64),)](
                chunk,
                e,
                half_squares,
                centre,
                scale,
                canonical,
                indices,
                uncertain,
                listed,
                count,
                WIDTH=width,
                ROWS=64,
                COLUMNS=64,
                DEPTH=depth,
                LIMIT=2.0 ** (search.REACH - 2),
                num_warps=4,
                num_stages=3,
            )
    return found


def settings(width: int) -> dict[str, int]:
    """Tile of the kernel: rows, columns, depth and the width that this divides, warps and stages."""
    depth = max(triton.next_power_of_2(width), 16) if width <= 128 else 64
    return {
        "ROWS": 128,
        "COLUMNS": 128,
        "DEPTH": depth,
        "PADDED": triton.cdiv(width, depth) * depth,
        "num_warps": 8,
        "num_stages": 3,
    }


def _split(
    x: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor, padded: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts of rows in the frame, zero from the last on: high and low, and of each row its factor and its square."""
    n, width = x.shape
    high, low = (torch.empty(rows, padded, dtype=torch.float16, device=x.device) for _ in range(2))
    factors, squares = (torch.ones(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > n:
        high[n:], low[n:] = 0, 0
    depth = min(max(triton.next_power_of_2(width), 16), 128)
    tile = max(4096 // depth, 16)
    with torch.cuda.device_of(x):
        _split_kernel[(triton.cdiv(n, tile),)](
            x,
            centre,
            scale,
            high,
            low,
            factors,
            squares,
            n,
            WIDTH=width,
            PADDED=padded,
            ROWS=tile,
            DEPTH=depth,
            LIMIT=2.0 ** (search.REACH - 2),
            HIGHEST=_HIGHEST,
            SHORTEST=_SHORTEST,
            NORMAL=torch.finfo(torch.float32).tiny,
            num_warps=4,
        )
    return high, low, factors, squares
