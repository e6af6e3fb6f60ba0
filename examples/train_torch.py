"""Train the small PyTorch models that other examples port, and record what they compute.

`python examples/train_torch.py denoiser`: the model of `port_checkpoint.py` removes noise and gaps from a wave: a
bidirectional LSTM reads it, a GRU and a Linear write it clean. Writes, beside this file, `denoiser.safetensors`, the
model's state_dict, and `denoiser_expected.npz`: held-out waves with the model's output and loss, and each recurrent
module's input, output and final states. Under a minute on a CPU.

`python examples/train_torch.py highlighter`: the model of `port_whole_model.py` tells code, comments and strings apart
in Python's standard library. Writes `highlighter.safetensors`: the state_dict under `model.`, and under `recorded.`
pieces of modules that it was not trained on, with the model's logits. A few minutes on a CPU.
"""

import argparse
import sysconfig
from pathlib import Path

import numpy as np
import torch
from port_checkpoint import BATCH, STEM, make_waves
from port_whole_model import CHECKPOINT, KINDS, read, windows
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

STEPS = 400
HELD_OUT = 16


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(1, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(48, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(self.encoder(noisy)[0])[0])


def waves(random: np.random.RandomState, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    noisy, clean = make_waves(random, size)
    return torch.from_numpy(noisy), torch.from_numpy(clean)


def train(model: Denoiser) -> None:
    random = np.random.RandomState(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        noisy, clean = waves(random, BATCH)
        loss = mse_loss(model(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: training loss {loss.item():.4f}")


@torch.no_grad()
def record(model: Denoiser) -> dict[str, np.ndarray]:
    """The model's output and loss on held-out waves, and each recurrent module's input, output and final states."""
    noisy, clean = waves(np.random.RandomState(1), HELD_OUT)
    model.eval()
    output = model(noisy)
    encoded, (h_n, c_n) = model.encoder(noisy)
    decoded, decoder_h_n = model.decoder(encoded)
    recorded = {"input": noisy, "target": clean, "output": output, "loss": mse_loss(output, clean)}
    recorded |= {"encoder.input": noisy, "encoder.output": encoded, "encoder.h_n": h_n, "encoder.c_n": c_n}
    recorded |= {"decoder.input": encoded, "decoder.output": decoded, "decoder.h_n": decoder_h_n}
    return {name: value.numpy() for name, value in recorded.items()}


class Highlighter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.convolution = nn.Conv1d(16, 32, kernel_size=5, padding="same")
        self.lstm = nn.LSTM(32, 40, batch_first=True, bidirectional=True)
        self.head = nn.Linear(80, len(KINDS))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        features = self.convolution(self.embedding(characters).mT).relu().mT  # a convolution has time last
        return self.head(self.lstm(features)[0])


def make_denoiser() -> None:
    model = Denoiser()
    train(model)
    save_file(model.state_dict(), STEM.with_suffix(".safetensors"))
    expected = record(model)
    np.savez_compressed(STEM.with_name(f"{STEM.name}_expected.npz"), allow_pickle=False, **expected)
    noise = np.square(expected["input"] - expected["target"]).mean()
    print(f"held-out loss {expected['loss']:.4f}, where leaving the wave as it is gives {noise:.4f}")


def make_highlighter(steps: int = 2000) -> None:
    comment_or_string = r"""(?P<comment>#[^\n]*)|(?P<string>(\"{3}|'{3}|"|')(?:\\.|[^\\])*?\3)"""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    training = read([module for module in modules if module not in modules[::4]], comment_or_string)
    held_out = read(modules[::4], comment_or_string)
    model, random = Highlighter(), np.random.RandomState(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        characters, kinds = (torch.from_numpy(array).long() for array in windows(random, training, 32))
        loss = cross_entropy(model(characters).mT, kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1}: training loss {loss.item():.4f}")
    characters, kinds = (torch.from_numpy(array) for array in windows(random, held_out, 256))
    with torch.no_grad():
        logits = model(characters)
    print(f"{(logits.argmax(axis=-1) == kinds).float().mean():.1%} of the held-out characters are right")
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    recorded = {"recorded.characters": characters[:8], "recorded.logits": logits[:8]}
    save_file(tensors | recorded, CHECKPOINT)


@torch.no_grad()
def highlighter_logits(path: str, characters: np.ndarray) -> np.ndarray:
    """What PyTorch computes with the weights in a file."""
    model = Highlighter()
    model.load_state_dict(torch.load(path))
    return model(torch.from_numpy(characters)).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the PyTorch models that other examples port.")
    parser.add_argument("model", choices=["denoiser", "highlighter"])
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products gain nothing from more, and one adds up in the same order every time
    {"denoiser": make_denoiser, "highlighter": make_highlighter}[parser.parse_args().model]()
