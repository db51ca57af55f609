"""`kernels.absorbed_ring`: its results on a GPU, and without one whether it compiles for one."""

# Compared with PyTorch in float64; nothing here is typed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.test_absorbed_attention import assert_close, make, run, wanted
from whisper_flash_attention.kernels.absorbed_attention import AttentionConfig, choose_config

RING = AttentionConfig("ring", queries=32, keys=64, warps=8)
HEADS, D = 20, 1280
SHARED_MEMORY = 232_448  # of a program on Hopper

# Compiles the kernel for Hopper. What it spills is on its stack.
COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from whisper_flash_attention.kernels import absorbed_ring as ring

kind = sys.argv[1]
constants = dict(
    CLIP_QUERIES=20, HEADS=20, TOKENS=1, TILES=1, WIDTH=20, M=32, D=1280, FINISHED=True,
    BACKWARDS=True, KEYS=64, CHUNK=ring.CHUNK, SLOTS=ring.SLOTS, KEEP=ring.KEEP, num_warps=8,
)
states = f"tensordesc<{kind}[64, {ring.CHUNK}],{ring.CHUNKS_LAYOUT!r}>"
signature = {
    "queries": f"*{kind}", "states": states, "partial_out": f"*{kind}", "partial_stats": "*fp32",
    "finished": "*i1", "n_keys": "i32", "n_queries": "i32",
} | dict.fromkeys(constants, "constexpr")
names = ring.ring_kernel.arg_names
source = GluonASTSource(
    ring.ring_kernel,
    signature,
    {(names.index(name),): value for name, value in constants.items()},
    {(names.index(name),): [["tt.divisibility", 16]] for name in ("queries", "partial_out")},
)
options = {"num_warps": 8}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
stack = int(re.search(r"STACK:(\\d+)", report)[1])
print(json.dumps({"shared": compiled.metadata.shared, "stack": stack}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
def test_compiles_for_hopper_without_spills(tmp_path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, "fp16"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["shared"] <= SHARED_MEMORY
    assert found["stack"] <= 64  # addresses; the sums of a thread take 640 bytes


@pytest.mark.gpu
def test_is_chosen_on_hopper() -> None:
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        pytest.skip("needs a GPU of capability 9.x")
    assert choose_config(HEADS, D, torch.float16, capability) == RING


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("clips", "keys", "rows_per_clip", "splits"),
    [
        pytest.param(3, 64, 1, 1, id="one block"),
        pytest.param(3, 65, 1, 2, id="a part of one key"),
        pytest.param(2, 100, 1, 8, id="parts without keys"),
        pytest.param(2, 1500, 4, 3, id="a prompt of 4 tokens"),
        pytest.param(130, 1500, 1, 1, id="more clips than processors"),
    ],
)
def test_equals_softmax_over_states(clips, keys, rows_per_clip, splits, backwards, dtype) -> None:
    rows = clips * rows_per_clip
    queries, states = make(rows, clips, HEADS, D, keys, dtype, "cuda")
    mean, parts, stats = run(
        queries, states, splits, rows_per_clip=rows_per_clip, backwards=backwards, config=RING
    )
    assert_close(mean, wanted(queries, states, rows_per_clip), dtype)
    assert parts.isfinite().all()
    assert not stats.isnan().any()


@pytest.mark.gpu
def test_reads_nothing_of_finished_slots_nor_of_the_next_clip() -> None:
    queries, states = make(6, 3, HEADS, D, 150, torch.float16, "cuda")
    states[1] = float("nan")
    finished = torch.tensor([False, True, False], device="cuda")
    options = {"rows_per_clip": 2, "tokens_per_slot": 2, "finished": finished, "config": RING}
    mean, parts, stats = run(queries, states, 2, **options)
    done = finished.repeat_interleave(2)
    assert (parts[:, done] == 0).all()
    assert (stats[:, done, :, 0] == -torch.inf).all()
    assert_close(mean[~done], wanted(queries, states, 2)[~done], torch.float16)


@pytest.mark.gpu
def test_large_scores_do_not_overflow() -> None:
    queries, states = make(1, 1, HEADS, D, 150, torch.float16, "cuda")
    mean, _, _ = run(queries * 30, states, 2, config=RING)
    assert_close(mean, wanted(queries * 30, states), torch.float16)
