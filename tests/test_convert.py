"""Conversion end to end: integer models against float ones, and against a simulation in reals written here."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal, reals
from tests.small_vits import (
    VARIANTS,
    mixed_allocation,
    small_vit,
    sqnr_db,
    variant_images,
    variant_quantized,
    variant_vit,
)
from tests.twins import level_table
from vitq_kernels.calibration import CalibrationStats, calibrate
from vitq_kernels.config import QuantConfig
from vitq_kernels.convert import quantize
from vitq_kernels.converter import Converter
from vitq_kernels.models import BlockParts, UnsupportedModelError, model_config, model_parts, model_sites
from vitq_kernels.nn import IntegerModule, PackedLinear, QuantBlock, QuantLinear
from vitq_kernels.ops import use_backend
from vitq_kernels.quantizers import AffineQuantizer, log2_steps, query_key_scales
from vitq_kernels.rounding import round_to_nearest, weight_scale
from vitq_kernels.spec import BitAllocation, QuantFormat, RowGroups, SiteBits

NEAR = 14  # dB of logits at W8A8, by what differs between images; the variants measured 17 to 28
SOME = (
    "class-token",
    "average-pool",
    "registers",
    "layer-scale",
    "no-qkv-bias",
    "distilled",
    "tanh-gelu",
    "dynamic-pad",
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fresh_images(variant: str = "class-token", count: int = 32) -> Tensor:
    """Images that calibration has not seen."""
    return variant_images(variant, count, seed=77)


def quality_db(variant: str, model: nn.Module, count: int = 32) -> float:
    """SQNR of an integer model's logits on fresh images."""
    images = fresh_images(variant, count)
    return sqnr_db(model(images), variant_vit(variant)(images))


# --- how near to the float model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_w8a8_is_near_the_float_model(variant: str) -> None:
    assert quality_db(variant, variant_quantized(variant)) > NEAR


@pytest.mark.parametrize("variant", ["class-token", "distilled", "layer-scale"])
def test_more_bits_are_nearer(variant: str) -> None:
    quality = [quality_db(variant, variant_quantized(variant, *bits)) for bits in ((2, 8), (4, 8), (8, 8))]
    assert quality[0] + 3 < quality[1]
    assert quality[1] + 3 < quality[2]
    assert quality_db(variant, variant_quantized(variant, 8, 4)) + 3 < quality[2]


def test_gptq_and_bias_correction_pay() -> None:
    """Each in the presence of the other, in dB at W3A8, as a mean over variants."""
    gains = []
    for variant in ("class-token", "average-pool", "layer-scale"):
        model, images = variant_vit(variant), variant_images(variant)
        stats, allocation = calibrate(model, images), BitAllocation.uniform(model_sites(model), 3)
        both, nearest, biased = (
            quality_db(variant, quantize(model, images, allocation, stats=stats, config=config))
            for config in (QuantConfig(), QuantConfig(gptq=False), QuantConfig(bias_correction=False))
        )
        gains.append((both - nearest, both - biased))
    mean = [sum(column) / len(gains) for column in zip(*gains, strict=True)]
    assert min(mean) > 1, gains


# --- the same integers everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree_bitwise_through_the_whole_model(variant: str) -> None:
    model, images = variant_quantized(variant), fresh_images(variant, 3)
    expected = model(images)
    assert expected.std() > 0.05
    with use_backend("reference"):
        assert_bitwise_equal(model(images), expected)


@pytest.mark.parametrize("bits", [(4, 4), (2, 3)], ids=["w4a4", "w2a3"])
def test_backends_agree_bitwise_at_few_bits(bits: tuple[int, int]) -> None:
    model, images = variant_quantized("distilled", *bits), fresh_images("distilled", 3)
    with use_backend("reference"):
        expected = model(images)
    assert_bitwise_equal(model(images), expected)


def test_a_model_converted_on_the_reference_backend_is_as_near() -> None:
    with use_backend("reference"):
        model = quantize(variant_vit("class-token"), variant_images())
    assert quality_db("class-token", model) > NEAR


def test_an_image_does_not_feel_its_batch() -> None:
    blocks, tokens = variant_quantized("class-token").blocks, reals("outlier", (5, 17, 32), seed=1)
    assert_bitwise_equal(blocks(tokens), torch.cat([blocks(x[None]) for x in tokens]))


def test_conversion_is_deterministic() -> None:
    model, images = variant_vit("class-token"), variant_images()
    expected = variant_quantized("class-token").state_dict()
    for name, tensor in quantize(model, images).state_dict().items():
        assert_bitwise_equal(tensor, expected[name])


