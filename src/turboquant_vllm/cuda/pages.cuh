// Over pages: the line of work, and the rotation of all queries before it.
#if PAGED && !CLUSTER
// The line of all sequences, worked out by every block in `room`; the first block leaves its copy for the second kernel.
__device__ __forceinline__ Line plan_line(const DecodeParams& p, int* room) {
  const int tid = threadIdx.x, lane = tid & 31, count = p.sequences;
  int *ends = room, *lens = room + count, *shifts = room + 2 * count;
  for (int s = tid; s < count; s += THREADS) {
    const int len = min(max(p.seq_lens[s], 0), p.max_len);
    const int tokens = first_token_of(p.starts, s + 1, p.tokens) - first_token_of(p.starts, s, p.tokens);
    lens[s] = len, shifts[s] = len - tokens;
    const int tiles = (len + 15) / 16 - first_tile(p, s, len - tokens, len);
    ends[s] = tokens > 0 && tokens * p.heads.group <= 4 * NT ? tiles * p.heads.kv_heads : 0;
  }
  __syncthreads();
  for (int from = 0, before = 0; from < count && tid < 32; from += 32) {
    int x = from + lane < count ? ends[from + lane] : 0;
    for (int d = 1; d < 32; d <<= 1) {
      const int y = __shfl_up_sync(~0u, x, d);
      if (lane >= d) x += y;
    }
    if (from + lane < count) ends[from + lane] = before + x;
    before += __shfl_sync(~0u, x, 31);
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int s = tid; s < 3 * count; s += THREADS) p.plan[s] = room[s];
  const int all = ends[count - 1], workers = gridDim.x * p.active;
  return Line{ends, lens, shifts, count, all / workers, all % workers};
}

// Before the first kernel: the rotated queries of all sequences, as fragments in global memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) tq4_rotate(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int each = PASSES_A_BLOCK, first = blockIdx.x * each;
  const int all = min(each, p.sequences * p.heads.kv_heads - first) * (4 * NT);
  Rows rows;
  ask_for_query(rows, p, first, all);
  wait_for_previous();  // the store of the step's own keys and values, which the next kernel must find done
  let_next_start();
  const float level_scale = power_below(warp_max(fabsf(p.centroids[threadIdx.x & 15]), 1));
  rotate_query(p, smem, rows, first, all, level_scale * p.scale_log2, p.fragments, p.row_scales);
}
#endif
