"""The run of one step: what is quantized, its tokens, and the way back of the cotangents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, check_like, check_shape, checked_dtype, refuse_not_finite
from diveq_core.arrays.draws import uniform
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import describe
from diveq_core.curve import decode_curve, project
from diveq_core.layers import hard, maps
from diveq_core.layers.auxiliary import auxiliary, of_head, statistics
from diveq_core.layers.results import Forward, Losses, Point
from diveq_core.layers.settings import Settings
from diveq_core.layers.words import State, words
from diveq_core.tokens import decode as decode_tokens
from diveq_core.verbs import checked_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


def check_settings(function: str, settings: Settings) -> None:
    """Refuse what no settings are."""
    if not isinstance(settings, Settings):
        raise TypeError(f"{function}: settings must be a Settings, got {describe(settings)}")


def checked_state(function: str, settings: Settings, state: State, whole: bool = True) -> tuple[Any, State]:
    """The backend of a state that fits the settings, None where it has no array; and its arrays.

    Unless the ``whole`` state is asked for, what tokens depend on is enough.
    """
    check_settings(function, settings)
    shapes = settings.shapes
    if not whole and isinstance(state, dict) and state.keys() == settings.token_shapes.keys():
        shapes = settings.token_shapes
    if not isinstance(state, dict) or set(state) != set(shapes):
        got = ", ".join(sorted(state)) if isinstance(state, dict) else describe(state)
        raise ValueError(f"{function}: state must hold {', '.join(shapes) or 'no array'}, got {got or 'none'}")
    lib = backend_of(function, **state) if state else None
    for name, shape in shapes.items():
        check_shape(function, f"state[{name!r}]", state[name], shape, "the settings")
    return lib, state


class Step:
    """The checked arguments of one step."""

    def __init__(
        self, function: str, settings: Settings, state: State, z: Array, mask: Array | None, whole: bool = True
    ) -> None:
        _, self.state = checked_state(function, settings, state, whole)
        self.lib = lib = backend_of(function, z=z, **state)
        check_floating(lib, function, z=z)
        axis = settings.channel_axis
        if not -z.ndim <= axis < z.ndim or z.shape[axis] != settings.dim:
            raise ValueError(
                f"{function}: z must have {settings.dim} entries along axis {axis}, which is channel_axis, got "
                f"{tuple(z.shape)}"
            )
        self.function, self.settings, self.z = function, settings, z
        self.x, self.back = maps.moved(lib, z, axis, -1)
        self.keep = self._keep(mask)

    def _keep(self, mask: Array | None) -> Array | None:
        """Which vectors take part, (...); None for all."""
        lib, function, batch = self.lib, self.function, tuple(self.x.shape[:-1])
        if mask is not None:
            backend_of(function, z=self.z, mask=mask)
            if not mask.dtype == lib.bool_dtype:
                raise TypeError(f"{function}: mask must have dtype bool, got {mask.dtype}")
            if tuple(mask.shape) != batch:
                raise ValueError(
                    f"{function}: mask must have the shape of z without its channel axis, {batch}, got "
                    f"{tuple(mask.shape)}"
                )
        if self.settings.not_finite != "skip":
            return mask
        finite = lib.xp.all(lib.xp.isfinite(lib.stop_gradient(self.x)), axis=-1)
        return finite if mask is None else lib.xp.logical_and(mask, finite)

    def enter(self, explicit: bool) -> tuple[Array, Callable[[Array], tuple[Array, dict[str, Array]]]]:
        """What is quantized, (..., width), and the pullback of its cotangent."""
        lib, settings, state = self.lib, self.settings, self.state
        x, to_kept = maps.kept(lib, self.x, self.keep)
        x, to_dtype = maps.cast(lib, x, self.dtype)
        to_affine: Any = None
        to_sphere: Any = None
        if "in_weight" in state:
            x, to_affine = maps.affine(lib, x, state["in_weight"], state["in_bias"])
        if settings.cosine:
            x, to_sphere = maps.direction(lib, x, settings.heads, explicit)

        def pullback(g: Array) -> tuple[Array, dict[str, Array]]:
            g = g if to_sphere is None else to_sphere(g)
            gradients = {}
            if to_affine is not None:
                g, gradients["in_weight"], gradients["in_bias"] = to_affine(g)
            return self.back(to_kept(to_dtype(g))), gradients

        return x, pullback

    @property
    def dtype(self) -> Any:
        """The one in which the layer computes: at least float32, and that of the state."""
        lib = self.lib
        held = next((x for x in self.state.values() if lib.is_floating(x)), self.z)
        return lib.compute_dtype(lib.result_dtype(self.z, held))

    def tokens(self, books: hard.Books | None = None) -> Any:
        """Hard and deterministic; ``books`` are what `hard.prepared` made of the state's."""
        lib, settings = self.lib, self.settings
        x = lib.stop_gradient(self.enter(False)[0])
        refuse = settings.not_finite == "refuse"
        if books is not None:
            # What was prepared is finite.
            refuse_not_finite(lib, self.function, refuse, z=x)
            return self._marked(hard.tokens(lib, settings, x, books))
        book, _ = words(lib, settings, self.state)
        book = book if book is None else lib.stop_gradient(book)
        if settings.on_curve:
            found = project(x, book, check_finite=refuse)
            return Point(self._marked(found.segments), found.positions)
        if settings.searches:
            refuse_not_finite(lib, self.function, refuse, z=x, codebook=book)
            return self._marked(hard.tokens(lib, settings, x, hard.as_they_are(settings, book)))
        quantizer = settings.quantizer if settings.takes_logits else settings.hard
        noise = lib.xp.zeros_like(x) if settings.takes_logits else None
        _, call = checked_call(self.function, x, book, quantizer, noise, None, None, refuse)
        return self._marked(call.quantize().indices)

    def _marked(self, indices: Array) -> Array:
        """Tokens, -1 where no vector took part."""
        if self.keep is None:
            return indices
        keep = self.keep
        while keep.ndim < indices.ndim:
            keep = self.lib.xp.expand_dims(keep, axis=-1)
        return self.lib.xp.where(keep, indices, -self.lib.xp.ones_like(indices))

    def run(
        self, train: bool, explicit: bool, noise: Any, kept_stages: Array | None, rng: Any
    ) -> tuple[Forward, Callable[..., tuple[Array, dict[str, Array]]]]:
        if not isinstance(train, bool):
            raise TypeError(f"{self.function}: train must be True or False, got {describe(train)}")
        return self._trained(explicit, noise, kept_stages, rng) if train else (self._evaluated(), lambda g: (g, {}))

    def _evaluated(self) -> Forward:
        indices = self.tokens()
        z_q = decoded(self.settings, self.state, indices, self.z.dtype, self.keep)
        return Forward(z_q, indices, Losses(self._zero(), None, None), None)

    @property
    def _marks(self) -> bool:
        """Whether -1 marks a vector that the losses are to leave out."""
        return self.keep is not None or self.settings.quantizer_dropout

    def _zero(self) -> Array:
        return self.lib.xp.zeros((), dtype=self.dtype, **self.lib.place(self.z))

    def _trained(
        self, explicit: bool, noise: Any, kept_stages: Array | None, rng: Any
    ) -> tuple[Forward, Callable[..., tuple[Array, dict[str, Array]]]]:
        lib, settings, state, function = self.lib, self.settings, self.state, self.function
        x, to_z = self.enter(explicit)
        book, to_state = words(lib, settings, state, explicit)
        streams = lib.streams(function, rng, 2)
        refuse = settings.not_finite == "refuse"
        indices: Any = None
        if settings.quantizer_dropout:
            if noise is None:
                noise = self._drawn(x, streams[0])
            _, first = checked_call(
                function, lib.stop_gradient(x), lib.stop_gradient(book), settings.quantizer, noise, None, None, refuse
            )
            indices = self._dropped(first.quantize().indices, self._stages(kept_stages, streams[1]))
        _, call = checked_call(function, x, book, settings.quantizer, noise, streams[0], indices, refuse)
        out, to_x = call.vjp() if explicit else (call.quantize(), None)
        found = self._marked(out.indices)
        losses, to_losses = auxiliary(lib, settings, x, book, call.seen(), found, self._marks, explicit)
        z_q, to_out = _leave(lib, settings, state, out.z_q, self.z.dtype, self.keep)

        def pullback(g: Array, g_loss: Any = 1.0) -> tuple[Array, dict[str, Array]]:
            check_like(lib, "pullback", "g", g, self.z, "z")
            g_x_q, gradients = to_out(g)
            assert to_x is not None
            g_x, g_book = to_x(g_x_q)
            by_losses = to_losses(g_loss)
            if by_losses is not None:
                g_x = g_x + by_losses[0]
                g_book = by_losses[1] if g_book is None else g_book + by_losses[1]
            if book is not None and settings.codebook_update in ("gradient", "linear"):
                gradients |= to_state(lib.xp.zeros_like(book) if g_book is None else g_book)
            g_z, to_in = to_z(g_x)
            gradients |= to_in
            return g_z, {name: gradients[name] for name in settings.parameters}

        return Forward(z_q, found, losses, statistics(lib, settings, state, call.seen(), found, self._zero())), pullback

    def _drawn(self, x: Array, rng: Any) -> Any:
        """Noise for all stages, which two calls are to share; None where none is needed."""
        lib, settings = self.lib, self.settings
        if not getattr(settings.estimator, "noisy", False):
            return None
        drawn = [
            lib.standard_normal(self.function, x, stream) for stream in lib.streams(self.function, rng, settings.stages)
        ]
        if settings.heads == 1:
            return drawn
        return [[of_head(settings, e, head) for e in drawn] for head in range(settings.heads)]

    def _stages(self, kept_stages: Array | None, rng: Any) -> Array:
        """How many stages each example uses, (B,)."""
        lib, count, batch = self.lib, self.settings.stages, self.x.shape[0] if self.x.ndim > 1 else 1
        if kept_stages is not None:
            backend_of(self.function, z=self.z, kept_stages=kept_stages)
            if not lib.is_integer(kept_stages) or tuple(kept_stages.shape) != (batch,):
                raise ValueError(
                    f"{self.function}: kept_stages must be integers of shape ({batch},), one for each example, got "
                    f"{kept_stages.dtype} {tuple(kept_stages.shape)}"
                )
            return lib.as_indices(kept_stages)
        # Of the vectors, so that each device of a mesh draws for its own.
        examples = self.x if self.x.ndim > 1 else lib.xp.expand_dims(self.x, axis=0)
        zeros = lib.xp.sum(lib.xp.zeros_like(examples), axis=tuple(range(1, examples.ndim)))
        pairs = lib.astype(lib.xp.stack([zeros, zeros], axis=-1), self.dtype)
        return 1 + lib.as_indices(
            lib.xp.astype(
                lib.xp.floor(uniform(lib, lib.standard_normal(self.function, pairs, rng)) * count), lib.xp.int32
            )
        )

    def _dropped(self, indices: Array, stages: Array) -> Array:
        """Tokens (B, ..., stages), -1 in the stages that an example does not use."""
        lib, xp = self.lib, self.lib.xp
        numbers = lib.as_indices(xp.arange(self.settings.stages, **lib.place(indices)))
        # All of one rank: JAX can be told to refuse others.
        numbers = xp.reshape(numbers, (*(1,) * (indices.ndim - 1), self.settings.stages))
        used = numbers < xp.reshape(stages, (stages.shape[0], *(1,) * (indices.ndim - 1)))
        return xp.where(xp.logical_or(used, numbers == 0), indices, -xp.ones_like(indices))


