"""The module for PyTorch compiled: one graph, the numbers of eager, no new graph for a new batch size."""

from __future__ import annotations

import pytest

import diveq_core as dq
from layer_cases import DIM, K, plain

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from diveq_torch import VectorQuantizer  # noqa: E402

OPTIONS = {
    "DiVeQ": {"replace_every": 3},
    "averages": {"estimator": dq.STE(), "codebook_update": "ema", "ema_decay": 0.5, "replace_every": 3},
}
SIZES = [40, 40, 56, 56, 64, 33, 40]


def run(options: dict, compiler, checkpointed: bool = False) -> list[torch.Tensor]:
    """Losses, gradients and state of some steps of every size."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    vq, encoder = VectorQuantizer(DIM, K, **options), torch.nn.Linear(DIM, DIM)

    def forward(z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        out = vq(encoder(z), noise=noise)
        return out.z_q.square().mean() + out.loss

    step, found = compiler(forward), []
    for seed, size in enumerate(SIZES):
        z, noise = torch.tensor(plain(seed))[:size], torch.tensor(plain(seed + 100))[:size]
        loss = checkpoint(step, z, noise, use_reentrant=False) if checkpointed else step(z, noise)
        loss.backward()
        found.append(loss.detach())
    vq.update()
    return [*found, encoder.weight.grad, *(p.grad for p in vq.parameters()), *vq.buffers()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_with_the_numbers_of_eager(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    sizes = iter(SIZES)
    graphs = []

    def compiler(f):
        compiled = torch.compile(f, fullgraph=True, backend=counter)

        def step(*arguments):
            out = compiled(*arguments)
            graphs.append((next(sizes), counter.frame_count))
            return out

        return step

    same(run(OPTIONS[name], compiler), run(OPTIONS[name], lambda f: f))
    # The first batch starts the codebook, the third has another size; from then on nothing is new.
    assert [count for _, count in graphs[3:]] == [graphs[2][1]] * len(SIZES[3:])


def test_a_checkpoint_of_a_compiled_layer_counts_once() -> None:
    def compiler(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    options = OPTIONS["averages"] | {"init": "normal"}
    same(run(options, compiler, checkpointed=True), run(options, lambda f: f))


@pytest.mark.slow
# The compiler uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_default_compiler(name: str) -> None:
    same(run(OPTIONS[name], lambda f: torch.compile(f, fullgraph=True)), run(OPTIONS[name], lambda f: f))
