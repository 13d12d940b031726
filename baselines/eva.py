"""EVA: experts beside the MLPs of both towers, words scored by their best pair, variants of the image in training."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from czsl_heads import CompositionSpace
from czsl_heads._checks import check_choice, check_integer, check_kind, check_range
from czsl_heads.adapters.experts import add_experts, encode_variants, load_balance, watch_routing
from czsl_heads.encoders.protocol import Encoder
from czsl_heads.functional.semantic_variants import chosen_variant
from czsl_heads.functional.unit import unit_vectors
from czsl_heads.heads.semantic_variants import SemanticVariantHead
from czsl_heads.models.method import Align, Logits, Method, cross_entropies, tokens_of
from czsl_heads.prompts.soft import Encode, SoftPrompts, TextFeatures

Variants = Literal["none", "cross", "both"]


class Encoded(NamedTuple):
    """Images in training: tokens ``[batch, tokens, dim]``, the experts' variants of the image feature ``[batch,
    variants, dim]``, and how uneven the load of the vision tower's experts is ``[batch]``; the last two may be empty.
    """

    tokens: Tensor
    variants: Tensor
    imbalance: Tensor


class EVALogits(NamedTuple):
    """Logits of images in training, and cosines of their variants.

    Attributes:
        pairs, attributes, objects: As in :class:`~czsl_heads.models.method.Logits`.
        variants_attributes, variants_objects: With all words, ``[batch, variants, words]``.
        within_images: With the image feature, ``[batch, variants]``.
        overlap: Mean cosine of two different variants ``[batch]``.
        imbalance: Of :class:`Encoded`.
    """

    pairs: Tensor
    attributes: Tensor
    objects: Tensor
    variants_attributes: Tensor
    variants_objects: Tensor
    within_images: Tensor
    overlap: Tensor
    imbalance: Tensor


class EVA(Method):
    r"""Mixture-of-experts adapters and semantic-variant alignment, with v the image feature and t texts of pairs,

    .. math:: p_{ao} = \mathrm{softmax}(\tau \cos(v, t_{ao})), \quad
              p_a = \mathrm{softmax}(\tau_a \max_o p_{ao}), \quad p_o = \mathrm{softmax}(\tau_o \max_a p_{ao})

    and pairs ranked by :math:`p_{ao} + \beta (p_a + p_o)`. In training each word also takes the one expert's variant of
    the image feature that suits it best, which is compared with the texts of all words.

    Args:
        encoder: A wrapped CLIP; experts are put into both of its towers.
        space: Gives the primitives; pairs are passed to each call.
        align: How an image is compared with texts: ``"cls"``, as published, or a :class:`~czsl_heads.SparseAlignHead`.
        experts: Routed experts of each block; 0: no experts at all.
        shared: Experts that see every token.
        topk: Routed experts of each token.
        rank: Of each expert.
        text_to_image: Score a word by the best pair that has it; otherwise by the cosine of the image with its text.
        variants: Image-to-text alignment: ``"none"``; ``"cross"``, a variant is chosen by its text; ``"both"``, by the
            image feature, too. Training only.
        alpha: Weight of the image feature in that choice.
        beta: Weight of the words in the scores.
        primitive_weight: Of the losses of attributes and objects.
        variant_weight: Of the losses of the variants.
        isolation_weight: Of a loss that drives variants apart, their mean cosine with each other. The paper reports
            that such a loss harms.
        balance_weight: Of a loss that evens out the load of the vision tower's experts, within each image. The paper
            reports that such a loss harms.
        context: The words that the three contexts start from.
        primitives: The table to start from; default: of each name, the mean of its token embeddings.
        dropout: On the whole table, in training.
        encode: Of :class:`~czsl_heads.prompts.soft.SoftPrompts`.
        checkpoint: Keep no activations of the blocks of both towers in training but run them again.

    Shape:
        images [batch, 3, height, width], pairs [K, 2] long (attribute index, object index); to :class:`Logits`.

    Raises:
        TypeError, ValueError: An argument is of another kind or range, pairs name no primitives, or there are variants
            to choose and no experts.

    Example:
        >>> import torch
        >>> from czsl_heads import CompositionSpace, wrap
        >>> space = CompositionSpace(["red", "blue"], ["circle"], seen=[("red", "circle")]).open_world()
        >>> eva = EVA(wrap("tiny"), space, rank=2).eval()
        >>> [tuple(logits.shape) for logits in eva(torch.zeros(3, 3, 48, 48), space.pairs)]
        [(3, 2), (3, 2), (3, 1)]

    References:
        Zhang, Jing, Ma and Zheng, EVA: Decoupling Primitive with Experts, ICLR 2026. No code is public; what the paper
        leaves open, and our readings, stand in docs/baselines.md.
    """

    def __init__(
        self,
        encoder: Encoder,
        space: CompositionSpace,
        *,
        align: Align = "cls",
        experts: int = 8,
        shared: int = 1,
        topk: int = 2,
        rank: int = 8,
        text_to_image: bool = True,
        variants: Variants = "both",
        alpha: float = 0.5,
        beta: float = 0.5,
        primitive_weight: float = 1.0,
        variant_weight: float = 1.0,
        isolation_weight: float = 0.0,
        balance_weight: float = 0.0,
        context: str = "a photo of",
        primitives: Tensor | None = None,
        dropout: float = 0.0,
        encode: Encode = "auto",
        checkpoint: bool = False,
    ) -> None:
        super().__init__(encoder, space, align=align)
        check_integer("experts", experts, 0)
        for name, switch in (("text_to_image", text_to_image), ("checkpoint", checkpoint)):
            check_kind(name, switch, bool)
        check_choice("variants", variants, ("none", "cross", "both"))
        self.experts, self.text_to_image, self.variants, self.beta = experts, text_to_image, variants, beta
        self.primitive_weight, self.variant_weight = primitive_weight, variant_weight
        self.isolation_weight, self.balance_weight = isolation_weight, balance_weight
        self.checkpoint = checkpoint
        self._check_options()

        if experts:
            for tower in ("vision", "text"):
                add_experts(encoder, rank=rank, experts=experts, shared=shared, topk=topk, tower=tower)
        self.prompts = SoftPrompts(
            encoder,
            space,
            context=context,
            primitives=primitives,
            dropout=dropout,
            encode=encode,
            checkpoint=checkpoint,
        )
        self.words = SemanticVariantHead(alpha=alpha if variants == "both" else 0.0)
        if not text_to_image:
            self.words.requires_grad_(False)

    def _check_options(self) -> None:
        weights = ("beta", "primitive_weight", "variant_weight", "isolation_weight", "balance_weight")
        for name in weights:
            check_range(name, getattr(self, name), 0)
        if self.experts:
            return
        if self.variants != "none":
            raise ValueError(f'expected `variants` to be "none" without experts, got {self.variants!r}')
        for name in ("isolation_weight", "balance_weight"):
            if getattr(self, name):
                raise ValueError(f"expected `{name}` to be 0 without experts, got {getattr(self, name)}")

    def texts(self, pairs: Tensor) -> TextFeatures:
        return self.prompts.texts(pairs)

    @property
    def _looks_at_variants(self) -> bool:
        return self.training and (self.variants != "none" or self.isolation_weight > 0)

    def encode(self, images: Tensor) -> Any:
        """Tokens ``[batch, tokens, dim]``; in training :class:`Encoded`, where variants or loads are asked for."""
        balanced = self.training and self.balance_weight > 0
        if not (self._looks_at_variants or balanced):
            return super().encode(images)
        if not balanced:
            return self._encoded(images, images.new_zeros(len(images)))
        with watch_routing(self.encoder, "vision") as calls:
            encoded = self._encoded(images, images.new_zeros(len(images)))
        return encoded._replace(imbalance=load_balance(self.encoder, "vision", calls, len(images)))

    def _encoded(self, images: Tensor, imbalance: Tensor) -> Encoded:
        if self._looks_at_variants:
            return Encoded(*encode_variants(self.encoder, images, checkpoint=self.checkpoint), imbalance)
        tokens: Tensor = super().encode(images)
        return Encoded(tokens, tokens[:, :0], imbalance)

    def compare(self, encoded: Any, texts: TextFeatures, *vectors: Tensor) -> list[Any]:
        """As :meth:`Method.compare`; in training the first are :class:`EVALogits`."""
        first, *others = super().compare(encoded, texts, *vectors)
        if not isinstance(encoded, Encoded):
            return [first, *others]
        variants = unit_vectors(encoded.variants)  # [batch, variants, dim]
        image = unit_vectors(tokens_of(encoded)[:, 0])
        cosines = [variants @ rows.to(variants.dtype).T for rows in (texts.attributes, texts.objects)]
        within_images = (variants * image[:, None]).sum(dim=2)
        own = first.pairs, first.attributes, first.objects
        of_variants = cosines[0], cosines[1], within_images, _overlap(variants)
        return [EVALogits(*own, *of_variants, encoded.imbalance), *others]

    def losses(self, logits: Any, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of pairs and words, and of the chosen variants with all words; and the two extra losses."""
        terms = cross_entropies(self._with_words(logits, pairs), pairs, targets)
        weights = {"loss_pairs": 1.0, "loss_attrs": self.primitive_weight, "loss_objs": self.primitive_weight}
        if isinstance(logits, EVALogits):
            more = self._variant_losses(logits, pairs, targets)
            terms, weights = terms | more, weights | self._weights_of_variants
        total = logits.pairs.new_zeros(())
        for name, term in terms.items():
            total = total + weights[name] * term
        return terms | {"loss": total}

    @property
    def _weights_of_variants(self) -> dict[str, float]:
        return {
            "loss_variant_attrs": self.variant_weight,
            "loss_variant_objs": self.variant_weight,
            "loss_isolation": self.isolation_weight,
            "loss_balance": self.balance_weight,
        }

    def _variant_losses(self, logits: EVALogits, pairs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.variants != "none":
            of_words = pairs.to(targets.device)[targets].unbind(dim=1)
            for kind, cosines, word in zip(("attrs", "objs"), logits[3:5], of_words):
                chosen = self._of_chosen_variant(cosines, logits.within_images, word)
                scaled = self.encoder.logit_scale * chosen
                found[f"loss_variant_{kind}"] = torch.nn.functional.cross_entropy(scaled, word)
        if self.isolation_weight:
            found["loss_isolation"] = logits.overlap.mean()
        if self.balance_weight:
            found["loss_balance"] = logits.imbalance.mean()
        return found

    def _of_chosen_variant(self, cosines: Tensor, within_images: Tensor, word: Tensor) -> Tensor:
        """Cosines with all words ``[batch, words]`` of the variant that suits the image's own word best."""
        cross_modal = cosines.detach().take_along_dim(word[:, None, None], dim=2)[:, :, 0]
        number = chosen_variant(cross_modal, within_images.detach(), self.words.alpha)
        return cosines.take_along_dim(number[:, None, None], dim=1)[:, 0]

    def _with_words(self, logits: Any, pairs: Tensor) -> Logits:
        """Logits in which words are scored by their best pair, where that is asked for."""
        if not self.text_to_image:
            return Logits(logits.pairs, logits.attributes, logits.objects)
        counts = logits.attributes.shape[1], logits.objects.shape[1]
        return Logits(logits.pairs, *self.words(logits.pairs.softmax(dim=1), pairs, *counts))

    def probabilities(self, logits: Any, pairs: Tensor) -> Tensor:
        """Scores of pairs ``[batch, K]``, :math:`p_{ao} + \\beta (p_a + p_o)`."""
        parts = self.parts(logits, pairs)
        scores: Tensor = parts["pair"] + self.beta * (parts["attribute"] + parts["object"])
        return scores

    def parts(self, logits: Any, pairs: Tensor) -> dict[str, Tensor]:
        return super().parts(self._with_words(logits, pairs), pairs)


def _overlap(variants: Tensor) -> Tensor:
    """Mean cosine of two different unit variants ``[batch]``; zero where there are not two."""
    count = variants.shape[1]
    if count < 2:
        return variants.new_zeros(len(variants))
    summed = variants.sum(dim=1).square().sum(dim=1)
    own = variants.square().sum(dim=(1, 2))
    return (summed - own) / (count * (count - 1))
