// What may be accessed, and the accesses themselves. While a launch runs, memory that changes is kept in a copy and the
// registered memory holds poison: what goes around the wrappers reads poison, or leaves its mark there and is found.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace sim {
namespace {

constexpr u8 kPoison = 0xFF;

std::string hex(size_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", value);
  return text;
}

}  // namespace

bool Machine::add_region(void* data, size_t bytes, const char* name, Kind kind, bool initialised) {
  const u8* begin = static_cast<const u8*>(data);
  for (const Region& other : regions_)
    if (begin < other.data + other.bytes && other.data < begin + bytes) return false;
  Region region;
  region.name = name;
  region.data = static_cast<u8*>(data);
  region.bytes = bytes;
  region.kind = kind;
  region.initialised = initialised;
  region.live = region.data;
  if (kind == Kind::kMutable) {
    region.cells.resize((bytes + 3) / 4);
    region.dirty.resize(region.cells.size() / 1024 + 1);
  }
  const auto after =
      std::find_if(regions_.begin(), regions_.end(), [&](const Region& r) { return r.data > region.data; });
  regions_.insert(after, std::move(region));
  return true;
}

void Machine::hide_memory() {
  for (Region& region : regions_) {
    if (region.kind != Kind::kMutable) continue;
    region.kept.assign(region.data, region.data + region.bytes);
    region.live = region.kept.data();
    std::memset(region.data, kPoison, region.bytes);
  }
}

void Machine::show_memory() {
  for (Region& region : regions_) {
    if (region.kind != Kind::kMutable) continue;
    const auto mark = std::find_if(region.data, region.data + region.bytes, [](u8 byte) { return byte != kPoison; });
    if (mark != region.data + region.bytes && error.empty())
      error = "written without a wrapper: " + location(region, static_cast<size_t>(mark - region.data));
    std::memcpy(region.data, region.kept.data(), region.bytes);
    region.live = region.data;
  }
}

Region& Machine::find(const void* p, u32 bytes, u16 place) {
  const u8* a = static_cast<const u8*>(p);
  const auto holds = [&](const Region& r) { return a >= r.data && a + bytes <= r.data + r.bytes; };
  if (last_region_ < regions_.size() && holds(regions_[last_region_])) return regions_[last_region_];
  const Region* nearest = nullptr;
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (holds(regions_[i])) return regions_[last_region_ = i];
    if (a >= regions_[i].data) nearest = &regions_[i];
  }
  std::string where = "address " + hex(reinterpret_cast<size_t>(p));
  if (nearest)
    where += ", " + nearest->name + " + " + std::to_string(a - nearest->data) + " of " +
             std::to_string(nearest->bytes) + " bytes";
  fail(describe(*current) + " is out of bounds: " + describe(place) + " of " + std::to_string(bytes) + " bytes at " +
       where);
}

size_t Machine::shared_offset(u32 a, u32 bytes, u32 align, u16 place) {
  const size_t offset = static_cast<size_t>(a) - kSharedBase;
  if (a < kSharedBase || offset + bytes > shared_bytes)
    fail(describe(*current) + " is out of bounds: " + describe(place) + " of " + std::to_string(bytes) +
         " bytes at shared + " + std::to_string(static_cast<i64>(a) - kSharedBase) + " of " +
         std::to_string(shared_bytes) + " bytes");
  if (a % align)
    fail(describe(*current) + " is misaligned: " + describe(place) + " at shared + " + std::to_string(offset) +
         ", expected a multiple of " + std::to_string(align));
  return offset;
}

namespace {

Access global(Machine& m, const void* p, u32 bytes, u16 place) {
  Region& region = m.find(p, bytes, place);
  if (reinterpret_cast<size_t>(p) % bytes)
    m.fail(m.describe(*m.current) + " is misaligned: " + m.describe(place) + " at " +
           m.location(region, static_cast<size_t>(static_cast<const u8*>(p) - region.data)) +
           ", expected a multiple of " + std::to_string(bytes));
  return {region, static_cast<size_t>(static_cast<const u8*>(p) - region.data), bytes, place};
}

}  // namespace

void load_shared(void* to, u32 a, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const u16 place = m.place(Call::ld_shared, at);
  const size_t offset = m.shared_offset(a, bytes, bytes, place);
  Region& region = m.blocks[m.current->block].shared;
  m.read({region, offset, bytes, place});
  std::memcpy(to, region.live + offset, bytes);
}

void store_shared(u32 a, const void* from, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const u16 place = m.place(Call::st_shared, at);
  const size_t offset = m.shared_offset(a, bytes, bytes, place);
  Region& region = m.blocks[m.current->block].shared;
  m.write({region, offset, bytes, place}, false);
  std::memcpy(region.live + offset, from, bytes);
}

void load_global(void* to, const void* p, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const Access access = global(m, p, bytes, m.place(Call::ld_global, at));
  if (access.region.kind == Kind::kMutable) m.read(access);
  std::memcpy(to, access.region.live + access.offset, bytes);
}

void store_global(void* p, const void* from, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const Access access = global(m, p, bytes, m.place(Call::st_global, at));
  if (access.region.kind != Kind::kMutable)
    m.fail(m.describe(*m.current) + " writes a region that is constant during the launch: " +
           m.location(access.region, access.offset) + " by " + m.describe(access.place));
  m.write(access, false);
  std::memcpy(access.region.live + access.offset, from, bytes);
}

void load_const(void* to, const void* p, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const Access access = global(m, p, bytes, m.place(Call::ld_const, at));
  if (access.region.kind == Kind::kMutable)
    m.fail("ld.global.nc of data written in the launch: " + m.describe(*m.current) + " reads " +
           m.location(access.region, access.offset) + " by " + m.describe(access.place) +
           ", a region that changes; expected ld_global");
  std::memcpy(to, access.region.live + access.offset, bytes);
}

void prefetch(const void* p, u32 bytes, At at) {
  Machine& m = *machine;
  m.called();
  const u16 place = m.place(Call::prefetch_l2_bulk, at);
  m.find(p, bytes, place);
  if (reinterpret_cast<size_t>(p) % 16 || bytes % 16)
    m.fail(m.describe(*m.current) + ": " + m.describe(place) + " needs an address and a size that are multiples of 16");
}

}  // namespace sim
