// Enough of CUDA for a kernel's source to run on a CPU, lane by lane: what it takes from the language, and under their
// own names the functions that it has in PTX. `lane_runtime.cpp` runs the lanes and watches what they do.
//
// The includer defines BF16.
#include "lane_runtime.h"

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("lane_shared")))
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx thread_index()
#define blockIdx block_index()
#define gridDim grid_size()
// Part of the function that calls it, so that a fault is found on that one's line.
#define INLINE static inline __attribute__((always_inline))

// The standard library's, by hand: to read its headers takes a third of the time that a kernel does.
extern "C" {
void* memcpy(void*, const void*, decltype(sizeof 0)) noexcept;
float fabsf(float) noexcept;
float copysignf(float, float) noexcept;
float exp2f(float) noexcept;
float log2f(float) noexcept;
float sqrtf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
}
template <typename T> static constexpr T max(T a, T b) { return a < b ? b : a; }
template <typename T> static constexpr T min(T a, T b) { return b < a ? b : a; }

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

INLINE void __syncthreads() { wait_for_block(); }
INLINE void __syncwarp() { wait_for_warp(); }

static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static int __float_as_int(float x) { return (int)__float_as_uint(x); }
static float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

static int lane_number() { return thread_index().x % 32; }
static unsigned __shfl_sync(unsigned, unsigned x, int from) { return exchange(x, from & 31); }
static int __shfl_sync(unsigned, int x, int from) { return (int)exchange((unsigned)x, from & 31); }
static float __shfl_sync(unsigned, float x, int from) { return __uint_as_float(exchange(__float_as_uint(x), from & 31)); }
static float __shfl_xor_sync(unsigned, float x, int d) { return __shfl_sync(0, x, lane_number() ^ d); }
static int __shfl_up_sync(unsigned, int x, int d) { return __shfl_sync(0, x, lane_number() < d ? lane_number() : lane_number() - d); }
static unsigned __ballot_sync(unsigned, bool p) { return votes(p); }
static bool __any_sync(unsigned, bool p) { return votes(p); }

static void multiply_into(float* c, const Operands& operands) {
  const Four sum = multiply({c[0], c[1], c[2], c[3]}, operands);
  for (int i = 0; i < 4; i++) c[i] = sum.at[i];
}
static const Numbers HALVES_HERE = BF16 ? BFLOAT16 : FLOAT16;
// Attention's are of fp16 always, the store's of what it stores.
static void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_into(c, {{a0, a1, a2, a3}, {b0, b1}, FLOAT16, 16});
}
static void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  multiply_into(c, {{a[0], a[1], a[2], a[3]}, {b0, b1}, HALVES_HERE, 16});
}
static void mma_short(float* c, unsigned a0, unsigned a1, unsigned b) { multiply_into(c, {{a0, a1}, {b}, HALVES_HERE, 8}); }
static void mma_tf32(float* c, const float* a, float b0, float b1) {
  const Operands operands = {{__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(a[2]), __float_as_uint(a[3])},
                             {__float_as_uint(b0), __float_as_uint(b1)}, TF32, 8};
  multiply_into(c, operands);
}

static unsigned prmt(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }
INLINE unsigned lds(unsigned at) { unsigned d; load_shared(&d, at, 4); return d; }
INLINE unsigned lds_table(unsigned at) { return lds(at); }
INLINE void lds2(unsigned* d, unsigned at) { load_shared(d, at, 8); }
INLINE void lds4(unsigned* d, unsigned at) { load_shared(d, at, 16); }
INLINE void sts2(unsigned at, float x, float y) { const float pair[2] = {x, y}; store_shared(at, pair, 8); }
static unsigned sub_half2(unsigned x, unsigned y) {
  _Float16 a[2], b[2];
  memcpy(a, &x, 4), memcpy(b, &y, 4);
  for (int i = 0; i < 2; i++) a[i] -= b[i];
  memcpy(&x, a, 4);
  return x;
}
INLINE void copy16(unsigned to, const void* from) { copy_later(to, from, 16); }
INLINE void copy4(unsigned to, const void* from) { copy_later(to, from, 4); }
template <int PENDING> INLINE void wait_copies() { land_copies(PENDING); }
INLINE unsigned or_of_warp(unsigned x) {
  unsigned all = 0;
  for (int i = 0; i < 32 && votes(x >> i != 0); i++) all |= (unsigned)(votes(x >> i & 1) != 0) << i;
  return all;
}
INLINE void team_barrier(int number, int count) { wait_for_team(number, count); }
INLINE void cluster_arrive() { arrive_at_cluster(); }
INLINE void cluster_wait() { wait_for_cluster(); }
INLINE unsigned arrive_of(unsigned* counter, int blocks) { return count_block(counter, blocks); }
INLINE void wait_for_count(const unsigned* counter, unsigned least) { see_counted(counter, least); }
INLINE void sts(unsigned at, float x) { store_shared(at, &x, 4); }
INLINE void sts_of(unsigned at, int rank, float x) { store_shared_of(at, rank, &x, 4); }
INLINE void sts2_of(unsigned at, int rank, float x, float y) { const float pair[2] = {x, y}; store_shared_of(at, rank, pair, 8); }
static int thread_number() { return thread_index().x; }
static unsigned block_number() { return block_index().x; }
static void hold(float&, float&) {}

// .ftz: numbers below the normal ones are zero.
static float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }
static float ex2(float x) { return flushed(exp2f(flushed(x))); }
static float reciprocal(float x) { return flushed(1 / flushed(x)); }
static float inverse_root(float x) { return flushed(1 / sqrtf(flushed(x))); }
static float lg2(float x) { return log2f(x); }
static unsigned half2_bits(float low, float high) {
  const _Float16 pair[2] = {(_Float16)low, (_Float16)high};
  unsigned bits;
  memcpy(&bits, pair, 4);
  return bits;
}
static float from_half(unsigned bits, int is_bf16) {
  if (is_bf16) return __uint_as_float(bits << 16);
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}
static unsigned to_bf16(float x) {
  const unsigned u = __float_as_uint(x);
  return x != x ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static unsigned half_pair(float low, float high, int is_bf16) {
  return is_bf16 ? to_bf16(low) | to_bf16(high) << 16 : half2_bits(low, high);
}

INLINE void prefetch(const void* x) { (void)*(const volatile char*)x; }  // of memory that there is
INLINE uint4 load16(const char* x) { return *(const uint4*)x; }
static float clamped(float y, float factor) {
  const float u = fmaf(y, factor, 0.5f);
  return u != u ? 0.0f : min(max(u, 0.0f), 1.0f);
}
static unsigned whole_part(float u, float q) { return __float_as_uint(fma_towards_zero(u, q, 8388616.0f)); }

// An entry point of the library: runs `kernel` with parameters as the driver would copy them.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_lane_shared[], __stop_lane_shared[];
template <typename Params, void (*kernel)(Params)>
const Failure* run_kernel(const char* params, const Launch* launch) {
  const auto lane = [](const void* params) { kernel(*(const Params*)params); };
  return run_grid(lane, params, sizeof(Params), *launch, __start_lane_shared, __stop_lane_shared);
}
