"""The network: layers, each with its hand-derived pullback next to its forward.

A layer gives its output and a function from the output's cotangent ``g`` to those of its arguments, as
`diveq_core.vjp` does for the quantizer between encoder and decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from array_api_compat import array_namespace

from diveq_core.compare.losses import codebook_loss, commitment_loss, squared_error
from diveq_core.estimators import STE
from diveq_core.quantize import quantize, vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from diveq_core._array import Array
    from diveq_core.compare.recipes import Recipe

Arrays = dict[str, "Array"]


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


def initial_parameters(rng: np.random.Generator, size: int, width: int, dim: int) -> dict[str, np.ndarray]:
    """Normal weights of variance 2 / fan-in before a rectifier and 1 / fan-in elsewhere; biases zero."""
    parameters = {}
    for name, (inputs, outputs) in {"encoder": (size, dim), "decoder": (dim, size)}.items():
        for layer, (fan_in, fan_out), gain in ((1, (inputs, width), 2.0), (2, (width, outputs), 1.0)):
            weight = rng.standard_normal((fan_in, fan_out))
            parameters[f"{name}.weight_{layer}"] = weight * (gain / fan_in) ** 0.5
            parameters[f"{name}.bias_{layer}"] = weight[0, :] * 0.0
    return parameters


def loss_and_gradients(parameters: Arrays, x: Array, noise: Array | None, recipe: Recipe) -> tuple[Array, Arrays]:
    r"""Training loss, its gradients by hand.

    .. math:: L = \overline{(y - x)^2} + \beta\,\overline{(\operatorname{sg}[z] - q)^2}
                + \gamma\,\overline{(z - \operatorname{sg}[q])^2}, \qquad
              z = \mathrm{encode}(x),\ y = \mathrm{decode}(z_q)

    Parameters
    ----------
    parameters : dict of array
        Those of encoder and decoder, and ``codebook`` (K, D) unless the recipe has no estimator.
    x : array (N, P)
        Patches.
    noise : array (N, D) or None
        Standard normal, for a recipe that is ``noisy``.
    recipe : Recipe

    Returns
    -------
    loss : array ()
        The first term alone, which is comparable between recipes.
    gradients : dict of array
        With the keys of ``parameters``.
    """
    z, encoder_pullback = perceptron(parameters, "encoder", x)
    if recipe.estimator is None:
        y, decoder_pullback = perceptron(parameters, "decoder", z)
        loss, g_y = squared_error(y, x)
        g_z, gradients = decoder_pullback(g_y)
        return loss, gradients | encoder_pullback(g_z)[1]

    codebook = parameters["codebook"]
    # A run that diverges is reported as such in every library, rather than refused in some.
    out, quantizer_pullback = vjp(z, codebook, recipe.estimator, noise=noise, check_finite=False)
    y, decoder_pullback = perceptron(parameters, "decoder", out.z_q)
    loss, g_y = squared_error(y, x)
    g_z_q, gradients = decoder_pullback(g_y)
    g_z, g_codebook = quantizer_pullback(g_z_q)
    if recipe.codebook_weight:
        g_codebook = g_codebook + recipe.codebook_weight * codebook_loss(z, codebook, out.indices)[1]
    if recipe.commitment_weight:
        g_z = g_z + recipe.commitment_weight * commitment_loss(z, codebook, out.indices)[1]
    return loss, gradients | encoder_pullback(g_z)[1] | {"codebook": g_codebook}


class Reconstruction(NamedTuple):
    """What an autoencoder makes of patches, through the hard codewords."""

    y: Array
    """Reconstructed patches, (N, P)."""

    z: Array
    """Encoder's outputs, (N, D)."""

    q: Array
    """Their codewords, or ``z`` itself without a quantizer, (N, D)."""

    g: Array
    """Cotangent of the decoder's input under the reconstruction loss, (N, D)."""

    indices: Array | None
    """Index of each codeword, (N,); None without a quantizer."""


def reconstruct(parameters: Arrays, x: Array, recipe: Recipe) -> Reconstruction:
    """Encode, replace by the nearest codewords, decode."""
    z, _ = perceptron(parameters, "encoder", x)
    q, indices = z, None
    if recipe.estimator is not None:
        # For a hard estimator z_q is lookup(nearest(z)), bit for bit; and of a diverged run it is NaN, not refused.
        q, indices = quantize(z, parameters["codebook"], STE(), check_finite=False)
    y, decoder_pullback = perceptron(parameters, "decoder", q)
    return Reconstruction(y, z, q, decoder_pullback(squared_error(y, x)[1])[0], indices)
