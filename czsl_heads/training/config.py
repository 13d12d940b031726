"""What decides the numbers of a command of training; free of Lightning, so that the command line reads it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from czsl_heads._checks import check_choice, check_range
from czsl_heads._files import flatten
from czsl_heads.data.digest import PicturesRead
from czsl_heads.data.layout import CompositionDataset, read_dataset
from czsl_heads.data.shapes import ShapesSpec
from czsl_heads.encoders.names import absolute
from czsl_heads.functional.feasibility import Masking
from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.models.registry import method_names
from czsl_heads.training.options import Options, change, load_options, nest
from czsl_heads.training.own_table import has_own_table, own_table
from czsl_heads.training.rows import (
    STUDIES,
    TABLES,
    Addition,
    Readout,
    Row,
    Study,
    Table,
    TableName,
    Trained,
    check_added,
    one_model,
)

QUICK_SHAPES = ShapesSpec(train_per_pair=8, val_per_pair=4, test_per_pair=8)
QUICK_EPOCHS = 3
SWEEPS = ("alpha", "beta", "gamma", "depth", "slots")
# Settings of the open world; a command of the closed one does not write them down.
OPEN_WORLD: dict[str, Any] = {"world": "closed", "feasibility": "encoder", "masking": "clean"}
# How a data set is read; a command that reads it as usual does not write them down.
READING: dict[str, Any] = {
    "upright": None,
    "names": "published",
    "allow_untrained_primitives": False,
    "allow_outside": False,
}
# What a study varies from, or would mix with.
_NEUTRAL: dict[str, tuple[str, Any]] = {
    "pilot": ("patch_drop", 0),
    "blend": ("head.cls_weight", 0),
    "reductions": ("head.cls_weight", 0),
    "gap": ("gap_loss", None),
}
# Flags of the trainer that an option decides, or that would leave no checkpoint or no log.
_RESERVED = (
    *("max_epochs", "max_steps", "max_time", "logger", "callbacks", "fast_dev_run", "enable_checkpointing"),
    *("use_distributed_sampler", "limit_train_batches", "limit_val_batches", "limit_test_batches"),
    *("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "overfit_batches"),
)


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a command; a folder holds one of these.

    Args:
        method: Its name.
        data: ``"shapes"``, or the folder of a data set.
        encoder, preset: Their names.
        options: All options of training.
        sources: Where each option is from that is no default.
        seeds: One model of each kind is trained for each.
        shapes: What is drawn, where ``data`` is ``"shapes"``.
        trainer: Flags of Lightning's Trainer.
        table: Name of the table; ``"one"`` is that of ``czsl train``.
        align: How the model of ``czsl train`` compares images with texts.
        add: ``"vac"`` and ``"bank"``, where they stand behind a method.
        studies: Names of studies beside the table.
        world, feasibility, masking: Of the open world.
        upright, names, allow_untrained_primitives, allow_outside: How the data set is read, see
            :func:`czsl_heads.data.read_dataset`.
        digest: Which pictures are read for the data set's digest.
        cache_dir: Folder for decoded images and frozen features.
    """

    method: str
    data: str
    encoder: str
    preset: str
    options: Options
    sources: dict[str, str]
    seeds: list[int]
    shapes: ShapesSpec | None
    trainer: dict[str, Any]
    table: TableName = "steps"
    align: Reduce = "max"
    add: tuple[Addition, ...] = ()
    studies: list[str] = field(default_factory=list)
    world: Literal["closed", "open"] = "closed"
    feasibility: str = "encoder"
    masking: Masking = "clean"
    upright: bool | None = None
    names: str = "published"
    allow_untrained_primitives: bool = False
    allow_outside: bool = False
    digest: PicturesRead = "all"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_choice("world", self.world, ("closed", "open"))
        check_choice("masking", self.masking, get_args(Masking))
        check_choice("table", self.table, get_args(TableName))
        check_choice("align", self.align, get_args(Reduce))
        check_choice("digest", self.digest, get_args(PicturesRead))
        for name, usual in READING.items():
            if self.data == "shapes" and getattr(self, name) != usual:
                raise ValueError(f"expected `{name}` with a data set of yours only, got it with the shapes world")
        for name in ("feasibility", "masking"):
            if self.world == "closed" and getattr(self, name) != OPEN_WORLD[name]:
                raise ValueError(f'expected `{name}` with world="open" only, got {getattr(self, name)!r} without')
        if self.feasibility != "encoder" and not Path(self.feasibility).is_file():
            raise ValueError(f'expected `feasibility` to be "encoder" or a file, got {self.feasibility}, which is none')

    def as_dict(self) -> dict[str, Any]:
        """All but the sources, for a JSON file, as plain values."""
        left_out = {"sources", "digest", "cache_dir", *(OPEN_WORLD if self.world == "closed" else ())}
        left_out |= {name for name, usual in READING.items() if getattr(self, name) == usual}
        if self.table != "one":
            left_out.add("align")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def read(self) -> CompositionDataset:
        """The data set that ``data`` names, read as it is asked for.

        Raises:
            DataError: As :func:`czsl_heads.data.read_dataset`.
        """
        return read_dataset(self.data, **reading_of(asdict(self)))

    @property
    def whole_table(self) -> Table:
        """The table, with rows that were not asked for."""
        if self.table == "own":
            return own_table(self.method)
        return one_model(self.align, self.add) if self.table == "one" else TABLES[self.table]

    @property
    def rows(self) -> list[Row]:
        """The rows that were asked for."""
        return self.whole_table.asked(self.add)

    def study(self, name: str) -> Study:
        """A study by its name."""
        return STUDIES[name](self.options)

    def options_of(self, trained: Trained) -> Options:
        """The options of one model."""
        return change(self.options, trained.changes)

    def readout(self, row: Row) -> Readout:
        """How a row scores, with all numbers known."""
        return row.readout.resolved(self.options_of(row.model))


