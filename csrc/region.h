// Memory from the kernel, page-aligned and zeroed, in huge pages where they can be had.
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
  char* mapping_;
  std::size_t mapped_;  // bytes at mapping_: the region in whole pages, and room to align it
  char* data_;          // aligned to a huge page where the region holds one
  std::size_t size_;    // as asked for
};

}  // namespace flashformer
