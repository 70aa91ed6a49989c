"""MONAI's bundle commands and the package, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig

from bundle.errors import InputError, command_line, input_error_behind
from bundle.model.network import DualStreamMIL
from bundle.package import DEFAULT_NAME, main, make_package
from bundle.recipe import Recipe
from bundle.weights import load_network, save_atomically

from .conftest import ROOT, environment

pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),  # MONAI's word on trust, at every config
    pytest.mark.filterwarnings("ignore:No hash value provided"),  # of the schema file that a user names
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
SCHEMA = ROOT / "tests" / "workflows" / "metadata_schema.json"
CKPT_EXPORT = ["-m", "monai.bundle", "ckpt_export", "--config_file", "configs/inference.json", "--key_in_ckpt", "model"]
DYNAMIC = {
    "input_names": ["image"],
    "output_names": ["pred"],
    "dynamic_axes": {"image": {0: "bags", 1: "slices"}, "pred": {0: "bags"}},
}


def run(*command: str, cwd: Path, status: int = 0, path: str = "") -> subprocess.CompletedProcess[str]:
    """A command of this Python with only `path` on PYTHONPATH."""
    variables = {**environment(), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


@pytest.fixture(scope="module")
def package(trained, tmp_path_factory) -> Path:
    """The folder that `scripts/package MODEL OUT` makes."""
    out = tmp_path_factory.mktemp("out")
    done = run("-m", "bundle.package", str(trained / "model.pt"), str(out), cwd=ROOT)
    assert f"{out / DEFAULT_NAME}: run it from there with" in done.stdout
    assert str(out / f"{DEFAULT_NAME}.zip") in done.stdout
    assert done.stderr == ""
    return out / DEFAULT_NAME


@pytest.fixture(scope="module")
def alone(package, tmp_path_factory) -> Path:
    """The zip unpacked elsewhere, as a collaborator gets it; tests may write into it."""
    folder = tmp_path_factory.mktemp("collaborator")
    with zipfile.ZipFile(package.with_suffix(".zip")) as file:
        file.extractall(folder)
    return folder / DEFAULT_NAME


@pytest.fixture(scope="module")
def network(trained) -> DualStreamMIL:
    weights = trained / "model.pt"
    return load_network(Recipe.load(weights).build("network_def"), weights).eval()


@pytest.fixture
def in_repository(monkeypatch) -> ModuleType:
    """MONAI's commands as functions, where starting a process for each would only take time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what plain_errors sets
    return monai.bundle


