// The entry point of temporal attention: checks, lays out the bias and deals units of work to threads.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "aligned_floats.h"
#include "isa.h"
#include "threads.h"

namespace vstar {

namespace {

bool valid(const vstar_attention& a) {
  return a.q && a.k && a.v && a.out && a.bias && a.batch > 0 && a.frames > 0 && a.keys > 0 && a.positions > 0 && a.heads > 0 &&
         a.head_dim > 0 && (a.bias_batch == 1 || a.bias_batch == a.batch) && a.dtype >= VSTAR_FLOAT32 &&
         a.dtype <= VSTAR_FLOAT16;
}

// One Bias per bias batch. The Toeplitz form is one row of g mirrored about distance 0; the dense form is G transposed.
struct BiasTables {
  std::vector<float> values;
  std::vector<Bias> biases;

  explicit BiasTables(const vstar_attention& a) {
    const int64_t rows = round_up(a.frames, kMaxLanes), keys = a.dense ? a.keys : std::min(a.frames, a.keys);
    const int64_t size = a.dense ? keys * rows : keys + rows, given = a.dense ? a.frames * a.keys : a.frames;
    values.assign(size_t(a.bias_batch * size), 0.0f);
    for (int64_t b = 0; b < a.bias_batch; b++) {
      const float* source = a.bias + b * given;
      float* table = values.data() + b * size;
      const bool plain = std::all_of(source, source + given, [](float x) { return x == 0.0f; });
      if (a.dense) {
        for (int64_t i = 0; i < a.frames; i++)
          for (int64_t j = 0; j < keys; j++) table[j * rows + i] = source[i * a.keys + j];
      } else {
        table += keys;
        for (int64_t distance = -keys + 1; distance < a.frames; distance++) table[distance] = source[std::abs(distance)];
      }
      biases.push_back({plain ? nullptr : table, a.dense ? rows : -1, keys});
    }
  }
};

// As many heads are staged together as fill half of a common second-level cache: the rows of several heads are one stretch
// of memory. With 128 KiB instead T = 64 takes 9 % longer, T = 128 15 %.
constexpr int64_t kStageBytes = 512 * 1024;

struct ScratchPlan {
  int64_t width, heads, row_width, rows, scores;

  explicit ScratchPlan(const vstar_attention& a)
      : width(round_up(a.head_dim, kMaxLanes)), rows(a.frames + 2 * a.keys), scores(a.keys * kMaxPanel) {
    heads = std::clamp<int64_t>(kStageBytes / (rows * width * int64_t(sizeof(float))), 1, a.heads);
    // an odd number of cache lines spreads the rows over the cache's sets
    row_width = heads * width / kMaxLanes % 2 ? heads * width : heads * width + kMaxLanes;
  }

  int64_t floats() const { return rows * row_width + width * kMaxPanel + scores; }

  Scratch at(float* p) const {
    float* q_panel = p + rows * row_width;
    return {p, q_panel, q_panel + width * kMaxPanel, row_width, heads};
  }
};

struct Work {
  const vstar_attention& a;
  const Bias* biases;
  Attend attend;
  int64_t units, chunk;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void run() {
    const ScratchPlan plan(a);
    const AlignedFloats memory = aligned_floats(plan.floats());
    if (!memory) return out_of_memory.store(true);
    const Scratch scratch = plan.at(memory.get());
    for (int64_t begin; (begin = next.fetch_add(chunk)) < units;)
      attend(a, biases, begin, std::min(begin + chunk, units), scratch);
  }
};

// A large output comes fresh from the kernel, and mapping it 4 KiB at a time can take longer than the attention itself: at
// T = 16, 2560 positions, one core of a virtual machine, 47 ms in all, with 2 MiB pages 25 ms. A hint: refusal changes nothing.
void ask_for_huge_pages(const vstar_attention& a, int64_t element_size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const int64_t last[4] = {a.batch - 1, a.frames - 1, a.positions - 1, a.heads - 1};
  int64_t span = a.head_dim;
  for (int i = 0; i < 4; i++) span += last[i] * a.out_stride[i];
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(a.out) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(a.out) + uintptr_t(span * element_size)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)a, (void)element_size;
#endif
}

// Below about 50 microseconds of work for each thread, waking one costs more than it saves: 8 us when it spins, milliseconds
// when another process holds its core.
constexpr double kFlopsPerThread = 4e6;

void run(const vstar_attention& a, Attend attend) {
  const BiasTables tables(a);
  ask_for_huge_pages(a, a.dtype == VSTAR_FLOAT32 ? 4 : 2);
  const int64_t units = a.batch * a.positions * a.heads;
  const double frames = double(a.frames), keys = double(a.keys);
  // moving an element costs about sixteen multiplications
  const double flops = double(units) * double(a.head_dim) * (4 * frames * keys + 32 * (frames + keys));
  const int threads = int(std::max(1.0, std::min({double(a.threads), double(units), flops / kFlopsPerThread})));
  // sixteen turns a thread even out a busy core; whole positions, because the heads of one lie together in memory
  int64_t chunk = threads == 1 ? units : std::max<int64_t>(1, units / (16 * threads));
  if (chunk > a.heads) chunk = round_up(chunk, a.heads);
  Work work{a, tables.biases.data(), attend, units, chunk};
  parallel([](void* context) { static_cast<Work*>(context)->run(); }, &work, threads);
  if (work.next < units || work.out_of_memory) throw std::bad_alloc();
}

}  // namespace
}  // namespace vstar

extern "C" int vstar_temporal_attention(const vstar_attention* a) {
  return vstar::enter(a && vstar::valid(*a), a ? a->isa : 0, [&](const vstar::Isa& isa) { vstar::run(*a, isa.attend); });
}
