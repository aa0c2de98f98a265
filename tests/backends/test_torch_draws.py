"""Noise in PyTorch on a CPU: drawn in chunks on all threads, from the caller's stream alone."""

from __future__ import annotations

import math
import sys

import pytest

import diveq_core as dq
from processes import run_python
from torch_cases import assert_equal, loss_of, torch, whole


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch):
    """The module, with chunks so small that small tests have several."""
    from diveq_torch import draws

    monkeypatch.setattr(draws, "CHUNK", 64)
    return draws


def drawn(rows: int = 100, rng=None, **options):
    """The noise itself: NSVQ of zeros, beside a codeword of length one, over its length."""
    z = torch.zeros(rows, 3, dtype=torch.float64, **options)
    return dq.quantize(z, z.new_tensor([[1.0, 0.0, 0.0]]), dq.NSVQ(), rng=rng).z_q


def generator(seed: int = 5):
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, dtype=torch.float32, rng=None):
    import diveq_torch

    return diveq_torch.backend.standard_normal("test", torch.empty(shape, dtype=dtype), rng)


@pytest.mark.parametrize("given", [False, True], ids=["default", "generator"])
def test_follows_from_the_stream_alone(draws, given: bool):
    before, streams, seen = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            rng = generator() if given else None
            seen.append(torch.cat([drawn(rng=rng), drawn(rng=rng)]))
            streams.append(torch.randn(3, generator=rng))
    finally:
        torch.set_num_threads(before)
    for x, following in zip(seen, streams, strict=True):
        assert_equal(x, seen[0])
        assert_equal(following, streams[0])
    assert (seen[0][:100] != seen[0][100:]).any(1).all()
    if given:
        torch.manual_seed(3)
        assert_equal(torch.randn(3, generator=generator()) == streams[0], torch.zeros(3, dtype=torch.bool))
    torch.manual_seed(4)
    assert (drawn(rng=generator(6) if given else None) != seen[0][:100]).any(1).all()


def test_few_come_from_the_stream_itself(draws):
    assert_equal(numbers(8, 8, rng=generator()), torch.randn(8, 8, generator=generator()))
    assert (numbers(13, 5, rng=generator()) != torch.randn(13, 5, generator=generator())).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_standard_normal_and_independent(dtype):
    from diveq_torch import draws

    count, chunks = 12 * draws.CHUNK + 100, 12
    x = numbers(count, dtype=dtype, rng=generator()).double()
    # Five standard deviations of each statistic.
    assert abs(x.mean()) < 5 / math.sqrt(count)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    rows = x[: chunks * draws.CHUNK].reshape(chunks, -1)
    here, other = torch.triu_indices(chunks, chunks, 1)
    for y in (rows, rows.abs() - math.sqrt(2 / math.pi)):
        correlation = torch.corrcoef(y)
        assert correlation[here, other].abs().max() < 5 / math.sqrt(draws.CHUNK)
        # Nor of a number with the next.
        assert abs((y[:, 1:] * y[:, :-1]).mean() / y.square().mean()) < 5 / math.sqrt(count)
    if dtype in (torch.float32, torch.float64):
        for y in rows:
            steps = torch.arange(1, draws.CHUNK + 1, dtype=torch.float64) / draws.CHUNK
            below = torch.special.ndtr(y.sort().values)
            # Kolmogorov and Smirnov: above this once in ten million.
            assert (below - steps).abs().max() < 2.9 / math.sqrt(draws.CHUNK)


def test_no_chunk_comes_twice(draws):
    rows = torch.cat([numbers(64 * 500, rng=rng).reshape(-1, 64) for rng in [generator()] * 4])
    assert len(rows.unique(dim=0)) == len(rows) == 2000


def test_a_checkpoint_draws_the_same_again(draws):
    from torch.utils.checkpoint import checkpoint

    def gradients(call):
        torch.manual_seed(1)
        z, codebook = torch.randn(100, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        loss_of(call(lambda z, codebook: dq.quantize(z, codebook, dq.DiVeQ(1.0)).z_q, z, codebook)).backward()
        return z.grad, codebook.grad

    expected = gradients(lambda f, *x: f(*x))
    for reentrant in (False, True):
        assert_equal(gradients(lambda f, *x, r=reentrant: checkpoint(f, *x, use_reentrant=r)), expected)


def test_vmap_has_its_own_way(draws):
    codebook = torch.tensor([[1.0, 0.0, 0.0]])
    call = lambda z: dq.quantize(z, codebook, dq.NSVQ()).z_q  # noqa: E731
    z = torch.zeros(2, 100, 3)
    first, second = torch.vmap(call, randomness="different")(z)
    assert (first != second).any(1).all()
    first, second = torch.vmap(call, randomness="same")(z)
    assert_equal(first, second)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(z)


@pytest.mark.filterwarnings("ignore:Deterministic behavior")
def test_inference_mode_and_deterministic_algorithms(draws):
    expected = drawn(rng=generator())
    with torch.inference_mode():
        assert_equal(drawn(rng=generator()).clone(), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(drawn(rng=generator()), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_values(draws):
    from torch._subclasses import FakeTensorMode

    assert drawn(device="meta").shape == (100, 3)
    with FakeTensorMode():
        assert drawn().shape == (100, 3)
    seen = whole(lambda z: dq.quantize(z, z[:4] + 1, dq.NSVQ()).z_q)(torch.zeros(100, 3))
    assert seen.isfinite().all()
    with torch.device("meta"):
        assert numbers(100, 3).device.type == "meta"
        assert drawn(device="cpu").device.type == "cpu"


FORK = """
    import multiprocessing
    import warnings

    import torch
    import diveq_core as dq

    z = torch.zeros(70000, 4)

    def noise():
        return dq.quantize(z, z[:1] + 1, dq.NSVQ(), rng=torch.Generator().manual_seed(0)).z_q

    def child(queue):
        queue.put(noise().numpy())

    if __name__ == "__main__":
        expected = noise().numpy()
        # Python 3.12 warns of any fork beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,), daemon=True)
        process.start()
        print((queue.get(timeout=60) == expected).all())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_draws_after_its_parent():
    assert run_python(FORK) == "True\n"
