// Attention of few query rows over a packed cache: a kernel over parts of the keys, and one that joins the parts.
//
// The caller defines HEAD_DIM (64, 128, 256), NT (tiles of 4 query rows), WARPS and STAGES. Rows of one key/value head
// are numbered position * group + head; with more than 4 * NT of them, each chunk of 4 * NT is a pass of its own.
//
//   shared memory of a block        table   256 entries of half2 (level of the high nibble, of the low nibble), each
//                                           32 times side by side: entry b, copy of lane l at b * 256 + l * 4
//                                   ring    per warp, STAGES tiles of 16 tokens: K codes, V codes, norms
//                                   merge   4 rows of every warp's sums; also scratch of the rotation
//                                   query   fragments of the rotated rows in fp16, then one float scale per row
//                                   state   running maximum and sum of every warp and row
typedef unsigned u32;
typedef long long i64;

#define D HEAD_DIM
#define THREADS (WARPS * 32)
#define NQ ((NT + 1) / 2)      // column tiles of Q K^T, 8 rows each
#define KSTEPS (D / 16)        // steps of 16 dimensions in Q K^T
#define MTILES (D / 32)        // tiles of 16 bytes in P V
#define KWORDS (D / 32)        // words of a token that a lane looks up for K
#define VWORDS (D / 64)        // and for V
#define PIECES (D / 32)        // 16-byte pieces of a token's codes
#define COPIES (D / 64)        // pieces that a lane copies of each of K and V
#define COPY_ROWS (32 / PIECES)
#define V_PART (8 * D)         // where V codes begin in a tile
#define NORM_PART (16 * D)
#define TILE_BYTES (16 * D + 128)
// Gangs of warps that may share a block, each with a unit of its own.
#define MAX_GANGS (NT <= 2 && WARPS >= 8 ? WARPS / 4 : 1)
#define RING 65536
#define MERGE (RING + WARPS * STAGES * TILE_BYTES)
#define QUERY (MERGE + WARPS * 16 * D)
#define ROW_SCALE (QUERY + MAX_GANGS * NQ * 16 * D)
#define STATE (ROW_SCALE + MAX_GANGS * NQ * 32)
#define LOWEST (-3.402823466e38f)
#define INFINITE __int_as_float(0x7f800000)

struct DecodeParams {
  const void* q; const unsigned char* k; const float* k_norms; const unsigned char* v; const float* v_norms;
  const float* centroids; const float* rotation; float* parts; float* parts_lse;
  i64 q_b, q_h, q_n, q_d, k_b, k_h, k_n, kn_b, kn_h, kn_n, v_b, v_h, v_n, vn_b, vn_h, vn_n;
  i64 k_tile, v_tile, kn_tile, vn_tile;  // bytes from one of a warp's tiles to its next
  int units, splits, split_len, kv_len, kv_heads, group, rows, chunks, shift, is_causal, is_bf16, gang_warps;
  float scale_log2;
};

