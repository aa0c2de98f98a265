"""The layer for Equinox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from diveq_core.arrays.registry import backend_of
from diveq_core.layers import beginning, file, step
from diveq_core.layers.layer import Quantization, taken, with_codebook
from diveq_core.layers.settings import DEFAULT, Settings
from diveq_core.layers.tokenizer import Tokenizer
from diveq_core.layers.words import words
from diveq_jax import layers

try:
    import equinox as eqx
except ImportError as error:
    raise layers.of_extra("equinox") from error

if TYPE_CHECKING:
    from diveq_core.layers.words import State


class VectorQuantizer(eqx.Module):
    r"""A vector quantizer as a module of Equinox.

    .. math:: z_q = \text{quantizer}(z, E), \qquad E = P + S

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    key : JAX key
        From which the first state is drawn.
    axis_name : hashable or tuple of hashable, optional
        Axes of `jax.vmap` or `jax.shard_map` whose vectors share the codebook, as in `eqx.nn.BatchNorm`.
    inference : bool
        Whether it evaluates; `eqx.nn.inference_mode` sets it.
    dtype : dtype
        Of the state; at least float32.

    Raises
    ------
    TypeError, ValueError
        As `Settings`.

    Notes
    -----
    What gradients train is in ``parameters``, all else in the `eqx.nn.State`. A step in training gives a state with
    new counts and moving averages, and with its codebook begun and its unused codewords replaced. It cannot change
    parameters: where the codebook P is one, what a step changes of it stands in the state, S, and the first one from
    data stands there alone. `update`, after each optimizer's step, makes P the codebook and S zero, as optimizers
    expect that look at a parameter's size. The layer computes with E = P + S, whether that is called or not.

    Examples
    --------
    >>> import equinox as eqx
    >>> import jax
    >>> from diveq_jax.equinox import VectorQuantizer
    >>> key = jax.random.key(0)
    >>> vq, state = eqx.nn.make_with_state(VectorQuantizer)(8, 32, key=key)
    >>> z = jax.random.normal(key, (64, 8))
    >>> out, state = vq(z, state, key=key)
    >>> vq, state = vq.update(state, key=key)
    >>> out, _ = eqx.nn.inference_mode(vq)(z, state)
    >>> bool((vq.decode(vq.encode(z, state), state) == out.z_q).all())
    True
    """

    parameters: dict[str, jax.Array]
    others: eqx.nn.StateIndex
    inference: bool
    settings: Settings = eqx.field(static=True)
    axis_name: Any = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        key: Any,
        axis_name: Any = None,
        inference: bool = False,
        dtype: Any = jnp.float32,
        **options: Any,
    ) -> None:
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.inference = inference
        state = beginning.init(self.settings, jnp.zeros((), dtype), rng=key)
        self.parameters, others = self._parted(state, shifted=self.settings.from_data)
        self.others = eqx.nn.StateIndex(others)

    def __call__(
        self,
        z: jax.Array,
        state: eqx.nn.State,
        mask: jax.Array | None = None,
        *,
        key: Any = None,
        noise: Any = None,
        inference: bool | None = None,
    ) -> tuple[Quantization, eqx.nn.State]:
        """Quantize; in evaluation by the codeword itself.

        Parameters
        ----------
        z, mask, noise
            As in `diveq_core.layers.forward`.
        state : eqx.nn.State
        key : JAX key, optional
            Needed in training, but of an estimator without noise, start and replacement.
        inference : bool, optional
            In the place of the attribute.

        Returns
        -------
        Quantization, eqx.nn.State
        """
        held = self.held(state)
        if self.inference if inference is None else inference:
            return Quantization.of(step.forward(self.settings, held, z, train=False, mask=mask)), state
        out, new = layers.trained(self.settings, held, z, mask, noise, key, self.axis_name)
        others = {name: new[name] for name in self.settings.buffers}
        if self._shifts:
            name = self.settings.table
            stays, shift = new[name] == held[name], new[name] - self.parameters[name]
            others["shift"] = jax.lax.stop_gradient(jnp.where(stays, state.get(self.others)["shift"], shift))
        return Quantization.of(out), state.set(self.others, others)

    def update(self, state: eqx.nn.State, *, key: Any = None) -> tuple[Self, eqx.nn.State]:
        """What steps changed of a codebook that gradients train, made part of it; after each optimizer's step.

        Parameters
        ----------
        state : eqx.nn.State
        key : optional
            Not used: nothing is drawn.

        Returns
        -------
        module, eqx.nn.State
        """
        del key
        return self._with(self.held(state), state) if self._shifts else (self, state)

    def held(self, state: eqx.nn.State) -> State:
        """The arrays of the state by their names in all frameworks."""
        held = {**self.parameters, **state.get(self.others)}
        if self._shifts:
            name = self.settings.table
            held[name] = held[name] + held.pop("shift")
        return held

    def encode(self, z: jax.Array, state: eqx.nn.State, mask: jax.Array | None = None) -> Any:
        """Tokens of vectors: hard, deterministic; `diveq_core.layers.encode`."""
        return step.encode(self.settings, self.held(state), z, mask=mask)

    def decode(self, indices: Any, state: eqx.nn.State, *, dtype: Any = None) -> jax.Array:
        """Vectors from tokens: exactly the output in inference; `diveq_core.layers.decode`."""
        return step.decode(self.settings, self.held(state), indices, dtype=dtype)

    def perplexity(self, indices: Any) -> jax.Array:
        """Effective number of tokens in use, for each codebook; `diveq_core.layers.perplexity`."""
        return step.perplexity(self.settings, indices)

    def codebook(self, state: eqx.nn.State) -> Any:
        """The codebook as it is searched, (K, D), with axes for heads and stages before; None for `FSQ`."""
        if not self.settings.has_codebook:
            return None
        held = self.held(state)
        return jax.lax.stop_gradient(words(backend_of("codebook", **held), self.settings, held)[0])

    def with_codebook(self, codebook: jax.Array, state: eqx.nn.State) -> tuple[Self, eqx.nn.State]:
        """The module and its state with a given codebook, as setting `diveq_core.layers.Layer.codebook` gives it."""
        held = self.held(state)
        return self._with(held | with_codebook(self.settings, held, codebook), state)

    def arrays(self, state: eqx.nn.State) -> dict[str, Any]:
        """The state as arrays of NumPy, under the same names in every framework."""
        held = self.held(state)
        return {name: backend_of("arrays", x=held[name]).to_numpy(held[name]).copy() for name in self.settings.shapes}

    def load_arrays(self, arrays: dict[str, Any], state: eqx.nn.State) -> tuple[Self, eqx.nn.State]:
        """The module and its state with the arrays of another layer of the same settings, whatever its framework."""
        return self._with(taken(self.settings, self.held(state), arrays), state)

    def tokenizer(self, state: eqx.nn.State, *, position_bits: int | None = None) -> Tokenizer:
        """What encodes and decodes as this layer does in inference, as a value; `diveq_core.Tokenizer`."""
        return Tokenizer.of_state(self.settings, self.held(state), position_bits=position_bits)

    def save(self, path: Any, state: eqx.nn.State) -> None:
        """Write settings and arrays to one safetensors file, which the layer of every framework reads."""
        file.write(path, self.settings, self.arrays(state))

    @classmethod
    def load(cls, path: Any, **options: Any) -> tuple[Self, eqx.nn.State]:
        """The layer that a file holds, of whatever framework it came, and its state.

        Parameters
        ----------
        path
            Of a file that ``save`` wrote.
        **options
            ``axis_name`` and the like, and what is to differ from the file, ``channel_axis`` say.
        """
        settings, arrays = file.read(path)
        given = {"key": jax.random.key(0)} | settings.given() | options
        module, state = eqx.nn.make_with_state(cls)(**given)
        return module.load_arrays(arrays, state)

    @property
    def _shifts(self) -> bool:
        """Whether the state holds what steps changed of a parameter."""
        return layers.by_gradient(self.settings) and (self.settings.from_data or self.settings.replaces)

    def _with(self, held: State, state: eqx.nn.State) -> tuple[Self, eqx.nn.State]:
        parameters, others = self._parted(held)
        module = eqx.tree_at(lambda vq: vq.parameters, self, parameters) if parameters else self
        return module, state.set(self.others, others)

    def _parted(self, held: State, shifted: bool = False) -> tuple[State, State]:
        """Parameters and other arrays; the codebook stands in the latter if it is shifted."""
        parameters = {name: held[name] for name in self.settings.parameters}
        others = {name: held[name] for name in self.settings.buffers}
        if self._shifts:
            name = self.settings.table
            none = jnp.zeros_like(held[name])
            parameters[name], others["shift"] = (none, held[name]) if shifted else (held[name], none)
        return parameters, others
