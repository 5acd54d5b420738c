// Fibers: a stack each, switched by hand. Only what the calling convention says must survive a call is saved.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sim {

// Saves the running context, its stack pointer into *from, and goes on at `to`.
extern "C" void sim_switch(void** from, void* to);

// Where every fiber begins. Never returns.
extern "C" [[noreturn]] void sim_fiber_main();

constexpr size_t kStackBytes = 64 << 10;

// Stacks for n fibers, each above a page that may not be touched.
class Stacks {
 public:
  explicit Stacks(size_t n);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void* fresh(size_t i) const;  // the stack pointer of a fiber that will begin in sim_fiber_main

 private:
  size_t n_;
  uint8_t* memory_;
};

}  // namespace sim