# --- allocations --------------------------------------------------------------------------------------------------


# Logits of one model on two backends: a code of GELU or LayerNorm in a thousand may differ by one (47 dB on a CPU
# without AVX-512, equal on one with it).
BOUNDED = 30.0


@pytest.mark.parametrize("variant", SOME)
def test_row_groups_of_many_widths_work_in_any_order(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant)
    allocation = mixed_allocation(model)
    assert any(site.weight.order for site in allocation.sites.values() if site.weight)
    qmodel = quantize(model, images, allocation)
    for site in model_sites(model):
        if site.has_weight and site.in_block:
            module = qmodel.get_submodule(site.name)
            limits = 2.0 ** (torch.tensor(allocation.sites[site.name].weight.row_bits()) - 1)
            assert (module.weight_codes().double().abs().amax(1) <= limits).all()
    with use_backend("reference"):
        expected = qmodel(images)
    assert sqnr_db(qmodel(images), expected) > BOUNDED
    uniform = [quality_db(variant, variant_quantized(variant, bits)) for bits in (2, 8)]
    assert uniform[0] < quality_db(variant, qmodel) < uniform[1]


def regrouped(allocation: BitAllocation, change) -> BitAllocation:
    """Another allocation of the same widths: ``change`` of every block linear's groups."""
    return BitAllocation(
        {
            n: replace(s, weight=change(s.weight)) if n.startswith("blocks") and s.weight else s
            for n, s in allocation.sites.items()
        }
    )


