"""The random numbers that torch draws on a CPU, from the same seed, without torch: initial weights, dropout masks.

They are for comparing a model with its original in torch from the first step on, with neither torch nor a checkpoint.
Torch's generator is the Mersenne Twister mt19937, seeded with the seed's low 32 bits, and so is NumPy's RandomState:

    w        the next 32-bit word of the generator
    u        (w mod 2^24) / 2^24; for float64 ((2^32 w + w') mod 2^53) / 2^53, with w' the word after w
    uniform  fma(u, high - low, low), rounded once, and low in place of what is rounded up to high
    normal   sqrt(-2 log(1 - u)) cos(2 pi u') and the same with sin, from two numbers u and u'
    kept     by dropout: a number u of float64 is below 1 - p

The source is torch's, `ATen/core/DistributionsHelper.h`, `TransformationHelper.h` and
`ATen/native/cpu/DistributionTemplates.h`. Numbers are bit for bit those of torch 2.13 on Linux, on a processor with
AVX2 and fma, such as Intel's since 2013 and AMD's since 2015. In torch's code for others, without fma, half of the
uniform numbers differ by one rounding, and normal ones of float32 by up to 2.1e-6.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxrnn.cells import check_probability

__all__ = ["TorchGenerator"]

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_FILLED = 16  # from so many normal numbers on, torch makes them in blocks of as many
_Size = int | Sequence[int]


class TorchGenerator:
    """Torch's random numbers on a CPU, as after `torch.manual_seed(seed)`: each draw goes on where the last one ended.

    It takes the place of `rngs` in the constructors of jaxrnn's modules for Flax NNX, and of the key in `Spec.init`:
    then the weights are those that torch's constructors draw. To fill a whole model, see `jaxrnn.torch_init`.
    `copy.deepcopy` copies its state. Under `jit` it draws once, when the function is traced.

    Args:
        seed: an integer, as for `torch.manual_seed`. Only its low 32 bits count.

    Raises:
        TypeError: seed is not an integer.
        ValueError: seed is not one of 64 bits.

    >>> import jaxrnn
    >>> generator = jaxrnn.TorchGenerator(0)                      # torch.manual_seed(0)
    >>> generator.uniform(3)                                      # torch.rand(3)
    array([0.4962566 , 0.7682218 , 0.08847743], dtype=float32)
    >>> encoder = jaxrnn.LSTM(10, 20, rngs=generator)             # torch.nn.LSTM(10, 20)
    >>> decoder = jaxrnn.GRU(20, 20, rngs=generator)              # torch.nn.GRU(20, 20)
    """

    def __init__(self, seed: int) -> None:
        try:
            seed = operator.index(seed)
        except TypeError as error:
            got = repr(seed) if isinstance(seed, str | float) else type(seed).__name__
            raise TypeError(f"seed should be an integer, got {got}") from error
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed should be from -2**63 to 2**64 - 1, as for torch.manual_seed, got {seed}")
        self._seed = seed
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._next: float | None = None  # the second number of a pair of normal ones

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._seed})"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say what to do where Flax's own layers ask for `rngs.params()`."""
            remedy = "give Flax's own layers nnx.Rngs, then draw the whole model with jaxrnn.torch_init(model, seed)"
            raise AttributeError(f"a TorchGenerator has no {name}: {remedy}")

    def uniform(
        self, shape: _Size, low: float = 0.0, high: float = 1.0, dtype: DTypeLike = jnp.float32
    ) -> NDArray[Any]:
        """Draw uniform numbers: `torch.empty(shape, dtype=dtype).uniform_(low, high)`. float64 has other numbers.

        Args:
            shape: an int or a sequence of ints.
            low, high: the numbers are in [low, high).
            dtype: float32, float64, float16 or bfloat16.

        Returns:
            A NumPy array.

        Raises:
            TypeError: dtype is another one.
            ValueError: low is above high, or they or their difference are not finite numbers of this dtype.
        """
        wanted, shape = _checked(dtype, _DTYPES), _shape(shape)
        largest = float(jnp.finfo(wanted).max)
        if not (-largest <= low <= high <= largest and high - low <= largest):
            raise ValueError(f"low should be at most high, within {wanted.name}'s range, got low={low} and high={high}")
        if wanted == np.float64:
            drawn = _fma(self._doubles(math.prod(shape)), float(high) - float(low), low)
        else:
            # Bounds and sums are of float32, also for dtypes of 16 bits.
            first, last = np.float32(low), np.float32(high)
            drawn = _fma32(self._floats(math.prod(shape)), last - first, first).astype(wanted)
        return np.where(drawn == wanted.type(high), wanted.type(low), drawn).reshape(shape)

    def normal(self, shape: _Size, dtype: DTypeLike = jnp.float32) -> NDArray[Any]:
        """Draw normal numbers, of mean 0 and variance 1: `torch.randn(shape, dtype=dtype)`.

        Args:
            shape: an int or a sequence of ints.
            dtype: float32 or float64.

        Returns:
            A NumPy array.

        Raises:
            TypeError: dtype is another one.

        >>> import jaxrnn
        >>> jaxrnn.TorchGenerator(0).normal(3)                    # torch.manual_seed(0); torch.randn(3)
        array([ 1.5409961, -0.2934289, -2.1787894], dtype=float32)
        """
        wanted, shape = _checked(dtype, _DTYPES[:2]), _shape(shape)
        count = math.prod(shape)
        if count < _FILLED:
            return np.array([self._one_normal() for _ in range(count)], wanted).reshape(shape)
        draw: Callable[[int], NDArray[Any]] = self._floats if wanted == np.float32 else self._doubles
        pairs: Callable[[Any], NDArray[Any]] = _pairs32 if wanted == np.float32 else _pairs64
        drawn, whole = draw(count), count - count % _FILLED
        drawn[:whole] = pairs(drawn[:whole])
        if whole < count:  # torch draws the last block again
            drawn[-_FILLED:] = pairs(draw(_FILLED))
        return drawn.reshape(shape)

    def dropout_mask(self, shape: _Size, p: float) -> NDArray[np.bool_]:
        """Draw what dropout keeps: `torch.nn.functional.dropout(torch.ones(shape), p) != 0`.

        Torch draws in the order of memory. Of a transposed tensor, such as the output of a layer with `batch_first`,
        draw the mask in the shape before, (time, batch, features), and transpose it, too.

        On Intel's processors torch draws dropout by another generator, that of Intel's library MKL, and on others by
        this one. So masks are for comparing with a run on another processor; to train, give `nnx.Rngs`.

        Args:
            shape: an int or a sequence of ints.
            p: the probability of dropping a number. For 0 and 1 nothing is drawn, as in torch.

        Returns:
            A NumPy array of bool, True where a number is kept.

        Raises:
            ValueError: p is not a number from 0 to 1.

        >>> import jaxrnn
        >>> jaxrnn.TorchGenerator(0).dropout_mask((2, 3), 0.5).tolist()
        [[False, False, True], [False, False, False]]
        """
        check_probability("p", p)
        shape = _shape(shape)
        if p in (0, 1):
            return np.full(shape, p == 0)
        return (self._doubles(math.prod(shape)) < 1 - p).reshape(shape)

    def _integers(self, count: int) -> NDArray[np.uint32]:
        drawn = self._words.bytes(4 * count) if count else b""  # for no bytes NumPy draws, too
        return np.frombuffer(drawn, "<u4")

    def _floats(self, count: int) -> NDArray[np.float32]:
        """Uniform numbers of 24 bits in [0, 1)."""
        return (self._integers(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def _doubles(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers of 53 bits in [0, 1)."""
        high, low = self._integers(2 * count).reshape(count, 2).T.astype(np.uint64)
        return ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53

    def _one_normal(self) -> float:
        if self._next is not None:
            found, self._next = self._next, None
            return found
        angle, radius = self._doubles(2).tolist()
        radius, angle = math.sqrt(-2.0 * math.log1p(-radius)), 2.0 * math.pi * angle
        self._next = radius * math.sin(angle)
        return radius * math.cos(angle)


def _checked(dtype: DTypeLike, known: Sequence[str]) -> np.dtype:
    wanted = jnp.dtype(dtype)
    if wanted.name not in known:
        raise TypeError(f"dtype should be one of {', '.join(known)}, got {wanted.name}")
    return wanted


def _shape(shape: _Size) -> tuple[int, ...]:
    sizes = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape should have sizes from 0 on, got {shape}")
    return sizes


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """A sum, and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _odd_sum(a: Any, b: Any) -> NDArray[np.float64]:
    """A sum rounded to odd, so that it can be rounded once more without harm (Boldo and Melquiond 2008)."""
    total, error = _two_sum(a, b)
    even = total.view(np.int64) & 1 == 0
    return np.where(even & (error != 0), np.nextafter(total, np.copysign(np.inf, error)), total)


def _fma(a: NDArray[np.float64], b: float, c: float) -> NDArray[np.float64]:
    """a * b + c, rounded once."""

    def halves(x: Any) -> tuple[Any, Any]:  # of the 53 bits (Veltkamp)
        scaled = x * (2.0**27 + 1)
        high = scaled - (scaled - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = halves(a), halves(b)
    error = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2  # Dekker
    small, smaller = _two_sum(c, error)
    total, rest = _two_sum(product, small)
    return total + _odd_sum(rest, smaller)


def _fma32(a: Any, b: Any, c: Any) -> NDArray[np.float32]:
    """a * b + c in float32, rounded once. The product is exact in float64."""
    return _odd_sum(np.asarray(a, np.float64) * np.float64(b), np.asarray(c, np.float64)).astype(np.float32)


def _pairs64(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normal numbers of uniform ones, in blocks of 16, with the functions of the C library."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, _FILLED // 2), 1, 0)
    log, sin, cos = (np.vectorize(f, otypes=[float]) for f in (math.log, math.sin, math.cos))  # NumPy has its own
    radius, angle = np.sqrt(-2.0 * log(1.0 - first)), 2.0 * math.pi * second
    return np.stack([radius * cos(angle), radius * sin(angle)], 1).ravel()


def _pairs32(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same with the functions that torch has for AVX2."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, _FILLED // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * _log32(np.float32(1.0) - first))
    sin, cos = _sin_and_cos32(np.float32(2.0 * math.pi) * second)
    return np.stack([radius * cos, radius * sin], 1).ravel()


# Polynomials of Cephes (Moshier 1992), in the order of operations of torch's `ATen/native/cpu/avx_mathfun.h`.
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LOG_2 = (-2.12194440e-4, 0.693359375)  # in two parts, of which the second is exact in few bits
_PI_4 = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # pi / 4 in three


def _polynomial(x: NDArray[np.float32], coefficients: Sequence[float]) -> NDArray[np.float32]:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma32(value, x, np.float32(coefficient))
    return value


def _log32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    fraction, exponent = np.frexp(x)
    small = fraction < np.float32(math.sqrt(0.5))
    power = (exponent - small).astype(np.float32)
    x = (fraction - np.float32(1)) + np.where(small, fraction, np.float32(0))
    square = x * x
    low = _fma32(_polynomial(x, _LOG) * x, square, power * np.float32(_LOG_2[0]))
    return _fma32(power, np.float32(_LOG_2[1]), x + (low - square * np.float32(0.5)))


def _sin_and_cos32(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of numbers from 0 on."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    for part in _PI_4:
        x = _fma32(octant.astype(np.float32), np.float32(-part), x)
    square = x * x
    cos = _fma32(_polynomial(square, _COS) * square, square, -(square * np.float32(0.5))) + np.float32(1)
    sin = _fma32(_polynomial(square, _SIN) * square, x, x)
    exchanged = octant & 2 != 0
    sin, cos = np.where(exchanged, cos, sin), np.where(exchanged, sin, cos)
    return np.where(octant & 4 != 0, -sin, sin), np.where((octant - 2) & 4 == 0, -cos, cos)
