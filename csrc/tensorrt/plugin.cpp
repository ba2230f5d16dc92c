// vstar::VstarTemporalAttention for TensorRT and TensorRT for RTX: q, k, v (B, T, P, heads, head_dim), g (1 or B, T) -> out.
// Loaded by `IPluginRegistry::loadLibrary` (or trtexec --dynamicPlugins), which calls getCreators.
#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>

#include <new>

#include "driver.h"
#include "kernels.h"

namespace vstar {
namespace {

using namespace nvinfer1;

constexpr char const *kName = "VstarTemporalAttention", *kVersion = "1", *kNamespace = "vstar";
constexpr int kInputs = 4;

// The table's number of a type: its place in kernels/tensorrt/embed_cubins.py.
int number_of(DataType type) {
    return type == DataType::kHALF ? 0 : type == DataType::kBF16 ? 1 : type == DataType::kFLOAT ? 2 : -1;
}

bool serves(int dtype, std::int64_t head_dim) {
    for (int i = 0; i < kKernelCount; ++i)
        if (kKernels[i].dtype == dtype && kKernels[i].head_dim == head_dim) return true;
    return false;
}

Problem problem_of(PluginTensorDesc const* inputs) {
    auto const& d = inputs[0].dims.d;
    return {d[0], d[1], d[2], d[3], d[4], inputs[3].dims.d[0], number_of(inputs[0].type)};
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
   public:
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(*this); }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    char const* getTimingCacheID() noexcept override { return kKernelHash; }
    std::int32_t getNbOutputs() const noexcept override { return 1; }

    std::int32_t getOutputDataTypes(
        DataType* outputs, std::int32_t, DataType const* inputs, std::int32_t count) const noexcept override {
        if (count != kInputs) return -1;
        outputs[0] = inputs[0];
        return 0;
    }
    std::int32_t getOutputShapes(
        DimsExprs const* inputs, std::int32_t count, DimsExprs const*, std::int32_t, DimsExprs* outputs, std::int32_t,
        IExprBuilder&) noexcept override {
        if (count != kInputs || inputs[0].nbDims != 5 || inputs[3].nbDims != 2) return -1;
        outputs[0] = inputs[0];
        return 0;
    }
    bool supportsFormatCombination(
        std::int32_t at, DynamicPluginTensorDesc const* tensors, std::int32_t, std::int32_t) noexcept override {
        DataType const wanted = at == 3 ? DataType::kFLOAT : tensors[0].desc.type;
        return number_of(tensors[0].desc.type) >= 0 && tensors[at].desc.type == wanted &&
               tensors[at].desc.format == TensorFormat::kLINEAR;
    }
    std::int32_t configurePlugin(
        DynamicPluginTensorDesc const* inputs, std::int32_t count, DynamicPluginTensorDesc const*, std::int32_t) noexcept override {
        return count == kInputs && serves(number_of(inputs[0].desc.type), inputs[0].max.d[4]) ? 0 : -1;
    }

    // A builder may run on a machine without a GPU, so only a launch needs one.
    std::int32_t onShapeChange(
        PluginTensorDesc const* inputs, std::int32_t count, PluginTensorDesc const*, std::int32_t) noexcept override {
        return count == kInputs && prepare(problem_of(inputs)) ? 0 : -1;
    }
    std::int32_t enqueue(
        PluginTensorDesc const* described, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) noexcept override {
        void const* const tensors[] = {inputs[0], inputs[1], inputs[2], inputs[3], outputs[0]};
        return launch(problem_of(described), tensors, stream) ? 0 : -1;
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_; }

   private:
    PluginFieldCollection fields_{0, nullptr};
};

class Creator final : public IPluginCreatorV3One {
   public:
    IPluginV3* createPlugin(char const*, PluginFieldCollection const*, TensorRTPhase) noexcept override {
        return new (std::nothrow) Plugin();
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

   private:
    PluginFieldCollection fields_{0, nullptr};
};

}  // namespace
}  // namespace vstar

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static vstar::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
