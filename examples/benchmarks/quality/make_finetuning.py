"""Fine-tuning data for the quality benchmark: JSON lines in the formats of mlx-lm, as token ids.

    python examples/benchmarks/quality/make_finetuning.py .gpu/q ../shared/data/{wikisql,shakespeare,rasbt}
    python ... --tokenizer /tmp/SmolLM2-135M-Instruct/tokenizer.json --prefix smollm2_

Every example is its text, or prompt and completion on lines of their own, and ends with ``<|endoftext|>``; the loss is
over all of it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that make_text.py wrote")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with train.jsonl and valid.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: that of make_text.py")
    parser.add_argument("--prefix", default="", help="of the names of the files")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer or args.out / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    for folder in args.folders:
        for part in ("train", "valid"):
            ids = []
            for line in (folder / f"{part}.jsonl").read_text().splitlines():
                example = json.loads(line)
                text = example.get("text") or f"{example['prompt']}\n{example['completion']}"
                ids += [*tokenizer.encode(text, add_special_tokens=False).ids, end]
            np.array(ids, np.uint16).tofile(args.out / f"{args.prefix}{folder.name}_{part}.u16")
            print(f"{args.prefix}{folder.name} {part}: {len(ids):,} tokens")


if __name__ == "__main__":
    main()
