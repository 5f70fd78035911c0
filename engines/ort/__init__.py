"""ONNX Runtime and its providers."""
