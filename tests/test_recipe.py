"""Recipes: literals of a config, rebuilt as they were, and nothing built that a file should not build."""

import json
import pdb
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

import bundle
from bundle.errors import InputError
from bundle.recipe import RECIPE_KEYS, Recipe
from bundle.weights import load_network, save_atomically

ROOT = Path(__file__).parents[1]
SMALL = {"encoder::layers": [1, 1, 1, 1], "encoder::block_inplanes": [8, 8, 16, 32], "num_features": 32}


def train_config(**changes) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "train.yaml"))
    parser.update({**SMALL, "device": "cpu", **changes})
    parser.get_parsed_content("imports")
    return parser


def recipe_of(**changes) -> Recipe:
    return train_config(**changes).get_parsed_content("recipe")


def target(path, **arguments):
    return Recipe({"preparation": [{"_target_": path, **arguments}]})


# --- of a config ---


def test_references_and_expressions_become_values():
    recipe = recipe_of(channels=["a", "b"], neighbours=1, image_size=[48, 32])
    network = recipe["network_def"]
    assert network["num_channels"] == 6
    assert network["encoder"]["encoder"]["n_input_channels"] == 6
    assert network["encoder"]["norm"] == recipe["norm"]
    assert network["num_features"] == 32
    assert recipe["preparation"][0]["policy"] == recipe["reader_policy"]
    assert recipe["reader_policy"]["series"]["_target_"] == "bundle.SeriesRules"
    assert recipe["preparation"][0]["channels"] == 2
    assert {"_target_": "bundle.ResizeAndPadd", "keys": "image", "size": [48, 32]} in recipe["preparation"]
    assert recipe["intensity"] in recipe["preparation"]
    assert not [text for text in ("$", "@", "%") if f'"{text}' in recipe.text]
    assert set(recipe.config) == set(RECIPE_KEYS)


def test_network_and_preparation_are_built_as_the_config_builds_them():
    parser = train_config(channels=["a", "b"], selection="top_k", top_k=3)
    torch.manual_seed(0)
    ours = parser.get_parsed_content("network_def")
    recipe = parser.get_parsed_content("recipe")
    torch.manual_seed(0)
    built = Recipe(json.loads(recipe.text)).build("network_def")
    assert repr(built) == repr(ours)
    assert built.selection.k == 3
    for name, value in ours.state_dict().items():
        assert torch.equal(built.state_dict()[name], value)
    assert [type(step) for step in recipe.build("preparation")] == [
        type(step) for step in parser.get_parsed_content("preparation")
    ]
    assert isinstance(recipe.build("eval_sampling"), bundle.AllSlicesd)
    assert recipe.build("network_def") is not recipe.build("network_def")


@pytest.mark.parametrize("selection", ["soft", "hard", "gumbel", "entmax", "two_phase", "mean"])
def test_only_the_chosen_selection_belongs_to_the_weights(selection):
    recipe = recipe_of(selection=selection)
    assert isinstance(recipe["network_def"]["selection"]["_target_"], str)
    assert "options" not in recipe.text


def test_an_expression_that_gives_no_plain_value_is_refused():
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it
        recipe_of(threshold="$torch.tensor(0.5)")
    found = bundle.errors.input_error_behind(error.value)
    assert "threshold: the expression '$torch.tensor(0.5)' gives a Tensor, which cannot be saved" in str(found)


def test_downloads_of_the_start_of_training_are_not_repeated():
    encoder = {"_target_": "monai.networks.nets.resnet18", "pretrained": "start.pt", "spatial_dims": 2}
    recipe = recipe_of(encoder=encoder)
    assert recipe["network_def"]["encoder"]["encoder"] == {**encoder, "pretrained": None}


def test_of_config_outside_a_config():
    with pytest.raises(RuntimeError, match="for expressions in a config"):
        Recipe.of_config()


# --- text, hash, file ---


def test_hash_is_of_the_content_and_not_of_its_order():
    first = Recipe({"norm": "group", "spacing": [1.0, 1.0, -1.0]})
    second = Recipe({"spacing": [1.0, 1.0, -1.0], "norm": "group"})
    assert (first.text, first.hash) == (second.text, second.hash)
    assert first.hash != Recipe({"norm": "batch", "spacing": [1.0, 1.0, -1.0]}).hash
    assert len(first.hash) == 64


def test_save_and_load(tmp_path):
    recipe = recipe_of()
    network = recipe.build("network_def")
    save_atomically(
        {"model": network.state_dict(), "recipe": recipe.text, "recipe_hash": recipe.hash}, tmp_path / "m.pt"
    )
    loaded = Recipe.load(tmp_path / "m.pt")
    assert loaded.config == recipe.config
    load_network(loaded.build("network_def"), tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": None}, "m.pt holds no recipe"),
        ({"recipe": '{"norm": "batch"}'}, "the recipe in m.pt does not match its hash: the file was changed"),
        ({"recipe_hash": None}, "does not match its hash"),
    ],
)
def test_changed_files_are_refused(tmp_path, change, sentence):
    recipe = Recipe({"norm": "group"})
    save_atomically({"model": {}, "recipe": recipe.text, "recipe_hash": recipe.hash, **change}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=sentence):
        Recipe.load(tmp_path / "m.pt")


