"""PyTorch: compiled, exported, and transformed inside of what is compiled."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest

import diveq_core as dq
from processes import run_python
from torch_cases import (
    CLOSE,
    ESTIMATORS,
    IDS,
    MAHALANOBIS,
    Quantizer,
    assert_equal,
    gradient_of,
    loss_of,
    own_deprecation,
    problem,
    reference,
    torch,
    whole,
)


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


TRANSFORMS = {
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (torch.cos(z),))[1],
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z),
    "vmap of grad": lambda f, z: torch.func.vmap(torch.func.grad(lambda z: (f(z) ** 3).sum()))(z),
    "hessian": lambda f, z: torch.func.hessian(lambda z: (f(z) ** 3).sum())(z),
}
_LONG = (("hessian", "aot_eager"), ("jacfwd", "aot_eager"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # Compiled for half a minute and more.
        pytest.param(name, backend, marks=pytest.mark.slow if (name, backend) in _LONG else ())
        for name in TRANSFORMS
        for backend in ("eager", "aot_eager")
    ],
)
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
        lambda z: dq.quantize(z, None, dq.FSQ([5, 4, 3])).z_q,
        lambda z: dq.quantize(z, words, dq.GumbelST(), noise=torch.zeros_like(z)).z_q,
    ]

    def all_of_them(z):
        return [TRANSFORMS[name](f, z) for f in quantizers]

    compiled = torch.compile(all_of_them, fullgraph=True, backend=backend)(z)
    for actual, expected in zip(compiled, all_of_them(z), strict=True):
        assert_equal(actual, expected, **CLOSE)


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


@pytest.mark.parametrize("radius", [dq.Power(2.0), dq.PseudoHuber(), dq.PNorm(3.0), dq.Cosine()], ids=repr)
def test_stages_of_a_radius_with_open_sizes(radius):
    torch._dynamo.reset()
    z, codebook, _ = problem()
    estimator = dq.Residual(dq.Radial(radius), 2)

    def loss(z, codebook):
        return loss_of(dq.quantize(z, codebook, estimator).z_q)

    expected = torch.autograd.grad(loss(z, codebook), [z, codebook])
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend="eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(z, codebook), [z, codebook]), expected, strict=True):
        assert_equal(actual, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and each size it reads is a warning
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_a_trace_is_saved_and_has_gradients(estimator, frozen, tmp_path):
    z, codebook, noise = problem()
    if not isinstance(noise, torch.Tensor):
        pytest.skip("a trace takes tensors")
    inputs = (z, codebook.detach() if frozen else codebook, noise)
    to = [x for x in inputs if x.requires_grad]

    def loss(z, codebook, noise):
        return loss_of(dq.quantize(z, codebook, estimator, noise=noise).z_q)

    expected = torch.autograd.grad(loss(*inputs), to, allow_unused=True, materialize_grads=True)
    if getattr(getattr(estimator, "radius", None), "log_r_gradients", estimator) is None:
        with pytest.raises(TypeError, match=r"^Radial: torch\.jit\.trace cannot derive the gradients of a radius"):
            torch.jit.trace(loss, tuple(x.detach() for x in inputs), check_trace=False)
        return
    traced = torch.jit.trace(loss, tuple(x.detach() for x in inputs), check_trace=False)
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    actual = torch.autograd.grad(loaded(*inputs), to, allow_unused=True, materialize_grads=True)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other, **CLOSE)
