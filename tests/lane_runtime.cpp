// Runs a kernel's lanes on a CPU, each with a stack of its own, one at a time and in a fixed order: a lane goes on until it
// must wait for others. The compiler reports each access to memory (-fsanitize=thread) and undefined behaviour
// (-fsanitize=undefined) to the functions at the end, which stand in for its own libraries.
#include "lane_runtime.h"

#include <csetjmp>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "lane_memory.h"

#define CALLER __builtin_return_address(0)

namespace {

constexpr int WARP = 32, MOST_THREADS = 4096;  // of a cluster
constexpr size_t STACK = 1 << 17;
enum State { READY, WARP_BARRIER, TEAM_BARRIER, BLOCK_BARRIER, CLUSTER_BARRIER, EXCHANGE, VOTE, MULTIPLY, ENDED };
const char* const WAITING_FOR[] = {"nothing", "__syncwarp", "a team's barrier", "__syncthreads", "a cluster's barrier", "a shuffle", "a vote", "a matrix product", "its end"};

struct Copy { uintptr_t to; int bytes; char data[16]; };
struct Lane {
  jmp_buf at;
  ucontext_t start;
  bool started;
  State state;
  bool waited;  // for the kernel before
  Access now;
  unsigned value;
  int from, team, team_size;
  Four c;
  Operands operands;
  std::vector<std::vector<Copy>> copies;  // groups, the last one not committed yet
};

Memory memory;
std::vector<Lane> lanes;
Lane* current = nullptr;
jmp_buf scheduler;
unsigned launches = 0;
bool let_start_early, some_waited;  // a lane of the launch let the next one start before it waited itself; one has waited
Index grid;
std::map<unsigned*, std::vector<Access>> arrivals;  // the lanes that counted their blocks, since a counter was zero
Access last_to[MOST_BLOCKS];  // that another block made, to each block's shared memory
char* stacks = nullptr;  // behind them the kernel's parameters
void (*body)(const void*) = nullptr;
std::string failure_text;
Failure failure;

[[noreturn]] void leave() { _longjmp(scheduler, 1); }

[[noreturn]] void fail(const void* where, const std::string& what) {
  const int thread = current->now.thread;
  failure_text = std::string(memory.launch->name) + ", block " + std::to_string(current->now.block) + ", thread " +
                 std::to_string(thread) + ": " + what;
  failure = {failure_text.c_str(), where};
  leave();
}

void wait(State state) {
  current->state = state;
  if (!_setjmp(current->at)) leave();
}

int rank_of_lane() { return current->now.block % memory.launch->cluster; }

void access(const void* where, const void* at, int bytes, bool write, bool aligned, int rank = -1) {
  if (current == nullptr || (at >= stacks && at < stacks + (MOST_THREADS + 1) * STACK)) return;
  if (rank < 0) rank = rank_of_lane();
  if (const char* what = memory.check((uintptr_t)at, bytes, write, aligned, current->now, current->waited, rank)) fail(where, what);
}

void enter() {
  body(stacks + MOST_THREADS * STACK);
  if (!ordered(last_to[rank_of_lane()], current->now, true)) fail(nullptr, "ends, though another block may yet write to it");
  current->state = ENDED;
  leave();
}

void resume(Lane& lane) {
  current = &lane;
  if (!_setjmp(scheduler)) {
    if (lane.started) _longjmp(lane.at, 1);
    lane.started = true;
    setcontext(&lane.start);
  }
  current = nullptr;
}

double half_of(unsigned pair, int index, Numbers numbers) {
  const unsigned short bits = pair >> 16 * index;
  if (numbers == BFLOAT16) {
    const unsigned wide = (unsigned)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (double)x;
}
// tf32 has 10 bits of fraction; the units ignore the others.
double short_float(unsigned bits) {
  bits &= 0xffffe000u;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void multiply_all(Lane* warp) {
  const auto [_, __, numbers, K] = warp->operands;
  double a[16][16], b[16][8];
  for (int k = 0; k < K; k++) {
    const int quad = numbers == TF32 ? k % 4 : k % 8 / 2, part = numbers == TF32 ? k / 4 : k / 8;
    const auto value = [&](unsigned bits) { return numbers == TF32 ? short_float(bits) : half_of(bits, k % 2, numbers); };
    for (int row = 0; row < 16; row++) a[row][k] = value(warp[row % 8 * 4 + quad].operands.a[row / 8 + part * 2]);
    for (int column = 0; column < 8; column++) b[k][column] = value(warp[column * 4 + quad].operands.b[part]);
  }
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 4; i++) {
      double sum = warp[lane].c.at[i];
      for (int k = 0; k < K; k++) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      warp[lane].c.at[i] = (float)sum;
    }
  }
}

// All lanes of a warp have come to the same place: what they came for, then they may go on.
void complete(Lane* warp) {
  unsigned values[WARP], votes = 0;
  for (int i = 0; i < WARP; i++) values[i] = warp[i].value, votes |= (warp[i].value != 0) << i;
  if (warp->state == MULTIPLY) multiply_all(warp);
  for (int i = 0; i < WARP; i++) {
    Lane& lane = warp[i];
    if (lane.state == EXCHANGE) lane.value = values[lane.from];
    if (lane.state == VOTE) lane.value = votes;
    if (lane.state == WARP_BARRIER) lane.now.warp_barriers++;
    lane.state = READY;
  }
}

// Whether all of `count` lanes wait for the same; else the report says which two do not.
bool together(Lane* first, int count) {
  for (int i = 1; i < count; i++) {
    if (first[i].state == first->state) continue;
    current = &first[i];
    if (!_setjmp(scheduler))
      fail(nullptr, std::string("has come to ") + WAITING_FOR[first[i].state] + ", thread " +
                        std::to_string(first->now.thread) + " to " + WAITING_FOR[first->state]);
    current = nullptr;
    return false;
  }
  return true;
}

// Until all lanes of the warp have ended or wait for the team, the block or the cluster.
bool advance(Lane* warp) {
  for (;;) {
    for (int i = 0; i < WARP; i++) {
      resume(warp[i]);
      if (failure.what) return false;
    }
    if (!together(warp, WARP)) return false;
    if (warp->state == TEAM_BARRIER || warp->state == BLOCK_BARRIER || warp->state == CLUSTER_BARRIER || warp->state == ENDED) return true;
    complete(warp);
  }
}

// Whether a team has come together, whose lanes may go on.
bool release_team(Lane* block, int threads) {
  for (int i = 0; i < threads; i += WARP) {
    const auto waits = [&](const Lane& lane) { return lane.state == TEAM_BARRIER && lane.team == block[i].team; };
    if (block[i].state != TEAM_BARRIER || std::count_if(block, block + threads, waits) != block[i].team_size) continue;
    const int team = block[i].team;
    for (int t = 0; t < threads; t++)
      if (block[t].state == TEAM_BARRIER && block[t].team == team)
        block[t].state = READY, block[t].now.warp_barriers++, block[t].now.team_barriers++;
    return true;
  }
  return false;
}

// Until all lanes of the block have ended or wait for the cluster.
bool run_block(Lane* block, int threads) {
  for (;;) {
    for (int first = 0; first < threads; first += WARP)
      if (block[first].state == READY && !advance(block + first)) return false;
    if (release_team(block, threads)) continue;
    if (!together(block, threads)) return false;
    if (block->state == TEAM_BARRIER) {
      current = block;
      if (!_setjmp(scheduler)) fail(nullptr, "waits for a team of others than come to its barrier");
      current = nullptr;
      return false;
    }
    if (block->state != BLOCK_BARRIER) return true;
    for (int t = 0; t < threads; t++) block[t].state = READY, block[t].now.warp_barriers++, block[t].now.block_barriers++;
  }
}

bool run_cluster(int threads) {
  for (;;) {
    bool goes_on = false, ended = true;
    for (size_t first = 0; first < lanes.size(); first += threads) {
      Lane* block = &lanes[first];
      if (block->state == CLUSTER_BARRIER) {
        const auto arrived = [&](const Lane& lane) { return lane.now.cluster_arrivals > block->now.cluster_waits; };
        if (std::all_of(lanes.begin(), lanes.end(), arrived))
          for (int t = 0; t < threads; t++)
            block[t].state = READY, block[t].now.cluster_waits++;  // for those that arrived, not for what they did since
      }
      if (block->state == READY) {
        if (!run_block(block, threads)) return false;
        goes_on = true;
      }
      ended &= block->state == ENDED;
    }
    if (ended) return true;
    if (!goes_on) {
      current = &lanes[0];
      if (!_setjmp(scheduler)) fail(nullptr, "waits for a block of its cluster that does not arrive");
      current = nullptr;
      return false;
    }
  }
}

void start_lanes(const Launch& launch, int cluster) {
  lanes = std::vector<Lane>(launch.cluster * launch.threads);
  for (size_t i = 0; i < lanes.size(); i++) {
    Lane& lane = lanes[i];
    const int t = i % launch.threads;
    lane.state = READY, lane.waited = !launch.before_previous_ends, lane.copies.resize(1);
    lane.now = {launches, cluster, cluster * launch.cluster + (int)i / launch.threads, t / launch.team, t / WARP, t, 0, 0, 0, 0, 0};
    getcontext(&lane.start);
    lane.start.uc_stack.ss_sp = stacks + i * STACK, lane.start.uc_stack.ss_size = STACK;
    makecontext(&lane.start, enter, 0);
  }
}

}  // namespace

