// Compares the kernels for integer codes with sums in double, over bits, masks, zeros,
// groups, shapes, dtypes, activations and batch sizes, and with masks, offsets and
// lengths that are inconsistent. Every array ends at the end of readable memory, so
// that reading one byte too far crashes the program. Speed is not tested.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "helpers.h"

namespace {

// ---- Matrices ----

enum Zero { in_the_middle, between_two, one_for_each_group };
const char* const zero_names[] = {"zero in the middle", "midrise", "zeros"};

struct Layout {
  int32_t bits;
  bool masked;
  Zero zero;
  int64_t group, rows, columns;

  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t row_bytes(int64_t codes) const { return (codes * bits + 7) / 8; }
  std::string name() const {
    char text[160];
    std::snprintf(text, sizeof(text), "int%d, %s, %s, group %ld, [%ld x %ld]", bits,
                  masked ? "masked" : "dense", zero_names[zero], long(group),
                  long(rows), long(columns));
    return text;
  }
};

struct Matrix {
  Layout layout;
  bool wide;
  Bytes codes, mask, offsets, scales, zeros;
  std::vector<double> weights;  // [rows, columns], exact

  halve_quantized view() const {
    const bool masked = layout.masked;
    return {codes.data(),
            int64_t(codes.size()),
            masked ? mask.data() : nullptr,
            masked ? offsets.data() : nullptr,
            scales.data(),
            layout.zero == one_for_each_group ? zeros.data() : nullptr,
            wide,
            layout.bits,
            layout.zero == between_two,
            layout.group,
            layout.rows,
            layout.columns};
  }
};

// Appends codes of a few bits to a string of bytes, lowest bit first.
class Writer {
 public:
  explicit Writer(int32_t bits) : bits_(bits) {}

  void add(uint32_t code) {
    for (int32_t i = 0; i < bits_; ++i, ++used_) {
      if (used_ % 8 == 0) bytes.push_back(0);
      bytes.back() |= (code >> i & 1) << used_ % 8;
    }
  }
  void end_row() { used_ = 0; }

  std::vector<uint8_t> bytes;

 private:
  int32_t bits_;
  int used_ = 0;
};

// A float16 scale between 2^-10 and 2^-6: no product overflows float16.
uint16_t random_scale(Random& random) {
  const auto exponent = static_cast<uint32_t>(5 + random.below(4));
  const auto rest = static_cast<uint32_t>(random.below(2) << 15 | random.below(1024));
  return static_cast<uint16_t>(exponent << 10 | rest);
}

// Scales, zeros and the weights that they give to codes.
struct Groups {
  Layout layout;
  std::vector<uint16_t> scales;
  std::vector<double> zeros;
  Writer written;

  Groups(Random& random, const Layout& from) : layout(from), written(from.bits) {
    for (int64_t row = 0; row < layout.rows; ++row, written.end_row()) {
      for (int64_t g = 0; g < layout.groups(); ++g) add(random);
    }
  }

  double weight(int64_t row, int64_t column, uint32_t code) const {
    const size_t at = row * layout.groups() + column / layout.group;
    return (code - zeros[at]) * number(scales[at], HALVE_F16);
  }

