"""Forecast seasonal series with a GRU, in Flax's NNX and in its Linen: from the same weights they train alike.

From 72 steps of a series with a trend, waves and noise the GRU forecasts the next 24; there are four, of different
periods. The models share all but the module's class, and start from the same weights, copied by name. Exit status 1 if
their losses are more than 1e-4 apart within 100 steps, or an error on later data is above 0.8 of the naive forecast's.

    pip install -e ".[examples]"
    python examples/forecast.py
"""

import argparse
import sys
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import linen, nnx
from matplotlib.figure import Figure
from rich.progress import track

import jaxrnn

PERIODS, HISTORY, HORIZON = (10, 14, 18, 24), 72, 24
Params = optax.Params


class NNXForecaster(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.gru = jaxrnn.GRU(1, 48, batch_first=True, rngs=rngs)
        self.head = nnx.Linear(48, HORIZON, rngs=rngs)

    def __call__(self, history: jax.Array) -> jax.Array:
        _, h_n = self.gru(history[..., None])
        return self.head(h_n[-1])


class LinenForecaster(linen.Module):
    @linen.compact
    def __call__(self, history: jax.Array) -> jax.Array:
        _, h_n = jaxrnn.linen.GRU(1, 48, batch_first=True, name="gru")(history[..., None])
        return linen.Dense(HORIZON, name="head")(h_n[-1])


def make_windows(random: np.random.RandomState, steps: int) -> np.ndarray:
    """Windows of HISTORY + HORIZON steps, (series, start, step), in standard deviations of each window's history."""
    series, angle = [], 2 * np.pi * np.arange(steps)
    for period in PERIODS:
        waves = [random.uniform(1.5, 3) * np.sin(n * angle / period + random.uniform(0, 6)) for n in (1, 2)]
        series.append(sum(waves) + np.linspace(0, random.uniform(-120, 120), steps) + random.standard_normal(steps))
    windows = np.lib.stride_tricks.sliding_window_view(series, HISTORY + HORIZON, axis=1)
    history = windows[..., :HISTORY]
    return np.float32((windows - history.mean(axis=-1, keepdims=True)) / history.std(axis=-1, keepdims=True))


def train(name: str, forecast: Callable, params: Params, windows: np.ndarray, steps: int) -> tuple[Params, list[float]]:
    """Train on windows (window, step): parameters and losses. Unclipped, a single huge gradient could undo it all."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))

    def mean_squared_error(params: Params, batch: jax.Array) -> jax.Array:
        return optax.squared_error(forecast(params, batch[:, :HISTORY]), batch[:, HISTORY:]).mean()

    @jax.jit
    def train_step(params: Params, state: optax.OptState, batch: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradient = jax.value_and_grad(mean_squared_error)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    random, state, losses = np.random.RandomState(1), optimizer.init(params), []
    for _ in track(range(steps), description=name):
        params, state, loss = train_step(params, state, windows[random.randint(len(windows), size=32)])
        losses.append(float(loss))
    return params, losses


def plot(path: str, held_out: np.ndarray, forecasts: dict[str, np.ndarray], losses: dict[str, list[float]]) -> None:
    figure, time = Figure(figsize=(10, 8), layout="constrained"), np.arange(-HISTORY, HORIZON) + 1
    axes = figure.subplot_mosaic([PERIODS[:2], PERIODS[2:], ["loss", "loss"]])
    for index, period in enumerate(PERIODS):
        axes[period].plot(time[36:], held_out[index, -1, 36:], "k-", label="truth")
        for (name, values), style in zip(forecasts.items(), ("C7-", "C0-", "C1."), strict=True):
            axes[period].plot(time[HISTORY:], values[index, -1], style, label=name)
        axes[period].set(title=f"period {period}", xlabel="steps ahead")
    axes["loss"].plot(losses["NNX"], "C0-", losses["Linen"], "C1.", markevery=20)
    axes["loss"].set(xlabel="training steps", ylabel="loss")
    figure.legend(*axes[period].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Forecast seasonal series with a GRU in NNX and in Linen.")
    parser.add_argument("--quick", action="store_true", help="train for 500 steps instead of 2000")
    parser.add_argument("--plot", default="forecast.png", help="the picture's file (default: %(default)s)")
    arguments = parser.parse_args()
    windows = make_windows(np.random.RandomState(0), 2500)
    training, held_out = windows[:, :2000].reshape(-1, HISTORY + HORIZON), windows[:, 2000 + HORIZON :]
    history, truth = np.split(held_out, [HISTORY], axis=-1)
    nnx_model, linen_model = NNXForecaster(rngs=nnx.Rngs(0)), LinenForecaster()
    graph, params = nnx.split(nnx_model)
    initial, tensors = linen_model.init(jax.random.key(1), history[0]), jaxrnn.state_dict(nnx_model)
    variables, *_ = jaxrnn.checkpoint.linen.load_state_dict(linen_model, initial, tensors, history[0])
    models = {"NNX": (lambda params, x: nnx.merge(graph, params)(x), params), "Linen": (linen_model.apply, variables)}
    naive = [rows[:, HISTORY - lag + np.arange(HORIZON) % lag] for rows, lag in zip(history, PERIODS, strict=True)]
    forecasts, losses = {"seasonal naive": np.stack(naive)}, {}
    for name, (forecast, start) in models.items():
        params, losses[name] = train(name, forecast, start, training, 500 if arguments.quick else 2000)
        forecasts[name] = np.stack([forecast(params, rows) for rows in history])
    errors = np.abs(np.stack(list(forecasts.values())) - truth).mean(axis=(-2, -1))
    print("mean absolute error, of period", *(f"{period:>6}" for period in PERIODS), "   all")
    for name, error in zip(forecasts, errors, strict=True):
        print(f"{name:<30}", *(f"{value:>6.3f}" for value in (*error, error.mean())))
    apart = np.abs(np.subtract(losses["NNX"], losses["Linen"]))
    print(f"losses of NNX and Linen are at most {apart[:100].max():.1e} apart in 100 steps, {apart.max():.1e} in all")
    plot(arguments.plot, held_out, forecasts, losses)
    return 0 if apart[:100].max() <= 1e-4 and errors[1:].mean(axis=1).max() <= 0.8 * errors[0].mean() else 1


if __name__ == "__main__":
    sys.exit(main())
