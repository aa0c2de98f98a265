"""What is compared: each recipe is a quantizer and the weights of its auxiliary losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from diveq_core.commands.compare.composed import InGroups, InStages
from diveq_core.commands.compare.quantizers import Averaged, Codebook, Curve, Linear, Quantizer
from diveq_core.commands.compare.scalar import Scalar
from diveq_core.commands.compare.softmax import Drawn
from diveq_core.estimators.distance import NSVQ, DiVeQ, DiVeQDetach
from diveq_core.estimators.gumbel import GumbelST
from diveq_core.estimators.radial import Radial
from diveq_core.estimators.radii import Power
from diveq_core.estimators.rotation import Rotation
from diveq_core.estimators.space_filling import SFDiVeQ, SFDiVeQDetach
from diveq_core.estimators.straight_through import STE


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Parameters
    ----------
    label : str
        Name in the table and the picture.
    quantizer : Quantizer or None
        None trains the autoencoder without a quantizer.
    codebook_weight, commitment_weight : float
        Weights of the losses that move codewords to vectors, and vectors to codewords.
    """

    label: str
    quantizer: Quantizer | None
    codebook_weight: float = 0.0
    commitment_weight: float = 0.0

    def sized(self, codewords: int, dim: int) -> Recipe:
        """The recipe with its quantizer's number of codes as near to K as it can be; ValueError if it cannot."""
        return (
            self
            if self.quantizer is None
            else dataclasses.replace(self, quantizer=self.quantizer.sized(codewords, dim))
        )


RECIPES: dict[str, Recipe] = {
    "unquantized": Recipe("Unquantized", None),
    "vq-vae": Recipe("VQ-VAE (STE + losses)", Codebook(STE()), codebook_weight=1.0, commitment_weight=0.25),
    "ste": Recipe("STE alone", Codebook(STE())),
    "nsvq": Recipe("NSVQ", Codebook(NSVQ())),
    "diveq": Recipe("DiVeQ", Codebook(DiVeQ())),
    "diveq-detach": Recipe("DiVeQ-detach", Codebook(DiVeQDetach())),
    "radial-0.5": Recipe("Radial, α = 0.5", Codebook(Radial(Power(0.5)))),
    "radial-2": Recipe("Radial, α = 2", Codebook(Radial(Power(2.0)))),
    "ema": Recipe("EMA (STE + commitment)", Averaged(STE()), commitment_weight=0.25),
    "rotation": Recipe("Rotation (+ losses)", Codebook(Rotation()), codebook_weight=1.0, commitment_weight=0.25),
    "linear": Recipe("DiVeQ, linear codebook", Linear(DiVeQ())),
    "sf-diveq": Recipe("SF-DiVeQ", Curve(SFDiVeQ())),
    "sf-diveq-detach": Recipe("SF-DiVeQ-detach", Curve(SFDiVeQDetach())),
    "residual": Recipe("DiVeQ, residual", InStages(DiVeQ())),
    "product": Recipe("DiVeQ, product", InGroups(DiVeQ())),
    "fsq": Recipe("FSQ", Scalar()),
    "gumbel": Recipe("Gumbel-softmax, ST", Drawn(STE(), GumbelST(temperature=1.0))),
}

DEFAULT = ("unquantized", "vq-vae", "ste", "nsvq", "diveq", "diveq-detach", "radial-0.5", "radial-2")
"""What is compared unless told otherwise."""
