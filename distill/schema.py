"""What a recipe may say: every section, its keys, their units and limits, and what each kind of stage starts from.

These models are the only list of keys; `--print-config`, the editors' JSON schema and the error messages are made from
them. Rules that join several keys are in `recipe.py`. Twin: tests/distill/test_recipe.py.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticKnownError

from convert.compat import DEFAULTS as MIXER_DEFAULTS
from convert.compat import resolve
from convert.sizes import parse_size
from deltanet_errors import UserError

T = TypeVar("T")
LONGEST_NAME = 200
Many = Annotated[tuple[T, ...], Field(strict=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Text = Annotated[str, Field(min_length=1)]
_one_or_many = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_as_list = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[Many[Text], _as_list, WithJsonSchema(_one_or_many)]
SomeNames = Annotated[Names, Field(min_length=1)]


def _as_size(text: str) -> str:
    parse_size("got", text)
    return text


def names_a_file(text: str) -> bool:
    """Whether files may be called so: of the 255 bytes that a file system takes, endings need some."""
    return not set(text) & {"/", "\0"} and not text.startswith(".") and len(text.encode()) <= LONGEST_NAME


def _as_stage_name(text: str) -> str:
    """Folders are called so, and overrides tell stages by it or by their number."""
    if not text.strip() or text.isdecimal() or not names_a_file(text):
        raise ValueError(
            f"got {text!r}, but a stage's name is no number, begins with no '.', has no '/' in it and at most "
            f"{LONGEST_NAME} bytes"
        )
    return text


def _no_bool(value: object) -> object:
    """A Literal takes true for 1."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


Size = Annotated[str, AfterValidator(_as_size)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Cache(Section):
    """The teacher's likeliest next tokens on disk (docs/distil.md), so that it need not be in memory to train."""

    top_k: int = Field(64, gt=0, description="tokens kept of every target; the others count as one")
    folder: Text | None = Field(None, description="which runs may share; None: `logits` in the run's own")


class Teacher(Section):
    model: Text = Field(description="a checkpoint folder, a Hub id (owner/name), or a preset such as demo or llama-1b")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub repository")
    dtype: Dtype = Field("auto", description="of the weights in memory; auto is the training dtype")
    shard: Literal["auto", "on", "off"] = Field(
        "auto", description="part its weights over the processes; auto: of several with ZeRO 3"
    )
    offload: Literal["none", "cpu"] = Field("none", description="where a sharded teacher's parts wait")
    cache: Cache | None = Field(None, description="what forward_kl needs of it is written before the first step")


class Mixer(Section):
    """Which layers keep attention, and what the others have; names as in deltanet-convert."""

    hybrid: Text = Field(
        "global2", description="global2, swa[:WINDOW], every:N, none, all, layers:1,5,9, RANKING.json:N"
    )
    mixer: Literal["gated_delta", "delta"] = "gated_delta"
    state_heads: Literal["expanded", "shared"] = "expanded"
    feature_map: Literal["none", "linear"] = Field(
        "none", description="of the queries and keys of a state: learned, per head, the identity at the start"
    )
    skip_conv: int = Field(4, ge=0, description="tokens of v that bypass the state")
    local_window: int = Field(
        0,
        ge=0,
        description="last tokens that softmax attention sees, and the first; the state holds those before; 0 is off",
    )
    conv: int = Field(0, ge=0, description="kernel of the convolution over q, k, v; 0 is off")
    gate: Literal["read", "output", "both", "none"] = "read"
    beta_range: Annotated[Literal[1, 2], BeforeValidator(_no_bool)] = 1


class Convert(Mixer):
    """The options of deltanet-convert, by the same names and with the same defaults."""

    state_heads: Literal["expanded", "shared"] = Field("shared", description="without a window expanded")
    skip_conv: int = Field(0, ge=0, description="tokens of v that bypass the state; without a window 4")
    local_window: int = Field(
        128,
        ge=0,
        description="last tokens that softmax attention sees, and the first; the state holds those before; 0 is off",
    )
    state_positions: Literal["rotary", "fixed"] = Field(
        "rotary",
        description="of what a state holds: as RoPE has them, or all as far back as local_window (0: without RoPE)",
    )
    compat: Literal["fla", "qwen3_5"] | None = Field(
        None, description="make a student that export.formats can write in this format; sets mixer options"
    )
    dtype: Dtype = "auto"
    max_shard_size: Size = "5GB"
    calibrate: SomeNames = Field(("self",), description="text files, self (the teacher writes) or none (plain copy)")
    held_out: Text | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, given: object) -> object:
        """Options of the mixer that are not given are as `compat` needs them, or as usual beside the others."""
        if not isinstance(given, dict):
            return given
        try:
            return resolve(given.get("compat"), {name: given.get(name) for name in MIXER_DEFAULTS}) | given
        except UserError as error:
            raise ValueError(str(error)) from None


