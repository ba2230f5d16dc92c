// Which instruction sets this machine runs.
#include "isa.h"

#include <cstddef>
#include <vector>

namespace vstar {

#define DECLARE(set)                                                                                              \
  void attend_##set(const vstar_attention&, const Bias*, int64_t, int64_t, Scratch);                              \
  void geglu_##set(const vstar_geglu_arguments&, int64_t, int64_t);                                               \
  void measure_##set(const vstar_groupnorm_silu_arguments&, int64_t, int64_t, int64_t, float*, Moments*);         \
  void normalise_##set(const vstar_groupnorm_silu_arguments&, int64_t, int64_t, int64_t, const float*, const float*); \
  void pack_##set(const vstar_linear_arguments&, int64_t, float*);                                                \
  void norm_rows_##set(const vstar_linear_arguments&, float*);                                                    \
  void linear_##set(const vstar_linear_arguments&, const float*);                                                 \
  int64_t panel_##set(const vstar_linear_arguments&);
#define KERNELS(set)                                                                                             \
  {#set, attend_##set, geglu_##set, measure_##set, normalise_##set, pack_##set, norm_rows_##set, linear_##set, panel_##set}

DECLARE(baseline)
DECLARE(avx2)
DECLARE(avx512)

const Isa* isa(int number) {
  static const std::vector<Isa> supported = [] {
    std::vector<Isa> found = {KERNELS(baseline)};
#ifdef VSTAR_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(KERNELS(avx2));
    if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(KERNELS(avx512));
#endif
    return found;
  }();
  if (number < 0) return &supported.back();
  return number < int(supported.size()) ? &supported[std::size_t(number)] : nullptr;
}

}  // namespace vstar

extern "C" int64_t vstar_size_of(int arguments) {
  const int64_t sizes[] = {sizeof(vstar_attention), sizeof(vstar_geglu_arguments), sizeof(vstar_groupnorm_silu_arguments),
                           sizeof(vstar_linear_arguments), sizeof(vstar_linear_pair_arguments)};
  return arguments >= 0 && arguments < 5 ? sizes[arguments] : 0;
}

extern "C" const char* vstar_isa_name(int number) {
  const vstar::Isa* found = number < 0 ? nullptr : vstar::isa(number);
  return found ? found->name : nullptr;
}
