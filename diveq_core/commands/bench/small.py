"""Small calls: a whole training step of few vectors, in which dispatch costs more than arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, arrays, load

if TYPE_CHECKING:
    from collections.abc import Callable

    Variants = dict[str, Callable[[], object]]

SIGMA = 10**-1.5


def ours(library: str) -> Callable[[Problem], Variants]:
    """Search, DiVeQ and its gradients: by autograd in torch, by `diveq_core.vjp` in NumPy."""
    return _in_torch if library == "torch" else _in_numpy


def _in_torch(problem: Problem) -> Variants:
    torch = load("torch")
    z, codebook, g = arrays(problem, "torch")
    z.requires_grad_(), codebook.requires_grad_()
    return {"": lambda: torch.autograd.grad(dq.quantize(z, codebook, dq.DiVeQ(SIGMA)).z_q, (z, codebook), g)}


def plain(problem: Problem) -> Variants:
    """The same in torch as one writes it without a library."""
    torch = load("torch")
    z, codebook, g = arrays(problem, "torch")
    z.requires_grad_(), codebook.requires_grad_()

    def run() -> object:
        with torch.no_grad():
            indices = torch.cdist(z, codebook).argmin(1)
        d = codebook[indices] - z
        rho = d.norm(dim=1, keepdim=True)
        w = (d + SIGMA * torch.randn_like(d)).detach()
        z_q = z + rho * (w / w.norm(dim=1, keepdim=True))
        return torch.autograd.grad(z_q, (z, codebook), g)

    return {"": run}


def _in_numpy(problem: Problem) -> Variants:
    z, codebook, g = arrays(problem, "numpy")
    noise = np.random.default_rng(0).standard_normal(z.shape, dtype=np.float32).astype(z.dtype)

    def run() -> object:
        _, pullback = dq.vjp(z, codebook, dq.DiVeQ(SIGMA), noise=noise)
        return pullback(g)

    return {"": run}


def by_hand(problem: Problem) -> Variants:
    """The same in NumPy as one writes it without a library, given the noise."""
    z, codebook, g = arrays(problem, "numpy")
    noise = np.random.default_rng(0).standard_normal(z.shape, dtype=np.float32).astype(z.dtype)

    def run() -> object:
        squares = (z**2).sum(1)[:, None] - 2 * z @ codebook.T + (codebook**2).sum(1)
        indices = squares.argmin(1)
        d = codebook[indices] - z
        rho = np.sqrt((d * d).sum(1, keepdims=True))
        w = d + SIGMA * noise
        w /= np.sqrt((w * w).sum(1, keepdims=True))
        g_q = (g * w).sum(1, keepdims=True) * (d / rho)
        g_codebook = np.zeros_like(codebook)
        np.add.at(g_codebook, indices, g_q)
        return z + rho * w, indices, g - g_q, g_codebook

    return {"": run}
