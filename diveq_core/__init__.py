"""Differentiable vector quantization for every array library."""

from diveq_core.backend import Backend
from diveq_core.compose import Composite, Product, Residual
from diveq_core.diagnostics import coefficient, equivalent_loss, perplexity, positive_share, usage, used_share
from diveq_core.estimators import NSVQ, STE, DiVeQ, DiVeQDetach, Estimator, Radial
from diveq_core.quantize import Quantized, decode, jvp, lookup, nearest, quantize, vjp
from diveq_core.radius import Cosine, CustomRadius, Mahalanobis, PNorm, Power, PseudoHuber, Radius
from diveq_core.registry import register
from diveq_core.rotation import Rotation

__version__ = "0.1.0"

__all__ = [
    "NSVQ",
    "STE",
    "Backend",
    "Composite",
    "Cosine",
    "CustomRadius",
    "DiVeQ",
    "DiVeQDetach",
    "Estimator",
    "Mahalanobis",
    "PNorm",
    "Power",
    "Product",
    "PseudoHuber",
    "Quantized",
    "Radial",
    "Radius",
    "Residual",
    "Rotation",
    "coefficient",
    "decode",
    "equivalent_loss",
    "jvp",
    "lookup",
    "nearest",
    "perplexity",
    "positive_share",
    "quantize",
    "register",
    "usage",
    "used_share",
    "vjp",
]
