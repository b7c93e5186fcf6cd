"""Train an HSPMN language model, or fine-tune a saved one, through `transformers.Trainer`.

    python train.py                                            # Python's own sources, a laptop CPU, under 5 minutes
    python train.py --dataset notes/ --dim 512 --layers 8      # local text, JSONL or Parquet files or folders
    python train.py --dataset some/name --streaming            # any dataset that `datasets` can load
    python train.py --model_name_or_path runs/hspmn --dataset notes/       # fine-tune
    accelerate launch --num_processes 8 train.py --batch 32 --seq_len 2048

The result is a folder of weights, tokenizer, code and model card that the Auto classes load anywhere. `--help` lists
every option: those of this file first, then those of `transformers.TrainingArguments`.
"""

import hashlib
import json
import logging
import math
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations import is_tensorboard_available, is_wandb_available
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import get_scheduler
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType, rotate_checkpoints
from transformers.training_args import OptimizerNames
from transformers.utils import is_torchao_available

if "hspmn" not in sys.modules:  # run as a script: this checkout is the package, whatever its folder is called
    sys.modules["hspmn"] = ModuleType("hspmn")
    sys.modules["hspmn"].__path__ = [str(Path(__file__).resolve().parent)]

from hspmn import runs
from hspmn.corpus import BATCH, batches, bigram_loss, collate, count_tokens, load_documents, pack
from hspmn.results import (
    PEAK_TFLOPS,
    ROOT,
    RefusedByWorker,
    check_name,
    config_with,
    loading,
    parse_overrides,
    refuse,
    refusing,
    write_json,
)
from hspmn.tokens import fit_tokenizer

Several = partial(HfArg, default_factory=list)
DEFAULT_STEPS = 600
DEFAULTS = {  # of the command line, where they are not those of `TrainingArguments`
    "output_dir": "runs/hspmn", "per_device_eval_batch_size": 16, "warmup_steps": 0.05, "weight_decay": 0.1,
    "adam_beta2": 0.95, "logging_steps": 20, "save_steps": 0.5, "save_total_limit": 2,
}  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "head_dim", "num_key_value_heads", "intermediate_size")
TOKENIZER_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")  # of a new model's configuration
LEAST = dict.fromkeys(SIZES, 1) | {  # flags, and the least that each may be
    "seq_len": 2, "vocab_size": 258, "validation_blocks": 1, "tokenizer_documents": 1, "baseline_tokens": 0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "num_train_epochs": 0, "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0,
    "label_smoothing_factor": 0, "neftune_noise_alpha": 0, "logging_steps": 0, "eval_steps": 0, "eval_delay": 0,
    "save_total_limit": 0, "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1, "torch_empty_cache_steps": 1,
    "eval_accumulation_steps": 1, "ddp_bucket_cap_mb": 1, "ddp_timeout": 1, "sample_tokens": 0,
}  # fmt: skip
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1, "seed": 2**32, "data_seed": 2**32}
BELOW |= {"dataloader_num_workers": 1025, "vocab_size": 2**24, "neftune_noise_alpha": 2**20}
OPEN = {"validation_fraction": (0, 1), "adam_epsilon": (0, math.inf), "save_steps": (0, math.inf)}
FLOAT8 = ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the products that --float8 is for
CHOICES = {
    "lr_scheduler_type": SchedulerType, "optim": OptimizerNames, "save_strategy": SaveStrategy, "debug": DebugOption,
    "eval_strategy": IntervalStrategy, "logging_strategy": IntervalStrategy, "hub_strategy": HubStrategy,
}  # fmt: skip
# Flags that leave what is trained as it is; a resumed run may change them
FREE = {
    "output_dir", "resume_from_checkpoint", "accept_changes", "validation_blocks", "baseline_tokens", "prompt",
    "sample_tokens", "wandb", "report_to", "run_name", "project", "disable_tqdm", "per_device_eval_batch_size",
    "prediction_loss_only", "skip_memory_metrics", "local_rank", "torch_empty_cache_steps", "push_to_hub",
    "dataset", "include_num_input_tokens_seen", "debug",
}  # fmt: skip
FREE_PREFIXES = (
    "eval_", "logging_", "log_", "save_", "hub_", "trackio_", "dataloader_p", "ddp_", "enable_", "do_",
    "torch_compile",
)  # fmt: skip


