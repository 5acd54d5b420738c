// Meetings: of the 32 lanes of a warp (warp_sync, shuffles, ballot, mma) and of the threads of a named barrier.
#include "machine.h"
#include "numbers.h"

namespace sim {
namespace {

// c (16, 8) += a (16, 16) b (16, 8). Every product is exact in f32; they are added to c one by one, k ascending, each
// sum rounded to nearest even. A GPU's tensor core adds in another order and truncates: equal only to a tolerance.
void multiply(const Lane* lanes, bool bf16, f32 (&c)[16][8]) {
  f32 a[16][16], b[16][8];
  const auto number = [&](u32 word, u32 half) {
    const u16 bits = static_cast<u16>(word >> 16 * half);
    return bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  };
  for (u32 l = 0; l < kLanes; ++l) {
    const u32 g = l / 4, q = l % 4;
    const u32* operands = lanes[l].operands;
    for (u32 half = 0; half < 2; ++half) {
      const u32 k = 2 * q + half;
      a[g][k] = number(operands[4], half);
      a[g + 8][k] = number(operands[5], half);
      a[g][k + 8] = number(operands[6], half);
      a[g + 8][k + 8] = number(operands[7], half);
      b[k][g] = number(operands[8], half);
      b[k + 8][g] = number(operands[9], half);
      c[g][k] = f32_of(operands[half]);
      c[g + 8][k] = f32_of(operands[2 + half]);
    }
  }
  for (u32 m = 0; m < 16; ++m)
    for (u32 k = 0; k < 16; ++k)
      for (u32 n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
}

void finish(Call call, Lane* lanes) {
  if (call == Call::shfl_xor || call == Call::shfl_idx) {
    for (u32 l = 0; l < kLanes; ++l) {
      const u32 operand = lanes[l].operands[1];
      const u32 from = (call == Call::shfl_xor ? l ^ operand : operand) % kLanes;
      lanes[l].results[0] = lanes[from].operands[0];
    }
  } else if (call == Call::ballot) {
    u32 mask = 0;
    for (u32 l = 0; l < kLanes; ++l) mask |= lanes[l].operands[0] << l;
    for (u32 l = 0; l < kLanes; ++l) lanes[l].results[0] = mask;
  } else if (call == Call::mma_bf16 || call == Call::mma_f16) {
    f32 c[16][8];
    multiply(lanes, call == Call::mma_bf16, c);
    for (u32 l = 0; l < kLanes; ++l)
      for (u32 i = 0; i < 4; ++i) lanes[l].results[i] = bits_of(c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
  }
}

}  // namespace

void Machine::meet_warp(Call call, u16 place) {
  Lane& lane = *current;
  Warp& warp = warps[lane.warp];
  lane.place = place;
  if (!warp.met) {
    warp.call = call;
    warp.place = place;
  } else if (call != warp.call || (call != Call::warp_sync && place != warp.place)) {
    fail("lanes of one warp meet in different calls: " + describe(lane) + " in " + describe(place) + ", others in " +
         describe(warp.place));
  }
  warp.met |= 1u << lane.lane;
  if (warp.met != ~0u) return block(State::kWarp);
  Lane* first = &lanes[lane.warp * kLanes];
  finish(call, first);
  warp.met = 0;
  for (u32 l = 0; l < kLanes; ++l)
    if (first[l].state == State::kWarp) first[l].state = State::kReady;
  warp.ready = ~0u;  // this lane runs, so its warp is listed
}

u32 thread_index() { return machine->current->thread; }
u32 block_index() { return machine->current->block; }
u32 n_blocks() { return machine->n_blocks; }

void warp_sync(Site site, At at) {
  Machine& m = *machine;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return;
  Lane& lane = *m.current;
  Warp& warp = m.warps[lane.warp];
  // The last to come gathers, before anyone goes on.
  if (warp.met == ~(1u << lane.lane) && warp.call == Call::warp_sync && mode == Mode::kOn)
    m.gather(warp, lane.warp * kLanes);
  m.meet_warp(Call::warp_sync, m.place(Call::warp_sync, at, site));
}

u32 shuffle(Call call, u32 v, u32 operand, At at) {
  Machine& m = *machine;
  m.called();
  Lane& lane = *m.current;
  lane.operands[0] = v;
  lane.operands[1] = operand;
  m.meet_warp(call, m.place(call, at));
  return lane.results[0];
}

u32 ballot(bool value, At at) {
  Machine& m = *machine;
  m.called();
  Lane& lane = *m.current;
  lane.operands[0] = value;
  m.meet_warp(Call::ballot, m.place(Call::ballot, at));
  return lane.results[0];
}

void mma(Call call, f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2], At at) {
  Machine& m = *machine;
  m.called();
  Lane& lane = *m.current;
  for (u32 i = 0; i < 4; ++i) lane.operands[i] = bits_of(c[i]), lane.operands[4 + i] = a[i];
  lane.operands[8] = b[0];
  lane.operands[9] = b[1];
  m.meet_warp(call, m.place(call, at));
  for (u32 i = 0; i < 4; ++i) c[i] = f32_of(lane.results[i]);
}

void bar_sync(Site site, u32 id, u32 n_threads, At at) {
  Machine& m = *machine;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return;
  Lane& lane = *m.current;
  lane.place = m.place(Call::bar_sync, at, site);
  if (id >= kBars || n_threads % kLanes || n_threads == 0 || n_threads > m.n_threads)
    m.fail(m.describe(lane.place) + ": barrier " + std::to_string(id) + " of " + std::to_string(n_threads) +
           " threads; expected an id below 16 and whole warps of the block");
  Bar& bar = m.blocks[lane.block].bars[id];
  if (bar.lanes.empty()) {
    bar.n_threads = n_threads;
    bar.place = lane.place;
  } else if (bar.n_threads != n_threads) {
    m.fail("barrier " + std::to_string(id) + " of block " + std::to_string(lane.block) + " is met by " +
           std::to_string(n_threads) + " threads at " + m.describe(lane.place) + ", by " +
           std::to_string(bar.n_threads) + " at " + m.describe(bar.place));
  }
  bar.lanes.push_back(lane.id);
  lane.waits_for = id;
  lane.waits_more = n_threads;
  if (bar.lanes.size() < n_threads) return m.block(State::kBar);
  std::vector<u32> warps(m.n_threads / kLanes, 0);
  for (u32 member : bar.lanes) ++warps[m.lanes[member].thread / kLanes];
  for (u32 w = 0; w < warps.size(); ++w)
    if (warps[w] % kLanes)
      m.fail("barrier " + std::to_string(id) + " of block " + std::to_string(lane.block) + " is full, but only " +
             std::to_string(warps[w]) + " lanes of warp " + std::to_string(w) + " came: " + m.describe(lane.place));
  for (u32 member : bar.lanes) {
    const Lane& first = m.lanes[m.lanes[member].warp * kLanes];
    if (m.lanes[member].place != first.place)
      m.fail("lanes of one warp meet the others in different calls: " + m.describe(m.lanes[member]) + " in " +
             m.describe(m.lanes[member].place) + ", lane 0 in " + m.describe(first.place));
  }
  if (mode == Mode::kOn) m.meet(bar.lanes);
  for (u32 member : bar.lanes)
    if (member != lane.id) m.wake(member);
  bar.lanes.clear();
  m.progress();
}

}  // namespace sim
