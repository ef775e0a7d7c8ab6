"""Words of the training command that no run can be made of: refused within seconds, naming the key,
with no folder left.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rcm.configs import cli
from rcm.configs.overrides import as_typed
from tests.faults.case import Fault, each
from tests.integration.entry import small

M = "model.config."
TF, RCM, DMD = "experiment=toy_tf_c3-3", "experiment=toy_rCM", "experiment=toy_sf_dmd_c3-3"
SHIFT = "rcm.utils.timestep_utils.UniformShift"
HUGE = "9" * 20
KIND = "values of train"
NO_KEY = {"WANDB_API_KEY": "", "WANDB_IDENTITY_TOKEN_FILE": "", "WANDB_BASE_URL": "https://api.wandb.ai", "NETRC": "/nonexistent"}


def word(name: str, refusal: str, *words: str, experiment: str = TF, kind: str = KIND, environment: Mapping[str, str] = {}) -> Fault:
    """A launch with these words."""

    def argv(folder: Path) -> list[str]:
        return [experiment, f"job.output_root={folder}/outputs", *words]

    def left_nothing(folder: Path) -> None:
        assert not (folder / "outputs").exists()

    how = {"main": cli.main, "argv": argv, "after": left_nothing, "environment": environment, "deadline": 10}
    return Fault(name, kind=kind, refusal=refusal, **how)


def law(target: str, *more: str) -> str:
    return f"++{M}p_G={{_target_:{','.join((target, *more))}}}"


CASES = [
    word("latents of no size", r"latent_hw=\[0, 0\]", M + "latent_hw=[0,0]"),
    word("latents beyond memory", "latent_hw", M + "latent_hw=[100000,100000]"),
    word("no layers", "num_layers=0", M + "net.num_layers=0"),
    word("negative width", "dim=-32", M + "net.dim=-32"),
    word("endless layers", "num_layers=1000000000", M + "net.num_layers=1000000000"),
    word("wide beyond memory", "ffn_dim=9", M + f"net.ffn_dim={HUGE}"),
    word("rotary table beyond memory", "max_frames", M + "net.max_frames=100000000"),
    word("rate 1e30", "lr=1e.30 must be at most 1", "optimizer.lr=1e30"),
    word("rate by its factor", "largest factor of scheduler is", "scheduler.f_max=1e9"),
    word("rate nan", "lr=nan must be finite", "optimizer.lr=nan"),
    word("rate infinite", "lr=inf must be finite", "optimizer.lr=inf"),
    word("decay that turns weights around", "weight_decay", "optimizer.weight_decay=1e9"),
    word("endless warm-up", "scheduler.warm_up_steps=1.* must be at most 10", "scheduler.warm_up_steps=1e308"),
    word("eps that float32 has as zero", "optimizer.eps=1e-320 must be at least 1e-37", "optimizer.eps=1e-320"),
    word("critic's rate", "optimizer_fake_score.lr", M + "optimizer_fake_score.lr=1e30", experiment=DMD),
    word("seed of 20 digits", "trainer.seed=9.* must be at most 4294967295", f"trainer.seed={HUGE}"),
    word("seed beyond 32 bits", "trainer.seed=4294967296 must be at most", "trainer.seed=4294967296"),
    word("seed of 5000 digits", "cannot read override", "trainer.seed=" + "1" * 5000),
    word("negative seed", "trainer.seed=-1", "trainer.seed=-1"),
    word("shuffle seed", "shuffle_seed", f"dataloader_train.shuffle_seed={HUGE}"),
    word("no batch", "batch_size=0", "dataloader_train.batch_size=0"),
    word("batch beyond memory", "batch_size=1000000000", "dataloader_train.batch_size=1000000000"),
    word("many threads", "num_workers", "dataloader_train.num_workers=1000000"),
    word("reading far ahead", "prefetch_factor", "dataloader_train.prefetch_factor=1000000000"),
    word("frames beyond the table", "state_t", M + "state_t=30000"),
    word("shift 0", "p_G.shift=0", M + "p_G.shift=0"),
    word("shift tiny", "p_G.shift", M + "p_G.shift=1e-300"),
    word("shift negative", "p_G.shift=-1", M + "p_G.shift=-1"),
    word("guidance nan", "causal_guidance=nan must be finite", M + "causal_guidance=nan"),
    word("nothing to train", "loss_scale=0 leaves training_type=tf nothing to train", M + "loss_scale=0"),
    word("nothing to train in DMD", "loss_scale_dmd=0", M + "loss_scale_dmd=0", experiment=DMD),
    word("nothing to train in rCM", "loss_scale_dmd=0 turns DMD off", M + "loss_scale=0", M + "loss_scale_dmd=0", experiment=RCM),
    word("tangent of no form", "must be one of 'paper', 'release'", M + "tangent_form=mine", experiment=RCM),
    word("tangent of another form", "needs cm_type=scm", M + "tangent_form=release", M + "cm_type=dcm", experiment=RCM),
    word("name above", "job.name='../x' leaves job.output_root", "job.name=../x", kind="names of jobs"),
    word("name from the root", "job.name='/tmp/x' leaves", "job.name=/tmp/x", kind="names of jobs"),
    word("name with a way up", "job.name='a/../../b' leaves", "job.name=a/../../b", kind="names of jobs"),
    word("group above", r"job.group='\.\.' leaves", "job.group=..", kind="names of jobs"),
    word("project of a home", "job.project='~root' leaves", "job.project=~root", kind="names of jobs"),
    word("name of 300 characters", "no name of a folder", "job.name=" + "x" * 300, kind="names of jobs"),
    word("name with a line's end", "no name of a folder", "job.name=a\nb", kind="names of jobs"),
    word("name with a NUL", "no name of a folder|cannot read", "job.name=a\0b", kind="names of jobs"),
    word("name that is several", "asks for several runs", "job.name=a,b", kind="names of jobs"),
    word("name inside a group, as a number", "job.name=13 is a text; write it in quotes", "job={name:1_3}", kind="names of jobs"),
    word("class that is imported", "'os.system' is not imported", law("os.system", "shift:3"), kind="names of classes"),
    word("class unknown here", "is not imported", law("rcm.utils.timestep_utils.Other"), kind="names of classes"),
    word("class with another's number", "p_mean is no number of", law(SHIFT, "p_mean:3"), kind="names of classes"),
    word("class of an optimiser", "unknown key 'optimizer._target_'", "++optimizer={_target_:builtins.eval}", kind="names of classes"),
    word("class of a network", "unknown key", f"++{M}net._target_=os.system", kind="names of classes"),
    word("no such mode of wandb", "wandb_mode", "job.wandb_mode=sometimes", kind="names of jobs"),
    word("online without a key", "needs a key for api", "job.wandb_mode=online", kind="names of jobs", environment=NO_KEY),
]


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


NAMES = ("1_3", "13", "007", "1e3", "0x10", "true", "nan", "a=b", "a#b", "x{0..3}", "run[1]", "a b", "it's", "{a:1}", "[1]", 'q"z\\')


def named(text: str, *, typed: bool) -> Fault:
    """The job called `text`, given as it is, or as a refusal advises to type it: it trains in the
    folder of that name and no other.
    """

    def argv(folder: Path) -> list[str]:
        spelt = shlex.split(as_typed("job.name", text))[0] if typed else f"job.name={text}"
        return [TF, *small(folder / "x", iterations=1), spelt]

    def in_its_folder(folder: Path) -> None:
        assert [path.name for path in folder.iterdir()] == [text]

    kind = "names that look like others"
    return Fault(f"{text}{' quoted' if typed else ''}", kind=kind, refusal=None, main=cli.main, argv=argv, after=in_its_folder)


@each([named(text, typed=index % 2 == 1) for index, text in enumerate(NAMES)] + [named("a,b", typed=True), named("null", typed=True)])
def test_names_keep_their_characters(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)
