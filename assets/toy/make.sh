#!/usr/bin/env bash
# Trains the shipped checkpoint, from random weights to the final stage, and writes it beside this file. From the repository's root:
#
#     bash assets/toy/make.sh
#
# About 15 minutes on one idle core. Runs stay in outputs/toy_checkpoint, and go on from there when the command is given again.
set -euo pipefail
export OMP_NUM_THREADS=1
job="job.output_root=outputs job.project=toy_checkpoint job.group= dataloader_train.batch_size=32"
runs=outputs/toy_checkpoint
rcm train experiment=toy_bidirectional job.name=bidirectional $job
rcm train experiment=toy_tf_c1-1 job.name=tf $job model.config.student_ckpt=$runs/bidirectional
rcm train experiment=toy_tf_dcm_c1-1 job.name=tf_dcm $job model.config.student_ckpt=$runs/tf model.config.causal_teacher_ckpt=$runs/tf
rcm train experiment=toy_sf_dmd_2step_c1-1 job.name=sf_dmd $job \
  model.config.student_ckpt=$runs/tf_dcm model.config.bidirectional_teacher_ckpt=$runs/bidirectional
rcm checkpoint export --dcp_checkpoint_dir $runs/sf_dmd --save_path "$(dirname "$0")/sf_dmd_c1-1.safetensors"
