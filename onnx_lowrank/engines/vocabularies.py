"""The vocabularies of a model: the tokens that its inputs of ids choose from."""

from __future__ import annotations

from onnx import ModelProto

from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.pasts import named_role


def vocabularies(proto: ModelProto) -> dict[str, int]:
    """For each input of token ids, the number of tokens: the rows of the table that they look up."""
    ids = {spec.name for spec in specs(proto) if named_role(spec) is None}
    return {name: rows for name, rows in id_limits(proto).items() if name in ids}
