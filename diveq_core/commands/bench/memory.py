"""Peak memory of a contender in its own process, and bytes that torch saves for the backward pass.

``python -m diveq_core.commands.bench.memory NAME N K D DTYPE`` is that process: it makes the inputs, computes a tiny
problem so that everything is imported and its thread pools stand, resets the kernel's record of the peak, and
computes the problem once.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, UnavailableError, arrays, load

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_TIMEOUT = 600


def peak_bytes(name: str, problem: Problem) -> int:
    """Most memory resident at a time while the contender computes, over what was resident before.

    Raises
    ------
    UnavailableError
        If the contender cannot take part, the process fails, or the system keeps no record of the peak.
    """
    if problem.device != "cpu":
        raise UnavailableError("memory is measured on the CPU only")
    arguments = [name, str(problem.n), str(problem.k), str(problem.d), problem.dtype]
    command = [sys.executable, "-m", "diveq_core.commands.bench.memory", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"took over {_TIMEOUT} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnavailableError(f"the process failed: {lines[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "missing" in answer:
        raise UnavailableError(answer["missing"])
    return int(answer["bytes"])


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that a new allocation can have, where the system says."""
    if device == "cuda":
        return int(load("torch").cuda.mem_get_info()[0]) if load("torch").cuda.is_available() else None
    return _kibibytes(_MEMINFO, "MemAvailable") if _MEMINFO.exists() else None


def saved_bytes(estimator: dq.Estimator, problem: Problem, *, trained: bool = True) -> int:
    """Bytes that torch keeps between forward and backward beyond ``z`` and ``codebook``.

    Counted are the storages that the graph behind the output reaches, by what autograd saves and by what its nodes
    hold besides.

    Parameters
    ----------
    trained : bool
        Whether the codebook asks for a gradient.

    Raises
    ------
    UnavailableError
        If torch is not installed.
    """
    torch = load("torch")
    z, codebook, _ = arrays(problem, "torch")
    z.requires_grad_()
    codebook.requires_grad_(trained)
    kept: dict[int, int] = {}

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = dq.quantize(z, codebook, estimator)
    nodes, seen = [out.z_q.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        for x in _held(getattr(node, "__dict__", {}), torch.Tensor):
            pack(x)
    given = {x.untyped_storage().data_ptr() for x in (z, codebook)}
    return sum(count for pointer, count in kept.items() if pointer not in given)


def _held(x: Any, kind: type, seen: set[int] | None = None) -> Iterator[Any]:
    """Those of a kind that an object holds, however deep."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, kind):
        yield x
    elif isinstance(x, (dict, list, tuple)) or hasattr(x, "__dict__"):
        parts = x if isinstance(x, (list, tuple)) else (x if isinstance(x, dict) else vars(x)).values()
        for part in parts:
            if not isinstance(part, (type, ModuleType)):
                yield from _held(part, kind, seen)


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _measure(name: str, problem: Problem) -> dict[str, Any]:
    from diveq_core.commands.bench.contenders import CONTENDERS

    if not _CLEAR.exists():
        return {"missing": "this system keeps no record of the peak in /proc"}
    contender = CONTENDERS[name]
    try:
        for run in contender.prepare(problem.sized(16, 4, problem.d)).values():
            run()
        run = next(iter(contender.prepared(problem, free_bytes()).values()))
    except UnavailableError as reason:
        return {"missing": str(reason)}
    gc.collect()
    _CLEAR.write_text("5")
    before = _kibibytes(_STATUS, "VmRSS")
    run()
    return {"bytes": max(_kibibytes(_STATUS, "VmHWM") - before, 0)}


def _main(name: str, n: str, k: str, d: str, dtype: str) -> None:
    warnings.simplefilter("ignore")
    if dtype == "float64" and name in ("search-jax", "step-jax", "jax-whole"):
        load("jax").config.update("jax_enable_x64", True)
    print(json.dumps(_measure(name, Problem(int(n), int(k), int(d), dtype))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
