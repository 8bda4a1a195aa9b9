// What emulated lanes do to memory, and whether a GPU would let them: bounds, alignment, copies that have not landed, and
// accesses that nothing puts in order. Shared memory is full of NaN at first, as some of it may be read for nothing.
//
// Two accesses to a word, one of them a write, are in order if one lane made both; if a barrier of the warp, the block or the
// cluster lies between them; if a lane of the later one's block has seen the earlier one's counted, each behind or before a barrier
// of its block, or of its warp; or if they belong to different kernels, of which one had ended: the kernel before once the lane has
// waited for it, an earlier one also if the kernel before let this one start only after that. Shuffles and matrix
// instructions bring lanes together, but order no memory. Who runs first in the emulator does not matter: every access is
// held against those that the word has seen.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "lane_runtime.h"

constexpr int SEVERAL = -1;
constexpr int SHARED_LIMIT = 232448;      // bytes of a block on Hopper
constexpr unsigned SHARED_BEGIN = 1024;   // the address where a block's own shared memory begins: not 0
constexpr int MOST_BLOCKS = 16;           // of a cluster
alignas(1024) inline char shared_memory[MOST_BLOCKS][SHARED_LIMIT];

// An access: by whom, in which launch, and how many barriers of its cluster, its block, its team and its warp came before. At a
// cluster's a lane arrives, and waits later.
struct Access {
  unsigned launch;
  int cluster, block, team, warp, thread;
  unsigned cluster_arrivals, cluster_waits, block_barriers, team_barriers, warp_barriers;
};
struct Word { Access write, read; bool in_flight; };
struct Page { Word words[1024]; };

// Launches up to these had ended when this one began, and when the one before ended.
inline unsigned ended_at_start = 0, ended_before_previous = 0;

// Lanes of the blocks that run now which have seen that others had counted these.
struct Seen { Access by; std::vector<Access> counted; };
inline std::vector<Seen> sightings;

// Whether a barrier lies between what two lanes of a block did, or one lane did both.
inline bool follows(const Access& first, const Access& then) {
  return first.block == then.block && (first.thread == then.thread || first.block_barriers < then.block_barriers ||
                                       (first.warp == then.warp && first.warp_barriers < then.warp_barriers));
}
inline bool counted(const Access& past, const Access& now) {
  return std::any_of(sightings.begin(), sightings.end(), [&](const Seen& one) {
    return one.by.launch == now.launch && follows(one.by, now) &&
           std::any_of(one.counted.begin(), one.counted.end(),
                       [&](const Access& by) { return by.launch == past.launch && follows(past, by); });
  });
}

inline bool ordered(const Access& past, const Access& now, bool waited) {
  if (past.launch == 0) return true;
  if (past.launch != now.launch)
    return past.launch <= ended_at_start || (waited && (past.launch + 1 == now.launch || past.launch <= ended_before_previous));
  if (past.cluster != now.cluster) return counted(past, now);
  if (past.cluster_arrivals < now.cluster_waits) return true;
  if (past.block != now.block) return false;
  if (past.warp != now.warp)
    return past.block_barriers < now.block_barriers || (past.team == now.team && past.team_barriers < now.team_barriers);
  return past.thread == now.thread || past.warp_barriers < now.warp_barriers;
}
// Joins a read to the earlier ones, keeping what the next write must be ordered with.
inline void add(Access& past, const Access& now) {
  if (past.launch != now.launch) past = now;
  else if (past.cluster != now.cluster) past.cluster = past.block = SEVERAL;
  else if (past.cluster_arrivals < now.cluster_waits) past = now;
  else if (past.block != now.block) past.block = SEVERAL;
  else if (past.block_barriers < now.block_barriers) past = now;
  else if (past.team != now.team) past.team = past.warp = SEVERAL;
  else if (past.team_barriers < now.team_barriers) past = now;
  else if (past.warp != now.warp) past.warp = SEVERAL;
  else if (past.warp_barriers < now.warp_barriers) past = now;
  else if (past.thread != now.thread) past.thread = SEVERAL;
}

class Memory {
 public:
  const Launch* launch = nullptr;
  uintptr_t static_begin = 0, static_end = 0;