def bags(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# --- the package ---


def test_package_holds_what_it_needs_and_nothing_else(package):
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bundle").rglob("*.py")}
    configs = {
        f"configs/{name}"
        for name in (
            "train.json",
            "multi_gpu_train.json",
            "evaluate.json",
            "inference.json",
            "metadata.json",
            "logging.conf",
        )
    }
    fixed = {"LICENSE", "CITATION.cff", "constraints.txt", "requirements.txt", "models/model.pt", "docs/README.md"}
    assert files >= code | configs | fixed
    assert all(name.startswith("docs/") for name in files - code - configs - fixed)
    with zipfile.ZipFile(package.with_suffix(".zip")) as file:
        assert sorted(file.namelist()) == sorted(f"{DEFAULT_NAME}/{name}" for name in files)
        assert file.read(f"{DEFAULT_NAME}/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "monai" in (package / "requirements.txt").read_text()


def test_packaged_configs_stand_alone(package, trained):
    recipe = Recipe.load(trained / "model.pt")
    for name in ("train", "evaluate", "inference"):
        text = (package / "configs" / f"{name}.json").read_text()
        assert '"%' not in text  # a macro would read another file
        assert str(ROOT) not in text
        assert str(trained) not in text
    inference = json.loads((package / "configs" / "inference.json").read_text())
    assert inference["network_def"] == recipe["network_def"]
    assert inference["preprocessing"]["transforms"] == [*recipe["preparation"], recipe["eval_sampling"]]
    assert not any(
        mark in json.dumps(inference[key]) for key in ("network_def", "preprocessing") for mark in ('"$', '"@')
    )
    assert isinstance(json.loads((package / "configs" / "train.json").read_text())["train"]["handlers"], list)


def test_packaged_train_describes_the_weights_and_still_takes_settings(package, trained):
    recipe = Recipe.load(trained / "model.pt")
    config = json.loads((package / "configs" / "train.json").read_text())
    assert Recipe.of_parser(ConfigParser(config)).config == recipe.config
    changed = Recipe.of_parser(ConfigParser({**config, "selection": "hard", "neighbours": 1, "norm": "group"}))[
        "network_def"
    ]
    assert changed["selection"] == {"_target_": "bundle.HardSelection"}
    assert changed["encoder"]["norm"] == "group"
    assert changed["num_channels"] == changed["encoder"]["encoder"]["n_input_channels"] == 3
    assert changed["num_features"] == 32


def test_packaged_metadata_tells_of_the_weights(package, trained):
    metadata = json.loads((package / "configs" / "metadata.json").read_text())
    data = metadata["network_data_format"]
    assert data["inputs"]["image"]["spatial_shape"] == [1, 32, 32]
    assert data["outputs"]["pred"]["num_channels"] == 2
    assert data["outputs"]["pred"]["channel_def"] == {
        "0": "logit of the class 'negative'",
        "1": "logit of the class 'positive'",
    }
    assert metadata["weights"]["recipe"] == f"sha256:{Recipe.load(trained / 'model.pt').hash}"
    assert "Classes: negative, positive" in (package / "docs" / "README.md").read_text()


def test_same_input_gives_the_same_bytes(package, trained, tmp_path):
    _, again = make_package(trained / "model.pt", tmp_path / "made" / "out")
    assert again.read_bytes() == package.with_suffix(".zip").read_bytes()


@pytest.mark.slow
def test_a_package_makes_packages(alone, trained, tmp_path):
    run("-m", "bundle.package", str(trained / "model.pt"), str(tmp_path), cwd=alone)
    for path in (path for path in (tmp_path / DEFAULT_NAME).rglob("*") if path.is_file()):
        assert path.read_bytes() == (alone / path.relative_to(tmp_path / DEFAULT_NAME)).read_bytes(), path.name


def test_packaged_inference_runs_with_nothing_else_on_the_path(alone, cohort, trained, tmp_path, in_repository):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("c00.nii.gz", "c01.nii.gz"):
        shutil.copy(cohort / "images" / name, scans)
    options = ["--dataset_dir", str(scans), "--progress", "false", "--device", "cpu"]
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    done = run(*command, "--output_dir", str(tmp_path / "a"), cwd=alone)
    assert "2 cases classified, 0 refused" in done.stdout
    settings = {"dataset_dir": str(scans), "progress": False, "device": "cpu", "logging_file": False}
    settings |= {"weights": str(trained / "model.pt"), "output_dir": str(tmp_path / "b")}
    in_repository.run(config_file="configs/inference.yaml", **settings)
    assert (tmp_path / "a" / "predictions.csv").read_bytes() == (tmp_path / "b" / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_packaged_evaluate_and_train_run(alone, cohort, tmp_path):
    options = ["--dataset_dir", str(cohort), "--progress", "false", "--device", "cpu", "--output_dir", str(tmp_path)]
    run("-m", "monai.bundle", "run", "--config_file", "configs/evaluate.json", *options, "--resamples", "50", cwd=alone)
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["scores"]["auc"]
    epochs = ["--max_epochs", "1", "--warmup_epochs", "0"]
    run("-m", "monai.bundle", "run", "--config_file", "configs/train.json", *options, *epochs, cwd=alone)
    assert Recipe.load(tmp_path / "model.pt")["network_def"]["num_features"] == 32


LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {package!r})
import monai.bundle, torch
expected = torch.load({weights!r}, weights_only=True)["model"]
for arguments in ({{}}, {{"key_in_ckpt": "model"}}, {{"workflow_type": "inference"}}):
    network = monai.bundle.load({name!r}, bundle_dir={out!r}, source="github", device="cpu", **arguments)
    state = network.state_dict()
    assert type(network).__name__ == "DualStreamMIL" and state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items()), arguments
workflow = monai.bundle.create_workflow(
    config_file={package!r} + "/configs/inference.json", workflow_type="inference", dataset_dir={scans!r}
)
assert workflow.check_properties() == []
assert workflow.bundle_root == {package!r}
loaded = workflow.parser.get_parsed_content("network").state_dict()
assert all(torch.equal(loaded[key].cpu(), value) for key, value in expected.items())
assert sys.modules["bundle"].__file__.startswith({package!r})
print("loaded")
"""


def test_monai_load_gives_the_network_with_its_weights(alone, cohort, trained, tmp_path):
    script = LOAD.format(
        package=str(alone),
        weights=str(trained / "model.pt"),
        name=alone.name,
        out=str(alone.parent),
        scans=str(cohort / "images"),
    )
    assert run("-c", script, cwd=tmp_path).stdout.rstrip().endswith("loaded")


def test_a_static_definition_that_is_not_the_weights_is_refused(package, trained, tmp_path, in_repository):
    recipe = Recipe.load(trained / "model.pt")
    config = json.loads((package / "configs" / "inference.json").read_text())
    assert recipe.disagreements(config, config) == []
    changed = json.loads(json.dumps(config))
    changed["network_def"]["encoder"]["norm"] = "group"
    changed["preprocessing"]["transforms"].pop()
    first, second = recipe.disagreements(changed, changed)
    assert first == "network_def::encoder::norm is 'group' in the config, but the weights were trained with 'batch'"
    assert second.startswith("preprocessing::transforms is [")
    other = tmp_path / "model.pt"
    another = Recipe({**recipe.config, "network_def": changed["network_def"]})
    content = torch.load(trained / "model.pt", weights_only=True)
    save_atomically({**content, "recipe": another.text, "recipe_hash": another.hash}, other)
    settings = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "logging_file": False}
    with pytest.raises(RuntimeError) as error:
        in_repository.run(
            config_file=str(package / "configs" / "inference.json"),
            bundle_root=str(package),  # in this process `bundle` is the repository's
            weights=str(other),
            **settings,
        )
    assert "network_def::encoder::norm is 'batch' in the config" in str(input_error_behind(error.value))
    assert not (tmp_path / "out").exists()


def test_own_modules_travel_with_the_package(trained, tmp_path, monkeypatch):
    (tmp_path / "my_selection.py").write_text(
        "from bundle.model.selection import SoftSelection\n\n\nclass Mine(SoftSelection):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    content = torch.load(trained / "model.pt", weights_only=True)
    config = json.loads(content["recipe"])
    config["network_def"]["selection"] = {"_target_": "my_selection.Mine"}
    recipe = Recipe(config, ["my_selection"])
    save_atomically({**content, "recipe": recipe.text, "recipe_hash": recipe.hash}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="'my_selection.Mine' is no network or transform of a trusted"):
        make_package(tmp_path / "model.pt", tmp_path / "out")
    folder, _ = make_package(tmp_path / "model.pt", tmp_path / "out", "mine", ("my_selection", "tqdm"))
    assert (folder / "my_selection.py").read_text() == (tmp_path / "my_selection.py").read_text()
    assert json.loads((folder / "configs" / "inference.json").read_text())["trusted_modules"] == [
        "my_selection",
        "tqdm",
    ]
    assert "tqdm==" in (folder / "requirements.txt").read_text()
    train = json.loads((folder / "configs" / "train.json").read_text())
    assert Recipe.of_parser(ConfigParser(train), ["my_selection"]).config == recipe.config
    with pytest.raises(InputError, match="there is no module 'nowhere_to_be_found' to pack"):
        make_package(tmp_path / "model.pt", tmp_path / "out", "other", ("my_selection", "nowhere_to_be_found"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine", "mine.zip"]


def test_bad_input_of_the_package_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    model = trained / "model.pt"
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / DEFAULT_NAME).mkdir()
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / f"{DEFAULT_NAME}.zip").touch()
    before = sorted(tmp_path.rglob("*"))
    for arguments, sentence in {
        (tmp_path / "absent.pt", tmp_path / "o"): "there is no weights file",
        (tmp_path / "text.pt", tmp_path / "o"): "is no weights file, is damaged",
        (
            trained / "checkpoint.pt",
            tmp_path / "o",
        ): "checkpoint.pt holds no recipe; give the model.pt",
        (model, tmp_path / "text.pt"): "text.pt is a file; give the folder",
        (model, tmp_path / "text.pt" / "deeper"): "cannot write",
        (model, tmp_path / "taken"): "is already there: choose another --name or folder, or remove it",
        (model, tmp_path / "zipped"): "is already there",
        (model, tmp_path / "o", "../up"): "the name of a package holds letters",
    }.items():
        with pytest.raises(InputError, match=sentence) as error:
            make_package(*arguments)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("bundle.package._write_zip", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_package(model, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(sys, "argv", ["package", "absent.pt", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as end:
        command_line(main)
    assert end.value.code == 2
    sentence = "error: there is no weights file absent.pt; train first, or give the path of one\n"
    assert capsys.readouterr().err == sentence


def test_the_script_is_executable():
    assert os.access(ROOT / "scripts" / "package", os.X_OK)


# --- MONAI's commands ---


def test_metadata_is_verified_offline(alone):
    files = ["--meta_file", "configs/metadata.json", "--filepath", str(SCHEMA)]
    done = run("-m", "monai.bundle", "verify_metadata", *files, cwd=alone)
    assert "metadata is verified with no error" in done.stdout


def test_metadata_of_the_repository_is_verified_and_the_schema_refuses(tmp_path, in_repository):
    in_repository.verify_metadata(meta_file="configs/metadata.json", filepath=SCHEMA)
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    metadata["network_data_format"]["inputs"]["image"]["num_channels"] = "*"
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="'\\*' is not of type 'integer'"):
        in_repository.verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=SCHEMA)


def test_network_and_metadata_agree_in_the_repository(in_repository):
    files = {"config_file": "configs/train.yaml", "meta_file": "configs/metadata.json"}
    in_repository.verify_net_in_out("network_def", device="cpu", **files)
    with pytest.raises(ValueError, match="output channel number"):
        in_repository.verify_net_in_out("network_def", device="cpu", class_names=["a", "b", "c"], **files)


@pytest.mark.parametrize("config", ["inference", pytest.param("train", marks=pytest.mark.slow)])
def test_network_and_metadata_agree_in_the_package(alone, config):
    files = ["--config_file", f"configs/{config}.json", "--meta_file", "configs/metadata.json"]
    done = run("-m", "monai.bundle", "verify_net_in_out", "network_def", *files, cwd=alone)
    assert "data shape of network is verified with no error" in done.stdout


def assert_same_in_torchscript(path: Path, network: DualStreamMIL) -> None:
    scripted = torch.jit.load(path)
    image, mask = bags(2, 5, 1, 32, 32), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), network(image))
        torch.testing.assert_close(scripted(image, mask), network(image, mask))
        for ours, theirs in zip(network.explain(image, mask), scripted.explain(image, mask), strict=True):
            torch.testing.assert_close(theirs, ours)


def test_torchscript_of_the_package_equals_the_network(alone, network):
    run(*CKPT_EXPORT, cwd=alone)
    assert_same_in_torchscript(alone / "models" / "model.ts", network)


@pytest.mark.slow
def test_torchscript_of_the_repository_equals_the_network(trained, network, tmp_path, monai):
    files = ["--config_file", "configs/inference.yaml", "--ckpt_file", str(trained / "model.pt")]
    options = ["--weights", str(trained / "model.pt"), "--key_in_ckpt", "model"]
    monai("ckpt_export", *files, *options, "--filepath", str(tmp_path / "model.ts"))
    assert_same_in_torchscript(tmp_path / "model.ts", network)


@pytest.mark.slow
def test_scripting_entmax_is_refused_in_one_sentence(trained, tmp_path):
    content = torch.load(trained / "model.pt", weights_only=True)
    config = json.loads(content["recipe"])
    config |= {"selection": "entmax"}
    config["network_def"]["selection"] = {"_target_": "bundle.EntmaxSelection", "alpha": 1.5}
    recipe = Recipe(config)
    save_atomically({**content, "recipe": recipe.text, "recipe_hash": recipe.hash}, tmp_path / "model.pt")
    folder, _ = make_package(tmp_path / "model.pt", tmp_path / "out")
    done = run(*CKPT_EXPORT, cwd=folder, status=1)
    assert "\nerror: an entmax or sparsemax selection cannot be scripted: export it with" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert not (folder / "models" / "model.ts").exists()


def test_onnx_takes_bags_of_any_size(alone, network):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    files = ["--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json"]
    weights = ["--ckpt_file", "models/model.pt", "--key_in_ckpt", "model", "--filepath", "models/model.onnx"]
    options = ["--converter_kwargs", str(DYNAMIC)]
    run("-m", "monai.bundle", "onnx_export", "network_def", *files, *weights, *options, cwd=alone)
    session = onnxruntime.InferenceSession(str(alone / "models" / "model.onnx"), providers=["CPUExecutionProvider"])
    for num_bags in (1, 2):
        for num_slices in (1, 7, 16):
            image = bags(num_bags, num_slices, 1, 32, 32)
            (logits,) = session.run(["pred"], {"image": image.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(logits), network(image), rtol=0, atol=1e-4)


WORKFLOWS = {
    "train": "train",
    "evaluate": "infer",
    "inference": "infer",
    "packaged train": "train",
    "packaged evaluate": "infer",
    "packaged inference": "infer",
}


@pytest.mark.parametrize(("name", "kind"), WORKFLOWS.items(), ids=WORKFLOWS)
def test_every_property_is_there(cohort, trained, package, monkeypatch, name, kind):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what plain_errors sets
    workflow_name = name.removeprefix("packaged ")
    settings = {"dataset_dir": str(cohort), "output_dir": str(trained), "device": "cpu", "progress": False}
    if name != workflow_name:
        # In this process `bundle` is the repository's, so the package is told where it is.
        files, settings["bundle_root"] = [package / "configs" / f"{workflow_name}.json"], str(package)
    else:
        base = [] if workflow_name == "inference" else [ROOT / "configs" / "train.yaml", cohort / "tiny.yaml"]
        files = base if workflow_name == "train" else [*base, ROOT / "configs" / f"{workflow_name}.yaml"]
    if kind == "infer":
        settings["weights"] = str(trained / "model.pt")
    workflow = ConfigWorkflow([str(file) for file in files], workflow_type=kind, logging_file=False, **settings)
    workflow.initialize()
    assert workflow.check_properties() == []
    for title, entry in (TrainProperties if kind == "train" else InferProperties).items():
        assert entry[BundlePropertyConfig.ID] in workflow.parser, title
        if entry[BundleProperty.REQUIRED]:
            assert getattr(workflow, title) is not None, title
