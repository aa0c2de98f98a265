"""What the tables of capabilities try: every public call, as functions that any array library can be given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq

if TYPE_CHECKING:
    from collections.abc import Callable

N, K, D = 5, 6, 4
LEVELS = (5, 4, 7, 3)


@dataclass(frozen=True)
class Row:
    """A public call and what belongs to it; every function takes the row's inputs, arrays of one library."""

    draw: Callable[[np.random.Generator], list[np.ndarray]]
    """The inputs, by NumPy; the noise is among them."""

    forward: Callable[..., Any]
    """One array or several; derivatives are those of the first."""

    vjp: Callable[..., Any] | None = None
    """What comes first is ignored, then the pullback to ``to``."""

    jvp: Callable[..., Any] | None = None
    """Takes the tangents of ``to`` after the inputs; the last that it gives is the tangent."""

    decode: Callable[..., Any] | None = None
    """Takes the inputs; again one array or several."""

    gradient: Callable[..., Any] | None = None
    """Gradients to ``to`` in NumPy, where automatic differentiation has no explicit verb beside it."""

    to: tuple[int, ...] = (0,)
    """Which inputs are differentiated."""

    # Two float32 computations of some tens of operations on numbers of order one.
    rtol: float = 1e-5
    atol: float = 1e-5


def listed(found: Any) -> list[Any]:
    """The arrays in one array or in a tuple of them."""
    return list(found) if isinstance(found, tuple) else [found]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Estimation(Row):
    """A row for an estimator: the inputs are z, the codebook and the noise."""

    pack: Any = None
    """The noise as `quantize` takes it, from the inputs after the first two."""

    noise_axes: tuple[int | None, ...] = (0,)
    """Along which axis of each noise the vectors lie."""


def estimation(estimator: Any, words: tuple[int, ...] = (K, D), **options: Any) -> Estimation:
    """The row of an estimator, its noise as it takes it."""
    pack, axes, shapes = (lambda noise: noise), (0,), [(N, D)]
    if isinstance(estimator, (dq.SFDiVeQ, dq.SFDiVeQDetach)):
        pack, axes, shapes = dq.CurveNoise, (None, 1), [(2, N, D)]
    elif isinstance(estimator, dq.Residual):
        axes, shapes = (1,), [(2, N, D)]

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        dither = [rng.random(K - 1, dtype=np.float32)] if pack is dq.CurveNoise else []
        return [normal(rng, N, D), normal(rng, *words), *dither, *(normal(rng, *shape) for shape in shapes)]

    def forward(z: Any, codebook: Any, *noise: Any) -> Any:
        return tuple(dq.quantize(z, codebook, estimator, noise=pack(*noise)))

    def vjp(z: Any, codebook: Any, *noise: Any) -> Any:
        return dq.vjp(z, codebook, estimator, noise=pack(*noise))

    def jvp(z: Any, codebook: Any, *others: Any) -> Any:
        *noise, dz, dcodebook = others
        return dq.jvp(z, codebook, dz, dcodebook, estimator, noise=pack(*noise))

    def decode(z: Any, codebook: Any, *noise: Any) -> Any:
        return dq.decode(dq.quantize(z, codebook, estimator, noise=pack(*noise)).indices, codebook, estimator)

    curve = pack is dq.CurveNoise
    return Estimation(
        draw, forward, vjp, jvp, None if curve else decode, to=(0, 1), pack=pack, noise_axes=axes, **options
    )


def _quadratic(q: Any, z: Any) -> Any:
    d = q - z
    return 1 + sum(d[..., j] ** 2 for j in range(D))


def _quadratic_gradients(q: Any, z: Any) -> tuple[Any, Any]:
    slope = 2 * (q - z) / _quadratic(q, z)[..., None]
    return slope, -slope


