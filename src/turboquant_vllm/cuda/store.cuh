// What storing keys and values shares: parameters, single instructions, lengths, and how a rotated vector becomes codes.
//
// The caller defines HEAD_DIM (64, 128, 256), BF16 (0: fp16, 1: bf16), SLOT (int or long long), SCALE (0: lengths, 1: least
// squares, 2: unbiased), OFFSETS (1: of keys), TEAM_BYTES, shared memory of a team, TEAMS of a block at most, and
// BLOCKS, how many a multiprocessor runs; or STORES, where attention's launch stores first, in blocks of its own size.
//
// Work is divided over teams of four warps. A block is one team, or of few tokens as many as a multiprocessor runs: the kernel
// behind this one may start while it runs, and then finds the other multiprocessors free.
//
// A rotated vector is held by D / N lanes of a warp, N coordinates by each. Lane 32 * N / D * g + c has of vector c the coordinates
// 8 g ... 8 g + 7, or of each 64 of them these where N is more than 8: whole words of codes.
typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

#define D HEAD_DIM
#define OUTER (D / 64)
#define TEAM 4  // warps
#define TEAM_THREADS (TEAM * 32)
#define FEW (256 / D)  // vectors of a warp at a time, of 8 coordinates a lane
#define FULL_MASK 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

struct StoreParams {
  const char* k; const char* v; const void* slots; const void* previous_slots; char* pages;
  const float* rotation; const float* companding; const float* centroids; const float* key_scales;
  i64 page_stride;  // this and the other strides in bytes
  u32 k_token, k_head, v_token, v_head, rows, heads, page_size;
  u32 page_slots, num_slots, head_inverse, page_inverse;  // page_slots: from a page to the next
  u32 tokens, span;         // of keys with offsets: tokens whose runs a team looks for
  u32 vector_teams, teams;  // teams that store values, as many of keys without offsets; teams of a block
  int head_shift, page_shift, is_few;
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
// The thread's number, and the block's, read anew rather than kept in a register.
__device__ __forceinline__ u32 thread_number() { u32 d; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(d)); return d; }
__device__ __forceinline__ u32 block_number() { u32 d; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(d)); return d; }
__device__ __forceinline__ void team_barrier(int number, int count) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(count) : "memory");
}
// The next kernel of the stream may start before this one has ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// ---- end of PTX

// Where a block is one team, all of it takes the same branches, which the compiler knows only if no thread's number is asked for.
__device__ __forceinline__ u32 team_of_block() { return TEAMS == 1 ? 0 : threadIdx.x / TEAM_THREADS; }
__device__ __forceinline__ u32 thread_of_team() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % TEAM_THREADS; }
__device__ __forceinline__ u32 warp_of_team() { return thread_of_team() / 32; }
__device__ __forceinline__ u32 team_number(const StoreParams& p, u32 block) {
  return TEAMS == 1 ? block : block * p.teams + thread_number() / TEAM_THREADS;
}
// A barrier of a team's threads.
__device__ __forceinline__ void meet() {
  if (TEAMS == 1) __syncthreads();
  else team_barrier(1 + team_of_block(), TEAM_THREADS);
}

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

template <int N> __device__ __forceinline__ float vector_sum(float x) {  // over the lanes that hold a vector
  for (int d = 32 * N / D; d < 32; d <<= 1) x += __shfl_xor_sync(FULL_MASK, x, d);
  return x;
}
template <int N> __device__ __forceinline__ float vector_max(float x) {
  for (int d = 32 * N / D; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, d));
  return x;
}

// Whether a vector of this squared length need not be rescaled; false for NaN.
__device__ __forceinline__ bool is_usual(float square) { return square > 1e-30f && square < 1e30f; }

// Bring a vector of extreme length into a range safe to square, by a power of two, 1 / `back`. Its squared length is returned.
template <int N> __device__ __forceinline__ float rescale(float (&y)[N], float& back) {
  float largest = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < N; i++) largest = fmaxf(largest, fabsf(y[i]));
  largest = vector_max<N>(largest);
  const float shift = largest > 1e15f ? 7.888609052210118e-31f : largest < 1e-15f ? 1.2676506002282294e30f : 1.0f;
  back = largest > 1e15f ? 1.2676506002282294e30f : largest < 1e-15f ? 7.888609052210118e-31f : 1.0f;
