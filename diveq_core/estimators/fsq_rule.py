r"""What differentiates `diveq_core.fsq`, and the levels that encoder and decoder share.

.. math:: \frac{\partial z_q}{\partial z} = \frac{b'(z)}{\lfloor L/2 \rfloor}, \qquad
          b'(z) = h\,(1 - \tanh^2(z + \operatorname{artanh}(o / h)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


@dataclass(frozen=True)
class FSQRule:
    """Forward, pullback and pushforward over ``z`` (N, D) and digits (N, D), -1 in rows that are not finite.

    The codebook's place is taken by the grid (3, D), whose rows are h, o and the shift: constants.
    """

    lib: Backend
    levels: tuple[int, ...]
    constant = False
    trains_codebook = False
    noise_by_indices = False

    def fixed(self, grid: Array, digits: Array) -> tuple[Array, Array]:
        return grid, digits

    def forward(self, z: Array, grid: Array, digits: Array, noise: None) -> Array:
        lib = self.lib
        z_q = level_of(lib, digits, self.levels, grid.dtype)
        return lib.astype(lib.nan_where(digits < 0, z_q), z.dtype)

    def pullback(self, z: Array, grid: Array, digits: Any, noise: None, g: Array) -> tuple[Array, None]:
        return self.pushforward(z, grid, digits, noise, g, None), None

    def pushforward(self, z: Array, grid: Array, digits: Any, noise: None, dz: Array, dgrid: Any) -> Array:
        """The derivative is diagonal, so it is its own transpose."""
        lib = self.lib
        half, _, shift = (grid[row : row + 1, :] for row in range(3))
        halves = row_of(lib, [level // 2 for level in self.levels], grid.dtype, z)
        tanh = lib.xp.tanh(lib.astype(z, grid.dtype) + shift)
        # 1 - tanh^2 as a product loses no digits where tanh is near 1.
        slope = half * ((1 - tanh) * (1 + tanh)) / halves
        return lib.astype(slope * lib.astype(dz, grid.dtype), z.dtype)


def row_of(lib: Backend, values: Sequence[float], dtype: Any, like: Array) -> Array:
    """The values as a row, (1, D), where ``like`` is."""
    return lib.xp.asarray([list(values)], dtype=dtype, **lib.place(like))


def level_of(lib: Backend, digits: Array, levels: Sequence[int], dtype: Any) -> Array:
    """``(digit - floor(L / 2)) / floor(L / 2)``, which encoder and decoder share so that they agree bit for bit."""
    halves = row_of(lib, [level // 2 for level in levels], dtype, digits)
    return (lib.astype(digits, dtype) - halves) / halves
