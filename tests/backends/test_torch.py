"""PyTorch: what runs in the backward pass is the core's pullback, under every transformation."""

from __future__ import annotations

import pytest

import diveq_core as dq
from diveq_core.estimators.rule import Rule
from torch_cases import (
    CLOSE,
    CLOSE64,
    ESTIMATORS,
    IDS,
    assert_equal,
    gradient_of,
    loss_of,
    own_deprecation,
    problem,
    reference,
    torch,
    whole,
)


class Marked(dq.DiVeQDetach):
    """An estimator whose pullback no automatic differentiation could arrive at."""

    def vjp(self, lib, z, q, noise, g):
        return 3 * g, 5 * g

    def jvp(self, lib, z, q, noise, dz, dq):
        return 7 * dz + 11 * dq


class TestThePullbackInUse:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_backward_is_the_pullback(self, estimator):
        z, codebook, noise = problem()
        loss, g_z, g_codebook = reference(z, codebook, estimator, noise)
        actual = loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q)
        actual.backward()
        assert_equal(actual.detach(), loss, **CLOSE)
        assert_equal(z.grad, g_z, **CLOSE)
        assert_equal(gradient_of(codebook), g_codebook, **CLOSE)

    @pytest.mark.parametrize(
        ("few", "expected"), [(0, ["forward", "pullback"]), (1 << 14, ["linearized"])], ids=["many", "few"]
    )
    def test_backward_calls_the_rules_pullback_once_and_nothing_else(self, few: int, expected, monkeypatch):
        monkeypatch.setattr("diveq_core.estimators.rule._FEW", few)
        calls = []

        def counted(name):
            original = getattr(Rule, name)

            def call(self, *arguments):
                if (out := original(self, *arguments)) is not None:
                    calls.append(name)
                return out

            return call

        for name in ("forward", "pullback", "pushforward", "linearized"):
            monkeypatch.setattr(Rule, name, counted(name))
        z, codebook, noise = problem()
        out = dq.quantize(z, codebook, dq.DiVeQ(), noise=noise)
        assert calls == expected[:1]
        loss_of(out.z_q).backward()
        assert calls == expected

    @pytest.mark.parametrize("transform", [lambda f: f, whole, torch.func.vmap], ids=["eager", "compile", "vmap"])
    def test_a_pullback_that_nobody_else_knows_arrives(self, transform):
        z, codebook, _ = problem()
        rows = z[:, None] if transform is torch.func.vmap else z
        z_q = transform(lambda z: dq.quantize(z, codebook, Marked()).z_q)(rows)
        g_z, g_codebook = torch.autograd.grad(z_q.sum(), (z, codebook))
        assert_equal(g_z, torch.full_like(z, 3))
        counts = dq.usage(dq.nearest(z, codebook), len(codebook))
        assert_equal(g_codebook, 5 * counts[:, None].expand_as(codebook))

    @own_deprecation
    def test_a_pullback_that_nobody_else_knows_arrives_in_torch_func(self):
        z, codebook, _ = (x.detach() for x in problem())

        def f(z, codebook):
            return dq.quantize(z, codebook, Marked()).z_q

        counts = dq.usage(dq.nearest(z, codebook), len(codebook))[:, None].expand_as(codebook)
        g_z, g_codebook = torch.func.grad(lambda *x: f(*x).sum(), argnums=(0, 1))(z, codebook)
        assert_equal(g_z, torch.full_like(z, 3))
        assert_equal(g_codebook, 5 * counts)
        tangents = torch.ones_like(z), torch.ones_like(codebook)
        assert_equal(torch.func.jvp(f, (z, codebook), tangents)[1], torch.full_like(z, 18))


