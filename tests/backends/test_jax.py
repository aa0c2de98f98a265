"""JAX: what runs in the backward pass is the core's pullback, under every transformation, x64 on and off."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import diveq_core as dq
from libraries import library_named
from vectors import D, K, N, normal

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.fixture(autouse=True)
def _strict_promotion():
    library_named("jax")


ESTIMATORS = [
    dq.STE(),
    dq.NSVQ(),
    dq.DiVeQ(),
    dq.DiVeQDetach(),
    dq.Radial(dq.Power(0.5)),
    dq.Radial(dq.PseudoHuber(0.3)),
    dq.Radial(dq.PNorm(3.0)),
    dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0]))),
    dq.Radial(dq.Cosine()),
    dq.Radial(lambda q, z: (abs(q - z) ** 1.5).sum(axis=-1)),
]
# For what depends on the form of an estimator alone: without a codebook's gradient, with noise, without.
SOME = [dq.STE(), dq.DiVeQ(), dq.Radial(dq.PseudoHuber(0.3))]
IDS = {"ids": lambda e: type(getattr(e, "radius", e)).__name__}

# The same formula in another order of operations, on numbers of order one.
CLOSE = {"rtol": 2e-5, "atol": 1e-5}
CLOSE64 = {"rtol": 1e-10, "atol": 1e-10}


class Marked(dq.DiVeQDetach):
    """An estimator whose pullback no automatic differentiation could arrive at, not even from its pushforward."""

    def vjp(self, lib, z, q, noise, g):
        return 3 * g, 5 * g

    def jvp(self, lib, z, q, noise, dz, dq):
        return 7 * dz + 11 * dq


def problem(rows: int = 6, count: int = 5, dtype=np.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((n, 3)).astype(dtype)) for n in (rows, count, rows)]


def loss_of(z_q):
    """A loss whose cotangent depends on z_q."""
    return (z_q**3).sum() + (z_q * jnp.linspace(-1, 1, 3, dtype=z_q.dtype)).sum()


def loss(estimator, z, codebook, noise):
    return loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q)


def reference(z, codebook, estimator, noise):
    """Both gradients of the loss by `vjp`, in NumPy unless the radius is a function of JAX arrays."""
    convert = jnp.asarray if isinstance(getattr(estimator, "radius", None), dq.CustomRadius) else np.asarray
    out, pullback = dq.vjp(convert(z), convert(codebook), estimator, noise=convert(noise))
    return pullback(convert(jax.grad(loss_of)(jnp.asarray(out.z_q))))


def assert_close(actual, expected, **tolerance):
    """Equal trees: structure, dtypes, shapes and values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


