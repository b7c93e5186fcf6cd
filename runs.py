"""What a run of `train.py` keeps in its folder: a lock while it lasts, checkpoints and, at its end, the model.

A checkpoint or model is sealed by `run.json`, which is written last: the flags and the data that made it, and a digest
of every file. What is sealed is whole; what was cut short by a kill, a full disk or a fault is seen not to be.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging

from .results import complain, loading, refuse, write_json

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None

SEAL, STATE, LOCK, PARTIAL = "run.json", "trainer_state.json", ".lock", "model.partial"
CARD_FILES = ("config.json", "README.md", "results.json", SEAL)  # of a model, in the order in which they are put there
READ = (".safetensors", ".json", ".py")  # endings of what is read to load a model
UNSEALED = (SEAL, "run.partial", "checkpoint-is-incomplete.txt")  # the last belongs to --enable_jit_checkpoint
OPTIMIZERS = ("optimizer", "global_step")  # what the optimizer's files or folders begin with, DeepSpeed's too
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "iostream error")  # what torch says of a failed write
HELD = set()  # descriptors of locks; forked children close them, or a data loader would keep what its dead parent held
if fcntl is not None:
    os.register_at_fork(after_in_child=lambda: [os.close(HELD.pop()) for _ in range(len(HELD))])


@contextmanager
def alone_in(folder):
    """Makes `folder` and keeps other processes out of it; the kernel frees the lock of a dead process."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    HELD.add(lock)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"--output_dir {folder}: another process is training there; wait for it, or give another folder")
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
    finally:
        HELD.discard(lock)
        os.close(lock)


def on_main_process(args, decide):
    """What `decide()` returns on the main process, on every process; where it refuses, all end."""
    answer, code = None, 0
    if args.process_index == 0:
        try:
            answer = decide()
        except SystemExit as refusal:
            code = refusal.code
    if args.world_size > 1:
        shared = [answer, code]
        torch.distributed.broadcast_object_list(shared)
        answer, code = shared
    if code:
        raise SystemExit(code)
    return answer


