"""Bytes: the size of a model's files as `save` writes them.

Rules:

1. The size of a model is that of its serialized proto and of its data file, with the padding between tensors.
   The name of the data file is unknown before it is written, so it counts as the longest possible name.
2. The model of a plan is rewritten without numbers: with the nodes, names, tensors and metadata that it will
   have, and with the longest possible certificates. So the finished model is no larger. A model with
   merged operators can be larger, because the metadata of the products count, too: then it is made again
   without merging.
3. An option costs the bytes of its factors, and the bytes that rewriting its layer alone adds beside them,
   without padding. These extra bytes are the same, within a few, for all ranks and for all k above 1. The
   model of the whole plan (rule 2) decides: if it exceeds the limit, the constraint is tightened.
4. A kept layer costs the bytes of all tensors that rewriting it would remove, in their own dtypes.
5. A narrow layer costs what it costs when it is kept, less the bytes that the model loses when this layer and
   its partners alone are narrowed. The contents of tensors are linear in the width; all beside them counts as
   at the full width, whose numbers have the most digits.
6. A layer that shares the encoder of another one costs the bytes of its decoder, and the bytes that rewriting
   it adds beside to a model in which the other one is rewritten already.
7. Layers that share a decoder are rewritten together or not at all. The first of them costs all bytes that
   this adds beside the factors.
8. Before a quantization, every tensor counts as it is after it, an upper bound from names and shapes
   (`quantize.sizes`); the ratio is that to the input model as it is.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import own_sizes
from onnx_lowrank.allocate.limits import Limits, Single
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.budgets.budget import Budget, Counted, Run, Tools
from onnx_lowrank.core.factors import Certificate, Factors, KeptRows
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.files.external import aligned, refer
from onnx_lowrank.files.load import PROTOBUF_LIMIT, Model, ModelProto, inlined, outline, stored_bytes
from onnx_lowrank.files.tensors import inline, is_external, reference, region, stored_size, tensors
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.found import Found, Layered
from onnx_lowrank.quantize.kind import Quantizer
from onnx_lowrank.report.content import Total
from onnx_lowrank.rewrite.notes import METADATA, stamp
from onnx_lowrank.rewrite.replace import Replacement, Rewritten, rewrite

_LONGEST_NAME = "x" * 255
"""The longest name that file systems allow, for the data file and for the file of a recipe."""

_LARGEST_OFFSET = 10**15 - 1

_LONGEST_NUMBER = 2.2250738585072014e-308
"""A positive float with the most digits in JSON."""

_NESTED = 16
"""The most bytes by which the contents of a tensor lengthen the length fields around it."""

_INLINE_BYTES = 1024


class Bytes(Budget):
    """The size of the model's file, with its external data."""

    name = "bytes"
    order = 3
    figure = "bytes"
    title = "file bytes"
    narrows = True
    shares = frozenset((Lowering.SHARED, Lowering.SUMMED))

    def on(self, found: Found, tools: Tools | None = None) -> Counted:
        """The meter of a model's bytes."""
        return _Meter(found, None if tools is None else tools.quantizer)

    def total(self, run: Run) -> Total:
        """The sizes of both models; the second is an upper bound if it counts longest names (rule 1)."""
        before = stored_bytes(run.found.model)
        if run.quantized is not None:
            return Total(before, _saved(run.quantized))
        is_kept = run.rewritten is None or all(choice.option is None for choice in run.plan.choices)
        if is_kept and run.meter is not None and run.meter.budget is self:
            return Total(before, run.meter.of_model(run.plan.choices))
        return Total(before, None if run.rewritten is None else _saved(run.rewritten.model))

    def holds(self, source: Layered, plan: Plan, rewritten: Rewritten) -> bool:
        """Whether the files of a finished model are no larger than its plan predicted."""
        return _Scales(rewritten.model).saved <= _Meter(source).of_model(plan.choices)


