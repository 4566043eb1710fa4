// Makes a value opaque to the compiler. Otherwise its optimizations undo two things
// that make AVX-512's expand fast on AMD:
//
// - An expand from memory is microcoded; a load and an expand from a register are not,
//   but the compiler fuses them. Hence in_register(load).
// - A zero-masking expand still waits for the previous value of its destination
//   (Zen 5). A merge-masking expand into a register of zeros does not: with the weights
//   in the cache, the product with one vector took half the time. Hence
//   in_register(zeros).

#ifndef HALVE_IN_REGISTER_H
#define HALVE_IN_REGISTER_H

namespace {

template <class Vector>
inline Vector in_register(Vector v) {
  __asm__("" : "+v"(v));
  return v;
}

}  // namespace

#endif
