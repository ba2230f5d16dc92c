// The threads of the process. PyTorch runs on an OpenMP pool whose idle workers spin for milliseconds; a second pool, or fresh
// threads, would compete with them for the same cores. So the team is taken from the runtime already in the process, by the
// entry that every Linux OpenMP runtime offers (libgomp, libomp, libiomp5), and this library links to none.
#include "threads.h"

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <vector>

namespace vstar {

namespace {

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

void fresh_threads(void (*body)(void*), void* context, int threads) {
  std::vector<std::thread> others;
  try {
    while (int(others.size()) < threads - 1) others.emplace_back(body, context);
  } catch (const std::system_error&) {
    // fewer threads take the same units of work
  }
  body(context);
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel(void (*body)(void*), void* context, int threads) {
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads == 1)
    body(context);
  else if (team)
    team(body, context, unsigned(threads), 0);
  else
    fresh_threads(body, context, threads);
}

}  // namespace vstar
