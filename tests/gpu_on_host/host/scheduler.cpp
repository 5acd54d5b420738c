// Who runs next. Lanes give way only inside wrappers that synchronise or poll; races are found by the clocks whatever
// the schedule, so schedules need to differ only where lanes meet. All choices come from the seed.
#include <algorithm>

#include "machine.h"

namespace sim {

Machine* machine = nullptr;

Machine::Machine(u32 blocks_, u32 threads_, u32 shared_)
    : n_blocks(blocks_),
      n_threads(threads_),
      shared_bytes(shared_),
      n_lanes(blocks_ * threads_),
      lanes(n_lanes),
      warps(n_lanes / kLanes),
      blocks(n_blocks),
      stacks_(n_lanes) {
  for (u32 b = 0; b < n_blocks; ++b) {
    Block& block = blocks[b];
    block.memory.resize(shared_bytes + 16);
    Region& region = block.shared;
    region.name = "shared";
    region.data = region.live = block.memory.data();
    region.bytes = shared_bytes;
    region.kind = Kind::kShared;
    region.initialised = false;
    region.block = b;
  }
}

u64 Machine::random() {  // xorshift64*
  rng_ ^= rng_ >> 12;
  rng_ ^= rng_ << 25;
  rng_ ^= rng_ >> 27;
  return (rng_ * 0x2545F4914F6CDD1Dull) >> 33;
}

void Machine::choose_policy() {
  rng_ = options.seed * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
  for (int warm = 0; warm < 4; ++warm) random();
  policy_ = options.policy;
  if (policy_ == Policy::kMixed) policy_ = static_cast<Policy>(1 + random() % (static_cast<u32>(Policy::kCount) - 1));
  const u32 engines[] = {2, 8, 64, 1u << 30};  // a fast copy engine, slower ones, one that works when all others wait
  copy_one_in_ = engines[random() % 4];
  lane_order_ = random() % 3;
}

void Machine::reset() {
  error.clear();
  stats = {};
  counts = {};
  checking = true;
  skipped_cycles = progress_ = idle_progress_ = idle_rounds_ = done_ = 0;
  copies.clear();
  words_.clear();
  runnable_.clear();
  choose_policy();
  reset_shadow();

  const size_t components = n_lanes + n_blocks * kEngines;
  for (u32 i = 0; i < n_lanes; ++i) {
    Lane& lane = lanes[i];
    lane = {};
    lane.id = i;
    lane.block = i / n_threads;
    lane.thread = i % n_threads;
    lane.warp = i / kLanes;
    lane.lane = i % kLanes;
    lane.stack = stacks_.fresh(i);
  }
  for (Warp& warp : warps) {
    warp = {};
    warp.ready = ~0u;
    warp.known.assign(components, 0);
    warp.priority = random() % 1024;
    list(warp);
  }
  for (Block& block : blocks) {
    block.mbar_at.assign(shared_bytes / 8 + 1, 0);
    block.mbars.clear();
    block.mbars.reserve(shared_bytes / 8 + 1 < 1024 ? shared_bytes / 8 + 1 : 1024);
    block.bars = {};
    block.n_engines = block.n_done = 0;
    block.bar_fenced = false;
    block.released = block.could = nullptr;
    std::fill(block.memory.begin(), block.memory.end(), u8{0xFF});
    block.shared.cells.assign(shared_bytes / 4 + 1, {});
  }
}

// Of the launch before, only what has been written stays known.
void Machine::reset_shadow() {
  for (Region& region : regions_) {
    for (size_t chunk = 0; chunk < region.dirty.size(); ++chunk) {
      if (!region.dirty[chunk]) continue;
      region.dirty[chunk] = 0;
      const size_t end = std::min(region.cells.size(), (chunk + 1) * 1024);
      for (size_t i = chunk * 1024; i < end; ++i) {
        Cell& cell = region.cells[i];
        u8 written = cell.flags & kWritten;
        if (cell.flags & kSplit)
          for (const Cell& part : bytes_[cell.extra]) written |= part.flags & kWritten;
        cell = {};
        cell.flags = written;
      }
    }
  }
  readers_.clear();
  free_readers_.clear();
  bytes_.clear();
  free_bytes_.clear();
}

int Machine::run(Entry entry, const void* launch) {
  reset();
  machine = this;
  entry_ = entry;
  launch_ = launch;
  current = nullptr;
  hide_memory();
  Lane& first = pick();
  current = &first;
  sim_switch(&main_stack_, first.stack);
  show_memory();
  machine = nullptr;
  current = nullptr;
  return error.empty() ? 0 : 1;
}

void Machine::leave() {
  void* abandoned;
  sim_switch(&abandoned, main_stack_);
  __builtin_unreachable();
}

void Machine::fail(const std::string& text) {
  if (error.empty()) error = text;
  leave();
}

void Machine::fiber_main() {
  entry_(launch_, kSharedBase);
  Lane& lane = *current;
  lane.state = State::kDone;
  Warp& warp = warps[lane.warp];
  warp.ready &= ~(1u << lane.lane);
  warp.done |= 1u << lane.lane;
  if (!warp.ready) unlist(warp);
  progress();
  if (++blocks[lane.block].n_done == n_threads) check_drained(lane.block);
  if (++done_ == n_lanes) leave();
  Lane& next = pick();
  current = &next;
  void* abandoned;
  sim_switch(&abandoned, next.stack);
  __builtin_unreachable();
}

extern "C" void sim_fiber_main() { machine->fiber_main(); }

void Machine::list(Warp& warp) {
  if (warp.listed != kNone) return;
  warp.listed = static_cast<u32>(runnable_.size());
  runnable_.push_back(static_cast<u32>(&warp - warps.data()));
}

void Machine::unlist(Warp& warp) {
  if (warp.listed == kNone) return;
  const u32 last = runnable_.back();
  runnable_[warp.listed] = last;
  warps[last].listed = warp.listed;
  runnable_.pop_back();
  warp.listed = kNone;
}

// The next lane to run; lands copies and wakes pollers on the way.
Lane& Machine::pick() {
  for (;;) {
    if (++stats.steps > options.max_steps)
      fail("the launch did not end within " + std::to_string(stats.steps) + " steps");
    if (!copies.empty() && (runnable_.empty() || chance(copy_one_in_))) {
      copy_step();
      continue;
    }
    if (!runnable_.empty()) break;
    idle();
  }
  u32 chosen = current_warp_;
  const bool stay = current && warps[chosen].ready;
  switch (policy_) {
    case Policy::kLong:
      if (!stay) chosen = runnable_[random() % runnable_.size()];
      break;
    case Policy::kRoundRobin:
      if (!stay || chance(4)) do
          chosen = (chosen + 1) % static_cast<u32>(warps.size());
        while (!warps[chosen].ready);
      break;
    case Policy::kPriority:
      if (chance(512)) warps[random() % warps.size()].priority = random() % 1024;
      if (stay && !chance(8)) break;
      chosen = runnable_[0];
      for (u32 w : runnable_)
        if (warps[w].priority > warps[chosen].priority) chosen = w;
      break;
    default:
      if (!stay || chance(8)) chosen = runnable_[random() % runnable_.size()];
  }
  current_warp_ = chosen;
  Warp& warp = warps[chosen];
  u32 lane;
  if (lane_order_ == 0) {
    lane = __builtin_ctz(warp.ready);
  } else if (lane_order_ == 1) {
    lane = 31 - __builtin_clz(warp.ready);
  } else {  // the next one after the last
    const u32 above = warp.ready & (~0u << warp.turn);
    lane = __builtin_ctz(above ? above : warp.ready);
    warp.turn = (lane + 1) % kLanes;
  }
  return lanes[chosen * kLanes + lane];
}

// Another lane may run before this one goes on.
void Machine::maybe_yield() {
  if (policy_ != Policy::kLong && chance(4)) give_way();
}

// Many calls later: also a lane that spins without synchronising lets others run, and the launch ends some time.
void Machine::overdue() {
  if (stats.calls > options.max_calls)
    fail("the launch did not end within " + std::to_string(options.max_calls) + " calls");
  const u32 spinning = current_warp_;
  if (runnable_.size() > 1) current_warp_ = runnable_[(warps[spinning].listed + 1) % runnable_.size()];
  give_way();
}

void Machine::give_way() {
  Lane& self = *current;
  Lane& next = pick();
  if (&next == &self) return;
  ++stats.switches;
  current = &next;
  sim_switch(&self.stack, next.stack);
}

void Machine::block(State state) {
  Lane& self = *current;
  self.state = state;
  self.timed_out = false;
  Warp& warp = warps[self.warp];
  warp.ready &= ~(1u << self.lane);
  if (!warp.ready) unlist(warp);
  Lane& next = pick();
  if (&next == &self) return;  // woken meanwhile
  ++stats.switches;
  current = &next;
  sim_switch(&self.stack, next.stack);
}

void Machine::wake(u32 id) {
  Lane& lane = lanes[id];
  lane.state = State::kReady;
  Warp& warp = warps[lane.warp];
  warp.ready |= 1u << lane.lane;
  list(warp);
}

void Machine::wake_all(std::vector<u32>& waiting) {
  for (u32 id : waiting) wake(id);
  waiting.clear();
}

// Nothing can run and no bytes are under way: whoever polls looks again. If that changes nothing, nothing ever will.
void Machine::idle() {
  ++stats.idle;
  idle_rounds_ = progress_ == idle_progress_ ? idle_rounds_ + 1 : 0;
  idle_progress_ = progress_;
  if (options.stop_at_deadlock && idle_rounds_ > options.idle_rounds) fail(deadlock());
  bool polls = false;
  for (Lane& lane : lanes) {
    if (lane.state != State::kMbar && lane.state != State::kPoll) continue;
    polls = true;
    wake(lane.id);
    lane.timed_out = true;
  }
  if (!polls) fail(deadlock());
  for (Block& block : blocks)
    for (Mbar& bar : block.mbars) bar.waiters.clear();
  for (auto& [p, word] : words_) word.waiters.clear();
  skipped_cycles += options.idle_cycles;
}

}  // namespace sim
