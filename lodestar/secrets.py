"""Secrets, known by the name of a field or by their shape: refused in recipes, hidden in messages. Loads no library."""

from __future__ import annotations

import re
from collections.abc import Sequence

MARK = "***"
_NAME = re.compile(
    r"(?:^|_)(?:api_?key|(?:access|secret|private|wandb)_?key|secret|passw(?:or)?d|passphrase|pwd|authori[sz]ation|"
    r"credentials?|bearer)(?:_id)?$|(?:^|_)token$"
)
"""Of a field that holds a secret, in small letters with underscores."""
_TOKEN_OF_TEXT = re.compile(
    r"(?:bos|cls|end|eod|eos|first|last|mask|next|pad|padding|prefix|sep|special|start|suffix|unk)_token$"
)
_SHAPE = re.compile(
    r"\bsk-[\w-]{0,60}?[A-Za-z0-9]{16,}[\w-]*|\bhf_[A-Za-z0-9]{16,}|\bgh[a-z]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|"
    r"\bxox[a-z]-[\w-]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bAIza[\w-]{30,}|\bwandb_v\d_\w{16,}|"
    r"\beyJ[\w-]{6,300}\.[\w-]{6,3000}\.[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]|-(?!-----)){0,20000}|"
    r"(?<=\bBearer )(?=\S*\d)[\w.+/=~-]{12,}|"
    r"(?<=://)(?!USER:PASSWORD@)[^\s/@:]{0,200}:[^\s@]{0,200}(?=@)"
)
"""Keys of known services, and user:password of a URL. All lengths are bounded: long texts must not take long."""
_QUERY = re.compile(r"([?&](?:\w*password|api[-_]?key|(?:\w*_)?token|sig(?:nature)?|secret)=)[^&\s]+", re.IGNORECASE)
_WANDB_KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
"""The shape of a hash too: a key only where wandb is meant."""
_ASSIGNMENT = re.compile(r"""(?<![\w.-])([\w.-]{1,200})(=|["']\s*:\s*["']?)([^\s"',;)}\]]+)""")

_CHECKED_BY_SCHEMA = ("store.url", "store.url_env", "store.api_key_env")
"""Whose own check knows the key to use instead."""


def refusal(key: str, value: object) -> str | None:
    """What is wrong with the value of a dotted key that looks like a secret, without the value; none where it does not.

    A token in the sense of a text (`pad_token`, `batch_tokens`) is none, nor is a hash.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "" or key in _CHECKED_BY_SCHEMA:
        return None
    text, is_wandb = str(value), key.startswith("track.") or "wandb" in key.lower()
    by_name = any(map(_is_secret_name, key.split(".")))
    if not (by_name or _SHAPE.search(text) or _QUERY.search(text) or (is_wandb and _WANDB_KEY.search(text))):
        return None
    if is_wandb:
        remedy = "set the environment variable WANDB_API_KEY"
    elif "://" in text or key.startswith("store."):
        remedy = (
            "keep it in an environment variable, and name that: store.url_env, store.api_key_env; HF_TOKEN for hubs"
        )
    elif "hf_" in text or re.search(r"hf|hub|hugging|^model|^token", key):
        remedy = "set the environment variable HF_TOKEN"
    else:
        remedy = "set an environment variable: WANDB_API_KEY for wandb, HF_TOKEN for the hub"
    return f"looks like a secret, which a recipe must not hold (take it out, and {remedy})"


def hidden(text: str) -> str:
    """The text with *** in place of what looks like a secret."""
    text = _QUERY.sub(rf"\g<1>{MARK}", _SHAPE.sub(MARK, text))
    return _ASSIGNMENT.sub(_hide_value, text)


def hidden_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, likewise; `--token VALUE` too."""
    before = ["", *arguments]
    return [
        MARK if name.startswith("-") and "=" not in name and _is_secret_name(name) else hidden(argument)
        for name, argument in zip(before, arguments, strict=False)
    ]


def _hide_value(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    is_secret = _is_secret_name(name) or ("wandb" in match[1].lower() and _WANDB_KEY.fullmatch(match[3]))
    return f"{match[1]}{match[2]}{MARK}" if is_secret else match[0]


def _is_secret_name(name: str) -> bool:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").strip("_").lower()
    return bool(_NAME.search(name)) and not _TOKEN_OF_TEXT.search(name)
