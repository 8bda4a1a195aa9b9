// What storing keys and values shares: parameters, single instructions, lengths, and how a rotated vector becomes codes.
//
// The caller defines HEAD_DIM (64, 128, 256), BF16 (0: fp16, 1: bf16), SLOT (int or long long), SCALE (0: lengths, 1: least
// squares, 2: unbiased), OFFSETS (1: of keys) and BLOCKS, how many a multiprocessor runs.
//
// A rotated vector is held by 8 lanes of a warp, lane = 4 * g + c: of vector c the coordinates 8 g ... 8 g + 7 of each 64, which
// are one word of codes.
typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

#define D HEAD_DIM
#define OUTER (D / 64)
#define WARPS 4
#define THREADS (WARPS * 32)
#define FULL_MASK 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)

typedef float Vector[OUTER][8];

struct StoreParams {
  const char* k; const char* v; const void* slots; const void* previous_slots; char* pages;
  const float* rotation; const float* companding; const float* centroids; const float* key_scales;
  i64 page_stride;  // this and the other strides in bytes
  u32 k_token, k_head, v_token, v_head, rows, heads, page_size;
  u32 page_slots, num_slots, head_inverse, page_inverse;  // page_slots: from a page to the next
  u32 tokens, span, value_blocks;  // of keys with offsets: tokens whose runs a block looks for; blocks that store values
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
// The lower half of `bits`.
__device__ __forceinline__ float from_half(u32 bits, int is_bf16) {
  if (is_bf16) return __uint_as_float(bits << 16);
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)bits)); return y;
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
__device__ __forceinline__ float reciprocal(float x) {
  float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
}
// The block's number, read anew rather than kept in a register.
__device__ __forceinline__ u32 block_number() { u32 d; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(d)); return d; }
// The next kernel of the stream may start before this one has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// ---- end of PTX

// Quotient of x < 2^31 by the number whose inverse and shift the host computed.
__device__ __forceinline__ u32 divide(u32 x, u32 inverse, int shift) { return (u32)(((u64)x * inverse) >> shift); }

// Bytes of the codes and norms of one head of a page.
__device__ __forceinline__ u64 chunk_bytes(const StoreParams& p) { return (u64)p.page_size * (D + 8); }

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
__device__ __forceinline__ float vector_max(float x) {
  for (int d = 4; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, d));
  return x;
}

// Whether a vector of this squared length need not be rescaled; false for NaN.
__device__ __forceinline__ bool is_usual(float square) { return square > 1e-30f && square < 1e30f; }

// Bring a vector of extreme length into a range safe to square, by a power of two, 1 / `back`. Its squared length is returned.
__device__ __forceinline__ float rescale(Vector& y, float& back) {
  float largest = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < OUTER * 8; i++) largest = fmaxf(largest, fabsf(y[i / 8][i % 8]));
  largest = vector_max(largest);
  const float shift = largest > 1e15f ? 7.888609052210118e-31f : largest < 1e-15f ? 1.2676506002282294e30f : 1.0f;
  back = largest > 1e15f ? 1.2676506002282294e30f : largest < 1e-15f ? 7.888609052210118e-31f : 1.0f;
#pragma unroll
  for (int i = 0; i < OUTER * 8; i++) {
    float& x = y[i / 8][i % 8];
    x *= shift;
    sum = fmaf(x, x, sum);
  }
  return vector_sum(sum);
}

// The square root, `inverse` being its approximate inverse (0 for 0).
__device__ __forceinline__ float root(float square, float inverse) {
  const float x = square * inverse;
  return fmaf(0.5f * inverse, fmaf(-x, x, square), x);
}
__device__ __forceinline__ float inverse_length(float square) { return square == 0 ? 0 : inverse_root(square); }

struct Quantiser {
  float scale, curve[5], level;  // lane i gives level i to all that ask for it

  __device__ __forceinline__ Quantiser(const StoreParams& p) {
    scale = p.companding[0];
#pragma unroll
    for (int i = 0; i < 5; i++) curve[i] = p.companding[i + 1];
#if SCALE
    level = p.centroids[threadIdx.x & 15];
#endif
  }

  // Write this lane's codes of a vector, that is y * unit, from `codes` on if it is `live`. The squared length of that product,
  // the inverse length and the length, which a power of two may have left out of y, are given; the norm is returned.
  __device__ __forceinline__ float quantise(const Vector& y, float unit, float inverse, float length, bool live,
                                            char* codes) const {
    const float factor = inverse * (scale * unit);
    float norm = length;
#if SCALE
    float dot = 0, square = 0;  // of the rotated vector with its levels, of the levels
#endif
#pragma unroll
    for (int o = 0; o < OUTER; o++) {
      u32 bytes[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 even = cell(y[o][2 * i], factor, curve), odd = cell(y[o][2 * i + 1], factor, curve);
        bytes[i] = even * 16 + odd;
#if SCALE
        const float even_level = __shfl_sync(FULL_MASK, level, even), odd_level = __shfl_sync(FULL_MASK, level, odd);
        dot = fmaf(y[o][2 * i], even_level, fmaf(y[o][2 * i + 1], odd_level, dot));
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
    return norm < INFINITE ? norm : __uint_as_float(0x7fc00000u);
  }
};
