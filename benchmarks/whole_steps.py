"""What does a whole step cost, and where does the time go? ``python -m benchmarks.whole_steps`` (long: see ``main``).

A training step (stage I: vision tower with LoRA, soft prompts, alignment, losses, backward pass, Adam) and an inference
pass (encoder, alignment, condenser, bank read and written, fusion; closed world, texts encoded before) of a random
ViT-L/14 with each data set's preset and numbers of primitives and pairs. The rival is the same written the usual way:
every prompt by itself on 8 positions, all cosines of tokens and texts at once and then their maximum, pairs fused in a
Python loop (at test time only), a bank of [pairs, slots, dim] that takes images one at a time. It shares the encoder
and the condenser, and the numbers of both are compared first. No dropout, so that they can be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import peak_memory, time_in_turn, write_results
from benchmarks.prompts import PaddedPrompts
from czsl_heads import CompositionSpace
from czsl_heads.functional.fusion import fuse
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Logits
from czsl_heads.models.recipe import build, new_bank
from czsl_heads.models.sac import Aligned
from czsl_heads.prompts.soft import TextFeatures
from czsl_heads.training.micro_batch import losses_in_parts
from czsl_heads.training.options import Options, load_options

SEED = 0
QUESTION = "What does a whole step cost, against the same written the usual way, and where does the time go?"
POSITIONS = 8


class Sizes(NamedTuple):
    preset: str
    attrs: int
    objs: int
    seen: int
    pairs: int
    images: int  # for training, which fill the bank


SIZES = {
    "UT-Zappos": Sizes("ut-zappos", 16, 12, 83, 116, 22998),
    "MIT-States": Sizes("mit-states", 115, 245, 1262, 1962, 30338),
    "C-GQA": Sizes("cgqa", 413, 674, 5592, 7767, 26920),
}
ON_CPU = {"C-GQA": 0.25}  # of its numbers: on all of them the usual way wants 30 GB for its prompts


class UsualSeam(nn.Module):
    """Every cosine is made, then the maximum over tokens is taken."""

    def forward(self, tokens: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        tokens, texts = (F.normalize(part.float(), dim=-1) for part in (tokens, texts))
        with torch.autocast(tokens.device.type, enabled=False):
            cosines: Tensor = torch.einsum("bld,cd->blc", tokens, texts)
        return scale * cosines.amax(dim=1)


class UsualBank(nn.Module):
    """A dense bank that takes images one at a time; a free slot has entropy inf, a text the largest finite one."""

    features: Tensor
    entropy: Tensor

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.num_pairs, self.empty = like.num_pairs, like.empty
        self.temperature, self.logit_scale = like.temperature, like.logit_scale
        self.register_buffer("features", torch.zeros(like.num_pairs, like.slots, like.dim))
        self.register_buffer("entropy", torch.full((like.num_pairs, like.slots), torch.inf))

    def forward(self, features: Tensor) -> Tensor:
        cosines = torch.einsum("bd,psd->bps", F.normalize(features.float(), dim=-1), self.features)
        shares = (cosines / self.temperature).masked_fill(self.entropy.isinf(), -torch.inf).softmax(dim=-1)
        logits = self.logit_scale * (shares.nan_to_num(0.0) * cosines).sum(dim=-1)
        return torch.masked_fill(logits, self.entropy[:, 0].isinf(), -torch.inf)

    def fill_texts(self, texts: Tensor, pair_index: Tensor) -> None:
        for text, pair in zip(texts, pair_index):
            self._insert(text, pair, torch.tensor(torch.finfo(torch.float32).max))

    def update(self, features: Tensor, probs: Tensor, *, pair_index: Tensor | None = None) -> None:
        for row, (feature, prediction) in enumerate(zip(features.float(), probs.float())):
            pair = prediction.argmax() if pair_index is None else pair_index[row]
            self._insert(feature, pair, torch.special.entr(prediction).sum())

    def _insert(self, vector: Tensor, pair: Tensor, entropy: Tensor) -> None:
        worst = self.entropy[pair].argmax()
        if entropy < self.entropy[pair, worst]:
            self.features[pair, worst], self.entropy[pair, worst] = F.normalize(vector, dim=0), entropy


class UsualAligned(Aligned):
    """Stage I of SAC with such a seam, prompts one by one, and scores of pairs that are put together one by one."""

    def __init__(self, encoder: Any, space: CompositionSpace) -> None:
        super().__init__(encoder, space)
        self.seam = UsualSeam()  # type: ignore[assignment]
        self.prompts = PaddedPrompts(encoder, space, encode="plain")
        self.prompts.length = POSITIONS

    def probabilities(self, logits: Logits, pairs: Tensor) -> Tensor:
        scores, attributes, objects = (rows.softmax(dim=1) for rows in logits)
        for column, (attribute, obj) in enumerate(pairs.tolist()):
            scores[:, column] += attributes[:, attribute] * objects[:, obj]
        return scores


def usual_way(model: Any) -> Any:
    """The rival of a model: it shares encoder and condenser, and has prompts, and if need be a bank, of its own."""
    usual: Any = UsualAligned(model.encoder, model.space)
    if isinstance(model, Condensed):
        usual = Condensed(usual, model.condenser, beta=model.beta, gamma=model.gamma)
        usual.bank = UsualBank(model.bank)
    return usual.to(model.encoder.logit_scale.device)


def draw_space(sizes: Sizes, scale: float) -> CompositionSpace:
    """Random pairs over a part of the primitives."""
    attrs, objs, seen, pairs = (max(2, round(scale * size)) for size in sizes[1:5])
    pairs = min(pairs, attrs * objs)
    drawn = torch.randperm(attrs * objs, generator=torch.Generator().manual_seed(SEED))[:pairs].tolist()
    columns = [(column // objs, column % objs) for column in drawn]
    attributes = [f"attribute {i}" for i in range(attrs)]
    objects = [f"object {i}" for i in range(objs)]
    return CompositionSpace(attributes, objects, seen=columns[:seen], unseen=columns[seen:])


def draw_images(model: Any, count: int, device: str) -> Tensor:
    size = model.encoder.image_size
    shape = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(SEED)).to(device)


def build_ways(
    encoder: str, space: CompositionSpace, options: Options, device: str, *, condenser: bool, usual: bool
) -> dict[str, Any]:
    """A model and its rival; LoRA as if it had been trained, or nothing would reach one of its two matrices."""
    torch.manual_seed(SEED)
    ours: Any = build(options.recipe("sac", encoder, "max", condenser=condenser), space).to(device)
    for name, parameter in ours.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.02)
    if condenser:
        ours.bank = new_bank(space, ours.encoder, options.bank)
    return {"ours": ours, "usual": usual_way(ours)} if usual else {"ours": ours}


def training_loss(model: Aligned, pairs: Tensor, images: Tensor, target: Tensor) -> Tensor:
    return model.losses(model(images, pairs), pairs, target)["loss"]


def loss_in_parts(model: Aligned, pairs: Tensor, images: Tensor, target: Tensor) -> Tensor:
    """In two micro-batches."""

    def losses(part: Any, texts: TextFeatures) -> dict[str, Tensor]:
        return model.losses(model(part[0], pairs, texts), pairs, part[1])

    texts, size = model.texts(pairs), (len(images) + 1) // 2
    return losses_in_parts(losses, [images, target], texts, trained(model), size=size)["loss"]


def checkpointed_loss(model: Aligned, pairs: Tensor, images: Tensor, target: Tensor) -> Tensor:
    model.checkpoint = model.prompts.checkpoint = True
    try:
        return training_loss(model, pairs, images, target)
    finally:
        model.checkpoint = model.prompts.checkpoint = False


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Training:
    """One way to take a training step, on inputs of its own; ``loss`` is a function of model, pairs, images, target."""

    def __init__(self, model: Aligned, options: Options, inputs: tuple[Tensor, Tensor, Tensor], *, half: bool) -> None:
        self.model, self.inputs, self.half, self.device = model, inputs, half, inputs[1].device.type
        self.optimizer = torch.optim.Adam(trained(model), lr=options.learning_rate, weight_decay=options.weight_decay)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def gradients(self, loss: Callable[..., Tensor] = training_loss) -> list[Tensor]:
        """The loss and its gradients."""
        with self.autocast():
            value = loss(self.model, *self.inputs)
        return [value.detach(), *torch.autograd.grad(value, trained(self.model))]

    def step(self, loss: Callable[..., Tensor] = training_loss) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            value = loss(self.model, *self.inputs)
        value.backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step, each on the results of the others; backward passes of graphs that are kept."""
        model, (pairs, images, target) = self.model, self.inputs

        def compare() -> Tensor:
            return model.losses(model.compare(leaves[0], features)[0], pairs, target)["loss"]

        with self.autocast():
            texts, tokens = model.texts(pairs), model.encode(images)
            leaves = [part.detach().requires_grad_() for part in (tokens, *texts)]
            features = TextFeatures(*leaves[1:])
            loss = compare()
        prompts = [*model.prompts.parameters()]
        known = {*map(id, prompts)}
        lora = [parameter for parameter in trained(model) if id(parameter) not in known]
        ahead = torch.autograd.grad(loss, leaves, retain_graph=True)

        def forward(run: Callable[[], object]) -> object:
            with self.autocast():
                return run()

        backward = partial(torch.autograd.grad, retain_graph=True)
        return {
            "vision forward": partial(forward, lambda: model.encode(images)),
            "text forward": partial(forward, lambda: model.texts(pairs)),
            "head and losses": partial(forward, compare),
            "head and losses backward": partial(backward, loss, leaves),
            "text backward": partial(backward, [*texts], prompts, [*ahead[1:]]),
            "vision backward": partial(backward, tokens, lora, ahead[0]),
        }


