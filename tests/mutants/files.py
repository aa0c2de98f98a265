"""From files to tokens, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "fit: sums without a centre",
        "y -= self._centre[:, None]",
        "y -= 0 * self._centre[:, None]",
        "test_tokens_fit.py error_of_a_pass",
        within="streams.Sums.add",
    ),
    Mutant(
        "fit: the error of a pass, its middle term once",
        "self._squares - 2 * float(np.vdot(e, self._sums.T))",
        "self._squares - float(np.vdot(e, self._sums.T))",
        "test_tokens_fit.py error_of_a_pass",
    ),
    Mutant(
        "fit: stages of the whole vectors",
        "left = left - book.take(dq.nearest(left, book), axis=0)",
        "left = left + 0 * book.take(dq.nearest(left, book), axis=0)",
        "test_tokens_fit.py stages_and_groups",
        within="streams.Part.left",
    ),
    Mutant(
        "fit: codewords without vectors stay",
        "if not len(empty):",
        "if len(empty):",
        "test_tokens_fit.py codeword_without_vectors",
    ),
    Mutant(
        "encode: no number for the mark",
        "np.min_scalar_type(tokenizer.token_count - (0 if marks else 1))",
        "np.min_scalar_type(tokenizer.token_count - 1)",
        "test_tokens_commands.py smallest_integers",
    ),
    Mutant(
        "encode: rows that are there come again",
        "rows, marks = rows[again:], marks[again:]",
        "rows, marks = rows[0:], marks[0:]",
        "test_tokens_kept.py any_moment and zarr",
    ),
    Mutant(
        "encode: recorded before the disk has it",
        "self._note(self._safe())",
        "self._note(self._added)",
        "test_tokens_kept.py any_moment and npy",
        within="sinks.Sink.begin",
    ),
    Mutant(
        "encode: goes on with other data",
        'earlier["made_of"] != self.made_of',
        'earlier["made_of"] is None',
        "test_tokens_kept.py full_disk",
    ),
    Mutant(
        "patches: columns first",
        ".swapaxes(1, 2)",
        ".swapaxes(1, 3)",
        "test_tokens_sources.py patches",
        within="patches.cut",
    ),
)
