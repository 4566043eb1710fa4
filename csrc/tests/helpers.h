// What the tests of the kernels share: checks, arrays that end where readable memory
// ends, random numbers, and numbers of every dtype, decoded from their definition.

#ifndef HALVE_HELPERS_H
#define HALVE_HELPERS_H

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "halve.h"

namespace {

int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures <= 40) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

// ---- Guarded memory ----

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer guards both ends of a heap block.
inline char* allocate(size_t bytes) { return new char[bytes]; }
inline void release(char* memory, size_t) { delete[] memory; }
#else
constexpr size_t page = 4096;

inline size_t whole_pages(size_t bytes) { return (bytes + page - 1) / page * page; }

// The last byte of the block is the last one before a page without access rights.
inline char* allocate(size_t bytes) {
  const size_t whole = whole_pages(bytes);
  void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mprotect(static_cast<char*>(memory) + whole, page, PROT_NONE);
  return static_cast<char*>(memory) + whole - bytes;
}

inline void release(char* memory, size_t bytes) {
  const size_t whole = whole_pages(bytes);
  munmap(memory + bytes - whole, whole + page);
}
#endif

template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size), memory_(allocate(size * sizeof(T))) {
    std::memset(memory_, 0, bytes());
  }
  Array(Array&& other) : size_(other.size_), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  Array(const Array&) = delete;
  ~Array() {
    if (memory_) release(memory_, bytes());
  }

  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  char* data() const { return memory_; }
  T get(size_t i) const {
    T value;
    std::memcpy(&value, memory_ + i * sizeof(T), sizeof(T));
    return value;
  }
  void set(size_t i, T value) {
    std::memcpy(memory_ + i * sizeof(T), &value, sizeof(T));
  }

 private:
  size_t size_;
  char* memory_;
};

using Bytes = Array<uint8_t>;

// ---- Numbers ----

struct Random {
  uint64_t state = 88172645463325252u;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  uint64_t below(uint64_t end) { return next() % end; }
};

const char* const dtype_names[] = {"f32", "f16", "bf16"};
const int32_t dtypes[] = {HALVE_F32, HALVE_F16, HALVE_BF16};

inline size_t size_of(int32_t dtype) { return dtype == HALVE_F32 ? 4 : 2; }
inline int fraction_bits(int32_t dtype) {
  return dtype == HALVE_F32 ? 23 : dtype == HALVE_F16 ? 10 : 7;
}
inline int exponent_bits(int32_t dtype) { return dtype == HALVE_F16 ? 5 : 8; }

inline uint32_t bits_at(const Bytes& a, int32_t dtype, size_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, a.data() + i * size_of(dtype), size_of(dtype));
  return bits;
}

inline void set_bits(Bytes& a, int32_t dtype, size_t i, uint32_t bits) {
  std::memcpy(a.data() + i * size_of(dtype), &bits, size_of(dtype));
}

// Decodes any of the dtypes from its definition, independently of the kernels.
inline double number(uint32_t bits, int32_t dtype) {
  const int f = fraction_bits(dtype), e = exponent_bits(dtype);
  const int bias = (1 << (e - 1)) - 1, exponent = (bits >> f) & ((1 << e) - 1);
  const double sign = (bits >> (f + e)) & 1 ? -1 : 1;
  const double fraction = std::ldexp(bits & ((1u << f) - 1), -f);
  if (exponent == (1 << e) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

inline double number_at(const Bytes& a, int32_t dtype, size_t i) {
  return number(bits_at(a, dtype, i), dtype);
}

// Magnitudes between 1/8 and 2: no overflow, no subnormal numbers, some cancellation.
inline uint32_t random_bits(Random& random, int32_t dtype) {
  const int f = fraction_bits(dtype), e = exponent_bits(dtype);
  const int bias = (1 << (e - 1)) - 1;
  const uint32_t exponent = static_cast<uint32_t>(bias - random.below(4));
  const uint32_t sign = random.below(2) << (f + e);
  return sign | (exponent << f) | static_cast<uint32_t>(random.below(1u << f));
}

inline Bytes random_numbers(Random& random, int32_t dtype, size_t count) {
  Bytes a(count * size_of(dtype));
  for (size_t i = 0; i < count; ++i) set_bits(a, dtype, i, random_bits(random, dtype));
  return a;
}

// Returns the distance between adjacent numbers of this dtype around a value.
inline double step(double value, int32_t dtype) {
  const int bias = (1 << (exponent_bits(dtype) - 1)) - 1;
  const int exponent = value == 0 ? 1 - bias : std::ilogb(value);
  return std::ldexp(1, std::max(exponent, 1 - bias) - fraction_bits(dtype));
}

// ---- Arrays of other types ----

inline int64_t words_of(int64_t columns) { return (columns + 63) / 64; }

template <class T>
inline Bytes bytes_of(const std::vector<T>& from) {
  Bytes to(from.size() * sizeof(T));
  if (!from.empty()) std::memcpy(to.data(), from.data(), to.size());
  return to;
}

inline Bytes offsets_of(const std::vector<uint64_t>& offsets, bool wide) {
  if (wide) return bytes_of(offsets);
  return bytes_of(std::vector<uint32_t>(offsets.begin(), offsets.end()));
}

// ---- Kernels ----

inline std::vector<std::string> fast_kernels() {
  std::vector<std::string> names;
  std::string all = halve_available();
  for (size_t at; (at = all.find(',')) != std::string::npos; all = all.substr(at + 1)) {
    names.push_back(all.substr(0, at));
  }
  CHECK(all == "reference", "the last kernel is %s", all.c_str());
  return names;
}

inline bool same(const Bytes& a, const Bytes& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

}  // namespace

#endif
