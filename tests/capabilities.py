"""The table of what works where, made by trying it: ``python tests/capabilities.py`` writes docs/capabilities.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import diveq_core as dq
from conftest import LIBRARIES, Library

PAGE = Path(__file__).parents[1] / "docs" / "capabilities.md"

K, D, N = 6, 4, 5

ESTIMATORS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "STE()": (dq.STE(), (K, D)),
    "NSVQ()": (dq.NSVQ(), (K, D)),
    "DiVeQ()": (dq.DiVeQ(), (K, D)),
    "DiVeQDetach()": (dq.DiVeQDetach(), (K, D)),
    "Radial(Power(2))": (dq.Radial(dq.Power(2.0)), (K, D)),
    "Radial(PseudoHuber())": (dq.Radial(dq.PseudoHuber()), (K, D)),
    "Radial(PNorm(3))": (dq.Radial(dq.PNorm(3.0)), (K, D)),
    "Radial(Mahalanobis(M))": (dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0, 4.0]))), (K, D)),
    "Radial(Cosine())": (dq.Radial(dq.Cosine()), (K, D)),
    "Rotation()": (dq.Rotation(), (K, D)),
    "SFDiVeQ()": (dq.SFDiVeQ(), (K, D)),
    "SFDiVeQDetach()": (dq.SFDiVeQDetach(), (K, D)),
    "Residual(DiVeQ(), 2)": (dq.Residual(dq.DiVeQ(), 2), (2, K, D)),
    "Product(DiVeQ(), 2)": (dq.Product(dq.DiVeQ(), 2), (2, K, D // 2)),
}


def _noise(estimator: Any, rng: np.random.Generator, to: Any) -> Any:
    normal = rng.standard_normal((2, N, D)).astype(np.float32)
    if isinstance(estimator, (dq.SFDiVeQ, dq.SFDiVeQDetach)):
        return dq.CurveNoise(to(rng.random(K - 1).astype(np.float32)), to(normal))
    return to(normal if isinstance(estimator, dq.Residual) else normal[0])


def _same(library: Library, actual: Any, expected: np.ndarray) -> None:
    # Two float32 computations of order one; the cosine of almost parallel vectors loses two digits.
    np.testing.assert_allclose(library.back(actual), expected, rtol=1e-3, atol=1e-4)


def cell(name: str, library: Library) -> list[str]:
    """What was tried with an estimator in a library, each compared with NumPy's explicit verbs."""
    estimator, words = ESTIMATORS[name]
    rng = np.random.default_rng(7)
    shapes = ((N, D), words, (N, D), (N, D), words)
    z, codebook, g, dz, dwords = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    here = [library.to(x) for x in (z, codebook, g, dz, dwords)]
    noise = _noise(estimator, np.random.default_rng(8), np.asarray)
    there = _noise(estimator, np.random.default_rng(8), library.to)
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    expected = pullback(g)
    _, expected_tangent = dq.jvp(z, codebook, dz, dwords, estimator, noise=noise)

    _same(library, dq.quantize(here[0], here[1], estimator, noise=there).z_q, out.z_q)
    for ours, theirs in zip(expected, dq.vjp(here[0], here[1], estimator, noise=there)[1](here[2]), strict=True):
        _same(library, theirs, ours)
    tangent = dq.jvp(here[0], here[1], here[3], here[4], estimator, noise=there)[1]
    _same(library, tangent, expected_tangent)
    tried = ["forward", "vjp", "jvp"]
    if library.differentiates:
        for ours, theirs in zip(expected, _autodiff(library, estimator, here, there), strict=True):
            _same(library, theirs, ours)
        tried.append("autodiff")
    return tried


def _autodiff(library: Library, estimator: Any, arrays: list[Any], noise: Any) -> tuple[Any, Any]:
    z, codebook, g = arrays[:3]
    if library.name == "torch":
        z, codebook = (x.clone().requires_grad_() for x in (z, codebook))
        dq.quantize(z, codebook, estimator, noise=noise).z_q.backward(g)
        zeros = library.to(np.zeros(codebook.shape, np.float32))
        return z.grad, zeros if codebook.grad is None else codebook.grad
    import jax

    grad = jax.grad(lambda z, words: (dq.quantize(z, words, estimator, noise=noise).z_q * g).sum(), (0, 1))
    return jax.jit(grad)(z, codebook)


def columns() -> dict[str, Library | None]:
    """Every library of the tests; None where it cannot run here."""
    found: dict[str, Library | None] = {}
    for name, make in LIBRARIES.items():
        try:
            found[name] = make()
        except pytest.skip.Exception:
            found[name] = None
    return found


def row(name: str, libraries: dict[str, Library | None], known: dict[str, str]) -> str:
    """A line of the table; a cell that cannot be tried here keeps what the page says."""
    cells = []
    for column, library in libraries.items():
        cells.append(known.get(column, "not run") if library is None else ", ".join(cell(name, library)))
    return f"| `{name}` | " + " | ".join(cells) + " |"


def known_cells(page: str) -> dict[str, dict[str, str]]:
    """The cells of a page written before, by estimator and library."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    if len(lines) < 2:
        return {}
    header = lines[0][1:]
    return {line[0].strip("`"): dict(zip(header, line[1:], strict=True)) for line in lines[2:]}


def page(written: str) -> str:
    """The whole page, from the cells that can be tried here and those written before."""
    libraries, known = columns(), known_cells(written)
    rows = [row(name, libraries, known.get(name, {})) for name in ESTIMATORS]
    head = "| estimator | " + " | ".join(libraries) + " |"
    rule = "|---" * (len(libraries) + 1) + "|"
    return "\n".join(
        [
            "# What works where",
            "",
            "Written by `python tests/capabilities.py`, and held to by the tests: each word stands for a comparison",
            "with NumPy's explicit verbs that was made and passed. `autodiff` is the library's own, through",
            "`quantize`. `not run` means that no machine with a GPU was at hand.",
            "",
            head,
            rule,
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text() if PAGE.exists() else ""), encoding="utf-8")
    print(f"wrote {PAGE.name}")
