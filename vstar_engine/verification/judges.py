"""Judges each kind of golden case through the modules that `generate` uses, on the outputs that it stores."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vstar_engine.backends import eager
from vstar_engine.config.timeline import anchor_frames
from vstar_engine.kernels.temporal_attention import temporal_attention, temporal_attention_probs
from vstar_engine.networks.blocks import ResBlock, TemporalConvBlock, TemporalTransformer
from vstar_engine.networks.step import Conditioning, NetworkCall, SamplingStep, StepInputs
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae
from vstar_engine.prompting.interpolation import spread
from vstar_engine.prompting.tokenizer import tokenize
from vstar_engine.sampling import schedule
from vstar_engine.sampling.ddim import coefficients, sample
from vstar_engine.sampling.schedule import Schedule
from vstar_engine.sampling.tar import toeplitz
from vstar_engine.video import to_bytes
from vstar_engine.weights import checkpoint, key_map, official_config

from . import streaming_judges
from .blend_judges import BLEND_KINDS
from .case import Finding, Judge

SCHEDULE_TOLERANCE = 1e-6
BYTES_OFF = 0.005


def _rows(tar: dict[str, Any], levels: int, width: int, frames: int) -> Tensor:
    """Converts {latent width: [sigma, strength]} to the network's (1, levels, frames) rows."""
    rows = torch.zeros(1, levels, frames)
    for listed, (sigma, strength) in tar.items():
        level = math.log2(width / int(listed))
        if level in range(levels):
            rows[0, int(level)] = toeplitz(frames, sigma, strength)
    return rows


def _tar_attention(judge: Judge) -> None:
    config = judge.case["config"]
    frames, heads = config["frames"], config["heads"]
    g = toeplitz(frames, config["std"], config["scale"]) if config["regularised"] else torch.zeros(frames)
    g = g.to(judge.device)
    # (positions, frames, heads * dim) -> (1, frames, positions, heads, dim)
    judge.check_input(judge.array("q")[0, 0, :16], "q_head")
    q, k, v = (judge.tensor(name).transpose(0, 1).unflatten(-1, (heads, -1))[None] for name in "qkv")
    out = temporal_attention(q, k, v, g)[0].flatten(-2).transpose(0, 1)
    judge.compare(out, "out", pos=0, frames_idx=1)
    if judge.stores("out_sum"):
        judge.compare(out[: len(judge.arrays["out_sum"])].sum(dim=(1, 2)), "out_sum")
    judge.compare([float((out.double() ** 2).sum())], "out_sq")
    if judge.stores("probs"):
        stored = judge.arrays["probs"]
        golden = stored.reshape(-1, heads, *stored.shape[1:]).mean(axis=1)
        judge.compare(temporal_attention_probs(q, k, g, list(range(len(golden))))[0], "probs", golden=golden, frames_idx=1)


def _temporal_transformer(judge: Judge) -> None:
    config = judge.case["config"]
    frames, width = config["frames"], config["hw"][1]
    depth = len({name.split(".")[1] for name in judge.golden.weights(judge.case) if name.startswith("transformer_blocks")})
    block = TemporalTransformer(config["channels"], config["heads"], config["dim_head"], depth, config["use_linear"])
    block, x = judge.filled(block), judge.tensor("x")
    for output, run in {"out_plain": {}, **judge.case["runs"]}.items():
        if judge.stores(output):
            tar = run["spec"] if run.get("regularised") else {}
            judge.compare(block(x, _rows(tar, 1, width, frames)[:, 0].to(judge.device)), output, frames_idx=-3)


def _block(judge: Judge) -> None:
    config = judge.case["config"]
    if config["type"] == "ResBlock":
        temporal = any("temopral_conv" in name for name in judge.golden.weights(judge.case))
        block = judge.filled(ResBlock(config["cin"], config["cout"], config["emb"], temporal))
        # (batch * frames, channels, ...) -> (batch, frames, channels, ...)
        out = block(judge.tensor("x"), judge.tensor("emb"), config["frames"]).unflatten(0, (-1, config["frames"]))
        if judge.stores("out"):
            stored = judge.arrays["out"]
            judge.compare(out, "out", golden=stored.reshape(len(out), -1, *stored.shape[1:]), frames_idx=1)
    else:
        judge.compare(judge.filled(TemporalConvBlock(config["cin"]))(judge.tensor("x")), "out", frames_idx=-3)


