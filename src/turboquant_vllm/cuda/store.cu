// Storing keys and values: rotate by a randomized Hadamard matrix, quantise, pack, straight into pages.
//
// The caller defines HEAD_DIM (64, 128, 256), BF16 (0: fp16, 1: bf16), SLOT (int or long long),
// SCALE (0: lengths, 1: least squares, 2: unbiased) and BLOCKS, how many a multiprocessor runs. A warp takes 8 vectors at a time; nothing is
// shared between warps but the signs of the rotation.
//
// The rotation is H diag(s) / sqrt(D). H is a Kronecker product over the bits of a coordinate's number, so each bit may be
// taken where it suits: bits 0, 3, 4, 5 by a matrix instruction with the 16 x 16 Hadamard matrix, whose entries +-1 are
// exact; bits 1 and 2 by adding four such products, with the matrix or its negative; bits 6 and 7 by additions in float32.
//
//   matrix instruction m16n8k16, D = A B + C; lane = 4 * g + c
//   A  the Hadamard matrix: row bits 0, 1, 2, 3 are bits 3, 4, 5, 0 of the coordinate that comes out
//   B  8 vectors, vector g held by lanes 4 g ... 4 g + 3; k bits 0, 1, 2, 3 are bits 0, 3, 4, 5 of the one that goes in
//   D  vectors 2 c and 2 c + 1, coordinates 8 g ... 8 g + 7 of each 64: one word of codes
//
// The squared lengths are the diagonal of the 8 vectors' products with each other. For m16n8k8, the two registers of B are an
// A whose rows g and g + 8 are the two halves of vector g: times either half, one half of the rows is of use.
typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

#define D HEAD_DIM
#define OUTER (D / 64)
#define WARPS 4
#define FULL_MASK 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)

struct StoreParams {
  const char* k; const char* v; const void* slots; char* pages; const float* rotation; const float* companding; const float* centroids;
  i64 page_stride;  // this and the other strides in bytes
  u32 k_token, k_head, v_token, v_head, rows, heads, page_size, num_slots, head_inverse, page_inverse;
  int head_shift, page_shift;
};

// ---- PTX
#if BF16
#define HALVES "f32.bf16.bf16.f32"
#else
#define HALVES "f32.f16.f16.f32"
#endif

// Volatile, or equal products are computed once and copied, which costs more.
__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." HALVES " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_short(float* c, u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col." HALVES " {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ uint4 load16(const char* x) {
  uint4 d;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(x));
  return d;
}

// y * factor + 1/2, clamped to [0, 1]; 0 for NaN.
__device__ __forceinline__ float clamped(float y, float factor) {
  float u; asm("fma.rn.sat.f32 %0, %1, %2, 0f3F000000;" : "=f"(u) : "f"(y), "f"(factor)); return u;
}
// The whole part of 8 + u q in the low 4 bits: rounding towards zero drops the fraction, adding 2^23 shifts.
__device__ __forceinline__ u32 whole_part(float u, float q) {
  float x; asm("fma.rz.f32 %0, %1, %2, 0f4B000008;" : "=f"(x) : "f"(u), "f"(q)); return __float_as_uint(x);
}
__device__ __forceinline__ float inverse_root(float x) {
  float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
}
// ---- end of PTX

// Quotient of x < 2^31 by the number whose inverse and shift the host computed.
__device__ __forceinline__ u32 divide(u32 x, u32 inverse, int shift) { return (u32)(((u64)x * inverse) >> shift); }

// Two entries of the 16 x 16 Hadamard matrix, in row `row`, columns `column` and `column` + 1.
__device__ __forceinline__ u32 hadamard_pair(int row, int column) {
  const u32 one = BF16 ? 0x3f80u : 0x3c00u;
  // Row bit 3 meets column bit 0, row bits 0, 1, 2 meet column bits 1, 2, 3.
  const u32 sign = (__popc(row & 7 & (column >> 1)) & 1) << 15;
  return (one | sign) | (one | (sign ^ ((row & 8) << 12))) << 16;
}

// The cell of y * factor in the low 4 bits; 0 for NaN.
__device__ __forceinline__ u32 cell(float y, float factor, const float* curve) {
  const float u = clamped(y, factor) - 0.5f, w = u * u;
  float q = fmaf(curve[4], w, curve[3]);
  q = fmaf(q, w, curve[2]);
  q = fmaf(q, w, curve[1]);
  return whole_part(u, fmaf(q, w, curve[0]));
}

__device__ __forceinline__ float vector_sum(float x) {  // over the lanes that hold a vector
  for (int d = 4; d < 32; d <<= 1) x += __shfl_xor_sync(FULL_MASK, x, d);
  return x;
}

// Bring a vector of extreme length into a range safe to square, by a power of two; its squared length is |y|^2 / D then.
// y[outer][pair] holds coordinates 64 outer + 8 g + 2 pair and the next, of two vectors: even 0, even 1, odd 0, odd 1.
__device__ __forceinline__ void rescale(float (*y)[4][4], int v, float& square, float& back) {
  float largest = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < OUTER * 8; i++) largest = fmaxf(largest, fabsf(y[i / 8][i / 2 % 4][v + i % 2 * 2]));
  for (int d = 4; d < 32; d <<= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, d));
  const float shift = largest > 1e15f ? 7.888609052210118e-31f : largest < 1e-15f ? 1.2676506002282294e30f : 1.0f;
  back = largest > 1e15f ? 1.2676506002282294e30f : largest < 1e-15f ? 7.888609052210118e-31f : 1.0f;
