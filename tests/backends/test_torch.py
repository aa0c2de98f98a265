"""PyTorch: what runs in the backward pass is the core's pullback, under every transformation."""

from __future__ import annotations

import copy
import io
import shutil
import warnings

import numpy as np
import pytest

import diveq_core as dq
from conftest import run_python
from diveq_core.estimators.rule import Rule

torch = pytest.importorskip("torch")

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
    dq.Radial(lambda q, z: ((q - z).abs() ** 1.5).sum(dim=-1)),
]
IDS = {"ids": lambda e: type(getattr(e, "radius", e)).__name__}

# The same formula in another order of operations, on numbers of order one.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE64 = {"rtol": 1e-10, "atol": 1e-10}

# torch's forward mode compiles decompositions by a function that torch itself has deprecated.
own_deprecation = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Marked(dq.DiVeQDetach):
    """An estimator whose pullback no automatic differentiation could arrive at."""

    def vjp(self, lib, z, q, noise, g):
        return 3 * g, 5 * g

    def jvp(self, lib, z, q, noise, dz, dq):
        return 7 * dz + 11 * dq


def problem(rows: int = 6, count: int = 5, dtype=torch.float32, seed: int = 0):
    """z, codebook and noise; the first two ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 3), (count, 3), (rows, 3)
    z, codebook, noise = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return z.requires_grad_(), codebook.requires_grad_(), noise


def loss_of(z_q):
    """A loss whose cotangent depends on z_q."""
    return (z_q**3).sum() + (z_q * torch.linspace(-1, 1, 3, dtype=z_q.dtype, device=z_q.device)).sum()


def reference(z, codebook, estimator, noise):
    """Loss and its two gradients by `vjp`, in NumPy unless the radius is a function of tensors."""
    by_value = isinstance(getattr(estimator, "radius", None), dq.CustomRadius)
    convert = (lambda x: x.detach()) if by_value else (lambda x: x.detach().numpy())
    out, pullback = dq.vjp(convert(z), convert(codebook), estimator, noise=convert(noise))
    z_q = torch.as_tensor(out.z_q).requires_grad_()
    loss = loss_of(z_q)
    (g,) = torch.autograd.grad(loss, z_q)
    return loss.detach(), *(torch.as_tensor(x) for x in pullback(convert(g)))


def gradient_of(codebook):
    """Its gradient, None read as zeros."""
    return torch.zeros_like(codebook) if codebook.grad is None else codebook.grad


def assert_equal(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def whole(f):
    """``f`` compiled without a graph break, which fullgraph=True makes an error."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


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

    def test_backward_calls_the_rules_pullback_once_and_nothing_else(self, monkeypatch):
        calls = []

        def counted(name):
            original = getattr(Rule, name)

            def call(self, *arguments):
                calls.append(name)
                return original(self, *arguments)

            return call

        for name in ("forward", "pullback", "pushforward"):
            monkeypatch.setattr(Rule, name, counted(name))
        z, codebook, noise = problem()
        out = dq.quantize(z, codebook, dq.DiVeQ(), noise=noise)
        assert calls == ["forward"]
        loss_of(out.z_q).backward()
        assert calls == ["forward", "pullback"]

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


