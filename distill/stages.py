"""What each kind of stage computes: a module whose forward gives a micro-batch's share of the loss, and its parts.

`align` is teacher-forced: one pass of the teacher gives every layer's input and attention output, and each linear
layer's mixer fits the output on that input; no gradient crosses a layer. The other kinds run the student whole:
losses over the vocabulary (chunked, no logits of a batch) and on hidden states, against the teacher where they need
one; `dpo` compares the two answers of a pair, against the student as the stage found it. Loss functions: losses.py,
hidden_losses.py; the loop: loop.py. Twins: tests/distill/test_stages.py, test_preferences.py.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltanet import DeltaNetForCausalLM

from . import hidden_losses
from .batch import Batch, num_real, num_targets
from .losses import VOCABULARY_LOSSES, Term, token_logprobs, vocabulary_loss
from .packing import Sequence as Packed
from .preferences import num_pairs, pair_sums
from .schema import WITHOUT_TEACHER, Stage

PREFIX = "student."
"""What a stage module puts before the student's own parameter names."""
RECOMPILATIONS = 64
"""All layers run one code, of which torch keeps 8 compiled forms and then gives up. They differ by kind of layer, with
and without gradients, with one document in a row or several: 8 of a decoder layer, more of some functions inside."""
MEASURES = (Term("ce"), Term("forward_kl"))
_MIXER_LOSSES = {
    "mixer_l2": hidden_losses.l2,
    "mixer_mse": hidden_losses.mse,
    "mixer_cosine": hidden_losses.cosine,
}
_STATE_LOSSES = {"hidden_cosine": hidden_losses.cosine, "hidden_mse": hidden_losses.mse}

Share = tuple[torch.Tensor, dict[str, torch.Tensor]]


def terms_of(stage: Stage) -> list[Term]:
    return [Term(loss.name, loss.weight, loss.temperature, loss.beta) for loss in stage.losses]


def needs_teacher(stage: Stage) -> bool:
    return any(loss.name not in WITHOUT_TEACHER for loss in stage.losses)


