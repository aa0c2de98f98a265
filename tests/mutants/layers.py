"""Layers: what is quantized, what counts, what is kept between steps, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "layer: the losses of later stages see the first one's vectors",
        "own = own + lib.stop_gradient(rows - own)",
        "own = own + 0 * lib.stop_gradient(rows - own)",
        "test_step.py quantize_and_the_losses",
    ),
    Mutant(
        "layer: the residual of a loss carries a gradient",
        "own = own + lib.stop_gradient(rows - own)",
        "own = rows + 0 * own",
        "test_step.py automatic_differentiation and stages",
    ),
    Mutant(
        "layer: the loss's gradient is not divided by the parts",
        "pull(zero + g * (weights[number] / count))",
        "pull(zero + g * weights[number])",
        "test_step.py automatic_differentiation and stages",
    ),
    Mutant(
        "layer: a masked vector counts",
        "found = self._marked(out.indices)",
        "found = out.indices",
        "test_step.py never_read and numpy and STE",
    ),
    Mutant(
        "layer: a masked vector gets the bias of the map back",
        "x_q, to_kept = maps.kept(lib, x_q, keep)",
        "_, to_kept = maps.kept(lib, x_q, keep)",
        "test_step.py never_read and numpy and projected",
    ),
    Mutant(
        "layer: what is skipped is read",
        "finite = lib.xp.all(lib.xp.isfinite(lib.stop_gradient(self.x)), axis=-1)",
        "finite = lib.xp.all(lib.xp.isfinite(0 * lib.stop_gradient(self.x[..., :1])), axis=-1)",
        "test_step.py not_finite",
    ),
    Mutant(
        "layer: dropout draws one stage less",
        "return 1 + lib.as_indices(",
        "return 0 + lib.as_indices(",
        "test_step.py drawn_number_of_stages",
    ),
    Mutant(
        "layer: only the first head is normalized",
        "grouped = (*shape[:-1], groups, shape[-1] // groups)",
        "grouped = (*shape[:-1], 1, shape[-1])",
        "test_step.py its_own_direction",
    ),
    Mutant(
        "layer: a corner is used by one segment only",
        "counts[()] = lib.xp.concat([counts[()], none]) + lib.xp.concat([none, counts[()]])",
        "counts[()] = lib.xp.concat([counts[()], none])",
        "test_upkeep.py corner",
    ),
    Mutant(
        "layer: sums of averages are of vectors",
        "d = rows - lib.take_rows(means, tokens)",
        "d = rows + 0 * lib.take_rows(means, tokens)",
        "test_upkeep.py those_of_ema_update",
    ),
    Mutant(
        "layer: averages move without a step",
        "state[name] = xp.where(happened, x, lib.astype(before[name], x.dtype))",
        "state[name] = x",
        "test_upkeep.py no_step and numpy",
    ),
    Mutant(
        "layer: each rank updates by itself",
        "flat = ranks.sum(flat)",
        "flat = flat + 0",
        "test_upkeep.py joined_batch",
    ),
    Mutant(
        "layer: replacement does not wait for uses",
        ">= _USES * count)",
        ">= 0 * count)",
        "test_upkeep.py waits_until",
    ),
    Mutant(
        "layer: replacement at every step",
        'state["steps"] % settings.replace_every == 0',
        'state["steps"] % 1 == 0',
        "test_upkeep.py that_of_replace_unused",
    ),
    Mutant(
        "layer: the averages of a replaced codeword stay",
        'values |= {"averages": new.state.means, "counts": new.state.counts}',
        'values |= {"averages": old["averages"], "counts": new.state.counts}',
        "test_upkeep.py that_of_replace_unused and ema",
    ),
    Mutant(
        "layer: a start counts what is masked or not finite",
        "e = ranks.draw(rows, xp.astype(valid, rows.dtype), positions)",
        "e = ranks.draw(rows, xp.ones_like(rows[:, 0]), positions)",
        "test_upkeep.py breaks_a_codebook",
    ),
    Mutant(
        "layer: every stage starts with the vectors",
        "groups[head] = groups[head] - lib.take_rows(",
        "groups[head] = groups[head] - 0 * lib.take_rows(",
        "test_upkeep.py later_stage",
    ),
    Mutant(
        "layer in torch: a checkpoint counts twice",
        "return torch._C._current_graph_task_id() == -1 and not",
        "return not",
        "test_torch_layer.py counts_once",
    ),
    Mutant(
        "layer in torch: an update reaches what backward reads",
        "state[name] = state[name].clone()",
        "state[name] = state[name].view_as(state[name])",
        "test_torch_layer.py backward_reads",
    ),
    Mutant(
        "layer in torch: what is drawn between steps is of the step's stream",
        "return torch.Generator(self.steps.device).manual_seed((self._seed + step) % (1 << 63))",
        "return None",
        "test_torch_layer.py counts_once",
    ),
    Mutant(
        "layer in torch: a compiled step that is computed again updates again",
        "    if torch._C._current_graph_task_id() == -1:\n        layer = _layers",
        "    if True:\n        layer = _layers",
        "test_torch_layer_compile.py compiled_layer_counts_once",
    ),
    Mutant(
        "layer in torch: what is known of a state outlives it",
        "module._begun = module._count = module._pending = None",
        "module._count = module._pending = None",
        "test_torch_layer.py begins_anew",
    ),
    Mutant(
        "layer in torch: statistics of a state outlive it",
        "module._begun = module._count = module._pending = None",
        "module._begun = module._count = None",
        "test_torch_layer.py that_is_held",
    ),
    Mutant(
        "layer: a sum that overflowed counts",
        "c, s = xp.where(there, c, xp.zeros_like(c)), xp.where",
        "c, s = c + 0, xp.where",
        "test_explicit.py overflows",
    ),
    Mutant(
        "layer file: settings that differ from the defaults are lost",
        'if field.name in ("dim", "codebook_size") or getattr(self, field.name) != field.default',
        'if field.name in ("dim", "codebook_size", "estimator")',
        "test_files.py settings_are_read",
    ),
    Mutant(
        "layer in MLX: no gradient for a codebook that the step begins",
        "begun[name] = mx.stop_gradient(begun[name]) + (state[name] - mx.stop_gradient(state[name]))",
        "begun[name] = mx.stop_gradient(begun[name])",
        "test_mlx_nn.py gradient_reaches",
    ),
    Mutant(
        "layer in MLX: unfreezing a model trains averages",
        "self.update(self.names)",
        "pass",
        "test_mlx_nn.py stays_frozen",
        within="_Frozen.clear",
    ),
    Mutant(
        "layer in Keras: replacement forgets what training moved",
        "assign(new[self.settings.table] - self._moved.value)",
        "assign(new[self.settings.table])",
        "test_keras.py replacement_moves",
    ),
    Mutant(
        "layer in Keras: a codebook that is set keeps what training moved",
        "self._moved.assign(ops.zeros_like(self._moved.value))",
        "pass",
        "test_keras.py codebook_can_be_set",
    ),
    Mutant(
        "layer in Keras: tokens of vectors in another dtype than a call gets",
        "if self.autocast and _floats(z) else z, mask)",
        "if False else z, mask)",
        "test_keras.py mixed_precision",
    ),
    Mutant(
        "layer: codebooks that heads share are counted apart",
        "counts[own] = counted + counts[own] if own in counts else counted",
        "counts[own] = counted",
        "layers/test_step.py perplexity and numpy",
    ),
)