class TestCompile:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_whole(self, estimator):
        z, codebook, noise = problem()
        loss, g_z, g_codebook = reference(z, codebook, estimator, noise)

        def step(z, codebook, noise):
            out = dq.quantize(z, codebook, estimator, noise=noise)
            return loss_of(out.z_q), out.indices

        actual, indices = whole(step)(z, codebook, noise)
        actual.backward()
        assert_equal(actual.detach(), loss, **CLOSE)
        assert_equal(indices, dq.nearest(z, codebook))
        assert_equal(z.grad, g_z, **CLOSE)
        assert_equal(gradient_of(codebook), g_codebook, **CLOSE)

    def test_once_for_a_shape(self):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        @torch.compile(fullgraph=True, backend=backend)
        def step(z, codebook):
            out = dq.quantize(z, codebook, dq.DiVeQ())
            return out.z_q, dq.usage(out.indices, 5), dq.lookup(out.indices, codebook)

        for seed in range(3):
            z, codebook, _ = problem(seed=seed)
            _, counts, rows = step(z, codebook)
            assert counts.sum() == len(z)
            assert_equal(rows, codebook[dq.nearest(z, codebook)])
        assert len(graphs) == 1

    def test_drawn_noise_and_other_shapes(self):
        step = whole(lambda z, codebook: dq.quantize(z, codebook, dq.NSVQ()).z_q)
        for rows in (6, 9, 11):
            z, codebook, _ = problem(rows=rows)
            first, second = step(z, codebook), step(z, codebook)
            assert first.shape == z.shape
            assert not torch.equal(first, second)

    def test_the_other_verbs(self):
        z, codebook, noise = (x.detach() for x in problem())

        def verbs(z, codebook, noise):
            out, pullback = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)
            _, tangent = dq.jvp(z, codebook, noise, codebook, dq.DiVeQ(), noise=noise)
            share = dq.positive_share(noise, z, dq.lookup(out.indices, codebook))
            counts = dq.usage(dq.nearest(z, codebook), codebook.shape[0])
            return *pullback(out.z_q), tangent, share, dq.perplexity(counts)

        assert_equal(whole(verbs)(z, codebook, noise), verbs(z, codebook, noise), **CLOSE)

    @pytest.mark.parametrize("first", ["quantize", "nearest", "vjp"])
    def test_a_compiled_call_may_be_the_first(self, first: str):
        # Warnings inside torch while it compiles are its own.
        code = f"""
            import warnings
            warnings.simplefilter("default")
            import torch
            import diveq_core as dq

            calls = {{
                "quantize": lambda z, c: dq.quantize(z, c, dq.DiVeQ()).z_q,
                "nearest": lambda z, c: dq.nearest(z, c),
                "vjp": lambda z, c: dq.vjp(z, c, dq.DiVeQDetach())[1](z)[0],
            }}
            f = torch.compile(calls[{first!r}], fullgraph=True, backend="aot_eager")
            print(len(f(torch.randn(4, 3), torch.randn(5, 3))))
        """
        assert run_python(code) == "4\n"

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_with_inductor(self):
        torch._dynamo.reset()
        z, codebook, noise = problem()
        _, g_z, g_codebook = reference(z, codebook, dq.DiVeQ(), noise)

        @torch.compile(fullgraph=True)
        def step(z, codebook, noise):
            return loss_of(dq.quantize(z, codebook, dq.DiVeQ(), noise=noise).z_q)

        step(z, codebook, noise).backward()
        assert_equal(z.grad, g_z, **CLOSE)
        assert_equal(codebook.grad, g_codebook, **CLOSE)

    def test_export(self):
        z, codebook, _ = (x.detach() for x in problem())
        exported = torch.export.export(Quantizer(dq.DiVeQDetach(), codebook), (z,))
        assert_equal(exported.module()(z).detach(), codebook[dq.nearest(z, codebook)])

    def test_an_exported_program_is_loaded_in_another_process(self, tmp_path):
        z, codebook, _ = (x.detach() for x in problem())
        exported = torch.export.export(Quantizer(dq.DiVeQDetach(), codebook), (z,))
        torch.export.save(exported, tmp_path / "program.pt2")
        torch.save((z, codebook[dq.nearest(z, codebook)]), tmp_path / "expected.pt")
        code = """
            import pathlib, sys, warnings
            warnings.simplefilter("ignore")
            import torch
            import diveq_torch
            folder = pathlib.Path(sys.argv[1])
            z, expected = torch.load(folder / "expected.pt")
            print(torch.equal(torch.export.load(folder / "program.pt2").module()(z), expected))
        """
        assert run_python(code, str(tmp_path)) == "True\n"


