"""Timings of jaxrnn beside Flax, Keras, cuDNN and PyTorch: `jaxrnn speed`, or `python -m parity.timing` in a clone.

`workloads` is the table and has the implementations, `speed` measures, `sweep` is a table of sizes, `ahead` compiles
for accelerators that are not here, and `device` reports on the device that is here.
"""
