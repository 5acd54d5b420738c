#include "region.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace flashformer {

namespace {
constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;
}

Region::Region(std::size_t n_bytes, bool resident) : size_(n_bytes) {
  const std::size_t pages = n_bytes ? (n_bytes + kPage - 1) / kPage * kPage : kPage;
  const bool huge = pages >= kHugePage;
  mapped_ = pages + (huge ? kHugePage : 0);
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mapping_ = data_ = static_cast<char*>(p);
  if (huge) {
    data_ += (kHugePage - reinterpret_cast<std::uintptr_t>(p) % kHugePage) % kHugePage;
    madvise(data_, pages, MADV_HUGEPAGE);  // a refusal costs a little speed, nothing else
  }
  if (!resident) return;
  for (std::size_t at = 0; at < pages; at += kPage) *const_cast<volatile char*>(data_ + at) = 0;
}

Region::~Region() { munmap(mapping_, mapped_); }

}  // namespace flashformer