REFUSED = {
    "jagged": lambda x: torch.nested.as_nested_tensor([x[:2], x[2:]], layout=torch.jagged),
    "nested": lambda x: torch.nested.as_nested_tensor([x[:2], x[2:]], layout=torch.strided),
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
}
VERBS = {
    "nearest": dq.nearest,
    "quantize": lambda z, c: dq.quantize(z, c, dq.STE()),
    "vjp": lambda z, c: dq.vjp(z, c, dq.Residual(dq.DiVeQ(), 2)),
    "jvp": lambda z, c: dq.jvp(z, c, z, c, dq.STE()),
    "fsq": lambda z, c: dq.fsq(z, [5, 4, 3]),
    "normalize": lambda z, c: dq.normalize(z),
    "nearest_cosine": dq.nearest_cosine,
    "codebook_loss": lambda z, c: dq.codebook_loss(z, c, torch.zeros(6, dtype=torch.int64)),
    "gumbel_quantize": lambda z, c: dq.gumbel_quantize(z, c[:3], dq.GumbelST()),
    "linear_codebook": lambda z, c: dq.linear_codebook(z, c[:3]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_dense_is_refused(verb: str, layout: str):
    z, codebook, _ = (x.detach() for x in problem())
    with pytest.raises(
        TypeError, match=rf"^{verb}: .* must be a dense array .*, got a (nested )?tensor of layout torch"
    ):
        VERBS[verb](REFUSED[layout](z), codebook)


def test_sharding_by_fsdp(tmp_path):
    """In a process of its own, whose group has no other."""
    code = """
        import sys
        import numpy as np
        import torch
        import diveq_core as dq
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        class Quantizer(torch.nn.Module):
            def __init__(self, estimator):
                super().__init__()
                generator = torch.Generator().manual_seed(0)
                self.codebook = torch.nn.Parameter(torch.randn(8, 3, generator=generator))
                self.weight = torch.nn.Parameter(torch.eye(3))
                self.estimator = estimator

            def forward(self, z, noise):
                return dq.quantize(z @ self.weight, self.codebook, self.estimator, noise=noise).z_q @ self.weight

        torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        radii = (dq.Power(), dq.PseudoHuber(), dq.PNorm(), dq.Mahalanobis(np.diag([1.0, 2.0, 3.0])), dq.Cosine())
        estimators = [dq.STE(), dq.NSVQ(), dq.DiVeQ(), dq.DiVeQDetach(), dq.Rotation(), *map(dq.Radial, radii)]
        z, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
        for estimator in (*estimators, dq.Residual(dq.DiVeQDetach(), 2)):
            pair = [Quantizer(estimator), Quantizer(estimator)]
            fully_shard(pair[1], mesh=mesh)
            optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in pair]
            own = None if isinstance(estimator, dq.Residual) else noise
            for _ in range(2):
                for module, optimizer in zip(pair, optimizers):
                    optimizer.zero_grad()
                    module(z, own).pow(3).sum().backward()
                whole = pair[0].codebook.grad
                whole = torch.zeros(8, 3) if whole is None else whole
                assert isinstance(pair[1].codebook, torch.distributed.tensor.DTensor)
                sharded = pair[1].codebook.grad
                sharded = torch.zeros(8, 3) if sharded is None else sharded.full_tensor()
                torch.testing.assert_close(sharded, whole)
                assert (whole != 0).any() == (estimator not in (dq.STE(), dq.Rotation()))
                torch.testing.assert_close(pair[1].weight.grad.full_tensor(), pair[0].weight.grad)
                for optimizer in optimizers:
                    optimizer.step()
                torch.testing.assert_close(pair[1].codebook.full_tensor(), pair[0].codebook)
        torch.distributed.destroy_process_group()
        print("done")
    """
    assert run_python(code, str(tmp_path)) == "done\n"


MAHALANOBIS = dq.Mahalanobis(np.diag([1.0, 2.0, 3.0]))

TRANSFORMS = {
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.cos(z),))[1],
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z),
    "vmap of grad": lambda f, z: torch.func.vmap(torch.func.grad(lambda z: (f(z) ** 3).sum()))(z),
    "hessian": lambda f, z: torch.func.hessian(lambda z: (f(z) ** 3).sum())(z),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_compiled_function(name: str, backend: str):
    """All in one graph: compiling each by itself takes as long for each."""
    torch._dynamo.reset()
    z, codebook, _ = (x.detach() for x in problem(rows=3))
    noise = torch.linspace(-1, 1, 3)
    words = codebook[:3]
    quantizers = [
        *(
            lambda z, e=e: dq.quantize(z, codebook, e, noise=noise.expand_as(z)).z_q
            for e in (dq.STE(), dq.DiVeQ(), dq.Rotation(), *map(dq.Radial, (dq.PseudoHuber(0.3), MAHALANOBIS)))
        ),
        lambda z: dq.quantize(z, codebook, dq.Residual(dq.DiVeQDetach(), 2)).z_q,
        lambda z: dq.fsq(z, [5, 4, 3]).z_q,
        lambda z: dq.gumbel_quantize(z, words, dq.GumbelST(), noise=torch.zeros_like(z)).z_q,
    ]

    def all_of_them(z):
        return [TRANSFORMS[name](f, z) for f in quantizers]

    compiled = torch.compile(all_of_them, fullgraph=True, backend=backend)(z)
    for actual, expected in zip(compiled, all_of_them(z), strict=True):
        assert_equal(actual, expected, **CLOSE)


