// What both kernels share: single instructions, sums over lanes, the rotation of 16 rows, and how work is divided.
//
// The caller defines HEAD_DIM (64, 128, 256), NT (tiles of 4 query rows), WARPS, STAGES, PASSES, RESIDENT (blocks that are to
// share a multiprocessor), and as 0 or 1 PAGED, MASKED, OFFSETS, CLUSTER, HADAMARD, which CLUSTER needs, and STORES, which needs
// PAGED and CLUSTER, and what store.cuh asks for.
typedef unsigned u32;
typedef long long i64;

#define D HEAD_DIM
#define LOWEST (-3.402823466e38f)
#define INFINITE __int_as_float(0x7f800000)

// ---- PTX
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) {
  u32 d; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d;
}
__device__ __forceinline__ u32 lds(u32 a) { u32 d; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(d) : "r"(a)); return d; }
// The table never changes once it is filled, so the compiler may move these loads.
__device__ __forceinline__ u32 lds_table(u32 a) { u32 d; asm("ld.shared.b32 %0, [%1];" : "=r"(d) : "r"(a)); return d; }
__device__ __forceinline__ void lds2(u32* d, u32 a) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(a));
}
__device__ __forceinline__ void lds4(u32* d, u32 a) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a));
}
__device__ __forceinline__ void sts(u32 a, float x) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(x) : "memory"); }
__device__ __forceinline__ void sts2(u32 a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(a), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ u32 sub_half2(u32 x, u32 y) {
  u32 d; asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y)); return d;
}
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 half2_bits(float low, float high) {
  u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d;
}
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_tf32(float* c, const float* a, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from) : "memory");
}
// The line at x comes to the second cache, so that who reads it there does not wait for memory.
__device__ __forceinline__ void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" :: "l"(x)); }
// The lower half of `bits`.
__device__ __forceinline__ float from_half(u32 bits, int is_bf16) {
  if (is_bf16) return __uint_as_float(bits << 16);
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)bits)); return y;
}
__device__ __forceinline__ u32 half_pair(float low, float high, int is_bf16) {
  if (!is_bf16) return half2_bits(low, high);
  u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d;
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
// Worked out where it is asked for: behind a branch one that was known before would be kept in each lane's own register.
__device__ __forceinline__ u32 shared_address(const void* x) {
  u32 d; asm volatile("{.reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t;}" : "=r"(d) : "l"(x)); return d;
}
// The bits that any lane's x has. It is in a register that lanes share, so the compiler knows that all take the same branches
// behind it. Where it does not, it adds the table's address to each that is looked up; else loads do that.
__device__ __forceinline__ u32 or_of_warp(u32 x) {
  u32 d; asm volatile("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(d) : "r"(x)); return d;
}
// The thread's number, read anew rather than kept in a register.
__device__ __forceinline__ int thread_number() { int d; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(d)); return d; }
// What is made of x and y is made after this.
__device__ __forceinline__ void hold(float& x, float& y) { asm volatile("" : "+f"(x), "+f"(y) :: "memory"); }
// Between a kernel and the next one of its stream, which may start before the first has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#if CLUSTER
// Until a counter is at `least`; what was written before others counted, this one sees after it.
__device__ __forceinline__ void wait_for_count(const u32* counter, u32 least) {
  u32 d;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(d) : "l"(counter) : "memory");
  while (d < least);
}
// Among the `count` threads of a block whose barrier `number` is.
__device__ __forceinline__ void team_barrier(int number, int count) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(count) : "memory");
}
// What a block wrote before `arrive`, all of its cluster see after `wait`, in whosever shared memory it is.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Count one block more, up to `blocks`, after which it is zero again; what it was. What blocks wrote before they were counted,
// this one sees after it.
__device__ __forceinline__ u32 arrive_of(u32* counter, int blocks) {
  u32 d; asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(d) : "l"(counter), "r"(blocks - 1) : "memory"); return d;
}
// Store at `at` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void sts_of(u32 at, int rank, float x) {
  asm volatile("{.reg .u32 t; mapa.shared::cluster.u32 t, %0, %1; st.shared::cluster.f32 [t], %2;}"
               :: "r"(at), "r"(rank), "f"(x) : "memory");
}
__device__ __forceinline__ void sts2_of(u32 at, int rank, float x, float y) {
  asm volatile("{.reg .u32 t; mapa.shared::cluster.u32 t, %0, %1; st.shared::cluster.v2.f32 [t], {%2, %3};}"
               :: "r"(at), "r"(rank), "f"(x), "f"(y) : "memory");
}
#endif
// ---- end of PTX

