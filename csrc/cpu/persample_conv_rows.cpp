// persample_conv over panels of samples; compiled once per instruction set (KDAIF_LEVEL), so nothing here may have
// external linkage but the functions at the end, and no library template may be instantiated.
//
// A sample's inputs are laid out once as a zero-padded image, in chunks of channels, channels innermost. What one output
// position meets of a kernel row is then contiguous, so no patches are ever built: G is summed in registers as an outer
// product over positions, output channels in the lanes and columns broadcast from the image. Where groups fill vectors
// better (depthwise), groups are the lanes.
//
// Floor: N O Q P multiply-adds (Q = C / groups * kernel elements, P positions), 16 a cycle in float32 with AVX-512 on
// Zen 4; the bytes are those of both images and of G where it is wanted.
//
// Measured against aten::convolution_backward for the weight alone, which gives the batch's sum only (oneDNN, torch 2.13,
// Zen 4, one thread, medians of interleaved CPU times in one process on a machine that others used too; float32, k x k
// kernels): time with one direction and no G / with G written to a given buffer, as a multiple of the batch's; ranges are
// of two runs.
//   [64, 3, 32, 32] -> 32, 3 x 3      0.91-1.01 / 0.81-0.95    [64, 32, 16, 16] -> 64, 3 x 3  0.94 / 0.99
//   [64, 64, 8, 8] -> 128, 3 x 3      1.06 / 1.22-1.25         [32, 16, 32, 32] -> 16, 3 x 3  0.75 / 0.73
//   [32, 16, 32, 32] -> 32, stride 2  0.77 / 0.76              [32, 64, 8, 8] -> 64, 3 x 3    0.88-0.97 / 1.00-1.10
//   [32, 16, 32, 32] -> 32, 1 x 1, stride 2  0.39-0.47 / 0.29-0.35
//   [8, 256, 28, 28] -> 64, 1 x 1  0.99 / 1.00                 [16, 64, 32, 32], depthwise 3 x 3  0.49 / 0.39
// The 3 x 3 ones of 32 and 64 channels ran at 35-48 G multiply-adds a second, as the others' load varied. Small images pay
// for transposing and writing G, which the batch's sum does not have.
#include "cpu/vector.h"

#include "cpu/persample_conv_panels.h"
#include "cpu/persample_conv_rows.h"

#include "cpu/for_type.h"
#include "cpu/scratch.h"

