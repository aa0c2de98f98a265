"""The layer for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C import _functorch

from diveq_core.layers import step, upkeep
from diveq_core.layers.explicit import DEFAULT
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.results import Statistics
from diveq_core.layers.settings import Settings

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
    auto_update : bool
        Whether a step in training begins with `update`, by the statistics of the step before. Turn it off, and call
        `update` after the optimizer's step, where a step of the model calls the layer several times.
    process_group : optional
        Ranks that share the codebook; by default all of ``torch.distributed``, where that is initialized.
    generator : torch.Generator, optional
        From which the first state is drawn. Steps draw from torch's default stream, as dropout does.
    device, dtype : optional
        Of the state; at least float32.

    Notes
    -----
    What gradients train is a parameter, all else a buffer. A step never changes the codebook that its backward reads:
    moving averages and replacement come at the beginning of the next step, or by `update`. While a checkpoint computes
    a step again nothing is counted and nothing updated. No value is read from a device but once, after the first batch
    or after loading.

    Examples
    --------
    >>> import torch
    >>> from diveq_torch import VectorQuantizer
    >>> vq = VectorQuantizer(8, 32)
    >>> z = torch.randn(64, 8, requires_grad=True)
    >>> z_q, indices, loss, losses = vq(z)
    >>> (z_q.square().mean() + loss).backward()
    >>> tokens = vq.eval().encode(z)
    >>> bool((vq.decode(tokens) == vq(z).z_q).all())
    True
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        auto_update: bool = True,
        process_group: Any = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.settings = Settings(dim, codebook_size, estimator, **options)
        self.auto_update, self.process_group = auto_update, process_group
        like = torch.zeros((), device=device, dtype=dtype or torch.get_default_dtype())
        for name, x in upkeep.init(self.settings, like, rng=generator).items():
            if name in self.settings.parameters:
                self.register_parameter(name, nn.Parameter(x))
            else:
                self.register_buffer(name, x)
        self._pending: Statistics | None = None
        # What the buffers `started` and `steps` hold, known without reading a device; None for not known.
        self._begun: bool | None = None
        self._count: int | None = None
        self.register_load_state_dict_post_hook(_forget)

    def held(self) -> State:
        return {name: getattr(self, name) for name in self.settings.shapes}

    @torch.no_grad()
    def hold(self, state: State) -> None:
        for name, x in state.items():
            getattr(self, name).copy_(x)
        _forget(self)

    def extra_repr(self) -> str:
        return self.settings.text()

    def forward(self, z: torch.Tensor, mask: torch.Tensor | None = None, *, noise: Any = None) -> Quantization:
        """Quantize; in evaluation by the codeword itself.

        Parameters
        ----------
        z, mask, noise
            As in `diveq_core.layers.forward`.

        Returns
        -------
        Quantization
        """
        if not self.training:
            return Quantization.of(step.forward(self.settings, self.held(), z, train=False, mask=mask))
        # A checkpoint computes a step again while its gradient is computed; and what torch.func wraps would leak.
        counts = not _in_backward() and not _functorch.is_functorch_wrapped_tensor(z)
        if counts:
            if self.auto_update:
                self.update()
            self._begin(z, mask)
        state = self.held()
        if self.settings.replaces and "codewords" in self.settings.parameters:
            # A later update must not reach what this step's backward reads.
            state["codewords"] = state["codewords"].clone()
        out = step.forward(self.settings, state, z, train=True, mask=mask, noise=noise)
        if counts:
            self._pending = _added(self._pending, out.statistics)
        return Quantization.of(out)

    @torch.no_grad()
    def start(self, z: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Begin the codebook with vectors of a batch, as the first step in training does."""
        state = upkeep.start(self.settings, self.held(), z, mask=mask, all_reduce=self._sum())
        for name in ("codewords", "embedding", "averages", "started"):
            if name in state:
                getattr(self, name).copy_(state[name])
        self._begun = None

    @torch.no_grad()
    def update(self) -> None:
        """Moving averages, counts and replacement, by the statistics of the steps since the last time."""
        pending, self._pending = self._pending, None
        if pending is None or not self.settings.has_codebook:
            return
        state = self.held()
        new = upkeep.update(self.settings, state, pending, all_reduce=self._sum(), replace=self._due())
        for name, x in new.items():
            if x is not state[name]:
                getattr(self, name).copy_(x)

    def _begin(self, z: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self.settings.from_data and not self._begun:
            if torch.compiler.is_compiling():
                self.start(z, mask)
                self._begun = True
                return
            if not bool(self.started):
                self.start(z, mask)
            self._begun = bool(self.started)

    def _due(self) -> bool | None:
        """Whether the step to come is one after which unused codewords are replaced; None where only a device knows."""
        if not self.settings.replaces or torch.compiler.is_compiling():
            self._count = None
            return None
        self._count = (int(self.steps) if self._count is None else self._count) + 1
        return self._count % self.settings.replace_every == 0

    def _sum(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Sum over ranks; None where there are none."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        if distributed.get_world_size(self.process_group) == 1:
            return None

        def add(x: torch.Tensor) -> torch.Tensor:
            distributed.all_reduce(x, group=self.process_group)
            return x

        return add

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._pending is not None:
            self._pending = Statistics(*(None if x is None else fn(x) for x in self._pending))
        return self


def _forget(module: Any, *_: Any) -> None:
    """Read `started` and `steps` again, when they are next needed."""
    module._begun = module._count = None


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _added(before: Statistics | None, statistics: Statistics | None) -> Statistics | None:
    if before is None or statistics is None:
        return statistics
    pairs = zip(before, statistics, strict=True)
    return Statistics(*(None if x is None else x + y for x, y in pairs))
