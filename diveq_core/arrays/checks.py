"""What the public functions ask of their arguments, and how they say what they got instead."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import describe

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


def check_floating(lib: Backend, function: str, **arrays: Array) -> None:
    """Refuse dtypes that are not real floating point."""
    for name, x in arrays.items():
        if not lib.is_floating(x):
            raise TypeError(
                f"{function}: {name} must have a real floating dtype (float16, bfloat16, float32 or "
                f"float64), got {x.dtype}"
            )


def checked_dtype(lib: Backend, function: str, dtype: Any, *, name: str = "dtype") -> Any:
    """The library's own real floating dtype that was meant, by its name say."""
    own = (getattr(lib.xp, known, None) for known in ("float32", "float64", "float16", "bfloat16"))
    try:
        # Libraries say in many ways what is no dtype, and arrays that they are not compared so.
        if any(dtype == known for known in own):
            return dtype
        sample = lib.xp.zeros((0,), dtype=dtype)
    except Exception as error:
        raise TypeError(
            f"{function}: {name} must be a real floating dtype of {lib.name} (float16, bfloat16, float32 or float64), "
            f"got {dtype!r}"
        ) from error
    check_floating(lib, function, **{name: sample})
    return sample.dtype


def check_vectors(function: str, name: str, x: Array) -> None:
    """Check that ``x`` is (..., D) with D at least 1."""
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{function}: {name} must have shape (..., D) with D >= 1, got {tuple(x.shape)}")


def check_codebook(function: str, codebook: tuple[int, ...], *, at_least: int = 1) -> None:
    """Check that the shape of a codebook is (K, D) with K at least so many and D at least 1."""
    if len(codebook) != 2 or codebook[0] < at_least or codebook[1] < 1:
        raise ValueError(
            f"{function}: codebook must have shape (K, D) with K >= {at_least} and D >= 1, got {tuple(codebook)}"
        )


def check_width(function: str, z: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    """Check that shapes are (..., D) and (K, D) of one D."""
    if len(z) < 1 or z[-1] != codebook[-1]:
        raise ValueError(
            f"{function}: z must have shape (..., D) with D = {codebook[-1]} as in the codebook {tuple(codebook)}, "
            f"got {tuple(z)}"
        )


def check_single(function: str, codebook: Array) -> None:
    """Check that a codebook is (K, D), and say what to do with several in one array."""
    if codebook.ndim > 2:
        raise ValueError(
            f"{function}: codebook must have shape (K, D), got {tuple(codebook.shape)}; call it for each stage or "
            f"group, with the vectors that this one quantizes"
        )
    check_codebook(function, tuple(codebook.shape))


def check_pair(lib: Backend, function: str, z: Array, codebook: Array, *, at_least: int = 1) -> None:
    """Check the shapes and dtypes of ``z`` (..., D) and ``codebook`` (K, D)."""
    check_floating(lib, function, z=z, codebook=codebook)
    check_codebook(function, tuple(codebook.shape), at_least=at_least)
    check_width(function, tuple(z.shape), tuple(codebook.shape))


def check_shape(function: str, name: str, x: Array, shape: tuple[int, ...], like: str) -> None:
    """Check that ``x`` has exactly the given shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{function}: {name} must have the shape of {like}, {tuple(shape)}, got {tuple(x.shape)}")


def check_like(lib: Backend, function: str, name: str, x: Array, model: Array, like: str) -> None:
    """Check that ``x`` has the library and shape of ``model``, and a real floating dtype."""
    # What is of the model's type is of its library.
    if type(x) is not type(model) or lib.unfit(x) is not None:
        backend_of(function, **{like: model, name: x})
    if x.dtype != model.dtype:
        check_floating(lib, function, **{name: x})
    check_shape(function, name, x, tuple(model.shape), like)


def refuse_not_finite(lib: Backend, function: str, wanted: bool | None, **arrays: Array) -> None:
    """Refuse NaN and infinity if wanted, by default where reading values is free; it synchronises on a device."""
    if wanted is not True and not wants_finite(lib, function, wanted):
        return
    for name, x in arrays.items():
        if not lib.is_concrete(x):
            raise ValueError(
                f"{function}: check_finite=True reads the values of {name}, which have none while being "
                f"traced; check outside the traced function, or pass check_finite=False"
            )
        if not lib.all_finite(x):
            raise ValueError(f"{function}: {name} must be finite, got NaN or infinity in {name}")


def wants_finite(lib: Backend, function: str, wanted: bool | None) -> bool:
    """Whether NaN and infinity are to be refused: as said, or by default where reading values is free."""
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"{function}: check_finite must be True, False or None, got {describe(wanted)}")
    return lib.checks_finite if wanted is None else wanted


def checked_indices(
    lib: Backend, function: str, indices: Array, count: int, *, name: str = "indices", bound: str = "K"
) -> Array:
    """Indices in a dtype that the library indexes with; their range is checked where reading values is free.

    -1, the mark of a vector that is not finite, may stand.
    """
    if not lib.is_integer(indices):
        raise TypeError(f"{function}: {name} must have an integer dtype, got {indices.dtype}")
    if lib.checks_finite and math.prod(indices.shape) > 0:
        lowest, highest = int(lib.xp.min(indices)), int(lib.xp.max(indices))
        if lowest < -1 or highest >= count:
            raise ValueError(
                f"{function}: {name} must lie in [0, {bound}) with {bound} = {count}, or be -1 for a vector that is "
                f"not finite, got values from {lowest} to {highest}"
            )
    return lib.as_indices(indices)


def checked_count(function: str, name: str, count: int | numbers.Integral, *, at_least: int = 1) -> int:
    """An integer that is at least so much."""
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < at_least:
        raise ValueError(f"{function}: {name} must be an integer >= {at_least}, got {count!r}")
    return int(count)


def checked_number(
    function: str, name: str, value: float | Array, lowest: float, below: float, *, like: Array | None = None
) -> float | Array:
    """A real number in [lowest, below), or one in an array () of the library of ``like``.

    Such an array stays one, in the dtype of ``like`` in at least float32, while it is being traced: it has no value.
    """
    if like is not None and not isinstance(value, numbers.Real) and hasattr(value, "shape"):
        lib = backend_of(function, like=like, **{name: value})
        check_floating(lib, function, **{name: value})
        check_shape(function, name, value, (), "a number")
        if not lib.is_concrete(value):
            return lib.stop_gradient(lib.astype(value, lib.compute_dtype(like.dtype)))
        value = float(lib.stop_gradient(value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a real number, got {describe(value)}")
    if not lowest <= float(value) < below:
        raise ValueError(f"{function}: {name} must lie in [{lowest:g}, {below:g}), got {float(value)}")
    return float(value)


def flat_rows(lib: Backend, x: Array) -> Array:
    """(..., D) to (N, D)."""
    return x if x.ndim == 2 else shaped(lib, x, (_count(x.shape[:-1]), x.shape[-1]))


def flat(lib: Backend, x: Array) -> Array:
    """(...) to (N,)."""
    return x if x.ndim == 1 else shaped(lib, x, (_count(x.shape),))


def shaped(lib: Backend, x: Array, shape: tuple[int | None, ...]) -> Array:
    """``x`` in a shape, one size of which is None where a graph leaves it open."""
    if x.ndim == len(shape) and tuple(x.shape) == tuple(shape):
        return x
    # Other sizes are spelled out: -1 is ambiguous for an empty batch.
    return lib.xp.reshape(x, tuple(-1 if size is None else size for size in shape))


def _count(shape: tuple[int | None, ...]) -> int | None:
    return None if None in shape else math.prod(shape)  # type: ignore[arg-type]
