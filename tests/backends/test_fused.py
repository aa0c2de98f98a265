"""The fused kernels of the search, interpreted or emulated on the CPU, and run where there is a GPU."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.arrays import search
from processes import importable, run_python
from searches import EPS32, assert_nearest, squared_distances

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Problem:
    z: np.ndarray
    codebook: np.ndarray
    dtype: str = "float32"
    exact: bool = False
    """Whether no product rounds, so that the answer is one and known."""

    @classmethod
    def drawn(cls, n: int, count: int, width: int, *, offset: float = 0, spread: float = 1, dtype: str = "float32"):
        rng = np.random.default_rng([n, count, width])
        z, codebook = (spread * rng.standard_normal((m, width)) + offset for m in (n, count))
        # The centre of codewords in opposite pairs is zero: what lets 16 bits stay so.
        if offset == 0:
            codebook[1::2] = -codebook[: len(codebook) // 2 * 2 : 2]
            codebook[len(codebook) // 2 * 2 :] = 0
        return cls(*(_rounded(x, dtype) for x in (z, codebook)), dtype)


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 numbers that the dtype holds exactly."""
    if dtype == "bfloat16":
        return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(dtype).astype(np.float32)


def _grid(offset: float, dtype: str) -> Problem:
    rng = np.random.default_rng(0)
    z = rng.integers(-3, 4, (130, 20)).astype(np.float32) + np.float32(offset)
    codebook = 2 * rng.integers(-1, 2, (300, 20)).astype(np.float32) + np.float32(offset)
    z[100:] = (codebook[:30] + codebook[200:230]) / 2
    return Problem(z, codebook, dtype, exact=True)


def _copies() -> Problem:
    problem = Problem.drawn(130, 300, 20)
    codebook = problem.codebook[np.random.default_rng(1).integers(0, 40, 300)]
    return Problem(problem.z, codebook)


def _close() -> Problem:
    """Vectors between two codewords of different tiles, nearer to the later one by little more than float32 hides."""
    codebook = Problem.drawn(130, 300, 20).codebook
    first, second = codebook[:120].astype(np.float64), codebook[140:260].astype(np.float64)
    return Problem(((first + second) / 2 + 1.7e-6 * (second - first)).astype(np.float32), codebook)


PROBLEMS = {
    "one of each": Problem.drawn(1, 1, 1),
    "no rows": Problem(np.zeros((0, 20), np.float32), np.ones((300, 20), np.float32), exact=True),
    "odd": Problem.drawn(67, 131, 3),
    "wide": Problem.drawn(40, 70, 100),
    "plain": Problem.drawn(130, 300, 20),
    "far": Problem.drawn(130, 300, 20, offset=1000),
    "far and close together": Problem.drawn(130, 300, 20, offset=10, spread=0.01),
    "small": Problem.drawn(130, 300, 20, spread=1e-30),
    "large": Problem.drawn(130, 300, 20, spread=1e30),
    "ties": _grid(0, "float32"),
    "ties, far": _grid(1000, "float32"),
    "copies": _copies(),
    "close": _close(),
    "all equal": Problem(Problem.drawn(130, 300, 20).z, np.full((300, 20), 0.1, np.float32), exact=True),
    "float16": Problem.drawn(130, 300, 20, dtype="float16"),
    "float16, far": Problem.drawn(130, 300, 20, offset=10, dtype="float16"),
    "float16, wide": Problem.drawn(40, 70, 100, dtype="float16"),
    "bfloat16": Problem.drawn(130, 300, 20, dtype="bfloat16"),
    "bfloat16, small": Problem.drawn(130, 300, 20, spread=1e-30, dtype="bfloat16"),
    "bfloat16, far": Problem.drawn(130, 300, 20, offset=10, dtype="bfloat16"),
    "bfloat16, wide": Problem.drawn(40, 70, 100, dtype="bfloat16"),
    "bfloat16, ties": _grid(0, "bfloat16"),
}
BAD_ROWS = {12: np.nan, 66: np.inf, 129: -np.inf}


