"""What the modules for flax.nnx share: parameters, randomness, and the call.

What a module computes is in `jaxrnn._core.calls`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, overload

import jax
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import _compat, engines
from jaxrnn._core import flax_cell, flax_sharding
from jaxrnn._core.calls import HX, Output, call, call_cell, call_step
from jaxrnn._core.options import EngineNames, MeshAxis, Options, Remat, floating_dtype
from jaxrnn.cells import RNN_RELU, StateT
from jaxrnn.initializers import GateInitializer
from jaxrnn.packed import Lengths, PackedSequence
from jaxrnn.spec import CellSpec, Spec, shown
from jaxrnn.torch_random import TorchGenerator

if TYPE_CHECKING:
    from jaxrnn._core.weights import LayerParameters
else:
    LayerParameters = object

Randomness = nnx.Rngs | nnx.RngStream | jax.Array


def drawn_key(rngs: Randomness | None, stream: str) -> jax.Array:
    """A random key from a user's `rngs`."""
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs[stream]
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise TypeError(f"rngs should be nnx.Rngs, an nnx.RngStream or a jax key, got {type(rngs).__name__}")


def _option(name: str) -> Any:
    """An option as an attribute that can be set, as in Flax's modules."""

    def change(self: Any, value: Any) -> None:
        self.options = dataclasses.replace(self.options, **{name: value})

    return property(lambda self: getattr(self.options, name), change)


class Module(nnx.Module, Generic[StateT]):
    """What layers and cells share: the settings, and an nnx.Param under torch's name for each parameter."""

    __signature__: ClassVar[inspect.Signature]
    spec: Spec[StateT] | CellSpec[StateT]
    options: Options
    param_dtype: DTypeLike
    dtype: DTypeLike | None = _option("dtype")
    precision: jax.lax.PrecisionLike = _option("precision")

    def __init__(
        self,
        spec: Spec[StateT] | CellSpec[StateT],
        options: Options,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | TorchGenerator,
        kernel_init: GateInitializer | None,
        recurrent_kernel_init: GateInitializer | None,
        bias_init: GateInitializer | None,
    ) -> None:
        self.spec = spec
        self.options = options
        engines.asked(self.options)
        floating_dtype("param_dtype", param_dtype)
        self.param_dtype = param_dtype
        values = spec.init(
            rngs if isinstance(rngs, TorchGenerator) else rngs.params(),
            param_dtype,
            kernel_init=kernel_init,
            recurrent_kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
        )
        self._add_params(values)

    @property
    def input_size(self) -> int:
        return self.spec.input_size

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def bias(self) -> bool:
        return bool(self.spec.bias)

    if TYPE_CHECKING:  # Flax's have no annotations

        def train(self, **attributes: Any) -> None: ...
        def eval(self, **attributes: Any) -> None: ...

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # For help(), which Flax's metaclass would give (*args, **kwargs).
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)

    def _add_params(self, values: dict[str, jax.Array]) -> None:
        for name, value in values.items():
            setattr(self, name, nnx.Param(value))

    def _params(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name)[...] for name in self.spec.shapes()}

    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> StateT:
        """The state of zeros that a call without hx starts from. Use it as the first carry of a scan.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which calls keep; by default the module's dtype, or its parameters'.

        Returns:
            A value for hx.
        """
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)

    def __repr__(self) -> str:
        parts = shown(self.spec)
        if self.spec.cell == RNN_RELU:
            parts.insert(2, "nonlinearity='relu'")
        return f"{type(self).__name__}({', '.join(parts)})"


