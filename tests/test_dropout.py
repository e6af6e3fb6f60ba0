"""Dropout between layers: with torch's masks torch's results, and with a key a mask of the right rate."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from arrays import named, normal, parameters
from comparing import assert_close

import jaxrnn

T, N, F, H = 5, 3, 2, 4  # time, batch, input features, hidden size
SPEC = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, num_layers=3, dropout=0.4, bidirectional=True)
PARAMS = parameters(SPEC)


@pytest.mark.torch
@pytest.mark.parametrize(("batch_first", "p"), [(False, 0.4), (True, 0.4), (False, 1.0)])
def test_with_torchs_masks_it_is_torchs(torch: types.ModuleType, batch_first: bool, p: float) -> None:
    spec = dataclasses.replace(SPEC, batch_first=batch_first, dropout=p)
    module = torch.nn.GRU(F, H, 3, dropout=p, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    module.load_state_dict(jax.tree.map(torch.tensor, PARAMS))
    x = normal(N, T, F) if batch_first else normal(T, N, F)
    torch.manual_seed(3)
    expected = module(torch.tensor(x))
    torch.manual_seed(3)
    ones = torch.ones(T, N, 2 * H, dtype=torch.float64)
    masks = [torch.nn.functional.dropout(ones, p).numpy() != 0 for _ in range(2)]
    found = jaxrnn.apply(spec, PARAMS, x, dropout_masks=masks)
    assert_close(named(spec, found), named(spec, [a.detach().numpy() for a in expected]))
    assert not np.allclose(found[0], jaxrnn.apply(spec, PARAMS, x)[0])


def test_from_a_key() -> None:
    x, key = normal(T, N, F), jax.random.key(1)
    plain = jaxrnn.apply(SPEC, PARAMS, x)
    one, again, other = (jaxrnn.apply(SPEC, PARAMS, x, dropout_key=k) for k in (key, key, jax.random.key(2)))
    assert_close(again, one, atol=0)
    assert not np.allclose(one[0], other[0])
    # The first layer's last states are not dropped.
    assert_close({"h_n of the first layer": one[1][:2]}, {"h_n of the first layer": plain[1][:2]}, atol=0)
    assert not np.allclose(one[1][2:], plain[1][2:])


def test_the_last_layer_drops_nothing_and_every_step_has_its_own_mask() -> None:
    """A relu layer that copies positive input: what comes out is the mask, scaled to keep the mean."""
    spec = jaxrnn.Spec(jaxrnn.RNN_RELU, 50, 50, num_layers=2, bias=False, dropout=0.25)
    params = {name: np.eye(50) if "_ih" in name else np.zeros((50, 50)) for name in spec.shapes()}
    output = np.asarray(jaxrnn.apply(spec, params, np.ones((40, 10, 50)), dropout_key=jax.random.key(0))[0])
    assert_close({"values": np.unique(output)}, {"values": np.array([0, 4 / 3])}, atol=1e-15)
    assert abs(output.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / output.size)
    assert not np.array_equal(output[0], output[1])


def test_one_layer_drops_nothing() -> None:
    with pytest.warns(UserWarning, match="num_layers=1"):
        spec = jaxrnn.Spec(jaxrnn.GRU_CELL, F, H, dropout=0.9)
    x, params = normal(T, N, F), parameters(spec)
    found = jaxrnn.apply(spec, params, x, dropout_key=jax.random.key(0))
    assert_close(found, jaxrnn.apply(spec, params, x), atol=0)


def test_masks_of_the_wrong_shape() -> None:
    for masks in ([np.ones((T, N, 2 * H))], [np.ones((N, T, 2 * H))] * 2):
        with pytest.raises(ValueError, match=r"dropout_masks should be 2 arrays of shape \(5, 3, 8\)"):
            jaxrnn.apply(SPEC, PARAMS, normal(T, N, F), dropout_masks=masks)