class New(Mixer):
    """A student of random weights, to be trained from nothing without a teacher. Attention layers have RoPE, linear
    ones none."""

    tokenizer: Text | None = Field(None, description="checkpoint folder whose tokenizer it has; None: made-up words")
    vocabulary: int = Field(256, gt=0, description="tokens of the made-up words; for generated tasks")
    layers: int = Field(2, gt=0)
    hidden_size: int = Field(64, gt=0)
    intermediate_size: int | None = Field(None, gt=0, description="None: twice hidden_size")
    heads: int = Field(2, gt=0)
    kv_heads: int | None = Field(None, gt=0, description="None: as many as heads")
    head_dim: int | None = Field(None, gt=0, description="None: hidden_size / heads")
    max_context: int = Field(2048, gt=0, description="tokens")
    tied: bool = Field(False, description="the head's weights are the embedding's")
    seed: int = Field(0, ge=0, description="of the weights")


class Student(Section):
    model: Text | None = Field(None, description="folder that deltanet-convert made; made now if `convert` is given")
    new: New | None = Field(None, description="makes the student from nothing, instead of `convert`")
    convert: Convert | None = Field(None, description="makes the student from the teacher where the folder is absent")


USUAL_NAME = "teacher"  # of a source with `from_teacher` that is given none


class Source(Section):
    name: Text | None = Field(None, description="what stages call it; by default the file's name")
    path: SomeNames | None = Field(None, description="files or globs: txt, md, jsonl, json, parquet, each also .gz")
    dataset: Text | None = Field(None, description="Hub data set (owner/name), instead of path")
    from_teacher: int | None = Field(None, gt=0, description="tokens that the teacher writes itself, instead of path")
    top_p: float = Field(
        1.0, gt=0, le=1, description="the teacher writes only tokens which together have so much of the chance"
    )
    openings: Many[Text] = Field(
        (), description="words that what the teacher writes begins with, in turn (of a chat the question)"
    )
    task: str | None = Field(None, description="a generated task (docs/tasks.md), instead of path")
    options: dict[str, int | float | str] = Field({}, description="of the task, such as length: 64")
    documents: int | None = Field(None, gt=0, description="examples of the task")
    seed: int = Field(0, ge=0, description="of the task's examples")
    config: str | None = Field(None, description="configuration of the Hub data set")
    split: str = Field("train", description="split of the Hub data set")
    revision: str | None = Field(None, description="commit of the Hub data set")
    kind: Literal["text", "chat", "preference", "task"] = Field(
        "text", description="plain documents, conversations, pairs of a chosen and a rejected answer; a task's own"
    )
    field: Text | None = Field(None, description="key of the text or of the messages; found by itself if None")
    separator: Text | None = Field(None, description="what parts the documents of a text file; None: a file is one")
    weight: float | None = Field(None, gt=0, description="share of the sequences; None: by its number of sequences")
    max_documents: int | None = Field(None, gt=0)

    @property
    def written_as(self) -> str:
        """What the files are called that the teacher writes."""
        return self.name if self.top_p == 1 else f"{self.name}-top-{self.top_p:g}"


