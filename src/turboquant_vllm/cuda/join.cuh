// A block's warps end with a part each in shared memory: rows of results, and the pass that they are of, -1 for none. Those of
// one pass are side by side and leave the block as one part, in the order of the warps.
__device__ __forceinline__ int& pass_of_part(char* smem, int warp) { return ((int*)smem)[warp * PART + D + 1]; }

__device__ __forceinline__ void join_warps(const DecodeParams& p, char* smem) {
  __syncthreads();
#pragma unroll 1
  for (int from = 0, to; from < p.active; from = to) {
    const int pass = pass_of_part(smem, from);
    for (to = from + 1; to < p.active && pass_of_part(smem, to) == pass;) to++;
    if (pass < 0) continue;
    const int count = min(4 * NT, p.heads.rows - p.heads.first_row(pass));
    float* part = p.parts + (i64)(p.heads.passes + pass + blockIdx.x) * PART;
#pragma unroll 1
    for (int i = thread_number(); i < count * D; i += THREADS) {
      const int row = i / D * PART_PITCH, dim = i % D;
      const float* mine = (const float*)smem + row;
      float top = LOWEST, total = 0, x = 0;
      for (int w = from; w < to; w++) top = fmaxf(top, mine[w * PART + D]);
      for (int w = from; w < to; w++) {
        const float lse = mine[w * PART + D], weight = ex2(lse - top);
        if (lse == -INFINITE) continue;  // saw no key
        total += weight, x += weight * mine[w * PART + dim];
      }
      part[row + dim] = total == 0 ? 0 : x / total;
      if (dim == 0) part[row + D] = total == 0 ? -INFINITE : top + lg2(total);
    }
  }
}