def unet_case(judge: Judge) -> tuple[UNet, list[Tensor]]:
    """Returns a case's network and its arguments."""
    case, config = judge.case, judge.case["config"]
    spec = official_config.spec_from_official(judge.golden.config(case, "unet_params"))
    tar = config["tar"] if config.get("regularised_layers") else {}
    x, context = judge.tensor("x"), judge.tensor("context")
    rows = _rows(tar, spec.levels, x.shape[-1], x.shape[2]).to(judge.device)
    context = context[None] if config["per_frame"] else context[:, None]
    return judge.filled(UNet(spec)), [x, judge.tensor("timesteps")[:, None], context, judge.tensor("fps"), rows]


def _unet(judge: Judge) -> None:
    judge.check_input(judge.array("x").ravel()[:16], "x_head")
    if not judge.stores("out", "out_frames", "out_frame_sq"):
        return
    unet, inputs = unet_case(judge)
    for out in (unet(*inputs), _hoisted(unet, *inputs)):
        judge.compare(out, "out", frames_idx=2)
        if judge.stores("out_frames"):
            judge.compare(out[:, :, judge.tensor("frames_idx").long()], "out_frames")
        judge.compare((out.double() ** 2).sum(dim=(0, 1, 3, 4)), "out_frame_sq", frames_idx=0)


