"""Features of photographs, and the file that holds them."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn

from bioscan.data.embeddings import is_embeddings, read_embeddings, schema, write_embeddings
from bioscan.data.images import Images
from bioscan.errors import DataError, RequestError
from bioscan.learn import model_folder
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.embeddings import Backbone, backbone_sha256, features, num_features, open_backbone
from bioscan.learn.heads import head_of, replace_head

SPEC = ImageSpec(image_size=40, crop_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def network(outputs: int = 0, seed: int = 1) -> nn.Module:
    """A small timm network with random weights."""
    torch.manual_seed(seed)
    made: nn.Module = import_timm().create_model("test_resnet", num_classes=outputs).eval()
    return made


def backbone(outputs: int = 0) -> Backbone:
    """Ready to use."""
    made = network(outputs)
    return Backbone(made, "test_resnet", SPEC, backbone_sha256(made), None)


def part(path: Path, numbers: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Path:
    """One part of a file of embeddings; a row that begins with NaN has none."""
    kind = schema(numbers.shape[1], "float32")["embedding"]
    frame = pl.DataFrame(
        {
            "sampleid": [f"S{i}" for i in range(len(numbers))],
            "image_file": [f"{i}.jpg" for i in range(len(numbers))],
            "embedding": pl.Series(numbers, dtype=kind),
            "reason": [None] * len(numbers),
        }
    ).with_columns(pl.when(pl.Series(~np.isnan(numbers[:, 0]))).then("embedding").alias("embedding"))
    frame.write_parquet(path)
    return path


def test_embeddings_are_read_as_they_were_written_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioscan.data.embeddings._BATCH", 12)  # blocks of 4 rows
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=(n, 3)).astype(np.float32) for n in (7, 5))
    first[2] = np.nan
    target = tmp_path / "e.parquet"
    parts = [part(tmp_path / "a", first), part(tmp_path / "b", second)]
    record = {"backbone": "b", "weights_sha256": "w"}
    assert write_embeddings(parts, target, width=3, precision="float32", record=record) == 11
    made = read_embeddings(target)
    assert made.width == 3
    assert made.record["backbone"] == "b"
    assert made.keys["image_file"].to_list()[:3] == ["0.jpg", "1.jpg", "3.jpg"]
    whole = np.vstack([np.delete(first, 2, axis=0), second])
    rows = np.array([10, 0, 5, 5, 3])
    np.testing.assert_array_equal(made.rows(rows), whole[rows])
    np.testing.assert_array_equal(np.vstack([block for _, block in made.batches()]), whole)
    assert is_embeddings(target)


def test_what_is_no_file_of_embeddings_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file of embeddings"):
        read_embeddings(tmp_path / "e.parquet")
    other = tmp_path / "other.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(other)
    with pytest.raises(DataError, match="no embeddings that bioscan embed made"):
        read_embeddings(other)
    assert not is_embeddings(other)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(other.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as embeddings"):
        read_embeddings(cut)
    assert not is_embeddings(cut)


@pytest.fixture
def photographs(tmp_path: Path) -> Images:
    """Nine pictures, the fifth of them broken."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(9):
        pixels = generator.integers(256, size=(50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "4.png").write_bytes(b"no picture")
    return Images(folder, save_index=False)


def test_features_are_what_the_head_is_given(photographs: Images) -> None:
    made = backbone(outputs=6)
    rows = np.array([3, 0, 8])
    (start, values, errors), *rest = features(made, photographs, rows)
    assert (start, errors, rest) == (0, {}, [])
    for row, value in zip(rows, values, strict=True):  # by Pillow and the whole network
        picture = Image.open(photographs.file(int(row)))
        resized = picture.resize((48, 40), Image.Resampling.BILINEAR).crop((8, 4, 40, 36))
        pixels = (np.asarray(resized, np.float32) / 255 - SPEC.mean) / SPEC.std
        with torch.no_grad():
            expected = made.network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])
            found = head_of(made.network)(torch.from_numpy(value)[None])
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_size_of_the_batches_changes_nothing(photographs: Images, batch_size: int) -> None:
    rows = np.array([8, 7, 6, 5, 3, 2, 1])
    made = [block for _, block, _ in features(backbone(), photographs, rows, batch_size=batch_size)]
    single = [block for _, block, _ in features(backbone(), photographs, rows, batch_size=3)]
    np.testing.assert_allclose(np.vstack(made), np.vstack(single), atol=1e-5)


