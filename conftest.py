"""Examples in README.md, docs/ and the docstrings of diveq_core and its backends run as tests."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from sybil import Document, Example, Region

# Keras reads it once, when it is imported, and would otherwise ask for TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "torch" if importlib.util.find_spec("torch") else "jax")

OPTIONAL = (
    *("torch", "jax", "cupy", "mlx", "flax", "equinox", "keras", "safetensors"),
    *("dask", "array_api_strict", "matplotlib", "sklearn", "typer", "rich"),
    *("vector_quantize_pytorch", "diveq"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Examples of one document build on each other, and tests of one file on the same programs: a worker has all."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

    return ByFile(config, log) if config.getvalue("dist") == "load" else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A backend's docstrings, where its library is missing: pytest imports the package around them."""
    if collection_path.parent.name != "backends" or not collection_path.name.startswith("diveq_"):
        return None
    return True if importlib.util.find_spec(collection_path.name.removeprefix("diveq_")) is None else None


def _skip_without(library: str) -> None:
    if library == "cupy":
        cupy = pytest.importorskip("cupy")
        try:
            cupy.zeros(1)
        except Exception as error:  # CuPy has no common base class for a missing driver or device
            pytest.skip(f"CuPy has no GPU: {str(error).splitlines()[0]}")
        return
    try:
        importlib.import_module(library)
    except ImportError:
        pytest.skip(f"the example needs {library}, which is not installed")


class Guarded:
    """A parser whose examples skip where a library that they name is missing."""

    def __init__(self, parser: Callable[[Document], Iterable[Region]]) -> None:
        self.parser = parser

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in self.parser(document):
            region.evaluator = self.guard(region.evaluator)
            yield region

    @staticmethod
    def guard(evaluate: Callable[[Example], str | None]) -> Callable[[Example], str | None]:
        def evaluator(example: Example) -> str | None:
            source = example.document.text[example.region.start : example.region.end]
            for library in OPTIONAL:
                # The import, or a use of what an earlier example of the document imported.
                if re.search(rf"\bimport {library}\b|\bfrom {library}\b|\b{library}\.", source):
                    _skip_without(library)
            with standard_promotion():
                return evaluate(example)

        return evaluator


def standard_promotion() -> Any:
    """JAX as a reader of the documentation has it; the tests proper make its dtype promotion strict."""
    jax = sys.modules.get("jax")
    return contextlib.nullcontext() if jax is None else jax.numpy_dtype_promotion("standard")


pytest_collect_file = (
    Sybil(parsers=[Guarded(PythonCodeBlockParser()), SkipParser()], patterns=["README.md", "docs/*.md"])
    + Sybil(parsers=[Guarded(DocTestParser())], patterns=["diveq_core/*.py", "diveq_core/**/*.py", "backends/**/*.py"])
).pytest()