 private:
  void add(Random& random) {
    const auto code = static_cast<uint32_t>(random.below(1u << layout.bits));
    const double middle = 1 << (layout.bits - 1);
    written.add(code);
    scales.push_back(random_scale(random));
    zeros.push_back(layout.zero == one_for_each_group ? code
                    : layout.zero == between_two      ? middle - 0.5
                                                      : middle);
  }
};

Matrix make_matrix(Random& random, const Layout& layout) {
  const Groups groups(random, layout);
  std::vector<double> weights(layout.rows * layout.columns);
  std::vector<uint64_t> mask(layout.rows * words_of(layout.columns)), offsets = {0};
  Writer codes(layout.bits);
  for (int64_t row = 0; row < layout.rows; ++row, codes.end_row()) {
    for (int64_t column = 0; column < layout.columns; ++column) {
      if (layout.masked && random.below(2)) continue;
      const auto code = static_cast<uint32_t>(random.below(1u << layout.bits));
      codes.add(code);
      weights[row * layout.columns + column] = groups.weight(row, column, code);
      mask[row * words_of(layout.columns) + column / 64] |= uint64_t{1} << column % 64;
    }
    offsets.push_back(codes.bytes.size());
  }
  const bool wide = layout.rows % 2;
  return {layout,
          wide,
          bytes_of(codes.bytes),
          bytes_of(mask),
          offsets_of(offsets, wide),
          bytes_of(groups.scales),
          bytes_of(groups.written.bytes),
          std::move(weights)};
}

// ---- Numbers ----

// Rounds to the nearest number of a dtype, ties to even.
double rounded(double value, int32_t dtype) {
  const double unit = step(value, dtype);
  const double nearest = std::nearbyint(value / unit) * unit;
  const double end = std::ldexp(1, dtype == HALVE_F16 ? 16 : 128);
  return std::fabs(nearest) < end ? nearest : std::copysign(INFINITY, nearest);
}

std::vector<double> numbers_of(const Bytes& from, int32_t dtype) {
  std::vector<double> to(from.size() / size_of(dtype));
  for (size_t i = 0; i < to.size(); ++i) to[i] = number_at(from, dtype, i);
  return to;
}

int64_t unit_of(const Layout& layout) {
  const int64_t wide = layout.group >= layout.columns ? 128 : layout.group;
  return wide % 128 == 0 ? 128 : wide % 64 == 0 ? 64 : 32;
}

// A vector of x as integers times their scale, and the scale of each column.
struct Quantized {
  std::vector<double> x, scales;
};

Quantized quantized(const std::vector<double>& x, const Layout& layout,
                    int32_t activations) {
  const float limit = activations == HALVE_INT8 ? 127 : 32639;
  const size_t unit = size_t(unit_of(layout)), columns = size_t(layout.columns);
  Quantized to;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t column = i % columns, first = i - column % unit;
    const size_t last = first + std::min(unit, columns - (column - column % unit));
    float largest = 0;
    for (size_t j = first; j < last; ++j) {
      largest = std::max(largest, std::fabs(float(x[j])));
    }
    const float q = std::nearbyint(float(x[i]) * (limit / largest));
    to.x.push_back(double(q) * (largest / limit));
    to.scales.push_back(largest / limit);
  }
  return to;
}

// ---- Products ----

struct Product {
  const Matrix& w;
  int32_t dtype, activations;
  int64_t batch;
  const Bytes& x;
  const Bytes* bias;

  Bytes by(const std::string& kernel, int threads) const {
    Bytes y(batch * w.layout.rows * size_of(dtype));
    const halve_quantized view = w.view();
    CHECK(halve_select(kernel.c_str()) == HALVE_OK, "%s", kernel.c_str());
    const int32_t status = halve_quantized_linear(&view, dtype, x.data(), batch,
                                                  bias ? bias->data() : nullptr,
                                                  y.data(), activations, threads);
    CHECK(status == HALVE_OK, "status %d", status);
    return y;
  }

  std::string name(const std::string& kernel) const {
    char text[80];
    std::snprintf(text, sizeof(text), "%s, %s, int%d, batch %ld, ", kernel.c_str(),
                  dtype_names[dtype], activations == HALVE_INT8 ? 8 : 16, long(batch));
    return text + w.layout.name();
  }
};

// What a result must be, and how far from it it may be.
struct Expected {
  std::vector<double> y, tolerance;
};

// Sums in double of weights times x; `error` is how far each x may be off.
Expected sums(const Product& p, const std::vector<double>& weights,
              const std::vector<double>& x, const std::vector<double>& error) {
  Expected e;
  const size_t rows = p.w.layout.rows, columns = p.w.layout.columns;
  for (size_t i = 0; i < rows * p.batch; ++i) {
    const double* w = weights.data() + i % rows * columns;
    const size_t first = i / rows * columns;
    double sum = p.bias ? number_at(*p.bias, p.dtype, i % rows) : 0;
    double size = std::fabs(sum), lost = 0;
    for (size_t k = 0; k < columns; ++k) {
      sum += w[k] * x[first + k];
      size += std::fabs(w[k] * x[first + k]);
      if (!error.empty()) lost += std::fabs(w[k]) * error[first + k];
    }
    e.y.push_back(sum);
    // One rounding to the dtype, a few of float32, and what vdpbf16ps flushes to zero.
    const double flushed = p.dtype == HALVE_BF16 ? std::ldexp(1, -126) : 0;
    e.tolerance.push_back(step(sum, p.dtype) + 5e-7 * size + lost + flushed);
  }
  return e;
}

