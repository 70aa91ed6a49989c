"""Settings: checks of configs through MONAI's own parser, and the configs themselves."""

import json
import re
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

import bundle
from bundle.data.cases import split_of
from bundle.errors import InputError, input_error_behind
from bundle.recipe import RECIPE_KEYS, Recipe
from bundle.settings import (
    NOT_PART_OF_A_RUN,
    check_config,
    check_held_out,
    check_start,
    choose,
    config_in_use,
    run_settings,
)
from bundle.weights import save_atomically

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SHIPPED = """
imports: ["$import bundle"]
bundle_root: {root}
flag: true
rate: 0.1
count: 3
word: soft
folder: data
sizes: [1, 2]
nothing: null
computed: "$@count + 1"
definition: {{_target_: torch.nn.Linear, in_features: 2, out_features: "@count"}}
anything: {{_target_: bundle.BagTrainer, max_epochs: 3}}
any_arguments: {{_target_: builtins.dict, whatever: 1}}
section:
  inner: {{_target_: torch.nn.ReLU, inplace: false}}
  number: 5
  deeper: {{key: 1}}
empty: {{}}
checked: "$bundle.check_config('mini')"
kept: "$bundle.run_settings()"
"""


@pytest.fixture
def mini(tmp_path):
    """Makes a parser of a small bundle with some settings changed, as the command line changes them."""
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "mini.yaml"
    path.write_text(SHIPPED.format(root=tmp_path))

    def make(*overlays, **changes):
        parser = ConfigParser()
        parser.read_config([str(path), *map(str, overlays)])
        parser.update(changes)
        parser.get_parsed_content("imports")
        return parser

    return make


def problems(parser, key="checked"):
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it
        parser.get_parsed_content(key)
    found = input_error_behind(error.value)
    assert found is not None, error.value
    return str(found).splitlines()


def accepted(parser):
    parser.get_parsed_content("checked")
    return parser


def test_the_shipped_config_passes(mini):
    accepted(mini())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"flg": True}, "there is no setting 'flg'; did you mean 'flag'?"),
        ({"zzz": 1}, "there is no setting 'zzz'"),
        ({"section::numbr": 4}, "there is no setting 'section::numbr'; did you mean 'number'?"),
        ({"section::deeper::ky": 4}, "there is no setting 'section::deeper::ky'; did you mean 'key'?"),
        ({"definition::in_featurs": 4}, "'definition::in_featurs': torch.nn.Linear "
         "takes no such argument; did you mean 'in_features'?"),
        ({"section::inner::inplac": 1}, "'section::inner::inplac': torch.nn.ReLU "
         "takes no such argument; did you mean 'inplace'?"),
        ({"anything::max_epoch": 1}, "'anything::max_epoch': bundle.BagTrainer "
         "takes no such argument; did you mean 'max_epochs'?"),
        ({"definition::_target_": "torch.nn.Liner"}, "definition::_target_: "
         "there is nothing called 'torch.nn.Liner' to import"),
        ({"flag": "yes"}, "flag must be true or false, not 'yes'"),
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"section::inner::inplace": "maybe"}, "section::inner::inplace must be true or false, not 'maybe'"),
        ({"rate": "1e-4"}, "rate must be a number, not '1e-4'; in YAML write 1.0e-4, not 1e-4"),
        ({"rate": "fast"}, "rate must be a number, not 'fast'"),
        ({"rate": ""}, "rate must be a number, not ''"),
        ({"rate": True}, "rate must be a number, not True"),
        ({"rate": None}, "rate must be a number, not None"),
        ({"count": 2.5}, "count must be a whole number, not 2.5"),
        ({"count": "3"}, "count must be a whole number, not '3'"),
        ({"count": False}, "count must be a whole number, not False"),
        ({"sizes": 3}, "sizes must be a list, not 3"),
        ({"word": None}, "word must be text, not None"),
        ({"word": True}, "word must be text, not True"),
        ({"word": ["soft"]}, "word must be text, not ['soft']"),
        ({"definition": "Linear"}, "definition must be a definition, with _target_ and its arguments, not 'Linear'"),
        ({"section": 3}, "section must be a definition, with _target_ and its arguments, not 3"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(mini, change, sentence):
    assert problems(mini(**change)) == [sentence]


def test_all_wrong_settings_are_told_at_once(mini):
    assert len(problems(mini(flg=1, rate="x", count="y", zzz=0))) == 4


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"flag": "false"}, "flag", False),  # as Fire passes it; the string is truthy
        ({"flag": "False"}, "flag", False),
        ({"flag": "TRUE"}, "flag", True),
        ({"flag": False}, "flag", False),
        ({"rate": 1}, "rate", 1.0),
        ({"sizes": (4, 5)}, "sizes", [4, 5]),
        ({"folder": 2024}, "folder", "2024"),
        ({"nothing": 4}, "nothing", 4),
        ({"nothing": [1.0]}, "nothing", [1.0]),
        ({"count": 9}, "computed", 10),
        ({"computed": 7}, "computed", 7),
        ({"flag": "$1 > 2"}, "flag", False),
        ({"rate": "@count"}, "rate", 3),
        ({"word": "$'a' + 'b'"}, "word", "ab"),
        ({"any_arguments::other": 2}, "any_arguments", {"whatever": 1, "other": 2}),
        ({"definition::_desc_": "a comment"}, "count", 3),
        ({"empty": {"anything": 1}}, "count", 3),
        ({"definition": None}, "definition", None),
    ],
)
def test_values_take_the_kind_of_their_default(mini, change, key, value):
    found = accepted(mini(**change)).get_parsed_content(key)
    assert found == value
    assert type(found) is type(value)


