"""The layer for PyTorch."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C import _functorch
from torch.utils._pytree import _register_namedtuple

from diveq_core.arrays.rows import describe
from diveq_core.layers import beginning, step, upkeep
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.results import Losses, Point, Statistics, added
from diveq_core.layers.settings import DEFAULT, Settings
from diveq_torch.bind import has_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.layers.words import State


_numbers = itertools.count()


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

    A codebook that is frozen by ``requires_grad_(False)`` is not replaced either. In 16 bits, by ``.half()`` say,
    averages and counts stay in float32. What is drawn for a start and for replacements follows from torch's first seed
    and the number of the step, so that a resumed run draws the same.

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
        for name, x in beginning.init(self.settings, like, rng=generator).items():
            if name in self.settings.parameters:
                self.register_parameter(name, nn.Parameter(x))
            else:
                # Whoever averages the buffers of models subtracts them, which truth values do not allow.
                self.register_buffer(name, x.float() if name == "started" else x)
        self._pending: Statistics | None = None
        self._number = next(_numbers)
        # Of what is drawn between steps; together with the number of the step it is all that a resumed run needs.
        self._seed = torch.initial_seed() if generator is None else generator.initial_seed()
        # What the buffers `started` and `steps` hold, known without reading a device; None for not known.
        self._begun: bool | None = None
        self._count: int | None = None
        self.register_load_state_dict_post_hook(_forget)

    def held(self) -> State:
        return {name: getattr(self, name) for name in self.settings.shapes}

    def arrays(self) -> dict[str, Any]:
        return {name: x.astype(bool) if name == "started" else x for name, x in super().arrays().items()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> dict[str, Any]:
        return {"dtype": torch.float64} if any(x.dtype.name == "float64" for x in arrays.values()) else {}

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
        if not isinstance(z, torch.Tensor):
            raise TypeError(f"VectorQuantizer: z must be a torch.Tensor, got {describe(z)}")
        if not self.training:
            return Quantization.of(step.forward(self.settings, self.held(), z, train=False, mask=mask))
        counts = _counts(z)
        if counts:
            if self.auto_update:
                self.update()
            self._begin(z, mask)
        state = self.held()
        name = _replaced(self.settings)
        if name is not None:
            # A later update must not reach what this step's backward reads.
            state[name] = state[name].clone()
        out = step.forward(self.settings, state, z, train=True, mask=mask, noise=noise)
        if counts:
            self._pending = added(self._pending, out.statistics)
        return Quantization.of(out)

    @torch.no_grad()
    def start(self, z: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Begin the codebook with vectors of a batch, as the first step in training does."""
        self.begun(self.held(), z, mask)
        _forget(self)

    @torch.no_grad()
    def update(self) -> None:
        """Moving averages, counts and replacement, by the statistics of the steps since the last time."""
        pending, self._pending = self._pending, None
        if pending is None or not self.settings.has_codebook:
            return
        if torch.compiler.is_compiling():
            _update_layer(self._number, list(self.held().values()), list(pending))
        else:
            self.updated(self.held(), pending)

    def updated(self, state: State, pending: Statistics) -> None:
        """Write to a state what `diveq_core.layers.update` makes of it."""
        replace = self._due()
        rng = self._rng(self._count or 0) if replace else None
        options = {"rng": rng, "all_reduce": self._sum(), "replace": replace}
        _write(state, upkeep.update(self.settings, state, pending, **options))

    def _begin(self, z: torch.Tensor, mask: torch.Tensor | None) -> None:
        if not self.settings.from_data or self._begun:
            return
        if torch.compiler.is_compiling() or not has_values(z):
            # Values cannot be read, so this batch is taken for one that has vectors.
            if torch.compiler.is_compiling() and not z.is_meta:
                _start_layer(self._number, list(self.held().values()), z.detach(), mask)
            self._begun = True
            return
        if not bool(self.started):
            self.start(z, mask)
        self._begun = bool(self.started)

    def begun(self, state: State, z: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Write to a state what `diveq_core.layers.start` makes of it."""
        options = {"mask": mask, "rng": self._rng(0), "all_reduce": self._sum()}
        _write(state, beginning.start(self.settings, state, z, **options))

    def _due(self) -> bool | None:
        """Whether the step to come is one after which unused codewords are replaced; None where only a device knows."""
        if not self.settings.replaces or not has_values(self.steps):
            return None
        self._count = (int(self.steps) if self._count is None else self._count) + 1
        trained = self._parameters.get("codewords")
        # A codebook that was frozen stays as it is.
        frozen = trained is not None and not trained.requires_grad
        return self._count % self.settings.replace_every == 0 and not frozen

    def _rng(self, step: int) -> torch.Generator | None:
        """A stream for what is drawn after a step: a checkpoint draws a step's noise again, but none of this."""
        if not has_values(self.steps):
            return None
        return torch.Generator(self.steps.device).manual_seed((self._seed + step) % (1 << 63))

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook":
            # A module's own would take a parameter for one of its own.
            object.__setattr__(self, name, value)
            return
        super().__setattr__(name, value)
        if name == "_number":
            _layers[value] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = next(_numbers)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in _WIDE & self._buffers.keys():
            x = self._buffers[name]
            if x.dtype in (torch.float16, torch.bfloat16):
                # What adds up small moves and large counts stays in float32.
                self._buffers[name] = before[name].to(x.device)
        if self._pending is not None:
            self._pending = Statistics(*(None if x is None else fn(x) for x in self._pending))
        return self


# torch.export asks for a name to write each of them by.
for _result in (Quantization, Losses, Point):
    _register_namedtuple(_result, serialized_type_name=f"diveq_core.layers.{_result.__name__}")


_WIDE = {"averages", "counts", "usage"}


def _forget(module: Any, *_: Any) -> None:
    """Nothing is known of a state that came from elsewhere, and no statistics are of it."""
    module._begun = module._count = module._pending = None


def _replaced(settings: Settings) -> str | None:
    """The array that a replacement overwrites and a backward pass reads; None where there is none."""
    name = settings.table
    return name if settings.replaces and (name == "embedding" or name in settings.parameters) else None


# The layers by a number that an operator can be given.
_layers: weakref.WeakValueDictionary[int, VectorQuantizer] = weakref.WeakValueDictionary()


# What a step does to the state before it quantizes is one operator to torch.compile: its many small operations, most of
# them for the seldom case of a start or a replacement, would take minutes to compile, and a branch on values is free.
@torch.library.custom_op("diveq_core::update_layer", mutates_args=("state",))
def _update_layer(number: int, state: list[torch.Tensor], pending: list[torch.Tensor | None]) -> None:
    # A checkpoint that computes a compiled step again runs this again.
    if torch._C._current_graph_task_id() == -1:
        layer = _layers[number]
        layer.updated(dict(zip(layer.settings.shapes, state, strict=True)), Statistics(*pending))


@torch.library.custom_op("diveq_core::start_layer", mutates_args=("state",))
def _start_layer(number: int, state: list[torch.Tensor], z: torch.Tensor, mask: torch.Tensor | None) -> None:
    layer = _layers[number]
    given = dict(zip(layer.settings.shapes, state, strict=True))
    if not bool(given["started"]):
        layer.begun(given, z, mask)


def _write(state: State, new: State) -> None:
    """Overwrite those arrays that are new."""
    for name, x in new.items():
        if x is not state[name]:
            state[name].copy_(x)


def _counts(z: torch.Tensor) -> bool:
    """Whether a step counts: not where a checkpoint computes it again, nor where what torch.func wraps would leak."""
    if torch.compiler.is_compiling():
        return not torch._C._are_functorch_transforms_active()
    return torch._C._current_graph_task_id() == -1 and not _functorch.is_functorch_wrapped_tensor(z)