class TestWhoAsksForGradients:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    @pytest.mark.parametrize("wanted", ["z", "codebook"])
    def test_one_gradient_alone(self, estimator, wanted: str):
        z, codebook, noise = problem()
        _, g_z, g_codebook = reference(z, codebook, estimator, noise)
        (codebook if wanted == "z" else z).requires_grad_(False)
        if wanted == "codebook" and not estimator.trains_codebook:
            assert not dq.quantize(z, codebook, estimator, noise=noise).z_q.requires_grad
            return
        loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q).backward()
        if wanted == "z":
            assert_equal(z.grad, g_z, **CLOSE)
            assert codebook.grad is None
        else:
            assert_equal(codebook.grad, g_codebook, **CLOSE)
            assert z.grad is None

    def test_noise_and_indices_get_no_gradient(self):
        z, codebook, noise = problem()
        noise.requires_grad_()
        out = dq.quantize(z, codebook, dq.DiVeQ(), noise=noise)
        loss_of(out.z_q).backward()
        assert noise.grad is None
        assert z.grad is not None
        assert not out.indices.requires_grad

    def test_nothing_is_recorded_where_nobody_asks(self):
        z, codebook, _ = problem()
        with torch.no_grad():
            assert dq.quantize(z, codebook, dq.DiVeQ()).z_q.grad_fn is None
        with torch.inference_mode():
            assert not dq.quantize(z, codebook, dq.DiVeQ()).z_q.requires_grad
        assert not dq.quantize(z.detach(), codebook.detach(), dq.DiVeQ()).z_q.requires_grad

    def test_gradients_accumulate_over_calls_and_backward_passes(self):
        z, codebook, noise = problem()
        _, g_z, g_codebook = reference(z, codebook, dq.DiVeQ(), noise)
        first, second = (loss_of(dq.quantize(z, codebook, dq.DiVeQ(), noise=noise).z_q) for _ in range(2))
        (first + second).backward(retain_graph=True)
        first.backward()
        assert_equal(z.grad, 3 * g_z, **CLOSE)
        assert_equal(codebook.grad, 3 * g_codebook, **CLOSE)

    def test_overwriting_what_the_backward_pass_needs_is_an_error(self):
        z, codebook, _ = problem()
        out = dq.quantize(z, codebook, dq.DiVeQDetach())
        with torch.no_grad():
            z.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.z_q.sum().backward()

    def test_lookup_is_differentiable(self):
        _, codebook, _ = problem()
        (gradient,) = torch.autograd.grad(dq.lookup(torch.tensor([1, 0, 1]), codebook).sum(), codebook)
        assert_equal(gradient[:, 0], torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0]))

    def test_vjp_and_jvp_differentiate_again(self):
        # A pullback of one's own making is a function of tensors like any other.
        z, codebook, noise = problem(dtype=torch.float64)
        out = dq.quantize(z, codebook, dq.DiVeQ(0.5), noise=noise)
        (by_autograd,) = torch.autograd.grad(out.z_q, z, noise, create_graph=True)
        (expected,) = torch.autograd.grad(by_autograd.square().sum(), z)
        _, pullback = dq.vjp(z, codebook, dq.DiVeQ(0.5), noise=noise)
        (actual,) = torch.autograd.grad(pullback(noise)[0].square().sum(), z)
        assert_equal(actual, expected, **CLOSE64)


def sg_expression(z, codebook, indices, estimator, noise):
    """The stop-gradient expression, for plain automatic differentiation."""
    d = codebook[indices] - z
    if isinstance(estimator, dq.Radial):
        r = (d**2).sum(dim=-1, keepdim=True).add(estimator.radius.delta**2).sqrt()
        return z + r * (d / r).detach()
    rho = d.norm(dim=-1, keepdim=True)
    w = d + estimator.sigma * noise
    return z + rho * (w / w.norm(dim=-1, keepdim=True)).detach()


SMOOTH = [dq.DiVeQ(0.5), dq.Radial(dq.PseudoHuber(0.3))]


