"""Judges the golden cases of StreamingT2V's networks and sampling through the modules that `generate` uses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vstar_engine.config.models import ImageSpec, Spec, StreamingSpec, TextSpec, UNetSpec, VaeSpec
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling
from vstar_engine.networks.appearance import MixedCrossAttention, Resampler, with_image
from vstar_engine.networks.conditional_attention import FeatureFuser, PixelEncoder
from vstar_engine.networks.image_encoder import ImageTower, clip_pixels
from vstar_engine.networks.spatial_attention import best_attention
from vstar_engine.networks.streaming_unet import ChunkDenoiser, StreamingUNet, streaming_of
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.sampling.ddim import sample
from vstar_engine.sampling.enhancer import EnhancerSchedule
from vstar_engine.sampling.streaming import Anchor, ChunkNoise, as_clip, chunk_batch, schedule_of
from vstar_engine.weights import checkpoint, key_map
from vstar_engine.weights.key_map import module_shapes
from vstar_engine.weights.streaming_keys import IMAGE, RESAMPLER, OfficialNames

from .case import Judge

FUSER_PREFIX = "temporal_transformer."


def streaming_spec(config: Mapping[str, Any]) -> Spec:
    """Reads a case's configuration as the specification of a streaming model."""
    widths, image, vae = config["block_out_channels"], config.get("image_tower", {}), config.get("vae", {})
    unet = UNetSpec(
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.get("layers_per_block", UNetSpec.num_res_blocks),
        head_dim=config.get("head_dim", UNetSpec.head_dim),
        context_dim=config.get("cross_attention_dim", UNetSpec.context_dim),
        fps_condition=False,
        norm_groups=config.get("groups", UNetSpec.norm_groups),
        image_tokens=16,
    )
    streaming = StreamingSpec(
        image=_image_spec(image) if image else ImageSpec(),
        pixel_channels=tuple(config["pixel_encoder_channels"]),
        resampler=config.get("resampler_inner", StreamingSpec.resampler),
        overlap=config.get("condition_frames", StreamingSpec.overlap),
    )
    return Spec("golden", unet, _vae_spec(vae) if vae else VaeSpec(), TextSpec(), size=(64, 128), streaming=streaming)


def _image_spec(config: Mapping[str, Any]) -> ImageSpec:
    out = config["output"] if "output" in config else config["out"]
    return ImageSpec(config["image_size"], config["patch"], config["width"], config["layers"], config["heads"], out)


def _vae_spec(config: Mapping[str, Any]) -> VaeSpec:
    widths = config["block_out_channels"]
    return VaeSpec(
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config["layers_per_block"],
        z_channels=config["latent_channels"],
        embed_dim=config["latent_channels"],
        scale_factor=config["scaling_factor"],
        norm_groups=config["groups"],
    )


def _pixel_encoder(judge: Judge) -> None:
    config = judge.case["config"]
    encoder = judge.filled(PixelEncoder(tuple(config["block_out_channels"]), config["out_channels"]))
    judge.compare(encoder(judge.tensor("image")), "out")


def _feature_fuser(judge: Judge) -> None:
    config = judge.case["config"]
    fuser = FeatureFuser(config["channels"], config["head_dim"], config["groups"])
    checkpoint.load(fuser, judge.golden.weights(judge.case), FUSER_PREFIX, device=judge.device)
    sample, known = judge.tensor("sample"), judge.tensor("cond")
    out = fuser(sample.flatten(0, 1), known.flatten(0, 1), sample.shape[1], known.shape[1])
    judge.compare(out.unflatten(0, sample.shape[:2]), "out")


def _image_preprocess(judge: Judge) -> None:
    config = judge.case["config"]
    image = torch.zeros(config["input"], device=judge.device) if config["zero_image"] else judge.tensor("image")
    kept = torch.tensor(config["rows_and_columns"], device=judge.device)
    judge.compare(clip_pixels(image).index_select(2, kept).index_select(3, kept), "out_sub")


def _image_tower(judge: Judge) -> None:
    tower = judge.filled(ImageTower(_image_spec(judge.case["config"])))
    judge.compare(tower(judge.tensor("pixels")), "out")


def _image_resampler(judge: Judge) -> None:
    config = judge.case["config"]
    resampler = judge.filled(Resampler(config["width"], config["inner"], config["tokens"]))
    embeddings = judge.tensor("image_embeds").unflatten(0, (config["batch"], config["anchor_frames"]))
    judge.compare(resampler(embeddings), "out")


def _apm_prompt_layout(judge: Judge) -> None:
    """Rows of both branches, the negative one first."""
    config, width = judge.case["config"], judge.array("image_embeds").shape[-1]
    tokens = len(judge.golden.weights(judge.case)["context_embedding.2.bias"]) // width
    resampler = judge.filled(Resampler(width, config["inner"], tokens))
    branches = [("text_negative", "zero_image_embeds"), ("text_positive", "image_embeds")]
    contexts = [with_image(judge.tensor(text)[:, None], resampler(judge.tensor(image)[:, None])) for text, image in branches]
    judge.compare(torch.cat(contexts)[:, 0, config["rows"]], "rows")


