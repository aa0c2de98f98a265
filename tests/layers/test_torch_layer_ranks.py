"""The module for PyTorch on several ranks: two and four processes of gloo, under DDP and FSDP2."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from layer_cases import DIM, K
from processes import finish, started

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")

STEPS, ROWS = 6, 96

RANK = """
import sys
from test_torch_layer_ranks import rank
rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""

KINDS: dict[str, dict[str, Any]] = {
    # No draw, so that one process can be compared to rounding.
    "averages": {"codebook_update": "ema", "init": "normal", "replace_every": 0},
    "gradients": {"codebook_weight": 1.0, "init": "normal", "replace_every": 0},
    "replacement": {"codebook_update": "ema", "init": "data", "replace_every": 2, "not_finite": "skip"},
    "k-means": {"init": "kmeans", "replace_every": 2, "not_finite": "skip", "stages": 2},
    "sharded": {"codebook_update": "ema", "init": "normal", "replace_every": 0},
    "sharded gradients": {"codebook_weight": 1.0, "init": "normal", "replace_every": 0},
}


ON = {2: ["averages", "gradients", "k-means", "sharded", "sharded gradients"], 4: ["averages", "replacement"]}


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((ROWS, DIM)).astype(np.float32) for _ in range(STEPS)]


def part(kind: str, step: int, batch: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """What a rank has of a batch; with replacement the last rank once has nothing, and once nothing finite."""
    own = batch[rank::ranks]
    if kind in ("replacement", "k-means") and rank == ranks - 1:
        own = own[:0] if step == 0 else own * np.float32(np.nan) if step == 3 else own
    return own


def train(kind: str, rank: int = 0, ranks: int = 1) -> dict[str, np.ndarray]:
    import diveq_core as dq
    from diveq_torch import VectorQuantizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), VectorQuantizer(DIM, K, dq.STE(), **KINDS[kind]))
    vq, wrapped = model[1], model
    if ranks > 1:
        # Of another seed from here on.
        torch.manual_seed(rank)
        if kind.startswith("sharded"):
            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, batch in enumerate(batches()):
        z = torch.tensor(part(kind, step, batch, rank, ranks))
        out = wrapped(z)
        # The mean over all ranks' vectors: DDP averages gradients over ranks, whose batches are equal but for the
        # lost ones.
        loss = out.z_q.square().sum() / (ROWS // ranks * DIM) + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vq.update()
    return vq.arrays()


def rank(folder: str, own: int, ranks: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=ranks)
    for kind in ON[ranks]:
        np.savez(f"{folder}/{kind}.{own}.npz", **train(kind, own, ranks))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of what so many ranks trained, all kinds in the same processes."""

    @functools.cache
    def on(ranks: int) -> Path:
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("torch is built without gloo")
        folder, here = tmp_path_factory.mktemp(f"ranks{ranks}"), Path(__file__).parent
        finish(*(started(here, RANK, str(folder), str(own), str(ranks)) for own in range(ranks)))
        return folder

    return on


@pytest.mark.parametrize(("ranks", "kind"), [(ranks, kind) for ranks, kinds in ON.items() for kind in kinds])
def test_ranks_end_with_one_state(ranks: int, kind: str, trained: Callable[[int], Path]) -> None:
    states = []
    for own in range(ranks):
        with np.load(trained(ranks) / f"{kind}.{own}.npz") as arrays:
            states.append({name: arrays[name] for name in arrays.files})
    for state in states[1:]:
        for name, x in state.items():
            np.testing.assert_array_equal(x, states[0][name], err_msg=name)
    assert int(states[0]["steps"]) == STEPS
    assert all(np.isfinite(x).all() for x in states[0].values())
    if KINDS[kind]["init"] == "normal":
        for name, x in train(kind).items():
            np.testing.assert_allclose(states[0][name], x, rtol=2e-5, atol=2e-6, err_msg=name)