def _with_bad_rows(problem: Problem) -> Problem:
    z = problem.z.copy()
    for row, bad in BAD_ROWS.items():
        z[row, row % 20] = bad
    return Problem(z, problem.codebook, problem.dtype)


LOST = {
    "lost rows": _with_bad_rows(PROBLEMS["plain"]),
    "lost rows, bfloat16": _with_bad_rows(PROBLEMS["bfloat16"]),
    "lost rows, float16": _with_bad_rows(PROBLEMS["float16"]),
}


def _all_lost(bad: float) -> Problem:
    codebook = PROBLEMS["plain"].codebook.copy()
    codebook[7, 3] = bad
    return Problem(PROBLEMS["plain"].z, codebook)


ALL_LOST = {f"a codeword with {bad}": _all_lost(bad) for bad in (np.nan, np.inf, -np.inf)}
EVERY = {**PROBLEMS, **LOST, **ALL_LOST}


def check(name: str, indices: np.ndarray) -> None:
    problem = EVERY[name]
    z, codebook = problem.z, problem.codebook
    assert indices.shape == (len(z),)
    assert np.issubdtype(indices.dtype, np.signedinteger)
    if name in ALL_LOST:
        np.testing.assert_array_equal(indices, -1)
        return
    lost = np.zeros(len(z), bool)
    if name in LOST:
        lost[list(BAD_ROWS)] = True
    np.testing.assert_array_equal(indices < 0, lost)
    if problem.exact:
        np.testing.assert_array_equal(indices, dq.nearest(z, codebook))
        np.testing.assert_array_equal(indices, squared_distances(z, codebook).argmin(axis=1))
    else:
        assert_nearest(indices[~lost], z[~lost], codebook, EPS32)


# Triton: interpreted in another process, since what of it is interpreted is decided when it is imported.

INTERPRETED = """
    import sys
    import numpy as np
    import torch
    from test_fused import EVERY
    from diveq_torch import backend, fused

    np.seterr(invalid="ignore", over="ignore")

    def tensor(x, dtype):
        # Not contiguous.
        return torch.tensor(x).to(getattr(torch, dtype)).repeat(1, 2)[:, : x.shape[1]]

    found = {
        name: fused.nearest_rows(backend, tensor(p.z, p.dtype), tensor(p.codebook, p.dtype)).numpy()
        for name, p in EVERY.items()
    }
    np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def by_triton(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path_factory.mktemp("triton") / "found.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton 3.9 warns where it is unset.
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        patch.setenv("PYTHONPATH", __file__.rpartition("/")[0], prepend=":")
        run_python(INTERPRETED, str(path))
    return np.load(path)


@pytest.mark.parametrize("name", EVERY)
def test_triton_interpreted(by_triton: Any, name: str):
    check(name, by_triton[name])


STATED = """
    import numpy as np
    import torch
    from test_search_accuracy import KINDS, check, drawn
    from diveq_torch import backend, fused

    np.seterr(all="ignore")
    for kind in KINDS:
        for shape, seed in (((40, 8), 0), ((64, 40), 0), ((64, 40), 1)):
            z, codebook = drawn(kind, shape, seed)
            found = fused.nearest_rows(backend, torch.from_numpy(z), torch.from_numpy(codebook)).numpy()
            check(found, z, codebook)