class Data(Section):
    sources: Many[Source] = Field((), description="where the text comes from")
    seq_len: int = Field(512, ge=2, description="tokens of a sequence")
    packing: Literal["wrapped", "best_fit"] = Field(
        "wrapped", description="wrapped cuts documents at the sequence's end; best_fit keeps short ones whole"
    )
    train_on: Literal["assistant", "last", "all"] = Field("assistant", description="which tokens of a chat are targets")
    too_long: Literal["cut", "drop"] = Field("cut", description="what happens to a chat longer than seq_len")
    repeats: float = Field(0.0, ge=0, le=1, description="share of sequences in which an earlier span is copied")
    noise: float = Field(0.0, ge=0, le=1, description="share of sequences in which 15 % of the tokens are others")
    held_out: Fraction = Field(0.01, description="last share of every source's tokens, kept for evaluation")
    seed: int = Field(0, ge=0, description="of the order of the documents")


KINDS = ("align", "distil", "long", "sft", "dpo", "onpolicy", "pretrain", "convert_step")
_TOKEN_LOSSES = ("forward_kl", "reverse_kl", "jsd", "ce", "hidden_cosine", "hidden_mse", "layer_cosine")
LOSSES_OF = {
    "align": ("mixer_l2", "mixer_mse", "mixer_cosine"),
    "distil": _TOKEN_LOSSES,
    "long": _TOKEN_LOSSES,
    "sft": _TOKEN_LOSSES,
    "dpo": ("dpo",),
    "onpolicy": ("forward_kl", "reverse_kl", "jsd"),
    "pretrain": ("ce", "layer_cosine"),
    "convert_step": (),
}
WITHOUT_TEACHER = ("ce", "layer_cosine", "dpo")
"""Losses that need no teacher; those of an `align` or `convert_step` stage always do."""
# What published conversions agree on: align the mixers alone at 1e-3 (RADLADS, arXiv 2505.03005; HALO, 2601.22156),
# then train everything by forward KL at T = 1 and a rate of 1e-4 or less. Preferences: the rate of Zephyr (2310.16944).
DEFAULTS_OF = {
    "align": {"trainable": ["mixers"], "lr": 1e-3, "losses": [{"name": "mixer_l2"}]},
    "distil": {"trainable": ["all"], "lr": 1e-4, "losses": [{"name": "forward_kl"}]},
    "long": {"trainable": ["all"], "lr": 1e-5, "losses": [{"name": "forward_kl"}]},
    "sft": {"trainable": ["all"], "lr": 1e-5, "losses": [{"name": "ce"}]},
    "dpo": {"trainable": ["all"], "lr": 5e-7, "losses": [{"name": "dpo", "beta": 0.1}]},
    "onpolicy": {"trainable": ["all"], "lr": 1e-5, "losses": [{"name": "reverse_kl"}]},
    "pretrain": {"trainable": ["all"], "lr": 1e-3, "losses": [{"name": "ce"}]},
    "convert_step": {"tokens": 32768},
}


class Loss(Section):
    name: Literal[(*LOSSES_OF["align"], *_TOKEN_LOSSES, "dpo")] = Field(description="which term")
    weight: float = Field(1.0, gt=0)
    temperature: float = Field(1.0, gt=0, description="of forward_kl, reverse_kl and jsd, which are multiplied by T^2")
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="of jsd: the teacher's share in the mixture; of dpo: how strongly the reference holds",
    )


class Lora(Section):
    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0, description="the adapter is scaled by alpha / rank")
    targets: SomeNames = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="matrices of the layers, of those trained"
    )


