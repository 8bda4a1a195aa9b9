"""The emulator finds what a GPU would not forgive: one small kernel, sound but for the one fault that a launch asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_lanes import LaneError, Library, build, few_objects, needs_compiler  # noqa: F401

pytestmark = [needs_compiler, pytest.mark.usefixtures("few_objects")]

# Each warp copies 32 words of its block, lane by lane, turns them round and adds 1; a block leaves its sum at out[-1 - block].
SOURCE = """// ---- PTX
// ---- end of PTX
#line 1 "turn.cu"
struct Params { const int* x; int* out; int fault, shift; };
#define FAULT(number) (p.fault == number)
extern "C" __global__ void turn(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ int sums[2];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, at = blockIdx.x * 64 + tid;
  int* words = (int*)smem + warp * 32;
  const unsigned base = shared_address(smem);
  if (!FAULT(1)) wait_for_previous();
  copy4(base + 4 * tid + (FAULT(2) ? 256 : 0) - (FAULT(3) ? base : 0), p.x + at);
  commit_copies();
  FAULT(4) ? wait_copies<1>() : wait_copies<0>();
  if (!FAULT(5)) __syncwarp();
  const int x = FAULT(6) ? words[32 - lane] : lds(base + 4 * (warp * 32 + 31 - lane));
  p.out[at + (FAULT(7) ? 2 : 0)] = x + 1;
  if (FAULT(8)) p.out[blockIdx.x] = x;
  if (FAULT(9)) *(float2*)(smem + 4) = {};
  if (FAULT(10) && lane == 5) __syncwarp();
  if (FAULT(11) && lane == 5) return;
  if (FAULT(12)) copy16(base + 8, p.x);
  if (FAULT(13) && lane == 0) copy4(base, p.x + 1);
  if (FAULT(14)) sums[warp] = x << p.shift;
  if (FAULT(15)) sums[warp] = 2147483647 + x * p.shift;
  if (FAULT(16)) sums[p.shift] = x;
  if (FAULT(17)) words[0] = lane;
  float sum[4] = {}, ones[4] = {1, 1, 1, 1};
  mma_tf32(sum, ones, x < 0 ? 0 : 1, 1);
  if (lane == 0) sums[warp] = (int)sum[0];
  if (!FAULT(18)) __syncthreads();
  if (FAULT(19) && tid == 0) p.out[128] = 0;
  if (tid == 0) p.out[gridDim.x * 64 + blockIdx.x] = sums[0] + sums[1];
}
"""


@pytest.fixture(scope="module")
def library() -> Library:
    return build(SOURCE, (("turn", "Params"),), ())


def run(library: Library, fault: int = 0, shift: int = 1, pdl: bool = False, x: Any = None) -> tuple[Any, Any]:
    x = torch.arange(128, dtype=torch.int32) if x is None else x
    out = torch.full((130,), -1, dtype=torch.int32)
    for late in (False, True) if pdl else (False,):
        args = (x.data_ptr(), out.data_ptr(), fault, shift)
        library.launch("turn", "PPii", (2, 1, 1), 64, 256, late, args)
    return x, out


@pytest.mark.parametrize("pdl", [False, True])
def test_a_sound_kernel(library, pdl):
    x, out = run(library, pdl=pdl)
    assert torch.equal(out[:128], x.view(4, 32).flip(1).flatten() + 1)
    assert out[128:].tolist() == [16, 16]


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (2, "turn, block 0, thread 0: writes 4 bytes at offset 256 of shared memory, of which the launch has 256, turn.cu:10"),
        (3, "writes 4 bytes at 0x[0-9a-f]+, where there is no tensor, turn.cu:10"),
        (4, "thread 0: reads shared memory at offset 124, where a copy has not landed, turn.cu:14"),
        (5, "thread 16: writes shared memory at offset 64, which thread 15 read with no barrier between, turn.cu:10"),
        (6, "thread 32: writes shared memory at offset 128, which thread 0 read with no barrier between, turn.cu:10"),
        (7, "block 1, thread 62: writes global memory that another block wrote, turn.cu:15"),
        (8, "thread 1: writes global memory, which thread 0 wrote with no barrier between, turn.cu:16"),
        (9, "a null pointer, or one that is not aligned, turn.cu:17"),
        (10, "thread 5: has come to __syncwarp, thread 0 to a matrix product"),
        (11, "thread 5: has come to its end, thread 0 to a matrix product"),
        (12, "writes 16 bytes at an address that is no multiple of that, turn.cu:20"),
        (13, "thread 31: reads shared memory at offset 0, where a copy has not landed, turn.cu:14"),
        (14, "a shift by more than the bits there are, turn.cu:22"),
        (15, "integer overflow, turn.cu:23"),
        (16, "an index past its array, turn.cu:24"),
        (17, "writes shared memory at offset 0, which thread .* with no barrier between, turn.cu:25"),
        (18, "thread 32: writes static shared memory at offset 4, which thread 0 read with no barrier between, turn.cu:28"),
        (19, "block 1, thread 0: writes global memory that another block wrote, turn.cu:30"),
    ],
)
def test_a_fault(library, fault, what):
    with pytest.raises(LaneError, match=what):
        run(library, fault, shift=40)


def test_memory_of_no_tensor(library):
    x = torch.arange(127, dtype=torch.int32)
    with pytest.raises(LaneError, match=r"block 1, thread 63: reads 4 bytes at 0x[0-9a-f]+, where there is no tensor"):
        run(library, x=x)
    out = torch.zeros(130, dtype=torch.int32)
    with pytest.raises(LaneError, match=r"reads 4 bytes at .*, where there is no tensor"):
        library.launch("turn", "PPii", (2, 1, 1), 64, 256, False, (torch.zeros(128).data_ptr(), out.data_ptr(), 0, 0))


def test_a_kernel_that_does_not_wait_for_the_one_before(library):
    with pytest.raises(LaneError, match="writes global memory that a kernel before wrote, without having waited for it"):
        run(library, fault=1, pdl=True)
    run(library, fault=1)