class Align(nn.Module):
    """Every mixer against the attention it replaces. The loss is the mean over tokens and linear layers.

    The module holds the student's mixers under the student's own names, and the teacher unregistered: it is neither
    trained, sharded nor saved.
    """

    def __init__(self, student: DeltaNetForCausalLM, teacher: DeltaNetForCausalLM, stage: Stage):
        super().__init__()
        self.terms, self._teacher = terms_of(stage), [teacher]
        self.checkpointing = False
        kinds = student.config.layer_types
        self.linear = [index for index, kind in enumerate(kinds) if kind == "linear_attention"]
        # The skeleton of the student's names: student.model.layers.<index>.self_attn
        self.student = nn.Module()
        self.student.model = nn.Module()
        self.student.model.layers = nn.ModuleDict()
        for index in self.linear:
            holder = nn.Module()
            holder.self_attn = student.model.layers[index].self_attn
            self.student.model.layers[str(index)] = holder

    @staticmethod
    def count(sequences: Sequence[Packed]) -> int:
        """What the loss is averaged over: every token that is not padding."""
        return num_real(sequences)

    def forward(self, batch: Batch, count: float, measure: bool = False) -> Share:
        """`measure` changes nothing here: the loss is its own measure."""
        loss, parts = 0.0, {term.name: 0.0 for term in self.terms}
        for index, x, rotations, wanted in self._teacher_mixers(batch):
            mixer = self.student.model.layers[str(index)].self_attn
            if self.checkpointing and torch.is_grad_enabled():
                made = checkpoint(self._mix, mixer, x, rotations, batch.cu_seqlens, use_reentrant=False)
            else:
                made = self._mix(mixer, x, rotations, batch.cu_seqlens)
            for term in self.terms:
                value = _MIXER_LOSSES[term.name](made, wanted, batch.real, count) / len(self.linear)
                loss = loss + term.weight * value
                parts[term.name] = parts[term.name] + value.detach()
        return loss, parts

    @staticmethod
    def _mix(mixer, x, rotations, cu_seqlens):
        return mixer(x, position_embeddings=rotations, cu_seqlens=cu_seqlens)[0]

    @torch.no_grad()
    def _teacher_mixers(self, batch: Batch) -> list[tuple]:
        """(layer, input, rotations, attention output) of every layer that is linear in the student."""
        seen, teacher = [], self._teacher[0]

        def note(index):
            def hook(_, args, kwargs, output):
                seen.append((index, args[0], kwargs["position_embeddings"], output[0]))

            return hook

        handles = [
            teacher.model.layers[index].self_attn.register_forward_hook(note(index), with_kwargs=True)
            for index in self.linear
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled layers would pass the hooks by
                run_decoder(teacher, batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen


class Whole(nn.Module):
    """The student end to end: `distil`, `long`, `sft`, `pretrain`. The loss is the mean over the valid targets.

    Without a teacher its forward KL is to what the batch brings of one (`logit_cache.py`)."""

    def __init__(
        self,
        student: DeltaNetForCausalLM,
        teacher: DeltaNetForCausalLM | None,
        stage: Stage,
        *,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
    ):
        super().__init__()
        self.student, self._teacher = student, [teacher]
        self.vocab_size = min(vocab_size or student.config.vocab_size, student.config.vocab_size)
        self.chunk_tokens = chunk_tokens
        terms = terms_of(stage)
        self.vocabulary = [term for term in terms if term.name in VOCABULARY_LOSSES]
        self.states = [term for term in terms if term.name not in VOCABULARY_LOSSES]

    @staticmethod
    def count(sequences: Sequence[Packed]) -> int:
        """What the loss is averaged over: the valid targets."""
        return num_targets(sequences)

    def forward(self, batch: Batch, count: float, measure: bool = False) -> Share:
        """`measure` gives cross-entropy and forward KL (where there is a teacher) instead of the stage's losses."""
        teacher = self._teacher[0]
        vocabulary, states = self.vocabulary, self.states
        if measure:
            vocabulary, states = [term for term in MEASURES if teacher is not None or term.name == "ce"], []
        made = run_decoder(self.student, batch, bool(states))
        goal = None
        by_teacher = any(term.name != "ce" for term in vocabulary) or any(term.name in _STATE_LOSSES for term in states)
        if by_teacher and teacher is not None:
            with torch.no_grad():
                goal = run_decoder(teacher, batch, any(term.name in _STATE_LOSSES for term in states))
        loss, parts = made.last_hidden_state.new_zeros(()), {}
        if vocabulary:
            loss, parts = vocabulary_loss(
                made.last_hidden_state,
                head(self.student),
                batch.targets,
                vocabulary,
                count,
                valid=batch.valid,
                teacher_hidden=None if goal is None else goal.last_hidden_state,
                teacher_weight=None if goal is None else head(teacher),
                top_k=batch.top_k if goal is None else None,
                vocab_size=self.vocab_size,
                chunk_tokens=self.chunk_tokens,
            )
        for term in states:
            if term.name == "layer_cosine":
                value = hidden_losses.layer_cosine(made.hidden_states, batch.valid, count)
            else:
                pairs = list(zip(made.hidden_states, goal.hidden_states))[1:]
                value = sum(_STATE_LOSSES[term.name](*pair, batch.valid, count) for pair in pairs) / len(pairs)
            loss, parts[term.name] = loss + term.weight * value, value.detach()
        return loss, parts


class Dpo(Whole):
    """Preferences: log-probabilities of the chosen and the rejected answer, given the prompt, against those of a
    reference (arXiv 2305.18290). The loss is the mean over the pairs, ln 2 while student and reference are equal.

    The reference is the student at the start of the stage. It is held as the teacher is: neither trained, sharded nor
    saved. `measure` is that of `Whole`, against the teacher, and averaged over `Whole.count`.
    """

    def __init__(self, student: DeltaNetForCausalLM, reference: DeltaNetForCausalLM, stage: Stage, **options):
        teacher = options.pop("teacher", None)
        super().__init__(student, teacher, stage, **options)
        self._reference, (self.term,) = [reference], terms_of(stage)

    @staticmethod
    def count(sequences: Sequence[Packed]) -> int:
        """What the loss is averaged over: the pairs."""
        return num_pairs(sequences)

    def forward(self, batch: Batch, count: float, measure: bool = False) -> Share:
        """Parts: `dpo`, `margin` (how much more than the reference the student prefers the chosen answer, times beta)
        and `accuracy` (the share of pairs in which it does)."""
        if measure:
            return super().forward(batch, count, measure)
        chosen, rejected = self._answers(self.student, batch)
        with torch.no_grad():
            reference = self._answers(self._reference[0], batch)
        value = hidden_losses.dpo(chosen, rejected, *reference, self.term.beta, count)
        margin = self.term.beta * ((chosen - rejected) - (reference[0] - reference[1])).detach()
        share = 1 / max(count, 1)
        parts = {"dpo": value.detach(), "margin": margin.sum() * share, "accuracy": (margin > 0).sum() * share}
        return self.term.weight * value, parts

    def _answers(self, model: DeltaNetForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Per pair the log-probability of the chosen and of the rejected answer."""
        hidden, weight = run_decoder(model, batch).last_hidden_state, head(model)[: self.vocab_size]
        return pair_sums(token_logprobs(hidden, weight, batch.targets, chunk_tokens=self.chunk_tokens), batch)


def compile_layers(module: Align | Whole, **options) -> None:
    """Has torch compile, at the first step, what the stage computes layer by layer: mixers in `align`, else decoder
    layers, of the teacher too. Names of parameters stay. The options are those of `torch.compile`."""
    if isinstance(module, Align):
        layers = [layer.self_attn for layer in module.student.model.layers.values()]
    else:
        models = [model for model in (module.student, module._teacher[0]) if model is not None]
        layers = [layer for model in models for layer in model.model.layers]
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
    # What torch 2.13 reads back from this cache of traced graphs makes views of garbage sizes, so that a second run on
    # a machine fails at its first step. Compiled kernels are cached all the same.
    torch._functorch.config.enable_autograd_cache = False
    for layer in layers:
        layer.compile(**options)


def head(model: DeltaNetForCausalLM) -> torch.Tensor:
    """The output weights (vocabulary, D), which are the embedding's where the two are tied. Of a sharded model they are
    gathered now, and freed with the last reference."""
    shards = getattr(model, "shards", None)
    return model.lm_head.weight if shards is None else shards.whole(model.lm_head.weight)


def run_decoder(model: DeltaNetForCausalLM, batch: Batch, with_states: bool = False):
    """The decoder without its head."""
    return model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        longest=batch.longest,
        use_cache=False,
        output_hidden_states=with_states,
    )


def share_frozen(student: DeltaNetForCausalLM, teacher: DeltaNetForCausalLM, dtype: torch.dtype = torch.float32) -> int:
    """Makes the student use the teacher's own tensors where it does not train and the values are equal; returns how
    many bytes that saves. dtype: what the engine will compute in; a teacher in another one shares nothing. Call it
    after `requires_grad` is set and before the engine is made."""
    theirs, saved = dict(teacher.named_parameters()), 0
    for module_name, module in student.named_modules():
        for name, parameter in list(module._parameters.items()):
            twin = theirs.get(f"{module_name}.{name}")
            if parameter is None or parameter.requires_grad or twin is None or parameter is twin:
                continue
            if twin.dtype == dtype and torch.equal(parameter, twin.to(parameter.dtype)):
                module._parameters[name] = twin
                saved += parameter.numel() * parameter.element_size()
    if student.config.tie_word_embeddings:
        student.tie_weights()
    return saved