@dataclass
class ModelArguments:
    """The model: a new one, or a saved one to go on from."""

    _argument_group_name = "model"
    model_name_or_path: str | None = HfArg(default=None, help="saved HSPMN folder or hub name to fine-tune")
    hidden_size: int | None = HfArg(default=None, aliases="--dim", help="width of the residual stream (new: 128)")
    num_hidden_layers: int | None = HfArg(default=None, aliases="--layers", help="blocks (new: 4)")
    head_dim: int | None = HfArg(default=None, help="width of a head (new: 32, or 64 from hidden_size 512 on)")
    num_key_value_heads: int | None = HfArg(default=None, help="key/value heads (new: 2)")
    intermediate_size: int | None = HfArg(default=None, help="SwiGLU width (new: 8/3 hidden_size, rounded up)")
    sparsity_k: list[float] = Several(help="routed share, or one a layer (new: 0.2 on average, in every 4th and last)")
    config_overrides: list[str] = Several(help="other HSPMNConfig fields as key=value in JSON: sliding_window=64")


@dataclass
class DataArguments:
    """The text: what to read, how to cut it."""

    _argument_group_name = "data"
    dataset: list[str] = Several(
        help="files, folders (.txt/.md/.rst/.py, .jsonl/.json, .parquet) or a `datasets` name (default: Python's own)"
    )
    dataset_config: str | None = HfArg(default=None, help="configuration of a named dataset")
    train_split: str = HfArg(default="train", help="split of a named dataset to train on")
    validation_split: str | None = HfArg(default=None, help="split to validate on (default: held-out documents)")
    text_column: str = HfArg(default="text", help="column that holds the text")
    streaming: bool = HfArg(default=False, help="read while training instead of before it")
    validation_fraction: float = HfArg(default=0.05, help="share of the documents held out for it")
    validation_blocks: int = HfArg(default=256, help="blocks to validate on at most")
    seq_len: int = HfArg(default=256, help="tokens per block")
    isolate_documents: bool = HfArg(default=False, help="hide the documents packed before from each document")
    tokenizer_name: str | None = HfArg(default=None, help="saved tokenizer (default: the model's, or a new one)")
    vocab_size: int = HfArg(default=2048, help="tokens of a new tokenizer")
    tokenizer_documents: int = HfArg(default=10_000, help="documents that a new tokenizer is fitted on at most")
    baseline_tokens: int = HfArg(default=5_000_000, help="tokens that the bigram is fitted on at most; 0: no bigram")


