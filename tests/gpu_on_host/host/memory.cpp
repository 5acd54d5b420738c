// Every access to shared and to changing global memory: bounds, alignment, initialised, ordered after what it conflicts
// with. Two accesses conflict if they share a byte and one of them writes; ordered means that the clock of the later
// one knows the tick of the earlier one. Cells are kept per 4 bytes, per byte once a smaller store has been seen.
#include <algorithm>

#include "machine.h"

namespace sim {

// The checks of one access by the current lane, word by word.
struct Shadow {
  Machine& m;
  const Access& access;
  Lane& lane;
  const u32* known;

  Shadow(Machine& machine, const Access& a)
      : m(machine), access(a), lane(*machine.current), known(machine.warps[lane.warp].known.data()) {}

  bool before(u32 component, u32 tick) const {
    return component == lane.id || known[component] >= tick || m.knows(lane, component, tick);
  }

  [[noreturn]] void race(size_t offset, u32 component, u32 tick, u16 earlier, const char* doing) const {
    m.race(access, offset, component, tick, earlier, doing);
  }

  void split(Cell& cell) {
    u32 index;
    if (m.free_bytes_.empty()) {
      index = static_cast<u32>(m.bytes_.size());
      m.bytes_.emplace_back();
    } else {
      index = m.free_bytes_.back();
      m.free_bytes_.pop_back();
    }
    for (u32 b = 0; b < 4; ++b) {
      Cell& part = m.bytes_[index][b];
      part = cell;
      part.flags &= ~(kMany | kSplit);
      part.extra = 0;
      if (cell.flags & kMany) {
        copy_readers(part, m.readers_[cell.extra]);
      } else if (!(cell.r_mask >> b & 1)) {
        part.r_tick = 0;
      }
      part.r_mask = 1;
    }
    forget_readers(cell);
    cell.flags = static_cast<u8>(kSplit | (cell.flags & kWritten));
    cell.extra = index;
  }

  void unsplit(Cell& cell) {
    for (Cell& part : m.bytes_[cell.extra]) forget_readers(part);
    m.free_bytes_.push_back(cell.extra);
    cell = {};
  }

  void many(Cell& cell) {
    if (m.free_readers_.empty()) {
      cell.extra = static_cast<u32>(m.readers_.size());
      m.readers_.emplace_back().warps.resize(m.warps.size());
    } else {
      cell.extra = m.free_readers_.back();
      m.free_readers_.pop_back();
    }
    cell.flags |= kMany;
  }

  void copy_readers(Cell& cell, const Readers& from) {
    std::vector<std::unique_ptr<Readers::Warp>> copy(m.warps.size());
    for (size_t w = 0; w < copy.size(); ++w)
      if (from.warps[w]) copy[w] = std::make_unique<Readers::Warp>(*from.warps[w]);
    many(cell);
    m.readers_[cell.extra].warps = std::move(copy);
  }

  void add_reader(Cell& cell, u32 reader, u32 tick, u16 at) {
    std::unique_ptr<Readers::Warp>& warp = m.readers_[cell.extra].warps[reader / kLanes];
    if (!warp) {
      warp = std::make_unique<Readers::Warp>();
      std::fill_n(warp->tick, kLanes, 0u);
    }
    warp->tick[reader % kLanes] = tick;
    warp->at = at;
  }

  void forget_readers(Cell& cell) {
    if (cell.flags & kMany) {
      for (auto& warp : m.readers_[cell.extra].warps) warp.reset();
      m.free_readers_.push_back(cell.extra);
      cell.flags &= ~kMany;
    }
    cell.r_tick = 0;
  }

  void not_written(size_t offset) const {
    m.fail(m.describe(lane) + " reads what was never written: " + m.location(access.region, offset) + " by " +
           m.describe(access.place) +
           (access.region.kind == Kind::kShared ? "" : " (the region was not registered as initialised)"));
  }

