"""Networks of PyTorch as ONNX graphs."""
