// weighted_grad over panels of input features; compiled once per instruction set, as row_stats_rows.cpp. The weights are
// multiplied into b while it is packed, which the product needs anyway.
//
// Floor: N T O I multiply-adds. Against the plain product b^T a by MKL (torch.mm), without weights, in [N, T, I -> O]:
//   float32   [256, 1, 784 -> 512] 0.89   [256, 1, 512 -> 10] 1.2   [8, 1, 784 -> 512] 0.83   [32, 64, 256 -> 768] 0.96
//             [32, 64, 256 -> 256] 0.95   [32, 64, 256 -> 1024] 0.90   [32, 64, 1024 -> 256] 0.96
//   float64   0.77 to 0.95   bfloat16 1.6 to 1.9: that product has an instruction of its own, but rounds w b to 8 bits
#include "cpu/vector.h"

#include "cpu/weighted_grad_rows.h"

#include "cpu/for_type.h"
#include "cpu/panels.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

constexpr int64_t DEPTH = 256;        // positions at a time: a strip of a is 16 KiB of float32, in L1
constexpr int64_t LEFT_PANELS = 32;   // of w b at a time: 512 KiB, in L2

// A tile added to its place in the result; the first one begins it.
template <class F>
KDAIF_INLINE void add_tile(const F* left, const F* right, int64_t depth, bool begins, int64_t rows, int64_t columns,
                           int64_t stride, F* to) {
  if (rows == PANEL && columns == PANEL && !begins) {
    for_tile<F>(left, right, depth, [&](int64_t m, int64_t v, Vec<F> sums) __attribute__((always_inline)) {
      F* at = to + m * stride + v * LANES<F>;
      store(load(at) + sums, at);
    });
    return;
  }
  for_tile<F>(left, right, depth, [&](int64_t m, int64_t v, Vec<F> sums) __attribute__((always_inline)) {
    F* at = to + m * stride + v * LANES<F>;
    const int64_t lanes = std::min(LANES<F>, columns - v * LANES<F>);
    if (m >= rows || lanes <= 0) return;
    if (lanes == LANES<F>) store(begins ? sums : load(at) + sums, at);
    else store(begins ? sums : load(at, lanes, F(0)) + sums, at, lanes);
  });
}

// Where a block's positions are, and what they weigh: a division for each is paid once, not in every panel.
template <class T>
struct Block {
  using F = typename Accumulate<T>::type;
  const T *inputs[DEPTH], *output_grads[DEPTH];
  F weights[DEPTH];

  void find(const WeightedGrad& w, int64_t first, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t n = (first + k) / w.layer.T, t = (first + k) % w.layer.T;
      inputs[k] = w.layer.inputs.at<T>(n, t);
      output_grads[k] = w.layer.output_grads.at<T>(n, t);
      weights[k] = static_cast<const F*>(w.weights)[n * w.weight_stride];
    }
  }
};

template <class T>
void weighted_grad_panels(const WeightedGrad& w, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const int64_t I = w.layer.inputs.width, O = w.layer.output_grads.width, rows = w.layer.rows();
  Scratch<F> lefts(std::min(LEFT_PANELS, panels_of(O)), DEPTH * PANEL), right(1, DEPTH * PANEL);
  Block<T> block;
  for (int64_t first = 0; first < rows; first += DEPTH) {
    const int64_t depth = std::min(DEPTH, rows - first);
    block.find(w, first, depth);
    for (int64_t o = 0; o < O; o += LEFT_PANELS * PANEL) {
      const int64_t height = std::min(LEFT_PANELS * PANEL, O - o);
      for (int64_t p = 0; p < height; p += PANEL)
        pack_columns<F>([&](int64_t k) __attribute__((always_inline)) { return block.output_grads[k] + o + p; },
                        [&](int64_t k) __attribute__((always_inline)) { return block.weights[k]; },
                        std::min(PANEL, height - p), depth, lefts.row(p / PANEL));
      for (int64_t i = begin * PANEL; i < std::min(I, end * PANEL); i += PANEL) {
        const int64_t columns = std::min(PANEL, I - i);
        pack_columns<F>([&](int64_t k) __attribute__((always_inline)) { return block.inputs[k] + i; }, columns, depth,
                        right.row(0));
        for (int64_t p = 0; p < height; p += PANEL)
          add_tile<F>(lefts.row(p / PANEL), right.row(0), depth, first == 0, std::min(PANEL, height - p), columns, I,
                      static_cast<F*>(w.sums) + (o + p) * I + i);
      }
    }
  }
}

}  // namespace

void weighted_grad_rows(const WeightedGrad& w, int64_t begin, int64_t end) {
  for_type(w.layer.type, [&](auto element) { weighted_grad_panels<decltype(element)>(w, begin, end); });
}

}  // namespace kdaif::KDAIF_LEVEL