class Layers(Module[StateT], LayerParameters):
    """What RNN, LSTM, GRU and Recurrent share: the call, and dropout as in nnx.Dropout."""

    spec: Spec[StateT]
    deterministic: bool
    rngs: nnx.RngStream | None
    remat: Remat = _option("remat")
    hidden_axis: MeshAxis | None = _option("hidden_axis")
    unroll: int | None = _option("unroll")
    engine: EngineNames = _option("engine")

    def __init__(
        self,
        spec: Spec[StateT],
        options: Options,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | TorchGenerator,
        kernel_init: GateInitializer | None,
        recurrent_kernel_init: GateInitializer | None,
        bias_init: GateInitializer | None,
    ) -> None:
        flax_sharding.check(spec, options.hidden_axis)
        super().__init__(spec, options, param_dtype, rngs, kernel_init, recurrent_kernel_init, bias_init)
        self.deterministic = False
        # Only where it is used: a stream adds leaves without a gradient.
        self.rngs = (
            rngs["dropout"].fork() if not isinstance(rngs, TorchGenerator) and spec.is_random() else nnx.data(None)
        )

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def batch_first(self) -> bool:
        return self.spec.batch_first

    @property
    def dropout(self) -> float:
        return self.spec.dropout

    @property
    def recurrent_dropout(self) -> float:
        return self.spec.recurrent_dropout

    @property
    def variational_dropout(self) -> bool:
        return self.spec.variational_dropout

    @property
    def bidirectional(self) -> bool:
        return self.spec.bidirectional

    @property
    def proj_size(self) -> int:
        return self.spec.proj_size

    def _add_params(self, values: dict[str, jax.Array]) -> None:
        if self.hidden_axis is None:
            return super()._add_params(values)
        for name, axes in flax_sharding.names(self.spec, self.hidden_axis).items():
            value = values[name]
            if _compat.sharded_at_creation():
                value = flax_sharding.shard(value, axes)
            setattr(self, name, _compat.annotated_param(value, axes))

    @overload
    def __call__(
        self,
        x: ArrayLike,
        hx: HX = None,
        *,
        lengths: Lengths | None = None,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[jax.Array, StateT]: ...
    @overload
    def __call__(
        self,
        x: PackedSequence,
        hx: HX = None,
        *,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[PackedSequence, StateT]: ...
    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        *,
        lengths: Lengths | None = None,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence.

        Args:
            x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched
                (time, input_size); floating. Or a PackedSequence of such steps.
            hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the
                shapes that are returned; zeros if None. A state that all rows share, such as a learned one, may have a
                batch of 1, or the last axis alone.
            lengths: how many steps each row has, integers from 0 to time, (batch,), or for unbatched x (); all steps if
                None. Padding in x affects no result and no gradient. Under jit lengths are data, and cannot be checked:
                a length below 0 counts as 0, and one above time as time.
            mask: True at valid steps, False at padding, which may be anywhere in a row; boolean, of the shape of x, or
                its data, without features. The results are those of the valid steps alone: at a masked step the state
                is held, and the output is 0.
            reset: True at the steps before which the state is reset, such as the first of an episode; boolean, of the
                shape of x, or its data, without features. Ignored at masked steps and past a row's end. Not for a
                bidirectional network.
            reset_state: the state that `reset` starts from, like hx; zeros if None.
            dropout_masks: in place of random masks between layers, if `dropout` is above 0: for each layer but the last
                an array of 0 or 1, 1 where dropout keeps an output, (time, batch, directions * output size) even with
                `batch_first`, or (1, batch, ...) for one mask for all steps; without batch for unbatched x, and laid
                out like its data for a PackedSequence.
            deterministic: whether dropout, also by `dropout_masks`, and zoneout are off; the module's `deterministic`
                if None, which `train()` sets to False and `eval()` to True.
            rngs: nnx.Rngs, an nnx.RngStream or a jax key for dropout, in place of the module's own.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`. output: the last layer's outputs at every step, laid
            out like x, with directions * (proj_size or hidden_size) features, 0 in padding. h_n and c_n: the
            states after each row's last step, (num_layers * directions, batch, features), without batch for unbatched
            x, in the dtype of hx, if given. The backward direction starts at each row's last step. A row of length 0
            keeps its hx. For a PackedSequence, output is one, and rows of hx and states are in their original order.

        Raises:
            TypeError: x, hx or reset_state is not floating; hx or reset_state is not one array, or for an LSTM not
                two; lengths are not integers; or mask or reset is not boolean.
            ValueError: x is neither 2-D nor 3-D, a length is out of range, lengths are given with a PackedSequence,
                reset to a bidirectional module, or dropout_masks have other shapes or dropout is 0.
            RuntimeError: the size of x, hx, lengths, mask, reset or reset_state does not fit, or the sequence is empty.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        off = self.deterministic if deterministic is None else deterministic
        dropout_masks = None if off else dropout_masks
        return call(
            flax_sharding.on_the_mesh(self.options),
            self.spec,
            self._params(),
            x,
            hx,
            lengths=lengths,
            mask=mask,
            reset=reset,
            reset_state=reset_state,
            dropout_key=None if off else self._key(rngs, dropout_masks is not None),
            dropout_masks=dropout_masks,
        )

    __call__.__qualname__ = "module"  # for Python's own messages, which would name this class

    def step(
        self,
        x: ArrayLike,
        hx: HX = None,
        *,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        deterministic: bool | None = None,
        rngs: Randomness | None = None,
    ) -> tuple[jax.Array, StateT]:
        """Make one step through all layers: a call on a sequence of one step, without the axis of time.

        Args:
            x: the input, (batch, input_size) or unbatched (input_size,); floating.
            hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the
                shapes that are returned; zeros if None. A state that all rows share, such as a learned one, may have a
                batch of 1, or the last axis alone.
            reset: True for the rows whose state is reset before the step; boolean, (batch,), or for unbatched x ().
            reset_state: the state that `reset` starts from, like hx; zeros if None.
            deterministic: whether dropout and zoneout are off; the module's `deterministic` if None.
            rngs: as in a call. The same key at each step gives the same masks.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`. output: the last layer's output, (batch, proj_size or
            hidden_size), without batch for unbatched x. h_n and c_n: the next state, of the full shape of hx.

        Raises:
            As a call; and ValueError for a bidirectional module.
        """
        off = self.deterministic if deterministic is None else deterministic
        return call_step(
            flax_sharding.on_the_mesh(self.options),
            self.spec,
            self._params(),
            x,
            hx,
            reset=reset,
            reset_state=reset_state,
            dropout_key=None if off else self._key(rngs),
        )

    step.__qualname__ = "module.step"

    def _key(self, rngs: Randomness | None, masks: bool = False) -> jax.Array | None:
        """A key for what is random, beside dropout if there are masks for it."""
        if not self.spec.is_random(masks):
            return None
        if rngs is None and self.rngs is None:
            instead = "rngs" if self.spec.is_random(masks=True) else "rngs or dropout_masks"
            raise ValueError(
                "training draws random numbers, and a module that a TorchGenerator made has no key for them: "
                f"give {instead} in the call, or call module.eval()"
            )
        return drawn_key(self.rngs if rngs is None else rngs, "dropout")

    def set_view(self, deterministic: bool | None = None) -> None:
        """`nnx.view` calls this: it sets `deterministic` unless that is None."""
        if deterministic is not None:
            self.deterministic = deterministic


class OneStep(Module[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    spec: CellSpec[StateT]
    weight_ih: nnx.Param[jax.Array]
    weight_hh: nnx.Param[jax.Array]
    # As in torch's cells, None without biases.
    bias_ih: nnx.Param[jax.Array] | None = None
    bias_hh: nnx.Param[jax.Array] | None = None

    def __call__(
        self, x: ArrayLike, hx: HX = None, *, reset: ArrayLike | None = None, reset_state: HX = None
    ) -> StateT:
        """Make one step.

        Args:
            x: the input, (batch, input_size) or unbatched (input_size,); floating.
            hx: the state h, for an LSTMCell (h, c), each (batch, hidden_size), or (hidden_size,) for unbatched x or
                for all rows; zeros if None.
            reset: True for the rows whose state is reset before the step; boolean, (batch,), or for unbatched x ().
            reset_state: the state that `reset` starts from, like hx; zeros if None.

        Returns:
            The next state, of the shape of x's rows, in hx's dtype if that is given.

        Raises:
            TypeError: x, hx or reset_state is not floating; hx or reset_state is not one array, or for an LSTMCell not
                two; or reset is not boolean.
            ValueError: x or hx is neither 1-D nor 2-D, or reset_state is given without reset.
            RuntimeError: the size of x, hx, reset or reset_state does not fit.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        return call_cell(self.options, self.spec, self._params(), x, hx, reset=reset, reset_state=reset_state)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise AttributeError(flax_cell.NOT_FLAXS)
