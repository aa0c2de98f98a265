"""The layer for Flax NNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from diveq_core.arrays.rows import describe
from diveq_core.layers import beginning, step
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.settings import DEFAULT, Settings
from diveq_jax import layers

try:
    from flax import nnx
except ImportError as error:
    raise layers.of_extra("flax") from error

if TYPE_CHECKING:
    from diveq_core.layers.words import State


class CodebookState(nnx.Variable):
    """What a layer holds and gradients do not train: averages, counts, and a codebook that is not a parameter."""


class VectorQuantizer(Layer, nnx.Module):
    r"""A vector quantizer as a module of Flax NNX.

    .. math:: z_q = \text{quantizer}(z, E)

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    rngs : nnx.Rngs
        Its stream ``params`` draws the first state. A fork of its stream ``rng_collection`` draws in training.
    axis_name : hashable or tuple of hashable, optional
        Axes of `jax.vmap` or `jax.shard_map` whose vectors share the codebook, as in `nnx.BatchNorm`.
    deterministic : bool
        Whether it evaluates; ``model.train()`` and ``model.eval()`` set it.
    rng_collection : str
    param_dtype : dtype
        Of the state; at least float32.

    Raises
    ------
    TypeError, ValueError
        As `Settings`; if ``rngs`` is no `nnx.Rngs`.

    Notes
    -----
    What gradients train is an `nnx.Param`, all else a `CodebookState`. A step in training changes them in the call,
    as `nnx.BatchNorm` does: the first batch begins the codebook, then come counts, moving averages and the replacement
    of unused codewords. The gradient is that of the codebook before the replacement; where the codebook is an
    `nnx.Param` the optimizer's step comes on top, and moves a new codeword by what the unused one had.
    `nnx.grad`, `nnx.jit`, `nnx.remat` and `nnx.scan` hand such changes on. A loss for `jax.grad` that merges the
    module itself must return the whole state, parameters too, or the codebook loses its start and its replacements.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from diveq_jax.flax import VectorQuantizer
    >>> vq = VectorQuantizer(8, 32, rngs=nnx.Rngs(0))
    >>> z = jax.random.normal(jax.random.key(0), (64, 8))
    >>> gradients = nnx.grad(lambda vq, z: ((vq(z).z_q - z) ** 2).mean())(vq, z)
    >>> vq.eval()
    >>> bool((vq.decode(vq.encode(z)) == vq(z).z_q).all())
    True
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        rngs: nnx.Rngs,
        axis_name: Any = None,
        deterministic: bool = False,
        rng_collection: str = "noise",
        param_dtype: Any = jnp.float32,
        **options: Any,
    ) -> None:
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"VectorQuantizer: rngs must be an nnx.Rngs, got {describe(rngs)}")
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.deterministic = deterministic
        for name, x in beginning.init(self.settings, jnp.zeros((), param_dtype), rng=rngs.params()).items():
            setattr(self, name, nnx.Param(x) if name in self.settings.parameters else CodebookState(x))
        self.rngs = rngs[rng_collection].fork()

    def held(self) -> State:
        return {name: getattr(self, name)[...] for name in self.settings.shapes}

    def hold(self, state: State) -> None:
        for name, x in state.items():
            getattr(self, name)[...] = x

    def __call__(
        self, z: jax.Array, mask: jax.Array | None = None, *, noise: Any = None, deterministic: bool | None = None
    ) -> Quantization:
        """Quantize; in evaluation by the codeword itself.

        Parameters
        ----------
        z, mask, noise
            As in `diveq_core.layers.forward`.
        deterministic : bool, optional
            In the place of the attribute.

        Returns
        -------
        Quantization
        """
        if self.deterministic if deterministic is None else deterministic:
            return Quantization.of(step.forward(self.settings, self.held(), z, train=False, mask=mask))
        held = self.held()
        out, state = layers.trained(self.settings, held, z, mask, noise, self.rngs(), self.axis_name)
        self.hold({name: x for name, x in state.items() if x is not held[name]})
        return Quantization.of(out)

    def start(self, z: jax.Array, mask: jax.Array | None = None) -> None:
        """Begin the codebook with vectors of a batch, as the first step in training does."""
        reduce = layers.summed(self.axis_name)
        self.hold(beginning.start(self.settings, self.held(), z, mask=mask, rng=self.rngs(), all_reduce=reduce))

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`.

        Parameters
        ----------
        deterministic : bool, optional
            Whether the view evaluates.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @classmethod
    def load(cls, path: Any, *, rngs: nnx.Rngs | None = None, **options: Any) -> Self:
        """The layer that a file holds, of whatever framework it came.

        Parameters
        ----------
        path
            Of a file that ``save`` wrote.
        rngs : nnx.Rngs, optional
            For training on; by default ``nnx.Rngs(0)``.
        **options
            ``axis_name`` and the like, and what is to differ from the file, ``channel_axis`` say.
        """
        return super().load(path, rngs=nnx.Rngs(0) if rngs is None else rngs, **options)
