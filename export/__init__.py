"""Networks to files that other runtimes compile or run: ONNX, AOTInductor packages, TensorRT engines."""
