"""Adam, as a pure function of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from array_api_compat import array_namespace

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Moments(NamedTuple):
    """Adam's memory."""

    first: dict[str, Array]
    second: dict[str, Array]
    decay: tuple[Array, Array]
    """The powers beta_1^t and beta_2^t, arrays of shape ()."""


def no_moments(parameters: dict[str, Array]) -> Moments:
    """Moments before the first step."""
    xp = array_namespace(*parameters.values())
    zeros = {name: xp.zeros_like(x) for name, x in parameters.items()}
    one = xp.ones_like(xp.sum(next(iter(parameters.values()))))
    return Moments(zeros, zeros, (one, one))


def adam(
    parameters: dict[str, Array], gradients: dict[str, Array], moments: Moments, rate: float
) -> tuple[dict[str, Array], Moments]:
    r"""One step.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        \theta \leftarrow \theta - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    parameters, gradients : dict of array
        A parameter without a gradient keeps its value.
    moments : Moments
        From `no_moments` or the step before.
    rate : float
        The learning rate :math:`\eta`.

    Returns
    -------
    parameters, moments
        New ones; the arguments keep their values.

    References
    ----------
    Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, algorithm 1.
    """
    xp = array_namespace(*parameters.values())
    decay_1, decay_2 = moments.decay[0] * BETA_1, moments.decay[1] * BETA_2
    updated, first, second = dict(parameters), dict(moments.first), dict(moments.second)
    for name, g in gradients.items():
        m = BETA_1 * moments.first[name] + (1 - BETA_1) * g
        v = BETA_2 * moments.second[name] + (1 - BETA_2) * (g * g)
        updated[name] = parameters[name] - rate * (m / (1 - decay_1)) / (xp.sqrt(v / (1 - decay_2)) + EPSILON)
        first[name], second[name] = m, v
    return updated, Moments(first, second, (decay_1, decay_2))