def test_groups_of_one_width_are_the_uniform_layer() -> None:
    model, images = variant_vit("class-token"), variant_images()
    uniform = BitAllocation.uniform(model_sites(model), 4)
    expected = quantize(model, images, uniform)

    def in_groups(groups: RowGroups) -> RowGroups:
        order = tuple(reversed(range(groups.rows)))
        return RowGroups(groups.rows, (4,) * -(-groups.rows // 16), 16, order)

    qmodel = quantize(model, images, regrouped(uniform, in_groups))
    for name, tensor in qmodel.state_dict().items():
        assert_bitwise_equal(tensor, expected.state_dict()[name])
    assert_bitwise_equal(qmodel(images), expected(images))


def test_where_a_row_is_stored_does_not_matter() -> None:
    model, images = variant_vit("class-token"), variant_images()
    allocation = mixed_allocation(model)

    def other_order(groups: RowGroups) -> RowGroups:
        order = list(groups.order or range(groups.rows))
        for start, stop, _ in groups.groups():
            order[start:stop] = reversed(order[start:stop])
        return replace(groups, order=tuple(order))

    other = regrouped(allocation, other_order)
    assert other != allocation
    assert_bitwise_equal(quantize(model, images, other)(images), quantize(model, images, allocation)(images))


@pytest.mark.parametrize("kind", ["uniform-3", "uniform-8", "mixed"])
def test_sizes_are_those_of_the_packed_modules(kind: str) -> None:
    model = variant_vit("distilled")
    sites = model_sites(model)
    allocation = mixed_allocation(model) if kind == "mixed" else BitAllocation.uniform(sites, int(kind[-1]))
    qmodel = quantize(model, variant_images("distilled", 4), allocation)
    packed = {name: m for name, m in qmodel.named_modules() if isinstance(m, PackedLinear)}
    assert sum(m.weight_bytes for m in packed.values()) == allocation.weight_bytes(sites)
    assert len(packed) == len([site for site in sites if site.has_weight])
    for name, module in packed.items():
        stored = sum(t.numel() for t in (module.weight_packed, module.row_order))
        widths = torch.tensor(allocation.sites[name.removesuffix(".linear")].weight.row_bits())
        assert stored == int(widths.sum()) * module.in_features // 8 + module.groups.order_bytes


def test_boundary_layers_and_activations_have_their_widths() -> None:
    model = variant_vit("class-token")
    allocation = BitAllocation.uniform(model_sites(model), 3, 5)
    qmodel = quantize(model, variant_images(count=4), allocation)
    assert qmodel.patch_embed.proj.linear.groups.mean_bits == qmodel.head.groups.mean_bits == 8
    assert qmodel.patch_embed.proj.linear.quantize_input.bits == qmodel.head.quantize_input.bits == 8
    block = qmodel.blocks[1]
    assert {m.groups.mean_bits for m in block.modules() if isinstance(m, PackedLinear)} == {3}
    assert (block.norm1.bits, block.norm2.bits, block.attn.qkv.out_bits, block.attn.out_bits) == (5, 5, 5, 5)
    assert block.mlp.fc1.levels.shape == (32,)  # of 8 bits, but only 2^5 of them
    codes = block.mlp.fc1(block.norm2(torch.randn(2, 17, 32)))
    assert set(codes.unique().tolist()) <= set(block.mlp.fc1.levels.tolist())
    assert block.mlp.fc2.input_bits == 8  # levels, not codes of 5 bits
    assert block.attn.levels.shape == (2, 32)


def test_every_site_may_have_its_own_activation_width() -> None:
    model, images = variant_vit("class-token"), variant_images()
    sites = BitAllocation.uniform(model_sites(model), 8).sites
    widths = {"attn.qkv": 7, "attn.qk": 6, "attn.av": 3, "attn.proj": 5, "mlp.fc1": 4, "mlp.fc2": 8}
    changed = {n: replace(s, activation=widths.get(n.split(".", 2)[-1], 8)) for n, s in sites.items()}
    block = quantize(model, images, BitAllocation(changed)).blocks[0]
    assert (block.norm1.bits, block.attn.qkv.out_bits, block.attn.levels.shape[1]) == (7, 6, 8)
    assert (block.attn.out_bits, block.norm2.bits, block.mlp.fc1.out_bits) == (5, 4, 8)
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    assert [linear.input_bits for linear in linears] == [7, 5, 4, 8]


# --- every stage of an integer model against its formula in reals -------------------------------------------------


class Grid:
    """What the codes of a quantizer stand for, in float64."""

    def __init__(self, scale: Tensor, zero: Tensor | int, bits: int) -> None:
        fmt = QuantFormat(bits)
        self.scale, self.zero = scale.double(), torch.as_tensor(zero).double()
        self.lowest, self.highest = (fmt.qmin - self.zero) * self.scale, (fmt.qmax - self.zero) * self.scale
        self.shared = torch.zeros_like(self.lowest).clamp(self.lowest, self.highest)  # of all its numbers, nearest to 0

    @classmethod
    def of(cls, quantizer: AffineQuantizer) -> Grid:
        return cls(quantizer.scale, quantizer.zero_point, quantizer.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.double() - self.zero) * self.scale

    def check(self, codes: Tensor, exact: Tensor, slack: Tensor | float, rare: float = 0.0) -> None:
        """Asserts that codes are those of ``exact``: within half a step and ``slack``, but for a ``rare`` fraction."""
        clipped = torch.maximum(torch.minimum(exact, self.highest), self.lowest)
        far = (self.decode(codes) - clipped).abs() > 0.501 * self.scale + slack
        assert int(far.sum()) <= rare * far.numel(), f"{int(far.sum())} of {far.numel()} codes are wrong"
        assert codes.unique().numel() > 2


class RealLinear:
    """A linear of the float model, its weight rounded to nearest as a site's widths say, columns on the input grid."""

    def __init__(
        self,
        module: nn.Linear | nn.Conv2d,
        grid: Grid,
        bits: SiteBits,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        weight = module.weight.double().flatten(1)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.double()
        if shift is not None:  # taken off the input by its producer
            bias = bias + weight @ shift
        if gain is not None:  # layer scale
            weight, bias = weight * gain.double()[:, None], bias * gain.double()
        row_bits = torch.tensor(bits.weight.row_bits())
        columns = module.weight.flatten(1) * (1.0 if gain is None else gain[:, None]) * grid.scale.float()  # in float32
        self.step = weight_scale(columns, row_bits).double()  # real units of an accumulator unit
        codes = round_to_nearest(columns, self.step.float(), row_bits)
        self.weight = codes.double() * self.step[:, None] / grid.scale
        # What all codes of a channel have in common passes through the exact weight.
        self.bias = bias + (weight - self.weight) @ grid.shared

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias

    def check(self, actual: Tensor, x: Tensor, residual: Tensor | float = 0.0) -> None:
        """Asserts that a real output is this linear's, its bias rounded to accumulator units."""
        exact = self(x) + residual
        assert ((actual - exact).abs() <= 0.51 * self.step + 1e-5 * (1 + exact.abs())).all()


Record = dict[str, tuple[list[Tensor], Tensor]]


def recorded(model: nn.Module, images: Tensor) -> Record:
    """Inputs and output of every integer module in one forward, by name."""
    found: Record = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, IntegerModule):

            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                found[name] = (list(args), out)

            handles.append(module.register_forward_hook(hook))
    model(images)
    for handle in handles:
        handle.remove()
    return found


def check_block(part: BlockParts, stats: CalibrationStats, converter: Converter, record: Record) -> None:
    """Asserts that each stage of a block gives what the float block's formula gives on the stage's own inputs."""
    name, config, bits = part.name, converter.config, converter.bits
    qkv_in, out, fc1_in, hidden = (f"{name}.{suffix}" for suffix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    code_bits, av_bits = (bits[f"{name}.attn.{suffix}"].activation for suffix in ("qk", "av"))
    heads, width = part.attn.num_heads, part.attn.num_heads * part.attn.head_dim
    low, high = (t.double() for t in stats.qkv[qkv_in].choose(code_bits, config))
    key_mean, middle = stats.output_mean[qkv_in].double()[width : 2 * width], ((low + high) / 2)[2 * width :]

    # LayerNorm, both
    grids = {
        qkv_in: Grid.of(converter.quantizer(qkv_in, "qkv")),
        fc1_in: Grid.of(converter.quantizer(fc1_in, "fc1")),
        hidden: Grid.of(converter.quantizer(hidden, "fc2")),
        out: Grid.of(converter.quantizer(out, "proj", shift=middle.float())),
    }
    for norm, module, site in ((f"{name}.norm1", part.norm1, qkv_in), (f"{name}.norm2", part.norm2, fc1_in)):
        (x,), codes = record[norm]
        exact = F.layer_norm(x.double(), x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)
        grids[site].check(codes, exact, 1e-6)

    # qkv: q as it is, k centred by its mean, v by the middle of its range
    centre = torch.cat((torch.zeros(width), key_mean, middle))
    radius = torch.maximum((low - centre).abs(), (high - centre).abs())
    q_scale, k_scale, _ = query_key_scales(radius[:width], radius[width : 2 * width], heads, code_bits)
    v_scale = 2 * radius[2 * width :] / (2**code_bits - 1)
    coded = Grid(torch.cat((q_scale.double(), k_scale.double(), v_scale)), 0, code_bits)
    linear = RealLinear(part.attn.qkv, grids[qkv_in], bits[qkv_in])
    (a,), codes = record[qkv_in]
    coded.check(codes, linear(grids[qkv_in].decode(a)) - centre, 0.51 * linear.step)

    # attention over what those codes stand for
    q, k, v = coded.decode(codes).unflatten(-1, (3, heads, part.attn.head_dim)).permute(2, 0, 3, 1, 4)
    octaves = q @ k.mT * part.attn.softmax_scale / math.log(2)
    distance = octaves.amax(-1, keepdim=True) - octaves
    mixed = []
    for head, index in enumerate(stats.tau_error[f"{name}.attn.av"][av_bits - 2].argmin(0).tolist()):
        tau = log2_steps(av_bits)[index]
        levels = torch.tensor(level_table(av_bits, tau)).double()
        probability = levels[(distance[:, head] / tau).round().clamp(max=len(levels) - 1).long()]
        mixed.append(probability @ v[:, head] / probability.sum(-1, keepdim=True))
    a, residual = record[out][0]
    grids[out].check(a, torch.cat(mixed, -1), 1e-6, rare=1e-3)  # a distance on a tie may take either code

    # proj, fc1 with GELU, fc2
    proj = RealLinear(part.attn.proj, grids[out], bits[out], part.layer_scale1, middle)
    proj.check(record[out][1], grids[out].decode(a), residual)
    assert_bitwise_equal(record[f"{name}.norm2"][0][0], record[out][1])
    linear = RealLinear(part.mlp.fc1, grids[fc1_in], bits[fc1_in])
    (a,), codes = record[fc1_in]
    gelu = F.gelu(linear(grids[fc1_in].decode(a)), approximate=part.mlp.gelu)
    grids[hidden].check(codes, gelu, 0.6 * linear.step)  # GELU is at most 1.13 steep
    a, residual = record[hidden][0]
    assert_bitwise_equal(residual, record[out][1])
    RealLinear(part.mlp.fc2, grids[hidden], bits[hidden], part.layer_scale2).check(
        record[hidden][1], grids[hidden].decode(a), residual
    )


def check_stages(model: nn.Module, images: Tensor, fresh: Tensor, allocation: BitAllocation) -> None:
    """Asserts that every stage of the quantized model computes its formula, on the stage's own inputs.

    Over several stages codes on ties would go their own ways.
    """
    stats = calibrate(model, images)
    config = QuantConfig(gptq=False, bias_correction=False)
    qmodel = quantize(model, stats=stats, allocation=allocation, config=config)
    record = recorded(qmodel, fresh)
    parts = model_parts(model)
    converter = Converter(parts, stats, allocation, config, [])

    # patches
    conv, grid = parts.patch_proj, converter.quantizer("patch_embed.proj", "patch_embed")
    area = math.prod(conv.kernel_size)
    per_pixel = Grid(grid.scale.repeat_interleave(area), grid.zero_point.repeat_interleave(area), grid.bits)
    pixels = F.unfold(parts.pixels(fresh).double(), conv.kernel_size, stride=conv.kernel_size).transpose(1, 2)
    (_,), codes = record["patch_embed.proj.linear.quantize_input"]
    per_pixel.check(codes.flatten(1, 2), pixels, 1e-6)
    linear = RealLinear(conv, per_pixel, allocation.sites["patch_embed.proj"])
    patches = record["patch_embed.proj.linear"][1]
    linear.check(patches, per_pixel.decode(codes))

    # tokens, blocks one after the other
    grid = (codes.shape[1], codes.shape[2])
    patches = model.patch_embed.norm(patches.flatten(1, -2))
    x = parts.norms["norm_pre"](parts.embed(patches, grid))
    for part in parts.blocks:
        assert_bitwise_equal(record[f"{part.name}.norm1"][0][0], x)
        assert_bitwise_equal(record[f"{part.name}.attn.proj"][0][1], x)
        check_block(part, stats, converter, record)
        x = record[f"{part.name}.mlp.fc2"][1]

    # heads
    features = parts.head_inputs(model.norm(x))
    for name, head in parts.heads.items():
        grid = Grid.of(converter.quantizer(name, "head"))
        (f,), codes = record[f"{name}.quantize_input"]
        assert_bitwise_equal(f, parts.norms["fc_norm"](features[name]))
        grid.check(codes, f.double(), 1e-6)
        RealLinear(head, grid, allocation.sites[name]).check(record[name][1], grid.decode(codes))
    logits = torch.stack([record[name][1] for name in parts.heads]).mean(0)
    torch.testing.assert_close(qmodel(fresh), logits, rtol=1e-6, atol=1e-7)


ALLOCATIONS = {
    "w8a8": lambda model: BitAllocation.uniform(model_sites(model), 8),
    "w4a4": lambda model: BitAllocation.uniform(model_sites(model), 4, 4),
    "mixed-a6": lambda model: mixed_allocation(model, activation_bits=6),
}


@pytest.mark.parametrize("kind", ALLOCATIONS)
@pytest.mark.parametrize("variant", SOME)
def test_every_stage_is_its_formula_in_reals(variant: str, kind: str) -> None:
    model = variant_vit(variant)
    check_stages(model, variant_images(variant), fresh_images(variant, 5), ALLOCATIONS[kind](model))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_heads_have_their_own_steps(bits: int) -> None:
    """One head's attention is sharp, which asks for coarser steps of its probabilities."""
    model, images = small_vit(), variant_images()
    for block in model.blocks:
        block.attn.qkv.weight[:16] *= 4
    steps = calibrate(model, images).tau_error["blocks.1.attn.av"][bits - 2].argmin(0)
    assert steps[0] > steps[1]
    check_stages(model, images, fresh_images(count=5), BitAllocation.uniform(model_sites(model), 8, bits))


@pytest.mark.parametrize("variant", SOME)
def test_bias_correction_makes_the_mean_output_exact(variant: str) -> None:
    """On the calibration images each linear's mean output is the float model's, but for the bias's own rounding."""
    model, images = variant_vit(variant), variant_images(variant)
    stats, allocation = calibrate(model, images), BitAllocation.uniform(model_sites(model), 3)
    gains = {}
    for part in model_parts(model).blocks:
        gains |= {f"{part.name}.attn.proj": part.layer_scale1, f"{part.name}.mlp.fc2": part.layer_scale2}

    def mean_errors(config: QuantConfig) -> dict[str, Tensor]:
        """In accumulator units, by site of a real output; of qkv the keys, which are centred: their mean is 0."""
        qmodel = quantize(model, images, allocation, stats=stats, config=config)
        record, errors = recorded(qmodel, images), {}
        for site in model_sites(model):
            if not site.has_weight:
                continue
            name = f"{site.name}.linear" if site.kind == "patch_embed" else site.name
            module = qmodel.get_submodule(name)
            (a, *_), _ = record[name if module.quantize_input is None else f"{name}.quantize_input"]
            codes = a if module.quantize_input is None else record[f"{name}.quantize_input"][1]
            acc = codes.double().flatten(0, -2) @ module.weight_codes().double().t() + module.bias_q
            if site.kind == "qkv":
                errors[site.name] = acc.mean(0)[32:64]
            else:
                gain = gains.get(site.name)
                wanted = stats.output_mean[site.name].double() * (1.0 if gain is None else gain.double())
                errors[site.name] = acc.mean(0) - wanted / module.multiplier.double()
        return errors

    corrected, plain = mean_errors(QuantConfig(compensation=None)), mean_errors(QuantConfig(bias_correction=False))
    for name, error in corrected.items():
        assert error.abs().max() < 0.51, name
    assert sum(float(error.abs().max()) > 5 for error in plain.values()) > len(plain) / 2


# --- the float model, its numbers and its forms -------------------------------------------------------------------


def test_the_float_model_is_left_as_it_was() -> None:
    model, images = variant_vit("distilled"), variant_images("distilled")
    model.train()
    model.blocks[0].eval()  # a mixture, as in fine-tuning with frozen parts
    model.pos_embed.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def flags() -> tuple[list, ...]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return [type(m) for m in model.modules()], [m.training for m in model.modules()], hooks, gradients()

    def gradients() -> list[tuple[bool, bool]]:
        return [(p.requires_grad, p.grad is None) for p in model.parameters()]

    expected = flags()
    qmodel = quantize(model, images)
    assert flags() == expected
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, before[name])
    shared = {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in qmodel.state_dict().values() if t.numel()
    }
    assert not shared  # nothing that changes in one changes in the other
    assert not any(m.training for m in qmodel.modules())
    assert not any(p.requires_grad for p in qmodel.parameters())


def test_training_mode_comes_back_after_an_error() -> None:
    model = small_vit().train()
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, variant_images())
    handle.remove()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("variant", SOME)
def test_compensation_keeps_the_mean_of_the_residual_stream(variant: str) -> None:
    """On the calibration images: what the blocks before lost of it, attention and MLP put back."""
    model, images = variant_vit(variant), variant_images(variant)
    allocation = BitAllocation.uniform(model_sites(model), 3)
    expected, found = recorded_blocks(model, images), recorded_blocks(quantize(model, images, allocation), images)
    for wanted, x in zip(expected, found, strict=True):
        lost = (x - wanted).double().mean((0, 1)).abs()
        assert (lost < 0.02 * (x - wanted).double().std((0, 1)) + 1e-5).all(), lost / (x - wanted).std((0, 1))


def recorded_blocks(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The residual stream behind every block."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: found.append(out)) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def test_compensation_brings_the_residual_stream_nearer() -> None:
    """On fresh images, behind the last block, as a mean over variants in dB at W3A8."""
    gains = []
    for variant in ("class-token", "average-pool", "layer-scale"):
        model, images, fresh = variant_vit(variant), variant_images(variant), fresh_images(variant)
        stats, allocation = calibrate(model, images), BitAllocation.uniform(model_sites(model), 3)
        wanted = recorded_blocks(model, fresh)[-1]
        error = [
            (recorded_blocks(quantize(model, images, allocation, stats=stats, config=config), fresh)[-1] - wanted)
            for config in (QuantConfig(), QuantConfig(compensation=None))
        ]
        gains.append(10 * math.log10(float(error[1].square().mean() / error[0].square().mean())))
    assert sum(gains) / len(gains) > 0.2, gains


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_of_gelu_beat_even_codes(bits: int) -> None:
    """In dB at fc2's inputs of ``bits``, the mean over variants."""
    gains = []
    for variant in ("class-token", "tanh-gelu", "average-pool"):
        model, images = variant_vit(variant), variant_images(variant)
        sites = BitAllocation.uniform(model_sites(model), 8).sites
        narrow = BitAllocation({n: replace(s, activation=bits) if "fc2" in n else s for n, s in sites.items()})
        stats = calibrate(model, images)
        levels, even = (
            quality_db(variant, quantize(model, images, narrow, stats=stats, config=QuantConfig(gelu_levels=on)))
            for on in (True, False)
        )
        gains.append(levels - even)
    assert sum(gains) / len(gains) > 0, gains


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("variant", ["class-token", "distilled", "layer-scale"])
def test_a_half_precision_model_converts(variant: str, dtype: torch.dtype) -> None:
    model = variant_vit(variant).to(dtype)
    qmodel = quantize(model, variant_images(variant).to(dtype))
    images = fresh_images(variant)
    logits = qmodel(images.to(dtype))
    assert logits.dtype == dtype
    assert sqnr_db(logits.float(), variant_vit(variant)(images)) > NEAR


@pytest.mark.parametrize("variant", ["class-token", "distilled", "pre-norm"])
def test_an_integer_model_may_be_cast_to_half(variant: str) -> None:
    """Only the stream between the integer modules changes its dtype."""
    qmodel, images = variant_quantized(variant), fresh_images(variant)
    half = copy.deepcopy(qmodel).half()
    logits = half(images.half())
    assert logits.dtype == torch.float16
    assert sqnr_db(logits.float(), variant_vit(variant)(images)) > NEAR
    for name, module in qmodel.named_modules():
        if isinstance(module, IntegerModule):
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    assert_bitwise_equal(half.get_submodule(name)._buffers[key], tensor)


def test_a_double_precision_model_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be float32/float16/bfloat16"):
        quantize(small_vit().double(), variant_images().double())


def test_layer_scales_that_are_tiny_or_zero_switch_their_branch_off() -> None:
    model, images = small_vit(init_values=0.3), variant_images()
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()
        model.blocks[1].ls2.gamma.fill_(1e-6)
        model.blocks[1].ls1.gamma[::2] = 0.0
    qmodel = quantize(model, images, config=QuantConfig(compensation=None))
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    block = qmodel.blocks[0]
    torch.testing.assert_close(block.attn(block.norm1(x), x), x, rtol=0, atol=1e-6)
    block = qmodel.blocks[1]
    assert (block.mlp(block.norm2(x), x) - x).abs().max() < 1e-4
    assert sqnr_db(qmodel(images), model(images)) > NEAR


def test_weights_that_are_mostly_zero_convert() -> None:
    model = small_vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:40] = 0.0  # all q and some k: uniform attention
        model.blocks[0].attn.qkv.bias[:40] = 0.0
        model.blocks[1].mlp.fc1.weight.zero_()
        model.blocks[1].norm1.weight.zero_()  # constant tokens
        model.head.weight[3] = 0.0
    images = variant_images()
    logits = quantize(model, images)(images)
    assert bool(logits.isfinite().all())
    assert sqnr_db(logits, model(images)) > NEAR


def test_one_image_is_enough_to_convert() -> None:
    model, image = small_vit(), variant_images(count=1)
    logits = quantize(model, image)(image)
    torch.testing.assert_close(logits, model(image), rtol=0, atol=0.1 * float(model(image).abs().max()))


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 0}, {"global_pool": "", "num_classes": 0}], ids=["features", "tokens"]
)
def test_a_model_without_a_classifier_gives_features(arguments: dict) -> None:
    model, images = small_vit(**arguments), variant_images()
    features = quantize(model, images)(images)
    assert features.shape == model(images).shape
    assert sqnr_db(features, model(images)) > NEAR


