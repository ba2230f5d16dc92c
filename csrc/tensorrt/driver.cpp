// Chooses, loads and launches the compiled kernels.
#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

#include "kernels.h"

namespace vstar {
namespace {

template <class F>
bool find(void* library, char const* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
}

struct Device {
    int arch, multiprocessors;
};

bool current(Driver const& driver, void*& context, Device& device) {
    int number = 0, major = 0, minor = 0;
    if (driver.ctx_get_current(&context) || context == nullptr || driver.ctx_get_device(&number)) return false;
    if (driver.device_get_attribute(&major, kMajor, number) || driver.device_get_attribute(&minor, kMinor, number)) return false;
    device.arch = 10 * major + minor;
    return driver.device_get_attribute(&device.multiprocessors, kMultiprocessors, number) == 0;
}

// The smallest tile that holds the frames, else the sweep; compiled code for this architecture before PTX for an older one.
Kernel const* choose(Problem const& problem, int arch) {
    Kernel const* best = nullptr;
    auto size = [](Kernel const& kernel) { return kernel.frames == 0 ? 1 << 30 : kernel.frames; };
    for (int i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (kernel.dtype != problem.dtype || kernel.head_dim != problem.head_dim) continue;
        if (kernel.ptx ? kernel.arch > arch : kernel.arch != arch) continue;
        if (kernel.frames != 0 && problem.frames > kernel.frames) continue;
        if (best == nullptr || (best->ptx && !kernel.ptx) || (best->ptx == kernel.ptx && size(kernel) < size(*best))) best = &kernel;
    }
    return best;
}

void* load(Driver const& driver, void* context, Kernel const& kernel) {
    static std::mutex mutex;
    static std::map<std::pair<void*, Kernel const*>, void*> loaded;
    std::lock_guard<std::mutex> const lock(mutex);
    void*& function = loaded[{context, &kernel}];
    if (function != nullptr) return function;
    void *module = nullptr, *found = nullptr;
    if (driver.module_load_data(&module, kernel.code) || driver.module_get_function(&found, module, kernel.entry_point)) return nullptr;
    if (kernel.shared > 48 * 1024 && driver.func_set_attribute(found, kDynamicSharedBytes, kernel.shared)) return nullptr;
    return function = found;
}

struct Ready {
    Driver const* driver;
    Kernel const* kernel;
    Device device;
    void* function;
};

bool ready(Problem const& problem, Ready& to) {
    void* context = nullptr;
    to.driver = Driver::get();
    if (to.driver == nullptr || !current(*to.driver, context, to.device)) return false;
    to.kernel = choose(problem, to.device.arch);
    if (to.kernel == nullptr) return false;
    to.function = load(*to.driver, context, *to.kernel);
    return to.function != nullptr;
}

std::int64_t ceiling(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Driver const* Driver::get() {
    static Driver driver{};
    static bool const found = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        return library != nullptr && find(library, "cuCtxGetCurrent", driver.ctx_get_current) &&
               find(library, "cuCtxGetDevice", driver.ctx_get_device) &&
               find(library, "cuDeviceGetAttribute", driver.device_get_attribute) &&
               find(library, "cuModuleLoadData", driver.module_load_data) &&
               find(library, "cuModuleGetFunction", driver.module_get_function) &&
               find(library, "cuFuncSetAttribute", driver.func_set_attribute) &&
               find(library, "cuLaunchKernel", driver.launch_kernel);
    }();
    return found ? &driver : nullptr;
}

bool prepare(Problem const& problem) {
    Ready to{};
    return ready(problem, to);
}

bool launch(Problem const& problem, void const* const tensors[5], void* stream) {
    Ready to{};
    if (!ready(problem, to)) return false;
    auto const& [batch, frames, positions, heads, head_dim, g_rows, dtype] = problem;
    Kernel const& kernel = *to.kernel;
    std::int64_t programs = batch * heads, run = 1;
    if (kernel.frames == 0) {
        programs *= positions * ceiling(frames, kernel.rows);
    } else {
        // long runs of positions where they fill the device twice over: RESIDENT_WARPS of temporal_attention_launch.py
        std::int64_t const resident = 16 * 32 / kernel.threads > 1 ? 16 * 32 / kernel.threads : 1;
        std::int64_t const wanted = 2 * to.device.multiprocessors * resident;
        run = programs * ceiling(positions, kRuns[1]) >= wanted ? kRuns[1] : kRuns[0];
        programs *= ceiling(positions, run);
    }
    if (programs > 0x7fffffff) return false;
    void *q = const_cast<void*>(tensors[0]), *k = const_cast<void*>(tensors[1]), *v = const_cast<void*>(tensors[2]);
    void *g = const_cast<void*>(tensors[3]), *out = const_cast<void*>(tensors[4]), *null = nullptr;
    std::int32_t integers[] = {
        static_cast<std::int32_t>(frames), static_cast<std::int32_t>(positions), static_cast<std::int32_t>(heads),
        static_cast<std::int32_t>(run), static_cast<std::int32_t>(g_rows > 1 ? frames : 0)};
    // the compiler's own parameters, of which a kernel has at most two, point to memory that it does not use
    if (kernel.hidden > 2) return false;
    void* arguments[] = {&q, &k, &v, &g, integers, integers + 1, integers + 2, integers + 3, integers + 4, &out, &null, &null};
    return to.driver->launch_kernel(
               to.function, static_cast<unsigned>(programs), 1, 1, static_cast<unsigned>(kernel.threads), 1, 1,
               static_cast<unsigned>(kernel.shared), stream, arguments, nullptr) == 0;
}

}  // namespace vstar
