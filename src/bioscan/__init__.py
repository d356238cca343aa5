"""BIOSCAN-1M end to end: metadata, statistics, splits, images, crops, training, predictions, evaluation.

The names below are the library; each is loaded when it is first used, so that `import bioscan` stays light.
"""

import importlib
from importlib.metadata import version
from typing import Any

__version__ = version("bioscan")

_NAMES = {
    "read_metadata": "bioscan.data.metadata",
    "import_metadata": "bioscan.data.metadata",
    "export_metadata": "bioscan.data.metadata",
    "write_catalogue": "bioscan.data.metadata",
    "summarise": "bioscan.jobs.summary",
    "make_splits": "bioscan.analysis.splits",
    "Taxonomy": "bioscan.analysis.taxonomy",
    "Images": "bioscan.data.images",
    "download": "bioscan.data.downloads",
    "convert": "bioscan.jobs.convert",
    "resize": "bioscan.jobs.resize",
    "ResizeSettings": "bioscan.data.preprocess",
    "crop": "bioscan.jobs.crop",
    "CropSettings": "bioscan.data.preprocess",
    "find_insect": "bioscan.data.localise",
    "find_insects": "bioscan.data.localise",
    "read_boxes": "bioscan.data.boxes",
    "evaluate_crops": "bioscan.jobs.evaluate_crops",
    "train_detector": "bioscan.jobs.train_detector",
    "DetectorSettings": "bioscan.learn.detector_settings",
    "load_detector": "bioscan.learn.detection",
    "synthesize": "bioscan.data.synthesis",
    "SynthesisSettings": "bioscan.data.synthesis",
    "SpecimenDataset": "bioscan.learn.dataset",
    "TrainSettings": "bioscan.learn.settings",
    "train": "bioscan.jobs.train",
    "predict": "bioscan.jobs.predict",
    "calibrate": "bioscan.jobs.calibrate",
    "evaluate": "bioscan.jobs.evaluate",
    "evaluate_ranks": "bioscan.jobs.evaluate",
    "evaluate_hierarchy": "bioscan.jobs.evaluate_hierarchy",
    "evaluate_open_set": "bioscan.jobs.open_set",
    "compare": "bioscan.jobs.compare",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'bioscan' has no attribute '{name}'")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
