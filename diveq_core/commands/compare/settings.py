"""The options of one comparison, checked before anything is read or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.commands.compare.recipes import DEFAULT, RECIPES
from diveq_core.commands.terminal import UsageError, check_integer

if TYPE_CHECKING:
    from collections.abc import Iterable


class CompareError(UsageError):
    """A comparison that cannot be made as asked for."""


@dataclass(frozen=True)
class Settings:
    """What to train, and for how long.

    Parameters
    ----------
    estimators : tuple of str
        Names from `diveq_core.commands.compare.recipes.RECIPES`, or "all".
    codewords, dim, patch : int
        Size K of the codebook, dimension D of a codeword, side of a patch in pixels.
    width : int
        Hidden units of encoder and decoder.
    warmup : int
        Steps without quantization before codewords are taken from the encoder's outputs.
    steps, batch : int
        Steps with quantization, and patches in each.
    seeds, seed : int
        Number of repetitions, and the first seed.
    learning_rate : float
        Adam's; it falls to zero along a half cosine once codewords exist.
    replace : bool
        Whether to replace unused codewords.
    replace_every : int
        After how many steps each.
    """

    estimators: tuple[str, ...] = DEFAULT
    codewords: int = 256
    dim: int = 8
    patch: int = 4
    width: int = 64
    warmup: int = 200
    steps: int = 1000
    batch: int = 256
    seeds: int = 3
    seed: int = 0
    learning_rate: float = 2e-3
    replace: bool = False
    replace_every: int = 50

    def __post_init__(self) -> None:
        for name in ("codewords", "dim", "patch", "width", "steps", "batch", "seeds", "replace_every"):
            check_integer(CompareError, name, getattr(self, name), 1)
        check_integer(CompareError, "warmup", self.warmup, 0)
        check_integer(CompareError, "seed", self.seed, 0, below=None)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise CompareError(f"--learning-rate must be a finite number > 0, got {self.learning_rate}")
        object.__setattr__(self, "estimators", chosen_estimators(self.estimators))
        for name in self.estimators:
            try:
                RECIPES[name].sized(self.codewords, self.dim)
            except ValueError as error:
                raise CompareError(f"{error} (--estimators {name})") from None


def chosen_estimators(names: Iterable[str]) -> tuple[str, ...]:
    """Names of recipes in the order given, split at commas, each once; "all" names every one.

    Raises
    ------
    CompareError
        If a name is unknown or none is given.
    """
    chosen = [name.strip().lower() for given in names for name in given.split(",") if name.strip()]
    chosen = [each for name in chosen for each in (RECIPES if name == "all" else [name])]
    for name in chosen:
        if name not in RECIPES:
            raise CompareError(f"--estimators must be among all, {', '.join(RECIPES)}, got {name!r}")
    if not chosen:
        raise CompareError(f"--estimators must name at least one of {', '.join(RECIPES)}, got none")
    return tuple(dict.fromkeys(chosen))
