"""A VQ-VAE in PyTorch on handwritten digits; vqvae_flax.py is the same in Flax."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import digits
from common import progress
from diveq_torch import VectorQuantizer


class VQVAE(nn.Module):
    """Images (B, 1, 28, 28) to tokens (B, 7, 7) and back."""

    def __init__(self, vq: VectorQuantizer) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU()),
            nn.Conv2d(64, digits.DIM, 1),
        )
        self.vq = vq
        self.decoder = nn.Sequential(
            *(nn.Conv2d(digits.DIM, 64, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 4, 3, padding=1), nn.PixelShuffle(2)),
        )

    def convolutions(self) -> dict[str, nn.Conv2d]:
        """By the names that the frameworks share."""
        layers = [layer for layer in (*self.encoder, *self.decoder) if isinstance(layer, nn.Conv2d)]
        return dict(zip(digits.SHAPES, layers, strict=True))

    @torch.no_grad()
    def load(self, weights: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for name, layer in self.convolutions().items():
            kernel, bias = weights[name]
            layer.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
            layer.bias.copy_(torch.from_numpy(bias))

    def weights(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        layers = self.convolutions().items()
        return {name: (x.weight.detach().permute(2, 3, 1, 0).numpy(), x.bias.detach().numpy()) for name, x in layers}


def train(model: VQVAE, images: np.ndarray, steps: int, seed: int) -> list[float]:
    warmup, curve = digits.warmup(steps), []
    optimizer = torch.optim.Adam(model.parameters(), digits.RATE)
    schedule = None
    for step, (batch, noise) in enumerate(digits.batches(images, steps, seed)):
        x = torch.from_numpy(batch)[:, None]
        z, loss = model.encoder(x), 0.0
        if step == warmup:
            vectors = z.detach().movedim(1, -1).numpy()
            model.vq.codebook = torch.from_numpy(digits.first_codebook(vectors, seed))
            optimizer = torch.optim.Adam(model.parameters(), digits.RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup)
        if step >= warmup:
            # The noise is given so that Flax can be given the same; a layer draws its own.
            z, _, loss, _ = model.vq(z, noise=torch.from_numpy(noise))
        error = (model.decoder(z) - x).square().mean() + loss
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        curve.append(float(error.detach()))
        progress(step, steps, curve[-1])
    return curve


def main() -> None:
    given = digits.arguments(__doc__)
    torch.set_default_dtype(torch.float64 if given.float64 else torch.float32)
    images, _ = digits.load("float64" if given.float64 else "float32")
    # What draws at random, the first codebook and replacements, is off, for Flax draws other numbers than PyTorch.
    model = VQVAE(VectorQuantizer(digits.DIM, digits.CODES, channel_axis=1, init="normal", replace_every=0))
    model.load(digits.weights(given.seed))
    curve = train(model, images[: digits.TRAIN], given.steps, given.seed)
    digits.save(given.out, "vqvae_torch", model.weights(), model.vq, curve)

    model.eval()
    held_out = images[digits.TRAIN :]
    with torch.no_grad():
        tokens = model.vq.encode(model.encoder(torch.from_numpy(held_out)[:, None]))
        decoded = model.decoder(model.vq.decode(tokens))[:, 0].clamp(0, 1)
    digits.report(given.out, "vqvae_torch", held_out, decoded.numpy(), tokens.numpy())


if __name__ == "__main__":
    main()
