"""Cross-Prompt Encoder (XPE): soft prompts for languages that a frozen encoder hardly knows.

A minimal, pure-PyTorch, single-file reference implementation of "Cross-Prompt Encoder for Low-Performing
Languages" (Mikaberidze, Saghinadze, Ostermann, Mueller).  A few trained vectors stand in front of a frozen
XLM-R, which then classifies topics (SIB-200) in languages that it was never trained on:

    python xpe.py --toy                                          # offline, half a minute, synthetic languages
    python xpe.py --method dual --xpe-ratio 0.7 --source joshi5  # the paper's setting (Table 1)
    python xpe.py --backbone DIR --data DIR --steps 462 --lr 5e-4 --prompt-lr 5e-2        # a local encoder

Letters: B batch, T text length, P prompt length (the paper's n), H hidden size (d), C classes.
Where the paper is silent or differs stands `PAPER section:` or `AUTHORS:` (their released program).
"""
import argparse, contextlib, csv, dataclasses, difflib, json, math, os, signal, sys, tempfile, time, timeit
from pathlib import Path
from typing import NamedTuple
import groups

# ------------------------------------------------------------------------------------------- Configuration
def setting(default, text, choices=()):
    """A field of Config: its text (unit, section) is what --help prints."""
    return dataclasses.field(default=default, metadata=dict(help=text, choices=choices))

@dataclasses.dataclass
class Config:
    """Everything that defines a run.  The command line is made from it: `prompt_lr` is `--prompt-lr`."""
    method: str = setting("dual", "spt, xpe, dual (3), or full fine-tuning", ("spt", "xpe", "dual", "full"))
    xpe_ratio: float = setting(None, "share of the prompt that is encoded, in (0, 1), dual only [0.7] (4.3)")
    source: str = setting("joshi5", "train on enarzho, joshi5, seen or codes, joined by commas (4.2)")
    languages: str = setting("all", "test on all, or on names and codes as in --source")
    target: str = setting("", "then go on in each of these alone: codes with commas, or full, the 46 (4.1)")
    backbone: str = setting("FacebookAI/xlm-roberta-large", "encoder: hub name or local folder (4.1)")
    data: str = setting("Davlan/sib200", "hub name, or folder with <code>/{train,dev,test}.tsv (4.1)")
    out: str = setting("runs", "folder that holds one folder per run")
    seed: int = setting(0, "random seed; the paper averages 10 (4.3)")
    steps: int = setting(24_000, "optimization steps (4.4)")
    target_steps: int = setting(6_000, "optimization steps on each language of --target (4.4)")
    batch_size: int = setting(32, "sentences a step (4.4)")
    lr: float = setting(5e-5, "peak learning rate of prompt encoder and head (4.4)")
    prompt_lr: float = setting(5e-3, "peak learning rate of the standard soft prompt (4.4)")
    weight_decay: float = setting(None, "decay of encoder and head [0.1; 0.01 if released] (4.4)")
    warmup: float = setting(0.1, "share of the steps with linear warm-up (authors' program)")
    cycles: int = setting(2, "cosine cycles, each from the peak to zero (4.4)")
    patience: int = setting(20, "epochs without a better dev loss, from half-time on, that end it (4.4)")
    clip: float = setting(1.0, "largest global norm of the gradient (authors' program)")
    prompt_length: int = setting(20, "virtual tokens P (4.4)")
    mlp_hidden: int = setting(256, "width of the prompt encoder (authors' program)")
    dropout: float = setting(0.1, "dropout in the prompt encoder (authors' program)")
    head_dropout: float = setting(0.1, "dropout in the classification head")
    backbone_dropout: str = setting("on", "the frozen backbone's dropout: on or off", ("on", "off"))
    pool: str = setting("first", "what the head reads: first (virtual token) or bos (<s>)", ("first", "bos"))
    recipe: str = setting("paper", "how to train: as in the paper, or as released", ("paper", "released"))
    max_length: int = setting(164, "longest text in tokens (authors' program)")
    dtype: str = setting("auto", "frozen weights: fp32, bf16; auto: bf16 on a GPU", ("auto", "fp32", "bf16"))
    device: str = setting("auto", "cpu, cuda, cuda:1, ..., or auto: cuda where there is one")
    toy: bool = setting(False, "synthetic languages and a tiny random encoder: no network, half a minute")
    init_from: str = setting("", "start from this run's folder, or from an adapter's (with --method spt)")
    load: str = setting("", "do not train: test the adapter in this folder, or use it with --predict")
    predict: str = setting("", "with --load: label each line of this file, or of standard input for -")
    benchmark: bool = setting(False, "do not train: time a training step and the evaluation (see README)")

TOY = dict(backbone="toy", data="toy", steps=300, target_steps=75, lr=3e-3, prompt_lr=5e-2, max_length=32)

