// What the ops' C interfaces share, and the padding that entry points and kernels agree on.
#pragma once
#include <cstdint>

#define VSTAR_EXPORT __attribute__((visibility("default")))

extern "C" {

enum vstar_dtype { VSTAR_FLOAT32 = 0, VSTAR_BFLOAT16 = 1, VSTAR_FLOAT16 = 2 };
enum vstar_status { VSTAR_OK = 0, VSTAR_BAD_ARGUMENT = 1, VSTAR_NO_MEMORY = 2, VSTAR_NO_SUCH_ISA = 3 };
}

namespace vstar {

constexpr int64_t kMaxLanes = 16;
inline constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace vstar