ESTIMATORS: dict[str, Estimation] = {
    "STE()": estimation(dq.STE()),
    "NSVQ()": estimation(dq.NSVQ()),
    "DiVeQ()": estimation(dq.DiVeQ()),
    "DiVeQDetach()": estimation(dq.DiVeQDetach()),
    "Radial(Power(2))": estimation(dq.Radial(dq.Power(2.0))),
    "Radial(PseudoHuber())": estimation(dq.Radial(dq.PseudoHuber())),
    "Radial(PNorm(3))": estimation(dq.Radial(dq.PNorm(3.0))),
    "Radial(Mahalanobis(M))": estimation(dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0, 4.0])))),
    # The cosine of almost parallel vectors loses two digits.
    "Radial(Cosine())": estimation(dq.Radial(dq.Cosine()), rtol=1e-3, atol=1e-4),
    "Radial(CustomRadius(r, gradients))": estimation(dq.Radial(dq.CustomRadius(_quadratic, _quadratic_gradients))),
    "Rotation()": estimation(dq.Rotation()),
    "SFDiVeQ()": estimation(dq.SFDiVeQ()),
    "SFDiVeQDetach()": estimation(dq.SFDiVeQDetach()),
    "Residual(DiVeQ(), 2)": estimation(dq.Residual(dq.DiVeQ(), 2), (2, K, D)),
    "Product(DiVeQ(), 2)": estimation(dq.Product(dq.DiVeQ(), 2), (2, K, D // 2)),
}


def _gumbel(rng: np.random.Generator) -> list[np.ndarray]:
    return [normal(rng, N, K), normal(rng, K, D), rng.gumbel(size=(N, K)).astype(np.float32)]


_ST = dq.GumbelST(0.7)


def _pair(rng: np.random.Generator) -> list[np.ndarray]:
    return [normal(rng, N, D), normal(rng, K, D)]


def _chosen(rng: np.random.Generator) -> list[np.ndarray]:
    """Vectors, a codebook, and the choice."""
    z, codebook = _pair(rng)
    return [z, codebook, dq.nearest(z, codebook)]


def _masked(rng: np.random.Generator) -> list[np.ndarray]:
    return [*_chosen(rng), np.arange(N) != 2]


def _of_chosen(rng: np.random.Generator) -> list[np.ndarray]:
    """A cotangent, vectors, and their codewords."""
    z, codebook, indices = _chosen(rng)
    return [normal(rng, N, D), z, dq.lookup(indices, codebook)]


def _cluster(rng: np.random.Generator) -> list[np.ndarray]:
    return [normal(rng, 40, D), normal(rng, K, 2 + int(math.log(K)), 2)]


def _unused(rng: np.random.Generator) -> list[np.ndarray]:
    return [normal(rng, K, D), np.array([3, 0, 5, 1, 0, 2], np.float32), normal(rng, K, D + 2), normal(rng, N, D)]


def _counts(rng: np.random.Generator) -> list[np.ndarray]:
    return [np.array([3, 0, 5, 1, 0, 2], np.float32)]


def _auxiliary(g: np.ndarray, z: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the radial estimator's gradients have beyond straight-through."""
    g_z, g_q = dq.vjp(z, q, dq.Radial(dq.Power(3.0)), indices=np.arange(N))[1](g)
    return g_z - g, g_q


def _to_z(out: Any, pullback: Any) -> tuple[Any, Any]:
    """Where there is no codebook, the pullback to the vectors alone."""
    return out, lambda g: pullback(g)[0]


OTHERS: dict[str, Row] = {
    "FSQ": Row(
        lambda rng: [normal(rng, N, D)],
        lambda z: tuple(dq.quantize(z, None, dq.FSQ(LEVELS))),
        lambda z: _to_z(*dq.vjp(z, None, dq.FSQ(LEVELS))),
        lambda z, dz: dq.jvp(z, None, dz, None, dq.FSQ(LEVELS)),
        lambda z: dq.decode(dq.quantize(z, None, dq.FSQ(LEVELS)).indices, None, dq.FSQ(LEVELS)),
    ),
    "GumbelST()": Row(
        _gumbel,
        lambda logits, codebook, noise: tuple(dq.quantize(logits, codebook, _ST, noise=noise)),
        lambda logits, codebook, noise: dq.vjp(logits, codebook, _ST, noise=noise),
        lambda logits, codebook, noise, *tangents: dq.jvp(logits, codebook, *tangents, _ST, noise=noise),
        to=(0, 1),
    ),
    "codebook_loss": Row(
        _masked,
        lambda z, codebook, indices, mask: dq.codebook_loss(z, codebook, indices, mask=mask),
        lambda z, codebook, indices, mask: dq.codebook_loss_vjp(z, codebook, indices, mask=mask),
        to=(1,),
    ),
    "commitment_loss": Row(
        _masked,
        lambda z, codebook, indices, mask: dq.commitment_loss(z, codebook, indices, mask=mask),
        lambda z, codebook, indices, mask: dq.commitment_loss_vjp(z, codebook, indices, mask=mask),
    ),
    "linear_codebook_init": Row(
        lambda rng: [normal(rng, N, D), normal(rng, K, D)],
        lambda z, noise: tuple(dq.linear_codebook_init(z, K, noise=noise)),
    ),
    "linear_codebook": Row(
        lambda rng: [normal(rng, K, D), normal(rng, D, D)],
        lambda *factors: dq.linear_codebook(factors),
        lambda *factors: dq.linear_codebook_vjp(factors),
        lambda e, w, de, dw: dq.linear_codebook_jvp((e, w), (de, dw)),
        to=(0, 1),
    ),
    "normalize": Row(lambda rng: [normal(rng, N, D)], dq.normalize, dq.normalize_vjp, dq.normalize_jvp),
    "nearest": Row(_pair, dq.nearest),
    "prepare": Row(_pair, lambda z, codebook: dq.nearest(z, dq.prepare(codebook))),
    "lookup": Row(_chosen, lambda z, codebook, indices: dq.lookup(indices, codebook)),
    "nearest_cosine": Row(_pair, dq.nearest_cosine),
    "project, decode_curve": Row(
        _pair,
        lambda z, codebook: tuple(dq.project(z, codebook)),
        decode=lambda z, codebook: dq.decode_curve(*dq.project(z, codebook)[1:], codebook),
    ),
    "Tokenizer": Row(
        _pair,
        lambda z, codebook: dq.lookup(dq.Tokenizer(codebook).encode(z), codebook),
        decode=lambda z, codebook: (lambda tokenizer: tokenizer.decode(tokenizer.encode(z)))(dq.Tokenizer(codebook)),
    ),
    "curve_init": Row(_cluster, lambda z, noise: dq.curve_init(z, K, noise=noise)),
    "kmeans": Row(_cluster, lambda z, noise: tuple(dq.kmeans(z, K, noise=noise))),
    "kmeans_plus_plus": Row(_cluster, lambda z, noise: dq.kmeans_plus_plus(z, K, noise=noise)),
    "ema_init": Row(_pair, lambda z, codebook: tuple(dq.ema_init(codebook, weight=2.0))),
    "ema_update": Row(
        _chosen,
        lambda z, codebook, indices: (lambda state, moved: (moved, *state))(
            *dq.ema_update(dq.ema_init(codebook, weight=2.0), z, codebook, indices, decay=0.9)
        ),
    ),
    "replace_unused": Row(
        _unused,
        lambda codebook, counts, noise, z: tuple(
            x
            for vectors in (None, z)
            for x in dq.replace_unused(codebook, counts, z=vectors, noise=noise)
            if x is not None
        ),
    ),
    "coefficient": Row(_of_chosen, dq.coefficient),
    "positive_share": Row(_of_chosen, dq.positive_share),
    "equivalent_loss": Row(
        _of_chosen,
        lambda g, z, q: dq.equivalent_loss(g, z, q, dq.Power(3.0)),
        gradient=_auxiliary,
        to=(1, 2),
    ),
    "usage": Row(_chosen, lambda z, codebook, indices: dq.usage(indices, K)),
    "perplexity": Row(_counts, dq.perplexity),
    "used_share": Row(_counts, dq.used_share),
}

ROWS: dict[str, Row] = {**ESTIMATORS, **OTHERS}
