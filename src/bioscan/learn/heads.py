"""What turns a backbone's features into a number for each output: linear, cosine and nearest neighbours.

B: pictures, F: features, O: outputs (leaf taxa where the softmax is flat), G: gallery.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bioscan.errors import RequestError, unknown

KINDS: Final = ("linear", "cosine", "nearest")

_FLOOR: Final = 1e-3
"""Share of the probability that nearest neighbours spread over all taxa, so that none is impossible."""


class CosineHead(nn.Module):
    """`scale` times the cosine between features and one vector per output.

    The features are standardised first, by buffers `mean` and `deviation`, which are 0 and 1 unless set.
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 30.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.mean: Tensor
        self.deviation: Tensor
        _standardising(self, in_features)
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Logits, B × O, from -scale to scale; in full precision also under autocast."""
        with torch.autocast(features_BF.device.type, enabled=False):
            unit_BF = _unit(self, features_BF, self.weight.dtype)
            return self.scale * functional.linear(unit_BF, functional.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        """For `print(network)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


class NearestHead(nn.Module):
    """Log-probabilities by the `k` nearest pictures of a gallery, by the cosine of standardised features.

    A neighbour votes for its taxon with weight exp(cosine / temperature), as in the k-NN evaluation of
    self-supervised networks (Wu et al. 2018, https://arxiv.org/abs/1805.01978). A thousandth of the
    probability is spread evenly over all taxa. Nothing here is trained; all is in the state dict.
    """

    def __init__(
        self, in_features: int, out_features: int, *, size: int, k: int = 5, temperature: float = 0.07
    ) -> None:
        """An empty gallery, to be filled from a state dict or by assigning the buffers.

        Args:
            in_features: F.
            out_features: O.
            size: Pictures in the gallery, G.
            k: Neighbours that vote; all where the gallery has fewer.
            temperature: Of the votes.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.k, self.temperature = k, temperature
        self.mean: Tensor
        self.deviation: Tensor
        self.gallery: Tensor
        self.outputs: Tensor
        _standardising(self, in_features)
        self.register_buffer("gallery", torch.zeros(size, in_features))
        self.register_buffer("outputs", torch.zeros(size, dtype=torch.int64))

    def forward(self, features_BF: Tensor) -> Tensor:
        """Log-probabilities, B × O; in full precision also under autocast."""
        with torch.autocast(features_BF.device.type, enabled=False):
            cosine_BG = _unit(self, features_BF, self.gallery.dtype) @ self.gallery.T
            nearest_BK, places_BK = cosine_BG.topk(min(self.k, cosine_BG.shape[1]), dim=1)
            votes_BK = torch.softmax(nearest_BK / self.temperature, dim=1)
            share_BO = votes_BK.new_zeros(len(votes_BK), self.out_features)
            share_BO = share_BO.scatter_add(1, self.outputs[places_BK], votes_BK)
            return torch.log((1 - _FLOOR) * share_BO + _FLOOR / self.out_features)

    def extra_repr(self) -> str:
        """For `print(network)`."""
        return f"gallery={len(self.gallery)}, out_features={self.out_features}, k={self.k}"


def replace_head(network: nn.Module, outputs: int, head: Mapping[str, Any]) -> None:
    """Give a network another head, its weights fresh; everything below it stays.

    Args:
        network: A timm network, or one with timm's interface.
        outputs: O.
        head: `kind`, one of KINDS, and the keyword arguments of its class: `scale` (cosine); `size`, `k`,
            `temperature` (nearest).

    Raises:
        RequestError: an unknown kind or argument; a network whose head is not one linear layer.
    """
    options = dict(head)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise unknown("kind of head", str(kind), KINDS)
    if kind != "linear" and isinstance(network.get_classifier(), nn.Identity):  # type: ignore[operator]
        network.reset_classifier(outputs)  # type: ignore[operator]
    try:
        if kind == "linear":
            network.reset_classifier(outputs, **options)  # type: ignore[operator]
            return
        old = head_of(network)
        made = _MAKERS[kind](num_features(old), outputs, **options)
    except TypeError as error:
        raise RequestError(f"head {kind}: {error}") from None
    name = next(name for name, module in network.named_modules() if module is old)
    network.set_submodule(name, made.train(old.training))
    network.num_classes = outputs  # type: ignore[assignment]


def head_of(network: nn.Module) -> nn.Linear | nn.Conv2d | CosineHead | NearestHead:
    """The head of a network: one linear layer, as a 1 x 1 convolution in some networks, or one of ours.

    Raises:
        RequestError: the head is something else, as two layers whose outputs are averaged.
    """
    head = network.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear | CosineHead | NearestHead) or (
        isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1)
    ):
        return head
    name = type(network).__name__
    raise RequestError(f"the head of {name} is not one linear layer; it can only be trained with its network")


def num_features(head: nn.Linear | nn.Conv2d | CosineHead | NearestHead) -> int:
    """F of a head."""
    return head.in_channels if isinstance(head, nn.Conv2d) else head.in_features


def features_of(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    """What the head is given, B × F: pooled, and whatever else the network does before its head."""
    maps = network.forward_features(images_BCHW)  # type: ignore[operator]
    features: Tensor = network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
    return features.flatten(1)


_MAKERS: Final[dict[str, Callable[..., CosineHead | NearestHead]]] = {
    "cosine": CosineHead,
    "nearest": NearestHead,
}


def _standardising(head: nn.Module, in_features: int) -> None:
    head.register_buffer("mean", torch.zeros(in_features))
    head.register_buffer("deviation", torch.ones(in_features))


def _unit(head: CosineHead | NearestHead, features_BF: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardised features of length 1; some networks give features as maps of one pixel."""
    return functional.normalize((features_BF.flatten(1).to(dtype) - head.mean) / head.deviation, dim=1)
