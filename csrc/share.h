// Units of a phase that change hands. Each worker is dealt its own and takes them from the front, as they lie in
// memory; one that is through takes over the back half of what the worker with most left has, and others may take from
// that in turn. So a worker whose core is slow for a moment, or always, holds nobody up for longer than a unit takes.
// Who executes a unit decides nothing about its result. Nobody is in such a phase while another is in an earlier or
// later one (the Program's waits; `check` proves it), so what lies here belongs to this phase or to one that is over.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace flashformer {

// Units [begin, end) of those dealt to `owner`, counted in the order in which it takes them.
struct Dealt {
  int64_t owner, begin, end;
};

// What is left to a worker in a phase.
class alignas(64) Share {
 public:
  static constexpr int kPhaseBits = 12, kOwnerBits = 8, kUnitBits = 22;

  // Between forwards.
  void clear() { word_.store(0, std::memory_order_relaxed); }

  // `all`: what its worker was dealt in this phase.
  int64_t left(int64_t phase, const Dealt& all) const {
    const Dealt now = in_phase(word_.load(std::memory_order_relaxed), phase, all);
    return now.end - now.begin;
  }
  // The first `most` units or fewer, or the second half of all that is left. false: nothing is.
  bool take_first(int64_t phase, const Dealt& all, int64_t most, Dealt& taken) {
    return take(phase, all, taken, [&](const Dealt& now) { return std::min(now.begin + most, now.end); }, true);
  }
  bool take_half(int64_t phase, const Dealt& all, Dealt& taken) {
    return take(phase, all, taken, [](const Dealt& now) { return now.begin + (now.end - now.begin) / 2; }, false);
  }
  // By its worker, which has nothing left.
  void put(int64_t phase, const Dealt& units) { word_.store(word_of(phase, units), std::memory_order_relaxed); }

 private:
  static uint64_t word_of(int64_t phase, const Dealt& units) {
    return (((static_cast<uint64_t>(phase + 1) << kOwnerBits | static_cast<uint64_t>(units.owner)) << kUnitBits |
             static_cast<uint64_t>(units.begin))
            << kUnitBits) |
           static_cast<uint64_t>(units.end);
  }
  // A word of an earlier phase says that nobody has begun this one; one of a later phase, that this one is over.
  static Dealt in_phase(uint64_t word, int64_t phase, const Dealt& all) {
    const int64_t of = static_cast<int64_t>(word >> (64 - kPhaseBits)) - 1;
    if (of != phase) return of < phase ? all : Dealt{all.owner, 0, 0};
    constexpr uint64_t units = (1u << kUnitBits) - 1, owners = (1u << kOwnerBits) - 1;
    return {static_cast<int64_t>(word >> (2 * kUnitBits) & owners), static_cast<int64_t>(word >> kUnitBits & units),
            static_cast<int64_t>(word & units)};
  }
  // Cuts what is left in two, and takes one of them. Relaxed: a phase's waits order what its units read and write.
  template <class Cut>
  bool take(int64_t phase, const Dealt& all, Dealt& taken, Cut cut, bool first) {
    uint64_t seen = word_.load(std::memory_order_relaxed);
    while (true) {
      const Dealt now = in_phase(seen, phase, all);
      if (now.begin >= now.end) return false;
      const int64_t at = cut(now);
      const Dealt front = {now.owner, now.begin, at}, back = {now.owner, at, now.end};
      if (word_.compare_exchange_weak(seen, word_of(phase, first ? back : front), std::memory_order_relaxed)) {
        taken = first ? front : back;
        return true;
      }
    }
  }

  std::atomic<uint64_t> word_{0};
};

}  // namespace flashformer
