"""RNN, LSTM and GRU for flax.nnx."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxrnn._core.options import EngineNames, MeshAxis, Options, Remat
from jaxrnn.cells import GRU_CELL, LSTM_CELL, RNN_RELU, Nonlinearity, Pair, torch_rnn_cell
from jaxrnn.initializers import GateInitializer
from jaxrnn.nnx.base import Layers
from jaxrnn.spec import Spec
from jaxrnn.torch_random import TorchGenerator


class RNN(Layers[jax.Array]):
    """A stack of Elman RNN layers: torch.nn.RNN.

    Each layer computes, for each step t of its input x,

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    or relu in place of tanh.

    Args:
        input_size: features of the input at each step.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        nonlinearity: "tanh" or "relu".
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether batched input and output are (batch, time, features) rather than (time,
            batch, features). It does not change hx and h_n.
        dropout: the probability with which an output of each layer but the last is zeroed in training.
        bidirectional: whether each layer also runs backward in time.
        proj_size: features of an LSTM's projected hidden state, less than hidden_size; 0 for no
            projection.
        recurrent_dropout: the probability with which a number of h is zeroed in training before the
            recurrent product, with one mask for all steps and gates.
        variational_dropout: whether `dropout`, too, has one mask for all steps.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters and, where it is used, for dropout. Or a
            jaxrnn.TorchGenerator to draw the parameters as torch does; then a call with dropout needs
            `rngs` or `dropout_masks`.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": all it needs, nothing is
            recomputed. "gates": only the states; gates are recomputed. An integer k: the state before
            every k-th step; the rest is recomputed, k steps at a time. Values and gradients are the
            same, up to rounding.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None
            leaves sharding to XLA. For a module it may be a logical axis of Flax. A module stores it in
            its parameters' metadata, and creates them on the mesh in `jax.set_mesh`, if there is one.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and
            1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of
            such names, of which the first that can run it does.

    Call:
        `output, h_n = module(x, hx=None, *, lengths=None, mask=None,
        reset=None, reset_state=None, dropout_masks=None, deterministic=None, rngs=None)`

        x                                         output                  h_n
        (time, batch, input_size)                 (time, batch, D * H)    (D * num_layers, batch, H)
        (batch, time, input_size), batch_first    (batch, time, D * H)    (D * num_layers, batch, H)
        (time, input_size), unbatched             (time, D * H)           (D * num_layers, H)
        PackedSequence                            PackedSequence          (D * num_layers, batch, H)

        `module.step(x, hx)` makes one step: x and output are without the axis of time.

        D is 2 if bidirectional, else 1. H is hidden_size.
        h_n[D * layer + direction] is the state after each row's last step, or at step 0 for direction 1,
        which is backward.

        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM,
            of the shapes that are returned; zeros if None. A state that all rows share, such as a
            learned one, may have a batch of 1, or the last axis alone.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x ();
            all steps if None. Padding in x affects no result and no gradient. Under jit lengths are
            data, and cannot be checked: a length below 0 counts as 0, and one above time as time.
        mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the
            shape of x, or its data, without features. The results are those of the valid steps alone:
            at a masked step the state is held, and the output is 0.
        reset: True at the steps before which the state is reset, such as the first of an episode;
            boolean, of the shape of x, or its data, without features. Ignored at masked steps and past
            a row's end. Not for a bidirectional network.
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer
            but the last an array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions *
            output size) even with `batch_first`, or (1, batch, ...) for one mask for all steps; without
            batch for unbatched x, and laid out like its data for a PackedSequence.
        deterministic: whether dropout and zoneout are off; by default as `train()` and `eval()` last
            set it.
        rngs: nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.

    Parameters of layer k, with torch's names, shapes and order:
        weight_ih_lk               (hidden_size, input_size), or (hidden_size, D * H) if k > 0
        weight_hh_lk               (hidden_size, H)
        bias_ih_lk, bias_hh_lk     (hidden_size,)
        and the same with `_reverse` for the backward direction.

    Differs from torch.nn.RNN:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `lengths=`, `mask=`, `reset=`, `reset_state=`, `recurrent_dropout=` and `variational_dropout=` are
        new. With lengths, a row may have length 0.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, the nonlinearity is unknown, or `proj_size` is not 0.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> rnn = jaxrnn.RNN(10, 20, 2, nonlinearity="relu", rngs=nnx.Rngs(0))
    >>> output, h_n = rnn(jnp.ones((5, 3, 10)))
    >>> output.shape, h_n.shape
    ((5, 3, 20), (2, 3, 20))
    """

    @property
    def nonlinearity(self) -> Nonlinearity:
        return "relu" if self.spec.cell == RNN_RELU else "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        recurrent_dropout: float = 0.0,
        variational_dropout: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        remat: Remat = "none",
        hidden_axis: MeshAxis | None = None,
        unroll: int | None = None,
        engine: EngineNames = "auto",
    ) -> None:
        cell = torch_rnn_cell(nonlinearity)
        settings = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        spec = Spec(cell, *settings, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout)
        options = Options(dtype, precision, remat, hidden_axis, unroll, engine)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)


class LSTM(Layers[Pair]):
    """A stack of long short-term memory layers: torch.nn.LSTM.

    Each layer computes, for each step t of its input x,

        i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    The rows of the weights and biases hold i, f, g, o in this order.

    Args:
        input_size: features of the input at each step.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether batched input and output are (batch, time, features) rather than (time,
            batch, features). It does not change hx and h_n.
        dropout: the probability with which an output of each layer but the last is zeroed in training.
        bidirectional: whether each layer also runs backward in time.
        proj_size: features of an LSTM's projected hidden state, less than hidden_size; 0 for no
            projection.
        recurrent_dropout: the probability with which a number of h is zeroed in training before the
            recurrent product, with one mask for all steps and gates.
        variational_dropout: whether `dropout`, too, has one mask for all steps.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters and, where it is used, for dropout. Or a
            jaxrnn.TorchGenerator to draw the parameters as torch does; then a call with dropout needs
            `rngs` or `dropout_masks`.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": all it needs, nothing is
            recomputed. "gates": only the states; gates are recomputed. An integer k: the state before
            every k-th step; the rest is recomputed, k steps at a time. Values and gradients are the
            same, up to rounding.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None
            leaves sharding to XLA. For a module it may be a logical axis of Flax. A module stores it in
            its parameters' metadata, and creates them on the mesh in `jax.set_mesh`, if there is one.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and
            1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of
            such names, of which the first that can run it does.

    With `proj_size`, h_t is W_hr (o * tanh(c_t)).

    Call:
        `output, (h_n, c_n) = module(x, hx=None, *, lengths=None, mask=None,
        reset=None, reset_state=None, dropout_masks=None, deterministic=None, rngs=None)`

        x                                         output                  h_n; c_n with hidden_size
        (time, batch, input_size)                 (time, batch, D * H)    (D * num_layers, batch, H)
        (batch, time, input_size), batch_first    (batch, time, D * H)    (D * num_layers, batch, H)
        (time, input_size), unbatched             (time, D * H)           (D * num_layers, H)
        PackedSequence                            PackedSequence          (D * num_layers, batch, H)

        `module.step(x, hx)` makes one step: x and output are without the axis of time.

        D is 2 if bidirectional, else 1. H is proj_size, or hidden_size without projection.
        h_n[D * layer + direction] is the state after each row's last step, or at step 0 for direction 1,
        which is backward.

        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM,
            of the shapes that are returned; zeros if None. A state that all rows share, such as a
            learned one, may have a batch of 1, or the last axis alone.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x ();
            all steps if None. Padding in x affects no result and no gradient. Under jit lengths are
            data, and cannot be checked: a length below 0 counts as 0, and one above time as time.
        mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the
            shape of x, or its data, without features. The results are those of the valid steps alone:
            at a masked step the state is held, and the output is 0.
        reset: True at the steps before which the state is reset, such as the first of an episode;
            boolean, of the shape of x, or its data, without features. Ignored at masked steps and past
            a row's end. Not for a bidirectional network.
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer
            but the last an array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions *
            output size) even with `batch_first`, or (1, batch, ...) for one mask for all steps; without
            batch for unbatched x, and laid out like its data for a PackedSequence.
        deterministic: whether dropout and zoneout are off; by default as `train()` and `eval()` last
            set it.
        rngs: nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.

    Parameters of layer k, with torch's names, shapes and order:
        weight_ih_lk               (4 * hidden_size, input_size), or (4 * hidden_size, D * H) if k > 0
        weight_hh_lk               (4 * hidden_size, H)
        bias_ih_lk, bias_hh_lk     (4 * hidden_size,)
        weight_hr_lk               (proj_size, hidden_size), with proj_size
        and the same with `_reverse` for the backward direction.

    Differs from torch.nn.LSTM:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `lengths=`, `mask=`, `reset=`, `reset_state=`, `recurrent_dropout=` and `variational_dropout=` are
        new. With lengths, a row may have length 0.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> lstm = jaxrnn.LSTM(10, 20, bidirectional=True, proj_size=5, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jnp.ones((7, 3, 10)))
    >>> output.shape, h_n.shape, c_n.shape
    ((7, 3, 10), (2, 3, 5), (2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        recurrent_dropout: float = 0.0,
        variational_dropout: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        remat: Remat = "none",
        hidden_axis: MeshAxis | None = None,
        unroll: int | None = None,
        engine: EngineNames = "auto",
    ) -> None:
        settings = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        spec = Spec(LSTM_CELL, *settings, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout)
        options = Options(dtype, precision, remat, hidden_axis, unroll, engine)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)


