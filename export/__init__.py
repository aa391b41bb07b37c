"""From a student's weights to verified ONNX graphs and a bundle."""
