"""The official models' arithmetic written out plainly from their state dicts, and random states of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import layer_norm

SOS, EOS, A, PHOTO, OF = 49406, 49407, 320, 1125, 539
VOCABULARY = 49408


def random_clip(*, vision=128, text=64, dim=64, vision_layers=2, text_layers=2, patch=8, grid=4, context=8, seed=0):
    """A state dict in OpenAI's layout; nothing is at its initial value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.2, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    state = {
        "logit_scale": torch.tensor(2.5),
        "positional_embedding": draw(context, text),
        "text_projection": draw(text, dim),
        "token_embedding.weight": torch.zeros(VOCABULARY, text),
        "visual.class_embedding": draw(vision),
        "visual.conv1.weight": draw(vision, 3, patch, patch, std=0.05),
        "visual.positional_embedding": draw(grid**2 + 1, vision),
        "visual.proj": draw(vision, dim),
    }
    state["token_embedding.weight"][[SOS, EOS, A, PHOTO, OF]] = draw(5, text)
    norms = {"ln_final": text, "visual.ln_pre": vision, "visual.ln_post": vision}
    for tower, width, layers in (("", text, text_layers), ("visual.", vision, vision_layers)):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            state[f"{block}.attn.in_proj_weight"] = draw(3 * width, width, std=0.1)
            state[f"{block}.attn.in_proj_bias"] = draw(3 * width)
            for name, (rows, columns) in {
                "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width),
                "mlp.c_proj": (width, 4 * width),
            }.items():
                state |= {
                    f"{block}.{name}.weight": draw(rows, columns, std=0.1),
                    f"{block}.{name}.bias": draw(rows),
                }
    for name, width in norms.items():
        state |= {f"{name}.weight": draw(width, mean=1.0), f"{name}.bias": draw(width)}
    return state


