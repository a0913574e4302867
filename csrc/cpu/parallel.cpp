#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "waiting.h"

#if defined(_WIN32)
#include <process.h>
#define DFF_PROCESS_ID _getpid
#else
#include <unistd.h>
#define DFF_PROCESS_ID getpid
#endif

namespace dff::cpu {
namespace {

// One piece of work, shared by the threads that help with it.
struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t n;
  int64_t grain;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      try {
        (*body)(begin, std::min(begin + grain, n));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  // Runs the job with up to `helpers` further threads; false when the pool is in use.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        const int index = static_cast<int>(threads_.size());
        threads_.emplace_back([this, index] { serve(index); });
      }
      job_ = &job;
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      // A thread started inside run() may see its first generation at once; one that is not asked for sleeps on.
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= helpers_ || job_ == nullptr) continue;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the call that uses the pool
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int helpers_ = 0;
  int running_ = 0;
  uint64_t generation_ = 0;
};

// Where there is no OpenMP. Never destroyed, since its threads may outlive static destruction. A forked child has none
// of its parent's threads and gets a pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static int process = 0;
  std::lock_guard<std::mutex> lock(mutex);
  const int current = static_cast<int>(DFF_PROCESS_ID());
  if (instance == nullptr || process != current) {
    instance = new Pool;
    process = current;
  }
  return *instance;
}

thread_local bool inside_body = false;

// Whether this process was forked and goes on with its parent's program. Linux keeps that as a flag of the process
// (PF_FORKNOEXEC), the ninth field of /proc/self/stat. Taken as false where it cannot be read.
bool forked_without_exec() {
  bool forked = false;
#if defined(__linux__)
  if (std::FILE* file = std::fopen("/proc/self/stat", "r")) {
    char text[512] = "";
    text[std::fread(text, 1, sizeof(text) - 1, file)] = '\0';
    std::fclose(file);
    const char* name_end = std::strrchr(text, ')');  // of the program's name, which may hold anything
    unsigned flags = 0;
    if (name_end != nullptr && std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1)
      forked = (flags & 0x40u) != 0;
  }
#endif
  return forked;
}

// Runs the job on the threads that torch's own operations run on. After each of these OpenMP's threads wait awake for
// some milliseconds, in which threads of our own would have to share the processors with them.
//
// OpenMP's threads do not survive a fork, and a child that asks for them waits forever, in torch's own operations too:
// only the process that this library was loaded in may, and not even that one where it was forked before. Then its
// parent, or a parent of that, may have used them.
const int loaded_in = static_cast<int>(DFF_PROCESS_ID());
const bool loaded_after_fork = forked_without_exec();

bool run_on_openmp(Job& job, int threads) {
  if (!DFF_OPENMP || loaded_after_fork || loaded_in != static_cast<int>(DFF_PROCESS_ID())) return false;
#if defined(DFF_OPENMP_ENTRY)
  choose_waiting(threads);
  GOMP_parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
#endif
  return true;
}

}  // namespace

void parallel_ranges(int64_t n, int threads, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (n + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers > 0 && !inside_body) {
    const std::function<void(int64_t, int64_t)> marked = [&body](int64_t begin, int64_t end) {
      inside_body = true;
      struct Reset {
        ~Reset() { inside_body = false; }
      } reset;
      body(begin, end);
    };
    Job job;
    job.body = &marked;
    job.n = n;
    job.grain = grain;
    if (run_on_openmp(job, helpers + 1) || pool().run(job, helpers)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  body(0, n);
}

}  // namespace dff::cpu