class _Meter(Counted):
    """The bytes of one model."""

    def __init__(self, source: Layered, quantizer: Quantizer | None = None) -> None:
        self.budget = BUDGET
        self._quantizer = quantizer
        self._source = source
        self._bindings = {binding.layer.id: binding for binding in source.bindings}
        self._known: dict[str, tuple[int, bool]] = {}
        self._beside: dict[tuple[str, Fold, int, Lowering, str], int] = {}
        # The bytes of a layer that is narrowed to its full width, and how many of them each step of it takes.
        self._narrow: dict[str, tuple[int, int]] = {}

    @cached_property
    def total(self) -> int:
        """The bytes of the input model."""
        return stored_bytes(self._source.model)

    @cached_property
    def _kept(self) -> int:
        """The bytes of the model if no layer is rewritten."""
        return self.total if self._quantizer is None else self._scales.saved

    @cached_property
    def _scales(self) -> _Scales:
        return _Scales(self._source.model, self._quantizer)

    @cached_property
    def _unchanged(self) -> int:
        return self._scales.weigh(self._scales.skeleton)

    @cached_property
    def _run(self) -> dict[str, str]:
        return {"version": version("onnx-lowrank"), "recipe": _LONGEST_NAME, "budget": self.budget.name}

    @cached_property
    def _shared(self) -> int:
        """The bytes that the metadata of the model add, beside those of every rewritten layer."""
        model = ModelProto()
        model.metadata_props.add(key=f"{METADATA}.run", value=json.dumps(self._run))
        model.metadata_props.add(key=f"{METADATA}.layers")
        return int(model.ByteSize())

    def of_layer(self, layer: Layer, option: Option | None) -> int:
        """The bytes of a layer (rules 3 to 7)."""
        if option is None:
            # A layer that a narrowing leaves has fewer bytes than the one in the model.
            lost = self._bindings[layer.id].layer.size - layer.size
            return self._freed(layer)[0] - ceil(lost * _per_number(layer, None, self._quantizer))
        if option.lowering is Lowering.NARROW:
            whole, slope = self._narrow_line(layer)
            return whole - (layer.width - option.j) // layer.width_step * slope
        return _factor_bytes(layer, option, self._quantizer) + self._added(layer, option)

    def of_model(self, choices: Sequence[Choice]) -> int:
        """An upper bound on the bytes of the model of a plan (rule 2); exact if the plan changes no layer."""
        chosen = [(layer, option) for layer, option in self._source.options(choices) if option is not None]
        if not chosen:
            return self._kept
        made = [self._replacement(layer, option, self._freed(layer)[1]) for layer, option in chosen]
        rewritten = self._rewritten(made)
        return self._scales.dense + self._grown(rewritten) + self._scales.padding(rewritten)

    def bounds(self, tables: Sequence[Candidates], limit: int) -> Single:
        """One constraint; it accounts for the metadata and the other data file of every rewritten model."""
        room = limit - self._kept + sum(int(table.cost[0]) for table in tables)
        if limit < self._kept:
            room -= self._scales.dense - self._kept + self._shared + _NESTED
        return Single(Limits.single(tables, room))

    def _freed(self, layer: Layer) -> tuple[int, bool]:
        """The bytes of the tensors that rewriting a layer removes, and whether a new bias adds bytes.

        Calibration, not the option, decides whether the layer gets a new bias.
        """
        if layer.id not in self._known:
            option = Option(layer.folds[0], 1, 1)
            made = [self._rewritten([self._replacement(layer, option, new)]) for new in (False, True)]
            scales = self._scales
            freed = scales.contents(scales.skeleton) - scales.contents(made[0])
            whole = layer.size * np.dtype(layer.dtype).itemsize
            freed -= whole - ceil(layer.size * _per_number(layer, None, self._quantizer))
            self._known[layer.id] = freed, scales.weigh(made[1]) > scales.weigh(made[0])
        return self._known[layer.id]

    def _added(self, layer: Layer, option: Option) -> int:
        """The bytes that an option adds beside its factors."""
        # Slices with a node each take more bytes the more they are.
        is_split = option.lowering is Lowering.SPLIT
        count = option.k if is_split else option.k > 1
        key = layer.id, option.fold, count, option.lowering, option.encoder
        if key not in self._beside:
            # This option has the most digits of all in its names and shapes.
            k = option.k if is_split or option.k == 1 else max(layer.slices)
            is_shared = option.lowering is Lowering.SHARED
            j = layer.matrix(option.fold, 1)[1] if is_shared else layer.full_rank(option.fold, 1)
            longest = replace(option, k=k, j=j)
            before, made = self._steps(layer, option)
            known = self._grown_by(before, longest) if before else self._shared
            grown = self._grown_by([*before, *made], longest) if made else known
            grown += sum(
                self._freed(each)[0] - _factor_bytes(each, longest, self._quantizer) for each in made
            )
            self._beside[key] = max(0, grown - known)
        return self._beside[key]

    def _steps(self, layer: Layer, option: Option) -> tuple[list[Layer], list[Layer]]:
        """The layers rewritten before a layer, and those rewritten with it (rules 6 and 7)."""
        if option.lowering is Lowering.SUMMED:
            held = layer.addends if layer.holds_factor(option) else ()
            return [], [self._bindings[name].layer for name in held]
        return [] if layer.holds_factor(option) else [self._bindings[option.encoder].layer], [layer]

    def _narrow_line(self, layer: Layer) -> tuple[int, int]:
        """The bytes of a layer that is narrowed to its full width, and those of each step of it (rule 5)."""
        if layer.id not in self._narrow:
            step, option = layer.width_step, Option(layer.narrow_fold, 1, layer.width, Lowering.NARROW)
            whole, least = (
                self._rewritten([self._replacement(layer, replace(option, j=width), new_bias=True)])
                for width in (layer.width, step)
            )
            steps = layer.width // step - 1
            weigh = self._scales.stored if self._quantizer is None else self._scales.weigh
            slope = (weigh(whole) - weigh(least)) // steps if steps else 0
            self._narrow[layer.id] = self._freed(layer)[0] + self._grown(whole) - self._shared, slope
        return self._narrow[layer.id]

    def _grown_by(self, layers: Sequence[Layer], option: Option) -> int:
        """The bytes by which the model grows if only these layers are rewritten, all with one option."""
        made = [self._replacement(layer, option, self._freed(layer)[1]) for layer in layers]
        return self._grown(self._rewritten(made))

    def _replacement(self, layer: Layer, option: Option, new_bias: bool) -> Replacement:
        """A layer's replacement without numbers, with a new bias if it is wanted and possible."""
        binding, is_narrow = self._bindings[layer.id], option.lowering is Lowering.NARROW
        # A BatchNorm's bias is replaced by zeros, too: its own may not be finite in the stored dtype. A
        # narrow layer always gets a new bias, which can have fewer features.
        if new_bias or is_narrow or layer.batchnorm is not None:
            new_bias = bias(self._source.model, self._source.walk, binding) is not None
        return _placeholder(binding, option, new_bias)

    def _rewritten(self, replacements: Sequence[Replacement]) -> ModelProto:
        """The skeleton of the model in which these layers are replaced."""
        light = replace(self._source.model, proto=self._scales.skeleton, path=None)
        made = rewrite(light, self._source.walk, replacements, self._scales.store)
        stamp(made, self._run)
        return made.model.proto

    def _grown(self, skeleton: ModelProto) -> int:
        """The bytes by which a rewritten model exceeds the input model, without padding."""
        return self._scales.weigh(skeleton) - self._unchanged


