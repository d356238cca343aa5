"""Model folders of several ranks, of a conditional softmax, of another head; and of earlier versions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError
from bioscan.learn import model_folder, models
from bioscan.learn.dataset import ImageSpec

SPEC = ImageSpec(image_size=36, crop_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)

# Nine records: of the flies one is known to the order alone, two to the family, and a genus has no family
RECORDS = pl.DataFrame(
    [
        ("Diptera", "Sciaridae", "Bradysia"),
        ("Diptera", "Sciaridae", "Bradysia"),
        ("Diptera", "Sciaridae", "Sciara"),
        ("Diptera", "Sciaridae", None),
        ("Diptera", "Sciaridae", None),
        ("Diptera", None, "Incertae"),
        ("Diptera", None, None),
        ("Coleoptera", "Carabidae", "Carabus"),
        ("Coleoptera", "Carabidae", "Carabus"),
    ],
    schema=dict.fromkeys(("order", "family", "genus"), pl.String),
    orient="row",
)
TREE, PLACEHOLDERS = Taxonomy.build(RECORDS, ["order", "family", "genus"]).filled()


def save(folder: Path, **options: Any) -> Path:
    """A model of random weights; the options go to `model_folder.save`."""
    softmax, head = options.get("softmax", "flat"), options.get("head")
    taxonomy = options.pop("taxonomy", TREE)
    torch.manual_seed(0)
    outputs = taxonomy.num_leaves if softmax == "flat" else taxonomy.num_nodes - 1
    network = models.create("test_resnet", outputs=outputs, crop_size=32, head=head)
    given = {"record": {"experiment": "large_insect_order"}, "history": []} | options
    model_folder.save(
        folder, network.state_dict(), backbone="test_resnet", taxonomy=taxonomy, spec=SPEC, **given
    )
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a model.json and its hash with it, as another program might write it."""
    path = folder / "model.json"
    info = json.loads(path.read_text())
    change(info)
    info["content_sha256"] = model_folder.content_sha256(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("softmax", ["flat", "conditional"])
@pytest.mark.parametrize("head", [None, {"kind": "cosine", "scale": 20.0}])
def test_tree_softmax_and_head_come_back(tmp_path: Path, softmax: str, head: dict[str, Any] | None) -> None:
    loaded = model_folder.load(save(tmp_path / "m", softmax=softmax, head=head))
    assert (loaded.info["ranks"], loaded.info["rank"]) == (["order", "family", "genus"], "genus")
    assert (loaded.softmax, loaded.info["head"]) == (softmax, head)
    assert loaded.taxonomy.paths == TREE.paths
    assert PLACEHOLDERS == (~loaded.taxonomy.predictable_N).sum() == 1
    # three orders, families and genera with a record each, a placeholder, and no root
    assert loaded.network(torch.zeros(1, 3, 32, 32)).shape == (1, 4 if softmax == "flat" else 9)
    again = model_folder.load(tmp_path / "m")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.network(images), again.network(images))


def test_a_neighbours_gallery_comes_back(tmp_path: Path) -> None:
    head = {"kind": "nearest", "size": 6, "k": 2}
    torch.manual_seed(0)
    network = models.create("test_resnet", outputs=4, crop_size=32, head=head)
    state = network.state_dict()
    gallery, outputs = (
        next(name for name in state if name.endswith(end)) for end in (".gallery", ".outputs")
    )
    state[gallery] = torch.nn.functional.normalize(torch.randn_like(state[gallery]), dim=1)
    state[outputs] = torch.tensor([0, 1, 2, 3, 0, 1])
    network.load_state_dict(state)
    given: dict[str, Any] = {"backbone": "test_resnet", "taxonomy": TREE, "spec": SPEC}
    model_folder.save(tmp_path / "m", state, **given, record={}, history=[], head=head)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(model_folder.load(tmp_path / "m").network(images), network.eval()(images))


def test_the_prior_spreads_partly_named_records_over_their_leaves(tmp_path: Path) -> None:
    loaded = model_folder.load(save(tmp_path / "m"))
    counts = {TREE.name(n): int(loaded.target_counts_N[n]) for n in range(1, TREE.num_nodes)}
    assert counts == {
        "Diptera": 1,
        "Sciaridae": 2,
        "Bradysia": 2,
        "Sciara": 1,
        "unassigned Diptera": 0,
        "Incertae": 1,
        "Coleoptera": 0,
        "Carabidae": 0,
        "Carabus": 2,
    }
    # Leaves have 2.5, 1.5, 1.5 and 2.5. The two Sciaridae go to its genera as 2.5 : 1.5, the fly to
    # Sciaridae's 6 and Incertae's 1.5 in that proportion: 8.5 flies, 2.5 beetles.
    sciaridae = 8.5 * 6 / 7.5
    wanted = {
        "Bradysia": sciaridae * 2.5 / 4,
        "Sciara": sciaridae * 1.5 / 4,
        "Incertae": 8.5 * 1.5 / 7.5,
        "Carabus": 2.5,
    }
    found = {TREE.name(int(n)): p for n, p in zip(TREE.leaves_L, loaded.log_prior_L, strict=True)}
    assert found == pytest.approx({name: math.log(count / 11) for name, count in wanted.items()})


