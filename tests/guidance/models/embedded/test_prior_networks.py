"""The embedded prior's networks in plain torch: those of diffusers and transformers, without the libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dreamfusion_fast.guidance.models.embedded.model import CONDITION_WIDTH, UNET_CONFIG, PriorNetwork
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.guidance.models.embedded.unet import PriorUNet

OTHER = UNET_CONFIG | {"block_out_channels": (32, 16, 48), "norm_num_groups": 2, "attention_head_dim": 2}


@pytest.mark.parametrize("config", [UNET_CONFIG, OTHER])
@torch.no_grad()
def test_is_diffusers_network(config):
    from diffusers import UNet2DConditionModel

    ours, theirs = PriorUNet(config).double(), UNet2DConditionModel(**config).double()
    for parameter in ours.parameters():
        parameter += 0.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    theirs.load_state_dict(ours.state_dict())
    image, t = torch.randn(3, 12, 16, 24).double(), torch.tensor([0, 113, 999])
    tokens, condition = torch.randn(3, 7, 384).double(), torch.randn(3, CONDITION_WIDTH).double()
    expected = theirs(image, t, tokens, class_labels=condition, return_dict=False)[0]
    torch.testing.assert_close(ours(image, t, tokens, condition), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_is_transformers_bert():
    from transformers import BertConfig, BertModel

    encoder = TextEncoder()
    encoded = encoder.tokenizer.encode_batch(["a cat", "a wooden chair with four long legs"])
    ids, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
    theirs = BertModel(BertConfig(**encoder.bert.config), add_pooling_layer=False).eval().double()
    theirs.load_state_dict(encoder.bert.state_dict())
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    states, weight = encoder.bert.double()(ids, mask), mask[..., None]  # states of padding are free
    torch.testing.assert_close(states * weight, expected * weight, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_block": 2}, "layers_per_block: got 2, want 1"),
        ({"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift: got default, want scale_shift"),
        ({"dropout": 0.1}, "unknown settings: .*dropout"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PriorNetwork(UNET_CONFIG | change)


def test_the_embedded_prior_imports_neither(tmp_path):
    code = (
        "import sys, torch\n"
        "from dreamfusion_fast.guidance import GuidanceConfig, create_guidance\n"
        "create_guidance(GuidanceConfig(), 'cpu').embed('a cat')\n"
        "print(sorted({'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    environment = os.environ | {"DREAMFUSION_FAST_CACHE": str(tmp_path)}  # or it reads the embedding from the cache
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert output.stdout.strip() == "[]", output.stdout + output.stderr
