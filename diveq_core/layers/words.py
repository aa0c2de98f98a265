"""The codebook of a layer: the array that its quantizer reads, from those of its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.codebook.linear import linear_codebook, linear_codebook_vjp
from diveq_core.layers.maps import direction

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Shape
    from diveq_core.layers.settings import Settings

State = dict[str, "Array"]
"""The arrays of a layer, by name: `Settings.shapes` says which."""


def at(x: Any, own: Shape) -> Any:
    """What is at a place along the first axes of an array."""
    return x if x is None or not own else x[(*own, ...)]


def joined(lib: Backend, settings: Settings, pieces: dict[Shape, Array]) -> Array:
    """One array from what belongs at each place of the codebooks."""
    first = next(iter(pieces.values()))
    if len(pieces) == 1 and settings.codebooks == [()]:
        return first
    stacked = lib.xp.stack([pieces[own] for own in settings.codebooks], axis=0)
    return lib.xp.reshape(stacked, (*settings.codebook_axes, *first.shape))


def words(
    lib: Backend, settings: Settings, state: State, explicit: bool = False
) -> tuple[Any, Callable[[Any], dict[str, Array]]]:
    """The codebook as the quantizer reads it, and the pullback of its cotangent to the arrays of the state."""
    if not settings.has_codebook:
        return None, lambda g: {}
    if settings.codebook_update == "linear":
        return _linear(lib, settings, state, explicit)
    codebook = state["codewords"]
    if settings.codebook_update != "gradient":
        codebook = lib.stop_gradient(codebook)
    if not settings.cosine:
        return codebook, lambda g: {"codewords": g}
    unit, pullback = direction(lib, codebook, 1, explicit)
    return unit, lambda g: {"codewords": pullback(g)}


def _linear(
    lib: Backend, settings: Settings, state: State, explicit: bool
) -> tuple[Array, Callable[[Any], dict[str, Array]]]:
    factors = {}
    for name in ("embedding", "weight"):
        factors[name] = state[name] if name in settings.parameters else lib.stop_gradient(state[name])
    pieces, pullbacks = {}, {}
    for own in settings.codebooks:
        pair = at(factors["embedding"], own), at(factors["weight"], own)
        if explicit:
            pieces[own], pullbacks[own] = linear_codebook_vjp(pair)
        else:
            pieces[own] = linear_codebook(pair)

    def pullback(g: Array) -> dict[str, Array]:
        gradients = {own: pullbacks[own](at(g, own)) for own in settings.codebooks}
        return {
            "embedding": joined(lib, settings, {own: pair.frozen for own, pair in gradients.items()}),
            "weight": joined(lib, settings, {own: pair.weight for own, pair in gradients.items()}),
        }

    return joined(lib, settings, pieces), pullback
