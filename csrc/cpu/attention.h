// Attention of one new token, as a template over the lanes of an instruction set; those
// whose Elements are float32 (see generic.h). Such a lane type also provides
//   broadcast(float)   a Vector of equal numbers
//
// A sequence's keys and values are read once each, from the first position to the last,
// at the speed of the memory: this is what it takes beside reading the weights.

#ifndef HALVE_ATTENTION_H
#define HALVE_ATTENTION_H

#include "elementwise.h"
#include "generic.h"

namespace {

// Scores are padded to a multiple of this number, so that loops over them are vectors.
constexpr int64_t score_step = 16;

inline int64_t padded_to(int64_t step, int64_t size) {
  return (size + step - 1) / step * step;
}

// Turns scores, padded with very small ones, into weights whose sum is returned.
inline float exponentiate(float* scores, int64_t padded) {
  float tops[score_step], sums[score_step] = {};
  std::memcpy(tops, scores, sizeof(tops));
  for (int64_t t = score_step; t < padded; t += score_step) {
    for (int64_t i = 0; i < score_step; ++i) {
      tops[i] = scores[t + i] > tops[i] ? scores[t + i] : tops[i];
    }
  }
  float top = tops[0], sum = 0;
  for (const float other : tops) top = other > top ? other : top;
  for (int64_t t = 0; t < padded; t += score_step) {
    for (int64_t i = 0; i < score_step; ++i) {
      scores[t + i] = exp_of(scores[t + i] - top);
      sums[i] += scores[t + i];
    }
  }
  for (const float part : sums) sum += part;
  return sum;
}

// `whole`: whether the width is a multiple of the width of a Vector, as nearly always.
template <class L, bool whole>
class Attention {
 public:
  using Stored = typename L::Stored;

  Attention(const halve_attention& a, void* workspace)
      : a_(a),
        padded_(padded_to(score_step, a.length)),
        query_(static_cast<float*>(workspace)),
        scores_(query_ + padded_to(word_columns, a.width)) {}

  // `next`: the head after this one, or this one.
  void head(int64_t index, int64_t next, void* out) {
    const Stored* values = of_head(a_.values, a_.value_strides, index);
    load_query(static_cast<const Stored*>(a_.query) + index * a_.width);
    score(of_head(a_.keys, a_.key_strides, index), values);
    const float sum = exponentiate(scores_, padded_);
    average(values, of_head(a_.keys, a_.key_strides, next), 1.0f / sum,
            static_cast<Stored*>(out) + index * a_.width);
  }

 private:
  const Stored* of_head(const void* from, const int64_t* strides, int64_t index) const {
    const int64_t head = index % a_.heads / (a_.heads / a_.key_heads);
    return static_cast<const Stored*>(from) + index / a_.heads * strides[0] +
           head * strides[1];
  }

  // The rows of a head are too few for the hardware's prefetcher, which starts anew on
  // every page: without this, attention takes a third longer.
  void prefetch_row(const Stored* row) const {
    for (int64_t i = 0; i < a_.width; i += line / int64_t{sizeof(Stored)}) {
      prefetch(row + i, 0);
    }
  }

  typename L::Vector load(const Stored* row, int64_t first) const {
    if constexpr (whole) return L::widen(row + first);
    return load_columns<L>(row, a_.width, first);
  }

  void load_query(const Stored* query) {
    for (int64_t i = 0; i < a_.width; i += L::width) {
      L::store(query_ + i, load(query, i));
    }
  }

  template <int64_t height>
  void score_rows(const Stored* keys, typename L::Sum* sums) {
    for (int64_t r = 0; r < height; ++r) sums[r] = L::zero();
    for (int64_t i = 0; i < a_.width; i += L::width) {
      const auto part = L::load(query_ + i);
      HALVE_UNROLL
      for (int64_t r = 0; r < height; ++r) {
        sums[r] = L::dot(sums[r], load(keys + r * a_.key_strides[2], i), part);
      }
    }
  }

  // Prefetches the values meanwhile.
  void score(const Stored* keys, const Stored* values) {
    typename L::Sum sums[tile_rows];
    int64_t t = 0;
    for (; t + tile_rows <= a_.length; t += tile_rows) {
      for (int64_t r = t; r < t + tile_rows; ++r) {
        prefetch_row(values + r * a_.value_strides[2]);
      }
      score_rows<tile_rows>(keys + t * a_.key_strides[2], sums);
      L::totals(sums, scores_ + t);
    }
    for (; t < a_.length; ++t) {
      score_rows<1>(keys + t * a_.key_strides[2], sums);
      scores_[t] = L::total(sums[0]);
    }
    for (int64_t i = 0; i < a_.length; ++i) scores_[i] *= a_.scale;
    for (; t < padded_; ++t) scores_[t] = -1e30f;
  }

  // Writes `count` vectors of columns, whose sums stay in registers.
  template <int64_t count>
  void average_columns(const Stored* values, const Stored* next_keys, int64_t first,
                       float factor, Stored* out) {
    typename L::Sum sums[count];
    for (auto& sum : sums) sum = L::zero();
    for (int64_t t = 0; t < a_.length; ++t) {
      const Stored* value = values + t * a_.value_strides[2];
      const auto weight = L::broadcast(scores_[t]);
      if (first == 0) prefetch_row(next_keys + t * a_.key_strides[2]);
      HALVE_UNROLL
      for (int64_t i = 0; i < count; ++i) {
        sums[i] = L::dot(sums[i], load(value, first + i * L::width), weight);
      }
    }
    alignas(64) float sum[count * L::width];
    for (int64_t i = 0; i < count; ++i) L::store(sum + i * L::width, sums[i]);
    const int64_t last = smaller(first + count * L::width, a_.width);
    for (int64_t i = first; i < last; ++i) {
      out[i] = L::from_float(sum[i - first] * factor);
    }
  }

  // Prefetches the keys of the next head meanwhile.
  void average(const Stored* values, const Stored* next_keys, float factor,
               Stored* out) {
    constexpr int64_t most = 8;
    const int64_t all = padded_to(L::width, a_.width) / L::width;
    for (int64_t i = 0; i < all; i += most) {
      with_count<most>(smaller(all - i, most), [&](auto count) {
        average_columns<decltype(count)::value>(values, next_keys, i * L::width,
                                                factor, out);
      });
    }
  }

  const halve_attention& a_;
  int64_t padded_;
  float* query_;   // padded with zeros
  float* scores_;  // padded
};

template <class L>
void attend(const halve_attention& a, void* out, Range heads, void* workspace) {
  const auto attend_all = [&](auto attention) {
    for (int64_t i = heads.first; i < heads.last; ++i) {
      attention.head(i, smaller(i + 1, heads.last - 1), out);
    }
  };
  if (a.width % L::width == 0) {
    attend_all(Attention<L, true>(a, workspace));
  } else {
    attend_all(Attention<L, false>(a, workspace));
  }
}

}  // namespace

#endif
