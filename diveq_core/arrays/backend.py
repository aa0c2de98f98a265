"""What the library needs of an array library: the array API standard, and the few things it lacks.

`Backend` is written against the standard alone and serves any library that follows it. A backend in
``backends/`` derives from it, and a package outside this repository may do the same: publish an instance
under the entry-point group ``diveq_core.backends``, keyed by the library's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays import search
from diveq_core.arrays.rows import Array, Direction, describe, direction
from diveq_core.arrays.segments import segment_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


# Pairs of numbers that are compared at a time where a library can neither sort nor search.
_PAIRS = 1 << 22


class Backend:
    """One array library, by the standard alone: same numbers as any other, no automatic differentiation.

    Parameters
    ----------
    xp : module
        The library's array API namespace.
    name : str
        The library's name in error texts.
    """

    checks_finite: bool = False
    """Whether reading values is free, so that NaN and infinity are refused by default."""

    scores_per_chunk: int = 1 << 24
    """Scores of the search that may exist at a time: 64 MiB in float32."""

    rows_at_least: int = 64
    """Rows that the search compares at a time, if so many scores may exist."""

    def __init__(self, xp: Any, name: str) -> None:
        self.xp = xp
        self.name = name

    def __repr__(self) -> str:
        return f"<diveq_core backend {self.name}>"

    def owns(self, x: object) -> bool:
        """Whether ``x`` is an array of this library."""
        namespace = getattr(x, "__array_namespace__", None)
        return namespace is not None and namespace() is self.xp

    def unfit(self, x: Array) -> str | None:
        """What an array of this library is that it may not be here, or None for one that serves."""
        return None

    # Values and dtypes

    @property
    def bool_dtype(self) -> Any:
        """The dtype of truth values."""
        # MLX has the name with an underscore only.
        return self.xp.bool if hasattr(self.xp, "bool") else self.xp.bool_

    def is_floating(self, x: Array) -> bool:
        """Whether the dtype is real floating point, the 16-bit ones included."""
        if hasattr(self.xp, "isdtype"):
            return bool(self.xp.isdtype(x.dtype, "real floating"))
        return bool(self.xp.issubdtype(x.dtype, self.xp.floating))

    def is_integer(self, x: Array) -> bool:
        """Whether the dtype is an integer one."""
        if hasattr(self.xp, "isdtype"):
            return bool(self.xp.isdtype(x.dtype, "integral"))
        return bool(self.xp.issubdtype(x.dtype, self.xp.integer))

    def as_indices(self, x: Array) -> Array:
        """Integers in a dtype that the library indexes with, wide enough for any codebook."""
        xp = self.xp
        if x.dtype in (xp.int32, xp.int64):
            return x
        wide = xp.astype(x, xp.int64)
        if x.dtype != getattr(xp, "uint64", None):
            return wide
        # What wraps is out of range, and must not become the mark -1.
        return xp.where(wide < 0, xp.full_like(wide, xp.iinfo(xp.int64).max), wide)

    def is_concrete(self, x: Array) -> bool:
        """Whether ``x`` has values now, that is, is not being traced."""
        return True

    def reads_free(self, x: Array) -> bool:
        """Whether a value is there to be read, without waiting for a device."""
        return self.checks_finite

    def to_numpy(self, x: Array) -> Any:
        """``x`` as an array of NumPy, in a dtype that NumPy has."""
        return x.__array__()

    def all_finite(self, x: Array) -> bool:
        """Whether no entry is NaN or infinite."""
        return bool(self.xp.all(self.xp.isfinite(x)))

    def any_negative(self, x: Array) -> bool:
        """Whether a number is below zero."""
        return bool(self.xp.any(x < 0))

    def result_dtype(self, a: Array, b: Array) -> Any:
        """Dtype of an operation on both."""
        return a.dtype if a.dtype == b.dtype else self.xp.result_type(a.dtype, b.dtype)

    def compute_dtype(self, dtype: Any) -> Any:
        """Dtype in which norms and distances are computed: at least float32."""
        return self.xp.float64 if dtype == getattr(self.xp, "float64", None) else self.xp.float32

    def astype(self, x: Array, dtype: Any) -> Array:
        """``x`` in ``dtype``, without a copy where it has it already."""
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

    def copy(self, x: Array) -> Array:
        """``x`` in memory of its own."""
        return self.xp.asarray(x, copy=True)

    def place(self, x: Array) -> dict[str, Any]:
        """Keyword arguments that make a creation function put its array where ``x`` is."""
        device = getattr(x, "device", None)
        return {} if device is None else {"device": device}

    def like(self, values: Array, x: Array, entries: bytes | None = None) -> Array:
        """A constant (an array of this library or of NumPy) with the dtype and on the device of ``x``.

        ``entries`` are its own in float64, for a library that cannot always read an array of NumPy while it traces.
        """
        if self.owns(values):
            return self.astype(values, x.dtype)
        return self.xp.asarray(values.tolist(), dtype=x.dtype, **self.place(x))

    def stop_gradient(self, x: Array) -> Array:
        """``sg[x]``: the same values, through which no derivative flows."""
        return x

    def snapshot(self, x: Array) -> Array:
        """``x`` as it is now, whatever is written to it later: a copy, where arrays can be written to."""
        return self.copy(x)

    def records(self, *arrays: Array) -> bool:
        """Whether derivatives of what is computed from the arrays may be asked for."""
        return False

    def quiet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` by this library's own handling of overflow and underflow, whatever its user has set.

        Here the function itself, for a library that has no such setting.
        """
        return function

    # What the standard lacks, or a library does better

    def standard_normal(self, function: str, z: Array, rng: Any) -> Array:
        """Standard normal numbers with the shape of ``z``, drawn from ``rng`` or the default stream."""
        if not hasattr(rng, "standard_normal"):
            raise TypeError(
                f"{function}: {self.name} has no random generator known here; pass noise= (standard normal, "
                f"of shape {tuple(z.shape)}), or as rng= an object with a method standard_normal(shape), "
                f"got {describe(rng)}"
            )
        drawn = rng.standard_normal(tuple(z.shape))
        if not self.owns(drawn):
            drawn = self.xp.asarray(drawn.tolist(), dtype=self.compute_dtype(z.dtype))
        return self.astype(drawn, z.dtype)

    def streams(self, function: str, rng: Any, count: int) -> list[Any]:
        """``rng`` for each of so many draws."""
        return [rng] * count

    def matmul(self, a: Array, b: Array) -> Array:
        """Matrix product in the full precision of its inputs."""
        return self.xp.matmul(a, b)

    def dot(self, a: Array, b: Array) -> Array:
        """Row-wise inner product, (N, D), (N, D) -> (N, 1)."""
        return self.xp.sum(a * b, axis=-1, keepdims=True)

    def add_scaled(self, x: Array, y: Array, c: Array | float) -> Array:
        """``x + c y``, (N, D), for c (N, 1) or a number."""
        return x + y * c

    def direction(self, x: Array) -> tuple[Array, Direction]:
        """Length (N, 1) and direction of each row; a zero row has length 0 and direction 0."""
        return direction(self, x)

    def polar(self, x: Array) -> tuple[Array, Array]:
        """As `direction`, with the direction written out, (N, D)."""
        rho, u = self.direction(x)
        return rho, u.times(1.0)

    def sums_in_parts(self, x: Array) -> bool:
        """Whether `segment_add` of the rows of ``x`` takes no longer for many segments than for few."""
        return False

    def by_rows(self, function: Callable[..., Array], *arrays: Array | None) -> Array:
        """``function(*arrays)``, which acts row by row, possibly a block of rows at a time."""
        return function(*arrays)

    def segment_add(self, total: Array, values: Array, segments: Array) -> Array:
        """``total`` (K, D) plus the rows of ``values`` (N, D) at their segments (N,); repeats add up.

        Rows whose segment is negative are dropped. ``total`` may be overwritten.
        """
        # In a product NaN would reach the sums of others.
        lost = self.xp.expand_dims(segments < 0, axis=1)
        values = self.xp.where(lost, self.xp.zeros_like(values), values)
        return total + segment_sum(self, values, segments, total.shape[0])

    def segment_sum(self, values: Array, segments: Array, count: int) -> Array:
        """Sum of the rows of ``values`` (N, D) that share a segment, (count, D); repeats add up."""
        total = self.xp.zeros((count, values.shape[1]), dtype=values.dtype, **self.place(values))
        return self.segment_add(total, values, segments)

    def stable_argsort(self, x: Array) -> Array:
        """Indices that sort ``x`` (N,), equal entries in their order."""
        return self.xp.argsort(x)

    def first_equal(self, x: Array) -> Array:
        """Lowest index of an equal number, for each of (N,)."""
        xp = self.xp
        if not hasattr(xp, "argsort"):  # as in cubed
            return self._by_pairs(lambda y: xp.argmax(xp.astype(x[None, :] == y[:, None], xp.int8), axis=1), x, x)
        order = self.stable_argsort(x)
        return xp.take(order, self.searchsorted(xp.take(x, order, axis=0), x), axis=0)

    def searchsorted(self, sorted_: Array, values: Array, *, side: str = "left") -> Array:
        """How many of the sorted numbers (N,) are below each value (M,); of the right side, or equal to it."""
        xp = self.xp
        if self._has("searchsorted"):
            return xp.searchsorted(sorted_, values, side=side)
        below = xp.less if side == "left" else xp.less_equal
        index = self.as_indices(xp.asarray([0], **self.place(values))).dtype
        count = lambda y: xp.sum(xp.astype(below(sorted_[None, :], y[:, None]), index), axis=1)  # noqa: E731
        return self._by_pairs(count, values, sorted_)

    def _has(self, name: str) -> bool:
        """Whether the library has a function of the standard since 2023.12."""
        return hasattr(self.xp, name) and getattr(self.xp, "__array_api_version__", "2023.12") >= "2023.12"

    def _by_pairs(self, function: Callable[[Array], Array], x: Array, others: Array) -> Array:
        """``function`` of a few of ``x`` (N,) at a time, since it compares each with all the others."""
        step = max(_PAIRS // max(others.shape[0], 1), 1)
        parts = [function(x[start : min(start + step, x.shape[0])]) for start in range(0, x.shape[0], step)]
        return self.xp.concat(parts)

    def cumulative_sum(self, x: Array) -> Array:
        """Sums of the first numbers, along the last axis."""
        xp = self.xp
        if self._has("cumulative_sum"):
            return xp.cumulative_sum(x, axis=-1)
        # Each step doubles how many numbers a sum has.
        reach = 1
        while reach < x.shape[-1]:
            x = x + xp.concat([xp.zeros_like(x[..., :reach]), x[..., :-reach]], axis=-1)
            reach *= 2
        return x

    def row_keys(self, codebook: Array) -> Array:
        """A number for each row, (K,), equal for equal rows and almost never for others."""
        xp = self.xp
        numbers = xp.arange(1, codebook.shape[1] + 1, **self.place(codebook))
        # Any direction serves that no symmetry of real codebooks shares; a short one lets no sum overflow.
        direction = xp.sin(xp.astype(numbers, codebook.dtype) * 12.9898) / codebook.shape[1]

        def key(x: Array) -> Array:
            return self.as_indices(self.first_equal(xp.sum(x * direction[None, :], axis=1)))

        # Less the first row besides, since rounding hides small differences of large entries.
        plain, apart = key(codebook), key(codebook * 0.25 - codebook[:1, :] * 0.25)
        return plain * codebook.shape[0] + apart

    def take_rows(self, codebook: Array, indices: Array) -> Array:
        """``codebook[indices]``, (N,) -> (N, D); a negative index gives a row of NaN."""
        xp = self.xp
        count, width = codebook.shape
        missing = xp.full((1, width), float("nan"), dtype=codebook.dtype, **self.place(codebook))
        padded = xp.concat([codebook, missing])
        return xp.take(padded, xp.where(indices < 0, xp.full_like(indices, count), indices), axis=0)

    def nan_where(self, condition: Array, x: Array) -> Array:
        """``x`` with NaN where the condition holds."""
        return self.xp.where(condition, self.xp.full_like(x, float("nan")), x)

    def prepare(self, codebook: Array) -> Any:
        """What `search` takes in place of a codebook that stays as it is: itself, where nothing would be gained."""
        return codebook

    def search(self, z: Array, codebook: Any) -> Array:
        """Index of the nearest codeword, (N, D), (K, D) -> (N,); -1 for a row that is not finite.

        The codebook is an array, or what `prepare` made of one.
        """
        if isinstance(codebook, search.Prepared):
            return search.nearest_at_once(self, z, codebook)
        return search.nearest_rows(self, z, codebook)

    # Binding to the library's automatic differentiation

    def bind(self, rule: Bindable, z: Array, codebook: Array, indices: Array, noise: Array | None) -> Array:
        """``rule.forward``, differentiable in this library by ``rule.pullback`` and ``rule.pushforward``."""
        return rule.forward(z, codebook, indices, noise)

    def log_radius_gradients(self, r: Callable[[Array, Array], Array], q: Array, z: Array) -> tuple[Array, Array]:
        """Gradients of ln r(q, z) to q and z by the library's automatic differentiation."""
        raise TypeError(
            f"Radial: {self.name} has no automatic differentiation, so a radius given by its value alone has no "
            f"gradient there; expected CustomRadius(r, log_r_gradients) with log_r_gradients(q, z) -> (d ln r/dq, "
            f"d ln r/dz), got r alone"
        )
