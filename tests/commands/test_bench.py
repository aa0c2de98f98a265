"""The benchmark at tiny sizes: that it runs, says what is missing, and compares like with like. No time is judged."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import diveq_core as dq
from diveq_core.commands.bench import bars, clusterings, command, files, memory, problem, timing
from diveq_core.commands.bench.bars import Row, inertia_rows, memory_rows, saved_rows, speed_bars, speed_row
from diveq_core.commands.bench.comparison import Comparison, compare, lines
from diveq_core.commands.bench.contenders import CONTENDERS, JOBS, taking_part
from diveq_core.commands.bench.problem import Problem, UnavailableError, arrays
from diveq_core.commands.bench.settings import BenchError, Settings
from diveq_core.commands.bench.timing import Timing, interleave, ratio
from diveq_core.commands.cli import app
from processes import importable, run_python

TINY = ["--grid", "--n", "48", "--k", "4", "--k", "9", "--d", "3", "--repeats", "2", "--no-memory"]
PEERS = {"diveq": "diveq", "vector-quantize-pytorch": "vector_quantize_pytorch", "faiss": "faiss", "cdist": "torch"}


@pytest.fixture(autouse=True, scope="module")
def in_haste():
    """One thread, since tests share the cores, and samples as short as they come, since no time is judged."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(limits=1):
        patch.setattr(timing, "_PAUSE", 0.0)
        patch.setattr(timing, "_SHORTEST_SAMPLE", 0.0)
        patch.setenv("OMP_NUM_THREADS", "1")
        if importable("torch"):
            import torch

            torch.set_num_threads(1)
        yield


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def variants(name, at):
    try:
        return CONTENDERS[name].prepared(at)
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, in_haste):
    folder = tmp_path_factory.mktemp("bench")
    out, data = folder / "a.png", folder / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        # Compiling for JAX is most of the time, so the picture gets as few sizes as make a line along K and N.
        patch.setattr(command, "growth_problems", lambda **_: [Problem(16, 4, 3), Problem(16, 8, 3), Problem(32, 4, 3)])
        result = invoke("--quick", "--repeats", 1, "--no-memory", "--out", out, "--json", data)
    assert result.exit_code == 0, result.output
    return result, out, json.loads(data.read_text())


def test_every_bar_is_a_row(default_run):
    result, _, data = default_run
    for bar in speed_bars(quick=True):
        rows = [row for row in data["bars"] if (row["group"], row["what"]) == (bar.group, bar.text)]
        assert any(row["bar"] == bar.limit and row["size"] == bar.problem.size for row in rows)
        assert bar.group in result.stdout
    assert all(row["measured"] is not None or row["reason"] for row in data["bars"])
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_machine_and_versions(default_run):
    result, _, data = default_run
    assert result.stdout.startswith("Processor: ")
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["numpy"] == np.__version__


def test_picture(default_run):
    result, out, data = default_run
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"Picture: {out}" in result.stdout
    assert {(line["job"], line["n"], line["k"]) for line in data["growth"]} >= {("search", 16, 8), ("step", 32, 4)}


def test_small_sizes_judge_no_bar(default_run):
    result, _, data = default_run
    assert all(row["met"] is None for row in data["bars"])
    assert "not whether a bar is met" in result.stdout


def test_grid(tmp_path):
    data = tmp_path / "a.json"
    result = invoke(
        *TINY, "--dtype", "float64", "--backend", "numpy,torch", "--out", tmp_path / "a.png", "--json", data
    )
    assert result.exit_code == 0, result.output
    assert "48x9x3, float64, cpu" in result.stdout
    assert "faiss-cpu searches float32" in result.stdout
    assert "diveq_core, JAX" not in result.stdout
    assert {(c["k"], c["dtype"]) for c in json.loads(data.read_text())["comparisons"]} == {
        (4, "float64"),
        (9, "float64"),
    }
    assert (tmp_path / "a.png").exists()