def test_a_recipe_of_evil_with_the_right_hash_is_refused(tmp_path):
    import hashlib

    text = json.dumps({"network_def": {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}})
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_atomically({"model": {}, "recipe": text, "recipe_hash": digest}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="'os.system' is no network or transform of a trusted module"):
        Recipe.load(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_a_key_that_is_not_there():
    with pytest.raises(InputError, match="the recipe of these weights holds no 'threshold'"):
        Recipe({"norm": "group"})["threshold"]
    with pytest.raises(InputError, match="holds no 'network_def'"):
        Recipe({"norm": "group"}).build("network_def")


def test_weights_of_before_calibration_mean_what_they_meant():
    old = {"norm": "group", "threshold": 0.4, "network_def": {"_target_": "torch.nn.ReLU"}, "preparation": [],
           "eval_sampling": {"_target_": "bundle.AllSlicesd"}}  # fmt: skip
    recipe = Recipe(old)
    assert (recipe["calibration_temperature"], recipe["abstain_below"]) == (1.0, 0.0)
    assert recipe.config == old  # the hash in the file is of this
    base = {"calibration_temperature": 1.0, "abstain_below": 0.0, "threshold": 0.5}
    assert recipe.disagreements(base, base) == []
    assert recipe.disagreements({**base, "abstain_below": 0.7}, base) == [
        "abstain_below is 0.7 in the config, but the weights hold 0.0"
    ]


# --- what may be built ---

UNTRUSTED = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "pickle.loads",
    "runpy.run_path",
    "eval",
    "SaveImage",  # MONAI looks bare names up in its own tables
    # Through what trusted modules import themselves.
    "torch.nn.modules.module.sys.exit",
    "torch.nn.modules.module.torch.load",
    "torch.nn.functional.torch.hub.load",
    "bundle.weights.os.replace",
    "bundle.files.os.remove",
    "monai.networks.utils.torch.load",
    "monai.transforms.io.array.json.load",
    # Functions that write, read or call.
    "bundle.weights.save_atomically",
    "bundle.save_atomically",
    "bundle.files.write_json",
    "bundle.files.replacing",
    "bundle.errors.command_line",
    "bundle.load_network",
    "bundle.finish_training",
    "bundle.results.records.write_record",
    "bundle.data.phantom.main",
    "bundle.exit_status",
    "monai.networks.utils.convert_to_onnx",
    "monai.networks.utils.save_state",
    "monai.networks.nets.resnet.get_pretrained_resnet_medicalnet",
    "monai.networks.nets.hovernet.download_url",
    "torch.nn.init.normal_",
    # Classes that write, or that call what they are given by name.
    "bundle.WriteRecords",
    "bundle.Checkpoint",
    "bundle.BagDataset",
    "bundle.Recipe",
    "bundle.recipe.Recipe.load",
    "monai.transforms.LoadImage",
    "monai.transforms.LoadImaged",
    "monai.transforms.SaveImage",
    "monai.transforms.SaveImaged",
    "monai.transforms.WriteFileMapping",
    "monai.transforms.io.array.SaveImage",
    "monai.networks.trt_compiler.TrtCompiler",
    "torch.nn.Module.load_state_dict",
    # Modules, and names that lead nowhere.
    "torch.nn",
    "torch.nn.modules",
    "bundle",
    "bundle.nothing",
    "monai.networks.nets.ResNat",
    "",
    "torch.nn.",
]


@pytest.mark.parametrize("path", UNTRUSTED)
def test_untrusted_targets_are_refused(path):
    with pytest.raises(InputError, match="is no network or transform of a trusted module"):
        target(path)


@pytest.mark.parametrize("path", [None, 3, ["os.system"], {"_target_": "torch.nn.ReLU"}, nn.ReLU])
def test_a_target_is_a_name(path):
    with pytest.raises(InputError, match="is no network or transform"):
        Recipe({"network_def": {"_target_": path}})


@pytest.mark.parametrize(
    "path",
    [
        "bundle.DualStreamMIL",
        "bundle.with_norm",
        "bundle.choose",
        "bundle.SoftSelection",
        "bundle.ReaderPolicy",
        "bundle.LoadImageStrictd",
        "bundle.AllSlicesd",
        "bundle.DropBlankSlicesd",
        "monai.networks.nets.ResNet",
        "monai.networks.nets.resnet18",
        "monai.networks.nets.EfficientNetBN",
        "monai.networks.blocks.Convolution",
        "torch.nn.Sequential",
        "monai.transforms.Compose",
        "monai.transforms.ScaleIntensityRanged",
        "monai.transforms.CenterSpatialCropd",
        "monai.transforms.Spacingd",
        "monai.transforms.EnsureTyped",
    ],
)
def test_networks_and_transforms_are_trusted(path):
    assert target(path)["preparation"] == [{"_target_": path}]


