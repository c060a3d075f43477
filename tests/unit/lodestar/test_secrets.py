"""Secrets: refused in recipes with the environment variable to use, and printed nowhere. No real key is here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from contrastive.config import FinetuneRecipe
from lodestar import secrets
from lodestar.config import loader
from lodestar.config.schema import RunConfig
from lodestar.errors import ConfigError, LodestarError, shown
from lodestar.secrets import hidden, hidden_arguments, refusal
from tests.unit.lodestar.config.test_loader import RECIPE, VALUES

HEX = "0123456789abcdef" * 2 + "01234567"
KEYS = {
    "openai": "sk-" + "Ab1" * 8,
    "hub": "hf_" + "Ab1" * 11,
    "github": "ghp_" + "Ab1" * 12,
    "github (fine)": "github_pat_" + "Ab1" * 12,
    "aws": "AKIA" + "ABCD1234" * 2,
    "slack": "xoxb-" + "1234567890-abc",
    "jwt": "eyJhbGciOi.eyJzdWIiOi.SflKxwRJ",
    "url": "https://me:hunter2@host/x",
    "url with a slash": "postgresql://me:hun/ter2@host/db",
    "query": "https://host/x?api_key=hunter2",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
}
SECRET_PARTS = ("Ab1Ab1", "ABCD1234", "1234567890-abc", "SflKxwRJ", "hunter2", "hun/ter2", HEX)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("field", ["run.name", "model.encoder", "data.query_instruction", "no.such"])
def test_what_has_the_shape_of_a_secret_is_refused_in_any_field_and_not_shown(
    field: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"looks like a secret, which a recipe must not hold \(take it out") as caught:
        loader.load(FinetuneRecipe, path, [f"{field}={key}"])
    assert not any(part in str(caught.value) for part in SECRET_PARTS)
    assert "WANDB_API_KEY" in str(caught.value) or "HF_TOKEN" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "variable"),
    [
        ("track.api_key", "hunter2", "WANDB_API_KEY"),
        ("track.project", HEX, "WANDB_API_KEY"),
        ("wandb_key", HEX, "WANDB_API_KEY"),
        ("model.token", "hunter2", "HF_TOKEN"),
        ("hf_token", "hunter2", "HF_TOKEN"),
        ("model.hfToken", "hunter2", "HF_TOKEN"),
        ("password", "hunter2", "HF_TOKEN"),
        ("auth.authorization", "hunter2", "HF_TOKEN"),
        ("store.api_key", "hunter2", "store.api_key_env"),
        ("secret", 1234567890, "HF_TOKEN"),
    ],
)
def test_what_has_the_name_of_a_secret_is_refused(field: str, value: object, variable: str) -> None:
    told = refusal(field, value)
    assert told is not None and variable in told and str(value) not in told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encode.batch_tokens", 4096),
        ("model.pooling", "last_token"),
        ("max_tokens", 512),
        ("padding_token", "[PAD]"),
        ("cls_token", "[CLS]"),
        ("model.encoder", "BAAI/bge-base-en-v1.5"),
        ("model.encoder", f"cache/snapshots/{HEX}"),
        ("checkpoint.resume", "runs/x/checkpoints/step-00000100"),
        ("data.train", "data/" + "0123456789abcdef" * 4 + ".jsonl"),
        ("data.train.0", "hf_datasets/a.jsonl"),
        ("data.query_instruction", "Represent this sentence for searching relevant passages: "),
        ("data.query_instruction", "Answer the question: what is the password? "),
        ("store.url", "http://localhost:6333"),
        ("store.api_key_env", "QDRANT_API_KEY"),
        ("run.name", "sk-learn-baseline-model-v2-of-2026"),
        ("track.project", "retrieval"),
        ("model.encoder", "https://host:8080/a/b"),
        ("password", None),
        ("token", ""),
    ],
)
def test_what_only_resembles_a_secret_is_none(field: str, value: object) -> None:
    assert refusal(field, value) is None
    assert hidden(f"{field}: {value}") == f"{field}: {value}"


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_no_message_holds_a_secret(key: str) -> None:
    for message in (str(LodestarError(f"x: {key}: no")), shown(key), shown({"a": [key]}), hidden(f"a {key} b")):
        assert secrets.MARK in message and not any(part in message for part in SECRET_PARTS)
    assert hidden("a 'wandb_api_key=hunter2' b") == "a 'wandb_api_key=***' b"
    assert hidden('got {"password": "hunter2"}') == 'got {"password": "***"}'
    assert hidden("not postgresql://USER:PASSWORD@HOST") == "not postgresql://USER:PASSWORD@HOST"


def test_a_command_line_is_recorded_without_secrets() -> None:
    words = ["launch/finetune.py", "--config", "a.yaml", "track.api_key=hunter2", "--token", "hunter2", KEYS["url"]]
    expected = ["launch/finetune.py", "--config", "a.yaml", "track.api_key=***", "--token", "***", "https://***@host/x"]
    assert hidden_arguments(words) == expected


def test_a_recipe_that_is_an_object_is_searched_too() -> None:
    recipe = loader.recipe_of(FinetuneRecipe, VALUES)
    leaking = recipe.model_copy(update={"run": RunConfig(output_dir="x", name=KEYS["hub"])})
    with pytest.raises(ConfigError, match=r"^recipe: run.name: looks like a secret"):
        loader.recipe_of(FinetuneRecipe, leaking)


@pytest.mark.parametrize(
    "part", ["x", "eyJ-", "://a:", "sk-", "a=", '"a": ', "?token", "-----BEGIN PRIVATE KEY-----", "hf_"]
)
def test_a_long_text_is_searched_in_little_time(part: str) -> None:
    start = time.process_time()
    hidden(part * (200_000 // len(part)))
    assert time.process_time() - start < 2
