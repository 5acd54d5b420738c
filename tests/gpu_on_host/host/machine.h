// The simulated GPU: lanes (fibers), warps, blocks, copies under way, the scheduler that interleaves them, and what is
// known to have happened before what. One launch runs at a time, on one host thread.
#pragma once

#include <array>
#include <string>
#include <unordered_map>

#include "fiber.h"
#include "shadow.h"

namespace sim {

constexpr u32 kLanes = 32, kBars = 16, kEngines = 64;  // kEngines: mbarriers per block that count copies
constexpr u32 kNone = ~0u;

enum class State : u8 { kReady, kDone, kWarp, kBar, kMbar, kPoll };

struct Poll {
  const u32* p = nullptr;
  u32 seen = 0;
  u64 progress = 0;
};

struct Lane {
  void* stack = nullptr;
  u32 id = 0, block = 0, thread = 0, warp = 0, lane = 0;  // warp: of the grid
  u32 tick = 1;
  State state = State::kReady;
  bool timed_out = false;             // woken because nothing else could run
  u16 place = 0;                      // of the call it is in
  u32 waits_for = 0, waits_more = 0;  // bar id, threads; mbarrier address, parity
  const u32* polls = nullptr;
  Poll last[2];  // by ld_acquire, by ld_relaxed
  std::vector<Learnt> learnt;
  Snapshot fenced;    // what it knew at its last fence_gpu
  Snapshot proxied;   // what it knew at its last fence_proxy_async
  Snapshot unfenced;  // what it read relaxed; a fence_gpu makes it known
  u32 operands[10];   // of the meeting of its warp
  u32 results[4];
};

struct Warp {
  u32 ready = 0, done = 0, met = 0;  // masks of lanes
  u32 listed = kNone;                // place in the list of runnable warps
  u32 priority = 0, turn = 0;
  Call call{};
  u16 place = 0;
  Clock known;
  Clock fenced;  // what fences of its lanes or, through bar_sync, of its block have covered
  bool has_fenced = false;
};

struct Bar {
  u32 n_threads = 0;
  std::vector<u32> lanes;
  u16 place = 0;
};

struct Mbar {
  u32 address = 0, count = 0, pending = 0, phase = 0;
  i64 tx = 0;
  u32 engine = kNone;    // component of the clock
  u32 engine_phase = 0;  // 1 + phase of the last copy
  u32 init_lane = 0, init_tick = 0;
  bool fenced = false;  // for the copy engine
  u64 source = 0;
  Clock arrived;       // of all arrivals so far
  Snapshot completed;  // of all completed phases
  std::vector<u32> waiters;
};

struct Copy {
  u32 block, dst, mbar, phase;
  const u8* src;
  std::vector<std::pair<u32, u32>> pieces;  // (offset, bytes) still to land
};

struct Block {
  Region shared;
  std::vector<u8> memory;
  std::vector<u32> mbar_at;  // per 8 bytes: 1 + index into mbars
  std::vector<Mbar> mbars;
  std::array<Bar, kBars> bars;
  u32 n_engines = 0, n_done = 0;
  bool bar_fenced = false;   // a fence since the last bar_sync
  Snapshot released, could;  // at its last release: what was published, what a fence would have added
  u16 released_at = 0;
};

// A word used by red, atom, ld_acquire, ld_relaxed or st_relaxed.
struct Word {
  u32* value = nullptr;
  u64 source = 0;
  Clock released;
  Snapshot snapshot;  // of it, made when needed
  std::vector<u32> waiters;
};

struct Name {
  u32 begin, end;
  std::string name;
};

enum class Policy : u32 { kMixed, kRandom, kLong, kRoundRobin, kPriority, kCount };
enum class Mode : u8 { kOn, kOff, kUnordered };

struct Options {
  u64 seed = 1;
  Policy policy = Policy::kMixed;
  bool stop_at_deadlock = true;
  u64 idle_rounds = 40, idle_cycles = 1000, max_steps = 200'000'000, max_calls = 2'000'000'000;
  i64 expect_tx_delta = 0;
  const u32* abort_flag = nullptr;
};

using Entry = void (*)(const void* launch, u32 smem);

struct Stats {
  u64 calls, steps, switches, idle, copies, polls;
};

class Machine {
 public:
  Machine(u32 n_blocks, u32 n_threads, u32 shared_bytes);

  int run(Entry entry, const void* launch);

  bool add_region(void* data, size_t bytes, const char* name, Kind kind, bool initialised);
  void remove_regions() { regions_.clear(); }
  void name_shared(u32 offset, u32 bytes, const char* name);

