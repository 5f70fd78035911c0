"""NVIDIA's TensorRT without ONNX Runtime."""
