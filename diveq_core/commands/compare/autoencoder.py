"""The network: encoder, quantizer and decoder, forward and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from diveq_core.commands.compare.layers import perceptron
from diveq_core.commands.compare.losses import codebook_loss, commitment_loss, squared_error

if TYPE_CHECKING:
    import numpy as np

    from diveq_core.arrays.rows import Array
    from diveq_core.commands.compare.quantizers import Arrays
    from diveq_core.commands.compare.recipes import Recipe


def initial_parameters(rng: np.random.Generator, size: int, width: int, dim: int) -> dict[str, np.ndarray]:
    """Normal weights of variance 2 / fan-in before a rectifier and 1 / fan-in elsewhere; biases zero."""
    parameters = {}
    for name, (inputs, outputs) in {"encoder": (size, dim), "decoder": (dim, size)}.items():
        for layer, (fan_in, fan_out), gain in ((1, (inputs, width), 2.0), (2, (width, outputs), 1.0)):
            weight = rng.standard_normal((fan_in, fan_out))
            parameters[f"{name}.weight_{layer}"] = weight * (gain / fan_in) ** 0.5
            parameters[f"{name}.bias_{layer}"] = weight[0, :] * 0.0
    return parameters


class Pass(NamedTuple):
    """One forward and backward pass in training."""

    loss: Array
    """Reconstruction loss alone, which is comparable between recipes, ()."""

    gradients: Arrays
    """Of the whole loss, with the keys of the parameters that are trained by gradients."""

    z: Array
    """Encoder's outputs, (N, D)."""

    indices: Array | None
    """What the quantizer chose; None without a quantizer."""


def loss_and_gradients(parameters: Arrays, x: Array, noise: Arrays, recipe: Recipe) -> Pass:
    r"""Training loss, its gradients by hand.

    .. math:: L = \overline{(y - x)^2} + \beta\,\overline{(\operatorname{sg}[z] - q)^2}
                + \gamma\,\overline{(z - \operatorname{sg}[q])^2}, \qquad
              z = \mathrm{encode}(x),\ y = \mathrm{decode}(z_q)

    Parameters
    ----------
    parameters : dict of array
        Those of encoder and decoder, and of the quantizer.
    x : array (N, P)
        Patches.
    noise : dict of array
        As the recipe's quantizer draws it.
    recipe : Recipe

    Returns
    -------
    Pass
    """
    z, encoder_pullback = perceptron(parameters, "encoder", x)
    if recipe.quantizer is None:
        y, decoder_pullback = perceptron(parameters, "decoder", z)
        loss, g_y = squared_error(y, x)
        g_z, gradients = decoder_pullback(g_y)
        return Pass(loss, gradients | encoder_pullback(g_z)[1], z, None)

    out = recipe.quantizer.train(parameters, z, noise)
    y, decoder_pullback = perceptron(parameters, "decoder", out.z_q)
    loss, g_y = squared_error(y, x)
    g_z_q, gradients = decoder_pullback(g_y)
    g_z, own = out.pullback(g_z_q)
    if recipe.codebook_weight:
        moved = codebook_loss(z, parameters["codebook"], out.indices)[1]
        own = own | {"codebook": own["codebook"] + recipe.codebook_weight * moved}
    if recipe.commitment_weight:
        g_z = g_z + recipe.commitment_weight * commitment_loss(z, parameters["codebook"], out.indices)[1]
    return Pass(loss, gradients | encoder_pullback(g_z)[1] | own, z, out.indices)


class Reconstruction(NamedTuple):
    """What an autoencoder makes of patches, through what its codes decode to."""

    y: Array
    """Reconstructed patches, (N, P)."""

    z: Array
    """Encoder's outputs, (N, D)."""

    q: Array
    """What their codes decode to, or ``z`` itself without a quantizer, (N, D)."""

    g: Array
    """Cotangent of the decoder's input under the reconstruction loss, (N, D)."""

    codes: Array | None
    """Code of each patch, (N,); None without a quantizer."""


def reconstruct(parameters: Arrays, x: Array, recipe: Recipe) -> Reconstruction:
    """Encode, quantize as after training, decode."""
    z, _ = perceptron(parameters, "encoder", x)
    q, codes = (z, None) if recipe.quantizer is None else recipe.quantizer.hard(parameters, z)
    y, decoder_pullback = perceptron(parameters, "decoder", q)
    return Reconstruction(y, z, q, decoder_pullback(squared_error(y, x)[1])[0], codes)
