// Fresh memory for large results: the kernel hands it out in pages of 4 KiB, one fault each, which takes longer than
// filling them ([2048, 32000] float32: 190 ms a call, 67 ms with pages of 2 MiB). Asking for large ones is safe
// whatever the memory is, and without effect where the system does not grant them.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdaif {

inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t worth_it = int64_t{8} << 20, huge = int64_t{2} << 20;
  if (bytes < worth_it) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace kdaif
