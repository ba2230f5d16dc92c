// The few calls of the CUDA driver that launch a compiled kernel, found at run time: the plugin links no CUDA library.
#pragma once

#include <cstdint>

namespace vstar {

struct Driver {
    using Handle = void*;
    int (*ctx_get_current)(Handle*);
    int (*ctx_get_device)(int*);
    int (*device_get_attribute)(int*, int, int);
    int (*module_load_data)(Handle*, void const*);
    int (*module_get_function)(Handle*, Handle, char const*);
    int (*func_set_attribute)(Handle, int, int);
    int (*launch_kernel)(
        Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, void**);

    // Gives the driver, or null on a machine without one.
    static Driver const* get();
};

// The driver's numbers: CUdevice_attribute and CUfunction_attribute.
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kDynamicSharedBytes = 8;

// A problem as a launch has it; q, k, v and out are (batch, frames, positions, heads, head_dim), g is (1 or batch, frames).
struct Problem {
    std::int64_t batch, frames, positions, heads, head_dim, g_rows;
    int dtype;
};

// Prepares the kernel for a problem on the current device: false where none serves it. Loads code, so it comes before a capture.
bool prepare(Problem const&);

// Launches on a stream; false where it cannot. `tensors` are q, k, v, g, out.
bool launch(Problem const&, void const* const tensors[5], void* stream);

}  // namespace vstar
