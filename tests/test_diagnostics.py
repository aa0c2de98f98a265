"""Diagnostics in every library, by their definitions in NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, float64_in, library_named, standard_promotion

RADII = [
    dq.Power(0.5),
    dq.Power(2.0),
    dq.PseudoHuber(0.3),
    dq.PNorm(3.0),
    dq.Mahalanobis(np.diag([1.0, 2.0, 3.0])),
    dq.Cosine(),
]


def rows(*shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((*shape, 3)).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_coefficient_and_positive_share(library: Library, shape: tuple[int, ...]):
    g, z, q = rows(*shape)
    arguments = [library.to(x) for x in (g, z, q)]
    expected = np.asarray((g * (q - z)).sum(axis=-1), np.float32)
    # Three products and sums of numbers of order one.
    assert_close(dq.coefficient(*arguments), expected, library, rtol=1e-5, atol=1e-6)
    share = library.back(dq.positive_share(*arguments))
    assert share.shape == ()
    np.testing.assert_allclose(share, (expected > 0).mean() if expected.size else np.nan, rtol=1e-6)


def test_coefficient_is_the_first_order_price(library: Library):
    # L = <t, x> is linear, so L(q) - L(z) is it exactly.
    t, z, q = rows(4)
    price = (t * q).sum(axis=-1) - (t * z).sum(axis=-1)
    assert_close(dq.coefficient(*(library.to(x) for x in (t, z, q))), price, library, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(library: Library, dtype: str):
    if dtype == "float16" and not library.float16:
        pytest.skip(f"{library.name} has no float16")
    with float64_in(library):
        arguments = [library.to(x.astype(dtype)) for x in rows(4)]
        assert library.back(dq.coefficient(*arguments)).dtype == dtype
        wide = "float64" if dtype == "float64" else "float32"
        assert library.back(dq.positive_share(*arguments)).dtype == wide
        assert library.back(dq.equivalent_loss(*arguments, dq.Power(1.0))).dtype == wide
        counts = library.to(np.ones(3, dtype))
        assert library.back(dq.perplexity(counts)).dtype == wide
        assert library.back(dq.used_share(counts)).dtype == wide


def test_float16_coefficients_are_summed_in_float32(library: Library):
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    # The products overflow float16; their sum is 0.
    g = library.to(np.array([[300.0, -300.0]], np.float16))
    z, q = library.to(np.zeros((1, 2), np.float16)), library.to(np.full((1, 2), 300.0, np.float16))
    assert_close(dq.coefficient(g, z, q), np.zeros(1, np.float16), library)


def test_small_float16_prices_are_positive(library: Library):
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    # 1e-8 is 0 in float16.
    g, z, q = (library.to(np.full((3, 1), value, np.float16)) for value in (1e-4, 0.0, 1e-4))
    assert float(library.back(dq.coefficient(g, z, q))[0]) == 0
    assert float(dq.positive_share(g, z, q)) == 1


@pytest.mark.parametrize("radius", RADII, ids=repr)
def test_equivalent_loss(library: Library, radius: dq.Radius):
    g, z, q = (x.reshape(2, 2, 3) for x in rows(4))
    d = (q - z).astype(np.float64)
    rho = np.linalg.norm(d, axis=-1)
    unit = [x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True) for x in (z, q)]
    log_r = {
        "Power": lambda: radius.alpha * np.log(rho),
        "PseudoHuber": lambda: 0.5 * np.log(rho**2 + radius.delta**2),
        "PNorm": lambda: np.log((np.abs(d) ** radius.p).sum(axis=-1)) / radius.p,
        "Mahalanobis": lambda: 0.5 * np.log((d * (d @ radius.matrix)).sum(axis=-1)),
        "Cosine": lambda: np.log(1 - (unit[0] * unit[1]).sum(axis=-1)),
    }[type(radius).__name__]()
    expected = np.float32(((g * d).sum(axis=-1) * log_r).sum())
    # A sum of four products of order one, each of which took about ten operations.
    actual = dq.equivalent_loss(*(library.to(x) for x in (g, z, q)), radius)
    assert_close(actual, np.asarray(expected), library, rtol=1e-5, atol=1e-5)


def test_equivalent_loss_of_a_vector_on_its_codeword_is_zero(library: Library):
    g, z, _ = rows(3)
    for radius in RADII:
        actual = dq.equivalent_loss(*(library.to(x) for x in (g, z, z)), radius)
        assert_close(actual, np.zeros((), np.float32), library)


@pytest.mark.parametrize("radius", RADII, ids=repr)
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_straight_through_plus_the_equivalent_loss_is_the_radial_estimator(name: str, radius: dq.Radius):
    library = library_named(name)
    g, z, q = rows(5)
    (_, pullback) = dq.vjp(z, q, dq.Radial(radius), indices=np.arange(5))
    expected_z, expected_q = pullback(g)
    loss_z, loss_q = gradients(library, lambda z, q: dq.equivalent_loss(library.to(g), z, q, radius), z, q)
    # Autodiff takes other operations to the same gradient.
    np.testing.assert_allclose(g + loss_z, expected_z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss_q, expected_q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_equivalent_loss_has_finite_gradients_everywhere(name: str):
    library = library_named(name)
    g, z, _ = rows(2)
    for radius in RADII:
        for gradient in gradients(library, lambda z, q, r=radius: dq.equivalent_loss(library.to(g), z, q, r), z, z):
            np.testing.assert_array_equal(gradient, np.zeros_like(z))


def gradients(library: Library, loss, *arguments: np.ndarray) -> list[np.ndarray]:
    """Gradients of a loss to all its arguments by the library's automatic differentiation."""
    arrays = [library.to(x) for x in arguments]
    if library.name == "torch":
        import torch

        return [library.back(x) for x in torch.autograd.grad(loss(*(x.requires_grad_() for x in arrays)), arrays)]
    import jax

    return [library.back(x) for x in jax.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)]


