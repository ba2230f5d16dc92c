/* A CUDA driver without a GPU, of the architecture in FAKE_CUDA_ARCH: it prints each launch as a line of JSON. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int context, module;

int cuCtxGetCurrent(void **out) { *out = getenv("FAKE_CUDA_NO_CONTEXT") ? NULL : &context; return 0; }
int cuCtxGetDevice(int *out) { *out = 0; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
    int arch = atoi(getenv("FAKE_CUDA_ARCH"));
    (void)device;
    *out = attribute == 75 ? arch / 10 : attribute == 76 ? arch % 10 : attribute == 16 ? 132 : -1;
    return 0;
}
int cuModuleLoadData(void **out, void const *code) {
    printf("{\"loaded\": \"%s\"}\n", memcmp(code, "\177ELF", 4) == 0 ? "cubin" : "ptx");
    *out = &module;
    return 0;
}
int cuModuleGetFunction(void **out, void *from, char const *name) {
    *out = from;
    return strcmp(name, "plugin_kernel");
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    (void)function;
    printf("{\"attribute\": [%d, %d]}\n", attribute, value);
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    (void)function;
    (void)extra;
    printf("{\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %ld, \"pointers\": [", gx, gy, gz,
           bx, by, bz, shared, (long)stream);
    for (int i = 0; i < 4; ++i) printf("%ld, ", *(long *)arguments[i]);
    printf("%ld], \"integers\": [", *(long *)arguments[9]);
    for (int i = 4; i < 9; ++i) printf("%d%s", *(int32_t *)arguments[i], i < 8 ? ", " : "], \"hidden\": [");
    printf("%ld, %ld]}\n", *(long *)arguments[10], *(long *)arguments[11]);
    return 0;
}
