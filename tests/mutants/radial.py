"""Radial estimators and their radii, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, second, verbs

MUTANTS = (
    Mutant(
        "radial: sign of the term in g_z",
        "return g + coefficient * to_z",
        "return g - coefficient * to_z",
        verbs("Power or PNorm"),
    ),
    Mutant(
        "radial: the codebook gets z's gradient",
        "coefficient * to_z, coefficient * to_q",
        "coefficient * to_z, coefficient * to_z",
        verbs("Power or Cosine"),
    ),
    Mutant(
        "radial: the power of two not taken back",
        "lib.stop_gradient(log_r)), 1 / k",
        "lib.stop_gradient(log_r)), 1.0",
        "test_second_order.py extreme and Power",
    ),
    Mutant(
        "radial: the tangent of z subtracted",
        "(to_q * back, dq) + lib.dot(",
        "(to_q * back, dq) - lib.dot(",
        verbs("Power or Cosine"),
    ),
    Mutant(
        "radial: the tangent of q lost",
        "(lib.dot(to_q * back, dq) + lib.dot(to_z * back, dz))",
        "lib.dot(to_z * back, dz)",
        verbs("Power or Cosine"),
    ),
    Mutant(
        "radial: the error is held constant",
        "* lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        "* lib.xp.exp(log_r - log_r)",
        second("Power or Cosine"),
    ),
    Mutant(
        "radial: the direction carries gradient",
        "return lib.stop_gradient(d * k) * lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        "return (d * k) * lib.xp.exp(log_r - lib.stop_gradient(log_r))",
        second("Power or Cosine"),
    ),
    Mutant(
        "radial: the ln r form differentiated",
        "coefficient = lib.dot(g, live) * back",
        "coefficient = lib.dot(g, q - z)",
        second("Power or Cosine"),
    ),
    Mutant("Power: alpha lost", "self.alpha * u * safe_inverse", "u * safe_inverse", verbs("Power")),
    Mutant("Power: alpha + 1", "self.alpha * u * safe_inverse", "(self.alpha + 1) * u * safe_inverse", verbs("Power")),
    Mutant("Power: alpha lost in ln r", "self.alpha * safe_log(lib, rho)", "safe_log(lib, rho)", second("Power")),
    Mutant("Power: d / rho", "self.alpha * u * safe_inverse(lib, length, k)", "self.alpha * u * k", verbs("Power")),
    Mutant("Power: sign of d(ln r)/dz", "return to_q, -to_q", "return to_q, to_q", verbs("Power"), within="Power"),
    Mutant("PseudoHuber: delta for its square", "(delta / s) ** 2", "(delta / s)", verbs("PseudoHuber")),
    Mutant("PseudoHuber: ln r^2 for ln r", "0.5 * lib.xp.log(squared)", "lib.xp.log(squared)", second("PseudoHuber")),
    Mutant("PseudoHuber: no 1 / s", "d_s / squared / s", "d_s / squared", verbs("PseudoHuber")),
    Mutant(
        "PseudoHuber: delta not brought into range",
        "delta = min(max(self.delta, float(limits.smallest_normal)), float(limits.max))",
        "delta = self.delta",
        "test_radius.py out_of_the_dtype and numpy",
    ),
    Mutant("PNorm: |d|^p", "** (self.p - 1)", "** self.p", verbs("PNorm")),
    Mutant("PNorm: sign lost", "xp.where(v < 0, -power, power)", "power", verbs("PNorm")),
    Mutant("PNorm: ln r^p for ln r", "lib.dot(power, v)) / self.p", "lib.dot(power, v))", second("PNorm")),
    Mutant("PNorm: p = 2 has no second derivative at zero", "if self.p == 2:", "if False:", second("PNorm")),
    Mutant(
        "Mahalanobis: the matrix as it stands", "(m + lib.xp.permute_dims(m, (1, 0))) * 0.5", "m", verbs("Mahalanobis")
    ),
    Mutant(
        "Mahalanobis: ln r^2 for ln r",
        "0.5 * safe_log(lib, squared) - lib.xp.log(k)",
        "safe_log(lib, squared) - lib.xp.log(k)",
        second("Mahalanobis"),
    ),
    Mutant("Mahalanobis: half the gradient", "m_y / one_where(", "0.5 * m_y / one_where(", verbs("Mahalanobis")),
    Mutant("Cosine: sign of q-hat", "(h_r - q_hat)", "(h_r + q_hat)", verbs("Cosine")),
    Mutant("Cosine: sign of d(ln r)/dz", "to_z = -(h_r + z_hat)", "to_z = (h_r + z_hat)", verbs("Cosine")),
    Mutant("Cosine: h / r halved", "h_r = 2 * direction", "h_r = direction", verbs("Cosine")),
    Mutant(
        "Cosine: |z| for |q|",
        "safe_inverse(lib, q_length, q_scale)",
        "safe_inverse(lib, z_length, z_scale)",
        verbs("Cosine"),
    ),
    Mutant(
        "Cosine: parallel vectors forgotten",
        "zero_rows(lib, undefined, to_q), zero_rows(lib, undefined, to_z)",
        "to_q, to_z",
        "test_radius.py one_ray and numpy",
    ),
    Mutant(
        "Cosine: rounding taken for an angle",
        "zero_rows(lib, largest < 8 * float(xp.finfo(h.dtype).eps), h)",
        "h",
        "test_radius.py one_ray and numpy",
    ),
    Mutant(
        "CustomRadius: gradients swapped",
        "to_q, to_z = pair",
        "to_z, to_q = pair",
        verbs("CustomRadius"),
    ),
    Mutant(
        "CustomRadius: r = 0 forgotten",
        "zero_rows(lib, zero, to_q), zero_rows(lib, zero, to_z)",
        "to_q, to_z",
        "test_radius.py zero_where_rho_is and torch",
    ),
    Mutant(
        "Mahalanobis: the caller's array read late",
        "lib.snapshot(lib.stop_gradient(self.matrix))",
        "self.matrix",
        "test_radius.py matrix_that_is_overwritten",
    ),
    Mutant(
        "Mahalanobis: equal whatever the entries",
        "for x in _numbers(lib, self.matrix)]).tobytes()",
        "for x in _numbers(lib, self.matrix)]).tobytes()[:0]",
        "test_radius.py equal_matrices and numpy",
    ),
    Mutant(
        "custom radius: ln r in the dtype of the function",
        "return lib.astype(safe_log(lib, self._value(q, z)), q.dtype)",
        "return safe_log(lib, self._value(q, z))",
        "test_wider.py radius and jax",
    ),
    Mutant(
        "custom radius: gradients in the dtype of the function",
        "lib.astype(gradient, q.dtype)",
        "lib.astype(gradient, gradient.dtype)",
        "test_wider.py radius and jax",
    ),
)
