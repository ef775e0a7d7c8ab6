"""The subcommands of `rcm`: name, group, one line, examples, and the module whose `main(argv)` does
the work. Nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after `rcm`.

    `does` completes "it ..."; `examples` are whole command lines. `module`: dotted, with
    `main(argv) -> status` (`scripts.*` is found in a source tree and in a wheel alike); `given`:
    words put before the user's; `usage`: its help beside the examples, where that of the module
    says more than is meant. Or `parts`: words that choose a command.
    """

    does: str
    examples: tuple[str, ...] = ()
    module: str = ""
    given: tuple[str, ...] = ()
    usage: str = ""
    parts: Mapping[str, Command] = field(default_factory=dict)


SAMPLE = {
    "rcm": Command(
        does="text to video in 1 to 4 steps, with a distilled Wan student",
        module="rcm.inference.wan2pt1_t2v_rcm_infer",
        examples=(
            (
                "rcm sample rcm --dit_path assets/checkpoints/rCM_Wan2.1_T2V_1.3B_480p.pt --prompt"
                ' "a cat on a skateboard"'
            ),
        ),
    ),
    "diffusion": Command(
        does="text to video in many steps, with a Wan teacher",
        module="rcm.inference.wan2pt1_t2v_diffusion_infer",
        examples=('rcm sample diffusion --prompt "a cat on a skateboard" --num_steps 50',),
    ),
    "causal": Command(
        does="text (or a first image) to video, chunk by chunk, with a causal Wan network",
        module="rcm.inference.wan2pt1_t2v_causal_infer",
        examples=(
            (
                "rcm sample causal --distilled --num_steps 4 --first_chunk_t 3 --chunk_t 3"
                ' --dit_path FILE --prompt "a cat"'
            ),
        ),
    ),
    "causal-long": Command(
        does="the same for videos longer than those trained on, at bounded memory",
        module="rcm.inference.wan2pt1_t2v_causal_extrapolation_infer",
        examples=(
            (
                "rcm sample causal-long --distilled --num_steps 4 --num_frames 957"
                " --extrapolation_method rolling_sink --dit_path FILE"
            ),
        ),
    ),
    "causal-quant": Command(
        does="the same with a quantised cache",
        module="rcm.inference.wan2pt1_t2v_causal_quant_infer",
        examples=(
            (
                "rcm sample causal-quant --distilled --num_steps 4 --kv_dtype_k int2 --kv_dtype_v"
                " int2 --dit_path FILE"
            ),
        ),
    ),
    "flf2v": Command(
        does=(
            "image to video, or a first and a last frame to video, in many steps, with Wan2.1 I2V"
            " or FLF2V"
        ),
        module="rcm.inference.wan2pt1_i2v_diffusion_infer",
        examples=(
            (
                "rcm sample flf2v --image_path first.png --last_image_path last.png --dit_path"
                ' FOLDER --prompt "she turns round"'
            ),
        ),
    ),
    "i2v-rcm": Command(
        does="image to video in few steps, with a distilled Wan2.2 student",
        module="rcm.inference.wan2pt2_i2v_rcm_infer",
        examples=(
            (
                'rcm sample i2v-rcm --image_path first.png --prompt "she turns round"'
                " --adaptive_resolution"
            ),
        ),
    ),
    "i2v-diffusion": Command(
        does="image to video in many steps, with the Wan2.2 teacher",
        module="rcm.inference.wan2pt2_i2v_diffusion_infer",
        examples=('rcm sample i2v-diffusion --image_path first.png --prompt "she turns round"',),
    ),
}

