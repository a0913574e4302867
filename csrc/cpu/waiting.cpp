#include "waiting.h"

#if defined(DFF_OPENMP_ENTRY)

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <future>
#include <mutex>
#include <system_error>
#include <thread>

namespace dff::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kInterval = 0.25;  // seconds

// Whether threads of this process were taken off their processors before they were done, since the last call, more
// often than now and then: a busy process on one of them does that a hundred times a second.
bool loses_processors(int threads, double seconds) {
  static long before = -1;
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return false;
  const long lost = before < 0 ? 0 : usage.ru_nivcsw - before;
  before = usage.ru_nivcsw;
  return static_cast<double>(lost) > (20 + 2 * threads) * seconds;
}

// Makes libgomp have more threads than processors, which is when its threads wait 100 turns alone: a team that has
// nothing to do and whose leader, a thread of its own, leaves when the promise is kept. Null where it would take more
// threads than there are, or where there is no room for one.
std::promise<void>* crowd(int threads) {
  const int wanted = std::max(omp_get_num_procs() - threads, 0) + 1;
  if (wanted > threads + 1) return nullptr;
  auto* leave = new std::promise<void>;
  try {
    std::thread([team = static_cast<unsigned>(wanted) + 1, told = leave->get_future()] {
      GOMP_parallel([](void*) {}, nullptr, team, 0);
      told.wait();
    }).detach();
  } catch (const std::system_error&) {
    delete leave;
    return nullptr;
  }
  return leave;
}

}  // namespace

void choose_waiting(int threads) {
  static const bool chosen = std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr;
  static std::mutex mutex;
  static Clock::time_point last = Clock::now();
  static std::promise<void>* crowded = nullptr;  // never destroyed: its thread may outlive static destruction
  if (chosen) return;
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) return;
  const Clock::time_point now = Clock::now();
  const double seconds = std::chrono::duration<double>(now - last).count();
  if (seconds < kInterval) return;
  last = now;
  const bool loses = loses_processors(threads, seconds);
  if (loses && crowded == nullptr) {
    crowded = crowd(threads);
  } else if (!loses && crowded != nullptr) {
    crowded->set_value();
    delete crowded;
    crowded = nullptr;
  }
}

}  // namespace dff::cpu

#endif