@dataclass(frozen=True, slots=True)
class _Weight:
    """The bytes of a tensor.

    Attributes:
        message: The bytes of its message, with its contents or with its reference to them.
        contents: The bytes of its contents, wherever they are.
        place: The place of the contents in a data file; None if they are in the message.
    """

    message: int
    contents: int
    place: Hashable = None


def _saved(model: Model) -> int:
    """The most bytes that `save` writes for a model."""
    # Scales hold all inline tensors, so they are only for models with a data file.
    size = stored_bytes(replace(model, path=None))
    is_inline = model.files.keys() <= model.temporary and size <= PROTOBUF_LIMIT
    return size if is_inline else _Scales(model).saved


class _Scales:
    """Computes the bytes of a model from its skeleton, whose tensors refer to a list of `_Weight`.

    Attributes:
        skeleton: The model without the contents of its tensors.
        dense: The most bytes that `save` writes for the model, without padding.
    """

    def __init__(self, model: Model, quantizer: Quantizer | None = None) -> None:
        """Compute the bytes of all tensors of a model, or of those that a quantization leaves."""
        model = inlined(model)
        self._quantizer = quantizer
        self._spills = bool(model.files) or stored_bytes(model) > PROTOBUF_LIMIT
        self._weights: list[_Weight] = []
        self.skeleton = outline(model.proto, 0)
        for bare, tensor in zip(tensors(self.skeleton), tensors(model.proto), strict=True):
            self._hang(bare, self._weight(bare, tensor, model))
        self._original = len(self._weights)
        if self._spills:
            self.dense = self.weigh(self.skeleton) + _NESTED * self._original
        else:
            self.dense = stored_bytes(replace(model, path=None)) - self._less(self.skeleton)

    @property
    def saved(self) -> int:
        """The most bytes that `save` writes for the model."""
        return self.dense + self.padding(self.skeleton)

    def weigh(self, skeleton: ModelProto) -> int:
        """The bytes of a skeleton with all contents, without the longer length fields around them."""
        hung = [(tensor, self._weights[index]) for tensor, index in self._hung(skeleton)]
        messages = sum(weight.message - tensor.ByteSize() for tensor, weight in hung)
        messages -= self._less(skeleton)
        return int(skeleton.ByteSize() + messages) + sum(size for _, size in self._outsiders(skeleton))

    def _less(self, skeleton: ModelProto) -> int:
        """The bytes that the quantization saves."""
        return 0 if self._quantizer is None else self._quantizer.saved(skeleton)

    def padding(self, skeleton: ModelProto) -> int:
        """The bytes between the tensors of the data file."""
        end = contents = 0
        for _, size in self._outsiders(skeleton):
            end = aligned(end, size) + size
            contents += size
        return end - contents

    def _outsiders(self, skeleton: ModelProto) -> Iterable[tuple[Hashable, int]]:
        """The places in the data file and their sizes, in the order in which they are written."""
        weights = (self._weights[index] for _, index in self._hung(skeleton))
        return {weight.place: weight.contents for weight in weights if weight.place is not None}.items()

    def stored(self, skeleton: ModelProto) -> int:
        """The bytes of the contents of all tensors of a skeleton."""
        weights = (self._weights[index] for _, index in self._hung(skeleton))
        contents = sum(weight.contents for weight in weights if weight.place is None)
        return contents + sum(size for _, size in self._outsiders(skeleton))

    def contents(self, skeleton: ModelProto) -> int:
        """The bytes of the contents of those tensors of a skeleton that come from the input model."""
        return sum(
            self._weights[index].contents for _, index in self._hung(skeleton) if index < self._original
        )

    def store(self, name: str, values: NDArray[Any]) -> Any:
        """Make a new tensor; only its shape and its bytes are kept."""
        bare = inline(name, np.empty(0, values.dtype))
        bare.ClearField("raw_data")
        del bare.dims[:]
        bare.dims.extend(values.shape)
        size = values.nbytes
        weight = self._outside(bare, size, len(self._weights))
        self._hang(bare, weight if self._spills else _Weight(bare.ByteSize() + size + _NESTED, size))
        return bare

    def _weight(self, bare: Any, tensor: Any, model: Model) -> _Weight:
        """The bytes of a tensor of the model; `bare` is the same tensor without contents."""
        if is_external(tensor):
            place = region(tensor, model.files, model.name)
            return self._outside(tensor, place.length, place)
        size = stored_size(tensor)
        if self._spills and not model.files and size is not None and size > _INLINE_BYTES:
            return self._outside(bare, size, len(self._weights))
        return _Weight(tensor.ByteSize(), tensor.ByteSize() if size is None else size)

    def _outside(self, tensor: Any, size: int, place: Hashable) -> _Weight:
        """The bytes of a tensor with contents in a data file."""
        copy = type(tensor)()
        copy.CopyFrom(tensor)
        refer(copy, _LONGEST_NAME, _LARGEST_OFFSET, size)
        return _Weight(copy.ByteSize(), size, place)

    def _hang(self, bare: Any, weight: _Weight) -> None:
        refer(bare, "", len(self._weights), 0)
        self._weights.append(weight)

    def _hung(self, skeleton: ModelProto) -> Iterator[tuple[Any, int]]:
        """The tensors of a skeleton that refer to a `_Weight`, each with its index."""
        for tensor in tensors(skeleton):
            if is_external(tensor):
                yield tensor, int(reference(tensor)["offset"])


