// Vector clocks. One component per GPU thread ("lane") and one per mbarrier that counts bulk copies.
//
// A lane's own time is its `tick`. It stamps accesses with it, and ends it when others may learn of them: at a release,
// a fence, a warp_sync, a bar_sync. `clock[l] >= t` says: everything that lane l did up to its tick t came before.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "calls.h"

namespace sim {

using Clock = std::vector<u32>;

inline void join(Clock& into, const Clock& from) {
  u32* a = into.data();
  const u32* b = from.data();
  const size_t n = into.size();
  for (size_t i = 0; i < n; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
}

// A clock that is not changed any more and may be known to many lanes.
using Snapshot = std::shared_ptr<const Clock>;

// What a lane has learnt since its warp last met: the latest snapshot of each thing that it acquired from.
struct Learnt {
  u64 source;  // of which later clocks include earlier ones; 0: of many
  Snapshot clock;
};

}  // namespace sim
