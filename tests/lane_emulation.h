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
using std::max;
using std::min;

struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct Index { unsigned x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

struct Warp {
  std::barrier<> together{32};
  unsigned a[32][4], b[32][2], one[32];
};
static std::vector<std::unique_ptr<Warp>> warps;
static std::unique_ptr<std::barrier<>> block;

static Warp& warp() { return *warps[threadIdx.x / 32]; }
static int lane_number() { return threadIdx.x % 32; }
static void __syncthreads() { block->arrive_and_wait(); }

static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
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
static float __shfl_xor_sync(unsigned, float x, int d) { return __shfl_sync(0, x, lane_number() ^ d); }
static bool __any_sync(unsigned, bool p) {
  bool any = false;
  for (int i = 0; i < 32; i++) any |= exchange(p, i) != 0;
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
