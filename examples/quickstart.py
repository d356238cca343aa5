"""The whole pipeline on an artificial dataset, in Python: `python examples/quickstart.py [FOLDER]`."""

import sys
import tempfile
from pathlib import Path

import bioscan


def main(folder: Path) -> None:
    """Make a dataset, count, split, train, predict, evaluate; everything lands in the folder."""
    data, catalogue, split = folder / "data", folder / "catalogue.parquet", folder / "split.parquet"

    # An artificial dataset in the layout of BIOSCAN-1M; with the real one, start at the next step.
    bioscan.synthesize(data, bioscan.SynthesisSettings(specimens=600, seed=1))
    images = bioscan.Images(data / "bioscan/images/original_256")

    # Metadata: a catalogue is one Parquet file, a table is a Polars frame, missing is null.
    bioscan.import_metadata(data / "BIOSCAN_Insect_Dataset_metadata.tsv", catalogue)
    frame = bioscan.read_metadata(catalogue)
    print(bioscan.summarise(frame).ranks.select("rank", "taxa", "labelled", "largest_taxon", "imbalance"))

    # Roles by the paper's rule.
    splits = bioscan.make_splits(frame, seed=1, medium=400, small=200)
    bioscan.write_catalogue(frame.with_columns(splits.roles.get_columns()), split)

    # Train, name the validation and test specimens, score.
    settings = bioscan.TrainSettings(model="test_resnet", image_size=72, crop_size=64, epochs=2)
    bioscan.train(split, images, folder / "run", settings)
    bioscan.predict(folder / "run", split, folder / "predictions.parquet", images=images)
    evaluation = bioscan.evaluate(folder / "predictions.parquet", split)
    print("macro top-1:", evaluation.metrics["top_1"]["macro"])

    # Or a loop of your own.
    dataset = bioscan.SpecimenDataset.from_catalogue(split, images, role="train", image_size=72, crop_size=64)
    image, target = dataset[0]
    print(len(dataset), "specimens;", tuple(image.shape), dataset.classes[target])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
