// persample_conv on the CPU: tensors, threads and registration. The loops are in persample_conv_rows.cpp, the layout in
// persample_conv_plan.h, the definition in kdaif_fast/reference/persample_conv.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/huge_pages.h"
#include "cpu/level.h"
#include "cpu/persample_conv_plan.h"
#include "cpu/persample_tensors.h"

namespace {

using namespace kdaif;
using Sizes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

Sizes spatial(const Tensor& x) {
  Sizes sizes;
  for (int64_t axis = 2; axis < x.dim(); ++axis) sizes.push_back(x.size(axis));
  return sizes;
}

ConvGeometry geometry(const Tensor& x, const Tensor& b, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                      const Sizes& dilation, int64_t groups) {
  const size_t axes = kernel.size();
  STD_TORCH_CHECK(axes >= 1 && axes <= 3 && stride.size() == axes && padding.size() == axes && dilation.size() == axes,
                  "persample_conv: kernel, stride, padding and dilation must have one number for each of 1 to 3 axes");
  STD_TORCH_CHECK(x.dim() == int64_t(axes) + 2 && b.dim() == int64_t(axes) + 2 && x.size(0) == b.size(0),
                  "persample_conv: inputs and output_grads must be [N, channels, *positions]");
  STD_TORCH_CHECK(x.scalar_type() == b.scalar_type(), "persample_conv: inputs and output_grads differ in dtype");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && b.size(1) % groups == 0, "persample_conv: groups do not divide the channels");
  const ConvGeometry g{spatial(x), spatial(b), kernel, stride, padding, dilation, groups, x.size(1), b.size(1)};
  for (size_t i = 0; i < axes; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && g.output[i] > 0,
                    "persample_conv: kernel, stride, dilation and positions must be positive");
    STD_TORCH_CHECK(g.reach(i) <= g.input[i] + 2 * padding[i], "persample_conv: output_grads has more positions than the convolution");
  }
  STD_TORCH_CHECK(g.channels > 0 && g.outputs > 0, "persample_conv: there must be channels");
  return g;
}

// Offsets of the positions of [N, C, *positions]; none where they are neighbours.
Sizes position_offsets(const Tensor& x) {
  Sizes offsets;
  bool neighbours = true;
  for_grid(spatial(x), [&](int64_t i, const Sizes& at) {
    int64_t offset = 0;
    for (size_t axis = 0; axis < at.size(); ++axis) offset += at[axis] * x.stride(int64_t(axis) + 2);
    offsets.push_back(offset), neighbours = neighbours && offset == i;
  });
  if (neighbours) offsets.clear();
  return offsets;
}

ConvImages images(const Tensor& x, const Sizes& offsets) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), offsets.empty() ? nullptr : offsets.data(), product(spatial(x))};
}

// Whether each sample's part is contiguous and apart from the others'.
bool is_samples_of(const Tensor& x, int64_t samples, int64_t elements) {
  int64_t size = 1;
  for (int64_t axis = x.dim(); --axis > 0; size *= x.size(axis))
    if (x.size(axis) != 1 && x.stride(axis) != size) return false;
  return x.dim() > 0 && x.size(0) == samples && size == elements && (samples <= 1 || x.stride(0) >= size);
}

// Sums the panels' partial results in their order, whoever computed them.
template <class F> void add_panels(const PersampleConv& conv, F* dots, F* squares) {
  const int64_t K = conv.direction_count;
  const F* partials = static_cast<const F*>(conv.partials);
  for (int64_t i = 0; i < conv.samples; ++i) {
    for (int64_t k = 0; k < K; ++k) dots[i * K + k] = 0;
    if (conv.norms) squares[i] = 0;
    for (int64_t p = 0; p < conv.panel_count; ++p, partials += K + 1) {
      for (int64_t k = 0; k < K; ++k) dots[i * K + k] += partials[k];
      if (conv.norms) squares[i] += partials[K];
    }
  }
}

