// What the entry points share: checks of their arguments, and scratch memory for one
// call. Must not be included by files that are compiled for one instruction set (see
// generic.h).

#ifndef HALVE_ENTRY_H
#define HALVE_ENTRY_H

#include "kernel.h"
#include "scratch.h"

namespace halve {

// Below this many products for each thread, starting it costs more than it saves.
constexpr double products_per_thread = 64 * 1024;

// Far more than any machine has, and far below what would overflow an int64_t.
constexpr double max_bytes = 1e15;

inline bool fits(double bytes) { return bytes < max_bytes; }

inline bool is_dtype(int32_t dtype) { return dtype >= 0 && dtype < dtype_count; }

inline int64_t size_of(int32_t dtype) { return dtype == HALVE_F32 ? 4 : 2; }

inline bool is_shape(int64_t rows, int64_t columns) {
  return rows >= 0 && columns >= 0 && fits(4.0 * rows) && fits(4.0 * columns) &&
         fits(4.0 * rows * columns);
}

inline bool needs(const void* data, double bytes) {
  return data != nullptr || bytes == 0;
}

inline bool are_operands(const Operands& o, int64_t rows, int64_t columns) {
  return o.batch >= 0 && fits(4.0 * o.batch * rows) && fits(4.0 * o.batch * columns) &&
         needs(o.x, double(o.batch) * columns) && needs(o.y, double(o.batch) * rows);
}

inline int useful_threads(int32_t threads, double products, int64_t rows,
                          int64_t grain) {
  const double worthwhile = products / products_per_thread;
  const double grains = double(rows / grain + 1);
  const double useful = worthwhile < grains ? worthwhile : grains;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// Rounds a size up to whole cache lines, so that no two threads write to the same line.
inline double whole_lines(double bytes) { return (int64_t(bytes) / 64 + 1) * 64.0; }

// Scratch memory for one call: a shared part, then a workspace for each thread.
class Memory {
 public:
  Memory(double shared, double each, int threads) {
    if (!fits(shared) || !fits(each)) return;
    each_ = whole_lines(each);
    const double front = whole_lines(shared), all = front + each_ * threads;
    if (!fits(all)) return;
    shared_ = static_cast<char*>(scratch(static_cast<size_t>(all)));
    if (shared_) workspaces_ = shared_ + static_cast<int64_t>(front);
  }

  bool allocated() const { return shared_ != nullptr; }
  void* shared() const { return shared_; }
  void* workspace(int thread) const {
    return workspaces_ + thread * static_cast<int64_t>(each_);
  }

 private:
  double each_ = 0;
  char* shared_ = nullptr;
  char* workspaces_ = nullptr;
};

}  // namespace halve

#endif
