"""What the modules for flax.linen share: parameters, randomness, and the call.

These are the modules of `jaxrnn.nnx` for Flax's other API: `jaxrnn._core.calls` computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, overload

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import ArrayLike, DTypeLike

from jaxrnn import engines
from jaxrnn._core import flax_cell, flax_sharding
from jaxrnn._core.calls import HX, Output, call, call_cell, call_step
from jaxrnn._core.options import EngineNames, MeshAxis, Options, Remat, floating_dtype
from jaxrnn.cells import StateT
from jaxrnn.initializers import GateInitializer
from jaxrnn.packed import Lengths, PackedSequence
from jaxrnn.spec import CellSpec, Spec

_Variables = Mapping[str, Any]
_Rngs = jax.Array | Mapping[str, jax.Array] | None


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


class Module(linen.Module, Generic[StateT]):
    """What layers and cells share: the settings, checked at construction, and the parameters under torch's names."""

    _: dataclasses.KW_ONLY  # so that the fields of the classes below come first, in torch's order
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: GateInitializer | None = None
    recurrent_kernel_init: GateInitializer | None = None
    bias_init: GateInitializer | None = None
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        self.spec: Any = self._Spec(self._cell, **{name: fields[name] for name in _names(self._Spec) if name != "cell"})
        self.options: Options = Options(**{name: fields[name] for name in _names(Options) if name in fields})
        engines.asked(self.options)
        floating_dtype("param_dtype", self.param_dtype)
        inits = ("kernel_init", "recurrent_kernel_init", "bias_init")
        self._draws = self.spec.initializers(**{name: fields[name] for name in inits})
        super().__post_init__()

    if TYPE_CHECKING:  # Flax's is a dict or a FrozenDict to a checker

        def init(self, rngs: jax.Array | dict[str, jax.Array], *args: Any, **kwargs: Any) -> dict[str, Any]: ...

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        return self._draws

    @linen.compact
    def _params(self) -> dict[str, jax.Array]:
        shapes, draws = self.spec.shapes(), self._initializers()
        return {name: self.param(name, draws[name], shape, self.param_dtype) for name, shape in shapes.items()}

    @linen.nowrap
    def initial_state(self, batch: int | None = None, dtype: DTypeLike | None = None) -> StateT:
        """The state of zeros that a call without hx starts from. Use it as the first carry of a scan.

        Args:
            batch: how many rows; None for unbatched input.
            dtype: the state's floating dtype, which calls keep; by default the module's dtype, or its parameters'.

        Returns:
            A value for hx.
        """
        return self.spec.initial_state(batch, dtype or self.dtype or self.param_dtype)


