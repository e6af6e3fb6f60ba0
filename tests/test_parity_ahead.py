"""Programs compiled for accelerators that are not here: what is counted in them, and what may not get worse.

The compilers are beside the environment, if they are there: see .ci/run.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from parity import hlo
from parity.compilers import TARGETS
from parity.timing import ahead
from parity.timing.workloads import GRAPHS, WORKLOADS

NAMED = {workload.name: workload for workload in WORKLOADS}
THUNKS = """000: kCommandBuffer [source       | next=017 (1)]
    001: kCustomKernel [source] a fusion grid: [1, 1, 1]
017: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    018: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer      [source       | next=021 (1)]
        019: kCustomKernel [source       | next=020 (1)] gemm
        020: kCustomKernel [prev=019 (1) | sink        ] multiply
    021: kDynamicSliceFusion [prev=000 (1) | next=023 (1)] params=1, results=1
        022: kCopy [source | sink] kCopy
000: kCommandBuffer [prev=017 (1) | sink        ]
    030: kCustomKernel [source       | next=031 (1)] divide
    038: kWhile        [prev=037 (1) | next=046 (1)]
condition:
        039: kCustomKernel [source | sink] loop_compare_fusion
      body:
        040: kCustomKernel [source       | next=041 (1)] concatenate
    046: kCustomKernel [prev=038 (1) | next=047 (1)] concatenate
"""
HLO = """HloModule jit_f

%body.1 (arg: (s32[], f32[8,2,128], f32[8,2,128], f32[128,128])) -> (s32[], f32[8,2,128]) {
  %arg = (s32[], f32[8,2,128]{2,1,0:T(2,128)S(1)}, f32[8,2,128]{0,1,2:T(8)}, f32[128,128]{1,0:T(8,128)}) parameter(0)
  %get.1 = f32[8,2,128]{2,1,0:T(2,128)S(1)} get-tuple-element(%arg), index=1
  %get.2 = f32[8,2,128]{0,1,2:T(8,128)} get-tuple-element(%arg), index=2
  %get.3 = f32[128,128]{1,0:T(8,128)} get-tuple-element(%arg), index=3
  %copy.1 = f32[2,128]{1,0:T(2,128)S(1)} copy(%get.1), backend_config={"estimated_cycles":"17"}
  ROOT %fusion.1 = f32[2,128]{1,0} fusion(%copy.1, %get.2, %get.3), backend_config={"estimated_cycles":"300"}
}

ENTRY %main (x: f32[8,2,128]) -> f32[2,128] {
  %while.1 = (s32[]) while(%tuple.1), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"8"}}
}
"""
# Four blocks of eight steps: a loop within a loop.
NESTED_THUNKS = """000: kCommandBuffer [source       | next=004 (1)]
    001: kCopy         [source | sink] kCopy
004: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source | sink] loop_compare_fusion_1
  body:
    007: kDynamicSliceFusion [source       | next=000 (1)] params=1, results=1
        008: kCopy [source | sink] kCopy
    000: kCommandBuffer      [prev=007 (1) | next=018 (1)]
        009: kCustomKernel [source       | next=010 (1)] gemm_fusion_dot
        011: kWhile              [prev=000 (1) | next=018 (1)]
condition:
            012: kCustomKernel [source | sink] loop_compare_fusion_1
          body:
            013: kCustomKernel [source       | next=014 (1)] gemm_fusion_dot_1
            014: kCustomKernel [prev=013 (1) | sink        ] loop_tanh_fusion
            017: kCustomKernel [source | sink] loop_add_fusion
    018: kDynamicSliceFusion [prev=011 (1) | sink        ] params=1, results=1
        019: kCopy [source | sink] kCopy
    020: kCustomKernel [source | sink] loop_add_fusion
000: kCommandBuffer [prev=004 (1) | sink        ]
    021: kCopy         [source | sink] kCopy
"""
NESTED_HLO = """HloModule jit_f

%condition (arg: (s32[], f32[4,8,2,128])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
}

%inner (arg.1: (s32[], f32[8,2,128])) -> (s32[], f32[8,2,128]) {
  %arg.1 = (s32[], f32[8,2,128]{1,2,0:T(2,128)}) parameter(0)
  %get.1 = f32[8,2,128]{1,2,0:T(2,128)} get-tuple-element(%arg.1), index=1
  %fusion.1 = f32[2,128]{1,0} fusion(%get.1), calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %fusion.2 = f32[2,128]{1,0} fusion(%fusion.1), calls=%fused.1, backend_config={"estimated_cycles":"10"}
}

