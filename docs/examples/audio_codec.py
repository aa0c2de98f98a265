"""A residual codec for speech in Equinox: each stage of its quantizer adds a kilobit a second."""

from __future__ import annotations

import wave
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.signal import lfilter

import diveq_core as dq
from common import ends, options, parsed, progress, table
from diveq_jax.equinox import VectorQuantizer

# The sentences of Debian's package asterisk-core-sounds-en-wav, spoken by Allison Smith, CC BY-SA 3.0.
SPEECH = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
RATE, HOP = 8000, 64
"""Samples a second, and samples of a frame, of which each stage makes one token."""

EMPHASIS, SCALE = 0.9, 1500
"""The codec hears high frequencies, where speech is weak, louder; and numbers of about unit size."""

DIM, CODES = 32, 256
LENGTH, BATCH = 64, 16
"""Frames of an excerpt, and excerpts of a step."""


class Block(eqx.Module):
    """A residual block over frames, (channels, T)."""

    wide: eqx.nn.Conv1d
    narrow: eqx.nn.Conv1d

    def __init__(self, channels: int, key: jax.Array) -> None:
        to_wide, to_narrow = jax.random.split(key)
        self.wide = eqx.nn.Conv1d(channels, channels, 5, padding=2, key=to_wide)
        self.narrow = eqx.nn.Conv1d(channels, channels, 1, key=to_narrow)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        del key
        return x + self.narrow(jax.nn.elu(self.wide(jax.nn.elu(x))))


class Codec(eqx.Module):
    """Sound (B, 64 T) to tokens (B, T, stages) and back."""

    encoder: eqx.nn.Sequential
    vq: VectorQuantizer
    decoder: eqx.nn.Sequential

    def __init__(self, stages: int, key: jax.Array, channels: int = 128) -> None:
        keys = jax.random.split(key, 9)
        blocks = [Block(channels, k) for k in keys[:4]]
        self.encoder = eqx.nn.Sequential(
            [
                eqx.nn.Conv1d(HOP, channels, 3, padding=1, key=keys[4]),
                *blocks[:2],
                eqx.nn.Conv1d(channels, DIM, 1, key=keys[5]),
            ]
        )
        # Each excerpt uses a random number of stages in training, so that any number of the first ones will do.
        dropped = {"stages": stages, "quantizer_dropout": True}
        averages = {"codebook_update": "ema", "ema_decay": 0.95, "replace_every": 50}
        self.vq = VectorQuantizer(DIM, CODES, dq.STE(), key=keys[6], **dropped, **averages)
        self.decoder = eqx.nn.Sequential(
            [
                eqx.nn.Conv1d(DIM, channels, 3, padding=1, key=keys[7]),
                *blocks[2:],
                eqx.nn.Conv1d(channels, HOP, 3, padding=1, key=keys[8]),
            ]
        )

    def vectors(self, x: jax.Array) -> jax.Array:
        frames = x.reshape(len(x), -1, HOP).swapaxes(1, 2)
        return jax.vmap(self.encoder)(frames).swapaxes(1, 2)

    def sound(self, z_q: jax.Array) -> jax.Array:
        return jax.vmap(self.decoder)(z_q.swapaxes(1, 2)).swapaxes(1, 2).reshape(len(z_q), -1)


def spectra(x: jax.Array, window: int) -> jax.Array:
    """Logarithms of the magnitudes (B, frames, frequencies) of half overlapping windows."""
    starts = jnp.arange(0, x.shape[1] - window + 1, window // 2)
    pieces = x[:, starts[:, None] + jnp.arange(window)] * jnp.hanning(window)
    power = jnp.square(jnp.abs(jnp.fft.rfft(pieces)))
    return 0.5 * jnp.log(power + 1e-3)


@eqx.filter_value_and_grad(has_aux=True)
def loss_of(model: Codec, state: eqx.nn.State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, eqx.nn.State]:
    out, state = model.vq(model.vectors(x), state, key=key)
    y = model.sound(out.z_q)
    # Samples for the signal-to-noise ratio, spectra for the ear.
    heard = sum(jnp.abs(spectra(y, window) - spectra(x, window)).mean() for window in (64, 256))
    return ((y - x) ** 2).mean() + 0.05 * heard + out.loss, state


def load(folder: Path) -> list[np.ndarray]:
    """The sounds of a folder in whole frames, as the codec hears them."""
    sounds = []
    for path in sorted(folder.rglob("*.wav")):
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
                raise SystemExit(f"audio_codec.py: expected 16 bits, one channel and {RATE} samples a second in {path}")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
        # Rests and beeps teach nothing.
        if len(samples) > LENGTH * HOP and samples.std() > 100:
            sounds.append(lfilter([1, -EMPHASIS], [SCALE], samples[: len(samples) // HOP * HOP]).astype(np.float32))
    return sounds


def restored(x: np.ndarray) -> np.ndarray:
    """Samples as they are in a file."""
    return lfilter([SCALE], [1, -EMPHASIS], x)


def write(path: Path, x: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, len(x), "NONE", None))
        file.writeframes(x.clip(-32768, 32767).astype("<i2").tobytes())


def train(
    model: Codec, state: eqx.nn.State, sounds: list[np.ndarray], steps: int, seed: int
) -> tuple[Codec, eqx.nn.State, list[float]]:
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    moments = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, moments, x, key):
        (loss, state), gradients = loss_of(model, state, x, key)
        moves, moments = optimizer.update(gradients, moments)
        return eqx.apply_updates(model, moves), state, moments, loss

    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), steps)
    everything = np.concatenate(sounds)
    curve = []
    for i, key in enumerate(keys):
        starts = rng.integers(0, len(everything) - LENGTH * HOP, BATCH)
        x = np.stack([everything[start : start + LENGTH * HOP] for start in starts])
        model, state, moments, loss = step(model, state, moments, x, key)
        curve.append(loss)
        progress(i, steps, loss)
    return model, state, [float(loss) for loss in curve]


