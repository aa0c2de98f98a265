"""PyTorch, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, bound, second, verbs

MUTANTS = (
    Mutant(
        "torch: devices not compared",
        "if z.device != words.device:",
        "if False:",
        "test_torch_modules.py no_values_needed",
    ),
    Mutant("torch: nothing is held constant", "return x.detach()", "return x + 0", second("DiVeQ")),
    Mutant(
        "torch: gradients of a custom radius swapped",
        "return to_q, to_z",
        "return to_z, to_q",
        bound("callable", "torch"),
        within="TorchBackend.log_radius_gradients",
    ),
    Mutant(
        "torch: mixed dtypes give that of z",
        "return torch.promote_types(a.dtype, b.dtype)",
        "return a.dtype",
        "test_estimators.py mixed_dtypes and torch",
    ),
    Mutant(
        "torch: repeated indices lost",
        "total.index_add_(0, segments, values)",
        "total.index_put_((segments.long(),), values)",
        verbs("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: repeated indices lost where recorded",
        ".index_add(0, torch.where(lost, 0, segments), torch.where(lost[:, None], 0, values))",
        ".index_copy(0, torch.where(lost, 0, segments).long(), torch.where(lost[:, None], 0, values))",
        second("DiVeQ"),
    ),
    Mutant(
        "torch: direction of any length",
        "Direction(x, rho.reciprocal())",
        "Direction(x, rho**0)",
        verbs("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: backward is straight-through",
        "return None, None, g_z, g_codebook, None, None",
        "return None, None, g, g_codebook, None, None",
        bound("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: sign of the codebook's gradient",
        "return None, None, g_z, g_codebook, None, None",
        "return None, None, g_z, -g_codebook, None, None",
        bound("DiVeQ", "torch"),
    ),
    Mutant(
        "torch: pushforward forgets the codebook",
        "return _pushed(ctx.rule, z, codebook, indices, noise, dz, dcodebook)",
        "return _pushed(ctx.rule, z, codebook, indices, noise, dz, torch.zeros_like(codebook))",
        "test_estimators.py pushes_forward and torch and DiVeQ",
    ),
    Mutant(
        "torch: pushforward of z alone missing",
        "dz = torch.zeros_like(z) if dz is None else dz",
        "dz = torch.zeros_like(z)",
        "test_estimators.py pushes_forward and torch and DiVeQ",
    ),
    Mutant(
        "torch: a codebook without gradient is read late",
        "if not rule.trains_codebook:\n    return True",
        "if not rule.trains_codebook:\n    return False",
        "test_torch_overwritten.py gradient_is_of_the_one and data and Rotation",
    ),
    Mutant(
        "torch: no tangents under torch.func in a compiled function",
        "inner[0] - z, None if codebook is None",
        "inner[0] - inner[0], None if codebook is None",
        "test_torch_compile.py inside_a_compiled and jvp and not aot",
    ),
    Mutant(
        "torch: dual numbers in a compiled function have no tangent",
        "moved = _pushed(rule, own, words, indices, noise, dz, dcodebook)",
        "moved = torch.zeros_like(own)",
        "test_torch_compile.py dual_numbers and inside and DiVeQ",
    ),
    Mutant(
        "torch: dual numbers lost on the way into a compiled function",
        "if not (z.requires_grad or (codebook is not None and codebook.requires_grad)):",
        "if False:",
        "test_torch_compile.py dual_numbers and outside and DiVeQ",
    ),
    Mutant(
        "torch: a scaled sum with the scale's sign lost",
        "torch.add(x, y, alpha=c)",
        "torch.add(x, y, alpha=-c)",
        "test_estimators.py torch and DiVeQ",
    ),
    Mutant(
        "torch: a scaled sum without its scale",
        "torch.addcmul(x, y, c) if",
        "torch.add(x, y) if",
        "test_estimators.py torch and DiVeQ",
    ),
    Mutant(
        "torch's product: not scaled",
        "search.framed_rows(lib, chunk, centre, scale)",
        "search.framed_rows(lib, chunk, centre, scale / scale)",
        "test_search.py nearest_is_right and product",
    ),
    Mutant(
        "torch's product: any copy",
        "chosen = canonical[scores[here].argmin(dim=1)]",
        "chosen = scores[here].argmin(dim=1)",
        "test_search.py round_apart and torch",
    ),
    Mutant(
        "torch: a mode is passed by",
        "or torch._C._len_torch_dispatch_stack() > 0",
        "",
        "test_torch.py make_fx",
    ),
    Mutant(
        "torch: indices in NumPy's memory",
        "torch.from_numpy(found).clone()",
        "torch.from_numpy(found)",
        "test_torch_shortcuts.py resized",
    ),
    Mutant("torch: a sign in a bit is lost", "x = x.resolve_neg()", "pass", "test_torch_shortcuts.py sign_that"),
    Mutant(
        "torch: blocks go where tensors go that do not say",
        "torch.Tensor.new_empty",
        "lambda like, shape: torch.empty(shape, dtype=like.dtype)",
        "test_torch_shortcuts.py stay_where",
    ),
    Mutant(
        "torch: few vectors, whatever was overwritten",
        "assert ctx.saved_tensors is not None",
        "pass",
        "test_torch_overwritten.py may_not",
    ),
    Mutant(
        "Triton: what the first parts leave out is lost",
        "(tile - first.to(tl.float32)).to(tl.float16)",
        "(tile - tile).to(tl.float16)",
        "test_fused.py triton_interpreted",
    ),
    Mutant(
        "Triton: a row of several best scores is taken for certain",
        "close = tl.where(better, tl.where(hits >= 2 * _ONE, 1, 0)",
        "close = tl.where(better, tl.where(hits >= 2 * _ONE, 0, 0)",
        "test_fused.py triton_interpreted",
    ),
    Mutant(
        "Triton: a row as close to a codeword of another tile is taken for certain",
        "tl.where(least <= best + error, 1, close))",
        "close)",
        "test_fused.py triton_interpreted",
    ),
    Mutant(
        "Triton: only the first of the listed rows are searched again",
        "listed = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
        "listed = tl.arange(0, ROWS)",
        "test_fused.py triton_interpreted",
    ),
    Mutant(
        "Triton: short vectors beside a far codeword lose their digits",
        "_SHORTEST = 2.0**-40",
        "_SHORTEST = 2.0**4",
        "test_fused.py triton_keeps",
    ),
    Mutant(
        "torch: all chunks of noise from one seed",
        "threads.map(fill, chunks, seeds)",
        "threads.map(fill, chunks, [seeds[0]] * len(chunks))",
        "test_torch_draws.py comes_twice or independent",
    ),
    Mutant(
        "torch: chunks of noise by the number of threads",
        "split(CHUNK)",
        "split(CHUNK // torch.get_num_threads())",
        "test_torch_draws.py stream_alone",
    ),
    Mutant(
        "torch: chunks of noise pass a generator over",
        "random_(-(2**63), None, generator=rng)",
        "random_(-(2**63), None)",
        "test_torch_draws.py stream_alone",
    ),
)
