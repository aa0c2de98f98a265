"""Small calls in PyTorch, past the dispatcher and past `setup_context`: the same as by the longer way."""

from __future__ import annotations

import warnings

import pytest

import diveq_core as dq
from torch_cases import ESTIMATORS, IDS, assert_equal, loss_of, problem, torch


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

    @pytest.mark.parametrize("which", ["z", "codebook"])
    def test_a_sign_that_is_a_bit_of_the_tensor(self, which: str):
        rng = torch.Generator().manual_seed(0)
        z, codebook = (torch.randn(n, 4, dtype=torch.cfloat, generator=rng).conj().imag for n in (9, 5))
        assert z.is_neg()
        plain = z.clone(), codebook.clone()
        views = (z, plain[1]) if which == "z" else (plain[0], codebook)
        assert_equal(dq.nearest(*views), dq.nearest(*plain))
        assert_equal(dq.quantize(*views, dq.DiVeQDetach()).z_q, dq.quantize(*plain, dq.DiVeQDetach()).z_q)

    def test_blocks_of_rows_stay_where_they_are(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("diveq_torch._BLOCK_ENTRIES", 64)
        monkeypatch.setattr("diveq_core.estimators.rule._FEW", 0)
        z, codebook, noise = (x.detach() for x in problem(rows=100))
        g = torch.ones_like(z)
        expected = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)[1](g)
        # Where tensors go that do not say.
        with torch.device("meta"):
            out, pullback = dq.vjp(z, codebook, dq.DiVeQ(), noise=noise)
            found = pullback(g)
        assert out.z_q.device.type == "cpu"
        assert_equal(found, expected)

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