class TestThePullbackInUse:
    @pytest.mark.parametrize(
        ("estimator", "transform"),
        [
            *((estimator, jax.jit) for estimator in ESTIMATORS),
            *((estimator, transform) for estimator in SOME for transform in (lambda f: f, jax.checkpoint)),
        ],
    )
    def test_grad(self, estimator, transform):
        z, codebook, noise = problem()
        f = transform(lambda *x: loss(estimator, *x))
        value, gradients = jax.value_and_grad(f, argnums=(0, 1))(z, codebook, noise)
        assert_close(gradients, tuple(reference(z, codebook, estimator, noise)), **CLOSE)
        np.testing.assert_allclose(value, loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q), rtol=1e-5)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("estimator", SOME, **IDS)
    def test_with_and_without_64_bits(self, estimator, x64: bool):
        with jax.enable_x64(x64):
            z, codebook, noise = problem(dtype=np.float64)
            assert z.dtype == (jnp.float64 if x64 else jnp.float32)
            gradients = jax.jit(jax.grad(lambda *x: loss(estimator, *x), argnums=(0, 1)))(z, codebook, noise)
            expected = tuple(reference(z, codebook, estimator, noise))
            assert_close(gradients, expected, **(CLOSE64 if x64 else CLOSE))

    def test_counted_calls(self, monkeypatch):
        from diveq_core.estimators.rule import Rule

        calls = []
        original = Rule.pullback

        def counted(self, *arguments):
            calls.append(self)
            return original(self, *arguments)

        monkeypatch.setattr(Rule, "pullback", counted)
        z, codebook, noise = problem()
        value, backward = jax.vjp(lambda z, codebook: loss(dq.DiVeQ(), z, codebook, noise), z, codebook)
        assert not calls
        backward(jnp.ones_like(value))
        assert len(calls) == 1

    def marked(self, f, z, codebook):
        """Gradients that only the marked pullback gives."""
        counts = dq.usage(dq.nearest(z, codebook), len(codebook))[:, None]
        expected = jnp.full_like(z, 3), jnp.broadcast_to(5 * counts, codebook.shape)
        assert_close(jax.grad(f, argnums=(0, 1))(z, codebook), expected)

    @pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
    @pytest.mark.parametrize("inner", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
    def test_a_pullback_that_nobody_else_knows_arrives(self, inner, outer):
        z, codebook, _ = problem()
        quantize = inner(lambda z, c: dq.quantize(z, c, Marked()).z_q)
        self.marked(outer(lambda z, c: quantize(z, c).sum()), z, codebook)

    def test_through_scan(self):
        z, codebook, _ = problem()

        def f(z, codebook):
            step = lambda total, row: (total + dq.quantize(row, codebook, Marked()).z_q.sum(), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros((), z.dtype), z)[0]

        self.marked(f, z, codebook)
        self.marked(jax.jit(f), z, codebook)

    @pytest.mark.parametrize("in_axes", [(0, None), (0, 0)], ids=str)
    def test_through_vmap(self, in_axes):
        z, codebook, _ = problem()

        def f(z, codebook):
            batch = codebook if in_axes[1] is None else jnp.broadcast_to(codebook, (len(z), *codebook.shape))
            return jax.vmap(lambda z, c: dq.quantize(z, c, Marked()).z_q, in_axes)(z, batch).sum()

        self.marked(f, z, codebook)
        self.marked(jax.jit(f), z, codebook)

    def test_through_cond_and_while_and_linearize(self):
        z, codebook, _ = problem()

        def f(z, codebook):
            return jax.lax.cond(z[0, 0] > 100, lambda: 0 * z, lambda: dq.quantize(z, codebook, Marked()).z_q).sum()

        self.marked(f, z, codebook)
        _, linear = jax.linearize(lambda z: dq.quantize(z, codebook, Marked()).z_q, z)
        assert_close(linear(jnp.ones_like(z)), jnp.full_like(z, 7))
        assert_close(jax.linear_transpose(linear, z)(jnp.ones_like(z))[0], jnp.full_like(z, 3))


class TestWhoAsksForGradients:
    @pytest.mark.parametrize("estimator", SOME, **IDS)
    @pytest.mark.parametrize("argument", [0, 1])
    def test_one_gradient_alone(self, estimator, argument: int):
        z, codebook, noise = problem()
        expected = reference(z, codebook, estimator, noise)[argument]
        f = jax.jit(jax.grad(lambda *x: loss(estimator, *x), argnums=argument))
        assert_close(f(z, codebook, noise), expected, **CLOSE)

    @pytest.mark.parametrize("estimator", [dq.NSVQ(), dq.DiVeQ(), dq.DiVeQDetach()], **IDS)
    def test_noise_gets_no_gradient(self, estimator):
        z, codebook, noise = problem()
        assert_close(jax.grad(lambda n: loss(estimator, z, codebook, n))(noise), jnp.zeros_like(noise))

    def test_indices_are_integers_with_no_tangent(self):
        z, codebook, _ = problem()
        out, tangent = jax.jvp(lambda z: dq.quantize(z, codebook, dq.STE()), (z,), (z,))
        assert tangent.indices.dtype == jax.dtypes.float0
        assert jnp.issubdtype(out.indices.dtype, jnp.integer)

    def test_unused_output(self):
        z, codebook, _ = problem()
        gradients = jax.grad(lambda z: dq.quantize(z, codebook, dq.DiVeQDetach()).indices.sum().astype(z.dtype) * 0.0)(
            z
        )
        assert_close(gradients, jnp.zeros_like(z))

    def test_lookup_is_differentiable(self):
        _, codebook, _ = problem()
        gradient = jax.grad(lambda c: dq.lookup(jnp.array([1, 0, 1]), c).sum())(codebook)
        np.testing.assert_array_equal(gradient[:, 0], [1, 2, 0, 0, 0])

    def test_a_key_drawn_inside(self):
        z, codebook, _ = problem()
        for key in (jax.random.key(3), jax.random.PRNGKey(3)):
            noise = jax.random.normal(key, z.shape, z.dtype)

            @jax.jit
            def gradients(z, codebook, key):
                f = lambda *x: loss_of(dq.quantize(*x, dq.DiVeQ(), rng=key).z_q)  # noqa: E731
                return jax.grad(f, argnums=(0, 1))(z, codebook)

            assert_close(gradients(z, codebook, key), tuple(reference(z, codebook, dq.DiVeQ(), noise)), **CLOSE)


class TestForward:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_jvp(self, estimator):
        z, codebook, noise = problem()
        dz, dcodebook, _ = problem(seed=1)

        def by_jax(*tangents):
            f = lambda z, c: dq.quantize(z, c, estimator, noise=noise).z_q  # noqa: E731
            both = jax.jvp(f, (z, codebook), tangents)[1]
            to_z = jax.jvp(lambda z: f(z, codebook), (z,), tangents[:1])[1]
            to_codebook = jax.jvp(lambda c: f(z, c), (codebook,), tangents[1:])[1]
            return both, to_z, to_codebook

        def by_core(*tangents):
            f = lambda *t: dq.jvp(z, codebook, *t, estimator, noise=noise)[1]  # noqa: E731
            zeros = [jnp.zeros_like(t) for t in tangents]
            return f(*tangents), f(tangents[0], zeros[1]), f(zeros[0], tangents[1])

        assert_close(jax.jit(by_jax)(dz, dcodebook), jax.jit(by_core)(dz, dcodebook), **CLOSE)

    @pytest.mark.parametrize("estimator", [dq.DiVeQ(), dq.Radial(dq.Power(0.5)), dq.Radial(dq.Cosine())], **IDS)
    def test_forward_and_reverse_jacobians_agree(self, estimator):
        with jax.enable_x64(True):
            z, codebook, noise = problem(rows=2, dtype=np.float64)
            f = lambda z, c: dq.quantize(z, c, estimator, noise=noise).z_q  # noqa: E731
            forward = jax.jit(jax.jacfwd(f, argnums=(0, 1)))(z, codebook)
            assert_close(forward, jax.jit(jax.jacrev(f, argnums=(0, 1)))(z, codebook), **CLOSE64)


def sg_expression(z, codebook, indices, estimator, noise):
    """The stop-gradient expression, for plain automatic differentiation."""
    d = codebook[indices] - z
    if isinstance(estimator, dq.Radial):
        r = jnp.sqrt((d**2).sum(axis=-1, keepdims=True) + estimator.radius.delta**2)
        return z + r * jax.lax.stop_gradient(d / r)
    rho = jnp.linalg.norm(d, axis=-1, keepdims=True)
    w = d + estimator.sigma * noise
    return z + rho * jax.lax.stop_gradient(w / jnp.linalg.norm(w, axis=-1, keepdims=True))


class TestSecondDerivatives:
    @pytest.mark.parametrize(
        ("estimator", "second"),
        [
            (dq.DiVeQ(0.5), jax.hessian),
            (dq.Radial(dq.PseudoHuber(0.3)), jax.hessian),
            (dq.DiVeQ(0.5), lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums)),
            (dq.Radial(dq.PseudoHuber(0.3)), lambda f, argnums: jax.jacrev(jax.jacfwd(f, argnums), argnums)),
            (dq.DiVeQ(0.5), lambda f, argnums: jax.jacfwd(jax.jacfwd(f, argnums), argnums)),
        ],
        ids=["DiVeQ", "PseudoHuber", "reverse over reverse", "reverse over forward", "forward over forward"],
    )
    def test_second_derivatives(self, estimator, second):
        with jax.enable_x64(True):
            z, codebook, noise = problem(rows=2, count=3, dtype=np.float64)
            indices = dq.nearest(z, codebook)
            plain = lambda z, c: loss_of(sg_expression(z, c, indices, estimator, noise))  # noqa: E731
            actual = jax.jit(second(lambda z, c: loss(estimator, z, c, noise), (0, 1)))(z, codebook)
            assert_close(actual, jax.jit(jax.hessian(plain, (0, 1)))(z, codebook), **CLOSE64)

    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_a_third_derivative_is_finite(self, estimator):
        z, codebook, noise = problem(rows=2)
        f = lambda z: loss(estimator, z, codebook, noise)  # noqa: E731
        second = lambda z: jax.jvp(jax.grad(f), (z,), (noise,))[1]  # noqa: E731
        third = jax.jit(lambda z: jax.jvp(second, (z,), (noise,))[1])(z)
        assert jnp.isfinite(third).all()