def test_one_size_has_no_picture(tmp_path):
    arguments = ["--grid", "--n", 8, "--k", 2, "--d", 2, "--repeats", 1, "--no-memory", "--backend", "numpy"]
    result = invoke(*arguments, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "No picture" in result.stdout
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "--n", "0"], "--n must be an integer >= 1, got 0"),
        (["--repeats", "0"], "--repeats must be an integer >= 1, got 0"),
        (["--k", "8"], "--k needs --grid, since the default run has its own sizes; got --k 8 without it"),
        (["--backend", "torch"], "--backend needs --grid"),
        (["--grid", "--dtype", "int8"], "--dtype must be among float32, float64, float16, bfloat16, got 'int8'"),
        (["--grid", "--backend", "numppy"], "--backend must be among numpy, torch, jax, cupy, got 'numppy'"),
        (["--grid", "--device", "tpu"], "--device must be among cpu, cuda, got 'tpu'"),
        (["--out", "picture.jpg"], "--out must be a file name ending in .png, got picture.jpg"),
        (["--json", "no/such/folder.json"], "--json must be in a folder that exists, got no/such/folder.json"),
    ],
)
def test_options_are_checked_first(arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"bench: {said}" in result.stderr
    assert result.stdout == ""


def test_a_gpu_that_is_missing_is_an_error_where_asked_for():
    if problem.has_gpu():
        pytest.skip("there is a GPU")
    assert "--device cuda needs torch with a CUDA device, got none" in invoke("--grid", "--device", "cuda").stderr


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_library_is_a_reason(name, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == PEERS[name] else find_spec(found))
    timed = interleave((name,), Problem(8, 4, 3), 1)
    assert timed[name].missing == f"{PEERS[name]} is not installed"
    comparison = Comparison("step", Problem(8, 4, 3), {name: timed[name], "step-torch": Timing((1.0,))})
    bar = bars.Bar("", "", "step", Problem(8, 4, 3), "step-torch", name, 1.0)
    row = speed_row(bar, [comparison], judged=True)
    assert (row.met, row.value, row.reason) == (None, None, timed[name].missing)


def test_without_a_gpu_its_rows_say_so():
    if problem.has_gpu():
        pytest.skip("there is a GPU")
    rows = [speed_row(bar, [], judged=True) for bar in speed_bars() if bar.problem.device == "cuda"]
    assert [row.reason for row in rows] == ["no GPU here"] * 3


def test_too_large_a_matrix_is_a_reason():
    importable("torch") or pytest.skip("needs torch")
    with pytest.raises(UnavailableError, match="needs 4 GiB, 1 GiB are free"):
        CONTENDERS["cdist"].prepared(Problem(2**15, 2**15, 2), 2**30)


@pytest.mark.parametrize("name", [name for name in JOBS["search"] if name not in ("product", "search-cupy")])
def test_all_search_the_same(name):
    at = Problem(64, 16, 5)
    z, codebook, _ = arrays(at, "numpy")
    distances = ((z.astype(float)[:, None] - codebook) ** 2).sum(axis=2)
    for run in variants(name, at).values():
        np.testing.assert_array_equal(np.asarray(run()), distances.argmin(axis=1))


@pytest.mark.parametrize("name", [name for job in ("step", "rest") for name in JOBS[job] if name != "step-cupy"])
def test_all_steps_reach_z_and_codebook(name):
    at = Problem(64, 16, 5)
    for run in variants(name, at).values():
        to_z, to_codebook = run()
        assert to_z.shape[-2:] == (64, 5)
        assert to_codebook.shape[-2:] == (16, 5)
        assert bool((to_codebook != 0).any())
        assert bool((to_z != 0).any())


def test_autodiff_given_the_indices_is_the_same_estimator():
    at = Problem(64, 16, 5)
    ours = next(iter(variants("rest-detach", at).values()))()
    for run in variants("rest-detach-autodiff", at).values():
        for a, b in zip(run(), ours, strict=True):
            # Rounding of float32 in another order of operations.
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-5)


def test_kmeans_is_the_same_of_both():
    at = Problem(512, 16, 3 * 8 * 8)
    ours, other = (variants(name, at)[""]() for name in ("lloyd-numpy", "scikit-learn-lloyd"))
    assert other.n_iter_ == clusterings.ITERATIONS
    # Float32 sums of up to 512 vectors, in another order; no vector lies that near to the middle of two codewords.
    np.testing.assert_allclose(ours.codebook, other.cluster_centers_, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.indices, other.labels_)


