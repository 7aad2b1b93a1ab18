"""A pytest plugin that gives PEFT's tests S2FT as the one method that they are parametrised over (see `run.py`).

PEFT parametrises by lists in its test modules; each list gets S2FT's cases in place of its own. Some helpers skip every
method but named ones; they run S2FT under one of those names, in a copy of the function with other globals.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest

import s2ft
from s2ft import S2FTConfig

FIXED = {"seed": 0}  # tests that inject twice without a file expect the same channels
THIRD = {"ratios": 0.3, **FIXED}


class S2FTThirdConfig(S2FTConfig):
    """For tests that give nothing but `target_modules` on a toy model, where the default budget rounds to no channel."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**THIRD, **options})


def custom(name: str, model: str, targets: Any, **options: Any) -> tuple[str, str, type, dict[str, Any]]:
    return name, model, S2FTConfig, {"target_modules": targets, **THIRD, **options}


CUSTOM_MODELS = [
    custom("Vanilla MLP 1 S2FT", "MLP", "lin0"),
    custom("Vanilla MLP 2 S2FT", "MLP", ["lin0"]),
    custom("Vanilla MLP 3 S2FT", "MLP", ["lin1"]),
    custom("Vanilla MLP 4 S2FT", "MLP", ["lin0", "lin1"]),
    custom("Vanilla MLP 5 S2FT", "MLP", ["lin0"], modules_to_save=["lin1"]),
    custom("Vanilla MLP 6 S2FT", "MLP", ["lin0"], strategy="weight", subset="smallest"),
    custom("Vanilla MLP 7 S2FT", "MLP", ["lin0", "lin1"], exclude_modules=["lin1"], allocation="global"),
    custom("MLP LayerNorm S2FT", "MLP_LayerNorm", ["lin0", "lin1"]),
    custom("MLP 2 S2FT", "MLP2", ["lin0"]),
    custom("Embedding + transformers Conv1D 1 S2FT", "EmbConv1D", ["conv1d"]),
    custom("Embedding + transformers Conv1D 2 S2FT", "EmbConv1D", ["conv1d", "lin0"]),
    custom("Embedding + transformers Conv1D 3 S2FT", "EmbConv1D", ["conv1d"], trainable_token_indices={"emb": [0, 10]}),
    custom("Embedding + transformers Conv1D 4 S2FT", "EmbConv1D", ["lin0"], modules_to_save=["emb"]),
    custom("Conv2d S2FT", "Conv2d", ["lin0"]),
    custom("MHA S2FT", "MHA", ["lin0"]),
]


def pair(name: str, first: Any, second: Any) -> tuple[str, str, type, dict[str, Any], dict[str, Any]]:
    return (
        name,
        "s2ft",
        S2FTConfig,
        {**THIRD, "init_weights": False, **first},
        {**THIRD, "init_weights": False, **second},
    )


