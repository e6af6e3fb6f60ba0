"""The engines that run all steps at once, where the recurrence is linear in the state."""

import sys
from collections.abc import Mapping

from jaxrnn._compat import is_plain
from jaxrnn._core.affine import why_not_affine
from jaxrnn._core.steps import Run
from jaxrnn.engines.scan import Form, Scan

# Found by compiling for a v5e, and from an H100's bandwidth and launches. On a CPU the loop is faster at every size.
_KIB = 2**10
_PARALLEL: dict[str | None, int] = {"cuda": 1024 * _KIB, "rocm": 1024 * _KIB, "tpu": 128 * _KIB}


class AssociativeScan(Scan):
    """`jax.lax.associative_scan` over time, forward and backward, for cells such as `MIN_GRU_CELL`."""

    def refuses(self, run: Run) -> str | None:
        if not isinstance(run.gates[0].shape[0], int):
            return "the number of steps is symbolic"
        return why_not_affine(run)

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        # Not every reader of jaxprs knows what an associative scan is made of.
        return {None: Form(parallel=0 if is_plain.value else sys.maxsize)}


class EitherScan(Scan):
    """The loop, or on GPUs and TPUs the associative scan, where its passes take less time than a launch for each step.

    That is where the recurrence is linear in the state, and a step has little to do.
    """

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        forms = super().forms(run)
        if why_not_affine(run) is not None:
            return forms
        return {platform: form._replace(parallel=_PARALLEL.get(platform, 0)) for platform, form in forms.items()}
