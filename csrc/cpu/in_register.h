// Makes a value opaque to the compiler, which undoes two things that AVX-512's expand
// needs on AMD:
//
// - An expand whose source is memory is microcode; a load and an expand are not, and
//   the compiler joins them. Hence in_register(load).
// - An expand that zeroes what its mask leaves out waits for the last value of its
//   destination all the same (Zen 5). Merging into a register of zeros does not: the
//   product with one vector took half the time, from the cache. Hence
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
