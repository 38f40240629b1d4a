"""Training a detector from a folder of normal images: `train(TrainConfig(minutes=30), Automatic(), data, out)`."""

from dfengine.training.config import TrainConfig
from dfengine.training.loop import TrainResult, train
from dfengine.training.outputs import run_folder_of
from dfengine.training.plan import Automatic
from dfengine.training.state import TrainingInterrupted
from dfengine.training.trainer import TrainingDiverged

__all__ = [
    "Automatic", "TrainConfig", "TrainResult", "TrainingDiverged", "TrainingInterrupted", "run_folder_of", "train",
]