DATA = {
    "build": Command(
        does="write shards of latents from the embedded world, video files or a teacher",
        module="scripts.build_dataset",
        examples=(
            "rcm data build --source toy --size 8x8 --num 2048 --out outputs/data/toy",
            (
                "rcm data build --source videos --input clips --size 32x32 --frames 17 --out"
                " outputs/data/clips"
            ),
        ),
    ),
    "view": Command(
        does="look into shards: keys, shapes and captions of their first samples, and a picture",
        module="scripts.view_shards",
        examples=(
            "rcm data view outputs/data/toy/shard-000000.tar",
            "rcm data view outputs/data/toy/shard-000000.tar --rows 4 --sheet sheet.png",
        ),
    ),
    "merge": Command(
        does="put many small shards together into larger ones",
        module="scripts.merge_shards",
        examples=(
            (
                "rcm data merge 'outputs/data/parts/*/shard-*.tar' --out outputs/data/whole"
                " --shard_size 1000"
            ),
        ),
    ),
    "index": Command(
        does="record where the samples of many shards lie, so that training starts at once",
        module="scripts.index_shards",
        examples=("rcm data index 'outputs/data/whole/shard-*.tar'",),
    ),
    "ode-pairs": Command(
        does="write a teacher's trajectories, which the _tf_kd and _df_kd baselines learn from",
        module="scripts.build_ode_pairs",
        examples=(
            (
                "rcm data ode-pairs --teacher outputs/demo/runs/bidirectional --num 2048 --out"
                " outputs/data/pairs"
            ),
        ),
    ),
}

CHECKPOINT = {
    "inspect": Command(
        does="say what a file or folder of weights is, which network fits, what is missing",
        module="scripts.checkpoint",
        given=("inspect",),
        examples=("rcm checkpoint inspect outputs/demo/runs/tf_c3-3",),
    ),
    "convert": Command(
        does="write one network of a file in another form",
        module="scripts.checkpoint",
        given=("convert",),
        examples=("rcm checkpoint convert Wan2.1-T2V-1.3B-Diffusers student.safetensors --to rcm",),
    ),
    "export": Command(
        does="turn a training checkpoint into one file that describes itself",
        module="scripts.dcp_to_pth",
        examples=(
            (
                "rcm checkpoint export --dcp_checkpoint_dir outputs/demo/runs/tf_c3-3 --save_path"
                " outputs/tf.safetensors"
            ),
        ),
    ),
}

VBENCH = {
    "env": Command(
        does="make the environment that VBench runs in",
        module="scripts.vbench_env",
        examples=("rcm vbench env",),
    ),
    "sample": Command(
        does="make the videos of a suite of prompts, and go on where a stopped run ended",
        module="scripts.vbench_sample",
        examples=(
            (
                "rcm vbench sample --dit_path outputs/demo/runs/sf_dmd_c3-3 --no_augmented_prompt"
                " --max_prompts 20"
            ),
        ),
    ),
    "score": Command(
        does="run VBench over sampled videos, and tabulate its results",
        module="scripts.vbench_score",
        examples=("rcm vbench score --videos_path outputs/vbench --ngpus 8",),
    ),
}

BENCH = {
    "check": Command(
        does="attention with tangent: errors against float64, speed, a verdict",
        module="rcm.kernels.flash_jvp.selfcheck",
    ),
    "attention": Command(
        does="every attention variant, checked and timed", module="scripts.bench_attention"
    ),
    "train-step": Command(does="training steps at full size", module="scripts.bench_train_step"),
    "fp8-products": Command(
        does="a linear layer in training by every way to take its products in FP8",
        module="scripts.bench_fp8_products",
    ),
    "memory": Command(
        does="peak memory of training, beside what the planner predicts",
        module="scripts.bench_memory",
    ),
    "stream": Command(
        does="streams at full size: latencies, gaps, memory, idle share",
        module="scripts.bench_stream",
    ),
    "stream-cache": Command(
        does="streams over quantised caches: memory, time, error",
        module="scripts.bench_stream_cache",
    ),
    "kv-codec": Command(
        does="the codec of cached keys and values", module="scripts.bench_kv_codec"
    ),
    "policies": Command(
        does="long streams under every extrapolation method: time and memory",
        module="scripts.bench_policies",
    ),
    "fp8-attention": Command(
        does="FP8 attention against bf16: errors, then times", module="scripts.bench_fp8_attention"
    ),
    "kv-bias": Command(
        does="the bias correction of coded keys, on a trained network's keys",
        module="scripts.bench_kv_bias",
    ),
    "cheaper": Command(
        does="cheaper arithmetic and a quicker start on one card", module="scripts.bench_cheaper"
    ),
    "drift": Command(
        does="how long videos drift: curves per window, several videos side by side on one page",
        module="scripts.drift_report",
        examples=("rcm bench drift sliding_window=a.mp4 rolling_sink=b.mp4 --out outputs/drift",),
    ),
    "compare": Command(
        does="checkpoints on the same prompts and noise, with paired differences",
        module="scripts.compare_checkpoints",
    ),
    "metrics": Command(
        does="harm clips in known ways, and see whether the offline metrics notice",
        module="scripts.judge_metrics",
    ),
    "serve": Command(
        does="the live page's server under many clients, slow and vanishing ones among them",
        module="scripts.bench_serve",
    ),
    "vae": Command(does="Wan's VAE, whole and streamed", module="scripts.bench_vae"),
    "stream-ranks": Command(
        does="one stream over several cards (start it with torchrun -m rcm)",
        module="scripts.bench_stream_ranks",
    ),
    "data": Command(
        does="one rank's loader against a training step's need; what ten million samples cost",
        module="scripts.bench_data",
        examples=(
            "rcm bench data --workers 0 1 2 4",
            "rcm bench data --index 10000000 --shards 10000",
        ),
    ),
    "checkpoint": Command(
        does="saves and loads by bytes: the stall of a step, the background write, the way back",
        module="scripts.bench_checkpoint",
        examples=("rcm bench checkpoint --size 1.3B --blocks 6",),
    ),
    "scale": Command(
        does="training steps of every recipe and layout (start it with torchrun -m rcm)",
        module="scripts.bench_scale",
    ),
    "multi-gpu": Command(
        does="several GPUs against one (start it with torchrun -m rcm)",
        module="scripts.bench_multi_gpu",
    ),
}

