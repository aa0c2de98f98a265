"""Straight-through Gumbel-softmax in the experiment: logits are negative squared distances, of a trained scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from array_api_compat import array_namespace

from diveq_core.commands.compare.quantizers import Arrays, Codebook, Trained
from diveq_core.verbs import vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.gumbel import GumbelST


def squared_distances(z: Array, codebook: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    r"""All squared distances.

    .. math:: s_{nk} = \|z_n - E_k\|^2, \qquad g_{z_n} = 2 \sum_k g_{nk} (z_n - E_k), \qquad
              g_{E_k} = 2 \sum_n g_{nk} (E_k - z_n)
    """
    xp = array_namespace(z, codebook)

    def pullback(g: Array) -> tuple[Array, Array]:
        g_z = 2 * (xp.sum(g, axis=1)[:, None] * z - g @ codebook)
        return g_z, 2 * (xp.sum(g, axis=0)[:, None] * codebook - g.T @ z)

    squares = xp.sum(z * z, axis=1)[:, None] + xp.sum(codebook * codebook, axis=1)
    return squares - 2 * (z @ codebook.T), pullback


@dataclass(frozen=True)
class Drawn(Codebook):
    r"""Codewords drawn with logits :math:`l_{nk} = -e^\lambda \|z_n - E_k\|^2`; afterwards the likeliest."""

    gumbel: GumbelST

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        # So that the nearest other codeword is some units of logit away.
        squares = squared_distances(codewords, codewords)[0]
        np.fill_diagonal(squares, np.inf)
        nearest = np.min(squares, axis=1)
        typical = np.mean(nearest) if np.isfinite(nearest).all() and np.mean(nearest) > 0 else 1.0
        return {"codebook": codewords, "gumbel.log_scale": np.asarray([np.log(4.0 / typical)])}

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        return {"gumbel": rng.gumbel(size=(count, codewords))}

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        codebook = parameters["codebook"]
        xp = array_namespace(z)
        scale = xp.exp(parameters["gumbel.log_scale"])
        squares, distance_pullback = squared_distances(z, codebook)
        logits = -scale * squares
        out, drawn_pullback = vjp(logits, codebook, self.gumbel, noise=noise["gumbel"], check_finite=False)

        def pullback(g: Array) -> tuple[Array, Arrays]:
            g_logits, g_drawn = drawn_pullback(g)
            g_z, g_codebook = distance_pullback(-scale * g_logits)
            g_log_scale = xp.reshape(xp.sum(g_logits * logits), (1,))
            return g_z, {"codebook": g_drawn + g_codebook, "gumbel.log_scale": g_log_scale}

        return Trained(out.z_q, out.indices, pullback)
