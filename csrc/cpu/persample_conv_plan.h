// Where everything of a convolution lies in the scratch image, worked out once a call.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/persample_conv_rows.h"

namespace kdaif {

// Of 1 to 3 spatial axes; the lists have one number an axis.
struct ConvGeometry {
  std::vector<int64_t> input, output, kernel, stride, padding, dilation;
  int64_t groups, channels, outputs;

  size_t axes() const { return kernel.size(); }
  int64_t reach(size_t axis) const {  // what the windows cover, in padded coordinates
    return (output[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1;
  }
};

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

// Calls body(flat index, coordinates) over a grid, last axis fastest.
template <class Body> void for_grid(const std::vector<int64_t>& sizes, Body body) {
  std::vector<int64_t> at(sizes.size(), 0);
  for (int64_t i = 0, n = product(sizes); i < n; ++i) {
    body(i, at);
    for (size_t axis = sizes.size(); axis-- > 0;) {
      if (++at[axis] < sizes[axis]) break;
      at[axis] = 0;
    }
  }
}

struct ConvPlan {
  bool by_group;
  std::vector<ConvPanel> panels;
  std::vector<ConvTile> tiles;
  std::vector<int64_t> scratch_places, window_offsets, column_offsets, column_rows;
  int64_t chunk_channels, chunk_elements, scratch_elements, padded_rows;

  ConvPlan(const ConvGeometry& g, ConvSizes sizes) {
    const int64_t group_inputs = g.channels / g.groups, group_outputs = g.outputs / g.groups;
    // Lanes are output channels of a group, unless groups fill vectors better.
    by_group = g.groups > 1 && filled(g.groups, sizes.lanes) > filled(group_outputs, sizes.lanes);
    add_panels(by_group ? 1 : g.groups, by_group ? g.groups : group_outputs, sizes.lanes);
    const int64_t channel = by_group ? sizes.lanes : 1;
    const int64_t chunks = by_group ? 1 : (group_inputs + CONV_CHUNK - 1) / CONV_CHUNK;
    chunk_channels = (group_inputs + chunks - 1) / chunks;
    lay_out(g, channel * chunk_channels);
    scratch_elements = chunks * chunk_elements;
    for (int64_t first = 0; first < group_inputs; first += chunk_channels)
      add_columns(g, first, std::min(group_inputs - first, chunk_channels), channel);
    add_tiles(sizes.tile);
  }

 private:
  static double filled(int64_t rows, int64_t lanes) { return double(rows) / double((rows + lanes - 1) / lanes * lanes); }

  void add_panels(int64_t groups, int64_t rows, int64_t lanes) {
    padded_rows = 0;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t row = 0; row < rows;) {
        const int64_t vectors = !by_group && rows - row > lanes ? 2 : 1, count = std::min(rows - row, vectors * lanes);
        panels.push_back({group, group * rows + row, count, vectors * lanes, padded_rows});
        padded_rows += vectors * lanes, row += count;
      }
    }
  }

  void lay_out(const ConvGeometry& g, int64_t position) {
    strides.assign(g.axes(), position);
    for (size_t axis = g.axes() - 1; axis-- > 0;) strides[axis] = strides[axis + 1] * g.reach(axis + 1);
    chunk_elements = strides[0] * g.reach(0);
    std::vector<std::vector<bool>> met(g.axes());
    for (size_t axis = 0; axis < g.axes(); ++axis) {
      met[axis].assign(static_cast<size_t>(g.reach(axis)), false);
      for (int64_t o = 0; o < g.output[axis]; ++o)
        for (int64_t k = 0; k < g.kernel[axis]; ++k) met[axis][static_cast<size_t>(o * g.stride[axis] + k * g.dilation[axis])] = true;
    }
    scratch_places.resize(static_cast<size_t>(product(g.input)));
    for_grid(g.input, [&](int64_t i, const std::vector<int64_t>& at) {
      int64_t place = 0;
      for (size_t axis = 0; axis < g.axes() && place >= 0; ++axis) {
        const int64_t padded = at[axis] + g.padding[axis];
        place = padded < g.reach(axis) && met[axis][static_cast<size_t>(padded)] ? place + padded * strides[axis] : -1;
      }
      scratch_places[static_cast<size_t>(i)] = place;
    });
    window_offsets.resize(static_cast<size_t>(product(g.output)));
    for_grid(g.output, [&](int64_t i, const std::vector<int64_t>& at) {
      int64_t offset = 0;
      for (size_t axis = 0; axis < g.axes(); ++axis) offset += at[axis] * g.stride[axis] * strides[axis];
      window_offsets[static_cast<size_t>(i)] = offset;
    });
  }

  void add_columns(const ConvGeometry& g, int64_t first_channel, int64_t channels, int64_t channel) {
    const int64_t elements = product(g.kernel);
    for_grid(g.kernel, [&](int64_t i, const std::vector<int64_t>& at) {
      int64_t offset = first_channel / chunk_channels * chunk_elements;
      for (size_t axis = 0; axis < g.axes(); ++axis) offset += at[axis] * g.dilation[axis] * strides[axis];
      for (int64_t c = 0; c < channels; ++c) {
        column_offsets.push_back(offset + c * channel);
        column_rows.push_back((first_channel + c) * elements + i);
      }
    });
  }

  // Runs of columns that are neighbours in the image, cut into nearly equal tiles. By group any columns will do.
  void add_tiles(int64_t most) {
    const int64_t columns = static_cast<int64_t>(column_offsets.size());
    for (int64_t begin = 0, end; begin < columns; begin = end) {
      end = begin + 1;
      while (end < columns && (by_group || column_offsets[size_t(end)] == column_offsets[size_t(end - 1)] + 1)) ++end;
      const int64_t run = end - begin, count = (run + most - 1) / most;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t from = run * t / count, to = run * (t + 1) / count;
        tiles.push_back({begin + from, to - from});
      }
    }
  }

  std::vector<int64_t> strides;  // of the scratch image's axes
};

}  // namespace kdaif
