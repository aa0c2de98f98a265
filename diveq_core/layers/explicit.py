"""A layer for libraries without automatic differentiation: forward, backward, update, and a step of Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.registry import backend_of
from diveq_core.layers import beginning, step, upkeep
from diveq_core.layers.adam import adam, no_moments
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer
    from diveq_core.layers.words import State


class ExplicitLayer(Layer):
    r"""A vector quantizer whose gradients are called by hand.

    .. math:: z_q = \text{quantizer}(z, E)

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    dtype : dtype, optional
        Of the state; at least float32, which is the default.
    rng : optional
        The library's own generator, from which everything is drawn; by default its default stream.
    all_reduce : callable, optional
        Sum over ranks, as `diveq_core.ema_update` takes it.

    Examples
    --------
    A step of training: ``out = vq.forward(z)``, ``g_z = vq.backward(g_z_q)``, ``vq.step(1e-3)``, ``vq.update()``.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Quantizer = DEFAULT,
        *,
        dtype: Any = None,
        rng: Any = None,
        all_reduce: Callable[[Array], Array] | None = None,
        **options: Any,
    ) -> None:
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.rng, self.all_reduce = rng, all_reduce
        self.state = beginning.init(self.settings, self.like(dtype), rng=rng)
        self.gradients: State = {}
        """Those of the last `backward`, by name."""
        self._pullback: Any = None
        self._pending: Any = None
        self._moments: Any = None

    @staticmethod
    def like(dtype: Any) -> Array:
        """An array of the library, in a dtype or in float32."""
        raise NotImplementedError

    def held(self) -> State:
        return self.state

    def hold(self, state: State) -> None:
        self.state = self.state | state
        # Those of a state that is gone.
        self._pullback = self._pending = None

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> dict[str, Any]:
        floating = [x.dtype for x in arrays.values() if x.dtype.kind == "f"]
        return {"dtype": floating[0]} if floating else {}

    def __getstate__(self) -> dict[str, Any]:
        # A pullback is a function, of a step that a copy did not make.
        return self.__dict__ | {"_pullback": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings.text()})"

    def forward(self, z: Array, mask: Array | None = None, *, train: bool = True, noise: Any = None) -> Quantization:
        """Quantize; in training also keep what `backward` and `update` need.

        Parameters
        ----------
        z, mask, train, noise
            As in `diveq_core.layers.forward`.

        Returns
        -------
        Quantization
        """
        if not train:
            return Quantization.of(step.forward(self.settings, self.state, z, train=False, mask=mask))
        if self.settings.from_data and not bool(self.state["started"]):
            self.start(z, mask)
        out, self._pullback = step.forward_vjp(self.settings, self.state, z, mask=mask, noise=noise, rng=self.rng)
        self._pending = out.statistics
        return Quantization.of(out)

    __call__ = forward

    def start(self, z: Array, mask: Array | None = None) -> None:
        """Begin the codebook with vectors of a batch, as the first `forward` in training does."""
        self.hold(beginning.start(self.settings, self.state, z, mask=mask, rng=self.rng, all_reduce=self.all_reduce))

    def backward(self, g_z_q: Array, g_loss: Any = 1.0) -> Array:
        """The cotangent of ``z`` from those of ``z_q`` and ``loss``; `gradients` then has those of the parameters.

        Raises
        ------
        RuntimeError
            If `forward` was not called in training before.
        """
        if self._pullback is None:
            raise RuntimeError("backward: expected a forward in training before, got none")
        g_z, self.gradients = self._pullback(g_z_q, g_loss)
        return g_z

    def step(self, rate: float) -> None:
        """One step of Adam with the gradients of the last `backward`; those that are not finite change nothing."""
        names = self.settings.parameters
        if not names:
            return
        if not self.gradients:
            raise RuntimeError("step: expected a backward before, got none")
        parameters = {name: self.state[name] for name in names}
        lib = backend_of("step", **parameters)
        if not all(lib.all_finite(g) for g in self.gradients.values()):
            return
        moments = no_moments(parameters) if self._moments is None else self._moments
        new, self._moments = adam(parameters, self.gradients, moments, rate)
        self.state = self.state | new

    def update(self) -> None:
        """Moving averages, counts and replacement, by the statistics of the last `forward` in training."""
        if self._pending is not None:
            self.state = upkeep.update(
                self.settings, self.state, self._pending, rng=self.rng, all_reduce=self.all_reduce
            )
            self._pending = None