def test_usage(library: Library):
    indices = np.array([[0, 2, 2], [-1, 2, 4]])
    assert_close(dq.usage(library.to(indices), 6), np.array([1, 0, 3, 0, 1, 0], np.float32), library)
    assert_close(dq.usage(library.to(indices[:, :0]), 2), np.zeros(2, np.float32), library)
    assert_close(dq.usage(library.to(np.array(1)), 2), np.array([0, 1], np.float32), library)
    assert_close(dq.usage(library.to(np.array([-1, -1])), 1), np.zeros(1, np.float32), library)
    assert_close(dq.usage(library.to(indices), np.int64(6)), np.array([1, 0, 3, 0, 1, 0], np.float32), library)


@pytest.mark.parametrize(
    ("counts", "effective", "share"),
    [
        ([1, 1, 1, 1], 4.0, 1.0),
        ([5, 0, 0], 1.0, 1 / 3),
        ([3, 3, 0, 0], 2.0, 0.5),
        ([1, 3], 4 / 3**0.75, 1.0),
        ([7], 1.0, 1.0),
        ([0, 0], np.nan, 0.0),
    ],
)
def test_perplexity_and_used_share(library: Library, counts: list[int], effective: float, share: float):
    counts = library.to(np.array(counts, np.float32))
    # A logarithm and an exponential of numbers of order one.
    assert_close(dq.perplexity(counts), np.float32(effective)[()].reshape(()), library, rtol=1e-6)
    assert_close(dq.used_share(counts), np.float32(share).reshape(()), library, rtol=1e-7)


@pytest.mark.parametrize("function", [dq.coefficient, dq.positive_share, dq.equivalent_loss])
def test_errors_of_rows(library: Library, function):
    more = (dq.Power(1.0),) if function is dq.equivalent_loss else ()
    name = function.__name__
    g, z, q = (library.to(x) for x in rows(4))
    with pytest.raises(ValueError, match=rf"^{name}: g must have the shape of z, \(4, 3\), got \(2, 3\)$"):
        function(g[:2, :], z, q, *more)
    with pytest.raises(ValueError, match=rf"^{name}: q must have the shape of z, \(4, 3\), got \(4, 2\)$"):
        function(g, z, q[:, :2], *more)
    scalar = library.to(np.zeros((), np.float32))
    with pytest.raises(ValueError, match=rf"^{name}: g must have shape \(\.\.\., D\), got \(\)$"):
        function(scalar, scalar, scalar, *more)
    with pytest.raises(TypeError, match=rf"^{name}: q must have a real floating dtype .*, got .*int32"):
        function(g, z, library.to(np.zeros((4, 3), np.int32)), *more)
    with pytest.raises(TypeError, match=rf"^{name}: g must be an array .*, got builtins\.float$"):
        function(1.0, z, q, *more)
    other = np.asarray if library.name != "numpy" else library_named("array_api_strict").to
    with pytest.raises(TypeError, match=rf"^{name}: expected all arrays of one library, got g of "):
        function(g, z, other(rows(4)[2]), *more)


def test_errors_of_the_equivalent_losss_radius(library: Library):
    arguments = [library.to(x) for x in rows(4)]
    with pytest.raises(TypeError, match=r"^equivalent_loss: radius must be a radius .*, got 1\.0$"):
        dq.equivalent_loss(*arguments, 1.0)


def test_errors_of_counts(library: Library):
    with pytest.raises(TypeError, match=r"^usage: indices must have an integer dtype, got .*float32"):
        dq.usage(library.to(np.zeros(3, np.float32)), 3)
    for wrong in (0, -1, 2.0, None, True):
        with pytest.raises(ValueError, match=rf"^usage: count must be an integer >= 1, got {re.escape(repr(wrong))}$"):
            dq.usage(library.to(np.zeros(3, int)), wrong)
    with pytest.raises(TypeError, match=r"^usage: indices must be an array .*, got builtins\.list$"):
        dq.usage([0, 1], 2)
    for function in (dq.perplexity, dq.used_share):
        name = function.__name__
        with pytest.raises(ValueError, match=rf"^{name}: counts must have shape \(K,\), got \(2, 2\)$"):
            function(library.to(np.zeros((2, 2), np.float32)))
        with pytest.raises(TypeError, match=rf"^{name}: counts must have a real floating dtype .*, got .*bool"):
            function(library.to(np.zeros(2, bool)))
        with pytest.raises(TypeError, match=rf"^{name}: counts must be an array .*, got builtins\.list$"):
            function([1.0, 2.0])


