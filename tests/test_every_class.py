"""Names of every model type that transformers has: its own checkpoints fit into its own module."""

import pytest
from every_class import CannotBeMadeError, classes, fit

SOME = ("llama", "gpt_neox", "qwen3_moe", "deepseek_v3", "qwen2_5_vl", "gemma3", "vit", "whisper")
CASES = [pytest.param(key, id=key, marks=() if key in SOME else pytest.mark.slow) for key in classes()]


@pytest.mark.parametrize("key", CASES)
def test_its_checkpoints_fit_into_its_module(key):
    try:
        names, saved = fit(classes()[key])
    except CannotBeMadeError as error:
        if key in SOME:
            raise
        pytest.skip(str(error))
    assert not names.unused
    assert {*names.places, *names.scattered} == saved
