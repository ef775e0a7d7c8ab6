"""The subcommands of `rcm`: name, group, one line, examples, and the module whose `main(argv)` does
the work. Nothing is imported here.
"""

from __future__ import annotations

import re
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


def _commands(table: str) -> dict[str, Command]:
    """By name, from lines "NAME  MODULE GIVEN...: what it does"; examples are two spaces in, and
    what goes on in another line four.
    """
    found: dict[str, Command] = {}
    for entry in re.sub(r"\n {4}", " ", table.strip()).replace("\n  ", "\t").splitlines():
        line, *examples = entry.split("\t")
        called, does = line.split(": ", maxsplit=1)
        name, module, *given = called.split()
        found[name] = Command(
            does=does, examples=tuple(examples), module=module, given=tuple(given)
        )
    return found


SAMPLE = _commands("""
rcm  rcm.inference.wan2pt1_t2v_rcm_infer: text to video in 1 to 4 steps, with a distilled Wan
    student
  rcm sample rcm --dit_path assets/checkpoints/rCM_Wan2.1_T2V_1.3B_480p.pt --prompt "a cat on a
    skateboard"
diffusion  rcm.inference.wan2pt1_t2v_diffusion_infer: text to video in many steps, with a Wan
    teacher
  rcm sample diffusion --prompt "a cat on a skateboard" --num_steps 50
causal  rcm.inference.wan2pt1_t2v_causal_infer: text (or a first image) to video, chunk by chunk,
    with a causal Wan network
  rcm sample causal --distilled --num_steps 4 --first_chunk_t 3 --chunk_t 3 --dit_path FILE --prompt
    "a cat"
causal-long  rcm.inference.wan2pt1_t2v_causal_extrapolation_infer: the same, with defaults for
    videos longer than those trained on, in bounded memory
  rcm sample causal-long --distilled --num_steps 4 --num_frames 957 --extrapolation_method
    rolling_sink --dit_path FILE
causal-quant  rcm.inference.wan2pt1_t2v_causal_quant_infer: the same, with defaults for a quantised
    key-value cache
  rcm sample causal-quant --distilled --num_steps 4 --kv_dtype_k int2 --kv_dtype_v int2 --dit_path
    FILE
flf2v  rcm.inference.wan2pt1_i2v_diffusion_infer: image to video, or a first and a last frame to
    video, in many steps, with Wan2.1 I2V or FLF2V
  rcm sample flf2v --image_path first.png --last_image_path last.png --dit_path FOLDER --prompt "she
    turns round"
i2v-rcm  rcm.inference.wan2pt2_i2v_rcm_infer: image to video in few steps, with a distilled Wan2.2
    student
  rcm sample i2v-rcm --image_path first.png --prompt "she turns round" --adaptive_resolution
i2v-diffusion  rcm.inference.wan2pt2_i2v_diffusion_infer: image to video in many steps, with the
    Wan2.2 teacher
  rcm sample i2v-diffusion --image_path first.png --prompt "she turns round"
""")

DATA = _commands("""
build  scripts.build_dataset: write training shards from the toy world, from video files or by
    sampling a teacher
  rcm data build --source toy --size 8x8 --num 2048 --out outputs/data/toy
  rcm data build --source videos --input clips --size 32x32 --frames 17 --out outputs/data/clips
view  scripts.view_shards: show keys, shapes and captions of the first samples in shards, and their
    frames as a picture
  rcm data view outputs/data/toy/shard-000000.tar
  rcm data view outputs/data/toy/shard-000000.tar --rows 4 --sheet sheet.png
merge  scripts.shards merge: merge many small shards into larger ones
  rcm data merge 'outputs/data/parts/*/shard-*.tar' --out outputs/data/whole --shard_size 1000
index  scripts.shards index: index the samples of many shards, so that training on them starts at
    once
  rcm data index 'outputs/data/whole/shard-*.tar'
ode-pairs  scripts.build_ode_pairs: write a teacher's sampling trajectories, which the _tf_kd and
    _df_kd baselines learn from
  rcm data ode-pairs --teacher outputs/demo/runs/bidirectional --num 2048 --out outputs/data/pairs
""")

CHECKPOINT = _commands("""
inspect  scripts.checkpoint inspect: say what a file or folder of weights contains, which network
    fits and what is missing
  rcm checkpoint inspect outputs/demo/runs/tf_c3-3
convert  scripts.checkpoint convert: write a network in another format (rcm, Wan, diffusers,
    Self-Forcing, ComfyUI)
  rcm checkpoint convert Wan2.1-T2V-1.3B-Diffusers student.safetensors --to rcm
export  scripts.dcp_to_pth: turn a training checkpoint into a single, self-describing file
  rcm checkpoint export --dcp_checkpoint_dir outputs/demo/runs/tf_c3-3 --save_path
    outputs/tf.safetensors
""")

