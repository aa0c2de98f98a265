"""Standard normal numbers on all threads of a CPU, where torch itself draws on one.

They are cut into chunks of one size, each from a generator of its own, whose whole state, of 624 words, is drawn from
the caller's stream: so they follow from that stream alone, whatever the number of threads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

# Entries of a chunk, which take most of a millisecond; up to so many come from the caller's stream itself.
CHUNK = 1 << 17

# Where the state of a generator has the words of its Mersenne twister.
_WORDS = slice(3 * 8, (3 + 624) * 8)

# Odd, so that nothing is lost. Of bits that are sums of others the product's upper ones are sums no longer.
_ODD = -7046029254386353131


def normal(like: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
    """Numbers with the shape and dtype of ``like``, an ordinary tensor on the CPU."""
    drawn = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    chunks = drawn.view(-1).split(CHUNK)
    seeds = torch.empty((len(chunks), 624), dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=rng)

    def fill(chunk: torch.Tensor, seed: torch.Tensor) -> None:
        generator = torch.Generator()
        state = generator.get_state()
        state[_WORDS].view(torch.int64).copy_((seed * _ODD >> 32) & 0xFFFFFFFF)
        generator.set_state(state)
        # A mode is its thread's alone.
        with torch.inference_mode(drawn.is_inference()):
            chunk.normal_(generator=generator)

    # Threads of this call alone, as none would survive a fork.
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(chunks))) as threads:
        list(threads.map(fill, chunks, seeds))
    return drawn