  void read(Cell& cell, u8 mask, size_t offset) {
    if (cell.flags & (kSplit | kMbarrier)) [[unlikely]] {
      if (cell.flags & kMbarrier) m.fail(m.describe(lane) + " reads an mbarrier as data: " + m.describe(access.place));
      for (u32 b = 0; b < 4; ++b)
        if (mask >> b & 1) read(m.bytes_[cell.extra][b], 1, offset + b);
      return;
    }
    if (cell.w_tick) {
      if (!before(cell.w_lane, cell.w_tick)) race(offset, cell.w_lane, cell.w_tick, cell.w_at, "written");
      if (cell.flags & kPending)
        m.fail(m.describe(lane) + " reads " + m.location(access.region, offset) +
               " before the bytes of its bulk copy have landed: " + m.describe(access.place) + "; copied by " +
               m.describe(cell.w_at) + ". The barrier's phase ended too early: too few bytes were expected");
    } else if (!(cell.flags & kWritten) && !access.region.initialised) {
      not_written(offset);
    }
    if (cell.flags & kMany) {
      add_reader(cell, lane.id, lane.tick, access.place);
    } else if (!cell.r_tick || before(cell.r_lane, cell.r_tick)) {
      cell.r_mask = static_cast<u8>(cell.r_tick ? cell.r_mask | mask : mask);
      cell.r_lane = static_cast<u16>(lane.id);
      cell.r_tick = lane.tick;
      cell.r_at = access.place;
    } else {
      many(cell);
      add_reader(cell, cell.r_lane, cell.r_tick, cell.r_at);
      add_reader(cell, lane.id, lane.tick, access.place);
      cell.r_mask |= mask;
    }
  }

  void check_readers(const Cell& cell, size_t offset) const {
    if (cell.flags & kMany) {
      const Readers& readers = m.readers_[cell.extra];
      for (u32 w = 0; w < readers.warps.size(); ++w) {
        if (!readers.warps[w]) continue;
        for (u32 l = 0; l < kLanes; ++l) {
          const u32 tick = readers.warps[w]->tick[l], reader = w * kLanes + l;
          if (tick && !before(reader, tick)) race(offset, reader, tick, readers.warps[w]->at, "read");
        }
      }
    } else if (cell.r_tick && !before(cell.r_lane, cell.r_tick)) {
      race(offset, cell.r_lane, cell.r_tick, cell.r_at, "read");
    }
  }

  void check_write(const Cell& cell, size_t offset, bool atomic) const {
    if (cell.w_tick && !(atomic && cell.flags & kAtomic) && !before(cell.w_lane, cell.w_tick))
      race(offset, cell.w_lane, cell.w_tick, cell.w_at, "written");
    check_readers(cell, offset);
  }

  void write(Cell& cell, u8 mask, size_t offset, bool atomic) {
    if (cell.flags & kMbarrier) m.fail(m.describe(lane) + " overwrites an mbarrier: " + m.describe(access.place));
    if (mask != 15 && !(cell.flags & kSplit)) split(cell);
    if (cell.flags & kSplit) {
      for (u32 b = 0; b < 4; ++b)
        if (mask >> b & 1) write_one(m.bytes_[cell.extra][b], 1, offset + b, atomic);
      if (mask != 15) return;
      unsplit(cell);
    }
    write_one(cell, 15, offset, atomic);
  }

  void write_one(Cell& cell, u8 mask, size_t offset, bool atomic) {
    check_write(cell, offset, atomic);
    forget_readers(cell);
    cell.w_lane = static_cast<u16>(lane.id);
    cell.w_tick = lane.tick;
    cell.w_at = access.place;
    cell.flags = static_cast<u8>(kWritten | (atomic ? kAtomic : 0));
    cell.r_mask = mask;
  }

