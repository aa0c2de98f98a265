"""The tables of what works where, made by trying it.

``python tests/support/capabilities.py`` writes docs/capabilities.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from capability_rows import ESTIMATORS, ROWS, Row, listed
from layer_drivers import DRIVERS, KINDS, driver_named, layer_cell
from libraries import LIBRARIES, Library
from transformations import TRANSFORMATIONS, transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PAGE = Path(__file__).parents[2] / "docs" / "capabilities.md"


def _same(row: Row, library: Library, actual: Any, expected: Any) -> None:
    for ours, theirs in zip(listed(expected), listed(actual), strict=True):
        found = library.back(theirs)
        assert found.shape == ours.shape, f"expected shape {ours.shape}, got {found.shape}"
        np.testing.assert_allclose(found, ours, rtol=row.rtol, atol=row.atol)


def cell(name: str, library: Library) -> list[str]:
    """What was tried with a row in a library, each compared with NumPy's explicit verbs."""
    row, rng = ROWS[name], np.random.default_rng(7)
    inputs = row.draw(rng)
    here = [library.to(x) for x in inputs]
    out = row.forward(*inputs)
    _same(row, library, row.forward(*here), out)
    tried = ["forward"]
    g = np.asarray(rng.standard_normal(listed(out)[0].shape), np.float32)
    gradients = None if row.gradient is None else row.gradient(*inputs)
    if row.vjp is not None:
        gradients = row.vjp(*inputs)[1](g)
        _same(row, library, row.vjp(*here)[1](library.to(g)), gradients)
        tried.append("vjp")
    if row.jvp is not None:
        tangents = [np.asarray(rng.standard_normal(inputs[i].shape), np.float32) for i in row.to]
        expected = row.jvp(*inputs, *tangents)[-1]
        _same(row, library, row.jvp(*here, *map(library.to, tangents))[-1], expected)
        tried.append("jvp")
    if gradients is not None and library.differentiates:
        weight = np.ones_like(g) if row.vjp is None else g
        _same(row, library, _autodiff(library, row, here, library.to(weight)), gradients)
        tried.append("autodiff")
    if row.decode is not None:
        _same(row, library, row.decode(*here), row.decode(*inputs))
        tried.append("decode")
    return tried


def _autodiff(library: Library, row: Row, inputs: list[Any], g: Any) -> tuple[Any, ...]:
    if library.name == "torch":
        leaves = [x.clone().requires_grad_(i in row.to) for i, x in enumerate(inputs)]
        listed(row.forward(*leaves))[0].backward(g)
        zeros = [library.to(np.zeros(x.shape, np.float32)) for x in inputs]
        return tuple(zeros[i] if leaves[i].grad is None else leaves[i].grad for i in row.to)
    if library.name == "mlx":
        from mlx.core import grad
    else:
        from jax import grad
    found = grad(lambda *x: (listed(row.forward(*x))[0] * g).sum(), row.to)(*inputs)
    return found if isinstance(found, tuple) else (found,)


def columns() -> dict[str, Library | None]:
    """Every library of the tests; None where it cannot run here."""
    found: dict[str, Library | None] = {}
    for name, make in LIBRARIES.items():
        try:
            found[name] = make()
        except pytest.skip.Exception:
            found[name] = None
    return found


def known_cells(page: str, table: int = 0) -> dict[str, dict[str, str]]:
    """The cells of a table of a page written before, by row and column."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    starts = [at - 1 for at, line in enumerate(lines) if set("".join(line)) == set("-|")]
    if table >= len(starts):
        return {}
    header, rows = lines[starts[table]][1:], lines[starts[table] + 2 : [*starts, len(lines)][table + 1]]
    return {line[0].strip("`"): dict(zip(header, line[1:], strict=True)) for line in rows}


def _table(corner: str, names: Iterable[str], heads: list[str], written: Callable[[str, str], str]) -> list[str]:
    lines = [f"| {corner} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return lines + [f"| `{name}` | " + " | ".join(written(name, head) for head in heads) + " |" for name in names]


def page(before: str) -> str:
    """The whole page, from the cells that can be tried here and those written before."""
    libraries = columns()
    known, known_transformations = known_cells(before), known_cells(before, 1)

    def tried(name: str, head: str) -> str:
        library = libraries[head]
        if library is None:
            return known.get(name, {}).get(head, "not run")
        return ", ".join(cell(name, library))

    def tried_transformation(name: str, head: str) -> str:
        if libraries[head.partition(":")[0]] is None:
            return known_transformations.get(name, {}).get(head, "not run")
        return transformed(name, head)

    def tried_layer(kind: str, head: str) -> str:
        try:
            driver_named(head)
        except pytest.skip.Exception:
            return known_cells(before, 2).get(kind, {}).get(head, "not run")
        return ", ".join(layer_cell(head, kind))

    return "\n".join(
        [
            "# What works where",
            "",
            "Written by `python tests/support/capabilities.py`, and held to by the tests: each word stands for a",
            "comparison with NumPy's numbers, from the same arrays and the same noise, that was made and passed.",
            "`vjp` and `jvp` are the explicit verbs, `autodiff` is the library's own, and `decode` goes back from",
            "what is stored. `not run` means that no machine with a GPU was at hand.",
            "",
            *_table("call", ROWS, list(libraries), tried),
            "",
            "## Transformations",
            "",
            "Gradients under each are NumPy's too. Derivatives of second order are compared with those of the",
            "explicit pullback, differentiated once, and of `Residual` with its stop-gradient expression's.",
            '`compile` is `torch.compile(fullgraph=True, backend="aot_eager")`, of all estimators in one graph.',
            'What is said to be in it is a transformation inside one graph of each, under `backend="eager"`.',
            "`FSDP2` is `fully_shard` of a module with the codebook as its parameter, in a group of one process.",
            "",
            *_table("estimator", ESTIMATORS, list(TRANSFORMATIONS), tried_transformation),
            "",
            "## Layers",
            "",
            "`train` is two steps in training, after which all is finite; `evaluate`, that the output is what its",
            "tokens decode to, bit for bit, and no state changes; `file`, that NumPy's layer reads its file and gives",
            "the same tokens. Keras is on PyTorch here.",
            "",
            *_table("layer", KINDS, list(DRIVERS), tried_layer),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""), encoding="utf-8")
    print(f"wrote {PAGE.name}")