class TestVmap:
    @pytest.mark.parametrize(
        ("estimator", "in_axes"),
        [
            *((estimator, (0, 0, 0)) for estimator in ESTIMATORS),
            *((estimator, (0, None, 0)) for estimator in SOME),
            *((dq.DiVeQ(), axes) for axes in [(None, 0, None), (1, None, 0), (0, 2, 1)]),
        ],
    )
    def test_values_and_gradients(self, estimator, in_axes):
        stacked = [jnp.stack(x) for x in zip(*(problem(seed=seed) for seed in range(3)), strict=True)]
        arguments = [
            x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip(stacked, in_axes, strict=True)
        ]

        def f(z, codebook, noise):
            out = dq.quantize(z, codebook, estimator, noise=noise)
            return out, jax.grad(lambda *x: loss(estimator, *x), argnums=(0, 1))(z, codebook, noise)

        actual = jax.jit(jax.vmap(f, in_axes))(*arguments)
        f = jax.jit(f)
        for batch in range(3):
            one = [x[0] if axis is None else x[batch] for x, axis in zip(stacked, in_axes, strict=True)]
            assert_close(jax.tree.map(lambda x, b=batch: x[b], actual), f(*one), **CLOSE)

    @pytest.mark.parametrize("estimator", SOME, **IDS)
    @pytest.mark.parametrize("codebook_axis", [None, 0])
    def test_gradient_of_vmap(self, estimator, codebook_axis):
        batches = [problem(seed=seed) for seed in range(3)]
        z, codebooks, noise = (jnp.stack(x) for x in zip(*batches, strict=True))
        codebook = codebooks[0] if codebook_axis is None else codebooks

        def f(z, codebook):
            return jax.vmap(lambda *x: loss(estimator, *x), (0, codebook_axis, 0))(z, codebook, noise).sum()

        g_z, g_codebook = jax.jit(jax.grad(f, argnums=(0, 1)))(z, codebook)
        each = [reference(z[b], codebooks[0 if codebook_axis is None else b], estimator, noise[b]) for b in range(3)]
        assert_close(g_z, np.stack([x[0] for x in each]), **CLOSE)
        of_codebooks = np.stack([x[1] for x in each])
        assert_close(g_codebook, of_codebooks if codebook_axis == 0 else of_codebooks.sum(axis=0), **CLOSE)

    def test_tangents_alone_are_mapped(self):
        z, codebook, noise = problem(rows=2)
        f = lambda z, c: dq.quantize(z, c, dq.DiVeQ(), noise=noise).z_q  # noqa: E731
        basis = jnp.eye(6, dtype=z.dtype).reshape(6, 2, 3)
        out, pushforward = jax.linearize(f, z, codebook)
        tangents = jax.vmap(lambda dz: pushforward(dz, jnp.zeros_like(codebook)))(basis)
        for tangent, dz in zip(tangents, basis, strict=True):
            expected = dq.jvp(z, codebook, dz, jnp.zeros_like(codebook), dq.DiVeQ(), noise=noise)[1]
            assert_close(tangent, expected, **CLOSE)
        assert out.shape == z.shape

    def test_keys_are_mapped(self):
        z, codebook, _ = problem()
        keys = jax.random.split(jax.random.key(0), 4)
        draws = jax.vmap(lambda key: dq.quantize(z, codebook, dq.NSVQ(), rng=key).z_q)(keys)
        for draw, key in zip(draws, keys, strict=True):
            assert_close(draw, dq.quantize(z, codebook, dq.NSVQ(), rng=key).z_q, **CLOSE)
        assert len(np.unique(np.asarray(draws)[:, 0, 0])) == 4

    def test_vmap_of_vmap_and_of_nothing(self):
        z, codebook, _ = problem(rows=4)
        grid = jnp.broadcast_to(z[:, None, None, :], (4, 2, 1, 3))
        twice = jax.vmap(jax.vmap(lambda z: dq.nearest(z, codebook)))(grid)
        assert_close(twice, jnp.broadcast_to(dq.nearest(z, codebook)[:, None, None], (4, 2, 1)))
        codebooks = jnp.stack([codebook, codebook[::-1]])
        both = jax.vmap(lambda z: jax.vmap(lambda c: dq.nearest(z, c))(codebooks))(z)
        np.testing.assert_array_equal(both[:, 0], 4 - both[:, 1])


