"""`bioscan import-model`: checkpoints of the paper's program, and others', as model folders."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from bioscan.analysis.published import PER_CLASS
from bioscan.analysis.splits import class_sizes
from bioscan.learn import model_folder
from bioscan.learn.compat import import_timm, import_torchvision

Run = Callable[..., tuple[int, str, str]]
ORDERS = "Diptera Hymenoptera Coleoptera Hemiptera Lepidoptera Psocodea Thysanoptera Trichoptera Orthoptera "
ORDERS += "Blattodea Neuroptera Ephemeroptera Dermaptera Archaeognatha Plecoptera Embioptera"
COUNTS = Path(__file__).parent / "data" / "published_counts.tsv"


def timm_network(name: str, outputs: int) -> nn.Module:
    torch.manual_seed(1)
    network: nn.Module = import_timm().create_model(name, num_classes=outputs)
    nn.init.normal_(network.get_classifier().weight)  # type: ignore[operator]
    return network.eval()


def checkpoint(network: nn.Module, path: Path) -> Path:
    """As `save` of the paper's program writes it, a score of numpy beside."""
    path.parent.mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    content = {"epoch": 7, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "best": np.float64(0.99)}, path)
    return path


def names_of(model: model_folder.Model) -> list[str]:
    return [model.taxonomy.name(int(node)) for node in model.taxonomy.leaves_L]


def test_a_released_checkpoint_becomes_a_model_that_names_the_orders(
    run_bioscan: Run, tmp_path: Path
) -> None:
    network = timm_network("vit_small_patch16_224", 16)
    name = "large_insect_order_vit_small_patch16_224_CE_s2_weights_best_acc.tar"
    file = checkpoint(network, tmp_path / name)
    status, out, err = run_bioscan("import-model", file, "--classes", "published", "-o", tmp_path / "m")
    assert (status, err) == (0, "")
    assert "vit_small_patch16_224, 16 taxa at rank order: 152 entries" in out
    model = model_folder.load(tmp_path / "m")
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.network(images), network(images))
    assert names_of(model) == ORDERS.split()
    assert model.taxonomy.leaf_paths[0] == ("Arthropoda", "Insecta", "Diptera")
    assert (model.spec.image_size, model.spec.crop_size) == (256, 224)
    assert (model.spec.mean, model.spec.std) == ((0,) * 3, (1,) * 3)  # the paper's images are not normalised
    assert (model.info["experiment"], model.info["loss"], model.info["seed"]) == (
        "large_insect_order",
        "cross_entropy",
        2,
    )


def test_the_published_order_and_counts_are_those_of_the_paper() -> None:
    with COUNTS.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for experiment, rank in (("large_insect_order", "order"), ("large_diptera_family", "family")):
        wanted = {
            row["taxon"]: (int(row["images"]), int(row["large_train"])) for row in rows if row["rank"] == rank
        }
        bars = PER_CLASS[experiment]
        made = {name: (bar.images, class_sizes(bar.images)[0]) for name, bar in bars.items()}
        assert made == wanted
        assert [count for _, count in made.values()] == sorted((c for _, c in made.values()), reverse=True)


def test_families_that_cannot_be_told_apart_by_count_are_told(run_bioscan: Run, tmp_path: Path) -> None:
    """The paper's program writes the experiment into the file's name, and all of it into its folder's."""
    network = import_torchvision().models.shufflenet_v2_x1_0(num_classes=40)
    folder = tmp_path / "large_diptera_family_shufflenet_Focal_s1"
    file = checkpoint(network, folder / "large_diptera_family_weights_best_acc.tar")
    status, out, err = run_bioscan(
        "import-model", file, "--classes", "published", "-o", tmp_path / "m", "--json"
    )
    assert status == 0
    assert "careful: Culicidae and Simuliidae have equally many training specimens" in err
    result = json.loads(out)
    assert (result["backbone"], result["loss"]) == ("torchvision/shufflenet_v2_x1_0", "focal")
    assert result["classes"][:2] == ["Cecidomyiidae", "Chironomidae"]
    model = model_folder.load(tmp_path / "m")
    assert model.taxonomy.leaf_paths[-1] == ("Arthropoda", "Insecta", "Diptera", "Psilidae")
    assert model.taxonomy.counts_N[0] == 623_937  # facts: training specimens of large_diptera_family
    assert "may be swapped" in model.info["imported"]["doubt"]
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.network(images), network.eval()(images))