class TestPrecision:
    @pytest.mark.parametrize("estimator", [dq.DiVeQ(), ESTIMATORS[7]], **IDS)
    def test_autocast_rounds_nothing_here(self, estimator):
        z, codebook, noise = problem(rows=200, count=50)
        expected = dq.nearest(z, codebook)
        _, g_z, g_codebook = reference(z, codebook, estimator, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = dq.quantize(z, codebook, estimator, noise=noise)
            loss = loss_of(out.z_q)
            inside = torch.autograd.grad(loss, (z, codebook), retain_graph=True)
        assert_equal(out.indices, expected)
        assert out.z_q.dtype == torch.float32
        loss.backward()
        for g in ((z.grad, codebook.grad), inside):
            # Up to 50 rows add up for a codeword.
            assert_equal(g, (g_z, g_codebook), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_layer_in_autocast_with_a_float32_codebook(self, dtype):
        z, codebook, noise = problem(rows=20)
        layer = torch.nn.Linear(3, 3)
        with torch.autocast("cpu", dtype=dtype):
            hidden = layer(z)
            assert hidden.dtype == dtype
            out = dq.quantize(hidden, codebook, dq.DiVeQ(), noise=noise)
        out.z_q.square().mean().backward()
        assert out.z_q.dtype == torch.float32
        assert torch.isfinite(layer.weight.grad).all()
        assert layer.weight.grad.abs().sum() > 0
        assert torch.isfinite(codebook.grad).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bit_gradients(self, dtype):
        z, codebook, noise = (x.detach().to(dtype) for x in problem(rows=20))
        wide = [x.float() for x in (z, codebook, noise)]
        _, pullback = dq.vjp(*wide[:2], dq.DiVeQ(), noise=wide[2])
        z_q = dq.quantize(z.requires_grad_(), codebook.requires_grad_(), dq.DiVeQ(), noise=noise).z_q
        assert z_q.dtype == dtype
        z_q.backward(noise)
        # Computed in float32 and rounded once; half a unit may go to the other side.
        once = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        for actual, expected in zip((z.grad, codebook.grad), pullback(wide[2]), strict=True):
            assert actual.dtype == dtype
            assert_equal(actual.float(), expected, **once)

    def test_default_dtype_does_not_matter(self):
        z, codebook, noise = (x.detach() for x in problem())
        _, pullback = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)
        expected = pullback(noise)
        torch.set_default_dtype(torch.float64)
        try:
            out, pullback = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)
            actual = pullback(noise)
            drawn = dq.quantize(z, codebook, dq.DiVeQ()).z_q
        finally:
            torch.set_default_dtype(torch.float32)
        assert out.z_q.dtype == drawn.dtype == torch.float32
        assert_equal(actual, expected)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("estimator", [dq.STE(), dq.DiVeQ(), dq.Radial(dq.PseudoHuber(0.3))], **IDS)
@own_deprecation
def test_dual_numbers_and_compiled_functions(estimator, backend: str, inside: bool):
    forward_ad = torch.autograd.forward_ad
    torch._dynamo.reset()
    z, codebook, noise = (x.detach() for x in problem())
    tangents = torch.cos(z), torch.sin(codebook)

    def quantize(z, codebook):
        return dq.quantize(z, codebook, estimator, noise=noise).z_q

    def pushed(quantize):
        with forward_ad.dual_level():
            pair = (forward_ad.make_dual(*each) for each in zip((z, codebook), tangents, strict=True))
            return forward_ad.unpack_dual(quantize(*pair))

    if inside:
        value, tangent = torch.compile(lambda: tuple(pushed(quantize)), fullgraph=True, backend=backend)()
    else:
        compiled = torch.compile(quantize, fullgraph=True, backend=backend)
        compiled(z, codebook)
        value, tangent = pushed(compiled)
    out, expected = dq.jvp(z, codebook, *tangents, estimator, noise=noise)
    assert_equal(value, out.z_q, **CLOSE)
    assert tangent is not None
    assert_equal(tangent, expected, **CLOSE)


@pytest.mark.parametrize("transformed", [False, True], ids=["backward", "torch.func"])
def test_copies_of_a_matrix_compile_once(transformed: bool):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    z, codebook, _ = problem()

    def loss(z, estimator):
        return (dq.quantize(z, codebook.detach(), estimator).z_q ** 3).sum()

    def f(z, estimator):
        return torch.func.grad(loss)(z, estimator) if transformed else loss(z, estimator)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    estimator = dq.Radial(MAHALANOBIS)
    for each in (estimator, copy.deepcopy(estimator), dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0])))):
        assert_equal(compiled(z.detach() if transformed else z, each), f(z.detach(), each), **CLOSE)
    assert counter.frame_count == 1
    other = dq.Radial(dq.Mahalanobis(np.diag([9.0, 2.0, 3.0])))
    assert_equal(compiled(z.detach() if transformed else z, other), f(z.detach(), other), **CLOSE)


