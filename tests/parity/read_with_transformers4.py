"""Run by the OpenCompass environment's python: `REQUEST.json OUT FOLDER...`, where each FOLDER is read by its transformers 4.

OUT/0.npz and so on get the fp32 logits of the request's token ids, and the token ids of its text and of its messages.
"""

from __future__ import annotations

import json
import sys

import numpy
import torch
import transformers


def main(request_file: str, out: str, *folders: str) -> None:
    assert transformers.__version__.startswith("4.")
    with open(request_file, encoding="utf-8") as handle:
        request = json.load(handle)
    for index, folder in enumerate(folders):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=request["dtype"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model(torch.tensor([request["ids"]])).logits.float().numpy()
        chat = tokenizer.apply_chat_template(request["messages"], tokenize=True, add_generation_prompt=True)
        inputs = tokenizer(request["text"])
        assert set(inputs) == {"input_ids", "attention_mask"}
        numpy.savez(f"{out}/{index}.npz", logits=logits, text=inputs["input_ids"], chat=chat)


if __name__ == "__main__":
    main(*sys.argv[1:])
