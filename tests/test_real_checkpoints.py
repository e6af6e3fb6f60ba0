"""Models that other people trained and published: what PyTorch computed from them, jaxrnn computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from flax import nnx
from making import filled

import jaxrnn
from jaxrnn import checkpoint

FOLDER = Path(__file__).parents[2] / "shared" / "checkpoints"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published checkpoints are not at {FOLDER}")


def _expected(name: str) -> dict[str, np.ndarray]:
    """What torch computes."""
    with np.load(FOLDER / name / "expected.npz") as file:
        return dict(file)


def _check(ours: tuple[jax.Array, jax.Array, jax.Array], expected: list[np.ndarray]) -> None:
    """Outputs and h within 5e-6, c within 2e-6 of its largest magnitude."""
    for name, array, truth in zip(("output", "h", "c"), ours, expected, strict=True):
        assert array.dtype == jnp.float32
        assert_close({name: array}, {name: truth}, atol=2e-6 * np.abs(truth).max() if name == "c" else 5e-6)


def test_silero_vad_as_a_cell_and_as_a_layer() -> None:
    expected = _expected("silero_vad")
    x, h_n, c_n = (expected[name] for name in ("lstm_input", "h", "c"))
    tensors = checkpoint.load(FOLDER / "silero_vad" / "silero_vad_16k.safetensors")
    [found] = checkpoint.find_rnns(tensors)
    assert (found.prefix, found.kind, found.is_cell) == ("lstm_cell.", "LSTM", True)

    cell = filled(lambda: jaxrnn.LSTMCell(128, 128, rngs=nnx.Rngs(0)))
    jaxrnn.load_state_dict(cell, tensors, found.prefix)
    state, states = None, []
    for chunk in x:
        state = cell(chunk, state)
        states.append(jax.tree.map(np.asarray, state))
    h, c = (np.stack(rows) for rows in zip(*states, strict=True))
    _check((h, h, c), [h_n, h_n, c_n])

    lstm = filled(lambda: jaxrnn.LSTM(128, 128, rngs=nnx.Rngs(0)))
    jaxrnn.load_state_dict(lstm, {f"{name}_l0": value for name, value in jaxrnn.state_dict(cell).items()})
    output, (last_h, last_c) = lstm(x)
    _check((output, last_h, last_c), [h_n, h_n[-1:], c_n[-1:]])


def test_the_four_lstms_of_dtln() -> None:
    expected = _expected("dtln")
    tensors = checkpoint.load(FOLDER / "dtln" / "model.pth")
    found = checkpoint.find_rnns(tensors)
    assert [rnn.prefix for rnn in found] == ["sep1.rnn1.", "sep1.rnn2.", "sep2.rnn1.", "sep2.rnn2."]
    for rnn in found:
        lstm = filled(lambda rnn=rnn: jaxrnn.LSTM(rnn.input_size, rnn.hidden_size, batch_first=True, rngs=nnx.Rngs(0)))
        jaxrnn.load_state_dict(lstm, tensors, rnn.prefix)
        output, (h_n, c_n) = lstm(expected[f"{rnn.prefix}input"])
        _check((output, h_n, c_n), [expected[rnn.prefix + name] for name in ("output", "h_n", "c_n")])


class _SileroVAD(nnx.Module):
    """The whole model, a chunk of sound at a time: torch's attribute names, so that the checkpoint loads by name."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stft_conv = nnx.Conv(1, 258, (256,), strides=128, padding="VALID", use_bias=False, rngs=rngs)
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        for index, (before, after, stride) in enumerate(sizes, start=1):
            setattr(self, f"conv{index}", nnx.Conv(before, after, (3,), strides=stride, padding=1, rngs=rngs))
        self.lstm_cell = jaxrnn.LSTMCell(128, 128, rngs=rngs)
        self.final_conv = nnx.Conv(128, 1, (1,), rngs=rngs)

    def __call__(self, samples: jax.Array, state: tuple) -> tuple[jax.Array, tuple]:
        padded = jnp.pad(samples, ((0, 0), (0, 64)), mode="reflect")
        real, imaginary = jnp.split(self.stft_conv(padded[..., None]), 2, axis=-1)
        x = jnp.sqrt(real**2 + imaginary**2)
        for index in range(1, 5):
            x = nnx.relu(getattr(self, f"conv{index}")(x))
        h, c = self.lstm_cell(x[:, 0], state)
        return nnx.sigmoid(self.final_conv(nnx.relu(h)[:, None])).mean(), (h, c)


def test_silero_vad_from_end_to_end() -> None:
    expected = _expected("silero_vad")
    model = filled(lambda: _SileroVAD(nnx.Rngs(0)))
    tensors = checkpoint.load(FOLDER / "silero_vad" / "silero_vad_16k.safetensors")
    assert jaxrnn.load_state_dict(model, tensors) == ([], [])
    graph, params = nnx.split(model)
    step = jax.jit(lambda samples, state: nnx.merge(graph, params)(samples, state))
    samples = expected["audio_int16"].astype(np.float32) / 32768
    context, state, probabilities = np.zeros(64, np.float32), (jnp.zeros((1, 128), jnp.float32),) * 2, []
    for chunk in samples.reshape(-1, 512):
        probability, state = step(np.concatenate([context, chunk])[None], state)
        probabilities.append(probability)
        context = chunk[-64:]
    assert len(probabilities) == 600
    assert_close(np.array(probabilities), expected["speech_probability"], atol=2e-5)
