"""PyTorch: autocast, 16 bits, the precision of products, and CUDA."""

from __future__ import annotations

import pytest

import diveq_core as dq
from torch_cases import ESTIMATORS, IDS, assert_equal, loss_of, problem, reference, torch


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
