"""Models as differentiable programs in PyTorch."""
