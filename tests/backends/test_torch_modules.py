"""PyTorch: modules, subclasses, layouts, sharding, and what is refused."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

import diveq_core as dq
from processes import run_python
from torch_cases import CLOSE, ESTIMATORS, IDS, Quantizer, assert_equal, loss_of, problem, reference, torch, whole


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
        # Beside values they are refused: their memory is not there.
        for x, words in ((torch.zeros(4, 3), codebook), (z, torch.zeros(5, 3))):
            for held in (words, dq.prepare(words)):
                with pytest.raises(ValueError, match=f"nearest: .* one device, got {x.device} and {words.device}"):
                    dq.nearest(x, held)
        # Nor under a mode that only looks at shapes.
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            z, codebook = torch.randn(4, 3), torch.randn(5, 3)
            found = dq.kmeans(z, codebook, iterations=2)
            assert (found.codebook.shape, found.indices.shape) == ((5, 3), (4,))


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
    "quantize by FSQ": lambda z, c: dq.quantize(z, None, dq.FSQ([5, 4, 3])),
    "normalize": lambda z, c: dq.normalize(z),
    "nearest_cosine": dq.nearest_cosine,
    "codebook_loss": lambda z, c: dq.codebook_loss(z, c, torch.zeros(6, dtype=torch.int64)),
    "quantize by GumbelST": lambda z, c: dq.quantize(z, c[:3], dq.GumbelST()),
    "linear_codebook": lambda z, c: dq.linear_codebook((z, c[:3])),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_dense_is_refused(verb: str, layout: str):
    z, codebook, _ = (x.detach() for x in problem())
    with pytest.raises(
        TypeError, match=rf"^{verb.split()[0]}: .* must be a dense array .*, got a (nested )?tensor of layout torch"
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