# --- images and statistics ----------------------------------------------------------------------------------------


def test_statistics_alone_round_weights_to_nearest() -> None:
    variant = "layer-scale"
    model, images = variant_vit(variant), variant_images(variant)
    stats = calibrate(model, images)
    alone = quantize(model, stats=stats)
    plain = quantize(model, images, stats=stats, config=QuantConfig(gptq=False, bias_correction=False))
    for name, tensor in alone.state_dict().items():
        assert_bitwise_equal(tensor, plain.state_dict()[name])
    assert quality_db(variant, alone) > 15  # measured 22.8


def test_given_statistics_are_used_instead_of_the_images() -> None:
    model, images = variant_vit("class-token"), variant_images()
    wide = calibrate(model, 3 * images)
    qmodel = quantize(model, images, stats=wide)
    grid = qmodel.patch_embed.proj.linear.quantize_input
    expected = variant_quantized("class-token").patch_embed.proj.linear.quantize_input
    torch.testing.assert_close(grid.inv_scale, expected.inv_scale / 3, rtol=1e-5, atol=0)


def test_batches_of_images_are_one_tensor() -> None:
    model, images = variant_vit("class-token"), variant_images()
    stats = calibrate(model, images)
    expected = quantize(model, images, stats=stats, batch_size=8)
    found = quantize(model, iter(images.split(8)), stats=stats)
    for name, tensor in found.state_dict().items():
        assert_bitwise_equal(tensor, expected.state_dict()[name])


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_the_observer_is_the_configured_one(observer: str) -> None:
    model, images = variant_vit("class-token"), variant_images()
    stats = calibrate(model, images)
    config = QuantConfig(observer=observer)
    grid = quantize(model, stats=stats, config=config).patch_embed.proj.linear.quantize_input
    low, high = stats.inputs["patch_embed.proj"].choose(8, config)
    torch.testing.assert_close(1 / grid.inv_scale[::64], (high - low) / 255, rtol=1e-5, atol=0)


