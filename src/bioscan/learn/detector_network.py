"""What training and prediction ask of a detector's network.

B: batch, C: channel, H, W: pixels, K: boxes of a picture, Q: boxes that a network gives of each picture.
"""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class DetectorNetwork(nn.Module):
    """A network that learns boxes and gives boxes, whatever is inside."""

    @abstractmethod
    def loss(self, images_BCHW: Tensor, mask_BHW: Tensor | None, boxes: Sequence[Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            images_BCHW: Normalised pictures.
            mask_BHW: True where there is a picture; None where nothing is padded.
            boxes: Per picture K x 4 corners as shares of the picture; K may be 0.
        """

    @abstractmethod
    def predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes B x Q x 4, corners as shares of the picture, and their scores B x Q, float32."""
