// How work is dealt to threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vstar {

// Runs body(context) on up to `threads` threads, the caller's among them.
void parallel(void (*body)(void*), void* context, int threads);

// As many threads as have `each` work to do, at most `most`.
inline int threads_for(int64_t work, int64_t each, int most) {
  return int(std::clamp<int64_t>(work / each, 1, std::max(1, most)));
}

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

}  // namespace vstar
