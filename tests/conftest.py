"""What every test run needs (no network, quiet Ray, a cache folder of its own), and fixtures of several files."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Ecotone, Said

pytest.register_assert_rewrite("ecotone.testing.trackers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as there are cores: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# In the background of a shell Ctrl-C is ignored, here and in what is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Preparation steps are shared by the tests of one session and leave nothing behind.
_cache = tempfile.TemporaryDirectory(prefix="ecotone-tests-")
os.environ["ECOTONE_CACHE"] = _cache.name
# So are credentials that runs of tests keep, and the key that marks records as this user's own.
os.environ["ECOTONE_CONFIG"] = f"{_cache.name}/config"
os.environ["ECOTONE_KEY_FILE"] = f"{_cache.name}/config/key"


# Of these large grids of cases `make test` runs one in so many, spread evenly; `make test-all` runs all.
THINNED = {
    "TestEveryOperator": 24,
    "test_agrees_with_a_naive_float64_reference": 16,
    "test_bits_do_not_depend_on_company_threads_chunks_or_stacking": 16,
    "test_a_merge_of_adapters_is_that_of_the_full_checkpoints": 3,
    "test_coarse_gram_agrees_with_direct_products": 5,
    "test_bits_do_not_depend_on_the_placement": 5,
    "test_gradients_are_those_of_autograd_through_the_merge": 4,
    "test_restored_from_its_state_it_goes_on_with_the_same_trials": 3,
    "test_stopped_and_resumed_it_is_the_same_search": 3,
    "test_crashed_anywhere_and_resumed_it_is_the_same_search": 3,
    "test_however_it_is_disturbed_it_is_the_same_search": 3,
    "test_scores_are_those_of_simple_evaluate": 2,
    "test_settings_mean_what_they_mean_to_simple_evaluate": 3,
    "test_answers_in_bfloat16_are_the_same_bits": 3,
    "test_scores_do_not_depend_on_what_was_scored_before": 3,
    "test_hugging_face_models_are_like_any_other": 2,
    "test_the_predicted_front_is_a_dense_grids": 2,
    "test_learning_beats_chance": 2,
    "test_killed_and_resumed_it_is_the_same_search": 3,
    "test_every_algorithm_may_follow_another": 2,
    "test_the_front_of_zdt1_is_found": 2,
    "test_batches_are_one_by_one_and_transformers_own": 2,
    "test_agrees_with_the_paper_on_whole_vectors": 3,
    "test_it_finds_the_front_of_quadratics": 2,
    "test_the_predicted_front_of_two_objectives_is_the_exact_one": 3,
    "test_the_digits_recipe": 3,
    "test_a_killed_mirror_is_made_good": 2,
    "test_architectures_that_cannot_are_computed_plainly": 2,
    "test_large_models_get_the_bits_of_small_ones": 6,
    "test_what_the_worker_refuses_is_raised_by_start": 2,
    "test_results_and_space_outlive_the_pool": 2,
    "test_exports_load_to_what_was_scored": 3,
    "test_windows_are_those_of_the_definition": 3,
    "test_parts_have_no_item_in_common_and_make_up_all": 2,
    "test_equals_the_loss_of_transformers": 3,
    "test_logits_are_made_in_chunks_after_the_hidden_states": 2,
    "test_reuse_says_the_same_in_float32": 3,
    "test_reuse_equals_plain_in_float64": 5,
    "test_merges_are_cut_before_they_are_scored": 3,
    "test_a_run_s_member_is_served_and_verified": 2,
    "test_the_page_draws_any_number_of_objectives": 2,
    "test_an_objective_that_fails_for_some_candidates_does_not": 2,
    "test_scores_that_the_search_cannot_use_cost_nothing": 3,
    "test_killed_anywhere_and_resumed_it_has_the_same_coefficients_to_the_last_bit": 2,
    "test_models_are_computed_with_the_chosen_config": 2,
}

# Variants of searches that take long: `make test` runs others of their algorithm, and others of their kind of variant.
COSTLY = {
    *("bayesian_map-settings", "bayesian_map-bins", "map-settings", "optuna-tpe-settings"),
    *("bayesian_map-components", "map-components", "optuna-components"),
    *(f"optuna-{sampler}" for sampler in ("cma_es", "nsga2", "nsga3", "random", "qmc")),
}


# Tests of seconds each, whose subjects faster tests look at as well.
SECONDS = {
    *("test_killed_workers_change_nothing", "test_another_process_says_the_same"),
    *("test_a_score_that_was_cut_short_by_the_order_to_stop_is_not_taken", "test_models_that_mix_types"),
    *("test_compiled_loops_give_the_same_bits", "test_how_asks_are_grouped_does_not_matter"),
    *("test_a_script_names_its_own_functions_by_its_file", "test_adamerging_on_a_tiny_encoder"),
    *("test_a_flaw_is_seen", "test_a_resumed_run_runs_again_and_ends_like_an_uninterrupted_one"),
    *("test_losses_and_scores_in_different_units", "test_random_layouts", "test_two_drivers_of_one_run"),
    *("test_what_is_finished_is_returned_before_the_pool_fails", "test_waiting_ends_when_the_server_is_down"),
    *("test_a_worker_that_does_not_find_what_the_search_has_names_node_and_path", "test_a_killed_mirror_is_made_good"),
    *("test_merges_stay_in_the_box", "test_the_closest_are_merged_first", "test_the_report_grows_with_the_tree"),
    *("test_one_expert_and_the_same_expert_twice", "test_boxes_are_where_pytorch_moves_the_numbers"),
    *("test_the_recipe_and_its_settings_import_neither_lm_eval_nor_transformers",),
}


def thin(items: list[pytest.Item]) -> None:
    """Make all but every so many cases of the large grids slow, and all of costly variants and of ``SECONDS``."""
    seen = dict.fromkeys(THINNED, 0)
    for item in items:
        case = getattr(item, "callspec", None)
        if getattr(item, "originalname", "") in SECONDS:
            item.add_marker(pytest.mark.slow)
        if case is not None and not COSTLY.isdisjoint(v for v in case.params.values() if isinstance(v, str)):
            item.add_marker(pytest.mark.slow)
        for name in THINNED.keys() & {getattr(item, "originalname", ""), getattr(item.parent, "name", "")}:
            if seen[name] % THINNED[name]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests take minutes on an idle machine; a busy one gets the time it needs."""
    thin(items)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests() -> Iterator[None]:
    """A test knows no credentials of the tests before it."""
    from ecotone.populations import credentials, secrets

    yield
    if secrets.remembered():
        secrets.forget()
        credentials.file().unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _handlers_of_signals() -> Iterator[None]:
    """A test finds the handlers that the first one found: tests of Ctrl-C need Python's own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def ecotone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ecotone]:
    """The console script in this process; signals and the Python path stay as they were."""
    from ecotone.experiments import cli

    before, path = signal.getsignal(signal.SIGTERM), list(sys.path)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["ecotone", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Said(int(ended.value.code or 0), out, err)

    yield call
    signal.signal(signal.SIGTERM, before)
    sys.path[:] = path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making one takes seconds, so tests copy it."""
    from ecotone.experiments.tracking.mlflow.store import default_uri, opened

    directory = tmp_path_factory.mktemp("store")
    opened(default_uri(directory))
    return directory / "mlflow.db"


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch's number of threads, which workers set for the whole process, stays as it was."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- Hugging Face models -------------------------------------------------------------------------------------

DROPPED = 0.4  # in training only, which nothing here does
SMALL = {"vocab_size": 32, "max_position_embeddings": 12}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def bert(transformers: Any) -> Any:
    config = transformers.BertConfig(**SMALL, **LAYERS, hidden_dropout_prob=DROPPED, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        **SMALL, **LAYERS, num_key_value_heads=1, tie_word_embeddings=True, attention_dropout=DROPPED
    )
    return transformers.LlamaForCausalLM(config)


def bart(transformers: Any) -> Any:
    config = transformers.BartConfig(
        **SMALL, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=DROPPED,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


MAKERS = {"bert": bert, "llama": llama, "bart": bart}


@pytest.fixture(scope="session", params=MAKERS)
def hugging_face(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two experts as directories, in float64."""
    import torch

    transformers = pytest.importorskip("transformers")
    paths = [tmp_path_factory.mktemp(request.param) for _ in range(3)]
    with torch.random.fork_rng():
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            MAKERS[request.param](transformers).double().save_pretrained(path)
    return paths
