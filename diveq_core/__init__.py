"""Differentiable vector quantization for every array library."""

from diveq_core import layers
from diveq_core.arrays.backend import Backend
from diveq_core.arrays.registry import register
from diveq_core.codebook.averages import EMAState, ema_init, ema_update
from diveq_core.codebook.clustering import KMeans, kmeans, kmeans_plus_plus
from diveq_core.codebook.first_curve import curve_init
from diveq_core.codebook.linear import (
    LinearCodebook,
    linear_codebook,
    linear_codebook_init,
    linear_codebook_jvp,
    linear_codebook_vjp,
)
from diveq_core.codebook.replacement import Replaced, replace_unused
from diveq_core.curve import Projected, decode_curve, project
from diveq_core.diagnostics import coefficient, equivalent_loss, perplexity, positive_share, usage, used_share
from diveq_core.directions import nearest_cosine, normalize, normalize_jvp, normalize_vjp
from diveq_core.estimators.base import Estimator, Quantizer
from diveq_core.estimators.call import Quantized
from diveq_core.estimators.custom_radius import CustomRadius
from diveq_core.estimators.distance import NSVQ, DiVeQ, DiVeQDetach
from diveq_core.estimators.fsq import FSQ
from diveq_core.estimators.gumbel import GumbelST
from diveq_core.estimators.product import Product
from diveq_core.estimators.radial import Radial
from diveq_core.estimators.radii import Cosine, Mahalanobis, PNorm, Power, PseudoHuber, Radius
from diveq_core.estimators.residual import Residual
from diveq_core.estimators.rotation import Rotation
from diveq_core.estimators.space_filling import CurveNoise, SFDiVeQ, SFDiVeQDetach
from diveq_core.estimators.straight_through import STE
from diveq_core.layers.tokenizer import Tokenizer
from diveq_core.losses import codebook_loss, codebook_loss_vjp, commitment_loss, commitment_loss_vjp
from diveq_core.options import optional_kernels, set_optional_kernels
from diveq_core.tokens import Prepared, decode, lookup, nearest, prepare
from diveq_core.verbs import jvp, quantize, vjp

__version__ = "0.1.0"

__all__ = [
    "FSQ",
    "NSVQ",
    "STE",
    "Backend",
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
    "Prepared",
    "Product",
    "Projected",
    "PseudoHuber",
    "Quantized",
    "Quantizer",
    "Radial",
    "Radius",
    "Replaced",
    "Residual",
    "Rotation",
    "SFDiVeQ",
    "SFDiVeQDetach",
    "Tokenizer",
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
    "jvp",
    "kmeans",
    "kmeans_plus_plus",
    "layers",
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
    "prepare",
    "project",
    "quantize",
    "register",
    "replace_unused",
    "set_optional_kernels",
    "usage",
    "used_share",
    "vjp",
]