def moved_by_averages(codebook, z, indices):
    """What moving averages write, far from what was there."""
    return dq.ema_update(dq.ema_init(codebook), codebook, z.detach(), indices, decay=0.1)[1] * 3


class TestTheCodebookIsOverwritten:
    """Between forward and backward, as moving averages in ``forward`` do."""

    WRITES = {
        "copy_": lambda codebook, new: codebook.copy_(new),
        "data": lambda codebook, new: codebook.data.mul_(0.5),
    }

    @pytest.mark.parametrize("estimator", [*ESTIMATORS, dq.Rotation(), dq.SFDiVeQ(), dq.SFDiVeQDetach()], **IDS)
    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
    def test_the_gradient_is_of_the_one_that_was_used(self, estimator, write: str, checkpointed: bool):
        z, codebook, noise = problem()
        codebook.requires_grad_(False)
        if isinstance(estimator, (dq.SFDiVeQ, dq.SFDiVeQDetach)):
            noise = dq.CurveNoise(torch.linspace(0.1, 0.9, 4), torch.stack([noise, -noise]))
        _, pullback = dq.vjp(z.detach(), codebook.clone(), estimator, noise=noise)

        def forward(z):
            out = dq.quantize(z, codebook, estimator, noise=noise)
            new = moved_by_averages(codebook, z, out.indices)
            with torch.no_grad():
                self.WRITES[write](codebook, new)
            return out.z_q

        checkpoint = torch.utils.checkpoint.checkpoint
        z_q = checkpoint(forward, z, use_reentrant=False) if checkpointed else forward(z)
        g = torch.linspace(-1, 1, 18).reshape(6, 3)
        z_q.backward(g)
        assert_equal(z.grad, pullback(g)[0], **CLOSE)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_in_a_compiled_function(self, backend: str):
        """All in one graph: compiling each by itself takes as long for each."""
        if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("inductor compiles C++ for the CPU")
        torch._dynamo.reset()
        z, codebook, noise = problem()
        curve_noise = dq.CurveNoise(torch.linspace(0.1, 0.9, 4), torch.stack([noise, -noise]))
        quantizers = [
            *((e, noise, False) for e in (dq.STE(), dq.DiVeQ(), dq.Rotation(), dq.Radial(dq.PseudoHuber(0.3)))),
            (dq.SFDiVeQDetach(), curve_noise, False),
            (dq.Residual(dq.DiVeQDetach(), 2), None, False),
            *((e, noise, True) for e in (dq.DiVeQ(), dq.Rotation())),
        ]
        if backend == "inductor":
            # It takes seconds for each, and what it does to writes it does to all alike.
            quantizers = [quantizers[2], quantizers[-2]]
        codebooks = [codebook.detach().clone() for _ in quantizers]

        def forward(z, codebooks):
            found = []
            for (estimator, own, cloned), words in zip(quantizers, codebooks, strict=True):
                out = dq.quantize(z, words.clone() if cloned else words, estimator, noise=own)
                new = moved_by_averages(words, z, out.indices.reshape(len(z), -1)[:, 0])
                with torch.no_grad():
                    words.copy_(new)
                found.append(out.z_q)
            return found

        found = torch.compile(forward, fullgraph=True, backend=backend)(z, codebooks)
        g = torch.linspace(-1, 1, 18).reshape(6, 3)
        for (estimator, own, _), z_q, words in zip(quantizers, found, codebooks, strict=True):
            assert not torch.equal(words, codebook)
            (g_z,) = torch.autograd.grad(z_q, z, g, retain_graph=True)
            assert_equal(g_z, dq.vjp(z.detach(), codebook.detach(), estimator, noise=own)[1](g)[0], **CLOSE)

    @pytest.mark.parametrize("composite", [dq.Residual(dq.Rotation(), 2), dq.Product(dq.DiVeQDetach(), 3)], ids=repr)
    def test_a_composite(self, composite):
        z, codebook, _ = problem()
        words = codebook.detach()[:, : 1 if isinstance(composite, dq.Product) else 3].clone()
        _, pullback = dq.vjp(z.detach(), words.clone(), composite)
        z_q = dq.quantize(z, words, composite).z_q
        words.mul_(-2.0)
        z_q.backward(z_q.detach())
        assert_equal(z.grad, pullback(z_q.detach())[0], **CLOSE)

    def test_gumbel_reads_the_whole_codebook(self):
        logits, codebook, _ = problem()
        logits, words = torch.randn(4, 5, requires_grad=True), codebook.detach().clone()
        noise = torch.zeros(4, 5)
        _, pullback = dq.gumbel_vjp(logits.detach(), words.clone(), dq.GumbelST(), noise=noise)
        z_q = dq.gumbel_quantize(logits, words, dq.GumbelST(), noise=noise).z_q
        words.mul_(-2.0)
        z_q.backward(z_q.detach())
        assert_equal(logits.grad, pullback(z_q.detach())[0], **CLOSE)

    @pytest.mark.parametrize("estimator", [dq.STE(), dq.Rotation(), dq.DiVeQ()], **IDS)
    def test_an_output_may_be_overwritten_too(self, estimator):
        z, codebook, noise = problem()
        _, g_z, _ = (None, *dq.vjp(z.detach(), codebook.detach(), estimator, noise=noise)[1](torch.ones(6, 3)))
        z_q = dq.quantize(z, codebook.detach(), estimator, noise=noise).z_q
        z_q.add_(1.0)
        z_q.sum().backward()
        assert_equal(z.grad, g_z, **CLOSE)

    def test_a_trained_codebook_may_not(self):
        z, codebook, _ = problem()
        z_q = dq.quantize(z, codebook, dq.DiVeQDetach()).z_q
        with torch.no_grad():
            codebook.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z_q.sum().backward()

    @pytest.mark.parametrize("estimator", [dq.STE(), dq.Rotation(), dq.DiVeQ()], **IDS)
    def test_a_codebook_of_inference_mode(self, estimator):
        z, codebook, noise = problem()
        with torch.inference_mode():
            words = codebook.clone()
        _, pullback = dq.vjp(z.detach(), codebook.detach(), estimator, noise=noise)
        dq.quantize(z, words, estimator, noise=noise).z_q.sum().backward()
        assert_equal(z.grad, pullback(torch.ones(6, 3))[0], **CLOSE)

    @pytest.mark.parametrize("estimator", [dq.STE(), dq.Rotation()], **IDS)
    def test_weight_decay_leaves_a_codebook_that_gets_no_gradient(self, estimator):
        z, codebook, _ = problem()
        before = codebook.detach().clone()
        optimizer = torch.optim.AdamW([codebook], weight_decay=0.5)
        dq.quantize(z, codebook, dq.Residual(estimator, 2)).z_q.sum().backward()
        assert codebook.grad is None
        optimizer.step()
        assert_equal(codebook.detach(), before)


