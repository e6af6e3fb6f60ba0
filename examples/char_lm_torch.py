"""What `char_lm.py --torch` trains: its model and its optimizer in PyTorch."""

import math
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that wait keep the cores from those that work

import numpy as np
import torch
from char_lm import CLIP, DECAY, schedule
from library_text import CHARACTERS
from resumable import Curve, advance
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy


class CharLM(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2)
        self.head = nn.Linear(hidden, CHARACTERS)

    def bits(self, characters: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """The bits per character that a batch costs, and the state to go on from."""
        output, state = self.lstm(self.embed(characters[:-1]), state)
        return cross_entropy(self.head(output).flatten(0, 1), characters[1:].flatten()) / math.log(2), state


class Learner:
    """As that of `char_lm.py`, from the weights of its model."""

    def __init__(self, weights: dict[str, np.ndarray], hidden: int, steps: int) -> None:
        self.model = CharLM(hidden)
        self.model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, weight_decay=DECAY)
        rate = schedule(steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: float(rate(step)))
        self.state = None

    def train(self, characters: np.ndarray) -> float:
        loss, state = self.model.bits(torch.from_numpy(characters).long(), self.state)
        self.state = [tensor.detach() for tensor in state]  # here jax.grad has nothing to cut
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    @torch.no_grad()
    def validate(self, characters: np.ndarray) -> float:
        return self.model.bits(torch.from_numpy(characters).long())[0].item()


def train_torch(
    weights: dict[str, np.ndarray], hidden: int, steps: int, batch: Callable[[int], np.ndarray], held_out: np.ndarray
) -> Curve:
    learner = Learner(weights, hidden, steps)
    return [advance(learner, step, steps, batch, held_out) for step in track(range(steps), description="torch")]
