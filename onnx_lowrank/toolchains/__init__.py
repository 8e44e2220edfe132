"""Adapters to the toolchains that call onnx-lowrank, one module each; the rest of the package imports none.

A module needs the package of its toolchain, an extra of the same name. `docs/toolchains.md` shows their use.
"""