struct CombineParams {
  const float* parts; const float* parts_lse; const float* rotation; void* out; float* lse;
  int heads, splits, group, rows, q_len, rows_at_once, is_bf16;
};

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
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 half2_bits(float low, float high) {
  u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d;
}
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" :: "l"(x)); }
__device__ __forceinline__ float load_half(const void* x, i64 i, int is_bf16) {
  const unsigned short bits = ((const unsigned short*)x)[i];
  if (is_bf16) return __uint_as_float((u32)bits << 16);
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits)); return y;
}
__device__ __forceinline__ void store_half(void* x, i64 i, float y, int is_bf16) {
  unsigned short bits;
  if (is_bf16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(y));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(y));
  ((unsigned short*)x)[i] = bits;
}
// The power of two at or below |x|, kept where its inverse is normal too.
__device__ __forceinline__ float power_below(float x) {
  const int e = (__float_as_int(x) >> 23) & 255;
  return __int_as_float(min(max(e, 1), 253) << 23);
}
__device__ __forceinline__ float inverse_power(float x) { return __int_as_float((254 << 23) - __float_as_int(x)); }
__device__ __forceinline__ float warp_max(float x, int from) {
  for (int d = from; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
__device__ __forceinline__ float warp_sum(float x, int from) {
  for (int d = from; d < 32; d <<= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
// Which 16-byte piece of a token holds its piece p: spreads the reads below over all banks.
__device__ __forceinline__ int k_piece(int p, int token) { return D == 256 ? p ^ ((token & 1) << 2) : p; }
__device__ __forceinline__ int v_piece(int p, int token) {
  return D == 256 ? p ^ ((token & 3) << 1) : D == 128 ? p ^ (token & 2) : p;
}
// Where float4 i of row c lies in the merge area, for the same reason.
__device__ __forceinline__ int merge_slot(int i, int c) {
  return D == 256 ? i ^ (c | ((i >> 1) & 4)) : D == 128 ? i ^ c : i ^ ((c & 1) | ((c & 2) << 1));
}

// Rotate the queries of units `unit`, `unit` + 1, ... of all gangs, scale each row into fp16 and leave them as B fragments
// of Q K^T, 8 * NQ rows a gang of which those past the last are zero.
//
//   B fragment of column tile n, step s: lane 4 * column + c holds one uint2 = dimensions of bytes b and b + 1,
//   b = 64 * (s / 8) + c * min(16, D / 8) + 2 * (s % 8)        (any order serves that K uses too)
//   column 2 * i + h is row 8 * n + 4 * h + i, so that accumulators 2 * h hold row i = lane % 4 of row tile 2 * n + h
__device__ __forceinline__ void rotate_query(const DecodeParams& p, char* smem, int unit, int last_unit, float level_scale) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, all = WARPS / p.gang_warps * 8 * NQ;
  const int first = unit / p.splits % p.chunks * 4 * NT, rows = min(p.rows - first, 4 * NT);
  float* raw = (float*)(smem + MERGE);
  float* rotated = raw + 2 * WARPS * D;
  __syncthreads();
  for (int done = 0; done < all; done += 2 * WARPS) {
    const int count = min(all - done, 2 * WARPS);
    for (int i = tid; i < count * D; i += THREADS) {
      const int slot = done + i / D, row = first + slot % (8 * NQ);
      const int head = min(unit + slot / (8 * NQ), last_unit - 1) / p.splits / p.chunks;
      const i64 at = (i64)(head / p.kv_heads) * p.q_b + (i64)(head % p.kv_heads) * p.group * p.q_h;
      if (slot % (8 * NQ) >= rows) continue;
      raw[i] = load_half(p.q, at + (row % p.group) * p.q_h + (row / p.group) * p.q_n + (i % D) * p.q_d, p.is_bf16);
    }
    __syncthreads();
    // Eight lanes share a row of the rotation; four such rows a warp.
#pragma unroll 1
    for (int i = warp * 4 + (lane >> 3); i < D; i += WARPS * 4) {
      float4 turn[D / 32];
#pragma unroll
      for (int j = 0; j < D / 32; j++) turn[j] = ((const float4*)(p.rotation + (i64)i * D))[j * 8 + (lane & 7)];
#pragma unroll 2
      for (int row = 0; row < count; row++) {
        if ((done + row) % (8 * NQ) >= rows) continue;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
          const float4 x = ((const float4*)(raw + row * D))[j * 8 + (lane & 7)];
          sum += x.x * turn[j].x + x.y * turn[j].y + x.z * turn[j].z + x.w * turn[j].w;
        }
        for (int d = 1; d < 8; d <<= 1) sum += __shfl_xor_sync(~0u, sum, d);
        if ((lane & 7) == 0) rotated[row * D + i] = sum * p.scale_log2;
      }
    }
    __syncthreads();
    for (int row = warp; row < count; row += WARPS) {
      const int slot = done + row, column = 2 * (slot & 3) + ((slot >> 2) & 1);
      const bool there = slot % (8 * NQ) < rows;
      float largest = 0;
      for (int i = lane; i < D && there; i += 32) largest = fmaxf(largest, fabsf(rotated[row * D + i]));
      const float scale = power_below(warp_max(largest, 1)), inverse = inverse_power(scale);
      for (int i = lane; i < D / 4; i += 32) {
        float4 x = make_float4(0, 0, 0, 0);
        if (there) x = ((const float4*)rotated)[row * (D / 4) + i];
        const int byte = 2 * i, c = D == 64 ? byte >> 3 : (byte >> 4) & 3;
        const int step = D == 64 ? (byte & 7) >> 1 : 8 * (byte >> 6) + ((byte & 15) >> 1);
        ((uint2*)(smem + QUERY))[((slot >> 3) * KSTEPS + step) * 32 + 4 * column + c] =
            make_uint2(half2_bits(x.x * inverse, x.y * inverse), half2_bits(x.z * inverse, x.w * inverse));
      }
      if (lane == 0) ((float*)(smem + ROW_SCALE))[slot] = scale * level_scale;
    }
    __syncthreads();
  }
}

// One block of WARPS warps per multiprocessor goes through a range of units, a unit being (key/value head, chunk of rows,
// split of the keys). Gangs of warps take units in turn; with g warps in a gang, its warp w takes tiles w, w + g, ... of the
// unit and copies them ahead into a ring of its own; the copies run on into the next units. Writes each split's normalised
// rows and the log2 of its sum of exp2.
extern "C" __global__ void __launch_bounds__(THREADS, 1) tq4_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int tid = threadIdx.x, lane = tid & 31, r = lane >> 2, c = lane & 3;
  const int gang_warps = p.gang_warps, gangs = WARPS / gang_warps, gang = (tid >> 5) / gang_warps, w = (tid >> 5) % gang_warps;
  // What follows waits for these: bring them nearer at once.
  for (int i = tid; i < D * D / 32; i += THREADS) prefetch(p.rotation + 32 * i);
  const float level = p.centroids[lane & 15];
  u32 base;
  asm("{.reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t;}" : "=r"(base) : "l"(smem));
  const u32 ring = base + RING + (tid >> 5) * (STAGES * TILE_BYTES), query = base + QUERY + gang * (NQ * 16 * D) + lane * 8;
  const int first_unit = (int)((i64)p.units * blockIdx.x / gridDim.x);
  const int last_unit = (int)((i64)p.units * (blockIdx.x + 1) / gridDim.x);

  // Producer: the next tile to copy, the unit's tokens from there on, and where this lane's pieces lie.
  int next_unit = first_unit + gang, left = 0;
  const char *k_at = 0, *v_at = 0, *norm_at = 0;
  const int copy_row = lane / PIECES, piece = lane % PIECES;
  auto norm_step = [&]() { return 4 * (lane < 16 ? p.kn_n : p.vn_n); };
  const u32 k_to = copy_row * (D / 2) + k_piece(piece, copy_row) * 16;
  const u32 v_to = V_PART + copy_row * (D / 2) + v_piece(piece, copy_row) * 16;
  auto open_unit = [&]() {
    for (; next_unit < last_unit; next_unit += gangs) {
      const int split = next_unit % p.splits, head = next_unit / p.splits / p.chunks;
      const i64 b = head / p.kv_heads, h = head % p.kv_heads, start = (i64)split * p.split_len;
      left = min(p.split_len, p.kv_len - (int)start) - w * 16;
      if (left <= 0) continue;
      const i64 token = start + w * 16;
      k_at = (const char*)p.k + b * p.k_b + h * p.k_h + (token + copy_row) * p.k_n + piece * 16;
      v_at = (const char*)p.v + b * p.v_b + h * p.v_h + (token + copy_row) * p.v_n + piece * 16;
      norm_at = (const char*)(lane < 16 ? p.k_norms + b * p.kn_b + h * p.kn_h : p.v_norms + b * p.vn_b + h * p.vn_h) +
                (token + (lane & 15)) * norm_step();
      return;
    }
  };
  auto copy_next = [&](int stage) {
    if (next_unit < last_unit) {
      const u32 to = ring + stage * TILE_BYTES;
      if (left >= 16) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
          copy16(to + k_to + i * 512, k_at + i * COPY_ROWS * p.k_n);
          copy16(to + v_to + i * 512, v_at + i * COPY_ROWS * p.v_n);
        }
        copy4(to + NORM_PART + lane * 4, norm_at);
      } else {  // rows past the end repeat the last one
        for (int i = 0; i < COPIES; i++) {
          const int row = copy_row + i * COPY_ROWS, back = min(row, left - 1) - copy_row;
          copy16(to + k_to + i * 512, k_at + back * p.k_n);
          copy16(to + v_to + i * 512, v_at + back * p.v_n);
        }
        copy4(to + NORM_PART + lane * 4, norm_at + (min(lane & 15, left - 1) - (lane & 15)) * norm_step());
      }
      left -= 16 * gang_warps;
      if (left > 0) {
        k_at += p.k_tile;
        v_at += p.v_tile;
        norm_at += lane < 16 ? p.kn_tile : p.vn_tile;
      } else {
        next_unit += gangs;
        open_unit();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  open_unit();
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) copy_next(i);

  // Levels in fp16, over a power of two that the row scales and the result give back.
  const float level_scale = power_below(warp_max(fabsf(level), 1));
  for (int b = tid >> 5; b < 256; b += WARPS) {
    const float high = __shfl_sync(~0u, level, b >> 4), low = __shfl_sync(~0u, level, b & 15);
    const float inverse = inverse_power(level_scale);
    *(u32*)(smem + b * 256 + lane * 4) = half2_bits(high * inverse, low * inverse);
  }
  const u32 lane4 = lane * 4;
  auto levels = [&](u32 word, int byte) { return lds_table(prmt(word, lane4, 0x5504u | (byte << 4)) + base); };

  // P V contracts over (token, nibble), 8 tokens a step. B fragment, column 2 * row + nibble:
  //   b0 of lane (r, c) = weights (token c, high), (token c, low) of row r / 2, zero where nibble != r % 2; b1: token c + 4
  const u32 select_low = (r & 1) ? 0x1044u : 0x4410u, select_high = (r & 1) ? 0x3244u : 0x4432u;
  const int source = c * 4 + (r >> 1);

  u32 qf[Q_IN_REGISTERS ? NQ : 1][KSTEPS][2];
  float row_scales[NT];
  auto row_scale = [&](int t) {
    return Q_IN_REGISTERS ? row_scales[t] : __uint_as_float(lds(base + ROW_SCALE + (gang * 8 * NQ + t * 4 + c) * 4));
  };
  float2* state = (float2*)(smem + STATE);
  float* sums = (float*)(smem + MERGE);
  int stage = 0;
  auto gang_sync = [&]() { asm volatile("bar.sync %0, %1;" :: "r"(gang + 1), "r"(gang_warps * 32) : "memory"); };
  for (int round = first_unit; round < last_unit; round += gangs) {
    const int unit = round + gang, split = unit % p.splits, pass = unit / p.splits, head = pass / p.chunks;
    const int first_row = pass % p.chunks * 4 * NT;
    if (gangs > 1 || split == 0 || round == first_unit) {
      rotate_query(p, smem, round, last_unit, level_scale);
#pragma unroll
      for (int t = 0; t < NT; t++) row_scales[t] = ((float*)(smem + ROW_SCALE))[gang * 8 * NQ + t * 4 + c];
      if (Q_IN_REGISTERS) {
#pragma unroll
        for (int i = 0; i < NQ * KSTEPS; i++) lds2(qf[i / KSTEPS][i % KSTEPS], query + i * 256);
      }
    }
    if (unit >= last_unit) break;
    const int start = split * p.split_len, stop = min(start + p.split_len, p.kv_len);
    // The last key that lane's row of tile t sees; before `open_end` every row sees every key.
    auto last_key = [&](int t) { return p.is_causal ? min(p.shift + (first_row + t * 4 + c) / p.group, stop - 1) : stop - 1; };
    const int open_end = p.is_causal ? min(p.shift + 1, stop) : stop;

    // Sums of P V, C fragment of tile j: lane (r, c) holds dimensions r * D / 8 + 4 * j + 0..3 of row c
    float o[NT][MTILES][4], m[NT], l[NT], v_ref = 0, v_inverse = 0, v_limit = 0;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      m[t] = LOWEST, l[t] = 0;
#pragma unroll
      for (int j = 0; j < MTILES; j++) o[t][j][0] = o[t][j][1] = o[t][j][2] = o[t][j][3] = 0;
    }
    for (int n0 = start + w * 16; n0 < stop; n0 += gang_warps * 16) {
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
      __syncwarp();
      copy_next(stage == 0 ? STAGES - 1 : stage - 1);
      const u32 tile = ring + stage * TILE_BYTES;
      stage = stage + 1 == STAGES ? 0 : stage + 1;

      // Q K^T, A fragment of step s: tokens r and r + 8, bytes as in rotate_query; a byte is a pair of dimensions
      u32 ka[KWORDS], kb[KWORDS];
      if (D == 64) {
        lds2(ka, tile + lane * 8), lds2(kb, tile + 256 + lane * 8);
      } else {
#pragma unroll
        for (int i = 0; i < KWORDS / 4; i++) {
          const u32 at = tile + r * (D / 2) + k_piece(i * 4 + c, r) * 16;
          lds4(ka + 4 * i, at), lds4(kb + 4 * i, at + 4 * D);
        }
      }
      float s[NQ][4], s2[4] = {0, 0, 0, 0};
#pragma unroll
      for (int n = 0; n < NQ; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
      for (int i = 0; i < KSTEPS; i++) {
        const u32 xa = ka[i >> 1], xb = kb[i >> 1], at = (i & 1) * 2;
        const u32 a0 = levels(xa, at), a1 = levels(xb, at), a2 = levels(xa, at + 1), a3 = levels(xb, at + 1);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
          u32 q[2];
          if (Q_IN_REGISTERS) q[0] = qf[n][i][0], q[1] = qf[n][i][1];
          else lds2(q, query + (n * KSTEPS + i) * 256);
          mma(NQ == 1 && (i & 1) ? s2 : s[n], a0, a1, a2, a3, q[0], q[1]);
        }
      }
      const u32 norms = tile + NORM_PART + r * 4;
      const float kn0 = __uint_as_float(lds(norms)), kn1 = __uint_as_float(lds(norms + 32));
      const float vn0 = __uint_as_float(lds(norms + 64)), vn1 = __uint_as_float(lds(norms + 96));
      if (NQ == 1) s[0][0] += s2[0], s[0][1] += s2[1], s[0][2] += s2[2], s[0][3] += s2[3];

      // x0, x1: scores of tokens r and r + 8, row c of tile t, in log2
      const bool edge = n0 + 16 > open_end;
      float x0[NT], x1[NT];
      bool raise = fmaxf(fabsf(vn0), fabsf(vn1)) > v_limit;
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const float scale = row_scale(t);
        x0[t] = s[t / 2][t & 1] * (kn0 * scale);
        x1[t] = s[t / 2][2 + (t & 1)] * (kn1 * scale);
      }
      if (edge) {
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const int last = last_key(t);
          if (n0 + r > last) x0[t] = -INFINITE;
          if (n0 + r + 8 > last) x1[t] = -INFINITE;
        }
      }
#pragma unroll
      for (int t = 0; t < NT; t++) raise |= fmaxf(x0[t], x1[t]) > m[t] + 4;
      if (__any_sync(~0u, raise)) {  // rare: both references follow, and what was summed is rescaled
        float largest = fmaxf(fabsf(vn0) < INFINITE ? fabsf(vn0) : 0, fabsf(vn1) < INFINITE ? fabsf(vn1) : 0);
        largest = warp_max(largest, 4);
        float keep_v = 1;
        if (largest > v_limit) {
          const float ref = power_below(largest);
          v_inverse = inverse_power(ref);
          keep_v = v_ref * v_inverse;
          v_ref = ref, v_limit = 16 * ref;
        }
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const float top = fmaxf(m[t], warp_max(fmaxf(x0[t], x1[t]), 4));
          const float keep = ex2(m[t] - top);
          m[t] = top, l[t] *= keep;
#pragma unroll
          for (int j = 0; j < MTILES * 4; j++) o[t][j / 4][j % 4] *= keep * keep_v;
        }
      }
      const float g0 = vn0 * v_inverse, g1 = vn1 * v_inverse;
      u32 weights[NT], b[NT][2][2];
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const float p0 = ex2(x0[t] - m[t]), p1 = ex2(x1[t] - m[t]);
        l[t] += p0 + p1;
        weights[t] = half2_bits(p0 * g0, p1 * g1);
      }
      if (edge) {  // a hidden norm may be NaN
#pragma unroll
        for (int t = 0; t < NT; t++) {
          const int last = last_key(t);
          if (n0 + r > last) weights[t] &= 0xffff0000u;
          if (n0 + r + 8 > last) weights[t] &= 0xffffu;
        }
      }
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const u32 y0 = __shfl_sync(~0u, weights[t], source), y1 = __shfl_sync(~0u, weights[t], source + 16);
        b[t][0][0] = prmt(y0, 0, select_low), b[t][0][1] = prmt(y1, 0, select_low);
        b[t][1][0] = prmt(y0, 0, select_high), b[t][1][1] = prmt(y1, 0, select_high);
      }

      // P V, A fragment of tile j: bytes r * D / 16 + 2 * j and the next one; tokens c and c + 4
