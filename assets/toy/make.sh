#!/usr/bin/env bash
# Trains the shipped checkpoint, from random weights to the final stage, and writes it beside this file. From the repository's root:
#
#     bash assets/toy/make.sh
#
# The toy world at 16x16 pixels, for the eye; the demo's is 8x8, for the clock. An hour on one busy core. Runs stay in
# outputs/toy_checkpoint, and go on from there when the command is given again.
set -euo pipefail
export OMP_NUM_THREADS=1
runs=outputs/toy_checkpoint
job="job.output_root=outputs job.project=toy_checkpoint job.group= dataloader_train.batch_size=16"
job="$job model.config.latent_hw=[8,8] model.config.sample_timestep_shift=12"
rcm train experiment=toy_bidirectional job.name=bidirectional $job \
  model.config.p_G.shift=12 trainer.max_iter=2400 scheduler.cycle_length=2350 scheduler.warm_up_steps=50 optimizer.lr=5.0e-3
rcm train experiment=toy_tf_c1-1 job.name=tf $job model.config.student_ckpt=$runs/bidirectional \
  model.config.p_G.shift=12 trainer.max_iter=800 scheduler.cycle_length=770
rcm train experiment=toy_tf_dcm_c1-1 job.name=tf_dcm $job model.config.student_ckpt=$runs/tf model.config.causal_teacher_ckpt=$runs/tf
rcm train experiment=toy_sf_dmd_2step_c1-1 job.name=sf_dmd $job \
  model.config.student_ckpt=$runs/tf_dcm model.config.bidirectional_teacher_ckpt=$runs/bidirectional
rcm checkpoint export --dcp_checkpoint_dir $runs/sf_dmd --save_path "$(dirname "$0")/sf_dmd_c1-1.safetensors"
