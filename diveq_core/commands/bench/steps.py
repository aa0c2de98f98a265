r"""The training step: search, forward, backward to ``z`` and ``codebook``; and the step less its search.

The peers are configured to do this and no more: training mode, a codebook that learns by its gradient, no moving
averages, no replacement, no k-means. What an option cannot turn off stays in: `diveq` computes its perplexity.
All draw noise of variance 1e-3 of their own. (`diveq` takes ``noise_var`` for a standard deviation; the cost is
the same.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, UnavailableError, arrays, load, synchronize

if TYPE_CHECKING:
    from collections.abc import Callable

    Variants = dict[str, Callable[[], object]]

_VARIANCE = 1e-3


def ours(library: str) -> Callable[[Problem], Variants]:
    """`diveq_core.quantize` differentiated by the library, `diveq_core.vjp` in NumPy and CuPy."""
    return {"torch": _in_torch, "jax": _in_jax}.get(library) or (lambda problem: _by_vjp(library, problem))


def _in_torch(problem: Problem) -> Variants:
    z, codebook, g = _leaves(problem)
    return {"": _gradients(problem, lambda: dq.quantize(z, codebook, dq.DiVeQ()).z_q, z, codebook, g)}


def _in_jax(problem: Problem) -> Variants:
    jax = load("jax")
    z, codebook, g = arrays(problem, "jax")

    @jax.jit
    def step(z, codebook, g, key):  # type: ignore[no-untyped-def]
        z_q, pullback = jax.vjp(lambda z, codebook: dq.quantize(z, codebook, dq.DiVeQ(), rng=key).z_q, z, codebook)
        return pullback(g), z_q

    key = jax.random.key(0)
    return {"jit": lambda: jax.block_until_ready(step(z, codebook, g, key))[0]}


def _by_vjp(library: str, problem: Problem) -> Variants:
    z, codebook, g = arrays(problem, library)
    module = load(library)
    rng = module.random.default_rng(0)

    def run() -> object:
        _, pullback = dq.vjp(z, codebook, dq.DiVeQ(), rng=rng)
        gradients = pullback(g)
        synchronize(problem, library)
        return gradients

    return {"": run}


def autodiff(problem: Problem) -> Variants:
    """Our search, then the estimator as one writes it, differentiated by torch."""
    z, codebook, g = _leaves(problem)

    def forward(gather: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: _diveq(z, gather(codebook, dq.nearest(z, codebook)), noisy=True)

    return {
        name: _gradients(problem, forward(gather), z, codebook, g)
        for name, gather in (("embedding", _embedding), ("index_select", _index_select))
    }


def diveq_package(problem: Problem) -> Variants:
    """The authors' `diveq`."""
    _only_float32(problem, "diveq")
    package = load("diveq")
    z, codebook, g = _leaves(problem)
    module = package.DIVEQ(
        problem.k, problem.d, noise_var=_VARIANCE, codebook_reset=False, allow_warning=False, verbose=False
    ).to(problem.device)
    _set(module.codebook, codebook)
    return {"": _gradients(problem, lambda: module(z)[0], z, module.codebook, g)}


def vector_quantize_pytorch(problem: Problem) -> Variants:
    """`vector-quantize-pytorch` with ``directional_reparam``.

    ``freeze_codebook`` turns off its counting of codewords, which otherwise goes with that option; the gradient
    reaches the codebook all the same.
    """
    _only_float32(problem, "vector-quantize-pytorch")
    package = load("vector_quantize_pytorch")
    z, codebook, g = _leaves(problem)
    module = package.VectorQuantize(
        dim=problem.d,
        codebook_size=problem.k,
        directional_reparam=True,
        directional_reparam_variance=_VARIANCE,
        threshold_ema_dead_code=2,
        freeze_codebook=True,
    ).to(problem.device)
    parameter = module._codebook.embed
    _set(parameter, codebook[None])
    batch = z.detach()[None].requires_grad_()
    return {"": _gradients(problem, lambda: module(batch)[0], batch, parameter, g[None])}


def rest(*, noisy: bool) -> Callable[[Problem], Variants]:
    """Our step, given the indices."""
    estimator = dq.DiVeQ() if noisy else dq.DiVeQDetach()

    def prepare(problem: Problem) -> Variants:
        z, codebook, g = _leaves(problem)
        indices = dq.nearest(z, codebook)
        return {
            "": _gradients(problem, lambda: dq.quantize(z, codebook, estimator, indices=indices).z_q, z, codebook, g)
        }

    return prepare


def rest_by_autodiff(*, noisy: bool) -> Callable[[Problem], Variants]:
    """The same estimator by plain automatic differentiation, given the same indices."""

    def prepare(problem: Problem) -> Variants:
        z, codebook, g = _leaves(problem)
        indices = dq.nearest(z, codebook)

        def forward(gather: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: _diveq(z, gather(codebook, indices), noisy=noisy)

        gathers = {"embedding": _embedding, "index_select": _index_select, "indexing": lambda c, i: c[i]}
        return {name: _gradients(problem, forward(gather), z, codebook, g) for name, gather in gathers.items()}

    return prepare


def _diveq(z: Any, q: Any, *, noisy: bool) -> Any:
    """``z + |q - z| sg[w]``, nothing of ``w`` recorded."""
    torch = load("torch")
    d = q - z
    with torch.no_grad():
        direction = torch.add(d, torch.randn_like(d), alpha=_VARIANCE**0.5) if noisy else d
        w = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return z + torch.linalg.vector_norm(d, dim=1, keepdim=True) * w


def _embedding(codebook: Any, indices: Any) -> Any:
    return load("torch").nn.functional.embedding(indices, codebook)


def _index_select(codebook: Any, indices: Any) -> Any:
    return codebook.index_select(0, indices)


def _leaves(problem: Problem) -> tuple[Any, Any, Any]:
    z, codebook, g = arrays(problem, "torch")
    return z.requires_grad_(), codebook.requires_grad_(), g


def _gradients(problem: Problem, forward: Callable[[], Any], z: Any, codebook: Any, g: Any) -> Callable[[], object]:
    torch = load("torch")

    def run() -> object:
        gradients = torch.autograd.grad(forward(), (z, codebook), g)
        synchronize(problem)
        return gradients

    return run


def _set(parameter: Any, values: Any) -> None:
    with load("torch").no_grad():
        parameter.copy_(values)


def _only_float32(problem: Problem, name: str) -> None:
    if problem.dtype != "float32":
        raise UnavailableError(f"{name} is compared in float32 only")
