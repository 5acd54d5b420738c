// Memory from the kernel: zeroed, page-aligned, in huge pages where they can be had.
#pragma once

#include <cstddef>

namespace flashformer {

class Region {
 public:
  // Throws std::bad_alloc. Resident: every page is there on return, so that no later use can fail or fault.
  Region(std::size_t n_bytes, bool resident);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_;
  std::size_t size_;    // as asked for
  std::size_t mapped_;  // whole pages
};

}  // namespace flashformer
