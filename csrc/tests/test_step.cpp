// Compares what a decode step computes beside products, by every kernel that this CPU
// can run, with the reference, over awkward shapes. Every array ends at the end of
// readable memory.

#include "helpers.h"

namespace {

struct Shape {
  int64_t batch, heads, key_heads, length, width;
};

const Shape shapes[] = {{1, 1, 1, 1, 1},    {1, 4, 4, 7, 64},   {2, 4, 2, 8, 16},
                        {1, 6, 1, 33, 80},  {3, 2, 2, 17, 5},   {1, 8, 2, 300, 128},
                        {1, 2, 2, 40, 200}, {2, 32, 4, 64, 24}, {0, 2, 2, 4, 8}};

// Rows are stored as in a cache with room for more positions than are filled.
struct Cache {
  int64_t room;
  Bytes keys, values;
};

Cache make_cache(Random& random, int32_t dtype, const Shape& s) {
  const int64_t room = s.length + 3;
  const size_t last = s.batch * s.key_heads * room * s.width;
  const size_t size = last ? last - 3 * s.width : 0;
  return {room, random_numbers(random, dtype, size),
          random_numbers(random, dtype, size)};
}

halve_attention attention_of(const Shape& s, int32_t dtype, const Bytes& query,
                             const Cache& cache) {
  const int64_t head = cache.room * s.width, sequence = s.key_heads * head;
  return {query.data(),
          cache.keys.data(),
          cache.values.data(),
          dtype,
          0.7f,
          s.batch,
          s.heads,
          s.key_heads,
          s.length,
          s.width,
          {sequence, head, s.width},
          {sequence, head, s.width}};
}

Bytes attend(const char* kernel, const halve_attention& a, int32_t threads) {
  Bytes out(a.batch * a.heads * a.width * size_of(a.dtype));
  CHECK(halve_select(kernel) == HALVE_OK, "%s", kernel);
  const int32_t status = halve_attend(&a, out.data(), threads);
  CHECK(status == HALVE_OK, "%s: status %d", kernel, status);
  return out;
}

// Weights sum to one, so errors of float32 are those of numbers up to 2.
bool close(const Bytes& out, const Bytes& expected, int32_t dtype) {
  for (size_t i = 0; i < expected.size() / size_of(dtype); ++i) {
    const double is = number_at(out, dtype, i), should = number_at(expected, dtype, i);
    if (std::fabs(is - should) > step(should, dtype) + 2e-6) return false;
  }
  return true;
}

void test_kernels_agree() {
  Random random;
  for (const int32_t dtype : dtypes) {
    for (const Shape& s : shapes) {
      const Bytes query = random_numbers(random, dtype, s.batch * s.heads * s.width);
      const Cache cache = make_cache(random, dtype, s);
      const halve_attention a = attention_of(s, dtype, query, cache);
      const Bytes expected = attend("reference", a, 1);
      for (const std::string& kernel : fast_kernels()) {
        const Bytes one = attend(kernel.c_str(), a, 1);
        CHECK(close(one, expected, dtype), "%s %s, length %d, width %d", kernel.c_str(),
              dtype_names[dtype], int(s.length), int(s.width));
        CHECK(same(one, attend(kernel.c_str(), a, 3)), "%s: threads", kernel.c_str());
      }
    }
  }
}

// Scores far apart: all weight is on one position, and nothing overflows.
void test_large_scores() {
  Random random;
  const Shape s = {1, 2, 2, 50, 16};
  const Bytes query = random_numbers(random, HALVE_F32, s.heads * s.width);
  const Cache cache = make_cache(random, HALVE_F32, s);
  halve_attention a = attention_of(s, HALVE_F32, query, cache);
  for (const float scale : {1e4f, -1e4f, 0.0f}) {
    a.scale = scale;
    const Bytes expected = attend("reference", a, 1);
    for (const std::string& kernel : fast_kernels()) {
      CHECK(close(attend(kernel.c_str(), a, 2), expected, HALVE_F32), "%s, scale %g",
            kernel.c_str(), scale);
    }
  }
}

void test_bad_arguments() {
  Random random;
  const Shape s = {1, 4, 2, 5, 8};
  const Bytes query = random_numbers(random, HALVE_F32, s.heads * s.width);
  const Cache cache = make_cache(random, HALVE_F32, s);
  const halve_attention good = attention_of(s, HALVE_F32, query, cache);
  Bytes out(s.heads * s.width * sizeof(float));
  const auto refused = [&](auto spoil) {
    halve_attention bad = good;
    spoil(bad);
    return halve_attend(&bad, out.data(), 1) == HALVE_BAD_ARGUMENT;
  };
  CHECK(halve_attend(&good, out.data(), 1) == HALVE_OK, "good");
  CHECK(halve_attend(nullptr, out.data(), 1) == HALVE_BAD_ARGUMENT, "null");
  CHECK(halve_attend(&good, nullptr, 1) == HALVE_BAD_ARGUMENT, "out");
  CHECK(halve_attend(&good, out.data(), 0) == HALVE_BAD_ARGUMENT, "threads");
  CHECK(refused([](auto& a) { a.dtype = 3; }), "dtype");
  CHECK(refused([](auto& a) { a.key_heads = 3; }), "key heads");
  CHECK(refused([](auto& a) { a.key_heads = 0; }), "no key heads");
  CHECK(refused([](auto& a) { a.length = 0; }), "length");
  CHECK(refused([](auto& a) { a.width = int64_t{1} << 62; }), "width");
  CHECK(refused([](auto& a) { a.keys = nullptr; }), "keys");
}

// ---- Steps ----

halve_operation operation(int32_t kind, int32_t dtype, int64_t rows, int64_t columns,
                          const Bytes& x, const Bytes& other, Bytes& y) {
  return {kind,     dtype,        rows,    columns,  0,
          x.data(), other.data(), nullptr, y.data(), 1e-5f,
          0};
}

Bytes run(const char* kernel, const halve_operation& o, int64_t position) {
  CHECK(halve_select(kernel) == HALVE_OK, "%s", kernel);
  CHECK(halve_run(&o, 1, position, 2) == HALVE_OK, "%s, operation %d", kernel, o.kind);
  Bytes out(o.rows * o.columns * size_of(o.dtype));
  std::memcpy(out.data(), o.y, out.size());
  return out;
}

// Every kernel against the reference; the sum of a norm has another order.
void test_operations() {
  Random random;
  for (const int32_t dtype : dtypes) {
    for (const int64_t columns : {2, 16, 50, 4096}) {
      const int64_t rows = 3, size = rows * columns;
      const Bytes x = random_numbers(random, dtype, size);
      const Bytes other = random_numbers(random, dtype, 3 * 2 * columns);
      for (const int32_t kind : {HALVE_NORM, HALVE_ROTATE, HALVE_GATE, HALVE_ADD}) {
        Bytes y(size * size_of(dtype));
        const halve_operation o = operation(kind, dtype, rows, columns, x, other, y);
        const Bytes expected = run("reference", o, 2);
        for (const std::string& kernel : fast_kernels()) {
          CHECK(close(run(kernel.c_str(), o, 2), expected, dtype), "%s %s %d of %d",
                kernel.c_str(), dtype_names[dtype], kind, int(columns));
        }
      }
    }
  }
}

void test_store() {
  Random random;
  const Bytes x = random_numbers(random, HALVE_BF16, 2 * 4);
  Bytes y(2 * 3 * 4 * size_of(HALVE_BF16));  // two heads with room for three positions
  halve_operation o = operation(HALVE_STORE, HALVE_BF16, 2, 4, x, x, y);
  o.size = 3 * 4;
  CHECK(halve_run(&o, 1, 2, 1) == HALVE_OK, "store");
  for (size_t head = 0; head < 2; ++head) {
    for (size_t i = 0; i < 4; ++i) {
      const size_t at = (head * 3 + 2) * 4 + i;
      CHECK(bits_at(y, HALVE_BF16, at) == bits_at(x, HALVE_BF16, head * 4 + i), "store");
    }
  }
}

// Products of different sizes take turns on one team: more rounds, and more threads,
// than there are CPUs. Each equals the product alone, to the bit.
void test_teams() {
  Random random;
  const int64_t columns = 256, sizes[] = {700, 3, 2048};
  const Bytes x = random_numbers(random, HALVE_F32, columns);
  std::vector<Bytes> weights, alone, together;
  for (const int64_t size : sizes) {
    weights.push_back(random_numbers(random, HALVE_F32, size * columns));
    together.emplace_back(size * sizeof(float));
    alone.emplace_back(size * sizeof(float));
    CHECK(halve_dense_linear(weights.back().data(), HALVE_F32, size, columns, x.data(), 1,
                             nullptr, alone.back().data(), 1) == HALVE_OK,
          "alone");
  }
  for (const int32_t threads : {1, 2, 3, 7}) {
    std::vector<halve_operation> operations;
    for (int i = 0; i < 60; ++i) {
      Bytes& y = together[i % 3];
      halve_operation o =
          operation(HALVE_DENSE, HALVE_F32, 1, columns, x, weights[i % 3], y);
      o.size = sizes[i % 3];
      operations.push_back(o);
    }
    for (Bytes& y : together) std::memset(y.data(), 0xff, y.size());
    CHECK(halve_run(operations.data(), 60, 0, threads) == HALVE_OK, "team");
    for (int i = 0; i < 3; ++i) {
      CHECK(std::memcmp(together[i].data(), alone[i].data(), alone[i].size()) == 0,
            "%d threads, product %d", threads, i);
    }
  }
}

void test_bad_operations() {
  Random random;
  const Bytes x = random_numbers(random, HALVE_F32, 8);
  Bytes y(8 * sizeof(float));
  const halve_operation good = operation(HALVE_ADD, HALVE_F32, 2, 4, x, x, y);
  const auto refused = [&](auto spoil) {
    halve_operation bad = good;
    spoil(bad);
    return halve_run(&bad, 1, 0, 1) == HALVE_BAD_ARGUMENT;
  };
  CHECK(halve_run(&good, 1, 0, 1) == HALVE_OK, "good");
  CHECK(halve_run(nullptr, 1, 0, 1) == HALVE_BAD_ARGUMENT, "null");
  CHECK(halve_run(&good, 1, -1, 1) == HALVE_BAD_ARGUMENT, "position");
  CHECK(refused([](auto& o) { o.kind = 9; }), "kind");
  CHECK(refused([](auto& o) { o.dtype = -1; }), "dtype");
  CHECK(refused([](auto& o) { o.rows = -1; }), "rows");
  CHECK(refused([](auto& o) { o.y = nullptr; }), "y");
  CHECK(refused([](auto& o) { o.other = nullptr; }), "other");
}

}  // namespace

int main() {
  test_kernels_agree();
  test_large_scores();
  test_bad_arguments();
  test_operations();
  test_store();
  test_teams();
  test_bad_operations();
  if (failures == 0) std::printf("steps: all tests passed\n");
  return failures != 0;
}