def digest(path):
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def seal(folder, record):
    """Write `run.json` into a folder that is complete: `record`, and the digests of its files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNSEALED]
    digests = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    write_json(folder / SEAL, record | {"files": digests})


def read_json(path):
    """The object in a JSON file, or {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def damage(folder, endings=""):
    """What is wrong with the files of a sealed folder whose names have one of the `endings`; None: they are whole."""
    files = read_json(folder / SEAL).get("files")
    if not isinstance(files, dict):
        return f"it has no readable {SEAL}, which is written last"
    for name in filter(lambda name: name.endswith(endings), files):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != files[name]:
            return f"{name} is not what was saved"
    return None


def checkpoint_damage(folder):
    """What keeps a checkpoint from being resumed, or None."""
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    if problem := damage(folder):
        return problem
    files = read_json(folder / SEAL)["files"]
    if not any(name.startswith(OPTIMIZERS) for name in files):
        return "it holds no optimizer, as with --save_only_model"
    return None if STATE in files else f"{SEAL} does not know its {STATE}"


def newest_whole(folder):
    """The newest checkpoint in `folder` that can be resumed, or None, and of each newer one its name and damage."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    passed = []
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        problem = checkpoint_damage(path)
        if problem is None:
            return path, passed
        passed.append(f"{path.name} ({problem})")
    return None, passed


def last_whole(folder):
    """Where a run that ends early stands, in words."""
    whole, _ = newest_whole(folder)
    return f"the last whole checkpoint is {whole}" if whole else f"{folder} holds no whole checkpoint"


def differences(old, new):
    """The entries of a record that are not the same, in words."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"--{name} {json.dumps(old.get(name))} and not {json.dumps(new.get(name))}" for name in names)


def starting_point(args, record):
    """The checkpoint that a run begins from, None for a new one, and whether it is finished already.

    Refuses a new run beside another's checkpoints, and a checkpoint that is damaged or was made with other flags.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    named, whole, passed = f"--resume_from_checkpoint {asked}", None, []
    if asked is None or asked.lower() in ("last", "true"):
        whole, passed = newest_whole(folder)
    if asked is None:
        if whole:
            way_out = "go on with --resume_from_checkpoint last, or give another --output_dir"
            refuse(f"--output_dir {folder} holds {whole.name} of an earlier run; {way_out}")
        return None, False
    if asked.lower() not in ("last", "true"):
        whole = Path(asked)
        if problem := checkpoint_damage(whole):
            other, _ = newest_whole(whole.parent) if whole.parent.is_dir() else (None, [])
            way_out = f"{other} is whole" if other else "its weights, if whole, go to --model_name_or_path"
            refuse(f"{named} is no checkpoint folder to go on from: {problem}; {way_out}")
    elif whole is None:
        way_out = "leave the flag out to begin anew, or name a checkpoint folder"
        kind = f"no whole checkpoint in --output_dir {folder}: {', '.join(passed)}"
        refuse(f"{named}: {kind if passed else f'no checkpoint in --output_dir {folder}'}; {way_out}")
    old, flags = read_json(whole / SEAL).get("flags", {}), record["flags"]
    if old != flags and not args.accept_changes:
        way_out = "give the same flags, or --accept_changes to go on with these"
        refuse(f"{named}: {whole} was made with {differences(old, flags)}; {way_out}")
    newest, _ = newest_whole(folder)
    if newest and not newest.samefile(whole) and read_json(newest / SEAL).get("flags") != flags:
        refuse(f"--output_dir {folder} holds {newest.name} of another run; move it away, or give another --output_dir")
    if passed:
        complain(f"resuming {whole}; passed over {', '.join(passed)}")
    state, model = read_json(whole / STATE), read_json(folder / SEAL)
    steps = args.max_steps if args.max_steps > 0 else state["max_steps"]
    return str(whole), state["global_step"] >= steps and model.get("flags") == flags


def check_data(args, record):
    """Refuse to go on from a checkpoint with other data than it was made with."""
    if args.resume_from_checkpoint is None or args.accept_changes:
        return
    old = read_json(Path(args.resume_from_checkpoint) / SEAL)
    if old.get("data") != record["data"]:
        data = f"other data (--dataset {' '.join(old.get('dataset', []))})"
        way_out = "give the same data, or --accept_changes to go on with these"
        refuse(f"--resume_from_checkpoint {args.resume_from_checkpoint} was made from {data}; {way_out}")


def check_tensors(checkpoint, model):
    """Refuse to go on from a checkpoint whose tensors have other names or shapes than the model's."""
    saved = {}
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = saved.keys() | wanted.keys() - model.all_tied_weights_keys.keys()
    if wrong := sorted(name for name in names if saved.get(name) != wanted.get(name)):
        of = ", ".join(f"{name} {saved.get(name)} and not {wanted.get(name)}" for name in wrong[:3])
        refuse(f"--resume_from_checkpoint {checkpoint} holds a model of other sizes ({of}); give its flags")


def publish(source, target):
    """Put the sealed model of folder `source` in place of that in `target`, and remove `source`.

    Weights never lie beside another model's card, results or seal: these go first and come last, with `config.json`,
    without which nothing loads.
    """
    old, new = (read_json(folder / SEAL).get("files", {}) for folder in (target, source))
    for name in [*reversed(CARD_FILES), *old.keys() - new.keys()]:
        (target / name).unlink(missing_ok=True)
    for name in [*sorted(new.keys() - {*CARD_FILES}), *CARD_FILES]:
        (target / name).parent.mkdir(exist_ok=True)
        (source / name).replace(target / name)
    shutil.rmtree(source)


@contextmanager
def disk_errors(folder):
    """Turns a write below `folder` that fails for want of room into one line, and removes what is half written."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        said = re.search(rf"os error ({'|'.join(map(str, NO_ROOM))})\b", str(error))
        if code not in NO_ROOM and not said and not any(words in str(error) for words in WRITE_FAILED):
            raise
        begun = [path for path in (*folder.glob("checkpoint-*"), folder / PARTIAL) if not (path / SEAL).exists()]
        written = [file for path in begun for file in path.rglob("*") if file.is_file()]
        file = max(written, key=lambda file: file.stat().st_mtime_ns, default=folder)
        if isinstance(error, SafetensorError):  # leaves no file
            file = file.with_name("model.safetensors")
        file = Path(getattr(error, "filename2", None) or getattr(error, "filename", None) or file)
        disk = next(path for path in file.resolve().parents if path.is_mount())
        usage = shutil.disk_usage(disk)
        code = code or (int(said[1]) if said else errno.ENOSPC * (usage.free < 2**20))
        reason = os.strerror(code) if code else "the write failed"
        for path in begun:
            if file.is_relative_to(path):
                shutil.rmtree(path, ignore_errors=True)
        room = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB free"
        way_out = f"make room, then go on with --resume_from_checkpoint last; {last_whole(folder)}"
        refuse(f"cannot write {file}: {reason} (disk mounted at {disk}, {room}); {way_out}", code=1)


class FiniteCallback(TrainerCallback):
    """Ends training with exit code 1 at a loss, gradient norm or weight that is not finite, before it is saved.

    What a step computes is noted on its device. On CPU it is looked at after each step, elsewhere when a log line or a
    save waits for the device anyway; the step that is named is the first one either way. Buffers, which hold the
    routing biases, count as weights.
    """

    KINDS = ("loss", "gradient norm", "weights")

    def __init__(self, accelerator, folder):
        self.accelerator, self.folder, self.never = accelerator, Path(folder), torch.iinfo(torch.int64).max
        self.first = torch.full((len(self.KINDS),), self.never, device=accelerator.device)

    @torch.no_grad()
    def see(self, kind, value, step):
        """Note that `value`, a number or tensor of one, belongs to `step`."""
        value = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
        first = self.first[self.KINDS.index(kind)]
        first.copy_(torch.where(value.to(first.device).isfinite(), first, first.clamp(max=step)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Note the largest weight, and look where that costs nothing."""
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for _, tensor in named_numbers(model)]
        if local := [tensor.detach() for tensor in local if tensor.numel()]:  # a shard may be empty
            self.see("weights", torch.nn.utils.get_total_norm(local, torch.inf), state.global_step)
        if self.first.device.type == "cpu" or control.should_log or control.should_save:
            self.check(model)

    def check(self, model):
        """End the program if anything that was seen is not finite; every process comes here at the same step."""
        first = self.first.clone()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        steps = first.tolist()
        if (step := min(steps)) == self.never:
            return
        kind = self.KINDS[steps.index(step)]
        if self.accelerator.is_main_process:
            bad = not_finite(model) * (kind == "weights")
            where = f"step {step}: the {kind} {'of ' + bad[0] if bad else ''}".rstrip()
            way_out = "lower --learning_rate, or look at the data"
            complain(f"{where} is not finite, and nothing was saved after it; {last_whole(self.folder)}; {way_out}")
        self.accelerator.wait_for_everyone()  # or the launcher ends the process that speaks
        raise SystemExit(1)