void compare(const Product& p, const std::string& kernel, const char* what,
             const Bytes& found, const Expected& expected) {
  for (size_t i = 0; i < expected.y.size(); ++i) {
    const double y = number_at(found, p.dtype, i);
    CHECK(std::fabs(y - expected.y[i]) <= expected.tolerance[i],
          "%s, %s, output %zu: %.9g, not %.9g (+- %.3g)", p.name(kernel).c_str(), what,
          i, y, expected.y[i], expected.tolerance[i]);
  }
}

// Holds each kernel to the sum over the same integers, up to the rounding of float32,
// and to the sum over x itself, up to half a step of the integers for every column.
void test_product(const Product& p, const std::vector<std::string>& kernels) {
  const std::vector<double> x = numbers_of(p.x, p.dtype);
  const Quantized q = quantized(x, p.w.layout, p.activations);
  std::vector<double> half_steps;
  for (double scale : q.scales) half_steps.push_back(scale * (0.5 + 1e-2));
  const Expected same_integers = sums(p, p.w.weights, q.x, {});
  const Expected same_x = sums(p, p.w.weights, x, half_steps);
  for (const std::string& kernel : kernels) {
    const Bytes y = p.by(kernel, p.batch % 3 + 1);
    compare(p, kernel, "the same integers", y, same_integers);
    compare(p, kernel, "x itself", y, same_x);
  }
}

// ---- Unpacking ----

void check_unpacked(const Matrix& w, const std::string& kernel, int32_t dtype,
                    const Bytes& out, const std::vector<int64_t>& rows) {
  const size_t columns = w.layout.columns;
  for (size_t i = 0; i < rows.size() * columns; ++i) {
    const double weight = w.weights[rows[i / columns] * columns + i % columns];
    const bool zero = weight == 0;
    const double found = number_at(out, dtype, i);
    CHECK(zero ? bits_at(out, dtype, i) == 0 : found == rounded(weight, dtype),
          "%s, %s, %s, weight %zu: %g, not %g", kernel.c_str(), dtype_names[dtype],
          w.layout.name().c_str(), i, found, weight);
  }
}

void test_unpack(const Matrix& w, int32_t dtype,
                 const std::vector<std::string>& kernels) {
  const halve_quantized view = w.view();
  const int64_t first = w.layout.rows / 3;
  std::vector<int64_t> rows;
  for (int64_t row = first; row < w.layout.rows; ++row) rows.push_back(row);
  Bytes out(rows.size() * w.layout.columns * size_of(dtype));
  for (const std::string& kernel : kernels) {
    halve_select(kernel.c_str());
    CHECK(halve_quantized_unpack(&view, first, w.layout.rows, dtype, out.data(), 2) ==
              HALVE_OK,
          "%s", kernel.c_str());
    check_unpacked(w, kernel, dtype, out, rows);
  }
}

void test_lookup(const Matrix& w, int32_t dtype, Random& random,
                 const std::vector<std::string>& kernels) {
  const halve_quantized view = w.view();
  std::vector<int64_t> rows = {0, w.layout.rows - 1, 0};
  for (int i = 0; i < 4; ++i) rows.push_back(random.below(w.layout.rows));
  const Bytes indices = bytes_of(rows);
  Bytes out(rows.size() * w.layout.columns * size_of(dtype));
  for (const std::string& kernel : kernels) {
    halve_select(kernel.c_str());
    CHECK(halve_quantized_lookup(&view, reinterpret_cast<int64_t*>(indices.data()),
                                 rows.size(), dtype, out.data(), 2) == HALVE_OK,
          "%s", kernel.c_str());
    check_unpacked(w, kernel, dtype, out, rows);
  }
}

// Every float16 number as a scale: subnormal numbers, overflow, infinities and NaNs.
void test_every_scale(const Layout& layout, int32_t dtype,
                      const std::vector<std::string>& kernels) {
  Random random;
  Matrix w = make_matrix(random, layout);
  for (int64_t i = 0; i < layout.rows * layout.groups(); ++i) {
    set_bits(w.scales, HALVE_F16, i, uint32_t(i));
  }
  const halve_quantized view = w.view();
  const size_t count = layout.rows * layout.columns;
  Bytes expected(count * size_of(dtype)), found(expected.size());
  halve_select("reference");
  halve_quantized_unpack(&view, 0, layout.rows, dtype, expected.data(), 1);
  for (const std::string& kernel : kernels) {
    halve_select(kernel.c_str());
    halve_quantized_unpack(&view, 0, layout.rows, dtype, found.data(), 1);
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_at(found, dtype, i), ref = bits_at(expected, dtype, i);
      CHECK(bits == ref ||
                (std::isnan(number(bits, dtype)) && std::isnan(number(ref, dtype))),
            "%s, %s, %s, weight %zu: %08x, not %08x", kernel.c_str(),
            dtype_names[dtype], layout.name().c_str(), i, bits, ref);
    }
  }
}