#pragma unroll
      for (int u = 0; u < 2; u++) {
        u32 va[VWORDS], vb[VWORDS];
        const u32 at = tile + V_PART + (8 * u + c) * (D / 2) +
                       (D == 64 ? r * 4 : D == 128 ? (r * 8) ^ ((c & 2) << 4) : v_piece(r, c) * 16);
        if (D == 64) va[0] = lds(at), vb[0] = lds(at + 2 * D);
        else if (D == 128) lds2(va, at), lds2(vb, at + 2 * D);
        else lds4(va, at), lds4(vb, at + 2 * D);
#pragma unroll
        for (int j = 0; j < MTILES; j++) {
          const u32 xa = va[j >> 1], xb = vb[j >> 1], byte = (j & 1) * 2;
          const u32 a0 = levels(xa, byte), a1 = levels(xa, byte + 1), a2 = levels(xb, byte), a3 = levels(xb, byte + 1);
#pragma unroll
          for (int t = 0; t < NT; t++) mma(o[t][j], a0, a1, a2, a3, b[t][u][0], b[t][u][1]);
        }
      }
    }

#if __CUDA_ARCH__ >= 900
    if (round + gangs >= last_unit) asm volatile("griddepcontrol.launch_dependents;");
#endif
    // Join the gang: every warp learns the common maximum and sum, scales its own sums, and all are added up.
    // The thread's number is read anew, so that no address of this rare part takes a register in the loop above.
    int tid;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
    const int r = (tid & 31) >> 2, c = tid & 3, gang_first = (tid >> 5) / gang_warps * gang_warps;
    const bool leads = (tid >> 5) == gang_first;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      l[t] = warp_sum(l[t], 4);
      if (r == 0) state[(tid >> 5) * (4 * NT) + t * 4 + c] = make_float2(m[t], l[t]);
    }
    gang_sync();
