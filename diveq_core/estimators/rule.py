"""The differentiation rule of one quantization: what a backend binds to its library.

An estimator speaks of rows ``z`` and ``q``; a rule speaks of ``z`` and the codebook. It gathers the chosen
codewords, calls the estimator in the compute dtype, and gives every cotangent the dtype of its primal.
Between forward and backward no more is needed than what the derivatives read: everything else is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from diveq_core.arrays.rows import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Estimator


# The output, and the pullback of its cotangent.
Linearized = tuple[Any, "Callable[[Any], tuple[Any, Any]]"]

# Entries of the vectors of which a pullback may keep temporaries: to compute them anew takes longer than the rest.
_FEW = 1 << 14


class Bindable(Protocol):
    """What `Backend.bind` needs: hashable, its output (N, ...) differentiable to its first two arguments.

    The forms of the arguments are the rule's own: `Rule` says what they are for an estimator.
    """

    @property
    def reads(self) -> frozenset[str]:
        """Which of "z", "q" (codebook and indices) and "noise" the derivatives read; None stands for the others."""

    @property
    def trains_codebook(self) -> bool:
        """Whether the second argument gets a gradient; if not, its cotangent is None."""

    @property
    def noise_by_indices(self) -> bool:
        """Whether the noise is the rule's own, chosen by the indices."""

    def fixed(self, codebook: Array, indices: Array) -> tuple[Array, Array | None]:
        """What may stand for both where the second gets no gradient, apart from it in memory."""

    def forward(self, z: Array, codebook: Array, indices: Array | None, noise: Any) -> Array: ...

    def pullback(self, z: Any, codebook: Any, indices: Array | None, noise: Any, g: Array) -> tuple[Array, Any]: ...

    def pushforward(
        self, z: Any, codebook: Any, indices: Array | None, noise: Any, dz: Array, dcodebook: Any
    ) -> Array: ...

    def linearized(self, z: Any, codebook: Any, indices: Array | None, noise: Any) -> Linearized | None:
        """`forward`, and `pullback` of its cotangent alone, which keeps what both compute; None if that is too much."""


