// One thread's working memory: rows of `count` elements, each beginning on a cache line and padded to whole vectors.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace kdaif::KDAIF_LEVEL {
namespace {

template <class F>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t count)
      : stride_((count * int64_t(sizeof(F)) + 63) / 64 * 64),
        memory_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rows * stride_ + 64)))) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  F* row(int64_t i) { return reinterpret_cast<F*>(memory_ + i * stride_); }

 private:
  int64_t stride_;
  char* memory_;
};

}  // namespace
}  // namespace kdaif::KDAIF_LEVEL