def test_progress_counts_sites() -> None:
    calls = []
    model = small_vit(depth=3)
    quantize(model, variant_images(count=2), progress=lambda *done: calls.append(done))
    assert calls == [(1, 20), (7, 20), (13, 20), (19, 20), (20, 20)]


def test_the_record_says_how_it_was_made() -> None:
    model = variant_vit("distilled")
    allocation = mixed_allocation(model)
    record = quantize(model, variant_images("distilled", 2), allocation).quantization
    assert record.allocation == allocation
    assert record.sites == model_sites(model)
    assert record.model_config == model_config(model)
    assert record.float_bytes == 4 * sum(site.rows * site.cols for site in model_sites(model))


# --- what has no integer form, and bad input ----------------------------------------------------------------------


def partly_supported() -> nn.Module:
    """Block 1 has an activation without a gate, block 2 post-norm."""
    model = small_vit(depth=4)
    model.blocks[1] = small_vit(1, act_layer="elu").blocks[1]
    model.blocks[2] = small_vit(2, block_fn=ResPostBlock).blocks[1]
    return model


def test_unsupported_blocks_stay_in_float_with_a_warning_each() -> None:
    model, images = partly_supported(), variant_images()
    with pytest.warns(UserWarning, match="stays in float") as caught:
        qmodel = quantize(model, images)
    assert sorted(str(w.message) for w in caught) == [
        "blocks.1 stays in float: activation ELU has no integer form",
        "blocks.2 stays in float: block type ResPostBlock has no integer form",
    ]
    assert {w.filename for w in caught} == {__file__}  # the caller's line
    assert [isinstance(block, QuantBlock) for block in qmodel.blocks] == [True, False, False, True]
    assert not any(isinstance(m, QuantLinear) for i in (1, 2) for m in qmodel.blocks[i].modules())
    assert isinstance(qmodel.head, QuantLinear)
    assert sqnr_db(qmodel(images), model(images)) > NEAR
    assert qmodel.quantization.model_config is None


