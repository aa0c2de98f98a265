"""Nothing that a call does outlives it: no setting of the process, no mark on the user's memory, no pool of threads."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import diveq_core as dq
from libraries import library_named
from processes import run_python

FORK = """
    import multiprocessing
    import os
    import sys
    import warnings

    os.environ["OMP_NUM_THREADS"] = "2"  # at least, on any machine
    import numpy as np
    import diveq_core as dq

    library, width = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng(0)
    z, codebook = (rng.standard_normal((n, width), dtype=np.float32) for n in (20000, 500))
    if library == "torch":
        import torch

        z, codebook = torch.tensor(z), torch.tensor(codebook)
    expected = np.asarray(dq.nearest(z, codebook))

    def child(queue):
        queue.put(np.asarray(dq.nearest(z, codebook)))

    if __name__ == "__main__":
        # Python 3.12 warns of any fork beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,), daemon=True)
        process.start()
        found = queue.get(timeout=60)
        process.join(timeout=60)
        # Another kernel may decide a tie by rounding.
        print(np.mean(found != expected) < 1e-3, process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("width", [8, 64, 200])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_forked_child_searches_after_its_parent(name: str, width: int):
    """As a worker of a data loader does; threads that the parent's search began do not live on in it."""
    library_named(name)
    assert run_python(FORK, name, str(width)) == "True 0\n"


LOADER = """
    import os

    os.environ["OMP_NUM_THREADS"] = "2"
    import torch
    import diveq_core as dq

    torch.manual_seed(0)
    codebook = torch.randn(300, 8)

    class Tokens(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return dq.nearest(torch.full((2000, 8), float(i)), codebook)

    if __name__ == "__main__":
        # The parent's threads have begun.
        expected = torch.stack([Tokens()[i] for i in range(6)])
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=3, num_workers=2, timeout=60)
        print(torch.equal(torch.cat(list(loader)), expected))
"""


def test_in_the_workers_of_a_data_loader():
    library_named("torch")
    assert run_python(LOADER) == "True\n"


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        library_named("torch")

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    @pytest.mark.parametrize("width", [4, 40, 200])
    def test_storages_stay_resizable(self, width: int, dtype: str):
        """As `fully_shard` needs them; `Tensor.numpy` would mark them."""
        import torch

        z, codebook, noise = (torch.randn(n, width, dtype=getattr(torch, dtype)) for n in (3, 5, 3))
        z.requires_grad_()
        codebook = torch.nn.Parameter(codebook)
        results = [dq.nearest(z, codebook)]
        for estimator in (dq.STE(), dq.DiVeQ(), dq.Rotation(), dq.Residual(dq.DiVeQDetach(), 2)):
            given = None if isinstance(estimator, dq.Residual) else noise
            out = dq.quantize(z, codebook, estimator, noise=given)
            out.z_q.float().square().sum().backward()
            results += [out.z_q.detach(), out.indices]
        state, words = dq.ema_update(dq.ema_init(codebook), z, codebook, results[0])
        results += [*state, words, dq.usage(results[0], 5), dq.lookup(results[0], codebook)]
        for x in (z, codebook, noise, z.grad, codebook.grad, *results):
            assert x.untyped_storage().resizable()
        codebook.untyped_storage().resize_(0)

    def test_threads_leave_the_precision_of_products_as_it_is(self):
        from concurrent.futures import ThreadPoolExecutor

        import torch

        matmul, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
        z, codebook = torch.randn(4000, 40), torch.randn(300, 40)
        matmul.fp32_precision = "bf16"
        seen = set()

        def search(_: int) -> torch.Tensor:
            found = dq.nearest(z, codebook)
            seen.add(matmul.fp32_precision)
            return found

        try:
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(search, range(40)))
            assert matmul.fp32_precision == "bf16"
            assert seen == {"bf16"}
        finally:
            matmul.fp32_precision = before
        expected = dq.nearest(z, codebook)
        # The product is another one, and may decide a tie by rounding.
        assert all((x != expected).float().mean() < 1e-3 for x in found)

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    @pytest.mark.parametrize("width", [8, 40, 200])
    def test_the_search_is_as_exact_whatever_products_are_allowed(self, precision: str, width: int):
        """TF32 and bfloat16 keep too few digits to tell codewords apart."""
        import torch

        before = torch.get_float32_matmul_precision()
        codebook = torch.randn(500, width)
        z = codebook.repeat(4, 1) + 1e-3 * torch.randn(2000, width)
        torch.set_float32_matmul_precision(precision)
        try:
            found = dq.nearest(z, codebook)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(found, torch.arange(500).repeat(4))


BROKEN = {
    "fails to import": "raise ImportError('no such library')",
    "has nothing in it": "",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_optional_package_is_no_hindrance(kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "faiss.py").write_text(BROKEN[kind])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    code = """
        import warnings
        import numpy as np
        import diveq_core as dq

        codebook = np.eye(3, dtype=np.float32)
        # So many that faiss is asked for.
        z = np.tile(codebook, (1000, 1))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            print(*(dq.nearest(z, codebook)[:3] for _ in range(2)), [str(w.message) for w in seen])
    """
    told = "['nearest: faiss is installed but fails to import, so it is not used: no such library']"
    assert run_python(code) == f"[0 1 2] [0 1 2] {told if kind == 'fails to import' else '[]'}\n"


def test_an_optional_package_that_is_hidden_is_absent():
    pytest.importorskip("torch")
    code = """
        import sys
        import numpy as np
        import diveq_core as dq
        import diveq_torch.search

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name in ("faiss", "triton"):
                    raise ModuleNotFoundError(f"hidden: {name}", name=name)

        sys.modules.pop("triton", None)
        sys.meta_path.insert(0, Hide())
        codebook = np.eye(3, dtype=np.float32)
        print(dq.nearest(np.tile(codebook, (1000, 1)), codebook)[:3], diveq_torch.search._has_triton())
    """
    assert run_python(code) == "[0 1 2] False\n"


def test_error_states_of_numpy_stay_as_they_are():
    with np.errstate(all="raise"):
        before = np.geterr()
        dq.nearest(np.float32([[1e30, 0.0]]), np.float32([[1e-30, 0.0], [0.0, 1e-30]]))
        assert np.geterr() == before