%block (arg.2: (s32[], f32[4,8,2,128])) -> (s32[], f32[4,8,2,128]) {
  %arg.2 = (s32[], f32[4,8,2,128]{3,2,0,1:T(2,128)}) parameter(0)
  %get.2 = f32[4,8,2,128]{3,2,0,1:T(2,128)} get-tuple-element(%arg.2), index=1
  %slice.1 = f32[8,2,128]{2,1,0:T(2,128)S(1)} dynamic-slice(%get.2), backend_config={"estimated_cycles":"7"}
  %while.1 = (s32[], f32[8,2,128]{2,1,0}) while(%t.1), condition=%c, body=%inner, trip={"known_trip_count":{"n":"8"}}
  %unknown = (s32[], f32[2,128]{1,0}) while(%t.3), condition=%c.1, body=%something
  %kernel.1 = f32[2,128]{1,0} custom-call(%slice.1), custom_call_target="tpu_custom_call", backend_config={"body":"a"}
  ROOT %fusion.3 = f32[2,128]{1,0} fusion(%slice.1), calls=%fused.2, backend_config={"estimated_cycles":"1"}
}

%something (arg.3: (s32[], f32[2,128])) -> (s32[], f32[2,128]) {
  %negate.1 = f32[2,128]{1,0} negate(%get.3)
}

%called (arg.4: f32[4,8,2,128]) -> f32[2,128] {
  %while.2 = (s32[], f32[4,8,2,128]{3,2,1,0}) while(%t.2), condition=%condition, body=%block
}

%once (arg.5: (s32[], f32[1,2,128])) -> (s32[], f32[1,2,128]) {
  %arg.5 = (s32[], f32[1,2,128]{2,0,1:T(2,128)}) parameter(0)
  %copy.1 = f32[2,128]{1,0:T(2,128)} copy(%get.4)
}

