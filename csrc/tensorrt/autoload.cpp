// Registers the plugin of the library beside this one when this one is loaded, for programs that only dlopen: Triton's
// `plugins=`, trtexec --staticPlugins. The TensorRT that is in the process already is the one that is meant. Not to be used beside loadLibrary.
#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>
#include <dlfcn.h>

#include <cstdio>
#include <initializer_list>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count);

namespace {

bool register_all() {
    for (char const* name : {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"}) {
        void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr) continue;
        using Get = nvinfer1::IPluginRegistry* (*)();
        auto const get = reinterpret_cast<Get>(dlsym(library, "getPluginRegistry"));
        nvinfer1::IPluginRegistry* registry = get == nullptr ? nullptr : get();
        std::int32_t count = 0;
        auto* const creators = getCreators(count);
        return registry != nullptr && registry->registerCreator(*creators[0], "vstar");
    }
    return false;
}

[[maybe_unused]] bool const registered = [] {
    bool const done = register_all();
    if (!done) std::fputs("vstar: no TensorRT is loaded in this process, or it has the plugin already\n", stderr);
    return done;
}();

}  // namespace