def measure_training(
    ways: dict[str, Any], options: Options, images: int, device: str, *, half: bool, rounds: int, compiled: bool
) -> dict[str, Any]:
    ours = ways["ours"]
    pairs = ours.space.pairs[ours.space.seen_mask].to(device)
    target = torch.randint(len(pairs), (images,), generator=torch.Generator().manual_seed(SEED)).to(device)
    inputs = (pairs, draw_images(ours, images, device), target)
    steps = {name: Training(model.train(), options, inputs, half=half) for name, model in ways.items()}
    mine = steps["ours"]
    differences = worst_differences({name: way.gradients() for name, way in steps.items()}, half=half)
    rivals: dict[str, Callable[[], object]] = {name: way.step for name, way in steps.items()}
    rivals["ours, checkpointed"] = partial(mine.step, checkpointed_loss)
    if images > 1:
        rivals["ours, in two parts"] = partial(mine.step, loss_in_parts)
    memory = {name: peak_memory(run, device, runs=1) for name, run in rivals.items()}
    found = {"images": images, "worst_difference": differences, **against_ours(rivals, memory, rounds)}
    # The optimiser changes weights, which no kept graph would survive.
    found["breakdown"] = {
        name: breakdown(way.parts(), rounds) | breakdown({"optimiser": way.optimizer.step}, rounds)
        for name, way in steps.items()
    }
    return found | ({"compile": measure_compiled(mine, rounds, half=half)} if compiled else {})


