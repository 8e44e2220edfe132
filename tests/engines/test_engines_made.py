"""Inputs made from the graph: the sizes that are tried."""

from __future__ import annotations

import onnx
import pytest
from onnx.parser import parse_model

from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.made import make
from onnx_lowrank.errors import InputError


def parsed(inputs: str) -> onnx.ModelProto:
    name = inputs.split()[-1]
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float[] y) {{ y = Identity ({name}) }}'
    return parse_model(text)


def feeds(proto, **shapes):
    return list(make(proto, specs(proto), shapes))


class TestSizes:
    def test_only_sizes_that_do_not_fit_are_left_out(self, monkeypatch):
        proto = parsed("float[N, 100] x")
        assert [feed["x"].shape for feed in feeds(proto)] == [(4, 100), (1, 100)]
        monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 400)
        assert [feed["x"].shape for feed in feeds(proto)] == [(1, 100)]

    def test_where_none_fits_the_smallest_is_named(self, monkeypatch):
        monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 399)
        with pytest.raises(InputError, match=r"\('x' is 1×100\): give smaller ones with --input-shape"):
            feeds(parsed("int64[M] n, float[N, 100] x"))