class TestSecondDerivatives:
    @pytest.mark.parametrize("estimator", SMOOTH, **IDS)
    def test_double_backward(self, estimator):
        z, codebook, noise = problem(dtype=torch.float64)
        indices = dq.nearest(z, codebook)

        def twice(z_q):
            first = torch.autograd.grad(loss_of(z_q), (z, codebook), create_graph=True)
            return torch.autograd.grad(sum((x**2).sum() for x in first), (z, codebook))

        expected = twice(sg_expression(z, codebook, indices, estimator, noise))
        assert_equal(twice(dq.quantize(z, codebook, estimator, noise=noise).z_q), expected, **CLOSE64)

    @own_deprecation
    @pytest.mark.parametrize("estimator", SMOOTH, **IDS)
    def test_hessian(self, estimator):
        z, codebook, noise = (x.detach() for x in problem(rows=2, dtype=torch.float64))
        indices = dq.nearest(z, codebook)
        expected = torch.func.hessian(lambda z: loss_of(sg_expression(z, codebook, indices, estimator, noise)))(z)
        for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
            actual = hessian(lambda z: loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q))(z)
            assert_equal(actual, expected, **CLOSE64)


class TestFunc:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_grad(self, estimator):
        z, codebook, noise = problem()
        _, g_z, g_codebook = reference(z, codebook, estimator, noise)

        def loss(z, codebook):
            return loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q)

        actual = torch.func.grad(loss, argnums=(0, 1))(z.detach(), codebook.detach())
        assert_equal(actual, (g_z, g_codebook), **CLOSE)

    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    @pytest.mark.parametrize("in_dims", [(0, None, 0), (0, 0, 0), (None, 0, None), (1, None, 0)], ids=str)
    def test_vmap(self, estimator, in_dims):
        batches = [[x.detach() for x in problem(seed=seed)] for seed in range(3)]
        stacked = [torch.stack(x) for x in zip(*batches, strict=True)]
        arguments = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked, in_dims, strict=True)]

        def f(z, codebook, noise):
            return tuple(dq.quantize(z, codebook, estimator, noise=noise))

        def gradients(z, codebook, noise):
            return torch.func.grad(lambda *x: loss_of(f(*x, noise)[0]), argnums=(0, 1))(z, codebook)

        z_q, indices = torch.func.vmap(f, in_dims=in_dims)(*arguments)
        g_z, g_codebook = torch.func.vmap(gradients, in_dims=in_dims)(*arguments)
        for batch in range(3):
            one = [x[0] if dim is None else x[batch] for x, dim in zip(stacked, in_dims, strict=True)]
            expected = f(*one)
            assert_equal(z_q[batch], expected[0], **CLOSE)
            assert_equal(indices[batch], expected[1])
            assert_equal((g_z[batch], g_codebook[batch]), gradients(*one), **CLOSE)

    def test_gradient_of_vmap(self):
        z, codebook, noise = problem(rows=4)
        _, g_z, g_codebook = reference(z, codebook, dq.DiVeQ(), noise)

        def row(z, noise):
            return dq.quantize(z, codebook, dq.DiVeQ(), noise=noise).z_q

        loss_of(torch.func.vmap(row)(z, noise)).backward()
        assert_equal(z.grad, g_z, **CLOSE)
        assert_equal(codebook.grad, g_codebook, **CLOSE)

    def test_vmap_of_vmap(self):
        z, codebook, _ = (x.detach() for x in problem(rows=4))
        grid = z[:, None, None, :].expand(4, 2, 1, 3)
        twice = torch.func.vmap(torch.func.vmap(lambda z: dq.nearest(z, codebook)))(grid)
        assert_equal(twice, dq.nearest(z, codebook)[:, None, None].expand(4, 2, 1))

    def test_vmap_draws_noise_as_it_is_told(self):
        z, codebook, _ = (x.detach() for x in problem())
        batch = z.expand(3, *z.shape)

        def draw(randomness: str):
            return torch.func.vmap(lambda z: dq.quantize(z, codebook, dq.NSVQ()).z_q, randomness=randomness)(batch)

        assert not torch.equal(*draw("different")[:2])
        assert torch.equal(*draw("same")[:2])

    @own_deprecation
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_jvp(self, estimator):
        z, codebook, noise = (x.detach() for x in problem())
        dz, dcodebook, _ = (x.detach() for x in problem(seed=1))
        expected = dq.jvp(z, codebook, dz, dcodebook, estimator, noise=noise)[1]

        def f(z, codebook):
            return dq.quantize(z, codebook, estimator, noise=noise).z_q

        assert_equal(torch.func.jvp(f, (z, codebook), (dz, dcodebook))[1], expected, **CLOSE)
        for only in (0, 1):
            tangents = [t if i == only else torch.zeros_like(t) for i, t in enumerate((dz, dcodebook))]
            expected = dq.jvp(z, codebook, *tangents, estimator, noise=noise)[1]
            with torch.autograd.forward_ad.dual_level():
                primals = [z, codebook]
                primals[only] = torch.autograd.forward_ad.make_dual(primals[only], tangents[only])
                actual = torch.autograd.forward_ad.unpack_dual(f(*primals)).tangent
                actual = torch.zeros_like(z) if actual is None else actual
                assert_equal(actual, expected, **CLOSE)

    @own_deprecation
    @pytest.mark.parametrize("estimator", [dq.DiVeQ(), dq.Radial(dq.Power(0.5))], **IDS)
    def test_forward_and_reverse_jacobians_agree(self, estimator):
        z, codebook, noise = (x.detach() for x in problem(rows=2, dtype=torch.float64))

        def f(z, codebook):
            return dq.quantize(z, codebook, estimator, noise=noise).z_q

        forward = torch.func.jacfwd(f, argnums=(0, 1))(z, codebook)
        reverse = torch.func.jacrev(f, argnums=(0, 1))(z, codebook)
        assert_equal(forward, reverse, **CLOSE64)

    def test_check_finite_says_that_it_cannot_while_traced(self):
        z, codebook, _ = problem()
        message = "check_finite=True reads the values of z, which have none while being traced"
        with pytest.raises(ValueError, match=message):
            torch.func.vmap(lambda z: dq.nearest(z, codebook, check_finite=True))(z[None])
        with pytest.raises(Exception, match="check_finite=True reads the values of z"):
            whole(lambda z: dq.nearest(z, codebook, check_finite=True))(z)


