"""Every callback that a run's config may name, under one roof: ``class_path: msdiffusion.training.callbacks.NAME``."""

from msdiffusion.training.checkpoints import AdapterExport, RunCheckpoint
from msdiffusion.training.failures import FailureGuard
from msdiffusion.training.local_sgd import WeightAveraging
from msdiffusion.training.pictures import PredictionPictures, ValidationPictures
from msdiffusion.training.progress import RunProgress
from msdiffusion.training.run_curves import RunCurves
from msdiffusion.training.world_scores import WorldScores

__all__ = [
    "AdapterExport",
    "FailureGuard",
    "PredictionPictures",
    "RunCheckpoint",
    "RunCurves",
    "RunProgress",
    "ValidationPictures",
    "WeightAveraging",
    "WorldScores",
]
