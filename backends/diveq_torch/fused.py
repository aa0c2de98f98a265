r"""The search on a GPU in one Triton kernel, which keeps the running minimum in registers.

.. math:: i = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle

Scores exist a tile at a time and are never written. Float32 is multiplied in float32, not in TF32. Vectors
and codewords of one 16-bit dtype are multiplied by the tensor cores, with sums in float32, where the
codebook's centre is zero, as only then centring keeps them in 16 bits; that is found out on the device.
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

# Triton's interpreter would multiply bfloat16 as the integers that hold it, and finds no minimum of NaN alone.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _quarters(z, centre, rows, d, n, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Tile of (z - c) / 4, which never overflows; c is zero if HALF."""
    inside = (rows < n)[:, None] & (d < WIDTH)[None, :]
    tile = tl.load(z + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32) * 0.25
    if not HALF:
        middle = tl.load(centre + d, mask=d < WIDTH, other=0.0)
        tile = tl.where(inside, tile - middle[None, :] * 0.25, 0.0)
    return tile


@triton.jit
def _vectors(z, centre, scale, own, rows, d, n, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Tile of y, in the row's own scale where that is not 0, rounded to the 16 bits of z if HALF, else in float32."""
    inside = (rows < n)[:, None] & (d < WIDTH)[None, :]
    tile = tl.load(z + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if not HALF:
        middle = tl.load(centre + d, mask=d < WIDTH, other=0.0)
        # Of large numbers the quarters, as the core does.
        part = tl.where(scale < 1, 0.25, 1.0)
        tile = tl.where(inside, tile * part - middle[None, :] * part, 0.0) * (scale / part)
    else:
        tile = tile * scale
    quarters = _quarters(z, centre, rows, d, n, WIDTH, HALF)
    tile = tl.where(own[:, None] == 0, tile, quarters / tl.where(own == 0, 1.0, own)[:, None])
    if HALF:
        return tile.to(z.dtype.element_ty)
    else:
        return tile


@triton.jit
def _codewords(e, columns, d, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Transposed tile of e."""
    inside = (columns < COUNT)[None, :] & (d < WIDTH)[:, None]
    return tl.load(e + columns.to(tl.int64)[None, :] * WIDTH + d[:, None], mask=inside, other=0.0)


@triton.jit
def _add_product(products, y, words, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        y = y.to(tl.float32)
        words = words.to(tl.float32)
    return tl.dot(y, words, products, input_precision="ieee")


@triton.jit
def _kernel(
    z,
    e,
    half_squares,
    centre,
    scales,
    canonical,
    found,
    centred,
    n,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    EITHER: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LIMIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Both kernels are launched and one of them returns here, so that the host need not wait for the centre.
    if EITHER:  # noqa: SIM102, since Triton knows one of the conditions when it compiles
        if (tl.load(centred) != 0) == HALF:
            return
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DEPTH)
    scale = tl.load(scales)
    outer = tl.load(scales + 1)

    # A row with an entry that is not finite has no finite score, and any other has no other.
    lost = tl.zeros([ROWS], tl.int32)
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        quarters = tl.abs(_quarters(z, centre, rows, start + d, n, WIDTH, HALF))
        finite = quarters < float("inf")
        lost += tl.sum(tl.where(finite, 0, 1), axis=1)
        size = tl.maximum(size, tl.max(tl.where(finite, quarters, 0.0), axis=1))
    # The power of two not above it: its exponent alone.
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    own = tl.where(size * scale > LIMIT, power, 0.0)
    weight = tl.where(own == 0, 1.0, (0.25 / scale) / tl.where(own == 0, 1.0, own))

    best = tl.full([ROWS], float("inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    if WHOLE:
        kept = _vectors(z, centre, scale, own, rows, d, n, WIDTH, HALF)
    for first in range(0, COUNT, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        if WHOLE:
            products = _add_product(products, kept, _codewords(e, columns, d, COUNT, WIDTH), INTERPRETED)
        else:
            for start in range(0, WIDTH, DEPTH):
                y = _vectors(z, centre, scale, own, rows, start + d, n, WIDTH, HALF)
                words = _codewords(e, columns, start + d, COUNT, WIDTH)
                products = _add_product(products, y, words, INTERPRETED)
        squares = tl.load(half_squares + columns, mask=columns < COUNT, other=0.0)
        scores = squares[None, :] * weight[:, None] - products * outer
        scores = tl.where((columns < COUNT)[None, :], scores, float("inf"))
        if INTERPRETED:
            scores = tl.where(scores == scores, scores, float("inf"))
        nearest, position = tl.min(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = nearest < best
        best = tl.where(closer, nearest, best)
        chosen = tl.where(closer, first + position, chosen)
    index = tl.where(lost == 0, tl.load(canonical + chosen), -1)
    tl.store(found + rows, index, mask=rows < n)


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
    z = z.contiguous()
    words = codebook.float()
    centre, scale = search.frame(lib, words)
    canonical = search.first_copies(lib, words)
    e = search.framed(lib, words, centre, scale).contiguous()
    half_squares = (e * e).sum(dim=1) * 0.5
    one = torch.ones_like(scale)
    centred = (centre != 0).any().to(torch.int32)
    either = z.dtype == codebook.dtype and z.dtype in _HALF
    if either:
        # Scaled codewords fit bfloat16 and not float16, whose products are scaled instead.
        inner = scale if z.dtype == torch.bfloat16 else one
        narrow = (words * inner).to(z.dtype).contiguous()
        outer = (scale / inner) ** 2
        scales = torch.stack([inner, outer])
        _launch(z, narrow, half_squares, centre, scales, canonical, found, centred, half=True, either=True)
    scales = torch.stack([scale, one])
    _launch(z, e, half_squares, centre, scales, canonical, found, centred, half=False, either=either)
    return found


def _launch(z, e, half_squares, centre, scales, canonical, found, centred, *, half, either):  # type: ignore[no-untyped-def]
    n, width = z.shape
    # tl.dot takes no side shorter than 16.
    depth = max(triton.next_power_of_2(width), 16) if width <= 64 else 64 if half else 32
    rows, columns = (128, 128) if half else (64, 64)
    with torch.cuda.device_of(z):
        _kernel[(triton.cdiv(n, rows),)](
            z,
            e,
            half_squares,
            centre,
            scales,
            canonical,
            found,
            centred,
            n,
            COUNT=e.shape[0],
            WIDTH=width,
            HALF=half,
            EITHER=either,
            WHOLE=width <= depth,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=depth,
            LIMIT=2.0 ** (search.REACH - 2),
            INTERPRETED=_INTERPRETED,
            num_warps=8 if half else 4,
            num_stages=3,
        )
