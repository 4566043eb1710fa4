// Compares every kernel that this CPU can run with the reference kernel, over awkward
// shapes, patterns and batch sizes, and with inconsistent masks and offsets. Every
// array ends at the end of readable memory, so that reading one byte too far crashes
// the program. Speed is not tested.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "helpers.h"

namespace {

// ---- Matrices ----

enum Pattern { half, two_of_four, nothing, everything, alternating, one_in_twenty };
const Pattern patterns[] = {half,       two_of_four, nothing,
                            everything, alternating, one_in_twenty};
const char* const pattern_names[] = {"half",       "2:4",         "nothing",
                                     "everything", "alternating", "one in twenty"};

bool keeps(Pattern pattern, Random& random, int64_t row, int64_t column) {
  static const unsigned pairs[] = {3, 5, 6, 9, 10, 12};
  switch (pattern) {
    case half: return random.below(2);
    case two_of_four: return (pairs[(row * 31 + column / 4) % 6] >> (column % 4)) & 1;
    case nothing: return false;
    case everything: return true;
    case alternating: return row % 2;
    case one_in_twenty: return random.below(20) == 0;
  }
  return false;
}

struct Matrix {
  int32_t dtype;
  int64_t rows, columns;
  bool wide;
  Bytes dense, values, mask, offsets;

  halve_packed packed() const {
    return {values.size() ? values.data() : nullptr,
            int64_t(values.size() / size_of(dtype)),
            mask.data(),
            offsets.data(),
            wide,
            dtype,
            rows,
            columns};
  }
};

Matrix make_matrix(Random& random, int32_t dtype, int64_t rows, int64_t columns,
                   Pattern pattern, bool wide) {
  Bytes dense(rows * columns * size_of(dtype));
  std::vector<uint32_t> kept;
  std::vector<uint64_t> mask(rows * words_of(columns)), offsets = {0};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      if (!keeps(pattern, random, row, column)) continue;
      kept.push_back(random_bits(random, dtype));
      set_bits(dense, dtype, row * columns + column, kept.back());
      mask[row * words_of(columns) + column / 64] |= uint64_t{1} << (column % 64);
    }
    offsets.push_back(kept.size());
  }
  Bytes values(kept.size() * size_of(dtype));
  for (size_t i = 0; i < kept.size(); ++i) set_bits(values, dtype, i, kept[i]);
  return {dtype,
          rows,
          columns,
          wide,
          std::move(dense),
          std::move(values),
          bytes_of(mask),
          offsets_of(offsets, wide)};
}

// ---- Comparisons ----

struct Product {
  const Matrix& w;
  int64_t batch;
  const Bytes& x;
  const Bytes* bias;

  Bytes packed(const char* kernel, int threads) const {
    Bytes y(outputs() * size_of(w.dtype));
    const halve_packed view = w.packed();
    select(kernel);
    check(halve_packed_linear(&view, x.data(), batch, bias_data(), y.data(), threads));
    return y;
  }

  Bytes dense(const char* kernel, int threads) const {
    Bytes y(outputs() * size_of(w.dtype));
    select(kernel);
    check(halve_dense_linear(w.dense.data(), w.dtype, w.rows, w.columns, x.data(),
                             batch, bias_data(), y.data(), threads));
    return y;
  }

  size_t outputs() const { return w.rows * batch; }

  // Returns the sum of |w x| of one output, to which its rounding error is relative.
  double magnitude(size_t output) const {
    const size_t b = output / w.rows, row = output % w.rows;
    double sum = 0;
    for (int64_t i = 0; i < w.columns; ++i) {
      const double weight = number_at(w.dense, w.dtype, row * w.columns + i);
      sum += std::fabs(weight * number_at(x, w.dtype, b * w.columns + i));
    }
    return sum;
  }

 private:
  const void* bias_data() const { return bias ? bias->data() : nullptr; }
  static void select(const char* kernel) {
    CHECK(halve_select(kernel) == HALVE_OK, "%s", kernel);
  }
  static void check(int32_t status) { CHECK(status == HALVE_OK, "status %d", status); }
};

