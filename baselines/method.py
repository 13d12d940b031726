"""What every baseline is: images and texts, compared at one seam, and from the logits a loss and a ranking of pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads import SparseAlignHead
from czsl_heads._checks import check_choice, check_kind, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder

Align = Literal["cls"] | SparseAlignHead


class Seam(nn.Module):
    """The one place where a method compares images with texts.

    Args:
        align: ``"cls"``, the published comparison of [CLS] with each text, or a :class:`~czsl_heads.SparseAlignHead`,
            which sees all tokens. The scale of the logits stays the method's own, whatever the head's is.
        half_logits: Round logits to float16, in which the released code of CSP computes on a GPU: ties arise.

    Shape:
        tokens [batch, tokens, dim], texts [texts, dim] or [batch, texts, dim], scale: logits [batch, texts]. Where
        there is one token it stands for the image, whatever the head.

    Raises:
        TypeError, ValueError: An argument is of another kind, or shapes do not fit.
    """

    def __init__(self, align: Align = "cls", *, half_logits: bool = False) -> None:
        super().__init__()
        self.only = SparseAlignHead("cls", logit_scale=1.0)
        if isinstance(align, str):
            check_choice("align", align, ("cls",))
            align = self.only
        check_kind("align", align, SparseAlignHead)
        check_kind("half_logits", half_logits, bool)
        self.head, self.half_logits = align, half_logits

    @property
    def takes_tokens(self) -> bool:
        """Whether tokens besides [CLS] count."""
        return self.head.reduce != "cls"

    def forward(self, tokens: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        head = self.head if tokens.shape[1] > 1 else self.only
        cosines: Tensor = head(tokens, texts) / head.logit_scale
        logits = scale * cosines
        return logits.half().to(logits.dtype) if self.half_logits else logits


class Method(nn.Module):
    """A baseline. It has an ``encoder`` and a ``seam``, and says what it makes of pairs in :meth:`texts`.

    What stands here is the usual way, of CLIP, CoOp and CSP: logits of pairs ``[batch, K]``, which are also what ranks
    them. A method with more branches replaces all below :meth:`loss`, and :meth:`compare`.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to logits [batch, K].
    """

    encoder: Encoder
    seam: Seam

    def texts(self, pairs: Tensor) -> Any:
        """Unit text features of pairs: once for a whole evaluation, anew at each step that trains them."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Projected tokens ``[batch, tokens, dim]``."""
        return self.encoder.encode_tokens(images)

    def compare(self, tokens: Tensor, texts: Any, *vectors: Tensor) -> list[Any]:
        """Logits of encoded images, and of each vector ``[batch, dim]`` that stands for them in place of [CLS]."""
        views = tokens, *(vector[:, None] for vector in vectors)
        return [self.seam(view, texts, self.encoder.logit_scale) for view in views]

    def forward(self, images: Tensor, pairs: Tensor, texts: Any = None) -> Any:
        """Logits; ``texts`` are :meth:`texts` of these pairs, where they are known already."""
        texts = self.texts(pairs) if texts is None else self._known(texts, pairs)
        (logits,) = self.compare(self.encode(images), texts)
        return logits

    def scores(self, images: Tensor, pairs: Tensor, texts: Any = None) -> Tensor:
        """What ranks pairs ``[batch, K]``."""
        return self.fuse(self(images, pairs, texts), pairs)

    def loss(self, images: Tensor, pairs: Tensor, targets: Tensor, texts: Any = None) -> Tensor:
        """What training makes small, over ``pairs``, those of training, at rows ``targets`` [batch]."""
        check_targets(targets, images, pairs)
        return self.loss_of(self(images, pairs, texts), pairs, targets)

    def fuse(self, logits: Any, pairs: Tensor) -> Tensor:
        """One score a pair ``[batch, K]``: here the logits themselves."""
        return self.pair_logits(logits)

    def probabilities(self, logits: Any, pairs: Tensor) -> Tensor:
        """Scores of pairs ``[batch, K]`` that others on the scale of probabilities can be added to."""
        return self.pair_logits(logits).softmax(dim=1)

    def loss_of(self, logits: Any, pairs: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits that are known: here cross-entropy."""
        return F.cross_entropy(self.pair_logits(logits), targets)

    def pair_texts(self, texts: Any) -> Tensor:
        """The unit features of pairs ``[K, dim]`` among all that :meth:`texts` gives."""
        check_tensor("texts", texts)
        of_pairs: Tensor = texts
        return of_pairs

    def _known(self, texts: Any, pairs: Tensor) -> Any:
        check_tensor("pairs", pairs, dtypes=(torch.long,))
        check_shapes(pairs=(pairs, "pairs 2"), texts=(self.pair_texts(texts), "pairs dim"))
        return texts

    def pair_logits(self, logits: Any) -> Tensor:
        """The logits of pairs ``[batch, K]`` among all that :meth:`forward` gives."""
        of_pairs: Tensor = logits
        return of_pairs


def check_targets(targets: Tensor, images: Tensor, pairs: Tensor) -> None:
    """Raise TypeError or ValueError unless ``targets`` are rows of ``pairs``, one an image.

    Values are looked at on the CPU only: a GPU would be waited for, and cross-entropy asserts them there.
    """
    check_tensor("targets", targets, dtypes=(torch.long,))
    check_shapes(targets=(targets, str(len(images))))
    if targets.device.type == "cpu" and ((targets < 0) | (targets >= len(pairs))).any():
        raise ValueError(f"expected `targets` to be rows of the {len(pairs)} pairs, got {targets.tolist()}")
