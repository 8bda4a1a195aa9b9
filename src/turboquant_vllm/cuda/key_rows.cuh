// Rows of keys on their way to groups that share an offset: sums without the one that lies farthest, the rotation, and 8 bits.
//
// Rows wait in shared memory as they came, each lane's parts at places of its own. Sums of rows, and so means and distances
// from them, are made before the rotation, which changes no length. It is H diag(s) w / sqrt(D), w being the key scales; H is
// taken bit by bit: bits 0, 1, 2, 6, 7 of a coordinate's number within a lane, the others between lanes.
#if OFFSETS
#define GROUP 64
#define PRIOR_WEIGHT 8
#define NOWHERE (~0u)
#define SHORT 4  // rows that one warp stores, at most
#define ROUNDS (GROUP / (FEW * TEAM))

struct Row { u32 number, slot; };
struct Rows { u32 count, first, last; };  // first and last slot, in the order of the search
enum Source { NO_PRIOR, ROWS_BEFORE, OFFSET_BEFORE, PAGES_BEFORE };
struct Plan { u32 count, source, previous, before; };
// The row that lies farthest: its distance, and which it is of the run's.
struct Farthest { float distance; u32 index; };

struct Shared {
  uint4 rows[ROUNDS][TEAM_THREADS];
  float sums[TEAM][D];
  u32 counts[TEAM];
  Farthest farthest[TEAM];
  float scales[D];  // times the rotation's signs
  float offset[TEAM][D];  // of the run that a warp is to store, before that its prior
  Row own[GROUP], before[GROUP], few[TEAM][SHORT];
  Plan plan;
};

// Fetch `count` rows of keys, each lane its parts of the rows that it is to work on.
template <int RUN_WARPS>
__device__ __forceinline__ void load_rows(const StoreParams& p, Shared& s, u32 head, const Row* list, u32 count) {
  constexpr int ALL = RUN_WARPS == 1 ? SHORT / FEW : ROUNDS, AT_ONCE = ALL < 8 ? ALL : 8;  // rows on their way in registers
  const u32 lane = threadIdx.x & 31, warp = RUN_WARPS > 1 ? warp_of_team() : 0;
#pragma unroll 1
  for (int round = 0; round < ALL; round += AT_ONCE) {
    const u32 first = (round * RUN_WARPS + warp) * FEW;
    uint4 x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if ((RUN_WARPS > 1 || i > 0) && first + i * RUN_WARPS * FEW >= count) break;
      const u64 row = list[min(first + i * RUN_WARPS * FEW + lane % FEW, count - 1)].number;
      const char* at = p.k + row * p.k_token + (u64)head * p.k_head + lane / FEW * 16;
      x[i] = load16(at);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if ((RUN_WARPS > 1 || i > 0) && first + i * RUN_WARPS * FEW >= count) return;
      s.rows[round + i][thread_of_team()] = x[i];
    }
  }
}

// One of these rows, times scales and signs.
__device__ __forceinline__ void scaled_row(const Shared& s, int round, Vector& y) {
  Vector scales;
  read_vector(s.scales, scales);
  from_halves(s.rows[round][thread_of_team()], y);
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] *= scales[i];
}

__device__ __forceinline__ Farthest farther_of(Farthest a, Farthest b) {
  return b.distance > a.distance || (b.distance == a.distance && b.index < a.index) ? b : a;
}
// Of a warp's rows, then of all warps' of a team.
template <int RUN_WARPS> __device__ __forceinline__ Farthest farthest_of(Shared& s, Farthest mine) {
#pragma unroll
  for (int d = 1; d < FEW; d <<= 1)
    mine = farther_of(mine, {__shfl_xor_sync(FULL_MASK, mine.distance, d), __shfl_sync(FULL_MASK, mine.index, threadIdx.x % 32 ^ d)});
  if (RUN_WARPS == 1) return mine;
  if (threadIdx.x % 32 == 0) s.farthest[warp_of_team()] = mine;
  meet();
  mine = s.farthest[0];
#pragma unroll
  for (int i = 1; i < TEAM; i++) mine = farther_of(mine, s.farthest[i]);
  return mine;
}

// What the lanes of a warp have summed of their rows, for the other warps; the count is that of a lane's rows.
__device__ __forceinline__ void publish(Shared& s, Vector& sum, u32 count) {
  const u32 lane = threadIdx.x & 31, warp = warp_of_team();
#pragma unroll
  for (int d = 1; d < FEW; d <<= 1) {
    count += __shfl_sync(FULL_MASK, count, lane ^ d);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(FULL_MASK, sum[i], d);
  }
  write_vector(s.sums[warp], sum);
  if (lane == 0) s.counts[warp] = count;
}
// The sum of all warps, and how many rows are in it.
__device__ __forceinline__ u32 gather(const Shared& s, Vector& sum) {
  u32 count = s.counts[0];
  read_vector(s.sums[0], sum);
#pragma unroll
  for (int warp = 1; warp < TEAM; warp++) {
    Vector more;
    read_vector(s.sums[warp], more);
    count += s.counts[warp];
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += more[i];
  }
  return count;
}

