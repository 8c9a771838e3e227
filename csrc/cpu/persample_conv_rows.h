// The loops of persample_conv over tasks [begin, end), without tensors. A task is one panel of one sample.
#pragma once
#include <cstdint>

#include "cpu/level.h"
#include "cpu/row_divergence_rows.h"  // ElementType

namespace kdaif {

// Consecutive rows of G that are computed together, one a lane. Dense: output channels of one group. By group: groups.
struct ConvPanel {
  int64_t group, first_row, rows, width;  // width: rows, rounded up to whole vectors
  int64_t padded_rows_before;
};

// Consecutive columns of the scratch image whose products share their loads.
struct ConvTile {
  int64_t column, columns;
};

// Images [samples, channels, positions].
struct ConvImages {
  const void* data;
  int64_t sample_stride, channel_stride;
  const int64_t* position_offsets;  // null: positions are neighbours
  int64_t positions;
};

// "F" is float64 for float64 images and float32 otherwise. A column is an element of a row of G; the tables of columns
// are in the order of memory of the scratch image: kernel element after kernel element, channels innermost.
struct PersampleConv {
  ConvImages inputs, output_grads;
  bool by_group;                        // lanes are groups, not output channels
  int64_t group_inputs, group_outputs;  // channels of a group
  int64_t panel_count, samples;
  const ConvPanel* panels;
  int64_t chunk_channels;          // the scratch image is chunks of channels [chunks, *padded positions, channels]
  int64_t chunk_elements;
  int64_t scratch_elements;        // of all chunks
  const int64_t* scratch_places;   // [input positions], -1 where no kernel element ever looks
  const int64_t* window_offsets;   // [output positions]: where a position's window begins in the scratch image
  const int64_t* column_offsets;   // [columns]: within the window
  const int64_t* column_rows;      // [columns]: which column of G's rows this is
  const ConvTile* tiles;
  int64_t tile_count, columns;     // columns of one output channel
  int64_t row_columns;             // columns of a row of G: times group_outputs if by group
  const void* directions;          // F [K][padded rows][row_columns] in panels of [row_columns, width]
  int64_t direction_count, padded_rows;
  bool norms;
  void* grads;      // [samples, rows, row_columns] of the images' type, samples grads_stride elements apart; or null
  int64_t grads_stride, rows;
  void* partials;   // F [samples, panels, K + 1]: the panel's dots and squared norm
};

struct ConvSizes {
  int64_t lanes, tile;  // of a vector, and the most columns of a tile
};

// Channels of a chunk of the scratch image. With all channels innermost, the positions of a block would compete for a few
// sets of the L1 cache: [8, 256, 28, 28] -> 64 channels, one by one: 1.0 of a batch's time instead of 1.2.
constexpr int64_t CONV_CHUNK = 16;
constexpr int64_t CONV_BLOCK = 256;  // positions whose output gradients stay in the L1 cache: 32 KiB of a panel

}  // namespace kdaif

KDAIF_DECLARE_LEVELS(void persample_conv_rows(const PersampleConv& conv, ElementType type, int64_t begin, int64_t end);
                     void persample_conv_directions(const PersampleConv& conv, ElementType type, const void* directions, void* packed);
                     void persample_conv_sizes(ElementType type, ConvSizes& sizes);)
