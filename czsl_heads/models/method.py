"""What every method is: images and texts, compared at one seam, and from the logits a loss and a ranking of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from czsl_heads._checks import check_choice, check_index, check_integer, check_kind, check_shapes, check_tensor
from czsl_heads.encoders.protocol import Encoder, check_encoder
from czsl_heads.functional.fusion import combine
from czsl_heads.heads.sparse_align import SparseAlignHead
from czsl_heads.models.hub import Saved
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.space import CompositionSpace

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | str | PathLike[str]

Align = Literal["cls"] | SparseAlignHead
KINDS = ("pairs", "attrs", "objs")  # of texts and logits, as losses name them
_IMAGES = 32  # predicted at once


class Logits(NamedTuple):
    """What a method says of images, by kind of text.

    Attributes:
        pairs: Of pairs ``[batch, K]``.
        attributes: Of attributes ``[batch, A]``; without columns for a method of one branch.
        objects: Of objects ``[batch, O]``; likewise.
    """

    pairs: Tensor
    attributes: Tensor
    objects: Tensor

    @property
    def attrs(self) -> Tensor:
        """:attr:`attributes`, by the word for that axis."""
        return self.attributes

    @property
    def objs(self) -> Tensor:
        """:attr:`objects`, by the word for that axis."""
        return self.objects


class Prediction(NamedTuple):
    """A pair by name, its score, and what each part of the model says of it, by the name of the part."""

    attribute: str
    object: str
    score: float
    parts: dict[str, float]


class Seam(nn.Module):
    """The one place where a method compares images with texts.

    Args:
        align: ``"cls"``, the comparison of [CLS] with each text, or a :class:`~czsl_heads.SparseAlignHead`, which sees
            all tokens. The scale of the logits stays the method's own, whatever the head's is.
        half_logits: Round logits to float16, in which some released code computes on a GPU: ties arise.

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
        """Logits ``[batch, texts]``, of the method's own scale, whose gradient stays."""
        head = self.head if tokens.shape[1] > 1 else self.only
        logits: Tensor = head(tokens, texts, logit_scale=scale)
        return logits.half().to(logits.dtype) if self.half_logits else logits

    def vectors(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """What stands for each image where it meets its own text ``[batch, dim]``, ``[batch, dim]``."""
        head = self.head if tokens.shape[1] > 1 else self.only
        return head.vectors(tokens, texts)


def tokens_of(encoded: Any) -> Tensor:
    """The tokens ``[batch, tokens, dim]`` among what :meth:`Method.encode` gives."""
    tokens: Tensor = encoded if isinstance(encoded, Tensor) else encoded[0]
    return tokens


class Method(nn.Module, Saved):
    r"""A way to recognise pairs. It has an ``encoder``, a ``space`` and a ``seam``, and says what it makes of pairs.

    A method of its own needs a constructor and :meth:`texts`. What stands here is the usual way: every branch that
    :meth:`texts` has features for is compared at the seam and trained by cross-entropy. With one branch the logits of
    pairs rank; with three, pairs are ranked by :math:`p(a, o) + p(a) p(o)`.

    Args:
        encoder: A wrapped CLIP.
        space: Gives the primitives, and the pairs of :meth:`predict`; pairs are passed to each other call.
        align, half_logits: Of the :class:`Seam`.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to :class:`Logits`.

    Raises:
        TypeError, ValueError: An argument is of another kind or shape.
    """

    encoder: Encoder
    space: CompositionSpace
    seam: Seam
    checkpoint: bool = False  # run the vision tower's blocks again in the backward pass instead of keeping activations

    def __init__(
        self, encoder: Encoder, space: CompositionSpace, *, align: Align = "cls", half_logits: bool = False
    ) -> None:
        super().__init__()
        check_encoder("encoder", encoder)
        check_kind("space", space, CompositionSpace)
        self.encoder, self.space = encoder, space
        self.seam = Seam(align, half_logits=half_logits)

    @property
    def scores_apart(self) -> bool:
        """Whether the scores of a pair depend on other pairs by the softmax over them alone.

        Processes may then divide the pairs among themselves. It is so where a method keeps to the usual way; one that
        replaces a part of it, and keeps it so, says so itself.
        """
        kept = ("compare", "classify", "fuse", "probabilities")
        return all(getattr(type(self), name) is getattr(Method, name) for name in kept)

    def texts(self, pairs: Tensor) -> TextFeatures:
        """Unit text features of pairs: once for a whole evaluation, anew at each step that trains them."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Any:
        """Projected tokens ``[batch, tokens, dim]``, or a named tuple whose first field they are."""
        if self.checkpoint:
            return self.encoder.encode_tokens(images, checkpoint=True)
        return self.encoder.encode_tokens(images)  # so that an encoder that knows no checkpoints will do

    def compare(self, encoded: Any, texts: TextFeatures, *vectors: Tensor) -> list[Any]:
        """Logits of encoded images, and of each vector ``[batch, dim]`` that stands for them in place of [CLS]."""
        return [self._logits_of(tokens_of(encoded), texts), *self.classify(encoded, texts, *vectors)]

    def classify(self, encoded: Any, texts: TextFeatures, *vectors: Tensor) -> list[Any]:
        """What :meth:`compare` says of the vectors, without comparing the tokens."""
        return [self._logits_of(vector[:, None], texts) for vector in vectors]

    def vectors(self, encoded: Any, logits: Any, texts: Tensor) -> Tensor:
        """What stands for each image ``[batch, dim]`` where it meets its own text ``[batch, dim]``; of any norm."""
        return self.seam.vectors(tokens_of(encoded), texts)

    def _logits_of(self, tokens: Tensor, texts: TextFeatures) -> Logits:
        scale = self.encoder.logit_scale
        of_pairs = self.seam(tokens, texts.pairs, scale)
        others = (self.seam(tokens, rows, scale) if len(rows) else of_pairs[:, :0] for rows in texts[1:])
        return Logits(of_pairs, *others)

    def forward(self, images: Tensor, pairs: Tensor, texts: TextFeatures | None = None) -> Any:
        """Logits; ``texts`` are :meth:`texts` of these pairs, where they are known already."""
        texts = self.texts(pairs) if texts is None else _known(texts, pairs)
        return self.compare(self.encode(images), texts)[0]

    def scores(self, images: Tensor, pairs: Tensor, texts: TextFeatures | None = None) -> Tensor:
        """What ranks pairs ``[batch, K]``."""
        return self.fuse(self._logits(images, pairs, texts), pairs)

    def loss(self, images: Tensor, pairs: Tensor, targets: Tensor, texts: TextFeatures | None = None) -> Tensor:
        """What training makes small, over ``pairs``, those of training, at rows ``targets`` [batch]."""
        check_targets(targets, images, pairs)
        return self.losses(self._logits(images, pairs, texts), pairs, targets)["loss"]

    def validation_loss(
        self, images: Tensor, pairs: Tensor, targets: Tensor, texts: TextFeatures | None = None
    ) -> Tensor:
        """The same of :meth:`validation_losses`."""
        check_targets(targets, images, pairs)
        return self.validation_losses(self._logits(images, pairs, texts), pairs, targets)["loss"]

    def _logits(self, images: Tensor, pairs: Tensor, texts: TextFeatures | None) -> Any:
        return Method.forward(self, images, pairs, texts)

    def fuse(self, logits: Any, pairs: Tensor) -> Tensor:
        """One score a pair ``[batch, K]``."""
        return self.probabilities(logits, pairs) if logits.attributes.shape[1] else logits.pairs

    def probabilities(self, logits: Any, pairs: Tensor) -> Tensor:
        """Scores of pairs ``[batch, K]`` that others on the scale of probabilities can be added to."""
        of_pairs: Tensor = logits.pairs.softmax(dim=1)
        if not logits.attributes.shape[1]:
            return of_pairs
        return combine(of_pairs, logits.attributes.softmax(dim=1), logits.objects.softmax(dim=1), pairs)

    def losses(self, logits: Any, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Scalars of known logits: each term, and what is minimised as ``"loss"``; here the sum of cross-entropies."""
        terms = cross_entropies(logits, pairs, targets)
        return terms | {"loss": sum(terms.values(), start=logits.pairs.new_zeros(()))}

    def validation_losses(self, logits: Any, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of validation images, by which an epoch may be chosen; here :meth:`losses`."""
        return self.losses(logits, pairs, targets)

    def parts(self, logits: Any, pairs: Tensor) -> dict[str, Tensor]:
        """What each part of the model says of pairs, each ``[batch, K]``, by name; nothing where there is one part."""
        if not logits.attributes.shape[1]:
            return {}
        attributes, objects = pairs.to(logits.pairs.device).unbind(dim=1)
        return {
            "pair": logits.pairs.softmax(dim=1),
            "attribute": logits.attributes.softmax(dim=1)[:, attributes],
            "object": logits.objects.softmax(dim=1)[:, objects],
        }

    @torch.no_grad()
    def predict(
        self,
        images: Tensor | Picture | Sequence[Picture],
        topk: int = 5,
        *,
        pairs: Tensor | None = None,
        texts: TextFeatures | None = None,
    ) -> list[list[Prediction]]:
        """Name what is on images.

        Args:
            images: A batch ``[batch, 3, height, width]`` as ``encoder.transform()`` gives it; or a PIL image, a path,
                or several of these, which are opened and transformed a few at a time.
            topk: Pairs to name for each image, at most.
            pairs: The candidates ``[K, 2]``; default: the pairs of the model's space.
            texts: :meth:`texts` of the candidates, if they are known: encoding them may take longer than one image.

        Returns:
            For each image its best pairs, best first.

        Raises:
            ValueError: The model is in training mode, or ``topk`` is below 1.
            TypeError: ``images`` is of another kind.
        """
        check_integer("topk", topk, 1)
        if self.training:
            raise ValueError("expected a model in eval mode, got one in training mode: call model.eval()")
        device = self.encoder.logit_scale.device
        dtype = next(self.encoder.blocks("vision").parameters()).dtype
        pairs = self.space.pairs_on(device) if pairs is None else pairs.to(device)
        texts = self.texts(pairs) if texts is None else _known(texts, pairs)
        names = self.space.attributes, self.space.objects

        found: list[list[Prediction]] = []
        for batch in self._batches(images):
            logits = self.compare(self.encode(batch.to(device, dtype)), texts)[0]
            scores, parts = self.fuse(logits, pairs), self.parts(logits, pairs)
            found += name_best(scores, parts, pairs, names, topk)
        return found

    def _batches(self, images: Any) -> Iterator[Tensor]:
        """A tensor as it is in parts; files and PIL images opened and transformed, a few at a time."""
        if isinstance(images, Tensor):
            check_shapes(images=(images, "batch 3 height width"))
            yield from images.split(_IMAGES)
            return

        from PIL.Image import Image as Picture

        from czsl_heads.data.images import as_rgb, open_image

        several = [images] if isinstance(images, (str, PathLike, Picture)) else images
        if not isinstance(several, Sequence):
            raise TypeError(f"expected `images` to be a tensor, a PIL image, a path or a list, got {images!r}")
        transform = self.encoder.transform()
        for start in range(0, len(several), _IMAGES):
            chunk = several[start : start + _IMAGES]
            for each in chunk:
                if not isinstance(each, (str, PathLike, Picture)):
                    raise TypeError(f"expected `images` to list PIL images and paths, got a {type(each).__name__}")
            opened = (as_rgb(each) if isinstance(each, Picture) else open_image(each) for each in chunk)
            yield torch.stack([transform(each) for each in opened])


def name_best(
    scores: Tensor, parts: dict[str, Tensor], pairs: Tensor, names: tuple[Sequence[str], Sequence[str]], topk: int
) -> list[list[Prediction]]:
    """The best pairs of each image by name, from ``scores`` and ``parts`` ``[batch, K]`` of ``pairs`` ``[K, 2]``."""
    ranked = scores.sort(dim=1, descending=True, stable=True)  # of equal scores the first column wins, as everywhere
    best, columns = ranked.values[:, :topk], ranked.indices[:, :topk]
    values = {name: part.gather(1, columns).tolist() for name, part in parts.items()}
    indices = pairs.to(columns.device)[columns].tolist()  # [batch, topk, 2]

    named = []
    for row, (row_scores, row_pairs) in enumerate(zip(best.tolist(), indices)):
        predictions = []
        for place, (score, (attribute, obj)) in enumerate(zip(row_scores, row_pairs)):
            own = {name: rows[row][place] for name, rows in values.items()}
            predictions.append(Prediction(names[0][attribute], names[1][obj], score, own))
        named.append(predictions)
    return named


class PairMethod(Method):
    """A method of one branch: :meth:`forward` gives the logits of pairs ``[batch, K]`` by themselves."""

    def forward(self, images: Tensor, pairs: Tensor, texts: TextFeatures | None = None) -> Tensor:
        """Logits of pairs ``[batch, K]``; ``texts`` are those of :meth:`texts`, where they are known already."""
        logits: Logits = super().forward(images, pairs, texts)
        return logits.pairs


def cross_entropies(logits: Logits, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of each branch that there is, as ``loss_pairs``, ``loss_attrs`` and ``loss_objs``.

    Raises:
        TypeError, ValueError: ``targets`` are of another kind, or one is no row of ``pairs``; -100 is none either.
    """
    check_tensor("targets", targets, dtypes=(torch.long,))
    check_shapes(logits=(logits.pairs, "batch pairs"), targets=(targets, "batch"))
    check_index("targets", targets, len(pairs))
    of_primitives = pairs.to(targets.device)[targets].unbind(dim=1)
    return {
        f"loss_{kind}": F.cross_entropy(rows, target)
        for kind, rows, target in zip(KINDS, logits, (targets, *of_primitives))
        if rows.shape[1]
    }


def _known(texts: Any, pairs: Tensor) -> TextFeatures:
    check_kind("texts", texts, TextFeatures)
    check_tensor("pairs", pairs, dtypes=(torch.long,))
    check_shapes(pairs=(pairs, "pairs 2"), texts=(texts.pairs, "pairs dim"))
    features: TextFeatures = texts
    return features


def check_targets(targets: Tensor, images: Tensor, pairs: Tensor) -> None:
    """Raise TypeError or ValueError unless ``targets`` are rows of ``pairs``, one an image."""
    check_tensor("targets", targets, dtypes=(torch.long,))
    check_shapes(targets=(targets, str(len(images))))
    check_index("targets", targets, len(pairs))