class TestJit:
    def test_once_for_a_shape(self):
        traced = []

        @jax.jit
        def step(z, codebook, noise):
            traced.append(z.shape)
            out = dq.quantize(z, codebook, dq.DiVeQ(), noise=noise)
            return out, dq.usage(out.indices, codebook.shape[0])

        for seed in range(3):
            z, codebook, noise = problem(seed=seed)
            out, counts = step(z, codebook, noise)
            assert_close(out.indices, dq.nearest(z, codebook))
            assert counts.sum() == len(z)
        assert len(traced) == 1

    @pytest.mark.parametrize("estimator", [*SOME, ESTIMATORS[7], ESTIMATORS[9]], **IDS)
    def test_estimators_are_static_arguments(self, estimator):
        z, codebook, noise = problem()
        f = jax.jit(lambda z, c, n, estimator: dq.quantize(z, c, estimator, noise=n).z_q, static_argnums=3)
        expected = dq.quantize(z, codebook, estimator, noise=noise).z_q
        for _ in range(2):
            assert_close(f(z, codebook, noise, estimator), expected, **CLOSE)
        assert f._cache_size() == 1

    def test_training_in_a_scan(self):
        key = jax.random.key(0)
        z, codebook, _ = problem(rows=200)

        @jax.jit
        def train(codebook):
            def step(codebook, key):
                def objective(codebook):
                    return ((dq.quantize(z, codebook, dq.DiVeQ(), rng=key).z_q - z) ** 2).mean()

                value, gradient = jax.value_and_grad(objective)(codebook)
                return codebook - 10.0 * gradient, value

            return jax.lax.scan(step, codebook, jax.random.split(key, 80))

        _, losses = train(codebook)
        assert losses[-1] < 0.7 * losses[0]

    def test_the_other_verbs(self):
        z, codebook, noise = problem()

        def verbs(z, codebook, noise):
            out, pullback = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)
            _, tangent = dq.jvp(z, codebook, noise, codebook, dq.DiVeQ(), noise=noise)
            share = dq.positive_share(noise, z, dq.lookup(out.indices, codebook))
            return *pullback(out.z_q), tangent, share, dq.perplexity(dq.usage(out.indices, 5))

        assert_close(jax.jit(verbs)(z, codebook, noise), verbs(z, codebook, noise), **CLOSE)

    def test_shapes_without_values(self):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem()]
        out = jax.eval_shape(lambda z, c, n: dq.quantize(z, c, dq.DiVeQ(), noise=n), *shapes)
        assert out.z_q.shape == (6, 3)
        assert out.indices.shape == (6,)

    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
    def test_check_finite_says_that_it_cannot_while_traced(self, transform):
        z, codebook, _ = problem()
        f = transform(lambda z: dq.quantize(z, codebook, dq.STE(), check_finite=True).z_q.sum())
        with pytest.raises(ValueError, match=r"^quantize: check_finite=True reads the values of z, which have none"):
            f(z[None] if transform is jax.vmap else z)

    def test_nan_shows_under_jit(self):
        z, codebook, _ = problem()
        out = jax.jit(lambda z: dq.quantize(z, codebook, dq.DiVeQDetach()))(z.at[1, 0].set(jnp.nan))
        assert out.indices[1] == -1
        assert jnp.isnan(out.z_q[1]).all()
        assert jnp.isfinite(out.z_q[jnp.array([0, 2, 3, 4, 5])]).all()

    def test_under_debug_nans(self):
        # No NaN appears on the way to a finite result, not even one that is thrown away.
        z, codebook, noise = problem()
        z = z.at[0].set(codebook[0])
        with jax.debug_nans(True):
            for estimator in ESTIMATORS:
                gradients = jax.jit(jax.grad(lambda *x, e=estimator: loss(e, *x), argnums=(0, 1)))(z, codebook, noise)
                assert all(jnp.isfinite(g).all() for g in gradients)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float32"])
    def test_the_default_matmul_precision_does_not_matter(self, precision: str):
        z, codebook, _ = problem(rows=200, count=50)
        estimator = dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0])))
        expected = dq.nearest(np.asarray(z), np.asarray(codebook))
        with jax.default_matmul_precision(precision):
            assert_close(dq.nearest(z, codebook).astype(jnp.int32), expected.astype(np.int32))
            gradient = jax.grad(lambda z: loss(estimator, z, codebook, None))(z)
        assert_close(gradient, reference(z, codebook, estimator, z)[0], **CLOSE)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bit_gradients(self, dtype: str):
        z, codebook, noise = (x.astype(dtype) for x in problem(rows=20))
        wide = [np.asarray(x.astype("float32")) for x in (z, codebook, noise)]
        _, pullback = dq.vjp(*wide[:2], dq.DiVeQ(), noise=wide[2])
        out, backward = jax.vjp(lambda z, c: dq.quantize(z, c, dq.DiVeQ(), noise=noise).z_q, z, codebook)
        assert out.dtype == dtype
        # Computed in float32 and rounded once; half a unit may go to the other side.
        once = {"rtol": 2 * float(jnp.finfo(dtype).eps), "atol": 1e-6}
        for actual, expected in zip(backward(noise), pullback(wide[2]), strict=True):
            assert actual.dtype == dtype
            np.testing.assert_allclose(actual.astype("float32"), expected, **once)

    @pytest.mark.parametrize("z_dtype", ["bfloat16", "float32"])
    def test_mixed_precision_gradients(self, z_dtype: str):
        """Where JAX is told to refuse promotion that is not written out, too."""
        z, codebook, noise = problem(rows=20)
        z, codebook = z.astype(z_dtype), codebook.astype("bfloat16" if z_dtype == "float32" else "float32")
        out, backward = jax.vjp(lambda z, c: dq.quantize(z, c, dq.DiVeQ(), noise=noise).z_q, z, codebook)
        assert out.dtype == jnp.float32
        g_z, g_codebook = backward(noise)
        assert g_z.dtype == z.dtype
        assert g_codebook.dtype == codebook.dtype
        assert (dq.Tokenizer(codebook).encode(z) == dq.nearest(z, codebook)).all()

    def test_a_float32_array_while_64_bits_are_on(self):
        with jax.enable_x64(True):
            z, codebook, noise = problem()
            gradients = jax.grad(lambda *x: loss(dq.DiVeQ(), *x), argnums=(0, 1))(z, codebook, noise)
            assert {g.dtype for g in gradients} == {jnp.dtype("float32")}
            assert_close(gradients, tuple(reference(z, codebook, dq.DiVeQ(), noise)), **CLOSE)


