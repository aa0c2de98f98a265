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

from diveq_core.arrays import search
from diveq_torch import kernels

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
    filled = triton.cdiv(count, tile["COLUMNS"]) * tile["COLUMNS"]
    e_high, e_low, factors, _ = _split(words, centre, scale, tile["PADDED"], filled)
    e_factors = 1 / factors
    far = torch.full((filled,), _NOWHERE, dtype=torch.float32, device=z.device)
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
                kernels.nearest_by_parts[(triton.cdiv(n, tile["ROWS"]),)](
                    *split,
                    e_high,
                    e_low,
                    e_factors,
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
                    # Parts leave out 2^-22 of a product three times; a sum of 16 products is taken to lose 2^-22
                    # where the tensor cores cut it off. Twice that, for two scores.
                    ERROR=2.0**-22 * (8 + width / 8),
                    INTERPRETED=_INTERPRETED,
                    **tile,
                )
            depth = max(triton.next_power_of_2(width), 16) if width <= 64 else 32
            kernels.nearest_again[(triton.cdiv(n, 64),)](
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
    x: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor, width: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parts of rows in the frame, high and low, filled up by zeros to so many of a width; and factors and squares."""
    n, own_width = x.shape
    high, low = (torch.empty(rows, width, dtype=torch.float16, device=x.device) for _ in range(2))
    factors, squares = (torch.ones(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > n:
        high[n:], low[n:] = 0, 0
    depth = min(max(triton.next_power_of_2(own_width), 16), 128)
    tile_rows = max(4096 // depth, 16)
    with torch.cuda.device_of(x):
        kernels.split_rows[(triton.cdiv(n, tile_rows),)](
            x,
            centre,
            scale,
            high,
            low,
            factors,
            squares,
            n,
            WIDTH=own_width,
            PADDED=width,
            ROWS=tile_rows,
            DEPTH=depth,
            LIMIT=2.0 ** (search.REACH - 2),
            HIGHEST=_HIGHEST,
            SHORTEST=_SHORTEST,
            NORMAL=torch.finfo(torch.float32).tiny,
            num_warps=4,
        )
    return high, low, factors, squares
