"""The engine that runs all steps at once, where the recurrence is linear in the state."""

import sys
from collections.abc import Mapping

from jaxrnn._core.affine import why_not_affine
from jaxrnn._core.steps import Run
from jaxrnn.engines.scan import Form, Scan


class AssociativeScan(Scan):
    """`jax.lax.associative_scan`, forward and backward, for cells such as `MIN_GRU_CELL`.

    The default engine does the same on GPUs and TPUs where a step has little to do. On a CPU its loop is faster.
    """

    def refuses(self, run: Run) -> str | None:
        if not isinstance(run.gates[0].shape[0], int):
            return "the number of steps is symbolic"
        return why_not_affine(run)

    def forms(self, run: Run) -> Mapping[str | None, Form]:
        return {None: Form(parallel=sys.maxsize)}
