#include <algorithm>
#include <cmath>
#include <vector>

#include "dense.h"
#include "parallel.h"

namespace dff::cpu {

bool dense_serves() { return DFF_DENSE == 1; }

#if DFF_DENSE
namespace {

typedef int32_t IntLanes __attribute__((vector_size(32)));

constexpr int64_t kRowsPerBlock = 48;  // eight sixes; their inputs stay in L2
constexpr int64_t kPixelsPerSum = 32;  // added up in float32 before the sum goes on in float64

// exp(x) for x in [-87, 87], others as at these ends: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2. Its error
// is about one rounding; the coefficients are those of the Cephes library.
DFF_HD Lanes exp_lanes(Lanes x) {
  x = x > 87.0f ? all_lanes(87.0f) : x;
  x = x < -87.0f ? all_lanes(-87.0f) : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Lanes whole = shifted - 12582912.0f;
  const Lanes rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  IntLanes power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power << 23) + 0x3f800000;  // the low bits of `shifted` hold the whole number
  Lanes scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

DFF_HD Lanes silu_lanes(Lanes x) { return x / (1.0f + exp_lanes(-x)); }

// sums[c] += the sum over pixels of x, or of (x - centre[c])^2.
template <bool kSquares>
void add_channels(const DenseGroupNorm& op, const float* input, const float* centre, float* part, double* sums) {
  for (int64_t first = 0; first < op.pixels; first += kPixelsPerSum) {
    std::fill(part, part + op.channels, 0.0f);
    const int64_t end = std::min(first + kPixelsPerSum, op.pixels);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const float* row = input + pixel * op.channels;
      for (int64_t c = 0; c < op.channels; c += kLanes) {
        Lanes x = load_lanes(row + c);
        if (kSquares) {
          x -= load_lanes(centre + c);
          x *= x;
        }
        store_lanes(part + c, load_lanes(part + c) + x);
      }
    }
    for (int64_t c = 0; c < op.channels; ++c) sums[c] += part[c];
  }
}

// The mean over each group of what was summed by channel, given back for each channel.
void group_means(const DenseGroupNorm& op, const std::vector<double>& sums, float* means) {
  const int64_t width = op.channels / op.groups;
  for (int64_t group = 0; group < op.groups; ++group) {
    double sum = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) sum += sums[c];
    const float mean = static_cast<float>(sum / static_cast<double>(width * op.pixels));
    std::fill(means + group * width, means + (group + 1) * width, mean);
  }
}

// output = input * scale + shift, by channel
template <bool kSilu>
void apply(const DenseGroupNorm& op, const float* input, const float* scale, const float* shift, float* output) {
  for (int64_t pixel = 0; pixel < op.pixels; ++pixel) {
    for (int64_t c = 0; c < op.channels; c += kLanes) {
      const int64_t at = pixel * op.channels + c;
      const Lanes y = load_lanes(input + at) * load_lanes(scale + c) + load_lanes(shift + c);
      store_lanes(output + at, kSilu ? silu_lanes(y) : y);
    }
  }
}

void normalize_image(const DenseGroupNorm& op, int64_t image) {
  const size_t channels = static_cast<size_t>(op.channels);
  const float* input = op.input + image * op.pixels * op.channels;
  float* output = op.output + image * op.pixels * op.channels;
  std::vector<double> sums(channels, 0.0);
  std::vector<float> part(channels), mean(channels), variance(channels), scale(channels), shift(channels);
  add_channels<false>(op, input, nullptr, part.data(), sums.data());
  group_means(op, sums, mean.data());
  std::fill(sums.begin(), sums.end(), 0.0);
  add_channels<true>(op, input, mean.data(), part.data(), sums.data());
  group_means(op, sums, variance.data());
  const float* modulation = op.modulation == nullptr ? nullptr : op.modulation + 2 * image * op.channels;
  for (int64_t c = 0; c < op.channels; ++c) {
    const float by = modulation == nullptr ? 1.0f : 1.0f + modulation[c];
    const float plus = modulation == nullptr ? 0.0f : modulation[op.channels + c];
    const float slope = op.weight[c] / std::sqrt(variance[c] + static_cast<float>(op.eps));
    scale[c] = slope * by;
    shift[c] = (op.bias[c] - mean[c] * slope) * by + plus;
  }
  op.silu ? apply<true>(op, input, scale.data(), shift.data(), output)
          : apply<false>(op, input, scale.data(), shift.data(), output);
}

}  // namespace

Status dense_linear(const DenseLinear& op, const Launch& launch) {
  const int64_t share = (op.rows + launch.threads - 1) / std::max(launch.threads, 1);
  const int64_t block = std::max<int64_t>(std::min(kRowsPerBlock, (share + 3) / 4 * 4), 4);
  return for_each((op.rows + block - 1) / block, launch,
                  [&](int64_t index) {
                    const int64_t first = index * block;
                    const int64_t rows = std::min(block, op.rows - first);
                    for (int64_t channel = 0; channel < op.out; channel += kDensePanel) {
                      const float* bias = op.bias == nullptr ? nullptr : op.bias + channel;
                      multiply_all(op.input + first * op.in, op.in, op.weight + channel * op.in, op.in, rows,
                                   [&](int64_t row, Lanes low, Lanes high) {
                                     const int64_t at = (first + row) * op.out + channel;
                                     if (bias != nullptr) low += load_lanes(bias), high += load_lanes(bias + kLanes);
                                     if (op.residual != nullptr) {
                                       low += load_lanes(op.residual + at);
                                       high += load_lanes(op.residual + at + kLanes);
                                     }
                                     store_lanes(op.output + at, low);
                                     store_lanes(op.output + at + kLanes, high);
                                   });
                    }
                  },
                  1);
}

Status dense_group_norm(const DenseGroupNorm& op, const Launch& launch) {
  return for_each(op.n, launch, [&](int64_t image) { normalize_image(op, image); }, 1);
}
#else
Status dense_linear(const DenseLinear&, const Launch&) { return "this core was not compiled for it (dense_serves)"; }
Status dense_group_norm(const DenseGroupNorm&, const Launch&) {
  return "this core was not compiled for it (dense_serves)";
}
#endif

}  // namespace dff::cpu
