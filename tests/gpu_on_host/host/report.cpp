// Findings in words: where, who, and which ordering is missing.
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace sim {
namespace {

#define SIM_CALL_NAME(name) #name
const char* const kCallNames[] = {SIM_CALLS(SIM_CALL_NAME)};
#undef SIM_CALL_NAME

#define SIM_SITE_NAME(name, what) #name,
const char* const kSiteNames[] = {FF_SITES(SIM_SITE_NAME)};
#undef SIM_SITE_NAME

std::string number(u64 value) { return std::to_string(value); }

// "0-3, 7": the bits of a mask.
std::string ranges(u32 mask) {
  std::string text;
  for (u32 l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u32 end = l;
    while (end + 1 < kLanes && mask >> (end + 1) & 1) ++end;
    text += (text.empty() ? "" : ", ") + number(l) + (end > l ? "-" + number(end) : "");
    l = end;
  }
  return text;
}

}  // namespace

u16 Machine::place(Call call, At at, Site site) {
  const size_t hash = (reinterpret_cast<size_t>(at.file) >> 4) + at.line * 61 + static_cast<size_t>(call) * 7 +
                      static_cast<size_t>(site) * 29;
  u16& cached = place_cache_[hash % place_cache_.size()];
  const auto same = [&](const Place& p) {
    return p.line == at.line && p.call == call && p.site == site && p.file == at.file;
  };
  if (cached < places_.size() && same(places_[cached])) return cached;
  for (size_t i = 0; i < places_.size(); ++i)
    if (same(places_[i])) return cached = static_cast<u16>(i);
  places_.push_back({call, at.file, at.line, site});
  return cached = static_cast<u16>(places_.size() - 1);
}

std::string Machine::describe(u16 id) const {
  if (id >= places_.size()) return "the start of the launch";
  const Place& place = places_[id];
  const char* slash = std::strrchr(place.file, '/');
  std::string text = kCallNames[static_cast<u32>(place.call)];
  text += " at " + std::string(slash ? slash + 1 : place.file) + ":" + number(place.line);
  if (place.site != Site::kCount) text += " (" + std::string(kSiteNames[static_cast<u32>(place.site)]) + ")";
  return text;
}

std::string Machine::describe(const Lane& lane) const {
  return "block " + number(lane.block) + " warp " + number(lane.thread / kLanes) + " lane " + number(lane.lane);
}

std::string Machine::describe(u32 component, u16 at) const {
  if (component < n_lanes) return describe(lanes[component]) + ", " + describe(at);
  return "the copy engine of block " + number((component - n_lanes) / kEngines) + ", " + describe(at);
}

void Machine::name_shared(u32 offset, u32 bytes, const char* name) { names_.push_back({offset, offset + bytes, name}); }

std::string Machine::location(const Region& region, size_t offset) const {
  if (region.kind != Kind::kShared) return region.name + " + " + number(offset);
  const std::string owner = " of block " + number(region.block);
  for (const Name& name : names_)
    if (offset >= name.begin && offset < name.end)
      return "shared " + name.name + " + " + number(offset - name.begin) + owner;
  return "shared + " + number(offset) + owner;
}

// Which ordering would have put that access before this lane.
std::string Machine::missing(u32 component, u32 tick, const Region&) const {
  const Lane& lane = *current;
  if (component >= n_lanes) {
    for (const Mbar& bar : blocks[(component - n_lanes) / kEngines].mbars)
      if (bar.engine == component)
        return "mbar_try_wait for phase " + number(tick - 1) + " of mbarrier " +
               location(blocks[lane.block].shared, bar.address - kSharedBase);
    return "mbar_try_wait";
  }
  const Lane& other = lanes[component];
  if (other.warp == lane.warp) return "warp_sync between the lanes of the warp";
  if (other.block == lane.block)
    return "bar_sync (or an mbarrier) between warps " + number(other.thread / kLanes) + " and " +
           number(lane.thread / kLanes);
  const Block& block = blocks[other.block];
  const std::string release = block.released ? describe(block.released_at) : "";
  if (block.released && (*block.released)[component] >= tick) {
    for (u32 t = 0; t < n_threads; ++t) {
      const Lane& neighbour = lanes[lane.block * n_threads + t];
      if (knows(neighbour, component, tick))
        return "bar_sync or warp_sync after the acquire: " + describe(neighbour) + " has acquired it, " +
               describe(lane) + " has not met it since";
    }
    return "ld_acquire: block " + number(other.block) + " has released it by " + release + ", block " +
           number(lane.block) + " has not acquired it";
  }
  if (block.could && (*block.could)[component] >= tick)
    return "fence_gpu before the release of block " + number(other.block) + ", " + release;
  if (block.released)
    return "bar_sync before the release of block " + number(other.block) + ", " + release +
           ", which does not cover it (or a wait for a later release)";
  return "release: block " + number(other.block) + " has released nothing yet";
}

void Machine::race(const Access& access, size_t offset, u32 component, u32 tick, u16 earlier, const char* doing) {
  fail("unordered accesses to " + location(access.region, offset) + ": " + doing + " by " +
       describe(component, earlier) + "; then by " + describe(*current) + ", " + describe(access.place) +
       ". Missing: " + missing(component, tick, access.region));
}

std::string Machine::waiting(const Lane& lane) const {
  const Block& block = blocks[lane.block];
  switch (lane.state) {
    case State::kBar: {
      const Bar& bar = block.bars[lane.waits_for];
      std::string absent;
      for (u32 w = 0; w < n_threads / kLanes; ++w) {
        u32 came = 0;
        for (u32 id : bar.lanes) came += lanes[id].thread / kLanes == w;
        if (came < kLanes) absent += (absent.empty() ? "" : ", ") + number(w);
      }
      return "barrier " + number(lane.waits_for) + ": " + number(bar.lanes.size()) + " of " + number(bar.n_threads) +
             " threads came; not all of warps " + absent;
    }
    case State::kMbar: {
      for (const Mbar& bar : block.mbars)
        if (bar.address == lane.waits_for)
          return "mbarrier " + location(block.shared, bar.address - kSharedBase) + ", parity " +
                 number(lane.waits_more) + ": phase " + number(bar.phase) + " lacks " + number(bar.pending) + " of " +
                 number(bar.count) + " arrivals and " + std::to_string(bar.tx) + " bytes";
      return "";
    }
    case State::kPoll:
      for (const Region& region : regions_) {
        const u8* p = reinterpret_cast<const u8*>(lane.polls);
        if (p >= region.data && p < region.data + region.bytes)
          return location(region, static_cast<size_t>(p - region.data)) + ", which stays " +
                 number(*reinterpret_cast<const u32*>(region.live + (p - region.data)));
      }
      return "";
    case State::kWarp:
      return "only lanes " + ranges(warps[lane.warp].met) + " came";
    default:
      return "";
  }
}

std::string Machine::deadlock() const {
  std::string text = "deadlock: nothing can run and no copy is under way";
  for (u32 w = 0; w < warps.size(); ++w) {
    u32 told = warps[w].done;
    for (u32 l = 0; l < kLanes; ++l) {
      if (told >> l & 1) continue;
      const Lane& first = lanes[w * kLanes + l];
      u32 same = 0;
      for (u32 i = l; i < kLanes; ++i) {
        const Lane& lane = lanes[w * kLanes + i];
        const bool alike = lane.state == first.state && lane.place == first.place &&
                           lane.waits_for == first.waits_for && lane.waits_more == first.waits_more &&
                           lane.polls == first.polls;
        same |= static_cast<u32>(alike && !(told >> i & 1)) << i;
      }
      told |= same;
      text += "\n  block " + number(first.block) + " warp " + number(first.thread / kLanes) + " lanes " + ranges(same) +
              " in " + describe(first.place) + ": " + waiting(first);
    }
  }
  return text;
}

}  // namespace sim