// Whole samples to a thread where there are enough, so that each lays out its images once.
int64_t grain(const PersampleConv& conv) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 || conv.samples >= 2 * threads ? conv.panel_count : 1;
}

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& b, const MaybeTensor& directions, const ConvGeometry& g, bool norms,
                               const MaybeTensor& grads) {
  const ElementType type = element_type("persample_conv", x);
  const ScalarType wide = wide_type(x);
  const int64_t N = x.size(0), K = directions ? directions->size(0) : 0;
  ConvSizes sizes{};
  KDAIF_CALL_LEVEL(persample_conv_sizes, type, sizes);
  const ConvPlan plan(g, sizes);
  const Sizes input_offsets = position_offsets(x), output_offsets = position_offsets(b);
  const int64_t columns = static_cast<int64_t>(plan.column_offsets.size()), row_columns = plan.by_group ? columns * (g.outputs / g.groups) : columns;
  const int64_t panels = static_cast<int64_t>(plan.panels.size());
  STD_TORCH_CHECK(!directions || (directions->scalar_type() == wide && directions->numel() == K * g.outputs * columns),
                  "persample_conv: directions must be [K, O, C / groups, *kernel] in the accumulation type");
  STD_TORCH_CHECK(!grads || (grads->scalar_type() == x.scalar_type() && is_samples_of(*grads, N, g.outputs * columns)),
                  "persample_conv: out must be [N, O, C / groups, *kernel] of the inputs' dtype, each sample contiguous");
  const Tensor packed = torch::stable::new_empty(x, {K * plan.padded_rows * row_columns}, wide);
  const Tensor partials = torch::stable::new_empty(x, {N * panels * (K + 1)}, wide);
  const Tensor dots = torch::stable::new_empty(x, {N, K}, wide), squares = torch::stable::new_empty(x, {norms ? N : 0}, wide);
  const PersampleConv conv{images(x, input_offsets),
                           images(b, output_offsets),
                           plan.by_group,
                           g.channels / g.groups,
                           g.outputs / g.groups,
                           panels,
                           N,
                           plan.panels.data(),
                           plan.chunk_channels,
                           plan.chunk_elements,
                           plan.scratch_elements,
                           plan.scratch_places.data(),
                           plan.window_offsets.data(),
                           plan.column_offsets.data(),
                           plan.column_rows.data(),
                           plan.tiles.data(),
                           static_cast<int64_t>(plan.tiles.size()),
                           columns,
                           row_columns,
                           packed.const_data_ptr(),
                           K,
                           plan.padded_rows,
                           norms,
                           grads ? grads->mutable_data_ptr() : nullptr,
                           grads ? grads->stride(0) : 0,
                           plan.by_group ? g.groups : g.outputs,
                           partials.mutable_data_ptr()};
  if (K > 0) {
    const Tensor rows = torch::stable::contiguous(*directions);
    const ElementType own = element_type("persample_conv", rows);
    KDAIF_CALL_LEVEL(persample_conv_directions, conv, own, rows.const_data_ptr(), packed.mutable_data_ptr());
  }
  torch::stable::parallel_for(0, N * panels, grain(conv), [&](int64_t begin, int64_t end) {
    KDAIF_CALL_LEVEL(persample_conv_rows, conv, type, begin, end);
  });
  if (wide == ScalarType::Double) add_panels(conv, dots.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>());
  else add_panels(conv, dots.mutable_data_ptr<float>(), squares.mutable_data_ptr<float>());
  return {dots, squares};
}

std::tuple<Tensor, Tensor> persample_conv_out(const Tensor& inputs, const Tensor& output_grads, const MaybeTensor& directions,
                                              const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                              int64_t groups, bool norms, Tensor grads) {
  return run(inputs, output_grads, directions, geometry(inputs, output_grads, kernel, stride, padding, dilation, groups), norms, grads);
}

std::tuple<Tensor, Tensor, Tensor> persample_conv(const Tensor& inputs, const Tensor& output_grads, const MaybeTensor& directions,
                                                  const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                                  int64_t groups, bool grads, bool norms) {
  const ConvGeometry g = geometry(inputs, output_grads, kernel, stride, padding, dilation, groups);
  Sizes shape{inputs.size(0), g.outputs, g.channels / groups};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  const Tensor G = torch::stable::new_empty(inputs, grads ? shape : Sizes{0}, inputs.scalar_type());
  prefer_huge_pages(G.mutable_data_ptr(), G.numel() * int64_t(G.element_size()));
  const auto [dots, squares] = run(inputs, output_grads, directions, g, norms, grads ? MaybeTensor(G) : MaybeTensor());
  return {G, dots, squares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdaif_fast, CPU, m) {
  m.impl("persample_conv", TORCH_BOX(&persample_conv));
  m.impl("persample_conv_out", TORCH_BOX(&persample_conv_out));
}
