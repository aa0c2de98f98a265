"""Training one recipe from one seed: a pure step, and the loop that feeds it.

All random numbers are drawn by NumPy on the host, so every library sees the same; and from streams that do not
depend on the recipe, so every recipe sees the same patches in the same order.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.compare.autoencoder import initial_parameters, loss_and_gradients
from diveq_core.commands.compare.evaluation import Scores, curve_error, evaluate
from diveq_core.commands.compare.layers import perceptron
from diveq_core.commands.compare.recipes import RECIPES, Recipe
from diveq_core.commands.compare.replacement import noise_shape, replace
from diveq_core.layers.adam import Moments, adam, no_moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.commands.compare.libraries import Library
    from diveq_core.commands.compare.patches import Patches
    from diveq_core.commands.compare.quantizers import Arrays
    from diveq_core.commands.compare.settings import Settings

POINTS = 40
"""Points on a loss curve, at most."""


@dataclass(frozen=True)
class Run:
    """One recipe trained from one seed."""

    name: str
    seed: int
    scores: Scores
    curve: list[tuple[int, float]]
    """Step, and held-out mean squared error through the codes."""

    seconds: float
    """Of training alone, evaluation not included."""

    @property
    def diverged(self) -> bool:
        """Whether training ended in numbers that are not finite."""
        return not math.isfinite(self.scores.error)


def training_step(
    parameters: Arrays, moments: Moments, x: Array, noise: Arrays, rate: float, recipe: Recipe, counting: bool = False
) -> tuple[Arrays, Moments, Array, Array | None]:
    """One step of Adam on one batch; a pure function. Also the loss, and how often codewords were used if asked."""
    quantizer = recipe.quantizer
    loss, gradients, z, indices = loss_and_gradients(parameters, x, noise, recipe)
    parameters, moments = adam(parameters, gradients, moments, rate)
    if quantizer is None or indices is None:
        return parameters, moments, loss, None
    counts = quantizer.counts(parameters, indices) if counting else None
    return quantizer.keep_up(parameters, z, indices), moments, loss, counts


def half_cosine(step: int, steps: int) -> float:
    r"""Factor of the learning rate, :math:`\tfrac12 (1 + \cos(\pi t / T))`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Experiment:
    """Patches, a library and settings: everything that the runs of a comparison share."""

    def __init__(self, patches: Patches, library: Library, settings: Settings) -> None:
        self.patches, self.library, self.settings = patches, library, settings
        self._starts: dict[int, dict[str, np.ndarray]] = {}
        self._steps: dict[str, Callable] = {}

    def recipe(self, name: str) -> Recipe:
        """The recipe, of as many codes as the settings ask for."""
        return RECIPES[name].sized(self.settings.codewords, self.settings.dim)

    def _replaces(self, recipe: Recipe) -> bool:
        return self.settings.replace and recipe.quantizer is not None and bool(recipe.quantizer.words)

    def _step(self, name: str) -> Callable:
        # One compilation serves all seeds.
        if name not in self._steps:
            recipe = self.recipe(name)
            step = functools.partial(training_step, recipe=recipe, counting=self._replaces(recipe))
            self._steps[name] = self.library.compile(step)
        return self._steps[name]

    def _streams(self, seed: int) -> dict[str, np.random.Generator]:
        names = ("parameters", "warmup", "codewords", "batches", "noise", "replacement")
        children = np.random.SeedSequence(seed).spawn(len(names))
        return {name: np.random.default_rng(child) for name, child in zip(names, children, strict=True)}

    def start(self, seed: int) -> dict[str, np.ndarray]:
        """Parameters from which every recipe starts: a short training without quantizer, and the codebook.

        Codewords are the encoder's outputs for K training patches at distinct positions.
        """
        if seed in self._starts:
            return self._starts[seed]
        settings, library, streams = self.settings, self.library, self._streams(seed)
        initial = initial_parameters(streams["parameters"], self.patches.size, settings.width, settings.dim)
        parameters = {key: library.array(x) for key, x in initial.items()}
        moments, step = no_moments(parameters), self._step("unquantized")
        for _ in range(settings.warmup):
            x = library.array(self.patches.sample(streams["warmup"], settings.batch))
            parameters, moments, _, _ = step(parameters, moments, x, {}, settings.learning_rate)
        positions = streams["codewords"].choice(self.patches.positions, settings.codewords, replace=False)
        codebook, _ = perceptron(parameters, "encoder", library.array(self.patches.at(positions)))
        start = {key: library.numpy(x) for key, x in (parameters | {"codebook": codebook}).items()}
        self._starts[seed] = start
        return start

    def run(self, name: str, seed: int, advance: Callable[[int, float], None] = lambda steps, error: None) -> Run:
        """Train, evaluating on held-out patches along the way and at the end.

        Parameters
        ----------
        name : str
            The recipe.
        seed : int
        advance : callable
            Called with the number of steps since the last call, and the held-out error reached.
        """
        recipe, settings, library = self.recipe(name), self.settings, self.library
        quantizer, replaces = recipe.quantizer, self._replaces(recipe)
        streams, step = self._streams(seed), self._step(name)
        start = dict(self.start(seed))
        codewords = start.pop("codebook")
        if quantizer is not None:
            start |= quantizer.start(codewords)
        parameters = {key: library.array(x) for key, x in start.items()}
        moments, used = no_moments(parameters), None
        every = max(1, math.ceil(settings.steps / POINTS))
        curve = [(0, curve_error(parameters, recipe, self.patches, library))]
        seconds, began = 0.0, time.perf_counter()
        for t in range(1, settings.steps + 1):
            x = library.array(self.patches.sample(streams["batches"], settings.batch))
            noise = {}
            if quantizer is not None:
                noise = quantizer.draw(streams["noise"], settings.batch, settings.codewords, settings.dim)
            rate = settings.learning_rate * half_cosine(t - 1, settings.steps)
            on_device = {key: library.array(x) for key, x in noise.items()}
            parameters, moments, loss, counts = step(parameters, moments, x, on_device, rate)
            if quantizer is not None and replaces:
                used = counts if used is None else used + counts
                # Not at the very end: what is new needs some steps before it is of use.
                if t % settings.replace_every == 0 and t < settings.steps:
                    normal = streams["replacement"].standard_normal(noise_shape(parameters, quantizer))
                    parameters, moments = replace(parameters, moments, used, library.array(normal), quantizer)
                    used = None
            if t % every == 0 or t == settings.steps:
                library.numpy(loss)  # waits for a device that computes in the background
                seconds += time.perf_counter() - began
                curve.append((t, curve_error(parameters, recipe, self.patches, library)))
                advance(t - curve[-2][0], curve[-1][1])
                if not math.isfinite(curve[-1][1]):
                    break
                began = time.perf_counter()
        scores = evaluate(parameters, recipe, self.patches, library)
        return Run(name, seed, scores, curve, seconds)
