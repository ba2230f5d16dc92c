// The entry points of GEGLU and of group norm with SiLU: checks, and rows dealt to threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace vstar {
namespace {

// Below this, waking a thread costs more than it saves; measured for attention, at about the same bytes a microsecond.
constexpr int64_t kElementsPerThread = 128 * 1024;
// Four turns a thread even out a busy core.
constexpr int64_t kTurns = 4;

bool valid(const vstar_geglu_arguments& a) {
  return a.x && a.out && a.rows > 0 && a.inner > 0 && a.dtype >= VSTAR_FLOAT32 && a.dtype <= VSTAR_FLOAT16;
}

bool valid(const vstar_groupnorm_silu_arguments& a) {
  return a.x && a.weight && a.bias && a.out && a.items > 0 && a.rows > 0 && a.channels > 0 && a.groups > 0 &&
         a.channels % a.groups == 0 && a.dtype >= VSTAR_FLOAT32 && a.dtype <= VSTAR_FLOAT16;
}

void run(const vstar_geglu_arguments& a, Geglu kernel) {
  const int threads = threads_for(a.rows * a.inner, kElementsPerThread, a.threads);
  const int64_t blocks = std::min<int64_t>(a.rows, threads == 1 ? 1 : kTurns * threads);
  deal(blocks, threads, [&](int64_t block) { kernel(a, a.rows * block / blocks, a.rows * (block + 1) / blocks); });
}

// Joins the moments of blocks of rows into gain and shift for each channel of an item.
void settle(const vstar_groupnorm_silu_arguments& a, const Moments* blocks, int64_t count, float* gain, float* shift) {
  const int64_t size = a.channels / a.groups;
  for (int64_t g = 0; g < a.groups; g++) {
    double mean = 0, squares = 0, seen = 0;
    for (int64_t block = 0; block < count; block++) {
      const Moments& here = blocks[block * a.groups + g];
      const double rows = double(a.rows * (block + 1) / count - a.rows * block / count), off = here.mean - mean;
      squares += here.squares + off * off * double(size) * seen * rows / (seen + rows);
      mean += off * rows / (seen + rows);
      seen += rows;
    }
    const double scale = 1.0 / std::sqrt(squares / (double(a.rows) * double(size)) + a.eps);
    for (int64_t c = g * size; c < (g + 1) * size; c++) {
      gain[c] = float(scale * a.weight[c]);
      shift[c] = float(a.bias[c] - mean * scale * a.weight[c]);
    }
  }
}

void run(const vstar_groupnorm_silu_arguments& a, const Isa& isa) {
  const int threads = threads_for(a.items * a.rows * a.channels, kElementsPerThread, a.threads);
  const int64_t wanted = threads == 1 ? 1 : (kTurns * threads + a.items - 1) / a.items;
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, a.rows), width = round_up(a.channels, kMaxLanes);
  const auto begin = [&](int64_t block) { return a.rows * block / blocks; };
  if (blocks == 1) {
    // an item that one thread reads twice may still lie in its cache the second time
    deal(a.items, threads, [&](int64_t item) {
      std::vector<Moments> moments(size_t(a.groups));
      std::vector<float> scratch(size_t(4 * width));
      isa.measure(a, item, 0, a.rows, scratch.data(), moments.data());
      settle(a, moments.data(), 1, scratch.data(), scratch.data() + width);
      isa.normalise(a, item, 0, a.rows, scratch.data(), scratch.data() + width);
    });
    return;
  }
  std::vector<Moments> moments(size_t(a.items * blocks * a.groups));
  deal(a.items * blocks, threads, [&](int64_t unit) {
    std::vector<float> scratch(size_t(4 * width));
    const int64_t item = unit / blocks, block = unit % blocks;
    isa.measure(a, item, begin(block), begin(block + 1), scratch.data(), moments.data() + unit * a.groups);
  });
  std::vector<float> settled(size_t(a.items * 2 * width));
  for (int64_t item = 0; item < a.items; item++) {
    float* gain = settled.data() + item * 2 * width;
    settle(a, moments.data() + item * blocks * a.groups, blocks, gain, gain + width);
  }
  deal(a.items * blocks, threads, [&](int64_t unit) {
    const int64_t item = unit / blocks, block = unit % blocks;
    const float* gain = settled.data() + item * 2 * width;
    isa.normalise(a, item, begin(block), begin(block + 1), gain, gain + width);
  });
}

}  // namespace
}  // namespace vstar

extern "C" int vstar_geglu(const vstar_geglu_arguments* a) {
  return vstar::enter(a && vstar::valid(*a), a ? a->isa : 0, [&](const vstar::Isa& isa) { vstar::run(*a, isa.geglu); });
}

extern "C" int vstar_groupnorm_silu(const vstar_groupnorm_silu_arguments* a) {
  return vstar::enter(a && vstar::valid(*a), a ? a->isa : 0, [&](const vstar::Isa& isa) { vstar::run(*a, isa); });
}
