// Waits end: no spin of the kernel lasts longer than launch.spin_limit cycles.
//
// A wait that takes too long writes who waited where, what it saw and what it expected, once per launch, and raises the
// abort flag. Every spin looks at the flag now and then. Once it is seen, waits return at once, nothing is loaded or
// multiplied any more, and everyone walks on through the remaining phases, where all barriers still meet. So a launch
// ends, with worthless results and a record, instead of hanging the GPU.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace flashformer {

// Who waits, and for what.
struct Waiter {
  const Launch& launch;
  u32 block, phase;
  Site site;
  u32 patience = 1;         // in spin limits
  u32 looks_per_flag = 16;  // in vain, before a look at the flag
};

inline COLD void write_record(u32* report, u32* failed, u32 block, u32 phase, u32 site, u32 seen, u32 expected) {
  if (atom_add_acq_rel(Site::kAbortClaim, report + kReportClaim, 1) != 0) return;
  st_relaxed(report + kReportBlock, block);
  st_relaxed(report + kReportPhase, phase);
  st_relaxed(report + kReportSite, site);
  st_relaxed(report + kReportSeen, seen);
  st_relaxed(report + kReportExpected, expected);
  st_relaxed(failed, 1);
  st_relaxed(report + kReportFlag, 1);
}
inline DEVICE void write_abort(const Waiter& waiter, u32 seen, u32 expected) {
  const Launch& launch = waiter.launch;
  write_record(launch.report, launch.failed, waiter.block, waiter.phase, static_cast<u32>(waiter.site), seen, expected);
}

// The patience of one wait.
struct Spin {
  u64 begin = 0;
  u32 looks = 0;

  // After a look that was in vain: whether to give up, because others did or the limit is reached.
  DEVICE bool give_up(const Waiter& waiter, u32 seen, u32 expected) {
    const u64 now = clock_cycles();
    if (looks == 0) begin = now;
    if (++looks % waiter.looks_per_flag == 0 && ld_relaxed(waiter.launch.report + kReportFlag) != 0) return true;
    if (now - begin <= waiter.patience * waiter.launch.spin_limit) return false;
    write_abort(waiter, seen, expected);
    return true;
  }
};

}  // namespace flashformer