def test_files_hold_what_the_others_compute():
    problem = Problem(3000, 8, 4)
    (fit,), (faiss,) = (CONTENDERS[name].prepared(problem).values() for name in ("fit-file", "faiss-kmeans"))
    found, other = fit(), faiss()
    # From other beginnings, on vectors without clusters.
    np.testing.assert_allclose(found["distortion"], other.obj[-1] / problem.n, rtol=0.1)
    assert len(found["passes"][0]) == len(other.obj) == files.PASSES
    (encode,), (nearest,) = (CONTENDERS[name].prepared(problem).values() for name in ("encode-file", "nearest"))
    np.testing.assert_array_equal(np.load(encode()["out"]), nearest())


def test_neither_kmeans_comes_to_rest_before_its_last_iteration():
    z, codebook = clusterings._patches(bars._PHOTOGRAPHS.sized(512, 16, 192))
    last = [dq.kmeans(z, codebook, iterations=clusterings.ITERATIONS - less).codebook for less in (1, 0)]
    assert (last[0] != last[1]).any()


def test_inertia_row():
    (row,) = inertia_rows(quick=True)
    assert row.met is None
    assert row.value == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("at", [Problem(64, 4, 64), Problem(64, 4, 192, "float64")], ids=str)
def test_kmeans_is_timed_on_patches_only(at):
    with pytest.raises(UnavailableError, match="square patches in colour"):
        CONTENDERS["kmeans-numpy"].prepared(at)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(dtype):
    timed = interleave(taking_part("search", ("numpy", "torch", "jax")), Problem(16, 4, 3, dtype), 1)
    assert "float32" in timed["faiss"].missing
    assert (timed["search-numpy"].missing is None) == (dtype != "bfloat16")
    if importable("torch"):
        assert timed["search-torch"].missing is None


def test_float64_is_float64_in_jax():
    pytest.importorskip("jax")
    with timing._session(Problem(4, 2, 3, "float64")):
        assert arrays(Problem(4, 2, 3, "float64"), "jax")[0].dtype == "float64"


def test_ratio():
    measured = ratio(Timing((1.0, 2.0, 3.0)), Timing((2.0, 2.0, 2.0)))
    assert (measured.value, measured.low, measured.high) == (1.0, 0.75, 1.25)
    assert ratio(Timing((3.0,)), Timing((2.0,))).low == 1.5


def test_the_fastest_variant_counts():
    timed = interleave(("product",), Problem(600, 4, 3), 3)["product"]
    assert timed.variant in {"256 rows", "512 rows", "1024 rows"}
    assert len(timed.seconds) == 3


@pytest.mark.parametrize(("value", "judged", "met"), [(1.0, True, True), (1.1, True, False), (1.0, False, None)])
def test_met(value, judged, met):
    assert Row("", "", "", 1.0, "x", value, judged=judged).met is met


def test_lines_along_an_axis():
    made = [Comparison("search", Problem(n, k, 2), {}) for n, k in ((8, 2), (8, 4), (8, 8), (16, 2), (16, 4))]
    found = lines(made)
    assert [c.problem.k for c in found["search", "k"]] == [2, 4, 8]
    assert [(c.problem.n, c.problem.k) for c in found["search", "n"]] == [(8, 4), (16, 4)]
    assert ("search", "d") not in found


def test_peak_memory_is_that_of_the_computation():
    if not memory._CLEAR.exists():
        pytest.skip("this system keeps no record of the peak")
    importable("torch") or pytest.skip("needs torch")
    at = Problem(4096, 4096, 8)
    matrix, mebibyte = at.matrix_bytes, 2**20
    # The whole matrix shows in the peak of what makes it, to a few pages, and not in ours.
    assert memory.peak_bytes("cdist", at) > matrix - mebibyte
    assert memory.peak_bytes("search-torch", at) < matrix / 2


def test_memory_rows():
    rows = memory_rows(quick=True)
    assert [row.text for row in rows] == ["NumPy", "torch", "JAX"]
    assert all(row.reason or row.value < 256 for row in rows)


