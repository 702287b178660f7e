"""Hugging Face's libraries on CPU, in their own process: importing them takes seconds and memory.

`python tests/support/hf_process.py FOLDER IN.json OUT.json`: what transformers makes of the texts
and messages with the folder's tokenizer and chat template, its generation settings, and the logits
of rwkv7-hf for the ids, if there are any.
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")

import torch
import transformers


def _logits(folder: str, ids: list) -> list:
    """Computes the logits of rwkv7-hf's model, all of whose weights come from the folder."""
    from rwkv7_hf import RWKV7ForCausalLM

    model, info = RWKV7ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = [list(names) for names in info.values() if names]
    if problems:
        raise ValueError(f"weights that do not fit: {problems}")
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.tolist()


def main(folder: str, inputs: str, outputs: str) -> None:
    """Asks everything and writes the answers."""
    with open(inputs, encoding="utf-8") as file:
        questions = json.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = {
        "is_fast": tokenizer.is_fast,
        "end": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "ids": tokenizer(questions["texts"])["input_ids"],
        "texts": [tokenizer.decode(ids) for ids in questions["tokens"]],
        "chat": tokenizer.apply_chat_template(
            questions["messages"], tokenize=False, add_generation_prompt=True
        ),
        "told": tokenizer.apply_chat_template(questions["messages"], tokenize=False),
        "generation": transformers.GenerationConfig.from_pretrained(folder).to_dict(),
    }
    if questions["logits_of"]:
        answers["logits"] = _logits(folder, questions["logits_of"])
    with open(outputs, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