def test_the_counts_of_what_was_trained_on_are_kept(tmp_path: Path) -> None:
    counts = np.arange(TREE.num_nodes)
    loaded = model_folder.load(save(tmp_path / "m", target_counts=counts))
    assert loaded.target_counts_N.tolist() == counts.tolist()
    with pytest.raises(ValueError, match="10 target counts expected, one per node"):
        save(tmp_path / "n", target_counts=counts[1:])
    assert not (tmp_path / "n").exists()


def test_an_unknown_softmax_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown softmax 'conditonal'; did you mean 'conditional'"):
        model_folder.save(
            tmp_path / "m",
            {},
            backbone="test_resnet",
            taxonomy=TREE,
            spec=SPEC,
            record={},
            history=[],
            softmax="conditonal",  # type: ignore[arg-type]
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(softmax="other"),
        lambda info: info.update(head="linear"),
        lambda info: info.update(target_counts=[1, 2]),
        lambda info: info.update(target_counts="many"),
        lambda info: info["taxonomy"]["nodes"].pop(1),
    ],
)
def test_a_model_json_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = save(tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(DataError):
        model_folder.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(softmax="conditional"),
        lambda info: info.update(head={"kind": "nearest", "size": 3}),
    ],
)
def test_weights_of_another_softmax_or_head_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = save(tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(DataError, match="the weights do not fit test_resnet"):
        model_folder.load(folder)


def test_a_head_of_an_unknown_kind_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    rewrite(folder, lambda info: info.update(head={"kind": "cosin"}))
    with pytest.raises(RequestError, match="unknown kind of head 'cosin'; did you mean 'cosine'"):
        model_folder.load(folder)


def test_a_folder_of_the_first_schema_still_loads(tmp_path: Path) -> None:
    taxonomy = Taxonomy.build(RECORDS, ["order"])
    folder = save(tmp_path / "m", taxonomy=taxonomy)
    wanted = model_folder.load(folder)

    def as_it_was(info: dict[str, Any]) -> None:
        for name in ("ranks", "softmax", "head", "target_counts"):
            del info[name]
        info["schema_version"] = 1

    rewrite(folder, as_it_was)
    loaded = model_folder.load(folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.network(images), wanted.network(images))
    assert loaded.softmax == "flat"
    assert loaded.target_counts_N.tolist() == [0, 7, 2]
    assert loaded.log_prior_L == pytest.approx(np.log([7.5 / 10, 2.5 / 10]))


def test_the_card_says_ranks_counts_and_loss(tmp_path: Path) -> None:
    settings = {"loss": "logit_adjusted", "tau": 1.5}
    folder = save(tmp_path / "m", record={"settings": settings, "within": "Insecta"})
    card = (folder / "README.md").read_text()
    assert card.startswith("# test_resnet: 4 taxa at ranks order, family, genus within Insecta\n")
    assert "One softmax over all leaf taxa" in card
    assert "Loss: logit_adjusted with tau 1.5." in card
    # orders 9 records, one no deeper; families 7 and 2 (the placeholder is none); genera 6
    assert "| order | 2 | 9 | 1 |\n| family | 2 | 7 | 2 |\n| genus | 4 | 6 | 6 |" in card
    assert "unassigned" not in card
    assert "| Bradysia | 2 |" in card
    other = save(tmp_path / "n", softmax="conditional", head={"kind": "cosine"})
    assert "A softmax among the children of each taxon" in (other / "README.md").read_text()
    assert "Head: cosine." in (other / "README.md").read_text()


def test_what_it_was_trained_with_is_found_at_the_top_or_among_the_settings(tmp_path: Path) -> None:
    inside = model_folder.load(save(tmp_path / "m", record={"settings": {"loss": "focal"}}))
    outside = model_folder.load(save(tmp_path / "n", record={"loss": "cross_entropy"}))
    assert [m.trained_with("loss") for m in (inside, outside)] == ["focal", "cross_entropy"]
    assert outside.trained_with("tau") is None


@pytest.mark.parametrize(
    ("record", "seen"),
    [
        ({"settings": {"sampler": "uniform"}}, (8, 2)),
        ({"settings": {"sampler": "class_balanced"}}, (5, 5)),
        ({"settings": {"sampler": "square_root"}}, (20 / 3, 10 / 3)),
        ({"settings": {"sampler": "repeat_factor", "repeat_threshold": 0.8}}, (8, 4)),
        ({"settings": {"sampler": "uniform"}, "rebalanced": {"method": "crt"}}, (5, 5)),
        ({"settings": {"sampler": "uniform"}, "rebalanced": {"method": "tau_norm"}}, (8, 2)),
    ],
)
def test_the_prior_is_that_of_what_the_head_has_seen(
    tmp_path: Path, record: dict[str, Any], seen: tuple[float, float]
) -> None:
    two = Taxonomy.build(pl.DataFrame({"order": ["Diptera"] * 8 + ["Coleoptera"] * 2}), ["order"])
    loaded = model_folder.load(save(tmp_path / "m", taxonomy=two, record=record))
    assert loaded.target_counts_N.tolist() == [0, 8, 2]  # which stay the true ones
    shares = (np.array(seen) + 0.5) / (sum(seen) + 1)
    assert loaded.log_prior_L == pytest.approx(np.log(shares))
