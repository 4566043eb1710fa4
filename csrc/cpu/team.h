// A team of threads that stay together for many parallel loops. Between two loops its
// threads wait in user space, which takes a fraction of a microsecond; OpenMP's threads
// may sleep as soon as a loop ends (those of the libgomp that comes with torch do), and
// waking them takes 50 to 100, as long as a product of a small matrix.

#ifndef HALVE_TEAM_H
#define HALVE_TEAM_H

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace halve {

class Team {
 public:
  // The loops of this thread run on its team; NULL where it leads none.
  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }

  // Has every member call `body(index, size)`, the leader included, and returns when all
  // have finished. To be called by the leader.
  template <class Body>
  void run(const Body& body) {
    call_ = [](const void* given, int index, int size) {
      (*static_cast<const Body*>(given))(index, size);
    };
    given_ = &body;
    start();
    body(0, size_);
    wait([this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

  // Leads a team of `size` while `work()` runs. To be called by the thread of index 0 of
  // `size` threads, of which the others call `follow`.
  template <class Work>
  void lead(int size, Work work) {
    size_ = size;
    current() = this;
    work();
    current() = nullptr;
    call_ = nullptr;
    start();
  }

  // Takes part in the leader's loops until it ends.
  void follow(int index) {
    for (uint32_t seen = 0;; ++seen) {
      wait([&] { return round_.load(std::memory_order_acquire) != seen; });
      if (call_ == nullptr) return;
      call_(given_, index, size_);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

 private:
  void start() {
    busy_.store(size_ - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }

  // Spins for some 20 microseconds, and then gives way after every check: where there
  // are more threads than CPUs, the one that is waited for may need this CPU.
  template <class Condition>
  static void wait(Condition holds) {
    for (int spins = 0; !holds(); ++spins) {
      if (spins < 500) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
  }

  // Apart, so that waiting threads do not take the line that counts down from each other.
  alignas(64) std::atomic<uint32_t> round_{0};
  void (*call_)(const void*, int, int) = nullptr;
  const void* given_ = nullptr;
  int size_ = 1;
  alignas(64) std::atomic<int> busy_{0};
};

}  // namespace halve

#endif
