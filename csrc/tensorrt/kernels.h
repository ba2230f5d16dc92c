// The compiled kernels inside this library; their table is written by `python -m vstar_engine.kernels.tensorrt`.
#pragma once

// the sha256 of the sources of the kernels, by which vstar-engine tells a library of other ones
extern "C" __attribute__((visibility("default"))) char const vstar_sources[];

namespace vstar {

// A kernel for `frames` of one tile (0: it sweeps any number), for one architecture, or as PTX for that one and later ones.
struct Kernel {
    int arch, dtype, head_dim, frames, rows, threads, shared, hidden;
    bool ptx;
    unsigned char const* code;
    char const* entry_point;
};

extern Kernel const kKernels[];
extern int const kKernelCount;
// the sha256 of the compiled kernels and their table
extern char const kKernelHash[];
// positions that a program walks: few where the grid is small
extern int const kRuns[2];

}  // namespace vstar