@dataclass(frozen=True)
class Rule:
    """Forward, pullback and pushforward over ``z`` (N, D), ``codebook`` (K, D), ``indices`` (N,).

    ``noise`` has a row for each vector, or is None for an estimator without. Where ``indices`` is None, the codebook's
    place is taken by what `gathered` gives, row n's in row n; the codebook then gets no cotangent and has no tangent.
    """

    lib: Backend
    estimator: Estimator
    z_dtype: Any
    codebook_dtype: Any
    out_dtype: Any
    """That of z_q, the result dtype of both."""

    dtype: Any
    """The one in which the estimator computes."""

    @classmethod
    def of(cls, lib: Backend, estimator: Estimator, z: Array, codebook: Array | None) -> Self:
        """The rule for these dtypes; of z alone, without a codebook."""
        words, out = (z.dtype,) * 2 if codebook is None else (codebook.dtype, lib.result_dtype(z, codebook))
        return cls(lib, estimator, z.dtype, words, out, lib.compute_dtype(out))

    @property
    def reads(self) -> frozenset[str]:
        return self.estimator.reads

    @property
    def trains_codebook(self) -> bool:
        return self.estimator.trains_codebook

    @property
    def noise_by_indices(self) -> bool:
        return self.estimator.corners > 1

    def gathered(self, codebook: Any, indices: Array | None) -> Any:
        """What the estimator reads of the codebook for each row, (N, corners D)."""
        if codebook is None or indices is None:
            return codebook
        words = [self.lib.take_rows(codebook, corner) for corner in self._corners(indices)]
        return side_by_side(self.lib, *words)

    def fixed(self, codebook: Any, indices: Array | None) -> tuple[Any, None]:
        return self.gathered(codebook, indices), None

    def forward(self, z: Array, codebook: Any, indices: Array | None, noise: Array | None) -> Array:
        """Output z_q, (N, D)."""
        lib = self.lib
        if self.estimator.hard:
            return lib.astype(self.gathered(codebook, indices), self.out_dtype)

        def rows(q: Any, _: Array | None, z: Array, noise: Array | None) -> Array:
            return lib.astype(self.estimator.forward(lib, z, q, noise), self.out_dtype)

        return self._by_rows(rows, codebook, indices, z, noise)

    def pullback(
        self, z: Array | None, codebook: Any, indices: Array | None, noise: Array | None, g: Array
    ) -> tuple[Array, Array | None]:
        """Cotangents of ``z`` (N, D) and ``codebook`` (K, D), each in its own dtype; None for one that gets none."""
        lib = self.lib
        total = None
        if self.trains_codebook and codebook is not None and indices is not None:
            total = lib.xp.zeros_like(self._computed(codebook))

        def rows(q: Any, indices: Array | None, z: Any, noise: Any, g: Any) -> Array:
            nonlocal total
            g_z, g_q = self.estimator.vjp(lib, z, q, noise, g)
            if total is not None and g_q is not None:
                total = self._scattered(total, indices, g_q)
            return lib.astype(g_z, self.z_dtype)

        g_z = self._by_rows(rows, codebook, indices, z, noise, g)
        return g_z, None if total is None else lib.astype(total, self.codebook_dtype)

    def pushforward(
        self, z: Array | None, codebook: Any, indices: Array | None, noise: Array | None, dz: Array, dcodebook: Any
    ) -> Array:
        """Tangent of z_q, (N, D)."""
        lib = self.lib

        def rows(q: Any, indices: Array | None, z: Any, noise: Any, dz: Any) -> Array:
            dq = None
            if self.trains_codebook and q is not None:
                known = dcodebook is not None and indices is not None
                dq = self._computed(self.gathered(dcodebook, indices)) if known else lib.xp.zeros_like(q)
            return lib.astype(self.estimator.jvp(lib, z, q, noise, dz, dq), self.out_dtype)

        return self._by_rows(rows, codebook, indices, z, noise, dz)

    def linearized(self, z: Array, codebook: Any, indices: Array | None, noise: Array | None) -> Linearized | None:
        lib = self.lib
        if z.shape[0] * z.shape[1] > _FEW or indices is None or lib.records(z, codebook):
            return None
        arrays = (z, self.gathered(codebook, indices), noise)
        z_q, vjp = self.estimator.linearized(lib, *map(self._computed, arrays))

        def pullback(g: Array) -> tuple[Array, Array | None]:
            g_z, g_q = vjp(self._computed(g))
            total = None
            if self.trains_codebook:
                total = lib.xp.zeros_like(codebook, dtype=self.dtype)
                total = lib.astype(total if g_q is None else self._scattered(total, indices, g_q), self.codebook_dtype)
            return lib.astype(g_z, self.z_dtype), total

        return lib.astype(z_q, self.out_dtype), pullback

    def _corners(self, indices: Array) -> list[Array]:
        """The indices of each corner; the mark -1 stays."""
        later = range(1, self.estimator.corners)
        return [indices, *(self.lib.xp.where(indices < 0, indices, indices + corner) for corner in later)]

    def _scattered(self, total: Array, indices: Any, g_q: Array) -> Array:
        """The codebook's cotangent so far, (K, D), and that of some rows."""
        # A radius or an estimator of one's own may compute in a wider dtype.
        g_q, width = self.lib.astype(g_q, total.dtype), total.shape[1]
        for corner, chosen in enumerate(self._corners(indices)):
            part = g_q if g_q.shape[1] == width else g_q[:, corner * width : (corner + 1) * width]
            total = self.lib.segment_add(total, part, chosen)
        return total

    def _by_rows(
        self, function: Callable[..., Array], codebook: Any, indices: Array | None, *arrays: Array | None
    ) -> Array:
        """``function(q, indices, *arrays)``, a block of rows at a time, all but the indices in the compute dtype."""

        def gathering(*arrays: Any) -> Array:
            *others, indices = arrays
            return function(self._computed(self.gathered(codebook, indices)), indices, *map(self._computed, others))

        def gathered(*arrays: Any) -> Array:
            *others, q = map(self._computed, arrays)
            return function(q, None, *others)

        if indices is None:
            return self.lib.by_rows(gathered, *arrays, codebook)
        return self.lib.by_rows(gathering, *arrays, indices)

    def _computed(self, x: Any) -> Any:
        """``x`` in the dtype in which the estimator computes; None stays None."""
        return None if x is None else self.lib.astype(x, self.dtype)