void compare(const char* what, const char* kernel, const Product& p,
             const char* pattern, const Bytes& found, const Bytes& expected) {
  const int32_t dtype = p.w.dtype;
  for (size_t i = 0; i < p.outputs(); ++i) {
    const double y = number_at(found, dtype, i), ref = number_at(expected, dtype, i);
    if (y == ref || (std::isnan(y) && std::isnan(ref))) continue;
    // One rounding, the error of the sum, and a subnormal that vdpbf16ps has flushed.
    const double flushed = dtype == HALVE_BF16 ? std::ldexp(1, -126) : 0;
    const double tolerance = step(ref, dtype) + 1e-6 * p.magnitude(i) + flushed;
    CHECK(
        std::fabs(y - ref) <= tolerance,
        "%s, %s, %s, %s, [%ld x %ld], batch %ld, output %zu: %.9g, not %.9g (+- %.3g)",
        what, kernel, dtype_names[dtype], pattern, long(p.w.rows), long(p.w.columns),
        long(p.batch), i, y, ref, tolerance);
  }
}

void test_unpack(const Matrix& w, const char* kernel, const char* pattern) {
  halve_select(kernel);
  const halve_packed view = w.packed();
  for (int64_t first : {int64_t{0}, w.rows / 3}) {
    const size_t row_bytes = w.columns * size_of(w.dtype);
    Bytes out((w.rows - first) * row_bytes);
    CHECK(halve_unpack(&view, first, w.rows, out.data(), 2) == HALVE_OK, "%s", kernel);
    CHECK(std::memcmp(out.data(), w.dense.data() + first * row_bytes, out.size()) == 0,
          "unpack, %s, %s, %s, [%ld x %ld] from row %ld", kernel, dtype_names[w.dtype],
          pattern, long(w.rows), long(w.columns), long(first));
  }
}

const int64_t batches[] = {1, 2, 3, 4, 5, 8, 16, 17, 33};
const std::pair<int64_t, int64_t> shapes[] = {
    {1, 1},     {1, 64}, {3, 63},   {5, 65},    {7, 128}, {64, 200},
    {33, 1000}, {9, 2},  {4, 4096}, {12, 1100}, {130, 1}};

void test_products(const Matrix& w, const char* pattern, Random& random,
                   const std::vector<std::string>& kernels) {
  const Bytes bias = random_numbers(random, w.dtype, w.rows);
  for (int64_t batch : batches) {
    const Bytes x = random_numbers(random, w.dtype, batch * w.columns);
    const Product p = {w, batch, x, batch % 2 ? &bias : nullptr};
    const Bytes expected = p.packed("reference", 1);
    CHECK(same(expected, p.dense("reference", 2)),
          "the packed and dense products of the reference differ");
    for (const std::string& kernel : kernels) {
      const char* name = kernel.c_str();
      compare("packed", name, p, pattern, p.packed(name, batch % 3 + 1), expected);
      compare("dense", name, p, pattern, p.dense(name, batch % 3 + 1), expected);
    }
  }
}

void test_everything(const std::vector<std::string>& kernels) {
  Random random;
  for (int32_t dtype : dtypes) {
    for (auto [rows, columns] : shapes) {
      for (Pattern pattern : patterns) {
        const Matrix w =
            make_matrix(random, dtype, rows, columns, pattern, rows % 2 == 0);
        test_products(w, pattern_names[pattern], random, kernels);
        test_unpack(w, "reference", pattern_names[pattern]);
        for (const std::string& kernel : kernels) {
          test_unpack(w, kernel.c_str(), pattern_names[pattern]);
        }
      }
    }
  }
}

// Enough work that several threads run, with a last tile that is not full.
void test_threads(const std::vector<std::string>& kernels) {
  Random random;
  const Matrix w = make_matrix(random, HALVE_BF16, 517, 777, half, false);
  for (int64_t batch : {1, 6, 33}) {
    const Bytes x = random_numbers(random, HALVE_BF16, batch * w.columns);
    const Product p = {w, batch, x, nullptr};
    const Bytes expected = p.packed("reference", 4);
    for (const std::string& kernel : kernels) {
      const Bytes alone = p.packed(kernel.c_str(), 1);
      compare("alone", kernel.c_str(), p, "half", alone, expected);
      for (int threads : {2, 3, 64}) {
        CHECK(same(alone, p.packed(kernel.c_str(), threads)), "%s, %d threads",
              kernel.c_str(), threads);
      }
    }
  }
}

