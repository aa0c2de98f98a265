"""Break the mathematics on purpose, one line at a time, and show that the tests notice every time.

Each mutant replaces one piece of text that occurs exactly once in one file, in a copy of the project, and the
tests named for it must fail by their assertions: not at import, and not in code that no longer runs at all.

    python tests/break_the_mathematics.py [--jobs 2] [--only SUBSTRING]

Prints a line for each, then ``caught N/N``; exit status 1 unless every mutant is caught and the copy without a
mutant passes the same tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Rides along in pytest: the copy must be what is imported, failures are recorded by kind, nothing is shrunk.
PLUGIN = """
import importlib.util, json, os, pathlib
from hypothesis import Phase, settings
import pytest

failures = []

def pytest_sessionstart(session):
    # The suite's own examples, in its own number: what is caught here plain pytest catches.
    suite = settings.get_profile("default")
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", parent=suite, database=None, report_multiple_bugs=False, phases=phases)
    settings.load_profile("mutants")
    here = pathlib.Path(__file__).parent
    for name in ("diveq_core", "diveq_numpy", "diveq_torch", "diveq_jax", "diveq_mlx"):
        assert here in pathlib.Path(importlib.util.find_spec(name).origin).parents, f"{name} is not the copy"

def pytest_collectreport(report):
    if report.failed:
        failures.append({"test": report.nodeid, "when": "collect", "error": str(report.longrepr)[-200:]})

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        failures.append({"test": item.nodeid, "when": report.when, "error": call.excinfo.typename})
    return report

def pytest_sessionfinish(session, exitstatus):
    with open(os.environ["MUTANT_REPORT"], "w") as file:
        json.dump({"status": int(exitstatus), "collected": session.testscollected, "failures": failures}, file)
"""

# Errors of code that no longer runs, which any call would have shown.
NOT_MATHEMATICS = {
    *("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "AttributeError"),
    *("TypeError", "RuntimeError"),
}


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong."""

    what: str
    file: str
    old: str
    new: str
    tests: str
    """A test file and a ``-k`` expression that should notice, after a space."""


def verbs(cases: str, library: str = "numpy") -> str:
    return f"test_estimators.py verbs_are_plain and {library} and ({cases})"


def second(cases: str, library: str = "torch") -> str:
    return f"test_second_order.py ({'double_backward' if library == 'torch' else 'reverse_over'}) and ({cases})"


def bound(cases: str, library: str) -> str:
    return f"test_estimators.py differentiates_to_the_same and {library} and ({cases})"