class Layers(Module[StateT]):
    """What RNN, LSTM, GRU and Recurrent share: the call, and dropout as in linen.Dropout."""

    _Spec = Spec
    _: dataclasses.KW_ONLY
    recurrent_dropout: float = 0.0
    variational_dropout: bool = False
    remat: Remat = "none"
    hidden_axis: MeshAxis | None = None
    unroll: int | None = None
    engine: EngineNames = "auto"
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        flax_sharding.check(self.spec, self.hidden_axis)

    if TYPE_CHECKING:  # what the call returns; Flax's are Any, or a pair

        @overload
        def apply(
            self,
            variables: _Variables,
            x: ArrayLike,
            hx: HX = None,
            deterministic: bool | None = None,
            *,
            rngs: _Rngs = None,
            lengths: Lengths | None = None,
            mask: ArrayLike | None = None,
            reset: ArrayLike | None = None,
            reset_state: HX = None,
            dropout_masks: Sequence[ArrayLike] | None = None,
            rng: jax.Array | None = None,
        ) -> tuple[jax.Array, StateT]: ...
        @overload
        def apply(
            self,
            variables: _Variables,
            x: PackedSequence,
            hx: HX = None,
            deterministic: bool | None = None,
            *,
            rngs: _Rngs = None,
            mask: ArrayLike | None = None,
            reset: ArrayLike | None = None,
            reset_state: HX = None,
            dropout_masks: Sequence[ArrayLike] | None = None,
            rng: jax.Array | None = None,
        ) -> tuple[PackedSequence, StateT]: ...
        @overload
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...

        @overload
        def init_with_output(
            self,
            rngs: _Rngs,
            x: ArrayLike,
            hx: HX = None,
            deterministic: bool | None = None,
            *,
            lengths: Lengths | None = None,
            mask: ArrayLike | None = None,
            reset: ArrayLike | None = None,
            reset_state: HX = None,
            dropout_masks: Sequence[ArrayLike] | None = None,
            rng: jax.Array | None = None,
        ) -> tuple[tuple[jax.Array, StateT], dict[str, Any]]: ...
        @overload
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...

    def _initializers(self) -> dict[str, Callable[..., Any]]:
        draws = super()._initializers()
        if self.hidden_axis is None:
            return draws
        names = flax_sharding.names(self.spec, flax_sharding.mesh_axis(self.hidden_axis))
        return {name: linen.with_partitioning(draw, names[name]) for name, draw in draws.items()}

    @overload
    def __call__(
        self,
        x: ArrayLike,
        hx: HX = None,
        deterministic: bool | None = None,
        *,
        lengths: Lengths | None = None,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, StateT]: ...
    @overload
    def __call__(
        self,
        x: PackedSequence,
        hx: HX = None,
        deterministic: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[PackedSequence, StateT]: ...
    def __call__(
        self,
        x: ArrayLike | PackedSequence,
        hx: HX = None,
        deterministic: bool | None = None,
        *,
        lengths: Lengths | None = None,
        mask: ArrayLike | None = None,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        dropout_masks: Sequence[ArrayLike] | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Output, StateT]:
        """Run over a sequence.

        Args:
            x: the input, (time, batch, input_size), or (batch, time, input_size) with `batch_first`, or unbatched
                (time, input_size); floating. Or a PackedSequence of such steps.
            hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the
                shapes that are returned; zeros if None. A state that all rows share, such as a learned one, may have a
                batch of 1, or the last axis alone.
            deterministic: whether dropout and zoneout are off. With either, give it here or as a field. It can be given
                by position, so that `linen.remat` can name it: `linen.remat(jaxrnn.linen.LSTM, static_argnums=3)`.
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
            rng: a jax key for dropout, in place of the one that `apply` was given for `rng_collection`.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`; shapes as the class says.

        Raises:
            As `jaxrnn.apply`; and ValueError if `deterministic` is given twice, or needed and not given.
        """
        flax_cell.refuse_state_of_sequential(self, hx)
        if isinstance(deterministic, Sequence) or getattr(deterministic, "shape", ()) != ():  # by position
            raise TypeError(f"deterministic should be True, False or None, got {deterministic!r}: give lengths by name")
        off = self._is_off(deterministic)
        dropout_masks = None if off and self.dropout else dropout_masks  # refused without dropout
        return call(
            self._options(),
            self.spec,
            self._params(),
            x,
            hx,
            lengths=lengths,
            mask=mask,
            reset=reset,
            reset_state=reset_state,
            dropout_key=None if off else self._key(rng, dropout_masks is not None),
            dropout_masks=dropout_masks,
        )

    __call__.__qualname__ = "module"  # for Python's own messages, which would name this class

    def step(
        self,
        x: ArrayLike,
        hx: HX = None,
        deterministic: bool | None = None,
        *,
        reset: ArrayLike | None = None,
        reset_state: HX = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, StateT]:
        """Make one step through all layers: a call on a sequence of one step, without the axis of time.

        From outside: `layer.apply(variables, x, hx, method="step")`.

        Args:
            x: the input, (batch, input_size) or unbatched (input_size,); floating.
            hx: the initial state h_0, for a cell of several states a tuple or list, (h_0, c_0) for an LSTM, of the
                shapes that are returned; zeros if None. A state that all rows share, such as a learned one, may have a
                batch of 1, or the last axis alone.
            deterministic: whether dropout and zoneout are off. With either, give it here or as a field.
            reset: True for the rows whose state is reset before the step; boolean, (batch,), or for unbatched x ().
            reset_state: the state that `reset` starts from, like hx; zeros if None.
            rng: as in a call. The same key at each step gives the same masks.

        Returns:
            `(output, h_n)`, for an LSTM `(output, (h_n, c_n))`. output: the last layer's output, (batch, proj_size or
            hidden_size), without batch for unbatched x. h_n and c_n: the next state, of the full shape of hx.

        Raises:
            As a call; and ValueError for a bidirectional module.
        """
        off = self._is_off(deterministic)
        return call_step(
            self._options(),
            self.spec,
            self._params(),
            x,
            hx,
            reset=reset,
            reset_state=reset_state,
            dropout_key=None if off else self._key(rng),
        )

    step.__qualname__ = "module.step"

    def _options(self) -> Options:
        options = flax_sharding.on_the_mesh(self.options)
        if self.is_initializing() and not flax_sharding.on_mesh():  # `init` needs no mesh for names and shapes
            options = dataclasses.replace(options, hidden_axis=None)
        return options

    def _is_off(self, deterministic: bool | None) -> bool:
        """Whether dropout is off. Without dropout, nobody has to say."""
        if not self.spec.is_random():
            return True
        return bool(linen.merge_param("deterministic", self.deterministic, deterministic))

    def _key(self, rng: jax.Array | None, masks: bool = False) -> jax.Array | None:
        """A key for what is random, beside dropout if there are masks for it."""
        if not self.spec.is_random(masks):
            return None
        return self.make_rng(self.rng_collection) if rng is None else rng


class OneStep(Module[StateT]):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    _Spec = CellSpec

    if TYPE_CHECKING:

        @overload
        def apply(
            self,
            variables: _Variables,
            x: ArrayLike,
            hx: HX = None,
            *,
            reset: ArrayLike | None = None,
            reset_state: HX = None,
        ) -> StateT: ...
        @overload
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...
        def apply(self, variables: _Variables, *args: Any, **kwargs: Any) -> Any: ...

        @overload
        def init_with_output(self, rngs: _Rngs, x: ArrayLike, hx: HX = None) -> tuple[StateT, dict[str, Any]]: ...
        @overload
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...
        def init_with_output(self, rngs: _Rngs, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]: ...

    def __call__(
        self, x: ArrayLike, hx: HX = None, *, reset: ArrayLike | None = None, reset_state: HX = None
    ) -> StateT:
        """Make one step: x and hx to the next state, as the class says. Errors are those of `jaxrnn.apply_cell`."""
        flax_cell.refuse_state_of_sequential(self, hx)
        return call_cell(self.options, self.spec, self._params(), x, hx, reset=reset, reset_state=reset_state)

    __call__.__qualname__ = "cell"  # for Python's own messages, which would name this class

    @property
    def num_feature_axes(self) -> int:
        raise TypeError(flax_cell.NOT_FLAXS)  # Linen would hide the words of an AttributeError
