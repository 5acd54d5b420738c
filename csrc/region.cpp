#include "region.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

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

Region::Region(int fd, std::size_t offset, std::size_t n_bytes, std::size_t n_threads) : Region(n_bytes, false) {
  std::atomic<std::size_t> next{0};
  std::atomic<int> error{0};
  const auto read = [&] {
    for (std::size_t at; error == 0 && (at = next.fetch_add(kHugePage)) < n_bytes;) {
      const std::size_t end = at + kHugePage < n_bytes ? at + kHugePage : n_bytes;
      while (at < end) {
        const ssize_t n = pread(fd, data_ + at, end - at, static_cast<off_t>(offset + at));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
          error = n < 0 ? errno : EIO;
          return;
        }
        at += static_cast<std::size_t>(n);
      }
    }
  };
  std::vector<std::jthread> others;
  for (std::size_t i = 1; i < n_threads; ++i) others.emplace_back(read);
  read();
  others.clear();
  if (error != 0) throw std::system_error(error, std::generic_category(), "read");
}

Region::~Region() { munmap(mapping_, mapped_); }

}  // namespace flashformer
