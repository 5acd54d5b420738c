#include "region.h"

#include <sys/mman.h>

#include <new>

namespace flashformer {

namespace {
constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;
}

Region::Region(std::size_t n_bytes, bool resident) : size_(n_bytes), mapped_((n_bytes + kPage - 1) / kPage * kPage) {
  if (mapped_ == 0) mapped_ = kPage;
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(p);
  if (mapped_ >= kHugePage) madvise(data_, mapped_, MADV_HUGEPAGE);  // a refusal costs a little speed, nothing else
  if (!resident) return;
  for (std::size_t at = 0; at < mapped_; at += kPage) *const_cast<volatile char*>(data_ + at) = 0;
}

Region::~Region() { munmap(data_, mapped_); }

}  // namespace flashformer
