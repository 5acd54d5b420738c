// mbarriers and the copy engine. A phase of an mbarrier ends when its pending arrivals and its expected bytes are both
// zero. A bulk copy poisons its destination at once; its bytes land later, in pieces, in any order, and only then are
// they taken off what the mbarrier expects.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace sim {
namespace {

constexpr u32 kMaxTx = (1u << 20) - 1;

std::string bar_name(const Machine& m, u32 block, const Mbar& bar) {
  return "mbarrier " + m.location(m.blocks[block].shared, bar.address - kSharedBase);
}

}  // namespace

Mbar& Machine::mbar(u32 a, u16 place) {
  const size_t offset = shared_offset(a, 8, 8, place);
  Block& block = blocks[current->block];
  const u32 index = block.mbar_at[offset / 8];
  if (!index)
    fail(describe(*current) + " uses " + location(block.shared, offset) +
         ", which is no initialised mbarrier: " + describe(place));
  Mbar& bar = block.mbars[index - 1];
  if (checking && !knows(*current, bar.init_lane, bar.init_tick))
    fail("missing barrier after mbar_init: " + describe(*current) + " uses " + bar_name(*this, current->block, bar) +
         " by " + describe(place) + ", initialised by " + describe(lanes[bar.init_lane]));
  return bar;
}

void Machine::end_phase(Mbar& bar) {
  if (bar.engine != kNone) bar.arrived[bar.engine] = std::max(bar.arrived[bar.engine], bar.engine_phase);
  bar.completed = std::make_shared<Clock>(bar.arrived);
  bar.pending = bar.count;
  ++bar.phase;
  wake_all(bar.waiters);
}

void Machine::arrive(Mbar& bar, i64 tx, u16 place, bool ordered) {
  if (bar.pending == 0)
    fail(describe(*current) + " arrives at " + bar_name(*this, current->block, bar) + " once too often: phase " +
         std::to_string(bar.phase) + " had its " + std::to_string(bar.count) + " arrivals and still expects " +
         std::to_string(bar.tx) + " bytes; " + describe(place));
  if (ordered) join(bar.arrived, *knowledge(*current));
  bar.tx += tx;
  --bar.pending;
  progress();
  if (bar.pending == 0 && bar.tx < 0)
    fail(bar_name(*this, current->block, bar) + " got " + std::to_string(-bar.tx) +
         " bytes more than expected in phase " + std::to_string(bar.phase) + ": expect_tx is too small at " +
         describe(place));
  if (bar.pending == 0 && bar.tx == 0) end_phase(bar);
}

void Machine::copy_step() {
  const size_t index = random() % copies.size();
  Copy& copy = copies[index];
  const size_t chosen = random() % copy.pieces.size();
  const auto [offset, bytes] = copy.pieces[chosen];
  copy.pieces.erase(copy.pieces.begin() + static_cast<std::ptrdiff_t>(chosen));
  Block& block = blocks[copy.block];
  std::memcpy(block.memory.data() + copy.dst + offset, copy.src + offset, bytes);
  Cell* cells = block.shared.cells.data() + (copy.dst + offset) / 4;
  for (u32 i = 0; i < bytes / 4; ++i) cells[i].flags &= ~kPending;
  progress();

  Mbar& bar = block.mbars[copy.mbar];
  const auto named = [&] { return "bytes of a bulk copy into " + location(block.shared, copy.dst); };
  if (bar.phase != copy.phase)
    fail("expect_tx is too small: " + named() + " land after phase " + std::to_string(copy.phase) + " of " +
         bar_name(*this, copy.block, bar) + " has ended, which should have waited for them");
  bar.tx -= bytes;
  if (bar.tx < 0 && bar.pending == 0)
    fail("expect_tx is too small: " + named() + " are " + std::to_string(-bar.tx) + " more than phase " +
         std::to_string(bar.phase) + " of " + bar_name(*this, copy.block, bar) + " expects");
  if (copy.pieces.empty()) {
    std::swap(copies[index], copies.back());
    copies.pop_back();
  }
  if (bar.pending == 0 && bar.tx == 0) end_phase(bar);
}

// A block may end only when it has waited for all its copies: they would land in the memory of another block.
void Machine::check_drained(u32 b) {
  const Lane* first = &lanes[b * n_threads];
  for (const Mbar& bar : blocks[b].mbars) {
    if (!bar.engine_phase) continue;
    bool waited = false;
    for (u32 t = 0; t < n_threads && !waited; ++t) waited = knows(first[t], bar.engine, bar.engine_phase);
    if (!waited)
      fail("block " + std::to_string(b) + " ended and nobody had waited for the last bulk copies of " +
           bar_name(*this, b, bar) + " (phase " + std::to_string(bar.engine_phase - 1) + ")");
  }
}

