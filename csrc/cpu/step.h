// The kernel of a decode step for the lanes of an instruction set.

#ifndef HALVE_STEP_H
#define HALVE_STEP_H

#include "attention.h"
#include "elementwise.h"

namespace {

template <class L>
constexpr halve::StepKernel step_of = {attend<L>, norm<L>, rotate<L>, gate<L>, add<L>};

}  // namespace

#endif
