"""Layers cut out of their models: the runtime runs them and their chains, and what is alike has one key."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.probe.micro import micro, placeholder, resized
from rewriting import DTYPES, draw, found, model, run

RNG = np.random.default_rng(11)


def norm(f, name="n"):
    """The parameters of a BatchNormalization."""
    return {f"{name}{part}": np.full(f, 1.5, np.float32) for part in ("s", "b", "m", "v")}


# Bodies of models with one layer, and its weights: (text, weights, shape of the layer's input).
CONVS = {
    "plain": ("y = Conv (x, w)", {"w": (6, 4, 3, 3)}, (2, 4, 8, 8)),
    "padded": ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", {"w": (6, 4, 3, 3)}, (2, 4, 8, 8)),
    "same": (
        'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)',
        {"w": (6, 4, 3, 3)},
        (1, 4, 7, 7),
    ),
    "strided": (
        "y = Conv <strides = [2, 3], pads = [0, 1, 2, 0]> (x, w)",
        {"w": (6, 4, 3, 3)},
        (2, 4, 8, 9),
    ),
    "dilated": ("y = Conv <dilations = [2, 1]> (x, w)", {"w": (6, 4, 3, 3)}, (1, 4, 8, 8)),
    "grouped": ("y = Conv <group = 2> (x, w)", {"w": (6, 4, 3, 3)}, (1, 8, 5, 5)),
    "with a bias": ("y = Conv (x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}, (1, 4, 5, 5)),
    "pointwise": ("y = Conv (x, w, b)", {"w": (6, 4, 1, 1), "b": (6,)}, (1, 4, 5, 5)),
    "pointwise, strided": ("y = Conv <strides = [2, 2]> (x, w)", {"w": (6, 4, 1, 1)}, (1, 4, 5, 5)),
    "one axis": ("y = Conv <strides = [2]> (x, w)", {"w": (6, 4, 3)}, (1, 4, 9)),
    "three axes": ("y = Conv (x, w)", {"w": (6, 4, 2, 2, 2)}, (1, 4, 4, 4, 4)),
    "normalized": (
        "a = Conv (x, w)\n y = BatchNormalization (a, ns, nb, nm, nv)",
        {"w": (6, 4, 3, 3), **norm(6)},
        (1, 4, 5, 5),
    ),
    "normalized, with a bias": (
        "a = Conv <pads = [1, 1, 1, 1]> (x, w, b)\n y = BatchNormalization (a, ns, nb, nm, nv)",
        {"w": (6, 4, 3, 3), "b": (6,), **norm(6)},
        (1, 4, 5, 5),
    ),
    "transposed": ("y = ConvTranspose (x, w)", {"w": (4, 6, 3, 3)}, (2, 4, 5, 5)),
    "transposed, strided": (
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 1, 0], output_padding = [1, 0]> (x, w, b)",
        {"w": (4, 6, 3, 3), "b": (6,)},
        (1, 4, 5, 5),
    ),
    "transposed, grouped": ("y = ConvTranspose <group = 2> (x, w)", {"w": (8, 3, 3, 3)}, (1, 8, 5, 5)),
}
MATRICES = {
    "Gemm": ("y = Gemm (x, w)", {"w": (8, 6)}, (5, 8)),
    "Gemm, transB": ("y = Gemm <transB = 1> (x, w, b)", {"w": (6, 8), "b": (6,)}, (5, 8)),
    "Gemm, transA": ("y = Gemm <transA = 1> (x, w)", {"w": (8, 6)}, (8, 5)),
    "Gemm, transA, transB": ("y = Gemm <transA = 1, transB = 1> (x, w)", {"w": (6, 8)}, (8, 5)),
    "Gemm, scaled": ("y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", {"w": (8, 6), "b": (6,)}, (5, 8)),
    "Gemm, left": ("y = Gemm (w, x)", {"w": (6, 8)}, (8, 5)),
    "Gemm, left, bias": ("y = Gemm (w, x, b)", {"w": (6, 8), "b": (6, 1)}, (8, 5)),
    "Gemm, left, transA": ("y = Gemm <transA = 1> (w, x)", {"w": (8, 6)}, (8, 5)),
    "Gemm, left, transB": ("y = Gemm <transB = 1> (w, x)", {"w": (6, 8)}, (5, 8)),
    "Gemm, left, both": ("y = Gemm <transA = 1, transB = 1> (w, x)", {"w": (8, 6)}, (5, 8)),
    "MatMul, rank 1": ("y = MatMul (x, w)", {"w": (8, 6)}, (8,)),
    "MatMul, rank 2": ("y = MatMul (x, w)", {"w": (8, 6)}, (5, 8)),
    "MatMul, rank 3": ("y = MatMul (x, w)", {"w": (8, 6)}, (2, 5, 8)),
    "MatMul, rank 4": ("y = MatMul (x, w)", {"w": (8, 6)}, (2, 3, 5, 8)),
    "MatMul, left, rank 1": ("y = MatMul (w, x)", {"w": (6, 8)}, (8,)),
    "MatMul, left, rank 2": ("y = MatMul (w, x)", {"w": (6, 8)}, (8, 5)),
    "MatMul, left, rank 3": ("y = MatMul (w, x)", {"w": (6, 8)}, (2, 8, 5)),
    "MatMul, left, rank 4": ("y = MatMul (w, x)", {"w": (6, 8)}, (2, 3, 8, 5)),
}
ALL = CONVS | MATRICES


def parsed(nodes, weights, shape, kind="float", opset=17):
    dims = ", ".join(map(str, shape))
    arrays = {
        name: draw(np.random.default_rng(5), value, DTYPES[kind])
        if isinstance(value, tuple)
        else value.astype(DTYPES[kind])
        for name, value in weights.items()
    }
    return model(f"g ({kind}[{dims}] x) => ({kind}[] y) {{ {nodes} }}", opset, **arrays)


def cut(proto, index=0, use=0, shapes=None, **selection):
    """A layer of a model, alone."""
    of = found(proto, shapes, **selection)
    return of.bindings[index].layer, micro(of.walk, of.bindings[index], use)


def options(layer):
    """Some options of every fold, number of slices and lowering: the least rank and the largest."""
    return [
        Option(fold, k, j, lowering)
        for fold in layer.folds
        for k in layer.slices
        for lowering in layer.lowerings(k)
        for j in sorted({1, layer.full_rank(fold, k)})
    ]


# --- it runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_layer_reads_what_it_reads_in_its_model_and_gives_what_it_gives(name):
    proto = parsed(*ALL[name])
    layer, alone = cut(proto)
    shape = ALL[name][2]
    (inside,) = run(proto, {"x": np.zeros(shape, np.float32)})
    (out,) = run(alone.dense().proto, alone.feed())
    assert alone.feed()["x"].shape == alone.shape
    # Of a MatMul's rows it is only known how many there are.
    assert (np.prod(alone.shape), len(alone.shape)) == (np.prod(shape), len(shape))
    assert (out.size, out.ndim) == (inside.size, inside.ndim)
    if layer.op != "MatMul" or len(shape) < 3:
        assert (alone.shape, out.shape) == (shape, inside.shape)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", ALL)
def test_every_chain_runs_and_gives_the_shape_of_the_layer(name):
    layer, alone = cut(parsed(*ALL[name]))
    (dense,) = run(alone.dense().proto, alone.feed())
    wanted = options(layer)
    made = list(alone.chains().decomposed(wanted))
    assert [option for option, _ in made] == wanted
    for option, chain in made:
        (out,) = run(chain.proto, alone.feed())
        assert out.shape == dense.shape, option
        assert out.dtype == dense.dtype
        assert np.isfinite(out).all()


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("name", ["strided", "with a bias", "normalized", "Gemm, transB", "MatMul, rank 3"])
def test_every_opset_is_kept(name, opset):
    layer, alone = cut(parsed(*ALL[name], opset=opset))
    assert alone.structure.opset_import[0].version == opset
    for _, chain in alone.chains().decomposed(options(layer)):
        run(chain.proto, alone.feed())


@pytest.mark.parametrize("kind", ["float16", "double"])
@pytest.mark.parametrize("name", ["Gemm, transB", "MatMul, left, rank 2", "MatMul, rank 3"])
def test_dtypes_are_kept(name, kind):
    layer, alone = cut(parsed(*ALL[name], kind=kind))
    (dense,) = run(alone.dense().proto, alone.feed())
    assert dense.dtype == alone.dtype == DTYPES[kind]
    # ONNX Runtime has no convolution for double.
    native = [option for option in options(layer) if option.lowering is Lowering.NATIVE]
    for _, chain in alone.chains().decomposed(native):
        (out,) = run(chain.proto, alone.feed())
        assert (out.dtype, out.shape) == (dense.dtype, dense.shape)


def test_the_surroundings_of_a_convolution():
    _, alone = cut(parsed(*CONVS["normalized, with a bias"]))
    assert [node.op_type for node in alone.structure.graph.node] == [
        "MaxPool", "Conv", "BatchNormalization", "Relu", "MaxPool",
    ]  # fmt: skip
    assert {tensor.name for tensor in alone.structure.graph.initializer} == {
        "w", "bias", "scale", "shift", "mean", "var",
    }  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_has_no_surroundings(name):
    _, alone = cut(parsed(*MATRICES[name]))
    (node,) = alone.structure.graph.node
    assert node.op_type == name.split(",", maxsplit=1)[0]


@pytest.mark.parametrize("name", ALL)
def test_the_structure_has_no_numbers_and_the_size_is_that_of_all_weights(name):
    proto = parsed(*ALL[name])
    _, alone = cut(proto)
    sizes = [int(np.prod(tensor.dims)) for tensor in proto.graph.initializer]
    assert alone.bytes == 4 * sum(sizes)
    assert not any(tensor.raw_data or tensor.float_data for tensor in alone.structure.graph.initializer)
    dense = alone.dense().proto
    assert all(tensor.raw_data for tensor in dense.graph.initializer)
    assert alone.dense().proto == dense
    assert alone.structure.ByteSize() < 2000


def test_a_batchnorm_behind_a_layer_goes_into_its_chain():
    layer, alone = cut(parsed(*CONVS["normalized"]))
    for _, chain in alone.chains().decomposed(options(layer)[:1]):
        assert "BatchNormalization" not in [node.op_type for node in chain.proto.graph.node]


def test_a_pointwise_convolution_is_written_as_matrices():
    layer, alone = cut(parsed(*CONVS["pointwise"]))
    ((_, chain),) = alone.chains().decomposed([Option(Fold.ENCODE, 1, 2, Lowering.MATMUL)])
    operators = [node.op_type for node in chain.proto.graph.node]
    assert "Conv" not in operators
    assert layer.lowerings(1) == (Lowering.NATIVE, Lowering.MATMUL)


def test_a_transposed_use_with_a_bias_runs_alone():
    nodes = "h = Gemm (x, w)\n y = Gemm <transB = 1> (h, w, b)"
    proto = parsed(nodes, {"w": (8, 6), "b": (8,)}, (5, 8))
    layer, alone = cut(proto, use=1)
    assert layer.uses[1].transposed
    for one in (alone.dense(), *(chain for _, chain in alone.chains().decomposed(options(layer)))):
        (output,) = run(one.proto, alone.feed())
        assert output.shape == (5, 8)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_random_factors_keep_activations_near_their_size(kind):
    """What shrank with every layer would become denormal, with which processors are slow."""
    proto = parsed(*CONVS["pointwise"], kind=kind)
    layer, alone = cut(proto)
    for one in (alone.dense(), *(chain for _, chain in alone.chains().decomposed(options(layer)))):
        (output,) = run(one.proto, alone.feed())
        assert 0.2 < np.abs(output.astype(np.float64)).mean() < 5


@pytest.mark.parametrize("tables", [("Gather", "MatMul"), ("Gather", "Gemm")])
def test_tied_embeddings(tables):
    """The table is cut out where it is a matrix, and not where rows are looked up in it."""
    flat = "h = Flatten <axis = 1> (e)" if tables[1] == "Gemm" else "h = Identity (e)"
    apply = (
        "y = Gemm <transB = 1> (h, w)"
        if tables[1] == "Gemm"
        else "t = Transpose <perm = [1, 0]> (w)\n y = MatMul (h, t)"
    )
    ids = "3, 1" if tables[1] == "Gemm" else "2, 3"
    proto = model(f"g (int64[{ids}] i) => (float[] y) {{ e = Gather (w, i)\n {flat}\n {apply} }}", w=(12, 8))
    of = found(proto)
    (binding,) = of.bindings
    assert [use.op for use in binding.layer.uses] == list(tables)
    assert micro(of.walk, binding, 0) is None
    alone = micro(of.walk, binding, 1)
    assert alone.shape[-1] == 8
    (dense,) = run(alone.dense().proto, alone.feed())
    assert dense.shape[-1] == 12
    of_alone = found(alone.dense().proto).layer
    for _, chain in alone.chains().decomposed(options(of_alone)):
        (out,) = run(chain.proto, alone.feed())
        assert out.shape == dense.shape


def test_a_weight_that_is_applied_both_ways_is_cut_out_both_ways():
    proto = model(
        "g (float[5, 8] x) => (float[] y) { a = MatMul (x, w)\n t = Transpose <perm = [1, 0]> (w)\n"
        " y = MatMul (a, t) }",
        w=(8, 6),
    )
    of = found(proto)
    (binding,) = of.bindings
    one, other = (micro(of.walk, binding, index) for index in range(2))
    assert (one.shape, other.shape) == ((5, 8), (5, 6))
    assert one.key != other.key
    for alone, out in ((one, (5, 6)), (other, (5, 8))):
        assert run(alone.dense().proto, alone.feed())[0].shape == out
        for _, chain in alone.chains().decomposed([Option(Fold.ENCODE, 1, 2)]):
            assert run(chain.proto, alone.feed())[0].shape == out


# --- what cannot be cut out -------------------------------------------------------------------------


def test_batches_of_matrices_cannot_be_cut_out():
    _, alone = cut(parsed("y = MatMul (x, w)", {"w": (3, 8, 6)}, (3, 5, 8)))
    assert alone is None


def test_an_embedding_cannot_be_cut_out():
    _, alone = cut(model("g (int64[4] i) => (float[] y) { y = Gather (w, i) }", w=(12, 8)))
    assert alone is None


@pytest.mark.parametrize(("shapes", "known"), [({}, False), ({"x": (2, 4, 8, 8)}, True)])
def test_unknown_positions_cannot_be_cut_out(shapes, known):
    proto = model("g (float[N, 4, H, W] x) => (float[] y) { y = Conv (x, w) }", w=(6, 4, 3, 3))
    _, alone = cut(proto, shapes=shapes)
    assert (alone is not None) == known
    if alone is not None:
        assert alone.shape == (2, 4, 8, 8)


# --- keys -------------------------------------------------------------------------------------------

BASE = ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}, (1, 4, 8, 8))


def key(nodes=BASE[0], weights=BASE[1], shape=BASE[2], **more):
    return cut(parsed(nodes, weights, shape, **more))[1].key


SAME = {
    "other numbers": {"weights": {"w": draw(RNG, (6, 4, 3, 3)), "b": draw(RNG, (6,))}},
    "other names": {
        "nodes": "other = Conv <pads = [1, 1, 1, 1]> (x, kernel, shift)\n y = Identity (other)",
        "weights": {"kernel": (6, 4, 3, 3), "shift": (6,)},
    },
    "another place": {"nodes": "a = Relu (x)\n b2 = Conv <pads = [1, 1, 1, 1]> (a, w, b)\n y = Relu (b2)"},
}
OTHER = {
    "another shape": {"weights": {"w": (7, 4, 3, 3), "b": (7,)}},
    "another kernel": {"weights": {"w": (6, 4, 3, 1), "b": (6,)}},
    "other pads": {"nodes": "y = Conv <pads = [1, 0, 1, 1]> (x, w, b)"},
    "no pads": {"nodes": "y = Conv (x, w, b)"},
    "another stride": {"nodes": "y = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, w, b)"},
    "a dilation": {"nodes": "y = Conv <pads = [1, 1, 1, 1], dilations = [2, 2]> (x, w, b)"},
    "groups": {"nodes": "y = Conv <pads = [1, 1, 1, 1], group = 2> (x, w, b)", "shape": (1, 8, 8, 8)},
    "no bias": {"nodes": "y = Conv <pads = [1, 1, 1, 1]> (x, w)", "weights": {"w": (6, 4, 3, 3)}},
    "a BatchNorm": {
        "nodes": "a = Conv <pads = [1, 1, 1, 1]> (x, w, b)\n y = BatchNormalization (a, ns, nb, nm, nv)",
        "weights": BASE[1] | norm(6),
    },
    "other positions": {"shape": (1, 4, 9, 8)},
    "another batch": {"shape": (2, 4, 8, 8)},
    "another dtype": {"kind": "float16"},
    "another opset": {"opset": 13},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_layers_that_are_alike_have_one_key(change):
    assert key(**change) == key()


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_layers_that_differ_have_other_keys(change):
    assert key(**change) != key()


def test_the_order_of_attributes_does_not_matter():
    one = parsed("y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)", {"w": (6, 4, 3, 3)}, (1, 4, 8, 8))
    other = parsed(
        "y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)", {"w": (6, 4, 3, 3)}, (1, 4, 8, 8)
    )
    assert one != other
    assert cut(one)[1].key == cut(other)[1].key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Gemm, left", "MatMul, left, rank 2"),
        ("Gemm, transA", "Gemm, transA, transB"),
        ("Gemm", "Gemm, left, both"),
        ("MatMul, rank 2", "MatMul, left, rank 2"),
        ("MatMul, rank 3", "MatMul, rank 2"),
        ("Gemm, scaled", "Gemm"),
    ],
)
def test_matrices_that_differ_have_other_keys(one, other):
    assert cut(parsed(*MATRICES[one]))[1].key != cut(parsed(*MATRICES[other]))[1].key


def test_repeated_blocks_of_one_model_have_one_key():
    proto = parsed(
        "a = MatMul (x, w)\n b = MatMul (a, v)\n y = MatMul (b, u)",
        {"w": (8, 8), "v": (8, 8), "u": (8, 6)},
        (5, 8),
    )
    of = found(proto)
    keys = [micro(of.walk, binding, 0).key for binding in of.bindings]
    assert keys[0] == keys[1] != keys[2]


# --- digests of chains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_chain_has_its_own_digest(name):
    layer, alone = cut(parsed(*ALL[name]))
    chains = alone.chains()
    found = [chains.digest(option) for option in options(layer)]
    assert len({alone.key, *found}) == 1 + len(found)
    assert [alone.chains().digest(option) for option in options(layer)] == found


@pytest.mark.parametrize("name", ALL)
def test_a_digest_is_that_of_the_model_that_is_timed_without_its_numbers(name):
    layer, alone = cut(parsed(*ALL[name]))
    chains = alone.chains()
    for option, chain in chains.decomposed(options(layer)):
        proto = chain.proto
        for tensor in proto.graph.initializer:
            tensor.ClearField("raw_data")
        text = proto.SerializeToString(deterministic=True)
        assert chains.digest(option) == hashlib.sha256(text).hexdigest()


def test_digests_change_with_what_the_chain_does():
    names = ("plain", "padded", "with a bias", "normalized, with a bias")
    chains = [cut(parsed(*CONVS[name]))[1].chains() for name in names]
    digests = [one.digest(Option(Fold.ENCODE, k, 1)) for one in chains for k in (1, 2)]
    assert len(set(digests)) == len(digests)


# --- placeholders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed, grouped", "Gemm", "one axis"])
def test_placeholders_have_the_shapes_of_factors(name):
    of = found(parsed(*ALL[name]))
    (binding,) = of.bindings
    groups, f, c, *kernel = binding.layer.shape
    for option in options(binding.layer):
        factors = placeholder(binding, option, np.dtype(np.float16)).factors
        first, second = option.fold.kernels(tuple(kernel))
        assert factors.encoder.shape == (groups, option.k, option.j, c // option.k, *first)
        assert factors.decoder.shape == (groups, f, option.k, option.j, *second)
        assert factors.encoder.dtype == factors.decoder.dtype == np.float16
        assert (factors.encoder > 0).all()


# --- parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ops", "time"),
    [
        (("ReorderInput", "MaxPool", "Conv", "Relu", "MaxPool", "ReorderOutput"), 4 + 8),
        (("MaxPool", "Conv", "MaxPool"), 2),
        (("Conv", "Relu"), 1 + 2),
    ],
)
def test_the_poolings_around_a_layer_do_not_count(ops, time):
    _, alone = cut(parsed(*CONVS["plain"]))
    assert alone.own([(op, 2.0**n) for n, op in enumerate(ops)]) == time


def test_all_nodes_of_a_matrix_count():
    _, alone = cut(parsed(*MATRICES["Gemm"]))
    assert alone.own([("MaxPool", 1.0), ("MatMul", 2.0), ("MaxPool", 4.0)]) == 7


SHAREABLE = [name for name in ALL if "grouped" not in name and "transposed" not in name]


@pytest.mark.parametrize("name", SHAREABLE)
def test_a_decoder_alone_gives_what_its_chain_gives(name):
    layer, alone = cut(parsed(*ALL[name]))
    option = Option(layer.shared_fold, 1, 2)
    ((_, chain),) = alone.chains().decomposed([option])
    (wanted,) = run(chain.proto, alone.feed())
    decoder = alone.chains().decoder(option)
    (out,) = run(decoder.dense().proto, decoder.feed())
    assert out.shape == wanted.shape
    names = {tensor.name: tensor.dims for tensor in decoder.structure.graph.initializer}
    assert "w_encoder" not in names
    assert np.prod(names["w_decoder"]) == 2 * layer.f


def test_a_decoder_has_a_key_of_its_own():
    _, alone = cut(parsed(*MATRICES["Gemm"]))
    made = alone.chains()
    keys = {made.decoder(Option(Fold.ENCODE, 1, j)).key for j in (1, 2, 3)}
    assert len(keys | {alone.key}) == 4


@pytest.mark.parametrize("name", SHAREABLE)
@pytest.mark.parametrize(("f", "c"), [(5, None), (None, 3)])
def test_a_layer_of_another_size_runs_and_has_a_key_of_its_own(name, f, c):
    of = found(parsed(*ALL[name]))
    (binding,) = of.bindings
    f, c = f or binding.layer.f, c or binding.layer.c
    less = resized(of.walk, binding, 0, f, c)
    run(less.dense().proto, less.feed())
    weight = next(tensor for tensor in less.structure.graph.initializer if tensor.name == "w")
    assert np.prod(weight.dims) == f * c * np.prod(binding.layer.kernel, dtype=int)
    assert less.key != micro(of.walk, binding, 0).key


def test_an_operator_that_states_its_sizes_has_no_other_size():
    body = 'y = Einsum <equation = "ab,bc->ac"> (x, w)'
    of = found(parsed(body, {"w": (8, 6)}, (5, 8)))
    assert resized(of.walk, of.bindings[0], 0, 5, 8) is None