#pragma unroll
    for (int t = 0; t < NT; t++) {
      float top = LOWEST, total = 0;
      for (int i = r; i < gang_warps; i += 8) top = fmaxf(top, state[(gang_first + i) * (4 * NT) + t * 4 + c].x);
      top = warp_max(top, 4);
      for (int i = r; i < gang_warps; i += 8) {
        const float2 other = state[(gang_first + i) * (4 * NT) + t * 4 + c];
        total += ex2(other.x - top) * other.y;
      }
      total = warp_sum(total, 4);
      const float factor = total == 0 ? 0 : ex2(m[t] - top) * v_ref * (level_scale / total);
      const i64 slot = ((i64)head * p.splits + split) * p.rows + first_row + t * 4;
      const int rows = min(4, p.rows - first_row - t * 4);
      if (leads && r == 0 && c < rows) p.parts_lse[slot + c] = total == 0 ? -INFINITE : top + lg2(total);
      if (t) gang_sync();
#pragma unroll
      for (int j = 0; j < MTILES; j++)
        ((float4*)sums)[((tid >> 5) * 4 + c) * (D / 4) + merge_slot(r * (D / 32) + j, c)] =
            make_float4(o[t][j][0] * factor, o[t][j][1] * factor, o[t][j][2] * factor, o[t][j][3] * factor);
      gang_sync();
      for (int i = tid - gang_first * 32; i < rows * D; i += gang_warps * 32) {
        const int row = i / D, at = row * D + merge_slot(i % D / 4, row) * 4 + i % 4;
        float sum = 0;
#pragma unroll 4
        for (int k = 0; k < gang_warps; k++) sum += sums[(gang_first + k) * 4 * D + at];
        p.parts[slot * D + i] = sum;
      }
    }
  }
}

