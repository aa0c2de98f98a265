"""A layer of torch beside that of another package: the same vectors, cotangents and state."""

from __future__ import annotations

from typing import Any

import torch

from vectors import normal32

D, K = 6, 8

# Values of order one after a few dozen roundings of float32. The peers' smoothing by 1e-5 is of this order too.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

# Neither a start from data nor replacement, which the peers do not do by default.
PLAIN = {"init": "normal", "replace_every": 0}


def vectors(*shape: int, seed: int = 0) -> Any:
    return torch.tensor(normal32(*shape, seed=seed))


def step(layer: Any, z: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Output, tokens, loss, and the gradient of z under a fixed cotangent of the output and the loss."""
    z = z.clone().requires_grad_()
    z_q, indices, loss, *_ = layer(z, **options)
    g = vectors(*z_q.shape, seed=99)
    ((z_q * g).sum() + loss.sum()).backward()
    return z_q.detach(), indices, loss.detach(), z.grad


def assert_same_step(new: tuple[Any, ...], old: tuple[Any, ...]) -> None:
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
