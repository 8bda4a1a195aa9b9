// Second kernel: joins the segments of every query row, rotates back and stores in the queries' dtype.
//
// A block takes `rows_at_once` (a power of two, at most SUMS) rows together: as threads of (column of 4 dimensions, row,
// share of the segments) it sums, then each of its warps turns all rows into 8 columns of the result.
#define COMBINE_THREADS (D == 64 ? 256 : 512)
#define COLUMNS (D / 4)
#define SUMS (COMBINE_THREADS / COLUMNS)

struct CombineParams {
  const float* parts; const float* rotation; void* out; float* lse;
#if PAGED
  const int* plan; const int* starts; const int* seq_lens;
  i64 out_token, out_head;
  int sequences, tokens, workers, max_len;
  Even even;
#else
  Work work;
#endif
  Heads heads;
  Divisor by_rows;  // query rows of a key/value head
  int all, q_len, rows_at_once, is_bf16, rotated_output;
#if MASKED
  const float* sinks;  // of the query heads of a sequence, or null
#if PAGED
  const int* windows;  // as the kernel's before
  int window;
#endif
#endif
};

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, 1) tq4_combine(const __grid_constant__ CombineParams p) {
  __shared__ float4 sums[SUMS][COLUMNS];
  __shared__ float2 states[SUMS];  // largest log-sum-exp and sum of each share
  __shared__ __align__(16) float merged[16 * ROW_PITCH];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, column = tid % COLUMNS, part = tid / COLUMNS;
  const int at_once = p.rows_at_once, mine = part % at_once, shares = SUMS / at_once;
#if PAGED
  let_next_start();
  if (is_even(p)) return leave();  // clusters will serve
#endif
  // The rotation does not depend on the first kernel.
#if HADAMARD
  float signs[OF_LANE];
  load_part(signs, p.rotation);
#else
  Turn turn;
  if (D < 256) load_turn(turn, p.rotation, warp * 8, 0, true, p.rotated_output);
  for (int i = tid; i < 16 * ROW_PITCH; i += COMBINE_THREADS) merged[i] = 0;
#endif
  wait_for_previous();
  const int first = blockIdx.x * at_once, count = min(at_once, p.all - first);
#if PAGED
  const int* ends = p.plan;
  const Line work = {ends, ends + p.sequences, ends + 2 * p.sequences, p.sequences, ends[p.sequences - 1] / p.workers,
                     ends[p.sequences - 1] % p.workers};
#endif
  // Row `first` + i of all: whether there is such a query, its head, its place in the output and in the log-sum-exps.
  struct Query { bool there; int head; i64 out, lse; };
  auto query = [&](int i) {
    const int head = p.by_rows.divide(first + i), row = first + i - head * p.heads.rows;
#if PAGED
    const int s = p.heads.batch(head), begin = first_token_of(p.starts, s, p.tokens), position = p.heads.position(row);
    const int tokens = first_token_of(p.starts, s + 1, p.tokens) - begin;
    const int h = (head - s * p.heads.kv_heads) * p.heads.group + p.heads.member(row);
    return Query{position < tokens && tokens * p.heads.group <= 4 * NT, h, (begin + position) * p.out_token + h * p.out_head,
                 (i64)(begin + position) * p.q_len + h};  // q_len holds the number of heads
#else
    const i64 at = ((i64)head * p.heads.group + p.heads.member(row)) * p.q_len + p.heads.position(row);
    const int h = (head - p.heads.batch(head) * p.heads.kv_heads) * p.heads.group + p.heads.member(row);
    return Query{true, h, at * D, at};
#endif
  };
  float4 sum = make_float4(0, 0, 0, 0);
  float top = LOWEST, total = 0;
  if (mine < count) {
    const int head = p.by_rows.divide(first + mine), row = first + mine - head * p.heads.rows;
    const int pass = head * p.heads.chunks + row / (4 * NT);
#if PAGED
    const int s = p.heads.batch(head), start = work.start_of(s), each = (work.ends[s] - start) / p.heads.kv_heads;
    const int begin = start + (head - s * p.heads.kv_heads) * each;
    const int from = each ? work.worker_of(begin) + pass : 0, to = each ? work.worker_of(begin + each - 1) + pass : -1;
#else
    const int from = p.work.first_slot(pass), to = p.work.last_slot(pass);
#endif
#pragma unroll 1
    for (int slot = from + part / at_once; slot <= to; slot += shares * 4) {
      float4 x[4];
      float lse[4], next = top;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* at = p.parts + ((i64)min(slot + i * shares, to) * (4 * NT) + row % (4 * NT)) * PART_PITCH;
        lse[i] = slot + i * shares <= to ? at[D] : -INFINITE;
        x[i] = ((const float4*)at)[column];
      }
#pragma unroll
      for (int i = 0; i < 4; i++) next = fmaxf(next, lse[i]);
      const float keep = ex2(top - next);
      top = next, total *= keep, sum.x *= keep, sum.y *= keep, sum.z *= keep, sum.w *= keep;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float weight = ex2(lse[i] - top);
        if (lse[i] == -INFINITE) continue;  // saw no key, or is not there
        total += weight;
        sum.x += weight * x[i].x, sum.y += weight * x[i].y, sum.z += weight * x[i].z, sum.w += weight * x[i].w;
      }
    }
  }
  sums[part][column] = sum;
  if (column == 0) states[part] = make_float2(top, total);
  __syncthreads();
  for (int i = tid; i < count * D; i += COMBINE_THREADS) {
    float top = LOWEST, total = 0, x = 0;
#pragma unroll 2
    for (int k = i / D; k < SUMS; k += at_once) top = fmaxf(top, states[k].x);
#pragma unroll 2
    for (int k = i / D; k < SUMS; k += at_once) {
      const float weight = ex2(states[k].x - top);
      total += weight * states[k].y;
      x += weight * ((const float*)sums[k])[i % D];
    }
    const Query at = query(i / D);
#if MASKED
    if (p.sinks) {  // one more key, without a value
      const float sink = p.sinks[at.head] * 1.4426950408889634f, higher = fmaxf(top, sink), keep = ex2(top - higher);
      top = higher, x *= keep, total = total * keep + ex2(sink - higher);
    }
#endif
    merged[i / D * ROW_PITCH + i % D] = total == 0 ? 0 : x / total;
    if (i % D || !at.there) continue;
    p.lse[at.lse] = total == 0 ? -INFINITE : (top + lg2(total)) * 0.6931471805599453f;
  }
  __syncthreads();
#if HADAMARD
  for (int i = warp; i < count; i += COMBINE_THREADS / 32) {
    const Query at = query(i);
    float x[OF_LANE];
    load_part(x, merged + i * ROW_PITCH);
    hadamard(x);
#pragma unroll
    for (int j = 0; j < OF_LANE; j += 2) {
      const u32 pair = half_pair(x[j] * signs[j], x[j + 1] * signs[j + 1], p.is_bf16);
      if (at.there) ((u32*)p.out)[(at.out + lane * OF_LANE + j) / 2] = pair;
    }
  }
#else
  for (int n0 = warp * 8; n0 < D; n0 += COMBINE_THREADS / 4) {
    float y[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int k0 = 0; k0 < D; k0 += TURN) {
      if (D == 256) load_turn(turn, p.rotation, n0, k0, true, p.rotated_output);
      rotate_rows<false>(y, merged + k0, turn);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if ((lane >> 2) + 8 * i >= count) continue;
      const Query at = query((lane >> 2) + 8 * i);
      if (at.there) ((u32*)p.out)[(at.out + n0) / 2 + (lane & 3)] = half_pair(y[2 * i], y[2 * i + 1], p.is_bf16);
    }
  }
#endif
}