def named_numbers(model):
    """Names and tensors of all floating-point parameters and buffers."""
    return [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]


def not_finite(model):
    """Names of the parameters and buffers that hold a number that is not finite."""
    return [name for name, tensor in named_numbers(model) if not tensor.isfinite().all()]


def load_model(source, flag="--model_name_or_path", **options):
    """The causal language model saved at `source` (folder or hub name), loaded with `options` of `from_pretrained`.

    Refuses, in one line that begins with `flag`, files that are not those that the folder was sealed with, and weights
    that cannot be read, are missing, left over or of another shape, or are not finite.
    """
    options = {"trust_remote_code": True} | options
    level, named = logging.get_verbosity(), f"{flag} {source}"
    if (Path(source) / SEAL).is_file() and (problem := damage(Path(source), READ)):
        refuse(f"{named}: {problem}; delete its {SEAL} if that is meant, or take another model")
    logging.set_verbosity_error()  # what the loading report says is said below
    with loading(named):
        checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(source, **checks, **options)
        if "config" in options:  # what another configuration adds or leaves out is neither missing nor left over
            saved = AutoConfig.from_pretrained(source, trust_remote_code=True)
            with torch.device("meta"):
                own = set(AutoModelForCausalLM.from_config(saved, trust_remote_code=True).state_dict())
            info["missing_keys"] = own & set(info["missing_keys"])
            info["unexpected_keys"] = set(info["unexpected_keys"]) - own
    logging.set_verbosity(level)
    faults = {kind.removesuffix("_keys"): sorted(map(str, names)) for kind, names in info.items()}
    for kind, names in (faults | {"non-finite": not_finite(model)}).items():
        if names:
            refuse(f"{named} has {len(names)} {kind} weights ({', '.join(names[:3])}); take a whole checkpoint")
    return model
