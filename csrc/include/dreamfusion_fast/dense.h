// Dense layers of a small convolutional network on a CPU, float32, channels last: matrix product, 3x3 convolution by
// Winograd's algorithm, group normalisation. Weights are packed once, and what follows a product is done as it is
// stored. On a GPU torch has all of this; these launchers exist on the CPU only.
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

constexpr int kDensePanel = 16;  // output channels that are computed together; packed weights have panels of so many
constexpr int kWinogradPoints = 16;  // of F(2x2, 3x3): 4 x 4

// output = input weight^T + bias + residual
struct DenseLinear {
  const float* input;     // [rows, in]
  const float* weight;    // [out / 16, in, 16]
  const float* bias;      // [out], or nullptr
  const float* residual;  // [rows, out], or nullptr; may be `output`
  float* output;          // [rows, out]
  int64_t rows;
  int64_t in;
  int64_t out;  // a multiple of 16
};

// A convolution with a 3x3 kernel, stride 1, one row or column of zeros on each side: Winograd's minimal filtering
// F(2x2, 3x3) (Lavin and Gray 2016, arXiv 1509.09308), 16 products for 4 outputs in place of 36.
struct DenseConv {
  const float* input;     // [n, height, width, in]
  const float* weight;    // [out / 16, 16, in, 16]: by panel and point, G w G^T
  const float* bias;      // [out], or nullptr
  const float* residual;  // [n, height, width, out], or nullptr; may be `output`
  float* output;          // [n, height, width, out]
  int64_t n;
  int64_t height;  // even
  int64_t width;   // even
  int64_t in;      // a multiple of 8
  int64_t out;     // a multiple of 16
};

// y = ((x - mean) / std * weight + bias) * (1 + scale) + shift, then SiLU if asked for; mean and variance over the
// pixels and channels of a group.
struct DenseGroupNorm {
  const float* input;       // [n, pixels, channels]
  const float* weight;      // [channels]
  const float* bias;        // [channels]
  const float* modulation;  // [n, 2 channels]: scales, then shifts; or nullptr
  float* output;            // [n, pixels, channels]
  int64_t n;
  int64_t pixels;
  int64_t channels;  // a multiple of 8
  int64_t groups;
  double eps;
  bool silu;
};

namespace cpu {

// Whether this core was compiled for a processor that the three below are written for.
bool dense_serves();

Status dense_linear(const DenseLinear& op, const Launch& launch);
Status dense_conv(const DenseConv& op, const Launch& launch);
Status dense_group_norm(const DenseGroupNorm& op, const Launch& launch);

}  // namespace cpu
}  // namespace dff