@contextlib.contextmanager
def mesh_of(count: int):
    if len(jax.devices()) < count:
        pytest.skip(f"JAX has {len(jax.devices())} device(s)")
    yield jax.sharding.Mesh(np.array(jax.devices()[:count]), ("batch",))


def test_sharded_rows():
    z, codebook, noise = problem(rows=8)
    with mesh_of(min(2, len(jax.devices()))) as mesh:
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        placed = jax.device_put((z, noise), rows)
        gradients = jax.jit(jax.grad(lambda z, c, n: loss(dq.DiVeQ(), z, c, n), argnums=(0, 1)))(
            placed[0], codebook, placed[1]
        )
        assert_close(gradients, tuple(reference(z, codebook, dq.DiVeQ(), noise)), **CLOSE)


def test_a_radius_that_closes_over_a_traced_number_is_right_or_refused():
    z, codebook = jnp.asarray(normal(N, D)), jnp.asarray(normal(K, D, seed=1))

    def loss(scale, z, codebook):
        radius = dq.CustomRadius(lambda q, z: scale * ((q - z) ** 2).sum(axis=1) + 1)
        return (dq.quantize(z, codebook, dq.Radial(radius)).z_q ** 2).sum()

    scales, by_both = jnp.asarray([1.5, 0.3]), jax.grad(loss, (1, 2))
    wanted = [by_both(float(scale), z, codebook) for scale in scales]
    jitted = jax.jit(by_both)
    mapped = jax.vmap(by_both, (0, None, None))(scales, z, codebook)
    _, scanned = jax.lax.scan(lambda s, scale: (s, by_both(scale, z, codebook)), 0, scales)
    for n, expected in enumerate(wanted):
        for found in (jitted(scales[n], z, codebook), [x[n] for x in mapped], [x[n] for x in scanned]):
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="No constant handler"):
        jax.grad(jax.jit(loss), 1)(1.5, z, codebook)
    for refused in (jax.grad(loss, (0, 1)), jax.grad(jax.checkpoint(loss), 1)):
        with pytest.raises(jax.errors.UnexpectedTracerError):
            refused(1.5, z, codebook)
