"""Tiny random denoisers and whole pipelines of diffusers, made locally."""

import torch
from torch import nn


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, those too that are zero at first, large enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.6 if "to_q" in name or "to_k" in name else 0.2
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + 1 if "norm" in name and name.endswith("weight") else drawn)
    return module.eval()


def unet3d() -> nn.Module:
    """Returns a UNet3DConditionModel of three levels, 8 and 16 channels."""
    from diffusers import UNet3DConditionModel

    return randomised(
        UNet3DConditionModel(
            block_out_channels=(16, 16, 16),
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=8,
        )
    )


def motion_unet(positions: int = 8) -> nn.Module:
    """Returns a UNetMotionModel of two levels whose table of positions has so many frames."""
    from diffusers import UNetMotionModel

    return randomised(
        UNetMotionModel(
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=positions,
        )
    )


def wan(seed: int = 0, **options: object) -> nn.Module:
    """Returns a WanTransformer3DModel of two blocks, two heads of 12 channels."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 8, "freq_dim": 16}
    channels = {"in_channels": 4, "out_channels": 4, "rope_max_seq_len": 64}
    return randomised(WanTransformer3DModel(**{**sizes, **channels, **options}), seed)


WORDS = ("a", "boy", "lies", "in", "bed", "he", "jumps", "runs", "blurry")


def tokenizer(length: int) -> object:
    """Returns a tokenizer of whole words, padded to `length`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)


def clip_text(width: int = 8) -> nn.Module:
    """Returns a text tower of CLIP for 12 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=16, max_position_embeddings=12, eos_token_id=0, **sizes)
    return randomised(CLIPTextModel(config))


def model_scope() -> object:
    """Returns a whole ModelScope pipeline: text tower, UNet, decoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe = TextToVideoSDPipeline(randomised(vae), clip_text(), tokenizer(12), unet3d(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipeline(experts: int = 2) -> object:
    """Returns a whole Wan 2.2 pipeline, or with one expert Wan 2.1's."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    text = UMT5EncoderModel(UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    second = {"transformer_2": wan(1), "boundary_ratio": 0.5} if experts == 2 else {}
    pipe = WanPipeline(tokenizer(512), randomised(text), randomised(vae), scheduler, wan(0), **second)
    pipe.set_progress_bar_config(disable=True)
    return pipe
