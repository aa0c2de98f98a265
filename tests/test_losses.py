"""The auxiliary losses: values, masks, and pullbacks against plain automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close, library_named
from strategies import (
    EPS,
    ROUNDINGS,
    SHAPES,
    Problem,
    assert_within,
    dtypes_of,
    example_count,
    precision,
    problems,
    to_library,
)

torch = pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

LOSSES = {
    "codebook": (dq.codebook_loss, dq.codebook_loss_vjp),
    "commitment": (dq.commitment_loss, dq.commitment_loss_vjp),
}
by_loss = pytest.mark.parametrize("name", LOSSES)


@st.composite
def masks(draw: st.DrawFn, p: Problem) -> np.ndarray | None:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    return None if share is None else rng.random(p.indices.shape) < share


def plain(xp: Any, sg: Any, name: str, z: Any, codebook: Any, indices: Any, mask: np.ndarray | None) -> Any:
    """The mean over the entries of the subset, 0 for none."""
    q = codebook[indices]
    error = (q - sg(z)) if name == "codebook" else (z - sg(q))
    if mask is not None:
        error = error[mask]
    return 0 * xp.sum(z) * xp.sum(codebook) if 0 in error.shape else xp.mean(error**2)


def expected(name: str, p: Problem, mask: np.ndarray | None, g: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient by torch in float64."""
    z, codebook = (torch.tensor(x).requires_grad_() for x in (p.z, p.codebook))
    chosen = None if mask is None else torch.tensor(mask)
    loss = plain(torch, torch.detach, name, z, codebook, torch.tensor(p.indices), chosen)
    cotangent = torch.tensor(g, dtype=torch.float64)
    both = torch.autograd.grad(loss, (z, codebook), cotangent, materialize_grads=True)
    moved, still = both if name == "commitment" else both[::-1]
    assert not still.any()
    return loss.detach().numpy(), moved.numpy()


