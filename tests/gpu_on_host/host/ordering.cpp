// What a lane knows to have happened. A warp shares one clock, brought up to date where its lanes meet in warp_sync or
// bar_sync; what a lane acquires in between is its own, as a list of snapshots.
#include "machine.h"

namespace sim {

bool Machine::knows(const Lane& lane, u32 component, u32 tick) const {
  if (component == lane.id) return true;
  if (warps[lane.warp].known[component] >= tick) return true;
  for (const Learnt& learnt : lane.learnt)
    if ((*learnt.clock)[component] >= tick) return true;
  return false;
}

Snapshot Machine::knowledge(Lane& lane) {
  auto clock = std::make_shared<Clock>(warps[lane.warp].known);
  for (const Learnt& learnt : lane.learnt) join(*clock, *learnt.clock);
  (*clock)[lane.id] = lane.tick++;
  return clock;
}

void Machine::learn(Lane& lane, u64 source, const Snapshot& clock) {
  if (!clock) return;
  for (Learnt& learnt : lane.learnt) {
    if (!source || learnt.source != source) continue;
    learnt.clock = clock;
    return;
  }
  lane.learnt.push_back({source, clock});
  if (lane.learnt.size() < 8) return;
  auto all = std::make_shared<Clock>(*clock);  // a lane whose warp never meets: one clock of its own
  for (const Learnt& learnt : lane.learnt) join(*all, *learnt.clock);
  lane.learnt.assign(1, {0, all});
}

void Machine::gather(Warp& warp, u32 first) {
  const Clock* joined[4] = {};
  u32 n = 0;
  for (u32 l = 0; l < kLanes; ++l) {
    Lane& lane = lanes[first + l];
    for (const Learnt& learnt : lane.learnt) {
      bool seen = false;
      for (const Clock* clock : joined) seen |= clock == learnt.clock.get();
      if (seen) continue;
      joined[n++ % 4] = learnt.clock.get();
      join(warp.known, *learnt.clock);
    }
    if (lane.fenced) {
      if (!warp.has_fenced) warp.fenced.assign(warp.known.size(), 0);
      warp.has_fenced = true;
      join(warp.fenced, *lane.fenced);
      lane.fenced = nullptr;
      blocks[lane.block].bar_fenced = true;
    }
    warp.known[first + l] = lane.tick++;
  }
  for (u32 l = 0; l < kLanes; ++l) lanes[first + l].learnt.clear();
}

// All warps of these lanes learn what any of them knows.
void Machine::meet(const std::vector<u32>& members) {
  std::vector<u32> met;
  for (u32 id : members)
    if (lanes[id].lane == 0) met.push_back(lanes[id].warp);
  for (u32 w : met) gather(warps[w], w * kLanes);
  Clock all = warps[met[0]].known;
  for (u32 w : met) join(all, warps[w].known);
  for (u32 w : met) warps[w].known = all;

  Block& block = blocks[lanes[members[0]].block];
  if (!block.bar_fenced) return;
  Clock fenced(all.size(), 0);
  for (u32 w : met)
    if (warps[w].has_fenced) join(fenced, warps[w].fenced);
  for (u32 w : met) {
    warps[w].fenced = fenced;
    warps[w].has_fenced = true;
  }
  block.bar_fenced = false;
}

Clock Machine::gpu_visible(const Lane& lane) const {
  const Warp& warp = warps[lane.warp];
  Clock clock = warp.has_fenced ? warp.fenced : Clock(warp.known.size(), 0);
  if (lane.fenced) join(clock, *lane.fenced);
  return clock;
}

}  // namespace sim
