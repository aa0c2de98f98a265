"""Differentiable vector quantization for every array library."""

from diveq_core.backend import Backend
from diveq_core.call import Quantized
from diveq_core.codebook import EMAState, ema_init, ema_update
from diveq_core.compose import Composite
from diveq_core.cosine import nearest_cosine, normalize, normalize_jvp, normalize_vjp
from diveq_core.curve import Projected, decode_curve, project
from diveq_core.curve_init import curve_init
from diveq_core.custom_radius import CustomRadius
from diveq_core.decoding import decode, lookup
from diveq_core.diagnostics import coefficient, equivalent_loss, perplexity, positive_share, usage, used_share
from diveq_core.estimators import NSVQ, STE, DiVeQ, DiVeQDetach, Estimator, Radial
from diveq_core.fsq import fsq, fsq_decode, fsq_jvp, fsq_vjp
from diveq_core.gumbel import GumbelST, gumbel_jvp, gumbel_quantize, gumbel_vjp
from diveq_core.kmeans import KMeans, kmeans, kmeans_plus_plus
from diveq_core.linear import (
    LinearCodebook,
    linear_codebook,
    linear_codebook_init,
    linear_codebook_jvp,
    linear_codebook_vjp,
)
from diveq_core.losses import codebook_loss, codebook_loss_vjp, commitment_loss, commitment_loss_vjp
from diveq_core.options import optional_kernels, set_optional_kernels
from diveq_core.product import Product
from diveq_core.quantize import jvp, nearest, quantize, vjp
from diveq_core.radius import Cosine, Mahalanobis, PNorm, Power, PseudoHuber, Radius
from diveq_core.registry import register
from diveq_core.replacement import Replaced, replace_unused
from diveq_core.residual import Residual
from diveq_core.rotation import Rotation
from diveq_core.space_filling import CurveNoise, SFDiVeQ, SFDiVeQDetach

__version__ = "0.1.0"

__all__ = [
    "NSVQ",
    "STE",
    "Backend",
    "Composite",
    "Cosine",
    "CurveNoise",
    "CustomRadius",
    "DiVeQ",
    "DiVeQDetach",
    "EMAState",
    "Estimator",
    "GumbelST",
    "KMeans",
    "LinearCodebook",
    "Mahalanobis",
    "PNorm",
    "Power",
    "Product",
    "Projected",
    "PseudoHuber",
    "Quantized",
    "Radial",
    "Radius",
    "Replaced",
    "Residual",
    "Rotation",
    "SFDiVeQ",
    "SFDiVeQDetach",
    "codebook_loss",
    "codebook_loss_vjp",
    "coefficient",
    "commitment_loss",
    "commitment_loss_vjp",
    "curve_init",
    "decode",
    "decode_curve",
    "ema_init",
    "ema_update",
    "equivalent_loss",
    "fsq",
    "fsq_decode",
    "fsq_jvp",
    "fsq_vjp",
    "gumbel_jvp",
    "gumbel_quantize",
    "gumbel_vjp",
    "jvp",
    "kmeans",
    "kmeans_plus_plus",
    "linear_codebook",
    "linear_codebook_init",
    "linear_codebook_jvp",
    "linear_codebook_vjp",
    "lookup",
    "nearest",
    "nearest_cosine",
    "normalize",
    "normalize_jvp",
    "normalize_vjp",
    "optional_kernels",
    "perplexity",
    "positive_share",
    "project",
    "quantize",
    "register",
    "replace_unused",
    "set_optional_kernels",
    "usage",
    "used_share",
    "vjp",
]
