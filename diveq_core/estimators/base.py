r"""What may stand in an estimator's place, and what an estimator is.

An estimator acts row by row on ``z`` (N, D) and the chosen codewords ``q`` (N, D), with

.. math:: d = q - z, \qquad \rho = \|d\|, \qquad u = d / \rho \quad (0 \text{ where } \rho = 0),

``noise`` (N, D) standard normal, ``g`` the cotangent of the output and ``dz``, ``dq`` tangents. The pullbacks
may be differentiated again: what stands under ``sg`` is held constant and everything else is free, as
automatic differentiation of the stop-gradient expression has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_codebook, check_like, check_shape, check_width, flat, flat_rows, shaped
from diveq_core.arrays.rows import describe
from diveq_core.estimators.call import OneCall
from diveq_core.estimators.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.call import Call
    from diveq_core.estimators.rule import Bindable

Shape = tuple[int, ...]


class Quantizer(ABC):
    """What the verbs take: an `Estimator`, or several of one by `Residual` or `Product`."""

    codebook_axes: int = 2
    """Axes of its codebook; 0 if it has none, and the verbs take None in its place."""

    sums: bool = False
    """Whether the output is a sum of codewords, which 16 bits would round."""

    index_axes: int = 0
    """How many axes the index of one vector has."""

    index_bound: str = "K"
    """The number of indices, for error texts."""

    keeps_space: bool = True
    """Whether the output lies where the vectors lie, so that it may be subtracted from them."""

    @property
    def entry(self) -> Quantizer | None:
        """What a `Residual` passes vectors through before its first stage; None for nothing."""
        return None

    def refined(self, depth: int) -> Quantizer:
        """What quantizes, in a `Residual`, that which so many stages have left."""
        return self

    @abstractmethod
    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        """Refuse shapes that do not fit; where ``z`` is None, there are indices alone."""

    @abstractmethod
    def index_count(self, codebook: Shape | None) -> int:
        """How many values an index takes, for a codebook of this shape."""

    @abstractmethod
    def call(
        self, function: str, lib: Backend, z: Array, codebook: Any, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        """One quantization of checked ``z`` (..., D): noise checked or drawn, indices given or found."""

    @abstractmethod
    def decode(self, lib: Backend, indices: Array, codebook: Any, dtype: Any) -> Array:
        """The output from checked indices, (..., D)."""

    @abstractmethod
    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        """The entries (..., D) whose index is the mark -1, and the indices with 0 in its place."""

    def must_be_finite(self, lib: Backend, z: Array, codebook: Any) -> dict[str, Array]:
        """The arrays, by name, in which NaN and infinity are refused where they are looked for."""
        return {"z": z} if codebook is None else {"z": z, "codebook": codebook}


class Single(Quantizer):
    """A quantizer of one part: one index for each vector, and one rule."""

    corners: int = 1
    """How many codewords beside each other in the codebook one index stands for."""

    @property
    def noisy(self) -> bool:
        """Whether noise is needed."""
        return False

    @property
    def hard(self) -> bool:
        """Whether the output is the codeword itself, bit for bit."""
        return True

    @abstractmethod
    def rule(self, lib: Backend, z: Array, codebook: Any) -> Bindable:
        """What is bound to the library's automatic differentiation."""

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        if codebook is None:
            raise TypeError(
                f"{function}: codebook must be an array of shape (K, D) for {type(self).__name__}, got {describe(None)}"
            )
        check_codebook(function, codebook, at_least=self.corners)
        if z is not None:
            check_width(function, z, codebook)

    def index_count(self, codebook: Shape | None) -> int:
        return 0 if codebook is None else codebook[-2] + 1 - self.corners

    def draw(self, function: str, lib: Backend, z: Array, codebook: Array, noise: Any, rng: Any) -> Any:
        """The noise, checked, or drawn if there is none; None if none is needed."""
        if noise is not None:
            check_like(lib, function, "noise", noise, z, "z")
        if not self.noisy:
            return None
        return flat_rows(lib, lib.standard_normal(function, z, rng) if noise is None else noise)

    def search(self, lib: Backend, z: Array, codebook: Array, noise: Any) -> Array:
        """Indices (N,) for vectors (N, D)."""
        return lib.search(z, codebook)

    def noise_rows(self, lib: Backend, z: Array, noise: Any, indices: Array) -> Array | None:
        """What of the noise the rule takes, with one row for each vector."""
        return noise

    def call(
        self, function: str, lib: Backend, z: Array, codebook: Any, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        rows, batch = flat_rows(lib, z), tuple(z.shape[:-1])
        drawn = self.draw(function, lib, z, codebook, noise, rng)
        if indices is None:
            indices = self.search(lib, rows, codebook, drawn)
        else:
            check_shape(function, "indices", indices, batch, "z without its last axis")
            indices = flat(lib, indices)
        rule, noise = self.rule(lib, z, codebook), self.noise_rows(lib, rows, drawn, indices)
        return OneCall(lib, rule, rows, codebook, indices, noise, indices, batch)

    def decode(self, lib: Backend, indices: Array, codebook: Any, dtype: Any) -> Array:
        rows = lib.take_rows(codebook, flat(lib, indices))
        return shaped(lib, lib.astype(rows, dtype), (*indices.shape, codebook.shape[1]))

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        xp = lib.xp
        lost = indices == -1
        # By an operation, since the number of vectors may be open.
        none = xp.zeros((*(1,) * indices.ndim, width), dtype=lib.bool_dtype, **lib.place(indices))
        entries = xp.expand_dims(lost, axis=-1) | none
        return entries, xp.where(lost, xp.zeros_like(indices), indices)


class Estimator(Single):
    """What acts on each vector and its codeword; derive from it to write one.

    ``q`` is (N, D), or (N, corners D) where it holds several codewords side by side.
    """

    @property
    def reads(self) -> frozenset[str]:
        """Which of z, q and noise ``vjp`` and ``jvp`` read; None stands for each of the others."""
        return frozenset(("z", "q", "noise"))

    @property
    def trains_codebook(self) -> bool:
        """Whether the codebook ever gets a gradient; where it gets none, ``jvp`` takes None for ``dq``."""
        return True

    def forward(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> Array:
        """The output z_q, (N, D)."""
        return q

    @abstractmethod
    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        """Pullback of ``g``: (g_z, g_q), in the shapes of z and q; None for a g_q that is zero throughout."""

    @abstractmethod
    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        """Pushforward of ``dz`` and ``dq``: the tangent of z_q, (N, D)."""

    def linearized(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> tuple[Array, Callable[..., Any]]:
        """``forward``, and ``vjp`` as a function of ``g`` alone: override it to compute once what both need."""
        # A copy: what is given may be overwritten before the cotangent comes.
        z_q = lib.copy(q) if self.hard else self.forward(lib, z, q, noise)
        return z_q, lambda g: self.vjp(lib, z, q, noise, g)

    def rule(self, lib: Backend, z: Array, codebook: Any) -> Bindable:
        return Rule.of(lib, self, z, codebook)


def check_estimator(function: str, estimator: object) -> None:
    """Refuse what no verb could call."""
    if not isinstance(estimator, Quantizer):
        got = describe(estimator)
        if isinstance(estimator, type):
            got = f"the type {estimator.__name__}; call it: an instance is expected"
        raise TypeError(
            f"{function}: estimator must be an Estimator such as DiVeQ(), a Residual or a Product, got {got}"
        )