def test_a_photograph_that_cannot_be_read_is_a_row_without_numbers(photographs: Images) -> None:
    blocks = list(features(backbone(), photographs, np.array([3, 4, 5, 4]), batch_size=3))
    (_, values, errors), (start, _, later) = blocks
    assert np.isnan(values[1]).all()
    assert np.isfinite(values[[0, 2]]).all()
    assert list(errors) == [1]
    assert errors[1].name == "4.png"
    assert (start, list(later)) == (3, [3])


def test_features_that_are_not_finite_are_an_error(photographs: Images) -> None:
    made = backbone()
    with torch.no_grad():
        made.network.get_parameter("conv1.0.weight").fill_(torch.inf)
    ((_, _, errors),) = features(made, photographs, np.array([0, 1]))
    assert [error.reason for error in errors.values()] == ["features not finite"] * 2


def test_the_hash_of_a_backbone_is_that_of_its_weights_below_the_head() -> None:
    one, other, alone = network(5), network(9), network(0)
    alone.load_state_dict({k: v for k, v in one.state_dict().items() if k[:3] != "fc."})
    other.load_state_dict(alone.state_dict(), strict=False)
    assert backbone_sha256(one) == backbone_sha256(other) == backbone_sha256(alone)
    replace_head(other, 4, {"kind": "nearest", "size": 3})
    assert backbone_sha256(other) == backbone_sha256(one)
    with torch.no_grad():
        other.get_parameter("conv1.0.weight")[0, 0, 0, 0] += 1e-6
    assert backbone_sha256(other) != backbone_sha256(one)


def test_a_named_backbone_takes_the_sizes_of_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(network(1000).state_dict(), weights)
    usual = open_backbone("test_resnet", weights=str(weights)).spec
    assert (usual.crop_size, usual.image_size) == (160, 168)  # timm: 3 x 160 x 160, crop_pct 0.95
    made = open_backbone("test_resnet", weights=str(weights), crop_size=64)
    assert (made.spec.crop_size, made.spec.image_size) == (64, 67)
    assert num_features(made) == 96
    smaller = open_backbone("test_resnet", weights=str(weights), image_size=80).spec
    assert (smaller.crop_size, smaller.image_size) == (80, 80)


def test_a_model_folder_is_a_backbone_with_its_own_sizes(tmp_path: Path) -> None:
    from bioscan.analysis.taxonomy import Taxonomy

    taxonomy = Taxonomy.build(pl.DataFrame({"order": ["A", "B"]}), ["order"])
    made = network(2)
    folder = tmp_path / "model"
    model_folder.save(
        folder, made.state_dict(), backbone="test_resnet", taxonomy=taxonomy, spec=SPEC, record={}, history=[]
    )
    found = open_backbone(folder)
    assert found.spec == SPEC
    assert found.weights_sha256 == backbone_sha256(made)
    assert found.model_sha256 == model_folder.load(folder).fingerprint
    with pytest.raises(RequestError, match="has its own weights and image size"):
        open_backbone(folder, crop_size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "none"}, "random weights make features that say nothing"),
        ({"image_size": 30, "crop_size": 60, "weights": "w.pt"}, "crop_size 60 is larger than image_size 30"),
        ({"weights": "absent.pt"}, "absent.pt"),
    ],
)
def test_a_backbone_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_backbone("test_resnet", **arguments)  # type: ignore[arg-type]