def test_what_was_coerced_is_what_definitions_see(mini, tmp_path):
    parser = mini(flag="false", definition={"_target_": "builtins.dict", "on": "@flag", "text": "$str(@flag)"})
    accepted(parser)
    assert parser.get_parsed_content("definition") == {"on": False, "text": "False"}


def test_overlays_are_checked_like_the_command_line(mini, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("section::number: 6\ndefinition::bias: false\n")
    parser = accepted(mini(overlay))
    assert parser["section::number"] == 6
    assert parser.get_parsed_content("definition").bias is None
    overlay.write_text("section::nmber: 6\n")
    assert problems(mini(overlay)) == ["there is no setting 'section::nmber'; did you mean 'number'?"]


def test_a_bundle_root_without_configs(mini, tmp_path):
    (sentence,) = problems(mini(bundle_root=str(tmp_path / "configs")))
    assert sentence.startswith("bundle_root: there is no configs/mini.yaml or .json under")


def test_json_configs_of_a_package_are_found(mini, tmp_path):
    parser = mini(rate="x")
    content = yaml.safe_load((tmp_path / "configs" / "mini.yaml").read_text())
    (tmp_path / "configs" / "mini.yaml").unlink()
    (tmp_path / "configs" / "mini.json").write_text(json.dumps(content))
    assert problems(parser) == ["rate must be a number, not 'x'"]


def test_weights_are_held_against_the_config(mini, tmp_path):
    recipe = Recipe(
        {
            "word": "hard", "network_def": {"_target_": "torch.nn.ReLU"}, "preparation": [],
            "eval_sampling": {"_target_": "bundle.AllSlicesd"}, "threshold": 0.25,
        }
    )  # fmt: skip
    save_atomically({"model": {}, "recipe": recipe.text, "recipe_hash": recipe.hash}, tmp_path / "m.pt")
    check = f"$bundle.check_config('mini', weights='{tmp_path / 'm.pt'}')"
    mini(checked=check).get_parsed_content("checked")
    mini(checked=check, threshold=0.25).get_parsed_content("checked")  # the weights' own key is no unknown one
    assert problems(mini(checked=check, threshold=0.5)) == ["threshold is 0.5 in the config, but the weights hold 0.25"]
    assert problems(mini(checked=check, word="mean")) == [
        "word is 'mean' in the config, but the weights were trained with 'hard'"
    ]


def test_run_settings_hold_what_changes_a_result_and_nothing_else(mini):
    def settings(**changes):
        parser = mini(**changes)
        return accepted(parser).get_parsed_content("kept")

    usual = settings()
    assert usual["rate"] == "0.1"
    assert usual["sizes"] == "[1, 2]"
    assert json.loads(usual["definition"])["in_features"] == 2
    assert not set(usual) & set(NOT_PART_OF_A_RUN)
    assert settings(bundle_root=str(usual and mini()["bundle_root"])) == usual
    changed = settings(rate=0.2, flag="false")
    assert {key for key in changed if changed[key] != usual[key]} == {"rate", "flag"}
    assert changed["flag"] == "false"


@pytest.mark.parametrize("word", ["null", "None", None])
def test_what_may_be_null_is_set_so_by_a_word_too(mini, word, monkeypatch):
    monkeypatch.setattr(bundle.settings, "OPTIONAL", ("folder", "count"))
    parser = accepted(mini(folder=word, count=word))
    assert parser.get_parsed_content("folder") is None
    assert parser.config["count"] is None


def test_the_content_of_the_weights_to_start_from_is_part_of_a_run(tmp_path):
    class Parser(ConfigParser):
        def settings(self):
            return run_settings()

    path = tmp_path / "encoder.pt"
    seen = []
    for content in (b"one", b"other", b"one"):
        path.write_bytes(content)
        seen.append(Parser({"encoder_weights": str(path)}).settings())
    assert seen[0] == seen[2] != seen[1]


def test_functions_for_configs_refuse_other_callers():
    for function in (config_in_use, check_config, run_settings):
        with pytest.raises(RuntimeError, match="for expressions in a config of monai.bundle"):
            function()


def test_choose():
    options = {"soft": 1, "hard": 2}
    assert choose("hard", options) == 2
    with pytest.raises(InputError, match="selection must be one of soft, hard, not 'sot'; did you mean 'soft'?"):
        choose("sot", options, "selection")
    with pytest.raises(InputError, match="this setting must be one of soft, hard, not 3"):
        choose(3, options)  # type: ignore[arg-type]


# --- the configs of the bundle ---

WORKFLOWS = {
    "train": ["train"], "pretrain": ["train", "pretrain"], "evaluate": ["train", "evaluate"], "inference": ["inference"]
}  # fmt: skip
# Read by MONAI or by people who look for them there, rather than by another key.
READ_BY_MONAI = {"imports", "initialize", "run", "finalize", "bundle_root"}
# Only compared with the weights' recipe, or read from the config by name: see bundle.recipe.RECIPE_KEYS.
READ_BY_RECIPE = set(RECIPE_KEYS)


def merged(workflow) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.yaml") for name in WORKFLOWS[workflow]])
    return parser


def strings(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def references(config):
    """The identifiers that references and expressions name."""
    for text in strings(config):
        if text[:1] in "@$%":
            yield from re.findall(r"[@%]((?:\w|::)+)", text)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_reference_resolves(workflow):
    parser = merged(workflow)
    found = set(references(parser.config))
    assert len(found) > 10
    for name in found:
        assert name in parser, name


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_key_is_read(workflow):
    """MONAI accepts a key nobody reads; so would a reader of the config."""
    read = {name.split("::")[0] for name in references(merged(workflow).config)}
    # Of an overlay, what it adds; the rest is read by the workflow that it lies upon.
    own = yaml.safe_load((CONFIGS / f"{workflow}.yaml").read_text())
    dead = (
        {key.split("::")[0] for key in own} - read - READ_BY_MONAI - (READ_BY_RECIPE if workflow == "train" else set())
    )
    assert not dead


def test_keys_for_the_recipe_exist():
    assert set(merged("train").config) >= READ_BY_RECIPE


# Where the settings of a config end, of which each has a comment.
ENDS = {"train": "# --- definitions ---", "pretrain": "\nprojected:", "inference": "\nrecipe:"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_numbers_are_numbers_and_every_setting_has_its_reason(path):
    text = path.read_text()
    assert not re.findall(r":\s*[0-9]+e-?[0-9]+", text), "PyYAML reads 1e-4 as a string: write 1.0e-4"
    if path.stem not in ENDS:
        return
    definitions = text.index(ENDS[path.stem])
    settings = [line for line in text[:definitions].splitlines() if re.match(r"\w+: [^\s]", line)]
    assert len(settings) > 7
    for line in settings:
        key, value = line.split(": ", 1)
        if key not in ("bundle_root", "device") and not value.startswith("#"):
            assert "# " in value, f"{path.name}: {key} has no comment"


@pytest.mark.parametrize(
    "path",
    sorted(path for kind in ("data", "founding", "quick", "rival") for path in CONFIGS.glob(f"{kind}*.yaml")),
    ids=lambda path: path.stem,
)
def test_overlays_change_what_is_there(path):
    """A mistyped key, a value of another kind or an argument that nothing takes is refused, as on the command line."""
    overlay = yaml.safe_load(path.read_text())
    base = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert {key.split("::")[0] for key in overlay} <= set(base)
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml"), str(path)])
    parser.update({"bundle_root": str(ROOT), "checked": "$bundle.check_config('train')"})
    parser.get_parsed_content("imports")
    assert problems(parser) == ["there is no setting 'checked'"]  # this test's own, and nothing else


@pytest.mark.parametrize("names", ["train", "pretrain", "evaluate", "inference"])
def test_every_bundle_name_in_a_config_is_exported(names):
    text = (CONFIGS / f"{names}.yaml").read_text()
    used = set(re.findall(r"\bbundle\.([A-Za-z_]\w*)", text)) - {"run"}  # monai.bundle run, in a comment
    assert used <= set(bundle.__all__)


def test_every_export_is_for_a_config_or_for_people_who_write_one():
    text = "".join(path.read_text() for path in CONFIGS.glob("*.yaml"))
    used = set(re.findall(r"\bbundle\.([A-Za-z_]\w*)", text))
    for_python = {
        "BagOutput", "EpochScore", "FrozenBatchNorm2d", "InputError", "Refusal", "load_encoder_weights",
    }  # fmt: skip
    in_recipes = {"EnsembleNetwork"}  # of weights that scripts/ensemble makes
    assert set(bundle.__all__) - used <= for_python | in_recipes


def two_folds(tmp_path: Path, seed: int) -> Path:
    cases = [{"case": f"c{i}", "image": f"{i}.nii", "label": i % 2, "patient": f"p{i}"} for i in range(6)]
    names = [case["case"] for case in cases]
    folds = [
        {"training": names[:2], "validation": names[2:4], "test": names[4:]},
        {"training": names[4:], "validation": names[:2], "test": names[2:4]},
    ]
    path = tmp_path / f"{seed}.json"
    content = {"format": 1, "class_names": ["no", "yes"], "seed": seed, "num_folds": 2, "cases": cases}
    path.write_text(json.dumps({**content, "folds": folds}))
    return path


def test_weights_are_not_evaluated_on_another_fold_of_their_datalist(tmp_path, caplog):
    weights = tmp_path / "model.pt"
    save_atomically({"model": {}, "trained_on": split_of(two_folds(tmp_path, 0), 1)}, weights)
    check_held_out(weights, two_folds(tmp_path, 0), 1, "test")
    with pytest.raises(InputError, match="trained on fold 1 of this datalist.*set fold to 1"):
        check_held_out(weights, two_folds(tmp_path, 0), 0, "test")
    check_held_out(weights, two_folds(tmp_path, 1), 0, "test")
    assert "another datalist" in caplog.text


def test_locked_cases_are_in_no_fold_and_an_ensemble_may_be_of_several(tmp_path):
    weights, here = tmp_path / "model.pt", two_folds(tmp_path, 0)
    seen = split_of(here, 1)
    for folds in (1, [0, 1]):
        save_atomically({"model": {}, "trained_on": {**seen, "fold": folds}}, weights)
        check_held_out(weights, here, 0, "locked")
    with pytest.raises(InputError, match="ensemble over folds 0, 1 .* no fold whose test cases none .* section locked"):
        check_held_out(weights, here, 1, "test")


def test_an_encoder_of_another_fold_is_no_start(tmp_path):
    here, other = two_folds(tmp_path, 0), two_folds(tmp_path, 1)
    path = tmp_path / "encoder.pt"
    save_atomically({"encoder": {}, "trained_on": split_of(here, 1)}, path)
    check_start(path, here, 1)
    check_start(path, other, 0)  # nothing is known of another datalist
    check_start(None, here, 0)
    with pytest.raises(
        InputError, match="encoder_weights were trained on fold 1 of this datalist.*give weights of fold 0"
    ):
        check_start(path, here, 0)
    # What is wrong with these is told where they are loaded.
    (tmp_path / "text.pt").write_text("no weights")
    save_atomically({"conv1.weight": 3}, tmp_path / "foreign.pt")
    for name in ("text.pt", "foreign.pt", "absent.pt"):
        check_start(tmp_path / name, here, 0)