def _hoisted(unet: UNet, x: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
    """Predicts as a sampling step does: with precomputed K, V and timesteps, and a second text that shares the stem."""
    timesteps, videos = unet.timestep_table(timestep[:, 0], fps), torch.arange(len(x), device=x.device)
    context_kv = unet.prepare_context(context, torch.zeros_like(context[:, :1]))
    return unet(x, timesteps.embedding(timesteps.rows[videos, videos]), context_kv, fps, tar)[: len(x)]


def _vsp(judge: Judge) -> None:
    for run in judge.case["runs"]:
        if "error" in run or run["num_anchors"] > run["num_frames"]:
            continue  # the published code has no answer here
        output = f"out.{run['i']}"
        if not judge.stores(output):
            continue
        mode = "hold" if run["mode"] == "same" else run["mode"]
        ours = spread(judge.tensor(f"anchors.{run['i']}"), run["num_frames"], mode, run["indices_list"])
        places = judge.places("frames_idx", len(judge.arrays[output]), len(ours))
        # ours gives the last frame the last anchor
        rows = [row for row, place in enumerate(places) if mode != "hold" or place != len(ours) - 1]
        judge.compare(ours[[places[row] for row in rows]], output, golden=judge.arrays[output][rows])
    for frames, count, *where in judge.arrays.get("index_table", np.zeros((0, 2), int)).tolist():
        judge.exact(anchor_frames(count, frames), "index_table", golden=where[:count])


def _ddim(judge: Judge) -> None:
    buffers = schedule.buffers()
    for name in judge.arrays:
        if name.startswith("ddpm."):
            judge.compare(buffers[name.removeprefix("ddpm.")], name, SCHEDULE_TOLERANCE)
    for run in judge.case["runs"]:
        if "prefix" in run:
            _schedule_arrays(judge, run)
        else:
            _trajectory(judge, run)


def _schedule_arrays(judge: Judge, run: dict[str, Any]) -> None:
    prefix, built = run["prefix"], []
    if not any(name.startswith(prefix) for name in judge.arrays):
        return
    if run["steps_asked"] == run["steps_got"]:
        built.append(Schedule.ddim(run["steps_asked"], eta=run["eta"]))
    if not built or judge.stores(prefix + "timesteps"):
        built.append(Schedule.ddim(timesteps=judge.array(prefix + "timesteps"), eta=run["eta"]))
    for ours in built:
        judge.exact(ours.timesteps, prefix + "timesteps")
        arrays = {
            "ddim_alphas": ours.alpha,
            "ddim_alphas_prev": ours.alpha_prev,
            "ddim_sigmas": ours.sigma,
            "ddim_sqrt_one_minus_alphas": np.sqrt(1 - ours.alpha),
            "ddim_scale_arr": ours.scale,
            "ddim_scale_arr_prev": ours.scale_prev,
        }
        for name, values in arrays.items():
            judge.compare(values, prefix + name, SCHEDULE_TOLERANCE)


def _trajectory(judge: Judge, run: dict[str, Any]) -> None:
    name, a, b = run["trajectory"], run["a"], run["b"]
    if not judge.stores(f"{name}.x", f"{name}.pred_x0", f"{name}.out"):
        return
    c = judge.tensor(f"{name}.c")
    u = judge.tensor(f"{name}.u") if run["cfg"] != 1 or judge.stores(f"{name}.u") else None

    def toy(x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        eps = a * x + b * torch.sin(3 * x + 0.01 * int(t[0]))
        return eps + c, None if u is None else eps + u

    if run["steps"] == run["steps_got"]:
        walk = Schedule.ddim(run["steps"], eta=run["eta"])
    else:  # the published spacing gave another number of steps than it was asked for
        walk = Schedule.ddim(timesteps=np.arange(0, 1000, 1000 // run["steps"]) + 1, eta=run["eta"])
    x = judge.tensor(f"{name}.x_T")
    noise, start = judge.tensor(f"{name}.noise"), run.get("start", 0)
    steps = list(sample(toy, walk, x, guidance=run["cfg"], noise=noise, start=start))
    judge.compare(torch.stack([x, *(latents for _, _, latents, _ in steps)]), f"{name}.x", frames_idx=-3)
    judge.compare(torch.stack([x, *(pred for *_, pred in steps)]), f"{name}.pred_x0", frames_idx=-3)
    judge.compare(steps[-1][2], f"{name}.out", frames_idx=-3)


def _vae_spec(judge: Judge) -> Any:
    dd = dict(judge.golden.config(judge.case, "ddconfig"))
    scale = judge.case.get("scale_factor") or judge.golden.config(judge.case, "scale_factor")
    return official_config.spec_from_official(
        dd | {"embed_dim": judge.golden.config(judge.case, "embed_dim"), "scale_factor": scale}
    )


def _vae(judge: Judge) -> None:
    vae = judge.filled(Vae(_vae_spec(judge)))
    if judge.stores("frames"):
        judge.compare(vae.decode(judge.tensor("z")), "frames", frames_idx=-3)
    if not judge.stores("post_mean", "post_logvar", "z_encoded"):
        return
    mean, logvar = vae.posterior(judge.tensor("px"))
    judge.compare(mean, "post_mean")
    judge.compare(logvar, "post_logvar")
    if judge.stores("z_encoded"):
        drawn = vae.spec.scale_factor * (mean + torch.exp(0.5 * logvar) * judge.tensor("post_noise"))
        judge.compare(drawn, "z_encoded")
    if judge.stores("post_mean"):
        judge.compare(vae.encode(judge.tensor("px")), "post_mean", golden=vae.spec.scale_factor * judge.arrays["post_mean"])


def _text_encoder(judge: Judge) -> None:
    spec = official_config.spec_from_official(judge.case["config"])
    tokens = tokenize(judge.case["prompts"], spec)
    judge.exact(tokens.numpy(), "tokens")
    if judge.stores("embeddings"):
        tower = judge.filled(TextTower(spec))
        judge.compare(tower(tokens.to(judge.device)), "embeddings")


def _end_to_end(judge: Judge) -> None:
    config, golden, device = judge.case["config"], judge.golden, judge.device
    weights = golden.tensors(judge.case["weights"])
    text = TextTower(official_config.spec_from_official(golden.config(judge.case, "open_clip_cfg")))
    unet = eager.kind(judge.device)(official_config.spec_from_official(golden.config(judge.case, "unet_params")))
    vae = Vae(_vae_spec(judge))
    for module, prefix in ((text, key_map.TEXT), (unet, key_map.UNET), (vae, key_map.VAE)):
        checkpoint.load(module.eval(), weights, prefix, device=device)
    context = spread(text(tokenize(config["anchors"]).to(device)), config["frames"])
    uncond = text(tokenize([""]).to(device))
    judge.compare(context, "embedding", frames_idx=0)
    judge.compare(uncond, "embedding_uncond")
    if judge.stores("eps_cond", "eps_uncond", "x", "pred_x0_last", "latents", "frames", "frames_u8"):
        pixels = vae.decode(_denoised(judge, unet, context, uncond))
        judge.compare(pixels, "frames", frames_idx=-3)
        if judge.stores("frames_u8"):
            _bytes(judge, to_bytes(pixels[0]))


def _denoised(judge: Judge, unet: UNet, context: Tensor, uncond: Tensor) -> Tensor:
    """Samples by `sample` and by the engine's steps, judges both at every step, and returns the last latents."""
    config, device = judge.case["config"], judge.device
    rows = _rows(config["tar"], unet.spec.levels, config["hw"][1], config["frames"]).to(device)
    fps, noise = torch.tensor([config["fps"]], device=device), judge.tensor("noise")
    predicted: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Tensor]:
        tar = rows if index <= config["until_time"] else torch.zeros_like(rows)
        pair = (unet(x, t[:, None], context[None], fps, tar), unet(x, t[:, None], uncond[None], fps, tar))
        predicted.append(pair)
        return pair

    walk = Schedule.ddim(config["steps"], eta=config["eta"])
    steps = list(sample(denoise, walk, judge.tensor("x_T"), guidance=config["cfg"], noise=noise))
    for output, branch in (("eps_cond", 0), ("eps_uncond", 1)):
        if judge.stores(output):  # of the first steps
            first = predicted[: len(judge.arrays[output])]
            judge.compare(torch.stack([pair[branch] for pair in first]), output, frames_idx=-3)
    every = torch.stack([rows if index <= config["until_time"] else torch.zeros_like(rows) for index in range(len(walk))])
    conditioning, guided = Conditioning((context[None], uncond[None])), coefficients(walk, torch.tensor([config["cfg"]]))
    stepped = _stepped(unet, walk, judge.tensor("x_T"), conditioning, fps, every, guided, noise)
    for walked in ([(latents, pred_x0) for _, _, latents, pred_x0 in steps], stepped):
        judge.compare(torch.stack([latents for latents, _ in walked]), "x", frames_idx=-3)
        judge.compare(walked[-1][1], "pred_x0_last", frames_idx=-3)
        judge.compare(walked[-1][0], "latents", frames_idx=-3)
    return steps[-1][2]


def _bytes(judge: Judge, ours: np.ndarray) -> None:
    """Judges a video's bytes: at most BYTES_OFF of them may differ, by 1."""
    golden = judge.arrays["frames_u8"]
    ours = ours[judge.places("frames_idx", len(golden), len(ours))]
    if ours.shape == golden.shape:
        off = np.abs(ours.astype(int) - golden.astype(int))
        error = float((off > 0).mean()) if off.max() <= 1 else math.inf
    else:
        error = math.inf
    judge.findings.append(Finding("frames_u8", error, BYTES_OFF))


def _stepped(
    unet: UNet, walk: Schedule, x: Tensor, conditioning: Conditioning, fps: Tensor, g: Tensor, weights: Tensor, noise: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Samples by the engine's steps, which replay CUDA graphs on a GPU; returns latents and pred_x0 after each."""
    timesteps = unet.timestep_table(torch.from_numpy(walk.timesteps[::-1].copy()).to(x.device), fps)
    plain, found = torch.ones(1, dtype=torch.int64, device=x.device), []
    for index in range(len(walk)):
        inputs = StepInputs(x, timesteps.rows[index], fps, g[index], weights[index].to(x), noise[index], plain)
        x, clean = unet.run_step(SamplingStep(x.dtype, timesteps, (NetworkCall((0,), conditioning),), inputs))
        found.append((x, clean))
    return found


KINDS: dict[str, Callable[[Judge], None]] = {
    "tar_attention": _tar_attention,
    "tar_attention_generated": _tar_attention,
    "temporal_transformer": _temporal_transformer,
    "block": _block,
    "unet": _unet,
    "vsp_interpolation": _vsp,
    "ddim": _ddim,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "end_to_end": _end_to_end,
    **streaming_judges.KINDS,
    **BLEND_KINDS,
}
