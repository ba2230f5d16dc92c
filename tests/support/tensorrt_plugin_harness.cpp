// Does to the plugin what TensorRT does: from the library's creators to a launch. Arguments: library, then problems
// "dtype batch frames positions heads head_dim g_rows". Prints a line of JSON for each step.
#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>
#include <dlfcn.h>

#include <cstdio>
#include <sstream>

using namespace nvinfer1;

int main(int count, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t creators = 0;
    auto* creator = static_cast<IPluginCreatorV3One*>(get(creators)[0]);
    PluginFieldCollection none{0, nullptr};
    std::printf("{\"creators\": %d, \"name\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", \"fields\": %d}\n", creators,
        creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace(), creator->getFieldNames()->nbFields);
    IPluginV3* plugin = creator->createPlugin("x", &none, TensorRTPhase::kBUILD);
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::printf("{\"timing\": \"%s\", \"outputs\": %d}\n", build->getTimingCacheID(), build->getNbOutputs());
    for (int i = 2; i < count; ++i) {
        std::istringstream words(arguments[i]);
        int dtype = 0;
        int64_t b = 0, t = 0, p = 0, h = 0, d = 0, g = 0;
        words >> dtype >> b >> t >> p >> h >> d >> g;
        DataType const kinds[] = {DataType::kHALF, DataType::kBF16, DataType::kFLOAT};
        PluginTensorDesc tensors[5] = {};
        DynamicPluginTensorDesc dynamic[5] = {};
        for (int j = 0; j < 5; ++j) {
            tensors[j].dims = j == 3 ? Dims{2, {g, t}} : Dims{5, {b, t, p, h, d}};
            tensors[j].type = j == 3 ? DataType::kFLOAT : kinds[dtype];
            tensors[j].format = TensorFormat::kLINEAR;
            dynamic[j].desc = tensors[j];
            dynamic[j].min = dynamic[j].max = dynamic[j].opt = tensors[j].dims;
        }
        DataType types[4] = {tensors[0].type, tensors[1].type, tensors[2].type, tensors[3].type}, out{};
        bool formats = true;
        for (int j = 0; j < 5; ++j) formats = formats && build->supportsFormatCombination(j, dynamic, 4, 1);
        int const typed = build->getOutputDataTypes(&out, 1, types, 4);
        int const configured = build->configurePlugin(dynamic, 4, dynamic + 4, 1);
        // what an engine holds of the plugin makes another one at run time
        auto* core = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        IPluginV3* loaded = creator->createPlugin("x", core->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        auto* runtime = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        auto* attached =
            static_cast<IPluginV3OneRuntime*>(runtime->attachToContext(nullptr)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        int const changed = attached->onShapeChange(tensors, 4, tensors + 4, 1);
        void const* inputs[] = {(void*)101, (void*)102, (void*)103, (void*)104};
        void* outputs[] = {(void*)105};
        int const enqueued = attached->enqueue(tensors, tensors + 4, inputs, outputs, nullptr, (cudaStream_t)7);
        std::printf("{\"formats\": %s, \"typed\": %d, \"configured\": %d, \"changed\": %d, \"enqueued\": %d}\n",
            formats && out == tensors[0].type ? "true" : "false", typed, configured, changed, enqueued);
    }
    return 0;
}