def reading_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a command reads its data set, from what it wrote down."""
    return {name: settings.get(name, usual) for name, usual in READING.items()}


def configure(
    method: str = "sac",
    data: str = "shapes",
    encoder: str = "tiny",
    preset: str | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    imbalance: float | None = None,
    table: Literal["steps", "alignment", "own"] | None = None,
    add: Sequence[Addition] = (),
    quick: bool = False,
    reductions: bool = False,
    pilot: bool = False,
    blend: bool = False,
    gap: bool = False,
    sweep: str | None = None,
    world: Literal["closed", "open"] = "closed",
    feasibility: str = "encoder",
    masking: Literal["clean", "official"] = "clean",
    upright: bool | None = None,
    names: str = "published",
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    digest: Literal["sample", "all"] = "all",
    cache_dir: Path | None = None,
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Config:
    """The configuration of a table, from the arguments of ``czsl ablate``.

    Args:
        method: sac, clip, coop, csp, troika or eva, or a method that another package brings.
        data: "shapes", drawn into the output folder, or the path of a data set in the field's layout.
        encoder: "tiny", ARCHITECTURE:TAG of open_clip, such as ViT-L-14:openai, ARCHITECTURE:PATH or the PATH of
            OpenAI's own file, hf:OWNER/NAME or hf:DIR of transformers, or another name that czsl_heads.wrap takes;
            czsl encoders lists what there is.
        preset: Options of a data set (shapes, ut-zappos, mit-states, cgqa); default: shapes with the tiny encoder, else
            mit-states.
        seeds: How many seeds; from two on, the table shows mean and standard deviation. One is taken where nothing is
            trained.
        first_seed: The first of them.
        imbalance: Information imbalance of the shapes world, in [0, 1].
        table: "steps" builds SAC up step by step (its default); "own" is the table that a method brings (the default
            where there is one, as for eva); "alignment" puts Sparse Alignment into the method, and what --add names
            behind it (the default of the others).
        add: With the table "alignment": "vac", a condenser behind the method with Sparse Alignment; "vac" and "bank", a
            memory bank of its vectors too.
        quick: Fewer images and epochs: a check that everything runs, in under three minutes on two cores.
        reductions: Also train an alignment branch by every reduction over tokens (Table 5).
        pilot: Also train [CLS] with part of the patches hidden: AUC and modality gap by drop rate (Fig. 2).
        blend: Also train the alignment branch with [CLS] blended in (Fig. 4, left).
        gap: Also train [CLS], several reductions and the condenser with each loss that closes the gap, and without.
        sweep: Also vary one of alpha, beta, gamma, depth, slots, or several with commas between them.
        world: "open" also masks the open world's scores by feasibility, at a threshold searched on validation images;
            docs/open_world.md describes it. The open world without feasibility is in every table.
        feasibility: With --world open, what says which pairs can be: "encoder" (its own text features), a .pt file of
            the field, or any other file: word vectors as text, such as glove.6B.300d.txt.
        masking: With --world open: "clean" (an infeasible pair is never predicted) or "official" (its score is 0).
        upright: Turn images as their EXIF orientation says; default: yes, unless the pairs are those of MIT-States,
            UT-Zappos or C-GQA, whose published numbers were measured by code that ignores it.
        names: What prompts say of the data set's names: "published" (dots to blanks, lower case), "clean" (plain
            English), or a JSON, YAML, CSV or TSV file of replacements.
        allow_untrained_primitives: Accept validation and test pairs with words that no training pair has.
        allow_outside: Accept images outside of the data set's folder.
        digest: Which pictures are read to tell the data set from a changed one: "all", each once and again when it was
            touched, or a "sample" of 64.
        cache_dir: Folder for decoded images and frozen features, which several commands may share; default: none.
        options: Options that replace the preset's, such as --options.epochs 5, --options.bank.slots 8 or
            --options.model.dropout 0.1; docs/ablation.md lists them.
        trainer: Flags of Lightning's Trainer, such as --trainer.precision bf16-mixed or --trainer.devices 2.

    Raises:
        ValueError: An argument is out of range, unknown, or has no meaning for this method, data or world.
    """
    check_choice("method", method, method_names())
    chosen: TableName = table or _default_table(method)
    check_choice("table", chosen, (*TABLES, "own"))
    added = check_added(add)
    if added and chosen != "alignment":
        raise ValueError(f'expected `add` with table="alignment" only, got it with "{chosen}", whose rows are its own')
    switches = {"reductions": reductions, "pilot": pilot, "blend": blend, "gap": gap}
    studies = [name for name, asked in switches.items() if asked]
    for name in sweep.split(",") if sweep else ():
        check_choice("sweep", name, SWEEPS)
        studies.append(name)
    config = _configured(
        method, data, encoder, preset, imbalance, quick, options, trainer, seeds=seeds, first_seed=first_seed
    )
    for study, (option, neutral) in _NEUTRAL.items():
        found = flatten(config.options.as_dict())[option]
        if study in studies and found != neutral:
            raise ValueError(f"expected `options.{option}` to be {neutral} in the study {study}, got {found}")
    trains = bool(config.options.epochs or added or chosen != "alignment" or studies)
    return replace(
        config,
        seeds=config.seeds if trains else config.seeds[:1],
        table=chosen,
        add=added,
        studies=studies,
        world=world,
        feasibility=feasibility if feasibility == "encoder" else str(Path(feasibility).resolve()),
        masking=masking,
        upright=upright,
        names=names if names in ("published", "clean") else str(Path(names).resolve()),
        allow_untrained_primitives=allow_untrained_primitives,
        allow_outside=allow_outside,
        digest=digest,
        cache_dir=None if cache_dir is None else str(Path(cache_dir).resolve()),
    )


def _default_table(method: str) -> TableName:
    if has_own_table(method):
        return "own"
    return "steps" if method == "sac" else "alignment"


def configure_model(
    method: str = "sac",
    data: str = "shapes",
    encoder: str = "tiny",
    preset: str | None = None,
    seed: int = 0,
    imbalance: float | None = None,
    align: Reduce | None = None,
    add: Sequence[Addition] | None = None,
    quick: bool = False,
    world: Literal["closed", "open"] = "closed",
    feasibility: str = "encoder",
    masking: Literal["clean", "official"] = "clean",
    upright: bool | None = None,
    names: str = "published",
    allow_untrained_primitives: bool = False,
    allow_outside: bool = False,
    digest: Literal["sample", "all"] = "all",
    cache_dir: Path | None = None,
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Config:
    """The configuration of one model, from the arguments of ``czsl train``.

    Args:
        method: sac, clip, coop, csp, troika or eva, or a method that another package brings.
        data: "shapes", drawn into the output folder, or the path of a data set in the field's layout.
        encoder: "tiny", ARCHITECTURE:TAG of open_clip, such as ViT-L-14:openai, ARCHITECTURE:PATH or the PATH of
            OpenAI's own file, hf:OWNER/NAME or hf:DIR of transformers, or another name that czsl_heads.wrap takes;
            czsl encoders lists what there is.
        preset: Options of a data set (shapes, ut-zappos, mit-states, cgqa); default: shapes with the tiny encoder, else
            mit-states.
        seed: Decides initialisation, order, augmentation and dropout.
        imbalance: Information imbalance of the shapes world, in [0, 1].
        align: How an image is compared with texts: cls, as published (the default), or a reduction over all its tokens:
            max (SAC's default), topk, logsumexp, mean, linear, attention.
        add: "vac": a condenser behind the method; "vac" and "bank": a memory bank too, which is what SAC has.
        quick: Fewer images and epochs: a check that everything runs.
        world: "open" also masks the open world's scores by feasibility, as in czsl ablate.
        feasibility: With --world open: "encoder", a .pt file of the field, or word vectors as text.
        masking: With --world open: "clean" or "official".
        upright: Turn images as their EXIF orientation says; default: yes, unless the pairs are those of MIT-States,
            UT-Zappos or C-GQA, whose published numbers were measured by code that ignores it.
        names: What prompts say of the data set's names: "published" (dots to blanks, lower case), "clean" (plain
            English), or a JSON, YAML, CSV or TSV file of replacements.
        allow_untrained_primitives: Accept validation and test pairs with words that no training pair has.
        allow_outside: Accept images outside of the data set's folder.
        digest: Which pictures are read to tell the data set from a changed one: "all", each once and again when it was
            touched, or a "sample" of 64.
        cache_dir: Folder for decoded images and frozen features, which several commands may share; default: none.
        options: Options that replace the preset's, such as --options.epochs 5; docs/ablation.md lists them.
        trainer: Flags of Lightning's Trainer, such as --trainer.precision bf16-mixed or --trainer.devices 2.

    Raises:
        ValueError: An argument is out of range, unknown, or has no meaning for this method, data or world.
    """
    check_choice("method", method, method_names())
    if add is None:
        add = ("vac", "bank") if method == "sac" else ()
    config = _configured(method, data, encoder, preset, imbalance, quick, options, trainer, seeds=1, first_seed=seed)
    return replace(
        config,
        table="one",
        align=align or ("max" if method == "sac" else "cls"),
        add=check_added(add),
        world=world,
        feasibility=feasibility if feasibility == "encoder" else str(Path(feasibility).resolve()),
        masking=masking,
        upright=upright,
        names=names if names in ("published", "clean") else str(Path(names).resolve()),
        allow_untrained_primitives=allow_untrained_primitives,
        allow_outside=allow_outside,
        digest=digest,
        cache_dir=None if cache_dir is None else str(Path(cache_dir).resolve()),
    )


def _configured(
    method: str,
    data: str,
    encoder: str,
    preset: str | None,
    imbalance: float | None,
    quick: bool,
    options: dict[str, Any] | None,
    trainer: dict[str, Any] | None,
    *,
    seeds: int,
    first_seed: int,
) -> Config:
    """What all commands of training have in common."""
    check_range("seeds", seeds, 1)
    check_range("first_seed", first_seed, 0, 2**32 - seeds)  # what Lightning can be seeded with
    for flag in trainer or {}:
        if flag in _RESERVED:
            raise ValueError(f"expected `trainer` without {', '.join(_RESERVED)}, got {flag}; see `options` for epochs")
        if flag == "accumulate_grad_batches":
            raise ValueError(f"expected `trainer` without {flag}, got it; see `options.accumulate`")
    preset = preset or ("shapes" if encoder == "tiny" else "mit-states")
    chosen = flatten(nest(options or {}))
    training, sources = load_options(method, preset, chosen)
    if quick:
        fewer = {"condense_epochs": QUICK_EPOCHS} | ({"epochs": QUICK_EPOCHS} if training.epochs else {})
        training, sources = load_options(method, preset, {**fewer, **chosen})

    shapes = None
    if data == "shapes":
        shapes = QUICK_SHAPES if quick else ShapesSpec()
        shapes = shapes if imbalance is None else replace(shapes, imbalance=imbalance)
    elif imbalance is not None:
        raise ValueError(f'expected `imbalance` with data="shapes" only, got data={data!r}')
    return Config(
        method=method,
        data=data if data == "shapes" else str(Path(data).resolve()),
        encoder=absolute(encoder),
        preset=preset,
        options=training,
        sources=sources,
        seeds=list(range(first_seed, first_seed + seeds)),
        shapes=shapes,
        trainer=dict(trainer or {}),
    )