// Compares the reference with a sum in double of independently decoded numbers.
void test_reference() {
  Random random;
  const Matrix w = make_matrix(random, HALVE_F32, 9, 130, half, false);
  const Bytes x = random_numbers(random, HALVE_F32, 2 * w.columns);
  const Product p = {w, 2, x, nullptr};
  const Bytes y = p.packed("reference", 1);
  for (size_t i = 0; i < p.outputs(); ++i) {
    double sum = 0;
    for (int64_t k = 0; k < w.columns; ++k) {
      sum += number_at(w.dense, HALVE_F32, i % w.rows * w.columns + k) *
             number_at(x, HALVE_F32, i / w.rows * w.columns + k);
    }
    CHECK(number_at(y, HALVE_F32, i) == static_cast<float>(sum), "output %zu", i);
  }
}

// ---- Every 16-bit number ----

// Multiplies the 1 x 1 matrix [1] with a batch of all 65,536 numbers: y must be x, bit
// for bit, except that a NaN may become another NaN, and vdpbf16ps treats subnormal
// numbers as zeros.
void test_every_number(const std::string& kernel, int32_t dtype) {
  const uint32_t one = dtype == HALVE_F16 ? 0x3c00 : 0x3f80;
  const int64_t count = 65536;
  Bytes x(count * 2), y(count * 2);
  for (int64_t i = 0; i < count; ++i) set_bits(x, dtype, i, uint32_t(i));
  halve_select(kernel.c_str());
  CHECK(halve_dense_linear(&one, dtype, 1, 1, x.data(), count, nullptr, y.data(), 2) ==
            HALVE_OK,
        "%s", kernel.c_str());
  const bool flushes = kernel == "avx512bf16" && dtype == HALVE_BF16;
  for (int64_t i = 0; i < count; ++i) {
    const double in = number_at(x, dtype, i), out = number_at(y, dtype, i);
    const bool subnormal = flushes && std::fabs(in) < std::ldexp(1, -126);
    CHECK(subnormal || in == out || (std::isnan(in) && std::isnan(out)),
          "%s, %s: %04lx became %04x", kernel.c_str(), dtype_names[dtype], long(i),
          bits_at(y, dtype, i));
  }
}

// Tests x plus a bias for all x: sums halfway between two numbers, and overflow.
void test_rounding(const std::string& kernel, int32_t dtype, uint32_t bias_bits) {
  Random random;
  Matrix w = make_matrix(random, dtype, 1, 1, everything, false);
  const uint32_t one = dtype == HALVE_F16 ? 0x3c00 : 0x3f80;
  set_bits(w.dense, dtype, 0, one);
  set_bits(w.values, dtype, 0, one);
  Bytes x(65536 * 2), bias(2);
  for (uint32_t i = 0; i < 65536; ++i) set_bits(x, dtype, i, i);
  set_bits(bias, dtype, 0, bias_bits);
  const Product p = {w, 65536, x, &bias};
  const Bytes expected = p.packed("reference", 1);
  compare("rounding", kernel.c_str(), p, "one", p.packed(kernel.c_str(), 2), expected);
}

void test_numbers(const std::vector<std::string>& kernels) {
  std::vector<std::string> all = kernels;
  all.push_back("reference");
  for (const std::string& kernel : all) {
    for (int32_t dtype : {HALVE_F16, HALVE_BF16}) {
      test_every_number(kernel, dtype);
      for (uint32_t bias : {0x3c01u, 0x7bffu, 0x3f80u, 0x7f7fu, 0x0001u, 0x7f80u}) {
        test_rounding(kernel, dtype, bias);
      }
    }
  }
}

