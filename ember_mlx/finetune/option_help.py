"""What ``ember-mlx train --help`` says: each option's group, metavar and text. Defaults are appended by the parser.

mlx-lm's own texts are replaced, since what they say is not all true here.
"""

from ember_mlx.finetune.optimizer_names import FLOORED_TABLE_RATE, LORA_RATES, RATES, ROW_FLOOR, TABLE_RATE
from ember_mlx.shared.command_line import Help

__all__ = ["EPILOG", "HELP", "USAGE"]

USAGE = "ember-mlx train --model MODEL --data DATA [options]"
EPILOG = """\
examples:
  ember-mlx train --model Qwen/Qwen3-0.6B --data my_data --iters 600
      LoRA in the last 16 layers, and both token tables with Ember
  ember-mlx train --model Qwen/Qwen3-0.6B --data my_data --grad-checkpoint --chunked-loss
      the same in less memory; `ember-mlx plan` with the same flags says how much
  ember-mlx train --model Qwen/Qwen3-0.6B --data my_data --iters 600 --resume
      resume the first run where it stopped"""

HELP: Help = {
    "what to train on": {
        "model": ("MODEL", "A model folder, or a name on the Hugging Face hub."),
        "data": (
            "DATA",
            "A folder with train.jsonl, and valid.jsonl and test.jsonl if there are any; or one file. Files may be "
            ".jsonl, .json, .csv or .parquet. Or a data set of the Hugging Face hub. That and .parquet need "
            "`pip install 'mlx-lm[train]'`. `ember-mlx data` shows what will be trained. Required by train.",
        ),
        "prompt_feature": (
            "KEY",
            "Key of the prompts. Alpaca's keys (instruction, input, output) and ShareGPT's (conversations) need no "
            "flag. Default: prompt.",
        ),
        "completion_feature": ("KEY", "Key of the completions. Default: completion."),
        "chat_feature": ("KEY", "Key of the messages of a chat. Default: messages."),
        "text_feature": ("KEY", "Key of text that is learned as a whole. Default: text."),
        "valid_fraction": (
            "PART",
            "Without validation rows, split this part off the training rows, by --seed; 0 for none. Default: 0.05, or "
            "0 with --train-tables none, as in mlx-lm.",
        ),
        "mask_prompt": (
            None,
            "Learn what the assistant writes alone, in all turns: completions, answers and tool calls. With "
            "--train-tables none the last turn alone, as in mlx-lm.",
        ),
        "packing": (
            None,
            "Put whole rows side by side, up to --max-seq-length. Attention stays within a row. A batch then has more "
            "rows, and little padding.",
        ),
        "max_seq_length": ("TOKENS", "Cut rows to this many tokens."),
        "batch_size": ("ROWS", "Rows in a batch."),
        "iters": ("N", "Batches to train on."),
        "epochs": (
            "N",
            "Passes over the training rows, instead of --iters; 0.5 is half of them. Default: as --iters says.",
        ),
        "seed": ("N", "Seed of all random numbers."),
        "add_tokens": (
            "FILE",
            "Add tokens to the tokenizer and the tables: a text with one a line, or a .json list of special tokens. "
            "Each starts at the mean of the tokens that it was split into. Default: none.",
        ),
        "test": (None, "Evaluate on test.jsonl after training; without --train, the adapter as it is."),
        "test_batches": ("N", "Batches of the test; -1 for all."),
        "train": (None, "Train. Default: on, unless --test is given alone."),
        "config": ("FILE", "Take options from a YAML file, as mlx_lm.lora does. Flags win over it. Default: none."),
        "trust_remote_code": (None, "Run code that comes with the model or its tokenizer."),
    },
    "what trains": {
        "fine_tune_type": (None, "Adapters in the layers (lora, dora), or all weights (full)."),
        "quantize": (
            None,
            "Quantize the layers to so many bits when they are loaded, and train adapters on them (QLoRA). The tables "
            "stay in 16 bits. Not for full. Default: as the model is.",
        ),
        "num_layers": (
            "N",
            "Train the last N layers; -1 for all, 0 for none (the tables alone). Default: 16 or as many as there are; "
            "all with full and tables.",
        ),
        "optimizer": (
            None,
            "Optimizer of all that is no token table. Ours keep less state: adam-mini 4 bytes a weight, flash-adamw "
            "(adamw_8bit) 2.25, flash-lion 1.13, sinkgd none. Their options go under the YAML key optimizer_config, "
            "such as `adam-mini: {momentum: int8}` for 1.13 bytes. Of ours each has its own default of "
            "--learning-rate; adafactor sets its rate itself, unless relative_step is false. sage is a "
            "--table-optimizer.",
        ),
        "learning_rate": (
            "RATE",
            "Learning rate of all that is no token table. The YAML key lr_schedule replaces it. Not given, it is "
            f"{', '.join(f'{LORA_RATES[name]:g} with {name} (full: {rate:g})' for name, rate in RATES.items())}.",
        ),
        "warmup": (
            "N",
            "Let all learning rates rise from 0 over this share of the run, such as 0.03, or, from 1 on, over so many "
            "updates. A schedule's own key warmup takes a share too. Default: none.",
        ),
        "patience": (
            "N",
            "End the run after N validations without a lower loss, as if it had finished. Default: off.",
        ),
        "grad_accumulation_steps": ("N", "Batches whose gradients are averaged for one update."),
        "clip_grad_norm": ("NORM", "Clip the global gradient norm, tables included, to NORM. Default: off."),
        "clip_layer_norm": (
            "NORM",
            "With --stream: clip the norm of each layer's gradients to NORM, tables aside. Another rule than "
            "--clip-grad-norm, and free. Default: off.",
        ),
        "body_rounding": (
            None,
            "Rounding of the 16-bit weights that are no table. Stochastic keeps, on average, steps that are too small "
            "for them: at usual rates most are. Default: stochastic for full with tables, else nearest.",
        ),
        "bias_correction": (
            None,
            "Correct the bias of adam and adamw, as PyTorch does: the first steps are 3 to 6.5 times shorter. Not of "
            "the tables. Default: off, as mlx_lm.lora has it.",
        ),
        "on_nonfinite": (
            None,
            "At a NaN or an infinity in the loss, a gradient or a new weight: stop the run, or skip that step. Neither "
            "the weights nor the optimizer's state change.",
        ),
    },
    "token tables": {
        "train_tables": (None, "Token tables to train; auto: all that the model has."),
        "table_optimizer": (
            None,
            "Optimizer of the tables. All but ember are for comparison; sage is meant for --optimizer sinkgd.",
        ),
        "table_learning_rate": (
            "RATE",
            "Learning rate of the tables. With an lr_schedule in the YAML file it is that schedule's peak, unless a "
            f"table_lr_schedule is given too. Default: {FLOORED_TABLE_RATE:g}, without a row floor {TABLE_RATE:g}.",
        ),
        "table_weight_decay": ("DECAY", "Decoupled weight decay of the tables."),
        "table_beta2": ("BETA2", "Decay of the second moment; ember and adamw. Default: 0.999."),
        "table_beta2_decay": (
            "DECAY",
            "Let beta2 grow as 1 - step^-DECAY up to --table-beta2; DECAY is at most 1, Adafactor's is 0.8. ember "
            "only. Default: beta2 is constant.",
        ),
        "table_row_clip": (
            "CLIP",
            "Limit each row's step to CLIP learning rates (RMS). Without it, a token first seen late can jump by up to "
            "31. ember only. Default: no limit.",
        ),
        "table_row_floor": (
            "FLOOR",
            "Rows with gradients below FLOOR times the table's RMS take proportionally smaller steps. An average row "
            "steps at a FLOOR-th of the rate, a token that your data never uses hardly. A higher FLOOR wants a higher "
            "--table-learning-rate. 0 turns it off. ember only. "
            f"Default: {ROW_FLOOR:g}.",
        ),
        "table_rounding": (
            None,
            "Rounding of 16-bit tables. Stochastic keeps, on average, steps that are too small for them. Nearest takes "
            "less memory where the tables' step is the peak. ember only. Default: stochastic with ember, else nearest.",
        ),
        "dequantize_tables": (
            None,
            "Obsolete, and does nothing: quantized tables that train are dequantized. --train-tables none leaves them.",
        ),
    },
    "memory": {
        "auto_savings": (
            None,
            "Where a run is planned not to fit, switch on --grad-checkpoint, --chunked-loss or --stream, and say so. "
            "What costs the least time comes first, and what you give stays. Not with several workers, nor with "
            "--train-tables none.",
        ),
        "grad_checkpoint": (None, "Recompute each layer in the backward pass: less memory, more time."),
        "stream": (
            None,
            "Step every weight that trains inside the backward pass, with lora too. A run then takes little more "
            "memory than the weights and the optimizer's state. Default: on for full with tables, but with several "
            "workers, with --clip-grad-norm, and where it cannot be, which train says.",
        ),
        "keep_inputs": (
            "K",
            "With --stream: keep the input of every K-th layer and make the others again. Saves memory with long "
            "sequences, and takes a forward pass more. Default: 1, all are kept.",
        ),
        "chunked_loss": (None, "Compute the same loss without ever holding all logits: far less memory."),
        "memory_limit": (
            "SIZE",
            "End the run, with what it has saved, when MLX takes more memory than SIZE, such as 12GB; none: never. "
            "Default: what Metal recommends, elsewhere 0.9 of the GPU's or the machine's memory.",
        ),
        "clear_cache_threshold": (
            "SIZE",
            "Clear MLX's cache after each step that leaves more than SIZE, such as 2GB. Default: 0, but on CUDA, which "
            "is slow to give it back, 0.45 of the GPU's memory.",
        ),
    },
    "several workers, by mlx.launch": {
        "shard_optimizer": (
            None,
            "With --stream: each keeps a part of the optimizer's state of all but the tables. For adamw, adam and sgd, "
            "over JACCL or NCCL.",
        ),
        "shard_tables": (
            None,
            "Each keeps a part of the rows of the token tables, with their gradients, and sends activations instead. "
            "Far less is sent, and less memory taken.",
        ),
        "peer_timeout": (
            "SECONDS",
            "End the run when no step ends for SECONDS, since another worker is lost. Slow steps get more.",
        ),
    },
    "saving and resuming": {
        "adapter_path": ("FOLDER", "Where the adapter and the checkpoints are saved."),
        "overwrite": (None, "Replace the run that --adapter-path holds."),
        "save_every": ("N", "Save the adapter and a checkpoint every N batches."),
        "keep_checkpoints": (
            "N",
            "Keep the newest N checkpoints and N numbered saves; 0 writes none. One is written every --save-every "
            "batches, at the end, and when Ctrl-C, SIGTERM or SIGHUP (a closed terminal) stops the run. Default: 1 "
            "checkpoint where tables train, else 3, and all numbered saves.",
        ),
        "keep_best": (
            None,
            "Keep the weights of the lowest validation loss in best/, an adapter of its own. Default: on where tables "
            "train and validation rows exist.",
        ),
        "resume": (
            "FOLDER",
            "Resume exactly where a run stopped: from the newest intact checkpoint in --adapter-path, or from FOLDER: "
            "a checkpoint or another adapter folder. Give the options of that run again; --iters may be more. Default: "
            "start anew.",
        ),
        "resume_with_changes": (None, "Resume although options, data or model have changed since the checkpoint."),
        "resume_adapter_file": ("FILE", "Start a new run from the weights of a finished adapter. Default: none."),
    },
    "reporting": {
        "steps_per_report": ("N", "Report the training loss every N batches."),
        "steps_per_eval": ("N", "Validate every N batches."),
        "val_batches": ("N", "Batches of a validation; -1 for all."),
        "sample_prompts": (
            "FILE",
            "Answer these prompts at each validation: a .txt with one a line, or a .jsonl with a prompt, messages or "
            "text a line. The answers are printed and logged, and change nothing of the run. Default: none.",
        ),
        "sample_tokens": ("N", "Tokens of such an answer, at most."),
        "log_jsonl": (
            "FILE",
            "Log losses, learning rates, speed, peak memory and the size of each step, one JSON object a report. "
            "`ember-mlx plot FILE` draws it; --resume appends to it. Default: none.",
        ),
        "report_to": ("SERVICES", "Report to wandb, swanlab, or both (wandb,swanlab). Default: none."),
        "project_name": ("NAME", "Project at those services. Default: the name of the working folder."),
    },
}  # fmt: skip
