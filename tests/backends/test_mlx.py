"""MLX's own differentiation and transformations, against NumPy's explicit verbs and torch's second order."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq

mx = pytest.importorskip("mlx.core", exc_type=ImportError)

ESTIMATORS = [
    *(dq.STE(), dq.NSVQ(), dq.DiVeQ(), dq.DiVeQDetach(), dq.Rotation()),
    *(dq.Radial(dq.PseudoHuber(0.3)), dq.Radial(dq.Cosine()), dq.Residual(dq.DiVeQ(), 2)),
]
by_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
# The same operations on numbers of order one, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


Z, CODEBOOK, G = numbers(2, 6, 3), numbers(2, 4, 3), numbers(6, 3)


def noise_of(estimator: dq.Estimator) -> np.ndarray:
    return numbers(2, 6, 3, seed=1) if isinstance(estimator, dq.Residual) else numbers(6, 3, seed=1)


def loss_of(estimator: dq.Estimator):
    noise, g = mx.array(noise_of(estimator)), mx.array(G)
    return lambda z, codebook: (dq.quantize(z, codebook, estimator, noise=noise).z_q * g).sum()


def expected(estimator: dq.Estimator, i: int = 0, j: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return dq.vjp(Z[i], CODEBOOK[j], estimator, noise=noise_of(estimator))[1](G)


def assert_same(found, wanted) -> None:
    for x, same in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(x), same, **CLOSE)


@by_estimator
@pytest.mark.parametrize("transformation", ["grad", "compile", "checkpoint"])
def test_gradients_are_the_explicit_ones(estimator: dq.Estimator, transformation: str):
    loss = loss_of(estimator)
    made = {
        "grad": lambda: mx.grad(loss, (0, 1)),
        "compile": lambda: mx.compile(mx.grad(loss, (0, 1))),
        "checkpoint": lambda: mx.grad(mx.checkpoint(loss), (0, 1)),
    }[transformation]()
    assert_same(made(mx.array(Z[0]), mx.array(CODEBOOK[0])), expected(estimator))


@by_estimator
@pytest.mark.parametrize("shared", [False, True], ids=["codebooks", "codebook"])
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_vmap_keeps_the_rules(estimator: dq.Estimator, shared: bool, order: str):
    loss, axes = loss_of(estimator), (0, None if shared else 0)
    z, codebook = mx.array(Z), mx.array(CODEBOOK[0] if shared else CODEBOOK)
    rows, words = zip(*(expected(estimator, i, 0 if shared else i) for i in range(2)), strict=True)
    if order == "vmap of grad":
        found = mx.vmap(mx.grad(loss, (0, 1)), axes)(z, codebook)
    else:
        found = mx.grad(lambda z, e: mx.vmap(loss, axes)(z, e).sum(), (0, 1))(z, codebook)
        words = (sum(words),) if shared else words
    assert_same(found, [np.stack(rows), words[0] if len(words) == 1 else np.stack(words)])


@by_estimator
def test_grad_of_grad(estimator: dq.Estimator):
    torch = pytest.importorskip("torch")
    noise = noise_of(estimator)

    def pushed(grads, z, codebook):
        return (grads[0] * z).sum() + (grads[1] * codebook).sum()

    z, codebook = (torch.tensor(x[0], requires_grad=True) for x in (Z, CODEBOOK))
    loss = (dq.quantize(z, codebook, estimator, noise=torch.tensor(noise)).z_q ** 2 * torch.tensor(G)).sum()
    grads = torch.autograd.grad(loss, (z, codebook), create_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad(pushed(grads, z.detach(), codebook.detach()), (z, codebook), materialize_grads=True)

    held = [mx.array(x[0]) for x in (Z, CODEBOOK)]
    squares = lambda z, e: (dq.quantize(z, e, estimator, noise=mx.array(noise)).z_q ** 2 * mx.array(G)).sum()  # noqa: E731
    found = mx.grad(lambda z, e: pushed(mx.grad(squares, (0, 1))(z, e), *held), (0, 1))(*held)
    assert_same(found, [x.numpy() for x in wanted])


def test_losses_stop_the_gradient():
    z, codebook = mx.array(Z[0]), mx.array(CODEBOOK[0])
    indices = dq.nearest(z, codebook)
    where = np.asarray(indices)
    error = 2 * (Z[0] - CODEBOOK[0][where]) / Z[0].size
    to_words = np.zeros_like(CODEBOOK[0])
    np.add.at(to_words, where, -error)
    assert_same(mx.grad(dq.commitment_loss, (0, 1))(z, codebook, indices), [error, 0 * to_words])
    assert_same(mx.grad(dq.codebook_loss, (0, 1))(z, codebook, indices), [0 * error, to_words])


def test_forward_over_reverse_is_refused():
    z, codebook = mx.array(Z[0]), mx.array(CODEBOOK[0])
    with pytest.raises(RuntimeError, match=r"JVP not yet implemented"):
        mx.eval(mx.jvp(mx.grad(loss_of(dq.DiVeQ()), (0, 1)), [z, codebook], [z, codebook]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_sixteen_bits_missing_rows_and_none(dtype):
    z, codebook, indices = mx.array(Z[0]).astype(dtype), mx.array(CODEBOOK[0]), mx.array([0, -1, 2, 3, 0, 1])
    loss = lambda z, e: dq.quantize(z, e, dq.STE(), indices=indices).z_q.sum()  # noqa: E731
    g_z, g_codebook = mx.grad(loss, (0, 1))(z, codebook)
    assert (g_z.dtype, g_codebook.dtype) == (dtype, mx.float32)
    wanted = dq.vjp(Z[0], CODEBOOK[0], dq.STE(), indices=np.asarray(indices))[1](np.ones_like(G))
    assert_same([g_z.astype(mx.float32), g_codebook], wanted)
    empty = mx.grad(lambda z, e: dq.quantize(z, e, dq.DiVeQ()).z_q.sum(), (0, 1))(z[:0], codebook)
    assert_same([x.astype(mx.float32) for x in empty], [np.zeros((0, 3)), 0 * CODEBOOK[0]])


def test_a_key_and_the_default_stream():
    z, codebook = mx.array(Z[0]), mx.array(CODEBOOK[0])
    draw = lambda rng: np.asarray(dq.quantize(z, codebook, dq.DiVeQ(1.0), rng=rng).z_q)  # noqa: E731
    assert not np.array_equal(draw(None), draw(None))
    assert np.array_equal(draw(mx.random.key(3)), draw(mx.random.key(3)))
    with pytest.raises(TypeError, match=r"rng must be an MLX key, uint32 of shape \(2,\), got an array"):
        draw(mx.random.split(mx.random.key(0), 3))


def test_values_that_cannot_be_read_yet():
    z, codebook = mx.array(Z[0]), mx.array(CODEBOOK[0])
    fitted = lambda z: dq.kmeans(z, codebook, iterations=3).codebook  # noqa: E731
    assert_same([mx.compile(fitted)(z)], [np.asarray(fitted(z))])
    with pytest.raises(ValueError, match="Cannot vmap over the sorted sequence"):
        mx.vmap(fitted)(mx.stack([z, z]))
    for traced in (mx.compile, mx.vmap):
        with pytest.raises(ValueError, match=r"^quantize: check_finite=True reads the values of z"):
            traced(lambda z: dq.quantize(z, codebook, dq.STE(), check_finite=True).z_q)(
                z[None] if traced is mx.vmap else z
            )


@pytest.mark.parametrize(
    "estimator",
    [dq.FSQ([5, 4, 3]), dq.Residual(dq.FSQ([5, 4, 3]), 2), dq.Product(dq.Residual(dq.FSQ([5]), 2), 3)],
    ids=str,
)
def test_a_rule_over_vectors_alone(estimator):
    """MLX gives the rules of a function of one operand no list of them."""
    rng = np.random.default_rng(0)
    z, g = (mx.array(rng.standard_normal((4, 3)).astype(np.float32)) for _ in range(2))
    expected = np.array(dq.vjp(z, None, estimator)[1](g)[0])
    quantize = lambda z: dq.quantize(z, None, estimator).z_q  # noqa: E731
    np.testing.assert_allclose(np.array(mx.vjp(quantize, [z], [g])[1][0]), expected, rtol=1e-6)
    # The derivative is diagonal.
    np.testing.assert_allclose(np.array(mx.jvp(quantize, [z], [g])[1][0]), expected, rtol=1e-6)
    pulled = lambda z, g: mx.vjp(quantize, [z], [g])[1][0]  # noqa: E731
    batched = mx.vmap(pulled)(mx.stack([z, -z]), mx.stack([g, g]))
    np.testing.assert_allclose(np.array(batched[0]), expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(batched[1]), np.array(pulled(-z, g)), rtol=1e-6)


def test_arguments_that_are_not_mapped_beside_those_that_are():
    rng = np.random.default_rng(0)
    z, g, codebooks = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((6, 4), (6, 4), (3, 5, 4)))

    def pulled(z, codebook):
        return dq.vjp(z, codebook, dq.Radial(dq.Cosine()))[1](g)[0]

    expected = mx.stack([pulled(z, codebook) for codebook in codebooks])
    found = mx.vmap(pulled, in_axes=(None, 0))(z, codebooks)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-6)
    state, indices, batch = dq.ema_init(codebooks[0]), mx.array([0, 1, 2, 0, 1, 4]), mx.stack([z, z + 1])
    moved = mx.vmap(lambda z: dq.ema_update(state, z, codebooks[0], indices)[1])(batch)
    for one, own in zip(moved, batch, strict=True):
        alone = dq.ema_update(state, own, codebooks[0], indices)[1]
        np.testing.assert_allclose(np.array(one), np.array(alone), rtol=1e-6)


@pytest.fixture
def tf32(monkeypatch):
    """Products as a GPU rounds them: operands to ten bits behind the point."""
    from diveq_mlx import product

    plain = mx.matmul

    def rounded(x):
        far = x * (2**13 + 1)
        return mx.where(mx.isfinite(far), far - (far - x), x)

    monkeypatch.setattr(product, "rounds", lambda: True)
    monkeypatch.setattr(mx, "matmul", lambda a, b: plain(rounded(a), rounded(b)))
    return plain


def test_the_search_where_products_are_in_tf32(tf32):
    codebook, z = numbers(500, 2), numbers(2000, 2, seed=1)
    wanted = dq.nearest(z, codebook)
    scores = mx.matmul(mx.array(z), mx.array(codebook).T) - mx.array((codebook**2).sum(1) / 2)
    # What the product rounds shows in the tokens.
    assert (np.asarray(mx.argmax(scores, axis=1)) != wanted).sum() > 10
    np.testing.assert_array_equal(np.asarray(dq.nearest(mx.array(z), mx.array(codebook))), wanted)
    missing = mx.array(np.where(np.arange(2) == 1, np.inf, z[:2]))
    assert np.asarray(dq.nearest(missing, mx.array(codebook))).tolist() == [-1, -1]


def test_products_in_parts_are_those_of_float32(tf32):
    from diveq_mlx.product import matmul

    a, b, g = (numbers(*shape) for shape in ((3, 40, 30), (30, 20), (40, 20)))
    exact = a[0].astype("f8") @ b
    # A few roundings of thirty terms of order one; TF32 is off by a thousandth.
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(matmul(mx.array(a[0]), mx.array(b))), exact, **close)
    assert np.abs(np.asarray(mx.matmul(mx.array(a[0]), mx.array(b))) - exact).max() > 1e-3
    loss = lambda a, b: (matmul(a, b) * mx.array(g)).sum()  # noqa: E731
    to_a, to_b = mx.grad(loss, (0, 1))(mx.array(a[0]), mx.array(b))
    np.testing.assert_allclose(np.asarray(to_a), g.astype("f8") @ b.T, **close)
    np.testing.assert_allclose(np.asarray(to_b), a[0].T.astype("f8") @ g, **close)
    np.testing.assert_allclose(np.asarray(mx.vmap(matmul, (0, None))(mx.array(a), mx.array(b))), a @ b, **close)
    mapped = mx.vmap(mx.grad(loss, (0, 1)), (0, None))(mx.array(a), mx.array(b))
    np.testing.assert_allclose(np.asarray(mapped[1]), np.swapaxes(a, 1, 2) @ g, **close)
    moved = mx.jvp(lambda a: matmul(a, mx.array(b)), [mx.array(a[0])], [mx.array(a[1])])[1][0]
    np.testing.assert_allclose(np.asarray(moved), a[1].astype("f8") @ b, **close)
    # Every digit of a number is in its parts, also of large and small ones.
    for x in (1 + 2.0**-23, 1 / 3, 3e34, 2.0**-100 / 3):
        assert matmul(mx.array([[x]]), mx.array([[1.0]])).item() == np.float32(x)
