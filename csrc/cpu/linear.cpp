// The entry points of linear layers: checks, packed weights, and blocks of rows dealt to threads.
#include <algorithm>
#include <new>
#include <vector>

#include "aligned_floats.h"
#include "isa.h"
#include "threads.h"

namespace vstar {
namespace {

// Below this, waking a thread costs more than it saves: about 80 microseconds of products.
constexpr int64_t kProductsPerThread = 2 * 1024 * 1024;

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
    packed_ = aligned_floats(panels * columns * a.in);
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
  AlignedFloats packed_;
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

}  // namespace
}  // namespace vstar

extern "C" int vstar_linear(const vstar_linear_arguments* a) {
  return vstar::enter(a && vstar::valid(*a), a ? a->isa : 0, [&](const vstar::Isa& isa) { vstar::run(*a, isa); });
}

extern "C" int vstar_linear_pair(const vstar_linear_pair_arguments* a) {
  return vstar::enter(a && vstar::valid(*a), a ? a->first.isa : 0, [&](const vstar::Isa& isa) { vstar::run(*a, isa); });
}