// The end of a block that may not have waited. Who waits for this grid alone must find the one before ended, too: one block sees
// to that.
__device__ __forceinline__ void leave() {
  if (blockIdx.x == 0) wait_for_previous();
}

// The power of two at or below |x|, kept where its inverse is normal too.
__device__ __forceinline__ float power_below(float x) {
  const int e = (__float_as_int(x) >> 23) & 255;
  return __int_as_float(min(max(e, 1), 253) << 23);
}
__device__ __forceinline__ float inverse_power(float x) { return __int_as_float((254 << 23) - __float_as_int(x)); }
__device__ __forceinline__ float warp_max(float x, int from, int to = 32) {
  for (int d = from; d < to; d <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
__device__ __forceinline__ float warp_sum(float x, int from, int to = 32) {
  for (int d = from; d < to; d <<= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// A float32 matrix product on tf32 units: x y = (x_high + x_low)(y_high + y_low) without the smallest term, 21 bits each.
// The units ignore the bits that `high` drops, which a half-precision x does not have.
__device__ __forceinline__ float high(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// Lane (r, c) of a warp holds dimensions 16 * i + 4 * c + 0..3 of what a product contracts over: of rows r and r + 8 of the
// left side, of column r of the right side. Any order serves that both sides use.
#define ROW_PITCH (D + 16)            // floats from one row of the left side to the next: no bank conflicts
#define PART_PITCH (D + 4)            // a row of results: D sums, then the log2 of the row's sum of exp2
#define TURN (D == 256 ? 128 : D)     // dimensions contracted over at a time
struct Turn { float at[TURN / 4]; };

// Columns n0 .. n0 + 7 of the rotation's transpose, of the rotation itself (`back`), or of the identity, from dimension k0.
__device__ __forceinline__ void load_turn(Turn& turn, const float* rotation, int n0, int k0, bool back, bool identity) {
  const int n = n0 + (threadIdx.x >> 2) % 8, c = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < TURN / 16; i++) {
    const int k = k0 + 16 * i + 4 * c;
    if (identity) {
#pragma unroll
      for (int j = 0; j < 4; j++) turn.at[4 * i + j] = n == k + j;
    } else if (back) {
#pragma unroll
      for (int j = 0; j < 4; j++) turn.at[4 * i + j] = rotation[(k + j) * D + n];
    } else {
      const float4 x = *(const float4*)(rotation + n * D + k);
      turn.at[4 * i] = x.x, turn.at[4 * i + 1] = x.y, turn.at[4 * i + 2] = x.z, turn.at[4 * i + 3] = x.w;
    }
  }
}

// Adds 16 rows times 8 columns to the C fragment y: lane (r, c) has columns 2 * c, 2 * c + 1 of row r, then of row r + 8.
// HALF: the rows came from half precision.
template <bool HALF>
__device__ __forceinline__ void rotate_rows(float* y, const float* rows, const Turn& turn) {
  const int r = (threadIdx.x >> 2) % 8, c = threadIdx.x & 3;
  float y1[4] = {0, 0, 0, 0}, y2[4] = {0, 0, 0, 0};  // three sums side by side: a product need not wait for the last
#pragma unroll
  for (int i = 0; i < TURN / 16; i++) {
    const float4 x0 = *(const float4*)(rows + r * ROW_PITCH + 16 * i + 4 * c);
    const float4 x1 = *(const float4*)(rows + (r + 8) * ROW_PITCH + 16 * i + 4 * c);
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const float a[4] = {s ? x0.z : x0.x, s ? x1.z : x1.x, s ? x0.w : x0.y, s ? x1.w : x1.y};
      float b0 = turn.at[4 * i + 2 * s], b1 = turn.at[4 * i + 2 * s + 1];
      hold(b0, b1);  // taken apart no earlier: that would take twice the registers
      mma_tf32(y, a, b0, b1);
      mma_tf32(y1, a, b0 - high(b0), b1 - high(b1));
      if (!HALF) {
        const float low[4] = {a[0] - high(a[0]), a[1] - high(a[1]), a[2] - high(a[2]), a[3] - high(a[3])};
        mma_tf32(y2, low, b0, b1);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] += y1[i] + y2[i];
}

// A place that is not negative, times a stride: half the instructions of a product of two 64-bit numbers.
__device__ __forceinline__ i64 times(int n, i64 stride) { return (i64)(u32)n * stride; }

// Division by a number known at launch: 3 instructions in place of some 25.
struct Divisor {
  u32 magic; int shift;
  __device__ __forceinline__ int divide(int n) const { return (__umulhi(n, magic) + n) >> shift; }
};

// Work is a line of tiles of 16 keys: pass after pass (head by head, chunk of query rows by chunk), each `tiles` long. A pass
// is `pieces` pieces of `piece` tiles, the last one shorter; the line is cut into ranges of whole pieces, one a worker (a warp
// of the first kernel): `share` of them, for the first `more` workers one more. Where a range enters another pass, a segment
// ends, and with `fixed` at every piece: then what a segment holds does not depend on the other passes. The result of each
// segment has a slot of its own.
//
//   passes    |     pass 0     |     pass 1     |     pass 2     |
//   workers   |     0      |     1      |     2      |     3      |
//   slots     |     0      | 1 |   2    |   3    | 4 |    5       |     worker + pass
struct Work {
  int tiles, piece, pieces, share, more, fixed;
  Divisor by_tiles, by_piece, by_pieces, by_share, by_share_1;  // the last by share + 1

  __device__ __forceinline__ int begin(int worker) const {
    const int at = worker * share + min(worker, more), pass = by_pieces.divide(at);
    return pass * tiles + (at - pass * pieces) * piece;
  }
  __device__ __forceinline__ int worker_of(int at) const {
    const int rest = at - more * (share + 1);
    return rest < 0 ? by_share_1.divide(at) : more + by_share.divide(rest);
  }
  __device__ __forceinline__ int pass_of(int tile) const { return by_tiles.divide(tile); }
  __device__ __forceinline__ int piece_end(int tile) const { return (by_piece.divide(tile) + 1) * piece; }
  __device__ __forceinline__ int slot(int worker, int pass, int tile) const {
    return fixed ? pass * pieces + by_piece.divide(tile) : worker + pass;
  }
  __device__ __forceinline__ int first_slot(int pass) const { return fixed ? pass * pieces : worker_of(pass * pieces) + pass; }
  __device__ __forceinline__ int last_slot(int pass) const {
    return fixed ? (pass + 1) * pieces - 1 : worker_of((pass + 1) * pieces - 1) + pass;
  }
};

// Rows of one key/value head are numbered position * group + head; each chunk of 4 * NT of them is a pass over the keys.
struct Heads {
  int kv_heads, group, rows, chunks;
  Divisor by_kv_heads, by_group, by_chunks;

  __device__ __forceinline__ int head_of(int pass) const { return by_chunks.divide(pass); }
  __device__ __forceinline__ int first_row(int pass) const { return (pass - head_of(pass) * chunks) * (4 * NT); }
  __device__ __forceinline__ int position(int row) const { return by_group.divide(row); }
  __device__ __forceinline__ int member(int row) const { return row - position(row) * group; }
  __device__ __forceinline__ int batch(int head) const { return by_kv_heads.divide(head); }
};

#if PAGED
// Work over sequences of different lengths: sequence s has ceil(length / 16) tiles for each of its heads, `ends[s]` being
// where its last one ends. A sequence with more query rows than a pass takes has none: another kernel serves it.
struct Line {
  const int* ends; const int* lens; const int* shifts;  // of each sequence; shift = length - query tokens
  int sequences, share, more;

  __device__ __forceinline__ int begin(int worker) const { return worker * share + min(worker, more); }
  __device__ __forceinline__ int worker_of(int at) const {
    const int rest = at - more * (share + 1);
    return rest < 0 ? at / (share + 1) : more + rest / share;
  }
  __device__ __forceinline__ int sequence_of(int tile) const {
    int low = 0, high = sequences - 1;
    while (low < high) {
      const int middle = (low + high) >> 1;
      if (ends[middle] > tile) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  __device__ __forceinline__ int start_of(int sequence) const { return sequence ? ends[sequence - 1] : 0; }
  __device__ __forceinline__ int slot(int worker, int pass, int) const { return worker + pass; }
};

// Which lengths clusters serve, and not the line: `Even` in variants.py.
#define ALWAYS (1 << 30)  // as `slack`
struct Even {
  int warps, waves, line_warps, slack;
  __device__ __forceinline__ bool serves(int longest, int all) const {
    const int share = all / line_warps;
    return (longest + warps - 1) / warps * waves <= share - share / 16 + slack;
  }
};

// The first query token of a sequence, never beyond what there is.
__device__ __forceinline__ int first_token_of(const int* starts, int sequence, int tokens) {
  return min(max(starts[sequence], 0), tokens);
}
#endif

// One head of one sequence (or a chunk of its query rows): its number; where on the line its tile 0 is or, if windows hide
// the first tiles, would be; the end of its tiles.
struct Pass { int index, start, tiles, kv_len, shift; };