#pragma unroll
  for (int i = 0; i < OUTER * 8; i++) {
    float& x = y[i / 8][i / 2 % 4][v + i % 2 * 2];
    x *= shift;
    sum = fmaf(x, x, sum);
  }
  square = vector_sum(sum) * (1.0f / D);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) tq4_store(const __grid_constant__ StoreParams p) {
  __shared__ uint4 signs[D / 8];
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3, is_v = blockIdx.y;
  const char* from = (is_v ? p.v : p.k) + 16 * c;
  const u32 from_token = is_v ? p.v_token : p.k_token, from_head = is_v ? p.v_head : p.k_head;
  const u64 chunk = (u64)p.page_size * (D + 8);
  const u64 codes_part = (is_v ? (u64)p.page_size * (D / 2) : 0) + 4 * g, norms_part = (u64)p.page_size * (is_v ? D + 4 : D);
  const u32 tiles = (p.rows + 7) / 8, step = gridDim.x * WARPS;
  u32 tile = blockIdx.x * WARPS + (threadIdx.x >> 5);

  uint4 x[OUTER * 2];
  auto load = [&](u32 tile) {
    if (tile >= tiles) return;
    const u32 row = min(tile * 8 + g, p.rows - 1);
    const u32 token = divide(row, p.head_inverse, p.head_shift), head = row - token * p.heads;
    const char* at = from + (u64)token * from_token + (u64)head * from_head;
#pragma unroll
    for (int i = 0; i < OUTER * 2; i++) x[i] = load16(at + 64 * i);
  };
  load(tile);

  // The first row of H is all ones, so the first row of the rotation is s.
  for (int i = threadIdx.x; i < D / 2; i += WARPS * 32) {
    const float2 s = ((const float2*)p.rotation)[i];
    ((u32*)signs)[i] = (__float_as_uint(s.x) >> 31 << 15) | (__float_as_uint(s.y) >> 31 << 31);
  }
  float curve[5];
  const float unit = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;  // of y
  const float scale = p.companding[0] * unit;
#if SCALE
  const float level = p.centroids[lane & 15];  // lane i gives level i to all that ask for it
#endif
#pragma unroll
  for (int i = 0; i < 5; i++) curve[i] = p.companding[i + 1];
  u32 a[2][4];  // the matrix and its negative
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[0][i] = hadamard_pair(g + (i & 1) * 8, 2 * c + (i & 2) * 4);
    a[1][i] = a[0][i] ^ 0x80008000u;
  }
  __syncthreads();

