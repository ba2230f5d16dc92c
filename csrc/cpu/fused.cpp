// The C entry points of the fused ops: checks, and rows dealt to threads.
#include "fused.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace vstar {
namespace {

// Below this, waking a thread costs more than it saves; measured for attention, at about the same bytes a microsecond.
constexpr int64_t kElementsPerThread = 128 * 1024;
// Four turns a thread even out a busy core.
constexpr int64_t kTurns = 4;

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// The same for products of a linear layer: about 80 microseconds of them.
constexpr int64_t kProductsPerThread = 2 * 1024 * 1024;

int threads_for(int64_t work, int64_t each, int most) { return int(std::clamp<int64_t>(work / each, 1, std::max(1, most))); }

// Calls work(unit) for every unit once.
template <class Function>
void deal(int64_t units, int threads, const Function& work) {
  struct Turn {
    const Function& work;
    int64_t units;
    std::atomic<int64_t> next{0};
  } turn{work, units};
  parallel(
      [](void* context) {
        Turn& turn = *static_cast<Turn*>(context);
        for (int64_t unit; (unit = turn.next.fetch_add(1)) < turn.units;) turn.work(unit);
      },
      &turn, threads);
}

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

bool fits(const vstar_linear_arguments& a) {
  return a.weight && a.rows > 0 && a.in > 0 && a.out_features > 0 && (!a.gate || a.out_features % 2 == 0) &&
         !a.norm_gain == !a.norm_shift;
}

bool valid(const vstar_linear_arguments& a) { return a.x && a.out && fits(a); }

// Floats of the rows that are multiplied by one panel after another while they lie in the second-level cache.
constexpr int64_t kBlockFloats = 48 * 1024;

int64_t width_of(const vstar_linear_arguments& a) { return a.gate ? a.out_features / 2 : a.out_features; }

// A linear layer whose weights are packed.
class Layer {
 public:
  Layer(const vstar_linear_arguments& a, const Isa& isa, int threads) : a_(a), isa_(isa) {
    const int64_t columns = isa.panel(a), panels = (width_of(a) + columns - 1) / columns * (a.gate ? 2 : 1);
    packed_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(panels * columns * a.in) * sizeof(float))));
    if (!packed_) throw std::bad_alloc();
    deal(panels, threads, [&](int64_t panel) { isa.pack(a, panel, packed_.get()); });
  }

  void operator()(const float* x, const float* residual, float* out, int64_t rows) const {
    vstar_linear_arguments here = a_;
    here.x = x, here.residual = residual, here.out = out, here.rows = rows;
    if (a_.norm_gain) {
      thread_local std::vector<float> normed;  // lies in the cache between a norm and its product
      normed.resize(size_t(rows * a_.in));
      isa_.norm_rows(here, normed.data());
      here.x = normed.data();
    }
    isa_.linear(here, packed_.get());
  }

 private:
  vstar_linear_arguments a_;
  const Isa& isa_;
  std::unique_ptr<float, Free> packed_;
};

// Calls work(first row, rows) for blocks of rows that hold at most so many floats each.
template <class Function>
void deal_rows(int64_t rows, int64_t floats, int threads, const Function& work) {
  const int64_t most = std::max<int64_t>(24, kBlockFloats / floats);
  const int64_t blocks = std::max<int64_t>(threads, (rows + most - 1) / most);
  deal(blocks, threads, [&](int64_t block) {
    const int64_t begin = rows * block / blocks;
    work(begin, rows * (block + 1) / blocks - begin);
  });
}

void run(const vstar_linear_arguments& a, const Isa& isa) {
  const int threads = threads_for(a.rows * a.out_features * a.in, kProductsPerThread, a.threads);
  const Layer layer(a, isa, threads);
  const int64_t width = width_of(a);
  deal_rows(a.rows, a.in, threads, [&](int64_t row, int64_t rows) {
    layer(a.x + row * a.in, a.residual ? a.residual + row * width : nullptr, a.out + row * width, rows);
  });
}

bool valid(const vstar_linear_pair_arguments& a) {
  return a.first.x && fits(a.first) && a.second.out && fits(a.second) && a.first.rows == a.second.rows &&
         width_of(a.first) == a.second.in;
}

void run(const vstar_linear_pair_arguments& a, const Isa& isa) {
  const vstar_linear_arguments &one = a.first, &two = a.second;
  const int64_t products = one.rows * (one.out_features * one.in + two.out_features * two.in), width = width_of(two);
  const int threads = threads_for(products, kProductsPerThread, one.threads);
  const Layer first(one, isa, threads), second(two, isa, threads);
  deal_rows(one.rows, one.in + two.in, threads, [&](int64_t row, int64_t rows) {
    thread_local std::vector<float> between;
    between.resize(size_t(rows * two.in));
    first(one.x + row * one.in, nullptr, between.data(), rows);
    second(between.data(), two.residual ? two.residual + row * width : nullptr, two.out + row * width, rows);
  });
}

int isa_of(const vstar_linear_pair_arguments& a) { return a.first.isa; }
template <class Arguments>
int isa_of(const Arguments& a) { return a.isa; }

// What every entry point does around its work: work(arguments, instruction set).
template <class Arguments, class Work>
int enter(const Arguments* arguments, const Work& work) {
  if (!arguments || !valid(*arguments)) return VSTAR_BAD_ARGUMENT;
  const Isa* found = isa(isa_of(*arguments));
  if (!found) return VSTAR_NO_SUCH_ISA;
  try {
    work(*arguments, *found);
  } catch (const std::bad_alloc&) {
    return VSTAR_NO_MEMORY;
  }
  return VSTAR_OK;
}

}  // namespace
}  // namespace vstar

extern "C" int vstar_linear(const vstar_linear_arguments* arguments) {
  return vstar::enter(arguments, [](const auto& a, const auto& isa) { vstar::run(a, isa); });
}

extern "C" int vstar_linear_pair(const vstar_linear_pair_arguments* arguments) {
  return vstar::enter(arguments, [](const auto& a, const auto& isa) { vstar::run(a, isa); });
}

extern "C" int vstar_geglu(const vstar_geglu_arguments* arguments) {
  return vstar::enter(arguments, [](const auto& a, const auto& isa) { vstar::run(a, isa.geglu); });
}

extern "C" int vstar_groupnorm_silu(const vstar_groupnorm_silu_arguments* arguments) {
  return vstar::enter(arguments, [](const auto& a, const auto& isa) { vstar::run(a, isa); });
}