class TestMemory:
    @pytest.mark.parametrize(
        ("estimator", "noisy"),
        [(dq.STE(), 0), (dq.DiVeQDetach(), 0), (dq.Radial(dq.PseudoHuber()), 0), (dq.DiVeQ(), 1), (dq.NSVQ(), 1)],
    )
    def test_what_is_saved_between_forward_and_backward(self, estimator, noisy: int):
        z, codebook, _ = problem(rows=100)
        saved = {}

        def pack(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            z_q = dq.quantize(z, codebook, estimator).z_q
        for own in (z, codebook):
            saved.pop(own.untyped_storage().data_ptr(), None)
        # The indices alone, and the noise where there is any; nothing where nothing is read.
        expected = [] if estimator.constant else [8 * len(z)] + noisy * [4 * z.numel()]
        assert sorted(saved.values()) == sorted(expected)
        z_q.sum().backward()
        assert z.grad is not None

    def test_straight_through_keeps_nothing_alive(self):
        z, codebook, _ = problem()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            dq.quantize(z, codebook, dq.STE())
        assert saved == []

    def test_activation_checkpointing_draws_the_same_noise_again(self):
        z, codebook, _ = problem()

        def f(z, codebook):
            return loss_of(dq.quantize(z, codebook, dq.DiVeQ(1.0)).z_q)

        def again(z, codebook):
            return torch.utils.checkpoint.checkpoint(f, z, codebook, use_reentrant=False)

        gradients = []
        for loss in (f, again):
            torch.manual_seed(0)
            gradients.append(torch.autograd.grad(loss(z, codebook), (z, codebook)))
        assert_equal(*gradients)


class Quantizer(torch.nn.Module):
    def __init__(self, estimator, codebook=None):
        super().__init__()
        codebook = torch.linspace(-1, 1, 15).reshape(5, 3) if codebook is None else codebook
        self.codebook = torch.nn.Parameter(codebook)
        self.estimator = estimator

    def forward(self, z):
        return dq.quantize(z, self.codebook, self.estimator).z_q


class TestModules:
    def test_a_codebook_trains(self):
        torch.manual_seed(0)
        z = torch.randn(200, 3)
        module = Quantizer(dq.DiVeQ())
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (module(z) - z).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    @pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if "lambda" not in repr(e)], **IDS)
    def test_copy_and_save(self, estimator):
        module = Quantizer(estimator)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        z, _, _ = problem()
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            gradients = []
            for m in (module, other):
                torch.manual_seed(0)
                pair = torch.autograd.grad(loss_of(m(z)), (z, m.codebook), materialize_grads=True)
                gradients.append(pair)
            assert_equal(*gradients)

    def test_tensor_subclasses_keep_their_class(self):
        class Named(torch.Tensor):
            pass

        z, codebook, noise = problem()
        _, g_z, _ = reference(z, codebook, dq.DiVeQ(), noise)
        named = z.detach().as_subclass(Named).requires_grad_()
        out = dq.quantize(named, codebook, dq.DiVeQ(), noise=noise)
        assert isinstance(out.z_q, Named)
        loss_of(out.z_q).backward()
        assert_equal(named.grad.as_subclass(torch.Tensor), g_z, **CLOSE)

    @pytest.mark.parametrize("transform", [lambda f: f, whole, torch.func.vmap], ids=["eager", "compile", "vmap"])
    @pytest.mark.parametrize("kind", ["read-only", "tensor", "float32"])
    def test_a_matrix_of_numpy_or_torch(self, kind: str, transform):
        matrix = np.diag([1.0, 2.0, 3.0])
        z, codebook, noise = problem()
        _, g_z, _ = reference(z, codebook, dq.Radial(dq.Mahalanobis(matrix)), noise)
        matrix.flags.writeable = False
        matrix = {"read-only": matrix, "tensor": torch.tensor(matrix), "float32": matrix.astype(np.float32)}[kind]
        estimator = dq.Radial(dq.Mahalanobis(matrix))
        rows = z[:, None] if transform is torch.func.vmap else z
        loss_of(transform(lambda z: dq.quantize(z, codebook, estimator).z_q)(rows)).backward()
        assert_equal(z.grad, g_z, **CLOSE)

    def test_layouts_of_memory(self):
        z, codebook, noise = problem(rows=6)
        _, g_z, g_codebook = reference(z, codebook, dq.DiVeQ(), noise)
        turned = [x.detach().T.contiguous().T for x in (z, codebook, noise)]
        assert not turned[0].is_contiguous()
        turned[:2] = [x.requires_grad_() for x in turned[:2]]
        loss_of(dq.quantize(turned[0], turned[1], dq.DiVeQ(), noise=turned[2]).z_q).backward()
        assert_equal(turned[0].grad, g_z, **CLOSE)
        assert_equal(turned[1].grad, g_codebook, **CLOSE)
        expanded = z.detach()[:1].expand(4, 3)
        assert_equal(dq.nearest(expanded, codebook), dq.nearest(z[:1], codebook).expand(4))

    def test_no_values_needed_for_shapes(self):
        z, codebook = torch.empty(4, 3, device="meta"), torch.empty(5, 3, device="meta")
        out = dq.quantize(z, codebook, dq.DiVeQ())
        assert out.z_q.shape == (4, 3)
        assert out.indices.shape == (4,)
        assert out.z_q.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
