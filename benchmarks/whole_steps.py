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
from czsl_heads import SAC, CompositionSpace
from czsl_heads.functional.fusion import fuse
from czsl_heads.models.sac import BranchLogits, SACOutput, SpaceTexts
from czsl_heads.training.evaluate import new_bank
from czsl_heads.training.micro_batch import losses_in_parts
from czsl_heads.training.options import SACOptions, load_options
from czsl_heads.training.run import build_sac

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
    "C-GQA": Sizes("cgqa", 413, 674, 5592, 7555, 26920),
}


class UsualHead(nn.Module):
    """Every cosine is made, then the maximum over tokens is taken; ``cls`` looks at token 0 alone."""

    def __init__(self, logit_scale: float, *, cls: bool) -> None:
        super().__init__()
        self.logit_scale, self.cls = logit_scale, cls

    def forward(self, tokens: Tensor, texts: Tensor) -> Tensor:
        tokens, texts = (F.normalize(part.float(), dim=-1) for part in (tokens[:, :1] if self.cls else tokens, texts))
        with torch.autocast(tokens.device.type, enabled=False):
            cosines: Tensor = torch.einsum("bld,cd->blc", tokens, texts)
        return self.logit_scale * cosines.amax(dim=1)


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


class UsualSAC(SAC):
    """SAC whose scores of pairs are put together one by one, and in training not at all."""

    def pair_scores(self, logits: BranchLogits, space: CompositionSpace) -> Tensor:
        if self.training:
            return logits.pairs
        scores, attrs, objs = (rows.softmax(dim=1) for rows in logits)
        for column, (attr, obj) in enumerate(space.pairs.tolist()):
            scores[:, column] += attrs[:, attr] * objs[:, obj]
        return scores


def usual_way(sac: SAC, space: CompositionSpace) -> UsualSAC:
    """The rival of a model: it shares encoder and condenser, and has prompts, and if need be a bank, of its own."""
    condenser = sac.condenser or False
    usual = UsualSAC(sac.encoder, space, condenser=condenser, bank=False, beta=sac.beta, gamma=sac.gamma)
    scale = sac.condensed_head.logit_scale
    usual.head, usual.condensed_head = UsualHead(scale, cls=False), UsualHead(scale, cls=True)  # type: ignore[assignment]
    prompts = PaddedPrompts(sac.encoder, space, encode="plain")
    prompts.length = POSITIONS
    usual.prompts = prompts
    if sac.bank is not None:
        usual.use_bank(UsualBank(sac.bank), space)  # type: ignore[arg-type]
    return usual.to(next(sac.parameters()).device)


def draw_space(sizes: Sizes, scale: float) -> CompositionSpace:
    """Random pairs over a part of the primitives."""
    attrs, objs, seen, pairs = (max(2, round(scale * size)) for size in sizes[1:5])
    pairs = min(pairs, attrs * objs)
    drawn = torch.randperm(attrs * objs, generator=torch.Generator().manual_seed(SEED))[:pairs].tolist()
    columns = [(column // objs, column % objs) for column in drawn]
    names = [f"attribute {i}" for i in range(attrs)], [f"object {i}" for i in range(objs)]
    return CompositionSpace(*names, seen=columns[:seen], unseen=columns[seen:])


def draw_images(sac: SAC, count: int, device: str) -> Tensor:
    size = sac.encoder.image_size
    shape = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(SEED)).to(device)


def build(
    encoder: str, space: CompositionSpace, options: SACOptions, device: str, *, condenser: bool
) -> tuple[SAC, UsualSAC]:
    """A model and its rival; LoRA as if it had been trained, or nothing would reach one of its two matrices."""
    torch.manual_seed(SEED)
    sac = build_sac(encoder, space, options, condenser=condenser).to(device)
    for name, parameter in sac.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.02)
    if condenser:
        sac.use_bank(new_bank(space, sac.encoder.dim, sac, options).to(device), space)
    return sac, usual_way(sac, space)


