"""Timings of jaxrnn beside Flax, Keras, cuDNN and PyTorch: `jaxrnn speed`, or `python -m parity.timing` in a clone.

`workloads` is the table of what is timed and its implementations, `speed` measures, `sweep` measures over sizes,
`ahead` compiles for accelerators that are not here, and `device` reports on the one that is.
"""