  // What a bulk copy overwrites must come before the lane's last fence_proxy_async; other copies' bytes be waited for.
  void copied_over(Cell& cell, size_t offset, u32 engine, u32 tick) {
    if (cell.flags & kMbarrier) m.fail(m.describe(lane) + " copies over an mbarrier: " + m.describe(access.place));
    if (cell.flags & kSplit) {
      for (u32 b = 0; b < 4; ++b) fenced(m.bytes_[cell.extra][b], offset + b);
      unsplit(cell);
    } else {
      fenced(cell, offset);
    }
    forget_readers(cell);
    cell.w_lane = static_cast<u16>(engine);
    cell.w_tick = tick;
    cell.w_at = access.place;
    cell.flags = kWritten | kAsync | kPending;
  }

  void fenced(const Cell& cell, size_t offset) const {
    check_write(cell, offset, false);
    const auto check = [&](u32 other, u32 tick, u16 at, const char* doing) {
      if (!lane.proxied || (*lane.proxied)[other] < tick)
        m.fail("missing fence_proxy_async: " + m.location(access.region, offset) + " was " + doing + " by " +
               m.describe(other, at) + ", and then " + m.describe(lane) +
               " copies over it: " + m.describe(access.place) + " without a fence between");
    };
    if (cell.w_tick && !(cell.flags & kAsync)) check(cell.w_lane, cell.w_tick, cell.w_at, "written");
    if (cell.flags & kMany) {
      const Readers& readers = m.readers_[cell.extra];
      for (u32 w = 0; w < readers.warps.size(); ++w)
        for (u32 l = 0; readers.warps[w] && l < kLanes; ++l)
          if (readers.warps[w]->tick[l]) check(w * kLanes + l, readers.warps[w]->tick[l], readers.warps[w]->at, "read");
    } else if (cell.r_tick) {
      check(cell.r_lane, cell.r_tick, cell.r_at, "read");
    }
  }
};

namespace {

// Calls f(cell, mask of its bytes, offset) for each word of an access.
template <class F>
void each(const Access& access, F&& f) {
  Cell* cells = access.region.cells.data() + access.offset / 4;
  if (access.bytes < 4) {
    const u32 first = access.offset % 4;
    f(*cells, static_cast<u8>(((1u << access.bytes) - 1) << first), access.offset - first);
    return;
  }
  for (u32 i = 0; i < access.bytes / 4; ++i) f(cells[i], u8{15}, access.offset + 4 * i);
}

void touch(Region& region, size_t offset) {
  if (!region.dirty.empty()) region.dirty[offset >> 12] = 1;
}

}  // namespace

void Machine::read(const Access& access) {
  touch(access.region, access.offset);
  if (!checking) return;
  Shadow shadow(*this, access);
  each(access, [&](Cell& cell, u8 mask, size_t offset) { shadow.read(cell, mask, offset); });
}

void Machine::write(const Access& access, bool atomic) {
  touch(access.region, access.offset);
  progress();
  Shadow shadow(*this, access);
  if (!checking) return;
  each(access, [&](Cell& cell, u8 mask, size_t offset) { shadow.write(cell, mask, offset, atomic); });
}

// A read by a synchronising instruction: ordered only after plain writes.
void Machine::atomic_read(const Access& access) {
  touch(access.region, access.offset);
  if (!checking) return;
  Shadow shadow(*this, access);
  each(access, [&](Cell& cell, u8, size_t offset) {
    if (cell.w_tick && !(cell.flags & (kAtomic | kSplit)) && !shadow.before(cell.w_lane, cell.w_tick))
      shadow.race(offset, cell.w_lane, cell.w_tick, cell.w_at, "written");
    if (!cell.w_tick && !(cell.flags & kWritten) && !access.region.initialised) shadow.not_written(offset);
  });
}

void Machine::copy_begins(Mbar& bar, u32 dst, u32 bytes, u16 place) {
  Access access{blocks[current->block].shared, dst, bytes, place};
  Shadow shadow(*this, access);
  each(access, [&](Cell& cell, u8, size_t offset) {
    if (checking) {
      shadow.copied_over(cell, offset, bar.engine, bar.engine_phase);
    } else {
      cell.flags = kWritten;
    }
  });
}

}  // namespace sim
