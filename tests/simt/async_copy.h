// Asynchronous copies into shared memory and dynamic shared memory, for simt.h's threads.
//
// A copy happens when its thread waits for it, at the latest moment that the kernel permits: what is read without a wait
// is what was there before. Dynamic shared memory is a heap buffer of exactly the size asked for, full of NaN, so that
// AddressSanitizer sees one byte too far.
#pragma once
#include <deque>
#include <map>

#include "simt.h"

namespace simt {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};
struct Copies {
  std::vector<Copy> open;              // since the last commit
  std::deque<std::vector<Copy>> groups;  // the oldest first
};
inline std::map<unsigned, Copies> copies;  // by thread of the running block
inline std::unique_ptr<unsigned char[]> dynamic_memory;

inline void wait_prior(size_t count) {
  auto& groups = copies[current->thread].groups;
  for (; groups.size() > count; groups.pop_front())
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, c.size);
}
inline void commit() {
  Copies& mine = copies[current->thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

// Before each block; copies that nobody waited for never happen.
inline void renew_shared(size_t bytes) {
  copies.clear();
  dynamic_memory.reset(new unsigned char[bytes]);
  std::memset(dynamic_memory.get(), 0xff, bytes);
}

}  // namespace simt

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  simt::copies[simt::current->thread].open.push_back({to, from, size});
}
inline void __pipeline_commit() { simt::commit(); }
inline void __pipeline_wait_prior(size_t count) { simt::wait_prior(count < 8 ? count : 8); }  // as CUDA's own
inline void* dynamic_shared_memory() { return simt::dynamic_memory.get(); }
