"""Nobody gets a library that they do not use; and what the wheel holds."""

from __future__ import annotations

import inspect
import sys
import zipfile
from pathlib import Path

import pytest

import diveq_core as dq
from libraries import library_named
from processes import importable, run_python

ROOT = Path(__file__).parent.parent
OTHERS = [
    *("torch", "jax", "cupy", "mlx", "flax", "equinox", "keras", "safetensors"),
    *("dask", "matplotlib", "typer", "rich", "sklearn", "pyarrow", "zarr"),
]

QUANTIZE = """
def quantize(z, codebook):
    noise = z * 0.5
    dq.nearest(z, codebook)
    dq.usage(dq.quantize(z, codebook, dq.DiVeQ(), noise=noise).indices, 3)
    _, pullback = dq.vjp(z, codebook, dq.Radial(dq.PseudoHuber()))
    pullback(z)
    dq.jvp(z, codebook, z, codebook, dq.NSVQ(), noise=noise)
"""

LOADED = f"""
import inspect
import sys
print(*[name for name in {OTHERS} if name in sys.modules])
"""


def loaded(code: str) -> list[str]:
    """Which of the libraries Python code imports, in a fresh process."""
    return run_python(code + LOADED).split()


def test_importing_the_core_imports_no_array_library():
    assert loaded("import diveq_core") == []


def test_importing_the_core_imports_no_backend():
    code = "import diveq_core, sys; print([name for name in sys.modules if name.startswith('diveq_')])"
    names = run_python(code)
    assert "diveq_core" in names
    assert not any(f"diveq_{name}" in names for name in ("numpy", "torch", "jax", "cupy", "mlx", "keras"))


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("numpy", "import numpy as np; z, codebook = np.ones((4, 2)), np.eye(3)[:, :2]"),
        ("array_api_strict", "import array_api_strict as xp; z, codebook = xp.ones((4, 2)), xp.eye(3)[:, :2]"),
        ("torch", "import torch; z, codebook = torch.ones(4, 2), torch.eye(3)[:, :2]"),
        ("jax", "import jax.numpy as jnp; z, codebook = jnp.ones((4, 2)), jnp.eye(3)[:, :2]"),
        ("mlx", "import mlx.core as mx; z, codebook = mx.ones((4, 2)), mx.eye(3)[:, :2]"),
    ],
)
def test_quantizing_imports_the_library_in_use_alone(name: str, arrays: str):
    library_named(name)
    # What the library imports itself is its own affair.
    own = set(loaded(arrays))
    assert set(loaded(f"import diveq_core as dq\n{arrays}\n{QUANTIZE}\nquantize(z, codebook)\n")) == own
    assert own <= {name}


def test_works_with_numpy_and_array_api_compat_alone():
    # Everything else that is installed is hidden from the import system.
    code = f"""
import inspect
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = {{"numpy", "array_api_compat", "diveq_core", "diveq_numpy"}} | sys.stdlib_module_names
        # Modules of the editable installation's own, and what NumPy tries to import.
        if top in known or top.startswith("_"):
            return None
        raise ModuleNotFoundError(f"hidden: {{name}}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]:
    if not name.startswith("_"):
        del sys.modules[name]
sys.meta_path.insert(0, Hide())

import importlib.util
try:
    importlib.util.find_spec("pytest")
except ModuleNotFoundError as error:
    print(error)

import diveq_core as dq
import numpy as np
{QUANTIZE}
rng = np.random.default_rng(0)
quantize(rng.standard_normal((4, 2)), rng.standard_normal((3, 2)))
quantize(rng.standard_normal((4, 64), dtype=np.float32), rng.standard_normal((3, 64), dtype=np.float32))
print("done")
"""
    assert run_python(code).splitlines() == ["hidden: pytest", "done"]


APPLICATIONS = ("__main__.py", "testing.py")


def test_the_core_names_no_array_library():
    # The command line, and proofs that compare with NumPy, are applications, not mathematics.
    sources = [
        path
        for path in (ROOT / "diveq_core").rglob("*.py")
        if path.name not in APPLICATIONS and "commands" not in path.parts
    ]
    assert len(sources) > 5
    for path in sources:
        imports = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        named = {name.partition(".")[0] for name in imports} & {"numpy", *OTHERS}
        assert not named, f"{path.name} imports {named}"


def test_public_names():
    import diveq_core as dq

    assert sorted(set(dq.__all__)) == sorted(dq.__all__)
    for name in dq.__all__:
        assert getattr(dq, name).__doc__, f"{name} has no docstring"


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    import diveq_core as dq

    assert dq.__version__ == version("diveq-core")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    for name in ("build", "hatchling"):
        if not importable(name):
            pytest.skip(f"{name} is not installed")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests do not run from a source tree")
    folder = tmp_path_factory.mktemp("wheel")
    run_python(
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation',"
        " '--outdir', sys.argv[1], sys.argv[2]], check=True, capture_output=True)",
        str(folder),
        str(ROOT),
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_module(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    packages = [ROOT / "diveq_core", *sorted((ROOT / "backends").iterdir())]
    expected = {
        str(path.relative_to(package.parent)).replace("\\", "/")
        for package in packages
        for path in package.rglob("*.py")
    }
    assert expected <= names
    assert "diveq_core/py.typed" in names
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {package.name for package in packages if any(package.rglob("*.py"))}


def test_the_wheel_has_every_entry_point(wheel: zipfile.ZipFile):
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(path).decode()
    assert "[diveq_core.backends]" in text
    for name in ("numpy", "cupy", "torch", "jax", "mlx"):
        assert f"{name} = diveq_{name}:backend" in text.splitlines()
    assert "diveq-core = diveq_core.__main__:main" in text.splitlines()


def test_the_wheel_works_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = f"""
        import sys
        sys.path.insert(0, sys.argv[1])
        import diveq_core as dq
        import numpy as np

        assert dq.__file__.startswith(sys.argv[1]), dq.__file__
        print(dq.nearest(np.ones((1, 2)), np.eye(2)))
        assert sys.modules["diveq_numpy"].__file__.startswith(sys.argv[1])
        assert sys.version_info >= {tuple(sys.version_info[:2])}
    """
    assert run_python(code, str(tmp_path)).strip() == "[0]"


def test_no_module_has_the_name_of_a_public_function():
    """So that ``import diveq_core.name as module`` gives a module, whatever its name."""
    modules = {path.stem for path in (ROOT / "diveq_core").rglob("*.py")}
    functions = {name for name in dq.__all__ if inspect.isfunction(getattr(dq, name))}
    assert len(functions) > 30
    assert not modules & functions
