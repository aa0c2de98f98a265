"""What is compared: each recipe is an estimator and the weights of its auxiliary losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.estimators import NSVQ, STE, DiVeQ, DiVeQDetach, Radial
from diveq_core.radius import Power

if TYPE_CHECKING:
    from diveq_core.estimators import Estimator


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Parameters
    ----------
    label : str
        Name in the table and the picture.
    estimator : Estimator or None
        None trains the autoencoder without a quantizer.
    codebook_weight, commitment_weight : float
        Weights of the losses that move codewords to vectors, and vectors to codewords.
    """

    label: str
    estimator: Estimator | None
    codebook_weight: float = 0.0
    commitment_weight: float = 0.0

    @property
    def noisy(self) -> bool:
        """Whether training draws noise."""
        return self.estimator is not None and self.estimator.noisy


RECIPES: dict[str, Recipe] = {
    "unquantized": Recipe("Unquantized", None),
    "vq-vae": Recipe("VQ-VAE (STE + losses)", STE(), codebook_weight=1.0, commitment_weight=0.25),
    "ste": Recipe("STE alone", STE()),
    "nsvq": Recipe("NSVQ", NSVQ()),
    "diveq": Recipe("DiVeQ", DiVeQ()),
    "diveq-detach": Recipe("DiVeQ-detach", DiVeQDetach()),
    "radial-0.5": Recipe("Radial, α = 0.5", Radial(Power(0.5))),
    "radial-2": Recipe("Radial, α = 2", Radial(Power(2.0))),
}
