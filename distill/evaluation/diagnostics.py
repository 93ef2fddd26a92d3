"""What is right and wrong inside a model, which no figure of its quality shows: one table per question.

The parts: `same_logits.py`, `branches.py`, `states.py`, `drift.py`. Twin: tests/distill/evaluation/test_diagnostics.py.
"""

from collections.abc import Sequence
from functools import partial

import torch

from convert.closeness import recall_by_distance
from convert.progress import progress

from .branches import LAYERS, branches, parts_of
from .drift import comparable, drift
from .same_logits import SHORTEST as SHORTEST_TEXT
from .same_logits import same_logits
from .states import SHORTEST as SHORTEST_CONTEXT
from .states import states, truncated_context
from .subject import Subject

SAME = "Same logits when the text is"
OFF = "Part that is off"
STATES = "States"
CONTEXT = "Loss with so much context, nats a token"
FORCED = "Delta-rule layers on the teacher's stream"
APART = "Stream behind each layer, against the teacher's"

SAME_TOKENS = 256
TOKENS = {"cpu": 512, "cuda": 4096}
"""That each of a few dozen runs sees, by device; a few times more where one run is enough."""
RECALL_TOKENS = {"cpu": 1024, "cuda": 4096}
"""That each of them sees on top at each distance of recall, twice the distance at least."""
NEAR = 128


def diagnose(
    student: Subject,
    teacher: Subject | None,
    ids: torch.Tensor,
    *,
    distances: Sequence[int] = (),
    parts: str = LAYERS,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """{title: {row: {column: number}}} for windows ids (N, T) int64 of text that the student was not trained on.

    student may be any causal transformer: what does not apply to it is left out, and so is what a text of few tokens
    cannot tell. teacher only adds its own loss and recall beside the student's, and the layers' distances where the two
    have the same layers. distances: those that fit the windows and the models' range, rising; what a part is worth in
    recall is asked at NEAR, where it is one of them, and at the longest. parts: what is switched off, one of
    `branches.PARTS`. Which windows are looked at is drawn from
    `seed`.
    """
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    ids = ids[order]
    tokens = TOKENS.get(student.device.type, TOKENS["cpu"])
    few, more = _first(ids, tokens), _first(ids, 4 * tokens)
    found = {}
    if ids.shape[1] >= SHORTEST_TEXT:
        found[SAME] = same_logits(student, ids[0, :SAME_TOKENS])
    asked = sorted({NEAR}.intersection(distances).union(distances[-1:]))
    recalled = partial(
        recall_by_distance,
        None,
        held_out=ids.to(student.device),
        most=2 * max(asked, default=0),
        tokens=RECALL_TOKENS.get(student.device.type, RECALL_TOKENS["cpu"]),
        distances=asked,
    )
    if count := len(parts_of(student.model, parts)):
        with progress("diagnostics, parts switched off", count, "parts") as advance:
            found[OFF] = branches(student, teacher, few, parts=parts, recalled=recalled, advance=advance)
    if student.is_student and ids.shape[1] > 1:
        found[STATES] = states(student, more)
    if ids.shape[1] >= 2 * SHORTEST_CONTEXT:
        models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        found[CONTEXT] = truncated_context(models, more)
    if teacher is not None and comparable(student, teacher):
        found[FORCED], found[APART] = drift(student, teacher, more)
    return {title: rows for title, rows in found.items() if rows}


def _first(ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """As many whole windows as `tokens` allow, one at least; a window that is longer is cut."""
    return ids[: max(tokens // ids.shape[1], 1), :tokens]
