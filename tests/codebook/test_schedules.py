"""Options of the upkeep that change from step to step come as arrays () of the library, traced ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq

if TYPE_CHECKING:
    from libraries import Library


def problem() -> tuple[list[np.ndarray], list[float]]:
    rng = np.random.default_rng(0)
    z, codebook = (rng.standard_normal((n, 3)).astype(np.float32) for n in (20, 6))
    return [z, codebook, rng.standard_normal((6, 5)).astype(np.float32)], [2.0, 0.75, 0.5, 0.02]


def upkeep(z: Any, codebook: Any, noise: Any, weight: Any, decay: Any, threshold: Any, jitter: Any) -> list[Any]:
    indices = dq.nearest(z, codebook)
    state, moved = dq.ema_update(dq.ema_init(codebook, weight=weight), z, codebook, indices, decay=decay)
    options = {"threshold": threshold, "jitter": jitter, "state": state}
    new = dq.replace_unused(moved, state.counts, z=z, noise=noise, **options)
    return [moved, new.codebook, new.state.counts, new.state.means]


def test_numbers_in_arrays(library: Library) -> None:
    arrays, numbers = problem()
    expected = upkeep(*arrays, *numbers)
    found = upkeep(*(library.to(np.asarray(x, np.float32)) for x in (*arrays, *numbers)))
    for actual, wanted in zip(found, expected, strict=True):
        # Sums of 20 numbers in another order.
        np.testing.assert_allclose(library.back(actual), wanted, rtol=1e-5, atol=1e-6)


def test_their_range(library: Library) -> None:
    codebook = library.to(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"^ema_init: weight must lie in \[0, inf\), got -1"):
        dq.ema_init(codebook, weight=library.to(np.asarray(-1, np.float32)))
    with pytest.raises(ValueError, match=r"^ema_init: weight must have the shape of a number, \(\), got \(2,\)"):
        dq.ema_init(codebook, weight=library.to(np.ones(2, np.float32)))


def test_numbers_that_require_gradients() -> None:
    """They are constants here, and so is a matrix: torch warns where such a tensor is read as a number."""
    torch = pytest.importorskip("torch")
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        arrays, numbers = problem()
        expected = upkeep(*arrays, *numbers)
        found = upkeep(*(torch.tensor(np.asarray(x, np.float32), requires_grad=True) for x in (*arrays, *numbers)))
        radius = dq.Mahalanobis(torch.nn.Parameter(2 * torch.eye(3)))
    finally:
        torch.set_warn_always(always)
    assert not any(x.requires_grad for x in (*found, radius.matrix))
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-5, atol=1e-6)


# array_api_compat looks up namespaces in a cache, which Dynamo traces through.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_compiled_by_torch() -> None:
    torch = pytest.importorskip("torch")
    arrays, numbers = problem()
    compiled = torch.compile(upkeep, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 0.5):
        changed = [numbers[0], *(scale * x for x in numbers[1:])]
        expected = upkeep(*arrays, *changed)
        found = compiled(*(torch.tensor(np.asarray(x, np.float32)) for x in (*arrays, *changed)))
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-5, atol=1e-6)
