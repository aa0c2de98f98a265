"""Which backend serves an array: third parties, libraries without one, subclasses, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.arrays import registry
from libraries import Library, library_named
from processes import run_python


@pytest.fixture(autouse=True)
def _restore_backends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_backends", list(registry._backends))
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.setattr(registry, "_failed", dict(registry._failed))


class Namespace:
    """A third party's namespace: NumPy's functions under another name."""

    __name__ = "third_party"

    def __getattr__(self, name):
        return getattr(np, name)


class ThirdParty(dq.Backend):
    """A third party's backend for arrays marked by their class, with a search of its own."""

    def __init__(self) -> None:
        super().__init__(Namespace(), "third-party")
        self.searches = 0

    def owns(self, x: object) -> bool:
        return isinstance(x, Marked)

    def search(self, z, codebook):
        self.searches += 1
        return super().search(z, codebook)


class Marked(np.ndarray):
    pass


Z = np.array([[0.0, 0.9], [2.0, 2.0]], np.float32)
CODEBOOK = np.array([[0.0, 1.0], [3.0, 2.0]], np.float32)


def test_a_third_party_registers_a_backend():
    backend = ThirdParty()
    dq.register(backend)
    z, codebook = Z.view(Marked), CODEBOOK.view(Marked)
    np.testing.assert_array_equal(dq.nearest(z, codebook), [0, 1])
    assert backend.searches == 1
    out, pullback = dq.vjp(z, codebook, dq.DiVeQDetach())
    plain, plain_pullback = dq.vjp(Z, CODEBOOK, dq.DiVeQDetach())
    np.testing.assert_array_equal(out.z_q, plain.z_q)
    for marked, expected in zip(pullback(out.z_q), plain_pullback(plain.z_q), strict=True):
        np.testing.assert_array_equal(marked, expected)


def test_what_is_registered_last_comes_first():
    # Also after the library was served otherwise, here by NumPy's backend.
    z, codebook = Z.view(Marked), CODEBOOK.view(Marked)
    dq.nearest(z, codebook)
    first, second = ThirdParty(), ThirdParty()
    dq.register(first)
    dq.nearest(z, codebook)
    dq.register(second)
    dq.nearest(z, codebook)
    assert (first.searches, second.searches) == (1, 1)


def test_a_library_served_by_the_standard_gets_a_backend_later():
    library = library_named("array_api_strict")
    z, codebook = library.to(Z), library.to(CODEBOOK)
    dq.nearest(z, codebook)

    class Own(ThirdParty):
        def __init__(self) -> None:
            super().__init__()
            self.xp = z.__array_namespace__()

        def owns(self, x: object) -> bool:
            return isinstance(x, type(z))

    backend = Own()
    dq.register(backend)
    np.testing.assert_array_equal(library.back(dq.nearest(z, codebook)), [0, 1])
    assert backend.searches == 1


def test_what_is_registered_stays_before_entry_points_that_load_later(monkeypatch: pytest.MonkeyPatch):
    # As in a process that has served no array yet.
    monkeypatch.setattr(registry, "_backends", [])
    backend = ThirdParty()
    dq.register(backend)
    dq.nearest(Z, CODEBOOK)
    assert registry._backends[0] is backend
    assert len(registry._backends) > 1
    dq.nearest(Z.view(Marked), CODEBOOK.view(Marked))
    assert backend.searches == 1


def test_registering_twice_is_once():
    backend = ThirdParty()
    dq.register(backend)
    dq.register(backend)
    assert registry._backends.count(backend) == 1


@pytest.mark.parametrize("wrong", [ThirdParty, "numpy", np, None])
def test_register_refuses_what_is_no_backend(wrong):
    with pytest.raises(TypeError, match=r"register: expected a diveq_core\.Backend, got (builtins|abc)\.\w+"):
        dq.register(wrong)


def test_backend_repr_names_the_library(library: Library):
    backend = registry.backend_of("test", x=library.to(Z))
    assert library.name in repr(backend)


def test_each_library_has_one_backend(library: Library):
    first, second = (registry.backend_of("test", x=library.to(x)) for x in (Z, CODEBOOK))
    assert first is second


@pytest.mark.parametrize("wrong", [[[0.0, 1.0]], None, 1.0, "z", object()])
@pytest.mark.parametrize("name", ["z", "codebook"])
def test_refuses_what_is_no_array(wrong, name: str):
    arguments = {"z": Z, "codebook": CODEBOOK, name: wrong}
    with pytest.raises(TypeError) as error:
        dq.nearest(arguments["z"], arguments["codebook"])
    assert str(error.value) == (
        f"nearest: {name} must be an array of a library that follows the array API standard, "
        f"got builtins.{type(wrong).__name__}"
    )


@pytest.mark.parametrize("wrong", [np.ma.masked_array(Z), Z.view(np.matrix)], ids=["masked", "matrix"])
def test_refuses_arrays_that_mean_something_else(wrong):
    # A mask would be ignored, and a matrix has its own products.
    with pytest.raises(TypeError, match=rf"^nearest: z must be an array .* got numpy\S*\.{type(wrong).__name__}$"):
        dq.nearest(wrong, CODEBOOK)


def test_numpy_subclasses_that_mean_the_same_work(tmp_path):
    mapped = np.memmap(tmp_path / "z", dtype=np.float32, mode="w+", shape=Z.shape)
    mapped[:] = Z
    np.testing.assert_array_equal(dq.nearest(mapped, CODEBOOK), [0, 1])


def test_a_numpy_scalar_is_an_array_of_numpy():
    with pytest.raises(ValueError, match=r"^nearest: z must have shape \(\.\.\., D\) with D = 2 .*, got \(\)$"):
        dq.nearest(np.float32(1.0), CODEBOOK)


def test_a_backend_that_cannot_be_imported_leaves_the_others_alone():
    # Libraries too old for their backend, say: only its own arrays are refused.
    library_named("array_api_strict")
    code = """
        import array_api_strict, numpy as np
        import diveq_core as dq
        from diveq_core.arrays import registry

        registry._load_backends()
        registry._targets["array_api_strict"] = "no_such_module:backend"
        codebook = np.eye(2)
        assert dq.nearest(codebook, codebook).tolist() == [0, 1]
        strict = array_api_strict.asarray(codebook)
        for _ in range(2):
            try:
                dq.nearest(strict, strict)
            except ImportError as error:
                print(error)
                assert isinstance(error.__cause__, ImportError)
    """
    message = "nearest: the backend of array_api_strict could not be imported: No module named 'no_such_module'"
    assert run_python(code).splitlines() == [message] * 2


def test_a_backend_is_found_by_entry_point(tmp_path):
    # A package outside the repository, as the metadata of an installed one has it.
    (tmp_path / "outside.py").write_text(
        "import array_api_strict\n"
        "import diveq_core as dq\n"
        "class Outside(dq.Backend):\n"
        "    def search(self, z, codebook):\n"
        "        return self.xp.zeros(z.shape[0], dtype=self.xp.int64) + 5\n"
        "backend = Outside(array_api_strict, 'outside')\n"
    )
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diveq_core.backends]\narray_api_strict = outside:backend\n")
    library_named("array_api_strict")
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import array_api_strict
        import diveq_core as dq

        assert "outside" not in sys.modules
        x = array_api_strict.eye(2)
        print(dq.nearest(x, x))
    """
    assert run_python(code, str(tmp_path)).strip() == "Array([5, 5], dtype=array_api_strict.int64)"