VBENCH = _commands("""
env  scripts.vbench_env: create the Python environment that VBench runs in
  rcm vbench env
sample  scripts.vbench_sample: sample the videos of a suite; the same command continues a stopped
    run
  rcm vbench sample --dit_path outputs/demo/runs/sf_dmd_c3-3 --no_augmented_prompt --max_prompts 20
score  scripts.vbench_score: score sampled videos with VBench, and tabulate the results
  rcm vbench score --videos_path outputs/vbench/videos_described_as_trained_sf_dmd_c3-3_seed0
    --ngpus 8
""")

BENCH = _commands("""
check  rcm.kernels.flash_jvp.selfcheck: is attention with tangent correct and fast on this GPU?
attention  scripts.bench_attention: every attention variant, checked and timed
train-step  scripts.bench_train_step: training steps at full size
fp8-products  scripts.bench_fp8_products: linear layers in training, with every FP8 method
memory  scripts.bench_memory: peak memory of training, against the planner's prediction
stream  scripts.bench_stream: streams at full size: latency, gaps, memory, GPU idle time
stream-cache  scripts.bench_stream_cache: streams with quantised caches: memory, time, error
kv-codec  scripts.bench_kv_codec: quantising and restoring cached keys and values
policies  scripts.bench_policies: long streams with every extrapolation method: time and memory
fp8-attention  scripts.bench_fp8_attention: FP8 attention against bf16: errors, then times
kv-bias  scripts.bench_kv_bias: errors of quantised keys of a trained network, and their correction
drift  scripts.drift_report: how much long videos drift: a page of curves over time for one or more
    videos
  rcm bench drift sliding_window=a.mp4 rolling_sink=b.mp4 --out outputs/drift
compare  scripts.compare_checkpoints: folders of videos from several checkpoints, same prompts and
    noise, with paired differences
metrics  scripts.judge_metrics: do the offline metrics detect clips damaged in known ways?
serve  scripts.bench_serve: the live page's server under load, with slow and disconnecting clients
vae  scripts.bench_vae: Wan's VAE, one-shot and streamed
stream-ranks  scripts.bench_stream_ranks: one stream over several GPUs (start with torchrun -m rcm)
data  scripts.bench_data: data loading speed of one rank, against what training needs
  rcm bench data --workers 0 1 2 4
  rcm bench data --index 10000000 --shards 10000
checkpoint  scripts.bench_checkpoint: time to save and load, and how long a save stops training
  rcm bench checkpoint --size 1.3B --blocks 6
scale  scripts.bench_scale: training steps of every recipe and layout (start with torchrun -m rcm)
multi-gpu  scripts.bench_multi_gpu: do several GPUs give the results of one? (start with torchrun -m
    rcm)
""")

_LOOK = _commands("""
stream  rcm.inference.stream: stream a video from a checkpoint, by default the shipped one
  rcm stream
  rcm stream --prompt "a green cross moving up" --num_frames 65
  rcm stream --ckpt outputs/demo/runs/sf_dmd_c3-3 --prompt "a red square moving left"
    --steps_per_chunk 4 1
serve  rcm.serve.command: stream to a web page where you can change the prompt while you watch
  rcm serve
  rcm serve --ckpt outputs/demo/runs/sf_dmd_c3-3 --max_sessions 2
  rcm serve --port 9000
demo  scripts.demo: train every stage on the toy world in 10 minutes, score it, write a report page
  rcm demo
  rcm demo --quick
  rcm demo --fresh
""")
_TRAIN = _commands("""
train  rcm.configs.cli: run an experiment, or resume it where it stopped
  rcm train experiment=toy_tf_c3-3 trainer.max_iter=100
  rcm train --dryrun experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3
  torchrun --nproc_per_node=8 -m rcm train experiment=NAME key=value
plan  scripts.plan: predict memory and time of a training run, and propose a layout that fits
  rcm plan experiment=toy_tf_c3-3 gpus=1 memory_gib=8
  rcm plan experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_scm_c3-3 gpus=32 gpu=h100
""")
_MEASURE = _commands("""
doctor  rcm.front.doctor: check this machine, or all ranks of a launch: versions, GPU, kernels,
    network
  rcm doctor
  rcm doctor --quick --compile 480x832
  torchrun --nproc_per_node=8 -m rcm doctor
""")

GROUPS: dict[str, dict[str, Command]] = {
    "Generate": {
        **_LOOK,
        "sample": Command(does="generate videos with Wan's public checkpoints", parts=SAMPLE),
    },
    "Train": {
        "experiments": Command(
            does="list the experiments, or those whose names contain all given words",
            module="rcm.configs.cli",
            given=("--list",),
            usage="[WORD ...]",
            examples=("rcm experiments toy", "rcm experiments sf_dmd c3-3"),
        ),
        **_TRAIN,
    },
    "Files": {
        "data": Command(does="build, view, merge and index training data", parts=DATA),
        "checkpoint": Command(does="inspect, convert and export weights", parts=CHECKPOINT),
    },
    "Measure": {
        **_MEASURE,
        "bench": Command(
            does="run benchmarks of kernels, training, streaming and data", parts=BENCH
        ),
        "vbench": Command(does="sample and score the VBench suites", parts=VBENCH),
    },
}
"""Subcommands by group, in the order of the help."""

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
