"""How well each stream of the finished trainings of an arm ranks the test cases by itself.

python -m tests.study.streams OUTPUT_DIR/ARM …, from the repository root, where OUTPUT_DIR is that of a study or a
cross-validation; prints the AUC pooled over folds, mean over seeds, of both streams together and of each alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose

from bundle.data.cache import open_cache
from bundle.data.cases import labelled_cases
from bundle.data.collate import collate_bags
from bundle.data.dataset import BagDataset
from bundle.evaluation.scores import score
from bundle.recipe import Recipe
from bundle.study.piece import Piece
from bundle.training.engine import prepare_bags
from bundle.weights import load_network

STREAMS = {"both": "logits", "instance stream": "instance_stream_logits", "bag stream": "bag_stream_logits"}
Said = dict[str, tuple[int, np.ndarray]]  # case → label and probabilities


@torch.no_grad()
def said(folder: Path) -> dict[str, Said]:
    """Stream → what the weights of a piece say of the test cases of its fold."""
    config, weights = Piece.load(folder).config, folder / "model.pt"
    given = {key: config.get_parsed_content(key) for key in ("datalist", "dataset_dir", "fold", "cache_dir")}
    recipe = Recipe.load(weights)
    network = load_network(recipe.build("network_def"), weights).eval()
    cache = open_cache(given["cache_dir"], recipe["preparation"], 100.0, "uint16")
    cases = labelled_cases(given["datalist"], "test", given["fold"], given["dataset_dir"], recipe["class_names"])
    steps = Compose([*recipe.build("preparation"), recipe.build("eval_sampling")])
    found: dict[str, Said] = {stream: {} for stream in STREAMS}
    for bag in BagDataset(cases, steps, cache=cache, progress=False):
        image, label, (mask,), _ = prepare_bags(collate_bags([bag]), torch.device("cpu"))
        output = network.explain(image, mask)  # type: ignore[operator]
        for stream, name in STREAMS.items():
            found[stream][bag["case"]] = int(label), getattr(output, name).softmax(dim=-1)[0].numpy()
    return found


def main(arms: list[str]) -> None:
    """Print a row an arm."""
    print(f"{'AUC':32}" + "".join(f"{stream:>18}" for stream in STREAMS))
    for arm in map(Path, arms):
        if not any(arm.glob("*/piece.json")):
            raise SystemExit(f"{arm} holds no finished training: give the folder of an arm")
        seeds: dict[int, dict[str, Said]] = {}
        for folder in sorted(path.parent for path in arm.glob("*/piece.json")):
            pooled = seeds.setdefault(Piece.load(folder).settings["seed"], {stream: {} for stream in STREAMS})
            for stream, cases in said(folder).items():
                pooled[stream] |= cases
        aucs = []
        for stream in STREAMS:
            pools = [list(pooled[stream].values()) for pooled in seeds.values()]
            aucs.append(
                np.mean([
                    score("auc", np.array([y for y, _ in pool]), np.stack([p for _, p in pool])) for pool in pools
                ])
            )  # fmt: skip
        print(f"{arm.name:32}" + "".join(f"{value:18.3f}" for value in aucs), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
