"""Every estimator under the transformations of torch and JAX, for the second table of capabilities."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq
from capability_rows import ESTIMATORS, Estimation, N
from libraries import library_named
from processes import run_python
from reference import case_named, expression

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


# One of each kind of rule; what a transformation does to the others is the same, and compiled for seconds each.
FIRST = ("STE()", "DiVeQ()", "Radial(Cosine())", "Rotation()", "SFDiVeQ()", "Residual(DiVeQ(), 2)")


@functools.cache
def _problem(name: str) -> tuple[list[np.ndarray], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Inputs, a cotangent, and NumPy's gradients to z and codebook."""
    row, rng = ESTIMATORS[name], np.random.default_rng(11)
    inputs = row.draw(rng)
    g = rng.standard_normal(inputs[0].shape, dtype=np.float32)
    return inputs, g, row.vjp(*inputs)[1](g)


def _in(library: str, name: str) -> tuple[Estimation, list[Any], Any]:
    to = library_named(library).to
    inputs, g, _ = _problem(name)
    return ESTIMATORS[name], [to(x) for x in inputs], to(g)


def _loss(row: Estimation, g: Any, *inputs: Any) -> Any:
    return (row.forward(*inputs)[0] * g).sum()


def _compare(library: str, name: str, found: Any) -> None:
    row, back = ESTIMATORS[name], library_named(library).back
    for actual, expected in zip(found, _problem(name)[2], strict=True):
        np.testing.assert_allclose(back(actual), expected, rtol=row.rtol, atol=row.atol)


@functools.cache
def _compiled(first: bool) -> dict[str, tuple[Any, Any]]:
    """Gradients of the first estimators or the others, from one graph: each by itself takes as long to compile."""
    import torch

    problems = {name: _in("torch", name) for name in ESTIMATORS if (name in FIRST) == first}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses(*arrays: list[Any]) -> Any:
        rows = zip(problems.values(), arrays, strict=True)
        return [_loss(row, g, *inputs) for (row, _, g), inputs in rows]

    leaves = [[x.requires_grad_(i < 2) for i, x in enumerate(inputs)] for _, inputs, _ in problems.values()]
    sum(losses(*leaves)).backward()
    pairs = [tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs[:2]) for inputs in leaves]
    return dict(zip(problems, pairs, strict=True))


def _jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit``, without what only makes the compiled code faster."""
    import jax

    return jax.jit(f, compiler_options={"xla_llvm_disable_expensive_passes": True})


def _torch_compile(name: str) -> None:
    _compare("torch", name, _compiled(name in FIRST)[name])


def _by_rows(library: str, vmap: Callable[..., Any], grad: Callable[..., Any], name: str) -> None:
    row, inputs, g = _in(library, name)
    axes = (0, 0, None, *row.noise_axes)
    g_z, g_codebook = vmap(grad(lambda g, *x: _loss(row, g, *x), (1, 2)), axes)(g, *inputs)
    _compare(library, name, (g_z, g_codebook.sum(0)))


def _torch_vmap(name: str) -> None:
    import torch

    _by_rows("torch", torch.func.vmap, torch.func.grad, name)


@functools.cache
def _tangents(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tangents of z and codebook, and NumPy's of the output."""
    row, rng = ESTIMATORS[name], np.random.default_rng(12)
    inputs = _problem(name)[0]
    dz, dcodebook = (rng.standard_normal(x.shape, dtype=np.float32) for x in inputs[:2])
    return dz, dcodebook, row.jvp(*inputs, dz, dcodebook)[-1]


def _pushed(name: str) -> Callable[..., Any]:
    import torch

    row, inputs, _ = _in("torch", name)
    dz, dcodebook = (torch.tensor(x) for x in _tangents(name)[:2])
    return lambda z: torch.func.jvp(lambda *x: row.forward(*x, *inputs[2:])[0], (z, inputs[1]), (dz, dcodebook))[1]


def _torch_forward_mode(name: str) -> None:
    row, inputs, _ = _in("torch", name)
    actual = _pushed(name)(inputs[0]).numpy()
    np.testing.assert_allclose(actual, _tangents(name)[2], rtol=row.rtol, atol=row.atol)


def _torch_inference_mode(name: str) -> None:
    import torch

    row, (z, codebook, *noise), g = _in("torch", name)
    expected = row.forward(*_problem(name)[0])[0]
    with torch.inference_mode():
        words = codebook.clone()
        np.testing.assert_allclose(row.forward(z, words, *noise)[0], expected, rtol=row.rtol, atol=row.atol)
    z.requires_grad_()
    row.forward(z, words, *noise)[0].backward(g)
    _compare("torch", name, (z.grad, torch.tensor(_problem(name)[2][1])))


