"""`python -m onnx_lowrank` is the command `onnx-lowrank`."""

from onnx_lowrank.cli import main

if __name__ == "__main__":
    main()
