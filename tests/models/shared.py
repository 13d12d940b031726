"""Every method on the embedded CLIP, over one small label space."""

import torch

from czsl_heads import CompositionSpace, wrap
from czsl_heads.models.recipe import method_options
from czsl_heads.models.registry import find_method, method_names
from czsl_heads.training.options import load_options

# of this package: others may be installed
BASELINES = [name for name in method_names() if find_method(name).__module__.startswith("baselines.")]
METHODS = [*BASELINES, "sac"]
THREE_BRANCHES = ["troika", "sac", "eva"]
RELEASED = [name for name in BASELINES if "official" in method_options(name)]  # whose code is public
LEARNING = [name for name in METHODS if load_options(name, "shapes")[0].epochs]
ATTRIBUTES, OBJECTS = ["red", "striped", "Dark.Blue"], ["circle", "star"]
TARGETS = torch.tensor([0, 1, 2, 2, 1, 0])


def make_space():
    seen, unseen = [(0, 0), (1, 1), (2, 0)], [(0, 1)]
    return CompositionSpace(ATTRIBUTES, OBJECTS, seen=seen, unseen=unseen)


PAIRS = make_space().pairs
SEEN = PAIRS[make_space().seen_mask]


def make_images():
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def build(name, **options):
    """A method of the list with the small sizes of its preset, in eval mode."""
    torch.manual_seed(0)
    small, _ = load_options(name, "shapes")
    return find_method(name)(wrap("tiny"), make_space(), **{**small.model, **options}).eval()


def said(model, logits, pairs):
    """The logits that losses and scores are made of: EVA scores words by pairs."""
    return model._with_words(logits, pairs) if hasattr(model, "words") else logits


def ranked(name, pair, attribute, obj):
    """How three branches are one score: Eq. 13 of SAC, or EVA's sum."""
    return pair + 0.5 * (attribute + obj) if name == "eva" else pair + attribute * obj


def learned(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def disturb(model, scale=0.05):
    """Give what is learned other values than its first ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned(model):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def blank(model, device):
    """Give all tensors of a model blank ones on a device, which a mode of fake tensors may only pretend to have."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if isinstance(tensor, torch.nn.Parameter):
                    tensors[name] = torch.nn.Parameter(tensors[name], requires_grad=tensor.requires_grad)
    return model