def test_classes_of_a_catalogue_are_numbered_as_the_papers_program_does(
    run_bioscan: Run, tmp_path: Path
) -> None:
    """By training specimens, most first; of equal ones the first in the file. Other roles do not count."""
    orders = ["Diptera", "Coleoptera", "Diptera", "Odonata", "Coleoptera", "Odonata", "Odonata", "Diptera"]
    roles = ["test", "train", "train", "train", "train", "train", "train", "train"]
    table = pl.DataFrame(
        {"sampleid": [f"s{i}" for i in range(8)], "order": orders, "small_insect_order": roles}
    )
    table.write_csv(tmp_path / "insects.tsv", separator="\t")
    file = checkpoint(timm_network("test_resnet", 3), tmp_path / "small_insect_order_weights_best_acc.tar")
    arguments = ("import-model", file, "-o", tmp_path / "m", "--model", "test_resnet", "--crop-size", 32)
    status, _, err = run_bioscan(*arguments, "--classes", "published")
    assert status == 2
    assert "the class order of small_insect_order does not follow from the published counts" in err
    assert run_bioscan(*arguments, "--classes", tmp_path / "insects.tsv")[0] == 0
    model = model_folder.load(tmp_path / "m")
    assert names_of(model) == ["Odonata", "Coleoptera", "Diptera"]
    assert model.taxonomy.counts_N.tolist() == [7, 3, 2, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "Odonata\n\nDiptera \nMantodea\n"),
        ("l.json", '["Odonata", "Diptera", "Mantodea"]'),
        ("m.json", '{"Mantodea": 2, "Odonata": 0, "Diptera": 1}'),
    ],
)
def test_a_list_names_the_outputs_in_its_order(
    name: str, text: str, run_bioscan: Run, tmp_path: Path
) -> None:
    network = timm_network("test_resnet", 3)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "mine.pth")
    (tmp_path / name).write_text(text)
    status, out, _ = run_bioscan(
        "import-model", tmp_path / "mine.pth", "--classes", tmp_path / name, "-o", tmp_path / "m",
        "--model", "test_resnet", "--rank", "order", "--crop-size", 32, "--normalise",
    )  # fmt: skip
    assert status == 0
    assert f"class order (list {name}): Odonata, Diptera, Mantodea" in out
    model = model_folder.load(tmp_path / "m")
    assert names_of(model) == ["Odonata", "Diptera", "Mantodea"]
    assert model.spec.mean == (0.5, 0.5, 0.5)  # test_resnet's own
    assert model.taxonomy.counts_N.tolist() == [0, 0, 0, 0]  # how many it was trained on is not known
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.network(images), network(images))


def test_an_imported_model_predicts(run_bioscan: Run, paint: Any, tmp_path: Path) -> None:
    table, pictures = paint({"Diptera": (1, 1, 2), "Odonata": (1, 1, 1)})
    network = timm_network("test_resnet", 2)
    with torch.no_grad():
        network.get_classifier().bias.copy_(torch.tensor([0.0, 1e4]))  # type: ignore[operator]
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "list.txt").write_text("Diptera\nOdonata\n")
    sizes = ("--image-size", 40, "--crop-size", 32)
    names = ("--model", "test_resnet", "--experiment", "large_insect_order")
    files = (tmp_path / "mine.pth", "--classes", tmp_path / "list.txt", "-o", tmp_path / "m")
    assert run_bioscan("import-model", *files, *names, *sizes)[0] == 0
    source = (table, "--images", pictures, "-o", tmp_path / "p.csv")
    status, _, err = run_bioscan("predict", tmp_path / "m", *source)
    assert status == 0, err
    predicted = pl.read_csv(tmp_path / "p.csv")
    assert predicted.height == 5  # validation and test
    assert predicted["order"].unique().to_list() == ["Odonata"]


