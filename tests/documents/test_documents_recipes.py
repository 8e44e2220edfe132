from pathlib import Path

import pytest

from onnx_lowrank.budgets import prices
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents import recipes
from onnx_lowrank.errors import RecipeError
from onnx_lowrank.measures import names

BASE = {"summary": '"A test."', "folds": '["encode"]', "groups": '"divisors"', "aggregate": '"sum"'}


def text(**keys):
    return "\n".join(f"{key} = {value}" for key, value in (BASE | keys).items())


def parse(**keys):
    return recipes.parse(text(**keys), "test")


def test_the_least_recipe_and_its_defaults():
    found = parse()
    assert (found.name, found.summary) == ("test", "A test.")
    assert (found.folds, found.groups) == ((Fold.ENCODE,), None)
    assert (found.measure, found.relative) == ("spectral", True)
    assert (found.aggregate, found.power, found.price) == (Aggregate.SUM, 1.0, None)


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        *(("measure", f'"{measure}"', "measure", measure) for measure in names()),
        *(("aggregate", f'"{aggregate}"', "aggregate", aggregate) for aggregate in Aggregate),
        *(("folds", f'["{fold}"]', "folds", (fold,)) for fold in Fold),
        ("price", '"macs"', "price", "macs"),
        ("price", '"params"', "price", "params"),
        ("folds", '["decode", "rows", "decode"]', "folds", (Fold.ROWS, Fold.DECODE)),
        ("groups", "[4, 1, 4]", "groups", (1, 4)),
        ("normalize", '"absolute"', "relative", False),
        ("normalize", '"relative"', "relative", True),
        ("power", "4", "power", 4.0),
        ("power", "0.5", "power", 0.5),
        ("power", "64", "power", 64.0),
        ("summary", '"  Words.\\n"', "summary", "Words."),
        ("tables", "false", "tables", False),
    ],
)
def test_every_key_sets_its_field(key, value, field, expected):
    # A price is traded against a sum, which the base has.
    assert getattr(parse(**{key: value}), field) == expected


WRONG = {
    "summary": ['""', '" "', "1", "[]", "true", "1979-05-27"],
    "folds": ["[]", '"encode"', '["encode", "diagonal"]', "[1]", "1", "[[]]", "{}", '["ENCODE"]'],
    "groups": ['"all"', "[]", "[0]", "[-1]", "[1.0]", "[true]", '["1"]', "1", "{}"],
    "measure": ['"energy"', "1", '["spectral"]', "{}", "true", '""'],
    "normalize": ['"no"', "true", "1", "[]", "{}"],
    "aggregate": ['"mean"', "0", '["max"]', "{}", '""'],
    "power": ["0", "-1", "65", "1e999", "9" * 400, "nan", "inf", "-inf", '"4"', "true", "[4]", "{}"],
    "price": ['"latency"', "1", "[]", "{}", '""', "false"],
    "temperature": ["0", "-1", "65", "inf", "nan", '"1"', "true", "[]"],
    "tables": ["0", '"no"', "[]"],
}


FOLDS = "encode, rows, cols, decode"
ALLOWED = {
    "summary": "a sentence",
    "folds": f"a list of {FOLDS}",
    "groups": "'divisors' or a list of whole numbers above 0",
    "measure": f"one of {', '.join(names())}",
    "normalize": "one of absolute, relative",
    "aggregate": "one of max, sum, uniform, ratio",
    "power": "a number above 0 and at most 64",
    "price": f"one of {', '.join(prices())}",
    "temperature": "a number above 0 and at most 64",
    "tables": "true or false",
}
ITEMS = {
    **dict.fromkeys(['["encode", "diagonal"]', "[1]", "[[]]", '["ENCODE"]'], f"one of {FOLDS}"),
    **dict.fromkeys(["[0]", "[-1]", "[1.0]", "[true]", '["1"]'], "a whole number above 0"),
}
"""What is allowed where one item of a list is wrong, the last one."""


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_told_with_its_key(key, value):
    allowed = ALLOWED[key]
    if value in ITEMS:
        key, allowed = f"{key}[{value.count(',')}]", ITEMS[value]
    with pytest.raises(RecipeError) as caught:
        parse(**{key.split("[")[0]: value})
    message = str(caught.value)
    assert message.startswith(f"The recipe test is wrong: {key} is ")
    assert message.endswith(f", but it must be {allowed}; correct it.")
    assert caught.value.exit_code == 2