@dataclass
class HSPMNTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a few short names and more options; the command line also has `DEFAULTS`."""

    _argument_group_name = "training"
    per_device_train_batch_size: int = HfArg(default=8, aliases="--batch", help="blocks per device and forward pass")
    gradient_accumulation_steps: int = HfArg(default=1, aliases="--grad_accum", help="forward passes per step")
    max_steps: int = HfArg(default=-1, aliases="--steps", help=f"training steps (-1: epochs, or {DEFAULT_STEPS})")
    num_train_epochs: float = HfArg(default=0.0, help="passes over the data, if --steps is not given")
    wandb: str | None = HfArg(default=None, help="report to Weights & Biases under this run name")
    full_precision: bool = HfArg(default=False, help="float32 on a GPU too (default there: bfloat16 autocast)")
    float8: bool = HfArg(default=False, help="products of blocks in float8, compiled; needs torchao, an Ada or newer")
    prompt: str = HfArg(default="def ", help="prompt of the sample generated at the end")
    sample_tokens: int = HfArg(default=64, help="tokens of that sample; 0: no sample")
    resume_from_checkpoint: str | None = HfArg(default=None, help="checkpoint folder to go on from, or last")
    accept_changes: bool = HfArg(default=False, help="resume although flags or data are not those of the checkpoint")
    learning_rate: float = HfArg(default=0.0, help="peak (0: 0.5 / hidden_size, or a tenth of that in fine-tuning)")
    lr_scheduler_type: str = HfArg(default="cosine", help="shape of the learning rate after the warm-up")
    save_strategy: str = HfArg(default="steps", help="no, steps or epoch")
    logging_nan_inf_filter: bool = HfArg(default=False, help="hide non-finite losses; costs a device sync per step")
    prediction_loss_only: bool = HfArg(default=True, help="keep only the loss in validation")

    def __post_init__(self):
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            self.max_steps = DEFAULT_STEPS
        if self.wandb is not None:
            self.report_to, self.run_name = "wandb", self.wandb
        if torch.cuda.is_available() and not (self.use_cpu or self.fp16 or self.full_precision):
            self.bf16 = torch.cuda.is_bf16_supported()
        self.torch_compile = self.torch_compile or self.float8  # casts of their own cost more than products gain
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        # One process drives one device: torch.nn.DataParallel would lose the bias updates of all devices but one
        self._n_gpu = min(self.n_gpu, 1)


def json_object(text):
    """An argparse type: a JSON object or the path of a file, kept as text."""
    if not (isinstance(json.loads(text), dict) if text.lstrip().startswith("{") else Path(text).is_file()):
        raise ValueError
    return text


def check_values(values, parser):
    """Refuse numbers that no training can use, and empty names."""
    for name, value in values.items():
        flag, number = f"--{name}", isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or value == parser.get_default(name):
            continue
        if "" in (value if isinstance(value, list) else [value]):
            refuse(f"{flag} is empty; give a value, or leave it out")
        if not number:
            continue
        least, below, (low, high) = LEAST.get(name), BELOW.get(name), OPEN.get(name, (-math.inf, math.inf))
        if name == "max_steps" and value < 1:
            refuse(f"{flag} must be at least 1, or -1 for epochs, got {value}")
        if name in OPEN and not low < value < high:
            refuse(f"{flag} must lie in ({low}, {high}), got {value}")
        if least is not None and not value >= least:
            refuse(f"{flag} must be at least {least}, got {value}")
        if below is not None and not (least or 0) <= value < below:
            refuse(f"{flag} must lie in [{least or 0}, {below}), got {value}")
        if not (abs(value) < 2**63 or (isinstance(value, float) and value < math.inf) or name == "max_grad_norm"):
            refuse(f"{flag} must be a number below 2**63, got {value}")


def check_plan(args, config):
    """Refuse, before any text is read, what would fail later: the sample, the metric, the optimizer, the schedule."""
    if args.sample_tokens and config.router_mode == "topk":
        refuse("--config_overrides router_mode=topk cannot generate the sample at the end; add --sample_tokens 0")
    metric = args.metric_for_best_model
    if args.save_strategy == "best" and (metric is None or args.eval_strategy == "no"):
        refuse("--save_strategy best needs a metric; add --metric_for_best_model loss and --eval_strategy steps")
    if metric is not None:
        known = ["loss", *(f"load/{layer}" for layer in range(config.num_hidden_layers))]
        check_name("--metric_for_best_model", metric.removeprefix("eval_"), known)
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        refuse("--dataloader_persistent_workers needs workers; add --dataloader_num_workers 2")
    if args.label_names not in (None, ["labels"]):
        refuse(f"--label_names {' '.join(args.label_names)} cannot work: the labels are named labels; leave it out")
    faults = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
    steps = args.max_steps if args.max_steps > 0 else 100
    flags = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
        optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)
        flags = f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        warmup = args.get_warmup_steps(steps)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
        for step in (1, steps // 2, steps):
            for rate in getattr(schedule, "lr_lambdas", ()):
                if not math.isfinite(rate(step)):
                    raise ValueError(f"the learning rate of step {step} is not finite")
    except faults as error:
        refuse(f"{flags} cannot work: {error}")
    if args.float8:
        check_float8(args)
    if args.torch_compile:
        check_name("--torch_compile_backend", args.torch_compile_backend, torch.compiler.list_backends(()))
        with refusing(RuntimeError):
            torch.compile(check_plan, backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def check_float8(args):
    """Refuse --float8 where it cannot run, or could only run beside a dtype that was asked for."""
    if not is_torchao_available("0.18"):
        refuse("--float8 needs torchao 0.18 or newer; pip install torchao")
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    if args.device.type != "cuda" or torch.cuda.get_device_capability(args.device) < (8, 9):
        refuse(f"--float8 needs an NVIDIA GPU of compute capability 8.9 or more, got {device}; leave it out")
    if not args.bf16:
        refuse(f"--float8 contradicts --{'fp16' if args.fp16 else 'full_precision'}; leave one of them out")


def use_float8(model):
    """Let torchao make the products of blocks in float8, forward and backward, with one scale per tensor. Weights stay
    what they are, and so does what is saved. Layers with a side that tensor cores do not take are left alone."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = {
        name for name, module in model.named_modules()
        if name.rpartition(".")[2] in FLOAT8 and not any(side % 16 for side in module.weight.shape)
    }  # fmt: skip
    if not names:
        refuse("--float8 finds no product whose sides are multiples of 16; give such a --dim and --intermediate_size")
    config = Float8LinearConfig(pad_inner_dim=True)  # of the weights' gradients: any number of tokens
    convert_to_float8_training(model, module_filter_fn=lambda module, name: name in names, config=config)


def flags_of(*arguments):
    """Names and values of the flags that decide what is trained, and the number of processes, as JSON has them."""
    values = {field.name: getattr(part, field.name) for part in arguments for field in fields(part)}
    values = {name: value for name, value in values.items() if name not in FREE and not name.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps(values | {"num_processes": arguments[-1].world_size}, default=str))


def fingerprint(train, names):
    """A digest of what is trained on; of a stream, its names."""
    if not isinstance(train, datasets.Dataset):
        return names
    total = hashlib.sha256()
    for batch in batches(train.with_format("numpy"), BATCH):
        total.update(np.ascontiguousarray(batch["input_ids"], dtype=np.int32))
    return total.hexdigest()


