// Lists the kernels, finds those that this CPU can run, and selects one. Contains no
// code of a particular instruction set, since it must run on any CPU.

#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>

namespace halve {
namespace {

struct Tier {
  const char* name;
  bool (*usable)();
  const Kernel* kernels[dtype_count];
  const QuantizedKernel* quantized;
  const StepKernel* step;
};

bool always() { return true; }

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

bool has_avx512f() {
  return has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() {
  return has_avx512f() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

#endif

// Best first. Kernels are in the order of the dtypes: f32, f16, bf16.
const Tier tiers[] = {
#if defined(__x86_64__)
    {"avx512bf16",
     has_avx512bf16,
     {&avx512f_kernels[0], &avx512f_kernels[1], &avx512bf16_bf16_kernel},
     &avx512bf16_quantized_kernel,
     avx512f_step},
    {"avx512f",
     has_avx512f,
     {&avx512f_kernels[0], &avx512f_kernels[1], &avx512f_kernels[2]},
     // Without VNNI and VBMI, 512-bit registers have no byte products and shuffles.
     &avx2_quantized_kernel,
     avx512f_step},
    {"avx2",
     has_avx2,
     {&avx2_kernels[0], &avx2_kernels[1], &avx2_kernels[2]},
     &avx2_quantized_kernel,
     avx2_step},
#elif defined(__aarch64__)
    // Every 64-bit ARM has NEON.
    {"neon",
     always,
     {&neon_kernels[0], &neon_kernels[1], &neon_kernels[2]},
     &neon_quantized_kernel,
     neon_step},
#endif
    {"reference",
     always,
     {&reference_kernels[0], &reference_kernels[1], &reference_kernels[2]},
     &reference_quantized_kernel,
     reference_step},
};

const Tier* best() {
  const Tier* tier = tiers;
  while (!tier->usable()) ++tier;  // the last one is always usable
  return tier;
}

std::atomic<const Tier*>& selected() {
  static std::atomic<const Tier*> tier{best()};
  return tier;
}

std::string usable_names() {
  std::string names;
  for (const Tier& tier : tiers) {
    if (!tier.usable()) continue;
    if (!names.empty()) names += ',';
    names += tier.name;
  }
  return names;
}

const Tier* find(const char* name) {
  for (const Tier& tier : tiers) {
    if (std::strcmp(tier.name, name) == 0) return &tier;
  }
  return nullptr;
}

}  // namespace

const Kernel& selected_kernel(int32_t dtype) {
  return *selected().load()->kernels[dtype];
}

const QuantizedKernel& selected_quantized_kernel() {
  return *selected().load()->quantized;
}

const StepKernel& selected_step_kernel(int32_t dtype) {
  return selected().load()->step[dtype];
}

}  // namespace halve

int32_t halve_abi(void) { return HALVE_ABI; }

int32_t halve_select(const char* name) {
  const bool any = name == nullptr || *name == '\0';
  const halve::Tier* tier = any ? halve::best() : halve::find(name);
  if (tier == nullptr) return HALVE_NO_SUCH_KERNEL;
  if (!tier->usable()) return HALVE_UNSUPPORTED;
  halve::selected().store(tier);
  return HALVE_OK;
}

const char* halve_selected(void) { return halve::selected().load()->name; }

const char* halve_available(void) {
  try {
    static const std::string names = halve::usable_names();
    return names.c_str();
  } catch (...) {  // std::bad_alloc; an exception must not cross the C interface
    return "reference";
  }
}