class GRU(Layers[jax.Array]):
    """A stack of gated recurrent unit layers: torch.nn.GRU.

    Each layer computes, for each step t of its input x,

        r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}

    The rows of the weights and biases hold r, z, n in this order.

    Args:
        input_size: features of the input at each step.
        hidden_size: features of the hidden state.
        num_layers: how many layers are stacked.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: whether batched input and output are (batch, time, features) rather than (time,
            batch, features). It does not change hx and h_n.
        dropout: the probability with which an output of each layer but the last is zeroed in training.
        bidirectional: whether each layer also runs backward in time.
        proj_size: features of an LSTM's projected hidden state, less than hidden_size; 0 for no
            projection.
        recurrent_dropout: the probability with which a number of h is zeroed in training before the
            recurrent product, with one mask for all steps and gates.
        variational_dropout: whether `dropout`, too, has one mask for all steps.
        param_dtype: the parameters' floating dtype.
        kernel_init: what draws `weight_ih` gate by gate, and `weight_hr` if there is one: a function
            init(key, shape, dtype), such as those of `jax.nn.initializers`, which gets the shape
            (features, hidden_size); or a dict from some gates to such functions. None: as torch,
            uniform within 1/sqrt(hidden_size) of 0. For Flax's own, give `**jaxrnn.initializers.FLAX`.
        recurrent_kernel_init: the same for `weight_hh`.
        bias_init: the same for `bias_ih`, with the shape (hidden_size,). It makes `bias_hh` 0, because
            the two add up. In GRU's n, where they do not, it draws both.
        rngs: nnx.Rngs for the initial parameters and, where it is used, for dropout. Or a
            jaxrnn.TorchGenerator to draw the parameters as torch does; then a call with dropout needs
            `rngs` or `dropout_masks`.
        dtype: the floating dtype to compute in, and of the output; by default the promoted dtype of
            inputs and parameters. States have the dtype of hx, if given: a float32 state is returned
            unrounded.
        precision: the precision of the products, as for `jax.lax.dot_general`.
        remat: what the forward pass saves for the backward pass. "none": all it needs, nothing is
            recomputed. "gates": only the states; gates are recomputed. An integer k: the state before
            every k-th step; the rest is recomputed, k steps at a time. Values and gradients are the
            same, up to rounding.
        hidden_axis: the mesh axis or axes, of type Auto, over which hidden units are sharded; None
            leaves sharding to XLA. For a module it may be a logical axis of Flax. A module stores it in
            its parameters' metadata, and creates them on the mesh in `jax.set_mesh`, if there is one.
        unroll: how many steps the loop makes at a time, as for `jax.lax.scan`; if None, 4 on a GPU and
            1 elsewhere.
        engine: what runs the loop over time: "auto"; a name in `jaxrnn.engines.ENGINES`; or a tuple of
            such names, of which the first that can run it does.

    Call:
        `output, h_n = module(x, hx=None, *, lengths=None, mask=None,
        reset=None, reset_state=None, dropout_masks=None, deterministic=None, rngs=None)`

        x                                         output                  h_n
        (time, batch, input_size)                 (time, batch, D * H)    (D * num_layers, batch, H)
        (batch, time, input_size), batch_first    (batch, time, D * H)    (D * num_layers, batch, H)
        (time, input_size), unbatched             (time, D * H)           (D * num_layers, H)
        PackedSequence                            PackedSequence          (D * num_layers, batch, H)

        `module.step(x, hx)` makes one step: x and output are without the axis of time.

        D is 2 if bidirectional, else 1. H is hidden_size.
        h_n[D * layer + direction] is the state after each row's last step, or at step 0 for direction 1,
        which is backward.

        hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM,
            of the shapes that are returned; zeros if None. A state that all rows share, such as a
            learned one, may have a batch of 1, or the last axis alone.
        lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x ();
            all steps if None. Padding in x affects no result and no gradient. Under jit lengths are
            data, and cannot be checked: a length below 0 counts as 0, and one above time as time.
        mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the
            shape of x, or its data, without features. The results are those of the valid steps alone:
            at a masked step the state is held, and the output is 0.
        reset: True at the steps before which the state is reset, such as the first of an episode;
            boolean, of the shape of x, or its data, without features. Ignored at masked steps and past
            a row's end. Not for a bidirectional network.
        reset_state: the state that `reset` starts from, like hx; zeros if None.
        dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer
            but the last an array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions *
            output size) even with `batch_first`, or (1, batch, ...) for one mask for all steps; without
            batch for unbatched x, and laid out like its data for a PackedSequence.
        deterministic: whether dropout and zoneout are off; by default as `train()` and `eval()` last
            set it.
        rngs: nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.

    Parameters of layer k, with torch's names, shapes and order:
        weight_ih_lk               (3 * hidden_size, input_size), or (3 * hidden_size, D * H) if k > 0
        weight_hh_lk               (3 * hidden_size, H)
        bias_ih_lk, bias_hh_lk     (3 * hidden_size,)
        and the same with `_reverse` for the backward direction.

    Differs from torch.nn.GRU:
        `dtype` is, as in Flax, the dtype to compute in; torch's `dtype` is `param_dtype`. There is no
        `device`.
        Inputs and parameters of different dtypes are promoted, where torch raises.
        `lengths=`, `mask=`, `reset=`, `reset_state=`, `recurrent_dropout=` and `variational_dropout=` are
        new. With lengths, a row may have length 0.

    Raises:
        TypeError: a size is not an int, or `bias` or `batch_first` is not a bool.
        ValueError: a size or a probability is out of range, or `proj_size` is not 0.

    >>> import jax.numpy as jnp, jaxrnn
    >>> from flax import nnx
    >>> gru = jaxrnn.GRU(10, 20, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, h_n = gru(jnp.ones((3, 7, 10)), hx=jnp.zeros((1, 3, 20)))
    >>> output.shape, h_n.shape
    ((3, 7, 20), (1, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        recurrent_dropout: float = 0.0,
        variational_dropout: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: GateInitializer | None = None,
        recurrent_kernel_init: GateInitializer | None = None,
        bias_init: GateInitializer | None = None,
        rngs: nnx.Rngs | TorchGenerator,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        remat: Remat = "none",
        hidden_axis: MeshAxis | None = None,
        unroll: int | None = None,
        engine: EngineNames = "auto",
    ) -> None:
        settings = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        spec = Spec(GRU_CELL, *settings, recurrent_dropout=recurrent_dropout, variational_dropout=variational_dropout)
        options = Options(dtype, precision, remat, hidden_axis, unroll, engine)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)
