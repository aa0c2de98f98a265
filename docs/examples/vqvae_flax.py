"""A VQ-VAE in Flax NNX on handwritten digits; vqvae_torch.py is the same in PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import digits
from common import progress
from diveq_jax.flax import VectorQuantizer


class VQVAE(nnx.Module):
    """Images (B, 28, 28, 1) to tokens (B, 7, 7) and back."""

    def __init__(self, vq: VectorQuantizer, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Sequential(
            *(nnx.Conv(1, 32, (4, 4), strides=2, padding=1, rngs=rngs), nnx.relu),
            *(nnx.Conv(32, 64, (4, 4), strides=2, padding=1, rngs=rngs), nnx.relu),
            nnx.Conv(64, digits.DIM, (1, 1), rngs=rngs),
        )
        self.vq = vq
        self.decoder = nnx.Sequential(
            *(nnx.Conv(digits.DIM, 64, (3, 3), padding=1, rngs=rngs), pixel_shuffle, nnx.relu),
            *(nnx.Conv(16, 32, (3, 3), padding=1, rngs=rngs), nnx.relu),
            *(nnx.Conv(32, 4, (3, 3), padding=1, rngs=rngs), pixel_shuffle),
        )

    def convolutions(self) -> dict[str, nnx.Conv]:
        """By the names that the frameworks share."""
        layers = [x for x in (*self.encoder.layers, *self.decoder.layers) if isinstance(x, nnx.Conv)]
        return dict(zip(digits.SHAPES, layers, strict=True))

    def load(self, weights: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for name, layer in self.convolutions().items():
            layer.kernel, layer.bias = (nnx.Param(jnp.asarray(x, self.vq.codebook.dtype)) for x in weights[name])

    def weights(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        layers = self.convolutions().items()
        return {name: (np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for name, layer in layers}


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """Of every four channels a square of 2 x 2 pixels, in the order of torch.nn.PixelShuffle."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(count, 2 * height, 2 * width, channels // 4)


def loss_of(model: VQVAE, x: jax.Array, noise: jax.Array, quantize: bool) -> jax.Array:
    z, loss = model.encoder(x), 0.0
    if quantize:
        # The noise is given so that PyTorch can be given the same; a layer draws its own.
        z, _, loss, _ = model.vq(z, noise=noise)
    return ((model.decoder(z) - x) ** 2).mean() + loss


@nnx.jit(static_argnames="quantize")
def train_step(model: VQVAE, optimizer: nnx.Optimizer, x: jax.Array, noise: jax.Array, quantize: bool) -> jax.Array:
    error, gradients = nnx.value_and_grad(loss_of)(model, x, noise, quantize)
    optimizer.update(model, gradients)
    return error


def train(model: VQVAE, images: np.ndarray, steps: int, seed: int) -> list[float]:
    warmup, curve = digits.warmup(steps), []
    optimizer = nnx.Optimizer(model, optax.adam(digits.RATE), wrt=nnx.Param)
    for step, (batch, noise) in enumerate(digits.batches(images, steps, seed)):
        x = jnp.asarray(batch)[..., None]
        if step == warmup:
            model.vq.codebook = jnp.asarray(digits.first_codebook(np.asarray(model.encoder(x)), seed))
            schedule = optax.cosine_decay_schedule(digits.RATE, steps - warmup)
            optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
        curve.append(train_step(model, optimizer, x, jnp.asarray(noise), quantize=step >= warmup))
        progress(step, steps, curve[-1])
    return [float(error) for error in curve]


@nnx.jit
def through_tokens(model: VQVAE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = model.vq.encode(model.encoder(x))
    return model.decoder(model.vq.decode(tokens)).clip(0, 1), tokens


def main() -> None:
    given = digits.arguments(__doc__)
    jax.config.update("jax_enable_x64", given.float64)
    images, _ = digits.load("float64" if given.float64 else "float32")
    rngs = nnx.Rngs(given.seed)
    # What draws at random, the first codebook and replacements, is off, for Flax draws other numbers than PyTorch.
    still = {"init": "normal", "replace_every": 0, "param_dtype": images.dtype}
    model = VQVAE(VectorQuantizer(digits.DIM, digits.CODES, rngs=rngs, **still), rngs)
    model.load(digits.weights(given.seed))
    curve = train(model, images[: digits.TRAIN], given.steps, given.seed)
    digits.save(given.out, "vqvae_flax", model.weights(), model.vq, curve)

    model.eval()
    held_out = images[digits.TRAIN :]
    decoded, tokens = through_tokens(model, jnp.asarray(held_out)[..., None])
    digits.report(given.out, "vqvae_flax", held_out, np.asarray(decoded)[..., 0], np.asarray(tokens))


if __name__ == "__main__":
    main()
