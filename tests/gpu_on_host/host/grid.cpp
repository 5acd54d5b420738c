// Ordering between blocks. The project's rule is stricter than PTX asks: a release publishes only what fence_gpu in the
// releasing lane, or in a lane that it met since in a barrier, has covered. So a missing fence is always found.
#include "machine.h"

namespace sim {

Word& Machine::word(const u32* p, u16 place) {
  Region& region = find(p, 4, place);
  if (reinterpret_cast<size_t>(p) % 4 || region.kind != Kind::kMutable)
    fail(describe(*current) + ": " + describe(place) + " of " +
         location(region, static_cast<size_t>(reinterpret_cast<const u8*>(p) - region.data)) +
         (region.kind != Kind::kMutable ? ", a region that is constant during the launch" : ", misaligned"));
  Word& word = words_[p];
  if (word.released.empty()) {
    word.released.assign(warps[0].known.size(), 0);
    word.source = new_source();
    word.value = reinterpret_cast<u32*>(region.live + (reinterpret_cast<const u8*>(p) - region.data));
  }
  return word;
}

Snapshot Machine::released(Word& word) {
  if (!word.snapshot) word.snapshot = std::make_shared<Clock>(word.released);
  return word.snapshot;
}

void Machine::publish(Word& word, bool replace, u16 place) {
  Block& block = blocks[current->block];
  const Clock visible = gpu_visible(*current);
  if (replace) {
    word.released = visible;
    word.source = new_source();
  } else {
    join(word.released, visible);
  }
  word.snapshot = nullptr;
  block.released = std::make_shared<Clock>(visible);
  block.could = knowledge(*current);
  block.released_at = place;
}

// A relaxed read of a word with which so much was published: the lane's next fence makes it known.
void Machine::sees(const Clock& released) {
  auto seen = std::make_shared<Clock>(released);
  if (current->unfenced) join(*seen, *current->unfenced);
  current->unfenced = seen;
}

void Machine::changed(const u32* p, Word& word) {
  progress();
  wake_all(word.waiters);
  if (p == options.abort_flag && *word.value) checking = false;
}

// A lane that reads the same value again and again sleeps until the word changes (or, for a relaxed read, anything).
u32 Machine::poll(const u32* p, Word& word, u16 place, bool any) {
  Lane& lane = *current;
  ++stats.polls;
  Poll& last = lane.last[any];
  const bool again = last.p == p && last.seen == *word.value && (!any || last.progress == progress_);
  if (again && !chance(16)) {
    lane.place = place;
    lane.polls = p;
    word.waiters.push_back(lane.id);
    block(State::kPoll);
  }
  last = {p, *word.value, progress_};
  return *word.value;
}

namespace {

Access access(Machine& m, const u32* p, u16 place) {
  Region& region = m.find(p, 4, place);
  return {region, static_cast<size_t>(reinterpret_cast<const u8*>(p) - region.data), 4, place};
}

}  // namespace

void fence_gpu(Site site, At) {
  Machine& m = *machine;
  if (m.called_at(site) != Mode::kOn) return;
  Lane& lane = *m.current;
  if (lane.unfenced) m.learn(lane, 0, lane.unfenced);
  lane.unfenced = nullptr;
  lane.fenced = m.knowledge(lane);
}

void red_relaxed_add(Site site, u32* p, u32 v, At at) {
  Machine& m = *machine;
  const Mode mode = m.reach(site);
  if (mode == Mode::kOff) return;
  const u16 place = m.place(Call::red_relaxed_add, at, site);
  Word& word = m.word(p, place);
  m.atomic_read(access(m, p, place));
  m.write(access(m, p, place), true);
  if (mode == Mode::kOn) m.publish(word, false, place);
  *word.value += v;
  m.changed(p, word);
}

u32 ld_acquire(Site site, const u32* p, At at) {
  Machine& m = *machine;
  m.reach(site);
  const u16 place = m.place(Call::ld_acquire, at, site);
  Word& word = m.word(p, place);
  m.atomic_read(access(m, p, place));
  const u32 value = m.poll(p, word, place, false);
  if (m.modes[static_cast<u32>(site)] == Mode::kOn) m.learn(*m.current, word.source, m.released(word));
  return value;
}

namespace {

// The value before. What others have published before is known at once if `acquires`, else from the next fence on.
u32 atom_add(Call call, Site site, u32* p, u32 v, At at, bool acquires) {
  Machine& m = *machine;
  m.reach(site);
  const u16 place = m.place(call, at, site);
  Word& word = m.word(p, place);
  m.atomic_read(access(m, p, place));
  m.write(access(m, p, place), true);
  if (m.modes[static_cast<u32>(site)] == Mode::kOn) {
    const Snapshot before = m.released(word);
    m.publish(word, false, place);
    if (acquires) {
      m.learn(*m.current, word.source, before);
    } else {
      m.sees(*before);
    }
  }
  const u32 old = *word.value;
  *word.value += v;
  m.changed(p, word);
  return old;
}

}  // namespace

u32 atom_add_relaxed(Site site, u32* p, u32 v, At at) {
  return atom_add(Call::atom_add_relaxed, site, p, v, at, false);
}

u32 atom_add_acq_rel(Site site, u32* p, u32 v, At at) { return atom_add(Call::atom_add_acq_rel, site, p, v, at, true); }

u32 ld_relaxed(const u32* p, At at) {
  Machine& m = *machine;
  m.called();
  m.maybe_yield();
  const u16 place = m.place(Call::ld_relaxed, at);
  Word& word = m.word(p, place);
  m.atomic_read(access(m, p, place));
  const u32 value = m.poll(p, word, place, true);
  m.sees(*m.released(word));
  return value;
}

void st_relaxed(u32* p, u32 v, At at) {
  Machine& m = *machine;
  m.called();
  m.maybe_yield();
  const u16 place = m.place(Call::st_relaxed, at);
  Word& word = m.word(p, place);
  m.write(access(m, p, place), true);
  m.publish(word, true, place);
  *word.value = v;
  m.changed(p, word);
}

u64 clock_cycles() {
  Machine& m = *machine;
  m.called();
  return 4 * m.stats.calls + m.skipped_cycles;
}

void nanosleep(u32 ns, At at) {
  Machine& m = *machine;
  m.called();
  m.skipped_cycles += ns / 32;  // other lanes sleep at the same time
  m.current->place = m.place(Call::nanosleep, at);
  m.maybe_yield();
}

}  // namespace sim
