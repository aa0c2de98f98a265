r"""Finite scalar quantization: every coordinate bounded and rounded by itself, without a codebook.

.. math:: \frac{\partial z_q}{\partial z} = \frac{b'(z)}{\lfloor L/2 \rfloor}, \qquad
          b'(z) = h\,(1 - \tanh^2(z + \operatorname{artanh}(o / h)))
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import flat_rows
from diveq_core.arrays.rows import describe, larger, smaller
from diveq_core.estimators.base import Estimator
from diveq_core.estimators.call import OneCall
from diveq_core.estimators.rule import Rule
from diveq_core.estimators.scalar import Scalar

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.call import Call

# What its stages in a Residual do not call.
_LEFT_OUT = ("call", "decode", "forward", "hard", "level", "linearized", "noisy", "rounded", "trains_codebook")
# How far short of the outermost level the bound stops: epsilon of the paper's code.
_MARGIN = 1e-3


@dataclass(frozen=True)
class FSQ(Scalar):
    r"""Finite scalar quantization: each coordinate bounded, and rounded to one of L levels.

    .. math:: z_q = \frac{1}{\lfloor L/2 \rfloor} \operatorname{round} b(z)
              = \frac{1}{\lfloor L/2 \rfloor} \big(b(z) + \operatorname{sg}[\operatorname{round} b(z) - b(z)]\big)

    .. math:: b(z) = h \tanh(z + \operatorname{artanh}(o / h)) - o, \qquad
              h = \tfrac12 (L - 1)(1 - 10^{-3}), \qquad o = \tfrac12 \text{ for even } L, 0 \text{ for odd}

    .. math:: g_z = \frac{b'(z)}{\lfloor L/2 \rfloor}\, g, \qquad b'(z) = h - (b(z) + o)^2 / h

    Parameters
    ----------
    levels : sequence of D integers
        Number of levels of each coordinate, each >= 3.

    Notes
    -----
    There is no codebook: the verbs take None in its place, and give None for its gradient. ``z_q`` has the dtype of
    ``z`` and lies within [-1, 1]. The index lies in [0, product of levels): the levels counted from 0 are the digits of
    a mixed radix, the first coordinate's the lowest.

    .. math:: z_{q,j} = \frac{m_j}{\lfloor L_j/2 \rfloor} - 1, \qquad
              m_j = \Big\lfloor i \Big/ \prod_{k < j} L_k \Big\rfloor \bmod L_j

    In a `Residual` vectors are bounded once, :math:`x = b(z) / \lfloor L/2 \rfloor`, and each stage divides the cells
    of the stage before into L: after stage s (from 0) what is left is at most half of
    :math:`1 / (\lfloor L/2 \rfloor L^s)`. The gradient is that of a single FSQ.

    The shift by artanh centres the grid: b(0) = 0. The paper's pseudocode has tan there, which its authors call an
    error, and with which b(0) is off by 4e-4 at L = 4 and less above. Two levels cannot be centred: o > h. Above
    some 1000 levels the margin of 1e-3 keeps the outermost ones out of reach. A coordinate halfway between
    levels goes to the even one. A vector that is not finite gives NaN and -1.

    References
    ----------
    Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv:2309.15505,
    section 3.1 and appendix A.1.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> out = dq.quantize(np.array([[0.0, -3.0], [0.6, 3.0]]), None, dq.FSQ([5, 4]))
    >>> out.z_q
    array([[ 0. , -1. ],
           [ 0.5,  0.5]])
    >>> out.indices
    array([ 2, 18])
    >>> dq.decode(np.array([2, 18]), None, dq.FSQ([5, 4]), dtype=np.float64)
    array([[ 0. , -1. ],
           [ 0.5,  0.5]])
    """

    levels: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _checked_levels(self.levels))

    @property
    def reads(self) -> frozenset[str]:
        return frozenset("z")

    @property
    def entry(self) -> Estimator:
        if not self.reads <= frozenset("z"):
            # The derivative is that of the bound, where nothing has been chosen yet.
            raise TypeError(
                f"Residual: an FSQ in stages must read z alone, got {describe(self)}, which reads "
                f"{', '.join(sorted(self.reads - {'z'}))}"
            )
        for name in _LEFT_OUT:
            if getattr(type(self), name) is not getattr(FSQ, name):
                raise TypeError(
                    f"Residual: an FSQ in stages must leave {name} as it is, since finer levels take its place, "
                    f"got {describe(self)}"
                )
        return _Bound(self)

    def refined(self, depth: int) -> Estimator:
        return _Refinement(tuple(self.levels), depth)

    def vjp(self, lib: Backend, z: Array, q: Any, noise: None, g: Array) -> tuple[Array, None]:
        return self._slope(lib, z) * g, None

    def jvp(self, lib: Backend, z: Array, q: Any, noise: None, dz: Array, dq: Any) -> Array:
        """The derivative is diagonal, so it is its own transpose."""
        return self._slope(lib, z) * dz

    def rounded(self, lib: Backend, z: Array) -> Array:
        return lib.xp.round(self.bounded(lib, z))

    def bounded(self, lib: Backend, z: Array) -> Array:
        """The bound b(z), (N, D)."""
        half, offset, shift = (self.row(lib, x, z) for x in self._bounds())
        return lib.xp.tanh(z + shift) * half - offset

    def _slope(self, lib: Backend, z: Array) -> Array:
        half, _, shift = (self.row(lib, x, z) for x in self._bounds())
        tanh = lib.xp.tanh(z + shift)
        # 1 - tanh^2 as a product loses no digits where tanh is near 1.
        return half * ((1 - tanh) * (1 + tanh)) / self.row(lib, [level // 2 for level in self.levels], z)

    def _bounds(self) -> tuple[list[float], list[float], list[float]]:
        """h, o and the shift of each coordinate."""
        offsets = [0.0 if level % 2 else 0.5 for level in self.levels]
        halves = [(level - 1) * (1 - _MARGIN) / 2 for level in self.levels]
        return halves, offsets, [math.atanh(o / h) for o, h in zip(offsets, halves, strict=True)]


@dataclass(frozen=True)
class _Refinement(Scalar):
    r"""A stage of a residual of `FSQ`: straight-through rounding to a grid that divides each cell into L.

    .. math:: z_q = \Delta (k + o), \qquad k = \operatorname{clip}\big(\operatorname{round}(z / \Delta - o),
              -\lfloor L/2 \rfloor, L - 1 - \lfloor L/2 \rfloor\big), \qquad
              \Delta = \frac{1}{\lfloor L/2 \rfloor L^{\text{depth}}}, \qquad g_z = g

    with o = 1/2 for even L, so that the L levels lie evenly over a cell of width :math:`L \Delta`; 0 for odd L, and in
    the first stage, of depth 0, whose levels are those of `FSQ`.
    """

    levels: tuple[int, ...]
    depth: int

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    def vjp(self, lib: Backend, z: Any, q: Any, noise: None, g: Array) -> tuple[Array, None]:
        return g, None

    def jvp(self, lib: Backend, z: Any, q: Any, noise: None, dz: Array, dq: Any) -> Array:
        return dz

    def rounded(self, lib: Backend, z: Array) -> Array:
        lowest, highest = (self.row(lib, [level * end - level // 2 for level in self.levels], z) for end in (0, 1))
        k = lib.xp.round(z * self._steps(lib, z) - self._offset(lib, z))
        return smaller(lib, larger(lib, k, lowest), highest - 1)

    def level(self, lib: Backend, k: Array) -> Array:
        return (k + self._offset(lib, k)) / self._steps(lib, k)

    def _offset(self, lib: Backend, like: Array) -> Array:
        return self.row(lib, [0.0 if level % 2 or self.depth == 0 else 0.5 for level in self.levels], like)

    def _steps(self, lib: Backend, like: Array) -> Array:
        """1 / Delta."""
        return self.row(lib, [level // 2 * float(level) ** self.depth for level in self.levels], like)


@dataclass(frozen=True)
class _Bound(Estimator):
    r"""What a residual of `FSQ` begins with: :math:`x = b(z) / \lfloor L/2 \rfloor`, unrounded."""

    of: FSQ
    codebook_axes = 0

    @property
    def hard(self) -> bool:
        return False

    @property
    def reads(self) -> frozenset[str]:
        return self.of.reads

    @property
    def trains_codebook(self) -> bool:
        return False

    def call(
        self, function: str, lib: Backend, z: Array, codebook: None, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        rows = flat_rows(lib, z)
        rule = Rule.of(lib, self, z, None)
        # Nothing is chosen here.
        nothing = lib.as_indices(lib.xp.zeros_like(rows[:, 0], dtype=lib.xp.int32))
        return OneCall(lib, rule, rows, None, None, None, nothing, tuple(z.shape[:-1]))

    def forward(self, lib: Backend, z: Array, q: None, noise: None) -> Array:
        return self.of.bounded(lib, z) / self.of.row(lib, [level // 2 for level in self.of.levels], z)

    def vjp(self, lib: Backend, z: Array, q: None, noise: None, g: Array) -> tuple[Array, None]:
        return self.of.vjp(lib, z, _unread, None, g)

    def jvp(self, lib: Backend, z: Array, q: None, noise: None, dz: Array, dq: None) -> Array:
        return self.of.jvp(lib, z, _unread, None, dz, None)


class _Unread:
    """In the place of q, which there is none of: any use of it is refused, as one of None would not always be."""

    __array_ufunc__ = None

    def _refuse(self, *_: object) -> Any:
        raise TypeError("Residual: the vjp and jvp of an FSQ in stages must read z alone, got one that reads q")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __abs__ = __pow__ = __matmul__ = _refuse
    __bool__ = __float__ = __len__ = __iter__ = __getitem__ = __getattr__ = __array__ = _refuse
    __hash__ = object.__hash__


_unread: Any = _Unread()


def _checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    wanted = "levels must be a sequence of integers >= 3, one for each coordinate"
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"FSQ: {wanted}, got {describe(levels)}")
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, numbers.Integral):
            raise TypeError(f"FSQ: {wanted}, got {level!r} of {describe(level)}")
    if not levels or min(levels) < 3:
        raise ValueError(f"FSQ: {wanted}, got {list(levels)}")
    return tuple(int(level) for level in levels)