namespace kdaif::KDAIF_LEVEL {
namespace {

// Sums that fit the registers, besides two vectors of output gradients and one of inputs.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 12;
#else
constexpr int TILE = 6;
#endif

template <class F>
struct Block {
  const F* image;
  const int64_t* windows;         // of the block's positions
  const F* output_grads;          // [positions, stride]
  int64_t stride, positions;
  const int64_t* column_offsets;  // of the tile's columns
  const int64_t* column_rows;
  F* panel;                       // [row_columns, width]
  bool first;                     // of the sample: nothing to add to
};

// Dense: `VECTORS` of output channels times COLUMNS neighbours in the image.
template <int COLUMNS, int VECTORS, class F> __attribute__((noinline)) void add_tile(const Block<F>& block) {
  constexpr int64_t L = LANES<F>, width = VECTORS * L;
  Vec<F> sums[COLUMNS][VECTORS] = {};
  const F* image = block.image + block.column_offsets[0];
  const F* b = block.output_grads;
  for (int64_t p = 0; p < block.positions; ++p, b += width) {
    const F* window = image + block.windows[p];
    Vec<F> grads[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) grads[v] = load(b + v * L);
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[c][v] += window[c] * grads[v];
  }
#pragma GCC unroll 12
  for (int c = 0; c < COLUMNS; ++c) {
    F* row = block.panel + block.column_rows[c] * width;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(block.first ? sums[c][v] : sums[c][v] + load(row + v * L), row + v * L);
  }
}

// By group: a vector of groups, COLUMNS anywhere in the window.
template <int COLUMNS, class F> __attribute__((noinline)) void add_group_tile(const Block<F>& block) {
  constexpr int64_t L = LANES<F>;
  Vec<F> sums[COLUMNS] = {};
  const F* columns[COLUMNS];
  for (int c = 0; c < COLUMNS; ++c) columns[c] = block.image + block.column_offsets[c];
  const F* b = block.output_grads;
  for (int64_t p = 0; p < block.positions; ++p, b += block.stride) {
    const int64_t window = block.windows[p];
    const Vec<F> grads = load(b);
#pragma GCC unroll 12
    for (int c = 0; c < COLUMNS; ++c) sums[c] += load(columns[c] + window) * grads;
  }
#pragma GCC unroll 12
  for (int c = 0; c < COLUMNS; ++c) {
    F* row = block.panel + block.column_rows[c] * L;
    store(block.first ? sums[c] : sums[c] + load(row), row);
  }
}

template <int COLUMNS, class F> KDAIF_INLINE void add_columns(const Block<F>& block, int64_t columns, bool by_group, int64_t width) {
  if constexpr (COLUMNS > 0) {
    if (columns != COLUMNS) return add_columns<COLUMNS - 1>(block, columns, by_group, width);
    if (by_group) return add_group_tile<COLUMNS>(block);
    return width == LANES<F> ? add_tile<COLUMNS, 1>(block) : add_tile<COLUMNS, 2>(block);
  }
}

// One thread's scratch, and which image is in it.
template <class F>
class Panels {
 public:
  explicit Panels(const PersampleConv& conv)
      : conv_(conv),
        outputs_(conv.by_group ? conv.group_outputs : 1),
        image_(1, conv.scratch_elements),
        grads_(1, CONV_BLOCK * 2 * LANES<F> * outputs_),
        panel_(1, conv.row_columns * 2 * LANES<F>) {
    // What is padding stays zero: images are laid out over each other.
    std::memset(image_.row(0), 0, static_cast<size_t>(conv.scratch_elements) * sizeof(F));
    for (int64_t p = 0; p < CONV_BLOCK; ++p) places_[p] = p;
  }

  template <class T> void run(int64_t sample, int64_t p) {
    const ConvPanel& shape = conv_.panels[p];
    lay_out_image<T>(sample, shape);
    const int64_t P = conv_.output_grads.positions;
    for (int64_t begin = 0; begin < P; begin += CONV_BLOCK) {
      const int64_t count = P - begin < CONV_BLOCK ? P - begin : CONV_BLOCK;
      lay_out_grads<T>(sample, shape, begin, count);
      for (int64_t o = 0; o < outputs_; ++o) add_block(shape, o, begin, count);
    }
    finish_panel<T>(conv_, sample, p, panel_.row(0));
  }

 private:
  template <class T> void lay_out_image(int64_t sample, const ConvPanel& shape) {
    const int64_t group = conv_.by_group ? shape.first_row : shape.group;
    if (sample == sample_ && group == group_) return;
    sample_ = sample, group_ = group;
    const ConvImages& x = conv_.inputs;
    const T* first = static_cast<const T*>(x.data) + sample * x.sample_stride + group * conv_.group_inputs * x.channel_stride;
    F* image = image_.row(0);
    const Rows one_group{nullptr, x.channel_stride, x.position_offsets};
    const Rows across_groups{nullptr, x.channel_stride * conv_.group_inputs, x.position_offsets};
    if (!conv_.by_group) {
      const int64_t width = conv_.chunk_channels;
      for (int64_t c = 0; c < conv_.group_inputs; c += width, image += conv_.chunk_elements) {
        const int64_t channels = conv_.group_inputs - c < width ? conv_.group_inputs - c : width;
        transpose_rows(first + c * x.channel_stride, one_group, channels, x.positions, conv_.scratch_places, image, width);
      }
      return;
    }
    for (int64_t c = 0; c < conv_.group_inputs; ++c)
      transpose_rows(first + c * x.channel_stride, across_groups, shape.rows, x.positions, conv_.scratch_places,
                     image + c * LANES<F>, LANES<F>);
  }