// A pruned weight counts as a zero: times infinity it is NaN in every kernel.
void test_infinity(const std::vector<std::string>& kernels) {
  Random random;
  for (int32_t dtype : dtypes) {
    const Matrix w = make_matrix(random, dtype, 6, 70, half, false);
    for (int64_t batch : {1, 3}) {
      Bytes x = random_numbers(random, dtype, batch * 70);
      const uint32_t infinity = ((1u << exponent_bits(dtype)) - 1)
                                << fraction_bits(dtype);
      set_bits(x, dtype, 69, infinity);
      const Product p = {w, batch, x, nullptr};
      const Bytes expected = p.packed("reference", 1);
      for (const std::string& kernel : kernels) {
        compare("infinity", kernel.c_str(), p, "half", p.packed(kernel.c_str(), 1),
                expected);
      }
    }
  }
}

// ---- Untrusted files ----

// Makes a matrix with random masks, padding bits and offsets, and unaligned data.
Matrix make_hostile(Random& random, int32_t dtype, int64_t rows, int64_t columns) {
  const size_t kept = random.below(rows * columns + 1);
  const bool wide = random.below(2);
  std::vector<uint64_t> mask(rows * words_of(columns)), offsets(rows + 1);
  for (uint64_t& word : mask) word = random.next();
  for (uint64_t& offset : offsets) {
    offset = random.below(4) ? random.below(kept + 2) : random.next();
  }
  return {dtype,
          rows,
          columns,
          wide,
          Bytes(rows * columns * size_of(dtype)),
          random_numbers(random, dtype, kept),
          bytes_of(mask),
          offsets_of(offsets, wide)};
}

// The reference defines what such a file means; every kernel must agree with it.
void test_hostile(const std::vector<std::string>& kernels) {
  Random random;
  for (int round = 0; round < 150; ++round) {
    const int32_t dtype = dtypes[round % 3];
    Matrix w = make_hostile(random, dtype, 1 + random.below(20), 1 + random.below(300));
    const halve_packed view = w.packed();
    halve_select("reference");
    halve_unpack(&view, 0, w.rows, w.dense.data(), 1);
    for (const std::string& kernel : kernels) {
      test_unpack(w, kernel.c_str(), "hostile");
    }
    for (int64_t batch : {1, 5}) {
      const Bytes x = random_numbers(random, dtype, batch * w.columns);
      const Product p = {w, batch, x, nullptr};
      const Bytes expected = p.packed("reference", 1);
      for (const std::string& kernel : kernels) {
        compare("hostile", kernel.c_str(), p, "hostile", p.packed(kernel.c_str(), 2),
                expected);
      }
    }
  }
}

// ---- Arguments ----

int32_t linear(const halve_packed& w, const void* x, int64_t batch, void* y,
               int32_t threads = 1) {
  return halve_packed_linear(&w, x, batch, nullptr, y, threads);
}

void test_arguments() {
  Random random;
  const Matrix m = make_matrix(random, HALVE_F32, 2, 3, half, false);
  const halve_packed good = m.packed();
  float x[3] = {}, y[2] = {};
  CHECK(linear(good, x, 1, y) == HALVE_OK, "good arguments");
  CHECK(linear(good, x, -1, y) == HALVE_BAD_ARGUMENT, "batch");
  CHECK(linear(good, nullptr, 1, y) == HALVE_BAD_ARGUMENT, "x");
  CHECK(linear(good, x, 1, nullptr) == HALVE_BAD_ARGUMENT, "y");
  CHECK(linear(good, x, 1, y, 0) == HALVE_BAD_ARGUMENT, "threads");
  CHECK(linear(good, nullptr, 0, nullptr) == HALVE_OK, "an empty batch");
  CHECK(halve_packed_linear(nullptr, x, 1, nullptr, y, 1) == HALVE_BAD_ARGUMENT, "w");
  const int64_t max = std::numeric_limits<int64_t>::max();
  auto bad = [&](auto change) {
    halve_packed w = good;
    change(w);
    CHECK(linear(w, x, 1, y) == HALVE_BAD_ARGUMENT, "a product");
    CHECK(halve_unpack(&w, 0, 0, y, 1) == HALVE_BAD_ARGUMENT, "unpacking");
  };
  bad([](halve_packed& w) { w.dtype = 3; });
  bad([](halve_packed& w) { w.dtype = -1; });
  bad([](halve_packed& w) { w.rows = -1; });
  bad([](halve_packed& w) { w.columns = -1; });
  bad([](halve_packed& w) { w.kept = -1; });
  bad([](halve_packed& w) { w.wide_offsets = 2; });
  bad([](halve_packed& w) { w.mask = nullptr; });
  bad([](halve_packed& w) { w.offsets = nullptr; });
  bad([](halve_packed& w) { w.values = nullptr, w.kept = 1; });
  bad([&](halve_packed& w) { w.rows = max; });
  bad([&](halve_packed& w) { w.columns = max; });
  bad([&](halve_packed& w) { w.rows = w.columns = int64_t{1} << 40; });
  CHECK(linear(good, x, max, y) == HALVE_BAD_ARGUMENT, "an endless batch");
  CHECK(halve_unpack(&good, 1, 0, y, 1) == HALVE_BAD_ARGUMENT, "a backward range");
  CHECK(halve_unpack(&good, 0, 3, y, 1) == HALVE_BAD_ARGUMENT, "a range past the end");
  CHECK(halve_unpack(&good, 2, 2, nullptr, 1) == HALVE_OK, "an empty range");
  CHECK(halve_dense_linear(nullptr, 0, 2, 3, x, 1, nullptr, y, 1) == HALVE_BAD_ARGUMENT,
        "weight");
}