def test_latency_is_no_price_as_there_is_no_formula_of_it():
    with pytest.raises(RecipeError, match="price is 'latency', but it must be one of params, macs, bytes; "):
        parse(price='"latency"')


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"aggregate": '"max"', "power": "2"},
            "power is 2.0 and needs aggregate 'sum', but aggregate is 'max'",
        ),
        (
            {"aggregate": '"uniform"', "price": '"macs"'},
            "price is 'macs' and needs aggregate 'sum', but aggregate is 'uniform'",
        ),
        (
            {"recover": "true"},
            "recover is true and needs factors 'activations', but factors is 'weights'",
        ),
        ({"temperature": "0.5"}, "temperature is 0.5 and needs aggregate 'ratio', but aggregate is 'sum'"),
        (
            {"aggregate": '"ratio"', "temperature": "0.5"},
            "temperature is 0.5 and needs factors 'activations', but factors is 'weights'",
        ),
        *(
            (
                {"factors": '"activations"', key: "true"},
                f"{key} is true and needs measure 'activation' or 'output', but measure is 'spectral'",
            )
            for key in ("narrow", "share")
        ),
        (
            {"factors": '"scaled"'},
            "factors is 'scaled' and needs measure 'activation' or 'output', but measure is 'spectral'",
        ),
        (
            {"factors": '"scaled"', "measure": '"output"', "narrow": "true"},
            "narrow is true and needs factors 'activations', but factors is 'scaled'",
        ),
    ],
)
def test_keys_that_mean_nothing_beside_the_others_are_told(keys, told):
    with pytest.raises(RecipeError) as caught:
        parse(**keys)
    assert str(caught.value) == f"The recipe test is wrong: {told}; correct it."


@pytest.mark.parametrize("key", ["fold", "Measure", "recovery", "name", "relative", '"a b"', "table.key"])
def test_an_unknown_key_is_told_with_the_known_ones(key):
    with pytest.raises(
        RecipeError, match=r"^The recipe test is wrong: it has an unknown key .*, the keys are .*folds"
    ) as caught:
        parse(**{key: "1"})
    assert key.strip('"').split(".")[0] in str(caught.value)


@pytest.mark.parametrize("key", BASE)
def test_a_missing_key_is_told(key):
    lines = [f"{other} = {value}" for other, value in BASE.items() if other != key]
    with pytest.raises(
        RecipeError, match=rf"^The recipe test is wrong: it lacks the key '{key}'; correct it\.$"
    ):
        recipes.parse("\n".join(lines), "test")


@pytest.mark.parametrize(
    "broken",
    [
        "folds =",
        "= 1",
        "[",
        'folds = ["encode"]\nfolds = ["rows"]',
        "\x00",
        '\ufeffsummary = "x"',
        'summary = "\\ud800"',
        "groups = " + "[" * 100_000,
        "power = " + "9" * 5000,
    ],
    ids=range(9),
)
def test_text_that_is_no_toml_is_told(broken):
    with pytest.raises(
        RecipeError, match=r"^The recipe test is wrong: it is not valid TOML \(.*; correct it\.$"
    ):
        recipes.parse(broken, "test")


# --- files ----------------------------------------------------------------------------------------

SHIPPED = {"alds", "alds-plus", "svd", "svd-energy", "l-rank", "power"}


def test_the_recipes_of_the_design_ship():
    found = {recipe.name: recipe for recipe in recipes.load_all()}
    assert set(found) >= SHIPPED
    assert all(recipes.load(name) == recipe for name, recipe in found.items())