def decoded(model: Codec, state: eqx.nn.State, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens (T, stages) of a sound, and what their first one, two, ... stages decode to."""
    model = eqx.nn.inference_mode(model)
    tokens = eqx.filter_jit(lambda x: model.vq.encode(model.vectors(x), state))(x[None])
    sound = eqx.filter_jit(lambda tokens: model.sound(model.vq.decode(tokens, state)))
    stages = jnp.arange(tokens.shape[-1])
    # A token of -1 adds nothing.
    sounds = [sound(jnp.where(stages <= last, tokens, -1)) for last in stages]
    return np.asarray(tokens[0]), [np.asarray(y[0]) for y in sounds]


def snr(x: np.ndarray, y: np.ndarray) -> float:
    """The signal-to-noise ratio in decibels."""
    return float(10 * np.log10(np.sum(x**2) / np.sum((y - x) ** 2)))


def picture(path: Path, sounds: dict[str, np.ndarray], ratios: list[float]) -> None:
    """Spectrograms, and the signal-to-noise ratio of each number of stages."""
    from matplotlib.figure import Figure

    figure = Figure((10, 5), layout="constrained")
    *axes, last = figure.subplots(2, 3).flat
    for place, (name, x) in zip(axes, sounds.items(), strict=False):
        x = lfilter([1, -EMPHASIS], [SCALE], x[: 4 * RATE])
        levels = np.asarray(spectra(jnp.asarray(x)[None], 256))[0].T
        place.imshow(levels, "magma", origin="lower", aspect="auto", vmin=-2, vmax=4, extent=(0, len(x) / RATE, 0, 4))
        place.set(title=name, xlabel="seconds", ylabel="kHz")
    stages = range(1, len(ratios) + 1)
    last.plot(stages, ratios, "o-")
    last.set(title="Held-out speech", xlabel="stages = kbit/s", ylabel="signal to noise, dB", xticks=stages)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = options(__doc__, steps=1000, out="audio_codec")
    parser.add_argument("--data", type=Path, default=SPEECH, help="folder of wav files")
    parser.add_argument("--stages", type=int, default=8, help="of the quantizer, 2 or more")
    given = parsed(parser)
    if given.stages < 2:
        parser.error(f"--stages must be at least 2, got {given.stages}")
    sounds = load(given.data)
    if len(sounds) < 10:
        print(f"skipped: there are no ten wav files in {given.data}; apt-get install asterisk-core-sounds-en-wav")
        return
    held_out, rest = sounds[::10], [x for i, x in enumerate(sounds) if i % 10]

    model, state = eqx.nn.make_with_state(Codec)(given.stages, jax.random.key(given.seed))
    model, state, curve = train(model, state, rest, given.steps, given.seed)
    model.vq.save(given.out / "quantizer.safetensors", state)

    unheard = np.concatenate(held_out)
    tokens, sounds_of = decoded(model, state, unheard)
    unheard, sounds_of = restored(unheard), [restored(y) for y in sounds_of]
    ratios = [snr(unheard, y) for y in sounds_of]
    used = [np.count_nonzero(dq.usage(tokens[:, stage], CODES)) for stage in range(given.stages)]
    # One sentence to listen to: the longest.
    start = sum(len(x) for x in held_out[: int(np.argmax([len(x) for x in held_out]))])
    sentence = slice(start, start + max(len(x) for x in held_out))
    shown = {"original": unheard[sentence]} | {
        f"{count} stage{'s' * (count > 1)}": sounds_of[count - 1][sentence]
        for count in (1, 2, 4, 8)
        if count <= given.stages
    }
    for name, x in shown.items():
        write(given.out / f"{name.replace(' ', '_')}.wav", x)
    picture(given.out / "audio_codec.png", shown, ratios)
    table(
        [
            ("speech, minutes", f"{sum(map(len, rest)) / RATE / 60:.1f}, held out {len(unheard) / RATE / 60:.1f}"),
            ends(curve),
            *(
                (f"{i + 1} kbit/s", f"{ratios[i]:.2f} dB, the stage uses {used[i]} codewords")
                for i in range(given.stages)
            ),
        ],
        *sorted(given.out.glob("*.wav")),
        given.out / "audio_codec.png",
    )


if __name__ == "__main__":
    main()
