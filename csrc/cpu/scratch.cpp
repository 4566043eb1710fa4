// See scratch.h. One block for each thread; no pool, nothing shared.

#include "scratch.h"

#include <cstdlib>

namespace halve {
namespace {

constexpr size_t alignment = 64;

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;

  ~Block() { std::free(memory); }

  void grow(size_t size) {
    std::free(memory);
    memory = std::aligned_alloc(alignment, size);
    bytes = memory ? size : 0;
  }
};

thread_local Block block;

}  // namespace

void* scratch(size_t bytes) {
  const size_t size = (bytes + alignment) / alignment * alignment;
  if (size > block.bytes) block.grow(size);
  return block.memory;
}

}  // namespace halve
