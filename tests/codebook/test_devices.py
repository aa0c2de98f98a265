"""Upkeep of a codebook on real devices: JAX's `psum` on two, torch.distributed's `all_reduce` in two processes.

Elsewhere ranks are threads; here nothing is simulated. The answers to compare with are those of one device.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import diveq_core as dq
from processes import finish, started

HERE = Path(__file__).parent

ROWS, K, D = 46, 5, 3


def problem() -> dict[str, np.ndarray]:
    """Tight clusters whose codewords are near them, of which two are never chosen, and noise of every draw."""
    rng = np.random.default_rng(0)
    centres = 10.0 * np.arange(3)[:, None] + np.eye(3)
    z = centres[np.arange(ROWS) % 3] + 0.1 * rng.standard_normal((ROWS, D))
    codebook = np.concatenate([centres + 0.5, np.full((2, D), 1000.0) + np.arange(2)[:, None]])
    noise, seeds = rng.standard_normal((K, D + 2)), rng.standard_normal((3, 3, 2))
    return {"z": z, "codebook": codebook, "noise": noise, "seeds": seeds}


def upkeep(z, codebook, noise, seeds, all_reduce=None):
    """What is to be the same on every device: all that depends on vectors of others."""
    indices = dq.nearest(z, codebook)
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, indices, all_reduce=all_reduce)
    by_use = dq.replace_unused(moved, state.counts, noise=noise, state=state)
    by_batch = dq.replace_unused(moved, state.counts, z=z, noise=noise, jitter=0.0, all_reduce=all_reduce)
    found = dq.kmeans(z, 3, iterations=3, noise=seeds, all_reduce=all_reduce)
    return state.counts, moved, by_use.codebook, by_batch.codebook, found.codebook, found.inertia


PSUM = """
    import sys
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P
    from test_devices import problem, upkeep

    assert len(jax.devices()) == 2
    z, *rest = (jax.numpy.asarray(x, "float32") for x in problem().values())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def each(z):
        outs = upkeep(z, *rest, all_reduce=lambda x: jax.lax.psum(x, "data"))
        return [x[None] for x in outs]

    # What a device computes is its own row: nothing says that they are equal.
    step = jax.shard_map(each, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    np.savez(sys.argv[1], *(np.asarray(x) for x in jax.jit(step)(z)))
"""

GLOO = """
    import sys
    import numpy as np
    import torch
    import torch.distributed as distributed
    from test_devices import problem, upkeep

    rank = int(sys.argv[2])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.meeting", rank=rank, world_size=2)

    def all_reduce(x):
        total = x.clone()
        distributed.all_reduce(total)
        return total

    torch.set_num_threads(1)
    z, *rest = (torch.tensor(x, dtype=torch.float32) for x in problem().values())
    outs = upkeep(z.chunk(2)[rank], *rest, all_reduce=all_reduce)
    np.savez(f"{sys.argv[1]}.{rank}.npz", *(x.numpy() for x in outs))
    distributed.destroy_process_group()
"""


def check(devices: list[list[np.ndarray]]) -> None:
    """Both have the same, bit for bit, and what one device with all vectors has."""
    for mine, yours in zip(*devices, strict=True):
        np.testing.assert_array_equal(mine, yours)
    p = {name: x.astype(np.float32) for name, x in problem().items()}
    counts, moved, by_use, by_batch, words, inertia = devices[0]
    alone = upkeep(*p.values())
    # Sums of 46 numbers in another order; k-means sets out from the vectors in another, to the same clusters.
    for got, expected in ((counts, alone[0]), (moved, alone[1]), (by_use, alone[2])):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sort(words, axis=0), np.sort(alone[4], axis=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(inertia, alone[5], rtol=1e-3)
    # Replacements are vectors of the joined batch, and one of each device's: the draws are stratified.
    used = counts > 0
    assert used.tolist() == [True] * 3 + [False] * 2
    np.testing.assert_array_equal(by_batch[used], moved[used])
    sources = [np.flatnonzero((p["z"] == word).all(axis=1)) for word in by_batch[~used]]
    assert all(len(source) == 1 for source in sources)
    assert sorted(int(source[0]) // (ROWS // 2) for source in sources) == [0, 1]


def test_psum_on_two_devices(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    path = tmp_path / "found.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    finish(started(HERE, PSUM, str(path), XLA_FLAGS=flags, JAX_PLATFORMS="cpu"))
    with np.load(path) as found:
        check([[found[name][device] for name in found.files] for device in (0, 1)])


def test_all_reduce_in_two_processes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    path = tmp_path / "found"
    finish(*(started(HERE, GLOO, str(path), str(rank)) for rank in (0, 1)))
    devices = []
    for rank in (0, 1):
        with np.load(f"{path}.{rank}.npz") as found:
            devices.append([found[name] for name in found.files])
    check(devices)
