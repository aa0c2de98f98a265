r"""One step of a layer: vectors, their tokens, the losses, and the sums that its upkeep needs.

.. math:: x = \operatorname{in}(z), \qquad (x_q, i) = \text{quantizer}(x, E), \qquad z_q = \operatorname{out}(x_q)

A step changes nothing. What moving averages, replacement and counts need of it are sums of the codebook's size, its
`Statistics`, which `update` takes when the gradient has been computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import checked_indices
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.diagnostics import perplexity as perplexity_of
from diveq_core.layers.auxiliary import tokens_used
from diveq_core.layers.results import Point
from diveq_core.layers.run import Step, check_settings, decoded
from diveq_core.layers.words import joined

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.layers.results import Forward
    from diveq_core.layers.settings import Settings
    from diveq_core.layers.words import State


@quiet
def forward(
    settings: Settings,
    state: State,
    z: Array,
    /,
    *,
    train: bool,
    mask: Array | None = None,
    noise: Any = None,
    kept_stages: Array | None = None,
    rng: Any = None,
) -> Forward:
    r"""One step of a layer; differentiable in libraries that differentiate.

    Parameters
    ----------
    settings : Settings
    state : dict of array
        From `init`, `start` or `update`.
    z : array (..., D)
        Vectors, along ``settings.channel_axis``, in any real floating dtype.
    train : bool
        Whether to quantize by the estimator and to count. Otherwise the output is ``decode(encode(z))``, of zero loss.
    mask : bool array (...), optional
        Which vectors there are, without the channel axis. The others give zeros and -1, and count for nothing.
    noise : optional
        That of ``settings.quantizer``, as `quantize` takes it; drawn from ``rng`` if there is none.
    kept_stages : integer array (B,), optional
        How many stages each example uses, for quantizer dropout; drawn if there is none.
    rng : optional
        The library's own generator or key, as in `quantize`.

    Returns
    -------
    Forward

    Raises
    ------
    TypeError, ValueError
        As `quantize`; if the state does not fit the settings; with ``not_finite="refuse"`` if ``z`` is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> settings = dq.layers.Settings(2, 4, dq.STE(), init="normal")
    >>> state = dq.layers.init(settings, np.zeros(1), rng=np.random.default_rng(0))
    >>> out = dq.layers.forward(settings, state, np.ones((3, 2)), train=True)
    >>> out.z_q.shape, out.indices.shape, float(out.statistics.batches)
    ((3, 2), (3,), 1.0)
    """
    return Step("forward", settings, state, z, mask).run(train, False, noise, kept_stages, rng)[0]


@quiet
def forward_vjp(
    settings: Settings,
    state: State,
    z: Array,
    /,
    *,
    mask: Array | None = None,
    noise: Any = None,
    kept_stages: Array | None = None,
    rng: Any = None,
) -> tuple[Forward, Callable[..., tuple[Array, dict[str, Array]]]]:
    r"""One step in training, and its pullback; works in every library, without automatic differentiation.

    Parameters
    ----------
    settings, state, z, mask, noise, kept_stages, rng
        As in `forward`.

    Returns
    -------
    out : Forward
    pullback : callable
        ``pullback(g_z_q, g_loss)`` takes the cotangents of ``z_q`` and of ``losses.total``, a number, 1 by default,
        and gives that of ``z`` and a dictionary of those of ``settings.parameters``. The state may have been
        overwritten by then; ``z`` must stay as it was.

    Raises
    ------
    TypeError, ValueError
        As `forward`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.
    """
    return Step("forward_vjp", settings, state, z, mask).run(True, True, noise, kept_stages, rng)


@quiet
def encode(settings: Settings, state: State, z: Array, /, *, mask: Array | None = None) -> Any:
    """Tokens of vectors: hard and deterministic.

    Parameters
    ----------
    settings, z, mask
        As in `forward`.
    state : dict of array
        As in `forward`; the arrays of ``settings.token_shapes`` are enough.

    Returns
    -------
    integer array (...), or Point
        With an axis for heads and one for stages at the end. -1 for what is masked or not finite.

    Raises
    ------
    TypeError, ValueError
        As `forward`.
    """
    return Step("encode", settings, state, z, mask, whole=False).tokens()


@quiet
def decode(settings: Settings, state: State, indices: Any, /, *, dtype: Any = None) -> Array:
    """Vectors from tokens, along ``settings.channel_axis``: exactly what `forward` gives outside training.

    Parameters
    ----------
    settings, state
        As in `encode`.
    indices : integer array (...), or Point
        As `encode` gives them. -1 gives zeros with ``not_finite="skip"``, and NaN otherwise; in a stage after the first
        it adds nothing.
    dtype : optional
        The library's floating dtype of the result, by default that of the state.

    Returns
    -------
    array

    Raises
    ------
    TypeError, ValueError
        As `diveq_core.decode`.
    """
    return decoded(settings, state, indices, dtype)


@quiet
def usage(settings: Settings, indices: Any, /) -> Array:
    """How often each token stands in an array of tokens, for each codebook.

    Parameters
    ----------
    settings : Settings
    indices : integer array (...), or Point
        As `forward` or `encode` gives them. Those of -1 are not counted.

    Returns
    -------
    array (K,)
        With axes for heads and stages before, as the codebook has them. A token is a codeword, a segment of a curve or
        a code of `FSQ`.

    Raises
    ------
    TypeError, ValueError
        As `diveq_core.usage`; if the axes for heads and stages are missing.
    """
    return _by_codebook("usage", settings, indices, lambda counts: counts)


@quiet
def perplexity(settings: Settings, indices: Any, /) -> Array:
    r"""Effective number of tokens in use, for each codebook.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big)

    with :math:`p_k` the share of token k, as `usage` counts it.

    Parameters
    ----------
    settings, indices
        As in `usage`.

    Returns
    -------
    array ()
        With axes for heads and stages, as the codebook has them; NaN where nothing was counted.

    Raises
    ------
    TypeError, ValueError
        As `usage`.
    """
    return _by_codebook("perplexity", settings, indices, perplexity_of)


def _by_codebook(function: str, settings: Settings, indices: Any, of_counts: Callable[[Array], Array]) -> Array:
    """What a function makes of the counts of each codebook."""
    check_settings(function, settings)
    indices = indices.segments if isinstance(indices, Point) else indices
    lib = backend_of(function, indices=indices)
    indices, axes = checked_indices(lib, function, indices, settings.token_count), settings.axes
    if tuple(indices.shape[indices.ndim - len(axes) :]) != axes:
        raise ValueError(
            f"{function}: indices must end with the axes {axes} of heads and stages, got shape {tuple(indices.shape)}"
        )
    counts = tokens_used(lib, settings, indices)
    return joined(lib, settings, {own: of_counts(found) for own, found in counts.items()})