"""


def test_triton_keeps_to_the_statement_of_accuracy(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent / 'arrays'}", prepend=":")
    run_python(STATED)


COMPILED = """
    import re
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from diveq_core.arrays import search
    from diveq_torch import fused, kernels

    def instructions(kernel, pointers, **constants):
        types = {name: pointers.get(name, "*fp32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=values)
        assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        print(*sorted(set(re.findall(r"tf32|wgmma.mma_async|mma.sync|fma.rn.f32", assembly))), sep=",")

    numbers = dict(n="i32", total="i32", centred="*i32", found="*i64", uncertain="*i32", count="*i32")
    parts = dict.fromkeys(("high", "low", "e_high", "e_low"), "*fp16")
    limit = 2.0 ** (search.REACH - 2)
    for width in (20, 100, 300):
        settings = fused.settings(width)
        tile = {name: settings[name] for name in ("ROWS", "COLUMNS", "DEPTH", "PADDED")}
        for narrow in (True, False):
            chosen = dict(NARROW=narrow, EITHER=True, ERROR=1e-6, INTERPRETED=False)
            instructions(kernels.nearest_by_parts, numbers | parts, **tile, **chosen)
        exact = dict(WIDTH=width, ROWS=64, COLUMNS=64, DEPTH=32, LIMIT=limit)
        instructions(kernels.nearest_again, numbers | dict(canonical="*i64", z="*bf16"), **exact)
"""


def test_triton_compiles_for_hopper_without_tf32(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    exact, split = "fma.rn.f32", "fma.rn.f32,wgmma.mma_async"
    assert run_python(COMPILED).split() == [split, split, exact] * 3


# Pallas


@functools.cache
def _pallas() -> Callable[..., Any]:
    """The kernel interpreted, compiled once for each shape."""
    jax = pytest.importorskip("jax")
    from diveq_jax import backend, fused

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    return jax.jit(functools.partial(fused.nearest_rows, backend, interpret=True))


def _by_pallas(problem: Problem) -> np.ndarray:
    jax = pytest.importorskip("jax")
    z, codebook = (jax.numpy.asarray(x, problem.dtype) for x in (problem.z, problem.codebook))
    return np.asarray(_pallas()(z, codebook))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "no rows"])
def test_pallas_interpreted(name: str):
    check(name, _by_pallas(EVERY[name]))


def test_pallas_with_x64():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        check("plain", _by_pallas(EVERY["plain"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [3, 64, 200])
def test_pallas_is_lowered_for_cuda_and_only_there(monkeypatch: pytest.MonkeyPatch, width: int, dtype: str):
    jax = pytest.importorskip("jax")
    from diveq_jax import fused
    from diveq_jax.search import _nearest_rows

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused, "serves", lambda z, codebook: True)
    arrays = (jax.ShapeDtypeStruct((n, width), dtype) for n in (500, 100))
    traced = jax.jit(_nearest_rows.__wrapped__).trace(*arrays)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sharded", [(True, False), (False, True), (True, True)])
def test_pallas_is_lowered_in_a_shard(dtype: str, sharded: tuple[bool, bool]):
    jax = pytest.importorskip("jax")
    from diveq_jax import backend, fused

    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(jax.sharding.PartitionSpec("i" if s else None) for s in sharded)
    kernel = functools.partial(fused.nearest_rows, backend)
    shard = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=jax.sharding.PartitionSpec("i"))
    arrays = (jax.ShapeDtypeStruct((n, 20), dtype) for n in (100, 50))
    assert "triton" in jax.jit(shard).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


# CUDA C: the kernel's source, compiled for the CPU with a thread for each of a block's.

EMULATOR = r"""
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
using std::isfinite;
struct alignas(16) float4 { float x, y, z, w; };
struct Position { unsigned x; };
static thread_local Position threadIdx, blockIdx;
static std::barrier together(256);
static void __syncthreads() { together.arrive_and_wait(); }
static int __float_as_int(float x) { int bits; std::memcpy(&bits, &x, 4); return bits; }
static float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
KERNEL
template <class T> std::vector<T> take(long long count) {
    std::vector<T> x(count + 1);
    if (std::fread(x.data(), sizeof(T), count, stdin) != (size_t)count) std::exit(1);
    return x;
}
int main() {
    const auto sizes = take<long long>(3);
    const long long n = sizes[0], count = sizes[1], width = sizes[2];
    const auto z = take<float>(n * width), e = take<float>(count * width), half_squares = take<float>(count);
    const auto centre = take<float>(width), scale = take<float>(1);
    const auto canonical = take<long long>(count);
    std::vector<long long> found(n + 1, -7);
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < 256; ++thread) threads.emplace_back([&, thread] {
        for (unsigned block = 0; block * 128 < n; ++block) {
            threadIdx.x = thread, blockIdx.x = block;
            nearest(z.data(), e.data(), half_squares.data(), centre.data(), scale.data(), canonical.data(),
                    found.data(), n, (int)count, (int)width);
            __syncthreads();
        }
    });
    for (auto& thread : threads) thread.join();
    std::fwrite(found.data(), sizeof(long long), n, stdout);
    return found[n] != -7;
}
"""


@pytest.fixture(scope="module")
def by_cuda_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Problem], np.ndarray]:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no g++")
    from diveq_cupy.search import SOURCE

    folder: Path = tmp_path_factory.mktemp("cuda")
    (folder / "kernel.cpp").write_text(EMULATOR.replace("KERNEL", SOURCE))
    options = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-pthread", "-w"]
    subprocess.run([compiler, *options, "kernel.cpp", "-o", "kernel"], cwd=folder, check=True)

    def run(problem: Problem) -> np.ndarray:
        from diveq_numpy import backend

        z, codebook = problem.z, problem.codebook
        with np.errstate(invalid="ignore"):
            centre, inverse_scale = search.frame(backend, codebook)
            e = search.framed(backend, codebook, centre, inverse_scale)
        canonical = search.first_copies(backend, codebook).astype(np.int64)
        sizes = np.array([len(z), *codebook.shape], np.int64)
        arrays = (sizes, z, e, 0.5 * (e * e).sum(axis=1), centre, inverse_scale, canonical)
        given = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)
        done = subprocess.run([folder / "kernel"], input=given, capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.int64)

    return run


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].dtype == "float32"])
def test_cuda_source_on_the_cpu(by_cuda_source: Callable[[Problem], np.ndarray], name: str):
    check(name, by_cuda_source(EVERY[name]))


# Where there is a GPU: through the public verb, as users call it.


def _torch_on_gpu(problem: Problem) -> np.ndarray:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    from diveq_torch.search import _fused_serves

    z, codebook = (
        torch.tensor(x, device="cuda").to(getattr(torch, problem.dtype)) for x in (problem.z, problem.codebook)
    )
    assert _fused_serves(z, codebook)
    return dq.nearest(z, codebook).cpu().numpy()


def _jax_on_gpu(problem: Problem) -> np.ndarray:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    from diveq_jax import fused

    z, codebook = (jax.numpy.asarray(x, problem.dtype) for x in (problem.z, problem.codebook))
    assert len(z) == 0 or fused.serves(z, codebook)
    return np.asarray(dq.nearest(z, codebook))


def _cupy_on_gpu(problem: Problem) -> np.ndarray:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.is_available():
        pytest.skip("CuPy has no GPU")
    if problem.dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16")
    return cupy.asnumpy(dq.nearest(*(cupy.asarray(x, problem.dtype) for x in (problem.z, problem.codebook))))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("on_gpu", [_torch_on_gpu, _jax_on_gpu, _cupy_on_gpu])
def test_on_a_gpu(on_gpu: Callable[[Problem], np.ndarray], name: str):
    check(name, on_gpu(EVERY[name]))


def test_torch_on_a_gpu_writes_no_scores():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    z, codebook = (torch.randn(n, 64, device="cuda") for n in (1 << 16, 1 << 13))
    dq.nearest(z, codebook)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dq.nearest(z, codebook)
    # Copies of the codebook and its sorted keys, and the indices; the scores would be 2 GiB.
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert importable("triton")
