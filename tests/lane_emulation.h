// Enough of CUDA for a kernel's source to run on a CPU: a thread for each lane, matrix instructions in float64.
//
// The includer defines BF16. What the kernel has in PTX it must find here under the same name.
#include <algorithm>
#include <barrier>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

typedef unsigned u32;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

struct Warp {
  std::barrier<> together{32};
  unsigned a[32][4], b[32][2], one[32];
};
static std::vector<std::unique_ptr<Warp>> warps;
static std::unique_ptr<std::barrier<>> block;
alignas(1024) static char dynamic_shared[1 << 18];

static Warp& warp() { return *warps[threadIdx.x / 32]; }
static int lane_number() { return threadIdx.x % 32; }
static void __syncthreads() { block->arrive_and_wait(); }
static void __syncwarp() { warp().together.arrive_and_wait(); }

static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static int __float_as_int(float x) { return (int)__float_as_uint(x); }
static float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
static unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

static unsigned exchange(unsigned value, int from) {
  Warp& w = warp();
  w.one[lane_number()] = value;
  w.together.arrive_and_wait();
  const unsigned result = w.one[from & 31];
  w.together.arrive_and_wait();
  return result;
}
static float __shfl_sync(unsigned, float x, int from) { return __uint_as_float(exchange(__float_as_uint(x), from)); }
static unsigned __shfl_sync(unsigned, unsigned x, int from) { return exchange(x, from); }
static int __shfl_sync(unsigned, int x, int from) { return (int)exchange((unsigned)x, from); }
static int __shfl_up_sync(unsigned, int x, int d) { return (int)exchange((unsigned)x, max(lane_number() - d, 0)); }
static float __shfl_xor_sync(unsigned, float x, int d) { return __shfl_sync(0, x, lane_number() ^ d); }
static bool __any_sync(unsigned, bool p) {
  Warp& w = warp();
  bool any = false;
  w.one[lane_number()] = p;
  w.together.arrive_and_wait();
  for (unsigned one : w.one) any |= one != 0;
  w.together.arrive_and_wait();
  return any;
}

// Half `index` of a register, as a float.
static double half_of(unsigned pair, int index) {
  const unsigned short bits = pair >> 16 * index;
#if BF16
  return __uint_as_float((unsigned)bits << 16);
#else
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (double)x;
#endif
}
// C += A B as the PTX manual lays fragments out, A [16, K] and B [K, 8]; K is 16 or 8.
static void product(float* c, const unsigned* a, const unsigned* b, int K) {
  Warp& w = warp();
  const int lane = lane_number();
  for (int i = 0; i < K / 4; i++) w.a[lane][i] = a[i];
  for (int i = 0; i < K / 8; i++) w.b[lane][i] = b[i];
  w.together.arrive_and_wait();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < K; k++) {
      const int quad = k % 8 / 2;
      sum += half_of(w.a[row % 8 * 4 + quad][row / 8 + k / 8 * 2], k % 2) * half_of(w.b[column * 4 + quad][k / 8], k % 2);
    }
    c[i] = (float)sum;
  }
  w.together.arrive_and_wait();
}
static void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  product(c, a, b, 16);
}
static void mma_short(float* c, unsigned a0, unsigned a1, unsigned b) {
  const unsigned a[2] = {a0, a1};
  product(c, a, &b, 8);
}

static void mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned a[4] = {a0, a1, a2, a3};
  mma(c, a, b0, b1);
}
// The same for tf32, which has 10 bits of fraction: A [16, 8], B [8, 8].
static float short_float(unsigned bits) { return __uint_as_float(bits & 0xffffe000u); }
static void mma_tf32(float* c, const float* a, float b0, float b1) {
  Warp& w = warp();
  const int lane = lane_number();
  for (int i = 0; i < 4; i++) w.a[lane][i] = __float_as_uint(a[i]);
  w.b[lane][0] = __float_as_uint(b0), w.b[lane][1] = __float_as_uint(b1);
  w.together.arrive_and_wait();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; k++)
      sum += (double)short_float(w.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]) * short_float(w.b[column * 4 + k % 4][k / 4]);
    c[i] = (float)sum;
  }
  w.together.arrive_and_wait();
}

static u32 shared_address(const void*) { return 0; }
static u32 prmt(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
static u32 lds(u32 at) { u32 d; memcpy(&d, dynamic_shared + at, 4); return d; }
static u32 lds_table(u32 at) { return lds(at); }
static void lds2(u32* d, u32 at) { memcpy(d, dynamic_shared + at, 8); }
static void lds4(u32* d, u32 at) { memcpy(d, dynamic_shared + at, 16); }
// Copies arrive at once; what waits for them still waits for the other lanes.
static void copy16(u32 to, const void* from) { memcpy(dynamic_shared + to, from, 16); }
static void copy4(u32 to, const void* from) { memcpy(dynamic_shared + to, from, 4); }
static void commit_copies() {}
template <int PENDING> void wait_copies() {}
static void let_next_start() {}
static void wait_for_previous() {}
static int thread_number() { return threadIdx.x; }
static void hold(float&, float&) {}
static float ex2(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1 / x; }
static float lg2(float x) { return log2f(x); }
static u32 half2_bits(float low, float high) {
  const _Float16 pair[2] = {(_Float16)low, (_Float16)high};
  u32 bits;
  memcpy(&bits, pair, 4);
  return bits;
}
static float from_half(u32 bits, int is_bf16) {
  if (is_bf16) return __uint_as_float(bits << 16);
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}
static u32 to_bf16(float x) { const u32 u = __float_as_uint(x); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
static u32 half_pair(float low, float high, int is_bf16) {
  return is_bf16 ? to_bf16(low) | to_bf16(high) << 16 : half2_bits(low, high);
}

static uint4 load16(const char* x) { uint4 d; memcpy(&d, x, 16); return d; }
static float inverse_root(float x) { return 1.0f / sqrtf(x); }
static float clamped(float y, float factor) {
  const float u = fmaf(y, factor, 0.5f);
  return std::isnan(u) ? 0.0f : min(max(u, 0.0f), 1.0f);
}
static unsigned whole_part(float u, float q) {
  fesetround(FE_TOWARDZERO);
  volatile float x = u, y = q, sum = fmaf(x, y, 8388616.0f);
  fesetround(FE_TONEAREST);
  return __float_as_uint(sum);
}

// Run `threads` threads of `kernel` for each block of a grid, one block after the other.
template <typename Params>
void run_grid(void (*kernel)(Params), const void* raw, int columns, int rows, int threads) {
  Params params;
  memcpy(&params, raw, sizeof params);
  gridDim = {(unsigned)columns, (unsigned)rows, 1};
  for (int i = 0; i < columns * rows; i++) {
    warps.clear();
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
    block = std::make_unique<std::barrier<>>(threads);
    memset(dynamic_shared, 0xff, sizeof dynamic_shared);
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++) {
      all.emplace_back([=] {
        threadIdx = {(unsigned)t, 0, 0};
        blockIdx = {(unsigned)(i % columns), (unsigned)(i / columns), 0};
        kernel(params);
      });
    }
    for (std::thread& one : all) one.join();
  }
}