const Failure* run_grid(void (*lane)(const void*), const void* params, int param_bytes, const Launch& launch,
                        const char* static_begin, const char* static_end) {
  if (stacks == nullptr)
    stacks = (char*)mmap(nullptr, (MOST_THREADS + 1) * STACK, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  memcpy(stacks + MOST_THREADS * STACK, params, param_bytes);
  memory.launch = &launch, memory.static_begin = (uintptr_t)static_begin, memory.static_end = (uintptr_t)static_end;
  if (launch.before_previous_ends) {
    const unsigned at_start = ended_at_start, for_waiting = ended_before_previous + 2 >= launches ? launches - 1 : ended_before_previous;
    ended_before_previous = some_waited ? for_waiting : at_start;
    ended_at_start = some_waited && !let_start_early ? for_waiting : at_start;
  } else {
    memory.forget_all();
    ended_at_start = ended_before_previous = launches;
  }
  let_start_early = false, some_waited = !launch.before_previous_ends;
  body = lane, failure = {}, launches++, grid = {(unsigned)launch.columns, (unsigned)launch.rows, 1};
  for (int i = 0; i < launch.columns * launch.rows / launch.cluster && !failure.what; i++) {
    memory.forget_shared();
    std::fill(last_to, last_to + MOST_BLOCKS, Access{});
    start_lanes(launch, i);
    run_cluster(launch.threads);
  }
  return &failure;
}

Index thread_index() { return {(unsigned)current->now.thread, 0, 0}; }
Index block_index() { return {(unsigned)current->now.block % grid.x, (unsigned)current->now.block / grid.x, 0}; }
Index grid_size() { return grid; }

void wait_for_warp() { wait(WARP_BARRIER); }
void wait_for_block() { wait(BLOCK_BARRIER); }
void wait_for_team(int number, int count) {
  if (number < 1 || number > 15) fail(CALLER, "waits at a barrier that there is not");
  if (count != memory.launch->team) fail(CALLER, "waits for others than its team");
  current->team = number, current->team_size = count;
  wait(TEAM_BARRIER);
}
void arrive_at_cluster() { current->now.cluster_arrivals++; }
void wait_for_cluster() { wait(CLUSTER_BARRIER); }
unsigned exchange(unsigned value, int from) {
  current->value = value, current->from = from;
  wait(EXCHANGE);
  return current->value;
}
unsigned count_block(unsigned* counter, int blocks) {
  const unsigned before = *counter;
  const Access& now = current->now;
  if (!memory.there((uintptr_t)counter, 4)) fail(CALLER, "counts where there is no tensor");
  if (before >= (unsigned)blocks) fail(CALLER, "finds a counter that is past the number of blocks");
  if (before == 0) arrivals[counter].clear();
  std::vector<Access>& others = arrivals[counter];
  memory.acquire(now, others);
  others.push_back(now);
  *counter = before + 1 == (unsigned)blocks ? 0 : before + 1;
  return before;
}
void see_counted(const unsigned* counter, unsigned least) {
  if (!memory.there((uintptr_t)counter, 4)) fail(CALLER, "waits for a count where there is no tensor");
  if (*counter < least) fail(CALLER, "waits for blocks that none before it has counted");
  memory.acquire(current->now, arrivals[(unsigned*)counter]);
}
unsigned votes(bool mine) {
  current->value = mine;
  wait(VOTE);
  return current->value;
}
Four multiply(Four c, Operands operands) {
  current->c = c, current->operands = operands;
  wait(MULTIPLY);
  return current->c;
}

char* dynamic_shared() { return shared_memory[rank_of_lane()]; }
unsigned shared_address(const void* at) { return (const char*)at - dynamic_shared() + SHARED_BEGIN; }
void load_shared(void* to, unsigned at, int bytes) {
  const char* from = dynamic_shared() + (int)(at - SHARED_BEGIN);
  access(CALLER, from, bytes, false, true);
  memcpy(to, from, bytes);
}
void store_shared(unsigned at, const void* from, int bytes) {
  char* to = dynamic_shared() + (int)(at - SHARED_BEGIN);
  access(CALLER, to, bytes, true, true);
  memcpy(to, from, bytes);
}
void store_shared_of(unsigned at, int rank, const void* from, int bytes) {
  const Launch& launch = *memory.launch;
  if (rank < 0 || rank >= launch.cluster) fail(CALLER, "writes to a block that its cluster has not");
  if (rank != rank_of_lane()) {
    if (current->now.cluster_waits == 0) fail(CALLER, "writes to a block that may not have begun");
    for (int i = 0; i < launch.threads; i++)
      if (lanes[rank * launch.threads + i].state == ENDED) fail(CALLER, "writes to a block that may have ended");
    Access& last = last_to[rank];
    if (last.launch == 0 || last.cluster_arrivals <= current->now.cluster_arrivals) last = current->now;
  }
  char* to = shared_memory[rank] + (int)(at - SHARED_BEGIN);
  access(CALLER, to, bytes, true, true, rank);
  memcpy(to, from, bytes);
}
void copy_later(unsigned to, const void* from, int bytes) {
  char* target = dynamic_shared() + (int)(to - SHARED_BEGIN);
  access(CALLER, from, bytes, false, true);
  access(CALLER, target, bytes, true, true);
  memory.fly((uintptr_t)target, bytes);
  Copy copy = {(uintptr_t)target, bytes, {}};
  memcpy(copy.data, from, bytes);
  current->copies.back().push_back(copy);
}
void commit_copies() { current->copies.emplace_back(); }
void land_copies(int pending) {
  std::vector<std::vector<Copy>>& groups = current->copies;
  while ((int)groups.size() - 1 > pending) {
    for (const Copy& copy : groups.front()) memory.land(copy.to, copy.data, copy.bytes, current->now);
    groups.erase(groups.begin());
  }
}
void let_next_start() { let_start_early |= !current->waited; }
void wait_for_previous() { current->waited = some_waited = true; }
float fma_towards_zero(float x, float y, float z) {
  fesetround(FE_TOWARDZERO);
  volatile float a = x, b = y, sum = fmaf(a, b, z);
  fesetround(FE_TONEAREST);
  return sum;
}

// ---- What the compiler calls
extern "C" {
#define ACCESSES(BYTES)                                                                           \
  void __tsan_read##BYTES(void* at) { access(CALLER, at, BYTES, false, true); }                   \
  void __tsan_write##BYTES(void* at) { access(CALLER, at, BYTES, true, true); }                   \
  void __tsan_unaligned_read##BYTES(void* at) { access(CALLER, at, BYTES, false, true); }         \
  void __tsan_unaligned_write##BYTES(void* at) { access(CALLER, at, BYTES, true, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { access(CALLER, at, bytes, false, false); }
void __tsan_write_range(void* at, size_t bytes) { access(CALLER, at, bytes, true, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

struct Place { const char* file; unsigned line, column; };
#define UNDEFINED(NAME, WHAT)                                                                     \
  void __ubsan_handle_##NAME(const Place* at) {                                                   \
    if (current) fail(nullptr, std::string(WHAT ", ") + at->file + ":" + std::to_string(at->line)); \
  }
UNDEFINED(type_mismatch_v1, "a null pointer, or one that is not aligned")
UNDEFINED(add_overflow, "integer overflow")
UNDEFINED(sub_overflow, "integer overflow")
UNDEFINED(mul_overflow, "integer overflow")
UNDEFINED(negate_overflow, "integer overflow")
UNDEFINED(divrem_overflow, "division by zero")
UNDEFINED(shift_out_of_bounds, "a shift by more than the bits there are")
UNDEFINED(out_of_bounds, "an index past its array")
UNDEFINED(pointer_overflow, "a pointer past the end of the address space")
UNDEFINED(load_invalid_value, "a bool that is neither true nor false")
UNDEFINED(float_cast_overflow, "a float that its integer cannot hold")
}