def parse(argv):
    """The command line as a Config.  --toy changes defaults: what is given beside it still counts."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        kind = dict(action="store_true") if field.type is bool else dict(
            type=field.type, default=field.default, choices=field.metadata["choices"] or None)
        shown = "" if field.default in (None, "") or field.default is False else f" [{field.default}]"
        parser.add_argument("--" + field.name.replace("_", "-"), help=field.metadata["help"] + shown, **kind)
    def error(message):                            # argparse's own prints the usage too
        raise InputError(f"{message}; see --help")
    parser.error = error
    if parser.parse_args(argv).toy:
        parser.set_defaults(**TOY)
    return Config(**vars(parser.parse_args(argv)))

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse(["--help"])                              # prints and ends here: importing torch takes seconds

import numpy as np
import torch
from tqdm import tqdm

# --------------------------------------------------------------------------------------------- The prompts
# Sections 3.1 and 3.2, and the classifier around them.  Needs only `import torch`: copy it alone.
class SoftPrompt(torch.nn.Module):
    """SPT (4.3): `length` free vectors.  forward() -> (P, H).  Init N(0, 1)."""
    def __init__(self, length, hidden):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(length, hidden))
    def forward(self):
        return self.vectors                                          # (P, H)

class CrossPromptEncoder(torch.nn.Module):
    """XPE (3.1): F_theta(pseudo prompt), one small MLP applied to each vector alone.  forward() -> (P, H)."""
    def __init__(self, length, hidden, mlp_hidden=256, dropout=0.1):
        super().__init__()
        self.pseudo_prompt = torch.nn.Parameter(torch.randn(length, hidden))
        self.mlp = torch.nn.Sequential(                              # AUTHORS: "two layers" are three Linears
            torch.nn.Linear(hidden, mlp_hidden), torch.nn.ReLU(), torch.nn.Dropout(dropout),
            torch.nn.Linear(mlp_hidden, mlp_hidden), torch.nn.ReLU(), torch.nn.Dropout(dropout),
            torch.nn.Linear(mlp_hidden, hidden))
    def forward(self):
        return self.mlp(self.pseudo_prompt)                          # (P, H) -> (P, H)

class DualPrompt(torch.nn.Module):
    """DUAL (3.2): the standard part first, the encoded part second.  forward() -> (P, H)."""
    def __init__(self, standard, encoded):
        super().__init__()
        self.standard, self.encoded = standard, encoded
    def forward(self):
        return torch.cat([self.standard(), self.encoded()])          # (P_spt, H) + (P_xpe, H) -> (P, H)

def build_prompt(method, length, hidden, ratio=0.7, **encoder):
    """The prompt of a method: its share of encoded vectors is 0 (spt), `ratio` (dual) or 1 (xpe).
    `encoder` goes to CrossPromptEncoder (mlp_hidden, dropout).  Raises ValueError where DUAL has no room."""
    n = round(length * {"spt": 0.0, "full": 0.0, "dual": ratio, "xpe": 1.0}[method])   # encoded vectors
    if method == "dual":
        if length < 2:
            raise ValueError("a dual prompt needs a length of at least 2: one standard, one encoded vector")
        n = min(max(n, 1), length - 1)
    if n == 0:
        return SoftPrompt(length, hidden)
    encoded = CrossPromptEncoder(n, hidden, **encoder)
    return encoded if n == length else DualPrompt(SoftPrompt(length - n, hidden), encoded)

class ClassificationHead(torch.nn.Module):
    """XLM-R's head: (B, H) -> dropout, Linear, tanh, dropout, Linear -> (B, C).  Init N(0, 0.02)."""
    def __init__(self, hidden, num_labels, dropout=0.1):
        super().__init__()
        self.dense, self.out_proj = torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, num_labels)
        self.dropout = torch.nn.Dropout(dropout)
        for linear in (self.dense, self.out_proj):
            torch.nn.init.normal_(linear.weight, std=0.02)
            torch.nn.init.zeros_(linear.bias)
    def forward(self, x):
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))

class PromptedClassifier(torch.nn.Module):
    """A frozen backbone that reads [prompt | <s> text </s>], and a head on one position of its last layer."""
    def __init__(self, backbone, prompt, num_labels, pool="first", head_dropout=0.1):
        super().__init__()
        self.backbone, self.prompt, self.pool = backbone, prompt, pool
        self.head = ClassificationHead(backbone.config.hidden_size, num_labels, head_dropout)
    def forward(self, input_ids, attention_mask):
        """(B, T) token ids and their mask, 1 on text and 0 on right padding -> logits (B, C), fp32."""
        words = self.backbone.get_input_embeddings()(input_ids)                              # (B, T, H)
        prompt = self.prompt().to(words.dtype)             # encoded once a step, not once an example (P, H)
        x = torch.cat([prompt.expand(len(words), -1, -1), words], dim=1)                     # (B, P + T, H)
        mask = torch.nn.functional.pad(attention_mask, (len(prompt), 0), value=1)            # (B, P + T)
        at = len(prompt) if self.pool == "bos" else 0  # AUTHORS: like PEFT, the first virtual token, not <s>
        # Only that is read: the last layer drops the rest after attention (excludes gradient checkpointing).
        behind = self.backbone.encoder.layer[-1].attention.output
        with behind.register_forward_pre_hook(lambda _, inputs: tuple(t[:, at:at + 1] for t in inputs)):
            # The backbone itself adds positions, counted through prompt and text, and applies LayerNorm.
            states = self.backbone(inputs_embeds=x, attention_mask=mask).last_hidden_state   # (B, 1, H)
        return self.head(states[:, 0].float())                                               # (B, C)
    def cache_prompt(self):
        """Keep only the finished prompt (3.1): encoder and pseudo prompt are not needed at inference."""
        finished = self.eval().prompt().detach().clone()                                     # (P, H)
        self.prompt = SoftPrompt(*finished.shape)
        self.prompt.vectors = torch.nn.Parameter(finished, requires_grad=False)
        return self

