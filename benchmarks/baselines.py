"""Students that deltanet-convert rightly does not make, to compare its own with.

    python -m benchmarks.baselines KIND TEACHER -o FOLDER [--hybrid LAYOUT] [--mixer ...] [--seed N]

KIND, where the layers, and what a linear one is, are those of deltanet-convert with the same options:

    windows        no state: those layers have softmax attention in a window and to the first token alone, of as many
                   tokens as a cache of keys and values in bfloat16 holds in the bytes of the state in float32, beside
                   those of --local-window; the weights are the teacher's. Nothing is read from the state that they
                   have all the same, and nothing will be as long as read_proj is not trained
    scratch        every weight is random, as transformers initialises it
    random-mixers  the weights are the teacher's, but linear layers' mixers are as in `scratch`
    repeated-rows  a plain copy in which every query head has keys and values of its own, made by a known mistake:
                   the rows of a linear layer's k_proj and v_proj are repeated where its heads should be

A run starts from FOLDER with `student.model=FOLDER student.convert=null`. Twin: tests/distill/test_baselines.py.
"""

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch

from convert.command import mixer_options
from convert.compat import DEFAULTS
from convert.layouts import LINEAR, Layout, parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.sources import COMPANIONS, open_source
from convert.staging import Staging, check_target
from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet_errors import UserError


def same_budget(config: DeltaNetConfig) -> int:
    """Tokens whose keys and values, in bfloat16, take the bytes of one linear layer's states, in float32."""
    states = config.num_state_heads * config.head_dim**2 * torch.float32.itemsize
    return states // (2 * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize)


def windows(teacher: DeltaNetForCausalLM, config: DeltaNetConfig, seed: int) -> DeltaNetForCausalLM:
    layout = Layout(tuple(config.layer_types), config.sliding_window)
    unread = mixer_options(**DEFAULTS | {"mixer": "delta", "state_heads": "shared", "skip_conv": 0})
    unread["local_window"] = config.local_window + same_budget(config)
    return student_from_teacher(teacher, student_config(teacher.config, layout, **unread))


def scratch(teacher: DeltaNetForCausalLM, config: DeltaNetConfig, seed: int) -> DeltaNetForCausalLM:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return DeltaNetForCausalLM(config).to(teacher.dtype)


def random_mixers(teacher: DeltaNetForCausalLM, config: DeltaNetConfig, seed: int) -> DeltaNetForCausalLM:
    student, fresh = student_from_teacher(teacher, config), scratch(teacher, config, seed)
    for kind, mine, other in zip(config.layer_types, student.model.layers, fresh.model.layers):
        if kind == LINEAR:
            mine.self_attn.load_state_dict(other.self_attn.state_dict())
    return student


def repeated_rows(teacher: DeltaNetForCausalLM, config: DeltaNetConfig, seed: int) -> DeltaNetForCausalLM:
    """Attention layers are widened as they should be, so that they compute what the teacher's do. Raises UserError
    where every query head has keys and values of its own already."""
    group = config.num_attention_heads // config.num_key_value_heads
    if group == 1:
        raise UserError("repeated-rows: the teacher has as many key/value heads as query heads; nothing is repeated")
    wide = copy.deepcopy(config)
    wide.num_key_value_heads = config.num_attention_heads
    weights = teacher.state_dict()
    for layer, kind in enumerate(config.layer_types):
        for name, weight in weights.items():
            if name.startswith((f"model.layers.{layer}.self_attn.k_proj", f"model.layers.{layer}.self_attn.v_proj")):
                rows = 1 if kind == LINEAR else config.head_dim  # that are repeated together; a head's, if done right
                weights[name] = weight.unflatten(0, (-1, rows)).repeat_interleave(group, 0).flatten(0, 1)
    student = DeltaNetForCausalLM(wide).to(teacher.dtype)
    student.load_state_dict(student.state_dict() | weights)
    return student


KINDS = {"windows": windows, "scratch": scratch, "random-mixers": random_mixers, "repeated-rows": repeated_rows}


def write(kind: str, source: str, out: Path, *, hybrid: str = "global2", seed: int = 0, **options) -> None:
    """Writes the checkpoint folder `out`, whole or not at all, with the teacher's tokenizer. `options` are those of
    `mixer_options`. Raises UserError for what deltanet-convert refuses, where `out` is there, and for a layout in which
    the teacher would be its own baseline."""
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed {seed}: allowed is a whole number from 0 to 2^63 - 1")
    if os.path.lexists(out):
        raise UserError(f"-o {out}: exists already; delete it, or name another folder")
    check_target(out, overwrite=False)
    with open_source(source) as opened, Staging(out) as staging:
        teacher = load_teacher(opened.folder)
        layout = parse_layout(hybrid, teacher.config.layer_types, teacher.config.sliding_window)
        if kind != "scratch" and not layout.linear:
            raise UserError(f"--hybrid {hybrid}: no layer is linear, so {kind} would be the teacher itself")
        config = student_config(teacher.config, layout, **mixer_options(**dict.fromkeys(DEFAULTS) | options))
        KINDS[kind](teacher, config, seed).save_pretrained(staging.folder)
        for path in (path for pattern in COMPANIONS for path in opened.folder.glob(pattern) if path.is_file()):
            target = staging.folder / path.relative_to(opened.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        staging.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("teacher", help="a folder, a preset or a Hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--hybrid", default="global2", metavar="LAYOUT")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default))
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    arguments = vars(parser.parse_args())
    try:
        write(arguments.pop("kind"), arguments.pop("teacher"), arguments.pop("output"), **arguments)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
