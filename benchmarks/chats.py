"""Do student and teacher answer alike? Greedy answers of both to the same fixed questions.

    python -m benchmarks.chats STUDENT TEACHER --questions FILE [--count 50] [--tokens 64] [--out FILE.json]

FILE is a list of objects with a key `instruction` (one with an `input` is passed over); its first questions are asked
through the teacher's chat template. Two figures per answer: the share of the teacher's tokens that the student would
say at the same place (it reads the teacher's answer up to there), and how many tokens of its own answer are the
teacher's before the first that is not.
"""

import argparse
import json
from pathlib import Path

import torch

from deltanet.generate import load, pick_device, pick_dtype


@torch.no_grad()
def answers(model, tokenizer, prompts: list[list[int]], tokens: int, batch: int = 25) -> list[list[int]]:
    """The greedy answers, each up to its end, at most `tokens` long."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    found = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=min(ends))
        for row in out[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(row[: end + 1])
    return found


@torch.no_grad()
def agreement(model, prompt: list[int], answer: list[int]) -> float:
    """Share of `answer` (not empty) that the model expects most, each token after the ones before."""
    logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return (logits.argmax(-1).cpu() == torch.tensor(answer)).float().mean().item()


def same_start(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, dtype = pick_device(arguments.device), pick_dtype(arguments.dtype)
    teacher, tokenizer = load(arguments.teacher, device, dtype)
    student, _ = load(arguments.student, device, dtype)
    rows = [row for row in json.loads(arguments.questions.read_text()) if not row.get("input")]
    questions = [row["instruction"] for row in rows[: arguments.count]]
    asked = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(a, add_generation_prompt=True, return_dict=False) for a in asked]
    wanted, given = (answers(model, tokenizer, prompts, arguments.tokens) for model in (teacher, student))
    alike = torch.tensor([agreement(student, p, w) for p, w in zip(prompts, wanted)])
    starts = torch.tensor([same_start(w, g) for w, g in zip(wanted, given)], dtype=torch.float)
    result = {
        "questions": len(prompts),
        "agreement": alike.mean().item(),
        "agreement_stderr": (alike.std() / len(alike) ** 0.5).item(),
        "same_start_tokens": starts.mean().item(),
        "teacher_tokens": sum(map(len, wanted)) / len(wanted),
        "identical": sum(w == g for w, g in zip(wanted, given)),
    }
    texts = [(q, tokenizer.decode(w), tokenizer.decode(g)) for q, w, g in zip(questions, wanted, given)]
    for question, teacher_says, student_says in texts[:5]:
        print(f"Q {question}\n  teacher: {teacher_says!r}\n  student: {student_says!r}")
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result | {"answers": texts}, indent=1))


if __name__ == "__main__":
    main()