def _apm_attention(judge: Judge) -> None:
    config = judge.case["config"]
    text, image, hidden = judge.tensor("text"), judge.tensor("image_tokens"), judge.tensor("hidden")
    attention = MixedCrossAttention(
        config["channels"], text.shape[-1], config["heads"], config["head_dim"], image_tokens=image.shape[1]
    )
    attention, context = judge.filled(attention), with_image(text[:, None], image)
    judge.compare(attention.mix(context[:, 0])[:, config["context_rows"]], "context_rows")
    # the module adds its input to what the case stores
    judge.compare(attention(hidden, None, context, best_attention) - hidden, "out")


def network_weights(judge: Judge, spec: Spec) -> OfficialNames:
    """Returns a case's weights under official names."""
    return OfficialNames(judge.golden.weights(judge.case), spec)


def _filled(judge: Judge, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    """Fills a network with those of the tensors under a prefix that it has: a plain one lacks the mixers."""
    here = {prefix + name: tensors[prefix + name] for name in module_shapes(module)}
    checkpoint.load(module, here, prefix, device=judge.device)
    return module.eval()


def _given(judge: Judge) -> dict[str, Tensor]:
    """Returns the arguments of a case's network; the context has the image tokens where the case has some."""
    sample, text = judge.tensor("sample"), judge.tensor("text")[:, None]
    told = torch.as_tensor(judge.case["config"]["timestep"], device=judge.device).expand(len(sample))
    apm = judge.case["config"].get("mode", "plain") != "plain"
    context = with_image(text, judge.tensor("image_tokens")) if apm else text
    tar = sample.new_zeros(1, len(judge.case["config"]["block_out_channels"]), sample.shape[2])
    fps = torch.ones(len(sample), device=judge.device)
    return {"latents": sample, "timestep": told[:, None], "context": context, "fps": fps, "tar": tar}


def _cam_features(judge: Judge) -> None:
    config = judge.case["config"]
    spec, given = streaming_spec(config), _given(judge)
    network = StreamingUNet(spec)
    cam = _filled(judge, network.cam, network_weights(judge, spec), f"{key_map.UNET}cam.")
    frames = config["condition_frames"]
    given |= {"latents": given["latents"][:, :, :frames], "tar": given["tar"][..., :frames]}
    features = cam.pixel_encoder(judge.tensor("cond").flatten(0, 1))
    skips, middle = cam(**given, features=features)
    for i, skip in enumerate(skips):
        kept = config["rows_kept"].get(f"skip_{i}")
        judge.compare(skip if kept is None else skip[kept], f"skip_{i}")
    judge.compare(middle, "mid")


def _stream_unet(judge: Judge) -> None:
    config = judge.case["config"]
    spec, given, mode = streaming_spec(config), _given(judge), config["mode"]
    tensors = network_weights(judge, spec)
    if mode == "full":
        network = _filled(judge, StreamingUNet(spec), tensors, key_map.UNET)
        net: Any = ChunkDenoiser(network, judge.tensor("cond").transpose(1, 2))
    else:
        plain = spec.unet if mode == "apm" else replace(spec.unet, image_tokens=0)
        net = _filled(judge, UNet(plain), tensors, f"{key_map.UNET}base.")
    for out in (net(**given), _hoisted(net, **given)):
        judge.compare(out, "out")


def _hoisted(net: Any, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
    """Predicts as a sampling step does: with precomputed K, V and timesteps, and a second text that shares the stem."""
    videos = torch.arange(len(latents), device=latents.device)
    timesteps, context_kv = net.timestep_table(timestep[:, 0], fps), net.prepare_context(context, torch.zeros_like(context))
    return net(latents, timesteps.embedding(timesteps.rows[videos, videos]), context_kv, fps, tar)[: len(latents)]


def _stream_ddim(judge: Judge) -> None:
    """The schedule and a walk with a stand-in network, through `sample` and the steps' own noise."""
    config = judge.case["config"]
    schedule = schedule_of(Sampling(config["steps"], config["eta"], config["guidance"]))
    judge.exact(schedule.timesteps[::-1], "timesteps")
    for output, values in (("alpha_bar", schedule.alpha), ("alpha_bar_prev", schedule.alpha_prev), ("std", schedule.sigma)):
        judge.compare(values[::-1], output)
    branches, noises = judge.tensor("y"), judge.tensor("noises")

    def toy(x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Tensor]:
        eps = 0.5 * x + 0.2 * x.mean(dim=2, keepdim=True) + 1e-4 * int(t[0])
        return eps + branches[1], eps + branches[0]

    def noise(index: int) -> Tensor:
        return as_clip(noises[index])

    walked = sample(toy, schedule, judge.tensor("x_T"), guidance=config["guidance"], noise=noise)
    latents = torch.stack([x[0].transpose(0, 1) for _, _, x, _ in walked])
    judge.compare(latents[config["kept"]], "latents")


class _Recorded(ChunkDenoiser):
    """Keeps the guided prediction of every step, frame-major."""

    def __init__(self, network: StreamingUNet, known: Tensor, guidance: float):
        super().__init__(network, known)
        self.guidance, self.predicted = guidance, list[Tensor]()

    def __call__(self, *given: Any) -> Tensor:
        out = super().__call__(*given)
        cond, uncond = out.chunk(2)
        self.predicted.append((uncond + self.guidance * (cond - uncond))[0].transpose(0, 1))
        return out


def _stream_end_to_end(judge: Judge) -> None:
    """Every call of a case by the engine's chunks, on recorded noise; the chain stays in floats."""
    config, device = judge.case["config"], judge.device
    spec = streaming_spec(config)
    streaming, tensors = streaming_of(spec), network_weights(judge, spec)
    network, vae = _filled(judge, StreamingUNet(spec), tensors, key_map.UNET), Vae(spec.vae, encoder=False)
    tower = ImageTower(streaming.image)
    resampler = Resampler(spec.unet.context_dim, streaming.resampler, spec.unet.image_tokens)
    for module, prefix in ((vae, key_map.VAE), (tower, IMAGE), (resampler, RESAMPLER)):
        checkpoint.load(module.eval(), tensors, prefix, device=device)
    chunk = 2 * judge.tensor("first_chunk").transpose(0, 1)[None] - 1  # (1, 3, 16, H, W)
    anchor = Anchor.of(chunk[:, :, 0], tower, resampler)
    texts = judge.tensor("text_positive")[:, None], judge.tensor("text_negative")[:, None]
    context = torch.cat([with_image(texts[1], anchor.uncond), with_image(texts[0], anchor.cond)])
    judge.compare(context[:, 0, [0, 76, 77, 78, 92]], "context_rows")
    sampling = Sampling(config["steps"], config["eta"], config["guidance"])
    request = Request(("",), streaming.chunk, size=tuple(config["pixels"]), sampling=sampling, tar=None)
    video, latents, predicted = list[Tensor](), list[Tensor](), list[Tensor]()
    for call in range(config["calls"]):
        tape = [as_clip(noise) for noise in judge.tensor("step_noise")[call]]
        noise = ChunkNoise(judge.tensor("initial_noise")[call : call + 1], tape.__getitem__)
        denoiser = _Recorded(network, chunk[:, :, -streaming.overlap :], config["guidance"])
        batch = chunk_batch(denoiser, spec, torch.float32, request, texts, anchor, noise)
        for _ in range(batch.steps):
            batch.step()
            latents.append(batch.rows[0].latents[0].transpose(0, 1))
        predicted += denoiser.predicted
        chunk = vae.decode(batch.rows[0].latents).clamp(-1, 1)
        video.append((chunk[0, :, streaming.overlap :].transpose(0, 1) + 1) / 2)
    judge.compare(torch.stack(predicted).unflatten(0, (config["calls"], -1)), "noise_pred")
    judge.compare(torch.stack(latents).unflatten(0, (config["calls"], -1)), "latents")
    judge.compare(torch.cat(video), "video")


def _enhancer_schedule(judge: Judge) -> None:
    config = judge.case["config"]
    schedule = EnhancerSchedule.published(
        config["levels"], config["scale_min"], config["scale_max"], config["logsnr_clamp"], config["zero_terminal_snr"]
    )
    judge.compare(schedule.sigmas, "sigmas")
    judge.compare(schedule.alphas, "alphas")
    ratios = schedule.ratios(config["steps"], config["total_noise_levels"])
    judge.compare(ratios, "k_sigmas")
    judge.compare(schedule.times(ratios), "step_times")
    judge.exact(np.rint(schedule.times(ratios)).astype(np.int64), "rounded_times")


KINDS: dict[str, Callable[[Judge], None]] = {
    "pixel_encoder": _pixel_encoder,
    "feature_fuser": _feature_fuser,
    "image_preprocess": _image_preprocess,
    "image_tower": _image_tower,
    "image_resampler": _image_resampler,
    "apm_prompt_layout": _apm_prompt_layout,
    "apm_attention": _apm_attention,
    "cam_features": _cam_features,
    "stream_unet": _stream_unet,
    "stream_unet_trace": _stream_unet,
    "stream_ddim": _stream_ddim,
    "stream_end_to_end": _stream_end_to_end,
    "enhancer_schedule": _enhancer_schedule,
}
