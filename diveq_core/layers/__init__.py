"""Layers: the logic of a trained quantizer in a model, once for all frameworks, as pure functions of arrays.

`forward` quantizes and changes nothing; `update` takes its statistics when the gradient has been computed. The layers
in ``backends/`` hold the arrays where their framework holds state, and call these.
"""

from diveq_core.layers.adam import Moments, adam, no_moments
from diveq_core.layers.beginning import init, noise_size, start
from diveq_core.layers.layer import Layer, Quantization
from diveq_core.layers.results import Forward, Losses, Point, Statistics, added
from diveq_core.layers.settings import Settings
from diveq_core.layers.step import decode, encode, forward, forward_vjp, perplexity, usage
from diveq_core.layers.tokenizer import Tokenizer
from diveq_core.layers.upkeep import update

__all__ = [
    "Forward",
    "Layer",
    "Losses",
    "Moments",
    "Point",
    "Quantization",
    "Settings",
    "Statistics",
    "Tokenizer",
    "adam",
    "added",
    "decode",
    "encode",
    "forward",
    "forward_vjp",
    "init",
    "no_moments",
    "noise_size",
    "perplexity",
    "start",
    "update",
    "usage",
]