class TestCUDA:
    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_the_same_numbers(self, estimator):
        z, codebook, noise = problem(rows=300, count=40)
        _, g_z, g_codebook = reference(z, codebook, estimator, noise)
        there = [x.detach().cuda().requires_grad_() for x in (z, codebook)]
        out = dq.quantize(*there, estimator, noise=noise.cuda())
        assert out.indices.device == there[0].device
        assert_equal(out.indices.cpu(), dq.nearest(z, codebook))
        loss_of(out.z_q).backward()
        # Tens of rows add up for a codeword, in any order.
        assert_equal(there[0].grad.cpu(), g_z, rtol=1e-4, atol=1e-4)
        assert_equal(there[1].grad.cpu(), g_codebook, rtol=1e-4, atol=1e-4)

    def test_nothing_waits_for_the_device(self):
        z, codebook = (x.detach().cuda().requires_grad_() for x in problem()[:2])
        dq.quantize(z, codebook, dq.DiVeQ()).z_q.sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            dq.quantize(z, codebook, dq.DiVeQ()).z_q.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert z.grad.isfinite().all()

    def test_a_generator_of_the_device(self):
        z, codebook = (x.detach().cuda() for x in problem()[:2])
        first, second = (
            dq.quantize(z, codebook, dq.NSVQ(), rng=torch.Generator("cuda").manual_seed(0)).z_q for _ in range(2)
        )
        assert_equal(first, second)

    def test_two_devices_are_refused_by_torch(self):
        z, codebook, _ = problem()
        with pytest.raises(RuntimeError, match="device"):
            dq.nearest(z.cuda(), codebook)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_search_multiplies_in_full_float32_and_leaves_the_setting(precision, monkeypatch):
    """TF32 and bfloat16 keep too few digits to tell codewords apart; what the user allows elsewhere stays allowed."""
    before, matmul, seen = torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul, []
    multiply = torch.mm

    def recorded(*arguments, **options):
        seen.append(matmul.fp32_precision)
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "mm", recorded)
    torch.set_float32_matmul_precision(precision)
    try:
        allowed = matmul.fp32_precision
        # Apart by less than TF32 and bfloat16 can tell, and than float32 can by far.
        codebook = torch.eye(4, 40) + torch.linspace(0, 2**-12, 4)[:, None] * torch.ones(40)
        codebook = torch.cat([codebook, codebook + 2**-12])
        # So many that the product is torch's.
        assert_equal(dq.nearest(codebook.repeat(128, 1), codebook), torch.arange(8).repeat(128))
        # What is not torch's product is NumPy's, which has but one precision.
        assert set(seen) == ({"ieee"} if allowed in ("ieee", "none") else set())
        assert matmul.fp32_precision == allowed
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


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


