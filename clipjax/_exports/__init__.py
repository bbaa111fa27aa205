"""Files of other tools: from trees to GGUF, ONNX and safetensors, and back."""