// Joins the splits, rotates back and stores in the queries' dtype. 4 * D threads take AT_ONCE rows at a time, first as
// (column of 4 dimensions, row, share of the splits), then as (column of 4 dimensions, share of the rotation's rows).
#define COLUMNS (D / 4)
#define AT_ONCE (D == 256 ? 2 : 4)
#define SHARES (16 / AT_ONCE)
extern "C" __global__ void __launch_bounds__(4 * D) tq4_combine(const __grid_constant__ CombineParams p) {
  __shared__ float4 partial[AT_ONCE][16][COLUMNS];
  __shared__ float merged[AT_ONCE][D];
  __shared__ float weights[AT_ONCE][128];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, column = tid % COLUMNS, part = tid / COLUMNS;
  const float4* rotation = (const float4*)p.rotation + column;
  float4 turn[D / 16];  // the rotation does not depend on the first kernel
#pragma unroll
  for (int k = 0; k < D / 16 && D < 256; k++) turn[k] = rotation[(part + 16 * k) * COLUMNS];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const i64 all = (i64)p.heads * p.rows;
  for (i64 first = (i64)blockIdx.x * p.rows_at_once; first < all; first += (i64)gridDim.x * p.rows_at_once) {
    const int count = (int)min((i64)p.rows_at_once, all - first);
    if (warp < count) {
      const i64 head = (first + warp) / p.rows;
      const int row = (int)((first + warp) % p.rows);
      const float* lses = p.parts_lse + head * p.splits * p.rows + row;
      float x[4], top = -INFINITE, total = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = lane + 32 * i < p.splits ? lses[(i64)(lane + 32 * i) * p.rows] : -INFINITE;
        top = fmaxf(top, x[i]);
      }
      top = warp_max(top, 1);
      top = top == -INFINITE ? 0 : top;
#pragma unroll
      for (int i = 0; i < 4; i++) total += x[i] = ex2(x[i] - top);
      total = warp_sum(total, 1);
#pragma unroll
      for (int i = 0; i < 4; i++) weights[warp][lane + 32 * i] = total == 0 ? 0 : x[i] / total;
      const i64 query = head * p.group + row % p.group;  // heads of q: the group of each key/value head in turn
      if (lane == 0) p.lse[query * p.q_len + row / p.group] = total == 0 ? -INFINITE : (top + lg2(total)) * 0.6931471805599453f;
    }
    __syncthreads();
    float4 sum = make_float4(0, 0, 0, 0);
    const int mine = part % AT_ONCE;
    if (mine < count) {
      const i64 head = (first + mine) / p.rows, row = (first + mine) % p.rows;
      const float4* x = (const float4*)p.parts + (head * p.splits * p.rows + row) * COLUMNS + column;
#pragma unroll 4
      for (int i = part / AT_ONCE; i < p.splits; i += SHARES) {
        const float weight = weights[mine][i];
        const float4 y = x[(i64)i * p.rows * COLUMNS];
        sum.x += weight * y.x, sum.y += weight * y.y, sum.z += weight * y.z, sum.w += weight * y.w;
      }
    }
    partial[mine][part / AT_ONCE][column] = sum;
    __syncthreads();
    for (int i = tid; i < count * D; i += 4 * D) {
      float x = 0;
#pragma unroll
      for (int k = 0; k < SHARES; k++) x += ((const float*)partial[i / D][k])[i % D];
      merged[i / D][i % D] = x;
    }
    __syncthreads();
    float4 turned[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) turned[i] = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const float4 y = D < 256 ? turn[k] : rotation[(part + 16 * k) * COLUMNS];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float x = merged[i][part + 16 * k];
        turned[i].x += x * y.x, turned[i].y += x * y.y, turned[i].z += x * y.z, turned[i].w += x * y.w;
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) partial[i][part][column] = turned[i];
    __syncthreads();
    for (int i = tid; i < count * D; i += 4 * D) {
      float x = 0;
#pragma unroll
      for (int k = 0; k < 16; k++) x += ((const float*)partial[i / D][k])[i % D];
      const i64 head = (first + i / D) / p.rows;
      const int row = (int)((first + i / D) % p.rows);
      store_half(p.out, ((head * p.group + row % p.group) * p.q_len + row / p.group) * D + i % D, x, p.is_bf16);
    }
    // The next rows overwrite the sums just read.
    __syncthreads();
  }
}