def training_losses(sac: SAC, texts: SpaceTexts, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    return sac.losses(sac.compare(sac.encode(images), texts), target)


def training_loss(sac: SAC, space: CompositionSpace, images: Tensor, target: Tensor) -> Tensor:
    return training_losses(sac, sac.texts(space), images, target)["loss"]


def loss_in_parts(sac: SAC, space: CompositionSpace, images: Tensor, target: Tensor) -> Tensor:
    """In two micro-batches."""

    def losses(part: Any, features: Any) -> dict[str, Tensor]:
        return training_losses(sac, SpaceTexts(space, features), *part)

    features, size = sac.texts(space).features, (len(images) + 1) // 2
    return losses_in_parts(losses, [images, target], features, trained(sac), size=size)["loss"]


def checkpointed_loss(sac: SAC, space: CompositionSpace, images: Tensor, target: Tensor) -> Tensor:
    sac.checkpoint = sac.prompts.checkpoint = True
    try:
        return training_loss(sac, space, images, target)
    finally:
        sac.checkpoint = sac.prompts.checkpoint = False


def trained(sac: SAC) -> list[nn.Parameter]:
    return [parameter for parameter in sac.parameters() if parameter.requires_grad]


class Training:
    """One way to take a training step, on inputs of its own; ``loss`` is a function of model, space, images, target."""

    def __init__(self, sac: SAC, options: SACOptions, inputs: tuple[Any, ...], *, half: bool) -> None:
        self.sac, self.inputs, self.half, self.device = sac, inputs, half, inputs[1].device.type
        self.optimizer = torch.optim.Adam(trained(sac), lr=options.learning_rate, weight_decay=options.weight_decay)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def gradients(self, loss: Callable[..., Tensor] = training_loss) -> list[Tensor]:
        """The loss and its gradients."""
        with self.autocast():
            value = loss(self.sac, *self.inputs)
        return [value.detach(), *torch.autograd.grad(value, trained(self.sac))]

    def step(self, loss: Callable[..., Tensor] = training_loss) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            value = loss(self.sac, *self.inputs)
        value.backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts of a step, each on the results of the others; backward passes of graphs that are kept."""
        sac, (space, images, target) = self.sac, self.inputs
        with self.autocast():
            texts, tokens = sac.texts(space), sac.encode(images)
            leaves = [part.detach().requires_grad_() for part in (tokens, *texts.features)]
            features = SpaceTexts(space, type(texts.features)(*leaves[1:]))
            loss = sac.losses(sac.compare(leaves[0], features), target)["loss"]
        prompts = [*sac.prompts.parameters()]
        known = {*map(id, prompts)}
        lora = [parameter for parameter in trained(sac) if id(parameter) not in known]
        ahead = torch.autograd.grad(loss, leaves, retain_graph=True)

        def forward(run: Callable[[], object]) -> object:
            with self.autocast():
                return run()

        backward = partial(torch.autograd.grad, retain_graph=True)
        return {
            "vision forward": partial(forward, lambda: sac.encode(images)),
            "text forward": partial(forward, lambda: sac.texts(space)),
            "head and losses": partial(forward, lambda: sac.losses(sac.compare(leaves[0], features), target)),
            "head and losses backward": partial(backward, loss, leaves),
            "text backward": partial(backward, [*texts.features], prompts, [*ahead[1:]]),
            "vision backward": partial(backward, tokens, lora, ahead[0]),
        }


def measure_training(
    ways: dict[str, SAC], options: SACOptions, images: int, device: str, *, half: bool, rounds: int, compiled: bool
) -> dict[str, Any]:
    ours = ways["ours"]
    space = ours.bank_space.subset(ours.bank_space.seen_mask)
    target = torch.randint(len(space), (images,), generator=torch.Generator().manual_seed(SEED)).to(device)
    inputs = (space, draw_images(ours, images, device), target)
    steps = {name: Training(sac.train(), options, inputs, half=half) for name, sac in ways.items()}
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
    ways: dict[str, SAC], sizes: Sizes, scale: float, images: int, device: str, *, half: bool, rounds: int
) -> dict[str, Any]:
    ours = ways["ours"].eval()
    space = ours.bank_space
    with torch.autocast(device, torch.bfloat16, enabled=half):
        texts = ours.texts(space)  # once for all images, and so no part of a pass
        fill_banks([sac.eval().bank for sac in ways.values()], texts, max(1, round(scale * sizes.images)))
        batch = draw_images(ours, images, device)
        rivals: dict[str, Callable[[], Any]] = {
            name: partial(inference, sac, batch, texts) for name, sac in ways.items()
        }
        for _ in range(2):  # the second time, the banks have been written to
            found = {name: run() for name, run in rivals.items()}
            numbers = {name: [out.scores, out.bank.softmax(dim=1)] for name, out in found.items()}
            differences = worst_differences(numbers, half=half)
        memory = {name: peak_memory(run, device, runs=1) for name, run in rivals.items()}
        whole = {"images": images, "worst_difference": differences, **against_ours(rivals, memory, rounds)}
        parts = {name: inference_parts(sac, batch, texts) for name, sac in ways.items()}
        return whole | {"breakdown": {name: breakdown(part, rounds) for name, part in parts.items()}}


def inference(sac: SAC, images: Tensor, texts: SpaceTexts) -> SACOutput:
    out: SACOutput = sac(images, texts)
    sac.adapt(out)
    return out


def inference_parts(sac: SAC, images: Tensor, texts: SpaceTexts) -> dict[str, Callable[[], object]]:
    out: SACOutput = sac(images, texts)
    tokens, features = out.tokens, out.features
    assert features is not None
    return {
        "encoder": partial(sac.encode, images),
        "align": partial(sac.align, tokens, texts),
        "condenser": lambda: sac.classify(sac.condenser(tokens), texts),  # type: ignore[misc]
        "bank predict": lambda: sac.bank(features),  # type: ignore[misc]
        "bank update": partial(sac.adapt, out),
        "fusion": partial(fused, sac, out),
    }


def fused(sac: SAC, out: SACOutput) -> Tensor:
    assert out.vac is not None
    assert out.bank is not None
    aligned, condensed = (sac.pair_scores(logits, out.space) for logits in (out.sa, out.vac))
    return fuse(aligned, condensed, sac.bank_scores(out.bank), beta=sac.beta, gamma=sac.gamma)


def fill_banks(banks: list[Any], texts: SpaceTexts, images: int) -> None:
    """Random vectors under random seen pairs, as many as there are training images; texts for unseen pairs."""
    pairs, seen = texts.features.pairs, texts.space.seen_mask.nonzero()[:, 0]
    unseen = (~texts.space.seen_mask).nonzero()[:, 0].to(pairs.device)
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, images, 256):
        count = min(256, images - start)
        vectors = torch.randn(count, pairs.shape[1], generator=generator).to(pairs.device)
        probs = (5 * torch.randn(count, len(texts.space), generator=generator)).softmax(dim=1).to(pairs.device)
        labels = seen[torch.randint(len(seen), (count,), generator=generator)].to(pairs.device)
        for bank in banks:
            bank.update(vectors, probs, pair_index=labels)
    for bank in banks:
        bank.fill_texts(pairs[unseen].float(), unseen)


def worst_differences(found: dict[str, list[Tensor]], *, half: bool) -> dict[str, float]:
    """The largest difference of each way from ours, relative to the size of the tensor; at most 1e-3 in float32.

    Halves are not held to it: they round the cosines by which tokens win, and so where gradients go.
    """
    worst = {
        name: max(float((part - own).norm() / own.norm().clamp(min=1e-12)) for part, own in zip(parts, found["ours"]))
        for name, parts in found.items()
    }
    assert half or all(value <= 1e-3 for value in worst.values()), worst
    return {name: float(f"{value:.2g}") for name, value in worst.items() if name != "ours"}


def against_ours(rivals: dict[str, Callable[[], object]], memory: dict[str, int], rounds: int) -> dict[str, Any]:
    seconds = time_in_turn(rivals, rounds=rounds)
    return {
        "seconds": rounded(seconds),
        "times_faster": {name: round(value / seconds["ours"], 2) for name, value in seconds.items()},
        "megabytes": {name: round(value / 1e6) for name, value in memory.items()},
    }


def breakdown(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return rounded(time_in_turn(parts, rounds=rounds))


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in seconds.items()}


def cases(device: str, datasets: list[str]) -> list[tuple[str, float, bool]]:
    """Name, part of its numbers, and whether the usual way is run: on all of C-GQA it wants 30 GB for its prompts."""
    if device == "cuda":
        return [(name, 1.0, True) for name in datasets]
    return [
        *((name, 0.25 if name == "C-GQA" else 1.0, True) for name in datasets),
        *((name, 1.0, False) for name in datasets if name == "C-GQA"),
    ]


def measure(
    name: str, scale: float, usual: bool, encoder: str, device: str, *, images: int | None, **settings: Any
) -> dict[str, Any]:
    """A training step, then an inference pass of one data set, on ``scale`` of its numbers."""
    sizes = SIZES[name]
    options, space = load_options(sizes.preset, {"prompt_dropout": 0.0}), draw_space(sizes, scale)
    compiled = settings.pop("compiled")
    count = options.batch_size if images is None else images
    wanted = ("ours", "usual") if usual else ("ours",)
    ways: dict[str, SAC] = dict(zip(wanted, build(encoder, space, options, device, condenser=False)))
    found = {"training": measure_training(ways, options, count, device, compiled=compiled, **settings)}
    del ways
    ways = dict(zip(wanted, build(encoder, space, options, device, condenser=True)))
    found["inference"] = measure_inference(ways, sizes, scale, count, device, **settings)
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
