r"""The search on a GPU in one CUDA kernel, which keeps the running minimum in registers.

.. math:: i = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle

A block of threads compares 128 vectors with 128 codewords at a time, each thread 8 with 8, and writes
nothing but indices. Products and sums are float32's own, never TF32.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import cupy

from diveq_core.arrays import search

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend

SOURCE = r"""
const int TILE = 128, DEPTH = 16, THREADS = 256, SIDE = 16, PATCH = 8;
const float LIMIT = LARGEST;

extern "C" __global__ void __launch_bounds__(256, 2) nearest(
    const float* __restrict__ z, const float* __restrict__ e, const float* __restrict__ half_squares,
    const float* __restrict__ centre, const float* __restrict__ scales,
    const long long* __restrict__ canonical, long long* __restrict__ found,
    const long long n, const int count, const int width)
{
    // Four more columns keep the stores of a transposed tile off one bank, and float4 aligned.
    __shared__ __align__(16) float ys[DEPTH][TILE + 4];
    __shared__ __align__(16) float es[DEPTH][TILE + 4];
    __shared__ float bests[TILE][SIDE];
    __shared__ int choices[TILE][SIDE];
    __shared__ int lost[TILE];
    // Of each row: the largest |z - c| / 4, then the power of two that brings it to order one, 0 where none is needed.
    __shared__ float sizes[TILE][THREADS / TILE];
    __shared__ float own[TILE];

    const int thread = threadIdx.x, across = thread % SIDE, down = thread / SIDE;
    const long long row0 = (long long)blockIdx.x * TILE;
    // Of large numbers the quarters, whose difference does not overflow.
    const float scale = scales[0], part = scale < 1 ? 0.25f : 1.0f, whole = scale / part;
    float best[PATCH];
    int chosen[PATCH];
    for (int i = 0; i < PATCH; ++i) { best[i] = __int_as_float(0x7f800000); chosen[i] = 0; }
    for (int r = thread; r < TILE; r += THREADS) lost[r] = 0;
    __syncthreads();
    {
        const int r = thread % TILE, side = thread / TILE;
        float size = 0;
        for (int d = side; d < width && row0 + r < n; d += THREADS / TILE) {
            const float quarter = fabsf(z[(row0 + r) * width + d] * 0.25f - centre[d] * 0.25f);
            // A row with an entry that is not finite has no finite score, and any other has no other.
            if (!isfinite(quarter)) lost[r] = 1;
            size = fmaxf(size, quarter);
        }
        sizes[r][side] = size;
    }
    __syncthreads();
    for (int r = thread; r < TILE; r += THREADS) {
        float size = 0;
        for (int side = 0; side < THREADS / TILE; ++side) size = fmaxf(size, sizes[r][side]);
        own[r] = size * scale > LIMIT ? __int_as_float(__float_as_int(size) & 0x7f800000) : 0;
    }
    __syncthreads();

    for (int first = 0; first < count; first += TILE) {
        float products[PATCH][PATCH] = {};
        for (int start = 0; start < width; start += DEPTH) {
            for (int t = thread; t < TILE * DEPTH; t += THREADS) {
                const int d = start + t % DEPTH, r = t / DEPTH;
                float y = 0, word = 0;
                if (d < width && row0 + r < n) {
                    const float vector = z[(row0 + r) * width + d];
                    y = own[r] == 0 ? (vector * part - centre[d] * part) * whole
                                    : (vector * 0.25f - centre[d] * 0.25f) / own[r];
                }
                if (d < width && first + r < count) word = e[(long long)(first + r) * width + d];
                ys[t % DEPTH][r] = y;
                es[t % DEPTH][r] = word;
            }
            __syncthreads();
            for (int d = 0; d < DEPTH; ++d) {
                float y[PATCH], word[PATCH];
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float4 a = *(const float4*)&ys[d][h * TILE / 2 + 4 * down];
                    const float4 b = *(const float4*)&es[d][h * TILE / 2 + 4 * across];
                    y[4 * h] = a.x, y[4 * h + 1] = a.y, y[4 * h + 2] = a.z, y[4 * h + 3] = a.w;
                    word[4 * h] = b.x, word[4 * h + 1] = b.y, word[4 * h + 2] = b.z, word[4 * h + 3] = b.w;
                }
                #pragma unroll
                for (int i = 0; i < PATCH; ++i)
                    #pragma unroll
                    for (int j = 0; j < PATCH; ++j) products[i][j] = fmaf(y[i], word[j], products[i][j]);
            }
            __syncthreads();
        }
        // Upwards and strictly less, so that the lowest index wins a tie.
        #pragma unroll
        for (int j = 0; j < PATCH; ++j) {
            const int k = first + j / 4 * TILE / 2 + 4 * across + j % 4;
            if (k >= count) continue;
            const float half_square = half_squares[k];
            #pragma unroll
            for (int i = 0; i < PATCH; ++i) {
                const float mine = own[i / 4 * TILE / 2 + 4 * down + i % 4];
                const float weight = mine == 0 ? 1.0f : 0.25f / scale / mine;
                const float score = half_square * weight - products[i][j];
                if (score < best[i]) { best[i] = score; chosen[i] = k; }
            }
        }
    }

    #pragma unroll
    for (int i = 0; i < PATCH; ++i) {
        const int r = i / 4 * TILE / 2 + 4 * down + i % 4;
        bests[r][across] = best[i];
        choices[r][across] = chosen[i];
    }
    __syncthreads();
    for (int r = thread; r < TILE && row0 + r < n; r += THREADS) {
        float least = bests[r][0];
        int index = choices[r][0];
        for (int s = 1; s < SIDE; ++s) {
            const bool tie = bests[r][s] == least && choices[r][s] < index;
            if (bests[r][s] < least || tie) { least = bests[r][s]; index = choices[r][s]; }
        }
        found[row0 + r] = lost[r] ? -1 : canonical[index];
    }
}
""".replace("LARGEST", f"{2.0 ** (search.REACH - 2)!r}f")

# Rows of the kernel's tile, and how many threads share it.
_TILE, _THREADS = 128, 256

# Wider, the arithmetic of float32 hides the writing of scores, and the library's product does it faster.
_WIDEST = 256

# Entries of half precision, or of no contiguous layout, that are copied at a time.
_ENTRIES_COPIED = 1 << 26


def nearest_rows(lib: Backend, z: cupy.ndarray, codebook: cupy.ndarray) -> cupy.ndarray:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite."""
    dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
    count, width = codebook.shape
    wide = width > _WIDEST and not _allows_tf32()
    if dtype != cupy.float32 or wide or count >= 1 << 30 or cupy.cuda.runtime.is_hip:
        return search.nearest_rows(lib, z, codebook)
    codebook = codebook.astype(dtype, copy=False)
    centre, scale = search.frame(lib, codebook)
    canonical = search.first_copies(lib, codebook).astype(cupy.int64, copy=False)
    e = cupy.ascontiguousarray(search.framed(lib, codebook, centre, scale))
    half_squares = (e * e).sum(axis=1) * cupy.float32(0.5)
    found = cupy.empty(z.shape[0], cupy.int64)
    whole = z.dtype == dtype and z.flags.c_contiguous
    rows = z.shape[0] if whole else max(_ENTRIES_COPIED // width, 1)
    for start in range(0, z.shape[0], rows or 1):
        chunk = cupy.ascontiguousarray(z[start : start + rows], dtype=dtype)
        blocks = -(-len(chunk) // _TILE)
        arrays = (chunk, e, half_squares, centre, scale, canonical, found[start : start + rows])
        sizes: tuple[Any, ...] = (cupy.int64(len(chunk)), cupy.int32(count), cupy.int32(width))
        _kernel()((blocks,), (_THREADS,), (*arrays, *sizes))
    return found


def _allows_tf32() -> bool:
    """Whether the user lets CuPy multiply in TF32, which keeps too few digits to tell codewords apart."""
    return os.environ.get("CUPY_TF32") == "1"


@functools.cache
def _kernel() -> cupy.RawKernel:
    return cupy.RawKernel(SOURCE, "nearest")
