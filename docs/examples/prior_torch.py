"""A transformer in PyTorch that writes digits, token by token, in the codebook of a trained VQ-VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import digits
from common import ends, options, parsed, progress, table
from diveq_torch import VectorQuantizer
from vqvae_torch import VQVAE

LENGTH = digits.SIDE**2
KINDS = 10
BATCH = 32


class Prior(nn.Module):
    """Of each token the logits, given those before it and which digit it is to be."""

    def __init__(self, width: int = 128, layers: int = 3, dropout: float = 0.05) -> None:
        super().__init__()
        # Of the tokens up to the last but one, and of a start before them.
        self.inputs = nn.Embedding(digits.CODES + 1, width)
        self.kinds = nn.Embedding(KINDS, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.logits = nn.Linear(width, digits.CODES)

    def forward(self, kinds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        start = torch.full_like(kinds[:, None], digits.CODES)
        given = torch.cat([start, tokens], dim=1)[:, :LENGTH]
        before = nn.Transformer.generate_square_subsequent_mask(given.shape[1])
        x = self.inputs(given) + self.kinds(kinds)[:, None] + self.places[: given.shape[1]]
        return self.logits(self.layers(x, mask=before, is_causal=True))

    @torch.no_grad()
    def sample(self, kinds: torch.Tensor, temperature: float) -> torch.Tensor:
        """Tokens (B, 49), each drawn after those before it."""
        tokens = torch.empty(len(kinds), 0, dtype=torch.int64)
        for _ in range(LENGTH):
            odds = (self(kinds, tokens)[:, -1] / temperature).softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(odds, 1)], dim=1)
        return tokens


def loss_of(prior: Prior, kinds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of a token, in nats."""
    return cross_entropy(prior(kinds, tokens).flatten(0, 1), tokens.flatten())


def train(prior: Prior, kinds: torch.Tensor, tokens: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(prior.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    curve = []
    for step in range(steps):
        chosen = torch.randint(len(tokens), (BATCH,))
        loss = loss_of(prior, kinds[chosen], tokens[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(float(loss.detach()))
        progress(step, steps, curve[-1])
    return curve


def picture(path: Path, images: np.ndarray, samples: np.ndarray) -> None:
    """Images and samples, (rows, 10, 28, 28) each, beside each other."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    for axes, x, title in zip(figure.subplots(1, 2), (images, samples), ("Data", "Samples"), strict=True):
        axes.imshow(np.concatenate(np.concatenate(list(x), axis=1), axis=1), "gray_r", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def reader(images: np.ndarray, kinds: np.ndarray) -> Any:
    """A judge of digits, which says what share of other images are what they should be."""
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(3).fit(images.reshape(len(images), -1), kinds)
    return lambda others, theirs: nearest.score(others.reshape(len(others), -1), theirs)


def main() -> None:
    parser = options(__doc__, steps=1200, out="prior")
    parser.add_argument("--model", type=Path, default="vqvae/vqvae_torch", help="what vqvae_torch.py or _flax.py saved")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 likelier tokens are drawn more often")
    parser.add_argument("--samples", type=int, default=20, help="of each digit")
    given = parsed(parser)
    if not given.model.with_suffix(".npz").exists():
        parser.error(f"--model: there is no {given.model}.npz; run vqvae_torch.py or vqvae_flax.py first")
    torch.manual_seed(given.seed)

    # Channels are first in PyTorch, and last in what Flax wrote.
    vq = VectorQuantizer.load(given.model.with_suffix(".safetensors"), channel_axis=1, dtype=torch.float32)
    model = VQVAE(vq).eval()
    model.load(digits.read(given.model.with_suffix(".npz")))
    images, kinds = digits.load()
    with torch.no_grad():
        tokens = model.vq.encode(model.encoder(torch.from_numpy(images)[:, None])).flatten(1)
    names, held_out = torch.from_numpy(kinds), slice(digits.TRAIN, None)

    prior = Prior()
    curve = train(prior, names[: digits.TRAIN], tokens[: digits.TRAIN], given.steps)
    prior.eval()
    wanted = torch.arange(KINDS).repeat(given.samples)
    with torch.no_grad():
        unseen = float(loss_of(prior, names[held_out], tokens[held_out]))
        drawn = prior.sample(wanted, given.temperature).unflatten(1, (digits.SIDE, digits.SIDE))
        samples = model.decoder(model.vq.decode(drawn))[:, 0].clamp(0, 1).numpy()

    shown = np.stack([images[held_out][kinds[held_out] == kind][:8] for kind in range(KINDS)], axis=1)
    picture(given.out / "prior.png", shown, samples.reshape(-1, KINDS, 28, 28)[:8])
    read = reader(images[: digits.TRAIN], kinds[: digits.TRAIN])
    table(
        [
            ends(curve),
            ("loss, held out", f"{unseen:.4f} nats per token, {np.log(digits.CODES):.4f} at random"),
            ("read as what they are, held-out digits", f"{read(images[held_out], kinds[held_out]):.0%}"),
            ("read as what was asked for, samples", f"{read(samples, wanted):.0%}"),
        ],
        given.out / "prior.png",
    )


if __name__ == "__main__":
    main()
