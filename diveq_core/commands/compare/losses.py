"""The losses, each with its gradient by hand; means over all entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from array_api_compat import array_namespace

from diveq_core.losses import codebook_loss_vjp, commitment_loss_vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array


def squared_error(y: Array, x: Array) -> tuple[Array, Array]:
    r"""Mean squared error and its gradient to ``y``.

    .. math:: L = \frac1{NP} \sum (y - x)^2, \qquad g_y = \frac2{NP} (y - x)
    """
    xp = array_namespace(y, x)
    error = y - x
    return xp.mean(error * error), error * (2 / math.prod(error.shape))


def codebook_loss(z: Array, codebook: Array, indices: Array) -> tuple[Array, Array]:
    """Codebook loss and its gradient to the codebook."""
    return _with_gradient(codebook_loss_vjp(z, codebook, indices))


def commitment_loss(z: Array, codebook: Array, indices: Array) -> tuple[Array, Array]:
    """Commitment loss and its gradient to ``z``."""
    return _with_gradient(commitment_loss_vjp(z, codebook, indices))


def _with_gradient(result: tuple[Array, Callable[[Array], Array]]) -> tuple[Array, Array]:
    loss, pullback = result
    return loss, pullback(array_namespace(loss).ones_like(loss))
