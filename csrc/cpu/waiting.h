// OpenMP as far as it is used, and how long its threads wait for each other awake.
#pragma once

// The entry of GCC's OpenMP (clang's has it too). Weak references: they are there if something else has loaded OpenMP,
// which on Linux torch has, and null otherwise.
#if defined(__linux__) && defined(__GNUC__)
#define DFF_OPENMP_ENTRY
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
extern "C" int omp_get_num_procs() __attribute__((weak));
#define DFF_OPENMP (&GOMP_parallel != nullptr && &omp_get_num_procs != nullptr)
#else
#define DFF_OPENMP false
#endif

namespace dff::cpu {

// To be called before OpenMP is, with the number of threads it is asked for. By itself OpenMP's threads wait for each
// other awake, for 300,000 turns of a loop, which are milliseconds. Where another process has one of their processors,
// the others burn theirs meanwhile, and a step takes three times as long and more. From here on, four times a second,
// this looks whether this process loses processors to others, and while it does, threads sleep after 100 turns. Not
// always, since waking costs up to a tenth of a step. Where the environment says how to wait, this does nothing;
// dreamfusion_fast/__init__.py makes it say so where torch is not loaded yet.
void choose_waiting(int threads);

}  // namespace dff::cpu
