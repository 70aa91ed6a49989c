"""Dual-stream multiple-instance classification of CT and MR volumes from bags of slices, as a MONAI bundle.

This module exports what the YAML configs name. The names are imported on first use: a script that needs no network then
starts without PyTorch, and `python -m bundle.data.datalist` runs a module that was not imported before.
Research use only; not for diagnosis.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "calibrate": "CalibrateWeights",
    "data.augment": "RandBagAffined RandSliceIntensityd",
    "data.cache": "open_cache",
    "data.cases": "inference_cases labelled_cases split_of",
    "data.collate": "collate_bags",
    "data.dataset": "BagDataset BagSampler watched",
    "data.loader": "CaseLoader",
    "data.reader": "LoadImageStrictd",
    "data.sampling": "AllSlicesd RandomSlicesd StratifiedSlicesd UniformSlicesd",
    "data.transforms": "AddNeighboursd DropBlankSlicesd ResizeAndPadd VolumeToBagd",
    "data.views": "RandSliceAffined RandSliceCutoutd TwoViewsd",
    "data.volume_transforms": (
        "CheckVolumed CropToForegroundd OrientForSlicingd ResampleVolumed ScaleForegroundPercentilesd ScaleWindowd"
    ),
    "data.policy": "ReaderPolicy SeriesRules",
    "errors": "InputError Refusal plain_errors",
    "model.bag_network": "BagOutput Evidence",
    "model.baselines": "GatedAttentionMIL MeanPoolMIL MonaiMIL",
    "model.conv_encoder": "ConvEncoder",
    "model.encoder": "FrozenBatchNorm2d load_encoder_weights with_norm",
    "model.encoding": "SliceEncoding",
    "model.ensemble": "EnsembleNetwork",
    "model.inference": "for_inference",
    "model.network": "DualStreamMIL",
    "model.projection": "ProjectedViews",
    "model.selection": (
        "EntmaxSelection GumbelSelection HardSelection MeanSelection SoftSelection StraightThroughSelection "
        "TopKSelection TwoPhaseSelection"
    ),
    "model.volume_net": "VolumeNet",
    "processes": "refuse_several use_own_gpu",
    "provenance": "made_from",
    "recipe": "Recipe",
    "results.progress": "CaseProgressBar",
    "results.run_folder": "RunFolder",
    "results.writer": "DrawKeySlices WriteMetrics WriteRecords exit_status",
    "settings": "check_config check_held_out check_start choose run_settings",
    "training.averaging": "AverageWeights ReturnWeights",
    "training.checkpoint": "BestModel Checkpoint EarlyStop",
    "training.distributed": ("BagBatches data_parallel end_group is_first local_device own_share start_group"),
    "training.engine": "BagEvaluator BagTrainer autocast_dtype",
    "training.features": "check_features frozen_features",
    "training.handlers": (
        "AnnealTemperature BagProgressBar EpochScore GradientClip ScheduleRegularisation TwoPhaseSwitch named_scores"
    ),
    "training.log": "EpochLog",
    "training.mixing": "MixBags",
    "training.losses": "BagCrossEntropy DualStreamLoss MILFocalLoss",
    "training.pretraining": "LogTerms ViewTrainer save_encoder",
    "training.run": "finish_training start_network tell_batch_norm tell_draws",
    "training.schedules": (
        "CosineTemperature ExponentialTemperature LinearWeight PrescribedTemperature parameter_groups warmup_cosine"
    ),
    "training.stability": "StabilityRecorder",
    "training.vicreg": "VICRegLoss",
    "weights": "load_network",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bundle' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