def test_strict_refuses_a_model_with_unsupported_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1: activation ELU .* \(2 such parts\)"):
        quantize(partly_supported(), variant_images(), strict=True)


@pytest.mark.filterwarnings("ignore:.*stays in float")
@pytest.mark.parametrize("pool", ["map", "prr"])
def test_attention_pooling_stays_in_float(pool: str) -> None:
    model, images = small_vit(global_pool=pool), variant_images()
    qmodel = quantize(model, images)
    assert not any(isinstance(m, PackedLinear) for m in qmodel.attn_pool.modules())
    assert sqnr_db(qmodel(images), model(images)) > NEAR


@pytest.mark.parametrize("name", ["resnet18", "cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_another_architecture_is_refused_with_a_way_out(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=r"must be a timm VisionTransformer.*replace_linears\(\) takes any"):
        quantize(model, variant_images())


def test_neither_images_nor_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="images or stats must be given, got neither"):
        quantize(small_vit())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "pos_embed", "norm.bias", "patch_embed.proj.weight"])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = small_vit()
    model.get_parameter(name).data.flatten()[-1] = value
    with pytest.raises(ValueError, match=f"weights must be finite, got NaN or Inf in {name}"):
        quantize(model, variant_images())


def test_images_that_are_not_finite_are_named() -> None:
    images = variant_images().clone()
    images[20, 1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="images must be finite, got NaN or Inf in image 20"):
        quantize(small_vit(), images)


def test_an_empty_calibration_set_is_refused() -> None:
    with pytest.raises(ValueError, match="images must hold at least one image, got 0"):
        quantize(small_vit(), variant_images()[:0])


OTHERS = {
    "deeper": ({"depth": 3}, r"unknown sites \['blocks\.2\.attn\.av', 'blocks\.2\.attn\.proj', .* \.\.\."),
    "shallower": ({"depth": 1}, r"missing sites \['blocks\.1\.attn\.qkv'"),
    "wider": ({"embed_dim": 48}, "allocation of patch_embed.proj must have 32 weight rows, got 48"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_allocation_of_another_model_is_refused(case: str) -> None:
    arguments, message = OTHERS[case]
    allocation = BitAllocation.uniform(model_sites(small_vit(**arguments)), 4)
    with pytest.raises(ValueError, match=message):
        quantize(small_vit(), variant_images(), allocation)


def test_the_statistics_of_another_model_are_refused() -> None:
    stats = calibrate(small_vit(depth=1), variant_images(count=2))
    with pytest.raises(ValueError, match=r"stats do not fit the model: nothing was seen of \['blocks\.1\.attn\.qkv'"):
        quantize(small_vit(), stats=stats)
