"""A stand-in for OpenAI's package, which is on no index: a CLIP of its class, with its attributes and its names.

Written from what is public of it: the parts, their names, and that blocks take the sequence first.
"""

from collections import OrderedDict

import torch
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, mask=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = mask

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, mask=None):
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*(Block(width, heads, mask) for _ in range(layers)))

    def forward(self, x):
        return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)  # sequence first inside


class VisionTransformer(nn.Module):
    def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim):
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    def __init__(self, *, vocabulary=49408, context_length=20, numbers=False, heads=(2, 1)):
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocabulary
        mask = torch.full((context_length, context_length), -torch.inf).triu(1)
        self.visual = VisionTransformer(28, 7, 128, 3, heads[0], 40)
        self.transformer = Transformer(64, 2, heads[1], mask)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(context_length, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(64**-0.5 * torch.randn(64, 40))
        self.logit_scale = nn.Parameter(torch.tensor(3.5))
        if numbers:  # as in the archives
            for name, value in (("input_resolution", 28), ("context_length", context_length)):
                self.__dict__.pop(name, None)
                self.register_buffer(name, torch.tensor(value))
            self.__dict__.pop("vocab_size")
            self.register_buffer("vocab_size", torch.tensor(vocabulary))

    def encode_image(self, image):
        return self.visual(image)

    def encode_text(self, text):
        x = self.ln_final(self.transformer(self.token_embedding(text) + self.positional_embedding))
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection

    def forward(self, image, text):
        return self.encode_image(image), self.encode_text(text)


def small_openai(**options):
    """A small random one in eval mode, always with the same weights, none of which are zeros or ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(**options)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.data += 0.2 * torch.randn_like(weight)
    return model.eval()


def openai_state(model=None):
    """The state dict of an archive: the weights, and three numbers among them."""
    model = model or small_openai()
    numbers = {"input_resolution": 28, "context_length": model.context_length, "vocab_size": model.vocab_size}
    return {**model.state_dict(), **{name: torch.tensor(value) for name, value in numbers.items()}}
