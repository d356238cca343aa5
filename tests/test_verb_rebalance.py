"""`bioscan rebalance`: another head on the same backbone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.data.images import Images
from bioscan.learn import model_folder
from bioscan.learn.compat import import_timm
from bioscan.learn.dataset import ImageSpec
from bioscan.learn.embeddings import Backbone, backbone_sha256, features
from bioscan.learn.heads import replace_head

Run = Callable[..., tuple[int, str, str]]
Paint = Callable[..., tuple[Path, Path]]
ORDERS = {"Diptera": (30, 6, 6), "Lepidoptera": (6, 6, 6), "Coleoptera": (3, 6, 6)}
SPEC = ImageSpec(image_size=36, crop_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def trained(tmp_path: Path, paint: Paint) -> tuple[Path, Path, Path]:
    """A model folder whose head calls nearly everything Diptera, its catalogue and images."""
    metadata, images = paint(ORDERS)
    return save(tmp_path / "model", metadata, images), metadata, images


def save(folder: Path, metadata: Path, images: Path, **more: Any) -> Path:
    """A model folder with a random backbone and a head that is good, but for the lengths of its weights."""
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    taxonomy = Taxonomy.build(frame.filter(pl.col("large_insect_order") == "train"), ["order"])
    torch.manual_seed(5)
    network = import_timm().create_model("test_resnet", num_classes=3)
    if more.get("head"):
        replace_head(network, 3, more["head"])
    else:
        training = frame.filter(pl.col("large_insect_order") == "train")
        package = Images(images, save_index=False)
        rows = package.find(training["image_file"])
        backbone = Backbone(network.eval(), "test_resnet", SPEC, "", None)
        features_NF = np.vstack([block for _, block, _ in features(backbone, package, rows)])
        oracle = LogisticRegression(fit_intercept=False, max_iter=5_000, class_weight="balanced")
        oracle.fit(features_NF, taxonomy.first_leaf_N[taxonomy.targets(training)])
        with torch.no_grad():
            network.fc.weight.copy_(torch.from_numpy(oracle.coef_) * torch.tensor([[9.0], [1.0], [0.1]]))
            network.fc.bias.zero_()
    record: dict[str, Any] = {
        "experiment": "large_insect_order",
        "within": None,
        "split_hash": "s",
        "licences": ["CC0"],
        "settings": {"loss": "cross_entropy", "seed": 3},
    }
    model_folder.save(
        folder,
        network.state_dict(),
        backbone="test_resnet",
        taxonomy=taxonomy,
        spec=SPEC,
        record=record,
        history=[],
        **more,
    )
    return folder


def test_retraining_the_head_lifts_macro_and_leaves_the_backbone(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    target = tmp_path / "fair"
    status, out, err = run_bioscan("rebalance", *trained, "-o", target, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["training"], told["validation"], told["tau"]) == (39, 18, None)
    assert told["after"]["macro_top_1"] > told["before"]["macro_top_1"] + 0.3
    old, new = model_folder.load(trained[0]), model_folder.load(target)
    assert backbone_sha256(old.network) == backbone_sha256(new.network)
    assert new.taxonomy.paths == old.taxonomy.paths
    assert new.info["rebalanced"]["method"] == "crt"
    assert new.info["experiment"] == "large_insect_order"
    assert new.info["settings"] == old.info["settings"]
    predictions = tmp_path / "p.parquet"
    assert run_bioscan("predict", target, trained[1], "--images", trained[2], "-o", predictions)[0] == 0
    table = pl.read_parquet(predictions)
    truth = pl.read_csv(trained[1], separator="\t", infer_schema=False).select("sampleid", truth="order")
    valid = pl.col("sampleid").str.contains("-validation-")
    right = table.join(truth, on="sampleid").filter(valid).select((pl.col("order") == pl.col("truth")).mean())
    assert right.item() == pytest.approx(told["after"]["micro_top_1"])


def test_tau_is_chosen_on_the_validation_specimens(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    macros = {}
    for tau in (0, 0.5, 1):
        status, out, _ = run_bioscan(
            "rebalance", *trained, "-o", tmp_path / f"m{tau}", "--method", "tau_norm", "--tau", tau, "--json"
        )
        assert status == 0
        macros[tau] = json.loads(out)["after"]["macro_top_1"]
    status, out, _ = run_bioscan("rebalance", *trained, "-o", tmp_path / "best", "--method", "tau_norm")
    assert status == 0
    new = model_folder.load(tmp_path / "best")
    assert new.info["rebalanced"]["tau"] == pytest.approx(float(out.split("tau ")[1].split(";")[0]))
    assert new.info["validation"]["macro_top_1"] >= macros[1] > macros[0] + 0.2
    head, old = new.network.fc, model_folder.load(trained[0]).network.fc
    assert isinstance(head, torch.nn.Linear)
    assert isinstance(old, torch.nn.Linear)
    expected = old.weight / old.weight.norm(dim=1, keepdim=True) ** new.info["rebalanced"]["tau"]
    torch.testing.assert_close(head.weight, expected)
    assert not head.bias.any()


def test_another_catalogue_is_refused(
    tmp_path: Path, trained: tuple[Path, Path, Path], paint: Paint, run_bioscan: Run
) -> None:
    metadata, images = paint({"Diptera": (4, 1, 1), "Odonata": (4, 1, 1), "Coleoptera": (4, 1, 1)})
    status, _, err = run_bioscan("rebalance", trained[0], metadata, images, "-o", tmp_path / "m")
    assert status == 2
    assert "have other taxa, or in another order, than" in err
    assert not (tmp_path / "m").exists()


def test_a_broken_photograph_is_listed(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    (trained[2] / "Diptera-train-3.jpg").write_bytes(b"broken")
    status, out, err = run_bioscan("rebalance", *trained, "-o", tmp_path / "m", "--epochs", 1)
    assert status == 1
    assert "crt: 38 training specimens; 18 validation specimens" in out
    assert "Diptera-train-3.jpg" in err


def test_a_head_that_is_not_linear_is_refused(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    other = save(tmp_path / "cosine", *trained[1:], head={"kind": "cosine", "scale": 10.0})
    status, _, err = run_bioscan("rebalance", other, *trained[1:], "-o", tmp_path / "m")
    assert status == 2
    assert "its head is not linear" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tau", "0.5"], "tau goes with method tau_norm"),
        (["--method", "tau_norm", "--tau", "-1"], "tau is -1.0; it must be at least 0"),
        (["--epochs", 0], "epochs is 0"),
    ],
)
def test_a_wrong_request_is_told(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run, more: list[object], message: str
) -> None:
    status, _, err = run_bioscan("rebalance", *trained, "-o", tmp_path / "m", *more)
    assert status == 2
    assert message in err


def test_features_too_large_for_16_bits_are_kept_whole(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    model = model_folder.load(trained[0])
    state = model.network.state_dict()
    last = next(name for name in state if name.endswith("layer4.0.bn2.weight"))
    for name in (last, last.replace("weight", "bias")):
        state[name] = state[name] + 1e6
    loud = tmp_path / "loud"
    told = ("experiment", "within", "split_hash", "settings")
    model_folder.save(
        loud,
        state,
        backbone="test_resnet",
        taxonomy=model.taxonomy,
        spec=SPEC,
        record={name: model.info[name] for name in told},
        history=[],
    )
    status, out, err = run_bioscan("rebalance", loud, *trained[1:], "-o", tmp_path / "m", "--epochs", 1)
    assert (status, err) == (0, "")
    assert "crt: 39 training specimens; 18 validation specimens" in out
    head = model_folder.load(tmp_path / "m").network.fc
    assert isinstance(head, torch.nn.Linear)
    assert head.weight.isfinite().all()
    assert head.weight.any()


def test_absent_photographs_are_told_as_a_reason_for_other_taxa(
    tmp_path: Path, trained: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    for path in trained[2].glob("Coleoptera-train-*.jpg"):
        path.unlink()
    status, _, err = run_bioscan("rebalance", *trained, "-o", tmp_path / "m")
    assert status == 2
    assert f"its training specimens (3 of them are not in {trained[2]}) have other taxa" in err