def measure_compiled(training: Training, rounds: int, *, half: bool) -> dict[str, Any]:
    """The whole step as one graph, without breaks; the optimiser is outside. What torch says, if it cannot."""
    torch._dynamo.reset()  # or shapes of the data set before would be taken for ones that change
    loss = torch.compile(training_loss, fullgraph=True)
    start = time.perf_counter()
    try:
        training.gradients(loss)
        to_compile = time.perf_counter() - start
        differences = worst_differences({"ours": training.gradients(), "compiled": training.gradients(loss)}, half=half)
    except Exception as error:  # whatever the compiler raises is the result
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    seconds = time_in_turn({"eager": training.step, "compiled": partial(training.step, loss)}, rounds=rounds)
    return {
        "worst_difference": differences,
        "seconds_to_compile": round(to_compile),
        "seconds": rounded(seconds),
        "compiled / eager": round(seconds["compiled"] / seconds["eager"], 2),
    }


@torch.no_grad()
def measure_inference(
    ways: dict[str, Any], bank_images: int, images: int, device: str, *, half: bool, rounds: int
) -> dict[str, Any]:
    ours = ways["ours"].eval()
    pairs = ours.space.pairs_on(device)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        texts = ours.texts(pairs)  # once for all images, and so no part of a pass
        fill_banks([model.eval().bank for model in ways.values()], ours.space, texts.pairs, bank_images)
        batch = draw_images(ours, images, device)
        rivals: dict[str, Callable[[], Any]] = {
            name: partial(inference, model, batch, pairs, texts) for name, model in ways.items()
        }
        for _ in range(2):  # the second time, the banks have been written to
            numbers = {name: compared(model, batch, pairs, texts) for name, model in ways.items()}
            differences = worst_differences(numbers, half=half)
        memory = {name: peak_memory(run, device, runs=1) for name, run in rivals.items()}
        whole = {"images": images, "worst_difference": differences, **against_ours(rivals, memory, rounds)}
        parts = {name: inference_parts(model, batch, pairs, texts) for name, model in ways.items()}
        return whole | {"breakdown": {name: breakdown(part, rounds) for name, part in parts.items()}}