def test_the_place_of_a_refused_target_is_named():
    with pytest.raises(InputError, match=r"recipe preparation::1::policy: 'os.system' is no"):
        Recipe({"preparation": [{}, {"policy": {"_target_": "os.system"}}]})
    with pytest.raises(InputError, match="recipe a::0::1"):
        Recipe({"a": [[1, "$1"]]})


@pytest.mark.parametrize("text", ["$import os", "$__import__('os').system('true')", "@device", "%other.yaml::key"])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"a": {"b": [0, t]}}, lambda t: (t,)])
def test_expressions_are_refused(text, wrap):
    with pytest.raises(InputError, match="a recipe holds plain values, not the expression"):
        Recipe({"threshold": wrap(text)})


def test_text_with_those_signs_inside_is_a_value():
    config = {"class_names": ["5 % of all", "me@here", "costs 5 $", " $1", ""]}
    assert Recipe(config).build("class_names") == config["class_names"]


@pytest.mark.parametrize("key", ["_mode_", "_debug_", "_anything_"])
def test_a_recipe_starts_no_debugger(key, monkeypatch):
    monkeypatch.setattr(pdb, "runcall", lambda *_, **__: pytest.fail("a debugger was started"))
    with pytest.raises(InputError, match=f"'{key}' is not allowed"):
        target("torch.nn.ReLU", **{key: "debug"})


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("monai.networks.nets.HoVerNet", {"pretrained_url": "https://example.org/w.pt"}),
        ("monai.networks.nets.resnet18", {"pretrained": True}),
        ("monai.networks.nets.TorchVisionFCModel", {"weights": "DEFAULT"}),
    ],
)
def test_a_recipe_downloads_nothing(path, arguments):
    with pytest.raises(InputError, match=f"'{next(iter(arguments))}' is not allowed; weights come from the file"):
        target(path, **arguments)
    target(path, **dict.fromkeys(arguments))  # switched off is fine


OWN = """
from torch import nn

class Encoder(nn.Linear):
    pass

def build(size):
    return nn.Linear(size, 2)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text(OWN)
    (tmp_path / "own_package" / "broken.py").write_text("raise ImportError('no such thing')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_package"
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_own_modules_are_let_in_by_name(own_module):
    config = {"network_def": {"_target_": "own_package.build", "size": 3}}
    with pytest.raises(InputError, match="if it is yours, add its module to trusted_modules"):
        Recipe(config)
    assert own_module not in sys.modules  # looking would have run it
    assert isinstance(Recipe(config, [own_module]).build("network_def"), nn.Linear)
    Recipe({"network_def": {"_target_": "own_package.Encoder"}}, [own_module])
    with pytest.raises(InputError, match="os.system"):
        Recipe({"network_def": {"_target_": "os.system"}}, [own_module])
    with pytest.raises(InputError, match="own_package.nn.functional.torch.load"):
        Recipe({"network_def": {"_target_": "own_package.nn.functional.torch.load"}}, [own_module])


def test_a_name_that_only_begins_alike_is_not_trusted(monkeypatch):
    module = ModuleType("bundle_evil")
    module.run = lambda: pytest.fail("it ran")
    monkeypatch.setitem(sys.modules, "bundle_evil", module)
    for path in ("bundle_evil.run", "torch.nnx.run"):
        with pytest.raises(InputError, match="is no network or transform"):
            target(path)


def test_an_own_module_that_cannot_be_imported_is_one_sentence(own_module):
    with pytest.raises(InputError, match=r"importing 'own_package.broken.Thing' failed: .*no such thing"):
        Recipe({"network_def": {"_target_": "own_package.broken.Thing"}}, [own_module])


# --- disagreements ---


def test_what_a_config_says_otherwise_is_named():
    recipe = recipe_of(norm="instance", spacing=[1.0, 1.0, -1.0])
    base = train_config().config
    assert recipe.disagreements(base, base) == []
    assert recipe.disagreements({**base, "spacing": [1.0, 1.0, -1.0]}, base) == []
    assert recipe.disagreements({**base, "norm": "group", "bag_size": 12}, base) == [
        "norm is 'group' in the config, but the weights were trained with 'instance'",
        "bag_size is 12 in the config, but the weights were trained with 64",
    ]
    assert recipe.disagreements({**base, "class_names": "$@recipe['class_names']"}, base) == []
    other = {"_target_": "monai.transforms.ScaleIntensityRanged", "keys": "image", "a_min": 0.0, "a_max": 80.0}
    (sentence,) = recipe.disagreements({**base, "intensity": other}, base)
    assert sentence.startswith("intensity is {'_target_': 'monai.transforms.ScaleIntensityRanged'")


def test_a_value_left_at_the_bundles_default_says_nothing():
    recipe, base = recipe_of(norm="group", bag_size=8), train_config().config
    assert recipe.disagreements(base, base) == []