def _placeholder(binding: Binding, option: Option, with_bias: bool) -> Replacement:
    """A layer's replacement without numbers, with the longest certificate."""
    layer, fold, k, j = binding.layer, option.fold, option.k, option.j
    if option.lowering is Lowering.NARROW and layer.packs_own:
        j = layer.at_width(j)[-1].f  # The decoder has the other features, too.
    groups, f, c, *_ = layer.shape
    encoder, decoder = fold.kernels(layer.kernel)
    zero = np.zeros((), np.dtype(layer.dtype))
    kept = j * layer.kept_per_rank if option.lowering is Lowering.SPARSE else 0
    factors = Factors(
        fold,
        np.broadcast_to(zero, (groups, k, j, c // k, *encoder)),
        np.broadcast_to(zero, (groups, f, k, j, *decoder)),
        KeptRows(np.arange(kept), np.broadcast_to(zero, (f, kept))) if kept else None,
    )
    longest = (_LONGEST_NUMBER,) * groups
    return Replacement(
        binding, option, factors, Certificate(longest, longest), np.zeros(layer.f) if with_bias else None
    )


def _factor_bytes(layer: Layer, option: Option, quantizer: Quantizer | None) -> int:
    each = _per_number(layer, option, quantizer)
    size = option.j * sum(own_sizes(layer, option)) * each
    if quantizer is not None and each == quantizer.per_number:
        size += option.j * option.k * layer.groups * quantizer.per_row
    return ceil(size)


def _per_number(layer: Layer, option: Option | None, quantizer: Quantizer | None) -> float:
    """The bytes of a number of a layer's weight, or of its factors."""
    whole = np.dtype(layer.dtype).itemsize
    is_matrix = option is not None and option.lowering is Lowering.MATMUL
    kind = "MatMul" if is_matrix else layer.op
    is_quantized = quantizer is not None and layer.dtype == "float32" and kind in quantizer.operators
    return quantizer.per_number if quantizer is not None and is_quantized else whole


BUDGET = Bytes()
