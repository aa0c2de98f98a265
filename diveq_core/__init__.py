"""Differentiable vector quantization for every array library."""

from diveq_core.backend import Backend
from diveq_core.compose import Composite, Product, Residual
from diveq_core.curve import Projected, decode_curve, project
from diveq_core.diagnostics import coefficient, equivalent_loss, perplexity, positive_share, usage, used_share
from diveq_core.estimators import NSVQ, STE, DiVeQ, DiVeQDetach, Estimator, Radial
from diveq_core.losses import codebook_loss, codebook_loss_vjp, commitment_loss, commitment_loss_vjp
from diveq_core.quantize import Quantized, decode, jvp, lookup, nearest, quantize, vjp
from diveq_core.radius import Cosine, CustomRadius, Mahalanobis, PNorm, Power, PseudoHuber, Radius
from diveq_core.registry import register
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
    "Estimator",
    "Mahalanobis",
    "PNorm",
    "Power",
    "Product",
    "Projected",
    "PseudoHuber",
    "Quantized",
    "Radial",
    "Radius",
    "Residual",
    "Rotation",
    "SFDiVeQ",
    "SFDiVeQDetach",
    "codebook_loss",
    "codebook_loss_vjp",
    "coefficient",
    "commitment_loss",
    "commitment_loss_vjp",
    "decode",
    "decode_curve",
    "equivalent_loss",
    "jvp",
    "lookup",
    "nearest",
    "perplexity",
    "positive_share",
    "project",
    "quantize",
    "register",
    "usage",
    "used_share",
    "vjp",
]