void test_scales(const std::vector<std::string>& kernels) {
  for (int32_t dtype : dtypes) {
    test_every_scale({3, true, between_two, 32, 512, 128 * 32}, dtype, kernels);
    test_every_scale({8, false, one_for_each_group, 32, 512, 128 * 32}, dtype, kernels);
  }
}

// ---- The table ----

const int64_t groups[] = {32, 64, 96, 128, 256, 1024};
const std::pair<int64_t, int64_t> shapes[] = {{1, 1},   {3, 64},   {5, 65},  {9, 130},
                                              {4, 333}, {19, 512}, {2, 1100}};
const int64_t batches[] = {1, 2, 3, 4, 5, 6, 7, 8, 13};

// Every layout meets every dtype and kind of activations; batches take turns.
void test_layout(const Layout& layout, Random& random, int& turn,
                 const std::vector<std::string>& kernels) {
  const Matrix w = make_matrix(random, layout);
  for (int32_t dtype : dtypes) {
    const Bytes bias = random_numbers(random, dtype, layout.rows);
    for (int32_t activations : {HALVE_INT16, HALVE_INT8}) {
      const int64_t batch = batches[turn++ % std::size(batches)];
      const Bytes x = random_numbers(random, dtype, batch * layout.columns);
      test_product({w, dtype, activations, batch, x, batch % 2 ? &bias : nullptr},
                   kernels);
    }
    test_unpack(w, dtype, kernels);
    test_lookup(w, dtype, random, kernels);
  }
}

void test_everything(const std::vector<std::string>& kernels) {
  Random random;
  int turn = 0;
  for (int32_t bits : {2, 3, 4, 8}) {
    for (bool masked : {false, true}) {
      for (Zero zero : {in_the_middle, between_two, one_for_each_group}) {
        if (zero == between_two && bits == 8) continue;
        for (int64_t group : groups) {
          for (auto [rows, columns] : shapes) {
            const Layout layout = {bits, masked, zero, group, rows, columns};
            test_layout(layout, random, turn, kernels);
          }
        }
      }
    }
  }
}

// Groups that are a row need not be a multiple of 32.
void test_row_groups(const std::vector<std::string>& kernels) {
  Random random;
  int turn = 0;
  for (int64_t columns : {1, 31, 100, 200}) {
    for (bool masked : {false, true}) {
      const Layout layout = {4, masked, one_for_each_group, columns, 6, columns};
      test_layout(layout, random, turn, kernels);
    }
  }
}

// Sizes of x that differ by a factor of 1e6 between groups, and those of one sign only,
// whose sums would lose the most if zeros were subtracted after rounding.
void test_uneven_x(const std::vector<std::string>& kernels) {
  Random random;
  for (int32_t bits : {2, 8}) {
    for (Zero zero : {in_the_middle, one_for_each_group}) {
      const Matrix w = make_matrix(random, {bits, true, zero, 128, 7, 1024});
      Bytes x(3 * 1024 * 4);
      for (size_t i = 0; i < 3 * 1024; ++i) {
        const double size = number(random_bits(random, HALVE_F32), HALVE_F32);
        const float value = std::fabs(size) * (i / 128 % 2 ? 1e6 : 1);
        std::memcpy(x.data() + 4 * i, &value, 4);
      }
      test_product({w, HALVE_F32, HALVE_INT16, 3, x, nullptr}, kernels);
    }
  }
}

// ---- Properties ----

