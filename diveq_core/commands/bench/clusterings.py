"""k-means on patches of photographs, ours and scikit-learn's, for as many iterations: whole, and from one codebook."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, UnavailableError, load

if TYPE_CHECKING:
    from collections.abc import Callable

    Variants = dict[str, Callable[[], object]]

ITERATIONS = 10
"""Few enough that neither comes to rest, where the two count their iterations differently."""


def ours(problem: Problem) -> Variants:
    """`diveq_core.kmeans` in NumPy."""
    z, codebook = _patches(problem)
    return {"": lambda: dq.kmeans(z, codebook, iterations=ITERATIONS)}


def scikit_learn(problem: Problem) -> Variants:
    """``sklearn.cluster.KMeans`` by Lloyd's algorithm, begun once."""
    z, codebook = _patches(problem)
    cluster = load("sklearn.cluster")
    options = {"n_init": 1, "algorithm": "lloyd", "init": codebook, "max_iter": ITERATIONS, "tol": 0}
    return {"": lambda: cluster.KMeans(problem.k, **options).fit(z)}


def ours_whole(problem: Problem) -> Variants:
    """The same, begun by its own k-means++."""
    z, _ = _patches(problem)
    return {"": lambda: dq.kmeans(z, problem.k, iterations=ITERATIONS, rng=np.random.default_rng(0))}


def scikit_learn_whole(problem: Problem) -> Variants:
    """The same, begun by its own k-means++, which draws as many candidates."""
    z, _ = _patches(problem)
    cluster = load("sklearn.cluster")
    options = {"n_init": 1, "algorithm": "lloyd", "max_iter": ITERATIONS, "tol": 0, "random_state": 0}
    return {"": lambda: cluster.KMeans(problem.k, **options).fit(z)}


def inertia_ratio(problem: Problem) -> float:
    """Inertia that ours leaves in units of what scikit-learn's leaves.

    Raises
    ------
    UnavailableError
        If scikit-learn is not installed.
    """
    found: Any = ours_whole(problem)[""]()
    other: Any = scikit_learn_whole(problem)[""]()
    return float(found.inertia) / float(other.inertia_)


@functools.lru_cache(maxsize=1)
def _patches(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Random square patches in colour of scikit-learn's photographs, (N, D), and a first codebook by k-means++."""
    side = math.isqrt(problem.d // 3)
    if (problem.dtype, problem.device, 3 * side * side) != ("float32", "cpu", problem.d):
        raise UnavailableError("k-means is timed on square patches in colour, in float32 on the CPU only")
    load("sklearn")
    from diveq_core.commands.compare.images import load_images
    from diveq_core.commands.compare.patches import Patches

    rng = np.random.default_rng(0)
    z = np.ascontiguousarray(Patches(load_images(None), side).sample(rng, problem.n), dtype=np.float32)
    return z, dq.kmeans_plus_plus(z, problem.k, rng=rng)
