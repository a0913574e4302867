// Threads for the CPU driver: OpenMP's where torch has brought them, else one pool for the process; a caller-given
// number of them for each call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "dreamfusion_fast/common.h"

namespace dff::cpu {

// Calls body(begin, end) over pieces of [0, n) of about `grain` each, on up to `threads` threads, the calling one
// among them, and returns when all are done. Which thread takes which piece is not fixed: pieces must not write the
// same memory. A call from inside body, or while another thread uses our own pool, runs on the calling thread alone.
// The first exception thrown by body is rethrown here.
void parallel_ranges(int64_t n, int threads, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// Calls op(i) for each i of [0, n). `grain` is how many of them are worth handing to another thread (some 10 us of
// work).
template <typename Op>
Status for_each(int64_t n, const Launch& launch, const Op& op, int64_t grain = 1024) {
  parallel_ranges(n, launch.threads, grain, [&op](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) op(i);
  });
  return nullptr;
}

}  // namespace dff::cpu
