"""Inputs that a model of an unknown type can run on, made from the names of its forward's arguments."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

ROWS, LENGTH = 2, 10


def _field(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that the configuration, or one inside it, has."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    for name in names:
        for own in (config, *inner):
            value = getattr(own, name, None)
            if value is not None:
                return value
    return None


def _tokens(high: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # From 4 on: smaller numbers are padding, begin and end in most types, and 90 on images and the like.
    return torch.randint(4, high, (ROWS, LENGTH), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _image(config: PreTrainedConfig) -> Tensor:
    size: Any = _field(config, "image_size", "input_size", "pretrain_image_size") or 64
    while isinstance(size, (list, tuple)):  # height and width, or those of several stages
        size = size[-1]
    return _normal(ROWS, _field(config, "num_channels", "in_channels", "in_chans") or 3, int(size), int(size))


def candidates(model: nn.Module, config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Sets of arguments from the likeliest to the least likely; the first that runs is taken."""
    known = set(inspect.signature(model.forward).parameters)
    text: dict[str, Any] = {"input_ids": _tokens()} if "input_ids" in known else {}
    decoder = {"decoder_input_ids": _tokens()[:, :4]} if "decoder_input_ids" in known else {}
    image = {"pixel_values": _image(config)} if "pixel_values" in known else {}
    mels = _field(config, "num_mel_bins", "input_feat_per_channel", "mel_dim", "feature_size", "input_dim") or 80
    frames = 2 * (_field(config, "max_source_positions") or 50)
    if text:
        yield text | decoder
        yield {**text, **decoder, "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64)}
        yield text | decoder | image
        boxes = torch.randint(1, 60, (ROWS, LENGTH, 4), generator=torch.Generator().manual_seed(4)).sort().values
        for name in ("bbox",):
            if name in known:
                yield {**text, **decoder, **image, name: boxes}
        yield {"input_ids": _tokens(20)[:, :4]}
        yield text
    if image:
        yield dict(image)
        yield image | decoder
        small = _normal(ROWS, 3, 64, 64)
        yield {"pixel_values": small, **decoder}
        frames_of_video = _field(config, "num_frames") or 2
        yield {"pixel_values": image["pixel_values"].unsqueeze(1).repeat(1, frames_of_video, 1, 1, 1)}
        yield {"pixel_values": _normal(ROWS, 3, 224, 224)}
        yield {**image, "input_ids": _tokens()}
    if "pixel_values_videos" in known:
        size = _field(config, "image_size", "crop_size") or 64
        yield {"pixel_values_videos": _normal(1, _field(config, "frames_per_clip") or 16, 3, size, size)}
    if "input_values" in known:
        yield {"input_values": _normal(ROWS, 4000), **decoder}
        yield {"input_values": _normal(ROWS, 1, 4000)}
        yield {"input_values": _normal(ROWS, 1, 1024, 128)}
        yield {"input_values": _normal(ROWS, _field(config, "max_length") or 1024, mels)}
        yield {"input_ids": _tokens(), "decoder_input_values": _normal(ROWS, 4, mels)}
    if "input_features" in known:
        for shape in ((ROWS, mels, frames), (ROWS, 40, mels), (ROWS, 1, 1024, mels)):
            yield {"input_features": _normal(*shape), **decoder}
    if "past_values" in known:
        length = _field(config, "context_length", "seq_length") or 32
        channels = _field(config, "num_input_channels", "input_size") or 1
        if channels > 1:
            yield {"past_values": _normal(ROWS, length, channels)}
        yield {"past_values": _normal(ROWS, length)}
        yield {"past_values": _normal(ROWS, length, channels)}
    if "inputs_embeds" in known:
        width = _field(config, "hidden_size", "d_model", "n_embd") or 64
        yield {"inputs_embeds": _normal(ROWS, LENGTH, width)}
    if "hidden_states" in known:
        yield {"hidden_states": _normal(ROWS, LENGTH, _field(config, "hidden_size", "d_model") or 64)}