  void forget_shared() { sightings.clear(), clear(shared_); memset(shared_memory, 0xff, launch->cluster * SHARED_LIMIT); }
  void forget_all() { clear(global_); }
  void acquire(const Access& now, const std::vector<Access>& others) { sightings.push_back({now, others}); }

  // Empty, or why a lane must not touch [at, at + bytes): `report` is where the words go. `rank`: whose shared memory it may be.
  const char* check(uintptr_t at, int bytes, bool write, bool aligned, const Access& now, bool waited, int rank) {
    const char* verb = write ? "writes" : "reads";
    const uintptr_t begin = (uintptr_t)shared_memory[rank], end = begin + launch->shared_bytes;
    const bool dynamic = at >= begin && at < begin + SHARED_LIMIT, fixed = at >= static_begin && at < static_end;
    if (dynamic && at + bytes > end)
      return say("%s %d bytes at offset %ld of shared memory, of which the launch has %d", verb, bytes, at - begin,
                 launch->shared_bytes);
    if (fixed && at + bytes > static_end) return say("%s %d bytes past the end of its static shared memory", verb, bytes);
    if (!dynamic && !fixed && !there(at, bytes)) return say("%s %d bytes at %#lx, where there is no tensor", verb, bytes, at);
    if (aligned && at % bytes) return say("%s %d bytes at an address that is no multiple of that", verb, bytes);
    for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; word++) {
      Word& seen = find(dynamic || fixed ? shared_ : global_, word);
      const char* place = dynamic ? "shared memory" : fixed ? "static shared memory" : "global memory";
      const long offset = dynamic ? word * 4 - begin : fixed ? word * 4 - static_begin : 0;
      if (seen.in_flight) return say("%s %s at offset %ld, where a copy has not landed", verb, place, offset);
      for (const Access* past : {&seen.write, write ? &seen.read : nullptr}) {
        if (past == nullptr || ordered(*past, now, waited)) continue;
        const char* did = past == &seen.write ? "wrote" : "read";
        if (past->launch != now.launch)
          return say("%s %s that a kernel before %s, without having waited for it", verb, place, did);
        if (past->block != now.block) return say("%s %s that another block %s", verb, place, did);
        const int thread = past->warp == SEVERAL ? 0 : past->thread == SEVERAL ? past->warp * 32 : past->thread;
        if (!dynamic && !fixed) return say("%s %s, which thread %d %s with no barrier between", verb, place, thread, did);
        return say("%s %s at offset %ld, which thread %d %s with no barrier between", verb, place, offset, thread, did);
      }
      write ? void(seen.write = now) : add(seen.read, now);
    }
    return nullptr;
  }

  void fly(uintptr_t at, int bytes) {
    memset((void*)at, 0xff, bytes);
    for (uintptr_t word = at / 4; word < (at + bytes) / 4; word++) find(shared_, word).in_flight = true;
  }
  void land(uintptr_t at, const char* data, int bytes, const Access& now) {
    memcpy((void*)at, data, bytes);
    for (uintptr_t word = at / 4; word < (at + bytes) / 4; word++) find(shared_, word) = {now, {}, false};
  }

  bool there(uintptr_t at, int bytes) const {
    int low = 0, high = launch->ranges;  // of the ranges before `low` all begin at or before `at`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (launch->memory[middle][0] <= at) low = middle + 1;
      else high = middle;
    }
    return low > 0 && at + bytes <= launch->memory[low - 1][1];
  }

 private:
  using Pages = std::unordered_map<uintptr_t, std::unique_ptr<Page>>;
  Pages shared_, global_;
  Pages* last_pages_ = nullptr;
  uintptr_t last_number_ = 0;
  Page* last_ = nullptr;
  char report_[200];

  void clear(Pages& pages) { pages.clear(), last_pages_ = nullptr; }
  Word& find(Pages& pages, uintptr_t word) {
    if (last_pages_ != &pages || last_number_ != word / 1024) {
      std::unique_ptr<Page>& page = pages[word / 1024];
      if (!page) page = std::make_unique<Page>();
      last_pages_ = &pages, last_number_ = word / 1024, last_ = page.get();
    }
    return last_->words[word % 1024];
  }
  template <typename... Values>
  const char* say(const char* format, Values... values) {
    snprintf(report_, sizeof report_, format, values...);
    return report_;
  }
};
