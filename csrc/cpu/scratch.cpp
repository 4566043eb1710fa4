// See scratch.h. A plain block per thread; no pool, no sharing.

#include "scratch.h"

#include <cstdlib>

namespace halve {
namespace {

constexpr size_t alignment = 64;

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;

  ~Block() { std::free(memory); }

  void grow(size_t wanted) {
    std::free(memory);
    memory = std::aligned_alloc(alignment, wanted);
    bytes = memory ? wanted : 0;
  }
};

thread_local Block block;

}  // namespace

void* scratch(size_t bytes) {
  const size_t wanted = (bytes + alignment) / alignment * alignment;
  if (wanted > block.bytes) block.grow(wanted);
  return block.memory;
}

}  // namespace halve
