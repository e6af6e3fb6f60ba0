"""A layer's loop in blocks of steps: how many steps a block has, and the scan over blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._core.platforms import Where
from jaxrnn._core.steps import Settings
from jaxrnn.engines import Engine, Form

_BYTES = 4  # of a number
_AGAIN = 128  # the most steps that remat="gates" computes again at a time


class Sizes(NamedTuple):
    """The sizes on which the size of a block depends, beside the platform."""

    time: Any
    rows: Any  # B, before jax.vmap multiplies it
    columns: int  # G * H
    keep: bool  # whether there will be a derivative
    backward: bool  # whether this is the derivative


def block_size(form: Form, where: Where, settings: Settings, sizes: Sizes) -> int:
    """How many steps a block has; symbolic, if the time is: all of them."""
    time, rows, columns, keep, backward = sizes
    remat = settings.options.remat
    if isinstance(remat, int) and keep:
        return min(remat, time)
    memory = form.training if keep else form.inference
    known = isinstance(time, int) and isinstance(rows, int)
    # Where devices share the rows, they would exchange the weights' gradients at each block.
    if memory is None or not known or settings.options.hidden_axis is not None or (backward and where.shared):
        return time
    rows *= where.times
    if keep and form.many is not None and rows >= form.many:
        return 1
    most = memory // max(1, rows * columns * _BYTES)
    if rows < form.rows or 3 * most >= time:
        most = time
    if keep and remat == "gates":
        most = min(most, _AGAIN)
    if most >= time:
        return time
    # A divisor of the time, if there is a large one, so that there is one kind of block.
    return next((n for n in range(most, most // 2, -1) if time % n == 0), max(most, 1))


class Loop(NamedTuple):
    """How a layer's loop is run on a platform."""

    engine: Engine
    form: Form
    settings: Settings
    keep: bool  # whether there is a derivative
    size: int  # of a block, in steps

    @classmethod
    def of(cls, engine: Engine, form: Form, where: Where, settings: Settings, sizes: Sizes) -> "Loop":
        size, rows = block_size(form, where, settings, sizes), sizes.rows * where.times
        one = any(isinstance(n, int) and n == 1 for n in (sizes.time, rows))
        # XLA crashes on some products of mapped arrays behind a barrier, and gathers arrays that devices share.
        if where.mapped or where.shared:
            form = form._replace(apart=False)
        known = isinstance(rows, int)
        if known and rows * sizes.columns * _BYTES > form.parallel:
            form = form._replace(parallel=0)
        return cls(engine, form, settings._replace(stored=one), sizes.keep, size)

    @property
    def single(self) -> bool:
        """Whether a block is a step, without a time axis."""
        return self.size == 1 and self.form.inference is not None

    def in_blocks(
        self, block: Callable[..., Any], carry: Any, parts: Any, firsts: Any = None, again: bool = False
    ) -> tuple[Any, Any]:
        """Scan over blocks.

        `block(carry, part, first)` returns a carry, and a pair: results for every step, and results for the block.

        Args:
            parts: arrays with an axis of steps in front, T long. A block gets its own steps of them.
            firsts: arrays with an axis of blocks in front. A block gets its own element of them.
            again: whether each block recomputes what does not depend on tangents, rather than JAX storing it for all
                blocks.
        """
        time, reverse = jax.tree.leaves(parts)[0].shape[0], self.settings.reverse
        if not self.single and (not isinstance(time, int) or self.size >= time):
            carry, (every, first) = block(carry, parts, jax.tree.map(lambda a: a[0], firsts))
            return carry, (every, jax.tree.map(lambda a: a[None], first))
        made = jax.checkpoint(block, prevent_cse=False) if again and self.size < time else block

        def one(carry: Any, part: Any) -> Any:
            return made(carry, *part)

        if self.single:
            return self.form.scan(self.settings, one, carry, (parts, firsts))

        def piece(carry: Any, of_steps: slice, of_blocks: slice, shape: tuple[int, int]) -> tuple[Any, Any]:
            part = jax.tree.map(lambda a: a[of_steps].reshape(*shape, *a.shape[1:]), parts)
            given = part, jax.tree.map(lambda a: a[of_blocks], firsts)
            carry, (every, first) = self.form.stacking(lax.scan)(one, carry, given, reverse=reverse)
            return carry, (jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), every), first)

        count, rest = divmod(time, self.size)
        pieces = [(slice(0, time - rest), slice(0, count), (count, self.size))]
        pieces += [(slice(time - rest, time), slice(count, None), (1, rest))] * (rest > 0)
        found = []
        for each in pieces[::-1] if reverse else pieces:
            carry, results = piece(carry, *each)
            found.append(results)
        if len(found) == 1:
            return carry, found[0]
        # Leaf by leaf: each piece has its own linear map in its tree structure, so structures are never equal.
        leaves = map(jnp.concatenate, zip(*map(jax.tree.leaves, found[:: -1 if reverse else 1]), strict=True))
        return carry, jax.tree.unflatten(jax.tree.structure(found[0]), leaves)