void mbar_init(u32 a, u32 count, At at) {
  Machine& m = *machine;
  m.called();
  const u16 place = m.place(Call::mbar_init, at);
  const size_t offset = m.shared_offset(a, 8, 8, place);
  Block& block = m.blocks[m.current->block];
  if (block.mbar_at[offset / 8] || count == 0 || count > kMaxTx)
    m.fail(m.describe(*m.current) + ": " + m.describe(place) + " of " + m.location(block.shared, offset) +
           (count == 0 || count > kMaxTx ? " with a count of " + std::to_string(count) : ", initialised before"));
  m.write({block.shared, offset, 8, place}, false);
  Cell* cells = block.shared.cells.data() + offset / 4;
  cells[0].flags |= kMbarrier;
  cells[1].flags |= kMbarrier;
  Mbar bar;
  bar.address = a;
  bar.count = bar.pending = count;
  bar.init_lane = m.current->id;
  bar.init_tick = m.current->tick;
  bar.source = m.new_source();
  bar.arrived.assign(m.warps[0].known.size(), 0);
  block.mbars.push_back(std::move(bar));
  block.mbar_at[offset / 8] = static_cast<u32>(block.mbars.size());
}

void fence_mbar_init(Site site, At) {
  Machine& m = *machine;
  if (m.called_at(site) != Mode::kOn) return;
  for (Mbar& bar : m.blocks[m.current->block].mbars)
    if (bar.init_lane == m.current->id) bar.fenced = true;
}

void mbar_arrive(Site site, u32 a, At at) {
  Machine& m = *machine;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return;
  const u16 place = m.place(Call::mbar_arrive, at, site);
  m.arrive(m.mbar(a, place), 0, place, mode == Mode::kOn);
}

void mbar_arrive_expect_tx(Site site, u32 a, u32 bytes, At at) {
  Machine& m = *machine;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return;
  const u16 place = m.place(Call::mbar_arrive_expect_tx, at, site);
  const i64 expected = static_cast<i64>(bytes) + m.options.expect_tx_delta;
  if (expected > kMaxTx)
    m.fail(m.describe(place) + " expects " + std::to_string(expected) + " bytes; at most 2^20 - 1");
  m.arrive(m.mbar(a, place), expected, place, mode == Mode::kOn);
}

bool mbar_try_wait(Site site, u32 a, u32 parity, At at) {
  Machine& m = *machine;
  ++m.stats.polls;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return true;
  Lane& lane = *m.current;
  lane.place = m.place(Call::mbar_try_wait, at, site);
  Mbar& bar = m.mbar(a, lane.place);
  if (parity > 1) m.fail(m.describe(lane.place) + ": parity " + std::to_string(parity) + ", expected 0 or 1");
  if ((bar.phase & 1) == parity) {
    if (m.chance(256)) return false;  // the instruction may give up at any time
    lane.waits_for = a;
    lane.waits_more = parity;
    bar.waiters.push_back(lane.id);
    m.block(State::kMbar);
    if ((bar.phase & 1) == parity) return false;
  }
  if (mode == Mode::kOn) m.learn(lane, bar.source, bar.completed);
  return true;
}

void fence_proxy_async(Site site, At) {
  Machine& m = *machine;
  if (m.called_at(site) != Mode::kOn) return;
  m.current->proxied = m.knowledge(*m.current);
}

void bulk_copy(u32 dst, const void* src, u32 bytes, u32 a, At at) {
  Machine& m = *machine;
  m.called();
  ++m.stats.copies;
  m.maybe_yield();
  const u16 place = m.place(Call::bulk_copy, at);
  m.current->place = place;
  const size_t offset = m.shared_offset(dst, bytes, 16, place);
  const Region& from = m.find(src, bytes, place);
  if (from.kind != Kind::kConstant)
    m.fail("bulk_copy of data written in the launch: " + m.describe(*m.current) + " copies from " + from.name + " by " +
           m.describe(place) + "; only regions that are constant during the launch may be read by the copy engine");
  if (reinterpret_cast<size_t>(src) % 16 || bytes % 16 || bytes == 0)
    m.fail(m.describe(*m.current) + ": " + m.describe(place) + " of " + std::to_string(bytes) + " bytes from " +
           m.location(from, static_cast<size_t>(static_cast<const u8*>(src) - from.data)) +
           "; address and size must be multiples of 16");
  Block& block = m.blocks[m.current->block];
  Mbar& bar = m.mbar(a, place);
  if (!bar.fenced && m.checking)
    m.fail("missing fence_mbar_init: " + m.describe(*m.current) + " has the copy engine use " +
           bar_name(m, m.current->block, bar) + ", which was initialised without a fence; " + m.describe(place));
  if (bar.engine == kNone) {
    if (block.n_engines == kEngines) m.fail("more than " + std::to_string(kEngines) + " mbarriers count copies");
    bar.engine = m.n_lanes + m.current->block * kEngines + block.n_engines++;
  }
  bar.engine_phase = bar.phase + 1;
  m.copy_begins(bar, static_cast<u32>(offset), bytes, place);
  std::memset(block.memory.data() + offset, 0xFF, bytes);

  Copy copy{m.current->block, static_cast<u32>(offset),    static_cast<u32>(&bar - block.mbars.data()),
            bar.phase,        static_cast<const u8*>(src), {}};
  for (u32 done = 0; done < bytes;) {
    const u32 left = (bytes - done) / 16, piece = m.chance(3) ? left : 1 + static_cast<u32>(m.random() % left);
    copy.pieces.emplace_back(done, piece * 16);
    done += piece * 16;
  }
  m.copies.push_back(std::move(copy));
  m.progress();
}

}  // namespace sim