def make_parser():
    """The command line: all options, whose errors are one line."""
    parser = HfArgumentParser((ModelArguments, DataArguments, HSPMNTrainingArguments), allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    parser.error = refuse  # one line, not the several hundred of the usage
    for action in parser._actions:
        if action.dest in CHOICES:
            action.choices = [choice.value for choice in CHOICES[action.dest]]
        if action.dest in TrainingArguments._VALID_DICT_FIELDS:
            action.type = json_object
    return parser


def parse_arguments(argv):
    """`argv` as (ModelArguments, DataArguments, HSPMNTrainingArguments); refuses what no work should start with."""
    parser = make_parser()
    with refusing(AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError):  # no code of ours runs here
        given, unknown = parser.parse_known_args(argv)
        if unknown:
            check_name("argument", unknown[0].split("=")[0], parser._option_string_actions)
        check_values(vars(given), parser)
        model, data, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    installed = {*get_available_reporting_integrations()} - {"tensorboard", "wandb"}
    installed |= {"tensorboard"} if is_tensorboard_available() else set()
    installed |= {"wandb"} if is_wandb_available() else set()
    for name in training.report_to:
        check_name("--report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in installed:
            refuse(f"--report_to {name} needs a package that is not installed; pip install {name}")
    if model.model_name_or_path and data.tokenizer_name:
        refuse(f"--tokenizer_name {data.tokenizer_name} contradicts --model_name_or_path, which brings its own")
    if (model.model_name_or_path or data.tokenizer_name) and data.vocab_size != DataArguments.vocab_size:
        brings = "model_name_or_path" if model.model_name_or_path else "tokenizer_name"
        refuse(f"--vocab_size {data.vocab_size} contradicts --{brings}, which brings its own; leave it out")
    folder = Path(training.output_dir)
    if folder.resolve() == ROOT or folder.is_file():
        kind = "a file" if folder.is_file() else "this checkout, whose files the model's would replace"
        refuse(f"--output_dir {folder} is {kind}; give a folder of its own")
    return model, data, training


def make_data(model_args, data_args, training_args):
    """Tokenizer (of checkpoint, saved model or that name, or fitted on the documents), train and validation blocks,
    and what `settle` takes: tokens held out, to train on and, of a stream, read so far, in shared memory."""
    name = training_args.resume_from_checkpoint or model_args.model_name_or_path or data_args.tokenizer_name
    if name:
        with loading(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=name != data_args.tokenizer_name)
        if training_args.sample_tokens and not tokenizer(training_args.prompt)["input_ids"]:
            refuse(f"--prompt {training_args.prompt!r} has no tokens in the tokenizer of {name}; give other words")
    with training_args.main_process_first(desc="reading documents"):
        documents = tuple(load_documents(data_args))
    if not name:
        first = batches(documents[0].take(data_args.tokenizer_documents), BATCH)
        texts = (text for batch in first for text in batch["text"] if text)
        tokenizer = fit_tokenizer(texts, data_args.vocab_size, padding=True)
    T, batch = data_args.seq_len, training_args.train_batch_size * training_args.world_size
    multiple = batch * (training_args.gradient_accumulation_steps if data_args.streaming else 1)
    read = torch.zeros((), dtype=torch.int64).share_memory_()
    with training_args.main_process_first(desc="packing"):  # into whole batches: compilation likes fixed shapes
        train, validation = pack(documents[0], tokenizer, T, multiple, read), pack(documents[1], tokenizer, T)
    if not isinstance(validation, datasets.Dataset):
        validation = datasets.Dataset.from_list(list(islice(validation, data_args.validation_blocks)))
    if not len(validation):
        refuse(f"--validation_fraction {data_args.validation_fraction} holds out no text; raise it or add text")
    tokens = {"read": read, "held_out": count_tokens(validation)}
    if isinstance(train, datasets.Dataset):
        tokens["train"] = enough = count_tokens(train)
    else:
        enough = sum(row["tokens"] for row in islice(train, batch))
        train = train.shuffle(seed=training_args.seed, buffer_size=1000)
    if enough < batch * T:
        few = f"{enough // T} blocks do not fill one batch of {batch}"
        refuse(f"--seq_len {T} is longer than the data allow: {few}; lower --seq_len or --batch, or add text")
    train, validation = train.remove_columns("tokens"), validation.remove_columns("tokens")
    if len(validation) > data_args.validation_blocks:
        validation = validation.shuffle(seed=0).select(range(data_args.validation_blocks))
    return tokenizer, train, validation, tokens


def settle(tokens, seen):
    """The account of a run that trained on `seen` tokens, repeated ones too: of a stream, what was read of it and not
    trained on waited to be mixed; of a dataset nothing is left over."""
    read, held_out = int(tokens["read"]), tokens["held_out"]
    train = tokens.get("train", seen)
    left_over = 0 if "train" in tokens else max(0, read - seen)
    account = {"read": train + held_out + left_over, "train": train, "held_out": held_out, "left_over": left_over}
    return account | {"seen": seen}


def make_config(model_args, vocab_size, seq_len):
    """Configuration of the saved model with the command line's changes, or of a new one with what suits its size."""
    source, shares = model_args.model_name_or_path, model_args.sparsity_k
    changes = {name: getattr(model_args, name) for name in SIZES if getattr(model_args, name) is not None}
    if shares:
        changes["sparsity_k"] = shares if len(shares) > 1 else shares[0]
    overrides = parse_overrides("--config_overrides", model_args.config_overrides)
    for name, value in overrides.items():
        if name in SIZES and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            refuse(f"--config_overrides {name}={value} must be a whole number of at least 1")
        if name in TOKENIZER_FIELDS and not source:
            refuse(f"--config_overrides {name}={value}: the tokenizer decides it; give --vocab_size instead")
    changes |= overrides
    if source:
        saved = config_with({}, source=source)
        for name in (*SIZES, "vocab_size"):
            if changes.get(name, has := getattr(saved, name)) != has:
                refuse(f"--{name} {changes[name]} differs from {source}, which has {has}; leave it out")
        # a trained router needs no annealing
        return config_with({"sparsity_anneal_fraction": 0.0} | changes, "--config_overrides", source)
    width = changes.get("hidden_size", 128)
    head_dim = changes.get("head_dim", 32 if width < 512 else 64)
    # at width 128, untied embeddings brought the loss after 200 steps of the main job from 5.39 to 4.88, and weights
    # of standard deviation 0.06 instead of 0.02 to 4.65
    groups = changes.get("num_key_value_heads", 2)
    fresh = {
        "hidden_size": width, "head_dim": head_dim, "num_hidden_layers": 4, "num_key_value_heads": groups,
        "num_attention_heads": groups * max(1, width // head_dim // groups),
        "intermediate_size": -(-width * 8 // 96) * 32,
        "sliding_window": min(128, seq_len // 4), "tie_word_embeddings": False,
        "initializer_range": round(0.7 * width**-0.5, 3),
    }  # fmt: skip
    return config_with(fresh | changes | {"vocab_size": vocab_size}, "--config_overrides")


class AnnealingCallback(TrainerCallback):
    """Over the first `sparsity_anneal_fraction` of steps, targets fall from 1.0 to `sparsity_k`; states fade more."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Called before each step; a resumed run continues where it stood."""
        model.anneal(state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Leave the model at its configured sparsity."""
        model.set_sparsity_progress(1.0)


class CostCallback(TrainerCallback):
    """What training costs since it began in this process: seconds, tokens, waiting for data and peak memory.

    Evaluation and saving are no training: clock and peak stand still. The peak is the most that tensors took in any
    step so far; no log line resets it. `total` and `logged`, now and at the last log line, are seconds, the tokens and
    operations of all processes, and the longest waiting of one.
    """

    NOTHING = (0.0,) * 4

    def __init__(self, args):
        self.cuda, self.processes = args.device.type == "cuda", args.world_size
        self.begun, self.stopped = time.perf_counter(), None
        self.tokens = self.waited = self.peak = 0
        self.total = self.logged = self.NOTHING

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew; a resumed run counts its own steps."""
        self.__init__(args)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def clock(self):
        """Seconds of training so far; what the device has not done yet is not among them."""
        return (self.stopped or time.perf_counter()) - self.begun

    def memory(self):
        """Bytes that tensors of this process took at most in training."""
        if self.cuda and self.stopped is None:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return self.peak

    @contextmanager
    def aside(self):
        """Evaluation or saving, which waits for the device anyway: its work so far is training."""
        if self.cuda:
            torch.cuda.synchronize()
        self.memory()
        self.stopped = time.perf_counter()
        try:
            yield
        finally:
            self.begun, self.stopped = self.begun + time.perf_counter() - self.stopped, None
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()

    def waiting_for(self, batches):
        """The batches, and the seconds until each is there."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def since(self, before=NOTHING):
        """Of the training since `before`, an earlier `total`: tokens per second, the share of time waiting for data,
        on CUDA the peak memory in GB so far, and where a device's bf16 peak is known the share of it that the model's
        own operations reach (MFU)."""
        seconds, tokens, flops, waited = (now - then for now, then in zip(self.total, before, strict=True))
        costs = {"tok_s": tokens / seconds, "data_wait": waited / seconds}
        if self.cuda:
            costs["peak_gb"] = self.peak / 1e9
            if peak := PEAK_TFLOPS.get(torch.cuda.get_device_name()):
                costs |= {"mfu": flops / seconds / (self.processes * peak * 1e12), "peak_tflops": peak}
        return costs


def costs_in_words(costs):
    """`CostCallback.since` as a part of a line."""
    mfu = f"MFU {costs['mfu']:.3f} of {costs['peak_tflops']} TFLOP/s  " if "mfu" in costs else ""
    peak = f"{costs['peak_gb']:.1f} GB  " if "peak_gb" in costs else ""
    return f"{costs['tok_s']:,.0f} tok/s  {mfu}{peak}data wait {costs['data_wait']:.3f}"


class LogCallback(ProgressCallback):
    """Progress bar whose log lines hold loss, learning rate, costs and each layer's load in a fixed order."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line per training log."""
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            line = f"step {state.global_step:5d}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            line += costs_in_words(logs)
            for kind in ("load", "target"):
                values = [f"{value:.2f}" for name, value in logs.items() if name.startswith(f"{kind}/")]
                one = kind == "target" and len(set(values)) == 1
                line += f"  {kind} {' '.join(values[:1] if one else values)}"
            self.training_bar.write(line)


class HSPMNTrainer(Trainer):
    """`Trainer` that reports every layer's load, in training (last forward pass) and validation (mean).

    It stops where numbers are not finite, seals its checkpoints (`runs.py`), trains no step too many, says what it
    costs, and where it compiles, compiles each kind of layer once.
    """

    record = {}  # of the flags and the data, for the seals
    begun = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.finite = runs.FiniteCallback(self.accelerator, self.args.output_dir)
        self.add_callback(self.finite)
        self.costs, self.apart = CostCallback(self.args), 0.0
        self.add_callback(self.costs)
        # or the copy of every batch would wait for the device, as if there were no data
        self.accelerator.dataloader_config.non_blocking = self.args.dataloader_pin_memory

    def _build_accelerator_args(self, **kwargs):
        args = super()._build_accelerator_args(**kwargs)
        args["dynamo_plugin"].use_regional_compilation = True
        if self.args.torch_compile:
            torch._dynamo.config.recompile_limit = 64  # each layer may have a share of its own
            torch._dynamo.config.optimize_ddp = False  # a layer is a graph already, whatever DDP's buckets are
        return args

    def train(self, *args, **kwargs):
        """Training; what it cannot begin with is refused in one line."""
        try:
            return super().train(*args, **kwargs)
        except (ImportError, KeyError, ValueError) as error:
            if self.begun:
                raise
            refuse(f"training cannot begin: {error}")
        except RefusedByWorker:
            raise SystemExit(2) from None

    def training_step(self, *args, **kwargs):
        """A forward and backward pass, whose loss is looked at."""
        self.begun = True
        loss = super().training_step(*args, **kwargs)
        self.finite.see("loss", loss, self.state.global_step + 1)
        return loss

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """The batches of a step, and how long they were waited for."""
        return super().get_batch_samples(self.costs.waiting_for(epoch_iterator), *args, **kwargs)

    def floating_point_ops(self, inputs):
        """Operations of a forward and a backward pass by the model's own count, nothing being computed again.

        What grows with the square of a row's tokens grows with those of its documents where these are kept apart,
        whose lengths only the device knows yet: what they spare is subtracted when a log line waits for it anyway.
        """
        (B, T), flops = inputs["input_ids"].shape, self.model.estimate_flops
        self.costs.tokens += B * T
        if "position_ids" in inputs:
            seen = (inputs["position_ids"] + 0.5).mean() / (T / 2)  # sum of (tokens of a document / T)^2
            self.apart = self.apart + 3 * (flops(2 * T, B) / 2 - flops(T, B)) * (1 - seen)
        return 3 * flops(T, B)

    def store_flos(self):
        """As in `Trainer`; the other costs of all processes take the same exchange."""
        costs, device = self.costs, self.args.device
        mine = [self.current_flos - float(self.apart), costs.tokens, costs.waited, costs.memory()]
        each = torch.tensor([mine], dtype=torch.float64)
        if self.args.world_size > 1:
            each = self.accelerator.gather(each.to(device)).cpu()
        (flops, tokens, _, _), (_, _, waited, costs.peak) = each.sum(0).tolist(), each.amax(0).tolist()
        self.state.total_flos += flops
        costs.total = (costs.clock(), tokens, costs.total[2] + flops, waited)
        self.current_flos, self.apart = 0, 0.0

    def _evaluate(self, *args, **kwargs):
        with self.costs.aside():
            return super()._evaluate(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16:  # whose scaler skips steps that overflow
            self.finite.see("gradient norm", norm, self.state.global_step + 1)
        return norm

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True  # a resumed run that was complete; Trainer would add a step

    def _save_checkpoint(self, model, trial):
        with self.costs.aside():
            self.finite.check(self.model)
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            # older checkpoints go when this one is sealed, not before
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                runs.seal(folder, self.record)
                rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; keeps the loads on the device, so that only a log line waits for them."""
        loss, outputs = super().compute_loss(model, inputs | {"use_cache": False}, True, num_items_in_batch)
        if model.training:
            self.last_load = outputs["router_load"]
        else:
            rows = len(inputs["input_ids"])
            self.eval_load.append(torch.cat([outputs["router_load"] * rows, loss.new_full((1,), rows)]))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Adds `eval_load/<layer>` to the metrics."""
        self.eval_load = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(torch.stack(self.eval_load).sum(0), "sum")
        for layer, load in enumerate((sums[:-1] / sums[-1]).tolist()):
            output.metrics[f"{metric_key_prefix}_load/{layer}"] = load
        return output

    def log(self, logs, start_time=None):
        """Adds what was spent since the last one, `load/<layer>` and `target/<layer>` to training logs, and warns of
        layers far from their target."""
        if "loss" in logs:
            logs, self.costs.logged = logs | self.costs.since(self.costs.logged), self.costs.total
            loads, targets = self.last_load.tolist(), iter(self.model.router_targets.tolist())
            for layer, share in enumerate(self.model.config.layer_sparsity):
                load, target = loads[layer], next(targets) if share else 0.0
                logs |= {f"load/{layer}": load, f"target/{layer}": target}
                if not 0.25 * target <= load <= 2.0 * target:
                    text = "step %d: layer %d routes %.3f of its tokens, far from its target %.3f"
                    logging.warning(text, self.state.global_step, layer, load, target)
        super().log(logs, start_time)


REPORT = """data: {train_data}; {validation_tokens:,} validation tokens
tokens read: {tokens[read]:,} = {tokens[train]:,} to train on + {tokens[held_out]:,} held out + {left_over:,} left over
model: {parameters:,} parameters
training: {steps} steps, {train_seconds:.0f} s on {device} ({seconds:.0f} s with reading, tokenizing and validation)
costs of the steps since the start or resumption: {costs}
validation loss, nats per token: before {loss_before:.4f}, after {loss_after:.4f}{bigram}
layer  load   target
{layers}
sample:
{sample}"""
CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [hspmn]
---
# HSPMN

A causal language model whose router sends a share of the tokens through full attention and all of them through
linear attention with a local window. Written by `train.py`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

What its training printed:

````text
{report}
````
"""


def main(argv=None):
    """Run a training job; `argv` defaults to the command line. Returns the measured results."""
    begin = time.monotonic()
    model_args, data_args, training_args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()  # those of writing and reading files; training keeps its own
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs it raises too
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    record, folder = {"flags": flags_of(model_args, data_args, training_args)}, Path(training_args.output_dir)
    with refusing(), ExitStack() as stack:
        config = make_config(model_args, data_args.vocab_size, data_args.seq_len)
        if not training_args.learning_rate:
            training_args.learning_rate = (0.05 if model_args.model_name_or_path else 0.5) / config.hidden_size
        check_plan(training_args, config)
        # not by evaluate() before train(): that prepares the model without gradients, and ranks then train apart
        training_args.eval_on_start = True

        def start():
            stack.enter_context(runs.alone_in(folder))
            return runs.starting_point(training_args, record)

        training_args.resume_from_checkpoint, finished = runs.on_main_process(training_args, start)
        kept = stack.pop_all()
    with kept, runs.disk_errors(folder):
        if finished:
            print(f"nothing to do: {training_args.resume_from_checkpoint} ends the run, and {folder} holds its model")
            return json.loads((folder / "results.json").read_text())
        with refusing(), runs.disk_errors(folder):
            trainer, results, tokens = prepare(model_args, data_args, training_args, config, record)
        tokens["read"].zero_()
        outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        metrics = trainer.evaluate()
        results["loss_before"] = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
        results |= {"loss_after": metrics["eval_loss"], "steps": outcome.global_step}
        blocks = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
        results["tokens"] = settle(tokens, outcome.global_step * blocks * data_args.seq_len)
        results["train_data"] += f", {results['tokens']['train']:,} training tokens"
        results["train_seconds"], results["seconds"] = outcome.metrics["train_runtime"], time.monotonic() - begin
        results |= trainer.costs.since() if trainer.costs.tokens else {}
        results["loads"] = [value for name, value in metrics.items() if name.startswith("eval_load/")]
        if not math.isfinite(results["loss_after"]):
            refuse(f"the validation loss is {results['loss_after']}, so no model is written to {folder}", code=1)
        finish(trainer, trainer.processing_class, results)
    return results


def prepare(model_args, data_args, training_args, config, record):
    """The trainer with its model and data, the first results, and the tokens that `settle` counts."""
    set_seed(training_args.seed)
    options, use_cache = {"trust_remote_code": True, "dtype": torch.float32}, config.use_cache
    if model_args.model_name_or_path:  # before the data, in case it is refused
        model = runs.load_model(model_args.model_name_or_path, config=config, **options)
    tokenizer, train, validation, tokens = make_data(model_args, data_args, training_args)
    record |= {"dataset": data_args.dataset, "data": fingerprint(train, data_args.dataset)}
    runs.check_data(training_args, record)
    if not model_args.model_name_or_path:
        set_seed(training_args.seed)
        special = {name: getattr(tokenizer, name) for name in TOKENIZER_FIELDS if name != "vocab_size"}
        config.update({"vocab_size": len(tokenizer)} | special)
        with refusing(MemoryError, RuntimeError):  # sizes that no memory holds
            model = AutoModelForCausalLM.from_config(config, **options)
    if training_args.float8:
        use_float8(model)
    resumed = training_args.resume_from_checkpoint
    if resumed and (Path(resumed) / "model.safetensors").is_file():  # sharded optimizers may keep weights otherwise
        runs.check_tensors(resumed, model)
    if training_args.dataloader_drop_last and len(validation) < training_args.eval_batch_size:
        few = f"the only {len(validation)} blocks of validation"
        refuse(f"--dataloader_drop_last drops {few}; lower --per_device_eval_batch_size")
    collator = partial(collate, isolate_after=tokenizer.eos_token_id if data_args.isolate_documents else None)
    callbacks = [AnnealingCallback()]
    trainer = HSPMNTrainer(model, training_args, collator, train, validation, tokenizer, callbacks=callbacks)
    trainer.record = record
    model.config.use_cache = use_cache  # Trainer turns it off, and the saved folder would keep that
    trainer.remove_callback(ProgressCallback)
    if not training_args.disable_tqdm:
        trainer.add_callback(LogCallback())
    source = " ".join(data_args.dataset) or f"standard library of Python {sys.version.split()[0]}"
    device = f"{training_args.device.type.upper()} with {torch.get_num_threads()} threads"
    if training_args.device.type == "cuda":
        device = f"{training_args.world_size} x {torch.cuda.get_device_name()}"
    results = {"train_data": source, "validation_tokens": sum(map(len, validation["input_ids"]))}
    results |= {"parameters": model.num_parameters(), "device": device}
    if data_args.baseline_tokens:
        results["bigram_loss"] = bigram_loss(train, validation, len(tokenizer), data_args.baseline_tokens)
    return trainer, results, tokens


def finish(trainer, tokenizer, results):
    """Save the model, its card and `results.json`, all of them or none, and print what the run measured."""
    folder = Path(trainer.args.output_dir)
    whole = folder / runs.PARTIAL  # until it is
    if trainer.args.should_save:
        shutil.rmtree(whole, ignore_errors=True)
    if trainer.is_fsdp_enabled:  # whatever form its checkpoints have
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(whole))
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
    options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "pad_token_id": tokenizer.pad_token_id}
    results["sample"] = ""
    if args.sample_tokens:
        try:
            inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)
            set_seed(0)
            # on every rank, which may hold a shard only
            ids_BT = model.generate(**inputs, max_new_tokens=args.sample_tokens, **options)
            results["sample"] = tokenizer.decode(ids_BT[0], skip_special_tokens=True)
        except Exception as error:  # whatever it is, what was measured is kept
            results["sample"] = f"none: {error}"
    if not trainer.is_world_process_zero():
        return
    lines = []
    for layer, (load, target) in enumerate(zip(results["loads"], model.config.layer_sparsity, strict=True)):
        remark = "" if 0.5 * target <= load <= 1.5 * target else "  outside 0.5x to 1.5x of its target"
        lines.append(f"{layer:5d}  {load:.3f}  {target:.3f}{remark}")
    bigram = f", bigram {results['bigram_loss']:.4f}" if "bigram_loss" in results else ""
    costs = costs_in_words(results) if "tok_s" in results else "none, there were no more to take"
    texts = {"left_over": results["tokens"]["left_over"], "bigram": bigram, "layers": "\n".join(lines), "costs": costs}
    text = REPORT.format(**results, **texts)
    (whole / "README.md").write_text(CARD.format(prompt=args.prompt, report=text), "utf-8")
    write_json(whole / "results.json", results)
    runs.seal(whole, trainer.record)
    runs.publish(whole, folder)
    print(f"{text}\nsaved in {folder}")


if __name__ == "__main__":
    main()
