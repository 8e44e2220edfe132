"""optimum-cli decomposes exported models, and ORTModel classes load the results unchanged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from click import Option

import tokenizing
from onnx_lowrank.commands import compress

pytestmark = [
    pytest.mark.toolchains,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("optimum") is None or find_spec("optimum.onnxruntime") is None,
        reason="optimum-onnx is not installed",
    ),
]
WORDS = 60
SIZES = {
    "vocab_size": WORDS + tokenizing.FIRST,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token": "[UNK]", "eos_token": "[SEP]"}
TASKS = {"llama": "text-generation-with-past", "bert": "feature-extraction"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders as optimum exports them, of small models with random weights."""
    import torch
    from optimum.exporters.onnx import main_export
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    models = {"llama": LlamaForCausalLM(LlamaConfig(**SIZES)), "bert": BertModel(BertConfig(**SIZES))}
    for name, model in models.items():
        model.save_pretrained(folder / f"{name}-torch")
        file = tokenizing.written(folder / "tokenizer.json", WORDS)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL)
        tokenizer.save_pretrained(folder / f"{name}-torch")
        main_export(folder / f"{name}-torch", folder / name, task=TASKS[name], library_name="transformers")
    return folder


def lowrank(*arguments):
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "onnxruntime", "lowrank"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(exported):
    """The same models with three quarters of the parameters."""
    for name in TASKS:
        ran = lowrank("--onnx_model", exported / name, "-o", exported / f"{name}-made", "--ratio", "0.75")
        assert ran.returncode == 0, ran.stderr
    return exported


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".onnx"}


@pytest.mark.parametrize("name", TASKS)
def test_all_other_files_travel_along(made, name):
    assert contents(made / f"{name}-made") == contents(made / name)
    assert {"config.json", "tokenizer.json"} <= contents(made / name).keys()
    before, after = ((made / folder / "model.onnx").stat().st_size for folder in (name, f"{name}-made"))
    assert after < 0.8 * before


def test_a_generation_configuration_travels_along(made):
    assert "generation_config.json" in contents(made / "llama-made")


def test_a_language_model_generates(made):
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(made / "llama-made")("w0001 w0002", return_tensors="pt")
    model = ORTModelForCausalLM.from_pretrained(made / "llama-made")
    count = tokens["input_ids"].shape[1]
    ids = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        min_new_tokens=4,
        max_new_tokens=4,
        do_sample=False,
    )
    assert ids.shape == (1, count + 4)


def test_an_encoder_extracts_features(made):
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    states = []
    for folder in ("bert", "bert-made"):
        tokens = AutoTokenizer.from_pretrained(made / folder)("w0001 w0002", return_tensors="np")
        model = ORTModelForFeatureExtraction.from_pretrained(made / folder)
        states.append(model(**tokens).last_hidden_state)
    assert states[0].shape == states[1].shape
    assert not np.array_equal(*states)


def test_a_text_is_read_with_the_tokenizer_of_the_folder(exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tokenizing.words(np.random.default_rng(2).integers(0, WORDS, 800)))
    shape = ["--input-shape", "input_ids=1,16"]
    data = ["--calibration", text, "--pass", "activation", *shape]
    ran = lowrank("--onnx_model", exported / "bert", "-o", tmp_path / "out", "--ratio", "0.75", *data)
    assert ran.returncode == 0, ran.stderr
    assert "held-out calibration inputs" in ran.stderr


def test_external_data_are_not_copied(exported, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(exported / "bert", source)
    model = onnx.load(source / "model.onnx")
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    ran = lowrank("--onnx_model", source, "-o", tmp_path / "out", "--ratio", "0.75")
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "out" / "model.onnx_data").exists()
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    ORTModelForFeatureExtraction.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--onnx_model", "absent", "-o", "out"), 2, "optimum-cli: absent is no folder"),
        (("--onnx_model", "empty", "-o", "out"), 2, "optimum-cli: empty holds no .onnx file"),
        (("--onnx_model", "empty", "-o", "empty/out"), 2, "is in the folder of the input model"),
        (("--onnx_model", "full", "-o", "out", "--ratio", "2"), 2, "onnx-lowrank: The ratio is 2.0"),
        (("--onnx_model", "full", "-o", "out", "--ratio", "0.001"), 3, "cannot be reached"),
    ],
)
def test_errors_are_sentences_with_exit_codes(tmp_path, monkeypatch, arguments, code, message):
    from follow import mlp

    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    onnx.save(mlp(), "full/model.onnx")
    ran = lowrank(*arguments)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert message in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert not Path("out").exists()


def test_every_option_is_one_of_the_command():
    from optimum.commands.register.register_onnx_lowrank import OPTIONS

    known = {opt for param in compress.command.params if isinstance(param, Option) for opt in param.opts}
    assert OPTIONS.keys() <= known


def test_the_register_file_loads_nothing_of_the_package():
    text = "import sys, optimum.commands.register.register_onnx_lowrank; print('onnx_lowrank' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