// Publishes a warp's part of the sum of the finite ones of `count` rows but number `without`. Which of a lane's rows are in it is
// returned, a bit for each round.
__device__ __forceinline__ u32 sum_rows(Shared& s, u32 count, u32 without) {
  const u32 c = threadIdx.x % FEW, warp = warp_of_team();
  Vector sum = {};
  u32 finite = 0;
#pragma unroll 1
  for (u32 round = 0; round < ROUNDS; round++) {
    const u32 first = (round * TEAM + warp) * FEW;
    if (first >= count) break;
    Vector y;
    scaled_row(s, round, y);
    float none = 0;  // but NaN if a coordinate is not finite
#pragma unroll
    for (int i = 0; i < 8; i++) none = fmaf(y[i], 0.0f, none);
    if (vector_sum<8>(none) == 0 && first + c < count && first + c != without) {
      finite |= 1u << round;
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += y[i];
    }
  }
  publish(s, sum, __popc(finite));
  return finite;
}

// The sum of the finite ones of `count` rows but for that farthest from their mean, and how many it is of. The whole team.
__device__ __forceinline__ u32 sum_but_outlier(Shared& s, u32 count, Vector& sum) {
  const u32 c = threadIdx.x % FEW, warp = warp_of_team();
  u32 without = NOWHERE;
  meet();  // what was gathered before has been read
#pragma unroll 1
  for (int pass = 0;; pass++) {
    u32 finite = 0;
    if (pass == 0 || without / FEW % TEAM == warp) finite = sum_rows(s, count, without);
    meet();
    const u32 good = gather(s, sum);
    if (pass == 1) return good;
    if (good < 2) break;
    const float share = reciprocal(good);
    Farthest farthest = {-1, NOWHERE};
#pragma unroll 1
    for (u32 round = 0; round < ROUNDS; round++) {
      const u32 first = (round * TEAM + warp) * FEW;
      if (first >= count) break;
      Vector y;
      float back;
      scaled_row(s, round, y);
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = fmaf(sum[i], -share, y[i]);
      const bool counts = finite >> round & 1;
      const float square = square_in_range(y, back, counts), distance = root(square, inverse_length(square)) * back;
      if (counts) farthest = farther_of(farthest, {distance, first + c});
    }
    without = farthest_of<TEAM>(s, farthest).index;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = 0;
  return 0;
}

// The values of 8-bit codes, of which a lane has those of its coordinates.
__device__ __forceinline__ void read_offset(const char* codes, float step, Vector& y) {
  const uint2 x = *(const uint2*)(codes + threadIdx.x % 32 / FEW * 8);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // The byte, as a number from 0 on, behind the exponent of 2^23.
    const u32 bits = __byte_perm((i < 4 ? x.x : x.y) ^ 0x80808080u, 0x4b000000u, 0x7440 + i % 4);
    y[i] = (__uint_as_float(bits) - 8388736.0f) * step;
  }
}

// y as 8-bit codes, which go to `codes` if this lane is to write them, and in y as what they stand for. The step is returned.
__device__ __forceinline__ float eight_bits(Vector& y, char* codes, bool writes) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(y[i]));
  largest = vector_max<8>(largest);
  const float step = largest * (1.0f / 127), up = largest < 1e-30f ? 1.2676506002282294e30f : 1.0f;  // so that the inverse is in range
  const float inverse = largest == 0 ? 0 : 127 * reciprocal(largest * up);
  u32 bits[8], words[2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // Adding 3 * 2^22 rounds to the nearest whole number, and leaves its low bits in the lowest places.
    const float whole = fminf(fmaxf(y[i] * up * inverse, -127.0f), 127.0f) + 12582912.0f;
    bits[i] = __float_as_uint(whole);
    y[i] = (whole - 12582912.0f) * step;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 low = __byte_perm(bits[4 * i], bits[4 * i + 1], 0x0040), high = __byte_perm(bits[4 * i + 2], bits[4 * i + 3], 0x0040);
    words[i] = __byte_perm(low, high, 0x5410);
  }
  if (writes) *(uint2*)(codes + threadIdx.x % 32 / FEW * 8) = make_uint2(words[0], words[1]);
  return step;
}
#endif