def decoded(settings: Settings, state: State, indices: Any, dtype: Any, keep: Array | None = None) -> Array:
    """Vectors from tokens, along the channel axis; zeros for those that are not to be kept."""
    lib, arrays = checked_state("decode", settings, state, whole=False)
    lib = lib or backend_of("decode", indices=indices)
    dtype = None if dtype is None else checked_dtype(lib, "decode", dtype)
    book, _ = words(lib, settings, arrays)
    if settings.on_curve:
        if not isinstance(indices, Point):
            raise TypeError(f"decode: tokens of a curve must be a Point, as encode gives it, got {describe(indices)}")
        first = indices.segments
        x_q = decode_curve(first, lib.astype(indices.positions, lib.compute_dtype(book.dtype)), book)
    else:
        first = indices
        for _ in range(settings.hard.index_axes):
            first = first[..., 0]
        # Summed and rounded once, in the dtype of the state.
        wide = lib.xp.float32 if book is None else lib.compute_dtype(book.dtype)
        x_q = decode_tokens(indices, book, settings.hard, dtype=wide)
    if keep is None and settings.not_finite == "skip":
        keep = first >= 0
    return _leave(lib, settings, arrays, x_q, dtype, keep)[0]


def _leave(
    lib: Backend, settings: Settings, state: State, x_q: Array, dtype: Any, keep: Array | None
) -> tuple[Array, Callable[[Array], tuple[Array, dict[str, Array]]]]:
    """The output of a layer from that of its quantizer, and the pullback of its cotangent.

    What is not kept is zero here, after the bias of the map back, and so is its cotangent.
    """
    to_affine: Any = None
    if "out_weight" in state:
        x_q, to_affine = maps.affine(lib, x_q, state["out_weight"], state["out_bias"])
    x_q, to_kept = maps.kept(lib, x_q, keep)
    out, to_dtype = maps.cast(lib, x_q, x_q.dtype if dtype is None else dtype)
    z_q, back = maps.moved(lib, out, -1, settings.channel_axis)

    def pullback(g: Array) -> tuple[Array, dict[str, Array]]:
        g = to_kept(to_dtype(back(g)))
        if to_affine is None:
            return g, {}
        g, g_weight, g_bias = to_affine(g)
        return g, {"out_weight": g_weight, "out_bias": g_bias}

    return z_q, pullback