# ---------------------------------------------------------------------------------- Optimizer and schedule
# Section 4.4.  Needs only `import torch`: copy it alone.
class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern, 2018) with an external learning rate and no momentum.
    Of the running average V of the squared gradient (R, C) only row and column means are kept, R + C numbers:
    V ~ row col^T / mean(row).  Smaller tensors keep V whole.  G / sqrt(V) is clipped to RMS clip_threshold.
    Decay is decoupled.  Equal to transformers' with scale_parameter, relative_step and warmup_init off."""
    def __init__(self, params, lr, weight_decay=0.0, clip_threshold=1.0, decay_rate=-0.8, eps=1e-30):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, clip_threshold=clip_threshold,
                                      decay_rate=decay_rate, eps=eps))
    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; -> the loss, if a closure computes it."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = self.update(p.grad, self.state[p], group)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"]).sub_(update * group["lr"])
        return loss
    def update(self, g, state, group):
        """A gradient, normalised and clipped; advances its running averages."""
        state["step"] = t = state.get("step", 0) + 1
        beta2 = 1 - t ** group["decay_rate"]                         # 0 at t = 1: no history yet
        square = g * g + group["eps"]
        means = {"v": square} if g.dim() < 2 else {"row": square.mean(-1), "col": square.mean(-2)}  # (R), (C)
        for name, new in means.items():
            state[name] = torch.lerp(new, state.get(name, new), beta2)
        if g.dim() < 2:
            u = g * state["v"].rsqrt()
        else:
            row = state["row"] / state["row"].mean(-1, keepdim=True)
            u = g * row.rsqrt().unsqueeze(-1) * state["col"].rsqrt().unsqueeze(-2)           # (R, C)
        rms = u.square().mean().sqrt()
        return u / (rms / group["clip_threshold"]).clamp(min=1.0)    # no .item(): a GPU would wait for it

def cosine_with_restarts(step, warmup, total, cycles=2):
    """Factor in [0, 1] on the learning rate at `step`, from 0: linear warm-up, then `cycles` cosines to 0."""
    from math import cos, pi
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.0 if progress >= 1 else 0.5 * (1 + cos(pi * (cycles * progress % 1)))

# --------------------------------------------------------------------------------------- Backbone and data
class InputError(ValueError):
    """Something the user can mend: main prints its one line and exits with code 2."""

@contextlib.contextmanager
def as_input_error(problem, remedy=""):
    """Turn what a library raises inside into an InputError: problem (its first line), remedy."""
    try:
        yield
    except Exception as error:                     # of many kinds, which mean the same to a user
        reason = (str(error).strip().splitlines() or [""])[0][:150]
        raise InputError(f"{problem} ({type(error).__name__}: {reason}){remedy}") from error

