"""A small decoder as exporters write them: rotary positions, grouped keys and values, inputs for its past."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from tiny import built, decaying

POSITIONS = 100
TOTAL = "past_sequence_length + sequence_length"

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
decoder (int64[batch_size, sequence_length] input_ids, int64[batch_size, total] attention_mask,
         int64[batch_size, sequence_length] position_ids,
         float[batch_size, 2, past_sequence_length, 8] past_key_values_0_key,
         float[batch_size, 2, past_sequence_length, 8] past_key_values_0_value)
     => (float[batch_size, sequence_length, 24] logits, float[batch_size, 2, total, 8] present_0_key,
         float[batch_size, 2, total, 8] present_0_value)
<int64[4] heads = {0, 0, 4, 8}, int64[4] groups = {0, 0, 2, 8}, int64[3] joined = {0, 0, 32},
 int64[1] one = {1}, int64[2] both = {1, 2}, float unit = {1}, float closed = {-10000}>
{
  x = Gather (embedding, input_ids)
  angles = Gather (rotary, position_ids)
  turn = Unsqueeze (angles, one)
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  qh = Reshape (q, heads)
  kh = Reshape (k, groups)
  vh = Reshape (v, groups)
  qt = Transpose <perm = [0, 2, 1, 3]> (qh)
  kt = Transpose <perm = [0, 2, 1, 3]> (kh)
  vt = Transpose <perm = [0, 2, 1, 3]> (vh)
  qr = Mul (qt, turn)
  kr = Mul (kt, turn)
  present_0_key = Concat <axis = 2> (past_key_values_0_key, kr)
  present_0_value = Concat <axis = 2> (past_key_values_0_value, vt)
  keys = Concat <axis = 1> (present_0_key, present_0_key)
  values = Concat <axis = 1> (present_0_value, present_0_value)
  turned = Transpose <perm = [0, 1, 3, 2]> (keys)
  scores = MatMul (qr, turned)
  seen = Cast <to = 1> (attention_mask)
  unseen = Sub (unit, seen)
  far = Mul (unseen, closed)
  bias = Unsqueeze (far, both)
  masked = Add (scores, bias)
  weights = Softmax <axis = -1> (masked)
  mixed = MatMul (weights, values)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  rows = Reshape (back, joined)
  out = MatMul (rows, wo)
  y = Add (x, out)
  logits = MatMul (y, head)
}
"""


def decoder(total: str = TOTAL, past: str = "past_sequence_length", needs_past: bool = False) -> ModelProto:
    """A decoder of one layer with `POSITIONS` positions.

    Args:
        total: The last dimension of the mask.
        past: The past's.
        needs_past: Whether it reads the first position of the past, so that there has to be one.
    """
    weights = {
        "embedding": decaying(1, 24, 32),
        "rotary": np.cos(np.arange(POSITIONS)[:, None] * 0.5 ** np.arange(8)).astype(np.float32),
        "wq": decaying(2, 32, 32),
        "wk": decaying(3, 32, 16),
        "wv": decaying(4, 32, 16),
        "wo": decaying(5, 32, 32),
        "head": decaying(6, 32, 24),
    }
    text = TEXT
    if needs_past:
        first = "zero = Constant <value_ints = [0]> () "
        first += "first = Gather <axis = 2> (past_key_values_0_key, zero)"
        text = text.replace("kr = Mul (kt, turn)", f"{first} ku = Mul (kt, turn) kr = Add (ku, first)")
    proto = built(text, weights)
    texts = {"total": total, "past_sequence_length": past}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = texts.get(dim.dim_param, dim.dim_param)
    return proto