  Options options;
  Stats stats{};
  std::array<Mode, static_cast<size_t>(Site::kCount)> modes{};
  std::array<u64, static_cast<size_t>(Site::kCount)> counts{};
  std::string error;

  // scheduler.cpp
  u64 random();
  bool chance(u32 one_in) { return random() % one_in == 0; }
  void called() {
    if ((++stats.calls & 0xFFFFF) == 0) overdue();
  }
  void overdue();
  Mode called_at(Site site) {
    called();
    ++counts[static_cast<u32>(site)];
    return modes[static_cast<u32>(site)];
  }
  Mode reach(Site site) {  // where lanes may change turns, unless it is left out
    const Mode mode = called_at(site);
    if (mode != Mode::kOff) maybe_yield();
    return mode;
  }
  void maybe_yield();
  void block(State state);  // until woken
  void wake(u32 lane);
  void wake_all(std::vector<u32>& lanes);
  [[noreturn]] void fiber_main();
  [[noreturn]] void fail(const std::string& text);
  void progress() { ++progress_; }

  // ordering.cpp
  bool knows(const Lane& lane, u32 component, u32 tick) const;
  Snapshot knowledge(Lane& lane);  // all the lane knows, its own past included; ends its tick
  Clock gpu_visible(const Lane& lane) const;
  void learn(Lane& lane, u64 source, const Snapshot& clock);
  u64 new_source() { return ++sources_; }
  void gather(Warp& warp, u32 first);  // the warp learns what its lanes have learnt and done
  void meet(const std::vector<u32>& lanes);

  // memory.cpp
  void read(const Access& access);
  void write(const Access& access, bool atomic);
  void atomic_read(const Access& access);
  void copy_begins(Mbar& bar, u32 dst, u32 bytes, u16 place);

  // regions.cpp
  Region& find(const void* p, u32 bytes, u16 place);
  size_t shared_offset(u32 a, u32 bytes, u32 align, u16 place);

  // warp.cpp
  void meet_warp(Call call, u16 place);

  // copies.cpp
  Mbar& mbar(u32 a, u16 place);
  void arrive(Mbar& bar, i64 tx, u16 place, bool ordered);
  void end_phase(Mbar& bar);
  void copy_step();
  void check_drained(u32 block);

  // grid.cpp
  Word& word(const u32* p, u16 place);
  Snapshot released(Word& word);
  void publish(Word& word, bool replace, u16 place);
  void sees(const Clock& released);
  void changed(const u32* p, Word& word);
  u32 poll(const u32* p, Word& word, u16 place, bool any);

  // report.cpp
  u16 place(Call call, At at, Site site = Site::kCount);
  std::string describe(u16 place) const;
  std::string describe(const Lane& lane) const;
  std::string describe(u32 component, u16 place) const;
  std::string location(const Region& region, size_t offset) const;
  std::string deadlock() const;
  std::string missing(u32 component, u32 tick, const Region& region) const;
  [[noreturn]] void race(const Access& access, size_t offset, u32 component, u32 tick, u16 earlier, const char* doing);

  u32 n_blocks, n_threads, shared_bytes, n_lanes;
  Lane* current = nullptr;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Copy> copies;
  bool checking = true;
  u64 skipped_cycles = 0;

 private:
  friend struct Shadow;
  void reset();
  void reset_shadow();
  void hide_memory();
  void show_memory();
  Lane& pick();
  void give_way();
  void idle();
  void list(Warp& warp);
  void unlist(Warp& warp);
  [[noreturn]] void leave();
  void choose_policy();
  std::string waiting(const Lane& lane) const;

  struct Place {
    Call call;
    const char* file;
    u32 line;
    Site site;
  };

  Stacks stacks_;
  std::vector<Region> regions_;  // by address
  size_t last_region_ = 0;
  std::vector<Name> names_;
  std::unordered_map<const u32*, Word> words_;
  std::vector<Readers> readers_;
  std::vector<u32> free_readers_;
  std::vector<std::array<Cell, 4>> bytes_;
  std::vector<u32> free_bytes_;
  std::vector<Place> places_;
  std::array<u16, 1024> place_cache_{};
  std::vector<u32> runnable_;
  void* main_stack_ = nullptr;
  Entry entry_ = nullptr;
  const void* launch_ = nullptr;
  u64 rng_ = 1, progress_ = 0, idle_progress_ = 0, idle_rounds_ = 0, sources_ = 0;
  u32 done_ = 0, current_warp_ = 0, copy_one_in_ = 4, lane_order_ = 0;
  Policy policy_ = Policy::kRandom;
};

extern Machine* machine;  // the one whose launch is running

}  // namespace sim