@pytest.mark.parametrize(
    ("name", "folds", "groups", "measure", "relative", "aggregate", "power", "price"),
    [
        ("alds", (Fold.ENCODE,), None, "spectral", True, Aggregate.MAX, 1, None),
        ("alds-plus", tuple(Fold), None, "spectral", True, Aggregate.MAX, 1, None),
        ("svd", (Fold.ENCODE,), (1,), "spectral", True, Aggregate.UNIFORM, 1, None),
        ("svd-energy", (Fold.ENCODE,), (1,), "nuclear", True, Aggregate.MAX, 1, None),
        ("l-rank", (Fold.ROWS,), (1,), "frobenius", False, Aggregate.SUM, 1, "macs"),
        ("power", tuple(Fold), None, "spectral", True, Aggregate.SUM, 4, None),
    ],
)
def test_a_shipped_recipe_is_what_the_design_says(
    name, folds, groups, measure, relative, aggregate, power, price
):
    found = recipes.load(name)
    assert found.name == name
    assert found.summary.endswith(".")
    assert (found.folds, found.groups) == (folds, groups)
    assert (found.measure, found.relative) == (measure, relative)
    assert (found.aggregate, found.power, found.price) == (aggregate, power, price)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text(power="2"), encoding="utf-8")
    assert recipes.load(path) == recipes.load(str(path)) == recipes.parse(text(power="2"), "mine")


@pytest.mark.parametrize("name", ["aldz", "", "no/such", Path("none")])
def test_a_recipe_that_is_not_there_is_told_with_those_that_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^There is no recipe .*: name a \.toml file or one of .*\balds\b"):
        recipes.load(name)


@pytest.mark.parametrize("name", ["alds.toml", "no/such.toml", Path("none.toml")])
def test_a_file_that_is_not_there_is_told_by_its_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        recipes.load(name)
    start = f"The recipe {Path(name)} does not exist: check the path, or name one of activation, alds, "
    assert str(caught.value).startswith(start)


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml is no file: check the path"):
        recipes.load(tmp_path / "folder.toml")


def test_a_wrong_file_is_told_with_its_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text(power="0"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert str(caught.value).startswith(f"The recipe {path} is wrong: power is 0, but it must be ")


def test_a_binary_file_is_no_recipe(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00summary")
    with pytest.raises(
        RecipeError, match=r"binary\.toml cannot be read \(it is not UTF-8 text\): check the path"
    ):
        recipes.load(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("narrow = true", "narrow is true and needs factors 'activations'"),
        ('narrow = true\nfactors = "activations"\nprice = "macs"', "cannot narrow layers"),
        ("share = true", "share is true and needs factors 'activations'"),
        ('share = true\nfactors = "activations"\nprice = "macs"', "cannot share encoders"),
    ],
)
def test_a_recipe_that_cannot_bind_layers_is_refused(extra, message):
    text = f'summary = "s"\nfolds = ["encode"]\ngroups = [1]\naggregate = "sum"\n{extra}\n'
    with pytest.raises(RecipeError, match=message):
        recipes.parse(text, "r")


def test_which_recipes_bind_layers():
    bound = {key: {r.name for r in recipes.load_all() if getattr(r, key)} for key in ("narrow", "share")}
    assert bound == {"narrow": {"activation", "output", "modegpt"}, "share": {"activation", "output"}}


README = (Path(__file__).parents[2] / "passes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ("| recipe | folds |", {recipe.name for recipe in recipes.load_all()} | {"auto"}),
        ("| key | values |", set(recipes._Recipe.__struct_fields__)),
    ],
)
def test_the_documentation_lists_all_recipes_and_keys(head, names):
    _, *rows = README[README.index(head) :].split("\n\n")[0].splitlines()[1:]
    assert {row.split("`")[1] for row in rows} == names


def test_a_recipe_without_folds_narrows():
    keys = {"folds": "[]", "factors": '"activations"', "measure": '"activation"', "narrow": "true"}
    assert parse(**keys).folds == ()