def test_the_input_of_torchvisions_pretrained_inception_is_transformed_as_its_network_does_it(
    run_bioscan: Run, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    network = import_torchvision().models.inception_v3(
        num_classes=16, aux_logits=False, transform_input=True, init_weights=False
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.03)  # type: ignore[union-attr] # so that the scale of the input shows
    file = checkpoint(network.eval(), tmp_path / "large_insect_order_inception_v3_CE_s1_weights_best_acc.tar")
    assert run_bioscan("import-model", file, "--classes", "published", "-o", tmp_path / "m")[0] == 0
    model = model_folder.load(tmp_path / "m")
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        wanted, other = network(images), model.network(images)
        assert (wanted - other).abs().max() > 0.1 * wanted.std()
        torch.testing.assert_close(model.network((images - mean) / std), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "order"], "mine.pth: the name does not tell the network; pass --model"),
        (["--model", "test_resnet"], "the name does not tell the rank of the classes; pass --rank"),
        (["--model", "test_resnett", "--rank", "order"], "did you mean 'test_resnet'"),
        (["--model", "test_resnet", "--rank", "odrer"], "did you mean 'order'"),
        (["--model", "test_resnet", "--experiment", "large_insects"], "did you mean 'large_insect_order'"),
        (["--model", "test_byobnet", "--rank", "order"], "absent or of another shape"),
        (
            ["--model", "test_resnet", "--rank", "order"],
            "the backbone fits, but its head does not have 4 outputs",
        ),
        (
            ["--model", "test_resnet", "--rank", "order", "--classes", "x.txt"],
            "x.txt: no such file; --classes",
        ),
        (["--model", "test_resnet", "--rank", "order", "--classes", "twice.txt"], "Diptera is named twice"),
        (["--model", "test_resnet", "--rank", "order", "--classes", "one.txt"], "1 classes; at least 2"),
        (["--model", "test_resnet", "--rank", "order", "--classes", "gap.json"], "are not 0 to 1"),
        (
            ["--model", "test_resnet", "--rank", "order", "--classes", "odd.json"],
            "a list of names, or an object",
        ),
        (
            ["--model", "test_resnet", "--rank", "order", "--classes", "broken.json"],
            "cannot be read as a list",
        ),
        (["--model", "test_resnet", "--rank", "order", "--classes", "published"], "pass --experiment"),
        (["--model", "test_resnet", "--rank", "order", "--classes", "t.tsv"], "pass --experiment"),
        (
            ["--experiment", "large_insect_order", "--rank", "family", "--classes", "published"],
            "pass --model",
        ),
        (
            [
                "--model=test_resnet",
                "--experiment=large_insect_order",
                "--rank=family",
                "--classes=published",
            ],
            "the published classes of large_insect_order are at rank order",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_told_and_writes_nothing(
    arguments: list[str], message: str, run_bioscan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm_network("test_resnet", 3).state_dict(), "mine.pth")
    contents = {
        "list.txt": "Diptera\nOdonata\nMantodea\nBlattodea\n",
        "twice.txt": "Diptera\nOdonata\nDiptera\n",
        "one.txt": "Diptera\n",
        "gap.json": '{"Diptera": 0, "Odonata": 2}',
        "odd.json": "[1, 2]",
        "broken.json": "{",
        "t.tsv": "sampleid\torder\nx\tDiptera\n",
    }
    for name, text in contents.items():
        Path(name).write_text(text)
    classes = [] if "--classes" in " ".join(arguments) else ["--classes", "list.txt"]
    status, out, err = run_bioscan(
        "import-model", "mine.pth", "-o", "m", *arguments, *classes, "--crop-size", "32"
    )
    assert (status, out) == (2, "")
    assert message in err
    assert not Path("m").exists()


def test_an_absent_checkpoint_and_a_folder_in_the_way_are_told(run_bioscan: Run, tmp_path: Path) -> None:
    file = tmp_path / "large_insect_order_resnet18_CE_s1_weights_best_acc.tar"
    arguments = ("import-model", file, "--classes", "published", "-o", tmp_path / "m")
    status, _, err = run_bioscan(*arguments)
    assert status == 2
    assert "no such file" in err
    file.write_bytes(b"nonsense")
    status, _, err = run_bioscan(*arguments)
    assert status == 2
    assert "cannot be read as weights" in err
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    status, _, err = run_bioscan(*arguments)
    assert status == 2
    assert "exists; choose another name or pass --overwrite" in err
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["notes.txt"]