#pragma unroll
  for (int i = 0; i < N; i++) {
    y[i] *= shift;
    sum = fmaf(y[i], y[i], sum);
  }
  return vector_sum<N>(sum);
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
  template <int N>
  __device__ __forceinline__ float quantise(const float (&y)[N], float unit, float inverse, float length, bool live,
                                            char* codes) const {
    const float factor = inverse * (scale * unit);
    float norm = length;
#if SCALE
    float dot = 0, square = 0;  // of the rotated vector with its levels, of the levels
#endif
#pragma unroll
    for (int o = 0; o < N / 8; o++) {
      u32 bytes[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float low = y[8 * o + 2 * i], high = y[8 * o + 2 * i + 1];
        const u32 even = cell(low, factor, curve), odd = cell(high, factor, curve);
        bytes[i] = even * 16 + odd;
#if SCALE
        const float even_level = __shfl_sync(FULL_MASK, level, even), odd_level = __shfl_sync(FULL_MASK, level, odd);
        dot = fmaf(low, even_level, fmaf(high, odd_level, dot));
        square = fmaf(even_level, even_level, fmaf(odd_level, odd_level, square));
#endif
      }
      const u32 first = __byte_perm(bytes[0], bytes[1], 0x0040), last = __byte_perm(bytes[2], bytes[3], 0x0040);
      if (live) *(u32*)(codes + 32 * o) = __byte_perm(first, last, 0x5410);
    }
#if SCALE == 1
    norm *= vector_sum<N>(dot) * inverse * unit / vector_sum<N>(square);
#elif SCALE == 2
    dot = vector_sum<N>(dot);
    if (norm != 0) norm /= dot * inverse * unit;
#endif
    // A vector that is not finite has norm NaN, which attention cannot overlook.
    return norm < INFINITE ? norm : __uint_as_float(0x7fc00000u);
  }
};

// ---- vectors of 8 coordinates a lane
typedef float Vector[8];

// A vector of float32 in memory, of which a lane has its coordinates.
__device__ __forceinline__ void read_vector(const float* from, Vector& y) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 x = *(const float4*)(from + threadIdx.x % 32 / FEW * 8 + i);
    y[i] = x.x, y[i + 1] = x.y, y[i + 2] = x.z, y[i + 3] = x.w;
  }
}
__device__ __forceinline__ void write_vector(float* to, const Vector& y) {
  if (threadIdx.x % FEW) return;
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    *(float4*)(to + threadIdx.x % 32 / FEW * 8 + i) = make_float4(y[i], y[i + 1], y[i + 2], y[i + 3]);
}

// The numbers of 8 halves.
__device__ __forceinline__ void from_halves(uint4 x, Vector& y) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = from_half(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu, BF16);
}

// y H
__device__ __forceinline__ void transform(Vector& y) {
#pragma unroll
  for (int bit = 1; bit < 8; bit <<= 1) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i & bit) continue;
      float& low = y[i];
      float& high = y[i | bit];
      const float sum = low + high;
      high = low - high;
      low = sum;
    }
  }
#pragma unroll
  for (int d = FEW; d < 32; d <<= 1) {
    const float sign = threadIdx.x & d ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = fmaf(y[i], sign, __shfl_xor_sync(FULL_MASK, y[i], d));
  }
}
#define UNIT (D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f)  // 1 / sqrt(D)

// What a lane has of a vector: its squared length, brought into range by a power of two, 1 / `back`.
__device__ __forceinline__ float square_in_range(Vector& y, float& back, bool counts) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(y[i], y[i], sum);
  sum = vector_sum<8>(sum), back = 1;
  if (__any_sync(FULL_MASK, counts && !is_usual(sum))) sum = rescale(y, back);
  return sum;
}
