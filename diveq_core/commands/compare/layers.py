"""Layers, each with its hand-derived pullback next to its forward.

A layer gives its output and a function from the output's cotangent ``g`` to those of its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from array_api_compat import array_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.commands.compare.quantizers import Arrays


def affine(x: Array, weight: Array, bias: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    r"""Affine layer.

    .. math:: y = x W + b, \qquad g_x = g W^\top, \qquad g_W = x^\top g, \qquad g_b = \textstyle\sum_n g_n

    ``x`` is (N, A), ``weight`` (A, B), ``bias`` (B,).
    """
    xp = array_namespace(x)

    def pullback(g: Array) -> tuple[Array, Array, Array]:
        return g @ weight.T, x.T @ g, xp.sum(g, axis=0)

    return x @ weight + bias, pullback


def relu(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    r"""Rectifier.

    .. math:: y = \max(x, 0), \qquad g_x = g\,[x > 0]
    """
    xp = array_namespace(x)
    active = xp.astype(x > 0, x.dtype)
    return x * active, lambda g: g * active


def perceptron(parameters: Arrays, name: str, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, Arrays]]]:
    r"""Two affine layers with a rectifier between them.

    .. math:: y = \max(x W_1 + b_1, 0)\, W_2 + b_2

    ``pullback(g)`` gives the cotangent of ``x`` and those of the parameters of this name.
    """
    hidden, hidden_pullback = affine(x, parameters[f"{name}.weight_1"], parameters[f"{name}.bias_1"])
    active, relu_pullback = relu(hidden)
    y, out_pullback = affine(active, parameters[f"{name}.weight_2"], parameters[f"{name}.bias_2"])

    def pullback(g: Array) -> tuple[Array, Arrays]:
        g_active, g_weight_2, g_bias_2 = out_pullback(g)
        g_x, g_weight_1, g_bias_1 = hidden_pullback(relu_pullback(g_active))
        gradients = {"weight_1": g_weight_1, "bias_1": g_bias_1, "weight_2": g_weight_2, "bias_2": g_bias_2}
        return g_x, {f"{name}.{key}": gradient for key, gradient in gradients.items()}

    return y, pullback
