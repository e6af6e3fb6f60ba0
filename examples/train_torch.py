"""Train the small PyTorch model that `port_checkpoint.py` ports, and record what it computes.

The model removes noise and gaps from a wave: a bidirectional LSTM reads it, a GRU and a Linear write it clean.
Writes, beside this file, `denoiser.safetensors`, the model's state_dict, and `denoiser_expected.npz`: held-out waves
with the model's output and loss, and each recurrent module's input, output and final states. Under a minute on a CPU.
"""

import numpy as np
import torch
from port_checkpoint import BATCH, STEM, make_waves
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import mse_loss

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


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products gain nothing from more, and one adds up in the same order every time
    model = Denoiser()
    train(model)
    save_file(model.state_dict(), STEM.with_suffix(".safetensors"))
    expected = record(model)
    np.savez_compressed(STEM.with_name(f"{STEM.name}_expected.npz"), allow_pickle=False, **expected)
    noise = np.square(expected["input"] - expected["target"]).mean()
    print(f"held-out loss {expected['loss']:.4f}, where leaving the wave as it is gives {noise:.4f}")