void test_nothing() {
  const halve_packed empty = {nullptr, 0, nullptr, nullptr, 0, HALVE_F16, 0, 5};
  uint16_t x[5] = {};
  CHECK(linear(empty, x, 1, nullptr) == HALVE_OK, "no rows");
  const uint32_t offsets[3] = {};
  const halve_packed thin = {nullptr, 0, nullptr, offsets, 0, HALVE_F16, 2, 0};
  uint16_t y[6] = {1, 1, 1, 1, 1, 1};
  for (const char* kernel : {"", "reference"}) {
    halve_select(kernel);
    CHECK(linear(thin, nullptr, 3, y) == HALVE_OK, "no columns");
    for (uint16_t value : y) CHECK(value == 0, "no columns: %d", value);
  }
}

void test_selection(const std::vector<std::string>& kernels) {
  CHECK(halve_abi() == HALVE_ABI, "%d", halve_abi());
  CHECK(halve_select("mmx") == HALVE_NO_SUCH_KERNEL, "an unknown name");
  for (const std::string& kernel : kernels) {
    CHECK(halve_select(kernel.c_str()) == HALVE_OK, "%s", kernel.c_str());
    CHECK(halve_selected() == kernel, "%s", halve_selected());
  }
  CHECK(halve_select(nullptr) == HALVE_OK, "the best");
  const std::string best = kernels.empty() ? "reference" : kernels[0];
  CHECK(halve_selected() == best, "%s", halve_selected());
}

void test_read() {
  Array<uint64_t> words(5000);
  uint64_t sum = 0;
  for (size_t i = 0; i < words.size(); ++i) {
    words.set(i, i * i);
    sum += i * i;
  }
  for (int threads : {1, 2, 3}) {
    const uint64_t found = halve_read(words.data(), words.bytes(), threads);
    CHECK(found == sum, "%d threads: %lu, not %lu", threads, found, sum);
  }
}

// Scratch memory must be freed when its thread ends; leak checkers would report it.
void test_short_lived_threads() {
  for (int i = 0; i < 3; ++i) {
    std::thread([] {
      Random random;
      const Matrix w = make_matrix(random, HALVE_BF16, 20, 500, half, false);
      const Bytes x = random_numbers(random, HALVE_BF16, 4 * 500);
      Product{w, 4, x, nullptr}.packed("", 2);
    }).join();
  }
}

}  // namespace

int main() {
  const std::vector<std::string> kernels = fast_kernels();
  std::printf("kernels: %s\n", halve_available());
  test_selection(kernels);
  test_arguments();
  test_nothing();
  test_read();
  test_reference();
  test_infinity(kernels);
  test_numbers(kernels);
  test_threads(kernels);
  test_short_lived_threads();
  test_hostile(kernels);
  test_everything(kernels);
  std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures ? 1 : 0;
}
