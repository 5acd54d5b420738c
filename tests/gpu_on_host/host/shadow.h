// The shadow of memory: for every 4 bytes who wrote them last and who has read them since.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "clocks.h"

namespace sim {

enum CellFlag : u8 {
  kWritten = 1,   // or declared initialised
  kAsync = 2,     // the last writer is a bulk copy
  kPending = 4,   // whose bytes have not landed
  kAtomic = 8,    // the last writer is st_relaxed, red or atom
  kMany = 16,     // readers are in readers[extra]
  kSplit = 32,    // bytes[extra] holds a cell per byte
  kMbarrier = 64  // part of an mbarrier
};

struct Cell {
  u32 w_tick = 0;  // 0: before the launch
  u32 r_tick = 0;  // 0: no reader
  u16 w_lane = 0, r_lane = 0;
  u16 w_at = 0, r_at = 0;  // places, see Places
  u8 flags = 0;
  u8 r_mask = 0;  // bytes that readers have read
  u32 extra = 0;
};

// Readers of a word that are not ordered among themselves.
struct Readers {
  struct Warp {
    u32 tick[32];
    u16 at;
  };
  std::vector<std::unique_ptr<Warp>> warps;
};

enum class Kind : u32 { kShared = 0, kMutable = 1, kConstant = 2 };

// Something that can be accessed: a block's shared memory or a registered range of global memory.
struct Region {
  std::string name;
  u8* data = nullptr;  // as registered
  u8* live = nullptr;  // what the launch sees
  std::vector<u8> kept;
  size_t bytes = 0;
  Kind kind = Kind::kConstant;
  bool initialised = true;
  u32 block = 0;  // of shared memory
  std::vector<Cell> cells;
  std::vector<u8> dirty;  // per 1024 cells: touched in this launch
};

struct Access {
  Region& region;
  size_t offset;  // bytes
  u32 bytes;
  u16 place;
};

}  // namespace sim
