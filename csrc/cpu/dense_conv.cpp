#include <algorithm>
#include <vector>

#include "dense.h"
#include "parallel.h"

namespace dff::cpu {

#if DFF_DENSE
namespace {

constexpr int64_t kTile = 2;   // outputs of a tile per axis
constexpr int64_t kPatch = 4;  // inputs of it
// Tiles are done in blocks whose transformed inputs stay in L2 while all panels of the weights pass by.
constexpr int64_t kBlockBytes = 384 << 10;
constexpr int64_t kMaxBlock = 32;
constexpr int64_t kMinBlock = 8;
// Floats between the 16 planes: without them the planes' rows, some power of two apart, would all want the same few
// lines of L1.
constexpr int64_t kApart = 16;

// B^T d, along one axis.
DFF_HD void input_transform(const Lanes (&d)[4], Lanes (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// A^T m, along one axis.
DFF_HD void output_transform(const Lanes (&m)[4], Lanes (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

struct TileOrigin {
  int64_t image, y, x;  // of the first output
};

DFF_HD TileOrigin origin_of(const DenseConv& op, int64_t tile) {
  const int64_t columns = op.width / kTile;
  const int64_t rows = op.height / kTile;
  return {tile / (rows * columns), tile / columns % rows * kTile, tile % columns * kTile};
}

// values [16, block, in]: the tile's patch, transformed.
void load_tile(const DenseConv& op, int64_t tile, const float* zeros, float* values, int64_t plane) {
  const TileOrigin origin = origin_of(op, tile);
  const float* pixels[kPatch][kPatch];
  for (int64_t i = 0; i < kPatch; ++i) {
    for (int64_t j = 0; j < kPatch; ++j) {
      const int64_t y = origin.y + i - 1;
      const int64_t x = origin.x + j - 1;
      const bool inside = y >= 0 && y < op.height && x >= 0 && x < op.width;
      pixels[i][j] = inside ? op.input + ((origin.image * op.height + y) * op.width + x) * op.in : zeros;
    }
  }
  for (int64_t c = 0; c < op.in; c += kLanes) {
    Lanes half[kPatch][kPatch];  // transformed along x, indexed [point of x][y]
    DFF_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      Lanes d[kPatch];
      Lanes v[kPatch];
      DFF_UNROLL
      for (int j = 0; j < kPatch; ++j) d[j] = load_lanes(pixels[i][j] + c);
      input_transform(d, v);
      DFF_UNROLL
      for (int j = 0; j < kPatch; ++j) half[j][i] = v[j];
    }
    DFF_UNROLL
    for (int j = 0; j < kPatch; ++j) {
      Lanes v[kPatch];
      input_transform(half[j], v);
      DFF_UNROLL
      for (int i = 0; i < kPatch; ++i) store_lanes(values + (i * kPatch + j) * plane + c, v[i]);
    }
  }
}

// Eight channels of a tile's four outputs; products [16, block, 16].
DFF_HD void store_tile(const DenseConv& op, const TileOrigin& origin, const float* products, int64_t plane,
                       int64_t channel) {
  Lanes half[kTile][kPatch];
  DFF_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    Lanes m[kPatch];
    Lanes y[kTile];
    DFF_UNROLL
    for (int j = 0; j < kPatch; ++j) m[j] = load_lanes(products + (i * kPatch + j) * plane);
    output_transform(m, y);
    half[0][i] = y[0];
    half[1][i] = y[1];
  }
  const Lanes bias = op.bias == nullptr ? Lanes{} : load_lanes(op.bias + channel);
  DFF_UNROLL
  for (int j = 0; j < kTile; ++j) {
    Lanes y[kTile];
    output_transform(half[j], y);
    DFF_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const int64_t at = ((origin.image * op.height + origin.y + i) * op.width + origin.x + j) * op.out + channel;
      Lanes value = y[i] + bias;
      if (op.residual != nullptr) value += load_lanes(op.residual + at);
      store_lanes(op.output + at, value);
    }
  }
}

void convolve_block(const DenseConv& op, int64_t first, int64_t count, const float* zeros, float* values,
                    float* products) {
  const int64_t value_plane = count * op.in + kApart;
  const int64_t product_plane = count * kDensePanel + kApart;
  for (int64_t i = 0; i < count; ++i) load_tile(op, first + i, zeros, values + i * op.in, value_plane);
  for (int64_t channel = 0; channel < op.out; channel += kDensePanel) {
    for (int64_t point = 0; point < kWinogradPoints; ++point) {
      float* out = products + point * product_plane;
      multiply_all(values + point * value_plane, op.in,
                   op.weight + (channel * kWinogradPoints + point * kDensePanel) * op.in, op.in, count,
                   [out](int64_t row, Lanes low, Lanes high) {
                     store_lanes(out + row * kDensePanel, low);
                     store_lanes(out + row * kDensePanel + kLanes, high);
                   });
    }
    for (int64_t i = 0; i < count; ++i) {
      const TileOrigin origin = origin_of(op, first + i);
      store_tile(op, origin, products + i * kDensePanel, product_plane, channel);
      store_tile(op, origin, products + i * kDensePanel + kLanes, product_plane, channel + kLanes);
    }
  }
}

// The largest power of two whose transformed inputs fit, and of which every thread gets some.
int64_t block_size(const DenseConv& op, int64_t tiles, int threads) {
  int64_t block = kMaxBlock;
  const int64_t bytes = kWinogradPoints * op.in * static_cast<int64_t>(sizeof(float));
  while (block > kMinBlock && (block * bytes > kBlockBytes || tiles < block * threads)) block /= 2;
  return block;
}

}  // namespace

Status dense_conv(const DenseConv& op, const Launch& launch) {
  const int64_t tiles = op.n * (op.height / kTile) * (op.width / kTile);
  const int64_t block = block_size(op, tiles, launch.threads);
  const std::vector<float> zeros(static_cast<size_t>(op.in), 0.0f);
  return for_each(
      (tiles + block - 1) / block, launch,
      [&](int64_t index) {
        thread_local std::vector<float> values;
        thread_local std::vector<float> products;
        values.resize(std::max(values.size(), static_cast<size_t>(kWinogradPoints * (block * op.in + kApart))));
        products.resize(static_cast<size_t>(kWinogradPoints * (kMaxBlock * kDensePanel + kApart)));
        const int64_t first = index * block;
        convolve_block(op, first, std::min(block, tiles - first), zeros.data(), values.data(), products.data());
      },
      1);
}
#else
Status dense_conv(const DenseConv&, const Launch&) { return "this core was not compiled for it (dense_serves)"; }
#endif

}  // namespace dff::cpu
