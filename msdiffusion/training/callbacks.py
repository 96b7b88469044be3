"""Every callback that a run's config may name, under one roof: ``class_path: msdiffusion.training.callbacks.NAME``."""

from msdiffusion.training.local_sgd import WeightAveraging
from msdiffusion.training.run.checkpoints import AdapterExport, RunCheckpoint
from msdiffusion.training.run.failures import FailureGuard
from msdiffusion.training.run.pictures import PredictionPictures, ValidationPictures
from msdiffusion.training.run.progress import RunProgress
from msdiffusion.training.run.run_curves import RunCurves
from msdiffusion.training.run.world_scores import WorldScores

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
