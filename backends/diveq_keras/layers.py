"""The layer for Keras."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from diveq_core.arrays.registry import backend_of
from diveq_core.layers import beginning, file, step, upkeep
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.results import Losses
from diveq_core.layers.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.layers.results import Forward, Statistics
    from diveq_core.layers.words import State


@keras.saving.register_keras_serializable(package="diveq_keras")
class VectorQuantizer(Layer, keras.layers.Layer):
    r"""A vector quantizer as a layer of Keras.

    .. math:: z_q = \text{quantizer}(z, E), \qquad E = E_0 + V

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`; its ``name`` and ``dtype`` and ``trainable`` are those of Keras.
    seed : int, optional
        Of the first state, and of what steps draw.

    Notes
    -----
    A call gives z_q alone, so that the layer stands in a ``Sequential`` or functional model, and adds the weighted
    loss by ``add_loss``. ``return_all=True`` gives indices and losses too; Keras' own ``Layer.quantize`` is another
    thing.

    A codebook trained by gradients is a sum: ``V``, which the optimizer moves from zero, and ``E_0``, a weight that is
    not trained, which the start from data and the replacement of codewords set. So both happen in the step itself, in
    ``fit`` on JAX too, where a step cannot assign what the optimizer does. Moving averages and counts are assigned at
    the end of a step. A decay of weights pulls such a codeword to where it began. ``codebook``, ``arrays`` and
    ``save`` have the sum.

    With ``trainable = False`` nothing is begun, counted or moved, and training quantizes by the estimator as before.
    Processes of ``torch.distributed`` are not summed over; devices of ``keras.distribution`` on JAX are.

    Examples
    --------
    >>> import keras
    >>> from diveq_keras import VectorQuantizer
    >>> model = keras.Sequential([keras.layers.Dense(8), VectorQuantizer(8, 32), keras.layers.Dense(16)])
    >>> model.compile("adam", "mse")
    >>> x = keras.random.normal((64, 16))
    >>> history = model.fit(x, x, verbose=0)
    >>> tokens = model.layers[1].encode(model.layers[0](x))
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        own = {name: options.pop(name) for name in ("name", "dtype", "trainable") if name in options}
        super().__init__(**own)
        if keras.backend.backend() not in ("jax", "torch"):
            raise RuntimeError(
                f"VectorQuantizer: KERAS_BACKEND must be jax or torch, got {keras.backend.backend()}; there are layers "
                f"for other libraries, diveq_numpy's say"
            )
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.supports_masking = True
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        dtype = "float64" if self.variable_dtype == "float64" else "float32"
        noise = keras.random.normal((beginning.noise_size(self.settings),), dtype=dtype, seed=self.seed_generator)
        first = beginning.init(self.settings, ops.zeros((), dtype), noise=noise)
        self._held = {name: self._weight(name, x) for name, x in first.items()}
        self._moved: Any = None
        if self.settings.table in self.settings.parameters:
            self._moved = self._weight(f"{self.settings.table}_moved", ops.zeros_like(first[self.settings.table]), True)

    def _weight(self, name: str, x: Any, trainable: bool | None = None) -> Any:
        if trainable is None:
            trainable = name in self.settings.parameters and name != self.settings.table
        return self.add_weight(
            shape=tuple(x.shape),
            initializer=lambda shape, dtype=None: x,
            dtype=keras.backend.standardize_dtype(x.dtype),
            trainable=trainable,
            autocast=False,
            name=name,
        )

    def held(self) -> State:
        state = {name: x.value for name, x in self._held.items()}
        if self._moved is not None:
            state[self.settings.table] = state[self.settings.table] + self._moved.value
        return state

    def hold(self, state: State) -> None:
        for name, x in state.items():
            self._held[name].assign(x)
        if self._moved is not None and self.settings.table in state:
            self._moved.assign(ops.zeros_like(self._moved.value))

    def build(self, input_shape: Any) -> None:
        self.compute_output_shape(input_shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        axis, dim = self.settings.channel_axis, self.settings.dim
        if not -len(input_shape) <= axis < len(input_shape) or input_shape[axis] != dim:
            raise ValueError(
                f"VectorQuantizer: the input must have {dim} entries along axis {axis}, which is channel_axis, got "
                f"{tuple(input_shape)}"
            )
        return tuple(input_shape)

    def compute_output_spec(
        self, z: Any, training: Any = None, mask: Any = None, noise: Any = None, return_all: bool = False
    ) -> Any:
        if not return_all:
            return super().compute_output_spec(z)
        # By a trace of the call.
        return keras.Operation.compute_output_spec(self, z, mask=mask, return_all=True)

    def call(self, z: Any, training: Any = None, mask: Any = None, noise: Any = None, return_all: bool = False) -> Any:
        """Quantize; outside training by the codeword itself.

        Parameters
        ----------
        z, mask, noise
            As in `diveq_core.layers.forward`; a mask of Keras serves, and is handed on.
        training : bool, optional
        return_all : bool
            Whether to give a `Quantization`, of ``z_q``, ``indices``, ``loss`` and ``losses``, and not z_q alone.
        """
        # Without values, as torch traces shapes, there is nothing to learn.
        train = bool(training) and not getattr(z, "is_meta", False)
        learns = train and self.trainable
        if learns:
            self._begin(z, mask)
        state = self.held()
        if learns and self._moved is None and self.settings.table in state:
            # In torch an assignment must not reach what this step's backward reads.
            state[self.settings.table] = backend_of("VectorQuantizer", z=z).snapshot(state[self.settings.table])
        rng = self._rng(z) if train else None
        out = step.forward(self.settings, state, z, train=train, mask=mask, noise=noise, rng=rng)
        if train and any(self.settings.weights):
            self.add_loss(out.losses.total)
        if learns and self.settings.has_codebook:
            self._update(state, out.statistics)
        return self._named(out) if return_all else out.z_q

    @staticmethod
    def _named(out: Forward) -> Quantization:
        # A graph of Keras has no None.
        zero = ops.zeros_like(out.losses.total)
        parts = (zero if x is None else x for x in out.losses)
        return Quantization(out.z_q, out.indices, out.losses.total, Losses(*parts))

    def encode(self, z: Any, mask: Any = None) -> Any:
        z, mask = _tensors((z, mask))
        # In the dtype in which a call gets it.
        return super().encode(ops.cast(z, self.compute_dtype) if self.autocast and _floats(z) else z, mask)

    def decode(self, indices: Any, *, dtype: Any = None) -> Any:
        indices = _tensors(indices)
        x = super().decode(indices, dtype=dtype)
        return ops.cast(x, self.compute_dtype) if dtype is None else x

    def perplexity(self, indices: Any) -> Any:
        return super().perplexity(_tensors(indices))

    def start(self, z: Any, mask: Any = None) -> None:
        """Begin the codebook with vectors of a batch, as the first step in training does."""
        z, mask = _tensors((z, mask))
        self._assign(beginning.start(self.settings, self.held(), z, mask=mask, noise=self._normal(2)))

    def _begin(self, z: Any, mask: Any) -> None:
        if not self.settings.from_data:
            return
        started, lib = self._held["started"].value, backend_of("VectorQuantizer", z=z)
        if not _traced(started):
            if not bool(started):
                self.start(z, mask)
            return
        state, z, noise = _constant(lib, self.held()), lib.stop_gradient(z), self._normal(2)
        self._assign(
            _either(started, lambda: state, lambda: beginning.start(self.settings, state, z, mask=mask, noise=noise))
        )

    def _update(self, state: State, statistics: Statistics) -> None:
        """Moving averages, counts and replacement."""
        every, lib = self.settings.replace_every, backend_of("VectorQuantizer", **state)
        state = _constant(lib, state)
        noise = self._normal(self.settings.codebook_shape[-1] + 2) if self.settings.replaces else None

        def updated(replace: bool) -> State:
            return upkeep.update(self.settings, state, statistics, noise=noise, replace=replace)

        due = (state["steps"] + 1) % every == 0 if self.settings.replaces else False
        if _traced(due):
            self._assign(_either(due, lambda: updated(True), lambda: updated(False)))
        else:
            self._assign(updated(bool(due)))

    def _assign(self, new: State) -> None:
        """What a step may set: all but what gradients train."""
        for name in self.settings.buffers:
            self._held[name].assign(new[name])
        if self._moved is not None:
            self._held[self.settings.table].assign(new[self.settings.table] - self._moved.value)

    def _normal(self, width: int) -> Any:
        """Standard normal numbers for each codeword."""
        shape = (len(self.settings.codebooks), self.settings.codebook_shape[-2], width)
        x = self._held[self.settings.table]
        return keras.random.normal(shape, dtype=x.dtype, seed=self.seed_generator)

    def _rng(self, z: Any) -> Any:
        """A key of JAX, or a generator of torch."""
        seed = self.seed_generator.next()
        if keras.backend.backend() == "jax":
            return seed
        import torch

        number, count = (int(x) for x in seed)
        return torch.Generator(z.device).manual_seed((number * 2654435761 + count) % 2**32)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"settings": file.to_text(self.settings), "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VectorQuantizer:
        given = file.from_text(config.pop("settings")).given()
        return cls(given.pop("dim"), given.pop("codebook_size"), **given, **config)


def _tensors(x: Any) -> Any:
    return keras.tree.map_structure(lambda x: None if x is None else ops.convert_to_tensor(x), x)


def _floats(x: Any) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))


def _traced(x: Any) -> bool:
    """Whether JAX traces, so that there is no value to branch by."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def _either(condition: Any, yes: Callable[[], State], no: Callable[[], State]) -> State:
    import jax

    return jax.lax.cond(condition, yes, no)


def _constant(lib: Any, state: State) -> State:
    return {name: lib.stop_gradient(x) for name, x in state.items()}
