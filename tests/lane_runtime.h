// What an emulated kernel and the emulator's runtime say to each other.
#pragma once

struct Index { unsigned x, y, z; };
Index thread_index();
Index block_index();
Index grid_size();

// What lanes of a warp, of a block or of a cluster of blocks do together. Only barriers order memory.
void wait_for_warp();
void wait_for_block();
void wait_for_team(int number, int count);  // until `count` lanes of the block wait for this one
void arrive_at_cluster();
void wait_for_cluster();  // until all lanes of the cluster have arrived as often as this one
unsigned count_block(unsigned* counter, int blocks);  // and order what this lane's block does from now on behind what the others did
void see_counted(const unsigned* counter, unsigned least);  // likewise; an error if so many have not been counted
unsigned exchange(unsigned value, int from);
unsigned votes(bool mine);  // a bit for each lane

// C + A B of a warp, as the PTX manual lays fragments out: A [16, K], B [K, 8].
enum Numbers { FLOAT16, BFLOAT16, TF32 };
struct Four { float at[4]; };
struct Operands { unsigned a[4], b[2]; Numbers numbers; int k; };
Four multiply(Four c, Operands operands);

// Shared memory by its address, and copies into it that land when the lane that asked for them waits.
char* dynamic_shared();
unsigned shared_address(const void* at);
void load_shared(void* to, unsigned at, int bytes);
void store_shared(unsigned at, const void* from, int bytes);
void store_shared_of(unsigned at, int rank, const void* from, int bytes);  // of a block of the cluster
void copy_later(unsigned to, const void* from, int bytes);
void commit_copies();
void land_copies(int pending);

void let_next_start();
void wait_for_previous();
float fma_towards_zero(float x, float y, float z);

// One launch: a grid of columns x rows blocks, `cluster` of them at a time, of threads in teams of `team`, which have barriers of
// their own; `memory`: begins and ends of the memory that there is, in order.
struct Launch {
  const char* name;
  int columns, rows, cluster, threads, team, shared_bytes, before_previous_ends, ranges;
  const unsigned long long (*memory)[2];
};
// The first fault of a launch, and the place in the code.
struct Failure { const char* what; const void* where; };
const Failure* run_grid(void (*lane)(const void*), const void* params, int param_bytes, const Launch& launch,
                        const char* static_begin, const char* static_end);