GROUPS: dict[str, dict[str, Command]] = {
    "Look": {
        "stream": Command(
            does="stream a video from a checkpoint, by default the shipped one",
            module="rcm.inference.stream",
            examples=(
                "rcm stream",
                'rcm stream --prompt "a green cross moving up" --num_frames 65',
                (
                    'rcm stream --ckpt outputs/demo/runs/sf_dmd_c3-3 --prompt "a red square moving'
                    ' left" --steps_per_chunk 4 1'
                ),
            ),
        ),
        "serve": Command(
            does="stream in a browser: type a prompt, watch it take effect",
            module="rcm.serve.command",
            examples=(
                "rcm serve",
                "rcm serve --ckpt outputs/demo/runs/sf_dmd_c3-3 --max_sessions 2",
                "rcm serve --port 9000",
            ),
        ),
        "demo": Command(
            does="train every stage on the embedded world, stream, score, and show it on a page",
            module="scripts.demo",
            examples=("rcm demo", "rcm demo --quick", "rcm demo --fresh"),
        ),
        "sample": Command(does="make videos with Wan's files", parts=SAMPLE),
    },
    "Train": {
        "experiments": Command(
            does="list the experiments whose names contain all given words",
            module="rcm.configs.cli",
            given=("--list",),
            usage="[WORD ...]",
            examples=("rcm experiments toy", "rcm experiments sf_dmd c3-3"),
        ),
        "train": Command(
            does="run an experiment, or continue it where it stopped",
            module="rcm.configs.cli",
            examples=(
                "rcm train experiment=toy_tf_c3-3 trainer.max_iter=100",
                "rcm train --dryrun experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3",
                "torchrun --nproc_per_node=8 -m rcm train experiment=NAME key=value",
            ),
        ),
        "plan": Command(
            does="predict memory and time of a run, and propose a layout",
            module="scripts.plan",
            examples=(
                "rcm plan experiment=toy_tf_c3-3 gpus=1 memory_gib=8",
                "rcm plan experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3 gpus=32 gpu=h100",
            ),
        ),
    },
    "Files": {
        "data": Command(does="build, view, merge and index data sets", parts=DATA),
        "checkpoint": Command(does="inspect, convert and export weights", parts=CHECKPOINT),
    },
    "Measure": {
        "doctor": Command(
            does="check this machine, or all ranks of a launch: versions, card, kernels, network",
            module="rcm.front.doctor",
            examples=(
                "rcm doctor",
                "rcm doctor --quick",
                "torchrun --nproc_per_node=8 -m rcm doctor",
            ),
        ),
        "bench": Command(does="check and time kernels, training steps, the VAE", parts=BENCH),
        "vbench": Command(does="sample and score the suites of VBench", parts=VBENCH),
    },
}
"""Subcommands by group, in the order of the help."""

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
