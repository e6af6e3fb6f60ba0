"""The compilers of accelerators that are not in this machine: libtpu for TPUs, JAX's CUDA plugin for GPUs.

Both compile ahead of time, for devices that a topology describes.
"""

import os
from pathlib import Path

import jax

from jaxrnn._compat import described_devices

# By name: the platform, and how JAX describes the topology.
TARGETS = {
    "v5e": ("tpu", {"topology_name": "v5e:2x2"}),
    "v6e": ("tpu", {"topology_name": "v6e:2x2"}),
    "v5p": ("tpu", {"topology_name": "v5p:2x2x1"}),
    "h100": ("cuda", {"topology_name": "", "topology": "1x1x1"}),
}
PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin jax-cuda12-pjrt"}


def devices(target: str) -> list[jax.Device]:
    """Returns the devices of a target, to compile for.

    Raises:
        SystemExit: the compiler is not installed, or does not start.
    """
    platform, topology = TARGETS[target]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor a driver
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip that two processes could want
    if platform == "cuda":  # a text of XLA's describes the GPU
        topology = topology | {"target_config": Path(__file__).with_name("h100.txt").read_text()}
    try:
        return described_devices(platform, **topology)
    except Exception as error:  # whatever JAX and XLA raise where the compiler is not installed
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = f"pip install --no-deps --target DIR {PACKAGES[platform]}, and put DIR on PYTHONPATH"
        raise SystemExit(f"the compiler for {target} does not start ({cause})\n{remedy}") from error
