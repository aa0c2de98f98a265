r"""Space-filling DiVeQ: codewords are the corners of a curve, and vectors go to its segments.

Training draws one dither :math:`t_k \in [0, 1)` for each of the K - 1 segments :math:`(E_k, E_{k+1})`; the nearest
dithered point :math:`(1 - t_k) E_k + t_k E_{k+1}` picks the segment. With the ends :math:`c_1, c_2` of the chosen
segment and its t,

.. math:: d_j = c_j - z, \qquad \rho_j = \|d_j\|, \qquad u_j = d_j / \rho_j \quad (0 \text{ where } \rho_j = 0).

Inference projects onto the nearest point of the whole curve: see `diveq_core.curve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import check_floating, check_shape
from diveq_core.arrays.draws import uniform
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import Array, Direction, check_option, describe, noised, side_by_side
from diveq_core.estimators.base import Estimator

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend


Pair = tuple[Array, Array]


class CurveNoise(NamedTuple):
    """What one training step of a space-filling quantizer draws."""

    dither: Array
    """Position of the point of each segment, (K - 1,), uniform in [0, 1)."""

    ends: Array | None = None
    """Standard normal noise for each end of the segment, (2, ..., D), in the shape of z otherwise; `SFDiVeQ` only."""


class _SpaceFilling(Estimator):
    """What `SFDiVeQ` and `SFDiVeQDetach` share: the derivatives, for given directions w.

    ``q`` (N, 2 D) holds both ends of each vector's segment, and ``noise`` (N, 1) or (N, 1 + 2 D) its t and the noise
    of both ends.
    """

    sigma: float = 0.0
    corners = 2
    index_bound = "K - 1"

    @property
    def hard(self) -> bool:
        """Never: the output is a point between codewords."""
        return False

    def draw(self, function: str, lib: Backend, z: Array, codebook: Array, noise: Any, rng: Any) -> CurveNoise:
        if noise is None:
            streams = lib.streams(function, rng, 2)
            # Not in 16 bits, which would round what is just below one to one.
            dtype = lib.compute_dtype(codebook.dtype)
            pairs = lib.xp.zeros((codebook.shape[0] - 1, 2), dtype=dtype, **lib.place(codebook))
            dither = uniform(lib, lib.standard_normal(function, pairs, streams[0]))
            ends = None
            if self.noisy:
                ends = lib.standard_normal(function, lib.xp.stack([z, z], axis=0), streams[1])
            return CurveNoise(dither, ends)
        if not isinstance(noise, CurveNoise):
            raise TypeError(
                f"{function}: noise of a space-filling estimator must be a CurveNoise, got {describe(noise)}"
            )
        backend_of(function, z=z, dither=noise.dither)
        check_floating(lib, function, dither=noise.dither)
        check_shape(function, "dither", noise.dither, (codebook.shape[0] - 1,), "the segments, (K - 1,)")
        if not self.noisy:
            return CurveNoise(noise.dither)
        if noise.ends is None:
            raise TypeError(f"{function}: noise.ends must be an array of shape (2, ..., D), got None")
        backend_of(function, z=z, ends=noise.ends)
        check_floating(lib, function, ends=noise.ends)
        check_shape(function, "noise.ends", noise.ends, (2, *z.shape), "two of z")
        return noise

    def search(self, lib: Backend, z: Array, codebook: Array, noise: CurveNoise) -> Array:
        return lib.search(z, self.points(lib, codebook, noise.dither))

    def points(self, lib: Backend, codebook: Array, dither: Array) -> Array:
        """The dithered point of each segment, (K - 1, D)."""
        codebook = lib.stop_gradient(codebook)
        t = lib.astype(lib.xp.expand_dims(dither, axis=1), codebook.dtype)
        return on_segment(codebook[:-1, :], codebook[1:, :], t)

    def noise_rows(self, lib: Backend, z: Array, noise: CurveNoise, indices: Array) -> Array:
        t = lib.take_rows(lib.xp.expand_dims(noise.dither, axis=1), indices)
        t = lib.astype(t, lib.compute_dtype(z.dtype))
        if noise.ends is None:
            return t
        ends = [lib.astype(lib.xp.reshape(noise.ends[j, ...], z.shape), t.dtype) for j in (0, 1)]
        return lib.xp.concat([t, *ends], axis=1)

    def decode(self, lib: Backend, indices: Array, codebook: Any, dtype: Any) -> Array:
        raise TypeError(
            f"decode: estimator must be one whose output is a codeword, got {describe(self)}; use project and "
            f"decode_curve"
        )

    def _directions(self, lib: Backend, d: Pair, noise: Array) -> tuple[Direction, Direction]:
        """The fixed directions w_1 and w_2."""
        if self.noisy:
            width = d[0].shape[1]
            ends = noise[:, 1 : 1 + width], noise[:, 1 + width :]
            d = noised(lib, d[0], ends[0], self.sigma), noised(lib, d[1], ends[1], self.sigma)
        w_1, w_2 = (lib.direction(x)[1].stopped(lib) for x in d)
        return w_1, w_2

    def forward(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> Array:
        assert noise is not None
        (c_1, c_2), t = _halves(q), noise[:, :1]
        if not self.noisy:
            return on_segment(c_1, c_2, t)
        d = c_1 - z, c_2 - z
        w_1, w_2 = self._directions(lib, d, noise)
        rho_1, rho_2 = (lib.direction(x)[0] for x in d)
        return z + w_1.times((1 - t) * rho_1) + w_2.times(t * rho_2)

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        assert noise is not None
        (c_1, c_2), t = _halves(q), noise[:, :1]
        d = c_1 - z, c_2 - z
        w_1, w_2 = self._directions(lib, d, noise)
        u_1, u_2 = (lib.direction(x)[1] for x in d)
        g_1 = u_1.times((1 - t) * w_1.dot(lib, g))
        g_2 = u_2.times(t * w_2.dot(lib, g))
        return g - g_1 - g_2, side_by_side(lib, g_1, g_2)

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        assert noise is not None
        (c_1, c_2), (dc_1, dc_2), t = _halves(q), _halves(dq), noise[:, :1]
        d = c_1 - z, c_2 - z
        w_1, w_2 = self._directions(lib, d, noise)
        u_1, u_2 = (lib.direction(x)[1] for x in d)
        moved_1 = w_1.times((1 - t) * u_1.dot(lib, dc_1 - dz))
        return dz + moved_1 + w_2.times(t * u_2.dot(lib, dc_2 - dz))


@dataclass(frozen=True)
class SFDiVeQDetach(_SpaceFilling):
    r"""Space-filling DiVeQ without noise.

    .. math:: z_q = z + (1-t)\rho_1\operatorname{sg}[u_1] + t\rho_2\operatorname{sg}[u_2] = (1-t)c_1 + t c_2

    .. math:: g_z = g - g_1 - g_2, \qquad g_1 = (1-t)\langle g,u_1\rangle u_1, \qquad g_2 = t\langle g,u_2\rangle u_2

    Notes
    -----
    The indices of `quantize` are those of segments, in [0, K - 1). ``noise`` is a `CurveNoise`, or is drawn. Where a
    vector sits on an end of its segment, that end's gradient is zero. Neighbouring codewords may be equal.

    References
    ----------
    Vali, Bäckström, Solin, arXiv:2509.26469 (SF-DiVeQ); Vali & Bäckström, arXiv:2410.20573 (space-filling VQ).
    """


@dataclass(frozen=True)
class SFDiVeQ(_SpaceFilling):
    r"""Space-filling DiVeQ.

    .. math:: z_q = z + (1-t)\rho_1 w_1 + t\rho_2 w_2, \qquad
              w_j = \operatorname{sg}\Big[\frac{d_j + \sigma\varepsilon_j}{\|d_j + \sigma\varepsilon_j\|}\Big]

    .. math:: g_z = g - g_1 - g_2, \qquad g_1 = (1-t)\langle g,w_1\rangle u_1, \qquad g_2 = t\langle g,w_2\rangle u_2

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise, independent for each end, in the units of ``z``; finite and >= 0. The paper
        recommends a variance of 1e-3. With 0 it is `SFDiVeQDetach`.

    Notes
    -----
    As `SFDiVeQDetach`.

    References
    ----------
    Vali, Bäckström, Solin, arXiv:2509.26469 (SF-DiVeQ).
    """

    sigma: float = 10**-1.5

    def __post_init__(self) -> None:
        check_option(self, "sigma", at_least=0.0)

    @property
    def noisy(self) -> bool:
        return self.sigma > 0


def _halves(both: Array) -> Pair:
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


def on_segment(c_1: Array, c_2: Array, t: Array) -> Array:
    """The point (1 - t) c_1 + t c_2: training, inference and decoding all compute it here, so they agree."""
    return (1 - t) * c_1 + t * c_2