// Enough work that several threads run, with a last tile that is not full.
void test_threads(const std::vector<std::string>& kernels) {
  Random random;
  const Matrix w = make_matrix(random, {3, true, in_the_middle, 128, 517, 777});
  for (int64_t batch : {1, 3, 6, 50}) {
    const Bytes x = random_numbers(random, HALVE_BF16, batch * 777);
    const Product p = {w, HALVE_BF16, HALVE_INT16, batch, x, nullptr};
    for (const std::string& kernel : kernels) {
      const Bytes alone = p.by(kernel, 1);
      for (int threads : {1, 2, 3, 64}) {
        CHECK(same(alone, p.by(kernel, threads)), "%s, %d threads", kernel.c_str(),
              threads);
      }
    }
  }
}

// A vector's results do not depend on the rest of its batch.
void test_batches(const std::vector<std::string>& kernels) {
  Random random;
  const std::pair<int32_t, bool> kinds[] = {{2, false}, {3, true}, {8, false}};
  for (auto [bits, masked] : kinds) {
    const Matrix w = make_matrix(random, {bits, masked, in_the_middle, 64, 19, 700});
    const Bytes x = random_numbers(random, HALVE_F32, 70 * 700);
    for (const std::string& kernel : kernels) {
      const Bytes all =
          Product{w, HALVE_F32, HALVE_INT16, 70, x, nullptr}.by(kernel, 1);
      for (int64_t b : {0, 3, 66, 69}) {
        Bytes one(700 * 4);
        std::memcpy(one.data(), x.data() + b * one.size(), one.size());
        const Bytes y =
            Product{w, HALVE_F32, HALVE_INT16, 1, one, nullptr}.by(kernel, 1);
        CHECK(std::memcmp(y.data(), all.data() + b * y.size(), y.size()) == 0,
              "%s, int%d, vector %ld", kernel.c_str(), bits, long(b));
      }
    }
  }
}

// An infinity or a NaN spoils the results of its vector and of no other.
void test_not_finite(const std::vector<std::string>& kernels) {
  Random random;
  for (int32_t dtype : dtypes) {
    const Matrix w = make_matrix(random, {4, true, in_the_middle, 32, 6, 70});
    const uint32_t infinity = ((1u << exponent_bits(dtype)) - 1)
                              << fraction_bits(dtype);
    for (int64_t batch : {2, 8}) {
      for (uint32_t bits : {infinity, infinity + 1}) {
        Bytes x = random_numbers(random, dtype, batch * 70);
        set_bits(x, dtype, 70 + 37, bits);
        const Product p = {w, dtype, HALVE_INT16, batch, x, nullptr};
        for (const std::string& kernel : kernels) {
          const Bytes y = p.by(kernel, 1);
          for (int64_t i = 0; i < batch * 6; ++i) {
            const bool spoiled = i / 6 == 1;
            CHECK(std::isnan(number_at(y, dtype, i)) == spoiled, "%s, output %ld",
                  p.name(kernel).c_str(), long(i));
          }
        }
      }
    }
  }
}

// A vector of zeros has no scale.
void test_zero_x(const std::vector<std::string>& kernels) {
  Random random;
  const Matrix w = make_matrix(random, {8, false, one_for_each_group, 64, 5, 100});
  for (int32_t dtype : dtypes) {
    const Bytes x(100 * size_of(dtype)), bias = random_numbers(random, dtype, 5);
    const Product p = {w, dtype, HALVE_INT16, 1, x, &bias};
    for (const std::string& kernel : kernels) {
      CHECK(same(p.by(kernel, 1), bias), "%s", p.name(kernel).c_str());
    }
  }
}

// ---- Untrusted files ----

// Makes a matrix with random masks, fill bits, offsets, zeros and codes, of any length
// where there is a mask.
Matrix make_hostile(Random& random, const Layout& layout) {
  Matrix w = make_matrix(random, layout);
  const size_t longest = layout.rows * layout.row_bytes(layout.columns);
  const size_t length = layout.masked ? random.below(longest + 1) : longest;
  std::vector<uint8_t> codes(length), zeros(w.zeros.size());
  for (uint8_t& byte : codes) byte = uint8_t(random.next());
  for (uint8_t& byte : zeros) byte = uint8_t(random.next());
  std::vector<uint64_t> mask(w.mask.size() / 8), offsets(layout.rows + 1);
  for (uint64_t& word : mask) word = random.below(4) ? random.next() : ~uint64_t{0};
  for (uint64_t& offset : offsets) {
    offset = random.below(4) ? random.below(length + 2) : random.next();
  }
  return {layout,
          w.wide,
          bytes_of(codes),
          bytes_of(mask),
          offsets_of(offsets, w.wide),
          std::move(w.scales),
          bytes_of(zeros),
          std::move(w.weights)};
}

