// persample_dot by positions, b^T V a, for few positions a sample: the product Z = a V^T is formed in tiles, and each is
// multiplied by b and summed while it is in registers. Since that is linear, even the depth may be cut.
//
// Floor: K N T O I multiply-adds. Against (product, product with multiply and sum) by MKL and torch, float32:
//   [256, 1, 784 -> 512] K = 1: 0.96 and 0.85, K = 4: 0.90 and 0.89   [256, 1, 512 -> 10] K = 1: 0.79 and 0.71
//   [8, 1, 784 -> 512] K = 1: 1.6 and 1.4: half of each tile is empty, and packing V costs as much as the products
#include "cpu/vector.h"

#include "cpu/persample_dot_rows.h"

#include "cpu/for_type.h"
#include "cpu/panels.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

constexpr int64_t DEPTH = 256;       // input features at a time: a panel of V is 16 KiB of float32, in L1
constexpr int64_t LEFT_PANELS = 16;  // of 16 positions at a time: 256 KiB, in L2

template <class T>
class RowBlock {
 public:
  using F = typename Accumulate<T>::type;

  RowBlock() : lefts_(LEFT_PANELS, DEPTH * PANEL), right_(1, DEPTH * PANEL), sums_(1, LEFT_PANELS * PANEL * PANEL) {}

  void find(const LinearLayer& layer, int64_t first, int64_t count) {
    count_ = count;
    for (int64_t r = 0; r < count; ++r) {
      inputs_[r] = layer.input<T>(first + r);
      output_grads_[r] = layer.output_grad<T>(first + r);
    }
  }

  void pack_inputs(int64_t first, int64_t depth) {
    for (int64_t p = 0; p < count_; p += PANEL)
      pack_rows<F>([&](int64_t m) __attribute__((always_inline)) { return inputs_[p + m]; }, std::min(PANEL, count_ - p),
                   first, depth, lefts_.row(p / PANEL));
  }

  // Adds sum_{o, i} b_o V_oi a_i over i in [first, first + depth) to dots[row * stride].
  void add_dots(const F* direction, int64_t I, int64_t O, int64_t first, int64_t depth, F* dots, int64_t stride) {
    F *right = right_.row(0), *sums = sums_.row(0);
    std::fill(sums, sums + count_ * PANEL, F(0));
    for (int64_t o = 0; o < O; o += PANEL) {
      const int64_t columns = std::min(PANEL, O - o);
      pack_rows<F>([&](int64_t m) __attribute__((always_inline)) { return direction + (o + m) * I; }, columns, first,
                   depth, right);
      for (int64_t p = 0; p < count_; p += PANEL) add_tile(p, right, depth, o, columns, sums);
    }
    for (int64_t r = 0; r < count_; ++r) {
      Vec<F> total{};
      for (int64_t v = 0; v < PANEL; v += LANES<F>) total += load(sums + r * PANEL + v);
      dots[r * stride] += sum_of(total);
    }
  }

 private:
  // The tile of Z of the positions from p and the output features from o, times b, added to the positions' sums.
  __attribute__((always_inline)) inline void add_tile(int64_t p, const F* right, int64_t depth, int64_t o, int64_t columns,
                                                      F* sums) {
    const F* left = lefts_.row(p / PANEL);
    const T* const* b = output_grads_ + p;
    F* to = sums + p * PANEL;
    if (columns == PANEL && p + PANEL <= count_) {
      for_tile<F>(left, right, depth, [&](int64_t m, int64_t v, Vec<F> z) __attribute__((always_inline)) {
        F* at = to + m * PANEL + v * LANES<F>;
        store(load(at) + z * load(b[m] + o + v * LANES<F>), at);
      });
      return;
    }
    const int64_t rows = std::min(PANEL, count_ - p);
    for_tile<F>(left, right, depth, [&](int64_t m, int64_t v, Vec<F> z) __attribute__((always_inline)) {
      const int64_t lanes = std::min(LANES<F>, columns - v * LANES<F>);
      if (m >= rows || lanes <= 0) return;
      const T* x = b[m] + o + v * LANES<F>;
      F* at = to + m * PANEL + v * LANES<F>;
      store(load(at) + z * (lanes == LANES<F> ? load(x) : load(x, lanes, F(0))), at);
    });
  }

  int64_t count_ = 0;
  const T *inputs_[LEFT_PANELS * PANEL], *output_grads_[LEFT_PANELS * PANEL];
  Scratch<F> lefts_, right_, sums_;
};

template <class T>
void dots_of_panels(const PersampleDot& d, int64_t begin, int64_t end) {
  using F = typename Accumulate<T>::type;
  const int64_t I = d.layer.inputs.width, O = d.layer.output_grads.width, last = std::min(d.layer.rows(), end * PANEL);
  RowBlock<T> block;
  for (int64_t row = begin * PANEL; row < last; row += LEFT_PANELS * PANEL) {
    block.find(d.layer, row, std::min(LEFT_PANELS * PANEL, last - row));
    for (int64_t first = 0; first < I; first += DEPTH) {
      const int64_t depth = std::min(DEPTH, I - first);
      block.pack_inputs(first, depth);
      for (int64_t k = 0; k < d.K; ++k)
        block.add_dots(static_cast<const F*>(d.directions) + k * O * I, I, O, first, depth,
                       static_cast<F*>(d.dots) + row * d.K + k, d.K);
    }
  }
}

}  // namespace

void persample_dot_rows(const PersampleDot& d, int64_t begin, int64_t end) {
  for_type(d.layer.type, [&](auto element) { dots_of_panels<decltype(element)>(d, begin, end); });
}

}  // namespace kdaif::KDAIF_LEVEL
