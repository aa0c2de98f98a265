"""PyTorch: what is kept between forward and backward, and what may be overwritten meanwhile."""

from __future__ import annotations

import shutil

import pytest

import diveq_core as dq
from torch_cases import CLOSE, ESTIMATORS, IDS, assert_equal, loss_of, moved_by_averages, problem, torch


class TestTheCodebookIsOverwritten:
    """Between forward and backward, as moving averages in ``forward`` do."""

    WRITES = {
        "copy_": lambda codebook, new: codebook.copy_(new),
        "data": lambda codebook, new: codebook.data.mul_(0.5),
    }

    @pytest.mark.parametrize("estimator", [*ESTIMATORS, dq.Rotation(), dq.SFDiVeQ(), dq.SFDiVeQDetach()], **IDS)
    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
    @pytest.mark.parametrize("few", [0, 1 << 14], ids=["many", "few"])
    def test_the_gradient_is_of_the_one_that_was_used(self, estimator, write, checkpointed, few, monkeypatch):
        monkeypatch.setattr("diveq_core.estimators.rule._FEW", few)
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
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
        _, pullback = dq.vjp(logits.detach(), words.clone(), dq.GumbelST(), noise=noise)
        z_q = dq.quantize(logits, words, dq.GumbelST(), noise=noise).z_q
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
        expected = [] if not estimator.reads else [8 * len(z)] + noisy * [4 * z.numel()]
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