#pragma unroll 1
  for (; tile < tiles; tile += step) {
    float y[OUTER][4][4] = {}, gram[2][4] = {};
#pragma unroll
    for (int o = 0; o < OUTER; o++) {
      const uint4 s0 = signs[o * 8 + c], s1 = signs[o * 8 + 4 + c];
      const u32 b[2][4] = {{x[2 * o].x ^ s0.x, x[2 * o].y ^ s0.y, x[2 * o].z ^ s0.z, x[2 * o].w ^ s0.w},
                           {x[2 * o + 1].x ^ s1.x, x[2 * o + 1].y ^ s1.y, x[2 * o + 1].z ^ s1.z, x[2 * o + 1].w ^ s1.w}};
#pragma unroll
      for (int in = 0; in < 4; in++) {
#pragma unroll
        for (int out = 0; out < 4; out++) mma(y[o][out], a[(in & out) % 3 != 0], b[0][in], b[1][in]);
        mma_short(gram[0], b[0][in], b[1][in], b[0][in]);
        mma_short(gram[1], b[0][in], b[1][in], b[1][in]);
      }
    }
    load(tile + step);
    // Where the two vectors go, known before it is needed.
    u32 head[2], slot[2];
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const u32 row = tile * 8 + 2 * c + v, token = divide(min(row, p.rows - 1), p.head_inverse, p.head_shift);
      head[v] = row - token * p.heads;
      const u64 there = row < p.rows ? (u64)((const SLOT*)p.slots)[token] : ~0ull;
      slot[v] = there < p.num_slots ? (u32)there : ~0u;
    }

    // What is left: bits 6 and 7.
#pragma unroll
    for (int bit = 1; bit < OUTER; bit <<= 1) {
#pragma unroll
      for (int i = 0; i < OUTER * 16; i++) {
        const int o = i / 16;
        if (o & bit) continue;
        float& low = y[o][i / 4 % 4][i % 4];
        float& high = y[o | bit][i / 4 % 4][i % 4];
        const float sum = low + high;
        high = low - high;
        low = sum;
      }
    }

    // Lane 4 g + c holds the products of vector g with vectors 2 c and 2 c + 1, in two halves.
    float sum[2], back[2] = {1, 1};
#pragma unroll
    for (int v = 0; v < 2; v++) sum[v] = __shfl_sync(FULL_MASK, gram[0][v] + gram[1][v + 2], 9 * c + 4 * v);
#if BF16  // squares of fp16 stay in range
    const bool usual = sum[0] > 1e-30f && sum[0] < 1e30f && sum[1] > 1e-30f && sum[1] < 1e30f;  // false for NaN
    if (__any_sync(FULL_MASK, !usual)) {
#pragma unroll
      for (int v = 0; v < 2; v++) rescale(y, v, sum[v], back[v]);
    }
#endif

#pragma unroll
    for (int v = 0; v < 2; v++) {
      const float inverse = sum[v] == 0 ? 0 : inverse_root(sum[v]);
      const float factor = inverse * scale;
      float norm = sum[v] * inverse;
      norm = fmaf(0.5f * inverse, fmaf(-norm, norm, sum[v]), norm) * back[v];  // the approximate root, made exact
      const bool live = slot[v] < p.num_slots;
      const u32 page = divide(slot[v], p.page_inverse, p.page_shift), place = slot[v] - page * p.page_size;
      char* to = p.pages + page * p.page_stride + head[v] * chunk;
      char* codes = to + (codes_part + (u64)place * (D / 2));
#if SCALE
      float dot = 0, square = 0;  // of the rotated vector with its levels, of the levels
#endif
#pragma unroll
      for (int o = 0; o < OUTER; o++) {
        u32 bytes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 even = cell(y[o][i][v], factor, curve), odd = cell(y[o][i][v + 2], factor, curve);
          bytes[i] = even * 16 + odd;
#if SCALE
          const float even_level = __shfl_sync(FULL_MASK, level, even), odd_level = __shfl_sync(FULL_MASK, level, odd);
          dot = fmaf(y[o][i][v], even_level, fmaf(y[o][i][v + 2], odd_level, dot));
          square = fmaf(even_level, even_level, fmaf(odd_level, odd_level, square));
#endif
        }
        const u32 low = __byte_perm(bytes[0], bytes[1], 0x0040), high = __byte_perm(bytes[2], bytes[3], 0x0040);
        if (live) *(u32*)(codes + 32 * o) = __byte_perm(low, high, 0x5410);
      }
#if SCALE == 1
      norm *= vector_sum(dot) * inverse * unit / vector_sum(square);
#elif SCALE == 2
      dot = vector_sum(dot);
      if (norm != 0) norm /= dot * inverse * unit;
#endif
      // A vector that is not finite has norm NaN, which attention cannot overlook.
      if (!(norm < INFINITE)) norm = __uint_as_float(0x7fc00000u);
      if (live && g == 0) *(float*)(to + (norms_part + (u64)place * 4)) = norm;
    }
  }
}