def test_usage_refuses_in_numpy_what_it_would_drop():
    for values in ([0, 3], [-7, 1]):
        with pytest.raises(
            ValueError, match=r"^usage: indices must lie in \[0, count\) with count = 3, or be -1"
        ) as error:
            dq.usage(np.array(values), 3)
        assert str(error.value).endswith(f"got values from {values[0]} to {values[1]}")


def test_mixed_dtypes(library: Library):
    g, z, q = rows(4)
    with float64_in(library), standard_promotion():
        mixed = [library.to(g), library.to(z), library.to(q.astype(np.float64))]
        assert library.back(dq.coefficient(*mixed)).dtype == np.float64
        expected = (g.astype(np.float64) * (q.astype(np.float64) - z)).sum(axis=-1)
        assert_close(dq.coefficient(*mixed), expected, library, rtol=1e-14, atol=1e-14)


def test_usage_under_vmap() -> None:
    torch = pytest.importorskip("torch")
    indices = torch.tensor([[0, 2, 2], [1, -1, 0]])
    counts = torch.vmap(lambda i: dq.usage(i, 3))(indices)
    np.testing.assert_array_equal(counts.numpy(), [[1, 0, 2], [1, 1, 0]])


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "int16", "uint16"])
def test_whole_numbers_are_counts(library: Library, dtype: str) -> None:
    """As ``bincount`` gives them: the same as the counts of `usage`."""
    counts = library.to(np.array([3, 3, 0, 1], dtype))
    floats = library.to(np.array([3, 3, 0, 1], np.float32))
    for function in (dq.perplexity, dq.used_share):
        assert_close(function(counts), library.back(function(floats)), library)
    truth = library.to(np.array([True, False]))
    with pytest.raises(TypeError, match=r"^perplexity: counts must have a real floating dtype .*bool"):
        dq.perplexity(truth)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_bincount_gives_counts(name: str) -> None:
    library = library_named(name)
    indices = library.to(np.array([0, 2, 2, 0, 3]))
    count = {"numpy": lambda: np.bincount(indices, minlength=8), "torch": lambda: indices.bincount(minlength=8)}
    if name == "jax":
        import jax

        counts = jax.numpy.bincount(indices, length=8)
    else:
        counts = count[name]()
    assert_close(dq.used_share(counts), np.float32(3 / 8)[()].reshape(()), library)
    # exp of a sum of three products.
    want = np.exp(2 * 0.4 * np.log(2.5) + 0.2 * np.log(5))
    assert_close(dq.perplexity(counts), np.float32(want).reshape(()), library, rtol=1e-6)


def test_nothing_is_not_positive(library: Library) -> None:
    """A vector on its codeword, or with a cotangent at right angles, is pulled nowhere."""
    g = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    z = np.zeros((4, 2), np.float32)
    q = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], np.float32)
    arguments = [library.to(x) for x in (g, z, q)]
    np.testing.assert_array_equal(library.back(dq.coefficient(*arguments)), [0, 0, 2, -2])
    assert float(dq.positive_share(*arguments)) == 0.25


def test_counts_beyond_the_whole_numbers_of_float32() -> None:
    assert dq.usage(np.zeros((1 << 24) + 4, np.int32), 2).tolist() == [(1 << 24) + 4, 0]


def test_the_perplexity_of_counts_whose_sum_overflows(library: Library) -> None:
    # array-api-strict lets NumPy warn of the sum.
    with np.errstate(over="ignore"):
        assert abs(float(dq.perplexity(library.to(np.full(4, 2e38, np.float32)))) - 4) < 1e-5


@pytest.mark.parametrize("count", [1, 3, 6, 7, 100])
def test_equal_counts_give_their_number(library: Library, count: int) -> None:
    for value in (1.0, 7.0, 0.1, 1e-37, 3e38):
        counts = np.concatenate([np.full(count, value), [0.0]]).astype(np.float32)
        # exp(0) of a library may be off by an ulp.
        assert float(dq.perplexity(library.to(counts))) == pytest.approx(count, rel=2**-23)


@pytest.mark.parametrize("wrong", [[1.0, -1.0], [1.0, np.nan], [2, -2]])
def test_numpy_refuses_counts_that_are_none(wrong: list[float]) -> None:
    for function in (dq.perplexity, dq.used_share):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: counts must be at least 0, got a negative"):
            function(np.array(wrong))
        with pytest.raises(ValueError, match=rf"^{function.__name__}: counts must have shape \(K,\) with K >= 1"):
            function(np.zeros(0))
    if not np.isnan(wrong).any():
        with pytest.raises(ValueError, match=r"^replace_unused: counts must be at least 0, got a negative one$"):
            dq.replace_unused(np.eye(2), np.array(wrong), rng=np.random.default_rng(0))
