"""Secrets: how they look, and the two answers to them: a recipe that holds one is refused, any other text is masked.

Tokens belong in the environment or in the login of the service; nothing here reads them except to mask them.
Twin: tests/distill/test_recipe.py.
"""

import os
import re
from typing import Any

MASK = "***"
# A key that names a secret; `cls_token`, `max_tokens` or `eos_token_id` are settings of a model and do not match.
_KEY = re.compile(
    r"(hf_|hub_|api_|auth_|access_|bearer_|wandb_|github_)?(token|key|secret)|.*(password|passwd|api_?key|secret_?key)",
    re.IGNORECASE,
)
# Random letters come in both cases, unlike those of a folder called hf_models or sk-learn-data.
_TOKEN = re.compile(
    r"\b(hf_(?=\w*[A-Z])|(sk-|ghp_|github_pat_|glpat-|AKIA|xox[bp]-)(?=[\w-]*[A-Z0-9]))[A-Za-z0-9_-]{6,}"
)
_URL = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"]+@")
_VARIABLE = re.compile(r".*(TOKEN|API_?KEY|SECRET|PASSWORD)", re.IGNORECASE)


def names_a_secret(key: str) -> bool:
    """Whether a mapping's key says that its value is a secret."""
    return bool(_KEY.fullmatch(key.replace("-", "_")))


def looks_secret(text: str) -> bool:
    """Whether a text holds an access token or a URL with a user's name or password."""
    return bool(_TOKEN.search(text) or _URL.search(text))


def mask(value: Any) -> Any:
    """The text with every secret replaced; lists and mappings are masked within, other values pass."""
    if isinstance(value, str):
        text = _URL.sub(rf"\1{MASK}@", _TOKEN.sub(MASK, value))
        for name, secret in os.environ.items():
            if len(secret) >= 8 and _VARIABLE.fullmatch(name):
                text = text.replace(secret, MASK)
        return text
    if isinstance(value, dict):
        return {
            key: MASK if isinstance(item, str) and names_a_secret(str(key)) else mask(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask(item) for item in value]
    return value
