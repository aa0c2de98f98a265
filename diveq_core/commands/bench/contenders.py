"""Who is compared: every contender by name, each importing its library only when it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.commands.bench import clusterings, files, searches, small, steps
from diveq_core.commands.bench.problem import BACKENDS, Problem, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Contender:
    """One way to compute the search, the training step or k-means.

    Parameters
    ----------
    name : str
        As tables and pictures have it.
    prepare : callable
        Makes the inputs of a problem and returns the variants that compute it, by name; of several the fastest
        counts. Raises UnavailableError if it cannot.
    matrices : float
        N x K matrices that exist at a time.
    """

    name: str
    prepare: Callable[[Problem], dict[str, Callable[[], object]]]
    matrices: float = 0.0

    def prepared(self, problem: Problem, free_bytes: int | None = None) -> dict[str, Callable[[], object]]:
        """The variants, after a look at whether their matrices fit the memory that is free."""
        needed = self.matrices * problem.matrix_bytes
        if free_bytes is not None and needed > 0.8 * free_bytes:
            raise UnavailableError(f"needs {needed / 2**30:.0f} GiB, {free_bytes / 2**30:.0f} GiB are free")
        return self.prepare(problem)


def _ours(kind: str, prepare: Callable[[str], Callable[[Problem], dict[str, Callable[[], object]]]]) -> dict:
    labels = {"numpy": "NumPy", "torch": "torch", "jax": "JAX", "cupy": "CuPy"}
    return {f"{kind}-{name}": Contender(f"diveq_core, {labels[name]}", prepare(name)) for name in BACKENDS}


CONTENDERS: dict[str, Contender] = {
    "product": Contender("matrix product alone", searches.product),
    **_ours("search", searches.ours),
    "cdist": Contender("torch.cdist + argmin", searches.cdist, matrices=1),
    "faiss": Contender("faiss IndexFlatL2", searches.faiss_flat),
    "jax-whole": Contender("JAX, whole matrix", searches.jax_whole, matrices=1),
    **_ours("step", steps.ours),
    "autodiff": Contender("torch autodiff, our search", steps.autodiff),
    "diveq": Contender("diveq", steps.diveq_package, matrices=4),
    "vector-quantize-pytorch": Contender("vector-quantize-pytorch", steps.vector_quantize_pytorch, matrices=8),
    "rest-diveq": Contender("diveq_core, DiVeQ", steps.rest(noisy=True)),
    "rest-diveq-autodiff": Contender("autodiff, DiVeQ", steps.rest_by_autodiff(noisy=True)),
    "rest-detach": Contender("diveq_core, DiVeQ-detach", steps.rest(noisy=False)),
    "rest-detach-autodiff": Contender("autodiff, DiVeQ-detach", steps.rest_by_autodiff(noisy=False)),
    "small-torch": Contender("diveq_core, torch", small.ours("torch")),
    "plain": Contender("plain autograd, torch", small.plain),
    "small-numpy": Contender("diveq_core, NumPy", small.ours("numpy")),
    "by-hand": Contender("by hand, NumPy", small.by_hand),
    "kmeans-numpy": Contender("diveq_core, NumPy", clusterings.ours_whole),
    "scikit-learn": Contender("scikit-learn KMeans", clusterings.scikit_learn_whole),
    "lloyd-numpy": Contender("diveq_core, NumPy, from a given codebook", clusterings.ours),
    "scikit-learn-lloyd": Contender("scikit-learn KMeans, from the same", clusterings.scikit_learn),
    "fit-file": Contender("diveq-core fit", files.fit_file),
    "faiss-kmeans": Contender("faiss.Kmeans, in memory", files.faiss_kmeans),
    "encode-file": Contender("diveq-core encode", files.encode_file),
    "nearest": Contender("diveq_core.nearest, in memory", files.nearest),
}

JOBS: dict[str, tuple[str, ...]] = {
    "search": ("product", *(f"search-{name}" for name in BACKENDS), "cdist", "faiss", "jax-whole"),
    "step": (*(f"step-{name}" for name in BACKENDS), "autodiff", "diveq", "vector-quantize-pytorch"),
    "rest": ("rest-diveq", "rest-diveq-autodiff", "rest-detach", "rest-detach-autodiff"),
    "small": ("small-torch", "plain", "small-numpy", "by-hand"),
    "kmeans": ("kmeans-numpy", "scikit-learn", "lloyd-numpy", "scikit-learn-lloyd"),
    "fit": ("fit-file", "faiss-kmeans"),
    "encode": ("encode-file", "nearest"),
}
"""Contenders of each comparison; those that cannot take part say why."""

TITLES = {
    "search": "Search: the nearest codeword",
    "step": "Training step: search, DiVeQ forward, backward to z and codebook",
    "rest": "Training step less its search: the indices given",
    "small": "Small calls: search, DiVeQ forward, backward to z and codebook",
    "kmeans": f"k-means++ and {clusterings.ITERATIONS} iterations, on patches of photographs",
    "fit": f"From a file to a tokenizer: k-means of {files.PASSES} passes",
    "encode": "From a file to tokens",
}


def taking_part(job: str, backends: tuple[str, ...]) -> tuple[str, ...]:
    """Contenders of a job, ours in these backends only."""
    ours = {f"{job}-{name}" for name in BACKENDS} - {f"{job}-{name}" for name in backends}
    return tuple(name for name in JOBS[job] if name not in ours)