BASE, STRAIGHT, ESTIMATORS, RADIAL, RADIUS, RULE, ROTATION, SPACE_FILLING = (
    f"diveq_core/estimators/{name}.py"
    for name in ("base", "straight_through", "distance", "radial", "radii", "rule", "rotation", "space_filling")
)
RESIDUAL, PRODUCT, COMPOSE, FSQ, FSQ_RULE, GUMBEL, GUMBEL_RULE = (
    f"diveq_core/estimators/{name}.py"
    for name in ("residual", "product", "composite", "fsq", "fsq_rule", "gumbel", "gumbel_rule")
)
NUMPY, TORCH, JAX = (f"backends/diveq_{name}/__init__.py" for name in ("numpy", "torch", "jax"))
ARRAY, CURVE_MODULE = "diveq_core/arrays/rows.py", "diveq_core/curve.py"
CUSTOM_RADIUS = "diveq_core/estimators/custom_radius.py"
LOSSES, COSINE, DIAGNOSTICS = (f"diveq_core/{name}.py" for name in ("losses", "directions", "diagnostics"))
CODEBOOK, LINEAR, REPLACEMENT, RANKS, SPREAD, KMEANS = (
    f"diveq_core/codebook/{name}.py" for name in ("averages", "linear", "replacement", "ranks", "spread", "clustering")
)
SEARCH, NUMPY_SEARCH, TORCH_SEARCH = (
    "diveq_core/arrays/search.py",
    *(f"backends/diveq_{n}/search.py" for n in ("numpy", "torch")),
)
CURVE = "test_space_filling.py torch or dithered"
TORCH_BIND, JAX_BIND = "backends/diveq_torch/bind.py", "backends/diveq_jax/bind.py"
G_Q = "        g_q = u.times(w.dot(lib, g))\n"
W = "        w = self.w(lib, d, u, noise).stopped(lib)\n"
# What a derivative of STE's by the codebook would be, if it had one.
STE_BODY = """        return type(self) is STE

    @property
    def trains_codebook(self) -> bool:
        return type(self) is not STE

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        return g, None

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        return dz
"""
STE_TRAINED = STE_BODY.replace("type(self) is STE", "False").replace("type(self) is not STE", "True")
MUTANTS = (
    # Pullbacks
    Mutant("STE: g_z is -g", STRAIGHT, "return g, None", "return -g, None", verbs("STE")),
    Mutant("STE: g_z halved", STRAIGHT, "return g, None", "return g / 2, None", verbs("STE")),
    Mutant(
        "STE: the codebook gets g too",
        STRAIGHT,
        STE_BODY,
        STE_TRAINED.replace("return g, None", "return g, g"),
        verbs("STE"),
    ),
    Mutant("distance: sign of g_q", ESTIMATORS, G_Q, G_Q.replace("w.dot", "-w.dot"), verbs("DiVeQ or NSVQ")),
    Mutant("distance: <g, u> for <g, w>", ESTIMATORS, G_Q, G_Q.replace("w.dot", "u.dot"), verbs("DiVeQ or NSVQ")),
    Mutant("distance: g_q along w", ESTIMATORS, G_Q, G_Q.replace("u.times", "w.times"), verbs("DiVeQ or NSVQ")),
    Mutant("distance: g_z gains g_q", ESTIMATORS, "return g - g_q, g_q", "return g + g_q, g_q", verbs("DiVeQ")),
    Mutant("distance: g_z stays g", ESTIMATORS, "return g - g_q, g_q", "return g, g_q", verbs("DiVeQ")),
    Mutant("distance: g_q doubled", ESTIMATORS, "return g - g_q, g_q", "return g - g_q, 2 * g_q", verbs("DiVeQ")),
    Mutant("distance: g_z lacks g", ESTIMATORS, "return g - g_q, g_q", "return -g_q, g_q", verbs("DiVeQDetach")),
    Mutant(
        "radial: sign of the term in g_z",
        RADIAL,
        "return g + coefficient * to_z",
        "return g - coefficient * to_z",
        verbs("Power or PNorm"),
    ),
    Mutant(
        "radial: the codebook gets z's gradient",
        RADIAL,
        "coefficient * to_z, coefficient * to_q",
        "coefficient * to_z, coefficient * to_z",
        verbs("Power or Cosine"),
    ),
    Mutant(
        "radial: the power of two not taken back",
        RADIAL,
        "lib.stop_gradient(log_r)), 1 / k",
        "lib.stop_gradient(log_r)), 1.0",
        "test_second_order.py extreme and Power",
    ),
    # Pushforwards
    Mutant("STE: tangent of q", STRAIGHT, STE_BODY, STE_TRAINED.replace("return dz", "return dq"), verbs("STE")),
    Mutant("distance: dq + dz", ESTIMATORS, "u.dot(lib, dq - dz)", "u.dot(lib, dq + dz)", verbs("DiVeQ")),
    Mutant(
        "distance: tangent along u",
        ESTIMATORS,
        "w.added_to(lib, dz, u.dot",
        "u.added_to(lib, dz, u.dot",
        verbs("DiVeQ or NSVQ"),
    ),
    Mutant("distance: drho by w", ESTIMATORS, "u.dot(lib, dq - dz)", "w.dot(lib, dq - dz)", verbs("DiVeQ or NSVQ")),
    Mutant(
        "distance: dz lost",
        ESTIMATORS,
        "w.added_to(lib, dz, u.dot",
        "w.added_to(lib, 0 * dz, u.dot",
        verbs("DiVeQ or NSVQ"),
    ),
    Mutant(
        "radial: the tangent of z subtracted",
        RADIAL,
        "(to_q * back, dq) + lib.dot(",
        "(to_q * back, dq) - lib.dot(",
        verbs("Power or Cosine"),
    ),
    Mutant(
        "radial: the tangent of q lost",
        RADIAL,
        "(lib.dot(to_q * back, dq) + lib.dot(to_z * back, dz))",
        "lib.dot(to_z * back, dz)",
        verbs("Power or Cosine"),
    ),
    # Forward
    Mutant("DiVeQ: sigma squared", ESTIMATORS, "d, noise, self.sigma)", "d, noise, self.sigma**2)", verbs("DiVeQ")),
    Mutant("DiVeQ: noise subtracted", ESTIMATORS, "d, noise, self.sigma)", "d, noise, -self.sigma)", verbs("DiVeQ")),
    Mutant("DiVeQ: no noise", ESTIMATORS, "d, noise, self.sigma)", "d, noise, 0.0)", verbs("DiVeQ")),
    Mutant("distance: rho lost", ESTIMATORS, "added_to(lib, z, rho)", "added_to(lib, z, rho / rho)", verbs("DiVeQ")),
    Mutant(
        "distance: from q, not from z", ESTIMATORS, "added_to(lib, z, rho)", "added_to(lib, q, rho)", verbs("DiVeQ")
    ),
    Mutant(
        "NSVQ: away from the noise", ESTIMATORS, "lib.direction(noise)[1]", "lib.direction(-noise)[1]", verbs("NSVQ")
    ),
    Mutant(
        "hard: z + (q - z) for q",
        RULE,
        "lib.astype(codebook if indices is None else lib.take_rows(codebook, indices), self.out_dtype)",
        "lib.astype(z + (lib.take_rows(codebook, indices) - z), self.out_dtype)",
        "test_estimators.py bit_for_bit and numpy and STE",
    ),
    # What carries derivatives and what does not
    Mutant("distance: w carries gradient", ESTIMATORS, W + G_Q, W.replace(".stopped(lib)", "") + G_Q, second("DiVeQ")),
    Mutant(
        "distance: u is held constant",
        ESTIMATORS,
        G_Q,
        G_Q.replace("u.times", "u.stopped(lib).times"),
        second("DiVeQ or NSVQ"),
    ),
    Mutant(
        "radial: the error is held constant",
        RADIAL,
        "* lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        "* lib.xp.exp(log_r - log_r)",
        second("Power or Cosine"),
    ),
    Mutant(
        "radial: the direction carries gradient",
        RADIAL,
        "return lib.stop_gradient(d * k) * lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        "return (d * k) * lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        second("Power or Cosine"),
    ),
    Mutant(
        "radial: the ln r form differentiated",
        RADIAL,
        "coefficient = lib.dot(g, live) * back",
        "coefficient = lib.dot(g, q - z)",
        second("Power or Cosine"),
    ),
    Mutant("torch: nothing is held constant", TORCH, "return x.detach()", "return x + 0", second("DiVeQ")),
    Mutant(
        "JAX: nothing is held constant",
        JAX,
        "return jax.lax.stop_gradient(x)",
        "return x",
        second("DiVeQ", "jax"),
    ),
    # Radii
    Mutant("Power: alpha lost", RADIUS, "self.alpha * u * safe", "u * safe", verbs("Power")),
    Mutant("Power: alpha + 1", RADIUS, "self.alpha * u * safe", "(self.alpha + 1) * u * safe", verbs("Power")),
    Mutant(
        "Power: alpha lost in ln r", RADIUS, "self.alpha * safe_log(lib, rho)", "safe_log(lib, rho)", second("Power")
    ),
    Mutant(
        "Power: d / rho",
        RADIUS,
        "self.alpha * u * safe_inverse(lib, length, k)",
        "self.alpha * u * k",
        verbs("Power"),
    ),
    Mutant(
        "Power: sign of d(ln r)/dz",
        RADIUS,
        "        to_q = self.alpha * u * safe_inverse(lib, length, k)\n        return to_q, -to_q",
        "        to_q = self.alpha * u * safe_inverse(lib, length, k)\n        return to_q, to_q",
        verbs("Power"),
    ),
    Mutant("PseudoHuber: delta for its square", RADIUS, "(delta / s) ** 2", "(delta / s)", verbs("PseudoHuber")),
    Mutant(
        "PseudoHuber: ln r^2 for ln r",
        RADIUS,
        "0.5 * lib.xp.log(squared)",
        "lib.xp.log(squared)",
        second("PseudoHuber"),
    ),
    Mutant("PseudoHuber: no 1 / s", RADIUS, "d_s / squared / s", "d_s / squared", verbs("PseudoHuber")),
    Mutant(
        "PseudoHuber: delta not brought into range",
        RADIUS,
        "delta = min(max(self.delta, float(limits.smallest_normal)), float(limits.max))",
        "delta = self.delta",
        "test_radius.py out_of_the_dtype and numpy",
    ),
    Mutant("PNorm: |d|^p", RADIUS, "** (self.p - 1)", "** self.p", verbs("PNorm")),
    Mutant("PNorm: sign lost", RADIUS, "xp.where(v < 0, -power, power)", "power", verbs("PNorm")),
    Mutant("PNorm: ln r^p for ln r", RADIUS, "lib.dot(power, v)) / self.p", "lib.dot(power, v))", second("PNorm")),
    Mutant(
        "PNorm: p = 2 has no second derivative at zero",
        RADIUS,
        "if self.p == 2:",
        "if False:",
        second("PNorm"),
    ),
    Mutant(
        "Mahalanobis: the matrix as it stands",
        RADIUS,
        "(m + lib.xp.permute_dims(m, (1, 0))) * 0.5",
        "m",
        verbs("Mahalanobis"),
    ),
    Mutant(
        "Mahalanobis: ln r^2 for ln r",
        RADIUS,
        "0.5 * safe_log(lib, squared) - lib.xp.log(k)",
        "safe_log(lib, squared) - lib.xp.log(k)",
        second("Mahalanobis"),
    ),
    Mutant(
        "Mahalanobis: half the gradient", RADIUS, "m_y / one_where(", "0.5 * m_y / one_where(", verbs("Mahalanobis")
    ),
    Mutant("Cosine: sign of q-hat", RADIUS, "(h_r - q_hat)", "(h_r + q_hat)", verbs("Cosine")),
    Mutant("Cosine: sign of d(ln r)/dz", RADIUS, "to_z = -(h_r + z_hat)", "to_z = (h_r + z_hat)", verbs("Cosine")),
    Mutant("Cosine: h / r halved", RADIUS, "h_r = 2 * direction", "h_r = direction", verbs("Cosine")),
    Mutant(
        "Cosine: |z| for |q|",
        RADIUS,
        "safe_inverse(lib, q_length, q_scale)",
        "safe_inverse(lib, z_length, z_scale)",
        verbs("Cosine"),
    ),
    Mutant(
        "Cosine: parallel vectors forgotten",
        RADIUS,
        "zero_rows(lib, undefined, to_q), zero_rows(lib, undefined, to_z)",
        "to_q, to_z",
        "test_radius.py one_ray and numpy",
    ),
    Mutant(
        "Cosine: rounding taken for an angle",
        RADIUS,
        "zero_rows(lib, largest < 8 * float(xp.finfo(h.dtype).eps), h)",
        "h",
        "test_radius.py one_ray and numpy",
    ),
    Mutant(
        "CustomRadius: gradients swapped",
        CUSTOM_RADIUS,
        "to_q, to_z = self.log_r_gradients(q, z)",
        "to_z, to_q = self.log_r_gradients(q, z)",
        verbs("CustomRadius"),
    ),
    Mutant(
        "CustomRadius: r = 0 forgotten",
        CUSTOM_RADIUS,
        "zero_rows(lib, zero, to_q), zero_rows(lib, zero, to_z)\n",
        "to_q, to_z\n",
        "test_radius.py zero_where_rho_is and torch",
    ),
    Mutant(
        "torch: gradients of a custom radius swapped",
        TORCH,
        "return to_q, to_z",
        "return to_z, to_q",
        bound("callable", "torch"),
    ),
    Mutant(
        "JAX: gradients of a custom radius swapped",
        JAX,
        "return to_q, to_z",
        "return to_z, to_q",
        bound("callable", "jax"),
    ),
    # Lengths, directions and their zeros
    Mutant(
        "direction: u has a derivative at zero",
        ARRAY,
        "u, one = zero_rows(lib, zero, y / length), lib",
        "u, one = y / length, lib",
        second("NSVQ"),
    ),
    Mutant(
        "direction: the root sees zero",
        ARRAY,
        "lib.xp.sqrt(one_where(lib, zero, squared))",
        "lib.xp.sqrt(squared)",
        second("DiVeQDetach"),
    ),
    Mutant(
        "direction: the scale is not taken back",
        ARRAY,
        "zero_rows(lib, zero, length / scale)",
        "zero_rows(lib, zero, length)",
        "test_estimators.py extreme and numpy and NSVQ",
    ),
    Mutant(
        "row_scale: small rows stay small",
        ARRAY,
        "xp.where(small, one * 2.0**half_range,",
        "xp.where(small, one,",
        "test_estimators.py extreme and numpy and DiVeQDetach",
    ),
    Mutant(
        "row_scale: large rows stay large",
        ARRAY,
        "xp.where(large, one * 2.0**-half_range, one)",
        "one",
        "test_estimators.py extreme and numpy and DiVeQDetach",
    ),
    Mutant(
        "row_scale: no power of two",
        ARRAY,
        "half_range = 80.0 if",
        "half_range = 80.5 if",
        "test_identities.py power_of_two_is_exact_elsewhere and strict",
    ),
    Mutant("safe_log: the logarithm sees zero", ARRAY, "log(one_where(lib, r == 0, r))", "log(r)", second("Power")),
    Mutant(
        "safe_inverse: infinite in third order",
        ARRAY,
        "1 / one_where(lib, length == 0, xp.where(length < floor, floor, length))",
        "1 / xp.where(length < floor, floor, length)",
        "test_second_order.py nan_at_zero and torch and Power",
    ),
    Mutant(
        "second order: squares of lengths in the open",
        ARRAY,
        "return row_scale(lib, x) if lib.records(x) else 1.0",
        "return 1.0",
        "test_second_order.py extreme and (Power or Cosine)",
    ),
    # Codewords and their sums
    Mutant(
        "rule: all cotangents to codeword 0",
        RULE,
        "lib.segment_add(total, g_q, indices)",
        "lib.segment_add(total, g_q, indices * 0)",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: noise lost in the pullback",
        RULE,
        "self.estimator.vjp(self.lib, z, q, noise, g)",
        "self.estimator.vjp(self.lib, z, q, g, g)",
        verbs("DiVeQ or NSVQ"),
    ),
    Mutant(
        "rule: the tangent of codeword 0 for all",
        RULE,
        "self.gathered(dcodebook, indices)",
        "self.gathered(dcodebook, indices * 0)",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: g_z in the dtype of computation",
        RULE,
        "return lib.astype(g_z, self.z_dtype)",
        "return g_z",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: g_codebook in the dtype of computation",
        RULE,
        "return g_z, None if total is None else lib.astype(total, self.codebook_dtype)",
        "return g_z, total",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: half precision throughout",
        RULE,
        "self.lib.compute_dtype(self.out_dtype)",
        "self.out_dtype",
        verbs("DiVeQ or Power"),
    ),
    Mutant(
        "float64 computed in float32",
        "diveq_core/arrays/backend.py",
        'self.xp.float64 if dtype == getattr(self.xp, "float64", None) else self.xp.float32',
        "self.xp.float32",
        verbs("DiVeQ or Power", "strict"),
    ),
    Mutant(
        "torch: mixed dtypes give that of z",
        TORCH,
        "return torch.promote_types(a.dtype, b.dtype)",
        "return a.dtype",
        "test_estimators.py mixed_dtypes and torch",
    ),
    Mutant(
        "standard: segments at and above",
        "diveq_core/arrays/segments.py",
        "xp.expand_dims(numbers, axis=1) == xp",
        "xp.expand_dims(numbers, axis=1) >= xp",
        verbs("DiVeQ", "strict"),
    ),
    Mutant(
        "standard: only the last chunk of a segment sum",
        "diveq_core/arrays/segments.py",
        "total = total + lib.matmul",
        "total = lib.matmul",
        "test_identities.py across_chunks and strict",
    ),
    Mutant(
        "NumPy: repeated indices lost",
        NUMPY,
        "np.add.at(total.reshape(-1), entries.reshape(-1), values.reshape(-1))",
        "total.reshape(-1)[entries.reshape(-1)] += values.reshape(-1)",
        verbs("DiVeQ"),
    ),
    Mutant("NumPy: direction of any length", NUMPY, "Direction(x, inverse)", "Direction(x, rho**0)", verbs("DiVeQ")),
    Mutant(
        "torch: repeated indices lost",
        TORCH,
        "total.index_add_(0, segments, values)",
        "total.index_put_((segments.long(),), values)",
        verbs("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: repeated indices lost where recorded",
        TORCH,
        ".index_add(0, kept, values)",
        ".index_copy(0, kept.long(), values)",
        second("DiVeQ"),
    ),
    Mutant(
        "torch: direction of any length",
        TORCH,
        "Direction(x, rho.reciprocal())",
        "Direction(x, rho**0)",
        verbs("DiVeQ", "torch"),
    ),
    Mutant(
        "JAX: repeated indices lost",
        "backends/diveq_jax/sharding.py",
        'total.at[segments].add(values, mode="drop"',
        'total.at[segments].set(values, mode="drop"',
        bound("DiVeQ", "jax"),
    ),
    # Bindings
    Mutant(
        "MLX: the gradient flows through a stop-gradient",
        "backends/diveq_mlx/__init__.py",
        "        return mx.stop_gradient(x)\n",
        "        return x\n",
        "backends/test_mlx.py losses",
    ),
    Mutant(
        "MLX: the codebook's cotangent lost",
        "backends/diveq_mlx/bind.py",
        "        if g_codebook is None:\n",
        "        if True:\n",
        bound("DiVeQ", "mlx"),
    ),
    Mutant(
        "MLX: vmap takes the first codebook for all",
        "backends/diveq_mlx/bind.py",
        "    if axes[1] is not None:\n",
        "    if axes[1] is not None and not (operands := (operands[0], batched[1][0])):\n",
        "backends/test_mlx.py vmap",
    ),
    Mutant(
        "torch: backward is straight-through",
        TORCH_BIND,
        "return None, None, g_z, g_codebook, None, None",
        "return None, None, g, g_codebook, None, None",
        bound("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: sign of the codebook's gradient",
        TORCH_BIND,
        "return None, None, g_z, g_codebook, None, None",
        "return None, None, g_z, -g_codebook, None, None",
        bound("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: pushforward forgets the codebook",
        TORCH_BIND,
        "return _pushed(ctx.rule, z, codebook, indices, noise, dz, dcodebook)",
        "return _pushed(ctx.rule, z, codebook, indices, noise, dz, torch.zeros_like(codebook))",
        "test_estimators.py pushes_forward and torch and DiVeQ",
    ),
    Mutant(
        "torch: pushforward of z alone missing",
        TORCH_BIND,
        "dz = torch.zeros_like(z) if dz is None else dz",
        "dz = torch.zeros_like(z)",
        "test_estimators.py pushes_forward and torch and DiVeQ",
    ),
    Mutant(
        "torch: a codebook without gradient is read late",
        TORCH_BIND,
        "    if not rule.trains_codebook:\n        return True",
        "    if not rule.trains_codebook:\n        return False",
        "backends/test_torch.py gradient_is_of_the_one and data and Rotation",
    ),
    Mutant(
        "torch: no tangents under torch.func in a compiled function",
        TORCH_BIND,
        "moved = rule.pushforward(*inner, inner[0] - z, inner[1] - codebook)",
        "moved = rule.pushforward(*inner, inner[0] - inner[0], inner[1] - codebook)",
        "backends/test_torch.py inside_a_compiled and jvp and not aot",
    ),
    Mutant(
        "torch: dual numbers in a compiled function have no tangent",
        TORCH_BIND,
        "moved = _pushed(rule, own, words, indices, noise, dz, dcodebook)",
        "moved = torch.zeros_like(own)",
        "backends/test_torch.py dual_numbers and inside and DiVeQ",
    ),
    Mutant(
        "torch: dual numbers lost on the way into a compiled function",
        TORCH_BIND,
        "if not (z.requires_grad or codebook.requires_grad):",
        "if False:",
        "backends/test_torch.py dual_numbers and outside and DiVeQ",
    ),
    Mutant(
        "torch: gradients of zeros for a codebook that gets none",
        ROTATION,
        "return type(self) is not Rotation",
        "return True",
        "backends/test_torch.py weight_decay",
    ),
    Mutant(
        "the pullback reads the indices late",
        "diveq_core/verbs.py",
        "else (lib.snapshot(codebook), lib.snapshot(call.indices))",
        "else (lib.snapshot(codebook), call.indices)",
        "test_upkeep.py indices_given_back",
    ),
    Mutant(
        "the pullback reads the codebook late",
        "diveq_core/verbs.py",
        "else (lib.snapshot(codebook), lib.snapshot(call.indices))",
        "else (codebook, lib.snapshot(call.indices))",
        "test_quantize.py was_used and numpy",
    ),
    Mutant(
        "Gumbel: the pullback reads the codebook late",
        "diveq_core/estimators/gumbel.py",
        "words = call.lib.snapshot(codebook)",
        "words = codebook",
        "test_quantize.py other_pullbacks and numpy and gumbel",
    ),
    Mutant(
        "codebook loss: the pullback reads the codebook late",
        LOSSES,
        "call.lib.snapshot(codebook)\n\n    def pullback(g: Array, /) -> Array:\n        rows = -call",
        "codebook\n\n    def pullback(g: Array, /) -> Array:\n        rows = -call",
        "test_quantize.py other_pullbacks and numpy and codebook_loss",
    ),
    Mutant(
        "commitment loss: the pullback reads the codebook late",
        LOSSES,
        "call.lib.snapshot(codebook)\n\n    def pullback(g: Array, /) -> Array:\n        rows = call",
        "codebook\n\n    def pullback(g: Array, /) -> Array:\n        rows = call",
        "test_quantize.py other_pullbacks and numpy and commitment_loss",
    ),
    Mutant(
        "linear codebook: the pullback reads the weight late",
        LINEAR,
        "frozen, weight = lib.snapshot(frozen), lib.snapshot(weight)",
        "frozen = lib.snapshot(frozen)",
        "test_quantize.py other_pullbacks and numpy and linear",
    ),
    Mutant(
        "linear codebook: the pullback reads the frozen factor late",
        LINEAR,
        "frozen, weight = lib.snapshot(frozen), lib.snapshot(weight)",
        "weight = lib.snapshot(weight)",
        "test_quantize.py other_pullbacks and numpy and linear",
    ),
    Mutant(
        "normalize: the pullback reads its argument late",
        COSINE,
        "kept = lib.snapshot(x)",
        "kept = x",
        "test_quantize.py other_pullbacks and numpy and normalize",
    ),
    Mutant(
        "Mahalanobis: the caller's array read late",
        RADIUS,
        "lib.snapshot(lib.stop_gradient(self.matrix))",
        "self.matrix",
        "test_radius.py matrix_that_is_overwritten",
    ),
    Mutant(
        "Mahalanobis: equal whatever the entries",
        RADIUS,
        "_numbers(lib, self.matrix)).tobytes()",
        "_numbers(lib, self.matrix)).tobytes()[:0]",
        "test_radius.py equal_matrices and numpy",
    ),
    Mutant(
        "JAX: sign of the pullback",
        JAX_BIND,
        "ad.instantiate_zeros(g))\n\n    def wanted",
        "-ad.instantiate_zeros(g))\n\n    def wanted",
        bound("DiVeQ", "jax"),
    ),
    Mutant(
        "JAX: the pushforward's residuals held constant",
        JAX_BIND,
        "return out, moved + pushforward_p",
        "return out, pushforward_p",
        "test_second_order.py jax_hessian",
    ),
    Mutant(
        "JAX: the pushforward's tangents held constant",
        JAX_BIND,
        "return out, moved + pushforward_p.bind(*residuals, ddz, ddcodebook, rule=rule)",
        "return out, moved",
        "test_second_order.py jax_hessian",
    ),
    Mutant(
        "JAX: pushforward of the codebook by that of z",
        JAX_BIND,
        "noise[0] if noise else None, dz, dcodebook)",
        "noise[0] if noise else None, dz, 0 * dcodebook)",
        "test_estimators.py pushes_forward and jax and DiVeQ",
    ),
    # The rest of the family
    Mutant("rotation: R for its transpose", ROTATION, "(g, -1.0), None", "(g, 1.0), None", "test_rotation.py torch"),
    Mutant(
        "rotation: s inverted",
        ROTATION,
        "s = long_q / one_where(lib, lost, long_z)",
        "s = long_z / one_where(lib, lost, long_q)",
        "test_rotation.py torch",
    ),
    Mutant(
        "curve: the ends exchanged",
        SPACE_FILLING,
        "return (1 - t) * c_1 + t * c_2",
        "return t * c_1 + (1 - t) * c_2",
        CURVE,
    ),
    Mutant("curve: the first codeword twice", SPACE_FILLING, "indices, indices + 1)", "indices, indices)", CURVE),
    Mutant(
        "curve: weight of the first end", SPACE_FILLING, "g_1 = u_1.times((1 - t) * w_1", "g_1 = u_1.times(w_1", CURVE
    ),
    Mutant("curve: g_2 stays with z", SPACE_FILLING, "return g - g_1 - g_2", "return g - g_1", CURVE),
    Mutant(
        "curve: the second end gets no gradient",
        SPACE_FILLING,
        "return self.lib.segment_add(total, g_2, _following(self.lib, indices))",
        "return total",
        CURVE,
    ),
    Mutant(
        "curve: w carries gradient", SPACE_FILLING, "lib.direction(x)[1].stopped(lib)", "lib.direction(x)[1]", CURVE
    ),
    Mutant(
        "curve: position not clipped",
        CURVE_MODULE,
        "return within(lib, t, 0.0, 1.0)[:, 0]",
        "return t[:, 0]",
        "test_space_filling.py projection",
    ),
    Mutant(
        "residual: the residual not reduced",
        RESIDUAL,
        "residual = residual - stages[-1][0]\n        return",
        "residual = residual + 0\n        return",
        "test_compose.py autograd",
    ),
    Mutant(
        "residual: chain cut",
        RESIDUAL,
        "g_q = g if g_residual is None else g - g_residual",
        "g_q = g",
        "test_compose.py autograd",
    ),
    Mutant(
        "residual: computed in 16 bits",
        RESIDUAL,
        "dtype = lib.compute_dtype(lib.result_dtype(z, codebook))",
        "dtype = lib.result_dtype(z, codebook)",
        "test_compose_dtypes.py bit_for_bit and numpy",
    ),
    Mutant(
        "residual: decoded in the dtype of the codebook",
        RESIDUAL,
        "wide = asked if lib.xp.finfo(asked).bits > lib.xp.finfo(held).bits else held",
        "wide = codebook.dtype",
        "test_compose_dtypes.py bit_for_bit and numpy",
    ),
    Mutant(
        "residual: a dropped stage decodes to NaN",
        RESIDUAL,
        "lib.xp.where(dropped, lib.xp.zeros_like(q), q)",
        "q",
        "test_compose_dtypes.py dropped_stage_adds and numpy",
    ),
    Mutant(
        "residual: a later stage that finds nothing is as if dropped",
        RESIDUAL,
        "lib.xp.where(found < 0, found, first)",
        "lib.xp.where(found < -1, found, first)",
        "test_compose_dtypes.py finds_nothing and numpy",
    ),
    Mutant(
        "JAX: an unsigned index wraps to the mark",
        "backends/diveq_jax/__init__.py",
        "x = jnp.minimum(x, jnp.asarray(jnp.iinfo(jnp.int32).max, x.dtype))",
        "x = jnp.maximum(x, jnp.asarray(0, x.dtype))",
        "test_compose_dtypes.py out_of_range and jax and uint32",
    ),
    Mutant(
        "MLX: an index out of range reads other memory",
        "backends/diveq_mlx/__init__.py",
        "mx.where(indices < codebook.shape[0], indices, -1)",
        "mx.where(indices < codebook.shape[0], indices, 0)",
        "test_compose_dtypes.py out_of_range and mlx",
    ),
    Mutant(
        "residual: a dropped stage gets the gradient",
        RESIDUAL,
        "pullback_of_stage(stage.kept(g_q))",
        "pullback_of_stage(g_q)",
        "test_compose_dtypes.py passes_by_a_dropped and numpy",
    ),
    Mutant(
        "residual: a dropped stage moves what is left",
        RESIDUAL,
        "self.lib.xp.where(self.dropped, self.lib.xp.zeros_like(x), x)",
        "x",
        "test_compose_dtypes.py dropped_stage_adds and numpy",
    ),
    Mutant(
        "product: groups overlap",
        PRODUCT,
        "slice(part * width, (part + 1) * width)",
        "slice(0, width)",
        "test_compose.py each_group and numpy",
    ),
    Mutant("FSQ: the paper's tan", FSQ, "math.atanh(o / h)", "math.tan(o / h)", "test_fsq.py numpy"),
    Mutant(
        "FSQ: scale of the gradient",
        FSQ_RULE,
        "((1 - tanh) * (1 + tanh)) / halves",
        "((1 - tanh) * (1 + tanh))",
        "test_fsq.py torch",
    ),
    Mutant(
        "Gumbel: temperature lost",
        GUMBEL_RULE,
        "y * (x - self.lib.dot(y, x)) / self.estimator.temperature",
        "y * (x - self.lib.dot(y, x))",
        "test_gumbel.py torch",
    ),
    Mutant(
        "Gumbel: a row that is not finite in the codebook's gradient",
        GUMBEL_RULE,
        "kept = zero_rows(lib, lib.xp.expand_dims(indices < 0, axis=1), g)",
        "kept = g",
        "test_gumbel.py not_finite_adds and jax",
    ),
    Mutant(
        "Gumbel: a codeword excluded loses the row",
        GUMBEL,
        "xp.all(there | (xp.isinf(total) & (total < 0)), axis=-1)",
        "xp.all(there, axis=-1)",
        "test_gumbel.py excludes_its_codeword and torch",
    ),
    Mutant(
        "Gumbel: a row without codewords has a first",
        GUMBEL,
        " & xp.any(there, axis=-1)",
        "",
        "test_gumbel.py nothing_left and numpy",
    ),
    Mutant("Gumbel: y y^T lost", GUMBEL_RULE, "y * (x - self.lib.dot(y, x))", "y * x", "test_gumbel.py torch"),
    # Pushforwards of these
    Mutant("curve: tangent of the first end and of z added", SPACE_FILLING, "dends[0] - dz", "dends[0] + dz", CURVE),
    Mutant("curve: tangent along u", SPACE_FILLING, "w_2.times(t * u_2.dot", "u_2.times(t * u_2.dot", CURVE),
    Mutant(
        "curve: tangent of one end twice",
        SPACE_FILLING,
        "for i in (indices, _following(lib, indices))]",
        "for i in (indices, indices)]",
        CURVE,
    ),
    Mutant(
        "rotation: pushforward by the transpose",
        ROTATION,
        "_rotation(lib, z, q)(dz, 1.0)",
        "_rotation(lib, z, q)(dz, -1.0)",
        "test_rotation.py verbs_are_plain and numpy",
    ),
    Mutant(
        "FSQ: slope of z itself",
        FSQ,
        "flat_rows(call.lib, dz), call.grid)",
        "call.z, call.grid)",
        "test_fsq.py verbs_are_plain and numpy",
    ),
    Mutant(
        "Gumbel: tangent of the codewords lost",
        GUMBEL_RULE,
        "moved = moved + lib.take_rows(dcodewords, indices)",
        "moved = moved + 0 * lib.take_rows(dcodewords, indices)",
        "test_gumbel.py verbs_are_plain and numpy",
    ),
    Mutant(
        "Gumbel: the tangent's derivative through y lost",
        GUMBEL_RULE,
        "moved = moved + lib.matmul(self._live(y, indices), dcodewords)",
        "moved = moved + 0",
        "test_gumbel.py forward_over_forward",
    ),
    Mutant(
        "residual: tangent of the residual not reduced",
        RESIDUAL,
        "d_residual - moved",
        "d_residual",
        "test_compose.py adjoint",
    ),
    Mutant(
        "residual: gradient of the first stages lost",
        RESIDUAL,
        "g_in if g_residual is None else g_residual + g_in",
        "g_in",
        "test_compose.py autograd",
    ),
    Mutant(
        "product: tangent of a group lost",
        PRODUCT,
        "verb(z[here], words, dz[here], dwords",
        "verb(z[here], words, 0 * dz[here], dwords",
        "test_compose.py adjoint",
    ),
    Mutant(
        "shared codebook: gradient of the last part alone",
        COMPOSE,
        "total = total + gradient",
        "total = gradient",
        "test_compose.py autograd",
    ),
    # The search
    Mutant(
        "search: no centring",
        SEARCH,
        "centre = xp.where(xp.isfinite(rounded), rounded, mean)",
        "centre = 0 * mean",
        "test_search.py nearest_is_right and strict",
    ),
    Mutant(
        "search: centre anywhere",
        SEARCH,
        "rounded = xp.round(mean / spread) * spread",
        "rounded = mean",
        "test_search.py (ties or hides) and strict",
    ),
    Mutant(
        "search: no scale",
        SEARCH,
        "return centre, xp.where(spread < 1,",
        "return centre, xp.ones_like(spread) + 0 * xp.where(spread < 1,",
        "test_search.py (scaling_by or largest) and strict",
    ),
    Mutant(
        "search: half a square too much",
        SEARCH,
        "keepdims=True) * 0.5",
        "keepdims=True)",
        "test_search.py nearest_is_right and strict",
    ),
    Mutant(
        "search: the last of copies",
        SEARCH,
        "first = lib.as_indices(lib.first_equal(keys))",
        "first = lib.as_indices(xp.arange(codebook.shape[0]))",
        "test_search.py copies_give and strict",
    ),
    Mutant(
        "search: keys that meet by chance stay so",
        SEARCH,
        "_ROUNDS = 64",
        "_ROUNDS = 1",
        "test_search_accuracy.py meet_by_chance",
    ),
    Mutant(
        "search: a lost row finds something",
        SEARCH,
        "xp.where(finite, chosen, xp.full_like(chosen, -1))",
        "chosen",
        "test_search.py minus_one and strict",
    ),
    Mutant(
        "NumPy's product: not centred",
        NUMPY_SEARCH,
        "if centred:",
        "if False:",
        "test_search.py nearest_is_right and without",
    ),
    Mutant(
        "NumPy's product: a lost row finds something",
        NUMPY_SEARCH,
        "np.where(np.isfinite(best), chosen, -1)",
        "chosen",
        "test_search.py minus_one and without",
    ),
    Mutant(
        "NumPy's product: a chunk's remainder lost",
        NUMPY_SEARCH,
        "range(0, z.shape[0], rows or 1)",
        "range(0, z.shape[0] - rows + 1, rows or 1)",
        "test_search.py number_of_rows and without",
    ),
    Mutant(
        "faiss: vectors not centred",
        NUMPY_SEARCH,
        "np.subtract(z[start : start + rows], centre, dtype=e.dtype)",
        "np.subtract(z[start : start + rows], 0 * centre, dtype=e.dtype)",
        "test_search_accuracy.py statement and numpy and order",
    ),
    Mutant(
        "torch: a scaled sum with the scale's sign lost",
        TORCH,
        "torch.add(x, y, alpha=c)",
        "torch.add(x, y, alpha=-c)",
        "test_estimators.py torch and DiVeQ",
    ),
    Mutant(
        "torch: a scaled sum without its scale",
        TORCH,
        "torch.addcmul(x, y, c) if",
        "torch.add(x, y) if",
        "test_estimators.py torch and DiVeQ",
    ),
    Mutant(
        "torch's product: not scaled",
        TORCH_SEARCH,
        "search.framed_rows(lib, chunk, centre, scale)",
        "search.framed_rows(lib, chunk, centre, scale / scale)",
        "test_search.py nearest_is_right and product",
    ),
    Mutant(
        "torch's product: any copy",
        TORCH_SEARCH,
        "chosen = canonical[scores[here].argmin(dim=1)]",
        "chosen = scores[here].argmin(dim=1)",
        "test_search.py round_apart and torch",
    ),
    Mutant(
        "NumPy's product: any copy",
        NUMPY_SEARCH,
        "if canonical is not None:",
        "if False:",
        "test_search.py round_apart and numpy",
    ),
    Mutant(
        "search: far vectors not brought back",
        SEARCH,
        "inside = size * scale <= 2.0 ** (REACH - 2)",
        "inside = size >= 0",
        "test_search_accuracy.py (never_lost or statement) and strict",
    ),
    Mutant(
        "search: far vectors without their weight",
        SEARCH,
        "xp.where(inside, xp.ones_like(size), (0.25 / scale) / own)",
        "xp.ones_like(size)",
        "test_search_accuracy.py (never_lost or statement) and strict",
    ),
    Mutant(
        "search: differences of the largest codewords overflow",
        SEARCH,
        "part = xp.where(scale < 1, xp.full_like(scale, 0.25), xp.ones_like(scale))",
        "part = xp.ones_like(scale)",
        "test_search_accuracy.py statement and strict and overflow",
    ),
    Mutant(
        "search: an infinite spread",
        SEARCH,
        "power_of_two(lib, xp.where(xp.isfinite(reach), reach, largest))",
        "power_of_two(lib, reach)",
        "test_search_accuracy.py statement and strict and overflow",
    ),
    Mutant(
        "NumPy's product: far vectors not brought back",
        NUMPY_SEARCH,
        "        if not near:\n            y[here, :-1], y[here, -1:] =",
        "        if False:\n            y[here, :-1], y[here, -1:] =",
        "test_search_accuracy.py (never_lost or statement) and numpy",
    ),
    Mutant(
        "NumPy's product: a weight left behind",
        NUMPY_SEARCH,
        "        if not near:\n            y[:, -1] = 1",
        "        if False:\n            y[:, -1] = 1",
        "test_search_accuracy.py left_behind",
    ),
    Mutant(
        "faiss: believed for any vector",
        NUMPY_SEARCH,
        'far = np.flatnonzero(~(squares <= np.take(limit, chosen, mode="clip")) | (chosen < 0))',
        "far = np.flatnonzero(chosen < 0)",
        "test_search_accuracy.py (with_and_without or statement) and numpy",
    ),
    Mutant(
        "faiss: its lost vectors are lost",
        NUMPY_SEARCH,
        "| (chosen < 0))",
        "& (chosen >= 0))",
        "test_search_accuracy.py never_lost and numpy",
    ),
    Mutant(
        "NumPy: another byte order in float32",
        NUMPY,
        "np.float64 if dtype.itemsize == 8 else np.float32",
        "np.float64 if dtype == np.dtype(np.float64) else np.float32",
        "test_search_accuracy.py byte_order",
    ),
    # Losses, upkeep of codebooks and diagnostics
    Mutant(
        "losses: the codebook's gradient of the encoder",
        LOSSES,
        "rows = -call.slope(",
        "rows = call.slope(",
        "test_losses.py plain_automatic and numpy and codebook",
    ),
    Mutant(
        "losses: half the gradient",
        LOSSES,
        "(2 * self.lib.astype(g",
        "(self.lib.astype(g",
        "test_losses.py plain_automatic and numpy",
    ),
    Mutant(
        "losses: masked vectors counted",
        LOSSES,
        "xp.astype(self.mask, self.compute_dtype)",
        "xp.ones_like(xp.astype(self.mask, self.compute_dtype))",
        "test_losses.py masked_is_the_subset and numpy",
    ),
    Mutant(
        "losses: codebook loss moves the encoder",
        LOSSES,
        "call.value(call.lib.stop_gradient(z), codebook)",
        "call.value(z, codebook)",
        "test_losses.py both_orders and torch",
    ),
    Mutant(
        "EMA: decay exchanged",
        CODEBOOK,
        "decay * old + (1 - decay) * xp.where",
        "(1 - decay) * old + decay * xp.where",
        "test_codebook.py sums_over_counts and numpy",
    ),
    Mutant(
        "EMA: rate without 1 - m",
        CODEBOOK,
        "xp.where(used, (1 - decay) / ",
        "xp.where(used, 1 / ",
        "test_codebook.py gradient_descent and torch",
    ),
    Mutant(
        "EMA: a lost row counts",
        CODEBOOK,
        "chosen = finite & (segments >= 0)",
        "chosen = segments >= 0",
        "test_codebook.py contributes_nothing and numpy",
    ),
    Mutant(
        "EMA: the state over the codebook",
        CODEBOOK,
        "return lib.xp.where(kept, state.means,",
        "return lib.xp.where(kept | True, state.means,",
        "test_codebook.py takes_precedence and numpy",
    ),
    Mutant(
        "EMA: an overflow is written",
        CODEBOOK,
        "used & xp.all(xp.isfinite(rounded), axis=1)",
        "used",
        "test_upkeep.py beyond_its_dtype",
    ),
    Mutant(
        "EMA: the state is rounded to 16 bits",
        CODEBOOK,
        "EMAState(n, xp.where(written, moved, means))",
        "EMAState(n, xp.where(written, lib.astype(rounded, means.dtype), means))",
        "test_codebook.py small_moves and numpy",
    ),
    Mutant(
        "EMA: each rank by itself",
        CODEBOOK,
        "    total = ranks.sum(total)",
        "    total = total + 0",
        "test_codebook.py ranks_move and numpy",
    ),
    Mutant(
        "replacement: draws not stratified",
        REPLACEMENT,
        "(order - number + uniform(lib, noise[:, width:]))",
        "(0 * order + uniform(lib, noise[:, width:]))",
        "test_codebook.py in_proportion",
    ),
    Mutant(
        "replacement: threshold of the sum",
        REPLACEMENT,
        "threshold * xp.sum(n) / count",
        "threshold * xp.sum(n)",
        "test_codebook.py thresholds and numpy",
    ),
    Mutant(
        "replacement: the published jitter",
        REPLACEMENT,
        "jitter * deviation * e + xp.where(e < 0, -unit, unit)",
        "1e-9 * e",
        "test_codebook.py never_exact",
    ),
    Mutant(
        "replacement: used codewords alike",
        REPLACEMENT,
        "words, xp.where(unused, xp.zeros_like(n), n)",
        "words, xp.where(unused, xp.zeros_like(n), xp.ones_like(n))",
        "test_codebook.py in_proportion",
    ),
    Mutant(
        "replacement: moving averages of the past",
        REPLACEMENT,
        "counts = xp.where(replaced, xp.zeros_like(state.counts), state.counts)",
        "counts = state.counts",
        "test_codebook.py replacement_by_use and numpy",
    ),
    Mutant(
        "linear: W for its transpose",
        LINEAR,
        "_product(lib, g, transposed(weight, (1, 0)))",
        "_product(lib, g, weight)",
        "test_linear.py pullback_and_tangent and numpy",
    ),
    Mutant(
        "linear: tangent of E lost",
        LINEAR,
        "by_frozen + by_weight",
        "by_weight",
        "test_linear.py pullback_and_tangent and numpy",
    ),
    Mutant(
        "linear: spread 1 / D", LINEAR, "noise * width**-0.5", "noise / width", "test_linear.py beginning and numpy"
    ),
    Mutant(
        "k-means: empty clusters stay",
        KMEANS,
        "xp.where((empty & apart)[:, None], seeds, moved)",
        "moved",
        "test_kmeans.py empty_clusters and numpy",
    ),
    Mutant(
        "k-means: inertia in the frame's units",
        KMEANS,
        "inertia * frame.size * frame.size",
        "inertia * frame.size",
        "test_kmeans.py are_found and numpy",
    ),
    Mutant(
        "k-means++: the worst of the candidates",
        KMEANS,
        "best = xp.argmin(inertias, keepdims=True)",
        "best = xp.argmax(inertias, keepdims=True)",
        "test_kmeans.py plus_plus_by_definition",
    ),
    Mutant(
        "k-means++: drawn in proportion to the distance",
        KMEANS,
        "inertia > 0, closest, self.weights)",
        "inertia > 0, closest**0.5, self.weights)",
        "test_kmeans.py plus_plus_by_definition",
    ),
    Mutant(
        "normalize: the part along x stays",
        COSINE,
        "(v - lib.dot(v, u) * u)",
        "(v - 0 * u)",
        "test_linear.py pullback_of_normalize and numpy",
    ),
    Mutant(
        "normalize: zeros have a derivative",
        COSINE,
        "zero_rows(lib, rho == 0, across)",
        "across",
        "test_linear.py tangent_of_normalize and numpy",
    ),
    Mutant(
        "normalize: the length lost",
        COSINE,
        "u) * u) / one_where(lib, rho == 0, rho)",
        "u) * u)",
        "test_linear.py pullback_of_normalize and numpy",
    ),
    Mutant(
        "cosine: a codeword of zeros is any",
        COSINE,
        "xp.astype(rho == 0, rho.dtype)",
        "xp.astype(rho < 0, rho.dtype)",
        "test_linear.py zeros_have and numpy",
    ),
    Mutant(
        "ranks: the sum is given the caller's array",
        RANKS,
        "self.all_reduce(lib.copy(x))",
        "self.all_reduce(x)",
        "test_upkeep.py sum_is_given_a_copy and numpy",
    ),
    Mutant(
        "ranks: each keeps its own noise",
        RANKS,
        "return ranks.agreed(lib.standard_normal(function, zeros, rng))",
        "return lib.standard_normal(function, zeros, rng)",
        "test_upkeep.py any_seed and numpy",
    ),
    Mutant(
        "ranks: noise as long as that of all",
        RANKS,
        "total[:-2], total[-2] / total[-1]",
        "total[:-2], total[-2]",
        "test_upkeep.py agree_on_is_standard_normal",
    ),
    Mutant(
        "ranks: differences go unseen",
        RANKS,
        "differs = xp.any(xp.abs(own - mean) > rounding)",
        "differs = xp.any(xp.abs(own - own) > rounding)",
        "test_upkeep.py told_so and numpy",
    ),
    Mutant(
        "spread: large vectors as they are",
        SPREAD,
        "one * reach**-2, xp.where(",
        "one, xp.where(",
        "test_upkeep.py differences_overflow and torch",
    ),
    Mutant(
        "spread: small vectors as they are",
        SPREAD,
        "one, one * reach**2))",
        "one, one))",
        "test_upkeep.py kmeans_is_the_same_at_every_scale",
    ),
    Mutant(
        "k-means: a codeword that stays is rounded",
        KMEANS,
        "found = xp.where(kept, begin, found)",
        "found = xp.where(kept, found, found)",
        "test_upkeep.py does_not_move and numpy",
    ),
    Mutant(
        "EMA: large differences as they are",
        CODEBOOK,
        "largest > reach, one * reach**-2, one",
        "largest > reach, one, one",
        "test_upkeep.py averages_of_the_largest and numpy",
    ),
    Mutant(
        "EMA: the state is the codebook",
        CODEBOOK,
        "lib.copy(lib.stop_gradient(codebook))",
        "lib.stop_gradient(codebook)",
        "test_upkeep.py changes_nothing and numpy",
    ),
    Mutant(
        "replacement: next to the largest number there is no room",
        REPLACEMENT,
        "xp.where(xp.isfinite(new), new, other)",
        "xp.where(xp.isfinite(new), new, new)",
        "test_upkeep.py ends_of_the_range",
    ),
    Mutant(
        "normalize: half of the scale",
        COSINE,
        "across * half * half",
        "across * half",
        "test_upkeep.py derivative_of_a_direction",
    ),
    Mutant(
        "usage: one sum of ones",
        DIAGNOSTICS,
        "flat.shape[0] <= _COUNTED_AT_ONCE",
        "flat.shape[0] > 0",
        "test_upkeep.py beyond_the_whole",
    ),
    Mutant(
        "NumPy: underflow is raised",
        NUMPY,
        'with np.errstate(all="ignore"):',
        'with np.errstate(over="ignore", invalid="ignore"):',
        "test_upkeep.py nothing_is_raised and GumbelST",
    ),
    Mutant(
        "coefficient: z added",
        DIAGNOSTICS,
        "(lib.astype(q, dtype) - lib.astype(z, dtype))",
        "(lib.astype(q, dtype) + lib.astype(z, dtype))",
        "test_diagnostics.py coefficient and numpy",
    ),
    Mutant(
        "positive share: zero is positive",
        DIAGNOSTICS,
        "lib.astype(c > 0,",
        "lib.astype(c >= 0,",
        "test_definitions.py nothing_is_not_positive",
    ),
    Mutant(
        "equivalent loss: the coefficient carries gradient",
        DIAGNOSTICS,
        "lib.stop_gradient(lib.xp.sum(rows[0] * (rows[2] - rows[1]), axis=-1, keepdims=True))",
        "lib.xp.sum(rows[0] * (rows[2] - rows[1]), axis=-1, keepdims=True)",
        "test_diagnostics.py radial_estimator and torch",
    ),
    Mutant(
        "perplexity: in bits",
        DIAGNOSTICS,
        "xp.exp(-xp.sum(p",
        "2.0 ** (-xp.sum(p",
        "test_diagnostics.py perplexity and numpy",
    ),
)


def times_there(mutant: Mutant, root: Path = ROOT) -> int:
    """How often the text to replace occurs."""
    return (root / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def snapshot(folder: Path) -> None:
    """What the tests need of the project, so that edits meanwhile change nothing."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("diveq_core", "backends", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "mutant_report.py").write_text(PLUGIN, encoding="utf-8")


def run(project: Path, mutant: Mutant | None, tests: str) -> dict:
    """The report of pytest on a copy of the project, with the mutant if there is one."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "project"
        shutil.copytree(project, copy)
        if mutant is not None:
            text = (copy / mutant.file).read_text(encoding="utf-8")
            (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        file, expression = tests.split(" ", 1)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "backends")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_PROFILE": "default",
            "MUTANT_REPORT": str(copy / "report.json"),
        }
        command = [sys.executable, "-m", "pytest", "-p", "mutant_report", "-p", "no:cacheprovider", "-x", "-q"]
        command += ["--tb=no", f"tests/{file}", "-k", expression]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        report = copy / "report.json"
        if not report.exists():
            return {"status": -1, "collected": 0, "failures": [], "output": done.stdout[-500:] + done.stderr[-500:]}
        return json.loads(report.read_text(encoding="utf-8"))


def verdict(project: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the tests caught it, and how."""
    report = run(project, mutant, mutant.tests)
    if not report["failures"]:
        return False, report.get("output", f"{report['collected']} tests pass")
    failure = report["failures"][0]
    if failure["when"] != "call" or failure["error"] in NOT_MATHEMATICS:
        return False, f"NOT RUN: {failure['when']} {failure['error']} {failure['test']}"
    return True, f"{failure['error']} in {failure['test'].split('::')[-1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants to try at a time")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.what]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        project = Path(folder)
        snapshot(project)
        for mutant in mutants:
            if (count := times_there(mutant, project)) != 1:
                print(f"{mutant.what}: the text to replace occurs {count} times in {mutant.file}, expected once")
                return 1
        # Starting takes most of the time, so what is expected to pass runs together.
        selections: dict[str, set[str]] = {}
        for mutant in mutants:
            file, expression = mutant.tests.split(" ", 1)
            selections.setdefault(file, set()).add(expression)
        together = [f"{file} {' or '.join(f'({e})' for e in sorted(chosen))}" for file, chosen in selections.items()]
        reports = pool.map(lambda tests: run(project, None, tests), together)
        for tests, report in zip(together, reports, strict=True):
            if report["status"] != 0:
                print(f"not green without a mutant: {tests}: {report}")
                return 1
            print(f"green without a mutant: {report['collected']} tests of {tests.split()[0]}", flush=True)
        caught = 0
        verdicts = pool.map(lambda mutant: verdict(project, mutant), mutants)
        for mutant, (good, how) in zip(mutants, verdicts, strict=True):
            caught += good
            print(f"{'caught' if good else 'MISSED':7} {mutant.what:50} {how}", flush=True)
    print(f"caught {caught}/{len(mutants)}")
    return 0 if caught == len(mutants) and mutants else 1


if __name__ == "__main__":
    raise SystemExit(main())
