"""A Vision Transformer as a program whose forward is the model's and whose backward is a composite's relevance rules.

The parts are run in the functions of lrp_rules.py. Nothing in the model is patched, hooked or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from vitq_kernels.lrp_composite import Composite
from vitq_kernels.models import NORMS, BlockParts, MergingParts, MlpParts, ModelParts, UnsupportedModelError
from vitq_kernels.windows import merged_patches

# Called with a site's name, its relevance, and how many of its tokens stand before the patch tokens. Tokens lie along
# dimension -2: [B, S, N] at linears and av (S = P at the patch embedding), [B, H, S, S] at qk; heads have none: [B, N].
# Token maps are [B, H, W, N], windowed scores [B, W, H, S, S]; no tokens stand before theirs.
Visit = Callable[[str, Tensor, int], None]


def run_with_rules(
    parts: ModelParts, rules: Composite, images: Tensor, visit: Visit, *, features: bool = False
) -> Tensor:
    """Logits [B, classes] of the model, or its features [B, C], in functions whose backward is the relevance rule.

    ``torch.autograd.grad(logits, images, start)`` then calls ``visit`` at every site, from the head to the patch
    embedding, and returns what flows back to the pixels (``rules.relevance(images, ...)`` is their relevance).

    Args:
        parts: of a model in eval mode; its weights are constants here.
        rules: one function for every operation.
        images: normalised, of the weights' dtype, [B, C, H, W], requiring grad.
        visit: see ``Visit``.
        features: stop in front of the heads, at what they read (the mean of it where there are several).
    """

    def site(name: str, output: Tensor, prefix: int = parts.prefix_tokens) -> Tensor:
        value = output.detach()  # the hook of a tensor must not hold that tensor: the cycle would outlive the call

        def hook(flowed: Tensor) -> None:  # what a hook returns would replace the flow
            visit(name, rules.relevance(value, flowed), prefix)

        output.register_hook(hook)
        return output

    norms = parts.norms

    def norm(name: str, x: Tensor) -> Tensor:
        module = norms[name]
        if isinstance(module, nn.Identity):
            return x
        if not isinstance(module, NORMS):
            raise UnsupportedModelError(f"{name}: {type(module).__name__} has no relevance rule")
        return rules.norm(x, module)

    def read_by(head: str) -> Callable[[Tensor], Tensor]:
        return lambda tokens: parts.head_inputs(tokens)[head]

    embedded = rules.patch_embed(parts.pixels(images), parts.patch_proj)
    grid = (embedded.shape[-2], embedded.shape[-1])
    x = norm("patch_embed.norm", site(parts.patch_name, embedded.flatten(2).transpose(1, 2), 0))
    with torch.no_grad():  # what is added to patches of zeros: the prefix tokens and the position embedding
        constant = parts.embed(torch.zeros_like(x), grid)
    # The sums of Chefer's Add run over the patch tokens; in Chefer's code also over the class token, which is constant.
    patches = rules.add(x, constant[:, -x.shape[1] :])
    x = norm("norm_pre", torch.cat([constant[:, : -x.shape[1]], patches], dim=1))
    x = x.unflatten(1, grid) if parts.token_map else x
    for step in parts.steps:
        if isinstance(step, BlockParts):
            x = _block(rules, step, x, site)
        elif isinstance(step, MergingParts):
            x = _merging(rules, step, x, site)
        else:
            raise UnsupportedModelError(f"{step.name}: {parts.left_in_float[step.name]} has no relevance rule")
    x = norm("norm", x)
    outputs = []
    with torch.no_grad():
        reads = list(parts.head_inputs(x)) if features else list(parts.heads)
    for name in reads:
        pooled = norm("fc_norm", rules.pool(x, read_by(name)))
        if pooled.ndim != 2:
            raise UnsupportedModelError("global_pool: a model that does not pool its tokens has nothing to start from")
        outputs.append(pooled if features else site(name, rules.linear(pooled, parts.heads[name])))
    return outputs[0] if len(outputs) == 1 else rules.scale(reduce(rules.add, outputs), 1 / len(outputs))


def _block(rules: Composite, block: BlockParts, x: Tensor, site: Callable[[str, Tensor], Tensor]) -> Tensor:
    attn, mlp = block.attn, block.mlp
    y = _optional_norm(rules, x, block.before[0])
    windows = attn.windows_of(x)
    y = y if windows is None else windows.pad(y)
    qkv = site(f"{block.name}.attn.qkv", rules.linear(y, attn.qkv))
    q, k, v = attn.split(qkv, windows)
    q, k = _optional_norm(rules, q, attn.q_norm), _optional_norm(rules, k, attn.k_norm)
    if attn.rope is not None:
        q, k = rules.pool(q, attn.turned), rules.pool(k, attn.turned)
    logits = rules.scale(site(f"{block.name}.attn.qk", rules.matmul(q, k.mT)), attn.softmax_scale)
    bias = attn.bias_of(windows)
    if bias is not None:
        logits = rules.add(logits, bias.expand_as(logits))
    y = rules.matmul(rules.softmax(logits), v)
    y = site(f"{block.name}.attn.av", attn.merged(y, windows))
    y = site(f"{block.name}.attn.proj", rules.linear(_optional_norm(rules, y, attn.norm), attn.proj))
    y = y if block.layer_scale1 is None else rules.scale(y, block.layer_scale1.detach())
    x = rules.add(x, _optional_norm(rules, y, block.behind[0]))
    y = site(f"{block.name}.mlp.fc1", rules.linear(_optional_norm(rules, x, block.before[1]), mlp.fc1))
    y = _optional_norm(rules, _hidden(rules, y, mlp), mlp.norm)
    y = site(f"{block.name}.mlp.fc2", rules.linear(y, mlp.fc2))
    y = y if block.layer_scale2 is None else rules.scale(y, block.layer_scale2.detach())
    return rules.add(x, _optional_norm(rules, y, block.behind[1]))


def _merging(rules: Composite, merging: MergingParts, x: Tensor, site: Callable[[str, Tensor], Tensor]) -> Tensor:
    name = f"{merging.name}.reduction"
    if merging.post_norm:
        return rules.norm(site(name, rules.linear(merged_patches(x), merging.reduction)), merging.norm)
    return site(name, rules.linear(rules.norm(merged_patches(x), merging.norm), merging.reduction))


def _optional_norm(rules: Composite, x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else rules.norm(x, norm)


def _hidden(rules: Composite, x: Tensor, mlp: MlpParts) -> Tensor:
    if mlp.gate is None:
        return rules.activation(x, mlp.activation)
    first, last = x.chunk(2, -1)
    if mlp.gate == "first":
        return rules.product(rules.activation(first, mlp.activation), last)
    return rules.product(first, rules.activation(last, mlp.activation))
