"""A VQGAN in PyTorch on photographs: a VQ-VAE whose decoder also has to deceive a critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import relu

import diveq_core as dq
from common import ends, missing, options, parsed, progress, psnr, table
from diveq_torch import VectorQuantizer

DIM, CODES = 8, 512
CROP, BATCH = 64, 8
"""Side of the crops, and crops of a step."""


class Block(nn.Module):
    """Two convolutions, whose result is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), first, nn.SiLU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Generator(nn.Module):
    """Images (B, 3, H, W) to tokens (B, H / 4, W / 4) and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.PixelUnshuffle(2), nn.Conv2d(12, 32, 3, padding=1), Block(32)),
            *(nn.Conv2d(32, 64, 4, stride=2, padding=1), Block(64), nn.Conv2d(64, DIM, 1)),
        )
        self.vq = VectorQuantizer(DIM, CODES, channel_axis=1)
        self.decoder = nn.Sequential(
            *(nn.Conv2d(DIM, 64, 3, padding=1), Block(64), nn.Conv2d(64, 128, 1), nn.PixelShuffle(2)),
            *(Block(32), nn.SiLU()),
        )
        self.last = nn.Conv2d(32, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        out = self.vq(self.encoder(x))
        return torch.pixel_shuffle(self.last(self.decoder(out.z_q)), 2), out


def discriminator() -> nn.Sequential:
    """Of each patch how real it looks."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2)),
        nn.Conv2d(64, 1, 4, padding=1),
    )


def adaptive(distance: torch.Tensor, deceit: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The weight at which both losses pull alike on the last layer: Esser et al., arXiv:2012.09841, equation 7."""
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (distance, deceit)]
    return (pulls[0] / (pulls[1] + 1e-4)).clamp(max=10).detach()


def crops(photographs: list[torch.Tensor], rng: np.random.Generator) -> torch.Tensor:
    """A batch (8, 3, 64, 64), half of it mirrored."""
    chosen = []
    for _ in range(BATCH):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(size - CROP + 1) for size in photograph.shape[1:])
        chosen.append(photograph[:, top : top + CROP, left : left + CROP])
    return torch.stack([x.flip(2) if rng.random() < 0.5 else x for x in chosen])


def load() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Six photographs to train on, and a cat; (3, H, W) from -1 to 1."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise missing("scikit-image and scikit-learn") from error
    found = [data.astronaut(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0], *load_sample_images().images]
    *rest, cat = (torch.from_numpy(x / np.float32(127.5) - 1).permute(2, 0, 1) for x in (*found, data.chelsea()))
    return rest, cat[:, :300, :448]


def train(generator: Generator, photographs: list[torch.Tensor], given: Any) -> tuple[Generator, list[float]]:
    """The generator as it was when the critic came in, and the distance of each step."""
    critic = discriminator()
    of_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.9))
    of_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    rng, before, curve = np.random.default_rng(given.seed), Generator(), []
    for step in range(given.steps):
        x = crops(photographs, rng)
        y, out = generator(x)
        loss = distance = (y - x).abs().mean()
        if step == given.steps // 2:
            before.load_state_dict(generator.state_dict())
        if step >= given.steps // 2:
            deceit = -critic(y).mean()
            loss = loss + given.adversary * adaptive(distance, deceit, generator.last.weight) * deceit
        of_generator.zero_grad()
        (loss + out.loss).backward()
        of_generator.step()
        if step >= given.steps // 2:
            judged = relu(1 - critic(x)).mean() + relu(1 + critic(y.detach())).mean()
            of_critic.zero_grad()
            judged.backward()
            of_critic.step()
        curve.append(float(distance.detach()))
        progress(step, given.steps, curve[-1])
    return before, curve


@torch.no_grad()
def through_tokens(generator: Generator, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """An image from 0 to 1, (H, W, 3), and its tokens."""
    y, out = generator.eval()(image[None])
    return seen(y[0]), out.indices.numpy()


def seen(image: torch.Tensor) -> np.ndarray:
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def sharpness(image: np.ndarray) -> float:
    """The mean difference of neighbouring pixels."""
    return float(np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean())


def picture(path: Path, images: dict[str, np.ndarray]) -> None:
    """Whole images, and below what is in their middle, as it is and enlarged."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.6), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(2, len(images)).T, images.items(), strict=True):
        axes[0].imshow(image)
        axes[0].set(title=title)
        axes[1].imshow(image[60:160, 130:280], interpolation="nearest")
        for each in axes:
            each.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = options(__doc__, steps=800, out="vqgan")
    parser.add_argument("--adversary", type=float, default=0.3, help="weight of the critic, in the second half")
    given = parsed(parser)
    torch.manual_seed(given.seed)
    photographs, cat = load()
    generator = Generator()
    before, curve = train(generator, photographs, given)

    original = seen(cat)
    (blurred, _), (sharp, tokens) = through_tokens(before, cat), through_tokens(generator, cat)
    usage = dq.usage(tokens, CODES)
    picture(
        given.out / "vqgan.png",
        {"Held-out photograph": original, "Decoded, without critic": blurred, "Decoded, with critic": sharp},
    )
    table(
        [
            ends(curve),
            ("PSNR, without and with critic", f"{psnr(original, blurred):.2f}, {psnr(original, sharp):.2f} dB"),
            ("sharpness, original and these", ", ".join(f"{sharpness(x):.4f}" for x in (original, blurred, sharp))),
            ("codewords used", f"{np.count_nonzero(usage)} of {CODES}, perplexity {float(dq.perplexity(usage)):.0f}"),
        ],
        given.out / "vqgan.png",
    )


if __name__ == "__main__":
    main()