def random_troika(*, primitives, adapter=8, cmt=2, contexts=(3, 3, 3), seed=1, **sizes):
    """A state dict of the official module."""
    clip = random_clip(**sizes)
    generator = torch.Generator().manual_seed(seed)
    text, dim = clip["text_projection"].shape
    vision = len(clip["visual.class_embedding"])

    def draw(*shape, std=0.2, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    state = {f"clip.{name}": tensor for name, tensor in clip.items()}
    state |= {"soft_att_obj": draw(primitives, text), "lamda": draw(dim)}
    state |= {"patch_norm.weight": draw(dim, mean=1.0), "patch_norm.bias": draw(dim)}
    for name, length in zip(("comp", "attr", "obj"), contexts):
        state[f"{name}_ctx_vectors"] = draw(length, text)
    for index in range(2 * depth(clip, "visual.")):
        name = f"additional_visual_params.{index}"
        state |= {f"{name}.down_proj.weight": draw(adapter, vision), f"{name}.down_proj.bias": draw(adapter)}
        state |= {f"{name}.up_proj.weight": draw(vision, adapter), f"{name}.up_proj.bias": draw(vision)}
    for name in ("attr_disentangler", "obj_disentangler"):
        state |= {f"{name}.fc1.weight": draw(dim, dim), f"{name}.fc1.bias": draw(dim)}
        state |= {f"{name}.bn1_fc.weight": draw(dim, mean=1.0), f"{name}.bn1_fc.bias": draw(dim)}
        state |= {f"{name}.bn1_fc.running_mean": draw(dim), f"{name}.bn1_fc.running_var": draw(dim).square() + 0.5}
        state[f"{name}.bn1_fc.num_batches_tracked"] = torch.tensor(7)
    for layer in range(cmt):
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            state[f"cmt.{layer}.cross_attn.{name}.weight"] = draw(dim, dim)
        state |= {f"cmt.{layer}.cross_attn.proj.bias": draw(dim)}
        state |= {f"cmt.{layer}.norm.weight": draw(dim, mean=1.0), f"cmt.{layer}.norm.bias": draw(dim)}
        state |= {f"cmt.{layer}.mlp.0.weight": draw(4 * dim, dim), f"cmt.{layer}.mlp.0.bias": draw(4 * dim)}
        state |= {f"cmt.{layer}.mlp.3.weight": draw(dim, 4 * dim), f"cmt.{layer}.mlp.3.bias": draw(dim)}
    return state


def depth(state, tower):
    return sum(name.startswith(f"{tower}transformer.") and name.endswith("ln_1.weight") for name in state)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def quick_gelu(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(1.702 * hidden)


def norm(state, name, hidden):
    return layer_norm(hidden, hidden.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state, name, hidden):
    return F.linear(hidden, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attend(query, key, value, heads, mask=0.0):
    """[batch, positions, width] each, head by head."""
    parts = zip(*(part.chunk(heads, dim=-1) for part in (query, key, value)))
    return torch.cat([((q @ k.mT) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v for q, k, v in parts], dim=-1)


def block(state, name, hidden, mask=0.0, adapters=(None, None)):
    def adapt(adapter, stream):
        if adapter is None:
            return 0.0
        return 0.1 * linear(state, f"{adapter}.up_proj", linear(state, f"{adapter}.down_proj", stream).relu())

    normed = norm(state, f"{name}.ln_1", hidden)
    three = F.linear(normed, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"]).chunk(3, dim=-1)
    mixed = attend(*three, heads=hidden.shape[-1] // 64, mask=mask)
    hidden = hidden + linear(state, f"{name}.attn.out_proj", mixed) + adapt(adapters[0], hidden)
    inner = quick_gelu(linear(state, f"{name}.mlp.c_fc", norm(state, f"{name}.ln_2", hidden)))
    return hidden + linear(state, f"{name}.mlp.c_proj", inner) + adapt(adapters[1], hidden)


def image_tokens(state, images, prefix="", adapters=None):
    hidden = embedded_patches(state, images, prefix)
    layers = depth(state, f"{prefix}visual.")
    for layer in range(layers):
        pair = (None, None) if adapters is None else (f"{adapters}.{layer}", f"{adapters}.{layer + layers}")
        hidden = block(state, f"{prefix}visual.transformer.resblocks.{layer}", hidden, adapters=pair)
    return norm(state, f"{prefix}visual.ln_post", hidden) @ state[f"{prefix}visual.proj"]


def embedded_patches(state, images, prefix=""):
    """What enters the first block of the vision tower."""
    kernel = state[f"{prefix}visual.conv1.weight"]
    patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).mT
    cls = state[f"{prefix}visual.class_embedding"].expand(len(images), 1, -1)
    hidden = torch.cat([cls, patches], dim=1) + state[f"{prefix}visual.positional_embedding"]
    return norm(state, f"{prefix}visual.ln_pre", hidden)


def text_features(state, context, words, prefix=""):
    """ "[SOS] context words [EOS]", padded to the whole context; ``words`` [n, words, width]. Unit rows."""
    table = state[f"{prefix}token_embedding.weight"]
    length = len(state[f"{prefix}positional_embedding"])
    rows = [torch.cat([table[[SOS]], context, row, table[[EOS]]]) for row in words]
    eos = len(rows[0]) - 1
    hidden = F.pad(torch.stack(rows), (0, 0, 0, length - eos - 1), value=0.3)  # behind [EOS]: of no effect
    hidden = hidden + state[f"{prefix}positional_embedding"]
    mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)
    for layer in range(depth(state, prefix)):
        hidden = block(state, f"{prefix}transformer.resblocks.{layer}", hidden, mask)
    return unit(norm(state, f"{prefix}ln_final", hidden[:, eos]) @ state[f"{prefix}text_projection"])


def pair_words(table, pairs, attributes):
    return torch.stack([torch.stack([table[a], table[attributes + o]]) for a, o in pairs.tolist()])


def csp_logits(state, table, attributes, images, pairs, context=None):
    if context is None:
        context = state["token_embedding.weight"][[A, PHOTO, OF]]
    texts = text_features(state, context, pair_words(table, pairs, attributes))
    return state["logit_scale"].exp() * unit(image_tokens(state, images)[:, 0]) @ texts.T


def disentangled(state, name, features):
    hidden = linear(state, f"{name}.fc1", features)
    mean, variance = state[f"{name}.bn1_fc.running_mean"], state[f"{name}.bn1_fc.running_var"]
    hidden = (hidden - mean) / (variance + 1e-5).sqrt()
    return (hidden * state[f"{name}.bn1_fc.weight"] + state[f"{name}.bn1_fc.bias"]).relu()


def troika_logits(state, attributes, images, pairs):
    """Logits of pairs, attributes, objects."""
    tokens = image_tokens(state, images, "clip.", "additional_visual_params")
    cls = tokens[:, 0]
    views = [cls, disentangled(state, "attr_disentangler", cls), disentangled(state, "obj_disentangler", cls)]
    drawn = drawn_texts(state, attributes, tokens, pairs)
    return [
        state["clip.logit_scale"].exp() * (unit(view)[:, None] * texts).sum(-1) for view, texts in zip(views, drawn)
    ]


def drawn_texts(state, attributes, tokens, pairs):
    """Texts of each branch, drawn towards each image; the tokens are normed once more in each branch."""
    table = state["soft_att_obj"]
    words = [pair_words(table, pairs, attributes), table[:attributes, None], table[attributes:, None]]
    layers = sum(name.startswith("cmt.") and name.endswith(".q_proj.weight") for name in state)
    drawn = []
    for name, rows in zip(("comp", "attr", "obj"), words):
        texts = text_features(state, state[f"{name}_ctx_vectors"], rows, "clip.")
        tokens = norm(state, "patch_norm", tokens)
        moved = texts.expand(len(tokens), -1, -1)
        for layer in range(layers):
            cmt = f"cmt.{layer}"
            key, value = (linear(state, f"{cmt}.cross_attn.{part}_proj", tokens) for part in "kv")
            query = linear(state, f"{cmt}.cross_attn.q_proj", moved)
            mixed = attend(query, key, value, heads=query.shape[-1] // 64)
            moved = moved + linear(state, f"{cmt}.cross_attn.proj", mixed)
            inner = quick_gelu(linear(state, f"{cmt}.mlp.0", norm(state, f"{cmt}.norm", moved)))
            moved = moved + linear(state, f"{cmt}.mlp.3", inner)
        drawn.append(unit(texts + state["lamda"] * moved))
    return drawn


def doubled(state):
    """In float64, where it is of floats."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