def inference(model: Condensed, images: Tensor, pairs: Tensor, texts: TextFeatures) -> Tensor:
    logits = model(images, pairs, texts)
    scores = model.fuse(logits, pairs)
    model.adapt(logits)
    return scores


def compared(model: Any, images: Tensor, pairs: Tensor, texts: TextFeatures) -> list[Tensor]:
    """What the bank makes of images, and the scores of a pass."""
    memory = model.bank(model(images, pairs, texts).features).softmax(dim=1)
    return [memory, inference(model, images, pairs, texts)]


def inference_parts(model: Any, images: Tensor, pairs: Tensor, texts: TextFeatures) -> dict[str, Callable[[], object]]:
    method, tokens = model.method, model.encode(images)
    (logits,) = model.compare(tokens, texts)
    memory = model.bank(logits.features)

    def fused() -> Tensor:
        aligned, condensed = (method.probabilities(part, pairs) for part in logits[:2])
        return fuse(aligned, condensed, memory.softmax(dim=1), beta=model.beta, gamma=model.gamma)

    return {
        "encoder": partial(model.encode, images),
        "align": partial(method.compare, tokens, texts),
        "condenser": lambda: method.classify(tokens, texts, model.condenser(tokens)),
        "bank predict": partial(model.bank, logits.features),
        "bank update": partial(model.adapt, logits),
        "fusion": fused,
    }


def fill_banks(banks: list[Any], space: CompositionSpace, texts: Tensor, images: int) -> None:
    """Random vectors under random seen pairs, as many as there are training images; texts for unseen pairs."""
    seen, unseen = space.seen_mask.nonzero()[:, 0], (~space.seen_mask).nonzero()[:, 0].to(texts.device)
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, images, 256):
        count = min(256, images - start)
        vectors = torch.randn(count, texts.shape[1], generator=generator).to(texts.device)
        probs = (5 * torch.randn(count, len(space), generator=generator)).softmax(dim=1).to(texts.device)
        labels = seen[torch.randint(len(seen), (count,), generator=generator)].to(texts.device)
        for bank in banks:
            bank.update(vectors, probs, pair_index=labels)
    for bank in banks:
        bank.fill_texts(texts[unseen].float(), unseen)


def worst_differences(found: dict[str, list[Tensor]], *, half: bool) -> dict[str, float]:
    """The largest difference of each way from ours, relative to the size of the tensor; at most 1e-3 in float32.

    Halves are not held to it: they round the cosines by which tokens win, and so where gradients go.
    """
    worst = {name: max(map(difference, parts, found["ours"])) for name, parts in found.items()}
    assert half or all(value <= 1e-3 for value in worst.values()), worst
    return {name: float(f"{value:.2g}") for name, value in worst.items() if name != "ours"}