ENTRY %main (x: f32[4,8,2,128]) -> f32[2,128] {
  %unknown.1 = (s32[], f32[2,128]{1,0}) while(%t.3), condition=%c.1, body=%something
  %while.3 = (s32[], f32[2,128]{1,0}) while(%t.3), condition=%c.1, body=%something, trip={"known_trip_count":{"n":"99"}}
  %call.1 = f32[2,128]{1,0} call(%x), to_apply=%called
  %while.4 = (s32[], f32[1,2,128]{2,1,0}) while(%t.4), condition=%c, body=%once, trip={"known_trip_count":{"n":"1"}}
  %sum.1 = f32[2,128]{1,0} add(%call.1, %while.4), backend_config={"estimated_cycles":"50"}
}
"""


def test_launches_are_counted() -> None:
    (first, second), outside = hlo.launches(THUNKS)
    assert outside == 3
    assert (first.operations, first.copies, first.in_graph) == (3, 1, False)
    assert (second.operations, second.copies, second.in_graph) == (1, 0, True)


def test_loops_are_read() -> None:
    [loop] = hlo.loops(HLO, 8)
    assert hlo.cycles(HLO, [loop]) == 8 * 317
    assert (loop.trips, loop.operations, loop.copies, loop.cycles, loop.not_time_major) == (8, 2, 1, 317, 1)
    assert loop.hbm_bytes == 4 * (2 * 128 + 128 * 128)  # a step of what is sliced, and all of the weights


def test_launches_of_a_loop_within_a_loop() -> None:
    (block, step), outside = hlo.launches(NESTED_THUNKS)
    assert outside == 2
    assert (block.operations, block.copies, block.in_graph) == (4, 2, False)
    assert (step.operations, step.copies, step.in_graph) == (3, 0, True)


def test_a_loop_within_a_loop_is_shared_out() -> None:
    found = hlo.loops(NESTED_HLO, 32)
    assert [(loop.trips, loop.operations, loop.copies) for loop in found] == [
        (4, 2, 1),
        (32, 2, 0),
        (4, 1, 0),
        (32, 0, 0),  # the kernel, which has a loop over time of its own
        (1, 1, 1),
    ]
    block, step, *_ = found
    assert ahead.Compiled("", "", "", "", (block, step)).a_step(32) == 2 + 2 / 8
    assert hlo.cycles(NESTED_HLO, found) == 50 + 4 * 8 + 32 * 110
    # A slice of the block's and of the step's arrays.
    assert [loop.hbm_bytes for loop in found[:2]] == [4 * 8 * 2 * 128, 2 * 4 * 2 * 128]
    assert [loop.not_time_major for loop in found] == [1, 0, 0, 0, 0]
    bundles = {"fusion.1": hlo.Bundles(30), "fusion.3": hlo.Bundles(16, True), "while.1": hlo.Bundles(9)}
    counted = ahead.Compiled("", "", "", "", tuple(hlo.loops(NESTED_HLO, 32, bundles)))
    assert counted.bundles(32) == "32+"


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_steps_are_read_as_compiled(training: bool) -> None:
    def run(weight: jax.Array, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (h := jnp.tanh(h @ weight + x)), h

        blocks = jax.lax.scan(lambda h, block: jax.lax.scan(step, h, jnp.sin(block)), x[0, 0], x)
        return jnp.sum(blocks[1])

    function = jax.value_and_grad(run) if training else run
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8), (5, 3, 4, 8))]
    found = hlo.loops(jax.jit(function).lower(*shapes).compile().as_text() or "", 15)
    assert [loop.trips for loop in found] == [5, 15] * (1 + training)
    assert min(loop.operations for loop in found) > 0


def _compiled(target: str, name: str, side: str = "jaxrnn") -> dict[str, ahead.Compiled]:
    package = "libtpu" if TARGETS[target][0] == "tpu" else "jax_plugins"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here to compile for {target}")
    found = {each.program: each for each in ahead.compile_for(target, [NAMED[name]], [side])}
    assert {each.problem for each in found.values()} == {""}
    return found


@pytest.mark.compilers
@pytest.mark.parametrize(("name", "most"), [("small LSTM", 7), ("small GRU", 6)])
def test_a_step_on_a_gpu_takes_few_launches_in_one_graph(name: str, most: int) -> None:
    found = _compiled("h100", name)
    assert found["training"].a_step(NAMED[name].time) <= most
    assert all(loop.in_graph for program in found.values() for loop in program.loops)
    assert len(found["training"].loops) == 2


@pytest.mark.compilers
def test_a_linear_recurrence_takes_few_launches_on_a_gpu() -> None:
    """And a loop one or more for each step."""
    loops, at_once = (_compiled("h100", "minGRU, 4,096 steps", side)["training"] for side in ("scan", "jaxrnn"))
    assert loops.a_step(4096) >= 2
    assert not at_once.loops
    assert 0 < at_once.outside < 60


@pytest.mark.compilers
@pytest.mark.parametrize("name", ["small LSTM", "small GRU", "char-LM GRU", "PTB LSTM", "RL GRU"])
def test_no_step_on_a_tpu_gathers(name: str) -> None:
    found = _compiled("v5e", name)
    assert found["training"].cycles > 0
    assert [loop.not_time_major for loop in found["training"].loops] == [0] * len(found["training"].loops)


@pytest.mark.compilers
@pytest.mark.parametrize("target", [name for name, (platform, _) in TARGETS.items() if platform == "tpu"])
def test_kernels_compile_for_every_tpu(target: str) -> None:
    """On one of them of sizes that are no multiples of tiles: 20 rows of 650 units."""
    name = "PTB LSTM" if target == "v5p" else "small GRU"
    counts = {program: len(each.loops) for program, each in _compiled(target, name, "pallas").items()}
    assert counts == {"forward": NAMED[name].num_layers, "training": 2 * NAMED[name].num_layers}


@pytest.mark.compilers
def test_a_kernels_instructions_are_counted(tmp_path: Path) -> None:
    """In a process of its own: the compiler must be told before it is loaded."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not here to compile for v5e")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "parity.timing", "--compile-only", "--platform", "v5e", "--filter", "small LSTM"]
    subprocess.run([*command, "--bundles", "--json", str(out)], cwd=Path(__file__).parents[1], check=True)
    loops = {(each["side"], each["program"]): each["loops"] for each in json.loads(out.read_text())}
    a_step = {key: sum(loop["bundles"] * loop["trips"] for loop in each) / 100 for key, each in loops.items()}
    assert 100 < a_step["pallas", "training"] < 280
    assert 100 < a_step["jaxrnn", "training"] < 400


def test_the_guide_gives_the_same_options() -> None:
    guide = (Path(__file__).parents[1] / "examples" / "accelerators.md").read_text()
    _, _, rest = guide.partition(">>> graphs = ")
    assert ast.literal_eval(rest.partition("\n>>> ")[0].replace("\n... ", "\n")) == GRAPHS


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_what_cannot_be_described_is_said() -> None:
    """In a process of its own, which finds no compiler."""
    command = [sys.executable, "-m", "parity.timing", "--compile-only", "--platform", "v5e", "--filter", "small LSTM"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert run.returncode == 1
    assert "the compiler for v5e does not start" in run.stderr
    assert "pip install --no-deps --target DIR libtpu" in run.stderr