class TestEagerShortcuts:
    """Past the dispatcher and past `setup_context`, where nothing waits there."""

    def test_a_mode_still_sees_the_operator(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        z, codebook, _ = problem()
        found = dq.nearest(z, codebook)
        with Mode():
            assert_equal(dq.nearest(z, codebook), found)
        assert "diveq_core.nearest.default" in seen

    def test_a_traced_graph_holds_the_operator(self):
        z, codebook, _ = problem()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda z, codebook: dq.nearest(z, codebook), (z.detach(), codebook.detach()))
        assert "diveq_core::nearest" in str(traced.graph)
        assert_equal(traced(-z.detach(), codebook.detach()), dq.nearest(-z, codebook))

    def test_indices_are_in_memory_that_can_be_resized(self):
        for dtype in (torch.float32, torch.bfloat16):
            z, codebook = (x.detach().to(dtype) for x in problem()[:2])
            found = dq.nearest(z, codebook)
            assert found.untyped_storage().resizable()
            assert codebook.untyped_storage().resizable()

    @pytest.mark.parametrize("noted", ["nothing", "a mode's operators"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_the_same_either_way(self, dtype: torch.dtype, noted: str, monkeypatch: pytest.MonkeyPatch):
        if noted != "nothing":
            import diveq_torch

            monkeypatch.setattr(diveq_torch, "nearest_plain", diveq_torch.nearest_rows)
        rng = torch.Generator().manual_seed(0)
        z, codebook = (torch.randn(n, 16, generator=rng).to(dtype) for n in (3000, 40))
        z[5] = float("nan")
        expected = (z.double()[:, None] - codebook.double()).square().sum(-1).argmin(1)
        expected[5] = -1
        for rows in (0, 1, 64, 3000):
            assert_equal(dq.nearest(z[:rows], codebook), expected[:rows])

    @pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
    def test_derivatives_are_those_of_the_function_in_two_parts(self, estimator, monkeypatch: pytest.MonkeyPatch):
        from diveq_torch import bind

        def derivatives():
            z, codebook, noise = problem(dtype=torch.float64)
            z_q = dq.quantize(z, codebook, estimator, noise=noise).z_q
            known = torch.autograd.grad(loss_of(z_q), (z, codebook), create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in known), (z, codebook), materialize_grads=True)
            functions = [z_q.grad_fn, *(function for function, _ in z_q.grad_fn.next_functions)]
            return {type(function).__name__ for function in functions}, known + second

        names, own = derivatives()
        monkeypatch.setattr(bind, "_Eager", bind._Both)
        others, expected = derivatives()
        assert "_EagerBackward" in names
        assert "_BothBackward" in others
        for a, b in zip(own, expected, strict=True):
            assert_equal(a, b)