def difference(part: Tensor, own: Tensor) -> float:
    return float((part - own).norm() / own.norm().clamp(min=1e-12))


def against_ours(rivals: dict[str, Callable[[], object]], memory: dict[str, int], rounds: int) -> dict[str, Any]:
    seconds = time_in_turn(rivals, rounds=rounds)
    faster = {name: round(value / seconds["ours"], 2) for name, value in seconds.items()}
    megabytes = {name: round(value / 1e6) for name, value in memory.items()}
    return {"seconds": rounded(seconds), "times_faster": faster, "megabytes": megabytes}


def breakdown(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return rounded(time_in_turn(parts, rounds=rounds))


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in seconds.items()}


def cases(device: str, datasets: list[str]) -> list[tuple[str, float, bool]]:
    """Name, part of its numbers, and whether the usual way is run."""
    if device == "cuda":
        return [(name, 1.0, True) for name in datasets]
    found = [(name, ON_CPU.get(name, 1.0), True) for name in datasets]
    return [*found, ("C-GQA", 1.0, False)] if "C-GQA" in datasets else found


def measure(
    name: str, scale: float, usual: bool, encoder: str, device: str, *, images: int | None, **settings: Any
) -> dict[str, Any]:
    """A training step, then an inference pass of one data set, on ``scale`` of its numbers."""
    sizes, space = SIZES[name], draw_space(SIZES[name], scale)
    options, _ = load_options("sac", sizes.preset, {"model.dropout": 0.0})
    compiled = settings.pop("compiled")
    count = options.batch_size if images is None else images
    ways = build_ways(encoder, space, options, device, condenser=False, usual=usual)
    found = {"training": measure_training(ways, options, count, device, compiled=compiled, **settings)}
    del ways
    ways = build_ways(encoder, space, options, device, condenser=True, usual=usual)
    found["inference"] = measure_inference(ways, max(1, round(scale * sizes.images)), count, device, **settings)
    texts = {"attributes, objects": [len(space.attributes), len(space.objects)]}
    texts["pairs: seen, all"] = [int(space.seen_mask.sum()), len(space)]
    return {"data": name, "scale": scale, "dtype": "bfloat16" if settings["half"] else "float32", **texts, **found}


def main(
    encoder: str = "ViT-L-14-quickgelu",
    images: int | None = None,
    datasets: list[str] | None = None,
    scale: float = 1.0,
    compile: bool = False,
    rounds: int = 3,
    name: str = "whole_steps",
) -> None:
    """Measure, print and write ``results/NAME-DEVICE.json``.

    On CUDA all shapes are those published, in float32 and under bfloat16 autocast. On the CPU a step has few images,
    in float32, and C-GQA is measured twice: on a quarter of its numbers, and ours alone on all.

    Args:
        encoder: A name that ``wrap`` takes; ``tiny`` to try the script.
        images: A step; default: the preset's batch on CUDA, 2 on the CPU.
        datasets: Which, of UT-Zappos, MIT-States and C-GQA; default: all.
        scale: The part of the numbers of primitives, pairs and training images, to try the script.
        compile: Also run the training step under ``torch.compile``, which takes long to compile (minutes for ``tiny``).
        rounds: How often everything is timed.
        name: Of the results.
    """
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = 2 if images is None and device == "cpu" else images
    settings: dict[str, Any] = {"images": images, "rounds": rounds, "compiled": compile}
    rows = []
    for half in (False, True) if device == "cuda" else (False,):
        for data, part, usual in cases(device, datasets or [*SIZES]):
            rows.append(measure(data, scale * part, usual, encoder, device, half=half, **settings))
            print(rows[-1], flush=True)
    content = {"encoder": encoder, "positions": POSITIONS, "threads": torch.get_num_threads(), "rows": rows}
    write_results(f"{name}-{device}", QUESTION, SEED, content)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
