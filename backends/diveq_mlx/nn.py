"""The layer for MLX. It is imported by its own name, as ``mlx.nn`` is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from diveq_core.arrays.registry import backend_of
from diveq_core.layers import beginning, step, upkeep
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.layers.words import State


class VectorQuantizer(Layer, nn.Module):
    r"""A vector quantizer as a module.

    .. math:: z_q = \text{quantizer}(z, E)

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    key : array, optional
        From which the first state is drawn. Steps draw from MLX's default stream, as dropout does.
    dtype : optional
        Of the state; at least float32.
    all_reduce : callable, optional
        Sum over ranks, ``mx.distributed.all_sum`` say.

    Notes
    -----
    What gradients train is a parameter, all else is frozen and stays so when a model around it is unfrozen. Averages,
    counts and replacement are set at the end of a step in training, as `mlx.nn.BatchNorm` sets its own: what the
    gradient reads are the arrays before, and the optimizer goes on from those after. (``update`` is `mlx.nn.Module`'s,
    which sets parameters.)

    A compiled step captures ``model.state`` and ``mx.random.state``. Let `start`, or a step outside `mx.compile`, come
    first. A step that is compiled before the codebook has begun holds the start from data for good, which costs little;
    k-means would cost ten searches and is refused.
    ``mx.checkpoint`` computes a step again with other noise and other averages: keep the layer out of it.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from diveq_mlx.nn import VectorQuantizer
    >>> vq = VectorQuantizer(8, 32)
    >>> z = mx.random.normal((64, 8))
    >>> z_q, indices, loss, losses = vq(z)
    >>> vq = vq.eval()
    >>> bool(mx.all(vq.decode(vq.encode(z)) == vq(z).z_q))
    True
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        key: mx.array | None = None,
        dtype: Any = mx.float32,
        all_reduce: Callable[[mx.array], mx.array] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.all_reduce = all_reduce
        self._no_grad = _Frozen(self.settings.buffers)
        # Whether the codebook has begun, as far as is known without reading.
        self._begun = False
        self.hold(beginning.init(self.settings, mx.zeros((), dtype), rng=key))

    def __setattr__(self, name: str, x: Any) -> None:
        if name == "codebook":
            # A module's own would hide the property by a parameter.
            object.__setattr__(self, name, x)
        else:
            super().__setattr__(name, x)

    def held(self) -> State:
        return {name: self[name] for name in self.settings.shapes}

    def hold(self, state: State) -> None:
        for name, x in state.items():
            self[name] = x
        if "started" in state:
            started = state["started"]
            self._begun = backend_of("VectorQuantizer", started=started).is_concrete(started) and bool(started)

    def _extra_repr(self) -> str:
        return self.settings.text()

    def __call__(self, z: mx.array, mask: mx.array | None = None, *, noise: Any = None) -> Quantization:
        """Quantize; in evaluation by the codeword itself.

        Parameters
        ----------
        z, mask, noise
            As in `diveq_core.layers.forward`.

        Returns
        -------
        Quantization
        """
        state = self.held()
        if not self.training:
            return Quantization.of(step.forward(self.settings, state, z, train=False, mask=mask))
        begun = self._begin(z, mask)
        for name in begun.keys() & set(self.settings.parameters):
            # Another value, of which the gradient is the parameter's all the same.
            begun[name] = mx.stop_gradient(begun[name]) + (state[name] - mx.stop_gradient(state[name]))
        state |= begun
        out = step.forward(self.settings, state, z, train=True, mask=mask, noise=noise)
        if self.settings.has_codebook:
            new = upkeep.update(self.settings, state, out.statistics, all_reduce=self.all_reduce)
            for name, x in new.items():
                self[name] = x
        return Quantization.of(out)

    def start(self, z: mx.array, mask: mx.array | None = None) -> None:
        """Begin the codebook with vectors of a batch, as the first step in training does."""
        self.hold(beginning.start(self.settings, self.held(), z, mask=mask, all_reduce=self.all_reduce))

    def _begin(self, z: mx.array, mask: mx.array | None) -> State:
        """Those arrays that the first batch sets, none once it has."""
        if self._begun or not self.settings.from_data:
            return {}
        old, lib = self.held(), backend_of("VectorQuantizer", z=z)
        known = lib.is_concrete(self.started)
        if known and bool(self.started):
            self._begun = True
            return {}
        traced = not known or not lib.is_concrete(z)
        if traced and self.settings.init == "kmeans":
            raise RuntimeError(
                "VectorQuantizer: a start by k-means needs one step in training outside mx.compile, got a compiled one "
                "first; call the layer once with a batch before"
            )
        new = beginning.start(self.settings, old, z, mask=mask, all_reduce=self.all_reduce)
        self._begun = not traced and bool(new["started"])
        return {
            name: mx.where(self.started, old[name], new[name]) if traced else new[name]
            for name in ("codewords", "embedding", "averages", "started")
            if name in new
        }


class _Frozen(set):
    """Names of frozen parameters, of which some stay frozen."""

    def __init__(self, names: Any) -> None:
        super().__init__(names)
        self.names = tuple(names)

    def clear(self) -> None:
        super().clear()
        self.update(self.names)

    def difference_update(self, *others: Any) -> None:
        super().difference_update(*others)
        self.update(self.names)