def _traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` as one graph, run as it stands: to lower it would take ten times as long."""
    import torch

    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="eager")


def _torch_compiled_vmap(name: str) -> None:
    import torch

    _by_rows("torch", lambda f, axes: _traced(torch.func.vmap(f, axes)), torch.func.grad, name)


def _torch_compiled_forward_mode(name: str) -> None:
    row, inputs, _ = _in("torch", name)
    with warnings.catch_warnings():
        # Forward mode compiles decompositions by a function that torch itself has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        actual = _traced(_pushed(name))(inputs[0]).numpy()
    np.testing.assert_allclose(actual, _tangents(name)[2], rtol=row.rtol, atol=row.atol)


def _torch_fsdp(name: str) -> None:
    sharded = _sharded()[name]
    assert sharded == "yes", sharded


@functools.cache
def _sharded() -> dict[str, str]:
    """What `sharded_here` finds in a process whose group has no other."""
    with tempfile.TemporaryDirectory() as folder:
        code = """
            import json, sys
            sys.path.insert(0, sys.argv[1])
            import transformations
            print(json.dumps(transformations.sharded_here(sys.argv[2])))
        """
        return json.loads(run_python(code, str(Path(__file__).parent), folder))


def sharded_here(folder: str) -> dict[str, str]:
    """For each estimator ``yes``, or how its gradients under FSDP2 differ. The process is the whole group."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Quantizer(torch.nn.Module):
        def __init__(self, row: Estimation, codebook: Any) -> None:
            super().__init__()
            self.row, self.codebook = row, torch.nn.Parameter(codebook.clone())

        def forward(self, *inputs: Any) -> Any:
            z, *noise = inputs
            return self.row.forward(z, self.codebook, *noise)[0] * 1

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh, found = init_device_mesh("cpu", (1,)), {}
    for name in ESTIMATORS:
        row, (z, codebook, *noise), g = _in("torch", name)
        module = Quantizer(row, codebook)
        fully_shard(module, mesh=mesh)
        module(z.requires_grad_(), *noise).backward(g)
        own = module.codebook.grad
        assert isinstance(module.codebook, torch.distributed.tensor.DTensor)
        g_codebook = torch.zeros_like(codebook) if own is None else own.full_tensor()
        try:
            _compare("torch", name, (z.grad, g_codebook))
            found[name] = "yes"
        except AssertionError as error:
            found[name] = str(error)
    torch.distributed.destroy_process_group()
    return found


def _jax_vmap(name: str) -> None:
    import jax

    _by_rows("jax", lambda f, axes: _jit(jax.vmap(f, axes)), jax.grad, name)


def _stages(xp: Any, sg: Callable[[Any], Any], z: Any, codebook: Any, noise: Any) -> Any:
    """The two stages of DiVeQ, as its authors' expression: a composite's explicit verbs are not differentiated."""
    total, residual = 0.0 * z, z
    for words, own in zip(codebook, noise, strict=True):
        q = words[dq.nearest(residual, words)]
        out = expression(case_named("DiVeQ"), xp, sg, residual, q, own)
        total, residual = total + out, residual - out
    return total


def _torch_double_backward(name: str) -> None:
    import torch

    row, inputs, g = _in("torch", name)
    found = []
    for reference in (False, True):
        z, codebook = leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        if reference and name != "Residual(DiVeQ(), 2)":
            gradients = row.vjp(z, codebook, *inputs[2:])[1](g)
        else:
            staged = _stages(torch, torch.detach, z, codebook, inputs[2]) if reference else None
            loss = _loss(row, g, z, codebook, *inputs[2:]) if staged is None else (staged * g).sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        penalty = sum((x * x).sum() for x in gradients)
        # Straight-through gradients are constants, which have nothing to differentiate.
        zeros = (torch.zeros_like(z), torch.zeros_like(codebook))
        second = torch.autograd.grad(penalty, leaves, materialize_grads=True) if penalty.requires_grad else zeros
        found.append(second)
    for actual, expected in zip(*found, strict=True):
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=row.rtol, atol=10 * row.atol)


def _jax_hessian(name: str) -> None:
    import jax

    row, inputs, g = _in("jax", name)
    rest = inputs[1:]

    def reference(z: Any) -> Any:
        if name != "Residual(DiVeQ(), 2)":
            return row.vjp(z, *rest)[1](g)[0]
        return jax.grad(lambda z: (_stages(jax.numpy, jax.lax.stop_gradient, z, *rest) * g).sum())(z)

    def both(z: Any) -> Any:
        return jax.hessian(lambda z: _loss(row, g, z, *rest))(z), jax.jacrev(reference)(z)

    actual, expected = _jit(both)(inputs[0])
    np.testing.assert_allclose(actual, expected, rtol=row.rtol, atol=10 * row.atol)


def _jax_jit(name: str) -> None:
    import jax

    row, inputs, g = _in("jax", name)
    _compare("jax", name, _jit(jax.grad(lambda *x: _loss(row, g, *x), (0, 1)))(*inputs))


def _jax_scan(name: str) -> None:
    import jax

    row, (z, codebook, *noises), g = _in("jax", name)
    axes = row.noise_axes
    rowwise = [jax.numpy.moveaxis(x, axis, 0) for x, axis in zip(noises, axes, strict=True) if axis is not None]

    def loss(z: Any, codebook: Any) -> Any:
        def step(total: Any, here: Any) -> Any:
            z, g, *own = here
            mine = iter(own)
            noise = [x if axis is None else next(mine) for x, axis in zip(noises, axes, strict=True)]
            return total + _loss(row, g, z, codebook, *noise), None

        return jax.lax.scan(step, jax.numpy.zeros((), z.dtype), (z, g, *rowwise))[0]

    _compare("jax", name, _jit(jax.grad(loss, (0, 1)))(z, codebook))


def _jax_under(setting: Callable[[], AbstractContextManager[Any]], name: str) -> None:
    """Gradients under a setting of JAX, compiled where the setting allows it."""
    with setting():
        _jax_jit(name)


def _jax_disable_jit(name: str) -> None:
    import jax

    _jax_under(jax.disable_jit, name)


def _jax_debug_nans(name: str) -> None:
    import jax

    _jax_under(lambda: jax.debug_nans(True), name)


def _jax_rank_promotion(name: str) -> None:
    import jax

    _jax_under(lambda: jax.numpy_rank_promotion("raise"), name)


def _spread(name: str, kind: str) -> tuple[Any, Any, list[Any]]:
    """A mesh, and of g, z, codebook and noise where they lie: rows over all devices that divide them."""
    import jax

    row, devices = ESTIMATORS[name], jax.devices()
    count = len(devices) if N % len(devices) == 0 else 1
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(jax.sharding.AxisType[kind],), devices=devices[:count])
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    of_noise = [
        whole if axis is None else jax.sharding.PartitionSpec(*[None] * axis, "rows") for axis in row.noise_axes
    ]
    return mesh, rows, [rows, rows, whole, *of_noise]


def _jax_explicit_mesh(name: str) -> None:
    import jax

    row, inputs, g = _in("jax", name)
    mesh, _, specs = _spread(name, "Explicit")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, spec) for x, spec in zip((g, *inputs), specs, strict=True)]
        _compare("jax", name, _jit(jax.grad(lambda g, *x: _loss(row, g, *x), (1, 2)))(*placed))


def _jax_shard_map(name: str) -> None:
    import jax

    row, inputs, g = _in("jax", name)
    mesh, rows, specs = _spread(name, "Auto")
    each = jax.grad(lambda g, *x: _loss(row, g, *x), (1, 2))
    # The codebook is the same on every device, so JAX adds up what each gives it.
    f = jax.shard_map(each, mesh=mesh, in_specs=tuple(specs), out_specs=(rows, jax.sharding.PartitionSpec()))
    _compare("jax", name, _jit(f)(g, *inputs))


TRANSFORMATIONS: dict[str, Callable[[str], None]] = {
    "torch: compile": _torch_compile,
    "torch: vmap": _torch_vmap,
    "torch: forward mode": _torch_forward_mode,
    "torch: vmap(grad) in compile": _torch_compiled_vmap,
    "torch: forward mode in compile": _torch_compiled_forward_mode,
    "torch: inference mode": _torch_inference_mode,
    "torch: double backward": _torch_double_backward,
    "torch: FSDP2": _torch_fsdp,
    "jax: jit": _jax_jit,
    "jax: vmap": _jax_vmap,
    "jax: hessian": _jax_hessian,
    "jax: scan": _jax_scan,
    "jax: disable_jit": _jax_disable_jit,
    "jax: debug_nans": _jax_debug_nans,
    "jax: rank promotion raise": _jax_rank_promotion,
    "jax: explicit mesh": _jax_explicit_mesh,
    "jax: shard_map": _jax_shard_map,
}
"""Each raises where it does not hold."""

ON_DEVICES = ("jax: explicit mesh", "jax: shard_map")
"""Those that spread rows over devices; the tests try them where there are five, in a process of its own."""


def transformed(name: str, transformation: str) -> str:
    """``yes``, after trying it."""
    TRANSFORMATIONS[transformation](name)
    return "yes"
