"""Upkeep of codebooks: averages, replacement, linear codebooks, k-means, ranks, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "linear codebook: the pullback reads the weight late",
        "frozen, weight = lib.snapshot(frozen), lib.snapshot(weight)",
        "frozen = lib.snapshot(frozen)",
        "test_quantize.py other_pullbacks and numpy and linear",
    ),
    Mutant(
        "linear codebook: the pullback reads the frozen factor late",
        "frozen, weight = lib.snapshot(frozen), lib.snapshot(weight)",
        "weight = lib.snapshot(weight)",
        "test_quantize.py other_pullbacks and numpy and linear",
    ),
    Mutant(
        "EMA: decay exchanged",
        "decay * old + (1 - decay) * xp.where",
        "(1 - decay) * old + decay * xp.where",
        "test_averages.py sums_over_counts and numpy",
    ),
    Mutant(
        "EMA: rate without 1 - m",
        "xp.where(used, (1 - decay) /",
        "xp.where(used, 1 /",
        "test_averages.py gradient_descent and torch",
    ),
    Mutant(
        "EMA: a lost row counts",
        "chosen = xp.logical_and(finite, segments >= 0)",
        "chosen = segments >= 0",
        "test_averages.py contributes_nothing and numpy",
    ),
    Mutant(
        "EMA: the state over the codebook",
        "return lib.xp.where(kept, state.means,",
        "return lib.xp.where(kept | True, state.means,",
        "test_averages.py takes_precedence and numpy",
    ),
    Mutant(
        "EMA: an overflow is written",
        "xp.logical_and(used, xp.all(xp.isfinite(rounded), axis=1))",
        "used",
        "test_range.py beyond_its_dtype",
    ),
    Mutant(
        "EMA: the state is rounded to 16 bits",
        "EMAState(n, xp.where(written, moved, means))",
        "EMAState(n, xp.where(written, lib.astype(rounded, means.dtype), means))",
        "test_averages.py small_moves and numpy",
    ),
    Mutant(
        "EMA: each rank by itself",
        "total = ranks.sum(total)",
        "total = total + 0",
        "test_averages.py ranks_move and numpy",
    ),
    Mutant(
        "replacement: draws not stratified",
        "(order - number + uniform(lib, noise[:, width:]))",
        "(0 * order + uniform(lib, noise[:, width:]))",
        "test_replacement.py in_proportion",
    ),
    Mutant(
        "replacement: threshold of the sum",
        "threshold * xp.sum(n) / count",
        "threshold * xp.sum(n)",
        "test_replacement.py thresholds and numpy",
    ),
    Mutant(
        "replacement: the published jitter",
        "jitter * deviation * e + xp.where(e < 0, -unit, unit)",
        "1e-9 * e",
        "test_replacement.py never_exact",
    ),
    Mutant(
        "replacement: used codewords alike",
        "words, xp.where(unused, xp.zeros_like(n), n)",
        "words, xp.where(unused, xp.zeros_like(n), xp.ones_like(n))",
        "test_replacement.py in_proportion",
    ),
    Mutant(
        "replacement: moving averages of the past",
        "counts = xp.where(replaced, xp.zeros_like(state.counts), state.counts)",
        "counts = state.counts",
        "test_replacement.py replacement_by_use and numpy",
    ),
    Mutant(
        "linear: W for its transpose",
        "_product(lib, g, transposed(weight, (1, 0)))",
        "_product(lib, g, weight)",
        "test_linear.py pullback_and_tangent and numpy",
    ),
    Mutant(
        "linear: tangent of E lost",
        "by_frozen + by_weight",
        "by_weight",
        "test_linear.py pullback_and_tangent and numpy",
    ),
    Mutant("linear: spread 1 / D", "noise * width**-0.5", "noise / width", "test_linear.py beginning and numpy"),
    Mutant(
        "k-means: empty clusters stay",
        "xp.where(xp.logical_and(empty, apart)[:, None], seeds, moved)",
        "moved",
        "test_clustering.py empty_clusters and numpy",
    ),
    Mutant(
        "k-means: inertia in the frame's units",
        "inertia * frame.size * frame.size",
        "inertia * frame.size",
        "test_clustering.py are_found and numpy",
    ),
    Mutant(
        "k-means++: the worst of the candidates",
        "best = xp.argmin(inertias, keepdims=True)",
        "best = xp.argmax(inertias, keepdims=True)",
        "test_clustering.py plus_plus_by_definition",
    ),
    Mutant(
        "k-means++: drawn in proportion to the distance",
        "inertia > 0, closest, self.weights)",
        "inertia > 0, closest**0.5, self.weights)",
        "test_clustering.py plus_plus_by_definition",
    ),
    Mutant(
        "ranks: the sum is given the caller's array",
        "self.all_reduce(lib.copy(x))",
        "self.all_reduce(x)",
        "test_ranks.py sum_is_given_a_copy and numpy",
    ),
    Mutant(
        "ranks: each keeps its own noise",
        "return found if noise is not None else self.agreed(found)",
        "return found",
        "test_ranks.py any_seed and numpy",
    ),
    Mutant(
        "ranks: noise as long as that of all",
        "total[:-2], total[-2] / total[-1]",
        "total[:-2], total[-2]",
        "test_ranks.py agree_on_is_standard_normal",
    ),
    Mutant(
        "ranks: differences go unseen",
        "differs = xp.any(xp.abs(own - mean) > rounding)",
        "differs = xp.any(xp.abs(own - own) > rounding)",
        "test_ranks.py told_so and numpy",
    ),
    Mutant(
        "spread: large vectors as they are",
        "one * reach**-2, xp.where(",
        "one, xp.where(",
        "test_range.py differences_overflow and torch",
    ),
    Mutant(
        "spread: small vectors as they are",
        "one, one * reach**2))",
        "one, one))",
        "test_range.py kmeans_is_the_same_at_every_scale",
    ),
    Mutant(
        "k-means: a codeword that stays is rounded",
        "found = xp.where(kept, begin, found)",
        "found = xp.where(kept, found, found)",
        "test_range.py does_not_move and numpy",
    ),
    Mutant(
        "EMA: large differences as they are",
        "2.0**-42, one * 2.0**-40, one",
        "2.0**-42, one, one",
        "test_range.py averages_of_the_largest and numpy",
    ),
    Mutant(
        "EMA: differences from a codeword that is far longer",
        "xp.where(xp.abs(scaled) > 2 * scale * largest, xp.zeros_like(means), scaled)",
        "scaled",
        "test_range.py far_longer and numpy",
    ),
    Mutant(
        "EMA: each rank looks at its own vectors alone",
        "ranks.sum(_largest(lib, rows, dtype))",
        "_largest(lib, rows, dtype)",
        "test_range.py as_one_process and numpy",
    ),
    Mutant(
        "EMA: what a codeword that is far longer keeps is lost",
        "share[:, None] * scaled",
        "0 * share[:, None] * scaled",
        "test_range.py far_longer and numpy",
    ),
    Mutant(
        "EMA: the state is the codebook",
        "lib.copy(lib.stop_gradient(codebook))",
        "lib.stop_gradient(codebook)",
        "test_memory.py changes_nothing and numpy",
        within="ema_init",
    ),
    Mutant(
        "replacement: next to the largest number there is no room",
        "xp.where(xp.isfinite(new), new, other)",
        "xp.where(xp.isfinite(new), new, new)",
        "test_range.py ends_of_the_range",
    ),
)