// The weights that the reference finds in such a file are what it means.
void read_weights(Matrix& w) {
  const halve_quantized view = w.view();
  Bytes dense(w.weights.size() * 4);
  halve_select("reference");
  halve_quantized_unpack(&view, 0, w.layout.rows, HALVE_F32, dense.data(), 1);
  w.weights = numbers_of(dense, HALVE_F32);
}

void test_hostile(const std::vector<std::string>& kernels) {
  Random random;
  for (int round = 0; round < 240; ++round) {
    const int32_t bits = (const int32_t[]){2, 3, 4, 8}[round % 4];
    const auto zero = Zero(bits == 8 ? random.below(2) * 2 : random.below(3));
    const int64_t group = groups[random.below(std::size(groups))];
    const Layout layout = {
        bits,  random.below(4) > 0,           zero,
        group, int64_t(1 + random.below(20)), int64_t(1 + random.below(400))};
    Matrix w = make_hostile(random, layout);
    read_weights(w);
    const int32_t dtype = dtypes[round % 3];
    test_unpack(w, dtype, kernels);
    for (int64_t batch : {1, 2, 4, 7}) {
      const Bytes x = random_numbers(random, dtype, batch * layout.columns);
      const int32_t activations = round % 2 ? HALVE_INT8 : HALVE_INT16;
      test_product({w, dtype, activations, batch, x, nullptr}, kernels);
    }
  }
}

// ---- Arguments ----

int32_t linear(const halve_quantized& w, const float* x, int64_t batch, float* y,
               int32_t activations = HALVE_INT16, int32_t threads = 1) {
  return halve_quantized_linear(&w, HALVE_F32, x, batch, nullptr, y, activations,
                                threads);
}

// Applies a change to good arguments, after which every function must refuse them.
template <class Change>
void expect_bad(const Matrix& m, const char* what, Change change) {
  halve_quantized w = m.view();
  change(w);
  float x[70] = {}, y[2] = {};
  const int64_t index = 0;
  CHECK(linear(w, x, 1, y) == HALVE_BAD_ARGUMENT, "a product: %s", what);
  CHECK(halve_quantized_unpack(&w, 0, 0, HALVE_F32, y, 1) == HALVE_BAD_ARGUMENT,
        "unpacking: %s", what);
  CHECK(halve_quantized_lookup(&w, &index, 1, HALVE_F32, x, 1) == HALVE_BAD_ARGUMENT,
        "a lookup: %s", what);
}