class Split(NamedTuple):
    """Sentences of one or more languages, on the device as a whole: 100 to 200 MB for 205 languages."""
    ids: torch.Tensor             # (N, L) token ids, right-padded
    mask: torch.Tensor            # (N, L) 1 on tokens, 0 on padding
    labels: torch.Tensor          # (N,)
    lengths: np.ndarray           # (N,) tokens, on the host: no batch's width is asked of the device
    languages: np.ndarray         # (N,) codes
    def batch(self, rows):
        """Rows (B,) -> ids (B, T), mask (B, T), labels (B,); T is their longest text, to a multiple of 4."""
        T = min(-(-int(self.lengths[rows].max()) // 4) * 4, self.ids.shape[1])
        rows = torch.as_tensor(rows).to(self.ids.device, non_blocking=True)
        return self.ids[rows, :T], self.mask[rows, :T], self.labels[rows]

def load_backbone(name, device="cpu", dtype=torch.float32, dropout=True):
    """The frozen encoder and its tokenizer, from the hub, a local folder, or "toy".  Raises InputError."""
    off = {} if dropout else dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if name == "toy":
        backbone, tokenizer = groups.toy_backbone(**off)
        return backbone.to(device, dtype).requires_grad_(False), tokenizer
    from transformers import AutoModel, AutoTokenizer, logging
    logging.set_verbosity_error()                  # "unused classifier weights": by intention
    logging.disable_progress_bar()
    # The attention that is fastest in training: on a CPU the fused one is slow in bf16, and only there.
    attention = "eager" if torch.device(device).type == "cpu" and dtype == torch.bfloat16 else "sdpa"
    with as_input_error(f"cannot load the backbone {name!r}", "; give a folder, --backbone DIR, or --toy"):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        backbone = AutoModel.from_pretrained(name, dtype=dtype, attn_implementation=attention,
                                             add_pooling_layer=False, **off)
    return backbone.to(device).requires_grad_(False), tokenizer

def read_rows(data, code, split):
    """[(place, text, label)] from a TSV folder, the hub, or a local folder that load_dataset understands."""
    path = Path(data, code, split + ".tsv")
    with as_input_error(f"cannot read {path}", "; it needs the columns category and text; offline, give a "
                        "local folder with --data DIR, or --toy"):
        if any(Path(data).glob("*/*.tsv")):
            with open(path, newline="", encoding="utf-8-sig") as file:     # or utf-8
                reader = csv.DictReader(file, delimiter="\t", strict=True)     # CSV with tabs: quoted fields
                return [(f"{path}:{reader.line_num}", row["text"], row["category"]) for row in reader]
        import datasets
        datasets.disable_progress_bars()
        rows = datasets.load_dataset(data, code, split={"dev": "validation"}.get(split, split))
        return [(f"{path} row {i}", row["text"], row["category"]) for i, row in enumerate(rows)]

def load_language(data, code, split, labels=None):
    """Texts and label names of one language; `split` is train, dev or test; `data` as in Config.
    With `labels`, every label must be one of them.  Raises InputError that names the file and line."""
    rows = groups.toy_rows(code, split) if data == "toy" else read_rows(data, code, split)
    for place, text, label in rows:
        if not text or not text.strip():
            raise InputError(f"{place}: empty text")
        if not label or labels and label not in labels:
            raise InputError(f"{place}: unknown label {label!r}; known: {', '.join(labels or groups.LABELS)}")
    if not rows:
        raise InputError(f"no {split} rows for {code} in {data}")
    return [text for _, text, _ in rows], [label for _, _, label in rows]

def load_rows(data, codes, split, labels):
    """[(text, label name, code)] of all sentences of `codes`."""
    return [(*row, code) for code in codes for row in zip(*load_language(data, code, split, labels))]

def encode(rows, labels, tokenizer, device, max_length=164):
    """What load_rows gives, tokenized, as a Split."""
    texts, names, languages = map(list, zip(*rows))
    e = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    y = torch.tensor([labels.index(name) for name in names], device=device)
    return Split(e["input_ids"].to(device), e["attention_mask"].to(device), y,
                 e["attention_mask"].sum(1).numpy(), np.array(languages))

# --------------------------------------------------------------------------------- Training and evaluation
def predict(model, split, stop=(), tokens=4096):
    """Logits (N, C) of every sentence, in order: one pass by length, about `tokens` positions a batch."""
    model.eval()
    order, at, parts, P = np.argsort(-split.lengths, kind="stable"), 0, [], len(model.prompt())
    with torch.no_grad(), tqdm(total=len(order), leave=False, disable=None, unit="sentence") as bar:
        while at < len(order):
            if stop:
                raise KeyboardInterrupt
            rows = order[at:at + max(1, tokens // (int(split.lengths[order[at]]) + P))]
            parts.append(model(*split.batch(rows)[:2]))                                      # (B, C)
            at += len(rows)
            bar.update(len(rows))
    return torch.cat(parts)[torch.as_tensor(np.argsort(order)).to(split.ids.device)]         # (N, C)

def evaluate(model, split, stop=()):
    """({code: accuracy in percent}, mean loss, predicted classes (N,)) on a Split."""
    logits = predict(model, split, stop)
    loss = torch.nn.functional.cross_entropy(logits, split.labels).item()
    guess = logits.argmax(-1).cpu().numpy()
    right = guess == split.labels.cpu().numpy()
    codes = np.unique(split.languages).tolist()
    return {code: float(100 * right[split.languages == code].mean()) for code in codes}, loss, guess

def epoch_batches(lengths, size, seed, epoch):
    """Row numbers (B,) of each batch, similar lengths together (AUTHORS); no state but (seed, epoch)."""
    rng = np.random.default_rng((seed, epoch))
    rows = rng.permutation(len(lengths))
    pool = np.arange(len(rows)) // (size * min(50, max(1, len(rows) // (4 * size))))   # up to 50 batches each
    rows = rows[np.lexsort((-lengths[rows], pool))]                  # sorted by length within their pool
    batches = [rows[at:at + size] for at in range(0, len(rows), size)]
    return [batches[i] for i in rng.permutation(len(batches))]

def parameter_groups(model, cfg):
    """Parameters with equal settings together (4.4); recipe `released` is what the authors' program does."""
    released, found = cfg.recipe == "released", {}
    for name, p in model.named_parameters():
        lr, decay = cfg.lr, cfg.weight_decay
        if name.endswith("vectors"):                                 # PAPER 4.4: 5e-3, no decay, always
            lr, decay = cfg.lr if released and cfg.method == "dual" else cfg.prompt_lr, 0.0  # AUTHORS: cfg.lr
        elif released and name.endswith("pseudo_prompt"):            # PAPER 4.4: a part of the encoder
            lr, decay = cfg.prompt_lr, 0.0                           # AUTHORS: the large rate, no decay
        elif released and name.endswith("bias"):                     # AUTHORS: no decay on biases
            decay = 0.0
        if p.requires_grad:
            found.setdefault((lr, decay), []).append(p)
    return [dict(params=p, lr=lr, peak=lr, weight_decay=decay) for (lr, decay), p in found.items()]

def trainable(model):
    """{name: tensor} of what is trained; the frozen backbone is not in it."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

def copy_into(model, tensors):
    """Write {name: tensor} into a model's trainable parameters; KeyError or RuntimeError on a misfit."""
    for name, p in trainable(model).items():
        p.copy_(tensors[name].view(p.shape))       # no broadcasting

class FastDropout(torch.overrides.TorchFunctionMode):
    """Within it, dropout on a CPU cuts the mask of four elements from one random number, with p to 16 bits:
    one number for each element, as torch draws them, takes a quarter of a training step in bf16."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        drop = function is torch.nn.functional.dropout and args[0].device.type == "cpu"
        return (self.dropout if drop else function)(*args, **kwargs or {})
    def dropout(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        keep = bits[:x.numel()].view(x.shape) >= round(65536 * p) - 32768
        return x * keep.to(x.dtype).div_(1 - p)

def train_epoch(model, data, optimizer, cfg, log, stop):
    """The rest of the epoch that `log` stands in; -> its mean loss.  No step waits for the device."""
    batches = epoch_batches(data.lengths, cfg.batch_size, cfg.seed, len(log["curve"]))
    first = len(log["curve"]) * len(batches)                         # the epoch's first step
    model.train()
    bar = tqdm(range(log["step"], min(first + len(batches), cfg.steps)), initial=log["step"], total=cfg.steps,
               leave=False, disable=None, unit="step")
    for step in bar:
        if stop:
            break
        factor = cosine_with_restarts(step, math.ceil(cfg.warmup * cfg.steps), cfg.steps, cfg.cycles)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        ids, mask, y = data.batch(batches[step - first])
        with FastDropout():
            loss = torch.nn.functional.cross_entropy(model(ids, mask), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        log["epoch_losses"].append(loss.detach())
        log["step"], log["lr"] = step + 1, cfg.lr * factor
        if not bar.disable and step % 20 == 0:                       # on a terminal only: a GPU waits
            dev = f"{log['curve'][-1]['dev_accuracy']:.1f}%" if log["curve"] else "-"
            bar.set_postfix_str(f"loss {loss.item():.3f} lr {log['lr']:.1e} dev {dev}", refresh=False)
    losses = [loss.item() for loss in log["epoch_losses"]]           # here the host waits, once an epoch
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            names = ", ".join(sorted(set(data.languages[batches[i]])))
            raise FloatingPointError(f"step {first + i + 1}: loss {loss} on {names}; last checkpoint kept")
    return sum(losses) / max(1, len(losses))

def train(model, data, dev, cfg, folder, stop=(), state=None):
    """Train on the Split `data`, keep what is best on the Split `dev`; -> the log of the run (a dict).
    An evaluation and a checkpoint end each epoch.  `state`, a checkpoint, is gone on from, to the last bit.
    Raises KeyboardInterrupt (a checkpoint is made), FloatingPointError (the last stays), InputError."""
    optimizer = Adafactor(parameter_groups(model, cfg), lr=cfg.lr)
    log = dict(step=0, curve=[], epoch_losses=[], lr=0.0, best=None, waited=0, seconds=0.0)
    if state:
        with as_input_error(f"{folder}/checkpoint.pt does not fit", "; choose another --out"):
            copy_into(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])
            log.update(state["log"])
        print(f"going on from step {log['step']}")
    began = time.time() - log["seconds"]
    print("epoch    step    loss  dev loss   dev acc.  majority        lr  seconds     left")
    while not log["curve"] or (log["step"] < cfg.steps and log["waited"] < cfg.patience):
        try:
            loss = train_epoch(model, data, optimizer, cfg, log, stop)
            _, dev_loss, guess = evaluate(model, dev, stop)
        except KeyboardInterrupt:                  # `stop` holds a signal
            log["seconds"] = time.time() - began
            save_checkpoint(model, optimizer, log, cfg, folder)
            raise
        if not math.isfinite(dev_loss):            # the epoch's last update broke it
            raise FloatingPointError(f"step {log['step']}: dev loss {dev_loss}; last checkpoint kept")
        log["seconds"] = time.time() - began
        record(log, model, cfg, loss, dev_loss, guess, dev.labels.cpu().numpy())
        save_checkpoint(model, optimizer, log, cfg, folder)
    copy_into(model, log["best"])
    return log

def record(log, model, cfg, loss, dev_loss, guess, labels):
    """Note an evaluation: the best accuracy is kept, ties go to the earlier; patience is for dev loss."""
    curve, accuracy = log["curve"], float(100 * np.mean(guess == labels))
    if not curve or accuracy > max(c["dev_accuracy"] for c in curve):
        log["best"] = {name: t.clone() for name, t in trainable(model).items()}
    if 2 * log["step"] >= cfg.steps:               # PAPER 4.4: after cycle 1; AUTHORS: from half-time on
        log["waited"] = 0 if not curve or dev_loss < min(c["dev_loss"] for c in curve) else log["waited"] + 1
    curve.append(dict(epoch=len(curve) + 1, step=log["step"], loss=loss, dev_loss=dev_loss, lr=log["lr"],
                      dev_accuracy=accuracy, majority=float(100 * np.bincount(labels).max() / len(labels))))
    left, log["epoch_losses"] = log["seconds"] * (max(1, cfg.steps) / max(1, log["step"]) - 1), []
    row = "{epoch:5d} {step:7d} {loss:7.3f} {dev_loss:9.3f} {dev_accuracy:9.1f}% {majority:8.1f}% {lr:9.1e}"
    print(row.format(**curve[-1]), f"{log['seconds']:8.0f} {left:8.0f}", flush=True)
    if len(set(guess.tolist())) == 1:
        print("      warning: every dev sentence is predicted as one class; try more steps or other rates")

# ------------------------------------------------------------------------------------------ The run folder
def write_file(path, write):
    """write(file) into `path` by way of a temporary name, so that `path` is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.new", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)

def save_checkpoint(model, optimizer, log, cfg, folder):
    """Everything needed to go on, and log.csv."""
    state = dict(config=dataclasses.asdict(cfg), log=log, model=trainable(model), rng=torch.get_rng_state(),
                 optimizer=optimizer.state_dict(), cuda=torch.cuda.get_rng_state_all())
    write_file(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    if log["curve"]:
        rows = [",".join(map(str, row)) for row in ([*log["curve"][0]], *(c.values() for c in log["curve"]))]
        write_file(folder / "log.csv", lambda file: file.write("\n".join([*rows, ""]).encode()))

def read_checkpoint(path):
    """What save_checkpoint wrote, read without unpickling code.  Raises InputError."""
    with as_input_error(f"{path}: not a checkpoint of this program", "; choose another --out"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("config", "log", "model", "optimizer", "rng", "cuda")}

def claim_folder(cfg):
    """(folder, its result if finished, its checkpoint if interrupted) of a run named by what defines it.
    Raises InputError where the folder holds a run with other settings, or cannot be written to."""
    share = round(100 * cfg.xpe_ratio) if cfg.method == "dual" else ""
    languages = "-".join(filter(None, (cfg.source[:100], cfg.target[:100]))).replace(",", "+")
    folder = Path(cfg.out, f"{'toy-' * cfg.toy}{cfg.method}{share}-{languages}-s{cfg.seed}")
    finished, begun = folder / "result.json", folder / "checkpoint.pt"
    with as_input_error(f"{folder}: not writable, or result.json not readable", "; choose another --out"):
        above = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=above).close()                    # writable?  Leaves nothing
        result = json.loads(finished.read_text()) if finished.exists() else None
    state = read_checkpoint(begun) if begun.exists() and not result else None
    theirs = (result or state or {}).get("config", {})
    differ = [f"{key} ({theirs[key]} there, {mine} here)" for key, mine in dataclasses.asdict(cfg).items()
              if key not in ("out", "device", "target_steps") and theirs.get(key, mine) != mine]
    if differ:
        raise InputError(f"{folder} was made with other settings: {', '.join(differ)}; choose another --out")
    return folder, result, state

# ------------------------------------------------------------------------------------------------ Adapters
# Finished prompt and head as PEFT loads them.  Needs torch, json, Path, InputError and the prompts' section.
HEAD = "base_model.classifier."                    # PEFT's name for the head; its two Linears follow

def save_adapter(model, folder, base="", facts=None):
    """Write prompt (P, H) and head as a PEFT PROMPT_TUNING adapter for `base`; `facts` go into xpe.json.
    Raises InputError for pool "bos": PEFT's head reads position 0."""
    from safetensors.torch import save_file
    if model.pool == "bos":
        raise InputError("PEFT's head reads position 0: pool 'bos' cannot be saved as an adapter")
    model.eval()                                   # the prompt without dropout
    tensors = {"prompt_embeddings": model.prompt(), **{HEAD + k: v for k, v in model.head.named_parameters()}}
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    b, folder = model.backbone.config, Path(folder)
    config = dict(peft_type="PROMPT_TUNING", task_type="SEQ_CLS", base_model_name_or_path=base,
                  num_virtual_tokens=len(tensors["prompt_embeddings"]), num_transformer_submodules=1,
                  token_dim=b.hidden_size, num_layers=b.num_hidden_layers, modules_to_save=["classifier"],
                  num_attention_heads=b.num_attention_heads, prompt_tuning_init="RANDOM", inference_mode=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    (folder / "xpe.json").write_text(json.dumps(facts or {}, indent=1))

def read_adapter(folder):
    """PEFT's config of the adapter in a folder, `labels` if known, and its tensors.  Raises InputError."""
    from safetensors.torch import load_file
    facts = Path(folder, "xpe.json")               # save_adapter's; others have none
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        config["labels"] = json.loads(facts.read_text()).get("labels") if facts.exists() else None
        config.update(peft_type=config["peft_type"], num_virtual_tokens=int(config["num_virtual_tokens"]))
        return config, load_file(Path(folder, "adapter_model.safetensors"))
    except Exception as error:                     # no such file, not safetensors, no such key, no number
        raise InputError(f"{folder}: not a readable adapter ({type(error).__name__}: {error})") from None

def load_adapter(folder, backbone):
    """A PromptedClassifier from our folder, any PEFT PROMPT_TUNING one, or the authors' P_TUNING one, whose
    prompt still has its encoder.  Raises InputError that names a missing, surplus or misshapen tensor."""
    config, tensors = read_adapter(folder)
    kind, P, H = config["peft_type"], config["num_virtual_tokens"], backbone.config.hidden_size
    shape = lambda name: [*tensors[name].shape, 0] if name in tensors else [0, 0]      # 0: has no such
    if kind == "PROMPT_TUNING":
        prompt, keys = SoftPrompt(P, H), {"vectors": "prompt_embeddings"}
    elif kind == "P_TUNING":
        n, parts = shape("prompt_encoder.xpe_embedding.weight")[0], "prompt_encoder."
        prompt = build_prompt("spt" if n == 0 else "xpe" if n >= P else "dual", P, H, n / max(P, 1),
                              mlp_hidden=shape(parts + "xpe_head.0.weight")[0] or 256)
        keys = {"vectors": parts + "embedding.weight", "pseudo_prompt": parts + "xpe_embedding.weight"}
    else:
        raise InputError(f"{folder}: peft_type {kind} is neither PROMPT_TUNING nor P_TUNING")
    model = PromptedClassifier(backbone, prompt, shape(HEAD + "out_proj.weight")[0] or 1).to(backbone.device)
    wanted = {HEAD + name: p for name, p in model.head.named_parameters()}
    for name, p in prompt.named_parameters():
        name = name.removeprefix("standard.").removeprefix("encoded.")
        wanted[keys.get(name) or name.replace("mlp.", "prompt_encoder.xpe_head.")] = p
    there, here = ({name: tuple(t.shape) for name, t in some.items()} for some in (tensors, wanted))
    wrong = sorted(f"{'missing' if here.get(name) == size else 'surplus'} {name} {size}"
                   for name, size in here.items() ^ there.items())
    if wrong:
        raise InputError(f"{folder}: {', '.join(wrong)}")
    for name, p in wanted.items():
        p.data.copy_(tensors[name])
    return model.eval()

# -------------------------------------------------------------------------------------------- Command line
def check(cfg):
    """Raise InputError for what can be told without loading anything; fill in what other settings decide."""
    least = dict(steps=0, target_steps=0, seed=0, prompt_length=2 if cfg.method == "dual" else 1)
    for field in dataclasses.fields(cfg):
        value, low = getattr(cfg, field.name), least.get(field.name, 1 if field.type is int else 0)
        high = 1 if field.name.endswith(("warmup", "dropout")) else 2**63 if field.type is int else math.inf
        if field.type in (int, float) and value is not None and not low <= value < high:
            raise InputError(f"--{field.name.replace('_', '-')} {value}: must lie in [{low}, {high})")
    if cfg.predict and not cfg.load:
        raise InputError("--predict needs --load, the folder of an adapter")
    if cfg.method != "dual" and cfg.xpe_ratio is not None:
        raise InputError(f"--xpe-ratio belongs to --method dual; {cfg.method} has none")
    if cfg.xpe_ratio is None:
        cfg.xpe_ratio = {"dual": 0.7, "xpe": 1.0}.get(cfg.method, 0.0)
    if cfg.method == "dual" and not 0 < cfg.xpe_ratio < 1:
        raise InputError(f"--xpe-ratio {cfg.xpe_ratio:g}: must lie between 0 (like spt) and 1 (like xpe)")
    if cfg.method == "full":
        cfg.prompt_length, cfg.dtype = 0, "fp32"   # trained weights would not move in bf16
        if cfg.target:
            raise InputError("--target needs a prompt; --method full trains on a target with --source CODE")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with as_input_error(f"--device {cfg.device}: not on this machine", "; use cpu or auto"):
        cfg.device = str(torch.empty(0, device=auto if cfg.device == "auto" else cfg.device).device)
    cfg.dtype = {"auto": "bf16" if cfg.device.startswith("cuda") else "fp32"}.get(cfg.dtype, cfg.dtype)
    cfg.init_from = cfg.init_from and os.path.relpath(cfg.init_from, cfg.out)    # both can move, together
    if cfg.weight_decay is None:
        cfg.weight_decay = 0.01 if cfg.recipe == "released" else 0.1             # PAPER 4.4: 0.1

def pick_languages(text, data):
    """Codes from "all", a source's name or a list with commas, each checked against what `data` has."""
    codes = sorted({path.parent.name for path in Path(data).glob("*/*.tsv")}) if data != "toy" else []
    if not codes and data != "toy" and Path(data).is_dir():
        from datasets import get_dataset_config_names
        with as_input_error(f"--data {data}: no data set in it"):
            codes = sorted(get_dataset_config_names(data))
    elif not codes and data.startswith((".", "/", "~")):
        raise InputError(f"--data {data}: no such folder")
    codes = codes or list(groups.LANGUAGES)        # the hub's, and the toy's
    named = groups.SOURCES | {"full": groups.FULL_SUPERVISION_TARGETS, "all": codes}
    wanted = [code for name in map(str.strip, text.split(",")) for code in named.get(name, [name])]
    for code in wanted:
        if code not in codes:
            near = difflib.get_close_matches(code, [*codes, *named], cutoff=0.4) or codes[:8]
            raise InputError(f"unknown language {code!r} in {data}; there are: {', '.join(near)}")
    return list(dict.fromkeys(wanted))

def backbone_of(cfg):
    """A config's backbone and tokenizer.  Raises InputError where it has too few positions."""
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    backbone, tokenizer = load_backbone(cfg.backbone, cfg.device, dtype, cfg.backbone_dropout == "on")
    room = backbone.config.max_position_embeddings - backbone.config.pad_token_id - 1        # XLM-R's first
    if cfg.prompt_length + cfg.max_length > room:
        raise InputError(f"--prompt-length {cfg.prompt_length} + --max-length {cfg.max_length}: more than "
                         f"the {room} positions of {cfg.backbone}")
    return backbone, tokenizer

def build_model(cfg, num_labels):
    """The model that a config starts from, and its tokenizer; --init-from is a run or an adapter."""
    torch.manual_seed(cfg.seed)                    # before anything is built
    backbone, tokenizer = backbone_of(cfg)
    prompt = build_prompt(cfg.method, cfg.prompt_length, backbone.config.hidden_size, cfg.xpe_ratio,
                          mlp_hidden=cfg.mlp_hidden, dropout=cfg.dropout)
    model = PromptedClassifier(backbone, prompt, num_labels, cfg.pool, cfg.head_dropout).to(cfg.device)
    backbone.requires_grad_(cfg.method == "full")
    if cfg.init_from:
        start = Path(os.path.normpath(Path(cfg.out, cfg.init_from)))
        with as_input_error(f"--init-from {start}: does not fit", "; a run must be finished, --method and "
                            "length the same; a finished prompt has no encoder and goes on as --method spt"):
            state = read_checkpoint(start / "checkpoint.pt") if (start / "result.json").exists() else None
            theirs = state["config"] if state else vars(cfg)
            if theirs["pool"] != cfg.pool or cfg.target and theirs["source"] != cfg.source:
                raise InputError(f"it was trained with --source {theirs['source']} --pool {theirs['pool']}")
            copy_into(model, state["log"]["best"] if state else trainable(load_adapter(start, backbone)))
    return model, tokenizer

def run(cfg, stop=()):
    """One run, from the config to result.json; a finished run is only reported."""
    folder, result, state = claim_folder(cfg)
    if result:
        print(f"{folder} is finished: reported, not repeated")
        return groups.print_result(result)
    sources = pick_languages(cfg.target or cfg.source, cfg.data)
    targets = pick_languages(cfg.languages, cfg.data)
    names = {name for _, name, _ in load_rows(cfg.data, pick_languages(cfg.source, cfg.data), "train", None)}
    labels = sorted(groups.LABELS if names > set(groups.LABELS) else names)  # an eighth in SIB-200 is a slip
    parts = (sources, "train"), (sources, "dev"), (targets, "test")
    rows = [load_rows(cfg.data, *part, labels) for part in parts]    # before the backbone, which takes long
    model, tokenizer = build_model(cfg, len(labels))
    data, dev, test = (encode(part, labels, tokenizer, cfg.device, cfg.max_length) for part in rows)
    n, whole = (sum(p.numel() for p in ps) for ps in (trainable(model).values(), model.parameters()))
    print(f"{folder}: {n:,} of {whole:,} parameters train ({100 * n / whole:.2f} %) on {len(data.lengths):,} "
          f"sentences, {len(sources)} languages, {len(labels)} labels; {cfg.dtype}, {cfg.device}")
    trained = train(model, data, dev, cfg, folder, stop, state)
    accuracy = evaluate(model.cache_prompt(), test, stop)[0]
    result = dict(config=dataclasses.asdict(cfg), seconds=trained["seconds"], trainable_parameters=n,
                  versions=dict(python=sys.version.split()[0], torch=torch.__version__), accuracy=accuracy,
                  groups=groups.group_means(accuracy), dev_curve=trained["curve"],
                  dev_accuracy=max(c["dev_accuracy"] for c in trained["curve"]))
    if cfg.pool == "first" and cfg.method != "full":                 # another, PEFT's layout cannot say
        save_adapter(model, folder / "adapter", cfg.backbone, dict(result, labels=labels, languages=sources))
    write_file(folder / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    if cfg.method == "full":
        (folder / "checkpoint.pt").unlink()        # 5 GB of XLM-R large
    return groups.print_result(result)

def transfer(cfg, stop=()):
    """Sequential transfer (4.1): go on from the best prompt and head of a source run in each target alone."""
    targets = pick_languages(cfg.target, cfg.data)
    for split in ("train", "dev", "test"):         # read them before the source run, which takes long
        load_rows(cfg.data, targets, split, None)
    if not cfg.init_from:
        run(source := dataclasses.replace(cfg, target=""), stop)
        cfg.init_from = claim_folder(source)[0].name
    for code in targets:                           # PAPER 4.4: patience 30; AUTHORS: warm-up, no dropout
        run(dataclasses.replace(cfg, target=code, languages=code, steps=cfg.target_steps, patience=30,
                                warmup=0.05, dropout=0.0), stop)

def use_adapter(cfg, stop=()):
    """--load: accuracy of an adapter per language; with --predict, a label for each line of a text file."""
    adapter, _ = read_adapter(cfg.load)
    labels, cfg.prompt_length = adapter["labels"] or list(groups.LABELS), adapter["num_virtual_tokens"]
    if cfg.backbone == Config.backbone:            # the default: the adapter knows better
        cfg.backbone = adapter.get("base_model_name_or_path") or cfg.backbone
    rows = ([(line, labels[0], "") for line in read_lines(cfg.predict)] if cfg.predict else
            load_rows(cfg.data, pick_languages(cfg.languages, cfg.data), "test", labels))
    backbone, tokenizer = backbone_of(cfg)
    model = load_adapter(cfg.load, backbone).cache_prompt()
    if len(labels) != model.head.out_proj.out_features:
        raise InputError(f"--load {cfg.load}: its head has not as many classes as the {len(labels)} labels")
    if not rows:                                   # an empty file
        return
    split = encode(rows, labels, tokenizer, cfg.device, cfg.max_length)
    if not cfg.predict:
        return groups.print_result(dict(config=vars(cfg), accuracy=evaluate(model, split, stop)[0]))
    shares, classes = predict(model, split, stop).softmax(-1).max(-1)
    for (line, *_), share, label in zip(rows, shares.tolist(), classes.tolist()):
        print(f"{labels[label]}\t{share:.4f}\t{line}" if line.strip() else f"\t\t{line}")

def read_lines(path):
    """The lines of a UTF-8 file, or of standard input for "-".  Raises InputError that names the line."""
    with as_input_error(f"--predict {path}: cannot be read"):
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n") if raw else []
    except UnicodeDecodeError as error:            # byte 10 is the line feed
        raise InputError(f"--predict {path}: line {error.object[:error.start].count(10) + 1} is not UTF-8")

def benchmark(cfg, stop=()):
    """--benchmark: a training step and an evaluation batch of texts of 36 random tokens, beside the products
    with the layers' matrices alone.  Medians of 5 rounds, after one to warm up, of 8 batches each in turns; a
    share is of the products in the same round.  Operations for each of S positions: m = 2 (4 H H + 2 H F) a
    layer, two for each weight of its matrices, where the last three of the last layer count for one position;
    a = 4 S H a layer in the attention.  Evaluation m + a.  Training adds a backward pass: m + 2 a, frozen
    weights need no gradient; 2 m + 2 a with --method full."""
    cfg.steps, cfg.max_length, B, S = 8, 36, cfg.batch_size, cfg.prompt_length + 36
    model, ids = build_model(cfg, num_labels=7)[0], torch.randint(5, 400, (8 * B, 36), device=cfg.device)
    data = Split(ids, torch.ones_like(ids), ids[:, 0] % 7, np.full(8 * B, 36), np.full(8 * B, "random"))
    optimizer = Adafactor(parameter_groups(model, cfg), cfg.lr)
    train_8 = lambda: train_epoch(model, data, optimizer, cfg, dict(step=0, curve=[], epoch_losses=[]), stop)
    matrices = [p.detach() for p in model.backbone.encoder.layer.parameters() if p.dim() == 2]
    x = {w.shape[1]: torch.randn(B * S, w.shape[1], device=cfg.device, dtype=w.dtype) for w in matrices}
    every, last = (2 * sum(w.numel() for w in some) for some in (matrices, matrices[-3:]))
    m, a = every - last + last / S, 4 * S * matrices[0].shape[0] * len(matrices) // 6
    works = {"products": (every, lambda: sum((x[w.shape[1]] @ w.T)[0, 0] for w in matrices * 8).item()),
             "training step": ((3 if cfg.method == "full" else 2) * m + 3 * a, train_8),
             "evaluation": (m + a, lambda: predict(model, data, stop).sum().item())}
    turns = np.array([[timeit.timeit(w, number=1) / 8 for _, w in works.values()] for _ in range(6)][1:])
    rates = np.array([operations * B * S for operations, _ in works.values()]) / turns / 1e9         # (5, 3)
    print(f"a batch of {B:<4} {'ms':>8} {'tokens/s':>9} {'sentences/s':>11} {'GFLOP/s':>8} share")
    for name, t, rate, share in zip(works, *(np.median(x, 0) for x in (turns, rates, rates / rates[:, :1]))):
        print(f"{name:<15} {1000 * t:8.1f} {B * S / t:9.0f} {B / t:11.1f} {rate:8.0f} {share:5.0%}")
    from resource import RUSAGE_SELF, getrusage    # not on Windows; in kB on Linux, in bytes on macOS
    peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF)[2] * 1024 ** (sys.platform == "linux")
    print(f"peak memory {peak / 2**30:.2f} GiB; {cfg.dtype}, {cfg.device}")

def main(argv=None):
    """The command line; -> exit code: 0 done, 1 the run failed, 2 wrong input, 128 + signal when stopped."""
    stop = []
    def note(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)      # a second one ends at once, whatever is under way
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        check(cfg := parse(argv))
        job = benchmark if cfg.benchmark else use_adapter if cfg.load else transfer if cfg.target else run
        job(cfg, stop)
        return 0
    except KeyboardInterrupt:
        message = "stopped" if cfg.load or cfg.benchmark else "stopped; the same command goes on from here"
        code = 128 + stop[0]
    except (InputError, FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        code, message = 2 if isinstance(error, InputError) else 1, error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"xpe.py: {message}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
