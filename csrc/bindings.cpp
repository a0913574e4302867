// The Python face of the native core. This file and csrc/bindings/ are all of csrc/ that knows Python.
// It is compiled as dreamfusion_fast._core (DFF_BACKEND=cpu) and as dreamfusion_fast._core_cuda (=cuda), so that
// both modules have the same functions with the same arguments: addresses, sizes, and last `where` (a thread count or a
// stream). What is a struct within an op's struct is a tuple in Python. Exceptions: tiles of the hash grid and of the
// triplane exist on the GPU alone, dense layers on the CPU alone. Nothing is owned, allocated or checked here:
// dreamfusion_fast/ops/ does that.
//
// To add an op `foo`:
//   1. csrc/include/dreamfusion_fast/foo.h: a struct Foo<T> with the arguments, a shape comment on each, and the
//      algorithm as DFF_HD functions; then DFF_LAUNCHER(template <typename T> Status foo(const Foo<T>&, const
//      Launch&);)
//   2. csrc/cpu/foo.cpp and csrc/cuda/foo.cu: the launcher in dff::cpu and dff::cuda, with for_each of parallel.h and
//      parallel.cuh where one index is one piece of work, and DFF_FOR_FLOATS(foo, Foo).
//   3. csrc/bindings/foo.h: bind_foo<T>(py::module_&) lists the struct's members in the order of Python's arguments.
//   4. here: one #include and one line in bind_for.
//   5. dreamfusion_fast/ops/foo.py: checks, torch.library op, the PyTorch twin; it calls call("foo", tensor, ...).
// CMake finds the new files by itself.

#include "bindings/composite.h"
#include "bindings/hash_grid.h"
#include "bindings/march.h"
#include "bindings/march_morton.h"
#include "bindings/occupancy.h"
#include "bindings/ray_box.h"
#include "bindings/ray_sums.h"
#include "bindings/traverse.h"
#include "bindings/triplane.h"

#if defined(DFF_CUDA_ARCHS)
#define DFF_HAS_TILES 1
#include "bindings/hash_grid_tile.h"  // a CPU does a tile with the functions of hash_grid.h
#include "bindings/triplane_tile.h"   // and with those of triplane.h
#else
#define DFF_CUDA_ARCHS ""
#define DFF_HAS_TILES 0
#include "bindings/cpu_variant.h"
#include "bindings/dense.h"  // on a GPU torch has these
#endif

namespace {

// The ops that exist for both scalar types.
template <typename T>
void bind_for(pybind11::module_& module) {
  dff::bindings::bind_composite<T>(module);
  dff::bindings::bind_hash_grid<T>(module);
  dff::bindings::bind_march<T>(module);
  dff::bindings::bind_march_morton<T>(module);
  dff::bindings::bind_ray_box<T>(module);
  dff::bindings::bind_ray_sums<T>(module);
  dff::bindings::bind_traverse<T>(module);
  dff::bindings::bind_triplane<T>(module);
}

}  // namespace

PYBIND11_MODULE(DFF_MODULE, module) {
  module.attr("cuda_archs") = DFF_CUDA_ARCHS;    // what the CUDA module was compiled for, "80-real 90"
  module.attr("cuda_reason") = DFF_CUDA_REASON;  // CPU module: why there is no CUDA module beside it, or ""

  bind_for<float>(module);
  bind_for<double>(module);
  dff::bindings::bind_march_grid(module);
  dff::bindings::bind_occupancy(module);
  dff::bindings::bind_traverse_grid(module);
#if DFF_HAS_TILES
  dff::bindings::bind_hash_grid_tile(module);
  dff::bindings::bind_triplane_tile(module);
#else
  dff::bindings::bind_cpu_variant(module);
  dff::bindings::bind_dense(module);
#endif
}