#define EXPECT_BAD(matrix, ...) \
  expect_bad(matrix, #__VA_ARGS__, [&](halve_quantized& w) { __VA_ARGS__; })

void test_matrix_arguments() {
  Random random;
  const int64_t max = std::numeric_limits<int64_t>::max();
  const Matrix dense = make_matrix(random, {3, false, in_the_middle, 32, 2, 70});
  EXPECT_BAD(dense, w.bits = 1);
  EXPECT_BAD(dense, w.bits = 5);
  EXPECT_BAD(dense, w.bits = 16);
  EXPECT_BAD(dense, w.bits = -8);
  EXPECT_BAD(dense, w.group = 0);
  EXPECT_BAD(dense, w.group = -32);
  EXPECT_BAD(dense, w.group = 33);
  EXPECT_BAD(dense, w.group = 69);
  EXPECT_BAD(dense, w.rows = -1);
  EXPECT_BAD(dense, w.rows = 3);
  EXPECT_BAD(dense, w.rows = max);
  EXPECT_BAD(dense, w.columns = -1);
  EXPECT_BAD(dense, w.columns = 73);
  EXPECT_BAD(dense, w.columns = max);
  EXPECT_BAD(dense, w.rows = w.columns = int64_t{1} << 40);
  EXPECT_BAD(dense, w.code_bytes = -1);
  EXPECT_BAD(dense, w.code_bytes = 53);
  EXPECT_BAD(dense, w.code_bytes = max);
  EXPECT_BAD(dense, w.codes = nullptr);
  EXPECT_BAD(dense, w.scales = nullptr);
  EXPECT_BAD(dense, w.offsets = w.scales);
  EXPECT_BAD(dense, w.midrise = 2);
  EXPECT_BAD(dense, w.midrise = -1);
  EXPECT_BAD(dense, w.midrise = 1, w.zeros = w.scales);
  EXPECT_BAD(dense, w.midrise = 1, w.bits = 8);
  EXPECT_BAD(dense, w.wide_offsets = 2);
  const Matrix masked = make_matrix(random, {8, true, in_the_middle, 32, 2, 70});
  EXPECT_BAD(masked, w.offsets = nullptr);
  EXPECT_BAD(masked, w.codes = nullptr);
  EXPECT_BAD(masked, w.code_bytes = -1);
  CHECK(linear(dense.view(), nullptr, 0, nullptr) == HALVE_OK, "an empty batch");
}

void test_call_arguments() {
  Random random;
  const Matrix m = make_matrix(random, {4, false, in_the_middle, 32, 2, 3});
  const halve_quantized w = m.view();
  float x[6] = {}, y[6] = {};
  const int64_t max = std::numeric_limits<int64_t>::max(), rows[] = {1, 2, -1};
  const auto bad = [](int32_t status, const char* what) {
    CHECK(status == HALVE_BAD_ARGUMENT, "%s: %d", what, status);
  };
  bad(linear(w, x, -1, y), "batch");
  bad(linear(w, x, max, y), "an endless batch");
  bad(linear(w, nullptr, 1, y), "x");
  bad(linear(w, x, 1, nullptr), "y");
  bad(linear(w, x, 1, y, 2), "activations");
  bad(linear(w, x, 1, y, HALVE_INT8, 0), "threads");
  bad(halve_quantized_linear(nullptr, 0, x, 1, nullptr, y, 0, 1), "w");
  bad(halve_quantized_linear(&w, 3, x, 1, nullptr, y, 0, 1), "dtype");
  bad(halve_quantized_unpack(nullptr, 0, 0, 0, y, 1), "w");
  bad(halve_quantized_unpack(&w, 1, 0, 0, y, 1), "a backward range");
  bad(halve_quantized_unpack(&w, -1, 0, 0, y, 1), "a range before the beginning");
  bad(halve_quantized_unpack(&w, 0, 3, 0, y, 1), "a range past the end");
  bad(halve_quantized_unpack(&w, 0, 1, 3, y, 1), "dtype");
  bad(halve_quantized_unpack(&w, 0, 1, 0, nullptr, 1), "out");
  bad(halve_quantized_unpack(&w, 0, 1, 0, y, 0), "threads");
  bad(halve_quantized_lookup(&w, rows, 2, 0, y, 1), "an index past the end");
  bad(halve_quantized_lookup(&w, rows + 2, 1, 0, y, 1), "a negative index");
  bad(halve_quantized_lookup(&w, nullptr, 1, 0, y, 1), "indices");
  bad(halve_quantized_lookup(&w, rows, -1, 0, y, 1), "count");
  bad(halve_quantized_lookup(&w, rows, max, 0, y, 1), "an endless count");
  CHECK(halve_quantized_lookup(&w, nullptr, 0, 0, nullptr, 1) == HALVE_OK, "nothing");
  CHECK(halve_quantized_lookup(&w, rows, 1, 0, y, 1) == HALVE_OK, "a row");
}

void test_nothing(const std::vector<std::string>& kernels) {
  halve_quantized thin = {};
  thin.bits = 2, thin.group = 32, thin.rows = 2;
  uint32_t offsets[3] = {};
  for (const std::string& kernel : kernels) {
    halve_select(kernel.c_str());
    for (const void* mask : {(const void*)nullptr, (const void*)offsets}) {
      thin.mask = mask, thin.offsets = mask;
      float y[6] = {1, 1, 1, 1, 1, 1};
      CHECK(linear(thin, nullptr, 3, y) == HALVE_OK, "no columns");
      for (float value : y) CHECK(value == 0, "no columns: %g", value);
    }
  }
}

}  // namespace

int main() {
  std::vector<std::string> kernels = fast_kernels();
  kernels.push_back("reference");
  std::printf("kernels: %s\n", halve_available());
  test_matrix_arguments();
  test_call_arguments();
  test_nothing(kernels);
  test_zero_x(kernels);
  test_not_finite(kernels);
  test_threads(kernels);
  test_batches(kernels);
  test_scales(kernels);
  test_uneven_x(kernels);
  test_row_groups(kernels);
  test_hostile(kernels);
  test_everything(kernels);
  std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures ? 1 : 0;
}
