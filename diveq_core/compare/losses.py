"""The losses, each with its gradient by hand; means over all entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from array_api_compat import array_namespace

from diveq_core.registry import backend_of

if TYPE_CHECKING:
    from diveq_core._array import Array


def squared_error(y: Array, x: Array) -> tuple[Array, Array]:
    r"""Mean squared error and its gradient to ``y``.

    .. math:: L = \frac1{NP} \sum (y - x)^2, \qquad g_y = \frac2{NP} (y - x)
    """
    xp = array_namespace(y, x)
    error = y - x
    return xp.mean(error * error), error * (2 / math.prod(error.shape))


def codebook_loss(z: Array, codebook: Array, indices: Array) -> tuple[Array, Array]:
    r"""Codebook loss, which moves codewords to the vectors that chose them; and its gradient to the codebook.

    .. math:: L = \frac1{ND} \sum_n \|\operatorname{sg}[z_n] - q_n\|^2, \qquad
              g_{E_k} = \frac2{ND} \sum_{n : i_n = k} (q_n - z_n)

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", arXiv:1711.00937, equation 3,
    second term.
    """
    lib = backend_of("codebook_loss", z=z, codebook=codebook)
    loss, g_q = squared_error(lib.take_rows(codebook, indices), z)
    return loss, lib.segment_sum(g_q, indices, codebook.shape[0])


def commitment_loss(z: Array, codebook: Array, indices: Array) -> tuple[Array, Array]:
    r"""Commitment loss, which moves vectors to their codewords; and its gradient to ``z``.

    .. math:: L = \frac1{ND} \sum_n \|z_n - \operatorname{sg}[q_n]\|^2, \qquad g_{z_n} = \frac2{ND} (z_n - q_n)

    References
    ----------
    The same equation, third term.
    """
    lib = backend_of("commitment_loss", z=z, codebook=codebook)
    return squared_error(z, lib.take_rows(codebook, indices))