@pytest.mark.parametrize("estimator", [dq.STE(), dq.DiVeQDetach()], **IDS)
def test_the_cotangent_stays_the_callers(estimator):
    z, codebook, g = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.ones(6, 4)
    z_q = dq.quantize(z, codebook, estimator).z_q
    for _ in range(2):
        z_q.backward(g, retain_graph=True)
    assert_equal(g, torch.ones(6, 4))


@pytest.mark.parametrize("estimator", [dq.DiVeQDetach(), dq.SFDiVeQDetach()], **IDS)
def test_jacobians_by_the_older_vmap(estimator):
    z, codebook = torch.randn(6, 3), torch.randn(4, 3)
    noise = dq.CurveNoise(torch.rand(3)) if isinstance(estimator, dq.SFDiVeQDetach) else None

    def f(codebook):
        return dq.quantize(z, codebook, estimator, noise=noise).z_q

    by_rows = torch.autograd.functional.jacobian(f, codebook)
    assert_equal(torch.autograd.functional.jacobian(f, codebook, vectorize=True), by_rows, **CLOSE)


@pytest.mark.parametrize("power", [110, -110])
def test_tangents_of_numbers_that_are_hardly_any(power: int):
    z, codebook, _ = (x.detach() * 2.0**power for x in problem())
    estimator = dq.DiVeQDetach()
    tangent = dq.jvp(z, codebook, z, codebook, estimator)[1]
    double = [x.double() for x in (z, codebook)]
    expected = dq.jvp(*double, *double, estimator)[1]
    assert_equal(tangent / 2.0**power, (expected / 2.0**power).float(), rtol=1e-5, atol=1e-5)


def test_traced_by_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    z, codebook, noise = (x.detach() for x in problem())
    f = lambda z, codebook: dq.quantize(z, codebook, dq.DiVeQ(), noise=noise).z_q  # noqa: E731
    try:
        traced = make_fx(f)(z, codebook)
    except RuntimeError as error:
        pytest.fail(f"a value was read while tracing: {error}")
    assert_equal(traced(z + 1, codebook), f(z + 1, codebook), **CLOSE)
