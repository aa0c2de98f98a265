"""What the tests of PyTorch share; importing it skips a module where torch is missing."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq

torch = pytest.importorskip("torch")

ESTIMATORS = [
    dq.STE(),
    dq.NSVQ(),
    dq.DiVeQ(),
    dq.DiVeQDetach(),
    dq.Radial(dq.Power(0.5)),
    dq.Radial(dq.PseudoHuber(0.3)),
    dq.Radial(dq.PNorm(3.0)),
    dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0]))),
    dq.Radial(dq.Cosine()),
    dq.Radial(lambda q, z: ((q - z).abs() ** 1.5).sum(dim=-1)),
]

IDS = {"ids": lambda e: type(getattr(e, "radius", e)).__name__}

# The same formula in another order of operations, on numbers of order one.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

CLOSE64 = {"rtol": 1e-10, "atol": 1e-10}

MAHALANOBIS = dq.Mahalanobis(np.diag([1.0, 2.0, 3.0]))

# torch's forward mode compiles decompositions by a function that torch itself has deprecated.
own_deprecation = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def problem(rows: int = 6, count: int = 5, dtype=torch.float32, seed: int = 0):
    """z, codebook and noise; the first two ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 3), (count, 3), (rows, 3)
    z, codebook, noise = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return z.requires_grad_(), codebook.requires_grad_(), noise


def loss_of(z_q):
    """A loss whose cotangent depends on z_q."""
    return (z_q**3).sum() + (z_q * torch.linspace(-1, 1, 3, dtype=z_q.dtype, device=z_q.device)).sum()


def reference(z, codebook, estimator, noise):
    """Loss and its two gradients by `vjp`, in NumPy unless the radius is a function of tensors."""
    by_value = isinstance(getattr(estimator, "radius", None), dq.CustomRadius)
    convert = (lambda x: x.detach()) if by_value else (lambda x: x.detach().numpy())
    out, pullback = dq.vjp(convert(z), convert(codebook), estimator, noise=convert(noise))
    z_q = torch.as_tensor(out.z_q).requires_grad_()
    loss = loss_of(z_q)
    (g,) = torch.autograd.grad(loss, z_q)
    return loss.detach(), *(torch.as_tensor(x) for x in pullback(convert(g)))


def gradient_of(codebook):
    """Its gradient, None read as zeros."""
    return torch.zeros_like(codebook) if codebook.grad is None else codebook.grad


def assert_equal(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def whole(f):
    """``f`` compiled without a graph break, which fullgraph=True makes an error."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def moved_by_averages(codebook, z, indices):
    """What moving averages write, far from what was there."""
    return dq.ema_update(dq.ema_init(codebook), z.detach(), codebook, indices, decay=0.1)[1] * 3


class Quantizer(torch.nn.Module):
    def __init__(self, estimator, codebook=None):
        super().__init__()
        codebook = torch.linspace(-1, 1, 15).reshape(5, 3) if codebook is None else codebook
        self.codebook = torch.nn.Parameter(codebook)
        self.estimator = estimator

    def forward(self, z):
        return dq.quantize(z, self.codebook, self.estimator).z_q