class Stage(Section):
    name: Annotated[str, AfterValidator(_as_stage_name)] | None = Field(
        None, description="by default the kind, with a number where it repeats"
    )
    kind: Literal[KINDS]
    steps: int | None = Field(None, gt=0, description="optimizer steps; or say tokens")
    tokens: int | None = Field(None, gt=0, description="to see, rounded up to whole steps; of convert_step: to fit on")
    trainable: SomeNames = Field(("all",), description="mixers, all, attention, or patterns of parameter names")
    lora: Lora | None = Field(None, description="low-rank adapters on matrices of the set; the rest of it trains whole")
    lr: float = Field(1e-4, ge=0, description="peak learning rate")
    lr_groups: dict[str, Annotated[float, Field(ge=0)]] = Field({}, description="peak rate of a set or pattern")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_fraction: float = Field(0.2, gt=0, le=1, description="of wsd: share of the steps at the end that decay")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="rate at the end over the peak rate")
    clip: float = Field(1.0, ge=0, description="gradient norm; 0 is off")
    weight_decay: float = Field(0.0, ge=0, description="never on norms, biases and gates")
    adam_betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    losses: Many[Loss] = ()
    sources: Many[str] = Field((), description="names of data.sources; () is all that the kind can read")
    seq_len: int | None = Field(None, ge=2, description="instead of data.seq_len")
    hybrid: Text | None = Field(None, description="of convert_step: which layers still keep attention after it")
    prompt_tokens: int = Field(32, gt=0, description="of onpolicy: how much of a text is the prompt; chats say it")
    completion_tokens: int = Field(128, gt=0, description="of onpolicy: the most that the student writes after it")
    batch_size: int | None = Field(None, gt=0, description="instead of training.batch_size")
    micro_batch_size: int | None = Field(None, gt=0, description="instead of training.micro_batch_size")


def has_key(kind: str, key: str) -> bool:
    """Whether a stage of this kind reads the key; one that it does not read is refused and not shown."""
    if kind == "convert_step":
        return key in ("name", "kind", "hybrid", "tokens", "sources", "seq_len")
    return key != "hybrid" and (kind == "onpolicy" or key not in ("prompt_tokens", "completion_tokens"))


class Training(Section):
    batch_size: int = Field(32, gt=0, description="sequences of one optimizer step, over all processes")
    micro_batch_size: int = Field(1, gt=0, description="sequences of one forward pass on one process")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of forward and backward; masters are float32"
    )
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile of every layer; ZeRO 0 to 2")
    loss_chunk_tokens: int | None = Field(None, gt=0, description="tokens whose logits exist at once; None: by memory")
    seed: int = Field(0, ge=0)
    commit_every_steps: int | None = Field(None, gt=0)
    commit_every_seconds: float | None = Field(600.0, gt=0)
    keep_commits: int = Field(2, ge=2)
    max_skipped_steps: int = Field(3, gt=0, description="stop after this many steps in a row without finite gradients")


class DeepSpeed(Section):
    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)] = Field(
        0, description="ZeRO: what is sharded over the processes"
    )
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    extra: dict = Field({}, description="further keys of DeepSpeed's own configuration")


class Logging(Section):
    every_steps: int = Field(1, gt=0)
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: Text = "deltanet"


class Evaluation(Section):
    every_steps: int | None = Field(None, gt=0, description="None: at the end of every stage")
    tokens: int = Field(65536, gt=0, description="held-out tokens to measure on")
    sources: Many[Source] = Field((), description="instead of data.held_out")
    prompt: Text = Field("Once upon a time", description="continued at the end of the run, to be read")
    tasks: Names = Field(
        (), description="at the end: generated tasks by name, all of them, or .jsonl files, as deltanet-eval takes them"
    )
    task_examples: int | None = Field(None, gt=0, description="of each task; None: as deltanet-eval --limit")
    contexts: Many[Annotated[int, Field(gt=0)]] = Field(
        (), description="at the end: lengths in tokens at which speed and memory are measured"
    )


class Export(Section):
    dtype: Dtype = Field("auto", description="auto is the student's own")
    max_shard_size: Size = "5GB"
    formats: Many[Literal["deltanet", "remote", "fla", "qwen3_5"]] = Field(
        ("deltanet",), description="export, which is always written, and further folders, named export-FORMAT"
    )
    push: Text | None = Field(
        None, description="Hub repository (user/name) to send `export` to; made private if missing"
    )


class Recipe(Section):
    version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(description="of this schema")
    teacher: Teacher | None = Field(None, description="needed by every stage and loss that looks at one")
    student: Student
    data: Data = Data()
    stages: Many[Stage]
    training: Training = Training()
    deepspeed: DeepSpeed = DeepSpeed()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
