// The C interface that tests call through ctypes. Codes: 0 ok, 1 a finding (error_text), 2 wrong use.
#include <cstring>
#include <new>

#include "machine.h"

using sim::Kind;
using sim::Machine;
using sim::u32;
using sim::u64;
using sim::u8;

#define FF_API extern "C" __attribute__((visibility("default")))

// Defined with the device source: runs one thread of the kernel.
extern "C" void ff_thread(const void* launch, u32 smem);

FF_API Machine* ff_create(u32 n_blocks, u32 n_threads, u32 shared_bytes) {
  const u64 components = static_cast<u64>(n_blocks) * (n_threads + sim::kEngines);
  if (n_blocks == 0 || n_threads == 0 || n_threads % sim::kLanes || shared_bytes % 16 || components > 65535)
    return nullptr;
  try {
    return new Machine(n_blocks, n_threads, shared_bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

FF_API void ff_destroy(Machine* m) { delete m; }

FF_API int ff_register_region(Machine* m, void* data, u64 bytes, const char* name, u32 kind, u32 initialised) {
  return m->add_region(data, bytes, name, static_cast<Kind>(kind), initialised != 0) ? 0 : 2;
}

FF_API void ff_remove_regions(Machine* m) { m->remove_regions(); }

FF_API void ff_name_shared(Machine* m, u32 offset, u32 bytes, const char* name) { m->name_shared(offset, bytes, name); }

FF_API void ff_abort_flag(Machine* m, const u32* flag) { m->options.abort_flag = flag; }

FF_API int ff_option(Machine* m, const char* name, long long value) {
  sim::Options& options = m->options;
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("seed")) {
    options.seed = static_cast<u64>(value);
  } else if (is("policy") && value >= 0 && value < static_cast<long long>(sim::Policy::kCount)) {
    options.policy = static_cast<sim::Policy>(value);
  } else if (is("stop_at_deadlock")) {
    options.stop_at_deadlock = value != 0;
  } else if (is("idle_rounds")) {
    options.idle_rounds = static_cast<u64>(value);
  } else if (is("idle_cycles")) {
    options.idle_cycles = static_cast<u64>(value);
  } else if (is("max_steps")) {
    options.max_steps = static_cast<u64>(value);
  } else if (is("max_calls")) {
    options.max_calls = static_cast<u64>(value);
  } else if (is("expect_tx_delta")) {
    options.expect_tx_delta = value;
  } else {
    return 2;
  }
  return 0;
}

FF_API int ff_switch_site(Machine* m, u32 site, u32 mode) {
  if (site >= m->modes.size() || mode > static_cast<u32>(sim::Mode::kUnordered)) return 2;
  m->modes[site] = static_cast<sim::Mode>(mode);
  return 0;
}

FF_API int ff_run(Machine* m, const void* launch) { return m->run(&ff_thread, launch); }

FF_API const char* ff_error_text(const Machine* m) { return m->error.c_str(); }

FF_API void ff_stats(const Machine* m, sim::Stats* stats) { *stats = m->stats; }

FF_API u32 ff_n_sites() { return static_cast<u32>(sim::Site::kCount); }

FF_API const char* ff_site_name(u32 site) {
#define SIM_SITE_NAME(name, what) #name,
  static const char* const names[] = {FF_SITES(SIM_SITE_NAME)};
#undef SIM_SITE_NAME
  return site < ff_n_sites() ? names[site] : "";
}

FF_API u64 ff_site_count(const Machine* m, u32 site) { return site < m->counts.size() ? m->counts[site] : 0; }