  // [positions of the block, outputs, width]
  template <class T> void lay_out_grads(int64_t sample, const ConvPanel& shape, int64_t begin, int64_t count) {
    const ConvImages& b = conv_.output_grads;
    const int64_t stride = outputs_ * shape.width;
    if (stride != places_stride_)
      for (int64_t p = 0; p < CONV_BLOCK; ++p) places_[p] = p * stride;
    places_stride_ = stride;
    const int64_t first_channel = shape.first_row * outputs_;
    const int64_t* offsets = b.position_offsets ? b.position_offsets + begin : nullptr;
    const T* first = static_cast<const T*>(b.data) + sample * b.sample_stride + first_channel * b.channel_stride + (offsets ? 0 : begin);
    for (int64_t o = 0; o < outputs_; ++o)
      transpose_rows(first + o * b.channel_stride, Rows{nullptr, b.channel_stride * outputs_, offsets}, shape.rows, count, places_,
                     grads_.row(0) + o * shape.width, shape.width);
  }

  void add_block(const ConvPanel& shape, int64_t output, int64_t begin, int64_t count) {
    const F* grads = grads_.row(0) + output * shape.width;
    F* panel = panel_.row(0) + output * conv_.columns * shape.width;
    for (int64_t t = 0; t < conv_.tile_count; ++t) {
      const ConvTile& tile = conv_.tiles[t];
      const Block<F> block{image_.row(0), conv_.window_offsets + begin, grads, outputs_ * shape.width, count,
                           conv_.column_offsets + tile.column, conv_.column_rows + tile.column, panel, begin == 0};
      add_columns<TILE>(block, tile.columns, conv_.by_group, shape.width);
    }
  }

  const PersampleConv& conv_;
  const int64_t outputs_;
  Scratch<F> image_, grads_, panel_;
  int64_t places_[CONV_BLOCK], places_stride_ = 1;
  int64_t sample_ = -1, group_ = -1;
};

}  // namespace

void persample_conv_rows(const PersampleConv& conv, ElementType type, int64_t begin, int64_t end) {
  for_type(type, [&](auto element) __attribute__((always_inline)) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    Panels<F> panels(conv);
    for (int64_t task = begin; task < end; ++task) panels.template run<T>(task / conv.panel_count, task % conv.panel_count);
  });
}

void persample_conv_directions(const PersampleConv& conv, ElementType type, const void* directions, void* packed) {
  for_type(type, [&](auto element) __attribute__((always_inline)) {
    using T = decltype(element);
    using F = typename Accumulate<T>::type;
    Scratch<int64_t> places(1, conv.row_columns);
    for (int64_t p = 0; p < conv.panel_count; ++p) {
      const ConvPanel& shape = conv.panels[p];
      for (int64_t q = 0; q < conv.row_columns; ++q) places.row(0)[q] = q * shape.width;
      for (int64_t k = 0; k < conv.direction_count; ++k) {
        const T* rows = static_cast<const T*>(directions) + (k * conv.rows + shape.first_row) * conv.row_columns;
        F* panel = static_cast<F*>(packed) + (k * conv.padded_rows + shape.padded_rows_before) * conv.row_columns;
        transpose_rows(rows, Rows{nullptr, conv.row_columns, nullptr}, shape.rows, conv.row_columns, places.row(0), panel, shape.width);
      }
    }
  });
}

void persample_conv_sizes(ElementType type, ConvSizes& sizes) {
  sizes = {type == ElementType::float64 ? LANES<double> : LANES<float>, TILE};
}

}  // namespace kdaif::KDAIF_LEVEL