def test_a_failing_process_is_a_reason():
    with pytest.raises(UnavailableError, match="the process failed: KeyError"):
        memory.peak_bytes("nobody", Problem(2, 2, 2))


def test_what_the_rule_reads_is_kept_for_the_backward_pass():
    pytest.importorskip("torch")
    rows = saved_rows(quick=True)
    assert [row.value for row in rows] == [row.limit for row in rows] == [0, 2048 * 8 / 1024, 2048 * 64 * 4 / 1024]
    assert all(row.met is None for row in rows)
    at, words, indices = Problem(32, 4, 6), 32 * 6 * 4, 32 * 8
    assert memory.saved_bytes(dq.DiVeQ(), at) == indices + words
    # The codewords and the noise, which autograd's own hooks see in part.
    assert memory.saved_bytes(dq.DiVeQ(), at, trained=False) == 2 * words
    assert memory.saved_bytes(dq.Rotation(), at) == words
    assert memory.saved_bytes(dq.STE(), at, trained=False) == 0


def test_memory_in_a_comparison():
    compared = compare("search", Problem(32, 4, 3), 1, backends=("numpy",), memory=True)
    assert isinstance(compared.memory["search-numpy"], int) or "/proc" in compared.memory["search-numpy"]


def test_settings_of_the_grid():
    made = Settings(grid=True, n=(8, 8), backend=("numpy,torch",))
    assert (made.n, made.backend, made.dtype) == ((8,), ("numpy", "torch"), ("float32",))
    with pytest.raises(BenchError, match="--d must be an integer >= 1, got -1"):
        Settings(grid=True, d=(-1,))


def test_no_library_is_imported_before_it_is_needed():
    loaded = run_python(
        """
        import sys
        import diveq_core
        assert not any(name.startswith("diveq_core.commands.bench") for name in sys.modules)
        import diveq_core.commands.bench.command
        print([name for name in ("torch", "jax", "cupy", "faiss", "diveq") if name in sys.modules])
        """
    )
    assert loaded.strip() == "[]"


def test_limits_are_sane():
    assert all(math.isfinite(bar.limit) and bar.limit > 0 for bar in speed_bars())
    assert len({(bar.group, bar.text, bar.problem) for bar in speed_bars()}) == len(speed_bars())


def test_small_calls_compute_the_same():
    problem = Problem(64, 32, 8)
    (ours,), (by_hand,) = (CONTENDERS[name].prepared(problem).values() for name in ("small-numpy", "by-hand"))
    g_z, g_codebook = ours()
    _, _, expected_z, expected_codebook = by_hand()
    # Sums of up to a dozen rows in float32.
    np.testing.assert_allclose(g_z, expected_z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g_codebook, expected_codebook, rtol=1e-4, atol=1e-5)
    if importable("torch"):
        for name in ("small-torch", "plain"):
            (run,) = CONTENDERS[name].prepared(problem).values()
            assert [tuple(g.shape) for g in run()] == [(64, 8), (32, 8)]


def no_memory_in_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.empty(1 << 48)


def no_memory_in_jax() -> None:
    jax = pytest.importorskip("jax")
    jax.numpy.zeros(1 << 44).block_until_ready()


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("fails", [no_memory_in_torch, no_memory_in_jax, no_memory])
@pytest.mark.parametrize("name", ["bench", "compare"])
def test_what_a_library_has_no_memory_for_is_one_line(monkeypatch, name: str, fails) -> None:
    module = importlib.import_module(f"diveq_core.commands.{name}.command")
    monkeypatch.setattr(module, name, lambda *_: fails())
    result = CliRunner().invoke(app, [name])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{name}: these sizes do not fit in memory: ")
    assert result.stderr.count("\n") == 1


def test_another_error_is_not_hidden(monkeypatch) -> None:
    def fails(*_):
        raise RuntimeError("no such stream")

    monkeypatch.setattr(command, "bench", fails)
    with pytest.raises(RuntimeError, match="no such stream"):
        CliRunner().invoke(app, ["bench"], catch_exceptions=False)
