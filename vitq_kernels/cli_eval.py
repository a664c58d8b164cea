"""The verb ``vitq eval``."""

from __future__ import annotations

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import float_twin, numbers
from vitq_kernels.cli_output import Bar, finish, shown
from vitq_kernels.cli_quantized import classifies, facts, read_quantized
from vitq_kernels.images import ImageFolder, eval_transform


def evaluate(
    quantized: options.Quantized,
    images: options.Images,
    limit: options.Limit = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    device: options.Device = "cpu",
    json_file: options.Json = None,
) -> None:
    """Top-1 and speed; with float weights also agreement and KL.

    The float weights, to compare with, come from --checkpoint or --pretrained. Without labels there is no top-1. Of a
    feature extractor, which has no classes, the cosine of its features to the float ones takes the place of all three.
    """
    qmodel = read_quantized(quantized, device)
    transform = eval_transform(qmodel, mean=numbers("mean", mean), std=numbers("std", std), crop=crop)
    net = float_twin(qmodel, checkpoint, pretrained)
    folder = ImageFolder.scan(images).sample(limit, seed)
    with Bar("evaluating", len(folder.files)) as progress:
        result = vitq.evaluate(
            qmodel,
            folder.batches(transform, batch),
            float_model=None if net is None else net.to(device),
            features=not classifies(qmodel),
            progress=lambda done: progress(done, len(folder.files)),
        )
    payload = {**result.to_dict(), **facts(qmodel), "device": device}
    finish(shown(payload), payload, json_file)