def rounded_sizes(name: str, p: Problem, mask: np.ndarray | None, g: float) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes behind the loss and the gradient; differences count as sums."""
    counted = np.ones(p.indices.shape, bool) if mask is None else mask
    count = max(np.sum(counted) * p.width, 1)
    size = (np.abs(p.z) + np.abs(p.q)) * counted[..., None]
    slope = 2 * abs(g) / count * size
    if name == "codebook":
        rows = np.zeros_like(p.codebook)
        np.add.at(rows, p.indices.reshape(-1), slope.reshape(-1, p.width))
        slope = rows
    return np.sum(size**2) / count, slope


@by_loss
@given(data=st.data())
def test_pullback_is_plain_automatic_differentiation(library: Library, name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    p = data.draw(problems()).rounded(dtype)
    mask, g = data.draw(masks(p)), data.draw(st.sampled_from([1.0, -0.25]))
    loss, gradient = expected(name, p, mask, g)
    sizes = rounded_sizes(name, p, mask, g)
    function, function_vjp = LOSSES[name]
    with precision(library, dtype):
        z, codebook = (to_library(library, x, dtype) for x in (p.z, p.codebook))
        arguments = (z, codebook, library.to(p.indices.astype(np.int32)))
        options = {"mask": None if mask is None else library.to(mask)}
        value, pullback = function_vjp(*arguments, **options)
        # The sum runs over up to 48 entries.
        assert_within_scalar(value, loss, sizes[0], dtype, library)
        assert_within_scalar(function(*arguments, **options), loss, sizes[0], dtype, library)
        assert_within(pullback(to_library(library, np.array(g), dtype)), gradient, sizes[1], dtype, library, ROUNDINGS)


def assert_within_scalar(actual: Any, want: np.ndarray, size: float, dtype: str, library: Library) -> None:
    assert str(actual.dtype).endswith(dtype)
    assert tuple(actual.shape) == ()
    computed = "float64" if dtype == "float64" else "float32"
    # One rounding of the result to a 16-bit dtype.
    tolerance = ROUNDINGS * EPS[computed] * size + (EPS[dtype] * abs(want) if computed != dtype else 0)
    tiny = 2.0**-25 if dtype == "float16" else 0
    assert abs(float(library.back(actual)) - want) <= tolerance + tiny


@by_loss
@pytest.mark.parametrize("backend", ["torch", "jax"])
@settings(max_examples=example_count(0.3))
@given(data=st.data())
def test_differentiates_to_the_pullback_in_both_orders(backend: str, name: str, data: st.DataObject) -> None:
    """Automatic differentiation of the loss, and of its pullback, against that of the plain expression."""
    library = library_named(backend)
    p = data.draw(problems(shapes=SHAPES[:1]))
    mask = data.draw(masks(p))
    loss, function_vjp = LOSSES[name]
    moving = 1 if name == "codebook" else 0
    chosen = None if mask is None else library.to(mask)
    with precision(library, "float64"):
        z, codebook, dz, de = (library.to(x) for x in (p.z, p.codebook, p.dz, p.dcodebook))
        indices, one = library.to(p.indices), library.to(np.array(1.0))

        def ours(z: Any, codebook: Any) -> Any:
            return loss(z, codebook, indices, mask=chosen)

        def explicit(z: Any, codebook: Any) -> Any:
            return function_vjp(z, codebook, indices, mask=chosen)[1](one)

        if backend == "torch":
            z, codebook = z.requires_grad_(), codebook.requires_grad_()
            reference = lambda z, e: plain(torch, torch.detach, name, z, e, indices, chosen)  # noqa: E731
            results = []
            for function in (ours, reference):
                grads = torch.autograd.grad(
                    function(z, codebook), (z, codebook), create_graph=True, materialize_grads=True
                )
                pushed = (grads[0] * dz).sum() + (grads[1] * de).sum() + 0 * (z.sum() + codebook.sum())
                results.append([*grads, *torch.autograd.grad(pushed, (z, codebook), materialize_grads=True)])
            results[0].append(explicit(z, codebook))
        else:
            import jax

            def reference(z: Any, codebook: Any) -> Any:
                return plain(jax.numpy, jax.lax.stop_gradient, name, z, codebook, indices, mask)

            results = []
            for function in (ours, reference):
                gradient = jax.grad(function, argnums=(0, 1))
                pushed = lambda z, e, f=gradient: sum((a * b).sum() for a, b in zip(f(z, e), (dz, de), strict=True))  # noqa: E731
                results.append([*gradient(z, codebook), *jax.grad(pushed, argnums=(0, 1))(z, codebook)])
            results[0].append(jax.jit(explicit)(z, codebook))
        results[1].append(results[1][moving])
        for got, want in zip(*results, strict=True):
            # Numbers of order one, sums of fifteen.
            np.testing.assert_allclose(library.back(got), library.back(want), rtol=1e-12, atol=1e-13)


@by_loss
@settings(max_examples=example_count(0.3))
@given(data=st.data())
def test_masked_is_the_subset(library: Library, name: str, data: st.DataObject) -> None:
    """Whatever stands in the masked rows, NaN and the index -1 included."""
    p = data.draw(problems(shapes=SHAPES[:1])).rounded("float32")
    # Some of both in every example; none and all are in the tests around.
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(p.indices.shape) < 0.5
    mask[0], mask[-1] = True, False
    z = np.where(mask[..., None], p.z, np.nan).astype(np.float32)
    indices = np.where(mask, p.indices, -1)
    codebook = p.codebook.astype(np.float32)
    function_vjp = LOSSES[name][1]
    one = library.to(np.array(1, np.float32))
    loss, pullback = function_vjp(library.to(z), library.to(codebook), library.to(indices), mask=library.to(mask))
    subset, of_subset = function_vjp(library.to(z[mask]), library.to(codebook), library.to(indices[mask]))
    # The order of a sum of 48 differs.
    tolerance = {"rtol": ROUNDINGS * EPS["float32"], "atol": 1e-6}
    assert_close(loss, np.asarray(library.back(subset)), library, **tolerance)
    gradient, want = library.back(pullback(one)), library.back(of_subset(one))
    if name == "commitment":
        np.testing.assert_array_equal(gradient[~mask], 0)
        gradient = gradient[mask]
    np.testing.assert_allclose(gradient, want, **tolerance)


@by_loss
@pytest.mark.parametrize("mask", [None, np.zeros((0,), bool)], ids=["none", "mask"])
def test_nothing_to_count_is_zero(library: Library, name: str, mask: np.ndarray | None) -> None:
    empty, codebook = np.zeros((0, 3), np.float32), np.ones((2, 3), np.float32)
    options = {"mask": None if mask is None else library.to(mask)}
    loss, pullback = LOSSES[name][1](
        library.to(empty), library.to(codebook), library.to(np.zeros(0, np.int32)), **options
    )
    assert_close(loss, np.array(0, np.float32), library)
    gradient = pullback(library.to(np.array(1, np.float32)))
    assert_close(gradient, empty if name == "commitment" else 0 * codebook, library)


@by_loss
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_empty_mask_differentiates_to_zero(backend: str, name: str) -> None:
    library = library_named(backend)
    z, codebook = (library.to(np.full((2, 3), x, np.float32)) for x in (np.nan, 1.0))
    indices, mask = library.to(np.array([-1, 0])), library.to(np.zeros(2, bool))
    if backend == "torch":
        z, codebook = z.requires_grad_(), codebook.requires_grad_()
        loss = LOSSES[name][0](z, codebook, indices, mask=mask)
        loss.backward()
        grads = [x for x in (z.grad, codebook.grad) if x is not None]
    else:
        import jax

        loss, grads = jax.value_and_grad(LOSSES[name][0], argnums=(0, 1))(z, codebook, indices, mask=mask)
    assert_close(loss, np.array(0, np.float32), library)
    for gradient in grads:
        np.testing.assert_array_equal(library.back(gradient), 0)


def test_weighted_separately(library: Library) -> None:
    """The codebook loss moves no vector, the commitment loss no codeword; their values are the same."""
    z, codebook = np.array([[0.0, 0.0], [2.0, 4.0]], np.float32), np.array([[1.0, 2.0]], np.float32)
    arguments = (library.to(z), library.to(codebook), library.to(np.zeros(2, np.int32)))
    one = library.to(np.array(1, np.float32))
    for function, gradient in (
        (dq.codebook_loss_vjp, np.zeros((1, 2), np.float32)),
        (dq.commitment_loss_vjp, np.array([[-0.5, -1.0], [0.5, 1.0]], np.float32)),
    ):
        loss, pullback = function(*arguments)
        assert_close(loss, np.array(2.5, np.float32), library)
        assert_close(pullback(one), gradient, library)


def test_not_finite_is_visible(library: Library) -> None:
    z, codebook = np.array([[np.nan, 0.0], [2.0, 4.0]], np.float32), np.array([[1.0, 2.0]], np.float32)
    loss = dq.commitment_loss(library.to(z), library.to(codebook), library.to(np.array([-1, 0])))
    assert np.isnan(library.back(loss))


@by_loss
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"z": np.zeros((2, 3), np.int32)}, TypeError, "z must have a real floating dtype .* got .*int32"),
        (
            {"codebook": np.zeros((2, 4), np.float32)},
            ValueError,
            r"z must have .* D = 4 as in the codebook \(2, 4\), got \(2, 3\)",
        ),
        ({"indices": np.zeros(2, np.float32)}, TypeError, "indices must have an integer dtype, got .*float32"),
        ({"indices": np.zeros(3, np.int32)}, ValueError, r"indices must have the shape of z .* got \(3,\)"),
        ({"mask": np.zeros(2, np.float32)}, TypeError, "mask must have dtype bool, got .*float32"),
        ({"mask": np.zeros((2, 1), bool)}, ValueError, r"mask must have the shape of z .* \(2,\), got \(2, 1\)"),
    ],
    ids=str,
)
def test_errors(library: Library, name: str, change: dict, error: type, text: str) -> None:
    arguments = {"z": np.zeros((2, 3), np.float32), "codebook": np.zeros((2, 3), np.float32)}
    arguments |= {"indices": np.zeros(2, np.int32), "mask": np.ones(2, bool)} | change
    given = {key: library.to(x) for key, x in arguments.items()}
    for function in LOSSES[name]:
        with pytest.raises(error, match=f"^{function.__name__}: {text}"):
            function(given["z"], given["codebook"], given["indices"], mask=given["mask"])


def test_errors_of_numpy_and_of_the_pullback() -> None:
    z, codebook = np.zeros((2, 3)), np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"^codebook_loss: indices must lie in \[0, K\) with K = 2.*from 0 to 2"):
        dq.codebook_loss(z, codebook, np.array([0, 2]))
    _, pullback = dq.codebook_loss_vjp(z, codebook, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"^pullback: g must have the shape of loss, \(\), got \(2,\)"):
        pullback(np.ones(2))
    with pytest.raises(TypeError, match=r"^commitment_loss: expected all arrays of one library, got .*mask of torch"):
        dq.commitment_loss(z, codebook, np.array([0, 1]), mask=torch.ones(2, dtype=torch.bool))


@by_loss
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_masked_nan_reaches_no_gradient(backend: str, name: str) -> None:
    """What is masked may be anything, in forward and in backward passes."""
    library = library_named(backend)
    z, codebook = np.array([[1.0, 2.0], [np.nan, 3.0]], np.float32), np.array([[1.5, 1.0]], np.float32)
    indices, mask = library.to(np.array([0, 0])), library.to(np.array([True, False]))
    loss = LOSSES[name][0]
    if backend == "torch":
        leaves = [library.to(x).requires_grad_() for x in (z, codebook)]
        moved = torch.autograd.grad(loss(*leaves, indices, mask=mask), leaves, materialize_grads=True)
    else:
        import jax

        moved = jax.grad(lambda z, e: loss(z, e, indices, mask=mask), argnums=(0, 1))(
            library.to(z), library.to(codebook)
        )
    g_z, g_codebook = (library.back(x) for x in moved)
    # 2 (z - q) / 2 for the one vector that counts, exactly.
    d = z[:1] - codebook
    np.testing.assert_array_equal(g_z, np.concatenate([d, 0 * d]) if name == "commitment" else np.zeros_like(z))
    np.testing.assert_array_equal(g_codebook, -d if name == "codebook" else np.zeros_like(d))


@pytest.mark.parametrize(
    "loss",
    [dq.codebook_loss, dq.commitment_loss, dq.codebook_loss_vjp, dq.commitment_loss_vjp],
    ids=lambda f: f.__name__,
)
def test_the_codebooks_of_stages_are_refused_with_a_way(loss: Any) -> None:
    z, codebook, indices = np.ones((5, 4)), np.ones((3, 7, 4)), np.zeros((5, 3), int)
    text = rf"^{loss.__name__}: codebook must have shape \(K, D\), got \(3, 7, 4\); call it for each stage or group"
    with pytest.raises(ValueError, match=text):
        loss(z, codebook, indices)