TWO_ACTIVE = [
    pair("S2FT Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    pair("S2FT Other channels", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "seed": 1}),
    pair("S2FT Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
]


def config(**options: Any) -> S2FTConfig:
    return S2FTConfig(**{**THIRD, "init_weights": False, "target_modules": ["lin0"], **options})


MIXED = [("S2FT mixed adapter", config(), config(seed=1))]
MIXED_OTHER_LAYERS = [("S2FT mixed adapter with different target layers", config(), config(target_modules=["lin1"]))]
MIXED_OVERLAP = [("S2FT mixed adapter with overlapping layers", config(), config(target_modules=["lin0", "lin1"]))]
MIXED_SAVED = [
    ("S2FT mixed adapter with modules to save", config(modules_to_save=["lin1"]), config(modules_to_save=["lin1"]))
]
MIXED_UNSUPPORTED = [("S2FT mixed adapter with GRU", config(modules_to_save=["gru"]), config(modules_to_save=["gru"]))]

ROWS = {"ratios": {"q_proj": 0.5, "v_proj": 0.5, "up_proj": 0.3}}


def decoder(**options: Any) -> tuple[type, dict[str, Any]]:
    return S2FTConfig, {"task_type": "CAUSAL_LM", "target_modules": None, **options}


DECODERS = [decoder(ratios=0.5, strategy="random"), decoder(**ROWS, strategy="weight")]
Q_AND_V = ["q", "v", "q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "in_proj"]


def with_q_and_v(task: str) -> list[tuple[type, dict[str, Any]]]:
    return [(S2FTConfig, {"task_type": task, "target_modules": Q_AND_V, "ratios": 0.5, "strategy": "random"})]


REPLACED: dict[str, dict[str, list[Any]]] = {  # module → name of a list of cases → ours
    "test_config": {"ALL_CONFIG_CLASSES": [(S2FTConfig, {})], "LAYER_INDEXING_CONFIG_CLASSES": [(S2FTConfig, {})]},
    "test_custom_models": {
        "TEST_CASES": CUSTOM_MODELS,
        "ALL_PEFT_CONFIG_CLASSES": [S2FTConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": TWO_ACTIVE,
        "MIXED_ADAPTER_TEST_CASES": MIXED,
    },
    "test_decoder_models": {"ALL_CONFIGS": DECODERS},
    "test_encoder_decoder_models": {"ALL_CONFIGS": with_q_and_v("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": with_q_and_v("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": with_q_and_v("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": with_q_and_v("TOKEN_CLS"),
        "QA_CONFIGS": with_q_and_v("QUESTION_ANS"),
    },
}
REPLACED_IN_TEST: dict[str, dict[str, list[Any]]] = {  # module → test with a list of its own → ours
    "test_custom_models": {
        "test_multiple_adapters_mixed_modules_to_save": [S2FTThirdConfig],
        "test_multiple_adapters_mixed_modules_to_save_order_switched": [S2FTThirdConfig],
        "test_adapter_name_makes_no_difference": [pytest.param(config(), id="S2FT")],
        "test_mixed_adapter_batches_different_target_layers": MIXED_OTHER_LAYERS,
        "test_mixed_adapter_batches_multiple_modules_to_save": MIXED_SAVED,
        "test_mixed_adapter_batches_partly_overlapping_target_layers": MIXED_OVERLAP,
        "test_mixed_adapter_batches_unsupported_layer_raises": MIXED_UNSUPPORTED,
        "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [
            ("S2FT mixed batch wrong adapter name", config())
        ],
        "test_default_target_modules_not_set_raises": [S2FTConfig],
        "test_default_target_modules_not_set_model_type_set_raises": [S2FTConfig],
    },
    "test_low_level_api": {
        "test_inject_from_state_dict_and_from_config_target_same_layers": [
            pytest.param(S2FTConfig(target_modules="all-linear", **THIRD), id="S2FT")
        ]
    },
    "test_other": {"test_self_targeting_is_ignored": [(S2FTThirdConfig, {"target_modules": "l1.*"})]},
}
COMPILED = {
    "S2FT": S2FTConfig(task_type="CAUSAL_LM", ratios=0.5, seed=0),
    "S2FT-rows": S2FTConfig(task_type="CAUSAL_LM", **ROWS, seed=0),
}
AS_IF = {  # test or helper that runs named methods only → the name S2FT goes by in it
    "_test_mixed_adapter_batches": "RoadConfig",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "LoraConfig",
    "test_mixed_adapter_batches": "LoraConfig",
    "test_generate_with_mixed_adapter_batches": "LoraConfig",
}

OTHER_BASE = (
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
)
NOT_APPLICABLE = {  # test → part of its id, reason
    "test_from_pretrained_cache_dir": ("", "downloads into an empty cache, which needs the network"),
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        part, reason = NOT_APPLICABLE.get(item.originalname, ("", None))
        if reason and part in item.name:
            item.add_marker(pytest.mark.skip(reason=f"not applicable to S2FT: {reason}"))


def pytest_configure() -> None:
    sys.modules.setdefault(
        "diffusers", types.SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    )  # type: ignore[arg-type]
    common, utils = import_module("tests.testing_common"), import_module("tests.testing_utils")
    utils._HUB_MODEL_ACCESSES = Always()
    utils.load_dataset = quotes
    common.LoHaConfig = S2FTConfig  # one of the methods that run on GPT-2's Conv1D
    decoders = import_module("tests.test_decoder_models")
    decoders.check_beft_config = lambda *_: None  # made for BEFT, it skips every method
    for holder in (common.PeftCommonTester, decoders.TestDecoderModels):
        for name in AS_IF.keys() & vars(holder).keys():
            setattr(holder, name, with_globals(vars(holder)[name], {AS_IF[name]: S2FTConfig}))
    for name in {*REPLACED, *REPLACED_IN_TEST}:
        replace_cases(import_module(f"tests.{name}"), REPLACED.get(name, {}), REPLACED_IN_TEST.get(name, {}))
    settings = import_module("tests.test_torch_compile").SETTINGS
    settings.clear()
    settings.update({name: (chosen, {}) for name, chosen in COMPILED.items()})


class Always(dict):  # type: ignore[type-arg]
    """PEFT's record of the models that were fetched before: all of them, so that none is looked for on the Hub."""

    def __contains__(self, _: object) -> bool:
        return True

    def __missing__(self, _: object) -> int:
        return 1


def quotes(_: str) -> Any:
    """Stands in for the data set of quotes that PEFT trains on."""
    from datasets import Dataset, DatasetDict

    rows = [
        {"quote": f"To be {word}, that is the question.", "author": "", "tags": []} for word in "abcdefghijklmnopqrst"
    ]
    return DatasetDict(train=Dataset.from_list(rows))


@pytest.fixture(autouse=True)
def _on_any_base(request: pytest.FixtureRequest) -> Iterator[None]:
    """Some tests load an adapter onto a base with other random weights, which S2FT refuses by default."""
    with s2ft.any_base() if request.node.originalname in OTHER_BASE else nullcontext():
        yield


def with_globals(function: Any, names: dict[str, Any]) -> Any:
    changed = types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
    changed.__defaults__ = function.__defaults__
    vars(changed).update(vars(function))
    return changed


def replace_cases(module: types.ModuleType, lists: dict[str, list[Any]], tests: dict[str, list[Any]]) -> None:
    """Rewrites the parametrize marks of `module` that refer to one of `lists`, or belong to one of `tests`."""
    ours = {id(getattr(module, name)): cases for name, cases in lists.items()}
    for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
        for name, test in list(vars(holder).items()):
            if hasattr(test, "pytestmark") and isinstance(test, types.FunctionType):
                test.pytestmark = [replaced(mark, ours, tests.get(name)) for mark in test.pytestmark]


def replaced(mark: pytest.Mark, ours: dict[int, list[Any]], own: list[Any] | None) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    cases = ours.get(id(mark.args[1]), own if "config" in mark.args[0] else None)
    return mark if cases is None else pytest.Mark("parametrize", (mark.args[0], cases), {}, _ispytest=True)
